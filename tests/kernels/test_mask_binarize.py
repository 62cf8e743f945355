"""mask_binarize: the battery of every backend, then what is the operator's own."""

import functools
import math

import numpy as np
import pytest
import torch
from backends import (
    HALVES,
    PTX,
    assert_same,
    assert_threads_change_nothing,
    backend_of,
    each_backend,
    each_dtype,
    interpreted,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from segvit_kernels import BackendUnavailableError, mask_binarize, mask_binarize_reference
from segvit_kernels.ops import mask_binarize as module
from segvit_kernels.ops.mask_binarize import BinaryMasks
from segvit_kernels.testing.mask_binarize import CASES, BinarizeCase, assert_masks, oracle, unpacked

BY_NAME = {case.name: case for case in CASES}
NATIVE = ("cpu", "cuda", "cuda-gpu")
# For Triton, which is interpreted.
FEW = (
    BinarizeCase("up", 1, 1, (5, 7), (67, 45), threshold=0.3),
    BinarizeCase("down", 2, 1, (40, 33), (21, 35)),
    BinarizeCase("box", 1, 2, (6, 5), (40, 70), boxes=True, coherent=True),
    BY_NAME["one_of_everything"],
    BY_NAME["no mask"],
)
# Few and large programs keep the interpreter quick.
LARGE = {"block": 64, "rows": 128}


@pytest.fixture(autouse=True)
def few_tiles(request, monkeypatch):
    """Of Triton's interpreter, for calls that give no configuration."""
    if interpreted(backend_of(request.node)):
        from segvit_kernels.triton import mask_binarize as kernels

        config = kernels._config
        monkeypatch.setattr(
            kernels, "_config", lambda shape, layout, arch: {**config(shape, layout, arch), **LARGE}
        )


def run(inputs, backend, layout=0):
    """Results of the operator; layouts: booleans, words along rows, words along columns."""
    logits, boxes, (height, width) = inputs["mask_logits"], inputs.get("boxes"), inputs["size"]
    threshold = inputs.get("threshold", 0.0)
    return BinaryMasks(*backend.op("mask_binarize")(logits, boxes, height, width, threshold, layout))


def check(case, dtype, backend):
    """All layouts, which agree bit for bit; the masks within the error budget; the public formats too."""
    inputs = case.inputs(dtype, backend.device)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    found = run(inputs, backend)
    differing = assert_masks(case.name, found, oracle(inputs), oracle(inputs, exact))
    assert differing == 0 or dtype != torch.float64
    for layout in (1, 2):
        words, areas, boxes = run(inputs, backend, layout)
        bits = unpacked(words, 32 * words.shape[-1])
        masks = found.masks.mT if layout == 2 else found.masks
        assert torch.equal(bits[..., : masks.shape[-1]], masks) and bits.sum() == masks.sum()
        assert torch.equal(areas, found.areas) and torch.equal(boxes, found.boxes)
    return found, words


@each_dtype("eager", *NATIVE, "triton-gpu")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case, backend, dtype, poisoned):
    inputs = case.inputs(dtype, backend.device)
    found, words = check(case, dtype, backend)
    named = {f: mask_binarize(**inputs, format=f, backend=backend.name) for f in module.FORMATS}
    assert torch.equal(named["bool"].masks, found.masks)
    assert torch.equal(unpacked(named["packed"].masks, case.size[1]), found.masks)
    text, ends = torch.ops.segvit.mask_rle(words.flatten(0, 1).cpu(), case.size[0], backend="eager")
    texts = [one["counts"] for image in named["rle"].masks for one in image]
    assert b"".join(texts) == bytes(text.tolist())
    assert [sum(map(len, texts[: i + 1])) for i in range(len(texts))] == ends.tolist()
    for other in named.values():
        assert torch.equal(other.areas, found.areas) and torch.equal(other.boxes, found.boxes)
    if dtype == torch.float64:
        for name, ours in named.items():
            theirs = mask_binarize_reference(**inputs, format=name).masks
            assert ours.masks == theirs if name == "rle" else torch.equal(ours.masks, theirs)


@each_backend("triton")
@pytest.mark.parametrize("index", range(len(FEW)), ids=lambda i: FEW[i].name)
def test_few(index, backend, poisoned):
    """In one dtype each where they are interpreted."""
    for dtype in backend.dtypes if PTX else backend.dtypes[index % 2 :][:1]:
        check(FEW[index], dtype, backend)


@each_backend(*NATIVE)
@pytest.mark.parametrize(
    "grid, size",
    [
        ((1, 1), (3, 70)),
        ((2, 300), (35, 17)),
        ((9, 40), (600, 45)),
        ((70, 3), (31, 64)),
        ((4, 5), (33, 1030)),
    ],
)
@pytest.mark.parametrize("coherent", [False, True], ids=["noise", "blobs"])
def test_grids_and_sizes(grid, size, coherent, backend, poisoned):
    """Coarse and fine, up and down, several strips of rows."""
    check(BinarizeCase("sizes", 1, 2, grid, size, coherent=coherent, threshold=0.4), torch.float32, backend)


