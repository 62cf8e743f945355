r"""A linear layer with packed weights: half-precision models on CPUs with half-precision arithmetic.

.. math::
    Y = X W^\top + b, \qquad \text{or} \quad Y = \text{GELU}(X W^\top + b), \quad
    \text{GELU}(x) = x \, \Phi(x)

Layout is (..., features). bfloat16 dot products are no faster than float32 arithmetic on CPUs without matrix
units, but float16 multiply-adds are, by two. The kernel runs on these: rows of X and columns of Wᵀ are scaled
by powers of two, so that nothing leaves the range of float16. Products are added in float16 in chains of 32
and groups of four such chains, and these in float32: the error, 2⁻¹⁰ of a typical result, is half of the
rounding of a bfloat16 result and four times that of a float16 result. A number of X or W is exact down to
2⁻²⁰ (float16: 2⁻¹⁷) of the largest finite one in its row, and below errs by 2⁻²⁸ of that at most.

Packed once, W in the kernel's order (:func:`pack_weight`): panels of 48 outputs, float16. The depth goes by
pairs of numbers; of 16 pairs the order is 0, 4, 8, 12, 1, 5, …, which transposing X in registers gives.

Nothing is kept for a backward: where a gradient is asked for, and under autocast, the layer is PyTorch's own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit_kernels import _library
from segvit_kernels.ops._autograd import autocast_dtype, differentiable, transformed

_HALVES = (torch.float16, torch.bfloat16)
_PANEL = 48  # outputs, as in csrc/cpu/linear.h
_DEPTH = 32
_TOP = 3  # scaled numbers lie below 2^4


@_library.exportable
class PackedWeight(NamedTuple):
    """A weight (N, K) for the kernel.

    Attributes:
        panels: float16, (⌈N/48⌉, ⌈K/32⌉·16, 48, 2).
        exponents: e of every output, float32, (⌈N/48⌉·48,): weights are 2^(e - 3) times those in ``panels``.
    """

    panels: Tensor
    exponents: Tensor


@torch.no_grad()
def pack_weight(weight: Tensor) -> PackedWeight:
    """A weight in the kernel's order, for the argument ``packed`` of :func:`linear`.

    Args:
        weight: (N, K), float16 or bfloat16.

    Raises:
        TypeError: another dtype.
        ValueError: another shape.
    """
    if not isinstance(weight, Tensor) or weight.dtype not in _HALVES:
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight is {found}; expected float16 or bfloat16")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected (outputs, inputs), at least one of both"
        )
    values = weight.float()
    largest = values.abs().nan_to_num(posinf=0).amax(1)
    exponents = torch.where(largest > 0, torch.frexp(largest).exponent - 1, 0)
    # In float64, which holds the power of two for the smallest numbers too.
    values = (values.double() * torch.exp2(_TOP - exponents.double())[:, None]).half()
    (outputs, depth), (panels, groups) = (
        weight.shape,
        (-(-weight.shape[0] // _PANEL), -(-weight.shape[1] // _DEPTH)),
    )
    values = F.pad(values, (0, groups * _DEPTH - depth, 0, panels * _PANEL - outputs))
    pairs = values.view(torch.int32).view(panels, _PANEL, groups, 4, 4).permute(0, 2, 4, 3, 1).contiguous()
    return PackedWeight(
        pairs.view(torch.float16).view(panels, groups * _DEPTH // 2, _PANEL, 2),
        F.pad(exponents.float(), (0, panels * _PANEL - outputs)),
    )


def linear_reference(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False
) -> Tensor:
    """The meaning of :func:`linear` in ordinary PyTorch."""
    output = F.linear(input, weight, bias)
    return F.gelu(output) if gelu else output


def _eager(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    panels: Tensor | None,
    exponents: Tensor | None,
    gelu: bool,
) -> Tensor:
    return linear_reference(input, weight, bias, gelu=gelu)


def _fake(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _macs(input: tuple[int, ...], weight: tuple[int, ...], *_: Any) -> int:
    return torch.Size(input).numel() * weight[0]


def _refuse(backend: str, input: Tensor, weight: Tensor, bias: Any, panels: Any, *_: Any) -> Exception | None:
    if input.dtype not in _HALVES:
        return TypeError(f"backend {backend!r} takes float16 and bfloat16; input is {input.dtype}")
    if panels is None:
        return ValueError(f"backend {backend!r} takes packed weights; packed is None: see pack_weight")
    return None


_linear = _library.define(
    "linear(Tensor input, Tensor weight, Tensor? bias, Tensor? panels, Tensor? exponents, bool gelu) "
    "-> Tensor output",
    eager=_eager,
    fake=_fake,
    macs=_macs,
    refuse=_refuse,
    backends=("cpu",),
    isa="avx512_fp16",
)


def why_not_packed(weight: Tensor) -> str | None:
    """Why packing a weight would gain nothing here: PyTorch's own layer would run; ``None`` if it gains."""
    if weight.dtype not in _HALVES:
        return f"packed weights are for float16 and bfloat16, not {weight.dtype}"
    if weight.device.type != "cpu":
        return f"packed weights are for the CPU, not {weight.device.type}"
    if weight.numel() == 0:
        return "the weight is empty"
    if weight.dtype == torch.bfloat16 and _library.torch_has_amx():
        return "PyTorch's own bfloat16 products use AMX, which is faster than AVX512-FP16"
    return _library.why_not_operator("linear", "cpu", weight.device)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    packed: PackedWeight | None = None,
    gelu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``F.linear``, followed by the exact GELU if asked for, in one pass where there are packed weights.

    Packed weights are used for half-precision tensors on CPUs with AVX512-FP16, without autograd and without
    autocast; in all other cases, and on the backend ``eager``, this is PyTorch's own layer. How it is
    computed, and how exactly, stands at the top of this module.

    Args:
        input: (..., K), float16, bfloat16, float32 or float64.
        weight: (N, K), dtype of ``input``.
        bias: (N,), dtype of ``input``, or ``None``.
        packed: of :func:`pack_weight`, made from this very weight.
        gelu: apply the exact (erf) GELU.
        backend: ``"eager"`` or ``"cpu"``; chosen by device unless given.

    Returns:
        (..., N), dtype of ``input``.

    Raises:
        TypeError: dtypes differ or are not supported.
        ValueError: shapes or devices disagree, ``packed`` is not of this weight's shape, or the backend is
            unknown.
        BackendUnavailableError: an explicitly chosen backend cannot run here.
    """
    autograd = transformed(backend) or differentiable(input, weight, bias)
    autocast = autocast_dtype(input.device) is not None
    if backend is None and (packed is None or autograd or autocast or input.dtype not in _HALVES):
        return linear_reference(input, weight, bias, gelu=gelu)
    _validate(input, weight, bias, packed)
    if autograd and backend == "eager":
        return linear_reference(input, weight, bias, gelu=gelu)
    if autograd and backend in _library.BACKENDS:
        raise _library.BackendUnavailableError(
            f"segvit::linear: backend {backend!r} has no derivative: use eager, or torch.no_grad()"
        )
    panels, exponents = (None, None) if packed is None else packed
    return _linear(input, weight, bias, panels, exponents, gelu, backend)


def _validate(input: Tensor, weight: Tensor, bias: Tensor | None, packed: PackedWeight | None) -> None:
    if not input.is_floating_point():
        raise TypeError(f"input has dtype {input.dtype}; expected a floating dtype")
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (outputs, inputs)")
    outputs, depth = weight.shape
    if input.ndim < 1 or input.shape[-1] != depth:
        raise ValueError(f"input has shape {tuple(input.shape)}; expected (..., {depth}), as weight has")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected {(outputs,)}, the outputs of weight")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {input.dtype}, the dtype of input")
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {input.device}, the device of input")
    if packed is not None:
        panels = -(-outputs // _PANEL)
        shape = (panels, -(-depth // _DEPTH) * _DEPTH // 2, _PANEL, 2)
        if tuple(packed.panels.shape) != shape or tuple(packed.exponents.shape) != (panels * _PANEL,):
            raise ValueError(
                f"packed has panels of shape {tuple(packed.panels.shape)}; expected {shape}, those of weight"
            )
