"""``python -m bench kernels``: the operators against their peers, on a GPU (:mod:`bench.suites.gpu`) or a CPU
(:mod:`bench.suites.cpu`). Here is what both share: floors, what is refused, targets."""

from __future__ import annotations

from collections.abc import Callable

from bench.subjects import operators
from bench.subjects.operators import comparison

_TABLES = ("ceilings", "checks", "costs", "timings", "memory")
# What `bench gpu` measures beside the operators' times.
_BESIDE = ("candidates", "sanitizer", "native")


def assemble(result: dict, rows: list[dict]) -> dict:
    """Sort rows into tables, add floors, refuse the speeds of what is not proved right, judge targets."""
    tables: dict[str, list[dict]] = {t: [] for t in ("environment", *_TABLES, *_BESIDE)}
    for row in rows:
        row = dict(row)
        tables[row.pop("table")].append(row)
    found = next((r for r in tables.pop("environment") if "torch" in r), {})
    found.pop("name", None)
    ceilings = {r["name"]: r["per_s"] for r in tables["ceilings"] if "per_s" in r}
    result |= {"environment": found, **{t: v for t, v in tables.items() if v or t in _TABLES}}

    def key(row: dict) -> tuple:
        return tuple(row.get(k) for k in ("operator", "shape", "batch", "dtype", "mode"))

    floors = {}
    for row in result["costs"]:
        costs = [operators.Cost(**phase) for phase in row["phases"]]
        row |= operators.floor(costs, ceilings, row["dtype"])
        floors[key(row)] = row["floor_s"]
    for row in result["timings"]:
        if row.get("status") == "ok" and (least := floors.get(key(row))):
            row["floor_s"], row["share_of_floor"] = least, least / row["median_s"]
    verdicts = {op: _verdict(result["checks"], op) for op in operators.by_name()}
    for row in (*result["timings"], *result["memory"]):
        if row.get("status") == "ok" and (reason := verdicts[row["operator"]](row)):
            row |= {"status": "invalid", "reason": reason}
    failed = [r for r in result["checks"] if r["status"] == "failed"]
    passed = [r for r in result["checks"] if r["status"] == "ok"]
    result["correct"] = bool(passed) and not failed
    result["targets"] = [
        {"operator": op, "name": e["target"].name, "measured": e["measured"], "met": e["met"]}
        for op in dict.fromkeys(r["operator"] for r in result["checks"])
        for e in comparison.targets(result, operators.by_name()[op])
    ]
    return result


def _verdict(checks: list[dict], operator: str) -> Callable[[dict], str | None]:
    """Why a number of ``operator`` is refused: any failed check, or no passed check of that very row."""
    ours = [c for c in checks if c["operator"] == operator]
    failed = [c for c in ours if c["status"] == "failed"]
    proved = {
        (c["case"], c["batch"], c["dtype"]) for c in ours if c["status"] == "ok" and c["kind"] == "values"
    }

    def verdict(row: dict) -> str | None:
        if failed:
            return f"refused: {len(failed)} checks of {operator} failed"
        if (row["shape"], row["batch"], row["dtype"]) not in proved:
            return f"refused: {operator} was not checked at this shape, batch and dtype"
        return None

    return verdict
