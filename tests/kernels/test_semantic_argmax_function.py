"""semantic_argmax: what no backend changes; the eager form's blocks; refusals; the helper of the battery."""

import pytest
import torch
from backends import BY_ID, Graphs
from test_semantic_argmax import BY_NAME, RANDOM_OR_TRAINED, check, named
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from segvit_kernels.ops import _class_scores
from segvit_kernels.ops import semantic_argmax as module
from segvit_kernels.ops.semantic_argmax import View, Views, semantic_argmax, semantic_argmax_reference
from segvit_kernels.testing.semantic_argmax import SemanticCase, assert_labels, oracle


def test_an_image_of_640():
    case = SemanticCase("640", ((1, 40, 40),), 33, 19, (640, 640))
    check(case.name, case.inputs(torch.float32), BY_ID["eager"])


@RANDOM_OR_TRAINED
@pytest.mark.parametrize("budget", [1, 3000])
@named()
def test_blocking_does_not_change_the_result(case, budget, concentrated, monkeypatch):
    inputs = case.inputs(torch.float64, concentrated=concentrated)
    expected = semantic_argmax(**inputs)
    monkeypatch.setattr(_class_scores, "_BUDGET", budget)
    torch.testing.assert_close(semantic_argmax(**inputs), expected, rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@RANDOM_OR_TRAINED
@pytest.mark.parametrize("repeat", [1, 3])
def test_nothing_of_full_size(repeat, concentrated, monkeypatch):
    """No tensor holds more than a block, or than the label map, whatever the number of views and classes."""
    size, budget = (96, 96), 2**15
    monkeypatch.setattr(_class_scores, "_BUDGET", budget)
    crops = [View.crop(0, size, size, t, u, (64, 64), (4, 4)) for t in (0, 32) for u in (0, 32)] * repeat
    case = SemanticCase("sliding", ((len(crops), 4, 4),), 64, 50 * repeat, size, tuple(crops), 1)
    inputs = case.inputs(torch.float32, concentrated=concentrated)
    views = inputs["views"]
    arguments = ([inputs["mask_logits"]], inputs["class_probs"], views.tensors, 1, *size, views.reach)
    with LargestTensor() as largest:
        module._eager(*arguments, True, False, 0.0)
    assert 0 < largest.elements <= max(budget, size[0] * size[1])


@named("odd", "classes_300", "mixed")
def test_meta_tensors(case):
    labels, scores = semantic_argmax(**case.inputs(torch.float16, device="meta"), return_scores=True)
    expected = semantic_argmax(**case.inputs(torch.float16))
    assert labels.is_meta and labels.shape == scores.shape == expected.shape
    assert labels.dtype == expected.dtype and scores.dtype == torch.float32


def test_flops():
    inputs = BY_NAME["odd"].inputs(torch.float32)
    with FlopCounterMode(display=False) as counter:
        semantic_argmax(**inputs)
    assert counter.get_total_flops() == 2 * 2 * 20 * 19 * 100 * 37


def test_compile_fullgraph_and_second_size():
    torch._dynamo.reset()
    frames = Graphs()

    def scaled(masks, probs):
        return semantic_argmax(masks, probs, (4 * masks.shape[2], 4 * masks.shape[3]), return_scores=True)

    compiled = torch.compile(scaled, fullgraph=True, dynamic=True, backend=frames)
    for h, w in ((7, 5), (9, 11), (20, 6)):
        masks, probs = torch.randn(2, 6, h, w), torch.rand(2, 6, 13)  # no two sizes alike
        torch.testing.assert_close(compiled(masks, probs), scaled(masks, probs), rtol=0, atol=0)
    assert len(frames) == 1


def test_export():
    class Tail(torch.nn.Module):
        def forward(self, masks, probs):
            return semantic_argmax(masks, probs, (30, 20))

    arguments = (torch.randn(1, 6, 7, 5), torch.rand(1, 6, 5))
    program = torch.export.export(Tail(), arguments)
    torch.testing.assert_close(program.module()(*arguments), Tail()(*arguments))
    assert "segvit.semantic_argmax" in str(program.graph)


def test_no_gradient_and_empty_batch():
    masks = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels, scores = semantic_argmax(masks, torch.rand(1, 3, 2), (8, 8), return_scores=True)
    assert not labels.requires_grad and not scores.requires_grad
    labels, scores = semantic_argmax(masks[:0], torch.rand(0, 3, 300), (8, 9), return_scores=True)
    assert labels.shape == scores.shape == (0, 8, 9) and labels.dtype == torch.int16


def test_scattered_pixels_are_those_of_the_block():
    """The path of pixels that the shortcut leaves open, on all pixels, with clamped places and ±inf."""
    masks = torch.randn(6, 4, 5, dtype=torch.float64)
    masks[0, 1], masks[1, :, 2] = float("inf"), -float("inf")
    part = _class_scores.Part(masks, torch.rand(3, 6, dtype=torch.float64), (0.3, -1.2, -0.25, 4.9), (0, 24))
    y, x = torch.cartesian_prod(torch.arange(18), torch.arange(24)).unbind(1)
    block = _class_scores._mix(part, 0, 18, True)
    assert block.isfinite().all()
    torch.testing.assert_close(_class_scores.mix_at(part, y, x), block.flatten(1))


def test_autocast_changes_nothing():
    inputs = BY_NAME["odd"].inputs(torch.float32)
    expected = semantic_argmax(**inputs, return_scores=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(semantic_argmax(**inputs, return_scores=True), expected, rtol=0, atol=0)
    expected = semantic_argmax_reference(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, semantic_argmax_reference(**inputs), expected))


MASKS, PROBS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 6)
VIEWS = Views([View.whole(i, (4, 5), (8, 9)) for i in range(2)], 2, (8, 9))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"mask_logits": MASKS[0]}, ValueError, r"mask_logits has shape \(3, 4, 5\); expected \(views"),
        ({"mask_logits": []}, ValueError, "mask_logits is an empty list"),
        ({"mask_logits": [MASKS, MASKS[:, :2]]}, ValueError, r"mask_logits\[1\] has shape .* 3 queries"),
        ({"mask_logits": [MASKS, MASKS.half()]}, TypeError, r"mask_logits\[1\] has dtype torch.float16"),
        ({"mask_logits": MASKS.long()}, TypeError, "mask_logits has dtype torch.int64"),
        ({"mask_logits": MASKS.tolist()}, TypeError, r"mask_logits\[0\] is a list; expected a tensor"),
        ({"mask_logits": MASKS[:, :, :0]}, ValueError, r"mask_logits has shape \(2, 3, 0, 5\)"),
        ({"mask_logits": MASKS.to("meta")}, ValueError, "mask_logits is on meta; expected cpu"),
        ({"class_probs": PROBS[:1]}, ValueError, r"class_probs has shape \(1, 3, 6\); expected \(2, 3, cl"),
        ({"class_probs": PROBS[:, :2]}, ValueError, "class_probs has shape"),
        ({"class_probs": PROBS[..., :0]}, ValueError, "class_probs has shape"),
        ({"class_probs": PROBS.int()}, TypeError, "class_probs has dtype torch.int32"),
        ({"class_probs": None}, TypeError, "class_probs is a NoneType"),
        ({"size": (8,)}, ValueError, r"size is \(8,\)"),
        ({"size": (0, 9)}, ValueError, r"size is \(0, 9\)"),
        ({"views": [View.whole(0, (4, 5), (8, 9))]}, TypeError, "views is a list; expected a Views"),
        ({"views": VIEWS, "size": (8, 8)}, ValueError, r"views are for size \(8, 9\); expected \(8, 8\)"),
        ({"views": VIEWS, "mask_logits": MASKS[:1], "class_probs": PROBS[:1]}, ValueError, "holds 2 views"),
        ({"views": VIEWS.to("meta")}, ValueError, r"views are on meta; expected cpu: views.to\(device\)"),
        ({"activation": "softmax"}, ValueError, "activation is 'softmax'; expected one of sigmoid, none"),
        ({"prune": -0.1}, ValueError, "prune is -0.1"),
        ({"prune": float("nan")}, ValueError, "prune is nan"),
        ({"backend": "cudnn"}, ValueError, "'cudnn'"),
    ],
)
def test_refusals(change, error, message):
    semantic_argmax(MASKS, PROBS, (8, 9), views=VIEWS)
    with pytest.raises(error, match=message):
        semantic_argmax(**{"mask_logits": MASKS, "class_probs": PROBS, "size": (8, 9), **change})


