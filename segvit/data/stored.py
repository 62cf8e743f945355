"""Label maps as files have them, turned as pictures are; `segvit.data.labels` says what they mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segvit.data.decoding import (
    WholeMessageError,
    load_array,
    load_pixels,
    named,
    open_picture,
    orientation_of,
    read_tiff,
    stored_samples,
    turned,
)
from segvit.data.depth import is_reduced
from segvit.data.matlab import read_matlab
from segvit.system.zips import path_at

LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".ppm", ".npy", ".mat")
GREY = 0x010101  # a level times this is its colour
_BLACK_AND_WHITE = (0, 0xFFFFFF)


class StoredLabel(NamedTuple):
    """A label map as its file has it, turned as the picture is.

    Attributes:
        values: integers (H, W), of a coloured one red << 16 | green << 8 | blue.
        form: "number": one channel; "palette": one, and colours of its numbers; "bilevel": of black and
            white as 0 and 1; "grey": three channels of colours, all of them grey, and `values` their levels;
            "colour": three channels.
        palette: of a palette file or a bilevel one, its colours as above, by value.
    """

    values: np.ndarray
    form: str = "number"
    palette: np.ndarray | None = None

    @property
    def colour(self) -> bool:
        """The file holds colours, not numbers."""
        return self.form == "colour"

    def colours(self) -> np.ndarray:
        """The colour of every pixel (H, W), red << 16 | green << 8 | blue; numbers are grey levels."""
        if self.palette is not None:
            return self.palette[self.values]
        values = self.values.astype(np.int64)
        return values if self.colour else values * GREY


def stored_label(path: str | os.PathLike) -> StoredLabel:
    """Read a label map file: one channel, a palette, or colours; alpha channels must be opaque.

    A MATLAB file's is its variable `LabelMap` or `S` (extra `mat`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be decoded, was compressed with loss, or holds values that are no whole numbers.
    """
    path = path_at(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image file")
    palette = None
    if path.suffix.lower() == ".npy":
        array = load_array(path)
    elif path.suffix.lower() == ".mat":
        array = next(iter(read_matlab(path, one_of=("LabelMap", "S")).values()))
    else:
        image = open_picture(path)
        if image is None:
            array = read_tiff(path)
            array = array[..., 0] if array.shape[-1] == 1 else array
        else:
            with image, named(path):
                array, palette = _label_samples(image, path)
    if array.ndim == 3 and array.shape[-1] in (2, 4) and array.dtype.kind in "ui":
        if (array[..., -1] != np.iinfo(array.dtype).max).any():
            raise ValueError(f"{path}: a label map with transparent pixels; which label they have is unknown")
        array = array[..., 0] if array.shape[-1] == 2 else array[..., :3]
    if array.ndim == 3 and array.shape[-1] == 3 and array.dtype.kind == "u" and array.itemsize <= 2:
        deep = array.itemsize == 2
        if (array == array[..., :1]).all():
            return StoredLabel(array[..., 0], "number" if deep else "grey")
        if deep:
            array, low = array >> 8, array & 255
            if ((low != 0) & (low != array)).any():
                raise ValueError(f"{path}: colours of 16 bits, expected 8, as names files give them")
        red, green, blue = (array[..., i].astype(np.int64) for i in range(3))
        return StoredLabel(red << 16 | green << 8 | blue, "colour")
    if array.ndim != 2:
        raise ValueError(f"{path}: got a label image of shape {array.shape}, expected one channel")
    if array.dtype == bool:
        palette = np.array(_BLACK_AND_WHITE)
    values = whole_numbers(array, path)
    if palette is None:
        return StoredLabel(values)
    bilevel = (*palette[:2],) == _BLACK_AND_WHITE and values.max() <= 1
    return StoredLabel(values, "bilevel" if bilevel else "palette", palette)


def read_label(path: str | os.PathLike) -> np.ndarray:
    """A label file as stored, an integer array (H, W).

    Raises:
        FileNotFoundError, ValueError: as `stored_label`, or it holds colours.
    """
    label = stored_label(path)
    if label.colour:
        raise ValueError(colours_problem(path, label))
    return label.values


def colours_problem(path: str | os.PathLike, label: StoredLabel) -> str:
    """What to say of a colour-coded label map where no class has a colour."""
    return (
        f"{path}: got a label image of shape {(*label.values.shape, 3)}, colours where label values are "
        "expected; give each class its colour in the names file, 'name red green blue'"
    )


def _label_samples(image: Any, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    palette: np.ndarray | None = None
    lossy = image.format in ("JPEG", "MPO", "JPEG2000") or (
        image.format == "WEBP" and b"VP8 " in path.read_bytes()[:64]
    )
    if lossy:
        raise WholeMessageError(
            f"{path}: a {image.format} label map: compression with loss changes labels; store PNG"
        )
    if kept := stored_samples(image, path):
        values = kept.values
        return values[..., 0] if values.shape[-1] == 1 else values, None
    if is_reduced(image):
        raise WholeMessageError(
            f"{path}: a {image.format} label map of a kind whose samples are not read in full; store PNG"
        )
    load_pixels(image)
    turn = orientation_of(image)
    if image.mode in ("P", "PA"):
        colours = np.zeros((256, 3), np.int64)
        stored = np.array(image.getpalette("RGB")[: 3 * 256], np.int64).reshape(-1, 3)
        colours[: len(stored)] = stored
        palette = colours @ (1 << 16, 1 << 8, 1)
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa", "La"):
        image = image.convert("LA" if image.mode == "La" else "RGBA" if image.mode == "RGBa" else "RGB")
    return turned(np.array(image), turn), palette


def whole_numbers(array: np.ndarray, path: Path) -> np.ndarray:
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype.kind == "f":
        broken = ~np.isfinite(array) | (array % 1 != 0) | (np.abs(array) >= 1 << 53)
        if broken.any():
            row, column = np.argwhere(broken)[0]
            raise ValueError(
                f"{path}: got label value {array[row, column]} at row {row}, column {column}, "
                "expected whole numbers"
            )
        return array.astype(np.int64)
    if array.dtype.kind not in "ui":
        raise ValueError(f"{path}: got {array.dtype} label values, expected whole numbers")
    return array
