"""``python -m bench cpu``: the operators against their peers on the CPU, in float32.

Ours is the backend that CPU tensors take: the native library if it is built, else eager.

Times come from one process, peers in turn. Memory comes from a process per peer: the resident set's
high-water mark sees everything a call touches, scratch of the BLAS and of compiled code included, which no
allocator hook does; torch's own allocator as the profiler saw it stands beside it as a cross-check.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench import environment, kernels, timing
from bench.gpu import _one_line, assemble
from segvit_kernels._library import why_not

DTYPE = "float32"
_DEVICE = torch.device("cpu")


def backend() -> str:
    """The backend that is measured."""
    return "eager" if why_not("cpu", _DEVICE) else "cpu"


def _checks(op: kernels.Operator, shape: str, batch: int) -> list[dict]:
    case = op.shape(shape, batch)
    key = {
        "table": "checks",
        "operator": op.name,
        "kind": "values",
        "case": shape,
        "batch": batch,
        "dtype": DTYPE,
    }
    rows = kernels.checked(op, kernels.Check("values", case, DTYPE), _DEVICE, backend())
    return [key | row for row in rows]


def _timings(
    op: kernels.Operator,
    peers: Sequence[kernels.Peer],
    shape: str,
    batch: int,
    rounds: int,
    seconds_per_peer: float,
) -> list[dict]:
    """Forward without gradients; forward and backward timed apart in one call with them."""
    leaves, gradients = op.inputs(op.shape(shape, batch), torch.float32, _DEVICE)
    key = {"operator": op.name, "shape": shape, "batch": batch, "dtype": DTYPE}
    rows: list[dict] = []
    forward: dict[str, Callable[[], float]] = {}
    training: dict[str, Callable[[], float]] = {}
    backward: dict[str, list[float]] = {}
    torch._dynamo.reset()
    for peer in peers:

        def inference(peer: kernels.Peer = peer) -> float:
            run = kernels.runner(peer, "forward")
            start = time.perf_counter()
            run(leaves, gradients)
            return time.perf_counter() - start

        def step(peer: kernels.Peer = peer) -> float:
            start = time.perf_counter()
            results = peer.call(leaves)
            middle = time.perf_counter()
            torch.autograd.grad(results, kernels.differentiable(leaves), gradients)
            end = time.perf_counter()
            backward[peer.name].append(end - middle)
            return end - start

        backward[peer.name] = []
        calls = [inference, step] if "forward_backward" in op.modes else [inference]
        try:
            for _ in range(2):
                for call in calls:
                    call()
        except Exception as error:  # torch.compile needs a compiler; the others still count
            reason = _one_line(error)
            rows.append(
                {
                    "table": "timings",
                    **key,
                    "mode": "forward",
                    "peer": peer.name,
                    "status": "failed",
                    "reason": reason,
                }
            )
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
            rows.append({"table": "timings", **key, **row, **timing.summary(values)})
    return rows


def measure_memory(spec: dict) -> dict:
    """Peak extra memory of one call; runs in a process of its own."""
    torch.set_num_threads(spec["threads"])
    op = kernels.operators()[spec["operator"]]
    peer = next(p for p in op.peers(backend()) if p.name == spec["peer"])
    leaves, gradients = op.inputs(op.shape(spec["shape"], spec["batch"]), torch.float32, _DEVICE)
    run = kernels.runner(peer, spec["mode"])

    def call() -> tuple:
        return run(leaves, gradients)

    extra = timing.resident_peak(call)
    return {
        "extra_bytes": extra,
        "allocator_bytes": timing.allocator_peak(call),
        "result_bytes": sum(t.nbytes for t in call()),
    }


def _memory(op: kernels.Operator, peers: Sequence[kernels.Peer], shape: str, batch: int) -> list[dict]:
    rows = []
    for peer in peers:
        for mode in op.modes:
            key = {"operator": op.name, "shape": shape, "batch": batch, "dtype": DTYPE, "mode": mode}
            key["peer"] = peer.name
            spec = json.dumps(key | {"threads": torch.get_num_threads()})
            done = environment.memory_process("_memory", spec)
            row = {"table": "memory", **key, "method": "resident set high-water mark"}
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                rows.append(row | {"status": "failed", "reason": last[:400]})
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            if found["extra_bytes"] is None:
                found["extra_bytes"] = found["allocator_bytes"]
                row["method"] = "torch allocator"
            rows.append(row | found | {"status": "ok" if found["extra_bytes"] is not None else "failed"})
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
    threads: int = 2,
    rounds: int = 9,
    seconds_per_peer: float = 4.0,
    smoke: bool = False,
    names: Sequence[str] | None = None,
    progress: Callable[[str], None] = print,
) -> dict:
    """The result of a whole run, as plain data (schema: bench/README.md)."""
    begun = time.time()
    kernels.check_peers(backend(), names)
    torch.set_num_threads(threads)
    _keep_freed_memory()
    torch.manual_seed(torch.seed() % 2**31)
    rows: list[dict[str, Any]] = [
        {"table": "environment", **environment.describe(_DEVICE), "backend": backend()}
    ]
    sections = []
    for op in kernels.operators().values():
        shapes = [(op.tiny.name, op.tiny.batch)] if smoke else op.cpu_shapes
        for shape, batch in shapes:
            started = time.time()
            peers = kernels.select(op.peers(backend()), names)
            rows += _checks(op, shape, batch)
            rows += _timings(op, peers, shape, batch, rounds, seconds_per_peer)
            if (shape, batch) == shapes[0]:  # a process for every peer takes its time
                rows += _memory(op, peers, shape, batch)
            seconds = round(time.time() - started, 1)
            sections.append({"name": f"{op.name} {shape} batch {batch}", "seconds": seconds, "ended": "ok"})
            progress(f"{op.name} {shape} batch {batch}: {seconds:.0f} s")
    result = {
        "schema": 1,
        "kind": "cpu",
        "measurement": not smoke,
        "elapsed_s": round(time.time() - begun, 1),
    }
    return assemble(result | {"sections": sections}, rows)
