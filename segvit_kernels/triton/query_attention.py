r"""Query attention on a GPU: how :mod:`segvit_kernels.ops.query_attention` runs in Triton.

Forward: one program per (image, head, block of queries, split of the keys) with an online softmax. A block
has 128 queries, so that K and V pass the L2 cache seldom enough. Where programs do not fill the chip the keys
are split and a second launch combines the partial outputs.

The loop runs over whole tiles; what is left is one more tile of its own, smaller size (16, 32, …), so that
400 keys cost 400 exponentials a row and only a ragged last tile is masked. In float32 the loop covers it.

Backward: :mod:`segvit_kernels.triton._attention`.

Bytes moved, the floor and the choice of the plan: docs/kernels.md.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton import _attention
from segvit_kernels.triton._attention import (
    LOG2E,
    _addressable,
    _bwd_launches,
    _combination,
    _divisor,
    _dropout,
    _key_splits,
    _load,
    _load_tokens,
    _padded,
    _pads,
    _pinned,
    _positive_scale,
    _shape,
    _softmax_step,
    _strides,
    _tail,
    _tiles,
)
from segvit_kernels.triton._launch import Launch, cdiv, pinned, target
from segvit_kernels.triton._plan import planned


def _fwd_config(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, arch: str, costly: bool = False
) -> dict[str, int]:
    """Launch parameters of the forward.

    Args:
        shape: batch, queries, keys, heads, head dim.
        dtype: of the inputs.
        arch: what :func:`segvit_kernels.triton._launch.target` says of a device.
        costly: whether attention weights are dropped or tokens hidden, which costs registers.

    Returns:
        ``block_m`` queries, ``block_n`` keys, ``splits`` of the keys, ``num_warps``, ``num_stages``.
    """
    batch, queries, keys, heads, _ = shape
    config = _pinned("query_attention_fwd", shape, dtype, arch, costly)
    if costly:
        config["block_n"] = max(16, config["block_n"] // 2)
    # As near as can be to eight warps per multiprocessor.
    programs = max(1, batch * heads) * cdiv(queries, config["block_m"])
    wanted = 8 / config["num_warps"] * pinned(arch)["multiprocessors"] / programs
    return {**config, "splits": _key_splits(keys, config["block_n"], wanted)}


_bwd_config = functools.partial(_attention._bwd_config, "query_attention")


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
    total = tl.zeros([BLOCK_M, 8], tl.float32)
    whole = Nk // BLOCK_N * BLOCK_N if TAIL > 0 else Nk
    for n in tl.range(n_begin, tl.minimum(n_begin + split_keys, whole), BLOCK_N, num_stages=STAGES):
        pads = pad_ptr
        if pad_ptr is not None:
            pads += n
        last = BLOCK_N - 1 if TAIL > 0 or EVEN else Nk - n - 1
        k = _load_tokens(k_ptr, pads, cols, last, stride_kn, D, BLOCK_D)
        v = _load_tokens(v_ptr, pads, cols, last, stride_vn, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        acc, largest, total = _softmax_step(
            s, v, acc, largest, total, pad_ptr, m_start, n, Nk, scale_log2, seed, b * H + h, threshold,
            BLOCK_M, BLOCK_N, TAIL > 0 or EVEN, DROPOUT, PRECISION,
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
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, TAIL]
            acc, largest, total = _softmax_step(
                s, v, acc, largest, total, pad_ptr, m_start, whole, Nk, scale_log2, seed, b * H + h,
                threshold, BLOCK_M, TAIL, EVEN, DROPOUT, PRECISION,
            )  # fmt: skip
    weights = tl.sum(total, 1)
    part = split.to(tl.int64) * B + image
    o_ptr += (part * Nq + m_start) * (H * D) + h * D
    lse_ptr += (part * H + h) * Nq + m_start
    valid = (rows[:, None] < m_left) & (d[None, :] < D)
    o = acc * (keep_scale / _divisor(weights, pad_ptr is not None))[:, None]
    tl.store(o_ptr + rows[:, None] * (H * D) + d[None, :], o.to(o_ptr.dtype.element_ty), mask=valid)
    tl.store(lse_ptr + rows, (largest + tl.log2(weights)) * 0.6931471805599453, mask=rows < m_left)


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
    query, scale = _positive_scale(query, scale)
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
        "scale_log2": scale * LOG2E,
        **_dropout(dropout_p, seed),
    }
    sizes = {"H": heads, "D": dim, "BLOCK_D": _padded(dim)}
    constants, options = _tiles(config, query.dtype)
    constants |= {**sizes, **_tail(keys, block_n, query.dtype)}
    programs = batch * heads * splits * cdiv(queries, config["block_m"])
    launches = [Launch(_query_attention_fwd_kernel, programs, arguments, constants, options)]
    if splits > 1:
        launches.append(_combination(partial, partial_lse, output, lse, splits))
    return (output, lse), launches


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
    """Launcher of ``segvit::query_attention_bwd``; ``config`` replaces entries of :func:`_bwd_config`.

    Bitwise repeatable whether ``deterministic`` or not.
    """
    costly = seed is not None or key_padding_mask is not None
    found = _bwd_config(_shape(query, key), query.dtype, target(query.device), costly)
    tensors = (grad_output, None, query, key, value, output, lse)
    arguments = (*tensors, seed, scale, dropout_p, key_padding_mask)
    return _bwd_launches(*arguments, {**found, **(config or {})})
