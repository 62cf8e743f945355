"""Evaluation: label maps at every image's own size, one confusion matrix, each image counted once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch

from segvit.options import InferenceOptions
from segvit.system.text import numbered
from segvit.training.loading import batches, collate_by_size
from segvit.training.metrics import ConfusionMatrix

__all__ = ["evaluate", "without_nan"]


class Evaluated(Protocol):
    """What is asked of a model: that it predicts, and what every module has."""

    training: bool

    def predict(self, images: torch.Tensor, options: InferenceOptions | None) -> Any:
        """Label maps (B, H, W) of uint8 images (B, channels, H, W)."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Of which the first says where images go."""

    def train(self, mode: bool = True) -> Any:
        """Into training, or out of it."""


class Labelled(Protocol):
    """What is asked of a data set: items {"image", "label", "name"}, and their classes."""

    @property
    def num_classes(self) -> int: ...

    @property
    def ignore_index(self) -> int: ...

    @property
    def class_names(self) -> Sequence[str] | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def evaluate(
    model: Evaluated,
    dataset: Labelled,
    *,
    fabric: Any = None,
    batch_size: int = 1,
    workers: int = 0,
    options: InferenceOptions | None = None,
    on_images: Callable[[int], None] | None = None,
    details: bool = False,
) -> dict[str, Any]:
    """mIoU of a model over a dataset.

    Process r of R reads images r, r + R, ...: every image counts once, whatever R is. The model is put into
    evaluation mode and back.

    Args:
        model: has `predict(uint8 (B, 3, H, W), options) -> label maps (B, H, W)`.
        dataset: items {"image", "label", "name"} (see `segvit.data.SegmentationFolder`), with `num_classes`,
            `ignore_index` and `class_names`.
        fabric: the `lightning_fabric.Fabric` of the run, for its processes and precision; None: this process.
        batch_size: images of equal size that are predicted together.
        workers: data loading processes.
        options: sliding window, scales, mirroring; by default the whole image at once.
        on_images: called with the number of images after each batch.
        details: more than the IoU.

    Returns:
        {"miou", "accuracy", "images", "iou": {class: IoU or None if absent}}; with `details` also "dice",
        "precision", "recall" by class (None where there is nothing to divide by), their means over the
        classes that have one ("mean_dice", ...), "frequency_weighted_iou", "pixels" labelled and "predicted"
        by class, "ignored" pixels and the matrix of pixel counts "confusion", a row for each true class.
    """
    rank, world = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)
    device = next(model.parameters(), torch.empty(0)).device  # an exported file has none
    confusion = ConfusionMatrix(dataset.num_classes, dataset.ignore_index, device)
    seen, ignored = torch.zeros(2, 1, dtype=torch.int64, device=device)
    own = list(range(rank, len(dataset), world))
    sampler = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
    was_training = model.training
    model.train(False)
    try:
        with torch.inference_mode(), fabric.autocast() if fabric else nullcontext():
            for groups in batches(dataset, sampler, workers, collate_by_size, pin=False):
                for batch in groups:
                    if isinstance(batch, Exception):
                        raise batch
                    prediction = _predicted(model, batch["image"].to(device), options)
                    confusion.update(prediction.to(device), batch["label"].to(device))
                    seen += len(prediction)
                    ignored += (batch["label"] == dataset.ignore_index).sum().to(device)
                    if on_images:
                        on_images(len(prediction))
    finally:
        model.train(was_training)
    confusion.reduce()
    if world > 1:
        torch.distributed.all_reduce(seen)
        torch.distributed.all_reduce(ignored)
    names = numbered(dataset.class_names or [f"class {i}" for i in range(dataset.num_classes)])

    def by_class(values: torch.Tensor) -> dict[str, Any]:
        return {name: without_nan(value) for name, value in zip(names, values.tolist(), strict=True)}

    result = {
        "miou": confusion.miou,
        "accuracy": confusion.accuracy,
        "images": int(seen),
        "iou": by_class(confusion.iou()),
    }
    if details:
        for name in ("dice", "precision", "recall"):
            values = getattr(confusion, name)()
            result |= {f"mean_{name}": float(values.nanmean()), name: by_class(values)}
        result |= {
            "frequency_weighted_iou": confusion.frequency_weighted_iou,
            "pixels": by_class(confusion.support),
            "predicted": by_class(confusion.predicted),
            "ignored": int(ignored),
            "confusion": confusion.matrix.tolist(),
        }
    return result


def _predicted(model: Evaluated, images: torch.Tensor, options: InferenceOptions | None) -> torch.Tensor:
    """Label maps; where memory is too small for all images at once, one by one."""
    try:
        return torch.as_tensor(model.predict(images, options))
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise
    # Not in the handler: there the error still holds what the network has allocated.
    torch.cuda.empty_cache()
    return torch.cat([torch.as_tensor(model.predict(image, options)) for image in images.split(1)])


def without_nan(value: Any) -> Any:
    """None in place of NaN, which JSON does not have."""
    return None if isinstance(value, float) and math.isnan(value) else value
