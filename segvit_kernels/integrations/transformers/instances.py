"""Instances of mask-classification models and RF-DETR, without masks of all queries at full size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit_kernels.integrations._kinds import known_base
from segvit_kernels.integrations.transformers import sam3
from segvit_kernels.integrations.transformers.panoptic import _counted_on, _fitted
from segvit_kernels.ops._checks import flag, number, whole
from segvit_kernels.ops.mask_binarize import mask_binarize
from segvit_kernels.ops.panoptic_argmax import overlapping, paint, panoptic_argmax

_BUDGET = 2**20  # elements of masks of which scores are made at a time


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What the processor of a model does.

    Attributes:
        threshold, mask_threshold: its defaults.
        resized: the size to which masks are resized before they are scored; "size" the input's, "target" the
            target itself, ``None`` their own.
        maps, annotation: whether its method has ``return_binary_maps`` and ``return_coco_annotation``.
        needs_sizes: whether ``target_sizes`` must be given.
        classes: every class of a query is a candidate, and not the best one alone.
    """

    threshold: float = 0.5
    mask_threshold: float = 0.5
    resized: tuple[int, int] | str | None = None
    maps: bool = True
    annotation: bool = True
    needs_sizes: bool = False
    classes: bool = True


_KINDS = {
    "MaskFormerForInstanceSegmentationOutput": _Kind(),
    "Mask2FormerForUniversalSegmentationOutput": _Kind(resized=(384, 384)),
    "OneFormerForUniversalSegmentationOutput": _Kind(maps=False),
    "EomtForUniversalSegmentationOutput": _Kind(
        0.8, resized="size", maps=False, annotation=False, needs_sizes=True, classes=False
    ),
    "VideomtForUniversalSegmentationOutput": _Kind(
        resized="target", maps=False, annotation=False, needs_sizes=True, classes=False
    ),
    "RfDetrInstanceSegmentationOutput": _Kind(mask_threshold=0.0),
}
_KINDS["EomtDinov3ForUniversalSegmentationOutput"] = _KINDS["EomtForUniversalSegmentationOutput"]


