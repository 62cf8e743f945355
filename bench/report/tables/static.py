"""Tables of ``bench static``."""

from __future__ import annotations

from bench.measure.text import markdown, seconds


def _kernels_table(note: str, rows: list[dict]) -> str:
    header = ["kernel", "registers", "shared, KB", "spills", "warps", "programs, occupancy"]
    header += ["HGMMA", "HMMA", "FFMA", "MUFU", "LDG + LDGSTS", "STG", "LDS + LDSM", "STS"]
    lines = []
    for row in rows:
        name = f"`{row['kernel']}`, {row.get('arch', '')}"
        if row["status"] != "ok":
            lines.append([name, row["status"], *["–"] * (len(header) - 2)])
            continue
        fit = f"{row['programs']}, {100 * row['occupancy']:.0f} %" if "programs" in row else "–"
        mix = [row["HGMMA"], row["HMMA"], row["FFMA"], row["MUFU"], row["LDG"] + row["LDGSTS"], row["STG"]]
        mix += [row["LDS"] + row["LDSM"], row["STS"]]
        cells = [row["registers"], f"{row['shared'] / 1000:.1f}", row["spills"], row["warps"], fit, *mix]
        lines.append([name, *map(str, cells)])
    return f"{note}\n\n{markdown(header, lines)}" if lines else "Nothing was compiled."


def _floors_table(note: str, rows: list[dict]) -> str:
    header = ["operator", "MB", "GFLOP of products", "M exponentials", "floor, H200", "bound by"]
    lines = [
        [
            f"`{r['operator']}`, {r['shape']}, batch {r['batch']}, {r['mode'].replace('_', ' + ')}",
            f"{r['bytes'] / 1e6:.1f}",
            f"{r['flops'] / 1e9:.1f}",
            f"{r['exponentials'] / 1e6:.1f}",
            seconds(r["floor_s"]),
            r["bound_by"],
        ]
        for r in rows
    ]
    return f"{note}\n\n{markdown(header, lines)}"


def tables(result: dict) -> dict[str, str]:
    """Markdown: ``floors``, ``triton`` and ``cuda``, one line a kernel and architecture."""
    by_source = {s: [r for r in result["rows"] if r["source"] == s] for s in ("triton", "cuda")}
    found = {"floors": _floors_table(result["note"], result["floors"])}
    return found | {source: _kernels_table(result["note"], rows) for source, rows in by_source.items()}
