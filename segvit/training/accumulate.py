"""The gradient of a batch, in parts where the whole takes too much memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from segvit.model.heads import Loss


def backward(
    fabric: Any,
    model: nn.Module,
    preprocess: Callable[[Tensor], Tensor],
    loss: Loss,
    images: Tensor,
    labels: Tensor,
    parts: int = 1,
) -> dict[str, Tensor]:
    """Add the gradient of a batch's loss to the parameters'; the detached terms of that loss.

    Args:
        fabric: the run's, which set up `model`.
        preprocess: from images to what `model` takes.
        loss: of `segvit.model.heads.make_loss`.
        images, labels: of the batch, (B, 3, H, W) and (B, H, W).
        parts: pieces into which the batch is split to save memory; the sums that the batch's loss is divided
            by are the whole batch's, so that loss and gradient are too.
    """
    normalisers = loss.normalisers(labels) if parts > 1 else None
    sums: dict[str, Tensor] = {}
    pieces = zip(images.chunk(parts), labels.chunk(parts), strict=True)
    for part, (image, label) in enumerate(pieces, start=1):
        with fabric.no_backward_sync(model, enabled=part < parts):
            terms = loss(model(preprocess(image)), label, normalisers)
            fabric.backward(terms["total"])
        for name, value in terms.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    return sums
