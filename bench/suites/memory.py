"""``python -m bench memory``: peak memory of inference and of a training step, as published against fused.

Beyond weights and inputs; results and, in training, all gradients included. On a GPU by torch's allocator, on
a CPU by the resident set of a process of its own. A training step is forward, loss and backward.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from bench.measure import environment, peaks, timing
from bench.subjects import models
from bench.subjects.published import MODELS, TINY, Model

MODES = ("inference", "training")
QUICK = ("vit_b_ade20k_512",)


def of(
    subject: models.Subject, spec: Model, mode: str, batch: int, dtype: str, device: torch.device
) -> int | None:
    """Peak bytes of one call on ``device``; on a CPU meaningful in a process made for it."""
    model = models.build(subject, spec, device)
    images, labels = models.inputs(spec, batch, device)
    kind = getattr(torch, dtype)
    if mode == "inference":
        run: Callable[[], object] = models.inference(subject, model, images, kind)
    else:
        run = models.training(subject, model, images, labels, kind)
    return peaks.cuda_peak(run, device) if device.type == "cuda" else peaks.resident_peak(run, warm_ups=1)


def rows(
    table: str,
    names: Sequence[str],
    spec: Model,
    mode: str,
    batch: int,
    dtype: str,
    device: torch.device,
) -> Iterator[dict]:
    """``name``, ``status``, and ``extra_bytes`` or ``reason``, of subjects of a table of models."""
    request = {"table": table, "names": list(names), "spec": dataclasses.asdict(spec)}
    request |= {"mode": mode, "batch": batch, "dtype": dtype, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        yield from _each(request, device)
        return
    done = peaks.memory_process("_call", "bench.suites.memory", "print_peaks", json.dumps([request]))
    left = list(names)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            left.remove(row["name"])
            yield row
    for name in left:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield {"name": name, "status": "failed", "reason": f"exit code {done.returncode}: {last[:300]}"}


def _each(request: dict, device: torch.device) -> Iterator[dict]:
    known = {subject.name: subject for subject in models.table(request["table"], device)}
    spec = Model(**request["spec"])
    for name in request["names"]:
        row = {"name": name}
        if reason := known[name].missing():
            yield {**row, "status": "skipped", "reason": reason}
            continue
        try:
            arguments = (request["mode"], request["batch"], request["dtype"], device)
            extra = of(known[name], spec, *arguments)
        except Exception as error:  # out of memory, for one
            yield {**row, "status": "failed", "reason": timing.one_line(error)}
            continue
        if extra is None:
            yield {**row, "status": "skipped", "reason": "this system does not reset its high-water mark"}
        else:
            yield {**row, "status": "ok", "extra_bytes": extra}


def print_peaks(request: dict) -> None:
    """What the process of `rows` does: print a row for each subject of a request."""
    torch.set_num_threads(request["threads"])
    for row in _each(request, torch.device("cpu")):
        print(json.dumps(row), flush=True)


def run(
    *,
    names: Sequence[str] | None = None,
    batch: int = 1,
    dtype: str = "float32",
    threads: int = 2,
    quick: bool = False,
    smoke: bool = False,
    progress: Callable[[str], None] = print,
) -> dict:
    """Rows of published models, as plain data; ``quick`` is one of them, ``smoke`` a tiny one."""
    begun = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    names = names or (QUICK if quick else [model.name for model in MODELS])
    found = []
    for spec in (TINY,) if smoke else [model for model in MODELS if model.name in names]:
        for mode in MODES:
            key = {"model": spec.name, "mode": mode, "batch": batch, "dtype": dtype}
            for row in rows("forms", ("published", "fused"), spec, mode, batch, dtype, device):
                found.append({**key, **row})
                shown = f"{row['extra_bytes'] / 1e6:.0f} MB" if row["status"] == "ok" else row["reason"]
                progress(f"{spec.name} {mode} {row['name']}: {shown}")
    described = {**environment.describe(device), "threads": threads}
    result = {"schema": 1, "kind": "memory", "measurement": not smoke, "environment": described}
    return result | {"rows": found, "elapsed_s": round(time.time() - begun, 1)}
