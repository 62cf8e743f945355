"""What stands between the bench markers of README.md and docs/*.md."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bench.measure.results import write
from bench.report import figures, targets
from bench.report.results import ReportError, load, machine, tables

_MARKED = re.compile(r"(<!-- bench:(?P<name>\S+) -->\n)(?P<body>.*?)(<!-- /bench:(?P=name) -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- /?bench:\S+ -->")

# What documents say of results that a machine could not give yet, by the beginning of the file's name.
_ABSENT = {
    "nvidia-": "Not measured: no GPU was available.",
    **dict.fromkeys(
        ("scaling-", "memory-", "model-quick-", "host-", "step-", "matching-", "static", "export-"),
        "Not measured yet.",
    ),
    "simulate-": "Not simulated yet.",
}


def _body(name: str, results: Path, figures_folder: str) -> str:
    stem, _, table = name.partition("/")
    if stem == "targets":
        return targets.table(results) + "\n"
    path = results / f"{stem}.json"
    if "*" in stem and (fitting := list(results.glob(path.name))):
        path = max(fitting, key=lambda p: load(p)["environment"].get("date", ""))
    if not path.exists():
        for beginning, text in _ABSENT.items():
            if stem.startswith(beginning):
                return text + "\n"
    result = load(path)
    if not result.get("measurement", True):
        raise ReportError(f"{path}: not a measurement, and so not for a document")
    if table.startswith("figure-"):
        return figures.link(table.removeprefix("figure-"), stem, figures_folder) + "\n"
    named = tables(result)
    if table not in named:
        raise ReportError(f"marker bench:{name}: no table {table!r}; expected one of {', '.join(named)}")
    caption = "" if table == "environment" else f"\n\n<sub>{machine(result)}</sub>"
    return named[table] + caption + "\n"


def regenerate(text: str, results: Path, figures_folder: str = "figures") -> tuple[str, list[str]]:
    """``text`` with everything between ``<!-- bench:STEM/TABLE -->`` and its closing marker made anew from
    ``results/STEM.json``, and the names of the markers whose text changed."""
    paired = sum(2 for _ in _MARKED.finditer(text))
    if paired != len(_MARKER.findall(text)):
        raise ReportError(
            "a bench marker has no partner: expected '<!-- bench:NAME -->' line, '<!-- /bench:NAME -->'"
        )
    changed = []

    def make(match: re.Match) -> str:
        body = _body(match["name"], results, figures_folder)
        if body != match["body"]:
            changed.append(match["name"])
        return match[1] + body + match[4]

    return _MARKED.sub(make, text), changed


def update(root: Path, check: bool) -> list[str]:
    """Regenerate tables and figures below ``root`` from its ``bench/results``; names what was stale.

    With ``check`` nothing is written.
    """
    results, stale, made = root / "bench" / "results", [], {}
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        try:
            figures_folder = os.path.relpath(root / "docs" / "figures", path.parent)
            new, changed = regenerate(text, results, figures_folder)
        except ReportError as error:
            raise ReportError(f"{path}: {error}") from None
        stale += [f"{path.relative_to(root)}: {name}" for name in changed]
        if changed:
            made[path] = new
    folder = root / "docs" / "figures"
    wanted = figures.wanted(results)
    drawn = figures.stale(wanted, folder)
    stale += [f"{(folder / name).relative_to(root)}" for name in drawn]
    if not check:
        figures.draw(wanted, drawn, folder)
        for path, text in made.items():
            write(path, text)
    return stale
