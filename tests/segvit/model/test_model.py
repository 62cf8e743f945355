"""SegViT against published behaviour, in its modes (fused, compiled), and from images to label maps."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from samples import assert_equal_outputs, sharp_config, sharp_model
from torch.nn import functional as F

from segvit import BackboneConfig, SegViT, SegViTConfig, SegViTLoss, SegViTOutput
from segvit.model.checkpoint import load_state_dict, rename_published_keys

TERMS = {"class": "decode.loss_ce", "focal": "decode.loss_mask", "dice": "decode.loss_dice"}


# Published behaviour


@pytest.fixture(scope="module")
def fixture(shared_dir):
    values = torch.load(
        shared_dir / "reference/fixtures/atm_vit_small.pt", map_location="cpu", weights_only=True
    )
    for key in ("state_dict", "eval", "eval_extra"):
        values[key] = {name: v.float() for name, v in values[key].items() if isinstance(v, torch.Tensor)}
    values["img"], values["label"] = values["img"].float(), values["label"].long().squeeze(1)
    return values


@pytest.fixture(scope="module")
def published(fixture):
    backbone, head = fixture["config"]["backbone"], fixture["config"]["decode_head"]
    config = SegViTConfig(
        BackboneConfig(
            width=backbone["embed_dims"], depth=backbone["num_layers"], heads=backbone["num_heads"]
        ),
        num_classes=head["num_classes"],
        taps=tuple(backbone["out_indices"]),
        decoder_dropout=0.0,
        decoder_dim=head["embed_dims"],
        decoder_heads=head["num_heads"],
        image_size=tuple(backbone["img_size"]),
    )
    model = SegViT(config)
    load_state_dict(model, rename_published_keys(fixture["state_dict"]), "fixture")
    return model.eval()


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@torch.no_grad()
def test_published_features_tokens_and_masks(fixture, published):
    expected, images = fixture["eval"], fixture["img"]
    features = published.backbone(images)
    for index, feature in enumerate(features):
        close(feature.transpose(1, 2).unflatten(-1, (6, 6)), expected[f"backbone_out.{index}"])
    for index, stage in enumerate(published.decoder(features, (6, 6))):
        close(stage.tokens, expected[f"query.{index}"])
        close(stage.mask_logits.unflatten(-1, (6, 6)), expected[f"stage_masks.{index}"])
        close(stage.class_logits, expected["pred_logits_all"][index])
    for index, similarity in enumerate(published.similarity_maps(images)):
        close(similarity, expected[f"stage_attn.{index}"])


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_published_predictions(fixture, published, fused):
    expected = fixture["eval"]
    model = copy.deepcopy(published)
    output = (model.fuse() if fused else model)(fixture["img"])
    close(output.class_logits, expected["pred_logits"])
    masks = F.interpolate(output.mask_logits, size=(96, 96), mode="bilinear", align_corners=False)
    close(masks, expected["pred_masks"])
    close(model.semantic_scores(output, (96, 96)), expected["pred"])
    assert (model.labels(output, (96, 96)) == expected["argmax"]).all()
    # Published models score at the training size whatever the image's, and resize the scores.
    output = model(fixture["eval_extra"]["other_size.img"])
    scores = F.interpolate(model.semantic_scores(output, (96, 96)), size=(64, 64), mode="bilinear")
    close(scores, fixture["eval_extra"]["other_size.final"])


def test_published_losses_and_gradients(fixture, published):
    model = copy.deepcopy(published).train()
    output = model(fixture["img"])
    losses = SegViTLoss(7)(output, fixture["label"])
    for prefix, suffix in (("", ""), ("aux0.", "_0"), ("aux1.", "_1")):
        for term, name in TERMS.items():
            assert losses[prefix + term].item() == pytest.approx(
                float(fixture["train"]["losses"][name + suffix]), abs=2e-4
            )
    assert losses["total"].item() == pytest.approx(float(fixture["train"]["total"]), abs=1e-3)

    losses["total"].backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, expected in rename_published_keys(fixture["train"]["grads"]).items():
        assert (grads[name] - expected).norm() <= 1e-4 * expected.norm(), name
    norms = {name: torch.tensor([[norm]]) for name, norm in fixture["train"]["grad_norms"].items()}
    norms.pop("backbone.pos_embed")  # of the class token's position too
    norms = {name: float(norm) for name, norm in rename_published_keys(norms).items()}
    assert set(norms) | {"backbone.pos_embed"} == set(grads)
    for name, norm in norms.items():
        assert grads[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("case, images", [("image1_all_ignored", [1]), ("both_all_ignored", [0, 1])])
def test_published_losses_without_labels(fixture, published, case, images):
    labels = fixture["label"].clone()
    expected = fixture["edge_losses"][case]
    labels[images] = 255
    with torch.no_grad():
        losses = SegViTLoss(7)(copy.deepcopy(published).train()(fixture["img"]), labels)
    for prefix, suffix in (("", ""), ("aux0.", "_0"), ("aux1.", "_1")):
        for term, name in TERMS.items():
            assert losses[prefix + term].item() == pytest.approx(float(expected[name + suffix]), abs=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("bug", ["self_attention", "norm_eps", "order", "accumulation", "scale"])
def test_planted_bugs_show(fixture, published, bug):
    """The tolerance is tight enough: small mistakes exceed it."""
    model = copy.deepcopy(published)
    decoder = model.decoder
    if bug == "self_attention":
        decoder.stages[1].layers[2].attend_tokens = lambda tokens: decoder.stages[1].layers[2].norm1(tokens)
    elif bug == "norm_eps":
        for block in model.backbone.blocks:
            block.norm1.eps = 1e-3
    elif bug == "order":
        decoder.stages[0], decoder.stages[1] = decoder.stages[1], decoder.stages[0]
    elif bug == "accumulation":
        forward = decoder.forward
        decoder.forward = lambda features, grid, **_: forward(features, grid, accumulate=False)
    elif bug == "scale":
        decoder.stages[2].layers[2].atm.q.weight *= 1.001
    output = model(fixture["img"])
    difference = (output.mask_logits - fixture["eval"]["stage_masks.2"]).abs().max()
    assert difference > 1e-3


# Shapes and modes


def test_shapes_and_other_sizes():
    model = sharp_model(class_token=True, register_tokens=2, layer_scale=0.1)
    for size in ((32, 32), (48, 24), (8, 8)):
        output = model(torch.randn(2, 3, *size))
        assert output.class_logits.shape == (2, 5, 6)
        assert output.mask_logits.shape == (2, 5, size[0] // 8, size[1] // 8)
        assert [masks.shape for _, masks in output.auxiliary] == [output.mask_logits.shape]
    assert model(torch.randn(0, 3, 32, 32)).mask_logits.shape == (0, 5, 4, 4)


def test_images_do_not_see_each_other():
    model = sharp_model()
    images = torch.randn(3, 3, 32, 40)
    batch = model(images)
    for index in range(3):
        single = model(images[index : index + 1])
        torch.testing.assert_close(single.mask_logits[0], batch.mask_logits[index], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(1, 3, 33, 32), "multiples of 8"),
        (torch.zeros(3, 32, 32), r"got \(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), r"got \(1, 1, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "preprocess"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        sharp_model()(images)


@torch.no_grad()
def test_fuse(called):
    model = sharp_model(class_token=True, decoder_depth=3)
    images = torch.randn(2, 3, 40, 24)
    expected = model(images)
    keys = set(model.state_dict())
    assert model.fuse() is model
    stages = model.decoder.stages
    calls = called(stages[0].layers[0].self_attn, *(stage.layers[1].atm.k for stage in stages))
    assert_equal_outputs(model(images), expected)
    assert_equal_outputs(model(images), expected)
    assert not calls, "folded parts still run"
    assert set(model.state_dict()) == keys
    model.train().eval()
    assert_equal_outputs(model(images), expected)
    assert calls
    with pytest.raises(RuntimeError, match="eval"):
        model.train().fuse()


@torch.no_grad()
def test_loading_weights_undoes_fuse():
    model, other = sharp_model(0).fuse(), sharp_model(1)
    images = torch.randn(1, 3, 40, 40)
    model(images)
    model.load_state_dict(other.state_dict())
    assert_equal_outputs(model(images), other(images))


@torch.no_grad()
def test_half_precision():
    model = sharp_model(num_classes=3)
    images = torch.randn(1, 3, 32, 32)
    expected = model(images)
    half = copy.deepcopy(model).to(torch.bfloat16).fuse()
    output = half(images.bfloat16())
    assert output.mask_logits.dtype == torch.bfloat16
    scale = expected.mask_logits.abs().max()
    assert (output.mask_logits.float() - expected.mask_logits).abs().max() < 0.1 * scale
    assert half.labels(output, (32, 32)).shape == (1, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images)
    assert (output.mask_logits.float() - expected.mask_logits).abs().max() < 0.1 * scale


def test_dropout_differs_between_images():
    """Also in the first self-attention, whose input is the same for all images."""
    model = sharp_model(decoder_dropout=0.5).train()
    seen = []
    model.decoder.stages[0].layers[0].self_attn.register_forward_hook(lambda *args: seen.append(args[2]))
    model(torch.randn(2, 3, 32, 32))
    assert not torch.allclose(seen[0][0], seen[0][-1])


def test_gradient_checkpointing():
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))
    grads = []
    for enabled in (False, True):
        model = sharp_model(drop_path=0.5).train().set_gradient_checkpointing(enabled)
        torch.manual_seed(0)
        SegViTLoss(5)(model(images), labels)["total"].backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# Compilation. AOTAutograd without code generation finds graph breaks and wrong shapes in seconds.


def compile_model(**overrides):
    smallest = {"depth": 2, "taps": (0, 1), "decoder_depth": 1, "class_token": True}
    return sharp_model(**(smallest | overrides))


def test_compiled_training():
    """Of one stage; two are in the graphs of the next tests."""
    model = compile_model(decoder_dropout=0.0, depth=1, taps=(0,)).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((32, 32), (48, 40)):
        images, labels = torch.randn(2, 3, *size), torch.randint(0, 5, (2, *size))
        grads = []
        for forward in (model, compiled):
            model.zero_grad()
            SegViTLoss(5)(forward(images), labels)["total"].backward()
            grads.append([parameter.grad.clone() for parameter in model.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_compiled_training_with_dropout_and_checkpointing():
    model = compile_model(drop_path=0.3, drop_path_branch="both", layer_scale=0.1, register_tokens=1)
    model.train().set_gradient_checkpointing()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    SegViTLoss(5)(compiled(torch.randn(2, 3, 48, 40)), torch.randint(0, 5, (2, 48, 40)))["total"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_compiled_inference():
    model = compile_model().fuse()

    def label_map(images):
        return model.labels(model(images), tuple(images.shape[-2:]))

    compiled = torch.compile(label_map, fullgraph=True, backend="aot_eager")
    for size in ((32, 32), (48, 40)):
        images = torch.randn(2, 3, *size)
        assert (compiled(images) == label_map(images)).float().mean() > 0.999


# From images to label maps


def random_output(batch=2, classes=5, grid=(5, 7)):
    generator = torch.Generator().manual_seed(0)
    class_logits = 2 * torch.randn(batch, classes, classes + 1, generator=generator)
    return SegViTOutput(class_logits, 3 * torch.randn(batch, classes, *grid, generator=generator), [])


@pytest.mark.parametrize("size", [(40, 56), (33, 100), (5, 7), (3, 4)])
def test_labels_are_the_argmax_of_scores(size):
    model, output = sharp_model(), random_output()
    scores = model.semantic_scores(output, size)
    expected = torch.einsum(
        "bqc,bqhw->bchw",
        output.class_logits.double().softmax(-1)[..., :5],
        F.interpolate(output.mask_logits.double(), size=size, mode="bilinear").sigmoid(),
    )
    torch.testing.assert_close(scores.double(), expected, atol=1e-5, rtol=1e-5)
    labels = model.labels(output, size)
    assert labels.dtype == torch.uint8 and labels.shape == (2, *size)
    chosen = expected.gather(1, labels.long()[:, None])[:, 0]
    assert (expected.amax(1) - chosen).max() < 1e-5, "a pixel has a clearly better class"
    assert labels.unique().numel() > 2


def test_many_classes_take_int16():
    model = sharp_model()
    output = random_output(batch=1, classes=300)
    output.class_logits[:, :, 280] += 50
    labels = model.labels(output, (10, 14))
    assert labels.dtype == torch.int16 and (labels == 280).all()


def test_preprocess():
    model = sharp_model(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    out = model.preprocess(images)
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 1.0)]):
        torch.testing.assert_close(out[:, channel], (images[:, channel].float() / 255 - mean) / std)
    assert torch.equal(model.preprocess(images[0]), out[0])
    with pytest.raises(TypeError, match=r"uint8, got torch\.float32"):
        model.preprocess(images.float())
    with pytest.raises(ValueError, match=r"got \(2, 4, 5\)"):
        model.preprocess(images[0, :2])


def test_predict_takes_all_forms(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    model = sharp_model().train()
    array = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    pil.fromarray(array).save(tmp_path / "image.png")
    expected = model.predict(tensor)
    assert expected.shape == (37, 50) and expected.dtype == torch.uint8
    assert model.training, "the mode is as before"
    for form in (array, pil.fromarray(array), tmp_path / "image.png", str(tmp_path / "image.png")):
        assert torch.equal(model.predict(form), expected)
    assert model.predict(torch.stack([tensor, tensor])).shape == (2, 37, 50)
    several = model.predict([array, array[:20, :11]])
    assert torch.equal(several[0], expected) and several[1].shape == (20, 11)

    # The definition: pad with the mean colour, upsample by the patch size, cut.
    model.eval()
    with torch.no_grad():
        padded = F.pad(model.preprocess(tensor[None]), (0, 6, 0, 3))
        scores = model.semantic_scores(model(padded), (40, 56))[..., :37, :50]
    assert (scores.argmax(1)[0] == expected).float().mean() > 0.999
    grey = pil.fromarray(array[..., 0])
    assert torch.equal(model.predict(grey), model.predict(np.repeat(array[..., :1], 3, axis=2)))


def test_predict_mistakes(tmp_path):
    model = sharp_model()
    with pytest.raises(TypeError, match="got dict"):
        model.predict({})
    with pytest.raises(TypeError, match=r"uint8, got torch\.float32"):
        model.predict(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"\(H, W, 3\), got \(8, 8\)"):
        model.predict(np.zeros((8, 8), dtype=np.uint8))
    pytest.importorskip("PIL")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        model.predict(tmp_path / "nowhere.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        model.predict(tmp_path / "broken.jpg")


# Recipe and configuration


def test_parameter_groups():
    model = sharp_model(layer_scale=0.1, class_token=True)
    groups = {group["name"]: group for group in model.parameter_groups(1e-3, 0.05, decoder_lr_scale=4.0)}
    settings = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert settings == {"backbone": (1e-3, 0.05), "backbone_norms": (1e-3, 0.0), "decoder": (4e-3, 0.05)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [names[id(parameter)] for group in groups.values() for parameter in group["params"]]
    assert sorted(listed) == sorted(names.values()), "every parameter once"
    undecayed = {names[id(parameter)] for parameter in groups["backbone_norms"]["params"]}
    assert undecayed == {
        n for n in names.values() if n.startswith("backbone") and ("norm" in n or "gamma" in n)
    }
    torch.optim.AdamW(model.parameter_groups(1e-3, 0.05))


def test_initialisation():
    torch.manual_seed(0)
    model = SegViT(sharp_config(width=256, heads=4, num_classes=50))
    decoder = model.decoder
    assert abs(decoder.class_tokens.std().item() - 1) < 0.05
    attention = decoder.stages[0].layers[0].self_attn
    limit = (6 / (128 + 3 * 128)) ** 0.5
    assert 0.95 * limit < attention.in_proj_weight.abs().max() <= limit
    for module in decoder.modules():
        if isinstance(module, torch.nn.Linear):
            assert abs(module.weight.std().item() - 0.02) < 0.002 and (module.bias == 0).all()
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == 1e-5
    assert {m.eps for m in model.backbone.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vit_tiny", (192, 12, 3, (5, 7, 11), 96, 3, 0.1)),
        ("vit_small", (384, 12, 6, (5, 7, 11), 192, 6, 0.1)),
        ("vit_base", (768, 12, 12, (5, 7, 11), 384, 12, 0.1)),
        ("vit_large", (1024, 24, 16, (7, 15, 23), 512, 16, 0.3)),
    ],
)
def test_presets(name, expected):
    config = SegViTConfig.preset(name, 150)
    backbone = config.backbone
    actual = (backbone.width, backbone.depth, backbone.heads, config.taps, config.decoder_dim)
    assert (*actual, config.decoder_heads, backbone.drop_path) == expected
    assert (backbone.patch_size, config.decoder_depth, config.decoder_dropout) == (16, 3, 0.1)


def test_config_round_trip():
    config = SegViTConfig.preset(
        "vit_small",
        2,
        layer_scale=1e-5,
        image_size=(64, 96),
        class_names=("a", "b"),
        palette=((1, 2, 3), (4, 5, 6)),
    )
    assert config.backbone.layer_scale == 1e-5
    assert SegViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(dataclasses.replace(config))
    assert SegViTConfig.preset("vit_tiny", 3, image_size=224).image_size == (224, 224)
    colours = np.zeros((2, 3), np.uint8)
    counted = SegViTConfig.preset("vit_tiny", np.int64(2), drop_path=np.float32(0.5), palette=colours)
    plain = SegViTConfig.preset("vit_tiny", 2, drop_path=0.5, palette=((0, 0, 0), (0, 0, 0)))
    assert SegViTConfig.from_dict(json.loads(json.dumps(counted.to_dict()))) == plain


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SegViTConfig.preset("vit_huge", 3), "unknown preset 'vit_huge'; known: vit_tiny"),
        (lambda: SegViTConfig.preset("vit_tiny", 3, windth=4), "no field windth"),
        (lambda: SegViTConfig.from_dict({"num_classes": 3}), "needs backbone, taps"),
        (lambda: BackboneConfig.from_dict({"width": "wide"}), "width must be a whole number"),
        (lambda: sharp_config(num_classes=0), "num_classes must be at least 1"),
        (lambda: sharp_config(taps=(0, 1)), "end with the last block, 2; got"),
        (lambda: sharp_config(image_size=(30, 32)), r"multiples of the patch size 8, got \(30, 32\)"),
        (lambda: sharp_config(heads=5), "width 32 is not divisible by heads 5"),
        (lambda: sharp_config(decoder_heads=3), "decoder_dim 16 is not divisible"),
        (lambda: sharp_config(class_names=("a",)), "class_names must have num_classes = 5 entries, got 1"),
        (
            lambda: sharp_config(palette=[(0, 0, 0)] * 4 + [(0, 256, 0)]),
            r"palette must have values from 0 to 255, got \[\(0, 256, 0\)\]",
        ),
        (lambda: sharp_config(mlp="relu"), "'relu'"),
    ],
)
def test_config_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
