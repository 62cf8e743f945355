"""attention_weights, and FusedATM in place of nn.MultiheadAttention."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from segvit_kernels import FusedATM, attention_weights, attention_weights_reference
from segvit_kernels.ops import _parts

DIM, HEADS = 24, 3


def tensors(dtype=torch.float64, own_queries=True):
    generator = torch.Generator().manual_seed(0)
    shapes = (2 if own_queries else 1, 5, HEADS, 8), (2, 9, HEADS, 8)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


PADDING = torch.zeros(2, 9, dtype=torch.bool)
PADDING[0, 6:] = True
NONE_LEFT = PADDING | torch.tensor([[False], [True]])


@pytest.fixture(params=[None, 1], ids=["all images", "an image a block"])
def blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setitem(_parts.BUDGETS, "cpu", request.param)


@pytest.mark.parametrize("padding", [None, PADDING, NONE_LEFT], ids=["none", "some", "all"])
@pytest.mark.parametrize("queries", [True, False], ids=["queries", "shared"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_weights_and_gradients(dtype, queries, padding, blocks):
    given = [t.requires_grad_() for t in tensors(dtype, queries)]
    exact = [t.detach().double().clone().requires_grad_() for t in given]
    if padding is not None:
        with torch.no_grad():
            given[1].masked_fill_(padding[..., None, None], torch.nan)  # not looked at
    found = attention_weights(*given, key_padding_mask=padding)
    truth = attention_weights_reference(*exact, key_padding_mask=padding)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert found.dtype == dtype and found.shape == (2, 5, 9)
    torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=tolerance)
    weights = torch.rand_like(truth)
    gradients = [
        torch.autograd.grad((w.double() * weights).sum(), leaves)
        for w, leaves in ((found, given), (truth, exact))
    ]
    for own, true in zip(*gradients, strict=True):
        torch.testing.assert_close(own.double(), true, rtol=3 * tolerance, atol=tolerance)


@pytest.mark.parametrize("padding", [None, NONE_LEFT], ids=["none", "some"])
def test_autocast_casts_the_inputs_alone(padding):
    given = [t.requires_grad_() for t in tensors(torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention_weights(*given, key_padding_mask=padding)
        gradients = torch.autograd.grad(found.float().square().sum(), given)
    rounded = [t.detach().bfloat16().requires_grad_() for t in given]
    expected = attention_weights(*rounded, key_padding_mask=padding)
    assert torch.equal(found, expected)
    truth = torch.autograd.grad(expected.float().square().sum(), rounded)
    assert all(torch.equal(own, true.float()) for own, true in zip(gradients, truth, strict=True))
    options = {"scale": 8.0, "key_padding_mask": padding}  # scores of which rounding would leave little
    query, key = (t.detach() for t in given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (mapped,) = torch.func.vmap(lambda q: attention_weights(q, key, **options))(query[None])
    torch.testing.assert_close(mapped, attention_weights(*rounded, **options), rtol=2**-7, atol=1e-6)


def test_gradcheck_and_transforms():
    query, key = (t[:1, :3, :2, :2].clone().requires_grad_() for t in tensors())
    assert torch.autograd.gradcheck(attention_weights, (query, key))
    with pytest.raises(RuntimeError, match="attention_weights has no second derivative"):
        (gradient,) = torch.autograd.grad(attention_weights(query, key)[0, 0, 0], query, create_graph=True)
        torch.autograd.grad(gradient.sum(), query)
    gradient = torch.func.grad(lambda q: attention_weights(q, key.detach())[0, 0, 0])(query.detach())
    (expected,) = torch.autograd.grad(attention_weights(query, key)[0, 0, 0], query)
    torch.testing.assert_close(gradient, expected)


def test_transforms_look_at_no_padding_and_sum_in_full_precision():
    def of(query, key):
        return attention_weights(query, key, key_padding_mask=PADDING).square().sum()

    query, key = tensors(torch.float32)
    key = key.masked_fill(PADDING[..., None, None], torch.nan)
    expected = torch.autograd.grad(of(*(leaves := (query.requires_grad_(), key.requires_grad_()))), leaves)
    found = torch.func.grad(of, (0, 1))(query.detach(), key.detach())
    torch.testing.assert_close(found, expected)
    scores = torch.full((1, 2, 1, 8), 250.0, dtype=torch.float16)  # whose products no float16 holds
    assert torch.func.vmap(lambda q: attention_weights(q, scores))(scores[None]).eq(0.5).all()


def test_compile_fullgraph_and_second_batch():
    torch._dynamo.reset()
    frames = []

    def backend(graph, examples):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(attention_weights, fullgraph=True, backend=backend)
    for times in (1, 2):
        query, key, padding = (t.repeat_interleave(times, 0) for t in (*tensors(torch.float32), PADDING))
        query, key, runs = query.requires_grad_(), key.requires_grad_(), []
        for given in (query, key, padding):
            torch._dynamo.mark_dynamic(given, 0)
        for call in (compiled, attention_weights):
            weights = call(query, key, key_padding_mask=padding)
            runs.append((weights, *torch.autograd.grad(weights.square().sum(), (query, key))))
        torch.testing.assert_close(*runs)
    assert len(frames) == 1


class Largest(TorchDispatchMode):
    """The elements of the largest memory of floating-point numbers that an operation gives."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.numel = max(self.numel, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_one_heads_weights_of_an_image_are_in_memory(monkeypatch):
    monkeypatch.setitem(_parts.BUDGETS, "cpu", 1)
    query, key = torch.randn(1, 60, 8, 4, requires_grad=True), torch.randn(1, 70, 8, 4, requires_grad=True)
    with Largest() as largest:
        attention_weights(query, key).square().sum().backward()
    assert largest.numel == 60 * 70  # all heads' are eight times as many


