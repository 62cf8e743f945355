"""Rotary positions (RoFormer, arXiv 2104.09864): pairs of channels of queries and keys turned by angles."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys with their rotary positions.

    In each head the pairs of channels are i and i + D/2: (a, b) becomes (a·cos − b·sin, b·cos + a·sin).

    Args:
        x: (..., D), D even.
        cos, sin: of the angles, of a shape that broadcasts to (..., D/2); cast to the dtype of ``x``.

    Returns:
        As ``x``, in one piece.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    halves = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(halves, dim=-1)
