"""The linear layer with packed weights: packing, dispatch, modules (its kernel: test_linear_native.py)."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from segvit import SegViT, SegViTConfig
from segvit_kernels import (
    Folded,
    PackedLinear,
    backend,
    freeze,
    fvcore_handles,
    linear,
    pack_linears,
    pack_weight,
    unpack_linears,
    why_not_packed,
)
from segvit_kernels.testing.linear import CASES, oracle

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def unpacked(packed, shape):
    """What the documented layout says that the weights were, in float64."""
    if packed.isa == "avx512_bf16":
        values = torch.zeros(len(packed.panels) * 32, packed.panels.shape[1] * 32, dtype=torch.float64)
        for panel, part, half, row in itertools.product(*map(range, packed.panels.shape[:4])):
            first = 32 * panel + 16 * half, 32 * part + 2 * row
            tile = packed.panels[panel, part, half, row].view(16, 2)
            values[first[0] : first[0] + 16, first[1] : first[1] + 2] = tile
        assert not values[shape[0] :].any() and not values[:, shape[1] :].any()
        return values[: shape[0], : shape[1]]
    if packed.isa == "avx2":
        values = packed.panels.double().transpose(1, 2).flatten(0, 1)
        assert len(values) % 32 == 0 and not values[shape[0] :].any()
        return values[: shape[0]]
    panels, pairs = packed.panels.shape[:2]
    values = torch.zeros(panels * 48, pairs * 2, dtype=torch.float64)
    for pair in range(pairs):
        group, place = divmod(pair, 16)
        first = 2 * (16 * group + (0, 4, 8, 12)[place % 4] + place // 4)
        values[:, first : first + 2] = packed.panels[:, pair].flatten(0, 1)
    values *= 2.0 ** (packed.factors.double() - 3)[:, None]
    assert not values[shape[0] :].any() and not values[:, shape[1] :].any()
    return values[: shape[0], : shape[1]]


@pytest.fixture
def packs(monkeypatch):
    """As on a machine whose processor gains from packed weights of both dtypes."""
    monkeypatch.setattr("segvit_kernels._library.Operator.why_not", lambda *_: None)
    monkeypatch.setattr("segvit_kernels._library.runs_isa", lambda isa: isa == "avx2")


# Packing


@HALVES
@pytest.mark.parametrize("shape", [(1, 1), (48, 32), (49, 33), (7, 3), (150, 384), (96, 130)], ids=str)
def test_packed_weights_are_the_weights(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = pack_weight(weight, "avx512_fp16")
    assert packed.panels.dtype == torch.float16 and packed.panels.abs().max() < 16
    assert torch.equal(unpacked(packed, shape), weight.double())
    if dtype == torch.bfloat16:
        packed = pack_weight(weight, "amx")
        assert packed.panels.dtype == dtype and packed.factors is None
        assert torch.equal(unpacked(packed, shape), weight.double())
    packed = pack_weight(weight, "avx2")
    assert packed.panels.dtype == dtype and packed.factors is None
    assert torch.equal(unpacked(packed, shape), weight.double())


def test_weights_of_every_magnitude():
    smallest, largest = 2.0**-133, torch.finfo(torch.bfloat16).max
    weight = torch.tensor([[smallest, 0], [largest, -1e36], [1e30, 1e20], [0, 0], [3, 3 * 2.0**-18]])
    weight = weight.bfloat16()
    assert torch.equal(unpacked(pack_weight(weight, "amx"), weight.shape), weight.double())
    found = unpacked(pack_weight(weight, "avx512_fp16"), weight.shape)
    expected = weight.double()
    expected[2, 1] = 0  # 2^-33 of the largest of its row
    assert torch.equal(found, expected)


def test_infinite_weights_do_not_touch_the_others():
    weight = torch.tensor([[1.0, torch.inf], [torch.nan, 2.0], [torch.inf, -torch.inf]]).half()
    torch.testing.assert_close(
        unpacked(pack_weight(weight), weight.shape), weight.double(), rtol=0, atol=0, equal_nan=True
    )


def test_packed_int8_weights_are_the_rounded_weights():
    weight = torch.randn(70, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = pack_weight(weight, int8=True)
    assert packed.panels.shape == (3, 3, 2, 16, 64) and packed.isa == "avx2"
    again = pack_weight(weight.float(), "avx512", int8=True)  # of float32 numbers, the same
    assert torch.equal(again.panels, packed.panels) and torch.equal(again.factors, packed.factors)
    # (panel, part, half, row, output, element) of the depth part, row, element
    found = packed.panels.view(3, 3, 2, 16, 16, 4).permute(0, 2, 4, 1, 3, 5).reshape(96, 192).double()
    assert not found[70:].any() and not found[:, 130:].any()
    scales = packed.factors[:70, None].double()
    assert (found.abs().amax(1)[:70] == 127).all()
    assert ((found[:70, :130] * scales - weight.double()).abs() <= 0.5001 * scales).all()


@pytest.mark.parametrize(
    "isa, dtype, int8",
    [
        ("amx", torch.float16, False),
        ("portable", torch.bfloat16, False),
        ("avx512", torch.bfloat16, False),
        ("avx512_fp16", torch.bfloat16, True),
    ],
)
def test_what_no_kernel_is_for(isa, dtype, int8):
    first = "'avx512_fp16'" if dtype == torch.float16 else "'amx'"
    with pytest.raises(ValueError, match=f"isa is {isa!r}, weight {dtype}; expected {first}"):
        pack_weight(torch.ones(2, 2, dtype=dtype), isa, int8=int8)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(2, 2).double(), TypeError, "weight is torch.float64; expected float32, float16 or bfl"),
        ([[1.0]], TypeError, "weight is list"),
        (torch.ones(2).half(), ValueError, r"weight has shape \(2,\); expected \(outputs, inputs\)"),
        (torch.ones(0, 2).half(), ValueError, r"weight has shape \(0, 2\); expected .* at least one of both"),
    ],
)
def test_what_does_not_pack(weight, error, message):
    with pytest.raises(error, match=message):
        pack_weight(weight)


# The function


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_eager_is_torch(case, dtype):
    inputs = case.inputs(dtype)
    packed = pack_weight(inputs["weight"]) if dtype == torch.bfloat16 else None
    expected = oracle(case, inputs, dtype=dtype)
    assert torch.equal(linear(**inputs, packed=packed, gelu=case.gelu), expected)
    assert torch.equal(linear(**inputs, packed=packed, gelu=case.gelu, backend="eager"), expected)


def _tensors(**changes):
    weight = torch.ones(4, 3).half()
    return {
        "input": torch.ones(2, 3).half(),
        "weight": weight,
        "packed": pack_weight(weight, "avx512_fp16"),
    } | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": torch.ones(2, 5).half()}, ValueError, r"input has shape \(2, 5\); expected \(..., 3\)"),
        ({"weight": torch.ones(4).half()}, ValueError, r"weight has shape \(4,\); expected"),
        ({"weight": torch.ones(4, 3).bfloat16()}, TypeError, "weight has dtype torch.bfloat16"),
        ({"bias": torch.ones(3).half()}, ValueError, r"bias has shape \(3,\); expected \(4,\)"),
        ({"bias": torch.ones(4)}, TypeError, "bias has dtype torch.float32; expected torch.float16"),
        ({"bias": torch.ones(4, device="meta").half()}, ValueError, "bias is on meta; expected cpu"),
        (
            {"packed": pack_weight(torch.ones(4, 40).half(), "avx512_fp16")},
            ValueError,
            r"packed has panels of shape \(1, 32, 48, 2\); expected \(1, 16, 48, 2\)",
        ),
        ({"input": [1.0, 2.0, 3.0]}, TypeError, "input is a list; expected a tensor"),
        ({"weight": None}, TypeError, "weight is a NoneType; expected a tensor"),
        ({"scale": 2.0}, TypeError, "scale is a float; expected a tensor"),
        ({"gelu": "no"}, TypeError, "gelu is 'no'; expected True or False"),
        ({"norm": torch.nn.LayerNorm(3)}, TypeError, "norm is no tuple of three"),
        ({"norm": (1.0, None, 1e-5)}, TypeError, "norm's weight is a float; expected a tensor"),
        ({"norm": (None, None, None)}, TypeError, "norm's epsilon is None; expected a number"),
        ({"norm": (torch.ones(3).half(), None)}, TypeError, "norm is no tuple of three"),
        (
            {"norm": (torch.ones(4).half(), None, 1e-5)},
            ValueError,
            r"norm's weight has shape \(4,\); expected \(3,\)",
        ),
        (
            {"norm": (torch.ones(3).half(), torch.ones(3), 0.0)},
            TypeError,
            "norm's bias has dtype torch.float32",
        ),
        ({"scale": torch.ones(3).half()}, ValueError, r"scale has shape \(3,\); expected \(4,\)"),
        (
            {"residual": torch.ones(2, 3).half()},
            ValueError,
            r"residual has shape \(2, 3\); expected \(2, 4\)",
        ),
        ({"backend": "cudnn"}, ValueError, "argument 'backend' is 'cudnn'"),
        ({"backend": "triton"}, RuntimeError, "backend 'triton' is not available: linear has no kernel"),
    ],
)
def test_bad_arguments(changes, error, message):
    """PyTorch's layer, which runs without a packed weight, would broadcast and promote."""
    for packing in ({},) if "packed" in changes else ({}, {"packed": None}):
        with pytest.raises(error, match=message):
            linear(**_tensors(**changes, **packing))
    if error is ValueError and "packed" not in changes:  # autocast makes dtypes alike, and shapes not
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(error, match=message):
            linear(**_tensors(**changes))


