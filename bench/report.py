"""Markdown of result files, and what stands between the bench markers of README.md and docs/*.md."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

_MARKED = re.compile(r"(<!-- bench:(?P<name>\S+) -->\n)(?P<body>.*?)(<!-- /bench:(?P=name) -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- /?bench:\S+ -->")
# Which module made a result of this kind: it has ``tables(result)`` and perhaps ``schema_problem(result)``.
_MODULES = {"cpu": "kernels", "gpu": "kernels"} | {
    name: name for name in ("flops", "host", "inference", "memory", "model", "scaling", "simulate", "static")
}


class ReportError(ValueError):
    """A result or document that cannot be used; the message is for the user."""


# --------------------------------------------------------------------------------------------- results


def write(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never a part."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def stem(name: str) -> str:
    """The name of a result's file: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "")).strip("-")


def finite(value: object) -> object:
    """``value`` with ``None`` for what JSON cannot say: infinities and NaN, as a failed check may have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dump(path: Path, result: dict) -> None:
    """Write a result file, whole or not at all."""
    write(path, json.dumps(finite(result), indent=1, sort_keys=True, allow_nan=False) + "\n")


def load(path: Path) -> dict:
    """A result file, checked for the shape that docs/benchmarking.md promises."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ReportError(f"{path}: not JSON: {error}") from None
    problem = _problem(result)
    if problem:
        raise ReportError(f"{path}: not a result of this benchmark: {problem}")
    return result


def _problem(result: object) -> str | None:
    if not isinstance(result, dict) or result.get("schema") != 1:
        return "'schema' is not 1"
    if result.get("kind") not in _MODULES:
        return f"'kind' is {result.get('kind')!r}; expected one of {', '.join(_MODULES)}"
    if not isinstance(result.get("measurement", True), bool):
        return "'measurement' is neither true nor false"
    if not isinstance(result.get("environment"), dict) or "commit" not in result["environment"]:
        return "'environment' is missing or does not say which commit was measured"
    check = getattr(_module(result), "schema_problem", None)
    return check(result) if check else None


def _module(result: dict) -> object:
    return importlib.import_module(f"bench.{_MODULES[result['kind']]}")


def tables(result: dict) -> dict[str, str]:
    """Every table of a result by name, ``environment`` (a sentence) first."""
    try:
        return {"environment": environment(result), **_module(result).tables(result)}
    except (LookupError, TypeError) as error:
        raise ReportError(f"a result of kind {result['kind']!r} lacks {error}") from None


def document(result: dict, title: str) -> str:
    """The whole result as Markdown."""
    parts = [f"## {title}"]
    if not result.get("measurement", True):
        parts.append("**Not a measurement**: a smoke run of the script on tiny shapes.")
    if not result.get("correct", True):
        parts.append("**Checks failed or none passed: the speeds of such an operator are refused.**")
    named = tables(result)
    parts.append(named.pop("environment"))
    for name, text in named.items():
        parts += [f"### {name}", text]
    reasons: dict[str, int] = {}
    for rows in result.values():
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict) and row.get("reason"):
                where = f"{row['status']}: {row['reason']}" if row.get("status") else row["reason"]
                reasons[where] = reasons.get(where, 0) + 1
    if reasons:
        parts.append("### not as planned")
        parts.append("\n".join(f"- {count} rows {reason}" for reason, count in reasons.items()))
    return "\n\n".join(parts) + "\n"


def sound(result: dict) -> bool:
    """Whether every check passed and nothing of ours failed. A peer may fail."""
    check = getattr(_module(result), "sound", None)
    return check(result) if check else result.get("correct", True)


def verdict(result: dict) -> str:
    """The last line of a run."""
    rows = [row for rows in result.values() if isinstance(rows, list) for row in rows]
    count = Counter(row.get("status") for row in rows if isinstance(row, dict))
    words = {"ok": "ok", "failed": "failed", "invalid": "refused", "skipped": "skipped"}
    elapsed = f"; {result['elapsed_s']} s" if "elapsed_s" in result else ""
    return ", ".join(f"{count[s]} rows {word}" for s, word in words.items() if count[s]) + elapsed


# ---------------------------------------------------------------------------------------------- tables


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1 or unit == "µs":
            return f"{value * scale:.3g} {unit}" if value * scale < 1000 else f"{value * scale:.0f} {unit}"
    raise AssertionError


def size(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def machine(result: dict) -> str:
    """Device, driver, versions and commit of a result: what every number of it was measured with."""
    e = result["environment"]
    parts = [
        e.get("gpu") or f"{e.get('cpu')}, {e.get('threads')} threads",
        f"driver {e['driver']}" if e.get("driver") else None,
        f"torch {e.get('torch')}",
        f"Triton {e['triton']}" if e.get("triton") else None,
        f"commit {e['commit'][:12] if e.get('commit') else 'unknown'}{_DIRTY[e.get('dirty')]}",
        str(e.get("date", ""))[:10],
    ]
    return ", ".join(p for p in parts if p)


_DIRTY = {True: " with local changes", False: "", None: ", changes unknown"}


def environment(result: dict) -> str:
    """:func:`machine`, and what else a reader may ask: load, digest, Python, measured ceilings."""
    e = result["environment"]
    line = f"{machine(result)}, Python {e.get('python')}"
    if e.get("kernels_sha256"):
        line += f", kernels {e['kernels_sha256'][:12]}"
    if not e.get("gpu") and e.get("load_average") is not None:
        line += f", load average {e['load_average']:.1f} before"
    rates = [_rate(row) for row in result.get("ceilings", ()) if "per_s" in row]
    return line + "." + (f" Measured ceilings: {', '.join(rates)}." if rates else "")


def _rate(row: dict) -> str:
    units = {"copy_bytes_per_s": "B/s copied", "exp2_per_s": "exponentials/s"}
    dtype = row["name"].removeprefix("matmul_").removesuffix("_flop_per_s")
    prefix, scale = ("T", 1e12) if row["per_s"] >= 1e12 else ("G", 1e9)
    return f"{row['per_s'] / scale:.3g} {prefix}{units.get(row['name'], f'FLOP/s {dtype} product')}"


# ------------------------------------------------------------------------------------------- documents


# What documents say of results that a machine could not give yet, by the beginning of the file's name.
_ABSENT = {
    "nvidia-": "Not measured: no GPU was available.",
    **dict.fromkeys(("scaling-", "memory-", "model-quick-", "host-", "static"), "Not measured yet."),
    "simulate-": "Not simulated yet.",
}


def _body(name: str, results: Path, figures_folder: str) -> str:
    stem, _, table = name.partition("/")
    if stem == "targets":
        from bench import targets

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
        from bench import figures

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
    from bench import figures

    folder = root / "docs" / "figures"
    wanted = figures.wanted(results)
    drawn = figures.stale(wanted, folder)
    stale += [f"{(folder / name).relative_to(root)}" for name in drawn]
    if not check:
        figures.draw(wanted, drawn, folder)
        for path, text in made.items():
            write(path, text)
    return stale
