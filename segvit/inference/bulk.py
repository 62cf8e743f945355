"""Prediction of many pictures: what is computed and written for each, and under which names."""

from __future__ import annotations

import os
import shutil
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from segvit.data.pictures import as_rgb, read_image
from segvit.inference.classes import class_colors, class_names
from segvit.inference.passes import check_region, label_maps_with_scores
from segvit.inference.protocol import Predictor
from segvit.inference.similarity import similarity_maps
from segvit.options import PredictConfig
from segvit.pictures.visualize import (
    format_share,
    legend_entries,
    overlay_with_legend,
    similarity_picture,
)
from segvit.system.extras import require
from segvit.system.failures import one_line
from segvit.system.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["KINDS", "CannotWriteError", "Job", "find_classes", "output_stems"]


def find_classes(wanted: Sequence[str], names: Sequence[str], option: str = "maps") -> list[int]:
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
            raise ValueError(f"{option}: no class {word!r}; {hint}The {len(names)} classes: {listing}")
    return list(dict.fromkeys(indices))


KINDS = {
    "labels": ".png",
    "overlay": ".png",
    "maps": ".png",
    "scores": ".npz",
    "probabilities": ".npz",
}
_LONGEST_NAME = 240  # bytes; file systems take 255, and others count in other units


def output_stems(files: Sequence[Path], out: Path) -> list[str]:
    """A stem of output files for each file, that no other has on any file system.

    Files of one stem get numbers, also where only capital letters or the composition of accents differ. Names
    too long for what is appended to them are cut, those that Windows keeps for devices lose their dot.

    Raises:
        ValueError: an output would be written over an input.
    """
    inputs = {file.resolve() for file in files}
    taken: set[str] = set()
    stems: list[str] = []
    room = _LONGEST_NAME - max(len(f"_{kind}{suffix}") for kind, suffix in KINDS.items())
    for file in files:
        base = file.stem
        if PureWindowsPath(f"{base}_labels.png").is_reserved():
            base = base.replace(".", "_", 1)
        if len(os.fsencode(base)) > room:
            whole = os.fsencode(base)
            base = f"{os.fsdecode(whole[: room - 20]).rstrip(chr(0xFFFD))}~{zlib.crc32(whole):08x}"
        stem, number = base, 1
        while (key := unicodedata.normalize("NFC", stem).casefold()) in taken:
            number += 1
            stem = f"{base}_{number}"
        taken.add(key)
        stems.append(stem)
        for kind, suffix in KINDS.items():
            target = out / f"{stem}_{kind}{suffix}"
            if target.resolve() in inputs:
                raise ValueError(
                    f"out: {target} is an input picture and would be overwritten; choose another folder"
                )
    return stems


def label_picture(labels: np.ndarray, num_classes: int) -> Image.Image:
    """Class indices (H, W) as grey values: 8-bit, or 16-bit above 256 classes."""
    image_module = require("PIL.Image", extra="train")
    return image_module.fromarray(labels.astype(np.uint8 if num_classes <= 256 else np.uint16))


class CannotWriteError(OSError):
    """No picture can be written any more."""