@torch.no_grad()
def post_process_instance_segmentation(
    outputs: Any,
    threshold: float | None = None,
    mask_threshold: float | None = None,
    overlap_mask_area_threshold: float = 0.8,
    target_sizes: Sequence[tuple[int, int]] | None = None,
    return_coco_annotation: bool = False,
    return_binary_maps: bool = False,
    *,
    size: Mapping[str, int | None] | None = None,
    top_k: int | None = None,
    is_demo: bool = True,
) -> list[dict[str, Any]]:
    """What the image processor's method of the same name gives, in a fraction of its time and memory.

    The image processors resize the masks of all queries to the target, many times the size of the result.
    Here a query whose class scores less than ``threshold`` is left out first: its mask can only lower the
    score. MaskFormer's and Mask2Former's segments are put together where their masks are scored, and resized
    to the target as one map; RF-DETR's masks are compared while they are resized
    (:func:`~segvit_kernels.mask_binarize`), and only those that are seen are painted. Segments, their ids,
    labels and scores are the image processor's, and so are pixels, except where a mask equals its threshold
    to rounding.

    Args:
        outputs: what the model returned: MaskFormer's, Mask2Former's, OneFormer's, EoMT's (DINOv3 too,
            without windows), VidEoMT's, RF-DETR's or SAM 3's of transformers, or of a class that inherits
            from one.
        threshold: the least score of an instance; by default the processor's, 0.5, for EoMT 0.8.
        mask_threshold: SAM 3: above which probability a pixel belongs to a mask. OneFormer and RF-DETR: from
            which logit on, or above which. By default the processor's, 0.5, 0.5 and 0. The others compare
            logits with 0, and so does this.
        overlap_mask_area_threshold: OneFormer: the share of its mask that an instance must have won. The
            other processors ignore it.
        target_sizes: (height, width) of every image; without them maps have the size at which masks are
            scored. EoMT and VidEoMT need them.
        return_coco_annotation: runs in place of a map, as the processors give them: a list for every value
            of the map, the background's first, of starts from 1 and lengths, row after row. (COCO's own
            encoding of every instance is :func:`~segvit_kernels.mask_binarize` with ``format="rle"``.) Not
            for EoMT and VidEoMT.
        return_binary_maps: a mask for every instance in place of a map; MaskFormer, Mask2Former and RF-DETR.
        size: EoMT: the ``size`` of its image processor.
        top_k: RF-DETR: how many pairs of query and class are looked at; by default as many as queries.
        is_demo: OneFormer: leave out what scores ``threshold`` or less. Labels are the model's either way;
            without it ADE20K's processor gives a thing's place among the things instead.

    Returns:
        One dictionary an image, with ``segmentation`` and ``segments_info``, as the processor's, dtypes
        included. For SAM 3 ``scores``, ``boxes`` and ``masks`` (K, height, width), which are bool where the
        processor's are int64.

    Raises:
        TypeError: ``outputs`` is of none of these models, or an argument of another type.
        ValueError: an argument is for another model, missing, out of range or does not fit the outputs.
    """
    if sam3.is_sam3(outputs):
        given = {"size": size, "top_k": top_k}
        given |= {"return_coco_annotation": return_coco_annotation or None}
        given |= {"return_binary_maps": return_binary_maps or None}
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"{option} is {value}; expected none for SAM 3, whose processor has none")
        return sam3.instances(outputs, threshold, mask_threshold, target_sizes)
    base = known_base(type(outputs), _KINDS)
    if base is None:
        known = ", ".join((*_KINDS, *sam3.OUTPUTS))
        raise TypeError(f"outputs is a {type(outputs).__name__}; expected one of {known}")
    kind, name = _KINDS[base.__name__], type(outputs).__name__
    threshold = number("threshold", kind.threshold if threshold is None else threshold)
    mask_threshold = number(
        "mask_threshold", kind.mask_threshold if mask_threshold is None else mask_threshold
    )
    overlap = number("overlap_mask_area_threshold", overlap_mask_area_threshold)
    for option, has in (("return_coco_annotation", kind.annotation), ("return_binary_maps", kind.maps)):
        value = return_coco_annotation if option == "return_coco_annotation" else return_binary_maps
        if flag(option, value) and not has:
            raise ValueError(f"{option} is True; expected False for a {name}, whose processor has none")
    if return_coco_annotation and return_binary_maps:
        raise ValueError("return_coco_annotation and return_binary_maps are both True; expected one of them")
    rf_detr = base.__name__.startswith("RfDetr")
    if top_k is not None:
        if not rf_detr:
            raise ValueError(f"top_k is {top_k}; expected None for a {name}, it is for RF-DETR only")
        whole("top_k", top_k, 1)
    if (size is not None) != (kind.resized == "size"):
        expected = "None" if size is not None else "the image processor's: size=processor.size"
        raise ValueError(f"size is {size}; expected {expected} for a {name}")
    if getattr(outputs, "patch_offsets", None):
        raise ValueError("outputs has patch_offsets; expected those of whole images, as the processor does")
    masks, classes = (
        (outputs.pred_masks, outputs.logits)
        if rf_detr
        else (outputs.masks_queries_logits, outputs.class_queries_logits)
    )
    if target_sizes is None and kind.needs_sizes:
        raise ValueError(f"target_sizes is None; expected the (height, width) of every image for a {name}")
    if target_sizes is not None and len(target_sizes) != len(masks):
        raise ValueError(f"target_sizes has length {len(target_sizes)}; expected {len(masks)}, one per image")

    results = []
    for i in range(len(masks)):
        target = None if target_sizes is None else (int(target_sizes[i][0]), int(target_sizes[i][1]))
        if rf_detr:
            result = _rf_detr(
                masks[i], classes[i], threshold, mask_threshold, target, return_binary_maps, top_k
            )
        elif base.__name__.startswith("OneFormer"):
            least = threshold if flag("is_demo", is_demo) else None
            result = _oneformer(masks[i], classes[i], least, mask_threshold, overlap, target)
        else:
            result = _scored(masks[i], classes[i], threshold, target, kind, size, return_binary_maps)
        # As the processors of OneFormer and RF-DETR: a map where there is no candidate at all.
        if return_coco_annotation and result.pop("candidates", True):
            result["segmentation"] = _runs(result["segmentation"])
        result.pop("candidates", None)
        results.append(result)
    return results


def _candidates(classes: Tensor, kind: _Kind) -> tuple[Tensor, Tensor, Tensor]:
    """Score, label and query of what may be an instance, in the processor's order; ``classes`` (Q, C + 1)."""
    if not kind.classes:
        scores, labels = (
            (classes.float() if kind.resized == "target" else classes).softmax(-1)[..., :-1].max(-1)
        )
        return scores, labels, torch.arange(len(classes), device=classes.device)
    probs = classes.softmax(-1)[:, :-1]
    scores, index = probs.flatten().topk(len(classes), sorted=False)
    return scores, index % probs.shape[1], index // probs.shape[1]


