"""Modules as PyTorch's users treat them: LoRA, parametrizations, hooks, pickle, export, transforms."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune

from segvit import SegViT, SegViTConfig
from segvit.model.backbone import Block
from segvit_kernels import (
    BackendUnavailableError,
    Folded,
    FusedATM,
    PackedLinear,
    QueryDownsample,
    QueryUpsample,
    atm_reference,
    fused_atm,
    is_plain,
    mask_loss,
    mask_loss_reference,
    query_attention,
    query_attention_reference,
    subsample_layer_norm,
    subsample_layer_norm_reference,
)

ROOT = Path(__file__).resolve().parents[2]
LONG = pytest.mark.skipif("SEGVIT_LONG_TESTS" not in os.environ, reason="set SEGVIT_LONG_TESTS=1")
LAYERS = (nn.Linear, PackedLinear, nn.LayerNorm, nn.Conv2d)
SIZES = {"width": 32, "depth": 2, "heads": 2, "image_size": 64, "decoder_depth": 2, "taps": (0, 1)}
SHRUNK = {"shrunk": True, "shrink_at": 1}
MODELS = pytest.mark.parametrize("options", [{}, {**SHRUNK, "key_positions": True}], ids=["full", "shrunk"])


def segvit(options, seed=0):
    torch.manual_seed(seed)
    return SegViT(SegViTConfig.preset("vit_tiny", 3, **{**SIZES, **options})).eval()


class Adapter(nn.Module):
    """A layer and a part beside it, as peft adds them: for linear layers of low rank."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.a, self.b = (nn.Parameter(p) for p in self.parts(base))

    @staticmethod
    def parts(base):
        generator = torch.Generator().manual_seed(0)
        if isinstance(base, nn.Linear):
            shapes = (4, base.in_features), (base.out_features, 4)
        else:
            shapes = base.weight.shape, (1,)
        return [0.2 * torch.randn(shape, generator=generator) for shape in shapes]

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)
    in_features = property(lambda self: self.base_layer.in_features)
    out_features = property(lambda self: self.base_layer.out_features)

    def delta(self):
        return self.b @ self.a if isinstance(self.base_layer, nn.Linear) else self.a * self.b

    def forward(self, x):
        base = self.base_layer
        layer = torch.func.functional_call(base, {"weight": base.weight + self.delta()}, (x,))
        return layer

    def merged(self):
        layer = copy.deepcopy(self.base_layer)
        layer.weight.data += self.delta().data
        return layer


class Shifted(nn.Module):
    def __init__(self, delta):
        super().__init__()
        self.delta = nn.Parameter(delta)

    def forward(self, weight):
        return weight + self.delta


class OtherLinear(nn.Linear):
    def forward(self, x):
        return 1.5 * super().forward(x)


def layers(model):
    return [(p, n, c) for p in model.modules() for n, c in p.named_children() if type(c) in LAYERS]


def adapter(parent, name, layer):
    setattr(parent, name, Adapter(layer))
    return Adapter(layer).merged()


def parametrization(parent, name, layer):
    delta = Adapter(layer).delta().detach()
    merged = Adapter(layer).merged()
    parametrize.register_parametrization(layer, "weight", Shifted(delta))
    return merged


def hook(parent, name, layer):
    merged = copy.deepcopy(layer)
    for parameter in merged.parameters():
        parameter.data *= 1.25
    layer.register_forward_hook(lambda module, args, output: 1.25 * output)
    return merged


def pre_hook(parent, name, layer):
    merged = copy.deepcopy(layer)
    if not isinstance(layer, nn.LayerNorm):
        merged.weight.data *= 1.25
        layer.register_forward_pre_hook(lambda module, args: (1.25 * args[0],))
    return merged


def pruned(parent, name, layer):
    merged = copy.deepcopy(layer)
    if not isinstance(layer, nn.LayerNorm):
        prune.l1_unstructured(layer, "weight", 0.5)
        merged.weight.data = layer.weight.detach().clone()
        with torch.no_grad():
            layer.weight_orig.mul_(1.0)
    return merged


def subclass(parent, name, layer):
    merged = copy.deepcopy(layer)
    if isinstance(layer, nn.Linear):
        other = OtherLinear(layer.in_features, layer.out_features, layer.bias is not None)
        other.load_state_dict(layer.state_dict())
        setattr(parent, name, other)
        for parameter in merged.parameters():
            parameter.data *= 1.5
    return merged


