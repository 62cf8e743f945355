"""Every backbone against its own library, on random weights: the same features, at its size and at others."""

import pytest
import torch

from segvit import SegViT, SegViTConfig
from segvit.config import PRESETS
from segvit.model.backbone import VisionTransformer
from segvit.model.backbone_weights import adapt_backbone_state
from segvit.model.checkpoint import load_state_dict, read_config
from segvit.model.foreign import why_not_plain
from segvit.model.pretrained import Pretrained, known_from_timm, open_pretrained

TAPS = (0, 2)
NARROW = {"depth": 3, "embed_dim": 96, "num_heads": 3}
TIMM = {
    "vit_small_patch16_dinov3": {},
    "vit_small_plus_patch16_dinov3_qkvb": {},  # SwiGLU, biases of query and value
    "eva02_tiny_patch14_224": {},
    "eva02_base_patch14_224": {},  # separate projections and gates, a norm in the feed-forward part
    "eva02_base_patch16_clip_224": {},  # and in the attention
    "vit_base_patch16_siglip_256": {},
    "vit_pe_core_base_patch16_224": {},
    "vit_pe_spatial_small_patch16_512": {"img_size": 128},
    "vit_pe_lang_gigantic_patch14_448": {"img_size": 112},  # no class token, LayerScale
    "vit_small_patch16_rope_224": {},
    "vit_small_patch16_rope_ape_224": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_small_patch16_rope_mixed_ape_224": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},
}
SIZES = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 64,
    "patch_size": 8,
}  # fmt: skip
TRANSFORMERS = {
    "DINOv3ViT": {"num_register_tokens": 4, "image_size": 32},
    "DINOv3ViT, gated": {
        "num_register_tokens": 2,
        "use_gated_mlp": True,
        "hidden_act": "silu",
        "rope_theta": 50.0,
    },
    "SiglipVision": {"image_size": 32},  # SigLIP 2 at one size is SigLIP
    "Siglip2Vision": {"num_patches": 16},
}


