"""Building blocks of a self-contained HTML report: one file, no script, nothing loaded from elsewhere.

Every function returns a piece of HTML whose texts are escaped; pictures are embedded as data URIs, and charts
are inline SVG coloured by the page's style sheet, so that they follow a light or dark reader.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from segvit.system.extras import require

Image = require("PIL.Image", extra="train")

# Colours of a page, for light and dark readers.
THEME = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #16191d; --soft: #5c6570; --line: #dfe3e8; --grid: #e9ecf0;
  --edge: #868f9a; --accent: #2456c7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111418; --card: #1a1e24; --ink: #e8ebef; --soft: #9aa5b1; --line: #2c323a; --grid: #262b32;
    --edge: #6d7783; --accent: #7ea6ff;
  }
}
""".lstrip()

_RULES = """
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 { font-size: clamp(1.7rem, 4vw, 2.4rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 .6rem; }
h2 { font-size: 1.3rem; letter-spacing: -0.01em; margin: 3.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 0 0 .6rem; }
p { margin: 0 0 1rem; max-width: 46rem; }
.lead { font-size: 1.1rem; color: var(--soft); }
.soft, figcaption, .note { color: var(--soft); }
code, pre { font: .875em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem;
  overflow-x: auto;
}
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.1rem 1.25rem;
  margin: 1rem 0;
}
.tiles { display: grid; gap: .9rem; margin: 1.6rem 0; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(155px, 1fr)); }
.tile {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .9rem 1.05rem;
  display: flex; flex-direction: column;
}
.tile .label { font-size: .85rem; color: var(--soft); }
.tile .value { font-size: 1.5rem; font-weight: 650; letter-spacing: -0.02em; line-height: 1.3; }
.tile .value { white-space: nowrap; }
.tile .note { font-size: .8rem; line-height: 1.35; }
.columns { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)) }
.columns .card { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .42rem .6rem; white-space: nowrap; border-bottom: 1px solid var(--grid) }
th { color: var(--soft); font-weight: 550; border-bottom-color: var(--line); }
th:first-child, td:first-child, .words td { text-align: left; }
.words td { white-space: normal; }
.words td:first-child { color: var(--soft); white-space: nowrap; padding-right: 1.4rem; width: 1%; }
tr:last-child td { border-bottom: 0; }
tr.total td { font-weight: 650; border-top: 1px solid var(--line); }
td.bar { width: 45%; min-width: 120px; }
.bar div { border-radius: 4px; background: var(--grid); }
.bar span { display: block; height: .65rem; border-radius: 4px; background: var(--accent); min-width: 2px; }
.chip {
  display: inline-block; width: .85em; height: .85em; border-radius: 3px; vertical-align: -.06em;
  margin-right: .5em; box-shadow: 0 0 0 1px #00000030;
}
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .4rem 0 1rem; }
.legend { font-size: .88rem; color: var(--soft); }
.pictures { display: grid; gap: .6rem; min-width: 560px; }
.pictures .head { font-size: .88rem; font-weight: 600; line-height: 1.25; align-self: end; }
.pictures .head small { display: block; font-weight: 400; color: var(--soft); }
.pictures .row { grid-column: 1 / -1; font-size: .9rem; margin-top: .5rem; color: var(--soft); }
.pictures .row b { color: var(--ink); margin-right: .6em; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; border-radius: 6px; }
figcaption { font-size: .78rem; margin-top: .15rem; text-align: center; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--grid); }
svg .axis { stroke: var(--line); }
svg polyline { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
svg circle { fill: var(--accent); }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
footer { color: var(--soft); font-size: .85rem; }
@media print { body { background: none; } .card, .tile { break-inside: avoid; } }
""".strip()


def page(title: str, lead: str, body: Sequence[str], footer: str = "") -> str:
    """A whole document from pieces of HTML; title, lead and footer are plain text."""
    content = "\n".join(body)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{THEME}{_RULES}\n</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{content}\n'
        f"<footer>{escape(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def heading(text: str, explanation: str = "") -> str:
    """A section's heading and, below it, a paragraph."""
    return f"<h2>{escape(text)}</h2>" + (
        f'\n<p class="soft">{escape(explanation)}</p>' if explanation else ""
    )


class Tile(NamedTuple):
    """One number that matters."""

    label: str
    value: str
    note: str = ""


