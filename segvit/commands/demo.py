"""`segvit demo`: train a small SegViT on synthetic pictures, and write down in one HTML page what came of it.

The page says what was trained and how well it does on pictures it has never seen, with curves, classes,
overlays, similarity maps and cost. The number of steps decides the result; the machine decides the time.
"""

from __future__ import annotations

import copy
import csv
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

import segvit_kernels
from segvit.data.synthetic import SyntheticShapes
from segvit.inference.similarity import similarity_maps
from segvit.model.heads import load_model
from segvit.model.segvit import SegViT
from segvit.options import DemoConfig, TrainConfig
from segvit.pictures import report
from segvit.pictures.visualize import Image, heat, legend_entries, overlay, stage_notes
from segvit.system.files import atomic_write, make_folder
from segvit.system.machine import pick_backend, pick_device
from segvit.training.evaluation import evaluate
from segvit.training.train import train

__all__ = ["DemoConfig", "run"]

IMAGE_SIZE = 96
TRAINING_IMAGES = 2048
VALIDATION_IMAGES = 48  # for the curve; the figures of the report come from other pictures
TEST_IMAGES = 192
BATCH_SIZE = 8
MODEL = {
    "width": 128,
    "depth": 4,
    "heads": 4,
    "patch_size": 8,
    "mlp_ratio": 4.0,
    "drop_path": 0.0,
    "taps": [0, 1, 3],
    "decoder_dim": 64,
    "decoder_depth": 1,
    "decoder_dropout": 0.0,
}


