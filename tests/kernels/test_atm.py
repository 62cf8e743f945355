"""The standard battery of fused_atm on the eager backend (the Triton kernels: test_atm_triton.py)."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from segvit_kernels import FusedATM, atm_reference, fused_atm, fvcore_handles
from segvit_kernels.ops import atm
from segvit_kernels.ops._philox import dropout_scale, dropout_threshold, keep_mask, philox
from segvit_kernels.testing import RELATIVE_NORM, assert_within_budget, relative_error
from segvit_kernels.testing.atm import CASES, oracle

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SEED = torch.tensor([0x123456789ABCDEF], dtype=torch.int64)


@pytest.fixture
def fixed_seed(monkeypatch):
    """Every call draws the dropout mask of SEED."""
    monkeypatch.setattr(atm, "draw_seed", SEED.to)


def run(case, inputs, gradients, **options):
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    result = fused_atm(**leaves, dropout_p=case.dropout_p, **options)
    used = [(o, g) for o, g in zip(result, gradients, strict=True) if g is not None]
    grads = torch.autograd.grad(
        [o for o, _ in used], list(leaves.values()), [g for _, g in used], allow_unused=True
    )
    return result, {
        n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), grads, strict=True)
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unused", ["neither", "output", "masks"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_values_and_gradients(case, unused, dtype, fixed_seed, poisoned):
    inputs, gradients = case.inputs(dtype), list(case.gradients(dtype))
    if unused != "neither":
        gradients[("output", "masks").index(unused)] = None
    result, grads = run(case, inputs, gradients)
    truth, truth_grads = oracle(case, inputs, gradients, seed=SEED)
    plain, plain_grads = oracle(case, inputs, gradients, dtype=dtype, seed=SEED)
    for name in ("output", "mask_logits"):
        assert_within_budget(name, *(getattr(r, name) for r in (result, truth, plain)))
    for name in inputs:
        assert_within_budget(f"gradient of {name}", *(g[name] for g in (grads, truth_grads, plain_grads)))


@pytest.mark.parametrize("budget", [1, 100, 2000])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_blocking_does_not_change_the_result(case, budget, fixed_seed, poisoned, monkeypatch):
    inputs, gradients = case.inputs(torch.float64), case.gradients(torch.float64)
    result, grads = run(case, inputs, gradients)

    def small(key, queries):
        for b in range(key.shape[0]):
            step = max(1, budget // (queries * key.shape[1]))
            for h in range(0, key.shape[2], step):
                yield range(b, b + 1), range(h, min(h + step, key.shape[2]))

    monkeypatch.setattr(atm, "_blocks", small)
    blocked, blocked_grads = run(case, inputs, gradients)
    torch.testing.assert_close(tuple(blocked), tuple(result))
    torch.testing.assert_close(blocked_grads, grads)


@pytest.mark.parametrize("outputs", ["both", "output", "masks"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradcheck(outputs, dropout_p, batch, fixed_seed):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 3, 2, 4), (batch, 5, 2, 4), (batch, 5, 2, 4), (batch, 3, 5)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]

    def call(query, key, value, previous):
        result = fused_atm(query, key, value, previous_masks=previous, dropout_p=dropout_p)
        return {"both": tuple(result), "output": result.output, "masks": result.mask_logits}[outputs]

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("dropped", ["mask gradient", "delta"])
def test_a_planted_bug_turns_the_battery_red(dropped, monkeypatch):
    case = CASES[3]
    inputs, gradients = case.inputs(torch.float32), case.gradients(torch.float32)
    truth, plain = (oracle(case, inputs, gradients, dtype=d)[1] for d in (torch.float64, torch.float32))
    original = atm.bwd_eager

    def wrong(grad_output, grad_masks, query, key, value, output, *rest):
        if dropped == "mask gradient":
            grad_masks = None
        else:
            output = torch.zeros_like(output)
        return original(grad_output, grad_masks, query, key, value, output, *rest)

    monkeypatch.setattr(atm._library._operators["atm_bwd"], "eager", wrong)
    _, grads = run(case, inputs, gradients)
    for name in ("query", "key"):
        with pytest.raises(AssertionError, match="budget"):
            assert_within_budget(name, grads[name], truth[name], plain[name])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_opcheck(case):
    inputs, (grad_output, grad_masks) = case.inputs(torch.float32), case.gradients(torch.float32)
    tensors = [inputs[n] for n in ("query", "key", "value")]
    seed = SEED if case.dropout_p else None
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    forward = (*tensors, inputs.get("previous_masks"), seed, 0.2, case.dropout_p, True)
    torch.library.opcheck(torch.ops.segvit.atm_fwd.default, forward, test_utils=utils)
    output, _, lse = torch.ops.segvit.atm_fwd(*forward)
    for grads in ((grad_output, grad_masks), (None, grad_masks), (grad_output, None)):
        backward = (*grads, *tensors, output, lse, seed, 0.2, case.dropout_p, True)
        torch.library.opcheck(torch.ops.segvit.atm_bwd.default, backward, test_utils=utils)


def test_meta_tensors():
    query, key = torch.empty(2, 5, 3, 16, device="meta"), torch.empty(2, 9, 3, 16, device="meta")
    output, masks = fused_atm(query, key, key)
    assert output.shape == (2, 5, 3, 16) and masks.shape == (2, 5, 9) and output.is_meta


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_flops(case):
    inputs, gradients = case.inputs(torch.float32), case.gradients(torch.float32)
    product = case.batch * case.heads * case.queries * case.keys * case.head_dim
    with FlopCounterMode(display=False) as counter:
        run(case, inputs, gradients)
    assert counter.get_total_flops() == 2 * (2 + 5) * product


def test_fvcore_counts_the_operator():
    fvcore = pytest.importorskip("fvcore.nn")

    class Layer(torch.nn.Module):
        def forward(self, query, key):
            return fused_atm(query, key, key)

    query, key = torch.randn(2, 5, 3, 16), torch.randn(2, 9, 3, 16)
    analysis = fvcore.FlopCountAnalysis(Layer(), (query, key)).set_op_handle(**fvcore_handles())
    analysis.unsupported_ops_warnings(False)
    assert analysis.total() == 2 * 2 * 5 * 9 * 3 * 16


def test_compile_fullgraph_and_second_size(fixed_seed):
    torch._dynamo.reset()
    frames = []

    def backend(graph, examples):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(fused_atm, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (9, 14, 21):
        q, k, v = (torch.randn(2, n, 3, 16, requires_grad=True) for n in (5, tokens, tokens))
        expected = fused_atm(q, k, v)
        actual = compiled(q, k, v)
        torch.testing.assert_close(tuple(actual), tuple(expected))
        grads = [
            torch.autograd.grad([r.output.sum() + r.mask_logits.square().sum()], [q, k, v])
            for r in (actual, expected)
        ]
        torch.testing.assert_close(*grads)
    assert len(frames) == 1


def test_compile_with_one_tensor_twice():
    """Dynamo refuses a Function that gets a tensor twice."""
    torch._dynamo.reset()
    features = torch.randn(2, 9, 3, 16, requires_grad=True)
    compiled = torch.compile(lambda x: fused_atm(x, x, x).output, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(features).sum(), features)
    (expected,) = torch.autograd.grad(fused_atm(features, features, features).output.sum(), features)
    torch.testing.assert_close(actual, expected)


def test_compile_with_inductor_and_dropout():
    torch._dynamo.reset()
    layer = FusedATM(32, 2, attn_drop=0.5)
    compiled = torch.compile(layer, fullgraph=True)
    query, features = torch.randn(1, 5, 32), torch.randn(2, 40, 32)
    torch.manual_seed(0)
    first, _ = compiled(query, features)
    second, masks = compiled(query, features)
    assert not torch.equal(first, second)
    torch.testing.assert_close(masks, layer(query, features).mask_logits)
    first.sum().backward()
    assert layer.v.weight.grad.norm() > 0


def test_export():
    layer = FusedATM(32, 2).eval()
    query, features = torch.randn(1, 5, 32), torch.randn(2, 40, 32)
    program = torch.export.export(layer, (query, features))
    torch.testing.assert_close(tuple(program.module()(query, features)), tuple(layer(query, features)))
    assert "segvit.atm_fwd" in str(program.graph)


def test_activation_checkpointing_draws_the_same_dropout():
    from torch.utils.checkpoint import checkpoint

    q, k = torch.randn(2, 5, 2, 16, requires_grad=True), torch.randn(2, 9, 2, 16, requires_grad=True)
    grads = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        torch.manual_seed(3)
        output, masks = wrap(lambda q, k: tuple(fused_atm(q, k, k, dropout_p=0.5)), q, k)
        grads.append(torch.autograd.grad((output.square().sum() + masks.sum()), [q, k]))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_autocast_keeps_float32_statistics():
    case = dataclasses.replace(CASES[3], previous_masks=False)
    inputs = case.inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, masks = fused_atm(**inputs)
    assert output.dtype == masks.dtype == torch.bfloat16
    rounded = fused_atm(**{n: t.bfloat16() for n, t in inputs.items()})
    torch.testing.assert_close((output, masks), tuple(rounded), rtol=0, atol=0)
    truth = atm_reference(**{n: t.bfloat16().double() for n, t in inputs.items()})
    assert relative_error(output, truth.output) < RELATIVE_NORM[torch.bfloat16]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_inputs_are_not_changed_and_results_repeat(case):
    inputs, gradients = case.inputs(torch.float32), case.gradients(torch.float32)
    before = {n: t.clone() for n, t in inputs.items()}
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        result, grads = run(case, inputs, gradients, deterministic=True)
        runs.append((tuple(result), grads))
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_layouts_give_the_same():
    q, k, v = torch.randn(2, 5, 3, 16), torch.randn(2, 9, 3, 16), torch.randn(2, 9, 3, 16)
    expected = fused_atm(q, k, v)
    odd = [t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in (q, k, v)]  # last stride not 1
    assert odd[0].stride(-1) != 1
    torch.testing.assert_close(tuple(fused_atm(*odd)), tuple(expected), rtol=0, atol=0)
    one = fused_atm(q[:1].expand(2, -1, -1, -1), k, v)
    torch.testing.assert_close(tuple(one), tuple(fused_atm(q[:1], k, v)), rtol=0, atol=0)


def test_empty_batch():
    q, k = torch.randn(1, 5, 3, 16, requires_grad=True), torch.randn(0, 9, 3, 16, requires_grad=True)
    output, masks = fused_atm(q, k, k)
    assert output.shape == (0, 5, 3, 16) and masks.shape == (0, 5, 9)
    grads = torch.autograd.grad(output.sum() + masks.sum(), [q, k])
    assert grads[0].shape == q.shape and not grads[0].any()


def test_large_scores_stay_finite():
    q, k = torch.randn(1, 4, 2, 16) * 1e3, torch.randn(1, 9, 2, 16) * 1e3
    result, truth = fused_atm(q, k, k), atm_reference(q.double(), k.double(), k.double())
    torch.testing.assert_close(result.output.double(), truth.output, rtol=1e-4, atol=1e-2)


def test_previous_masks_accumulate():
    q, k = torch.randn(1, 4, 2, 16), torch.randn(1, 9, 2, 16)
    first = fused_atm(q, k, k).mask_logits
    torch.testing.assert_close(fused_atm(q, k, k, previous_masks=first).mask_logits, 2 * first)


class TestDropout:
    def test_philox_known_answers(self):
        """Known answers published with the generator: zeros, all ones, and digits of pi."""
        ones = 0xFFFFFFFF
        cases = [
            ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
            (
                (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
                (0xA4093822, 0x299F31D0),
                (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            ),
        ]
        for counter, key, answer in cases:
            words = philox(
                tuple(map(torch.tensor, key)), tuple(torch.tensor(c, dtype=torch.int64) for c in counter)
            )
            assert tuple(w.item() for w in words) == answer

    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_statistics(self, p):
        keep = keep_mask(SEED, p, range(4), range(8), 8, 50, 99)
        n = keep.numel()
        assert abs(keep.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
        # Neighbours in every direction are independent: correlations are within five standard errors of 0.
        x = (keep.double() - (1 - p)) / (p * (1 - p)) ** 0.5
        for dim in range(4):
            a, b = x.narrow(dim, 0, x.shape[dim] - 1), x.narrow(dim, 1, x.shape[dim] - 1)
            assert abs((a * b).mean().item()) < 5 / a.numel() ** 0.5

    def test_blocks_of_the_mask_agree(self):
        whole = keep_mask(SEED, 0.4, range(3), range(5), 5, 7, 13)
        torch.testing.assert_close(keep_mask(SEED, 0.4, range(1, 2), range(2, 4), 5, 7, 13), whole[1:2, 2:4])

    def test_expectation_is_kept_and_extremes(self):
        assert dropout_threshold(0.999999) == 65535 and dropout_scale(0.0) == 1.0
        q, k, v = torch.randn(1, 4, 2, 16), torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16)
        torch.manual_seed(0)
        mean = torch.stack([fused_atm(q, k, v, dropout_p=0.3).output for _ in range(600)]).mean(0)
        torch.testing.assert_close(mean, fused_atm(q, k, v).output, atol=0.12, rtol=0)

    def test_masks_see_no_dropout_and_seeds_differ(self):
        q, k = torch.randn(1, 4, 2, 16), torch.randn(1, 9, 2, 16)
        a, b = fused_atm(q, k, k, dropout_p=0.5), fused_atm(q, k, k, dropout_p=0.5)
        assert not torch.equal(a.output, b.output)
        torch.testing.assert_close(a.mask_logits, fused_atm(q, k, k).mask_logits, rtol=0, atol=0)


class TestModule:
    def test_matches_multihead_attention(self):
        layer = FusedATM(48, 3)
        theirs = torch.nn.MultiheadAttention(48, 3, batch_first=True)
        with torch.no_grad():
            for linear in (layer.q, layer.k, layer.v, layer.proj):
                torch.nn.init.normal_(linear.weight)
                torch.nn.init.normal_(linear.bias)
            theirs.in_proj_weight.copy_(torch.cat([layer.q.weight, layer.k.weight, layer.v.weight]))
            theirs.in_proj_bias.copy_(torch.cat([layer.q.bias, layer.k.bias, layer.v.bias]))
            theirs.out_proj.load_state_dict(layer.proj.state_dict())
        query, features, value = torch.randn(2, 5, 48), torch.randn(2, 11, 48), torch.randn(2, 11, 48)
        torch.testing.assert_close(
            layer(query, features, value).output, theirs(query, features, value)[0], rtol=1e-4, atol=1e-4
        )

    def test_parameters_and_options(self):
        layer = FusedATM(32, 2, qkv_bias=False)
        assert sorted(layer.state_dict()) == ["k.weight", "proj.bias", "proj.weight", "q.weight", "v.weight"]
        output, masks = layer(torch.randn(1, 3, 32), torch.randn(4, 7, 32), need_masks=False)
        assert output.shape == (4, 3, 32) and masks is None
        dropping = FusedATM(32, 2, attn_drop=0.9, proj_drop=0.9).eval()
        args = torch.randn(1, 3, 32), torch.randn(4, 7, 32)
        assert torch.equal(dropping(*args).output, dropping(*args).output)
        with pytest.raises(ValueError, match="num_heads is 5; expected a divisor of embed_dim 32"):
            FusedATM(32, 5)

    @pytest.mark.parametrize("projected", [False, True])
    def test_gradients_reach_every_parameter(self, projected):
        layer = FusedATM(32, 2)
        query, features = torch.randn(1, 3, 32), torch.randn(4, 7, 32)
        if projected:
            result = layer.attend(layer.q(query), layer.k(features), layer.v(features))
        else:
            result = layer(query, features)
        (result.output.square().sum() + result.mask_logits.square().sum()).backward()
        assert all(p.grad is not None for p in layer.parameters())
