"""Rotary positions, and all that stands beside them: an oracle in float64, QD, engine, graphs, training."""

import copy
import json
import math

import pytest
import torch
from samples import pictures, randomise, tiny_model

from segvit import BackboneConfig, RotaryConfig, SegViTConfig
from segvit.exporting.graph import LabelGraph, Plan
from segvit.model.backbone import VisionTransformer
from segvit.model.rotary import Rotary
from segvit_kernels import QueryDownsample, apply_rotary

ROTARY = {
    "centred": RotaryConfig(),
    "index": RotaryConfig("index", base=10000.0, grid=(3, 5), offset=1.0),
    "unscaled": RotaryConfig("index", base=50.0),
    "learned": RotaryConfig("index", base=10.0, learned=True),
}
PARTS = {"class_token": True, "register_tokens": 2, "layer_scale": 0.5, "mlp": "swiglu"}


def config(kind="centred", **fields):
    return BackboneConfig(**{"width": 32, "depth": 3, "heads": 2, "patch_size": 8, "rotary": ROTARY[kind],
                             "absolute_positions": False, **PARTS, **fields})  # fmt: skip


def backbone(kind="centred", size=(32, 32), **fields):
    model = VisionTransformer(config(kind, **fields), size, (0, fields.get("depth", 3) - 1))
    freqs = model.rope.freqs.detach().clone()
    randomise(model)
    with torch.no_grad():
        model.rope.freqs.copy_(freqs)
    return model


# An oracle that knows nothing of tables: one token at a time, by rotation matrices


def places(rotary, grid):
    """(row, column) of each patch, as an angle at frequency 1."""
    found = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            place = []
            for axis, number in enumerate((row, column)):
                if rotary.coordinates == "centred":
                    place.append(2 * math.pi * ((2 * number + 1) / grid[axis] - 1))
                else:
                    scale = 1 if rotary.grid is None else rotary.grid[axis] / grid[axis]
                    place.append((number + rotary.offset) * scale)
            found.append(place)
    return found


