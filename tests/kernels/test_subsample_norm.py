"""subsample_layer_norm: the battery of every backend, then what is the operator's own."""

import dataclasses
import math

import pytest
import torch
from backends import (
    BY_ID,
    HALVES,
    assert_same,
    assert_threads_change_nothing,
    each_backend,
    each_dtype,
)
from torch.utils.flop_counter import FlopCounterMode

from segvit_kernels import fvcore_handles
from segvit_kernels.ops import subsample_norm
from segvit_kernels.ops.subsample_norm import subsample_layer_norm, subsample_layer_norm_reference
from segvit_kernels.testing import assert_within_budget
from segvit_kernels.testing.subsample_norm import CASES, SHAPES, SubsampleNormCase, oracle, with_gradients

OUTPUTS = ("normed", "normed_sub", "x_sub")
USED = {
    "normed": (0,),
    "normed_sub": (1,),
    "x_sub": (2,),
    "no residual": (0, 1),
    "no subsampled norm": (0, 2),
    "no norm": (1, 2),
}
ALL = (0, 1, 2)
BY_NAME = {case.name: case for case in CASES}
SMALL = SubsampleNormCase("small", 3, (5, 3), 40, prefix_tokens=2)
REGISTERS = BY_NAME["registers"]


def everything(case, inputs, gradients, backend, *, dtype=None, backward=None):
    """All results of both operators by name; the backward by another backend if ``backward`` is one."""
    place = (*case.grid, case.stride, case.prefix_tokens)
    x, weight, bias = inputs.values()
    results = backend.op("subsample_norm_fwd")(x, weight, bias, *place, 1e-6, dtype or x.dtype)
    grads = (backward or backend).op("subsample_norm_bwd")(*gradients, x, weight, *results[3:], *place)
    names = (*OUTPUTS, "mean", "rstd", "grad_x", "grad_weight", "grad_bias")
    return dict(zip(names, (*results, *grads), strict=True))


def check(case, dtype, backend, *, used=ALL, backward=None):
    """Forward and backward of one case within the error budget."""
    inputs = case.inputs(dtype, backend.device)
    gradients = tuple(g if i in used else None for i, g in enumerate(case.gradients(dtype, backend.device)))
    truth, true_grads = oracle(case, inputs, gradients)
    plain, plain_grads = oracle(case, inputs, gradients, dtype=dtype)
    before = [t.clone() for t in (*inputs.values(), *gradients) if t is not None]

    found = everything(case, inputs, gradients, backend, backward=backward)
    for name in OUTPUTS:
        assert found[name].dtype == dtype and found[name].is_contiguous()
        assert_within_budget(name, found[name], getattr(truth, name), getattr(plain, name))
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    variance, mean = torch.var_mean(inputs["x"].double(), dim=-1, correction=0)
    assert {found[n].dtype for n in ("mean", "rstd", "grad_weight", "grad_bias")} == {statistics}
    torch.testing.assert_close(found["mean"].double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["rstd"].double(), (variance + 1e-6).rsqrt(), rtol=1e-5, atol=1e-5)
    for name in ("x", "weight", "bias"):
        if name in true_grads:
            grads = (found[f"grad_{name}"], true_grads[name], plain_grads[name])
            assert_within_budget(f"gradient of {name}", *grads)
    if not case.affine:
        assert found["grad_weight"].shape == found["grad_bias"].shape == (0,)
    after = [t for t in (*inputs.values(), *gradients) if t is not None]
    assert all(map(torch.equal, before, after))
    memory = [t.untyped_storage().data_ptr() for t in (*after, *(found[n] for n in (*OUTPUTS, "grad_x")))]
    assert len(set(memory)) == len(memory), "results share memory"


def drawn(case, backend, dtype=torch.float32):
    return case.inputs(dtype, backend.device), case.gradients(dtype, backend.device)


@each_dtype()
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case, backend, dtype, poisoned):
    check(case, dtype, backend)


@each_dtype("triton-gpu", "cuda-gpu")
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_shapes(case, backend, dtype):
    check(case, dtype, backend)


@each_dtype()
@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
def test_gradients_may_be_missing(affine, used, backend, dtype, poisoned):
    check(dataclasses.replace(SMALL, affine=affine), dtype, backend, used=USED[used])


@each_backend("triton")
def test_widest_token(backend, poisoned):
    check(SubsampleNormCase("wide", 1, (1, 2), 4099), torch.float32, backend)


@each_dtype("cpu", "cuda", dtypes=(torch.float32, torch.float16))
def test_channels(backend, dtype, poisoned):
    """On both sides of every width of a vector, a warp or a row in registers."""
    for channels in (3, 7, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129, 1025, 4099):
        check(SubsampleNormCase("channels", 1, (2, 3), channels), dtype, backend)