@pytest.mark.parametrize("padding", [None, PADDING], ids=["", "padding"])
@pytest.mark.parametrize("other", [False, True], ids=["self", "kdim"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "batch second"])
def test_from_multihead(batch_first, bias, other, padding):
    torch.manual_seed(0)
    sizes = {"kdim": 10, "vdim": 7} if other else {}
    attention = nn.MultiheadAttention(
        DIM, HEADS, bias=bias, batch_first=batch_first, dtype=torch.float64, **sizes
    ).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer = FusedATM.from_multihead(attention)
    assert not layer.training and layer.q.weight.dtype == torch.float64
    query = torch.randn(2, 5, DIM, dtype=torch.float64)
    key, value = (torch.randn(2, 9, sizes.get(n, DIM), dtype=torch.float64) for n in ("kdim", "vdim"))
    given = [query, key, value]
    theirs = attention(
        *(given if batch_first else [t.transpose(0, 1) for t in given]), key_padding_mask=padding
    )
    expected = theirs[0] if batch_first else theirs[0].transpose(0, 1)
    found = layer(*given, key_padding_mask=padding, need_weights="mean")
    torch.testing.assert_close(found.output, expected)
    torch.testing.assert_close(found.weights, theirs[1])
    assert found.mask_logits.shape == found.weights.shape
    output, masks = layer(*given, need_masks=False)
    assert masks is None and output.shape == expected.shape


@pytest.mark.parametrize("recorded", [True, False], ids=["", "no_grad"])
def test_from_multihead_keeps_frozen_what_is(recorded):
    attention = nn.MultiheadAttention(DIM, HEADS)
    attention.in_proj_weight.requires_grad_(False)
    attention.out_proj.bias.requires_grad_(False)
    with torch.set_grad_enabled(recorded):
        layer = FusedATM.from_multihead(attention)
    frozen = {name for name, parameter in layer.named_parameters() if not parameter.requires_grad}
    assert frozen == {"q.weight", "k.weight", "v.weight", "proj.bias"}
    assert all(parameter.is_leaf for parameter in layer.parameters())


def test_from_multihead_takes_nothing_but_the_formula():
    derived = type("Mine", (nn.MultiheadAttention,), {"forward": lambda self, *args: None})
    with pytest.raises(TypeError, match="attention is a Mine with a forward of its own; expected an"):
        FusedATM.from_multihead(derived(DIM, HEADS))
    hooked = nn.MultiheadAttention(DIM, HEADS)
    hook = hooked.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    with pytest.raises(TypeError, match="attention is a MultiheadAttention with hooks; expected an"):
        FusedATM.from_multihead(hooked)
    hook.remove()
    assert FusedATM.from_multihead(type("Mine", (nn.MultiheadAttention,), {})(DIM, HEADS))


def test_from_multihead_copies():
    attention = nn.MultiheadAttention(DIM, HEADS, dropout=0.25)
    layer = FusedATM.from_multihead(attention)
    assert layer.attn_drop == 0.25 and layer.training
    with torch.no_grad():
        attention.in_proj_weight.zero_()
    assert layer.q.weight.any()
    assert set(layer.state_dict()) == set(FusedATM(DIM, HEADS).state_dict())


@pytest.mark.parametrize(
    ("attention", "error", "message"),
    [
        (nn.Linear(2, 2), TypeError, r"attention is a Linear; expected an nn\.MultiheadAttention"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), ValueError, "attention has add_bias_kv=True"),
        (nn.MultiheadAttention(4, 2, add_zero_attn=True), ValueError, "attention has add_zero_attn=True"),
    ],
)
def test_from_multihead_refuses(attention, error, message):
    with pytest.raises(error, match=message):
        FusedATM.from_multihead(attention)


def test_refusals():
    query, key = tensors()
    with pytest.raises(ValueError, match="need_weights is True; expected None or 'mean'"):
        FusedATM(DIM, HEADS)(torch.zeros(1, 2, DIM), torch.zeros(1, 3, DIM), need_weights=True)
    for given, error, message in (
        ((query.float(), key), TypeError, "key has dtype torch.float64; expected torch.float32"),
        ((query[..., :4], key), ValueError, r"key has shape \(2, 9, 3, 8\); expected \(2, 9, 3, 4\)"),
        ((query[0], key), ValueError, r"query has shape \(5, 3, 8\)"),
        ((query, 3), TypeError, "key is a int; expected a tensor"),
    ):
        with pytest.raises(error, match=message):
            attention_weights(*given)
    with pytest.raises(TypeError, match=r"key_padding_mask is torch\.float64; expected a bool"):
        attention_weights(query, key, key_padding_mask=PADDING.double())