@torch.no_grad()
def randomise(module):
    """Random values everywhere, but for learned frequencies; also in the keys' bias, if there is one."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if not name.endswith("freqs"):
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + (parameter.ndim == 1 and "bias" not in name))
    return module.eval()


def timm_model(name, **more):
    timm = pytest.importorskip("timm", reason="needs the extra timm")
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    return randomise(
        timm.create_model(
            name, num_classes=0, **{**NARROW, "dynamic_img_size": True, **TIMM.get(name, {}), **more}
        )
    )


def timm_features(model, images):
    return model.forward_intermediates(
        images, indices=list(TAPS), norm=False, output_fmt="NLC", intermediates_only=True
    )


def from_timm(name, tmp_path):
    model = timm_model(name)
    known, notes = known_from_timm(model)
    return Pretrained(name, model.state_dict(), known, notes), lambda images: timm_features(model, images)


def from_transformers(name, tmp_path):
    """From the folder that transformers writes."""
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    kind = name.partition(",")[0]
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    setup = getattr(transformers, f"{kind}Config")(**SIZES, **TRANSFORMERS[name])
    model = randomise(getattr(transformers, f"{kind}Model")(setup))
    model.save_pretrained(tmp_path)

    def features(images):
        rows, columns = images.shape[-2] // 8, images.shape[-1] // 8
        call = {"pixel_values": images}
        if kind == "SiglipVision":
            call["interpolate_pos_encoding"] = True
        if kind == "Siglip2Vision":
            patches = images.unflatten(3, (columns, 8)).unflatten(2, (rows, 8)).permute(0, 2, 4, 3, 5, 1)
            call = {"pixel_values": patches.flatten(3).flatten(1, 2)}
            call["spatial_shapes"] = torch.tensor([[rows, columns]] * len(images))
            call["pixel_attention_mask"] = torch.ones(len(images), rows * columns, dtype=torch.int64)
        states = model(**call, output_hidden_states=True).hidden_states
        return [states[tap + 1][:, -rows * columns :] for tap in TAPS]

    return open_pretrained(tmp_path), features


def renamed(state, rules):
    for ours, theirs in rules:
        state = {key.replace(ours, theirs): value for key, value in state.items()}
    return state


def from_meta(name, tmp_path):
    """The file of DINOv3's authors, whose keys' bias is masked: features are those without it."""
    model = timm_model(name)
    rules = [("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")]
    if "plus" in name:
        rules += [("fc1_g", "w1"), ("fc1_x", "w2"), ("mlp.fc2", "mlp.w3")]
    state = renamed(model.state_dict(), rules)
    for key in [key for key in state if key.endswith("q_bias")]:
        block = key.removesuffix("q_bias")
        query, value = state.pop(key), state.pop(f"{block}v_bias")
        state[f"{block}qkv.bias"] = torch.cat([query, torch.randn_like(query), value])
        state[f"{block}qkv.bias_mask"] = torch.cat([torch.ones(96), torch.zeros(96), torch.ones(96)])
    state["rope_embed.periods"] = (100 ** (torch.arange(8) / 8)).bfloat16()
    state["mask_token"] = torch.zeros(1, 96)
    torch.save(state, tmp_path / "dinov3_vits16_pretrain.pth")
    weights = open_pretrained(tmp_path / "dinov3_vits16_pretrain.pth")
    return weights, lambda images: timm_features(model, images)


def from_eva(name, tmp_path):
    """EVA-02's own names, with the table of its rotary positions."""
    model = timm_model(name)
    state = renamed(
        model.state_dict(),
        [("fc1_g", "w1"), ("fc1_x", "w2"), ("mlp.fc2", "mlp.w3"), ("mlp.norm", "mlp.ffn_ln"),
         ("attn.norm", "attn.inner_attn_ln"), ("q_proj.bias", "q_bias"), ("v_proj.bias", "v_bias")],
    )  # fmt: skip
    sin, cos = model.rope.get_embed(shape=model.patch_embed.grid_size).chunk(2, -1)
    for prefix in ("", "blocks.0.attn.", "blocks.1.attn.", "blocks.2.attn."):
        state |= {f"{prefix}rope.freqs_cos": cos, f"{prefix}rope.freqs_sin": sin}
    torch.save({"module": {f"visual.{key}": value for key, value in state.items()}}, tmp_path / "eva02.pt")
    return open_pretrained(tmp_path / "eva02.pt"), lambda images: timm_features(model, images)


def from_pe(name, tmp_path):
    """Perception Encoder's own names, which do not tell its heads of 64 channels."""
    model = timm_model(name, embed_dim=128, num_heads=2)
    state = renamed(
        {key: value for key, value in model.state_dict().items() if not key.startswith("attn_pool")},
        [("norm_pre", "ln_pre"), ("patch_embed.proj", "conv1"), (".norm", ".ln_"), ("norm.", "ln_post."),
         (".attn.qkv.", ".attn.in_proj_"), (".attn.proj.", ".attn.out_proj."), (".fc1.", ".c_fc."),
         (".fc2.", ".c_proj."), ("blocks.", "transformer.resblocks.")],
    )  # fmt: skip
    state["class_embedding"], state["positional_embedding"] = (
        state.pop("cls_token")[0, 0],
        state.pop("pos_embed")[0],
    )
    state["attn_pool.probe"] = torch.zeros(1, 1, 128)
    torch.save({f"visual.{key}": value for key, value in state.items()}, tmp_path / "PE.pt")
    return open_pretrained(tmp_path / "PE.pt"), lambda images: timm_features(model, images)


