"""Pictures for an exported file: to calibrate it on, and to see whether its labels are the model's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from segvit.config import SegViTConfig
from segvit.data import read_image
from segvit.data.find import find_images
from segvit.exporting.exported import ExportedModel
from segvit.exporting.graph import Plan
from segvit.inference.passes import resize
from segvit.model.segvit import SegViT

__all__ = ["agreement", "sample"]


def sample(folder: str, config: SegViTConfig, plan: Plan, count: int) -> tuple[Tensor, ...]:
    """Up to `count` pictures of a folder, evenly spread: uint8 (B, channels, H, W) as a plan takes them.

    Resized to the plan's size if it has one. In a batch there is one picture, repeated.

    Raises:
        FileNotFoundError, ValueError: there are none, or one cannot be read.
    """
    files = find_images([folder])
    found = []
    for index in range(min(count, len(files))):
        picture = read_image(files[index * len(files) // min(count, len(files))], **config.reading)[None]
        if plan.size is not None:
            picture = resize(picture.float(), plan.size).round().clamp(0, 255).to(torch.uint8)
        found.append(picture.expand(plan.batch or 1, -1, -1, -1).contiguous())
    return tuple(found)


def agreement(model: SegViT, exported: ExportedModel, pictures: Sequence[Tensor]) -> float:
    """The share of pixels to which an exported file gives the label that the model gives."""
    same = total = 0
    for picture in pictures:
        labels = model.predict(picture[:1], exported.plan.options)
        equal = exported.predict(picture)[:1] == labels.cpu()
        same, total = same + int(equal.sum()), total + equal.numel()
    return same / total
