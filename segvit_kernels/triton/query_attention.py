r"""Query attention on a GPU: how :mod:`segvit_kernels.ops.query_attention` runs in Triton.

Forward: one program per (image, head, block of queries, split of the keys) with an online softmax. A block
has 128 queries, so that K and V pass the L2 cache seldom enough. Where programs do not fill the chip the keys
are split and a second launch combines the partial outputs.

Backward, plan ``atomics`` (the default): S, P and dS once. A small launch gives δ and zeroes dQ; then a
program per (image, head, tile of keys) holds dK and dV, loops over the queries and adds its part of dQ to
float32 by atomics; a last launch scales and rounds dQ and sums it over images that share their queries.

Backward, plan ``repeatable``: S, P and dS twice, nothing added in an order that may change. A program per
(image, head, block of queries) gives dQ and δ; then the programs of the tiles of keys give dK and dV alone.

All loops run over whole tiles; what is left is one more tile of its own, smaller size (16, 32, …), so that
400 keys cost 400 exponentials a row and only a ragged last tile is masked.

Bytes moved, the floor and the choice between the plans: docs/kernels.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton._launch import Launch, cdiv, pinned, target
from segvit_kernels.triton._plan import planned
from segvit_kernels.triton.atm import (
    _addressable,
    _atm_bwd_query_kernel,
    _atm_combine_kernel,
    _divisor,
    _dropout,
    _hidden,
    _keep,
    _load,
    _load_tokens,
    _padded,
    _pads,
    _softmax_step,
    _strides,
)

_LOG2E = math.log2(math.e)
_MAX_SPLITS = 8


def _pinned(name: str, head_dim: int, dtype: torch.dtype, arch: str, dropout: bool) -> dict[str, int]:
    kind = "single" if dtype == torch.float32 else "half"
    config = dict(pinned(arch)[f"query_attention_{name}"][kind][str(_padded(head_dim))])
    if dropout or head_dim < _padded(head_dim):
        # Random numbers, and masks of columns that are not there, need the registers.
        config.pop("maxnreg", None)
    if dropout and name != "bwd_key":
        config["block_n"] = max(16, config["block_n"] // 2)
    return config


def _filling(config: dict[str, int], side: str, programs: int, size: int, arch: str) -> dict[str, int]:
    """Half the tile and half the warps where ``programs`` (per tile of ``size``) would leave cores idle."""
    if config["num_warps"] == 8 and programs * cdiv(size, config[side]) < pinned(arch)["multiprocessors"]:
        config |= {side: config[side] // 2, "num_warps": 4}
    return config


def _fwd_config(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, arch: str, dropout: bool = False
) -> dict[str, int]:
    """Launch parameters of the forward.

    Args:
        shape: batch, queries, keys, heads, head dim.
        dtype: of the inputs.
        arch: what :func:`segvit_kernels.triton._launch.target` says of a device.
        dropout: whether attention weights are dropped or tokens hidden, which costs registers.

    Returns:
        ``block_m`` queries, ``block_n`` keys, ``splits`` of the keys, ``num_warps``, ``num_stages``.
    """
    batch, queries, keys, heads, head_dim = shape
    config = _pinned("fwd", head_dim, dtype, arch, dropout)
    # As near as can be to eight warps per multiprocessor, each program with at least two tiles of keys.
    programs = max(1, batch * heads) * cdiv(queries, config["block_m"])
    splits = round(8 / config["num_warps"] * pinned(arch)["multiprocessors"] / programs)
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
        ``plan``, ``atomics`` or ``repeatable``, and for the programs of the tiles of keys (``key``) and those
        of the blocks of queries (``query``): ``block_m``, ``block_n``, ``num_warps``, ``num_stages``.
    """
    batch, queries, keys, heads, head_dim = shape
    key = _pinned("bwd_key", head_dim, dtype, arch, dropout)
    query = _pinned("bwd_query", head_dim, dtype, arch, dropout)
    return {
        "plan": "repeatable" if deterministic else "atomics",
        "key": _filling(key, "block_n", batch * heads, keys, arch),
        "query": _filling(query, "block_m", batch * heads, queries, arch),
    }


