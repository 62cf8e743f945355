"""Tables of ``bench backbones``."""

from __future__ import annotations

from bench.measure.text import markdown

_MOST = 1e-5


def sound(result: dict) -> bool:
    """Whether all features are their library's."""
    return all(row["error"] <= _MOST for row in result["rows"])


def tables(result: dict) -> dict[str, str]:
    """Markdown: ``errors``, one line a preset."""
    lines = [
        [
            f"`{row['backbone']}`",
            f"`{row['model']}`, {row['library']}",
            "{}×{}".format(*row["size"]),
            f"{row['error']:.1e}",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['macs'] / 1e9:.1f} at {row['counted_at']}²",
        ]
        for row in result["rows"]
    ]
    header = ["preset", "against", "size", "largest error", "parameters", "GMACs"]
    return {"errors": markdown(header, lines)}
