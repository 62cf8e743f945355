"""Cases and oracle of the query attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from segvit_kernels.ops.query_attention import query_attention_reference

INPUTS = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class QueryAttentionCase:
    """Sizes and options of one call of ``query_attention``."""

    name: str
    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    dropout_p: float = 0.0
    broadcast: bool = False
    strided: bool = False

    def inputs(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Tensor]:
        """Fresh random ``query``, ``key`` and ``value``."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        features = (self.heads, self.head_dim)
        query = draw(1 if self.broadcast else self.batch, self.queries, *features)
        if self.strided:
            # Slices of one packed projection, as a ViT block makes them.
            _, key, value = draw(self.batch, self.keys, 3, *features).unbind(2)
        else:
            key, value = (draw(self.batch, self.keys, *features) for _ in range(2))
        return {"query": query, "key": key, "value": value}

    def gradient(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 1) -> Tensor:
        """A random gradient of the output."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.queries, self.heads, self.head_dim)
        return torch.randn(*shape, generator=generator).to(device, dtype)


CASES = (
    QueryAttentionCase("one_query_one_key", 1, 1, 1, 1, 16),
    QueryAttentionCase("odd", 2, 70, 33, 3, 32),
    QueryAttentionCase("odd_dim", 1, 33, 70, 3, 24),
    QueryAttentionCase("broadcast", 3, 40, 21, 2, 32, broadcast=True),
    QueryAttentionCase("strided", 2, 20, 65, 3, 32, strided=True),
    QueryAttentionCase("dropout", 2, 37, 45, 3, 32, dropout_p=0.1),
    QueryAttentionCase("dropout_broadcast", 2, 19, 80, 2, 16, dropout_p=0.5, broadcast=True),
    QueryAttentionCase("even", 1, 128, 64, 2, 32),
    QueryAttentionCase("dim_64", 1, 65, 129, 2, 64),
    QueryAttentionCase("dim_128", 1, 17, 40, 1, 128),
    QueryAttentionCase("dim_20", 1, 9, 200, 2, 20),
)
"""Small cases that between them meet every branch of an implementation."""

SHAPES = (
    QueryAttentionCase("qu_self", 1, 1600, 1600, 16, 32),
    QueryAttentionCase("qu_cross_low", 1, 1600, 400, 16, 32),
    QueryAttentionCase("qd_vit_l", 1, 400, 1600, 16, 64),
)
"""The shapes that matter, at batch 1; ``dataclasses.replace(shape, batch=16)`` for others."""


def with_gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], gradient: Tensor, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The result of ``function(**inputs, **options)`` and the gradients of its inputs by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    output = function(**leaves, **options)
    grads = torch.autograd.grad(output, list(leaves.values()), gradient.to(output.dtype))
    return output.detach(), dict(zip(leaves, grads, strict=True))


def oracle(
    case: QueryAttentionCase,
    inputs: dict[str, Tensor],
    gradient: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    seed: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`query_attention_reference` and its gradients by autograd, computed in ``dtype``.

    With float64 it is the truth; with the inputs' own dtype, the error that ordinary PyTorch makes.
    """
    inputs = {name: t.to(dtype) for name, t in inputs.items()}
    options = {"dropout_p": case.dropout_p, "seed": seed, "scale": scale}
    return with_gradients(query_attention_reference, inputs, gradient, **options)
