"""fused_atm: the battery of every backend, then what is the operator's own."""

import dataclasses
import functools
import math

import pytest
import torch
from attention import (
    INPUTS,
    SEED,
    check_different_backends,
    check_dropout_bits,
    check_gradients,
    check_refusals,
    check_repeatable,
    check_statistics,
    check_zero_scale,
    gapped,
    turned,
)
from backends import (
    Graphs,
    assert_same,
    assert_strides_change_nothing,
    assert_threads_change_nothing,
    each_backend,
    each_dtype,
)
from torch.utils.flop_counter import FlopCounterMode

from segvit_kernels import FusedATM, atm_reference, fused_atm, fvcore_handles
from segvit_kernels.ops import atm
from segvit_kernels.ops._philox import dropout_scale, dropout_threshold, keep_mask, philox
from segvit_kernels.testing import RELATIVE_NORM, assert_within_budget, relative_error
from segvit_kernels.testing.atm import CASES, SHAPES, ATMCase, oracle

BY_NAME = {case.name: case for case in CASES}
SMALL = ATMCase("small", 2, 40, 70, 2, 32, previous_masks=True)

# On both sides of vectors (4, 8, 16), tiles (48 queries, 64 keys), parts of the keys (256) and of the queries
# (384, or 48 where the heads are many and wide), and groups of heads.
SIZES = (
    ATMCase("q1_k33", 2, 1, 33, 3, 16),
    ATMCase("q1_k1", 1, 1, 1, 16, 128, previous_masks=True),
    ATMCase("q7_k1", 2, 7, 1, 1, 64),
    ATMCase("q16_k64", 1, 16, 64, 2, 16),
    ATMCase("q17_k65", 1, 17, 65, 2, 40, dropout_p=0.2),
    ATMCase("q47_k63", 1, 47, 63, 1, 17),
    ATMCase("q48_k256", 1, 48, 256, 1, 16),
    ATMCase("q49_k257", 1, 49, 257, 1, 16, previous_masks=True),
    ATMCase("q7_k600", 1, 7, 600, 3, 16, dropout_p=0.3, previous_masks=True),
    ATMCase("q5_k1100", 2, 5, 1100, 1, 20, broadcast=True),
    ATMCase("q385_k9", 1, 385, 9, 1, 16, previous_masks=True),
    ATMCase("q50_k20", 1, 50, 20, 16, 128, strided=True),
    ATMCase("q201_k100", 1, 201, 100, 1, 24, broadcast=True),
    ATMCase("q150_k33", 1, 150, 33, 12, 32),
    ATMCase("dim_1", 1, 5, 9, 2, 1),
    ATMCase("dim_127", 1, 9, 13, 1, 127),
)


@pytest.fixture
def fixed_seed(monkeypatch):
    """Every call draws the dropout mask of SEED."""
    monkeypatch.setattr(atm, "draw_seed", SEED.to)


def drawn(case, backend, dtype=torch.float32):
    return case.inputs(dtype, backend.device), case.gradients(dtype, backend.device)


def everything(case, inputs, gradients, backend, *, backward=None, scale=None, seed=SEED, deterministic=True):
    """All results of both operators by name; the backward by another backend if ``backward`` is one."""
    tensors, seed = [inputs[name] for name in INPUTS], seed if case.dropout_p else None
    options = (seed, case.head_dim**-0.5 if scale is None else scale, case.dropout_p)
    previous = inputs.get("previous_masks")
    output, masks, lse = backend.op("atm_fwd")(*tensors, previous, *options, True)
    grads = (backward or backend).op("atm_bwd")(*gradients, *tensors, output, lse, *options, deterministic)
    named = {f"grad_{name}": grad for name, grad in zip(INPUTS, grads, strict=True)}
    return {"output": output, "mask_logits": masks, "lse": lse, **named}


