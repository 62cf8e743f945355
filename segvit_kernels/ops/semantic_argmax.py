"""Semantic argmax: the label map of a mask classifier, with no score tensor of full size.

Of masks M_q on a small grid and class probabilities p, for every output pixel:

    s_c(y, x) = Σ_q p[q, c] · σ(bilinear(M_q)(y, x))
    label(y, x) = argmax_c s_c(y, x), the lower class of equal ones

(semantic inference of MaskFormer, NeurIPS 2021, section 3.4; SegViT uses the same.) Interpolation is that of
``F.interpolate(mode="bilinear", align_corners=False)``. Where query i is class i and nothing else (SegViTv2,
arXiv 2306.06289; a pixel classifier) p is diagonal and given as a vector: s_c = p_c · σ(bilinear(M_c)).
Without views, or where an image's only view is the upper left part of a picture, that is
:func:`panoptic_argmax`, and its kernels do it. For other views, and for scores, eager mode multiplies class
by class, and kernels get the matrix, most of which their shortcut skips.

With *views*, several predictions share an output: windows, scales, flips. A view sees a rectangle of the
output through one affine map per axis. The score of a pixel is the mean, over the groups that cover it, of
the mean over a group's views that cover it; one group is the plain mean, and a group per scale gives each
scale the same say however many windows it was cut into.

Exact shortcut (sigmoid, no scores asked for): class probabilities are non-negative and σ ≤ 1, so the
queries after the K with the most class mass can add at most r_c = Σ_rest p[q, c] to class c. Where the winner
w of the first K has s_w > s_c + r_c for every other c, the rest need not be computed. Trained models give a
few queries nearly all mass.

Where scores are not numbers the label is some class: always in [0, classes), 0 where no score is one.

Refused: anything but 4-D masks of one floating dtype, probabilities (views, queries, classes) or diagonals
(views, queries), one device, views that leave a pixel of the output uncovered.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit_kernels import _library
from segvit_kernels.ops._attention import unit_stride
from segvit_kernels.ops._checks import flag, number, size_pair, tensors
from segvit_kernels.ops.panoptic_argmax import MOST_QUERIES, panoptic_argmax

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ACTIVATIONS = ("sigmoid", "none")


@dataclasses.dataclass(frozen=True)
class View:
    """How one prediction on a small grid maps to the output.

    Attributes:
        image: which output it belongs to.
        affine: (ay, by, ax, bx): output row y reads grid row ay·y + by, clamped to [0, h − 1], where i is the
            centre of cell i; columns likewise. A negative step is a flip.
        rectangle: (top, left, bottom, right) of the output pixels it covers, half open.
        group: views of a group are averaged first, then the groups.
    """

    image: int
    affine: tuple[float, float, float, float]
    rectangle: tuple[int, int, int, int]
    group: int = 0

    @classmethod
    def whole(cls, image: int, grid: tuple[int, int], size: tuple[int, int], group: int = 0) -> View:
        """A grid (h, w) stretched over the whole output (H, W), as ``F.interpolate`` does."""
        return cls.crop(image, size, size, 0, 0, size, grid, group=group)

    @classmethod
    def crop(
        cls,
        image: int,
        size: tuple[int, int],
        resized: tuple[int, int],
        top: int,
        left: int,
        crop: tuple[int, int],
        grid: tuple[int, int],
        flip: bool = False,
        group: int = 0,
    ) -> View:
        """The prediction on a crop of the resized image.

        Args:
            image: which output it belongs to.
            size: (H, W) of the output.
            resized: (rh, rw), the size to which the image was resized before cropping.
            top, left: first row and column of the crop in the resized image.
            crop: (ch, cw), what the network saw, padding included.
            grid: (h, w) of the prediction.
            flip: the crop was mirrored left-right before the network.
            group: see :class:`View`.

        The rectangle holds the output pixels whose centre lies in the crop.
        """
        (H, W), (rh, rw), (ch, cw), (h, w) = size, resized, crop, grid
        ay, by = _crop_axis(H, rh, top, ch, h)
        ax, bx = _crop_axis(W, rw, left, cw, w)
        if flip:
            ax, bx = -ax, (w - 1) - bx
        (y0, y1), (x0, x1) = _covered(H, rh, top, ch), _covered(W, rw, left, cw)
        return cls(image, (ay, by, ax, bx), (y0, x0, y1, x1), group)


def _crop_axis(size: int, resized: int, start: int, length: int, cells: int) -> tuple[float, float]:
    """Step and offset from output pixels to the cells of a crop."""
    scale = resized / size
    return scale * cells / length, (scale / 2 - start) * cells / length - 0.5


def _covered(size: int, resized: int, start: int, length: int) -> tuple[int, int]:
    """The output pixels y whose centre (y + 1/2)·resized/size lies in [start, start + length)."""
    first, last = (-((resized - 2 * edge * size) // (2 * resized)) for edge in (start, start + length))
    return min(max(first, 0), size), min(max(last, 0), size)


class Views:
    """The views of a batch, checked once and ready on a device.

    Args:
        views: one :class:`View` per mask, in the order of ``mask_logits``.
        batch: number of outputs.
        size: (H, W) of every output.
        device: where the masks will be.

    Attributes:
        views, batch, size: as given.
        reach: the largest \\|ay\\| and \\|ax\\|, by which a kernel plans its tiles.
        tensors: ``starts`` (B + 1) int32, the first view of every image; ``layout`` (V, 7) int32: index in
            the caller's order, group, number of views of that group and image, top, left, bottom, right;
            ``affine`` (V, 4) float32; the latter two sorted by image, then group.

    Raises:
        ValueError: a view's image, rectangle or map is out of range, or an output pixel is not covered.
    """

    def __init__(
        self,
        views: Sequence[View],
        batch: int,
        size: tuple[int, int],
        device: torch.device | str | None = None,
    ) -> None:
        self.views, self.batch, self.size = tuple(views), batch, (int(size[0]), int(size[1]))
        for index, view in enumerate(self.views):
            _check_view(index, view, batch, self.size)
        for image in range(batch):
            _check_coverage(image, [v.rectangle for v in self.views if v.image == image], self.size)
        self.reach = [max((abs(v.affine[i]) for v in self.views), default=0.0) for i in (0, 2)]
        order = sorted(range(len(self.views)), key=lambda i: (self.views[i].image, self.views[i].group))
        members: dict[tuple[int, int], int] = {}
        starts = [0] * (batch + 1)
        for view in self.views:
            members[view.image, view.group] = members.get((view.image, view.group), 0) + 1
            starts[view.image + 1] += 1
        layout, affine = [], []
        for index in order:
            view = self.views[index]
            layout.append([index, view.group, members[view.image, view.group], *view.rectangle])
            affine.append(view.affine)
        self.tensors = [
            torch.tensor(starts, dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32),
            torch.tensor(layout, dtype=torch.int32, device="cpu").view(-1, 7),
            torch.tensor(affine, dtype=torch.float32, device="cpu").view(-1, 4),
        ]
        if device is not None:
            self.tensors = [t.to(device) for t in self.tensors]

    def __len__(self) -> int:
        return len(self.views)

    def to(self, device: torch.device | str) -> Views:
        """The same views with their tensors on ``device``."""
        moved = object.__new__(Views)
        moved.__dict__.update(self.__dict__, tensors=[t.to(device) for t in self.tensors])
        return moved


def _check_view(index: int, view: View, batch: int, size: tuple[int, int]) -> None:
    top, left, bottom, right = view.rectangle
    if not 0 <= view.image < batch:
        raise ValueError(f"view {index} has image {view.image}; expected 0 to {batch - 1}")
    if not (0 <= top <= bottom <= size[0] and 0 <= left <= right <= size[1]):
        raise ValueError(
            f"view {index} has rectangle {view.rectangle}; expected (top, left, bottom, right) inside an "
            f"output of size {size}"
        )
    if not all(map(math.isfinite, view.affine)) or 0 in view.affine[::2]:
        raise ValueError(f"view {index} has affine {view.affine}; expected finite numbers and nonzero steps")


def _check_coverage(image: int, rectangles: list[tuple[int, int, int, int]], size: tuple[int, int]) -> None:
    """Look at one pixel of every cell into which the rectangles' edges cut the output."""
    box = torch.tensor(rectangles, device="cpu").view(-1, 4)
    rows = torch.tensor(sorted({0, *(edge for r in rectangles for edge in r[::2])} - {size[0]}), device="cpu")
    columns = torch.tensor(sorted({0, *(e for r in rectangles for e in r[1::2])} - {size[1]}), device="cpu")
    inside_y = (box[:, :1] <= rows) & (rows < box[:, 2:3])
    inside_x = (box[:, 1:2] <= columns) & (columns < box[:, 3:])
    bare = (inside_y.float().T @ inside_x.float() == 0).nonzero()
    if len(bare):
        pixel = (int(rows[bare[0, 0]]), int(columns[bare[0, 1]]))
        raise ValueError(f"the views of image {image} do not cover pixel {pixel} of an output of size {size}")


