"""What this machine has: devices and backends that a command asks for, looked at before any work is done."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import torch

import segvit_kernels

__all__ = [
    "check_processes",
    "first_process",
    "pick_backend",
    "pick_device",
    "place_among_processes",
    "processor_name",
    "started_processes",
]


def pick_device(accelerator: str) -> torch.device:
    """Where to run: "auto", "cpu" or "cuda"; of several processes each has a GPU of its own.

    Raises:
        ValueError: "cuda" on a machine without.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("accelerator: got 'cuda', but PyTorch sees no such device here")
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "")) if started_processes() else ""
    if local.isdecimal():
        return torch.device("cuda", int(local) % torch.cuda.device_count())
    return torch.device("cuda")


def pick_backend(name: str | None, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context in which every operator runs on this backend; None leaves the choice to the environment
    variable SEGVIT_KERNELS_BACKEND and else to the device.

    Raises:
        ValueError: no such backend, or it cannot run on the device.
    """
    if name is not None and name not in segvit_kernels.BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected {' or '.join(segvit_kernels.BACKENDS)}")
    asked = segvit_kernels.requested_backend(name)
    if asked and (reason := segvit_kernels.why_not(asked, device)):
        origin = "backend" if name else "environment variable SEGVIT_KERNELS_BACKEND"
        raise ValueError(f"{origin}: {asked!r} is not available: {reason}")
    return contextlib.nullcontext() if name is None else segvit_kernels.backend(name)


def check_processes(devices: int, workers: int, device: torch.device) -> None:
    """Refuse numbers of processes that only a slip of the finger asks this machine for.

    Raises:
        ValueError: more devices than there are, or far more loading processes than processors.
    """
    processors = os.cpu_count() or 1
    there = torch.cuda.device_count() if device.type == "cuda" else max(8, processors)
    if devices > there:
        what = f"the {there} GPUs that PyTorch sees" if device.type == "cuda" else f"{there} on this CPU"
        raise ValueError(f"devices: got {devices}, expected at most {what}")
    most = max(64, 8 * processors) // devices
    if workers > most:
        got = f"{workers} for each of {devices} devices" if devices > 1 else workers
        raise ValueError(
            f"workers: got {got}, expected at most {most} on this machine with {processors} processors"
        )


def started_processes() -> int:
    """How many processes torchrun or srun has started, 0 where they have not started several."""
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        count = int(os.environ["WORLD_SIZE"])
    else:
        interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
        count = 0 if interactive else int(os.environ.get("SLURM_NTASKS", 0))
    return count if count > 1 else 0


def place_among_processes() -> tuple[int, int]:
    """Rank and number of the processes that share the work.

    They are those of torchrun, of srun, or of whoever sets RANK and WORLD_SIZE.

    Raises:
        ValueError: these are no such numbers.
    """
    if "WORLD_SIZE" in os.environ:
        names = ("RANK", "WORLD_SIZE")
    elif started_processes():
        names = ("SLURM_PROCID", "SLURM_NTASKS")
    else:
        return 0, 1
    texts = [os.environ.get(name, "") for name in names]
    if not all(text.isdecimal() for text in texts) or not int(texts[0]) < int(texts[1]):
        raise ValueError(f"{names[0]}, {names[1]}: got {texts}, expected a number and a larger one")
    return int(texts[0]), int(texts[1])


def first_process() -> bool:
    """Whether this is the first of the processes that torchrun or srun has started, or the only one."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return not started_processes() or int(rank) == 0


def processor_name() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