def check(case, dtype, backend, *, unused=None, deterministic=True):
    """Forward and backward of one case within the error budget; inputs unchanged."""
    inputs, gradients = drawn(case, backend, dtype)
    gradients = [None if index == unused else g for index, g in enumerate(gradients)]
    seed = SEED.to(backend.device)
    truth, true_grads = oracle(case, inputs, gradients, seed=seed)
    plain, plain_grads = oracle(case, inputs, gradients, dtype=dtype, seed=seed)
    given = [t for t in (*inputs.values(), *gradients) if t is not None]
    before = [t.clone() for t in given]

    found = everything(case, inputs, gradients, backend, seed=seed, deterministic=deterministic)
    for name in ("output", "mask_logits"):
        assert found[name].dtype == dtype and found[name].is_contiguous()
        assert_within_budget(name, found[name], getattr(truth, name), getattr(plain, name))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    check_statistics(found["lse"], inputs, case.head_dim**-0.5, tolerance)
    check_gradients(found, true_grads, plain_grads, dtype, one_key=128 if case.keys == 1 else None)
    assert all(map(torch.equal, before, given))


@each_dtype()
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case, backend, dtype, poisoned):
    check(case, dtype, backend)


@each_dtype("triton-gpu", "cuda-gpu")
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_shapes(case, backend, dtype):
    check(case, dtype, backend)


@each_backend("cpu", "cuda", "cuda-gpu")
@pytest.mark.parametrize("case", SIZES, ids=lambda c: c.name)
def test_sizes(case, backend, poisoned):
    check(case, torch.float16 if case.heads == 3 else torch.float32, backend)


