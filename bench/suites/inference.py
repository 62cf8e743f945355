"""``python -m bench inference``: windows, scales and flips through one label-map kernel, against a plain
implementation that accumulates full-size scores: mIoU on real images, time and memory after the network."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import environment, peaks

PROTOCOLS: dict[str, dict[str, Any]] = {
    "whole image": {},
    "window": {"window": True},
    "window, 3 scales, flip": {"window": True, "scales": [0.75, 1.0, 1.5], "flip": True},
}
# (classes, passes) of the memory table: a 320 x 320 image, 20 x 20 patches a pass.
SCALING = ((19, 1), (150, 1), (600, 1), (19, 14), (150, 14))


def accumulate(
    masks: list[Tensor], probabilities: list[Tensor], runs: Sequence, size: tuple[int, int]
) -> Tensor:
    """The usual way: scores of every crop at its own size, summed over the resized image, divided by how
    often each pixel was covered, resized to the image's size, summed over scales and flips; then argmax."""
    total: Tensor | None = None
    for group in sorted({run.group for run in runs}):
        own = [i for i, run in enumerate(runs) if run.group == group]
        (height, width), flip = runs[own[0]].resized, runs[own[0]].flip
        classes = probabilities[own[0]].shape[1]
        score, count = torch.zeros(1, classes, height, width), torch.zeros(height, width)
        for index in own:
            run = runs[index]
            full = F.interpolate(
                masks[index][None].float(), size=run.crop, mode="bilinear", align_corners=False
            )
            part = torch.einsum("qc,bqhw->bchw", probabilities[index].float(), full.sigmoid())
            part = part.flip(-1) if flip else part
            bottom, right = min(height, run.top + run.crop[0]), min(width, run.left + run.crop[1])
            score[..., run.top : bottom, run.left : right] += part[
                ..., : bottom - run.top, : right - run.left
            ]
            count[run.top : bottom, run.left : right] += 1
        score = F.interpolate(score / count, size=size, mode="bilinear", align_corners=False)
        total = score if total is None else total + score
    return total.argmax(1)


def fused(masks: list[Tensor], probabilities: list[Tensor], runs: Sequence, size: tuple[int, int]) -> Tensor:
    """All passes in one launch."""
    from segvit.inference.passes import views_of
    from segvit_kernels import semantic_argmax

    grids = tuple(tuple(m.shape[-2:]) for m in masks)
    views = views_of(1, size, tuple(runs), grids, masks[0].device)
    return semantic_argmax([m[None] for m in masks], torch.stack(probabilities), size, views=views)


METHODS = {"fused": fused, "plain": accumulate}


def run(
    checkpoint: Path, data: Path, *, images: int | None, threads: int, progress: Callable[[str], None] = print
) -> dict:
    """mIoU, seconds and agreement of both, by protocol, over the first ``images`` of the validation split."""
    from segvit.data import open_dataset
    from segvit.inference.passes import crops_of, passes
    from segvit.model.heads import load_model
    from segvit.options import InferenceOptions
    from segvit.training.metrics import ConfusionMatrix

    torch.set_num_threads(threads)
    model = load_model(checkpoint).eval().fuse()
    dataset = open_dataset(str(data), "validation", num_classes=model.config.num_classes)
    count = min(len(dataset), images or len(dataset))
    patch, side = model.config.backbone.patch_size, model.config.image_size[0]
    rows = []
    for name, protocol in PROTOCOLS.items():
        options = InferenceOptions(**{**protocol, **({"window": side} if "window" in protocol else {})})
        matrices = {kind: ConfusionMatrix(dataset.num_classes, dataset.ignore_index) for kind in METHODS}
        seconds = dict.fromkeys(("network", *matrices), 0.0)
        same = pixels = 0
        for index in range(count):
            item = dataset[index]
            batch = model.preprocess(item["image"][None])
            size = tuple(batch.shape[-2:])
            runs = passes(size, options, patch)
            with torch.inference_mode():
                start = time.perf_counter()
                masks, probabilities = [], []
                for crops in crops_of(batch, runs):
                    logits, probability = model.scoring(model(crops))
                    masks += logits.unbind(0)
                    probabilities += probability.unbind(0)
                seconds["network"] += time.perf_counter() - start
                labels = {}
                for kind, method in METHODS.items():
                    start = time.perf_counter()
                    labels[kind] = method(masks, probabilities, runs, size)
                    seconds[kind] += time.perf_counter() - start
                    matrices[kind].update(labels[kind].long(), item["label"][None])
            same += int((labels["fused"] == labels["plain"]).sum())
            pixels += labels["fused"].numel()
        row = {"protocol": name, "passes": len(runs), "images": count, "agreement": same / pixels}
        for kind, matrix in matrices.items():
            row[f"{kind}_miou"] = matrix.miou
        rows.append(row | {f"{kind}_s": value / count for kind, value in seconds.items()})
        progress(json.dumps(rows[-1]))
    result = {"schema": 1, "kind": "inference", "environment": environment.describe(torch.device("cpu"))}
    result["environment"]["threads"] = threads
    return result | {"protocols": rows, "memory": [_memory(*case) for case in SCALING]}


def _memory(classes: int, count: int) -> dict:
    row = {"classes": classes, "passes": count, "size": [320, 320]}
    for kind in METHODS:
        row[f"{kind}_extra_bytes"] = peaks.isolated(
            "bench.suites.inference", "measure_memory", kind, classes, count
        )
    return row


def measure_memory(kind: str, classes: int, count: int) -> int | None:
    """Peak extra memory of one label map from random outputs; runs in a process of its own."""
    from segvit.inference.passes import passes
    from segvit.options import InferenceOptions

    scales = [1.0] if count == 1 else [1.0] * (count // 2)
    options = InferenceOptions(scales=scales, flip=count > 1)
    runs = passes((320, 320), options, 16)
    generator = torch.Generator().manual_seed(0)
    masks = [3 * torch.randn(classes, 20, 20, generator=generator) for _ in runs]
    probabilities = [torch.randn(classes, classes, generator=generator).softmax(-1) for _ in runs]
    return peaks.resident_peak(lambda: METHODS[kind](masks, probabilities, runs, (320, 320)))
