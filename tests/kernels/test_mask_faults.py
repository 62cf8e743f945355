"""Planted faults of mask_binarize, panoptic_argmax and mask_iou: each must turn the operator's own check red.

In Triton they are wrong device functions in the place of the kernels' own, interpreted; elsewhere wrong
results of the eager implementation. Each check passes first without the fault.
"""

import pytest
import test_mask_binarize as binarize
import test_mask_iou as iou
import test_panoptic_argmax as panoptic
import torch
from backends import BY_ID, PTX

from segvit_kernels import _library
from segvit_kernels.testing.mask_binarize import BinarizeCase
from segvit_kernels.testing.mask_iou import IoUCase
from segvit_kernels.testing.panoptic_argmax import PanopticCase

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language

CHECKS = {
    "mask_binarize": lambda backend: binarize.check(
        BinarizeCase("box", 1, 3, (4, 5), (19, 40), boxes=True, coherent=False), torch.float32, BY_ID[backend]
    ),
    "panoptic_argmax": lambda backend: panoptic.check(
        PanopticCase("small", 1, 5, (5, 4), (13, 18)), torch.float32, BY_ID[backend]
    ),
    "mask_iou": lambda backend: [
        iou.check(IoUCase("small", 1, (3, 2), ((4, 5), (5, 3)), (9, 13)), torch.float32, BY_ID[backend], soft)
        for soft in (True, False)
    ],
}


@triton.jit
def cell_corners(i, step, cells):
    """Half a cell away: align_corners."""
    place = (i.to(tl.float32) + 0.0) * step
    place = tl.minimum(tl.maximum(place, 0.0), cells - 1.0)
    before = place.to(tl.int32)
    return before, tl.minimum(before + 1, cells - 1), place - before.to(tl.float32)


@triton.jit
def nearest(i, step, cells):
    """Without a share of the next cell."""
    place = tl.minimum(tl.maximum((i.to(tl.float32) + 0.5) * step - 0.5, 0.0), cells - 1.0)
    before = place.to(tl.int32)
    return before, before, place - before.to(tl.float32)


@triton.jit
def last_cell_missing(i, step, cells):
    """Clamped one cell early."""
    place = tl.minimum(tl.maximum((i.to(tl.float32) + 0.5) * step - 0.5, 0.0), cells - 2.0)
    before = place.to(tl.int32)
    return before, tl.minimum(before + 1, cells - 1), place - before.to(tl.float32)


@triton.jit
def steep(x):
    """σ of twice the logit."""
    return 1.0 / (1.0 + tl.exp2(x * -2.885390081777927))


@triton.jit
def box_corners(i, low, step, cells):
    place = (tl.cast(i, tl.float32) - low) * step
    before = tl.minimum(tl.maximum(place.to(tl.int32), 0), cells - 1)
    return before, tl.minimum(tl.maximum(place - before.to(tl.float32), 0.0), 1.0)


@triton.jit
def box_ignored(boxes_ptr, low, cells):
    """Every box begins at 0."""
    last = tl.load(boxes_ptr + low + 2)
    return 0.0, last, cells / tl.maximum(last, 1.0)


@triton.jit
def threshold_ignored(ptrs, threshold):
    return threshold + 0.5 - tl.load(ptrs).to(tl.float32)


@triton.jit
def place_corners(i, step):
    return tl.cast(i, tl.float32) * step


@triton.jit
def row_early(place):
    """The cell before the one before a place."""
    return (place + 1.0).to(tl.int32) - 2


@triton.jit
def columns_nearest(x, step, width):
    column = tl.minimum(((x + 0.5) * step).to(tl.int32), width - 2)
    return column, 1.0, 0.0


@triton.jit
def next_bit(words):
    return (((words >> 1) & 1) * 0x3C00).to(tl.int16).to(tl.float16, bitcast=True)


IN_TRITON = [
    ("mask_binarize", "_between", box_corners),
    ("mask_binarize", "_box", box_ignored),
    ("mask_binarize", "_cell", threshold_ignored),
    ("panoptic_argmax", "_place", place_corners),
    ("panoptic_argmax", "_before", row_early),
    ("panoptic_argmax", "_columns", columns_nearest),
    ("panoptic_argmax", "sigmoid", steep),
    *(("mask_iou", "place_of", fault) for fault in (cell_corners, nearest, last_cell_missing)),
    ("mask_iou", "sigmoid", steep),
    ("mask_iou", "_ones", next_bit),
]  # fmt: skip


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Idle programs cost the interpreter as much as busy ones."""
    if not PTX:
        from segvit_kernels.triton import mask_binarize as kernels

        config = kernels._config
        monkeypatch.setattr(
            kernels,
            "_config",
            lambda shape, layout, arch: {**config(shape, layout, arch), **binarize.LARGE},
        )


@pytest.mark.skipif(PTX, reason="compiled kernels have their functions inside")
@pytest.mark.parametrize("operator", CHECKS)
def test_sound_kernels_pass(operator):
    CHECKS[operator]("triton")


@pytest.mark.skipif(PTX, reason="compiled kernels have their functions inside")
@pytest.mark.parametrize(
    ("operator", "name", "fault"), IN_TRITON, ids=[f"{o}-{f.__name__}" for o, _, f in IN_TRITON]
)
def test_a_wrong_device_function_turns_the_check_red(operator, name, fault, monkeypatch):
    kernels = pytest.importorskip(f"segvit_kernels.triton.{operator}")
    assert getattr(kernels, name) is not fault
    monkeypatch.setattr(kernels, name, fault)
    with pytest.raises(AssertionError):
        CHECKS[operator]("triton")


def changed(index, change):
    """The results with one of them changed in place."""

    def fault(results):
        change(results[index])
        return results

    return fault


def one_more(result):
    result.view(-1)[-1] += 1


IN_EAGER = {
    "mask_binarize": {
        "a pixel": changed(0, lambda masks: masks.view(-1)[-1:].logical_not_()),
        "an area": changed(1, one_more),
        "an edge": changed(2, one_more),
    },
    "panoptic_argmax": {
        "a pixel": changed(0, lambda queries: queries.view(-1)[:1].fill_(-1)),
        "the mask of a pixel": changed(1, lambda inside: inside.view(-1)[:1].logical_not_()),
        "an area": changed(2, one_more),
        "the first area": changed(2, lambda areas: areas.view(-1)[:1].sub_(1)),
    },
    "mask_iou": {
        "a pair": changed(0, one_more),
        "an area": changed(1, one_more),
        "another area": changed(2, one_more),
    },
}
FAULTS = [(operator, name) for operator, faults in IN_EAGER.items() for name in faults]


@pytest.mark.parametrize(("operator", "name"), FAULTS, ids=[f"{o}-{n}" for o, n in FAULTS])
def test_a_wrong_result_turns_the_check_red(operator, name, monkeypatch):
    CHECKS[operator]("eager")
    own, fault = _library._operators[operator], IN_EAGER[operator][name]
    sound = own.eager
    monkeypatch.setattr(own, "eager", lambda *args: fault(sound(*args)))
    with pytest.raises(AssertionError):
        CHECKS[operator]("eager")
