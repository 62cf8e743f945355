"""Mask IoU: how much every mask of one set overlaps every mask of another, at a common size.

Of masks a_n and b_m, for every pair

    intersection[n, m] = Σ_pixels v(a_n) · v(b_m)
    union[n, m] = Σ_pixels v(a_n) + Σ_pixels v(b_m) − intersection[n, m]

where v of logits is 1 above a threshold and 0 elsewhere (hard), or σ (soft), after interpolation to the
common size as by ``F.interpolate(mode="bilinear", align_corners=False)``, and v of boolean masks is 1 or 0.
It is what matching, mask NMS and metrics ask for. Nothing of floating point is stored at the common size.

Logits that are not numbers count as −∞: no mask there; infinite ones as very large ones. No gradient:
:func:`~segvit_kernels.mask_loss` has the dice loss with one.

Refused: anything but (batch, masks, height, width) logits of a floating dtype or booleans, which have the
common size already; batches or devices that differ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit_kernels import _library
from segvit_kernels.ops._attention import unit_stride
from segvit_kernels.ops._checks import flag, number, size_pair
from segvit_kernels.ops._resize import finite, upsampled

_DTYPES = (torch.bool, torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MOST_PIXELS = 2**31 - 1
_LEAST_REFUSED = 2**31 - 2**16  # pairs or pixels; a last block of them reaches beyond
_BUDGET = 2**19  # elements of a block on the CPU: 2 MiB stay in the cache


@_library.exportable
class MaskIoU(NamedTuple):
    """``intersection`` and ``union``, both (B, N, M): int32 pixels if hard; float32 if soft (float64 where a
    mask is of float64)."""

    intersection: Tensor
    union: Tensor

    @property
    def iou(self) -> Tensor:
        """Intersection over union (B, N, M), 0 where both masks are empty; float32 or float64."""
        union = self.union if self.union.is_floating_point() else self.union.float()
        return torch.where(union > 0, self.intersection / union, 0.0)


def mask_iou_reference(
    a: Tensor, b: Tensor, *, size: tuple[int, int] | None = None, soft: bool = False, threshold: float = 0.0
) -> MaskIoU:
    """The meaning of :func:`mask_iou` in ordinary PyTorch, with every mask in memory at the common size."""
    common = tuple(a.shape[-2:]) if size is None else tuple(size)
    computed = torch.promote_types(*(torch.float32 if t.dtype == torch.bool else t.dtype for t in (a, b)))

    def values(masks: Tensor) -> Tensor:
        if masks.dtype == torch.bool:
            return masks.to(computed)
        logits = finite(masks.to(computed))
        if not logits.numel():
            return logits.new_zeros(*masks.shape[:2], *common)
        if common != tuple(masks.shape[-2:]):
            logits = F.interpolate(logits, size=common, mode="bilinear", align_corners=False)
        return logits.sigmoid() if soft else (logits > threshold).to(computed)

    first, second = values(a).flatten(2), values(b).flatten(2)
    intersection = first @ second.mT
    union = first.sum(2)[..., None] + second.sum(2)[:, None] - intersection
    return MaskIoU(*((x if soft else x.round().int()) for x in (intersection, union)))


def _blocks(masks: Tensor, height: int, width: int, rows: int, soft: bool, threshold: float) -> Any:
    """Values (N, pixels) of some rows at a time."""
    dtype = torch.float64 if masks.dtype == torch.float64 else torch.float32
    if masks.dtype != torch.bool:
        masks = finite(masks.to(dtype))
    for top in range(0, height, rows):
        own = slice(top, min(top + rows, height))
        block = masks[:, own] if masks.dtype == torch.bool else upsampled(masks, height, width, own)
        if masks.dtype != torch.bool:
            block = block.sigmoid() if soft else block > threshold
        yield block.to(dtype).flatten(1)


@torch.no_grad()
def _eager(
    a: Tensor, b: Tensor, height: int, width: int, soft: bool, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    results = _fake(a, b, height, width, soft, threshold)
    budget = _BUDGET if a.device.type == "cpu" else 2**24
    rows = max(1, budget // (max(1, a.shape[1], b.shape[1]) * width))
    given = (height, width, min(rows, max(1, 2**24 // width)), soft, threshold)  # counts that float32 holds
    for i in range(len(a)):
        totals = [result[i].zero_() for result in results]
        for first, second in zip(_blocks(a[i], *given), _blocks(b[i], *given), strict=True):
            computed = torch.promote_types(first.dtype, second.dtype)
            product = first.to(computed) @ second.to(computed).mT
            for total, part in zip(totals, (product, first.sum(1), second.sum(1)), strict=True):
                total += part.to(total.dtype)
    return results


def _fake(
    a: Tensor, b: Tensor, height: int, width: int, soft: bool, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    dtype = dtype if soft else torch.int32
    batch, first, second = a.shape[0], a.shape[1], b.shape[1]
    return (
        a.new_empty((batch, first, second), dtype=dtype),
        a.new_empty((batch, first), dtype=dtype),
        a.new_empty((batch, second), dtype=dtype),
    )


def _macs(a: tuple[int, ...], b: tuple[int, ...], height: int, width: int, *_: Any) -> int:
    """A product of every pair at every pixel."""
    return a[0] * a[1] * b[1] * height * width


def _kernels_refuse(backend: str, a: Tensor, b: Tensor, height: int, width: int, *_: Any) -> Exception | None:
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype == torch.float64:
            return TypeError(
                f"backend {backend!r} takes bool, float32, float16 and bfloat16; {name} is float64"
            )
    results = a.shape[1] * b.shape[1] + a.shape[1] + b.shape[1]
    if backend == "triton" and max(results, height * width) >= _LEAST_REFUSED:
        return ValueError(
            f"backend 'triton' counts pairs and pixels in 32 bits; got {a.shape[1]} by {b.shape[1]} masks of "
            f"{(height, width)}"
        )
    return None


_mask_iou = _library.define(
    "mask_iou(Tensor a, Tensor b, SymInt height, SymInt width, bool soft, float threshold) "
    "-> (Tensor intersection, Tensor area_a, Tensor area_b)",
    eager=_eager,
    fake=_fake,
    macs=_macs,
    refuse=_kernels_refuse,
)


def mask_iou(
    a: Tensor,
    b: Tensor,
    *,
    size: tuple[int, int] | None = None,
    soft: bool = False,
    threshold: float = 0.0,
    backend: str | None = None,
) -> MaskIoU:
    """Intersections and unions of every pair of masks at a common size.

    The formula, and what becomes of numbers that are none, stand at the top of this module. No gradient.

    Args:
        a: (B, N, h, w), logits of float32, float16, bfloat16 or float64 (eager only), or booleans.
        b: (B, M, h', w'), likewise.
        size: the common (H, W), which booleans have; by default that of ``a`` and of ``b``. If hard, 2³¹ − 1
            pixels at most.
        soft: σ of logits in place of whether they are above the threshold.
        threshold: above which a logit is in the mask, if hard; for probabilities in place of logits 0.5.
        backend: one of ``segvit_kernels.BACKENDS``; chosen by device unless given.

    Returns:
        ``intersection``, ``union`` and, computed from these, ``iou``.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes, devices or options disagree or are out of range.
        BackendUnavailableError: an explicitly chosen backend cannot run here.
    """
    _library.check_backend(backend)
    for name, tensor in (("a", a), ("b", b)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; expected bool, float32, float16, bfloat16 or float64"
            )
        if tensor.ndim != 4 or min(tensor.shape[2:]) < 1:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected (batch, masks, height, width)"
            )
    if len(b) != len(a) or b.device != a.device:
        raise ValueError(
            f"b is a batch of {len(b)} on {b.device}; expected {len(a)} on {a.device}, as a has images"
        )
    height, width = a.shape[2:] if size is None else size_pair("size", size)
    for name, tensor in (("a", a), ("b", b)):
        if (size is None or tensor.dtype == torch.bool) and tuple(tensor.shape[2:]) != (height, width):
            common = "the common size of booleans" if tensor.dtype == torch.bool else "that of a, or size="
            raise ValueError(
                f"{name} has masks of {tuple(tensor.shape[2:])}; expected {(height, width)}, {common}"
            )
    if not flag("soft", soft) and not torch.compiler.is_compiling() and height * width > _MOST_PIXELS:
        raise ValueError(
            f"the common size is {(height, width)}; expected at most 2³¹ − 1 pixels, whose counts are int32"
        )
    intersection, area_a, area_b = _mask_iou(
        unit_stride(a.detach()),
        unit_stride(b.detach()),
        height,
        width,
        soft,
        number("threshold", threshold),
        backend,
    )
    return MaskIoU(intersection, area_a[:, :, None] + area_b[:, None] - intersection)
