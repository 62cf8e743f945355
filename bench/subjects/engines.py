"""Engines that a user would run the published formula with on a CPU, and ours, from the same weights.

Each takes one uint8 image to its label map. Precision is always asked for: what OpenVINO chooses by itself
depends on the processor. An engine is prepared (exported, quantised) in a process of its own, so that what it
holds in memory is what its users' programs would hold.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import segvit
from bench.measure import environment, peaks
from bench.subjects import counts, models
from bench.subjects.published import Model
from segvit.exporting import open_model

Call = Callable[[], Any]
GRAPH, REFERENCE, EXPORT = "model.onnx", "labels-{}.npy", "exported-{}{}"
INT8 = {"ONNX Runtime": "onnxruntime-int8.onnx", "OpenVINO": "openvino-int8.xml"}


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine and the precisions that it has on CPUs.

    Attributes:
        load: the call from a model's size, precision, the folder of :func:`prepare`, and threads; it gives a
            label map (1, H, W).
        packages: what has to be importable.
        what: for readers.
        suffix: of the file of ``segvit export`` that it runs, where it runs one.
    """

    name: str
    dtypes: tuple[str, ...]
    what: str
    load: Callable[[Model, str, Path, int], Call]
    packages: tuple[str, ...] = ()
    suffix: str = ""

    def missing(self) -> str | None:
        """Why it cannot be measured here; ``None`` if it can."""
        return environment.missing(self.packages)

    def files(self, dtype: str) -> list[tuple[str, ...]]:
        """What it reads, in order: a file, and the function here that makes it with its first values."""
        found: list[tuple[str, ...]] = [(REFERENCE.format("bfloat16"), "references")]
        if self.suffix:
            return [*found, (EXPORT.format(dtype, self.suffix), "exported", dtype, self.suffix)]
        found += [(GRAPH, "export")] if self.packages else []
        return found + (
            [(INT8[self.name], "quantize", self.name)] if dtype == "int8" and self.packages else []
        )


class _Labels(nn.Module):
    """The published formula as a module, for exporters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return models._published_labels(self.model, images)


def _model(spec: Model) -> tuple[nn.Module, Tensor]:
    device = torch.device("cpu")
    return models.build(models.PUBLISHED, spec, device), models.inputs(spec, 1, device)[0]


# ------------------------------------------------------------------------------------------ preparation


def references(size: dict, folder: str) -> None:
    """Label maps by the published formula, in float32 and bfloat16."""
    model, images = _model(Model(**size))
    with torch.inference_mode():
        for dtype in ("float32", "bfloat16"):
            labels = models.published_labels(model.to(getattr(torch, dtype)), images)
            np.save(Path(folder) / REFERENCE.format(dtype), labels.numpy())


def export(size: dict, folder: str) -> None:
    """The published formula in float32 as an ONNX graph."""
    model, images = _model(Model(**size))
    with counts.plain_operators(), torch.inference_mode():
        torch.onnx.export(
            _Labels(model).eval(),
            (images,),
            str(Path(folder) / GRAPH),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["labels"],
        )


def exported(dtype: str, suffix: str, size: dict, folder: str) -> None:
    """What ``segvit export`` writes for one picture of this size."""
    model, _ = _model(Model(**size))
    path = Path(folder) / EXPORT.format(dtype, suffix)
    segvit.export(model, path, size=(size["size"], size["size"]), dtype=dtype)


def _quantize_onnxruntime(folder: str) -> None:
    """Weights by channel; activations when they are there (dynamic)."""
    quantization = importlib.import_module("onnxruntime.quantization")
    source, target = Path(folder) / GRAPH, Path(folder) / INT8["ONNX Runtime"]
    quantization.quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        use_external_data_format=True,
    )


def _quantize_openvino(size: dict, folder: str) -> None:
    """After training, by NNCF, calibrated on images as they are measured."""
    nncf, openvino = importlib.import_module("nncf"), importlib.import_module("openvino")
    images = [_model_input(Model(**size), seed) for seed in range(4)]
    quantized = nncf.quantize(
        openvino.Core().read_model(Path(folder) / GRAPH),
        nncf.Dataset(images),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
        fast_bias_correction=True,
    )
    openvino.save_model(quantized, Path(folder) / INT8["OpenVINO"], compress_to_fp16=False)


def _model_input(spec: Model, seed: int) -> np.ndarray:
    shape = (1, 3, spec.size, spec.size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def quantize(name: str, size: dict, folder: str) -> None:
    """The int8 form of an engine's graph, from the float32 one."""
    if name == "ONNX Runtime":
        _quantize_onnxruntime(folder)
    else:
        _quantize_openvino(size, folder)


# ------------------------------------------------------------------------------------------ engines


def _ours(spec: Model, dtype: str, folder: Path, threads: int) -> Call:
    torch.set_num_threads(threads)
    model, images = _model(spec)
    int8 = dtype == "int8"
    kind = torch.bfloat16 if int8 else getattr(torch, dtype)
    engine = model.compile_for_inference(spec.size, dtype=kind, int8=int8)
    return lambda: engine(images).numpy()


def _published(spec: Model, dtype: str, folder: Path, threads: int) -> Call:
    torch.set_num_threads(threads)
    model, images = _model(spec)
    model = model.to(getattr(torch, dtype)).eval()

    def call() -> np.ndarray:
        with torch.inference_mode():
            return models.published_labels(model, images).numpy()

    return call


