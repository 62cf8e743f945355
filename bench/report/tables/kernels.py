"""Tables of ``bench kernels`` and ``bench gpu``."""

from __future__ import annotations

from collections.abc import Callable

from bench.measure.text import markdown, seconds, size
from bench.subjects import operators
from bench.subjects.operators.comparison import fastest, group_of, measured, methods, summary_group


def sound(result: dict) -> bool:
    """Whether checks ran and passed and no run of ours failed. A peer may fail."""
    broken = [r for r in result["timings"] if r["status"] == "failed" and r.get("peer", "fused") == "fused"]
    proofs = (*result.get("sanitizer", ()), *result.get("native", ()))
    return result["correct"] and not broken and not any(r["status"] == "failed" for r in proofs)


def schema_problem(result: dict) -> str | None:
    """What is wrong with ``result`` as the schema of docs/benchmarking.md has it; ``None`` if nothing is."""
    if not isinstance(result.get("measurement"), bool) or not isinstance(result.get("correct"), bool):
        return "'measurement' or 'correct' is missing"
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


def _our_own(peer: str) -> bool:
    return peer in ("fused", "eager", "drop-in", "packed", "rle", "points") or peer.startswith("plan ")


def _spread(row: dict) -> str:
    if row["samples"] == 1:
        return f"{seconds(row['median_s'])}, one sample"
    return f"{seconds(row['median_s'])} ±{50 * (row['p75_s'] - row['p25_s']) / row['median_s']:.0f} %"


def _bytes(row: dict) -> str:
    return f"{size(row['extra_bytes'])} ({size(row['result_bytes'])} results)"


def _label(group: tuple) -> str:
    return f"{group[0]}, {group[1]}, {group[2]}, {group[3].replace('_', ' + ')}"


def _wide(rows: list[dict], render: Callable[[dict], str]) -> str:
    """One line a shape, batch, dtype and mode; one column a peer that was measured anywhere."""
    groups = list(dict.fromkeys(map(group_of, rows)))
    peers: dict[str, set] = {}
    for row in rows:
        if "peer" in row:
            peers.setdefault(row["peer"], set()).add(row["status"])
    idle = [p for p, found in peers.items() if found == {"skipped"} and p != "fused"]
    shown = sorted((p for p in peers if p not in idle), key=lambda p: p != "fused")
    floors = any("share_of_floor" in r for r in rows)
    lines = []
    for group in groups:
        own = [r for r in rows if group_of(r) == group]
        found = {r["peer"]: r for r in reversed(own) if "peer" in r}
        whole = next((r for r in own if "peer" not in r and r["status"] != "ok"), None)
        if not found and whole is None:
            continue
        cells = [found.get(p, None if found else whole) for p in shown]
        line = [_label(group)]
        line += ["–" if r is None else render(r) if r["status"] == "ok" else r["status"] for r in cells]
        if floors:
            ours = found.get("fused", {})
            valid = ours.get("status") == "ok" and "floor_s" in ours
            line.append(seconds(ours["floor_s"]) if valid else "–")
            line.append(f"{100 * ours['share_of_floor']:.0f} %" if valid else "–")
        lines.append(line)
    if not lines:
        return "Nothing was measured."
    header = ["shape, batch, dtype, mode", *shown, *(["floor", "share of it"] if floors else [])]
    notes = ""
    if idle:
        why = {p: next(r["reason"] for r in rows if r.get("peer") == p) for p in idle}
        notes = "\n\nSkipped: " + "; ".join(f"*{p}*: {reason}" for p, reason in why.items()) + "."
    return markdown(header, lines) + notes


def _speed(result: dict, operator: str) -> str:
    titles = {
        "graph": "Device time (CUDA graph replay, inputs not in L2):",
        "stream": "One launch after another, as a program sees it:",
    }
    parts = []
    for method in methods(result):
        parts += [titles[method]] if method in titles else []
        rows = [r for r in result["timings"] if r["operator"] == operator]
        parts.append(_wide([r for r in rows if r.get("method", "all") in (method, "all")], _spread))
    return "\n\n".join(parts) or "Nothing was measured."


def _memory(result: dict, operator: str) -> str:
    return _wide([r for r in result["memory"] if r["operator"] == operator], _bytes)


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


def _summary(result: dict) -> str:
    """One line an operator and mode: ours, how many times faster than each kind of peer, memory, floor."""
    lines = []
    for op in operators.by_name().values():
        for mode in op.modes:
            group = summary_group(result, op, mode)
            own = [r for r in result["timings"] if r["operator"] == op.name and group_of(r) == group]
            line = [f"`{op.name}`, {group[0]}, batch {group[1]}, {mode.replace('_', ' + ')}"]
            ours = measured(result, "timings", op.name, group).get("fused")
            if ours is None:
                lost = [r for r in own if r.get("peer", "fused") == "fused"]
                lines += [[*line, f"{r['status']}: {r['reason']}", *"––––"] for r in lost[:1]]
                continue
            line.append(_spread(ours))
            plain = fastest(result, op.name, group, ("plain",))
            others = {r["peer"] for r in own if "peer" in r and not _our_own(r["peer"])}
            best = fastest(result, op.name, group, sorted(others))
            line.append(f"{plain[1]:.2f}×" if plain else "–")
            line.append(f"{best[1]:.2f}× ({best[0]})" if best else "–")
            held = measured(result, "memory", op.name, group)
            share = ours.get("share_of_floor")
            line.append("–" if share is None else f"{100 * share:.0f} %")
            both = "fused" in held and "plain" in held
            line.append(
                f"{size(held['fused']['extra_bytes'])} / {size(held['plain']['extra_bytes'])}"
                if both
                else "–"
            )
            lines.append(line)
    header = ["operator", "time", "against plain", "against the fastest peer", "share of the floor"]
    return markdown([*header, "memory, ours / plain"], lines) if lines else "Nothing was measured."


def tables(result: dict) -> dict[str, str]:
    """Every table of a result by name: ``summary`` and ``<operator>-checks|memory|speed``."""
    found = {"summary": _summary(result)}
    for operator in operators.by_name():
        found[f"{operator}-checks"] = _checks(result, operator)
        found[f"{operator}-memory"] = _memory(result, operator)
        found[f"{operator}-speed"] = _speed(result, operator)
    if rows := result.get("candidates"):
        found["candidates"] = _candidates(rows)
    for name in ("sanitizer", "native"):
        if rows := result.get(name):
            lines = [[r["name"], r["status"], r.get("summary", r.get("reason") or "–")] for r in rows]
            found[name] = markdown(["what", "status", "summary"], lines)
    return found


def _candidates(rows: list[dict]) -> str:
    """One line a candidate: its time beside that of what is pinned."""
    lines = []
    for row in rows:
        where = f"{row['operator']}, {row['shape']}, {row['batch']}, {row['dtype']}, {row['mode']}"
        ok = row["status"] == "ok"
        times = [seconds(row[k]) if ok else "–" for k in ("pinned_s", "median_s")]
        verdict = row["verdict"] if ok else f"{row['status']}: {row['reason']}"
        lines.append([row["name"], where, *times, f"{row['gain']:.3f}×" if ok else "–", verdict])
    return markdown(["candidate", "of", "pinned", "candidate", "gain", "verdict"], lines)
