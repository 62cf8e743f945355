"""Mask losses and matching costs at points: the estimator of PointRend and Mask2Former.

A matched pair's mask logits and target are read at P points (x, y) of [0, 1]², bilinearly between the centres
of cells and with zeros beyond the border (``F.grid_sample`` at 2·point − 1, align_corners=False). With x the
logits there and t the targets,

    bce = mean(softplus(x) − x·t)      dice = 1 − (2 Σ σ(x) t + 1) / (Σ σ(x) + Σ t + 1).

The points are given, or sampled where masks are uncertain (Kirillov et al., CVPR 2020, section 3.1; Cheng et
al., CVPR 2022, section 3.3): of ``oversample_ratio`` · P uniform points those with the smallest |x|, for
``importance_sample_ratio`` of P, and uniform points for the rest. Random numbers are drawn in the order of
those papers' implementations, so that the same seed gives the same points.

No mask and no target is copied: logits are read for some pairs at a time, targets of any dtype where they
stand. Kept for the backward are the points and the logits there, (pairs, P). The gradient of the logits is
the adjoint of the reading.

Refused: points of another shape, indices out of range, targets for another number of images.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit_kernels import _library
from segvit_kernels._autocast import without_autocast
from segvit_kernels.ops._autograd import differentiable, first_derivative_only, transformed
from segvit_kernels.ops._checks import can_read, count, number, whole
from segvit_kernels.ops._parts import budget_of, parts

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

Indices = Sequence[tuple[Tensor, Tensor]]


@_library.exportable
class PointLoss(NamedTuple):
    """``bce`` and ``dice``, scalar or (K,), and the ``points`` (K, P, 2) at which they were computed."""

    bce: Tensor
    dice: Tensor
    points: Tensor


@_library.exportable
class PointCost(NamedTuple):
    """``bce`` and ``dice``, both (Q, M)."""

    bce: Tensor
    dice: Tensor


def _computed(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _read(masks: Tensor, points: Tensor) -> Tensor:
    """(n, C, P) of (n, C, h, w) at points (n, P, 2) of each image, or (1, P, 2) of all."""
    grid = (2.0 * points[:, :, None].to(masks.dtype) - 1.0).expand(len(masks), -1, -1, -1)
    return F.grid_sample(masks, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[..., 0]


def _in_rows(points: Tensor, size: Sequence[int]) -> Tensor:
    """Points (1, P, 2) in the order of the pixels of ``size``: what is read next lies beside what was."""
    height, width = size
    order = ((points[0, :, 1] * height).floor() * width + points[0, :, 0] * width).argsort()
    return points[:, order]


class _AtPoints(torch.autograd.Function):
    """Logits (K, P) of pairs (image, query) at points (K, P, 2) of their own."""

    @staticmethod
    def forward(ctx: Any, mask_logits: Tensor, images: Tensor, queries: Tensor, points: Tensor) -> Tensor:
        dtype = _computed(mask_logits.dtype)
        result = points.new_empty(points.shape[:2], dtype=dtype)
        each = mask_logits.shape[2] * mask_logits.shape[3] * dtype.itemsize
        for own in parts(len(points), each, budget_of(points.device)):
            masks = mask_logits[images[own], queries[own]].to(dtype)
            result[own] = _read(masks[:, None], points[own])[:, 0]
        ctx.save_for_backward(images, queries, points)
        ctx.shape, ctx.dtype = tuple(mask_logits.shape), mask_logits.dtype
        return result

    @staticmethod
    @first_derivative_only("mask_loss_at_points", "F.grid_sample")
    def backward(ctx: Any, grad: Tensor) -> tuple:
        images, queries, points = ctx.saved_tensors
        result = grad.new_zeros(ctx.shape, dtype=ctx.dtype)
        height, width = ctx.shape[2:]
        for own in parts(len(points), 2 * height * width * grad.element_size(), budget_of(grad.device)):
            grid = 2.0 * points[own][:, :, None].to(grad.dtype) - 1.0
            shape = grad.new_empty((len(grid), 1, height, width))  # its values are not read
            part, _ = torch.ops.aten.grid_sampler_2d_backward(
                grad[own][:, None, :, None].contiguous(), shape, grid, 0, 0, False, [True, False]
            )
            place = (images[own], queries[own])
            result.index_put_(place, part[:, 0].to(ctx.dtype), accumulate=True)
        return result, None, None, None


def _neighbours(points: Tensor, size: int, cells: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of points along one axis of ``size`` both cells that they lie between, of those that there are, and
    their weights, 0 beyond."""
    place = (2.0 * points - 1.0 + 1.0) * (size / 2) - 0.5  # as F.grid_sample computes it
    lower = place.floor()
    upper_weight = place - lower
    for cell, weight in ((lower, 1 - upper_weight), (lower + 1, upper_weight)):
        inside = (cell >= 0) & (cell < cells)
        yield cell.clamp_(0, cells - 1).long(), weight * inside