@each_dtype()
@pytest.mark.parametrize("unused", [0, 1], ids=["output", "masks"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_either_gradient_may_be_missing(unused, dropout_p, backend, dtype, poisoned):
    check(dataclasses.replace(SMALL, heads=1, dropout_p=dropout_p), dtype, backend, unused=unused)


@each_backend()
def test_without_masks(backend, poisoned):
    case = dataclasses.replace(SMALL, previous_masks=False)
    inputs, gradients = drawn(case, backend)
    expected = everything(case, inputs, gradients, backend)
    options = (None, None, case.head_dim**-0.5, 0.0, False)
    output, masks, lse = backend.op("atm_fwd")(*inputs.values(), *options)
    assert masks.shape == (0,)
    torch.testing.assert_close(output, expected["output"])
    torch.testing.assert_close(lse, expected["lse"])


def dropout_bits(keys, backend):
    def forward(*arguments):
        *tensors, seed, p = arguments
        return backend.op("atm_fwd")(*tensors, None, seed, 1.0, p, False)[0]

    check_dropout_bits(keys, forward, backend.device)


@each_backend()
def test_dropout_bits_are_the_same(backend, poisoned):
    for keys in (30,) if backend.name == "triton" else (30, 300):
        dropout_bits(keys, backend)


@each_backend()
@pytest.mark.parametrize("scale", [30.0, -0.5, 0.0])
def test_any_scale(scale, backend, poisoned):
    """Large logits neither overflow nor lose the masks; a negative or zero scale is taken at its word."""
    case = dataclasses.replace(SMALL, previous_masks=False)
    inputs, gradients = drawn(case, backend)
    leaves = [t.double().requires_grad_() for t in inputs.values()]
    truth = atm_reference(*leaves, scale=scale)
    true_grads = torch.autograd.grad(truth, leaves, [g.double() for g in gradients])
    found = everything(case, inputs, gradients, backend, scale=scale)
    check_statistics(found.pop("lse"), inputs, scale, 1e-5)
    for (name, actual), expected in zip(found.items(), (*truth, *true_grads), strict=True):
        # In Triton weights of logits of some hundreds err by as many roundings.
        budget = 5e-5 if scale > 1 and backend.name == "triton" else 2e-5
        assert relative_error(actual, expected.detach()) < budget, name


@each_backend("eager", "cpu", "cuda")
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_scores_far_apart(size, backend, poisoned):
    """The largest score of a query may stand in any tile, and weights may be 0."""
    case = ATMCase("far", 1, 20, 150, 2, 16)
    inputs, gradients = drawn(case, backend)
    inputs["key"] *= torch.linspace(-size, size, case.keys)[:, None, None]
    truth, true_grads = oracle(case, inputs, gradients)
    found = everything(case, inputs, gradients, backend)
    assert relative_error(found["output"], truth.output) < 1e-5 * size
    assert relative_error(found["mask_logits"], truth.mask_logits) < 1e-6
    for name in INPUTS:
        assert relative_error(found[f"grad_{name}"], true_grads[name]) < 1e-5 * size, name


@each_backend("eager", "cpu", "cuda")
def test_what_is_not_finite_stays_with_its_query(backend, poisoned):
    case = dataclasses.replace(SMALL, previous_masks=False)
    inputs, gradients = drawn(case, backend)
    expected = everything(case, inputs, gradients, backend)
    inputs["query"][1, 7, 1, 3] = math.nan
    found = everything(case, inputs, gradients, backend)
    assert found["output"][1, 7, 1].isnan().all()
    assert found["mask_logits"][1, 7].isnan().all()
    found["output"][1, 7, 1] = expected["output"][1, 7, 1]
    found["mask_logits"][1, 7] = expected["mask_logits"][1, 7]
    assert_same(found, {name: expected[name] for name in ("output", "mask_logits")})


@each_backend("eager", "cpu", "cuda")
def test_what_is_not_a_number_in_a_key_shows_everywhere(backend):
    """Training must see that it diverged: the smallest of two numbers is not what is no number."""
    inputs, gradients = drawn(SMALL, backend)
    inputs["key"][1, 7, 1, 3] = math.nan
    found = everything(SMALL, inputs, gradients, backend)
    assert found["output"][1, :, 1].isnan().all() and found["grad_value"][1, :, 1].isnan().all()
    assert found["output"][0].isfinite().all() and found["output"][1, :, 0].isfinite().all()


@each_backend()
def test_scale_zero_keeps_what_is_not_a_number(backend):
    check_zero_scale(lambda *tensors, **options: fused_atm(*tensors, **options).output, backend)


@each_dtype()
def test_strides(backend, dtype, poisoned):
    """Heads before tokens, gradients of a broadcast sum, an expanded query, rows with a gap."""
    plain, gradients = drawn(SMALL, backend, dtype)
    plain["query"] = plain["query"][:1].expand(2, -1, -1, -1).contiguous()
    gradients = (gradients[0][:, :, :1, :1].expand_as(gradients[0]).contiguous(), gradients[1])

    odd = {
        "query": plain["query"][:1].expand(2, -1, -1, -1),
        "key": turned(plain["key"]),
        "value": gapped(plain["value"]),
        "previous_masks": gapped(plain["previous_masks"]),
    }
    expected = everything(SMALL, plain, gradients, backend)
    for odd_gradients in (
        (gradients[0][:, :, :1, :1].expand_as(gradients[0]), gapped(gradients[1])),
        (turned(gradients[0]), gradients[1].mT.contiguous().mT),
    ):
        assert_strides_change_nothing(backend, everything(SMALL, odd, odd_gradients, backend), expected)
    every_other = {
        name: torch.stack([t, torch.full_like(t, math.nan)], dim=-1)[..., 0] for name, t in plain.items()
    }
    assert_strides_change_nothing(backend, everything(SMALL, every_other, gradients, backend), expected)


@each_backend("eager", "cpu", "cuda")
def test_gradient_of_masks_summed_over_the_batch(backend, poisoned):
    """Expanded over the batch and along the rows, as from a sum."""
    inputs, gradients = drawn(SMALL, backend)
    for part in (gradients[1][:1], gradients[1][:, :, :1], gradients[1][:1, :1, :1]):
        expanded = part.expand_as(gradients[1])
        found = everything(SMALL, inputs, (gradients[0], expanded), backend)
        assert_same(found, everything(SMALL, inputs, (gradients[0], expanded.contiguous()), backend))


@each_backend()
@pytest.mark.parametrize("broadcast", [False, True])
def test_repeatable(broadcast, backend, poisoned):
    case = dataclasses.replace(SMALL, heads=1, broadcast=broadcast, dropout_p=0.1)
    inputs, gradients = drawn(case, backend)
    seed = SEED.to(backend.device)
    check_repeatable(lambda: everything(case, inputs, gradients, backend, seed=seed))


@each_backend("cpu", "cuda")
@pytest.mark.parametrize("broadcast", [False, True])
def test_threads_change_nothing(broadcast, backend, poisoned):
    case = ATMCase("threads", 2, 50, 300, 2, 16, broadcast=broadcast)
    inputs, gradients = drawn(case, backend)
    assert_threads_change_nothing(lambda: everything(case, inputs, gradients, backend))


@each_backend()
def test_no_images(backend, poisoned):
    for query_batch in (1, 0):
        query, key = (torch.randn(b, n, 2, 16, device=backend.device) for b, n in ((query_batch, 5), (0, 9)))
        case = ATMCase("empty", 0, 5, 9, 2, 16)
        inputs = {"query": query, "key": key, "value": key}
        found = everything(case, inputs, drawn(case, backend)[1], backend)
        shapes = [found[name].shape for name in ("output", "mask_logits", "lse")]
        assert shapes == [(0, 5, 2, 16), (0, 5, 9), (0, 2, 5)]
        assert torch.equal(found["grad_query"], torch.zeros_like(query))
        assert found["grad_key"].shape == found["grad_value"].shape == key.shape


@each_backend("triton", "cpu", "cuda")
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_forward_and_backward_by_different_backends(dropout_p, backend, poisoned):
    case = dataclasses.replace(SMALL, dropout_p=dropout_p)
    inputs, gradients = drawn(case, backend)
    _, truth = oracle(case, inputs, gradients, seed=SEED)
    check_different_backends(functools.partial(everything, case, inputs, gradients), backend, truth)


@each_dtype(dtypes=(torch.float32, torch.bfloat16))
def test_through_the_public_function(backend, dtype, fixed_seed, poisoned):
    case = dataclasses.replace(SMALL, heads=1, dropout_p=0.1)
    inputs, gradients = drawn(case, backend, dtype)
    result, grads = run(case, inputs, gradients, backend=backend.name, deterministic=True)
    expected = everything(case, inputs, gradients, backend, seed=SEED.to(backend.device))
    assert_same(result._asdict(), {name: expected[name] for name in result._asdict()})
    assert torch.equal(grads.pop("previous_masks"), gradients[1])
    assert_same(grads, {name: expected[f"grad_{name}"] for name in INPUTS})


@each_backend("triton", "cpu", "cuda")
def test_what_is_refused_when_asked_for_and_left_to_eager_otherwise(backend, monkeypatch):
    monkeypatch.delenv("SEGVIT_KERNELS_BACKEND", raising=False)
    wide = ATMCase("wide", 1, 3, 5, 1, 136)
    check_refusals(fused_atm, backend, SMALL.inputs(torch.float64), wide.inputs(torch.float32))


def opcheck(case, backend, utils):
    inputs, (grad_output, grad_masks) = drawn(case, backend)
    options, tensors = {"backend": backend.name}, [inputs[n] for n in INPUTS]
    seed, ops = SEED if case.dropout_p else None, torch.ops.segvit
    forward = (*tensors, inputs.get("previous_masks"), seed, 0.2, case.dropout_p, True)
    torch.library.opcheck(ops.atm_fwd.default, forward, options, test_utils=utils)
    output, _, lse = ops.atm_fwd(*forward, **options)
    for grads in ((grad_output, grad_masks), (None, grad_masks), (grad_output, None)):
        backward = (*grads, *tensors, output, lse, seed, 0.2, case.dropout_p, True)
        torch.library.opcheck(ops.atm_bwd.default, backward, options, test_utils=utils)


@each_backend("eager", "cpu", "cuda")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_opcheck(case, backend):
    opcheck(case, backend, ("test_schema", "test_faketensor"))


@each_backend("eager")
@pytest.mark.parametrize("case", ["previous", "broadcast", "strided", "dropout"])
def test_opcheck_of_a_compiled_graph(case, backend):
    opcheck(BY_NAME[case], backend, ("test_faketensor", "test_aot_dispatch_dynamic"))


# What no backend changes.


def run(case, inputs, gradients, **options):
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    result = fused_atm(**leaves, dropout_p=case.dropout_p, **options)
    used = [(o, g) for o, g in zip(result, gradients, strict=True) if g is not None]
    grads = torch.autograd.grad(
        [o for o, _ in used], list(leaves.values()), [g for _, g in used], allow_unused=True
    )
    return result, {
        n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), grads, strict=True)
    }


