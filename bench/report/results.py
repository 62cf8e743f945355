"""Result files as they are read: checked, as Markdown, and what came of them in a word."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import ModuleType

from bench.report.tables import KINDS


class ReportError(ValueError):
    """A result or document that cannot be used; the message is for the user."""


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
    if result.get("kind") not in KINDS:
        return f"'kind' is {result.get('kind')!r}; expected one of {', '.join(KINDS)}"
    if not isinstance(result.get("measurement", True), bool):
        return "'measurement' is neither true nor false"
    if not isinstance(result.get("environment"), dict) or "commit" not in result["environment"]:
        return "'environment' is missing or does not say which commit was measured"
    check = getattr(_module(result), "schema_problem", None)
    return check(result) if check else None


def _module(result: dict) -> ModuleType:
    return KINDS[result["kind"]]


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


def device(result: dict) -> str:
    """The GPU, or the processor and its instruction set, in which machines of one name differ."""
    e = result["environment"]
    isa = f" ({e['instruction_set']})" if e.get("instruction_set") else ""
    return e.get("gpu") or f"{e.get('cpu')}{isa}"


def machine(result: dict) -> str:
    """Device, driver, versions and commit of a result: what every number of it was measured with."""
    e = result["environment"]
    parts = [
        device(result),
        None if e.get("gpu") else f"{e.get('threads')} threads",
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
