"""Class scores of a mask classifier in blocks of rows: what the eager backends make labels of.

A block is as large as the cache; nothing of the output's size exists. The formula stands in
:mod:`segvit_kernels.ops.semantic_argmax`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_BUDGET = 2**19  # elements of a block of masks or scores on the CPU: 2 MiB stay in the cache
_HUGE = 1e30  # stands for infinity: an infinite logit times an interpolation weight of 0 is not a number


def label_dtype(classes: int) -> torch.dtype:
    """Of label maps."""
    return torch.uint8 if classes <= 256 else torch.int16


class Part(NamedTuple):
    """One view, ready to be mixed: ``affine`` and ``columns`` say where its mask lies in the output."""

    mask: Tensor  # (Q, h, w), any dtype
    mixing: Tensor  # (C, Q), or the diagonal (Q); in the dtype of the scores
    affine: Sequence[Any]  # floats, or on other devices than the CPU 0-d tensors
    columns: tuple[int, int]


def part_of(
    mask: Tensor,
    probs: Tensor,
    dtype: torch.dtype,
    prune: float,
    affine: Sequence[Any],
    columns: tuple[int, int],
) -> Part:
    """A view of mask (Q, h, w) and probabilities (Q, C) or (Q), without the queries below ``prune``."""
    probs = probs.to(dtype)
    if prune and probs.ndim == 1:
        probs = probs * (probs >= prune)
    elif prune:
        keep = probs.sum(1) >= prune
        cpu = probs.device.type == "cpu"
        mask, probs = (mask[keep], probs[keep]) if cpu else (mask, probs * keep[:, None])
    return Part(mask, probs.t(), affine, columns)


def _axis(step: Any, offset: Any, start: int, stop: int, cells: int, device: torch.device) -> Tensor:
    """Places of output pixels on an axis of ``cells`` cells."""
    dtype = torch.float64 if device.type == "cpu" else torch.float32  # not every device has float64
    return torch.arange(start, stop, dtype=dtype, device=device).mul_(step).add_(offset).clamp_(0, cells - 1)


def _mix(part: Part, top: int, bottom: int, sigmoid: bool) -> Tensor:
    """Scores (C, rows, columns) of one view in the rows ``top`` to ``bottom`` of the columns it covers."""
    (queries, h, w), dtype, device = part.mask.shape, part.mixing.dtype, part.mask.device
    ay, by, ax, bx = part.affine
    place = _axis(ay, by, top, bottom, h, device)
    lower = place.long()
    rows, below = (
        part.mask.index_select(1, index).to(dtype).clamp_(-_HUGE, _HUGE)
        for index in (lower, (lower + 1).clamp_(max=h - 1))
    )
    rows.lerp_(below, (place - lower).to(dtype)[:, None])
    # Linear interpolation along the columns is a product with a matrix of hat functions.
    place = _axis(ax, bx, *part.columns, w, device)
    hats = (place - torch.arange(w, device=device)[:, None]).abs_().neg_().add_(1).clamp_(min=0).to(dtype)
    block = rows.view(-1, w) @ hats
    if sigmoid:
        block.sigmoid_()
    area = (bottom - top, block.shape[1])
    if part.mixing.ndim == 1:
        return block.view(queries, *area).mul_(part.mixing[:, None, None])
    return (part.mixing @ block.view(queries, math.prod(area))).view(-1, *area)


def mix_at(part: Part, y: Tensor, x: Tensor) -> Tensor:
    """Scores (C, n) of one view, sigmoid included, at n scattered pixels (CPU)."""
    (_, h, w), dtype = part.mask.shape, part.mixing.dtype
    y = (y.double() * part.affine[0] + part.affine[1]).clamp_(0, h - 1)
    x = (x.double() * part.affine[2] + part.affine[3]).clamp_(0, w - 1)
    top, left = y.long(), x.long()
    wy, wx = y - top, x - left
    bottom, right = (top + 1).clamp_(max=h - 1), (left + 1).clamp_(max=w - 1)
    taps = torch.stack([top * w + left, top * w + right, bottom * w + left, bottom * w + right], 1)
    weights = torch.stack([(1 - wy) * (1 - wx), (1 - wy) * wx, wy * (1 - wx), wy * wx], 1)
    table = part.mask.flatten(1).t().to(dtype, memory_format=torch.contiguous_format).clamp(-_HUGE, _HUGE)
    masks = F.embedding_bag(taps, table, mode="sum", per_sample_weights=weights.to(dtype))
    return part.mixing @ masks.sigmoid_().t()


def shares(image: Tensor, group: Tensor, inside: Tensor) -> Tensor:
    """The share (V, N) of every view in the mean at N pixels; ``inside`` (V, N) is 1 where it covers one."""
    same_image = image[:, None] == image
    same_group = same_image & (group[:, None] == group)
    share = inside / (same_group.to(inside.dtype) @ inside).clamp_(min=1)
    return share / (same_image.to(inside.dtype) @ share).clamp_(min=1)


def first_maximum(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first largest of ``scores`` (C, ...) along C, and its value; overwrites the scores."""
    # Three vectorised passes; argmax over anything but the last dimension takes five times as long on a CPU.
    best = scores.amax(0)
    classes = scores.shape[0]
    rank = torch.arange(classes, 0, -1, dtype=scores.dtype, device=scores.device)
    rank = scores.ge_(best).mul_(rank.view(-1, *(1,) * best.ndim)).amax(0)
    return (classes - rank).clamp_(max=classes - 1), best


