"""Mask loss: focal, BCE and dice of low-resolution mask logits against full-resolution targets.

A (image, query) pair is supervised by at most one target. With x its logits upsampled bilinearly
(align_corners=False) to the targets' size, t in [0, 1] its target, p = σ(x) and m = 1 − p_t = p + t − 2pt:

    bce = softplus(x) − x·t      focal = α_t m^γ bce,  α_t = α·t + (1 − α)(1 − t)
    dice = 1 − (2 Σ p t + 1) / (Σ p + Σ t + 1)

(focal loss: Lin et al., ICCV 2017, equation 5; SegViT, NeurIPS 2022, section 3.2, equation 5.)

Targets are *labels* (B, H, W), integers, where target c is ``labels == c``, or *masks* (B, M, H, W), bool
or floating. Pairs without a target, or whose class has no pixel in the image, are inactive: they cost nothing
and get a zero gradient. Which ones they are is found on the device.

The forward operator gives four sums over the pixels of every pair, in float32 (float64 for float64 logits);
losses are a few operations on them. Nothing of full resolution is kept: the backward has logits, targets and
the targets' areas, and forms x again. With the gradients g of the four sums, per pixel

    dx = g₀ focal' + g₁ (p − t) + (g₂ t + g₃) p (1 − p)
    focal' = α_t [γ m^(γ−1) (1 − 2t) p (1 − p) bce + m^γ (p − t)]

and the gradient of the logits is the adjoint of the upsampling, applied to dx.

:func:`mask_matching_cost` gives the same losses between every query and every target, linear in t as matchers
use them. With f⁺ = α (1 − p)^γ softplus(−x) and f⁻ = (1 − α) p^γ softplus(x),

    Σ [t f⁺ + (1 − t) f⁻] = Σ t (f⁺ − f⁻) + Σ f⁻,

so that everything is one product of (queries × pixels) and (pixels × targets) for each of the three terms.

Refused: anything but 4-D logits of one floating dtype and one device, with targets of the same batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit_kernels import _library
from segvit_kernels.ops import _mask_loss_eager
from segvit_kernels.ops._autograd import differentiable, first_derivative_only, full_precision, transformed
from segvit_kernels.ops._checks import tensors
from segvit_kernels.ops._mask_loss_checks import DTYPES, Arguments, checked, validate
from segvit_kernels.ops._mask_loss_eager import accumulator, active

_KERNEL_DTYPES = DTYPES[:3]


@_library.exportable
class MaskLoss(NamedTuple):
    """``focal``, ``bce`` and ``dice`` (one tensor, or a list for a list of logits), scalar or (B, Q).

    ``num_masks`` is the counted number of active pairs, a scalar tensor; ``present`` (B, Q) says which.
    """

    focal: Tensor | list[Tensor]
    bce: Tensor | list[Tensor]
    dice: Tensor | list[Tensor]
    num_masks: Tensor
    present: Tensor


@_library.exportable
class MatchingCost(NamedTuple):
    """``focal``, ``bce`` and ``dice``, each (B, Q, M)."""

    focal: Tensor
    bce: Tensor
    dice: Tensor


def _one_hot(targets: Tensor, num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All targets (B, M, H, W) and which pixels are valid (B, 1, H, W)."""
    if targets.ndim == 4:
        return targets.to(dtype), torch.ones_like(targets[:, :1], dtype=dtype)
    labels = targets.long()[:, None]
    classes = torch.arange(num_classes, device=labels.device)[:, None, None]
    return (labels == classes).to(dtype), ((labels >= 0) & (labels < num_classes)).to(dtype)


