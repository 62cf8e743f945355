r"""LayerNorm with subsampling on a GPU: how :mod:`segvit_kernels.ops.subsample_norm` runs in Triton.

Forward: one launch, a program for a few whole tokens. Their channels stay in registers for the mean, then the
centred squares, then the three results; a kept token is stored again among the kept ones. Bytes for n = B·N·C
elements: x read once, ``normed`` written once, the kept share (1/s²) written twice, 8 a token for the
statistics: (2 + 2/s²) n elements.

Backward: as many programs as the chip holds, each with a contiguous range of tokens. A token's x and its
gradients are read once and its dx is written once. The gradients of weight and bias are summed over the range
in float32 in registers and written to a row of partials, which a second launch adds in fixed order:
(3 + 2/s²) n elements, and 16 C bytes a program for the partials, written and read.

Widths that are no powers of two are padded in registers only. Offsets of tokens are 64-bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton._launch import Launch, cdiv, next_power_of_2, pinned, target
from segvit_kernels.triton._plan import planned

_MAX_WARPS = 16
_LEAST_TOKENS = 8  # of a backward program: below, partials would weigh more than the tokens


def _tile(name: str, channels: int, dtype: torch.dtype, arch: str) -> dict[str, int]:
    config = dict(pinned(arch)[name]["single" if dtype == torch.float32 else "half"])
    padded, elements = next_power_of_2(channels), config.pop("elements")
    if channels % 8:
        elements //= 4  # addresses of tokens that vector accesses cannot reach need the registers
    # More than the elements of a program in one token: more warps, each with as many as before.
    warps = config["num_warps"] * max(1, padded // elements)
    return {**config, "block_n": min(32, max(1, elements // padded)), "num_warps": min(_MAX_WARPS, warps)}


def _fwd_config(shape: tuple[int, int, int], dtype: torch.dtype, arch: str) -> dict[str, Any]:
    """Launch parameters of the forward.

    Args:
        shape: batch, tokens, channels.
        dtype: of x.
        arch: what :func:`segvit_kernels.triton._launch.target` says of a device.

    Returns:
        ``block_n`` tokens in one program, ``num_warps``, ``num_stages``.
    """
    return _tile("subsample_norm_fwd", shape[2], dtype, arch)


def _bwd_config(shape: tuple[int, int, int], dtype: torch.dtype, arch: str) -> dict[str, Any]:
    """Launch parameters of the backward; arguments as in :func:`_fwd_config`.

    Returns:
        ``block_n`` tokens at a time, ``steps`` of them in one program, ``num_warps``, ``num_stages``.
    """
    config = _tile("subsample_norm_bwd", shape[2], dtype, arch)
    programs = config.pop("programs") * pinned(arch)["multiprocessors"]
    blocks = cdiv(shape[0] * shape[1], config["block_n"])
    least = cdiv(_LEAST_TOKENS, config["block_n"])
    return {**config, "steps": max(least, cdiv(blocks, programs))}


@triton.jit
def _places(rows, N, prefix, width, columns, STRIDE: tl.constexpr):
    """Image, token, whether it is kept, and its place among the kept ones, of rows of (B·N, C)."""
    b, token = rows // N, rows % N
    cell = token - prefix
    y, x = cell // width, cell % width
    kept = (cell < 0) | ((y % STRIDE == 0) & (x % STRIDE == 0))
    place = tl.where(cell < 0, token, prefix + y // STRIDE * columns + x // STRIDE)
    return b.to(tl.int64), token.to(tl.int64), kept, place.to(tl.int64)


@triton.jit
def _subsample_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, normed_ptr, normed_sub_ptr, x_sub_ptr, mean_ptr, rstd_ptr,
    stride_xb, stride_xn, rows_total, N, N_sub, prefix, width, columns, eps,
    STRIDE: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    SHARE: tl.constexpr = 1.0 / C  # a division by C would be the hardware's, which errs by two units
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    b, token, kept, place = _places(rows, N, prefix, width, columns, STRIDE)
    inside = (c[None, :] < C) & (rows[:, None] < rows_total)  # [BLOCK_N, BLOCK_C]
    x = tl.load((x_ptr + b * stride_xb + token * stride_xn)[:, None] + c[None, :], mask=inside, other=0.0)
    x32 = x.to(tl.float32)
    mean = tl.sum(x32, 1) * SHARE
    centred = tl.where(c[None, :] < C, x32 - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) * SHARE
    # Of an infinite one NaN, as the numbers it is of would be: zeros would look as if all were well.
    rstd = tl.where(variance < float("inf"), 1.0 / tl.sqrt_rn(variance + eps), float("nan"))
    normed = centred * rstd[:, None]
    if weight_ptr is not None:
        normed *= tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    normed = normed.to(normed_ptr.dtype.element_ty)
    tl.store((normed_ptr + rows.to(tl.int64) * C)[:, None] + c[None, :], normed, mask=inside)
    sub = ((b * N_sub + place) * C)[:, None] + c[None, :]
    tl.store(normed_sub_ptr + sub, normed, mask=inside & kept[:, None])
    tl.store(x_sub_ptr + sub, x, mask=inside & kept[:, None])
    tl.store(mean_ptr + rows, mean, mask=rows < rows_total)
    tl.store(rstd_ptr + rows, rstd, mask=rows < rows_total)


@triton.jit
def _subsample_norm_bwd_kernel(
    dn_ptr, dn_sub_ptr, dx_sub_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr,
    stride_gb, stride_gn, stride_sb, stride_sn, stride_rb, stride_rn, stride_xb, stride_xn,
    rows_total, N, N_sub, prefix, width, columns, steps,
    STRIDE: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial (programs, 2, C): gradients of the weight and of the bias over the tokens of a program."""
    start = tl.program_id(0) * steps * BLOCK_N
    c = tl.arange(0, BLOCK_C)
    SHARE: tl.constexpr = 1.0 / C
    NORM: tl.constexpr = dn_ptr is not None or dn_sub_ptr is not None
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        dw = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        db = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for step in range(steps):
        rows = start + step * BLOCK_N + tl.arange(0, BLOCK_N)
        b, token, kept, place = _places(rows, N, prefix, width, columns, STRIDE)
        inside = (c[None, :] < C) & (rows[:, None] < rows_total)  # [BLOCK_N, BLOCK_C]
        dx = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        if NORM:
            x = tl.load(
                (x_ptr + b * stride_xb + token * stride_xn)[:, None] + c[None, :], mask=inside, other=0.0
            )
            mean = tl.load(mean_ptr + rows, mask=rows < rows_total, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=rows < rows_total, other=0.0)
            if dn_ptr is not None:
                ptrs = (dn_ptr + b * stride_gb + token * stride_gn)[:, None] + c[None, :]
                g = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
            if dn_sub_ptr is not None:
                ptrs = (dn_sub_ptr + b * stride_sb + place * stride_sn)[:, None] + c[None, :]
                sub = tl.load(ptrs, mask=inside & kept[:, None], other=0.0).to(tl.float32)
                g = sub if dn_ptr is None else g + sub
            xhat = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            wg = g
            if weight_ptr is not None:
                # Where g is 0, past the end, nothing is added.
                dw += g * xhat
                db += g
                wg = g * weight[None, :]
            dx = wg - (tl.sum(wg, 1) * SHARE)[:, None] - xhat * (tl.sum(wg * xhat, 1) * SHARE)[:, None]
            dx *= rstd[:, None]
        if dx_sub_ptr is not None:
            ptrs = (dx_sub_ptr + b * stride_rb + place * stride_rn)[:, None] + c[None, :]
            dx += tl.load(ptrs, mask=inside & kept[:, None], other=0.0).to(tl.float32)
        ptrs = (dx_ptr + rows.to(tl.int64) * C)[:, None] + c[None, :]
        tl.store(ptrs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if weight_ptr is not None:
        partial_ptr += tl.program_id(0).to(tl.int64) * (2 * C)
        tl.store(partial_ptr + c, tl.sum(dw, 0), mask=c < C)
        tl.store(partial_ptr + C + c, tl.sum(db, 0), mask=c < C)


@triton.jit
def _subsample_norm_bwd_parameters_kernel(
    partial_ptr, dw_ptr, db_ptr, parts, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dw and db (C), side by side: the sum over parts of partial (parts, 2 C), in fixed order."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        inside = (part[:, None] < parts) & (c[None, :] < 2 * C)
        total += tl.load(partial_ptr + (part * (2 * C))[:, None] + c[None, :], mask=inside, other=0.0)
    result = tl.sum(total, 0)
    tl.store(dw_ptr + c, result, mask=c < C)
    tl.store(db_ptr + (c - C), result, mask=(c >= C) & (c < 2 * C))


def _unit_stride(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def _strides(name: str, tensor: Tensor | None) -> dict[str, int]:
    b, n = (0, 0) if tensor is None else tensor.stride()[:2]
    return {f"stride_{name}b": b, f"stride_{name}n": n}


def _sizes(
    x: Tensor, height: int, width: int, stride: int, prefix_tokens: int, block_n: int
) -> tuple[int, dict[str, int], dict[str, int]]:
    """Kept tokens of an image, and the arguments and constants that say where they are."""
    batch, tokens, channels = x.shape
    columns = cdiv(width, stride)
    kept = prefix_tokens + cdiv(height, stride) * columns
    arguments = {
        "rows_total": batch * tokens,
        "N": tokens,
        "N_sub": kept,
        "prefix": prefix_tokens,
        "width": width,
        "columns": columns,
    }
    constants = {
        "STRIDE": stride,
        "C": channels,
        "BLOCK_N": block_n,
        "BLOCK_C": next_power_of_2(channels),
    }
    return kept, arguments, constants


def _fwd_launches(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    height: int,
    width: int,
    stride: int,
    prefix_tokens: int,
    eps: float,
    dtype: torch.dtype,
    config: dict[str, Any],
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], list[Launch]]:
    """The outputs, still empty, and the launch that fills them."""
    x, weight, bias = (_unit_stride(t) for t in (x, weight, bias))
    (batch, tokens, channels), block_n = x.shape, config["block_n"]
    kept, arguments, constants = _sizes(x, height, width, stride, prefix_tokens, block_n)
    normed = x.new_empty(x.shape, dtype=dtype)
    normed_sub = x.new_empty(batch, kept, channels, dtype=dtype)
    x_sub = x.new_empty(batch, kept, channels)
    mean, rstd = (x.new_empty(batch, tokens, dtype=torch.float32) for _ in range(2))
    results = (normed, normed_sub, x_sub, mean, rstd)
    if batch == 0:
        return results, []
    arguments = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "normed_ptr": normed,
        "normed_sub_ptr": normed_sub,
        "x_sub_ptr": x_sub,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        **_strides("x", x),
        **arguments,
        "eps": eps,
    }
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    programs = cdiv(batch * tokens, block_n)
    return results, [Launch(_subsample_norm_fwd_kernel, programs, arguments, constants, options)]


def _bwd_launches(
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
    config: dict[str, Any],
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """The gradients, still empty, and the launches that fill them."""
    grads = tuple(_unit_stride(t) for t in (grad_normed, grad_normed_sub, grad_x_sub))
    x, weight = _unit_stride(x), _unit_stride(weight)
    (batch, tokens, channels), block_n, steps = x.shape, config["block_n"], config["steps"]
    _, arguments, constants = _sizes(x, height, width, stride, prefix_tokens, block_n)
    grad_x = x.new_empty(x.shape)
    size = 0 if weight is None else channels
    if batch == 0:
        return (grad_x, mean.new_zeros(size), mean.new_zeros(size)), []
    grad_weight, grad_bias = mean.new_empty(size), mean.new_empty(size)
    programs = cdiv(batch * tokens, block_n * steps)
    partial = None if weight is None else mean.new_empty(programs, 2, channels)
    arguments = {
        "dn_ptr": grads[0],
        "dn_sub_ptr": grads[1],
        "dx_sub_ptr": grads[2],
        "x_ptr": x,
        "weight_ptr": weight,
        "mean_ptr": mean.contiguous(),
        "rstd_ptr": rstd.contiguous(),
        "dx_ptr": grad_x,
        "partial_ptr": partial,
        **_strides("g", grads[0]),
        **_strides("s", grads[1]),
        **_strides("r", grads[2]),
        **_strides("x", x),
        **arguments,
        "steps": steps,
    }
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    launches = [Launch(_subsample_norm_bwd_kernel, programs, arguments, constants, options)]
    if partial is not None:
        block = {"BLOCK_P": 64, "BLOCK_C": 32}
        arguments = {"partial_ptr": partial, "dw_ptr": grad_weight, "db_ptr": grad_bias, "parts": programs}
        programs = cdiv(2 * channels, block["BLOCK_C"])
        options = {"num_warps": 4, "num_stages": 1}
        kernel = _subsample_norm_bwd_parameters_kernel
        launches.append(Launch(kernel, programs, arguments, {"C": channels, **block}, options))
    return (grad_x, grad_weight, grad_bias), launches


@planned
def subsample_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    height: int,
    width: int,
    stride: int,
    prefix_tokens: int,
    eps: float,
    dtype: torch.dtype,
    *,
    config: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], list[Launch]]:
    """Launcher of ``segvit::subsample_norm_fwd``; ``config`` replaces entries of :func:`_fwd_config`."""
    found = _fwd_config(tuple(x.shape), x.dtype, target(x.device))
    arguments = (x, weight, bias, height, width, stride, prefix_tokens, eps, dtype)
    return _fwd_launches(*arguments, {**found, **(config or {})})


@planned
def subsample_norm_bwd(
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
    *,
    config: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Launcher of ``segvit::subsample_norm_bwd``; ``config`` replaces entries of :func:`_bwd_config`."""
    found = _bwd_config(tuple(x.shape), x.dtype, target(x.device))
    grads = (grad_normed, grad_normed_sub, grad_x_sub)
    arguments = (*grads, x, weight, mean, rstd, height, width, stride, prefix_tokens)
    return _bwd_launches(*arguments, {**found, **(config or {})})
