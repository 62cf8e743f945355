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

    @property
    def support(self) -> Tensor:
        """Labelled pixels of each class, int64 (num_classes,)."""
        return self.matrix.sum(1)

    @property
    def predicted(self) -> Tensor:
        """Counted pixels predicted as each class, int64 (num_classes,)."""
        return self.matrix.sum(0)

    def _ratio(self, factor: int, total: Tensor) -> Tensor:
        return factor * self.matrix.diagonal().double() / total.double()

    def iou(self) -> Tensor:
        """Intersection over union of each class, float64 (num_classes,); NaN for classes in neither map."""
        return self._ratio(1, self.predicted + self.support - self.matrix.diagonal())

    def dice(self) -> Tensor:
        """Dice coefficient, or F1 score, of each class, float64; NaN for classes in neither map."""
        return self._ratio(2, self.predicted + self.support)

    def precision(self) -> Tensor:
        """Share of the pixels predicted as a class that are of it, float64; NaN where none is predicted."""
        return self._ratio(1, self.predicted)

    def recall(self) -> Tensor:
        """Share of a class's labelled pixels that are predicted as it, float64; NaN where there is none."""
        return self._ratio(1, self.support)

    @property
    def miou(self) -> float:
        """Mean of the IoU over the classes that occur in labels or predictions (NaN without any)."""
        return float(self.iou().nanmean())

    @property
    def frequency_weighted_iou(self) -> float:
        """Mean of the IoU with the classes' shares of the labels as weights (NaN without any pixel)."""
        share = self.support.double() / self.matrix.sum()
        return float((share * self.iou().nan_to_num(0)).sum())

    @property
    def accuracy(self) -> float:
        """Share of counted pixels that are right (NaN without any)."""
        return float(self.matrix.diagonal().sum().double() / self.matrix.sum())
