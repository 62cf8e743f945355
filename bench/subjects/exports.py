"""Files of ``segvit export`` beside the models that they are of, and ways to write their tail."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import segvit
from bench.measure import environment, peaks
from bench.measure.environment import ROOT
from bench.subjects import models
from bench.subjects.published import Model
from segvit.exporting import graph, onnx
from segvit.options import InferenceOptions

TIES = 1e-4  # of the largest score: two scores nearer than this are a tie, which rounding decides
SHARED = Path(os.environ.get("SEGVIT_SHARED", ROOT.parent / "shared")) / "data" / "camvid"

# ------------------------------------------------------------------------------------------ labels


@dataclasses.dataclass(frozen=True)
class Case(Model):
    """A preset at its own size, exported for one picture, or for any, with options of ``predict`` inside."""

    patch: int = 16
    class_token: bool = False
    options: str = "{}"

    def build(self, **overrides: Any) -> nn.Module:
        return super().build(patch_size=self.patch, class_token=self.class_token, **overrides)

    @property
    def inference(self) -> InferenceOptions:
        return InferenceOptions(**json.loads(self.options))


def _cases() -> tuple[Case, ...]:
    found = []
    for preset in ("vit_tiny", "vit_small", "vit_base", "vit_large"):
        size = 640 if preset == "vit_large" else 512
        for shrunk in (False, True):
            found.append(Case(f"{preset}{' Shrunk' * shrunk}", preset, 150, size, 0.0, shrunk))
    views = json.dumps({"window": 224, "stride": 168, "scales": [0.75, 1.0], "flip": True})
    for shrunk in (False, True):
        name = f"vit_small{' Shrunk' * shrunk}, patch 14, class token"
        found.append(Case(name, "vit_small", 150, 518, 0.0, shrunk, 14, True))
        found.append(Case(f"{name}, views", "vit_small", 150, 224, 0.0, shrunk, 14, True, views))
    return tuple(found)


CASES = _cases()
TINY_CASE = Case("tiny", "vit_tiny", 5, 64, 0.0)


@dataclasses.dataclass(frozen=True)
class File:
    """A kind of file, and the program that runs it where this package is not.

    Attributes:
        packages: what has to be importable.
        load: sets ``run``, from a uint8 array to a label map, with ``path`` and ``threads`` given.
        torch: whether the runtime is libtorch.
        open: for pictures of any size.
    """

    name: str
    suffix: str
    packages: tuple[str, ...]
    load: str
    torch: bool = False
    open: bool = False

    def missing(self) -> str | None:
        """Why it cannot be measured here; ``None`` if it can."""
        return environment.missing(self.packages)


_ONNX = """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = threads, 3
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
run = lambda pictures: session.run(None, {"pictures": pictures})[0]
"""
_OPENVINO = """
import openvino
options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
compiled = openvino.Core().compile_model(path, "CPU", options)
run = lambda pictures: compiled(pictures)[0]
"""
_TORCHSCRIPT = """
import torch
torch.set_num_threads(threads)
program = torch.jit.load(path)
run = lambda pictures: program(torch.from_numpy(pictures))[0].numpy()
"""
_PROGRAM = """
import tempfile, zipfile, torch
torch.set_num_threads(threads)
with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as place:
    torch.ops.load_library(archive.extract("program/segvit/libsegvit_native.so", place))
program = torch._inductor.aoti_load_package(path)
run = lambda pictures: program(torch.from_numpy(pictures)).numpy()
"""
_GRAPHS = ("onnx", "onnxscript")
FILES = (
    File("ONNX Runtime", ".onnx", ("onnxruntime", *_GRAPHS), _ONNX),
    File("ONNX Runtime, any size", ".onnx", ("onnxruntime", *_GRAPHS), _ONNX, open=True),
    File("OpenVINO", ".xml", ("openvino", *_GRAPHS), _OPENVINO),
    File("OpenVINO, any size", ".xml", ("openvino", *_GRAPHS), _OPENVINO, open=True),
    File("TorchScript", ".torchscript", (), _TORCHSCRIPT, torch=True),
    File("AOTInductor", ".pt2", (), _PROGRAM, torch=True),
)

_RUN = """
import sys, time
import numpy
path, threads, folder, count = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
for name in sys.argv[5:]:
    sys.modules[name] = None
begun = time.perf_counter()
{load}
print(time.perf_counter() - begun)
for index in range(count):
    pictures = numpy.load(f"{{folder}}/in-{{index}}.npy")
    numpy.save(f"{{folder}}/out-{{index}}.npy", run(pictures))
    begun = time.perf_counter()
    run(pictures)
    print(time.perf_counter() - begun)
