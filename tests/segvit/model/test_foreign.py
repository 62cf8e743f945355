"""Other projects' ViTs: loaded with the same features, or refused with the reason; nothing in between."""

import gc
import json
import os
from collections import Counter

import pytest
import torch

from segvit.config import BackboneConfig
from segvit.model.backbone import VisionTransformer
from segvit.model.backbone_weights import TOLD, adapt_backbone_state, infer_backbone_config
from segvit.model.checkpoint import load_state_dict
from segvit.model.foreign import find_state_dict, timm_names, what_it_is, why_not_plain
from segvit.model.pretrained import known_from_timm

timm = pytest.importorskip("timm", reason="needs the extra timm")

# Of every architecture in these modules of timm, the features must be equal, or the weights refused.
MODULES = (
    "beit", "cait", "convit", "crossvit", "deepseek_vit", "deit", "eva", "gemma4_vit", "hiera", "mlp_mixer",
    "naflexvit", "pit", "qwen3_vit", "tnt", "vision_transformer", "vision_transformer_hybrid",
    "vision_transformer_relpos", "vision_transformer_sam", "vitamin", "volo", "xcit",
)  # fmt: skip

# What becomes of the state dict alone, and of the same names in the order of a safetensors file.
POST_NORM, ROTARY = "post-norm", "rotary positions"
EXPECTED = {
    "vit_tiny_patch16_224": ("equal", "equal"),
    "vit_small_patch14_reg4_dinov2": ("equal", "equal"),
    "vit_giant_patch14_reg4_dinov2": ("equal", "equal"),  # SwiGLU
    "deit3_small_patch16_224": ("equal", "equal"),
    "deit_tiny_distilled_patch16_224": ("equal", "equal"),
    "test_vit2": ("equal", "equal"),  # a register token with a position, no class token
    "vit_base_patch16_siglip_gap_224": ("equal", "equal"),
    "vit_base_patch16_224_miil": ("equal", "equal"),  # no bias for query, key and value
    "vit_base_patch16_gap_224": ("equal", "equal"),  # heads of 48 channels
    "eva_giant_patch14_224": ("equal", POST_NORM),  # bias of query and value alone
    "vit_base_patch16_clip_224": ("QuickGELU", "QuickGELU"),
    "vit_base_patch16_clip_quickgelu_224": ("QuickGELU", "QuickGELU"),
    "vit_base_patch16_rpn_224": (POST_NORM, POST_NORM),
    "eva02_enormous_patch14_clip_224": (POST_NORM, POST_NORM),
    "vit_small_patch16_rope_ape_224": (ROTARY, ROTARY),
    "eva02_tiny_patch14_224": (ROTARY, ROTARY),
    "qwen3_vit_88m": (ROTARY, "Qwen3-VL"),
    "vit_small_patch16_dinov3": (ROTARY, "no position embedding"),
    "vit_pe_core_base_patch16_224": (ROTARY, "Perception Encoder"),
    "beit_base_patch16_224": ("relative position bias", "relative position bias"),
    "beit3_base_patch16_224": ("sub-LN", "sub-LN"),
    "vit_small_patch16_18x2_224": ("parallel", "parallel"),
    "vit_dwee_patch16_reg1_gap_256": ("differential attention", "differential attention"),
    "test_vit4": ("RMSNorm", "RMSNorm"),
    "vit_small_resnet26d_224": ("stem", "stem"),
    "samvit_base_patch16": ("relative position bias", "relative position bias"),
    "cait_xxs24_224": ("another attention", "another attention"),
}


# Even with all that timm tells.
REFUSED = (
    "vit_base_patch16_rpn_224", "eva02_enormous_patch14_clip_224", "qwen3_vit_88m", "beit_base_patch16_224",
    "vit_small_patch16_18x2_224", "vit_dwee_patch16_reg1_gap_256", "test_vit4", "vit_small_resnet26d_224",
    "samvit_base_patch16", "cait_xxs24_224",
)  # fmt: skip


def small_timm_model(name):
    """A timm model of this architecture, shallow and narrow where it can be, with random parameters."""
    try:
        with torch.device("meta"):
            full = timm.create_model(name, num_classes=0, depth=1)
        patch = full.patch_embed.patch_size
        patch = patch if isinstance(patch, int) else patch[0]
        narrow = {"embed_dim": 2 * full.embed_dim // full.blocks[0].attn.num_heads, "num_heads": 2}
    except Exception:  # no such arguments, or no such attributes
        patch, narrow = 16, {}
    size = {"img_size": 4 * patch}
    shallow = [{"depth": 2, **arguments} for arguments in ({**size, **narrow}, narrow, size, {})]
    model, error = None, None
    for arguments in (*shallow, size, {}):
        try:
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=0, **arguments)
            if sum(parameter.numel() for parameter in model.parameters()) < 2e8:
                model = timm.create_model(name, num_classes=0, **arguments).eval()
                break
        except Exception as problem:
            error = problem
    assert model is not None, f"{name}: {error}"
    # One that cannot be made small stays without values: it must be refused by names and shapes.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_meta:  # whose numbers would fill the memory all the same
                parameter.copy_(
                    0.1 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1)
                )
    return model


