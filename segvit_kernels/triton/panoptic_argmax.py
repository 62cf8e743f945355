r"""Panoptic argmax on a GPU: how :mod:`segvit_kernels.ops.panoptic_argmax` runs in Triton.

Two launches. The first prepares the cells that are interpolated to the output, as (cells, queries) padded to
whole blocks: the masks as they are, or interpolated a first time, with σ where it comes first. Once per cell,
in place of once per pixel.

The second has one program for a tile of output pixels. Per block of queries, [pixels, queries] in float32:

1. masks between the four rows of cells around a pixel, σ if it comes last, times the score;
2. the best product of every pixel so far and whose it is, for each column of the block apart, so that nothing
   passes between threads until the last block is done;
3. pixels above the threshold, summed over the tile and added to the areas.

A second loop over the blocks counts the pixels won. Areas are added to with atomics: whole numbers, whose sum
does not depend on the order. Bytes: cells are read from the caches once per tile, 3 bytes a pixel are
written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton._launch import Launch, addressable, cdiv, pinned, target
from segvit_kernels.triton._plan import planned
from segvit_kernels.triton._resize import between, finite, place_of, sigmoid

_LARGEST_SCORE = tl.constexpr(1e8)  # of which no product with a mask is infinite
_NOBODY = tl.constexpr(2**30)  # more than any code


def _config(arch: str) -> dict[str, Any]:
    """Launch parameters: ``tile_y``, ``tile_x``; ``block_q`` queries at a time; ``cells`` of a preparing
    program; ``num_warps``; ``num_stages``."""
    return dict(pinned(arch)["panoptic_argmax"])


@triton.jit
def _panoptic_argmax_prepare_kernel(
    masks_ptr, cells_ptr, stride_mb, stride_mq, stride_mh, stride_mw,
    Q, h, w, cells_h, cells_w, step_y, step_x,
    PADDED_Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_CELLS: tl.constexpr, RESIZE: tl.constexpr,
    FIRST: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Some cells of an image, (cells, queries)."""
    programs = tl.cdiv(cells_h * cells_w, BLOCK_CELLS)
    b = (tl.program_id(0) // programs).to(tl.int64)
    i = tl.program_id(0) % programs * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    y, x = tl.minimum(i // cells_w, cells_h - 1), i % cells_w
    masks_ptr += b * stride_mb
    cells_ptr += b * cells_h * cells_w * PADDED_Q
    for start in range(0, PADDED_Q, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        rows = masks_ptr + (q.to(tl.int64) * stride_mq)[:, None]
        valid = (q[:, None] < Q) & (i[None, :] < cells_h * cells_w)
        if RESIZE:
            y0, y1, wy = place_of(y, step_y, h)
            x0, x1, wx = place_of(x, step_x, w)
            above = between(rows + (y0 * stride_mh)[None, :], x0, x1, wx, stride_mw, valid, LARGEST)
            below = between(rows + (y1 * stride_mh)[None, :], x0, x1, wx, stride_mw, valid, LARGEST)
            value = above + wy[None, :] * (below - above)
        else:
            ptrs = rows + (y * stride_mh + x * stride_mw)[None, :]
            value = finite(tl.load(ptrs, mask=valid, other=0.0).to(tl.float32), LARGEST)
        if FIRST:
            value = sigmoid(value)
        out = cells_ptr + i.to(tl.int64)[:, None] * PADDED_Q + q[None, :]
        tl.store(out, tl.trans(value.to(cells_ptr.dtype.element_ty)), mask=i[:, None] < cells_h * cells_w)


@triton.jit
def _panoptic_argmax_kernel(
    cells_ptr, scores_ptr, queries_ptr, inside_ptr, areas_ptr, stride_sb, stride_sq,
    Q, H, W, cells_h, cells_w, step_y, step_x, threshold,
    PADDED_Q: tl.constexpr, BLOCK_Q: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    LAST: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One tile."""
    PIXELS: tl.constexpr = TILE_Y * TILE_X
    columns = tl.cdiv(W, TILE_X)
    tiles = tl.cdiv(H, TILE_Y) * columns
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    pixel, column = tl.arange(0, PIXELS), tl.arange(0, BLOCK_Q)
    y, x = tile // columns * TILE_Y + pixel // TILE_X, tile % columns * TILE_X + pixel % TILE_X
    valid = (y < H) & (x < W)
    cells_ptr += b * cells_h * cells_w * PADDED_Q
    scores_ptr += b * stride_sb
    areas_ptr += b * 3 * Q
    y0, y1, wy = place_of(tl.minimum(y, H - 1), step_y, cells_h)
    x0, x1, wx = place_of(tl.minimum(x, W - 1), step_x, cells_w)
    upper_left, upper_right = (y0 * cells_w + x0).to(tl.int64), (y0 * cells_w + x1).to(tl.int64)
    lower_left, lower_right = (y1 * cells_w + x0).to(tl.int64), (y1 * cells_w + x1).to(tl.int64)
    wy, wx = wy[:, None], wx[:, None]

    best = tl.full([PIXELS, BLOCK_Q], float("-inf"), tl.float32)
    code = tl.full([PIXELS, BLOCK_Q], _NOBODY, tl.int32)  # 2 · query + whether the pixel is in its mask
    for start in range(0, PADDED_Q, BLOCK_Q):
        q = start + column
        score = tl.load(scores_ptr + q * stride_sq, mask=q < Q, other=-1.0).to(tl.float32)
        parts = (score >= 0.0)[None, :]
        ptrs = cells_ptr + q[None, :]
        above = tl.load(ptrs + (upper_left * PADDED_Q)[:, None]).to(tl.float32)
        above += wx * (tl.load(ptrs + (upper_right * PADDED_Q)[:, None]).to(tl.float32) - above)
        below = tl.load(ptrs + (lower_left * PADDED_Q)[:, None]).to(tl.float32)
        below += wx * (tl.load(ptrs + (lower_right * PADDED_Q)[:, None]).to(tl.float32) - below)
        value = above + wy * (below - above)
        if LAST:
            value = sigmoid(value)
        product = value * tl.minimum(score, _LARGEST_SCORE)[None, :]
        if WEIGHTED:
            value = product
        inside = (value >= threshold) & parts
        many = tl.sum((inside & valid[:, None]).to(tl.int32), 0)
        tl.atomic_add(areas_ptr + Q + q, many, mask=(many > 0) & (q < Q), sem="relaxed")
        wins = (product > best) & parts
        best = tl.where(wins, product, best)
        code = tl.where(wins, 2 * q[None, :] + inside.to(tl.int32), code)
    # Of the columns the best, of equal ones the lowest query.
    code = tl.min(tl.where(best == tl.max(best, 1)[:, None], code, _NOBODY), 1)
    query, inside = code >> 1, code & 1
    somebody = code < _NOBODY
    offsets = b * H * W + y.to(tl.int64) * W + x
    tl.store(queries_ptr + offsets, tl.where(somebody, query, -1).to(tl.int16), mask=valid)
    tl.store(inside_ptr + offsets, tl.where(somebody, inside, 0).to(tl.int8), mask=valid)
    query = tl.where(valid, query, _NOBODY)
    for start in range(0, PADDED_Q, BLOCK_Q):
        q = start + column
        # Both counts in one word: a tile has less than 2¹⁶ pixels.
        many = tl.sum(tl.where(query[:, None] == q[None, :], 1 + inside[:, None] * 65536, 0), 0)
        some = (many > 0) & (q < Q)
        tl.atomic_add(areas_ptr + q, many & 65535, mask=some, sem="relaxed")
        tl.atomic_add(areas_ptr + 2 * Q + q, many >> 16, mask=some & (many >= 65536), sem="relaxed")


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
    block_q = config["block_q"]
    padded_q = cdiv(count, block_q) * block_q
    resize = (resized_height, resized_width) != (h, w)
    dtype = torch.float32 if first or resize else mask_logits.dtype
    cells = scores.new_empty(batch, crop_height * crop_width, padded_q, dtype=dtype)
    prepare = Launch(
        _panoptic_argmax_prepare_kernel,
        batch * cdiv(crop_height * crop_width, config["cells"]),
        {
            "masks_ptr": mask_logits,
            "cells_ptr": cells,
            **{f"stride_m{axis}": s for axis, s in zip("bqhw", mask_logits.stride(), strict=True)},
            "Q": count,
            "h": h,
            "w": w,
            "cells_h": crop_height,
            "cells_w": crop_width,
            "step_y": h / resized_height,
            "step_x": w / resized_width,
        },
        {
            "PADDED_Q": padded_q,
            "BLOCK_Q": block_q,
            "BLOCK_CELLS": config["cells"],
            "RESIZE": resize,
            "FIRST": first,
            "LARGEST": 65504.0 if mask_logits.dtype == torch.float16 else 1e30,
        },
        {"num_warps": config["num_warps"], "num_stages": 1},
    )
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
            "cells_w": crop_width,
            "step_y": crop_height / height,
            "step_x": crop_width / width,
            "threshold": threshold,
        },
        {
            "PADDED_Q": padded_q,
            "BLOCK_Q": block_q,
            "TILE_Y": config["tile_y"],
            "TILE_X": config["tile_x"],
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
