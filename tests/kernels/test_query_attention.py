"""The standard battery of query_attention, eager (the kernels: test_query_attention_triton.py)."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from segvit_kernels import BackendUnavailableError, fvcore_handles
from segvit_kernels.ops import query_attention as module
from segvit_kernels.ops.query_attention import query_attention, query_attention_reference
from segvit_kernels.testing import RELATIVE_NORM, assert_within_budget, relative_error
from segvit_kernels.testing.query_attention import CASES, INPUTS, QueryAttentionCase, oracle, with_gradients

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SEED = torch.tensor([0x123456789ABCDEF], dtype=torch.int64)
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def fixed_seed(monkeypatch):
    """Every call draws the dropout mask of SEED."""
    monkeypatch.setattr(module, "draw_seed", SEED.to)


@pytest.fixture(params=["torch's kernel", "blocks"])
def path(request, monkeypatch):
    """Both CPU implementations: torch's kernel, and the blocks that other devices and dropout take."""
    if request.param == "blocks":
        monkeypatch.setattr(module, "_torch_has_it", lambda *_: False)


def run(case, inputs, gradient, **options):
    return with_gradients(query_attention, inputs, gradient, dropout_p=case.dropout_p, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_values_and_gradients(case, dtype, path, fixed_seed, poisoned):
    inputs, gradient = case.inputs(dtype), case.gradient(dtype)
    output, grads = run(case, inputs, gradient)
    truth, truth_grads = oracle(case, inputs, gradient, seed=SEED)
    plain, plain_grads = oracle(case, inputs, gradient, dtype=dtype, seed=SEED)
    assert_within_budget("output", output, truth, plain)
    for name in INPUTS:
        assert grads[name].dtype == dtype
        if case.keys == 1 and name != "value":
            # Softmax over one key: dP and δ cancel, and what is left is their rounding.
            assert grads[name].abs().max() <= 64 * torch.finfo(dtype).eps
            continue
        assert_within_budget(f"gradient of {name}", grads[name], truth_grads[name], plain_grads[name])


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


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_opcheck(case, path):
    inputs, gradient = case.inputs(torch.float32), case.gradient(torch.float32)
    tensors, seed = tuple(inputs[n] for n in INPUTS), SEED if case.dropout_p else None
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    forward = (*tensors, seed, 0.2, case.dropout_p)
    torch.library.opcheck(torch.ops.segvit.query_attention_fwd.default, forward, test_utils=utils)
    output, lse = torch.ops.segvit.query_attention_fwd(*forward)
    backward = (gradient, *tensors, output, lse, seed, 0.2, case.dropout_p, True)
    torch.library.opcheck(torch.ops.segvit.query_attention_bwd.default, backward, test_utils=utils)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_kept_for_the_backward(dtype, path):
    case = BY_NAME["odd"]
    inputs = case.inputs(dtype)
    output, lse = torch.ops.segvit.query_attention_fwd(*inputs.values(), None, 0.2, 0.0)
    query, key = (inputs[n].double() for n in ("query", "key"))
    expected = (0.2 * query.transpose(1, 2) @ key.permute(0, 2, 3, 1)).logsumexp(-1)
    assert output.dtype == dtype and output.is_contiguous() and lse.is_contiguous()
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(lse.double(), expected, rtol=tolerance, atol=tolerance)


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
    frames = []

    def backend(graph, examples):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(query_attention, fullgraph=True, dynamic=True, backend=backend)
    for queries, keys in ((9, 14), (21, 15), (33, 40)):
        leaves = [torch.randn(2, n, 3, 16, requires_grad=True) for n in (queries, keys, keys)]
        actual, expected = compiled(*leaves), query_attention(*leaves)
        torch.testing.assert_close(actual, expected)
        grads = [torch.autograd.grad(r.square().sum(), leaves) for r in (actual, expected)]
        torch.testing.assert_close(*grads)
    assert len(frames) == 1


def test_compile_with_inductor_and_dropout():
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: query_attention(q, k, k, dropout_p=0.5), fullgraph=True)
    query, key = torch.randn(1, 5, 2, 16, requires_grad=True), torch.randn(2, 9, 2, 16)
    first, second = compiled(query, key), compiled(query, key)
    assert first.shape == (2, 5, 2, 16) and not torch.equal(first, second)
    first.sum().backward()
    assert query.grad.norm() > 0


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
    inputs = BY_NAME["odd"].inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = query_attention(**inputs)
    rounded = {n: t.bfloat16() for n, t in inputs.items()}
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, query_attention(**rounded), rtol=0, atol=0)
    truth = query_attention_reference(**{n: t.double() for n, t in rounded.items()})
    assert relative_error(output, truth) < RELATIVE_NORM[torch.bfloat16]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_inputs_are_not_changed_and_results_repeat(case, path):
    inputs, gradient = case.inputs(torch.float32), case.gradient(torch.float32)
    before, runs = {n: t.clone() for n, t in inputs.items()}, []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(run(case, inputs, gradient, deterministic=True))
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


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


