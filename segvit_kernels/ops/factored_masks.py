"""Mask loss and matching costs of factored masks: queries and pixel features in place of their product.

Mask-classification models give the logits of query q as a product of its embedding with the features of every
cell (MaskFormer, NeurIPS 2021, section 3.2),

    x[b, q, i, j] = Σ_c queries[b, q, c] · features[b, c, i, j].

:func:`factored_mask_loss` is :func:`~segvit_kernels.mask_loss` of x, :func:`factored_matching_cost` is
:func:`~segvit_kernels.mask_matching_cost` of x. Here x exists for some images and queries at a time, as many
as ``budget`` bytes hold: on each block runs the operator, on any backend. Kept for the backward: queries and
features, targets and their areas; it makes every block again. With the gradient dx of a block

    dqueries = dx featuresᵀ      dfeatures = Σ_blocks queriesᵀ dx,

the sum over blocks in float32 at least. Where values can be read (on a CPU), queries without a match have no
product. No operator of its own: compiled, it is a graph of products and of the mask loss's operators, a set
for every block.

Refused: queries and features of other shapes than these, or of two dtypes; what the mask loss refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from segvit_kernels import _library
from segvit_kernels._autocast import autocast, without_autocast
from segvit_kernels.ops import _checks
from segvit_kernels.ops._autograd import (
    differentiable,
    first_derivative_only,
    full_precision,
    transformed,
)
from segvit_kernels.ops._checks import tensors, whole
from segvit_kernels.ops._mask_loss_checks import Arguments, checked, validate
from segvit_kernels.ops._mask_loss_eager import accumulator
from segvit_kernels.ops._parts import budget_of, parts
from segvit_kernels.ops.mask_loss import (
    MaskLoss,
    MatchingCost,
    _costs,
    _mask_loss_bwd,
    _mask_loss_fwd,
    _mask_matching_sums,
    _only,
    _reduced,
    mask_loss_reference,
    mask_matching_cost_reference,
)


def _product(queries: Tensor, features: Tensor) -> Tensor:
    """Logits (B, Q, h, w) of (B, Q, C) and (B, C, h, w)."""
    return torch.bmm(queries, features.flatten(2)).unflatten(2, features.shape[2:])


def _blocks(shape: Sequence[int], cell: int, budget: int) -> Iterator[tuple[slice, slice]]:
    """Images and queries of (B, Q, h, w) logits, ``cell`` bytes each: whole images where one fits."""
    batch, queries, height, width = shape
    one = height * width * cell
    for images in parts(batch, one * queries, budget):
        for own in parts(queries, one, budget):
            yield images, own


def _matched(matches: Tensor | None, images: slice, own: slice, queries: int, targets: Tensor) -> Any:
    """The matches of a block; query i has target i where there are none."""
    if matches is not None:
        return matches[images, own]
    if own.start == 0 and own.stop == queries:
        return None
    block = torch.arange(own.start, own.stop, device=targets.device)
    return block.expand(images.stop - images.start, -1)


class FactoredMaskLossFunction(torch.autograd.Function):
    """``segvit::mask_loss_fwd`` and ``segvit::mask_loss_bwd`` of a block of products at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        targets: Tensor,
        matches: Tensor | None,
        num_classes: int,
        focal_alpha: float,
        focal_gamma: float,
        mask_ignored: bool,
        budget: int,
        backend: str | None,
        *queries: Tensor,
    ) -> tuple[Tensor, Tensor]:
        options = (num_classes, focal_alpha, focal_gamma, mask_ignored, backend)
        (batch, count, _), dtype = queries[0].shape, accumulator(features)
        sums = features.new_empty((len(queries), batch, count, 4), dtype=dtype)
        areas = features.new_empty((batch, num_classes), dtype=dtype)
        shape, cell = (batch, count, *features.shape[2:]), len(queries) * features.element_size()
        for images, own in _blocks(shape, cell, budget):
            logits = [_product(q[images, own], features[images]) for q in queries]
            matched = _matched(matches, images, own, count, targets)
            sums[:, images, own], areas[images] = _mask_loss_fwd(logits, targets[images], matched, *options)
        ctx.options, ctx.budget = options, budget
        ctx.save_for_backward(features, targets, matches, areas, *queries)
        ctx.mark_non_differentiable(areas)
        return sums, areas

    @staticmethod
    @first_derivative_only("factored_mask_loss", "mask_loss_reference of the product")
    def backward(ctx: Any, grad_sums: Tensor, _: Tensor) -> tuple:
        features, targets, matches, areas, *queries = ctx.saved_tensors
        batch, count, _channels = queries[0].shape
        shape, cell = (batch, count, *features.shape[2:]), len(queries) * features.element_size()
        blocks = list(_blocks(shape, cell, ctx.budget))
        summed = areas.dtype if len(queries) > 1 or len(blocks) > 1 else features.dtype
        grad_features = features.new_zeros(features.shape, dtype=summed).flatten(2)
        grad_queries = [torch.zeros_like(q) for q in queries]
        for images, own in blocks:
            logits = [_product(q[images, own], features[images]) for q in queries]
            matched = _matched(matches, images, own, count, targets)
            gradients = _mask_loss_bwd(
                grad_sums[:, images, own], logits, targets[images], matched, areas[images], *ctx.options
            )
            del logits
            pixels = features[images].flatten(2)
            for q, grad_query, dx in zip(queries, grad_queries, gradients, strict=True):
                dx = dx.flatten(2)
                grad_query[images, own] = torch.bmm(dx, pixels.mT)
                grad_features[images].baddbmm_(q[images, own].to(summed).mT, dx.to(summed))
        grad_features = grad_features.view(features.shape).to(features.dtype)
        return (grad_features, *(None,) * 8, *grad_queries)


