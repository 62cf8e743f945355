"""The kinds of model by their head, and the model of a checkpoint, whatever its head."""

from __future__ import annotations

from pathlib import Path

from segvit.model.checkpoint import find_checkpoint, read_config
from segvit.model.linear_head import LinearSegmenter
from segvit.model.segvit import SegViT

__all__ = ["load_model", "model_with"]


def model_with(head: str | None) -> type[SegViT]:
    """The class of models with this head: "linear", or the ATM decoder's "segvit" (None in config.json)."""
    return LinearSegmenter if head == LinearSegmenter.head else SegViT


def load_model(path: str | Path) -> SegViT:
    """The SegViT (or linear baseline) of a checkpoint or run folder or on the Hub, in evaluation mode."""
    folder = find_checkpoint(path)
    return model_with(read_config(folder)[1]).from_pretrained(folder)
