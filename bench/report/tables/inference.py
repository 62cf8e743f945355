"""Tables of ``bench inference``."""

from __future__ import annotations

from bench.measure.text import markdown, seconds, size

METHODS = ("fused", "plain")


def tables(result: dict) -> dict[str, str]:
    """Markdown: ``protocols`` and ``memory``."""
    lines = [
        [
            f"{row['protocol']}, {row['passes']} passes",
            str(row["images"]),
            *(f"{100 * row[f'{kind}_miou']:.2f}" for kind in METHODS),
            f"{100 * row['agreement']:.3f} %",
            *(seconds(row[f"{kind}_s"]) for kind in (*METHODS, "network")),
        ]
        for row in result["protocols"]
    ]
    header = ["protocol", "images", "mIoU, fused", "mIoU, plain", "same labels"]
    header += ["label map, fused", "label map, plain", "network"]
    memory = [
        [
            f"{row['classes']} classes, {row['passes']} passes",
            *(size(row[f"{k}_extra_bytes"]) for k in METHODS),
        ]
        for row in result["memory"]
    ]
    return {
        "protocols": markdown(header, lines),
        "memory": markdown(["320×320 image", "fused", "plain"], memory),
    }
