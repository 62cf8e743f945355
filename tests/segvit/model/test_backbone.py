"""The plain ViT against timm's, in every variant whose weights it must load."""

import copy
import dataclasses

import pytest
import torch
from samples import randomise
from torch.nn import functional as F

from segvit.config import BackboneConfig
from segvit.model.backbone import VisionTransformer
from segvit.model.backbone_weights import adapt_backbone_state, infer_backbone_config, resample_patch_kernel
from segvit.model.checkpoint import load_state_dict, read_state_dict
from segvit_kernels import resize_positions

TAPS = (0, 2)


def timm_model(**kwargs):
    vit = pytest.importorskip("timm.models.vision_transformer", reason="needs the extra timm")
    if kwargs.pop("swiglu", False):
        layer = pytest.importorskip("timm.layers").SwiGLUPacked
        kwargs |= {"mlp_layer": layer, "act_layer": torch.nn.SiLU, "mlp_ratio": 3.0}
    sizes = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0, "dynamic_img_size": True}
    return randomise(vit.VisionTransformer(**(sizes | kwargs)))


def load(state, image_size, **overrides):
    config = infer_backbone_config(state, heads=3, **overrides)
    model = VisionTransformer(config, image_size, TAPS)
    adapted = adapt_backbone_state(state, config, model.grid)
    load_state_dict(model, adapted.state_dict, "test")
    return model.eval(), adapted


def timm_features(model, images, norm=False):
    features = model.forward_intermediates(
        images, indices=list(TAPS), norm=norm, output_fmt="NLC", intermediates_only=True
    )
    return list(features)


