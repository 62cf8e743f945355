"""The criteria of detectron2's projects: Mask2Former's, OneFormer's and Mask DINO's own ``SetCriterion``.

    outputs: {"pred_logits": (B, Q, C + 1), "pred_masks": (B, Q, h, w), "aux_outputs": [...]}
    targets: {"labels": (M,), "masks": (M, H, W)} of each image
    indices: (queries, targets) of each image, as ``HungarianMatcher`` gives them

``use_fused_loss`` replaces their ``loss_masks`` and, where it has no cost of boxes (Mask DINO's has), the
matcher. :func:`fused_set_criterion` is the same as a function, for criteria of one's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segvit_kernels.integrations._kinds import known_base, overridden
from segvit_kernels.integrations._masks import Matching, Replacement, match, pixel_sums
from segvit_kernels.ops._checks import count
from segvit_kernels.ops.mask_points import mask_loss_at_points

_TAKES = ("outputs", "targets", "indices", "num_masks")
_SAMPLING = ("num_points", "oversample_ratio", "importance_sample_ratio")


def replacement(module: nn.Module, matcher: bool, points: bool) -> Replacement | None:
    """How to replace a ``SetCriterion``; ``None`` where ``module`` is another.

    Raises:
        ValueError: it takes no points, as DETR's, or takes something else than these.
    """
    base = known_base(type(module), ("SetCriterion",))
    if base is None:
        return None
    name = type(module).__name__
    if missing := [option for option in _SAMPLING if not hasattr(module, option)]:
        raise ValueError(
            f"model holds a {name} without {', '.join(missing)}; expected that of Mask2Former, OneFormer or "
            "Mask DINO"
        )
    method: Any = getattr(type(module), "loss_masks", None)
    takes = tuple(inspect.signature(method).parameters)[1:] if method is not None else ()
    if takes != _TAKES or method is not getattr(base, "loss_masks", None):
        raise ValueError(
            f"model holds a {name} with a loss_masks other than SetCriterion's; it would be replaced"
        )
    reason: tuple[str, Any] | str = ("forward", _match)
    own: Any = module.matcher
    takes = tuple(inspect.signature(type(own).forward).parameters)[1:]
    costs = {option for option in vars(own) if option.startswith("cost_")}
    if takes != ("outputs", "targets") or costs != {"cost_class", "cost_mask", "cost_dice"}:
        reason = (
            f"model holds a {type(own).__name__} with {', '.join(sorted(costs)) or 'no costs'}; expected "
            "cost_class, cost_mask and cost_dice alone: matcher=False keeps it"
        )
    elif (
        (known := known_base(type(own), ("HungarianMatcher",))) is None
        or overridden(own, known, "forward", "memory_efficient_forward")
        or not hasattr(own, "num_points")
    ):
        reason = (
            f"model holds a {type(own).__name__}, a matcher other than Mask2Former's HungarianMatcher: "
            "matcher=False keeps it"
        )
    return Replacement(module, ("loss_masks", _loss_masks), reason)


def _match(
    matcher: Any,
    outputs: Mapping[str, Tensor],
    targets: Sequence[Mapping[str, Tensor]],
    *,
    points: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """``matcher.forward``."""
    masks, labels = [target["masks"] for target in targets], [target["labels"] for target in targets]
    return match(matcher, "bce", outputs["pred_masks"], outputs["pred_logits"], masks, labels, points)


def _loss_masks(
    criterion: Any,
    outputs: Mapping[str, Any],
    targets: Sequence[Mapping[str, Tensor]],
    indices: Matching,
    num_masks: float | Tensor,
    *,
    points: bool = False,
) -> dict[str, Tensor]:
    """``criterion.loss_masks``."""
    sampling = {option: getattr(criterion, option) for option in _SAMPLING} if points else {}
    return fused_set_criterion(outputs, targets, indices, num_masks=num_masks, **sampling)


def fused_set_criterion(
    outputs: Mapping[str, Any],
    targets: Sequence[Mapping[str, Tensor]],
    indices: Matching,
    *,
    num_masks: float | Tensor | None = None,
    num_points: int | None = None,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """What ``SetCriterion.loss_masks`` gives, without copies of masks and targets.

    With ``num_points`` at random points, with the same seed at the original's, and then equal to it; without
    at every pixel of the upsampled masks (see :func:`~segvit_kernels.integrations.use_fused_loss`).

    Args:
        outputs: with ``pred_masks`` (B, Q, h, w).
        targets: for every image ``masks`` (M, H, W), bool or numbers in [0, 1].
        indices: for every image its matched queries and their targets, both int64.
        num_masks: what the sums are divided by; the number of matched pairs, at least 1, unless given.
        num_points, oversample_ratio, importance_sample_ratio, generator: as in
            :func:`~segvit_kernels.mask_loss_at_points`.

    Returns:
        ``loss_mask`` (BCE) and ``loss_dice``.

    Raises:
        KeyError: ``outputs`` or a target lacks an entry.
        TypeError, ValueError: a shape or a value does not fit.
    """
    masks = outputs["pred_masks"]
    labels = [target["masks"].to(masks.device) for target in targets]
    if len(labels) != len(masks) or len(indices) != len(masks):
        raise ValueError(
            f"targets has length {len(labels)} and indices {len(indices)}; expected {len(masks)}, the batch"
        )
    if num_points is None:
        ((mask, dice),) = pixel_sums([masks], labels, [indices], "bce")
    else:
        found = mask_loss_at_points(
            masks, labels, indices, num_points=num_points, oversample_ratio=oversample_ratio,
            importance_sample_ratio=importance_sample_ratio, reduction="sum", generator=generator,
        )  # fmt: skip
        mask, dice = found.bce, found.dice
    if num_masks is not None:
        num_masks = count("num_masks", num_masks)
    else:
        num_masks = max(1, sum(len(queries) for queries, _ in indices))
    return {"loss_mask": mask / num_masks, "loss_dice": dice / num_masks}
