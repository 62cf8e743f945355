"""Weights of the classes in the loss, from how often each occurs in the training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segvit.options import TrainConfig
from segvit.system.files import atomic_write
from segvit.system.progress import progress_bar
from segvit.system.text import read_json


def inverse_sqrt_weights(pixels: Tensor) -> list[float]:
    """Class weights from the number of pixels of each class (N,): 1 / sqrt(share), their mean 1.

    A class without a pixel has weight 1.
    """
    found = pixels > 0
    weights = torch.ones(len(pixels), dtype=torch.float64)
    weights[found] = pixels[found].double().rsqrt()
    weights[found] /= weights[found].mean()
    return weights.tolist()


def count_and_weight(config: TrainConfig, training: Any) -> list[float]:
    """The weights of a run: from the pixels counted when it began."""
    path = Path(config.out) / "pixels.json"
    if config.resume and path.is_file():
        return inverse_sqrt_weights(torch.tensor(read_json(path, list)))
    pixels = torch.zeros(training.num_classes, dtype=torch.int64)
    with progress_bar(config.progress) as bar:
        for item in bar.track(range(len(training)), description="count pixels"):
            label = training[item]["label"]
            counted = label[label != training.ignore_index]
            pixels += counted.bincount(minlength=training.num_classes)
    if not pixels.any():
        raise ValueError("class_weights: no pixel of the training data has a class")
    atomic_write(path, lambda temporary: temporary.write_text(json.dumps(pixels.tolist()) + "\n"))
    return inverse_sqrt_weights(pixels)
