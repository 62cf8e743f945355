"""mask_loss and mask_matching_cost: the battery of every backend, then what is the operators' own."""

import dataclasses
import math

import pytest
import torch
from backends import BY_ID, HALVES, backend_of, each_backend, each_dtype, interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_loss_calls import Call, check, check_matching, same
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from segvit_kernels.ops import _checks, _mask_loss_eager
from segvit_kernels.ops._mask_loss_checks import validate
from segvit_kernels.ops.mask_loss import (
    mask_loss,
    mask_loss_reference,
    mask_matching_cost,
    mask_matching_cost_reference,
)
from segvit_kernels.testing import assert_within_budget
from segvit_kernels.testing.budgets import approximated
from segvit_kernels.testing.mask_loss import (
    CASES,
    LOSSES,
    SHAPES,
    MaskLossCase,
    as_list,
    oracle,
    stacked,
    with_gradients,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BY_NAME = {case.name: case for case in CASES}
KERNELS = (torch.float32, *HALVES)
NATIVE = ("cpu", "cuda")
FEW = {"multiprocessors": 1, "programs": 3}  # idle programs cost the interpreter as much as busy ones


@pytest.fixture(autouse=True)
def few_programs(request, monkeypatch):
    """Of Triton on a CPU, for calls that give no configuration."""
    if getattr(backend_of(request.node), "id", None) == "triton":
        from segvit_kernels.triton import mask_loss as kernels

        config = kernels._config
        monkeypatch.setattr(kernels, "_config", lambda *arguments: {**config(*arguments), **FEW})


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
        assert_within_budget(name, *values, terms=LOSSES[name])
    for index, (g, t, p) in enumerate(zip(grads, truth_grads, plain_grads, strict=True)):
        ulps = approximated(dtype, 3)  # of the focal loss: σ and a logarithm
        assert_within_budget(f"gradient {index}", g, t, p.to(g.dtype), ulps=ulps)


def test_the_budget_of_a_difference_is_that_of_its_terms():
    """And no more."""
    truth = torch.tensor([0.06], dtype=torch.float64)
    plain = truth.float()
    assert_within_budget("dice", plain + 1e-7, truth, plain, terms=1)
    for error, terms in ((1e-7, 0), (1e-6, 1)):
        with pytest.raises(AssertionError, match="budget"):
            assert_within_budget("dice", plain + error, truth, plain, terms=terms)


def smaller(case):
    """Fewer pairs: the interpreter takes some 30 ms for each."""
    queries = case.queries if case.name == "many_classes" else min(case.queries, 4)
    return dataclasses.replace(case, batch=min(case.batch, 2), queries=queries)


@each_dtype()
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_case(case, backend, dtype, poisoned):
    """Losses and gradients through the public function."""
    inputs = (smaller(case) if interpreted(backend) else case).inputs(dtype, backend.device)
    given = [t for t in inputs.values() if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in given]
    assert_close_to_reference(inputs, *with_gradients(mask_loss, inputs, backend=backend.name))
    assert all(map(torch.equal, given, before))


@each_dtype("triton-gpu", "cuda-gpu")
@pytest.mark.parametrize("case", SHAPES, ids=case_id)
def test_shapes(case, backend, dtype):
    inputs = case.inputs(dtype, backend.device)
    assert_close_to_reference(inputs, *with_gradients(mask_loss, inputs, backend=backend.name))


SIZES = {
    "1x1 to 1x1": Call.draw(3, 2, [(1, 1)], (1, 1), present=2),
    "1x1": Call.draw(1, 2, [(1, 1)], (100, 37), present=2),
    "7x5 to 1x1": Call.draw(3, 2, [(7, 5)], (1, 1), present=2),
    "1x16 pixels": Call.draw(1, 2, [(3, 4)], (1, 16), present=2),
    "1100 columns": Call.draw(1, 2, [(2, 5)], (3, 1100), present=1),
    "one column": Call.draw(1, 2, [(9, 3)], (70, 1), present=2),
    "40x40": Call.draw(1, 2, [(40, 40)], (80, 100), present=1),
    "cells as wide as a register": Call.draw(1, 2, [(4, 2)], (32, 32), present=1),
    "scale of 19 to 17": Call.draw(1, 1, [(17, 17)], (19, 19), present=1),
    "a tile more than 32 rows": Call.draw(1, 2, [(3, 3)], (33, 18), present=2),
    "down-scaling": Call.draw(1, 3, [(40, 70)], (13, 17)),
    "down-scaling along one axis": Call.draw(1, 2, [(40, 3), (3, 70)], (20, 40), present=2),
    "16 columns from 17 cells": Call.draw(1, 2, [(2, 18)], (5, 16), present=2),
    "8 columns from 9 cells": Call.draw(1, 2, [(2, 10)], (5, 8), present=2),
    "4 columns from 5 cells": Call.draw(1, 2, [(2, 6)], (5, 4), present=2),
    "same size": Call.draw(1, 3, [(21, 70)], (21, 70)),
    "19 classes": Call.draw(1, 19, [(3, 4)], (33, 50)),
    "150 classes": Call.draw(1, 150, [(2, 3)], (20, 21)),
    "300 classes": Call.draw(1, 300, [(3, 2)], (20, 21), targets=torch.int16),
    "40000 classes": Call.draw(1, 40000, [(1, 2)], (9, 13), targets=torch.int32, present=3),
    "matched labels": Call.draw(1, 9, [(5, 5)], (30, 31), num_targets=7, matched=True),
    "ignored": Call.draw(2, 3, [(5, 5), (6, 9)], (30, 31), mask_ignored=True, present=2),
    "ignored, gamma 1": Call.draw(1, 3, [(5, 5)], (30, 31), mask_ignored=True, present=2, gamma=1.0),
    "gamma 0": Call.draw(1, 4, [(5, 5)], (30, 31), gamma=0.0, alpha=0.6),
    "alpha of nearly 1": Call.draw(1, 4, [(5, 5)], (30, 31), matched=True, num_targets=1, alpha=0.9997),
    "gamma 1.5": Call.draw(1, 4, [(5, 5)], (30, 31), gamma=1.5),
    "bool": Call.draw(2, 4, [(7, 5)], (50, 35), torch.bool, 3, matched=True),
    "soft": Call.draw(2, 4, [(7, 5)], (50, 35), torch.float32, 3, matched=True),
    "soft fp16, gamma 0.5": Call.draw(2, 4, [(7, 5)], (40, 35), torch.float16, 3, matched=True, gamma=0.5),
    "soft bf16, gamma 3": Call.draw(1, 4, [(7, 5)], (40, 35), torch.bfloat16, 3, matched=True, gamma=3.0),
    "soft fp64": Call.draw(1, 4, [(7, 5)], (20, 35), torch.float64, 3, matched=True),
}


@each_backend(*NATIVE)
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name, backend, poisoned):
    check(SIZES[name], backend)


