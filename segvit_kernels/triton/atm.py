r"""Attention-to-mask on a GPU: how :mod:`segvit_kernels.ops.atm` runs in Triton.

Forward, plan ``fused`` (the default): one launch with two kinds of programs. The first kind computes
attention for one (image, head, block of queries, split of the keys) with an online softmax. The second
computes a tile of the masks as one product over the concatenated heads, M = (scale / H) Q_cat K_catᵀ with
inner length H·D. The programs of an image follow one another, so that its K is read from memory once. A
program holds up to three tiles of 64 queries, all of them for the usual number of classes, so that keys and
values also pass the L2 cache only once. Where batch and heads do not fill the chip the keys are split and
a second launch combines the partial outputs.

Forward, plan ``heads``: one program per (image, block of queries, tile of keys) that loops over the heads and
keeps the mask tile in registers. S is computed once; every tile of keys writes a partial output.

Backward: one program per (image, head, tile of keys) that holds dK and dV and loops over the queries. S is
formed transposed, so that P and dS feed the products of dV and dK from registers. dQ is summed over the
tiles of keys: from float32 partials in fixed order, or by float32 atomics where partials would not fit the L2
cache and repeatability is not asked for.

Bytes moved and the choice between the plans: docs/kernels.md.
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

_LOG2E = math.log2(math.e)
_LN2 = math.log(2.0)
_MAX_SPLITS = 16
_PARTIAL_BYTES = 32 * 2**20  # what may stay in the L2 cache between writing and summing


def _pinned(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, arch: str, dropout: bool
) -> dict[str, int]:
    kind = "single" if dtype == torch.float32 else "half"
    config = dict(pinned(arch)[name][kind][str(_padded(shape[-1]))])
    if dropout or shape[2] % 4:
        # Random numbers, and addresses of rows that vector accesses cannot reach, need the registers.
        config.pop("maxnreg", None)
    return config


def _padded(size: int) -> int:
    return max(16, next_power_of_2(size))


def _fwd_config(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, arch: str, dropout: bool = False
) -> dict[str, Any]:
    """Launch parameters of the forward.

    Args:
        shape: batch, queries, keys, heads, head dim.
        dtype: of the inputs.
        arch: what :func:`segvit_kernels.triton._launch.target` says of a device.
        dropout: whether attention weights are dropped or tokens hidden, which costs registers.

    Returns:
        ``plan``; ``tiles`` of ``block_m`` queries in one program; ``block_n`` keys; ``block_c``, inner step
        of the mask product; ``splits`` of the keys; ``num_warps``; ``num_stages``; perhaps ``maxnreg``.
    """
    batch, queries, keys, heads, _ = shape
    config = {"plan": "fused", **_pinned("atm_fwd", shape, dtype, arch, dropout)}
    tiles = cdiv(queries, config["block_m"])
    blocks = cdiv(tiles, 1 if dropout else config["tiles"])
    config["tiles"] = cdiv(tiles, blocks)
    # As near as can be to two programs per multiprocessor, each with at least two tiles of keys.
    splits = round(2 * pinned(arch)["multiprocessors"] / max(1, batch * heads * blocks))
    most = min(_MAX_SPLITS, cdiv(keys, config["block_n"]) // 2)
    return {**config, "splits": max(1, min(splits, most))}


def _bwd_config(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    arch: str,
    dropout: bool = False,
    deterministic: bool = True,
) -> dict[str, Any]:
    """Launch parameters of the backward; arguments as in :func:`_fwd_config`.

    Returns:
        ``block_m``, ``block_n``, ``num_warps``, ``num_stages``, perhaps ``maxnreg``, and ``reduce``, how dQ
        is summed over the tiles of keys: ``partials`` or ``atomics``.
    """
    batch, queries, keys, heads, head_dim = shape
    config = _pinned("atm_bwd", shape, dtype, arch, dropout)
    partial_bytes = 4 * batch * cdiv(keys, config["block_n"]) * queries * heads * head_dim
    reduce = "partials" if deterministic or partial_bytes <= _PARTIAL_BYTES else "atomics"
    return {**config, "reduce": reduce}


@triton.jit
def _keep(
    seed, image_head, groups, threshold, m_start, n_start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Which weights survive dropout: one Philox call gives eight neighbouring keys 16 bits each."""
    m = m_start + tl.arange(0, BLOCK_M)
    group = n_start // 8 + tl.arange(0, BLOCK_N // 8)
    c0 = (m[:, None] * groups + group[None, :]).to(tl.uint32)  # [BLOCK_M, BLOCK_N / 8]
    zero = c0 * 0
    r0, r1, r2, r3 = tl.philox(seed, c0, zero + image_head.to(tl.uint32), zero, zero)
    # Joined dimensions: word // 2, word % 2, half of the word; the last varies fastest.
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    keep = tl.join(words & 0xFFFF, words >> 16) >= threshold
    return tl.reshape(keep, BLOCK_M, BLOCK_N)