@triton.jit
def _query_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, pad_ptr, seed_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    B, Nq, Nk, split_keys, splits, scale_log2, threshold, keep_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """o (splits, B, Nq, H, D) and lse (splits, B, H, Nq): the results themselves where splits is 1."""
    blocks = tl.cdiv(Nq, BLOCK_M)
    index = tl.program_id(0)
    m_start = index % blocks * BLOCK_M
    split = index // blocks % splits
    h = index // blocks // splits % H
    b = index // blocks // splits // H
    n_begin = split * split_keys
    image, head = b.to(tl.int64), h.to(tl.int64)
    q_ptr += image * stride_qb + head * stride_qh + tl.cast(m_start, tl.int64) * stride_qn
    k_ptr += image * stride_kb + head * stride_kh + tl.cast(n_begin, tl.int64) * stride_kn
    v_ptr += image * stride_vb + head * stride_vh + tl.cast(n_begin, tl.int64) * stride_vn
    if pad_ptr is not None:
        pad_ptr += image * Nk
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    rows, cols, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_left = Nq - m_start
    q = _load(q_ptr, rows, m_left - 1, stride_qn, D, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    whole = Nk // BLOCK_N * BLOCK_N
    for n in tl.range(n_begin, tl.minimum(n_begin + split_keys, whole), BLOCK_N, num_stages=STAGES):
        pads = pad_ptr
        if pad_ptr is not None:
            pads += n
        k = _load_tokens(k_ptr, pads, cols, BLOCK_N - 1, stride_kn, D, BLOCK_D)
        v = _load_tokens(v_ptr, pads, cols, BLOCK_N - 1, stride_vn, D, BLOCK_D)
        acc, largest, total = _softmax_step(
            q, k, v, acc, largest, total, pad_ptr, m_start, n, Nk, scale_log2, seed, b * H + h, threshold,
            BLOCK_M, BLOCK_N, True, DROPOUT, PRECISION,
        )  # fmt: skip
        k_ptr += tl.cast(BLOCK_N, tl.int64) * stride_kn
        v_ptr += tl.cast(BLOCK_N, tl.int64) * stride_vn
    if TAIL > 0:  # noqa: SIM102 (decided by the compiler, the inner one by the program)
        if split == splits - 1:
            pads = pad_ptr
            if pad_ptr is not None:
                pads += whole
            k = _load_tokens(k_ptr, pads, tl.arange(0, TAIL), Nk - whole - 1, stride_kn, D, BLOCK_D)
            v = _load_tokens(v_ptr, pads, tl.arange(0, TAIL), Nk - whole - 1, stride_vn, D, BLOCK_D)
            acc, largest, total = _softmax_step(
                q, k, v, acc, largest, total, pad_ptr, m_start, whole, Nk, scale_log2, seed, b * H + h,
                threshold, BLOCK_M, TAIL, EVEN, DROPOUT, PRECISION,
            )  # fmt: skip
    part = split.to(tl.int64) * B + image
    o_ptr += (part * Nq + m_start) * (H * D) + h * D
    lse_ptr += (part * H + h) * Nq + m_start
    valid = (rows[:, None] < m_left) & (d[None, :] < D)
    o = acc * (keep_scale / _divisor(total, pad_ptr is not None))[:, None]
    tl.store(o_ptr + rows[:, None] * (H * D) + d[None, :], o.to(o_ptr.dtype.element_ty), mask=valid)
    tl.store(lse_ptr + rows, (largest + tl.log2(total)) * 0.6931471805599453, mask=rows < m_left)


@triton.jit
def _query_step(
    q, do, lse, delta, dq, k_ptr, v_ptr, pad_ptr, stride_kn, stride_vn,
    m_start, n, Nk, scale_log2, seed, image_head, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to dQ of one block of queries; ``lse`` in units of log 2."""
    cols = tl.arange(0, BLOCK_N)
    last = BLOCK_N - 1 if EVEN else Nk - n - 1
    pads = pad_ptr
    if pad_ptr is not None:
        pads += n
    k = _load_tokens(k_ptr, pads, cols, last, stride_kn, D, BLOCK_D)
    v = _load_tokens(v_ptr, pads, cols, last, stride_vn, D, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    p = tl.exp2(s * scale_log2 - lse[:, None])
    if not EVEN:
        p = tl.where(n + cols[None, :] < Nk, p, 0.0)
    if pad_ptr is not None:
        p = tl.where(_hidden(pad_ptr, n, Nk, BLOCK_N)[None, :], 0.0, p)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        keep = _keep(seed, image_head, tl.cdiv(Nk, 8), threshold, m_start, n, BLOCK_M, BLOCK_N)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _query_attention_bwd_query_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, pad_ptr, o_ptr, lse_ptr, seed_ptr, delta_ptr, dq_ptr,
    stride_gb, stride_gn, stride_gh, stride_qb, stride_qn, stride_qh,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    Nq, Nk, factor, scale_log2, threshold, keep_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq (B, Nq, H, D) times ``factor``, and delta (B, H, Nq)."""
    blocks = tl.cdiv(Nq, BLOCK_M)
    index = tl.program_id(0)
    m_start = index % blocks * BLOCK_M
    h = index // blocks % H
    b = index // blocks // H
    image, head, m_long = b.to(tl.int64), h.to(tl.int64), tl.cast(m_start, tl.int64)
    q_ptr += image * stride_qb + head * stride_qh + m_long * stride_qn
    do_ptr += image * stride_gb + head * stride_gh + m_long * stride_gn
    k_ptr += image * stride_kb + head * stride_kh
    v_ptr += image * stride_vb + head * stride_vh
    if pad_ptr is not None:
        pad_ptr += image * Nk
    offset, statistics = (image * Nq + m_start) * (H * D) + h * D, (image * H + h) * Nq + m_start
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    rows, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_left = Nq - m_start
    q = _load(q_ptr, rows, m_left - 1, stride_qn, D, BLOCK_D)
    do = _load(do_ptr, rows, m_left - 1, stride_gn, D, BLOCK_D)
    o = _load(o_ptr + offset, rows, m_left - 1, H * D, D, BLOCK_D)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    lse = tl.load(lse_ptr + statistics + rows, mask=rows < m_left, other=0.0) * 1.4426950408889634
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole = Nk // BLOCK_N * BLOCK_N
    for n in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
        dq = _query_step(
            q, do, lse, delta, dq, k_ptr, v_ptr, pad_ptr, stride_kn, stride_vn,
            m_start, n, Nk, scale_log2, seed, b * H + h, threshold, keep_scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, True, DROPOUT, PRECISION,
        )  # fmt: skip
        k_ptr += tl.cast(BLOCK_N, tl.int64) * stride_kn
        v_ptr += tl.cast(BLOCK_N, tl.int64) * stride_vn
    if TAIL > 0:
        dq = _query_step(
            q, do, lse, delta, dq, k_ptr, v_ptr, pad_ptr, stride_kn, stride_vn,
            m_start, whole, Nk, scale_log2, seed, b * H + h, threshold, keep_scale,
            D, BLOCK_D, BLOCK_M, TAIL, EVEN, DROPOUT, PRECISION,
        )  # fmt: skip
    tl.store(delta_ptr + statistics + rows, delta, mask=rows < m_left)
    valid = (rows[:, None] < m_left) & (d[None, :] < D)
    dq_ptrs = dq_ptr + offset + rows[:, None] * (H * D) + d[None, :]
    tl.store(dq_ptrs, (dq * factor).to(dq_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _key_step(
    k, v, dk, dv, pad_ptr, q_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, stride_qn, stride_gn,
    m_start, n_start, Nq, Nk, scale_log2, seed, image_head, threshold, keep_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, EVEN_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one block of queries to dK and dV of one tile of keys and, with ``dq_ptr``, its part to dQ."""
    rows, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_left = Nq - m_start
    last = BLOCK_M - 1 if EVEN else m_left - 1
    q = _load(q_ptr, rows, last, stride_qn, D, BLOCK_D)
    do = _load(do_ptr, rows, last, stride_gn, D, BLOCK_D)
    if EVEN:
        lse = tl.load(lse_ptr + m_start + rows)
        delta = tl.load(delta_ptr + m_start + rows)
    else:
        # An infinite statistic makes the weights of repeated rows zero.
        lse = tl.load(lse_ptr + m_start + rows, mask=rows < m_left, other=float("inf"))
        delta = tl.load(delta_ptr + m_start + rows, mask=rows < m_left, other=0.0)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M], so that P feeds dV as it is
    p = tl.exp2(s * scale_log2 - (lse * 1.4426950408889634)[None, :])
    if dq_ptr is not None and not EVEN_N:
        p = tl.where(tl.arange(0, BLOCK_N)[:, None] < Nk - n_start, p, 0.0)
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
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    if dq_ptr is not None:
        dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
        dq_ptrs = dq_ptr + tl.cast(m_start, tl.int64) * (H * D) + rows[:, None] * (H * D) + d[None, :]
        tl.atomic_add(dq_ptrs, dq, mask=(rows[:, None] < m_left) & (d[None, :] < D), sem="relaxed")
    return dk, dv


@triton.jit
def _query_attention_bwd_key_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, pad_ptr, lse_ptr, delta_ptr, seed_ptr, dq_ptr, dk_ptr, dv_ptr,
    stride_gb, stride_gn, stride_gh, stride_qb, stride_qn, stride_qh,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    Nq, Nk, scale, scale_log2, threshold, keep_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, EVEN: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv; dq (B, Nq, H, D) float32, if not None, gets its sum without the factor ``scale``."""
    tiles = tl.cdiv(Nk, BLOCK_N)
    index = tl.program_id(0)
    n_start = index % tiles * BLOCK_N
    h = index // tiles % H
    b = index // tiles // H
    image, head, n_long = b.to(tl.int64), h.to(tl.int64), tl.cast(n_start, tl.int64)
    q_ptr += image * stride_qb + head * stride_qh
    do_ptr += image * stride_gb + head * stride_gh
    k_ptr += image * stride_kb + head * stride_kh + n_long * stride_kn
    v_ptr += image * stride_vb + head * stride_vh + n_long * stride_vn
    lse_ptr += (image * H + h) * Nq
    delta_ptr += (image * H + h) * Nq
    if dq_ptr is not None:
        dq_ptr += image * Nq * (H * D) + h * D
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
    whole = Nq // BLOCK_M * BLOCK_M
    for m_start in tl.range(0, whole, BLOCK_M, num_stages=STAGES):
        dk, dv = _key_step(
            k, v, dk, dv, pad_ptr, q_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, stride_qn, stride_gn,
            m_start, n_start, Nq, Nk, scale_log2, seed, b * H + h, threshold, keep_scale,
            H, D, BLOCK_D, BLOCK_M, BLOCK_N, True, EVEN_N, DROPOUT, PRECISION,
        )  # fmt: skip
        q_ptr += tl.cast(BLOCK_M, tl.int64) * stride_qn
        do_ptr += tl.cast(BLOCK_M, tl.int64) * stride_gn
    if TAIL > 0:
        dk, dv = _key_step(
            k, v, dk, dv, pad_ptr, q_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, stride_qn, stride_gn,
            whole, n_start, Nq, Nk, scale_log2, seed, b * H + h, threshold, keep_scale,
            H, D, BLOCK_D, TAIL, BLOCK_N, EVEN, EVEN_N, DROPOUT, PRECISION,
        )  # fmt: skip
    offset = (image * Nk + n_start) * (H * D) + h * D
    ptrs = cols[:, None] * (H * D) + d[None, :]
    valid = (cols[:, None] < Nk - n_start) & (d[None, :] < D)
    tl.store(dk_ptr + offset + ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=valid)
    tl.store(dv_ptr + offset + ptrs, (dv * keep_scale).to(dv_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _query_attention_bwd_start_kernel(
    do_ptr, o_ptr, delta_ptr, dq_ptr, stride_gb, stride_gn, stride_gh, rows_total, Nq,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """delta (B, H, Nq), and zeros for dq (B, Nq, H, D)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    image, m, h = row // (Nq * H), row // H % Nq, row % H
    valid = row < rows_total
    inside = valid[:, None] & (d[None, :] < D)
    do_rows = image * stride_gb + m * stride_gn + h * stride_gh
    do = tl.load(do_ptr + do_rows[:, None] + d[None, :], mask=inside, other=0.0)
    o = tl.load(o_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + (image * H + h) * Nq + m, delta, mask=valid)
    tl.store(dq_ptr + row[:, None] * D + d[None, :], tl.zeros([BLOCK_R, BLOCK_D], tl.float32), mask=inside)


def _tail(size: int, block: int) -> dict[str, Any]:
    """What is left after whole tiles: the size of one more tile, 0 if none, and whether it is full."""
    rest = size % block
    tail = _padded(rest) if rest else 0
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


def _fwd_launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    key_padding_mask: Tensor | None,
    config: dict[str, int],
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The outputs, still empty, and the launches that fill them."""
    (batch, keys), (_, queries, heads, dim) = key.shape[:2], query.shape
    output = query.new_empty(batch, queries, heads, dim)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    if batch == 0:
        return (output, lse), []
    if scale <= 0:
        # The kernel takes the row maximum before it scales.
        query, scale = (-query, -scale) if scale < 0 else (torch.zeros_like(query), 1.0)
    query, key, value = (_addressable(t) for t in (query, key, value))
    block_n = config["block_n"]
    # Whole tiles per split, and no split without keys.
    tiles = cdiv(keys, block_n)
    tiles_per_split = cdiv(tiles, config["splits"])
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
        "o_ptr": partial,
        "lse_ptr": partial_lse,
        **_strides("q", query, "bnh"),
        **_strides("k", key, "bnh"),
        **_strides("v", value, "bnh"),
        "B": batch,
        "Nq": queries,
        "Nk": keys,
        "split_keys": tiles_per_split * block_n,
        "splits": splits,
        "scale_log2": scale * _LOG2E,
        **_dropout(dropout_p, seed),
    }
    sizes = {"H": heads, "D": dim, "BLOCK_D": _padded(dim)}
    constants, options = _tiles(config, query.dtype)
    constants |= {**sizes, **_tail(keys, block_n)}
    programs = batch * heads * splits * cdiv(queries, config["block_m"])
    launches = [Launch(_query_attention_fwd_kernel, programs, arguments, constants, options)]
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
        constants, options = {**sizes, "BLOCK_R": block_r}, {"num_warps": 4, "num_stages": 1}
        launches.append(Launch(_atm_combine_kernel, cdiv(rows, block_r), arguments, constants, options))
    return (output, lse), launches


def _bwd_launches(
    grad_output: Tensor,
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
    grad_output, query, key, value = (_addressable(t) for t in (grad_output, query, key, value))
    output, lse = output.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    atomics = config["plan"] == "atomics"
    # dQ is summed in float32 and rounded last where atomics or images that share their queries add to it.
    finish = atomics or query_batch != batch
    partial = query.new_empty(batch, *query.shape[1:], dtype=torch.float32) if finish else grad_query
    sizes = {"H": heads, "D": dim, "BLOCK_D": _padded(dim)}
    small = {"num_warps": 4, "num_stages": 1}
    upstream = _strides("g", grad_output, "bnh")
    common = {
        "do_ptr": grad_output,
        "q_ptr": query,
        "k_ptr": key,
        "v_ptr": value,
        "pad_ptr": _pads(key_padding_mask),
        "lse_ptr": lse,
        "delta_ptr": delta,
        **upstream,
        **_strides("q", query, "bnh"),
        **_strides("k", key, "bnh"),
        **_strides("v", value, "bnh"),
        "Nq": queries,
        "Nk": keys,
        "scale_log2": scale * _LOG2E,
        **_dropout(dropout_p, seed),
    }
    if atomics:
        rows, block_r = batch * queries * heads, 1024 // sizes["BLOCK_D"]
        arguments = {
            "do_ptr": grad_output,
            "o_ptr": output,
            "delta_ptr": delta,
            "dq_ptr": partial,
            **upstream,
            "rows_total": rows,
            "Nq": queries,
        }
        constants = {**sizes, "BLOCK_R": block_r}
        programs = cdiv(rows, block_r)
        launches = [Launch(_query_attention_bwd_start_kernel, programs, arguments, constants, small)]
    else:
        constants, options = _tiles(config["query"], query.dtype)
        constants |= {**sizes, **_tail(keys, constants["BLOCK_N"])}
        arguments = {**common, "o_ptr": output, "dq_ptr": partial, "factor": 1.0 if finish else scale}
        programs = batch * heads * cdiv(queries, constants["BLOCK_M"])
        launches = [Launch(_query_attention_bwd_query_kernel, programs, arguments, constants, options)]

    constants, options = _tiles(config["key"], query.dtype)
    block_n = constants["BLOCK_N"]
    constants |= {**sizes, **_tail(queries, constants["BLOCK_M"]), "EVEN_N": keys % block_n == 0}
    arguments = {
        **common,
        "dq_ptr": partial if atomics else None,
        "dk_ptr": grad_key,
        "dv_ptr": grad_value,
        "scale": scale,
    }
    programs = batch * heads * cdiv(keys, block_n)
    launches.append(Launch(_query_attention_bwd_key_kernel, programs, arguments, constants, options))
    if finish:
        size, block = queries * heads * dim, 1024
        parts = batch // query_batch
        arguments = {"dq_ptr": partial, "out_ptr": grad_query, "size": size, "parts": parts, "scale": scale}
        programs = query_batch * cdiv(size, block)
        launches.append(Launch(_atm_bwd_query_kernel, programs, arguments, {"BLOCK": block}, small))
    return results, launches


def _shape(query: Tensor, key: Tensor) -> tuple[int, int, int, int, int]:
    return key.shape[0], query.shape[1], key.shape[1], query.shape[2], query.shape[3]


@planned
def query_attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    key_padding_mask: Tensor | None = None,
    *,
    config: dict[str, int] | None = None,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Launcher of ``segvit::query_attention_fwd``; ``config`` replaces entries of :func:`_fwd_config`."""
    costly = seed is not None or key_padding_mask is not None
    found = _fwd_config(_shape(query, key), query.dtype, target(query.device), costly)
    arguments = (query, key, value, seed, scale, dropout_p, key_padding_mask)
    return _fwd_launches(*arguments, {**found, **(config or {})})


@planned
def query_attention_bwd(
    grad_output: Tensor,
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
    """Launcher of ``segvit::query_attention_bwd``; ``config`` replaces entries of :func:`_bwd_config`."""
    arch = target(query.device)
    costly = seed is not None or key_padding_mask is not None
    found = _bwd_config(_shape(query, key), query.dtype, arch, costly, deterministic)
    arguments = (grad_output, query, key, value, output, lse, seed, scale, dropout_p, key_padding_mask)
    return _bwd_launches(*arguments, {**found, **(config or {})})
