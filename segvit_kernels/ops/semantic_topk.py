"""The best classes of every pixel and their probabilities: ``semantic_argmax(..., return_probabilities=k)``.

Of the class scores s_c of :mod:`segvit_kernels.ops.semantic_argmax`, views included, for every output pixel:

    P_c = s_c / Σ_c' s_c', or 1/classes where that sum is not positive (no evidence, or not a number)
    classes = the k of largest s_c, largest first, of equal ones the lower class first

No score tensor of full size exists: k classes and k probabilities a pixel, in place of all. Scores are sums
of products of probabilities; negative ones (activation "none") are ranked all the same, but their shares are
no probabilities. Where a score is not a number every class is some class, in [0, classes), and one may come
twice.

Kernels: Triton, for at most :data:`MOST` classes a pixel, which it keeps in registers, and the CPU library.
CUDA C++ has none: where Triton cannot run, calls that name no backend take this one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from segvit_kernels import _library
from segvit_kernels.ops._class_scores import (
    block_scores,
    blocks_without_sync,
    first_maximum,
    images,
    label_dtype,
    macs,
    refuse_of_kernels,
    rows_of,
)

MOST = 8
"""Best classes of a pixel that Triton's kernel gives."""


def best_classes(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of scores (C, ...) the first k classes and their probabilities, both (k, ...)."""
    total = scores.sum(0)
    if k <= MOST:
        rounds = []
        for _ in range(k):
            best, value = first_maximum(scores.clone())
            scores = scores.scatter(0, best.long()[None], -math.inf)
            rounds.append((best, value))
        classes, values = (torch.stack(found) for found in zip(*rounds, strict=True))
    else:
        values, classes = (found[:k] for found in scores.sort(dim=0, descending=True, stable=True))
    return classes, torch.where(total > 0, values / total, 1 / len(scores))


@torch.no_grad()
def _eager(
    mask_logits: list[Tensor],
    class_probs: Tensor,
    views: list[Tensor],
    batch: int,
    height: int,
    width: int,
    reach: list[float],
    sigmoid: bool,
    k: int,
    prune: float,
) -> tuple[Tensor, Tensor]:
    options = (batch, height, width, reach, sigmoid, k, prune)
    classes, shares = _fake(mask_logits, class_probs, views, *options)
    if not classes.numel():
        return classes, shares
    masks = [mask for stack in mask_logits for mask in stack]
    given = (masks, class_probs, views, classes, shares.dtype, prune)
    if views and class_probs.device.type != "cpu":
        for top, bottom, block in blocks_without_sync(*given, sigmoid):
            best, largest = best_classes(block, k)
            classes[:, :, top:bottom] = best.transpose(0, 1)
            shares[:, :, top:bottom] = largest.transpose(0, 1)
        return classes, shares
    for image, parts, bands in images(*given):
        for first, last, active, weights in bands:
            chosen = [parts[i] for i in active]
            rows = rows_of(chosen, width)
            for top in range(first, last, rows):
                bottom = min(last, top + rows)
                block = block_scores(chosen, weights, top, bottom, width, sigmoid)
                classes[image, :, top:bottom], shares[image, :, top:bottom] = best_classes(block, k)
    return classes, shares


def _fake(
    mask_logits: list[Tensor],
    class_probs: Tensor,
    views: list[Tensor],
    batch: int,
    height: int,
    width: int,
    reach: list[float],
    sigmoid: bool,
    k: int,
    prune: float,
) -> tuple[Tensor, Tensor]:
    shape = (batch, k, height, width)
    dtype = torch.float64 if mask_logits[0].dtype == torch.float64 else torch.float32
    return (
        class_probs.new_empty(shape, dtype=label_dtype(class_probs.shape[-1])),
        class_probs.new_empty(shape, dtype=dtype),
    )


def _kernels_refuse(
    backend: str, mask_logits: list[Tensor], class_probs: Tensor, *more: Any
) -> Exception | None:
    k = more[-2]
    if backend == "triton" and k > MOST:
        return ValueError(f"backend 'triton' gives at most {MOST} classes; return_probabilities is {k}")
    return refuse_of_kernels(backend, mask_logits, class_probs, *more)


semantic_topk = _library.define(
    "semantic_topk(Tensor[] mask_logits, Tensor class_probs, Tensor[] views, SymInt batch, SymInt height, "
    "SymInt width, float[] reach, bool sigmoid, int k, float prune) "
    "-> (Tensor classes, Tensor probabilities)",
    eager=_eager,
    fake=_fake,
    macs=macs,
    refuse=_kernels_refuse,
    backends=("triton", "cpu"),
)
