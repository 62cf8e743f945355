"""The mask losses of transformers' mask-classification models, and their matching."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from segvit_kernels.integrations._kinds import known_base, overridden
from segvit_kernels.integrations._masks import Replacement, match, pixel_sums, point_sums

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
# What a criterion's points are made by.
_SAMPLING = ("sample_points_using_uncertainty", "calculate_uncertainty")


def replacement(module: nn.Module, matcher: bool, points: bool) -> Replacement | None:
    """How to replace a criterion of transformers; ``None`` where it is none.

    Raises:
        ValueError: it overrides what would be replaced.
    """
    base = known_base(type(module), _CRITERIA)
    if base is None:
        return None
    term = _CRITERIA[base.__name__]
    _check_overrides(module, _CRITERIA, "loss_masks", *(_SAMPLING if points else ()))
    if matcher:
        _check_overrides(module.matcher, _MATCHERS)  # type: ignore[arg-type]
    losses = _oneformer_losses if base.__name__ == "OneFormerLoss" else _LOSSES[term]
    return Replacement(module, ("forward", losses), ("forward", _MATCHES[term]), sampled=term != "focal")


def _check_overrides(module: nn.Module, names: Container[str], *methods: str) -> None:
    name, base = type(module).__name__, known_base(type(module), names)
    remedy = "matcher=False keeps it" if names is _MATCHERS else "it would be replaced"
    if base is None:
        raise ValueError(f"model holds a {name}, a matcher that is not known; {remedy}")
    method = overridden(module, base, "forward", *methods)
    if method is not None:
        raise ValueError(f"model holds a {name} with a {method} other than {base.__name__}'s; {remedy}")


def _match(
    matcher: Any,
    term: str,
    masks_queries_logits: Tensor,
    class_queries_logits: Tensor,
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
    *,
    points: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """``matcher.forward``: per image the matched queries and their targets, both (min(Q, M),) int64."""
    return match(matcher, term, masks_queries_logits, class_queries_logits, mask_labels, class_labels, points)


def _losses(
    criterion: Any,
    term: str,
    masks_queries_logits: Tensor,
    class_queries_logits: Tensor,
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
    auxiliary_predictions: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    points: bool = False,
) -> dict[str, Tensor]:
    """``criterion.forward``: the unweighted losses by name; those of auxiliary output i end in ``_i``."""
    auxiliary = auxiliary_predictions or ()
    masks = [masks_queries_logits, *(output["masks_queries_logits"] for output in auxiliary)]
    classes = [class_queries_logits, *(output["class_queries_logits"] for output in auxiliary)]
    matchings: list[Any] = []

    def matched() -> Iterator[Any]:
        for m, c in zip(masks, classes, strict=True):
            matchings.append(criterion.matcher(m, c, mask_labels, class_labels))
            yield matchings[-1]

    if points:  # in the original's order of random numbers: an output's matching, then its loss
        terms = [
            point_sums(criterion, m, mask_labels, found) for m, found in zip(masks, matched(), strict=True)
        ]
    else:
        terms = pixel_sums(masks, mask_labels, list(matched()), term)
    num_masks = criterion.get_num_masks(class_labels, device=class_labels[0].device)
    losses = {}
    for i, ((mask, dice), logits, matching) in enumerate(zip(terms, classes, matchings, strict=True)):
        suffix = f"_{i - 1}" if i else ""
        losses[f"loss_mask{suffix}"] = mask / num_masks
        losses[f"loss_dice{suffix}"] = dice / num_masks
        for key, value in criterion.loss_labels(logits, class_labels, matching).items():
            losses[f"{key}{suffix}"] = value
    return losses


def _oneformer_losses(
    criterion: Any,
    masks_queries_logits: Tensor,
    class_queries_logits: Tensor,
    contrastive_queries_logits: Tensor | None,
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
    text_queries: Tensor | None,
    auxiliary_predictions: Sequence[Mapping[str, Tensor]] | None = None,
    calculate_contrastive_loss: bool = True,
    *,
    points: bool = False,
) -> dict[str, Tensor]:
    """``criterion.forward`` of OneFormer, which takes more."""
    outputs = masks_queries_logits, class_queries_logits, mask_labels, class_labels
    losses = _losses(criterion, "bce", *outputs, auxiliary_predictions, points=points)
    if calculate_contrastive_loss:
        losses.update(criterion.loss_contrastive(contrastive_queries_logits, text_queries))
    return losses


def _focal_losses(criterion: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    return _losses(criterion, "focal", *args, **kwargs)


def _bce_losses(criterion: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    return _losses(criterion, "bce", *args, **kwargs)


def _focal_match(matcher: Any, *args: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
    return _match(matcher, "focal", *args, **kwargs)


def _bce_match(matcher: Any, *args: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
    return _match(matcher, "bce", *args, **kwargs)


_LOSSES = {"focal": _focal_losses, "bce": _bce_losses}
_MATCHES = {"focal": _focal_match, "bce": _bce_match}