def _corners(points: Tensor, size: Sequence[int], cells: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of points (k, P, 2) the four cells around each, by index into a map of ``cells``, and their weights."""
    columns = list(_neighbours(points[..., 0], size[1], cells[1]))
    for row, row_weight in _neighbours(points[..., 1], size[0], cells[0]):
        for column, weight in columns:
            yield row * cells[1] + column, row_weight * weight


def _read_every(targets: Tensor, points: Tensor) -> Tensor:
    """(M, P) of targets (M, H, W) at points (1, P, 2): what lies beside each other is read together."""
    size = targets.shape[1:]
    places, weights = zip(*_corners(points, size, size), strict=True)
    index = torch.stack(places, 2).flatten(1)
    values = targets.flatten(1).gather(1, index.expand(len(targets), -1)).unflatten(1, (-1, 4))
    result = points.new_zeros(values.shape[:2])
    for value, weight in zip(values.unbind(2), weights, strict=True):
        result.addcmul_(value.to(points.dtype), weight)
    return result


def _read_targets(targets: Tensor, chosen: Tensor, points: Tensor, size: Sequence[int]) -> Tensor:
    """Targets ``chosen`` (k,) of (M, H, W) at points (k, P, 2) of ``size``, that they are padded to."""
    height, width = targets.shape[1:]
    flat, first = targets.reshape(-1), chosen[:, None] * (height * width)
    result = points.new_zeros(len(chosen), points.shape[1])
    for place, weight in _corners(points, size, (height, width)):
        index = place + first
        values = flat.index_select(0, index.view(-1)).view(index.shape).to(points.dtype)
        result.addcmul_(values, weight)
    return result


def _check_logits(mask_logits: Tensor) -> None:
    if not isinstance(mask_logits, Tensor):
        raise TypeError(f"mask_logits is a {type(mask_logits).__name__}; expected a tensor")
    if mask_logits.dtype not in _DTYPES:
        raise TypeError(
            f"mask_logits has dtype {mask_logits.dtype}; expected float32, float16, bfloat16 or float64"
        )
    if mask_logits.ndim != 4 or min(mask_logits.shape[1:]) < 1:
        raise ValueError(
            f"mask_logits has shape {tuple(mask_logits.shape)}; expected (batch, queries, height, width), "
            "not empty"
        )


def _checked_masks(mask_logits: Tensor, targets: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """The targets as a list."""
    _check_logits(mask_logits)
    if not isinstance(targets, (Tensor, list, tuple)):
        raise TypeError(f"targets is a {type(targets).__name__}; expected a tensor or a list of tensors")
    given = list(targets)
    if len(given) != len(mask_logits):
        raise ValueError(f"targets has {len(given)} images; expected {len(mask_logits)}, as mask_logits")
    for i, target in enumerate(given):
        if not isinstance(target, Tensor):
            raise TypeError(f"targets[{i}] is a {type(target).__name__}; expected a tensor")
        if target.ndim != 3 or min(target.shape[1:]) < 1:
            raise ValueError(f"targets[{i}] has shape {tuple(target.shape)}; expected (masks, height, width)")
        if target.device != mask_logits.device:
            raise ValueError(
                f"targets[{i}] is on {target.device}; expected {mask_logits.device}, as mask_logits"
            )
        _refuse_gradient(f"targets[{i}]", target)
    return given


def checked_indices(
    indices: Indices, mask_logits: Tensor, targets: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Image and query of every pair, and of every image the targets, all int64, where the indices are."""
    batch = len(mask_logits)
    if not isinstance(indices, (list, tuple)) or len(indices) != batch:
        got = (
            f"length {len(indices)}" if isinstance(indices, (list, tuple)) else f"a {type(indices).__name__}"
        )
        raise ValueError(f"indices is of {got}; expected {batch} pairs of queries and targets, one an image")
    images, chosen, picked = [], [], []
    for i, (queries, masks) in enumerate(indices):
        if len(queries) != len(masks):
            raise ValueError(
                f"indices[{i}] has {len(queries)} queries and {len(masks)} targets; expected as many"
            )
        limits = {"queries": (queries, mask_logits.shape[1])}
        if targets is not None:
            limits["targets"] = (masks, len(targets[i]))
        for name, (index, most) in limits.items():
            if not isinstance(index, Tensor) or (len(index) and index.dtype not in _INDEX_DTYPES):
                kind = index.dtype if isinstance(index, Tensor) else f"a {type(index).__name__}"
                raise TypeError(f"indices[{i}] has {name} of {kind}; expected a tensor of torch.int64")
            if can_read(index) and len(index) and not 0 <= index.min() <= index.max() < most:
                got = f"{int(index.min())} to {int(index.max())}"
                raise ValueError(f"indices[{i}] has {name} {got}; expected 0 to {most - 1}")
        images.append(torch.full_like(queries, i, dtype=torch.int64))
        chosen.append(queries.long())
        if targets is not None:
            picked.append(masks.long())  # of fewer bits places of pixels would wrap around
    if not batch:
        return (torch.empty(0, dtype=torch.int64),) * 2 + ([],)
    return torch.cat(images), torch.cat(chosen), picked


def _check_read(targets: Tensor) -> None:
    """Refuse masks that hold something else than numbers in [0, 1], as far as was read."""
    if can_read(targets) and targets.numel():
        low, high = (x.item() for x in targets.aminmax())
        if not -1e-3 <= low <= high <= 1 + 1e-3:  # rounding of weights that sum to 1
            raise ValueError(f"targets holds masks from {low:g} to {high:g}; expected 0 to 1")


def _refuse_gradient(name: str, tensor: Tensor) -> None:
    if differentiable(tensor):
        raise ValueError(f"{name} requires a gradient, which there is none of; expected {name}.detach()")


def _check_points(points: Tensor, count: int, what: str, device: torch.device) -> None:
    if not isinstance(points, Tensor) or not points.is_floating_point():
        raise TypeError("points is no floating-point tensor; expected (x, y) in [0, 1]")
    if points.ndim != 3 or points.shape[0] != count or points.shape[1] < 1 or points.shape[2] != 2:
        raise ValueError(f"points has shape {tuple(points.shape)}; expected ({count}, points, 2), {what}")
    if points.device != device:
        raise ValueError(f"points is on {points.device}; expected {device}, as mask_logits")


@torch.no_grad()
def uncertain_points(
    mask_logits: Tensor,
    indices: Indices,
    num_points: int = 12544,
    *,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Points of every matched pair, most of them where its mask is least certain.

    PointRend's and Mask2Former's; the rule stands at the top of this module.

    Args:
        mask_logits: (B, Q, h, w), before the sigmoid.
        indices: for every image its matched queries and their targets, both (Kᵢ,) int64, as Hungarian
            matchers give them.
        num_points: P.
        oversample_ratio: uniform candidates in multiples of P, at least 1.
        importance_sample_ratio: the share of P taken from them, 0 to 1.
        generator: of the random numbers; torch's own of the device unless given.

    Returns:
        (K, P, 2), (x, y) in [0, 1], of torch's default dtype; the pairs of the first image come first.

    Raises:
        TypeError, ValueError: an argument is of another type or shape, or out of range.
    """
    _check_logits(mask_logits)
    images, queries = (t.to(mask_logits.device) for t in checked_indices(indices, mask_logits, None)[:2])
    return _uncertain(
        mask_logits, images, queries, num_points, oversample_ratio, importance_sample_ratio, generator
    )


def _uniform(device: torch.device, generator: torch.Generator | None, rows: int, count: int) -> Tensor:
    """Points (rows, count, 2)."""
    # Compiled, torch.rand takes no open size together with a generator, be it None.
    own: dict[str, Any] = {} if generator is None else {"generator": generator}
    return torch.rand(rows, count, 2, device=device, **own)


def _uncertain(
    mask_logits: Tensor,
    images: Tensor,
    queries: Tensor,
    num_points: int,
    oversample_ratio: float,
    importance_sample_ratio: float,
    generator: torch.Generator | None,
) -> Tensor:
    count = whole("num_points", num_points, 1)
    candidates = int(count * number("oversample_ratio", oversample_ratio, 1))
    certain = int(number("importance_sample_ratio", importance_sample_ratio, 0, 1) * count)
    device, dtype = mask_logits.device, _computed(mask_logits.dtype)
    draw = functools.partial(_uniform, device, generator)
    points = torch.empty(len(images), count, 2, device=device)
    # A CPU draws the rows of a tensor one after the other: a part of them at a time gives the same numbers.
    drawn = None if device.type == "cpu" else draw(len(images), candidates)
    each = (mask_logits.shape[2] * mask_logits.shape[3] + 8 * candidates) * dtype.itemsize
    for own in parts(len(images), each, budget_of(device)):
        some = draw(len(images[own]), candidates) if drawn is None else drawn[own]
        masks = mask_logits[images[own], queries[own]].to(dtype)
        uncertainty = -_read(masks[:, None], some)[:, 0].abs()
        best = uncertainty.topk(certain, dim=1).indices
        points[own, :certain] = some.gather(1, best[..., None].expand(-1, -1, 2))
    if certain < count:
        points[:, certain:] = draw(len(images), count - certain)
    return points


def mask_loss_at_points(
    mask_logits: Tensor,
    targets: Sequence[Tensor] | Tensor,
    indices: Indices,
    points: Tensor | None = None,
    *,
    num_points: int = 12544,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
    num_masks: Tensor | float | None = None,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> PointLoss:
    """BCE and dice of matched masks at points: Mask2Former's loss, without copies of masks and targets.

    Mask2Former (CVPR 2022), section 3.3; the formulas stand at the top of this module.

    Args:
        mask_logits: (B, Q, h, w), float32, float16, bfloat16 or float64, before the sigmoid.
        targets: for every image (Mᵢ, Hᵢ, Wᵢ), bool or numbers in [0, 1]; images of several sizes are taken as
            padded with zeros, at the right and at the bottom, to the largest height and width.
        indices: for every image its matched queries and their targets, both (Kᵢ,) int64; K is their sum.
        points: (K, P, 2), (x, y) in [0, 1], the first image's pairs first. Sampled by
            :func:`uncertain_points` unless given.
        num_points, oversample_ratio, importance_sample_ratio, generator: of the sampling.
        num_masks: what "mean" divides by in place of K, at least 1: under data parallelism, the mean over
            the processes.
        reduction: "mean", the sum over pairs divided by their number; "sum"; or "none", (K,).

    Returns:
        ``bce``, ``dice`` and ``points``. float32 (float64 for float64 logits), differentiable in
        ``mask_logits``; zeros that keep the graph where nothing is matched.

    Raises:
        TypeError, ValueError: an argument is of another type or shape, or out of range.
    """
    given = _checked_masks(mask_logits, targets)
    *pairs, picked = checked_indices(indices, mask_logits, given)
    images, queries = (t.to(mask_logits.device) for t in pairs)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")
    if num_masks is not None:
        num_masks = count("num_masks", num_masks)
    if isinstance(points, Tensor):
        _refuse_gradient("points", points)
    with torch.no_grad():
        if points is None:
            points = _uncertain(
                mask_logits, images, queries, num_points, oversample_ratio, importance_sample_ratio, generator
            )
        _check_points(points, len(images), "those of every pair", mask_logits.device)
        dtype = _computed(mask_logits.dtype)
        size = [max((target.shape[axis] for target in given), default=1) for axis in (1, 2)]
        t = torch.empty(points.shape[:2], dtype=dtype, device=points.device)
        first = 0
        for target, chosen in zip(given, picked, strict=True):
            # Of a point its neighbours, their places and weights.
            for part in parts(len(chosen), 16 * points.shape[1] * dtype.itemsize, budget_of(points.device)):
                own = slice(first + part.start, first + part.stop)
                t[own] = _read_targets(target, chosen[part].to(target.device), points[own].to(dtype), size)
            first += len(chosen)
        _check_read(t)
    if transformed():
        x = _read(mask_logits[images, queries][:, None].to(dtype), points)[:, 0]
    else:
        x = _AtPoints.apply(mask_logits, images, queries, points)
    bce = F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(1)
    p = x.sigmoid()
    dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
    if reduction == "none":
        return PointLoss(bce, dice, points)
    bce, dice = bce.sum(), dice.sum()
    if reduction == "mean":
        divisor = len(images) if num_masks is None else num_masks
        divisor = divisor.clamp(min=1) if isinstance(divisor, Tensor) else max(divisor, 1)
        bce, dice = bce / divisor, dice / divisor
    return PointLoss(bce, dice, points)


@torch.no_grad()
def mask_matching_cost_at_points(
    mask_logits: Tensor,
    targets: Sequence[Tensor] | Tensor,
    points: Tensor | None = None,
    *,
    num_points: int = 12544,
    generator: torch.Generator | None = None,
) -> list[PointCost]:
    """BCE and dice cost between every query and every target of an image, at points that they all share.

    Mask2Former (CVPR 2022), section 3.3. No gradient.

    Args:
        mask_logits: (B, Q, h, w), before the sigmoid, as in :func:`mask_loss_at_points`.
        targets: for every image (Mᵢ, Hᵢ, Wᵢ), bool or numbers in [0, 1], not padded.
        points: (B, P, 2), (x, y) in [0, 1]; ``num_points`` uniform ones of each image unless given.
        num_points, generator: of the sampling.

    Returns:
        For every image ``bce`` and ``dice``, both (Q, Mᵢ), float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument is of another type or shape, or out of range.
    """
    given = _checked_masks(mask_logits, targets)
    whole("num_points", num_points, 1)
    if points is not None:
        _check_points(points, len(given), "those of every image", mask_logits.device)
    dtype, costs = _computed(mask_logits.dtype), []
    for i, (masks, target) in enumerate(zip(mask_logits, given, strict=True)):
        own = _uniform(masks.device, generator, 1, num_points) if points is None else points[i : i + 1]
        own = _in_rows(own, target.shape[1:])
        x = _read(masks[:, None].to(dtype), own)[:, 0]  # (Q, P)
        t = _read_every(target, own.to(dtype))
        _check_read(t)
        outside, p = F.softplus(x, threshold=80.0), x.sigmoid()  # e⁸⁰ is a float32, e⁻⁸⁰ no float64 beside 80
        with without_autocast(x.device):  # sums of thousands, which no float16 holds
            bce = (outside.sum(1)[:, None] - x @ t.mT) / x.shape[1]
            dice = 1 - (2 * p @ t.mT + 1) / (p.sum(1)[:, None] + t.sum(1) + 1)
        costs.append(PointCost(bce, dice))
    return costs
