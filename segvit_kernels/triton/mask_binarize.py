r"""Binary masks on a GPU: how :mod:`segvit_kernels.ops.mask_binarize` runs in Triton.

Two launches. In the first a program has a strip of one mask's rows and goes through its tiles. An element of
a tile is what it stores: a pixel, or a word of 32 along a row or a column, whose bits it makes one after the
other. Every pixel reads its four cells, which lie in the cache: a mask has some kilobytes. Areas and boxes
are counted in registers, element by element, and reduced once, at the end of the program; the second launch
joins the strips of a mask.

Bytes: the grids read once; an eighth of a byte a pixel written, or one for booleans; 20 bytes a program. A
tile has no barrier and nothing in shared memory. Places are float32, offsets inside a mask 32-bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton._launch import Launch, cdiv, pinned, target
from segvit_kernels.triton._plan import planned

_LAYOUTS = ("pixels", "rows", "columns")
_WORD = 32
_MERGED = 64  # masks of a program of the second launch


def _config(shape: tuple[int, int, int], layout: int, arch: str) -> dict[str, Any]:
    """Launch parameters.

    Args:
        shape: masks, height, width of the output.
        layout: 0 pixels, 1 words along rows, 2 words along columns.
        arch: what :func:`segvit_kernels.triton._launch.target` says of a device.

    Returns:
        ``tile_y`` by ``tile_x`` elements of a tile, ``rows`` of elements of a program, ``num_warps``,
        ``num_stages``.
    """
    parameters = pinned(arch)
    config = dict(parameters["mask_binarize"][_LAYOUTS[layout]])
    masks, height, _ = shape
    tiles = cdiv(cdiv(height, _WORD) if layout == 2 else height, config["tile_y"])
    programs = config.pop("programs") * parameters["multiprocessors"]
    strips = max(1, min(tiles, cdiv(programs, max(1, masks))))
    return {**config, "rows": cdiv(tiles, strips) * config["tile_y"]}


@triton.jit
def _places(index, low, step, cells):
    """Of pixels of an axis the cell before, the cell after, and its share."""
    place = ((index.to(tl.float32) + 0.5) - low) * step - 0.5
    place = tl.minimum(tl.maximum(place, 0.0), cells - 1.0)
    lower = place.to(tl.int32)
    return lower, tl.minimum(lower + 1, cells - 1), place - lower.to(tl.float32)


@triton.jit
def _cells(logits_ptr, rows, columns, threshold):
    """Logits less the threshold; one that is not a number counts as the lowest."""
    value = tl.load(logits_ptr + (rows[:, None] + columns[None, :])).to(tl.float32)
    value = tl.where(value > -1e30, value, -1e30)
    return tl.minimum(value, 1e30) - threshold


@triton.jit
def _box(boxes_ptr, low, cells):
    """Of one axis of a box its beginning, end and cells a pixel; empty where it is not finite."""
    first, last = tl.load(boxes_ptr + low), tl.load(boxes_ptr + low + 2)
    extent = last - first
    good = (extent > 0) & (extent < float("inf"))
    step = cells / tl.where(good, extent, 1.0)
    return tl.where(good, first, 0.0), tl.where(good, last, 0.0), step


@triton.jit
def _mask_binarize_kernel(
    logits_ptr, boxes_ptr, masks_ptr, partial_ptr,
    stride_b, stride_k, stride_h, stride_w, masks, K, h, w, H, W, step_y, step_x, threshold, strips, rows,
    BITS_Y: tl.constexpr, BITS_X: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """partial (5, strips, masks): area, left, top, right, bottom of a strip."""
    mask, strip = tl.program_id(0) // strips, tl.program_id(0) % strips
    first = mask.to(tl.int64)
    logits_ptr += first // K * stride_b + first % K * stride_k
    out_y, out_x = tl.cdiv(H, BITS_Y), tl.cdiv(W, BITS_X)
    masks_ptr += first * out_y * out_x
    top, left = 0.0, 0.0
    bottom, right = H + 0.0, W + 0.0
    if boxes_ptr is not None:
        top, bottom, step_y = _box(boxes_ptr + first * 4, 1, h)
        left, right, step_x = _box(boxes_ptr + first * 4, 0, w)

    area = tl.zeros([TILE_Y, TILE_X], tl.int32)
    first_x = tl.zeros([TILE_Y, TILE_X], tl.int32) + W
    first_y = tl.zeros([TILE_Y, TILE_X], tl.int32) + H
    last_x = tl.zeros([TILE_Y, TILE_X], tl.int32)
    last_y = tl.zeros([TILE_Y, TILE_X], tl.int32)
    for y0 in range(strip * rows, tl.minimum(strip * rows + rows, out_y), TILE_Y):
        for x0 in range(0, out_x, TILE_X):
            j, i = y0 + tl.arange(0, TILE_Y), x0 + tl.arange(0, TILE_X)
            word = tl.zeros([TILE_Y, TILE_X], tl.int32)
            for bit in tl.range(0, BITS_Y * BITS_X, num_stages=1):
                y, x = j, i
                if BITS_Y > 1:
                    y = j * BITS_Y + bit
                if BITS_X > 1:
                    x = i * BITS_X + bit
                above, below, share_y = _places(y, top, step_y, h)
                before, after, share_x = _places(x, left, step_x, w)
                above, below, before, after = (
                    above * stride_h,
                    below * stride_h,
                    before * stride_w,
                    after * stride_w,
                )
                share_x = share_x[None, :]  # [TILE_Y, TILE_X]
                upper = _cells(logits_ptr, above, before, threshold) * (1.0 - share_x)
                upper += _cells(logits_ptr, above, after, threshold) * share_x
                lower = _cells(logits_ptr, below, before, threshold) * (1.0 - share_x)
                lower += _cells(logits_ptr, below, after, threshold) * share_x
                value = upper * (1.0 - share_y)[:, None] + lower * share_y[:, None]
                inside_y = (y + 0.5 >= top) & (y + 0.5 < bottom) & (y < H)
                inside_x = (x + 0.5 >= left) & (x + 0.5 < right) & (x < W)
                on = (value > 0) & inside_y[:, None] & inside_x[None, :]
                word |= on.to(tl.int32) << bit
                area += on.to(tl.int32)
                first_x = tl.minimum(first_x, tl.where(on, x[None, :], W))
                first_y = tl.minimum(first_y, tl.where(on, y[:, None], H))
                last_x = tl.maximum(last_x, tl.where(on, x[None, :] + 1, 0))
                last_y = tl.maximum(last_y, tl.where(on, y[:, None] + 1, 0))
            exists = (j < out_y)[:, None] & (i < out_x)[None, :]
            offsets = i[None, :] * out_y + j[:, None] if BITS_Y > 1 else j[:, None] * out_x + i[None, :]
            tl.store(masks_ptr + offsets, word.to(masks_ptr.dtype.element_ty), mask=exists)

    partial_ptr += strip * masks + mask
    plane = strips * masks
    tl.store(partial_ptr, tl.sum(tl.sum(area, 1), 0))
    tl.store(partial_ptr + plane, tl.min(tl.min(first_x, 1), 0))
    tl.store(partial_ptr + 2 * plane, tl.min(tl.min(first_y, 1), 0))
    tl.store(partial_ptr + 3 * plane, tl.max(tl.max(last_x, 1), 0))
    tl.store(partial_ptr + 4 * plane, tl.max(tl.max(last_y, 1), 0))


@triton.jit
def _mask_binarize_merge_kernel(partial_ptr, areas_ptr, tight_ptr, masks, strips, BLOCK: tl.constexpr):
    """Strips of a mask, one after the other."""
    mask = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists, plane = mask < masks, strips * masks
    area = tl.zeros([BLOCK], tl.int32)
    left = tl.full([BLOCK], 2147483647, tl.int32)
    top = tl.full([BLOCK], 2147483647, tl.int32)
    right = tl.zeros([BLOCK], tl.int32)
    bottom = tl.zeros([BLOCK], tl.int32)
    for strip in range(strips):
        ptrs = partial_ptr + strip * masks + mask
        area += tl.load(ptrs, mask=exists, other=0)
        left = tl.minimum(left, tl.load(ptrs + plane, mask=exists, other=0))
        top = tl.minimum(top, tl.load(ptrs + 2 * plane, mask=exists, other=0))
        right = tl.maximum(right, tl.load(ptrs + 3 * plane, mask=exists, other=0))
        bottom = tl.maximum(bottom, tl.load(ptrs + 4 * plane, mask=exists, other=0))
    tl.store(areas_ptr + mask, area, mask=exists)
    tl.store(tight_ptr + mask * 4, tl.where(area > 0, left, 0), mask=exists)
    tl.store(tight_ptr + mask * 4 + 1, tl.where(area > 0, top, 0), mask=exists)
    tl.store(tight_ptr + mask * 4 + 2, right, mask=exists)
    tl.store(tight_ptr + mask * 4 + 3, bottom, mask=exists)


def _launches(
    mask_logits: Tensor,
    boxes: Tensor | None,
    height: int,
    width: int,
    threshold: float,
    layout: int,
    config: dict[str, Any],
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """The results, still empty, and the launches that fill them."""
    batch, count, h, w = mask_logits.shape
    if (h - 1) * abs(mask_logits.stride(2)) + (w - 1) * abs(mask_logits.stride(3)) >= 2**31:
        mask_logits = mask_logits.contiguous()
    bits_y, bits_x = ((1, 1), (1, _WORD), (_WORD, 1))[layout]
    shape = (cdiv(height, bits_y), cdiv(width, bits_x))
    masks = mask_logits.new_empty(
        (batch, count, *(shape[::-1] if layout == 2 else shape)),
        dtype=torch.int32 if layout else torch.bool,
    )
    areas = mask_logits.new_empty((batch, count), dtype=torch.int32)
    tight = mask_logits.new_empty((batch, count, 4), dtype=torch.int32)
    total, strips = batch * count, cdiv(shape[0], config["rows"])
    if total == 0:
        return (masks, areas, tight), []
    partial = mask_logits.new_empty((5, strips, total), dtype=torch.int32)
    arguments = {
        "logits_ptr": mask_logits,
        "boxes_ptr": boxes,
        "masks_ptr": masks if layout else masks.view(torch.uint8),
        "partial_ptr": partial,
        **{f"stride_{axis}": s for axis, s in zip("bkhw", mask_logits.stride(), strict=True)},
        "masks": total,
        "K": count,
        "h": h,
        "w": w,
        "H": height,
        "W": width,
        "step_y": h / height,
        "step_x": w / width,
        "threshold": threshold,
        "strips": strips,
        "rows": config["rows"],
    }
    constants = {"BITS_Y": bits_y, "BITS_X": bits_x, "TILE_Y": config["tile_y"], "TILE_X": config["tile_x"]}
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    first = Launch(_mask_binarize_kernel, total * strips, arguments, constants, options)
    arguments = {
        "partial_ptr": partial,
        "areas_ptr": areas,
        "tight_ptr": tight,
        "masks": total,
        "strips": strips,
    }
    second = Launch(
        _mask_binarize_merge_kernel,
        cdiv(total, _MERGED),
        arguments,
        {"BLOCK": _MERGED},
        {"num_warps": 2, "num_stages": 1},
    )
    return (masks, areas, tight), [first, second]


@planned
def mask_binarize(
    mask_logits: Tensor,
    boxes: Tensor | None,
    height: int,
    width: int,
    threshold: float,
    layout: int,
    *,
    config: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Launcher of ``segvit::mask_binarize``; ``config`` replaces entries of :func:`_config`."""
    shape = (mask_logits.shape[0] * mask_logits.shape[1], height, width)
    found = _config(shape, layout, target(mask_logits.device))
    return _launches(mask_logits, boxes, height, width, threshold, layout, {**found, **(config or {})})
