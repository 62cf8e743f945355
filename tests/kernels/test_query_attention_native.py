"""Query attention by the native library against float64: C++ for CPUs, CUDA kernels emulated."""

import dataclasses
import math

import pytest
import torch

from segvit_kernels import _library, query_attention, query_attention_reference, testing
from segvit_kernels.ops import query_attention as module
from segvit_kernels.ops._philox import keep_mask
from segvit_kernels.testing.query_attention import (
    CASES,
    INPUTS,
    SHAPES,
    QueryAttentionCase,
    oracle,
    with_gradients,
)

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
SEED = torch.tensor([0x1234_5678_9ABC_DEF0])
SMALL = QueryAttentionCase("small", 2, 50, 70, 2, 32)

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


def _everything(case, inputs, gradient, backend, *, backward=None, scale=None, seed=SEED):
    """All results of both operators by name; the backward by another backend if ``backward`` names one."""
    tensors, ops = [inputs[name] for name in INPUTS], torch.ops.segvit
    scale, seed = case.head_dim**-0.5 if scale is None else scale, seed if case.dropout_p else None
    options = (seed, scale, case.dropout_p)
    output, lse = ops.query_attention_fwd(*tensors, *options, backend=backend)
    grads = ops.query_attention_bwd(
        gradient, *tensors, output, lse, *options, True, backend=backward or backend
    )
    named = {f"grad_{name}": grad for name, grad in zip(INPUTS, grads, strict=True)}
    return {"output": output, "lse": lse, **named}


def _same(found, expected):
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def _lse(inputs, scale):
    query, key = inputs["query"].double().transpose(1, 2), inputs["key"].double().permute(0, 2, 3, 1)
    return (query @ key * scale).logsumexp(-1)


def _check(case, dtype, backend, *, device="cpu"):
    """Forward and backward of one case within the error budget; inputs unchanged."""
    inputs, gradient, seed = case.inputs(dtype, device), case.gradient(dtype, device), SEED.to(device)
    truth, true_grads = oracle(case, inputs, gradient, seed=seed)
    plain, plain_grads = oracle(case, inputs, gradient, dtype=dtype, seed=seed)
    given = (*inputs.values(), gradient)
    before = [t.clone() for t in given]

    found = _everything(case, inputs, gradient, backend, seed=seed)
    assert found["output"].dtype == dtype and found["output"].is_contiguous()
    testing.assert_within_budget("output", found["output"], truth, plain)
    assert found["lse"].dtype == torch.float32
    expected = _lse(inputs, case.head_dim**-0.5)
    torch.testing.assert_close(found["lse"].double(), expected, rtol=1e-5, atol=1e-5)
    for name in INPUTS:
        grad = found[f"grad_{name}"]
        assert grad.dtype == dtype and grad.is_contiguous()
        if case.keys == 1 and name != "value":
            # Softmax over one key: dP and δ cancel, and what is left is their rounding.
            error = (grad.double() - true_grads[name]).abs().max()
            assert error <= 128 * case.queries**0.5 * torch.finfo(dtype).eps, f"{name}: {error:.3g}"
            continue
        testing.assert_within_budget(f"gradient of {name}", grad, true_grads[name], plain_grads[name])
    assert all(map(torch.equal, before, given))


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case, dtype, native_backend, poisoned):
    _check(case, dtype, native_backend)


@pytest.mark.parametrize("case", SIZES, ids=lambda c: c.name)
def test_sizes(case, native_backend, poisoned):
    _check(case, torch.float16 if case.heads == 3 else torch.float32, native_backend)


@pytest.mark.parametrize("case", SIZES, ids=lambda c: c.name)
def test_sizes_in_bfloat16(case, poisoned):
    """On AMX too: on both sides of its tiles (16, 32) and of the keys that go together (256)."""
    if reason := _library.why_not("cpu", "cpu"):
        pytest.skip(f"backend cpu: {reason}")
    _check(case, torch.bfloat16, "cpu")


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_scales_in_bfloat16(scale, poisoned):
    """Any factor of the scores; with 2 they are large enough that most weights vanish."""
    if reason := _library.why_not("cpu", "cpu"):
        pytest.skip(f"backend cpu: {reason}")
    inputs = SMALL.inputs(torch.bfloat16)
    found = query_attention(**inputs, scale=scale, backend="cpu")
    truth = query_attention_reference(**{n: t.double() for n, t in inputs.items()}, scale=scale)
    plain = query_attention_reference(**inputs, scale=scale)
    testing.assert_within_budget("output", found, truth, plain)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_in_bfloat16(name, value, poisoned):
    """Is in the results where the formula has it, and nowhere else."""
    if reason := _library.why_not("cpu", "cpu"):
        pytest.skip(f"backend cpu: {reason}")
    inputs = dataclasses.replace(SMALL, keys=300).inputs(torch.bfloat16)
    inputs[name][1, 7, 1, 3] = value
    found = query_attention(**inputs, backend="cpu")
    truth = query_attention_reference(**{n: t.double() for n, t in inputs.items()})
    assert torch.equal(found.isnan(), truth.isnan()) and torch.equal(found.isinf(), truth.isinf())


