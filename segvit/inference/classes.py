"""Names and colours of a model's classes, also where it has none."""

from __future__ import annotations

import numpy as np

from segvit.config import SegViTConfig
from segvit.pictures.palette import class_palette

__all__ = ["class_colors", "class_names"]


def class_names(config: SegViTConfig) -> tuple[str, ...]:
    """The model's class names, or "class 0", "class 1", … where it has none."""
    return config.class_names or tuple(f"class {index}" for index in range(config.num_classes))


def class_colors(config: SegViTConfig) -> np.ndarray:
    """The model's palette, or `segvit.pictures.palette.class_palette`; uint8 (num_classes, 3)."""
    return class_palette(config.num_classes) if config.palette is None else np.array(config.palette, np.uint8)
