"""Label maps of mask-classification models, without a score tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit_kernels.integrations._kinds import known_base
from segvit_kernels.integrations.transformers import sam3
from segvit_kernels.ops.semantic_argmax import View, Views, semantic_argmax

# The size to which the image processor resizes the mask logits before their sigmoid.
_RESIZED: dict[str, tuple[int, int] | str | None] = {
    "MaskFormerForInstanceSegmentationOutput": None,
    "OneFormerForUniversalSegmentationOutput": None,
    "Mask2FormerForUniversalSegmentationOutput": (384, 384),
    "EomtForUniversalSegmentationOutput": "size",
    "EomtDinov3ForUniversalSegmentationOutput": "size",
    "VideomtForUniversalSegmentationOutput": None,
}


@torch.no_grad()
def post_process_semantic_segmentation(
    outputs: Any,
    target_sizes: Sequence[tuple[int, int]] | None = None,
    *,
    size: Mapping[str, int | None] | None = None,
    direct: bool = False,
    threshold: float | None = None,
) -> list[Tensor]:
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

    Returns:
        One (height, width) int64 map per image.

    Unlike the image processors, this does not smooth where the target is smaller than OneFormer's masks
    (theirs resizes with antialiasing), and gives no scores.

    Raises:
        TypeError: ``outputs`` is of none of these models, or has no such logits.
        ValueError: ``target_sizes`` or ``size`` is missing or does not fit the outputs.
    """
    if sam3.is_sam3(outputs):
        if size is not None or direct:
            option = "direct is True" if direct else f"size is {size}"
            raise ValueError(f"{option}; expected none for SAM 3")
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
    masks = outputs.masks_queries_logits
    class_probs = outputs.class_queries_logits.softmax(-1)[..., :-1]
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
        if windows:
            spans = [windows[i][1:] for i in members]
            tokens, views = _window_views(tokens, spans, target, stitch=not direct)
        labels = semantic_argmax(
            tokens, class_probs[chosen], target, views=views, activation="sigmoid" if direct else "none"
        )
        maps.append(cast(Tensor, labels)[0].long())
    return maps


def _window_views(
    tokens: Tensor, spans: list[tuple[int, int]], target: tuple[int, int], *, stitch: bool
) -> tuple[Tensor, Views]:
    """The windows of one image, ``spans`` of its longer side, as views of its target.

    Without ``stitch`` a pixel of the target takes the mean of the windows around it. The image processor
    takes the mean on the grid of its input and interpolates that, across the edges of windows too. To get
    this from views, every window is divided by how many cover its rows and set between zeros, into which its
    interpolation fades. (The mean over views then divides the scores of a pixel once more, and the zeros at
    the edge of the image scale them too, but all of a pixel's scores alike: the best stays the best.)
    """
    side, length = spans[0][1] - spans[0][0], max(end for _, end in spans)
    if abs(side * max(target) / min(target) - length) > 1:  # to rounding, how the image processor resized
        raise ValueError(f"target_sizes has {target}; its windows are those of an image of {side} × {length}")
    tall = target[0] > target[1]
    margin = 0
    if stitch:
        cover = tokens.new_zeros(length)
        for start, end in spans:
            cover[start:end] += 1
        share = torch.stack([1 / cover[start:end] for start, end in spans])
        tokens *= share[:, None, :, None] if tall else share[:, None, None, :]
        tokens = F.pad(tokens, (0, 0, 1, 1) if tall else (1, 1, 0, 0))
        margin = 1
    views = [
        View.crop(
            0,
            target,
            resized=(length, side) if tall else (side, length),
            top=start - margin if tall else 0,
            left=0 if tall else start - margin,
            crop=(side + 2 * margin, side) if tall else (side, side + 2 * margin),
            grid=(tokens.shape[-2], tokens.shape[-1]),
        )
        for start, _ in spans
    ]
    return tokens, Views(views, batch=1, size=target, device=tokens.device)
