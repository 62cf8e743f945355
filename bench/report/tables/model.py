"""Tables of ``bench model``."""

from __future__ import annotations

from bench.measure.text import markdown, seconds, size
from bench.subjects.published import BY_FORMULA, DECODER_GFLOPS, MODELS, QUICK, TINY

LOADS = {"busy": "all cores busy", "pools": "beside two thread pools"}
SECTIONS = ("ways", "libraries", "decoders", "steps", "engines", "exports")


def sound(result: dict) -> bool:
    """Whether nothing of ours failed and nothing at all was refused. A peer may fail."""
    return not any(
        row["status"] == "invalid" or (row["status"] == "failed" and own(row["way"]))
        for row in result["rows"]
    )


def own(way: str) -> bool:
    """Whether it is this project's code that runs."""
    ours = ("fused", "eager", "engine, ", "exported, ", "SegViT", "Shrunk SegViT")
    return way.startswith(ours) and not way.endswith(BY_FORMULA)


# ---------------------------------------------------------------------------------------------- tables


def _key(row: dict) -> tuple:
    return row["model"], row["batch"], row["dtype"]


def _not_measured(row: dict) -> str:
    return f"{row['status']}: {row['reason']}"


def _calls(rows: list[dict]) -> str:
    """Of how many calls the times of rows are medians."""
    counts = sorted({row["samples"] for row in rows if row.get("samples")})
    if len(counts) > 1:
        return f"medians of {counts[0]} to {counts[-1]} calls"
    return "one call" if counts == [1] else f"medians of {counts[0]} calls" if counts else "none"


def _models(rows: list[dict]) -> str:
    """Ways to run SegViT and models of libraries, speed against the published formula in float32."""
    published = {
        _key(row)[:2]: row["median_s"]
        for row in reversed(rows)
        if row["way"] == "published" and row["status"] == "ok" and row["dtype"] == "float32"
    }
    lines = []
    for row in rows:
        line = ["{}, batch {}, {}".format(*_key(row)), row["way"]]
        if row["status"] == "ok":
            base = published.get(_key(row)[:2])
            line += [seconds(row["median_s"]), f"{row['batch'] / row['median_s']:.2f}"]
            line.append(f"{base / row['median_s']:.2f}×" if base else "–")
        else:
            line += [_not_measured(row), "–", "–"]
        line.append(f"{100 * row['agreement']:.2f} %" if "agreement" in row else "–")
        line.append(f"{row['macs'] / 1e9:.1f}" if "macs" in row else "–")
        line.append(f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else "–")
        line.append(size(row["extra_bytes"]) if "extra_bytes" in row else "–")
        lines.append(line)
    header = ["model", "way", "image to labels", "images/s", "against published, float32"]
    header += ["labels as published, float32", "GMACs", "parameters", "memory"]
    return f"{markdown(header, lines)}\n\nTimes: {_calls(rows)}."


def _decoders(rows: list[dict]) -> str:
    """One line for each decoder: counts, inference, training step."""
    lines = []
    for name in dict.fromkeys(row["way"] for row in rows):
        found = {row["mode"]: row for row in rows if row["way"] == name}
        first = next(iter(found.values()))
        spec = next((m for m in (*MODELS, QUICK, TINY) if m.name == first["model"]), TINY)
        line = [
            name,
            f"{first['macs'] / 1e9:.1f}" if "macs" in first else "–",
            DECODER_GFLOPS.get((name.removesuffix(BY_FORMULA), spec.preset, spec.size), "–"),
            f"{first['parameters'] / 1e6:.1f} M" if "parameters" in first else "–",
        ]
        for mode in ("inference", "training"):
            row = found.get(mode, {"status": "–", "reason": ""})
            if row["status"] == "ok":
                line += [seconds(row["median_s"]), f"{row['batch'] / row['median_s']:.2f}"]
            else:
                line += [_not_measured(row) if row["reason"] else "–", "–"]
            line.append(size(row["extra_bytes"]) if "extra_bytes" in row else "–")
        lines.append(line)
    header = ["decoder", "GMACs", "paper", "parameters", "image to labels", "images/s", "memory"]
    header += ["training step", "images/s", "memory"]
    of = {mode: _calls([row for row in rows if row["mode"] == mode]) for mode in ("inference", "training")}
    return f"{markdown(header, lines)}\n\nTimes: {of['inference']}; of a training step {of['training']}."


