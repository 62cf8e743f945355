r"""Attention-to-mask on a GPU: how :mod:`segvit_kernels.ops.atm` runs in Triton.

Forward, plan ``fused`` (the default): one launch with two kinds of programs. The first kind computes
attention for one (image, head, block of queries, split of the keys) with an online softmax. The second
computes a tile of the masks as one product over the concatenated heads, M = (scale / H) Q_cat K_catᵀ with
inner length H·D. The long programs of the first kind come first, the short ones fill what they leave. A
program holds up to three tiles of 64 queries, all of them for the usual number of classes, so that keys and
values also pass the L2 cache only once. Where batch and heads do not fill the chip the keys are split and
a second launch combines the partial outputs.

Forward, plan ``heads``: one program per (image, block of queries, tile of keys) that loops over the heads and
keeps the mask tile in registers. S is computed once; every tile of keys writes a partial output.

Backward: :mod:`segvit_kernels.triton._attention`.

Bytes moved and the choice between the plans: docs/kernels.md.
"""

from __future__ import annotations

import functools
import math
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
    _hidden,
    _keep,
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
)
from segvit_kernels.triton._launch import Launch, cdiv, pinned, target
from segvit_kernels.triton._plan import planned


def _fwd_config(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, arch: str, costly: bool = False
) -> dict[str, Any]:
    """Launch parameters of the forward.

    Args:
        shape: batch, queries, keys, heads, head dim.
        dtype: of the inputs.
        arch: what :func:`segvit_kernels.triton._launch.target` says of a device.
        costly: whether attention weights are dropped or tokens hidden, which costs registers.

    Returns:
        ``plan``; ``tiles`` of ``block_m`` queries in one program; ``block_n`` keys; of the mask product
        ``mask_n`` keys and ``block_c``, its inner step; ``splits`` of the keys; ``num_warps``;
        ``num_stages``; perhaps ``maxnreg``.
    """
    batch, queries, keys, heads, _ = shape
    config = {"plan": "fused", **_pinned("atm_fwd", shape, dtype, arch, costly)}
    config.setdefault("mask_n", config["block_n"])
    tiles = cdiv(queries, config["block_m"])
    blocks = cdiv(tiles, 1 if costly else config["tiles"])
    config["tiles"] = cdiv(tiles, blocks)
    # As near as can be to two programs per multiprocessor.
    wanted = 2 * pinned(arch)["multiprocessors"] / max(1, batch * heads * blocks)
    return {**config, "splits": _key_splits(keys, config["block_n"], wanted, most=16)}