@pytest.mark.parametrize("budget", [1, 100, 2000])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_blocking_does_not_change_the_result(case, budget, fixed_seed, poisoned, monkeypatch):
    inputs, gradients = case.inputs(torch.float64), case.gradients(torch.float64)
    result, grads = run(case, inputs, gradients)

    def small(key, queries):
        for b in range(key.shape[0]):
            step = max(1, budget // (queries * key.shape[1]))
            for h in range(0, key.shape[2], step):
                yield range(b, b + 1), range(h, min(h + step, key.shape[2]))

    monkeypatch.setattr(atm, "_blocks", small)
    blocked, blocked_grads = run(case, inputs, gradients)
    torch.testing.assert_close(tuple(blocked), tuple(result))
    torch.testing.assert_close(blocked_grads, grads)


@pytest.mark.parametrize("outputs", ["both", "output", "masks"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradcheck(outputs, dropout_p, batch, fixed_seed):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 3, 2, 4), (batch, 5, 2, 4), (batch, 5, 2, 4), (batch, 3, 5)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]

    def call(query, key, value, previous):
        result = fused_atm(query, key, value, previous_masks=previous, dropout_p=dropout_p)
        return {"both": tuple(result), "output": result.output, "masks": result.mask_logits}[outputs]

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("dropped", ["mask gradient", "delta"])
def test_a_planted_bug_turns_the_battery_red(dropped, monkeypatch):
    case = CASES[3]
    inputs, gradients = case.inputs(torch.float32), case.gradients(torch.float32)
    truth, plain = (oracle(case, inputs, gradients, dtype=d)[1] for d in (torch.float64, torch.float32))
    original = atm.bwd_eager

    def wrong(grad_output, grad_masks, query, key, value, output, *rest):
        if dropped == "mask gradient":
            grad_masks = None
        else:
            output = torch.zeros_like(output)
        return original(grad_output, grad_masks, query, key, value, output, *rest)

    monkeypatch.setattr(atm._library._operators["atm_bwd"], "eager", wrong)
    _, grads = run(case, inputs, gradients)
    for name in ("query", "key"):
        with pytest.raises(AssertionError, match="budget"):
            assert_within_budget(name, grads[name], truth[name], plain[name])


def test_meta_tensors():
    query, key = torch.empty(2, 5, 3, 16, device="meta"), torch.empty(2, 9, 3, 16, device="meta")
    output, masks = fused_atm(query, key, key)
    assert output.shape == (2, 5, 3, 16) and masks.shape == (2, 5, 9) and output.is_meta


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_flops(case):
    inputs, gradients = case.inputs(torch.float32), case.gradients(torch.float32)
    product = case.batch * case.heads * case.queries * case.keys * case.head_dim
    with FlopCounterMode(display=False) as counter:
        run(case, inputs, gradients)
    assert counter.get_total_flops() == 2 * (2 + 5) * product


def test_fvcore_counts_the_operator():
    fvcore = pytest.importorskip("fvcore.nn")

    class Layer(torch.nn.Module):
        def forward(self, query, key):
            return fused_atm(query, key, key)

    query, key = torch.randn(2, 5, 3, 16), torch.randn(2, 9, 3, 16)
    analysis = fvcore.FlopCountAnalysis(Layer(), (query, key)).set_op_handle(**fvcore_handles())
    analysis.unsupported_ops_warnings(False)
    assert analysis.total() == 2 * 2 * 5 * 9 * 3 * 16


def test_compile_fullgraph_and_second_size(fixed_seed):
    torch._dynamo.reset()
    frames = Graphs()
    compiled = torch.compile(fused_atm, fullgraph=True, dynamic=True, backend=frames)
    for tokens in (9, 14, 21):
        q, k, v = (torch.randn(2, n, 3, 16, requires_grad=True) for n in (5, tokens, tokens))
        expected = fused_atm(q, k, v)
        actual = compiled(q, k, v)
        torch.testing.assert_close(tuple(actual), tuple(expected))
        grads = [
            torch.autograd.grad([r.output.sum() + r.mask_logits.square().sum()], [q, k, v])
            for r in (actual, expected)
        ]
        torch.testing.assert_close(*grads)
    assert len(frames) == 1


def test_compile_with_one_tensor_twice():
    """Dynamo refuses a Function that gets a tensor twice."""
    torch._dynamo.reset()
    features = torch.randn(2, 9, 3, 16, requires_grad=True)
    compiled = torch.compile(lambda x: fused_atm(x, x, x).output, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(features).sum(), features)
    (expected,) = torch.autograd.grad(fused_atm(features, features, features).output.sum(), features)
    torch.testing.assert_close(actual, expected)


def test_export():
    layer = FusedATM(32, 2).eval()
    query, features = torch.randn(1, 5, 32), torch.randn(2, 40, 32)
    program = torch.export.export(layer, (query, features))
    torch.testing.assert_close(tuple(program.module()(query, features)), tuple(layer(query, features)))
    assert "segvit.atm_fwd" in str(program.graph)


def test_activation_checkpointing_draws_the_same_dropout():
    from torch.utils.checkpoint import checkpoint

    q, k = torch.randn(2, 5, 2, 16, requires_grad=True), torch.randn(2, 9, 2, 16, requires_grad=True)
    grads = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        torch.manual_seed(3)
        output, masks = wrap(lambda q, k: tuple(fused_atm(q, k, k, dropout_p=0.5)), q, k)
        grads.append(torch.autograd.grad((output.square().sum() + masks.sum()), [q, k]))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_autocast_keeps_float32_statistics():
    def transformed(query, **others):
        return torch.func.vmap(lambda q: tuple(fused_atm(q, **others)))(query[None])

    case = dataclasses.replace(CASES[3], previous_masks=False)
    inputs = case.inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, masks = fused_atm(**inputs)
        mapped = transformed(**inputs)
    assert output.dtype == masks.dtype == torch.bfloat16
    rounded = {n: t.bfloat16() for n, t in inputs.items()}
    torch.testing.assert_close((output, masks), tuple(fused_atm(**rounded)), rtol=0, atol=0)
    torch.testing.assert_close(mapped, transformed(**rounded), rtol=0, atol=0)
    truth = atm_reference(**{n: t.bfloat16().double() for n, t in inputs.items()})
    assert relative_error(output, truth.output) < RELATIVE_NORM[torch.bfloat16]


def test_layouts_give_the_same():
    q, k, v = torch.randn(2, 5, 3, 16), torch.randn(2, 9, 3, 16), torch.randn(2, 9, 3, 16)
    expected = fused_atm(q, k, v)
    odd = [t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in (q, k, v)]  # last stride not 1
    assert odd[0].stride(-1) != 1
    torch.testing.assert_close(tuple(fused_atm(*odd)), tuple(expected), rtol=0, atol=0)
    one = fused_atm(q[:1].expand(2, -1, -1, -1), k, v)
    torch.testing.assert_close(tuple(one), tuple(fused_atm(q[:1], k, v)), rtol=0, atol=0)


def test_empty_batch():
    q, k = torch.randn(1, 5, 3, 16, requires_grad=True), torch.randn(0, 9, 3, 16, requires_grad=True)
    output, masks = fused_atm(q, k, k)
    assert output.shape == (0, 5, 3, 16) and masks.shape == (0, 5, 9)
    grads = torch.autograd.grad(output.sum() + masks.sum(), [q, k])
    assert grads[0].shape == q.shape and not grads[0].any()


def test_large_scores_stay_finite():
    q, k = torch.randn(1, 4, 2, 16) * 1e3, torch.randn(1, 9, 2, 16) * 1e3
    result, truth = fused_atm(q, k, k), atm_reference(q.double(), k.double(), k.double())
    torch.testing.assert_close(result.output.double(), truth.output, rtol=1e-4, atol=1e-2)


def test_previous_masks_accumulate():
    q, k = torch.randn(1, 4, 2, 16), torch.randn(1, 9, 2, 16)
    first = fused_atm(q, k, k).mask_logits
    torch.testing.assert_close(fused_atm(q, k, k, previous_masks=first).mask_logits, 2 * first)


class TestDropout:
    def test_philox_known_answers(self):
        """Known answers published with the generator: zeros, all ones, and digits of pi."""
        ones = 0xFFFFFFFF
        cases = [
            ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
            (
                (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
                (0xA4093822, 0x299F31D0),
                (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            ),
        ]
        for counter, key, answer in cases:
            words = philox(
                tuple(map(torch.tensor, key)), tuple(torch.tensor(c, dtype=torch.int64) for c in counter)
            )
            assert tuple(w.item() for w in words) == answer

    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_statistics(self, p):
        keep = keep_mask(SEED, p, range(4), range(8), 8, 50, 99)
        n = keep.numel()
        assert abs(keep.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
        # Neighbours in every direction are independent: correlations are within five standard errors of 0.
        x = (keep.double() - (1 - p)) / (p * (1 - p)) ** 0.5
        for dim in range(4):
            a, b = x.narrow(dim, 0, x.shape[dim] - 1), x.narrow(dim, 1, x.shape[dim] - 1)
            assert abs((a * b).mean().item()) < 5 / a.numel() ** 0.5

    def test_blocks_of_the_mask_agree(self):
        whole = keep_mask(SEED, 0.4, range(3), range(5), 5, 7, 13)
        torch.testing.assert_close(keep_mask(SEED, 0.4, range(1, 2), range(2, 4), 5, 7, 13), whole[1:2, 2:4])

    def test_expectation_is_kept_and_extremes(self):
        assert dropout_threshold(0.999999) == 65535 and dropout_scale(0.0) == 1.0
        q, k, v = torch.randn(1, 4, 2, 16), torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16)
        torch.manual_seed(0)
        mean = torch.stack([fused_atm(q, k, v, dropout_p=0.3).output for _ in range(600)]).mean(0)
        torch.testing.assert_close(mean, fused_atm(q, k, v).output, atol=0.12, rtol=0)

    def test_masks_see_no_dropout_and_seeds_differ(self):
        q, k = torch.randn(1, 4, 2, 16), torch.randn(1, 9, 2, 16)
        a, b = fused_atm(q, k, k, dropout_p=0.5), fused_atm(q, k, k, dropout_p=0.5)
        assert not torch.equal(a.output, b.output)
        torch.testing.assert_close(a.mask_logits, fused_atm(q, k, k).mask_logits, rtol=0, atol=0)


class TestModule:
    def test_matches_multihead_attention(self):
        layer = FusedATM(48, 3)
        theirs = torch.nn.MultiheadAttention(48, 3, batch_first=True)
        with torch.no_grad():
            for linear in (layer.q, layer.k, layer.v, layer.proj):
                torch.nn.init.normal_(linear.weight)
                torch.nn.init.normal_(linear.bias)
            theirs.in_proj_weight.copy_(torch.cat([layer.q.weight, layer.k.weight, layer.v.weight]))
            theirs.in_proj_bias.copy_(torch.cat([layer.q.bias, layer.k.bias, layer.v.bias]))
            theirs.out_proj.load_state_dict(layer.proj.state_dict())
        query, features, value = torch.randn(2, 5, 48), torch.randn(2, 11, 48), torch.randn(2, 11, 48)
        torch.testing.assert_close(
            layer(query, features, value).output, theirs(query, features, value)[0], rtol=1e-4, atol=1e-4
        )

    def test_parameters_and_options(self):
        layer = FusedATM(32, 2, qkv_bias=False)
        assert sorted(layer.state_dict()) == ["k.weight", "proj.bias", "proj.weight", "q.weight", "v.weight"]
        output, masks = layer(torch.randn(1, 3, 32), torch.randn(4, 7, 32), need_masks=False)
        assert output.shape == (4, 3, 32) and masks is None
        dropping = FusedATM(32, 2, attn_drop=0.9, proj_drop=0.9).eval()
        args = torch.randn(1, 3, 32), torch.randn(4, 7, 32)
        assert torch.equal(dropping(*args).output, dropping(*args).output)
        with pytest.raises(ValueError, match="num_heads is 5; expected a divisor of embed_dim 32"):
            FusedATM(32, 5)

    @pytest.mark.parametrize("projected", [False, True])
    def test_gradients_reach_every_parameter(self, projected):
        layer = FusedATM(32, 2)
        query, features = torch.randn(1, 3, 32), torch.randn(4, 7, 32)
        if projected:
            result = layer.attend(layer.q(query), layer.k(features), layer.v(features))
        else:
            result = layer(query, features)
        (result.output.square().sum() + result.mask_logits.square().sum()).backward()
        assert all(p.grad is not None for p in layer.parameters())
