"""Bilinear interpolation of masks in blocks of rows, as ``F.interpolate`` does it whole."""

from __future__ import annotations

import torch
from torch import Tensor

_HUGE = 1e30  # stands for infinity: an infinite logit times an interpolation weight of 0 is not a number


def finite(logits: Tensor) -> Tensor:
    """The logits, where what is not a number is no mask."""
    return logits.nan_to_num(nan=-_HUGE).clamp_(-_HUGE, _HUGE)


def _axis(size: int, cells: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of every place of an axis of ``size`` over ``cells`` cells the two cells around it and the share of the
    second, in the dtype in which ``F.interpolate`` finds them."""
    place = torch.arange(size, dtype=dtype, device=device).add_(0.5).mul_(cells / size).sub_(0.5)
    place.clamp_(0, cells - 1)
    lower = place.long()
    return lower, (lower + 1).clamp_(max=cells - 1), place.sub_(lower)


def upsampled(masks: Tensor, height: int, width: int, rows: slice = slice(None)) -> Tensor:
    """(Q, h, w) to (Q, height, width), bilinear; some rows of that."""
    for axis, size in ((1, height), (2, width)):
        own = rows if axis == 1 else slice(None)
        if size != masks.shape[axis]:
            lower, upper, share = (t[own] for t in _axis(size, masks.shape[axis], masks.dtype, masks.device))
            share = share[:, None] if axis == 1 else share
            masks = masks.index_select(axis, lower).lerp_(masks.index_select(axis, upper), share)
        elif axis == 1:
            masks = masks[:, own]
    return masks
