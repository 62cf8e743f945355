"""Tables of ``bench decoders``."""

from __future__ import annotations

from bench.measure.text import markdown


def tables(result: dict) -> dict[str, str]:
    """Markdown: ``front``, a line for each backbone, patch and decoder; ``beside``, EoMT and transformers."""
    lines = []
    for row in result["rows"]:
        lines.append(
            [
                f"`{row['preset']}`, patch {row['patch']}",
                f"`{row['decoder']}`",
                f"{1e3 * row['median_s']:.0f} ms",
                f"{1 / row['median_s']:.1f}",
                f"{row['macs'] / 1e9:.1f}",
                f"{row['parameters'] / 1e6:.1f} M",
                _memory(row),
            ]
        )
    header = ["backbone", "decoder", "time", "images/s", "GMACs", "parameters", "memory beyond the model"]
    return {"front": markdown(header, lines), "beside": _beside(result)}


def _memory(found: dict) -> str:
    extra = found["extra_bytes"]
    return "" if extra is None else f"{extra / 1e6:.0f} MB"


def _beside(result: dict) -> str:
    rows = result.get("beside", ())
    if not rows:
        return "Without transformers."
    lines = []
    for row in rows:
        theirs, ours = (row["peers"][whose] for whose in ("transformers", "this package"))
        cells = [f"`{row['preset']}`, patch {row['patch']}"]
        for found in (theirs, ours):
            cells += [f"{1e3 * found['median_s']:.0f} ms", _memory(found)]
        cells.append(f"{theirs['median_s'] / ours['median_s']:.2f}x")
        cells += [
            f"{row['logits_error']:.0e}" if row["logits_error"] else "0",
            f"{100 * row['labels_equal']:.3f} %",
        ]
        lines.append(cells)
    version = result["environment"].get("transformers")
    header = ["EoMT", f"transformers {version}", "memory", "this package", "memory", "faster"]
    return markdown([*header, "error of logits", "labels equal"], lines)
