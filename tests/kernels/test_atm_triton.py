"""Attention-to-mask in Triton's interpreter against float64; on a GPU where there is one (``-m gpu``)."""

import dataclasses
import math

import pytest
import torch

from segvit_kernels import atm_reference, testing
from segvit_kernels.ops._philox import keep_mask
from segvit_kernels.testing.atm import CASES, SHAPES, ATMCase, oracle
from segvit_kernels.triton import atm
from segvit_kernels.triton._launch import pinned

GRADIENTS = ("query", "key", "value")
SMALL = ATMCase("small", 2, 40, 70, 2, 32, previous_masks=True)

# Large tiles keep the interpreter quick; the pinned tiles are those of test_case.
LARGE_FWD = {"block_m": 64, "block_n": 128, "block_c": 128}
_TILES = {"block_m": 64, "block_n": 128, "num_warps": 4, "num_stages": 1}
LARGE_BWD = {"key": _TILES, "query": {**_TILES, "tiles": 1, "splits": 1}}

# Pairs of sizes: queries 1, 7, 150; keys 1, 33, 1600; heads 1, 3, 12, 16; head dims 16 to 128.
PAIRS = (
    ATMCase("q1_k33", 2, 1, 33, 3, 16),
    ATMCase("q1_k1600", 1, 1, 1600, 3, 24),
    ATMCase("q1_k1", 1, 1, 1, 16, 128, previous_masks=True),
    ATMCase("q7_k1", 2, 7, 1, 1, 64),
    ATMCase("q7_k33", 2, 7, 33, 16, 32, previous_masks=True),
    ATMCase("q7_k1600", 1, 7, 1600, 3, 128),
    ATMCase("q150_k1", 1, 150, 1, 3, 32),
    ATMCase("q150_k33", 1, 150, 33, 12, 16),
    ATMCase("q150_k1600", 1, 150, 1600, 1, 32, previous_masks=True),
    ATMCase("q201_k100", 1, 201, 100, 1, 24, broadcast=True),
)


def _forward(case, inputs, config=None, need_masks=True, seed=None):
    query, key, value = (inputs[name] for name in GRADIENTS)
    options = (inputs.get("previous_masks"), seed, case.head_dim**-0.5, case.dropout_p, need_masks)
    return atm.atm_fwd(query, key, value, *options, config=config)


def _check(case, dtype, *, fwd=None, bwd=None, unused=None, device="cpu"):
    """Forward and backward of one case within the error budget."""
    inputs, grads = case.inputs(dtype, device), list(case.gradients(dtype, device))
    if unused is not None:
        grads[unused] = None
    seed = torch.tensor([0x1234_5678_9ABC_DEF0], device=device) if case.dropout_p else None
    truth, true_grads = oracle(case, inputs, grads, seed=seed)
    plain, plain_grads = oracle(case, inputs, grads, dtype=dtype, seed=seed)
    before = {name: tensor.clone() for name, tensor in inputs.items()}

    output, masks, lse = _forward(case, inputs, fwd, seed=seed)
    testing.assert_within_budget("output", output, truth.output, plain.output)
    testing.assert_within_budget("mask_logits", masks, truth.mask_logits, plain.mask_logits)
    query, key = inputs["query"].double().transpose(1, 2), inputs["key"].double().permute(0, 2, 3, 1)
    expected = (query @ key * case.head_dim**-0.5).logsumexp(-1)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)

    found = atm.atm_bwd(
        *grads, *(inputs[name] for name in GRADIENTS), output, lse, seed, case.head_dim**-0.5, case.dropout_p,
        False, config=bwd,
    )  # fmt: skip
    for name, grad in zip(GRADIENTS, found, strict=True):
        if case.keys == 1 and name != "value":
            # Softmax over one key: dP and δ cancel, and what is left is their rounding.
            error = (grad.double() - true_grads[name]).abs().max()
            assert error <= 128 * torch.finfo(dtype).eps, f"gradient of {name}: {error:.3g}"
            continue
        testing.assert_within_budget(f"gradient of {name}", grad, true_grads[name], plain_grads[name])
    for name, tensor in before.items():
        assert torch.equal(inputs[name], tensor), f"{name} was changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case, dtype, poisoned):
    _check(case, dtype)


