"""What the project set out to reach, and whether the result files show it.

Each target of an operator stands with it (``bench/subjects/operators``); those of whole models stand here. A
target is ``met``, ``missed`` or ``not measured``; a missed one says why as far as that is known.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

from bench.measure.text import markdown
from bench.report.results import ReportError, load, machine
from bench.subjects import operators
from bench.subjects.operators import comparison

NO_GPU = "no GPU was available"


@dataclasses.dataclass(frozen=True)
class ModelTarget:
    """A target of whole models on a GPU: ``measure(result)`` of a result of ``bench model`` or ``memory``."""

    what: str
    wanted: str
    kind: str
    measure: Callable[[dict], float | None]
    met: Callable[[float], bool]
    show: str


def _least(result: dict, field: str, name: str, ways: tuple[str, ...], **where: object) -> float | None:
    """The least ``field`` of the rows ``where``, of the ways whose ``name`` begins with one of ``ways``."""
    rows = [r for r in result["rows"] if r["status"] == "ok" and r.get(name, "").startswith(ways)]
    values = [r[field] for r in rows if r.get(field) and all(r.get(k) == v for k, v in where.items())]
    return min(values, default=None)


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if theirs and ours else None


_OURS = ("fused", "engine")
_L640 = {"model": "vit_l_ade20k_640"}
_HALF = {**_L640, "dtype": "bfloat16"}


def _inference(peer: str, **where: object) -> Callable[[dict], float | None]:
    def measure(result: dict) -> float | None:
        one: dict[str, object] = {"mode": "inference", "batch": 1}
        theirs = _least(result, "median_s", "way", (peer,), **one, **_L640, **where)
        return _ratio(theirs, _least(result, "median_s", "way", _OURS, **one, **_HALF))

    return measure


def _frames(result: dict) -> float | None:
    where = {"model": "vit_l_cocostuff10k_512", "batch": 1, "mode": "inference"}
    return _ratio(1.0, _least(result, "median_s", "way", _OURS, **where))


def _step(result: dict) -> float | None:
    where = {"mode": "training", **_HALF}
    theirs = _least(result, "median_s", "way", ("SegViT, published",), **where)
    return _ratio(theirs, _least(result, "median_s", "way", ("SegViT",), way="SegViT", **where))


def _step_memory(result: dict) -> float | None:
    where = {"mode": "training", **_HALF}
    theirs = _least(result, "extra_bytes", "way", ("SegViT, published",), **where)
    return _ratio(_least(result, "extra_bytes", "way", ("SegViT",), way="SegViT", **where), theirs)


MODELS = (
    ModelTarget(
        "SegViT-L 640², image to labels, against the published formula in float32",
        "≥ 6×",
        "model",
        _inference("published", dtype="float32"),
        lambda value: value >= 6,
        "{:.2f}×",
    ),
    ModelTarget(
        "the same against torch.compile of it in bfloat16",
        "≥ 1.3×",
        "model",
        _inference("published, compiled", dtype="bfloat16"),
        lambda value: value >= 1.3,
        "{:.2f}×",
    ),
    ModelTarget(
        "SegViT-L 512², batch 1, image to labels",
        "≥ 400 frames/s",
        "model",
        _frames,
        lambda value: value >= 400,
        "{:.0f} frames/s",
    ),
    ModelTarget(
        "SegViT-L 640², training step, against the published formula in bfloat16",
        "≥ 1.5×",
        "model",
        _step,
        lambda value: value >= 1.5,
        "{:.2f}×",
    ),
    ModelTarget(
        "its peak memory against the same",
        "≤ 60 %",
        "model",
        _step_memory,
        lambda value: value <= 0.6,
        "{:.0%}",
    ),
)


def found(results: Path) -> list[dict]:
    """Every target: ``what, device, wanted, measured`` (text), ``verdict``, ``reason``, and the ``result`` in
    which it was measured, of several the one where it is furthest from being met."""
    loaded = [load(path) for path in sorted(results.glob("*.json")) if _relevant(path)]
    rows = []
    for kind, device in (("cpu", "CPU"), ("gpu", "GPU")):
        own = [r for r in loaded if r["kind"] == kind and r["measurement"]]
        for op in operators.by_name().values():
            for target in (t for t in op.targets if t.device == kind):
                rows.append(_operator_row(op, target, own, device))
    for target in MODELS:
        own = [r for r in loaded if r["kind"] == target.kind and r["environment"].get("gpu")]
        measured = [(value, r) for r in own if (value := target.measure(r)) is not None]
        row = {"what": target.what, "device": "GPU", "wanted": target.wanted}
        if measured:
            sign = 1 if target.met(math.inf) else -1  # whether more is better
            value, result = min(measured, key=lambda pair: sign * pair[0])
            verdict = "met" if target.met(value) else "missed"
            row |= {"measured": target.show.format(value), "verdict": verdict, "reason": "", "result": result}
        else:
            row |= {"measured": "–", "verdict": "not measured", "reason": "" if own else NO_GPU}
        rows.append(row)
    return rows


def _relevant(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("kind") in ("cpu", "gpu", "model", "memory")
    except (OSError, ValueError, AttributeError):
        raise ReportError(f"{path}: not a result of this benchmark") from None


def _operator_row(op: operators.Operator, target: operators.Target, results: list[dict], device: str) -> dict:
    measured = [
        (entry["measured"], entry["met"], result)
        for result in results
        for entry in comparison.targets(result, op)
        if entry["target"] == target and entry["measured"] is not None
    ]
    where = f"{target.shape}, batch {target.batch}, {target.dtype}"
    row = {"what": f"`{op.name}` {target.name} ({where})", "device": device}
    row["wanted"] = f"≥ {target.at_least:g}×" if target.at_least else f"≤ {target.at_most:.0%}"
    if not measured:
        none = NO_GPU if device == "GPU" and not results else "not in the result"
        return row | {"measured": "–", "verdict": "not measured", "reason": none}
    value, met, result = min(measured, key=lambda found: found[0] if target.at_least else -found[0])
    row["measured"] = f"{value:.2f}×" if target.at_least else f"{value:.0%}"
    return row | {
        "verdict": "met" if met else "missed",
        "reason": "" if met else target.why,
        "result": result,
    }


def table(results: Path) -> str:
    """Markdown: every target with its verdict, and a count."""
    rows = found(results)
    header = ["target", "device", "wanted", "measured", "verdict"]
    lines = []
    machines: dict[str, int] = {}
    for row in rows:
        verdict = row["verdict"] + (f": {row['reason']}" if row["reason"] else "")
        place = row["device"]
        if "result" in row:
            place += f" {machines.setdefault(machine(row['result']), len(machines) + 1)}"
        lines.append([row["what"], place, row["wanted"], row["measured"], verdict])
    count = {v: sum(r["verdict"] == v for r in rows) for v in ("met", "missed", "not measured")}
    summary = ", ".join(f"{n} {verdict}" for verdict, n in count.items())
    named = "; ".join(f"{number}: {name}" for name, number in machines.items())
    return f"{summary}.\n\n{markdown(header, lines)}" + (f"\n\n<sub>{named}</sub>" if named else "")
