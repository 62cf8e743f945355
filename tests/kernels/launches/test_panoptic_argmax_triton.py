"""What launch parameters add to the battery of panoptic_argmax, in Triton's interpreter."""

import functools

import pytest
import torch
from test_panoptic_argmax import named

from segvit_kernels import _library
from segvit_kernels.ops.panoptic_argmax import panoptic_argmax
from segvit_kernels.testing.panoptic_argmax import assert_panoptic
from segvit_kernels.triton import panoptic_argmax as kernels

CONFIGS = {
    "low": {"tile_y": 2, "tile_x": 128, "block_q": 4},
    "tall": {"tile_y": 16, "tile_x": 32, "block_q": 64},
    "sm_90": kernels._config("sm_90"),
    "gfx942": kernels._config("gfx942"),
}


@pytest.mark.parametrize("config", CONFIGS)
@named("odd", "mask2former")
def test_tiles_change_nothing(case, config, monkeypatch, poisoned):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launch = functools.partial(kernels.panoptic_argmax, config=CONFIGS[config])
    monkeypatch.setitem(_library._operators["panoptic_argmax"].kernels, "triton", launch)
    inputs = case.inputs(torch.float32, planted=True)
    assert_panoptic(case.name, panoptic_argmax(**inputs, backend="triton"), inputs)


def test_far_rows_are_copied():
    """Where 32-bit offsets inside a mask would not reach."""
    far = torch.empty_strided((1, 2, 4, 32), (2**34, 2**33, 2**30, 1), device="meta")
    scores, config = torch.empty(1, 2, device="meta"), kernels._config("sm_90")
    for masks, copied in ((far, True), (torch.empty(1, 2, 4, 32, device="meta"), False)):
        sizes = (8, 8, 4, 32, 4, 32)
        _, launches = kernels._launches(masks, scores, *sizes, False, True, 0.5, False, config)
        given = launches[0].arguments["masks_ptr"]
        assert given.is_contiguous() and (given is not masks) == copied


def test_cells_keep_the_dtype_of_masks_that_nothing_is_computed_of():
    scores = torch.empty(1, 21, device="meta")
    masks = torch.empty(1, 21, 7, 5, dtype=torch.bfloat16, device="meta")
    config = kernels._config("sm_90")
    for resized, first, dtype in (
        ((7, 5), False, torch.bfloat16), ((7, 5), True, torch.float32), ((9, 9), False, torch.float32)
    ):  # fmt: skip
        sizes = (50, 37, *resized, *resized)
        _, launches = kernels._launches(masks, scores, *sizes, first, not first, 0.5, False, config)
        assert launches[0].arguments["cells_ptr"].dtype == dtype
