"""From uint8 pictures to label maps as one graph of ordinary operators, for any runtime.

The network is the model's own; its fused operators become the products, softmax and norms that define them.
The tail is the definition of `segvit_kernels.semantic_argmax` in blocks of rows, so that class scores of full
size never exist: interpolation of a block is two products with matrices of hat functions, then sigmoid, class
mixing and argmax. Where the size is fixed the blocks stand one after the other in the graph; where it is not
they are the turns of one scan.

Windows, scales and flips share the output as in `segvit.inference.passes`. Their edges cut it into cells in
which the same views see every pixel: there the mean over views is one product, of the weighted class
probabilities of all of them with all their masks. Views whose masks have one grid stand behind each other, so
that a block is a handful of nodes however many see it: what exporters do takes the square of their number.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.export import Dim

from segvit.inference.engine import copy_of
from segvit.inference.passes import Pass, check_options, crops_of, list_views, passes, resize
from segvit.inference.protocol import Foldable
from segvit.model.segvit import SegViT
from segvit.options import InferenceOptions
from segvit_kernels import (
    View,
    atm_reference,
    linear_reference,
    query_attention_reference,
    subsample_layer_norm_reference,
)

__all__ = ["LabelGraph", "Plan", "arranged", "example", "plain_program"]

_BUDGET = 1 << 19  # elements of a block of masks: 2 MiB stay in a core's cache
_BLOCKS = 64  # that a graph of fixed size holds, about
_ROWS = 8  # of a block where the size is open


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a graph takes and gives.

    Attributes:
        size: height and width of the pictures; None: any.
        batch: pictures of a call; None: any number.
        channels_last: pictures are (B, H, W, channels), else (B, channels, H, W).
        outputs: "labels"; "scores": the winner's score too; "logits": mask logits and class probabilities in
            place of labels.
        dtype: of the network; the tail is float32 always.
        int8: the backbone's projections in 8 bits.
        calibration: uint8 pictures (B, channels, H, W), by which the range of their inputs is found.
        options: windows, scales, mirroring.
    """

    size: tuple[int, int] | None = None
    batch: int | None = 1
    channels_last: bool = False
    outputs: str = "labels"
    dtype: torch.dtype = torch.float32
    int8: bool = False
    calibration: tuple[Tensor, ...] = ()
    options: InferenceOptions = dataclasses.field(default_factory=InferenceOptions)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the outputs, in order."""
        return {
            "labels": ("labels",),
            "scores": ("labels", "scores"),
            "logits": ("mask_logits", "class_probabilities"),
        }[self.outputs]

    def check(self, patch: int, names: Sequence[str] | None = None) -> None:
        """Raise ValueError for what does not go together, for a network of this patch size and classes."""
        check_options(self.options, patch, names)
        several = [
            name
            for name, plain in (("window", None), ("scales", [1.0]), ("flip", False), ("short_side", None))
            if getattr(self.options, name) != plain
        ]
        if several and self.size is None:
            raise ValueError(f"{several[0]}: is laid out in the graph for one size; expected size too")
        if several and self.batch is None:
            raise ValueError(f"{several[0]}: is laid out in the graph for one batch; expected batch too")
        if several and self.outputs == "logits":
            raise ValueError(f"{several[0]}: logits are of one pass over the picture; expected labels")
        sides = self.size if isinstance(self.size, (tuple, list)) else ()
        if self.size is not None and (len(sides) != 2 or not all(map(_positive, sides))):
            raise ValueError(f"size: got {self.size}, expected height and width in pixels")
        if self.batch is not None and not _positive(self.batch):
            raise ValueError(f"batch: got {self.batch}, expected at least 1")

    def check_pictures(self, channels: int) -> None:
        """Raise TypeError or ValueError for pictures to calibrate on that the graph does not take; some
        runtimes would convert them, and find other ranges."""
        wanted = (self.batch, channels, *(self.size or (None, None)))
        for pictures in self.calibration:
            if not isinstance(pictures, Tensor) or pictures.dtype != torch.uint8:
                got = getattr(pictures, "dtype", type(pictures).__name__)
                raise TypeError(f"calibration: got {got}, expected uint8 pictures")
            shape = tuple(pictures.shape)
            if len(shape) != 4 or any(
                want not in (None, got) for want, got in zip(wanted, shape, strict=True)
            ):
                sides = ", ".join(str(want or name) for want, name in zip(wanted, "BCHW", strict=True))
                raise ValueError(f"calibration: got shape {shape}, expected ({sides})")

    def check_calibration(self) -> None:
        """Raise ValueError for int8 without pictures, for a format that finds ranges by them."""
        if self.int8 and not self.calibration:
            raise ValueError("calibrate: expected pictures, to find the ranges that int8 stands for")


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class LabelGraph(nn.Module):
    """uint8 pictures to what a plan asks for, from a copy of the model.

    Labels (B, H, W) are uint8, int16 for more than 256 classes; scores float32 (B, H, W); mask logits
    float32 (B, Q, h, w) and class probabilities float32 (B, Q, N), or their diagonal (B, N) of a model that
    does not mix classes; the grid is that of the picture padded at the right and bottom to multiples of the
    patch size.

    Args:
        dtype: of the network, in place of the plan's.

    Raises:
        ValueError: what the plan asks for does not go together.
    """

    def __init__(self, model: SegViT, plan: Plan, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.plan, self.patch = plan, model.config.backbone.patch_size
        plan.check(self.patch, model.config.class_names)
        backbone = model.config.backbone
        if plan.size is None and backbone.absolute_positions and "antialias" in backbone.position_resize:
            raise ValueError(
                f"size: {backbone.position_resize} of positions differs between runtimes; expected one size"
            )
        self.classes, self.activation = model.config.num_classes, model.activation
        self.mixed = model.mixes_classes  # else every mask has a factor
        self.network = cast(Any, copy_of(cast(Foldable, model)))
        self.network.eval().unfuse().requires_grad_(False).float().cpu()
        self.runs: list[Pass] = []
        if plan.size is not None:
            self.runs = passes(plan.size, plan.options, self.patch)
            if len({run.crop for run in self.runs}) == 1:
                self.network.fold_grid(self.runs[0].crop)
            self._lay_out(plan.size)
        self.network.to(dtype or plan.dtype).fuse()

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        if self.plan.channels_last:
            pictures = pictures.permute(0, 3, 1, 2)
        height, width = pictures.shape[-2:]
        images = self.network.preprocess(pictures)
        if len(self.runs) > 1:
            outputs = [self.network(crops) for crops in crops_of(images, self.runs, self._resize)]
        else:
            if self.runs:
                images = self._resize(images, self.runs[0].resized)
            images = self.network.pad_to_patches(images)
            outputs = [self.network(images)]
        found = [self.network.scoring(output) for output in outputs]
        parts = [(masks.float(), mixing.float()) for masks, mixing in found]
        if self.plan.outputs == "logits":
            return parts[0]
        if self.runs:
            labels, scores = self._blocks([masks for masks, _ in parts], [mixing for _, mixing in parts])
        else:
            labels, scores = self._scan(*parts[0], (height, width), (images.shape[2], images.shape[3]))
        labels = labels.to(torch.uint8 if self.classes <= 256 else torch.int16)
        return (labels, scores) if self.plan.outputs == "scores" else (labels,)

    def _resize(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """`segvit.inference.passes.resize` as two products with constants.

        It is antialiased, and what runtimes make of that differs: OpenVINO's is wrong where it shrinks.
        """
        height, width = images.shape[-2:]
        if (height, width) == size:
            return images
        down, across = getattr(self, f"rows_{size[0]}"), getattr(self, f"columns_{size[1]}")
        return down.to(images.dtype) @ images @ across.to(images.dtype)

    # The tail

    def _mix(self, mixing: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Labels int32 (B, rows, columns), and scores where they are asked for, else labels once more.

        Args:
            mixing: (B, N, V·Q) or (B, V·N) of V views with masks of one grid, times their shares of the mean.
            masks: theirs (B, V·Q, rows, columns).
        """
        if self.activation == "sigmoid":
            masks = [mask.sigmoid() for mask in masks]
        if self.mixed:
            together, stacked = (
                t[0] if len(t) == 1 else torch.cat(t, dim) for t, dim in ((mixing, 2), (masks, 1))
            )
            scores = (together @ stacked.flatten(2)).unflatten(2, masks[0].shape[2:])
        else:
            weighted = [m * f[:, :, None, None] for m, f in zip(masks, mixing, strict=True)]
            if any(m.shape[1] > self.classes for m in weighted):  # of several views
                weighted = [m.unflatten(1, (-1, self.classes)).sum(1) for m in weighted]
            scores = functools.reduce(torch.add, weighted)
        labels = scores.argmax(1).int()
        return labels, scores.amax(1) if self.plan.outputs == "scores" else labels

    def _by_class(self, mixing: Tensor) -> Tensor:
        """Probabilities (B, Q, N) as (B, N, Q); their diagonal (B, N) as it is."""
        return mixing.transpose(1, 2) if self.mixed else mixing

    def _scan(
        self, masks: Tensor, mixing: Tensor, size: tuple[int, int], padded: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Labels and scores of pictures of any size, by blocks of rows."""
        (height, width), (h, w) = size, masks.shape[-2:]
        rows = (height + _ROWS - 1) // _ROWS * _ROWS  # the last block may go beyond the picture
        down = _hats((torch.arange(rows) + 0.5) * (h / padded[0]) - 0.5, h)
        across = _hats((torch.arange(width) + 0.5) * (w / padded[1]) - 0.5, w)
        carried = (masks, self._by_class(mixing).contiguous(), across.t().contiguous())

        def block(carry: tuple[Tensor, ...], down: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            masks, mixing, across = carry
            labels, scores = self._mix([mixing], [down @ masks @ across])
            # What every block reads is carried along: not all runtimes let a body see what is around it.
            return tuple(t.clone() for t in carry), (labels, scores.clone())

        _, found = scan(block, carried, down.unflatten(0, (-1, _ROWS)))
        kept = torch.arange(height)  # gathered: a slice would hold for one relation of its sides alone
        labels, scores = (t.transpose(0, 1).flatten(1, 2).index_select(1, kept) for t in found)
        return labels, scores

    def _lay_out(self, size: tuple[int, int]) -> None:
        """Cells and blocks of pictures of this size, with their interpolation as constants."""
        for height, width in {run.resized for run in self.runs}:
            self.register_buffer(f"rows_{height}", _resizing(size[0], height).t().contiguous())
            self.register_buffer(f"columns_{width}", _resizing(size[1], width))
        self.grids = [self.network.mask_grid(run.crop) for run in self.runs]
        of_pass = list_views(1, size, self.runs, self.grids)
        self.cells = cells_of(of_pass, size)
        depth = max(self.classes, 1) * (self.plan.batch or 1)
        work = sum(cell.area * len(cell.shares) * depth for row in self.cells for cell in row)
        budget = max(_BUDGET, work // _BLOCKS)
        for number, cell in enumerate(itertools.chain(*self.cells)):
            top, left, bottom, right = cell.rectangle
            count = -(-cell.area * len(cell.shares) * depth // budget)
            step = -(-(bottom - top) // count)
            cell.blocks += [(y, min(y + step, bottom)) for y in range(top, bottom, step)]
            for grid in dict.fromkeys(self.grids[index] for index in cell.shares):
                alike = [index for index, other in enumerate(self.grids) if other == grid]
                seen = [index for index in alike if index in cell.shares]
                views = "_".join(map(str, seen))
                group = Group(grid, views, f"shares_{number}_{views}")
                cell.groups.append(group)
                affine = [of_pass[index].affine for index in seen]
                for y0, y1 in cell.blocks:
                    down = _interpolation(y0, y1, [(ay, by) for ay, by, _, _ in affine], grid[0])
                    self._constant(f"down_{views}_{y0}_{y1}", down)
                across = _interpolation(left, right, [(ax, bx) for _, _, ax, bx in affine], grid[1])
                self._constant(f"across_{views}_{left}_{right}", across.transpose(-1, -2))
                if len(self.runs) > 1:
                    shares = torch.tensor([cell.shares[index] for index in seen])
                    self._constant(group.shares, shares[:, None, None] if self.mixed else shares[:, None])
                    self._constant(f"places_{views}", torch.tensor([alike.index(index) for index in seen]))

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.contiguous())

    def _blocks(self, masks: list[Tensor], mixing: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Labels and scores of pictures of the plan's size, cell by cell and block by block."""
        stacks = self._stacked(masks, [self._by_class(m) for m in mixing])
        strips = [_joined([self._cell(cell, stacks) for cell in row], 2) for row in self.cells]
        return _joined(strips, 1)

    def _stacked(
        self, masks: list[Tensor], mixing: list[Tensor]
    ) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """Of each grid the masks (B, V, Q, h, w) and the mixing of all views that have it, in their order; of
        a single pass as they are."""
        if len(self.runs) == 1:
            return {self.grids[0]: (masks[0], mixing[0])}
        found: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        first = 0
        for pair in zip(masks, mixing, strict=True):  # passes · B of them, the passes in order
            stacked, mixed = (t.unflatten(0, (-1, cast(int, self.plan.batch))).transpose(0, 1) for t in pair)
            found.setdefault(self.grids[first], []).append((stacked, mixed))
            first += stacked.shape[1]
        return {grid: _joined(pairs, 1) for grid, pairs in found.items()}

    def _cell(
        self, cell: Cell, stacks: dict[tuple[int, int], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        _, left, _, right = cell.rectangle
        seen, shared = [], []
        for grid, views, shares in cell.groups:
            masks, mixing = stacks[grid]
            if len(self.runs) > 1:
                places = getattr(self, f"places_{views}")
                if len(places) < masks.shape[1]:
                    masks, mixing = masks.index_select(1, places), mixing.index_select(1, places)
                mixing = mixing * getattr(self, shares)
                mixing = mixing.transpose(1, 2).flatten(2) if self.mixed else mixing.flatten(1)
            seen.append((masks, getattr(self, f"across_{views}_{left}_{right}")))
            shared.append(mixing)
        found = []
        for y0, y1 in cell.blocks:
            downs = [getattr(self, f"down_{group.views}_{y0}_{y1}") for group in cell.groups]
            parts = [down @ masks @ across for down, (masks, across) in zip(downs, seen, strict=True)]
            found.append(self._mix(shared, [m.flatten(1, 2) if m.dim() == 5 else m for m in parts]))
        return _joined(found, 1)


def _resizing(side: int, new: int) -> Tensor:
    """The matrix (side, new) whose product with rows of pixels is their antialiased interpolation."""
    return resize(torch.eye(side)[None, None], (side, new))[0, 0]


def _joined(pairs: list[tuple[Tensor, Tensor]], dim: int) -> tuple[Tensor, Tensor]:
    if len(pairs) == 1:
        return pairs[0]
    labels, scores = (torch.cat(t, dim) for t in zip(*pairs, strict=True))
    return labels, scores


def _interpolation(start: int, stop: int, affine: list[tuple[float, float]], cells: int) -> Tensor:
    """The matrix (n, cells) that interpolates at pixels from `start` to `stop`, or of several views (V, 1, n,
    cells). A view has its pixel x at `step · x + offset`."""
    pixels = torch.arange(start, stop, dtype=torch.float64)
    found = [_hats(pixels * step + offset, cells) for step, offset in affine]
    return found[0] if len(found) == 1 else torch.stack(found)[:, None]


def _hats(places: Tensor, cells: int) -> Tensor:
    """The matrix (n, cells) whose product with cells is their linear interpolation at n places."""
    places = places.clamp(0, cells - 1)
    return (1 - (places[:, None] - torch.arange(cells)).abs()).clamp(min=0).float()


class Group(NamedTuple):
    """Views of a cell whose masks have one grid, and how their constants and their shares are called."""

    grid: tuple[int, int]
    views: str
    shares: str


@dataclasses.dataclass
class Cell:
    """A rectangle (top, left, bottom, right) of the output in which the same views see every pixel.

    Attributes:
        shares: of each of these views, by index, in the mean.
        blocks: rows that are decided together, from and to.
        groups: the same views by the grid of their masks.
    """

    rectangle: tuple[int, int, int, int]
    shares: dict[int, float]
    blocks: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    groups: list[Group] = dataclasses.field(default_factory=list)

    @property
    def area(self) -> int:
        top, left, bottom, right = self.rectangle
        return (bottom - top) * (right - left)


def cells_of(views: Sequence[View], size: tuple[int, int]) -> list[list[Cell]]:
    """The cells of an output of `size`, row by row."""
    tops, lefts = (
        sorted({0, size[axis], *(edge for view in views for edge in view.rectangle[axis::2])})
        for axis in (0, 1)
    )
    return [
        [Cell((y0, x0, y1, x1), _shares(views, y0, x0)) for x0, x1 in itertools.pairwise(lefts)]
        for y0, y1 in itertools.pairwise(tops)
    ]


def _shares(views: Sequence[View], y: int, x: int) -> dict[int, float]:
    """Of the views that see a pixel: the mean over groups of the mean over a group's."""
    seen = {
        index: view.group
        for index, view in enumerate(views)
        if view.rectangle[0] <= y < view.rectangle[2] and view.rectangle[1] <= x < view.rectangle[3]
    }
    members = Counter(seen.values())
    return {index: 1 / (members[group] * len(members)) for index, group in seen.items()}


# Ordinary operators


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's, of (B, heads, N, D); a mask of bools says what is seen, as in EoMT's blocks."""
    assert not (dropout_p or is_causal or enable_gqa)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.transpose(-1, -2)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if boolean else scores + attn_mask
    return scores.softmax(-1) @ value


def _atm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    previous_masks: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    need_masks: bool,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "seed": seed}
    output, masks = atm_reference(
        query, key, value, previous_masks=previous_masks, key_padding_mask=key_padding_mask, **options
    )
    nothing = query.new_empty(0)
    return output, nothing if masks is None or not need_masks else masks, nothing


def _linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    panels: Any,
    factors: Any,
    gelu: bool,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    norm = None if norm_weight is None else (norm_weight, norm_bias, norm_eps)
    return linear_reference(input, weight, bias, gelu=gelu, norm=norm, scale=scale, residual=residual)


def _query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p, "seed": seed}
    output = query_attention_reference(query, key, value, key_padding_mask=key_padding_mask, **options)
    return output, query.new_empty(0)


def _subsample_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    height: int,
    width: int,
    stride: int,
    prefix_tokens: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    found = subsample_layer_norm_reference(
        x, weight, bias, grid=(height, width), stride=stride, prefix_tokens=prefix_tokens, eps=eps
    )
    return (*found, x.new_empty(0), x.new_empty(0))


def _table() -> dict[Any, Callable]:
    ours, aten = torch.ops.segvit, torch.ops.aten
    return {
        ours.atm_fwd.default: _atm,
        ours.linear.default: _linear,
        ours.query_attention_fwd.default: _query_attention,
        ours.subsample_norm_fwd.default: _subsample_norm,
        aten.scaled_dot_product_attention.default: _attention,
    }


def arranged(pictures: Tensor, plan: Plan) -> Tensor:
    """Pictures (B, channels, H, W) as a graph of this plan takes them."""
    return pictures.permute(0, 2, 3, 1).contiguous() if plan.channels_last else pictures


def example(graph: LabelGraph, channels: int, image_size: tuple[int, int]) -> Tensor:
    """Pictures that a graph is traced with."""
    plan = graph.plan
    size = plan.size or image_size
    shape = (plan.batch or 2, *((*size, channels) if plan.channels_last else (channels, *size)))
    return torch.zeros(shape, dtype=torch.uint8)


@torch.no_grad()
def plain_program(graph: LabelGraph, pictures: Tensor) -> torch.export.ExportedProgram:
    """The graph as a program of ordinary operators, open where the plan is open."""
    plan, open_axes = graph.plan, {}
    if plan.batch is None:
        open_axes[0] = Dim.DYNAMIC
    if plan.size is None:
        height = 1 if plan.channels_last else 2
        open_axes |= {height: Dim.DYNAMIC, height + 1: Dim.DYNAMIC}
    program = torch.export.export(graph, (pictures,), dynamic_shapes=(open_axes,) if open_axes else None)
    return program.run_decompositions(_table())