@each_dtype(*NATIVE, dtypes=KERNELS)
def test_dtypes_of_logits(dtype, backend, poisoned):
    check(Call.draw(1, 3, [(7, 5), (20, 20)], (60, 37), dtype=dtype, mask_ignored=True), backend)


@each_backend(*NATIVE)
@pytest.mark.parametrize("kind", ["labels", "ignored", "gamma 1", "bool", "soft"])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3,), (0, 1), (2, 3)], ids=str)
def test_gradients_alone(used, kind, backend, poisoned):
    """Sums without a gradient cost nothing, and must not be missed where they have one."""
    options = {"ignored": {"mask_ignored": True}, "gamma 1": {"gamma": 1.0}}.get(kind, {})
    targets = {"bool": torch.bool, "soft": torch.float32}.get(kind, torch.uint8)
    call = Call.draw(1, 4, [(5, 6)], (25, 21), targets, **options)
    grad_sums = torch.zeros(1, 1, 4, 4)
    grad_sums[..., used] = call.grad_sums()[..., used]
    grad_sums[:, :, 0] = 0
    _, areas = call.forward(backend)
    (found,) = call.backward(grad_sums, areas, backend)
    (truth,), (plain,) = (call.truth(d, grad_sums)[2] for d in (torch.float64, torch.float32))
    assert_within_budget("gradient", found, truth, plain)
    assert not found[:, 0].any() and truth[:, 1:].any()
    # A stride of 0 in the last axis.
    expanded = torch.full((1, 1, 4, 1), 0.5)
    found, expected = (
        call.backward(g, areas, backend)
        for g in (expanded.expand(-1, -1, -1, 4), expanded.repeat(1, 1, 1, 4))
    )
    same(found, expected)


