"""`segvit bench`: a model on this machine, from uint8 images to label maps, and what would make it faster.

Every way of running the model gives label maps of the same images and is timed in turns with the others, so
that a drift of the machine meets all of them. Where the time goes is read off marks between the parts of the
engine's function, and held against calls without marks.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import segvit_kernels
from segvit.config import PRESETS, SegViTConfig
from segvit.data import read_image
from segvit.inference.engine import InferenceEngine
from segvit.model.heads import load_model
from segvit.model.segvit import SegViT
from segvit.options import BenchConfig
from segvit.system.files import atomic_write, check_result_file
from segvit.system.machine import pick_backend, pick_device

__all__ = ["BenchConfig", "advice", "measure", "report", "run"]

PARTS = ("preprocessing", "backbone", "decoder", "tail")
_LEAST = 3  # calls of every way, whatever the time
_MATTERS = 1.05  # a way must be faster by this factor to be advised


@dataclass
class Way:
    """One way of running the model: images to label maps, with a number of CPU threads of its own."""

    name: str
    call: Callable[[Tensor], Tensor]
    option: str = ""  # what switches it on
    threads: int | None = None


# What is measured


def run(config: BenchConfig) -> int:
    """`segvit bench`: print what was measured and, where asked for, write it to a JSON file. Returns 0.

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
    device, size, batch = images.device, tuple(images.shape[-2:]), len(images)
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    engine = model.compile_for_inference(size, batch, dtype=dtype, method=config.method)
    plain = Way(f"predict, {_short(model.mean.dtype)}", model.predict)
    main = Way(f"engine, {engine.method}, {_short(engine.dtype)}", engine)
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
        "engine": {"method": engine.method, "dtype": _short(engine.dtype)},
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
    if engine.method != "eager":
        yield Way(f"engine, eager, {_short(engine.dtype)}", torch.no_grad()(engine.function), "method eager")
    cores, threads = usable_cores(), torch.get_num_threads()
    if engine.device.type == "cpu" and threads != cores:
        name = f"engine, {engine.method}, {_short(engine.dtype)}, {cores} threads"
        yield Way(name, engine, f"threads {cores}", cores)
    if config.model in PRESETS and not config.shrunk:
        log("building the Shrunk model")
        shrunk = _preset(config.model, model.config.num_classes, shrunk=True).to(engine.device)
        name = f"engine, {engine.method}, {_short(engine.dtype)}, Shrunk"
        yield Way(name, shrunk.compile_for_inference(**made, dtype=engine.dtype), "shrunk")


def usable_cores() -> int:
    """CPU cores that this process may use, a core with two threads counted once where torch can tell."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, torch.cpu.get_capabilities().get("num_physical_cores") or allowed)


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
        self.device, self.points = device, []

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
    marks, rows, totals = _Marks(images.device), [], []

    def call() -> list[float]:
        marks()
        function(images)
        marks()
        return marks.take()

    backbone, decoder = function.network.backbone, function.network.decoder
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
    reasons = {name: segvit_kernels.why_not(name, device) for name in wanted}
    return reasons if all(reasons.values()) else {}


def environment(device: torch.device) -> dict[str, Any]:
    """Machine and versions."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "segvit_kernels": segvit_kernels.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": [properties.major, properties.minor],
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with "-dirty" where files were changed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# What was asked for


def _check(config: BenchConfig) -> None:
    if len(config.size) > 2:
        raise ValueError(f"size: got {config.size}, expected height and width in pixels, or one side")
    if config.model not in PRESETS and (config.shrunk or config.classes is not None):
        name = "shrunk" if config.shrunk else "classes"
        raise ValueError(f"{name}: only for a preset ({', '.join(PRESETS)}); {config.model} is what it is")
    if config.json:
        check_result_file("json", config.json, r'\{\s*"schema": \d+,\s*"kind": "segvit bench"')


def _load(config: BenchConfig) -> SegViT:
    if config.model in PRESETS:
        classes = 150 if config.classes is None else config.classes
        return _preset(config.model, classes, shrunk=config.shrunk)
    if Path(config.model).exists():
        return load_model(config.model)
    try:
        return load_model(config.model)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; presets: {', '.join(PRESETS)}") from None


