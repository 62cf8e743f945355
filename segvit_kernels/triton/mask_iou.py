r"""Mask IoU on a GPU: how :mod:`segvit_kernels.ops.mask_iou` runs in Triton.

Hard masks become bits first, 32 pixels of a row in a word, by the launches of
:mod:`segvit_kernels.triton.mask_binarize`, booleans too, which also count their areas: cells are read and
interpolated once, whatever the masks of the other side. Then a program has up to 128 masks of either side and
a part of the words, and takes each of their 32 bits as a product of zeros and ones in float16, whose sums in
float32 are exact.

Soft masks: one program for a block of the first masks by a block of the second and a part of the pixels goes
through them, makes both blocks' values [masks, pixels] in float32, each between its four cells, and adds
their product. A program of the first block of one side also sums the values of the other.

The last launch adds the parts in order, so that sums repeat.

Bytes: bits, an eighth of a byte a pixel and mask of both sides, are written once and read once per block of
the other side; cells of soft masks come from the caches once per block of the other side; parts are written
once and read once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton import mask_binarize
from segvit_kernels.triton._launch import Launch, addressable, cdiv, next_power_of_2, pinned, target
from segvit_kernels.triton._plan import planned
from segvit_kernels.triton._resize import between, finite, place_of, sigmoid

_LARGEST = tl.constexpr(1e30)
_MOST_WORDS = 2**18  # of a part, whose counts of 2**23 pixels float32 holds


def _config(arch: str) -> dict[str, Any]:
    """Launch parameters.

    Soft: ``block`` masks of either side; ``pixels`` at a time; ``programs`` that fill the device; ``sum``
    results of an adding program; ``precision`` of products; ``num_warps``; ``num_stages``. Hard: ``bits``,
    with ``words`` in place of pixels and the most masks of a ``block``. ``arch`` is that of binary masks.
    """
    parameters = pinned(arch)
    config = {**parameters["mask_iou"], "bits": dict(parameters["mask_iou_bits"]), "arch": arch}
    for entries in (config, config["bits"]):
        entries["programs"] *= parameters["multiprocessors"]
    return config


@triton.jit
def _values(
    masks_ptr, stride_n, stride_h, stride_w, n, N, p, width, pixels, h, w, step_y, step_x,
    RESIZE: tl.constexpr, BOOLEAN: tl.constexpr,
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
    value = tl.where(value > 0.5, 1.0, 0.0) if BOOLEAN else sigmoid(value)
    return tl.where(valid, value, 0.0)


@triton.jit
def _place(N, M, parts, BLOCK: tl.constexpr):
    """Of a program its blocks of the masks of either side, its part and its image."""
    # A side without masks has one block too: areas of the other side come from it.
    blocks_n, blocks_m = tl.maximum(tl.cdiv(N, BLOCK), 1), tl.maximum(tl.cdiv(M, BLOCK), 1)
    i = tl.program_id(0)
    block_m, i = i % blocks_m, i // blocks_m
    block_n, i = i % blocks_n, i // blocks_n
    return block_n, block_m, i % parts, (i // parts).to(tl.int64)


@triton.jit
def _mask_iou_kernel(
    a_ptr, b_ptr, parts_ptr,
    stride_ab, stride_an, stride_ah, stride_aw, stride_bb, stride_bn, stride_bh, stride_bw,
    N, M, parts, part, width, pixels, ah, aw, bh, bw, a_step_y, a_step_x, b_step_y, b_step_x,
    BLOCK: tl.constexpr, PIXELS: tl.constexpr, RESIZE_A: tl.constexpr, RESIZE_B: tl.constexpr,
    BOOLEAN_A: tl.constexpr, BOOLEAN_B: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of a part of the pixels for a block of pairs."""
    block_n, block_m, own, image = _place(N, M, parts, BLOCK)
    n, m = block_n * BLOCK + tl.arange(0, BLOCK), block_m * BLOCK + tl.arange(0, BLOCK)
    a_ptr += image * stride_ab
    b_ptr += image * stride_bb
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    area_a, area_b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in tl.range(own * part, tl.minimum(own * part + part, pixels), PIXELS, num_stages=STAGES):
        p = first + tl.arange(0, PIXELS)
        a = _values(
            a_ptr, stride_an, stride_ah, stride_aw, n, N, p, width, pixels, ah, aw, a_step_y, a_step_x,
            RESIZE_A, BOOLEAN_A,
        )  # fmt: skip
        b = _values(
            b_ptr, stride_bn, stride_bh, stride_bw, m, M, p, width, pixels, bh, bw, b_step_y, b_step_x,
            RESIZE_B, BOOLEAN_B,
        )  # fmt: skip
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        area_a += tl.sum(a, 1)
        area_b += tl.sum(b, 1)
    parts_ptr += (image * parts + own) * (N * M + N + M)
    inside = (n[:, None] < N) & (m[None, :] < M)
    tl.store(parts_ptr + n[:, None] * M + m[None, :], acc, mask=inside)
    if block_m == 0:
        tl.store(parts_ptr + N * M + n, area_a, mask=n < N)
    if block_n == 0:
        tl.store(parts_ptr + N * M + N + m, area_b, mask=m < M)


