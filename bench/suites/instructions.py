"""``python -m bench instructions``: the operators by instruction set and number of threads, on a CPU.

Each pair is a run of ``bench kernels`` in a process of its own, in which our kernels and the libraries of the
peers keep to the instruction set. Peers that compile are left out: a compiler asks the processor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.measure import environment
from bench.subjects import operators
from bench.subjects.operators import comparison
from segvit_kernels import _native

PEERS = ("plain", "sdpa", "eager")
_WIDE = {"ATEN_CPU_CAPABILITY": "avx512", "MKL_CBWR": "AVX512"}
MASKS = {
    # MKL's MKL_ENABLE_INSTRUCTIONS changes nothing on AMD's processors; COMPATIBLE is SSE2 on all.
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "avx512": {**_WIDE, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx512_bf16": {**_WIDE, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx512_fp16": {**_WIDE, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"},
}
"""Variables that keep PyTorch, oneDNN and MKL to an instruction set of ours."""


def known() -> list[str]:
    """Instruction sets of ours that this processor runs, the best last."""
    return _native.library().isas


def variables(isa: str) -> dict[str, str]:
    """Of a process that keeps to ``isa``. The processor's best has no mask: it is what a user gets."""
    masks = {} if isa == known()[-1] else MASKS[isa]
    return {**os.environ, _native.ISA_VARIABLE: isa, **masks}


def _measured(isa: str, threads: int, seconds: float, rounds: int, smoke: bool) -> dict:
    """The result of ``bench kernels``.

    Raises:
        RuntimeError: there is none; with what the command said last.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.json"
        command = [sys.executable, "-m", "bench", "kernels", "--main", "--peers", "fused", *PEERS]
        command += ["--device", "cpu", "--threads", str(threads), "--rounds", str(rounds)]
        command += ["--budget", str(seconds), "--out", str(out), *(["--smoke"] if smoke else [])]
        variables_ = {**variables(isa), "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, cwd=environment.ROOT, env=variables_, capture_output=True, text=True)
        if not out.is_file():
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{isa}, {threads} threads: {said}")
        return json.loads(out.read_text(encoding="utf-8"))


def _rows(result: dict, isa: str, threads: int, smoke: bool) -> list[dict]:
    """One of each operator and mode: our time and that of every peer, in seconds."""
    found = []
    for op in operators.by_name().values():
        for mode in op.modes:
            group = comparison.summary_group(result, op, mode)
            if smoke:
                group = (op.tiny.name, op.tiny.batch, *group[2:])
            row = {"isa": isa, "threads": threads, "operator": op.name, "shape": group[0], "batch": group[1]}
            row["mode"] = mode
            timed = comparison.measured(result, "timings", op.name, group)
            if "fused" in timed:
                ours = timed["fused"]
                row |= {"status": "ok"} | {k: ours[k] for k in ("median_s", "p25_s", "p75_s")}
                row["peers_s"] = {peer: timed[peer]["median_s"] for peer in PEERS if peer in timed}
            else:
                reasons = (r.get("reason") for r in result["timings"] if r["operator"] == op.name)
                row |= {"status": "skipped", "reason": next(filter(None, reasons), "not timed")}
            found.append(row)
    return found


def run(
    *,
    isas: Sequence[str],
    threads: Sequence[int],
    seconds: float,
    rounds: int = 9,
    smoke: bool = False,
    progress: Callable[[str], None] = print,
) -> dict:
    """A row of each instruction set, number of threads, operator and mode, as plain data."""
    begun, rows, correct = time.time(), [], True
    described = environment.describe(torch.device("cpu")) | {"threads": max(threads)}
    for isa in isas:
        for count in threads:
            result = _measured(isa, count, seconds, rounds, smoke)
            correct &= result["correct"]
            rows += _rows(result, isa, count, smoke)
            progress(f"{isa}, {count} threads: {result['elapsed_s']:.0f} s")
    result = {"schema": 1, "kind": "instructions", "measurement": not smoke, "correct": correct}
    return result | {"environment": described, "rows": rows, "elapsed_s": round(time.time() - begun, 1)}
