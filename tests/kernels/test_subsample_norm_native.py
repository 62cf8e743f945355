"""LayerNorm with subsampling by the native library against float64: C++ for CPUs, CUDA kernels emulated."""

import dataclasses
import math

import pytest
import torch

from segvit_kernels import testing
from segvit_kernels.ops.subsample_norm import subsample_layer_norm
from segvit_kernels.testing.subsample_norm import CASES, SHAPES, SubsampleNormCase, oracle, with_gradients

OUTPUTS = ("normed", "normed_sub", "x_sub")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
SMALL = SubsampleNormCase("small", 3, (5, 3), 40, prefix_tokens=2)
USED = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]


def _everything(case, inputs, gradients, backend, dtype=None, backward=None):
    """All results of both operators by name; the backward by another backend if ``backward`` names one."""
    place = (*case.grid, case.stride, case.prefix_tokens)
    x, weight, bias = inputs.values()
    ops = torch.ops.segvit
    results = ops.subsample_norm_fwd(x, weight, bias, *place, 1e-6, dtype or x.dtype, backend=backend)
    grads = ops.subsample_norm_bwd(*gradients, x, weight, *results[3:], *place, backend=backward or backend)
    names = (*OUTPUTS, "mean", "rstd", "grad_x", "grad_weight", "grad_bias")
    return dict(zip(names, (*results, *grads), strict=True))


def _same(found, expected):
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def _check(case, dtype, backend, *, used=(0, 1, 2), device="cpu", backward=None):
    """Forward and backward of one case within the error budget."""
    inputs = case.inputs(dtype, device)
    gradients = tuple(g if i in used else None for i, g in enumerate(case.gradients(dtype, device)))
    truth, true_grads = oracle(case, inputs, gradients)
    plain, plain_grads = oracle(case, inputs, gradients, dtype=dtype)
    before = [t.clone() for t in (*inputs.values(), *gradients) if t is not None]

    found = _everything(case, inputs, gradients, backend, backward=backward)
    for name in OUTPUTS:
        assert found[name].dtype == dtype and found[name].is_contiguous()
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


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case, dtype, native_backend, poisoned):
    _check(case, dtype, native_backend)


