"""``python -m bench gpu``: all that one GPU can show, from one command inside a time budget.

The parent never touches the GPU. It hands *sections* to child processes, which append a line to
``rows.jsonl`` in the folder for every row as they find it, and makes the result files anew after every stage:
a kill, a hang, a crash or a poisoned CUDA context costs the task in flight and no more. Every section lists
its tasks in order of importance; what does not fit into the budget is recorded as skipped, with the reason.

====================  ================================================================================
``rows.jsonl``        every row, with its section, and the beginning and end of every task
``log.txt``           what failed tasks printed, and where they failed
``<gpu>.json``        operators: checks, timings, memory; candidates, sanitizer, CUDA C++ battery
``model-<gpu>.json``  whole models
====================  ================================================================================
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
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.measure import ceilings, csrc, environment, peaks, timing
from bench.measure import results as files
from bench.subjects import models, operators, published
from bench.suites import kernels, model, tune

sanitizer = csrc.module("sanitizer")

DTYPES = ("bfloat16", "float16", "float32")
BATCHES = (16, 1, 4)
MAX_SETS = 64
RESTARTS = 6
GRACE_S = 15.0
# A peer that torch.compile builds, or tunes, is not begun with less time than this left.
COMPILE_S, AUTOTUNE_S = 45.0, 90.0
ROWS, LOG = "rows.jsonl", "log.txt"
CANDIDATES = environment.ROOT / "bench" / "candidates.json"
# What the workers are started with; a rehearsal has another one.
COMMAND = (sys.executable, "-m", "bench")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run does; plain data, for its workers.

    Attributes:
        smoke: tiny shapes, on whatever there is; not a measurement.
        dtypes: that are checked.
        peers: names of those that are timed; ``None``: all.
        candidates: launch parameters to compare with the pinned ones, see :func:`bench.suites.tune.load`.
    """

    smoke: bool = False
    dtypes: Sequence[str] = DTYPES
    peers: Sequence[str] | None = None
    candidates: Sequence[dict] = ()


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
    peers: Sequence[str] | None = None
    l2_bytes: int = 0

    def left(self) -> float:
        return self.deadline - time.time()


def _context(plan: Plan, deadline: float) -> Context:
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        cache = 0 if plan.smoke else environment.cache_bytes(device)
        return Context(device, "triton", deadline, plan.smoke, plan.peers, cache)
    from segvit_kernels import why_not

    interpreter = (environment.ROOT / "segvit_kernels/triton").is_dir() and why_not("triton", "cpu") is None
    return Context(torch.device("cpu"), "triton" if interpreter else "eager", deadline, True, plan.peers)


# ---------------------------------------------------------------------------------------------- sections


def _in_turn(lists: Iterable[list[Task]]) -> list[Task]:
    """The first of each list, then the second of each: what matters most of every operator comes first."""
    return [task for tasks in itertools.zip_longest(*lists) for task in tasks if task is not None]


def _check(op: operators.Operator, kind: str, case: Any, dtype: str) -> Task:
    def run(context: Context) -> Iterator[dict]:
        seed = torch.seed() % 2**31
        torch.manual_seed(seed)
        for row in operators.checked(op, operators.Check(kind, case, dtype), context.device, context.backend):
            yield row | {"seed": seed}
        if context.device.type == "cuda":
            torch.cuda.empty_cache()

    key = {"operator": op.name, "kind": kind, "case": case.name, "batch": case.batch, "dtype": dtype}
    return Task("checks", key, run)


def _machine_tasks(plan: Plan) -> list[Task]:
    """The machine; every operator in every dtype on its tiny case; the rates that floors are made of."""
    names = [name for name, _ in ceilings.rates(torch.device("cpu"), tiny=True)]

    def describe(context: Context) -> Iterator[dict]:
        yield environment.describe(context.device) | {"backend": context.backend}

    def measure(name: str) -> Callable[[Context], Iterator[dict]]:
        def run(context: Context) -> Iterator[dict]:
            yield dict(ceilings.rates(context.device, context.tiny))[name]()

        return run

    found = operators.by_name().values()
    return [
        Task("environment", {"name": "environment"}, describe),
        *(_check(op, "values", op.tiny, dtype) for dtype in plan.dtypes for op in found),
        *(Task("ceilings", {"name": name}, measure(name)) for name in names),
    ]


