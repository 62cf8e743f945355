"""The one reader of pictures and of stored label maps, for `predict`, training, Python and `bench`.

Pictures are read as people see them: turned as EXIF says, transparent parts on white, every colour space as
RGB, and values of more than 8 bits scaled to 0...255, never clipped (`to_bytes` says how). Of several frames
the first counts. Label maps keep their stored values, turned in the same way.

Every problem with a file is a `ValueError` or `FileNotFoundError` of one line that names the file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from segvit.data.depth import Samples, is_deep_tiff, is_reduced, png_samples, pnm_samples, tiff_bits
from segvit.data.matlab import variables
from segvit.system.extras import require
from segvit.system.text import shown
from segvit.system.zips import ZipPath, path_at

__all__ = [
    "PictureBytes",
    "StoredLabel",
    "TooLargeError",
    "as_rgb",
    "image_tensor",
    "probe",
    "read_image",
    "read_label",
    "read_matlab",
    "stored_label",
    "to_bytes",
    "whole_numbers",
]

PICTURE_SUFFIXES: tuple[str, ...] = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".avif")
PICTURE_SUFFIXES += (".jp2", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".npy")
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".ppm", ".npy", ".mat")
_MAX_PIXELS = 1 << 30
_ORIENTATION = 0x0112
GREY = 0x010101  # a level times this is its colour
_BLACK_AND_WHITE = (0, 0xFFFFFF)
_lock = threading.Lock()

Range = Sequence[float] | None


# Pictures


class TooLargeError(ValueError):
    """A picture of more pixels than the limit."""


# Of strangers: Pillow hands other formats to other programs, or has decoders that few people use.
_COMMON_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF")
OWN_FORMATS = (*_COMMON_FORMATS, "JPEG2000")  # of every suffix above: in tars of the user's own


class PictureBytes:
    """A picture file in memory, of a stranger: in place of a path in `read_image` and `probe`.

    Nothing on disk is opened for it, whatever is written in it; only formats in common use are decoded; its
    size is known before its pixels are read.

    Args:
        data: what stands in the file.
        name: what messages call it.
        max_pixels: it may have at most so many.
        max_channels: and at most so many times as many samples.
        formats: Pillow's names of those that are decoded.
    """

    def __init__(
        self,
        data: bytes,
        name: str = "image",
        *,
        max_pixels: int = _MAX_PIXELS,
        max_channels: int = 4,
        formats: Sequence[str] = _COMMON_FORMATS,
    ) -> None:
        self.data, self.name, self.formats = data, name, formats
        self.max_pixels, self.max_channels = max_pixels, max_channels

    @property
    def suffix(self) -> str:
        return ".npy" if self.data.startswith(b"\x93NUMPY") else ""

    def is_file(self) -> bool:
        return True

    def open(self, mode: str = "rb") -> io.BytesIO:
        return io.BytesIO(self.data)

    def __str__(self) -> str:
        return self.name


Source = Path | PictureBytes


def _source(path: str | os.PathLike | PictureBytes) -> Source:
    return path if isinstance(path, PictureBytes) else path_at(path)


def _file(path: Source) -> Any:
    """What decoders take."""
    return path.open() if isinstance(path, PictureBytes | ZipPath) else path


def read_image(
    path: str | os.PathLike | PictureBytes, channels: int = 3, value_range: Range = None
) -> Tensor:
    """A picture file as uint8 (channels, H, W).

    Args:
        path: of any format that Pillow reads, a .npy array (H, W), (H, W, C) or (C, H, W), or a TIFF of any
            number of channels (needs the extra `tiff` where Pillow cannot); or a file in memory.
        channels: 3 for RGB, to which every other kind is converted; 1 for grey; any other number must be the
            file's own.
        value_range: the stored values that become 0 and 255, see `to_bytes`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be decoded, is larger than the limit (`TooLargeError`), or has another number of
            channels.
        ImportError: an extra is needed for it.
    """
    path = _source(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image file")
    return _tensor(_decode_picture(path, channels, value_range))


def image_tensor(image: Any, channels: int = 3, value_range: Range = None) -> Tensor:
    """uint8 (C, H, W) of a path, PIL image or array (H, W, C), see `read_image`; a tensor as it is.

    A PIL image is turned as its EXIF data say, as a file is.

    Raises:
        TypeError: something else.
        ValueError, FileNotFoundError, ImportError: as `read_image`.
    """
    if isinstance(image, Tensor):
        return image
    if isinstance(image, (str, os.PathLike)):
        return read_image(image, channels, value_range)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[-1] != channels:
            raise ValueError(f"an image array must have shape (H, W, {channels}), got {image.shape}")
        return _tensor(np.array(image))
    if not hasattr(image, "getexif"):
        expected = "a path, a PIL image, a uint8 array or a uint8 tensor"
        raise TypeError(f"expected {expected}, got {type(image).__name__}")
    if value_range is not None and not getattr(image, "tile", None) and _file_is_reduced(image):
        raise ValueError(
            f"image: value_range: got a picture of which Pillow has read 8 bits; give {image.filename}"
        )
    return _tensor(_from_pil(image, channels, value_range, "image"))


def _file_is_reduced(image: Any) -> bool:
    path = Path(getattr(image, "filename", None) or ".")
    if not path.is_file():
        return False
    with _open(path) as again:
        return is_reduced(again)


def as_rgb(image: Tensor) -> Tensor:
    """What to show of an image (C, H, W): its first three channels, or the first one as grey."""
    return image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)


def to_bytes(samples: np.ndarray, value_range: Range = None) -> np.ndarray:
    """Stored values of any kind (H, W, C) as uint8 on 0...255, linearly.

    8-bit values stay. Without `value_range` the values that become 0 and 255 are

    - of integers without sign: 0 and the largest number of 8, 10, 12, 14 or 16 bits, the fewest that hold the
      picture's largest value;
    - of floats within 0...1: 0 and 1; of whole numbers within 0...255: 0 and 255;
    - of everything else: the picture's smallest and largest.

    With it, values beyond become 0 or 255. What is not finite becomes 0.

    Args:
        value_range: (low, high), or low and high for each of the channels in turn.

    Raises:
        ValueError: `value_range` has another length, or a low that is not below its high.
    """
    if samples.dtype == bool:
        samples = samples.astype(np.uint8) * 255
    low: Any
    high: Any
    if value_range is None:
        if samples.dtype == np.uint8:
            return samples
        low, high = _natural_range(samples)
    else:
        pairs = np.asarray(value_range, dtype=np.float64)
        if pairs.size not in (2, 2 * samples.shape[-1]):
            expected = f"expected 2, or 2 for each of {samples.shape[-1]} channels"
            raise _WholeMessageError(f"value_range: got {pairs.size} numbers, {expected}")
        low, high = pairs.reshape(-1, 2).T
        if not (low < high).all():
            raise _WholeMessageError(
                f"value_range: got {list(value_range)}, expected each low below its high"
            )
    values = (samples.astype(np.float64) - low) * (255 / (high - low))
    return np.nan_to_num(values, nan=0, posinf=0, neginf=0).clip(0, 255).round().astype(np.uint8)


def _natural_range(samples: np.ndarray) -> tuple[float, float]:
    finite = samples if samples.dtype.kind in "ui" else samples[np.isfinite(samples)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if samples.dtype.kind in "ui" or (low >= 0 and 1 < high <= 255 and not (finite % 1).any()):
        bits = next((bits for bits in (8, 10, 12, 14, 16) if high < 1 << bits), None)
        if low >= 0 and bits:
            return 0.0, float((1 << bits) - 1)
    elif low >= 0 and high <= 1:
        return 0.0, 1.0
    return low, high if high > low else low + 1


def probe(path: str | os.PathLike | PictureBytes, *, decode: bool = False) -> tuple[int, int]:
    """Width and height of a picture as it is seen; `decode` reads its pixels too, and finds a damaged file.

    Raises:
        ValueError: it is not a picture, damaged, or larger than the limit (`TooLargeError`).
    """
    path = _source(path)
    if path.suffix.lower() == ".npy":
        shape = _array_shape(path)
        # As `_channels_last` takes grey and colours; of other numbers of channels it is the smaller side.
        last = len(shape) == 2 or shape[-1] in (1, 3) or (shape[0] not in (1, 3) and shape[-1] <= shape[0])
        return (shape[1], shape[0]) if last else (shape[2], shape[1])
    image = _open(path)
    if image is None:
        if decode:
            height, width = _read_tiff(path).shape[:2]
            return width, height
        with _tiff_series(path) as series:
            width, height = series.sizes.get("width", 1), series.sizes.get("height", 1)
            return (height, width) if _tiff_orientation(series) >= 5 else (width, height)
    with image:
        width, height = image.size
        if image.format == "TIFF":  # which some Pillows turn as they open it, and some as they read it
            width, height = image.tag_v2[256], image.tag_v2[257]
            if image.tag_v2.get(_ORIENTATION) in range(5, 9):
                width, height = height, width
        if not decode:
            return width, height
        with _named(path):
            # A quarter of the work for JPEGs, and all of their data is looked at.
            image.draft(None, (max(1, width // 8), max(1, height // 8)))
            _load(image)
        return (height, width) if _orientation(image) >= 5 else (width, height)


# Stored label maps


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
        array = _load_array(path)
    elif path.suffix.lower() == ".mat":
        array = next(iter(read_matlab(path, one_of=("LabelMap", "S")).values()))
    else:
        image = _open(path)
        if image is None:
            array = _read_tiff(path)
            array = array[..., 0] if array.shape[-1] == 1 else array
        else:
            with image, _named(path):
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


def read_matlab(path: Path, *names: str, one_of: Sequence[str] = ()) -> dict[str, Any]:
    """Variables of a MATLAB file: those named, and the first that is there of `one_of`.

    Raises:
        ValueError: it is damaged, of version 7.3, or has one not.
        ImportError: SciPy is not installed.
    """
    scipy_io: Any = require("scipy.io", extra="mat")
    with _named(path):
        try:
            data = path.read_bytes()
            there = variables(data)
            if missing := [name for name in names if name not in there]:
                raise _WholeMessageError(f"{path}: has no variable {missing[0]}")
            if one_of and there.keys().isdisjoint(one_of):
                listed = shown(", ".join(there)) if there else "nothing"
                raise _WholeMessageError(f"{path}: has no {' and no '.join(one_of)}, but {listed}")
            wanted = [*names, *[name for name in one_of if name in there][:1]]
            if unread := [name for name in wanted if not there[name]]:
                raise _WholeMessageError(f"{path}: {unread[0]} is no array of numbers and no list of texts")
            found = scipy_io.loadmat(io.BytesIO(data), variable_names=wanted)
        except NotImplementedError:
            raise _WholeMessageError(
                f"{path}: a MATLAB 7.3 file, which is not read; save it in MATLAB with '-v7'"
            ) from None
    return {name: found[name] for name in wanted}


def _label_samples(image: Any, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    palette: np.ndarray | None = None
    lossy = image.format in ("JPEG", "MPO", "JPEG2000") or (
        image.format == "WEBP" and b"VP8 " in path.read_bytes()[:64]
    )
    if lossy:
        raise _WholeMessageError(
            f"{path}: a {image.format} label map: compression with loss changes labels; store PNG"
        )
    if kept := _stored_samples(image, path):
        values = kept.values
        return values[..., 0] if values.shape[-1] == 1 else values, None
    if is_reduced(image):
        raise _WholeMessageError(
            f"{path}: a {image.format} label map of a kind whose samples are not read in full; store PNG"
        )
    _load(image)
    turn = _orientation(image)
    if image.mode in ("P", "PA"):
        colours = np.zeros((256, 3), np.int64)
        stored = np.array(image.getpalette("RGB")[: 3 * 256], np.int64).reshape(-1, 3)
        colours[: len(stored)] = stored
        palette = colours @ (1 << 16, 1 << 8, 1)
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX", "RGBa", "La"):
        image = image.convert("LA" if image.mode == "La" else "RGBA" if image.mode == "RGBa" else "RGB")
    return _turned(np.array(image), turn), palette


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


# Decoding


class _WholeMessageError(ValueError):
    """A message that is whole already."""


@contextlib.contextmanager
def _named(path: Source) -> Iterator[None]:
    """Whatever a decoder raises becomes one line that names the file."""
    try:
        yield
    except (_WholeMessageError, TooLargeError, ImportError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise _WholeMessageError(f"{path}: cannot be decoded as an image ({reason})") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings about damaged data beside the pixels; by one thread at a time."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(path: Source) -> Any:
    """A PIL image whose pixels are not read yet; None for a TIFF that Pillow cannot read.

    Our limit of pixels stands in place of Pillow's, which microscopes and satellites exceed.
    """
    image_module: Any = require("PIL.Image", extra="train")
    with _named(path), _quiet():
        before, image_module.MAX_IMAGE_PIXELS = image_module.MAX_IMAGE_PIXELS, None
        try:
            if isinstance(path, Path):
                image = image_module.open(_file(path))
            else:
                image_module.init()
                known = [name for name in path.formats if name in image_module.OPEN]
                image = image_module.open(path.open(), formats=known)
        except image_module.UnidentifiedImageError:
            with path.open("rb") as file:
                if file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                    return None
            reason = "not a picture, or one of an unknown format"
            if (
                suffix := path.suffix.lower()
            ) in PICTURE_SUFFIXES and suffix not in image_module.registered_extensions():
                reason = f"this Pillow does not read {suffix}; pip install --upgrade pillow"
            raise _WholeMessageError(f"{path}: {reason}") from None
        finally:
            image_module.MAX_IMAGE_PIXELS = before
    try:
        _check_size(path, *image.size)
    except ValueError:
        image.close()
        raise
    return image


def _check_size(path: Source, width: int, height: int, channels: int = 1) -> None:
    if isinstance(path, PictureBytes):
        most = path.max_pixels
        if width * height > most:
            raise TooLargeError(f"{path}: {width}x{height} pixels, more than {most}")
        if width * height * channels > most * path.max_channels:
            got = f"{width}x{height} pixels of {channels} channels"
            raise TooLargeError(f"{path}: {got}, more than {most} of {path.max_channels}")
        return
    text = os.environ.get("SEGVIT_MAX_PIXELS", str(_MAX_PIXELS))
    if not text.isdecimal() or not int(text):
        raise _WholeMessageError(f"SEGVIT_MAX_PIXELS: got {text!r}, expected a number of pixels")
    if width * height > int(text):
        raise TooLargeError(
            f"{path}: {width}x{height} pixels, more than {int(text)}; SEGVIT_MAX_PIXELS sets another limit"
        )


def _decode_picture(path: Source, channels: int, value_range: Range) -> np.ndarray:
    """uint8 (H, W, channels)."""
    if path.suffix.lower() == ".npy":
        samples = _channels_last(_load_array(path), channels, path)
        return _fit_channels(to_bytes(samples, value_range), channels, path)
    image = _open(path)
    if image is not None:
        with image:
            if not (image.format == "TIFF" and _needs_tifffile(image, channels)):
                with _named(path):
                    return _from_pil(image, channels, value_range, path)
    return _fit_channels(to_bytes(_read_tiff(path), value_range), channels, path)


def _from_pil(image: Any, channels: int, value_range: Range, name: Any) -> np.ndarray:
    """uint8 (H, W, channels) of a PIL image, upright."""
    if stored := _stored_samples(image, name):
        full = value_range or ((0, stored.white) if stored.white else None)
        return _fit_channels(_on_white(stored.values, channels, full), channels, name)
    if value_range is not None and is_reduced(image):
        raise _WholeMessageError(
            f"{name}: value_range: got a {image.format} of more than 8 bits of a kind that is not read in "
            "full, expected PNG, or TIFF of grey or RGB"
        )
    _load(image)
    turn = _orientation(image)
    if image.mode[0] in "IF":  # "I", "I;16", "I;16B", "F"
        samples = to_bytes(np.array(image)[..., None], value_range)
    elif channels in (1, 3):
        samples = np.array(_flattened(image).convert("L" if channels == 1 else "RGB"))
        samples = samples if samples.ndim == 3 else samples[..., None]
        samples = samples if value_range is None else to_bytes(samples, value_range)
    else:
        samples = np.array(image)
        samples = to_bytes(samples if samples.ndim == 3 else samples[..., None], value_range)
    return np.ascontiguousarray(_fit_channels(_turned(samples, turn), channels, name))


def _stored_samples(image: Any, name: Any) -> Samples | None:
    """Samples of a PIL image, upright, that Pillow has not read and would not keep as they are; or None."""
    if is_deep_tiff(image) and image.tile:
        image.fp.seek(0)
        values = _read_tiff(name, image.fp)
        return Samples(values[..., :3] if image.mode == "RGBX" else values)
    if image.format == "PNG" and is_reduced(image):
        # A copy is read: the next time there is as much in what was given.
        place = image.fp.tell()
        image.fp.seek(0)
        copy = type(image)(io.BytesIO(image.fp.read()))
        image.fp.seek(place)
        image = copy
    stored = png_samples(image) or pnm_samples(image)
    return None if stored is None else stored._replace(values=_turned(stored.values, _orientation(image)))


def _on_white(samples: np.ndarray, channels: int, value_range: Range) -> np.ndarray:
    """As bytes; of grey or RGB with transparency, which is the last channel, what is seen on white paper."""
    if channels not in (1, 3) or samples.shape[-1] not in (2, 4):
        return to_bytes(samples, value_range)
    found, alpha = to_bytes(samples[..., :-1], value_range), samples[..., -1:] / np.iinfo(samples.dtype).max
    if not alpha.any():  # see `_flattened`
        return found
    return (found * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def _flattened(image: Any) -> Any:
    """Without transparency: what is seen on white paper; in a mode that Pillow converts to RGB."""
    if image.mode == "LAB":
        cms = require("PIL.ImageCms", extra="train")
        return cms.profileToProfile(
            image, cms.createProfile("LAB"), cms.createProfile("sRGB"), outputMode="RGB"
        )
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode not in ("LA", "PA", "RGBA") and "transparency" not in image.info:
        return image
    image_module = require("PIL.Image", extra="train")
    image = image.convert("RGBA")
    if not image.getextrema()[3][1]:  # an alpha channel of zeros alone hides nothing but a mistake
        return image.convert("RGB")
    return image_module.alpha_composite(image_module.new("RGBA", image.size, "white"), image)


def _fit_channels(samples: np.ndarray, channels: int, name: Any) -> np.ndarray:
    found = samples.shape[-1]
    if found == channels:
        return samples
    if found == 1 and channels == 3:
        return samples.repeat(3, axis=-1)
    if found == 3 and channels == 1:
        return (samples @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)[..., None]
    raise _WholeMessageError(f"{name}: has {found} channels, expected {channels}")


def _channels_last(samples: np.ndarray, channels: int, path: Source) -> np.ndarray:
    if samples.ndim == 2:
        return samples[..., None]
    fitting = {channels, *({1: (3,), 3: (1,)}.get(channels, ()))}
    if samples.ndim == 3 and samples.shape[-1] in fitting:
        return samples
    if samples.ndim == 3 and samples.shape[0] in fitting:
        return np.moveaxis(samples, 0, -1)
    raise ValueError(
        f"{path}: an array of shape {samples.shape}, expected (H, W, {channels}) or ({channels}, H, W)"
    )


def _load_array(path: Source) -> np.ndarray:
    _array_shape(path)
    with _named(path):
        return np.load(_file(path), allow_pickle=False)


def _array_shape(path: Source) -> tuple[int, ...]:
    """The shape that the header of a .npy file says.

    Raises:
        ValueError: it is not an array of numbers, or too large.
    """
    with _named(path), path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:  # 3.0 has names in UTF-8, and arrays of numbers have none
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        if dtype.kind not in "buif" or len(shape) not in (2, 3):
            raise ValueError("expected an array of numbers (H, W), (H, W, C) or (C, H, W)")
        if min(shape) < 1:
            raise ValueError(f"an array of shape {shape}")
        channels, height, width = sorted((1, *shape))[-3:]
        _check_size(path, width, height, channels)
        return shape


def _needs_tifffile(image: Any, channels: int) -> bool:
    """Whether Pillow would lose channels of a TIFF, or bits of one that is no colour picture."""
    samples = image.tag_v2.get(277, 1)
    if channels in (1, 3):
        return samples > len(image.getbands())
    return samples != channels or (samples > 1 and tiff_bits(image) > 8)


@contextlib.contextmanager
def _tiff_series(path: Any, file: Any = None) -> Iterator[Any]:
    """The first picture of a TIFF, its pixels not read yet; pages of one size are its channels."""
    tifffile = require("tifffile", extra="tiff")
    tifffile.logger().setLevel(logging.CRITICAL)  # damage that matters is raised
    with _named(path), tifffile.TiffFile(file or _file(path)) as tiff:  # in memory: it looks for no other
        series = tiff.series[0]
        width, height = series.sizes.get("width", 1), series.sizes.get("height", 1)
        _check_size(path, width, height, math.prod(series.shape) // max(1, width * height))
        yield series


def _read_tiff(path: Any, file: Any = None) -> np.ndarray:
    """Samples (H, W, C) of the first picture of a TIFF, upright; perhaps of an open file, `path` by name."""
    with _tiff_series(path, file) as series:
        turn = _tiff_orientation(series)
        try:
            array = series.asarray()
        except ValueError as error:
            if "imagecodecs" in str(error):
                require("imagecodecs", extra="tiff")
            raise
        axes = series.axes
    if len(axes) != array.ndim:
        raise ValueError(f"{path}: a damaged TIFF, {array.ndim} dimensions called {axes!r}")
    for axis in range(array.ndim - 1, -1, -1):
        if axes[axis] not in "YXS" and array.shape[axis] == 1 and array.ndim > 2:
            array, axes = array.squeeze(axis), axes[:axis] + axes[axis + 1 :]
    if array.ndim == 2:
        return _turned(array[..., None], turn)
    if array.ndim != 3:
        raise ValueError(f"{path}: a TIFF of {array.ndim} dimensions ({axes}), expected one picture")
    return _turned(array if axes[-1] == "S" else np.moveaxis(array, 0, -1), turn)


def _tiff_orientation(series: Any) -> int:
    value = series.keyframe.tags.valueof(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _load(image: Any) -> None:
    """Read the pixels of a PIL image."""
    name = getattr(image, "filename", None)
    if name and image.format == "TIFF":
        image.filename = ""  # or Pillow maps the file, and maps turned pictures with the sides exchanged
    try:
        image.load()
    finally:
        if name:
            image.filename = name


def _orientation(image: Any) -> int:
    """The EXIF orientation of a loaded picture, 1 to 8."""
    try:
        with _quiet():
            value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data: the pixels are there all the same
        return 1
    return value if value in range(1, 9) else 1


def _turned(samples: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, ...) as stored to the picture as it is seen."""
    if orientation >= 5:
        samples = samples.swapaxes(0, 1)
    rows, columns = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(
        orientation, (1, 1)
    )
    return samples[::rows, ::columns]


def _tensor(samples: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(samples)).permute(2, 0, 1).contiguous()