@pytest.mark.parametrize("keys", [30, 300])
def test_dropout_bits_are_those_of_the_eager_operator(keys, native_backend, poisoned):
    """With zero queries and one-hot values every weight can be read off the output."""
    batch, queries, heads, p = 2, 19, 3, 0.4
    query = torch.zeros(batch, queries, heads, 32)
    key, seed = torch.randn(batch, keys, heads, 32), torch.tensor([-(2**62) - 12345])
    expected = keep_mask(seed, p, range(batch), range(heads), heads, queries, keys)
    factor = 65536 / (65536 - round(p * 65536)) / keys

    def weights(seed, first):
        one_hot = torch.eye(keys)[:, first : first + 32]
        one_hot = torch.nn.functional.pad(one_hot, (0, 32 - one_hot.shape[1]))
        value = one_hot[None, :, None].expand(batch, keys, heads, 32)
        output, _ = torch.ops.segvit.query_attention_fwd(
            query, key, value, seed, 1.0, p, backend=native_backend
        )
        return output.transpose(1, 2)[..., : min(32, keys - first)]

    for first in range(0, keys, 32):
        found, kept = weights(seed, first), expected[..., first : first + 32]
        assert torch.equal(found != 0, kept)
        torch.testing.assert_close(found, kept * factor)
    assert not torch.equal(weights(seed + 1, 0) != 0, expected[..., :32])


@pytest.mark.parametrize("scale", [4.0, -0.5, 0.0])
def test_any_scale(scale, native_backend, poisoned):
    """Large logits do not overflow; a negative or zero scale is taken at its word."""
    inputs, gradient = SMALL.inputs(torch.float32), SMALL.gradient(torch.float32)
    truth, true_grads = oracle(SMALL, inputs, gradient, scale=scale)
    found = _everything(SMALL, inputs, gradient, native_backend, scale=scale)
    torch.testing.assert_close(found["lse"].double(), _lse(inputs, scale), rtol=1e-5, atol=1e-5)
    assert testing.relative_error(found["output"], truth) < 1e-5
    for name in INPUTS:
        assert testing.relative_error(found[f"grad_{name}"], true_grads[name]) < 2e-5, name


