"""query_attention: the battery of every backend, then what is the operator's own."""

import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from attention import (
    BAD_ARGUMENTS,
    SEED,
    check_different_backends,
    check_dropout_bits,
    check_gradients,
    check_refusals,
    check_repeatable,
    check_statistics,
    check_zero_scale,
    gapped,
    score_rounding,
    tensors,
    turned,
)
from backends import (
    BY_ID,
    Graphs,
    Variant,
    assert_same,
    assert_strides_change_nothing,
    assert_threads_change_nothing,
    each_backend,
    each_dtype,
)
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from segvit_kernels import BackendUnavailableError, _native, fvcore_handles
from segvit_kernels.ops import query_attention as module
from segvit_kernels.ops.query_attention import query_attention, query_attention_reference
from segvit_kernels.testing import RELATIVE_NORM, assert_within_budget, relative_error
from segvit_kernels.testing.query_attention import (
    CASES,
    INPUTS,
    SHAPES,
    QueryAttentionCase,
    oracle,
    with_gradients,
)

BY_NAME = {case.name: case for case in CASES}
SMALL = QueryAttentionCase("small", 2, 50, 70, 2, 32)
# Torch's kernel on the CPU, and the blocks that other devices and dropout take.
WITHOUT_TORCH = ("_torch_has_it", lambda *_: False)
BLOCKS = Variant("eager-blocks", "eager", BY_ID["eager"].dtypes, module=module, replaced=WITHOUT_TORCH)

# On both sides of vectors (4, 8, 16), tiles (48 queries, 64 keys), parts of the keys (256) and queries (384).
SIZES = (
    QueryAttentionCase("q1_k1600", 1, 1, 1600, 3, 16),
    QueryAttentionCase("q1600_k1", 1, 1600, 1, 1, 16),
    QueryAttentionCase("q16_k64", 1, 16, 64, 3, 16),
    QueryAttentionCase("q17_k100", 1, 17, 100, 5, 20, dropout_p=0.3),
    QueryAttentionCase("q31_k32", 2, 31, 32, 3, 32),
    QueryAttentionCase("q48_k33", 2, 48, 33, 1, 64, broadcast=True),
    QueryAttentionCase("q49_k257", 1, 49, 257, 1, 16),
    QueryAttentionCase("q100_k64", 2, 100, 64, 1, 32, strided=True),
    QueryAttentionCase("q385_k70", 1, 385, 70, 1, 16, dropout_p=0.1),
    QueryAttentionCase("q150_k600", 1, 150, 600, 1, 24, broadcast=True),
    QueryAttentionCase("dim_1", 1, 9, 5, 2, 1),
    QueryAttentionCase("dim_127", 1, 9, 13, 1, 127),
)


@pytest.fixture
def fixed_seed(monkeypatch):
    """Every call draws the dropout mask of SEED."""
    monkeypatch.setattr(module, "draw_seed", SEED.to)


@pytest.fixture(params=["torch's kernel", "blocks"])
def path(request, monkeypatch):
    """Both CPU implementations: torch's kernel, and the blocks that other devices and dropout take."""
    if request.param == "blocks":
        monkeypatch.setattr(module, "_torch_has_it", lambda *_: False)


def everything(case, inputs, gradient, backend, *, backward=None, scale=None, seed=SEED, deterministic=True):
    """All results of both operators by name; the backward by another backend if ``backward`` is one."""
    tensors, seed = [inputs[name] for name in INPUTS], seed if case.dropout_p else None
    options = (seed, case.head_dim**-0.5 if scale is None else scale, case.dropout_p)
    output, lse = backend.op("query_attention_fwd")(*tensors, *options)
    backwards = (backward or backend).op("query_attention_bwd")
    grads = backwards(gradient, *tensors, output, lse, *options, deterministic)
    named = {f"grad_{name}": grad for name, grad in zip(INPUTS, grads, strict=True)}
    return {"output": output, "lse": lse, **named}


