"""LayerNorm of all tokens, and the strided subset of it and of its input, in one read of the input.

The input side of query-based down-sampling (SegViT, NeurIPS 2022, section 3.3): keys and values are made of
all normalised tokens, queries and the residual of every ``stride``-th one in each direction. Of
x (B, prefix + h·w, C), the grid row by row:

    n = (x − μ) r · w + b      r = 1 / √(σ² + ε)      n_sub = n[kept]      x_sub = x[kept]

where μ and σ² are the mean and the (biased) variance of a token, and the kept tokens are the prefix and rows
0, s, 2s, … by columns 0, s, 2s, … of the grid: prefix + ⌈h/s⌉·⌈w/s⌉ of them.

Kept for the backward: x, the weight, and μ and r in float32 (float64 for float64 inputs). With
g = dn + scatter(dn_sub), x̂ = (x − μ) r and means over the channels of a token:

    dx = r (w∘g − mean(w∘g) − x̂ mean(w∘g∘x̂)) + scatter(dx_sub)      dw = Σ g∘x̂      db = Σ g

the sums over all tokens of all images. Any of the three gradients may be missing.

Refused: anything but a 3-D x of a floating dtype whose tokens are the prefix and the grid, with a weight and
a bias of its width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit_kernels import _library
from segvit_kernels._autocast import autocast_dtype
from segvit_kernels.ops._autograd import (
    differentiable,
    first_derivative_only,
    full_precision,
    transformed,
)
from segvit_kernels.ops._checks import number

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_KERNEL_DTYPES = _DTYPES[:3]
_TRITON_MAX_CHANNELS = 8192


@_library.exportable
class SubsampledNorm(NamedTuple):
    """``normed`` (B, N, C) of all tokens; ``normed_sub`` and ``x_sub`` (B, N', C) of the kept ones."""

    normed: Tensor
    normed_sub: Tensor
    x_sub: Tensor


def subsample_layer_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    grid: tuple[int, int],
    stride: int = 2,
    prefix_tokens: int = 0,
    eps: float = 1e-6,
) -> SubsampledNorm:
    """The meaning of :func:`subsample_layer_norm` in ordinary PyTorch; arguments as there."""
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    kept, x_sub = (subsample_tokens(tokens, grid, stride, prefix_tokens) for tokens in (normed, x))
    return SubsampledNorm(normed, kept, x_sub)


def subsample_tokens(tokens: Tensor, grid: tuple[int, int], stride: int, prefix_tokens: int) -> Tensor:
    """The prefix tokens, and every ``stride``-th row and column of the grid's."""
    prefix, patches = tokens[:, :prefix_tokens], tokens[:, prefix_tokens:]
    return torch.cat([prefix, patches.unflatten(1, grid)[:, ::stride, ::stride].flatten(1, 2)], dim=1)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _kept(height: int, width: int, stride: int) -> tuple[int, int]:
    """Rows and columns of the kept grid."""
    return (height + stride - 1) // stride, (width + stride - 1) // stride


