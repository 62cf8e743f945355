"""Other people's attention, as peers of every operator that has an attention in it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.subjects.operators.base import Peer

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}


def _sdpa(x: dict[str, Tensor]) -> tuple[Tensor]:
    heads_first = (x[name].transpose(1, 2) for name in ("query", "key", "value"))
    return (F.scaled_dot_product_attention(*heads_first).transpose(1, 2),)


def _sdpa_by(backend: SDPBackend) -> Callable[[dict[str, Tensor]], tuple[Tensor]]:
    def call(x: dict[str, Tensor]) -> tuple[Tensor]:
        with sdpa_kernel(backend):
            return _sdpa(x)

    return call


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(x: dict[str, Tensor]) -> tuple[Tensor]:
    heads_first = (x[name].transpose(1, 2) for name in ("query", "key", "value"))
    return (_compiled_flex()(*heads_first).transpose(1, 2),)


def _xformers(x: dict[str, Tensor]) -> tuple[Tensor]:
    from xformers.ops import memory_efficient_attention

    return (memory_efficient_attention(x["query"], x["key"], x["value"]),)


def peers() -> list[Peer]:
    """Attention of ``query``, ``key``, ``value`` (B, N, H, D): one result, (B, Nq, H, D)."""
    found = [Peer("sdpa", "scaled_dot_product_attention, torch's choice of backend", _sdpa)]
    if not torch.cuda.is_available():
        return found  # on a CPU torch has one backend, xformers none, and FlexAttention no backward
    found += [
        Peer(name, f"scaled_dot_product_attention, {name}", _sdpa_by(kind)) for name, kind in BACKENDS.items()
    ]
    found.append(Peer("flex", "torch.compile(flex_attention)", _flex, compiled=True))
    missing = None if importlib.util.find_spec("xformers") else "xformers is not installed"
    found.append(Peer("xformers", "xformers' memory_efficient_attention", _xformers, missing=missing))
    return found
