"""Query attention: softmax attention of thousands of queries, without masks.

For query-based down-sampling (QD: subsampled tokens ask all tokens) and up-sampling (QU: one learned query a
token of the full grid), SegViT (NeurIPS 2022), section 3.3. Per head h:

    Sₕ = scale · Qₕ Kₕᵀ      Oₕ = dropout(softmax(Sₕ)) Vₕ

Layout is (batch, tokens, heads, head_dim). Queries may be shared by the batch; tokens may be padding, as in
:mod:`segvit_kernels.ops.atm`.

Kept for the backward: Q, K, V, O and the log-sum-exp of every row of S in float32 (float64 for float64
inputs); S itself is recomputed, never stored. With δ = rowsum(dO ∘ O) and the scaled dropout mask D:

    dP = D ∘ (dO Vᵀ)      dS = P ∘ (dP − δ)
    dQ = scale · dS K     dK = scale · dSᵀ Q     dV = (D ∘ P)ᵀ dO

This is attention-to-mask without its masks, and the eager form says so: it runs that operator's blocks, or
torch's own CPU kernel where that does the same. Refused: what :func:`segvit_kernels.fused_atm` refuses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from segvit_kernels import _library
from segvit_kernels._autocast import autocast, without_autocast
from segvit_kernels.ops import atm
from segvit_kernels.ops._attention import (
    distinct,
    draw_seed,
    kernels_refuse,
    product_macs,
    unit_stride,
    validate,
)
from segvit_kernels.ops._autograd import (
    differentiable,
    first_derivative_only,
    full_precision,
    transformed,
)
from segvit_kernels.ops._checks import flag, number


def query_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """The meaning of :func:`query_attention` in ordinary PyTorch, with the similarity map S in memory.

    ``seed`` (int64, one element) chooses the dropout mask; everything else as in :func:`query_attention`.
    """
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "seed": seed}
    return atm.atm_reference(query, key, value, key_padding_mask=key_padding_mask, **options).output


_VECTOR = 16  # float32 numbers of the widest vectors


def _torch_has_it(key: Tensor, dropout_p: float, key_padding_mask: Tensor | None) -> bool:
    """Whether torch's own CPU kernel, which also gives the log-sum-exp, computes the same.

    With fewer keys than fill a vector it takes scores that are not numbers for masked ones: 0 comes out.
    """
    plain = dropout_p == 0 and key_padding_mask is None
    return plain and key.device.type == "cpu" and key.shape[1] >= _VECTOR


def _heads_first(batch: int, dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """(batch, H, N, D) in ``dtype``. Torch's kernel does not check that it can read rows: D numbers in one
    piece, and no row begun within another, as those of an expanded tensor are."""
    cast = [t.to(dtype) for t in tensors]
    rows = [t if t.stride(-1) == 1 and t.stride(1) >= t.shape[-1] else t.contiguous() for t in cast]
    return [t.expand(batch, -1, -1, -1).transpose(1, 2) for t in rows]


def _fwd_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch = key.shape[0]
    if batch == 0 or not _torch_has_it(key, dropout_p, key_padding_mask):
        options = (None, seed, scale, dropout_p, False, key_padding_mask)
        output, _, lse = atm.fwd_eager(query, key, value, *options)
        return output, lse
    # Half precisions run in float32: on the CPU that is no slower, and sums stay exact.
    dtype = torch.promote_types(query.dtype, torch.float32)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_heads_first(batch, dtype, query, key, value), scale=scale
    )
    return output.transpose(1, 2).to(query.dtype).contiguous(), lse.contiguous()


def _bwd_eager(
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
) -> tuple[Tensor, Tensor, Tensor]:
    batch = key.shape[0]
    if batch == 0 or not _torch_has_it(key, dropout_p, key_padding_mask):
        options = (seed, scale, dropout_p, deterministic, key_padding_mask)
        return atm.bwd_eager(grad_output, None, query, key, value, output, lse, *options)
    tensors = _heads_first(batch, lse.dtype, grad_output, query, key, value, output)
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, lse, 0.0, False, scale=scale
    )
    grad_query, grad_key, grad_value = (g.transpose(1, 2) for g in gradients)
    if query.shape[0] != batch:
        grad_query = grad_query.sum(dim=0, keepdim=True)
    grad_query, grad_key, grad_value = (
        g.to(query.dtype).contiguous() for g in (grad_query, grad_key, grad_value)
    )
    return grad_query, grad_key, grad_value


def _fwd_fake(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, dim = key.shape[0], *query.shape[1:]
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (
        query.new_empty(batch, queries, heads, dim),
        query.new_empty(batch, heads, queries, dtype=lse_dtype),
    )


def _bwd_fake(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _fwd_macs(query: tuple[int, ...], key: tuple[int, ...], *_: Any) -> int:
    return 2 * product_macs(query, key)


def _bwd_macs(grad_output: Any, query: tuple[int, ...], key: tuple[int, ...], *_: Any) -> int:
    return 5 * product_macs(query, key)


_query_attention_fwd = _library.define(
    "query_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? seed, float scale, float dropout_p, "
    "Tensor? key_padding_mask=None) -> (Tensor output, Tensor lse)",
    eager=_fwd_eager,
    fake=_fwd_fake,
    macs=_fwd_macs,
    refuse=lambda backend, query, *_: kernels_refuse(backend, query),
)

_query_attention_bwd = _library.define(
    "query_attention_bwd(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, "
    "Tensor lse, Tensor? seed, float scale, float dropout_p, bool deterministic, "
    "Tensor? key_padding_mask=None) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    eager=_bwd_eager,
    fake=_bwd_fake,
    macs=_bwd_macs,
    refuse=lambda backend, grad_output, query, *_: kernels_refuse(backend, query),
)


class QueryAttentionFunction(torch.autograd.Function):
    """``segvit::query_attention_fwd`` with ``segvit::query_attention_bwd`` as its derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        seed: Tensor | None,
        scale: float,
        dropout_p: float,
        deterministic: bool,
        backend: str | None,
    ) -> Tensor:
        options = (seed, scale, dropout_p, key_padding_mask, backend)
        output, lse = _query_attention_fwd(query, key, value, *options)
        ctx.save_for_backward(query, key, value, output, lse, seed, key_padding_mask)
        ctx.options = (scale, dropout_p, deterministic)
        ctx.backend = backend
        return output

    @staticmethod
    @first_derivative_only("query_attention", "query_attention_reference")
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        *tensors, padding = ctx.saved_tensors
        gradients = _query_attention_bwd(grad_output, *tensors, *ctx.options, padding, ctx.backend)
        return (*gradients, *(None,) * 6)


