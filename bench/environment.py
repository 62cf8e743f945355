"""What a result was measured on and with: machine, versions, code, and the machine's measured ceilings."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import timing

ROOT = Path(__file__).resolve().parent.parent


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> dict:
    """The commit measured: SEGVIT_COMMIT, a file COMMIT in the root, or git; with a digest of the kernels'
    source, which holds without any of them."""
    digest = hashlib.sha256()
    suffixes = (".py", ".json", ".toml", ".cpp", ".h", ".cu", ".cuh")
    for path in sorted(p for folder in ("segvit_kernels", "csrc") for p in (ROOT / folder).rglob("*")):
        if path.suffix in suffixes:
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    found = {"commit": None, "dirty": None, "kernels_sha256": digest.hexdigest()}
    if named := os.environ.get("SEGVIT_COMMIT"):
        return {**found, "commit": named}
    if (ROOT / "COMMIT").is_file():
        return {**found, "commit": (ROOT / "COMMIT").read_text().strip()}
    head = _output("git", "rev-parse", "HEAD")
    if head:
        # What a benchmark itself writes changes nothing that is measured.
        written = [f":!{path}" for path in ("bench/results", "docs", "*.md")]
        status = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", *written)
        found.update(commit=head, dirty=bool(status))
    return found


def commit_of(checkout: Path) -> str | None:
    """The commit of another checkout, if git knows it."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


def variables_of(checkout: Path) -> dict[str, str]:
    """Environment variables of a process that imports another checkout in place of this tree, and sees no GPU
    and no interpreter."""
    unset = ("TRITON_INTERPRET", "SEGVIT_KERNELS_BACKEND")
    variables = {k: v for k, v in os.environ.items() if k not in unset}
    inherited = [p for p in variables.get("PYTHONPATH", "").split(os.pathsep) if p]
    path = os.pathsep.join(str(checkout) if Path(p) == ROOT else p for p in inherited)
    path = path if str(checkout) in path else os.pathsep.join([*inherited, str(checkout)])
    return variables | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cache_bytes(device: torch.device) -> int:
    """The second-level cache of a GPU, or of a CPU's cores together: what inputs are rotated to exceed.

    A server's last level is left. It is shared and holds hundreds of megabytes, and in a model the layer
    before has just written what an operator reads.
    """
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * 2**20
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024 * (os.cpu_count() or 1)
    except (OSError, ValueError):
        return 4 * 2**20


def describe(device: torch.device) -> dict:
    """The environment of a result, as plain data."""
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        **commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "gpu": properties.name,
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "memory_bytes": properties.total_memory,
            "driver": driver.splitlines()[0] if driver else None,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return found


def _rate(amount: float, work: Callable[[], object], device: torch.device) -> dict:
    sampler = timing.stream_sampler(lambda _: work(), [{}], device, least_s=10e-3)
    found = timing.summary([sampler() for _ in range(10)])
    return {"per_s": amount / found["median_s"], "median_s": found["median_s"], "amount": amount}


def _copy(device: torch.device, tiny: bool) -> dict:
    # On a CPU beyond any cache: 1 GiB in all.
    count = 2**16 if tiny else 2**27
    if device.type == "cuda" and not tiny:
        count = min(2**30, torch.cuda.get_device_properties(device).total_memory // 4 // 8)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    return _rate(2 * source.nbytes, lambda: target.copy_(source), device)


def _matmul(device: torch.device, dtype: torch.dtype, tiny: bool) -> dict:
    size = 64 if tiny else 1536 if device.type == "cpu" else 4096 if dtype == torch.float32 else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return _rate(2 * size**3, lambda: a @ b, device)


def _exp2(device: torch.device, tiny: bool) -> dict:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        # torch's own vectorised exponential on data in the cache: a kernel with a shorter polynomial may win.
        x = torch.rand(2**12 if tiny else 2**17)
        target = torch.empty_like(x)
        return _rate(x.numel(), lambda: torch.exp2(x, out=target), device)
    programs, iterations = 1, 2
    if device.type == "cuda":
        programs, iterations = torch.cuda.get_device_properties(device).multi_processor_count * 32, 4096
    x = torch.rand(programs * 1024, device=device)
    return _rate(x.numel() * iterations, lambda: exponentials(x, programs, iterations), device)


def exponentials(x: torch.Tensor, programs: int, iterations: int) -> None:
    """``iterations`` dependent exponentials of each element of ``x`` by a kernel, 1024 elements a program."""
    from bench._exp2 import launch

    launch(x, programs, iterations)


def ceilings(device: torch.device, tiny: bool = False) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Names and measurements of the rates that floors are computed from, as many threads as torch has."""
    yield "copy_bytes_per_s", lambda: _copy(device, tiny)
    yield "exp2_per_s", lambda: _exp2(device, tiny)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if device.type == "cuda" or dtype == torch.float32 or tiny:
            name = f"matmul_{str(dtype).removeprefix('torch.')}_flop_per_s"
            yield name, lambda dtype=dtype: _matmul(device, dtype, tiny)


def isolated(module: str, function: str, *values: Any) -> Any:
    """``module.function(*values)``, which gives plain data, in a process of :func:`memory_process`.

    Raises:
        RuntimeError: the last line that the process printed to its standard error.
    """
    done = memory_process("_call", module, function, json.dumps(values))
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def memory_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m bench ARGUMENTS`` in a process where what is resident is what is in use: blocks from 64 KiB
    on are mapped and unmapped one by one."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
