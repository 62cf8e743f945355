"""Query attention in Triton's interpreter against float64; on a GPU where there is one (``-m gpu``)."""

import dataclasses
import math

import pytest
import torch

import segvit_kernels
from segvit_kernels import testing
from segvit_kernels.ops._philox import keep_mask
from segvit_kernels.testing.query_attention import CASES, INPUTS, SHAPES, QueryAttentionCase, oracle
from segvit_kernels.triton import query_attention

BY_NAME = {case.name: case for case in CASES}

# Tiles of a few hundred elements keep the interpreter quick; the pinned tiles are those of test_case.
SMALL = {"block_m": 32, "block_n": 32}

# Sizes around the tiles above: less than one, one, one and a ragged or a full smaller tile, several.
SIZES = (
    QueryAttentionCase("q1_k1600", 1, 1, 1600, 3, 16),
    QueryAttentionCase("q1600_k1", 1, 1600, 1, 1, 16),
    QueryAttentionCase("q31_k32", 2, 31, 32, 3, 32),
    QueryAttentionCase("q32_k48", 1, 32, 48, 2, 24),
    QueryAttentionCase("q48_k33", 2, 48, 33, 1, 64, broadcast=True),
    QueryAttentionCase("q65_k80", 1, 65, 80, 3, 16),
    QueryAttentionCase("q100_k64", 2, 100, 64, 1, 32, strided=True),
    QueryAttentionCase("q17_k100", 1, 17, 100, 5, 20, dropout_p=0.3),
)


def _forward(case, inputs, config=None, seed=None):
    options = (seed, case.head_dim**-0.5, case.dropout_p)
    return query_attention.query_attention_fwd(*(inputs[n] for n in INPUTS), *options, config=config)


def _check(case, dtype, *, fwd=None, bwd=None, device="cpu"):
    """Forward and backward of one case within the error budget; inputs unchanged."""
    inputs, grad = case.inputs(dtype, device), case.gradient(dtype, device)
    seed = torch.tensor([0x1234_5678_9ABC_DEF0], device=device) if case.dropout_p else None
    truth, true_grads = oracle(case, inputs, grad, seed=seed)
    plain, plain_grads = oracle(case, inputs, grad, dtype=dtype, seed=seed)
    before = {name: tensor.clone() for name, tensor in inputs.items()}

    output, lse = _forward(case, inputs, fwd, seed)
    testing.assert_within_budget("output", output, truth, plain)
    query, key = inputs["query"].double().transpose(1, 2), inputs["key"].double().permute(0, 2, 3, 1)
    expected = (query @ key * case.head_dim**-0.5).logsumexp(-1)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)

    found = query_attention.query_attention_bwd(
        grad, *(inputs[name] for name in INPUTS), output, lse, seed, case.head_dim**-0.5, case.dropout_p,
        False, config=bwd,
    )  # fmt: skip
    for name, gradient in zip(INPUTS, found, strict=True):
        assert gradient.is_contiguous() and gradient.dtype == dtype
        if case.keys == 1 and name != "value":
            # Softmax over one key: dP and δ cancel, and what is left is their rounding.
            error = (gradient.double() - true_grads[name]).abs().max()
            assert error <= 128 * case.queries**0.5 * torch.finfo(dtype).eps, f"{name}: {error:.3g}"
            continue
        testing.assert_within_budget(f"gradient of {name}", gradient, true_grads[name], plain_grads[name])
    for name, tensor in before.items():
        assert torch.equal(inputs[name], tensor), f"{name} was changed"


def _tiles(tiles=1, splits=1, **changes):
    """Launch parameters of the backward with small tiles in both of its kernels."""
    small = {**SMALL, "num_warps": 4, "num_stages": 1, **changes}
    return {"key": small, "query": {**small, "tiles": tiles, "splits": splits}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case, dtype, poisoned):
    _check(case, dtype)


