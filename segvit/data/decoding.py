"""What stands in picture files: opened by Pillow, NumPy or tifffile, upright, within limits of size.

Every problem with a file is a `ValueError` of one line that names it.
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
from typing import Any

import numpy as np

from segvit.data.depth import Samples, is_deep_tiff, is_reduced, png_samples, pnm_samples
from segvit.system.extras import require
from segvit.system.zips import ZipPath, path_at

PICTURE_SUFFIXES: tuple[str, ...] = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".avif")
PICTURE_SUFFIXES += (".jp2", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".npy")
ORIENTATION = 0x0112
_TILE = (0x0142, 0x0143)  # width and length
_MAX_PIXELS = 1 << 30
_lock = threading.Lock()


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
        max_pixels: it may have at most so many; by default as many as a file.
        max_channels: and, where they are given, at most so many times as many samples.
        formats: Pillow's names of those that are decoded.
    """

    def __init__(
        self,
        data: bytes,
        name: str = "image",
        *,
        max_pixels: int | None = None,
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


def source_of(path: str | os.PathLike | PictureBytes) -> Source:
    return path if isinstance(path, PictureBytes) else path_at(path)


def file_of(path: Source) -> Any:
    """What decoders take."""
    return path.open() if isinstance(path, PictureBytes | ZipPath) else path


class WholeMessageError(ValueError):
    """A message that is whole already."""


@contextlib.contextmanager
def named(path: Source) -> Iterator[None]:
    """Whatever a decoder raises becomes one line that names the file."""
    try:
        yield
    except (WholeMessageError, TooLargeError, ImportError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise WholeMessageError(f"{path}: cannot be decoded as an image ({reason})") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Pillow's warnings about damaged data beside the pixels; by one thread at a time."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_picture(path: Source) -> Any:
    """A PIL image whose pixels are not read yet; None for a TIFF that Pillow cannot read.

    Our limit of pixels stands in place of Pillow's, which microscopes and satellites exceed.
    """
    image_module: Any = require("PIL.Image", extra="train")
    with named(path), quiet():
        before, image_module.MAX_IMAGE_PIXELS = image_module.MAX_IMAGE_PIXELS, None
        try:
            if isinstance(path, Path):
                image = image_module.open(file_of(path))
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
            raise WholeMessageError(f"{path}: {reason}") from None
        finally:
            image_module.MAX_IMAGE_PIXELS = before
    try:
        _check_size(path, *image.size)
        if image.format == "TIFF":
            with named(path):
                width, length = (int(np.max(image.tag_v2.get(tag, 1))) for tag in _TILE)
            _check_size(path, width, length, what="tiles of ")
    except ValueError:
        image.close()
        raise
    return image


def _check_size(path: Source, width: int, height: int, channels: int = 1, what: str = "") -> None:
    got = f"{path}: {what}{width}x{height} pixels"
    if isinstance(path, PictureBytes) and path.max_pixels is not None:
        most = path.max_pixels
        if width * height > most:
            raise TooLargeError(f"{got}, more than {most}")
        if width * height * channels > most * path.max_channels:
            raise TooLargeError(f"{got} of {channels} channels, more than {most} of {path.max_channels}")
        return
    text = os.environ.get("SEGVIT_MAX_PIXELS", str(_MAX_PIXELS))
    if not text.isdecimal() or not int(text):
        raise WholeMessageError(f"SEGVIT_MAX_PIXELS: got {text!r}, expected a number of pixels")
    if width * height > int(text):
        raise TooLargeError(f"{got}, more than {int(text)}; SEGVIT_MAX_PIXELS sets another limit")


def load_array(path: Source) -> np.ndarray:
    array_shape(path)
    with named(path):
        return np.load(file_of(path), allow_pickle=False)


def array_shape(path: Source) -> tuple[int, ...]:
    """The shape that the header of a .npy file says.

    Raises:
        ValueError: it is not an array of numbers, or too large.
    """
    with named(path), path.open("rb") as file:
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


@contextlib.contextmanager
def tiff_series(path: Any, file: Any = None) -> Iterator[Any]:
    """The first picture of a TIFF, its pixels not read yet; pages of one size are its channels."""
    tifffile = require("tifffile", extra="tiff")
    tifffile.logger().setLevel(logging.CRITICAL)  # damage that matters is raised
    with named(path), tifffile.TiffFile(file or file_of(path)) as tiff:  # in memory: it looks for no other
        series = tiff.series[0]
        width, height = series.sizes.get("width", 1), series.sizes.get("height", 1)
        _check_size(path, width, height, math.prod(series.shape) // max(1, width * height))
        page = series.keyframe  # a tile is decoded as a whole, however little of it the picture has
        _check_size(path, page.tilewidth, page.tilelength, page.tiledepth * page.samplesperpixel, "tiles of ")
        yield series


def read_tiff(path: Any, file: Any = None) -> np.ndarray:
    """Samples (H, W, C) of the first picture of a TIFF, upright; perhaps of an open file, `path` by name."""
    with tiff_series(path, file) as series:
        if isinstance(path, PictureBytes) and series.keyframe.compression > 1:
            require("imagecodecs", extra="tiff")  # tifffile's own decoders know no end
        turn = tiff_orientation(series)
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
        return turned(array[..., None], turn)
    if array.ndim != 3:
        raise ValueError(f"{path}: a TIFF of {array.ndim} dimensions ({axes}), expected one picture")
    return turned(array if axes[-1] == "S" else np.moveaxis(array, 0, -1), turn)


def tiff_orientation(series: Any) -> int:
    value = series.keyframe.tags.valueof(ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def load_pixels(image: Any) -> None:
    """Read the pixels of a PIL image."""
    name = getattr(image, "filename", None)
    if name and image.format == "TIFF":
        image.filename = ""  # or Pillow maps the file, and maps turned pictures with the sides exchanged
    try:
        image.load()
    finally:
        if name:
            image.filename = name


def orientation_of(image: Any) -> int:
    """The EXIF orientation of a loaded picture, 1 to 8."""
    try:
        with quiet():
            value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data: the pixels are there all the same
        return 1
    return value if value in range(1, 9) else 1


def stored_samples(image: Any, name: Any) -> Samples | None:
    """Samples of a PIL image, upright, that Pillow has not read and would not keep as they are; or None."""
    if is_deep_tiff(image) and image.tile:
        image.fp.seek(0)
        values = read_tiff(name, image.fp)
        return Samples(values[..., :3] if image.mode == "RGBX" else values)
    if image.format == "PNG" and is_reduced(image):
        # A copy is read: the next time there is as much in what was given.
        place = image.fp.tell()
        image.fp.seek(0)
        copy = type(image)(io.BytesIO(image.fp.read()))
        image.fp.seek(place)
        image = copy
    stored = png_samples(image) or pnm_samples(image)
    return None if stored is None else stored._replace(values=turned(stored.values, orientation_of(image)))


def turned(samples: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, ...) as stored to the picture as it is seen."""
    if orientation >= 5:
        samples = samples.swapaxes(0, 1)
    rows, columns = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(
        orientation, (1, 1)
    )
    return samples[::rows, ::columns]
