"""mask_iou: the battery of every backend, then what no backend changes."""

import dataclasses
import functools
import math

import pytest
import torch
from backends import HALVES, backend_of, each_backend, each_dtype, interpreted
from torch.utils.flop_counter import FlopCounterMode

from segvit_kernels.ops import mask_iou as module
from segvit_kernels.ops.mask_iou import MaskIoU, mask_iou, mask_iou_reference
from segvit_kernels.testing.mask_iou import CASES, IoUCase, assert_iou

BY_NAME = {case.name: case for case in CASES}
SMALL = IoUCase("small", 2, (5, 3), ((4, 5), (6, 7)), (9, 21))
SOFT = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """Of Triton's interpreter, to which a mask is a program: blocks of 16, of a quarter of the masks."""
    if interpreted(backend_of(request.node)):
        from segvit_kernels.triton import mask_iou as kernels

        config = kernels._config
        small = {"block": 16, "bits": {**config("sm_90")["bits"], "block": 16, "programs": 4}}
        monkeypatch.setattr(kernels, "_config", lambda arch: {**config(arch), **small})


def fewer(case, backend):
    """Of a case as many masks as blocks of 16 are a quarter of others."""
    masks = tuple(-(-count // 4) for count in case.masks)
    return dataclasses.replace(case, masks=masks) if interpreted(backend) else case


def on(backend):
    return functools.partial(mask_iou, backend=backend.name)


def check(case, dtype, backend, soft):
    """The sums of one case, held to float64; arguments are not changed."""
    inputs = case.inputs(dtype, backend.device, soft=soft)
    before = [inputs[name].clone() for name in "ab"]
    found = on(backend)(**inputs)
    assert_iou(case.name, found, inputs, torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(before[0], inputs["a"]) and torch.equal(before[1], inputs["b"])
    return found


@each_dtype(dtypes=(torch.float64, torch.float32))
@SOFT
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case, soft, backend, dtype, poisoned):
    check(fewer(case, backend), dtype, backend, soft)


@each_dtype(dtypes=HALVES)
@SOFT
@pytest.mark.parametrize("name", ["as_they_are", "targets"])
def test_halves(name, soft, backend, dtype, poisoned):
    check(fewer(BY_NAME[name], backend), dtype, backend, soft)


@each_backend()
@SOFT
def test_booleans(soft, backend, poisoned):
    """Both sides; widths on both sides of a word, and some of the bytes of an unaligned slice."""
    for width in (1, 31, 63, 64, 65, 130):
        generator = torch.Generator().manual_seed(width)
        masks = (torch.rand(1, 7, 3, width + 1, generator=generator) > 0.6).to(backend.device)
        a, b = masks[:, :4, :, 1:], masks[:, 4:, :, :-1]
        found = on(backend)(a, b, soft=soft)
        assert_iou("booleans", found, {"a": a, "b": b, "soft": soft, "threshold": 0.0}, torch.float32)


@each_dtype(dtypes=(torch.float32, torch.float16))
@SOFT
def test_no_numbers(soft, backend, dtype, poisoned):
    """NaN is no mask there, as −∞; infinite logits are the limit."""
    masks = torch.full((1, 3, 4, 4), -9.0, dtype=dtype, device=backend.device)
    masks[0, 0, :2], masks[0, 1, 2:], masks[0, 2] = math.nan, math.inf, -math.inf
    lowest = torch.where(masks.isnan(), -math.inf, masks)
    for size in (None, (8, 8)):
        found, expected = (on(backend)(m, m, size=size, soft=soft) for m in (masks, lowest))
        assert all(map(torch.equal, found, expected))
        assert found.union.isfinite().all()
        assert found.intersection[0, 1, 1] >= (8 if size is None else 20)
        assert found.intersection[0, 2, 2] == 0 and found.iou[0, 2, 2] == 0


@each_backend()
@SOFT
def test_strides(soft, backend, poisoned):
    """Any give the same."""
    inputs = SMALL.inputs(torch.float32, backend.device, soft=soft)
    expected = on(backend)(**inputs)
    a, b = inputs.pop("a"), inputs.pop("b")
    wide = a.new_full((*a.shape[:3], a.shape[3] + 5), math.nan)[..., 2:-3].copy_(a)
    odd = b.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    assert all(map(torch.equal, on(backend)(wide, odd, **inputs), expected))


@each_backend()
@SOFT
def test_an_image_does_not_depend_on_the_others_nor_on_the_call(soft, backend, poisoned):
    inputs = SMALL.inputs(torch.float32, backend.device, soft=soft)
    whole = on(backend)(**inputs)
    assert all(map(torch.equal, on(backend)(**inputs), whole))
    for i in range(2):
        own = {**inputs, "a": inputs["a"][i : i + 1], "b": inputs["b"][i : i + 1]}
        torch.testing.assert_close(tuple(on(backend)(**own)), tuple(t[i : i + 1] for t in whole))


@each_backend("cpu", "cuda")
@SOFT
def test_threads_change_nothing(soft, backend, poisoned):
    inputs = BY_NAME["both_upsampled"].inputs(torch.float32, soft=soft)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(on(backend)(**inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@each_backend()
@SOFT
def test_empty(soft, backend, poisoned):
    """No images, or no masks on one side: there is nothing, not an error; the other side has its areas."""
    masks = torch.randn(2, 3, 4, 5, device=backend.device)
    expected = torch.ops.segvit.mask_iou(masks, masks, 4, 5, soft, 0.0, backend="eager")[1]
    for a, b in ((masks[:0], masks[:0]), (masks[:, :0], masks), (masks, masks[:, :0])):
        found = on(backend)(a, b, soft=soft)
        assert found.union.shape == found.iou.shape == (len(a), a.shape[1], b.shape[1])
        for side, area in zip((a, b), backend.op("mask_iou")(a, b, 4, 5, soft, 0.0)[1:], strict=True):
            torch.testing.assert_close(area, expected[: len(side), : side.shape[1]])


@each_backend("triton", "cpu", "cuda")
def test_float64_is_refused_when_asked_for(backend):
    masks = torch.zeros(1, 2, 3, 3)
    with pytest.raises(TypeError, match=f"'{backend.name}' takes bool, float32.*b is float64"):
        on(backend)(masks, masks.double())


def arguments_of(case, soft):
    inputs = case.inputs(torch.float32)
    return (inputs["a"], inputs["b"], *(case.size or case.grids[0]), soft, 0.25)


@each_backend("eager", "cpu", "cuda")
@SOFT
def test_opcheck(soft, backend):
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.segvit.mask_iou.default
    torch.library.opcheck(op, arguments_of(SMALL, soft), {"backend": backend.name}, test_utils=utils)


# What no backend changes.


def test_against_pycocotools():
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    inputs = BY_NAME["as_they_are"].inputs(torch.float32)
    a, b = inputs["a"] > 0, inputs["b"] > 0
    encoded = [[coco.encode(m.numpy().astype("uint8").copy(order="F")) for m in masks[0]] for masks in (a, b)]
    expected = torch.from_numpy(coco.iou(*encoded, [0] * b.shape[1]))
    torch.testing.assert_close(mask_iou(a, b).iou[0].double(), expected, rtol=1e-6, atol=0)


def test_by_hand():
    a = torch.tensor([[[[1, 1, 0, 0]], [[0, 0, 0, 0]]]], dtype=torch.bool)
    b = torch.tensor([[[[0, 1, 1, 1]], [[0, 0, 0, 0]]]], dtype=torch.bool)
    found = mask_iou(a, b)
    assert found.intersection.tolist() == [[[1, 0], [0, 0]]] and found.union.tolist() == [[[4, 2], [3, 0]]]
    torch.testing.assert_close(found.iou, torch.tensor([[[0.25, 0.0], [0.0, 0.0]]]))
    soft = mask_iou(torch.zeros(1, 1, 1, 4), b[:, :1], soft=True)
    assert (soft.intersection.item(), soft.union.item()) == (1.5, 3.5)


def test_blocking_does_not_change_the_result(monkeypatch):
    for soft in (False, True):
        inputs = BY_NAME["targets"].inputs(torch.float64, soft=soft)
        expected = mask_iou(**inputs)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_BUDGET", 1)
            torch.testing.assert_close(tuple(mask_iou(**inputs)), tuple(expected))


def test_meta_flops_and_autocast():
    meta = mask_iou(**SMALL.inputs(torch.float16, "meta"))
    assert meta.union.is_meta and meta.iou.shape == (2, 5, 3) and meta.union.dtype == torch.int32
    inputs = SMALL.inputs(torch.float32, soft=True)
    with FlopCounterMode(display=False) as counter:
        expected = mask_iou(**inputs)
    assert counter.get_total_flops() == 2 * 2 * 5 * 3 * 9 * 21
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, mask_iou(**inputs), expected))
    inputs["a"].requires_grad_()
    assert not mask_iou(**inputs).iou.requires_grad


def test_compile_fullgraph_and_second_size():
    torch._dynamo.reset()
    frames = []

    def backend(graph, examples):
        frames.append(graph)
        return graph.forward

    def overlap(a, b):
        return mask_iou(a, b, size=(4 * a.shape[2], 4 * a.shape[3])).iou

    compiled = torch.compile(overlap, fullgraph=True, dynamic=True, backend=backend)
    for h, w in ((7, 5), (9, 11), (20, 6)):
        a, b = torch.randn(2, 6, h, w), torch.randn(2, 3, h, w)
        assert torch.equal(compiled(a, b), overlap(a, b))
    assert len(frames) == 1


MASKS = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"a": MASKS[0]}, ValueError, r"a has shape \(3, 4, 5\); expected \(batch, masks"),
        ({"a": [MASKS]}, TypeError, "a is a list; expected a tensor"),
        ({"b": MASKS.long()}, TypeError, "b has dtype torch.int64; expected bool, float32"),
        ({"b": MASKS[:1]}, ValueError, "b is a batch of 1 on cpu; expected 2 on cpu"),
        ({"b": MASKS.to("meta")}, ValueError, "b is a batch of 2 on meta; expected 2 on cpu"),
        (
            {"b": MASKS[..., 1:]},
            ValueError,
            r"b has masks of \(4, 4\); expected \(4, 5\), that of a, or size=",
        ),
        ({"b": MASKS > 0, "size": (8, 9)}, ValueError, r"expected \(8, 9\), the common size of booleans"),
        ({"size": (0, 9)}, ValueError, r"size is \(0, 9\)"),
        ({"size": (2**16, 2**15)}, ValueError, r"common size is \(65536, 32768\); expected at most 2³¹ − 1"),
        ({"soft": 1}, TypeError, "soft is 1; expected True or False"),
        ({"threshold": math.nan}, ValueError, "threshold is nan"),
        ({"backend": "cudnn"}, ValueError, "'cudnn'"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        mask_iou(**{"a": MASKS, "b": MASKS, **change})


def test_triton_leaves_what_32_bits_do_not_count_to_eager():
    def refused(backend, masks, size):
        some = torch.zeros(1, 1, 1, 1).expand(1, masks, 1, 1)
        error = module._kernels_refuse(backend, some, some, *size, True, 0.0)
        return "pairs and pixels in 32 bits" in str(error)

    large, wide = (46340, (4, 4)), (2, (2**16, 2**15))
    assert refused("triton", *large) and refused("triton", *wide)
    assert not refused("cpu", *large) and not refused("triton", 46000, (2**15, 2**15))


@SOFT
@pytest.mark.parametrize("field", MaskIoU._fields)
def test_the_helper_sees_one_wrong_sum(field, soft):
    inputs = SMALL.inputs(torch.float32, soft=soft)
    found = mask_iou_reference(**inputs)
    assert_iou("right", found, inputs, torch.float32)
    changed = getattr(found, field).clone()
    changed[1, 4, 2] += 2 if not soft else 0.01
    with pytest.raises(AssertionError, match=f"{field} is off"):
        assert_iou("wrong", found._replace(**{field: changed}), inputs, torch.float32)