def _upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def mask_loss_reference(
    mask_logits: Tensor | Sequence[Tensor],
    targets: Tensor,
    *,
    matches: Tensor | None = None,
    num_classes: int | None = None,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
    mask_ignored: bool = False,
    pair_weights: Tensor | None = None,
    num_masks: Tensor | float | None = None,
    reduction: str = "mean",
) -> MaskLoss:
    """The meaning of :func:`mask_loss` in ordinary PyTorch, with every map at full resolution in memory.

    Computed in the dtype of the logits; arguments as in :func:`mask_loss`, not validated.
    """
    entries = [mask_logits] if isinstance(mask_logits, Tensor) else list(mask_logits)
    batch, queries = entries[0].shape[:2]
    every, valid = _one_hot(targets, num_classes or queries, entries[0].dtype)
    if matches is None:
        matches = torch.arange(queries, device=targets.device).expand(batch, -1)
    t = every.take_along_dim(matches.clamp(min=0)[:, :, None, None], 1)  # (B, Q, H, W)
    present = matches >= 0
    if targets.ndim == 3:
        present = present & t.bool().any(3).any(2)
    if not mask_ignored:
        valid = torch.ones_like(valid)
    weights = present.to(t.dtype) if pair_weights is None else present * pair_weights.to(t.dtype)
    counted = present.sum().to(t.dtype)
    divisor = counted if num_masks is None else torch.as_tensor(num_masks, dtype=t.dtype)
    losses = []
    for logits in entries:
        x = _upsample(logits, targets.shape[-2:])
        p, q = x.sigmoid(), (-x).sigmoid()
        bce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
        alpha = focal_alpha * t + (1 - focal_alpha) * (1 - t)
        focal = alpha * (p * (1 - t) + q * t) ** focal_gamma * bce
        n = valid.sum((2, 3)).clamp(min=1)
        dice = 1 - (2 * (valid * p * t).sum((2, 3)) + 1) / ((valid * p).sum((2, 3)) + t.sum((2, 3)) + 1)
        terms = [
            weights * term for term in ((focal * valid).sum((2, 3)) / n, (bce * valid).sum((2, 3)) / n, dice)
        ]
        if reduction != "none":
            terms = [term.sum() for term in terms]
        if reduction == "mean":
            terms = [term / divisor.clamp(min=1) for term in terms]
        losses.append(terms)
    focals, bces, dices = map(list, zip(*losses, strict=True))
    result = MaskLoss(focals, bces, dices, counted, present)
    return _only(result) if isinstance(mask_logits, Tensor) else result


def mask_matching_cost_reference(
    mask_logits: Tensor,
    targets: Tensor,
    *,
    num_classes: int | None = None,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
) -> MatchingCost:
    """The meaning of :func:`mask_matching_cost` in ordinary PyTorch, with (B, Q, M, H, W) in memory."""
    t = _one_hot(targets, num_classes or 0, mask_logits.dtype)[0][:, None]
    x = _upsample(mask_logits, targets.shape[-2:])[:, :, None]
    p, inside, outside = x.sigmoid(), -F.logsigmoid(x), -F.logsigmoid(-x)  # F.softplus is linear above 20
    positive = focal_alpha * (-x).sigmoid() ** focal_gamma * inside
    negative = (1 - focal_alpha) * p**focal_gamma * outside
    focal = (t * positive + (1 - t) * negative).mean((3, 4))
    bce = (t * inside + (1 - t) * outside).mean((3, 4))
    dice = 1 - (2 * (p * t).sum((3, 4)) + 1) / (p.sum((3, 4)) + t.sum((3, 4)) + 1)
    return MatchingCost(focal, bce, dice)


def _fwd_fake(
    mask_logits: list[Tensor], targets: Tensor, matches: Tensor | None, num_classes: int, *_: Any
) -> tuple[Tensor, Tensor]:
    first = mask_logits[0]
    (batch, queries), dtype = first.shape[:2], accumulator(first)
    return (
        first.new_empty(len(mask_logits), batch, queries, 4, dtype=dtype),
        first.new_empty(batch, num_classes, dtype=dtype),
    )


def _bwd_fake(grad_sums: Tensor, mask_logits: list[Tensor], *_: Any) -> list[Tensor]:
    return [logits.new_empty(logits.shape) for logits in mask_logits]


def _matching_fake(
    mask_logits: Tensor, targets: Tensor, num_classes: int, focal_alpha: float, focal_gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, queries), dtype = mask_logits.shape[:2], accumulator(mask_logits)
    return (
        mask_logits.new_empty(3, batch, queries, num_classes, dtype=dtype),
        mask_logits.new_empty(3, batch, queries, dtype=dtype),
        mask_logits.new_empty(batch, num_classes, dtype=dtype),
    )


def _matching_macs(mask_logits: tuple[int, ...], targets: tuple[int, ...], num_classes: int, *_: Any) -> int:
    return 3 * math.prod(mask_logits[:2]) * num_classes * math.prod(targets[-2:])


def _kernels_refuse(backend: str, logits: Tensor) -> Exception | None:
    if logits.dtype not in _KERNEL_DTYPES:
        return TypeError(
            f"backend {backend!r} takes float32, float16 and bfloat16; mask_logits is {logits.dtype}"
        )
    return None


