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

The probability of a class at a pixel is its share of the evidence there,

    P_c(y, x) = s_c(y, x) / Σ_c' s_c'(y, x), 1/classes where no score is positive,

so that a pixel's add up to 1. Scores themselves do not: what a pixel is no object of is missing from them,
and queries overlap. ``return_probabilities=k`` gives the k largest, by an operator of its own
(:mod:`segvit_kernels.ops.semantic_topk`); ``return_scores`` the largest s_c, one of those that Hugging Face's
image processors give for ``return_segmentation_scores``. Nothing calibrates either.

Exact shortcut (sigmoid, no scores asked for): class probabilities are non-negative and σ ≤ 1, so the
queries after the K with the most class mass can add at most r_c = Σ_rest p[q, c] to class c. Where the winner
w of the first K has s_w > s_c + r_c for every other c, the rest need not be computed. Trained models give a
few queries nearly all mass.

Where scores are not numbers the label is some class: always in [0, classes), 0 where no score is one.

Refused: anything but 4-D masks of one floating dtype, probabilities (views, queries, classes) or diagonals
(views, queries), one device, views that leave a pixel of the output uncovered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit_kernels import _library
from segvit_kernels._autocast import without_autocast
from segvit_kernels.ops._attention import unit_stride
from segvit_kernels.ops._checks import can_read, flag, number, size_pair, tensors, whole
from segvit_kernels.ops._class_scores import (
    Part,
    block_scores,
    blocks_without_sync,
    first_maximum,
    images,
    label_dtype,
    macs,
    pixel_scores,
    refuse_of_kernels,
    rows_of,
)
from segvit_kernels.ops._views import View, Views
from segvit_kernels.ops.panoptic_argmax import MOST_QUERIES, panoptic_argmax
from segvit_kernels.ops.semantic_topk import semantic_topk

__all__ = ["View", "Views", "semantic_argmax", "semantic_argmax_reference"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ACTIVATIONS = ("sigmoid", "none")


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
            means = (score / count.clamp(min=1) for score, count in groups)
            scores.append(sum(means, probs.new_zeros(())) / covering)
    stacked = torch.stack(scores) if scores else probs.new_empty(0, probs.shape[-1], *size)
    return stacked.argmax(1).to(label_dtype(probs.shape[-1])), stacked


def _mass(probs: Tensor) -> Tensor:
    """What a query has of all classes, which broadcasts against ``probs`` (V, Q, C) or (V, Q)."""
    return probs.sum(-1, keepdim=True) if probs.ndim == 3 else probs


def _mixed(probs: Tensor, masks: Tensor) -> Tensor:
    """Scores (C, H, W) of masks (Q, H, W), by probabilities (Q, C) or their diagonal (Q)."""
    if probs.ndim == 1:
        return probs[:, None, None] * masks
    with without_autocast(masks.device):
        return torch.einsum("qc,qhw->chw", probs, masks)


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


_SLACK = 1 - 1e-5  # covers the rounding of sums of hundreds of terms
_MANY = 32  # queries; with fewer, going back to single pixels costs more than the shortcut saves
_FEW = 0.25  # of the largest class probability: mass that seldom decides


class _Head(NamedTuple):
    """The tokens and classes of an image's views that decide most pixels, and bounds on all others."""

    parts: list[Part]
    classes: Tensor  # (C',) the classes in `parts`
    rest: Tensor  # (C',) what the tokens left out may add
    outside: float  # the largest score that a class left out may have


def _head(parts: list[Part]) -> _Head | None:
    """The few tokens and classes that have nearly all class mass; ``None`` where it is spread."""
    if parts[0].mixing.ndim == 1:  # every query is a class of its own
        return None
    queries = max(part.mixing.shape[1] for part in parts)
    if queries < _MANY:
        return None
    # Class mass (C, Q + 1) of the tokens from the k-th on, the largest of any part.
    tail = parts[0].mixing.new_zeros(len(parts[0].mixing), queries + 1)
    orders, largest = [], 0.0
    for part in parts:
        order = part.mixing.sum(0).argsort(descending=True)
        ordered = F.pad(part.mixing[:, order], (0, queries + 1 - len(order)))
        if not bool((ordered >= 0).all()):
            return None  # not probabilities: there is no bound
        orders.append(order)
        largest = max(largest, float(ordered.amax()))
        tail = torch.maximum(tail, ordered.flip(1).cumsum(1).flip(1))
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
    cpu, given = class_probs.device.type == "cpu", (masks, class_probs, views, labels, scores.dtype, prune)
    if views and not cpu:
        for top, bottom, block in blocks_without_sync(*given, sigmoid):
            labels[:, top:bottom], best = first_maximum(block)
            if need_scores:
                scores[:, top:bottom] = best
        return labels, scores
    for b, parts, bands in images(*given):
        head = _head(parts) if cpu and sigmoid and not need_scores else None
        for top, bottom, active, weights in bands:
            while top < bottom:
                chosen = [(head.parts if head else parts)[i] for i in active]
                stop = min(bottom, top + rows_of(chosen, width))
                block = block_scores(chosen, weights, top, stop, width, sigmoid)
                if head:
                    index, undecided = _decide(head, block)
                    if 4 * len(undecided) > index.numel():
                        head = None  # does not pay for this image; these rows once more
                        continue
                    labels[b, top:stop] = index
                    for y, x in (pixels.unbind(1) for pixels in undecided.split(rows_of(parts, 1))):
                        exact = pixel_scores([parts[i] for i in active], weights, y + top, x)
                        labels[b, y + top, x] = first_maximum(exact)[0].to(labels.dtype)
                else:
                    labels[b, top:stop], best = first_maximum(block)
                    if need_scores:
                        scores[b, top:stop] = best
                top = stop
    return labels, scores


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
        class_probs.new_empty(shape, dtype=label_dtype(class_probs.shape[-1])),
        class_probs.new_empty(shape if need_scores else (0,), dtype=score_dtype),
    )


