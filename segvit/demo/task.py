"""The demo's task: its pictures, its small model, the options of its training, and what the model costs."""

from __future__ import annotations

import copy
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from segvit.data.synthetic import SyntheticShapes
from segvit.model.segvit import SegViT
from segvit.options import DemoConfig, TrainConfig

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
        self.items: list[dict[str, Any]] = [source[index] for index in range(len(source))]

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


def milliseconds(model: SegViT, image: torch.Tensor, repeats: int = 15) -> float:
    """Median time from uint8 image to label map."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model.predict(image).cpu()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])
