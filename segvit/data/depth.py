"""Samples as picture files store them, where Pillow would reduce them to 8 bits or scale them.

Of an opened picture Pillow tells its plan to decode it: the codec and, for that, the layout of the samples.
"""

from __future__ import annotations

import io
import re
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Samples", "is_deep_tiff", "is_reduced", "png_samples", "pnm_samples", "tiff_bits"]

_BITS, _PHOTOMETRIC, _EXTRA_SAMPLES = 258, 262, 338
_RGB, _PREMULTIPLIED = 2, 1
# Where formats that Pillow decodes to 8 or 16 bits say how many they have: a byte in the head.
_DEPTHS = {"JPEG2000": rb"\A\xffO\xffQ.{38}(.)|ihdr.{10}(.)", "AVIF": rb"av1C..(.)"}
_HEAD = 1 << 16


class Samples(NamedTuple):
    """Samples (H, W, C), and the value that the file calls white where it does."""

    values: np.ndarray
    white: int | None = None


def is_reduced(image: Any) -> bool:
    """Whether Pillow would keep 8 bits of more, or scale samples; of pictures that it has not read yet."""
    if not getattr(image, "tile", None) or image.mode == "1":
        return False
    if image.format in _DEPTHS:
        return (bits := _coded_bits(image)) > 8 and (bits, image.mode[0]) != (16, "I")
    codec, _, _, layout = image.tile[0]
    if codec in ("ppm", "ppm_plain"):
        return layout[1] != 255
    return image.mode[0] not in "IF" and (codec == "SGI16" or ";16" in str(layout))


def _coded_bits(image: Any) -> int:
    """Of each sample of an opened JPEG 2000 or AVIF; of the latter 10 stands for 10 and 12."""
    place = image.fp.tell()
    image.fp.seek(0)
    found = re.search(_DEPTHS[image.format], image.fp.read(_HEAD), re.DOTALL)
    image.fp.seek(place)
    byte = ord(found[found.lastindex or 0]) if found else 0
    if image.format == "AVIF":
        return 10 if byte & 0x40 else 8
    return (byte & 0x7F) + 1


def is_deep_tiff(image: Any) -> bool:
    """Whether an opened picture is an RGB TIFF of more than 8 bits, with transparency or not."""
    if image.format != "TIFF" or image.mode not in ("RGB", "RGBA", "RGBX"):
        return False
    tags = image.tag_v2
    deep, rgb = tiff_bits(image) > 8, tags.get(_PHOTOMETRIC) == _RGB
    return deep and rgb and _PREMULTIPLIED not in np.ravel(tags.get(_EXTRA_SAMPLES, 0))


def tiff_bits(image: Any) -> int:
    """Of each of an opened TIFF's samples."""
    return int(np.max(image.tag_v2.get(_BITS, 1)))


def png_samples(image: Any) -> Samples | None:
    """Of an opened PNG of 16 bits and several channels; its pixels are read afterwards. None for all others.

    Of the two bytes of a sample Pillow takes the first, or, told that they are exchanged, the last.

    Raises:
        Exception: it is damaged.
    """
    if image.format != "PNG" or not is_reduced(image):
        return None
    layout = image.tile[0][3]
    image.fp.seek(0)
    again = type(image)(io.BytesIO(image.fp.read()))
    last = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L", "LA;16B": "RGBA"}[layout]
    again.tile = [(*again.tile[0][:3], last)]
    again.load()
    image.load()
    if layout == "LA;16B":  # both bytes of both
        values = np.array(again).view(">u2").astype(np.uint16)
    else:
        values = np.array(image).astype(np.uint16) << 8 | np.array(again)
    key = image.info.get("transparency")
    if isinstance(key, tuple):  # a colour that means transparent
        alpha = np.where((values == key).all(-1, keepdims=True), 0, 0xFFFF).astype(values.dtype)
        values = np.concatenate([values, alpha], -1)
    return Samples(values)


def pnm_samples(image: Any) -> Samples | None:
    """Of an opened PGM or PPM with another largest value than 255 or 65535; None for all others, of Pillow's
    own kinds with transparency or CMYK too.

    A largest value of 1 makes them black and white, dtype bool.

    Raises:
        ValueError: it is damaged.
    """
    if image.format != "PPM" or len(image.getbands()) == 4 or not is_reduced(image):
        return None
    codec, _, offset, (mode, white) = image.tile[0]
    shape = (*image.size[::-1], 3 if mode == "RGB" else 1)
    image.fp.seek(offset)
    data = image.fp.read()
    if codec == "ppm_plain":
        count = int(np.prod(shape))
        words = re.sub(rb"#[^\r\n]*", b" ", data).split(None, count)[:count]
        values = np.array([int(word) for word in words])
    else:
        values = np.frombuffer(data, ">u2" if white > 255 else np.uint8, int(np.prod(shape)))
    if values.max() > white or values.min() < 0:
        raise ValueError(f"a value beyond its largest, {white}")
    values = values.reshape(shape).astype(bool if white == 1 else np.uint16 if white > 255 else np.uint8)
    return Samples(values, None if white in (1, 65535) else white)
