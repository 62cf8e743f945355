"""Masks of torchvision's Mask R-CNN in their image, without a floating-point map for each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit_kernels.ops._checks import number, size_pair, whole
from segvit_kernels.ops.mask_binarize import BinaryMasks, mask_binarize


@torch.no_grad()
def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    *,
    padding: int = 1,
    threshold: float = 0.5,
    format: str = "bool",
    backend: str | None = None,
) -> BinaryMasks:
    """What torchvision's ``paste_masks_in_image(masks, boxes, size)[:, 0] > threshold`` is, in one pass.

    As there, masks get a border of zeros, boxes grow with it and are cut to whole pixels, of which they have
    the last. The (K, H, W) maps of floating point do not exist: K masks of a large image take a byte a pixel,
    a bit ("packed"), or COCO's run lengths ("rle").

    Args:
        masks: (K, 1, M, M) or (K, M, M), probabilities.
        boxes: (K, 4), (left, top, right, bottom) in pixels.
        size: (H, W) of the image.
        padding: cells of zeros around a mask; torchvision's is 1.
        threshold: from 0 to 1; a pixel above it belongs to the mask.
        format, backend: as in :func:`~segvit_kernels.mask_binarize`.

    Returns:
        ``masks`` (K, H, W) bool, (K, H, ⌈W/32⌉) int32 or a list of K dictionaries; ``areas`` (K,) and tight
        ``boxes`` (K, 4).

    Raises:
        TypeError, ValueError: an argument is of another type or shape, or out of range.
    """
    for name, tensor in (("masks", masks), ("boxes", boxes)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if masks.ndim == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if masks.ndim != 3 or masks.shape[1] != masks.shape[2] or masks.shape[1] < 1:
        raise ValueError(f"masks has shape {tuple(masks.shape)}; expected (K, 1, M, M) or (K, M, M)")
    if tuple(boxes.shape) != (len(masks), 4):
        raise ValueError(f"boxes has shape {tuple(boxes.shape)}; expected {(len(masks), 4)}, one a mask")
    number("threshold", threshold, 0, 1)
    border, side = whole("padding", padding, 0), masks.shape[1]
    scale = (side + 2 * border) / side
    centres, halves = (boxes[:, 2:] + boxes[:, :2]) * 0.5, (boxes[:, 2:] - boxes[:, :2]) * 0.5 * scale
    first, last = (centres - halves).long(), (centres + halves).long() + 1
    found = mask_binarize(
        F.pad(masks, (border,) * 4)[None],
        size_pair("size", size),
        boxes=torch.cat([first, last], 1).float()[None],
        threshold=threshold,
        format=format,
        backend=backend,
    )
    return BinaryMasks(found.masks[0], found.areas[0], found.boxes[0])
