"""The training loss of SegViT: class i is supervised by token i, so nothing is matched.

Source: SegViT (NeurIPS 2022, arXiv 2210.05844), section 3.2, equation 5, with the weights of its section 4.1.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from segvit.model import SegViTOutput

# Elements of a full-resolution block of pairs: fills a GPU, or stays near a CPU's cache.
_BLOCK_GPU, _BLOCK_CPU = 2**25, 2**20


class SegViTLoss(nn.Module):
    """Classification, focal and dice loss of the prediction and of every auxiliary output.

    With P the (image, class) pairs whose class is present in the image, and |P| and the sum of class weights
    taken over all processes of a `torch.distributed` group and divided by their number:

    - class: cross-entropy over N+1 logits of every token, its target its own class if present and "no object"
      otherwise, weighted 1 and `no_object_weight`, divided by the sum of these weights;
    - focal: for each pair the mean over the image of α_t (1 − p_t)^γ BCE, summed over P / max(|P|, 1);
    - dice: for each pair 1 − (2 Σσt + 1) / (Σσ + Σt + 1), summed over P / max(|P|, 1).

    Mask logits are upsampled bilinearly to the labels' size, in blocks of pairs; where there is more than one
    block, nothing of full resolution is kept for the backward pass. On a GPU nothing is read back, so absent
    pairs are computed too, with weight 0; on the CPU they are skipped.

    Args:
        num_classes: N.
        ignore_index: label of pixels that belong to no class.
        class_weight, focal_weight, dice_weight: factors of the three terms.
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
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.weights = {"class": class_weight, "focal": focal_weight, "dice": dice_weight}
        self.no_object_weight = no_object_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.mask_ignored = mask_ignored

    def forward(self, output: SegViTOutput, labels: Tensor) -> dict[str, Tensor]:
        """Weighted terms by name, and their sum as 'total'.

        Args:
            output: what the model returned, or anything of that form.
            labels: (B, H, W), integers in [0, N) or `ignore_index`. Other values raise on the CPU and count
                as ignored on a GPU, where looking would stall it.

        Returns:
            'class', 'focal', 'dice', and for each auxiliary output, earliest first, 'aux0.class' and so on.

        Raises:
            TypeError: labels are not integers.
            ValueError: shapes do not go together, or a label is out of range.
        """
        self._check(output, labels)
        labels = labels.int()  # as wide as all comparisons below, half as wide as int64
        present = self._present(labels)
        pairs = self._pairs(present)
        dtype = _full_precision(output.class_logits).dtype
        token_weights = present.new_full(present.shape, self.no_object_weight, dtype=dtype)
        token_weights = token_weights.masked_fill(present, 1.0)
        num_masks, weight_sum = _normalisers(present, token_weights)

        terms: dict[str, Tensor] = {}
        outputs = [("", (output.class_logits, output.mask_logits))]
        outputs += [(f"aux{i}.", pair) for i, pair in enumerate(output.auxiliary)]
        for prefix, (class_logits, mask_logits) in outputs:
            focal, dice = self._mask_terms(mask_logits, labels, present, pairs)
            terms[prefix + "class"] = self._class_term(class_logits, present, token_weights) / weight_sum
            terms[prefix + "focal"] = focal / num_masks
            terms[prefix + "dice"] = dice / num_masks
        terms = {name: self.weights[name.rsplit(".")[-1]] * value for name, value in terms.items()}
        return {**terms, "total": sum(terms.values())}

    def _check(self, output: SegViTOutput, labels: Tensor) -> None:
        classes = self.num_classes
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        batch = output.mask_logits.shape[0]
        if labels.ndim != 3 or labels.shape[0] != batch:
            raise ValueError(f"labels must have shape ({batch}, H, W), got {tuple(labels.shape)}")
        for class_logits, mask_logits in [output[:2], *output.auxiliary]:
            if class_logits.shape != (batch, classes, classes + 1):
                expected = (batch, classes, classes + 1)
                raise ValueError(f"class_logits must have shape {expected}, got {tuple(class_logits.shape)}")
            if mask_logits.ndim != 4 or mask_logits.shape[:2] != (batch, classes):
                expected = f"({batch}, {classes}, h, w)"
                raise ValueError(f"mask_logits must have shape {expected}, got {tuple(mask_logits.shape)}")
        if _can_read(labels):
            valid = labels[labels != self.ignore_index]
            if valid.numel() and not 0 <= int(valid.min()) <= int(valid.max()) < classes:
                low, high = int(valid.min()), int(valid.max())
                expected = f"0...{classes - 1} or {self.ignore_index}"
                raise ValueError(f"labels hold values from {low} to {high}, expected {expected}")

    def _present(self, labels: Tensor) -> Tensor:
        """(B, N), which classes each image holds."""
        index = labels.flatten(1).long()
        index = torch.where((index >= 0) & (index < self.num_classes), index, self.num_classes)
        present = torch.zeros(labels.shape[0], self.num_classes + 1, dtype=torch.bool, device=labels.device)
        return present.scatter_(1, index, True)[:, :-1]

    def _pairs(self, present: Tensor) -> Tensor:
        """Indices of flattened (image, class) pairs, those present first; on the CPU only those."""
        pairs = present.flatten().to(torch.uint8).argsort(descending=True, stable=True)
        if _can_read(present):
            pairs = pairs[: max(1, int(present.sum()))]
        return pairs

    def _class_term(self, logits: Tensor, present: Tensor, weights: Tensor) -> Tensor:
        log_probabilities = _full_precision(logits).log_softmax(-1)
        own = log_probabilities[..., :-1].diagonal(dim1=1, dim2=2)
        return -(weights * torch.where(present, own, log_probabilities[..., -1])).sum()

    def _mask_terms(
        self, logits: Tensor, labels: Tensor, present: Tensor, pairs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of focal and dice over the present pairs."""
        logits = _full_precision(logits).flatten(0, 1)[pairs]
        block = max(
            1, (_BLOCK_GPU if logits.is_cuda else _BLOCK_CPU) // max(1, labels.shape[1] * labels.shape[2])
        )
        terms = self._pair_terms
        if len(pairs) > block and torch.is_grad_enabled():
            # Nothing random inside, and a saved CUDA generator state would be a host sync.
            terms = partial(checkpoint, terms, use_reentrant=False, preserve_rng_state=False)
        blocks = zip(logits.split(block), pairs.split(block), strict=True)
        results = [terms(part, labels, index) for part, index in blocks]
        weights = present.flatten()[pairs].to(logits.dtype)
        focal, dice = (torch.cat(parts) for parts in zip(*results, strict=True))
        return (weights * focal).sum(), (weights * dice).sum()

    def _pair_terms(self, logits: Tensor, labels: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Focal and dice loss of each pair (K,), from its logits (K, h, w)."""
        labels = labels[pairs // self.num_classes]  # [K, H, W]
        target = labels == (pairs % self.num_classes).int().view(-1, 1, 1)
        size = labels.shape[-2:]
        logits = F.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
        # With z = ∓x for a pixel inside/outside, BCE = softplus(z) and 1 − p_t = σ(z).
        z = torch.where(target, -logits, logits)
        error = z.sigmoid()
        focal = error**self.focal_gamma * F.softplus(z)
        focal = torch.where(target, self.focal_alpha * focal, (1 - self.focal_alpha) * focal)
        probability = torch.where(target, 1 - error, error)
        if self.mask_ignored:
            valid = (labels >= 0) & (labels < self.num_classes)
            focal = (focal * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
            probability = probability * valid
        else:
            focal = focal.mean((1, 2))
        overlap = (probability * target).sum((1, 2))
        dice = 1 - (2 * overlap + 1) / (probability.sum((1, 2)) + target.sum((1, 2)) + 1)
        return focal, dice


def _normalisers(present: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """max(|P|, 1) and the sum of class weights, over all processes / their number.

    The mean of the processes' losses, which DDP's averaged gradients belong to, is then the loss of one
    process that sees all their images.
    """
    sums = torch.stack([present.sum().to(weights.dtype), weights.sum()])
    world = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world = torch.distributed.get_world_size()
        torch.distributed.all_reduce(sums)
    return sums[0].clamp(min=1) / world, sums[1] / world


def _can_read(x: Tensor) -> bool:
    """Whether its values can be looked at without stalling a device or breaking a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _full_precision(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
