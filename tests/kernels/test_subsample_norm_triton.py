"""LayerNorm with subsampling in Triton's interpreter against float64; on a GPU where there is one."""

import dataclasses
import math

import pytest
import torch

from segvit_kernels import testing
from segvit_kernels.ops.subsample_norm import subsample_layer_norm
from segvit_kernels.testing.subsample_norm import CASES, SHAPES, SubsampleNormCase, oracle, with_gradients
from segvit_kernels.triton import subsample_norm
from segvit_kernels.triton._launch import pinned

OUTPUTS = ("normed", "normed_sub", "x_sub")
SMALL = SubsampleNormCase("small", 3, (5, 3), 40, prefix_tokens=2)


def _everything(case, inputs, gradients, fwd=None, bwd=None, dtype=None):
    """All results of the launchers by name."""
    place = (*case.grid, case.stride, case.prefix_tokens)
    x, weight, bias = inputs.values()
    results = subsample_norm.subsample_norm_fwd(x, weight, bias, *place, 1e-6, dtype or x.dtype, config=fwd)
    grads = subsample_norm.subsample_norm_bwd(*gradients, x, weight, *results[3:], *place, config=bwd)
    names = (*OUTPUTS, "mean", "rstd", "grad_x", "grad_weight", "grad_bias")
    return dict(zip(names, (*results, *grads), strict=True))


def _check(case, dtype, *, used=(0, 1, 2), fwd=None, bwd=None, device="cpu"):
    """Forward and backward of one case within the error budget."""
    inputs = case.inputs(dtype, device)
    gradients = tuple(g if i in used else None for i, g in enumerate(case.gradients(dtype, device)))
    truth, true_grads = oracle(case, inputs, gradients)
    plain, plain_grads = oracle(case, inputs, gradients, dtype=dtype)
    before = [t.clone() for t in (*inputs.values(), *gradients) if t is not None]

    found = _everything(case, inputs, gradients, fwd, bwd)
    for name in OUTPUTS:
        testing.assert_within_budget(name, found[name], getattr(truth, name), getattr(plain, name))
    variance, mean = torch.var_mean(inputs["x"].double(), dim=-1, correction=0)
    assert found["mean"].dtype == found["rstd"].dtype == found["grad_weight"].dtype == torch.float32
    torch.testing.assert_close(found["mean"].double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["rstd"].double(), (variance + 1e-6).rsqrt(), rtol=1e-5, atol=1e-5)
    for name in ("x", "weight", "bias"):
        if name in true_grads:
            grads = (found[f"grad_{name}"], true_grads[name], plain_grads[name])
            testing.assert_within_budget(f"gradient of {name}", *grads)
    if not case.affine:
        assert found["grad_weight"].shape == found["grad_bias"].shape == (0,)
    after = [t for t in (*inputs.values(), *gradients) if t is not None]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case, dtype, poisoned):
    _check(case, dtype)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_may_be_missing(used, affine, poisoned):
    _check(dataclasses.replace(SMALL, affine=affine), torch.float32, used=used)


@pytest.mark.parametrize(("block_n", "steps"), [(1, 1), (1, 100), (2, 3), (16, 1), (16, 2), (64, 1)])
def test_tiles(block_n, steps, poisoned):
    _check(SMALL, torch.float32, fwd={"block_n": block_n}, bwd={"block_n": block_n, "steps": steps})


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("channels", [96, 768])
def test_pinned_tiles_of_other_architectures(arch, channels, poisoned):
    case = dataclasses.replace(SMALL, channels=channels, batch=2)
    shape = (case.batch, case.tokens[0], channels)
    fwd = subsample_norm._fwd_config(shape, torch.float16, arch)
    bwd = subsample_norm._bwd_config(shape, torch.float16, arch)
    _check(case, torch.float16, fwd=fwd, bwd=bwd)


def test_many_partials_are_added(poisoned):
    """More programs than one block of the second launch adds."""
    case = SubsampleNormCase("many", 1, (10, 7), 18)
    _check(case, torch.float32, bwd={"block_n": 1, "steps": 1})


def test_widest_token(poisoned):
    _check(SubsampleNormCase("wide", 1, (1, 2), 4099), torch.float32)


