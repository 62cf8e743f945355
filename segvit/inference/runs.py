"""Label maps as COCO's run lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from segvit_kernels import mask_binarize

__all__ = ["run_lengths"]


def run_lengths(labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Every class that occurs as a mask in COCO's compressed run lengths, which pycocotools decodes.

    Args:
        labels: class indices (H, W).
        names: of the classes.

    Returns:
        {"size": [H, W], "segments": [{"class": name, "index": class, "area": pixels, "counts": text}]}
    """
    height, width = labels.shape
    segments = []
    for index in np.unique(labels).tolist():
        logits = torch.from_numpy(np.where(labels == index, np.float32(1), np.float32(-1)))[None, None]
        masks = mask_binarize(logits, (height, width), format="rle")  # of one size: the mask itself
        text = masks.masks[0][0]["counts"].decode()
        area = int(masks.areas[0, 0])
        segments.append({"class": names[index], "index": index, "area": area, "counts": text})
    return {"size": [height, width], "segments": segments}