def test_gradients_are_those_of_the_plain_layer():
    case = next(c for c in CASES if c.name == "odd_gelu")
    inputs = case.inputs(torch.bfloat16)
    packed = pack_weight(inputs["weight"])
    grads = []
    for arguments in ({"packed": packed}, {}):
        leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        output = linear(**leaves, **arguments, gelu=True)
        grads.append(torch.autograd.grad(output.float().square().sum(), list(leaves.values())))
    assert all(map(torch.equal, *grads))


def test_autocast_is_that_of_the_plain_layer():
    x, weight = torch.randn(2, 5), torch.randn(4, 5).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight, packed=pack_weight(weight)), F.linear(x, weight))


@pytest.mark.parametrize("case", CASES[:6], ids=lambda c: c.name)
def test_opcheck_flops_and_meta(case):
    inputs = case.inputs(torch.float16)
    packed, operator = pack_weight(inputs["weight"]), torch.ops.segvit.linear.default
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, (*inputs.values(), *packed, case.gelu), test_utils=utils)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        real = linear(**inputs, packed=packed)
    assert counter.get_total_flops() == 2 * case.batch * case.tokens * case.depth * case.outputs
    meta = operator(*(t if t is None else t.to("meta") for t in (*inputs.values(), *packed)), False)
    assert meta.is_meta and (meta.shape, meta.dtype) == (real.shape, real.dtype)


