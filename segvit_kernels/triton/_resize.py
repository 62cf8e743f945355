"""Where the places of an axis lie among the cells of masks, for kernels that upsample them."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from segvit_kernels.triton._launch import next_power_of_2


def footprint(tile: int, reach: float) -> int:
    """How many cells, as a power of two, ``tile`` pixels at ``reach`` cells a pixel can touch."""
    return next_power_of_2(math.floor((tile - 1) * reach) + 3)


def shares_in_float16(pixels: tuple[int, int], cells: tuple[int, int]) -> bool:
    """Whether float16 holds the shares of cells in pixels: odd multiples of 1/(2·16), and their products."""
    return all(out % n == 0 and out // n in (1, 2, 4, 8, 16) for out, n in zip(pixels, cells, strict=True))


@triton.jit
def place_of(i, step, cells):
    """The cell before place i, the one after it and its share, as ``F.interpolate`` finds them in float32."""
    place = (i.to(tl.float32) + 0.5) * step - 0.5
    place = tl.minimum(tl.maximum(place, 0.0), cells - 1.0)
    before = place.to(tl.int32)
    return before, tl.minimum(before + 1, cells - 1), place - before.to(tl.float32)


@triton.jit
def finite(x, LARGEST: tl.constexpr):
    """Weights of zero must stay zero beside an infinite logit. What is no number is no mask: the maximum of
    it and a number is the number."""
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def between(rows, x0, x1, share, stride, valid, LARGEST: tl.constexpr):
    """Values [masks, places] along one row of each mask; ``rows`` [masks, places] are its first cells."""
    left = finite(tl.load(rows + (x0 * stride)[None, :], mask=valid, other=0.0).to(tl.float32), LARGEST)
    right = finite(tl.load(rows + (x1 * stride)[None, :], mask=valid, other=0.0).to(tl.float32), LARGEST)
    return left + share[None, :] * (right - left)


@triton.jit
def hats(cell, position):
    """The share of each cell in each position of an axis; none further than a cell away."""
    return tl.maximum(0.0, 1.0 - tl.abs(position - cell.to(tl.float32)))
