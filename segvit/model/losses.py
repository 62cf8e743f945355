"""The training loss of SegViT: class i is supervised by token i, so nothing is matched.

Source: SegViT (NeurIPS 2022, arXiv 2210.05844), section 3.2, equation 5, with the weights of its section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segvit.model.segvit import SegViTOutput
from segvit_kernels import mask_loss


class SegViTLoss(nn.Module):
    """Classification, focal and dice loss of the prediction and of every auxiliary output.

    With P the (image, class) pairs whose class is present in the image, w its class's weight (1 by default),
    |P| = Σ_P w, or 1 without any pair, and these sums taken over all processes of a `torch.distributed` group
    and divided by their number:

    - class: cross-entropy over N+1 logits of every token, its target its own class if present and "no object"
      otherwise, weighted w and `no_object_weight`, divided by the sum of these weights;
    - focal: for each pair w times the mean over the image of α_t (1 − p_t)^γ BCE, summed over P / |P|;
    - dice: for each pair w (1 − (2 Σσt + 1) / (Σσ + Σt + 1)), summed over P / |P|;
    - edge, of a model with `shrink_edges`: binary cross-entropy of every patch, whether two classes meet in
      it, the mean over patches and images.

    A batch may be split into parts: with the `normalisers` of all its labels, the parts' losses and gradients
    add up to the batch's.

    Mask logits count as upsampled bilinearly to the labels' size, but nothing of that size is stored:
    `segvit_kernels.mask_loss`, all outputs in one call, and nothing is read back from a GPU.

    Args:
        num_classes: N.
        ignore_index: label of pixels that belong to no class.
        class_weight, focal_weight, dice_weight: factors of the three terms.
        class_weights: one weight for each class, or None.
        no_object_weight: weight of "no object" in the classification term.
        focal_alpha, focal_gamma: α and γ.
        mask_ignored: leave ignored pixels out of focal and dice. By default they count as background, as in
            published models.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        *,
        class_weight: float = 1.0,
        class_weights: Sequence[float] | None = None,
        focal_weight: float = 20.0,
        dice_weight: float = 1.0,
        no_object_weight: float = 0.1,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        mask_ignored: bool = False,
    ) -> None:
        super().__init__()
        if 0 <= ignore_index < num_classes:
            raise ValueError(f"ignore_index {ignore_index} is one of the {num_classes} classes")
        self.class_weights: Tensor | None
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.weights = {"class": class_weight, "focal": focal_weight, "dice": dice_weight}
        self.no_object_weight = no_object_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.mask_ignored = mask_ignored
        self.register_buffer("class_weights", weights_of_classes(class_weights, num_classes), False)

    def normalisers(self, labels: Tensor) -> Tensor:
        """|P|, the sum of the classification term's weights for labels (B, H, W), and the number of images,
        over all processes."""
        return self._normalisers(*self._weights(classes_present(labels, self.num_classes), torch.float64))

    def _weights(self, present: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of pairs and of tokens, both (B, N)."""
        pairs = present.to(dtype)
        if self.class_weights is not None:
            pairs = pairs * self.class_weights.to(dtype)
        return pairs, torch.where(present, pairs, self.no_object_weight)

    def _normalisers(self, pairs: Tensor, tokens: Tensor) -> Tensor:
        return over_processes(torch.stack([pairs.sum(), tokens.sum(), pairs.new_tensor(len(pairs))]))

    def forward(
        self, output: SegViTOutput, labels: Tensor, normalisers: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Weighted terms by name, and their sum as 'total'.

        Args:
            output: what the model returned, or anything of that form.
            labels: (B, H, W), integers in [0, N) or `ignore_index`. Other values raise on the CPU and count
                as ignored on a GPU, where looking would stall it.
            normalisers: those of the whole batch, where this is a part of it.

        Returns:
            'class', 'focal', 'dice', and for each auxiliary output, earliest first, 'aux0.class' and so on;
            'edge' where there are edges.

        Raises:
            TypeError: labels are not integers.
            ValueError: shapes do not go together, or a label is out of range.
        """
        self._check(output, labels)
        outputs = {"": output[:2], **{f"aux{i}.": pair for i, pair in enumerate(output.auxiliary)}}
        masks = mask_loss(
            [mask_logits for _, mask_logits in outputs.values()],
            labels,
            ignore_index=self.ignore_index,
            focal_alpha=self.focal_alpha,
            focal_gamma=self.focal_gamma,
            mask_ignored=self.mask_ignored,
            pair_weights=None if self.class_weights is None else self.class_weights.expand(len(labels), -1),
            reduction="sum",
        )
        pair_weights, token_weights = self._weights(masks.present, masks.num_masks.dtype)
        if normalisers is None:
            normalisers = self._normalisers(pair_weights, token_weights)
        pair_sum, token_sum, images = normalisers.to(token_weights.dtype)

        terms: dict[str, Tensor] = {}
        for (prefix, (class_logits, _)), focal, dice in zip(
            outputs.items(), masks.focal, masks.dice, strict=True
        ):
            class_term = self._class_term(class_logits, masks.present, token_weights)
            terms[prefix + "class"] = self.weights["class"] * class_term / token_sum
            terms[prefix + "focal"] = self.weights["focal"] * focal / pair_sum
            terms[prefix + "dice"] = self.weights["dice"] * dice / pair_sum
        if (edges := getattr(output, "edges", None)) is not None:
            terms["edge"] = _edge_term(edges, labels, self.ignore_index) / images
        return {**terms, "total": cast(Tensor, sum(terms.values()))}

    def _check(self, output: SegViTOutput, labels: Tensor) -> None:
        classes, batch = self.num_classes, output.mask_logits.shape[0]
        if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if labels.ndim != 3 or labels.shape[0] != batch:
            raise ValueError(f"labels must have shape ({batch}, H, W), got {tuple(labels.shape)}")
        for class_logits, mask_logits in [output[:2], *output.auxiliary]:
            if class_logits.shape != (expected := self._class_shape(batch)):
                raise ValueError(f"class_logits must have shape {expected}, got {tuple(class_logits.shape)}")
            if mask_logits.ndim != 4 or mask_logits.shape[:2] != (batch, classes):
                masks = f"({batch}, {classes}, h, w)"
                raise ValueError(f"mask_logits must have shape {masks}, got {tuple(mask_logits.shape)}")

    def _class_shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.num_classes, self.num_classes + 1)

    def _class_term(self, logits: Tensor, present: Tensor, weights: Tensor) -> Tensor:
        log_probabilities = full_precision(logits).log_softmax(-1)
        own = log_probabilities[..., :-1].diagonal(dim1=1, dim2=2)
        return -(weights * torch.where(present, own, log_probabilities[..., -1])).sum()