def turned(x, index, where, rotary, learned):
    """x (tokens, heads, D), each token turned by its place; None is no place."""
    channels = x.shape[-1]
    out = x.clone()
    for token, place in enumerate(where):
        for head in range(x.shape[1]) if place is not None else ():
            for pair in range(channels // 2):
                if learned is None:
                    frequency = rotary.base ** (-4 * (pair % (channels // 4)) / channels)
                    angle = frequency * place[pair >= channels // 4]
                else:
                    angle = sum(place[axis] * float(learned[axis, index, head, pair]) for axis in (0, 1))
                a, b = x[token, head, pair], x[token, head, pair + channels // 2]
                out[token, head, pair] = a * math.cos(angle) - b * math.sin(angle)
                out[token, head, pair + channels // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


@torch.no_grad()
def oracle(model, images):
    """Tapped features of one image in float64; the block that shrinks asks from every second place."""
    setup, grid = model.config, tuple(side // model.config.patch_size for side in images.shape[-2:])
    rotary, prefix = setup.rotary, model.num_prefix
    x = model.patch_embed(images)[0]
    x = x if not setup.absolute_positions else x + model.pos_embed[0]
    tokens = [t[0] for t in (getattr(model, n, None) for n in ("cls_token", "reg_token")) if t is not None]
    x, features = torch.cat([*tokens, x]), []
    where = [None] * prefix + places(rotary, grid)
    learned = model.rope.freqs if rotary.learned else None
    for index, block in enumerate(model.blocks):
        kept = list(range(len(where)))
        if index == setup.shrink_at:
            patches = [r * grid[1] + c for r in range(0, grid[0], 2) for c in range(0, grid[1], 2)]
            kept = [*range(prefix), *(prefix + p for p in patches)]
        normed = block.norm1(x)
        query, key, value = block.attn.qkv(normed).unflatten(-1, (3, setup.heads, -1)).unbind(1)
        query, key = (turned(t, index, where, rotary, learned) for t in (query, key))
        scores = torch.einsum("qhd,khd->hqk", query[kept], key) / query.shape[-1] ** 0.5
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
        x = x[kept] + block.ls1(block.attn.proj(block.attn.norm(mixed)))
        where = [where[k] for k in kept]
        x = x + block.ls2(block.mlp(block.norm2(x)))
        if index in model.taps:
            features.append(model.norm(x[prefix:])[None])
    return features


@pytest.mark.parametrize("shrink_at", [None, 0, 1])
@pytest.mark.parametrize("kind", ROTARY)
@torch.no_grad()
def test_features_are_the_oracles(kind, shrink_at):
    """QD keeps the places of the tokens that it keeps; fused, on other grids, and with norms inside."""
    fields = {} if kind != "index" else {"absolute_positions": True, "attention_norm": True, "mlp_norm": True}
    model = backbone(kind, (24, 40), shrink_at=shrink_at, **fields).double()
    images = torch.randn(1, 3, 24, 40, dtype=torch.float64)
    expected = oracle(model, images)
    for fused in (False, True):
        if fused:
            model.fuse()
            model(images)  # keeps its angles
        for a, b in zip(model(images), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)  # frequencies are float32 numbers
    # Angles of a grid of its own after QD, which is what a careless table gives, are no rounding error.
    if shrink_at == 0 and kind != "index":
        wrong = copy.deepcopy(model)
        wrong.unfuse()
        table = wrong.rope((2, 3), wrong.num_prefix)
        wrong._angles = lambda grid, *_: [
            tuple((wrong.rope(grid, wrong.num_prefix) if i == 0 else table)[:, i % table.shape[1]])
            for i in range(3)
        ]
        assert (wrong(images)[-1] - expected[-1]).abs().max() > 1e-3


@torch.no_grad()
def test_other_grids_and_batches():
    model = backbone("centred").double()
    images = torch.randn(2, 3, 16, 56, dtype=torch.float64)
    together = model(images)[-1]
    for image, found in zip(images, together, strict=True):
        torch.testing.assert_close(found[None], oracle(model, image[None])[-1], atol=1e-6, rtol=1e-6)
    plain = copy.deepcopy(model)
    model.fuse()
    for size in ((16, 56), (56, 16), (16, 56)):  # angles that are kept are of one grid
        shaped = images.reshape(2, 3, *size)
        for _ in range(2):
            torch.testing.assert_close(model(shaped)[-1], plain(shaped)[-1])


def test_angles_of_apply_rotary():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    angle = torch.randn(5, 1, 4, dtype=torch.float64)
    turned_x = apply_rotary(x, angle.cos(), angle.sin())
    complex_x = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(turned_x, torch.cat([complex_x.real, complex_x.imag], -1))
    assert apply_rotary(x.half(), angle.cos(), angle.sin()).dtype == torch.float16
    with pytest.raises(RuntimeError):
        apply_rotary(x, angle[:4].cos(), angle[:4].sin())


# Training


@pytest.mark.parametrize("kind", ["centred", "learned"])
def test_gradient_checkpointing_changes_nothing(kind):
    model = backbone(kind, shrink_at=1, drop_path=0.5).train()
    images, grads = torch.randn(4, 3, 32, 32), []
    for enabled in (False, True):
        copied = copy.deepcopy(model)
        copied.gradient_checkpointing = enabled
        torch.manual_seed(3)
        sum(feature.square().sum() for feature in copied(images)).backward()
        grads.append({name: parameter.grad for name, parameter in copied.named_parameters()})
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name])
        assert gradient.abs().sum() > 0, name
    assert ("rope.freqs" in grads[0]) == (kind == "learned")


def test_augmentation_is_of_training_alone():
    rotary = RotaryConfig(shift=0.3, jitter=1.5, rescale=2.0)
    rope = Rotary(BackboneConfig(32, 1, 2, rotary=rotary)).eval()
    plain = Rotary(BackboneConfig(32, 1, 2, rotary=RotaryConfig()))
    assert torch.equal(rope((3, 4), 1), plain((3, 4), 1)) and torch.equal(
        plain.train()((3, 4), 1), rope((3, 4), 1)
    )
    torch.manual_seed(0)
    seen = torch.stack([rope.train().coordinates((3, 4)) for _ in range(500)]) / (2 * math.pi)
    span = seen.amax(-1) - seen.amin(-1)  # of 2·2/3 and 2·3/4 without
    scale = span / torch.tensor([4 / 3, 3 / 2])
    middle = (seen.amax(-1) + seen.amin(-1)) / 2 / scale
    assert scale.min() > 1 / 3 and scale.max() < 3 and scale.max() > 2 and scale.min() < 0.5
    assert middle.abs().max() <= 0.3 + 1e-5 and middle.abs().max() > 0.25
    ratio = (scale[:, 0] / scale[:, 1]).log().abs().max()
    assert math.log(1.8) < ratio <= 2 * math.log(1.5) + 1e-5  # jitter is of each direction by itself


def test_augmentation_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DINOv3ViTConfig"):
        pytest.skip("needs transformers 4.56 or newer")
    from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTRopePositionEmbedding

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    drawn = {"pos_embed_shift": 0.2, "pos_embed_jitter": 1.5, "pos_embed_rescale": 2.0}
    theirs = DINOv3ViTRopePositionEmbedding(transformers.DINOv3ViTConfig(**sizes, **drawn)).train()
    ours = Rotary(config(rotary=RotaryConfig(shift=0.2, jitter=1.5, rescale=2.0))).train()
    torch.manual_seed(7)
    cos, sin = theirs(torch.zeros(1, 3, 24, 40))
    torch.manual_seed(7)
    table = ours((3, 5), 0)
    torch.testing.assert_close(table[0, 0, :, 0], cos[:, :8], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(table[1, 0, :, 0], sin[:, :8], atol=1e-5, rtol=1e-5)


def test_frequencies_stay_in_float32():
    model = backbone("learned", absolute_positions=True)
    freqs = model.rope.freqs.detach().clone()
    half = copy.deepcopy(model).bfloat16()
    assert half.pos_embed.dtype == torch.bfloat16 and torch.equal(half.rope.freqs, freqs)
    assert torch.equal(half.float().rope.freqs, freqs) and half.double().rope.freqs.dtype == torch.float64
    images = torch.randn(1, 3, 32, 32)
    reference, found = (
        m(images.to(m.pos_embed.dtype))[-1].float() for m in (model, copy.deepcopy(model).bfloat16())
    )
    assert (found - reference).norm() < 0.05 * reference.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(images)[-1] - reference).norm() < 0.05 * reference.norm()
    assert model.to("meta").rope.freqs.is_meta


# From pictures to labels


def segmenter(kind, shrunk=False, **fields):
    setup = {"rotary": ROTARY[kind], "absolute_positions": False, **PARTS, **fields}
    return tiny_model("shrunk" if shrunk else "plain", setup=setup)


WHOLE = [("centred", False), ("index", True), ("learned", True)]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "shrunk"), WHOLE)
def test_engine(kind, shrunk, float32_engines):
    """Its labels, float32 and half, and what stays of a copy; a grid that is not the stored one."""
    model = segmenter(kind, shrunk, absolute_positions=kind == "index", mlp_norm=kind == "index")
    images = pictures((40, 29), 2)
    expected = model.predict(images)
    assert len(expected.unique()) > 1
    engine = model.compile_for_inference((40, 29), 2, dtype=torch.float32)
    assert (engine(images) == expected).float().mean() > 0.995
    assert torch.equal(copy.deepcopy(engine)(images), engine(images))
    half = model.compile_for_inference((40, 29), 2, dtype=torch.bfloat16)
    assert half.function.network.backbone.rope.freqs.dtype == torch.float32
    assert (half(images) == expected).float().mean() > 0.9
    assert torch.equal(model.predict(images), expected)


@torch.no_grad()
def test_packed_layers():
    """In bfloat16 with packed weights, where the processor has them."""
    model = segmenter("centred", mlp="gelu").bfloat16()
    images = model.preprocess(pictures((32, 32), 1))
    plain = model.backbone(images)[-1].float()
    fused = model.fuse().backbone(images)[-1].float()
    assert (fused - plain).norm() < 0.02 * plain.norm()


@torch.no_grad()
def test_one_graph():
    """torch.compile in one graph, for a second size too, and torch.export."""
    model = backbone("learned", shrink_at=1, depth=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in ((32, 32), (16, 40)):
        images = torch.randn(1, 3, *size)
        for a, b in zip(compiled(images), model(images), strict=True):
            torch.testing.assert_close(a, b)
    model.fold_grid((2, 5))
    program = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(program(images)[-1], model(images)[-1])


def test_export_of_any_size_without_antialiasing():
    model = segmenter("index", absolute_positions=True, position_resize="bicubic_antialias")
    with pytest.raises(ValueError, match=r"size: bicubic_antialias of positions differs"):
        LabelGraph(model, Plan())
    LabelGraph(model, Plan((32, 32)))


# Configuration


def test_configuration():
    old = SegViTConfig.preset("vit_tiny", 3).to_dict()
    assert not {"rotary", "absolute_positions", "position_resize", "mlp_norm"} & old["backbone"].keys()
    new = SegViTConfig.preset("dinov3_vits16", 3)
    text = json.dumps(new.to_dict())
    assert SegViTConfig.from_dict(json.loads(text)) == new and '"rescale": 2.0' in text
    index = SegViTConfig.from_fields({**old["backbone"], "num_classes": 2, "taps": (11,), "rotary": {
        "coordinates": "index", "grid": [4, 5]}})  # fmt: skip
    assert index.backbone.rotary.grid == (4, 5)
    assert SegViTConfig.from_dict(json.loads(json.dumps(index.to_dict()))) == index


@pytest.mark.parametrize(
    "values, words",
    [
        ({"coordinates": "polar"}, r"rotary\.coordinates must be 'centred' or 'index', got 'polar'"),
        ({"grid": (2, 2)}, r"are of coordinates 'index', got 'centred'"),
        ({"coordinates": "index", "grid": (0, 2)}, r"at least 1 x 1, got \(0, 2\)"),
        ({"base": 1.0}, r"rotary\.base must be more than 1, got 1\.0"),
        ({"jitter": 0.5}, r"rotary\.jitter must be at least 1, got 0\.5"),
        ({"shift": -1.0}, r"rotary\.shift must be at least 0"),
        ({"basis": 3}, r"RotaryConfig has no field basis"),
        ({"base": "100"}, r"base must be a number"),
    ],
)
def test_bad_rotary(values, words):
    with pytest.raises(ValueError, match=words):
        BackboneConfig(rotary=values)


def test_bad_heads_and_resize():
    with pytest.raises(ValueError, match=r"multiple of 4 channels, got 36 / 6"):
        BackboneConfig(36, 1, 6, rotary=RotaryConfig())
    with pytest.raises(ValueError, match=r"position_resize must be 'bicubic', .* got 'nearest'"):
        BackboneConfig(position_resize="nearest")


def test_what_is_counted():
    """Rotary positions are no products: the counts are those of the same model without them."""
    pytest.importorskip("fvcore")
    from bench.subjects.counts import count_fvcore, count_torch

    images = torch.zeros(1, 3, 32, 32)
    counts = []
    for rotary in (RotaryConfig(), None):
        model = VisionTransformer(config(rotary=rotary), (32, 32), (0, 2)).eval()
        form = torch.nn.Sequential(model)
        counts.append(
            (sum(count_fvcore(form, images)[0].values()), count_torch(form.to("meta"), images.to("meta")))
        )
    tokens, width = 16 + 3, 32
    products = 3 * (tokens * width * width * (3 + 1) + 2 * tokens * tokens * width)
    products += 3 * tokens * (width * 128 + 64 * width) + 16 * 3 * 64 * width
    norms = 3 * 2 * 5 * tokens * width
    assert counts[0] == counts[1] == (products + norms, products + norms)


def test_query_downsample_alone():
    block = QueryDownsample(backbone("centred", shrink_at=None).blocks[0])
    with pytest.raises((RuntimeError, ValueError)):
        block(torch.randn(1, 6, 32), (2, 3), 0, (torch.ones(5, 1, 8), torch.zeros(5, 1, 8)))