"""


def picture() -> Tensor:
    """A street of CamVid, 480 x 360, uint8 (1, 3, H, W), where the data is; else blocks of colour."""
    from segvit.data import read_image

    files = sorted((SHARED / "images" / "validation").glob("*.jpg"))
    if files:
        return read_image(files[0])[None]
    blocks = torch.randint(0, 256, (1, 3, 23, 30), generator=torch.Generator().manual_seed(0))
    return F.interpolate(blocks.float(), size=(360, 480)).to(torch.uint8)


def expected(case: Case, pictures: list[Tensor]) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The model, and labels and scores of ``predict`` for pictures."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.segvit(case).eval().requires_grad_(False)
    return model, [model.predict(p, case.inference, return_scores=True) for p in pictures]


def compared(
    file: File, case: Case, model: nn.Module, pictures: list[Tensor], scored: list, folder: Path, threads: int
) -> dict:
    """A row: the file written, run in a process without this package, and its labels beside those of
    ``predict``; ``differ`` counts pixels, ``gap`` is the largest distance of the score of a label from the
    best one, as a share of the largest score.

    Raises:
        RuntimeError: the process failed; with the last line of its standard error.
    """
    path = folder / f"model{file.suffix}"
    begun = time.perf_counter()
    size = None if file.open else (pictures[0].shape[2], pictures[0].shape[3])
    segvit.export(model, path, size=size, options=case.inference)
    row = {"export_s": time.perf_counter() - begun}
    kinds = (".xml", ".bin") if file.suffix == ".xml" else (file.suffix,)
    row["file_bytes"] = sum(path.with_suffix(kind).stat().st_size for kind in kinds)
    given = pictures if file.open else pictures[:1]
    for index, image in enumerate(given):
        np.save(folder / f"in-{index}.npy", image.numpy())
    blocked = ["segvit", "segvit_kernels", *([] if file.torch else ["torch"])]
    command = [sys.executable, "-c", _RUN.format(load=file.load), path, threads, folder, len(given), *blocked]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    row["load_s"], row["call_s"] = map(float, done.stdout.split()[-1 - len(given) :][:2])
    found = [torch.from_numpy(np.load(folder / f"out-{index}.npy")) for index in range(len(given))]
    for kind in kinds:
        path.with_suffix(kind).unlink()
    return row | agreement(found, scored[: len(given)])


def agreement(found: list[Tensor], scored: list[tuple[Tensor, Tensor]]) -> dict:
    """``agreement``, ``differ``, ``gap`` and ``classes`` of label maps, beside labels and scores."""
    differ = pixels = 0
    gap, classes = 0.0, 0
    for labels, (own, scores) in zip(found, scored, strict=True):
        if labels.shape != own.shape:
            raise ValueError(f"label maps are {tuple(labels.shape)}, expected {tuple(own.shape)}")
        chosen = scores.gather(1, labels.long()[:, None])[:, 0]
        gap = max(gap, ((scores.amax(1) - chosen).max() / scores.abs().max()).item())
        differ, pixels = differ + int((labels != own).sum()), pixels + own.numel()
        classes = max(classes, own.unique().numel())
    return {"agreement": 1 - differ / pixels, "differ": differ, "gap": gap, "classes": classes}


# Files whose mIoU is measured beside the checkpoint's, which those in float32 have: name, suffix, precision.
PRECISIONS = (
    ("ONNX, int8", ".onnx", "int8"),
    ("OpenVINO, int8", ".xml", "int8"),
    ("AOTInductor, int8", ".pt2", "int8"),
)

# ------------------------------------------------------------------------------------------ the tail

CLASSES, GRID, SIZE = 150, 32, 512


class Tail(nn.Module):
    """Labels int32 (1, size, size) of mask logits (1, classes, grid, grid) and class probabilities
    (1, classes, classes), so many rows at a time.

    Args:
        rows: of a block; the size of the picture: all at once, by Resize.
        how: "unrolled": blocks one after the other in the graph; "scan": turns of a loop; "ranks": unrolled,
            maximum and rank in place of ArgMax; "last": unrolled, classes in the last dimension.
    """

    def __init__(self, rows: int, how: str, size: int = SIZE, grid: int = GRID) -> None:
        super().__init__()
        self.rows, self.how, self.size = rows, how, size
        hats = graph._hats((torch.arange(size) + 0.5) * (grid / size) - 0.5, grid)
        self.register_buffer("down", hats)
        self.register_buffer("across", hats.t().contiguous())

    def forward(self, masks: Tensor, probabilities: Tensor) -> Tensor:
        mixing = probabilities.transpose(1, 2).contiguous()
        if self.rows == self.size:
            whole = F.interpolate(masks, size=(self.size, self.size), mode="bilinear", align_corners=False)
            return self._labels(mixing, whole)
        if self.how == "scan":
            carried = (masks, mixing, self.across)

            def turn(carry: tuple, down: Tensor) -> tuple:
                return tuple(t.clone() for t in carry), self._labels(carry[1], down @ carry[0] @ carry[2])

            _, found = graph.scan(turn, carried, self.down.unflatten(0, (-1, self.rows)))
            return found.transpose(0, 1).flatten(1, 2)
        blocks = [self.down[y : y + self.rows] for y in range(0, self.size, self.rows)]
        return torch.cat([self._labels(mixing, down @ masks @ self.across) for down in blocks], 1)

    def _labels(self, mixing: Tensor, masks: Tensor) -> Tensor:
        if self.how == "last":
            scores = masks.sigmoid().flatten(2).transpose(1, 2) @ mixing.transpose(1, 2)
            return scores.argmax(2).int().unflatten(1, masks.shape[2:])
        scores = (mixing @ masks.sigmoid().flatten(2)).unflatten(2, masks.shape[2:])
        if self.how != "ranks":
            return scores.argmax(1).int()
        classes = scores.shape[1]
        ranks = torch.arange(classes, 0, -1, dtype=torch.float32)[None, :, None, None]  # the first of equals
        best = torch.where(scores == scores.amax(1, keepdim=True), ranks, ranks.new_zeros(())).amax(1)
        return (classes - best).int()


TAILS: dict[str, tuple[int, str]] = {
    "all at once: Resize, Sigmoid, MatMul, ArgMax": (SIZE, "unrolled"),
    "blocks of 64 rows, one after the other in the graph": (64, "unrolled"),
    "blocks of 32 rows": (32, "unrolled"),
    "blocks of 16 rows": (16, "unrolled"),
    "blocks of 8 rows": (8, "unrolled"),
    "blocks of 16 rows, maximum and rank in place of ArgMax": (16, "ranks"),
    "blocks of 16 rows, classes last": (16, "last"),
    "blocks of 16 rows in a Scan": (16, "scan"),
    "blocks of 8 rows in a Scan": (8, "scan"),
}
CHOSEN = ("blocks of 8 rows", "blocks of 8 rows in a Scan")  # of fixed sizes, and of any
RUNTIMES = {"ONNX Runtime": ("onnxruntime", *_GRAPHS), "OpenVINO": ("openvino", *_GRAPHS)}


def tail_inputs(classes: int = CLASSES, grid: int = GRID) -> tuple[Tensor, Tensor]:
    """Mask logits and class probabilities, drawn."""
    generator = torch.Generator().manual_seed(0)
    masks = 3 * torch.randn(1, classes, grid, grid, generator=generator)
    return masks, (4 * torch.randn(1, classes, classes, generator=generator)).softmax(-1)


def write_tail(rows: int, how: str, classes: int, grid: int, size: int, path: str) -> None:
    """The graph of a tail."""
    tail, inputs = Tail(rows, how, size, grid).eval(), tail_inputs(classes, grid)
    with onnx.quiet(), torch.no_grad():
        program = torch.onnx.export(
            torch.export.export(tail, inputs),
            dynamo=True,
            opset_version=onnx.OPSET,
            verbose=False,
            input_names=["masks", "probabilities"],
        )
    Path(path).write_bytes(program.model_proto.SerializeToString())


def run_tail(runtime: str, path: str, classes: int, grid: int, size: int, calls: int) -> dict:
    """``min_s`` of so many calls on one thread, ``extra_bytes`` held at most during the first one beyond what
    was held before it, and the share of labels that are those in float64; in a process of its own."""
    masks, probabilities = tail_inputs(classes, grid)
    call = _tail_call(runtime, path, {"masks": masks.numpy(), "probabilities": probabilities.numpy()})
    before = peaks.resident()
    results: list[Any] = []
    most = peaks.highest(lambda: results.append(call()))
    times = []
    for _ in range(calls):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    whole = F.interpolate(masks.double(), size=(size, size), mode="bilinear", align_corners=False)
    right = torch.cat(
        [
            torch.einsum("bqc,bqhw->bchw", probabilities.double(), rows.sigmoid()).argmax(1)
            for rows in whole.split(64, 2)
        ],
        1,
    )
    same = (torch.from_numpy(np.array(results[0])) == right).double().mean().item()
    extra = None if before is None or most is None else max(most - before, 0)
    return {"min_s": min(times), "extra_bytes": extra, "agreement": same}


def _tail_call(runtime: str, path: str, inputs: dict[str, np.ndarray]) -> Callable[[], np.ndarray]:
    if runtime == "OpenVINO":
        import openvino

        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
        request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
        return lambda: request.infer(list(inputs.values()), share_inputs=True)[0]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)[0]
