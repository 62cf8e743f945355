"""Error budgets: how far a result may be from the float64 truth."""

from __future__ import annotations

import math

import torch
from torch import Tensor

RELATIVE_NORM = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest ‖out − ref‖ / ‖ref‖ against float64, by dtype."""


def approximated(dtype: torch.dtype, factors: int) -> float:
    """``ulps`` of sums of few terms that have so many factors of a GPU's approximations in each.

    Exponentials, logarithms and divisions may each err by two units by PTX, which float32 shows; PyTorch's
    own err by less than one.
    """
    return 2 * factors if dtype == torch.float32 else 2


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """‖actual − truth‖ / ‖truth‖ in float64; infinite where ``actual`` is not finite."""
    actual, truth = actual.double(), truth.double()
    if not bool(actual.isfinite().all()):
        return math.inf
    norm = truth.norm().item()
    return (actual - truth).norm().item() / norm if norm else (actual - truth).norm().item()


def assert_within_budget(
    name: str, actual: Tensor, truth: Tensor, ordinary: Tensor, *, ulps: float = 2, terms: float = 0
) -> None:
    """Hold ``actual`` to the error budget of its dtype.

    The maximum and the RMS error may be twice those that ordinary PyTorch makes in the same dtype, plus
    rounding; the relative norm may be :data:`RELATIVE_NORM`. The maximum, one element's, gets twice the
    rounding: in which order a processor adds, for us and for PyTorch, moves it by that much.

    Args:
        name: what is compared, for the message.
        actual: the result under test.
        truth: the float64 result.
        ordinary: the plain formula's result, computed in the dtype of ``actual``.
        ulps: the rounding, of which the largest error gets twice; 4 for products of three TF32 terms, which
            err by 2⁻²¹ whatever PyTorch's own do, or see :func:`approximated`.
        terms: size of what cancels in the result, whose rounding is left where that is smaller: 1 for
            1 − ratio. Sums of one or two such terms are no measure by themselves: PyTorch may err by nothing.

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
    for kind, reduce, of in (
        ("maximum", torch.max, 2 * ulps),
        ("rms", lambda x: x.square().mean().sqrt(), ulps),
    ):
        size = max(reduce(truth.abs()).item(), terms)
        found, limit = reduce(error).item(), 2 * reduce(allowed).item() + of * eps * size
        assert found <= limit, f"{name}: {kind} error {found:.3g}, budget {limit:.3g}"
    relative, limit = relative_error(actual, truth), RELATIVE_NORM[actual.dtype]
    assert relative <= limit, f"{name}: relative error {relative:.3g}, budget {limit:.3g}"
