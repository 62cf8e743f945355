"""factored_mask_loss and factored_matching_cost are the mask loss and the costs of the product."""

import pytest
import torch
from backends import NAMES, each_backend, each_dtype
from torch.utils._python_dispatch import TorchDispatchMode

from segvit_kernels import (
    factored_mask_loss,
    factored_matching_cost,
    mask_loss,
    mask_loss_reference,
    mask_matching_cost,
)
from segvit_kernels.ops import _checks, factored_masks
from segvit_kernels.testing.mask_loss import as_list, stacked

CLOSE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2}
BATCH, QUERIES, CHANNELS, GRID, SIZE = 3, 7, 6, (5, 4), (19, 23)
KINDS = ("labels", "ignored", "bool", "soft", "matched", "few", "stacked")
ONE = QUERIES * GRID[0] * GRID[1] * 8  # bytes of one image in float64


def draw(kind, dtype=torch.float64, device="cpu", seed=0):
    """Queries, features and arguments of the loss; "few" has queries that are mostly unmatched."""
    generator = torch.Generator().manual_seed(seed)
    queries = [
        torch.randn(BATCH, QUERIES, CHANNELS, generator=generator)
        for _ in range(3 if kind == "stacked" else 1)
    ]
    features = torch.randn(BATCH, CHANNELS, *GRID, generator=generator)
    arguments = {}
    if kind in ("labels", "ignored", "stacked"):
        labels = torch.randint(QUERIES, (BATCH, *SIZE), generator=generator)
        arguments["targets"] = torch.where(torch.rand(labels.shape, generator=generator) < 0.1, 255, labels)
        arguments["mask_ignored"] = kind == "ignored"
    else:
        count = QUERIES if kind in ("bool", "soft") else 4
        masks = torch.rand(BATCH, count, *SIZE, generator=generator)
        arguments["targets"] = masks.to(dtype) if kind == "soft" else masks > 0.6
    if kind in ("matched", "few"):
        matches = torch.randint(-1, 4, (BATCH, QUERIES), generator=generator)
        if kind == "few":  # 2, 0 and 1 of them
            matches = torch.full_like(matches, -1)
            matches[0, 1], matches[0, 5], matches[2, 6] = 3, 0, 2
        arguments["matches"] = matches
    cast = [t.to(device, dtype) for t in (*queries, features)]
    arguments = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    return cast[:-1], cast[-1], arguments


def with_gradients(run, queries, features):
    """Losses of both forms and gradients of all factors."""
    leaves = [t.detach().clone().requires_grad_() for t in (*queries, features)]
    result = run(leaves[:-1] if len(queries) > 1 else leaves[0], leaves[-1])
    value = stacked(result)
    weights = torch.rand(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((value * weights.to(value)).sum(), leaves)
    return value.detach(), gradients, result


def of_product(function, **arguments):
    def run(queries, features):
        products = [torch.einsum("bqc,bchw->bqhw", q, features) for q in as_list(queries)]
        return function(products if isinstance(queries, list) else products[0], **arguments)

    return run


def assert_close(found, expected, tolerance):
    scale = max(1e-3, expected.abs().max().item())
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance * scale)