KINDS = [adapter, parametrization, hook, pre_hook, pruned, subclass]


def changed(model, kind):
    """The model with every layer changed, and the same with that merged into plain weights."""
    truth = copy.deepcopy(model)
    merged = [kind(*where) for where in layers(model)]
    for (parent, name, _), layer in zip(layers(truth), merged, strict=True):
        setattr(parent, name, layer)
    return model, truth


def assert_close(found, expected, tolerance=1e-4):
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= tolerance * scale, (found - expected).abs().max() / scale


@pytest.mark.parametrize("kind", KINDS)
@MODELS
def test_every_layer_counts(options, kind):
    """Plain, fused, in the engine; and fused before the change."""
    plain, images = segvit(options), torch.randn(1, 3, 64, 64)
    model, truth = changed(copy.deepcopy(plain), kind)
    with torch.no_grad():
        expected = truth(images)
        scale = expected.mask_logits.abs().max()
        assert (plain(images).mask_logits - expected.mask_logits).abs().max() > 0.1 * scale
        later, _ = changed(copy.deepcopy(plain).fuse(), kind)
        pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
        engine = model.compile_for_inference(64, dtype=torch.float32)
        assert (engine(pixels) == truth.predict(pixels)).float().mean() > 0.99
        for output in (model(images), model.fuse()(images), later(images)):
            assert_close(output.mask_logits, expected.mask_logits)
            assert_close(output.class_logits, expected.class_logits)


@MODELS
def test_every_adapter_trains(options):
    model, truth = changed(segvit({**options, "decoder_dropout": 0.0, "drop_path": 0.0}), adapter)
    images = torch.randn(2, 3, 64, 64)

    def loss(m):
        output = m.train()(images)
        every = [(output.class_logits, output.mask_logits), *output.auxiliary]
        return sum(c.square().sum() + m.square().mean() for c, m in every)

    loss(model).backward()
    loss(truth).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or "ls" in name, f"{name} has no gradient"
    merged = dict(truth.named_parameters())
    for name, parameter in model.named_parameters():
        if ".base_layer." in name and name.endswith("weight"):
            assert_close(parameter.grad, merged[name.replace(".base_layer.", ".")].grad, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_block_is_downsampled(kind):
    """Changed before `QueryDownsample` takes it over, and after."""
    torch.manual_seed(0)
    config = SegViTConfig.preset("vit_tiny", 3, **SIZES).backbone
    block, x = Block(config, 0.0).eval(), torch.randn(2, 1 + 5 * 3, 32)
    before, truth = changed(copy.deepcopy(block), kind)
    after, _ = changed(QueryDownsample(copy.deepcopy(block)), kind)
    kept = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.arange(15).view(5, 3)[::2, ::2].flatten()])
    assert_close(after(x, (5, 3), 1), truth(x)[:, kept])
    if kind is adapter:
        with pytest.raises(TypeError, match=r"block\.norm1 \(Adapter\) is no LayerNorm"):
            QueryDownsample(before)
        before.norm1, truth.norm1 = block.norm1, block.norm1
    assert_close(QueryDownsample(before)(x, (5, 3), 1), truth(x)[:, kept])


def test_upsampling_with_changed_packed_projections():
    """Parametrizations of the packed weights are used; weights that only a hook makes are refused."""
    torch.manual_seed(0)
    upsample = QueryUpsample(32, 2, (4, 4), [32], depth=1).eval()
    levels = [torch.randn(1, 16, 32)]
    truth = copy.deepcopy(upsample)
    for attention, other in zip(list(upsample.modules()), list(truth.modules()), strict=True):
        if hasattr(other, "in_proj_weight"):
            delta = 0.3 * torch.randn(96, 32)
            parametrize.register_parametrization(attention, "in_proj_weight", Shifted(delta))
            other.in_proj_weight.data += delta
    for fused in (False, True):
        if fused:
            upsample.fuse()
        assert_close(upsample(levels), truth(levels))
    prune.random_unstructured(truth.stages[0].layers[0].multihead_attn, "in_proj_weight", 0.5)
    with pytest.raises(TypeError, match=r"in_proj_weight is made by a hook .*prune\.remove"):
        truth(levels)
    changed(upsample, adapter)
    with pytest.raises(TypeError, match=r"input_proj \(Adapter\) is no plain layer"):
        upsample.locate(levels)


