"""Views of semantic_argmax: where crops lie, and what a device must do without looking at a value."""

import dataclasses
import itertools
from fractions import Fraction

import pytest
import torch
from test_semantic_argmax import BY_NAME, named
from torch.nn import functional as F

from segvit_kernels.ops import _class_scores
from segvit_kernels.ops import semantic_argmax as module
from segvit_kernels.ops.semantic_argmax import View, Views, semantic_argmax
from segvit_kernels.testing.semantic_argmax import CASES


@named(*(case.name for case in CASES if not case.views))
def test_whole_views_are_the_plain_form(case):
    inputs = case.inputs(torch.float64)
    (batch, *grid), *_ = case.stacks
    views = Views([View.whole(b, tuple(grid), case.size) for b in range(batch)], batch, case.size)
    plain = semantic_argmax(**inputs, return_scores=True)
    labels, scores = semantic_argmax(**{**inputs, "views": views}, return_scores=True)
    torch.testing.assert_close(labels, plain[0], rtol=0, atol=0)
    torch.testing.assert_close(scores, plain[1], rtol=0, atol=5e-6)  # the maps travel in float32


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "size, resized, top, left, crop",
    [
        ((23, 31), (23, 31), 4, 9, (12, 16)),
        ((23, 31), (46, 62), 11, 30, (24, 24)),
        ((40, 30), (20, 15), 0, 0, (24, 16)),  # padding at the right and bottom
        ((17, 29), (30, 41), 7, 0, (16, 41)),
    ],
)
def test_crop_against_brute_force(size, resized, top, left, crop, flip):
    """Every output pixel looked up by hand in the map of the crop."""
    grid = (4, 5)
    mask = torch.randn(*grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    view = View.crop(0, size, resized, top, left, crop, grid, flip)

    def place(pixel, length, new_length, start, window, cells, mirrored):
        """Exact place of an output pixel's centre in cells of the crop, from its border; None outside."""
        at = (Fraction(2 * pixel + 1, 2) * new_length / length) - start
        if not 0 <= at < window:
            return None
        return (window - at if mirrored else at) * cells / window

    def value(y, x):
        total = 0.0
        for i, j in itertools.product(range(grid[0]), range(grid[1])):
            near = [
                max(0.0, 1 - abs(min(max(float(p) - 0.5, 0), n - 1) - k))
                for p, n, k in ((y, grid[0], i), (x, grid[1], j))
            ]
            total += near[0] * near[1] * float(mask[i, j])
        return total

    rows = [place(y, size[0], resized[0], top, crop[0], grid[0], False) for y in range(size[0])]
    columns = [place(x, size[1], resized[1], left, crop[1], grid[1], flip) for x in range(size[1])]
    inside_y = [y for y, at in enumerate(rows) if at is not None]
    inside_x = [x for x, at in enumerate(columns) if at is not None]
    assert view.rectangle == (inside_y[0], inside_x[0], inside_y[-1] + 1, inside_x[-1] + 1)
    expected = torch.full(size, -1.0, dtype=torch.float64)
    for y, x in itertools.product(inside_y, inside_x):
        expected[y, x] = value(rows[y], columns[x])
    # A second view, of a constant, covers the rest; in a group of its own it weighs a half.
    views = Views([view, View.whole(0, (1, 1), size, 1)], 1, size)
    masks = [mask[None, None], torch.zeros(1, 1, 1, 1, dtype=torch.float64)]
    ones = torch.ones(2, 1, 1, dtype=torch.float64)
    _, scores = semantic_argmax(masks, ones, size, views=views, return_scores=True)
    covered = torch.zeros(size, dtype=torch.bool)
    covered[inside_y[0] : inside_y[-1] + 1, inside_x[0] : inside_x[-1] + 1] = True
    expected = torch.where(covered, (expected.sigmoid() + 0.5) / 2, 0.5)
    torch.testing.assert_close(scores[0], expected, rtol=0, atol=3e-6)  # the maps travel in float32


def test_a_window_is_pasted():
    """Where the image was not resized, a window is its map upsampled to the window, put in its place."""
    mask = torch.randn(1, 3, 4, 4)
    size, crop = (20, 24), (16, 16)
    expected = torch.zeros(3, *size)
    expected[:, 2:18, 5:21] = F.interpolate(mask.flip(-1), size=crop, mode="bilinear")[0].sigmoid()
    views = [View.crop(0, size, size, 2, 5, crop, (4, 4), True), View.whole(0, (1, 1), size)]
    count = 1 + (expected[0] > 0).float()
    for channel in range(3):
        probs = torch.zeros(2, 3, 1)
        probs[0, channel] = 1
        _, scores = semantic_argmax(
            [mask, torch.zeros(1, 3, 1, 1)], probs, size, views=Views(views, 1, size), return_scores=True
        )
        torch.testing.assert_close(scores[0], expected[channel] / count, rtol=1e-5, atol=1e-6)


@named(*(case.name for case in CASES if case.views))
def test_the_form_without_sync(case, monkeypatch):
    """What other devices than the CPU run, here on CPU tensors; it must not look at a value."""
    inputs = case.inputs(torch.float64)
    expected = semantic_argmax(**inputs, return_scores=True)
    views = inputs["views"]
    masks = inputs["mask_logits"]
    masks = list(masks) if isinstance(masks, torch.Tensor) else [m for stack in masks for m in stack]
    given = (masks, inputs["class_probs"], views.tensors, expected[0], torch.float64, 0.0, True)
    for budget in (1, 2**20):
        monkeypatch.setattr(_class_scores, "_BUDGET", budget)
        blocks = [(stop - start, scores) for start, stop, scores in _class_scores.blocks_without_sync(*given)]
        assert all(rows == scores.shape[2] for rows, scores in blocks) and (budget > 1 or len(blocks) > 1)
        classes, best = _class_scores.first_maximum(torch.cat([scores for _, scores in blocks], 2))
        torch.testing.assert_close((classes.to(expected[0].dtype), best), expected)


@named("odd", "mixed")
def test_other_devices_never_look_at_values(case):
    """On meta tensors any look at a value raises."""
    inputs = case.inputs(torch.float32, device="meta")
    masks, views = inputs["mask_logits"], inputs["views"]
    batch = views.batch if views else masks.shape[0]
    result = module._eager(
        [masks] if isinstance(masks, torch.Tensor) else masks,
        inputs["class_probs"],
        views.tensors if views else [],
        batch,
        *case.size,
        [],
        True,
        True,
        0.1,
    )
    assert [t.shape for t in result] == [(batch, *case.size)] * 2


def test_attributes():
    views = BY_NAME["mixed"].inputs(torch.float32)["views"]
    starts, layout, affine = views.tensors
    assert starts.tolist() == [0, 3, 4, 6] and starts.dtype == layout.dtype == torch.int32
    assert layout[:, :3].tolist() == [[1, 0, 2], [5, 0, 2], [4, 4, 1], [3, 1, 1], [0, 0, 1], [2, 3, 1]]
    for row, map_ in zip(layout.tolist(), affine, strict=True):
        view = views.views[row[0]]
        assert tuple(row[3:]) == view.rectangle
        torch.testing.assert_close(map_, torch.tensor(view.affine))
    assert views.reach == [max(abs(v.affine[i]) for v in views.views) for i in (0, 2)]
    moved = views.to("meta")
    assert all(t.is_meta for t in moved.tensors) and not any(t.is_meta for t in views.tensors)
    assert moved.size == views.size and len(moved) == 6


def test_refusals():
    whole, size = View.whole(0, (2, 2), (8, 9)), (8, 9)
    for view, message in (
        (dataclasses.replace(whole, image=1), "view 1 has image 1; expected 0 to 0"),
        (dataclasses.replace(whole, rectangle=(0, 0, 8, 10)), r"view 1 has rectangle .* size \(8, 9\)"),
        (dataclasses.replace(whole, rectangle=(5, 0, 4, 9)), "view 1 has rectangle"),
        (dataclasses.replace(whole, affine=(0.0, 1.0, 1.0, 0.0)), "view 1 has affine .* nonzero"),
        (dataclasses.replace(whole, affine=(1.0, float("nan"), 1.0, 0.0)), "view 1 has affine"),
    ):
        with pytest.raises(ValueError, match=message):
            Views([whole, view], 1, size)
    for changes in ({"image": 0.0}, {"group": 0.5}, {"rectangle": (0, 0, 8.0, 9)}):
        with pytest.raises(
            TypeError, match=f"{next(iter(changes))} of view 1 is .*; expected a whole number"
        ):
            Views([whole, dataclasses.replace(whole, **changes)], 1, size)
    for batch, wrong, message in (
        (1.0, size, "batch is 1.0; expected a whole number"),
        (1, (8.5, 9), "size is 8.5; expected a whole number"),
    ):
        with pytest.raises(TypeError, match=message):
            Views([whole], batch, wrong)
    with pytest.raises(TypeError, match="view 0 is a int; expected a View"):
        Views([3], 1, size)
    with pytest.raises(ValueError, match=r"crop is \(0, 9\); expected \(height, width\), at least 1 x 1"):
        View.crop(0, size, size, 0, 0, (0, 9), (2, 2))
    hole = [(0, 0, 8, 4), (0, 4, 3, 9), (4, 4, 8, 9), (2, 5, 6, 9)]
    pieces = [dataclasses.replace(whole, rectangle=r) for r in hole]
    with pytest.raises(ValueError, match=r"image 0 do not cover pixel \(3, 4\)"):
        Views(pieces, 1, size)
    Views([*pieces, dataclasses.replace(whole, rectangle=(3, 4, 4, 5))], 1, size)
    with pytest.raises(ValueError, match=r"image 1 do not cover pixel \(0, 0\)"):
        Views([whole], 2, size)
