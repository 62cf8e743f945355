"""Losses and costs at points, against F.grid_sample on copies of masks and targets; same seeds and points."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from segvit_kernels import mask_loss_at_points, mask_matching_cost_at_points, uncertain_points
from segvit_kernels.ops import _parts, mask_points

QUERIES, GRID, SIZES = 6, (7, 5), [(20, 23), (17, 31)]
COUNTS = (3, 4)
INDICES = [
    (torch.tensor([4, 0, 5]), torch.tensor([2, 0, 1])),
    (torch.tensor([3, 1]), torch.tensor([0, 3])),
]
PAIRS = 5


def draw(dtype=torch.float64, targets=torch.bool):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, QUERIES, *GRID, generator=generator, dtype=torch.float64)
    masks = [torch.rand(n, *s, generator=generator) for n, s in zip(COUNTS, SIZES, strict=True)]
    return logits.to(dtype), [m > 0.5 if targets == torch.bool else m.to(targets) for m in masks]


def read(masks, points):
    """(k, P) of (k, h, w)."""
    return F.grid_sample(masks[:, None], 2.0 * points[:, :, None] - 1.0, align_corners=False)[:, 0, :, 0]


def padded(targets):
    height, width = (max(t.shape[axis] for t in targets) for axis in (1, 2))
    return [F.pad(t.double(), (0, width - t.shape[2], 0, height - t.shape[1])) for t in targets]


def reference(logits, targets, indices, points):
    """The formula with everything in memory, in float64."""
    pairs = torch.cat([logits[i, q] for i, (q, _) in enumerate(indices)]).double()
    chosen = torch.cat([t[m] for t, (_, m) in zip(padded(targets), indices, strict=True)])
    x, t = read(pairs, points.double()), read(chosen, points.double())
    bce = (F.softplus(x, threshold=1e9) - x * t).mean(1)
    p = x.sigmoid()
    return bce, 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)


def sampled(logits, count, oversample, share):
    """Mask2Former's points, in its order of random numbers, with all of them in memory."""
    candidates = torch.rand(PAIRS, int(count * oversample), 2)
    masks = torch.cat([logits[i, q] for i, (q, _) in enumerate(INDICES)]).float()
    best = (-read(masks, candidates).abs()).topk(int(share * count), dim=1).indices
    chosen = torch.stack([c[b] for c, b in zip(candidates, best, strict=True)])
    return torch.cat([chosen, torch.rand(PAIRS, count - int(share * count), 2)], 1)


@pytest.fixture(params=[None, 1, 2500], ids=["one block", "a pair a block", "some pairs"])
def blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setitem(_parts.BUDGETS, "cpu", request.param)


