"""The sums that matching needs in Triton: every query with every target.

A program has a block of queries, a block of targets and a run of tiles of output pixels. Of a tile:

1. logits [queries, pixels] = maps [queries, cells] · W [cells, pixels], the bilinear interpolation as a
   product with the few cells under the tile, so that they are where the next products want them;
2. what a pixel adds to a pair, and to a query alone, in float32;
3. three products [queries, pixels] · [pixels, targets], factors from registers, sums in registers. Targets
   are read, or made from the labels, on the fly.

Factors of products are split in two float16 terms, which hold 22 bits of them. Runs of tiles are added in
fixed order by a second launch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton._launch import Launch, cdiv
from segvit_kernels.triton._mask_entries import _check_sizes, _options
from segvit_kernels.triton._mask_pixels import _high, _logistic_of_size, _power, _wide
from segvit_kernels.triton._mask_targets import _addressable, _sum_launch, _target_launches
from segvit_kernels.triton._resize import footprint, hats, place_of, shares_in_float16

_P_SCALE = tl.constexpr(32768.0)  # of σ in float16, whose small values would lose their digits


@triton.jit
def _halves(x):
    """Two float16 whose sum is x but for its last two bits, or 2⁻²⁵; not finite beyond ±65504."""
    high = _high(x)  # as many bits as float16 has
    return high.to(tl.float16), (x - high).to(tl.float16)


@triton.jit
def _product(f, t, t_low, acc):
    """acc + f t; ``t_low`` is ``None`` where float16 holds t."""
    high, low = _halves(f)
    acc = tl.dot(high, t, acc)
    acc = tl.dot(low, t, acc)
    if t_low is not None:
        acc = tl.dot(high, t_low, acc)
    return acc


@triton.jit
def _first_cell(pixel, step):
    """The cell before a pixel; -1 before the first."""
    return tl.floor((pixel + 0.5) * step - 0.5).to(tl.int32)


@triton.jit
def _shares(y0, x0, step_y, step_x, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
             CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr):  # fmt: skip
    """Shares [cells, pixels] of the cells under a tile; those outside stand for the nearest inside."""
    cell, pixel = tl.arange(0, CELLS_Y * CELLS_X)[:, None], tl.arange(0, TILE_Y * TILE_X)[None, :]
    sy = (y0 + pixel // TILE_X + 0.5) * step_y - 0.5 - _first_cell(y0, step_y)
    sx = (x0 + pixel % TILE_X + 0.5) * step_x - 0.5 - _first_cell(x0, step_x)
    return hats(cell // CELLS_X, sy) * hats(cell % CELLS_X, sx)


@triton.jit
def _interpolated(x_ptr, shares, y0, x0, h, w, step_y, step_x,
                  CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """Logits [queries, pixels]; ``x_ptr`` [queries, 1]. EXACT says that float16 holds the shares."""
    cell = tl.arange(0, CELLS_Y * CELLS_X)
    row = tl.minimum(tl.maximum(_first_cell(y0, step_y) + cell // CELLS_X, 0), h - 1)
    column = tl.minimum(tl.maximum(_first_cell(x0, step_x) + cell % CELLS_X, 0), w - 1)
    # The hint is for the layout: threads run along the cells of a query.
    cells = tl.load(tl.max_contiguous(x_ptr + (row * w + column)[None, :], [1, CELLS_X]))
    upper = shares.to(tl.float16)
    if cells.dtype == tl.float16:
        logits = tl.dot(cells, upper)
    else:
        cells, low = _halves(cells.to(tl.float32))
        logits = tl.dot(low, upper)
        logits = tl.dot(cells, upper, logits)
    if not EXACT:
        logits = tl.dot(cells, (shares - upper.to(tl.float32)).to(tl.float16), logits)
    return logits


@triton.jit
def _gathered(x_ptr, y, x, h, w, step_y, step_x):
    """Logits [queries, pixels] from four cells each; ``x_ptr`` [queries, 1]."""
    y0, y1, share_y = place_of(y, step_y, h)
    x0, x1, share_x = place_of(x, step_x, w)
    share_y, share_x = share_y[None, :], share_x[None, :]
    upper = tl.load(x_ptr + (y0 * w + x0)[None, :]).to(tl.float32) * (1.0 - share_x)
    upper += tl.load(x_ptr + (y0 * w + x1)[None, :]).to(tl.float32) * share_x
    lower = tl.load(x_ptr + (y1 * w + x0)[None, :]).to(tl.float32) * (1.0 - share_x)
    lower += tl.load(x_ptr + (y1 * w + x1)[None, :]).to(tl.float32) * share_x
    return upper * (1.0 - share_y) + lower * share_y


@triton.jit
def _mask_matching_kernel(
    x_ptr, targets_ptr, products_ptr, totals_ptr, B, Q, M, h, w, H, W, step_y, step_x, run,
    stride_tb, stride_tm, alpha, gamma,
    LABELS: tl.constexpr, HARD: tl.constexpr, SINGLE: tl.constexpr, GAMMA_TWO: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr, EXACT: tl.constexpr, EVEN: tl.constexpr,
    STEADY: tl.constexpr,
):  # fmt: skip
    """products (splits, 3, B, Q, M) and totals (splits, 3, B, Q): sums over a run of tiles.

    SINGLE says that float16 does not hold the targets, EVEN that no pixel of a tile is outside, STEADY that
    all of them lie alike among the cells.
    """
    q_blocks, m_blocks = tl.cdiv(Q, BLOCK_Q), tl.maximum(tl.cdiv(M, BLOCK_M), 1)
    m_first = tl.program_id(0) % m_blocks * BLOCK_M
    q_first = tl.program_id(0) // m_blocks % q_blocks * BLOCK_Q
    image = tl.program_id(0) // m_blocks // q_blocks % B
    split = tl.program_id(0) // m_blocks // q_blocks // B
    query, m = q_first + tl.arange(0, BLOCK_Q), (m_first + tl.arange(0, BLOCK_M))[None, :]
    x_ptr += image.to(tl.int64) * Q * h * w + tl.minimum(query, Q - 1)[:, None].to(tl.int64) * (h * w)
    targets_ptr += image.to(tl.int64) * stride_tb
    if not LABELS:
        targets_ptr += tl.minimum(m, M - 1).to(tl.int64) * stride_tm  # [1, BLOCK_M]
    focal = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
    bce, overlap = focal, focal
    focal_total = tl.zeros([BLOCK_Q], tl.float32)
    bce_total, total = focal_total, focal_total
    if STEADY:
        steady = _shares(0, 0, step_y, step_x, TILE_Y, TILE_X, CELLS_Y, CELLS_X)
    columns = tl.cdiv(W, TILE_X)
    pixel = tl.arange(0, TILE_Y * TILE_X)
    for tile in range(split * run, tl.minimum(split * run + run, tl.cdiv(H, TILE_Y) * columns)):
        y0, x0 = tile // columns * TILE_Y, tile % columns * TILE_X
        y, x = y0 + pixel // TILE_X, x0 + pixel % TILE_X
        if CELLS_Y > 0:
            shares = steady if STEADY else _shares(y0, x0, step_y, step_x, TILE_Y, TILE_X, CELLS_Y, CELLS_X)
            logits = _interpolated(x_ptr, shares, y0, x0, h, w, step_y, step_x, CELLS_Y, CELLS_X, EXACT)
        else:
            logits = _gathered(x_ptr, y, x, h, w, step_y, step_x)
        ptrs = targets_ptr + (y * W + x)[:, None]  # [pixels, 1 or targets]
        if EVEN:
            t = tl.load(ptrs)
        else:
            inside = (y < H) & (x < W)
            logits = tl.where(inside[None, :], logits, -1e4)  # adds nothing to the totals
            there = inside[:, None] if LABELS else inside[:, None] & (m < M)
            t = tl.load(ptrs, mask=there, other=0)
        if LABELS:
            t = _wide(t) == m
            if not EVEN:
                t = t & inside[:, None]
        t_low = None
        if HARD:
            t = (t != 0).to(tl.float16)
        elif SINGLE:
            t, t_low = _halves(t.to(tl.float32))
        larger, smaller, log = _logistic_of_size(logits)
        # Softplus of ±x are these two, and so are the focal losses; which is which is the sign of x.
        more = tl.abs(logits) + log
        hard = _power(larger, gamma, GAMMA_TWO) * more
        easy = _power(smaller, gamma, GAMMA_TWO) * log
        above = logits > 0
        negative = tl.where(above, hard, easy)
        p = tl.where(above, larger, smaller)
        focal = _product(alpha * (hard + easy) - negative, t, t_low, focal)
        bce = _product(logits, t, t_low, bce)
        overlap = _product(p * _P_SCALE, t, t_low, overlap)
        focal_total += tl.sum(negative, 1)
        bce_total += tl.sum(tl.where(above, more, log), 1)
        total += tl.sum(p, 1)
    out = (split * 3 * B + image).to(tl.int64) * Q + query
    size = tl.cast(B, tl.int64) * Q
    if m_first == 0:
        tl.store(totals_ptr + out, (1.0 - alpha) * focal_total, mask=query < Q)
        tl.store(totals_ptr + out + size, bce_total, mask=query < Q)
        tl.store(totals_ptr + out + 2 * size, total, mask=query < Q)
    out = out[:, None] * M + m
    size *= M
    inside = (query[:, None] < Q) & (m < M)
    tl.store(products_ptr + out, focal, mask=inside)
    tl.store(products_ptr + out + size, -bce, mask=inside)
    tl.store(products_ptr + out + 2 * size, overlap / _P_SCALE, mask=inside)


def _matching_launches(
    mask_logits: Tensor,
    targets: Tensor,
    num_classes: int,
    focal_alpha: float,
    focal_gamma: float,
    config: dict[str, Any],
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Products, totals and areas, still empty, and the launches that fill them."""
    _check_sizes([mask_logits], targets)
    targets, labels = _addressable(targets), targets.ndim == 3
    mask_logits = mask_logits.contiguous()
    (batch, queries, h, w), (height, width) = mask_logits.shape, targets.shape[-2:]
    areas, targets, _, _, launches = _target_launches(targets, None, num_classes, None, True)
    products = areas.new_empty(3, batch, queries, num_classes)
    totals = areas.new_empty(3, batch, queries)
    if totals.numel() == 0:
        return (products, totals, areas), launches
    block_q, block_m = config["block_q"], config["block_m"]
    tile_y, tile_x = config["tile_y"], config["tile_x"]
    tiles = cdiv(height, tile_y) * cdiv(width, tile_x)
    # Without a target there are still totals.
    blocks = batch * cdiv(queries, block_q) * max(1, cdiv(num_classes, block_m))
    # All at once: a second round for a few programs would take as long as the first.
    splits = min(tiles, max(1, config["multiprocessors"] * config["programs"] // blocks))
    run = cdiv(tiles, splits)
    splits = cdiv(tiles, run)
    steps = h / height, w / width
    cells = [footprint(tile, step) for tile, step in zip((tile_y, tile_x), steps, strict=True)]
    if math.prod(cells) > config["cells"]:
        cells = [0, 0]
    elif math.prod(cells) < 16:  # the least inner length of a product
        cells[1] = 16 // cells[0]
    partial = products if splits == 1 else products.new_empty(splits, *products.shape)
    partial_totals = totals if splits == 1 else totals.new_empty(splits, *totals.shape)
    arguments = {
        "x_ptr": mask_logits,
        "targets_ptr": targets,
        "products_ptr": partial,
        "totals_ptr": partial_totals,
        "B": batch,
        "Q": queries,
        "M": num_classes,
        "h": h,
        "w": w,
        "H": height,
        "W": width,
        "step_y": steps[0],
        "step_x": steps[1],
        "run": run,
        "stride_tb": targets.stride(0),
        "stride_tm": 0 if labels else targets.stride(1),
        "alpha": focal_alpha,
        "gamma": focal_gamma,
    }
    constants = {
        "LABELS": labels,
        "HARD": not targets.is_floating_point(),
        "SINGLE": targets.dtype in (torch.float32, torch.float64, torch.bfloat16),
        "GAMMA_TWO": focal_gamma == 2,
        "BLOCK_Q": block_q,
        "BLOCK_M": block_m,
        "TILE_Y": tile_y,
        "TILE_X": tile_x,
        "CELLS_Y": cells[0],
        "CELLS_X": cells[1],
        "EXACT": shares_in_float16((height, width), (h, w)),
        # Where there is no target there is nothing to read either.
        "EVEN": height % tile_y == 0 and width % tile_x == 0 and num_classes > 0,
        "STEADY": cells[0] > 0 and tile_y * h % height == 0 and tile_x * w % width == 0,
    }
    launches.append(Launch(_mask_matching_kernel, blocks * splits, arguments, constants, _options(config)))
    if splits > 1:
        launches += [
            _sum_launch(part, out, splits, out.numel())
            for part, out in ((partial, products), (partial_totals, totals))
            if out.numel()
        ]
    return (products, totals, areas), launches