def _check_tasks(plan: Plan, dtype: str) -> list[Task]:
    found = operators.by_name().values()
    return _in_turn([_check(op, *case, dtype) for case in op.check_cases(plan.smoke)] for op in found)


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


def _kind(peer: operators.Peer) -> str:
    return "slow" if peer.slow else "compiled" if peer.compiled else "ready"


def _timing_tasks(plan: Plan) -> list[Task]:
    """The main shapes by what is ready at once, then by what torch.compile builds; then the other shapes."""

    def tasks(kind: str, begin: int, end: int | None) -> list[Task]:
        return _in_turn(
            [
                _timing(op, group, mode, kind)
                for group in _timing_groups(op, plan.smoke)[begin:end]
                for mode in op.modes
            ]
            for op in operators.by_name().values()
        )

    found = [*tasks("ready", 0, 1), *tasks("compiled", 0, 1), *tasks("ready", 1, None)]
    return found if plan.smoke else [*found, *tasks("compiled", 1, 2), *tasks("slow", 0, 1)]


def _timing(op: operators.Operator, group: tuple[str, int, str], mode: str, kind: str) -> Task:
    shape, batch, dtype = group
    key = {"operator": op.name, "shape": shape, "batch": batch, "dtype": dtype, "mode": mode}
    return Task("timings", key, lambda context: _time_group(context, op, key, kind))


def _time_group(context: Context, op: operators.Operator, key: dict, kind: str) -> Iterator[dict]:
    """Rows of all peers of a kind at one shape, batch, dtype and mode: memory and one sample of each as soon
    as it is built, then interleaved samples, which supersede these."""
    peers = [p for p in operators.select(op.peers(context.backend), context.peers) if _kind(p) == kind]
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
        if context.left() < {"ready": 5.0, "compiled": COMPILE_S, "slow": AUTOTUNE_S}[kind]:
            yield base | {"method": "all", "status": "skipped", "reason": "time budget"}
            continue
        run = operators.runner(peer, key["mode"])

        def call(inputs: tuple, run: Callable = run) -> tuple:
            return run(*inputs)

        methods = {"stream": timing.stream_sampler, "graph": timing.graph_sampler}
        for method, sampler in methods.items():
            if method == "graph" and device.type != "cuda":
                reason = "no CUDA graphs on the CPU"
                yield base | {"method": method, "status": "skipped", "reason": reason}
                continue
            try:
                if method == "stream" and device.type == "cuda":
                    extra = peaks.cuda_peak(lambda call=call: call(first), device)
                    results = sum(t.nbytes for t in call(first))
                    sizes = {"extra_bytes": extra, "result_bytes": results}
                    yield base | {"table": "memory", "method": "torch allocator", **sizes, "status": "ok"}
                samplers[peer.name, method] = sampler(call, sets, device)
                yield base | {
                    "method": method,
                    "status": "ok",
                    **timing.summary([samplers[peer.name, method]()]),
                }
            except Exception as error:  # a peer may fail; the others still count
                if _lost(device):
                    raise
                samplers.pop((peer.name, method), None)
                every = "all" if method == "stream" else method
                yield base | {"method": every, "status": "failed", "reason": timing.one_line(error)}
                break
    rounds, share = (3, 0.05) if context.tiny else (25, 0.4)
    samples = timing.interleave(samplers, rounds=rounds, seconds_per_peer=share)
    for (peer, method), found in samples.items():
        yield {"peer": peer, "method": method, "sets": count, "status": "ok", **timing.summary(found)}
    # The graphs hold their memory pools.
    samplers.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _model_groups(plan: Plan) -> list[tuple[str, published.Model, str, int, str, tuple[str, ...], float]]:
    """Whole models, most important first, what torch.compile builds last: table, size, mode, batch, dtype,
    names of the subjects, and the seconds that must be left."""
    named = {spec.name: spec for spec in published.MODELS}
    large, small = named["vit_l_ade20k_640"], named["vit_l_cocostuff10k_512"]
    if plan.smoke:
        large = small = published.TINY
    ways = ("published", "published, SDPA", "fused", "engine, graph")
    step = tuple(f"{name}{how}" for name in ("SegViT", "Shrunk SegViT") for how in (published.BY_FORMULA, ""))
    groups = [
        ("ways", large, "inference", 1, "bfloat16", ways, 0.0),
        ("decoders", large, "training", 2, "bfloat16", step, 0.0),
        ("ways", small, "inference", 1, "bfloat16", ways, 0.0),
        ("ways", large, "inference", 1, "float32", ("published",), 0.0),
        ("ways", large, "inference", 8, "bfloat16", ways, 0.0),
        ("decoders", small, "training", 2, "bfloat16", step, 0.0),
        ("ways", large, "inference", 1, "bfloat16", ("published, compiled, default",), AUTOTUNE_S),
    ]
    # On the CPU that stands for a GPU half precision takes many times as long.
    return [(*g[:4], "float32", *g[5:]) for g in groups[:2]] if plan.smoke else groups