def semantic_argmax_reference(
    mask_logits: Tensor | Sequence[Tensor],
    class_probs: Tensor,
    size: tuple[int, int],
    *,
    views: Views | None = None,
    activation: str = "sigmoid",
    prune: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The meaning of :func:`semantic_argmax` in ordinary PyTorch, with every score in memory.

    Returns:
        labels (B, H, W) and the scores of *all* classes (B, C, H, W), in the dtype of the masks.
    """
    stacks = [mask_logits] if isinstance(mask_logits, Tensor) else list(mask_logits)
    masks = [mask for stack in stacks for mask in stack]
    probs = class_probs.to(stacks[0].dtype)
    if prune:
        probs = probs * (_mass(class_probs) >= prune)

    def activate(x: Tensor) -> Tensor:
        return x.sigmoid() if activation == "sigmoid" else x

    if views is None:
        full = [
            activate(F.interpolate(m[None], size=tuple(size), mode="bilinear", align_corners=False)[0])
            for m in masks
        ]
        scores = [_mixed(p, m) for p, m in zip(probs, full, strict=True)]
    else:
        sums: dict[tuple[int, int], list[Tensor]] = {}
        for view, mask, p in zip(views.views, masks, probs, strict=True):
            top, left, bottom, right = view.rectangle
            inside = mask.new_zeros(size)
            inside[top:bottom, left:right] = 1
            score = _mixed(p, activate(_bilinear(mask, view.affine, size))) * inside
            total = sums.setdefault((view.image, view.group), [torch.zeros_like(score), inside * 0])
            total[0] += score
            total[1] += inside
        scores = []
        for image in range(views.batch):
            groups = [total for (i, _), total in sums.items() if i == image]
            covering = sum((count > 0).to(probs.dtype) for _, count in groups)
            scores.append(sum(score / count.clamp(min=1) for score, count in groups) / covering)
    scores = torch.stack(scores) if scores else probs.new_empty(0, probs.shape[-1], *size)
    return scores.argmax(1).to(_label_dtype(probs.shape[-1])), scores


def _mass(probs: Tensor) -> Tensor:
    """What a query has of all classes, which broadcasts against ``probs`` (V, Q, C) or (V, Q)."""
    return probs.sum(-1, keepdim=True) if probs.ndim == 3 else probs


def _mixed(probs: Tensor, masks: Tensor) -> Tensor:
    """Scores (C, H, W) of masks (Q, H, W), by probabilities (Q, C) or their diagonal (Q)."""
    return torch.einsum("qc,qhw->chw", probs, masks) if probs.ndim == 2 else probs[:, None, None] * masks


def _bilinear(mask: Tensor, affine: Sequence[float], size: tuple[int, int]) -> Tensor:
    """(Q, h, w) at the places to which ``affine`` sends the pixels of an output of ``size``."""
    taps = []
    for cells, length, step, offset in zip(mask.shape[1:], size, affine[::2], affine[1::2], strict=True):
        place = torch.arange(length, dtype=torch.float64, device=mask.device) * step + offset
        place = place.clamp(0, cells - 1)
        lower = place.long()
        taps.append((lower, (lower + 1).clamp(max=cells - 1), (place - lower).to(mask.dtype)))
    (y0, y1, wy), (x0, x1, wx) = taps
    rows = mask[:, y0] * (1 - wy)[:, None] + mask[:, y1] * wy[:, None]
    return rows[:, :, x0] * (1 - wx) + rows[:, :, x1] * wx


def _label_dtype(classes: int) -> torch.dtype:
    return torch.uint8 if classes <= 256 else torch.int16


_BUDGET = 2**19  # elements of a block of masks or scores on the CPU: 2 MiB stay in the cache
_HUGE = 1e30  # stands for infinity: an infinite logit times an interpolation weight of 0 is not a number
_SLACK = 1 - 1e-5  # covers the rounding of sums of hundreds of terms
_MANY = 32  # queries; with fewer, going back to single pixels costs more than the shortcut saves
_FEW = 0.25  # of the largest class probability: mass that seldom decides


class _Part(NamedTuple):
    """One view, ready to be mixed: ``affine`` and ``columns`` say where its mask lies in the output."""

    mask: Tensor  # (Q, h, w), any dtype
    mixing: Tensor  # (C, Q), or the diagonal (Q); in the dtype of the scores
    affine: Sequence[Any]  # floats, or on other devices than the CPU 0-d tensors
    columns: tuple[int, int]


class _Head(NamedTuple):
    """The tokens and classes of an image's views that decide most pixels, and bounds on all others."""

    parts: list[_Part]
    classes: Tensor  # (C',) the classes in `parts`
    rest: Tensor  # (C',) what the tokens left out may add
    outside: float  # the largest score that a class left out may have


def _axis(step: Any, offset: Any, start: int, stop: int, cells: int, device: torch.device) -> Tensor:
    """Places of output pixels on an axis of ``cells`` cells."""
    dtype = torch.float64 if device.type == "cpu" else torch.float32  # not every device has float64
    return torch.arange(start, stop, dtype=dtype, device=device).mul_(step).add_(offset).clamp_(0, cells - 1)


def _mix(part: _Part, top: int, bottom: int, sigmoid: bool) -> Tensor:
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


def _mix_at(part: _Part, y: Tensor, x: Tensor) -> Tensor:
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


def _weights(image: Tensor, group: Tensor, inside: Tensor) -> Tensor:
    """The share (V, N) of every view in the mean at N pixels; ``inside`` (V, N) is 1 where it covers one."""
    same_image = image[:, None] == image
    same_group = same_image & (group[:, None] == group)
    share = inside / (same_group.to(inside.dtype) @ inside).clamp_(min=1)
    return share / (same_image.to(inside.dtype) @ share).clamp_(min=1)


def _first_maximum(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first largest of ``scores`` (C, ...) along C, and its value; overwrites the scores."""
    # Three vectorised passes; argmax over anything but the last dimension takes five times as long on a CPU.
    best = scores.amax(0)
    classes = scores.shape[0]
    rank = torch.arange(classes, 0, -1, dtype=scores.dtype, device=scores.device)
    rank = scores.ge_(best).mul_(rank.view(-1, *(1,) * best.ndim)).amax(0)
    return (classes - rank).clamp_(max=classes - 1), best


def _head(parts: list[_Part]) -> _Head | None:
    """The few tokens and classes that have nearly all class mass; ``None`` where it is spread."""
    if parts[0].mixing.ndim == 1:  # every query is a class of its own
        return None
    queries = max(part.mixing.shape[1] for part in parts)
    if queries < _MANY:
        return None
    orders, largest, tail = [], 0.0, None
    for part in parts:
        order = part.mixing.sum(0).argsort(descending=True)
        ordered = F.pad(part.mixing[:, order], (0, queries + 1 - len(order)))
        if not bool((ordered >= 0).all()):
            return None  # not probabilities: there is no bound
        orders.append(order)
        largest = max(largest, float(ordered.amax()))
        after = ordered.flip(1).cumsum(1).flip(1)  # (C, Q + 1): class mass of the tokens from the k-th on
        tail = after if tail is None else torch.maximum(tail, after)
    few = _FEW * largest
    keep = int((tail.amax(0) > few).sum())
    if 2 * keep > queries or not keep:
        return None
    chosen = tail[:, 0] > few
    classes, others = chosen.nonzero()[:, 0], tail[~chosen, 0]
    heads = [
        part._replace(mask=part.mask[order[:keep]], mixing=part.mixing[classes][:, order[:keep]])
        for part, order in zip(parts, orders, strict=True)
    ]
    return _Head(heads, classes, tail[classes, keep], float(others.amax()) if len(others) else 0.0)


def _decide(head: _Head, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (rows, columns) by the head's scores (C', rows, columns), and the pixels (n, 2) left open."""
    threshold = scores.amax(0).mul_(_SLACK)
    rivals = scores.add_(head.rest[:, None, None]).ge_(threshold)  # the winner itself is always one
    decided = (rivals.sum(0) == 1) & (threshold > head.outside)
    rank = torch.arange(len(head.classes), dtype=scores.dtype, device=scores.device)
    return head.classes[rivals.mul_(rank[:, None, None]).amax(0).long()], decided.logical_not_().nonzero()


def _block_scores(
    parts: list[_Part], weights: Tensor | None, top: int, bottom: int, width: int, sigmoid: bool
) -> Tensor:
    """Scores (C, rows, width) of an image: the mean of its views with ``weights`` (V, width), if many."""
    if weights is None:
        return _mix(parts[0], top, bottom, sigmoid)
    total = weights.new_zeros(parts[0].mixing.shape[0], bottom - top, width)
    for part, weight in zip(parts, weights, strict=True):
        columns = slice(*part.columns)
        total[..., columns].addcmul_(_mix(part, top, bottom, sigmoid), weight[columns])
    return total


def _pixel_scores(parts: list[_Part], weights: Tensor | None, y: Tensor, x: Tensor) -> Tensor:
    """The same (C, n) at scattered pixels."""
    if weights is None:
        return _mix_at(parts[0], y, x)
    total = weights.new_zeros(parts[0].mixing.shape[0], len(x))
    for part, weight in zip(parts, weights, strict=True):
        covered = ((part.columns[0] <= x) & (x < part.columns[1])).nonzero()[:, 0]
        scores = _mix_at(part, y[covered], x[covered])
        total.index_add_(1, covered, scores.mul_(weight[x[covered]]))
    return total


def _rows(parts: list[_Part], width: int) -> int:
    """Rows of a block, one at least; elsewhere than on the CPU a block takes 256 MiB."""
    budget = _BUDGET if parts[0].mixing.device.type == "cpu" else 2**26
    return max(1, budget // (max(max(part.mixing.shape) for part in parts) * width))


@torch.no_grad()
def _eager(
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
) -> tuple[Tensor, Tensor]:
    options = (batch, height, width, reach, sigmoid, need_scores, prune)
    labels, scores = _fake(mask_logits, class_probs, views, *options)
    if not labels.numel():
        return labels, scores
    masks = [mask for stack in mask_logits for mask in stack]
    cpu, dtype = class_probs.device.type == "cpu", scores.dtype

    def part(index: int, affine: Sequence[Any], columns: tuple[int, int]) -> _Part:
        mask, probs = masks[index], class_probs[index].to(dtype)
        if prune and probs.ndim == 1:
            probs = probs * (probs >= prune)
        elif prune:
            keep = probs.sum(1) >= prune
            mask, probs = (mask[keep], probs[keep]) if cpu else (mask, probs * keep[:, None])
        return _Part(mask, probs.t(), affine, columns)

    if views and not cpu:
        parts = [part(index, (), (0, width)) for index in range(len(masks))]
        _label_without_sync(parts, views, sigmoid, labels, scores)
        return labels, scores
    for b in range(batch):
        if views:
            first, last = views[0][b : b + 2].tolist()
            layout = views[1][first:last]
            indices, _, _, *box = layout.T.tolist()
            tops, lefts, bottoms, rights = box
            affines = views[2][first:last].tolist()
        else:
            (h, w), indices = masks[b].shape[1:], [b]
            tops, lefts, bottoms, rights = [0], [0], [height], [width]
            affines = [(h / height, (h / height - 1) / 2, w / width, (w / width - 1) / 2)]
        parts = [part(*p) for p in zip(indices, affines, zip(lefts, rights, strict=True), strict=True)]
        head = _head(parts) if cpu and sigmoid and not need_scores else None
        # Between the edges of the rectangles the same views cover every row.
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
                weights = _weights(torch.zeros_like(box[:, 1]), box[:, 1], inside.to(dtype))
            while top < bottom:
                chosen = [(head.parts if head else parts)[i] for i in active]
                stop = min(bottom, top + _rows(chosen, width))
                block = _block_scores(chosen, weights, top, stop, width, sigmoid)
                if head:
                    index, undecided = _decide(head, block)
                    if 4 * len(undecided) > index.numel():
                        head = None  # does not pay for this image; these rows once more
                        continue
                    labels[b, top:stop] = index
                    for y, x in (pixels.unbind(1) for pixels in undecided.split(_rows(parts, 1))):
                        exact = _pixel_scores([parts[i] for i in active], weights, y + top, x)
                        labels[b, y + top, x] = _first_maximum(exact)[0].to(labels.dtype)
                else:
                    labels[b, top:stop], best = _first_maximum(block)
                    if need_scores:
                        scores[b, top:stop] = best
                top = stop
    return labels, scores


def _label_without_sync(
    parts: list[_Part], views: list[Tensor], sigmoid: bool, labels: Tensor, scores: Tensor
) -> None:
    """Fill ``labels`` and ``scores`` from views known to the device only: every view works on every row."""
    starts, layout, affine = views
    (batch, height, width), dtype, device = labels.shape, scores.dtype, labels.device
    order = layout[:, 0].argsort()
    image = torch.bucketize(torch.arange(len(parts), device=device), starts[1:], right=True)[order]
    _, group, _, tops, lefts, bottoms, rights = layout[order].unbind(1)
    parts = [part._replace(affine=a.unbind()) for part, a in zip(parts, affine[order], strict=True)]
    x = torch.arange(width, device=device)
    inside_x = (lefts[:, None] <= x) & (x < rights[:, None])
    rows = max(1, _rows(parts, width) // batch)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        y = torch.arange(top, bottom, device=device)
        inside = ((tops[:, None] <= y) & (y < bottoms[:, None]))[:, :, None] & inside_x[:, None]
        weights = _weights(image, group, inside.to(dtype).flatten(1)).view(inside.shape)
        total = scores.new_zeros(batch, parts[0].mixing.shape[0], bottom - top, width)
        for v, part in enumerate(parts):
            block = _mix(part, top, bottom, sigmoid).mul_(weights[v])
            total.index_add_(0, image[v : v + 1], block[None])
        labels[:, top:bottom], best = _first_maximum(total.transpose(0, 1))
        if scores.numel():
            scores[:, top:bottom] = best


def _fake(
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
) -> tuple[Tensor, Tensor]:
    shape = (batch, height, width)
    score_dtype = torch.float64 if mask_logits[0].dtype == torch.float64 else torch.float32
    return (
        class_probs.new_empty(shape, dtype=_label_dtype(class_probs.shape[-1])),
        class_probs.new_empty(shape if need_scores else (0,), dtype=score_dtype),
    )


def _macs(
    mask_logits: Any, class_probs: tuple[int, ...], views: Any, batch: int, height: int, width: int, *_: Any
) -> int:
    """Class mixing of every view at every output pixel: an upper bound where views cover only a part."""
    return math.prod(class_probs) * height * width


def _kernels_refuse(
    backend: str, mask_logits: list[Tensor], class_probs: Tensor, *_: Any
) -> Exception | None:
    for name, tensor in (("mask_logits", mask_logits[0]), ("class_probs", class_probs)):
        if tensor.dtype == torch.float64:
            return TypeError(f"backend {backend!r} takes float32, float16 and bfloat16; {name} is float64")
    if class_probs.ndim == 2:
        return ValueError(f"backend {backend!r} takes a matrix of class_probs; got its diagonal")
    return None


_semantic_argmax = _library.define(
    "semantic_argmax(Tensor[] mask_logits, Tensor class_probs, Tensor[] views, SymInt batch, SymInt height, "
    "SymInt width, float[] reach, bool sigmoid, bool need_scores, float prune) "
    "-> (Tensor labels, Tensor scores)",
    eager=_eager,
    fake=_fake,
    macs=_macs,
    refuse=_kernels_refuse,
)


def semantic_argmax(
    mask_logits: Tensor | Sequence[Tensor],
    class_probs: Tensor,
    size: tuple[int, int],
    *,
    views: Views | None = None,
    activation: str = "sigmoid",
    return_scores: bool = False,
    prune: float = 0.0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Label map of a mask classifier: upsampling, sigmoid, class mixing and argmax in one pass.

    The formula stands at the top of this module. Not differentiable.

    Args:
        mask_logits: (V, Q, h, w), or a list of such with grids of different sizes but one Q and one dtype;
            float32, float16, bfloat16 or float64 (eager only).
        class_probs: (V, Q, C) in the order of the masks, non-negative, any of these dtypes; or (V, Q), the
            diagonal of a matrix whose other entries are 0, with C = Q.
        size: (H, W) of the output.
        views: how the V predictions map to the outputs; without it prediction i is image i, stretched over
            the whole output.
        activation: "sigmoid", or "none" for masks that are probabilities already (they are interpolated).
        return_scores: also return the winning scores.
        prune: leave out the queries of a view whose class mass Σ_c p[q, c] is below this. Any score changes
            by at most the mass left out; 0 is exact.
        backend: one of ``segvit_kernels.BACKENDS``; chosen by device unless given.

    Returns:
        labels (B, H, W), uint8, or int16 for more than 256 classes, with B = V unless there are views; with
        ``return_scores`` also the winning scores (B, H, W), float32 (float64 for float64 masks). Where a
        logit is not a number the label is some class.

    Raises:
        TypeError: a dtype is not supported, or the masks' dtypes differ.
        ValueError: shapes, devices or options disagree or are out of range.
        BackendUnavailableError: an explicitly chosen backend cannot run here.
    """
    stacks = tensors("mask_logits", mask_logits)
    flag("return_scores", return_scores)
    _library.check_backend(backend)
    height, width = _validate(stacks, class_probs, size, views, activation, prune)
    one_a_class = class_probs.ndim == 2 and not return_scores
    if one_a_class and (frame := _frame(stacks, views, (height, width))) is not None:
        scores = class_probs * (class_probs >= prune) if prune else class_probs
        return _labels_of_queries(stacks, scores, (height, width), frame, activation, backend)
    if class_probs.ndim == 2 and _on_kernels(stacks[0], backend):
        class_probs = torch.diag_embed(class_probs)
    labels, scores = _semantic_argmax(
        [unit_stride(stack.detach()) for stack in stacks],
        unit_stride(class_probs.detach()),
        [] if views is None else views.tensors,
        class_probs.shape[0] if views is None else views.batch,
        height,
        width,
        [] if views is None else views.reach,
        activation == "sigmoid",
        return_scores,
        float(prune),
        backend,
    )
    return (labels, scores) if return_scores else labels


def _on_kernels(masks: Tensor, backend: str | None) -> bool:
    """Whether these masks go to kernels, which take a matrix; compiled code finds out when it runs."""
    if torch.compiler.is_compiling():
        return True
    chosen = _library.chosen_backend("semantic_argmax", masks.device, backend)
    return chosen != "eager" and masks.dtype != torch.float64


def _frame(stacks: list[Tensor], views: Views | None, size: tuple[int, int]) -> tuple[int, int] | None:
    """The size of the picture over which every mask is stretched, of which the output is the upper left part.

    None where that is not so, or where there are more queries than `panoptic_argmax` takes.
    """
    if stacks[0].shape[1] > MOST_QUERIES:
        return None
    if views is None:
        return size
    if len(stacks) != 1 or len(views) != views.batch or not len(views):
        return None
    affine, sides = views.views[0].affine, []
    for index, view in enumerate(views.views):
        if (view.image, view.rectangle, view.affine) != (index, (0, 0, *size), affine):
            return None
    for cells, length, step, offset in zip(stacks[0].shape[2:], size, affine[::2], affine[1::2], strict=True):
        side = round(cells / step)
        if step <= 0 or side < length or abs(side * step - cells) > 1e-9 * cells:
            return None
        if abs(offset - (step - 1) / 2) > 1e-9:
            return None
        sides.append(side)
    return sides[0], sides[1]


def _labels_of_queries(
    stacks: list[Tensor],
    scores: Tensor,
    size: tuple[int, int],
    frame: tuple[int, int],
    activation: str,
    backend: str | None,
) -> Tensor:
    """Labels where a pixel's class is its query."""
    found = [
        panoptic_argmax(masks, own, frame, activation=activation, backend=backend).queries
        for masks, own in zip(stacks, scores.split([len(stack) for stack in stacks]), strict=True)
    ]
    queries = found[0] if len(found) == 1 else torch.cat(found)
    queries = queries[:, : size[0], : size[1]]
    return queries.clamp(min=0).to(_label_dtype(scores.shape[1]))  # -1 where no score is a number


def _validate(
    stacks: list[Tensor],
    class_probs: Tensor,
    size: tuple[int, int],
    views: Views | None,
    activation: str,
    prune: float,
) -> tuple[int, int]:
    named = [(f"mask_logits[{i}]" if len(stacks) > 1 else "mask_logits", t) for i, t in enumerate(stacks)]
    if not named:
        raise ValueError("mask_logits is an empty list; expected at least one tensor")
    for name, tensor in (("class_probs", class_probs), *named):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; expected float32, float16, bfloat16 or float64"
            )
        if tensor.device != class_probs.device:
            raise ValueError(
                f"{name} is on {tensor.device}; expected {class_probs.device}, the device of class_probs"
            )
    first = stacks[0]
    for name, tensor in named:
        if tensor.ndim != 4 or min(tensor.shape[1:]) < 1 or tensor.shape[1] != first.shape[1]:
            queries = f"{first.shape[1]} queries" if first.ndim == 4 else "queries"
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected (views, {queries}, height, width)"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {first.dtype}, that of the first")
    count, queries = sum(t.shape[0] for t in stacks), first.shape[1]
    shape = tuple(class_probs.shape)
    if class_probs.ndim not in (2, 3) or shape[:2] != (count, queries) or not 1 <= shape[-1] <= 2**15:
        raise ValueError(
            f"class_probs has shape {shape}; expected ({count}, {queries}, classes) or the diagonal "
            f"({count}, {queries}), as mask_logits has views and queries, and 1 to 32768 classes"
        )
    height, width = size_pair("size", size)
    if views is not None:
        if not isinstance(views, Views):
            raise TypeError(f"views is a {type(views).__name__}; expected a Views")
        if views.size != (height, width):
            raise ValueError(
                f"views are for size {views.size}; expected {(height, width)}, the argument size"
            )
        if len(views) != count:
            raise ValueError(f"views holds {len(views)} views; expected {count}, one per mask_logits entry")
        if views.tensors[0].device != class_probs.device:
            raise ValueError(
                f"views are on {views.tensors[0].device}; expected {class_probs.device}: views.to(device)"
            )
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(_ACTIVATIONS)}")
    number("prune", prune, 0)
    return height, width
