"""Launch parameters of the Triton kernels of mask_loss, in the interpreter."""

import dataclasses
import math

import pytest
import torch
from backends import Launchers
from mask_loss_calls import Call, check, check_matching, same
from test_mask_loss import FEW
from torch.nn import functional as F

from segvit_kernels.ops.mask_loss import mask_matching_cost, mask_matching_cost_reference
from segvit_kernels.testing import assert_within_budget
from segvit_kernels.testing.mask_loss import LOSSES
from segvit_kernels.triton import _mask_targets
from segvit_kernels.triton import mask_loss as kernels


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """For calls that give no configuration."""
    config = kernels._config
    monkeypatch.setattr(kernels, "_config", lambda *arguments: {**config(*arguments), **FEW})


def launchers(**config):
    operators = ("mask_loss_fwd", "mask_loss_bwd", "mask_matching_sums")
    return Launchers(kernels, dict.fromkeys(operators, FEW | config))


SIZES = {
    "1x1 to 1x1": Call.draw(3, 2, [(1, 1)], (1, 1), present=2),
    "1x1": Call.draw(1, 2, [(1, 1)], (100, 37), present=2),
    "7x5 to 1x1": Call.draw(3, 2, [(7, 5)], (1, 1), present=2),
    "several blocks of cells": Call.draw(1, 2, [(40, 40)], (160, 200), present=1),
    "support of one row more than groups": Call.draw(1, 1, [(17, 3)], (19, 5), present=1),
    "whole tiles": Call.draw(1, 1, [(8, 16)], (64, 128), present=1),
    "runs": Call.draw(1, 3, [(3, 5)], (40, 80)),
    "runs in several blocks of cells": Call.draw(1, 2, [(5, 17)], (31, 272), present=1),
    "runs at two scales, ignored": Call.draw(1, 2, [(2, 1), (3, 4)], (33, 64), mask_ignored=True, present=2),
    "runs of soft fp16, gamma 0.5": Call.draw(
        1, 2, [(3, 2)], (20, 32), torch.float16, 3, matched=True, gamma=0.5
    ),
    "2000 classes": Call.draw(1, 2000, [(2, 2)], (9, 130), targets=torch.int32, present=3),
    "gamma 1.5": Call.draw(1, 4, [(5, 5)], (30, 31), gamma=1.5),
    "large masks": Call.draw(1, 2, [(2, 2)], (100, 120), torch.float32, 1, matched=True, seed=3),
    "soft fp16, gamma 0.5": Call.draw(2, 4, [(7, 5)], (50, 70), torch.float16, 3, matched=True, gamma=0.5),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name, poisoned):
    check(SIZES[name], launchers())


def test_half_precision_logits(poisoned):
    check(Call.draw(1, 3, [(7, 5), (20, 20)], (100, 37), dtype=torch.float16, mask_ignored=True), launchers())


def test_every_entry_of_a_list_is_as_if_alone(poisoned):
    """One more than a launch takes."""
    grids = [(7, 5), (1, 1), (20, 33), (3, 17), (2, 2)]
    call = Call.draw(1, 3, grids, (41, 52), torch.bool, 4, matched=True)
    sums, areas, *grads = check(call, launchers())
    grad_sums = call.grad_sums()
    for i, logits in enumerate(call.logits):
        alone = dataclasses.replace(call, logits=[logits])
        assert torch.equal(alone.forward(launchers())[0], sums[i : i + 1])
        # The backward's blocks depend on the whole list, the result on them by rounding.
        torch.testing.assert_close(alone.backward(grad_sums[i : i + 1], areas, launchers())[0], grads[i])


@pytest.mark.parametrize("split", [False, True])
def test_classes_in_some_tiles_of_labels(split, poisoned):
    """Tiles without the class of a pair; with one that has its number modulo 32; with many classes."""
    call = Call.draw(1, 36, [(9, 12)], (70, 200), dtype=torch.float16)
    call.targets[..., :64], call.targets[..., 64:] = 0, 33
    call.targets[0, 66:, 130:] = torch.arange(70, dtype=torch.uint8) % 4
    call.targets[0, :3, :2] = torch.tensor([1, 32], dtype=torch.uint8)
    check(call, launchers(split=split))


def test_more_pairs_than_one_block_of_the_list(monkeypatch, poisoned):
    monkeypatch.setattr(_mask_targets, "_LISTED", 1024)
    call = Call.draw(9, 150, [(1, 1)], (1, 2), present=40)
    assert call.truth()[1].count_nonzero() > 10
    check(call, launchers())


@pytest.mark.parametrize("config", [
    {"programs": 1}, {"programs": 50}, {"block": 16, "span": 3}, {"block": 128, "span": 1},
], ids=str)  # fmt: skip
def test_tiling_does_not_matter(config, poisoned):
    check(Call.draw(1, 2, [(9, 18)], (45, 100), present=2), launchers(**config))


def test_strides(poisoned):
    """Masks taken from a larger tensor, labels of a crop, logits that are not contiguous."""
    call = Call.draw(2, 2, [(6, 7)], (40, 30), torch.bool, 3, matched=True, seed=1)
    plain = check(call, launchers())
    masks = torch.cat([call.targets, ~call.targets], 1)[:, :3]
    logits = [call.logits[0].transpose(2, 3).contiguous().transpose(2, 3)]
    odd = check(dataclasses.replace(call, targets=masks, logits=logits), launchers())
    masks = F.pad(call.targets.to(torch.uint8), (3, 5)).bool()[..., 3:-5]
    assert not masks.is_contiguous()
    cropped = check(dataclasses.replace(call, targets=masks), launchers())
    for actual in (odd, cropped):
        assert torch.equal(actual[0], plain[0]) and torch.equal(actual[2], plain[2])


