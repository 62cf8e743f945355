"""A segmentation set drawn from a seed: textured things over indoor and outdoor scenes, with exact labels.

Every class has a material (stripes, planks, bricks, checks, sprinkles, leaves, scales, rings) and a usual
outline, so that a label follows from what is seen and not from colour alone: hues vary from thing to thing
and overlap between classes. Outlines are signed distances in pixels, negative inside; one field gives the
label (exactly its negative side), the anti-aliased edge, the rounded shading and the cast shadow.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

__all__ = ["CLASS_NAMES", "PALETTE", "SyntheticShapes"]

CLASS_NAMES = (
    "sky", "field", "wall", "floor", "ball", "crate", "tower", "star", "donut", "bush", "fish", "shield",
)  # fmt: skip
PALETTE = (
    (118, 182, 232), (128, 158, 72), (214, 196, 170), (142, 120, 140), (228, 56, 56), (158, 98, 42),
    (255, 128, 66), (250, 212, 40), (242, 120, 186), (20, 108, 60), (0, 166, 166), (58, 72, 190),
)  # fmt: skip
SPLITS = ("training", "validation")

Array = np.ndarray
Random = np.random.Generator


class _Kind(NamedTuple):
    outline: Callable[[Array, Array, float, Random], Array]
    material: Callable[[Array, Array, float, Random], Array]
    hues: tuple[float, float]  # of the two colours of the material, on 0..1
    saturation: tuple[float, float]
    value: tuple[float, float]


# Outlines: local coordinates u, v (pixels, already rotated) and a radius -> signed distance in pixels.


def _disc(u: Array, v: Array, radius: float, rng: Random) -> Array:
    return np.hypot(u, v) - radius


def _box(u: Array, v: Array, radius: float, rng: Random) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - 0.85 * radius


def _tall_box(u: Array, v: Array, radius: float, rng: Random) -> Array:
    battlement = 0.1 * radius * np.sign(np.sin(u * (9.4 / radius)))
    return np.maximum(np.abs(u) - 0.62 * radius, np.abs(v) - 1.15 * radius - battlement * (v < 0))


def _star(u: Array, v: Array, radius: float, rng: Random) -> Array:
    points = rng.integers(5, 7)
    sector = np.pi / points
    angle = np.abs(np.mod(np.arctan2(v, u), 2 * sector) - sector)
    distance = np.hypot(u, v)
    # The straight edge from a tip at angle 0 to an inner corner at half the radius.
    tip, corner = 1.2 * radius, 0.62 * radius
    edge = np.array([corner * np.cos(sector) - tip, corner * np.sin(sector)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (distance * np.cos(angle) - tip) * normal[0] + distance * np.sin(angle) * normal[1]


def _ring(u: Array, v: Array, radius: float, rng: Random) -> Array:
    hole = rng.uniform(0.32, 0.42)
    middle, width = 0.5 * (1 + hole) * radius, 0.5 * (1 - hole) * radius
    return np.abs(np.hypot(u, v) - middle) - width


def _blob(u: Array, v: Array, radius: float, rng: Random) -> Array:
    angle = np.arctan2(v, u)
    wobble = sum(
        rng.uniform(0.02, 0.3 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5, 9)
    )
    return np.hypot(u, v) - radius * (1 + wobble)


def _fish(u: Array, v: Array, radius: float, rng: Random) -> Array:
    body = (np.hypot(u / (1.25 * radius), v / (0.7 * radius)) - 1) * 0.75 * radius
    tail = np.maximum(np.abs(v) - 0.75 * (u - 0.85 * radius), u - 1.6 * radius)
    return np.minimum(body, 0.8 * tail)


def _hexagon(u: Array, v: Array, radius: float, rng: Random) -> Array:
    a, b = 0.5 * u, np.sqrt(0.75, dtype=np.float32) * v
    return np.maximum(np.maximum(np.abs(a + b), np.abs(a - b)), np.abs(u)) - 0.95 * radius


# Materials: local coordinates and a period in pixels -> the share of the second colour, 0..1.


def _soft(x: Array, width: float = 0.15) -> Array:
    return np.clip(0.5 + x / (2 * width), 0, 1)


def _stripes(u: Array, v: Array, period: float, rng: Random) -> Array:
    return _soft(np.sin(u * (np.pi / period)), 0.3)


def _planks(u: Array, v: Array, period: float, rng: Random) -> Array:
    across = v / (1.3 * period)
    gap = _soft(np.abs(across - np.round(across)) - 0.38, 0.08)
    grain = 0.5 + 0.5 * np.sin(u * 0.6 / period + 5 * np.sin(np.floor(across + 0.5) * 2.4) + 9 * across)
    return np.maximum(gap, 0.35 * grain)


def _bricks(u: Array, v: Array, period: float, rng: Random) -> Array:
    row = v / (0.75 * period)
    column = u / (1.5 * period) + 0.5 * np.mod(np.floor(row), 2)
    joint_row = np.abs(np.mod(row, 1) - 0.5)
    joint_column = np.abs(np.mod(column, 1) - 0.5)
    return np.maximum(_soft(joint_row - 0.36, 0.08), _soft(joint_column - 0.43, 0.05))


def _checks(u: Array, v: Array, period: float, rng: Random) -> Array:
    return _soft(np.sin(u * (np.pi / period)) * np.sin(v * (np.pi / period)))


def _sprinkles(u: Array, v: Array, period: float, rng: Random) -> Array:
    row = v / (0.7 * period)
    column = u / (0.9 * period) + 0.5 * np.mod(np.floor(row), 2)
    return _soft(0.3 - np.hypot(np.mod(row, 1) - 0.5, np.mod(column, 1) - 0.5), 0.12)


def _leaves(u: Array, v: Array, period: float, rng: Random) -> Array:
    phase = rng.uniform(0, 6.28, 3)
    a = np.sin(u * (3.1 / period) + 1.8 * np.sin(v * (2.3 / period) + phase[0]))
    b = np.sin(v * (3.7 / period) + 1.8 * np.sin(u * (2.9 / period) + phase[1]) + phase[2])
    return 0.5 + 0.5 * a * b


def _scales(u: Array, v: Array, period: float, rng: Random) -> Array:
    row = u / (0.6 * period)
    column = v / period + 0.5 * np.mod(np.floor(row), 2)
    depth = np.mod(row, 1) - 1.6 * (np.mod(column, 1) - 0.5) ** 2
    return np.clip(1.1 - np.mod(depth, 1) * 1.4, 0, 1)


def _rings(u: Array, v: Array, period: float, rng: Random) -> Array:
    return _soft(np.sin(np.hypot(u, v) * (np.pi / (0.8 * period))), 0.3)


_THINGS: dict[str, _Kind] = {
    "ball": _Kind(_disc, _stripes, (0.0, 0.1), (0.85, 0.08), (0.85, 0.95)),
    "crate": _Kind(_box, _planks, (0.08, 0.07), (0.6, 0.7), (0.72, 0.3)),
    "tower": _Kind(_tall_box, _bricks, (0.03, 0.1), (0.62, 0.12), (0.62, 0.8)),
    "star": _Kind(_star, _checks, (0.14, 0.1), (0.85, 0.8), (0.95, 0.55)),
    "donut": _Kind(_ring, _sprinkles, (0.92, 0.14), (0.5, 0.25), (0.92, 1.0)),
    "bush": _Kind(_blob, _leaves, (0.33, 0.27), (0.8, 0.65), (0.25, 0.62)),
    "fish": _Kind(_fish, _scales, (0.5, 0.53), (0.75, 0.35), (0.45, 0.9)),
    "shield": _Kind(_hexagon, _rings, (0.63, 0.6), (0.75, 0.15), (0.62, 0.88)),
}


@lru_cache(maxsize=64)
def _ramp(cells: int, size: int) -> Array:
    """Linear interpolation from `cells` knots to `size` pixels, (size, cells)."""
    position = np.linspace(0, cells - 1, size, dtype=np.float32)[:, None]
    return np.maximum(0, 1 - np.abs(position - np.arange(cells, dtype=np.float32)))


def _smooth_noise(rng: Random, height: int, width: int, rows: int, columns: int) -> Array:
    knots = rng.random((rows, columns), dtype=np.float32)
    return _ramp(rows, height) @ knots @ _ramp(columns, width).T


def _colour(rng: Random, hue: float, saturation: float, value: float, jitter: float = 0.045) -> Array:
    hue = (hue + rng.uniform(-jitter, jitter)) % 1.0
    saturation = np.clip(saturation * rng.uniform(0.75, 1.15), 0, 1)
    value = np.clip(value * rng.uniform(0.82, 1.12), 0, 1)
    return np.asarray(colorsys.hsv_to_rgb(hue, float(saturation), float(value)), dtype=np.float32)


def _blend(share: Array, first: Array, second: Array) -> Array:
    return first + share[..., None] * (second - first)


def _scene(rng: Random, size: int) -> tuple[Array, Array]:
    """Sky over a field, or a wall over a floor: picture (size, size, 3) on 0..1 and labels (size, size)."""
    outdoor = rng.random() < 0.5
    horizon = round(size * rng.uniform(0.3, 0.65))
    picture = np.empty((size, size, 3), dtype=np.float32)
    label = np.empty((size, size), dtype=np.uint8)
    label[:horizon], label[horizon:] = (0, 1) if outdoor else (2, 3)
    below = size - horizon
    down = np.linspace(0, 1, horizon, dtype=np.float32)[:, None]
    columns = np.arange(size, dtype=np.float32)[None, :] - rng.uniform(0.2, 0.8) * size
    nearness = np.linspace(0.25, 1.25, below, dtype=np.float32)[:, None]
    depth = 3.0 / nearness  # perspective: rows crowd towards the horizon
    if outdoor:
        evening = rng.random() < 0.3
        zenith = _colour(rng, 0.6, 0.6, 0.75)
        haze = _colour(rng, 0.06, 0.5, 1.0) if evening else _colour(rng, 0.56, 0.18, 0.97)
        clouds = _smooth_noise(rng, horizon, size, 5, 7) + 0.5 * _smooth_noise(rng, horizon, size, 11, 15)
        picture[:horizon] = _blend(np.broadcast_to(down, (horizon, size)), zenith, haze)
        picture[:horizon] += 0.55 * np.clip(clouds - 0.85, 0, 0.5)[..., None]
        blades = _smooth_noise(rng, below, size, max(2, below // 3), max(2, size // 2))
        patches = _smooth_noise(rng, below, size, 4, 6)
        light = _colour(rng, rng.choice([0.17, 0.24]), 0.5, 0.72)
        picture[horizon:] = _blend(0.6 * patches + 0.5 * blades * nearness, 0.5 * light, 1.1 * light)
    else:
        paint = _colour(rng, rng.random(), 0.22, 0.82)
        panels = rng.integers(3, 8)
        seam = _soft(np.abs(np.mod(columns * (panels / size), 1) - 0.5) - 0.47, 0.02)
        plaster = _smooth_noise(rng, horizon, size, 9, 13)
        picture[:horizon] = (0.88 + 0.16 * plaster - 0.18 * seam)[..., None] * paint
        board = max(2, horizon // 14)
        picture[horizon - board : horizon] = 0.55 * paint + 0.25
        wood = _colour(rng, rng.choice([0.05, 0.09, 0.6]), 0.35, 0.5)
        along = columns * (depth * (6.0 / size))
        tiles = np.sin(along) * np.sin(depth * 9.0)
        picture[horizon:] = (0.92 + 0.2 * _soft(tiles, 0.2))[..., None] * wood
        picture[horizon:] *= (0.75 + 0.3 * nearness)[..., None]
    return picture, label


def _draw_thing(picture: Array, label: Array, rng: Random, name: str, light: Array) -> None:
    size = label.shape[0]
    kind = _THINGS[name]
    radius = size * rng.uniform(0.12, 0.24)
    centre = size * rng.uniform([0.1, 0.18], [0.9, 0.92])  # x, y
    upright = name in ("tower", "bush")
    turn = rng.uniform(-0.2, 0.2) if upright else rng.uniform(-np.pi, np.pi)
    squeeze = rng.uniform(0.85, 1.18)
    reach = int(1.85 * radius) + 2
    left, top = max(0, int(centre[0]) - reach), max(0, int(centre[1]) - reach)
    right, bottom = min(size, int(centre[0]) + reach), min(size, int(centre[1]) + reach)
    x = np.arange(left, right, dtype=np.float32)[None, :] - np.float32(centre[0])
    y = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(centre[1])
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u, v = (c * x + s * y) * np.float32(squeeze), (c * y - s * x) / np.float32(squeeze)

    distance = kind.outline(u, v, radius, rng)
    inside = distance < 0
    # The shadow is the same outline, moved away from the light and blurred by its own distance.
    dx, dy = (round(float(t)) for t in -light * 0.16 * radius)
    shade = 0.5 * np.clip(0.5 - distance / (0.3 * radius), 0, 1)
    _darken(picture, shade, top + dy, left + dx)

    period = size * rng.uniform(0.05, 0.075)
    share = kind.material(u, v, period, rng)
    colours = [
        _colour(rng, h, sat, val)
        for h, sat, val in zip(kind.hues, kind.saturation, kind.value, strict=True)
    ]  # fmt: skip
    surface = _blend(share, colours[0], colours[1])
    rounding = np.clip(1 + distance / (0.35 * radius), 0, 1) ** 2  # 0 in the middle, 1 at the edge
    towards = (x * light[0] + y * light[1]) / radius
    surface *= (1.02 - 0.3 * rounding + 0.24 * np.clip(towards, -1, 1))[..., None]
    alpha = np.clip(0.5 - distance, 0, 1)[..., None]
    window = picture[top:bottom, left:right]
    window += alpha * (surface - window)
    label[top:bottom, left:right][inside] = CLASS_NAMES.index(name)


def _darken(picture: Array, shade: Array, top: int, left: int) -> None:
    """Multiply the part of `picture` under `shade` placed at (top, left) by 1 - shade."""
    height, width = picture.shape[:2]
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(height, top + shade.shape[0]), min(width, left + shade.shape[1])
    if y0 < y1 and x0 < x1:
        picture[y0:y1, x0:x1] *= (1 - shade[y0 - top : y1 - top, x0 - left : x1 - left])[..., None]


def _photograph(picture: Array, rng: Random, light: Array) -> Array:
    """Uneven light, white balance, contrast and sensor noise; to uint8."""
    size = picture.shape[0]
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    strength = rng.uniform(0.05, 0.22)
    picture *= (1 + strength * (light[0] * ramp[None, :] + light[1] * ramp[:, None]))[..., None]
    picture *= (rng.uniform(0.8, 1.12) * rng.uniform(0.94, 1.06, 3)).astype(np.float32)
    picture += rng.uniform(0.01, 0.035) * rng.standard_normal(picture.shape, dtype=np.float32)
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def draw(rng: Random, size: int) -> tuple[Array, Array]:
    """One picture (size, size, 3) uint8 with its label map (size, size) uint8, from a random generator."""
    angle = rng.uniform(-0.9, 0.9)
    light = np.array([np.sin(angle), -np.cos(angle)], dtype=np.float32)  # unit vector towards the lamp
    picture, label = _scene(rng, size)
    for name in rng.choice(list(_THINGS), size=rng.integers(3, 7)):
        _draw_thing(picture, label, rng, str(name), light)
    return _photograph(picture, rng, light), label


class SyntheticShapes(Dataset):
    """`length` pictures of `size` x `size` pixels; item i depends only on (seed, split, i).

    Items are like those of `segvit.data.SegmentationFolder`: {"image": uint8 (3, size, size), "label": int64
    (size, size), "name": str}. Every pixel has a label.

    Raises:
        ValueError: an unknown split, a negative length, or a size under 32.
    """

    num_classes = len(CLASS_NAMES)
    class_names = CLASS_NAMES
    palette = PALETTE
    ignore_index = 255

    def __init__(self, split: str = "training", length: int = 2048, size: int = 96, seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
        if length < 0:
            raise ValueError(f"length: got {length}, expected at least 0")
        if size < 32:
            raise ValueError(f"image_size: got {size}, expected at least 32 for synthetic images")
        self.split, self.length, self.size, self.seed = split, length, size, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} of a set of {self.length}")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        picture, label = draw(rng, self.size)
        return {
            "image": torch.from_numpy(picture).permute(2, 0, 1).contiguous(),
            "label": torch.from_numpy(label.astype(np.int64)),
            "name": f"{self.split}/{index:06d}",
        }