_semantic_argmax = _library.define(
    "semantic_argmax(Tensor[] mask_logits, Tensor class_probs, Tensor[] views, SymInt batch, SymInt height, "
    "SymInt width, float[] reach, bool sigmoid, bool need_scores, float prune) "
    "-> (Tensor labels, Tensor scores)",
    eager=_eager,
    fake=_fake,
    macs=macs,
    refuse=refuse_of_kernels,
)


def semantic_argmax(
    mask_logits: Tensor | Sequence[Tensor],
    class_probs: Tensor,
    size: tuple[int, int],
    *,
    views: Views | None = None,
    activation: str = "sigmoid",
    return_scores: bool = False,
    return_probabilities: int = 0,
    prune: float = 0.0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Label map of a mask classifier: upsampling, sigmoid, class mixing and argmax in one pass.

    The formulas stand at the top of this module. Not differentiable.

    Args:
        mask_logits: (V, Q, h, w), or a list of such with grids of different sizes but one Q and one dtype;
            float32, float16, bfloat16 or float64 (eager only).
        class_probs: (V, Q, C) in the order of the masks, non-negative, any of these dtypes; or (V, Q), the
            diagonal of a matrix whose other entries are 0, with C = Q. C is at most 32768.
        size: (H, W) of the output.
        views: how the V predictions map to the outputs; without it prediction i is image i, stretched over
            the whole output.
        activation: "sigmoid", or "none" for masks that are probabilities already (they are interpolated).
        return_scores: also return the winning scores.
        return_probabilities: in place of the label, so many best classes of every pixel and their
            probabilities, at most all; 0 for none.
        prune: leave out the queries of a view whose class mass Σ_c p[q, c] is below this. Any score changes
            by at most the mass left out; 0 is exact.
        backend: one of ``segvit_kernels.BACKENDS``; chosen by device unless given.

    Returns:
        labels (B, H, W), uint8, or int16 for more than 256 classes, with B = V unless there are views; with
        ``return_scores`` also the winning scores (B, H, W), float32 (float64 for float64 masks). With
        ``return_probabilities=k`` the classes (B, k, H, W), the best first, the lower of equal ones first, in
        the dtype of labels, and their probabilities (B, k, H, W) in that of scores. Where a logit is not a
        number a label is some class.

    Raises:
        TypeError: a dtype is not supported, or the masks' dtypes differ.
        ValueError: shapes, devices or options disagree or are out of range.
        BackendUnavailableError: an explicitly chosen backend cannot run here.
    """
    stacks = tensors("mask_logits", mask_logits)
    flag("return_scores", return_scores)
    _library.check_backend(backend)
    height, width = _validate(stacks, class_probs, size, views, activation, prune)
    classes = class_probs.shape[-1]
    if not 0 <= whole("return_probabilities", return_probabilities) <= classes:
        raise ValueError(
            f"return_probabilities is {return_probabilities}; expected 0 to {classes}, the number of classes"
        )
    if return_scores and return_probabilities:
        raise ValueError("return_scores is True; expected False with return_probabilities")
    one_a_class = class_probs.ndim == 2 and not (return_scores or return_probabilities)
    if one_a_class and (frame := _frame(stacks, views, (height, width))) is not None:
        scores = class_probs * (class_probs >= prune) if prune else class_probs
        return _labels_of_queries(stacks, scores, (height, width), frame, activation, backend)
    operator = "semantic_topk" if return_probabilities else "semantic_argmax"
    if class_probs.ndim == 2 and _on_kernels(operator, stacks[0], backend):
        class_probs = torch.diag_embed(class_probs)
    given = (
        [unit_stride(stack.detach()) for stack in stacks],
        unit_stride(class_probs.detach()),
        [] if views is None else views.tensors,
        class_probs.shape[0] if views is None else views.batch,
        height,
        width,
        [] if views is None else views.reach,
        activation == "sigmoid",
    )
    if return_probabilities:
        return semantic_topk(*given, return_probabilities, float(prune), backend)
    labels, scores = _semantic_argmax(*given, return_scores, float(prune), backend)
    return (labels, scores) if return_scores else labels


def _on_kernels(operator: str, masks: Tensor, backend: str | None) -> bool:
    """Whether these masks go to kernels, which take a matrix; compiled code finds out when it runs."""
    if torch.compiler.is_compiling():
        return True
    chosen = _library.chosen_backend(operator, masks.device, backend)
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
    return queries.clamp(min=0).to(label_dtype(scores.shape[1]))  # -1 where no score is a number


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
            many = f"{first.shape[1]} " if first.ndim == 4 else ""
            expected = f"(views, {many}queries, height, width)"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {first.dtype}, that of the first")
    count, queries = sum(t.shape[0] for t in stacks), first.shape[1]
    shape = tuple(class_probs.shape)
    if class_probs.ndim not in (2, 3) or shape[:2] != (count, queries) or not 1 <= shape[-1] <= 2**15:
        raise ValueError(
            f"class_probs has shape {shape}; expected ({count}, {queries}, classes) or the diagonal "
            f"({count}, {queries}), as mask_logits has views and queries, and 1 to 32768 classes"
        )
    # A matrix may hold any numbers; on the diagonal a query with a negative one has no pixel.
    if class_probs.ndim == 2 and can_read(class_probs) and bool((class_probs < 0).any()):
        lowest = class_probs.min().item()
        raise ValueError(f"class_probs holds {lowest:g} on its diagonal; expected at least 0")
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