@triton.jit
def _ones(words):
    """The lowest bit of every word in float16, without a conversion."""
    return ((words & 1) * 0x3C00).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _mask_iou_bits_kernel(
    a_ptr, b_ptr, parts_ptr, N, M, parts, part, words,
    BLOCK: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Pixels that a block of pairs has in common in a part of the words; a, b (B, masks, words)."""
    block_n, block_m, own, image = _place(N, M, parts, BLOCK)
    n, m = block_n * BLOCK + tl.arange(0, BLOCK), block_m * BLOCK + tl.arange(0, BLOCK)
    rows_a = a_ptr + ((image * N + n) * words)[:, None]
    rows_b = b_ptr + ((image * M + m) * words)[:, None]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    end = tl.minimum(own * part + part, words)
    for first in tl.range(own * part, end, WORDS, num_stages=STAGES):
        w = first + tl.arange(0, WORDS)[None, :]
        a = tl.load(rows_a + w, mask=(n[:, None] < N) & (w < end), other=0)
        b = tl.load(rows_b + w, mask=(m[:, None] < M) & (w < end), other=0)
        for bit in range(32):
            acc = tl.dot(_ones(a >> bit), tl.trans(_ones(b >> bit)), acc)
    parts_ptr += (image * parts + own) * N * M
    inside = (n[:, None] < N) & (m[None, :] < M)
    tl.store(parts_ptr + n[:, None] * M + m[None, :], acc, mask=inside)


@triton.jit
def _mask_iou_sum_kernel(
    parts_ptr, pairs_ptr, area_a_ptr, area_b_ptr, N, M, parts, BLOCK: tl.constexpr
):  # fmt: skip
    """The parts of some results, added in order."""
    count = N * M
    if area_a_ptr is not None:
        count += N + M
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
    if area_a_ptr is not None:
        tl.store(area_a_ptr + image * N + i - N * M, total, mask=(i >= N * M) & (i < N * M + N))
        tl.store(area_b_ptr + image * M + i - N * M - N, total, mask=(i >= N * M + N) & (i < count))


def _added(
    partial: Tensor, results: tuple[Tensor, Tensor, Tensor], parts: int, areas: bool, config: dict[str, Any]
) -> Launch:
    """The launch that adds the parts of pairs, and of areas."""
    pairs, area_a, area_b = results
    batch, n, m = pairs.shape
    arguments = {
        "parts_ptr": partial,
        "pairs_ptr": pairs,
        "area_a_ptr": area_a if areas else None,
        "area_b_ptr": area_b if areas else None,
        "N": n,
        "M": m,
        "parts": parts,
    }
    programs = batch * cdiv(partial.shape[2], config["sum"])
    return Launch(_mask_iou_sum_kernel, programs, arguments, {"BLOCK": config["sum"]}, {"num_warps": 4})


def _hard(
    a: Tensor, b: Tensor, height: int, width: int, threshold: float, config: dict[str, Any]
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Results and launches of masks that are zeros and ones: both sides as bits, and their products."""
    batch, n, m = a.shape[0], a.shape[1], b.shape[1]
    words, areas, launches = [], [], []
    for masks in (a, b):
        above = threshold
        if masks.dtype == torch.bool:
            masks, above = masks.view(torch.uint8), 0.5
        binarized = mask_binarize._config((batch * masks.shape[1], height, width), 1, config["arch"])
        (bits, area, _), some = mask_binarize._launches(masks, None, height, width, above, 1, binarized)
        words.append(bits)
        areas.append(area)
        launches += some
    pairs = a.new_empty(batch, n, m, dtype=torch.int32)
    results = pairs, *areas
    if pairs.numel() == 0:
        return results, launches
    given = config["bits"]
    count, step = height * words[0].shape[3], given["words"]
    block = min(given["block"], max(16, next_power_of_2(max(n, m))))
    blocks = cdiv(n, block) * cdiv(m, block)
    parts = max(1, min(given["programs"] // (batch * blocks), cdiv(count, step)))
    part = cdiv(cdiv(count, max(parts, cdiv(count, _MOST_WORDS))), step) * step
    parts = cdiv(count, part)
    partial = a.new_empty(batch, parts, n * m, dtype=torch.float32)
    arguments = {
        "a_ptr": words[0],
        "b_ptr": words[1],
        "parts_ptr": partial,
        "N": n,
        "M": m,
        "parts": parts,
        "part": part,
        "words": count,
    }
    constants = {"BLOCK": block, "WORDS": step, "STAGES": given["num_stages"]}
    warps = given["num_warps"] if block > 64 else min(4, given["num_warps"])
    options = {"num_warps": warps, "num_stages": given["num_stages"]}
    launches.append(Launch(_mask_iou_bits_kernel, batch * parts * blocks, arguments, constants, options))
    launches.append(_added(partial, results, parts, False, config))
    return results, launches


def _launches(
    a: Tensor, b: Tensor, height: int, width: int, soft: bool, threshold: float, config: dict[str, Any]
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Results, still empty, and the launches that fill them."""
    if not soft:
        return _hard(a, b, height, width, threshold, config)
    batch, n, m, pixels = a.shape[0], a.shape[1], b.shape[1], height * width
    pairs = a.new_empty(batch, n, m, dtype=torch.float32)
    area_a, area_b = (t.new_empty(batch, t.shape[1], dtype=torch.float32) for t in (a, b))
    if batch == 0 or n + m == 0:
        return (pairs, area_a, area_b), []
    a, b = (addressable(t, 2) for t in (a, b))
    block, step = config["block"], config["pixels"]
    blocks = max(1, cdiv(n, block)) * max(1, cdiv(m, block))
    parts = max(1, min(config["programs"] // (batch * blocks), cdiv(pixels, step)))
    part = cdiv(cdiv(pixels, parts), step) * step
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
    }
    constants = {
        "BLOCK": block,
        "PIXELS": step,
        "RESIZE_A": sizes[0] != (height, width),
        "RESIZE_B": sizes[1] != (height, width),
        "BOOLEAN_A": booleans[0],
        "BOOLEAN_B": booleans[1],
        "PRECISION": config["precision"],
        "STAGES": config["num_stages"],
    }
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    main = Launch(_mask_iou_kernel, batch * parts * blocks, arguments, constants, options)
    adding = _added(partial, (pairs, area_a, area_b), parts, True, config)
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
