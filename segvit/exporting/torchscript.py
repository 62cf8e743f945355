"""TorchScript files: a trace for one size, run by libtorch without this package."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch

from segvit.exporting.graph import LabelGraph, Plan, example, plain_program
from segvit.exporting.metadata import KEY
from segvit.model.segvit import SegViT
from segvit.system.files import atomic_write

__all__ = ["build", "check", "load", "save"]


def check(plan: Plan) -> None:
    """Raise ValueError for what a trace cannot have."""
    if plan.size is None:
        raise ValueError("size: got none, expected height and width: TorchScript is traced for one size")
    if plan.batch is None:
        raise ValueError("batch: got any, expected a number: TorchScript is traced for one batch")
    if plan.int8:
        raise ValueError("dtype: got int8, expected a float type for TorchScript")


def build(model: SegViT, plan: Plan) -> LabelGraph:
    """The graph that `save` writes."""
    return LabelGraph(model, plan)


def save(graph: LabelGraph, path: Path, text: str) -> None:
    """Trace the graph and write it, with `text` as an extra file.

    Raises:
        OSError: it cannot be written.
    """
    config = graph.network.config
    pictures = example(graph, config.backbone.in_channels, config.image_size)
    plain = plain_program(graph, pictures).module()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(plain, (pictures,), check_trace=False)
        buffer = io.BytesIO()  # where a disk is full its own writer ends the program
        torch.jit.save(traced, buffer, _extra_files={KEY: text})
    atomic_write(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


class _Script:
    """A trace, on the CPU."""

    def __init__(self, path: Path) -> None:
        extra = {KEY: ""}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.script = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0].split(". ")[0][:200]
            raise ValueError(f"{path}: TorchScript cannot load it ({reason})") from None
        text = extra[KEY]
        self.text = text.decode() if isinstance(text, bytes) else text

    def __call__(self, pictures: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return [output.numpy() for output in self.script(torch.from_numpy(pictures))]


def load(path: Path) -> _Script:
    """A callable from pictures to outputs, with the file's metadata as `text`.

    Raises:
        ValueError: not a file of TorchScript.
    """
    return _Script(path)