# Modules


def test_packed_layer_is_the_layer():
    plain = torch.nn.Linear(5, 7).bfloat16()
    layer, x = PackedLinear(plain), torch.randn(2, 5).bfloat16()
    assert layer.weight is plain.weight and layer.bias is plain.bias
    assert layer.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x)) and torch.equal(layer(x, gelu=True), F.gelu(plain(x)))
        assert torch.equal(copy.deepcopy(layer)(x), plain(x))
    back = layer.unpack()
    assert type(back) is torch.nn.Linear and back.weight is plain.weight and back.bias is plain.bias
    assert PackedLinear(torch.nn.Linear(5, 7, bias=False).half()).unpack().bias is None


def test_layers_of_a_model_are_replaced_and_put_back(packs):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.Linear(4, 2))).half()
    state, names = model.state_dict(), [n for n, _ in model.named_modules()]
    assert pack_linears(model) == 2 and isinstance(model[1][0], PackedLinear)
    assert pack_linears(model) == 0
    assert list(model.state_dict()) == list(state) and [n for n, _ in model.named_modules()] == names
    assert unpack_linears(model) == 2 and type(model[0]) is torch.nn.Linear
    assert all(map(torch.equal, model.state_dict().values(), state.values()))


def test_why_not_packed(packs, monkeypatch):
    assert why_not_packed(torch.ones(2, 2).half()) is None
    assert why_not_packed(torch.ones(0, 2).half()) == "the weight is empty"
    assert "float16 or bfloat16, not torch.float64" in why_not_packed(torch.ones(2, 2).double(), int8=True)
    assert "at most 65536 inputs, not 65537" in why_not_packed(torch.ones(1, 65537), int8=True)
    monkeypatch.setattr("segvit_kernels._library.runs_isa", lambda isa: False)
    assert "need a CPU with AVX2" in why_not_packed(torch.ones(2, 2), int8=True)
    assert why_not_packed(torch.ones(2, 2).half()) == "linear needs avx2 for packed weights"
    monkeypatch.setattr("segvit_kernels._library.runs_isa", lambda isa: True)
    assert "not meta" in why_not_packed(torch.ones(2, 2, device="meta").half())
    monkeypatch.setattr("segvit_kernels._library.Operator.why_not", lambda *_: "no such processor")
    assert why_not_packed(torch.ones(2, 2).half()) == "no such processor"
    model = torch.nn.Sequential(torch.nn.Linear(2, 2)).half()
    assert pack_linears(model) == 0 and type(model[0]) is torch.nn.Linear


