"""Ways of running a model in turns, where its time goes, and its memory.

Every way gives label maps of the same images and is timed in turns with the others, so that a drift of the
machine meets all of them. Where the time goes is read off marks between the parts of the engine's function,
and held against calls without marks.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import segvit_kernels
from segvit.config import PRESETS, SegViTConfig
from segvit.inference.engine import InferenceEngine
from segvit.model.segvit import SegViT
from segvit.options import BenchConfig
from segvit.speed.environment import environment, usable_cores
from segvit.speed.report import advice
from segvit_kernels import why_not_packed

__all__ = ["PARTS", "Way", "breakdown", "interleave", "measure", "preset"]

PARTS = ("preprocessing", "backbone", "decoder", "tail")
_LEAST = 3  # calls of every way, whatever the time


@dataclass
class Way:
    """One way of running the model: images to label maps, with a number of CPU threads of its own."""

    name: str
    call: Callable[[Tensor], Tensor]
    option: str = ""  # what switches it on
    threads: int | None = None


# What is measured


def measure(
    config: BenchConfig, model: SegViT, images: Tensor, log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Everything `segvit bench` finds out, as plain data.

    Args:
        config: dtype, method, seconds, alternatives, shrunk and classes are used.
        model: in evaluation mode.
        images: uint8 (B, 3, H, W) on the model's device.
        log: told what is being done.
    """
    device, size, batch = images.device, (images.shape[-2], images.shape[-1]), len(images)
    dtype = None if config.dtype in ("auto", "int8") else getattr(torch, config.dtype)
    engine = model.compile_for_inference(
        size, batch, dtype=dtype, method=config.method, int8=config.dtype == "int8"
    )
    plain = Way(f"predict, {_short(model.mean.dtype)}", model.predict)
    main = Way(f"engine, {engine.method}, {_precision(engine)}", engine)
    with segvit_kernels.record_backends() as operators:
        engine.function(images)
    memory = _peak_memory(lambda: engine(images), device)
    ways = [plain, main]
    if config.alternatives:
        ways += _alternatives(config, model, engine, log)
    log(f"timing {len(ways)} ways, {config.seconds:g} s each")
    labels = {way.name: way.call(images) for way in ways}  # also the warm-up
    calls = {way.name: _with_threads(way, images) for way in ways}
    samples = interleave(calls, config.seconds, device)
    truth = labels[plain.name]
    rows = [
        {
            "way": way.name,
            "option": way.option,
            "images_per_s": batch * len(samples[way.name]) / sum(samples[way.name]),
            **_summary(samples[way.name]),
            "same_labels": None
            if way.option == "shrunk"
            else (labels[way.name] == truth).double().mean().item(),
        }
        for way in ways
    ]
    log("where the time goes")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result = {
        "schema": 1,
        "kind": "segvit bench",
        "environment": environment(device),
        "model": {
            "name": config.model,
            "trained": config.model not in PRESETS,
            "parameters": parameters,
            "classes": model.config.num_classes,
            "shrunk": model.config.backbone.shrink_at is not None,
        },
        "images": {"batch": batch, "height": size[0], "width": size[1], "source": config.image or "random"},
        "engine": {"method": engine.method, "dtype": _precision(engine)},
        "ways": rows,
        "breakdown": breakdown(engine.function, images, config.seconds),
        "memory": memory,
        "operators": {name: sorted(found) for name, found in sorted(operators.items())},
        "missing": _missing_backends(operators, device),
    }
    return {**result, "advice": advice(result)}


def _alternatives(
    config: BenchConfig, model: SegViT, engine: InferenceEngine, log: Callable[[str], None]
) -> Iterator[Way]:
    """What could be switched on beside the engine that was asked for."""
    made: dict[str, Any] = {"size": engine.size, "batch": engine.batch, "method": engine.method}
    other = torch.float32 if engine.dtype != torch.float32 else torch.bfloat16
    log(f"building the engine in {_short(other)}")
    yield Way(
        f"engine, {engine.method}, {_short(other)}",
        model.compile_for_inference(**made, dtype=other),
        f"dtype {_short(other)}",
    )
    if not engine.int8 and why_not_packed(model.mean.new_empty(1, 1, dtype=engine.dtype), int8=True) is None:
        log("building the engine in int8")
        eight = model.compile_for_inference(**made, dtype=engine.dtype, int8=True)
        yield Way(f"engine, {engine.method}, int8", eight, "dtype int8")
    if engine.method != "eager":
        yield Way(f"engine, eager, {_precision(engine)}", torch.no_grad()(engine.function), "method eager")
    cores, threads = usable_cores(), torch.get_num_threads()
    if engine.device.type == "cpu" and threads != cores:
        name = f"engine, {engine.method}, {_precision(engine)}, {cores} threads"
        yield Way(name, engine, f"threads {cores}", cores)
    if config.model in PRESETS and not config.shrunk:
        log("building the Shrunk model")
        shrunk = preset(config.model, model.config.num_classes, shrunk=True).to(engine.device)
        name = f"engine, {engine.method}, {_precision(engine)}, Shrunk"
        fast = shrunk.compile_for_inference(**made, dtype=engine.dtype, int8=engine.int8)
        yield Way(name, fast, "shrunk")


