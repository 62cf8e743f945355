r"""Semantic argmax on a GPU: how :mod:`segvit_kernels.ops.semantic_argmax` runs in Triton.

Two kinds of launches. The first prepares, at low resolution: the tokens of every view are ranked by class
mass, masks are written as (cells, tokens) and class probabilities as (tokens, classes), in that order and
padded, so that the second reads whole rows and needs no predicates. It also sums what the tokens after the
first few can add to a class. One such launch for every tensor of masks: it is here that grids of different
sizes meet in one buffer.

The second, one launch whatever the views, has one program for a tile of output pixels (without views, for a
run of tiles between which the class probabilities stay in shared memory). Per block of tokens:

1. logits [pixels, tokens] = W [pixels, cells] · masks [cells, tokens], the bilinear interpolation as a
   product with the few cells under the tile; W(pixel, cell) is the product of two hat functions
   max(0, 1 - |distance|);
2. σ in float32, rounded once to the dtype of the products;
3. scores [pixels, classes] += σ · class_probs, σ from registers, scores in registers.

Scores take several accumulators whose widths are powers of two (150 classes: 128 + 32), and classes beyond a
limit are taken in turns that each compute σ again. After the first tokens (of all views) a tile whose pixels
are all decided is finished; the rest of the tokens runs for the other tiles only.

Half precision: logits are exact in float16 (bfloat16 ones are clamped to its range), W is split into two
float16 where it is not exact in one, σ is scaled by 2¹⁰ and the probabilities of a view by a power of two, so
that neither underflows (class_probs beyond ±127 saturate). Bytes and the choice of tiles: docs/kernels.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton._launch import Launch, addressable, cdiv, next_power_of_2, pinned, target
from segvit_kernels.triton._plan import planned
from segvit_kernels.triton._resize import footprint, shares_in_float16

_SIGMA_SCALE = 1024.0  # of half-precision σ
_PROBS_SCALE = 2.0**14  # of half-precision class probabilities up to 1
_INFO = 5  # integers kept of a view: first cell, h, w, blocks of the head, blocks in all
_HOPELESS = 0.25  # a tail worth this share of the head is not worth a test


def _parts(classes: int, limit: int) -> tuple[tuple[int, ...], int]:
    """Widths of the accumulators, at most three powers of two from 16 up, and in how many turns.

    Up to ``limit`` classes at once; a loop over turns takes registers too, so that its limit is lower.
    """
    turns = 1 if classes <= limit else cdiv(classes, min(limit, 192))
    sixteens = cdiv(cdiv(classes, turns), 16)
    while sixteens.bit_count() > 3:
        sixteens += sixteens & -sixteens
    return tuple(16 << bit for bit in reversed(range(16)) if sixteens >> bit & 1), turns


def _config(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    arch: str,
    reach: tuple[float, float],
    most: int | None = None,
) -> dict[str, Any]:
    """Launch parameters.

    Args:
        shape: batch, output height, output width, queries, classes.
        dtype: of the masks.
        arch: what :func:`segvit_kernels.triton._launch.target` says of a device.
        reach: the largest |step| from pixel to pixel, in cells, of rows and columns.
        most: classes at once, where a kernel has registers for fewer than the pinned number.

    Returns:
        ``tile_y``, ``tile_x``; ``cells_y``, ``cells_x`` of the footprint, 0 where every pixel loads its own
        four cells; ``parts``, widths of the accumulators; ``turns``; ``block_q`` tokens at a time; ``head``,
        tokens before the test, 0 for no test; ``held``, most bytes of class probabilities to keep in shared
        memory; ``multiprocessors``; ``programs`` that fill them; ``precision`` of float32 products;
        ``num_warps``; ``num_stages``; perhaps ``maxnreg``.
    """
    config = dict(pinned(arch)["semantic_argmax"]["single" if dtype == torch.float32 else "half"])
    config["multiprocessors"] = pinned(arch)["multiprocessors"]
    config["programs"] *= config["multiprocessors"]
    _, _, _, queries, classes = shape
    limit = config.pop("classes")
    parts, turns = _parts(classes, limit if most is None else min(limit, most))
    cells = [footprint(config[f"tile_{axis}"], r) for axis, r in zip("yx", reach, strict=True)]
    if math.prod(cells) > config.pop("cells"):
        cells = [0, 0]
    elif math.prod(cells) < 16:  # the least inner length of a product
        cells[1] = 16 // cells[0]
    tested = config.pop("tested")  # classes; more leave no registers for the test
    if turns > 1 or sum(parts) > tested or queries <= config["head"]:
        config["head"] = 0
    if sum(parts) > 160 or math.prod(cells) != 16:
        config.pop("maxnreg", None)
    return {**config, "parts": parts, "turns": turns, "cells_y": cells[0], "cells_x": cells[1]}


@triton.jit
def _class_mass(
    p_ptr, stride_q, stride_c, Q, C, QUERIES: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Sum of every query's class probabilities; their largest magnitude and their least value of all."""
    q, c = tl.arange(0, QUERIES)[:, None], tl.arange(0, BLOCK_C)[None, :]
    mass, most, least = (tl.zeros([QUERIES, BLOCK_C], tl.float32),) * 3
    for start in tl.range(0, C, BLOCK_C, loop_unroll_factor=2):
        ptrs = p_ptr + q * stride_q + (start + c) * stride_c
        p = tl.load(ptrs, mask=(q < Q) & (start + c < C), other=0.0).to(tl.float32)
        mass += p
        most, least = tl.maximum(most, tl.abs(p)), tl.minimum(least, p)
    mass = tl.sum(mass, 1)
    # Padding ranks last, with what is not a number, and neither is ever kept.
    mass = tl.where((tl.arange(0, QUERIES) < Q) & (mass == mass), mass, float("-inf"))
    return mass, tl.max(tl.max(most, 1), 0), tl.min(tl.min(least, 1), 0)