def tiles(items: Sequence[Tile]) -> str:
    """Numbers side by side, as many to a row as fit."""
    cells = (
        f'<div class="tile"><span class="label">{escape(item.label)}</span>'
        f'<span class="value">{escape(item.value)}</span><span class="note">{escape(item.note)}</span></div>'
        for item in items
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def card(content: str, title: str = "") -> str:
    """A framed box around pieces of HTML."""
    return f'<div class="card">{f"<h3>{escape(title)}</h3>" if title else ""}{content}</div>'


def columns(*pieces: str) -> str:
    """Pieces side by side where the window is wide enough."""
    return f'<div class="columns">{"".join(pieces)}</div>'


def preformatted(text: str) -> str:
    """Commands or program output, letter for letter."""
    return f"<pre>{escape(text)}</pre>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, total: bool = False) -> str:
    """Texts in rows; the first column is left-aligned. `total` sets the last row apart."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = []
    for number, row in enumerate(rows):
        mark = ' class="total"' if total and number == len(rows) - 1 else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
    body = "".join(lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, without a header."""
    lines = (f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="words"><tbody>{"".join(lines)}</tbody></table>'


def chip(color: Sequence[int]) -> str:
    """A small square of a class's colour."""
    red, green, blue = (int(value) for value in color)
    return f'<span class="chip" style="background:rgb({red},{green},{blue})"></span>'


def class_legend(names: Sequence[str], palette: np.ndarray) -> str:
    """Every class with its colour."""
    entries = (
        f"<span>{chip(color)}{escape(name)}</span>" for name, color in zip(names, palette, strict=True)
    )
    return f'<div class="legend">{"".join(entries)}</div>'


class Bar(NamedTuple):
    """A row of `bars`: value is 0…1, or NaN where there is none."""

    name: str
    color: Sequence[int]
    value: float
    note: str = ""


def bars(rows: Sequence[Bar], header: tuple[str, str, str]) -> str:
    """A table with a bar for each value; header names the first column, the value and the note."""
    name, value, note = map(escape, header)
    head = f"<tr><th>{name}</th><th>{value}</th><th></th><th>{note}</th></tr>"
    lines = []
    for row in rows:
        known = not math.isnan(row.value)
        text = f"{100 * row.value:.1f} %" if known else "–"
        width = 100 * row.value if known else 0
        lines.append(
            f"<tr><td>{chip(row.color)}{escape(row.name)}</td><td>{text}</td>"
            f'<td class="bar"><div><span style="width:{width:.1f}%"></span></div></td>'
            f"<td>{escape(row.note)}</td></tr>"
        )
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'


def picture(
    image: np.ndarray, description: str, caption: str = "", *, scale: int = 1, smooth: bool = True
) -> str:
    """A figure with an embedded JPEG of uint8 (H, W, 3), enlarged `scale` times."""
    pixels = Image.fromarray(image)
    method = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    pixels = pixels.resize((pixels.width * scale, pixels.height * scale), method)
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", quality=88, subsampling=0)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><img alt="{escape(description)}" width="{pixels.width}" height="{pixels.height}" '
        f'src="data:image/jpeg;base64,{data}">{below}</figure>'
    )


def picture_grid(titles: Sequence[tuple[str, str]], rows: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """Pictures in a grid.

    Args:
        titles: a title and a small note for each column.
        rows: a name, a remark and the row's pictures (as `picture` returns them).
    """
    cells = [f'<div class="head">{escape(t)}<small>{escape(note)}</small></div>' for t, note in titles]
    for name, remark, pictures in rows:
        cells.append(f'<div class="row"><b>{escape(name)}</b>{escape(remark)}</div>')
        cells.extend(pictures)
    style = f"grid-template-columns:repeat({len(titles)},minmax(0,1fr))"
    return f'<div class="scroll"><div class="pictures" style="{style}">{"".join(cells)}</div></div>'


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers, about `wanted` of them, within low … high."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    return [
        number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def line_chart(
    points: Sequence[tuple[float, float]],
    *,
    x_label: str,
    y_label: str,
    y_top: float | None = None,
    dots: bool = False,
) -> str:
    """Inline SVG of a line over axes that start at 0; points that are not finite are left out.

    Args:
        points: (x, y).
        x_label, y_label: what the axes count.
        y_top: end of the vertical axis; a little above the largest value if None.
        dots: mark the points; a reader sees their values on pointing at them.
    """
    width, height, left, right, top, bottom = 520, 280, 48, 14, 22, 42
    points = [(float(x), float(y)) for x, y in points if math.isfinite(y)]
    x_high = max((x for x, _ in points), default=0.0) or 1.0
    y_high = y_top or 1.05 * max((y for _, y in points), default=0.0) or 1.0

    def across(x: float) -> float:
        return left + (width - left - right) * x / x_high

    def down(y: float) -> float:
        return height - bottom - (height - top - bottom) * y / y_high

    label = f"{escape(y_label)} over {escape(x_label)}"
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">']
    for y in _ticks(0, y_high):
        style = "grid" if y else "axis"
        parts.append(
            f'<line class="{style}" x1="{left}" x2="{width - right}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>'
        )
        parts.append(f'<text x="{left - 8}" y="{down(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in _ticks(0, x_high):
        parts.append(f'<text x="{across(x):.1f}" y="{height - 24}" text-anchor="middle">{x:g}</text>')
    parts.append(
        f'<text x="{across(x_high / 2)}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(f'<text x="{left - 38}" y="12">{escape(y_label)}</text>')
    path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
    parts.append(f'<polyline points="{path}"/>')
    for x, y in points if dots else ():
        tip = f"<title>{y:.4g} at {x:g}</title>"
        parts.append(f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3.2">{tip}</circle>')
    parts.append("</svg>")
    return "".join(parts)