_mask_loss_fwd = _library.define(
    "mask_loss_fwd(Tensor[] mask_logits, Tensor targets, Tensor? matches, int num_classes, "
    "float focal_alpha, float focal_gamma, bool mask_ignored) -> (Tensor sums, Tensor areas)",
    eager=_mask_loss_eager.forward,
    fake=_fwd_fake,
    macs=lambda *_: 0,
    refuse=lambda backend, mask_logits, *_: _kernels_refuse(backend, mask_logits[0]),
)

_mask_loss_bwd = _library.define(
    "mask_loss_bwd(Tensor grad_sums, Tensor[] mask_logits, Tensor targets, Tensor? matches, Tensor areas, "
    "int num_classes, float focal_alpha, float focal_gamma, bool mask_ignored) -> Tensor[]",
    eager=_mask_loss_eager.backward,
    fake=_bwd_fake,
    macs=lambda *_: 0,
    refuse=lambda backend, grad_sums, mask_logits, *_: _kernels_refuse(backend, mask_logits[0]),
)

_mask_matching_sums = _library.define(
    "mask_matching_sums(Tensor mask_logits, Tensor targets, int num_classes, float focal_alpha, "
    "float focal_gamma) -> (Tensor products, Tensor totals, Tensor areas)",
    eager=_mask_loss_eager.matching,
    fake=_matching_fake,
    macs=_matching_macs,
    refuse=lambda backend, mask_logits, *_: _kernels_refuse(backend, mask_logits),
)


