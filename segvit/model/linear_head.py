"""A baseline for SegViT: one linear layer on the last feature map, trained by cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segvit.config import SegViTConfig
from segvit.model.decoder import Decoder
from segvit.model.losses import full_precision, over_processes, weights_of_classes
from segvit.model.segvit import SegViT

__all__ = ["CrossEntropy", "LinearSegmenter"]


class _LinearHead(nn.Sequential, Decoder):
    def __init__(self, config: SegViTConfig) -> None:
        width = config.backbone.width
        super().__init__(nn.LayerNorm(width), nn.Linear(width, config.num_classes))
        self.config = config


class LinearSegmenter(SegViT):
    """LayerNorm and a linear layer on the backbone's last tokens; otherwise used like `SegViT`.

    `forward` returns class scores on the last tokens' grid, (B, num_classes, h, w).
    """

    # The output of this model is another than its parent's: each takes its own alone.
    kind = "linear"
    activation = "none"
    mixes_classes = False
    has_similarity_maps = False

    def _make_decoder(self, config: SegViTConfig) -> Decoder:
        return _LinearHead(config)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        grid = self.decoder.mask_grid(self._grid(images))
        (feature,) = self.backbone(images)
        return self.decoder(feature).transpose(1, 2).unflatten(-1, grid)

    def semantic_scores(self, output: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        return F.interpolate(output.float(), size=size, mode="bilinear", align_corners=False)

    def scoring(self, output: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return output, output.new_ones(output.shape[:2])

    def probabilities(self, scores: Tensor) -> Tensor:
        """The softmax of scores (B, N, ...)."""
        return scores.softmax(1)

    def similarity_maps(self, images: Tensor) -> list[Tensor]:
        raise ValueError("the decoder linear has no similarity maps")


class CrossEntropy(nn.Module):
    """Pixel-wise cross-entropy on upsampled scores, the mean over counted pixels of all processes' images.

    With `class_weights` the weighted mean, each pixel by its class's weight. A batch may be split into parts,
    as for `segvit.model.losses.SegViTLoss`.
    """

    class_weights: Tensor | None

    def __init__(self, ignore_index: int = 255, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.register_buffer("class_weights", weights_of_classes(class_weights), False)

    def normalisers(self, labels: Tensor) -> Tensor:
        """The sum of the weights of counted pixels in labels (B, H, W), over all processes / their number."""
        counted = labels != self.ignore_index
        if self.class_weights is not None:
            counted = counted * self.class_weights.double()[torch.where(counted, labels, 0)]
        return over_processes(counted.sum(dtype=torch.float64))

    def forward(self, output: Tensor, labels: Tensor, normalisers: Tensor | None = None) -> dict[str, Tensor]:
        """'cross_entropy', and the same as 'total'.

        Args:
            output: class scores (B, N, h, w). labels: int64 (B, H, W).
            normalisers: those of the whole batch, where this is a part of it.
        """
        scores = full_precision(output)
        scores = F.interpolate(scores, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        weights = None if self.class_weights is None else self.class_weights.to(scores.dtype)
        total = F.cross_entropy(scores, labels, weights, ignore_index=self.ignore_index, reduction="sum")
        if normalisers is None:
            normalisers = self.normalisers(labels)
        loss = total / normalisers.to(total.dtype)
        return {"cross_entropy": loss, "total": loss}
