"""Pictures of segmentations: palettes, overlays, legends and heat maps of similarity maps.

Arrays are NumPy's, of the picture's own size: images uint8 (H, W, 3), label maps integer (H, W), colours
uint8 (N, 3). A label outside 0…N-1 (255, say) means "not labelled" and is left unpainted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from segvit.pictures.palette import class_palette as class_palette  # where it was
from segvit.system.extras import require

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont
else:
    Image = require("PIL.Image", extra="train")
    ImageDraw = require("PIL.ImageDraw", extra="train")
    ImageFont = require("PIL.ImageFont", extra="train")

# Heat colours from "nothing" to "certain"; lightness grows all the way, so that it reads in grey as well.
_HEAT = np.array([[10, 8, 40], [84, 15, 109], [187, 55, 84], [249, 142, 9], [252, 255, 164]], np.float64)

_INK = (28, 30, 34)
_FAINT = (112, 116, 124)
_PAPER = (255, 255, 255)


def _check_labels(labels: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels is {labels.dtype} of shape {labels.shape}; expected integers (H, W)")
    if shape is not None and labels.shape != shape:
        raise ValueError(f"labels has shape {labels.shape}; expected the image's {shape}")
    return labels


def _check_image(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} of shape {image.shape}; expected uint8 (H, W, 3)")
    return image


def colorize(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Label map (H, W) -> uint8 (H, W, 3); unlabelled pixels are black."""
    labels = _check_labels(labels)
    known = (labels >= 0) & (labels < len(palette))
    return np.where(known[..., None], palette[np.where(known, labels, 0)], np.uint8(0))


def borders(labels: np.ndarray, thickness: int = 1) -> np.ndarray:
    """Boolean (H, W): pixels within `thickness` above or left of a change of label."""
    labels = _check_labels(labels)
    edge = np.zeros(labels.shape, dtype=bool)
    for shift in range(1, thickness + 1):
        edge[:-shift] |= labels[:-shift] != labels[shift:]
        edge[:, :-shift] |= labels[:, :-shift] != labels[:, shift:]
    return edge


def overlay(image: np.ndarray, labels: np.ndarray, palette: np.ndarray, *, alpha: float = 0.55) -> np.ndarray:
    """The label map painted over the image with thin light borders between classes; uint8 (H, W, 3).

    Args:
        image: uint8 (H, W, 3).
        labels: integers (H, W).
        palette: uint8 (N, 3), one colour for each class.
        alpha: 0 shows the image alone, 1 the labels alone.

    Raises:
        ValueError: a shape or dtype is not as above, or alpha is outside 0…1.
    """
    image = _check_image(image)
    labels = _check_labels(labels, image.shape[:2])
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected 0 to 1")
    weight = np.where((labels >= 0) & (labels < len(palette)), alpha, 0.0)[..., None]
    painted = image * (1 - weight) + colorize(labels, palette) * weight
    if alpha > 0:
        edge = borders(labels, max(1, round(min(image.shape[:2]) / 400)))
        painted[edge] = 0.3 * painted[edge] + 0.7 * 255
    return painted.round().astype(np.uint8)


class LegendEntry(NamedTuple):
    """One class that is present: its index, its name, and its share of the labelled pixels (0…1)."""

    index: int  # type: ignore[assignment]  # a tuple has a method of this name
    name: str
    share: float


