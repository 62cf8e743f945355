"""Attention-to-mask by the native library against float64: C++ for CPUs, CUDA kernels emulated."""

import dataclasses
import math

import pytest
import torch

from segvit_kernels import atm_reference, fused_atm, testing
from segvit_kernels.ops import atm
from segvit_kernels.ops._philox import keep_mask
from segvit_kernels.testing.atm import CASES, SHAPES, ATMCase, oracle

INPUTS = ("query", "key", "value")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
SEED = torch.tensor([0x1234_5678_9ABC_DEF0])
SMALL = ATMCase("small", 2, 40, 70, 2, 32, previous_masks=True)

# On both sides of vectors (4, 8, 16), tiles (48 queries, 64 keys), parts of the keys (256) and of the queries
# (384, or 48 where the heads are many and wide), and groups of heads.
SIZES = (
    ATMCase("q1_k33", 2, 1, 33, 3, 16),
    ATMCase("q1_k1", 1, 1, 1, 16, 128, previous_masks=True),
    ATMCase("q7_k1", 2, 7, 1, 1, 64),
    ATMCase("q16_k64", 1, 16, 64, 2, 16),
    ATMCase("q17_k65", 1, 17, 65, 2, 40, dropout_p=0.2),
    ATMCase("q47_k63", 1, 47, 63, 1, 17),
    ATMCase("q48_k256", 1, 48, 256, 1, 16),
    ATMCase("q49_k257", 1, 49, 257, 1, 16, previous_masks=True),
    ATMCase("q7_k600", 1, 7, 600, 3, 16, dropout_p=0.3, previous_masks=True),
    ATMCase("q5_k1100", 2, 5, 1100, 1, 20, broadcast=True),
    ATMCase("q385_k9", 1, 385, 9, 1, 16, previous_masks=True),
    ATMCase("q50_k20", 1, 50, 20, 16, 128, strided=True),
    ATMCase("q201_k100", 1, 201, 100, 1, 24, broadcast=True),
    ATMCase("q150_k33", 1, 150, 33, 12, 32),
    ATMCase("dim_1", 1, 5, 9, 2, 1),
    ATMCase("dim_127", 1, 9, 13, 1, 127),
)


def _everything(case, inputs, gradients, backend, *, backward=None, scale=None, seed=SEED):
    """All results of both operators by name; the backward by another backend if ``backward`` names one."""
    tensors = [inputs[name] for name in INPUTS]
    scale, seed = case.head_dim**-0.5 if scale is None else scale, seed if case.dropout_p else None
    options, ops = (seed, scale, case.dropout_p), torch.ops.segvit
    output, masks, lse = ops.atm_fwd(*tensors, inputs.get("previous_masks"), *options, True, backend=backend)
    grads = ops.atm_bwd(*gradients, *tensors, output, lse, *options, True, backend=backward or backend)
    return {
        "output": output,
        "mask_logits": masks,
        "lse": lse,
        **{f"grad_{name}": grad for name, grad in zip(INPUTS, grads, strict=True)},
    }


def _same(found, expected):
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def _lse(inputs, scale):
    query, key = inputs["query"].double().transpose(1, 2), inputs["key"].double().permute(0, 2, 3, 1)
    return (query @ key * scale).logsumexp(-1)


