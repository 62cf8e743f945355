"""Binary masks of instances: mask logits resized and compared with a threshold in one pass.

Of logits M_k on a small grid, for every output pixel:

    mask_k(y, x) = bilinear(M_k)(y, x) > threshold

as booleans, as bits, or run-length encoded as COCO does, and from the same pass how many pixels a mask has
and the box around them. Interpolation is that of ``F.interpolate(mode="bilinear", align_corners=False)``;
nothing of floating point exists at the size of the output.

With *boxes*, mask k lies in its box (left, top, right, bottom) of the output, as masks of box heads do: row y
reads grid row (y + ½ − top) · h / (bottom − top) − ½, clamped to [0, h − 1], and the mask has no pixel whose
centre lies outside [top, bottom); columns likewise. Whole boxes are ``F.interpolate`` to the box, pasted. A
box that is empty or not finite holds nothing.

Infinite logits count as ±1e30, so that a weight of zero stays zero beside them. A logit that is not a number
counts as −∞: no pixel that its cell has a share in belongs to the mask, in all backends.

Refused: anything but 4-D masks of one floating dtype, boxes of another shape or device, a threshold beyond
±1e20.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from segvit_kernels import _library
from segvit_kernels.ops._attention import unit_stride
from segvit_kernels.ops._checks import number, whole

FORMATS = ("bool", "packed", "rle")
WORD = 32  # bits of a word of packed masks
_BOOL, _ROWS, _COLUMNS = range(3)  # layouts: pixels; words along the rows, along the columns
_HUGE, _MOST = 1e30, 1e20
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_BUDGET = 2**19  # elements of a block of logits at the size of the output: 2 MiB stay in the cache
_PACKED = 2**23  # bytes of words along columns that exist at a time on the way to run lengths


@_library.exportable
class BinaryMasks(NamedTuple):
    """What :func:`mask_binarize` gives.

    Attributes:
        masks: "bool": (B, K, H, W) bool. "packed": (B, K, H, ⌈W/32⌉) int32, bit i of word j is column
            32·j + i, and bits beyond the width are 0. "rle": for every image a list of K dicts
            ``{"size": [H, W], "counts": bytes}``, byte for byte what ``pycocotools.mask.encode`` makes of the
            booleans.
        areas: (B, K) int32, how many pixels a mask has.
        boxes: (B, K, 4) int32, (left, top, right, bottom) around them, the latter two exclusive; zeros for a
            mask without a pixel.
    """

    masks: Any
    areas: Tensor
    boxes: Tensor


def mask_binarize_reference(
    mask_logits: Tensor,
    size: tuple[int, int],
    *,
    boxes: Tensor | None = None,
    threshold: float = 0.0,
    format: str = "bool",
) -> BinaryMasks:
    """The meaning of :func:`mask_binarize` in ordinary PyTorch, with every logit at full size in memory."""
    masks = resized_reference(mask_logits, size, boxes) > threshold
    rows, columns = _extents(masks.any(-1)), _extents(masks.any(-2))
    tight = torch.stack([columns[0], rows[0], columns[1], rows[1]], -1)
    if format == "packed":
        return BinaryMasks(_pack(masks), masks.sum((-2, -1), dtype=torch.int32), tight)
    encoded: Any = masks
    if format == "rle":
        encoded = [[_encode(mask.cpu().numpy()) for mask in image] for image in masks]
    return BinaryMasks(encoded, masks.sum((-2, -1), dtype=torch.int32), tight)


def resized_reference(mask_logits: Tensor, size: tuple[int, int], boxes: Tensor | None = None) -> Tensor:
    """The logits (B, K, H, W) that :func:`mask_binarize` compares with its threshold; −∞ outside boxes."""
    most = min(_HUGE, torch.finfo(mask_logits.dtype).max)
    logits = mask_logits.nan_to_num(nan=-most).clamp(-most, most)
    if boxes is None:
        full = F.interpolate(logits.flatten(0, 1)[:, None], tuple(size), mode="bilinear", align_corners=False)
        return full[:, 0].unflatten(0, logits.shape[:2])
    full = logits.new_full((*logits.shape[:2], *size), -torch.inf)
    for b, k in np.ndindex(*logits.shape[:2]):
        box = boxes[b, k].float().tolist()
        inside, places = [], []
        for cells, length, low, high in zip(logits.shape[2:], size, box[1::-1], box[:1:-1], strict=True):
            centre = torch.arange(length, dtype=torch.float64, device=logits.device) + 0.5
            good = bool(np.isfinite(np.float32(high) - np.float32(low)) and high > low)
            inside.append((low <= centre) & (centre < high) & good)
            place = (centre - low) * (cells / (high - low)) - 0.5 if good else centre * 0
            places.append(place.clamp(0, cells - 1))
        found = _at(logits[b, k], *places)
        full[b, k] = torch.where(inside[0][:, None] & inside[1], found, -torch.inf)
    return full


def _at(mask: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(h, w) at rows ``y`` and columns ``x``."""
    for axis, place in ((0, y), (1, x)):
        lower = place.long()
        upper, weight = (lower + 1).clamp(max=mask.shape[axis] - 1), (place - lower).to(mask.dtype)
        weight = weight[:, None] if axis == 0 else weight
        mask = mask.index_select(axis, lower) * (1 - weight) + mask.index_select(axis, upper) * weight
    return mask


