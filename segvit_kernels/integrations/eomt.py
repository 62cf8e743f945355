"""tue-mps/eomt and LightlyTrain's EoMT: label maps of windows, and ``MaskClassificationLoss``.

    criterion(masks_queries_logits, targets, class_queries_logits)  # targets: {"masks", "labels"} an image

The criterion inherits from transformers' Mask2FormerLoss and has a ``forward`` of its own, which first copies
every mask to floating point. Known by its name and by what its ``__init__``, ``forward`` and ``loss_masks``
take: forks add terms under the same name, and are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from segvit_kernels.integrations._kinds import known_base
from segvit_kernels.integrations._masks import Replacement, match, pixel_sums, point_sums
from segvit_kernels.integrations._windows import window_views
from segvit_kernels.ops._checks import flag, size_pair
from segvit_kernels.ops.semantic_argmax import semantic_argmax

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


@torch.no_grad()
def window_label_maps(
    mask_logits: Tensor,
    class_logits: Tensor,
    origins: Sequence[Sequence[int]],
    img_sizes: Sequence[tuple[int, int]],
    img_size: tuple[int, int],
    *,
    last_class: bool = False,
) -> list[Tensor]:
    """The label maps of images of which the model saw windows, without a score tensor.

    In place of ``F.interpolate`` to the size of a window, ``to_per_pixel_logits_semantic``,
    ``revert_window_logits_semantic`` (LightlyTrain: ``untile``) and the argmax: the scores of windows are
    averaged where they overlap, interpolated to the size of the image and compared in one pass. The labels
    are theirs, except where two scores tie to rounding.

    Args:
        mask_logits: (windows, Q, h, w), of the model's last layer.
        class_logits: (windows, Q, classes + 1), the last one "no object".
        origins: (image, start, end) of every window, as ``window_imgs_semantic`` gives them, along the longer
            side; of LightlyTrain's ``tile`` (image, start, end, is_tall).
        img_sizes: (height, width) of the label map of every image.
        img_size: (height, width) of a window, to which masks are interpolated before their sigmoid.
        last_class: count "no object" as a class, as LightlyTrain does where classes are ignored.

    Returns:
        One (height, width) int64 map per image; LightlyTrain maps them on by
        ``internal_class_to_class``.

    Raises:
        TypeError, ValueError: shapes, origins and sizes do not fit each other.
    """
    class_probs = class_logits.softmax(-1)[..., : None if flag("last_class", last_class) else -1]
    window = size_pair("img_size", img_size)
    if len(origins) != len(mask_logits):
        raise ValueError(
            f"origins has length {len(origins)}; expected {len(mask_logits)}, the windows of mask_logits"
        )
    for index, (image, start, end, *_) in enumerate(origins):
        if not (0 <= image < len(img_sizes) and 0 <= start < end and end - start in window):
            raise ValueError(
                f"origins[{index}] is {tuple(origins[index])}; expected (image, start, end), an image below "
                f"{len(img_sizes)} and a side of the window {window}"
            )
    maps = []
    for image, size in enumerate(img_sizes):
        target = size_pair(f"img_sizes[{image}]", tuple(size))
        members = [i for i, origin in enumerate(origins) if origin[0] == image]
        if not members:
            raise ValueError(f"origins has no window of image {image}; expected one at least")
        tokens = F.interpolate(mask_logits[members], window, mode="bilinear").sigmoid_()
        spans = [(int(origins[i][1]), int(origins[i][2])) for i in members]
        tokens, views = window_views(tokens, spans, target, f"img_sizes[{image}]", stitch=True)
        labels = semantic_argmax(tokens, class_probs[members], target, views=views, activation="none")
        maps.append(cast(Tensor, labels)[0].long())
    return maps