def check(case, dtype, backend, *, deterministic=True):
    """Forward and backward of one case within the error budget; inputs unchanged."""
    inputs, gradient = drawn(case, backend, dtype)
    seed = SEED.to(backend.device)
    truth, true_grads = oracle(case, inputs, gradient, seed=seed)
    plain, plain_grads = oracle(case, inputs, gradient, dtype=dtype, seed=seed)
    given = (*inputs.values(), gradient)
    before = [t.clone() for t in given]

    found = everything(case, inputs, gradient, backend, seed=seed, deterministic=deterministic)
    assert found["output"].dtype == dtype and found["output"].is_contiguous()
    assert_within_budget("output", found["output"], truth, plain)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6 if backend.name == "eager" else 1e-5
    # In bfloat16 processors with AVX512-FP16 add up in float16, but for those with AMX.
    chains = backend.name == "cpu" and dtype == torch.bfloat16 and _native.runs_isa("avx512_fp16")
    slack = score_rounding(inputs, case.head_dim**-0.5) if chains and not _native.runs_isa("amx") else 0
    check_statistics(found["lse"], inputs, case.head_dim**-0.5, tolerance, slack)
    one_key = 128 * case.queries**0.5 if case.keys == 1 else None
    check_gradients(found, true_grads, plain_grads, dtype, one_key)
    assert all(map(torch.equal, before, given))


def drawn(case, backend, dtype=torch.float32):
    return case.inputs(dtype, backend.device), case.gradient(dtype, backend.device)


@each_dtype(also=(BLOCKS,))
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


@each_backend("cpu", "cuda-gpu")
@pytest.mark.parametrize("case", SIZES, ids=lambda c: c.name)
def test_sizes_in_bfloat16(case, backend, poisoned):
    """On AMX too: on both sides of its tiles (16, 32) and of the keys that go together (256)."""
    check(case, torch.bfloat16, backend)


@each_backend("cpu")
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_scales_in_bfloat16(scale, backend, poisoned):
    """Any factor of the scores; with 2 they are large enough that most weights vanish."""
    inputs = SMALL.inputs(torch.bfloat16)
    found = query_attention(**inputs, scale=scale, backend=backend.name)
    truth = query_attention_reference(**{n: t.double() for n, t in inputs.items()}, scale=scale)
    plain = query_attention_reference(**inputs, scale=scale)
    assert_within_budget("output", found, truth, plain)


@each_backend("cpu")
@pytest.mark.parametrize("powers", [(-60, 60, 0), (60, -60, 100), (0, 0, -100)])
def test_magnitudes_in_bfloat16(powers, backend, poisoned):
    """Powers of two change nothing but the exponents of results."""
    inputs = SMALL.inputs(torch.bfloat16)
    expected = query_attention(**inputs, backend=backend.name)
    scaled = {name: inputs[name] * 2.0**power for name, power in zip(INPUTS, powers, strict=True)}
    assert torch.equal(query_attention(**scaled, backend=backend.name), expected * 2.0 ** powers[2])


@each_backend("cpu")
def test_tokens_of_every_magnitude_in_bfloat16(backend, poisoned):
    """A few keys, values and queries far larger than the others leave these as exact as they were."""
    inputs = SMALL.inputs(torch.bfloat16)
    inputs["value"][:, 5] *= 256
    inputs["key"][:, 9], inputs["query"][:, ::7] = inputs["key"][:, 9] * 16, inputs["query"][:, ::7] / 512
    found = query_attention(**inputs, backend=backend.name)
    truth = query_attention_reference(**{n: t.double() for n, t in inputs.items()})
    plain = query_attention_reference(**inputs)
    for rows in (slice(None, None, 7), slice(1, None, 7)):
        assert_within_budget("output", *(t[:, rows] for t in (found, truth, plain)))


@each_backend("cpu")
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_in_bfloat16(name, value, backend, poisoned):
    """Is in the results where the formula has it, and nowhere else."""
    inputs = dataclasses.replace(SMALL, keys=300).inputs(torch.bfloat16)
    inputs[name][1, 7, 1, 3] = value
    found = query_attention(**inputs, backend=backend.name)
    truth = query_attention_reference(**{n: t.double() for n, t in inputs.items()})
    assert torch.equal(found.isnan(), truth.isnan()) and torch.equal(found.isinf(), truth.isinf())


