"""What a result was measured on and with: machine, versions, code."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


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


def missing(packages: Sequence[str]) -> str | None:
    """Which of these modules are not installed, in words; ``None`` where all are."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def instruction_set() -> str:
    """The best of a CPU that matters here; virtual machines of one processor differ in it."""
    if asked := os.environ.get("SEGVIT_KERNELS_ISA"):
        return asked.replace("_", "")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line.split(":", 1)[1].split() for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.machine()
    known = {"amx_bf16": "amx", "avx512_fp16": "avx512fp16", "avx512_bf16": "avx512bf16"}
    known |= {"avx512_vnni": "avx512", "avx2": "avx2"}
    return next((name for flag, name in known.items() if flag in flags), platform.machine())


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
        "instruction_set": instruction_set(),
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