def _factors(
    queries: Tensor | Sequence[Tensor], features: Tensor, budget: int | None
) -> tuple[list[Tensor], Tensor, list[Tensor], int]:
    """Queries and features as they are multiplied, what stands for their products, the bytes of a block."""
    entries = tensors("queries", queries)
    if not entries:
        raise ValueError("queries is empty; expected at least one tensor")
    names = ["queries" if isinstance(queries, Tensor) else f"queries[{i}]" for i in range(len(entries))]
    for name, tensor in (("features", features), *zip(names, entries, strict=True)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if features.ndim != 4 or min(features.shape[1:]) < 1:
        raise ValueError(
            f"features has shape {tuple(features.shape)}; expected (batch, channels, height, width), not "
            "empty"
        )
    features, *entries = autocast(features.device, features, *entries)
    batch, channels = features.shape[:2]
    for name, query in zip(names, entries, strict=True):
        if query.ndim != 3 or (query.shape[0], query.shape[2]) != (batch, channels) or not query.shape[1]:
            raise ValueError(
                f"{name} has shape {tuple(query.shape)}; expected ({batch}, queries, {channels}), batch and "
                "channels of features"
            )
        if query.dtype != features.dtype or query.device != features.device:
            raise TypeError(
                f"{name} is {query.dtype} on {query.device}; expected {features.dtype} on {features.device}, "
                "as features"
            )
    if budget is None:
        budget = budget_of(features.device)
    whole("budget", budget, 1)
    stand_ins = [
        features.new_empty(()).expand(batch, query.shape[1], *features.shape[2:]) for query in entries
    ]
    return entries, features, stand_ins, budget


def _front(
    queries: list[Tensor], matches: Tensor | None
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """The matched queries alone, at the front, and where they were; all of them where that is not known."""
    if matches is None or not _checks.can_read(matches) or not len(matches):
        return queries, matches, None
    count = max(1, int((matches >= 0).sum(1).max()))
    if count == matches.shape[1]:
        return queries, matches, None
    order = (matches < 0).byte().argsort(dim=1, stable=True)[:, :count]
    return [q.take_along_dim(order[..., None], 1) for q in queries], matches.gather(1, order), order


def factored_mask_loss(
    queries: Tensor | Sequence[Tensor],
    features: Tensor,
    targets: Tensor,
    *,
    matches: Tensor | None = None,
    num_classes: int | None = None,
    ignore_index: int = 255,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
    mask_ignored: bool = False,
    pair_weights: Tensor | None = None,
    num_masks: Tensor | float | None = None,
    reduction: str = "mean",
    budget: int | None = None,
    backend: str | None = None,
) -> MaskLoss:
    """:func:`~segvit_kernels.mask_loss` of the product of queries and features, which is never stored.

    The same losses and, for queries and features, the same gradients, for the price of making the product
    twice. What is not matched costs nothing on a CPU; elsewhere select the matched queries first, which
    matchings know without a look at the device: (B, K, C) of the largest K, -1 in ``matches`` for the rest.

    Args:
        queries: (B, Q, C), float32, float16, bfloat16 or float64 (eager only); or a list of such (deep
            supervision), for one loss per entry.
        features: (B, C, h, w), dtype and device of ``queries``.
        targets, matches, num_classes, ignore_index: as in :func:`~segvit_kernels.mask_loss`.
        focal_alpha, focal_gamma, mask_ignored, pair_weights: likewise.
        num_masks, reduction, backend: likewise.
        budget: bytes of logits that exist at a time, at least those of one query; 32 MiB on a CPU and
            256 MiB elsewhere unless given.

    Returns:
        As :func:`~segvit_kernels.mask_loss`; differentiable in ``queries``, ``features`` and
        ``pair_weights``. Under autocast the factors are cast to its dtype, as a product would.

    Raises:
        TypeError: a dtype is not supported, or the dtypes of the factors differ.
        ValueError: shapes or devices disagree, or a value is out of range.
        BackendUnavailableError: an explicitly chosen backend cannot run here.
    """
    entries, features, stand_ins, budget = _factors(queries, features, budget)
    given = checked(
        stand_ins, targets, matches, num_classes, ignore_index, focal_alpha, focal_gamma, mask_ignored,
        pair_weights, num_masks, reduction, name="queries",
    )  # fmt: skip
    if transformed(backend):
        features, *entries = full_precision(features, *entries)  # type: ignore[assignment]
        with without_autocast(features.device):
            products = [_product(query, features) for query in entries]
        losses = mask_loss_reference(products, **given._asdict())
    else:
        losses = _reduced(*_sums(entries, features, given, budget, backend), given)
    return _only(losses) if isinstance(queries, Tensor) else losses


def _sums(
    queries: list[Tensor], features: Tensor, given: Arguments, budget: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    """The operator's four sums (L, B, Q, 4) of every pair, and the targets' areas."""
    front, matched, order = _front(queries, given.matches)
    options = (*given[2:6], budget, backend)
    if differentiable(features, *front):
        sums, areas = FactoredMaskLossFunction.apply(features, given.targets, matched, *options, *front)
    else:
        sums, areas = FactoredMaskLossFunction.forward(
            _Forget(), features, given.targets, matched, *options, *front
        )
    if order is not None:
        every = sums.new_zeros(len(queries), len(order), queries[0].shape[1], 4)
        sums = every.scatter(2, order[None, :, :, None].expand(sums.shape), sums)
    return sums, areas


class _Forget:
    """The context of a forward that has no backward."""

    def save_for_backward(self, *_: Any) -> None: ...

    def mark_non_differentiable(self, *_: Any) -> None: ...


def factored_matching_cost(
    queries: Tensor,
    features: Tensor,
    targets: Tensor,
    *,
    num_classes: int | None = None,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
    budget: int | None = None,
    backend: str | None = None,
) -> MatchingCost:
    """:func:`~segvit_kernels.mask_matching_cost` of the product of queries and features, never stored.

    Args:
        queries: (B, Q, C), as in :func:`factored_mask_loss`.
        features: (B, C, h, w), dtype and device of ``queries``.
        targets, num_classes, focal_alpha, focal_gamma: as in :func:`~segvit_kernels.mask_matching_cost`.
        backend: likewise.
        budget: bytes of logits that exist at a time, as in :func:`factored_mask_loss`.

    Returns:
        ``focal``, ``bce`` and ``dice``, each (B, Q, M) float32 (float64 for float64 factors). No gradient.

    Raises:
        TypeError: a dtype is not supported, or the dtypes of the factors differ.
        ValueError: shapes or devices disagree, or a value is out of range.
        BackendUnavailableError: an explicitly chosen backend cannot run here.
    """
    _library.check_backend(backend)
    if not isinstance(queries, Tensor):
        raise TypeError(f"queries is a {type(queries).__name__}; expected a tensor")
    if isinstance(targets, Tensor) and targets.ndim == 3 and num_classes is None:
        raise ValueError("num_classes is None with labels; expected their number")
    (query,), features, stand_ins, budget = _factors(queries, features, budget)
    query, features = query.detach(), features.detach()
    classes = validate(stand_ins, targets, num_classes, focal_alpha, focal_gamma, None)
    if transformed(backend):
        with without_autocast(features.device):
            product = _product(*full_precision(query, features))  # type: ignore[arg-type]
        return mask_matching_cost_reference(
            product, targets, num_classes=classes, focal_alpha=focal_alpha, focal_gamma=focal_gamma
        )
    options = (classes, float(focal_alpha), float(focal_gamma), backend)
    (batch, count, _), dtype = query.shape, accumulator(features)
    products = features.new_empty((3, batch, count, classes), dtype=dtype)
    totals = features.new_empty((3, batch, count), dtype=dtype)
    areas = features.new_empty((batch, classes), dtype=dtype)
    for images, own in _blocks((batch, count, *features.shape[2:]), features.element_size(), budget):
        logits = _product(query[images, own], features[images])
        products[:, images, own], totals[:, images, own], areas[images] = _mask_matching_sums(
            logits, targets[images], *options
        )
    return _costs(products, totals, areas, targets.shape[-2] * targets.shape[-1])
