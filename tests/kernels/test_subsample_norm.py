"""The standard battery of subsample_layer_norm on the eager backend (Triton: its own file)."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from segvit_kernels import fvcore_handles
from segvit_kernels.ops import subsample_norm
from segvit_kernels.ops.subsample_norm import subsample_layer_norm, subsample_layer_norm_reference
from segvit_kernels.testing import assert_within_budget
from segvit_kernels.testing.subsample_norm import CASES, oracle, with_gradients

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OUTPUTS = ("normed", "normed_sub", "x_sub")
USED = {"all": (0, 1, 2), "normed": (0,), "normed_sub": (1,), "x_sub": (2,), "no residual": (0, 1)}
PREFIX = next(c for c in CASES if c.name == "registers")


def _chosen(gradients, used):
    return tuple(g if i in USED[used] else None for i, g in enumerate(gradients))


def check(case, dtype, used="all"):
    inputs, gradients = case.inputs(dtype), _chosen(case.gradients(dtype), used)
    result, grads = with_gradients(subsample_layer_norm, case, inputs, gradients)
    truth, truth_grads = oracle(case, inputs, gradients)
    plain, plain_grads = oracle(case, inputs, gradients, dtype=dtype)
    for name in OUTPUTS:
        assert getattr(result, name).dtype == dtype
        assert_within_budget(name, *(getattr(r, name) for r in (result, truth, plain)))
    for name in grads:
        assert_within_budget(f"gradient of {name}", *(g[name] for g in (grads, truth_grads, plain_grads)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_values_and_gradients(case, used, dtype, poisoned):
    check(case, dtype, used)


def test_kept_tokens_by_hand():
    """The prefix, then rows 0, 2, 4 by columns 0, 2 of a 5×4 grid, each token marked by its number."""
    x = torch.arange(2 + 20.0).view(1, -1, 1) * torch.tensor([1.0, -1.0])
    result = subsample_layer_norm(x, None, None, grid=(5, 4), prefix_tokens=2)
    assert result.x_sub[0, :, 0].tolist() == [0, 1, 2, 4, 10, 12, 18, 20]
    torch.testing.assert_close(result.normed_sub[0, 1:], torch.tensor([1.0, -1.0]).expand(7, 2))


@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("affine", ["both", "weight", "neither"])
def test_gradcheck(used, affine):
    generator = torch.Generator().manual_seed(0)
    shapes = {"both": [(2, 7, 3), (3,), (3,)], "weight": [(2, 7, 3), (3,)], "neither": [(2, 7, 3)]}[affine]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]

    def call(x, weight=None, bias=None):
        result = subsample_layer_norm(x, weight, bias, grid=(3, 2), prefix_tokens=1)
        return tuple(result[i] for i in USED[used])

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
        check(PREFIX, torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_opcheck(case):
    inputs, gradients = case.inputs(torch.float32), case.gradients(torch.float32)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    place = (*case.grid, case.stride, case.prefix_tokens)
    forward = (*inputs.values(), *place, 1e-6, torch.float16)
    torch.library.opcheck(torch.ops.segvit.subsample_norm_fwd.default, forward, test_utils=utils)
    *_, mean, rstd = torch.ops.segvit.subsample_norm_fwd(*forward)
    for used in ("all", "normed_sub", "x_sub"):
        backward = (*_chosen(gradients, used), inputs["x"], inputs["weight"], mean, rstd, *place)
        torch.library.opcheck(torch.ops.segvit.subsample_norm_bwd.default, backward, test_utils=utils)


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
    inputs, gradients = PREFIX.inputs(dtype), PREFIX.gradients(torch.float32)
    inputs["weight"], inputs["bias"] = (inputs[n].float() for n in ("weight", "bias"))
    with torch.autocast("cpu", torch.float16):
        result, grads = with_gradients(subsample_layer_norm, PREFIX, inputs, gradients)
    assert (result.normed.dtype, result.normed_sub.dtype, result.x_sub.dtype) == (
        *(torch.float16,) * 2,
        dtype,
    )
    single = subsample_layer_norm(*(t.float() for t in inputs.values()), **PREFIX.options)
    for name in OUTPUTS:
        expected = getattr(single, name).to(getattr(result, name).dtype)
        torch.testing.assert_close(getattr(result, name), expected, rtol=0, atol=0)
    rounded = tuple(g.to(o.dtype) for g, o in zip(gradients, result, strict=True))
    truth, plain = (oracle(PREFIX, inputs, rounded, dtype=d)[1] for d in (torch.float64, dtype))
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_within_budget(name, grad, truth[name], plain[name])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_inputs_are_not_changed_and_results_repeat(case):
    inputs, gradients = case.inputs(torch.float32), case.gradients(torch.float32)
    before = {n: None if t is None else t.clone() for n, t in inputs.items()}
    grads_before = [g.clone() for g in gradients]
    runs = [with_gradients(subsample_layer_norm, case, inputs, gradients) for _ in range(2)]
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)
    torch.testing.assert_close(list(gradients), grads_before, rtol=0, atol=0)
    torch.testing.assert_close(tuple(runs[0][0]), tuple(runs[1][0]), rtol=0, atol=0)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_results_share_no_memory_with_anything(case):
    inputs = case.inputs(torch.float32)
    result = subsample_layer_norm(*inputs.values(), **case.options)
    places = [t.untyped_storage().data_ptr() for t in (inputs["x"], *result)]
    assert len(set(places)) == 4


def test_layouts_give_the_same(poisoned):
    case = dataclasses.replace(PREFIX, batch=3)
    inputs, gradients = case.inputs(torch.float32), case.gradients(torch.float32)
    inputs["x"], gradients = inputs["x"][:1].expand(3, -1, -1), tuple(g[:, :, :1] for g in gradients)
    gradients = tuple(g.expand(-1, -1, case.channels) for g in gradients)
    assert inputs["x"].stride(0) == 0 and gradients[0].stride(2) == 0
    odd = with_gradients(subsample_layer_norm, case, inputs, gradients)
    plain = with_gradients(
        subsample_layer_norm,
        case,
        {n: t.contiguous() for n, t in inputs.items()},
        tuple(g.contiguous() for g in gradients),
    )
    turned = {**inputs, "x": inputs["x"].permute(2, 0, 1).contiguous().permute(1, 2, 0)}
    assert turned["x"].stride(2) != 1
    for other in (odd, with_gradients(subsample_layer_norm, case, turned, gradients)):
        torch.testing.assert_close(tuple(other[0]), tuple(plain[0]), rtol=0, atol=0)
        torch.testing.assert_close(other[1], plain[1], rtol=0, atol=0)


def test_empty_batch():
    x = torch.randn(0, 16, 8, requires_grad=True)
    weight, bias = torch.randn(2, 8, requires_grad=True).unbind()
    result = subsample_layer_norm(x, weight, bias, grid=(3, 5), prefix_tokens=1)
    assert [t.shape for t in result] == [(0, 16, 8), (0, 7, 8), (0, 7, 8)]
    grads = torch.autograd.grad(sum(t.sum() for t in result), [x, weight, bias])
    assert grads[0].shape == x.shape and not grads[1].any() and not grads[2].any()


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


def test_what_triton_refuses(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        subsample_layer_norm(torch.randn(1, 1, 8).double(), None, None, grid=(1, 1), backend="triton")
    wide = torch.randn(1, 1, 8193)
    with pytest.raises(ValueError, match="up to 8192 channels; x has shape"):
        subsample_layer_norm(wide, None, None, grid=(1, 1), backend="triton")
    reference = subsample_layer_norm_reference(wide, None, None, grid=(1, 1))
    torch.testing.assert_close(tuple(subsample_layer_norm(wide, None, None, grid=(1, 1))), tuple(reference))