@each_backend("cpu", "cuda")
@pytest.mark.parametrize("grid", [(23, 7), (8, 16)], ids=str)
def test_many_tokens(grid, backend, poisoned):
    """More of them than there are runs whose sums are added in order, a multiple and not."""
    check(SubsampleNormCase("many", 2, grid, 18), torch.float32, backend)


@each_backend()
def test_results_in_another_dtype(backend, poisoned):
    """As under autocast: half-precision results of float32 tokens, gradients of both kinds."""
    inputs, gradients = drawn(SMALL, backend)
    gradients = (*(g.half() for g in gradients[:2]), gradients[2])
    found = everything(SMALL, inputs, gradients, backend, dtype=torch.float16)
    single = everything(SMALL, inputs, gradients, backend)
    assert torch.equal(found["x_sub"], single["x_sub"])
    for name in ("normed", "normed_sub"):
        assert found[name].dtype == torch.float16
        assert torch.equal(found[name], single[name].half())
    (_, truth), (_, plain) = (
        oracle(SMALL, inputs, gradients, dtype=d) for d in (torch.float64, torch.float32)
    )
    for name in truth:
        assert_within_budget(name, found[f"grad_{name}"], truth[name], plain[name])


@each_dtype(dtypes=HALVES)
def test_float32_results_of_half_tokens(backend, dtype, poisoned):
    """Nothing but the dtype of the results says how they are rounded."""
    inputs, gradients = SMALL.inputs(dtype, backend.device), drawn(SMALL, backend)[1]
    found = everything(SMALL, inputs, gradients, backend, dtype=torch.float32)
    expected = everything(SMALL, inputs, gradients, backend)
    assert found["normed"].dtype == torch.float32
    for name in ("normed", "normed_sub"):
        assert torch.equal(found[name].to(dtype), expected[name])
    assert_same(found, {name: expected[name] for name in ("x_sub", "mean", "rstd", "grad_x", "grad_weight")})


@each_backend()
def test_float32_parameters_of_half_tokens(backend, poisoned):
    inputs, gradients = drawn(SMALL, backend, torch.float16)
    mixed = {n: t if n == "x" else t.float() for n, t in inputs.items()}
    expected = everything(SMALL, inputs, gradients, backend)
    assert_same(everything(SMALL, mixed, gradients, backend), expected)


@each_backend("triton", "cpu", "cuda", "triton-gpu", "cuda-gpu")
def test_numbers_whose_squares_are_none(backend):
    """The result is none either, nor zeros, as if all were well (PyTorch's is now one, now the other)."""
    x = 1e21 * torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(0)).to(backend.device)
    assert subsample_layer_norm(x, None, None, grid=(2, 2), backend=backend.name).normed.isnan().all()


@each_dtype()
def test_strides(backend, dtype, poisoned):
    """One image expanded to three, gradients of a sum, rows between NaN, rows at any address."""
    plain, gradients = drawn(SMALL, backend, dtype)
    plain["x"] = plain["x"][:1].expand(3, -1, -1).contiguous()
    summed = (gradients[1][:, :, :1].expand_as(gradients[1]), gradients[2][:1, :, :1].expand_as(gradients[2]))
    gradients = (gradients[0], *(g.contiguous() for g in summed))
    gap = torch.full_like(gradients[0], math.nan)
    odd = {**plain, "x": plain["x"][:1].expand(3, -1, -1)}
    assert odd["x"].stride(0) == summed[0].stride(2) == 0
    odd_gradients = (torch.cat([gradients[0], gap], dim=-1)[..., : SMALL.channels], *summed)
    expected = everything(SMALL, plain, gradients, backend)
    assert_same(everything(SMALL, odd, odd_gradients, backend), expected)
    turned = {**plain, "x": plain["x"].permute(2, 0, 1).contiguous().permute(1, 2, 0)}
    assert_same(everything(SMALL, turned, gradients, backend), expected)
    # No row begins at a multiple of a vector, and what lies between them is NaN.
    shifted = {**plain, "x": torch.cat([gap[..., :1], plain["x"], gap[..., :2]], -1)[..., 1:-2]}
    unaligned = tuple(torch.cat([gap[:, : g.shape[1], :3], g], dim=-1)[..., 3:] for g in gradients)
    # Single elements in place of vectors may be added in another order.
    torch.testing.assert_close(everything(SMALL, shifted, unaligned, backend), expected)
    parameters = {n: t if n == "x" else torch.stack([t, t * math.nan], -1)[:, 0] for n, t in plain.items()}
    assert_same(everything(SMALL, parameters, gradients, backend), expected)


