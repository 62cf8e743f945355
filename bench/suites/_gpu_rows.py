"""Rows of ``bench gpu`` on their way: a file of lines that any number of processes append to."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.measure import results as files

ROWS, LOG = "rows.jsonl", "log.txt"


class Rows:
    """The file of rows: lines appended whole, by any number of processes."""

    def __init__(self, folder: Path, section: str) -> None:
        self.section = section
        self._file = os.open(folder / ROWS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(self._file, b"\n")  # ends a line that a killed process left

    def write(self, **row: Any) -> None:
        os.write(self._file, (json.dumps(files.finite({"section": self.section, **row})) + "\n").encode())

    def close(self) -> None:
        os.close(self._file)


def read(folder: Path) -> list[dict]:
    """All lines of the file of rows that are whole."""
    found = []
    path = folder / ROWS
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and "section" in line]


_IDENTITY = (
    *("table", "operator", "kind", "case", "shape", "batch", "dtype", "mode"),
    *("peer", "method", "quantity", "name", "model", "way", "tool"),
)


def latest(lines: Iterable[dict]) -> list[dict]:
    """The rows among ``lines``; of rows about the same thing the last one."""
    kept = {tuple(row.get(k) for k in _IDENTITY): row for row in lines if "table" in row}
    return [{k: v for k, v in row.items() if k != "section"} for row in kept.values()]
