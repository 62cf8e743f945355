"""Mask loss in blocks of pairs and rows: what the eager backends of :mod:`segvit_kernels.ops.mask_loss` run.

Nothing of full resolution is kept; the formulas stand there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit_kernels.ops import _checks

# Below it no exp(x) overflows in float32.
_BOUND = 80


def accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _interpolation(source: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix (size, source) of linear interpolation along one axis, align_corners=False."""
    places = functools.partial(torch.arange, dtype=torch.float64, device=device)
    position = (places(size) + 0.5) * (source / size) - 0.5
    distance = position.clamp(0, source - 1)[:, None] - places(source)
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
    readable, labels = _checks.can_read(areas), targets.ndim == 3
    present, _ = active(matches, areas, labels, mask_logits[0].shape[1])
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


def forward(
    mask_logits: list[Tensor],
    targets: Tensor,
    matches: Tensor | None,
    num_classes: int,
    focal_alpha: float,
    focal_gamma: float,
    mask_ignored: bool,
) -> tuple[Tensor, Tensor]:
    codes, areas = _codes_and_areas(targets, num_classes, accumulator(mask_logits[0]))
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
    if not _checks.can_read(areas):
        present, _ = active(matches, areas, targets.ndim == 3, sums.shape[2])
        sums = torch.where(present[..., None], sums, 0)
    return sums, areas


def _sum(x: Tensor) -> Tensor:
    return x.sum((1, 2))


def backward(
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
    need_focal, need_bce = (not _checks.can_read(areas) or bool(grad_sums[..., i].any()) for i in range(2))
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
    if not _checks.can_read(areas):
        present, _ = active(matches, areas, targets.ndim == 3, grad_sums.shape[2])
        gradients = [torch.where(present[..., None, None], g, 0) for g in gradients]
    return [g.to(logits.dtype) for g, logits in zip(gradients, mask_logits, strict=True)]


def matching(
    mask_logits: Tensor, targets: Tensor, num_classes: int, focal_alpha: float, focal_gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, device, readable = accumulator(mask_logits), targets.device, _checks.can_read(targets)
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


def active(matches: Tensor | None, areas: Tensor, by_area: bool, queries: int) -> tuple[Tensor, Tensor]:
    """Which pairs are active, and the area of each pair's target; (B, Q) both."""
    if matches is None:
        present, area = torch.ones_like(areas, dtype=torch.bool), areas
    else:
        inside = (matches >= 0) & (matches < areas.shape[1])
        present, area = inside, areas.gather(1, torch.where(inside, matches, 0))
    return (present & (area > 0) if by_area else present), area
