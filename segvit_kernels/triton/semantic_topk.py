"""The best classes of every pixel on a GPU: how :mod:`segvit_kernels.ops.semantic_topk` runs in Triton.

The launches of :mod:`segvit_kernels.triton.semantic_argmax`, without the test of the head, since shares want
all of every sum. When the scores of a tile are in registers, K rounds take the best class that comes after
the one before it: nothing is written over, and ties come in the order of classes. Where classes do not fit
at once, those of every turn are sorted into what the turns before found, K·K exchanges a pixel.

Bytes: K classes and K float32 shares a pixel are written in place of one label. Units of σ and of the
probabilities cancel in a share.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton import semantic_argmax
from segvit_kernels.triton._launch import Launch, cdiv
from segvit_kernels.triton._plan import planned
from segvit_kernels.triton.semantic_argmax import _add_blocks, _add_views, _some_class, _tile, _zeros

# The argmax's configuration of one call, with fewer classes at once: beside 304 scores a round spills.
found_config = functools.partial(semantic_argmax.found_config, most=192)


@triton.jit
def _next(acc, classes, before, its):
    """Of every pixel the best class that comes after class ``its`` with its score ``before``."""
    best = tl.full([acc[0].shape[0]], float("-inf"), tl.float32)
    label = tl.zeros([acc[0].shape[0]], tl.int32)
    first = 0
    for i in tl.static_range(len(acc)):
        c = first + tl.arange(0, acc[i].shape[1])[None, :]
        after = (acc[i] < before[:, None]) | ((acc[i] == before[:, None]) & (c > its[:, None]))
        scores = tl.where((c < classes) & after, acc[i], float("-inf"))
        value = tl.max(scores, 1)
        found = tl.min(tl.where(scores == value[:, None], c, 65535), 1)
        label = tl.where(value > best, found, label)
        best = tl.maximum(value, best)
        first += acc[i].shape[1]
    return best, label


@triton.jit
def _sorted_in(values, labels, value, label):
    """A score and its class put among K in order, behind equal scores; the last falls out."""
    new_values = ()
    new_labels = ()
    ahead = value > values[0]
    for j in tl.static_range(len(values)):
        ahead = ahead | (value > values[j])  # from there on each moves one place, equal scores too
        new_values += (tl.where(ahead, value, values[j]),)
        new_labels += (tl.where(ahead, label, labels[j]),)
        value, label = tl.where(ahead, values[j], value), tl.where(ahead, labels[j], label)
    return new_values, new_labels


@triton.jit
def _semantic_topk_kernel(
    cells_ptr, probs_ptr, info_ptr, units_ptr, starts_ptr, layout_ptr, affine_ptr, classes_ptr, shares_ptr,
    H, W, step_y, offset_y, step_x, offset_x, C, sigma_scale, probs_scale,
    K: tl.constexpr, PADDED_Q: tl.constexpr, BLOCK_Q: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    TURNS: tl.constexpr, SPLIT: tl.constexpr, SIGMOID: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Classes and shares of one tile; views as in ``_semantic_argmax_kernel``."""
    VIEWS: tl.constexpr = layout_ptr is not None
    PADDED_C: tl.constexpr = TURNS * (N0 + N1 + N2)
    PIXELS: tl.constexpr = TILE_Y * TILE_X
    b, y0, x0, y, x = _tile(tl.program_id(0), H, W, TILE_Y, TILE_X)
    groups = tl.full([PIXELS], 1.0, tl.float32)

    total = tl.zeros([PIXELS], tl.float32)
    values = ()
    labels = ()
    for _ in tl.static_range(K):
        values += (tl.full([PIXELS], float("-inf"), tl.float32),)
        labels += (tl.zeros([PIXELS], tl.int32),)
    for turn in range(TURNS):
        column = turn * (N0 + N1 + N2)
        acc = _zeros(PIXELS, N0, N1, N2)
        if VIEWS:
            acc, groups = _add_views(
                acc, cells_ptr, probs_ptr, info_ptr, units_ptr, layout_ptr, affine_ptr,
                tl.load(starts_ptr + b), tl.load(starts_ptr + b + 1),
                y, x, y0, x0, column, probs_scale, PADDED_Q, PADDED_C, BLOCK_Q, TILE_Y, TILE_X,
                CELLS_Y, CELLS_X, 0, SPLIT, SIGMOID, PRECISION, STAGES,
            )  # fmt: skip
        else:
            acc = _add_blocks(
                acc, cells_ptr, probs_ptr, info_ptr, b, step_y, offset_y, step_x, offset_x,
                y, x, y0, x0, groups, column, PADDED_Q, PADDED_C, BLOCK_Q, TILE_Y, TILE_X,
                CELLS_Y, CELLS_X, 0, SPLIT, False, SIGMOID, PRECISION, STAGES,
            )  # fmt: skip
        for i in tl.static_range(len(acc)):
            total += tl.sum(acc[i], 1)  # of classes that are padding it is 0
        value = tl.full([PIXELS], float("inf"), tl.float32)
        label = tl.full([PIXELS], -1, tl.int32)
        for _ in tl.static_range(K):
            value, label = _next(acc, C - column, value, label)
            values, labels = _sorted_in(values, labels, value, label + column)
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    for j in tl.static_range(K):
        offsets = (b.to(tl.int64) * K + j) * H * W + y * W + x
        tl.store(classes_ptr + offsets, _some_class(labels[j], C).to(classes_ptr.dtype.element_ty))
        tl.store(shares_ptr + offsets, tl.where(some, values[j] / total, 1.0 / C))


def _launches(
    mask_logits: list[Tensor],
    class_probs: Tensor,
    views: list[Tensor],
    batch: int,
    height: int,
    width: int,
    sigmoid: bool,
    k: int,
    prune: float,
    config: dict[str, Any],
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Classes and shares, still empty, and the launches that fill them."""
    number = class_probs.shape[2]
    shape = (batch, k, height, width)
    classes = class_probs.new_empty(shape, dtype=torch.uint8 if number <= 256 else torch.int16)
    shares = class_probs.new_empty(shape, dtype=torch.float32)
    if batch == 0:
        return (classes, shares), []
    written, launches = semantic_argmax.prepare(mask_logits, class_probs, 0, prune, config)
    del written["tails_ptr"]
    arguments, constants, options = semantic_argmax.main_launch(
        mask_logits, views, height, width, sigmoid, config
    )
    arguments |= written | {"classes_ptr": classes, "shares_ptr": shares, "C": number}
    constants["K"] = k
    # The cap is for as many programs as the argmax has; what is sorted takes more registers.
    options.pop("maxnreg", None)
    tiles = cdiv(height, config["tile_y"]) * cdiv(width, config["tile_x"])
    launches.append(Launch(_semantic_topk_kernel, batch * tiles, arguments, constants, options))
    return (classes, shares), launches


@planned
def semantic_topk(
    mask_logits: list[Tensor],
    class_probs: Tensor,
    views: list[Tensor],
    batch: int,
    height: int,
    width: int,
    reach: list[float],
    sigmoid: bool,
    k: int,
    prune: float,
    *,
    config: dict[str, Any] | None = None,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Launcher of ``segvit::semantic_topk``; ``config`` replaces entries of the argmax's configuration."""
    found = found_config(mask_logits[0], class_probs, views, batch, height, width, reach)
    arguments = (mask_logits, class_probs, views, batch, height, width, sigmoid, k, prune)
    return _launches(*arguments, {**found, **(config or {})})