@each_backend()
def test_repeatable(backend, poisoned):
    inputs, gradients = drawn(SMALL, backend)
    first, second = (everything(SMALL, inputs, gradients, backend) for _ in range(2))
    assert_same(second, first)


@each_backend("cpu", "cuda")
def test_threads_change_nothing(backend, poisoned):
    case = SubsampleNormCase("threads", 2, (9, 11), 24)
    inputs, gradients = drawn(case, backend)
    assert_threads_change_nothing(lambda: everything(case, inputs, gradients, backend))


@each_backend()
def test_an_image_does_not_depend_on_the_others(backend, poisoned):
    inputs, gradients = drawn(SMALL, backend)
    every = everything(SMALL, inputs, gradients, backend)
    one = dataclasses.replace(SMALL, batch=1)
    for b in range(SMALL.batch):
        single = {**inputs, "x": inputs["x"][b : b + 1]}
        found = everything(one, single, [g[b : b + 1] for g in gradients], backend)
        for name in (*OUTPUTS, "mean", "rstd", "grad_x"):
            assert torch.equal(found[name][0], every[name][b]), name


@each_backend()
def test_empty_batch(backend, poisoned):
    case = dataclasses.replace(SMALL, batch=0)
    found = everything(case, *drawn(case, backend), backend)
    assert [found[n].shape for n in OUTPUTS] == [(0, 17, 40), (0, 8, 40), (0, 8, 40)]
    assert found["mean"].shape == found["rstd"].shape == (0, 17)
    assert found["grad_x"].shape == (0, 17, 40)
    for name in ("grad_weight", "grad_bias"):
        assert found[name].shape == (40,) and not found[name].any()


@each_backend("triton", "cpu", "cuda")
def test_forward_and_backward_by_different_backends(backend, poisoned):
    eager = BY_ID["eager"]
    check(SMALL, torch.float32, backend, backward=eager)
    check(SMALL, torch.float32, eager, backward=backend)


@each_dtype(dtypes=(torch.float32, torch.float16))
def test_through_the_public_function(backend, dtype, poisoned):
    inputs, gradients = drawn(SMALL, backend, dtype)
    result, grads = with_gradients(subsample_layer_norm, SMALL, inputs, gradients, backend=backend.name)
    expected = everything(SMALL, inputs, gradients, backend)
    assert_same(result._asdict(), {name: expected[name] for name in OUTPUTS})
    assert_same(grads, {name: expected[f"grad_{name}"].to(dtype) for name in grads})


@each_backend("triton", "cpu", "cuda")
def test_float64_is_refused_when_asked_for_and_left_to_eager_otherwise(backend, monkeypatch):
    inputs = SMALL.inputs(torch.float64, backend.device)
    with pytest.raises(TypeError, match=f"backend '{backend.name}' takes float32.*x is torch.float64"):
        subsample_layer_norm(*inputs.values(), **SMALL.options, backend=backend.name)
    expected = subsample_layer_norm(*inputs.values(), **SMALL.options, backend="eager")
    monkeypatch.delenv("SEGVIT_KERNELS_BACKEND", raising=False)
    found = subsample_layer_norm(*inputs.values(), **SMALL.options)
    assert_same(found._asdict(), expected._asdict())


@each_backend("triton")
def test_tokens_too_wide_for_triton(backend):
    wide = torch.randn(1, 1, 8193)
    with pytest.raises(ValueError, match="up to 8192 channels; x has shape"):
        subsample_layer_norm(wide, None, None, grid=(1, 1), backend="triton")
    reference = subsample_layer_norm_reference(wide, None, None, grid=(1, 1))
    torch.testing.assert_close(tuple(subsample_layer_norm(wide, None, None, grid=(1, 1))), tuple(reference))


def opcheck(case, backend, gradients_used, utils):
    inputs, gradients = drawn(case, backend)
    options, place = {"backend": backend.name}, (*case.grid, case.stride, case.prefix_tokens)
    forward = (*inputs.values(), *place, 1e-6, torch.float16)
    torch.library.opcheck(torch.ops.segvit.subsample_norm_fwd.default, forward, options, test_utils=utils)
    *_, mean, rstd = torch.ops.segvit.subsample_norm_fwd(*forward, **options)
    for used in gradients_used:
        given = [g if i in used else None for i, g in enumerate(gradients)]
        backward = (*given, inputs["x"], inputs["weight"], mean, rstd, *place)
        torch.library.opcheck(
            torch.ops.segvit.subsample_norm_bwd.default, backward, options, test_utils=utils
        )


