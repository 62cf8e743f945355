"""Other projects' Vision Transformers: their names in timm's, and what tells that one is no plain ViT.

Pure functions of state dicts. Understood are the names of timm, DeiT, DINO to DINOv3, MAE, EVA,
mmsegmentation and mmpretrain, Hugging Face, OpenCLIP and torchvision, behind any prefix and inside training
checkpoints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# Where training checkpoints keep weights. Averages come first: they are what such a run is evaluated with.
_NESTS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "target_encoder", "state_dict",
    "model_state_dict", "model", "module", "net", "network", "backbone", "encoder", "student", "weights",
)  # fmt: skip


def find_state_dict(value: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors in a state dict or in a training checkpoint around one, and what was chosen, in words.

    Raises:
        ValueError: there are none.
    """
    notes = []
    while isinstance(value, Mapping):
        found = [key for key in _NESTS if isinstance(value.get(key), Mapping) and value[key]]
        if not found:
            break
        if len(found) > 1:
            notes.append(f"{found[0]} taken, not {' or '.join(found[1:])}")
        value = value[found[0]]
    if not isinstance(value, Mapping) or not any(isinstance(entry, Tensor) for entry in value.values()):
        raise ValueError("holds no state dict of tensors")
    tensors = _like(value, ((key, entry) for key, entry in value.items() if isinstance(entry, Tensor)))
    return tensors, notes


class _StateDict(dict):
    """A dict that keeps what `Module.state_dict` says about modules without parameters."""

    _metadata: Mapping[str, Any]