@pytest.mark.parametrize("case", SIZES, ids=lambda c: c.name)
def test_sizes(case, poisoned):
    dtype = torch.float16 if case.heads == 3 else torch.float32
    # Long sides in long tiles.
    fwd = {"block_m": 512 if case.queries > 1000 else 32, "block_n": 512 if case.keys > 1000 else 32}
    _check(case, dtype, fwd=fwd, bwd=_tiles(**fwd))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_pinned_tiles_of_other_architectures(arch, head_dim, poisoned):
    case = QueryAttentionCase("", 1, 150, 170, 1, head_dim)
    shape = (case.batch, case.queries, case.keys, case.heads, case.head_dim)
    bwd = query_attention._bwd_config(shape, torch.float16, arch)
    _check(case, torch.float16, fwd=query_attention._fwd_config(shape, torch.float16, arch), bwd=bwd)


@pytest.mark.parametrize("keys", [33, 64, 100, 112])
@pytest.mark.parametrize("splits", [1, 2, 3, 8])
def test_key_splits(splits, keys, poisoned):
    """Ragged, whole and full smaller last tiles, which may be all that the last split has."""
    case = QueryAttentionCase("", 2, 21, keys, 2, 16, dropout_p=0.2 if keys == 100 else 0.0)
    fwd = {"splits": splits, "block_m": 16, "block_n": 32}
    _check(case, torch.float32, fwd=fwd, bwd=_tiles(2, splits, block_m=16))


def test_dropout_bits_are_those_of_the_eager_operator():
    """With zero queries and one-hot values every weight can be read off the output."""
    batch, queries, keys, heads, p = 2, 19, 30, 3, 0.4
    query = torch.zeros(batch, queries, heads, 32)
    value = torch.eye(keys, 32)[None, :, None].expand(batch, keys, heads, 32)
    key, seed = torch.randn(batch, keys, heads, 32), torch.tensor([-(2**62) - 12345])
    expected = keep_mask(seed, p, range(batch), range(heads), heads, queries, keys)
    factor = 65536 / (65536 - round(p * 65536)) / keys
    for config in (
        {"block_m": 16, "block_n": 16},
        {"block_m": 32, "block_n": 32},
        {"block_n": 16, "splits": 2},
    ):
        output, _ = query_attention.query_attention_fwd(query, key, value, seed, 1.0, p, config=config)
        weights = output[..., :keys].transpose(1, 2)
        assert torch.equal(weights != 0, expected)
        torch.testing.assert_close(weights, expected * factor)
    other, _ = query_attention.query_attention_fwd(query, key, value, seed + 1, 1.0, p)
    assert not torch.equal(other != 0, output != 0)


@pytest.mark.parametrize("scale", [4.0, -0.5, 0.0])
def test_any_scale(scale, poisoned):
    """Large logits do not overflow; a negative or zero scale is taken at its word."""
    case = BY_NAME["odd"]
    inputs, grad = case.inputs(torch.float32), case.gradient(torch.float32)
    truth, true_grads = oracle(case, inputs, grad, scale=scale)
    tensors = [inputs[name] for name in INPUTS]
    output, lse = query_attention.query_attention_fwd(*tensors, None, scale, 0.0)
    found = query_attention.query_attention_bwd(grad, *tensors, output, lse, None, scale, 0.0, False)
    assert testing.relative_error(output, truth) < 1e-5
    for name, gradient in zip(INPUTS, found, strict=True):
        assert testing.relative_error(gradient, true_grads[name]) < 2e-5