@each_backend("eager", "cpu", "cuda")
@pytest.mark.parametrize("case", [SMALL, *CASES[:4]], ids=lambda c: c.name)
def test_opcheck(case, backend):
    opcheck(case, backend, (ALL, *USED.values()), ("test_schema", "test_faketensor"))


@each_backend("eager")
@pytest.mark.parametrize("case", ["even", "stride_1", "stride_beyond", "registers", "strided", "not_affine"])
def test_opcheck_of_a_compiled_graph(case, backend):
    opcheck(BY_NAME[case], backend, (ALL, (1,), (2,)), ("test_faketensor", "test_aot_dispatch_dynamic"))


# What no backend changes.


def test_kept_tokens_by_hand():
    """The prefix, then rows 0, 2, 4 by columns 0, 2 of a 5×4 grid, each token marked by its number."""
    x = torch.arange(2 + 20.0).view(1, -1, 1) * torch.tensor([1.0, -1.0])
    result = subsample_layer_norm(x, None, None, grid=(5, 4), prefix_tokens=2)
    assert result.x_sub[0, :, 0].tolist() == [0, 1, 2, 4, 10, 12, 18, 20]
    torch.testing.assert_close(result.normed_sub[0, 1:], torch.tensor([1.0, -1.0]).expand(7, 2))


@pytest.mark.parametrize("used", [ALL, *USED.values()], ids=str)
@pytest.mark.parametrize("affine", ["both", "weight", "neither"])
def test_gradcheck(used, affine):
    generator = torch.Generator().manual_seed(0)
    shapes = {"both": [(2, 7, 3), (3,), (3,)], "weight": [(2, 7, 3), (3,)], "neither": [(2, 7, 3)]}[affine]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]

    def call(x, weight=None, bias=None):
        result = subsample_layer_norm(x, weight, bias, grid=(3, 2), prefix_tokens=1)
        return tuple(result[i] for i in used)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("lost", ["normed", "normed_sub", "x_sub"])
