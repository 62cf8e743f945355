"""`segvit bench`: a model on this machine, from uint8 images to label maps, and what would make it faster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit.config import PRESETS
from segvit.data import read_image
from segvit.model.heads import load_model
from segvit.model.segvit import SegViT
from segvit.options import BenchConfig
from segvit.speed.measure import measure, preset
from segvit.speed.report import report
from segvit.system.files import atomic_write, check_result_file
from segvit.system.machine import pick_backend, pick_device


def run(config: BenchConfig) -> int:
    """Print what was measured and, where asked for, write it to a JSON file. Returns 0.

    Raises:
        ValueError, OSError: an option, the model or a file is wrong; one line that names it.
    """
    _check(config)
    device = pick_device(config.accelerator)
    model = _load(config).to(device)
    size = _size(config, model)
    before = torch.get_num_threads()
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        with pick_backend(config.backend, device):
            result = measure(
                config,
                model,
                _images(config, model.config.reading, size, device),
                log=lambda line: print(line, file=sys.stderr, flush=True),
            )
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "memory" in str(error):
            shape = f"{config.batch} x {size[0]} x {size[1]} pixels"
            raise ValueError(f"size, batch: {shape} do not fit into memory ({reason})") from None
        if config.method == "compile":
            raise ValueError(f"method: torch.compile failed on this machine ({reason})") from None
        raise
    finally:
        torch.set_num_threads(before)
    print(report(result))
    if config.json:
        text = json.dumps(result, indent=2) + "\n"
        atomic_write(config.json, lambda path: path.write_text(text))
    return 0


def _check(config: BenchConfig) -> None:
    if len(config.size) > 2:
        raise ValueError(f"size: got {config.size}, expected height and width in pixels, or one side")
    if config.model not in PRESETS and (config.shrunk or config.classes is not None):
        name = "shrunk" if config.shrunk else "classes"
        raise ValueError(f"{name}: only for a preset ({', '.join(PRESETS)}); {config.model} is what it is")
    if config.json:
        check_result_file("json", config.json, ".json", r'\{\s*"schema": \d+,\s*"kind": "segvit bench"')


def _load(config: BenchConfig) -> SegViT:
    if config.model in PRESETS:
        classes = 150 if config.classes is None else config.classes
        return preset(config.model, classes, shrunk=config.shrunk)
    if Path(config.model).exists():
        return load_model(config.model)
    try:
        return load_model(config.model)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; presets: {', '.join(PRESETS)}") from None


def _size(config: BenchConfig, model: SegViT) -> tuple[int, int]:
    if not config.size:
        return model.config.image_size
    return config.size[0], config.size[-1]


def _images(
    config: BenchConfig, reading: dict[str, Any], size: tuple[int, int], device: torch.device
) -> Tensor:
    if config.image is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(
            0, 256, (config.batch, reading["channels"], *size), dtype=torch.uint8, generator=generator
        )
    else:
        picture = read_image(Path(config.image), **reading)[None].float()
        picture = F.interpolate(picture, size=size, mode="bilinear", align_corners=False, antialias=True)
        images = picture.round().clamp(0, 255).to(torch.uint8).repeat(config.batch, 1, 1, 1)
    return images.to(device)