def _model_tasks(plan: Plan) -> list[Task]:
    def task(
        table: str, spec: published.Model, mode: str, batch: int, dtype: str, names: tuple, needs: float
    ) -> Task:
        def run(context: Context) -> Iterator[dict]:
            if context.left() < needs:
                yield {"status": "skipped", "reason": "time budget"}
                return
            device = context.device
            found = [s for s in models.table(table, device) if s.name in names]
            limits = {"rounds": 2 if context.tiny else 9, "deadline": context.deadline, "early": True}
            yield from model.measured(table, found, spec, mode, batch, dtype, device, **limits)
            if device.type == "cuda":
                torch.cuda.empty_cache()

        key = {"model": spec.name, "batch": batch, "dtype": dtype, "mode": mode, "way": ", ".join(names)}
        return Task(table, key, run)

    return [task(*group) for group in _model_groups(plan)]


def _candidate_tasks(plan: Plan) -> list[Task]:
    def task(candidate: dict) -> Task:
        key = {k: candidate[k] for k in ("name", "operator", "shape", "batch", "dtype", "mode")}

        def run(context: Context) -> Iterator[dict]:
            yield tune.compare(candidate, context.device, context.backend, tiny=context.tiny)

        return Task("candidates", key, run)

    return [task(candidate) for candidate in plan.candidates]


def _sanitizer_tasks(plan: Plan, tool: str) -> list[Task]:
    def run(context: Context) -> Iterator[dict]:
        arguments = ("_odd", json.dumps(list(plan.dtypes)), context.backend, json.dumps(plan.smoke))
        # torch's allocator would hand out what lies behind a tensor.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        yield sanitizer.check(tool, [*COMMAND, *arguments], context.left(), variables=variables)

    return [Task("sanitizer", {"tool": tool}, run)]


def odd(dtypes: Sequence[str], backend: str, smoke: bool) -> int:
    """What the sanitizer watches: every launch of the checks at odd and tiny sizes; a line an operator."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for op in operators.by_name().values():
        cases = op.check_cases(True)
        if not smoke:
            cases += [(kind, case) for kind, case in op.check_cases(False) if "odd" in case.name]
        for (kind, case), dtype in itertools.product(cases, dtypes):
            if not kind.startswith("graph"):
                check = operators.Check(kind, case, dtype)
                op.launch(check, op.draw(check, device), backend)
        timing.synchronize(device)
        print(f"{op.name}: done", flush=True)
    return 0


def launches(
    plan: Plan, device: torch.device, only: Collection[str] | None = None
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Everything of ours that the sections launch, without peers and oracles: what it is, and a function that
    does it; of some operators only, or of all and of whole models. For compiling ahead."""
    known = {name: op for name, op in operators.by_name().items() if not only or name in only}
    for op in known.values():
        cases = op.check_cases(True) + ([] if plan.smoke else op.check_cases(False))
        for (kind, case), name in itertools.product(cases, plan.dtypes):
            check = operators.Check(kind, case, name)
            what = f"{op.name} {kind} {case.name}, batch {case.batch}, {name}"
            yield what, lambda op=op, check=check: op.launch(check, op.draw(check, device), "triton")
        own = [p for p in op.peers("triton") if p.name == "fused" or p.name.startswith("plan ")]
        for (shape, batch, name), peer in itertools.product(_timing_groups(op, plan.smoke), own):
            case = op.shape(shape, batch)
            for mode in peer.modes:
                run = operators.runner(peer, mode)
                what = f"{op.name} {peer.name} {shape}, batch {batch}, {name}, {mode}"
                yield (
                    what,
                    lambda run=run, op=op, case=case, name=name: run(
                        *op.inputs(case, getattr(torch, name), device)
                    ),
                )
    for candidate in (c for c in plan.candidates if c["operator"] in known):
        yield candidate["name"], lambda candidate=candidate: tune.launch(candidate, device, tiny=plan.smoke)
    if only:
        return
    yield "exponentials", lambda: ceilings.exponentials(torch.ones(1024, device=device), 1, 2)
    for table, spec, mode, batch, dtype, names, _ in _model_groups(plan):
        for subject in models.table(table, device):
            if subject.name in names and published.BY_FORMULA not in subject.name:
                what = f"{spec.name} {subject.name}, batch {batch}, {dtype}, {mode}"
                arguments = (subject, spec, mode, batch, dtype, device)
                yield what, lambda arguments=arguments: model.once(*arguments)


