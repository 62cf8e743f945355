"""What mask losses make of their targets in Triton: areas, narrow labels, tiles with a class, active pairs.

Labels are counted by image and class (int32 atomics: repeatable), copied in few bytes; every tile of 64 × 64
gets a word that says which classes it may have. One program writes the list of active pairs and its length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton._launch import Launch, cdiv, next_power_of_2
from segvit_kernels.triton._mask_pixels import _wide

_CLASSES = 1024  # in one histogram
_COUNTED = 8192  # mask elements of one program
_TILE = 64  # rows and columns of labels in one program
_DISTINCT = 6  # classes of a tile that are counted one by one
_LISTED = 2048  # pairs, or targets, at a time where the list of active pairs is made


@triton.jit
def _target_of(pair, matches_ptr, areas_ptr, Q, M, valid, LABELS: tl.constexpr):
    """Targets of pairs, and whether the pairs are active."""
    if matches_ptr is None:
        target = (pair % Q).to(tl.int64)
    else:
        target = tl.load(matches_ptr + pair, mask=valid, other=-1)
    active = valid & (target >= 0) & (target < M)
    if LABELS:
        image = (pair // Q).to(tl.int64)
        active = active & (tl.load(areas_ptr + image * M + target, mask=active, other=0) > 0)
    return target, active


@triton.jit
def _list(
    matches_ptr, counts_ptr, areas_ptr, pairs_ptr, total, areas_total, Q, M,
    LABELS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """pairs: how many are active, then these in order. With int32 counts also the areas. One program."""
    i = tl.arange(0, LISTED)
    if counts_ptr is not None:
        for start in range(0, areas_total, LISTED):
            count = tl.load(counts_ptr + start + i, mask=start + i < areas_total, other=0)
            tl.store(areas_ptr + start + i, count.to(tl.float32), mask=start + i < areas_total)
    if pairs_ptr is not None:
        found = tl.zeros([], tl.int32)
        for start in range(0, total, LISTED):
            sizes_ptr = areas_ptr if counts_ptr is None else counts_ptr
            _, active = _target_of(start + i, matches_ptr, sizes_ptr, Q, M, start + i < total, LABELS)
            one = active.to(tl.int32)
            tl.store(pairs_ptr + found + tl.cumsum(one, 0), start + i, mask=active)
            found += tl.sum(one, 0)
        tl.store(pairs_ptr, found)


@triton.jit
def _mask_labels_kernel(
    labels_ptr, matches_ptr, counts_ptr, tiles_ptr, codes_ptr, areas_ptr, pairs_ptr,
    H, W, down, across, stride_b, total, areas_total, Q, M,
    CLASSES: tl.constexpr, TILE: tl.constexpr, DISTINCT: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """A tile of labels, and in one program the list of active pairs.

    counts (B, M) += pixels of every class, with the number of finished programs behind them. The last one
    makes areas and list; without counts program 0 makes the list from the areas that are there.
    tiles (B, down, across): bit c % 32 is set where a pixel has class c, all bits where classes are many.
    codes (B, H, W): the labels in a narrow dtype, its largest number (its −1) for any that is no class.
    """
    if counts_ptr is None:  # noqa: SIM102
        if tl.program_id(0) == 0:
            _list(matches_ptr, None, areas_ptr, pairs_ptr, total, areas_total, Q, M, True, LISTED)
    image = (tl.program_id(0) // (down * across)).to(tl.int64)
    at = tl.arange(0, TILE * TILE)
    y = tl.program_id(0) % (down * across) // across * TILE + at // TILE
    x = tl.program_id(0) % across * TILE + at % TILE
    inside = (y < H) & (x < W)
    label = _wide(tl.load(labels_ptr + image * stride_b + y * W + x, mask=inside, other=-1))
    code = tl.where((label >= 0) & (label < M), label, M).to(tl.int32)
    if codes_ptr is not None:
        narrow = tl.where(code < M, code, -1).to(codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + image * H * W + y * W + x, narrow, mask=inside)
    # Of the few classes that most tiles have, one after the other. The loop changes no tensor: of one that it
    # changes, LLVM's SLP vectorizer in Triton 3.6 loses elements.
    word, done = 0, 0
    lowest = tl.min(code, 0)
    while (lowest < M) & (done < DISTINCT):
        if counts_ptr is not None:
            count = tl.sum((code == lowest).to(tl.int32), 0)
            tl.atomic_add(counts_ptr + image * M + lowest, count, sem="relaxed")
        word |= 1 << (lowest % 32)
        lowest = tl.min(tl.where(code > lowest, code, M), 0)
        done += 1
    if lowest < M:
        word = -1
        if counts_ptr is not None:
            for first in range(0, M, CLASSES):
                valid = (code >= tl.maximum(lowest, first)) & (code < M) & (code < first + CLASSES)
                count = tl.histogram(tl.where(valid, code - first, 0), CLASSES, mask=valid)
                c = first + tl.arange(0, CLASSES)
                tl.atomic_add(counts_ptr + image * M + c, count, mask=(count > 0) & (c < M), sem="relaxed")
    if tiles_ptr is not None:
        tl.store(tiles_ptr + tl.program_id(0), word)
    if counts_ptr is not None:
        tl.debug_barrier()  # what all threads have added comes before the number of finished programs
        if tl.atomic_add(counts_ptr + areas_total, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            _list(matches_ptr, counts_ptr, areas_ptr, pairs_ptr, total, areas_total, Q, M, True, LISTED)


@triton.jit
def _met(
    tiles_ptr, pair, Q, target, y, y_end, x, x_end, down, across, TILE: tl.constexpr, COLUMNS: tl.constexpr
):
    """Whether rows y to y_end and columns x to x_end lie in any tile that may have a pixel of the class."""
    tiles_ptr += (pair // Q).to(tl.int64) * (down * across)
    columns = (x // TILE + tl.arange(0, COLUMNS))[None, :]
    last = tl.minimum((y_end - 1) // TILE, down - 1)
    words = tl.zeros([8, COLUMNS], tl.int32)
    for start in range(y // TILE, last + 1, 8):
        rows = (start + tl.arange(0, 8))[:, None]
        inside = (rows <= last) & (columns * TILE < x_end)
        words |= tl.load(tiles_ptr + rows * across + columns, mask=inside, other=0)
    return tl.max(tl.max((words >> (target % 32)) & 1, 1), 0) > 0


@triton.jit
def _mask_area_kernel(
    masks_ptr, partial_ptr, matches_ptr, pairs_ptr, pixels, total, Q, M, stride_b, stride_m,
    HARD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """partial (B, M, chunks) = sum of CHUNK elements of one mask; program 0 also lists the active pairs."""
    if pairs_ptr is not None:  # noqa: SIM102
        if tl.program_id(0) == 0:
            _list(matches_ptr, None, None, pairs_ptr, total, 0, Q, M, False, LISTED)
    chunks = tl.cdiv(pixels, CHUNK)
    mask = tl.program_id(0) // chunks
    start = tl.program_id(0) % chunks * CHUNK
    masks_ptr += (mask // M).to(tl.int64) * stride_b + (mask % M).to(tl.int64) * stride_m
    total_area = tl.zeros([BLOCK], tl.float32)
    for i in range(0, CHUNK, BLOCK):
        at = start + i + tl.arange(0, BLOCK)
        t = tl.load(masks_ptr + at, mask=at < pixels, other=0)
        total_area += (t != 0).to(tl.float32) if HARD else t.to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total_area, 0))


@triton.jit
def _mask_pairs_kernel(
    matches_ptr, areas_ptr, pairs_ptr, total, Q, M, LABELS: tl.constexpr, LISTED: tl.constexpr
):
    _list(matches_ptr, None, areas_ptr, pairs_ptr, total, 0, Q, M, LABELS, LISTED)


@triton.jit
def _mask_sum_kernel(partial_ptr, out_ptr, size, parts, inner, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """out (…, inner) = Σ over parts of partial (…, parts, inner), PARTS at a time in fixed order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)[None, :]
    partial_ptr += (i // inner * parts * inner + i % inner)[:, None]
    acc = tl.zeros([BLOCK, PARTS], tl.float32)
    for start in range(0, parts, PARTS):
        inside = (i < size)[:, None] & (start + part < parts)
        acc += tl.load(partial_ptr + (start + part) * inner, mask=inside, other=0.0)
    tl.store(out_ptr + i, tl.sum(acc, 1), mask=i < size)


def _addressable(targets: Tensor) -> Tensor:
    """The targets themselves if every plane is contiguous, or a copy; bool as uint8."""
    if targets.dtype == torch.bool:
        targets = targets.view(torch.uint8)
    height, width = targets.shape[-2:]
    rows = targets.stride(-2) == width or height == 1
    return targets if rows and (targets.stride(-1) == 1 or width == 1) else targets.contiguous()


def _sum_launch(partial: Tensor, out: Tensor, parts: int, inner: int) -> Launch:
    """out (…, inner) = the sum of partial (…, parts, inner) over parts."""
    arguments = {"partial_ptr": partial, "out_ptr": out, "size": out.numel(), "parts": parts, "inner": inner}
    constants = {"BLOCK": 8, "PARTS": 128} if inner == 1 else {"BLOCK": 256, "PARTS": 4}
    programs = cdiv(out.numel(), constants["BLOCK"])
    return Launch(_mask_sum_kernel, programs, arguments, constants, {"num_warps": 4, "num_stages": 1})


def _tiles(targets: Tensor) -> tuple[int, int]:
    """How many tiles of labels lie below each other, and beside each other."""
    return cdiv(targets.shape[-2], _TILE), cdiv(targets.shape[-1], _TILE)


def _narrow(targets: Tensor, num_targets: int) -> Tensor | None:
    """Room for a copy of labels in the narrowest dtype; ``None`` where they are as narrow."""
    for dtype in (torch.uint8, torch.int16):
        if num_targets <= torch.iinfo(dtype).max and targets.element_size() > dtype.itemsize:
            return targets.new_empty(targets.shape, dtype=dtype)
    return None


def _label_launch(
    targets: Tensor,
    matches: Tensor | None,
    counts: Tensor | None,
    areas: Tensor,
    tiles: Tensor | None,
    codes: Tensor | None,
    pairs: Tensor | None,
) -> Launch:
    """Everything that is made from labels: what is not None, and the areas if there are counts."""
    (batch, height, width), num_targets = targets.shape, areas.shape[1]
    (down, across), total = _tiles(targets), 0 if pairs is None else pairs.numel() - 1
    arguments = {
        "labels_ptr": targets,
        "matches_ptr": matches,
        "counts_ptr": counts,
        "tiles_ptr": tiles,
        "codes_ptr": codes,
        "areas_ptr": areas,
        "pairs_ptr": pairs,
        "H": height,
        "W": width,
        "down": down,
        "across": across,
        "stride_b": targets.stride(0),
        "total": total,
        "areas_total": areas.numel(),
        "Q": total // batch,
        "M": num_targets,
    }
    constants = {
        "CLASSES": min(_CLASSES, max(32, next_power_of_2(num_targets))),
        "TILE": _TILE,
        "DISTINCT": _DISTINCT,
        "LISTED": _listed(max(total, areas.numel())),
    }
    options = {"num_warps": 4, "num_stages": 1}
    return Launch(_mask_labels_kernel, batch * down * across, arguments, constants, options)


def _listed(most: int) -> int:
    return min(_LISTED, max(256, next_power_of_2(most)))


def _target_launches(
    targets: Tensor, matches: Tensor | None, num_targets: int, queries: int | None, mask_ignored: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[Launch]]:
    """What a forward makes from targets, still empty, and the launches that fill it.

    Returns:
        areas (B, M); the targets, or labels in a narrow dtype; tiles with a pixel of each class, ``None`` for
        masks or with ``mask_ignored``; the list of active pairs with its length in front, ``None`` without
        ``queries``; the launches.
    """
    batch, pixels = targets.shape[0], targets.shape[-2] * targets.shape[-1]
    areas = targets.new_empty(batch, num_targets, dtype=torch.float32)
    if areas.numel() == 0:
        return areas, targets, None, None, []
    pairs = None if queries is None else areas.new_empty(1 + batch * queries, dtype=torch.int32)
    if targets.ndim == 3:
        counts = targets.new_zeros(areas.numel() + 1, dtype=torch.int32)
        tiles, codes = None, _narrow(targets, num_targets)
        if pairs is not None and not mask_ignored:
            tiles = targets.new_empty(batch, *_tiles(targets), dtype=torch.int32)
        launches = [_label_launch(targets, matches, counts, areas, tiles, codes, pairs)]
        return areas, targets if codes is None else codes, tiles, pairs, launches
    chunks = cdiv(pixels, _COUNTED)
    partial = areas if chunks == 1 else areas.new_empty(areas.numel() * chunks)
    arguments = {
        "masks_ptr": targets,
        "partial_ptr": partial,
        "matches_ptr": matches,
        "pairs_ptr": pairs,
        "pixels": pixels,
        "total": batch * (queries or 0),
        "Q": queries or 0,
        "M": num_targets,
        "stride_b": targets.stride(0),
        "stride_m": targets.stride(1),
    }
    constants = {"HARD": not targets.is_floating_point(), "BLOCK": 1024, "CHUNK": _COUNTED}
    constants["LISTED"] = _listed(batch * (queries or 0))
    options = {"num_warps": 4, "num_stages": 1}
    launches = [Launch(_mask_area_kernel, areas.numel() * chunks, arguments, constants, options)]
    if chunks > 1:
        launches.append(_sum_launch(partial, areas, chunks, 1))
    return areas, targets, None, pairs, launches


def _repeated_launch(
    targets: Tensor, matches: Tensor | None, areas: Tensor, queries: int, mask_ignored: bool
) -> tuple[Tensor, Tensor | None, Tensor, Launch]:
    """Labels, tiles and list of :func:`_target_launches` for a backward, which has the areas."""
    batch, num_targets = areas.shape
    labels = targets.ndim == 3
    pairs = areas.new_empty(1 + batch * queries, dtype=torch.int32)
    tiles = codes = None
    if labels:
        codes = _narrow(targets, num_targets)
        if not mask_ignored:
            tiles = targets.new_empty(batch, *_tiles(targets), dtype=torch.int32)
    if tiles is not None or codes is not None:
        launch = _label_launch(targets, matches, None, areas, tiles, codes, pairs)
        return targets if codes is None else codes, tiles, pairs, launch
    arguments = {"matches_ptr": matches, "areas_ptr": areas, "pairs_ptr": pairs}
    arguments |= {"total": batch * queries, "Q": queries, "M": num_targets}
    constants = {"LABELS": labels, "LISTED": _listed(batch * queries)}
    options = {"num_warps": 4, "num_stages": 1}
    return targets, None, pairs, Launch(_mask_pairs_kernel, 1, arguments, constants, options)