@DTYPES
@pytest.mark.parametrize("used", USED, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_may_be_missing(used, affine, dtype, native_backend, poisoned):
    _check(dataclasses.replace(SMALL, affine=affine), dtype, native_backend, used=used)


@pytest.mark.parametrize("channels", [3, 7, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129, 1025, 4099])
def test_channels(channels, native_backend, poisoned):
    """On both sides of every width of a vector, a warp or a row in registers."""
    case = SubsampleNormCase("channels", 1, (2, 3), channels)
    for dtype in (torch.float32, torch.float16):
        _check(case, dtype, native_backend)


@pytest.mark.parametrize("grid", [(23, 7), (8, 16)], ids=str)
def test_many_tokens(grid, native_backend, poisoned):
    """More of them than there are runs whose sums are added in order, a multiple and not."""
    _check(SubsampleNormCase("many", 2, grid, 18), torch.float32, native_backend)


def test_results_in_another_dtype(native_backend, poisoned):
    """As under autocast: half-precision results of float32 tokens, gradients of both kinds."""
    inputs, gradients = SMALL.inputs(torch.float32), SMALL.gradients(torch.float32)
    gradients = (*(g.half() for g in gradients[:2]), gradients[2])
    found = _everything(SMALL, inputs, gradients, native_backend, dtype=torch.float16)
    single = _everything(SMALL, inputs, gradients, native_backend)
    assert torch.equal(found["x_sub"], single["x_sub"])
    for name in ("normed", "normed_sub"):
        assert found[name].dtype == torch.float16
        assert torch.equal(found[name], single[name].half())
    (_, truth), (_, plain) = (
        oracle(SMALL, inputs, gradients, dtype=d) for d in (torch.float64, torch.float32)
    )
    for name in truth:
        testing.assert_within_budget(name, found[f"grad_{name}"], truth[name], plain[name])


def test_float32_results_of_half_tokens(native_backend, poisoned):
    """Nothing but the dtype of the results says how they are rounded."""
    inputs, gradients = SMALL.inputs(torch.bfloat16), SMALL.gradients(torch.float32)
    found = _everything(SMALL, inputs, gradients, native_backend, dtype=torch.float32)
    expected = _everything(SMALL, inputs, gradients, native_backend)
    assert found["normed"].dtype == torch.float32
    for name in ("normed", "normed_sub"):
        assert torch.equal(found[name].bfloat16(), expected[name])
    _same(found, {name: expected[name] for name in ("x_sub", "mean", "rstd", "grad_x", "grad_weight")})


def test_float32_parameters_of_half_tokens(native_backend, poisoned):
    inputs, gradients = SMALL.inputs(torch.float16), SMALL.gradients(torch.float16)
    mixed = {n: t if n == "x" else t.float() for n, t in inputs.items()}
    expected = _everything(SMALL, inputs, gradients, native_backend)
    _same(_everything(SMALL, mixed, gradients, native_backend), expected)


@DTYPES
def test_strides(dtype, native_backend, poisoned):
    """One image expanded to three, gradients of a sum, rows between NaN, rows at any address."""
    plain, gradients = SMALL.inputs(dtype), SMALL.gradients(dtype)
    plain["x"] = plain["x"][:1].expand(3, -1, -1).contiguous()
    gradients = (
        gradients[0],
        gradients[1][:, :, :1].expand_as(gradients[1]).contiguous(),
        gradients[2][:1, :, :1].expand_as(gradients[2]).contiguous(),
    )
    gap = torch.full_like(gradients[0], math.nan)
    odd = {**plain, "x": plain["x"][:1].expand(3, -1, -1)}
    odd_gradients = (
        torch.cat([gradients[0], gap], dim=-1)[..., : SMALL.channels],
        gradients[1][:, :, :1].expand_as(gradients[1]),
        gradients[2][:1, :, :1].expand_as(gradients[2]),
    )
    expected = _everything(SMALL, plain, gradients, native_backend)
    _same(_everything(SMALL, odd, odd_gradients, native_backend), expected)
    turned = {**plain, "x": plain["x"].permute(2, 0, 1).contiguous().permute(1, 2, 0)}
    _same(_everything(SMALL, turned, gradients, native_backend), expected)
    # No row begins at a multiple of a vector, and what lies between them is NaN.
    shifted = {**plain, "x": torch.cat([gap[..., :1], plain["x"], gap[..., :2]], -1)[..., 1:-2]}
    unaligned = tuple(
        torch.cat([torch.full_like(g[..., :3], math.nan), g], dim=-1)[..., 3:] for g in gradients
    )
    # Single elements in place of vectors may be added in another order.
    torch.testing.assert_close(_everything(SMALL, shifted, unaligned, native_backend), expected)
    parameters = {
        n: t if n == "x" else torch.stack([t, torch.full_like(t, math.nan)], -1)[:, 0]
        for n, t in plain.items()
    }
    _same(_everything(SMALL, parameters, gradients, native_backend), expected)


def test_repeatable(native_backend, poisoned):
    inputs, gradients = SMALL.inputs(torch.float32), SMALL.gradients(torch.float32)
    first, second = (_everything(SMALL, inputs, gradients, native_backend) for _ in range(2))
    _same(second, first)


def test_threads_change_nothing(native_backend, poisoned):
    case = SubsampleNormCase("threads", 2, (9, 11), 24)
    inputs, gradients, threads = case.inputs(torch.float32), case.gradients(torch.float32), []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            threads.append(_everything(case, inputs, gradients, native_backend))
    finally:
        torch.set_num_threads(before)
    for found in threads[1:]:
        _same(found, threads[0])


def test_an_image_does_not_depend_on_the_others(native_backend, poisoned):
    inputs, gradients = SMALL.inputs(torch.float32), SMALL.gradients(torch.float32)
    every = _everything(SMALL, inputs, gradients, native_backend)
    one = dataclasses.replace(SMALL, batch=1)
    for b in range(SMALL.batch):
        single = {**inputs, "x": inputs["x"][b : b + 1]}
        found = _everything(one, single, [g[b : b + 1] for g in gradients], native_backend)
        for name in (*OUTPUTS, "mean", "rstd", "grad_x"):
            assert torch.equal(found[name][0], every[name][b]), name


def test_empty_batch(native_backend, poisoned):
    case = dataclasses.replace(SMALL, batch=0)
    found = _everything(case, case.inputs(torch.float32), case.gradients(torch.float32), native_backend)
    assert [found[n].shape for n in OUTPUTS] == [(0, 17, 40), (0, 8, 40), (0, 8, 40)]
    assert found["mean"].shape == found["rstd"].shape == (0, 17)
    assert found["grad_x"].shape == (0, 17, 40)
    assert torch.equal(found["grad_weight"], torch.zeros(40))
    assert torch.equal(found["grad_bias"], torch.zeros(40))


@pytest.mark.parametrize("forwards", [True, False], ids=["native forward", "native backward"])
def test_backward_by_another_backend(forwards, native_backend, poisoned):
    pair = (native_backend, "eager") if forwards else ("eager", native_backend)
    _check(SMALL, torch.float32, pair[0], backward=pair[1])


def test_through_the_public_function(native_backend, poisoned):
    for dtype in (torch.float32, torch.float16):
        inputs, gradients = SMALL.inputs(dtype), SMALL.gradients(dtype)
        result, grads = with_gradients(subsample_layer_norm, SMALL, inputs, gradients, backend=native_backend)
        expected = _everything(SMALL, inputs, gradients, native_backend)
        _same(result._asdict(), {name: expected[name] for name in OUTPUTS})
        _same(grads, {name: expected[f"grad_{name}"].to(dtype) for name in grads})


def test_float64_is_refused_when_asked_for_and_left_to_eager_otherwise(native_backend, monkeypatch):
    inputs = SMALL.inputs(torch.float64)
    with pytest.raises(TypeError, match=f"backend '{native_backend}' takes float32.*x is torch.float64"):
        subsample_layer_norm(*inputs.values(), **SMALL.options, backend=native_backend)
    expected = subsample_layer_norm(*inputs.values(), **SMALL.options, backend="eager")
    monkeypatch.delenv("SEGVIT_KERNELS_BACKEND", raising=False)
    found = subsample_layer_norm(*inputs.values(), **SMALL.options)
    _same(found._asdict(), expected._asdict())


@pytest.mark.parametrize("case", [SMALL, *CASES[:4]], ids=lambda c: c.name)
def test_opcheck(case, native_backend):
    inputs, gradients = case.inputs(torch.float32), case.gradients(torch.float32)
    options, place = {"backend": native_backend}, (*case.grid, case.stride, case.prefix_tokens)
    utils = ("test_schema", "test_faketensor")
    forward = (*inputs.values(), *place, 1e-6, torch.float16)
    torch.library.opcheck(torch.ops.segvit.subsample_norm_fwd.default, forward, options, test_utils=utils)
    *_, mean, rstd = torch.ops.segvit.subsample_norm_fwd(*forward, **options)
    for used in USED:
        given = [g if i in used else None for i, g in enumerate(gradients)]
        backward = (*given, inputs["x"], inputs["weight"], mean, rstd, *place)
        torch.library.opcheck(
            torch.ops.segvit.subsample_norm_bwd.default, backward, options, test_utils=utils
        )


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_on_the_device(case, dtype):
    _check(case, dtype, "cuda", device="cuda")


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_shapes_on_the_device(case, dtype):
    _check(case, dtype, "cuda", device="cuda")
