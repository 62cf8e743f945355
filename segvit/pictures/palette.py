"""Colours of classes that are told apart by all eyes; needs NumPy alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

__all__ = ["class_palette"]

# Linear sRGB -> cone responses -> OKLab: B. Ottosson, "A perceptual color space for image processing", 2020.
_LINEAR_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LMS_TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
# Linear sRGB as a protanope and a deuteranope see it: Machado, Oliveira and Fernandes 2009, severity 1.
_PROTANOPIA = np.array(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
)
_DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)


def _appearance(colors: np.ndarray) -> np.ndarray:
    """uint8 colours (N, 3) -> (N, 9): OKLab as seen with normal, protanopic and deuteranopic vision."""
    srgb = colors / 255.0
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)

    def oklab(rgb: np.ndarray) -> np.ndarray:
        return np.cbrt(rgb.clip(0, 1) @ _LINEAR_TO_LMS.T) @ _LMS_TO_OKLAB.T

    return np.concatenate(
        [oklab(linear @ sight.T) for sight in (np.eye(3), _PROTANOPIA, _DEUTERANOPIA)], axis=1
    )


@lru_cache(maxsize=8)
def _palette(num_classes: int) -> np.ndarray:
    levels = np.linspace(0, 255, 16).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    appearance = _appearance(candidates)
    lightness, chroma = appearance[:, 0], np.hypot(appearance[:, 1], appearance[:, 2])
    readable = (lightness > 0.35) & (lightness < 0.93) & (chroma < 0.22)  # no black, white or neon
    candidates, appearance = candidates[readable], appearance[readable]
    chosen = [int(np.argmin(np.abs(candidates - (0, 119, 187)).sum(axis=1)))]
    distance = np.full(len(candidates), np.inf)
    while len(chosen) < min(num_classes, len(candidates)):
        distance = np.minimum(distance, np.square(appearance - appearance[chosen[-1]]).sum(axis=1))
        chosen.append(int(distance.argmax()))
    palette = np.resize(candidates[chosen].astype(np.uint8), (num_classes, 3))
    palette.setflags(write=False)
    return palette


def class_palette(num_classes: int) -> np.ndarray:
    """Colours, uint8 (num_classes, 3), a shorter palette being the start of a longer one.

    Every colour is the one farthest from all colours before it, where distance counts normal, protanopic and
    deuteranopic vision alike. After all that there are to choose from, some 3000, they come again.

    Raises:
        ValueError: num_classes is below 1.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; expected at least 1")
    return _palette(num_classes)
