"""Files with the label map inside: a uint8 picture in, a label map out, without this package.

`segvit.export(model, path)` writes one, `open_model` runs one in the place of a checkpoint. A format is an
entry in `FORMATS` and a module here with

- `check(plan)`: raises for what the format cannot do or what is not installed,
- `build(model, plan)`: what is written, for a `segvit.exporting.graph.Plan`,
- `save(built, path, text)`: writes it, with a text in the file's metadata,
- `load(path)`: a callable from uint8 pictures to a list of arrays, the metadata as its `text`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segvit.exporting import metadata
from segvit.exporting.exported import ExportedModel
from segvit.exporting.graph import Plan
from segvit.model.heads import SegViT, load_model
from segvit.options import InferenceOptions
from segvit.system.files import make_folder
from segvit_kernels import without_autocast

__all__ = ["FORMATS", "PRECISIONS", "export", "format_of", "open_model"]


class Format(NamedTuple):
    """A kind of file: the suffix, the module here that knows it, and what it is for readers."""

    suffix: str
    module: str
    what: str

    def load(self) -> ModuleType:
        return import_module(f"{__name__}.{self.module}")


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", "onnx", "ONNX, standard operators"),
    "openvino": Format(".xml", "openvino", "OpenVINO"),
    "torchscript": Format(".torchscript", "torchscript", "TorchScript; libtorch"),
    "pt2": Format(".pt2", "aot", "C++ by AOTInductor, our operators fused; libtorch, on such a machine"),
}
PRECISIONS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,  # of what is not in int8
}


def format_of(path: str | Path, asked: str = "auto") -> str:
    """The format of a file by its name, or the one asked for where the name fits it.

    Raises:
        ValueError: it does not, or no format has this suffix.
    """
    suffix = Path(path).suffix.lower()
    if asked == "auto":
        found = [name for name, known in FORMATS.items() if known.suffix == suffix]
        if not found:
            listed = ", ".join(f"{known.suffix} ({name})" for name, known in FORMATS.items())
            raise ValueError(f"out: got {path}, expected a file name that ends in {listed}")
        return found[0]
    if asked not in FORMATS:
        raise ValueError(f"format: got {asked!r}, expected {' or '.join(FORMATS)}")
    if suffix != FORMATS[asked].suffix:
        raise ValueError(
            f"out: got {path}, expected a file name that ends in {FORMATS[asked].suffix} ({asked})"
        )
    return asked


def export(
    model: SegViT,
    path: str | Path,
    *,
    format: str = "auto",
    size: tuple[int, int] | None = None,
    batch: int | None = 1,
    channels_last: bool = False,
    outputs: str = "labels",
    dtype: str = "float32",
    options: InferenceOptions | None = None,
    calibration: Sequence[Tensor] = (),
    source: str | None = None,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as a file that takes uint8 pictures and gives label maps at their own size.

    Args:
        model: it stays as it is.
        path: of the file, which appears whole or not at all; it may replace another export.
        format: a name in `FORMATS`; by default by the suffix.
        size: height and width of the pictures; None: any, where the format can.
        batch: pictures of a call; None: any number.
        channels_last: pictures are (B, H, W, channels), else (B, channels, H, W).
        outputs: "labels"; "scores": the winner's score too; "logits": mask logits of the patch grid and class
            probabilities in place of labels.
        dtype: of the network: "float32", "float16", "bfloat16", or "int8" for the backbone's projections.
        options: windows, scales and mirroring, inside the graph; need a size.
        calibration: uint8 pictures (B, channels, H, W) of the data that the model is for, for int8, of the
            size and as many as a call takes.
        source: where the model comes from, for the file's metadata.
        data: the meaning of label values in its training and the share of pictures kept for validation, as
            `segvit train` records them (`labels`, `validation_share` of data.json), for `segvit evaluate`.

    Raises:
        TypeError: pictures of `calibration` that are not uint8.
        ValueError: an argument is out of range, they do not go together, or `path` is a file of others.
        ImportError: the format's packages are not installed.
        OSError: the file cannot be written.
    """
    path = Path(path)
    name = format_of(path, format)
    if dtype not in PRECISIONS:
        raise ValueError(f"dtype: got {dtype!r}, expected {' or '.join(PRECISIONS)}")
    if outputs not in ("labels", "scores", "logits"):
        raise ValueError(f"outputs: got {outputs!r}, expected labels, scores or logits")
    plan = Plan(
        size,
        batch,
        channels_last,
        outputs,
        PRECISIONS[dtype],
        dtype == "int8",
        tuple(calibration) if dtype == "int8" else (),
        options or InferenceOptions(),
    )
    plan.check(model.config.backbone.patch_size, model.config.class_names)
    plan.check_pictures(model.config.backbone.in_channels)
    _check_out(path, path.with_suffix(".bin") if name == "openvino" else path)
    module = FORMATS[name].load()
    module.check(plan)
    make_folder(path.resolve().parent)
    about = {"format": name, "precision": dtype, "source": source, "data": dict(data or {})}
    with without_autocast(model.mean.device):  # the precision is the file's own
        module.save(module.build(model, plan), path, metadata.describe(model.config, plan, about))


def _check_out(path: Path, beside: Path) -> None:
    """Raises ValueError where `path` or the file beside it is there and nobody's export."""
    there = next((file for file in (path, beside) if os.path.lexists(file)), None)
    if there and not (path.is_file() and metadata.is_described(path)):
        raise ValueError(f"out: {there} is there already and not from segvit export; choose another file")


def open_model(path: str | Path) -> SegViT | ExportedModel:
    """The model of a checkpoint, or an exported file in its place.

    Raises:
        FileNotFoundError, ValueError: neither, or not readable.
        ImportError: the runtime of the file's format is not installed.
    """
    file = Path(path)
    name = next((name for name, known in FORMATS.items() if known.suffix == file.suffix.lower()), None)
    if name is None or file.is_dir():
        return load_model(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    run = FORMATS[name].load().load(file)
    return ExportedModel(file, metadata.read(run.text, str(path)), run)
