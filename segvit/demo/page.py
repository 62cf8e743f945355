"""The demo's report, one HTML page: what was trained, and what the model does on pictures it never saw."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import torch

import segvit_kernels
from segvit.demo import task
from segvit.inference.similarity import similarity_maps
from segvit.model.segvit import SegViT
from segvit.options import TrainConfig
from segvit.pictures import report
from segvit.pictures.visualize import Image, heat, legend_entries, overlay, stage_notes
from segvit.system.machine import processor_name

__all__ = ["TITLE", "Outcome", "pixels_of", "write_report"]

TITLE = "SegViT, trained on this machine"
"""Of every report; tells that a folder is a demo's."""


@dataclass(frozen=True)
class Outcome:
    """What the report is about: the trained model, its options, and what was measured."""

    model: SegViT
    options: TrainConfig
    result: dict[str, Any]  # of `train`
    log: dict[str, list[tuple[int, float]]]  # of metrics.csv, by column
    score: dict[str, Any]  # of `evaluate` on `test`
    test: task.Rendered
    macs: dict[str, int]
    milliseconds: float  # for one picture

    @property
    def palette(self) -> np.ndarray:
        return np.array(self.test.palette, np.uint8)


def write_report(outcome: Outcome) -> str:
    """The page, as HTML."""
    names = outcome.test.class_names
    duration = _duration(outcome.result["seconds"])
    body = [
        _numbers(outcome),
        report.heading("Training", "The loss adds up three terms for each of the decoder's stages."),
        _curves(outcome),
        report.heading(
            "Classes",
            "Intersection over union: the pixels that are the class and were taken for it, over those that "
            "are one or the other.",
        ),
        report.card(_classes(outcome)),
        report.heading("Held-out pictures", "The first four of the test set, not the best."),
        report.class_legend(names, outcome.palette),
        report.card(_held_out(outcome.model, outcome.test.items[:4], outcome.palette)),
        report.heading(
            "Attention becomes masks",
            "A class token's similarity with every patch is its mask. The decoder looks at the deepest "
            "feature map first; each stage adds its similarity map to the sum, whose sigmoid is the mask. A "
            "stage's map is stretched over all colours; the numbers below it are its range.",
        ),
        *(report.card(_figure(outcome.model, item, count=3)) for item in outcome.test.items[:2]),
        report.heading(
            "Cost",
            "Multiply-accumulates (half the FLOPs) of the matrix products and convolutions for one picture, "
            "as executed, by PyTorch's counter.",
        ),
        report.card(_cost(outcome)),
        report.heading("What ran where"),
        report.card(report.facts(_settings(outcome))),
        report.heading("Again, and the model at work", "The second command is for this report's own folder."),
        report.preformatted(
            f"segvit demo --steps {outcome.options.max_steps} --seed {outcome.options.seed}\n"
            f"segvit predict pictures --checkpoint run --maps {names[-1]}"
        ),
    ]
    lead = (
        f"A small model was trained from random weights in {duration} on this machine. It tells {len(names)} "
        "classes of textured things and scenery apart, pixel by pixel, in pictures it has never seen."
    )
    footer = f"segvit-kernels {segvit_kernels.__version__} · {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    return report.page(TITLE, lead, body, footer)


def _numbers(outcome: Outcome) -> str:
    model, result, score = outcome.model, outcome.result, outcome.score
    parameters = sum(parameter.numel() for parameter in model.parameters())
    decoder = sum(parameter.numel() for parameter in model.decoder.parameters())
    device = "GPU" if next(model.parameters()).is_cuda else "CPU"
    macs = sum(outcome.macs.values())
    tiles = [
        report.Tile("Mean IoU", f"{100 * score['miou']:.1f} %", f"{score['images']} held-out pictures"),
        report.Tile("Pixel accuracy", f"{100 * score['accuracy']:.1f} %", "same pictures"),
        report.Tile("Training", _duration(result["seconds"]), f"{result['step']} steps, with evaluations"),
        report.Tile("Parameters", f"{parameters / 1e6:.2f} M", f"{decoder / 1e6:.2f} M in the decoder"),
        report.Tile("Cost", f"{macs / 1e6:.0f} MMAC", "one picture, image to scores"),
        report.Tile("Prediction", f"{outcome.milliseconds:.0f} ms", f"one picture on this {device}, median"),
    ]
    return report.tiles(tiles)


def _curves(outcome: Outcome) -> str:
    miou = [(step, 100 * value) for step, value in outcome.log["miou"]]
    return report.columns(
        report.card(report.line_chart(outcome.log["loss"], x_label="step", y_label="loss"), "Training loss"),
        report.card(
            report.line_chart(miou, x_label="step", y_label="%", y_top=100, dots=True),
            f"Mean IoU on {task.VALIDATION_IMAGES} pictures",
        ),
    )


def _classes(outcome: Outcome) -> str:
    names, iou = outcome.test.class_names, outcome.score["iou"]
    labels = np.stack([item["label"].numpy() for item in outcome.test.items])
    shares = np.bincount(labels.ravel(), minlength=len(names)) / labels.size
    rows = [
        report.Bar(name, color, math.nan if iou[name] is None else iou[name], f"{100 * share:.1f} %")
        for name, color, share in zip(names, outcome.palette, shares, strict=True)
    ]
    rows.sort(key=lambda row: -1 if math.isnan(row.value) else row.value, reverse=True)
    return report.bars(rows, ("class", "IoU", "share of pixels"))


