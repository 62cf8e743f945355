"""Panoptic argmax: which query has a pixel, and the areas by which queries are kept, in one pass.

Of masks M_q on a small grid and a score s_q for each query, for every output pixel:

    x_q(y, x) = σ(bilinear(M_q)(y, x))
    query(y, x) = argmax_q s_q · x_q(y, x), the lower query of equal ones

(panoptic inference of MaskFormer, NeurIPS 2021, section 3.4). And for every query, of all pixels: how many it
has (``won``), where its own mask is at least a threshold (``above``), and both (``kept``). Interpolation is
that of ``F.interpolate(mode="bilinear", align_corners=False)``. Nothing of size Q is stored at full
resolution.

Libraries differ in the order of interpolation and σ, and labels follow it. All orders are

    x = a₂(bilinear(a₁(crop(bilinear(M, resized))), size))

with σ for a₂ (``activation="sigmoid"``) or for a₁ (``"sigmoid_first"``), the other doing nothing, or with
neither (``"none"``). transformers takes MaskFormer and OneFormer with σ at the resolution of the masks,
Mask2Former with σ at 384 × 384, EoMT with logits interpolated to the size of its input, cropped, and again, σ
last.

A query whose score is negative or not a number takes no part: it wins nothing, and its areas are 0. Mask
logits that are not a number count as −∞: no mask there; infinite ones as very large ones, scores above 10⁸ as
10⁸. So whatever the inputs are, every backend gives the same.

The merge rule on top (:func:`panoptic_segments`): a query is a segment if the pixels that it won are more
than a share of its mask, the segment is the pixels of its mask that it won, and segments of one stuff class
are one.

Refused: anything but 4-D masks of a floating dtype, (batch, queries) scores, one device. Not differentiable.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit_kernels import _library
from segvit_kernels.ops._attention import unit_stride
from segvit_kernels.ops._checks import flag, number, size_pair, whole
from segvit_kernels.ops._resize import finite, upsampled

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ACTIVATIONS = ("sigmoid", "sigmoid_first", "none")
MOST_QUERIES = 2**14
_LARGEST_SCORE = 1e8  # of which no product with a mask is infinite
_BUDGET = 2**19  # elements of a block on the CPU: 2 MiB stay in the cache


@_library.exportable
class PanopticArgmax(NamedTuple):
    """What :func:`panoptic_argmax` gives.

    ``queries`` (B, H, W) int16, the query of every pixel, −1 where none takes part; ``inside`` (B, H, W)
    bool, whether its mask is at least the threshold there; ``won``, ``above``, ``kept`` (B, Q) int32, for
    every query the pixels that it has, those where its mask is at least the threshold, and those with both.
    """

    queries: Tensor
    inside: Tensor
    won: Tensor
    above: Tensor
    kept: Tensor


@_library.exportable
class PanopticSegments(NamedTuple):
    """``segmentation`` (B, H, W) int32, the segment of every pixel from 1 on, 0 where there is none, and
    ``ids`` (B, Q) int32, the segment that every query became part of, 0 for none."""

    segmentation: Tensor
    ids: Tensor


def panoptic_argmax_reference(
    mask_logits: Tensor,
    scores: Tensor,
    size: tuple[int, int],
    *,
    resized: tuple[int, int] | None = None,
    crop: tuple[int, int] | None = None,
    activation: str = "sigmoid",
    threshold: float = 0.5,
    weighted: bool = False,
) -> tuple[PanopticArgmax, Tensor]:
    """The meaning of :func:`panoptic_argmax` in ordinary PyTorch, with every mask in memory at full size.

    Returns:
        what :func:`panoptic_argmax` gives, and the products (B, Q, H, W) of scores and masks, −∞ for queries
        that take no part.
    """
    masks = finite(mask_logits)
    if resized is not None:
        masks = F.interpolate(masks, size=tuple(resized), mode="bilinear", align_corners=False)
    if crop is not None:
        masks = masks[..., : crop[0], : crop[1]]
    if activation == "sigmoid_first":
        masks = masks.sigmoid()
    masks = F.interpolate(masks, size=tuple(size), mode="bilinear", align_corners=False)
    if activation == "sigmoid":
        masks = masks.sigmoid()
    scores = scores.to(masks.dtype)[:, :, None, None].clamp(max=_LARGEST_SCORE)
    parts = scores >= 0
    products = torch.where(parts, masks * scores, -torch.inf)
    above = ((products if weighted else masks) >= threshold) & parts
    best = products.amax(1, keepdim=True)
    rank = torch.arange(masks.shape[1], device=masks.device)[:, None, None]
    winner = torch.where((products == best) & parts, rank, masks.shape[1]).amin(1)
    queries = torch.where(winner < masks.shape[1], winner, -1)
    won = queries[:, None] == rank
    result = PanopticArgmax(
        queries.to(torch.int16),
        (won & above).any(1),
        *(hits.sum((2, 3), dtype=torch.int32) for hits in (won, above, won & above)),
    )
    return result, products


@torch.no_grad()
def _eager(
    mask_logits: Tensor,
    scores: Tensor,
    height: int,
    width: int,
    resized_height: int,
    resized_width: int,
    crop_height: int,
    crop_width: int,
    first: bool,
    last: bool,
    threshold: float,
    weighted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count = scores.shape
    dtype = torch.float64 if mask_logits.dtype == torch.float64 else torch.float32
    device, cpu = scores.device, scores.device.type == "cpu"
    queries = torch.full((batch, height, width), -1, dtype=torch.int16, device=device)
    inside = torch.zeros_like(queries, dtype=torch.bool)
    areas = torch.zeros(batch, 3, count, dtype=torch.int32, device=device)
    for b in range(batch):
        index = torch.arange(count, device=device)
        if cpu:  # elsewhere this would wait for the device
            index = index[scores[b] >= 0]
            if not len(index):
                continue
        score = scores[b, index].to(dtype).clamp_(max=_LARGEST_SCORE)
        parts = score >= 0
        masks = finite(mask_logits[b, index].to(dtype))
        masks = upsampled(masks, resized_height, resized_width)[:, :crop_height, :crop_width]
        if first:
            masks = masks.sigmoid()
        rank = torch.arange(len(index), 0, -1, dtype=dtype, device=device)[:, None, None]
        rows = max(1, (_BUDGET if cpu else 2**26) // (len(index) * width))
        for top in range(0, height, rows):
            own = slice(top, top + rows)
            block = upsampled(masks, height, width, own)
            if last:
                block = block.sigmoid()
            product = block * score[:, None, None]
            above = (product if weighted else block).ge(threshold) & parts[:, None, None]
            product.masked_fill_(~parts[:, None, None], -torch.inf)
            best = product.amax(0)
            taken = (product.ge_(best) * rank).amax(0)  # the lowest query has the highest rank
            winner = (len(index) - taken).long().clamp_(max=len(index) - 1)
            here = above.gather(0, winner[None])[0]
            parting = best > -torch.inf
            queries[b, own] = torch.where(parting, index[winner], -1).to(torch.int16)
            inside[b, own] = here & parting
            areas[b, 1].index_add_(0, index, above.sum((1, 2), dtype=torch.int32))
            for row, weight in ((0, parting), (2, here & parting)):
                areas[b, row].index_add_(0, index[winner].flatten(), weight.flatten().int())
    return queries, inside, areas


def _fake(
    mask_logits: Tensor, scores: Tensor, height: int, width: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (scores.shape[0], height, width)
    return (
        scores.new_empty(shape, dtype=torch.int16),
        scores.new_empty(shape, dtype=torch.bool),
        scores.new_empty((scores.shape[0], 3, scores.shape[1]), dtype=torch.int32),
    )


def _macs(mask_logits: Any, scores: tuple[int, ...], height: int, width: int, *_: Any) -> int:
    """Score times mask of every query at every output pixel."""
    return scores[0] * scores[1] * height * width


def _kernels_refuse(backend: str, mask_logits: Tensor, scores: Tensor, *_: Any) -> Exception | None:
    for name, tensor in (("mask_logits", mask_logits), ("scores", scores)):
        if tensor.dtype == torch.float64:
            return TypeError(f"backend {backend!r} takes float32, float16 and bfloat16; {name} is float64")
    return None


_panoptic_argmax = _library.define(
    "panoptic_argmax(Tensor mask_logits, Tensor scores, SymInt height, SymInt width, SymInt resized_height, "
    "SymInt resized_width, SymInt crop_height, SymInt crop_width, bool first, bool last, float threshold, "
    "bool weighted) -> (Tensor queries, Tensor inside, Tensor areas)",
    eager=_eager,
    fake=_fake,
    macs=_macs,
    refuse=_kernels_refuse,
)


def panoptic_argmax(
    mask_logits: Tensor,
    scores: Tensor,
    size: tuple[int, int],
    *,
    resized: tuple[int, int] | None = None,
    crop: tuple[int, int] | None = None,
    activation: str = "sigmoid",
    threshold: float = 0.5,
    weighted: bool = False,
    backend: str | None = None,
) -> PanopticArgmax:
    """The query of every pixel and the areas of every query: upsampling, σ, argmax and counts in one pass.

    The formula, and what becomes of numbers that are none, stand at the top of this module. Not
    differentiable.

    Args:
        mask_logits: (B, Q, h, w), float32, float16, bfloat16 or float64 (eager only); Q at most 16384.
        scores: (B, Q) of any of these dtypes; a query with a negative one takes no part.
        size: (H, W) of the output.
        resized: the size to which the masks are interpolated first; without it they stay as they are.
        crop: the (height, width) at the upper left of the resized masks that becomes the output, all by
            default.
        activation: "sigmoid" after all interpolation; "sigmoid_first" at ``resized``, whose probabilities are
            then interpolated; "none" for masks that are probabilities already.
        threshold: from which value on a pixel belongs to a mask.
        weighted: compare score × mask with the threshold, in place of the mask.
        backend: one of ``segvit_kernels.BACKENDS``; chosen by device unless given.

    Returns:
        the query of every pixel and whether the pixel is in its mask, and the areas of every query.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes, devices or options disagree or are out of range.
        BackendUnavailableError: an explicitly chosen backend cannot run here.
    """
    _library.check_backend(backend)
    _validate(mask_logits, scores)
    height, width = size_pair("size", size)
    resized_height, resized_width = (
        mask_logits.shape[2:] if resized is None else size_pair("resized", resized)
    )
    crop_height, crop_width = (resized_height, resized_width) if crop is None else size_pair("crop", crop)
    if crop_height > resized_height or crop_width > resized_width:
        raise ValueError(
            f"crop is {(crop_height, crop_width)}; expected at most {(resized_height, resized_width)}, the "
            "size of the resized masks"
        )
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(_ACTIVATIONS)}")
    queries, inside, areas = _panoptic_argmax(
        unit_stride(mask_logits.detach()),
        unit_stride(scores.detach()),
        height,
        width,
        resized_height,
        resized_width,
        crop_height,
        crop_width,
        activation == "sigmoid_first",
        activation == "sigmoid",
        number("threshold", threshold),
        flag("weighted", weighted),
        backend,
    )
    return PanopticArgmax(queries, inside, *areas.unbind(1))


def _validate(mask_logits: Any, scores: Any) -> None:
    for name, tensor in (("mask_logits", mask_logits), ("scores", scores)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; expected float32, float16, bfloat16 or float64"
            )
    shape = tuple(mask_logits.shape)
    if mask_logits.ndim != 4 or min(shape[1:]) < 1 or shape[1] > MOST_QUERIES:
        raise ValueError(
            f"mask_logits has shape {shape}; expected (batch, queries, height, width), 1 to {MOST_QUERIES} "
            "queries"
        )
    if tuple(scores.shape) != shape[:2]:
        raise ValueError(
            f"scores has shape {tuple(scores.shape)}; expected {shape[:2]}, as mask_logits has images and "
            "queries"
        )
    if mask_logits.device != scores.device:
        raise ValueError(
            f"scores is on {scores.device}; expected {mask_logits.device}, the device of mask_logits"
        )


def panoptic_segments(
    result: PanopticArgmax, labels: Tensor, *, overlap: float = 0.8, stuff: Collection[int] = ()
) -> PanopticSegments:
    """The merge rule of MaskFormer's panoptic inference, on the device of ``result``, which is not waited
    for.

    A query is kept if it has pixels inside its mask and ``won / above > overlap``. Its segment is the pixels
    inside its mask that it won. Segments are numbered from 1 in the order of the queries; queries of one
    class in ``stuff`` become one segment, that of the first.

    Args:
        result: of :func:`panoptic_argmax`.
        labels: (B, Q), the class of every query, of a whole dtype.
        overlap: the share of a mask that a query must have won, and not only reach, 0 to 1.
        stuff: classes whose segments are one.

    Returns:
        the segment of every pixel and of every query.

    Raises:
        TypeError: ``labels`` is no tensor of whole numbers, or ``stuff`` holds something else.
        ValueError: shapes disagree or ``overlap`` is out of range.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels is a {kind}; expected a tensor of whole numbers")
    if labels.shape != result.won.shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; expected {tuple(result.won.shape)}, as the areas have"
        )
    number("overlap", overlap, 0, 1)
    valid = (result.kept > 0) & overlapping(result, overlap)
    first = first_of_stuff(valid, labels, stuff)
    place = torch.arange(labels.shape[1], device=labels.device)
    ids = ((valid & (first == place)).cumsum(1).gather(1, first) * valid).int()
    return PanopticSegments(paint(result.queries, ids, result.inside), ids)


