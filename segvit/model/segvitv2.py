"""SegViTv2: the ATM cascade without self-attention of class tokens and without mixing of classes.

Source: SegViTv2 (IJCV 2024, arXiv 2306.06289). A class token says how likely its class is in the image, p_c,
and where, σ(M_c): the score of a class at a pixel is p_c · σ(M_c).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit.model.losses import SegViTLoss, full_precision
from segvit.model.segvit import SegViT, SegViTOutput

__all__ = ["SegViTv2", "SegViTv2Loss"]


class SegViTv2(SegViT):
    """SegViT whose class tokens do not see each other; otherwise used like `SegViT`.

    `class_logits` of the output are (B, N), one for each token.
    """

    kind = "segvitv2"
    mixes_classes = False

    def semantic_scores(self, output: SegViTOutput, size: tuple[int, int]) -> Tensor:
        """Scores (B, N, H, W) of every class at every pixel: σ(class_logits) · σ(mask_logits upsampled)."""
        masks, probabilities = self.scoring(output)
        masks = F.interpolate(full_precision(masks), size=size, mode="bilinear", align_corners=False)
        return probabilities[:, :, None, None] * masks.sigmoid()

    def scoring(self, output: SegViTOutput) -> tuple[Tensor, Tensor]:
        """Mask logits (B, N, h, w) and probabilities (B, N)."""
        return output.mask_logits, full_precision(output.class_logits).sigmoid()


class SegViTv2Loss(SegViTLoss):
    """`SegViTLoss` with binary classification: is the token's class in the image?

    - class: binary cross-entropy of every token, weighted w (of its class) where the class is present and
      `no_object_weight` otherwise, divided by the sum of these weights.
    """

    def _class_shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.num_classes)

    def _class_term(self, logits: Tensor, present: Tensor, weights: Tensor) -> Tensor:
        logits = full_precision(logits)
        return -(weights * F.logsigmoid(torch.where(present, logits, -logits))).sum()