def test_a_lost_gradient_turns_the_battery_red(lost, monkeypatch):
    original = subsample_norm._bwd_eager

    def wrong(*arguments):
        arguments = list(arguments)
        arguments[OUTPUTS.index(lost)] = None
        return original(*arguments)

    monkeypatch.setattr(subsample_norm._library._operators["subsample_norm_bwd"], "eager", wrong)
    with pytest.raises(AssertionError, match="budget"):
        check(REGISTERS, torch.float32, BY_ID["eager"])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_meta_tensors_have_the_shapes_of_real_ones(case):
    inputs = case.inputs(torch.float16)
    result = subsample_layer_norm(*inputs.values(), **case.options)
    meta = (None if t is None else t.to("meta") for t in inputs.values())
    for real, fake in zip(result, subsample_layer_norm(*meta, **case.options), strict=True):
        assert fake.is_meta and (fake.shape, fake.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_flops(case):
    inputs, gradients = case.inputs(torch.float32), case.gradients(torch.float32)
    with FlopCounterMode(display=False) as counter:
        with_gradients(subsample_layer_norm, case, inputs, gradients)
    each = 5 if case.affine else 4
    assert counter.get_total_flops() == 2 * (1 + 2) * each * inputs["x"].numel()


@pytest.mark.parametrize("affine", [True, False])
def test_fvcore_counts_the_operator_as_a_layer_norm(affine):
    fvcore = pytest.importorskip("fvcore.nn")

    class Ours(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(16, elementwise_affine=affine)

        def forward(self, x):
            return subsample_layer_norm(x, self.norm.weight, self.norm.bias, grid=(3, 3))

    x, ours, counts = torch.randn(2, 9, 16), Ours(), []
    for module in (ours, ours.norm):
        analysis = fvcore.FlopCountAnalysis(module, (x,)).set_op_handle(**fvcore_handles())
        with torch.no_grad():  # a trace does not look into functions that have a derivative of their own
            counts.append(analysis.unsupported_ops_warnings(False).total())
    assert counts[0] == counts[1] == (5 if affine else 4) * x.numel()


def test_compile_fullgraph_and_second_size():
    torch._dynamo.reset()
    frames = []

    def backend(graph, examples):
        frames.append(graph)
        return graph.forward

    def function(x, weight, bias, height, width):
        return subsample_layer_norm(x, weight, bias, grid=(height, width), prefix_tokens=1)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for grid in ((4, 6), (5, 9), (7, 3)):
        x = torch.randn(2, 1 + grid[0] * grid[1], 16, requires_grad=True)
        parameters = torch.randn(2, 16, requires_grad=True).unbind()
        results = [f(x, *parameters, *grid) for f in (compiled, function)]
        torch.testing.assert_close(tuple(results[0]), tuple(results[1]))
        grads = [
            torch.autograd.grad(sum(t.square().sum() for t in r), [x, *parameters], retain_graph=True)
            for r in results
        ]
        torch.testing.assert_close(*grads)
    assert len(frames) == 1


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, x, weight, bias):
            return tuple(subsample_layer_norm(x, weight, bias, grid=(3, 5)))

    arguments = torch.randn(2, 15, 16), torch.randn(16), torch.randn(16)
    program = torch.export.export(Layer(), arguments)
    torch.testing.assert_close(program.module()(*arguments), Layer()(*arguments))
    assert "segvit.subsample_norm_fwd" in str(program.graph)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_rounds_once_and_keeps_the_residual(dtype, poisoned):
    inputs, gradients = REGISTERS.inputs(dtype), REGISTERS.gradients(torch.float32)
    inputs["weight"], inputs["bias"] = (inputs[n].float() for n in ("weight", "bias"))
    with torch.autocast("cpu", torch.float16):
        result, grads = with_gradients(subsample_layer_norm, REGISTERS, inputs, gradients)
    assert (result.normed.dtype, result.normed_sub.dtype, result.x_sub.dtype) == (
        *(torch.float16,) * 2,
        dtype,
    )
    single = subsample_layer_norm(*(t.float() for t in inputs.values()), **REGISTERS.options)
    for name in OUTPUTS:
        expected = getattr(single, name).to(getattr(result, name).dtype)
        torch.testing.assert_close(getattr(result, name), expected, rtol=0, atol=0)
    rounded = tuple(g.to(o.dtype) for g, o in zip(gradients, result, strict=True))
    truth, plain = (oracle(REGISTERS, inputs, rounded, dtype=d)[1] for d in (torch.float64, dtype))
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_within_budget(name, grad, truth[name], plain[name])


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(2, 15, 16, requires_grad=True)
    weight = torch.randn(16, requires_grad=True)
    grads = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        result = wrap(lambda x, w: tuple(subsample_layer_norm(x, w, None, grid=(3, 5))), x, weight)
        grads.append(torch.autograd.grad(sum(t.square().sum() for t in result), [x, weight]))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def arguments(**changes):
    made = {"x": torch.randn(2, 16, 8), "weight": torch.randn(8), "bias": torch.randn(8)}
    return made | {"grid": (3, 5), "prefix_tokens": 1} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x is a list; expected a tensor"),
        ({"x": torch.ones(2, 16, 8, dtype=torch.int32)}, TypeError, "x has dtype torch.int32"),
        (
            {"x": torch.randn(16, 8)},
            ValueError,
            r"x has shape \(16, 8\); expected \(batch, tokens, channels\)",
        ),
        ({"x": torch.randn(2, 16, 0)}, ValueError, r"x has shape \(2, 16, 0\); expected"),
        ({"x": torch.randn(2, 15, 8)}, ValueError, "x has 15 tokens; expected 16, 1 of the prefix and 3×5"),
        ({"grid": (4, 5)}, ValueError, "x has 16 tokens; expected 21"),
        ({"grid": (0, 5)}, ValueError, r"grid is \(0, 5\); expected the rows and columns"),
        ({"grid": 15}, ValueError, "grid is 15; expected"),
        ({"grid": (3, 5.0)}, ValueError, r"grid is \(3, 5.0\); expected"),
        ({"stride": 0}, ValueError, "stride is 0; expected a positive integer"),
        ({"stride": 2.0}, ValueError, "stride is 2.0; expected a positive integer"),
        ({"prefix_tokens": -1}, ValueError, "prefix_tokens is -1; expected a number of tokens"),
        ({"eps": -1e-6}, ValueError, "eps is -1e-06; expected"),
        ({"eps": float("nan")}, ValueError, "eps is nan; expected"),
        ({"weight": 1.0}, TypeError, "weight is a float; expected a tensor or None"),
        ({"weight": torch.randn(9)}, ValueError, r"weight has shape \(9,\); expected \(8,\)"),
        ({"weight": None}, ValueError, "bias is given without a weight"),
        ({"bias": torch.randn(8).half()}, TypeError, "bias has dtype torch.float16; expected float32 or"),
        ({"bias": torch.randn(8, device="meta")}, ValueError, "bias is on meta; expected cpu"),
        ({"backend": "cudnn"}, ValueError, "argument 'backend' is 'cudnn'"),
    ],
)
def test_refusals(changes, error, message):
    with pytest.raises(error, match=message):
        subsample_layer_norm(**arguments(**changes))