@each_backend(*NATIVE)
@pytest.mark.parametrize("entries", [1, 3, 5, 18])
def test_every_entry_of_a_list_is_as_if_alone(entries, backend, poisoned):
    grids = (4 * [(7, 5), (1, 1), (20, 33), (3, 17), (2, 2)])[:entries]
    call = Call.draw(1, 3, grids, (41, 52), torch.bool, 4, matched=True)
    sums, areas, *grads = check(call, backend)
    grad_sums = call.grad_sums()
    for i, logits in enumerate(call.logits):
        alone = dataclasses.replace(call, logits=[logits])
        assert torch.equal(alone.forward(backend)[0], sums[i : i + 1])
        # Blocks may depend on the whole list, the result on them by rounding.
        torch.testing.assert_close(alone.backward(grad_sums[i : i + 1], areas, backend)[0], grads[i])


@each_backend("triton", "cpu", "cuda")
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integer_dtype(dtype, backend, poisoned):
    call = Call.draw(1, 5, [(4, 6)], (23, 40), mask_ignored=True, present=2)
    labels = torch.where(call.targets == 255, -1, call.targets.long()).to(dtype)
    if dtype == torch.int64:
        labels[0, :3] = 2**32 + 1  # class 1 to whoever looks at 32 bits
        labels[0, 3, :9] = -(2**63) + 1
        call.targets[0, :3] = 255
        call.targets[0, 3, :9] = 255
    other = dataclasses.replace(call, targets=labels)
    same(other.everything(backend), check(call, backend))
    matched = [
        torch.ops.segvit.mask_matching_sums(c.logits[0], c.targets, 5, 0.25, 2.0, backend=backend.name)
        for c in (other, call)
    ]
    same(*matched)