def _encode(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run-length encoding of one (H, W) mask, as its definition reads.

    Runs of 0 and 1 take turns, column after column, the first one of 0. Every run from the fourth on is given
    as the difference to that before the last, in digits of five bits, the lowest first; a sixth bit says
    whether more follow, and 48 is added to each.
    """
    runs, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel == value:
            runs[-1] += 1
        else:
            runs.append(1)
            value = pixel
    text = bytearray()
    for i, run in enumerate(runs):
        rest = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            digit, rest = rest & 31, rest >> 5
            more = rest != (-1 if digit & 16 else 0)
            text.append(digit + 32 * more + 48)
    return {"size": list(mask.shape), "counts": bytes(text)}


def _pack(bits: Tensor) -> Tensor:
    """(..., n) bool to (..., ⌈n / 32⌉) int32, the first bit lowest."""
    padded = F.pad(bits, (0, -bits.shape[-1] % WORD)).unflatten(-1, (-1, WORD)).int()
    return (padded << torch.arange(WORD, dtype=torch.int32, device=bits.device)).sum(-1, dtype=torch.int32)


def _extents(used: Tensor) -> tuple[Tensor, Tensor]:
    """First index of (..., n) bool that is set and the one after the last, int32; zeros where none is."""
    first, last = used.int().argmax(-1), used.shape[-1] - used.flip(-1).int().argmax(-1)
    some = used.any(-1)
    return (first * some).int(), (last * some).int()


class _Axis(NamedTuple):
    """Where output pixels of one axis lie in every grid, or in all of them (n = 1)."""

    lower: Tensor  # (n, length) int64: the cell before
    upper: Tensor  # the cell after
    weight: Tensor  # its share
    inside: Tensor  # bool


def _axis(
    length: int, cells: int, low: Tensor | None, high: Tensor | None, dtype: torch.dtype, like: Tensor
) -> _Axis:
    exact = torch.float64 if like.device.type == "cpu" else torch.float32  # not every device has float64
    centre = torch.arange(length, dtype=exact, device=like.device)[None] + 0.5
    if low is None or high is None:
        place, inside = centre * (cells / length) - 0.5, torch.ones_like(centre, dtype=torch.bool)
    else:
        low, high = low[:, None], high[:, None]
        extent = high - low
        good = (extent > 0) & extent.isfinite()
        inside = good & (centre >= low) & (centre < high)
        low, extent = torch.where(good, low, 0.0).to(exact), torch.where(good, extent, 1.0).to(exact)
        place = (centre - low) * (cells / extent) - 0.5
    place = place.clamp_(0, cells - 1)
    lower = place.long()
    return _Axis(lower, (lower + 1).clamp_(max=cells - 1), (place - lower).to(dtype), inside)


def _interpolated(cells: Tensor, axis: _Axis, dim: int) -> Tensor:
    """(n, h, w) along one of its last two axes at the places of ``axis``."""
    shape = list(cells.shape)
    shape[dim] = axis.lower.shape[1]

    def spread(table: Tensor) -> Tensor:
        return (table[:, :, None] if dim == 1 else table[:, None]).expand(shape)

    lower, upper = (cells.gather(dim, spread(index)) for index in (axis.lower, axis.upper))
    return lower.lerp_(upper, spread(axis.weight))


@torch.no_grad()
def _eager(
    mask_logits: Tensor, boxes: Tensor | None, height: int, width: int, threshold: float, layout: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, h, w = mask_logits.shape
    found = [t.flatten(0, 1) for t in _fake(mask_logits, boxes, height, width, threshold, layout)]
    masks, areas, tight = found
    total, logits = batch * count, mask_logits.flatten(0, 1)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    low: Any = [None] * 4 if boxes is None else boxes.flatten(0, 1).unbind(-1)
    axes = [
        _axis(length, cells, low[i], low[i + 2], dtype, logits)
        for length, cells, i in ((height, h, 1), (width, w, 0))
    ]
    areas.zero_()
    used = [areas.new_zeros(total, length, dtype=torch.bool) for length in (height, width)]
    # A block is several masks, or rows of one: whole words of its columns.
    rows = max(WORD, _BUDGET // width // WORD * WORD)
    together = max(1, _BUDGET // (min(rows, height) * width))
    for first in range(0, total, together):
        own = slice(first, first + together)
        cells = logits[own].to(dtype).nan_to_num(nan=-_HUGE).clamp_(-_HUGE, _HUGE)
        vertical, horizontal = (_Axis(*(t if len(t) == 1 else t[own] for t in axis)) for axis in axes)
        for top in range(0, height, rows):
            part = slice(top, top + rows)
            strip = _Axis(*(t[:, part] for t in vertical))
            bits = _interpolated(_interpolated(cells, strip, 1), horizontal, 2) > threshold
            if boxes is not None:
                bits &= strip.inside[:, :, None] & horizontal.inside[:, None]
            if layout == _BOOL:
                masks[own, part] = bits
            elif layout == _ROWS:
                masks[own, part] = _pack(bits)
            else:
                words = slice(top // WORD, (top + rows) // WORD)
                masks[own, :, words] = _pack(bits.transpose(1, 2))
            areas[own] += bits.sum((1, 2), dtype=torch.int32)
            used[0][own, part] |= bits.any(2)
            used[1][own] |= bits.any(1)
    ends = [_extents(u) for u in used]
    tight.copy_(torch.stack([ends[1][0], ends[0][0], ends[1][1], ends[0][1]], -1))
    return tuple(t.unflatten(0, (batch, count)) for t in found)  # type: ignore[return-value]


def _fake(
    mask_logits: Tensor, boxes: Tensor | None, height: int, width: int, threshold: float, layout: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count = mask_logits.shape[:2]
    outer, inner = (width, height) if layout == _COLUMNS else (height, width)
    dtype = torch.bool if layout == _BOOL else torch.int32
    inner = inner if layout == _BOOL else (inner + WORD - 1) // WORD
    return (
        mask_logits.new_empty((batch, count, outer, inner), dtype=dtype),
        mask_logits.new_empty((batch, count), dtype=torch.int32),
        mask_logits.new_empty((batch, count, 4), dtype=torch.int32),
    )


def _macs(mask_logits: tuple[int, ...], boxes: Any, height: int, width: int, *_: Any) -> int:
    """Four cells a pixel."""
    return 4 * mask_logits[0] * mask_logits[1] * height * width


def _kernels_refuse(backend: str, mask_logits: Tensor, *_: Any) -> Exception | None:
    if mask_logits.dtype == torch.float64:
        return TypeError(
            f"backend {backend!r} takes float32, float16 and bfloat16; mask_logits is {mask_logits.dtype}"
        )
    return None


_mask_binarize = _library.define(
    "mask_binarize(Tensor mask_logits, Tensor? boxes, SymInt height, SymInt width, float threshold, "
    "int layout) -> (Tensor masks, Tensor areas, Tensor tight)",
    eager=_eager,
    fake=_fake,
    macs=_macs,
    refuse=_kernels_refuse,
)


@torch.no_grad()
def _rle_eager(columns: Tensor, height: int) -> tuple[Tensor, Tensor]:
    texts = []
    for words in columns.cpu().contiguous().numpy():
        bits = np.unpackbits(words.view(np.uint8), axis=1, count=height, bitorder="little").ravel()
        ends = np.flatnonzero(bits[1:] != bits[:-1]) + 1
        runs = np.diff(ends, prepend=0, append=len(bits))
        runs = np.concatenate([[0], runs]) if bits[0] else runs
        texts.append(_digits(runs))
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    text = np.concatenate([np.empty(0, np.uint8), *texts])
    return torch.from_numpy(text), torch.from_numpy(ends)


def _digits(runs: np.ndarray) -> np.ndarray:
    """Run lengths as the text of COCO's encoding, uint8; see :func:`_encode`."""
    rest = runs.astype(np.int64)
    rest[3:] -= runs[1:-2]
    count = np.ones(len(rest), np.int64)  # of digits: as many as hold the number and its sign
    for digits in range(1, 7):
        count += (rest < -(2 ** (5 * digits - 1))) | (rest >= 2 ** (5 * digits - 1))
    place = np.arange(7)
    text = (rest[:, None] >> 5 * place & 31) + 48 + 32 * (place < count[:, None] - 1)
    return text[place < count[:, None]].astype(np.uint8)


def _rle_fake(columns: Tensor, height: int) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return (
        columns.new_empty(size, dtype=torch.uint8, device="cpu"),
        columns.new_empty(columns.shape[0], dtype=torch.int64, device="cpu"),
    )


_mask_rle = _library.define(
    "mask_rle(Tensor columns, SymInt height) -> (Tensor text, Tensor ends)",
    eager=_rle_eager,
    fake=_rle_fake,
    macs=lambda columns, height: 0,
    backends=("cpu",),
)
"""COCO's encoding of (N, W, ⌈H/32⌉) words along columns: the texts in a row (uint8) and where each ends."""


def mask_binarize(
    mask_logits: Tensor,
    size: tuple[int, int],
    *,
    boxes: Tensor | None = None,
    threshold: float = 0.0,
    format: str = "bool",
    backend: str | None = None,
) -> BinaryMasks:
    """Mask logits to binary masks at full size, with their areas and boxes, in one pass.

    What is computed stands at the top of this module. Not differentiable. With "rle" the words along columns
    of some masks exist at a time, 8 MiB at most or one mask's of every image.

    Args:
        mask_logits: (B, K, h, w); float32, float16, bfloat16 or float64 (eager only). Probabilities do as
            well, with their threshold.
        size: (H, W) of the output.
        boxes: (B, K, 4), (left, top, right, bottom) in pixels of the output, in which the masks lie; without
            them every mask is stretched over the whole output. Rounded to float32.
        threshold: a pixel belongs to a mask whose logit is greater.
        format: "bool", "packed" or "rle"; see :class:`BinaryMasks`.
        backend: one of ``segvit_kernels.BACKENDS``; chosen by device unless given.

    Returns:
        The masks, their areas and the boxes around them.

    Raises:
        TypeError: a dtype is not supported, or an argument is not what it should be.
        ValueError: shapes, devices, the size, the threshold or the format.
        BackendUnavailableError: an explicitly chosen backend cannot run here.
    """
    _library.check_backend(backend)
    height, width = _validate(mask_logits, boxes, size, format)
    threshold = number("threshold", threshold, -_MOST, _MOST)
    logits = unit_stride(mask_logits.detach())
    where = None if boxes is None else boxes.detach().float().contiguous()
    if format != "rle":
        layout = _BOOL if format == "bool" else _ROWS
        return BinaryMasks(*_mask_binarize(logits, where, height, width, threshold, layout, backend))

    return _encoded(logits, where, (height, width), threshold, backend)


def _encoded(
    logits: Tensor, boxes: Tensor | None, size: tuple[int, int], threshold: float, backend: str | None
) -> BinaryMasks:
    """Run lengths of words along columns, of as many masks at a time as ``_PACKED`` holds."""
    batch, count = logits.shape[:2]
    areas = logits.new_empty((batch, count), dtype=torch.int32)
    tight = logits.new_empty((batch, count, 4), dtype=torch.int32)
    images: list[list[dict[str, Any]]] = [[] for _ in range(batch)]
    # Whatever made the masks: their run lengths are bytes of Python.
    eager = _library.requested_backend(backend) == "eager" or _library.why_not("cpu", "cpu")
    step = max(1, _PACKED // (max(1, batch) * size[1] * ((size[0] + WORD - 1) // WORD) * 4))
    for first in range(0, count, step):
        own = slice(first, first + step)
        part = None if boxes is None else boxes[:, own].contiguous()
        columns, areas[:, own], tight[:, own] = _mask_binarize(
            logits[:, own], part, *size, threshold, _COLUMNS, backend
        )
        text, ends = _mask_rle(columns.flatten(0, 1).cpu(), size[0], "eager" if eager else "cpu")
        _split(images, text, ends, size)
    return BinaryMasks(images, areas, tight)


def _split(images: list[list[dict[str, Any]]], text: Tensor, ends: Tensor, size: tuple[int, int]) -> None:
    """Give every image its next masks of the texts of all of them."""
    data, start = text.numpy().tobytes(), 0
    stops = ends.tolist()
    each = len(stops) // max(1, len(images))
    for i, stop in enumerate(stops):
        images[i // each].append({"size": list(size), "counts": data[start:stop]})
        start = stop


def _validate(mask_logits: Any, boxes: Any, size: Any, format: Any) -> tuple[int, int]:
    if not isinstance(mask_logits, Tensor):
        raise TypeError(f"mask_logits is a {type(mask_logits).__name__}; expected a tensor")
    if mask_logits.dtype not in _DTYPES:
        raise TypeError(
            f"mask_logits has dtype {mask_logits.dtype}; expected float32, float16, bfloat16 or float64"
        )
    if mask_logits.ndim != 4 or min(mask_logits.shape[2:]) < 1:
        raise ValueError(
            f"mask_logits has shape {tuple(mask_logits.shape)}; expected (batch, masks, height, width)"
        )
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"size is {size!r}; expected (height, width)")
    height, width = (whole("size", n) for n in size)
    if height < 1 or width < 1 or height * width >= 2**31:
        raise ValueError(f"size is {tuple(size)}; expected (height, width), 1 to 2³¹ − 1 pixels")
    if boxes is not None:
        if not isinstance(boxes, Tensor):
            raise TypeError(f"boxes is a {type(boxes).__name__}; expected a tensor")
        if not boxes.dtype.is_floating_point and boxes.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"boxes has dtype {boxes.dtype}; expected floating point, int32 or int64")
        expected = (*mask_logits.shape[:2], 4)
        if tuple(boxes.shape) != expected:
            raise ValueError(f"boxes has shape {tuple(boxes.shape)}; expected {expected}, of mask_logits")
        if boxes.device != mask_logits.device:
            raise ValueError(
                f"boxes is on {boxes.device}; expected {mask_logits.device}, the device of mask_logits"
            )
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    return height, width
