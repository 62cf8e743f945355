r"""Binary masks on a GPU: how :mod:`segvit_kernels.ops.mask_binarize` runs in Triton.

Two launches. In the first a program has some columns of one mask and goes down a strip of its rows. A thread
has neighbouring columns: 4 pixels that are stored as one word, 8 bits of a word along a row, or one column of
words along columns. It keeps two rows of the grid, interpolated along x, until the rows below lie between the
next two: a pixel costs two products, and a cell is read and clamped once a strip and column.

Cells are taken from the threshold, so that the sign bit of a sum says whether a pixel is in the mask and bits
move to their place without a comparison. A weight of zero stands for all that lies outside: beyond the
output, beyond a box. Areas and the columns used are counted in registers, rows used are a bit for each of 32
rows; they are reduced once, at the end of the program; the second launch joins the parts of a mask.

Bytes: the grids read once; an eighth of a byte a pixel written, or one for booleans; 20 bytes a program.
Nothing is in shared memory before the end. Places are float32, offsets inside a mask 32-bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton._launch import Launch, addressable, cdiv, pinned, target
from segvit_kernels.triton._plan import planned
from segvit_kernels.triton._resize import finite

_LAYOUTS = ("pixels", "rows", "columns")
_COLUMNS = (4, 8, 1)  # of a thread's groups: pixels of a 32-bit word, bits of a byte, a column
_WORD = 32
_MOST_ROWS = 224  # of a strip: a byte counts the pixels of its column
_MERGED = 64  # masks of a program of the second launch


def _config(shape: tuple[int, int, int], layout: int, arch: str) -> dict[str, Any]:
    """Launch parameters.

    Args:
        shape: masks, height, width of the output.
        layout: 0 pixels, 1 words along rows, 2 words along columns.
        arch: what :func:`segvit_kernels.triton._launch.target` says of a device.

    Returns:
        ``block`` groups of columns and ``rows`` of a program, ``num_warps``, ``num_stages``.
    """
    parameters = pinned(arch)
    config = dict(parameters["mask_binarize"][_LAYOUTS[layout]])
    masks, height, width = shape
    across = cdiv(cdiv(width, _COLUMNS[layout]), config["block"])
    programs = config.pop("programs") * parameters["multiprocessors"]
    words = cdiv(height, _WORD)
    strips = max(1, min(words, cdiv(programs, max(1, masks * across))))
    return {**config, "rows": min(cdiv(words, strips) * _WORD, _MOST_ROWS)}


@triton.jit
def _box(boxes_ptr, low, cells):
    """Of one axis of a box its beginning, end and cells a pixel; empty where it is not finite."""
    first, last = tl.load(boxes_ptr + low), tl.load(boxes_ptr + low + 2)
    extent = last - first
    good = (extent > 0) & (extent < float("inf"))
    step = cells / tl.where(good, extent, 1.0)
    return tl.where(good, first, 0.0), tl.where(good, last, 0.0), step


@triton.jit
def _between(i, low, step, cells):
    """Of a pixel of an axis the cell before and the share of the cell after."""
    place = ((tl.cast(i, tl.float32) + 0.5) - low) * step - 0.5
    before = tl.minimum(tl.maximum(place.to(tl.int32), 0), cells - 1)
    return before, tl.minimum(tl.maximum(place - before.to(tl.float32), 0.0), 1.0)


@triton.jit
def _cell(ptrs, threshold):
    """How far the threshold is above a cell; one that is not a number counts as the lowest."""
    return threshold - finite(tl.load(ptrs).to(tl.float32), 1e30)


@triton.jit
def _grid_row(ptr, cells, weights, threshold, SHARED: tl.constexpr):
    """A row of the grid at the columns of every group.

    Each column has two cells, or the columns of a quarter of a group, three cells together if SHARED.
    """
    values = ()
    for i in tl.static_range(len(cells)):
        values += (_cell(ptr + cells[i], threshold),)
    found = ()
    # Adding zero makes one of a negative zero, whose sign bit is that of a pixel in the mask.
    if SHARED:
        for i in tl.static_range(len(weights) // 3):
            value = values[i // 4 * 3 + 2] * weights[3 * i + 2] + 0.0
            value = values[i // 4 * 3 + 1] * weights[3 * i + 1] + value
            found += (values[i // 4 * 3] * weights[3 * i] + value,)
    else:
        for i in tl.static_range(len(weights) // 2):
            value = values[2 * i + 1] * weights[2 * i + 1] + 0.0
            found += (values[2 * i] * weights[2 * i] + value,)
    return found


@triton.jit
def _signs(values):
    """The sign bits of up to 32 values as the lowest bits of a word."""
    word = values[len(values) - 1].to(tl.uint32, bitcast=True) >> 31
    for i in tl.static_range(1, len(values)):
        word = (word << 1) | (values[len(values) - 1 - i].to(tl.uint32, bitcast=True) >> 31)
    return word


@triton.jit
def _ones(word):
    """How many bits of a word are set."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


