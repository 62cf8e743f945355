"""Cases and oracle of the ATM operator."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from segvit_kernels.ops.atm import ATMOutput, atm_reference


@dataclasses.dataclass(frozen=True)
class ATMCase:
    """Sizes and options of one call of ``fused_atm``."""

    name: str
    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    dropout_p: float = 0.0
    previous_masks: bool = False
    broadcast: bool = False
    strided: bool = False

    def inputs(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Tensor]:
        """Fresh random ``query``, ``key``, ``value`` and, where the case has them, ``previous_masks``."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        features = (self.heads, self.head_dim)
        query_batch = 1 if self.broadcast else self.batch
        if self.strided:
            # Slices of one stacked projection, as a decoder makes them.
            key, value = draw(self.batch, self.keys, 2, *features).unbind(2)
        else:
            key, value = (draw(self.batch, self.keys, *features) for _ in range(2))
        inputs = {"query": draw(query_batch, self.queries, *features), "key": key, "value": value}
        if self.previous_masks:
            inputs["previous_masks"] = draw(self.batch, self.queries, self.keys)
        return inputs

    def gradients(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Random gradients of ``output`` and ``mask_logits``."""
        generator = torch.Generator().manual_seed(seed)
        shapes = (
            (self.batch, self.queries, self.heads, self.head_dim),
            (self.batch, self.queries, self.keys),
        )
        grad_output, grad_masks = (torch.randn(*s, generator=generator).to(device, dtype) for s in shapes)
        return grad_output, grad_masks


CASES = (
    ATMCase("one_query_one_key", 1, 1, 1, 1, 16),
    ATMCase("odd", 2, 7, 33, 3, 32),
    ATMCase("odd_dim", 1, 7, 33, 3, 24, previous_masks=True),
    ATMCase("previous", 2, 19, 70, 2, 32, previous_masks=True),
    ATMCase("broadcast", 3, 11, 40, 2, 32, broadcast=True),
    ATMCase("strided", 2, 20, 65, 3, 32, strided=True),
    ATMCase("dropout", 2, 13, 37, 3, 32, dropout_p=0.1, previous_masks=True),
    ATMCase("dim_64", 1, 65, 129, 2, 64),
    ATMCase("dim_128", 1, 5, 17, 1, 128),
    ATMCase("many_queries", 1, 150, 100, 2, 32),
)
"""Small cases that between them meet every branch of an implementation."""

SHAPES = (
    ATMCase("ade_vit_l", 1, 150, 1600, 16, 32),
    ATMCase("ade_vit_b", 1, 150, 1024, 12, 32),
    ATMCase("coco_vit_l", 1, 171, 1024, 16, 32),
    ATMCase("pc_vit_l", 1, 60, 900, 16, 32),
    ATMCase("cityscapes_like", 1, 19, 8192, 8, 64),
)
"""The shapes that matter, at batch 1; ``dataclasses.replace(shape, batch=16)`` for others."""


def oracle(
    case: ATMCase,
    inputs: dict[str, Tensor],
    gradients: tuple[Tensor | None, Tensor | None],
    *,
    dtype: torch.dtype = torch.float64,
    seed: Tensor | None = None,
) -> tuple[ATMOutput, dict[str, Tensor]]:
    """:func:`atm_reference` and its gradients by autograd, computed in ``dtype`` from the given inputs.

    With float64 it is the truth; with the inputs' own dtype, the error that ordinary PyTorch makes.
    """
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
    previous = leaves.get("previous_masks")
    result: Any = atm_reference(
        leaves["query"],
        leaves["key"],
        leaves["value"],
        dropout_p=case.dropout_p,
        seed=seed,
        previous_masks=previous,
    )
    used = [(o, g.to(dtype)) for o, g in zip(result, gradients, strict=True) if g is not None]
    grads = torch.autograd.grad(
        [o for o, _ in used], list(leaves.values()), [g for _, g in used], allow_unused=True
    )
    named = {
        n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), grads, strict=True)
    }
    return ATMOutput(*(t.detach() for t in result)), named