class Rendered(Dataset):
    """Some pictures of a synthetic set, drawn once and kept."""

    def __init__(self, source: SyntheticShapes) -> None:
        self.num_classes, self.ignore_index = source.num_classes, source.ignore_index
        self.class_names, self.palette = source.class_names, source.palette
        self.items = [source[index] for index in range(len(source))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def training_options(config: DemoConfig, out: Path) -> TrainConfig:
    """The options of `segvit train` that the demo uses."""
    return TrainConfig(
        data="synthetic",
        out=str(out),
        preset="vit_tiny",
        model=MODEL,
        image_size=IMAGE_SIZE,
        max_steps=config.steps,
        batch_size=BATCH_SIZE,
        lr=1e-3,
        decoder_lr_scale=1.0,
        weight_decay=0.05,
        warmup_steps=max(1, config.steps // 10),
        clip=1.0,
        scale=(1.0, 1.0),
        photometric=False,
        class_share=1.0,
        accelerator=config.accelerator,
        workers=0,
        seed=config.seed,
        evaluate_every=max(1, math.ceil(config.steps / 8)),
        log_every=max(1, config.steps // 100),
    )


def run(config: DemoConfig) -> int:
    """Train, evaluate, write `out`/report.html; prints the report's path last. Returns 0.

    An earlier demo in the same folder is replaced when the new one is complete.

    Raises:
        ValueError, OSError: an option that cannot be used, a folder that cannot be written.
    """
    device = pick_device(config.accelerator)
    pick_backend(None, device)
    out = Path(config.out)
    if (out / "run").exists() and not (out / "report.html").is_file():
        raise ValueError(f"out: {out / 'run'} is there and not from a demo; choose another folder")
    make_folder(out)

    print("drawing pictures", flush=True)
    training, validation, test = (
        Rendered(SyntheticShapes(split, length, IMAGE_SIZE, seed))
        for split, length, seed in (
            ("training", TRAINING_IMAGES, config.seed),
            ("validation", VALIDATION_IMAGES, config.seed),
            ("validation", TEST_IMAGES, config.seed + 1),
        )
    )
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=out) as temporary:
        folder = Path(temporary) / "run"
        options = training_options(config, folder)
        result = train(options, training, validation)
        print(f"trained {result['step']} steps in {result['seconds']:.0f} s; evaluating", flush=True)
        model = load_model(folder).to(device)  # the best by the curve's pictures, which are not the test's
        score = evaluate(model, test, batch_size=16)
        macs = multiply_accumulates(model, IMAGE_SIZE)
        milliseconds = _milliseconds(model.fuse(), test[0]["image"])
        log = _read_log(folder / "metrics.csv")
        html = write_report(Outcome(model, options, result, log, score, test, macs, milliseconds))
        shutil.rmtree(out / "run", ignore_errors=True)
        os.replace(folder, out / "run")
    for index in range(4):
        picture = Image.fromarray(_pixels(test[index]["image"]))
        atomic_write(out / "pictures" / f"{index}.png", lambda path, p=picture: p.save(path, "PNG"))
    path = out / "report.html"
    atomic_write(path, lambda temporary: temporary.write_text(html, encoding="utf-8"))
    print(f"mIoU {100 * score['miou']:.1f} % on {score['images']} held-out pictures")
    print(path.resolve())
    return 0


def _pixels(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).cpu().numpy()


def _read_log(path: Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.csv as (step, value) pairs by column."""
    columns: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value:
                    columns.setdefault(name, []).append((int(row["step"]), float(value)))
    return columns


def multiply_accumulates(model: SegViT, size: int) -> dict[str, int]:
    """Multiply-accumulates of one image by part, as they are executed; half of what PyTorch's counter says.

    Matrix products and convolutions count; norms, activations and bilinear upsampling do not.
    """
    # The counter's hooks stumble over parameters that want gradients.
    model = copy.deepcopy(model).requires_grad_(False)
    images = torch.zeros(1, 3, size, size, device=next(model.parameters()).device)
    # The counter knows no attention of the CPU: take the form made of matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as network:
        output = model(images)
    with FlopCounterMode(display=False) as mixing:
        model.semantic_scores(output, (size, size))
    counts = network.get_flop_counts()

    def part(name: str) -> int:
        return sum(counts[f"SegViT.{name}"].values()) // 2

    attention = counts["SegViT.decoder"].get(torch.ops.segvit.atm_fwd, 0) // 2
    embedding = part("backbone.patch_embed")
    return {
        "backbone: patch embedding": embedding,
        "backbone: transformer blocks": part("backbone") - embedding,
        "decoder: fused attention-to-mask": attention,
        "decoder: projections, self-attention, feed-forward": part("decoder") - attention,
        "class mixing at full resolution": mixing.get_total_flops() // 2,
    }


def _milliseconds(model: SegViT, image: torch.Tensor, repeats: int = 15) -> float:
    """Median time from uint8 image to label map."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model.predict(image).cpu()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def _large(image: np.ndarray, factor: int) -> np.ndarray:
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _held_out(model: SegViT, items: Sequence[dict[str, Any]], palette: np.ndarray, factor: int = 3) -> str:
    rows = []
    for number, item in enumerate(items, start=1):
        truth = item["label"].numpy()
        guess = model.predict(item["image"]).cpu().numpy().astype(np.int64)
        image = _large(_pixels(item["image"]), factor)
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
        present = ", ".join(entry.name for entry in legend_entries(truth, model.config.class_names))
        rows.append((f"{100 * (~wrong).mean():.1f} % of pixels right", present, pictures))
    titles = [("image", ""), ("ground truth", ""), ("prediction", ""), ("mistakes", "")]
    return report.picture_grid(titles, rows)


def _figure(model: SegViT, item: dict[str, Any], count: int, factor: int = 2) -> str:
    """Similarity maps of the largest things in a picture, stage by stage."""
    names = model.config.class_names
    scenery = {"sky", "field", "wall", "floor"}
    entries = [entry for entry in legend_entries(item["label"].numpy(), names) if entry.name not in scenery]
    entries = entries[:count] or legend_entries(item["label"].numpy(), names)[:count]
    with torch.inference_mode():
        stages, masks = similarity_maps(model, item["image"], [entry.index for entry in entries])
    image = _large(_pixels(item["image"]), factor)
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


@dataclass(frozen=True)
class Outcome:
    """What the report is about: the trained model, its options, and what was measured."""

    model: SegViT
    options: TrainConfig
    result: dict[str, Any]  # of `train`
    log: dict[str, list[tuple[int, float]]]  # of `_read_log`
    score: dict[str, Any]  # of `evaluate` on `test`
    test: Rendered
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
    return report.page("SegViT, trained on this machine", lead, body, footer)


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
            f"Mean IoU on {VALIDATION_IMAGES} pictures",
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
        f"{TRAINING_IMAGES} synthetic pictures of {IMAGE_SIZE} × {IMAGE_SIZE} pixels from seed "
        f"{options.seed}, mirrored at random; the curve comes from {VALIDATION_IMAGES} others, the figures "
        f"from {len(outcome.test)} more that served for nothing else"
    )
    training = (
        f"{outcome.result['step']} steps of {options.batch_size} pictures; AdamW, learning rate "
        f"{options.lr:g} with linear warm-up and decay to 0, weight decay {options.weight_decay:g}"
    )
    device = next(outcome.model.parameters()).device
    return [("Model", model), ("Data", data), ("Training", training), *_machine(device)]


def _machine(device: torch.device) -> list[tuple[str, str]]:
    fused = device.type == "cuda" and segvit_kernels.why_not("triton", device) is None
    cores = f"{os.cpu_count()} logical cores, PyTorch uses {torch.get_num_threads()}"
    versions = {
        "segvit-kernels": segvit_kernels.__version__,
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
    }
    return [
        ("Processor", f"{_processor()}, {cores}"),
        *([("GPU", torch.cuda.get_device_name(device))] if device.type == "cuda" else []),
        ("System", platform.platform(terse=True)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Kernel backend", os.environ.get("SEGVIT_KERNELS_BACKEND") or ("triton" if fused else "eager")),
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