class TestAssertLabels:
    """The helper sees one wrong pixel, and lets pass what rounding explains."""

    case = BY_NAME["odd"]

    def arguments(self):
        inputs = self.case.inputs(torch.float32)
        truth = oracle(inputs)
        return truth.argmax(1).to(torch.uint8), truth, oracle(inputs, torch.float32)

    def test_one_wrong_pixel(self):
        labels, truth, ordinary = self.arguments()
        assert assert_labels("right", labels, truth, ordinary) == 0
        labels[1, 99, 36] = truth[1, :, 99, 36].argmin()
        with pytest.raises(AssertionError, match="1 of 7400 labels are wrong"):
            assert_labels("wrong", labels, truth, ordinary)

    def test_rounding_passes_and_is_counted(self):
        labels, truth, ordinary = self.arguments()
        other = int(truth[0, :, 3, 4].argmin())
        ordinary[0, other, 3, 4] = truth[0, other, 3, 4] = truth[0, :, 3, 4].max() * (1 + 1e-8)
        assert assert_labels("close", labels, truth, ordinary) == 1
        ordinary[0, other, 3, 4] = truth[0, other, 3, 4] = truth[0, other, 3, 4] * (1 + 1e-4)
        with pytest.raises(AssertionError, match="1 of 7400"):
            assert_labels("not close", labels, truth, ordinary)

    @pytest.mark.parametrize("change", [lambda x: x.to(torch.int16), lambda x: x[:1], lambda x: x + 250])
    def test_dtype_shape_and_range(self, change):
        labels, truth, ordinary = self.arguments()
        with pytest.raises(AssertionError):
            assert_labels("bad", change(labels), truth, ordinary)


def test_reference_labels_are_the_argmax_of_its_scores():
    inputs = BY_NAME["mixed"].inputs(torch.float64)
    labels, scores = semantic_argmax_reference(**inputs)
    torch.testing.assert_close(labels.long(), scores.argmax(1))