@each_backend("cpu")
@pytest.mark.parametrize("score", [-math.inf, -3e4])
def test_what_weighs_nothing(score, backend):
    """Adds nothing where it is finite, and a query that weighs nothing at all has no result."""
    query, value = torch.rand(1, 3, 1, 8) + 0.1, torch.randn(1, 20, 1, 8)
    key = torch.rand(1, 20, 1, 8) + 0.1
    key[0, 3, 0, 0], value[0, 3] = score, 3e38
    given = {"query": query, "key": key, "value": value}
    found = query_attention(**given, backend=backend.name)
    truth = query_attention_reference(**{n: t.double() for n, t in given.items()})
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)
    query[0, 1, 0, 0] = score * math.inf
    found = query_attention(query, query, query, backend=backend.name)
    truth = query_attention_reference(*(query.double(),) * 3)
    assert torch.equal(found.isnan(), truth.isnan()) and found[0, 1].isnan().all()


@each_backend()
def test_scale_zero_keeps_what_is_not_a_number(backend):
    check_zero_scale(query_attention, backend)


def dropout_bits(keys, backend):
    def forward(*arguments):
        *tensors, seed, p = arguments
        return backend.op("query_attention_fwd")(*tensors, seed, 1.0, p)[0]

    check_dropout_bits(keys, forward, backend.device)


@each_backend()
def test_dropout_bits_are_the_same(backend, poisoned):
    for keys in (30,) if backend.name == "triton" else (30, 300):
        dropout_bits(keys, backend)


@each_backend(also=(BLOCKS,))
@pytest.mark.parametrize("scale", [4.0, -0.5, 0.0])
def test_any_scale(scale, backend, poisoned):
    """Large logits do not overflow; a negative or zero scale is taken at its word."""
    inputs, gradient = drawn(SMALL, backend)
    truth, true_grads = oracle(SMALL, inputs, gradient, scale=scale)
    found = everything(SMALL, inputs, gradient, backend, scale=scale)
    check_statistics(found["lse"], inputs, scale, 1e-5)
    assert relative_error(found["output"], truth) < 1e-5
    for name in INPUTS:
        assert relative_error(found[f"grad_{name}"], true_grads[name]) < 2e-5, name


@each_dtype(also=(BLOCKS,))
def test_strides(backend, dtype, poisoned):
    """Heads before tokens, the gradient of a sum, queries expanded over the batch, rows with a gap."""
    plain, gradient = drawn(SMALL, backend, dtype)
    plain["query"] = plain["query"][:1].expand(2, -1, -1, -1).contiguous()

    odd = {
        "query": plain["query"][:1].expand(2, -1, -1, -1),
        "key": turned(plain["key"]),
        "value": gapped(plain["value"]),
    }
    for odd_gradient in (
        gradient[:, :, :1, :1].expand_as(gradient),
        gradient[:1, :1, :1, :1].expand_as(gradient),
        turned(gradient),
        gapped(gradient),
    ):
        expected = everything(SMALL, plain, odd_gradient.contiguous(), backend)
        assert_strides_change_nothing(backend, everything(SMALL, odd, odd_gradient, backend), expected)


@each_backend("eager", "cpu", "cuda", also=(BLOCKS,))
def test_a_query_does_not_depend_on_the_others(backend, poisoned):
    """Fewer of them, other panels: the same numbers but for the order of sums over keys, which is one."""
    case = QueryAttentionCase("many", 1, 130, 70, 2, 32)
    inputs, gradient = drawn(case, backend)
    every = everything(case, inputs, gradient, backend)
    for first, last in ((0, 1), (40, 60), (99, 130)):
        some = {**inputs, "query": inputs["query"][:, first:last]}
        found = everything(case, some, gradient[:, first:last], backend)
        for name in ("output", "grad_query"):
            torch.testing.assert_close(found[name], every[name][:, first:last])


