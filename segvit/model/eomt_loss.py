"""The training loss of EoMT: queries are matched to the classes of an image, and each is asked for its class.

Source: EoMT (CVPR 2025, arXiv 2503.19108), which takes over Mask2Former's (CVPR 2022, arXiv 2112.01527).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segvit.model.losses import classes_present, full_precision, over_processes, weights_of_classes
from segvit.model.segvit import SegViTOutput
from segvit.system.extras import require
from segvit_kernels import mask_loss, mask_matching_cost

__all__ = ["EoMTLoss"]


class EoMTLoss(nn.Module):
    """Class, mask (BCE) and dice loss of matched queries, of the prediction and of every auxiliary output.

    Each output is matched by itself: the assignment of the image's classes to queries with the least sum of
    -`class_weight` · p[class] + `mask_weight` · BCE + `dice_weight` · dice. With P the (image, class) pairs
    whose class is present, w its class's weight (1 by default), |P| = Σ_P w, or 1 without any pair, over all
    processes as in `segvit.model.losses.SegViTLoss`:

    - class: cross-entropy over N+1 logits of every query, its target its class, weighted w, or "no object",
      weighted `no_object_weight`, divided by the sum of these weights (where an image has more classes than
      queries, w is the mean of its classes there);
    - mask: for each pair w times the mean BCE over the image, summed over P / |P|;
    - dice: for each pair w (1 − (2 Σσt + 1) / (Σσ + Σt + 1)), summed over P / |P|.

    Sums are over all pixels of masks upsampled to the labels' size, of which nothing is stored; the original
    estimates them at 12544 points, most of them where the mask is least certain. Ignored pixels are
    background.

    Args:
        num_classes: N. queries: Q.
        ignore_index: label of pixels that belong to no class.
        class_weight, mask_weight, dice_weight: factors of the three terms.
        class_weights: one weight for each class, or None.
        no_object_weight: weight of "no object" in the classification term.

    Raises:
        ImportError: SciPy, which solves the assignment, is not installed.
    """

    def __init__(
        self,
        num_classes: int,
        queries: int,
        ignore_index: int = 255,
        *,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        class_weights: Sequence[float] | None = None,
        no_object_weight: float = 0.1,
    ) -> None:
        super().__init__()
        if 0 <= ignore_index < num_classes:
            raise ValueError(f"ignore_index {ignore_index} is one of the {num_classes} classes")
        self._assign = require("scipy.optimize", extra="train").linear_sum_assignment
        self.class_weights: Tensor | None
        self.num_classes, self.queries, self.ignore_index = num_classes, queries, ignore_index
        self.weights = {"class": class_weight, "mask": mask_weight, "dice": dice_weight}
        self.no_object_weight = no_object_weight
        self.register_buffer("class_weights", weights_of_classes(class_weights, num_classes), False)

    def normalisers(self, labels: Tensor) -> Tensor:
        """|P| and the sum of the classification term's weights for labels (B, H, W), over all processes."""
        present = classes_present(labels, self.num_classes)
        pairs = present.double()
        if self.class_weights is not None:
            pairs = pairs * self.class_weights.double()
        counts = present.sum(1)
        free = (self.queries - counts).clamp(min=0)
        matched = pairs.sum(1) * (self.queries / counts.clamp(min=1)).clamp(max=1)
        return over_processes(torch.stack([pairs.sum(), matched.sum() + self.no_object_weight * free.sum()]))

    def forward(
        self, output: SegViTOutput, labels: Tensor, normalisers: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Weighted terms by name, and their sum as 'total'.

        Args:
            output: what the model returned, or anything of that form.
            labels: (B, H, W), integers in [0, N) or `ignore_index`.
            normalisers: those of the whole batch, where this is a part of it.

        Returns:
            'class', 'mask', 'dice', and for each auxiliary output, earliest first, 'aux0.class' and so on.

        Raises:
            TypeError: labels are not integers.
            ValueError: shapes do not go together, or a label is out of range.
        """
        outputs = {"": output[:2], **{f"aux{i}.": pair for i, pair in enumerate(output.auxiliary)}}
        self._check(list(outputs.values()), labels)
        present = classes_present(labels, self.num_classes)
        counts = present.sum(1)
        # The classes of every image, in order, then none: (B, M).
        order = present.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(counts.max()))]
        exists = torch.arange(order.shape[1], device=order.device) < counts[:, None]
        matched = [self._match(*pair, labels, present) for pair in outputs.values()]  # (B, N) each
        queries = [query.gather(1, order) for query in matched]
        masks = [
            pair[1].gather(1, query.clamp(min=0)[:, :, None, None].expand(-1, -1, *pair[1].shape[2:]))
            for pair, query in zip(outputs.values(), queries, strict=True)
        ]
        losses = mask_loss(
            masks,
            labels,
            matches=torch.where(exists, order, -1),
            num_classes=self.num_classes,
            ignore_index=self.ignore_index,
            reduction="none",
        )
        if normalisers is None:
            normalisers = self.normalisers(labels)
        weights = torch.ones_like(losses.bce[0]) if self.class_weights is None else self.class_weights[order]

        terms: dict[str, Tensor] = {}
        parts = zip(outputs.items(), queries, losses.bce, losses.dice, strict=True)
        for (prefix, (class_logits, _)), query, bce, dice in parts:
            pairs = weights.to(bce.dtype) * (exists & (query >= 0))
            pair_sum, class_sum = normalisers.to(bce.dtype)
            class_term = self._class_term(class_logits, query, order, exists)
            terms[prefix + "class"] = self.weights["class"] * class_term / class_sum
            terms[prefix + "mask"] = self.weights["mask"] * (pairs * bce).sum() / pair_sum
            terms[prefix + "dice"] = self.weights["dice"] * (pairs * dice).sum() / pair_sum
        return {**terms, "total": cast(Tensor, sum(terms.values()))}

    @torch.no_grad()
    def _match(self, class_logits: Tensor, mask_logits: Tensor, labels: Tensor, present: Tensor) -> Tensor:
        """The query (B, N) of every class, -1 where it is not present, or there are too few."""
        costs = mask_matching_cost(mask_logits, labels, num_classes=self.num_classes)
        weights = self.weights
        cost = weights["mask"] * costs.bce + weights["dice"] * costs.dice
        cost = cost - weights["class"] * full_precision(class_logits).softmax(-1)[..., :-1]
        largest = torch.finfo(cost.dtype).max
        cost = cost.nan_to_num(nan=largest, posinf=largest, neginf=-largest).cpu()
        matched = torch.full(present.shape, -1, dtype=torch.int64)
        for image, own in enumerate(present.cpu()):
            classes = own.nonzero()[:, 0]
            query, place = self._assign(cost[image][:, classes].numpy())
            matched[image, classes[torch.as_tensor(place)]] = torch.as_tensor(query)
        return matched.to(labels.device)

    def _class_term(self, logits: Tensor, query: Tensor, order: Tensor, exists: Tensor) -> Tensor:
        logits = full_precision(logits)
        target = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        taken = exists & (query >= 0)
        image = torch.arange(len(order), device=order.device)[:, None].expand_as(order)
        target[image[taken], query[taken]] = order[taken]
        weights = logits.new_ones(self.num_classes + 1)
        if self.class_weights is not None:
            weights[:-1] = self.class_weights.to(weights)
        weights[-1] = self.no_object_weight
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), weights, reduction="sum")

    def _check(self, pairs: list[tuple[Tensor, Tensor]], labels: Tensor) -> None:
        if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        batch = pairs[0][1].shape[0]
        if labels.ndim != 3 or labels.shape[0] != batch:
            raise ValueError(f"labels must have shape ({batch}, H, W), got {tuple(labels.shape)}")
        for class_logits, mask_logits in pairs:
            expected = (batch, self.queries, self.num_classes + 1)
            if class_logits.shape != expected:
                raise ValueError(f"class_logits must have shape {expected}, got {tuple(class_logits.shape)}")
            if mask_logits.ndim != 4 or mask_logits.shape[:2] != (batch, self.queries):
                expected_masks = f"({batch}, {self.queries}, h, w)"
                raise ValueError(
                    f"mask_logits must have shape {expected_masks}, got {tuple(mask_logits.shape)}"
                )
