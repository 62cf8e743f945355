"""Tables of ``bench memory``."""

from __future__ import annotations

from bench.measure.text import markdown, size

MODES = ("inference", "training")


def sound(result: dict) -> bool:
    """Whether every peak of ours was measured, where this system can."""
    return not any(row["name"] == "fused" and row["status"] == "failed" for row in result["rows"])


def tables(result: dict) -> dict[str, str]:
    """Markdown: ``models``, one line for each model."""
    cells: dict[tuple, dict[tuple, dict]] = {}
    for row in result["rows"]:
        key = (row["model"], row["batch"], row["dtype"])
        cells.setdefault(key, {})[row["mode"], row["name"]] = row
    lines = []
    for (model, batch, dtype), found in cells.items():
        line = [f"{model}, batch {batch}, {dtype}"]
        for mode in MODES:
            pair = [found.get((mode, name), {"status": "–"}) for name in ("published", "fused")]
            measured = all(row["status"] == "ok" for row in pair)
            line += [size(row["extra_bytes"]) if row["status"] == "ok" else row["status"] for row in pair]
            line.append(f"{100 * pair[1]['extra_bytes'] / pair[0]['extra_bytes']:.0f} %" if measured else "–")
        lines.append(line)
    header = ["model"]
    for mode in ("inference", "training step"):
        header += [f"{mode}, published formula", "fused", "share"]
    return {"models": markdown(header, lines)}