def _edge_term(edges: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """The sum over images of the mean BCE over patches."""
    targets = F.adaptive_max_pool2d(edge_pixels(labels, ignore_index)[:, None].float(), edges.shape[1:])[:, 0]
    return (
        F.binary_cross_entropy_with_logits(
            full_precision(edges), targets.to(full_precision(edges).dtype), reduction="none"
        )
        .mean((1, 2))
        .sum()
    )


def edge_pixels(labels: Tensor, ignore_index: int) -> Tensor:
    """Pixels of labels (B, H, W) whose right or lower neighbour is of another class, booleans; where one of
    the two is ignored there is no edge."""
    edges = torch.zeros_like(labels, dtype=torch.bool)
    for axis in (1, 2):
        length = labels.shape[axis] - 1
        here, there = labels.narrow(axis, 0, length), labels.narrow(axis, 1, length)
        other = (here != there) & (here != ignore_index) & (there != ignore_index)
        edges.narrow(axis, 0, length).logical_or_(other)
    return edges


def classes_present(labels: Tensor, num_classes: int) -> Tensor:
    """Which classes are in each of labels (B, H, W), (B, N) booleans; values that are none count for none."""
    known = torch.where((labels >= 0) & (labels < num_classes), labels.long(), num_classes).flatten(1)
    present = known.new_zeros(len(known), num_classes + 1, dtype=torch.bool).scatter_(1, known, True)
    return present[:, :num_classes]


def weights_of_classes(weights: Sequence[float] | None, num_classes: int | None = None) -> Tensor | None:
    """As a tensor, float32.

    Raises:
        ValueError: not one for each class, a negative one, or none above 0.
    """
    if weights is None:
        return None
    if num_classes is not None and len(weights) != num_classes:
        raise ValueError(f"class_weights: got {len(weights)}, expected one for each of {num_classes} classes")
    if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise ValueError(f"class_weights: got {tuple(weights)}, expected at least 0 each, and one above")
    return torch.tensor(weights, dtype=torch.float32)


def over_processes(sums: Tensor) -> Tensor:
    """What a batch's sums of losses are divided by: `sums` (of weights) over all processes / their number.

    The mean of the processes' losses, which DDP's averaged gradients belong to, is then the loss of one
    process that sees all their images. A sum of 0, without anything to weight, counts as 1.
    """
    world = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world = torch.distributed.get_world_size()
        torch.distributed.all_reduce(sums)
    return torch.where(sums == 0, 1.0, sums) / world


def full_precision(x: Tensor) -> Tensor:
    """float32 for half precision, else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
