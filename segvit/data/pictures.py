"""The one reader of pictures, for `predict`, training, Python and `bench`.

Pictures are read as people see them: turned as EXIF says, transparent parts on white, every colour space as
RGB, and values of more than 8 bits scaled to 0...255, never clipped (`to_bytes` says how). Of several frames
the first counts.

Every problem with a file is a `ValueError` or `FileNotFoundError` of one line that names the file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segvit.data.decoding import (
    ORIENTATION,
    PictureBytes,
    Source,
    TooLargeError,
    WholeMessageError,
    array_shape,
    load_array,
    load_pixels,
    named,
    open_picture,
    orientation_of,
    read_tiff,
    source_of,
    stored_samples,
    tiff_orientation,
    tiff_series,
    turned,
)
from segvit.data.depth import is_reduced, tiff_bits
from segvit.system.extras import require

__all__ = ["PictureBytes", "TooLargeError", "as_rgb", "image_tensor", "probe", "read_image", "to_bytes"]

Range = Sequence[float] | None


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
    path = source_of(path)
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
    with open_picture(path) as again:
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
            raise WholeMessageError(f"value_range: got {pairs.size} numbers, {expected}")
        low, high = pairs.reshape(-1, 2).T
        if not (low < high).all():
            raise WholeMessageError(f"value_range: got {list(value_range)}, expected each low below its high")
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
    path = source_of(path)
    if path.suffix.lower() == ".npy":
        shape = array_shape(path)
        # As `_channels_last` takes grey and colours; of other numbers of channels it is the smaller side.
        last = len(shape) == 2 or shape[-1] in (1, 3) or (shape[0] not in (1, 3) and shape[-1] <= shape[0])
        return (shape[1], shape[0]) if last else (shape[2], shape[1])
    image = open_picture(path)
    if image is None:
        if decode:
            height, width = read_tiff(path).shape[:2]
            return width, height
        with tiff_series(path) as series:
            width, height = series.sizes.get("width", 1), series.sizes.get("height", 1)
            return (height, width) if tiff_orientation(series) >= 5 else (width, height)
    with image:
        width, height = image.size
        if image.format == "TIFF":  # which some Pillows turn as they open it, and some as they read it
            width, height = image.tag_v2[256], image.tag_v2[257]
            if image.tag_v2.get(ORIENTATION) in range(5, 9):
                width, height = height, width
        if not decode:
            return width, height
        with named(path):
            # A quarter of the work for JPEGs, and all of their data is looked at.
            image.draft(None, (max(1, width // 8), max(1, height // 8)))
            load_pixels(image)
        return (height, width) if orientation_of(image) >= 5 else (width, height)


def _decode_picture(path: Source, channels: int, value_range: Range) -> np.ndarray:
    """uint8 (H, W, channels)."""
    if path.suffix.lower() == ".npy":
        samples = _channels_last(load_array(path), channels, path)
        return _fit_channels(to_bytes(samples, value_range), channels, path)
    image = open_picture(path)
    if image is not None:
        with image:
            if not (image.format == "TIFF" and _needs_tifffile(image, channels)):
                with named(path):
                    return _from_pil(image, channels, value_range, path)
    return _fit_channels(to_bytes(read_tiff(path), value_range), channels, path)


def _from_pil(image: Any, channels: int, value_range: Range, name: Any) -> np.ndarray:
    """uint8 (H, W, channels) of a PIL image, upright."""
    if stored := stored_samples(image, name):
        full = value_range or ((0, stored.white) if stored.white else None)
        return _fit_channels(_on_white(stored.values, channels, full), channels, name)
    if value_range is not None and is_reduced(image):
        raise WholeMessageError(
            f"{name}: value_range: got a {image.format} of more than 8 bits of a kind that is not read in "
            "full, expected PNG, or TIFF of grey or RGB"
        )
    load_pixels(image)
    turn = orientation_of(image)
    if image.mode[0] in "IF":  # "I", "I;16", "I;16B", "F"
        samples = to_bytes(np.array(image)[..., None], value_range)
    elif channels in (1, 3):
        samples = np.array(_flattened(image).convert("L" if channels == 1 else "RGB"))
        samples = samples if samples.ndim == 3 else samples[..., None]
        samples = samples if value_range is None else to_bytes(samples, value_range)
    else:
        samples = np.array(image)
        samples = to_bytes(samples if samples.ndim == 3 else samples[..., None], value_range)
    return np.ascontiguousarray(_fit_channels(turned(samples, turn), channels, name))


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
    raise WholeMessageError(f"{name}: has {found} channels, expected {channels}")


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


def _needs_tifffile(image: Any, channels: int) -> bool:
    """Whether Pillow would lose channels of a TIFF, or bits of one that is no colour picture."""
    samples = image.tag_v2.get(277, 1)
    if samples > len(image.getbands()):  # those beside colours
        return True
    return channels not in (1, 3) and (samples != channels or (samples > 1 and tiff_bits(image) > 8))


def _tensor(samples: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(samples)).permute(2, 0, 1).contiguous()
