"""Where predictions on small grids lie in an output: windows, scales, flips."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from segvit_kernels.ops._checks import size_pair, whole


@dataclasses.dataclass(frozen=True)
class View:
    """How one prediction on a small grid maps to the output.

    Attributes:
        image: which output it belongs to.
        affine: (ay, by, ax, bx): output row y reads grid row ay·y + by, clamped to [0, h − 1], where i is the
            centre of cell i; columns likewise. A negative step is a flip.
        rectangle: (top, left, bottom, right) of the output pixels it covers, half open.
        group: views of a group are averaged first, then the groups.
    """

    image: int
    affine: tuple[float, float, float, float]
    rectangle: tuple[int, int, int, int]
    group: int = 0

    @classmethod
    def whole(cls, image: int, grid: tuple[int, int], size: tuple[int, int], group: int = 0) -> View:
        """A grid (h, w) stretched over the whole output (H, W), as ``F.interpolate`` does."""
        return cls.crop(image, size, size, 0, 0, size, grid, group=group)

    @classmethod
    def crop(
        cls,
        image: int,
        size: tuple[int, int],
        resized: tuple[int, int],
        top: int,
        left: int,
        crop: tuple[int, int],
        grid: tuple[int, int],
        flip: bool = False,
        group: int = 0,
    ) -> View:
        """The prediction on a crop of the resized image.

        Args:
            image: which output it belongs to.
            size: (H, W) of the output.
            resized: (rh, rw), the size to which the image was resized before cropping.
            top, left: first row and column of the crop in the resized image.
            crop: (ch, cw), what the network saw, padding included.
            grid: (h, w) of the prediction.
            flip: the crop was mirrored left-right before the network.
            group: see :class:`View`.

        The rectangle holds the output pixels whose centre lies in the crop.
        """
        given = {"size": size, "resized": resized, "crop": crop, "grid": grid}
        (H, W), (rh, rw), (ch, cw), (h, w) = (size_pair(name, pair) for name, pair in given.items())
        ay, by = _crop_axis(H, rh, top, ch, h)
        ax, bx = _crop_axis(W, rw, left, cw, w)
        if flip:
            ax, bx = -ax, (w - 1) - bx
        (y0, y1), (x0, x1) = _covered(H, rh, top, ch), _covered(W, rw, left, cw)
        return cls(image, (ay, by, ax, bx), (y0, x0, y1, x1), group)


def _crop_axis(size: int, resized: int, start: int, length: int, cells: int) -> tuple[float, float]:
    """Step and offset from output pixels to the cells of a crop."""
    scale = resized / size
    return scale * cells / length, (scale / 2 - start) * cells / length - 0.5


def _covered(size: int, resized: int, start: int, length: int) -> tuple[int, int]:
    """The output pixels y whose centre (y + 1/2)·resized/size lies in [start, start + length)."""
    first, last = (-((resized - 2 * edge * size) // (2 * resized)) for edge in (start, start + length))
    return min(max(first, 0), size), min(max(last, 0), size)


class Views:
    """The views of a batch, checked once and ready on a device.

    Args:
        views: one :class:`View` per mask, in the order of ``mask_logits``.
        batch: number of outputs.
        size: (H, W) of every output.
        device: where the masks will be.

    Attributes:
        views, batch, size: as given.
        reach: the largest \\|ay\\| and \\|ax\\|, by which a kernel plans its tiles.
        tensors: ``starts`` (B + 1) int32, the first view of every image; ``layout`` (V, 7) int32: index in
            the caller's order, group, number of views of that group and image, top, left, bottom, right;
            ``affine`` (V, 4) float32; the latter two sorted by image, then group.

    Raises:
        TypeError: one of the views is none; the batch, a side, a view's image, group or an edge of its
            rectangle is no whole number.
        ValueError: the batch, the size, a view's image, rectangle or map is out of range, or an output pixel
            is not covered.
    """

    def __init__(
        self,
        views: Sequence[View],
        batch: int,
        size: tuple[int, int],
        device: torch.device | str | None = None,
    ) -> None:
        height, width = size_pair("size", size)
        self.views, self.batch, self.size = tuple(views), whole("batch", batch, 0), (int(height), int(width))
        for index, view in enumerate(self.views):
            _check_view(index, view, batch, self.size)
        for image in range(batch):
            _check_coverage(image, [v.rectangle for v in self.views if v.image == image], self.size)
        self.reach = [max((abs(v.affine[i]) for v in self.views), default=0.0) for i in (0, 2)]
        order = sorted(range(len(self.views)), key=lambda i: (self.views[i].image, self.views[i].group))
        members: dict[tuple[int, int], int] = {}
        starts = [0] * (batch + 1)
        for view in self.views:
            members[view.image, view.group] = members.get((view.image, view.group), 0) + 1
            starts[view.image + 1] += 1
        layout, affine = [], []
        for index in order:
            view = self.views[index]
            layout.append([index, view.group, members[view.image, view.group], *view.rectangle])
            affine.append(view.affine)
        self.tensors = [
            torch.tensor(starts, dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32),
            torch.tensor(layout, dtype=torch.int32, device="cpu").view(-1, 7),
            torch.tensor(affine, dtype=torch.float32, device="cpu").view(-1, 4),
        ]
        if device is not None:
            self.tensors = [t.to(device) for t in self.tensors]

    def __len__(self) -> int:
        return len(self.views)

    def to(self, device: torch.device | str) -> Views:
        """The same views with their tensors on ``device``."""
        moved = object.__new__(Views)
        moved.__dict__.update(self.__dict__, tensors=[t.to(device) for t in self.tensors])
        return moved


def _check_view(index: int, view: View, batch: int, size: tuple[int, int]) -> None:
    if not isinstance(view, View):
        raise TypeError(f"view {index} is a {type(view).__name__}; expected a View")
    for name, values in (("image", [view.image]), ("group", [view.group]), ("rectangle", view.rectangle)):
        for value in values:
            whole(f"{name} of view {index}", value)
    top, left, bottom, right = view.rectangle
    if not 0 <= view.image < batch:
        raise ValueError(f"view {index} has image {view.image}; expected 0 to {batch - 1}")
    if not (0 <= top <= bottom <= size[0] and 0 <= left <= right <= size[1]):
        raise ValueError(
            f"view {index} has rectangle {view.rectangle}; expected (top, left, bottom, right) inside an "
            f"output of size {size}"
        )
    if not all(map(math.isfinite, view.affine)) or 0 in view.affine[::2]:
        raise ValueError(f"view {index} has affine {view.affine}; expected finite numbers and nonzero steps")


def _check_coverage(image: int, rectangles: list[tuple[int, int, int, int]], size: tuple[int, int]) -> None:
    """Look at one pixel of every cell into which the rectangles' edges cut the output."""
    box = torch.tensor(rectangles, device="cpu").view(-1, 4)
    rows = torch.tensor(sorted({0, *(edge for r in rectangles for edge in r[::2])} - {size[0]}), device="cpu")
    columns = torch.tensor(sorted({0, *(e for r in rectangles for e in r[1::2])} - {size[1]}), device="cpu")
    inside_y = (box[:, :1] <= rows) & (rows < box[:, 2:3])
    inside_x = (box[:, 1:2] <= columns) & (columns < box[:, 3:])
    bare = (inside_y.float().T @ inside_x.float() == 0).nonzero()
    if len(bare):
        pixel = (int(rows[bare[0, 0]]), int(columns[bare[0, 1]]))
        raise ValueError(f"the views of image {image} do not cover pixel {pixel} of an output of size {size}")