@each_dtype(dtypes=(torch.float32, *HALVES))
def test_not_a_number_and_infinities(backend, dtype, poisoned):
    """No pixel that such a cell has a share in, in all backends; zero shares of infinities are nothing."""
    logits = torch.full((1, 3, 4, 6), 5.0, device=backend.device)
    logits[0, 0, 1, 2] = math.nan
    logits[0, 1, :, :3], logits[0, 1, :, 3:] = -math.inf, math.inf
    logits[0, 2] = math.nan
    near = logits.new_zeros(4, 6)
    near[1, 2] = 1
    # Powers of two: weights are exact everywhere.
    share = F.interpolate(near[None, None], (16, 24), mode="bilinear")[0, 0] > 0
    found = run({"mask_logits": logits.to(dtype), "size": (16, 24), "threshold": -1e20}, backend)
    assert torch.equal(found.masks[0, 0], ~share)
    assert not found.masks[0, 1, :, :12].any() and found.masks[0, 1, :, 12:].all()
    assert not found.masks[0, 2].any()
    assert found.areas[0].tolist() == [int((~share).sum()), 16 * 12, 0]
    assert found.boxes[0].tolist() == [[0, 0, 24, 16], [12, 0, 24, 16], [0, 0, 0, 0]]
    same = run({"mask_logits": logits.to(dtype), "size": (4, 6)}, backend).masks
    assert torch.equal(same[0, 0], near == 0) and same[0, 1, :, 3:].all()


@each_backend("eager", *NATIVE)
@pytest.mark.parametrize("threshold", [-1e20, -0.0, 1e-38, 3.5, 1e20])
def test_thresholds(threshold, backend, poisoned):
    """Greater, not equal; extremes hold all or nothing."""
    logits, areas = torch.full((1, 1, 3, 3), 3.5, device=backend.device), {}
    found = run({"mask_logits": logits, "size": (7, 40), "threshold": threshold}, backend)
    assert found.areas.item() == (7 * 40 if threshold < 3.5 else 0)
    for name in ("eager", backend.name):
        areas[name] = mask_binarize(logits * 1e-45, (7, 40), backend=name).areas.item()
    assert areas["eager"] == areas[backend.name]


@each_backend()
def test_boxes_that_hold_nothing(backend, poisoned):
    nan, inf = math.nan, math.inf
    boxes = [[3, 3, 3, 9], [5, 5, 2, 9], [nan, 0, 9, 9], [0, -inf, 9, inf], [0, 0, 9, inf], [-9, -9, 0, 0.4],
             [-3e38, 0, 3e38, 9], [0, 0, 9, 9]]  # fmt: skip
    logits, boxes = (t.to(backend.device) for t in (torch.ones(1, 8, 3, 3), torch.tensor([boxes])))
    found = run({"mask_logits": logits, "boxes": boxes, "size": (9, 9)}, backend)
    assert found.areas[0].tolist() == [0] * 7 + [81] and not found.boxes[0, :7].any()


@each_backend()
def test_strides(backend, poisoned):
    inputs = BinarizeCase("strides", 2, 3, (5, 6), (20, 20)).inputs(torch.float32, backend.device)
    expected, wide = run(inputs, backend)._asdict(), torch.full((3, 2, 5, 11), math.nan)
    wide = wide.to(backend.device)
    wide[..., 2:8] = inputs["mask_logits"].transpose(0, 1)
    for logits in (wide[..., 2:8].transpose(0, 1), inputs["mask_logits"].mT.contiguous().mT):
        assert_same(run({**inputs, "mask_logits": logits}, backend)._asdict(), expected)


@each_backend("cpu", "cuda")
def test_threads_change_nothing(backend):
    inputs = BinarizeCase("threads", 1, 5, (20, 20), (300, 70), coherent=True).inputs(torch.float32)
    assert_threads_change_nothing(lambda: run(inputs, backend)._asdict())


@each_backend("cpu", "cuda", "triton")
def test_float64_is_refused(backend):
    with pytest.raises(TypeError, match=f"'{backend.name}' takes float32.*mask_logits is torch.float64"):
        mask_binarize(torch.zeros(1, 1, 2, 2).double(), (3, 3), backend=backend.name)


@each_backend("eager", "cpu", "cuda")
@pytest.mark.parametrize("boxes", [False, True])
def test_opcheck(boxes, backend):
    inputs = BinarizeCase("op", 2, 3, (5, 4), (40, 37), boxes=boxes).inputs(torch.float32)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    check = functools.partial(torch.library.opcheck, torch.ops.segvit.mask_binarize.default)
    for layout in range(3):
        arguments = (inputs["mask_logits"], inputs["boxes"], *inputs["size"], 0.0, layout)
        check(arguments, {"backend": backend.name}, test_utils=utils)
    columns = run(inputs, backend, 2).masks.flatten(0, 1)
    torch.library.opcheck(torch.ops.segvit.mask_rle.default, (columns, 40), test_utils=utils[:2])


# What no backend changes.


def runs_of(lengths):
    """Words along columns of one mask of one column, in which runs of 0 and 1 take turns."""
    bits = torch.repeat_interleave(torch.arange(len(lengths)) % 2 == 1, torch.tensor(lengths))
    return module._pack(bits[None, None]), bits.shape[0]


@each_backend("eager", "cpu")
def test_run_lengths_are_those_of_pycocotools(backend):
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    generator = torch.Generator().manual_seed(0)

    def check(columns, height):
        bits = unpacked(columns, height).mT
        text, ends = backend.op("mask_rle")(columns, height)
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