@each_backend(*NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("values", ["hard", "soft"])
def test_masks_of_any_floating_dtype(dtype, values, backend, poisoned):
    call = Call.draw(1, 4, [(4, 6)], (23, 41), torch.bool, 3, matched=True, seed=2)
    if values == "soft":
        call.targets = call.targets * 0.75 + 0.125
    other = dataclasses.replace(call, targets=call.targets.to(dtype))
    if backend.name == "cpu" or values == "soft":
        same(other.everything(backend), check(call, backend))
    else:  # does not look whether floating masks are 0 and 1 only
        torch.testing.assert_close(other.everything(backend), check(call, backend))


@each_backend(*NATIVE)
def test_masks_that_are_soft_in_places(backend, poisoned):
    """0 and 1 are fast; a single other value, wherever it is, must be seen. And -0 is 0."""
    call = Call.draw(1, 3, [(4, 3)], (70, 35), torch.bool, 3, seed=2)
    call.targets = call.targets.float()
    hard = check(call, backend)
    same(dataclasses.replace(call, targets=call.targets * 2 - call.targets * 2 + call.targets)
         .everything(backend), hard)  # fmt: skip
    for y, x in ((0, 0), (69, 34), (33, 17)):
        call.targets[0, 1, y, x] = 0.5
        check(call, backend)
    zeros = torch.where(call.targets == 0, -0.0, call.targets)
    assert zeros.signbit().any()
    torch.testing.assert_close(
        dataclasses.replace(call, targets=zeros).everything(backend), call.everything(backend)
    )


@each_backend("triton", "cpu", "cuda")
def test_images_without_active_pairs(backend, poisoned):
    call = Call.draw(3, 4, [(4, 6)], (23, 40), present=2)
    call.targets[1] = 255
    check(call, backend)
    call.targets[:] = 4
    sums, areas, grad = check(call, backend)
    assert not sums.any() and not areas.any() and not grad.any()
    check(dataclasses.replace(call, mask_ignored=True), backend)


@each_backend(*NATIVE)
@pytest.mark.parametrize("form", ["labels", "masks"])
def test_inactive_pairs_are_not_looked_at(form, backend, poisoned):
    """NaN logits and gradients of pairs without a target, matches out of range, duplicates."""
    call = Call.draw(2, 6, [(3, 3)], (8, 9), torch.bool, 3)
    call.matches = torch.tensor([[1, -1, 2, 1, 3, -7], [-1, 0, -1, -1, 2**40, -1]])
    if form == "labels":
        call.targets = torch.ones(2, 8, 9, dtype=torch.uint8)
        call.targets[0, :2] = 255
    active = (call.matches >= 0) & (call.matches < (3 if form == "masks" else 2))
    if form == "labels":
        active &= call.matches == 1
    call.logits[0][~active] = math.nan
    grad_sums = torch.where(active[None, ..., None], call.grad_sums(), math.nan)
    sums, areas = call.forward(backend)
    (grad,) = call.backward(grad_sums, areas, backend)
    assert sums[0][active].all() and sums.count_nonzero() == 4 * active.sum()
    assert grad[active].any((1, 2)).all() and not grad[~active].any()
    assert sums.isfinite().all() and grad.isfinite().all()
    # Queries 0 and 3 of the first image share a target.
    call.logits[0][0, 3] = call.logits[0][0, 0]
    sums, _ = call.forward(backend)
    assert torch.equal(sums[0, 0, 0], sums[0, 0, 3]) and sums[0, 0, 0].all()


@each_backend(*NATIVE)
def test_many_pairs(backend, poisoned):
    call = Call.draw(9, 150, [(1, 1)], (1, 2), present=40)
    assert call.truth()[1].count_nonzero() > 10
    check(call, backend)


@each_dtype(*NATIVE, dtypes=KERNELS)
def test_strides(dtype, backend, poisoned):
    """Masks taken from a larger tensor, crops, logits in any order, one image for all."""
    call = Call.draw(2, 2, [(6, 7)], (40, 30), torch.bool, 3, matched=True, seed=1, dtype=dtype)
    expected = check(call, backend)
    masks = torch.cat([call.targets, ~call.targets], 1)[:, :3]
    logits = [call.logits[0].transpose(2, 3).contiguous().transpose(2, 3)]
    same(dataclasses.replace(call, targets=masks, logits=logits).everything(backend), expected)
    masks = F.pad(call.targets.to(torch.uint8), (3, 5)).bool()[..., 3:-5]
    gap = torch.full_like(call.logits[0], math.nan)
    logits = [torch.cat([gap[..., :1], call.logits[0], gap[..., :2]], -1)[..., 1:-2]]
    assert not masks.is_contiguous() and not logits[0].is_contiguous()
    same(dataclasses.replace(call, targets=masks, logits=logits).everything(backend), expected)
    masks = call.targets.mT.contiguous().mT
    matches = torch.stack([call.matches, call.matches - 1], -1)[..., 0]
    same(dataclasses.replace(call, targets=masks, matches=matches).everything(backend), expected)
    one = Call.draw(1, 4, [(3, 5)], (20, 31), torch.int64, dtype=dtype)
    logits, labels = one.logits[0].expand(3, -1, -1, -1), one.targets.expand(3, -1, -1)
    odd, plain = (
        dataclasses.replace(one, logits=[x], targets=t).everything(backend)
        for x, t in ((logits, labels), (logits.contiguous(), labels.contiguous()))
    )
    same(odd, plain)
    cropped = F.pad(one.targets, (2, 3, 1, 0), value=1)[:, 1:, 2:-3]
    same(dataclasses.replace(one, targets=cropped).everything(backend), one.everything(backend))


@each_backend(*NATIVE)
def test_repeatable_on_any_number_of_threads(backend, poisoned):
    call = Call.draw(2, 2, [(5, 9), (18, 20)], (70, 60), gamma=1.5, present=2)
    matching = (call.logits[0], call.targets, 2, 0.25, 2.0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            matched = torch.ops.segvit.mask_matching_sums(*matching, backend=backend.name)
            results.append((*call.everything(backend), *matched))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        same(other, results[0])


@each_backend(*NATIVE)
def test_an_image_does_not_depend_on_the_others(backend, poisoned):
    call = Call.draw(3, 4, [(5, 9)], (40, 33), present=3)
    sums, areas, grad = call.everything(backend)
    for b in range(3):
        one = dataclasses.replace(call, logits=[call.logits[0][b : b + 1]], targets=call.targets[b : b + 1])
        found = one.forward(backend)
        assert torch.equal(found[0][:, 0], sums[:, b]) and torch.equal(found[1][0], areas[b])
        found = one.backward(call.grad_sums()[:, b : b + 1], found[1], backend)
        assert torch.equal(found[0][0], grad[b])


@each_backend(*NATIVE)
def test_backends_may_differ(backend, poisoned):
    """Forward by one, backward by the other: what is saved means the same."""
    for call in (
        Call.draw(2, 5, [(5, 9), (3, 3)], (33, 20), mask_ignored=True),
        Call.draw(2, 5, [(5, 9)], (33, 20), torch.float32, 3, matched=True),
    ):
        eager, native = call.everything(BY_ID["eager"]), call.everything(backend)
        torch.testing.assert_close(native, eager, rtol=2e-5, atol=2e-5)
        mixed = call.backward(call.grad_sums(), eager[1], backend)
        torch.testing.assert_close(mixed, list(native[2:]), rtol=1e-6, atol=1e-6)


@each_backend("triton", "cpu", "cuda")
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("targets", [torch.bool, torch.float32], ids=["hard", "soft"])
def test_confident_logits(targets, gamma, backend, poisoned):
    """Far from zero losses are tiny or huge, and neither may be lost: log(1 + e), m ** γ, p (1 − p)."""
    call = Call.draw(1, 6, [(3, 3)], (12, 12), torch.bool, 2, gamma=gamma)
    call.targets = call.targets.to(targets)
    call.targets[:, 0], call.matches = 0, torch.tensor([[0, 1, 0, 1, 0, 1]])
    if targets == torch.float32:
        call.targets[:, :, 0, 0] = 1e-30  # for the form of soft targets
    scale = torch.tensor([-6.0, 6.0, -20.0, 20.0, -3e4, 3e4]).reshape(1, 6, 1, 1)
    call.logits = [scale * (1 + torch.rand(1, 6, 3, 3, generator=torch.Generator().manual_seed(2)))]
    sums, areas = call.forward(backend)
    truth, _, true_grads = call.truth()
    least = (1e-36, 1e-30) if backend.name == "triton" and targets == torch.bool else (1e-24, 1e-20)
    torch.testing.assert_close(sums.double(), truth, rtol=1e-5, atol=least[0])
    (grad,) = call.backward(call.grad_sums(), areas, backend)
    assert grad.isfinite().all()
    # Where σ(−x) underflows, autograd through powers gives NaN for γ < 1; the kernel gives the limit.
    known = true_grads[0].isfinite()
    assert known[:, :4].all()
    torch.testing.assert_close(grad.double()[known], true_grads[0][known], rtol=2e-5, atol=least[1])


@each_backend(*NATIVE)
@pytest.mark.parametrize("targets", ["labels", "bool", "soft"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("scale", [20, 100, 1e4, 6e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extreme_logits(dtype, scale, gamma, targets, backend, poisoned):
    case = dataclasses.replace(
        BY_NAME["gamma_0"], queries=4, size=(21, 19), targets=targets, options={"focal_gamma": gamma}
    )
    inputs = case.inputs(dtype)
    inputs["mask_logits"] = inputs["mask_logits"].sign() * scale
    truth, (truth_grad,) = oracle(inputs)
    result, (grad,) = with_gradients(mask_loss, inputs, backend=backend.name)
    torch.testing.assert_close(stacked(result).double(), stacked(truth), rtol=1e-5, atol=1e-6)
    assert grad.isfinite().all()
    if gamma == 2 and dtype == torch.float32:  # autograd through m^0.5 at m = 0 is not finite
        torch.testing.assert_close(
            grad.double(), truth_grad, rtol=1e-3, atol=1e-5 * truth_grad.abs().max().item()
        )


@each_backend(*NATIVE)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("grid", [(4, 5), (1, 1)], ids=str)
def test_logits_that_are_not_finite_show(value, grid, backend, poisoned):
    """In their pair alone, forward and backward."""
    call = Call.draw(1, 3, [grid], (20, 33), present=3)
    call.targets[0, 0, :3] = torch.arange(3)
    call.logits[0][0, 1, grid[0] // 2, -1] = value
    sums, _, grad = call.everything(backend)
    assert not sums[0, 0, 1, :2].isfinite().any() and not grad[0, 1].isfinite().all()
    assert sums[0, 0, ::2].isfinite().all() and grad[0, ::2].isfinite().all()


@each_backend(*NATIVE)
def test_long_sums_keep_their_digits(backend, poisoned):
    """One value everywhere: rounding of a running sum would always go the same way."""
    call = Call.draw(1, 1, [(2, 2)], (300, 210), targets=torch.uint8, present=1)
    call.targets[:] = 0
    for value in (0.3, -1.7):
        call.logits = [torch.full((1, 1, 2, 2), value)]
        sums, _ = call.forward(backend)
        torch.testing.assert_close(sums.double(), call.truth()[0], rtol=6e-7, atol=0)


@each_backend(*NATIVE)
@pytest.mark.parametrize(
    "targets", [torch.uint8, torch.int64, torch.bool, torch.float32, torch.float16, torch.float64], ids=str
)
def test_matching(targets, backend, poisoned):
    dtype = torch.float16 if targets == torch.int64 else torch.float32
    check_matching(Call.draw(1, 20, [(5, 7)], (31, 37), targets, 5, dtype=dtype), backend)


@each_backend(*NATIVE)
@pytest.mark.parametrize("kind", ["labels", "bool", "soft"])
@pytest.mark.parametrize("gamma", [2.0, 0.0, 1.5])
def test_matching_of_regions(kind, gamma, backend, poisoned):
    """Large pieces of one class, masks that overlap, borders anywhere."""
    size, generator = (57, 83), torch.Generator().manual_seed(3)
    call = Call.draw(2, 5, [(6, 9)], size, torch.bool, 6, gamma=gamma)
    rough = torch.randn(2, 6, 4, 5, generator=generator)
    blobs = F.interpolate(rough, size, mode="bilinear")
    if kind == "labels":
        call.targets = blobs.argmax(1).to(torch.uint8)
        call.targets[:, 20:40, 30:60] = 255
    else:
        call.targets = blobs > 0 if kind == "bool" else (2 * blobs).clamp(0, 1)
        call.targets[0, 3], call.targets[1, 2] = 0, 1
    check_matching(call, backend)


@each_backend(*NATIVE)
@pytest.mark.parametrize("queries, count, grid, size", [
    (70, 3, (2, 2), (9, 11)),
    (3, 150, (2, 2), (9, 11)),
    (2, 300, (1, 1), (5, 5)),
    (3, 4, (40, 30), (7, 40)),
    (3, 4, (1, 1), (1, 1)),
    (5, 4, (3, 3), (50, 300)),
    (1, 1, (3, 3), (50, 33)),
])  # fmt: skip
@pytest.mark.parametrize("targets", [torch.int16, torch.bool], ids=str)
def test_matching_sizes(queries, count, grid, size, targets, backend, poisoned):
    check_matching(Call.draw(2, queries, [grid], size, targets, count), backend)


@each_backend(*NATIVE)
def test_matching_with_alpha_of_nearly_1(backend, poisoned):
    """1 − α has to be rounded once."""
    check_matching(Call.draw(1, 5, [(6, 24)], (33, 55), num_targets=1, alpha=0.9997), backend)


@each_backend(*NATIVE)
def test_matching_of_more_masks_than_a_piece_holds(backend, poisoned):
    check_matching(Call.draw(1, 2, [(2, 2)], (2, 18), torch.float32, 5000), backend)


@each_backend(*NATIVE)
@pytest.mark.parametrize("scale", [79, 100, 1e4])
def test_matching_of_extreme_logits(scale, backend, poisoned):
    logits = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)).sign() * scale
    masks = torch.rand(2, 3, 21, 19, generator=torch.Generator().manual_seed(1))
    for targets in (masks, masks > 0.5):
        cost = mask_matching_cost(logits, targets, backend=backend.name)
        truth = mask_matching_cost_reference(logits.double(), targets.double())
        for actual, expected in zip(cost, truth, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@each_dtype(*NATIVE, dtypes=KERNELS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matching_cost(case, dtype, backend, poisoned):
    inputs = case.inputs(dtype)
    logits, targets = as_list(inputs["mask_logits"])[0][:, :20], inputs["targets"]
    options = {k: inputs[k] for k in ("num_classes", "focal_alpha", "focal_gamma") if k in inputs}
    cost = mask_matching_cost(logits, targets, **options, backend=backend.name)
    if targets.is_floating_point():
        targets = targets.double()
    truth = mask_matching_cost_reference(logits.double(), targets, **options)
    # Linear in t, the terms of a cost are of order |x| ≤ 10 and may cancel.
    for actual, expected in zip(cost, truth, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6)


@each_backend(*NATIVE)
def test_matching_strides(backend, poisoned):
    call = Call.draw(2, 5, [(4, 6)], (23, 41), torch.float32, 3)
    arguments = (3, 0.25, 2.0)
    operator = torch.ops.segvit.mask_matching_sums
    expected = operator(call.logits[0], call.targets, *arguments, backend=backend.name)
    logits, masks = call.logits[0].mT.contiguous().mT, call.targets.mT.contiguous().mT
    same(operator(logits, masks, *arguments, backend=backend.name), expected)
    masks = torch.cat([call.targets, call.targets], 1)[:, 3:]
    logits = F.pad(call.logits[0], (1, 2), value=math.nan)[..., 1:-2]
    same(operator(logits, masks, *arguments, backend=backend.name), expected)


@each_backend("triton", "cpu", "cuda")
def test_empty(backend, poisoned):
    for batch, queries, count in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        logits, masks = torch.randn(batch, queries, 4, 4), torch.rand(batch, count, 9, 9)
        call = Call([logits], masks, torch.full((batch, queries), -1), count)
        sums, areas, grad = call.everything(backend)
        assert sums.shape == (1, batch, queries, 4) and not sums.any()
        torch.testing.assert_close(areas, masks.sum((2, 3)))
        assert torch.equal(grad, torch.zeros_like(logits))
        products, totals, _ = torch.ops.segvit.mask_matching_sums(
            logits, masks, count, 0.25, 2.0, backend=backend.name
        )
        assert products.shape == (3, batch, queries, count)
        p = F.interpolate(logits, size=(9, 9), mode="bilinear").sigmoid() if logits.numel() else logits
        torch.testing.assert_close(totals[2], p.sum((2, 3)))


@each_backend("triton", "cpu", "cuda")
def test_float64_is_refused(backend):
    """Asked for by name it raises; where nothing is asked for, eager serves."""
    logits, labels = torch.randn(1, 3, 2, 2, dtype=torch.float64), torch.zeros(1, 8, 8, dtype=torch.uint8)
    for call in (
        lambda name: mask_loss(logits, labels, backend=name).focal,
        lambda name: mask_matching_cost(logits, labels, num_classes=3, backend=name).focal,
    ):
        with pytest.raises(TypeError, match=f"backend '{backend.name}' takes float32"):
            call(backend.name)
        assert torch.equal(call(None), call("eager"))


@each_backend("eager", "cpu", "cuda")
@pytest.mark.parametrize("name", ["stacked", "mask_ignored", "matched_labels", "bool_masks", "soft_masks"])
def test_opcheck(name, backend):
    inputs = BY_NAME[name].inputs(torch.float32)
    logits = as_list(inputs["mask_logits"])
    targets, matches = inputs["targets"], inputs.get("matches")
    classes = inputs.get("num_classes") or targets.shape[1]
    options, named = (classes, 0.25, 2.0), {"backend": backend.name}
    ignored = inputs.get("mask_ignored", False)
    utilities, ops = ["test_schema", "test_faketensor"], torch.ops.segvit
    if backend.name == "eager":  # a graph is the same whatever the backend
        utilities.append("test_aot_dispatch_dynamic")
    forward = (logits, targets, matches, *options, ignored)
    torch.library.opcheck(ops.mask_loss_fwd.default, forward, named, test_utils=utilities)
    sums, areas = ops.mask_loss_fwd(*forward, **named)
    backward = (torch.randn_like(sums), logits, targets, matches, areas, *options, ignored)
    torch.library.opcheck(ops.mask_loss_bwd.default, backward, named, test_utils=utilities)
    matching = (logits[0], targets, *options)
    torch.library.opcheck(ops.mask_matching_sums.default, matching, named, test_utils=utilities)


# What no backend changes.


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
    monkeypatch.setattr(_mask_loss_eager, "_block_shape", lambda pairs, height, width, device: shape)
    result = with_gradients(mask_loss, inputs)
    torch.testing.assert_close(stacked(result[0]), stacked(expected[0]))
    torch.testing.assert_close(result[1], expected[1])


def test_half_precision_gradients_are_summed_in_float32(monkeypatch):
    """Over many blocks a gradient is rounded once: to the same number but where it falls between two."""
    inputs = BY_NAME["odd"].inputs(torch.bfloat16)
    _, (expected,) = with_gradients(mask_loss, inputs)
    monkeypatch.setattr(_mask_loss_eager, "_block_shape", lambda pairs, height, width, device: (1, 1))
    _, (grad,) = with_gradients(mask_loss, inputs)
    assert (grad != expected).float().mean() < 0.01


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_form_that_reads_no_values(case, poisoned, monkeypatch):
    inputs = case.inputs(torch.float64)
    expected = with_gradients(mask_loss, inputs)
    monkeypatch.setattr(_checks, "can_read", lambda x: False)
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
        validate(inputs["mask_logits"], targets, inputs.get("num_classes"), 0.25, 2.0, None),
        0.25,
        2.0,
    )
    sums, areas = _mask_loss_eager.forward(inputs["mask_logits"], targets, matches, *options, False)
    assert sums.shape == (len(shapes), case.batch, case.queries, 4)
    grads = _mask_loss_eager.backward(sums, inputs["mask_logits"], targets, matches, areas, *options, False)
    assert [tuple(g.shape) for g in grads] == shapes
    products, _, _ = _mask_loss_eager.matching(inputs["mask_logits"][0], targets, *options)
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
    monkeypatch.setattr(_checks, "can_read", lambda x: readable)
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
    for given_as, divisor in (
        (10, 10),
        (torch.tensor(2.5), 2.5),
        (torch.tensor([3]), 3),
        (0.25, 1),
        (torch.tensor(0), 1),
    ):
        result = mask_loss(logits, labels, num_masks=given_as)
        torch.testing.assert_close(stacked(result), stacked(total) / divisor)
        assert result.num_masks == 6
    with pytest.raises(ValueError, match=r"num_masks has shape \(2,\); expected a single number"):
        mask_loss(logits, labels, num_masks=torch.tensor([2.0, 4.0]))  # the first alone counted


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
    monkeypatch.setattr(_checks, "can_read", lambda x: readable)
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
def test_extreme_logits_read_or_not(dtype, scale, gamma, targets, readable, monkeypatch):
    case = MaskLossCase("extreme", 2, 4, ((5, 6),), (21, 19), targets, options={"focal_gamma": gamma})
    inputs = case.inputs(dtype)
    inputs["mask_logits"] = inputs["mask_logits"].sign() * scale
    truth, (truth_grad,) = oracle(inputs)
    monkeypatch.setattr(_checks, "can_read", lambda x: readable)
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
                patch.setattr(_mask_loss_eager, "_block_shape", lambda pairs, height, width, device: shape)
                patch.setattr(_checks, "can_read", lambda x: readable)
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
