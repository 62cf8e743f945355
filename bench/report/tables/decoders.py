"""Tables of ``bench decoders``."""

from __future__ import annotations

from bench.measure.text import markdown


def tables(result: dict) -> dict[str, str]:
    """Markdown: ``front``, one line a backbone, patch size and decoder."""
    lines = []
    for row in result["rows"]:
        extra = row["extra_bytes"]
        lines.append(
            [
                f"`{row['preset']}`, patch {row['patch']}",
                f"`{row['decoder']}`",
                f"{1e3 * row['median_s']:.0f} ms",
                f"{1 / row['median_s']:.1f}",
                f"{row['macs'] / 1e9:.1f}",
                f"{row['parameters'] / 1e6:.1f} M",
                "" if extra is None else f"{extra / 1e6:.0f} MB",
            ]
        )
    header = ["backbone", "decoder", "time", "images/s", "GMACs", "parameters", "memory beyond the model"]
    return {"front": markdown(header, lines)}
