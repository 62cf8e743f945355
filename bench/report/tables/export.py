"""Tables of ``bench export``."""

from __future__ import annotations

from bench.measure.text import markdown, seconds, size


def sound(result: dict) -> bool:
    """Whether no file failed or gave other labels. A way to write the tail may be refused by a runtime."""
    return not any(
        row["status"] == "invalid" or (row["status"] == "failed" and row["table"] != "tail")
        for row in result["rows"]
    )


def tables(result: dict) -> dict[str, str]:
    """Markdown: ``labels``, ``tail`` and ``int8``, where they were measured."""
    by = {name: [r for r in result["rows"] if r["table"] == name] for name in _TABLES}
    return {name: _TABLES[name](rows) for name, rows in by.items() if rows}


def _labels(rows: list[dict]) -> str:
    """A line for each model: the share of equal labels, and seconds of a call, by kind of file."""
    files = list(dict.fromkeys(row["file"] for row in rows))
    found = {(row["model"], row["file"]): _cell(row) for row in rows}
    names = dict.fromkeys(row["model"] for row in rows)
    return markdown(
        ["model", *files], [[name, *(found.get((name, f), "–") for f in files)] for name in names]
    )


def _cell(row: dict) -> str:
    if "agreement" not in row:
        return "–" if row["reason"].startswith("views") else f"{row['status']}: {row['reason']}"
    ties = f" ({row['differ']} ties)" if row["differ"] and row["status"] == "ok" else ""
    wrong = "**wrong** " if row["status"] != "ok" else ""
    return f"{wrong}{100 * row['agreement']:.3f} %{ties}, {seconds(row['call_s'])}"


def _tail(rows: list[dict]) -> str:
    runtimes = list(dict.fromkeys(row["runtime"] for row in rows))
    lines: dict[str, list[str]] = {}
    for row in rows:
        mark = "**" if row["chosen"] else ""
        line = lines.setdefault(row["tail"], [f"{mark}{row['tail']}{mark}"])
        if row["status"] != "ok":
            line.append(row["status"])
            continue
        held = "–" if row["extra_bytes"] is None else size(row["extra_bytes"])
        line.append(f"{mark}{seconds(row['min_s'])}, {held}{mark}")
    return markdown(["tail", *(f"{name}: time, memory" for name in runtimes)], list(lines.values()))


def _int8(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        line = [row["file"]]
        if row["status"] == "ok":
            line += [f"{100 * row['miou']:.2f}", f"{100 * row['agreement']:.2f} %", str(row["images"])]
        else:
            line += [f"{row['status']}: {row['reason']}", "–", "–"]
        lines.append([*line, size(row["file_bytes"]) if "file_bytes" in row else "–"])
    return markdown(["", "mIoU", "labels as the checkpoint's", "pictures", "file"], lines)


_TABLES = {"labels": _labels, "tail": _tail, "int8": _int8}
