"""What a result of operators shows: the rows that compare, the main shape, the targets."""

from __future__ import annotations

from collections.abc import Sequence

from bench.subjects.operators.base import Operator

_METHODS = ("graph", "stream", "wall")


def methods(result: dict) -> list[str]:
    """How the times of a result were taken, the nearest to the device first."""
    present = {r.get("method") for r in result["timings"]}
    return [m for m in _METHODS if m in present]


def group_of(row: dict) -> tuple:
    """What a row is about: rows of one group compare."""
    return tuple(row[k] for k in ("shape", "batch", "dtype", "mode"))


def measured(
    result: dict, table: str, operator: str, group: tuple, against: Sequence[str] | None = None
) -> dict[str, dict]:
    """The valid rows of all peers at ``(shape, batch, dtype, mode)``, by peer. Timings are of one method: the
    first that has ours and a peer ``against`` (default: any), device time before what a program sees."""
    rows = [
        r
        for r in result[table]
        if r["status"] == "ok" and r["operator"] == operator and group_of(r) == group and "peer" in r
    ]
    if table != "timings":
        return {r["peer"]: r for r in rows}
    ours: dict[str, dict] = {}
    for method in methods(result):
        found = {r["peer"]: r for r in rows if r["method"] == method}
        if "fused" in found:
            others = found.keys() - {"fused"} if against is None else found.keys() & set(against)
            if others:
                return found
            ours = ours or {"fused": found["fused"]}
    return ours


def fastest(result: dict, operator: str, group: tuple, peers: Sequence[str]) -> tuple[str, float] | None:
    """The fastest of ``peers`` and its time over ours; ``None`` where none was measured beside ours."""
    rows = measured(result, "timings", operator, group, peers)
    times = {p: rows[p]["median_s"] for p in peers if p in rows}
    if "fused" not in rows or not times:
        return None
    best = min(times, key=times.__getitem__)
    return best, times[best] / rows["fused"]["median_s"]


def targets(result: dict, operator: Operator) -> list[dict]:
    """Each target of ``operator`` for this kind of machine, with what was measured and whether it is met."""
    found = []
    for target in operator.targets:
        if target.device != result["kind"]:
            continue
        group = (target.shape, target.batch, target.dtype, target.mode)
        rows = measured(result, target.table, operator.name, group, target.against)
        field = "median_s" if target.table == "timings" else "extra_bytes"
        others = [rows[p][field] for p in target.against if p in rows]
        ratio = met = None
        if "fused" in rows and others:
            # Against the fastest (or leanest) of them.
            ours = rows["fused"][field]
            ratio = min(others) / ours if target.at_least else ours / min(others)
            met = ratio >= target.at_least if target.at_least else ratio <= target.at_most
        found.append({"target": target, "measured": ratio, "met": met})
    return found


def summary_group(result: dict, operator: Operator, mode: str) -> tuple:
    """The one shape, batch, dtype and mode that stands for an operator on this kind of machine."""
    if result["kind"] == "cpu":
        return (*operator.cpu_shapes[0], "float32", mode)
    return (operator.shapes[0].name, 16, "bfloat16", mode)