def _exported(suffix: str) -> Callable[[Model, str, Path, int], Call]:
    def load(spec: Model, dtype: str, folder: Path, threads: int) -> Call:
        torch.set_num_threads(threads)
        loaded = open_model(folder / EXPORT.format(dtype, suffix))
        images = models.inputs(spec, 1, torch.device("cpu"))[0]
        return lambda: loaded.outputs(images)[0].numpy()

    return load


def _compiled(mode: str) -> Callable[[Model, str, Path, int], Call]:
    def load(spec: Model, dtype: str, folder: Path, threads: int) -> Call:
        torch.set_num_threads(threads)
        model, images = _model(spec)
        run = torch.compile(_Labels(model.to(getattr(torch, dtype))).eval(), mode=mode)

        def call() -> np.ndarray:
            with torch.no_grad(), torch._inductor.config.patch(freezing=True), models._plain_but_attention():
                return run(images).numpy()

        return call

    return load


def _onnxruntime(spec: Model, dtype: str, folder: Path, threads: int) -> Call:
    library = importlib.import_module("onnxruntime")
    options = library.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    path = folder / (INT8["ONNX Runtime"] if dtype == "int8" else GRAPH)
    session = library.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: models.inputs(spec, 1, torch.device("cpu"))[0].numpy()}
    return lambda: session.run(None, inputs)[0]


def _openvino(spec: Model, dtype: str, folder: Path, threads: int) -> Call:
    library = importlib.import_module("openvino")
    core = library.Core()
    # What int8 leaves runs in bfloat16 where the processor has products of it.
    known = torch.cpu.get_capabilities()
    wide = "bf16" if known.get("amx_bf16") or known.get("avx512_bf16") else "f32"
    options = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16", "int8": wide}[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    path = folder / (INT8["OpenVINO"] if dtype == "int8" else GRAPH)
    request = core.compile_model(path, "CPU", options).create_infer_request()
    images = models.inputs(spec, 1, torch.device("cpu"))[0].numpy()
    return lambda: request.infer([images], share_inputs=True)[0]


_GRAPHS = ("onnx", "onnxscript")
ENGINES = (
    Engine("SegViT engine", ("float32", "bfloat16", "int8"), "SegViT.compile_for_inference", _ours),
    Engine("PyTorch", ("float32", "bfloat16"), "the published formula, operator by operator", _published),
    Engine(
        "torch.compile",
        ("float32", "bfloat16"),
        "the published formula with torch's attention, weights frozen",
        _compiled("default"),
    ),
    Engine(
        "torch.compile, max-autotune",
        ("float32", "bfloat16"),
        "the same, products chosen by trying",
        _compiled("max-autotune"),
    ),
    Engine(
        "ONNX Runtime",
        ("float32", "int8"),
        "the published formula; int8: activations quantised when they are there",
        _onnxruntime,
        ("onnxruntime", *_GRAPHS),
    ),
    Engine(
        "OpenVINO",
        ("float32", "bfloat16", "int8"),
        "the published formula; int8: NNCF, calibrated on four images",
        _openvino,
        ("openvino", "nncf", *_GRAPHS),
    ),
)


_OURS = next(engine for engine in ENGINES if engine.load is _ours)
_PLAIN = next(engine for engine in ENGINES if engine.load is _published)
EXPORTS = (
    _PLAIN,
    dataclasses.replace(_OURS, dtypes=("float32", "bfloat16")),
    Engine(
        "exported, ONNX Runtime",
        ("float32",),
        "segvit export NAME.onnx",
        _exported(".onnx"),
        ("onnxruntime", *_GRAPHS),
        ".onnx",
    ),
    Engine(
        "exported, OpenVINO",
        ("float32", "bfloat16"),
        "segvit export NAME.xml",
        _exported(".xml"),
        ("openvino", *_GRAPHS),
        ".xml",
    ),
    Engine(
        "exported, AOTInductor",
        ("float32", "bfloat16"),
        "segvit export NAME.pt2",
        _exported(".pt2"),
        suffix=".pt2",
    ),
)
TABLES = {"engines": ENGINES, "exports": EXPORTS}


def serve(name: str, size: dict, dtype: str, folder: str, threads: int) -> tuple[dict, Call]:
    """For `bench.measure.workers`: the call, and the shares of its labels that are the references' (and of
    the reference in bfloat16 that are those in float32)."""
    engine = next(engine for table in TABLES.values() for engine in table if engine.name == name)
    if engine.packages:  # as torch is already: a library is no part of an engine's memory
        importlib.import_module(engine.packages[0])
    resident = peaks.resident()
    call = engine.load(Model(**size), dtype, Path(folder), threads)
    labels = np.asarray(call())
    expected, lower = (np.load(Path(folder) / REFERENCE.format(d)) for d in ("float32", "bfloat16"))
    if labels.shape != expected.shape:
        raise ValueError(f"label maps are {labels.shape}, expected {expected.shape}")
    for _ in range(2):  # some engines are ready after their second or third call only
        call()
    info = {
        "agreement": float((labels == expected).mean()),
        "bfloat16": float((lower == expected).mean()),
        "resident": resident,
    }
    if engine.suffix:  # OpenVINO's weights lie beside
        files = Path(folder).glob(Path(EXPORT.format(dtype, engine.suffix)).stem + ".*")
        kinds = {engine.suffix, ".bin"} if engine.suffix == ".xml" else {engine.suffix}
        info["file_bytes"] = sum(path.stat().st_size for path in files if path.suffix in kinds)
    return info, call
