"""Tables of ``bench step``."""

from __future__ import annotations

from bench.measure.text import markdown, seconds, size

LIMITS = {"loss_off": 1e-5, "gradients_off": 1e-3}
"""What the same points may differ by, in float32, where a model amplifies rounding."""


def sound(result: dict) -> bool:
    """Whether every form ran, and ours at the same points gave the same."""
    return all(
        row["status"] == "ok" and all(row.get(name, 0) <= limit for name, limit in LIMITS.items())
        for row in result["rows"]
    )


def tables(result: dict) -> dict[str, str]:
    """Markdown: ``forms``, a line for each subject and form."""
    lines = []
    for row in result["rows"]:
        off = [f"{row[name]:.0e}" if name in row else "–" for name in LIMITS]
        peak = "–" if row.get("extra_bytes") is None else size(row["extra_bytes"])
        what = f"{row['subject']}, {row['side']}², {row['targets']} targets"
        lines.append([what, row["form"], seconds(row["median_s"]), peak, f"{row['loss']:.6g}", *off])
    header = ["what", "form", "time", "peak memory", "loss", "loss off by", "gradients off by"]
    return {"forms": markdown(header, lines)}
