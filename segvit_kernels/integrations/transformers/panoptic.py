"""Panoptic segments of mask-classification models, without a mask of full size."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from segvit_kernels.integrations._kinds import known_base
from segvit_kernels.ops._checks import number
from segvit_kernels.ops.panoptic_argmax import (
    first_of_stuff,
    overlapping,
    paint,
    panoptic_argmax,
    panoptic_segments,
)

# The size to which the image processor resizes the mask logits before their sigmoid.
_RESIZED: dict[str, tuple[int, int] | None] = {
    "MaskFormerForInstanceSegmentationOutput": None,
    "OneFormerForUniversalSegmentationOutput": None,
    "Mask2FormerForUniversalSegmentationOutput": (384, 384),
}
# Those whose processor interpolates logits, to the size of its input and from there.
_EOMT = ("EomtForUniversalSegmentationOutput", "EomtDinov3ForUniversalSegmentationOutput")


@torch.no_grad()
def post_process_panoptic_segmentation(
    outputs: Any,
    threshold: float | None = None,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] | None = None,
    target_sizes: Sequence[tuple[int, int]] | None = None,
    *,
    stuff_classes: Collection[int] | None = None,
    size: Mapping[str, int | None] | None = None,
) -> list[dict[str, Any]]:
    """What the image processor's method of the same name gives, without a mask of full size.

    The query of every pixel and the areas that decide which queries are kept come from one pass
    (:func:`~segvit_kernels.panoptic_argmax`), with sigmoid and interpolation in the image processor's order.
    The device is waited for once an image, when all is done. Segments, their ids and scores are the image
    processor's, and so are pixels, except where two products of score and mask, or a mask and its threshold,
    are equal to rounding. (Masks of half precision are computed in float32.)

    Args:
        outputs: what the model returned, with ``class_queries_logits`` (B, Q, C + 1) and
            ``masks_queries_logits`` (B, Q, h, w). Its class is MaskFormer's, Mask2Former's, OneFormer's or
            EoMT's of transformers, or inherits from one.
        threshold: the score above which a query is kept; by default the image processor's, 0.5, for EoMT 0.8.
        mask_threshold: from which value on a pixel belongs to a mask. As in the image processors the value is
            score × mask, for EoMT the mask alone.
        overlap_mask_area_threshold: the share of its mask that a query must have won, and not only reach.
        label_ids_to_fuse: classes whose segments are one; not for EoMT.
        target_sizes: (height, width) of every image. Without them maps have the resolution at which the
            processor takes the sigmoid; EoMT needs them.
        stuff_classes: EoMT only, its name of ``label_ids_to_fuse``.
        size: EoMT only: the ``size`` of its image processor.

    Returns:
        One dictionary an image: ``segmentation`` (height, width) int32 (EoMT int64), and ``segments_info``, a
        list of ``id``, ``label_id``, ``was_fused`` (not for EoMT) and ``score``. Ids begin at 1 and 0 is
        none, for EoMT at 0 and −1 is none. As in the image processors an image without any query to keep has
        a float32 map of −1, and ids after a fused segment count on from its own.

    Unlike OneFormer's image processor this does not smooth where the target is smaller than the masks.

    Raises:
        TypeError: ``outputs`` is of none of these models, or has no such logits.
        ValueError: an argument is for another model, missing, out of range or does not fit the outputs.
    """
    base = known_base(type(outputs), (*_RESIZED, *_EOMT))
    if base is None or not all(hasattr(outputs, n) for n in ("class_queries_logits", "masks_queries_logits")):
        raise TypeError(
            f"outputs is a {type(outputs).__name__}; expected one of {', '.join((*_RESIZED, *_EOMT))}"
        )
    eomt = base.__name__ in _EOMT
    threshold = number("threshold", (0.8 if eomt else 0.5) if threshold is None else threshold)
    overlap = number("overlap_mask_area_threshold", overlap_mask_area_threshold)
    given = {"label_ids_to_fuse": label_ids_to_fuse, "stuff_classes": stuff_classes, "size": size}
    for name in ("label_ids_to_fuse",) if eomt else ("stuff_classes", "size"):
        if given[name] is not None:
            other = "stuff_classes" if eomt else "None"
            raise ValueError(f"{name} is {given[name]}; expected {other} for a {type(outputs).__name__}")
    masks, batch = outputs.masks_queries_logits, len(outputs.masks_queries_logits)
    if eomt and target_sizes is None:
        raise ValueError("target_sizes is None; expected the (height, width) of every image for EoMT")
    if eomt and size is None:
        raise ValueError("size is None; expected the image processor's for EoMT: size=processor.size")
    if target_sizes is not None and len(target_sizes) != batch:
        raise ValueError(f"target_sizes has length {len(target_sizes)}; expected {batch}, one per image")

    scores, labels = outputs.class_queries_logits.softmax(-1).max(-1)
    kept = (labels != outputs.class_queries_logits.shape[-1] - 1) & (scores > threshold)
    parts = torch.where(kept, scores, -1.0)
    resized = (masks.shape[-2], masks.shape[-1])
    if size is not None:
        shortest = int(size["shortest_edge"] or 0)
        resized = (shortest, size["longest_edge"] or shortest)
    else:
        resized = _RESIZED[base.__name__] or resized
    results = []
    for i in range(batch):
        target = resized if target_sizes is None else (int(target_sizes[i][0]), int(target_sizes[i][1]))
        crop = resized
        if size is not None:
            fitted = _fitted(target, shortest, size["longest_edge"])
            crop = (min(fitted[0], resized[0]), min(fitted[1], resized[1]))
        own = slice(i, i + 1)
        found = panoptic_argmax(
            masks[own],
            parts[own],
            target,
            resized=resized,
            crop=crop,
            activation="sigmoid" if eomt else "sigmoid_first",
            threshold=number("mask_threshold", mask_threshold),
            weighted=not eomt,
        )
        fused = (stuff_classes if eomt else label_ids_to_fuse) or ()
        if eomt:
            segments = panoptic_segments(found, labels[own], overlap=overlap, stuff=fused)
            segmentation, ids = segments.segmentation.long() - 1, segments.ids - 1
        else:
            valid = (found.won > 0) & (found.above > 0) & overlapping(found, overlap)
            ids = _counted_on(valid, labels[own], fused)
            segmentation = paint(found.queries, ids)
        # Here the device is waited for.
        rows = torch.stack([kept[i].double(), ids[0].double(), labels[i].double(), scores[i].double()], 1)
        table = [(int(row[1]), int(row[2]), row[3]) for row in rows.tolist() if row[0]]
        if not table:
            results.append({"segmentation": torch.zeros(target) - 1, "segments_info": []})
            continue
        results.append({"segmentation": segmentation[0], "segments_info": _described(table, fused, eomt)})
    return results


def _described(table: list[tuple[int, int, float]], fused: Collection[int], eomt: bool) -> list[dict]:
    """``segments_info`` of the (id, label, score) of every query kept; EoMT lists a fused segment once."""
    info: list[dict[str, Any]] = []
    seen = set()
    for segment, label, score in table:
        if segment < (0 if eomt else 1) or (eomt and segment in seen):
            continue
        seen.add(segment)
        entry = {"id": segment, "label_id": label, "was_fused": label in fused, "score": round(score, 6)}
        if eomt:
            del entry["was_fused"]
        info.append(entry)
    return info


def _counted_on(valid: Tensor, labels: Tensor, fused: Collection[int]) -> Tensor:
    """The id (B, Q) of every valid query, 0 for others, as MaskFormer's image processors count.

    A query of a class that is there already and is to be fused takes its id, any other one more than the id
    of the valid query before it: so each id is that of an earlier query and nothing or one more, and the sum
    along such chains takes as many steps as the length of the longest has bits.
    """
    batch, count = labels.shape
    place = torch.arange(count, device=labels.device).expand(batch, -1)
    first = first_of_stuff(valid, labels, fused)
    again = valid & (first != place)
    latest = torch.where(valid, place + 1, 0).cummax(1).values
    before = torch.cat([torch.zeros_like(latest[:, :1]), latest[:, :-1]], 1)
    # Entry 0 is that before all queries.
    earlier = torch.cat([torch.zeros_like(before[:, :1]), torch.where(again, first + 1, before)], 1)
    ids = torch.cat([torch.zeros_like(before[:, :1]), 1 - again.long()], 1)
    for _ in range(count.bit_length()):
        ids = ids + ids.gather(1, earlier)
        earlier = earlier.gather(1, earlier)
    return (ids[:, 1:] * valid).int()


def _fitted(size: tuple[int, int], shortest: int, longest: int | None) -> tuple[int, int]:
    """The size to which EoMT's image processor resizes an image: its shorter side to ``shortest``, or to what
    brings the longer one to ``longest`` where that would be exceeded."""
    low, high = min(size), max(size)
    side = float(shortest)
    if longest is not None and high / low * shortest > longest:
        side = longest * low / high
    if low == round(side):
        return size
    other = int(side * high / low)
    return (other, round(side)) if size[1] < size[0] else (round(side), other)
