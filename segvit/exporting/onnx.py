"""ONNX files: operators of the standard domain alone, opset 18."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segvit.exporting.graph import LabelGraph, Plan, arranged, example, plain_program
from segvit.exporting.metadata import KEY
from segvit.model.segvit import SegViT
from segvit.system.extras import require
from segvit.system.files import atomic_write
from segvit_kernels import __version__

__all__ = ["OPSET", "build", "check", "load", "projections", "proto", "quiet", "require_exporter", "save"]

OPSET = 18
_LARGEST = 2_000_000_000  # a protobuf message has no more bytes than 2^31


def check(plan: Plan) -> None:
    """Raise for what an ONNX file cannot have.

    Raises:
        ValueError: bfloat16. ImportError: a package is not installed.
    """
    if plan.dtype == torch.bfloat16:
        raise ValueError(
            f"dtype: got bfloat16, expected float32 or float16: opset {OPSET} has no convolution of it"
        )
    plan.check_calibration()
    require_exporter()
    if plan.int8:
        require("onnxruntime", extra="export")


def require_exporter() -> None:
    """Raise ImportError where a package is missing that writes the graph."""
    for name in ("onnx", "onnxscript"):
        require(name, extra="export")


def build(model: SegViT, plan: Plan) -> LabelGraph:
    """The graph that `save` writes."""
    return LabelGraph(model, plan)


def save(graph: LabelGraph, path: Path, text: str) -> None:
    """Write the graph of a model to one file, with `text` in its metadata.

    Raises:
        ValueError: it is larger than an ONNX file can be.
        OSError: it cannot be written.
    """
    model = proto(graph)
    if graph.plan.int8:
        model = _quantized(model, projections(model), graph.plan)
    _finish(model, text)
    if model.ByteSize() > _LARGEST:
        gigabytes = model.ByteSize() / 1e9
        raise ValueError(
            f"dtype: the file would have {gigabytes:.1f} GB, more than ONNX's 2; expected float16"
        )
    atomic_write(path, lambda temporary: temporary.write_bytes(model.SerializeToString()))


def proto(graph: LabelGraph) -> Any:
    """The `onnx.ModelProto` of a graph."""
    config = graph.network.config
    pictures = example(graph, config.backbone.in_channels, config.image_size)
    with quiet():
        program = torch.onnx.export(
            plain_program(graph, pictures),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=["pictures"],
            output_names=list(graph.plan.names),
        )
    assert program is not None
    model = program.model_proto
    _name_axes(model, graph.plan)
    return model


def projections(model: Any) -> list[Any]:
    """The nodes that are the linear layers of the backbone's blocks."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm")
        and weights.intersection(node.input)
        and any("network.backbone.blocks." in entry.value for entry in node.metadata_props)
    ]


def _finish(model: Any, text: str) -> None:
    """Leave out what the exporter notes of this machine, add the metadata, and check."""
    onnx = require("onnx", extra="export")

    def clean(graph: Any) -> None:
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    clean(attribute.g)
        for value in (*graph.input, *graph.output, *graph.initializer):
            del value.metadata_props[:]
        del graph.metadata_props[:], graph.value_info[:]
        graph.doc_string = ""

    clean(model.graph)
    model.graph.name, model.producer_name, model.producer_version = "segvit", "segvit", __version__
    used = {node.domain for node in model.graph.node}
    for entry in [e for e in model.opset_import if e.domain and e.domain not in used]:
        model.opset_import.remove(entry)
    onnx.helper.set_model_props(model, {KEY: text})
    onnx.checker.check_model(model, full_check=True)


def _quantized(model: Any, nodes: list[Any], plan: Plan) -> Any:
    """The model with these nodes in 8 bits: weights by output, inputs by the range that they have."""
    onnx = require("onnx", extra="export")
    quantization: Any = require("onnxruntime.quantization", extra="export")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        pictures = iter(plan.calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            found = next(self.pictures, None)
            return None if found is None else {"pictures": arranged(found, plan).numpy()}

    with quiet(), tempfile.TemporaryDirectory(prefix="segvit-") as folder:
        made = Path(folder) / "int8.onnx"
        quantization.quantize_static(
            model,
            str(made),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            nodes_to_quantize=[node.name for node in nodes],
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )
        return onnx.load(str(made))


def _name_axes(model: Any, plan: Plan) -> None:
    """Open axes are called batch, height and width."""
    (taken,) = model.graph.input
    height = 1 if plan.channels_last else 2
    names = {0: "batch", height: "height", height + 1: "width"}
    renamed = {}
    for axis, dim in enumerate(taken.type.tensor_type.shape.dim):
        if dim.dim_param:
            renamed[dim.dim_param] = dim.dim_param = names[axis]
    for output in model.graph.output:
        for dim in output.type.tensor_type.shape.dim:
            if dim.dim_param:
                known = renamed.get(dim.dim_param)
                dim.Clear() if known is None else setattr(dim, "dim_param", known)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter's progress and its warnings about other people's code are not for users."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


class _Session:
    """A file in ONNX Runtime, on the CPU."""

    def __init__(self, path: Path) -> None:
        runtime = require("onnxruntime", extra="export")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.log_severity_level = 3
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own classes, which share no base
            reason = str(error).strip().splitlines()[0][:200]
            raise ValueError(f"{path}: ONNX Runtime cannot load it ({reason})") from None
        self.text = self.session.get_modelmeta().custom_metadata_map.get(KEY)

    def __call__(self, pictures: np.ndarray) -> list[np.ndarray]:
        return self.session.run(None, {self.session.get_inputs()[0].name: pictures})


def load(path: Path) -> _Session:
    """A callable from pictures to outputs, with the file's metadata as `text`.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: no such file, or not one that it can run.
    """
    return _Session(path)