class Job:
    """What is predicted and written for each picture.

    Args:
        config: the options.
        model: in evaluation mode.
        out: the folder for the results.
        classes: indices whose similarity maps are drawn.
        kept: indices whose scores are stored.
    """

    def __init__(
        self, config: PredictConfig, model: Predictor, out: Path, classes: Sequence[int], kept: Sequence[int]
    ) -> None:
        self.config, self.model, self.out, self.classes, self.kept = config, model, out, classes, kept
        self.names, self.palette = class_names(model.config), class_colors(model.config)

    def predict(self, file: Path, scratch: ExitStack) -> tuple[dict[str, Callable[[Path], Any]], str]:
        """What is to be written for a picture, by kind, each as a function of the path; and a summary."""
        image = read_image(file, **self.model.config.reading)
        labels, writers = self._labels(image, scratch)
        pixels = as_rgb(image).permute(1, 2, 0).numpy()
        pictures = {
            "labels": label_picture(labels, len(self.names)),
            "overlay": overlay_with_legend(pixels, labels, self.names, self.palette, alpha=self.config.alpha),
        }
        if self.classes:
            stages, accumulated = similarity_maps(self.model, image, self.classes)
            rows = [self.names[index] for index in self.classes]
            pictures["maps"] = similarity_picture(
                pixels, stages, accumulated, rows, layers=self.model.config.upsample
            )
        for kind, picture in pictures.items():
            writers[kind] = lambda path, picture=picture: picture.save(path, "PNG")
        return writers, _summary(labels, self.names)

    def _labels(
        self, image: torch.Tensor, scratch: ExitStack
    ) -> tuple[np.ndarray, dict[str, Callable[[Path], Any]]]:
        kinds = [kind for kind in ("scores", "probabilities") if getattr(self.config, kind)]
        if not kinds:
            return self.model.predict(image, self.config).cpu().numpy(), {}
        size = tuple(image.shape[1:])
        region = check_region(self.config.region or (0, 0, size[1], size[0]), size)
        files = {kind: scratch.enter_context(_ScoreFile(self, region)) for kind in kinds}

        def take(first: int, block: torch.Tensor) -> None:
            for kind, file in files.items():
                file.add(first, (block if kind == "scores" else self.model.probabilities(block))[0])

        batch = self.model.preprocess(image[None])
        labels = label_maps_with_scores(self.model, batch, self.config, take)
        writers = {kind: lambda path, kind=kind: files[kind].save(path, kind) for kind in kinds}
        return labels[0].cpu().numpy(), writers

    def write(self, path: Path, writer: Callable[[Path], Any]) -> None:
        try:
            atomic_write(path, writer)
        except OSError as error:
            text = one_line(error)
            where = "" if str(path) in text else f"{path}: cannot be written: "
            raise CannotWriteError(f"{where}{text}") from None


class _ScoreFile:
    """Scores that come in blocks of rows, on disk until they are packed into an .npz file."""

    def __init__(self, job: Job, region: tuple[int, int, int, int]) -> None:
        self.job, self.region = job, region
        self.kind = np.dtype(job.config.score_type)

    def __enter__(self) -> _ScoreFile:
        # In the output folder: the system's own for such files is often small.
        self.file = tempfile.SpooledTemporaryFile(max_size=1 << 26, dir=self.job.out)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, first: int, block: torch.Tensor) -> None:
        """Take rows of scores (N, rows, W), from row `first` of the picture on."""
        left, top, width, height = self.region
        start, stop = max(first, top), min(first + block.shape[1], top + height)
        if start >= stop:
            return
        for place, index in enumerate(self.job.kept):
            values = block[index, start - first : stop - first, left : left + width]
            values = values.mul(255).round() if self.kind == np.uint8 else values
            rows = values.cpu().numpy().astype(self.kind)
            try:
                self.file.seek((place * height + start - top) * width * self.kind.itemsize)
                self.file.write(rows.tobytes())
            except OSError as error:
                raise CannotWriteError(f"{self.job.out}: cannot be written: {one_line(error)}") from None

    def save(self, path: Path, name: str) -> None:
        """Write the .npz file: `name` (K, height, width), `classes` (K), `names` (K), `region` (4)."""
        shape = (len(self.job.kept), self.region[3], self.region[2])
        beside = {
            "classes": np.array(self.job.kept),
            "names": np.array([self.job.names[index] for index in self.job.kept]),
            "region": np.array(self.region),
        }
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                header = {"descr": self.kind.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(entry, header)
                self.file.seek(0)
                shutil.copyfileobj(self.file, entry, 1 << 20)
            for key, values in beside.items():
                with archive.open(f"{key}.npy", "w") as entry:
                    np.lib.format.write_array(entry, values, allow_pickle=False)


def _summary(labels: np.ndarray, names: Sequence[str]) -> str:
    entries = legend_entries(labels, names)
    shares = ", ".join(f"{entry.name} {format_share(entry.share)}" for entry in entries[:4])
    return f"{shares}, {len(entries) - 4} more" if len(entries) > 4 else shares
