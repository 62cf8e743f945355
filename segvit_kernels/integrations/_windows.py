"""EoMT's windows, which cover the longer side of a resized image, as views of an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit_kernels.ops.semantic_argmax import View, Views


def check_windows(
    spans: Sequence[tuple[int, int]], target: tuple[int, int], name: str = "target_sizes"
) -> tuple[int, int]:
    """The sides of an image, the shorter one first, whose windows are ``spans`` of the longer one.

    Raises:
        ValueError: it has not the shape of ``target``, the argument ``name`` or one of it.
    """
    side, length = spans[0][1] - spans[0][0], max(end for _, end in spans)
    if abs(side * max(target) / min(target) - length) > 1:  # to rounding, how the image processor resized
        raise ValueError(f"{name} has {target}; its windows are those of an image of {side} × {length}")
    return side, length


def window_views(
    tokens: Tensor,
    spans: Sequence[tuple[int, int]],
    target: tuple[int, int],
    name: str = "target_sizes",
    *,
    stitch: bool,
) -> tuple[Tensor, Views]:
    """The windows of one image, ``spans`` of its longer side, as views of its target.

    Without ``stitch`` a pixel of the target takes the mean of the windows around it. EoMT takes the mean on
    the grid of its input and interpolates that, across the edges of windows too. To get this from views,
    every window is divided by how many cover its rows and set between zeros, into which its interpolation
    fades. (The mean over views then divides the scores of a pixel once more, and the zeros at the edge of the
    image scale them too, but all of a pixel's scores alike: the best stays the best.)
    """
    side, length = check_windows(spans, target, name)
    tall = target[0] > target[1]
    margin = 0
    if stitch:
        cover = tokens.new_zeros(length)
        for start, end in spans:
            cover[start:end] += 1
        share = torch.stack([1 / cover[start:end] for start, end in spans])
        tokens *= share[:, None, :, None] if tall else share[:, None, None, :]
        tokens = F.pad(tokens, (0, 0, 1, 1) if tall else (1, 1, 0, 0))
        margin = 1
    views = [
        View.crop(
            0,
            target,
            resized=(length, side) if tall else (side, length),
            top=start - margin if tall else 0,
            left=0 if tall else start - margin,
            crop=(side + 2 * margin, side) if tall else (side, side + 2 * margin),
            grid=(tokens.shape[-2], tokens.shape[-1]),
        )
        for start, _ in spans
    ]
    return tokens, Views(views, batch=1, size=target, device=tokens.device)
