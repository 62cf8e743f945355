"""What the operators' derivatives share: one order of them, and function transforms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from segvit_kernels import _library


class _FirstDerivative(torch.autograd.Function):
    """Gradients as they are, depending on what they were computed from; their own derivative raises."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(ctx.message)


def first_derivative_only(name: str, reference: str) -> Callable[[Callable], Callable]:
    """Decorator of a ``Function.backward``: differentiating the gradients raises, whatever they depend on.

    ``once_differentiable`` raises where the incoming gradients need a derivative. Gradients depend on the
    saved tensors too: where nothing else needs one, as in a gradient penalty, it leaves that part out.
    """

    message = f"{name} has no second derivative; {reference}, the plain formula, has all"

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Tensor | None) -> tuple:
            with torch.no_grad():
                results = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return results
            sources = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
            given = [t for t in results if t is not None]
            if not sources or not given:
                return results
            marked = iter(_FirstDerivative.apply(message, len(given), *given, *sources))
            return tuple(None if t is None else next(marked) for t in results)

        return wrapper

    return decorate


def transformed(backend: str | None = None) -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is at work.

    Kernels know neither, and tensors inside do not say whether a derivative is wanted: the plain formulas,
    which are all of PyTorch's own operators, take over.

    Raises:
        BackendUnavailableError: another backend than eager is asked for.
    """
    _library.check_backend(backend)
    if torch.compiler.is_compiling():
        return False
    if not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0:
        return False
    if (asked := _library.requested_backend(backend)) not in (None, "eager"):
        raise _library.BackendUnavailableError(
            f"backend {asked!r} is not available under torch.func and forward-mode derivatives: use eager"
        )
    return True


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether autograd is to record what is computed from these."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


@overload
def full_precision(*tensors: Tensor) -> list[Tensor]: ...
@overload
def full_precision(*tensors: Tensor | None) -> list[Tensor | None]: ...
def full_precision(*tensors: Tensor | None) -> list[Any]:
    """The tensors in float32 at least, for plain formulas."""
    return [t if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
