"""Figures of docs/figures, drawn by matplotlib from result files.

One file serves light and dark pages: nothing is painted behind the drawing, and every colour is about as far
from white as from black. A figure carries a digest of the data that it shows and of this file; with others it
is stale. The same data give the same bytes with the same matplotlib.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.measure.results import write
from bench.report.results import ReportError, load, machine
from bench.subjects import operators
from bench.subjects.operators import comparison

TEXT = "#757b84"
COLOURS = {
    "fused": "#2f80d0",
    "eager": "#8a6fd1",
    "plain": "#d1762a",
    "compiled": "#2f9a6a",
    "sdpa": "#c2599a",
    "floor": TEXT,
}
DECODERS = {"linear": "#d1762a", "atm": "#2f80d0", "segvitv2": "#2f9a6a", "eomt": "#8a6fd1"}
NAMES = {"fused": "ours", "eager": "ours, eager", "compiled": "torch.compile", "sdpa": "SDPA"}
PANELS = (
    ("atm", "classes"),
    ("atm", "tokens"),
    ("query_attention", "tokens"),
    ("semantic_argmax", "classes"),
    ("semantic_argmax", "image side"),
    ("semantic_argmax", "views"),
    ("mask_loss", "classes"),
    ("mask_loss", "image side"),
    ("subsample_norm", "tokens"),
)
_MARK = re.compile(r"bench:data ([0-9a-f]{64})")


# ------------------------------------------------------------------------------------------------ data


def _kind(peer: str) -> str | None:
    """The bar that a peer counts for; ``None`` for variants of our own."""
    if peer.startswith(("sdpa", "flex", "xformers")):
        return "sdpa"
    return "compiled" if peer.startswith("compiled") else peer if peer in COLOURS else None


def speedups(result: dict) -> dict[str, Any] | None:
    """By operator and mode at its main shape: time of each kind of peer over ours."""
    bars = {}
    for op in operators.by_name().values():
        for mode in op.modes:
            group = comparison.summary_group(result, op, mode)
            peers = {r["peer"]: None for r in result["timings"] if r["operator"] == op.name and "peer" in r}
            if "fused" not in comparison.measured(result, "timings", op.name, group):
                continue
            kinds: dict[str, list[str]] = {}
            for peer in peers:
                if (kind := _kind(peer)) not in (None, "fused", "eager"):
                    kinds.setdefault(kind, []).append(peer)
            found = {
                k: comparison.fastest(result, op.name, group, names) for k, names in sorted(kinds.items())
            }
            bars[f"{op.name}, {_short(mode)}"] = {k: round(f[1], 4) for k, f in found.items() if f}
    return {"bars": bars} if bars else None


def extra_memory(result: dict) -> dict[str, Any] | None:
    """By operator at its main shape, with the backward where there is one: MB beyond the inputs."""
    bars = {}
    for op in operators.by_name().values():
        mode = op.modes[-1]
        rows = comparison.measured(result, "memory", op.name, comparison.summary_group(result, op, mode))
        found: dict[str, float] = {}
        for peer, row in rows.items():
            if (kind := _kind(peer)) is not None:
                found[kind] = min(found.get(kind, math.inf), round(row["extra_bytes"] / 1e6, 4))
        if "fused" in found and len(found) > 1:
            bars[f"{op.name}, {_short(mode)}"] = dict(sorted(found.items()))
    return {"bars": bars} if bars else None


def curves(result: dict) -> dict[str, Any] | None:
    """By operator and axis, in its last mode: milliseconds of every peer and the floor at every value."""
    panels = {}
    for operator, axis in PANELS:
        mode = operators.by_name()[operator].modes[-1]
        rows = [r for r in result["rows"] if (r["operator"], r["axis"], r["mode"]) == (operator, axis, mode)]
        lines: dict[str, list] = {}
        for row in rows:
            if row["status"] == "ok":
                lines.setdefault(row["peer"], []).append([row["value"], round(1e3 * row["median_s"], 5)])
        if "fused" not in lines:
            continue
        least = {r["value"]: round(1e3 * r["floor_s"], 6) for r in rows if r.get("floor_s")}
        lines["floor"] = [[value, floor] for value, floor in sorted(least.items())]
        panels[f"{operator}, {_short(mode)}|{axis}"] = dict(sorted(lines.items()))
    return {"panels": panels} if panels else None


def front(result: dict) -> dict[str, Any] | None:
    """By backbone and decoder: milliseconds, GMACs and patch size of every row."""
    panels: dict[str, dict[str, list]] = {}
    for row in result["rows"]:
        point = [round(1e3 * row["median_s"], 3), round(row["macs"] / 1e9, 3), row["patch"]]
        panels.setdefault(row["preset"], {}).setdefault(row["decoder"], []).append(point)
    return {"panels": panels} if panels else None


def learned(result: dict) -> dict[str, Any] | None:
    """By model: pictures a second, and mIoU in per cent: mean, least, greatest."""
    points = {}
    for row in result["rows"]:
        found = [100 * score["miou"] for score in row["scores"]]
        mean = sum(found) / len(found)
        values = (1 / row["cost"]["median_s"], mean, min(found), max(found))
        points[row["name"]] = {"decoder": row["cost"]["decoder"], "at": [round(v, 2) for v in values]}
    return {"points": points} if points else None


def _short(mode: str) -> str:
    return {"forward_backward": "fwd + bwd"}.get(mode, mode)


# ---------------------------------------------------------------------------------------------- drawing


def _bars(label: str, origin: float | None, figure: Any, data: dict) -> None:
    """Horizontal bars on a logarithmic axis, a group for every name; from ``origin`` if there is one."""
    axes = figure.subplots()
    kinds = [k for k in COLOURS if any(k in found for found in data["bars"].values())]
    height = 0.8 / len(kinds)
    for row, found in enumerate(data["bars"].values()):
        present = [k for k in kinds if k in found]
        for index, kind in enumerate(present):
            y = row + (index - (len(present) - 1) / 2) * height
            axes.barh(y, found[kind] - (origin or 0), 0.9 * height, left=origin or 0, color=COLOURS[kind])
            axes.annotate(
                f" {found[kind]:.3g}", (found[kind], y), va="center", fontsize=7, color=TEXT, clip_on=False
            )
    axes.set_yticks(range(len(data["bars"])), list(data["bars"]))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.12)
    if origin is not None:
        axes.axvline(origin, color=TEXT, linewidth=1)
    _legend(figure, kinds, bars=True)


def _curves(figure: Any, data: dict) -> None:
    """One panel an axis, logarithmic both ways; the floor dashed."""
    from matplotlib.ticker import LogLocator, NullLocator

    panels = data["panels"]
    rows = -(-len(panels) // 3)
    grid = figure.subplots(rows, 3, squeeze=False)
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        operator, axis = title.split("|")
        for kind in (k for k in COLOURS if k in lines):
            values, times = zip(*lines[kind], strict=True)
            style = {"linestyle": "--"} if kind == "floor" else {"marker": "o", "markersize": 3}
            axes.plot(values, times, color=COLOURS[kind], linewidth=1.4, **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        shown = [value for value, _ in lines["fused"]]
        axes.set_xticks(shown, [str(v) for v in shown], fontsize=7, rotation=30)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.tick_params(axis="y", labelsize=7)
        axes.set_title(operator, fontsize=8)
        axes.set_xlabel(axis, fontsize=8)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("ms", fontsize=8)
    _legend(figure, [k for k in COLOURS if any(k in lines for lines in panels.values())], bars=False)


def _front(figure: Any, data: dict) -> None:
    """One panel a backbone: time over multiply-accumulates, a line a decoder, a point a patch size."""
    drawn = (line for lines in data["panels"].values() for line in lines.values())
    sizes = sorted({point[2] for line in drawn for point in line})
    shapes = dict(zip(sizes, itertools.cycle(("o●", "s■", "^▲", "D◆")), strict=False))
    key = ", ".join(f"{size} {shape[1]}" for size, shape in shapes.items())
    for axes, (preset, lines) in zip(
        figure.subplots(1, len(data["panels"]), squeeze=False)[0], data["panels"].items(), strict=True
    ):
        for decoder in (name for name in DECODERS if name in lines):
            times, macs, patches = zip(*sorted(lines[decoder], key=lambda point: point[2]), strict=True)
            axes.plot(macs, times, color=DECODERS[decoder], linewidth=1.0)
            for size, *place in zip(patches, macs, times, strict=True):
                axes.plot(*place, color=DECODERS[decoder], marker=shapes[size][0], markersize=4)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(lambda value, _: f"{value:g}")
        axes.tick_params(which="both", labelsize=7)
        axes.set_title(preset, fontsize=8)
        axes.set_xlabel(f"GMACs; patch {key}", fontsize=8)
        axes.set_ylabel("ms", fontsize=8)
    shown = [name for name in DECODERS if any(name in lines for lines in data["panels"].values())]
    _legend(figure, shown, bars=False, colours=DECODERS)


def _learned(figure: Any, data: dict) -> None:
    """mIoU over pictures a second, a point with its spread for each model; names below one another."""
    axes = figure.subplots()
    axes.set_xscale("log")
    points = sorted(data["points"].items(), key=lambda item: -item[1]["at"][1])
    for _, point in points:
        speed, mean, least, greatest = point["at"]
        bars = [[mean - least], [greatest - mean]]
        axes.errorbar(speed, mean, bars, color=DECODERS[point["decoder"]], marker="o", markersize=4)
    axes.margins(x=0.15)
    axes.autoscale_view()
    taken: list[tuple[float, float, float]] = []  # left, right and height of the names that are there
    for name, point in points:
        x, y = 72 / figure.dpi * axes.transData.transform(point["at"][:2])
        left, right, place = x + 12, x + 12 + 4 * len(name), y + 3
        for begin, end, height in taken:
            if left < end and begin < right:
                place = min(place, height - 9)
        taken.append((left, right, place))
        line = {"arrowstyle": "-", "color": TEXT, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3}
        offset = {"xytext": (12, place - y), "textcoords": "offset points", "arrowprops": line}
        axes.annotate(name, point["at"][:2], va="center", fontsize=7, color=TEXT, **offset)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("pictures of 512 × 512 a second")
    axes.set_ylabel("mIoU, %")


def _legend(figure: Any, kinds: list[str], bars: bool, colours: dict[str, str] = COLOURS) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def handle(kind: str) -> Any:
        name = NAMES.get(kind, kind)
        if bars:
            return Patch(color=colours[kind], label=name)
        return Line2D([], [], color=colours[kind], label=name, linestyle="--" if kind == "floor" else "-")

    figure.legend(
        handles=[handle(k) for k in kinds],
        loc="outside upper center",
        ncols=len(kinds),
        frameon=False,
        labelcolor=TEXT,
        fontsize=9,
    )


class _Figure(NamedTuple):
    """What a figure is called in words, which results it shows, and how it is drawn."""

    what: str
    source: str
    extract: Callable[[dict], dict[str, Any] | None]
    size: tuple[float, float]
    draw: Callable[[Any, dict], None]


_FIGURES = {
    "speedup": _Figure(
        "Time of peers over ours, by operator",
        "kernels",
        speedups,
        (8.0, 4.6),
        functools.partial(_bars, "times our time, log scale", 1.0),
    ),
    "memory": _Figure(
        "Peak memory of ours and of peers, by operator",
        "kernels",
        extra_memory,
        (8.0, 3.4),
        functools.partial(_bars, "MB beyond inputs, log scale", None),
    ),
    "curves": _Figure(
        "Time of every operator as sizes grow, with the floor", "scaling", curves, (9.0, 8.0), _curves
    ),
    "front": _Figure(
        "Time and operations of every decoder by backbone and patch size",
        "decoders",
        front,
        (8.0, 3.8),
        _front,
    ),
    "learned": _Figure(
        "mIoU after the same minutes of training over pictures a second",
        "learning",
        learned,
        (8.0, 4.2),
        _learned,
    ),
}


def _file(name: str, stem: str) -> str:
    return f"{name}-{stem.removeprefix('scaling-')}.svg"


def link(name: str, stem: str, folder: str) -> str:
    """Markdown of the figure called ``name`` of ``results/STEM.json``."""
    if name not in _FIGURES:
        raise ReportError(f"no figure {name!r}; expected one of {', '.join(_FIGURES)}")
    return f"![{_FIGURES[name].what}]({folder}/{_file(name, stem)})"


# ---------------------------------------------------------------------------------------------- files


def wanted(results: Path) -> dict[str, dict[str, Any]]:
    """File name -> ``figure``, ``data`` and ``machine`` of every figure that the result files can give."""
    found = {}
    for path in sorted(results.glob("*.json")):
        kind = _kind_of(path)
        for name, figure in _FIGURES.items():
            if figure.source != kind:
                continue
            result = load(path)
            if not result.get("measurement", True):
                raise ReportError(f"{path}: not a measurement, and so not for a figure")
            if data := figure.extract(result):
                found[_file(name, path.stem)] = {"figure": name, "data": data, "machine": machine(result)}
    return found


def _kind_of(path: Path) -> str | None:
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        raise ReportError(f"{path}: not a result of this benchmark") from None
    return {"cpu": "kernels", "gpu": "kernels"}.get(kind, kind)


def digest(entry: dict[str, Any]) -> str:
    """Of what a figure shows, and of how this file draws it."""
    shown = json.dumps(entry, sort_keys=True).encode()
    return hashlib.sha256(Path(__file__).read_bytes() + b"\0" + shown).hexdigest()


def stale(wanted: dict[str, dict[str, Any]], folder: Path) -> list[str]:
    """Names of figures that are missing, show other data, or that no result file gives any more."""
    there = {path.name: path for path in folder.glob("*.svg")} if folder.is_dir() else {}
    found = []
    for name, entry in wanted.items():
        mark = _MARK.search(there[name].read_text(encoding="utf-8")) if name in there else None
        if mark is None or mark[1] != digest(entry):
            found.append(name)
    return found + sorted(there.keys() - wanted.keys())


def draw(wanted: dict[str, dict[str, Any]], names: list[str], folder: Path) -> None:
    """Draw the figures called ``names``; remove those that are not wanted.

    Raises:
        ReportError: matplotlib is not installed.
    """
    for name in names:
        if name not in wanted:
            (folder / name).unlink()
        else:
            folder.mkdir(exist_ok=True)
            write(folder / name, svg(wanted[name]))


def svg(entry: dict[str, Any]) -> str:
    """One figure as the text of an SVG file."""
    try:
        import matplotlib
    except ImportError:
        raise ReportError("figures need matplotlib: pip install 'segvit-kernels[bench]'") from None
    import io

    from matplotlib.figure import Figure

    kind = _FIGURES[entry["figure"]]
    parameters = {
        "svg.hashsalt": "segvit",
        "svg.fonttype": "none",
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": TEXT,
        "axes.labelcolor": TEXT,
        "axes.titlecolor": TEXT,
        "text.color": TEXT,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
    }
    with matplotlib.rc_context(parameters):
        figure = Figure(figsize=kind.size, layout="constrained")
        kind.draw(figure, entry["data"])
        figure.supxlabel(entry["machine"], fontsize=7)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # A browser without this font takes another sans-serif one.
    drawn = text.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    head, tag, rest = drawn.partition("<svg ")
    lines = f"{head}<!-- bench:data {digest(entry)} -->\n{tag}{rest}".splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"
