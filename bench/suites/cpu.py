"""``bench kernels`` on a CPU: the operators against their peers on the CPU, in float32.

Ours is the backend that CPU tensors take: the native library if it is built, else eager.

Times come from one process, peers in turn. Memory comes from a process per peer: the resident set's
high-water mark sees everything a call touches, scratch of the BLAS and of compiled code included, which no
allocator hook does; torch's own allocator as the profiler saw it stands beside it as a cross-check.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.measure import ceilings, environment, peaks, timing
from bench.subjects import operators
from bench.suites import kernels

DTYPE = "float32"
_DEVICE = torch.device("cpu")
_MAX_SETS = 16


def backend() -> str:
    """The backend that is measured."""
    return operators.kernels_backend(_DEVICE)


def _checks(op: operators.Operator, shape: str, batch: int) -> list[dict]:
    case = op.shape(shape, batch)
    key = {
        "table": "checks",
        "operator": op.name,
        "kind": "values",
        "case": shape,
        "batch": batch,
        "dtype": DTYPE,
    }
    rows = operators.checked(op, operators.Check("values", case, DTYPE), _DEVICE, backend())
    return [key | row for row in rows]


def _timings(
    op: operators.Operator,
    peers: Sequence[operators.Peer],
    shape: str,
    batch: int,
    rounds: int,
    seconds_per_peer: float,
) -> list[dict]:
    """Forward without gradients; forward and backward timed apart in one call with them."""
    case = op.shape(shape, batch)
    cache = environment.cache_bytes(_DEVICE)
    sets = timing.rotation(lambda: op.inputs(case, torch.float32, _DEVICE), cache, _MAX_SETS)
    key = {"operator": op.name, "shape": shape, "batch": batch, "dtype": DTYPE}
    rows: list[dict] = []
    forward: dict[str, Callable[[], float]] = {}
    training: dict[str, Callable[[], float]] = {}
    backward: dict[str, list[float]] = {}
    torch._dynamo.reset()
    for peer in peers:
        turns = itertools.cycle(sets)
        backward[peer.name] = []

        def inference(peer: operators.Peer = peer, turns: Iterator[tuple] = turns) -> float:
            run, inputs = operators.runner(peer, "forward"), next(turns)
            start = time.perf_counter()
            run(*inputs)
            return time.perf_counter() - start

        def step(peer: operators.Peer = peer, turns: Iterator[tuple] = turns) -> float:
            leaves, gradients = next(turns)
            start = time.perf_counter()
            results = peer.call(leaves)
            middle = time.perf_counter()
            torch.autograd.grad(results, operators.differentiable(leaves), gradients)
            end = time.perf_counter()
            backward[peer.name].append(end - middle)
            return end - start

        calls = [inference, step] if "forward_backward" in op.modes else [inference]
        why = {"status": "skipped", "reason": peer.missing}
        if peer.missing is None:
            try:
                for _ in range(2):
                    for call in calls:
                        call()
            except Exception as error:  # torch.compile needs a compiler; the others still count
                why = {"status": "failed", "reason": timing.one_line(error)}
        if why["reason"]:
            rows += [{"table": "timings", **key, "mode": mode, "peer": peer.name, **why} for mode in op.modes]
            continue
        backward[peer.name].clear()
        forward[peer.name] = inference
        if step in calls:
            training[peer.name] = step
    limits = {"rounds": rounds, "seconds_per_peer": seconds_per_peer}
    found = {
        "forward": timing.interleave(forward, **limits),
        "forward_backward": timing.interleave(training, **limits),
    }
    found["backward"] = {name: backward[name] for name in training}
    what = {peer.name: peer.what for peer in peers}
    for mode, samples in found.items():
        for peer, values in samples.items():
            row = {"mode": mode, "peer": peer, "what": what[peer], "method": "wall", "status": "ok"}
            rows.append({"table": "timings", **key, **row, "sets": len(sets), **timing.summary(values)})
    for mode in {row["mode"]: None for row in rows if row["status"] == "ok"}:
        # The backward is the last of the phases.
        phases = op.costs(case, 4, "forward_backward" if mode == "backward" else mode)
        phases = [cost._asdict() for cost in (phases[-1:] if mode == "backward" else phases)]
        rows.append({"table": "costs", **key, "mode": mode, "phases": phases})
    return rows


def measure_memory(operator: str, peer: str, shape: str, batch: int, threads: int) -> dict[str, dict]:
    """Peak extra memory of one call in each mode; runs in a process of its own."""
    torch.set_num_threads(threads)
    op = operators.by_name()[operator]
    found = next(p for p in op.peers(backend()) if p.name == peer)
    inputs = op.inputs(op.shape(shape, batch), torch.float32, _DEVICE)
    rows = {}
    for mode in op.modes:
        run = operators.runner(found, mode)
        rows[mode] = {"extra_bytes": peaks.resident_peak(lambda run=run: run(*inputs))}
        rows[mode]["allocator_bytes"] = peaks.allocator_peak(lambda run=run: run(*inputs))
        rows[mode]["result_bytes"] = sum(t.nbytes for t in run(*inputs))
    return rows


def _memory(op: operators.Operator, peer: operators.Peer, shape: str, batch: int) -> list[dict]:
    key = {"table": "memory", "operator": op.name, "shape": shape, "batch": batch, "dtype": DTYPE}
    key |= {"peer": peer.name, "method": "resident set high-water mark"}
    found, why = {}, {"status": "skipped", "reason": peer.missing}
    if peer.missing is None:
        try:
            values = (op.name, peer.name, shape, batch, torch.get_num_threads())
            found = peaks.isolated("bench.suites.cpu", "measure_memory", *values)
        except RuntimeError as error:
            why = {"status": "failed", "reason": timing.one_line(error)}
    rows = []
    for mode in op.modes:
        row = key | {"mode": mode} | found.get(mode, why)
        if mode in found:
            if row["extra_bytes"] is None:
                row |= {"extra_bytes": row["allocator_bytes"], "method": "torch allocator"}
            known = row["extra_bytes"] is not None
            row |= {"status": "ok"} if known else {"status": "failed", "reason": "this system does not tell"}
        rows.append(row)
    return rows


def _keep_freed_memory() -> None:
    """Have glibc reuse freed blocks instead of unmapping them.

    Otherwise the page faults of every large temporary come and go with the allocator's moving threshold, and
    the plain formula takes 20 ms or 100 ms from one process to the next.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def run(
    *,
    budget_s: float = 540.0,
    threads: int = 2,
    rounds: int = 9,
    smoke: bool = False,
    names: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    main: bool = False,
    progress: Callable[[str], None] = print,
) -> dict:
    """The result of a whole run, as plain data (schema: docs/benchmarking.md).

    In order of importance: every operator at its main shape, the memory of ours and the plain formula, other
    shapes, memory of other peers. What does not fit into ``budget_s`` is recorded as skipped. With ``main``
    the first of these is all.
    """
    begun = time.time()
    operators.check_peers(backend(), names)
    torch.set_num_threads(threads)
    _keep_freed_memory()
    torch.manual_seed(torch.seed() % 2**31)
    rows: list[dict[str, Any]] = [
        {"table": "environment", **environment.describe(_DEVICE), "backend": backend()}
    ]
    rows += [{"table": "ceilings", "name": name, **rate()} for name, rate in ceilings.rates(_DEVICE, smoke)]
    sections = []
    # No peer may take more than its share of a short run.
    each = min(4.0, budget_s / 130)

    def section(name: str, key: dict, work: Callable[[], list[dict]]) -> None:
        started = time.time()
        if started - begun > budget_s:
            rows.append({**key, "status": "skipped", "reason": "time budget"})
            return
        ended = "ok"
        try:
            rows.extend(work())
        except Exception as error:  # what was measured before it stays
            ended = timing.one_line(error)
            rows.append({**key, "status": "failed", "reason": ended})
        seconds = round(time.time() - started, 1)
        sections.append({"name": name, "seconds": seconds, "ended": ended})
        progress(f"{name}: {seconds:.0f} s")

    def time_all(op: operators.Operator, shape: str, batch: int) -> None:
        def work() -> list[dict]:
            peers = operators.select(op.peers(backend()), names)
            return _checks(op, shape, batch) + _timings(op, peers, shape, batch, rounds, each)

        key = {"table": "timings", "operator": op.name, "shape": shape, "batch": batch, "dtype": DTYPE}
        section(f"{op.name} {shape} batch {batch}", key | {"mode": "forward"}, work)

    def hold_all(op: operators.Operator, shape: str, batch: int, first: bool) -> None:
        for peer in operators.select(op.peers(backend()), names):
            if (peer.name in ("fused", "plain")) != first:
                continue
            key = {"table": "memory", "operator": op.name, "shape": shape, "batch": batch, "dtype": DTYPE}
            key |= {"mode": op.modes[-1], "peer": peer.name}
            work = functools.partial(_memory, op, peer, shape, batch)
            section(f"{op.name} {shape} batch {batch} memory of {peer.name}", key, work)

    found = [op for name, op in operators.by_name().items() if not only or name in only]
    shapes = {op.name: [(op.tiny.name, op.tiny.batch)] if smoke else list(op.cpu_shapes) for op in found}
    for op in found:
        time_all(op, *shapes[op.name][0])
    rest = [] if main else found
    for op in rest:
        hold_all(op, *shapes[op.name][0], True)
    for op in rest:
        for shape in shapes[op.name][1:]:
            time_all(op, *shape)
    for op in rest:
        hold_all(op, *shapes[op.name][0], False)
    result = {"schema": 1, "kind": "cpu", "measurement": not smoke, "budget_s": budget_s}
    result |= {"elapsed_s": round(time.time() - begun, 1), "sections": sections}
    return kernels.assemble(result, rows)
