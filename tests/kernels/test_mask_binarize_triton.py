"""Binary masks in Triton's interpreter against float64; on a GPU where there is one (``-m gpu``)."""

import dataclasses
import math

import pytest
import torch

from segvit_kernels.ops.mask_binarize import BinaryMasks
from segvit_kernels.testing.mask_binarize import CASES, BinarizeCase, assert_masks, oracle, unpacked
from segvit_kernels.triton import mask_binarize as kernels

BY_NAME = {case.name: case for case in CASES}
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
# Few and large tiles keep the interpreter quick.
LARGE = (
    {"tile_y": 64, "tile_x": 64, "rows": 64},
    {"tile_y": 64, "tile_x": 4, "rows": 64},
    {"tile_y": 2, "tile_x": 64, "rows": 2},
)
FEW = (
    BinarizeCase("up", 1, 1, (5, 7), (67, 45), threshold=0.3),
    BinarizeCase("down", 2, 1, (40, 33), (21, 35)),
    BinarizeCase("box", 1, 2, (6, 5), (40, 70), boxes=True, coherent=True),
)


def run(inputs, layout, config):
    height, width = inputs["size"]
    arguments = (inputs["mask_logits"], inputs["boxes"], height, width, inputs["threshold"], layout)
    return BinaryMasks(*kernels.mask_binarize(*arguments, config=config))


def check(case, dtype, device="cpu", configs=LARGE):
    """All layouts, which agree bit for bit."""
    inputs = case.inputs(dtype, device)
    found = run(inputs, 0, configs[0])
    assert_masks(case.name, found, oracle(inputs), oracle(inputs, torch.float32))
    for layout in (1, 2):
        words, areas, boxes = run(inputs, layout, configs[layout])
        bits = unpacked(words, 32 * words.shape[-1])
        masks = found.masks.mT if layout == 2 else found.masks
        assert torch.equal(bits[..., : masks.shape[-1]], masks) and bits.sum() == masks.sum()
        assert torch.equal(areas, found.areas) and torch.equal(boxes, found.boxes)


@pytest.mark.parametrize("index", range(3), ids=lambda i: FEW[i].name)
def test_case(index, poisoned):
    check(FEW[index], (torch.float32, torch.float16, torch.bfloat16)[index])


@pytest.mark.parametrize("case", ["one_of_everything", "no mask"])
def test_ends(case, poisoned):
    check(BY_NAME[case], torch.float32)


def test_pinned_tiles(poisoned):
    case = dataclasses.replace(FEW[0], batch=1, size=(9, 40))
    check(case, torch.float32, configs=[kernels._config((1, *case.size), n, "sm_90") for n in range(3)])


def test_not_a_number_and_infinities(poisoned):
    logits = torch.full((1, 3, 4, 6), 5.0)
    logits[0, 0, 1, 2] = math.nan
    logits[0, 1, :, :3], logits[0, 1, :, 3:] = -math.inf, math.inf
    logits[0, 2] = math.nan
    near = torch.zeros(1, 1, 4, 6)
    near[..., 1, 2] = 1
    share = torch.nn.functional.interpolate(near, (16, 24), mode="bilinear")[0, 0] > 0
    inputs = {"mask_logits": logits, "boxes": None, "size": (16, 24), "threshold": -1e20}
    found = run(inputs, 0, LARGE[0])
    assert torch.equal(found.masks[0, 0], ~share)
    assert not found.masks[0, 1, :, :12].any() and found.masks[0, 1, :, 12:].all()
    assert found.areas[0].tolist() == [int((~share).sum()), 16 * 12, 0]
    assert found.boxes[0].tolist() == [[0, 0, 24, 16], [12, 0, 24, 16], [0, 0, 0, 0]]


def test_boxes_that_hold_nothing(poisoned):
    nan, inf = math.nan, math.inf
    boxes = [[3, 3, 3, 9], [5, 5, 2, 9], [nan, 0, 9, 9], [0, -inf, 9, inf], [-3e38, 0, 3e38, 9], [0, 0, 9, 9]]
    inputs = {"mask_logits": torch.ones(1, 6, 3, 3), "boxes": torch.tensor([boxes]), "size": (9, 9)}
    found = run({**inputs, "threshold": 0.0}, 0, {"tile_y": 16, "tile_x": 16, "rows": 16})
    assert found.areas[0].tolist() == [0] * 5 + [81] and not found.boxes[0, :5].any()


def test_strides(poisoned):
    inputs = dataclasses.replace(FEW[0], batch=1, size=(20, 20)).inputs(torch.float32)
    expected = run(inputs, 0, LARGE[0])
    turned = {**inputs, "mask_logits": inputs["mask_logits"].mT.contiguous().mT}
    assert all(torch.equal(a, b) for a, b in zip(run(turned, 0, LARGE[0]), expected, strict=True))


def test_configurations_are_pure_and_fill_the_device():
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942", "sm_75"):
        for layout in range(3):
            for shape in ((1, 1024, 1024), (300, 1024, 1024), (0, 7, 9), (5, 1, 1)):
                config = kernels._config(shape, layout, arch)
                assert config == kernels._config(shape, layout, arch)
                assert config["rows"] % config["tile_y"] == 0 and config["rows"] > 0
    one, many = (kernels._config((n, 1024, 1024), 0, "sm_90")["rows"] for n in (1, 3000))
    assert one == 8 and many == 1024


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_on_the_device(case, dtype, device):
    check(case, dtype, device, configs=[{}, {}, {}])