@each_backend(also=(BLOCKS,))
@pytest.mark.parametrize("broadcast", [False, True], ids=["", "broadcast"])
def test_repeatable(broadcast, backend, poisoned):
    case = dataclasses.replace(SMALL, heads=1, broadcast=broadcast, dropout_p=0.1)
    inputs, gradient = drawn(case, backend)
    seed = SEED.to(backend.device)
    check_repeatable(lambda: everything(case, inputs, gradient, backend, seed=seed))


@each_backend("cpu", "cuda")
@pytest.mark.parametrize("broadcast", [False, True], ids=["", "broadcast"])
def test_threads_change_nothing(broadcast, backend, poisoned):
    case = QueryAttentionCase("threads", 2, 100, 300, 2, 16, broadcast=broadcast)
    inputs, gradient = drawn(case, backend)
    assert_threads_change_nothing(lambda: everything(case, inputs, gradient, backend))


@each_backend(also=(BLOCKS,))
def test_no_images(backend, poisoned):
    case = QueryAttentionCase("empty", 0, 5, 9, 2, 16)
    for query_batch in (1, 0):
        query, key = (torch.randn(b, n, 2, 16, device=backend.device) for b, n in ((query_batch, 5), (0, 9)))
        inputs = {"query": query, "key": key, "value": key}
        found = everything(case, inputs, drawn(case, backend)[1], backend)
        assert (found["output"].shape, found["lse"].shape) == ((0, 5, 2, 16), (0, 2, 5))
        assert torch.equal(found["grad_query"], torch.zeros_like(query))
        assert found["grad_key"].shape == found["grad_value"].shape == key.shape


@each_backend("triton", "cpu", "cuda")
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_forward_and_backward_by_different_backends(dropout_p, backend, poisoned):
    case = dataclasses.replace(SMALL, dropout_p=dropout_p)
    inputs, gradient = drawn(case, backend)
    _, truth = oracle(case, inputs, gradient, seed=SEED)
    check_different_backends(functools.partial(everything, case, inputs, gradient), backend, truth)


@each_dtype(dtypes=(torch.float32, torch.bfloat16))
def test_through_the_public_function(backend, dtype, fixed_seed, poisoned):
    case = dataclasses.replace(SMALL, heads=1, dropout_p=0.1)
    inputs, gradient = drawn(case, backend, dtype)
    output, grads = with_gradients(
        query_attention, inputs, gradient, dropout_p=case.dropout_p, backend=backend.name, deterministic=True
    )
    expected = everything(case, inputs, gradient, backend, seed=SEED.to(backend.device))
    assert torch.equal(output, expected["output"])
    assert_same(grads, {name: expected[f"grad_{name}"] for name in INPUTS})


@each_backend("triton", "cpu", "cuda")
def test_what_is_refused_when_asked_for_and_left_to_eager_otherwise(backend, monkeypatch):
    monkeypatch.delenv("SEGVIT_KERNELS_BACKEND", raising=False)
    wide = QueryAttentionCase("wide", 1, 3, 5, 1, 136).inputs(torch.float32)
    check_refusals(query_attention, backend, SMALL.inputs(torch.float64), wide)
    leaves = {name: t.requires_grad_() for name, t in wide.items()}
    query_attention(**leaves).sum().backward()
    assert leaves["key"].grad.isfinite().all()


def opcheck(case, backend, utils):
    inputs, gradient = drawn(case, backend)
    options, ops = {"backend": backend.name}, torch.ops.segvit
    tensors, rest = [inputs[n] for n in INPUTS], (SEED if case.dropout_p else None, 0.2, case.dropout_p)
    forward = (*tensors, *rest)
    torch.library.opcheck(ops.query_attention_fwd.default, forward, options, test_utils=utils)
    output, lse = ops.query_attention_fwd(*forward, **options)
    backward = (gradient, *tensors, output, lse, *rest, True)
    torch.library.opcheck(ops.query_attention_bwd.default, backward, options, test_utils=utils)


@each_backend("eager", "cpu", "cuda")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_opcheck(case, backend):
    opcheck(case, backend, ("test_schema", "test_faketensor"))


