"""Mask loss in Triton's interpreter against float64; on a GPU where there is one (``-m gpu``)."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from segvit_kernels.ops.mask_loss import mask_loss, mask_matching_cost, mask_matching_cost_reference
from segvit_kernels.testing import assert_within_budget
from segvit_kernels.testing.mask_loss import CASES, SHAPES, oracle, stacked, with_gradients
from segvit_kernels.triton import mask_loss as kernels

FEW = {"multiprocessors": 1, "programs": 3}  # idle programs cost the interpreter as much as busy ones


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """For calls that give no configuration."""
    config = kernels._config
    monkeypatch.setattr(kernels, "_config", lambda *arguments: {**config(*arguments), **FEW})


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

    def forward(self, config=None):
        options = (self.num_targets, self.alpha, self.gamma, self.mask_ignored)
        config = {**FEW, **(config or {})}
        return kernels.mask_loss_fwd(self.logits, self.targets, self.matches, *options, config=config)

    def backward(self, grad_sums, areas, config=None):
        options = (self.num_targets, self.alpha, self.gamma, self.mask_ignored)
        config = {**FEW, **(config or {})}
        return kernels.mask_loss_bwd(
            grad_sums, self.logits, self.targets, self.matches, areas, *options, config=config
        )

    def grad_sums(self):
        shape = (len(self.logits), *self.logits[0].shape[:2], 4)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def truth(self, dtype=torch.float64):
        """Sums, areas and gradients by autograd through ``F.interpolate``, computed in ``dtype``."""
        (batch, queries), size = self.logits[0].shape[:2], self.targets.shape[-2:]
        index = torch.arange(self.num_targets)
        if self.targets.ndim == 3:
            every = (self.targets.long()[:, None] == index[:, None, None]).to(dtype)
        else:
            every = self.targets.to(dtype)
        areas = every.sum((2, 3))
        matches = torch.arange(queries).expand(batch, -1) if self.matches is None else self.matches
        t = every[torch.arange(batch)[:, None], matches.clamp(min=0)]
        active = matches >= 0
        if self.targets.ndim == 3:
            active = active & (t.sum((2, 3)) > 0)
        valid = every.sum(1, keepdim=True) if self.mask_ignored else torch.ones_like(t[:, :1])
        sums, gradients = [], []
        for logits, g in zip(self.logits, self.grad_sums().to(dtype), strict=True):
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


def check(call, config=None):
    before = [t.clone() for t in (*call.logits, call.targets)]
    sums, areas = call.forward(config)
    truth, true_areas, true_grads = call.truth()
    # Sums are float32 whatever the logits; gradients have the dtype of the logits.
    plain, _, plain_grads = call.truth(torch.float32)
    for k, name in enumerate(("focal", "bce", "overlap", "total")):
        assert_within_budget(name, sums[..., k], truth[..., k], plain[..., k])
    torch.testing.assert_close(areas.double(), true_areas, rtol=1e-6, atol=0)
    grads = call.backward(call.grad_sums(), areas, config)
    for i, (g, t, p) in enumerate(zip(grads, true_grads, plain_grads, strict=True)):
        assert g.dtype == call.logits[i].dtype and g.is_contiguous()
        assert_within_budget(f"gradient {i}", g, t, p.to(g.dtype))
    inactive = ~truth.any(-1)
    assert not sums[inactive].any()
    assert all(not g[i].any() for g, i in zip(grads, inactive, strict=True))
    for tensor, copy in zip((*call.logits, call.targets), before, strict=True):
        assert torch.equal(tensor, copy)
    return sums, areas, grads


def smaller(case):
    """Fewer pairs: the interpreter takes some 30 ms for each."""
    queries = case.queries if case.name == "many_classes" else min(case.queries, 4)
    return dataclasses.replace(case, batch=min(case.batch, 2), queries=queries)


@pytest.mark.parametrize("case", map(smaller, CASES), ids=lambda c: c.name)
def test_case(case, poisoned):
    """Losses and gradients through the public function."""
    dtype = torch.float16 if case.name in ("odd", "stacked", "soft_masks", "gamma_3") else torch.float32
    inputs = case.inputs(dtype)
    result, grads = with_gradients(mask_loss, inputs, backend="triton")
    truth, truth_grads = oracle(inputs)
    plain, plain_grads = oracle(inputs, dtype=torch.float32)
    assert torch.equal(result.present, truth.present)
    for name, *values in zip(("focal", "bce", "dice"), *map(stacked, (result, truth, plain)), strict=True):
        assert_within_budget(name, *values)
    for i, (g, t, p) in enumerate(zip(grads, truth_grads, plain_grads, strict=True)):
        assert_within_budget(f"gradient {i}", g, t, p.to(g.dtype))


# Beside those of CASES.
SIZES = {
    "1x1 to 1x1": Call.draw(3, 2, [(1, 1)], (1, 1), present=2),
    "1x1": Call.draw(1, 2, [(1, 1)], (100, 37), present=2),
    "7x5 to 1x1": Call.draw(3, 2, [(7, 5)], (1, 1), present=2),
    "several blocks of cells": Call.draw(1, 2, [(40, 40)], (160, 200), present=1),
    "support of one row more than groups": Call.draw(1, 1, [(17, 3)], (19, 5), present=1),
    "whole tiles": Call.draw(1, 1, [(8, 16)], (64, 128), present=1),
    "runs": Call.draw(1, 3, [(3, 5)], (40, 80)),
    "runs in several blocks of cells": Call.draw(1, 2, [(5, 17)], (31, 272), present=1),
    "runs at two scales, ignored": Call.draw(1, 2, [(2, 1), (3, 4)], (33, 64), mask_ignored=True, present=2),
    "runs of soft fp16, gamma 0.5": Call.draw(
        1, 2, [(3, 2)], (20, 32), torch.float16, 3, matched=True, gamma=0.5
    ),
    "2000 classes": Call.draw(1, 2000, [(2, 2)], (9, 130), targets=torch.int32, present=3),
    "gamma 1.5": Call.draw(1, 4, [(5, 5)], (30, 31), gamma=1.5),
    "large masks": Call.draw(1, 2, [(2, 2)], (100, 120), torch.float32, 1, matched=True, seed=3),
    "soft fp16, gamma 0.5": Call.draw(2, 4, [(7, 5)], (50, 70), torch.float16, 3, matched=True, gamma=0.5),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name, poisoned):
    check(SIZES[name])


def test_half_precision_logits(poisoned):
    check(Call.draw(1, 3, [(7, 5), (20, 20)], (100, 37), dtype=torch.float16, mask_ignored=True))


def test_every_entry_of_a_list_is_as_if_alone(poisoned):
    """One more than a launch takes."""
    grids = [(7, 5), (1, 1), (20, 33), (3, 17), (2, 2)]
    call = Call.draw(1, 3, grids, (41, 52), torch.bool, 4, matched=True)
    sums, areas, grads = check(call)
    grad_sums = call.grad_sums()
    for i, logits in enumerate(call.logits):
        alone = dataclasses.replace(call, logits=[logits])
        assert torch.equal(alone.forward()[0], sums[i : i + 1])
        # The backward's blocks depend on the whole list, the result on them by rounding.
        torch.testing.assert_close(alone.backward(grad_sums[i : i + 1], areas)[0], grads[i])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])  # int32: test_sizes
def test_labels_of_any_integer_dtype(dtype, poisoned):
    call = Call.draw(1, 5, [(4, 6)], (23, 40), mask_ignored=True, present=2)
    labels = torch.where(call.targets == 255, -1, call.targets.long()).to(dtype)
    if dtype == torch.int64:
        labels[0, :3] = 2**32 + 1  # class 1 to whoever looks at 32 bits
        call.targets[0, :3] = 255
    other = dataclasses.replace(call, targets=labels)
    for actual, expected in zip(other.forward(), call.forward(), strict=True):
        assert torch.equal(actual, expected)
    _, areas = call.forward()
    grad_sums = call.grad_sums()
    assert torch.equal(other.backward(grad_sums, areas)[0], call.backward(grad_sums, areas)[0])


def test_images_without_active_pairs(poisoned):
    call = Call.draw(3, 4, [(4, 6)], (23, 40), present=2)
    call.targets[1] = 255
    check(call)
    call.targets[:] = 4
    sums, areas, grads = check(call)
    assert not sums.any() and not areas.any() and not grads[0].any()
    check(dataclasses.replace(call, mask_ignored=True))


@pytest.mark.parametrize("split", [False, True])
def test_classes_in_some_tiles_of_labels(split, poisoned):
    """Tiles without the class of a pair; with one that has its number modulo 32; with many classes."""
    call = Call.draw(1, 36, [(9, 12)], (70, 200), dtype=torch.float16)
    call.targets[..., :64], call.targets[..., 64:] = 0, 33
    call.targets[0, 66:, 130:] = torch.arange(70, dtype=torch.uint8) % 4
    call.targets[0, :3, :2] = torch.tensor([1, 32], dtype=torch.uint8)
    check(call, {"split": split})


def test_more_pairs_than_one_block_of_the_list(monkeypatch, poisoned):
    monkeypatch.setattr(kernels, "_LISTED", 1024)
    call = Call.draw(9, 150, [(1, 1)], (1, 2), present=40)
    assert call.truth()[1].count_nonzero() > 10
    check(call)


@pytest.mark.parametrize("config", [
    {"programs": 1}, {"programs": 50}, {"block": 16, "span": 3}, {"block": 128, "span": 1},
], ids=str)  # fmt: skip
def test_tiling_does_not_matter(config, poisoned):
    check(Call.draw(1, 2, [(9, 18)], (45, 100), present=2), config)


def test_strides(poisoned):
    """Masks taken from a larger tensor, labels of a crop, logits that are not contiguous."""
    call = Call.draw(2, 2, [(6, 7)], (40, 30), torch.bool, 3, matched=True, seed=1)
    plain = check(call)
    masks = torch.cat([call.targets, ~call.targets], 1)[:, :3]
    logits = [call.logits[0].transpose(2, 3).contiguous().transpose(2, 3)]
    odd = check(dataclasses.replace(call, targets=masks, logits=logits))
    masks = F.pad(call.targets.to(torch.uint8), (3, 5)).bool()[..., 3:-5]
    assert not masks.is_contiguous()
    cropped = check(dataclasses.replace(call, targets=masks))
    for actual in (odd, cropped):
        assert torch.equal(actual[0], plain[0]) and torch.equal(actual[2][0], plain[2][0])


def test_repeatable():
    call = Call.draw(1, 2, [(5, 9), (18, 20)], (60, 70), gamma=1.5, present=2)
    first, second = check(call), check(call)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("targets", [torch.bool, torch.float32], ids=["hard", "soft"])
def test_confident_logits(targets, gamma, poisoned):
    """Far from zero losses are tiny or huge, and neither may be lost: log(1 + e), m ** γ, p (1 − p)."""
    call = Call.draw(1, 6, [(3, 3)], (12, 12), torch.bool, 2, gamma=gamma)
    call.targets = call.targets.to(targets)
    call.targets[:, 0], call.matches = 0, torch.tensor([[0, 1, 0, 1, 0, 1]])
    scale = torch.tensor([-6.0, 6.0, -20.0, 20.0, -3e4, 3e4]).reshape(1, 6, 1, 1)
    call.logits = [scale * (1 + torch.rand(1, 6, 3, 3, generator=torch.Generator().manual_seed(2)))]
    sums, areas = call.forward()
    truth, _, true_grads = call.truth()
    torch.testing.assert_close(sums.double(), truth, rtol=1e-5, atol=1e-36)
    grads = call.backward(call.grad_sums(), areas)
    assert grads[0].isfinite().all()
    # Where σ(−x) underflows, autograd through powers gives NaN for γ < 1; the kernel gives the limit.
    known = true_grads[0].isfinite()
    assert known[:, :4].all()
    torch.testing.assert_close(grads[0].double()[known], true_grads[0][known], rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("targets, split", [
    (torch.uint8, False), (torch.uint8, True), (torch.int64, True), (torch.bool, True),
    (torch.float32, False), (torch.float32, True), (torch.float16, True),
], ids=str)  # fmt: skip
def test_matching(targets, split, poisoned):
    dtype = torch.float16 if targets == torch.int64 else torch.float32
    call = Call.draw(1, 20, [(5, 7)], (31, 37), targets, 5, dtype=dtype)
    config = {**FEW, "split": split, "block_q": 16, "block_m": 16, "block": 32}
    _check_matching(call, config)


@pytest.mark.parametrize("queries, count, grid, size, options", [
    (70, 3, (2, 2), (9, 11), {"block_q": 64}),
    (3, 150, (2, 2), (9, 11), {}),
    (2, 300, (1, 1), (5, 5), {}),
    (3, 4, (40, 30), (7, 40), {"programs": 7}),
    (3, 4, (1, 1), (1, 1), {}),
    (5, 4, (3, 3), (50, 40), {"programs": 1}),
])  # fmt: skip
def test_matching_sizes(queries, count, grid, size, options, poisoned):
    call = Call.draw(2, queries, [grid], size, torch.int16, count)
    _check_matching(call, {**FEW, "block_q": 16, "block": 32, **options})


def _check_matching(call, config):
    index = torch.arange(call.num_targets)[:, None, None]
    t = (call.targets.long()[:, None] == index) if call.targets.ndim == 3 else call.targets
    results = []
    for dtype in (torch.float64, torch.float32):
        x = F.interpolate(call.logits[0].to(dtype), size=call.targets.shape[-2:], mode="bilinear")
        y, u = x.flatten(2), t.to(dtype).flatten(2)
        p, q = y.sigmoid(), (-y).sigmoid()
        positive = call.alpha * q**call.gamma * F.softplus(-y)
        negative = (1 - call.alpha) * p**call.gamma * F.softplus(y)
        products = torch.stack([a @ u.mT for a in (positive - negative, -y, p)])
        totals = torch.stack([negative.sum(2), F.softplus(y).sum(2), p.sum(2)])
        results.append((products, totals, u.sum(2)))
    options = (call.num_targets, call.alpha, call.gamma)
    found = kernels.mask_matching_sums(call.logits[0], call.targets, *options, config=config)
    for name, actual, truth, plain in zip(("products", "totals", "areas"), found, *results, strict=True):
        for i, values in enumerate(zip(actual, truth, plain, strict=True)):
            assert_within_budget(f"{name} {i}", *values)


def test_matching_cost(poisoned):
    call = Call.draw(2, 4, [(5, 7)], (21, 37), torch.bool, 3, gamma=1.5)
    found = mask_matching_cost(call.logits[0], call.targets, focal_gamma=1.5, backend="triton")
    truth, plain = (
        mask_matching_cost_reference(call.logits[0].to(d), call.targets, focal_gamma=1.5)
        for d in (torch.float64, torch.float32)
    )
    for name, *values in zip(found._fields, found, truth, plain, strict=True):
        assert_within_budget(name, *values)


def test_empty():
    for batch, queries, count in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        logits, masks = torch.randn(batch, queries, 4, 4), torch.rand(batch, count, 9, 9)
        matches = torch.full((batch, queries), -1)
        sums, areas = kernels.mask_loss_fwd([logits], masks, matches, count, 0.25, 2.0, False)
        assert sums.shape == (1, batch, queries, 4) and not sums.any()
        torch.testing.assert_close(areas, masks.sum((2, 3)))
        grads = kernels.mask_loss_bwd(sums, [logits], masks, matches, areas, count, 0.25, 2.0, False)
        assert torch.equal(grads[0], torch.zeros_like(logits))
        products, totals, areas = kernels.mask_matching_sums(logits, masks, count, 0.25, 2.0)
        assert products.shape == (3, batch, queries, count)
        p = F.interpolate(logits, size=(9, 9), mode="bilinear").sigmoid() if logits.numel() else logits
        torch.testing.assert_close(totals[2], p.sum((2, 3)))


def test_launches_are_made_without_looking_at_values():
    """Meta tensors have none, so nothing can wait for the device."""
    with torch.device("meta"):
        logits = [torch.empty(2, 19, 4, 6)] * 5
        labels, matches = torch.empty(2, 32, 40, dtype=torch.uint8), torch.empty(2, 19, dtype=torch.int64)
        grad_sums, areas = torch.empty(5, 2, 19, 4), torch.empty(2, 19)
    numbers, config = (19, 0.25, 2.0, True), kernels._config("mask_loss_fwd", "sm_90")
    _, forward = kernels._fwd_launches(logits, labels, matches, *numbers, config)
    config = kernels._config("mask_loss_bwd", "sm_90")
    _, backward = kernels._bwd_launches(grad_sums, logits, labels, matches, areas, *numbers, config)
    # Counts with the list, and for every four entries partials and sums; the list, and gradients.
    assert [len(forward), len(backward)] == [5, 3]
    assert all(launch.programs <= FEW["programs"] for launch in backward)


def test_too_large_for_32_bit_positions():
    with torch.device("meta"):
        logits, labels = torch.empty(1, 1, 2**15, 8), torch.empty(1, 2**15, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"too large.*backend='eager'"):
        kernels.mask_loss_fwd([logits], labels, None, 1, 0.25, 2.0, False)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", "sm_75"])
def test_configurations_are_pure(arch):
    for name in ("mask_loss_fwd", "mask_loss_bwd", "mask_loss_matching"):
        config = kernels._config(name, arch)
        assert config == kernels._config(name, arch)
        config["block"] = None
        assert kernels._config(name, arch)["block"] is not None


@pytest.mark.parametrize("height, h, rows", [
    (640, 40, 8), (512, 32, 8), (480, 30, 15), (1024, 64, 8), (37, 5, 3), (13, 40, 1), (640, 1, 10),
])  # fmt: skip
def test_rows_of_a_group(height, h, rows):
    """Whole tiles where there can be, and never more rows than three rows of the map can serve."""
    assert kernels._rows_of_a_group(height, h) == rows
    assert (rows - 1) * h < height


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("case", (*CASES, *SHAPES), ids=lambda c: c.name)
def test_on_the_device(case, dtype, device):
    inputs = case.inputs(dtype, device)
    result, grads = with_gradients(mask_loss, inputs, backend="triton")
    truth, truth_grads = oracle(inputs)
    plain, plain_grads = oracle(inputs, dtype=torch.float32)
    for name, *values in zip(("focal", "bce", "dice"), *map(stacked, (result, truth, plain)), strict=True):
        assert_within_budget(name, *values)
    for i, (g, t, p) in enumerate(zip(grads, truth_grads, plain_grads, strict=True)):
        assert_within_budget(f"gradient {i}", g, t, p.to(g.dtype))
