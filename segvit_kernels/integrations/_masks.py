"""What criteria of mask classification share in all libraries: matching, and sums over matched pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit_kernels.ops.mask_loss import mask_loss, mask_matching_cost
from segvit_kernels.ops.mask_points import checked_indices, mask_loss_at_points, mask_matching_cost_at_points

Matching = Sequence[tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Replacement:
    """How a criterion is replaced.

    Attributes:
        module: the criterion. method: the name of its method that is replaced, and by which function;
            the function's first argument is the module, its keyword ``points`` says at points.
        sampled: whether the original takes points.
        matcher: as ``method`` for ``module.matcher``, or why it cannot be replaced.
    """

    module: Any
    method: tuple[str, Callable]
    matcher: tuple[str, Callable] | str
    sampled: bool = True


def assignment() -> Any:
    """SciPy's ``linear_sum_assignment``."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed; it comes with: pip install 'segvit-kernels[transformers]'"
        ) from None
    return linear_sum_assignment


def _numbers(targets: Tensor) -> Tensor:
    """Masks as operators take them: libraries have integers as well."""
    return targets if targets.dtype == torch.bool or targets.is_floating_point() else targets.float()


@torch.no_grad()
def match(
    matcher: Any,
    term: str,
    masks: Tensor,
    classes: Tensor,
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
    points: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Per image the matched queries and their targets, both (min(Q, M),) int64."""
    costs = []
    for own, logits, targets, labels in zip(masks, classes, mask_labels, class_labels, strict=True):
        cost = -matcher.cost_class * logits.float().softmax(-1)[:, labels]
        targets = targets.to(own.device)
        if points:
            (at,) = mask_matching_cost_at_points(own[None], [targets], num_points=matcher.num_points)
            cost = cost + matcher.cost_mask * at.bce + matcher.cost_dice * at.dice
        elif len(labels):
            if term == "focal":
                targets = F.interpolate(targets[:, None].float(), own.shape[-2:], mode="nearest")[:, 0]
            pairwise = mask_matching_cost(own[None], _numbers(targets)[None])
            cost += matcher.cost_mask * getattr(pairwise, term)[0] + matcher.cost_dice * pairwise.dice[0]
        largest = torch.finfo(cost.dtype).max
        costs.append(cost.nan_to_num(nan=largest, posinf=largest, neginf=-largest))
    solve = assignment()
    pairs = [solve(cost.cpu()) for cost in costs]
    return [(torch.as_tensor(query), torch.as_tensor(target)) for query, target in pairs]


def point_sums(
    criterion: Any, masks: Tensor, mask_labels: Sequence[Tensor], matching: Matching
) -> tuple[Tensor, Tensor]:
    """The sums of BCE and of dice over the matched pairs, at the criterion's own random points."""
    found = mask_loss_at_points(
        masks,
        [targets.to(masks.device) for targets in mask_labels],
        matching,
        num_points=criterion.num_points,
        oversample_ratio=criterion.oversample_ratio,
        importance_sample_ratio=criterion.importance_sample_ratio,
        reduction="sum",
    )
    return found.bce, found.dice


def pixel_sums(
    masks: list[Tensor], mask_labels: Sequence[Tensor], matchings: Sequence[Matching], term: str
) -> list[tuple[Tensor, Tensor]]:
    """For every output the sums of the mask term and of dice over its matched pairs, at every pixel.

    Each output has a matching of its own, and there are fewer targets than queries: all targets of the batch
    become the targets of one image, and every output brings the query that it matched to each of them. A
    target that an output matched several times (denoising, one-to-many matchers) stands there as often.
    """
    device = masks[0].device
    counts = torch.tensor([len(targets) for targets in mask_labels])
    pairs = []  # of every output its queries and their targets, by place among those of the batch
    for logits, matching in zip(masks, matchings, strict=True):
        _, queries, picked = checked_indices(matching, logits, mask_labels)
        own = zip(counts.cumsum(0) - counts, picked, strict=True)
        pairs.append((queries.cpu(), torch.cat([first + target.cpu() for first, target in own])))
    times = torch.stack([chosen.bincount(minlength=int(counts.sum())) for _, chosen in pairs]).amax(0)
    times.clamp_(min=1)
    slots = torch.repeat_interleave(times)  # which target stands there
    images = torch.repeat_interleave(counts)[slots].to(device)
    queries = torch.zeros(len(masks), len(slots), dtype=torch.int64)
    matched = torch.zeros(len(masks), len(slots))  # 0 where an image has more targets than queries
    for i, (query, chosen) in enumerate(pairs):
        chosen, order = chosen.sort(stable=True)
        again = torch.arange(len(chosen)) - torch.searchsorted(chosen, chosen)
        place = (times.cumsum(0) - times)[chosen] + again
        queries[i, place], matched[i, place] = query[order], 1.0
    brought = [logits[images, query] for logits, query in zip(masks, queries.to(device), strict=True)]
    if not len(slots):
        # Zeros that keep the graph: no parameter drops out of the backward of an image without targets.
        return [(logits.sum(), logits.sum()) for logits in brought]

    height, width = (max(targets.shape[axis] for targets in mask_labels) for axis in (1, 2))
    targets = [targets.to(device) for targets in mask_labels]
    if any(t.shape[1:] != (height, width) for t in targets):  # an F.pad by nothing would copy
        targets = [F.pad(t, (0, width - t.shape[2], 0, height - t.shape[1])) for t in targets]
    losses = mask_loss(
        [logits[None] for logits in brought],
        _numbers(torch.cat(targets))[None],
        matches=None if len(slots) == len(times) else slots[None].to(device),
        reduction="none",
    )
    return [
        ((mask[0] * weight).sum(), (dice[0] * weight).sum())
        for mask, dice, weight in zip(getattr(losses, term), losses.dice, matched.to(device), strict=True)
    ]