@triton.jit
def _reversed(word):
    """The bits of a word in the other order."""
    word = ((word >> 1) & 0x55555555) | ((word & 0x55555555) << 1)
    word = ((word >> 2) & 0x33333333) | ((word & 0x33333333) << 2)
    word = ((word >> 4) & 0x0F0F0F0F) | ((word & 0x0F0F0F0F) << 4)
    word = ((word >> 8) & 0x00FF00FF) | ((word & 0x00FF00FF) << 8)
    return (word >> 16) | (word << 16)


@triton.jit
def _bit(power):
    """Which bit of a word alone is set."""
    return (power.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _mask_binarize_kernel(
    logits_ptr, boxes_ptr, masks_ptr, partial_ptr,
    stride_b, stride_k, stride_h, stride_w, masks, K, h, w, H, W, step_y, step_x, threshold, strips, rows,
    LAYOUT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """partial (5, parts, masks): area, left, top, right, bottom of a part."""
    across = tl.cdiv(tl.cdiv(W, COLUMNS), BLOCK)
    parts = strips * across
    mask, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    image = mask.to(tl.int64)
    logits_ptr += image // K * stride_b + image % K * stride_k
    top, left = 0.0, 0.0
    bottom, right = H + 0.0, W + 0.0
    if boxes_ptr is not None:
        top, bottom, step_y = _box(boxes_ptr + image * 4, 1, h)
        left, right, step_x = _box(boxes_ptr + image * 4, 0, w)

    group = part % across * BLOCK + tl.arange(0, BLOCK)
    cells, weights = (), ()
    upper, lower = (), ()
    for i in tl.static_range(COLUMNS):
        x = group * COLUMNS + i
        column, share_x = _between(x, left, step_x, w)
        inside_x = (x + 0.5 >= left) & (x + 0.5 < right) & (x < W)
        near, far = tl.where(inside_x, 1.0 - share_x, 0.0), tl.where(inside_x, share_x, 0.0)
        if not SHARED:
            weights += (near, far)
        if not SHARED or i % 4 == 0:
            start = column
            for k in tl.static_range(3 if SHARED else 2):
                cells += (tl.minimum(column + k, w - 1) * stride_w,)
        if SHARED:
            later = column > start
            weights += (tl.where(later, 0.0, near), tl.where(later, near, far), tl.where(later, far, 0.0))
        upper += (tl.zeros([BLOCK], tl.float32),)
        lower += (tl.zeros([BLOCK], tl.float32),)

    if LAYOUT == 0:
        masks_ptr += image * H * W
    elif LAYOUT == 1:
        out_x = tl.cdiv(W, 32) * 4  # bytes
        masks_ptr += image * H * out_x
    else:
        out_y = tl.cdiv(H, 32)
        masks_ptr += image * W * out_y

    area = tl.zeros([BLOCK], tl.int32)
    used = tl.zeros([BLOCK], tl.uint32)  # which columns; for booleans how often, a byte each
    first_y = tl.zeros([BLOCK], tl.int32) + H
    last_y = tl.zeros([BLOCK], tl.int32)
    held = -2
    begin = part // across * rows
    for y0 in range(begin, tl.minimum(begin + rows, H), 32):
        some = tl.zeros([BLOCK], tl.uint32)  # a bit for each row
        for y in range(y0, tl.minimum(y0 + 32, H)):
            row, share_y = _between(y, top, step_y, h)
            if row != held:
                if row == held + 1:
                    upper = lower
                else:
                    upper = _grid_row(logits_ptr + row * stride_h, cells, weights, threshold, SHARED)
                next_row = tl.minimum(row + 1, h - 1) * stride_h
                lower = _grid_row(logits_ptr + next_row, cells, weights, threshold, SHARED)
                held = row
            above, below = 1.0 - share_y, share_y
            if boxes_ptr is not None:
                inside_y = (y + 0.5 >= top) & (y + 0.5 < bottom)
                above, below = tl.where(inside_y, above, 0.0), tl.where(inside_y, below, 0.0)
            values = ()
            for i in tl.static_range(COLUMNS):
                values += (upper[i] * above + (lower[i] * below + 0.0),)
            word = _signs(values)
            if LAYOUT == 0:
                pixels = (word * 0x00204081) & 0x01010101  # a byte for each bit
                used += pixels
                if ALIGNED:
                    words_ptr = masks_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
                    tl.store(words_ptr + y * (W // 4) + group, pixels, mask=group < W // 4)
                else:
                    for i in tl.static_range(4):
                        pixel = group * 4 + i
                        bit = ((word >> i) & 1).to(tl.uint8)
                        tl.store(masks_ptr + y * W + pixel, bit, mask=pixel < W)
            elif LAYOUT == 1:
                used |= word
                area += _ones(word).to(tl.int32)
                tl.store(masks_ptr + y * out_x + group, word.to(tl.uint8), mask=group < out_x)
            # What is not zero has a negative with a sign bit.
            some = (some << 1) | ((0 - word) >> 31)
        some = _reversed(some << (32 - tl.minimum(H - y0, 32)))
        if LAYOUT == 2:
            tl.store(masks_ptr + group * out_y + y0 // 32, some.to(tl.int32, bitcast=True), mask=group < W)
            used |= some
            area += _ones(some).to(tl.int32)
        # The highest bit without the one below it, which could round it up.
        low, high = _bit(some & (0 - some)), _bit(some & ~(some >> 1))
        first_y = tl.minimum(first_y, tl.where(some != 0, y0 + low, H))
        last_y = tl.where(some != 0, y0 + high + 1, last_y)

    first_x = tl.zeros([BLOCK], tl.int32) + W
    last_x = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(COLUMNS):
        x = group * COLUMNS + i
        if LAYOUT == 0:
            count = (used >> (8 * i)) & 255
            area += count.to(tl.int32)
        elif LAYOUT == 1:
            count = (used >> i) & 1
        else:
            count = used
        first_x = tl.minimum(first_x, tl.where(count != 0, x, W))
        last_x = tl.maximum(last_x, tl.where(count != 0, x + 1, 0))

    partial_ptr += part * masks + mask
    plane = parts * masks
    tl.store(partial_ptr, tl.sum(area, 0))
    tl.store(partial_ptr + plane, tl.min(first_x, 0))
    tl.store(partial_ptr + 2 * plane, tl.min(first_y, 0))
    tl.store(partial_ptr + 3 * plane, tl.max(last_x, 0))
    tl.store(partial_ptr + 4 * plane, tl.max(last_y, 0))


@triton.jit
def _mask_binarize_merge_kernel(partial_ptr, areas_ptr, tight_ptr, masks, parts, BLOCK: tl.constexpr):
    """Parts of a mask, one after the other."""
    mask = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists, plane = mask < masks, parts * masks
    area = tl.zeros([BLOCK], tl.int32)
    left = tl.full([BLOCK], 2147483647, tl.int32)
    top = tl.full([BLOCK], 2147483647, tl.int32)
    right = tl.zeros([BLOCK], tl.int32)
    bottom = tl.zeros([BLOCK], tl.int32)
    for part in range(parts):
        ptrs = partial_ptr + part * masks + mask
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
    mask_logits = addressable(mask_logits, 2)
    words_y, words_x = cdiv(height, _WORD), cdiv(width, _WORD)
    shape = ((height, width), (height, words_x), (width, words_y))[layout]
    masks = mask_logits.new_empty((batch, count, *shape), dtype=torch.int32 if layout else torch.bool)
    areas = mask_logits.new_empty((batch, count), dtype=torch.int32)
    tight = mask_logits.new_empty((batch, count, 4), dtype=torch.int32)
    total, strips = batch * count, cdiv(height, config["rows"])
    if total == 0:
        return (masks, areas, tight), []
    parts = strips * cdiv(cdiv(width, _COLUMNS[layout]), config["block"])
    partial = mask_logits.new_empty((5, parts, total), dtype=torch.int32)
    arguments = {
        "logits_ptr": mask_logits,
        "boxes_ptr": boxes,
        "masks_ptr": masks if layout == 2 else masks.view(torch.uint8),
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
        "threshold": threshold + 0.0,  # of no negative zero
        "strips": strips,
        "rows": config["rows"],
    }
    constants = {
        "LAYOUT": layout,
        "COLUMNS": _COLUMNS[layout],
        "BLOCK": config["block"],
        # Four neighbours lie between three cells.
        "SHARED": layout < 2 and boxes is None and width > 3 * w,
        "ALIGNED": layout == 0 and width % 4 == 0,
    }
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    first = Launch(_mask_binarize_kernel, total * parts, arguments, constants, options)
    arguments = {
        "partial_ptr": partial,
        "areas_ptr": areas,
        "tight_ptr": tight,
        "masks": total,
        "parts": parts,
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