def overlapping(result: PanopticArgmax, overlap: float) -> Tensor:
    """Of which queries the pixels won are more than a share of the mask, (B, Q)."""
    # As a quotient of two float32 beside a float64, which is how the libraries compare them.
    return (result.won / result.above).double() > overlap


def first_of_stuff(valid: Tensor, labels: Tensor, stuff: Collection[int]) -> Tensor:
    """For every query (B, Q) the first valid one of its class where that is stuff, else itself."""
    classes = torch.tensor(
        [whole("stuff", label) for label in stuff], dtype=torch.int64, device=labels.device
    )
    place = torch.arange(labels.shape[1], device=labels.device)
    joined = (labels[:, :, None] == labels[:, None]) & torch.isin(labels, classes)[:, None]
    first = torch.where(joined & valid[:, None], place, labels.shape[1]).amin(2)
    return torch.minimum(first, place)


def paint(queries: Tensor, ids: Tensor, inside: Tensor | None = None, nothing: int = 0) -> Tensor:
    """(B, H, W) of the dtype of ``ids`` (B, Q), that of the query of every pixel; ``nothing`` where there is
    none or the pixel is not inside its mask."""
    table = F.pad(ids, (1, 0), value=nothing)  # the first entry for query -1
    starts = torch.arange(len(ids), device=ids.device, dtype=torch.int32) * table.shape[1] + 1

    def part(rows: slice) -> Tensor:
        index = queries[:, rows].int()
        if inside is not None:
            index = torch.where(inside[:, rows], index, -1)
        index += starts[:, None, None]
        return table.flatten().index_select(0, index.flatten()).view(index.shape)

    if queries.device.type != "cpu" or torch.compiler.is_compiling():
        return part(slice(None))
    painted = torch.empty(queries.shape, dtype=ids.dtype)
    rows = max(1, 2**15 // max(1, queries.shape[0] * queries.shape[2]))  # whose index stays in the cache
    for top in range(0, queries.shape[1], rows):
        painted[:, top : top + rows] = part(slice(top, top + rows))
    return painted