def query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: Tensor | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of many queries in one pass, the similarity map never in memory.

    SegViT (NeurIPS 2022), section 3.3 (QD and QU); the formulas, the gradient included, stand at the top of
    this module.

    Args:
        query: (B, Nq, H, D), or (1, Nq, H, D) for queries that all images share; float32, float16, bfloat16
            or float64 (eager only).
        key: (B, Nk, H, D), dtype of ``query``.
        value: (B, Nk, H, D), dtype of ``query``.
        scale: factor of QKᵀ; D^-0.5 unless given.
        dropout_p: probability of dropping an attention weight, in [0, 1), rounded to 1/65536. Call with 0
            for inference.
        key_padding_mask: (B, Nk), bool, True where a token is padding that no query may see. Its key and
            value may hold anything and get no gradient. An image of nothing but padding gets output 0.
        deterministic: bitwise repeatable gradients; follows ``torch.use_deterministic_algorithms`` unless
            given.
        backend: one of ``segvit_kernels.BACKENDS``; chosen by device unless given.

    Returns:
        (B, Nq, H, D), dtype of ``query``. Sums and statistics are float32 for the half precisions. Under
        autocast the inputs are cast to its dtype.

    Raises:
        TypeError: a dtype is not supported, or the dtypes differ.
        ValueError: shapes or devices disagree, ``dropout_p`` is out of range, or the backend is unknown.
        BackendUnavailableError: an explicitly chosen backend cannot run here.
    """
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    tensors = dict(zip(tensors, autocast(query.device, *tensors.values()), strict=True))
    validate(tensors, dropout_p, True, key_padding_mask)
    query, key, value = (unit_stride(t) for t in tensors.values())
    scale = query.shape[-1] ** -0.5 if scale is None else number("scale", scale)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    flag("deterministic", deterministic)
    seed = draw_seed(query.device) if dropout_p > 0 else None
    if transformed(backend):
        given: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "seed": seed}
        given["key_padding_mask"] = key_padding_mask
        with without_autocast(query.device):
            return query_attention_reference(*full_precision(query, key, value), **given).to(query.dtype)
    if differentiable(query, key, value):
        inputs = distinct(query, key, value)
        options = (key_padding_mask, seed, scale, dropout_p, deterministic, backend)
        return QueryAttentionFunction.apply(*inputs, *options)
    return _query_attention_fwd(query, key, value, seed, scale, dropout_p, key_padding_mask, backend)[0]