@each_dtype("eager", "triton", "cpu", "cuda")
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_product(kind, backend, dtype, poisoned):
    if backend.id in ("triton", "cuda") and kind not in ("few", "ignored"):
        pytest.skip("the operator has its own battery")
    queries, features, arguments = draw(kind, dtype, backend.device)
    truth = [t.double() for t in queries], features.double()
    reference = dict(arguments, num_classes=QUERIES)
    if "matches" in arguments or arguments["targets"].ndim == 4:
        del reference["num_classes"]
    expected = with_gradients(of_product(mask_loss_reference, **reference), *truth)
    # One block, a block an image, some queries of an image, a query.
    for budget in (None, ONE, 3 * ONE // QUERIES, 1):

        def run(q, f, budget=budget):
            return factored_mask_loss(q, f, **arguments, budget=budget, backend=backend.name)

        found = with_gradients(run, queries, features)
        assert_close(found[0], expected[0], CLOSE[dtype])
        for gradient, true in zip(found[1], expected[1], strict=True):
            assert gradient.dtype == dtype
            assert_close(gradient, true, CLOSE[dtype])
        assert torch.equal(found[2].present, expected[2].present)
        if backend.id in ("triton", "cuda"):
            break


@pytest.mark.parametrize("kind", KINDS)
def test_the_form_that_reads_no_values(kind, monkeypatch):
    queries, features, arguments = draw(kind)
    expected = with_gradients(lambda q, f: factored_mask_loss(q, f, **arguments), queries, features)
    monkeypatch.setattr(_checks, "can_read", lambda x: False)
    found = with_gradients(lambda q, f: factored_mask_loss(q, f, **arguments), queries, features)
    torch.testing.assert_close(found[:2], expected[:2])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions_and_weights(reduction):
    queries, features, arguments = draw("few")
    weights = torch.rand(BATCH, QUERIES, dtype=torch.float64, requires_grad=True)
    options = dict(arguments, reduction=reduction, pair_weights=weights)
    found = factored_mask_loss(queries[0], features, **options)
    expected = of_product(mask_loss, **options)(queries[0], features)
    torch.testing.assert_close(stacked(found), stacked(expected))
    torch.testing.assert_close(*(torch.autograd.grad(r.dice.sum(), weights) for r in (found, expected)))


@each_backend("eager", "triton", "cpu", "cuda")
@pytest.mark.parametrize("kind", ["labels", "soft"])
def test_costs_are_those_of_the_product(kind, backend, poisoned):
    dtype = torch.float64 if backend.id == "eager" else torch.float32
    (queries,), features, arguments = draw(kind, dtype)
    targets = arguments["targets"][..., :5, :9] if backend.id == "triton" else arguments["targets"]
    options = {"num_classes": QUERIES} if targets.ndim == 3 else {}
    product = torch.einsum("bqc,bchw->bqhw", queries.double(), features.double())
    expected = mask_matching_cost(product, targets.double() if kind == "soft" else targets, **options)
    for budget in (None, ONE, 1):
        found = factored_matching_cost(
            queries, features, targets, **options, budget=budget, backend=backend.name
        )
        for name in expected._fields:
            assert_close(getattr(found, name), getattr(expected, name), CLOSE[dtype])
        if backend.id == "triton":
            break


@pytest.mark.parametrize("kind", ["labels", "soft", "few", "stacked"])
def test_gradcheck(kind):
    queries, features, arguments = draw(kind)
    small = [q[:2, :, :2] for q in queries]
    leaves = [t.clone().requires_grad_() for t in (*small, features[:2, :2, :2, :2])]
    arguments = {n: v[:2] if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    arguments["targets"] = arguments["targets"][..., 4:9, 4:8]

    def call(*leaves):
        given = list(leaves[:-1]) if len(leaves) > 2 else leaves[0]
        losses = factored_mask_loss(given, leaves[-1], **arguments, budget=3 * 8 * 4)
        return tuple(stacked(losses).flatten())

    # Of many numbers one combination: every partial derivative of the product alone is in the other kinds.
    assert torch.autograd.gradcheck(call, leaves, fast_mode=kind == "stacked")
    with pytest.raises(RuntimeError, match="factored_mask_loss has no second derivative"):
        torch.autograd.grad(
            torch.autograd.grad(call(*leaves)[0], leaves[-1], create_graph=True)[0].sum(), leaves[-1]
        )


class Largest(TorchDispatchMode):
    """The elements of the largest memory of floating-point numbers that an operation gives."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor) and part.is_floating_point():
                self.numel = max(self.numel, part.untyped_storage().nbytes() // part.element_size())
        return result


@pytest.mark.parametrize("budget", [1, 4])
def test_no_more_of_the_product_exists_than_the_budget_holds(budget):
    queries = torch.randn(2, 40, 3, requires_grad=True)
    features = torch.randn(2, 3, 16, 16, requires_grad=True)
    targets = torch.rand(2, 40, 4, 4) > 0.5
    with Largest() as largest:
        loss = factored_mask_loss(queries, features, targets, budget=budget * 4 * 16 * 16)
        (loss.bce + loss.dice).backward()
        factored_matching_cost(queries, features, targets[:, :3], budget=budget * 4 * 16 * 16)
    assert largest.numel == max(budget * 16 * 16, features.numel())


def test_queries_without_a_match_have_no_product(monkeypatch):
    queries, features, arguments = draw("few")
    products, real = [], factored_masks._product
    monkeypatch.setattr(factored_masks, "_product", lambda q, f: products.append(q.shape[:2]) or real(q, f))
    assert _checks.can_read(features)
    factored_mask_loss(queries[0], features, **arguments)
    assert products == [(BATCH, 2)]


def test_compile():
    torch._dynamo.reset()
    compiled = torch.compile(factored_mask_loss, fullgraph=True, backend="aot_eager")
    for kind in ("labels", "matched"):
        queries, features, arguments = draw(kind, torch.float32)
        runs = [
            with_gradients(
                lambda q, f, call=call, a=arguments: call(q, f, **a, budget=ONE // 2), queries, features
            )
            for call in (compiled, factored_mask_loss)
        ]
        torch.testing.assert_close(runs[0][:2], runs[1][:2])


def test_export_and_transforms():
    class Criterion(torch.nn.Module):
        def forward(self, queries, features, labels):
            return factored_mask_loss(queries, features, labels).dice

    (queries,), features, arguments = draw("labels", torch.float32)
    given = (queries, features, arguments["targets"])
    batch = ({0: torch.export.Dim("batch", max=99)},) * 3
    program = torch.export.export(Criterion(), given, dynamic_shapes=batch)
    for sizes in (given, [t.repeat_interleave(2, 0) for t in given]):
        torch.testing.assert_close(program.module()(*sizes), Criterion()(*sizes))
    assert "segvit.mask_loss_fwd" in str(program.graph)

    gradient = torch.func.grad(lambda f: Criterion()(queries, f, arguments["targets"]))(features)
    leaf = features.clone().requires_grad_()
    (expected,) = torch.autograd.grad(Criterion()(queries, leaf, arguments["targets"]), leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_autocast_is_that_of_the_product():
    (queries,), features, arguments = draw("labels", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        runs = [
            with_gradients(run, [queries], features)
            for run in (
                lambda q, f: factored_mask_loss(q, f, **arguments),
                of_product(mask_loss, **arguments),
            )
        ]
    torch.testing.assert_close(runs[0][:2], runs[1][:2])


def test_autocast_of_transforms_is_that_of_the_product():
    """Sums over more pixels than float16 has numbers for."""
    queries, features, labels = torch.randn(1, 3, 4), torch.randn(1, 4, 9, 9), torch.zeros(1, 300, 300).long()
    given = {"targets": labels, "num_classes": 3}
    for run in (
        lambda q: torch.stack(factored_mask_loss(q, features, **given)[:3]),
        lambda q: torch.stack(factored_matching_cost(q, features, **given)),
    ):
        with torch.autocast("cpu", dtype=torch.float16):
            plain, (mapped,) = run(queries), torch.func.vmap(run)(queries[None])
        assert plain.dtype == mapped.dtype == torch.float32
        torch.testing.assert_close(mapped, plain, rtol=1e-2, atol=1e-3)


def test_empty_batch():
    queries, features = torch.zeros(0, 3, 2, requires_grad=True), torch.zeros(0, 2, 4, 4)
    loss = factored_mask_loss(queries, features, torch.zeros(0, 8, 8, dtype=torch.uint8))
    assert loss.focal == 0 and loss.num_masks == 0
    loss.focal.backward()
    assert factored_matching_cost(queries, features, torch.zeros(0, 5, 8, 8) > 0).dice.shape == (0, 3, 5)


F, Q = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 3)
LABELS = torch.zeros(2, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("queries", "features", "targets", "options", "error", "message"),
    [
        (Q, F[0], LABELS, {}, ValueError, r"features has shape \(3, 4, 4\); expected \(batch, channels"),
        (Q[:1], F, LABELS, {}, ValueError, r"queries has shape \(1, 5, 3\); expected \(2, queries, 3\)"),
        ([Q, Q[..., :2]], F, LABELS, {}, ValueError, r"queries\[1\] has shape \(2, 5, 2\)"),
        ([], F, LABELS, {}, ValueError, "queries is empty"),
        (3, F, LABELS, {}, TypeError, "queries is 3; expected a tensor or a list"),
        (Q.half(), F, LABELS, {}, TypeError, "queries is torch.float16 on cpu; expected torch.float32"),
        (Q.int(), F.int(), LABELS, {}, TypeError, "dtype torch.int32; expected float32"),
        (Q, F, LABELS[0], {}, ValueError, r"targets has shape \(8, 8\)"),
        (Q, F, LABELS, {"budget": 0}, ValueError, "budget is 0; expected at least 1"),
        (Q, F, torch.zeros(2, 4, 8, 8) > 0, {}, ValueError, "queries has 5 queries; expected 4, one a"),
        (Q, F, LABELS, {"matches": torch.full((2, 5), 5)}, ValueError, "matches holds 5 to 5"),
        (Q, F, LABELS, {"focal_alpha": 2}, ValueError, "focal_alpha is 2; expected 0 to 1"),
        (Q, F, LABELS, {"backend": "gpu"}, ValueError, "backend' is 'gpu'"),
    ],
)  # fmt: skip
def test_refusals(queries, features, targets, options, error, message):
    with pytest.raises(error, match=message):
        factored_mask_loss(queries, features, targets, **options)


def test_costs_name_what_is_no_tensor():
    with pytest.raises(TypeError, match="features is a list; expected a tensor"):
        factored_matching_cost(Q, [F], LABELS, num_classes=2)


def test_dtypes_are_named():
    assert set(CLOSE) == set(NAMES)
