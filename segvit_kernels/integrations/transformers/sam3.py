"""SAM 3's instances and its semantic map, without floating-point or 64-bit masks at full size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segvit_kernels.integrations._kinds import known_base
from segvit_kernels.ops._checks import number
from segvit_kernels.ops.mask_binarize import mask_binarize

OUTPUTS = ("Sam3ImageSegmentationOutput", "Sam3LiteTextImageSegmentationOutput")


def is_sam3(outputs: Any) -> bool:
    """Whether these are SAM 3's, or of a class that inherits from it."""
    return known_base(type(outputs), OUTPUTS) is not None


def _above(probabilities: Tensor, size: tuple[int, int] | None, threshold: float) -> Tensor:
    """Masks (K, H, W) bool of (K, h, w)."""
    if size is None or not len(probabilities):
        return probabilities > threshold
    return mask_binarize(probabilities[None], (int(size[0]), int(size[1])), threshold=threshold).masks[0]


def _check_sizes(target_sizes: Sequence[tuple[int, int]] | None, batch: int) -> None:
    if target_sizes is not None and len(target_sizes) != batch:
        raise ValueError(f"target_sizes has length {len(target_sizes)}; expected {batch}, one per image")


def instances(
    outputs: Any,
    threshold: float | None,
    mask_threshold: float | None,
    target_sizes: Sequence[tuple[int, int]] | None,
) -> list[dict[str, Tensor]]:
    """``scores``, ``boxes`` and ``masks`` of each image, as the image processor's; masks are bool."""
    threshold = number("threshold", 0.3 if threshold is None else threshold)
    mask_threshold = number("mask_threshold", 0.5 if mask_threshold is None else mask_threshold, 0, 1)
    scores = outputs.pred_logits.sigmoid()
    if outputs.presence_logits is not None:
        scores = scores * outputs.presence_logits.sigmoid()
    _check_sizes(target_sizes, len(scores))
    results = []
    for i, own in enumerate(scores):
        keep, size = own > threshold, None if target_sizes is None else target_sizes[i]
        boxes = outputs.pred_boxes[i][keep]
        if size is not None:
            height, width = size
            boxes = boxes * boxes.new_tensor([width, height, width, height])
        masks = _above(outputs.pred_masks[i][keep].sigmoid(), size, mask_threshold)
        results.append({"scores": own[keep], "boxes": boxes, "masks": masks})
    return results


def semantic(
    outputs: Any, threshold: float | None, target_sizes: Sequence[tuple[int, int]] | None
) -> list[Tensor]:
    """Where the prompt is, (height, width) int64 of 0 and 1, as the image processor's."""
    logits = outputs.semantic_seg
    if logits is None:
        raise ValueError("outputs has semantic_seg None; expected that of a model with a semantic head")
    threshold = number("threshold", 0.5 if threshold is None else threshold, 0, 1)
    _check_sizes(target_sizes, len(logits))
    sizes: Sequence[Any] = [None] * len(logits) if target_sizes is None else target_sizes
    with torch.no_grad():
        return [
            _above(own.sigmoid(), size, threshold)[0].long() for own, size in zip(logits, sizes, strict=True)
        ]
