"""A baseline for SegViT: one linear layer on the last feature map, trained by cross-entropy."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from segvit.config import SegViTConfig
from segvit.model import SegViT

__all__ = ["CrossEntropy", "LinearSegmenter"]


class _LinearHead(nn.Sequential):
    def __init__(self, config: SegViTConfig) -> None:
        width = config.backbone.width
        super().__init__(nn.LayerNorm(width), nn.Linear(width, config.num_classes))
        self.config = config

    def mask_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the scores, for images of `grid` patches."""
        return self.config.backbone.grid_after(self.config.taps[-1], grid)

    def fuse(self) -> None:
        """Nothing to fold."""

    def unfuse(self) -> None:
        """Nothing was folded."""


class LinearSegmenter(SegViT):
    """LayerNorm and a linear layer on the backbone's last tokens; otherwise used like `SegViT`.

    `forward` returns class scores on the last tokens' grid, (B, num_classes, h, w); config.json gets the key
    "head".
    """

    head = "linear"
    activation = "none"

    def __init__(self, config: SegViTConfig) -> None:
        super().__init__(dataclasses.replace(config, taps=config.taps[-1:]))
        self.decoder = _LinearHead(config)

    def forward(self, images: Tensor) -> Tensor:
        grid = self.decoder.mask_grid(self._grid(images))
        (feature,) = self.backbone(images)
        return self.decoder(feature).transpose(1, 2).unflatten(-1, grid)

    def semantic_scores(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(output.float(), size=size, mode="bilinear", align_corners=False)

    def scoring(self, output: Tensor) -> tuple[Tensor, Tensor]:
        identity = torch.eye(output.shape[1], device=output.device, dtype=output.dtype)
        return output, identity.expand(len(output), -1, -1)

    def similarity_maps(self, images: Tensor) -> list[Tensor]:
        raise ValueError("a linear head has no similarity maps")


class CrossEntropy(nn.Module):
    """Pixel-wise cross-entropy on upsampled scores, the mean over counted pixels of all processes' images."""

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, output: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = F.interpolate(output.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        total = F.cross_entropy(scores, labels, ignore_index=self.ignore_index, reduction="sum")
        counted = (labels != self.ignore_index).sum().to(total.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counted)
            counted = counted / dist.get_world_size()
        loss = total / torch.clamp(counted, min=1)
        return {"cross_entropy": loss, "total": loss}