def _check(case, dtype, backend, *, unused=None, device="cpu"):
    """Forward and backward of one case within the error budget; inputs unchanged."""
    inputs, gradients = case.inputs(dtype, device), list(case.gradients(dtype, device))
    if unused is not None:
        gradients[unused] = None
    seed = SEED.to(device)
    truth, true_grads = oracle(case, inputs, gradients, seed=seed)
    plain, plain_grads = oracle(case, inputs, gradients, dtype=dtype, seed=seed)
    given = [t for t in (*inputs.values(), *gradients) if t is not None]
    before = [t.clone() for t in given]

    found = _everything(case, inputs, gradients, backend, seed=seed)
    for name in ("output", "mask_logits"):
        assert found[name].dtype == dtype and found[name].is_contiguous()
        testing.assert_within_budget(name, found[name], getattr(truth, name), getattr(plain, name))
    assert found["lse"].dtype == torch.float32
    expected = _lse(inputs, case.head_dim**-0.5)
    torch.testing.assert_close(found["lse"].double(), expected, rtol=1e-5, atol=1e-5)
    for name in INPUTS:
        grad = found[f"grad_{name}"]
        assert grad.dtype == dtype and grad.is_contiguous()
        if case.keys == 1 and name != "value":
            # Softmax over one key: dP and δ cancel, and what is left is their rounding.
            error = (grad.double() - true_grads[name]).abs().max()
            assert error <= 128 * torch.finfo(dtype).eps, f"gradient of {name}: {error:.3g}"
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


