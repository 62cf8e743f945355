"""``python -m bench static``: what compiled kernels need, read from their machine code.

Evidence without a GPU, no time measured: registers, shared memory, spills, how many programs fit a
multiprocessor by that, which instructions the code is made of and which are executed (on the PTX machine),
and the least an operator must do, at the rates of one H200.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from bench.measure import csrc, environment, timing
from bench.simulator.machine import MULTIPROCESSORS
from bench.subjects import operators
from segvit_kernels.testing import launches

NOTE = "Static evidence, no time measured."
ARCHITECTURES = ("sm_80", "sm_90")
# One H200, as measured elsewhere by others' programs; nothing here ran on one.
H200 = {"copy_bytes_per_s": 4.3e12, "matmul_bfloat16_flop_per_s": 790e12, "exp2_per_s": 4.2e12}
BATCH, DTYPE = 16, "bfloat16"


def _occupancy(row: dict[str, Any]) -> dict[str, Any]:
    if not row.get("warps"):
        return {}
    there = MULTIPROCESSORS[row["arch"].removesuffix("a")]
    fitting = there.fitting(row["warps"], row["registers"], row["shared"])
    return {"programs": fitting, "occupancy": fitting * row["warps"] / there.warps}


def _triton(names: Sequence[str]) -> list[dict]:
    """Every kernel of every operator's main case, for each architecture; two compilers at a time."""

    def one(job: tuple[str, str]) -> list[dict]:
        operator, arch = job
        key = {"operator": operator, "source": "triton", "arch": arch}
        main = [n for n in (_constant(operator, "MAIN"),) if n]
        try:
            rows = launches.compiled(operator, arch, main)
        except RuntimeError as error:
            return [key | {"kernel": "–", "status": "failed", "reason": timing.one_line(error)}]
        seen: dict[str, dict] = {}
        for row in rows:
            seen.setdefault(row["kernel"], key | row | {"status": "ok"})
        return list(seen.values())

    jobs = [(operator, arch) for operator in names for arch in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        return [row for rows in pool.map(one, jobs) for row in rows]


def _constant(operator: str, name: str) -> str | None:
    """A constant of an operator's launches, read from the source: importing it needs Triton."""
    path = environment.ROOT / "segvit_kernels" / "testing" / "launches" / f"{operator}.py"
    match = re.search(rf'^{name} = "(.*)"$', path.read_text(), re.MULTILINE)
    return match[1] if match else None


def _cuda() -> list[dict]:
    """Every CUDA C++ kernel, instantiations apart; compiled first where it is not yet."""
    found = csrc.module("resources")
    if reason := found.missing():
        return [{"operator": "all", "source": "cuda", "kernel": "–", "status": "skipped", "reason": reason}]
    rows = []
    for stem, path in found.objects().items():
        sass = {arch: found.functions(path, arch) for arch in ("sm_80", "sm_90a")}
        threads = {arch: found.most_threads(path, arch) for arch in sass}
        for kernel in found.kernels(stem, path):
            if kernel.arch not in sass:
                continue
            row = {"operator": stem, "source": "cuda", "arch": kernel.arch, "kernel": kernel.name}
            row |= {"registers": kernel.registers, "shared": kernel.shared, "spills": kernel.spilled}
            row["warps"] = threads[kernel.arch].get(kernel.name, 0) // 32
            rows.append(row | launches.instruction_mix(sass[kernel.arch][kernel.name]) | {"status": "ok"})
    return rows


def _executed(names: Sequence[str]) -> list[dict]:
    """What Triton's kernels execute on the PTX machine, see :mod:`bench.suites._executed`."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def one(job: tuple[str, str]) -> list[dict]:
        name, arch = job
        command = [sys.executable, "-m", "bench.suites._executed", arch, name]
        done = subprocess.run(command, capture_output=True, text=True, env=clean, cwd=environment.ROOT)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            return [{"operator": name, "arch": arch, "kernel": "–", "status": "failed", "reason": reason[0]}]
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:
        jobs = [(name, arch) for name in names for arch in ARCHITECTURES]
        return [row for rows in pool.map(one, jobs) for row in rows]


def _floors(names: Sequence[str]) -> list[dict]:
    rows = []
    for name in names:
        op = operators.by_name()[name]
        for mode in op.modes:
            case = op.shape(op.shapes[0].name, BATCH)
            costs = op.costs(case, getattr(torch, DTYPE).itemsize, mode)
            row = {"operator": name, "shape": case.name, "batch": BATCH, "dtype": DTYPE, "mode": mode}
            row |= {f: sum(getattr(c, f) for c in costs) for f in operators.Cost._fields}
            rows.append(row | operators.floor(costs, H200, DTYPE))
    return rows


def run(
    *,
    kernels: Sequence[str] = ("triton", "cuda"),
    names: Sequence[str] | None = None,
    progress: Callable[[str], None] = print,
) -> dict:
    """Rows of all kernels and floors, as plain data."""
    begun = time.time()
    names = list(names or operators.by_name())
    rows: list[dict] = []
    executed: list[dict] = []
    if "triton" in kernels:
        rows += _triton([name for name in names if name in launches.OPERATORS])
        progress(f"Triton: {len(rows)} kernels, {time.time() - begun:.0f} s")
        executed = _executed(names)
        progress(f"executed: {len(executed)} kernels, {time.time() - begun:.0f} s")
    if "cuda" in kernels:
        try:
            rows += _cuda()
        except (RuntimeError, subprocess.CalledProcessError) as error:
            row = {"operator": "all", "source": "cuda", "kernel": "–", "status": "failed"}
            rows.append(row | {"reason": timing.one_line(error)})
        progress(f"Triton and CUDA C++: {len(rows)} kernels, {time.time() - begun:.0f} s")
    rows = [row | (_occupancy(row) if row["status"] == "ok" else {}) for row in rows]
    return {
        "schema": 1,
        "kind": "static",
        "note": NOTE,
        "correct": not any(row["status"] == "failed" for row in (*rows, *executed)),
        "environment": environment.describe(torch.device("cpu")) | {"nvcc": _nvcc()},
        "rates": {"device": "H200", **H200},
        "rows": rows,
        "executed": executed,
        "floors": _floors(names),
        "elapsed_s": round(time.time() - begun, 1),
    }


def _nvcc() -> str | None:
    nvcc = csrc.module("resources").build.find_nvcc()
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return next(iter(re.findall(r"release ([\d.]+)", text)), None)