class _Grid:
    """How one image's masks come to where they are scored, and from there to the target."""

    def __init__(
        self,
        masks: Tensor,
        target: tuple[int, int] | None,
        kind: _Kind,
        size: Mapping[str, int | None] | None,
    ) -> None:
        self.steps: list[tuple[int, int]] = []  # sizes of interpolations, one after the other
        self.crop: tuple[int, int] | None = None  # of the first
        self.size = (masks.shape[-2], masks.shape[-1])
        self.rows: Tensor | None = None  # of the target, in the grid of the scores; None where they are one
        if isinstance(kind.resized, tuple):
            self.steps, self.size = [kind.resized], kind.resized
        elif kind.resized is not None and target is not None:
            self.steps, self.size = [target], target
        if size is not None and target is not None:
            shortest, longest = int(size["shortest_edge"] or 0), size["longest_edge"]
            self.crop = _fitted(target, shortest, longest)
            self.steps = [(shortest, longest or shortest), target]
        if target is not None and target != self.size:
            self.rows, self.columns = (
                F.interpolate(
                    torch.arange(cells, dtype=torch.float32, device=masks.device)[None, None],
                    length,
                    mode="nearest",
                )[0, 0].long()
                for cells, length in zip(self.size, target, strict=True)
            )

    def resize(self, masks: Tensor) -> Tensor:
        """(n, h, w) logits where they are scored."""
        for step, size in enumerate(self.steps):
            masks = F.interpolate(masks[None], size, mode="bilinear", align_corners=False)[0]
            if self.crop and not step:
                masks = masks[:, : self.crop[0], : self.crop[1]]
        return masks

    def nearest(self, maps: Tensor) -> Tensor:
        """(h, w) of the scores' grid at the target."""
        if self.rows is None:
            return maps
        return maps.index_select(0, self.rows).index_select(1, self.columns)

    def misses(self, mask: Tensor) -> bool:
        """Whether none of the pixels of (h, w) is at the target; never where that is larger."""
        if self.rows is None or (len(self.rows) >= self.size[0] and len(self.columns) >= self.size[1]):
            return False
        return not bool(mask.index_select(0, self.rows).index_select(1, self.columns).any())