@torch.no_grad()
def outcome(model, state, known):
    """The word "equal", or the reason of the refusal. Fails if other features come out."""
    fields = {key: known[key] for key in TOLD if key in known}
    try:
        config = infer_backbone_config(state, **fields)
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or (64, 64)
        taps = (0, config.depth - 1)
        valueless = next(iter(state.values())).is_meta
        with torch.device("meta" if valueless else "cpu"):
            ours = VisionTransformer(config, tuple(size), taps).eval()
        load_state_dict(ours, adapt_backbone_state(state, config, ours.grid, known).state_dict, "weights")
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    assert not valueless, "loads, and is too large to be compared"
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    theirs = model.forward_intermediates(
        images, indices=list(taps), norm=False, output_fmt="NLC", intermediates_only=True
    )
    for a, b in zip(ours(images), theirs, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm(), "loaded with other features"
    return "equal"


def outcomes(name):
    """Of the state dict as timm gives it, sorted as in a safetensors file, and with what timm tells."""
    model = small_timm_model(name)
    state = model.state_dict()
    blocks = getattr(model, "blocks", None)
    heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks else None
    heads = {"heads": heads} if isinstance(heads, int) else {}
    bare = [outcome(model, weights, heads) for weights in (state, dict(sorted(state.items())))]
    try:
        known = known_from_timm(model)[0]
    except ValueError as error:
        return *bare, str(error)
    return *bare, outcome(model, state, known)


@pytest.mark.parametrize("name", EXPECTED)
def test_timm(name):
    *bare, told = outcomes(name)
    for actual, expected in zip(bare, EXPECTED[name], strict=True):
        assert actual == expected or (expected != "equal" and expected in actual)
    assert (told == "equal") == (name not in REFUSED), told


@pytest.mark.skipif("SEGVIT_TIMM_WALK" not in os.environ, reason="minutes; SEGVIT_TIMM_WALK=1 runs it")
def test_all_of_timm():
    counts = Counter()
    for module in MODULES:
        for name in timm.list_models(module=module):
            for way, result in zip(("ordered", "sorted", "told"), outcomes(name), strict=True):
                counts[f"{way}: {'equal' if result == 'equal' else 'refused'}"] += 1
            counts["architectures"] += 1
        gc.collect()
    print(dict(counts))
    assert counts["architectures"] > 300 and counts["told: equal"] > 100


# Names


def plain(depth=2, **fields):
    config = BackboneConfig(width=32, depth=depth, heads=2, class_token=True, **fields)
    model = VisionTransformer(config, (64, 64), (depth - 1,)).eval()
    state = dict(model.state_dict())
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 32), state["pos_embed"]], dim=1)
    return model, state


def renamed(state, *rules):
    result = {}
    for key, value in state.items():
        for ours, theirs in rules:
            key = key.replace(ours, theirs)
        result[key] = value
    return result


