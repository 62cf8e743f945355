"""The criterion of tue-mps/eomt and of LightlyTrain's EoMT: ``MaskClassificationLoss``.

    criterion(masks_queries_logits, targets, class_queries_logits)  # targets: {"masks", "labels"} an image

It inherits from transformers' Mask2FormerLoss and has a ``forward`` of its own, which first copies every mask
to floating point. Known by its name and by what its ``__init__``, ``forward`` and ``loss_masks`` take: forks
add terms under the same name, and are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from segvit_kernels.integrations._kinds import known_base
from segvit_kernels.integrations._masks import Replacement, match, pixel_sums, point_sums

_NAME = "MaskClassificationLoss"
_TAKES = {
    "__init__": {
        "self", "num_points", "oversample_ratio", "importance_sample_ratio", "mask_coefficient",
        "dice_coefficient", "class_coefficient", "num_labels", "no_object_coefficient",
    },
    "forward": {"self", "masks_queries_logits", "targets", "class_queries_logits"},
    "loss_masks": {"self", "masks_queries_logits", "mask_labels", "indices"},
}  # fmt: skip


def replacement(module: nn.Module, matcher: bool, points: bool) -> Replacement | None:
    """How to replace this criterion; ``None`` where ``module`` is another.

    Raises:
        ValueError: it takes more, or inherits and overrides what would be replaced.
    """
    base = known_base(type(module), (_NAME,))
    if base is None:
        return None
    name = type(module).__name__
    for method, takes in _TAKES.items():
        own: Any = getattr(type(module), method)
        found = set(inspect.signature(own).parameters)
        if found != takes:
            extra = ", ".join(sorted(found ^ takes))
            raise ValueError(f"model holds a {name} whose {method} differs by {extra}; it would be replaced")
        if method != "__init__" and own is not getattr(base, method):
            raise ValueError(
                f"model holds a {name} with a {method} other than {_NAME}'s; it would be replaced"
            )
    known = known_base(type(module.matcher), ("Mask2FormerHungarianMatcher",))
    if matcher and (known is None or type(module.matcher).forward is not known.forward):  # type: ignore
        other = type(module.matcher).__name__
        raise ValueError(f"model holds a {other}, a matcher that is not known; matcher=False keeps it")
    return Replacement(module, ("forward", _losses), ("forward", _match))


def _match(
    matcher: Any,
    masks_queries_logits: Tensor,
    class_queries_logits: Tensor,
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
    *,
    points: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """``matcher.forward``."""
    return match(
        matcher, "bce", masks_queries_logits, class_queries_logits, mask_labels, class_labels, points
    )


def _losses(
    criterion: Any,
    masks_queries_logits: Tensor,
    targets: Sequence[Mapping[str, Tensor]],
    class_queries_logits: Tensor | None = None,
    *,
    points: bool = False,
) -> dict[str, Tensor]:
    """``criterion.forward``: the unweighted losses by name."""
    masks, labels = [target["masks"] for target in targets], [target["labels"].long() for target in targets]
    indices = criterion.matcher(
        masks_queries_logits=masks_queries_logits,
        mask_labels=masks,
        class_queries_logits=class_queries_logits,
        class_labels=labels,
    )
    if points:
        mask, dice = point_sums(criterion, masks_queries_logits, masks, indices)
    else:
        ((mask, dice),) = pixel_sums([masks_queries_logits], masks, [indices], "bce")
    count = torch.as_tensor(float(sum(len(own) for _, own in indices)), device=mask.device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count /= dist.get_world_size()
    count = count.clamp(min=1)
    classes = criterion.loss_labels(class_queries_logits, labels, indices)
    return {"loss_mask": mask / count, "loss_dice": dice / count, **classes}