@each_backend("eager")
@pytest.mark.parametrize("blocks", [False, True], ids=["torch's kernel", "blocks"])
@pytest.mark.parametrize("case", ["odd", "strided", "dropout_broadcast"])
def test_opcheck_of_a_compiled_graph(case, blocks, backend, monkeypatch):
    if blocks:
        monkeypatch.setattr(module, "_torch_has_it", lambda *_: False)
    opcheck(BY_NAME[case], backend, ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


# What no backend changes.


def run(case, inputs, gradient, **options):
    return with_gradients(query_attention, inputs, gradient, dropout_p=case.dropout_p, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precisions_lose_only_the_last_rounding(dtype, path):
    """Random rounding errs by about 0.21 of the machine epsilon; products in half precision by twice that."""
    case = QueryAttentionCase("", 1, 60, 1200, 2, 32)
    inputs, gradient = case.inputs(dtype), case.gradient(dtype)
    output, grads = run(case, inputs, gradient)
    truth, truth_grads = oracle(case, inputs, gradient)
    for actual, expected in ((output, truth), *((grads[n], truth_grads[n]) for n in INPUTS)):
        assert relative_error(actual, expected) < 0.25 * torch.finfo(dtype).eps


def test_the_same_as_torch(poisoned):
    """Against scaled_dot_product_attention in float64, which shares no line with the reference."""
    case = QueryAttentionCase("", 2, 23, 40, 3, 32)
    inputs, gradient = case.inputs(torch.float64), case.gradient(torch.float64)

    def sdpa(query, key, value):
        heads_first = (t.transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    expected, expected_grads = with_gradients(sdpa, inputs, gradient)
    for function in (query_attention, query_attention_reference):
        output, grads = with_gradients(function, inputs, gradient)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradcheck(dropout_p, batch, path, fixed_seed):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 5, 2, 4), (batch, 4, 2, 4), (batch, 4, 2, 4)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *x: query_attention(*x, dropout_p=dropout_p), inputs)


@pytest.mark.parametrize("batch", [1, 2])
def test_gradcheck_of_the_reference(batch):
    shapes = [(1, 3, 2, 4), (batch, 4, 2, 4), (batch, 4, 2, 4)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def both(*x):
        return query_attention_reference(*x, dropout_p=0.3, seed=SEED), query_attention_reference(*x, scale=2)

    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("wrong", ["delta", "scale", "statistics"])
def test_a_planted_bug_turns_the_battery_red(wrong, monkeypatch):
    case = BY_NAME["odd"]
    inputs, gradient = case.inputs(torch.float32), case.gradient(torch.float32)
    truth, plain = (oracle(case, inputs, gradient, dtype=d)[1] for d in (torch.float64, torch.float32))
    original = module._bwd_eager

    def planted(grad_output, query, key, value, output, lse, seed, scale, *rest):
        output = torch.zeros_like(output) if wrong == "delta" else output
        lse = lse * 1.001 if wrong == "statistics" else lse
        scale = 1.001 * scale if wrong == "scale" else scale
        return original(grad_output, query, key, value, output, lse, seed, scale, *rest)

    monkeypatch.setattr(module._library._operators["query_attention_bwd"], "eager", planted)
    _, grads = run(case, inputs, gradient)
    for name in ("query", "key"):
        with pytest.raises(AssertionError, match="budget"):
            assert_within_budget(name, grads[name], truth[name], plain[name])


def test_meta_tensors():
    query, key = torch.empty(1, 5, 3, 16, device="meta"), torch.empty(2, 9, 3, 16, device="meta")
    output = query_attention(query, key, key, dropout_p=0.1)
    assert output.shape == (2, 5, 3, 16) and output.is_meta


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_flops(case):
    inputs, gradient = case.inputs(torch.float32), case.gradient(torch.float32)
    product = case.batch * case.heads * case.queries * case.keys * case.head_dim
    with FlopCounterMode(display=False) as counter:
        run(case, inputs, gradient)
    assert counter.get_total_flops() == 2 * (2 + 5) * product


def test_fvcore_counts_the_operator():
    fvcore = pytest.importorskip("fvcore.nn")

    class Layer(torch.nn.Module):
        def forward(self, query, key):
            return query_attention(query, key, key)

    query, key = torch.randn(1, 5, 3, 16), torch.randn(2, 9, 3, 16)
    analysis = fvcore.FlopCountAnalysis(Layer(), (query, key)).set_op_handle(**fvcore_handles())
    analysis.unsupported_ops_warnings(False)
    assert analysis.total() == 2 * 2 * 5 * 9 * 3 * 16


def test_compile_fullgraph_and_second_size():
    torch._dynamo.reset()
    frames = Graphs()
    compiled = torch.compile(query_attention, fullgraph=True, dynamic=True, backend=frames)
    for queries, keys in ((9, 14), (21, 15), (33, 40)):
        leaves = [torch.randn(2, n, 3, 16, requires_grad=True) for n in (queries, keys, keys)]
        actual, expected = compiled(*leaves), query_attention(*leaves)
        torch.testing.assert_close(actual, expected)
        grads = [torch.autograd.grad(r.square().sum(), leaves) for r in (actual, expected)]
        torch.testing.assert_close(*grads)
    assert len(frames) == 1


def test_compile_with_one_tensor_for_all_inputs():
    """Dynamo refuses a Function that gets a tensor twice."""
    torch._dynamo.reset()
    x = torch.randn(2, 5, 2, 16, requires_grad=True)
    compiled = torch.compile(lambda x: query_attention(x, x, x), fullgraph=True, backend="aot_eager")
    actual, expected = (
        torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, lambda x: query_attention(x, x, x))
    )
    torch.testing.assert_close(actual, expected)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, query, key):
            return query_attention(query, key, key)

    args = torch.randn(1, 5, 2, 16), torch.randn(2, 9, 2, 16)
    program = torch.export.export(Layer(), args)
    torch.testing.assert_close(program.module()(*args), Layer()(*args))
    assert "segvit.query_attention_fwd" in str(program.graph)


