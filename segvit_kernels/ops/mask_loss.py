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
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit_kernels import _library
from segvit_kernels.ops._autograd import differentiable, first_derivative_only, full_precision, transformed
from segvit_kernels.ops._checks import flag, number, tensors, whole

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_KERNEL_DTYPES = _DTYPES[:3]
_LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MASK_DTYPES = (torch.bool, *_DTYPES)
# Below it no exp(x) overflows in float32.
_BOUND = 80


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
    single = isinstance(mask_logits, Tensor)
    terms = (term[0] if single else list(term) for term in zip(*losses, strict=True))
    return MaskLoss(*terms, counted, present)


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


def _can_read(x: Tensor) -> bool:
    """Whether values can be looked at without stalling a device or breaking a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _fwd_fake(
    mask_logits: list[Tensor], targets: Tensor, matches: Tensor | None, num_classes: int, *_: Any
) -> tuple[Tensor, Tensor]:
    first = mask_logits[0]
    (batch, queries), dtype = first.shape[:2], _accumulator(first)
    return (
        first.new_empty(len(mask_logits), batch, queries, 4, dtype=dtype),
        first.new_empty(batch, num_classes, dtype=dtype),
    )


def _bwd_fake(grad_sums: Tensor, mask_logits: list[Tensor], *_: Any) -> list[Tensor]:
    return [logits.new_empty(logits.shape) for logits in mask_logits]


def _matching_fake(
    mask_logits: Tensor, targets: Tensor, num_classes: int, focal_alpha: float, focal_gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, queries), dtype = mask_logits.shape[:2], _accumulator(mask_logits)
    return (
        mask_logits.new_empty(3, batch, queries, num_classes, dtype=dtype),
        mask_logits.new_empty(3, batch, queries, dtype=dtype),
        mask_logits.new_empty(batch, num_classes, dtype=dtype),
    )


def _interpolation(source: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix (size, source) of linear interpolation along one axis, align_corners=False."""
    options = {"dtype": torch.float64, "device": device}
    position = (torch.arange(size, **options) + 0.5) * (source / size) - 0.5
    distance = position.clamp(0, source - 1)[:, None] - torch.arange(source, **options)
    return (1 - distance.abs()).clamp(min=0).to(dtype)


def _cells(source: int, size: int, top: int, bottom: int) -> slice:
    """The columns of :func:`_interpolation` that rows top...bottom need."""
    first, last = (max(0.0, (y + 0.5) * source / size - 0.5) for y in (top, bottom - 1))
    return slice(min(int(first), source - 1), min(int(last) + 2, source))