_bwd_config = functools.partial(_attention._bwd_config, "atm")


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
        total += (tl.zeros([BLOCK_M, 8], tl.float32),)
    k_ptr += tl.cast(n_begin, tl.int64) * stride_kn
    v_ptr += tl.cast(n_begin, tl.int64) * stride_vn
    for n in tl.range(n_begin, n_end, BLOCK_N, num_stages=STAGES):
        last = BLOCK_N - 1 if EVEN_N else Nk - n - 1
        pads = pad_ptr
        if pad_ptr is not None:
            pads += n
        k = _load_tokens(k_ptr, pads, cols, last, stride_kn, D, BLOCK_D)
        v = _load_tokens(v_ptr, pads, cols, last, stride_vn, D, BLOCK_D)
        scores = ()
        for t in tl.static_range(TILES):  # all of them first, so that the first softmax hides the others
            scores += (tl.dot(q[t], tl.trans(k), input_precision=PRECISION),)  # [BLOCK_M, BLOCK_N]
        new_acc, new_largest, new_total = (), (), ()
        for t in tl.static_range(TILES):
            a, x, z = _softmax_step(
                scores[t], v, acc[t], largest[t], total[t], pad_ptr, m_start + t * BLOCK_M, n, Nk, scale_log2,
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
        weights = tl.sum(total[t], 1)
        o = acc[t] * (keep_scale / _divisor(weights, pad_ptr is not None))[:, None]
        tl.store(o_ptr + m[:, None] * (H * D) + d[None, :], o.to(o_ptr.dtype.element_ty), mask=valid)
        lse = (largest[t] + tl.log2(weights)) * 0.6931471805599453
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
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    EVEN_N: tl.constexpr, ALIGN: tl.constexpr, NEED_MASKS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Plan ``fused``: the attention programs of all images, then all mask programs, which fill what is left.

    o (splits, B, Nq, H, D) and lse (splits, B, H, Nq): the results themselves where splits is 1.
    """
    blocks = tl.cdiv(Nq, TILES * BLOCK_M)
    attention_programs = B * H * splits * blocks
    index = tl.program_id(0)
    m_start = index % blocks * (TILES * BLOCK_M)
    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    if index < attention_programs:
        split = index // blocks % splits
        h = index // blocks // splits % H
        b = index // blocks // splits // H
        image, head = b.to(tl.int64), h.to(tl.int64)
        n_begin = split * split_keys
        n_end = tl.minimum(n_begin + split_keys, Nk)
        q_ptr += image * stride_qb + head * stride_qh
        k_ptr += image * stride_kb + head * stride_kh
        v_ptr += image * stride_vb + head * stride_vh
        o_ptr += (split.to(tl.int64) * B + image) * Nq * (H * D) + h * D
        lse_ptr += ((split.to(tl.int64) * B + image) * H + h) * Nq
        if pad_ptr is not None:
            pad_ptr += image * Nk
        _attend(
            q_ptr, k_ptr, v_ptr, pad_ptr, o_ptr, lse_ptr, stride_qn, stride_kn, stride_vn,
            m_start, n_begin, n_end, Nq, Nk, scale_log2, seed, b * H + h, threshold, keep_scale,
            H, D, BLOCK_D, TILES, BLOCK_M, BLOCK_N, EVEN_N, DROPOUT, PRECISION, STAGES,
        )  # fmt: skip
    elif NEED_MASKS:
        tile = (index - attention_programs) // blocks
        image = (tile // tl.cdiv(Nk, MASK_N)).to(tl.int64)
        n_start = tile % tl.cdiv(Nk, MASK_N) * MASK_N
        q_ptr += image * stride_qb
        k_ptr += image * stride_kb
        masks_ptr += image * Nq * (Nk // ALIGN * ALIGN)
        if previous_ptr is not None:
            previous_ptr += image * (stride_pb // ALIGN * ALIGN)
        if pad_ptr is not None:
            pad_ptr += image * Nk
        _mask_tile(
            q_ptr, k_ptr, pad_ptr, previous_ptr, masks_ptr, stride_qn, stride_qh, stride_kn, stride_kh,
            stride_pn, m_start, n_start, Nq, Nk, channels, mask_factor,
            H, D, TILES, BLOCK_M, MASK_N, BLOCK_C, ALIGN, PRECISION, STAGES,
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
    query, scale = _positive_scale(query, scale)
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
        "scale_log2": scale * LOG2E,
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
        mask_n = config["mask_n"]
        programs = batch * blocks * (heads * splits + (cdiv(keys, mask_n) if need_masks else 0))
        arguments |= {"channels": heads * dim, "split_keys": tiles_per_split * block_n, "splits": splits}
        constants |= {"TILES": config["tiles"], "MASK_N": mask_n, "BLOCK_C": config["block_c"]}
        launches = [Launch(_atm_fwd_kernel, programs, arguments, constants, options)]
    else:
        programs = batch * blocks * tiles
        launches = [Launch(_atm_fwd_heads_kernel, programs, arguments, constants, options)]
    if splits > 1:
        launches.append(_combination(partial, partial_lse, output, lse, splits))
    return results, launches


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
    """Launcher of ``segvit::atm_bwd``; ``config`` replaces entries of :func:`_bwd_config`.

    Bitwise repeatable whether ``deterministic`` or not.
    """
    costly = seed is not None or key_padding_mask is not None
    found = _bwd_config(_shape(query, key), query.dtype, target(query.device), costly)
    tensors = (grad_output, grad_masks, query, key, value, output, lse)
    arguments = (*tensors, seed, scale, dropout_p, key_padding_mask)
    return _bwd_launches(*arguments, {**found, **(config or {})})
