"""What a measurement says: tables for a reader, and what to switch on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["advice", "report"]

_MATTERS = 1.05  # a way must be faster by this factor to be advised


def advice(result: dict[str, Any]) -> list[str]:
    """What to switch on, each with the number measured in this run or the reason; and what gains nothing.

    Args:
        result: what `measure` collects.
    """
    plain, main, *others = result["ways"]
    found = [
        f"the operators ran as plain PyTorch, backend {name} is missing: {reason}"
        for name, reason in result["missing"].items()
    ]
    found.append(f"model.compile_for_inference(size, batch): {_verdict(plain, main)} over predict")
    for row in others:
        what = row["option"]
        if what == "shrunk":
            what = "segvit train --shrunk, which makes another model"
        found.append(f"{what}: {_verdict(main, row)}")
    if result["engine"]["method"] != "compile":
        found.append("--method compile (torch.compile): not measured, it builds for minutes")
    return found


def _verdict(usual: dict[str, Any], other: dict[str, Any]) -> str:
    """How much faster the other way is; a gain only where it is clear of the spread of both."""
    gain = usual["p50_s"] / other["p50_s"]
    numbers = f"({_seconds(other['p50_s'])} against {_seconds(usual['p50_s'])})"
    if other["same_labels"] is not None and other["same_labels"] < 0.995:
        numbers += f", but {100 * other['same_labels']:.1f} % of the labels are predict's"
    if gain >= _MATTERS and other["p75_s"] < usual["p25_s"]:
        return f"{gain:.2f}x {numbers}"
    return f"no gain {numbers}"


def report(result: dict[str, Any]) -> str:
    """The result for a reader."""
    model, images, machine = result["model"], result["images"], result["environment"]
    weights, commit = "" if model["trained"] else ", random weights", machine["commit"]
    lines = [
        "",
        f"{model['name']}{' (Shrunk)' if model['shrunk'] else ''}{weights}: "
        f"{model['parameters'] / 1e6:.1f} M parameters, {model['classes']} classes; "
        f"{images['batch']} x {images['height']} x {images['width']} pixels, {images['source']}",
        f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} CPU threads, "
        f"torch {machine['torch']}, segvit-kernels {machine['segvit_kernels']}"
        + (f" at {commit}" if commit else ""),
        "",
    ]
    rows: list[tuple[str, ...]] = [
        ("image to labels", "images/s", "p50", "p95", "calls", "labels as predict")
    ]
    for row in result["ways"]:
        same = "" if row["same_labels"] is None else f"{100 * row['same_labels']:.2f} %"
        times = _seconds(row["p50_s"]), _seconds(row["p95_s"])
        rows.append((row["way"], f"{row['images_per_s']:.2f}", *times, str(row["calls"]), same))
    lines += _table(rows)
    if not model["trained"]:
        lines.append("(random weights: labels are near ties, and the tail is slower than a trained model's)")
    spent = result["breakdown"]
    how = "" if result["engine"]["method"] == "eager" else ", run eagerly"
    rows = [(f"where the time goes (engine{how})", "time", "share")]
    parts = {**spent["parts"], "remainder (marks, spread)": spent["remainder_s"], "total": spent["total_s"]}
    for name, value in parts.items():
        rows.append((name, _seconds(value), f"{100 * value / spent['total_s']:.1f} %"))
    lines += ["", *_table(rows), ""]
    memory = result["memory"]
    if memory["peak_bytes"] is not None:
        before = memory["before_bytes"]
        known = "in the process's life" if before is None else f"{before / 1e6:.0f} MB before the call"
        lines.append(f"peak memory, {memory['kind']}: {memory['peak_bytes'] / 1e6:.0f} MB ({known})")
    taken = [f"{name} {' and '.join(found)}" for name, found in result["operators"].items()]
    lines += [f"operators: {', '.join(taken) or 'none ran'}", "", "what to switch on"]
    return "\n".join([*lines, *(f"- {line}" for line in result["advice"])])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _seconds(value: float) -> str:
    """Three digits with a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if abs(value) * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"