@pytest.mark.parametrize("unused", [0, 1], ids=["output", "masks"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@DTYPES
def test_either_gradient_may_be_missing(unused, dropout_p, dtype, native_backend, poisoned):
    _check(dataclasses.replace(SMALL, dropout_p=dropout_p), dtype, native_backend, unused=unused)


def test_without_masks(native_backend, poisoned):
    case = dataclasses.replace(SMALL, previous_masks=False)
    inputs = case.inputs(torch.float32)
    expected = _everything(case, inputs, case.gradients(torch.float32), native_backend)
    output, masks, lse = torch.ops.segvit.atm_fwd(
        *inputs.values(), None, None, case.head_dim**-0.5, 0.0, False, backend=native_backend
    )
    assert masks.shape == (0,)
    torch.testing.assert_close(output, expected["output"])
    torch.testing.assert_close(lse, expected["lse"])


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
        output, _, _ = torch.ops.segvit.atm_fwd(
            query, key, value, None, seed, 1.0, p, False, backend=native_backend
        )
        return output.transpose(1, 2)[..., : min(32, keys - first)]

    for first in range(0, keys, 32):
        found, kept = weights(seed, first), expected[..., first : first + 32]
        assert torch.equal(found != 0, kept)
        torch.testing.assert_close(found, kept * factor)
    assert not torch.equal(weights(seed + 1, 0) != 0, expected[..., :32])


@pytest.mark.parametrize("scale", [30.0, -0.5, 0.0])
def test_any_scale(scale, native_backend, poisoned):
    """Large logits neither overflow nor lose the masks; a negative or zero scale is taken at its word."""
    case = dataclasses.replace(SMALL, previous_masks=False)
    inputs, gradients = case.inputs(torch.float32), case.gradients(torch.float32)
    leaves = [t.double().requires_grad_() for t in inputs.values()]
    truth = atm_reference(*leaves, scale=scale)
    true_grads = torch.autograd.grad(truth, leaves, [g.double() for g in gradients])
    found = _everything(case, inputs, gradients, native_backend, scale=scale)
    torch.testing.assert_close(found.pop("lse").double(), _lse(inputs, scale), rtol=1e-5, atol=1e-5)
    for (name, actual), expected in zip(found.items(), (*truth, *true_grads), strict=True):
        assert testing.relative_error(actual, expected.detach()) < 2e-5, name


@pytest.mark.parametrize("size", [100.0, 1e4])
def test_scores_far_apart(size, native_backend, poisoned):
    """The largest score of a query may stand in any tile, and weights may be 0."""
    case = ATMCase("far", 1, 20, 150, 2, 16)
    inputs, gradients = case.inputs(torch.float32), case.gradients(torch.float32)
    inputs["key"] *= torch.linspace(-size, size, case.keys)[:, None, None]
    truth, true_grads = oracle(case, inputs, gradients)
    found = _everything(case, inputs, gradients, native_backend)
    assert testing.relative_error(found["output"], truth.output) < 1e-5 * size
    assert testing.relative_error(found["mask_logits"], truth.mask_logits) < 1e-6
    for name in INPUTS:
        assert testing.relative_error(found[f"grad_{name}"], true_grads[name]) < 1e-5 * size, name


def test_what_is_not_finite_stays_with_its_query(native_backend, poisoned):
    case = dataclasses.replace(SMALL, previous_masks=False)
    inputs, gradients = case.inputs(torch.float32), case.gradients(torch.float32)
    expected = _everything(case, inputs, gradients, native_backend)
    inputs["query"][1, 7, 1, 3] = math.nan
    found = _everything(case, inputs, gradients, native_backend)
    assert found["output"][1, 7, 1].isnan().all()
    assert found["mask_logits"][1, 7].isnan().all()
    found["output"][1, 7, 1] = expected["output"][1, 7, 1]
    found["mask_logits"][1, 7] = expected["mask_logits"][1, 7]
    _same(found, {name: expected[name] for name in ("output", "mask_logits")})


def test_what_is_not_a_number_in_a_key_shows_everywhere(native_backend):
    """Training must see that it diverged: the smallest of two numbers is not what is no number."""
    inputs, gradients = SMALL.inputs(torch.float32), SMALL.gradients(torch.float32)
    inputs["key"][1, 7, 1, 3] = math.nan
    found = _everything(SMALL, inputs, gradients, native_backend)
    assert found["output"][1, :, 1].isnan().all() and found["grad_value"][1, :, 1].isnan().all()
    assert found["output"][0].isfinite().all() and found["output"][1, :, 0].isfinite().all()


@DTYPES
def test_strides(dtype, native_backend, poisoned):
    """Heads before tokens, gradients of a broadcast sum, an expanded query, rows with a gap."""
    plain, gradients = SMALL.inputs(dtype), SMALL.gradients(dtype)
    plain["query"] = plain["query"][:1].expand(2, -1, -1, -1).contiguous()
    gradients = (gradients[0][:, :, :1, :1].expand_as(gradients[0]).contiguous(), gradients[1])

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
    expected = _everything(SMALL, plain, gradients, native_backend)
    for odd_gradients in (
        (gradients[0][:, :, :1, :1].expand_as(gradients[0]), gapped(gradients[1])),
        (turned(gradients[0]), gradients[1].mT.contiguous().mT),
    ):
        _same(_everything(SMALL, odd, odd_gradients, native_backend), expected)
    every_other = {
        name: torch.stack([t, torch.full_like(t, math.nan)], dim=-1)[..., 0] for name, t in plain.items()
    }
    _same(_everything(SMALL, every_other, gradients, native_backend), expected)


def test_gradient_of_masks_summed_over_the_batch(native_backend, poisoned):
    """Expanded over the batch and along the rows, as from a sum."""
    inputs, gradients = SMALL.inputs(torch.float32), SMALL.gradients(torch.float32)
    for part in (gradients[1][:1], gradients[1][:, :, :1], gradients[1][:1, :1, :1]):
        expanded = part.expand_as(gradients[1])
        found = _everything(SMALL, inputs, (gradients[0], expanded), native_backend)
        _same(found, _everything(SMALL, inputs, (gradients[0], expanded.contiguous()), native_backend))


@pytest.mark.parametrize("broadcast", [False, True])
def test_repeatable(broadcast, native_backend, poisoned):
    case = dataclasses.replace(SMALL, broadcast=broadcast, dropout_p=0.1)
    inputs, gradients = case.inputs(torch.float32), case.gradients(torch.float32)
    first, second = (_everything(case, inputs, gradients, native_backend) for _ in range(2))
    _same(second, first)


@pytest.mark.parametrize("broadcast", [False, True])
def test_threads_change_nothing(broadcast, native_backend, poisoned):
    case = ATMCase("threads", 2, 50, 300, 2, 16, broadcast=broadcast)
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


def test_empty_batch(native_backend, poisoned):
    for query_batch in (1, 0):
        query, key = torch.randn(query_batch, 5, 2, 16), torch.randn(0, 9, 2, 16)
        case = ATMCase("empty", 0, 5, 9, 2, 16)
        inputs = {"query": query, "key": key, "value": key}
        found = _everything(case, inputs, case.gradients(torch.float32), native_backend)
        shapes = [found[name].shape for name in ("output", "mask_logits", "lse")]
        assert shapes == [(0, 5, 2, 16), (0, 5, 9), (0, 2, 5)]
        assert torch.equal(found["grad_query"], torch.zeros_like(query))
        assert found["grad_key"].shape == found["grad_value"].shape == key.shape


@pytest.mark.parametrize("forwards", [True, False], ids=["native forward", "native backward"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_backward_by_another_backend(forwards, dropout_p, native_backend, poisoned):
    """Scores computed again in another order: rounding in the exponent that no budget of one backend has."""
    case = dataclasses.replace(SMALL, dropout_p=dropout_p)
    forward, backward = (native_backend, "eager") if forwards else ("eager", native_backend)
    inputs, gradients = case.inputs(torch.float32), case.gradients(torch.float32)
    _, truth = oracle(case, inputs, gradients, seed=SEED)
    found = _everything(case, inputs, gradients, forward, backward=backward)
    for name in INPUTS:
        assert testing.relative_error(found[f"grad_{name}"], truth[name]) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_through_the_public_function(dtype, native_backend, monkeypatch, poisoned):
    monkeypatch.setattr(atm, "draw_seed", SEED.to)
    case = dataclasses.replace(SMALL, dropout_p=0.1)
    inputs, gradients = case.inputs(dtype), case.gradients(dtype)
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    result = fused_atm(**leaves, dropout_p=case.dropout_p, backend=native_backend)
    grads = torch.autograd.grad(result, list(leaves.values()), gradients)
    expected = _everything(case, inputs, gradients, native_backend)
    _same(result._asdict(), {name: expected[name] for name in result._asdict()})
    _same(
        {f"grad_{n}": g for n, g in zip(INPUTS, grads[:3], strict=True)},
        {n: expected[n] for n in expected if "grad" in n},
    )
    assert torch.equal(grads[3], gradients[1])


def test_what_is_refused_when_asked_for_and_left_to_eager_otherwise(native_backend, monkeypatch):
    double = SMALL.inputs(torch.float64)
    with pytest.raises(TypeError, match=f"backend '{native_backend}' takes float32.*query is torch.float64"):
        fused_atm(**double, backend=native_backend)
    wide = ATMCase("wide", 1, 3, 5, 1, 136).inputs(torch.float32)
    with pytest.raises(ValueError, match=f"backend '{native_backend}' takes head dims up to 128"):
        fused_atm(**wide, backend=native_backend)
    monkeypatch.delenv("SEGVIT_KERNELS_BACKEND", raising=False)
    for inputs in (double, wide):
        _same(fused_atm(**inputs)._asdict(), fused_atm(**inputs, backend="eager")._asdict())


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_opcheck(case, native_backend):
    inputs, (grad_output, grad_masks) = case.inputs(torch.float32), case.gradients(torch.float32)
    options, tensors = {"backend": native_backend}, [inputs[n] for n in INPUTS]
    seed, utils = SEED if case.dropout_p else None, ("test_schema", "test_faketensor")
    forward = (*tensors, inputs.get("previous_masks"), seed, 0.2, case.dropout_p, True)
    torch.library.opcheck(torch.ops.segvit.atm_fwd.default, forward, options, test_utils=utils)
    output, _, lse = torch.ops.segvit.atm_fwd(*forward, **options)
    for grads in ((grad_output, grad_masks), (None, grad_masks), (grad_output, None)):
        backward = (*grads, *tensors, output, lse, seed, 0.2, case.dropout_p, True)
        torch.library.opcheck(torch.ops.segvit.atm_bwd.default, backward, options, test_utils=utils)


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
