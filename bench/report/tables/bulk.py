"""Tables of ``bench bulk``."""

from __future__ import annotations

from bench.measure.text import markdown

_LEAST = 0.999
_PLAIN = "plain loop"


def sound(result: dict) -> bool:
    """Whether the plain loop and ``segvit predict`` give the same labels, but for ties."""
    return all(row["equal"] >= _LEAST for row in result["rows"])


def tables(result: dict) -> dict[str, str]:
    """Markdown: ``rates``, a line for each way, a column for each size."""
    rows = result["rows"]
    sides = list(dict.fromkeys(row["side"] for row in rows))
    found = {(row["side"], row["way"]): row for row in rows}

    def cell(side: int, way: str) -> str:
        row = found[side, way]
        text = f"{row['rate']:.0f} ±{row['spread']:.0%}".replace("%", " %")
        against = row["rate"] / found[side, _PLAIN]["rate"]
        return f"{text} ({against:.2f}×)" if way.startswith("segvit") else text

    lines = [[way, *(cell(side, way) for side in sides)] for way in dict.fromkeys(row["way"] for row in rows)]
    return {"rates": markdown(["pictures a second", *(f"{side}×{side}" for side in sides)], lines)}
