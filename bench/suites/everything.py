"""``python -m bench all``: the small form of every benchmark within a time budget, then the report.

Every part is a process of its own, one after the other. Parts with a budget of their own get their share of
what is left; the others are stopped when theirs is used up twice.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable

from bench.measure import csrc, environment


@dataclasses.dataclass(frozen=True)
class Part:
    """One command: what it is for, its arguments, its share of the budget, whether it takes ``--budget``."""

    what: str
    arguments: tuple[str, ...]
    share: float
    budgeted: bool = False
    threads: bool = True


PARTS = (
    Part("operators against their peers", ("kernels",), 0.40, budgeted=True),
    Part("operators as sizes grow", ("scaling",), 0.17, budgeted=True),
    Part("whole models", ("model", "--quick"), 0.30, budgeted=True),
    Part("memory of whole models", ("memory", "--quick"), 0.08),
    # Counts need no second run; one model shows that today's code gives what results/flops.json says.
    Part(
        "operations counted, smallest model", ("flops", "--models", "vit_b_ade20k_512"), 0.03, threads=False
    ),
    Part("tables and figures", ("report",), 0.02, threads=False),
)


def plan(budget_s: float) -> str:
    """What would run, and the seconds of each part."""
    lines = [f"{p.share * budget_s:5.0f} s  {p.what}: python -m bench {' '.join(p.arguments)}" for p in PARTS]
    return "\n".join([f"{budget_s:.0f} s in all", *lines])


def run(
    budget_s: float,
    threads: int,
    *,
    plan_only: bool = False,
    call: Callable[[list[str], float], int | None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run every part; 1 if one fails. ``call(arguments, timeout)`` gives an exit code, ``None`` too late."""
    print(plan(budget_s), flush=True)
    if plan_only:
        return 0
    call, begun, failed = call or _call, clock(), []
    for index, part in enumerate(PARTS):
        left = budget_s - (clock() - begun)
        seconds = left * part.share / sum(p.share for p in PARTS[index:])
        arguments = list(part.arguments)
        if part.budgeted:
            # Starting and the task in flight come on top.
            arguments += ["--budget", f"{max(1.0, 0.85 * seconds - 5):.0f}"]
        if part.threads:
            arguments += ["--threads", str(threads)]
        started = clock()
        print(f"\n=== {part.what}: python -m bench {' '.join(arguments)} ({seconds:.0f} s)", flush=True)
        code = call(arguments, 2 * seconds)
        if code:
            failed.append(f"{part.what}: exit code {code}")
        elif code is None:
            failed.append(f"{part.what}: stopped after {2 * seconds:.0f} s")
        print(f"=== {part.what}: {clock() - started:.0f} s", flush=True)
    print(f"\n{clock() - begun:.0f} s of {budget_s:.0f} s", *failed, sep="\n")
    return 1 if failed else 0


def _call(arguments: list[str], timeout_s: float) -> int | None:
    path = os.pathsep.join(filter(None, (str(environment.ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "bench", *arguments]
    with subprocess.Popen(command, cwd=environment.ROOT, env={**os.environ, "PYTHONPATH": path}) as process:
        try:
            return process.wait(max(timeout_s, 1.0))
        except subprocess.TimeoutExpired:
            return None
        finally:  # what it started would run beside the next part
            csrc.module("sanitizer").stop(process)