def test_queries_are_located_in_full_precision():
    """Under a caller's autocast too, and from the half-precision features that a backbone gives there."""
    torch.manual_seed(0)
    plain = QueryUpsample(32, 2, (4, 4), [32], depth=1)
    cast = copy.deepcopy(plain)
    levels = [torch.randn(4, 16, 32).bfloat16()]
    plain.locate([level.float() for level in levels])
    with torch.autocast("cpu", torch.bfloat16):
        cast.locate(levels)
    for found, expected in zip(cast.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
@MODELS
def test_constants_of_changed_weights_are_not_used(options):
    plain, images = segvit(options), torch.randn(1, 3, 64, 64)

    def in_place(model):
        for parameter in model.decoder.parameters():
            parameter.mul_(1.2)

    def part_is_loaded(model):
        model.decoder.load_state_dict(segvit(options, 1).decoder.state_dict())

    def assigned(model):
        model.decoder.load_state_dict(segvit(options, 1).decoder.state_dict(), assign=True)

    def data_replaced(model):
        for parameter in model.parameters():
            parameter.data = 1.1 * parameter.data

    for change in (in_place, part_is_loaded, assigned, data_replaced):
        fused, truth = copy.deepcopy(plain).fuse(), copy.deepcopy(plain)
        copied = copy.deepcopy(fused)
        for model in (fused, truth, copied):
            model(images)
            change(model)
        for model in (fused, copied):
            assert_close(model(images).mask_logits, truth(images).mask_logits)
    weights = {name: 1.2 * parameter for name, parameter in plain.named_parameters()}
    found = torch.func.functional_call(copy.deepcopy(plain).fuse(), weights, (images,))
    assert_close(found.mask_logits, torch.func.functional_call(plain, weights, (images,)).mask_logits)


@torch.no_grad()
@MODELS
def test_constants_made_under_autocast_are_those_without(options):
    plain, images = segvit(options), torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = copy.deepcopy(plain).fuse()
    assert_close(fused(images).mask_logits, plain(images).mask_logits)


@MODELS
@pytest.mark.parametrize("fused", [True, False], ids=["fused optimizer", "optimizer"])
def test_constants_of_trained_weights_are_not_used(options, fused):
    """Also where nobody calls train(): fused optimizers change parameters without counting."""
    model, images = segvit(options).fuse(), torch.randn(1, 3, 64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    model(images).mask_logits.square().mean().backward()
    optimizer.step()
    truth = segvit(options)
    truth.load_state_dict(copy.deepcopy(model).unfuse().state_dict())
    with torch.no_grad():
        assert_close(model(images).mask_logits, truth(images).mask_logits)


@MODELS
def test_fused_models_have_gradients(options):
    """Constants are none where one is asked for."""
    images, gradients = torch.randn(1, 3, 64, 64), []
    for model in (segvit(options), segvit(options).fuse()):
        outputs = model(images)
        (outputs.mask_logits.square().mean() + outputs.class_logits.square().mean()).backward()
        model.unfuse()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, fused = gradients
    assert fused.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_weights_whose_changes_nobody_counts():
    with torch.inference_mode():
        model, images = segvit({}).fuse(), torch.randn(1, 3, 64, 64)
        for parameter in model.decoder.parameters():
            parameter.mul_(1.2)
        with pytest.warns(UserWarning, match=r"made in torch\.inference_mode"):
            found = model(images).mask_logits
        assert_close(found, model.unfuse()(images).mask_logits)


@torch.inference_mode()
@pytest.mark.filterwarnings("error")
def test_weights_that_are_made_in_each_call_need_no_warning():
    with torch.inference_mode(False):
        model = segvit({})
        parametrize.register_parametrization(model.backbone, "pos_embed", Same())
        model.fuse()
    for _ in range(2):
        model(torch.randn(1, 3, 96, 96))


class Same(nn.Module):
    def forward(self, x):
        return x.clone()


def test_steps_of_compiled_fused_optimizers_count():
    layer = nn.Linear(2, 2).eval()
    folded = Folded([layer], "made of it")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=True)
    layer(torch.ones(2)).sum().backward()
    with torch.no_grad():
        assert folded.get([layer]) == "made of it"
        torch.compile(lambda: optimizer.step(), backend="eager")()
        assert folded.get([layer]) is None


@torch.no_grad()
def test_fake_tensors_leave_nothing_behind():
    """As memory is estimated, and after it the model runs."""
    model, images = segvit({}).fuse(), torch.randn(1, 3, 64, 64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(images))
    assert type(model(images).mask_logits) is torch.Tensor


@torch.no_grad()
def test_norms_without_weights():
    """Before packed layers: no weight is not no norm."""
    plain = segvit({})
    for block in plain.backbone.blocks:
        for name in ("norm1", "norm2"):
            setattr(block, name, nn.LayerNorm(block.norm1.normalized_shape, elementwise_affine=False))
    images = torch.randn(1, 3, 64, 64)
    assert_close(copy.deepcopy(plain).fuse()(images).mask_logits, plain(images).mask_logits)


@torch.no_grad()
@MODELS
def test_fused_models_convert_and_copy(options, called):
    model, images = segvit(options).fuse(), torch.randn(1, 3, 64, 64)
    expected = model(images).mask_logits
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(model),
        torch.load(stream, weights_only=False),
        pickle.loads(pickle.dumps(model)),
    ):
        calls = called(other.decoder.stages[0].layers[0].self_attn)
        assert_close(other(images).mask_logits, expected)
        assert not calls, "constants of the copy are not used"
    double = copy.deepcopy(model).double()
    truth = segvit(options).double()(images.double()).mask_logits
    calls = called(double.decoder.stages[0].layers[0].self_attn)
    found = double(images.double()).mask_logits
    assert not calls and found.dtype == torch.float64
    assert (found - truth).abs().max() < 1e-10, "constants were rounded to float32"


