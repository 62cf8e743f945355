"""Markdown tables from result files, and the README's tables between their markers."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import kernels

_MARKED = re.compile(r"(<!-- bench:(?P<name>\S+) -->\n)(?P<body>.*?)(<!-- /bench:(?P=name) -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- /?bench:\S+ -->")
_METHODS = ("graph", "stream", "wall")
_TABLES = ("checks", "timings", "memory", "ceilings", "costs")


class ReportError(ValueError):
    """A result or README that cannot be used; the message is for the user."""


def load(path: Path) -> dict:
    """A result file, checked for the shape that the schema promises."""
    try:
        result = json.loads(path.read_text())
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}: not JSON: {error}") from None
    problem = schema_problem(result)
    if problem:
        raise ReportError(f"{path}: not a result of this benchmark: {problem}")
    return result


def schema_problem(result: object) -> str | None:
    """What is wrong with ``result`` as the schema of bench/README.md has it; ``None`` if nothing is."""
    if not isinstance(result, dict) or result.get("schema") != 1:
        return "'schema' is not 1"
    if result.get("kind") not in ("cpu", "gpu") or not isinstance(result.get("measurement"), bool):
        return "'kind' or 'measurement' is missing"
    if not isinstance(result.get("environment"), dict) or not isinstance(result.get("correct"), bool):
        return "'environment' or 'correct' is missing"
    required = {
        "checks": ("operator", "kind", "case", "batch", "dtype", "status"),
        "timings": ("operator", "shape", "batch", "dtype", "mode", "status"),
        "memory": ("operator", "shape", "batch", "dtype", "mode", "peer", "status"),
        "ceilings": ("name",),
        "costs": ("operator", "shape", "batch", "dtype", "mode", "phases"),
    }
    for table, keys in required.items():
        for row in result.get(table, [None]):
            missing = [k for k in keys if not isinstance(row, dict) or k not in row]
            if missing:
                return f"a row of '{table}' lacks {', '.join(missing)}"
    measured = [r for r in result["timings"] if r["status"] == "ok"]
    if any("median_s" not in r or "method" not in r or "peer" not in r for r in measured):
        return "a measured row of 'timings' lacks peer, method or median_s"
    return None


# ---------------------------------------------------------------------------------------------- tables


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1 or unit == "µs":
            return f"{value * scale:.3g} {unit}" if value * scale < 1000 else f"{value * scale:.0f} {unit}"
    raise AssertionError


def size(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def _spread(row: dict) -> str:
    return f"{seconds(row['median_s'])} ±{50 * (row['p75_s'] - row['p25_s']) / row['median_s']:.0f} %"


def _methods(result: dict) -> list[str]:
    present = {r.get("method") for r in result["timings"]}
    return [m for m in _METHODS if m in present]


def _group(row: dict) -> tuple:
    return tuple(row[k] for k in ("shape", "batch", "dtype", "mode"))


def _cell(rows: list[dict], render: Callable[[dict], str]) -> str:
    if not rows:
        return "–"
    return render(rows[0]) if rows[0]["status"] == "ok" else rows[0]["status"]


def _wide(result: dict, table: str, operator: str, method: str | None, render: Callable[[dict], str]) -> str:
    rows = [r for r in result[table] if r["operator"] == operator]
    peers = sorted(dict.fromkeys(r["peer"] for r in rows if "peer" in r), key=lambda p: p != "fused")
    header = ["shape, batch, dtype, mode", *peers]
    extra = table == "timings" and any("share_of_floor" in r for r in rows)
    if extra:
        header += ["floor", "share of it"]
    lines = []
    for group in dict.fromkeys(map(_group, rows)):
        found = {p: [] for p in peers}
        for row in rows:
            if (
                _group(row) == group
                and "peer" in row
                and (method is None or row.get("method") in (method, "all"))
            ):
                found[row["peer"]].append(row)
        if not any(found.values()):
            whole = next(r for r in rows if _group(r) == group)
            if whole["status"] == "ok" or "peer" in whole:
                continue
            found = {p: [whole] for p in peers}
        line = [f"{group[0]}, {group[1]}, {group[2]}, {group[3].replace('_', ' + ')}"]
        line += [_cell(found[p], render) for p in peers]
        if extra:
            ours = next((r for r in found.get("fused", []) if r["status"] == "ok"), {})
            line.append(seconds(ours["floor_s"]) if "floor_s" in ours else "–")
            line.append(f"{100 * ours['share_of_floor']:.0f} %" if "share_of_floor" in ours else "–")
        lines.append(line)
    return markdown(header, lines) if lines else "Nothing was measured."


def _speed(result: dict, operator: str) -> str:
    parts = []
    for method in _methods(result):
        if method != "wall":
            parts.append({"graph": "Device time (CUDA graph replay, inputs not in L2):",
                          "stream": "One launch after another, as a program sees it:"}[method])  # fmt: skip
        parts.append(_wide(result, "timings", operator, method, _spread))
    return "\n\n".join(parts) or "Nothing was measured."


def _memory(result: dict, operator: str) -> str:
    return _wide(
        result,
        "memory",
        operator,
        None,
        lambda r: f"{size(r['extra_bytes'])} ({size(r['result_bytes'])} results)",
    )


def _checks(result: dict, operator: str) -> str:
    groups: dict[tuple, list[dict]] = {}
    for row in result["checks"]:
        if row["operator"] == operator:
            groups.setdefault((row["kind"], row["dtype"]), []).append(row)
    lines = []
    for (kind, dtype), rows in groups.items():
        count = {s: sum(r["status"] == s for r in rows) for s in ("ok", "failed", "skipped")}
        worst = max(
            (r for r in rows if r.get("relative_error") is not None),
            key=lambda r: r["relative_error"],
            default=None,
        )
        at = f"{worst['relative_error']:.2g} ({worst['case']}, {worst['quantity']})" if worst else "–"
        budget = f"{worst['relative_budget']:.0e}" if worst else "–"
        lines.append([f"{kind}, {dtype}", *(str(n) for n in count.values()), at, budget])
    return markdown(["check, dtype", "passed", "failed", "skipped", "worst relative error", "budget"], lines)


def targets(result: dict, operator: str) -> list[dict]:
    """Each target of ``operator`` for this kind of machine, with what was measured and whether it is met."""
    found = []
    for target in kernels.operators()[operator].targets:
        if target.device != result["kind"]:
            continue
        rows = [
            r
            for r in result[target.table]
            if r["status"] == "ok"
            and r["operator"] == operator
            and _group(r) == (target.shape, target.batch, target.dtype, target.mode)
        ]
        measured = method = None
        for method in _methods(result) if target.table == "timings" else (None,):
            field = "median_s" if target.table == "timings" else "extra_bytes"
            by_peer = {r["peer"]: r[field] for r in rows if method is None or r["method"] == method}
            others = [by_peer[p] for p in target.against if p in by_peer]
            if "fused" in by_peer and others:
                # Against the fastest (or leanest) of them.
                ratio = min(others) / by_peer["fused"] if target.at_least else by_peer["fused"] / min(others)
                measured = ratio
                break
        met = None
        if measured is not None:
            met = measured >= target.at_least if target.at_least else measured <= target.at_most
        found.append({"target": target, "measured": measured, "method": method, "met": met})
    return found


def _targets(result: dict, operator: str) -> str:
    lines = []
    for entry in targets(result, operator):
        target, measured = entry["target"], entry["measured"]
        wanted = f"≥ {target.at_least:g}×" if target.at_least else f"≤ {100 * target.at_most:g} %"
        got = "not measured"
        if measured is not None:
            got = f"{measured:.2f}×" if target.at_least else f"{100 * measured:.0f} %"
        met = {True: "yes", False: "no", None: "–"}[entry["met"]]
        lines.append(
            [f"{target.name} ({target.shape}, batch {target.batch}, {target.dtype})", wanted, got, met]
        )
    return markdown(["target", "wanted", "measured", "met"], lines) if lines else "No targets."


def _environment(result: dict) -> str:
    e = result["environment"]
    machine = e.get("gpu")
    if not machine:
        load = e.get("load_average") or 0.0
        machine = f"{e.get('cpu')}, {e.get('threads')} threads, load average {load:.1f} before"
    parts = [
        machine,
        f"driver {e['driver']}" if e.get("driver") else None,
        f"torch {e.get('torch')}",
        f"triton {e['triton']}" if e.get("triton") and e.get("gpu") else None,
        f"Python {e.get('python')}",
        f"commit {e['commit'][:12]}{' with local changes' if e.get('dirty') else ''}"
        if e.get("commit")
        else None,
        f"kernels {e['kernels_sha256'][:12]}" if e.get("kernels_sha256") else None,
        str(e.get("date", ""))[:10],
    ]
    line = ", ".join(p for p in parts if p) + "."
    units = {"copy_bytes_per_s": (1e12, "TB/s copied"), "exp2_per_s": (1e12, "T exponentials/s")}
    rates = []
    for row in result["ceilings"]:
        if "per_s" in row:
            matmul = f"TFLOP/s {row['name'].removeprefix('matmul_').removesuffix('_flop_per_s')} product"
            scale, unit = units.get(row["name"], (1e12, matmul))
            rates.append(f"{row['per_s'] / scale:.3g} {unit}")
    if rates:
        line += f" Measured ceilings: {', '.join(rates)}."
    return line


def tables(result: dict) -> dict[str, str]:
    """Every table of a result by name: ``environment`` and ``<operator>-speed|memory|checks|targets``."""
    found = {"environment": _environment(result)}
    for operator in kernels.operators():
        found[f"{operator}-targets"] = _targets(result, operator)
        found[f"{operator}-speed"] = _speed(result, operator)
        found[f"{operator}-memory"] = _memory(result, operator)
        found[f"{operator}-checks"] = _checks(result, operator)
    return found


def document(result: dict, title: str) -> str:
    """The whole result as Markdown, correctness first."""
    parts = [f"## {title}"]
    if not result["measurement"]:
        parts.append("**Not a measurement**: a smoke run of the script on tiny shapes.")
    if not result["correct"]:
        parts.append("**Checks failed or none passed: the speeds of such an operator are refused.**")
    named = tables(result)
    parts.append(named.pop("environment"))
    order = ("checks", "memory", "speed", "targets")
    for name in sorted(named, key=lambda n: order.index(n.rpartition("-")[2])):
        parts += [f"### {name}", named[name]]
    notes = [r for t in ("checks", "timings", "memory", "ceilings") for r in result[t] if r.get("reason")]
    reasons: dict[str, int] = {}
    for row in notes:
        where = f"{row['status']}: {row['reason']}" if row.get("status") else row["reason"]
        reasons[where] = reasons.get(where, 0) + 1
    if reasons:
        parts.append("### not as planned")
        parts.append("\n".join(f"- {count} rows {reason}" for reason, count in reasons.items()))
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------- README


def _body(name: str, results: Path) -> str:
    stem, _, table = name.partition("/")
    if stem.partition("-")[0] in ("flops", "inference", "model"):
        return _own_tables(stem, table, results / f"{stem}.json") + "\n"
    result = load(results / f"{stem}.json")
    if not result["measurement"]:
        raise ReportError(f"{results / (stem + '.json')}: not a measurement, and so not for the README")
    named = tables(result)
    if table not in named:
        raise ReportError(f"marker bench:{name}: no table {table!r}; expected one of {', '.join(named)}")
    return named[table] + "\n"


def _own_tables(stem: str, table: str, path: Path) -> str:
    """A table of ``bench flops``, ``inference`` or ``model``, whose results have a schema of their own."""
    module = importlib.import_module(f"bench.{stem.partition('-')[0]}")
    try:
        result = json.loads(path.read_text())
        named = {**module.tables(result), "environment": _environment({**result, "ceilings": []})}
    except (OSError, ValueError, LookupError) as error:
        raise ReportError(f"{path}: not a result of 'bench {stem}': {error}") from None
    if table not in named:
        expected = ", ".join(named)
        raise ReportError(f"marker bench:{stem}/{table}: no such table; expected one of {expected}")
    return named[table]


def regenerate(text: str, results: Path) -> str:
    """``text`` with everything between ``<!-- bench:STEM/TABLE -->`` and its closing marker made anew from
    ``results/STEM.json``."""
    paired = sum(2 for _ in _MARKED.finditer(text))
    if paired != len(_MARKER.findall(text)):
        raise ReportError(
            "a bench marker has no partner: expected '<!-- bench:NAME -->' line, '<!-- /bench:NAME -->'"
        )
    return _MARKED.sub(lambda m: m[1] + _body(m["name"], results) + m[4], text)
