"""What the attention operators share: dtypes that kernels take, checks of arguments, counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from segvit_kernels.ops._checks import flag, number

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_KERNEL_DTYPES = _DTYPES[:3]
_KERNEL_MAX_HEAD_DIM = 128


def product_macs(query: tuple[int, ...], key: tuple[int, ...]) -> int:
    """Multiply-accumulates of one product of all queries and keys."""
    return key[0] * math.prod(query[1:]) * key[1]


def kernels_refuse(backend: str, query: Tensor) -> Exception | None:
    """Why kernels do not take this query; ``None`` if they do."""
    if query.dtype not in _KERNEL_DTYPES:
        return TypeError(f"backend {backend!r} takes float32, float16 and bfloat16; query is {query.dtype}")
    if query.shape[-1] > _KERNEL_MAX_HEAD_DIM:
        return ValueError(
            f"backend {backend!r} takes head dims up to {_KERNEL_MAX_HEAD_DIM}; query has shape "
            f"{tuple(query.shape)}, head dim {query.shape[-1]}"
        )
    return None


def draw_seed(device: torch.device) -> Tensor:
    """Seed of a call's dropout (1,), int64: a tensor from the device's generator, so that there is no host
    sync, in CUDA graphs and in recomputation neither."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied unless neighbours of its last axis are neighbours in memory."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def distinct(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views where one tensor is given twice: Dynamo does not trace a Function that is called so."""
    value = value.view_as(value) if value is key or value is query else value
    return query, key.view_as(key) if key is query else key, value


def hide(key_padding_mask: Tensor | None, batch: range, *tensors: Tensor) -> list[Tensor]:
    """Blocks (batch, heads, Nk, D) with zeros for padded tokens, whatever stood there."""
    if key_padding_mask is None:
        return list(tensors)
    hidden = key_padding_mask[batch.start : batch.stop, None, :, None]
    return [t.masked_fill(hidden, 0) for t in tensors]


def hide_weights(key_padding_mask: Tensor | None, batch: range, scores: Tensor, value: float) -> Tensor:
    """A block (batch, heads, Nq, Nk) with ``value`` in the columns of padded tokens, in place."""
    if key_padding_mask is None:
        return scores
    return scores.masked_fill_(key_padding_mask[batch.start : batch.stop, None, None], value)


def validate(
    tensors: dict[str, Tensor], dropout_p: float, need_masks: bool, key_padding_mask: Tensor | None = None
) -> None:
    """Raises TypeError or ValueError that names the argument, what it is and what is expected."""
    query, key = tensors["query"], tensors["key"]
    dtype, device = query.dtype, query.device
    for name, tensor in tensors.items():
        own = tensor.dtype
        if own not in _DTYPES:
            raise TypeError(f"{name} has dtype {own}; expected float32, float16, bfloat16 or float64")
        if own != dtype:
            raise TypeError(f"{name} has dtype {own}; expected {dtype}, the dtype of query")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; expected {device}, the device of query")
    for name, tensor in (("query", query), ("key", key), ("value", tensors["value"])):
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected (batch, tokens, heads, head_dim)"
            )
    query_batch, queries, heads, dim = query.shape
    batch, keys, _, _ = key.shape
    expected: dict[str, tuple[int, ...]] = {
        "key": (batch, keys, heads, dim),
        "value": (batch, keys, heads, dim),
    }
    if previous := "previous_masks" in tensors:
        expected["previous_masks"] = (batch, queries, keys)
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; expected {shape}")
    if query_batch != batch and query_batch != 1:
        raise ValueError(
            f"query has shape {tuple(query.shape)}; expected batch {batch}, the batch of key, or 1"
        )
    if queries < 1 or heads < 1 or dim < 1 or keys < 1:
        raise ValueError(
            f"query has shape {tuple(query.shape)} and key {tuple(key.shape)}; expected at least one token, "
            "head and channel"
        )
    if key_padding_mask is not None:
        if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
            kind = getattr(key_padding_mask, "dtype", type(key_padding_mask).__name__)
            raise TypeError(
                f"key_padding_mask is {kind}; expected a bool tensor, True where a token is padding"
            )
        if tuple(key_padding_mask.shape) != (batch, keys):
            raise ValueError(
                f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; expected {(batch, keys)}, "
                "the batch and tokens of key"
            )
        if key_padding_mask.device != query.device:
            raise ValueError(
                f"key_padding_mask is on {key_padding_mask.device}; expected {query.device}, the device of "
                "query"
            )
    if not 0 <= number("dropout_p", dropout_p) < 1:
        raise ValueError(f"dropout_p is {dropout_p}; expected a probability in [0, 1)")
    if not flag("need_masks", need_masks) and previous:
        raise ValueError("previous_masks is given but need_masks is False; expected need_masks=True with it")