def test_activation_checkpointing_draws_the_same_dropout():
    leaves = [torch.randn(2, n, 2, 16, requires_grad=True) for n in (5, 9)]
    grads = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        torch.manual_seed(3)
        output = wrap(lambda q, k: query_attention(q, k, k, dropout_p=0.5), *leaves)
        grads.append(torch.autograd.grad(output.square().sum(), leaves))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_autocast_keeps_float32_statistics(path):
    def transformed(query, **others):
        return torch.func.vmap(lambda q: query_attention(q, **others))(query[None])

    inputs = BY_NAME["odd"].inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, mapped = query_attention(**inputs), transformed(**inputs)
    rounded = {n: t.bfloat16() for n, t in inputs.items()}
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, query_attention(**rounded), rtol=0, atol=0)
    torch.testing.assert_close(mapped, transformed(**rounded), rtol=0, atol=0)
    truth = query_attention_reference(**{n: t.double() for n, t in rounded.items()})
    assert relative_error(output, truth) < RELATIVE_NORM[torch.bfloat16]


@pytest.mark.parametrize(
    ("argument", "globally"), [(True, False), (False, True), (None, True), (None, False)]
)
def test_deterministic_reaches_the_backward(argument, globally, monkeypatch):
    operator = module._library._operators["query_attention_bwd"]
    original, asked = operator.eager, []
    monkeypatch.setattr(operator, "eager", lambda *args: asked.append(args[-2]) or original(*args))
    case = BY_NAME["odd"]
    torch.use_deterministic_algorithms(globally)
    try:
        run(case, case.inputs(torch.float32), case.gradient(torch.float32), deterministic=argument)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [globally if argument is None else argument]


