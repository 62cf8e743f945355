"""Mask loss on a GPU: how :mod:`segvit_kernels.ops.mask_loss` runs in Triton.

The forward and all launchers. ``_mask_targets``: areas, tiles with a class, active pairs; ``_mask_entries``:
a list of maps in one launch; ``_mask_pixels``: interpolation, and the losses of a pixel; ``_mask_backward``,
``_mask_matching``: the other two operators.

Forward: four sums of every tile, written as partials and added in fixed order by a second launch. Where no
tile under an item has the class, a shorter path needs no labels.

Bytes, instructions and choices: docs/kernels.md.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton._launch import Launch, cdiv, next_power_of_2, pinned, target
from segvit_kernels.triton._mask_backward import _bwd_launches
from segvit_kernels.triton._mask_entries import (
    _ENTRIES,
    _GROUPS,
    _MAX_ROWS,
    _begins,
    _check_sizes,
    _common,
    _entries,
    _entry,
    _options,
    _plane,
)
from segvit_kernels.triton._mask_matching import _matching_launches
from segvit_kernels.triton._mask_pixels import _between, _columns, _losses, _lowered, _map_row, _read, _rows
from segvit_kernels.triton._mask_targets import _TILE, _addressable, _met, _target_launches, _target_of
from segvit_kernels.triton._plan import planned


def _config(name: str, arch: str) -> dict[str, Any]:
    """Launch parameters of ``mask_loss_fwd``, ``mask_loss_bwd`` or ``mask_loss_matching``.

    Args:
        name: which of them.
        arch: what :func:`segvit_kernels.triton._launch.target` says of a device.

    Returns:
        ``block``, output columns of a tile; ``programs`` per multiprocessor; ``multiprocessors``;
        ``num_warps``; ``num_stages``; perhaps ``maxnreg``. Forward: ``span``, tiles side by side in one item.
        Backward and matching: whether factors of products are ``split`` for tensor cores. Matching:
        ``block_q`` queries and ``block_m`` targets of a program.
    """
    return {"multiprocessors": pinned(arch)["multiprocessors"], **pinned(arch)[name]}


@triton.jit
def _sums(
    out_ptr, x_ptr, targets_ptr, target, y, x_begin, h, w, rows, H, W, M, alpha, gamma,
    LABELS: tl.constexpr, HARD: tl.constexpr, MASK_IGNORED: tl.constexpr, GAMMA_TWO: tl.constexpr,
    EVEN: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
    ABSENT: tl.constexpr,
):  # fmt: skip
    """The four sums of GROUPS × rows by SPAN × BLOCK pixels; ABSENT says that no target is there."""
    row, past, step = _rows(y, h, H)
    focal = tl.zeros([GROUPS, BLOCK], tl.float32)
    bce, overlap, total = focal, focal, focal
    for start in range(x_begin, x_begin + SPAN * BLOCK, BLOCK):
        x = (start + tl.arange(0, BLOCK))[None, :]
        column, aside = _columns(x, w, W)
        v0 = _map_row(x_ptr, row, h, w, column, aside)  # [GROUPS, BLOCK]
        v1 = _map_row(x_ptr, row + 1, h, w, column, aside)
        if not HALVES:
            v2 = _map_row(x_ptr, row + 2, h, w, column, aside)
        for i in range(rows):
            f = past + i * step
            logits = v0 + _between(f) * (v1 - v0)
            if not HALVES:
                logits += _between(f - 1.0) * (v2 - v1)
            if ABSENT:
                if not EVEN:
                    logits = _lowered(logits, (y + i < H) & (x < W))
                a, b, c, d = _losses(logits, None, alpha, gamma, GAMMA_TWO, HARD)
            else:
                logits, t = _read(
                    targets_ptr, y + i, x, target, H, W, M, logits, LABELS, HARD, MASK_IGNORED, EVEN, not EVEN
                )
                a, b, c, d = _losses(logits, t, alpha, gamma, GAMMA_TWO, HARD)
                overlap += c
            focal += a
            bce += b
            total += d
    weight = 1.0 - alpha if ABSENT else 1.0
    tl.store(out_ptr, tl.sum(tl.sum(focal, 1), 0) * weight)
    tl.store(out_ptr + 1, tl.sum(tl.sum(bce, 1), 0))
    tl.store(out_ptr + 2, 0.0 if ABSENT else tl.sum(tl.sum(overlap, 1), 0))
    tl.store(out_ptr + 3, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def _mask_loss_fwd_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, targets_ptr, tiles_ptr, matches_ptr, pairs_ptr, partial_ptr,
    h0, h1, h2, h3, w0, w1, w2, w3, rows0, rows1, rows2, rows3, begin1, begin2, begin3, tiles,
    H, W, Q, M, down, across, stride_tb, stride_tm, alpha, gamma,
    ENTRIES: tl.constexpr, LABELS: tl.constexpr, HARD: tl.constexpr, MASK_IGNORED: tl.constexpr,
    GAMMA_TWO: tl.constexpr, EVEN: tl.constexpr, HALVES: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial (B, Q, tiles, 4): sums over GROUPS × rows by SPAN × BLOCK pixels, of active pairs only."""
    items = tl.load(pairs_ptr) * tiles
    spans = tl.cdiv(W, SPAN * BLOCK)
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
        rows = tl.where(entry == 0, rows0, tl.where(entry == 1, rows1, tl.where(entry == 2, rows2, rows3)))
        plane_ptr, target = _plane(targets_ptr, matches_ptr, pair, Q, stride_tb, stride_tm, LABELS)
        x_ptr += pair.to(tl.int64) * h * w
        y_begin, x_begin = local // spans * GROUPS * rows, local % spans * (SPAN * BLOCK)
        y = y_begin + tl.arange(0, GROUPS)[:, None] * rows
        out_ptr = partial_ptr + (pair.to(tl.int64) * tiles + tile) * 4
        met = True
        if tiles_ptr is not None:
            met = _met(
                tiles_ptr, pair, Q, target, y_begin, y_begin + GROUPS * rows,
                x_begin, tl.minimum(x_begin + SPAN * BLOCK, W), down, across, TILE, COLUMNS,
            )  # fmt: skip
        if met:
            _sums(
                out_ptr, x_ptr, plane_ptr, target, y, x_begin, h, w, rows, H, W, M, alpha, gamma,
                LABELS, HARD, MASK_IGNORED, GAMMA_TWO, EVEN, HALVES, GROUPS, BLOCK, SPAN, False,
            )  # fmt: skip
        else:
            if tiles_ptr is not None:
                _sums(
                    out_ptr, x_ptr, plane_ptr, target, y, x_begin, h, w, rows, H, W, M, alpha, gamma,
                    LABELS, HARD, MASK_IGNORED, GAMMA_TWO, EVEN, HALVES, GROUPS, BLOCK, SPAN, True,
                )  # fmt: skip


