"""The kinds of model by their decoder, and the model of a checkpoint, whatever its decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from segvit.model.linear_head import CrossEntropy, LinearSegmenter
from segvit.model.losses import SegViTLoss
from segvit.model.segvit import SegViT
from segvit.model.segvitv2 import SegViTv2, SegViTv2Loss

__all__ = ["Loss", "SegViT", "load_model", "make_loss"]

Loss = SegViTLoss | CrossEntropy
_LOSSES = {SegViT.kind: SegViTLoss, SegViTv2.kind: SegViTv2Loss}


def load_model(path: str | Path) -> SegViT:
    """The model of a checkpoint or run folder or on the Hub, of whatever kind, in evaluation mode."""
    return SegViT.from_pretrained(path)


def make_loss(
    decoder: str, num_classes: int, ignore_index: int = 255, class_weights: Sequence[float] | None = None
) -> Loss:
    """The loss of models with this decoder."""
    if decoder == LinearSegmenter.kind:
        return CrossEntropy(ignore_index, class_weights)
    return _LOSSES[decoder](num_classes, ignore_index, class_weights=class_weights)
