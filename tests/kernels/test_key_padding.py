"""Padded tokens of fused_atm and query_attention, on every backend that runs on the CPU."""

import dataclasses
import math

import pytest
import torch
from backends import BY_ID, PTX

from segvit_kernels import (
    FusedATM,
    _library,
    atm_reference,
    fused_atm,
    query_attention,
    query_attention_reference,
    testing,
)
from segvit_kernels.ops import atm
from segvit_kernels.ops import query_attention as query_attention_ops

SEED = torch.tensor([0x123456789ABCDEF])
BACKENDS = ("eager", "triton", "cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    queries: int
    keys: int
    heads: int = 2
    head_dim: int = 32
    dropout_p: float = 0.0
    previous: bool = False
    broadcast: bool = False

    def mask(self):
        """Images: nothing but padding, every third token, a tail longer than any tile, none."""
        padding = torch.zeros(4, self.keys, dtype=torch.bool)
        padding[0], padding[1, ::3], padding[2, self.keys // 4 + 1 :] = True, True, True
        return padding

    def inputs(self, dtype):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        features = (self.heads, self.head_dim)
        inputs = {"query": draw(1 if self.broadcast else 4, self.queries, *features)}
        inputs["key"], inputs["value"] = draw(4, self.keys, 2, *features).unbind(2)
        if self.previous:
            inputs["previous_masks"] = draw(4, self.queries, self.keys)
        return inputs, (draw(4, self.queries, *features), draw(4, self.queries, self.keys))


CASES = (
    Case("tiles", 13, 70),
    Case("splits", 5, 600, previous=True, heads=1),
    Case("dropout", 19, 140, dropout_p=0.3, previous=True),
    Case("broadcast", 50, 33, broadcast=True, head_dim=24),
    Case("one_key", 3, 1, previous=True),
    Case("dim_128", 9, 70, heads=1, head_dim=128),
)


@pytest.fixture(params=[name for name in BACKENDS if BY_ID[name].ptx or not PTX])
def backend(request, ptx_machines):
    ptx_machines(request.param)
    reason = _library.why_not(request.param, "cpu")
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture
def fixed_seed(monkeypatch):
    for module in (atm, query_attention_ops):
        monkeypatch.setattr(module, "draw_seed", lambda device: SEED.to(device))


def with_gradients(function, inputs, gradients, **options):
    """Outputs as a tuple, and the gradients of the inputs by name; those of unused inputs are zero."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    outputs = function(**leaves, **options)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    used = [(o, g.to(o.dtype)) for o, g in zip(outputs, gradients, strict=False) if g is not None]
    grads = torch.autograd.grad(
        [o for o, _ in used], list(leaves.values()), [g for _, g in used], allow_unused=True
    )
    named = zip(leaves.items(), grads, strict=True)
    return outputs, {n: torch.zeros_like(x) if g is None else g for (n, x), g in named}


OPERATORS = {
    "atm": (fused_atm, atm_reference),
    "query_attention": (query_attention, query_attention_reference),
}


def prepared(case, operator, dtype):
    inputs, gradients = case.inputs(dtype)
    if operator == "query_attention":
        inputs.pop("previous_masks", None)
        gradients = gradients[:1]
    return inputs, gradients, case.mask()


def spoiled(inputs, padding):
    """What stands in padded keys and values is nobody's business."""
    return inputs | {n: inputs[n].masked_fill(padding[..., None, None], math.nan) for n in ("key", "value")}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_values_and_gradients(case, operator, dtype, backend, fixed_seed, poisoned):
    interpreted = backend == "triton" and not PTX
    if interpreted and (dtype == torch.bfloat16 or (dtype == torch.float16 and case is not CASES[2])):
        pytest.skip("the interpreter's bfloat16 products are wrong, and it is slow")
    check(case, operator, dtype, backend)


def check(case, operator, dtype, backend):
    """Outputs and gradients within the error budget, and nothing of or for padded tokens."""
    function, reference = OPERATORS[operator]
    inputs, gradients, padding = prepared(case, operator, dtype)
    options = {"dropout_p": case.dropout_p, "key_padding_mask": padding}
    seeded = options | {"seed": SEED}
    double = {n: t.double() for n, t in inputs.items()}
    truth, truth_grads = with_gradients(reference, double, gradients, **seeded)
    plain, plain_grads = with_gradients(reference, inputs, gradients, **seeded)
    given = spoiled(inputs, padding)
    found, grads = with_gradients(function, given, gradients, backend=backend, **options)
    for name, *results in zip(("output", "mask_logits"), found, truth, plain, strict=False):
        testing.assert_within_budget(name, *results)
    for name in inputs:
        if case.keys == 1 and name in ("query", "key"):
            continue  # dP and δ cancel
        testing.assert_within_budget(f"gradient of {name}", grads[name], truth_grads[name], plain_grads[name])
    assert not found[0][0].any(), "an image of nothing but padding"
    for name in ("key", "value"):
        assert not grads[name][padding].any(), f"gradient of padded {name}"
    if operator == "atm":
        where = padding[:, None].expand_as(found[1])
        previous = inputs.get("previous_masks", torch.zeros_like(found[1]))
        assert torch.equal(found[1][where], previous[where])


@pytest.mark.parametrize("unused", ["output", "mask_logits"])
def test_one_gradient_alone(unused, backend, poisoned):
    case = CASES[0]
    inputs, gradients = case.inputs(torch.float32)
    gradients = [
        None if unused == n else g for n, g in zip(("output", "mask_logits"), gradients, strict=True)
    ]
    padding = case.mask()
    _, truth = with_gradients(
        atm_reference, {n: t.double() for n, t in inputs.items()}, gradients, key_padding_mask=padding
    )
    options = {"key_padding_mask": padding, "backend": backend}
    _, found = with_gradients(fused_atm, spoiled(inputs, padding), gradients, **options)
    for name, grad in found.items():
        torch.testing.assert_close(grad.double(), truth[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_mask_of_no_padding_changes_nothing(operator, backend):
    case = dataclasses.replace(CASES[0], keys=140)
    function = OPERATORS[operator][0]
    inputs, gradients, padding = prepared(case, operator, torch.float32)
    for deterministic in (True, False):
        options = {"backend": backend, "deterministic": deterministic}
        none, none_grads = with_gradients(function, inputs, gradients, **options)
        found, grads = with_gradients(
            function, inputs, gradients, key_padding_mask=torch.zeros_like(padding), **options
        )
        torch.testing.assert_close(found, none)
        torch.testing.assert_close(grads, none_grads)


def test_padding_is_the_same_as_shorter_images(backend):
    """What a user means: a batch of images of several sizes gives what each gives alone."""
    query, features = torch.randn(1, 7, 2, 16), torch.randn(3, 100, 2, 16)
    lengths = (100, 37, 64)
    padding = torch.arange(100) >= torch.tensor(lengths)[:, None]
    together = fused_atm(query, features, features, key_padding_mask=padding, backend=backend)
    for i, length in enumerate(lengths):
        alone = fused_atm(query, features[i : i + 1, :length], features[i : i + 1, :length], backend=backend)
        torch.testing.assert_close(together.output[i : i + 1], alone.output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            together.mask_logits[i, :, :length], alone.mask_logits[0], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("plan", [{"plan": "heads"}, {"splits": 1}, {"splits": 3}, {"splits": 8}], ids=str)
def test_plans_of_the_triton_forward(plan, ptx_machines):
    ptx_machines("triton")
    from segvit_kernels.triton.atm import atm_fwd

    case = dataclasses.replace(CASES[0], keys=260)
    inputs, _ = case.inputs(torch.float32)
    padding = case.mask()
    output, masks, lse = atm_fwd(
        *spoiled(inputs, padding).values(), None, None, 0.2, 0.0, True, padding, config=plan
    )
    truth = atm_reference(*(t.double() for t in inputs.values()), scale=0.2, key_padding_mask=padding)
    torch.testing.assert_close(output.double(), truth.output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(masks.double(), truth.mask_logits, rtol=1e-5, atol=1e-5)
    assert (lse[0] == -math.inf).all() and lse[1:].isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
def test_key_splits_of_the_triton_backward_of_atm(splits, ptx_machines):
    ptx_machines("triton")
    from segvit_kernels.triton.atm import atm_bwd, atm_fwd

    case = dataclasses.replace(CASES[0], keys=260)
    inputs, gradients = case.inputs(torch.float32)
    padding = case.mask()
    _, truth = with_gradients(
        atm_reference,
        {n: t.double() for n, t in inputs.items()},
        gradients,
        key_padding_mask=padding,
        scale=0.2,
    )
    tensors = list(spoiled(inputs, padding).values())
    output, _, lse = atm_fwd(*tensors, None, None, 0.2, 0.0, True, padding)
    tiles = {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 1}
    config = {"key": tiles, "query": {**tiles, "tiles": 1, "splits": splits}}
    # What stands at padding, in the gradient of the masks too, is nobody's.
    gradients[1].masked_fill_(padding[:, None], math.nan)
    found = atm_bwd(*gradients, *tensors, output, lse, None, 0.2, 0.0, False, padding, config=config)
    for grad, expected in zip(found, truth.values(), strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradcheck(operator):
    padding = torch.tensor([[False, True, False, False, True], [True] * 5])
    shapes = [(1, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def call(*tensors):
        return OPERATORS[operator][0](*tensors, key_padding_mask=padding)

    assert torch.autograd.gradcheck(call, inputs)


def test_opcheck():
    case = CASES[0]
    inputs, gradients = case.inputs(torch.float32)
    tensors, padding, ops = list(inputs.values()), case.mask(), torch.ops.segvit
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    forward = (*tensors, None, None, 0.2, 0.0, True, padding)
    torch.library.opcheck(ops.atm_fwd.default, forward, test_utils=utils)
    output, _, lse = ops.atm_fwd(*forward)
    backward = (*gradients, *tensors, output, lse, None, 0.2, 0.0, True, padding)
    torch.library.opcheck(ops.atm_bwd.default, backward, test_utils=utils)
    forward = (*tensors, None, 0.2, 0.0, padding)
    torch.library.opcheck(ops.query_attention_fwd.default, forward, test_utils=utils)
    backward = (gradients[0], *tensors, output, lse, None, 0.2, 0.0, True, padding)
    torch.library.opcheck(ops.query_attention_bwd.default, backward, test_utils=utils)


def test_compiled():
    case = CASES[0]
    inputs, _ = case.inputs(torch.float32)
    compiled = torch.compile(fused_atm, backend="aot_eager", fullgraph=True)
    for padding in (case.mask(), None):
        expected = fused_atm(**inputs, key_padding_mask=padding)
        torch.testing.assert_close(tuple(compiled(**inputs, key_padding_mask=padding)), tuple(expected))


def test_the_layer_takes_it():
    layer, tokens, features = FusedATM(32, 2), torch.randn(1, 5, 32), torch.randn(2, 9, 32)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 4:] = True
    expected = layer(tokens, features[1:, :4])
    result = layer(tokens, features.masked_fill(padding[..., None], math.nan), key_padding_mask=padding)
    torch.testing.assert_close(result.output[1:], expected.output)
    torch.testing.assert_close(result.mask_logits[1:, :, :4], expected.mask_logits)


@pytest.mark.parametrize(
    ("padding", "error", "match"),
    [
        (torch.zeros(4, 70), TypeError, "key_padding_mask is torch.float32; expected a bool tensor"),
        ([[True]], TypeError, "key_padding_mask is list"),
        (torch.zeros(4, 69, dtype=torch.bool), ValueError, r"shape \(4, 69\); expected \(4, 70\)"),
        (torch.zeros(70, dtype=torch.bool), ValueError, r"shape \(70,\); expected \(4, 70\)"),
        (torch.zeros(4, 70, dtype=torch.bool, device="meta"), ValueError, "key_padding_mask is on meta"),
    ],
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_bad_masks(operator, padding, error, match):
    inputs, _, _ = prepared(CASES[0], operator, torch.float32)
    with pytest.raises(error, match=match):
        OPERATORS[operator][0](**inputs, key_padding_mask=padding)
