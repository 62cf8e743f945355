"""What is answered: label maps, legends, overlays and similarity maps, as PNG files and as JSON of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from segvit.data.pictures import as_rgb
from segvit.inference.bulk import label_picture
from segvit.pictures.visualize import (
    colorize,
    legend_entries,
    overlay_with_legend,
    similarity_panels,
    similarity_picture,
)
from segvit.serve.asking import Asked
from segvit.system.extras import require

__all__ = ["Answers"]


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _text(picture: Any) -> str:
    return base64.b64encode(_png(picture)).decode("ascii")


def _hex(color: Sequence[int]) -> str:
    return "#" + "".join(f"{int(value):02x}" for value in color)


class Answers:
    """Answers about one model.

    Args:
        names: of its classes.
        palette: uint8 (N, 3).
        layers: its similarity maps are of the layers of one stage, see `similarity_picture`.
    """

    def __init__(self, names: Sequence[str], palette: np.ndarray, layers: bool) -> None:
        self.names, self.palette, self.layers = names, palette, layers
        self.classes = [
            {"index": index, "name": name, "color": _hex(color)}
            for index, (name, color) in enumerate(zip(names, palette, strict=True))
        ]

    def prediction(self, asked: Asked, image: Tensor, labels: np.ndarray) -> bytes | dict[str, Any]:
        """A PNG file, or what a JSON object is to hold, of an image (C, H, W) and its label map (H, W)."""
        if asked.format == "png" and asked.show == "overlay":
            pixels = _pixels(image)
            return _png(overlay_with_legend(pixels, labels, self.names, self.palette, alpha=asked.alpha))
        picture = label_picture(labels, len(self.names))
        if asked.format == "png":
            return _png(picture)
        answer = {
            "width": labels.shape[1],
            "height": labels.shape[0],
            "classes": [
                {**self.classes[entry.index], "share": entry.share}
                for entry in legend_entries(labels, self.names)
            ],
            "labels": _text(picture),
        }
        if "colors" in asked.include:
            answer["colors"] = _text(self._colors(labels))
        if "picture" in asked.include:
            answer["picture"] = _text(_image_module().fromarray(_pixels(image)))
        return answer

    def _colors(self, labels: np.ndarray) -> Any:
        """The label map in its classes' colours."""
        if len(self.names) > 256:
            return _image_module().fromarray(colorize(labels, self.palette))
        picture = _image_module().fromarray(labels.astype(np.uint8))
        picture.putpalette(self.palette.tobytes())
        return picture

    def similarity(
        self, asked: Asked, index: int, image: Tensor, stages: Sequence[np.ndarray], mask: np.ndarray
    ) -> bytes | dict[str, Any]:
        """As `prediction`, of one class's similarity maps (1, H, W) of each stage, and its mask logits."""
        pixels = _pixels(image)
        if asked.format == "png":
            return _png(similarity_picture(pixels, stages, mask, [self.names[index]], layers=self.layers))
        panels = similarity_panels(pixels, [maps[0] for maps in stages], mask[0], layers=self.layers)
        return {
            "class": self.classes[index],
            "panels": [
                {
                    "title": panel.title,
                    "note": panel.note,
                    "range": panel.caption,
                    "picture": _text(_image_module().fromarray(panel.picture)),
                }
                for panel in panels
            ],
        }


def _pixels(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray(as_rgb(image).permute(1, 2, 0).numpy())


def _image_module() -> Any:
    return require("PIL.Image", extra="train")