@pytest.mark.parametrize(
    "best, of_float32, of_float16, of_bfloat16",
    [
        ("avx2", "avx2", "avx2", "avx2"),
        ("avx512", None, "avx2", "avx2"),
        ("avx512_bf16", "avx2", "avx2", "avx512_bf16"),
        ("avx512_fp16", None, "avx512_fp16", "avx512_fp16"),
        ("amx", None, "avx512_fp16", "avx512_bf16"),  # one order
    ],
)
def test_whose_kernel_is_the_fastest(best, of_float32, of_float16, of_bfloat16, packs, monkeypatch):
    every = ["portable", "avx2", "avx512", "avx512_bf16", "avx512_fp16", "amx"]
    runs = every[: every.index(best) + 1]
    monkeypatch.setattr("segvit_kernels._library.runs_isa", lambda isa: isa in runs)
    assert why_not_packed(torch.ones(2, 2), int8=True) is None
    found = {torch.float32: of_float32, torch.float16: of_float16, torch.bfloat16: of_bfloat16}
    for dtype, isa in found.items():
        weight = torch.ones(2, 2, dtype=dtype)
        slower = f"PyTorch's own product of {dtype} is the faster one here"
        assert why_not_packed(weight) == (None if isa else slower)
        assert isa is None or pack_weight(weight).isa == isa


def test_compile_and_export():
    torch._dynamo.reset()
    layer, x = (
        PackedLinear(torch.nn.Linear(9, 5).bfloat16()).requires_grad_(False),
        torch.randn(3, 9).bfloat16(),
    )
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    program = torch.export.export(layer, (x,))
    assert "segvit.linear" in str(program.graph) and torch.equal(program.module()(x), expected)


def test_fvcore_counts_the_products():
    fvcore = pytest.importorskip("fvcore.nn")
    layer = PackedLinear(torch.nn.Linear(9, 5).bfloat16()).requires_grad_(False)
    analysis = fvcore.FlopCountAnalysis(layer, (torch.randn(3, 9).bfloat16(),))
    assert analysis.set_op_handle(**fvcore_handles()).total() == 3 * 9 * 5


# SegViT


def segvit(**overrides):
    torch.manual_seed(0)
    config = SegViTConfig.preset("vit_tiny", num_classes=5, image_size=(64, 64), **overrides)
    return SegViT(config).requires_grad_(False).eval()


def packed_parts(model):
    return {name for name, m in model.named_modules() if getattr(m, "packed", None) is not None}