def test_results_in_another_dtype(poisoned):
    """As under autocast: half-precision results of float32 tokens, gradients of both kinds."""
    inputs, gradients = SMALL.inputs(torch.float32), SMALL.gradients(torch.float32)
    gradients = (*(g.half() for g in gradients[:2]), gradients[2])
    found = _everything(SMALL, inputs, gradients, dtype=torch.float16)
    single = _everything(SMALL, inputs, gradients)
    assert torch.equal(found["x_sub"], single["x_sub"])
    for name in ("normed", "normed_sub"):
        assert found[name].dtype == torch.float16
        assert torch.equal(found[name], single[name].half())
    (_, truth), (_, plain) = (
        oracle(SMALL, inputs, gradients, dtype=d) for d in (torch.float64, torch.float32)
    )
    for name in truth:
        testing.assert_within_budget(name, found[f"grad_{name}"], truth[name], plain[name])


def test_float32_parameters_of_half_tokens(poisoned):
    inputs, gradients = SMALL.inputs(torch.float16), SMALL.gradients(torch.float16)
    mixed = {n: t if n == "x" else t.float() for n, t in inputs.items()}
    expected = _everything(SMALL, inputs, gradients)
    for name, tensor in _everything(SMALL, mixed, gradients).items():
        assert torch.equal(tensor, expected[name]), name


def test_strides(poisoned):
    """One image expanded to three, gradients of a sum, rows with a gap full of NaN."""
    plain, gradients = SMALL.inputs(torch.float32), SMALL.gradients(torch.float32)
    plain["x"] = plain["x"][:1].expand(3, -1, -1).contiguous()
    gradients = (
        gradients[0],
        gradients[1][:, :, :1].expand_as(gradients[1]).contiguous(),
        gradients[2][:1].expand_as(gradients[2]).contiguous(),
    )
    gap = torch.full_like(gradients[0], math.nan)
    odd = {**plain, "x": plain["x"][:1].expand(3, -1, -1)}
    odd_gradients = (
        torch.cat([gradients[0], gap], dim=-1)[..., : SMALL.channels],
        gradients[1][:, :, :1].expand_as(gradients[1]),
        gradients[2][:1].expand_as(gradients[2]),
    )
    expected = _everything(SMALL, plain, gradients)
    for name, tensor in _everything(SMALL, odd, odd_gradients).items():
        assert torch.equal(tensor, expected[name]), name
    turned = {**plain, "x": plain["x"].permute(2, 0, 1).contiguous().permute(1, 2, 0)}
    for name, tensor in _everything(SMALL, turned, gradients).items():
        assert torch.equal(tensor, expected[name]), name


def test_repeatable(poisoned):
    inputs, gradients = SMALL.inputs(torch.float32), SMALL.gradients(torch.float32)
    first, second = (_everything(SMALL, inputs, gradients) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_empty_batch():
    case = dataclasses.replace(SMALL, batch=0)
    found = _everything(case, case.inputs(torch.float32), case.gradients(torch.float32))
    assert [found[n].shape for n in OUTPUTS] == [(0, 17, 40), (0, 8, 40), (0, 8, 40)]
    assert found["grad_x"].shape == (0, 17, 40)
    assert torch.equal(found["grad_weight"], torch.zeros(40))


def test_through_the_public_function(monkeypatch, poisoned):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs, gradients = SMALL.inputs(torch.float32), SMALL.gradients(torch.float32)
    ours, eager = (
        with_gradients(subsample_layer_norm, SMALL, inputs, gradients, backend=b) for b in ("triton", "eager")
    )
    torch.testing.assert_close(tuple(ours[0]), tuple(eager[0]))
    torch.testing.assert_close(ours[1], eager[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", "sm_75"])
def test_configurations_are_pure_and_complete(arch):
    programs = 4 * pinned(arch)["multiprocessors"]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for case in (*CASES, *SHAPES):
            for batch in (1, 16):
                shape = (batch, case.tokens[0], case.channels)
                fwd = subsample_norm._fwd_config(shape, dtype, arch)
                bwd = subsample_norm._bwd_config(shape, dtype, arch)
                assert fwd == subsample_norm._fwd_config(shape, dtype, arch)
                assert bwd == subsample_norm._bwd_config(shape, dtype, arch)
                per_program = bwd["block_n"] * bwd["steps"]
                assert per_program >= 8 and -(-shape[0] * shape[1] // per_program) <= programs


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("case", (*CASES, *SHAPES), ids=lambda c: c.name)
def test_on_the_device(case, dtype, device):
    _check(case, dtype, device=device)
