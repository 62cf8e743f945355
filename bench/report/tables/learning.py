"""Tables of ``bench learning``."""

from __future__ import annotations

import statistics

from bench.measure.text import markdown, size


def _spread(values: list[float]) -> str:
    """In per cent: the mean and, of several, the least and the greatest."""
    shown = f"{100 * statistics.fmean(values):.1f}"
    return f"{shown} ({100 * min(values):.1f} to {100 * max(values):.1f})" if len(values) > 1 else shown


def tables(result: dict) -> dict[str, str]:
    """Markdown: ``models``, one line each."""
    lines = []
    for row in result["rows"]:
        cost, scores = row["cost"], row["scores"]
        lines.append(
            [
                row["name"],
                _spread([score["miou"] for score in scores]),
                f"{scores[0]['steps']}",
                f"{row['step_s']:.2f} s",
                f"{1 / cost['median_s']:.2f}",
                f"{cost['macs'] / 1e9:.1f}",
                "–" if cost["extra_bytes"] is None else size(cost["extra_bytes"]),
            ]
        )
    header = ["model", "mIoU", "steps", "a step", "pictures/s", "GMACs", "memory"]
    trained = {
        score["commit"][:12] for row in result["rows"] for score in row["scores"] if score.get("commit")
    }
    trained -= {str(result["environment"]["commit"])[:12]}
    note = f"\n\nTrained at commit {', '.join(sorted(trained))}." if trained else ""
    return {"models": markdown(header, lines) + note}