def _like(source: Mapping[str, Tensor], items: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    state = _StateDict(items)
    if metadata := getattr(source, "_metadata", None):
        state._metadata = metadata
    return state


_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def without_wrappers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DDP, torch.compile, FSDP and activation checkpointing put before and into them."""
    return _like(state_dict, ((_WRAPPERS.sub("", key), value) for key, value in state_dict.items()))


_PATCHES = re.compile(
    r"((?:.*\.)?)(?:patch_embed\.proj(?:ection)?|embeddings\.patch_embeddings?(?:\.projection)?|conv_proj|conv1)\.weight"
)


def _prefix(keys: Collection[str]) -> str | None:
    """What stands before the names of the only ViT, or of the one that is meant; None: there is no ViT.

    Raises:
        ValueError: there are several.
    """
    prefixes = []
    for key in keys:
        if (match := _PATCHES.fullmatch(key)) and match[1] not in prefixes:
            clip = any(f"{match[1]}{name}" in keys for name in ("class_embedding", "positional_embedding"))
            if clip or not key.endswith("conv1.weight"):
                prefixes.append(match[1])
    if len(prefixes) > 1:  # self-supervised runs keep two; what DINO, iBOT, I-JEPA and MoCo are used by
        preferred = [
            p for p in prefixes if re.search(r"(^|\.|_)(teacher|ema|target_encoder|base_encoder)\.", p)
        ]
        if len(preferred) != 1:
            raise ValueError(f"holds several ViTs ({', '.join(p or 'without prefix' for p in prefixes)})")
        prefixes = preferred
    return prefixes[0] if prefixes else None


def _block(*names: str) -> str:
    return rf"^(blocks\.\d+)\.(?:{'|'.join(names)})"


_RENAMED = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2 in chunks
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^(?:encoder\.|model\.)?(?:layers?|transformer\.resblocks)\.(\d+)\.", r"blocks.\1."),
    (_block("ln_?1", "layernorm_before", "layer_norm1") + r"\.", r"\1.norm1."),
    (_block("ln_?2", "layernorm_after", "layer_norm2") + r"\.", r"\1.norm2."),
    (_block(r"(?:attn\.)?attn\.in_proj", r"self_attention\.in_proj") + "_", r"\1.attn.qkv."),
    (_block(r"(?:attention\.)?attention", "self_attn") + r"\.([qkv])(uery|ey|alue|_proj)\.", r"\1.attn.\2."),
    (_block("attn") + r"\.([qkv])_proj\.", r"\1.attn.\2."),
    (_block(r"(?:attn\.|self_)?attn\.out_proj", r"self_attention\.out_proj") + r"\.", r"\1.attn.proj."),
    (_block(r"attention\.output\.dense", r"attention\.o(?:ut)?_proj") + r"\.", r"\1.attn.proj."),
    (_block(r"ffn\.layers\.0\.0", r"intermediate\.dense", r"mlp\.weights_in") + r"\.", r"\1.mlp.fc1."),
    (_block(r"mlp\.c_fc", r"mlp\.0", r"mlp\.linear_1", r"(?:mlp|ffn)\.w12") + r"\.", r"\1.mlp.fc1."),
    (_block(r"ffn\.layers\.1", r"output\.dense", r"mlp\.weights_out") + r"\.", r"\1.mlp.fc2."),
    (_block(r"mlp\.c_proj", r"mlp\.3", r"mlp\.linear_2", r"(?:mlp|ffn)\.w3") + r"\.", r"\1.mlp.fc2."),
    (_block("gamma_([12])", r"layer_scale([12])\.lambda1", r"ls_([12])\.gamma") + "$", r"\1.ls\2\3\4.gamma"),
    (_block(r"attn\.gamma(1)\.weight", r"ffn\.gamma(2)\.weight") + "$", r"\1.ls\2\3.gamma"),
    (_block(r"attn\.(?:ln|inner_attn_ln)") + r"\.", r"\1.attn.norm."),
    (_block(r"mlp\.(?:ln|ffn_ln)") + r"\.", r"\1.mlp.norm."),
    (r"^(?:patch_embed\.projection|conv_proj|conv1)\.", "patch_embed.proj."),
    (r"^embeddings\.patch_embeddings?(?:\.projection)?\.", "patch_embed.proj."),
    (r"^(?:embeddings\.(?:cls_token|class_embedding)|class_embedding|class_token)$", "cls_token"),
    (r"^(?:embeddings\.position_embeddings?(?:\.weight)?|positional_embedding)$", "pos_embed"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^(?:embeddings\.)?(?:register|storage)_tokens$", "reg_token"),
    (r"^(?:embeddings\.)?dist(?:illation)?_token$", "dist_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^(?:pre_layrnorm|pre_norm|ln_pre)\.", "norm_pre."),
    (r"^(?:ln1|layernorm|post_layernorm|ln_post|encoder\.ln)\.", "norm."),
)  # fmt: skip
_RULES = tuple((re.compile(pattern), replacement) for pattern, replacement in _RENAMED)


def timm_name(key: str) -> str:
    """timm's name for a parameter of another project's ViT; others stay as they are."""
    for pattern, replacement in _RULES:
        key = pattern.sub(replacement, key, count=1)
    return key


def timm_names(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """A ViT's weights with timm's names and shapes; keys that do not belong stay.

    Separate query, key and value projections are packed (with a zero bias where one has none), and so are
    gates and values of a SwiGLU. A distillation token counts as a register token, which it is in the blocks.
    Where DINOv3 masks the bias of the keys it is zero.

    Raises:
        ValueError: no tensors, or the weights of several ViTs.
    """
    bare = without_wrappers(find_state_dict(state_dict)[0])
    prefix = _prefix(bare) or ""
    names = {timm_name(key[len(prefix) :]): value for key, value in bare.items() if key.startswith(prefix)}
    for name in ("cls_token", "pos_embed", "reg_token", "dist_token"):
        if name in names and names[name].ndim in (1, 2) and names[name].numel():
            names[name] = names[name].view(1, -1, names[name].shape[-1])
    if "dist_token" in names and "reg_token" not in names:
        names["reg_token"] = names.pop("dist_token")
    for key in [key for key in names if key.endswith((".attn.q.weight", ".attn.q_bias"))]:
        _pack(names, key[: key.index(".attn.q") + 6])
    for key in [key for key in names if re.fullmatch(r"blocks\.\d+\.mlp\.(fc1_x|w2|up_proj)\.weight", key)]:
        _pack_gates(names, key[: key.index(".mlp.") + 5])
    if "rope_embed.periods" in names:  # DINOv3's own: `bias_mask` is 1, 0, 1 for query, key, value
        for key in [key for key in names if key.endswith(".attn.qkv.bias")]:
            query, old, value = names[key].chunk(3)
            names[key] = torch.cat([query, torch.zeros_like(old), value])
            names.pop(f"{key}_mask", None)
    return names


_GATED = (("fc1_g", "fc1_x", "fc2"), ("w1", "w2", "fc2"), ("gate_proj", "up_proj", "down_proj"))


def _pack_gates(names: dict[str, Tensor], mlp: str) -> None:
    """gate and value of one SwiGLU to fc1, in place, or `up_proj` alone; incomplete ones stay as they are."""
    for gate, value, last in _GATED:
        first, second, out = (names.get(f"{mlp}{part}.weight") for part in (gate, value, last))
        alone = gate == "gate_proj" and first is None and f"{mlp}{gate}.bias" not in names
        if second is None or out is None or second.ndim != 2 or out.shape != second.T.shape:
            continue
        if not alone and (first is None or first.shape != second.shape):
            continue
        parts = [value] if alone else [gate, value]
        packed = {"weight": [names.pop(f"{mlp}{part}.weight") for part in parts]}
        biases = [names.pop(f"{mlp}{part}.bias", None) for part in parts]
        if any(bias is not None for bias in biases):
            zeros = second.new_zeros(len(second))
            packed["bias"] = [zeros if bias is None else bias for bias in biases]
        for kind, tensors in packed.items():
            names[f"{mlp}fc1.{kind}"] = torch.cat(tensors)
        for kind in ("weight", "bias") if last != "fc2" else ():
            if f"{mlp}{last}.{kind}" in names:
                names[f"{mlp}fc2.{kind}"] = names.pop(f"{mlp}{last}.{kind}")


def _pack(names: dict[str, Tensor], attention: str) -> None:
    """query, key and value of one block to qkv, in place; incomplete ones stay as they are."""
    weights = [names[key] for part in "qkv" if (key := f"{attention}{part}.weight") in names]
    separate = [f"{attention}{part}.bias" for part in "qkv"]
    split = [f"{attention}{part}_bias" for part in "qkv"]  # EVA and BEiT, whose keys have no bias
    if len(weights) == 3:
        names[f"{attention}qkv.weight"] = _joined(weights, f"{attention}qkv.weight")
        for part in "qkv":
            del names[f"{attention}{part}.weight"]
    for keys in (separate, split):
        if any(key in names for key in keys):
            present = next(names[key] for key in keys if key in names)
            biases = [names.pop(key, None) for key in keys]
            parts = [torch.zeros_like(present) if bias is None else bias for bias in biases]
            names[f"{attention}qkv.bias"] = _joined(parts, f"{attention}qkv.bias")


def _joined(parts: list[Tensor], name: str) -> Tensor:
    if len({part.shape[1:] for part in parts}) != 1 or not parts[0].ndim:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(f"{name}: query, key and value of shapes {shapes}, which do not go together")
    return torch.cat(parts)


_ROTARY_NAMES, _ROTARY = r"(^|\.|_)rope|rotary|freqs", "rotary positions (EVA-02, DINOv3, RoPE-ViT)"
# What in a ViT's names tells of another computation. The first that is found is named.
_TELLTALES = (
    (r"relative_position|rel_pos", "a relative position bias (BEiT, Swin, SAM, ViTDet)"),
    (_ROTARY_NAMES, _ROTARY),
    (r"^patch_embed\.backbone\.|^(patch_embed\.)?stem\.", "a hybrid's convolutional stem"),
    (r"^patch_embed\.(norm|ln)\.", "a norm in the patch embedding"),
    (r"^pos_embed(_[xy]|\.)", "positions that are not one table"),
    (
        r"\.(attns|ffns)\.|\.in_proj\.|\.(attn|mlp)_out_proj\.",
        "parallel attention and feed-forward (ViT-22B)",
    ),
    (r"\.attn\.(lambda_|sub_norm|subln|diff)", "differential attention"),
    (r"\.attn\.(q|k|query|key)_?(norm|layernorm|ln)\.", "norms of queries and keys (QK-norm)"),
    (r"\.attn\.(proj_[lw]|gating_param|pos_proj|temperature|gate)", "another attention (CaiT, ConViT, XCiT)"),
    (r"\.mlp\.(fc1_[gx]|w1|w2|gate_proj|up_proj)\.", "a feed-forward part with separate gates"),
)
_FEATURES = tuple((re.compile(pattern), words) for pattern, words in _TELLTALES)


def why_not_plain(state_dict: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> str | None:
    """Why weights are not those of a plain ViT, as far as their names, shapes and order tell; or None.

    Args:
        state_dict: weights as they are in the file.
        known: what is known otherwise: fields of `BackboneConfig`, "rotary" among them, and "plain": True
            where the architecture has been looked at.

    Raises:
        ValueError: no tensors, or the weights of several ViTs.
    """
    known = known or {}
    state = without_wrappers(find_state_dict(state_dict)[0])
    names = timm_names(state)
    if "patch_embed.proj.weight" not in names or not any(key.startswith("blocks.0.") for key in names):
        return f"not a plain ViT's weights: {what_it_is(state)}"
    rotary = known.get("rotary")
    for pattern, words in _FEATURES:
        if any(pattern.search(key) for key in names) and not (rotary and words == _ROTARY):
            return (
                f"not a plain ViT: it has {words}{'' if words != _ROTARY else f' that are not told; {_TELL}'}"
            )
    modules = getattr(state, "_metadata", None) or ()
    if not rotary and any(re.search(r"(^|\.)rope$", module) for module in modules):
        return f"not a plain ViT: it has {_ROTARY} that are not told; {_TELL}"
    kernel = names["patch_embed.proj.weight"]
    if kernel.ndim == 5:
        return f"not a plain ViT: its patch kernel {tuple(kernel.shape)} is for videos or volumes"
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        return f"not a plain ViT: its patch kernel is {tuple(kernel.shape)}, expected (width, channels, p, p)"
    if "pos_embed" not in names and not rotary:
        return f"not a plain ViT: no position embedding (pos_embed); its positions are not told: {_TELL}"
    positions = names.get("pos_embed")
    if positions is not None and (positions.ndim != 3 or positions.shape[0] != 1):
        shape = tuple(positions.shape)
        return f"not a plain ViT: pos_embed is {shape}, expected (1, positions, width); SAM's is as a picture"
    if "blocks.0.norm1.bias" not in names and "blocks.0.norm1.weight" in names:
        return "not a plain ViT: its norms have no bias (RMSNorm)"
    if known.get("plain"):
        return None
    return _why_doubtful(state, names, known)


def _why_doubtful(
    state: Mapping[str, Tensor], names: Mapping[str, Tensor], known: Mapping[str, Any]
) -> str | None:
    """Reasons that only the order of names gives, or that the commonest model with these names gives."""
    post_norm = "residual post-norm blocks (norms after attention and feed-forward, as in EVA-02-E)"
    keys = [key for key in state if re.search(r"(^|\.)blocks\.0\.", key)]
    ordered = keys != sorted(keys)  # safetensors sorts
    found = (re.search(r"blocks\.0\.(\w+)", key) for key in keys)
    parts = list(dict.fromkeys(match[1] for match in found if match))
    parts = [part for part in parts if part in ("attn", "norm1", "mlp", "norm2")]
    if ordered and parts == ["attn", "norm1", "mlp", "norm2"]:
        return f"not a plain ViT: it has {post_norm}"
    if any(".attn.norm." in key or ".mlp.norm." in key for key in names):
        return f"it has norms inside its branches (sub-LN), and perhaps {_ROTARY}; {_TELL}"
    if any(re.search(r"\.mlp\.(fc1_g|w1|gate_proj)\.", key) for key in keys):
        return f"it has a feed-forward part with separate gates, and perhaps {_ROTARY}; {_TELL}"
    if any(key.endswith(".attn.q_bias") for key in keys):
        if names["blocks.0.mlp.fc1.weight"].shape[0] != names["blocks.0.mlp.fc2.weight"].shape[1]:
            return f"not a plain ViT: it has {_ROTARY}; {_TELL}"
        if not ordered:
            return f"EVA-01's names are also those of EVA-02-E, which has {post_norm}; {_TELL}"
    if any(key.endswith(".gamma_1") for key in keys) and not ordered:
        return f"DeiT-III's names are also those of ViTs with rotary positions (RoPE-ViT); {_TELL}"
    bare = {"blocks.0.attn.qkv.bias", "cls_token", "blocks.0.ls1.gamma"}.isdisjoint(names)
    if bare and keys and not ordered:
        return f"its names are also those of a ViT with {post_norm}; {_TELL}"
    behind = any(key.startswith("encoder.patch_embed.") for key in state)
    if behind and not ordered and {"norm.weight", "fc_norm.weight", "cls_token"}.isdisjoint(names):
        return f"its names are also those of Qwen3-VL's ViT, which has rotary positions; {_TELL}"
    if "norm_pre.weight" in names and _may_be_perception_encoder(names):
        return f"its names are also those of Perception Encoder, which has rotary positions; {_TELL}"
    if "norm_pre.weight" in names and "mlp" not in known:
        return (
            "a CLIP ViT, and whether its activation is GELU (OpenCLIP) or QuickGELU (OpenAI) the file does "
            f"not tell; {_TELL}, or --model '{{mlp: gelu}}' or '{{mlp: quick_gelu}}'"
        )
    return None


def _may_be_perception_encoder(names: Mapping[str, Tensor]) -> bool:
    """CLIP's ViTs have a class token and a last norm; positions of the grid alone are of this package."""
    if "cls_token" not in names or any(key.startswith("attn_pool.") for key in names):
        return True
    count = names["pos_embed"].shape[1]
    return "norm.weight" not in names and math.isqrt(count) ** 2 != count


def assumptions(state_dict: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> list[str]:
    """What `why_not_plain` takes on trust, in words."""
    state = find_state_dict(state_dict)[0]
    doubtful = any(key.endswith("blocks.0.gamma_1") for key in state)
    if doubtful and not (known or {}).get("plain") and not getattr(state, "_metadata", None):
        return ["taken as DeiT-III's: RoPE-ViT's weights have the same names"]
    return []


_TELL = "use timm:NAME, or put its config.json beside it"


# The first that fits names a file that holds no plain ViT.
_LOOKS = (
    (r"decode_head\.|^decoder\.class_tokens", "a SegViT checkpoint: use it with --init-from"),
    (r"layers\.\d+\.blocks\.\d+\.attn\.(relative_position|logit_scale|qkv)", "a Swin Transformer"),
    (r"relative_position_bias_table", "a ViT with relative position bias (BEiT, Swin)"),
    (r"block\d+\.\d+\.attn\.(sr|q)\.|patch_embed\d\.proj", "a pyramid ViT (MiT of SegFormer, PVT)"),
    (r"text_model\.|token_embedding|embed_tokens|word_embeddings|lm_head|wte\.", "a text model"),
    (r"dwconv\.|downsample_layers\.", "a ConvNeXt"),
    (r"layer\d+\.\d+\.(conv|bn)\d", "a ResNet"),
    (r"mlp_tokens\.", "an MLP-Mixer"),
    (r"transformer_blocks\.|down_blocks\.|diffusion_model\.", "a diffusion model"),
    (r"lora_[AB]\.|\.lora_", "LoRA's changes to a model, without the model"),
    (r"rope|rotary|freqs", "a ViT with rotary positions"),
    (r"^(embeds|trunk)\.|\.blocks\.", "another kind of Vision Transformer"),
)
_OTHERS = tuple((re.compile(pattern), words) for pattern, words in _LOOKS)


def what_it_is(keys: Iterable[str]) -> str:
    """A guess at what holds weights of these names, in words."""
    keys = list(keys)
    for pattern, words in _OTHERS:
        if any(pattern.search(key) for key in keys):
            return f"it looks like {words}"
    return (
        "expected patch_embed.proj and blocks.N... or another project's names of the same; it has "
        f"{', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
    )
