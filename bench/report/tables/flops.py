"""Tables of ``bench flops``."""

from __future__ import annotations

from bench.measure.text import markdown


def tables(result: dict) -> dict[str, str]:
    """Markdown: ``models`` and ``decoders``, one line each."""
    lines = []
    for row in result["models"]:
        eager, fused = row["eager"], row["fused"]
        cells = [
            row["model"],
            f"{row['paper_gflops']}",
            f"{eager['fvcore'] / 1e9:.2f}",
            f"{fused['fvcore'] / 1e9:.2f}",
            f"{fused['torch'] / 1e9:.2f}",
            f"{row['parameters'] / 1e6:.1f} M",
        ]
        lines.append(cells)
    header = ["model", "paper, GFLOPs", "eager", "fused, fvcore", "fused, torch", "parameters"]
    found = {"models": markdown(header, lines)}
    if "decoders" in result:
        found["decoders"] = _decoders_table(result["decoders"])
    return found


def _decoders_table(rows: list[dict]) -> str:
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = []
    for name in dict.fromkeys(row["decoder"] for row in rows):
        line = [name]
        for model in models:
            row = next(r for r in rows if (r["model"], r["decoder"]) == (model, name))
            line += [
                row["paper_gflops"] or "–",
                f"{row['macs'] / 1e9:.2f}",
                f"{row['parameters'] / 1e6:.1f} M",
            ]
        lines.append(line)
    header = ["decoder"]
    for model in models:
        header += [f"{model}: paper, GFLOPs", "counted", "parameters"]
    return markdown(header, lines)