def _native_tasks(plan: Plan) -> list[Task]:
    """The CUDA C++ kernels: built, tested, under the sanitizer; what csrc/check.py prints, row by row."""

    def run(context: Context) -> Iterator[dict]:
        script = str(environment.ROOT / "csrc" / "check.py")
        seconds = max(1.0, context.left())
        command = [sys.executable, script, "--json", "--timeout", f"{seconds / 2:.0f}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=environment.ROOT) as process:
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)

    return [Task("native", {"name": "battery"}, run)]


SECTIONS: dict[str, Callable[[Plan], list[Task]]] = {
    "machine": _machine_tasks,
    **{f"checks:{dtype}": (lambda plan, dtype=dtype: _check_tasks(plan, dtype)) for dtype in DTYPES},
    "timings": _timing_tasks,
    "models": _model_tasks,
    "candidates": _candidate_tasks,
    **{tool: (lambda plan, tool=tool: _sanitizer_tasks(plan, tool)) for tool in sanitizer.TOOLS},
    "native": _native_tasks,
}
# Stages in order, and the share of the budget that each may take; what it leaves is the next one's. Sections
# of a stage run at the same time: checks may share the GPU, nothing runs beside a measurement of time.
STAGES = {"machine": 0.08, "checks": 0.28, "timings": 0.26, "models": 0.2, "candidates": 0.07, "proofs": 0.11}
OPERATORS = ("machine", "checks", "timings")


def sections(stage: str, plan: Plan) -> list[str]:
    """Names of the sections of a stage."""
    if stage == "checks":
        return [f"checks:{dtype}" for dtype in plan.dtypes]
    return [*sanitizer.TOOLS, "native"] if stage == "proofs" else [stage]


# ------------------------------------------------------------------------------------------------ rows


class Rows:
    """The file of rows: lines appended whole, by any number of processes."""

    def __init__(self, folder: Path, section: str) -> None:
        self.section = section
        self._file = os.open(folder / ROWS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(self._file, b"\n")  # ends a line that a killed process left

    def write(self, **row: Any) -> None:
        os.write(self._file, (json.dumps(files.finite({"section": self.section, **row})) + "\n").encode())

    def close(self) -> None:
        os.close(self._file)


def read(folder: Path) -> list[dict]:
    """All lines of the file of rows that are whole."""
    found = []
    path = folder / ROWS
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and "section" in line]


_IDENTITY = (
    *("table", "operator", "kind", "case", "shape", "batch", "dtype", "mode"),
    *("peer", "method", "quantity", "name", "model", "way", "tool"),
)


def latest(lines: Iterable[dict]) -> list[dict]:
    """The rows among ``lines``; of rows about the same thing the last one."""
    kept = {tuple(row.get(k) for k in _IDENTITY): row for row in lines if "table" in row}
    return [{k: v for k, v in row.items() if k != "section"} for row in kept.values()]


# ------------------------------------------------------------------------------------------------ worker


def _lost(device: torch.device | None) -> bool:
    """Whether the CUDA context is unusable, as after an illegal address: no later row could succeed."""
    if device is None or device.type != "cuda":
        return False
    try:
        return torch.ones(1, device=device).add_(1).item() != 2
    except Exception:
        return True


