"""Segmentation quality from one confusion matrix."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ConfusionMatrix"]


class ConfusionMatrix:
    """Counts of (true class, predicted class) over any number of images, sizes and processes.

    `matrix` is int64 (num_classes, num_classes), rows are true classes. Pixels labelled `ignore_index` do not
    count.
    """

    def __init__(
        self, num_classes: int, ignore_index: int = 255, device: torch.device | str | None = None
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes: got {num_classes}, expected at least 1")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count integer label maps of equal shape.

        Raises:
            ValueError: the shapes differ, or a counted pixel holds a value outside 0 ... num_classes - 1.
        """
        if prediction.shape != label.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} must have one shape"
            )
        counted = label != self.ignore_index
        truth = label[counted].to(self.matrix.device, torch.int64)
        guess = prediction[counted].to(self.matrix.device, torch.int64)
        for name, values in (("label", truth), ("prediction", guess)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < self.num_classes:
                raise ValueError(
                    f"{name}: got values {int(values.min())}...{int(values.max())}, "
                    f"expected 0...{self.num_classes - 1}"
                )
        pairs = torch.bincount(truth * self.num_classes + guess, minlength=self.num_classes**2)
        self.matrix += pairs.view_as(self.matrix)

    def reduce(self) -> ConfusionMatrix:
        """Sum over the processes of the default group, if there is one; in place."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.matrix)
        return self

    def iou(self) -> Tensor:
        """Intersection over union of each class, float64 (num_classes,); NaN for classes in neither map."""
        matrix = self.matrix.double()
        hit = matrix.diagonal()
        return hit / (matrix.sum(0) + matrix.sum(1) - hit)

    @property
    def miou(self) -> float:
        """Mean of the IoU over the classes that occur in labels or predictions (NaN without any)."""
        return float(self.iou().nanmean())

    @property
    def accuracy(self) -> float:
        """Share of counted pixels that are right (NaN without any)."""
        return float(self.matrix.diagonal().sum().double() / self.matrix.sum())
