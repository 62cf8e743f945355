r"""Mask IoU on a GPU: how :mod:`segvit_kernels.ops.mask_iou` runs in Triton.

The first launch has one program for a block of the first masks by a block of the second and a part of the
pixels: it goes through them, makes both blocks' values [masks, pixels], each between its four cells, and adds
their product. Hard values are 0 and 1 in float16, whose sums in float32 are exact, soft ones float32. A
program of the first block of one side also sums the values of the other. The second launch adds the parts in
order, so that sums repeat.

Bytes: cells are read from the caches once per block of the other side; parts are written once and read once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton._launch import Launch, addressable, cdiv, pinned, target
from segvit_kernels.triton._plan import planned
from segvit_kernels.triton._resize import between, finite, place_of, sigmoid

_LARGEST = tl.constexpr(1e30)
_MOST_PIXELS = 2**23  # of a part, whose counts float32 holds


def _config(arch: str) -> dict[str, Any]:
    """Launch parameters: ``block`` masks of either side; ``pixels`` at a time; ``programs`` that fill the
    device; ``sum`` results of an adding program; ``precision`` of float32 products; ``num_warps``;
    ``num_stages``."""
    config = dict(pinned(arch)["mask_iou"])
    config["programs"] *= pinned(arch)["multiprocessors"]
    return config


@triton.jit
def _values(
    masks_ptr, stride_n, stride_h, stride_w, n, N, p, width, pixels, h, w, step_y, step_x, threshold,
    RESIZE: tl.constexpr, BOOLEAN: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """Values [masks, pixels] of some masks, 0 past the last mask and the last pixel."""
    valid = (n[:, None] < N) & (p[None, :] < pixels)
    y, x = p // width, p % width
    rows = masks_ptr + (n.to(tl.int64) * stride_n)[:, None]
    if RESIZE:
        y0, y1, wy = place_of(y, step_y, h)
        x0, x1, wx = place_of(x, step_x, w)
        above = between(rows + (y0 * stride_h)[None, :], x0, x1, wx, stride_w, valid, _LARGEST)
        below = between(rows + (y1 * stride_h)[None, :], x0, x1, wx, stride_w, valid, _LARGEST)
        value = above + wy[None, :] * (below - above)
    else:
        ptrs = rows + (y * stride_h + x * stride_w)[None, :]
        value = tl.load(ptrs, mask=valid, other=0).to(tl.float32)
        if not BOOLEAN:
            value = finite(value, _LARGEST)
    if BOOLEAN:
        hit = value > 0.5
    elif SOFT:
        value = tl.where(valid, sigmoid(value), 0.0)
    else:
        hit = value > threshold
    if SOFT:
        if BOOLEAN:
            value = tl.where(hit & valid, 1.0, 0.0)
    else:
        value = tl.where(hit & valid, 1.0, 0.0).to(tl.float16)
    return value


@triton.jit
def _mask_iou_kernel(
    a_ptr, b_ptr, parts_ptr,
    stride_ab, stride_an, stride_ah, stride_aw, stride_bb, stride_bn, stride_bh, stride_bw,
    N, M, parts, part, width, pixels, ah, aw, bh, bw, a_step_y, a_step_x, b_step_y, b_step_x, threshold,
    BLOCK: tl.constexpr, PIXELS: tl.constexpr, RESIZE_A: tl.constexpr, RESIZE_B: tl.constexpr,
    BOOLEAN_A: tl.constexpr, BOOLEAN_B: tl.constexpr, SOFT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of a part of the pixels for a block of pairs."""
    blocks_n, blocks_m = tl.cdiv(N, BLOCK), tl.cdiv(M, BLOCK)
    i = tl.program_id(0)
    block_m, i = i % blocks_m, i // blocks_m
    block_n, i = i % blocks_n, i // blocks_n
    own, image = i % parts, (i // parts).to(tl.int64)
    n, m = block_n * BLOCK + tl.arange(0, BLOCK), block_m * BLOCK + tl.arange(0, BLOCK)
    a_ptr += image * stride_ab
    b_ptr += image * stride_bb
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    area_a, area_b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in tl.range(own * part, tl.minimum(own * part + part, pixels), PIXELS, num_stages=STAGES):
        p = first + tl.arange(0, PIXELS)
        a = _values(
            a_ptr, stride_an, stride_ah, stride_aw, n, N, p, width, pixels, ah, aw, a_step_y, a_step_x,
            threshold,
            RESIZE_A, BOOLEAN_A, SOFT,
        )  # fmt: skip
        b = _values(
            b_ptr, stride_bn, stride_bh, stride_bw, m, M, p, width, pixels, bh, bw, b_step_y, b_step_x,
            threshold,
            RESIZE_B, BOOLEAN_B, SOFT,
        )  # fmt: skip
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        area_a += tl.sum(a.to(tl.float32), 1)
        area_b += tl.sum(b.to(tl.float32), 1)
    parts_ptr += (image * parts + own) * (N * M + N + M)
    inside = (n[:, None] < N) & (m[None, :] < M)
    tl.store(parts_ptr + n[:, None] * M + m[None, :], acc, mask=inside)
    if block_m == 0:
        tl.store(parts_ptr + N * M + n, area_a, mask=n < N)
    if block_n == 0:
        tl.store(parts_ptr + N * M + N + m, area_b, mask=m < M)


@triton.jit
def _mask_iou_sum_kernel(
    parts_ptr, pairs_ptr, area_a_ptr, area_b_ptr, N, M, parts, BLOCK: tl.constexpr
):  # fmt: skip
    """The parts of some results, added in order."""
    count = N * M + N + M
    programs = tl.cdiv(count, BLOCK)
    image = (tl.program_id(0) // programs).to(tl.int64)
    i = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    parts_ptr += image * parts * count
    total = tl.zeros([BLOCK], tl.float32)
    whole = tl.zeros([BLOCK], tl.int32)
    for part in range(parts):
        found = tl.load(parts_ptr + part * count + i, mask=i < count, other=0.0)
        total += found
        whole += found.to(tl.int32)
    if pairs_ptr.dtype.element_ty == tl.int32:
        total = whole
    tl.store(pairs_ptr + image * N * M + i, total, mask=i < N * M)
    tl.store(area_a_ptr + image * N + i - N * M, total, mask=(i >= N * M) & (i < N * M + N))
    tl.store(area_b_ptr + image * M + i - N * M - N, total, mask=(i >= N * M + N) & (i < count))


def _launches(
    a: Tensor, b: Tensor, height: int, width: int, soft: bool, threshold: float, config: dict[str, Any]
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Results, still empty, and the launches that fill them."""
    batch, n, m, pixels = a.shape[0], a.shape[1], b.shape[1], height * width
    dtype = torch.float32 if soft else torch.int32
    pairs = a.new_empty(batch, n, m, dtype=dtype)
    area_a, area_b = a.new_empty(batch, n, dtype=dtype), a.new_empty(batch, m, dtype=dtype)
    if batch == 0 or n + m == 0:
        return (pairs, area_a, area_b), []
    a, b = (addressable(t, 2) for t in (a, b))
    block, step = config["block"], config["pixels"]
    blocks = max(1, cdiv(n, block)) * max(1, cdiv(m, block))
    parts = max(1, min(config["programs"] // (batch * blocks), cdiv(pixels, step)))
    part = cdiv(cdiv(pixels, max(parts, cdiv(pixels, _MOST_PIXELS))), step) * step
    parts = cdiv(pixels, part)
    partial = a.new_empty(batch, parts, n * m + n + m, dtype=torch.float32)
    sizes = [tuple(t.shape[2:]) for t in (a, b)]
    booleans = [t.dtype == torch.bool for t in (a, b)]
    arguments = {
        "a_ptr": a.view(torch.uint8) if booleans[0] else a,
        "b_ptr": b.view(torch.uint8) if booleans[1] else b,
        "parts_ptr": partial,
        **{f"stride_a{axis}": s for axis, s in zip("bnhw", a.stride(), strict=True)},
        **{f"stride_b{axis}": s for axis, s in zip("bnhw", b.stride(), strict=True)},
        "N": n,
        "M": m,
        "parts": parts,
        "part": part,
        "width": width,
        "pixels": pixels,
        **{
            f"{s}{axis}": size
            for s, given in zip("ab", sizes, strict=True)
            for axis, size in zip("hw", given, strict=True)
        },
        **{
            f"{s}_step_{axis}": size / whole
            for s, given in zip("ab", sizes, strict=True)
            for axis, size, whole in zip("yx", given, (height, width), strict=True)
        },
        "threshold": threshold,
    }
    constants = {
        "BLOCK": block,
        "PIXELS": step,
        "RESIZE_A": sizes[0] != (height, width),
        "RESIZE_B": sizes[1] != (height, width),
        "BOOLEAN_A": booleans[0],
        "BOOLEAN_B": booleans[1],
        "SOFT": soft,
        "PRECISION": config["precision"] if soft else None,
        "STAGES": config["num_stages"],
    }
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    main = Launch(_mask_iou_kernel, batch * parts * blocks, arguments, constants, options)
    arguments = {
        "parts_ptr": partial,
        "pairs_ptr": pairs,
        "area_a_ptr": area_a,
        "area_b_ptr": area_b,
        "N": n,
        "M": m,
        "parts": parts,
    }
    programs = batch * cdiv(n * m + n + m, config["sum"])
    adding = Launch(_mask_iou_sum_kernel, programs, arguments, {"BLOCK": config["sum"]}, {"num_warps": 4})
    return (pairs, area_a, area_b), [main, adding]


@planned
def mask_iou(
    a: Tensor,
    b: Tensor,
    height: int,
    width: int,
    soft: bool,
    threshold: float,
    *,
    config: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Launcher of ``segvit::mask_iou``; ``config`` replaces entries of :func:`_config`."""
    return _launches(a, b, height, width, soft, threshold, {**_config(target(a.device)), **(config or {})})
