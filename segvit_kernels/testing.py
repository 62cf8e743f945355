"""Operator cases and error budgets, shared by the tests, the benchmarks and whoever adds a backend."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from segvit_kernels.ops.atm import ATMOutput, atm_reference

RELATIVE_NORM = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest ‖out − ref‖ / ‖ref‖ against float64, by dtype."""


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
    result = atm_reference(
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


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """‖actual − truth‖ / ‖truth‖ in float64; infinite where ``actual`` is not finite."""
    actual, truth = actual.double(), truth.double()
    if not bool(actual.isfinite().all()):
        return math.inf
    norm = truth.norm().item()
    return (actual - truth).norm().item() / norm if norm else (actual - truth).norm().item()


def assert_within_budget(name: str, actual: Tensor, truth: Tensor, ordinary: Tensor) -> None:
    """Hold ``actual`` to the error budget of its dtype.

    The maximum and the RMS error may be twice those that ordinary PyTorch makes in the same dtype, plus
    rounding; the relative norm may be :data:`RELATIVE_NORM`.

    Args:
        name: what is compared, for the message.
        actual: the result under test.
        truth: the float64 result.
        ordinary: the plain formula's result, computed in the dtype of ``actual``.

    Raises:
        AssertionError: with the figures.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if actual.numel() == 0:
        return
    assert bool(actual.isfinite().all()), f"{name}: not finite"
    if actual.dtype == torch.float64:
        assert (
            relative_error(actual, truth) <= RELATIVE_NORM[torch.float64]
            or (actual - truth).abs().max() < 1e-14
        ), name
        return
    error, allowed = (actual.double() - truth).abs(), (ordinary.double() - truth).abs()
    eps = torch.finfo(actual.dtype).eps
    if truth.norm() <= 1e-3 * math.sqrt(truth.numel()):
        # Terms of order one cancel (softmax over one key, say): only their rounding is left.
        assert error.max() <= 2 * allowed.max() + 8 * eps, f"{name}: {error.max():.3g} where terms cancel"
        return
    for kind, reduce in (("maximum", torch.max), ("rms", lambda x: x.square().mean().sqrt())):
        found, limit = reduce(error).item(), (2 * reduce(allowed) + 2 * eps * reduce(truth.abs())).item()
        assert found <= limit, f"{name}: {kind} error {found:.3g}, budget {limit:.3g}"
    relative, limit = relative_error(actual, truth), RELATIVE_NORM[actual.dtype]
    assert relative <= limit, f"{name}: relative error {relative:.3g}, budget {limit:.3g}"
