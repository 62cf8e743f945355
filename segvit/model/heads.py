"""The kinds of model by their decoder, and the model of a checkpoint, whatever its decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from segvit.config import SegViTConfig
from segvit.model.eomt import EoMT
from segvit.model.eomt_loss import EoMTLoss
from segvit.model.linear_head import CrossEntropy, LinearSegmenter
from segvit.model.losses import SegViTLoss
from segvit.model.segvit import SegViT
from segvit.model.segvitv2 import SegViTv2, SegViTv2Loss

__all__ = ["Loss", "SegViT", "load_model", "make_loss"]

Loss = SegViTLoss | CrossEntropy | EoMTLoss


def load_model(path: str | Path) -> SegViT:
    """The model of a checkpoint or run folder or on the Hub, of whatever kind, in evaluation mode."""
    return SegViT.from_pretrained(path)


def make_loss(
    config: SegViTConfig, ignore_index: int = 255, class_weights: Sequence[float] | None = None
) -> Loss:
    """The loss of a model's decoder.

    Raises:
        ImportError: it needs a package that is not installed.
    """
    classes = config.num_classes
    if config.decoder == LinearSegmenter.kind:
        return CrossEntropy(ignore_index, class_weights)
    if config.decoder == EoMT.kind:
        return EoMTLoss(classes, config.queries, ignore_index, class_weights=class_weights)
    kind = SegViTv2Loss if config.decoder == SegViTv2.kind else SegViTLoss
    return kind(classes, ignore_index, class_weights=class_weights)
