"""Attention-to-mask (ATM): attention whose similarity map is a second output.

With queries Q (class tokens), keys K and values V (projected features), per head h:

    Sₕ = scale · Qₕ Kₕᵀ      Oₕ = dropout(softmax(Sₕ)) Vₕ      M = 1/H · Σₕ Sₕ + M_previous

(SegViT, NeurIPS 2022, section 3.2; M before the sigmoid.) Layout is (batch, tokens, heads, head_dim).

Tokens may be padding, which no query sees: their keys and values count as zero, whatever stands there, and
their weights are zero. So S is 0 there and M is M_previous. A row without a token to see has output 0 and a
log-sum-exp of minus infinity.

Kept for the backward: Q, K, V, O and the log-sum-exp of every row of S in float32 (float64 for float64
inputs); S itself is recomputed, never stored. With δ = rowsum(dO ∘ O) and the scaled dropout mask D:

    dP = D ∘ (dO Vᵀ)      dS = P ∘ (dP − δ) + dM / H
    dQ = scale · dS K     dK = scale · dSᵀ Q     dV = (D ∘ P)ᵀ dO     dM_previous = dM

Refused: anything but 4-D tensors of one floating dtype and one device whose sizes agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segvit_kernels import _library
from segvit_kernels._autocast import autocast, without_autocast
from segvit_kernels.ops._attention import (
    distinct,
    draw_seed,
    hide,
    hide_weights,
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
from segvit_kernels.ops._philox import dropout_scale, keep_mask


@_library.exportable
class ATMOutput(NamedTuple):
    """``output`` (B, Nq, H, D), from the module (B, Nq, C), and ``mask_logits`` (B, Nq, Nk) or ``None``."""

    output: Tensor
    mask_logits: Tensor | None


@_library.exportable
class WeightedATMOutput(NamedTuple):
    """As :class:`ATMOutput`, and ``weights`` (B, Nq, Nk), attention weights after the softmax, the mean over
    heads."""

    output: Tensor
    mask_logits: Tensor | None
    weights: Tensor


def atm_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    previous_masks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seed: Tensor | None = None,
) -> ATMOutput:
    """The meaning of :func:`fused_atm` in ordinary PyTorch, with the similarity map S in memory.

    ``seed`` (int64, one element) chooses the dropout mask; everything else as in :func:`fused_atm`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if key_padding_mask is not None:
        key, value = (t.masked_fill(key_padding_mask[:, :, None, None], 0) for t in (key, value))
    scores = (query.transpose(1, 2) * scale) @ key.permute(0, 2, 3, 1)  # (B, H, Nq, Nk)
    if key_padding_mask is None:
        weights = scores.softmax(dim=-1)
    else:
        hidden = key_padding_mask[:, None, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).masked_fill(hidden, 0)
    if dropout_p > 0:
        batch, heads, queries, keys = scores.shape
        assert seed is not None
        keep = keep_mask(seed, dropout_p, range(batch), range(heads), heads, queries, keys)
        weights = weights * keep * dropout_scale(dropout_p)
    output = (weights @ value.transpose(1, 2)).transpose(1, 2)
    masks = scores.mean(dim=1)
    return ATMOutput(output, masks if previous_masks is None else masks + previous_masks)


