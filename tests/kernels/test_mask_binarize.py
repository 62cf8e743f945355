"""The standard battery of mask_binarize on the eager backend (Triton, C++: test_mask_binarize_*.py)."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from segvit_kernels import BackendUnavailableError, mask_binarize, mask_binarize_reference
from segvit_kernels.ops import mask_binarize as module
from segvit_kernels.testing.mask_binarize import CASES, BinarizeCase, assert_masks, oracle, unpacked

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_masks(case, dtype, poisoned):
    inputs = case.inputs(dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    found = mask_binarize(**inputs, backend="eager")
    differing = assert_masks(case.name, found, oracle(inputs), oracle(inputs, exact))
    assert differing == 0 or dtype != torch.float64
    packed = mask_binarize(**inputs, format="packed", backend="eager")
    assert torch.equal(unpacked(packed.masks, case.size[1]), found.masks)
    assert torch.equal(unpacked(packed.masks, 32 * packed.masks.shape[-1]).sum(), found.masks.sum())
    encoded = mask_binarize(**inputs, format="rle", backend="eager")
    for other in (packed, encoded):
        assert torch.equal(other.areas, found.areas) and torch.equal(other.boxes, found.boxes)
    if dtype == torch.float64:
        for name in ("bool", "packed", "rle"):
            ours, theirs = (f(**inputs, format=name).masks for f in (mask_binarize, mask_binarize_reference))
            assert ours == theirs if name == "rle" else torch.equal(ours, theirs)


def runs_of(lengths):
    """Words along columns of one mask of one column, in which runs of 0 and 1 take turns."""
    bits = torch.repeat_interleave(torch.arange(len(lengths)) % 2 == 1, torch.tensor(lengths))
    return module._pack(bits[None, None]), bits.shape[0]


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_run_lengths_are_those_of_pycocotools(backend):
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    if backend == "cpu" and (reason := module._library.why_not("cpu", "cpu")):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)

    def check(columns, height):
        bits = unpacked(columns, height).mT
        text, ends = torch.ops.segvit.mask_rle(columns, height, backend=backend)
        start = 0
        for mask, stop in zip(bits, ends.tolist(), strict=True):
            expected = coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            assert bytes(text[start:stop].tolist()) == expected["counts"]
            assert expected["size"] == list(mask.shape)
            start = stop
        assert start == len(text)

    # Numbers of digits and signs of differences, on both sides of where one more is needed.
    for a in (1, 15, 16, 17, 511, 512, 16_383, 16_384, 600_000):
        check(*runs_of([0, a, 3, 17, a, 1, 40]))
        check(*runs_of([a, 1, a + 16, a, 2]))
    for height in (1, 31, 32, 33, 70):
        for share in (0.0, 0.02, 0.5, 1.0):
            bits = torch.rand(3, 19, height, generator=generator) < share
            check(module._pack(bits), height)
    # What lies beyond the last row does not count.
    columns, height = module._pack(torch.rand(2, 5, 37, generator=generator) < 0.5), 37
    check(columns | torch.tensor([0, -(2**5)], dtype=torch.int32), height)
    check(columns[:0], height)


@pytest.mark.parametrize("budget", [1, 5000])
@pytest.mark.parametrize("name", ["odd", "words", "boxes", "no mask"])
def test_blocking_does_not_change_the_result(name, budget, monkeypatch):
    inputs = BY_NAME[name].inputs(torch.float64)
    expected = {f: mask_binarize(**inputs, format=f, backend="eager") for f in module.FORMATS}
    monkeypatch.setattr(module, "_BUDGET", budget)
    monkeypatch.setattr(module, "_PACKED", budget)
    for name, theirs in expected.items():
        ours = mask_binarize(**inputs, format=name, backend="eager")
        assert ours.masks == theirs.masks if name == "rle" else torch.equal(ours.masks, theirs.masks)
        assert torch.equal(ours.areas, theirs.areas) and torch.equal(ours.boxes, theirs.boxes)


@pytest.mark.parametrize("format", module.FORMATS)
def test_nothing_of_floating_point_at_full_size(format):
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.dtype != torch.bool:
                    self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
            return result

    logits = torch.randn(1, 40, 8, 8)
    with Largest() as largest:
        mask_binarize(logits, (600, 700), format=format, backend="eager")
    assert largest.bytes <= 8 * (module._BUDGET + 32 * 700)  # of 67 MB; indices take 8 bytes


def test_whole_boxes_are_the_interpolation_pasted():
    logits = torch.randn(1, 2, 7, 9, dtype=torch.float64)
    boxes = torch.tensor([[[3, 5, 23, 18], [-4, -2, 13, 40]]])
    masks = mask_binarize(logits, (30, 32), boxes=boxes, threshold=0.1).masks
    expected = torch.zeros(1, 2, 30, 32, dtype=torch.bool)
    expected[:, 0, 5:18, 3:23] = F.interpolate(logits, (13, 20), mode="bilinear")[:, 0] > 0.1
    cut = F.interpolate(logits, (42, 17), mode="bilinear")[:, 1] > 0.1
    expected[:, 1, :, :13] = cut[:, 2:32, 4:]
    assert torch.equal(masks, expected)


def test_pasting_is_torchvisions():
    """Their masks get a border of zeros, boxes grow with it and become whole numbers, ends included."""
    roi_heads = pytest.importorskip("torchvision.models.detection.roi_heads")
    generator = torch.Generator().manual_seed(3)
    probs = torch.rand(9, 1, 28, 28, generator=generator)
    corners = torch.rand(9, 2, 2, generator=generator).sort(1).values * torch.tensor([80.0, 60.0])
    boxes = corners.flatten(1)
    theirs = roi_heads.paste_masks_in_image(probs, boxes, (60, 80))[:, 0] > 0.5
    grown = roi_heads.expand_boxes(boxes, 30 / 28).long() + torch.tensor([0, 0, 1, 1])
    padded = F.pad(probs[:, 0], (1, 1, 1, 1))[None]
    ours = mask_binarize(padded, (60, 80), boxes=grown[None], threshold=0.5, backend="eager").masks[0]
    assert torch.equal(ours, theirs)


def test_boxes_that_hold_nothing():
    nan, inf = math.nan, math.inf
    boxes = [[3, 3, 3, 9], [5, 5, 2, 9], [nan, 0, 9, 9], [0, -inf, 9, inf], [0, 0, 9, inf], [-9, -9, 0, 0.4]]
    found = mask_binarize(torch.ones(1, 6, 3, 3), (9, 9), boxes=torch.tensor([boxes]), backend="eager")
    assert not found.masks.any() and not found.areas.any() and not found.boxes.any()


def test_not_differentiable_and_inputs_untouched():
    logits = torch.randn(1, 2, 5, 5, requires_grad=True)
    before = logits.detach().clone()
    assert not any(t.requires_grad for t in mask_binarize(logits, (9, 9)))
    assert torch.equal(logits, before)


def test_macs():
    logits = torch.randn(2, 3, 5, 5)
    with FlopCounterMode(display=False) as counter:
        mask_binarize(logits, (9, 11))
    assert counter.get_total_flops() == 2 * 4 * 2 * 3 * 9 * 11


@pytest.mark.parametrize("boxes", [False, True])
def test_opcheck(boxes):
    case = BinarizeCase("op", 2, 3, (5, 4), (40, 37), boxes=boxes)
    inputs = case.inputs(torch.float32)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for layout in range(3):
        arguments = (inputs["mask_logits"], inputs["boxes"], *case.size, 0.0, layout)
        operator = torch.ops.segvit.mask_binarize.default
        torch.library.opcheck(operator, arguments, {"backend": "eager"}, test_utils=utils)
    columns = operator(*arguments)[0].flatten(0, 1)
    torch.library.opcheck(torch.ops.segvit.mask_rle.default, (columns, 40), test_utils=utils[:2])


def test_compiles_in_one_graph():
    compiled = torch.compile(
        lambda x: mask_binarize(x, (40, 37), format="packed"), fullgraph=True, dynamic=True, backend="eager"
    )
    for count in (3, 5):
        logits = torch.randn(1, count, 5, 4)
        for ours, theirs in zip(
            compiled(logits), mask_binarize(logits, (40, 37), format="packed"), strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask_logits": [1]}, TypeError, "mask_logits is a list; expected a tensor"),
        ({"mask_logits": torch.ones(1, 2, 3, 3, dtype=torch.int32)}, TypeError, "mask_logits has dtype t"),
        ({"mask_logits": torch.ones(2, 3, 3)}, ValueError, r"mask_logits has shape \(2, 3, 3\); exp"),
        ({"mask_logits": torch.ones(1, 2, 0, 3)}, ValueError, r"mask_logits has shape \(1, 2, 0, 3\)"),
        ({"size": 9}, ValueError, r"size is 9; expected \(height, width\)"),
        ({"size": (0, 9)}, ValueError, r"size is \(0, 9\); expected"),
        ({"size": (2**16, 2**16)}, ValueError, "1 to 2³¹ − 1 pixels"),
        ({"size": (1.5, 9)}, TypeError, "size is 1.5; expected a whole number"),
        ({"threshold": math.nan}, ValueError, "threshold is nan; expected"),
        ({"threshold": 1e30}, ValueError, "threshold is 1e[+]30; expected -1e[+]20 to 1e[+]20"),
        ({"threshold": "0"}, TypeError, "threshold is '0'; expected a number"),
        ({"format": "coco"}, ValueError, "format is 'coco'; expected one of bool, packed, rle"),
        ({"boxes": torch.zeros(1, 3, 4)}, ValueError, r"boxes has shape \(1, 3, 4\); expected \(1, 2, 4\)"),
        ({"boxes": torch.zeros(1, 2, 4).bool()}, TypeError, "boxes has dtype torch.bool; expected"),
        ({"boxes": [0, 0, 1, 1]}, TypeError, "boxes is a list; expected a tensor"),
        ({"boxes": torch.zeros(1, 2, 4, device="meta")}, ValueError, "boxes is on meta; expected cpu"),
        ({"backend": "gpu"}, ValueError, "argument 'backend' is 'gpu'"),
        ({"backend": "cuda"}, BackendUnavailableError, "mask_binarize: backend 'cuda' is not available"),
    ],
)  # fmt: skip
def test_bad_arguments(changes, error, message, monkeypatch):
    if changes.get("backend") == "cuda" and not module._library.why_not("cuda", "cpu"):
        pytest.skip("its emulator is built")
    with pytest.raises(error, match=message):
        mask_binarize(**{"mask_logits": torch.zeros(1, 2, 3, 3), "size": (5, 6)} | changes)
