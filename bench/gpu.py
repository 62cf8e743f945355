"""``bench kernels`` on a GPU: correctness, time and memory of every operator on one GPU inside a time budget.

The parent never touches the GPU. It hands *sections* to child processes, which write one JSON line per row as
they go: a hang, a crash or a poisoned CUDA context costs the task in flight and no more. Every section lists
its tasks in order of importance; what does not fit into the budget is recorded as skipped, with the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import environment, kernels, operators, timing

DTYPES = ("bfloat16", "float16", "float32")
BATCHES = (16, 1, 4)
MAX_SETS = 64
RESTARTS = 6
GRACE_S = 15.0
# A peer that torch.compile builds, or tunes, is not begun with less time than this left.
COMPILE_S, AUTOTUNE_S = 45.0, 90.0


class Task(NamedTuple):
    """One piece of a section: the table and key of its rows, and ``run(context)``, which yields them."""

    table: str
    key: dict[str, Any]
    run: Callable[[Context], Iterator[dict]]


@dataclasses.dataclass(frozen=True)
class Context:
    """Where a worker runs."""

    device: torch.device
    backend: str
    deadline: float
    tiny: bool
    peers: tuple[str, ...] | None = None
    l2_bytes: int = 0

    def left(self) -> float:
        return self.deadline - time.time()


def _context(smoke: bool, deadline: float, peers: Sequence[str] | None) -> Context:
    if not smoke:
        device = torch.device("cuda", torch.cuda.current_device())
        return Context(device, "triton", deadline, False, peers, environment.cache_bytes(device))
    from segvit_kernels import why_not

    interpreter = (environment.ROOT / "segvit_kernels/triton").is_dir() and why_not("triton", "cpu") is None
    return Context(torch.device("cpu"), "triton" if interpreter else "eager", deadline, True, peers)


# ---------------------------------------------------------------------------------------------- sections


def _environment_tasks(smoke: bool) -> list[Task]:
    names = [name for name, _ in environment.ceilings(torch.device("cpu"), tiny=True)]

    def describe(context: Context) -> Iterator[dict]:
        yield environment.describe(context.device) | {"backend": context.backend}

    def measure(name: str) -> Callable[[Context], Iterator[dict]]:
        def run(context: Context) -> Iterator[dict]:
            yield dict(environment.ceilings(context.device, context.tiny))[name]()

        return run

    return [
        Task("environment", {"name": "environment"}, describe),
        *(Task("ceilings", {"name": name}, measure(name)) for name in names),
    ]


def _check_tasks(smoke: bool, dtype: str) -> list[Task]:
    def task(op: operators.Operator, kind: str, case: Any) -> Task:
        def run(context: Context) -> Iterator[dict]:
            seed = torch.seed() % 2**31
            torch.manual_seed(seed)
            for row in operators.checked(
                op, operators.Check(kind, case, dtype), context.device, context.backend
            ):
                yield row | {"seed": seed}
            if context.device.type == "cuda":
                torch.cuda.empty_cache()

        key = {"operator": op.name, "kind": kind, "case": case.name, "batch": case.batch, "dtype": dtype}
        return Task("checks", key, run)

    return _in_turn(
        [task(op, *check) for check in op.check_cases(smoke)] for op in operators.by_name().values()
    )


def _in_turn(lists: Iterable[list[Task]]) -> list[Task]:
    """The first of each list, then the second of each: what matters most of every operator comes first."""
    return [task for tasks in itertools.zip_longest(*lists) for task in tasks if task is not None]


def _timing_groups(op: operators.Operator, smoke: bool) -> list[tuple[str, int, str]]:
    """(shape, batch, dtype), most important first."""
    if smoke:
        return [(op.tiny.name, op.tiny.batch, "float32")]
    main, *others = (case.name for case in op.shapes)
    groups = [(main, batch, "bfloat16") for batch in BATCHES]
    groups += [(name, BATCHES[0], "bfloat16") for name in others]
    groups += [(main, BATCHES[0], dtype) for dtype in DTYPES[1:]]
    groups += [(name, batch, "bfloat16") for batch, name in itertools.product(BATCHES[1:], others)]
    return groups + [(main, batch, dtype) for batch, dtype in itertools.product(BATCHES[1:], DTYPES[1:])]


def _timing_tasks(smoke: bool) -> list[Task]:
    def task(
        op: operators.Operator, shape: str, batch: int, dtype: str, mode: str, slow: bool = False
    ) -> Task:
        key = {"operator": op.name, "shape": shape, "batch": batch, "dtype": dtype, "mode": mode}
        return Task("timings", key, lambda context: _time_group(context, op, key, slow))

    found = operators.by_name().values()
    tasks = _in_turn(
        [task(op, *group, mode) for group in _timing_groups(op, smoke) for mode in op.modes] for op in found
    )
    main = [] if smoke else [(op, *_timing_groups(op, smoke)[0], mode) for op in found for mode in op.modes]
    return tasks + [task(*group, slow=True) for group in main]


def _time_group(context: Context, op: operators.Operator, key: dict, slow: bool = False) -> Iterator[dict]:
    """Rows of all peers at one shape, batch, dtype and mode: memory first, then interleaved samples.

    With ``slow`` of the peers that take minutes to build, and of no other.
    """
    peers = [p for p in operators.select(op.peers(context.backend), context.peers) if p.slow == slow]
    if not any(key["mode"] in peer.modes for peer in peers):
        return
    device, dtype = context.device, getattr(torch, key["dtype"])
    case = op.shape(key["shape"], key["batch"])
    most = 2 if context.tiny else MAX_SETS
    sets = timing.rotation(lambda: op.inputs(case, dtype, device), context.l2_bytes, most)
    first, count = sets[0], len(sets)
    costs = op.costs(case, dtype.itemsize, key["mode"])
    yield {"table": "costs", "phases": [cost._asdict() for cost in costs]}

    samplers: dict[tuple[str, str], Callable[[], float]] = {}
    torch._dynamo.reset()
    for peer in peers:
        if key["mode"] not in peer.modes:
            continue
        base = {"peer": peer.name, "what": peer.what, "sets": count}
        if peer.missing:
            yield base | {"method": "all", "status": "skipped", "reason": peer.missing}
            continue
        if context.left() < (AUTOTUNE_S if peer.slow else COMPILE_S if peer.compiled else 5.0):
            yield base | {"method": "all", "status": "skipped", "reason": "time budget"}
            continue
        run = operators.runner(peer, key["mode"])

        def call(inputs: tuple, run: Callable = run) -> tuple:
            return run(*inputs)

        try:
            if device.type == "cuda":
                extra = timing.cuda_peak(lambda call=call: call(first), device)
                results = sum(t.nbytes for t in call(first))
                yield base | {
                    "table": "memory",
                    "method": "torch allocator",
                    "extra_bytes": extra,
                    "result_bytes": results,
                    "status": "ok",
                }
            samplers[peer.name, "stream"] = timing.stream_sampler(call, sets, device)
        except Exception as error:  # a peer may fail; the others still count
            if _lost(device):
                raise
            yield base | {"method": "all", "status": "failed", "reason": timing.one_line(error)}
            continue
        if device.type != "cuda":
            yield base | {"method": "graph", "status": "skipped", "reason": "no CUDA graphs on the CPU"}
            continue
        try:
            samplers[peer.name, "graph"] = timing.graph_sampler(call, sets, device)
        except Exception as error:
            if _lost(device):
                raise
            yield base | {"method": "graph", "status": "failed", "reason": timing.one_line(error)}
    rounds, share = (3, 0.05) if context.tiny else (25, 0.4)
    samples = timing.interleave(samplers, rounds=rounds, seconds_per_peer=share)
    for (peer, method), found in samples.items():
        yield {"peer": peer, "method": method, "sets": count, "status": "ok", **timing.summary(found)}
    # The graphs hold their memory pools.
    samplers.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()


SECTIONS: dict[str, Callable[[bool], list[Task]]] = {
    "environment": _environment_tasks,
    **{f"checks:{dtype}": (lambda smoke, dtype=dtype: _check_tasks(smoke, dtype)) for dtype in DTYPES},
    "timings": _timing_tasks,
}


def stages(smoke: bool) -> list[tuple[tuple[str, ...], float]]:
    """Sections that run at the same time, and the share of the whole budget by which they must have ended.
    Checks may share the GPU; nothing runs beside a measurement of time."""
    # Triton's interpreter computes bfloat16 wrongly, so the smoke run leaves it out.
    checks = tuple(f"checks:{dtype}" for dtype in DTYPES if not (smoke and dtype == "bfloat16"))
    return [(("environment",), 0.15), (checks, 0.55), (("timings",), 0.95)]


# ------------------------------------------------------------------------------------------------ worker


def _lost(device: torch.device | None) -> bool:
    """Whether the CUDA context is unusable, as after an illegal address: no later row could succeed."""
    if device is None or device.type != "cuda":
        return False
    try:
        return torch.ones(1, device=device).add_(1).item() != 2
    except Exception:
        return True


def work(
    section: str,
    rows: Path,
    *,
    start: int,
    deadline: float,
    smoke: bool,
    peers: Sequence[str] | None = None,
) -> int:
    """Run the tasks of ``section`` from number ``start`` on, appending rows to the file ``rows``.

    Returns 0 at the end, 3 when the CUDA context is lost.
    """
    context = None
    with rows.open("a", buffering=1) as file:

        def write(**row: Any) -> None:
            file.write(json.dumps(row) + "\n")

        for index, task in enumerate(SECTIONS[section](smoke)[start:], start):
            begun, lost = time.time(), False
            key = {"table": task.table, **task.key}
            write(begin=index)
            try:
                context = context or _context(smoke, deadline, peers)
                if context.left() <= 0:
                    write(**key, status="skipped", reason="time budget")
                else:
                    for row in task.run(context):
                        write(**key | row)
                    timing.synchronize(context.device)
            except torch.OutOfMemoryError as error:
                write(**key, status="skipped", reason=f"out of memory: {timing.one_line(error)}")
                torch.cuda.empty_cache()
            except Exception as error:
                write(**key, status="failed", passed=False, reason=timing.one_line(error))
                lost = _lost(context and context.device)
            write(end=index, seconds=time.time() - begun)
            if lost:
                return 3
    return 0


# ------------------------------------------------------------------------------------------------ parent


class _Section:
    """A section in child processes, restarted after the task that killed one."""

    def __init__(self, name: str, folder: Path, *, deadline: float, smoke: bool, peers: Sequence[str] | None):
        self.name, self.deadline = name, deadline
        self.options = {"deadline": deadline, "smoke": smoke, "peers": peers}
        self.tasks = SECTIONS[name](smoke)
        stem = name.replace(":", "-")
        self.path, self.log = folder / f"{stem}.jsonl", folder / f"{stem}.log"
        self.path.touch()
        self.log.touch()
        self.lost: list[dict] = []
        self.begun, self.seconds = time.time(), 0.0
        self.restarts = 0
        self.ended: str | None = None
        self.process: subprocess.Popen | None = None

    def run_here(self) -> None:
        work(self.name, self.path, start=0, **self.options)
        self._finish("ok")

    def start(self, index: int = 0) -> None:
        path = os.pathsep.join(filter(None, (str(environment.ROOT), os.environ.get("PYTHONPATH"))))
        options = json.dumps({"start": index, **self.options})
        command = [sys.executable, "-m", "bench", "_worker", self.name, str(self.path), options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=environment.ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log
            )

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def poll(self) -> bool:
        """Whether the section has ended; kills and restarts its worker as needed."""
        if self.ended:
            return True
        code = self.process.poll()
        # The worker itself stops at the deadline; the grace is for the task in flight.
        late = code is None and time.time() > self.deadline + GRACE_S
        if code is None and not late:
            return False
        self.stop()
        events = self._events()
        begun = max((e["begin"] for e in events if "begin" in e), default=-1)
        finished = max((e["end"] for e in events if "end" in e), default=-1)
        if code == 0:
            self._finish("ok")
            return True
        last = (self.log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
        why = "did not end in time and was killed" if late else f"worker ended with code {code}: {last[:300]}"
        if begun > finished or begun < 0:
            finished = max(begun, 0)
            self._lose(finished, "failed", why)
        if late or self.restarts >= RESTARTS or finished + 1 >= len(self.tasks):
            for index in range(finished + 1, len(self.tasks)):
                self._lose(index, "skipped", "time budget" if late else f"given up: {why}")
            self._finish(why)
            return True
        self.restarts += 1
        self.start(finished + 1)
        return False

    def _finish(self, how: str) -> None:
        self.ended, self.seconds = how, time.time() - self.begun

    def _lose(self, index: int, status: str, reason: str) -> None:
        task = self.tasks[index]
        self.lost.append({"table": task.table, **task.key, "status": status, "reason": reason})

    def _events(self) -> list[dict]:
        events = []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut off when the worker was killed
                events.append(json.loads(line))
        return events

    def rows(self) -> list[dict]:
        return [e for e in self._events() if "table" in e] + self.lost


def run(
    *,
    budget_s: float,
    smoke: bool,
    in_process: bool = False,
    peers: Sequence[str] | None = None,
    progress: Callable[[str], None] = print,
) -> dict:
    """The result of a whole run, as plain data (schema: docs/benchmarking.md)."""
    begun = time.time()
    operators.check_peers("triton", peers)
    rows: list[dict] = []
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        for names, share in stages(smoke):
            options = {"deadline": begun + budget_s * share, "smoke": smoke, "peers": peers}
            running = [_Section(name, Path(folder), **options) for name in names]
            try:
                for section in running:
                    section.run_here() if in_process else section.start()
                while not all([section.poll() for section in running]):
                    time.sleep(0.2)
            finally:
                for section in running:
                    section.stop()
            for section in running:
                found = section.rows()
                rows += found
                count = {s: sum(r.get("status") == s for r in found) for s in ("failed", "skipped")}
                seconds = round(section.seconds, 1)
                entry = {"name": section.name, "seconds": seconds, "ended": section.ended}
                entries.append(entry | {"restarts": section.restarts})
                counts = f"{len(found)} rows, {count['failed']} failed, {count['skipped']} skipped"
                progress(f"{section.name}: {counts}, {seconds} s, {section.ended}")
    result = {"schema": 1, "kind": "gpu", "measurement": not smoke, "budget_s": budget_s}
    result |= {"elapsed_s": round(time.time() - begun, 1), "sections": entries}
    return kernels.assemble(result, rows)