CASES = {
    **{name: (from_timm, name) for name in TIMM},
    **{f"transformers {name}": (from_transformers, name) for name in TRANSFORMERS},
    "Meta's DINOv3": (from_meta, "vit_small_patch16_dinov3_qkvb"),
    "Meta's DINOv3 plus": (from_meta, "vit_small_plus_patch16_dinov3_qkvb"),
    "Meta's PE core": (from_pe, "vit_pe_core_base_patch16_224"),
    "EVA-02's": (from_eva, "eva02_base_patch14_224"),
    "EVA-02 CLIP's": (from_eva, "eva02_base_patch16_clip_224"),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_features_are_its_librarys(case, tmp_path):
    make, name = CASES[case]
    weights, features = make(name, tmp_path)
    config = weights.backbone_config()
    patch = config.patch_size
    stored = weights.known.get("grid", (14, 14))
    ours = VisionTransformer(config, (stored[0] * patch, stored[1] * patch), TAPS).eval()
    adapted = adapt_backbone_state(weights.state_dict, config, ours.grid, weights.known)
    load_state_dict(ours, adapted.state_dict, case)
    generator = torch.Generator().manual_seed(1)
    own = make in (from_pe, from_eva)  # whose authors resize positions otherwise than timm
    for grid in [stored] if own else [stored, (5, 17)]:
        images = torch.randn(2, 3, grid[0] * patch, grid[1] * patch, generator=generator)
        for a, b in zip(ours(images), features(images), strict=True):
            assert a.shape == b.shape and b.abs().max() > 0.5
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_planted_faults_show(tmp_path):
    """The comparison above is not blind to any of these."""
    weights, features = from_timm("eva02_base_patch16_clip_224", tmp_path)
    config, images = weights.backbone_config(), torch.randn(1, 3, 224, 224)
    pairs, axes = weights.known["rotary_layout"]
    rotary = weights.known["rotary"]
    faults = [
        {"rotary_layout": ("halves", axes)},
        {"rotary_layout": (pairs, "xy")},
        {"rotary": type(rotary)("index", base=100.0, grid=rotary.grid)},
    ]
    with torch.no_grad():
        expected = features(images)[-1]
        for fault in [{}, *faults]:
            ours = VisionTransformer(config, (224, 224), TAPS).eval()
            known = {**weights.known, **fault}
            load_state_dict(
                ours, adapt_backbone_state(weights.state_dict, config, ours.grid, known).state_dict, "x"
            )
            error = (ours(images)[-1] - expected).abs().max() / expected.abs().max()
            assert (error > 1e-3) == bool(fault), fault


# What is not told is not guessed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_small_patch16_dinov3", "no position embedding"),
        ("eva02_tiny_patch14_224", "rotary positions"),
        ("eva02_base_patch14_224", "sub-LN"),
        ("vit_pe_core_base_patch16_224", "Perception Encoder"),
        ("vit_pe_spatial_small_patch16_512", "Perception Encoder"),
        ("vit_small_patch16_rope_ape_224", "rotary positions"),
    ],
)
def test_a_bare_file_is_refused(name, words):
    """Sorted names without a configuration, whatever is said of the activation."""
    state = dict(sorted(timm_model(name).state_dict().items()))
    for known in ({}, {"mlp": "gelu"}):
        reason = why_not_plain(state, known)
        assert words in reason and "\n" not in reason and "timm:NAME" in reason


def segmenter(**fields):
    sizes = {"width": 96, "depth": 3, "heads": 3, "taps": TAPS, "image_size": 64, "mlp_ratio": 4.0}
    return SegViT(SegViTConfig.preset("dinov3_vits16", 3, **{**sizes, **fields}))