def _codes_and_areas(targets: Tensor, num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Labels in a short type, ``num_classes`` where ignored, or the masks; and the areas (B, M)."""
    batch = targets.shape[0]
    areas = torch.empty(batch, num_classes, dtype=dtype, device=targets.device)
    if targets.ndim == 4:
        for image, area in zip(targets, areas, strict=True):
            torch.sum(image, (1, 2), dtype=dtype, out=area)
        return targets, areas
    short = torch.int16 if num_classes < 2**15 else torch.int32
    codes = torch.empty(targets.shape, dtype=short, device=targets.device)
    one = torch.ones((), dtype=torch.int32, device=targets.device)
    for image, code, area in zip(targets, codes, areas, strict=True):
        index = image.long().flatten()
        index = torch.where((index >= 0) & (index < num_classes), index, num_classes)
        code.view(-1).copy_(index)
        counts = torch.zeros(num_classes + 1, dtype=torch.int32, device=targets.device)
        area.copy_(counts.scatter_add_(0, index, one.expand(len(index)))[:-1])
    return codes, areas


class _Block(NamedTuple):
    """Some rows of some pairs of one entry. Maps are (pairs, rows, columns); x and scratch are for use."""

    entry: int
    images: Tensor
    queries: Tensor
    x: Tensor
    t: Tensor
    valid: Tensor | None
    scratch: tuple[Tensor, Tensor, Tensor]
    hard: bool  # every t is 0 or 1
    bounded: bool  # no exp(x) overflows
    cells: slice  # rows of the grid that x is made from: x = down @ grid[cells] @ across.T
    down: Tensor
    across: Tensor


def _blocks(
    mask_logits: Sequence[Tensor],
    targets: Tensor,
    matches: Tensor | None,
    areas: Tensor,
    codes: Tensor,
    mask_ignored: bool,
) -> Iterator[_Block]:
    """All active pairs, or all pairs where values cannot be read, in blocks that share their memory."""
    (height, width), dtype, device = targets.shape[-2:], areas.dtype, areas.device
    readable, labels = _can_read(areas), targets.ndim == 3
    present, _ = _active(matches, areas, labels, mask_logits[0].shape[1])
    index = torch.arange(present.numel(), device=device)
    if readable:
        index = index[present.flatten()]
    images, queries = index // present.shape[1], index % present.shape[1]
    pairs, rows = _block_shape(len(images), height, width, device)
    work = areas.new_empty(6, pairs, rows, width)
    sizes = {
        (n, size) for grid in mask_logits for n, size in zip(grid.shape[-2:], (height, width), strict=True)
    }
    matrices = {(n, size): _interpolation(n, size, dtype, device) for n, size in sizes}
    for start in range(0, len(images), pairs):
        b, q = images[start : start + pairs], queries[start : start + pairs]
        target = q if matches is None else matches[b, q]
        grids = [logits[b, q].to(dtype) for logits in mask_logits]
        bounded = [readable and bool(grid.abs().amax() < _BOUND) for grid in grids]
        grids = [grid @ matrices[grid.shape[2], width].T for grid in grids]
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            x, t, valid, *scratch = work[:, : len(b), : bottom - top]
            if labels:
                code = codes[b, top:bottom]
                torch.eq(code, target.to(code.dtype)[:, None, None], out=t)
                if mask_ignored:
                    torch.lt(code, areas.shape[1], out=valid)
                hard = True
            else:
                t.copy_(targets[b, target.clamp(0, areas.shape[1] - 1), top:bottom])
                hard = targets.dtype == torch.bool or (readable and torch.equal(t, t.round()))
            for entry, (grid, logits) in enumerate(zip(grids, mask_logits, strict=True)):
                cells = _cells(grid.shape[1], height, top, bottom)
                down = matrices[grid.shape[1], height][top:bottom, cells]
                torch.matmul(down, grid[:, cells], out=x)
                yield _Block(
                    entry,
                    b,
                    q,
                    x,
                    t,
                    valid if mask_ignored else None,
                    tuple(scratch),
                    hard,
                    bounded[entry],
                    cells,
                    down,
                    matrices[logits.shape[3], width],
                )


def _block_shape(pairs: int, height: int, width: int, device: torch.device) -> tuple[int, int]:
    """Pairs and rows of a block: a CPU's second-level cache holds it, or it fills a GPU."""
    pixels = 2**16 * max(2, torch.get_num_threads()) if device.type == "cpu" else 2**25
    return max(1, min(pairs, pixels // (height * width))), max(1, min(height, pixels // width))


def _logistic(z: Tensor, b: Tensor, q: Tensor, bounded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """softplus(z), σ(z) and σ(−z), in the memory of b, z and q."""
    if bounded:
        torch.log1p(z.exp_(), out=b)
        torch.add(z, 1, out=q).reciprocal_()
        return b, z.mul_(q), q
    torch.neg(z, out=q)
    torch.neg(F.logsigmoid(q), out=b)
    return b, z.sigmoid_(), q.sigmoid_()


def _fwd_eager(
    mask_logits: list[Tensor],
    targets: Tensor,
    matches: Tensor | None,
    num_classes: int,
    focal_alpha: float,
    focal_gamma: float,
    mask_ignored: bool,
) -> tuple[Tensor, Tensor]:
    codes, areas = _codes_and_areas(targets, num_classes, _accumulator(mask_logits[0]))
    sums = areas.new_zeros(len(mask_logits), *mask_logits[0].shape[:2], 4)
    slope = 2 * focal_alpha - 1  # α_t = 1 − α + slope·t
    for block in _blocks(mask_logits, targets, matches, areas, codes, mask_ignored):
        x, t, (b, q, work) = block.x, block.t, block.scratch
        if block.hard:
            # z = x outside and −x inside the target: then bce = softplus(z), m = σ(z).
            b, m, q = _logistic(x.addcmul_(x, t, value=-2), b, q, block.bounded)
            if block.valid is not None:
                b *= block.valid
                m *= block.valid
            bce, total, inside = _sum(b), _sum(m), _sum(t)
            wrong = _sum(torch.mul(m, t, out=work))
            b = b.mul_(m).mul_(m) if focal_gamma == 2 else b.mul_(m**focal_gamma)
            focal = (1 - focal_alpha) * _sum(b) + slope * _sum(b.mul_(t))
            terms = (focal, bce, inside - wrong, total + inside - 2 * wrong)
        else:
            bce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
            p, q = x.sigmoid(), (-x).sigmoid()
            m = p + t * (q - p)
            focal = (1 - focal_alpha + slope * t) * m**focal_gamma * bce
            terms = (_sum(focal), _sum(bce), _sum(p * t), _sum(p))
        sums[block.entry, block.images, block.queries] += torch.stack(terms, -1)
    if not _can_read(areas):
        present, _ = _active(matches, areas, targets.ndim == 3, sums.shape[2])
        sums = torch.where(present[..., None], sums, 0)
    return sums, areas


def _sum(x: Tensor) -> Tensor:
    return x.sum((1, 2))


def _bwd_eager(
    grad_sums: Tensor,
    mask_logits: list[Tensor],
    targets: Tensor,
    matches: Tensor | None,
    areas: Tensor,
    num_classes: int,
    focal_alpha: float,
    focal_gamma: float,
    mask_ignored: bool,
) -> list[Tensor]:
    codes, _ = _codes_and_areas(targets, num_classes, areas.dtype)
    gradients = [areas.new_zeros(logits.shape) for logits in mask_logits]
    need_focal, need_bce = (not _can_read(areas) or bool(grad_sums[..., i].any()) for i in range(2))
    slope = 2 * focal_alpha - 1
    for block in _blocks(mask_logits, targets, matches, areas, codes, mask_ignored):
        x, t, (b, q, work) = block.x, block.t, block.scratch
        g = grad_sums[block.entry, block.images, block.queries, :, None, None].unbind(1)
        tiny = torch.finfo(x.dtype).tiny
        if block.hard:
            # dx = m · [g₀ (1 − α − t) m^(γ−1) (m + γ (1 − m) bce) + (g₂ t + g₃) (1 − m) + g₁ (1 − 2t)]
            b, m, q = _logistic(x.addcmul_(x, t, value=-2), b, q, block.bounded)
            if need_focal:
                torch.add(m, b.mul_(q), alpha=focal_gamma, out=b)
                b *= m if focal_gamma == 2 else m.clamp(min=tiny) ** (focal_gamma - 1)
                b *= torch.mul(t, -g[0], out=work).add_((1 - focal_alpha) * g[0])
            dx = q.mul_(torch.mul(t, g[2], out=work).add_(g[3]))
            if need_focal:
                dx += b
            if need_bce:
                dx += torch.mul(t, -2 * g[1], out=work).add_(g[1])
            dx *= m
        else:
            bce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
            p, q = x.sigmoid(), (-x).sigmoid()
            m, error, both = p + t * (q - p), p - t, p * q
            # p (1 − p) ≤ m: written as a ratio, no power of m is negative.
            focal = focal_gamma * (1 - 2 * t) * (both / m.clamp(min=tiny)) * bce + error
            focal *= (1 - focal_alpha + slope * t) * m**focal_gamma
            dx = g[0] * focal + g[1] * error + (g[2] * t + g[3]) * both
        if block.valid is not None:
            dx *= block.valid
        gradients[block.entry][block.images, block.queries, block.cells] += block.down.T @ dx @ block.across
    if not _can_read(areas):
        present, _ = _active(matches, areas, targets.ndim == 3, grad_sums.shape[2])
        gradients = [torch.where(present[..., None, None], g, 0) for g in gradients]
    return [g.to(logits.dtype) for g, logits in zip(gradients, mask_logits, strict=True)]


def _matching_eager(
    mask_logits: Tensor, targets: Tensor, num_classes: int, focal_alpha: float, focal_gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, device, readable = _accumulator(mask_logits), targets.device, _can_read(targets)
    codes, areas = _codes_and_areas(targets, num_classes, dtype)
    (batch, queries, *source), (height, width) = mask_logits.shape, targets.shape[-2:]
    products = areas.new_zeros(3, batch, queries, num_classes)
    totals = areas.new_zeros(3, batch, queries)
    down, across = (
        _interpolation(n, size, dtype, device) for n, size in zip(source, (height, width), strict=True)
    )
    _, rows = _block_shape(1, height, width * queries, device)
    work = areas.new_empty(3, queries, rows, width)
    for b in range(batch):
        columns = torch.arange(num_classes, device=device)
        if readable:
            columns = columns[areas[b] > 0]
        grid = mask_logits[b].to(dtype)
        bounded = readable and bool(grid.abs().amax() < _BOUND)
        grid = grid @ across.T
        for top in range(0, height, rows):
            here = slice(top, min(top + rows, height))
            if targets.ndim == 3:
                t = (codes[b, here] == columns.to(codes.dtype)[:, None, None]).to(dtype)
            else:
                t = targets[b, columns, here].to(dtype)
            x, q, softplus = work[:3, :, : t.shape[1]]
            cells = _cells(source[0], height, here.start, here.stop)
            torch.matmul(down[here, cells], grid[:, cells], out=x)
            inverse = -x
            softplus, p, q = _logistic(x, softplus, q, bounded)
            negative = p**focal_gamma * softplus * (1 - focal_alpha)
            positive = q**focal_gamma * (softplus + inverse) * focal_alpha
            maps = torch.stack([positive - negative, inverse, p]).flatten(2)
            products[:, b][..., columns] += maps @ t.flatten(1).T
            totals[:, b] += torch.stack([_sum(negative), _sum(softplus), _sum(p)])
    return products, totals, areas


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
    eager=_fwd_eager,
    fake=_fwd_fake,
    macs=lambda *_: 0,
    refuse=lambda backend, mask_logits, *_: _kernels_refuse(backend, mask_logits[0]),
)

_mask_loss_bwd = _library.define(
    "mask_loss_bwd(Tensor grad_sums, Tensor[] mask_logits, Tensor targets, Tensor? matches, Tensor areas, "
    "int num_classes, float focal_alpha, float focal_gamma, bool mask_ignored) -> Tensor[]",
    eager=_bwd_eager,
    fake=_bwd_fake,
    macs=lambda *_: 0,
    refuse=lambda backend, grad_sums, mask_logits, *_: _kernels_refuse(backend, mask_logits[0]),
)

_mask_matching_sums = _library.define(
    "mask_matching_sums(Tensor mask_logits, Tensor targets, int num_classes, float focal_alpha, "
    "float focal_gamma) -> (Tensor products, Tensor totals, Tensor areas)",
    eager=_matching_eager,
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
    classes = _checked(
        entries, targets, matches, num_classes, ignore_index, focal_alpha, focal_gamma, mask_ignored,
        pair_weights, num_masks, reduction,
    )  # fmt: skip
    if transformed(backend):
        entries = full_precision(*entries)
        return mask_loss_reference(
            entries[0] if isinstance(mask_logits, Tensor) else entries,
            targets,
            matches=matches,
            num_classes=classes,
            focal_alpha=focal_alpha,
            focal_gamma=focal_gamma,
            mask_ignored=mask_ignored,
            pair_weights=pair_weights,
            num_masks=num_masks,
            reduction=reduction,
        )
    options = (targets, matches, classes, float(focal_alpha), float(focal_gamma), mask_ignored, backend)
    if differentiable(*entries):
        sums, areas = MaskLossFunction.apply(*options, *entries)
    else:
        sums, areas = _mask_loss_fwd(entries, *options)
    losses = _reduced(sums, areas, targets, matches, mask_ignored, pair_weights, num_masks, reduction)
    return _only(losses) if isinstance(mask_logits, Tensor) else losses


def _checked(
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
) -> int:
    """Refuse arguments of a loss that do not go together; the number of targets."""
    whole("ignore_index", ignore_index)
    classes = _validate(entries, targets, num_classes, focal_alpha, focal_gamma, ignore_index)
    queries = entries[0].shape[1]
    if matches is None and queries != classes:
        raise ValueError(f"{name} has {queries} queries; expected {classes}, one a target, or matches")
    if matches is not None:
        _expect_pairs("matches", matches, entries[0])
        if matches.dtype != torch.int64:
            raise TypeError(f"matches has dtype {matches.dtype}; expected torch.int64")
        if _can_read(matches) and not bool(((matches >= -1) & (matches < classes)).all()):
            low, high = matches.min().item(), matches.max().item()
            raise ValueError(f"matches holds {low} to {high}; expected -1 to {classes - 1}")
    if pair_weights is not None:
        _expect_pairs("pair_weights", pair_weights, entries[0])
    if num_masks is not None and not isinstance(num_masks, Tensor):
        number("num_masks", num_masks, 0)
    if flag("mask_ignored", mask_ignored) and targets.ndim == 4:
        raise ValueError("mask_ignored is True with masks; expected labels: masks have no ignored pixels")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")
    if differentiable(targets):
        raise ValueError("targets requires a gradient, which there is none of; expected targets.detach()")
    return classes


def _reduced(
    sums: Tensor,
    areas: Tensor,
    targets: Tensor,
    matches: Tensor | None,
    mask_ignored: bool,
    pair_weights: Tensor | None,
    num_masks: Tensor | float | None,
    reduction: str,
) -> MaskLoss:
    """The losses, lists of one a entry, from the sums (L, B, Q, 4) and the areas of the targets."""
    present, area = _active(matches, areas, targets.ndim == 3, sums.shape[2])
    pixels = (
        areas.sum(1, keepdim=True).clamp(min=1) if mask_ignored else targets.shape[-2] * targets.shape[-1]
    )
    focal, bce, overlap, total = sums.unbind(-1)  # [entries, B, Q]
    losses = torch.stack([focal / pixels, bce / pixels, 1 - (2 * overlap + 1) / (total + area + 1)])
    if pair_weights is not None:
        losses = losses * pair_weights.to(losses.dtype)
    losses = torch.where(present, losses, 0)
    counted = present.sum(dtype=losses.dtype)
    if reduction != "none":
        losses = losses.sum((2, 3))
    if reduction == "mean":
        divisor = counted if num_masks is None else num_masks
        losses = losses / (divisor.clamp(min=1) if isinstance(divisor, Tensor) else max(divisor, 1))
    return MaskLoss(*map(list, losses), counted, present)


def _only(losses: MaskLoss) -> MaskLoss:
    """Of lists of one loss the loss itself."""
    focal, bce, dice = (term[0] for term in losses[:3])
    return MaskLoss(focal, bce, dice, losses.num_masks, losses.present)


def _costs(products: Tensor, totals: Tensor, areas: Tensor, pixels: int) -> MatchingCost:
    focal, bce = (products[:2] + totals[:2, ..., None]) / pixels
    dice = 1 - (2 * products[2] + 1) / (totals[2][..., None] + areas[:, None] + 1)
    return MatchingCost(focal, bce, dice)


def _expect_pairs(name: str, tensor: Tensor, logits: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if tensor.shape != logits.shape[:2]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected {tuple(logits.shape[:2])}, batch and queries"
        )
    if tensor.device != logits.device:
        raise ValueError(f"{name} is on {tensor.device}; expected {logits.device}, the device of mask_logits")


def _validate(
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
        if logits.dtype not in _DTYPES:
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
    number("focal_alpha", focal_alpha, 0, 1)
    number("focal_gamma", focal_gamma, 0)
    if targets.ndim == 4:
        if num_classes not in (None, shape[1]):
            raise ValueError(f"num_classes is {num_classes}; expected {shape[1]}, the number of masks")
        if targets.is_floating_point() and _can_read(targets) and batch:
            low, high = (x.item() for x in targets.aminmax())
            if not 0 <= low <= high <= 1:
                raise ValueError(f"targets holds masks from {low} to {high}; expected 0 to 1")
        return shape[1]
    classes = queries if num_classes is None else whole("num_classes", num_classes, 1)
    if ignore_index is not None:
        if 0 <= ignore_index < classes:
            raise ValueError(f"ignore_index is {ignore_index}; expected none of the {classes} classes")
        if _can_read(targets):
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


def _active(matches: Tensor | None, areas: Tensor, by_area: bool, queries: int) -> tuple[Tensor, Tensor]:
    """Which pairs are active, and the area of each pair's target; (B, Q) both."""
    if matches is None:
        present, area = torch.ones_like(areas, dtype=torch.bool), areas
    else:
        inside = (matches >= 0) & (matches < areas.shape[1])
        present, area = inside, areas.gather(1, torch.where(inside, matches, 0))
    return (present & (area > 0) if by_area else present), area


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
        ``focal``, ``bce`` and ``dice``, each (B, Q, M) float32 (float64 for float64 logits).

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes or devices disagree, or a value is out of range.
        BackendUnavailableError: an explicitly chosen backend cannot run here.
    """
    if isinstance(targets, Tensor) and targets.ndim == 3 and num_classes is None:
        raise ValueError("num_classes is None with labels; expected their number")
    _library.check_backend(backend)
    classes = _validate([mask_logits], targets, num_classes, focal_alpha, focal_gamma, None)
    products, totals, areas = _mask_matching_sums(
        mask_logits.detach(), targets, classes, float(focal_alpha), float(focal_gamma), backend
    )
    return _costs(products, totals, areas, targets.shape[-2] * targets.shape[-1])
