"""Peak memory of a call, and the processes where a CPU shows it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.measure.environment import ROOT
from bench.measure.timing import synchronize


def cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that ``call`` held beyond what was allocated before it, its results included."""
    call()
    gc.collect()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    synchronize(device)
    extra = torch.cuda.max_memory_allocated(device) - before
    del result
    return extra


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def resident_peak(call: Callable[[], object], warm_ups: int = 2) -> int | None:
    """Most bytes by which ``call`` raised the resident set, its results included, after ``warm_ups`` calls;
    ``None`` where Linux's high-water mark cannot be reset.

    Meaningful in a process of its own whose allocator gives large blocks back at once
    (``MALLOC_MMAP_THRESHOLD_``): a free block that is kept resident would hide what the call takes.
    """
    for _ in range(warm_ups):
        call()
    gc.collect()
    before, most = resident(), highest(call)
    return None if before is None or most is None else max(most - before, 0)


def resident() -> int | None:
    """Bytes of this process in memory; ``None`` where there is no /proc."""
    try:
        return _status_bytes("VmRSS")
    except OSError:
        return None


def highest(call: Callable[[], object]) -> int | None:
    """Most bytes of this process in memory during ``call``; ``None`` where Linux's high-water mark cannot be
    reset."""
    try:
        with open("/proc/self/clear_refs", "w") as mark:
            mark.write("5")
        result = call()
        most = _status_bytes("VmHWM")
    except OSError:
        return None
    del result
    return most


def allocator_peak(call: Callable[[], object]) -> int | None:
    """Most bytes that ``call`` held in torch's CPU allocator, its results included, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = call()
    try:
        events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    except AttributeError:
        return None
    del result
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def isolated(module: str, function: str, *values: Any) -> Any:
    """``module.function(*values)``, which gives plain data, in a process of :func:`memory_process`.

    Raises:
        RuntimeError: the last line that the process printed to its standard error.
    """
    done = memory_process("_call", module, function, json.dumps(values))
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def memory_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m bench ARGUMENTS`` in a process where what is resident is what is in use: blocks from 64 KiB
    on are mapped and unmapped one by one."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