def test_repeatable():
    call = Call.draw(1, 2, [(5, 9), (18, 20)], (60, 70), gamma=1.5, present=2)
    same(check(call, launchers()), check(call, launchers()))


@pytest.mark.parametrize("grid, size, dtype", [
    ((5, 7), (31, 37), torch.float32),  # shares of any kind, tiles with pixels outside
    ((4, 6), (16, 24), torch.float16),  # every tile alike, shares that float16 holds
    ((4, 6), (64, 96), torch.bfloat16),  # tiles in half a cell
    ((4, 6), (12, 18), torch.float32),
    ((9, 40), (7, 40), torch.float32),  # fewer pixels than cells
], ids=str)  # fmt: skip
@pytest.mark.parametrize("cells", [64, 0], ids=["product", "gathered"])
def test_matching_of_any_grid(grid, size, dtype, cells, poisoned):
    call = Call.draw(2, 20, [grid], size, torch.uint8, 5, dtype=dtype)
    check_matching(call, launchers(block_q=16, block_m=16, cells=cells))


@pytest.mark.parametrize(
    "targets",
    [torch.int64, torch.bool, torch.float32, torch.float64, torch.float16, torch.bfloat16],
    ids=str,
)
def test_matching(targets, poisoned):
    dtype = torch.float16 if targets == torch.int64 else torch.float32
    call = Call.draw(1, 20, [(5, 7)], (31, 37), targets, 5, dtype=dtype)
    check_matching(call, launchers(block_q=16, block_m=16))


@pytest.mark.parametrize("queries, count, grid, size, options", [
    (70, 3, (2, 2), (9, 11), {"block_q": 64}),
    (3, 150, (2, 2), (9, 11), {}),
    (2, 300, (1, 1), (5, 5), {}),
    (3, 4, (40, 30), (7, 40), {"programs": 7}),
    (3, 4, (1, 1), (1, 1), {}),
    (5, 4, (3, 3), (50, 40), {"programs": 1, "tile_y": 4, "tile_x": 16}),
])  # fmt: skip
def test_matching_sizes(queries, count, grid, size, options, poisoned):
    call = Call.draw(2, queries, [grid], size, torch.int16, count)
    check_matching(call, launchers(**{"block_q": 16, **options}))


def test_matching_of_what_float16_does_not_hold(poisoned):
    """No finite cost may hide it."""
    for value, dtype in ((1e5, torch.float32), (math.inf, torch.float16), (math.nan, torch.bfloat16)):
        logits = torch.ones(1, 2, 4, 4, dtype=dtype)
        logits[0, 1, 2, 1] = value
        targets = torch.ones(1, 1, 16, 16, dtype=torch.bool)
        cost = mask_matching_cost(logits, targets, backend="triton")
        assert cost.bce[0, 0].isfinite().all() and not cost.bce[0, 1].isfinite().any()


def test_matching_cost(poisoned):
    call = Call.draw(2, 4, [(5, 7)], (21, 37), torch.bool, 3, gamma=1.5)
    found = mask_matching_cost(call.logits[0], call.targets, focal_gamma=1.5, backend="triton")
    truth, plain = (
        mask_matching_cost_reference(call.logits[0].to(d), call.targets, focal_gamma=1.5)
        for d in (torch.float64, torch.float32)
    )
    for name, *values in zip(found._fields, found, truth, plain, strict=True):
        assert_within_budget(name, *values, terms=LOSSES[name])


def test_launches_are_made_without_looking_at_values():
    """Meta tensors have none, so nothing can wait for the device."""
    with torch.device("meta"):
        logits = [torch.empty(2, 19, 4, 6)] * 5
        labels, matches = torch.empty(2, 32, 40, dtype=torch.uint8), torch.empty(2, 19, dtype=torch.int64)
        grad_sums, areas = torch.empty(5, 2, 19, 4), torch.empty(2, 19)
    numbers, config = (19, 0.25, 2.0, True), kernels._config("mask_loss_fwd", "sm_90")
    _, forward = kernels._fwd_launches(logits, labels, matches, *numbers, config)
    config = kernels._config("mask_loss_bwd", "sm_90")
    _, backward = kernels._bwd_launches(grad_sums, logits, labels, matches, areas, *numbers, config)
    # Counts with the list, and for every four entries partials and sums; the list, and gradients.
    assert [len(forward), len(backward)] == [5, 3]
    assert all(launch.programs <= FEW["programs"] for launch in backward)


def test_too_large_for_32_bit_positions():
    for h, w, height, width in ((2**15, 8, 2**15, 8), (2**16, 2**16, 4, 4), (4, 4, 2**16, 2**15)):
        with torch.device("meta"):
            logits, labels = torch.empty(1, 1, h, w), torch.empty(1, height, width, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"too large.*backend='eager'"):
            kernels.mask_loss_fwd([logits], labels, None, 1, 0.25, 2.0, False)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", "sm_75"])
def test_configurations_are_pure(arch):
    for name in ("mask_loss_fwd", "mask_loss_bwd", "mask_loss_matching"):
        config = kernels._config(name, arch)
        assert config == kernels._config(name, arch)
        config["num_warps"] = None
        assert kernels._config(name, arch)["num_warps"] is not None


@pytest.mark.parametrize("height, h, rows", [
    (640, 40, 8), (512, 32, 8), (480, 30, 15), (1024, 64, 8), (37, 5, 3), (13, 40, 1), (640, 1, 10),
])  # fmt: skip
def test_rows_of_a_group(height, h, rows):
    """Whole tiles where there can be, and never more rows than three rows of the map can serve."""
    assert kernels._rows_of_a_group(height, h) == rows
    assert (rows - 1) * h < height