@triton.jit
def _mask_loss_sum_kernel(
    partial_ptr, matches_ptr, areas_ptr, sums_ptr, total, Q, M, tiles, begin1, begin2, begin3,
    LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums (entries, B, Q, 4) from the partials, in fixed order; zero for inactive pairs."""
    blocks = tl.cdiv(total, BLOCK)
    entry = tl.program_id(0) // blocks
    pair = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    _, active = _target_of(pair, matches_ptr, areas_ptr, Q, M, pair < total, LABELS)
    begin = tl.where(entry == 0, 0, tl.where(entry == 1, begin1, tl.where(entry == 2, begin2, begin3)))
    end = tl.where(entry == 0, begin1, tl.where(entry == 1, begin2, tl.where(entry == 2, begin3, tiles)))
    k = tl.arange(0, 4)[None, :]
    acc = tl.zeros([BLOCK, 4], tl.float32)
    for tile in range(begin, end):
        offset = (pair.to(tl.int64)[:, None] * tiles + tile) * 4 + k
        acc += tl.load(partial_ptr + offset, mask=active[:, None], other=0.0)
    offset = (entry.to(tl.int64) * total + pair[:, None]) * 4 + k
    tl.store(sums_ptr + offset, acc, mask=pair[:, None] < total)


def _halves(height: int, h: int, rows: int) -> bool:
    """Whether groups of ``rows`` never reach across the centre of a cell, so that two rows of the map do."""
    return height % (2 * h) == 0 and (height // h // 2) % rows == 0


def _rows_of_a_group(height: int, h: int) -> int:
    """As many as three rows of the map can serve; fewer where two do, or tiles then end with the image."""
    most = min(_MAX_ROWS, cdiv(height, h))
    for rows in range(most, 3, -1):
        if height % (_GROUPS * rows) == 0 and _halves(height, h, rows):
            return rows
    for rows in range(most, most // 2, -1):
        if height % (_GROUPS * rows) == 0:
            return rows
    return cdiv(height, _GROUPS * cdiv(height, _GROUPS * most))


def _fwd_launches(
    mask_logits: list[Tensor],
    targets: Tensor,
    matches: Tensor | None,
    num_classes: int,
    focal_alpha: float,
    focal_gamma: float,
    mask_ignored: bool,
    config: dict[str, Any],
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The sums and areas, still empty, and the launches that fill them."""
    _check_sizes(mask_logits, targets)
    targets, labels = _addressable(targets), targets.ndim == 3
    matches = None if matches is None else matches.contiguous()
    batch, queries = mask_logits[0].shape[:2]
    height, width = targets.shape[-2:]
    some = queries if queries and mask_logits else None
    areas, targets, tiles_met, pairs, launches = _target_launches(
        targets, matches, num_classes, some, mask_ignored
    )
    sums = areas.new_empty(len(mask_logits), batch, queries, 4)
    if sums.numel() == 0 or areas.numel() == 0:
        return (sums.zero_(), areas), launches
    block, span = config["block"], config["span"]
    for first in range(0, len(mask_logits), _ENTRIES):
        group = [logits.contiguous() for logits in mask_logits[first : first + _ENTRIES]]
        rows, tiles = [], []
        for logits in group:
            rows.append(_rows_of_a_group(height, logits.shape[2]))
            tiles.append(cdiv(height, _GROUPS * rows[-1]) * cdiv(width, block * span))
        begins = _begins(tiles)
        partial = sums.new_empty(batch, queries, sum(tiles), 4)
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
        arguments |= {"partial_ptr": partial, **_entries("rows{}", rows), **begins}
        even = width % (block * span) == 0 and all(height % (_GROUPS * r) == 0 for r in rows)
        halves = all(_halves(height, x.shape[2], r) for x, r in zip(group, rows, strict=True))
        constants |= {"EVEN": even, "HALVES": halves, "SPAN": span}
        constants["COLUMNS"] = next_power_of_2(block * span // _TILE + 1)
        programs = min(config["multiprocessors"] * config["programs"], batch * queries * sum(tiles))
        wide = targets.element_size() > 1
        crowd = 2 if wide and not even else int(wide or not (even and halves) or focal_gamma != 2)
        options = _options(config, crowd)
        launches.append(Launch(_mask_loss_fwd_kernel, programs, arguments, constants, options))
        arguments = {
            "partial_ptr": partial,
            "matches_ptr": matches,
            "areas_ptr": areas,
            "sums_ptr": sums[first:],
            "total": batch * queries,
            "Q": queries,
            "M": num_classes,
            **begins,
        }
        pair_block = 32
        programs = len(group) * cdiv(batch * queries, pair_block)
        constants = {"LABELS": labels, "BLOCK": pair_block}
        options = {"num_warps": 4, "num_stages": 1}
        launches.append(Launch(_mask_loss_sum_kernel, programs, arguments, constants, options))
    return (sums, areas), launches


@planned
def mask_loss_fwd(
    mask_logits: list[Tensor],
    targets: Tensor,
    matches: Tensor | None,
    num_classes: int,
    focal_alpha: float,
    focal_gamma: float,
    mask_ignored: bool,
    *,
    config: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Launcher of ``segvit::mask_loss_fwd``; ``config`` replaces entries of :func:`_config`."""
    found = _config("mask_loss_fwd", target(targets.device))
    arguments = (mask_logits, targets, matches, num_classes, focal_alpha, focal_gamma, mask_ignored)
    return _fwd_launches(*arguments, {**found, **(config or {})})


@planned
def mask_loss_bwd(
    grad_sums: Tensor,
    mask_logits: list[Tensor],
    targets: Tensor,
    matches: Tensor | None,
    areas: Tensor,
    num_classes: int,
    focal_alpha: float,
    focal_gamma: float,
    mask_ignored: bool,
    *,
    config: dict[str, Any] | None = None,
) -> tuple[list[Tensor], list[Launch]]:
    """Launcher of ``segvit::mask_loss_bwd``; ``config`` replaces entries of :func:`_config`."""
    found = _config("mask_loss_bwd", target(targets.device))
    arguments = (grad_sums, mask_logits, targets, matches, areas, num_classes)
    options = (focal_alpha, focal_gamma, mask_ignored)
    return _bwd_launches(*arguments, *options, {**found, **(config or {})})


@planned
def mask_matching_sums(
    mask_logits: Tensor,
    targets: Tensor,
    num_classes: int,
    focal_alpha: float,
    focal_gamma: float,
    *,
    config: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Launcher of ``segvit::mask_matching_sums``; ``config`` replaces entries of :func:`_config`."""
    found = _config("mask_loss_matching", target(targets.device))
    arguments = (mask_logits, targets, num_classes, focal_alpha, focal_gamma)
    return _matching_launches(*arguments, {**found, **(config or {})})