class Compiled:
    """Counts kernels that Triton compiled or found in its cache since the last look."""

    def __init__(self) -> None:
        self.counts = {"compiled": 0, "from_cache": 0}
        with contextlib.suppress(ImportError, AttributeError):
            from triton import knobs

            knobs.compilation.listener = self._count

    def _count(self, *, cache_hit: bool, **_: Any) -> None:
        self.counts["from_cache" if cache_hit else "compiled"] += 1

    def take(self) -> dict[str, int]:
        found, self.counts = self.counts, dict.fromkeys(self.counts, 0)
        return {name: count for name, count in found.items() if count}


def work(
    section: str, folder: Path, plan: Plan, *, start: int, deadline: float, printed: Path | None = None
) -> int:
    """Run the tasks of ``section`` from number ``start`` on, appending rows to the folder's file.

    ``printed`` is the file that standard output and error go to, which is emptied before every task.
    Returns 0 at the end, 3 when the CUDA context is lost.
    """
    context, compiled, rows = None, Compiled(), Rows(folder, section)
    for index, task in enumerate(SECTIONS[section](plan)[start:], start):
        if printed:
            os.truncate(printed, 0)
        begun, lost = time.time(), False
        key = {"table": task.table, **task.key}
        rows.write(begin=index)
        try:
            context = context or _context(plan, deadline)
            if context.left() <= 0 and task.table != "environment":  # without it no row says what it is of
                rows.write(**key, status="skipped", reason="time budget")
            else:
                for row in task.run(context):
                    rows.write(**key | row)
                timing.synchronize(context.device)
        except torch.OutOfMemoryError as error:
            rows.write(**key, status="skipped", reason=f"out of memory: {timing.one_line(error)}")
            torch.cuda.empty_cache()
        except Exception as error:
            rows.write(**key, status="failed", passed=False, reason=timing.one_line(error))
            _log(folder, key, traceback.format_exc(limit=-6), printed)
            lost = _lost(context and context.device)
        rows.write(end=index, seconds=round(time.time() - begun, 3), **compiled.take())
        if lost:
            return 3
    rows.close()
    return 0


def _log(folder: Path, key: dict, text: str, printed: Path | None) -> None:
    """Append to the log what went wrong and the end of what was printed."""
    tail = printed.read_text(errors="replace")[-4000:] if printed and printed.exists() else ""
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(f"=== {json.dumps(key)}\n{text[-4000:].strip()}\n{tail.strip()}\n\n")


# ------------------------------------------------------------------------------------------------ parent


