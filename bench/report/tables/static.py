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


_CLASSES = {
    "tensor core": ("tensor core",),
    "special": ("special function",),
    "float": ("float",),
    "integer, moves": ("integer", "move", "conversion", "param memory"),
    "global": ("global memory",),
    "shared": ("shared memory",),
    "warp, waits": ("warp", "synchronisation", "control"),
}


def _executed_table(note: str, rows: list[dict]) -> str:
    header = ["kernel", "programs", "warps' instructions a program", *(f"{name}, %" for name in _CLASSES)]
    header += ["global, kB", "of sectors used, %", "bank conflicts, %"]
    lines = []
    for row in rows:
        name = f"`{row['kernel']}`, {row['arch']}, {row['operator']}"
        if row["status"] != "ok":
            lines.append([name, row["status"], *["–"] * (len(header) - 2)])
            continue
        classes, memory = row["instructions"], row["memory"]
        total = sum(classes.values())
        shares = [sum(classes.get(c, 0) for c in group) / total for group in _CLASSES.values()]
        moved = memory.get("global bytes read", 0) + memory.get("global bytes written", 0)
        sectors, passes = 32 * memory.get("global sectors", 0), memory.get("shared passes", 0)
        lines.append(
            [
                name,
                str(row["programs"]),
                f"{total / row['programs']:,.0f}",
                *(f"{100 * share:.1f}" for share in shares),
                f"{moved / 1000:,.0f}",
                f"{100 * moved / sectors:.0f}" if sectors else "–",
                f"{100 * memory.get('bank conflicts', 0) / passes:.0f}" if passes else "–",
            ]
        )
    return f"{note}\n\n{markdown(header, lines)}" if lines else "Nothing was executed."


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
    """Markdown: ``floors``, ``executed``, ``triton`` and ``cuda``, one line a kernel and architecture."""
    by_source = {s: [r for r in result["rows"] if r["source"] == s] for s in ("triton", "cuda")}
    found = {
        "floors": _floors_table(result["note"], result["floors"]),
        "executed": _executed_table(result["note"], result.get("executed", [])),
    }
    return found | {source: _kernels_table(result["note"], rows) for source, rows in by_source.items()}
