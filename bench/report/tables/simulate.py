"""Tables of ``bench simulate``."""

from __future__ import annotations

from typing import Any

from bench.measure.text import markdown


def _microseconds(value: float | None) -> str:
    return "–" if value is None else f"{1e6 * value:.1f}" if value < 99.5e-6 else f"{1e6 * value:.0f}"


def _named(row: dict[str, Any]) -> str:
    what = f"`{row['operator']}` {row['direction']}, {row['shape']}, batch {row['batch']}"
    return f"{what}, {row['data']}" if row["data"] else what


_KEYS = ("operator", "shape", "batch", "direction", "data")


def _operators_table(result: dict[str, Any], machine: str = "H200") -> str:
    variants = list(dict.fromkeys(row["variant"] for row in result["rows"]))
    commit = (result["environment"].get("before") or "")[:12]
    titles = {"before": f"before ({commit or 'no commit'})", "now": "now", "changed": "changed"}
    header = ["operator", "floor", *(titles[v] for v in variants)]
    header += ["H100", "share of the floor", "limit of the longest kernel"]
    by_key: dict[tuple, dict[str, dict]] = {}
    for row in result["rows"]:
        by_key.setdefault(tuple(row[k] for k in _KEYS), {})[row["variant"]] = row
    lines = []
    for found in by_key.values():
        last = found.get(variants[-1]) or next(iter(found.values()))
        if last["status"] != "ok":
            lines.append([_named(last), last["status"], *["–"] * (len(header) - 2)])
            continue
        times = [
            _microseconds(found[v][machine]["seconds"]) if found.get(v, {}).get("status") == "ok" else "–"
            for v in variants
        ]
        there = last[machine]
        longest = max(there["launches"], key=lambda launch: launch["seconds"])
        share = f"{100 * there['floor_s'] / there['seconds']:.0f} %" if there["floor_s"] else "–"
        cells = [_microseconds(there["floor_s"]), *times, _microseconds(last["H100"]["seconds"]), share]
        lines.append([_named(last), *cells, longest["limit"]])
    return f"{result['note']} µs, {machine} unless said.\n\n{markdown(header, lines)}"


def _kernels_table(result: dict[str, Any], machine: str = "H200") -> str:
    header = ["kernel", "µs", "limit", "issue", "MUFU", "tensor", "shared memory"]
    header += ["registers", "programs a multiprocessor", "programs", "MB through L2"]
    lines = []
    for row in result["rows"]:
        if row["variant"] != "now" or row["status"] != "ok":
            continue
        for k in row[machine]["launches"]:
            name = f"`{k['kernel']}`, {row['shape']}, batch {row['batch']}" + (
                row["data"] and f", {row['data']}"
            )
            busy = [f"{100 * k['busy'][n]:.0f} %" for n in ("issue", "MUFU", "tensor", "shared memory")]
            numbers = [k["registers"], k["resident"], k["programs"], f"{k['l2_bytes'] / 1e6:.0f}"]
            lines.append([name, _microseconds(k["seconds"]), k["limit"], *busy, *map(str, numbers)])
    return f"{result['note']} {machine}.\n\n{markdown(header, lines)}{_doubts(result, machine)}"


def _doubts(result: dict[str, Any], machine: str) -> str:
    """What the simulator did not know of the kernels."""
    branches, instructions = {}, {}
    for row in result["rows"]:
        for k in row[machine]["launches"] if row["status"] == "ok" else ():
            branches |= {k["kernel"]: k["unknown_branches"]} if k["unknown_branches"] else {}
            instructions |= dict.fromkeys(k["unknown_instructions"])
    text = ""
    if branches:
        named = ", ".join(f"`{name}` {count}" for name, count in sorted(branches.items()))
        text += f"\n\nBranches whose condition depends on data: {named}."
    if instructions:
        text += (
            f"\n\nInstructions without a rate, taken as plain arithmetic: {', '.join(sorted(instructions))}."
        )
    return text


def _calibration_table(result: dict[str, Any]) -> str:
    header = ["code of known speed", "predicted", "published", "note"]
    lines = [
        [r["name"], r.get("predicted", "–"), r.get("published", "–"), r.get("reason") or r.get("note", "")]
        for r in result["calibration"]
    ]
    return f"{result['note']}\n\n{markdown(header, lines)}" if lines else "Not calibrated."


def tables(result: dict[str, Any]) -> dict[str, str]:
    """``operators``, ``kernels`` and ``calibration``."""
    return {
        "operators": _operators_table(result),
        "kernels": _kernels_table(result),
        "calibration": _calibration_table(result),
    }
