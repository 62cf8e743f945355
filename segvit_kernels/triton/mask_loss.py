r"""Mask loss on a GPU: how :mod:`segvit_kernels.ops.mask_loss` runs in Triton.

Pairs. Labels are counted by image and class (int32 atomics: repeatable), copied in few bytes; every tile of
64 × 64 gets a word that says which classes it may have. One program writes the list of active pairs and its
length. The main kernels are persistent: a fixed number of programs walks the items (active pair, entry of the
list, tile), whose number is read from memory; where no tile under an item has the class, a shorter path needs
no labels. Inactive pairs cost nothing, and the host learns nothing.

Interpolation. A tile is 16 groups of R ≤ ⌈scale⌉ output rows, times BLOCK columns. The rows of a group touch
three rows of the low-resolution map, which are loaded and interpolated along x once; then

    x = v₀ + clamp(f) (v₁ − v₀) + clamp(f − 1) (v₂ − v₁),    f = position below v₀, clamp to [0, 1]:

two multiply-adds a pixel at any scale, one where no group reaches across the centre of a cell. The adjoint is
three multiply-adds into sums that stay in registers.
The kernels walk the R rows of all groups at once.

Forward: four sums of every tile, written as partials and added in fixed order by a second launch.

Backward, a gather: a program owns a block of cells and walks the output columns in their support. The sums
over rows go through two small products: with the weights along x, and with the matrix that says which cell a
sum of a group belongs to; with ``split`` the former run on tensor cores. Where the centres of cells lie at
multiples of 8 columns, as with patches of 16 pixels, the logits along a run of 8 are a straight line and sums
over runs are enough: a quarter of the registers, one product in four. Both neighbours compute borders of
blocks. No atomics.

Matching: the same walk with queries in place of groups; three products of (queries × pixels) and
(pixels × targets) on tensor cores, targets read or made from the labels on the fly, split over rows. Factors
are split in two terms that tensor cores take as they are, so that nothing is lost to TF32.

Per pixel one exponential and one reciprocal square root; log(1 + e) is a polynomial, accurate for small e as
the hardware's logarithm is not. Bytes, instructions and choices: docs/kernels.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton._launch import Launch, cdiv, next_power_of_2, pinned, target
from segvit_kernels.triton._plan import planned

_ENTRIES = 4  # of the list of logits, in one launch
_GROUPS = 16  # the smallest height of a matrix product
_MAX_ROWS = 16  # of a group, in the forward
_RUN = 8  # columns of a run in the backward: one vector of labels
_CLASSES = 1024  # in one histogram
_COUNTED = 8192  # mask elements of one program
_TILE = 64  # rows and columns of labels in one program
_DISTINCT = 6  # classes of a tile that are counted one by one
_LISTED = 2048  # pairs, or targets, at a time where the list of active pairs is made


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
def _log1p(e, root):
    """log(1 + e) for e in [0, 1]: e times a minimax polynomial in root = (1 + e)^(-1/2), error 2.2e-8."""
    y = root * -0.07078979077973632 + 0.37277049874695506
    y = y * root - 0.7856167479721908
    y = y * root + 0.6612776151423766
    y = y * root + 0.8971570618647687
    y = y * root - 0.07479865884513312
    return e * y


@triton.jit
def _logistic(x):
    """σ(x), σ(−x) and log(1 + exp(−|x|))."""
    e = tl.exp2(tl.abs(x) * -1.4426950408889634)
    root = tl.rsqrt(1.0 + e)  # squared, it is a reciprocal without the range checks of a division
    larger = root * root
    smaller = e * larger
    positive = x > 0
    return tl.where(positive, larger, smaller), tl.where(positive, smaller, larger), _log1p(e, root)


@triton.jit
def _power(m, gamma, GAMMA_TWO: tl.constexpr):
    if GAMMA_TWO:
        return m * m
    else:
        return tl.where(m > 0, tl.exp2(gamma * tl.log2(m)), 0.0)  # where m is 0, so is what it multiplies


@triton.jit
def _losses(x, t, alpha, gamma, GAMMA_TWO: tl.constexpr, HARD: tl.constexpr):
    """Focal, bce, p·t and p of every pixel; ``t`` is boolean if HARD.

    ``None`` for ``t`` is 0 everywhere: the focal loss is then without its factor 1 − α.
    """
    p, q, log = _logistic(x)
    if t is None:
        bce = tl.maximum(x, 0.0) + log
        focal = _power(p, gamma, GAMMA_TWO) * bce
        overlap = 0.0
    elif HARD:
        bce = tl.maximum(tl.where(t, -x, x), 0.0) + log
        m = tl.where(t, q, p)
        focal = tl.where(t, alpha, 1.0 - alpha) * _power(m, gamma, GAMMA_TWO) * bce
        overlap = tl.where(t, p, 0.0)
    else:
        bce = log + x * (tl.where(x > 0, 1.0, 0.0) - t)
        m = p * (1.0 - t) + q * t
        focal = (alpha * t + (1.0 - alpha) * (1.0 - t)) * _power(m, gamma, GAMMA_TWO) * bce
        overlap = p * t
    return focal, bce, overlap, p


@triton.jit
def _slopes(x, t, g0, g1, g2, g3, alpha, gamma, GAMMA_TWO: tl.constexpr, HARD: tl.constexpr):
    """Derivative of g₀ focal + g₁ bce + g₂ p·t + g₃ p in x; ``None`` for ``t`` is 0 everywhere."""
    p, q, log = _logistic(x)
    if t is None:
        focal = (1.0 - alpha) * g0 * (gamma * q * (tl.maximum(x, 0.0) + log) + p)
        rest = g1 + g3 * q
        if GAMMA_TWO:
            return p * (p * focal + rest)
        else:
            return _power(p, gamma, GAMMA_TWO) * focal + p * rest
    elif HARD:
        # With z = −x inside and x outside: bce = softplus(z), m = σ(z), n = 1 − m.
        bce = tl.maximum(tl.where(t, -x, x), 0.0) + log
        m, n = tl.where(t, q, p), tl.where(t, p, q)
        focal = tl.where(t, -alpha * g0, (1.0 - alpha) * g0) * (gamma * n * bce + m)
        rest = tl.where(t, -g1, g1) + tl.where(t, g2 + g3, g3) * n
        if GAMMA_TWO:
            return m * (m * focal + rest)
        else:
            return _power(m, gamma, GAMMA_TWO) * focal + m * rest
    else:
        bce = log + x * (tl.where(x > 0, 1.0, 0.0) - t)
        m = p * (1.0 - t) + q * t
        slope, error = p * q, p * (1.0 - t) - q * t
        alpha_t = alpha * t + (1.0 - alpha) * (1.0 - t)
        if GAMMA_TWO:
            focal = m * (2.0 * (1.0 - 2.0 * t) * slope * bce + m * error)
        else:
            # m is at least the smaller of p and 1 − p, so that the ratio is at most 1.
            ratio = tl.where(m > 0, slope / m, 0.0)
            focal = _power(m, gamma, GAMMA_TWO) * (gamma * (1.0 - 2.0 * t) * ratio * bce + error)
        return g0 * alpha_t * focal + g1 * error + (g2 * t + g3) * slope


@triton.jit
def _source(i, cells, size):
    """Where output element i of ``size`` lies among ``cells``: the cell before it and the way past that.

    The cell may be off by one at a boundary, where it does not matter; the way is exact but for one rounding.
    """
    position = (2 * i + 1) * cells - size  # in units of 1 / (2 size)
    before = (position.to(tl.float32) / (2 * size).to(tl.float32)).to(tl.int32)
    before = tl.minimum(tl.maximum(before, 0), cells - 1)
    return before, (position - before * (2 * size)).to(tl.float32) / (2 * size).to(tl.float32)


@triton.jit
def _rows(y, h, H):
    """The row of the map above each output row y, the way past it, and the way to the next output row."""
    row, past = _source(y, h, H)
    return row, past, h.to(tl.float32) / H.to(tl.float32)


@triton.jit
def _columns(x, w, W):
    """The column of the map before each output column x, and the way past it in [0, 1]."""
    column, past = _source(x, w, W)
    return column, tl.where(column < w - 1, tl.maximum(past, 0.0), 0.0)


@triton.jit
def _map_row(ptr, row, h, w, column, past):
    """One row of the map, interpolated at the output columns: [rows, columns]."""
    # The hint is for the layout, loads stay scalar: by itself Triton 3.6 lets threads run down the rows.
    ptrs = ptr + tl.minimum(row, h - 1) * w
    left = tl.load(tl.max_contiguous(ptrs + column, [1, 2])).to(tl.float32)
    right = tl.load(tl.max_contiguous(ptrs + tl.minimum(column + 1, w - 1), [1, 2])).to(tl.float32)
    return left + past * (right - left)


@triton.jit
def _between(past):
    return tl.minimum(tl.maximum(past, 0.0), 1.0)


@triton.jit
def _wide(label):
    """Labels in at least 32 bits, to compare them with numbers that theirs may not hold."""
    return label.to(tl.int32) if label.dtype.primitive_bitwidth < 32 else label


@triton.jit
def _lowered(logits, inside):
    return tl.where(inside, logits, -1e30)


@triton.jit
def _read(
    targets_ptr, y, x, target, H, W, M, logits,
    LABELS: tl.constexpr, HARD: tl.constexpr, MASK_IGNORED: tl.constexpr,
    EVEN: tl.constexpr, LOWER: tl.constexpr,
):  # fmt: skip
    """Targets of one output row of every group, and the logits.

    Ignored pixels, and if LOWER those outside, get a logit so low that they add nothing to sums or gradients.
    """
    offset = y * W + x
    inside = (y < H) & (x < W)
    if EVEN:
        t = tl.load(targets_ptr + offset)
    else:
        t = tl.load(targets_ptr + offset, mask=inside, other=0)
        if LOWER:
            logits = _lowered(logits, inside)
    if LABELS:
        label = _wide(t)
        t = label == target
        if LOWER:
            t = t & inside
        if MASK_IGNORED:
            logits = tl.where((label >= 0) & (label < M), logits, -1e30)
    else:
        t = (t != 0) if HARD else t.to(tl.float32)
    return logits, t


@triton.jit
def _entry(
    tile, x0_ptr, x1_ptr, x2_ptr, x3_ptr, h0, h1, h2, h3, w0, w1, w2, w3, begin1, begin2, begin3,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """The entry of the list that a tile belongs to: its index, map, grid, and the tile's number in it."""
    zero = tile * 0
    entry, ptr, h, w, begin = zero, x0_ptr, zero + h0, zero + w0, zero
    if ENTRIES > 1:  # noqa: SIM102
        if tile >= begin1:
            entry, ptr, h, w, begin = zero + 1, x1_ptr, zero + h1, zero + w1, zero + begin1
    if ENTRIES > 2:  # noqa: SIM102
        if tile >= begin2:
            entry, ptr, h, w, begin = zero + 2, x2_ptr, zero + h2, zero + w2, zero + begin2
    if ENTRIES > 3:  # noqa: SIM102
        if tile >= begin3:
            entry, ptr, h, w, begin = zero + 3, x3_ptr, zero + h3, zero + w3, zero + begin3
    return entry, ptr, h, w, tile - begin


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
def _plane(targets_ptr, matches_ptr, pair, Q, stride_tb, stride_tm, LABELS: tl.constexpr):
    """The labels of a pair's image, or the pair's mask; and the number of its target."""
    target = pair % Q if matches_ptr is None else tl.load(matches_ptr + pair).to(tl.int32)
    targets_ptr += (pair // Q).to(tl.int64) * stride_tb
    if not LABELS:
        targets_ptr += target.to(tl.int64) * stride_tm
    return targets_ptr, target


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


@triton.jit
def _high(x):
    """x without the bits that tensor cores would drop."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _product(f, t, acc, SPLIT: tl.constexpr, EXACT: tl.constexpr):
    """acc + f t in float32; EXACT says that tensor cores take t as it is."""
    if SPLIT:
        f_high, t_high = _high(f), _high(t)
        acc = tl.dot(f - f_high, t_high, acc, input_precision="tf32")
        if not EXACT:
            acc = tl.dot(f_high, t - t_high, acc, input_precision="tf32")
        return tl.dot(f_high, t_high, acc, input_precision="tf32")
    else:
        return tl.dot(f, t, acc, input_precision="ieee")


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
    by = tl.where(inner, w.to(tl.float32) / W.to(tl.float32), 0.0)  # to the next column
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


@triton.jit
def _mask_matching_kernel(
    x_ptr, targets_ptr, products_ptr, totals_ptr, B, Q, M, h, w, H, W, rows, rows_per_split,
    stride_tb, stride_tm, alpha, gamma,
    LABELS: tl.constexpr, HARD: tl.constexpr, GAMMA_TWO: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """products (splits, 3, B, Q, M) and totals (splits, 3, B, Q): sums over the rows of a split."""
    q_blocks, m_blocks = tl.cdiv(Q, BLOCK_Q), tl.maximum(tl.cdiv(M, BLOCK_M), 1)
    m_first = tl.program_id(0) % m_blocks * BLOCK_M
    q_first = tl.program_id(0) // m_blocks % q_blocks * BLOCK_Q
    image = tl.program_id(0) // m_blocks // q_blocks % B
    split = tl.program_id(0) // m_blocks // q_blocks // B
    q, m = (q_first + tl.arange(0, BLOCK_Q))[:, None], (m_first + tl.arange(0, BLOCK_M))[None, :]
    x_ptr += (image.to(tl.int64) * Q + tl.minimum(q, Q - 1)) * h * w  # [BLOCK_Q, 1]
    targets_ptr += image.to(tl.int64) * stride_tb
    if not LABELS:
        targets_ptr += tl.minimum(m, M - 1).to(tl.int64) * stride_tm  # [1, BLOCK_M]
    focal = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
    bce, overlap = focal, focal
    focal_total = tl.zeros([BLOCK_Q, BLOCK], tl.float32)
    bce_total, total = focal_total, focal_total
    end = tl.minimum((split + 1) * rows_per_split, H)
    for first in range(split * rows_per_split, end, rows):
        row, past, step = _rows(first, h, H)
        for start in range(0, W, BLOCK):
            x = start + tl.arange(0, BLOCK)
            column, aside = _columns(x[None, :], w, W)
            v0 = _map_row(x_ptr, row, h, w, column, aside)  # [BLOCK_Q, BLOCK]
            v1 = _map_row(x_ptr, row + 1, h, w, column, aside)
            v2 = _map_row(x_ptr, row + 2, h, w, column, aside)
            for y in range(first, tl.minimum(first + rows, end)):
                f = past + (y - first) * step
                logits = v0 + _between(f) * (v1 - v0) + _between(f - 1.0) * (v2 - v1)
                logits = tl.where(x[None, :] < W, logits, -1e30)  # adds nothing to the totals
                if LABELS:
                    label = _wide(tl.load(targets_ptr + y * W + x, mask=x < W, other=0))[:, None]
                    t = ((label == m) & (x[:, None] < W)).to(tl.float32)  # [BLOCK, BLOCK_M]
                else:
                    inside = (x[:, None] < W) & (m < M)
                    t = tl.load(targets_ptr + (y * W + x)[:, None], mask=inside, other=0)
                    t = (t != 0).to(tl.float32) if HARD else t.to(tl.float32)
                p, n, log = _logistic(logits)
                outside = tl.maximum(logits, 0.0) + log
                positive = alpha * _power(n, gamma, GAMMA_TWO) * (tl.maximum(-logits, 0.0) + log)
                negative = (1.0 - alpha) * _power(p, gamma, GAMMA_TWO) * outside
                focal = _product(positive - negative, t, focal, SPLIT, EXACT)
                bce = _product(-logits, t, bce, SPLIT, EXACT)
                overlap = _product(p, t, overlap, SPLIT, EXACT)
                focal_total += negative
                bce_total += outside
                total += p
    query = q_first + tl.arange(0, BLOCK_Q)
    out = (split * 3 * B + image).to(tl.int64) * Q + query
    size = tl.cast(B, tl.int64) * Q
    if m_first == 0:
        tl.store(totals_ptr + out, tl.sum(focal_total, 1), mask=query < Q)
        tl.store(totals_ptr + out + size, tl.sum(bce_total, 1), mask=query < Q)
        tl.store(totals_ptr + out + 2 * size, tl.sum(total, 1), mask=query < Q)
    out = out[:, None] * M + m
    size *= M
    inside = (q < Q) & (m < M)
    tl.store(products_ptr + out, focal, mask=inside)
    tl.store(products_ptr + out + size, bce, mask=inside)
    tl.store(products_ptr + out + 2 * size, overlap, mask=inside)


def _addressable(targets: Tensor) -> Tensor:
    """The targets themselves if every plane is contiguous, or a copy; bool as uint8."""
    if targets.dtype == torch.bool:
        targets = targets.view(torch.uint8)
    height, width = targets.shape[-2:]
    rows = targets.stride(-2) == width or height == 1
    return targets if rows and (targets.stride(-1) == 1 or width == 1) else targets.contiguous()


def _check_sizes(mask_logits: list[Tensor], targets: Tensor) -> None:
    height, width = targets.shape[-2:]
    for logits in mask_logits:
        h, w = logits.shape[-2:]
        if max(h * height, w * width) >= 2**29 or height * width >= 2**31 - 2**16:
            raise ValueError(
                f"mask_logits {tuple(logits.shape)} and targets {tuple(targets.shape)} are too large for "
                "32-bit positions: use backend='eager'"
            )


def _entries(name: str, tensors: list[Any]) -> dict[str, Any]:
    """Arguments x0_ptr, x1_ptr, … from a template; what is missing repeats the first and is not looked at."""
    return {name.format(i): tensors[i] if i < len(tensors) else tensors[0] for i in range(_ENTRIES)}


def _begins(tiles: list[int]) -> dict[str, int]:
    """First tile of every entry but the first, and the number of all."""
    total = sum(tiles)
    begins = {f"begin{i}": sum(tiles[:i]) if i < len(tiles) else total for i in range(1, _ENTRIES)}
    return begins | {"tiles": total}


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


def _common(
    group: list[Tensor],
    targets: Tensor,
    tiles: Tensor | None,
    matches: Tensor | None,
    pairs: Tensor,
    num_targets: int,
    focal_alpha: float,
    focal_gamma: float,
    mask_ignored: bool,
    block: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants that the forward and the backward kernel share."""
    labels, (down, across) = targets.ndim == 3, _tiles(targets)
    arguments = {
        **_entries("x{}_ptr", group),
        **_entries("h{}", [logits.shape[2] for logits in group]),
        **_entries("w{}", [logits.shape[3] for logits in group]),
        "targets_ptr": targets,
        "tiles_ptr": tiles,
        "matches_ptr": matches,
        "pairs_ptr": pairs,
        "H": targets.shape[-2],
        "W": targets.shape[-1],
        "Q": group[0].shape[1],
        "M": num_targets,
        "down": down,
        "across": across,
        "stride_tb": targets.stride(0),
        "stride_tm": 0 if labels else targets.stride(1),
        "alpha": focal_alpha,
        "gamma": focal_gamma,
    }
    constants = {
        "ENTRIES": len(group),
        "LABELS": labels,
        "HARD": not targets.is_floating_point(),
        "MASK_IGNORED": mask_ignored and labels,
        "GAMMA_TWO": focal_gamma == 2,
        "GROUPS": _GROUPS,
        "BLOCK": block,
        "TILE": _TILE,
    }
    return arguments, constants


def _options(config: dict[str, Any], crowd: int = 1) -> dict[str, int]:
    """Compiler options. In a crowded kernel the assembler, left to itself, spills to fit more programs.

    Args:
        config: of :func:`_config`.
        crowd: 0 for a kernel that needs no cap on registers, 2 for one that needs most of them.
    """
    names = ("num_warps", "num_stages", "maxnreg") if crowd else ("num_warps", "num_stages")
    found = {name: config[name] for name in names if name in config}
    return {**found, "maxnreg": 255} if crowd > 1 and "maxnreg" in found else found


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
    rows = cdiv(height, cdiv(height, min(_MAX_ROWS, cdiv(height, h))))
    groups = cdiv(height, rows)
    # Without a target there are still totals.
    blocks = batch * cdiv(queries, block_q) * max(1, cdiv(num_classes, block_m))
    # All at once: a second round for a few programs would take as long as the first.
    splits = min(groups, max(1, config["multiprocessors"] * config["programs"] // blocks))
    groups_per_split = cdiv(groups, splits)
    splits = cdiv(groups, groups_per_split)
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
        "rows": rows,
        "rows_per_split": groups_per_split * rows,
        "stride_tb": targets.stride(0),
        "stride_tm": 0 if labels else targets.stride(1),
        "alpha": focal_alpha,
        "gamma": focal_gamma,
    }
    constants = {
        "LABELS": labels,
        "HARD": not targets.is_floating_point(),
        "GAMMA_TWO": focal_gamma == 2,
        "BLOCK_Q": block_q,
        "BLOCK_M": block_m,
        "BLOCK": config["block"],
        "SPLIT": config["split"],
        "EXACT": targets.dtype not in (torch.float32, torch.float64),
    }
    launches.append(Launch(_mask_matching_kernel, blocks * splits, arguments, constants, _options(config)))
    if splits > 1:
        launches += [
            _sum_launch(part, out, splits, out.numel())
            for part, out in ((partial, products), (partial_totals, totals))
            if out.numel()
        ]
    return (products, totals, areas), launches


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