MMSEG = (
    ("patch_embed.proj.", "patch_embed.projection."), ("blocks.", "layers."), (".norm", ".ln"),
    (".attn.qkv.", ".attn.attn.in_proj_"), (".attn.proj.", ".attn.attn.out_proj."),
    (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."),
)  # fmt: skip
MMPRETRAIN = (*MMSEG[:3], (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."))
OPENCLIP = (
    ("cls_token", "class_embedding"), ("pos_embed", "positional_embedding"), ("patch_embed.proj.", "conv1."),
    ("blocks.", "transformer.resblocks."), (".norm", ".ln_"), ("norm_pre.", "ln_pre."),
    (".attn.qkv.", ".attn.in_proj_"), (".attn.proj.", ".attn.out_proj."), (".fc1.", ".c_fc."),
    (".fc2.", ".c_proj."),
)  # fmt: skip
TORCHVISION = (
    ("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding"),
    ("patch_embed.proj.", "conv_proj."), ("blocks.", "encoder.layers.encoder_layer_"), (".norm", ".ln_"),
    (".attn.qkv.", ".self_attention.in_proj_"),
    (".attn.proj.", ".self_attention.out_proj."), (".mlp.fc1.", ".mlp.0."), (".mlp.fc2.", ".mlp.3."),
)  # fmt: skip
CHUNKED = (("blocks.0.", "blocks.0.0."), ("blocks.1.", "blocks.1.1."))


@pytest.mark.parametrize("rules", [MMSEG, MMPRETRAIN, OPENCLIP, TORCHVISION, CHUNKED, ()])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.backbone.", "_orig_mod.visual.", "teacher.backbone."]
)
def test_names(rules, prefix):
    model, state = plain()
    theirs = renamed(state, *rules)
    assert not rules or theirs.keys() != state.keys()
    theirs = {f"{prefix}{key}": value for key, value in theirs.items()}
    if prefix:
        theirs |= {"text.token_embedding.weight": torch.zeros(3), "loss.center": torch.zeros(1)}
    if rules is OPENCLIP:
        theirs[f"{prefix}positional_embedding"] = theirs[f"{prefix}positional_embedding"][0]
    adapted = adapt_backbone_state(theirs, model.config, model.grid)
    assert infer_backbone_config(theirs, heads=2) == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(adapted.state_dict[key], value), key


def test_separate_projections():
    model, state = plain()
    for block in "01":
        for kind in ("weight", "bias"):
            parts = state.pop(f"blocks.{block}.attn.qkv.{kind}").chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                state[f"blocks.{block}.attention.attention.{name}.{kind}"] = part
    names = timm_names(state)
    for key, value in model.state_dict().items():
        if key != "pos_embed":
            assert torch.equal(names[key], value), key


def test_missing_biases_are_zeros():
    model, state = plain()
    for key in ("patch_embed.proj.bias", "blocks.0.mlp.fc1.bias", "blocks.1.attn.proj.bias"):
        del state[key]
    adapted = adapt_backbone_state(state, model.config, model.grid).state_dict
    assert adapted.keys() == model.state_dict().keys() and not adapted["blocks.0.mlp.fc1.bias"].any()


def test_training_checkpoints():
    _, state = plain()
    nested = {"epoch": 3, "best": torch.tensor(1.0), "model": {"module.x": torch.ones(1)}, "model_ema": state}
    found, notes = find_state_dict(nested)
    assert found.keys() == state.keys() and notes == ["model_ema taken, not model"]
    assert (
        find_state_dict({"state_dict": {"model": state}, "optimizer": {"state": {}}})[0].keys()
        == state.keys()
    )
    assert find_state_dict({"state_dict": state, "state_dict_ema": None})[0].keys() == state.keys()
    for nothing in ({}, {"epoch": 3}, {"model": {}}, {"model": "vit"}, [state]):
        with pytest.raises(ValueError, match="no state dict"):
            find_state_dict(nothing)
    both = {f"{part}.{key}": value for part in ("student", "teacher") for key, value in state.items()}
    assert timm_names(both).keys() == state.keys()
    several = {f"{part}.{key}": value for part in ("left", "right") for key, value in state.items()}
    with pytest.raises(ValueError, match=r"several ViTs \(left\., right\.\)"):
        timm_names(several)


@pytest.mark.parametrize(
    "keys, words",
    [
        (["layers.0.blocks.0.attn.relative_position_bias_table", "patch_embed.proj.weight"], "Swin"),
        (["block1.0.attn.q.weight", "patch_embed1.proj.weight"], "pyramid"),
        (["layer1.0.conv1.weight", "conv1.weight"], "ResNet"),
        (["stages.0.blocks.0.dwconv.weight"], "ConvNeXt"),
        (["model.embed_tokens.weight", "lm_head.weight"], "a text model"),
        (["blocks.0.mlp_tokens.fc1.weight"], "MLP-Mixer"),
        (["decoder.class_tokens", "decoder.class_head.bias"], "use it with --init-from"),
        (["a.b", "c.d"], "it has a.b, c.d"),
    ],
)
def test_what_it_is(keys, words):
    assert words in what_it_is(keys)
    assert "not a plain ViT" in why_not_plain({key: torch.zeros(2, 2) for key in keys})


def test_doubts_and_what_resolves_them():
    model, state = plain(layer_scale=1e-5)
    theirs = renamed(state, ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"))
    adapted = adapt_backbone_state(theirs, model.config, model.grid)
    assert adapted.changed == ["taken as DeiT-III's: RoPE-ViT's weights have the same names"]
    file = dict(sorted(theirs.items()))
    assert "config.json" in why_not_plain(file) and why_not_plain(file, {"plain": True}) is None
    clip, state = plain(pre_norm=True, mlp="quick_gelu", final_norm=True)
    assert "--model '{mlp: gelu}'" in why_not_plain(state)
    assert adapt_backbone_state(state, clip.config, clip.grid, {"mlp": "quick_gelu"}).changed == []


@pytest.mark.parametrize(
    "change, words",
    [
        ({"pos_embed": torch.zeros(1, 4, 4, 32)}, "SAM"),
        ({"pos_embed": torch.zeros(2, 16, 32)}, r"pos_embed is \(2, 16, 32\)"),
        ({"pos_embed": torch.zeros(1, 19, 32)}, "19 positions: neither a square grid"),
        ({"pos_embed": torch.full((1, 17, 32), torch.nan)}, "pos_embed holds values that are not finite"),
        ({"patch_embed.proj.weight": torch.zeros(32, 3, 2, 16, 16)}, "videos"),
        ({"patch_embed.proj.weight": torch.zeros(32, 768)}, "patch kernel"),
        ({"patch_embed.proj.weight": torch.zeros(32, 3, 16, 8)}, "patch kernel"),
        ({"blocks.1.mlp.fc1.weight": torch.zeros(128, 32, dtype=torch.int8)}, "quantised"),
        ({"blocks.0.attn.q_norm.weight": torch.ones(16)}, "QK-norm"),
        ({"blocks.0.mlp.fc1_g.weight": torch.ones(16)}, "separate gates"),
        ({"rope.freqs": torch.ones(16)}, "rotary"),
    ],
)
def test_refused(change, words):
    model, state = plain()
    with pytest.raises(ValueError, match=words):
        adapt_backbone_state({**state, **change}, model.config, model.grid)


def test_positions():
    """The class slot, grids that are not square, and what stays open."""
    model, state = plain()
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1, 17, 32, generator=generator)
    cls = state["cls_token"]

    def adapted(positions, grid=(4, 4), known=None, **more):
        result = adapt_backbone_state({**state, "pos_embed": positions, **more}, model.config, grid, known)
        return result.state_dict, result.changed

    got, _ = adapted(table)
    assert torch.equal(got["cls_token"], cls + table[:, :1]) and torch.equal(got["pos_embed"], table[:, 1:])
    got, _ = adapted(table[:, 1:])  # no slot
    assert torch.equal(got["cls_token"], cls) and torch.equal(got["pos_embed"], table[:, 1:])
    got, _ = adapted(table[0], known={"grid": (2, 8)})
    assert torch.equal(got["cls_token"], cls + table[:, :1]) and got["pos_embed"].shape == (1, 16, 32)
    oblong = torch.randn(1, 1 + 3 * 5, 32, generator=generator)[:, :16]
    _, changed = adapted(oblong[:, :16], grid=(3, 5), known={"grid": (3, 5)})
    assert changed == []
    with pytest.raises(ValueError, match="13x13"):
        adapted(table, known={"grid": (13, 13)})
    registers = {"reg_token": torch.zeros(1, 4, 32)}
    with pytest.raises(ValueError, match="3x3 after 0 or 2x2 after 5"):
        adapted(table[:, :9], grid=(8, 8), **registers)


def test_transformers(tmp_path):
    """Hugging Face's models: features equal theirs, with activation and epsilon of their config.json."""
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    from segvit.model.pretrained import open_pretrained

    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    models = {
        "ViT": {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
        "DeiT": {},
        "Dinov2": {"mlp_ratio": 2},
        "Dinov2WithRegisters": {"mlp_ratio": 2, "use_swiglu_ffn": True},
        "CLIPVision": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-3},
        "SiglipVision": {"hidden_act": "gelu_pytorch_tanh"},
    }
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for name, more in models.items():
        config = getattr(transformers, f"{name}Config")(**{**sizes, **more})
        theirs = getattr(transformers, f"{name}Model")(config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(
                    0.1 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1)
                )
            expected = theirs(images, output_hidden_states=True).hidden_states[-1]
        theirs.save_pretrained(tmp_path / name)
        weights = open_pretrained(tmp_path / name)
        assert weights.known["heads"] == 4 and weights.known["grid"] == (4, 4)
        ours = VisionTransformer(weights.backbone_config(), (32, 32), (1,)).eval()
        adapted = adapt_backbone_state(weights.state_dict, ours.config, ours.grid, weights.known)
        load_state_dict(ours, adapted.state_dict, name)
        with torch.no_grad():
            got = ours(images)[0]
        assert (got - expected[:, -16:]).norm() < 1e-4 * expected.norm(), name
    for kind in ("vit", "vit_msn", "ijepa", "dinov2"):
        (tmp_path / "ViT/config.json").write_text(json.dumps({"model_type": kind}))
        told = open_pretrained(tmp_path / "ViT").known["norm_eps"]
        assert told == transformers.CONFIG_MAPPING[kind]().layer_norm_eps, kind
    swin = transformers.SwinConfig()
    swin.save_pretrained(tmp_path / "ViT")
    with pytest.raises(ValueError, match="model_type 'swin'"):
        open_pretrained(tmp_path / "ViT")