def legend_entries(labels: np.ndarray, class_names: Sequence[str]) -> list[LegendEntry]:
    """The classes that a label map (H, W) holds, largest area first."""
    labels = _check_labels(labels)
    known = labels[(labels >= 0) & (labels < len(class_names))]
    counts = np.bincount(known.astype(np.int64), minlength=len(class_names))
    order = sorted(np.flatnonzero(counts), key=lambda index: (-counts[index], index))
    return [LegendEntry(int(i), class_names[int(i)], float(counts[i] / known.size)) for i in order]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def legend(
    labels: np.ndarray,
    class_names: Sequence[str],
    palette: np.ndarray,
    *,
    size: tuple[int, int] = (0, 0),
    text_size: int = 16,
) -> Image.Image:
    """A panel that lists the classes present, with colour and share of area, largest first.

    For a picture of `size` (width, height): at least as tall; in several columns where the classes do not fit
    one, but no wider than the picture unless a single column is.
    """
    entries = legend_entries(labels, class_names)
    font, line, pad = _font(text_size), round(1.7 * text_size), text_size
    empty = "nothing labelled"
    name_width = max([font.getlength(entry.name) for entry in entries], default=font.getlength(empty))
    column = round(2.6 * text_size + name_width + font.getlength("<0.1 %"))
    fitting_rows = max(1, (size[1] - 2 * pad) // line)
    columns = max(1, min(-(-len(entries) // fitting_rows), (size[0] - pad) // (column + pad)))
    rows = max(1, -(-len(entries) // columns))
    panel = Image.new("RGB", (pad + columns * (column + pad), max(size[1], 2 * pad + rows * line)), _PAPER)
    draw = ImageDraw.Draw(panel)
    for position, entry in enumerate(entries):
        left = pad + (position // rows) * (column + pad)
        middle = pad + (position % rows) * line + line // 2
        chip = (left, middle - text_size // 2, left + text_size, middle + text_size // 2)
        draw.rounded_rectangle(chip, 3, fill=tuple(map(int, palette[entry.index])), outline=_FAINT)
        draw.text((left + round(1.6 * text_size), middle), entry.name, _INK, font, anchor="lm")
        draw.text((left + column, middle), format_share(entry.share), _FAINT, font, anchor="rm")
    if not entries:
        draw.text((pad, pad), empty, _FAINT, font)
    return panel


def format_share(share: float) -> str:
    """0.1234 -> "12 %"; below one percent with a decimal."""
    percent = 100 * share
    if percent < 0.1:
        return "<0.1 %"
    return f"{percent:.1f} %" if percent < 9.95 else f"{percent:.0f} %"


def overlay_with_legend(
    image: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    palette: np.ndarray,
    *,
    alpha: float = 0.55,
) -> Image.Image:
    """`overlay` at the image's own size with `legend` at its right."""
    painted = Image.fromarray(overlay(image, labels, palette, alpha=alpha))
    text_size = min(40, max(14, round(min(painted.size) / 32)))
    panel = legend(labels, class_names, palette, size=painted.size, text_size=text_size)
    canvas = Image.new("RGB", (painted.width + panel.width, max(painted.height, panel.height)), _PAPER)
    canvas.paste(painted, (0, 0))
    canvas.paste(panel, (painted.width, 0))
    return canvas


def heat(image: np.ndarray, similarity: np.ndarray, *, normalize: str = "sigmoid") -> np.ndarray:
    """A similarity map as heat over the greyed image, uint8 (H, W, 3).

    Args:
        image: uint8 (H, W, 3).
        similarity: float (h, w) of any grid, enlarged bilinearly; logits, as the decoder yields them.
        normalize: "sigmoid" shows the probability that the map means; "minmax" stretches the map's own range
            over all colours (a constant map gets the lowest).

    Raises:
        ValueError: a shape or dtype is not as above, or normalize is another word.
    """
    image = _check_image(image)
    similarity = np.asarray(similarity, dtype=np.float32)
    if similarity.ndim != 2:
        raise ValueError(f"similarity has shape {similarity.shape}; expected (h, w)")
    size = (image.shape[1], image.shape[0])
    value = np.asarray(Image.fromarray(similarity).resize(size, Image.Resampling.BILINEAR), dtype=np.float64)
    if normalize == "sigmoid":
        value = 1 / (1 + np.exp(-value.clip(-60, 60)))
    elif normalize == "minmax":
        low, high = float(similarity.min()), float(similarity.max())
        value = ((value - low) / (high - low)).clip(0, 1) if high > low else np.zeros_like(value)
    else:
        raise ValueError(f"normalize is {normalize!r}; expected 'sigmoid' or 'minmax'")
    position = np.linspace(0, 1, len(_HEAT))
    color = np.stack([np.interp(value, position, channel) for channel in _HEAT.T], axis=-1)
    grey = image @ np.array([0.299, 0.587, 0.114])
    weight = (0.35 + 0.5 * value)[..., None]
    return (grey[..., None] * (1 - weight) + color * weight).round().astype(np.uint8)


def stage_notes(stages: int) -> list[str]:
    """What to say under the title of each stage's column, in running order."""
    return ["deepest tap" if n == 0 else "shallowest tap" if n == stages - 1 else "" for n in range(stages)]


class Panel(NamedTuple):
    """One of several pictures side by side: title, what to say below it, a caption, uint8 (H, W, 3)."""

    title: str
    note: str
    caption: str
    picture: np.ndarray


def similarity_panels(
    image: np.ndarray,
    stages: Sequence[np.ndarray],
    accumulated: np.ndarray,
    *,
    normalize: str = "minmax",
    layers: bool = False,
) -> list[Panel]:
    """The pictures of one row of `similarity_picture`: the image, each stage's map, the accumulated mask.

    Args:
        image: uint8 (H, W, 3); enlarged or reduced to a longer side of 240 to 480 pixels.
        stages, accumulated: float (h, w), of one class.
        normalize, layers: as for `similarity_picture`.
    """
    image = _check_image(image)
    longest = max(image.shape[:2])
    scale = min(max(longest, 240), 480) / longest
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    shown = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    kind, mask = ("layer", "mask") if layers else ("stage", "accumulated mask")
    notes = [""] * len(stages) if layers else stage_notes(len(stages))
    panels = [Panel("image", "", "", shown)]
    for number, (values, note) in enumerate(zip(stages, notes, strict=True), 1):
        caption = f"{values.min():.1f} … {values.max():.1f}" if normalize == "minmax" else ""
        panels.append(Panel(f"{kind} {number}", note, caption, heat(shown, values, normalize=normalize)))
    return [*panels, Panel(mask, "sigmoid", "", heat(shown, accumulated, normalize="sigmoid"))]


def similarity_picture(
    image: np.ndarray,
    stages: Sequence[np.ndarray],
    accumulated: np.ndarray,
    class_names: Sequence[str],
    *,
    normalize: str = "minmax",
    layers: bool = False,
) -> Image.Image:
    """Similarity maps stage by stage, arranged as in the paper's figure 1.

    A row for each class; columns: the image, the similarity map of every stage in running order (deepest tap
    first), and the accumulated mask, which is what the prediction uses.

    Args:
        image: uint8 (H, W, 3).
        stages: for each stage, float (K, h, w) of the K classes to show.
        accumulated: float (K, h, w), the last stage's mask logits; always shown through the sigmoid.
        class_names: K names.
        normalize: how a stage's map becomes colours, see `heat`. One stage's map is a summand and no
            probability: hence "minmax", with its range written into the picture's corner.
        layers: the maps are of the layers of a single stage, as in a Shrunk model, and do not add up.

    Raises:
        ValueError: there is no class, or the numbers of maps and names differ.
    """
    image = _check_image(image)
    rows = len(class_names)
    if rows == 0 or any(len(maps) != rows for maps in (*stages, accumulated)):
        counts = [len(maps) for maps in (*stages, accumulated)]
        raise ValueError(
            f"class_names has {rows} names, the maps {counts} classes; expected the same, at least 1"
        )
    table = [
        similarity_panels(
            image, [maps[row] for maps in stages], accumulated[row], normalize=normalize, layers=layers
        )
        for row in range(rows)
    ]
    titles = table[0]
    cell = (titles[0].picture.shape[1], titles[0].picture.shape[0])
    text, small, gap = _font(16), _font(13), 8
    name_height, head = 30, 50
    row_height = name_height + cell[1] + gap
    width = gap + len(titles) * (cell[0] + gap)
    canvas = Image.new("RGB", (width, head + rows * row_height + gap), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, panel in enumerate(titles):
        left = gap + column * (cell[0] + gap)
        draw.text((left, 8), panel.title, _INK, text)
        draw.text((left, 29), panel.note, _FAINT, small)
    for row, (name, panels) in enumerate(zip(class_names, table, strict=True)):
        top = head + row * row_height
        draw.line((gap, top, width - gap, top), (222, 224, 228))
        draw.text((gap, top + name_height // 2), name, _INK, text, anchor="lm")
        for column, panel in enumerate(panels):
            left = gap + column * (cell[0] + gap)
            canvas.paste(Image.fromarray(panel.picture), (left, top + name_height))
            if panel.caption:
                corner = (left + 6, top + name_height + cell[1] - 5)
                draw.text(corner, panel.caption, _PAPER, small, anchor="ls", stroke_width=1, stroke_fill=_INK)
    return canvas


MADE_HERE = r"\x89PNG.{,99}tEXtSoftware\x00segvit"
"""Regular expression that matches the beginning of what `save_picture` writes, as Latin-1."""


def save_picture(image: Image.Image, path: str | os.PathLike | BinaryIO) -> None:
    """Write a PNG file that says that it was made here: it may be replaced by another such picture.

    `path` may be a binary file.
    """
    note = require("PIL.PngImagePlugin", extra="train").PngInfo()
    note.add_text("Software", "segvit")
    image.save(path, "PNG", pnginfo=note)


def confusion_picture(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Image.Image:
    """A confusion matrix of counts (N, N), rows true classes, as shares of each row.

    Cells of up to 24 classes hold their share in per cent. A row without pixels stays white.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    number = len(class_names)
    if counts.shape != (number, number):
        raise ValueError(f"matrix has shape {counts.shape}; expected ({number}, {number}), as class_names")
    total = counts.sum(1, keepdims=True)
    share = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
    cell = max(5, min(40, 960 // number))
    font, gap = _font(max(8, min(14, cell - 4))), 8
    names = [name if len(name) <= 28 else f"{name[:27]}…" for name in class_names]
    written = cell >= 10
    label = round(max(font.getlength(name) for name in names)) + 2 * gap if written else 2 * gap
    head = label + 24
    canvas = Image.new("RGB", (label + number * cell + gap, head + number * cell + gap), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, gap), "rows: true class, columns: predicted", _INK, _font(12))
    position = np.linspace(0, 1, len(_HEAT))
    colors = np.stack([np.interp(share, position, channel) for channel in _HEAT.T], axis=-1)
    colors[total[:, 0] == 0] = _PAPER
    blocks = colors.round().astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
    canvas.paste(Image.fromarray(blocks), (label, head))
    for index, name in enumerate(names if written else []):
        middle = index * cell + cell // 2
        draw.text((label - gap, head + middle), name, _INK, font, anchor="rm")
        strip = Image.new("RGB", (label, cell), _PAPER)
        ImageDraw.Draw(strip).text((gap, cell // 2), name, _INK, font, anchor="lm")
        canvas.paste(strip.rotate(90, expand=True), (label + index * cell, 24))
    if number <= 24:
        small = _font(max(8, cell // 3))
        for row, column in np.argwhere(share >= 0.005):
            ink = _PAPER if share[row, column] < 0.5 else _INK
            place = (label + column * cell + cell // 2, head + row * cell + cell // 2)
            draw.text(place, f"{100 * share[row, column]:.0f}", ink, small, anchor="mm")
    return canvas