@HALVES
def test_fuse_packs_and_unfuse_unpacks(dtype, packs):
    model = segvit().to(dtype)
    state, types = model.state_dict(), [type(m) for m in model.modules()]
    model.fuse()
    parts = packed_parts(model)
    for part in ("backbone.patch_embed", "backbone.blocks.0.mlp.fc1", "backbone.blocks.11.attn.qkv"):
        assert part in parts
    assert all(stage.folded_rows.value[2] is not None for stage in model.decoder.stages)
    for part in ("decoder.stages.0.layers.1.self_attn", "decoder.class_head"):
        assert part in parts
    assert not [n for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    assert list(model.state_dict()) == list(state)
    torch.save(model.state_dict(), file := io.BytesIO())
    model.unfuse()
    assert packed_parts(model) == set() and [type(m) for m in model.modules()] == types
    file.seek(0)
    model.fuse().load_state_dict(torch.load(file, weights_only=True))
    assert packed_parts(model) == set()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    model.fuse().train()
    assert packed_parts(model) == set()


def test_which_models_are_packed(packs, monkeypatch):
    assert packed_parts(segvit().fuse()) and packed_parts(segvit().double().fuse()) == set()
    # Of Intel's with AVX-512 PyTorch's own product is taken.
    monkeypatch.setattr("segvit_kernels._library.runs_isa", lambda isa: isa in ("avx2", "avx512"))
    assert packed_parts(segvit().fuse()) == set()


@pytest.mark.parametrize("shrunk", [False, True])
def test_fused_on_eager_is_unfused(shrunk, packs):
    """The patch embedding as a product, GELU, attention: the same formulas."""
    model = segvit(**({"shrunk": True} if shrunk else {}))
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    fused = copy.deepcopy(model).fuse()
    projection = fused.backbone.patch_embed.proj
    packed = pack_weight(projection.weight.flatten(1).half())
    fused.backbone.patch_embed.packed = Folded([projection], packed)
    for found, truth in zip(fused(images)[:2], expected[:2], strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ["avx2", "avx512_bf16", "avx512_fp16"])
def test_a_released_layer_computes_what_it_did(dtype, isa, packs):
    """Its weight is a shape alone: where the packed one is of no use it is unpacked."""
    if (isa == "avx512_bf16" and dtype != torch.bfloat16) or (
        isa == "avx512_fp16" and dtype == torch.float32
    ):
        pytest.skip("no such order of this dtype")
    plain = torch.nn.Linear(70, 50).to(dtype).requires_grad_(False)
    x = torch.randn(3, 70).to(dtype)
    layer = PackedLinear(plain)
    layer.packed.value = pack_weight(plain.weight, isa)
    freeze(layer)
    layer.release()
    assert layer.packed.value.exact == (isa != "avx512_fp16") == (layer.weight.stride() == (0, 0))
    with backend("eager"):
        assert torch.equal(layer(x), plain(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer(x.requires_grad_()), plain(x))
    assert torch.equal(layer.unpack().weight, plain.weight)
    with backend("eager"), torch.no_grad():
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(copied(x), plain(x))
    loaded = torch.nn.Linear(70, 50).to(dtype)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded.weight, plain.weight)
    double = copy.deepcopy(layer).double()
    assert torch.equal(double(x.double()), copy.deepcopy(plain).double()(x.double()))
    assert torch.equal(double.unpack().weight, plain.weight.double())
    other = {name: 2 * value for name, value in plain.state_dict().items()}
    layer.load_state_dict(other)
    assert torch.equal(layer(x), F.linear(x, other["weight"], other["bias"]))


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(70, 50), (1, 50), (70, 1), (1, 1)], ids=str)
def test_release_and_conversion_alone(sizes, packs):
    """Without a freeze before, and where the other dtype is packed too."""
    plain, x = torch.nn.Linear(*sizes).requires_grad_(False), torch.randn(3, sizes[0])
    layer = PackedLinear(plain)
    layer.release()
    with backend("eager"):
        assert torch.equal(layer(x), plain(x))
        assert torch.equal(layer._apply(torch.clone)(x), plain(x))  # as share_memory() and others do
        layer.half()
        assert layer.released and layer.packed.value.panels.dtype == torch.float16
        assert torch.equal(layer(x.half()), plain.half()(x.half()))


@torch.no_grad()
def test_what_is_left_out_for_good_says_so(packs):
    plain = torch.nn.Linear(70, 50).requires_grad_(False)
    layer = PackedLinear(plain, int8=True)
    layer.release(inexact=True)
    x = torch.zeros(1, 70, requires_grad=True)
    for asked in (layer.state_dict, layer.double, layer.unpack, lambda: layer(x)):
        with torch.enable_grad(), pytest.raises(RuntimeError, match="a weight was left out"):
            asked()


def test_a_norm_without_weight_and_a_residual_of_another_layout():
    case = [torch.randn(shape) for shape in ((3, 8), (5, 8), (5,), (5, 3))]
    x, weight, bias, residual = case
    truth = residual.T + F.linear(F.layer_norm(x, (8,)), weight, bias)
    for asked in (None, "eager"):
        around = {"norm": (None, None, 1e-5), "residual": residual.T, "backend": asked}
        found = linear(x, weight, bias, packed=pack_weight(weight, "avx2"), **around)
        torch.testing.assert_close(found, truth)
        assert found.is_contiguous()


def test_transposed_weights_pack():
    weight = torch.randn(96, 64).half()
    for isa in ("avx512_fp16", "avx2"):
        straight, turned = pack_weight(weight, isa), pack_weight(weight.T.contiguous().T, isa)
        assert torch.equal(straight.panels, turned.panels)