@pytest.mark.parametrize("case", PAIRS, ids=lambda c: c.name)
def test_sizes(case, poisoned):
    dtype, tiles = torch.float16 if case.heads == 3 else torch.float32, min(3, -(-case.queries // 64))
    bwd = {**LARGE_BWD, "query": {**LARGE_BWD["query"], "tiles": tiles}}
    _check(case, dtype, fwd={**LARGE_FWD, "tiles": tiles}, bwd=bwd)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_pinned_tiles_of_other_architectures(arch, head_dim, poisoned):
    case = dataclasses.replace(SMALL, head_dim=head_dim, heads=2, queries=150)
    shape = (case.batch, case.queries, case.keys, case.heads, case.head_dim)
    fwd = atm._fwd_config(shape, torch.float16, arch)
    bwd = atm._bwd_config(shape, torch.float16, arch)
    _check(case, torch.float16, fwd=fwd, bwd=bwd)


@pytest.mark.parametrize("case", ["odd_dim", "broadcast", "strided", "dropout", "many_queries"])
def test_plan_heads(case, poisoned):
    case = next(c for c in CASES if c.name == case)
    _check(case, torch.float32, fwd={"plan": "heads", "block_n": 32})


@pytest.mark.parametrize("splits", [1, 2, 3, 16])
def test_key_splits(splits, poisoned):
    config = {"splits": splits, "block_m": 32, "block_n": 16, "tiles": 2}
    _check(SMALL, torch.float32, fwd=config)


@pytest.mark.parametrize("unused", [0, 1], ids=["output", "masks"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_either_gradient_may_be_missing(unused, dropout_p, poisoned):
    _check(dataclasses.replace(SMALL, dropout_p=dropout_p), torch.float32, unused=unused, bwd=LARGE_BWD)


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize("broadcast", [False, True])
def test_key_splits_of_the_backward(broadcast, splits, poisoned):
    """Partial sums over splits, over images that share their queries, and over both."""
    case = dataclasses.replace(SMALL, broadcast=broadcast, batch=3, keys=100)
    small = {"block_m": 32, "block_n": 32, "num_warps": 4, "num_stages": 1}
    bwd = {"key": small, "query": {**small, "tiles": 2, "splits": splits}}
    _check(case, torch.float32, bwd=bwd)


def test_without_masks(poisoned):
    inputs = dataclasses.replace(SMALL, previous_masks=False).inputs(torch.float32)
    output, masks, lse = _forward(SMALL, inputs, need_masks=False)
    with_masks = _forward(SMALL, inputs)
    assert masks.shape == (0,)
    assert torch.equal(output, with_masks[0])
    assert torch.equal(lse, with_masks[2])


def test_dropout_bits_are_those_of_the_eager_operator():
    """With zero queries and one-hot values every weight can be read off the output."""
    batch, queries, keys, heads, p = 2, 19, 30, 3, 0.4
    query = torch.zeros(batch, queries, heads, 32)
    value = torch.eye(keys, 32)[None, :, None].expand(batch, keys, heads, 32)
    key, seed = torch.randn(batch, keys, heads, 32), torch.tensor([-(2**62) - 12345])
    expected = keep_mask(seed, p, range(batch), range(heads), heads, queries, keys)
    factor = 65536 / (65536 - round(p * 65536)) / keys
    for config in (
        {"tiles": 1, "block_m": 16, "block_n": 16},
        {"plan": "heads", "block_m": 32, "block_n": 32},
    ):
        output, _, _ = atm.atm_fwd(query, key, value, None, seed, 1.0, p, False, config=config)
        weights = output[..., :keys].transpose(1, 2)
        assert torch.equal(weights != 0, expected.bool())
        torch.testing.assert_close(weights, expected * factor)
    other, _, _ = atm.atm_fwd(query, key, value, None, seed + 1, 1.0, p, False)
    assert not torch.equal(other != 0, output != 0)


def test_dropout_repeats_and_keeps_the_right_share():
    case = ATMCase("dropout", 1, 64, 512, 2, 16, dropout_p=0.25)
    query = torch.zeros(1, 64, 2, 16)
    value, seed = torch.ones(1, 512, 2, 16), torch.tensor([7])
    inputs = {"query": query, "key": value, "value": value}
    first, _, _ = _forward(case, inputs, seed=seed)
    second, _, _ = _forward(case, inputs, seed=seed)
    assert torch.equal(first, second)
    rows = first[..., 0].flatten()  # each the mean of 512 weights that are 0 or 4/3
    deviation = math.sqrt((1 / 0.75 - 1) / 512)
    assert abs(rows.mean() - 1) < 5 * deviation / math.sqrt(rows.numel())
    assert 0.7 * deviation < rows.std() < 1.3 * deviation


@pytest.mark.parametrize("scale", [30.0, -0.5, 0.0])
def test_any_scale(scale, poisoned):
    """Large logits neither overflow nor lose the masks; a negative or zero scale is taken at its word."""
    inputs = dataclasses.replace(SMALL, previous_masks=False).inputs(torch.float32)
    grads = SMALL.gradients(torch.float32)
    leaves = [inputs[name].double().requires_grad_() for name in GRADIENTS]
    truth = atm_reference(*leaves, scale=scale)
    true_grads = torch.autograd.grad(truth, leaves, [g.double() for g in grads])
    tensors = [inputs[name] for name in GRADIENTS]
    output, masks, lse = atm.atm_fwd(*tensors, None, None, scale, 0.0, True)
    found = atm.atm_bwd(*grads, *tensors, output, lse, None, scale, 0.0, True)
    pairs = zip((output, masks, *found), (*truth, *true_grads), strict=True)
    for actual, expected in pairs:
        # Weights of logits of some hundreds err by as many roundings.
        assert testing.relative_error(actual, expected.detach()) < (5e-5 if scale > 1 else 2e-5)


def test_strides(poisoned):
    """Heads before tokens, gradients of a broadcast sum, an expanded query, mask rows with a gap."""
    case = dataclasses.replace(SMALL, batch=2)
    plain = case.inputs(torch.float32)
    plain["query"] = plain["query"][:1].expand(2, -1, -1, -1).contiguous()
    grads = case.gradients(torch.float32)
    grads = (grads[0][:, :, :1, :1].expand_as(grads[0]).contiguous(), grads[1])

    def turned(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def gapped(t):
        return torch.cat([t, torch.full_like(t, math.nan)], dim=-1)[..., : t.shape[-1]]

    odd = {
        "query": plain["query"][:1].expand(2, -1, -1, -1),
        "key": turned(plain["key"]),
        "value": gapped(plain["value"]),
        "previous_masks": gapped(plain["previous_masks"]),
    }
    odd_grads = (grads[0][:, :, :1, :1].expand_as(grads[0]), gapped(grads[1]))

    def everything(inputs, grads):
        output, masks, lse = _forward(case, inputs)
        tensors = [inputs[name] for name in GRADIENTS]
        return (
            output,
            masks,
            *atm.atm_bwd(*grads, *tensors, output, lse, None, case.head_dim**-0.5, 0.0, True),
        )

    for actual, expected in zip(everything(odd, odd_grads), everything(plain, grads), strict=True):
        assert torch.equal(actual, expected)


def test_repeatable():
    case = dataclasses.replace(SMALL, broadcast=True)
    inputs, grads = case.inputs(torch.float32), case.gradients(torch.float32)
    output, _, lse = _forward(case, inputs)
    tensors = [inputs[name] for name in GRADIENTS]
    first, second = (
        atm.atm_bwd(*grads, *tensors, output, lse, None, case.head_dim**-0.5, 0.0, False) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_empty_batch():
    query, key = torch.randn(1, 5, 2, 16), torch.randn(0, 9, 2, 16)
    output, masks, lse = atm.atm_fwd(query, key, key, None, None, 0.25, 0.0, True)
    assert (output.shape, masks.shape, lse.shape) == ((0, 5, 2, 16), (0, 5, 9), (0, 2, 5))
    grads = atm.atm_bwd(output, masks, query, key, key, output, lse, None, 0.25, 0.0, True)
    assert torch.equal(grads[0], torch.zeros_like(query))
    assert grads[1].shape == grads[2].shape == key.shape


def test_rows_beyond_32_bit_offsets_are_copied():
    near = torch.empty(1, 8, 4, 32, device="meta")
    assert atm._addressable(near) is near
    far = torch.empty_strided((1, 8, 4, 32), (2**33, 2**30, 32, 1), device="meta")
    assert atm._addressable(far).is_contiguous()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", "sm_75"])
def test_configurations_are_pure_and_complete(arch):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for case in (*CASES, *SHAPES):
            shape = (case.batch, case.queries, case.keys, case.heads, case.head_dim)
            fwd, bwd = atm._fwd_config(shape, dtype, arch), atm._bwd_config(shape, dtype, arch)
            assert fwd == atm._fwd_config(shape, dtype, arch)
            assert bwd == atm._bwd_config(shape, dtype, arch)
            assert fwd["plan"] == "fused"
            assert 1 <= fwd["splits"] <= 16
    assert pinned("no such chip") == pinned("default")


def test_keys_are_split_until_the_chip_is_full():
    def splits(batch):
        return atm._fwd_config((batch, 150, 1600, 16, 32), torch.bfloat16, "sm_90")["splits"]

    assert [splits(batch) for batch in (1, 4, 16, 64)] == [16, 4, 1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("case", (*CASES, *SHAPES), ids=lambda c: c.name)
def test_on_the_device(case, dtype, device):
    _check(case, dtype, device=device)