def _preset(name: str, classes: int, shrunk: bool) -> SegViT:
    torch.manual_seed(0)
    return SegViT(SegViTConfig.preset(name, classes, shrunk=shrunk)).requires_grad_(False).eval()


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


# What is said


def advice(result: dict[str, Any]) -> list[str]:
    """What to switch on, each with the number measured in this run or the reason; and what gains nothing.

    Args:
        result: what `measure` collects.
    """
    plain, main, *others = result["ways"]
    found = [
        f"the operators ran as plain PyTorch, backend {name} is missing: {reason}"
        for name, reason in result["missing"].items()
    ]
    found.append(f"model.compile_for_inference(size, batch): {_verdict(plain, main)} over predict")
    for row in others:
        what = row["option"]
        if what == "shrunk":
            what = "segvit train --shrunk, which makes another model"
        found.append(f"{what}: {_verdict(main, row)}")
    if result["engine"]["method"] != "compile":
        found.append("--method compile (torch.compile): not measured, it builds for minutes")
    return found


def _verdict(usual: dict[str, Any], other: dict[str, Any]) -> str:
    """How much faster the other way is; a gain only where it is clear of the spread of both."""
    gain = usual["p50_s"] / other["p50_s"]
    numbers = f"({_seconds(other['p50_s'])} against {_seconds(usual['p50_s'])})"
    if other["same_labels"] is not None and other["same_labels"] < 0.995:
        numbers += f", but {100 * other['same_labels']:.1f} % of the labels are predict's"
    if gain >= _MATTERS and other["p75_s"] < usual["p25_s"]:
        return f"{gain:.2f}x {numbers}"
    return f"no gain {numbers}"


def report(result: dict[str, Any]) -> str:
    """The result for a reader."""
    model, images, machine = result["model"], result["images"], result["environment"]
    weights, commit = "" if model["trained"] else ", random weights", machine["commit"]
    lines = [
        "",
        f"{model['name']}{' (Shrunk)' if model['shrunk'] else ''}{weights}: "
        f"{model['parameters'] / 1e6:.1f} M parameters, {model['classes']} classes; "
        f"{images['batch']} x {images['height']} x {images['width']} pixels, {images['source']}",
        f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} CPU threads, "
        f"torch {machine['torch']}, segvit-kernels {machine['segvit_kernels']}"
        + (f" at {commit}" if commit else ""),
        "",
    ]
    rows = [("image to labels", "images/s", "p50", "p95", "calls", "labels as predict")]
    for row in result["ways"]:
        same = "" if row["same_labels"] is None else f"{100 * row['same_labels']:.2f} %"
        times = _seconds(row["p50_s"]), _seconds(row["p95_s"])
        rows.append((row["way"], f"{row['images_per_s']:.2f}", *times, str(row["calls"]), same))
    lines += _table(rows)
    if not model["trained"]:
        lines.append("(random weights: labels are near ties, and the tail is slower than a trained model's)")
    spent = result["breakdown"]
    how = "" if result["engine"]["method"] == "eager" else ", run eagerly"
    rows = [(f"where the time goes (engine{how})", "time", "share")]
    parts = {**spent["parts"], "remainder (marks, spread)": spent["remainder_s"], "total": spent["total_s"]}
    for name, value in parts.items():
        rows.append((name, _seconds(value), f"{100 * value / spent['total_s']:.1f} %"))
    lines += ["", *_table(rows), ""]
    memory = result["memory"]
    if memory["peak_bytes"] is not None:
        before = memory["before_bytes"]
        known = "in the process's life" if before is None else f"{before / 1e6:.0f} MB before the call"
        lines.append(f"peak memory, {memory['kind']}: {memory['peak_bytes'] / 1e6:.0f} MB ({known})")
    taken = [f"{name} {' and '.join(found)}" for name, found in result["operators"].items()]
    lines += [f"operators: {', '.join(taken) or 'none ran'}", "", "what to switch on"]
    return "\n".join([*lines, *(f"- {line}" for line in result["advice"])])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _seconds(value: float) -> str:
    """Three digits with a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if abs(value) * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