def _cost(outcome: Outcome) -> str:
    total = sum(outcome.macs.values())
    rows = [(name, f"{macs / 1e6:.2f}", f"{100 * macs / total:.1f} %") for name, macs in outcome.macs.items()]
    rows.append(("total", f"{total / 1e6:.2f}", "100 %"))
    return report.table(("part", "MMAC", "share"), rows, total=True)


def _settings(outcome: Outcome) -> list[tuple[str, str]]:
    config, options = outcome.model.config, outcome.options
    backbone, patch = config.backbone, config.backbone.patch_size
    taps = ", ".join(str(tap + 1) for tap in config.taps)
    model = (
        f"SegViT on a plain ViT: {backbone.depth} blocks of width {backbone.width}, patches of "
        f"{patch} × {patch} pixels, features after blocks {taps}; decoder of width {config.decoder_dim} with "
        f"{len(config.taps)} stages; random weights at the start"
    )
    data = (
        f"{task.TRAINING_IMAGES} synthetic pictures of {task.IMAGE_SIZE} × {task.IMAGE_SIZE} pixels from "
        f"seed {options.seed}, mirrored at random; the curve comes from {task.VALIDATION_IMAGES} others, the "
        f"figures from {len(outcome.test)} more that served for nothing else"
    )
    training = (
        f"{outcome.result['step']} steps of {options.batch_size} pictures; AdamW, learning rate "
        f"{options.lr:g} with linear warm-up and decay to 0, weight decay {options.weight_decay:g}"
    )
    device = next(outcome.model.parameters()).device
    with segvit_kernels.record_backends() as taken:
        outcome.model.predict(outcome.test.items[0]["image"])
    backends = ("Kernel backend", ", ".join(sorted(set().union(*taken.values()))))
    return [("Model", model), ("Data", data), ("Training", training), *_machine(device), backends]


def _machine(device: torch.device) -> list[tuple[str, str]]:
    cores = f"{os.cpu_count()} logical cores, PyTorch uses {torch.get_num_threads()}"
    versions = {
        "segvit-kernels": segvit_kernels.__version__,
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
    }
    return [
        ("Processor", f"{processor_name()}, {cores}"),
        *([("GPU", torch.cuda.get_device_name(device))] if device.type == "cuda" else []),
        ("System", platform.platform(terse=True)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


# Pictures


def _large(image: np.ndarray, factor: int) -> np.ndarray:
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _held_out(model: SegViT, items: Sequence[dict[str, Any]], palette: np.ndarray, factor: int = 3) -> str:
    rows = []
    for number, item in enumerate(items, start=1):
        truth = item["label"].numpy()
        guess = model.predict(item["image"]).cpu().numpy().astype(np.int64)
        image = _large(pixels_of(item["image"]), factor)
        enlarge = np.ones((factor, factor), np.int64)
        wrong = guess != truth
        grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
        mistakes = np.where(np.kron(wrong, enlarge)[..., None] > 0, (235, 60, 50), 0.5 * grey + 110)
        pictures = [
            report.picture(image, f"held-out picture {number}"),
            report.picture(overlay(image, np.kron(truth, enlarge), palette, alpha=0.75), "ground truth"),
            report.picture(overlay(image, np.kron(guess, enlarge), palette, alpha=0.75), "prediction"),
            report.picture(mistakes.round().astype(np.uint8), "pixels that differ"),
        ]
        present = ", ".join(entry.name for entry in legend_entries(truth, model.config.class_names or ()))
        rows.append((f"{100 * (~wrong).mean():.1f} % of pixels right", present, pictures))
    titles = [("image", ""), ("ground truth", ""), ("prediction", ""), ("mistakes", "")]
    return report.picture_grid(titles, rows)


def _figure(model: SegViT, item: dict[str, Any], count: int, factor: int = 2) -> str:
    """Similarity maps of the largest things in a picture, stage by stage."""
    names = model.config.class_names or ()
    scenery = {"sky", "field", "wall", "floor"}
    entries = [entry for entry in legend_entries(item["label"].numpy(), names) if entry.name not in scenery]
    entries = entries[:count] or legend_entries(item["label"].numpy(), names)[:count]
    with torch.inference_mode():
        stages, masks = similarity_maps(model, item["image"], [entry.index for entry in entries])
    image = _large(pixels_of(item["image"]), factor)
    rows = []
    for row, entry in enumerate(entries):
        pictures = [report.picture(image, "image")]
        for number, maps in enumerate(stages, start=1):
            low, high = float(maps[row].min()), float(maps[row].max())
            shown = heat(image, maps[row], normalize="minmax")
            pictures.append(report.picture(shown, f"{entry.name}, stage {number}", f"{low:.1f} … {high:.1f}"))
        shown = heat(image, masks[row], normalize="sigmoid")
        pictures.append(report.picture(shown, f"{entry.name}, accumulated mask", "0 … 1"))
        rows.append((entry.name, "", pictures))
    titles = [("image", "")]
    titles += [(f"stage {number}", note) for number, note in enumerate(stage_notes(len(stages)), start=1)]
    return report.picture_grid([*titles, ("mask", "sum of the stages, sigmoid")], rows)


def pixels_of(image: torch.Tensor) -> np.ndarray:
    """(H, W, C) of an image (C, H, W)."""
    return image.permute(1, 2, 0).cpu().numpy()
