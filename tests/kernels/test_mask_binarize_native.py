"""Binary masks by the native library against float64: C++ for CPUs, CUDA kernels emulated."""

import math

import pytest
import torch

from segvit_kernels import mask_binarize
from segvit_kernels.testing.mask_binarize import CASES, BinarizeCase, assert_masks, oracle, unpacked

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)


def check(name, inputs, backend):
    """All formats, which agree bit for bit; the masks within the error budget."""
    found = mask_binarize(**inputs, backend=backend)
    assert_masks(name, found, oracle(inputs), oracle(inputs, torch.float32))
    packed = mask_binarize(**inputs, format="packed", backend=backend)
    bits = unpacked(packed.masks, 32 * packed.masks.shape[-1])
    assert torch.equal(bits[..., : inputs["size"][1]], found.masks) and bits.sum() == found.masks.sum()
    encoded = mask_binarize(**inputs, format="rle", backend=backend)
    height, width = inputs["size"]
    columns = torch.zeros(*found.masks.shape[:2], width, -(-height // 32) * 32, dtype=torch.bool)
    columns[..., :height] = found.masks.mT
    words = torch.ops.segvit.mask_binarize(inputs["mask_logits"], inputs["boxes"], height, width,
                                           inputs["threshold"], 2, backend=backend)[0]  # fmt: skip
    assert torch.equal(unpacked(words, columns.shape[-1]), columns)
    text, ends = torch.ops.segvit.mask_rle(words.flatten(0, 1).cpu(), height, backend="eager")
    texts = [one["counts"] for image in encoded.masks for one in image]
    assert b"".join(texts) == bytes(text.tolist())
    assert [sum(map(len, texts[: i + 1])) for i in range(len(texts))] == ends.tolist()
    for other in (packed, encoded):
        assert torch.equal(other.areas, found.areas) and torch.equal(other.boxes, found.boxes)
    return found


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case, dtype, native_backend, poisoned):
    check(case.name, case.inputs(dtype), native_backend)


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
def test_grids_and_sizes(grid, size, coherent, native_backend, poisoned):
    """Coarse and fine, up and down, several strips of rows."""
    case = BinarizeCase("sizes", 1, 2, grid, size, coherent=coherent, threshold=0.4)
    check(case.name, case.inputs(torch.float32), native_backend)


def test_not_a_number_and_infinities(native_backend, poisoned):
    """No pixel that such a cell has a share in, in all backends; zero shares of infinities are nothing."""
    logits = torch.full((1, 3, 4, 6), 5.0)
    logits[0, 0, 1, 2] = math.nan
    logits[0, 1, :, :3], logits[0, 1, :, 3:] = -math.inf, math.inf
    logits[0, 2] = math.nan
    near = torch.zeros(4, 6)
    near[1, 2] = 1
    # Powers of two: weights are exact everywhere.
    size = (16, 24)
    share = torch.nn.functional.interpolate(near[None, None], size, mode="bilinear")[0, 0] > 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = mask_binarize(logits.to(dtype), size, threshold=-1e20, backend=native_backend)
        assert torch.equal(found.masks[0, 0], ~share)
        assert not found.masks[0, 1, :, :12].any() and found.masks[0, 1, :, 12:].all()
        assert not found.masks[0, 2].any()
        assert found.areas[0].tolist() == [int((~share).sum()), 16 * 12, 0]
        assert found.boxes[0].tolist() == [[0, 0, 24, 16], [12, 0, 24, 16], [0, 0, 0, 0]]
    for backend in ("eager", native_backend):
        same = mask_binarize(logits, (4, 6), backend=backend).masks
        assert torch.equal(same[0, 0], near == 0) and same[0, 1, :, 3:].all()


@pytest.mark.parametrize("threshold", [-1e20, -0.0, 1e-38, 3.5, 1e20])
def test_thresholds(threshold, native_backend, poisoned):
    """Greater, not equal; extremes hold all or nothing."""
    logits = torch.full((1, 1, 3, 3), 3.5)
    found = mask_binarize(logits, (7, 40), threshold=threshold, backend=native_backend)
    assert found.areas.item() == (7 * 40 if threshold < 3.5 else 0)
    tiny = mask_binarize(logits * 1e-45, (7, 40), threshold=0.0, backend="eager").areas.item()
    assert tiny == mask_binarize(logits * 1e-45, (7, 40), backend=native_backend).areas.item()


def test_boxes_that_hold_nothing(native_backend, poisoned):
    nan, inf = math.nan, math.inf
    boxes = [[3, 3, 3, 9], [5, 5, 2, 9], [nan, 0, 9, 9], [0, -inf, 9, inf], [0, 0, 9, inf], [-9, -9, 0, 0.4],
             [-3e38, 0, 3e38, 9], [0, 0, 9, 9]]  # fmt: skip
    found = mask_binarize(torch.ones(1, 8, 3, 3), (9, 9), boxes=torch.tensor([boxes]), backend=native_backend)
    assert found.areas[0].tolist() == [0] * 7 + [81] and not found.boxes[0, :7].any()


def test_strides(native_backend, poisoned):
    case = BinarizeCase("strides", 2, 3, (5, 6), (40, 50))
    inputs = case.inputs(torch.float32)
    expected = mask_binarize(**inputs, backend=native_backend)
    wide = torch.full((3, 2, 5, 11), math.nan)
    wide[..., 2:8] = inputs["mask_logits"].transpose(0, 1)
    for logits in (wide[..., 2:8].transpose(0, 1), inputs["mask_logits"].mT.contiguous().mT):
        found = mask_binarize(**{**inputs, "mask_logits": logits}, backend=native_backend)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_repeatable_whatever_the_threads(native_backend):
    inputs = BinarizeCase("threads", 1, 5, (20, 20), (300, 70), coherent=True).inputs(torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(mask_binarize(**inputs, backend=native_backend))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_float64_is_refused(native_backend):
    with pytest.raises(TypeError, match=f"'{native_backend}' takes float32.*mask_logits is torch.float64"):
        mask_binarize(torch.zeros(1, 1, 2, 2).double(), (3, 3), backend=native_backend)


@pytest.mark.parametrize("boxes", [False, True])
def test_opcheck(boxes, native_backend):
    case = BinarizeCase("op", 1, 3, (5, 4), (40, 37), boxes=boxes)
    inputs = case.inputs(torch.float32)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    operator, arguments = torch.ops.segvit.mask_binarize.default, (inputs["mask_logits"], inputs["boxes"])
    for layout in range(3):
        given = (*arguments, *case.size, 0.0, layout)
        torch.library.opcheck(operator, given, {"backend": native_backend}, test_utils=utils)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_on_the_device(case, dtype):
    inputs = case.inputs(dtype, "cuda")
    found = mask_binarize(**inputs, backend="cuda")
    assert_masks(case.name, found, oracle(inputs), oracle(inputs, torch.float32))
