"""The standard battery of mask_loss on the eager backend (the Triton kernels: test_mask_loss_triton.py)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from segvit_kernels.ops import mask_loss as ops
from segvit_kernels.ops.mask_loss import (
    mask_loss,
    mask_loss_reference,
    mask_matching_cost,
    mask_matching_cost_reference,
)
from segvit_kernels.testing import assert_within_budget
from segvit_kernels.testing.mask_loss import (
    CASES,
    LOSSES,
    MaskLossCase,
    as_list,
    oracle,
    stacked,
    with_gradients,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BY_NAME = {case.name: case for case in CASES}


def case_id(case):
    return case.name


def assert_close_to_reference(inputs, result, grads):
    """Every loss and gradient against float64; the budget is measured by the plain formula in float32."""
    dtype = grads[0].dtype
    truth, truth_grads = oracle(inputs)
    plain, plain_grads = oracle(inputs, dtype=torch.promote_types(dtype, torch.float32))
    torch.testing.assert_close(result.present, truth.present)
    assert result.num_masks == truth.num_masks
    for name, *values in zip(LOSSES, *(stacked(r) for r in (result, truth, plain)), strict=True):
        assert_within_budget(name, *values)
    for index, (g, t, p) in enumerate(zip(grads, truth_grads, plain_grads, strict=True)):
        assert_within_budget(f"gradient {index}", g, t, p.to(g.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_values_and_gradients(case, dtype, poisoned):
    inputs = case.inputs(dtype)
    assert_close_to_reference(inputs, *with_gradients(mask_loss, inputs))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_reductions(case, reduction):
    inputs = {**case.inputs(torch.float32), "reduction": reduction}
    result, grads = with_gradients(mask_loss, inputs)
    assert_close_to_reference(inputs, result, grads)
    if reduction == "none":
        assert not stacked(result)[..., ~result.present].any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_shapes(data):
    size = st.integers(1, 9)
    case = MaskLossCase(
        "random",
        batch=data.draw(st.integers(1, 3)),
        queries=data.draw(st.integers(1, 5)),
        grids=tuple(data.draw(st.lists(st.tuples(size, size), min_size=1, max_size=3))),
        size=(data.draw(st.integers(1, 24)), data.draw(st.integers(1, 24))),
        targets=data.draw(st.sampled_from(["labels", "bool", "soft"])),
        num_targets=data.draw(st.integers(1, 6)),
        matched=True,
        weighted=data.draw(st.booleans()),
        options={
            "focal_gamma": data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5])),
            "focal_alpha": data.draw(st.sampled_from([0.0, 0.25, 0.9])),
            "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
        },
    )
    if case.targets == "labels" and data.draw(st.booleans()):
        case.options["mask_ignored"] = True
    inputs = case.inputs(torch.float64, seed=data.draw(st.integers(0, 9)))
    result, grads = with_gradients(mask_loss, inputs)
    truth, truth_grads = oracle(inputs)
    torch.testing.assert_close(stacked(result), stacked(truth), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(grads, truth_grads, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(result.present, truth.present)


def test_a_value_by_hand():
    """Logits 0: p = 1/2, bce = ln 2, focal = α_t ln 2 / 4; 3 of 8 pixels belong to class 1, 1 is ignored."""
    labels = torch.tensor([[[1, 1, 1, 0], [0, 0, 255, 0]]])
    for function in (mask_loss, mask_loss_reference):
        for ignored, pixels in ((False, 8), (True, 7)):
            result = function(
                torch.zeros(1, 3, 1, 2), labels, num_classes=3, mask_ignored=ignored, reduction="none"
            )
            assert result.present.tolist() == [[True, True, False]] and result.num_masks == 2
            focal = (3 * 0.25 + (pixels - 3) * 0.75) * math.log(2) / 4 / pixels
            dice = 1 - (2 * 1.5 + 1) / (pixels / 2 + 3 + 1)
            for actual, expected in ((result.focal, focal), (result.bce, math.log(2)), (result.dice, dice)):
                assert actual[0, 1].item() == pytest.approx(expected, rel=1e-6)
                assert actual[0, 2] == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 100), (5, 7)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_blocking_does_not_change_the_result(case, shape, poisoned, monkeypatch):
    inputs = case.inputs(torch.float64)
    expected = with_gradients(mask_loss, inputs)
    monkeypatch.setattr(ops, "_block_shape", lambda pairs, height, width, device: shape)
    result = with_gradients(mask_loss, inputs)
    torch.testing.assert_close(stacked(result[0]), stacked(expected[0]))
    torch.testing.assert_close(result[1], expected[1])


def test_half_precision_gradients_are_summed_in_float32(monkeypatch):
    """Over many blocks a gradient is rounded once: to the same number but where it falls between two."""
    inputs = BY_NAME["odd"].inputs(torch.bfloat16)
    _, (expected,) = with_gradients(mask_loss, inputs)
    monkeypatch.setattr(ops, "_block_shape", lambda pairs, height, width, device: (1, 1))
    _, (grad,) = with_gradients(mask_loss, inputs)
    assert (grad != expected).float().mean() < 0.01


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_form_that_reads_no_values(case, poisoned, monkeypatch):
    inputs = case.inputs(torch.float64)
    expected = with_gradients(mask_loss, inputs)
    monkeypatch.setattr(ops, "_can_read", lambda x: False)
    result = with_gradients(mask_loss, inputs)
    torch.testing.assert_close(stacked(result[0]), stacked(expected[0]))
    torch.testing.assert_close(result[1], expected[1])


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_elsewhere_than_on_the_cpu_no_value_is_read(case):
    """A read value, or a shape that depends on one, raises on the meta device."""
    inputs = case.inputs(torch.float32, device="meta")
    inputs["mask_logits"] = as_list(inputs["mask_logits"])
    result, grads = with_gradients(mask_loss, inputs)
    shapes = [tuple(logits.shape) for logits in inputs["mask_logits"]]
    assert stacked(result).is_meta and [tuple(g.shape) for g in grads[: len(shapes)]] == shapes
    targets, matches = inputs["targets"], inputs.get("matches")
    options = (
        ops._validate(inputs["mask_logits"], targets, inputs.get("num_classes"), 0.25, 2.0, None),
        0.25,
        2.0,
    )
    sums, areas = ops._fwd_eager(inputs["mask_logits"], targets, matches, *options, False)
    assert sums.shape == (len(shapes), case.batch, case.queries, 4)
    grads = ops._bwd_eager(sums, inputs["mask_logits"], targets, matches, areas, *options, False)
    assert [tuple(g.shape) for g in grads] == shapes
    products, _, _ = ops._matching_eager(inputs["mask_logits"][0], targets, *options)
    assert products.shape == (3, case.batch, case.queries, options[0])


GRADCHECK = {
    "labels": {},
    "mask_ignored": {"options": {"mask_ignored": True}},
    "bool": {"targets": "bool"},
    "matched": {"num_targets": 4, "matched": True},
    "soft_matched": {"targets": "soft", "num_targets": 2, "matched": True},
    "stacked_weighted": {"grids": ((2, 3), (3, 1)), "weighted": True},
}


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", GRADCHECK)
def test_gradcheck(kind, gamma):
    """Focal, bce and dice are separate outputs, so that each is checked alone."""
    case = MaskLossCase(
        "gradcheck", **{"batch": 2, "queries": 3, "grids": ((2, 3),), "size": (5, 4), **GRADCHECK[kind]}
    )
    inputs = case.inputs(torch.float64)
    stack = isinstance(inputs["mask_logits"], list)
    leaves = inputs.pop("mask_logits") if stack else [inputs.pop("mask_logits")]
    weights = inputs.pop("pair_weights", torch.ones(2, 3, dtype=torch.float64))
    for leaf in (*leaves, weights):
        leaf.requires_grad_()

    def call(weights, *logits):
        logits = list(logits) if stack else logits[0]
        return tuple(stacked(mask_loss(logits, focal_gamma=gamma, pair_weights=weights, **inputs)).flatten())

    assert torch.autograd.gradcheck(call, (weights, *leaves))


UTILITIES = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", ["stacked", "mask_ignored", "matched_labels", "bool_masks", "soft_masks"])
def test_opcheck(name):
    inputs = BY_NAME[name].inputs(torch.float32)
    logits = as_list(inputs["mask_logits"])
    targets, matches = inputs["targets"], inputs.get("matches")
    classes = ops._validate(logits, targets, inputs.get("num_classes"), 0.25, 2.0, None)
    options = (classes, 0.25, 2.0, inputs.get("mask_ignored", False))
    forward = (logits, targets, matches, *options)
    torch.library.opcheck(torch.ops.segvit.mask_loss_fwd.default, forward, test_utils=UTILITIES)
    sums, areas = torch.ops.segvit.mask_loss_fwd(*forward)
    backward = (torch.randn_like(sums), logits, targets, matches, areas, *options)
    torch.library.opcheck(torch.ops.segvit.mask_loss_bwd.default, backward, test_utils=UTILITIES)
    matching = (logits[0], targets, classes, 0.25, 2.0)
    torch.library.opcheck(torch.ops.segvit.mask_matching_sums.default, matching, test_utils=UTILITIES)


def test_compile_fullgraph_and_second_size():
    torch._dynamo.reset()
    frames = []

    def backend(graph, examples):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(mask_loss, fullgraph=True, dynamic=True, backend=backend)
    for n in (4, 6, 9):
        logits = [torch.randn(2, 7, *grid, requires_grad=True) for grid in ((n, n + 1), (n + 2, n))]
        labels = torch.randint(0, 7, (2, 5 * n, 6 * n))
        results = [function(logits, labels) for function in (compiled, mask_loss)]
        torch.testing.assert_close(stacked(results[0]), stacked(results[1]))
        grads = [torch.autograd.grad(stacked(r).square().sum(), logits) for r in results]
        torch.testing.assert_close(*grads)
    assert len(frames) == 1


def test_compile_with_inductor():
    torch._dynamo.reset()
    inputs = BY_NAME["soft_masks"].inputs(torch.float32)
    compiled = torch.compile(mask_loss, fullgraph=True)
    result, expected = with_gradients(compiled, inputs), with_gradients(mask_loss, inputs)
    torch.testing.assert_close(stacked(result[0]), stacked(expected[0]))
    torch.testing.assert_close(result[1], expected[1])


def test_export():
    class Criterion(torch.nn.Module):
        def forward(self, logits, labels):
            result = mask_loss(logits, labels)
            return result.focal + result.dice

    logits, labels = torch.randn(2, 5, 4, 4), torch.randint(0, 5, (2, 20, 20))
    program = torch.export.export(Criterion(), (logits, labels))
    torch.testing.assert_close(program.module()(logits, labels), Criterion()(logits, labels))
    assert "segvit.mask_loss_fwd" in str(program.graph)


def test_flops():
    with FlopCounterMode(display=False) as counter:
        mask_loss(
            torch.randn(2, 5, 4, 4, requires_grad=True), torch.randint(0, 5, (2, 20, 18))
        ).focal.backward()
    assert counter.get_total_flops() == 0
    with FlopCounterMode(display=False) as counter:
        mask_matching_cost(torch.randn(2, 5, 4, 4), torch.rand(2, 3, 20, 18) > 0.5)
    assert counter.get_total_flops() == 2 * 3 * 2 * 5 * 3 * 20 * 18


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_inputs_are_not_changed_and_results_repeat(case):
    inputs, untouched = case.inputs(torch.float32), case.inputs(torch.float32)
    runs = [with_gradients(mask_loss, inputs) for _ in range(2)]
    torch.testing.assert_close(inputs, untouched, rtol=0, atol=0)
    torch.testing.assert_close(stacked(runs[0][0]), stacked(runs[1][0]), rtol=0, atol=0)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_label_dtypes_give_the_same(dtype):
    inputs = BY_NAME["mask_ignored"].inputs(torch.float32)
    labels = inputs.pop("targets")
    ignore = 100 if dtype == torch.int8 else 255
    labels = torch.where(labels == 255, ignore, labels)
    runs = [
        with_gradients(mask_loss, {**inputs, "targets": t}, ignore_index=ignore)
        for t in (labels, labels.to(dtype))
    ]
    torch.testing.assert_close(stacked(runs[0][0]), stacked(runs[1][0]), rtol=0, atol=0)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=0)


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("ignore", [-1, -100, 20])
def test_ignore_index(ignore, readable, monkeypatch):
    monkeypatch.setattr(ops, "_can_read", lambda x: readable)
    inputs = BY_NAME["mask_ignored"].inputs(torch.float32)
    expected = with_gradients(mask_loss, inputs)
    inputs["targets"] = torch.where(inputs["targets"] == 255, ignore, inputs["targets"])
    result = with_gradients(mask_loss, inputs, ignore_index=ignore)
    torch.testing.assert_close(stacked(result[0]), stacked(expected[0]), rtol=0, atol=0)
    torch.testing.assert_close(result[1], expected[1], rtol=0, atol=0)


def test_labels_that_a_short_dtype_would_wrap_around():
    """Class 299 is not label 43 in uint8, and 2³² + 3 is not class 3."""
    logits = torch.randn(1, 300, 2, 2)
    result = mask_loss(logits, torch.full((1, 4, 4), 43, dtype=torch.uint8), ignore_index=-1)
    assert result.present.nonzero().tolist() == [[0, 43]]
    with pytest.raises(ValueError, match="targets holds labels"):
        mask_loss(logits[:, :5], torch.full((1, 4, 4), 255, dtype=torch.uint8), ignore_index=-1)
    huge = torch.full((1, 4, 4), 2**32 + 3)
    assert not mask_loss(logits, huge, ignore_index=2**32 + 3).present.any()
    cost = mask_matching_cost(logits[:, :5], huge, num_classes=5)
    torch.testing.assert_close(
        tuple(cost), tuple(mask_matching_cost_reference(logits[:, :5], huge, num_classes=5))
    )


def test_masks_give_what_labels_give():
    inputs = BY_NAME["odd"].inputs(torch.float32)
    labels, classes = inputs["targets"], inputs["num_classes"]
    masks = labels[:, None] == torch.arange(classes)[:, None, None]
    matches = torch.where(masks.any(3).any(2), torch.arange(classes), -1)
    expected, expected_grads = with_gradients(mask_loss, inputs)
    for targets in (masks, masks.float(), masks.half()):
        other = {"mask_logits": inputs["mask_logits"], "targets": targets, "matches": matches}
        result, grads = with_gradients(mask_loss, other)
        torch.testing.assert_close(stacked(result), stacked(expected))
        torch.testing.assert_close(grads, expected_grads)
        torch.testing.assert_close(result.present, expected.present)


def test_layouts_give_the_same():
    logits, labels = (
        torch.randn(1, 6, 4, 5, dtype=torch.float64).expand(3, -1, -1, -1),
        torch.randint(0, 6, (1, 21, 17)).expand(3, -1, -1),
    )
    masks = (torch.rand(1, 6, 21, 17) > 0.5).expand(3, -1, -1, -1)
    for targets in (labels, masks):
        expected, (expected_grad,) = with_gradients(
            mask_loss, {"mask_logits": logits.contiguous(), "targets": targets.contiguous()}
        )
        odd = logits.contiguous().permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
        assert odd.stride(-1) != 1
        for x, t in ((odd, targets.mT.contiguous().mT), (logits, targets)):
            result, (grad,) = with_gradients(mask_loss, {"mask_logits": x, "targets": t})
            torch.testing.assert_close(stacked(result), stacked(expected), rtol=1e-12, atol=0)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-14)


def test_a_list_gives_what_separate_calls_give():
    inputs = BY_NAME["stacked"].inputs(torch.float32)
    logits = inputs.pop("mask_logits")
    together, grads = with_gradients(mask_loss, {**inputs, "mask_logits": logits})
    assert isinstance(together.focal, list) and isinstance(together.dice, list)
    gradients = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))  # as with_gradients draws them
    for index, entry in enumerate(logits):
        alone, (grad, _) = with_gradients(
            mask_loss, {**inputs, "mask_logits": entry}, gradients[:, index : index + 1]
        )
        torch.testing.assert_close(stacked(alone)[:, 0], stacked(together)[:, index], rtol=0, atol=0)
        torch.testing.assert_close(grad, grads[index], rtol=0, atol=0)


def test_num_masks():
    logits, labels = torch.randn(1, 6, 4, 5), torch.randint(0, 6, (1, 21, 17))
    total, own = mask_loss(logits, labels, reduction="sum"), mask_loss(logits, labels)
    assert own.num_masks == 6
    for given_as, divisor in ((10, 10), (torch.tensor(2.5), 2.5), (0.25, 1), (torch.tensor(0), 1)):
        result = mask_loss(logits, labels, num_masks=given_as)
        torch.testing.assert_close(stacked(result), stacked(total) / divisor)
        assert result.num_masks == 6


def test_weights_of_inactive_pairs_do_not_matter():
    inputs = BY_NAME["odd"].inputs(torch.float32)
    present = mask_loss(**inputs).present
    inputs["pair_weights"] = torch.where(present, 2.0, math.nan)
    result, (grad, weights) = with_gradients(mask_loss, inputs)
    assert stacked(result).isfinite().all() and grad.isfinite().all()
    assert not weights[~present].any() and weights[present].all()


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("form", ["labels", "masks"])
def test_inactive_pairs_get_no_gradient(form, readable, monkeypatch):
    monkeypatch.setattr(ops, "_can_read", lambda x: readable)
    logits = torch.full((2, 4, 3, 3), math.nan)
    logits[0, 1] = 0.5
    if form == "labels":
        targets = torch.full((2, 8, 8), 255)
        targets[0, :3] = 1
        result, (grad,) = with_gradients(mask_loss, {"mask_logits": logits, "targets": targets})
    else:
        matches = torch.full((2, 4), -1)
        matches[0, 1] = 0
        targets = torch.rand(2, 1, 8, 8) > 0.5
        inputs = {"mask_logits": logits, "targets": targets, "matches": matches}
        result, (grad,) = with_gradients(mask_loss, inputs)
    assert stacked(result).isfinite().all() and result.num_masks == 1
    assert grad[0, 1].all()
    grad[0, 1] = 0
    assert not grad.any()
    matches = None if form == "labels" else matches
    sums, _ = torch.ops.segvit.mask_loss_fwd(
        [logits], targets, matches, 4 if form == "labels" else 1, 0.25, 2.0, False
    )
    assert sums[0, 0, 1].all() and sums.count_nonzero() == 4


def test_an_image_without_labels_has_no_loss():
    logits = torch.randn(2, 4, 3, 3, requires_grad=True)
    result = mask_loss(logits, torch.full((2, 8, 8), 255))
    assert result.num_masks == 0 and not stacked(result).any()
    stacked(result).sum().backward()
    assert not logits.grad.any()


def test_empty_batch():
    for targets in (
        torch.zeros(0, 8, 8, dtype=torch.uint8),
        torch.zeros(0, 4, 8, 8),
        torch.zeros(0, 4, 8, 8) > 0,
    ):
        logits = torch.randn(0, 4, 3, 3, requires_grad=True)
        result = mask_loss(logits, targets)
        assert stacked(result).shape == (3, 1) and not stacked(result).any()
        (grad,) = torch.autograd.grad(stacked(result).sum(), logits)
        assert grad.shape == logits.shape
        cost = mask_matching_cost(logits, targets, num_classes=4)
        assert cost.focal.shape == (0, 4, 4)


def test_autocast_changes_nothing():
    inputs = BY_NAME["soft_masks"].inputs(torch.float32)
    expected = with_gradients(mask_loss, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        result = with_gradients(mask_loss, inputs)
    torch.testing.assert_close(stacked(result[0]), stacked(expected[0]), rtol=0, atol=0)
    torch.testing.assert_close(result[1], expected[1], rtol=0, atol=0)


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("targets", ["labels", "bool", "soft"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("scale", [20, 79, 100, 1e4, 6e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extreme_logits(dtype, scale, gamma, targets, readable, monkeypatch):
    case = MaskLossCase("extreme", 2, 4, ((5, 6),), (21, 19), targets, options={"focal_gamma": gamma})
    inputs = case.inputs(dtype)
    inputs["mask_logits"] = inputs["mask_logits"].sign() * scale
    truth, (truth_grad,) = oracle(inputs)
    monkeypatch.setattr(ops, "_can_read", lambda x: readable)
    result, (grad,) = with_gradients(mask_loss, inputs)
    torch.testing.assert_close(stacked(result).double(), stacked(truth), rtol=1e-5, atol=1e-6)
    assert grad.isfinite().all()
    if gamma == 2 and dtype == torch.float32:  # autograd through m^0.5 at m = 0 is not finite
        torch.testing.assert_close(
            grad.double(), truth_grad, rtol=1e-3, atol=1e-5 * truth_grad.abs().max().item()
        )


LOGITS, LABELS, MASKS = (
    torch.randn(2, 4, 3, 3),
    torch.zeros(2, 8, 9, dtype=torch.int64),
    torch.zeros(2, 4, 8, 9),
)
REFUSALS = {
    "no logits": ({"mask_logits": []}, ValueError, "mask_logits is empty"),
    "no tensor": ({"mask_logits": [LOGITS, None]}, TypeError, r"mask_logits\[1\] is a NoneType"),
    "targets": ({"targets": [1]}, TypeError, "targets is a list; expected a tensor"),
    "logits dtype": ({"mask_logits": LOGITS.int()}, TypeError, "mask_logits has dtype torch.int32; expected"),
    "mixed dtypes": (
        {"mask_logits": [LOGITS, LOGITS.half()]},
        TypeError,
        r"mask_logits\[1\] has dtype torch.float16",
    ),
    "dimensions": (
        {"mask_logits": LOGITS[0]},
        ValueError,
        r"mask_logits has shape \(4, 3, 3\); expected \(batch",
    ),
    "no cells": ({"mask_logits": LOGITS[..., :0]}, ValueError, "at least one query and cell"),
    "queries": (
        {"mask_logits": [LOGITS, LOGITS[:, :3]]},
        ValueError,
        r"expected batch and queries of the first, \(2, 4\)",
    ),
    "device": ({"targets": LABELS.to("meta")}, ValueError, "mask_logits is on cpu; expected meta"),
    "batch": (
        {"targets": LABELS[:1]},
        ValueError,
        r"targets has shape \(1, 8, 9\); expected labels \(2, height",
    ),
    "no pixels": ({"targets": LABELS[:, :0]}, ValueError, "not empty"),
    "float labels": ({"targets": LABELS.float()}, TypeError, "expected labels of an integer dtype"),
    "bool labels": ({"targets": LABELS.bool()}, TypeError, "expected labels of an integer dtype"),
    "integer masks": ({"targets": MASKS.int()}, TypeError, "expected masks, bool or floating"),
    "masks of 255": (
        {"targets": MASKS + 255},
        ValueError,
        "targets holds masks from 255.0 to 255.0; expected 0 to 1",
    ),
    "label range": (
        {"targets": LABELS + 4},
        ValueError,
        "targets holds labels from 4 to 4; expected 0 to 3 or 255",
    ),
    "negative": ({"targets": LABELS - 1}, ValueError, "targets holds labels from -1 to -1"),
    "ignore_index": ({"ignore_index": 3}, ValueError, "ignore_index is 3; expected none of the 4 classes"),
    "num_classes": ({"num_classes": 5}, ValueError, "mask_logits has 4 queries; expected 5"),
    "no classes": ({"num_classes": 0}, ValueError, "num_classes is 0; expected at least 1"),
    "classes of masks": (
        {"targets": MASKS, "num_classes": 3},
        ValueError,
        "num_classes is 3; expected 4, the number of masks",
    ),
    "masks for queries": ({"targets": MASKS[:, :3]}, ValueError, "mask_logits has 4 queries; expected 3"),
    "mask_ignored": ({"targets": MASKS, "mask_ignored": True}, ValueError, "mask_ignored is True with masks"),
    "matches shape": (
        {"matches": torch.zeros(2, 3).long()},
        ValueError,
        r"matches has shape \(2, 3\); expected \(2, 4\)",
    ),
    "matches dtype": (
        {"matches": torch.zeros(2, 4)},
        TypeError,
        "matches has dtype torch.float32; expected torch.int64",
    ),
    "matches range": (
        {"matches": torch.full((2, 4), 4)},
        ValueError,
        "matches holds 4 to 4; expected -1 to 3",
    ),
    "weights": (
        {"pair_weights": torch.ones(4)},
        ValueError,
        r"pair_weights has shape \(4,\); expected \(2, 4\)",
    ),
    "weights type": ({"pair_weights": 2.0}, TypeError, "pair_weights is a float; expected a tensor"),
    "gamma": ({"focal_gamma": -1.0}, ValueError, "focal_gamma is -1.0; expected at least 0"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction is 'max'; expected 'mean', 'sum' or 'none'"),
    "backend": ({"backend": "cudnn"}, ValueError, "argument 'backend' is 'cudnn'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    changes, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        mask_loss(**{"mask_logits": LOGITS, "targets": LABELS, **changes})


class TestMatchingCost:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", CASES, ids=case_id)
    def test_values(self, case, dtype, poisoned):
        inputs = case.inputs(dtype)
        logits, targets = as_list(inputs["mask_logits"])[0][:, :20], inputs["targets"]
        options = {k: inputs[k] for k in ("num_classes", "focal_alpha", "focal_gamma") if k in inputs}
        cost = mask_matching_cost(logits.requires_grad_(), targets, **options)
        logits = logits.detach()
        if targets.is_floating_point():
            targets = targets.double()
        truth = mask_matching_cost_reference(logits.double(), targets, **options)
        # Linear in t, the terms of a cost are of order |x| ≤ 10 and may cancel.
        tolerance = 1e-13 if dtype == torch.float64 else 2e-6
        for actual, expected in zip(cost, truth, strict=True):
            assert actual.dtype == torch.promote_types(dtype, torch.float32) and not actual.requires_grad
            torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("targets", ["labels", "bool"])
    def test_agrees_with_the_loss_of_hard_targets(self, targets):
        case = MaskLossCase("both", 2, 6, ((5, 4),), (30, 23), targets, 4)
        inputs = case.inputs(torch.float64)
        options = {"num_classes": 4} if targets == "labels" else {}
        cost = mask_matching_cost(inputs["mask_logits"], inputs["targets"], **options)
        for target in range(4):
            matches = torch.full((2, 6), target)
            loss = mask_loss(**{**inputs, "matches": matches, "reduction": "none"})
            assert loss.present.any()
            for name in LOSSES:
                column = torch.where(loss.present, getattr(cost, name)[..., target], 0)
                torch.testing.assert_close(getattr(loss, name), column)

    @pytest.mark.parametrize("readable", [True, False])
    @pytest.mark.parametrize("shape", [(1, 1), (1, 4), (1, 100)], ids=str)
    def test_blocking_and_reading_do_not_change_the_result(self, shape, readable, poisoned, monkeypatch):
        for name in ("odd", "soft_masks"):
            inputs = BY_NAME[name].inputs(torch.float64)
            logits = as_list(inputs["mask_logits"])[0]
            arguments = (logits, inputs["targets"])
            options = {"num_classes": inputs["num_classes"]} if name == "odd" else {}
            expected = mask_matching_cost(*arguments, **options)
            with monkeypatch.context() as patch:
                patch.setattr(ops, "_block_shape", lambda pairs, height, width, device: shape)
                patch.setattr(ops, "_can_read", lambda x: readable)
                torch.testing.assert_close(tuple(mask_matching_cost(*arguments, **options)), tuple(expected))

    @pytest.mark.parametrize("scale", [79, 100, 1e4])
    def test_extreme_logits(self, scale):
        logits = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)).sign() * scale
        masks = torch.rand(2, 3, 21, 19, generator=torch.Generator().manual_seed(1))
        cost, truth = (
            mask_matching_cost(logits, masks),
            mask_matching_cost_reference(logits.double(), masks.double()),
        )
        for actual, expected in zip(cost, truth, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)

    def test_refusals(self):
        with pytest.raises(ValueError, match="num_classes is None with labels"):
            mask_matching_cost(LOGITS, LABELS)
        with pytest.raises(TypeError, match="mask_logits is a list; expected a tensor"):
            mask_matching_cost([LOGITS], LABELS, num_classes=4)
        with pytest.raises(ValueError, match="focal_gamma is -2"):
            mask_matching_cost(LOGITS, MASKS, focal_gamma=-2)
