"""Similarity maps of a model at an image's own size."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from segvit.inference.protocol import Predictor


def similarity_maps(
    model: Predictor, image: torch.Tensor, classes: Sequence[int]
) -> tuple[list[np.ndarray], np.ndarray]:
    """What the decoder saw in one image, at the image's own size.

    Args:
        model: in evaluation mode.
        image: uint8 (C, H, W).
        classes: indices of the K classes to return.

    Returns:
        Similarity maps float (K, H, W) of each stage in running order, before accumulation, and the mask
        logits (K, H, W): their sum as the decoder has it, or the last map where masks are not accumulated
        (up-sampled models).
    """
    height, width = image.shape[-2:]
    padded = model.pad_to_patches(model.preprocess(image[None]))
    stages = [maps[:, list(classes)].float() for maps in model.similarity_maps(padded)]
    mask = stages[-1] if model.config.upsample else functools.reduce(_added, stages)

    def whole(maps: torch.Tensor) -> np.ndarray:
        return _enlarged(maps, padded.shape[-2:])[0, :, :height, :width].cpu().numpy()

    return [whole(maps) for maps in stages], whole(mask)


def _added(mask: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """As the decoder does it: on the grid of the later stage, which is finer where the backbone shrinks."""
    return _enlarged(mask, maps.shape[-2:]) + maps


def _enlarged(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