@DTYPES
def test_strides(dtype, native_backend, poisoned):
    """Heads before tokens, the gradient of a sum, queries expanded over the batch, rows with a gap."""
    plain, gradient = SMALL.inputs(dtype), SMALL.gradient(dtype)
    plain["query"] = plain["query"][:1].expand(2, -1, -1, -1).contiguous()

    def turned(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def gapped(t):
        return torch.cat([t, torch.full_like(t, math.nan)], dim=-1)[..., : t.shape[-1]]

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
        expected = _everything(SMALL, plain, odd_gradient.contiguous(), native_backend)
        _same(_everything(SMALL, odd, odd_gradient, native_backend), expected)


def test_a_query_does_not_depend_on_the_others(native_backend, poisoned):
    """Fewer of them, other panels: the same numbers but for the order of sums over keys, which is one."""
    case = QueryAttentionCase("many", 1, 130, 70, 2, 32)
    inputs, gradient = case.inputs(torch.float32), case.gradient(torch.float32)
    every = _everything(case, inputs, gradient, native_backend)
    for first, last in ((0, 1), (40, 60), (99, 130)):
        some = {**inputs, "query": inputs["query"][:, first:last]}
        found = _everything(case, some, gradient[:, first:last], native_backend)
        for name in ("output", "grad_query"):
            torch.testing.assert_close(found[name], every[name][:, first:last])


@pytest.mark.parametrize("broadcast", [False, True])
def test_repeatable(broadcast, native_backend, poisoned):
    case = dataclasses.replace(SMALL, broadcast=broadcast, dropout_p=0.1)
    inputs, gradient = case.inputs(torch.float32), case.gradient(torch.float32)
    first, second = (_everything(case, inputs, gradient, native_backend) for _ in range(2))
    _same(second, first)


@pytest.mark.parametrize("broadcast", [False, True])
def test_threads_change_nothing(broadcast, native_backend, poisoned):
    case = QueryAttentionCase("threads", 2, 100, 300, 2, 16, broadcast=broadcast)
    inputs, gradient, threads = case.inputs(torch.float32), case.gradient(torch.float32), []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            threads.append(_everything(case, inputs, gradient, native_backend))
    finally:
        torch.set_num_threads(before)
    for found in threads[1:]:
        _same(found, threads[0])


def test_empty_batch(native_backend, poisoned):
    case = QueryAttentionCase("empty", 0, 5, 9, 2, 16)
    for query_batch in (1, 0):
        query, key = torch.randn(query_batch, 5, 2, 16), torch.randn(0, 9, 2, 16)
        inputs = {"query": query, "key": key, "value": key}
        found = _everything(case, inputs, case.gradient(torch.float32), native_backend)
        assert (found["output"].shape, found["lse"].shape) == ((0, 5, 2, 16), (0, 2, 5))
        assert torch.equal(found["grad_query"], torch.zeros_like(query))
        assert found["grad_key"].shape == found["grad_value"].shape == key.shape


@pytest.mark.parametrize("forwards", [True, False], ids=["native forward", "native backward"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_backward_by_another_backend(forwards, dropout_p, native_backend, poisoned):
    """Scores computed again in another order: rounding in the exponent that no budget of one backend has."""
    case = dataclasses.replace(SMALL, dropout_p=dropout_p)
    forward, backward = (native_backend, "eager") if forwards else ("eager", native_backend)
    inputs, gradient = case.inputs(torch.float32), case.gradient(torch.float32)
    _, truth = oracle(case, inputs, gradient, seed=SEED)
    found = _everything(case, inputs, gradient, forward, backward=backward)
    for name in INPUTS:
        assert testing.relative_error(found[f"grad_{name}"], truth[name]) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_through_the_public_function(dtype, native_backend, monkeypatch, poisoned):
    monkeypatch.setattr(module, "draw_seed", SEED.to)
    case = dataclasses.replace(SMALL, dropout_p=0.1)
    inputs, gradient = case.inputs(dtype), case.gradient(dtype)
    output, grads = with_gradients(
        query_attention, inputs, gradient, dropout_p=case.dropout_p, backend=native_backend
    )
    expected = _everything(case, inputs, gradient, native_backend)
    assert torch.equal(output, expected["output"])
    _same(grads, {name: expected[f"grad_{name}"] for name in INPUTS})


def test_what_is_refused_when_asked_for_and_left_to_eager_otherwise(native_backend, monkeypatch):
    double = SMALL.inputs(torch.float64)
    with pytest.raises(TypeError, match=f"backend '{native_backend}' takes float32.*query is torch.float64"):
        query_attention(**double, backend=native_backend)
    wide = QueryAttentionCase("wide", 1, 3, 5, 1, 136).inputs(torch.float32)
    with pytest.raises(ValueError, match=f"backend '{native_backend}' takes head dims up to 128"):
        query_attention(**wide, backend=native_backend)
    monkeypatch.delenv("SEGVIT_KERNELS_BACKEND", raising=False)
    for inputs in (double, wide):
        assert torch.equal(query_attention(**inputs), query_attention(**inputs, backend="eager"))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_opcheck(case, native_backend):
    inputs, gradient = case.inputs(torch.float32), case.gradient(torch.float32)
    options, utils = {"backend": native_backend}, ("test_schema", "test_faketensor")
    tensors, rest = [inputs[n] for n in INPUTS], (SEED if case.dropout_p else None, 0.2, case.dropout_p)
    forward = (*tensors, *rest)
    torch.library.opcheck(torch.ops.segvit.query_attention_fwd.default, forward, options, test_utils=utils)
    output, lse = torch.ops.segvit.query_attention_fwd(*forward, **options)
    backward = (gradient, *tensors, output, lse, *rest, True)
    torch.library.opcheck(torch.ops.segvit.query_attention_bwd.default, backward, options, test_utils=utils)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("case", (*CASES, *SIZES), ids=lambda c: c.name)
def test_on_the_device(case, dtype):
    _check(case, dtype, "cuda", device="cuda")


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_shapes_on_the_device(case, dtype):
    _check(case, dtype, "cuda", device="cuda")
