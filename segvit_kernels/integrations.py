"""Hugging Face's mask-classification models on these operators: MaskFormer, Mask2Former, OneFormer, EoMT.

    from segvit_kernels.integrations import post_process_semantic_segmentation, use_fused_loss

    model = use_fused_loss(Mask2FormerForUniversalSegmentation.from_pretrained(...))   # training
    maps = post_process_semantic_segmentation(model(**inputs), target_sizes)           # inference

Nothing here imports ``transformers``: outputs and criteria are known by the names of their classes. What a
model of it needs comes with ``pip install 'segvit-kernels[transformers]'``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit_kernels.ops.mask_loss import mask_loss, mask_matching_cost
from segvit_kernels.ops.semantic_argmax import View, Views, semantic_argmax

__all__ = ["post_process_semantic_segmentation", "use_fused_loss"]

# The size to which the image processor resizes the mask logits before their sigmoid.
_RESIZED = {
    "MaskFormerForInstanceSegmentationOutput": None,
    "OneFormerForUniversalSegmentationOutput": None,
    "Mask2FormerForUniversalSegmentationOutput": (384, 384),
    "EomtForUniversalSegmentationOutput": "size",
    "EomtDinov3ForUniversalSegmentationOutput": "size",
}
# The mask term beside dice.
_CRITERIA = {
    "MaskFormerLoss": "focal",
    "Mask2FormerLoss": "bce",
    "OneFormerLoss": "bce",
    "EomtLoss": "bce",
    "EomtDinov3Loss": "bce",
}


@torch.no_grad()
def post_process_semantic_segmentation(
    outputs: Any,
    target_sizes: Sequence[tuple[int, int]] | None = None,
    *,
    size: Mapping[str, int | None] | None = None,
    direct: bool = False,
) -> list[Tensor]:
    """The label maps of the image processor's method of the same name, without a score tensor.

    The score of a class is Σ_q p[q, c] · σ(mask_q) (MaskFormer, NeurIPS 2021, section 3.4). The image
    processors mix it at an intermediate resolution (MaskFormer, OneFormer: the masks' own; Mask2Former:
    384×384; EoMT: the size of its input) and interpolate the C score maps to the target. Interpolation is
    linear, so that interpolating the Q probability maps inside the mixing gives the same scores: the labels
    are those of the image processor, except where two scores tie to rounding. What remains in memory are one
    image's probability maps at the intermediate resolution, (Q, 384, 384) for Mask2Former, in place of
    (C, 384, 384) for the batch and (C, H, W).

    Args:
        outputs: what the model returned, with ``class_queries_logits`` (B, Q, C + 1) and
            ``masks_queries_logits`` (B, Q, h, w); for an EoMT model with ``patch_offsets`` too, whose B
            counts windows.
        target_sizes: (height, width) of every image. Without them the maps have the intermediate resolution;
            EoMT needs them.
        size: EoMT without windows only: the ``size`` of its image processor.
        direct: interpolate the mask logits straight to the target and take the sigmoid there, as SegViT does.
            No intermediate resolution, and nothing of full resolution but the labels. Sharper edges than the
            image processor's, and so other labels near them.

    Returns:
        One (height, width) int64 map per image.

    Unlike the image processors, this does not smooth where the target is smaller than OneFormer's masks
    (theirs resizes with antialiasing), and gives no scores.

    Raises:
        TypeError: ``outputs`` is of none of these models.
        ValueError: ``target_sizes`` or ``size`` is missing or does not fit the outputs.
    """
    name = type(outputs).__name__
    if name not in _RESIZED:
        raise TypeError(f"outputs is a {name}; expected one of {', '.join(_RESIZED)}")
    masks = outputs.masks_queries_logits
    class_probs = outputs.class_queries_logits.softmax(-1)[..., :-1]
    windows = [tuple(map(int, window)) for window in getattr(outputs, "patch_offsets", None) or ()]
    images = 1 + max(image for image, _, _ in windows) if windows else len(masks)

    resized = _RESIZED[name]
    if size is not None and resized != "size":
        raise ValueError(f"size is {size}; expected None for a {name}, it is for EoMT only")
    if resized == "size":
        if target_sizes is None:
            raise ValueError("target_sizes is None; expected the (height, width) of every image for EoMT")
        if windows:
            resized = (windows[0][2] - windows[0][1],) * 2
        elif size is not None:
            resized = (size["shortest_edge"], size["longest_edge"] or size["shortest_edge"])
        elif not direct:
            raise ValueError("size is None; expected the image processor's for EoMT: size=processor.size")
    if target_sizes is None:
        return list(semantic_argmax(masks, class_probs, resized or masks.shape[-2:]).long())
    if len(target_sizes) != images:
        raise ValueError(f"target_sizes has length {len(target_sizes)}; expected {images}, one per image")

    maps = []
    for image, (height, width) in enumerate(target_sizes):
        target = (int(height), int(width))
        chosen = [i for i, w in enumerate(windows) if w[0] == image] if windows else slice(image, image + 1)
        tokens, views = masks[chosen], None
        if not direct:
            tokens = (
                F.interpolate(tokens, resized, mode="bilinear").sigmoid_() if resized else tokens.sigmoid()
            )
        if windows:
            spans = [windows[i][1:] for i in chosen]
            tokens, views = _window_views(tokens, spans, target, stitch=not direct)
        labels = semantic_argmax(
            tokens, class_probs[chosen], target, views=views, activation="sigmoid" if direct else "none"
        )
        maps.append(labels[0].long())
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
    margin, grid = 0, tokens.shape[-2:]
    if stitch:
        cover = tokens.new_zeros(length)
        for start, end in spans:
            cover[start:end] += 1
        share = torch.stack([1 / cover[start:end] for start, end in spans])
        tokens *= share[:, None, :, None] if tall else share[:, None, None, :]
        tokens = F.pad(tokens, (0, 0, 1, 1) if tall else (1, 1, 0, 0))
        margin, grid = 1, tokens.shape[-2:]
    views = [
        View.crop(
            0,
            target,
            resized=(length, side) if tall else (side, length),
            top=start - margin if tall else 0,
            left=0 if tall else start - margin,
            crop=(side + 2 * margin, side) if tall else (side, side + 2 * margin),
            grid=tuple(grid),
        )
        for start, _ in spans
    ]
    return tokens, Views(views, batch=1, size=target, device=tokens.device)


def use_fused_loss(model: nn.Module, *, matcher: bool = True, enabled: bool = True) -> nn.Module:
    """Let ``model`` compute its mask losses with :func:`~segvit_kernels.mask_loss`, at full resolution.

    Replaces the ``forward`` of the criterion (and of its matcher) of this one model, in place; no class is
    touched, and ``state_dict`` stays as it is. ``use_fused_loss(model, enabled=False)`` gives the original
    back. The supervised outputs of a step, auxiliary ones included, are one operator call (EoMT calls its
    criterion once per output). No mask is ever upsampled in memory; what remains are the matched mask logits
    at low resolution and one copy of the batch's target masks, a quarter of it if they are boolean.

    * MaskFormer: focal and dice over all pixels, matched at the resolution of the masks. The same losses,
      matching and gradients as the original.
    * Mask2Former, OneFormer, EoMT: binary cross-entropy and dice over all pixels of the upsampled mask, where
      the original samples ``train_num_points`` points: repeatable, without sampling noise. It is what the
      original estimates with ``importance_sample_ratio=0`` (but for half a cell along the border of the
      image, where its sampling blends in zeros). With the usual 0.75 the original puts that share of its
      points where the masks are least certain, so that boundaries weigh more in it than in this loss: expect
      smaller values of both terms here, and do not take over tuned loss weights unseen.

    Args:
        model: a model of transformers, or a module that contains one (DDP, PEFT).
        matcher: compute the Hungarian matcher's mask costs with
            :func:`~segvit_kernels.mask_matching_cost` too, for Mask2Former, OneFormer and EoMT over all
            pixels. Without it the original matcher runs, with its ``train_num_points`` random points.
        enabled: ``False`` restores the original.

    Returns:
        ``model``.

    Raises:
        ValueError: ``model`` holds no criterion of these models.
        ImportError: SciPy, which solves the assignment, is not installed.
    """
    criteria = [module for module in model.modules() if type(module).__name__ in _CRITERIA]
    if not criteria:
        raise ValueError(f"model holds no criterion to replace; expected one of {', '.join(_CRITERIA)}")
    _assignment()
    for criterion in criteria:
        term = _CRITERIA[type(criterion).__name__]
        for module in (criterion, criterion.matcher):
            if getattr(module.__dict__.get("forward"), "func", None) in (_losses, _match):
                del module.forward
        if enabled:
            criterion.forward = functools.partial(_losses, criterion, term)
            if matcher:
                criterion.matcher.forward = functools.partial(_match, criterion.matcher, term)
    return model


def _assignment() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed; it comes with: pip install 'segvit-kernels[transformers]'"
        ) from None
    return linear_sum_assignment


@torch.no_grad()
def _match(
    matcher: nn.Module,
    term: str,
    masks_queries_logits: Tensor,
    class_queries_logits: Tensor,
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """``matcher.forward``: per image the matched queries and their targets, both (min(Q, M),) int64."""
    costs = []
    for masks, classes, targets, labels in zip(
        masks_queries_logits, class_queries_logits, mask_labels, class_labels, strict=True
    ):
        cost = -matcher.cost_class * classes.float().softmax(-1)[:, labels]
        if len(labels):
            targets = targets.to(masks.device)
            if term == "focal":
                targets = F.interpolate(targets[:, None].float(), masks.shape[-2:], mode="nearest")[:, 0]
            pairwise = mask_matching_cost(masks[None], targets[None])
            cost += matcher.cost_mask * getattr(pairwise, term)[0] + matcher.cost_dice * pairwise.dice[0]
        largest = torch.finfo(cost.dtype).max
        costs.append(cost.nan_to_num(nan=largest, posinf=largest, neginf=largest))
    solve = _assignment()
    return [tuple(torch.as_tensor(index) for index in solve(cost.cpu())) for cost in costs]


def _losses(
    criterion: nn.Module,
    term: str,
    masks_queries_logits: Tensor,
    class_queries_logits: Tensor,
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
    auxiliary_predictions: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    contrastive_queries_logits: Tensor | None = None,
    text_queries: Tensor | None = None,
    calculate_contrastive_loss: bool = False,
) -> dict[str, Tensor]:
    """``criterion.forward``: the unweighted losses by name; those of auxiliary output i end in ``_i``."""
    auxiliary = auxiliary_predictions or ()
    masks = [masks_queries_logits, *(output["masks_queries_logits"] for output in auxiliary)]
    classes = [class_queries_logits, *(output["class_queries_logits"] for output in auxiliary)]
    matchings = [
        criterion.matcher(m, c, mask_labels, class_labels) for m, c in zip(masks, classes, strict=True)
    ]
    num_masks = criterion.get_num_masks(class_labels, device=class_labels[0].device)

    terms = _mask_terms(masks, mask_labels, matchings, term)
    losses = {}
    for i, ((mask, dice), logits, matching) in enumerate(zip(terms, classes, matchings, strict=True)):
        suffix = f"_{i - 1}" if i else ""
        losses[f"loss_mask{suffix}"] = mask / num_masks
        losses[f"loss_dice{suffix}"] = dice / num_masks
        for key, value in criterion.loss_labels(logits, class_labels, matching).items():
            losses[f"{key}{suffix}"] = value
    if calculate_contrastive_loss:
        losses.update(criterion.loss_contrastive(contrastive_queries_logits, text_queries))
    return losses


def _mask_terms(
    masks: list[Tensor], mask_labels: Sequence[Tensor], matchings: list, term: str
) -> list[tuple[Tensor, Tensor]]:
    """For every output the sums of the mask term and of dice over its matched pairs.

    Each output has a matching of its own, and there are fewer targets than queries: all targets of the batch
    become the targets of one image, and every output brings the query that it matched to each of them.
    """
    device = masks[0].device
    counts = [len(targets) for targets in mask_labels]
    images = torch.repeat_interleave(torch.tensor(counts)).to(device)
    queries = torch.zeros(len(masks), sum(counts), dtype=torch.int64)
    matched = torch.zeros(len(masks), sum(counts))  # 0 where an image has more targets than queries
    for i, matching in enumerate(matchings):
        for first, (query, target) in zip(itertools.accumulate([0, *counts]), matching, strict=False):
            queries[i, first + target] = query
            matched[i, first + target] = 1
    pairs = [logits[images, query] for logits, query in zip(masks, queries.to(device), strict=True)]
    if not sum(counts):
        # Zeros that keep the graph: no parameter drops out of the backward of an image without targets.
        return [(pair.sum(), pair.sum()) for pair in pairs]

    height, width = (max(targets.shape[axis] for targets in mask_labels) for axis in (1, 2))
    targets = [targets.to(device) for targets in mask_labels]
    if any(t.shape[1:] != (height, width) for t in targets):  # an F.pad by nothing would copy
        targets = [F.pad(t, (0, width - t.shape[2], 0, height - t.shape[1])) for t in targets]
    losses = mask_loss([pair[None] for pair in pairs], torch.cat(targets)[None], reduction="none")
    return [
        ((mask[0] * weight).sum(), (dice[0] * weight).sum())
        for mask, dice, weight in zip(getattr(losses, term), losses.dice, matched.to(device), strict=True)
    ]
