"""Tables of ``bench instructions``."""

from __future__ import annotations

from bench.measure.text import markdown, seconds


def _cell(row: dict) -> str:
    if row["status"] != "ok":
        return row["status"]
    peer = min(row["peers_s"], key=row["peers_s"].__getitem__)
    spread = 50 * (row["p75_s"] - row["p25_s"]) / row["median_s"]
    ratio = row["peers_s"][peer] / row["median_s"]
    return f"{ratio:.2f}× ({peer}), {seconds(row['median_s'])} ±{spread:.0f} %"


def tables(result: dict) -> dict[str, str]:
    """Markdown: ``operators``, one line an operator and mode, one column an instruction set and number of
    threads: how many times as fast as the fastest peer, which that is, our time."""
    sets = list(dict.fromkeys((r["isa"], r["threads"]) for r in result["rows"]))
    lines = []
    for operator, mode in dict.fromkeys((r["operator"], r["mode"]) for r in result["rows"]):
        own = {
            (r["isa"], r["threads"]): _cell(r)
            for r in result["rows"]
            if (r["operator"], r["mode"]) == (operator, mode)
        }
        lines.append([f"`{operator}`, {mode.replace('_', ' + ')}", *(own.get(s, "–") for s in sets)])
    columns = [f"{isa}, {threads} thread{'s' * (threads > 1)}" for isa, threads in sets]
    return {"operators": markdown(["operator", *columns], lines)}
