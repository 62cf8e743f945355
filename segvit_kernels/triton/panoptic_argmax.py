r"""Panoptic argmax on a GPU: how :mod:`segvit_kernels.ops.panoptic_argmax` runs in Triton.

Two launches. The first prepares the cells that are interpolated to the output, as (queries, rows, columns):
the masks as they are, or interpolated a first time, with σ where it comes first. Once per cell, in place of
once per pixel.

The second has one program for a tile of output pixels, a warp that keeps the best product of every pixel and
whose it is in registers. It goes through the queries that take part; of each

1. the few rows of cells under the tile, on their way since the query before, are interpolated along x, times
   the score where products are compared with the threshold;
2. every pixel row lies between three of them at most: which, the ratio of the sizes alone says. σ if it comes
   last;
3. pixels above the threshold are counted by the sign bit of the difference, and added to the areas.

In the end a histogram counts the pixels won and kept. Both launches interpolate in the same way. Areas are
added to with atomics: whole numbers, whose sum does not depend on the order. Bytes: cells are read from the
caches once per tile, 3 bytes a pixel are written.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton._launch import Launch, addressable, cdiv, next_power_of_2, pinned, target
from segvit_kernels.triton._plan import planned
from segvit_kernels.triton._resize import finite, sigmoid

_LARGEST_SCORE = tl.constexpr(1e8)  # of which no product with a mask is infinite
_MOST_BINS = 256  # of one histogram


def _config(arch: str) -> dict[str, Any]:
    """Launch parameters: ``tile_y``, ``tile_x``; ``block_q`` queries of a preparing program; ``num_warps``;
    ``num_stages``."""
    return dict(pinned(arch)["panoptic_argmax"])


@triton.jit
def _place(i, step):
    """Where an element lies among the cells, from half a cell before the first on."""
    return (tl.cast(i, tl.float32) + 0.5) * step - 0.5


@triton.jit
def _before(place):
    """The cell before a place, −1 before the first."""
    return (place + 1.0).to(tl.int32) - 1


@triton.jit
def _columns(x, step, width):
    """Of columns the cell of two neighbours before each, and the shares of both."""
    place = _place(x, step)
    column = tl.maximum(tl.minimum(place.to(tl.int32), width - 2), 0)
    far = tl.minimum(tl.maximum(place - column.to(tl.float32), 0.0), 1.0)
    return column, 1.0 - far, far


@triton.jit
def _rows(top, step, height, stride, FIRST_ROWS: tl.constexpr, WALK: tl.constexpr):
    """Offsets of the rows of cells that a tile needs, and of each of its own rows the shares of three of
    them, two of its own unless WALK."""
    rows, shares = (), ()
    start = _before(_place(top, step))
    if WALK:
        for j in tl.static_range(FIRST_ROWS[len(FIRST_ROWS) - 1] + 3):
            rows += (tl.minimum(tl.maximum(start + j, 0), height - 1) * stride,)
    for r in tl.static_range(len(FIRST_ROWS)):
        place = _place(top + r, step)
        if WALK:
            past = place - tl.cast(start + FIRST_ROWS[r], tl.float32)
            first = tl.minimum(tl.maximum(1.0 - past, 0.0), 1.0)
            third = tl.minimum(tl.maximum(past - 1.0, 0.0), 1.0)
        else:
            row = tl.minimum(_before(place), height - 1)
            rows += (tl.maximum(row, 0) * stride, tl.minimum(row + 1, height - 1) * stride)
            first, third = 1.0 - (place - tl.cast(row, tl.float32)), 0.0
        shares += ((first, 1.0 - first - third, third),)
    return rows, shares


@triton.jit
def _pairs(ptr, column, beside, rows):
    """Of rows of cells the two at each column."""
    found = ()
    for j in tl.static_range(len(rows)):
        ptrs = ptr + (column + rows[j])  # offsets stay from query to query
        found += (tl.load(ptrs), tl.load(ptrs + beside))
    return found


@triton.jit
def _along(pairs, near, far, LARGEST: tl.constexpr):
    """Rows of cells between their two columns; ``LARGEST`` None: they are finite."""
    found = ()
    for j in tl.static_range(len(pairs) // 2):
        left, right = pairs[2 * j].to(tl.float32), pairs[2 * j + 1].to(tl.float32)
        if LARGEST is not None:
            left, right = finite(left, LARGEST), finite(right, LARGEST)
        found += (left * near + right * far,)
    return found


@triton.jit
def _across(cells, shares, FIRST: tl.constexpr, WALK: tl.constexpr):
    # Adding zero makes one of a negative zero, of which the sign bit must not be set.
    value = cells[FIRST + 1] * shares[1] + 0.0
    if WALK:
        value = cells[FIRST + 2] * shares[2] + value
    return cells[FIRST] * shares[0] + value


@triton.jit
def _panoptic_argmax_prepare_kernel(
    masks_ptr, cells_ptr, stride_mb, stride_mq, stride_mh, stride_mw,
    Q, h, w, cells_h, cells_w, pitch, step_y, step_x,
    BLOCK_Q: tl.constexpr, FIRST_ROWS: tl.constexpr, WALK: tl.constexpr, TILE_X: tl.constexpr,
    FIRST: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One tile of the cells of some queries."""
    TILE_Y: tl.constexpr = len(FIRST_ROWS)
    columns, blocks = tl.cdiv(pitch, TILE_X), tl.cdiv(Q, BLOCK_Q)
    tiles = tl.cdiv(cells_h, TILE_Y) * columns
    b = (tl.program_id(0) // (tiles * blocks)).to(tl.int64)
    tile, block = tl.program_id(0) % tiles, tl.program_id(0) // tiles % blocks
    top = tile // columns * TILE_Y
    x = tile % columns * TILE_X + tl.arange(0, TILE_X)
    column, near, far = _columns(tl.minimum(x, cells_w - 1), step_x, w)
    rows, shares = _rows(top, step_y, h, stride_mh, FIRST_ROWS, WALK)
    for q in range(block * BLOCK_Q, tl.minimum(block * BLOCK_Q + BLOCK_Q, Q)):
        ptr = masks_ptr + b * stride_mb + tl.cast(q, tl.int64) * stride_mq
        pairs = _pairs(ptr, column * stride_mw, stride_mw * tl.minimum(w - 1, 1), rows)
        values = _along(pairs, near, far, LARGEST)
        plane = cells_ptr + (b * Q + q) * cells_h * pitch
        for r in tl.static_range(TILE_Y):
            value = _across(values, shares[r], FIRST_ROWS[r], WALK)
            if FIRST:
                value = sigmoid(value)
            out = plane + (top + r) * pitch + x
            exists = x < tl.where(top + r < cells_h, pitch, 0)
            tl.store(out, value.to(cells_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _panoptic_argmax_kernel(
    cells_ptr, scores_ptr, queries_ptr, inside_ptr, areas_ptr, stride_sb, stride_sq,
    Q, H, W, cells_h, pitch, step_y, step_x, threshold,
    FIRST_ROWS: tl.constexpr, WALK: tl.constexpr, TILE_X: tl.constexpr, BINS: tl.constexpr,
    LAST: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One tile of the output."""
    TILE_Y: tl.constexpr = len(FIRST_ROWS)
    SCALED: tl.constexpr = WEIGHTED and not LAST  # cells times scores are interpolated
    columns = tl.cdiv(W, TILE_X)
    tiles = tl.cdiv(H, TILE_Y) * columns
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    top = tile // columns * TILE_Y
    x = tile % columns * TILE_X + tl.arange(0, TILE_X)
    cells_ptr += b * Q * cells_h * pitch
    scores_ptr += b * stride_sb
    areas_ptr += b * 3 * Q
    column, near, far = _columns(x, step_x, pitch)
    rows, shares = _rows(top, step_y, cells_h, pitch, FIRST_ROWS, WALK)
    limits = ()
    for r in tl.static_range(TILE_Y):
        limits += (tl.where(top + r < H, threshold, float("inf")),)

    best, code, held = (), (), ()
    for _ in tl.static_range(TILE_Y):
        best += (tl.full([TILE_X], float("-inf"), tl.float32),)
        code += (tl.full([TILE_X], -1, tl.int32),)
    held = best  # what is compared with the threshold
    pairs, score = _pairs(cells_ptr, column, 1, rows), tl.load(scores_ptr).to(tl.float32)
    for q in range(Q):
        # The next query's, on their way while this one is computed.
        following = tl.minimum(q + 1, Q - 1)
        ahead = _pairs(cells_ptr + tl.cast(following, tl.int64) * cells_h * pitch, column, 1, rows)
        score_ahead = tl.load(scores_ptr + following * stride_sq).to(tl.float32)
        if score >= 0.0:
            score = tl.minimum(score, _LARGEST_SCORE)
            left, right = near, far
            if SCALED:
                left, right = near * score, far * score
            cells = _along(pairs, left, right, None)
            outside = tl.zeros([TILE_X], tl.uint32)
            new_best, new_code, new_held = (), (), ()
            for r in tl.static_range(TILE_Y):
                value = _across(cells, shares[r], FIRST_ROWS[r], WALK)
                if LAST:
                    value = sigmoid(value)
                product = value
                if not SCALED:
                    product = value * score + 0.0
                if WEIGHTED:
                    value = product
                outside += (value - limits[r]).to(tl.uint32, bitcast=True) >> 31
                wins = product > best[r]
                new_best += (tl.where(wins, product, best[r]),)
                new_code += (tl.where(wins, q, code[r]),)
                if not WEIGHTED:
                    new_held += (tl.where(wins, value, held[r]),)
            best, code = new_best, new_code
            held = new_best if WEIGHTED else new_held
            many = tl.sum(tl.where(x < W, TILE_Y - outside.to(tl.int32), 0), 0)
            tl.atomic_add(areas_ptr + Q + q, many, mask=many > 0, sem="relaxed")
        pairs, score = ahead, score_ahead

    # Two bins a query: pixels won outside of its mask, and inside.
    bins = ()
    for r in tl.static_range(TILE_Y):
        y = top + r
        valid = x < tl.where(y < H, W, 0)
        inside = (held[r] >= threshold) & (code[r] >= 0)
        offsets = (b * H + y) * W + x
        tl.store(queries_ptr + offsets, code[r].to(tl.int16), mask=valid)
        tl.store(inside_ptr + offsets, inside.to(tl.int8), mask=valid)
        bins += (tl.where(valid, 2 * code[r] + inside.to(tl.int32), -1),)
    for begin in range(0, 2 * Q, BINS):
        many = tl.zeros([BINS], tl.int32)
        for r in tl.static_range(TILE_Y):
            many += tl.histogram(bins[r] - begin, BINS, (bins[r] >= begin) & (bins[r] < begin + BINS))
        i = begin + tl.arange(0, BINS)
        tl.atomic_add(areas_ptr + i // 2, many, mask=many > 0, sem="relaxed")
        tl.atomic_add(areas_ptr + 2 * Q + i // 2, many, mask=(many > 0) & (i % 2 == 1), sem="relaxed")


def _first_rows(tile_y: int, step: float) -> tuple[tuple[int, ...], bool]:
    """Of every pixel row of a tile the first of the rows loaded that it may lie between, and whether these
    follow each other: then it is one of two, by where the tile begins."""
    if step <= 1:
        return tuple(math.floor(r * step) for r in range(tile_y)), True
    return tuple(2 * r for r in range(tile_y)), False


def _launches(
    mask_logits: Tensor,
    scores: Tensor,
    height: int,
    width: int,
    resized_height: int,
    resized_width: int,
    crop_height: int,
    crop_width: int,
    first: bool,
    last: bool,
    threshold: float,
    weighted: bool,
    config: dict[str, Any],
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Results, still empty, and the launches that fill them."""
    (batch, count), (h, w) = scores.shape, mask_logits.shape[2:]
    queries = scores.new_empty(batch, height, width, dtype=torch.int16)
    inside = scores.new_empty(batch, height, width, dtype=torch.bool)
    areas = scores.new_zeros(batch, 3, count, dtype=torch.int32)
    if batch == 0:
        return (queries, inside, areas), []

    mask_logits = addressable(mask_logits, 2)
    resize = (resized_height, resized_width) != (h, w)
    dtype = torch.float32 if first or resize else mask_logits.dtype
    pitch = max(2, crop_width)  # of rows of cells: every cell has one beside it
    cells = scores.new_empty(batch, count, crop_height * pitch, dtype=dtype)
    first_rows, walk = _first_rows(config["tile_y"], h / resized_height)
    tiles = cdiv(crop_height, config["tile_y"]) * cdiv(pitch, config["tile_x"])
    prepare = Launch(
        _panoptic_argmax_prepare_kernel,
        batch * tiles * cdiv(count, config["block_q"]),
        {
            "masks_ptr": mask_logits,
            "cells_ptr": cells,
            **{f"stride_m{axis}": s for axis, s in zip("bqhw", mask_logits.stride(), strict=True)},
            "Q": count,
            "h": h,
            "w": w,
            "cells_h": crop_height,
            "cells_w": crop_width,
            "pitch": pitch,
            "step_y": h / resized_height,
            "step_x": w / resized_width,
        },
        {
            "BLOCK_Q": config["block_q"],
            "FIRST_ROWS": first_rows,
            "WALK": walk,
            "TILE_X": config["tile_x"],
            "FIRST": first,
            "LARGEST": 65504.0 if mask_logits.dtype == torch.float16 else 1e30,
        },
        {name: config[name] for name in ("num_warps", "num_stages")},
    )
    first_rows, walk = _first_rows(config["tile_y"], crop_height / height)
    tiles = cdiv(height, config["tile_y"]) * cdiv(width, config["tile_x"])
    main = Launch(
        _panoptic_argmax_kernel,
        batch * tiles,
        {
            "cells_ptr": cells,
            "scores_ptr": scores,
            "queries_ptr": queries,
            "inside_ptr": inside,
            "areas_ptr": areas,
            "stride_sb": scores.stride(0),
            "stride_sq": scores.stride(1),
            "Q": count,
            "H": height,
            "W": width,
            "cells_h": crop_height,
            "pitch": pitch,
            "step_y": crop_height / height,
            "step_x": crop_width / width,
            "threshold": threshold,
        },
        {
            "FIRST_ROWS": first_rows,
            "WALK": walk,
            "TILE_X": config["tile_x"],
            "BINS": min(_MOST_BINS, next_power_of_2(2 * count)),
            "LAST": last,
            "WEIGHTED": weighted,
        },
        {name: config[name] for name in ("num_warps", "num_stages")},
    )
    return (queries, inside, areas), [prepare, main]


@planned
def panoptic_argmax(
    mask_logits: Tensor,
    scores: Tensor,
    height: int,
    width: int,
    resized_height: int,
    resized_width: int,
    crop_height: int,
    crop_width: int,
    first: bool,
    last: bool,
    threshold: float,
    weighted: bool,
    *,
    config: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Launcher of ``segvit::panoptic_argmax``; ``config`` replaces entries of :func:`_config`."""
    found = {**_config(target(mask_logits.device)), **(config or {})}
    sizes = (height, width, resized_height, resized_width, crop_height, crop_width)
    return _launches(mask_logits, scores, *sizes, first, last, threshold, weighted, found)