@pytest.mark.parametrize("targets", [torch.bool, torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_losses_and_gradients(dtype, targets, blocks):
    logits, masks = draw(dtype, targets)
    points = 1.04 * torch.rand(PAIRS, 50, 2, dtype=torch.float64) - 0.02  # some beyond the border
    leaves = [logits.clone().requires_grad_(), logits.double().requires_grad_()]
    found = mask_loss_at_points(leaves[0], masks, INDICES, points, reduction="none")
    expected = reference(leaves[1], masks, INDICES, points)
    weights = torch.rand(2, PAIRS, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((torch.stack(list(f)) * weights.to(f[0])).sum(), leaf)[0].double()
        for f, leaf in zip((found[:2], expected), leaves, strict=True)
    ]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
    for value, true in zip(found[:2], expected, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance / 10)
    assert found.points is points


@pytest.mark.parametrize(("oversample", "share"), [(3.0, 0.75), (1.0, 1.0), (2.5, 0.0)])
def test_points_are_mask2formers(oversample, share, blocks):
    logits, masks = draw(torch.float32)
    torch.manual_seed(3)
    expected = sampled(logits, 40, oversample, share)
    following = torch.rand(3)
    options = {"oversample_ratio": oversample, "importance_sample_ratio": share}
    for generator in (None, torch.Generator().manual_seed(3)):
        torch.manual_seed(3)
        found = uncertain_points(logits, INDICES, 40, **options, generator=generator)
        assert torch.equal(found, expected)
        if generator is None:
            assert torch.equal(torch.rand(3), following)  # and no other number was drawn
    torch.manual_seed(3)
    loss = mask_loss_at_points(logits, masks, INDICES, num_points=40, **options)
    assert torch.equal(loss.points, expected)
    bce, dice = reference(logits, masks, INDICES, expected)
    assert loss.bce.item() == pytest.approx(bce.mean().item(), rel=1e-5)
    assert loss.dice.item() == pytest.approx(dice.mean().item(), rel=1e-5)


def test_uncertain_points_lie_where_logits_are_small():
    logits = torch.linspace(-8, 8, 64).expand(1, 1, 64, 64)  # 0 in the middle column
    index = [(torch.tensor([0]), torch.tensor([0]))]
    points = uncertain_points(logits, index, 500, importance_sample_ratio=1.0)
    assert (points[..., 0] - 0.5).abs().max() < 0.25


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_costs(dtype):
    logits, masks = draw(dtype)
    points = torch.rand(2, 60, 2, dtype=torch.float64)
    for i, cost in enumerate(mask_matching_cost_at_points(logits, masks, points)):
        queries, targets = (t.flatten() for t in torch.meshgrid(
            torch.arange(QUERIES), torch.arange(COUNTS[i]), indexing="ij"
        ))  # fmt: skip
        every = reference(
            logits[i : i + 1], masks[i : i + 1], [(queries, targets)], points[i].expand(len(queries), -1, -1)
        )
        for name, true in zip(cost._fields, every, strict=True):
            value = getattr(cost, name)
            assert value.shape == (QUERIES, COUNTS[i])
            tolerance = 1e-10 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(value.double().flatten(), true, rtol=tolerance, atol=tolerance)
    torch.manual_seed(0)
    drawn = torch.stack([torch.rand(1, 30, 2)[0] for _ in masks])
    torch.manual_seed(0)
    for a, b in zip(
        mask_matching_cost_at_points(logits, masks, num_points=30),
        mask_matching_cost_at_points(logits, masks, drawn),
        strict=True,
    ):
        assert torch.equal(a.bce, b.bce)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_costs_under_autocast_are_those_without(dtype):
    """Sums over thousands of points are no numbers of float16."""
    masks = [(torch.arange(3)[:, None, None] == torch.arange(3).repeat_interleave(2)).expand(3, 6, 6)]
    logits = (24 * masks[0].float() - 12)[None].repeat_interleave(8, 2).repeat_interleave(8, 3)
    points = torch.rand(1, 12544, 2)
    (expected,) = mask_matching_cost_at_points(logits, masks, points)
    with torch.autocast("cpu", dtype=dtype):
        (found,) = mask_matching_cost_at_points(logits, masks, points)
    assert found.bce.dtype == torch.float32 and torch.equal(found.bce, expected.bce)
    assert torch.equal(found.dice, expected.dice)
    assert found.bce.argmin(0).tolist() == [0, 1, 2]


def test_gradcheck():
    logits, masks = draw()
    points = torch.rand(PAIRS, 9, 2, dtype=torch.float64)
    leaf = logits.requires_grad_()

    def call(x):
        return mask_loss_at_points(x, masks, INDICES, points, reduction="none")[:2]

    assert torch.autograd.gradcheck(call, leaf, atol=1e-6)
    with pytest.raises(RuntimeError, match="mask_loss_at_points has no second derivative"):
        torch.autograd.grad(torch.autograd.grad(call(leaf)[0].sum(), leaf, create_graph=True)[0].sum(), leaf)
    gradient = torch.func.grad(lambda x: call(x)[1].sum())(leaf.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(call(leaf)[1].sum(), leaf)[0])


def test_compile_fullgraph_and_second_size():
    torch._dynamo.reset()
    frames = []

    def backend(graph, examples):
        frames.append(graph)
        return graph.forward

    def criterion(logits, indices):
        (cost,) = mask_matching_cost_at_points(logits, masks, num_points=9)
        loss = mask_loss_at_points(logits, masks, indices, num_points=9)
        return loss.bce + loss.dice + cost.dice.mean()

    compiled, (logits, masks) = torch.compile(criterion, fullgraph=True, backend=backend), draw()
    masks = masks[:1]
    for cells in (4, 5):
        leaf, results = logits[:1, ..., :cells].clone().requires_grad_(), []
        torch._dynamo.mark_dynamic(leaf, 3)
        for call in (compiled, criterion):
            torch.manual_seed(0)
            loss = call(leaf, INDICES[:1])
            results.append((loss, *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(*results)
    assert len(frames) == 1


def test_a_query_of_several_targets_gets_both_gradients():
    logits, masks = draw()
    index = [(torch.tensor([1, 1]), torch.tensor([0, 2])), (torch.tensor([], dtype=torch.int64),) * 2]
    points = torch.rand(2, 20, 2, dtype=torch.float64)
    leaf = logits.requires_grad_()
    loss = mask_loss_at_points(leaf, masks, index, points, reduction="sum")
    expected = reference(leaf, masks, index, points)
    torch.testing.assert_close(
        *(torch.autograd.grad(v.sum(), leaf)[0] for v in (loss.bce, expected[0])), rtol=1e-9, atol=1e-12
    )


class Peak(TorchDispatchMode):
    """The bytes of the largest memory that an operation gives, those of ``given`` aside."""

    def __init__(self, *given):
        super().__init__()
        self.bytes, self.given = 0, {t.untyped_storage().data_ptr() for t in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() not in self.given:
                self.bytes = max(self.bytes, part.untyped_storage().nbytes())
        return result


def test_neither_targets_nor_candidates_are_all_in_memory(monkeypatch):
    monkeypatch.setitem(_parts.BUDGETS, "cpu", 2**16)
    logits = torch.randn(1, 40, 16, 16, requires_grad=True)
    targets = torch.rand(1, 40, 128, 128) > 0.5
    every = (torch.arange(40), torch.arange(40))
    with Peak(logits, targets) as peak:
        loss = mask_loss_at_points(logits, targets, [every], num_points=100)
        (loss.bce + loss.dice).backward()
    assert peak.bytes <= 2**16  # of the masks 40 KiB, of the targets 640 KiB, of the candidates 96 KiB


def test_nothing_matched():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    none = torch.tensor([], dtype=torch.int64)
    loss = mask_loss_at_points(logits, torch.zeros(2, 0, 8, 8), [(none, none)] * 2, num_points=10)
    assert loss.bce == 0 and loss.dice == 0 and loss.points.shape == (0, 10, 2)
    (loss.bce + loss.dice).backward()
    assert not logits.grad.any()
    assert [c.dice.shape for c in mask_matching_cost_at_points(logits, torch.zeros(2, 0, 8, 8))] == [
        (3, 0)
    ] * 2


@pytest.mark.parametrize("dtype", mask_points._INDEX_DTYPES, ids=str)
def test_indices_of_few_bits(dtype):
    """Of which places of pixels would wrap around, and of which uint8 is a mask to PyTorch."""
    logits, masks, points = torch.randn(1, 3, 4, 4), torch.rand(1, 4, 110, 110), torch.rand(2, 50, 2)
    pairs = torch.tensor([2, 0]), torch.tensor([3, 1])
    found, expected = (
        mask_loss_at_points(logits, masks, [[t.to(d) for t in pairs]], points) for d in (dtype, torch.int64)
    )
    assert torch.equal(found.bce, expected.bce) and torch.equal(found.dice, expected.dice)


def test_empty_batch():
    logits = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = mask_loss_at_points(logits, [], [], num_points=10)
    assert loss.bce == 0 and loss.points.shape == uncertain_points(logits, [], 10).shape == (0, 10, 2)
    loss.dice.backward()
    assert logits.grad.shape == logits.shape and mask_matching_cost_at_points(logits, []) == []


def test_numbers_that_are_none_show():
    logits, masks = draw()
    logits[0, 4] = torch.nan
    bce = mask_loss_at_points(logits, masks, INDICES, num_points=10, reduction="none").bce
    assert bce.isnan().tolist() == [True, False, False, False, False]


PAIR = [(torch.tensor([0]), torch.tensor([0]))]
LOGITS, TARGETS = torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 8, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask_logits": LOGITS[0]}, ValueError, r"mask_logits has shape \(3, 4, 4\)"),
        ({"mask_logits": LOGITS.int()}, TypeError, "mask_logits has dtype torch.int32"),
        ({"targets": 3}, TypeError, "targets is a int; expected a tensor or a list"),
        ({"targets": TARGETS[:0]}, ValueError, "targets has 0 images; expected 1"),
        ({"targets": [TARGETS]}, ValueError, r"targets\[0\] has shape \(1, 2, 8, 8\)"),
        ({"indices": []}, ValueError, "indices is of length 0; expected 1 pairs"),
        ({"indices": [(torch.tensor([0, 1]), torch.tensor([0]))]}, ValueError, "2 queries and 1 targets"),
        ({"indices": [(torch.tensor([3]), torch.tensor([0]))]}, ValueError, "queries 3 to 3; expected 0"),
        ({"indices": [(torch.tensor([0]), torch.tensor([2]))]}, ValueError, "targets 2 to 2; expected 0"),
        ({"points": torch.rand(2, 5, 2)}, ValueError, r"points has shape \(2, 5, 2\); expected \(1, p"),
        ({"points": torch.zeros(1, 5, 2).int()}, TypeError, "points is no floating-point tensor"),
        ({"points": torch.rand(1, 5, 2).requires_grad_()}, ValueError, "points requires a gradient, which"),
        ({"targets": TARGETS.clone().requires_grad_()}, ValueError, r"targets\[0\] requires a gradient"),
        ({"num_points": 0}, ValueError, "num_points is 0; expected at least 1"),
        ({"oversample_ratio": 0.5}, ValueError, "oversample_ratio is 0.5; expected at least 1"),
        ({"importance_sample_ratio": 1.5}, ValueError, "importance_sample_ratio is 1.5; expected 0 to 1"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'"),
        ({"num_masks": -1}, ValueError, "num_masks is -1; expected at least 0"),
        ({"num_masks": torch.ones(2)}, ValueError, r"num_masks has shape \(2,\); expected a single number"),
        ({"indices": [([0], [0])]}, TypeError, r"indices\[0\] has queries of a list; expected a tensor of t"),
        ({"indices": [(torch.tensor([0.5]), torch.tensor([0]))]}, TypeError, "has queries of torch.float32"),
        ({"indices": [(torch.tensor([0]), torch.tensor([True]))]}, TypeError, "has targets of torch.bool"),
    ],
)  # fmt: skip
def test_refusals(changes, error, message):
    given = {"mask_logits": LOGITS, "targets": TARGETS, "indices": PAIR, **changes}
    with pytest.raises(error, match=message):
        mask_loss_at_points(**given)
