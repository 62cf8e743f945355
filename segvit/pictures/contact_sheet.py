"""Pictures side by side with what their labels mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from segvit.pictures.visualize import Image, ImageDraw, legend, overlay

__all__ = ["contact_sheet"]

_THUMBNAIL = 320
_COLUMNS = 4


def contact_sheet(
    pictures: Iterable[tuple[str, np.ndarray, np.ndarray]], class_names: Sequence[str], palette: np.ndarray
) -> Image.Image:
    """As they are on the left, with their labels over them on the right, a few in a row; a legend below.

    Args:
        pictures: name, uint8 (H, W, 3) and classes (H, W) of each, -1 where there is none; at least one.
        class_names: N names.
        palette: uint8 (N, 3).
    """
    cells, present = [], []
    for name, image, classes in pictures:
        pixels = Image.fromarray(image)
        scale = _THUMBNAIL / max(pixels.size)
        size = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
        shown = Image.fromarray(classes.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
        labels, pixels = np.array(shown), pixels.resize(size, Image.Resampling.BILINEAR)
        cell = Image.new("RGB", (2 * size[0], size[1]))
        cell.paste(pixels, (0, 0))
        cell.paste(Image.fromarray(overlay(np.array(pixels), labels, palette)), (size[0], 0))
        cells.append((cell, f"{name}   {(labels < 0).mean():.0%} without class"))
        present.append(labels.ravel())
    gap, line = 10, 18
    width = max(cell.width for cell, _ in cells) + gap
    columns = max(1, min(_COLUMNS, len(cells)))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell, _ in row) + line + gap for row in rows]
    panel = legend(np.concatenate(present)[None], class_names, palette, size=(columns * width, 0))
    sheet = Image.new(
        "RGB", (max(gap + columns * width, panel.width), gap + sum(heights) + panel.height), "white"
    )
    draw, top = ImageDraw.Draw(sheet), gap
    for row, height in zip(rows, heights, strict=True):
        for column, (cell, text) in enumerate(row):
            left = gap + column * width
            sheet.paste(cell, (left, top + line))
            draw.text((left, top), text, fill="black", font_size=13)
        top += height
    sheet.paste(panel, (0, top))
    return sheet
