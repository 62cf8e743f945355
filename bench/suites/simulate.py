"""``python -m bench simulate``: the time of the Triton kernels, predicted from their machine code.

**Predicted, not measured.** Every operator is called as the benchmark calls it, but its launches are compiled
and kept instead of run (``_capture.py``, in a process of its own, for this checkout or another). Then
:mod:`bench.simulator` executes their machine code for an H100 and an H200.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import environment
from bench.measure.results import write
from bench.simulator import calibration
from bench.simulator import launch as simulated
from bench.simulator.assume import share_met
from bench.simulator.machine import H200, MACHINES
from bench.subjects import operators
from bench.suites import _capture
from segvit_kernels.testing import machine_code

NOTE = "Predicted from machine code, not measured."
CHILD = Path(__file__).with_name("_capture.py")
STUB = environment.ROOT / "segvit_kernels" / "testing" / "stub" / "__init__.py"
CACHE = environment.ROOT / "build" / "simulate"
ARCH = "sm_90"
DTYPE, BATCHES = "bfloat16", (16, 1)
OPERATORS = (
    "atm",
    "query_attention",
    "mask_loss",
    "mask_matching",
    "semantic_argmax",
    "semantic_topk",
    "panoptic_argmax",
    "mask_binarize",
    "mask_iou",
    "subsample_norm",
)
# What branches on data do: work is done (False), or skipped wherever it may be (True); the truth is between,
# and where the labels of the benchmark tell how often (None), so much of the way from the one to the other.
DATA = {
    "mask_loss": {"every tile meets its class": False, "no tile does": True, "labels as drawn": None},
    "semantic_argmax": {"test not tried": False, "decided early": True},
}


# ------------------------------------------------------------------------------------------------ capturing


def _digest(paths: Iterable[Path], *more: str) -> str:
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    found.update("\0".join(more).encode())
    return found.hexdigest()[:24]


def _sources(checkout: Path) -> list[Path]:
    kernels = (checkout / "segvit_kernels").rglob("*")
    found = [p for p in kernels if p.suffix in (".py", ".json", ".c") and "__pycache__" not in p.parts]
    return [*found, *(checkout / "bench").rglob("operators/*.py"), CHILD]


def job(operator: str, shape: str, batch: int, **more: Any) -> dict[str, Any]:
    """What is to be captured; ``more``: ``mode``, ``dtype``, ``sizes``, ``changes``, ``arguments``."""
    mode = "forward_backward" if "forward_backward" in operators.by_name()[operator].modes else "forward"
    found = {"operator": operator, "shape": shape, "batch": batch, "dtype": DTYPE, "mode": mode}
    return found | {"arch": ARCH, "multiprocessors": H200.multiprocessors} | more


def capture(jobs: Sequence[dict[str, Any]], checkout: Path = environment.ROOT) -> list[dict[str, Any]]:
    """The launches of every job as ``checkout`` makes them; ``reason`` where it cannot.

    Raises:
        ValueError: the process fails; the last line that it said.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    sources = _digest(_sources(checkout), str(environment.version("triton")), torch.__version__)
    keys = [_digest([], sources, json.dumps(j, sort_keys=True)) for j in jobs]
    kept = {key: CACHE / f"{key}.pickle" for key in keys}
    found = {key: pickle.loads(path.read_bytes()) for key, path in kept.items() if path.is_file()}
    missing = {key: j for key, j in zip(keys, jobs, strict=True) if key not in found}
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            what = json.dumps(list(missing.values()))
            command = [sys.executable, "-P", str(CHILD), str(STUB), what, folder]
            variables = environment.variables_of(checkout)
            done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=checkout)
            if done.returncode:
                raise ValueError(f"{checkout}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            for index, key in enumerate(missing):
                written = Path(folder, f"{index}.pickle")
                found[key] = pickle.loads(written.read_bytes())
                launches = [*found[key].get("forward", ()), *found[key].get("backward", ())]
                if not all(launch["cubin"] for launch in launches):
                    why = "Triton's cache holds an empty kernel, left by another tool: set TRITON_CACHE_DIR"
                    found[key] = {"reason": why}
                if "reason" not in found[key]:  # a failure may be the machine's
                    shutil.move(written, kept[key])
    return [found[key] for key in keys]


# --------------------------------------------------------------------------------------------- predicting


def predict(described: dict[str, Any], labels: Any = None, decided: bool = False) -> dict[str, dict]:
    """Of a captured launch the prediction for every machine; kept by what it depends on."""
    engine = [*(environment.ROOT / "bench" / "simulator").glob("*.py"), Path(machine_code.__file__)]
    path = CACHE / f"{_digest(engine, repr(described), json.dumps([labels, decided]))}.json"
    if path.is_file():
        return json.loads(path.read_text())
    try:
        launch = simulated.Launch(described, labels, decided)
        found = {name: launch.predict(machine).row() for name, machine in MACHINES.items()}
    except (ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        return {"reason": f"{described['kernel']}: {said}"}  # not kept: the machine's own fault, perhaps
    CACHE.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(found))
    return found


def _drawn(described: dict[str, Any], captured: dict[str, Any]) -> dict[str, dict]:
    """The prediction for the labels of the benchmark: between that of all work done and that of none."""
    work, none = (predict(described, captured["labels"], skipped) for skipped in (False, True))
    share = share_met(described, captured["words"], captured["labels"])
    for found in (work, none):
        if share is None or "reason" in found:
            return found

    def between(more: Any, less: Any) -> Any:
        if isinstance(more, dict):
            return {key: between(more[key], less[key]) for key in more}
        return share * more + (1 - share) * less if isinstance(more, float) else more

    return between(work, none)


def floor(operator: str, case: Any, direction: str, machine: Any, dtype: str = DTYPE) -> float | None:
    """The time that no implementation undercuts on a machine (:func:`bench.subjects.operators.floor`)."""
    op = operators.by_name()[operator]
    mode = "forward_backward" if "forward_backward" in op.modes else "forward"
    costs = op.costs(case, getattr(torch, dtype).itemsize, mode)
    costs = costs[:1] if direction == "forward" else costs[1:]
    return operators.floor(costs, machine.rates(), dtype)["floor_s"]


def _case(j: dict[str, Any]) -> Any:
    op = operators.by_name()[j["operator"]]
    case = op.tiny if j["shape"] == "tiny" else op.shape(j["shape"], j["batch"])
    return dataclasses.replace(case, **j.get("sizes", {}))


def rows(j: dict[str, Any], captured: dict[str, Any], variant: str) -> list[dict[str, Any]]:
    """Rows of a captured job: one for each direction and assumption about its data."""
    found = []
    base = {k: j[k] for k in ("operator", "shape", "batch", "dtype")} | {"variant": variant}
    if "reason" in captured:
        return [base | {"direction": "–", "data": "", "status": "failed", "reason": captured["reason"]}]
    for direction in ("forward", "backward"):
        if not captured[direction]:
            continue
        for data, decided in DATA.get(j["operator"], {"": False}).items():
            row = base | {"direction": direction, "data": data, "status": "ok"}
            launches = [
                _drawn(d, captured) if decided is None else predict(d, captured["labels"], decided)
                for d in captured[direction]
            ]
            if wrong := [p["reason"] for p in launches if "reason" in p]:
                found.append(row | {"status": "failed", "reason": wrong[0]})
                continue
            for name, machine in MACHINES.items():
                seconds = sum(p[name]["seconds"] for p in launches)
                least = floor(j["operator"], _case(j), direction, machine, j["dtype"])
                row[name] = {"seconds": seconds, "floor_s": least, "launches": [p[name] for p in launches]}
            found.append(row)
    return found


def jobs(names: Sequence[str], batches: Sequence[int] = BATCHES, **more: Any) -> list[dict[str, Any]]:
    """The main shape of every operator at every batch."""
    known = operators.by_name()
    return [job(name, known[name].shapes[0].name, batch, **more) for name in names for batch in batches]


def _has(checkout: Path, operator: str) -> bool:
    """Whether a checkout, perhaps an older one, has a benchmark of an operator."""
    folders = (checkout / "bench" / "subjects" / "operators", checkout / "bench" / "operators")
    return any((folder / f"{operator}.py").is_file() for folder in folders)


def run(
    *,
    names: Sequence[str] | None = None,
    batches: Sequence[int] = BATCHES,
    before: Path | None = None,
    changes: dict[str, Any] | None = None,
    calibrate: bool = True,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The result for this tree, beside another checkout (``before``) or other parameters (``changes``)."""
    names = list(names or OPERATORS)
    described = environment.describe(torch.device("cpu")) | {"threads": 1}
    variants: list[tuple[str, Path, dict[str, Any]]] = []
    if before:
        variants.append(("before", before, {}))
        described["before"] = environment.commit_of(before)
    variants.append(("now", environment.ROOT, {}))
    if changes:
        variants.append(("changed", environment.ROOT, changes))
    found: list[dict[str, Any]] = []
    for variant, checkout, changed in variants:
        there = [name for name in names if _has(checkout, name)]
        wanted = jobs(there, batches, **({"changes": changed} if changed else {}))
        for j, captured in zip(wanted, capture(wanted, checkout), strict=True):
            progress(f"{variant}: {j['operator']}, batch {j['batch']}")
            found += rows(j, captured, variant)
    calibrations = []
    if calibrate:
        calibrations = calibration.rows(CACHE, _capture.describe, progress)
    return {
        "schema": 1,
        "kind": "simulate",
        "note": NOTE,
        "correct": all(row["status"] == "ok" for row in found),
        "environment": described,
        "machines": {name: dataclasses.asdict(machine) for name, machine in MACHINES.items()},
        "changes": changes or {},
        "calibration": calibrations,
        "rows": found,
    }