class MaskLossFunction(torch.autograd.Function):
    """``segvit::mask_loss_fwd`` with ``segvit::mask_loss_bwd`` as its derivative in the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        targets: Tensor,
        matches: Tensor | None,
        num_classes: int,
        focal_alpha: float,
        focal_gamma: float,
        mask_ignored: bool,
        backend: str | None,
        *mask_logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.options = (num_classes, focal_alpha, focal_gamma, mask_ignored, backend)
        sums, areas = _mask_loss_fwd(mask_logits, targets, matches, *ctx.options)
        ctx.save_for_backward(targets, matches, areas, *mask_logits)
        ctx.mark_non_differentiable(areas)
        return sums, areas

    @staticmethod
    @first_derivative_only("mask_loss", "mask_loss_reference")
    def backward(ctx: Any, grad_sums: Tensor, _: Tensor) -> tuple:
        targets, matches, areas, *mask_logits = ctx.saved_tensors
        gradients = _mask_loss_bwd(grad_sums, mask_logits, targets, matches, areas, *ctx.options)
        return (None,) * 7 + tuple(gradients)


def mask_loss(
    mask_logits: Tensor | Sequence[Tensor],
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
    backend: str | None = None,
) -> MaskLoss:
    """Focal, BCE and dice loss of upsampled mask logits, with nothing of full resolution in memory.

    SegViT (NeurIPS 2022), section 3.2, equation 5; the formulas, the gradient included, stand at the top of
    this module. A *pair* is an image and a query; it is *active* if the query has a target and, with labels,
    the target's class has a pixel in the image. Losses of a pair are focal and bce, means over the image's
    pixels, and dice.

    Args:
        mask_logits: (B, Q, h, w), float32, float16, bfloat16 or float64 (eager only), before the sigmoid; or
            a list of such, whose grids may differ (deep supervision), for one loss per entry at the price of
            one launch.
        targets: labels (B, H, W), uint8, int8, int16, int32 or int64; or masks (B, M, H, W), bool or floating
            in [0, 1].
        matches: (B, Q) int64, which target each query has, -1 for none. By default query i has target i.
        num_classes: number of classes of the labels; Q unless given. Not for masks.
        ignore_index: label of pixels that belong to no class; they are background of every class. Other
            labels out of [0, num_classes) raise on the CPU, and are ignored where looking would stall a
            device or break a graph.
        focal_alpha, focal_gamma: α from 0 to 1 and γ ≥ 0.
        mask_ignored: leave ignored pixels out of all sums, and out of the means' divisor (at least 1).
        pair_weights: (B, Q), factors of the pairs' losses.
        num_masks: what "mean" divides by instead of the number of active pairs, at least 1: under data
            parallelism, their mean over the processes.
        reduction: "mean", the sum over active pairs divided by their number; "sum"; or "none", (B, Q) with 0
            for inactive pairs.
        backend: one of ``segvit_kernels.BACKENDS``; chosen by device unless given.

    Returns:
        ``focal``, ``bce`` and ``dice``, lists if ``mask_logits`` is one; ``num_masks``, the counted number of
        active pairs; ``present`` (B, Q), which they are. float32 (float64 for float64 logits), differentiable
        in ``mask_logits`` and ``pair_weights``.

    Raises:
        TypeError: a dtype is not supported, or the dtypes of the logits differ.
        ValueError: shapes or devices disagree, or a value is out of range.
        BackendUnavailableError: an explicitly chosen backend cannot run here.
    """
    entries = tensors("mask_logits", mask_logits)
    given = checked(
        entries, targets, matches, num_classes, ignore_index, focal_alpha, focal_gamma, mask_ignored,
        pair_weights, num_masks, reduction,
    )  # fmt: skip
    if transformed(backend):
        losses = mask_loss_reference(full_precision(*entries), **given._asdict())
    else:
        if differentiable(*entries):
            sums, areas = MaskLossFunction.apply(*given[:6], backend, *entries)
        else:
            sums, areas = _mask_loss_fwd(entries, *given[:6], backend)
        losses = _reduced(sums, areas, given)
    return _only(losses) if isinstance(mask_logits, Tensor) else losses


def _reduced(sums: Tensor, areas: Tensor, given: Arguments) -> MaskLoss:
    """The losses, lists of one a entry, from the sums (L, B, Q, 4) and the areas of the targets."""
    height, width = given.targets.shape[-2:]
    present, area = active(given.matches, areas, given.targets.ndim == 3, sums.shape[2])
    pixels = areas.sum(1, keepdim=True).clamp(min=1) if given.mask_ignored else height * width
    focal, bce, overlap, total = sums.unbind(-1)  # [entries, B, Q]
    losses = torch.stack([focal / pixels, bce / pixels, 1 - (2 * overlap + 1) / (total + area + 1)])
    if given.pair_weights is not None:
        losses = losses * given.pair_weights.to(losses.dtype)
    losses = torch.where(present, losses, 0)
    counted = present.sum(dtype=losses.dtype)
    if given.reduction != "none":
        losses = losses.sum((2, 3))
    if given.reduction == "mean":
        divisor = counted if given.num_masks is None else given.num_masks
        losses = losses / (divisor.clamp(min=1) if isinstance(divisor, Tensor) else max(divisor, 1))
    return MaskLoss(list(losses[0]), list(losses[1]), list(losses[2]), counted, present)


def _only(losses: MaskLoss) -> MaskLoss:
    """Of lists of one loss the loss itself."""
    focal, bce, dice = (term[0] for term in losses[:3])
    return MaskLoss(focal, bce, dice, losses.num_masks, losses.present)


def _costs(products: Tensor, totals: Tensor, areas: Tensor, pixels: int) -> MatchingCost:
    focal, bce = (products[:2] + totals[:2, ..., None]) / pixels
    dice = 1 - (2 * products[2] + 1) / (totals[2][..., None] + areas[:, None] + 1)
    return MatchingCost(focal, bce, dice)


def mask_matching_cost(
    mask_logits: Tensor,
    targets: Tensor,
    *,
    num_classes: int | None = None,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
    backend: str | None = None,
) -> MatchingCost:
    """Focal, BCE and dice cost between every query and every target, as Hungarian matching needs it.

    Linear in the targets; the formulas stand at the top of this module. No gradient. Nothing of full
    resolution is in memory.

    Args:
        mask_logits: (B, Q, h, w), before the sigmoid, as in :func:`mask_loss`.
        targets: labels (B, H, W) or masks (B, M, H, W), as in :func:`mask_loss`. Labels out of
            [0, num_classes) belong to no target.
        num_classes: number of classes M of the labels, required there. Not for masks.
        focal_alpha, focal_gamma: α from 0 to 1 and γ ≥ 0.
        backend: one of ``segvit_kernels.BACKENDS``; chosen by device unless given.

    Returns:
        ``focal``, ``bce`` and ``dice``, each (B, Q, M) float32 (float64 for float64 logits). On
            Triton they are finite for logits within ±65504 only.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes or devices disagree, or a value is out of range.
        BackendUnavailableError: an explicitly chosen backend cannot run here.
    """
    if isinstance(targets, Tensor) and targets.ndim == 3 and num_classes is None:
        raise ValueError("num_classes is None with labels; expected their number")
    _library.check_backend(backend)
    classes = validate([mask_logits], targets, num_classes, focal_alpha, focal_gamma, None)
    products, totals, areas = _mask_matching_sums(
        mask_logits.detach(), targets, classes, float(focal_alpha), float(focal_gamma), backend
    )
    return _costs(products, totals, areas, targets.shape[-2] * targets.shape[-1])