def block_scores(
    parts: list[Part], weights: Tensor | None, top: int, bottom: int, width: int, sigmoid: bool
) -> Tensor:
    """Scores (C, rows, width) of an image: the mean of its views with ``weights`` (V, width), if many."""
    if weights is None:
        return _mix(parts[0], top, bottom, sigmoid)
    total = weights.new_zeros(parts[0].mixing.shape[0], bottom - top, width)
    for part, weight in zip(parts, weights, strict=True):
        columns = slice(*part.columns)
        total[..., columns].addcmul_(_mix(part, top, bottom, sigmoid), weight[columns])
    return total


def pixel_scores(parts: list[Part], weights: Tensor | None, y: Tensor, x: Tensor) -> Tensor:
    """The same (C, n) at scattered pixels."""
    if weights is None:
        return mix_at(parts[0], y, x)
    total = weights.new_zeros(parts[0].mixing.shape[0], len(x))
    for part, weight in zip(parts, weights, strict=True):
        covered = ((part.columns[0] <= x) & (x < part.columns[1])).nonzero()[:, 0]
        scores = mix_at(part, y[covered], x[covered])
        total.index_add_(1, covered, scores.mul_(weight[x[covered]]))
    return total


def rows_of(parts: list[Part], width: int) -> int:
    """Rows of a block, one at least; elsewhere than on the CPU a block takes 256 MiB."""
    budget = _BUDGET if parts[0].mixing.device.type == "cpu" else 2**26
    return max(1, budget // (max(max(part.mixing.shape) for part in parts) * width))


class Band(NamedTuple):
    """Rows of an image that the same views cover."""

    top: int
    bottom: int
    active: list[int]  # which of the image's parts
    weights: Tensor | None  # (len(active), width), where there are several


def images(
    masks: list[Tensor],
    class_probs: Tensor,
    views: list[Tensor],
    labels: Tensor,
    dtype: torch.dtype,
    prune: float,
) -> Iterator[tuple[int, list[Part], list[Band]]]:
    """Every image with its views and its bands, for scores of ``dtype``; reads ``views`` on the host.

    ``labels`` (B, ..., H, W) says how many images of which size.
    """
    batch, (height, width) = labels.shape[0], labels.shape[-2:]
    for b in range(batch):
        if views:
            first, last = views[0][b : b + 2].tolist()
            layout = views[1][first:last]
            indices, _, _, tops, lefts, bottoms, rights = layout.T.tolist()
            affines = views[2][first:last].tolist()
        else:
            (h, w), indices = masks[b].shape[1:], [b]
            tops, lefts, bottoms, rights = [0], [0], [height], [width]
            affines = [(h / height, (h / height - 1) / 2, w / width, (w / width - 1) / 2)]
        parts = [
            part_of(masks[i], class_probs[i], dtype, prune, affine, columns)
            for i, affine, columns in zip(indices, affines, zip(lefts, rights, strict=True), strict=True)
        ]
        bands = []
        for top, bottom in itertools.pairwise(sorted({0, height, *tops, *bottoms})):
            active = [
                i
                for i in range(len(parts))
                if tops[i] <= top and bottom <= bottoms[i] and lefts[i] < rights[i]
            ]
            weights = None
            if len(active) > 1:
                x, box = torch.arange(width, device=layout.device), layout[active]
                inside = (box[:, 4:5] <= x) & (x < box[:, 6:7])
                weights = shares(torch.zeros_like(box[:, 1]), box[:, 1], inside.to(dtype))
            bands.append(Band(top, bottom, active, weights))
        yield b, parts, bands


def blocks_without_sync(
    masks: list[Tensor],
    class_probs: Tensor,
    views: list[Tensor],
    labels: Tensor,
    dtype: torch.dtype,
    prune: float,
    sigmoid: bool,
) -> Iterator[tuple[int, int, Tensor]]:
    """Scores (C, B, rows, W) of the rows of every image, with views that only the device knows.

    Every view works on every row. ``labels`` (B, ..., H, W) says how many images of which size.
    """
    starts, layout, affine = views
    batch, (height, width), device = labels.shape[0], labels.shape[-2:], labels.device
    order = layout[:, 0].argsort()
    image = torch.bucketize(torch.arange(len(masks), device=device), starts[1:], right=True)[order]
    _, group, _, tops, lefts, bottoms, rights = layout[order].unbind(1)
    parts = [
        part_of(mask, probs, dtype, prune, own.unbind(), (0, width))
        for mask, probs, own in zip(masks, class_probs, affine[order], strict=True)
    ]
    x = torch.arange(width, device=device)
    inside_x = (lefts[:, None] <= x) & (x < rights[:, None])
    rows = max(1, rows_of(parts, width) // batch)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        y = torch.arange(top, bottom, device=device)
        inside = ((tops[:, None] <= y) & (y < bottoms[:, None]))[:, :, None] & inside_x[:, None]
        weights = shares(image, group, inside.to(dtype).flatten(1)).view(inside.shape)
        total = parts[0].mixing.new_zeros(batch, parts[0].mixing.shape[0], bottom - top, width)
        for v, part in enumerate(parts):
            block = _mix(part, top, bottom, sigmoid).mul_(weights[v])
            total.index_add_(0, image[v : v + 1], block[None])
        yield top, bottom, total.transpose(0, 1)


def macs(
    mask_logits: Any, class_probs: tuple[int, ...], views: Any, batch: int, height: int, width: int, *_: Any
) -> int:
    """Class mixing of every view at every output pixel: an upper bound where views cover only a part."""
    return math.prod(class_probs) * height * width


def refuse_of_kernels(
    backend: str,
    mask_logits: list[Tensor],
    class_probs: Tensor,
    views: Any,
    batch: int,
    height: int,
    width: int,
    *_: Any,
) -> Exception | None:
    """What the kernels of both operators refuse."""
    for name, tensor in (("mask_logits", mask_logits[0]), ("class_probs", class_probs)):
        if tensor.dtype == torch.float64:
            return TypeError(f"backend {backend!r} takes float32, float16 and bfloat16; {name} is float64")
    if class_probs.ndim == 2:
        return ValueError(f"backend {backend!r} takes a matrix of class_probs; got its diagonal")
    if backend == "triton" and height * width >= 2**31:  # it counts an image's pixels in 32 bits
        return ValueError(f"backend 'triton' takes up to 2³¹ − 1 pixels; size is {(height, width)}")
    return None