def test_layouts_give_the_same(path):
    """Torch's CPU kernel takes any last stride for 1; neither function nor operator may let one in."""
    shapes = [(2, 5, 3, 16), (2, 9, 3, 16), (2, 9, 3, 16)]
    q, k, v = tensors = [torch.randn(*shape) for shape in shapes]
    odd = [t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in tensors]
    assert odd[0].stride(-1) != 1
    expected = query_attention(*tensors)
    torch.testing.assert_close(query_attention(*odd), expected, rtol=0, atol=0)
    options = (None, 0.25, 0.0)
    (output, lse), (odd_output, _) = (
        torch.ops.segvit.query_attention_fwd(*t, *options) for t in (tensors, odd)
    )
    torch.testing.assert_close(odd_output, output, rtol=0, atol=0)
    grad = torch.ones(1).expand_as(output)  # of a sum: stride 0 everywhere
    grads, odd_grads = (
        torch.ops.segvit.query_attention_bwd(g, *t, output, lse, *options, True)
        for g, t in ((grad.contiguous(), tensors), (grad, odd))
    )
    torch.testing.assert_close(odd_grads, grads, rtol=0, atol=0)
    one = query_attention(q[:1].expand(2, -1, -1, -1), k, v)
    torch.testing.assert_close(one, query_attention(q[:1], k, v), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_queries_get_the_sum_of_the_gradients(dtype, path):
    case = QueryAttentionCase("", 4, 13, 21, 2, 16)
    inputs, gradient = case.inputs(dtype), case.gradient(dtype)
    inputs["query"] = inputs["query"][:1]
    output, grads = run(case, inputs, gradient)
    each_output, each = run(case, {**inputs, "query": inputs["query"].repeat(4, 1, 1, 1)}, gradient)
    torch.testing.assert_close(output, each_output, rtol=0, atol=0)
    assert grads["query"].shape == (1, 13, 2, 16)
    total = each["query"].double().sum(0, keepdim=True)
    assert relative_error(grads["query"], total) < RELATIVE_NORM[dtype]


def test_empty_batch(path):
    q, k = torch.randn(1, 5, 3, 16, requires_grad=True), torch.randn(0, 9, 3, 16, requires_grad=True)
    output = query_attention(q, k, k)
    assert output.shape == (0, 5, 3, 16)
    grads = torch.autograd.grad(output.sum(), [q, k])
    assert grads[0].shape == q.shape and not grads[0].any() and grads[1].shape == k.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_scores_stay_finite(dtype, path):
    q, k = (100 * torch.randn(1, n, 2, 16) for n in (4, 9))
    output = query_attention(q.to(dtype), k.to(dtype), k.to(dtype))
    truth = query_attention_reference(q.to(dtype).double(), *(k.to(dtype).double(),) * 2)
    torch.testing.assert_close(output.double(), truth, rtol=2e-3, atol=2e-1)


def test_dropout_keeps_the_right_share_and_differs_between_calls():
    query, ones = torch.zeros(1, 64, 2, 16), torch.ones(1, 512, 2, 16)
    torch.manual_seed(0)
    first, second = (query_attention(query, ones, ones, dropout_p=0.25) for _ in range(2))
    assert not torch.equal(first, second)
    deviation = ((1 / 0.75 - 1) / 512) ** 0.5  # of a row, the mean of 512 weights that are 0 or 4/3
    rows = first[..., 0].flatten()
    assert abs(rows.mean() - 1) < 5 * deviation / rows.numel() ** 0.5
    assert 0.7 * deviation < rows.std() < 1.3 * deviation


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        query_attention(**tensors(**changes))


@pytest.mark.parametrize("names", [("query",), ("key", "value"), ("gradient",)], ids=str)
def test_rows_that_overlap(names):
    """Tensors expanded along the tokens, which torch's CPU kernel misreads."""
    torch.manual_seed(0)
    tensors = {n: torch.randn(2, 40, 2, 24) for n in ("query", "key", "value", "gradient")}
    for name in names:
        tensors[name] = tensors[name][:, :1].expand(-1, 40, -1, -1)
    *inputs, gradient = tensors.values()

    def evaluate(function, cast):
        leaves = [cast(t).detach().requires_grad_() for t in inputs]
        output = function(*leaves)
        return output, *torch.autograd.grad(output, leaves, cast(gradient))

    found = evaluate(lambda *x: query_attention(*x, backend="eager"), lambda t: t)
    truth = evaluate(query_attention_reference, lambda t: t.double().contiguous())
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_a_backend_that_is_not_there(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET=1"):
        query_attention(**tensors(), backend="triton")
