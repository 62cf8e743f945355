"""The tables of ``bench model`` with a process a row, on a CPU: ``engines``, ours and those a user would pick
instead, and ``exports``, the files of ``segvit export``.

Each engine runs in a process of its own, one call of one engine at a time, in turns. Labels are compared with
those of the published formula in float32 before anything is timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.measure import peaks, timing, workers
from bench.subjects.engines import TABLES, Engine
from bench.subjects.published import Model

_MODULE = "bench.subjects.engines"
# Labels that may differ: a share in float32, in bfloat16 that and twice what the published formula differs
# there. Random weights have near-ties, which int8 decides otherwise: there a share tells a broken graph only.
LABELS_BOUND, INT8_LEAST = 1e-3, 0.5
# Before each call: the threads of whoever went before wait for more work, some of them spinning.
PAUSE_S = 0.1
# Most seconds an engine is timed beside a load.
LOADED_S = 180.0


def least(dtype: str, own: float) -> float:
    """The share of labels that must agree; ``own`` is that of the published formula in bfloat16."""
    return INT8_LEAST if dtype == "int8" else 1 - LABELS_BOUND - (2 * (1 - own) if dtype == "bfloat16" else 0)


def rows(
    spec: Model,
    *,
    table: str = "engines",
    dtypes: Sequence[str],
    threads: int,
    rounds: int,
    deadline: float,
    graphs: Path | None = None,
    compiled: bool = True,
    busy: bool = False,
    pools: bool = False,
) -> Iterator[dict]:
    """A row for each engine and precision: checked, timed in turn, then its memory.

    ``graphs`` is a folder where what engines read is kept, and found again by another run. With ``busy`` they
    are timed once more beside a busy process a core, with ``pools`` beside two thread pools of their process.
    """
    size, found, running = dataclasses.asdict(spec), [], {}
    with contextlib.ExitStack() as stack:
        folder = str(graphs / spec.name if graphs else stack.enter_context(tempfile.TemporaryDirectory()))
        Path(folder).mkdir(parents=True, exist_ok=True)
        failed: dict[str, str] = {}
        for engine, dtype in ((e, d) for d in dtypes for e in TABLES[table] if d in e.dtypes):
            row = {"table": table, "model": spec.name, "batch": 1, "dtype": dtype, "mode": "inference"}
            row |= {"way": engine.name, "what": engine.what}
            found.append(row)
            reason = engine.missing()
            if not compiled and engine.name.startswith("torch.compile"):
                reason = "minutes to compile: not without --compile"
            if reason or time.time() > deadline:
                row |= {"status": "skipped", "reason": reason or "time budget"}
                continue
            try:
                _prepare(engine, dtype, size, folder, failed)
                worker = workers.Worker(
                    _MODULE, "serve", engine.name, size, dtype, folder, threads, threads=threads
                )
            except RuntimeError as error:
                row |= {"status": "failed", "reason": timing.one_line(error)}
                continue
            stack.callback(worker.close)
            row |= {name: worker.info[name] for name in ("file_bytes",) if name in worker.info}
            row["agreement"], share = worker.info["agreement"], least(dtype, worker.info["bfloat16"])
            if row["agreement"] < share:
                reason = f"{100 * row['agreement']:.2f} % of labels as published"
                row |= {"status": "invalid", "reason": f"{reason}, expected at least {100 * share:.2f} %"}
                continue
            running[len(found) - 1] = worker

        def kept(index: int, ask: Callable[[], Any]) -> Any:
            """What a worker answers; its row fails where it has ended, and the others go on."""
            try:
                return ask()
            except RuntimeError as error:
                found[index] |= {"status": "failed", "reason": timing.one_line(error)}
                return math.nan

        rest = {index: functools.partial(_rested, worker) for index, worker in running.items()}
        calls = {index: functools.partial(kept, index, call) for index, call in rest.items()}
        for index, samples in timing.interleave(calls, rounds=rounds, seconds_per_peer=60.0).items():
            values = {**timing.summary(samples), "p99_s": _percentile(samples, 99)}
            values["held_bytes"] = kept(index, running[index].held)
            if "status" not in found[index]:
                found[index] |= {"status": "ok", **values}
        loads = [("busy", _busy_cores, calls)] if busy else []
        if pools:
            beside = {
                index: functools.partial(_rested, worker.beside_pools) for index, worker in running.items()
            }
            asked = {index: functools.partial(kept, index, call) for index, call in beside.items()}
            loads.append(("pools", contextlib.nullcontext, asked))
        for name, load, asked in loads:
            left = {index: call for index, call in asked.items() if found[index]["status"] == "ok"}
            with load():
                times = timing.interleave(left, rounds=rounds, seconds_per_peer=LOADED_S)
            for index, samples in times.items():
                for share, key in ((50, "median_s"), (99, "p99_s")):
                    found[index][f"{name}_{key}"] = _percentile(samples, share)
    yield from found


def _rested(call: Callable[[], float]) -> float:
    """A call once the machine is quiet."""
    time.sleep(PAUSE_S)
    return call()


def _percentile(samples: Sequence[float], percent: int) -> float:
    """The smallest of the samples that so many of them do not exceed."""
    return sorted(samples)[max(0, math.ceil(percent / 100 * len(samples)) - 1)]


@contextlib.contextmanager
def _busy_cores() -> Iterator[None]:
    """A process for each core that computes all the time."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def _prepare(engine: Engine, dtype: str, size: dict, folder: str, failed: dict[str, str]) -> None:
    """Files that an engine reads, where they are not there yet; ``failed`` has why some could not be made.

    Raises:
        RuntimeError: what they are made by failed, now or before.
    """
    for name, function, *values in engine.files(dtype):
        if not (Path(folder) / name).exists() and name not in failed:
            try:
                peaks.isolated(_MODULE, function, *values, size, folder)
            except RuntimeError as error:
                failed[name] = f"{function}: {error}"
        if name in failed:
            raise RuntimeError(failed[name])
