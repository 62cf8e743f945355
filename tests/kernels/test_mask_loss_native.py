"""Mask loss by the native library against float64: C++ for CPUs, CUDA kernels emulated."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from segvit_kernels.ops.mask_loss import mask_loss, mask_matching_cost, mask_matching_cost_reference
from segvit_kernels.testing import assert_within_budget
from segvit_kernels.testing.mask_loss import CASES, SHAPES, as_list, oracle, stacked, with_gradients

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
SUMS = ("focal", "bce", "overlap", "total")
BY_NAME = {case.name: case for case in CASES}


@dataclasses.dataclass
class Call:
    """Positional arguments of the operators, with random contents."""

    logits: list
    targets: torch.Tensor
    matches: torch.Tensor | None
    num_targets: int
    alpha: float = 0.25
    gamma: float = 2.0
    mask_ignored: bool = False

    @classmethod
    def draw(
        cls, batch, queries, grids, size, targets=torch.uint8, num_targets=None, matched=False, present=6,
        dtype=torch.float32, seed=0, **options,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        count = num_targets or queries
        logits = [(3 * torch.randn(batch, queries, *g, generator=generator)).to(dtype) for g in grids]
        if targets == torch.bool or targets.is_floating_point:
            values = torch.rand(batch, count, *size, generator=generator)
            values = values > 0.6 if targets == torch.bool else values.to(targets)
        else:
            # Some classes out of all, and some pixels that belong to none.
            classes = torch.randint(0, count, (present,), generator=generator)
            classes = torch.cat([classes, torch.tensor([count, 255 if targets == torch.uint8 else -1])])
            values = classes[torch.randint(0, len(classes), (batch, *size), generator=generator)].to(targets)
        matches = torch.randint(-1, count, (batch, queries), generator=generator) if matched else None
        return cls(logits, values, matches, count, **options)

    def options(self):
        return self.num_targets, self.alpha, self.gamma, self.mask_ignored

    def forward(self, backend):
        arguments = (self.logits, self.targets, self.matches, *self.options())
        return torch.ops.segvit.mask_loss_fwd(*arguments, backend=backend)

    def backward(self, grad_sums, areas, backend):
        arguments = (grad_sums, self.logits, self.targets, self.matches, areas, *self.options())
        return torch.ops.segvit.mask_loss_bwd(*arguments, backend=backend)

    def everything(self, backend):
        """Sums, areas and the gradients."""
        sums, areas = self.forward(backend)
        return sums, areas, *self.backward(self.grad_sums(), areas, backend)

    def grad_sums(self):
        shape = (len(self.logits), *self.logits[0].shape[:2], 4)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def masks(self, dtype):
        if self.targets.ndim == 4:
            return self.targets.to(dtype)
        index = torch.arange(self.num_targets)[:, None, None]
        return (self.targets.long()[:, None] == index).to(dtype)

    def truth(self, dtype=torch.float64, grad_sums=None):
        """Sums, areas and gradients by autograd through ``F.interpolate``, computed in ``dtype``."""
        (batch, queries), size = self.logits[0].shape[:2], self.targets.shape[-2:]
        every = self.masks(dtype)
        areas = every.sum((2, 3))
        matches = torch.arange(queries).expand(batch, -1) if self.matches is None else self.matches
        t = every[torch.arange(batch)[:, None], matches.clamp(min=0)]
        active = matches >= 0
        if self.targets.ndim == 3:
            active = active & (t.sum((2, 3)) > 0)
        valid = every.sum(1, keepdim=True) if self.mask_ignored else torch.ones_like(t[:, :1])
        sums, gradients = [], []
        grad_sums = self.grad_sums() if grad_sums is None else grad_sums
        for logits, g in zip(self.logits, grad_sums.to(dtype), strict=True):
            leaf = logits.to(dtype).requires_grad_()
            x = F.interpolate(leaf, size=size, mode="bilinear", align_corners=False)
            p, q = x.sigmoid(), (-x).sigmoid()
            bce = F.softplus(-x) * t + F.softplus(x) * (1 - t)
            m = q * t + p * (1 - t)
            focal = (self.alpha * t + (1 - self.alpha) * (1 - t)) * m**self.gamma * bce
            value = torch.stack([(v * valid).sum((2, 3)) for v in (focal, bce, p * t, p)], -1)
            value = value * active[..., None]
            gradients.append(torch.autograd.grad((value * g).sum(), leaf)[0])
            sums.append(value.detach())
        return torch.stack(sums), areas, gradients


def check(call, backend):
    """Both operators within the error budget; what they gave."""
    inputs = (*call.logits, call.targets, *(() if call.matches is None else (call.matches,)))
    before = [t.clone() for t in inputs]
    sums, areas, *grads = call.everything(backend)
    truth, true_areas, true_grads = call.truth()
    # Sums are float32 whatever the logits; gradients have the dtype of the logits.
    plain, _, plain_grads = call.truth(torch.float32)
    assert sums.dtype == areas.dtype == torch.float32
    for k, name in enumerate(SUMS):
        assert_within_budget(name, sums[..., k], truth[..., k], plain[..., k])
    torch.testing.assert_close(areas.double(), true_areas, rtol=1e-6, atol=0)
    for i, (g, t, p) in enumerate(zip(grads, true_grads, plain_grads, strict=True)):
        assert g.dtype == call.logits[i].dtype and g.is_contiguous()
        assert_within_budget(f"gradient {i}", g, t, p.to(g.dtype))
    inactive = ~truth.any(-1)
    assert not sums[inactive].any()
    assert all(not g[i].any() for g, i in zip(grads, inactive, strict=True))
    assert all(map(torch.equal, inputs, before))
    return sums, areas, *grads


def same(found, expected):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), i


def check_losses(inputs, result, grads):
    """What the public function gave, within the error budget."""
    truth, true_grads = oracle(inputs)
    plain, plain_grads = oracle(inputs, dtype=torch.float32)
    assert torch.equal(result.present, truth.present) and result.num_masks == truth.num_masks
    for name, *values in zip(("focal", "bce", "dice"), *map(stacked, (result, truth, plain)), strict=True):
        assert_within_budget(name, *values)
    for i, (g, t, p) in enumerate(zip(grads, true_grads, plain_grads, strict=True)):
        assert_within_budget(f"gradient {i}", g, t, p.to(g.dtype))


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case, dtype, native_backend, poisoned):
    inputs = case.inputs(dtype)
    check_losses(inputs, *with_gradients(mask_loss, inputs, backend=native_backend))


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


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name, native_backend, poisoned):
    check(SIZES[name], native_backend)


@DTYPES
def test_dtypes_of_logits(dtype, native_backend, poisoned):
    check(Call.draw(1, 3, [(7, 5), (20, 20)], (60, 37), dtype=dtype, mask_ignored=True), native_backend)


@pytest.mark.parametrize("kind", ["labels", "ignored", "gamma 1", "bool", "soft"])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3,), (0, 1), (2, 3)], ids=str)
def test_gradients_alone(used, kind, native_backend, poisoned):
    """Sums without a gradient cost nothing, and must not be missed where they have one."""
    options = {"ignored": {"mask_ignored": True}, "gamma 1": {"gamma": 1.0}}.get(kind, {})
    targets = {"bool": torch.bool, "soft": torch.float32}.get(kind, torch.uint8)
    call = Call.draw(1, 4, [(5, 6)], (25, 21), targets, **options)
    grad_sums = torch.zeros(1, 1, 4, 4)
    grad_sums[..., used] = call.grad_sums()[..., used]
    grad_sums[:, :, 0] = 0
    _, areas = call.forward(native_backend)
    (found,) = call.backward(grad_sums, areas, native_backend)
    (truth,), (plain,) = (call.truth(d, grad_sums)[2] for d in (torch.float64, torch.float32))
    assert_within_budget("gradient", found, truth, plain)
    assert not found[:, 0].any() and truth[:, 1:].any()
    # A stride of 0 in the last axis.
    expanded = torch.full((1, 1, 4, 1), 0.5)
    found, expected = (
        call.backward(g, areas, native_backend)
        for g in (expanded.expand(-1, -1, -1, 4), expanded.repeat(1, 1, 1, 4))
    )
    same(found, expected)


@pytest.mark.parametrize("entries", [1, 3, 5, 18])
def test_every_entry_of_a_list_is_as_if_alone(entries, native_backend, poisoned):
    grids = (4 * [(7, 5), (1, 1), (20, 33), (3, 17), (2, 2)])[:entries]
    call = Call.draw(1, 3, grids, (41, 52), torch.bool, 4, matched=True)
    sums, areas, *grads = check(call, native_backend)
    grad_sums = call.grad_sums()
    for i, logits in enumerate(call.logits):
        alone = dataclasses.replace(call, logits=[logits])
        assert torch.equal(alone.forward(native_backend)[0], sums[i : i + 1])
        # Blocks may depend on the whole list, the result on them by rounding.
        torch.testing.assert_close(alone.backward(grad_sums[i : i + 1], areas, native_backend)[0], grads[i])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integer_dtype(dtype, native_backend, poisoned):
    call = Call.draw(1, 5, [(4, 6)], (23, 40), mask_ignored=True, present=2)
    labels = torch.where(call.targets == 255, -1, call.targets.long()).to(dtype)
    if dtype == torch.int64:
        labels[0, :3] = 2**32 + 1  # class 1 to whoever looks at 32 bits
        labels[0, 3, :9] = -(2**63) + 1
        call.targets[0, :3] = 255
        call.targets[0, 3, :9] = 255
    other = dataclasses.replace(call, targets=labels)
    same(other.everything(native_backend), check(call, native_backend))
    matched = [
        torch.ops.segvit.mask_matching_sums(c.logits[0], c.targets, 5, 0.25, 2.0, backend=native_backend)
        for c in (other, call)
    ]
    same(*matched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("values", ["hard", "soft"])
def test_masks_of_any_floating_dtype(dtype, values, native_backend, poisoned):
    call = Call.draw(1, 4, [(4, 6)], (23, 41), torch.bool, 3, matched=True, seed=2)
    if values == "soft":
        call.targets = call.targets * 0.75 + 0.125
    other = dataclasses.replace(call, targets=call.targets.to(dtype))
    if native_backend == "cpu" or values == "soft":
        same(other.everything(native_backend), check(call, native_backend))
    else:  # does not look whether floating masks are 0 and 1 only
        torch.testing.assert_close(other.everything(native_backend), check(call, native_backend))


def test_masks_that_are_soft_in_places(native_backend, poisoned):
    """0 and 1 are fast; a single other value, wherever it is, must be seen. And -0 is 0."""
    call = Call.draw(1, 3, [(4, 3)], (70, 35), torch.bool, 3, seed=2)
    call.targets = call.targets.float()
    hard = check(call, native_backend)
    same(dataclasses.replace(call, targets=call.targets * 2 - call.targets * 2 + call.targets)
         .everything(native_backend), hard)  # fmt: skip
    for y, x in ((0, 0), (69, 34), (33, 17)):
        call.targets[0, 1, y, x] = 0.5
        check(call, native_backend)
    zeros = torch.where(call.targets == 0, -0.0, call.targets)
    assert zeros.signbit().any()
    torch.testing.assert_close(
        dataclasses.replace(call, targets=zeros).everything(native_backend), call.everything(native_backend)
    )


def test_images_without_active_pairs(native_backend, poisoned):
    call = Call.draw(3, 4, [(4, 6)], (23, 40), present=2)
    call.targets[1] = 255
    check(call, native_backend)
    call.targets[:] = 4
    sums, areas, grad = check(call, native_backend)
    assert not sums.any() and not areas.any() and not grad.any()
    check(dataclasses.replace(call, mask_ignored=True), native_backend)


@pytest.mark.parametrize("form", ["labels", "masks"])
def test_inactive_pairs_are_not_looked_at(form, native_backend, poisoned):
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
    sums, areas = call.forward(native_backend)
    (grad,) = call.backward(grad_sums, areas, native_backend)
    assert sums[0][active].all() and sums.count_nonzero() == 4 * active.sum()
    assert grad[active].any((1, 2)).all() and not grad[~active].any()
    assert sums.isfinite().all() and grad.isfinite().all()
    # Queries 0 and 3 of the first image share a target.
    call.logits[0][0, 3] = call.logits[0][0, 0]
    sums, _ = call.forward(native_backend)
    assert torch.equal(sums[0, 0, 0], sums[0, 0, 3]) and sums[0, 0, 0].all()


def test_many_pairs(native_backend, poisoned):
    call = Call.draw(9, 150, [(1, 1)], (1, 2), present=40)
    assert call.truth()[1].count_nonzero() > 10
    check(call, native_backend)


@DTYPES
def test_strides(dtype, native_backend, poisoned):
    """Masks taken from a larger tensor, crops, logits in any order, one image for all."""
    call = Call.draw(2, 2, [(6, 7)], (40, 30), torch.bool, 3, matched=True, seed=1, dtype=dtype)
    expected = check(call, native_backend)
    masks = torch.cat([call.targets, ~call.targets], 1)[:, :3]
    logits = [call.logits[0].transpose(2, 3).contiguous().transpose(2, 3)]
    same(dataclasses.replace(call, targets=masks, logits=logits).everything(native_backend), expected)
    masks = F.pad(call.targets.to(torch.uint8), (3, 5)).bool()[..., 3:-5]
    gap = torch.full_like(call.logits[0], math.nan)
    logits = [torch.cat([gap[..., :1], call.logits[0], gap[..., :2]], -1)[..., 1:-2]]
    assert not masks.is_contiguous() and not logits[0].is_contiguous()
    same(dataclasses.replace(call, targets=masks, logits=logits).everything(native_backend), expected)
    masks = call.targets.mT.contiguous().mT
    matches = torch.stack([call.matches, call.matches - 1], -1)[..., 0]
    same(dataclasses.replace(call, targets=masks, matches=matches).everything(native_backend), expected)
    one = Call.draw(1, 4, [(3, 5)], (20, 31), torch.int64, dtype=dtype)
    logits, labels = one.logits[0].expand(3, -1, -1, -1), one.targets.expand(3, -1, -1)
    odd, plain = (
        dataclasses.replace(one, logits=[x], targets=t).everything(native_backend)
        for x, t in ((logits, labels), (logits.contiguous(), labels.contiguous()))
    )
    same(odd, plain)
    cropped = F.pad(one.targets, (2, 3, 1, 0), value=1)[:, 1:, 2:-3]
    same(dataclasses.replace(one, targets=cropped).everything(native_backend), one.everything(native_backend))


def test_repeatable_on_any_number_of_threads(native_backend, poisoned):
    call = Call.draw(2, 2, [(5, 9), (18, 20)], (70, 60), gamma=1.5, present=2)
    matching = (call.logits[0], call.targets, 2, 0.25, 2.0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            matched = torch.ops.segvit.mask_matching_sums(*matching, backend=native_backend)
            results.append((*call.everything(native_backend), *matched))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        same(other, results[0])


def test_an_image_does_not_depend_on_the_others(native_backend, poisoned):
    call = Call.draw(3, 4, [(5, 9)], (40, 33), present=3)
    sums, areas, grad = call.everything(native_backend)
    for b in range(3):
        one = dataclasses.replace(call, logits=[call.logits[0][b : b + 1]], targets=call.targets[b : b + 1])
        found = one.forward(native_backend)
        assert torch.equal(found[0][:, 0], sums[:, b]) and torch.equal(found[1][0], areas[b])
        found = one.backward(call.grad_sums()[:, b : b + 1], found[1], native_backend)
        assert torch.equal(found[0][0], grad[b])


def test_backends_may_differ(native_backend, poisoned):
    """Forward by one, backward by the other: what is saved means the same."""
    for call in (
        Call.draw(2, 5, [(5, 9), (3, 3)], (33, 20), mask_ignored=True),
        Call.draw(2, 5, [(5, 9)], (33, 20), torch.float32, 3, matched=True),
    ):
        eager, native = call.everything("eager"), call.everything(native_backend)
        torch.testing.assert_close(native, eager, rtol=2e-5, atol=2e-5)
        mixed = call.backward(call.grad_sums(), eager[1], native_backend)
        torch.testing.assert_close(mixed, list(native[2:]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("targets", [torch.bool, torch.float32], ids=["hard", "soft"])
def test_confident_logits(targets, gamma, native_backend, poisoned):
    """Far from zero losses are tiny or huge, and neither may be lost: log(1 + e), m ** γ, p (1 − p)."""
    call = Call.draw(1, 6, [(3, 3)], (12, 12), torch.bool, 2, gamma=gamma)
    call.targets = call.targets.to(targets)
    call.targets[:, 0], call.matches = 0, torch.tensor([[0, 1, 0, 1, 0, 1]])
    if targets == torch.float32:
        call.targets[:, :, 0, 0] = 1e-30  # for the form of soft targets
    scale = torch.tensor([-6.0, 6.0, -20.0, 20.0, -3e4, 3e4]).reshape(1, 6, 1, 1)
    call.logits = [scale * (1 + torch.rand(1, 6, 3, 3, generator=torch.Generator().manual_seed(2)))]
    sums, areas = call.forward(native_backend)
    truth, _, true_grads = call.truth()
    torch.testing.assert_close(sums.double(), truth, rtol=1e-5, atol=1e-24)
    (grad,) = call.backward(call.grad_sums(), areas, native_backend)
    assert grad.isfinite().all()
    # Where σ(−x) underflows, autograd through powers gives NaN for γ < 1; the kernel gives the limit.
    known = true_grads[0].isfinite()
    assert known[:, :4].all()
    torch.testing.assert_close(grad.double()[known], true_grads[0][known], rtol=2e-5, atol=1e-20)


@pytest.mark.parametrize("targets", ["labels", "bool", "soft"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("scale", [20, 100, 1e4, 6e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extreme_logits(dtype, scale, gamma, targets, native_backend, poisoned):
    case = dataclasses.replace(
        BY_NAME["gamma_0"], queries=4, size=(21, 19), targets=targets, options={"focal_gamma": gamma}
    )
    inputs = case.inputs(dtype)
    inputs["mask_logits"] = inputs["mask_logits"].sign() * scale
    truth, (truth_grad,) = oracle(inputs)
    result, (grad,) = with_gradients(mask_loss, inputs, backend=native_backend)
    torch.testing.assert_close(stacked(result).double(), stacked(truth), rtol=1e-5, atol=1e-6)
    assert grad.isfinite().all()
    if gamma == 2 and dtype == torch.float32:  # autograd through m^0.5 at m = 0 is not finite
        torch.testing.assert_close(
            grad.double(), truth_grad, rtol=1e-3, atol=1e-5 * truth_grad.abs().max().item()
        )


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("grid", [(4, 5), (1, 1)], ids=str)
def test_logits_that_are_not_finite_show(value, grid, native_backend, poisoned):
    """In their pair alone, forward and backward."""
    call = Call.draw(1, 3, [grid], (20, 33), present=3)
    call.targets[0, 0, :3] = torch.arange(3)
    call.logits[0][0, 1, grid[0] // 2, -1] = value
    sums, _, grad = call.everything(native_backend)
    assert not sums[0, 0, 1, :2].isfinite().any() and not grad[0, 1].isfinite().all()
    assert sums[0, 0, ::2].isfinite().all() and grad[0, ::2].isfinite().all()


def test_long_sums_keep_their_digits(native_backend, poisoned):
    """One value everywhere: rounding of a running sum would always go the same way."""
    call = Call.draw(1, 1, [(2, 2)], (300, 210), targets=torch.uint8, present=1)
    call.targets[:] = 0
    for value in (0.3, -1.7):
        call.logits = [torch.full((1, 1, 2, 2), value)]
        sums, _ = call.forward(native_backend)
        torch.testing.assert_close(sums.double(), call.truth()[0], rtol=6e-7, atol=0)


def _check_matching(call, backend):
    results = []
    for dtype in (torch.float64, torch.float32):
        x = F.interpolate(call.logits[0].to(dtype), size=call.targets.shape[-2:], mode="bilinear")
        y, u = x.flatten(2), call.masks(dtype).flatten(2)
        p, q = y.sigmoid(), (-y).sigmoid()
        positive = call.alpha * q**call.gamma * F.softplus(-y)
        negative = (1 - call.alpha) * p**call.gamma * F.softplus(y)
        products = torch.stack([a @ u.mT for a in (positive - negative, -y, p)])
        totals = torch.stack([negative.sum(2), F.softplus(y).sum(2), p.sum(2)])
        results.append((products, totals, u.sum(2)))
    arguments = (call.logits[0], call.targets, call.num_targets, call.alpha, call.gamma)
    found = torch.ops.segvit.mask_matching_sums(*arguments, backend=backend)
    for name, actual, truth, plain in zip(("products", "totals", "areas"), found, *results, strict=True):
        assert actual.dtype == torch.float32 and actual.is_contiguous()
        for i, values in enumerate(zip(actual, truth, plain, strict=True)):
            assert_within_budget(f"{name} {i}", *values)


@pytest.mark.parametrize(
    "targets", [torch.uint8, torch.int64, torch.bool, torch.float32, torch.float16, torch.float64], ids=str
)
def test_matching(targets, native_backend, poisoned):
    dtype = torch.float16 if targets == torch.int64 else torch.float32
    _check_matching(Call.draw(1, 20, [(5, 7)], (31, 37), targets, 5, dtype=dtype), native_backend)


@pytest.mark.parametrize("kind", ["labels", "bool", "soft"])
@pytest.mark.parametrize("gamma", [2.0, 0.0, 1.5])
def test_matching_of_regions(kind, gamma, native_backend, poisoned):
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
    _check_matching(call, native_backend)


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
def test_matching_sizes(queries, count, grid, size, targets, native_backend, poisoned):
    _check_matching(Call.draw(2, queries, [grid], size, targets, count), native_backend)


def test_matching_with_alpha_of_nearly_1(native_backend, poisoned):
    """1 − α has to be rounded once."""
    _check_matching(Call.draw(1, 5, [(6, 24)], (33, 55), num_targets=1, alpha=0.9997), native_backend)


def test_matching_of_more_masks_than_a_piece_holds(native_backend, poisoned):
    _check_matching(Call.draw(1, 2, [(2, 2)], (2, 18), torch.float32, 5000), native_backend)


@pytest.mark.parametrize("scale", [79, 100, 1e4])
def test_matching_of_extreme_logits(scale, native_backend, poisoned):
    logits = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)).sign() * scale
    masks = torch.rand(2, 3, 21, 19, generator=torch.Generator().manual_seed(1))
    for targets in (masks, masks > 0.5):
        cost = mask_matching_cost(logits, targets, backend=native_backend)
        truth = mask_matching_cost_reference(logits.double(), targets.double())
        for actual, expected in zip(cost, truth, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matching_cost(case, dtype, native_backend, poisoned):
    inputs = case.inputs(dtype)
    logits, targets = as_list(inputs["mask_logits"])[0][:, :20], inputs["targets"]
    options = {k: inputs[k] for k in ("num_classes", "focal_alpha", "focal_gamma") if k in inputs}
    cost = mask_matching_cost(logits, targets, **options, backend=native_backend)
    if targets.is_floating_point():
        targets = targets.double()
    truth = mask_matching_cost_reference(logits.double(), targets, **options)
    # Linear in t, the terms of a cost are of order |x| ≤ 10 and may cancel.
    for actual, expected in zip(cost, truth, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6)


def test_matching_strides(native_backend, poisoned):
    call = Call.draw(2, 5, [(4, 6)], (23, 41), torch.float32, 3)
    arguments = (3, 0.25, 2.0)
    operator = torch.ops.segvit.mask_matching_sums
    expected = operator(call.logits[0], call.targets, *arguments, backend=native_backend)
    logits, masks = call.logits[0].mT.contiguous().mT, call.targets.mT.contiguous().mT
    same(operator(logits, masks, *arguments, backend=native_backend), expected)
    masks = torch.cat([call.targets, call.targets], 1)[:, 3:]
    logits = F.pad(call.logits[0], (1, 2), value=math.nan)[..., 1:-2]
    same(operator(logits, masks, *arguments, backend=native_backend), expected)


def test_empty(native_backend, poisoned):
    for batch, queries, count in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        logits, masks = torch.randn(batch, queries, 4, 4), torch.rand(batch, count, 9, 9)
        call = Call([logits], masks, torch.full((batch, queries), -1), count)
        sums, areas, grad = call.everything(native_backend)
        assert sums.shape == (1, batch, queries, 4) and not sums.any()
        torch.testing.assert_close(areas, masks.sum((2, 3)))
        assert torch.equal(grad, torch.zeros_like(logits))
        products, totals, _ = torch.ops.segvit.mask_matching_sums(
            logits, masks, count, 0.25, 2.0, backend=native_backend
        )
        assert products.shape == (3, batch, queries, count)
        p = F.interpolate(logits, size=(9, 9), mode="bilinear").sigmoid() if logits.numel() else logits
        torch.testing.assert_close(totals[2], p.sum((2, 3)))


def test_float64_is_refused(native_backend):
    """Asked for by name it raises; where nothing is asked for, eager serves."""
    logits, labels = torch.randn(1, 3, 2, 2, dtype=torch.float64), torch.zeros(1, 8, 8, dtype=torch.uint8)
    for call in (
        lambda backend: mask_loss(logits, labels, backend=backend).focal,
        lambda backend: mask_matching_cost(logits, labels, num_classes=3, backend=backend).focal,
    ):
        with pytest.raises(TypeError, match=f"backend '{native_backend}' takes float32"):
            call(native_backend)
        assert torch.equal(call(None), call("eager"))


@pytest.mark.parametrize("name", ["stacked", "mask_ignored", "matched_labels", "bool_masks", "soft_masks"])
def test_opcheck(name, native_backend):
    inputs = BY_NAME[name].inputs(torch.float32)
    logits = as_list(inputs["mask_logits"])
    targets, matches = inputs["targets"], inputs.get("matches")
    classes = inputs.get("num_classes") or targets.shape[1]
    options, backend = (classes, 0.25, 2.0), {"backend": native_backend}
    ignored = inputs.get("mask_ignored", False)
    utilities, ops = ("test_schema", "test_faketensor"), torch.ops.segvit
    forward = (logits, targets, matches, *options, ignored)
    torch.library.opcheck(ops.mask_loss_fwd.default, forward, backend, test_utils=utilities)
    sums, areas = ops.mask_loss_fwd(*forward, **backend)
    backward = (torch.randn_like(sums), logits, targets, matches, areas, *options, ignored)
    torch.library.opcheck(ops.mask_loss_bwd.default, backward, backend, test_utils=utilities)
    matching = (logits[0], targets, *options)
    torch.library.opcheck(ops.mask_matching_sums.default, matching, backend, test_utils=utilities)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_on_the_device(case, dtype):
    inputs = case.inputs(dtype, "cuda")
    check_losses(inputs, *with_gradients(mask_loss, inputs, backend="cuda"))


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_shapes_on_the_device(case, dtype):
    inputs = case.inputs(dtype, "cuda")
    check_losses(inputs, *with_gradients(mask_loss, inputs, backend="cuda"))