def _blocks(key: Tensor, queries: int) -> Iterator[tuple[range, range]]:
    """Ranges of batch items and heads whose scores stay within 8 MiB (CPU) or 256 MiB (elsewhere)."""
    batch, keys, heads, _ = key.shape
    budget = 2**21 if key.device.type == "cpu" else 2**26
    per_head = queries * keys
    head_step = min(heads, max(1, budget // per_head))
    batch_step = max(1, budget // (per_head * heads)) if head_step == heads else 1
    for b in range(0, batch, batch_step):
        for h in range(0, heads, head_step):
            yield range(b, min(b + batch_step, batch)), range(h, min(h + head_step, heads))


def _block(tensor: Tensor, batch: range, heads: range, dtype: torch.dtype) -> Tensor:
    """A block of (B, N, H, D) as (batch, heads, N, D)."""
    return tensor[batch.start : batch.stop, :, heads.start : heads.stop].to(dtype).transpose(1, 2)


def fwd_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    previous_masks: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    need_masks: bool,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    output, masks, lse = _fwd_fake(query, key, value, previous_masks, seed, scale, dropout_p, need_masks)
    heads, queries, keys = query.shape[2], query.shape[1], key.shape[1]
    query = query.expand(key.shape[0], -1, -1, -1)
    dtype = lse.dtype
    total: Any = None
    for b, h in _blocks(key, queries):
        k, v = hide(key_padding_mask, b, _block(key, b, h, dtype), _block(value, b, h, dtype))
        scores = (_block(query, b, h, dtype) * scale) @ k.transpose(-1, -2)
        if need_masks:
            mean = scores.sum(dim=1).div_(heads)
            if h.start == 0:
                if previous_masks is not None:
                    mean += previous_masks[b.start : b.stop]
                total = mean
            else:
                total += mean
            if h.stop == heads:
                masks[b.start : b.stop] = total
        hide_weights(key_padding_mask, b, scores, float("-inf"))
        largest = scores.amax(dim=-1, keepdim=True)
        if key_padding_mask is not None:
            largest.clamp_(min=torch.finfo(dtype).min)  # where there is no token to see
        weights = scores.sub_(largest).exp_()
        normaliser = weights.sum(dim=-1, keepdim=True)
        lse[b.start : b.stop, h.start : h.stop] = (largest + normaliser.log()).squeeze(-1)
        if key_padding_mask is not None:
            normaliser.masked_fill_(normaliser == 0, 1)
        if dropout_p > 0:
            assert seed is not None
            weights *= keep_mask(seed, dropout_p, b, h, heads, queries, keys)
            normaliser = normaliser / dropout_scale(dropout_p)
        block = (weights @ v).div_(normaliser)
        output[b.start : b.stop, :, h.start : h.stop] = block.transpose(1, 2)
    return output, masks, lse


def bwd_eager(
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
) -> tuple[Tensor, Tensor, Tensor]:
    heads, queries, keys = query.shape[2], query.shape[1], key.shape[1]
    batched = query.expand(key.shape[0], -1, -1, -1)
    grad_query = torch.empty_like(batched, memory_format=torch.contiguous_format)
    grad_key = torch.empty_like(key, memory_format=torch.contiguous_format)
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    if grad_output is None:
        grad_value.zero_()
    dtype = lse.dtype
    for b, h in _blocks(key, queries):
        q = _block(batched, b, h, dtype)
        k, v = hide(key_padding_mask, b, _block(key, b, h, dtype), _block(value, b, h, dtype))
        mask_part = None
        if grad_masks is not None:
            mask_part = grad_masks[b.start : b.stop, None].to(dtype) / heads
            hide_weights(key_padding_mask, b, mask_part, 0.0)
        if grad_output is None:
            assert mask_part is not None  # one of the two gradients is there
            grad_scores = mask_part.expand(-1, len(h), -1, -1)
        else:
            do, o = _block(grad_output, b, h, dtype), _block(output, b, h, dtype)
            weights = (q * scale) @ k.transpose(-1, -2)
            weights.sub_(lse[b.start : b.stop, h.start : h.stop, :, None]).exp_()
            hide_weights(key_padding_mask, b, weights, 0.0)
            grad_scores = do @ v.transpose(-1, -2)
            kept = weights
            if dropout_p > 0:
                assert seed is not None
                keep = keep_mask(seed, dropout_p, b, h, heads, queries, keys).to(dtype)
                keep *= dropout_scale(dropout_p)
                grad_scores *= keep
                kept = weights * keep
            gv = kept.transpose(-1, -2) @ do
            grad_value[b.start : b.stop, :, h.start : h.stop] = gv.transpose(1, 2)
            delta = (do * o).sum(dim=-1, keepdim=True)
            grad_scores.sub_(delta).mul_(weights)
            if mask_part is not None:
                grad_scores += mask_part
        gq = (grad_scores @ k).mul_(scale)
        gk = (grad_scores.transpose(-1, -2) @ q).mul_(scale)
        grad_query[b.start : b.stop, :, h.start : h.stop] = gq.transpose(1, 2)
        grad_key[b.start : b.stop, :, h.start : h.stop] = gk.transpose(1, 2)
    if query.shape[0] != batched.shape[0]:
        grad_query = grad_query.sum(dim=0, keepdim=True)
    return grad_query, grad_key, grad_value


def _fwd_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    previous_masks: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    need_masks: bool,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, keys), (_, queries, heads, dim) = key.shape[:2], query.shape
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (
        query.new_empty(batch, queries, heads, dim),
        query.new_empty((batch, queries, keys) if need_masks else (0,)),
        query.new_empty(batch, heads, queries, dtype=lse_dtype),
    )


def _bwd_fake(
    grad_output: Tensor | None, grad_masks: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _fwd_macs(query: tuple[int, ...], key: tuple[int, ...], *_: Any) -> int:
    return 2 * product_macs(query, key)


def _bwd_macs(
    grad_output: Any, grad_masks: Any, query: tuple[int, ...], key: tuple[int, ...], *_: Any
) -> int:
    return (2 if grad_output is None else 5) * product_macs(query, key)


_atm_fwd = _library.define(
    "atm_fwd(Tensor query, Tensor key, Tensor value, Tensor? previous_masks, Tensor? seed, float scale, "
    "float dropout_p, bool need_masks, Tensor? key_padding_mask=None) "
    "-> (Tensor output, Tensor mask_logits, Tensor lse)",
    eager=fwd_eager,
    fake=_fwd_fake,
    macs=_fwd_macs,
    refuse=lambda backend, query, *_: kernels_refuse(backend, query),
)

_atm_bwd = _library.define(
    "atm_bwd(Tensor? grad_output, Tensor? grad_masks, Tensor query, Tensor key, Tensor value, Tensor output, "
    "Tensor lse, Tensor? seed, float scale, float dropout_p, bool deterministic, "
    "Tensor? key_padding_mask=None) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    eager=bwd_eager,
    fake=_bwd_fake,
    macs=_bwd_macs,
    refuse=lambda backend, grad_output, grad_masks, query, *_: kernels_refuse(backend, query),
)


class ATMFunction(torch.autograd.Function):
    """``segvit::atm_fwd`` with ``segvit::atm_bwd`` as its derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        previous_masks: Tensor | None,
        key_padding_mask: Tensor | None,
        seed: Tensor | None,
        scale: float,
        dropout_p: float,
        need_masks: bool,
        deterministic: bool,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        output, masks, lse = _atm_fwd(
            query, key, value, previous_masks, seed, scale, dropout_p, need_masks, key_padding_mask, backend
        )
        ctx.save_for_backward(query, key, value, output, lse, seed, key_padding_mask)
        ctx.options = (scale, dropout_p, deterministic)
        ctx.backend = backend
        ctx.need_masks = need_masks
        ctx.set_materialize_grads(False)
        return output, masks

    @staticmethod
    @first_derivative_only("fused_atm", "atm_reference")
    def backward(ctx: Any, grad_output: Tensor | None, grad_masks: Tensor | None) -> tuple:
        if not ctx.need_masks:
            grad_masks = None
        if grad_output is None and grad_masks is None:
            return (None,) * 11
        gradients = (None,) * 3
        if any(ctx.needs_input_grad[:3]):
            *tensors, padding = ctx.saved_tensors
            gradients = _atm_bwd(grad_output, grad_masks, *tensors, *ctx.options, padding, ctx.backend)
        return (*gradients, grad_masks if ctx.needs_input_grad[3] else None, *(None,) * 7)


def fused_atm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    previous_masks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    need_masks: bool = True,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> ATMOutput:
    """Attention-to-mask: attention and the head-mean of its similarity map in one pass, S never in memory.

    SegViT (NeurIPS 2022), section 3.2; the formulas, the gradient included, stand at the top of this module.

    Args:
        query: class tokens after projection, (B, Nq, H, D), or (1, Nq, H, D) for queries that all images
            share; float32, float16, bfloat16 or float64 (eager only).
        key: features after projection, (B, Nk, H, D), dtype of ``query``.
        value: (B, Nk, H, D), dtype of ``query``.
        scale: factor of QKᵀ; D^-0.5 unless given.
        dropout_p: probability of dropping an attention weight, in [0, 1), rounded to 1/65536. Call with 0
            for inference. The masks see no dropout.
        previous_masks: (B, Nq, Nk), dtype of ``query``; added to the masks (cascaded stages).
        key_padding_mask: (B, Nk), bool, True where a token is padding that no query may see. Its key and
            value may hold anything and get no gradient; its mask logits are ``previous_masks``, or 0. An
            image of nothing but padding gets output 0.
        need_masks: without it ``mask_logits`` is ``None`` and costs nothing.
        deterministic: bitwise repeatable gradients; follows ``torch.use_deterministic_algorithms`` unless
            given.
        backend: one of ``segvit_kernels.BACKENDS``; chosen by device unless given.

    Returns:
        ``output`` (B, Nq, H, D) and ``mask_logits`` (B, Nq, Nk), the masks before the sigmoid, both in the
        dtype of ``query``. Both are differentiable; either may be left unused. Sums and statistics are
        float32 for the half precisions. Under autocast the inputs are cast to its dtype.

    Raises:
        TypeError: a dtype is not supported, or the dtypes differ.
        ValueError: shapes or devices disagree, ``dropout_p`` is out of range, or the backend is unknown.
        BackendUnavailableError: an explicitly chosen backend cannot run here.
    """
    tensors = {"query": query, "key": key, "value": value}
    if previous_masks is not None:
        tensors["previous_masks"] = previous_masks
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    tensors = dict(zip(tensors, autocast(query.device, *tensors.values()), strict=True))
    validate(tensors, dropout_p, need_masks, key_padding_mask)
    query, key, value, *previous = map(unit_stride, tensors.values())
    previous_masks = previous[0] if previous else None

    scale = query.shape[-1] ** -0.5 if scale is None else number("scale", scale)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    flag("deterministic", deterministic)
    seed = draw_seed(query.device) if dropout_p > 0 else None
    if transformed(backend):
        options: dict[str, Any] = {"key_padding_mask": key_padding_mask, "seed": seed}
        (options["previous_masks"],) = full_precision(previous_masks)
        projected = full_precision(query, key, value)
        with without_autocast(query.device):
            result = atm_reference(*projected, scale=scale, dropout_p=dropout_p, **options)
        masks = result.mask_logits if need_masks else None
        return ATMOutput(result.output.to(query.dtype), None if masks is None else masks.to(query.dtype))
    if differentiable(query, key, value, previous_masks):
        query, key, value = distinct(query, key, value)
        output, masks = ATMFunction.apply(
            query, key, value, previous_masks, key_padding_mask,
            seed, scale, dropout_p, need_masks, deterministic, backend,
        )  # fmt: skip
    else:
        output, masks, _ = _atm_fwd(
            query, key, value, previous_masks, seed, scale, dropout_p, need_masks, key_padding_mask, backend
        )
    return ATMOutput(output, masks if need_masks else None)
