"""The linear layer with packed weights by the native library against float64, where the processor has it."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

import segvit_kernels
from segvit import SegViT, SegViTConfig
from segvit_kernels import PackedLinear, PackedWeight, _native, linear, pack_weight, testing
from segvit_kernels.ops.linear import linear_reference
from segvit_kernels.testing.linear import CASES, SHAPES, LinearCase, oracle

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
FLOATS = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)


ROUNDED = ("avx512_bf16", "amx")  # whose numbers below the normal range are zero


@pytest.fixture(params=["avx2", "avx512_bf16", "avx512_fp16", "amx"], ids=lambda isa: f"cpu_{isa}")
def isa(request):
    """The instruction set of a kernel that runs here; float16 has none on AMX, float32 AVX2's alone."""
    if not _native.runs_isa(request.param):
        pytest.skip(f"backend cpu: no kernels for {request.param} here")
    arguments = getattr(request.node, "callspec", None)
    if request.param in ROUNDED and arguments and arguments.params.get("dtype") == torch.float16:
        pytest.skip("no products of float16")
    if request.param == "avx512_bf16" and _native.runs_isa("amx"):
        pytest.skip("AMX's kernel takes these weights")
    if request.param != "avx2" and arguments and arguments.params.get("dtype") == torch.float32:
        pytest.skip("products of half precision")
    return request.param


@pytest.fixture
def kernel(isa):
    """``linear`` on packed weights by the native library; skips where it cannot run."""

    def call(input, weight, bias=None, gelu=False, **around):
        packed = pack_weight(weight, isa)
        return linear(input, weight, bias, packed=packed, gelu=gelu, **around, backend="cpu")

    return call


def check(kernel, case, dtype):
    inputs = case.inputs(dtype)
    before = [t.clone() for t in inputs.values() if t is not None]
    found = kernel(**inputs, gelu=case.gelu)
    assert found.dtype == dtype and found.is_contiguous()
    testing.assert_within_budget(case.name, found, oracle(case, inputs), oracle(case, inputs, dtype=dtype))
    assert all(map(torch.equal, before, (t for t in inputs.values() if t is not None)))
    return found


@FLOATS
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case, dtype, kernel, poisoned):
    check(kernel, case, dtype)


@FLOATS
@pytest.mark.parametrize("size", [1, 2, 7, 8, 15, 16, 31, 32, 33, 47, 48, 49, 63, 95, 97, 127, 129, 255, 513])
def test_sizes(size, dtype, kernel, poisoned):
    """Each of the three, on both sides of every tile, chain and part."""
    for sizes in ((size, 40, 50), (9, size, 50), (9, 40, size)):
        check(kernel, LinearCase("sizes", 1, *sizes), dtype)


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_error_is_that_of_rounding(case, kernel):
    """Sums in float16 chains leave a bfloat16 result nearly as exact as float32 sums do."""
    case = dataclasses.replace(case, tokens=64, bias=False, gelu=False)
    inputs = case.inputs(torch.bfloat16)
    truth = oracle(case, inputs)
    ours = testing.relative_error(check(kernel, case, torch.bfloat16), truth)
    assert ours <= 1.2 * testing.relative_error(truth.bfloat16(), truth)


def test_equal_products_add_up_exactly(kernel):
    """The largest sum that float16 meets: no chain overflows, whatever the scale."""
    for depth in (32, 256, 3072):
        for scale in (1.0, 2.0**-100, 2.0**100):
            x = torch.full((8, depth), 1.984375 * scale, dtype=torch.bfloat16)
            weight = torch.full((48, depth), 1.984375, dtype=torch.bfloat16)
            found, truth = kernel(x, weight), F.linear(x.double(), weight.double())
            torch.testing.assert_close(found.double(), truth, rtol=1e-2, atol=0)