def test_strides(poisoned):
    """Heads before tokens, the gradient of a sum, queries expanded over the batch, rows with a gap."""
    case = QueryAttentionCase("", 2, 40, 37, 2, 32)
    plain, grad = case.inputs(torch.float32), case.gradient(torch.float32)
    plain["query"] = plain["query"][:1].expand(2, -1, -1, -1).contiguous()
    grad = grad[:, :, :1, :1].expand_as(grad).contiguous()

    def turned(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def gapped(t):
        return torch.cat([t, torch.full_like(t, math.nan)], dim=-1)[..., : t.shape[-1]]

    odd = {
        "query": plain["query"][:1].expand(2, -1, -1, -1),
        "key": turned(plain["key"]),
        "value": gapped(plain["value"]),
    }

    def everything(inputs, grad):
        output, lse = _forward(case, inputs)
        tensors = [inputs[name] for name in INPUTS]
        options = (output, lse, None, case.head_dim**-0.5, 0.0, False)
        return output, *query_attention.query_attention_bwd(grad, *tensors, *options)

    expected = everything(plain, grad)
    for odd_grad in (grad[:, :, :1, :1].expand_as(grad), turned(grad), gapped(grad)):
        for actual, truth in zip(everything(odd, odd_grad), expected, strict=True):
            assert torch.equal(actual, truth)


@pytest.mark.parametrize("broadcast", [False, True])
def test_repeatable(broadcast):
    case = dataclasses.replace(BY_NAME["broadcast"], broadcast=broadcast)
    inputs, grad = case.inputs(torch.float32), case.gradient(torch.float32)
    output, lse = _forward(case, inputs)
    arguments = (grad, *(inputs[name] for name in INPUTS), output, lse, None, case.head_dim**-0.5, 0.0, False)
    first, second = (
        query_attention.query_attention_bwd(*arguments, config=_tiles(splits=2)) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_empty_batch():
    query, key = torch.randn(1, 5, 2, 16), torch.randn(0, 9, 2, 16)
    output, lse = query_attention.query_attention_fwd(query, key, key, None, 0.25, 0.0)
    assert (output.shape, lse.shape) == ((0, 5, 2, 16), (0, 2, 5))
    grads = query_attention.query_attention_bwd(output, query, key, key, output, lse, None, 0.25, 0.0, True)
    assert torch.equal(grads[0], torch.zeros_like(query))
    assert grads[1].shape == grads[2].shape == key.shape


def test_the_public_function_reaches_the_kernels(monkeypatch):
    from segvit_kernels.ops import query_attention as ops

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = QueryAttentionCase("", 2, 20, 33, 2, 16, broadcast=True)
    leaves = {n: t.requires_grad_() for n, t in case.inputs(torch.float32).items()}
    monkeypatch.setattr(ops, "draw_seed", lambda device: torch.tensor([3]))
    results = []
    for backend in ("eager", "triton"):
        output = ops.query_attention(**leaves, dropout_p=0.3, backend=backend)
        results.append((output, *torch.autograd.grad(output.square().sum(), list(leaves.values()))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", "sm_75"])
def test_configurations_are_pure_and_complete(arch):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for case in (*CASES, *SHAPES):
            shape = (case.batch, case.queries, case.keys, case.heads, case.head_dim)
            for dropout in (False, True):
                fwd = query_attention._fwd_config(shape, dtype, arch, dropout)
                bwd = query_attention._bwd_config(shape, dtype, arch, dropout)
                assert fwd == query_attention._fwd_config(shape, dtype, arch, dropout)
                assert bwd == query_attention._bwd_config(shape, dtype, arch, dropout)
                assert 1 <= fwd["splits"] <= 8
                assert min(fwd["block_n"], *(bwd[k][side] for k in ("key", "query") for side in SMALL)) >= 16


def test_programs_fill_the_chip():
    def found(batch, queries, keys, dim):
        shape = (batch, queries, keys, 16, dim)
        bwd = query_attention._bwd_config(shape, torch.bfloat16, "sm_90")
        splits = query_attention._fwd_config(shape, torch.bfloat16, "sm_90")["splits"]
        return splits, bwd["key"]["block_n"], bwd["query"]["tiles"], bwd["query"]["splits"]

    assert found(1, 1600, 1600, 32) == (1, 64, 2, 1)
    assert found(1, 400, 1600, 64) == (2, 64, 2, 4)
    assert found(1, 1600, 400, 32) == (1, 64, 2, 1)
    assert found(16, 400, 1600, 64) == (1, 64, 2, 1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("case", (*CASES, *SHAPES), ids=lambda c: c.name)
def test_on_the_device(case, dtype, device):
    _check(case, dtype, device=device)


def test_scale_zero_keeps_what_is_not_a_number():
    query, key = torch.randn(1, 3, 2, 16), torch.randn(1, 5, 2, 16)
    query[0, 1] = torch.nan
    for function in (
        segvit_kernels.query_attention,
        lambda *x, **y: segvit_kernels.fused_atm(*x, **y).output,
    ):
        found = function(query, key, key, scale=0.0, backend="triton")
        assert found[0, 1].isnan().all() and found[0, [0, 2]].isfinite().all()