class _Section:
    """A section in child processes, restarted after the task that killed one."""

    def __init__(self, name: str, folder: Path, scratch: Path, plan: Plan, deadline: float) -> None:
        self.name, self.folder, self.plan, self.deadline = name, folder, plan, deadline
        self.tasks = SECTIONS[name](plan)
        self.printed = scratch / f"{name.replace(':', '-')}.txt"
        self.printed.touch()
        self.rows = Rows(folder, name)
        self.begun, self.restarts = time.time(), 0
        self.ended: str | None = None
        self.process: subprocess.Popen | None = None

    def run_here(self) -> None:
        work(self.name, self.folder, self.plan, start=0, deadline=self.deadline)
        self._finish("ok")

    def start(self, index: int = 0) -> None:
        path = os.pathsep.join(filter(None, (str(environment.ROOT), os.environ.get("PYTHONPATH"))))
        options = {"start": index, "deadline": self.deadline, "printed": str(self.printed)}
        arguments = [
            self.name,
            str(self.folder),
            json.dumps({"plan": dataclasses.asdict(self.plan), **options}),
        ]
        with self.printed.open("ab") as printed:
            self.process = subprocess.Popen(
                [*COMMAND, "_worker", *arguments],
                cwd=environment.ROOT,
                env={**os.environ, "PYTHONPATH": path},
                stdout=printed,
                stderr=printed,
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
        if code == 0:
            self._finish("ok")
            return True
        events = [line for line in read(self.folder) if line["section"] == self.name]
        begun = max((e["begin"] for e in events if "begin" in e), default=-1)
        finished = max((e["end"] for e in events if "end" in e), default=-1)
        last = (self.printed.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
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
        self.ended, seconds = how, round(time.time() - self.begun, 1)
        self.rows.write(ended=how, seconds=seconds, restarts=self.restarts)

    def _lose(self, index: int, status: str, reason: str) -> None:
        task = self.tasks[index]
        key = {"table": task.table, **task.key}
        self.rows.write(**key, status=status, reason=reason)
        if status == "failed":
            _log(self.folder, key, reason, self.printed)


def run(
    folder: Path,
    plan: Plan,
    *,
    budget_s: float,
    stages: Sequence[str] = tuple(STAGES),
    in_process: bool = False,
    progress: Callable[[str], None] = print,
) -> list[dict]:
    """Run ``stages`` into ``folder``; the results, as :func:`results` makes them."""
    begun, passed = time.time(), 0.0
    whole = sum(STAGES[stage] for stage in stages)
    run_row = {"smoke": plan.smoke, "budget_s": budget_s, "begun": begun}
    rows = Rows(folder, "run")
    rows.write(run=run_row)
    with tempfile.TemporaryDirectory() as scratch:
        for stage in stages:
            passed += STAGES[stage] / whole
            deadline = begun + budget_s * passed
            names = sections(stage, plan)
            running = [_Section(name, folder, Path(scratch), plan, deadline) for name in names]
            try:
                for section in running:
                    section.run_here() if in_process else section.start()
                while not all([section.poll() for section in running]):
                    time.sleep(0.1)
            finally:
                for section in running:
                    section.stop()
                    section.rows.close()
            rows.write(stage=stage, elapsed_s=round(time.time() - begun, 1))
            for line in _summary(read(folder), names):
                progress(line)
            write(folder)
    rows.close()
    return results(read(folder))


def _summary(lines: list[dict], names: Sequence[str]) -> Iterator[str]:
    """What became of sections, for who watches."""
    for name in names:
        own = [line for line in lines if line["section"] == name]
        found = latest(own)
        count = {s: sum(r.get("status") == s for r in found) for s in ("failed", "skipped")}
        built = {k: sum(line.get(k, 0) for line in own if "end" in line) for k in ("compiled", "from_cache")}
        end = next((line for line in own if "ended" in line), {"seconds": 0, "ended": "not at its end"})
        yield (
            f"{name}: {len(found)} rows, {count['failed']} failed, {count['skipped']} skipped, "
            f"{built['compiled']} kernels compiled, {built['from_cache']} from the cache, "
            f"{end['seconds']} s, {end['ended']}"
        )


# ------------------------------------------------------------------------------------------------ results


def results(lines: Sequence[dict]) -> list[dict]:
    """What the rows of a run, whole or not, come to: a result of kind ``gpu``, and one of kind ``model``
    where whole models were measured."""
    asked = next((line["run"] for line in lines if "run" in line), {"smoke": False, "budget_s": None})
    elapsed = [line["elapsed_s"] for line in lines if "stage" in line]
    entries = [
        {"name": line["section"], **{k: line[k] for k in ("seconds", "ended", "restarts")}}
        for line in lines
        if "ended" in line
    ]
    for entry in entries:
        ends = [line for line in lines if line["section"] == entry["name"] and "end" in line]
        entry |= {k: sum(line.get(k, 0) for line in ends) for k in ("compiled", "from_cache")}
    common = {"schema": 1, "measurement": not asked["smoke"], "budget_s": asked["budget_s"]}
    common |= {"elapsed_s": max(elapsed, default=None), "sections": entries}
    rows = latest(lines)
    models = [row for row in rows if row["table"] in model.SECTIONS]
    own = [row for row in rows if row["table"] not in model.SECTIONS]
    found = [kernels.assemble({**common, "kind": "gpu"}, own)]
    if models:
        described = found[0]["environment"] | {"threads": found[0]["environment"].get("threads")}
        found.append({**common, "kind": "model", "environment": described, "rows": models})
    return [result for result in found if "torch" in result["environment"]]


def stem(result: dict) -> str:
    """The name of a result's file, from the kind of result and its GPU."""
    machine = result["environment"].get("gpu") or f"cpu {result['environment']['cpu']}"
    return files.stem(machine if result["kind"] == "gpu" else f"{result['kind']} {machine}")


def write(folder: Path) -> list[Path]:
    """Make the result files of a folder from its rows; their paths."""
    paths = []
    for result in results(read(folder)):
        paths.append(folder / f"{stem(result)}.json")
        files.dump(paths[-1], result)
    return paths