def _scored(
    masks: Tensor,
    classes: Tensor,
    threshold: float,
    target: tuple[int, int] | None,
    kind: _Kind,
    size: Mapping[str, int | None] | None,
    binary: bool,
) -> dict[str, Any]:
    """Instances scored by class and the mean of their mask; later ones are painted over earlier ones."""
    video = kind.resized == "target"
    scores, labels, queries = _candidates(classes, kind)
    grid = _Grid(masks, target, kind, size)
    painted = torch.zeros(grid.size, device=masks.device)  # one more than the id
    maps: list[Tensor] = []
    segments: list[dict[str, Any]] = []
    # The mean of a mask is at most 1, rounded too.
    chosen = (scores.double() >= threshold).nonzero()[:, 0]
    for part in _pairs(chosen, max(2, _BUDGET // math.prod(grid.size))):
        logits = grid.resize(masks[queries[part]])
        weights = (logits > 0).float()
        counts = weights.flatten(1).sum(1)
        values = (logits.float() if video else logits).sigmoid() * weights
        means = values.flatten(1).sum(1) / (counts + 1e-6)
        table = ((scores[part] * means).tolist(), labels[part].tolist(), counts.tolist(), weights)
        # A mask alone comes twice: sums over a single row are made in another order.
        for score, label, count, mask in list(zip(*table, strict=True))[: len(chosen)]:
            if not (count and score >= threshold) or grid.misses(mask):
                continue
            entry = {"id": len(segments), "label_id": label, "was_fused": False, "score": round(score, 6)}
            if not kind.classes:
                del entry["was_fused"]
            segments.append(entry)
            if binary:
                maps.append(mask.bool())
            else:  # later ids are larger
                torch.maximum(painted, mask.mul_(len(segments)), out=painted)
    if not maps:
        painted = grid.nearest(painted.sub_(1))
        return {"segmentation": painted.long() if video else painted, "segments_info": segments}
    result = torch.empty(len(maps), *(target or grid.size), device=masks.device)
    for i, mask in enumerate(maps):
        result[i] = F.interpolate(mask[None, None].float(), result.shape[1:], mode="nearest")[0, 0]
    return {"segmentation": result, "segments_info": segments}


def _pairs(chosen: Tensor, count: int) -> Iterator[Tensor]:
    """Parts of ``chosen``, each of two at least."""
    if len(chosen) == 1:
        yield chosen.expand(2)
        return
    parts = list(chosen.split(count))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    yield from (part for part in parts if len(part))


def _oneformer(
    masks: Tensor,
    classes: Tensor,
    least: float | None,
    mask_threshold: float,
    overlap: float,
    target: tuple[int, int] | None,
) -> dict[str, Any]:
    """Instances that share pixels out: each goes to the largest product of score and logit."""
    scores, labels, queries = _candidates(classes, _KINDS["OneFormerForUniversalSegmentationOutput"])
    if least is not None:
        keep = scores > least
        scores, labels, queries = scores[keep], labels[keep], queries[keep]
    size = target or (masks.shape[-2], masks.shape[-1])
    if not len(scores):
        return {"segmentation": torch.zeros(size) - 1, "segments_info": [], "candidates": False}
    found = panoptic_argmax(
        masks[queries][None],
        scores[None],
        size,
        activation="none",
        threshold=mask_threshold,
        weighted=True,
    )
    valid = (found.won > 0) & (found.above > 0) & overlapping(found, overlap)
    ids = _counted_on(valid, labels[None], ())
    segments = [
        {"id": segment, "label_id": label, "was_fused": False, "score": round(score, 6)}
        for segment, label, score in zip(ids[0].tolist(), labels.tolist(), scores.tolist(), strict=True)
        if segment
    ]
    return {"segmentation": paint(found.queries, ids)[0], "segments_info": segments}


def _rf_detr(
    masks: Tensor,
    classes: Tensor,
    threshold: float,
    mask_threshold: float,
    target: tuple[int, int] | None,
    binary: bool,
    top_k: int | None,
) -> dict[str, Any]:
    """Instances in the order of their scores; earlier ones are painted over later ones."""
    probs = classes.sigmoid().flatten()
    count = min(len(classes) if top_k is None else top_k, len(probs))
    scores, index = probs.topk(count)
    keep = scores > threshold
    table = list(zip((index[keep] % classes.shape[-1]).tolist(), scores[keep].tolist(), strict=True))
    queries = index[keep] // classes.shape[-1]
    size = target or (masks.shape[-2], masks.shape[-1])
    painted = torch.full(size, -1, dtype=torch.int32, device=masks.device)
    segments: list[dict[str, Any]] = []
    if not table:
        return {"segmentation": painted, "segments_info": segments, "candidates": False}

    def found(label: int, score: float) -> None:
        segments.append({"id": len(segments) + 1, "label_id": label, "score": round(score, 6)})

    logits = masks[queries].float()[None]
    if binary:
        every = mask_binarize(logits, size, threshold=mask_threshold)
        some = every.areas[0] > 0
        for (label, score), exists in zip(table, some.tolist(), strict=True):
            if exists:
                found(label, score)
        maps = every.masks[0]
        return {"segmentation": maps if bool(some.all()) else maps[some], "segments_info": segments}
    # Who paints a pixel first, in words of 32 pixels.
    words = -(-size[1] // 32) * size[0]
    free = torch.full((size[0], words // size[0]), -1, dtype=torch.int32, device=masks.device)
    news = []
    for part in logits.split(max(1, 2 * _BUDGET // words), 1):
        for bits in mask_binarize(part, size, threshold=mask_threshold, format="packed").masks[0]:
            news.append((bits & free).any())
            free &= ~bits
    chosen = torch.stack(news).nonzero()[:, 0]
    for i in chosen.tolist():
        found(*table[i])
    # The last one first, so that the first one has the last word.
    painters = list(enumerate(chosen.split(max(1, 2 * _BUDGET // math.prod(size)))))
    step = len(painters[0][1]) if painters else 0
    for part, index in reversed(painters):
        seen = mask_binarize(logits[:, index], size, threshold=mask_threshold)
        boxes = seen.boxes[0].tolist()
        for i in reversed(range(len(index))):
            left, top, right, bottom = boxes[i]
            own = painted[top:bottom, left:right]
            own.copy_(torch.where(seen.masks[0, i, top:bottom, left:right], part * step + i + 1, own))
    return {"segmentation": painted, "segments_info": segments}


def _runs(segmentation: Tensor) -> list[list[int]]:
    """Of every value of a map, in ascending order, starts from 1 and lengths of its runs, in turns."""
    pixels = segmentation.flatten()
    starts = (pixels[1:] != pixels[:-1]).nonzero()[:, 0] + 1
    starts = torch.cat([starts.new_zeros(1), starts])
    lengths = torch.diff(starts, append=starts.new_tensor([len(pixels)]))
    values = pixels[starts]
    order = values.argsort(stable=True)
    pairs = torch.stack([starts[order] + 1, lengths[order]], 1)
    counts = values.unique(return_counts=True)[1].tolist()
    return [part.flatten().tolist() for part in pairs.split(counts)]
