"""Calls in processes of their own: thread pools in one process disturb each other."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from bench.measure import peaks, pools
from bench.measure.environment import ROOT


class Worker:
    """A process in which ``module.function(*values)`` gave a call, which runs when the worker is called.

    Attributes:
        info: plain data that ``function`` gave beside the call.

    Raises:
        RuntimeError: the process ended; with the last line of its standard error.
    """

    def __init__(self, module: str, function: str, *values: Any, threads: int = 1) -> None:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the worker
        command = [sys.executable, "-m", "bench", "_serve", module, function, json.dumps(values)]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self.info: dict[str, Any] = self._answer()

    def __call__(self) -> float:
        """Seconds of one call."""
        return self._ask("time")

    def beside_pools(self) -> float:
        """Seconds of one call while other thread pools of its process compute: `bench.measure.pools`."""
        return self._ask("pools")

    def held(self) -> int | None:
        """Most bytes resident during a call beyond those before ``function``, or beyond ``resident`` of its
        plain data; ``None`` where Linux does not say."""
        return self._ask("memory")

    def _ask(self, what: str) -> Any:
        with contextlib.suppress(BrokenPipeError):
            print(what, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        raise RuntimeError((self._errors.read().strip().splitlines() or ["no message"])[-1])

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def serve(module: str, function: str, values: list) -> int:
    """The worker's side: answers on standard output, one JSON value a line; what libraries print goes to
    standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    before = peaks.resident()
    info, call = getattr(importlib.import_module(module), function)(*values)
    before = info.pop("resident", before)
    print(json.dumps(info), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(line.strip(), call, before)), file=answers, flush=True)
    return 0


def _answer(what: str, call: Callable[[], object], before: int | None) -> float | int | None:
    if what == "memory":
        most = peaks.highest(call)
        return None if most is None or before is None else most - before
    with pools.busy() if what == "pools" else contextlib.nullcontext():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
