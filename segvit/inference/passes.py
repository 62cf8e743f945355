"""From images to label maps: at once, by sliding windows, at several scales, mirrored (SegViT, section 4.1).

Every run of the network on a piece of a resized image is one *pass*. Only its mask logits on the patch grid
and its class probabilities are kept, and one `semantic_argmax` turns all passes into the label map: scores of
full size never exist.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit.data.names import mirrored_classes
from segvit.inference.protocol import Segmenter
from segvit.options import InferenceOptions
from segvit_kernels import View, Views, semantic_argmax_reference

__all__ = [
    "Pass",
    "check_options",
    "check_region",
    "crops_of",
    "label_maps",
    "label_maps_with_scores",
    "list_views",
    "passes",
    "resize",
    "views_of",
]

_IMAGES = 8  # crops that run together
_PIXELS = 1 << 30  # of a resized image, at most
_WINDOWS = 1 << 17


class Pass(NamedTuple):
    """One run of the network: a crop of the image resized to `resized`, mirrored if `flip`.

    The crop's sides are multiples of the patch size; it may reach beyond the right and bottom edges. Passes
    of one `group` (scale and mirroring) are averaged where they overlap, and then the groups.
    """

    resized: tuple[int, int]
    top: int
    left: int
    crop: tuple[int, int]
    flip: bool
    group: int


def passes(
    size: tuple[int, int], options: InferenceOptions, patch: int, names: Sequence[str] | None = None
) -> list[Pass]:
    """The passes over an image of `size` (height, width), for a network of this patch size and these classes.

    Raises:
        ValueError: an option is out of range, or the window not a multiple of the patch size; mirroring where
            it exchanges classes.
    """
    check_options(options, patch, names)
    found: list[Pass] = []
    factor = options.short_side / min(size) if options.short_side else 1.0
    for scale in options.scales:
        exact = [max(1.0, side * factor * scale) for side in size]
        if not exact[0] * exact[1] <= _PIXELS:
            raise ValueError(
                f"scales, short_side: a picture of {size[1]}x{size[0]} pixels would be resized by "
                f"{factor * scale:.3g}, to more than {_PIXELS:,} pixels"
            )
        height, width = map(round, exact)
        rows, columns = (_windows(side, options, patch) for side in (height, width))
        if len(rows) * len(columns) > _WINDOWS:
            raise ValueError(
                f"stride: {len(rows) * len(columns)} windows on a picture of {width}x{height} pixels, more "
                f"than {_WINDOWS:,}; expected a longer one"
            )
        for flip in (False, True) if options.flip else (False,):
            group = found[-1].group + 1 if found else 0
            for top, crop_height in rows:
                for left, crop_width in columns:
                    crop = (crop_height, crop_width)
                    found.append(Pass((height, width), top, left, crop, flip, group))
    return found


def check_options(options: InferenceOptions, patch: int, names: Sequence[str] | None = None) -> None:
    """Raise ValueError for options that cannot be, for a network of this patch size and these classes."""
    window, stride = options.window, options.stride
    if window is not None and (window < patch or window % patch):
        raise ValueError(f"window: got {window}, expected a multiple of the patch size {patch}")
    if stride is not None:
        if window is None:
            raise ValueError(f"stride: got {stride} without a window")
        if not 0 < stride <= window:
            raise ValueError(f"stride: got {stride}, expected 1 to {window}, the window")
    if not options.scales:
        raise ValueError("scales: got none, expected positive numbers")
    if options.flip and (pairs := mirrored_classes(names)):
        left, right = (names[index] for index in pairs[0]) if names else ("", "")
        raise ValueError(f"flip: {left!r} is {right!r} in a mirrored picture; expected no mirroring")


def _windows(side: int, options: InferenceOptions, patch: int) -> list[tuple[int, int]]:
    """(start, length) of the windows along one side, the last one flush with the end."""
    if options.window is None or side <= options.window:
        return [(0, math.ceil(side / patch) * patch)]
    stride = options.stride or max(1, 2 * options.window // 3)
    last = side - options.window
    return [(min(start, last), options.window) for start in range(0, last + stride, stride)]


@functools.lru_cache(maxsize=64)
def views_of(
    batch: int,
    size: tuple[int, int],
    runs: tuple[Pass, ...],
    grids: tuple[tuple[int, int], ...],
    device: torch.device,
) -> Views | None:
    """The views of a batch, in the order of the passes, whose masks have these grids.

    None where every image is one whole view.
    """
    if len(runs) == 1 and runs[0].resized == runs[0].crop == size and not runs[0].flip:
        return None
    return Views(list_views(batch, size, runs, grids), batch, size, device)


def list_views(
    batch: int, size: tuple[int, int], runs: Sequence[Pass], grids: Sequence[tuple[int, int]]
) -> list[View]:
    """A view for each image of each pass in turn, whose masks have these grids."""
    return [
        View.crop(
            image,
            size,
            resized=run.resized,
            top=run.top,
            left=run.left,
            crop=run.crop,
            grid=grid,
            flip=run.flip,
            group=run.group,
        )
        for run, grid in zip(runs, grids, strict=True)
        for image in range(batch)
    ]


def label_maps(model: Segmenter, images: Tensor, options: InferenceOptions) -> Tensor:
    """Label maps (B, H, W) of normalised images (B, 3, H, W).

    Raises:
        ValueError: options that cannot be; see `passes`.
    """
    patch, size = model.config.backbone.patch_size, (images.shape[-2], images.shape[-1])
    runs = passes(size, options, patch, model.config.class_names)
    outputs = [model(crops) for crops in crops_of(images, runs)]
    grids = tuple(model.mask_grid(run.crop) for run in runs)
    return model.labels(outputs, size, views_of(len(images), size, tuple(runs), grids, images.device))


def label_maps_with_scores(
    model: Segmenter,
    images: Tensor,
    options: InferenceOptions,
    take: Callable[[int, Tensor], None],
    *,
    elements: int = 1 << 23,
) -> Tensor:
    """Label maps (B, H, W) of normalised images, and the scores of which they are the argmax.

    The scores never exist as a whole: `take` gets them in blocks of rows.

    Args:
        model, images, options: as for `label_maps`.
        take: called with the first row and float32 scores (B, N, rows, W) of each block.
        elements: of a block of scores, at most, where a row has no more.

    Raises:
        ValueError: options that cannot be.
    """
    (height, width), count = images.shape[-2:], len(images)
    patch, names = model.config.backbone.patch_size, model.config.class_names
    runs = passes((height, width), options, patch, names)
    parts = [model.scoring(model(crops)) for crops in crops_of(images, runs)]
    masks = [mask[None].float() for stack, _ in parts for mask in stack]
    probabilities = torch.cat([probs.float() for _, probs in parts])
    grids = [model.mask_grid(run.crop) for run in runs]
    views = list_views(count, (height, width), runs, grids)
    kind = torch.uint8 if probabilities.shape[-1] <= 256 else torch.int16
    labels = torch.empty(count, height, width, dtype=kind, device=images.device)
    rows = max(1, elements // (count * width * max(probabilities.shape[1:])))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        cut = {i: part for i, view in enumerate(views) if (part := _cut(view, top, bottom))}
        area = (bottom - top, width)
        labels[:, top:bottom], scores = semantic_argmax_reference(
            [masks[i] for i in cut],
            probabilities[list(cut)],
            area,
            views=Views(list(cut.values()), count, area),
            activation=model.activation,
        )
        take(top, scores)
    return labels


def check_region(region: Sequence[int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """`region` as it is, if it is (left, top, width, height) inside an image of `size` (height, width).

    Raises:
        ValueError: it is not.
    """
    if len(region) != 4:
        raise ValueError(f"region: got {tuple(region)}, expected left, top, width and height")
    left, top, width, height = region
    if not (0 <= left < left + width <= size[1] and 0 <= top < top + height <= size[0]):
        raise ValueError(
            f"region: got {width}x{height} pixels at left {left}, top {top}; expected at least 1x1 inside "
            f"the picture's {size[1]}x{size[0]}"
        )
    return left, top, width, height


def _cut(view: View, top: int, bottom: int) -> View | None:
    """What rows of the output see of a view, counted from the first of them; None where it is nothing."""
    y0, x0, y1, x1 = view.rectangle
    y0, y1 = max(y0, top), min(y1, bottom)
    if y0 >= y1 or x0 >= x1:
        return None
    ay, by, ax, bx = view.affine
    return View(view.image, (ay, by + ay * top, ax, bx), (y0 - top, x0, y1 - top, x1), view.group)


def crops_of(
    images: Tensor, runs: list[Pass], resizing: Callable[[Tensor, tuple[int, int]], Tensor] | None = None
) -> Iterator[Tensor]:
    """What the network sees, (P · B, 3, ch, cw) at a time: P passes in their order, every image of each.

    `resizing` is in place of `resize`.
    """
    size, resized = None, images
    for some in _together(runs, max(1, _IMAGES // max(1, len(images)))):
        if size != some[0].resized:
            size = some[0].resized
            resized = (resizing or resize)(images, size)
        yield torch.cat([_crop(resized, run) for run in some])


def _together(runs: list[Pass], most: int) -> list[list[Pass]]:
    """Neighbours whose crops have one size, at most so many."""
    chunks: list[list[Pass]] = []
    for run in runs:
        last = chunks[-1] if chunks else None
        same = last and (last[0].resized, last[0].crop) == (run.resized, run.crop)
        if last and same and len(last) < most:
            last.append(run)
        else:
            chunks.append([run])
    return chunks


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def _crop(images: Tensor, run: Pass) -> Tensor:
    height, width = run.crop
    crop = images[..., run.top : run.top + height, run.left : run.left + width]
    # 0 is the mean colour.
    crop = F.pad(crop, (0, width - crop.shape[-1], 0, height - crop.shape[-2]))
    return crop.flip(-1) if run.flip else crop