@pytest.mark.parametrize("power", [-105, -60, -20, 0, 20, 60, 110])
def test_rows_and_columns_of_every_magnitude(power, kernel, poisoned):
    """Powers of two of rows and outputs change nothing but the exponent of a result."""
    case = LinearCase("scaled", 1, 12, 70, 50, bias=False)
    inputs = {n: t for n, t in case.inputs(torch.bfloat16).items() if t is not None}
    expected = kernel(**inputs)
    found = kernel(inputs["input"] * 2.0**power, inputs["weight"] * 2.0 ** (-power // 2))
    assert torch.equal(found.double(), expected.double() * 2.0 ** (power + -power // 2))


def test_each_row_has_its_own_magnitude(isa, kernel, poisoned):
    scales = torch.tensor([1e30, 1e-30, 1.0, 0.0, 1e-38, 1e36, 3e-39, 1.0, 1e10])[:, None]
    x = (torch.randn(9, 65, generator=torch.Generator().manual_seed(0)) * scales).bfloat16()
    weight = torch.randn(50, 65, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, truth = kernel(x, weight), F.linear(x.double(), weight.double())
    for i, scale in enumerate(scales.flatten().tolist()):
        # Relative, but for results that bfloat16 cannot hold as exactly: its smallest number is 2^-133. AMX
        # takes what is below its smallest normal number, 2^-126, for zero.
        error = (found[i].double() - truth[i]).abs()
        smallest = (
            2.0**-133
            if isa not in ROUNDED
            else 2.0**-126 * (1 + weight[:, x[i].abs() < 2.0**-126].abs().sum(1))
        )
        assert (error <= 2.0**-8 * truth[i].abs() + 2e-3 * truth[i].abs().max() + smallest).all(), scale
    assert torch.equal(found[3], torch.zeros(50).bfloat16())


def test_largest_and_smallest_of_a_row(isa, kernel):
    """A number counts down to 2^-28 of the largest beside it, on AMX always."""
    x = torch.tensor([[1.0, 2.0**-15, 2.0**-20, 2.0**-26, 2.0**-40]]).bfloat16()
    weight = torch.eye(5).bfloat16()
    found = kernel(x, weight)
    smallest = 2.0**-28 if isa == "avx512_fp16" else 0
    assert torch.equal(found, x.where(x > smallest, 0))


@FLOATS
def test_results_beyond_the_range(dtype, kernel):
    largest = torch.finfo(dtype).max
    x = torch.tensor([[largest, largest], [-largest, -largest], [largest, -largest]]).to(dtype)
    found = kernel(x, torch.ones(1, 2, dtype=dtype))
    assert found.flatten().tolist() == [torch.inf, -torch.inf, 0.0]


@FLOATS
def test_what_is_not_finite_stays_in_its_row(dtype, kernel):
    x = torch.randn(12, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = kernel(x, weight)
    spoilt = x.clone()
    spoilt[2, 5], spoilt[4, 39], spoilt[6, 0] = torch.nan, torch.inf, -torch.inf
    found = kernel(spoilt, weight)
    assert found[2].isnan().all()
    signs = weight.sign()
    assert torch.equal(found[4], signs[:, 39] * torch.inf) and torch.equal(found[6], signs[:, 0] * -torch.inf)
    kept = [i for i in range(12) if i not in (2, 4, 6)]
    assert torch.equal(found[kept], expected[kept])
    spoilt = weight.clone()
    spoilt[7, 3] = torch.nan
    found = kernel(x, spoilt)
    assert found[:, 7].isnan().all()
    assert torch.equal(found[:, :7], expected[:, :7]) and torch.equal(found[:, 8:], expected[:, 8:])


@HALVES
def test_gelu_of_every_number(dtype, isa, kernel):
    """Relative to the result, far into the tail, where 1 + erf would have nothing left."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    x = x[x.isfinite()][:, None]
    found = kernel(x, torch.ones(1, 1, dtype=dtype), gelu=True).double()
    truth = x.double() * 0.5 * torch.special.erfc(-x.double() * 0.5**0.5)
    # Below e^-87 the exponential is 0 on AVX2, and AMX rounds to no smaller numbers.
    step = 2.0**-24 if dtype == torch.float16 else 2.0**-133 if isa == "avx512_fp16" else 2.0**-125
    limit = (0.5 * torch.finfo(dtype).eps + 1.2e-4) * truth.abs() + 0.5 * step
    assert ((found - truth).abs() <= limit).all()
    special = torch.tensor([[torch.inf], [torch.nan]], dtype=dtype)
    found = kernel(special, torch.ones(1, 1, dtype=dtype), gelu=True).flatten()
    assert found[0] == torch.inf and found[1].isnan()


def test_gelu_in_float32(kernel, isa):
    if isa != "avx2":
        pytest.skip("products of half precision")
    x = torch.linspace(-13, 13, 40001)[:, None]
    found = kernel(x, torch.ones(1, 1), gelu=True).double()
    truth = x.double() * 0.5 * torch.special.erfc(-x.double() * 0.5**0.5)
    tail = x.double().clamp(max=0).square()
    assert ((found - truth).abs() <= (6e-7 + 6e-8 * tail) * truth.abs() + 1e-37).all()
    special = torch.tensor([[torch.inf], [torch.nan], [-torch.inf], [-40.0]])
    found = kernel(special, torch.ones(1, 1), gelu=True).flatten()
    assert found[0] == torch.inf and found[1].isnan() and found[2:].abs().max() == 0


def _around(case, inputs, dtype=torch.bfloat16):
    """LayerNorm, LayerScale and residual for a case, of the width of its tokens."""
    draw = torch.Generator().manual_seed(1)
    norm = (torch.rand(case.depth, generator=draw) + 0.5, torch.randn(case.depth, generator=draw))
    scale = torch.rand(case.outputs, generator=draw)
    residual = torch.randn(*inputs["input"].shape[:-1], case.outputs, generator=draw)
    norm, scale, residual = tuple(t.to(dtype) for t in norm), scale.to(dtype), residual.to(dtype)
    return {"norm": (*norm, 1e-5), "scale": scale, "residual": residual}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("part", ["norm", "norm without bias", "scale", "residual", "all"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_what_stands_around_a_layer(case, part, dtype, kernel, poisoned):
    """LayerNorm before it; scale and residual behind it. Far from zero the deviations count."""
    inputs = case.inputs(dtype)
    around = _around(case, inputs, dtype)
    if part == "norm without bias":
        part, around = "norm", {"norm": (around["norm"][0], None, 1e-5)}
    around = around if part == "all" else {part: around[part]}
    if "norm" in around:
        inputs["input"] = 8 + inputs["input"]
    found = kernel(**inputs, gelu=case.gelu, **around)

    def reference(dtype):
        def cast(value):
            if isinstance(value, tuple):
                return tuple(map(cast, value))
            return value.to(dtype) if isinstance(value, torch.Tensor) else value

        given = {name: cast(value) for name, value in {**inputs, **around}.items()}
        return linear_reference(**given, gelu=case.gelu)

    testing.assert_within_budget(part, found, reference(torch.float64), reference(dtype))


@pytest.fixture
def int8():
    """``linear`` on weights of 8 bits; skips where it cannot run."""
    if not _native.runs_isa("avx2"):
        pytest.skip("backend cpu: no kernels for avx2 here")

    def call(input, weight, bias=None, gelu=False, **around):
        packed = pack_weight(weight, int8=True)
        return linear(input, weight, bias, packed=packed, gelu=gelu, **around, backend="cpu")

    return call


def _check_int8(int8, case, dtype, given):
    inputs = case.inputs(dtype)
    found = int8(**inputs, gelu=case.gelu, **given)
    assert found.dtype == dtype
    x, weight = inputs["input"].double(), inputs["weight"].double()
    if given:
        weight_, bias_, eps = given["norm"]
        x = F.layer_norm(x, x.shape[-1:], weight_.double(), bias_.double(), eps)
    scales, steps = (t.abs().amax(-1, keepdim=True) / 127 for t in (weight, x))
    weight = (weight / scales).round() * scales
    truth = linear_reference(
        (x / steps).round() * steps,
        weight,
        None if inputs["bias"] is None else inputs["bias"].double(),
        gelu=case.gelu,
        scale=given["scale"].double() if given else None,
        residual=given["residual"].double() if given else None,
    )
    # A number halfway between two may be rounded the other way, one in a row of these cases.
    slack = 2 * steps * weight.abs().amax(-1) + 0.5 * torch.finfo(dtype).eps * truth.abs() + 2e-4
    assert ((found.double() - truth).abs() <= slack).all()


@FLOATS
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_int8(case, dtype, int8, poisoned):
    """Weights by output and tokens by token, products exact; what stands around a layer in float32."""
    for given in ({}, _around(case, case.inputs(dtype), dtype)):
        _check_int8(int8, case, dtype, given)


def shifted(tensor):
    """The same one byte, or element, further on: as memory that others have made may lie."""
    moved = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    return moved.copy_(tensor)


def test_no_alignment_is_asked_for(int8, kernel):
    """Of what is not the library's own memory; AOTInductor has constants at any place."""
    case = next(c for c in CASES if c.name == "past_tiles")
    inputs = {n: t for n, t in case.inputs(torch.bfloat16).items() if t is not None}
    moved = {n: shifted(t) for n, t in inputs.items()}
    assert all(t.data_ptr() % 64 for t in moved.values())
    for eight in (False, True):
        packed = pack_weight(inputs["weight"], int8=eight)
        other = PackedWeight(*(None if t is None else shifted(t) for t in packed))
        assert other.panels.data_ptr() % 64
        expected = linear(**inputs, packed=packed, backend="cpu")
        assert torch.equal(linear(**moved, packed=other, backend="cpu"), expected)


@pytest.mark.parametrize("size", [1, 2, 11, 12, 13, 24, 31, 32, 33, 63, 64, 65, 95, 97, 128, 263, 264, 265])
def test_int8_sizes(size, int8, poisoned):
    """Each of the three, on both sides of every tile and step."""
    for sizes in ((size, 40, 50), (9, size, 50), (9, 40, size)):
        _check_int8(int8, LinearCase("sizes", 1, *sizes), torch.float32, {})


def test_int8_products_are_exact(int8):
    """The largest sums that 32 bits hold, of either sign: rows of one magnitude are rounded to themselves."""
    depth = 2**16
    signs = torch.randint(0, 2, (2, depth), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    x = torch.cat([torch.ones(1, depth), -torch.ones(1, depth), signs])
    weight = torch.cat([torch.ones(1, depth), -torch.ones(1, depth), signs[1:]])
    found = int8(x * 127, weight * 127)
    assert torch.equal(found, ((x.double() @ weight.double().T) * 127**2).float())
    with pytest.raises(ValueError, match=r"weight has shape \(1, 65537\); expected at most 65536 inputs"):
        pack_weight(torch.ones(1, depth + 1), int8=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_engine_in_int8(dtype, int8):
    """The backbone's projections and nothing else in 8 bits; masks are nearly those of its other numbers."""
    torch.manual_seed(0)
    model = SegViT(SegViTConfig.preset("vit_tiny", num_classes=5, image_size=64)).eval()
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with segvit_kernels.backend("cpu"):
        engine = model.compile_for_inference(64, dtype=dtype, int8=True)
        plain = model.compile_for_inference(64, dtype=dtype)
        network = engine.function.network
        kinds = {
            name: module.packed.value.panels.dtype
            for name, module in network.named_modules()
            if isinstance(module, PackedLinear)
        }
        assert {n for n, kind in kinds.items() if kind == torch.int8} == {
            f"backbone.blocks.{i}.{n}"
            for i in range(12)
            for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        }
        x = torch.randn(1, 3, 64, 64).to(dtype)
        with segvit_kernels.record_backends() as taken:
            outputs = [e.function.network(x)[1] for e in (engine, plain)]
        assert taken["linear"] == {"cpu"}
        assert engine(images).shape == (1, 64, 64)
    error = testing.relative_error(outputs[0], outputs[1].double())
    assert 0 < error < 0.1
    with pytest.raises(ValueError, match=r"int8: .* are for float32, float16 or bfloat16, not torch\.f"):
        model.compile_for_inference(64, dtype=torch.float64, int8=True)


def test_int8_of_what_is_not_finite(int8):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, weight = torch.randn(5, 70).to(dtype), torch.randn(40, 70).to(dtype)
        x[1, 3], x[2, 69], x[3], weight[7, 2] = math.nan, -math.inf, 0, math.inf
        found = int8(x, weight)
        assert found[1:3].isnan().all() and found[:, 7].isnan().all()
        others = [i for i in range(40) if i != 7]
        assert found[0, others].isfinite().all() and (found[3, others] == 0).all()


@FLOATS
def test_layouts(dtype, kernel, poisoned):
    x = torch.randn(4, 6, 5, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight, bias = torch.randn(50, 40).to(dtype), torch.randn(50).to(dtype)
    expected = kernel(x, weight, bias)
    assert expected.shape == (4, 6, 5, 50)
    wide = torch.full((4, 6, 5, 90), torch.nan, dtype=dtype)
    wide[..., 20:60] = x
    views = {
        "slice": (wide[..., 20:60], expected),
        "slice of a sequence": (wide[1, 1:5, :, 20:60], expected[1, 1:5]),
        "matrix": (wide[2, 3, :, 20:60], expected[2, 3]),
        "vector": (wide[2, 3, 1, 20:60], expected[2, 3, 1]),
        "permuted": (x.transpose(0, 2), expected.transpose(0, 2)),
        "columns": (x.transpose(-1, -2).contiguous().transpose(-1, -2), expected),
        "one row for all": (x[0, :1, 0].expand(3, 7, 40), expected[0, :1, 0].expand(3, 7, 50)),
    }
    for name, (view, truth) in views.items():
        assert torch.equal(kernel(view, weight, bias), truth), name
    assert torch.equal(kernel(x, weight, torch.stack([bias, bias], 1)[:, 0]), expected)
    strided = torch.stack([weight, weight], 2)[..., 0]
    assert torch.equal(kernel(x, strided, bias), expected)


@FLOATS
def test_empty(dtype, kernel):
    weight = torch.ones(3, 5, dtype=dtype)
    assert kernel(torch.ones(0, 4, 5, dtype=dtype), weight).shape == (0, 4, 3)
    assert kernel(torch.ones(2, 0, 5, dtype=dtype), weight, gelu=True).shape == (2, 0, 3)


@pytest.mark.parametrize(
    "case", [SHAPES[0], CASES[-2], LinearCase("few", 1, 20, 70, 500)], ids=lambda c: c.name
)
def test_threads_and_runs_give_equal_bits(case, kernel, poisoned):
    case = dataclasses.replace(case, tokens=min(case.tokens, 300), gelu=True)
    inputs, threads = case.inputs(torch.bfloat16), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            results.append(kernel(**inputs, gelu=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    one = {**inputs, "input": inputs["input"][:, 5:6]}
    assert torch.equal(kernel(**one, gelu=True), results[0][:, 5:6])


def test_refusals(isa, kernel, monkeypatch):
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    kinds = r"backend 'cpu' takes float32, float16 or bfloat16; input is torch\.float64"
    with pytest.raises(TypeError, match=kinds):
        linear(x.double(), weight.double(), backend="cpu")
    half = r"packed is for AVX512-FP16, of half-precision numbers; input is torch\.float32"
    with pytest.raises(TypeError, match=half):
        linear(x, weight, packed=pack_weight(weight.half(), "avx512_fp16"), backend="cpu")
    with pytest.raises(ValueError, match="packed is None: see pack_weight"):
        linear(x.half(), weight.half(), backend="cpu")
    packed = pack_weight(torch.ones(70, 3).bfloat16(), isa)
    x, weight = x.bfloat16(), weight.bfloat16()
    with pytest.raises(RuntimeError, match="not those of this layer"):
        torch.ops.segvit.linear(x, weight, None, *packed, False, backend="cpu")
    if isa in ROUNDED:
        with monkeypatch.context() as patch:  # a packed weight from another machine
            patch.setattr("segvit_kernels._library.runs_isa", lambda isa: isa not in ROUNDED)
            with pytest.raises(ValueError, match="packed is for AVX512-BF16, and the CPU code in use is not"):
                linear(x, weight, packed=pack_weight(weight, isa), backend="cpu")
            with segvit_kernels.record_backends() as taken:
                linear(x, weight, packed=pack_weight(weight, isa))
            assert taken == {"linear": {"eager"}}
    with pytest.raises(
        TypeError, match=r"packed is for AVX512-BF16, of bfloat16 numbers; input is torch\.float16"
    ):
        linear(x.half(), weight.half(), packed=pack_weight(weight, "amx"), backend="cpu")


def test_without_a_choice_it_runs(isa, kernel, monkeypatch):
    monkeypatch.delenv("SEGVIT_KERNELS_BACKEND", raising=False)
    case = next(c for c in CASES if c.name == "deep")
    inputs = case.inputs(torch.bfloat16)
    layer = PackedLinear(torch.nn.Linear(case.depth, case.outputs).bfloat16()).requires_grad_(False)
    layer.weight.copy_(inputs["weight"]), layer.bias.copy_(inputs["bias"])
    layer = PackedLinear(layer)
    layer.packed.value = pack_weight(layer.weight, isa)
    with torch.inference_mode(), segvit_kernels.record_backends() as taken:
        found = layer(inputs["input"])
    assert torch.equal(found, kernel(**inputs)) and taken == {"linear": {"cpu"}}
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(lambda x: layer(x, gelu=True), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(inputs["input"]), kernel(**inputs, gelu=True))


@pytest.mark.parametrize("shrunk", [False, True])
@FLOATS
def test_segvit(dtype, shrunk, kernel):
    """A fused model is as near to float64 as an unfused one, and the same when compiled."""
    torch.manual_seed(0)
    few = {"depth": 3, "taps": (0, 2), "shrunk": shrunk, **({"shrink_at": 1} if shrunk else {})}
    config = SegViTConfig.preset("vit_tiny", num_classes=5, image_size=(64, 64), **few)
    model = SegViT(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    model = model.to(dtype)
    images = torch.randn(2, 3, 64, 96).to(dtype)
    with torch.inference_mode(), segvit_kernels.backend("eager"):
        truth = copy.deepcopy(model).double()(images.double())[:2]
        ordinary = model(images)[:2]
    fused = copy.deepcopy(model).fuse()
    with torch.no_grad(), segvit_kernels.backend("cpu"):
        found = fused(images)[:2]
    for name, *values in zip(("class_logits", "mask_logits"), found, truth, ordinary, strict=True):
        actual, exact, plain = (testing.relative_error(v, values[1]) for v in values)
        assert actual <= 1.5 * plain + 1e-3, (name, actual, plain)
        assert exact == 0
    if not shrunk and dtype == torch.bfloat16:
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: fused(x)[:2], fullgraph=True, backend="aot_eager")
        with torch.no_grad(), segvit_kernels.backend("cpu"):
            for a, b in zip(compiled(images), found, strict=True):
                assert torch.equal(a, b)