# How it is measured


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _with_threads(way: Way, images: Tensor) -> Callable[[], Any]:
    """A call of a way with its number of threads, ready to be timed: what it returns makes the call."""
    usual = torch.get_num_threads()

    def prepare() -> Callable[[], Any]:
        if torch.get_num_threads() != (way.threads or usual):
            torch.set_num_threads(way.threads or usual)
            way.call(images)
        return lambda: way.call(images)

    return prepare


def interleave(
    calls: dict[str, Callable[[], Callable[[], Any]]],
    seconds: float,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of single calls, each from an idle device to the finished result.

    All take turns, in an order that rotates; each until its own calls add up to `seconds`, and at least three
    times.

    Args:
        calls: by name, what prepares a call, untimed, and returns it.
        seconds: time for each.
        device: is waited for.
        clock: gives seconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, usual = list(calls), torch.get_num_threads()
    while names:
        for name in tuple(names):
            call = calls[name]()
            _synchronize(device)
            start = clock()
            call()
            _synchronize(device)
            samples[name].append(clock() - start)
        names = [n for n in names if len(samples[n]) < _LEAST or sum(samples[n]) < seconds]
        names = names[1:] + names[:1]
    torch.set_num_threads(usual)
    return samples


def _summary(samples: Sequence[float]) -> dict[str, Any]:
    quantiles = np.percentile(samples, (25, 50, 75, 95)).tolist()
    return {**dict(zip(("p25_s", "p50_s", "p75_s", "p95_s"), quantiles, strict=True)), "calls": len(samples)}


class _Marks:
    """Points in time on the host, or in the stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.points: list[Any] = []

    def __call__(self, *_: Any) -> None:
        if self.device.type == "cuda":
            self.points.append(torch.cuda.Event(enable_timing=True))
            self.points[-1].record()
        else:
            self.points.append(time.perf_counter())

    def take(self) -> list[float]:
        """Seconds between neighbouring points, which are forgotten."""
        _synchronize(self.device)
        points, self.points = self.points, []
        if self.device.type == "cuda":
            return [a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(points)]
        return [b - a for a, b in itertools.pairwise(points)]


@torch.no_grad()
def breakdown(function: torch.nn.Module, images: Tensor, seconds: float) -> dict[str, Any]:
    """Seconds of the parts of an engine's function, and of whole calls without marks, in turns; medians.

    Parts: preprocessing (to the backbone), backbone, decoder, and the tail (class probabilities and
    `semantic_argmax`). The remainder is what they miss of the whole: marks, and the spread between calls.
    """
    marks = _Marks(images.device)
    rows: list[list[float]] = []
    totals: list[float] = []

    def call() -> list[float]:
        marks()
        function(images)
        marks()
        return marks.take()

    network: Any = function.network
    backbone, decoder = network.backbone, network.decoder
    end = time.perf_counter() + seconds
    while len(totals) < _LEAST or time.perf_counter() < end:
        totals += call()
        hooks = (
            backbone.register_forward_pre_hook(marks),
            backbone.register_forward_hook(marks),
            decoder.register_forward_hook(marks),
        )
        rows.append(call())
        for hook in hooks:
            hook.remove()
    parts = dict(zip(PARTS, np.median(rows, axis=0).tolist(), strict=True))
    total = float(np.median(totals))
    return {
        "parts": parts,
        "total_s": total,
        "remainder_s": total - sum(parts.values()),
        "calls": len(totals),
    }


def _peak_memory(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """The most memory in use during a call: the CUDA allocator's, or the process's resident set."""
    call()
    gc.collect()
    if device.type == "cuda":
        _synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        call()
        _synchronize(device)
        return {
            "kind": "reserved by the CUDA allocator",
            "peak_bytes": torch.cuda.max_memory_reserved(device),
            "before_bytes": before,
        }
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # blocks that are free but resident would hide what the call takes
    try:
        Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM counts anew
        before = _resident("VmRSS")
        call()
        peak = _resident("VmHWM")
    except OSError:
        return {"kind": "resident set", "peak_bytes": _resident_ever(), "before_bytes": None}
    return {"kind": "resident set", "peak_bytes": peak, "before_bytes": before}


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _resident_ever() -> int | None:
    """The largest resident set that this process ever had, where the system counts it."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _missing_backends(operators: dict[str, set[str]], device: torch.device) -> dict[str, str]:
    """For operators that ran as plain PyTorch without being told to: why no kernel ran, by backend."""
    if all("eager" not in found for found in operators.values()):
        return {}
    wanted = ("triton", "cuda") if device.type == "cuda" else ("cpu",)
    reasons = {name: segvit_kernels.why_not(name, device) or "" for name in wanted}
    return reasons if all(reasons.values()) else {}


def preset(name: str, classes: int, shrunk: bool) -> SegViT:
    """A preset with random weights, the same every time, in evaluation mode."""
    torch.manual_seed(0)
    return SegViT(SegViTConfig.preset(name, classes, shrunk=shrunk)).requires_grad_(False).eval()


def _precision(engine: InferenceEngine) -> str:
    return "int8" if engine.int8 else _short(engine.dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
