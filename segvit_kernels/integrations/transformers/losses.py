"""The mask losses of mask-classification models at full resolution, and their matching."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit_kernels.integrations.transformers.kinds import known_base, overridden
from segvit_kernels.ops.mask_loss import mask_loss, mask_matching_cost

# The mask term beside dice.
_CRITERIA = {
    "MaskFormerLoss": "focal",
    "Mask2FormerLoss": "bce",
    "OneFormerLoss": "bce",
    "EomtLoss": "bce",
    "EomtDinov3Loss": "bce",
    "VideomtLoss": "bce",
}
_MATCHERS = {name.replace("Loss", "HungarianMatcher") for name in _CRITERIA}


def use_fused_loss(model: nn.Module, *, matcher: bool = True, enabled: bool = True) -> nn.Module:
    """Let ``model`` compute its mask losses with :func:`~segvit_kernels.mask_loss`, at full resolution.

    Replaces the ``forward`` of the criterion (and of its matcher) of this one model, in place; no class is
    touched, and ``state_dict`` stays as it is. ``use_fused_loss(model, enabled=False)`` gives the original
    back. The supervised outputs of a step, auxiliary ones included, are one operator call (EoMT calls its
    criterion once per output). No mask is ever upsampled in memory; what remains are the matched mask logits
    at low resolution and one copy of the batch's target masks, a quarter of it if they are boolean.

    * MaskFormer: focal and dice over all pixels, matched at the resolution of the masks. The same losses,
      matching and gradients as the original.
    * Mask2Former, OneFormer, EoMT, VidEoMT: binary cross-entropy and dice over all pixels of the upsampled
      mask, where the original samples ``train_num_points`` points: repeatable, without sampling noise. It is
      what the original estimates with ``importance_sample_ratio=0`` (but for half a cell along the border of
      the image, where its sampling blends in zeros). With the usual 0.75 the original puts that share of its
      points where the masks are least certain, so that boundaries weigh more in it than in this loss: expect
      smaller values of both terms here, and do not take over tuned loss weights unseen.

    A criterion may inherit from one of these: what it overrides (``loss_labels``, ``get_num_masks``) is
    called as before. One that overrides what this replaces (``forward``, ``loss_masks``) is refused by name,
    and so is a model with another criterion beside those known, which would go on as it was, unseen.

    Args:
        model: a model of transformers, or a module that contains one (DDP, PEFT).
        matcher: compute the Hungarian matcher's mask costs with
            :func:`~segvit_kernels.mask_matching_cost` too, for all but MaskFormer over all pixels. Without it
            the original matcher runs, with its ``train_num_points`` random points.
        enabled: ``False`` restores the original.

    Returns:
        ``model``.

    Raises:
        ValueError: ``model`` holds no criterion of these models, another beside them, or one that overrides
            what would be replaced.
        ImportError: SciPy, which solves the assignment, is not installed.
    """
    criteria = _criteria(model)
    _assignment()
    for criterion, _ in criteria:
        _check_overrides(criterion, _CRITERIA, "loss_masks")
        if matcher:
            _check_overrides(criterion.matcher, _MATCHERS)
    for criterion, term in criteria:
        for module in (criterion, criterion.matcher):
            if getattr(module.__dict__.get("forward"), "func", None) in (_losses, _match):
                del module.forward
        if enabled:
            criterion.forward = functools.partial(_losses, criterion, term)
            if matcher:
                criterion.matcher.forward = functools.partial(_match, criterion.matcher, term)
    return model


def _criteria(model: nn.Module) -> list[tuple[Any, str]]:
    """The criteria of ``model`` and the mask term of each."""
    known: list[tuple[Any, str]] = []
    others: list[str] = []
    for module in model.modules():
        base = known_base(type(module), _CRITERIA)
        if base is not None:
            known.append((module, _CRITERIA[base.__name__]))
        elif hasattr(module, "matcher") and hasattr(module, "loss_masks"):
            others.append(type(module).__name__)
    expected = f"expected one of {', '.join(_CRITERIA)}, or what inherits from one"
    if others:
        raise ValueError(f"model holds a {others[0]}, a criterion that is not known; {expected}")
    if not known:
        raise ValueError(f"model holds no criterion to replace; {expected}")
    return known


def _check_overrides(module: nn.Module, names: Container[str], *methods: str) -> None:
    name, base = type(module).__name__, known_base(type(module), names)
    remedy = "matcher=False keeps it" if names is _MATCHERS else "it would be replaced"
    if base is None:
        raise ValueError(f"model holds a {name}, a matcher that is not known; {remedy}")
    method = overridden(module, base, "forward", *methods)
    if method is not None:
        raise ValueError(f"model holds a {name} with a {method} other than {base.__name__}'s; {remedy}")


def _assignment() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed; it comes with: pip install 'segvit-kernels[transformers]'"
        ) from None
    return linear_sum_assignment


@torch.no_grad()
def _match(
    matcher: Any,
    term: str,
    masks_queries_logits: Tensor,
    class_queries_logits: Tensor,
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """``matcher.forward``: per image the matched queries and their targets, both (min(Q, M),) int64."""
    costs = []
    for masks, classes, targets, labels in zip(
        masks_queries_logits, class_queries_logits, mask_labels, class_labels, strict=True
    ):
        cost = -matcher.cost_class * classes.float().softmax(-1)[:, labels]
        if len(labels):
            targets = targets.to(masks.device)
            if term == "focal":
                targets = F.interpolate(targets[:, None].float(), masks.shape[-2:], mode="nearest")[:, 0]
            pairwise = mask_matching_cost(masks[None], targets[None])
            cost += matcher.cost_mask * getattr(pairwise, term)[0] + matcher.cost_dice * pairwise.dice[0]
        largest = torch.finfo(cost.dtype).max
        costs.append(cost.nan_to_num(nan=largest, posinf=largest, neginf=largest))
    solve = _assignment()
    pairs = [solve(cost.cpu()) for cost in costs]
    return [(torch.as_tensor(query), torch.as_tensor(target)) for query, target in pairs]


def _losses(
    criterion: Any,
    term: str,
    masks_queries_logits: Tensor,
    class_queries_logits: Tensor,
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
    auxiliary_predictions: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    contrastive_queries_logits: Tensor | None = None,
    text_queries: Tensor | None = None,
    calculate_contrastive_loss: bool = False,
) -> dict[str, Tensor]:
    """``criterion.forward``: the unweighted losses by name; those of auxiliary output i end in ``_i``."""
    auxiliary = auxiliary_predictions or ()
    masks = [masks_queries_logits, *(output["masks_queries_logits"] for output in auxiliary)]
    classes = [class_queries_logits, *(output["class_queries_logits"] for output in auxiliary)]
    matchings = [
        criterion.matcher(m, c, mask_labels, class_labels) for m, c in zip(masks, classes, strict=True)
    ]
    num_masks = criterion.get_num_masks(class_labels, device=class_labels[0].device)

    terms = _mask_terms(masks, mask_labels, matchings, term)
    losses = {}
    for i, ((mask, dice), logits, matching) in enumerate(zip(terms, classes, matchings, strict=True)):
        suffix = f"_{i - 1}" if i else ""
        losses[f"loss_mask{suffix}"] = mask / num_masks
        losses[f"loss_dice{suffix}"] = dice / num_masks
        for key, value in criterion.loss_labels(logits, class_labels, matching).items():
            losses[f"{key}{suffix}"] = value
    if calculate_contrastive_loss:
        losses.update(criterion.loss_contrastive(contrastive_queries_logits, text_queries))
    return losses


def _mask_terms(
    masks: list[Tensor], mask_labels: Sequence[Tensor], matchings: list, term: str
) -> list[tuple[Tensor, Tensor]]:
    """For every output the sums of the mask term and of dice over its matched pairs.

    Each output has a matching of its own, and there are fewer targets than queries: all targets of the batch
    become the targets of one image, and every output brings the query that it matched to each of them.
    """
    device = masks[0].device
    counts = [len(targets) for targets in mask_labels]
    images = torch.repeat_interleave(torch.tensor(counts)).to(device)
    queries = torch.zeros(len(masks), sum(counts), dtype=torch.int64)
    matched = torch.zeros(len(masks), sum(counts))  # 0 where an image has more targets than queries
    for i, matching in enumerate(matchings):
        for first, (query, target) in zip(itertools.accumulate([0, *counts]), matching, strict=False):
            queries[i, first + target] = query
            matched[i, first + target] = 1
    pairs = [logits[images, query] for logits, query in zip(masks, queries.to(device), strict=True)]
    if not sum(counts):
        # Zeros that keep the graph: no parameter drops out of the backward of an image without targets.
        return [(pair.sum(), pair.sum()) for pair in pairs]

    height, width = (max(targets.shape[axis] for targets in mask_labels) for axis in (1, 2))
    targets = [targets.to(device) for targets in mask_labels]
    if any(t.shape[1:] != (height, width) for t in targets):  # an F.pad by nothing would copy
        targets = [F.pad(t, (0, width - t.shape[2], 0, height - t.shape[1])) for t in targets]
    losses = mask_loss([pair[None] for pair in pairs], torch.cat(targets)[None], reduction="none")
    return [
        ((mask[0] * weight).sum(), (dice[0] * weight).sum())
        for mask, dice, weight in zip(getattr(losses, term), losses.dice, matched.to(device), strict=True)
    ]
