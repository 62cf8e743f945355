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
import json
import os
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import environment, timing
from bench.measure import results as files
from bench.suites import _gpu_tasks, kernels, model
from bench.suites._gpu_rows import LOG, Rows, latest, read
from bench.suites._gpu_tasks import SECTIONS, STAGES, Plan, _context, _lost, sanitizer, sections

RESTARTS = 6
GRACE_S = 15.0
CANDIDATES = environment.ROOT / "bench" / "candidates.json"


# ------------------------------------------------------------------------------------------------ worker


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
        begun = time.time()
        key = {"table": task.table, **task.key}
        rows.write(begin=index)
        try:
            context = context or _context(plan, deadline)
            if context.left() <= 0 and task.table != "environment":
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
        rows.write(end=index, seconds=round(time.time() - begun, 3), **compiled.take())
        if _lost(context and context.device):  # perhaps by what a row already tells
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
        self.looked, self.lines, self.heard = 0.0, 0, self.begun
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
                [*_gpu_tasks.COMMAND, "_worker", *arguments],
                cwd=environment.ROOT,
                env={**os.environ, "PYTHONPATH": path},
                stdout=printed,
                stderr=printed,
            )

    def stop(self) -> None:
        if self.process:
            sanitizer.stop(self.process)

    def poll(self) -> bool:
        """Whether the section has ended; kills and restarts its worker as needed."""
        if self.ended:
            return True
        code, now = self.process.poll(), time.time()
        if code is None and now < self.looked + 1:  # looks take time of the processor
            return False
        self.looked = now
        begun, finished = self._listen()
        # The worker itself stops at the deadline; the grace is for the task in flight.
        late = code is None and now > self.deadline + GRACE_S
        # The last task has all the time there is.
        hangs = code is None and finished < begun < len(self.tasks) - 1
        hangs = hangs and now > self.heard + self.tasks[begun].quiet_s
        if code is None and not late and not hangs:
            return False
        self.stop()
        if code == 0:
            self._finish("ok")
            return True
        begun, finished = self._listen()
        last = (self.printed.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
        why = f"worker ended with code {code}: {last[:300]}"
        if late or hangs:
            limit = "time" if late else f"{self.tasks[begun].quiet_s:.0f} s, without a row,"
            why = f"did not end in {limit} and was killed"
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

    def _listen(self) -> tuple[int, int]:
        """The last task that began and the last that ended, -1 for none; notes when there are new lines."""
        events = [line for line in read(self.folder) if line["section"] == self.name]
        if len(events) > self.lines:
            self.lines, self.heard = len(events), time.time()
        begun = max((e["begin"] for e in events if "begin" in e), default=-1)
        return begun, max((e["end"] for e in events if "end" in e), default=-1)

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
            # Without the environment no row says what it is of.
            names = [*(["environment"] if stage == stages[0] else []), *sections(stage, plan)]
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
