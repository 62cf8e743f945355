"""The machine and the versions behind a measurement."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import segvit_kernels
from segvit.system.machine import processor_name

__all__ = ["environment", "usable_cores"]


def usable_cores() -> int:
    """CPU cores that this process may use, a core with two threads counted once where torch can tell."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, torch.cpu.get_capabilities().get("num_physical_cores") or allowed)


_ISAS = ("amx", "avx512_fp16", "avx512_bf16", "avx512", "avx2", "portable")


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
        "cpu": processor_name(),
        # Machines with one name of a processor differ in it; None without the native library.
        "isa": next((isa for isa in _ISAS if segvit_kernels.runs_isa(isa)), None),
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


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with "-dirty" where files were changed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
