"""Cases and oracle of binary masks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from segvit_kernels.ops.mask_binarize import BinaryMasks, resized_reference


@dataclasses.dataclass(frozen=True)
class BinarizeCase:
    """Sizes of one call of ``mask_binarize``."""

    name: str
    batch: int
    count: int
    grid: tuple[int, int]
    size: tuple[int, int]
    boxes: bool = False
    threshold: float = 0.0
    coherent: bool = False

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Fresh random arguments; ``coherent`` masks are blobs, as a trained model's, others are noise."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch * self.count, 1, *self.grid)
        logits = 4 * torch.randn(shape, generator=generator)
        if self.coherent:
            centre, radius = torch.rand(2, *shape[:2], 2, generator=generator)
            y, x = (
                (torch.linspace(0, 1, n) - centre[..., i, None]) / (0.05 + radius[..., i, None] / 2)
                for i, n in enumerate(self.grid)
            )
            logits = 6 - 8 * (y.square()[..., None] + x.square()[..., None, :]) + logits / 20
        found: dict[str, Any] = {
            "mask_logits": logits.view(self.batch, self.count, *self.grid).to(device, dtype),
            "size": self.size,
            "threshold": self.threshold,
            "boxes": None,
        }
        if self.boxes:
            scale = torch.tensor([self.size[1], self.size[0]] * 2)
            corners = (
                (torch.rand(self.batch, self.count, 2, 2, generator=generator) * 1.4 - 0.2).sort(2).values
            )
            found["boxes"] = (corners.flatten(2) * scale).to(device)
        return found


CASES = (
    BinarizeCase("one_of_everything", 1, 1, (1, 1), (1, 1)),
    BinarizeCase("one_cell", 1, 2, (1, 1), (40, 37)),
    BinarizeCase("one_pixel", 2, 3, (7, 5), (1, 1)),
    BinarizeCase("odd", 2, 5, (7, 5), (100, 37)),
    BinarizeCase("words", 1, 3, (8, 8), (64, 96), threshold=0.7),
    BinarizeCase("smaller", 1, 3, (90, 70), (33, 17)),
    BinarizeCase("same", 1, 2, (21, 33), (21, 33)),
    BinarizeCase("wide", 1, 2, (3, 130), (35, 530)),
    BinarizeCase("blobs", 1, 7, (40, 40), (150, 170), coherent=True),
    BinarizeCase("boxes", 2, 6, (28, 28), (70, 90), boxes=True, threshold=-0.3),
    BinarizeCase("box blobs", 1, 9, (14, 14), (130, 75), boxes=True, coherent=True),
    BinarizeCase("no mask", 2, 0, (4, 5), (9, 40)),
)
"""Small cases that between them meet every branch of an implementation."""


def oracle(inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits (B, K, H, W) at full size less the threshold, computed in ``dtype``; −∞ outside boxes."""
    logits, boxes = inputs["mask_logits"].to(dtype), inputs["boxes"]
    return resized_reference(logits, inputs["size"], boxes) - inputs["threshold"]


def unpacked(words: Tensor, length: int) -> Tensor:
    """(..., n) int32 words to (..., length) bool."""
    bits = words[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    return bits.flatten(-2)[..., :length].bool()


def assert_masks(name: str, found: BinaryMasks, truth: Tensor, ordinary: Tensor) -> int:
    """Hold masks of booleans to the oracle's wherever rounding does not decide; return how many differ.

    A pixel may differ only where its true logit is nearer to the threshold than twice the largest error of
    ordinary PyTorch in the same dtype, plus rounding. Areas and boxes are those of the masks, exactly.

    Raises:
        AssertionError: with the figures.
    """
    masks = found.masks
    assert masks.dtype == torch.bool and masks.shape == truth.shape, f"{name}: {masks.dtype} {masks.shape}"
    areas, boxes = tight_boxes(masks)
    assert found.areas.dtype == found.boxes.dtype == torch.int32, f"{name}: {found.areas.dtype}"
    assert torch.equal(found.areas, areas), f"{name}: areas {found.areas} of {areas}"
    assert torch.equal(found.boxes, boxes), f"{name}: boxes {found.boxes} of {boxes}"
    wrong = masks != (truth > 0)
    if not wrong.any():
        return 0
    error = (ordinary.double() - truth)[truth.isfinite()].abs().max()
    allowed = 2 * error + 4 * torch.finfo(ordinary.dtype).eps * truth[truth.isfinite()].abs().max()
    worst = truth[wrong].abs().max()
    assert worst <= allowed, (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} pixels are wrong, the worst by {worst:.3g} where "
        f"rounding explains {allowed:.3g}"
    )
    return int(wrong.sum())


def tight_boxes(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Areas (B, K) and boxes (B, K, 4) of (B, K, H, W) booleans, pixel by pixel."""
    boxes = torch.zeros(*masks.shape[:2], 4, dtype=torch.int32)
    for b, k in masks.flatten(2).any(-1).nonzero().tolist():
        y, x = masks[b, k].nonzero().cpu().unbind(1)
        boxes[b, k] = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return masks.flatten(2).sum(-1, dtype=torch.int32), boxes.to(masks.device)
