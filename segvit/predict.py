"""`segvit predict`: label maps, overlays with a legend and similarity maps for pictures on disk.

For every picture NAME.* the output folder gets NAME_labels.png (class indices as grey values, 16-bit above
256 classes), NAME_overlay.png and, where classes are asked for, NAME_maps.png. Arguments are checked before
the first file is written, and a file appears whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from segvit._extras import require
from segvit.data.pictures import PICTURE_SUFFIXES as SUFFIXES
from segvit.data.pictures import probe, read_image
from segvit.machine import pick_backend, pick_device
from segvit.options import PredictConfig

if TYPE_CHECKING:
    from PIL import Image

    from segvit.config import SegViTConfig
    from segvit.model import SegViT

__all__ = ["PredictConfig", "class_colors", "class_names", "find_classes", "find_images", "run"]


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Files as given, and every picture directly inside the folders given, sorted by name; each file once.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no picture.
        ValueError: there is no path, or a file is not a picture.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():
            files = sorted(
                file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()
            )
            if not files:
                raise FileNotFoundError(f"{path}: no picture in this folder ({', '.join(SUFFIXES)})")
        elif not path.is_file():
            raise FileNotFoundError(f"{path}: no such file or folder")
        for file in files:
            found.setdefault(file.resolve(), file)
    for file in found.values():
        probe(file)
    if not found:
        raise ValueError("images: got none, expected files or folders")
    return list(found.values())


def class_names(config: SegViTConfig) -> tuple[str, ...]:
    """The model's class names, or "class 0", "class 1", … where it has none."""
    return config.class_names or tuple(f"class {index}" for index in range(config.num_classes))


def class_colors(config: SegViTConfig) -> np.ndarray:
    """The model's palette, or `visualize.class_palette`; uint8 (num_classes, 3)."""
    from segvit.visualize import class_palette

    return class_palette(config.num_classes) if config.palette is None else np.array(config.palette, np.uint8)


def find_classes(wanted: Sequence[str], names: Sequence[str]) -> list[int]:
    """Indices of classes given by name (capital letters do not count) or by index, each once.

    Raises:
        ValueError: no such class; the message holds the nearest names, or all of them.
    """
    lowered = [name.lower() for name in names]
    indices = []
    for word in wanted:
        if word.lower() in lowered:
            indices.append(lowered.index(word.lower()))
        elif word.isdecimal() and int(word) < len(names):
            indices.append(int(word))
        else:
            near = [names[lowered.index(name)] for name in get_close_matches(word.lower(), lowered, n=3)]
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            listing = ", ".join(names)
            raise ValueError(f"maps: no class {word!r}; {hint}The {len(names)} classes: {listing}")
    return list(dict.fromkeys(indices))


def _output_stems(files: Sequence[Path], out: Path) -> list[str]:
    """A stem for each file, numbered where two files share one; refuses to write over an input."""
    inputs = {file.resolve() for file in files}
    stems: list[str] = []
    for file in files:
        stem, number = file.stem, 1
        while stem in stems:
            number += 1
            stem = f"{file.stem}_{number}"
        stems.append(stem)
        for kind in ("labels", "overlay", "maps"):
            target = out / f"{stem}_{kind}.png"
            if target.resolve() in inputs:
                raise ValueError(
                    f"out: {target} is an input picture and would be overwritten; choose another folder"
                )
    return stems


def make_folder(out: Path) -> None:
    """Make a folder for output.

    Raises:
        OSError: files could not be written there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise type(error)(f"out: cannot write to folder {out} ({error.strerror or error})") from None


def label_picture(labels: np.ndarray, num_classes: int) -> Image.Image:
    """Class indices (H, W) as grey values: 8-bit, or 16-bit above 256 classes."""
    image_module = require("PIL.Image", extra="train")
    return image_module.fromarray(labels.astype(np.uint8 if num_classes <= 256 else np.uint16))


def similarity_maps(
    model: SegViT, image: torch.Tensor, classes: Sequence[int]
) -> tuple[list[np.ndarray], np.ndarray]:
    """What the decoder saw in one image, at the image's own size.

    Args:
        model: in evaluation mode.
        image: uint8 (3, H, W).
        classes: indices of the K classes to return.

    Returns:
        Similarity maps float (K, H, W) of each stage in running order, before accumulation, and the mask
        logits (K, H, W): their sum, or the last map where masks are not accumulated (up-sampled models).
    """
    height, width = image.shape[-2:]
    padded = model.pad_to_patches(model.preprocess(image[None]))
    stages = []
    for maps in model.similarity_maps(padded):
        chosen = maps[:, list(classes)].float()
        enlarged = F.interpolate(chosen, size=padded.shape[-2:], mode="bilinear", align_corners=False)
        stages.append(enlarged[0, :, :height, :width].cpu().numpy())
    return stages, stages[-1] if model.config.upsample else np.sum(stages, axis=0)


def run(config: PredictConfig) -> int:
    """Predict every picture of `config`; prints a line for each. Returns 0.

    Raises:
        ValueError, OSError: an argument or a file is wrong; one line that names it.
    """
    files = find_images(config.images)
    out = Path(config.out)
    stems = _output_stems(files, out)
    device = pick_device(config.accelerator)
    choice = pick_backend(config.backend, device)

    from segvit import visualize
    from segvit.checkpoint import atomic_write
    from segvit.evaluate import load_model
    from segvit.inference import check_options
    from segvit.linear_head import LinearSegmenter

    model = load_model(config.checkpoint).to(device).eval().fuse()
    names, palette = class_names(model.config), class_colors(model.config)
    classes = find_classes(config.maps, names)
    if classes and isinstance(model, LinearSegmenter):
        raise ValueError(f"maps: {config.checkpoint} has a linear head, which has no similarity maps")
    check_options(config, model.config.backbone.patch_size)
    make_folder(out)
    with choice, torch.inference_mode():
        for file, stem in zip(files, stems, strict=True):
            image = read_image(file)
            labels = model.predict(image, config).cpu().numpy()
            pixels = image.permute(1, 2, 0).numpy()
            pictures = {
                "labels": label_picture(labels, len(names)),
                "overlay": visualize.overlay_with_legend(pixels, labels, names, palette, alpha=config.alpha),
            }
            if classes:
                stages, accumulated = similarity_maps(model, image, classes)
                rows = [names[index] for index in classes]
                pictures["maps"] = visualize.similarity_picture(
                    pixels, stages, accumulated, rows, layers=model.config.upsample
                )
            for kind, picture in pictures.items():
                atomic_write(out / f"{stem}_{kind}.png", lambda path, p=picture: p.save(path, "PNG"))
            print(f"{file}: {_summary(labels, names)} -> {out / stem}_overlay.png", flush=True)
    return 0


def _summary(labels: np.ndarray, names: Sequence[str]) -> str:
    from segvit.visualize import format_share, legend_entries

    entries = legend_entries(labels, names)
    shares = ", ".join(f"{entry.name} {format_share(entry.share)}" for entry in entries[:4])
    return f"{shares}, {len(entries) - 4} more" if len(entries) > 4 else shares
