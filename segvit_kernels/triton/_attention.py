r"""What the attention operators share in Triton: steps of the softmax, and the whole backward.

Backward, two launches. A program per (image, head, block of queries, split of the keys) loops over the keys
and gives dQ and two statistics of every query. Then a program per (image, head, tile of keys) loops over the
queries and gives dK and dV; it forms S transposed, so that P and dS feed the products from registers. S and P
are formed in both. Only queries that images share, or whose keys are split, have partial sums, which a third
launch adds in fixed order: gradients are bitwise repeatable.

Gradients of masks, M = (scale / H) Σ_h Q_h K_hᵀ, are products of their own with operands from shared memory,
dQ += dM K / H and dK += dMᵀ Q / H: cheaper than to add them to dS, which has another layout. The second
kernel takes P and dS times H instead, which costs nothing.

Loops run over whole tiles; what is left is one more tile of its own, smaller size (16, 32, …), except in
float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton._launch import Launch, cdiv, next_power_of_2, pinned

LOG2E = math.log2(math.e)


def _padded(size: int) -> int:
    return max(16, next_power_of_2(size))


def _pinned(
    name: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, arch: str, costly: bool
) -> dict[str, int]:
    """An entry of the pinned parameters.

    Args:
        name: of the entry.
        shape: batch, queries, keys, heads, head dim.
        dtype: of the inputs.
        arch: what :func:`segvit_kernels.triton._launch.target` says of a device.
        costly: whether weights are dropped or tokens hidden.
    """
    kind = "single" if dtype == torch.float32 else "half"
    config = dict(pinned(arch)[name][kind][str(_padded(shape[-1]))])
    if costly or shape[-1] < _padded(shape[-1]) or shape[2] % 4:
        # Random numbers, and columns and rows that vector accesses cannot reach, need the registers.
        config.pop("maxnreg", None)
    return config


def _key_splits(keys: int, block_n: int, wanted: float, most: int = 8) -> int:
    """A number of splits near what is wanted, each with at least two tiles of keys."""
    return max(1, min(round(wanted), most, cdiv(keys, block_n) // 2))


def _filling(config: dict[str, int], side: str, programs: int, size: int, arch: str) -> dict[str, int]:
    """Half the tile and half the warps where ``programs`` (per tile of ``size``) would leave cores idle."""
    if config["num_warps"] == 8 and programs * cdiv(size, config[side]) < pinned(arch)["multiprocessors"]:
        config |= {side: config[side] // 2, "num_warps": 4}
    return config


def _bwd_config(
    operator: str,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    arch: str,
    costly: bool = False,
) -> dict[str, dict[str, int]]:
    """Launch parameters of the backward of ``operator``; other arguments as in :func:`_pinned`.

    Returns:
        For the programs of the tiles of keys (``key``) and those of the blocks of queries (``query``):
        ``block_m``, ``block_n``, ``num_warps``, ``num_stages``, perhaps ``maxnreg``, and for the latter
        ``splits`` of the keys.
    """
    batch, queries, keys, heads, _ = shape
    key, query = (_pinned(f"{operator}_bwd_{name}", shape, dtype, arch, costly) for name in ("key", "query"))
    if costly:
        query["block_n"] = max(16, query["block_n"] // 2)
        key["num_stages"] = min(2, key["num_stages"])
        if key["num_warps"] == 4:
            key["block_n"] = min(64, key["block_n"])
    _filling(key, "block_n", batch * heads, keys, arch)
    _filling(query, "block_m", batch * heads, queries, arch)
    tiles = cdiv(queries, query["block_m"])
    blocks = cdiv(tiles, 1 if costly else query.get("tiles", 1))
    query["tiles"] = cdiv(tiles, blocks)
    # Two programs per multiprocessor, if need be; a sum of their parts is one more launch.
    programs = max(1, batch * heads) * blocks
    query["splits"] = _key_splits(keys, query["block_n"], 2 * pinned(arch)["multiprocessors"] / programs)
    return {"key": key, "query": query}


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
    s, v, acc, largest, total, pad_ptr, m_start, n, Nk, scale_log2, seed, image_head, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys, its products ``s``, into the running softmax of one tile of queries.

    ``largest`` in units of log 2; ``total`` [BLOCK_M, 8], the sum over every eighth key: what a thread
    has of a row on NVIDIA, so that threads exchange sums once and not in every step.
    """
    if not EVEN_N:
        s = tl.where(n + tl.arange(0, BLOCK_N)[None, :] < Nk, s, float("-inf"))
    if pad_ptr is not None:
        s = tl.where(_hidden(pad_ptr, n, Nk, BLOCK_N)[None, :], float("-inf"), s)
    new = tl.maximum(largest, tl.max(s, 1) * scale_log2)
    if pad_ptr is not None:
        new = tl.maximum(new, -1e38)  # minus infinity less itself is not a number
    p = tl.exp2(s * scale_log2 - new[:, None])
    shrink = tl.exp2(largest - new)
    total = total * shrink[:, None] + tl.sum(tl.reshape(p, [BLOCK_M, BLOCK_N // 8, 8]), 1)
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
def _attention_combine_kernel(
    part_ptr, part_lse_ptr, o_ptr, lse_ptr, rows_total, Nq, splits,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Partial outputs (splits, B, Nq, H, D), weighted by their share of the softmax, to one output."""
    # Rows fit 32 bits, since their parts fit a GPU; division in 64 bits is a call, with registers spilled.
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    image, m, h = row // (Nq * H), row // H % Nq, row % H
    lse_row = (image * H + h) * Nq + m
    row = row.to(tl.int64)
    valid = row < rows_total
    inside = valid[:, None] & (d[None, :] < D)
    largest = tl.full([BLOCK_R], -1e38, tl.float32)  # where no part has seen a token
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    # Many parts in one step: a step is as long as a read of memory.
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S).to(tl.int64)
        there = (split < splits)[:, None] & valid[None, :]
        lse = part_lse_ptr + split[:, None] * rows_total + lse_row[None, :]
        lse = tl.load(lse, mask=there, other=float("-inf"))  # [BLOCK_S, BLOCK_R]
        new = tl.maximum(largest, tl.max(lse, 0))
        shrink = tl.exp2((largest - new) * 1.4426950408889634)
        weight = tl.exp2((lse - new[None, :]) * 1.4426950408889634)
        part = part_ptr + (split[:, None, None] * rows_total + row[None, :, None]) * D + d[None, None, :]
        part = tl.load(part, mask=there[:, :, None] & (d[None, None, :] < D), other=0.0)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink[:, None] + tl.sum(weight[:, :, None] * part, 0)
        largest = new
    acc /= _divisor(total, True)[:, None]
    tl.store(o_ptr + row[:, None] * D + d[None, :], acc.to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + lse_row, largest + tl.log2(total) * 0.6931471805599453, mask=valid)


@triton.jit
def _load_mask_gradient(
    ptr, pad_ptr, rows, cols, m_left, n_left, stride, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr
):
    """A tile of dM, zero past the ends and for tokens that are padding: [rows, cols]."""
    ptrs = ptr + rows[:, None] * stride + cols[None, :]
    if EVEN_M and EVEN_N and pad_ptr is None:
        return tl.load(ptrs)
    else:
        valid = cols < n_left
        if pad_ptr is not None:
            valid = valid & (tl.load(pad_ptr + cols, mask=valid, other=1) == 0)
        valid = (rows[:, None] < m_left) & valid[None, :]
        return tl.load(ptrs, mask=valid, other=0.0)


@triton.jit
def _query_step(
    q, do, lse, delta, dq, dq_masks, k_ptr, v_ptr, dm_ptr, pad_ptr, stride_kn, stride_vn, stride_mn,
    m_start, n, Nq, Nk, width, scale_log2, seed, image_head, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN: tl.constexpr, OUTPUT: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to dQ of TILES tiles of queries; ``lse`` in units of log 2."""
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    last = BLOCK_N - 1 if EVEN else Nk - n - 1
    pads = pad_ptr
    if pad_ptr is not None:
        pads += n
    k = _load_tokens(k_ptr, pads, cols, last, stride_kn, D, BLOCK_D)
    if OUTPUT:
        v = _load_tokens(v_ptr, pads, cols, last, stride_vn, D, BLOCK_D)
        s, dp = (), ()
        for t in tl.static_range(TILES):
            s += (tl.dot(q[t], tl.trans(k), input_precision=PRECISION),)  # [BLOCK_M, BLOCK_N]
        for t in tl.static_range(TILES):
            dp += (tl.dot(do[t], tl.trans(v), input_precision=PRECISION),)
        new_dq = ()
        for t in tl.static_range(TILES):
            p = tl.exp2(s[t] * scale_log2 - lse[t][:, None])
            if not EVEN:
                p = tl.where(n + cols[None, :] < Nk, p, 0.0)
            if pad_ptr is not None:
                p = tl.where(_hidden(pad_ptr, n, Nk, BLOCK_N)[None, :], 0.0, p)
            g = dp[t]
            if DROPOUT:
                m = m_start + t * BLOCK_M
                keep = _keep(seed, image_head, tl.cdiv(Nk, 8), threshold, m, n, BLOCK_M, BLOCK_N)
                g = tl.where(keep, g * keep_scale, 0.0)
            ds = p * (g - delta[t][:, None])
            new_dq += (tl.dot(ds.to(k.dtype), k, dq[t], input_precision=PRECISION),)
        dq = new_dq
    if dm_ptr is not None:
        new_masks = ()
        for t in tl.static_range(TILES):
            m = tl.minimum(t * BLOCK_M + rows, Nq - m_start - 1)  # rows past the end are not stored
            dm = _load_mask_gradient(dm_ptr, pads, m, cols, Nq, width - n, stride_mn, True, EVEN)
            new_masks += (tl.dot(dm, k, dq_masks[t], input_precision=PRECISION),)
        dq_masks = new_masks
    return dq, dq_masks


@triton.jit
def _attention_bwd_query_kernel(
    do_ptr, dm_ptr, q_ptr, k_ptr, v_ptr, pad_ptr, o_ptr, lse_ptr, seed_ptr, statistics_ptr, dq_ptr,
    stride_gb, stride_gn, stride_gh, stride_mb, stride_mn, stride_qb, stride_qn, stride_qh,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    Nq, Nk, split_keys, splits, factor, scale_log2, heads_inverse, threshold, keep_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, TAIL: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq (B, splits, Nq, H, D) times ``factor``; statistics (B, H, Nq, 2): lse in units of log 2, and δ.

    Where masks have a gradient P is to be H times as large, so that dM joins dS as it is.
    """
    blocks = tl.cdiv(Nq, TILES * BLOCK_M)
    index = tl.program_id(0)
    m_start = index % blocks * (TILES * BLOCK_M)
    split = index // blocks % splits
    h = index // blocks // splits % H
    b = index // blocks // splits // H
    n_begin = split * split_keys
    image, head, m_long, n_long = b.to(tl.int64), h.to(tl.int64), m_start.to(tl.int64), n_begin.to(tl.int64)
    q_ptr += image * stride_qb + head * stride_qh + m_long * stride_qn
    k_ptr += image * stride_kb + head * stride_kh + n_long * stride_kn
    v_ptr += image * stride_vb + head * stride_vh + n_long * stride_vn
    if pad_ptr is not None:
        pad_ptr += image * Nk
    width, stride_m = Nk // ALIGN * ALIGN, stride_mn // ALIGN * ALIGN  # tells the compiler what divides them
    if dm_ptr is not None:
        dm_ptr += image * (stride_mb // ALIGN * ALIGN) + m_long * stride_m + n_begin
    OUTPUT: tl.constexpr = do_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    rows, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_left = Nq - m_start
    dq, q, do, lse, delta = (), (), (), (), ()
    for _ in tl.static_range(TILES):
        dq += (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)
    dq_masks = dq
    if OUTPUT:
        do_ptr += image * stride_gb + head * stride_gh + m_long * stride_gn
        o_ptr += (image * Nq + m_start) * (H * D) + h * D
        for t in tl.static_range(TILES):
            m = t * BLOCK_M + rows
            g = _load(do_ptr, m, m_left - 1, stride_gn, D, BLOCK_D)
            o = _load(o_ptr, m, m_left - 1, H * D, D, BLOCK_D)
            row = (image * H + h) * Nq + m_start + m
            q += (_load(q_ptr, m, m_left - 1, stride_qn, D, BLOCK_D),)
            do += (g,)
            delta += (tl.sum(g.to(tl.float32) * o.to(tl.float32), 1),)
            lse += (tl.load(lse_ptr + row, mask=m < m_left, other=0.0) * 1.4426950408889634,)
            if split == 0:
                weighted = lse[t]
                if dm_ptr is not None:
                    weighted += tl.log2(heads_inverse)
                tl.store(statistics_ptr + 2 * row, weighted, mask=m < m_left)
                tl.store(statistics_ptr + 2 * row + 1, delta[t], mask=m < m_left)
    whole = Nk // BLOCK_N * BLOCK_N if TAIL > 0 else Nk
    for n in tl.range(n_begin, tl.minimum(n_begin + split_keys, whole), BLOCK_N, num_stages=STAGES):
        dq, dq_masks = _query_step(
            q, do, lse, delta, dq, dq_masks, k_ptr, v_ptr, dm_ptr, pad_ptr, stride_kn, stride_vn, stride_m,
            m_start, n, Nq, Nk, width, scale_log2, seed, b * H + h, threshold, keep_scale,
            D, BLOCK_D, TILES, BLOCK_M, BLOCK_N, TAIL > 0 or EVEN, OUTPUT, DROPOUT, PRECISION,
        )  # fmt: skip
        k_ptr += tl.cast(BLOCK_N, tl.int64) * stride_kn
        v_ptr += tl.cast(BLOCK_N, tl.int64) * stride_vn
        if dm_ptr is not None:
            dm_ptr += BLOCK_N
    if TAIL > 0:  # noqa: SIM102 (decided by the compiler, the inner one by the program)
        if split == splits - 1:
            dq, dq_masks = _query_step(
                q, do, lse, delta, dq, dq_masks, k_ptr, v_ptr, dm_ptr, pad_ptr, stride_kn, stride_vn,
                stride_m, m_start, whole, Nq, Nk, width, scale_log2, seed, b * H + h, threshold, keep_scale,
                D, BLOCK_D, TILES, BLOCK_M, TAIL, EVEN, OUTPUT, DROPOUT, PRECISION,
            )  # fmt: skip
    dq_ptr += ((image * splits + split) * Nq + m_start) * (H * D) + h * D
    for t in tl.static_range(TILES):
        result = dq[t]
        if dm_ptr is not None:
            result += dq_masks[t] * heads_inverse
        m = t * BLOCK_M + rows
        valid = (m[:, None] < m_left) & (d[None, :] < D)
        dq_ptrs = dq_ptr + m[:, None] * (H * D) + d[None, :]
        tl.store(dq_ptrs, (result * factor).to(dq_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _key_step(
    k, v, dk, dv, q_ptr, do_ptr, dm_ptr, statistics_ptr, stride_qn, stride_gn, stride_mn,
    m_start, n_start, Nq, Nk, width, scale_log2, seed, image_head, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, EVEN_N: tl.constexpr, OUTPUT: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one block of queries to dK and dV of one tile of keys."""
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    last = BLOCK_M - 1 if EVEN else Nq - m_start - 1
    q = _load(q_ptr, rows, last, stride_qn, D, BLOCK_D)
    if OUTPUT:
        do = _load(do_ptr, rows, last, stride_gn, D, BLOCK_D)
        # Side by side, so that a thread reads both with one instruction.
        pairs = statistics_ptr + 2 * (m_start + rows)[:, None] + tl.arange(0, 2)[None, :]
        if EVEN:
            lse, delta = tl.split(tl.load(pairs))
        else:
            # An infinite statistic makes the weights of repeated rows zero.
            lse, delta = tl.split(tl.load(pairs, mask=(rows <= last)[:, None], other=0.0))
            lse = tl.where(rows <= last, lse, float("inf"))
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]: P feeds dV as it is
        p = tl.exp2(s * scale_log2 - lse[None, :])
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
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    if dm_ptr is not None:
        dm_ptr += tl.cast(m_start, tl.int64) * stride_mn
        dm = _load_mask_gradient(
            dm_ptr, None, rows, cols, Nq - m_start, width - n_start, stride_mn, EVEN, EVEN_N
        )
        dk = tl.dot(tl.trans(dm), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _attention_bwd_key_kernel(
    do_ptr, dm_ptr, q_ptr, k_ptr, v_ptr, pad_ptr, statistics_ptr, seed_ptr, dk_ptr, dv_ptr,
    stride_gb, stride_gn, stride_gh, stride_mb, stride_mn, stride_qb, stride_qn, stride_qh,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    Nq, Nk, key_factor, value_factor, scale_log2, threshold, keep_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, EVEN: tl.constexpr, EVEN_N: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk times ``key_factor`` and dv times ``value_factor`` (B, Nk, H, D)."""
    tiles = tl.cdiv(Nk, BLOCK_N)
    index = tl.program_id(0)
    n_start = index % tiles * BLOCK_N
    h = index // tiles % H
    b = index // tiles // H
    image, head, n_long = b.to(tl.int64), h.to(tl.int64), n_start.to(tl.int64)
    q_ptr += image * stride_qb + head * stride_qh
    k_ptr += image * stride_kb + head * stride_kh + n_long * stride_kn
    v_ptr += image * stride_vb + head * stride_vh + n_long * stride_vn
    statistics_ptr += 2 * (image * H + h) * Nq
    width, stride_m = Nk // ALIGN * ALIGN, stride_mn // ALIGN * ALIGN  # tells the compiler what divides them
    if dm_ptr is not None:
        dm_ptr += image * (stride_mb // ALIGN * ALIGN) + n_start
    OUTPUT: tl.constexpr = do_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    cols, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    pads = pad_ptr
    if pad_ptr is not None:
        pads += image * Nk + n_start
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    k, v = dk, dv
    if OUTPUT:
        do_ptr += image * stride_gb + head * stride_gh
        k = _load_tokens(k_ptr, pads, cols, Nk - n_start - 1, stride_kn, D, BLOCK_D)
        v = _load_tokens(v_ptr, pads, cols, Nk - n_start - 1, stride_vn, D, BLOCK_D)
    whole = Nq // BLOCK_M * BLOCK_M if TAIL > 0 else Nq
    for m_start in tl.range(0, whole, BLOCK_M, num_stages=STAGES):
        dk, dv = _key_step(
            k, v, dk, dv, q_ptr, do_ptr, dm_ptr, statistics_ptr, stride_qn, stride_gn, stride_m,
            m_start, n_start, Nq, Nk, width, scale_log2, seed, b * H + h, threshold, keep_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, TAIL > 0 or EVEN, EVEN_N, OUTPUT, DROPOUT, PRECISION,
        )  # fmt: skip
        q_ptr += tl.cast(BLOCK_M, tl.int64) * stride_qn
        if OUTPUT:
            do_ptr += tl.cast(BLOCK_M, tl.int64) * stride_gn
    if TAIL > 0:
        dk, dv = _key_step(
            k, v, dk, dv, q_ptr, do_ptr, dm_ptr, statistics_ptr, stride_qn, stride_gn, stride_m,
            whole, n_start, Nq, Nk, width, scale_log2, seed, b * H + h, threshold, keep_scale,
            D, BLOCK_D, TAIL, BLOCK_N, EVEN, EVEN_N, OUTPUT, DROPOUT, PRECISION,
        )  # fmt: skip
    if pad_ptr is not None:
        # What stands in the rows of padding is of no query.
        seen = tl.load(pads + cols, mask=cols < Nk - n_start, other=1) == 0
        dk, dv = tl.where(seen[:, None], dk, 0.0), tl.where(seen[:, None], dv, 0.0)
    offset = (image * Nk + n_start) * (H * D) + h * D
    ptrs = cols[:, None] * (H * D) + d[None, :]
    valid = (cols[:, None] < Nk - n_start) & (d[None, :] < D)
    tl.store(dk_ptr + offset + ptrs, (dk * key_factor).to(dk_ptr.dtype.element_ty), mask=valid)
    tl.store(dv_ptr + offset + ptrs, (dv * value_factor).to(dv_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _attention_bwd_sum_kernel(
    dq_ptr, out_ptr, size, parts, scale, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr
):
    """out (Bq, size) = scale · Σ over parts of dq (Bq, parts, size), in fixed order."""
    blocks = tl.cdiv(size, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    cols, rows = tl.arange(0, BLOCK), tl.arange(0, BLOCK_P)
    valid = cols < size - start
    dq_ptr += b * parts * size + start
    acc = tl.zeros([BLOCK], tl.float32)
    for part in range(0, parts, BLOCK_P):
        there = (rows < parts - part)[:, None] & valid[None, :]
        acc += tl.sum(
            tl.load(dq_ptr + rows.to(tl.int64)[:, None] * size + cols[None, :], mask=there, other=0.0), 0
        )
        dq_ptr += tl.cast(BLOCK_P, tl.int64) * size
    tl.store(out_ptr + b * size + start + cols, (acc * scale).to(out_ptr.dtype.element_ty), mask=valid)


def _positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries and a scale above 0 with the same scores: kernels take the row maximum before they scale."""
    if scale < 0:
        return -query, -scale
    return (query * 0.0, 1.0) if scale == 0 else (query, scale)  # what is not a number stays so


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


def _shape(query: Tensor, key: Tensor) -> tuple[int, int, int, int, int]:
    return key.shape[0], query.shape[1], key.shape[1], query.shape[2], query.shape[3]


def _tail(size: int, block: int, dtype: torch.dtype) -> dict[str, Any]:
    """The size of one more tile for what whole tiles leave, and whether the last tile of all is full.

    Size 0: nothing is left, or the loop covers it. Without tensor cores operands lie in registers, of which
    one more tile would need too many.
    """
    rest = size % block
    tail = _padded(rest) if rest and dtype != torch.float32 else 0
    return {"TAIL": tail, "EVEN": rest == tail}


def _tiles(config: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and compiler options of a kernel with these launch parameters."""
    constants = {
        "BLOCK_M": config["block_m"],
        "BLOCK_N": config["block_n"],
        "PRECISION": "ieee" if dtype == torch.float32 else None,
        "STAGES": config["num_stages"],
    }
    return constants, {
        name: config[name] for name in ("num_warps", "num_stages", "maxnreg") if name in config
    }


def _combination(partial: Tensor, partial_lse: Tensor, output: Tensor, lse: Tensor, splits: int) -> Launch:
    """Partial outputs (splits, B, Nq, H, D) and statistics (splits, B, H, Nq) to ``output`` and ``lse``."""
    batch, queries, heads, dim = output.shape
    rows, block_r = batch * queries * heads, 256 // _padded(dim)
    arguments = {
        "part_ptr": partial,
        "part_lse_ptr": partial_lse,
        "o_ptr": output,
        "lse_ptr": lse,
        "rows_total": rows,
        "Nq": queries,
        "splits": splits,
    }
    constants = {"H": heads, "D": dim, "BLOCK_D": _padded(dim), "BLOCK_R": block_r, "BLOCK_S": 16}
    return Launch(
        _attention_combine_kernel,
        cdiv(rows, block_r),
        arguments,
        constants,
        {"num_warps": 4, "num_stages": 1},
    )


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
    config: dict[str, dict[str, int]],
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
    # Whole tiles per split, and no split without keys.
    tiles = cdiv(keys, config["query"]["block_n"])
    tiles_per_split = cdiv(tiles, config["query"]["splits"])
    splits = cdiv(tiles, tiles_per_split)
    parts = splits * batch // query_batch
    size = queries * heads * dim
    partial = grad_query if parts == 1 else query.new_empty(batch * splits, size, dtype=torch.float32)
    statistics = lse.new_empty(*lse.shape, 2)
    common = {
        "do_ptr": grad_output,
        "dm_ptr": grad_masks,
        "q_ptr": query,
        "k_ptr": key,
        "v_ptr": value,
        "pad_ptr": _pads(key_padding_mask),
        "statistics_ptr": statistics,
        **_strides("g", grad_output, "bnh"),
        **_strides("m", grad_masks, "bn"),
        **_strides("q", query, "bnh"),
        **_strides("k", key, "bnh"),
        **_strides("v", value, "bnh"),
        "Nq": queries,
        "Nk": keys,
        "scale_log2": scale * LOG2E,
        **_dropout(dropout_p, seed),
    }
    sizes = {
        "H": heads,
        "D": dim,
        "BLOCK_D": _padded(dim),
        "ALIGN": math.gcd(16, keys, common["stride_mb"], common["stride_mn"]),
    }

    constants, options = _tiles(config["query"], query.dtype)
    constants |= {
        **sizes,
        **_tail(keys, constants["BLOCK_N"], query.dtype),
        "TILES": config["query"]["tiles"],
    }
    arguments = {
        **common,
        "o_ptr": output.contiguous(),
        "lse_ptr": lse.contiguous(),
        "dq_ptr": partial,
        "split_keys": tiles_per_split * constants["BLOCK_N"],
        "splits": splits,
        "factor": scale if parts == 1 else 1.0,
        "heads_inverse": 1 / heads,
    }
    programs = batch * heads * splits * cdiv(queries, constants["TILES"] * constants["BLOCK_M"])
    launches = [Launch(_attention_bwd_query_kernel, programs, arguments, constants, options)]

    constants, options = _tiles(config["key"], query.dtype)
    block_n = constants["BLOCK_N"]
    constants |= {**sizes, **_tail(queries, constants["BLOCK_M"], query.dtype), "EVEN_N": keys % block_n == 0}
    weighted = 1 if grad_masks is None else 1 / heads
    arguments = {
        **common,
        "dk_ptr": grad_key,
        "dv_ptr": grad_value,
        "key_factor": scale * weighted,
        "value_factor": common["keep_scale"] * weighted,
    }
    programs = batch * heads * cdiv(keys, block_n)
    launches.append(Launch(_attention_bwd_key_kernel, programs, arguments, constants, options))

    if parts > 1:
        block, block_p = 512, 8  # a thread adds all parts of its elements
        arguments = {"dq_ptr": partial, "out_ptr": grad_query, "size": size, "parts": parts, "scale": scale}
        programs, options = query_batch * cdiv(size, block), {"num_warps": 4, "num_stages": 1}
        constants = {"BLOCK": block, "BLOCK_P": block_p}
        launches.append(Launch(_attention_bwd_sum_kernel, programs, arguments, constants, options))
    return results, launches
