"""Attention weights: the head-mean of softmax(scale · QKᵀ), as ``nn.MultiheadAttention`` gives it.

    W = 1/H · Σₕ Pₕ,   Pₕ = softmax(scale · Qₕ Kₕᵀ)        dSₕ = Pₕ ∘ (dW − rowsum(dW ∘ Pₕ)) / H

Layout is (batch, tokens, heads, head_dim). A head's weights exist for some images at a time, and are made
again in the backward: beside W there is never more than a budget of bytes, or one head's weights of one
image, in float32 (float64 for float64 inputs). A graph of ordinary operators, on every device.

Tokens may be padding: their weight is 0, whatever stands there, and so are all weights of an image of nothing
else.

Refused: anything but 4-D tensors of one floating dtype and one device whose sizes agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from segvit_kernels._autocast import autocast, without_autocast
from segvit_kernels.ops._attention import validate
from segvit_kernels.ops._autograd import first_derivative_only, full_precision, transformed
from segvit_kernels.ops._checks import number
from segvit_kernels.ops._parts import budget_of, parts


def attention_weights_reference(
    query: Tensor, key: Tensor, *, scale: float | None = None, key_padding_mask: Tensor | None = None
) -> Tensor:
    """The meaning of :func:`attention_weights` in ordinary PyTorch, with (B, H, Nq, Nk) in memory."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if key_padding_mask is not None:
        key = key.masked_fill(key_padding_mask[:, :, None, None], 0)
    scores = scale * query.transpose(1, 2) @ key.permute(0, 2, 3, 1)
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, None]
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(hidden, lowest)
        return (scores.softmax(-1) * ~hidden).mean(1)
    return scores.softmax(-1).mean(1)


def _heads(
    query: Tensor, key: Tensor, scale: float, key_padding_mask: Tensor | None
) -> Iterator[tuple[slice, int, Tensor, Tensor, Tensor]]:
    """Images, head, its queries and keys (b, N, D) and its weights (b, Nq, Nk), in float32 at least."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    (batch, keys, heads, _), queries = key.shape, query.shape[1]
    for images in parts(batch, queries * keys * dtype.itemsize, budget_of(query.device)):
        hidden = None if key_padding_mask is None else key_padding_mask[images, :, None]
        for head in range(heads):
            q, k = query[images, :, head].to(dtype), key[images, :, head].to(dtype)
            k = k if hidden is None else k.masked_fill(hidden, 0)
            with without_autocast(q.device):
                scores = torch.bmm(q * scale, k.mT)
            if hidden is not None:
                scores.masked_fill_(hidden.mT, torch.finfo(dtype).min)
            weights = scores.softmax(-1)
            if hidden is not None:
                weights.masked_fill_(hidden.mT, 0)
            yield images, head, q, k, weights


class AttentionWeightsFunction(torch.autograd.Function):
    """:func:`attention_weights`, whose backward makes the weights again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, scale: float, key_padding_mask: Tensor | None
    ) -> Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        mean = query.new_zeros((query.shape[0], query.shape[1], key.shape[1]), dtype=dtype)
        for images, _, _, _, weights in _heads(query, key, scale, key_padding_mask):
            mean[images] += weights
        ctx.save_for_backward(query, key, key_padding_mask)
        ctx.scale = scale
        return mean.div_(query.shape[2]).to(query.dtype)

    @staticmethod
    @first_derivative_only("attention_weights", "attention_weights_reference")
    def backward(ctx: Any, grad: Tensor) -> tuple:
        query, key, key_padding_mask = ctx.saved_tensors
        grad_query, grad_key = torch.empty_like(query), torch.empty_like(key)
        for images, head, q, k, weights in _heads(query, key, ctx.scale, key_padding_mask):
            own = grad[images].to(weights.dtype)
            dot = (own * weights).sum(-1, keepdim=True)
            scores = weights.mul_(own - dot).mul_(ctx.scale / query.shape[2])
            with without_autocast(q.device):
                grad_query[images, :, head] = torch.bmm(scores, k)
                grad_key[images, :, head] = torch.bmm(scores.mT, q)
        return grad_query, grad_key, None, None


def attention_weights(
    query: Tensor, key: Tensor, *, scale: float | None = None, key_padding_mask: Tensor | None = None
) -> Tensor:
    """The mean over heads of the attention weights, after the softmax, never with all heads in memory.

    What ``nn.MultiheadAttention(..., need_weights=True)`` returns beside its output, without dropout.

    Args:
        query: (B, Nq, H, D) or (1, Nq, H, D), float32, float16, bfloat16 or float64.
        key: (B, Nk, H, D), dtype of ``query``.
        scale: factor of QKᵀ; D^-0.5 unless given.
        key_padding_mask: (B, Nk), bool, True where a token is padding that no query may see: its weight is
            0, and all are in an image of nothing but padding.

    Returns:
        (B, Nq, Nk), dtype of ``query``; its rows sum to 1. Differentiable. Under autocast the inputs are cast
        to its dtype.

    Raises:
        TypeError: a dtype is not supported, or the dtypes differ.
        ValueError: shapes or devices disagree.
    """
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    query, key = autocast(query.device, query, key)
    validate({"query": query, "key": key, "value": key}, 0.0, True, key_padding_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else number("scale", scale)
    query = query.expand(key.shape[0], -1, -1, -1)
    if transformed():
        options: dict[str, Any] = {"scale": scale, "key_padding_mask": key_padding_mask}
        with without_autocast(query.device):
            return attention_weights_reference(*full_precision(query, key), **options).to(query.dtype)
    return AttentionWeightsFunction.apply(query, key, scale, key_padding_mask)
