"""Arguments of mask losses and matching costs: one line of error for those that do not go together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from segvit_kernels.ops import _checks
from segvit_kernels.ops._autograd import differentiable

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MASK_DTYPES = (torch.bool, *DTYPES)


class Arguments(NamedTuple):
    """What a loss takes beside logits, by the names of ``mask_loss_reference``; the operators take six."""

    targets: Tensor
    matches: Tensor | None
    num_classes: int
    focal_alpha: float
    focal_gamma: float
    mask_ignored: bool
    pair_weights: Tensor | None
    num_masks: Tensor | float | None
    reduction: str


def checked(
    entries: list[Tensor],
    targets: Tensor,
    matches: Tensor | None,
    num_classes: int | None,
    ignore_index: int,
    focal_alpha: float,
    focal_gamma: float,
    mask_ignored: bool,
    pair_weights: Tensor | None,
    num_masks: Tensor | float | None,
    reduction: str,
    name: str = "mask_logits",
) -> Arguments:
    """Refuse arguments of a loss that do not go together."""
    _checks.whole("ignore_index", ignore_index)
    classes = validate(entries, targets, num_classes, focal_alpha, focal_gamma, ignore_index)
    queries = entries[0].shape[1]
    if matches is None and queries != classes:
        raise ValueError(f"{name} has {queries} queries; expected {classes}, one a target, or matches")
    if matches is not None:
        _expect_pairs("matches", matches, entries[0])
        if matches.dtype != torch.int64:
            raise TypeError(f"matches has dtype {matches.dtype}; expected torch.int64")
        if _checks.can_read(matches) and not bool(((matches >= -1) & (matches < classes)).all()):
            low, high = matches.min().item(), matches.max().item()
            raise ValueError(f"matches holds {low} to {high}; expected -1 to {classes - 1}")
    if pair_weights is not None:
        _expect_pairs("pair_weights", pair_weights, entries[0])
    if num_masks is not None:
        num_masks = _checks.count("num_masks", num_masks)
    if _checks.flag("mask_ignored", mask_ignored) and targets.ndim == 4:
        raise ValueError("mask_ignored is True with masks; expected labels: masks have no ignored pixels")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")
    if differentiable(targets):
        raise ValueError("targets requires a gradient, which there is none of; expected targets.detach()")
    alpha, gamma = float(focal_alpha), float(focal_gamma)
    return Arguments(
        targets, matches, classes, alpha, gamma, mask_ignored, pair_weights, num_masks, reduction
    )


def _expect_pairs(name: str, tensor: Tensor, logits: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if tensor.shape != logits.shape[:2]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected {tuple(logits.shape[:2])}, batch and queries"
        )
    if tensor.device != logits.device:
        raise ValueError(f"{name} is on {tensor.device}; expected {logits.device}, the device of mask_logits")


def validate(
    entries: list[Tensor],
    targets: Tensor,
    num_classes: int | None,
    focal_alpha: float,
    focal_gamma: float,
    ignore_index: int | None,
) -> int:
    """Refuse what does not go together; the number of targets. Labels' values only with an ignore_index."""
    if not entries:
        raise ValueError("mask_logits is empty; expected at least one tensor")
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets is a {type(targets).__name__}; expected a tensor")
    for index, logits in enumerate(entries):
        name = "mask_logits" if len(entries) == 1 else f"mask_logits[{index}]"
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name} is a {type(logits).__name__}; expected a tensor")
        if logits.dtype not in DTYPES:
            raise TypeError(
                f"{name} has dtype {logits.dtype}; expected float32, float16, bfloat16 or float64"
            )
        if logits.dtype != entries[0].dtype:
            raise TypeError(
                f"{name} has dtype {logits.dtype}; expected {entries[0].dtype}, that of the first"
            )
        if logits.ndim != 4 or min(logits.shape[1:]) < 1:
            raise ValueError(
                f"{name} has shape {tuple(logits.shape)}; expected (batch, queries, height, width) with at "
                "least one query and cell"
            )
        if logits.shape[:2] != entries[0].shape[:2]:
            raise ValueError(
                f"{name} has shape {tuple(logits.shape)}; expected batch and queries of the first, "
                f"{tuple(entries[0].shape[:2])}"
            )
        if logits.device != targets.device:
            raise ValueError(
                f"{name} is on {logits.device}; expected {targets.device}, the device of targets"
            )
    batch, queries = entries[0].shape[:2]
    shape = tuple(targets.shape)
    if targets.ndim not in (3, 4) or shape[0] != batch or min(shape[1:]) < 1:
        raise ValueError(
            f"targets has shape {shape}; expected labels ({batch}, height, width) or masks "
            f"({batch}, targets, height, width), not empty"
        )
    allowed = _LABEL_DTYPES if targets.ndim == 3 else _MASK_DTYPES
    if targets.dtype not in allowed:
        kind = "labels of an integer dtype" if targets.ndim == 3 else "masks, bool or floating"
        raise TypeError(f"targets has shape {shape} and dtype {targets.dtype}; expected {kind}")
    _checks.number("focal_alpha", focal_alpha, 0, 1)
    _checks.number("focal_gamma", focal_gamma, 0)
    if targets.ndim == 4:
        if num_classes not in (None, shape[1]):
            raise ValueError(f"num_classes is {num_classes}; expected {shape[1]}, the number of masks")
        if targets.is_floating_point() and _checks.can_read(targets) and batch:
            low, high = (x.item() for x in targets.aminmax())
            if not 0 <= low <= high <= 1:
                raise ValueError(f"targets holds masks from {low} to {high}; expected 0 to 1")
        return shape[1]
    classes = queries if num_classes is None else _checks.whole("num_classes", num_classes, 1)
    if ignore_index is not None:
        if 0 <= ignore_index < classes:
            raise ValueError(f"ignore_index is {ignore_index}; expected none of the {classes} classes")
        if _checks.can_read(targets):
            low, high = _extremes(targets, ignore_index)
            if low < 0 or high >= classes:
                expected = f"0 to {classes - 1} or {ignore_index}"
                raise ValueError(f"targets holds labels from {low} to {high}; expected {expected}")
    return classes


def _extremes(labels: Tensor, ignore_index: int) -> tuple[int, int]:
    """The least and the greatest label but ignore_index; 0 stands in for that."""
    # A comparison with a number that the dtype cannot hold wraps around.
    info = torch.iinfo(labels.dtype)
    if info.min <= ignore_index <= info.max:
        labels = torch.where(labels == ignore_index, 0, labels)
    return (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