def _steps(rows: list[dict]) -> str:
    """Ways of a training step, against the published formula in the same precision."""
    lines = []
    for row in rows:
        first = next(r for r in rows if _key(r) == _key(row))
        line = ["{}, batch {}, {}".format(*_key(row)), row["way"]]
        if row["status"] == "ok":
            line += [seconds(row["median_s"]), f"{row['batch'] / row['median_s']:.2f}"]
            line.append(f"{first['median_s'] / row['median_s']:.2f}×" if first["status"] == "ok" else "–")
        else:
            line += [_not_measured(row), "–", "–"]
        line.append(f"{row['loss']:.4f}" if "loss" in row else "–")
        lines.append([*line, size(row["extra_bytes"]) if "extra_bytes" in row else "–"])
    header = ["step", "way", "time", "images/s", "against published", "loss", "memory"]
    return f"{markdown(header, lines)}\n\nTimes: {_calls(rows)}."


def _engines(rows: list[dict]) -> str:
    """Ours and the engines of others, against the fastest of them at the same precision."""
    lines = []
    loads = [name for name in LOADS if any(f"{name}_median_s" in row for row in rows)]
    files = any("file_bytes" in row for row in rows)
    for row in rows:
        others = [
            r["median_s"] for r in rows if r["status"] == "ok" and _key(r) == _key(row) and not own(r["way"])
        ]
        line = ["{}, {}".format(row["model"], row["dtype"]), row["way"]]
        if row["status"] == "ok":
            line += [seconds(row[key]) for key in ("median_s", "min_s", "p99_s")]
            line.append(f"{min(others) / row['median_s']:.2f}×" if others else "–")
            line += [seconds(row[f"{name}_{key}"]) for name in loads for key in ("median_s", "p99_s")]
        else:
            line += [_not_measured(row), *"–––", *"––" * len(loads)]
        line.append(f"{100 * row['agreement']:.2f} %" if "agreement" in row else "–")
        line.append(size(row["held_bytes"]) if row.get("held_bytes") else "–")
        line += [size(row["file_bytes"]) if "file_bytes" in row else "–"] * files
        lines.append(line)
    # The 99th percentile, which of fewer calls is the largest.
    high = "99th percentile" if max((row.get("samples", 0) for row in rows), default=0) >= 100 else "largest"
    header = ["model", "engine", "median", "smallest", high, "against the best other"]
    header += [name for load in loads for name in (f"median, {LOADS[load]}", high)]
    header += ["labels as published, float32", "memory, weights included", *["file"] * files]
    return f"{markdown(header, lines)}\n\nTimes: {_calls(rows)}."


def _best_engines(rows: list[dict]) -> str:
    """By model and precision: our engine and the fastest of the others."""
    lines = []
    for row in rows:
        if not own(row["way"]):
            continue
        same = [r for r in rows if _key(r) == _key(row) and r["status"] == "ok" and not own(r["way"])]
        other = min(same, key=lambda r: r["median_s"], default=None)
        line = ["{}, {}".format(row["model"], row["dtype"])]
        line.append(seconds(row["median_s"]) if row["status"] == "ok" else _not_measured(row))
        line.append(f"{seconds(other['median_s'])} ({other['way']})" if other else "–")
        both = other and row["status"] == "ok"
        lines.append([*line, f"{other['median_s'] / row['median_s']:.2f}×" if both else "–"])
    if not lines:
        return "Nothing was measured."
    left = {r["way"]: _not_measured(r) for r in rows if r["status"] != "ok" and not own(r["way"])}
    notes = [f"Times: {_calls(rows)}.", *(f"*{way}*: {why}." for way, why in left.items())]
    header = ["model", "ours", "fastest other", "times as fast"]
    return f"{markdown(header, lines)}\n\n{' '.join(notes)}"


def tables(result: dict) -> dict[str, str]:
    """Markdown: ``models`` (ways and libraries), ``decoders``, ``steps``, ``engines`` and the best of these
    (``engines-best``), and ``exports``, where they were measured."""
    by = {name: [r for r in result["rows"] if r.get("table", "ways") == name] for name in SECTIONS}
    found = {"models": _models(by["ways"] + by["libraries"])} if by["ways"] + by["libraries"] else {}
    if by["decoders"]:
        found["decoders"] = _decoders(by["decoders"])
    if by["steps"]:
        found["steps"] = _steps(by["steps"])
    if by["engines"]:
        found["engines"] = _engines(by["engines"])
        found["engines-best"] = _best_engines(by["engines"])
    if by["exports"]:
        found["exports"] = _engines(by["exports"])
    return found