@triton.jit
def _rank(mass, prune, QUERIES: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Place of every query in the order of falling mass, as far as the bits left by its number tell."""
    q, block = tl.arange(0, QUERIES), tl.arange(0, BLOCK_Q)
    bits = tl.where(mass >= prune, mass, float("-inf")).to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & 0x7FFFFFFF  # in the order of the numbers
    key = (bits & -QUERIES) | (QUERIES - 1 - q)
    ahead = tl.zeros([QUERIES, BLOCK_Q], tl.int32)
    for start in range(0, QUERIES, BLOCK_Q):
        other = tl.gather(key, start + block, 0)
        ahead += (other[None, :] > key[:, None]).to(tl.int32)
    return tl.sum(ahead, 1)


@triton.jit
def _prepare_probs(
    p_ptr, probs_ptr, tails_ptr, info_ptr, unit_ptr, stride_q, stride_c, rank, mass, largest, least,
    cell, h, w, Q, C, prune, hopeless,
    QUERIES: tl.constexpr, PADDED_Q: tl.constexpr, PADDED_C: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr, HEAD: tl.constexpr, ORDER: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Class probabilities of one view in order, bounds of its tail and what the main kernel must know."""
    scale, unit = 1.0, 1.0
    if SCALED:
        # The largest to [2^14, 2^15), but by no more than 2^18 and no less than 2^9.
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
        exponent = tl.minimum(tl.maximum(14 - exponent, 9), 18)
        scale = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
        unit = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    blocks = PADDED_Q // BLOCK_Q
    kept = tl.arange(0, QUERIES) < Q
    if ORDER:
        kept = kept & (mass >= prune)
        blocks = tl.cdiv(tl.sum(kept.to(tl.int32), 0), BLOCK_Q)
    head_most, tail_most = 0.0, 0.0
    q, kept, slot = tl.arange(0, QUERIES)[:, None], kept[:, None], rank[:, None]
    for first_c in range(0, PADDED_C, BLOCK_C):
        c = first_c + tl.arange(0, BLOCK_C)
        ptrs = p_ptr + q * stride_q + c[None, :] * stride_c
        p = tl.load(ptrs, mask=kept & (c[None, :] < C), other=0.0).to(tl.float32)
        if SCALED:
            p = tl.minimum(tl.maximum(p * scale, -65504.0), 65504.0)
        out = probs_ptr + slot * PADDED_C + c[None, :]
        inside = (slot < PADDED_Q) & (c[None, :] < PADDED_C)
        tl.store(out, p.to(probs_ptr.dtype.element_ty), mask=inside)
        if HEAD > 0:
            head = tl.sum(tl.where(slot < HEAD, p, 0.0), 0)
            tail = tl.sum(tl.where(slot < HEAD, 0.0, p), 0)
            tl.store(tails_ptr + c, tail, mask=c < PADDED_C)
            head_most = tl.maximum(head_most, tl.max(head, 0))
            tail_most = tl.maximum(tail_most, tl.max(tail, 0))
    head_blocks = blocks
    if HEAD > 0:
        # Where the tail is worth much no pixel would be decided, and negative values have no bound.
        worthwhile = (tail_most <= hopeless * head_most) & (least >= 0.0)
        head_blocks = tl.where(worthwhile, tl.minimum(blocks, HEAD // BLOCK_Q), blocks)
    tl.store(info_ptr, cell)
    tl.store(info_ptr + 1, h)
    tl.store(info_ptr + 2, w)
    tl.store(info_ptr + 3, head_blocks)
    tl.store(info_ptr + 4, blocks)
    tl.store(unit_ptr, unit)


@triton.jit
def _semantic_argmax_prepare_kernel(
    masks_ptr, p_ptr, cells_ptr, probs_ptr, tails_ptr, info_ptr, units_ptr, order_ptr,
    stride_mv, stride_mq, stride_mh, stride_mw, stride_pv, stride_pq, stride_pc,
    first_view, first_cell, programs, Q, C, h, w, prune, hopeless,
    QUERIES: tl.constexpr, PADDED_Q: tl.constexpr, PADDED_C: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_CELLS: tl.constexpr, HEAD: tl.constexpr, ORDER: tl.constexpr,
    SCALED: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One tensor of masks: per view ``programs`` that write cells, and one for class probabilities.

    Every program ranks the tokens of its view for itself, which costs less than another launch.
    """
    index = tl.program_id(0) % (programs + 1)
    local = tl.program_id(0) // (programs + 1)
    view = (first_view + local).to(tl.int64)
    p_ptr += view * stride_pv
    q = tl.arange(0, QUERIES)
    rank, mass, largest, least = q, 0.0, 0.0, 0.0
    if ORDER or SCALED:
        mass, largest, least = _class_mass(p_ptr, stride_pq, stride_pc, Q, C, QUERIES, BLOCK_C)
    if ORDER:
        rank = _rank(mass, prune, QUERIES, BLOCK_Q)
    cell = first_cell + local * (h * w)
    if index == programs:
        _prepare_probs(
            p_ptr, probs_ptr + view * PADDED_Q * PADDED_C, tails_ptr + view * PADDED_C, info_ptr + view * 5,
            units_ptr + view, stride_pq, stride_pc, rank, mass, largest, least,
            cell, h, w, Q, C, prune, hopeless,
            QUERIES, PADDED_Q, PADDED_C, BLOCK_Q, BLOCK_C, HEAD, ORDER, SCALED,
        )  # fmt: skip
    else:
        query = q
        if ORDER:
            # The permutation inverted, by way of memory that is this program's own.
            order_ptr += tl.program_id(0) * QUERIES
            tl.store(order_ptr + rank, q)
            tl.debug_barrier()
            query = tl.load(order_ptr + q)
        masks_ptr += local.to(tl.int64) * stride_mv
        cells_ptr += cell.to(tl.int64) * PADDED_Q
        row_ptrs = masks_ptr + (query.to(tl.int64) * stride_mq)[:, None]
        for first in range(index * BLOCK_CELLS, h * w, programs * BLOCK_CELLS):
            i = first + tl.arange(0, BLOCK_CELLS)
            ptrs = row_ptrs + (i // w * stride_mh + i % w * stride_mw)[None, :]
            valid = (i[None, :] < h * w) & (q[:, None] < Q)
            # The hint is for the layout: by itself Triton 3.6 lets threads run over queries where the
            # width is no multiple of 16. Weights of zero must stay zero beside an infinite logit.
            x = tl.load(tl.max_contiguous(ptrs, [1, 16]), mask=valid, other=0.0).to(tl.float32)
            x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST).to(cells_ptr.dtype.element_ty)
            out = cells_ptr + i.to(tl.int64)[:, None] * PADDED_Q + q[None, :]
            tl.store(out, tl.trans(x), mask=(i[:, None] < h * w) & (q[None, :] < PADDED_Q))


@triton.jit
def _zeros(PIXELS: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    acc = (tl.zeros([PIXELS, N0], tl.float32),)
    if N1 > 0:
        acc += (tl.zeros([PIXELS, N1], tl.float32),)
    if N2 > 0:
        acc += (tl.zeros([PIXELS, N2], tl.float32),)
    return acc


@triton.jit
def _activate(x, HALF: tl.constexpr, SIGMOID: tl.constexpr):
    """σ, 2¹⁰ times where the products are of float16."""
    if SIGMOID:
        if HALF:
            # A squared reciprocal root: no range checks, as a division has them.
            root = tl.rsqrt(0.0009765625 + tl.exp2(x * -1.4426950408889634 - 10.0))
            x = root * root
        else:
            x = 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))
    return x


@triton.jit
def _mix(
    x, share, probs_ptr, acc, PADDED_C: tl.constexpr, BLOCK_Q: tl.constexpr,
    SHARED: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of tokens from logits to scores."""
    x = _activate(x, probs_ptr.dtype.element_ty == tl.float16, SIGMOID)
    if SHARED:
        x *= share[:, None]
    x = x.to(probs_ptr.dtype.element_ty)
    rows = tl.arange(0, BLOCK_Q)[:, None] * PADDED_C
    new = ()
    first = 0
    for i in tl.static_range(len(acc)):
        p = tl.load(probs_ptr + rows + (first + tl.arange(0, acc[i].shape[1]))[None, :])
        new += (tl.dot(x, p, acc[i], input_precision=PRECISION),)
        first += acc[i].shape[1]
    return new


@triton.jit
def _weights(sy, sx, low_y, low_x, h, w, CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr):
    """Bilinear weights [pixels, cells] of a footprint, and its cells; those past the edge weigh nothing."""
    i = tl.arange(0, CELLS_Y * CELLS_X)
    cell_y, cell_x = low_y + i // CELLS_X, low_x + i % CELLS_X
    weight = tl.maximum(0.0, 1.0 - tl.abs(sy[:, None] - cell_y.to(tl.float32)[None, :]))
    weight *= tl.maximum(0.0, 1.0 - tl.abs(sx[:, None] - cell_x.to(tl.float32)[None, :]))
    return weight, tl.minimum(cell_y, h - 1) * w + tl.minimum(cell_x, w - 1)


@triton.jit
def _add_view(
    acc, cells_ptr, probs_ptr, begin, end, sy, sx, low_y, low_x, share, h, w,
    PADDED_Q: tl.constexpr, PADDED_C: tl.constexpr, BLOCK_Q: tl.constexpr,
    CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr, SPLIT: tl.constexpr,
    SHARED: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Blocks begin to end of the tokens of one view into the scores.

    sy, sx [pixels] are grid coordinates; low_y, low_x the first cell of the footprint.
    """
    cols = tl.arange(0, BLOCK_Q)
    if CELLS_Y > 0:
        weight, cell = _weights(sy, sx, low_y, low_x, h, w, CELLS_Y, CELLS_X)
        upper = weight.to(cells_ptr.dtype.element_ty)
        if SPLIT:
            lower = (weight - upper.to(tl.float32)).to(upper.dtype)
        offsets = cell.to(tl.int64)[:, None] * PADDED_Q + cols[None, :]
        for block in tl.range(begin, end, num_stages=STAGES):
            masks = tl.load(cells_ptr + offsets + block * BLOCK_Q)
            x = tl.dot(upper, masks, input_precision=PRECISION)
            if SPLIT:
                x = tl.dot(lower, masks, x, input_precision=PRECISION)
            acc = _mix(x, share, probs_ptr + block * BLOCK_Q * PADDED_C, acc, PADDED_C, BLOCK_Q,
                       SHARED, SIGMOID, PRECISION)  # fmt: skip
    else:
        y0, x0 = sy.to(tl.int32), sx.to(tl.int32)
        y1, x1 = tl.minimum(y0 + 1, h - 1) * w, tl.minimum(x0 + 1, w - 1)
        wy, wx = (sy - y0.to(tl.float32))[:, None], (sx - x0.to(tl.float32))[:, None]
        y0 *= w
        row00, row01 = (y0 + x0).to(tl.int64) * PADDED_Q, (y0 + x1).to(tl.int64) * PADDED_Q
        row10, row11 = (y1 + x0).to(tl.int64) * PADDED_Q, (y1 + x1).to(tl.int64) * PADDED_Q
        for block in tl.range(begin, end, num_stages=STAGES):
            ptrs = cells_ptr + block * BLOCK_Q + cols[None, :]
            x = tl.load(ptrs + row00[:, None]).to(tl.float32) * ((1.0 - wy) * (1.0 - wx))
            x += tl.load(ptrs + row01[:, None]).to(tl.float32) * ((1.0 - wy) * wx)
            x += tl.load(ptrs + row10[:, None]).to(tl.float32) * (wy * (1.0 - wx))
            x += tl.load(ptrs + row11[:, None]).to(tl.float32) * (wy * wx)
            acc = _mix(x, share, probs_ptr + block * BLOCK_Q * PADDED_C, acc, PADDED_C, BLOCK_Q,
                       SHARED, SIGMOID, PRECISION)  # fmt: skip
    return acc


@triton.jit
def _top(acc, classes):
    """Largest score of every pixel and the lowest class that has it."""
    best = tl.full([acc[0].shape[0]], float("-inf"), tl.float32)
    label = tl.zeros([acc[0].shape[0]], tl.int32)
    first = 0
    for i in tl.static_range(len(acc)):
        c = first + tl.arange(0, acc[i].shape[1])[None, :]
        scores = tl.where(c < classes, acc[i], float("-inf"))
        value = tl.max(scores, 1)
        found = tl.min(tl.where(scores == value[:, None], c, 65535), 1)
        label = tl.where(value > best, found, label)
        best = tl.maximum(value, best)
        first += acc[i].shape[1]
    return best, label


@triton.jit
def _decide(acc, tails, groups, scale):
    """Label of every pixel if the tail cannot change it, otherwise a number of 2048 or more.

    A class is in the running if its score with all of its tail reaches the best score without any.
    """
    best = tl.full([acc[0].shape[0]], 0.0, tl.float32)
    for i in tl.static_range(len(acc)):
        best = tl.maximum(best, tl.max(acc[i], 1))
    best *= 1.0 - 2.0**-14
    code = tl.full([acc[0].shape[0], 1], -2048, tl.int32)
    first = 0
    for i in tl.static_range(len(acc)):
        c = first + tl.arange(0, acc[i].shape[1])[None, :]
        most = tails[i] * scale
        if groups is not None:
            most *= groups[:, None]
        running = acc[i] + most >= best[:, None]
        code += tl.sum(tl.where(running, 2048 + c, 0), 1, keep_dims=True)
        first += acc[i].shape[1]
    return tl.max(code, 1)


@triton.jit
def _some_class(label, classes):
    """The label, or 0 where there is none because scores are not numbers."""
    return tl.where(label < classes, tl.maximum(label, 0), 0)


@triton.jit
def _meets(box_ptr, y0, x0, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Whether the rectangle of a view and a tile have pixels in common."""
    rows = (tl.load(box_ptr) < y0 + TILE_Y) & (tl.load(box_ptr + 2) > y0)
    return rows & (tl.load(box_ptr + 1) < x0 + TILE_X) & (tl.load(box_ptr + 3) > x0)


@triton.jit
def _tails(
    tails_ptr, info_ptr, units_ptr, layout_ptr, first_view, last_view, y0, x0, probs_scale,
    PADDED_C: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Whether views of a tile have a tail, and the most that a tail adds to every class."""
    found = 0
    tail = _zeros(1, N0, N1, N2)
    for v in range(first_view, last_view):
        view = tl.cast(v, tl.int64)
        counts = 1.001  # more than rounding makes of σ and of its share
        if layout_ptr is not None:
            view = tl.load(layout_ptr + v * 7).to(tl.int64)
            meets = _meets(layout_ptr + v * 7 + 3, y0, x0, TILE_Y, TILE_X)
            counts = tl.where(meets, tl.load(units_ptr + view) * probs_scale * counts, 0.0)
        has_tail = tl.load(info_ptr + view * 5 + 3) < tl.load(info_ptr + view * 5 + 4)
        counts = tl.where(has_tail, counts, 0.0)
        found += (counts > 0.0).to(tl.int32)
        new = ()
        first = 0
        for i in tl.static_range(len(tail)):
            c = first + tl.arange(0, tail[i].shape[1])[None, :]
            new += (tl.maximum(tail[i], counts * tl.load(tails_ptr + view * PADDED_C + c)),)
            first += tail[i].shape[1]
        tail = new
    return tail, found


@triton.jit
def _inside(box_ptr, y, x):
    """Which pixels lie in the rectangle of a view."""
    rows = (y >= tl.load(box_ptr)) & (y < tl.load(box_ptr + 2))
    return rows & (x >= tl.load(box_ptr + 1)) & (x < tl.load(box_ptr + 3))


@triton.jit
def _place(pixel, step, offset, cells):
    """Grid coordinate of output rows or columns."""
    return tl.minimum(tl.maximum(pixel.to(tl.float32) * step + offset, 0.0), (cells - 1).to(tl.float32))


@triton.jit
def _tile(index, H, W, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Of tile ``index`` of all images its image, first row and column, and rows and columns of its pixels.

    Past the edge the last pixel again, so that there is nothing to leave out.
    """
    columns = tl.cdiv(W, TILE_X)
    tiles = tl.cdiv(H, TILE_Y) * columns
    y0 = index % tiles // columns * TILE_Y
    x0 = index % tiles % columns * TILE_X
    pixel = tl.arange(0, TILE_Y * TILE_X)
    y, x = tl.minimum(y0 + pixel // TILE_X, H - 1), tl.minimum(x0 + pixel % TILE_X, W - 1)
    return index // tiles, y0, x0, y, x


@triton.jit
def _add_blocks(
    acc, cells_ptr, probs_ptr, info_ptr, view, ay, by, ax, bx, y, x, y0, x0, share, column,
    PADDED_Q: tl.constexpr, PADDED_C: tl.constexpr, BLOCK_Q: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr,
    PHASE: tl.constexpr, SPLIT: tl.constexpr, SHARED: tl.constexpr, SIGMOID: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The tokens of one view into the scores of a tile: those of its head, or of its tail."""
    view = view.to(tl.int64)
    info_ptr += view * 5
    h, w = tl.load(info_ptr + 1), tl.load(info_ptr + 2)
    if PHASE == 0:
        begin, end = 0, tl.load(info_ptr + 3)
    else:
        begin, end = tl.load(info_ptr + 3), tl.load(info_ptr + 4)
    low_y = tl.minimum(_place(y0, ay, by, h), _place(y0 + TILE_Y - 1, ay, by, h)).to(tl.int32)
    low_x = tl.minimum(_place(x0, ax, bx, w), _place(x0 + TILE_X - 1, ax, bx, w)).to(tl.int32)
    return _add_view(
        acc,
        cells_ptr + tl.load(info_ptr).to(tl.int64) * PADDED_Q,
        probs_ptr + view * PADDED_Q * PADDED_C + column,
        begin, end, _place(y, ay, by, h), _place(x, ax, bx, w), low_y, low_x, share, h, w,
        PADDED_Q, PADDED_C, BLOCK_Q, CELLS_Y, CELLS_X, SPLIT, SHARED, SIGMOID, PRECISION, STAGES,
    )  # fmt: skip


@triton.jit
def _add_views(
    acc, cells_ptr, probs_ptr, info_ptr, units_ptr, layout_ptr, affine_ptr, first_view, last_view,
    y, x, y0, x0, column, probs_scale,
    PADDED_Q: tl.constexpr, PADDED_C: tl.constexpr, BLOCK_Q: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr,
    PHASE: tl.constexpr, SPLIT: tl.constexpr, SIGMOID: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """:func:`_add_blocks` for all views of an image, and how many of its groups cover each pixel."""
    groups = tl.zeros([y.shape[0]], tl.float32)
    v = first_view
    while v < last_view:
        end = v + tl.load(layout_ptr + v * 7 + 2)
        covering = tl.zeros([y.shape[0]], tl.float32)
        for u in range(v, end):
            covering += _inside(layout_ptr + u * 7 + 3, y, x).to(tl.float32)
        groups += (covering > 0.0).to(tl.float32)
        for u in range(v, end):
            if _meets(layout_ptr + u * 7 + 3, y0, x0, TILE_Y, TILE_X):
                view = tl.load(layout_ptr + u * 7)
                share = tl.load(units_ptr + view) * probs_scale / tl.maximum(covering, 1.0)
                share = tl.where(_inside(layout_ptr + u * 7 + 3, y, x), share, 0.0)
                ay, by = tl.load(affine_ptr + u * 4), tl.load(affine_ptr + u * 4 + 1)
                ax, bx = tl.load(affine_ptr + u * 4 + 2), tl.load(affine_ptr + u * 4 + 3)
                acc = _add_blocks(
                    acc, cells_ptr, probs_ptr, info_ptr, view, ay, by, ax, bx, y, x, y0, x0, share, column,
                    PADDED_Q, PADDED_C, BLOCK_Q, TILE_Y, TILE_X, CELLS_Y, CELLS_X,
                    PHASE, SPLIT, True, SIGMOID, PRECISION, STAGES,
                )  # fmt: skip
        v = end
    return acc, groups


@triton.jit
def _semantic_argmax_kernel(
    cells_ptr, probs_ptr, tails_ptr, info_ptr, units_ptr, starts_ptr, layout_ptr, affine_ptr,
    labels_ptr, scores_ptr,
    H, W, step_y, offset_y, step_x, offset_x, C, sigma_scale, probs_scale,
    PADDED_Q: tl.constexpr, BLOCK_Q: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    TURNS: tl.constexpr, TAILS: tl.constexpr, SPLIT: tl.constexpr, SIGMOID: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Labels of one tile. Views are those of an image, sorted by group; without them view b is image b."""
    VIEWS: tl.constexpr = layout_ptr is not None
    PADDED_C: tl.constexpr = TURNS * (N0 + N1 + N2)
    PIXELS: tl.constexpr = TILE_Y * TILE_X
    b, y0, x0, y, x = _tile(tl.program_id(0), H, W, TILE_Y, TILE_X)

    first_view, last_view = b, b + 1
    if VIEWS:
        first_view, last_view = tl.load(starts_ptr + b), tl.load(starts_ptr + b + 1)
    groups = tl.full([PIXELS], 1.0, tl.float32)  # that cover a pixel
    best = tl.full([PIXELS], float("-inf"), tl.float32)
    label = tl.full([PIXELS], 2048, tl.int32)  # not known
    for turn in range(TURNS):
        column = turn * (N0 + N1 + N2)
        acc = _zeros(PIXELS, N0, N1, N2)
        if VIEWS:
            acc, groups = _add_views(
                acc, cells_ptr, probs_ptr, info_ptr, units_ptr, layout_ptr, affine_ptr, first_view, last_view,
                y, x, y0, x0, column, probs_scale, PADDED_Q, PADDED_C, BLOCK_Q, TILE_Y, TILE_X,
                CELLS_Y, CELLS_X, 0, SPLIT, SIGMOID, PRECISION, STAGES,
            )  # fmt: skip
        else:
            acc = _add_blocks(
                acc, cells_ptr, probs_ptr, info_ptr, b, step_y, offset_y, step_x, offset_x,
                y, x, y0, x0, groups, column, PADDED_Q, PADDED_C, BLOCK_Q, TILE_Y, TILE_X,
                CELLS_Y, CELLS_X, 0, SPLIT, False, SIGMOID, PRECISION, STAGES,
            )  # fmt: skip
        more = 1
        if TAILS:
            tails, any_tail = _tails(
                tails_ptr, info_ptr, units_ptr, layout_ptr, first_view, last_view, y0, x0, probs_scale,
                PADDED_C, TILE_Y, TILE_X, N0, N1, N2,
            )  # fmt: skip
            if any_tail != 0:
                label = _decide(acc, tails, groups if VIEWS else None, sigma_scale)
            more = (tl.max(label, 0) >= 2048).to(tl.int32)
        if more != 0:
            if TAILS:
                if VIEWS:
                    acc, groups = _add_views(
                        acc, cells_ptr, probs_ptr, info_ptr, units_ptr, layout_ptr, affine_ptr,
                        first_view, last_view, y, x, y0, x0, column, probs_scale,
                        PADDED_Q, PADDED_C, BLOCK_Q, TILE_Y, TILE_X,
                        CELLS_Y, CELLS_X, 1, SPLIT, SIGMOID, PRECISION, STAGES,
                    )  # fmt: skip
                else:
                    acc = _add_blocks(
                        acc, cells_ptr, probs_ptr, info_ptr, b, step_y, offset_y, step_x, offset_x,
                        y, x, y0, x0, groups, column, PADDED_Q, PADDED_C, BLOCK_Q, TILE_Y, TILE_X,
                        CELLS_Y, CELLS_X, 1, SPLIT, False, SIGMOID, PRECISION, STAGES,
                    )  # fmt: skip
            value, top = _top(acc, C - column)
            label = tl.where(value > best, top + column, label)
            best = tl.maximum(best, value)
    offsets = b.to(tl.int64) * H * W + y * W + x
    tl.store(labels_ptr + offsets, _some_class(label, C).to(labels_ptr.dtype.element_ty))
    if scores_ptr is not None:
        unit = 1.0 / (groups * (sigma_scale * probs_scale)) if VIEWS else tl.load(units_ptr + b) / sigma_scale
        tl.store(scores_ptr + offsets, best * unit)


@triton.jit
def _add_held(
    acc, upper, lower, cell, cells_ptr, held, PADDED_Q: tl.constexpr, BLOCKS: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, SPLIT: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Blocks FIRST to LAST of the tokens of one view into the scores, from class probabilities held."""
    for block in tl.static_range(FIRST, LAST):
        cols = BLOCKS[block][0] + tl.arange(0, BLOCKS[block][1])
        masks = tl.load(cells_ptr + cell.to(tl.int64)[:, None] * PADDED_Q + cols[None, :])
        x = tl.dot(upper, masks)
        if SPLIT:
            x = tl.dot(lower, masks, x)
        x = _activate(x, True, SIGMOID).to(tl.float16)
        new = ()
        for i in tl.static_range(len(acc)):
            new += (tl.dot(x, held[block * len(acc) + i], acc[i]),)
        acc = new
    return acc


@triton.jit
def _semantic_argmax_held_kernel(
    cells_ptr, probs_ptr, tails_ptr, info_ptr, units_ptr, labels_ptr, scores_ptr,
    H, W, step_y, offset_y, step_x, offset_x, C, sigma_scale, run,
    PADDED_Q: tl.constexpr, BLOCKS: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    HEAD: tl.constexpr, SPLIT: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Without views: labels of ``run`` tiles in a row, with the class probabilities of their image held."""
    PIXELS: tl.constexpr = TILE_Y * TILE_X
    PADDED_C: tl.constexpr = N0 + N1 + N2
    columns = tl.cdiv(W, TILE_X)
    tiles = tl.cdiv(H, TILE_Y) * columns
    runs = tl.cdiv(tiles, run)
    b = tl.program_id(0) // runs
    first_tile = tl.program_id(0) % runs * run
    view = b.to(tl.int64)
    h, w = tl.load(info_ptr + view * 5 + 1), tl.load(info_ptr + view * 5 + 2)
    cells_ptr += tl.load(info_ptr + view * 5).to(tl.int64) * PADDED_Q
    probs_ptr += view * PADDED_Q * PADDED_C
    held = ()
    for block in tl.static_range(len(BLOCKS)):
        ptrs = probs_ptr + (BLOCKS[block][0] + tl.arange(0, BLOCKS[block][1]))[:, None] * PADDED_C
        held += (tl.load(ptrs + tl.arange(0, N0)[None, :]),)
        if N1 > 0:
            held += (tl.load(ptrs + N0 + tl.arange(0, N1)[None, :]),)
        if N2 > 0:
            held += (tl.load(ptrs + N0 + N1 + tl.arange(0, N2)[None, :]),)

    tested = tl.load(info_ptr + view * 5 + 3) < tl.load(info_ptr + view * 5 + 4)
    pixel = tl.arange(0, PIXELS)
    last_tile = tl.minimum(first_tile + run, tiles)
    # What could move out of this loop would take the registers of the scores.
    for tile in tl.range(first_tile, last_tile, num_stages=1, disable_licm=True):
        y0, x0 = tile // columns * TILE_Y, tile % columns * TILE_X
        y, x = tl.minimum(y0 + pixel // TILE_X, H - 1), tl.minimum(x0 + pixel % TILE_X, W - 1)
        low_y = _place(y0, step_y, offset_y, h).to(tl.int32)
        low_x = _place(x0, step_x, offset_x, w).to(tl.int32)
        weight, cell = _weights(
            _place(y, step_y, offset_y, h),
            _place(x, step_x, offset_x, w),
            low_y,
            low_x,
            h,
            w,
            CELLS_Y,
            CELLS_X,
        )
        upper = weight.to(tl.float16)
        lower = upper
        if SPLIT:
            lower = (weight - upper.to(tl.float32)).to(tl.float16)
        acc = _zeros(PIXELS, N0, N1, N2)
        FIRST: tl.constexpr = HEAD // BLOCKS[0][1] if HEAD > 0 else len(BLOCKS)
        acc = _add_held(acc, upper, lower, cell, cells_ptr, held, PADDED_Q, BLOCKS, 0, FIRST, SPLIT, SIGMOID)
        label = tl.full([PIXELS], 2048, tl.int32)
        best = tl.full([PIXELS], 0.0, tl.float32)
        more = 1
        if HEAD > 0:
            if tested:
                tails, _ = _tails(
                    tails_ptr, info_ptr, units_ptr, None, b, b + 1, y0, x0, 1.0,
                    PADDED_C, TILE_Y, TILE_X, N0, N1, N2,
                )  # fmt: skip
                label = _decide(acc, tails, None, sigma_scale)
            more = (tl.max(label, 0) >= 2048).to(tl.int32)
        # A loop of one pass or none: Triton 3.6 fails on products under a condition inside a loop.
        for _ in tl.range(0, more, num_stages=1, disable_licm=True):
            acc = _add_held(
                acc, upper, lower, cell, cells_ptr, held, PADDED_Q, BLOCKS, FIRST, len(BLOCKS), SPLIT, SIGMOID
            )
            best, label = _top(acc, C)
        outputs = view * H * W + y * W + x
        tl.store(labels_ptr + outputs, _some_class(label, C).to(labels_ptr.dtype.element_ty))
        if scores_ptr is not None:
            tl.store(scores_ptr + outputs, best * tl.load(units_ptr + b) / sigma_scale)


def _in_rows(masks: Tensor) -> Tensor:
    """The masks, or a copy where 16 neighbours by number may be none in memory.

    The preparing kernel tells the compiler that they are, which then reads several at once where pointer and
    strides are aligned. They are where a row follows the other, or where no 16 of them cross into the next.
    """
    width, stride = masks.shape[-1], masks.stride(-2)
    apart = width % 16 != 0 and masks.shape[-2] > 1 and stride != width
    return masks.contiguous() if masks.stride(-1) != 1 or apart else masks


def _holds(
    config: dict[str, Any], dtype: torch.dtype, padded_q: int, views: list[Tensor], prune: float
) -> bool:
    """Whether a program can keep all class probabilities in shared memory while it goes from tile to tile."""
    bytes_held = 2 * padded_q * sum(config["parts"])
    whole = dtype == torch.float16 and config["turns"] == 1 and config["cells_y"] > 0
    return whole and not views and prune <= 0 and bytes_held <= config["held"]


def _blocks(padded_q: int, head: int, block_q: int) -> tuple[tuple[int, int], ...]:
    """First token and number of every block. Without a test there are registers for blocks twice as wide."""
    wide = 0 if head else padded_q // (2 * block_q) * (2 * block_q)
    found = [(start, 2 * block_q) for start in range(0, wide, 2 * block_q)]
    return (*found, *((start, block_q) for start in range(wide, padded_q, block_q)))


def _run_length(config: dict[str, Any], batch: int, tiles: int) -> int:
    """Tiles a program: as many as leave six times the programs that fill the device, at most 16."""
    return max(1, min(16, batch * tiles // (6 * config["programs"])))


def prepare(
    mask_logits: list[Tensor], class_probs: Tensor, head: int, prune: float, config: dict[str, Any]
) -> tuple[dict[str, Tensor], list[Launch]]:
    """What the second launch reads, still empty, as its arguments; and the launches that fill it.

    ``head``: tokens after which there is a test, 0 for none.
    """
    count, queries, classes = class_probs.shape
    single = mask_logits[0].dtype == torch.float32
    dtype = torch.float32 if single else torch.float16
    block_q, parts = config["block_q"], config["parts"]
    padded_q = cdiv(queries, block_q) * block_q
    padded_c = config["turns"] * sum(parts)
    total = sum(m.shape[0] * m.shape[2] * m.shape[3] for m in mask_logits)
    cells = class_probs.new_empty(total, padded_q, dtype=dtype)
    probs = class_probs.new_empty(count, padded_q, padded_c, dtype=dtype)
    tails = class_probs.new_empty(count, padded_c, dtype=torch.float32)
    info = class_probs.new_empty(count, _INFO, dtype=torch.int32)
    units = class_probs.new_empty(count, dtype=torch.float32)

    block_queries = max(block_q, next_power_of_2(queries))

    class_probs = addressable(class_probs, 2)
    constants = {
        "QUERIES": block_queries,
        "PADDED_Q": padded_q,
        "PADDED_C": padded_c,
        "BLOCK_Q": block_q,
        # A program holds all queries, of which more leave registers for less of each; cells are transposed in
        # shared memory, 64 KiB at most.
        "BLOCK_C": max(8, min(32, 8192 // block_queries)),
        "BLOCK_CELLS": max(1, min(64, max(16, 16384 // block_queries), 32768 // block_queries)),
        "HEAD": head,
        "ORDER": head > 0 or prune > 0,
        "SCALED": not single,
        "LARGEST": 1e30 if single else 65504.0,
    }
    launches, first_view, first_cell = [], 0, 0
    for masks in mask_logits:
        views_here, _, h, w = masks.shape
        if views_here == 0:
            continue
        masks = _in_rows(addressable(masks, 2))
        # With the one for class probabilities as many as run at once.
        programs = min(cdiv(h * w, constants["BLOCK_CELLS"]), config["multiprocessors"] // views_here - 1)
        programs = max(1, programs)
        order = None
        if constants["ORDER"]:
            order = class_probs.new_empty(views_here * (programs + 1), block_queries, dtype=torch.int32)
        arguments = {
            "masks_ptr": masks,
            "p_ptr": class_probs,
            "cells_ptr": cells,
            "probs_ptr": probs,
            "tails_ptr": tails,
            "info_ptr": info,
            "units_ptr": units,
            "order_ptr": order,
            **{f"stride_m{axis}": s for axis, s in zip("vqhw", masks.stride(), strict=True)},
            **{f"stride_p{axis}": s for axis, s in zip("vqc", class_probs.stride(), strict=True)},
            "first_view": first_view,
            "first_cell": first_cell,
            "programs": programs,
            "Q": queries,
            "C": classes,
            "h": h,
            "w": w,
            "prune": prune if prune > 0 else -torch.finfo(torch.float32).max,
            "hopeless": _HOPELESS,
        }
        most = 16 if masks.dtype.itemsize == 2 else 8  # of 128 registers float32 spills in a loop
        options = {"num_warps": max(4, min(most, block_queries // 8)), "num_stages": 1}
        launch = Launch(
            _semantic_argmax_prepare_kernel, views_here * (programs + 1), arguments, constants, options
        )
        launches.append(launch)
        first_view, first_cell = first_view + views_here, first_cell + views_here * h * w
    written = {
        "cells_ptr": cells,
        "probs_ptr": probs,
        "tails_ptr": tails,
        "info_ptr": info,
        "units_ptr": units,
    }
    return written, launches


def main_launch(
    mask_logits: list[Tensor],
    views: list[Tensor],
    height: int,
    width: int,
    sigmoid: bool,
    config: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Arguments, constants and options of the second launch that do not depend on its results."""
    single = mask_logits[0].dtype == torch.float32
    queries = mask_logits[0].shape[1]
    block_q, parts = config["block_q"], config["parts"]
    h, w = mask_logits[0].shape[2:]
    step_y, step_x = h / height, w / width
    exact = not views and shares_in_float16((height, width), (h, w))
    starts, layout, affine = views or (None, None, None)
    arguments = {
        "starts_ptr": starts,
        "layout_ptr": layout,
        "affine_ptr": affine,
        "H": height,
        "W": width,
        "step_y": step_y,
        "offset_y": step_y / 2 - 0.5,
        "step_x": step_x,
        "offset_x": step_x / 2 - 0.5,
        "sigma_scale": _SIGMA_SCALE if sigmoid and not single else 1.0,
        "probs_scale": 1.0 if single else _PROBS_SCALE,
    }
    widths = (*parts, 0, 0)
    constants = {
        "PADDED_Q": cdiv(queries, block_q) * block_q,
        "BLOCK_Q": block_q,
        "TILE_Y": config["tile_y"],
        "TILE_X": config["tile_x"],
        "CELLS_Y": config["cells_y"],
        "CELLS_X": config["cells_x"],
        "N0": widths[0],
        "N1": widths[1],
        "N2": widths[2],
        "TURNS": config["turns"],
        "SPLIT": not (single or exact),
        "SIGMOID": sigmoid,
        "PRECISION": config["precision"] if single else None,
        "STAGES": config["num_stages"],
    }
    options = {name: config[name] for name in ("num_warps", "num_stages", "maxnreg") if name in config}
    return arguments, constants, options


def _launches(
    mask_logits: list[Tensor],
    class_probs: Tensor,
    views: list[Tensor],
    batch: int,
    height: int,
    width: int,
    sigmoid: bool,
    need_scores: bool,
    prune: float,
    config: dict[str, Any],
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Labels and scores, still empty, and the launches that fill them."""
    classes = class_probs.shape[2]
    labels = class_probs.new_empty(batch, height, width, dtype=torch.uint8 if classes <= 256 else torch.int16)
    scores = class_probs.new_empty((batch, height, width) if need_scores else (0,), dtype=torch.float32)
    if batch == 0:
        return (labels, scores), []

    # σ is at most 1, and scores want all of the sum.
    head = config["head"] if sigmoid and not need_scores else 0
    written, launches = prepare(mask_logits, class_probs, head, prune, config)
    arguments, constants, options = main_launch(mask_logits, views, height, width, sigmoid, config)
    arguments |= written
    arguments |= {"labels_ptr": labels, "scores_ptr": scores if need_scores else None, "C": classes}
    constants["TAILS"] = head > 0
    tiles = cdiv(height, config["tile_y"]) * cdiv(width, config["tile_x"])
    kernel, programs = _semantic_argmax_kernel, batch * tiles
    if _holds(config, written["probs_ptr"].dtype, constants["PADDED_Q"], views, prune):
        kernel, run = _semantic_argmax_held_kernel, _run_length(config, batch, tiles)
        programs = batch * cdiv(tiles, run)
        for name in ("starts_ptr", "layout_ptr", "affine_ptr", "probs_scale"):
            del arguments[name]
        for name in ("TURNS", "TAILS", "PRECISION", "STAGES", "BLOCK_Q"):
            del constants[name]
        arguments["run"], constants["HEAD"] = run, head
        constants["BLOCKS"] = _blocks(constants["PADDED_Q"], head, config["block_q"])
    launches.append(Launch(kernel, programs, arguments, constants, options))
    return (labels, scores), launches


def found_config(
    masks: Tensor,
    class_probs: Tensor,
    views: list[Tensor],
    batch: int,
    height: int,
    width: int,
    reach: list[float],
    arch: str | None = None,
    most: int | None = None,
) -> dict[str, Any]:
    """:func:`_config` of one call, for ``arch`` or the device of the masks."""
    if not views:
        reach = [masks.shape[2] / height, masks.shape[3] / width]
    shape = (batch, height, width, *class_probs.shape[1:])
    return _config(shape, masks.dtype, arch or target(masks.device), tuple(reach), most)


@planned
def semantic_argmax(
    mask_logits: list[Tensor],
    class_probs: Tensor,
    views: list[Tensor],
    batch: int,
    height: int,
    width: int,
    reach: list[float],
    sigmoid: bool,
    need_scores: bool,
    prune: float,
    *,
    config: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Launcher of ``segvit::semantic_argmax``; ``config`` replaces entries of :func:`_config`."""
    found = found_config(mask_logits[0], class_probs, views, batch, height, width, reach)
    arguments = (mask_logits, class_probs, views, batch, height, width, sigmoid, need_scores, prune)
    return _launches(*arguments, {**found, **(config or {})})
