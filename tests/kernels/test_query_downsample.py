"""QueryDownsample: equal to the block run on all tokens and then subsampled, for our blocks and timm's."""

import copy

import pytest
import torch
from torch import nn

from segvit.config import BackboneConfig
from segvit.model.backbone import Block
from segvit_kernels.modules import QueryDownsample
from segvit_kernels.testing import RELATIVE_NORM, relative_error

PLACES = {
    "even": ((4, 6), 2, 0),
    "odd": ((5, 7), 2, 1),
    "row": ((1, 5), 2, 0),
    "stride_3": ((7, 4), 3, 5),
    "beyond": ((2, 3), 4, 1),
}


class SeparateAttention(nn.Module):
    """Attention with three projections, as many models write it."""

    def __init__(self, width, heads, names=("q", "k", "v"), key_width=None):
        super().__init__()
        self.num_heads, self.names = heads, names
        for name in names:
            setattr(self, name, nn.Linear(width, width if name == names[0] else key_width or width))
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (
            getattr(self, n)(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for n in self.names
        )
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def ours(**changes):
    config = BackboneConfig(width=24, depth=1, heads=3, **({"layer_scale": 0.1} | changes))
    return randomised(Block(config, drop_path=0.0))


def timms(**changes):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    return randomised(vision_transformer.Block(24, 3, **({"qkv_bias": True} | changes)))


def separate(names=("q", "k", "v")):
    block = ours()
    block.attn = SeparateAttention(24, 3, names)
    return randomised(block)


def swiglu():
    layers = pytest.importorskip("timm.layers")
    return timms(mlp_layer=layers.SwiGLU, scale_mlp_norm=True)


def randomised(block):
    """Every parameter matters (no zero biases, no vanishing branches), and softmax is not saturated."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.15 * noise if p.ndim > 1 else 1 + 0.3 * noise)
    return block


BLOCKS = {
    "ours": ours,
    "ours_plain": lambda: ours(layer_scale=None, qkv_bias=False),
    "ours_swiglu": lambda: ours(mlp="swiglu"),
    "separate": separate,
    "separate_proj": lambda: separate(("q_proj", "k_proj", "v_proj")),
    "timm": timms,
    "timm_no_bias": lambda: timms(qkv_bias=False, proj_bias=False),
    "timm_layer_scale": lambda: timms(init_values=0.1, drop_path=0.0),
    "timm_qk_norm": lambda: timms(qk_norm=True, scale_attn_norm=True),
    "timm_swiglu": swiglu,
}


def subsample(tokens, grid, stride, prefix):
    """Written apart from the package's: an index for every kept token."""
    height, width = grid
    kept = [prefix + y * width + x for y in range(0, height, stride) for x in range(0, width, stride)]
    return tokens[:, [*range(prefix), *kept]]


def run(block, x, place, downsample):
    """Output and gradients, by name, of the block at the kept tokens."""
    grid, stride, prefix = place
    x = x.detach().requires_grad_()
    if downsample:
        module = QueryDownsample(block, stride)
        output = module(x, grid, prefix)
    else:
        output = subsample(block(x), grid, stride, prefix)
    parameters = dict(block.named_parameters())
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    grads = torch.autograd.grad((output * weights).sum(), [x, *parameters.values()])
    return {"output": output.detach(), **dict(zip(["x", *parameters], grads, strict=True))}


def tokens(place, dtype, batch=2, width=24):
    (height, columns), _, prefix = place
    x = torch.randn(batch, prefix + height * columns, width, generator=torch.Generator().manual_seed(1))
    return (2 * x + 0.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_equals_the_subsampled_block(make, place, dtype):
    x, block = tokens(place, dtype), make().train()
    truth = run(copy.deepcopy(block).double(), x.double(), place, downsample=False)
    found = run(block.to(dtype), x, place, downsample=True)
    assert found.keys() == truth.keys()
    for name in found:
        if name in ("attn.k.bias", "attn.k_proj.bias", "attn.k_norm.bias"):
            # Softmax does not see it: the gradient is the rounding of terms that cancel.
            assert found[name].abs().max() <= 1e3 * torch.finfo(dtype).eps
            continue
        assert relative_error(found[name], truth[name]) < RELATIVE_NORM[dtype], name


@pytest.mark.parametrize("make", [ours, timms], ids=["ours", "timm"])
def test_half_precision(make):
    place = PLACES["odd"]
    x, block = tokens(place, torch.bfloat16), make().bfloat16()
    module = QueryDownsample(block)
    truth = subsample(copy.deepcopy(block).double()(x.double()), *place)
    assert relative_error(module(x, place[0], place[2]), truth) < RELATIVE_NORM[torch.bfloat16]


def test_autocast():
    place = PLACES["odd"]
    x, block = tokens(place, torch.float32), timms(qk_norm=True)
    truth = subsample(copy.deepcopy(block).double()(x.double()), *place)
    with torch.autocast("cpu", torch.bfloat16):
        output = QueryDownsample(block)(x, place[0], place[2])
        plain = subsample(block(x), *place)
    assert output.dtype == plain.dtype
    assert relative_error(output, truth) < 2 * relative_error(plain, truth)


@pytest.mark.parametrize("dropped", ["drop_path", "proj_drop"])
def test_drops_the_branches_that_the_block_drops(dropped):
    """Stochastic depth is drawn per image: the same seed drops the same. Dropout only while training."""
    place = PLACES["even"]
    block, x = timms(**{dropped: 0.5}).train(), tokens(place, torch.float64, batch=8)
    block = block.double()
    module, results = QueryDownsample(block), []
    for call in (lambda: module(x, place[0]), lambda: subsample(block(x), *place)):
        torch.manual_seed(3)
        results.append(call())
    if dropped == "drop_path":
        torch.testing.assert_close(*results)
    assert not torch.equal(module(x, place[0]), module(x, place[0]))
    module.eval()
    torch.testing.assert_close(module(x, place[0]), subsample(block.eval()(x), *place))


def test_attention_dropout_is_drawn_in_training_only():
    place = PLACES["even"]
    block, x = timms(attn_drop=0.5).double(), tokens(place, torch.float64)
    module = QueryDownsample(block.eval())
    assert not module.training
    expected = module(x, place[0])
    torch.testing.assert_close(expected, subsample(block(x), *place))
    module.train()
    assert not torch.equal(module(x, place[0]), module(x, place[0]))


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_keys_of_the_state_dict_are_those_of_the_block(make):
    block = make()
    keys = list(block.state_dict())
    module = QueryDownsample(block)
    assert sorted(module.state_dict()) == sorted(keys)
    assert {id(p) for p in module.parameters()} == {id(p) for p in block.parameters()}


def test_in_a_vision_transformer_of_timm():
    """Two stages of a whole model with class and register tokens, against all tokens up to the end."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_base_patch16_224",
        img_size=(80, 112),
        patch_size=16,
        embed_dim=24,
        depth=3,
        num_heads=3,
        reg_tokens=4,
        init_values=0.1,
        num_classes=0,
        global_pool="",
    ).eval()
    randomised(model).double()
    images = torch.randn(2, 3, 80, 112, dtype=torch.float64)
    inputs = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    expected = subsample(model.blocks[1](model.blocks[0](inputs)), (5, 7), 2, 5)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    model.blocks[1] = QueryDownsample(model.blocks[1])
    model.load_state_dict(state)
    found = model.blocks[1](model.blocks[0](inputs), (5, 7), 5)
    torch.testing.assert_close(found, expected)
    assert model.blocks[2](found).shape == (2, 5 + 3 * 4, 24)


def test_compile_fullgraph_and_second_grid():
    torch._dynamo.reset()
    frames = []

    def backend(graph, examples):
        frames.append(graph)
        return graph.forward

    module = QueryDownsample(ours())
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for grid in ((4, 6), (5, 9), (7, 3)):
        x = tokens((grid, 2, 1), torch.float32).requires_grad_()
        results = [f(x, grid, 1) for f in (compiled, module)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(r.square().sum(), [x]) for r in results))
    assert len(frames) == 1


def test_checkpointing_and_empty_batch():
    from torch.utils.checkpoint import checkpoint

    place = PLACES["odd"]
    module, x = QueryDownsample(ours()), tokens(place, torch.float32).requires_grad_()
    grads = [
        torch.autograd.grad(call().square().sum(), [x, *module.parameters()])
        for call in (
            lambda: module(x, place[0], 1),
            lambda: checkpoint(module, x, place[0], 1, use_reentrant=False),
        )
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert module(x[:0], place[0], 1).shape == (0, 1 + 3 * 4, 24)


def with_attention(change):
    block = ours()
    change(block)
    return block


def relative_position(block):
    block.attn.bias_table = nn.Parameter(torch.zeros(9))


def rms_norm(block):
    block.norm1 = nn.RMSNorm(24)


def grouped(block):
    block.attn = SeparateAttention(24, 3, key_width=8)


class RotaryAttention(SeparateAttention):
    def forward(self, x, rope=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: delattr(b, "attn"), r"block \(Block\) has no attn; expected a pre-norm block"),
        (lambda b: (delattr(b, "ls1"), delattr(b, "mlp")), "has no ls1, mlp; expected"),
        (rms_norm, r"block\.norm1 \(RMSNorm\) is no LayerNorm"),
        (
            lambda b: setattr(b, "norm1", nn.LayerNorm((2, 24))),
            r"block\.norm1 .* is no LayerNorm of the chan",
        ),
        (
            lambda b: setattr(b, "gamma", nn.Parameter(torch.ones(24))),
            "has gamma; expected nothing but norm1",
        ),
        (lambda b: setattr(b, "adapter", nn.Linear(24, 24)), "has adapter; expected nothing but"),
        (lambda b: delattr(b.attn, "qkv"), "has no qkv, nor q, k and v, nor q_proj, k_proj and v_proj"),
        (lambda b: delattr(b.attn, "proj"), r"block\.attn \(Attention\) has no proj$"),
        (lambda b: delattr(b.attn, "heads"), "has no num_heads nor heads"),
        (lambda b: setattr(b.attn, "heads", 5), "has projections qkv that do not fit 5 equal heads"),
        (relative_position, r"block\.attn \(Attention\) has bias_table; expected nothing but"),
        (grouped, "has projections q, k, v that do not fit 3 equal heads"),
        (lambda b: setattr(b, "attn", RotaryAttention(24, 3)), "takes rotary positions"),
        (lambda b: setattr(b.attn, "qkv", nn.Tanh()), "has projections qkv without out_features"),
        (
            lambda b: b.register_forward_hook(lambda m, x, y: 2 * y),
            r"block \(Block\) has hooks or a forward on",
        ),
        (lambda b: setattr(b.attn, "forward", lambda x: 2 * x), r"block\.attn \(Attention\) has hooks or a"),
    ],
)
def test_refuses_what_it_does_not_understand(change, message):
    block = ours()
    QueryDownsample(block)
    change(block)
    with pytest.raises(TypeError, match=message):
        QueryDownsample(block)


@pytest.mark.parametrize("name", ["ResPostBlock", "ParallelScalingBlock", "ParallelThingsBlock"])
def test_refuses_other_blocks_of_timm(name):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    with pytest.raises(TypeError, match=rf"block \({name}\) has no "):
        QueryDownsample(getattr(vision_transformer, name)(24, 3))


def test_refuses_attention_that_timm_gates_or_rotates():
    layers = pytest.importorskip("timm.layers")
    block = ours()
    for attention, message in (
        (layers.Attention(24, 3, gated=True), "has gate; expected nothing but"),
        (layers.AttentionRope(24, 3), "takes rotary positions"),
    ):
        block.attn = attention
        with pytest.raises(TypeError, match=message):
            QueryDownsample(block)


def test_bad_arguments():
    with pytest.raises(ValueError, match="stride is 0; expected a positive integer"):
        QueryDownsample(ours(), stride=0)
    with pytest.raises(TypeError, match=r"block \(int\) has no norm1, attn"):
        QueryDownsample(3)
    with pytest.raises(ValueError, match="x has 24 tokens; expected 25, 0 of the prefix and 5×5 of the grid"):
        QueryDownsample(ours())(torch.randn(1, 24, 24), (5, 5))