VARIANTS = {
    "augreg": {"img_size": 64, "patch_size": 16},
    "deit3": {"img_size": 64, "patch_size": 16, "no_embed_class": True, "init_values": 1e-6},
    "dinov2": {"img_size": 56, "patch_size": 14, "init_values": 1e-5},
    "dinov2_registers": {
        "img_size": 56,
        "patch_size": 14,
        "init_values": 1e-5,
        "reg_tokens": 4,
        "no_embed_class": True,
        "swiglu": True,
    },
    "registers_with_positions": {"img_size": 64, "patch_size": 16, "reg_tokens": 2},
    "no_class_token": {
        "img_size": 64,
        "patch_size": 16,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    },
    "no_qkv_bias": {"img_size": 32, "patch_size": 8, "qkv_bias": False},
}


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_features_equal_timm(variant, final_norm):
    theirs = timm_model(**VARIANTS[variant])
    size = VARIANTS[variant]["img_size"]
    ours, _ = load(theirs.state_dict(), (size, size), final_norm=final_norm)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = timm_features(theirs, images, norm=final_norm)
        actual = ours(images)
    for a, b in zip(actual, expected, strict=True):
        assert b.abs().max() > 0.5
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_published_architecture_by_name():
    timm = pytest.importorskip("timm")
    theirs = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=7))
    config = BackboneConfig(width=192, depth=12, heads=3, class_token=True)
    assert infer_backbone_config(theirs.state_dict()) == config
    ours = VisionTransformer(config, (224, 224), TAPS).eval()
    adapted = adapt_backbone_state(theirs.state_dict(), config, ours.grid)
    assert sorted(adapted.ignored) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    load_state_dict(ours, adapted.state_dict, "test")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for a, b in zip(ours(images), timm_features(theirs, images), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_dead_class_token():
    """Without a class token, a checkpoint's own one and its position do not reach the features."""
    theirs = timm_model(**VARIANTS["augreg"])
    state = theirs.state_dict()
    ours, adapted = load(state, (64, 64), class_token=False)
    assert "cls_token" in adapted.ignored
    without = timm_model(**VARIANTS["no_class_token"])
    state = {key: value for key, value in state.items() if key != "cls_token"}
    without.load_state_dict(state | {"pos_embed": state["pos_embed"][:, 1:]})
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(ours(images), timm_features(without, images), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_dinov2s_own_names():
    theirs = timm_model(**VARIANTS["dinov2_registers"])
    state = theirs.state_dict()
    expected, _ = load(state, (56, 56))
    own = {}
    for key, value in state.items():
        key = key.replace("reg_token", "register_tokens").replace("fc1", "w12").replace("fc2", "w3")
        own[key] = value
    # DINOv2 stores a position for the class token, and a token for masked patches.
    shift = torch.randn(1, 1, 48)
    own["cls_token"] = own["cls_token"] - shift
    own["pos_embed"] = torch.cat([shift, own["pos_embed"]], dim=1)
    own["mask_token"] = torch.zeros(1, 48)
    ours, adapted = load(own, (56, 56))
    assert "mask_token" in adapted.ignored
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, dict(expected.named_parameters())[name])


def test_deit3s_own_names():
    state = timm_model(**VARIANTS["deit3"]).state_dict()
    own = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for key, v in state.items()}
    assert own.keys() != state.keys() and infer_backbone_config(own) == infer_backbone_config(state)
    (expected, _), (ours, _) = load(state, (64, 64)), load(own, (64, 64))
    for a, b in zip(ours.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("new_grid", [(6, 6), (3, 7), (4, 4)])
def test_position_resize_equals_timm(new_grid):
    layers = pytest.importorskip("timm.layers")
    positions = torch.randn(1, 16, 8)
    expected = layers.resample_abs_pos_embed(positions, list(new_grid), num_prefix_tokens=0, antialias=False)
    torch.testing.assert_close(resize_positions(positions, (4, 4), new_grid), expected)


def test_other_image_size_resizes_positions():
    model = randomise(VisionTransformer(BackboneConfig(width=32, depth=3, heads=2), (64, 64), TAPS))
    other = VisionTransformer(model.config, (48, 80), TAPS).eval()
    state = adapt_backbone_state(model.state_dict(), model.config, (3, 5))
    assert state.changed == ["position grid 4x4 resized to 3x5"]
    load_state_dict(other, state.state_dict, "test")
    images = torch.randn(2, 3, 48, 80)
    for a, b in zip(model(images), other(images), strict=True):
        torch.testing.assert_close(a, b)
        assert a.shape == (2, 15, 32)


@pytest.mark.parametrize("old", [14, 16])
@pytest.mark.parametrize("new", [8, 12, 14, 16, 24, 32])
def test_patch_kernel_resampling(old, new):
    """Tokens of enlarged patches are those of the patches; a smaller kernel loses what it cannot express."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(5, 3, old, old, generator=generator, dtype=torch.float64)
    patch = torch.randn(4, 3, old, old, generator=generator, dtype=torch.float64)
    resampled = resample_patch_kernel(kernel, new)
    assert resampled.shape == (5, 3, new, new) and resampled.dtype == torch.float64
    if new == old:
        assert resampled is kernel
    elif new > old:
        larger = F.interpolate(patch, size=(new, new), mode="bicubic", align_corners=False)
        tokens = torch.einsum("cdij,bdij->bc", resampled, larger)
        torch.testing.assert_close(tokens, torch.einsum("cdij,bdij->bc", kernel, patch), atol=1e-9, rtol=1e-9)
    else:  # the best that it can do is orthogonal to what it cannot express
        basis = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
        resize = F.interpolate(basis, size=(new, new), mode="bicubic", align_corners=False, antialias=True)
        resize = resize.flatten(1)
        residual = kernel.flatten(2) - resampled.flatten(2) @ resize.T
        assert (residual @ resize).abs().max() < 1e-9
    single = resample_patch_kernel(kernel.float(), new)
    assert single.dtype == torch.float32  # the inverse is float64 all the same
    torch.testing.assert_close(single.double(), resampled, atol=1e-5, rtol=1e-5)


def test_drop_path():
    config = BackboneConfig(width=32, depth=3, heads=2, drop_path=0.4, drop_path_branch="mlp")
    model = VisionTransformer(config, (32, 32), TAPS)
    assert [block.drop_path2.rate for block in model.blocks] == [0.0, 0.2, 0.4]
    assert [block.drop_path1.rate for block in model.blocks] == [0.0, 0.0, 0.0]
    both = VisionTransformer(dataclasses.replace(config, drop_path_branch="both"), (32, 32), TAPS)
    assert [block.drop_path1.rate for block in both.blocks] == [0.0, 0.2, 0.4]

    torch.manual_seed(0)
    drop = model.blocks[2].drop_path2
    x = torch.ones(4000, 2, 3)
    out = drop(x)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    assert (out == out[:, :1, :1]).all(), "an image is dropped as a whole"
    assert abs((out[:, 0, 0] == 0).float().mean().item() - 0.4) < 0.04
    assert drop.eval()(x) is x


def test_gradient_checkpointing_changes_nothing():
    config = BackboneConfig(width=32, depth=3, heads=2, drop_path=0.5)
    model = randomise(VisionTransformer(config, (32, 32), TAPS)).train()
    images = torch.randn(4, 3, 32, 32)
    grads = []
    for enabled in (False, True):
        copied = copy.deepcopy(model)
        copied.gradient_checkpointing = enabled
        torch.manual_seed(3)
        sum(feature.square().sum() for feature in copied(images)).backward()
        grads.append([parameter.grad for parameter in copied.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_bad_states():
    config = BackboneConfig(width=32, depth=3, heads=2)
    state = VisionTransformer(config, (64, 64), TAPS).state_dict()
    with pytest.raises(ValueError, match="15 positions"):
        adapt_backbone_state(state | {"pos_embed": torch.zeros(1, 15, 32)}, config, (4, 4))
    with pytest.raises(ValueError, match="plain ViT"):
        infer_backbone_config({"conv1.weight": torch.zeros(1)})
    oblong = VisionTransformer(config, (32, 128), TAPS).state_dict()
    adapted = adapt_backbone_state(oblong, config, (2, 8))
    assert adapted.changed == ["positions taken as the model's grid, 2x8"]
    assert adapt_backbone_state(oblong, config, (2, 8), {"grid": (2, 8)}).changed == []
    stored = adapt_backbone_state(oblong, config, (2, 8), {"grid": (4, 4)}).changed
    assert stored == ["position grid 4x4 resized to 2x8"]
    shallow = BackboneConfig(width=32, depth=2, heads=2)
    adapted = adapt_backbone_state(state, shallow, (4, 4))
    assert all(key.startswith("blocks.2.") for key in adapted.ignored) and adapted.ignored
    for odd in ("blocks", "blocks.", "blocks.²"):  # digits that are no numbers
        assert odd not in adapt_backbone_state(state | {odd: torch.zeros(1)}, shallow, (4, 4)).ignored


def test_real_dinov2_weights(shared_dir):
    """A real ViT-S/14 loads by name: like timm's at patch 14, with the same features at patch 16."""
    timm = pytest.importorskip("timm")
    state = read_state_dict(shared_dir / "weights" / "dinov2_vits14_fp16.safetensors")
    size = 14 * 12
    images = F.interpolate(torch.randn(1, 3, 12, 12), size=(size, size), mode="bicubic")
    models = {}
    for patch in (14, 16):
        config = infer_backbone_config(state, patch_size=patch)
        assert (config.width, config.depth, config.heads, config.class_token) == (384, 12, 6, True)
        with torch.device("meta"):
            model = VisionTransformer(config, (12 * patch, 12 * patch), (5, 11)).eval()
        adapted = adapt_backbone_state(state, config, model.grid)
        model.load_state_dict(adapted.state_dict, assign=True)
        models[patch] = model
    with torch.device("meta"):
        theirs = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=518).eval()
    theirs.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    # timm's resizing of positions has anti-aliasing; the same positions make the rest comparable.
    theirs.pos_embed = torch.nn.Parameter(torch.cat([torch.zeros(1, 1, 384), models[14].pos_embed], dim=1))
    theirs.cls_token = models[14].cls_token
    theirs.patch_embed.img_size, theirs.patch_embed.grid_size = (size, size), (12, 12)
    with torch.no_grad():
        native = models[14](images)
        expected = theirs.forward_intermediates(
            images, indices=[5, 11], norm=False, output_fmt="NLC", intermediates_only=True
        )
        for a, b in zip(native, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
        larger = F.interpolate(images, size=(12 * 16, 12 * 16), mode="bicubic", align_corners=False)
        for a, b in zip(models[16](larger), native, strict=True):
            assert F.cosine_similarity(a, b, dim=-1).mean() > 0.99
