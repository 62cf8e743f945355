"""``use_fused_loss``: criteria of every library that is known here, replaced in place."""

from __future__ import annotations

import functools

from torch import nn

from segvit_kernels.integrations import detectron2, eomt
from segvit_kernels.integrations._masks import Replacement, assignment
from segvit_kernels.integrations.transformers import losses as transformers

# The most special one first: EoMT's criterion inherits from transformers'.
_LIBRARIES = (eomt.replacement, transformers.replacement, detectron2.replacement)
_FUNCTIONS = {
    *(eomt._losses, eomt._match, detectron2._loss_masks, detectron2._match),
    *transformers._LOSSES.values(),
    transformers._oneformer_losses,
    *transformers._MATCHES.values(),
}
_KNOWN = f"{', '.join(transformers._CRITERIA)}, {eomt._NAME}, SetCriterion"


def use_fused_loss(
    model: nn.Module, *, matcher: bool = True, points: bool = False, enabled: bool = True
) -> nn.Module:
    """Let ``model`` compute its mask losses here, at every pixel or at its own random points.

    Replaces a method of the criterion (and of its matcher) of this one model, in place; no class is touched,
    and ``state_dict`` stays as it is. ``use_fused_loss(model, enabled=False)`` gives the original back.

    * MaskFormer: focal and dice over all pixels, matched at the resolution of the masks. The same losses,
      matching and gradients as the original.
    * Mask2Former, OneFormer, EoMT, VidEoMT of transformers; ``MaskClassificationLoss`` of tue-mps/eomt and
      LightlyTrain; ``SetCriterion`` of Mask2Former, OneFormer and Mask DINO on detectron2:

      * ``points=True``: BCE and dice at the criterion's own importance-sampled points
        (:func:`~segvit_kernels.mask_loss_at_points`). With the same seed the points are the original's, and
        so are losses, matching and gradients, to rounding; no mask and no target is copied.
      * otherwise over all pixels of the upsampled mask (:func:`~segvit_kernels.mask_loss`): repeatable,
        without sampling noise. It is what the original estimates with ``importance_sample_ratio=0`` (but for
        half a cell along the border of the image, where its sampling blends in zeros). With the usual 0.75
        the original puts that share of its points where the masks are least certain, so that boundaries weigh
        more in it than in this loss: expect smaller values of both terms here, and do not take over tuned
        loss weights unseen. The supervised outputs of a step of transformers' models, auxiliary ones
        included, are one operator call (EoMT calls its criterion once per output). No mask is ever upsampled
        in memory; what remains are the matched mask logits at low resolution and one copy of the batch's
        target masks, a quarter of it if they are boolean.

    A criterion may inherit from one of these: what it overrides (``loss_labels``, ``get_num_masks``) is
    called as before. One that overrides what this replaces (``forward``, ``loss_masks``, with ``points`` the
    sampling) is refused by name, and so is a model with another criterion beside those known, which would go
    on as it was, unseen.

    Args:
        model: a model of these libraries, or a module that contains one (DDP, PEFT).
        matcher: compute the Hungarian matcher's mask costs here too, likewise at points or at every pixel
            (:func:`~segvit_kernels.mask_matching_cost`; for MaskFormer at the resolution of the masks).
            Without it the original matcher runs; Mask DINO's, which has a cost of boxes, must.
        points: keep the original's random points. Not for MaskFormer, which has none.
        enabled: ``False`` restores the original.

    Returns:
        ``model``.

    Raises:
        ValueError: ``model`` holds no criterion of these models, another beside them, or one that overrides
            what would be replaced, in its class or on the object.
        ImportError: SciPy, which solves the assignment, is not installed.
    """
    matcher, points = matcher and enabled, points and enabled  # whatever is here can be given back
    criteria = _criteria(model, matcher, points)
    assignment()
    for found in criteria:
        if points and not found.sampled:
            name = type(found.module).__name__
            raise ValueError(f"points is True; expected False for a {name}, whose loss takes every pixel")
        if matcher and isinstance(found.matcher, str):
            raise ValueError(found.matcher)
        methods = [(found.module, found.method[0]), (found.module.matcher, "forward")]
        for module, name in methods if matcher else methods[:1]:
            other = module.__dict__.get(name)
            if other is not None and getattr(other, "func", None) not in _FUNCTIONS:
                raise ValueError(
                    f"model holds a {type(module).__name__} with a {name} of its own on the object (another "
                    "library's hook, kernelize); take that away first"
                )
    for found in criteria:
        for module in (found.module, found.module.matcher):
            for name in ("forward", "loss_masks"):
                if getattr(module.__dict__.get(name), "func", None) in _FUNCTIONS:
                    delattr(module, name)
        if enabled:
            name, function = found.method
            setattr(found.module, name, functools.partial(function, found.module, points=points))
            if matcher and not isinstance(found.matcher, str):
                (name, function), own = found.matcher, found.module.matcher
                setattr(own, name, functools.partial(function, own, points=points))
    return model


def _criteria(model: nn.Module, matcher: bool, points: bool) -> list[Replacement]:
    """The criteria of ``model`` and how they are replaced."""
    known: list[Replacement] = []
    others: list[str] = []
    for module in model.modules():
        found = next((r for library in _LIBRARIES if (r := library(module, matcher, points))), None)
        if found is not None:
            known.append(found)
        elif hasattr(module, "matcher") and hasattr(module, "loss_masks"):
            others.append(type(module).__name__)
    expected = f"expected one of {_KNOWN}, or what inherits from one"
    if others:
        raise ValueError(f"model holds a {others[0]}, a criterion that is not known; {expected}")
    if not known:
        raise ValueError(f"model holds no criterion to replace; {expected}")
    return known