@triton.jit
def _load(ptr, rows, last, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a (last + 1, D) matrix, the last one again past the end: [rows, BLOCK_D], zero from D on.

    Repeating a row costs neither predicates nor registers; whoever uses it drops what comes of it.
    """
    d = tl.arange(0, BLOCK_D)
    ptrs = ptr + tl.minimum(rows, last)[:, None] * stride + d[None, :]
    if D == BLOCK_D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=d[None, :] < D, other=0.0)


@triton.jit
def _load_tokens(ptr, pad_ptr, rows, last, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """:func:`_load` of keys or values, with zeros for tokens that are padding (``pad_ptr``, if not None)."""
    if pad_ptr is None:
        return _load(ptr, rows, last, stride, D, BLOCK_D)
    else:
        d = tl.arange(0, BLOCK_D)
        rows = tl.minimum(rows, last)
        seen = (tl.load(pad_ptr + rows) == 0)[:, None]
        return tl.load(ptr + rows[:, None] * stride + d[None, :], mask=seen & (d[None, :] < D), other=0.0)


@triton.jit
def _hidden(pad_ptr, n_start, Nk, BLOCK_N: tl.constexpr):
    """Which keys of a tile no query sees: [BLOCK_N]."""
    n = n_start + tl.arange(0, BLOCK_N)
    return tl.load(pad_ptr + n, mask=n < Nk, other=1) != 0


@triton.jit
def _softmax_step(
    q, k, v, acc, largest, total, pad_ptr, m_start, n, Nk, scale_log2, seed, image_head, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax of one tile of queries; ``largest`` in units of log 2."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if not EVEN_N:
        s = tl.where(n + tl.arange(0, BLOCK_N)[None, :] < Nk, s, float("-inf"))
    if pad_ptr is not None:
        s = tl.where(_hidden(pad_ptr, n, Nk, BLOCK_N)[None, :], float("-inf"), s)
    new = tl.maximum(largest, tl.max(s, 1) * scale_log2)
    if pad_ptr is not None:
        new = tl.maximum(new, -1e38)  # minus infinity less itself is not a number
    p = tl.exp2(s * scale_log2 - new[:, None])
    shrink = tl.exp2(largest - new)
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(_keep(seed, image_head, tl.cdiv(Nk, 8), threshold, m_start, n, BLOCK_M, BLOCK_N), p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new, total


@triton.jit
def _divisor(total, PADDED: tl.constexpr):
    """The sum of the weights; 1 for a query that sees no token, whose output is zero as it is."""
    if PADDED:
        return tl.where(total == 0.0, 1.0, total)
    return total


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, pad_ptr, o_ptr, lse_ptr, stride_qn, stride_kn, stride_vn,
    m_start, n_begin, n_end, Nq, Nk, scale_log2, seed, image_head, threshold, keep_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of TILES tiles of queries over keys n_begin..n_end of one head."""
    rows, cols, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    q_ptr += tl.cast(m_start, tl.int64) * stride_qn
    q, acc, largest, total = (), (), (), ()
    for t in tl.static_range(TILES):
        q += (_load(q_ptr, t * BLOCK_M + rows, Nq - m_start - 1, stride_qn, D, BLOCK_D),)
        acc += (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)
        largest += (tl.full([BLOCK_M], float("-inf"), tl.float32),)
        total += (tl.zeros([BLOCK_M], tl.float32),)
    k_ptr += tl.cast(n_begin, tl.int64) * stride_kn
    v_ptr += tl.cast(n_begin, tl.int64) * stride_vn
    for n in tl.range(n_begin, n_end, BLOCK_N, num_stages=STAGES):
        last = BLOCK_N - 1 if EVEN_N else Nk - n - 1
        pads = pad_ptr
        if pad_ptr is not None:
            pads += n
        k = _load_tokens(k_ptr, pads, cols, last, stride_kn, D, BLOCK_D)
        v = _load_tokens(v_ptr, pads, cols, last, stride_vn, D, BLOCK_D)
        new_acc, new_largest, new_total = (), (), ()
        for t in tl.static_range(TILES):
            a, x, z = _softmax_step(
                q[t], k, v, acc[t], largest[t], total[t], pad_ptr, m_start + t * BLOCK_M, n, Nk, scale_log2,
                seed, image_head, threshold, BLOCK_M, BLOCK_N, EVEN_N, DROPOUT, PRECISION,
            )  # fmt: skip
            new_acc += (a,)
            new_largest += (x,)
            new_total += (z,)
        acc, largest, total = new_acc, new_largest, new_total
        k_ptr += tl.cast(BLOCK_N, tl.int64) * stride_kn
        v_ptr += tl.cast(BLOCK_N, tl.int64) * stride_vn
    o_ptr += tl.cast(m_start, tl.int64) * (H * D)
    for t in tl.static_range(TILES):
        m = t * BLOCK_M + rows
        valid = (m[:, None] < Nq - m_start) & (d[None, :] < D)
        o = acc[t] * (keep_scale / _divisor(total[t], pad_ptr is not None))[:, None]
        tl.store(o_ptr + m[:, None] * (H * D) + d[None, :], o.to(o_ptr.dtype.element_ty), mask=valid)
        lse = (largest[t] + tl.log2(total[t])) * 0.6931471805599453
        tl.store(lse_ptr + m_start + m, lse, mask=m < Nq - m_start)


@triton.jit
def _store_masks(
    acc, previous_ptr, masks_ptr, stride_pn, m_start, n_start, Nq, Nk, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    width, stride = Nk // ALIGN * ALIGN, stride_pn // ALIGN * ALIGN  # tells the compiler what divides them
    valid = (rows[:, None] < Nq - m_start) & (cols[None, :] < width - n_start)
    acc *= factor
    if previous_ptr is not None:
        previous_ptr += tl.cast(m_start, tl.int64) * stride + n_start
        previous = tl.load(previous_ptr + rows[:, None] * stride + cols[None, :], mask=valid, other=0.0)
        acc += previous.to(tl.float32)
    masks_ptr += tl.cast(m_start, tl.int64) * width + n_start
    tl.store(
        masks_ptr + rows[:, None] * width + cols[None, :], acc.to(masks_ptr.dtype.element_ty), mask=valid
    )


@triton.jit
def _mask_tile(
    q_ptr, k_ptr, pad_ptr, previous_ptr, masks_ptr, stride_qn, stride_qh, stride_kn, stride_kh, stride_pn,
    m_start, n_start, Nq, Nk, channels, factor,
    H: tl.constexpr, D: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """TILES tiles of the masks that share their keys, a product over all channels of all heads."""
    rows, cols, inner = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    EVEN_C: tl.constexpr = H * D % BLOCK_C == 0
    q_ptr += tl.cast(m_start, tl.int64) * stride_qn
    k_ptr += tl.cast(n_start, tl.int64) * stride_kn
    n = tl.minimum(cols, Nk - n_start - 1)[:, None]
    acc = ()
    for _ in tl.static_range(TILES):
        acc += (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),)
    for start in tl.range(0, channels, BLOCK_C, num_stages=STAGES):
        c = (start + inner)[None, :]
        k_ptrs = k_ptr + n * stride_kn + c // D * stride_kh + c % D
        if pad_ptr is not None:
            seen = tl.load(pad_ptr + n_start + n) == 0  # [BLOCK_N, 1]
            k = tl.load(k_ptrs, mask=seen & (c < H * D), other=0.0)
        else:
            k = tl.load(k_ptrs) if EVEN_C else tl.load(k_ptrs, mask=c < H * D, other=0.0)
        new_acc = ()
        for t in tl.static_range(TILES):
            m = tl.minimum(t * BLOCK_M + rows, Nq - m_start - 1)[:, None]
            q_ptrs = q_ptr + m * stride_qn + c // D * stride_qh + c % D
            q = tl.load(q_ptrs) if EVEN_C else tl.load(q_ptrs, mask=c < H * D, other=0.0)
            new_acc += (tl.dot(q, tl.trans(k), acc[t], input_precision=PRECISION),)
        acc = new_acc
    for t in tl.static_range(TILES):
        _store_masks(
            acc[t], previous_ptr, masks_ptr, stride_pn, m_start + t * BLOCK_M, n_start, Nq, Nk, factor,
            BLOCK_M, BLOCK_N, ALIGN,
        )  # fmt: skip


@triton.jit
def _atm_fwd_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, previous_ptr, seed_ptr, o_ptr, masks_ptr, lse_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_pb, stride_pn,
    B, Nq, Nk, channels, split_keys, splits, scale_log2, mask_factor, threshold, keep_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    EVEN_N: tl.constexpr, ALIGN: tl.constexpr, NEED_MASKS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Plan ``fused``: attention programs, then mask programs, image by image.

    o (splits, B, Nq, H, D) and lse (splits, B, H, Nq): the results themselves where splits is 1.
    """
    blocks = tl.cdiv(Nq, TILES * BLOCK_M)
    attention_programs = H * splits * blocks
    programs = attention_programs
    if NEED_MASKS:
        programs += blocks * tl.cdiv(Nk, BLOCK_N)
    b = tl.program_id(0) // programs
    index = tl.program_id(0) % programs
    image = b.to(tl.int64)
    q_ptr += image * stride_qb
    k_ptr += image * stride_kb
    m_start = index % blocks * (TILES * BLOCK_M)
    if pad_ptr is not None:
        pad_ptr += image * Nk

    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    if index < attention_programs:
        split = index // blocks % splits
        h = index // blocks // splits
        n_begin = split * split_keys
        n_end = tl.minimum(n_begin + split_keys, Nk)
        q_ptr += h.to(tl.int64) * stride_qh
        k_ptr += h.to(tl.int64) * stride_kh
        v_ptr += image * stride_vb + h.to(tl.int64) * stride_vh
        o_ptr += (split.to(tl.int64) * B + image) * Nq * (H * D) + h * D
        lse_ptr += ((split.to(tl.int64) * B + image) * H + h) * Nq
        _attend(
            q_ptr, k_ptr, v_ptr, pad_ptr, o_ptr, lse_ptr, stride_qn, stride_kn, stride_vn,
            m_start, n_begin, n_end, Nq, Nk, scale_log2, seed, b * H + h, threshold, keep_scale,
            H, D, BLOCK_D, TILES, BLOCK_M, BLOCK_N, EVEN_N, DROPOUT, PRECISION, STAGES,
        )  # fmt: skip
    elif NEED_MASKS:
        n_start = (index - attention_programs) // blocks * BLOCK_N
        masks_ptr += image * Nq * (Nk // ALIGN * ALIGN)
        if previous_ptr is not None:
            previous_ptr += image * (stride_pb // ALIGN * ALIGN)
        _mask_tile(
            q_ptr, k_ptr, pad_ptr, previous_ptr, masks_ptr, stride_qn, stride_qh, stride_kn, stride_kh,
            stride_pn, m_start, n_start, Nq, Nk, channels, mask_factor,
            H, D, TILES, BLOCK_M, BLOCK_N, BLOCK_C, ALIGN, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit
def _atm_fwd_heads_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, previous_ptr, seed_ptr, o_ptr, masks_ptr, lse_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_pb, stride_pn,
    B, Nq, Nk, scale_log2, mask_factor, threshold, keep_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr, ALIGN: tl.constexpr, NEED_MASKS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Plan ``heads``: S of every head once; o and lse are partial, one per tile of keys."""
    blocks, tiles = tl.cdiv(Nq, BLOCK_M), tl.cdiv(Nk, BLOCK_N)
    index = tl.program_id(0)
    m_start = index % blocks * BLOCK_M
    tile = index // blocks % tiles
    b = index // blocks // tiles
    image, n_start = b.to(tl.int64), tile * BLOCK_N
    rows, cols, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_left, n_left = Nq - m_start, Nk - n_start
    q_ptr += image * stride_qb + tl.cast(m_start, tl.int64) * stride_qn
    k_ptr += image * stride_kb + tl.cast(n_start, tl.int64) * stride_kn
    v_ptr += image * stride_vb + tl.cast(n_start, tl.int64) * stride_vn
    o_ptr += ((tile.to(tl.int64) * B + image) * Nq + m_start) * (H * D)
    lse_ptr += (tile.to(tl.int64) * B + image) * H * Nq + m_start
    o_ptrs = o_ptr + rows[:, None] * (H * D) + d[None, :]
    valid = (rows[:, None] < m_left) & (d[None, :] < D)
    if pad_ptr is not None:
        pad_ptr += image * Nk + n_start

    DROPOUT: tl.constexpr = seed_ptr is not None
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for h in tl.range(0, H, num_stages=STAGES):
        q = _load(q_ptr, rows, m_left - 1, stride_qn, D, BLOCK_D)
        k = _load_tokens(k_ptr, pad_ptr, cols, n_left - 1, stride_kn, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        acc += s
        if not EVEN_N:
            s = tl.where(cols[None, :] < n_left, s, float("-inf"))
        if pad_ptr is not None:
            s = tl.where(_hidden(pad_ptr, 0, n_left, BLOCK_N)[None, :], float("-inf"), s)
        largest = tl.max(s, 1) * scale_log2
        if pad_ptr is not None:
            largest = tl.maximum(largest, -1e38)
        p = tl.exp2(s * scale_log2 - largest[:, None])
        total = tl.sum(p, 1)
        if DROPOUT:
            seed = tl.load(seed_ptr)
            keep = _keep(seed, b * H + h, tl.cdiv(Nk, 8), threshold, m_start, n_start, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        v = _load_tokens(v_ptr, pad_ptr, cols, n_left - 1, stride_vn, D, BLOCK_D)
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        o *= (keep_scale / _divisor(total, pad_ptr is not None))[:, None]
        tl.store(o_ptrs + h * D, o.to(o_ptr.dtype.element_ty), mask=valid)
        tl.store(lse_ptr + h * Nq + rows, (largest + tl.log2(total)) * 0.6931471805599453, mask=rows < m_left)
        q_ptr += tl.cast(stride_qh, tl.int64)
        k_ptr += tl.cast(stride_kh, tl.int64)
        v_ptr += tl.cast(stride_vh, tl.int64)
    if NEED_MASKS:
        masks_ptr += image * Nq * (Nk // ALIGN * ALIGN)
        if previous_ptr is not None:
            previous_ptr += image * (stride_pb // ALIGN * ALIGN)
        _store_masks(
            acc, previous_ptr, masks_ptr, stride_pn, m_start, n_start, Nq, Nk, mask_factor,
            BLOCK_M, BLOCK_N, ALIGN,
        )  # fmt: skip


@triton.jit
def _atm_combine_kernel(
    part_ptr, part_lse_ptr, o_ptr, lse_ptr, rows_total, Nq, splits,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Partial outputs (splits, B, Nq, H, D), weighted by their share of the softmax, to one output."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    image, m, h = row // (Nq * H), row // H % Nq, row % H
    lse_row = (image * H + h) * Nq + m
    valid = row < rows_total
    largest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for split in range(splits):
        lse = tl.load(part_lse_ptr + split * tl.cast(rows_total, tl.int64) + lse_row, mask=valid, other=0.0)
        largest = tl.maximum(largest, lse)
    largest = tl.maximum(largest, -1e38)  # where no part has seen a token
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    inside = valid[:, None] & (d[None, :] < D)
    for split in range(splits):
        first = split * tl.cast(rows_total, tl.int64)
        lse = tl.load(part_lse_ptr + first + lse_row, mask=valid, other=0.0)
        weight = tl.exp2((lse - largest) * 1.4426950408889634)
        total += weight
        part = tl.load(part_ptr + (first + row)[:, None] * D + d[None, :], mask=inside, other=0.0)
        acc += weight[:, None] * part
    acc /= _divisor(total, True)[:, None]
    tl.store(o_ptr + row[:, None] * D + d[None, :], acc.to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + lse_row, largest + tl.log2(total) * 0.6931471805599453, mask=valid)


@triton.jit
def _bwd_block(
    k, v, dk, dv, pad_ptr, q_ptr, do_ptr, o_ptr, dm_ptr, lse_ptr, dq_ptr, stride_qn, stride_gn, stride_mn,
    m_start, n_start, Nq, Nk, scale_log2, heads_inverse, seed, image_head, threshold, keep_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr, ALIGN: tl.constexpr, ATOMICS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one block of queries to dK and dV of one tile of keys, and give its part of dQ."""
    rows, cols, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_left, n_left = Nq - m_start, Nk - n_start
    m_long = tl.cast(m_start, tl.int64)
    q = _load(q_ptr + m_long * stride_qn, rows, m_left - 1, stride_qn, D, BLOCK_D)
    if dm_ptr is not None:
        stride = stride_mn // ALIGN * ALIGN  # tells the compiler what divides it
        valid = rows[:, None] < m_left
        if not EVEN_N:
            valid = valid & (cols[None, :] < Nk // ALIGN * ALIGN - n_start)
        dm_ptrs = dm_ptr + m_long * stride + n_start + rows[:, None] * stride + cols[None, :]
        dm = tl.load(dm_ptrs, mask=valid, other=0.0)
    ds = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # transposed like everything with keys first
    if do_ptr is not None:
        do = _load(do_ptr + m_long * stride_gn, rows, m_left - 1, stride_gn, D, BLOCK_D)
        o = _load(o_ptr + m_long * (H * D), rows, m_left - 1, H * D, D, BLOCK_D)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        # An infinite statistic makes the weights of repeated rows zero.
        lse = tl.load(lse_ptr + m_start + rows, mask=rows < m_left, other=float("inf"))
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        p = tl.exp2(s * scale_log2 - (lse * 1.4426950408889634)[None, :])
        if not EVEN_N:
            p = tl.where(cols[:, None] < n_left, p, 0.0)
        if pad_ptr is not None:
            p = tl.where(_hidden(pad_ptr, n_start, Nk, BLOCK_N)[:, None], 0.0, p)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        kept = p
        if DROPOUT:
            keep = tl.trans(
                _keep(seed, image_head, tl.cdiv(Nk, 8), threshold, m_start, n_start, BLOCK_M, BLOCK_N)
            )
            kept = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
    if dm_ptr is not None:
        ds += tl.trans(dm).to(tl.float32) * heads_inverse
        if pad_ptr is not None:
            ds = tl.where(_hidden(pad_ptr, n_start, Nk, BLOCK_N)[:, None], 0.0, ds)
    ds = ds.to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
    dq_ptrs = dq_ptr + m_long * (H * D) + rows[:, None] * (H * D) + d[None, :]
    valid = (rows[:, None] < m_left) & (d[None, :] < D)
    if ATOMICS:
        tl.atomic_add(dq_ptrs, dq, mask=valid, sem="relaxed")
    else:
        tl.store(dq_ptrs, dq, mask=valid)
    return dk, dv


@triton.jit
def _atm_bwd_kernel(
    do_ptr, dm_ptr, q_ptr, k_ptr, v_ptr, pad_ptr, o_ptr, lse_ptr, seed_ptr, dq_ptr, dk_ptr, dv_ptr,
    stride_gb, stride_gn, stride_gh, stride_mb, stride_mn,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    Nq, Nk, scale, scale_log2, heads_inverse, threshold, keep_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr, ALIGN: tl.constexpr, ATOMICS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq (B, parts, Nq, H, D) float32 without the factor ``scale``: a part per tile of keys, or one."""
    tiles = tl.cdiv(Nk, BLOCK_N)
    index = tl.program_id(0)
    h = index % H
    tile = index // H % tiles
    b = index // H // tiles
    n_start = tile * BLOCK_N
    image, head, n_long = b.to(tl.int64), h.to(tl.int64), tl.cast(n_start, tl.int64)
    q_ptr += image * stride_qb + head * stride_qh
    k_ptr += image * stride_kb + head * stride_kh + n_long * stride_kn
    v_ptr += image * stride_vb + head * stride_vh + n_long * stride_vn
    o_ptr += image * Nq * (H * D) + h * D
    lse_ptr += (image * H + h) * Nq
    if do_ptr is not None:
        do_ptr += image * stride_gb + head * stride_gh
    if dm_ptr is not None:
        dm_ptr += image * (stride_mb // ALIGN * ALIGN)
    if ATOMICS:
        dq_ptr += image * Nq * (H * D) + h * D
    else:
        dq_ptr += (image * tiles + tile) * Nq * (H * D) + h * D
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    cols, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    pads = pad_ptr
    if pad_ptr is not None:
        pad_ptr += image * Nk
        pads = pad_ptr + n_start
    k = _load_tokens(k_ptr, pads, cols, Nk - n_start - 1, stride_kn, D, BLOCK_D)
    v = _load_tokens(v_ptr, pads, cols, Nk - n_start - 1, stride_vn, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for m_start in tl.range(0, Nq, BLOCK_M, num_stages=STAGES):
        dk, dv = _bwd_block(
            k, v, dk, dv, pad_ptr, q_ptr, do_ptr, o_ptr, dm_ptr, lse_ptr, dq_ptr, stride_qn, stride_gn,
            stride_mn, m_start, n_start, Nq, Nk, scale_log2, heads_inverse, seed, b * H + h, threshold,
            keep_scale, H, D, BLOCK_D, BLOCK_M, BLOCK_N, EVEN_N, ALIGN, ATOMICS, DROPOUT, PRECISION,
        )  # fmt: skip
    offset = (image * Nk + n_start) * (H * D) + h * D
    ptrs = cols[:, None] * (H * D) + d[None, :]
    valid = (cols[:, None] < Nk - n_start) & (d[None, :] < D)
    tl.store(dk_ptr + offset + ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=valid)
    tl.store(dv_ptr + offset + ptrs, (dv * keep_scale).to(dv_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _atm_bwd_query_kernel(dq_ptr, out_ptr, size, parts, scale, BLOCK: tl.constexpr):
    """out (Bq, size) = scale · Σ over parts of dq (Bq, parts, size), in fixed order."""
    blocks = tl.cdiv(size, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    cols = tl.arange(0, BLOCK)
    valid = cols < size - start
    dq_ptr += b * parts * size + start
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        acc += tl.load(dq_ptr + cols, mask=valid, other=0.0)
        dq_ptr += tl.cast(size, tl.int64)
    tl.store(out_ptr + b * size + start + cols, (acc * scale).to(out_ptr.dtype.element_ty), mask=valid)


def _addressable(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where the 32-bit offsets inside a tile would not reach."""
    reach = max(256 * abs(s) for s in tensor.stride()[1:-1])
    if tensor.ndim == 4:
        reach = max(reach, tensor.shape[2] * abs(tensor.stride(2)))
    unit = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return tensor if unit and reach < 2**31 else tensor.contiguous()


def _strides(name: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    """Run-time strides by name; a batch of one is broadcast by stride 0."""
    if tensor is None:
        return {f"stride_{name}{axis}": 0 for axis in axes}
    strides = (0 if tensor.shape[0] == 1 else tensor.stride(0), *tensor.stride()[1:-1])
    return {f"stride_{name}{axis}": s for axis, s in zip(axes, strides, strict=True)}


def _pads(key_padding_mask: Tensor | None) -> Tensor | None:
    """The mask in one piece, as bytes."""
    return None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)


def _dropout(dropout_p: float, seed: Tensor | None) -> dict[str, Any]:
    threshold = min(round(dropout_p * 65536), 65535) if seed is not None else 0
    return {"seed_ptr": seed, "threshold": threshold, "keep_scale": 65536 / (65536 - threshold)}


def _fwd_launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    previous_masks: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    need_masks: bool,
    key_padding_mask: Tensor | None,
    config: dict[str, Any],
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """The outputs, still empty, and the launches that fill them."""
    (batch, keys), (_, queries, heads, dim) = key.shape[:2], query.shape
    output = query.new_empty(batch, queries, heads, dim)
    masks = query.new_empty((batch, queries, keys) if need_masks else (0,))
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    results = (output, masks, lse)
    if batch == 0:
        return results, []
    if scale <= 0:
        # The kernels take the row maximum before they scale.
        query, scale = (-query, -scale) if scale < 0 else (torch.zeros_like(query), 1.0)

    query, key, value = (_addressable(t) for t in (query, key, value))
    previous_masks = None if previous_masks is None else _addressable(previous_masks)
    block_m, block_n = config["block_m"], config["block_n"]
    fused = config["plan"] == "fused"
    blocks = cdiv(queries, block_m * (config["tiles"] if fused else 1))
    tiles = cdiv(keys, block_n)
    # Whole tiles per split, and no split without keys.
    tiles_per_split = cdiv(tiles, config["splits"]) if fused else 1
    splits = cdiv(tiles, tiles_per_split)
    partial, partial_lse = output, lse
    if splits > 1:
        partial = query.new_empty(splits, *output.shape, dtype=torch.float32)
        partial_lse = query.new_empty(splits, *lse.shape, dtype=torch.float32)

    arguments = {
        "q_ptr": query,
        "k_ptr": key,
        "v_ptr": value,
        "pad_ptr": _pads(key_padding_mask),
        "previous_ptr": previous_masks,
        "o_ptr": partial,
        "masks_ptr": masks if need_masks else None,
        "lse_ptr": partial_lse,
        **_strides("q", query, "bnh"),
        **_strides("k", key, "bnh"),
        **_strides("v", value, "bnh"),
        **_strides("p", previous_masks, "bn"),
        "B": batch,
        "Nq": queries,
        "Nk": keys,
        "scale_log2": scale * _LOG2E,
        "mask_factor": scale / heads,
        **_dropout(dropout_p, seed),
    }
    sizes = {"H": heads, "D": dim, "BLOCK_D": _padded(dim)}
    constants = {
        **sizes,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "EVEN_N": keys % block_n == 0,
        "ALIGN": math.gcd(16, keys, arguments["stride_pb"], arguments["stride_pn"]),
        "NEED_MASKS": need_masks,
        "PRECISION": "ieee" if query.dtype == torch.float32 else None,
        "STAGES": config["num_stages"],
    }
    options = {name: config[name] for name in ("num_warps", "num_stages", "maxnreg") if name in config}
    if fused:
        programs = batch * blocks * (heads * splits + (tiles if need_masks else 0))
        arguments |= {"channels": heads * dim, "split_keys": tiles_per_split * block_n, "splits": splits}
        constants |= {"TILES": config["tiles"], "BLOCK_C": config["block_c"]}
        launches = [Launch(_atm_fwd_kernel, programs, arguments, constants, options)]
    else:
        programs = batch * blocks * tiles
        launches = [Launch(_atm_fwd_heads_kernel, programs, arguments, constants, options)]
    if splits > 1:
        rows, block_r = batch * queries * heads, 32
        arguments = {
            "part_ptr": partial,
            "part_lse_ptr": partial_lse,
            "o_ptr": output,
            "lse_ptr": lse,
            "rows_total": rows,
            "Nq": queries,
            "splits": splits,
        }
        programs = cdiv(rows, block_r)
        options = {"num_warps": 4, "num_stages": 1}
        launches.append(
            Launch(_atm_combine_kernel, programs, arguments, {**sizes, "BLOCK_R": block_r}, options)
        )
    return results, launches


def _bwd_launches(
    grad_output: Tensor | None,
    grad_masks: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    key_padding_mask: Tensor | None,
    config: dict[str, Any],
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """The gradients, still empty, and the launches that fill them."""
    (batch, keys), (query_batch, queries, heads, dim) = key.shape[:2], query.shape
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    results = (grad_query, grad_key, grad_value)
    if batch == 0:
        return (grad_query.zero_(), grad_key, grad_value), []

    query, key, value = (_addressable(t) for t in (query, key, value))
    grad_output = None if grad_output is None else _addressable(grad_output)
    grad_masks = None if grad_masks is None else _addressable(grad_masks)
    block_n = config["block_n"]
    tiles = cdiv(keys, block_n)
    atomics = config["reduce"] == "atomics" and tiles > 1
    size = queries * heads * dim
    if atomics:
        partial = query.new_zeros(batch, 1, size, dtype=torch.float32)
    else:
        partial = query.new_empty(batch, tiles, size, dtype=torch.float32)

    arguments = {
        "do_ptr": grad_output,
        "dm_ptr": grad_masks,
        "q_ptr": query,
        "k_ptr": key,
        "v_ptr": value,
        "pad_ptr": _pads(key_padding_mask),
        "o_ptr": output.contiguous(),
        "lse_ptr": lse.contiguous(),
        "dq_ptr": partial,
        "dk_ptr": grad_key,
        "dv_ptr": grad_value,
        **_strides("g", grad_output, "bnh"),
        **_strides("m", grad_masks, "bn"),
        **_strides("q", query, "bnh"),
        **_strides("k", key, "bnh"),
        **_strides("v", value, "bnh"),
        "Nq": queries,
        "Nk": keys,
        "scale": scale,
        "scale_log2": scale * _LOG2E,
        "heads_inverse": 1 / heads,
        **_dropout(dropout_p, seed),
    }
    constants = {
        "H": heads,
        "D": dim,
        "BLOCK_D": _padded(dim),
        "BLOCK_M": config["block_m"],
        "BLOCK_N": block_n,
        "EVEN_N": keys % block_n == 0,
        "ALIGN": math.gcd(16, keys, arguments["stride_mb"], arguments["stride_mn"]),
        "ATOMICS": atomics,
        "PRECISION": "ieee" if query.dtype == torch.float32 else None,
        "STAGES": config["num_stages"],
    }
    options = {name: config[name] for name in ("num_warps", "num_stages", "maxnreg") if name in config}
    main = Launch(_atm_bwd_kernel, batch * heads * tiles, arguments, constants, options)
    # A query shared by the batch sums over images as over parts.
    block, parts = 1024, partial.shape[0] * partial.shape[1] // query_batch
    arguments = {"dq_ptr": partial, "out_ptr": grad_query, "size": size, "parts": parts, "scale": scale}
    programs = query_batch * cdiv(size, block)
    options = {"num_warps": 4, "num_stages": 1}
    finish = Launch(_atm_bwd_query_kernel, programs, arguments, {"BLOCK": block}, options)
    return results, [main, finish]


def _shape(query: Tensor, key: Tensor) -> tuple[int, int, int, int, int]:
    return key.shape[0], query.shape[1], key.shape[1], query.shape[2], query.shape[3]


@planned
def atm_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    previous_masks: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    need_masks: bool,
    key_padding_mask: Tensor | None = None,
    *,
    config: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Launcher of ``segvit::atm_fwd``; ``config`` replaces entries of :func:`_fwd_config`."""
    costly = seed is not None or key_padding_mask is not None
    found = _fwd_config(_shape(query, key), query.dtype, target(query.device), costly)
    arguments = (query, key, value, previous_masks, seed, scale, dropout_p, need_masks, key_padding_mask)
    return _fwd_launches(*arguments, {**found, **(config or {})})


@planned
def atm_bwd(
    grad_output: Tensor | None,
    grad_masks: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    deterministic: bool,
    key_padding_mask: Tensor | None = None,
    *,
    config: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Launcher of ``segvit::atm_bwd``; ``config`` replaces entries of :func:`_bwd_config`."""
    arch = target(query.device)
    costly = seed is not None or key_padding_mask is not None
    found = _bwd_config(_shape(query, key), query.dtype, arch, costly, deterministic)
    tensors = (grad_output, grad_masks, query, key, value, output, lse)
    arguments = (*tensors, seed, scale, dropout_p, key_padding_mask)
    return _bwd_launches(*arguments, {**found, **(config or {})})
