"""OpenVINO's files: a .xml and, beside it, a .bin with the weights; from the ONNX graph."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segvit.exporting import onnx
from segvit.exporting.graph import LabelGraph, Plan, arranged
from segvit.exporting.metadata import KEY, read
from segvit.model.segvit import SegViT
from segvit.system.extras import require
from segvit.system.files import replace, synchronise

__all__ = ["build", "check", "load", "save"]

# What the CPU is asked to compute in: by itself it may choose bfloat16 for a float32 file.
_HINTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "f32"}


_WEIGHTS = "segvit_weights"  # in a .xml: the SHA-256 of its .bin
_UNKNOWN = "of the weights that are not written yet"


def check(plan: Plan) -> None:
    """Raise for what cannot be had.

    Raises:
        ValueError: int8 without calibration. ImportError: a package is not installed.
    """
    plan.check_calibration()
    onnx.require_exporter()
    require("openvino", extra="export")
    if plan.int8:
        require("nncf", extra="export")


def build(model: SegViT, plan: Plan) -> LabelGraph:
    """The graph that `save` writes, in float32: the weights become float16 in the file."""
    return LabelGraph(model, plan, torch.float32)


def save(graph: LabelGraph, path: Path, text: str) -> None:
    """Write the .xml and the .bin, with `text` in the model's runtime information.

    Raises:
        OSError: they cannot be written.
    """
    runtime = require("openvino", extra="export")
    proto = onnx.proto(graph)
    model = runtime.Core().read_model(io.BytesIO(proto.SerializeToString()))
    if graph.plan.int8:
        model = _quantized(model, {node.output[0] for node in onnx.projections(proto)}, graph.plan)
    model.set_rt_info(text, [KEY])
    model.set_rt_info(_UNKNOWN, [_WEIGHTS])
    _write(model, path, compress=graph.plan.dtype != torch.float32)


def _quantized(model: Any, outputs: set[str], plan: Plan) -> Any:
    """The model with the products that make these tensors in 8 bits, by NNCF."""
    nncf = require("nncf", extra="export")
    products = [op for op in model.get_ordered_ops() if op.get_type_name() in ("MatMul", "Convolution")]
    others = [op.get_friendly_name() for op in products if not outputs & set(op.output(0).get_names())]
    with onnx.quiet():
        return nncf.quantize(
            model,
            nncf.Dataset([arranged(pictures, plan).numpy() for pictures in plan.calibration]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(plan.calibration),
            ignored_scope=nncf.IgnoredScope(names=others),
        )


def _write(model: Any, path: Path, compress: bool) -> None:
    """Both files, whole or not at all; the .xml, which is opened, comes last."""
    runtime = require("openvino", extra="export")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem[:40]}.") as folder:
            made = Path(folder) / f"{path.stem}.xml"  # what it knows the format by: not .XML
            runtime.save_model(model, made, compress_to_fp16=compress)
            written = made.read_text(encoding="utf-8")
            made.write_text(written.replace(_UNKNOWN, _digest(made), 1), encoding="utf-8")
            runtime.Core().read_model(made)  # a full disk is no error to it, but here
            os.chmod(folder, 0o700)
            for file, target in ((made.with_suffix(".bin"), path.with_suffix(".bin")), (made, path)):
                synchronise(file)
                replace(file, target)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise OSError(f"{path}: cannot be written ({reason})") from None


def _digest(path: Path) -> str:
    """Of the weights of a .xml."""
    with path.with_suffix(".bin").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Compiled:
    """A file in OpenVINO, on the CPU, in the precision that it was exported for."""

    def __init__(self, path: Path) -> None:
        core = require("openvino", extra="export").Core()
        try:
            model = core.read_model(path)
            self.text = str(model.get_rt_info([KEY]).astype(str)) if model.has_rt_info([KEY]) else None
            if model.has_rt_info([_WEIGHTS]) and model.get_rt_info([_WEIGHTS]).astype(str) != _digest(path):
                weights = path.with_suffix(".bin").name
                raise ValueError(f"{path}: {weights} has the weights of another file; they belong together")
            precision = read(self.text, str(path)).precision
            options = {
                "INFERENCE_PRECISION_HINT": _HINTS[precision],
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "NUM_STREAMS": 1,
            }
            self.request = core.compile_model(model, "CPU", options).create_infer_request()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1][:200]
            raise ValueError(f"{path}: OpenVINO cannot run it ({reason})") from None

    def __call__(self, pictures: np.ndarray) -> list[np.ndarray]:
        found = self.request.infer([pictures])
        return [np.array(found[i]) for i in range(len(found))]


def load(path: Path) -> _Compiled:
    """A callable from pictures to outputs, with the file's metadata as `text`.

    Raises:
        ImportError: OpenVINO is not installed.
        ValueError: not a file that it can run.
    """
    return _Compiled(path)