def test_what_does_not_fit_is_said(tmp_path):
    """Rotary positions on one side only, or of another kind, and our own weights without a configuration."""
    weights, _ = from_timm("vit_small_patch16_dinov3", tmp_path)
    model = segmenter(qkv_bias=False)
    report = model.load_backbone(weights)
    assert report.loaded == len(model.backbone.state_dict())
    plain = segmenter(rotary=None, absolute_positions=True, qkv_bias=False)
    with pytest.raises(ValueError, match=r"--model '\{absolute_positions: False, rotary: \{\}\}'"):
        plain.load_backbone(weights)
    rotary = {"coordinates": "index", "base": 100.0}
    with pytest.raises(ValueError, match=r"a ViT with rotary \{\}; use --model '\{rotary: \{\}\}'"):
        segmenter(rotary=rotary, qkv_bias=False).load_backbone(weights)
    bare = {key: value for key, value in model.backbone.state_dict().items()}
    with pytest.raises(ValueError, match="rotary positions"):
        segmenter(qkv_bias=False).load_backbone(bare)
    with pytest.raises(ValueError, match=r"rope\.freqs"):
        model.load_backbone(
            segmenter(rotary=None, qkv_bias=False, absolute_positions=True).backbone.state_dict()
        )
    pytest.importorskip("safetensors")
    model.save_pretrained(tmp_path / "own")
    other = segmenter(qkv_bias=False)
    other.load_backbone(tmp_path / "own")
    for a, b in zip(other.backbone.state_dict().values(), model.backbone.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# The way in: files, names, other patches


def dinov3_file(tmp_path, patch=8):
    weights, _ = from_meta("vit_small_patch16_dinov3_qkvb", tmp_path)
    state = dict(weights.state_dict)
    kernel = torch.randn(96, 3, patch, patch, generator=torch.Generator().manual_seed(2))
    torch.save({**state, "patch_embed.proj.weight": 0.1 * kernel}, tmp_path / "dinov3.pth")
    return tmp_path / "dinov3.pth"


def trained_model(tmp_path, weights, **fields):
    """What `segvit train --preset dinov3_vits16 --backbone-weights WEIGHTS` starts from."""
    pytest.importorskip("lightning_fabric", reason="needs the extra train")
    from types import SimpleNamespace

    from segvit.options import TrainConfig
    from segvit.training.build import build_model

    sizes = {"width": 96, "depth": 3, "heads": 3, "taps": list(TAPS), "patch_size": 8}
    config = TrainConfig(
        data="synthetic", out=str(tmp_path / "run"), image_size=96, backbone_weights=str(weights),
        preset="dinov3_vits16", model={**sizes, **fields},
    )  # fmt: skip
    return build_model(config, SimpleNamespace(num_classes=3, class_names=None, palette=None)).eval()


@torch.no_grad()
def test_other_patch_sizes(tmp_path):
    """Pictures whose every patch is enlarged have the features of the pictures, to the last block."""
    weights = dinov3_file(tmp_path)
    original = trained_model(tmp_path, weights)
    assert original.config.backbone.rotary.rescale == 2.0  # the preset's, in training
    images = torch.randn(1, 3, 4 * 8, 6 * 8, generator=torch.Generator().manual_seed(3))
    expected = original.backbone(images)
    patches = images.unflatten(3, (6, 8)).unflatten(2, (4, 8)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    for patch in (12, 16, 24, 32):
        model = trained_model(tmp_path, weights, patch_size=patch)
        assert model.config.backbone.patch_size == patch
        larger = torch.nn.functional.interpolate(patches, size=(patch, patch), mode="bicubic")
        larger = larger.unflatten(0, (1, 4, 6)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        for a, b in zip(model.backbone(larger), expected, strict=True):
            assert (a - b).abs().max() < 1e-4 * b.abs().max()


def test_hub_names(tmp_path, monkeypatch):
    """hf:OWNER/NAME is fetched, whatever lies here under that name."""
    hub = pytest.importorskip("huggingface_hub", reason="needs the extra hub")
    asked = []

    def snapshot_download(repository, revision=None, allow_patterns=None):
        asked.append((repository, revision))
        return str(tmp_path / "hub")

    from_transformers("DINOv3ViT", tmp_path / "hub")
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facebook/dinov3").mkdir(parents=True)
    weights = open_pretrained("hf:facebook/dinov3@v1")
    assert asked == [("facebook/dinov3", "v1")] and weights.known["rotary"].rescale == 2.0
    for wrong in ("hf:dinov3", "hf:", "hf:a/b/c"):
        with pytest.raises(ValueError, match=r"expected hf:OWNER/NAME"):
            open_pretrained(wrong)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="hub") as error:
        open_pretrained("hf:facebook/dinov3")
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_convert(tmp_path, capsys):
    """A file of DINOv3's authors becomes a folder that tells all, with the same features."""
    pytest.importorskip("safetensors")
    from segvit.cli import main

    weights, features = from_meta("vit_small_patch16_dinov3_qkvb", tmp_path)
    assert main(["convert", weights.name, str(tmp_path / "folder")]) == 0
    out = capsys.readouterr().out
    assert "a plain ViT of width 96 with 3 blocks of 3 heads, patch 16, rotary positions" in out
    assert f"segvit train --backbone-weights {tmp_path / 'folder'}" in out and "unused: mask_token" in out
    converted = open_pretrained(tmp_path / "folder")
    config = converted.backbone_config()
    assert config.rotary == weights.backbone_config().rotary and config.norm_eps == 1e-5
    ours = VisionTransformer(config, (64, 64), TAPS).eval()
    adapted = adapt_backbone_state(converted.state_dict, config, ours.grid, converted.known)
    load_state_dict(ours, adapted.state_dict, "folder")
    images = torch.randn(1, 3, 64, 64)
    for a, b in zip(ours(images), features(images), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    bare = dict(sorted(timm_model("eva02_tiny_patch14_224").state_dict().items()))
    torch.save(bare, tmp_path / "bare.pth")
    assert main(["convert", str(tmp_path / "bare.pth"), str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "rotary" in error and not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="--backbone-weights"):
        read_config(tmp_path / "folder")


@pytest.mark.parametrize("name", [name for name in PRESETS if "_vit" in name])
def test_presets_are_the_published_architectures(name):
    """Every parameter of timm's model of that size, and nothing else, by shape alone."""
    timm = pytest.importorskip("timm", reason="needs the extra timm")
    theirs = ARCHITECTURES[name]
    if not timm.is_model(theirs):
        pytest.skip(f"timm {timm.__version__} has no {theirs}")
    with torch.device("meta"):
        model = timm.create_model(theirs, num_classes=0)
        preset = SegViTConfig.preset(name, 2).backbone
        ours = VisionTransformer(preset, tuple(model.patch_embed.img_size), (preset.depth - 1,))
        known, _ = known_from_timm(model)
        adapted = adapt_backbone_state(model.state_dict(), preset, ours.grid, known).state_dict
    expected = {key: tuple(value.shape) for key, value in ours.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in adapted.items()} == expected
    assert known["norm_eps"] == preset.norm_eps and known["heads"] == preset.heads
    assert known["mlp"] in preset.mlp  # timm computes SigLIP with the exact GELU
    rotary = known.get("rotary")
    assert (rotary is None) == (preset.rotary is None)
    if rotary is not None:
        assert rotary.places() == preset.rotary.places() and rotary.base == preset.rotary.base
    assert known.get("position_resize", preset.position_resize) == preset.position_resize
    assert known["mean"] == SegViTConfig.preset(name, 2).mean


ARCHITECTURES = {
    "dinov3_vits16": "vit_small_patch16_dinov3_qkvb",
    "dinov3_vits16plus": "vit_small_plus_patch16_dinov3_qkvb",
    "dinov3_vitb16": "vit_base_patch16_dinov3_qkvb",
    "dinov3_vitl16": "vit_large_patch16_dinov3_qkvb",
    "dinov3_vith16plus": "vit_huge_plus_patch16_dinov3_qkvb",
    "eva02_vits14": "eva02_small_patch14_224",
    "eva02_vitb14": "eva02_base_patch14_224",
    "eva02_vitl14": "eva02_large_patch14_224",
    "siglip2_vitb16": "vit_base_patch16_siglip_256",
    "siglip2_vitl16": "vit_large_patch16_siglip_256",
    "pe_spatial_vits16": "vit_pe_spatial_small_patch16_512",
    "pe_spatial_vitb16": "vit_pe_spatial_base_patch16_512",
    "pe_spatial_vitl14": "vit_pe_spatial_large_patch14_448",
}
