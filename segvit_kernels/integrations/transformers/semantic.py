"""Label maps of mask-classification models, without a score tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit_kernels.integrations._kinds import known_base
from segvit_kernels.integrations._windows import check_windows, window_views
from segvit_kernels.integrations.transformers import sam3
from segvit_kernels.ops._checks import flag
from segvit_kernels.ops.semantic_argmax import semantic_argmax, semantic_argmax_reference

# The size to which the image processor resizes the mask logits before their sigmoid.
_RESIZED: dict[str, tuple[int, int] | str | None] = {
    "MaskFormerForInstanceSegmentationOutput": None,
    "OneFormerForUniversalSegmentationOutput": None,
    "Mask2FormerForUniversalSegmentationOutput": (384, 384),
    "EomtForUniversalSegmentationOutput": "size",
    "EomtDinov3ForUniversalSegmentationOutput": "size",
    "VideomtForUniversalSegmentationOutput": None,
}
_IN_FLOAT32 = "VideomtForUniversalSegmentationOutput"  # whatever the dtype of the logits


@torch.no_grad()
def post_process_semantic_segmentation(
    outputs: Any,
    target_sizes: Sequence[tuple[int, int]] | None = None,
    *,
    size: Mapping[str, int | None] | None = None,
    direct: bool = False,
    threshold: float | None = None,
    return_segmentation_scores: bool = False,
) -> list[Any]:
    """The label maps of the image processor's method of the same name, without a score tensor.

    The score of a class is Σ_q p[q, c] · σ(mask_q) (MaskFormer, NeurIPS 2021, section 3.4). The image
    processors mix it at an intermediate resolution (MaskFormer, OneFormer, VidEoMT: the masks' own;
    Mask2Former: 384×384; EoMT: the size of its input) and interpolate the C score maps to the target.
    Interpolation is linear, so that interpolating the Q probability maps inside the mixing gives the same
    scores: the labels are those of the image processor, except where two scores tie to rounding. What remains
    in memory are one image's probability maps at the intermediate resolution, (Q, 384, 384) for Mask2Former,
    in place of (C, 384, 384) for the batch and (C, H, W).

    Args:
        outputs: what the model returned, with ``class_queries_logits`` (B, Q, C + 1) and
            ``masks_queries_logits`` (B, Q, h, w); for an EoMT model with ``patch_offsets`` too, whose B
            counts windows. Its class is one of transformers' or inherits from one; with ``direct`` it may be
            any.
        target_sizes: (height, width) of every image. Without them the maps have the intermediate resolution;
            EoMT needs them.
        size: EoMT without windows only: the ``size`` of its image processor.
        direct: interpolate the mask logits straight to the target and take the sigmoid there, as SegViT does.
            No intermediate resolution, and nothing of full resolution but the labels. Sharper edges than the
            image processor's, and so other labels near them.
        threshold: SAM 3 only: the probability above which a pixel belongs to the prompt; 0.5 unless given.
        return_segmentation_scores: also give all scores, which takes the memory and the time of the image
            processor; ``semantic_argmax(..., return_probabilities=k)`` gives the best few without.

    Returns:
        One (height, width) int64 map per image. With ``return_segmentation_scores`` transformers'
        ``SemanticSegmentationPostProcessorOutput``: ``segmentation``, the map, and ``segmentation_scores``
        (classes, height, width), of which it is the argmax.

    Unlike the image processors, this does not smooth where the target is smaller than OneFormer's masks
    (theirs resizes with antialiasing).

    Raises:
        TypeError: ``outputs`` is of none of these models, or has no such logits.
        ValueError: ``target_sizes`` or ``size`` is missing or does not fit the outputs; scores of SAM 3.
        ImportError: scores are asked for and transformers has no such output.
    """
    scored = _scored_output() if flag("return_segmentation_scores", return_segmentation_scores) else None
    if sam3.is_sam3(outputs):
        if size is not None or direct:
            option = "direct is True" if direct else f"size is {size}"
            raise ValueError(f"{option}; expected none for SAM 3")
        if scored:
            raise ValueError("return_segmentation_scores is True; expected False for SAM 3")
        return sam3.semantic(outputs, threshold, target_sizes)
    if threshold is not None:
        raise ValueError(f"threshold is {threshold}; expected None for a {type(outputs).__name__}")
    name, base = type(outputs).__name__, known_base(type(outputs), _RESIZED)
    if not all(hasattr(outputs, field) for field in ("class_queries_logits", "masks_queries_logits")):
        base = None
    elif base is None and direct:
        base = type(outputs)
    if base is None:
        raise TypeError(
            f"outputs is a {name}; expected one of {', '.join(_RESIZED)}, or with direct=True anything that "
            "has class_queries_logits and masks_queries_logits"
        )
    masks, classes = outputs.masks_queries_logits, outputs.class_queries_logits
    if base.__name__ == _IN_FLOAT32:
        masks, classes = masks.float(), classes.float()
    class_probs = classes.softmax(-1)[..., :-1]
    windows: list[tuple[int, int, int]] = []
    for image, start, end in getattr(outputs, "patch_offsets", None) or ():
        windows.append((int(image), int(start), int(end)))
    images = 1 + max(image for image, _, _ in windows) if windows else len(masks)

    resized: tuple[int, int] | None = None
    found = _RESIZED.get(base.__name__)
    if isinstance(found, tuple):
        resized = found
    if size is not None and found != "size":
        raise ValueError(f"size is {size}; expected None for a {name}, it is for EoMT only")
    if found == "size":
        if target_sizes is None:
            raise ValueError("target_sizes is None; expected the (height, width) of every image for EoMT")
        if windows:
            resized = (windows[0][2] - windows[0][1],) * 2
        elif size is not None:
            shortest = int(size["shortest_edge"] or 0)
            resized = (shortest, size["longest_edge"] or shortest)
        elif not direct:
            raise ValueError("size is None; expected the image processor's for EoMT: size=processor.size")
    if target_sizes is None:
        whole = resized or (masks.shape[-2], masks.shape[-1])
        if scored:
            return [
                scored(
                    _mixed(F.interpolate(own[None], whole, mode="bilinear").sigmoid_(), probs[None], whole)
                )
                for own, probs in zip(masks, class_probs, strict=True)
            ]
        return list(cast(Tensor, semantic_argmax(masks, class_probs, whole)).long())
    if len(target_sizes) != images:
        raise ValueError(f"target_sizes has length {len(target_sizes)}; expected {images}, one per image")

    maps = []
    for image, (height, width) in enumerate(target_sizes):
        target = (int(height), int(width))
        members, views = [i for i, window in enumerate(windows) if window[0] == image], None
        chosen = members if windows else slice(image, image + 1)
        tokens = masks[chosen]
        if not direct:
            tokens = (
                F.interpolate(tokens, resized, mode="bilinear").sigmoid_() if resized else tokens.sigmoid()
            )
        spans = [windows[i][1:] for i in members] if windows else []
        if scored and not direct:
            maps.append(scored(_mixed(tokens, class_probs[chosen], target, spans)))
            continue
        if windows:
            tokens, views = window_views(tokens, spans, target, stitch=not direct)
        if scored:
            _, scores = semantic_argmax_reference(tokens, class_probs[chosen], target, views=views)
            maps.append(scored(scores[0]))
            continue
        labels = semantic_argmax(
            tokens, class_probs[chosen], target, views=views, activation="sigmoid" if direct else "none"
        )
        maps.append(cast(Tensor, labels)[0].long())
    return maps


def _scored_output() -> Callable[[Tensor], Any]:
    """What makes transformers' output of scores (classes, height, width)."""
    try:
        from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput as Output
    except ImportError:
        raise ImportError(
            "return_segmentation_scores needs a transformers whose image processors have it: "
            "pip install -U transformers"
        ) from None
    return lambda scores: Output(data={"segmentation": scores.argmax(0), "segmentation_scores": scores})


def _mixed(
    tokens: Tensor, class_probs: Tensor, target: tuple[int, int], spans: Sequence[tuple[int, int]] = ()
) -> Tensor:
    """Scores (classes, height, width) of one image, mixed where its masks are and then interpolated.

    ``spans``: of its windows along its longer side, whose mean is taken first.
    """
    scores = torch.einsum("nqc,nqhw->nchw", class_probs, tokens)
    if spans:
        side, length = check_windows(spans, target)
        tall = target[0] > target[1]
        total = scores.new_zeros(scores.shape[1], *((length, side) if tall else (side, length)))
        cover = scores.new_zeros(length)
        for own, (start, end) in zip(scores, spans, strict=True):
            total.narrow(1 if tall else 2, start, end - start).add_(own)
            cover[start:end] += 1
        scores = (total / (cover[:, None] if tall else cover))[None]
    return F.interpolate(scores, target, mode="bilinear")[0]
