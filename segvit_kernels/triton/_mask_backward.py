"""The backward of the mask loss in Triton: a gather.

A program owns a block of cells and walks the output columns in their support. The sums over rows go
through two small products: with the weights along x, and with the matrix that says which cell a sum of a
group belongs to; with ``split`` the former run on tensor cores. Where the centres of cells lie at multiples
of 8 columns, as with patches of 16 pixels, the logits along a run of 8 are a straight line and sums over runs
are enough: a quarter of the registers, one product in four. Both neighbours compute borders of blocks. No
atomics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton._launch import Launch, cdiv, next_power_of_2
from segvit_kernels.triton._mask_entries import (
    _ENTRIES,
    _GROUPS,
    _begins,
    _common,
    _entries,
    _entry,
    _options,
    _plane,
)
from segvit_kernels.triton._mask_pixels import (
    _between,
    _columns,
    _map_row,
    _product,
    _read,
    _rows,
    _slopes,
    _source,
)
from segvit_kernels.triton._mask_targets import _TILE, _addressable, _met, _repeated_launch

_RUN = 8  # columns of a run in the backward: one vector of labels


@triton.jit
def _support(first, owned, cells, size):
    """Output elements between cell ``first`` − 1 and cell ``first + owned``, both left out."""
    begin = ((2 * first - 1) * size + cells) // (2 * cells)
    end = tl.cdiv((2 * (first + owned) + 1) * size - cells, 2 * cells)
    return tl.where(first == 0, 0, begin), tl.where(first + owned >= cells, size, end)


@triton.jit
def _slope_sums(
    v0, v1, v2, targets_ptr, target, y, x, past, step, rows, H, W, M, g0, g1, g2, g3, alpha, gamma,
    LABELS: tl.constexpr, HARD: tl.constexpr, MASK_IGNORED: tl.constexpr, GAMMA_TWO: tl.constexpr,
    ABSENT: tl.constexpr,
):  # fmt: skip
    """What the rows of every group add to three rows of the map; ABSENT says that no target is there."""
    a0 = tl.zeros_like(v0)
    a1, a2 = a0, a0
    for i in range(rows):
        f = past + i * step
        c1, c2 = _between(f), _between(f - 1.0)
        logits = v0 + c1 * (v1 - v0) + c2 * (v2 - v1)
        if ABSENT:
            g = _slopes(logits, None, g0, g1, g2, g3, alpha, gamma, GAMMA_TWO, HARD)
        else:
            logits, t = _read(
                targets_ptr, y + i, x, target, H, W, M, logits, LABELS, HARD, MASK_IGNORED, False, False
            )
            g = _slopes(logits, t, g0, g1, g2, g3, alpha, gamma, GAMMA_TWO, HARD)
        inside = y + i < H
        a0 += tl.where(inside, 1.0 - c1, 0.0) * g
        a1 += tl.where(inside, c1 - c2, 0.0) * g
        a2 += tl.where(inside, c2, 0.0) * g
    return a0, a1, a2


@triton.jit
def _side_by_side(left, right):
    """[groups, 2 runs]: left and right of every run in turn."""
    return tl.reshape(tl.join(left, right), (left.shape[0], 2 * left.shape[1]))


@triton.jit
def _run_slopes(
    x_ptr, targets_ptr, target, y, first, row, past, step, rows, h, w, H, W, M,
    g0, g1, g2, g3, alpha, gamma,
    LABELS: tl.constexpr, HARD: tl.constexpr, MASK_IGNORED: tl.constexpr, GAMMA_TWO: tl.constexpr,
    RUN: tl.constexpr, ABSENT: tl.constexpr,
):  # fmt: skip
    """:func:`_slope_sums` where no RUN of columns reaches across the centre of a cell.

    Along a run the logits are a straight line, so that a thread holds two numbers for each row of the map and
    two sums: of the slopes, and of the slopes times their place in the run.

    Args:
        first: first column of every run, [1, runs].

    Returns:
        What belongs to the cell left and right of each run, for three rows of the map, [groups, runs] each.
    """
    column, way = _source(first, w, W)
    inner = (way >= 0) & (column < w - 1)
    way = tl.where(inner, way, 0.0)
    by = tl.where(inner, tl.cast(w, tl.float32) / tl.cast(W, tl.float32), 0.0)  # to the next column
    right = tl.minimum(column + 1, w - 1)
    v, d = (), ()  # of three rows: at the first column, and to the next
    for k in tl.static_range(3):
        ptrs = x_ptr + tl.minimum(row + k, h - 1) * w
        left_value = tl.load(ptrs + column).to(tl.float32)
        difference = tl.load(ptrs + right).to(tl.float32) - left_value
        v += (left_value + way * difference,)
        d += (by * difference,)
    place = tl.arange(0, RUN)[None, None, :]
    x, far = first[:, :, None] + place, place.to(tl.float32)
    s0 = tl.zeros_like(v[0])
    s1, s2, m0, m1, m2 = s0, s0, s0, s0, s0
    for i in range(rows):
        f = past + i * step
        c1, c2 = _between(f), _between(f - 1.0)
        value = v[0] + c1 * (v[1] - v[0]) + c2 * (v[2] - v[1])
        slope = d[0] + c1 * (d[1] - d[0]) + c2 * (d[2] - d[1])
        if ABSENT:
            # One column after the other: nothing read tells the compiler to give a thread whole runs.
            s = _slopes(value, None, g0, g1, g2, g3, alpha, gamma, GAMMA_TWO, HARD)
            m = tl.zeros_like(s)
            for k in tl.static_range(1, RUN):
                g = _slopes(value + k * slope, None, g0, g1, g2, g3, alpha, gamma, GAMMA_TWO, HARD)
                s += g
                m += k * g
        else:
            logits = value[:, :, None] + far * slope[:, :, None]
            logits, t = _read(
                targets_ptr, (y + i)[:, :, None], x, target, H, W, M, logits,
                LABELS, HARD, MASK_IGNORED, False, False,
            )  # fmt: skip
            g = _slopes(logits, t, g0, g1, g2, g3, alpha, gamma, GAMMA_TWO, HARD)
            s, m = tl.sum(g, 2), tl.sum(far * g, 2)
        inside = (y + i < H) & (first < W)
        s, m = tl.where(inside, s, 0.0), tl.where(inside, m, 0.0)
        s0 += (1.0 - c1) * s
        s1 += (c1 - c2) * s
        s2 += c2 * s
        m0 += (1.0 - c1) * m
        m1 += (c1 - c2) * m
        m2 += c2 * m
    r0, r1, r2 = way * s0 + by * m0, way * s1 + by * m1, way * s2 + by * m2
    return s0 - r0, s1 - r1, s2 - r2, r0, r1, r2


@triton.jit
def _mask_loss_bwd_kernel(
    grad_ptr, x0_ptr, x1_ptr, x2_ptr, x3_ptr, targets_ptr, tiles_ptr, matches_ptr, pairs_ptr,
    dx0_ptr, dx1_ptr, dx2_ptr, dx3_ptr, h0, h1, h2, h3, w0, w1, w2, w3, begin1, begin2, begin3, tiles,
    total, H, W, Q, M, down, across, stride_tb, stride_tm, alpha, gamma,
    ENTRIES: tl.constexpr, LABELS: tl.constexpr, HARD: tl.constexpr, MASK_IGNORED: tl.constexpr,
    GAMMA_TWO: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, CELLS: tl.constexpr,
    ALIGN: tl.constexpr, RUN: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of blocks of cells, GROUPS by CELLS or one less, of active pairs."""
    items = tl.load(pairs_ptr) * tiles
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        pair, tile = tl.load(pairs_ptr + 1 + item // tiles), item % tiles
        entry, x_ptr, h, w, local = _entry(
            tile,
            x0_ptr,
            x1_ptr,
            x2_ptr,
            x3_ptr,
            h0,
            h1,
            h2,
            h3,
            w0,
            w1,
            w2,
            w3,
            begin1,
            begin2,
            begin3,
            ENTRIES,
        )
        _, dx_ptr, _, _, _ = _entry(
            tile, dx0_ptr, dx1_ptr, dx2_ptr, dx3_ptr, h0, h1, h2, h3, w0, w1, w2, w3, begin1, begin2, begin3,
            ENTRIES,
        )  # fmt: skip
        # Without a neighbour there is no border to share; otherwise the support is a whole number of tiles.
        own_rows = tl.where(h > GROUPS, GROUPS - 1, GROUPS)
        own_columns = tl.where(w > CELLS, CELLS - 1, CELLS)
        blocks = tl.cdiv(w, own_columns)
        first_row, first_column = local // blocks * own_rows, local % blocks * own_columns
        y_begin, y_end = _support(first_row, own_rows, h, H)
        x_begin, x_end = _support(first_column, own_columns, w, W)

        plane_ptr, target = _plane(targets_ptr, matches_ptr, pair, Q, stride_tb, stride_tm, LABELS)
        offset = pair.to(tl.int64) * h * w
        x_ptr += offset
        grad = grad_ptr + (entry.to(tl.int64) * total + pair) * 4
        g0, g1, g2, g3 = tl.load(grad), tl.load(grad + 1), tl.load(grad + 2), tl.load(grad + 3)

        rows = tl.cdiv(y_end - y_begin, GROUPS)
        y = y_begin + tl.arange(0, GROUPS)[:, None] * rows
        row, past, step = _rows(y, h, H)
        cell = (first_column + tl.arange(0, CELLS))[None, :]
        if SPLIT:
            p = tl.zeros([4 * GROUPS, CELLS], tl.float32)
        else:
            p0 = tl.zeros([GROUPS, CELLS], tl.float32)
            p1, p2 = p0, p0
        for start in range(x_begin // ALIGN * ALIGN, x_end, BLOCK):
            met = True
            if tiles_ptr is not None:
                met = _met(
                    tiles_ptr, pair, Q, target, y_begin, y_end, start, tl.minimum(start + BLOCK, W),
                    down, across, TILE, COLUMNS,
                )  # fmt: skip
            if ALIGN == RUN:
                first = (start + tl.arange(0, BLOCK // RUN) * RUN)[None, :]
                if met:
                    a0, a1, a2, b0, b1, b2 = _run_slopes(
                        x_ptr, plane_ptr, target, y, first, row, past, step, rows, h, w, H, W, M,
                        g0, g1, g2, g3, alpha, gamma,
                        LABELS, HARD, MASK_IGNORED, GAMMA_TWO, RUN, False,
                    )  # fmt: skip
                else:
                    a0, a1, a2, b0, b1, b2 = _run_slopes(
                        x_ptr, plane_ptr, target, y, first, row, past, step, rows, h, w, H, W, M,
                        g0, g1, g2, g3, alpha, gamma,
                        LABELS, HARD, MASK_IGNORED, GAMMA_TWO, RUN, True,
                    )  # fmt: skip
                a0, a1, a2 = _side_by_side(a0, b0), _side_by_side(a1, b1), _side_by_side(a2, b2)
                k = tl.arange(0, 2 * BLOCK // RUN)[:, None]
                column, aside = _source(start + k // 2 * RUN, w, W)
                weight = (tl.minimum(column + k % 2, w - 1) == cell).to(tl.float32)
            else:
                x = (start + tl.arange(0, BLOCK))[None, :]
                column, aside = _columns(x, w, W)
                v0 = _map_row(x_ptr, row, h, w, column, aside)  # [GROUPS, BLOCK]
                v1 = _map_row(x_ptr, row + 1, h, w, column, aside)
                v2 = _map_row(x_ptr, row + 2, h, w, column, aside)
                if met:
                    a0, a1, a2 = _slope_sums(
                        v0, v1, v2, plane_ptr, target, y, x, past, step, rows, H, W, M,
                        g0, g1, g2, g3, alpha, gamma,
                        LABELS, HARD, MASK_IGNORED, GAMMA_TWO, False,
                    )  # fmt: skip
                else:
                    a0, a1, a2 = _slope_sums(
                        v0, v1, v2, plane_ptr, target, y, x, past, step, rows, H, W, M,
                        g0, g1, g2, g3, alpha, gamma,
                        LABELS, HARD, MASK_IGNORED, GAMMA_TWO, True,
                    )  # fmt: skip
                x = (start + tl.arange(0, BLOCK))[:, None]
                column, aside = _columns(x, w, W)
                weight = tl.maximum(1.0 - tl.abs((column - cell).to(tl.float32) + aside), 0.0)
                weight = tl.where(x < W, weight, 0.0)
            # a0, a1, a2: [GROUPS, K]; weight: [K, CELLS]
            if SPLIT:
                # 48 rows and 16 of padding: as many as wgmma takes.
                a = tl.join(tl.join(a0, a1), tl.join(a2, tl.zeros_like(a2)))
                a = tl.reshape(tl.permute(a, (3, 2, 0, 1)), (4 * GROUPS, a0.shape[1]))
                p = _product(a, weight, p, True, ALIGN == RUN)
            else:
                p0 = tl.dot(a0, weight, p0, input_precision="ieee")
                p1 = tl.dot(a1, weight, p1, input_precision="ieee")
                p2 = tl.dot(a2, weight, p2, input_precision="ieee")
        # Which cell (rows) each group's (columns) sums belong to.
        own = (first_row + tl.arange(0, GROUPS))[:, None]
        if SPLIT:
            k = tl.arange(0, 4 * GROUPS)[None, :]
            above, _, _ = _rows(y_begin + k % GROUPS * rows, h, H)
            below = tl.minimum(above + k // GROUPS, h - 1) == own
            acc = tl.dot(below.to(tl.float32), p, input_precision="ieee")  # [GROUPS, CELLS]
        else:
            above, _, _ = _rows(y_begin + tl.arange(0, GROUPS)[None, :] * rows, h, H)
            acc = tl.dot((above == own).to(tl.float32), p0, input_precision="ieee")
            below = tl.minimum(above + 1, h - 1) == own
            acc = tl.dot(below.to(tl.float32), p1, acc, input_precision="ieee")
            below = tl.minimum(above + 2, h - 1) == own
            acc = tl.dot(below.to(tl.float32), p2, acc, input_precision="ieee")  # [GROUPS, CELLS]
        inside = (own < h) & (own < first_row + own_rows) & (cell < w) & (cell < first_column + own_columns)
        tl.store(dx_ptr + offset + own * w + cell, acc.to(dx_ptr.dtype.element_ty), mask=inside)


def _bwd_launches(
    grad_sums: Tensor,
    mask_logits: list[Tensor],
    targets: Tensor,
    matches: Tensor | None,
    areas: Tensor,
    num_classes: int,
    focal_alpha: float,
    focal_gamma: float,
    mask_ignored: bool,
    config: dict[str, Any],
) -> tuple[list[Tensor], list[Launch]]:
    """The gradients, zero so far, and the launches that fill in those of active pairs."""
    targets = _addressable(targets)
    matches = None if matches is None else matches.contiguous()
    grad_sums, areas = grad_sums.contiguous(), areas.contiguous()
    batch, queries = mask_logits[0].shape[:2]
    gradients = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in mask_logits]
    if grad_sums.numel() == 0 or areas.numel() == 0:
        return gradients, []
    targets, tiles_met, pairs, launch = _repeated_launch(targets, matches, areas, queries, mask_ignored)
    launches = [launch]
    block = config["block"]
    for first in range(0, len(mask_logits), _ENTRIES):
        group = [logits.contiguous() for logits in mask_logits[first : first + _ENTRIES]]
        # A block of cells, or several, for every BLOCK output columns.
        scale = min(targets.shape[-1] / logits.shape[3] for logits in group)
        cells = min(64, max(_GROUPS, next_power_of_2(int(block / max(1.0, scale)))))
        tiles = []
        for logits in group:
            h, w = logits.shape[2:]
            across = cdiv(w, cells - 1 if w > cells else cells)
            tiles.append(cdiv(h, _GROUPS - 1 if h > _GROUPS else _GROUPS) * across)
        arguments, constants = _common(
            group,
            targets,
            tiles_met,
            matches,
            pairs,
            num_classes,
            focal_alpha,
            focal_gamma,
            mask_ignored,
            block,
        )
        arguments |= {
            "grad_ptr": grad_sums[first:],
            **_entries("dx{}_ptr", gradients[first : first + _ENTRIES]),
            **_begins(tiles),
            "total": batch * queries,
        }
        # Where supports begin at whole vectors of targets, the compiler is told.
        steps = [divmod(targets.shape[-1], 2 * logits.shape[3]) for logits in group]
        align = 1 if any(rest for _, rest in steps) else math.gcd(_RUN, *(step for step, _ in steps))
        constants |= {"CELLS": cells, "ALIGN": align, "RUN": _RUN}
        # TF32 in two terms loses what rounding to half precision loses anyway.
        constants["SPLIT"] = config["split"] and group[0].element_size() < 4 and cells == _GROUPS
        constants["COLUMNS"] = next_power_of_2(block // _TILE + 2)
        programs = min(config["multiprocessors"] * config["programs"], batch * queries * sum(tiles))
        narrow = targets.element_size() == 1 and cells == _GROUPS
        options = _options(config, 1 if narrow else 2)
        if narrow and align != _RUN and "maxnreg" in options:
            options["maxnreg"] = 168  # sums of every column: three programs a multiprocessor in place of four
        launches.append(Launch(_mask_loss_bwd_kernel, programs, arguments, constants, options))
    return gradients, launches
