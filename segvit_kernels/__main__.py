"""``python -m segvit_kernels``: what this machine has and which backend each operator takes on it."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

import segvit_kernels
from segvit_kernels import _native
from segvit_kernels._library import BACKENDS, ENVIRONMENT_VARIABLE, operators, requested_backend, why_not


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The report as text."""
    lines = [
        f"segvit-kernels {segvit_kernels.__version__}",
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, "
        f"torch {torch.__version__}, triton {_version('triton')}",
    ]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            lines.append(
                f"cuda:{i}: {p.name}, compute capability {p.major}.{p.minor}, "
                f"{p.multi_processor_count} multiprocessors, {p.total_memory / 2**30:.0f} GiB"
            )
            devices.append(torch.device("cuda", i))
    else:
        lines.append("no CUDA or ROCm device")
    native = _native.library()
    if native.reason is None:
        lines.append(f"native library: {native.path}, CPU code for {native.isa}")
        lines.append(f"native CUDA kernels: {native.cuda_archs or 'none, built without nvcc'}")
    else:
        lines.append(f"native library: {native.reason}")
    requested = requested_backend()
    lines.append(f"{ENVIRONMENT_VARIABLE}: {requested or 'not set (each device takes its default)'}")
    for device in devices:
        lines += ["", f"on {device}:"]
        reasons = {name: why_not(name, device) for name in BACKENDS}
        for operator in operators():
            chosen = requested or operator.default(device)
            reason = operator.why_not(chosen, device)
            note = f" (unavailable: {reason})" if reason else ""
            if operator.isa and requested is None and chosen == "eager":
                note = f" (cpu: {operator.why_not('cpu', device)})"
            lines.append(f"  segvit::{operator.name:<20} {chosen}{note}")
        lines += [f"  {name} missing: {reason}" for name, reason in reasons.items() if reason]
    return "\n".join(lines)


def main() -> int:
    try:
        print(report())
    except ValueError as error:
        print(f"segvit_kernels: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
