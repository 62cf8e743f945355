"""What the sections of ``bench gpu`` do: tasks in order of importance, each of which yields rows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from bench.measure import ceilings, csrc, environment, peaks, timing
from bench.subjects import models, operators, published
from bench.suites import model, tune

sanitizer = csrc.module("sanitizer")

DTYPES = ("bfloat16", "float16", "float32")
BATCHES = (16, 1, 4)
MAX_SETS = 64
# A peer that torch.compile builds, or tunes, is not begun with less time than this left.
COMPILE_S, AUTOTUNE_S = 45.0, 90.0
# What processes are started with; a rehearsal has another one.
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


def checked_dtypes() -> tuple[str, ...]:
    """Triton's interpreter computes bfloat16 wrongly, so a smoke run on a CPU leaves it out."""
    return DTYPES if torch.cuda.is_available() else DTYPES[1:]


class Task(NamedTuple):
    """One piece of a section: the table and key of its rows, and ``run(context)``, which yields them; after
    ``quiet_s`` without one it is taken to hang."""

    table: str
    key: dict[str, Any]
    run: Callable[[Context], Iterator[dict]]
    quiet_s: float = 60.0


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


def _environment_tasks(plan: Plan) -> list[Task]:
    """What the rows of all sections are of."""

    def describe(context: Context) -> Iterator[dict]:
        yield environment.describe(context.device) | {"backend": context.backend}

    return [Task("environment", {"name": "environment"}, describe)]


def _machine_tasks(plan: Plan) -> list[Task]:
    """Every operator in every dtype on its tiny case; the rates that floors are made of."""
    names = [name for name, _ in ceilings.rates(torch.device("cpu"), tiny=True)]

    def measure(name: str) -> Callable[[Context], Iterator[dict]]:
        def run(context: Context) -> Iterator[dict]:
            yield dict(ceilings.rates(context.device, context.tiny))[name]()

        return run

    found = operators.by_name().values()
    return [
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
    quiet = Task._field_defaults["quiet_s"] if kind == "ready" else 2 * AUTOTUNE_S
    return Task("timings", key, lambda context: _time_group(context, op, key, kind), quiet)


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


def _lost(device: torch.device | None) -> bool:
    """Whether the CUDA context is unusable, as after an illegal address, or its random numbers, as after a
    capture that failed: no later row could succeed."""
    if device is None or device.type != "cuda":
        return False
    try:
        return not 1 <= torch.rand(1, device=device).add_(1).item() <= 2
    except Exception:
        return True


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
        return Task(table, key, run, AUTOTUNE_S)

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
        command = [sys.executable, script, "--json", "--timeout", f"{max(1.0, context.left()):.0f}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=environment.ROOT) as process:
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)

    return [Task("native", {"name": "battery"}, run)]


SECTIONS: dict[str, Callable[[Plan], list[Task]]] = {
    "environment": _environment_tasks,
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