def _fwd_eager(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    height: int,
    width: int,
    stride: int,
    prefix_tokens: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    statistics = _statistics_dtype(x)
    factor, shift = (None if p is None else p.to(statistics) for p in (weight, bias))
    normed, mean, rstd = torch.native_layer_norm(x.to(statistics), x.shape[-1:], factor, shift, eps)
    normed = normed.to(dtype)
    grid, kept = (height, width), _kept(height, width, stride)

    def subsample(tokens: Tensor) -> Tensor:
        # Always a copy: an operator's results share no memory with its arguments.
        result = tokens.new_empty(x.shape[0], prefix_tokens + kept[0] * kept[1], x.shape[2])
        result[:, :prefix_tokens] = tokens[:, :prefix_tokens]
        patches = tokens[:, prefix_tokens:].unflatten(1, grid)[:, ::stride, ::stride]
        result[:, prefix_tokens:].unflatten(1, kept).copy_(patches)
        return result

    return normed, subsample(normed), subsample(x), mean.squeeze(-1), rstd.squeeze(-1)


def _bwd_eager(
    grad_normed: Tensor | None,
    grad_normed_sub: Tensor | None,
    grad_x_sub: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    height: int,
    width: int,
    stride: int,
    prefix_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = mean.dtype
    grid, kept = (height, width), _kept(height, width, stride)

    def add_scattered(total: Tensor, sub: Tensor | None) -> None:
        if sub is not None:
            total[:, :prefix_tokens] += sub[:, :prefix_tokens]
            patches = total[:, prefix_tokens:].unflatten(1, grid)[:, ::stride, ::stride]
            patches += sub[:, prefix_tokens:].unflatten(1, kept)

    if grad_normed is None and grad_normed_sub is None:
        grad_x = x.new_zeros(x.shape, dtype=statistics)
        grad_weight, grad_bias = (mean.new_zeros(0 if weight is None else weight.shape) for _ in range(2))
    else:
        if grad_normed is None:
            grad = x.new_zeros(x.shape, dtype=statistics)
        else:
            grad = grad_normed.to(statistics, copy=True)
        add_scattered(grad, grad_normed_sub)
        affine = weight is not None
        factor = None if weight is None else weight.to(statistics)
        # The bias itself is not needed for its gradient; whatever has its shape will do.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad, x.to(statistics), x.shape[-1:], mean.unsqueeze(-1), rstd.unsqueeze(-1), factor, factor,
            [True, affine, affine],
        )  # fmt: skip
        if not affine:
            grad_weight, grad_bias = mean.new_empty(0), mean.new_empty(0)
    add_scattered(grad_x, grad_x_sub)
    return grad_x.to(x.dtype), grad_weight, grad_bias


def _fwd_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    height: int,
    width: int,
    stride: int,
    prefix_tokens: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, channels = x.shape
    rows, columns = _kept(height, width, stride)
    sub = (batch, prefix_tokens + rows * columns, channels)
    return (
        x.new_empty(batch, tokens, channels, dtype=dtype),
        x.new_empty(sub, dtype=dtype),
        x.new_empty(sub),
        x.new_empty(batch, tokens, dtype=_statistics_dtype(x)),
        x.new_empty(batch, tokens, dtype=_statistics_dtype(x)),
    )


def _bwd_fake(
    grad_normed: Tensor | None,
    grad_normed_sub: Tensor | None,
    grad_x_sub: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    size = 0 if weight is None else x.shape[2]
    return x.new_empty(x.shape), mean.new_empty(size), mean.new_empty(size)


def _fwd_macs(x: tuple[int, ...], weight: tuple[int, ...] | None, *_: Any) -> int:
    # fvcore's estimate of a LayerNorm.
    return (4 if weight is None else 5) * math.prod(x)


def _bwd_macs(
    grad_normed: Any,
    grad_normed_sub: Any,
    grad_x_sub: Any,
    x: tuple[int, ...],
    weight: tuple[int, ...] | None,
    *_: Any,
) -> int:
    return 2 * _fwd_macs(x, weight)


def _kernels_refuse(backend: str, x: Tensor) -> Exception | None:
    if x.dtype not in _KERNEL_DTYPES:
        return TypeError(f"backend {backend!r} takes float32, float16 and bfloat16; x is {x.dtype}")
    if backend == "triton" and x.shape[-1] > _TRITON_MAX_CHANNELS:
        return ValueError(
            f"backend 'triton' takes up to {_TRITON_MAX_CHANNELS} channels; x has shape {tuple(x.shape)}"
        )
    return None


# Sizes of the grid are SymInt, so that one compiled graph serves every image size.
_subsample_norm_fwd = _library.define(
    "subsample_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, SymInt height, SymInt width, int stride, "
    "SymInt prefix_tokens, float eps, ScalarType dtype) "
    "-> (Tensor normed, Tensor normed_sub, Tensor x_sub, Tensor mean, Tensor rstd)",
    eager=_fwd_eager,
    fake=_fwd_fake,
    macs=_fwd_macs,
    refuse=lambda backend, x, *_: _kernels_refuse(backend, x),
)

_subsample_norm_bwd = _library.define(
    "subsample_norm_bwd(Tensor? grad_normed, Tensor? grad_normed_sub, Tensor? grad_x_sub, Tensor x, "
    "Tensor? weight, Tensor mean, Tensor rstd, SymInt height, SymInt width, int stride, "
    "SymInt prefix_tokens) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    eager=_bwd_eager,
    fake=_bwd_fake,
    macs=_bwd_macs,
    refuse=lambda backend, grad_normed, grad_normed_sub, grad_x_sub, x, *_: _kernels_refuse(backend, x),
)


class SubsampleNormFunction(torch.autograd.Function):
    """``segvit::subsample_norm_fwd`` with ``segvit::subsample_norm_bwd`` as its derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        height: int,
        width: int,
        stride: int,
        prefix_tokens: int,
        eps: float,
        dtype: torch.dtype,
        backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed, normed_sub, x_sub, mean, rstd = _subsample_norm_fwd(
            x, weight, bias, height, width, stride, prefix_tokens, eps, dtype, backend
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.options = (height, width, stride, prefix_tokens, backend)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return normed, normed_sub, x_sub

    @staticmethod
    @first_derivative_only("subsample_layer_norm", "subsample_layer_norm_reference")
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        if all(g is None for g in gradients):
            return (None,) * 10
        x, weight, mean, rstd = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = _subsample_norm_bwd(*gradients, x, weight, mean, rstd, *ctx.options)
        grad_weight = None if weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
        return (grad_x, grad_weight, grad_bias, *(None,) * 7)


def subsample_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    grid: tuple[int, int],
    stride: int = 2,
    prefix_tokens: int = 0,
    eps: float = 1e-6,
    backend: str | None = None,
) -> SubsampledNorm:
    """LayerNorm of all tokens, and of every ``stride``-th row and column of their grid, in one pass.

    The input side of query-based down-sampling (SegViT, NeurIPS 2022, section 3.3); the formulas, the
    gradient included, stand at the top of this module.

    Args:
        x: tokens, (B, prefix + h·w, C): the prefix tokens, then the grid row by row; float32, float16,
            bfloat16 or float64 (eager only).
        weight: factor of the normalised tokens, (C,), float32 or the dtype of ``x``; ``None`` for ones.
        bias: (C,), float32 or the dtype of ``x``, or ``None``; refused without a weight.
        grid: rows h and columns w of the tokens, any two, odd ones included.
        stride: rows 0, s, 2s, … and columns 0, s, 2s, … are kept.
        prefix_tokens: how many tokens precede the grid (class and register tokens); all are kept.
        eps: added to the variance.
        backend: one of ``segvit_kernels.BACKENDS``; chosen by device unless given.

    Returns:
        ``normed`` (B, prefix + h·w, C), ``normed_sub`` and ``x_sub`` (B, prefix + ⌈h/s⌉·⌈w/s⌉, C), in the
        dtype of ``x``; under autocast ``normed`` and ``normed_sub`` come in its dtype, for the projections
        that follow, and ``x_sub``, the residual, stays as it is. All are differentiable in ``x``, ``weight``
        and ``bias``, any may be left unused, and gradients are bitwise repeatable. Statistics and sums are
        float32, but for float64: a token that spreads beyond about 1e19, whose variance float32 does not
        hold, is NaN in all kernels, and zeros or NaN in eager, as in ``F.layer_norm``.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes or devices disagree, ``stride``, ``prefix_tokens`` or ``eps`` is out of range, or
            the backend is unknown.
        BackendUnavailableError: an explicitly chosen backend cannot run here.
    """
    height, width = _validate(x, weight, bias, grid, stride, prefix_tokens, eps)
    dtype = x.dtype
    if dtype != torch.float64:
        dtype = autocast_dtype(x.device) or dtype
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    if transformed(backend):
        (plain,), (factor, shift) = full_precision(x), full_precision(weight, bias)
        normed, normed_sub, _ = subsample_layer_norm_reference(
            plain, factor, shift, grid=(height, width), stride=stride, prefix_tokens=prefix_tokens, eps=eps
        )
        x_sub = subsample_tokens(x, (height, width), stride, prefix_tokens)
        return SubsampledNorm(normed.to(dtype), normed_sub.to(dtype), x_sub)
    arguments = (x, weight, bias, height, width, stride, prefix_tokens, float(eps), dtype, backend)
    if differentiable(x, weight, bias):
        return SubsampledNorm(*SubsampleNormFunction.apply(*arguments))
    return SubsampledNorm(*_subsample_norm_fwd(*arguments)[:3])


def _validate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grid: tuple[int, int],
    stride: int,
    prefix_tokens: int,
    eps: float,
) -> tuple[int, int]:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; expected a tensor")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; expected float32, float16, bfloat16 or float64")
    if x.ndim != 3 or x.shape[2] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (batch, tokens, channels)")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name} is a {type(parameter).__name__}; expected a tensor or None")
        if parameter.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"{name} has dtype {parameter.dtype}; expected float32 or {x.dtype}, the dtype of x"
            )
        if parameter.device != x.device:
            raise ValueError(f"{name} is on {parameter.device}; expected {x.device}, the device of x")
        if parameter.shape != x.shape[2:]:
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}; expected {tuple(x.shape[2:])}, the channels of x"
            )
    if weight is None and bias is not None:
        raise ValueError("bias is given without a weight; expected both, the weight alone, or neither")
    number("eps", eps, 0)
    return check_tokens(x, grid, stride, prefix_tokens)


def check_tokens(x: Tensor, grid: tuple[int, int], stride: int, prefix_tokens: int) -> tuple[int, int]:
    """Rows and columns of the grid, if it and the prefix are the tokens of ``x``."""
    if not (isinstance(grid, (tuple, list)) and len(grid) == 2 and all(map(_positive, grid))):
        raise ValueError(f"grid is {grid!r}; expected the rows and columns of the tokens")
    if not _positive(stride):
        raise ValueError(f"stride is {stride!r}; expected a positive integer")
    if not (_positive(prefix_tokens) or prefix_tokens == 0):
        raise ValueError(f"prefix_tokens is {prefix_tokens!r}; expected a number of tokens")
    height, width = grid
    if x.shape[1] != prefix_tokens + height * width:
        raise ValueError(
            f"x has {x.shape[1]} tokens; expected {prefix_tokens + height * width}, "
            f"{prefix_tokens} of the prefix and {height}×{width} of the grid"
        )
    return height, width


def _positive(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and bool(value >= 1)