@pytest.mark.parametrize("scale", [-0.5, 0.0, 4.0])
def test_any_scale(scale, path):
    case = dataclasses.replace(BY_NAME["odd"], queries=9)
    inputs, gradient = case.inputs(torch.float32), case.gradient(torch.float32)
    output, grads = run(case, inputs, gradient, scale=scale)
    truth, truth_grads = oracle(case, inputs, gradient, scale=scale)
    plain, plain_grads = oracle(case, inputs, gradient, scale=scale, dtype=torch.float32)
    # Scores of order 100 leave fewer digits behind the point in S and in its log-sum-exp alike.
    for actual, expected, ordinary in (
        (output, truth, plain),
        *((grads[n], truth_grads[n], plain_grads[n]) for n in INPUTS),
    ):
        assert relative_error(actual, expected) <= 1e-5 + 4 * relative_error(ordinary, expected)


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


def tensors(dtype=torch.float32, **changes):
    shapes = {"query": (2, 5, 3, 16), "key": (2, 9, 3, 16), "value": (2, 9, 3, 16)}
    return {n: torch.randn(s).to(dtype) for n, s in shapes.items()} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.randn(2, 5, 48)}, ValueError, r"query has shape \(2, 5, 48\); expected"),
        ({"key": torch.randn(2, 9, 3, 8)}, ValueError, r"key has .* expected \(2, 9, 3, 16\)"),
        ({"value": torch.randn(2, 8, 3, 16)}, ValueError, r"value has shape .* expected \(2, 9, 3, 16\)"),
        ({"query": torch.randn(3, 5, 3, 16)}, ValueError, "expected batch 2, the batch of key, or 1"),
        ({"query": torch.randn(2, 0, 3, 16)}, ValueError, "at least one token"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
        ({"backend": "cudnn"}, ValueError, "argument 'backend' is 'cudnn'; expected one of eager, triton"),
        ({"query": torch.ones(2, 5, 3, 16, dtype=torch.int32)}, TypeError, "query has dtype torch.int32"),
        ({"value": torch.randn(2, 9, 3, 16).half()}, TypeError, "value has dtype torch.float16"),
        ({"key": torch.empty(2, 9, 3, 16, device="meta")}, ValueError, "key is on meta; expected cpu"),
        ({"key": [1, 2]}, TypeError, "key is a list; expected a tensor"),
    ],
)  # fmt: skip
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        query_attention(**tensors(**changes))


def test_refusals_of_a_backend(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wide = {n: torch.randn(1, 3, 1, 160, requires_grad=True) for n in INPUTS}
    with pytest.raises(ValueError, match=r"head dims up to 128; query has shape .* head dim 160"):
        query_attention(**wide, backend="triton")
    with pytest.raises(TypeError, match=r"query is torch\.float64"):
        query_attention(**tensors(torch.float64), backend="triton")
    query_attention(**wide).sum().backward()
    assert wide["key"].grad.isfinite().all()
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET=1"):
        query_attention(**tensors(), backend="triton")


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
