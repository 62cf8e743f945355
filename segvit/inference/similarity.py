"""Similarity maps of a model at an image's own size."""

from __future__ import annotations

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
        logits (K, H, W): their sum, or the last map where masks are not accumulated (up-sampled models).
    """
    height, width = image.shape[-2:]
    padded = model.pad_to_patches(model.preprocess(image[None]))
    stages = []
    for maps in model.similarity_maps(padded):
        chosen = maps[:, list(classes)].float()
        enlarged = F.interpolate(chosen, size=padded.shape[-2:], mode="bilinear", align_corners=False)
        stages.append(enlarged[0, :, :height, :width].cpu().numpy())
    return stages, stages[-1] if model.config.upsample else np.sum(stages, axis=0)