def test_dropout_layers_that_stay_on():
    """Monte Carlo dropout: constants would be without it."""
    model, images = segvit({"decoder_dropout": 0.5}).fuse(), torch.randn(1, 3, 64, 64)
    assert torch.equal(model(images).mask_logits, model(images).mask_logits)
    model.decoder.stages[0].layers[0].dropout.train()
    assert not torch.equal(model(images).mask_logits, model(images).mask_logits)


def test_plain_layers():
    layer = nn.Linear(2, 2)
    assert is_plain(layer) and is_plain(nn.LayerNorm(2)) and not is_plain(OtherLinear(2, 2))
    handle = layer.register_full_backward_hook(lambda *_: None)
    assert not is_plain(layer)
    handle.remove()
    assert is_plain(layer)
    layer.forward = lambda x: x
    assert not is_plain(layer)
    assert not is_plain(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    assert not is_plain(nn.utils.spectral_norm(nn.Linear(2, 2)))


# Copies, processes, programs


def _labels(rank, engine, images, expected):
    assert torch.equal(engine(images), expected)


def test_engines_pickle_and_reach_other_processes():
    engine, images = segvit({}).compile_for_inference(64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    expected = engine(images)
    assert torch.equal(pickle.loads(pickle.dumps(engine))(images), expected)
    assert torch.equal(copy.deepcopy(engine)(images), expected)
    torch.multiprocessing.spawn(_labels, (engine, images, expected), nprocs=1)


LOAD = """
import sys, torch, {package}
program = torch.export.load(sys.argv[1]).module()
result = program(*torch.load(sys.argv[2]))
torch.save([type(result).__name__, *result[:2]], sys.argv[3])
"""


@pytest.mark.parametrize("name", ["FusedATM", "full", pytest.param("shrunk", marks=LONG)])
def test_exported_programs(name, tmp_path):
    """Saved, loaded where only the package is imported; batch, height and width open in one program."""
    if name == "FusedATM":
        torch.manual_seed(0)
        module, package = FusedATM(32, 2).eval(), "segvit_kernels"
        shapes = {
            "query": {0: torch.export.Dim.AUTO},
            "features": dict.fromkeys((0, 1), torch.export.Dim.AUTO),
        }
        make = lambda b, n, m: (torch.randn(b, 3, 32), torch.randn(b, n * m, 32))  # noqa: E731
    else:
        one = {"depth": 1, "decoder_depth": 1, "taps": (0,)}
        module, package = segvit(SHRUNK if name == "shrunk" else one), "segvit.model"
        shapes = {"images": dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)}
        make = lambda b, n, m: (torch.randn(b, 3, 16 * n, 16 * m),)  # noqa: E731
    program = torch.export.export(module, make(2, 4, 4), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "program.pt2")
    again = torch.export.load(tmp_path / "program.pt2").module()
    for size in ((1, 4, 4), (2, 4, 4), (3, 7, 5), (1, 3, 8)):
        inputs = make(*size)
        for found, expected in zip(again(*inputs)[:2], module(*inputs)[:2], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if name != "full":
        return
    torch.save(inputs, tmp_path / "inputs.pt")
    paths = [str(tmp_path / file) for file in ("program.pt2", "inputs.pt", "result.pt")]
    subprocess.run([sys.executable, "-c", LOAD.format(package=package), *paths], check=True, cwd=ROOT)
    kind, *found = torch.load(tmp_path / "result.pt")
    assert kind == type(module(*inputs)).__name__
    torch.testing.assert_close(found[1], module(*inputs)[1], rtol=1e-4, atol=1e-5)


def test_traced_models():
    model, images = segvit({}).requires_grad_(False), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: model(x)[:2], images)
        torch.testing.assert_close(traced(images), tuple(model(images)[:2]))


# Derivatives


def operators():
    """Name, ours and the plain formula as functions of one tensor to one tensor, and the tensor."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 4, dtype=torch.float64) for n in (3, 5, 5))
    x, masks = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    weight, labels = torch.rand(6, dtype=torch.float64), torch.randint(0, 3, (2, 9, 9))
    place = {"grid": (2, 2), "prefix_tokens": 1, "eps": 0.1}

    def norm(function):
        return lambda x: torch.cat([t.flatten() for t in function(x, weight, None, **place)])

    padding = {"key_padding_mask": torch.tensor([[False, True, False, False, True], [True] + [False] * 4])}
    return {
        "fused_atm, padding": (
            lambda q: fused_atm(q, k, v, **padding).output,
            lambda q: atm_reference(q, k, v, **padding).output,
            q,
        ),
        "query_attention, padding": (
            lambda q: query_attention(q, k, v, **padding),
            lambda q: query_attention_reference(q, k, v, **padding),
            q,
        ),
        "fused_atm": (lambda q: fused_atm(q, k, v).output, lambda q: atm_reference(q, k, v).output, q),
        "query_attention": (
            lambda q: query_attention(q, k, v),
            lambda q: query_attention_reference(q, k, v),
            q,
        ),
        "subsample_layer_norm": (norm(subsample_layer_norm), norm(subsample_layer_norm_reference), x),
        "mask_loss": (
            lambda m: mask_loss(m, labels, reduction="none").focal,
            lambda m: mask_loss_reference(m, labels, reduction="none").focal,
            masks,
        ),
    }


OPERATORS = pytest.mark.parametrize("name", list(operators()))


@OPERATORS
@pytest.mark.parametrize("outer", ["sum", "square"])
def test_second_derivatives_raise(name, outer):
    """Also where the gradient that comes in needs no derivative, and nothing would be missed."""
    function, _, x = operators()[name]
    x = x.requires_grad_()
    y = function(x)
    y = (y if outer == "sum" else y.square()).sum() + x.square().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(
        RuntimeError,
        match=f"{name.partition(',')[0]} has no second derivative; .*_reference, the plain formula",
    ):
        gradient.square().sum().backward()


@OPERATORS
def test_function_transforms(name):
    """They compute by the plain formula; the second derivative works there too."""
    from torch.func import grad, hessian, jacrev, jvp, vmap

    ours, plain, x = operators()[name]
    both, many = (ours, plain), torch.stack([x, 2 * x])
    transforms = {
        "grad": lambda f: grad(lambda x: f(x).square().sum())(x),
        "vmap": lambda f: vmap(f)(many),
        "grad of vmap": lambda f: grad(lambda x: vmap(f)(x).square().sum())(many),
        "per-sample gradients": lambda f: vmap(grad(lambda x: f(x).square().sum()))(many),
        "jvp": lambda f: jvp(f, (x,), (x,))[1],
        "jacrev": lambda f: jacrev(f)(x),
        "forward mode": lambda f: torch.autograd.functional.jvp(f, x, x, strict=True)[1],
    }
    if name == "query_attention":
        transforms["hessian"] = lambda f: hessian(lambda x: f(x).square().sum())(x)
    for transform in transforms.values():
        if transform is transforms["forward mode"]:
            continue
        torch.testing.assert_close(*map(transform, both))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        found, expected = (torch.autograd.forward_ad.unpack_dual(f(dual)).tangent for f in both)
    torch.testing.assert_close(found, expected)


def test_transforms_take_no_kernel():
    q = torch.randn(1, 3, 1, 8)
    with pytest.raises(BackendUnavailableError, match=r"'triton' is not available under torch\.func"):
        torch.func.grad(lambda q: fused_atm(q, q, q, backend="triton").output.sum())(q)
    half = torch.func.grad(lambda q: fused_atm(q, q, q).output.float().square().sum())(q.half())
    truth = torch.func.grad(lambda q: fused_atm(q, q, q).output.square().sum())(q.half().double())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), truth, rtol=5e-3, atol=5e-3)


def test_targets_have_no_gradient():
    logits, masks = torch.randn(1, 2, 4, 4), torch.rand(1, 2, 8, 8, requires_grad=True)
    with pytest.raises(ValueError, match="targets requires a gradient"):
        mask_loss(logits, masks)
    with torch.no_grad():
        mask_loss(logits, masks)


def test_per_sample_gradients_of_a_model():
    """Ensembles and differential privacy: vmap over images, and over models."""
    models, images = [segvit(SHRUNK, seed) for seed in (0, 1)], torch.randn(2, 3, 64, 64)
    parameters, _ = torch.func.stack_module_state(models)

    def call(parameters, image):
        return torch.func.functional_call(models[0], parameters, (image[None],)).mask_logits

    every = torch.func.vmap(call, (0, None))(parameters, images[0])
    torch.testing.assert_close(
        every, torch.stack([m(images[:1]).mask_logits for m in models]), rtol=1e-4, atol=1e-4
    )
    own = dict(models[0].named_parameters())
    loss = lambda p, image: call(p, image).square().mean()  # noqa: E731
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(own, images)
    for index, image in enumerate(images):
        expected = torch.autograd.grad(loss(own, image), list(own.values()), allow_unused=True)
        for (name, _), grad in zip(own.items(), expected, strict=True):
            if grad is not None:
                torch.testing.assert_close(found[name][index], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_saved_tensors(reentrant):
    layer, query = FusedATM(32, 2, attn_drop=0.3).train(), torch.randn(1, 3, 32, requires_grad=True)
    features = torch.randn(2, 9, 32)

    def gradient(wrap):
        torch.manual_seed(0)
        query.grad = None
        output, masks = wrap(layer, query, features)
        (output.sum() + masks.square().sum()).backward()
        return query.grad

    expected = gradient(lambda f, *x: f(*x))
    again = gradient(lambda f, *x: torch.utils.checkpoint.checkpoint(f, *x, use_reentrant=reentrant))
    assert torch.equal(again, expected)
    with torch.autograd.graph.save_on_cpu():
        assert torch.equal(gradient(lambda f, *x: f(*x)), expected)


# Other dtypes, devices and layers


@torch.no_grad()
@MODELS
def test_dynamic_quantisation(options):
    """Every quantised layer is called, fused or not; what fuse() has packed is no type that it knows."""
    model, images = segvit(options), torch.randn(1, 3, 64, 64)
    quantise = torch.ao.quantization.quantize_dynamic
    quantised = quantise(copy.deepcopy(model), {nn.Linear})
    expected = quantised(images).mask_logits
    assert 0 < (expected - model(images).mask_logits).abs().max() < 0.1 * expected.abs().max()
    assert_close(copy.deepcopy(quantised).fuse()(images).mask_logits, expected)
    later = quantise(copy.deepcopy(model).fuse().unfuse(), {nn.Linear})
    assert_close(later.fuse()(images).mask_logits, expected)
    with pytest.raises(ValueError, match=r"_packed_params.*: expected the parameters of a plain SegViT"):
        quantised.save_pretrained("/nowhere")


@MODELS
def test_adapted_models_are_not_saved_as_plain_ones(options, tmp_path):
    model, _ = changed(segvit(options), adapter)
    with pytest.raises(ValueError, match=r"backbone\.blocks\.0\.attn\.proj\.a: .*merge adapters"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@MODELS
def test_other_defaults(options):
    """Meta and float64 by default; halves on the CPU; skip_init."""
    with torch.device("meta"):
        model = segvit(options)
    model = model.to_empty(device="cpu")
    model._set_statistics()
    model.load_state_dict(segvit(options).state_dict())
    images = torch.randn(1, 3, 64, 64)
    expected = segvit(options)(images).mask_logits
    assert torch.equal(model(images).mask_logits, expected)
    torch.set_default_dtype(torch.float64)
    try:
        double = segvit(options)
        assert double(images.double()).mask_logits.dtype == torch.float64
        assert double.compile_for_inference(64).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        found = segvit(options).to(dtype).fuse()(images.to(dtype)).mask_logits
        assert found.dtype == dtype and (found.float() - expected).abs().max() < 0.1 * expected.abs().max()
    layer = nn.utils.skip_init(FusedATM, 32, 2)
    assert layer.q.weight.shape == (32, 32)
