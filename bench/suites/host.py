"""``python -m bench host``: what a call costs on the host before anything runs on a GPU.

Triton's real launcher on a stub of libcuda (``segvit_kernels.testing.stub``), CPU tensors, tiny shapes: the
work of Python, torch and Triton is all there is; what the CUDA driver takes for a launch, and torch's CUDA
allocator, are not in it. The checkouts are measured in turns, in processes of their own; a figure is the
least of all rounds, because nothing but the machine's other work makes a call longer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from bench.measure import environment

CHILD = Path(__file__).with_name("_host.py")
STUB = environment.ROOT / "segvit_kernels" / "testing" / "stub" / "__init__.py"


def measure(checkout: Path, seconds: float) -> dict:
    """Least seconds of every call, with the ``segvit_kernels`` of ``checkout``, in a process of its own.

    Raises:
        ValueError: it cannot be measured; the last line that the process said.
    """
    command = [sys.executable, "-P", str(CHILD), str(STUB), str(seconds)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment.variables_of(checkout), cwd=checkout
    )
    if done.returncode:
        raise ValueError(f"{checkout}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(*, before: Path | None = None, rounds: int = 3, seconds: float = 0.2) -> dict:
    """The result of this tree, beside that of another checkout if ``before`` is one."""
    described = environment.describe(torch.device("cpu"))
    checkouts = {"now_s": environment.ROOT} | ({"before_s": before} if before else {})
    rows: dict[tuple[str, ...], dict] = {}
    for _ in range(rounds):
        for column, checkout in checkouts.items():
            found = measure(checkout, seconds)
            for row in found["rows"]:
                key = (row["group"], row["name"], row["what"])
                there = rows.setdefault(key, dict(zip(("group", "name", "what"), key, strict=True)))
                there |= {"status": "ok", column: min(row["seconds"], there.get(column, float("inf")))}
    described |= {"threads": 1, "triton": found["triton"]}
    if before:
        described["before"] = environment.commit_of(before)
    return {
        "schema": 1,
        "kind": "host",
        "measurement": True,
        "environment": described,
        "rounds": rounds,
        "rows": list(rows.values()),
    }
