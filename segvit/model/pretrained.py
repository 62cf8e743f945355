"""Weights of other projects' ViTs from files, folders, timm and the Hub, with what is known about them.

Names and shapes do not tell heads, activation, the norms' epsilon, rotary positions or the mean and std of
the images. timm's models tell all of it, configurations beside a file most, a bare file little.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segvit.config import BackboneConfig, RotaryConfig, SegViTConfig
from segvit.model.backbone import VisionTransformer
from segvit.model.backbone_weights import TOLD, adapt_backbone_state, infer_backbone_config
from segvit.model.checkpoint import find_checkpoint, first_line, hub_name, hub_snapshot, read_checkpoint
from segvit.model.rotary_weights import HALVES, NEIGHBOURS, told_by_names
from segvit.system.extras import require
from segvit.system.text import shown

BACKBONE_TYPE = "segvit_backbone"
"""In a config.json: a backbone alone, with our names (`segvit convert`)."""


class Pretrained(NamedTuple):
    """A ViT's weights and what is known about them.

    Attributes:
        name: where they come from, for messages.
        state_dict: as in the file.
        known: of "heads", "mlp", "norm_eps", "rotary", "position_resize" (as in `BackboneConfig`), "mean",
            "std", "grid" (of the stored positions), "rotary_layout" (`rotary_weights.to_our_layout`) and
            "plain" (True where the architecture has been looked at) that are known.
        notes: what was chosen or converted, in words.
    """

    name: str
    state_dict: Mapping[str, Any]
    known: dict[str, Any]
    notes: tuple[str, ...]

    def backbone_config(self) -> BackboneConfig:
        """The backbone with these weights, as far as they and what is known tell.

        Raises:
            ValueError: they are not those of a plain ViT.
        """
        fields = {key: self.known[key] for key in TOLD if key in self.known}
        try:
            return infer_backbone_config(self.state_dict, **fields)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


def open_pretrained(source: str | os.PathLike | Mapping[str, Any]) -> Pretrained:
    """Weights of a ViT.

    Args:
        source: a file; a folder with one; 'owner/name' on the Hub, 'hf:' before it or not; 'timm:NAME'; or a
            state dict.

    Raises:
        FileNotFoundError, OSError: there is nothing, or it could not be fetched.
        ValueError: not weights, or of a model that is known to be no plain ViT; one line with the reason.
        ImportError: timm, safetensors or huggingface_hub is needed and not installed.
    """
    if isinstance(source, Mapping):
        return Pretrained("state dict", source, told_by_names(source), ())
    name = str(source)
    if name.startswith("timm:"):
        return _from_timm(name)
    path = Path(source)
    if name.startswith("hf:"):
        if (repository := hub_name(name.removeprefix("hf:"), anywhere=True)) is None:
            raise ValueError(f"{name}: expected hf:OWNER/NAME, or hf:OWNER/NAME@REVISION")
        path = _from_hub(repository)
    elif not path.exists() and hub_name(name):
        path = _from_hub(name)
    try:
        file = _weights_file(path) if path.is_dir() else path
        weights = read_checkpoint(file)
        known, notes = _told(file, weights.about)
        state = weights.state_dict
        if patch := known.pop("linear_patches", None):
            state = _with_patch_kernel(state, patch)
        known = {**told_by_names(state), **known}
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{name}: {text}") from None
    return Pretrained(name, state, known, (*weights.about.get("chosen", ()), *notes))


_FILES = (
    "model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin",
)  # fmt: skip


def _from_hub(name: str) -> Path:
    """The local copy of a repository's configurations and weights, as safetensors if it has them."""
    folder = hub_snapshot(name, ["*.json", "*.safetensors"])
    if not list(folder.glob("*.safetensors")):
        folder = hub_snapshot(name, ["*.json", "*.bin"])
    return folder


def _weights_file(folder: Path) -> Path:
    """The file of weights in a folder: of a usual name, the only one, or a checkpoint's of this package."""
    for file in (folder / name for name in _FILES):
        if file.is_file():
            return file
    if any(folder.glob("*.index.json")):
        raise ValueError(f"{folder}: weights in several files; expected one")
    files = [file for suffix in ("safetensors", "pth", "pt", "bin") for file in folder.glob(f"*.{suffix}")]
    if len(files) == 1:
        return files[0]
    if files:
        raise ValueError(
            f"{folder}: several files of weights ({', '.join(f.name for f in files[:3])}); name one"
        )
    return find_checkpoint(folder) / "model.safetensors"


def _from_timm(source: str) -> Pretrained:
    timm = require("timm", extra="timm")
    name = source.removeprefix("timm:")
    if not name.startswith(("hf-hub:", "hf_hub:")) and name.split(".")[0] not in timm.list_models():
        raise ValueError(f"{source}: timm {timm.__version__} has no model of this name")
    try:
        with torch.random.fork_rng(devices=[]):  # training draws the same numbers with and without
            model = timm.create_model(name, pretrained=True, num_classes=0).eval()
    except Exception as error:
        raise OSError(f"{source}: pretrained weights not available ({first_line(error)})") from None
    try:
        known, notes = known_from_timm(model)
        state = model.state_dict()
        if not same_features(model, state, known):
            raise ValueError("not a plain ViT: the first blocks give other features than timm's")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return Pretrained(source, state, known, notes)


_TIMM_BLOCKS = {
    "ResPostBlock": "residual post-norm blocks",
    "EvaBlockPostNorm": "residual post-norm blocks",
    "ParallelScalingBlock": "parallel attention and feed-forward blocks (ViT-22B)",
    "ParallelThingsBlock": "parallel attention and feed-forward blocks",
    "DiffParallelScalingBlock": "parallel blocks with differential attention",
}
_ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh", "GELU": "gelu"}


def known_from_timm(model: nn.Module) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a timm model tells about its weights (see `Pretrained`), and notes.

    Raises:
        ValueError: it is no plain ViT, with the reason.
    """
    kind, blocks = type(model).__name__, list(getattr(model, "blocks", ()))
    if kind not in ("VisionTransformer", "VisionTransformerDistilled", "Eva") or not blocks:
        raise ValueError(f"not a plain ViT: timm's {kind}")
    for block in blocks:
        block_kind = type(block).__name__
        if block_kind not in ("Block", "EvaBlock"):
            words = _TIMM_BLOCKS.get(block_kind, f"blocks of another kind ({block_kind})")
            raise ValueError(f"not a plain ViT: it has {words}")
        attention, mlp = type(block.attn).__name__, type(block.mlp).__name__
        if attention not in ("Attention", "EvaAttention", "AttentionRope"):
            raise ValueError(f"not a plain ViT: it has another attention ({attention})")
        if getattr(block.attn, "gate", None) is not None:
            raise ValueError("not a plain ViT: its attention has a gate")
        if getattr(block.attn, "num_kv_groups", 1) != 1:
            raise ValueError("not a plain ViT: several of its heads share keys and values (GQA)")
        for norm in (block.norm1, getattr(block.attn, "norm", None), getattr(block.mlp, "norm", None)):
            if not isinstance(norm, (nn.LayerNorm, nn.Identity, type(None))):
                words = f"its norms are {type(norm).__name__}, expected LayerNorm"
                raise ValueError(f"not a plain ViT: {words}")
            if getattr(norm, "eps", block.norm1.eps) != block.norm1.eps:
                raise ValueError("not a plain ViT: its norms have several epsilons")
    act = block.mlp.act
    activation = _ACTIVATIONS.get(type(act).__name__)
    if isinstance(act, nn.GELU) and act.approximate == "tanh":
        activation = "gelu_tanh"
    gated = mlp == "SwiGLU" or (mlp == "GluMlp" and not block.mlp.gate_last)
    if gated and isinstance(act, nn.SiLU):
        activation = "swiglu"
    elif mlp != "Mlp" or activation is None:
        raise ValueError(f"not a plain ViT: its feed-forward part is {mlp} with {type(act).__name__}")
    known = {"heads": block.attn.num_heads, "mlp": activation, "norm_eps": block.norm1.eps, "plain": True}
    if (rope := getattr(model, "rope", None)) is not None:
        known |= _rotary_from_timm(rope)
    if grid := getattr(model.patch_embed, "grid_size", None):
        known["grid"] = tuple(grid)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    learned = getattr(model, "pos_embed", None) is not None
    # Other models' positions are resized as they have always been here.
    if learned and (rope is not None or "siglip" in str(cfg.get("architecture"))):
        known["position_resize"] = "bicubic_antialias"
    statistics, notes = _statistics(cfg.get("mean"), cfg.get("std"))
    return {**known, **statistics}, notes


def _rotary_from_timm(rope: Any) -> dict[str, Any]:
    kind = type(rope).__name__
    base: Any = getattr(rope, "temperature", None)
    offset, normal = getattr(rope, "grid_offset", 0.0), getattr(rope, "normalize_coords", "separate")
    pairs = HALVES if getattr(rope, "rotate_half", False) else NEIGHBOURS
    usual = normal == "separate" and base is not None and rope.grid_indexing in ("ij", "xy")
    augmented = {
        name: getattr(rope, f"{name}_coords")
        for name in ("shift", "jitter", "rescale")
        if getattr(rope, f"{name}_coords", None) is not None
    }
    if usual and kind == "RotaryEmbeddingDinoV3" and not offset and rope.min_period is None:
        rotary = RotaryConfig("centred", base, **augmented)
    elif usual and kind == "RotaryEmbeddingMixed":
        rotary = RotaryConfig("index", base, learned=True, **augmented)
    elif usual and kind == "RotaryEmbeddingCat" and getattr(rope, "grid_type", "index") == "index":
        if rope.in_pixels:
            raise ValueError("not a plain ViT: its rotary positions are in pixels")
        grid = rope.ref_feat_shape
        rotary = RotaryConfig("index", base, grid and tuple(grid), offset, **augmented)
    else:
        raise ValueError(f"not a plain ViT: its rotary positions are of another kind ({kind})")
    return {"rotary": rotary, "rotary_layout": (pairs, rope.grid_indexing)}


@torch.no_grad()
def same_features(model: Any, state: Mapping[str, Tensor], known: Mapping[str, Any]) -> bool:
    """Whether a timm model's first two blocks give the features that a `VisionTransformer` gives."""
    fields = {name: known[name] for name in TOLD if name in known}
    config = infer_backbone_config(state, **fields)
    last = min(2, config.depth) - 1
    config = infer_backbone_config(state, **fields, depth=last + 1)
    size = tuple(model.patch_embed.img_size)
    with torch.random.fork_rng(devices=[]):
        ours = VisionTransformer(config, size, (last,)).eval()
        adapted = adapt_backbone_state(state, config, ours.grid, known).state_dict
        if adapted.keys() != ours.state_dict().keys():
            return True  # the loader says what does not fit
        ours.load_state_dict(adapted)
        images = torch.randn(1, model.patch_embed.proj.in_channels, *size)
    theirs = model.forward_intermediates(
        images, indices=[last], norm=False, output_fmt="NLC", intermediates_only=True, stop_early=True
    )[0]
    return bool((ours(images)[0] - theirs).norm() <= 1e-4 * theirs.norm())


def _told(file: Path, about: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a file of weights and the configurations beside it tell (see `Pretrained`), and notes.

    Raises:
        ValueError: they tell of another architecture.
    """
    folder = file.parent
    # Configurations belong to files of the usual names: elsewhere many files may share a folder.
    beside = file.name in _FILES or len([f for f in folder.iterdir() if f.suffix == file.suffix]) == 1
    config = _json(folder / "config.json") if beside else {}
    clip = _json(folder / "open_clip_config.json") if beside else {}
    images = _json(folder / "preprocessor_config.json") if beside else {}
    own = "taps" in config or config.get("model_type") == BACKBONE_TYPE
    if own and isinstance(config.get("backbone"), dict):
        known = _from_own(config)
    elif "model_type" in config:
        known = _from_transformers(config)
    else:
        name = about.get("architecture") or config.get("architecture")
        name = name or _inside(clip, "model_cfg", "vision_cfg").get("timm_model_name")
        known = _from_architecture(name, config)
    if clip:
        known.setdefault("mlp", "quick_gelu" if _inside(clip, "model_cfg").get("quick_gelu") else "gelu")
        known.setdefault("norm_eps", 1e-5)
        known.setdefault("plain", True)
    statistics, notes = statistics_told(about)
    for source in (config, config.get("pretrained_cfg"), clip.get("preprocess_cfg"), images):
        if not statistics and isinstance(source, dict):
            mean, std = (source.get(key, source.get(f"image_{key}")) for key in ("mean", "std"))
            statistics, notes = _statistics(mean, std)
    return {**known, **statistics}, notes


def statistics_told(about: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """{"mean", "std"} on the 0..1 scale that a file of weights tells of itself, or {}; and notes.

    Args:
        about: see `segvit.model.checkpoint.read_checkpoint`. mmsegmentation's files hold a text for one.
    """
    text = str(about.get("config") or about.get("cfg") or "")
    found = re.findall(r"\b(mean|std)\s*=\s*[\[(]([^\[\]()]*)[\])]", text)
    values = {**dict(reversed(found)), **{key: about[key] for key in ("mean", "std") if key in about}}
    return _statistics(values.get("mean"), values.get("std"))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _inside(config: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The configuration under these names, one in the other; empty if there is none."""
    for name in names:
        inner = config.get(name)
        config = inner if isinstance(inner, Mapping) else {}
    return config


def _from_own(config: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in config.items() if name not in ("head", "model_type")}
    try:
        if "taps" not in values:  # a backbone alone
            depth = BackboneConfig.from_dict(config["backbone"]).depth
            values = {"num_classes": 1, "taps": [depth - 1], **values}
        read = SegViTConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"its config.json: {error}") from None
    backbone, (height, width) = read.backbone, read.image_size
    known = {name: getattr(backbone, name) for name in TOLD if name in config["backbone"]}
    grid = height // backbone.patch_size, width // backbone.patch_size
    return {**known, "grid": grid, "plain": True}


_PLAIN_TRANSFORMERS = {
    "vit", "deit", "vit_mae", "vit_msn", "ijepa", "dinov2", "dinov2_with_registers", "dinov3_vit", "clip",
    "clip_vision_model", "siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model", "eomt",
    "eomt_dinov3",
}  # fmt: skip


def _from_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json of Hugging Face's transformers tells; what it leaves out is its kind's default."""
    kind = config["model_type"]
    if not isinstance(kind, str) or kind not in _PLAIN_TRANSFORMERS:
        raise ValueError(f"not a plain ViT: its config.json says model_type {shown(kind)}")
    vision = _inside(config, "vision_config") or config
    clip, dinov3 = kind.startswith("clip"), kind in ("dinov3_vit", "eomt_dinov3")
    act = vision.get(
        "hidden_act", "quick_gelu" if clip else "gelu_pytorch_tanh" if "siglip" in kind else "gelu"
    )
    activations = {
        "gelu": "gelu",
        "quick_gelu": "quick_gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
    }
    if dinov3 and vision.get("use_gated_mlp"):
        activations = {"silu": "swiglu"}
    if not isinstance(act, str) or act not in activations:
        raise ValueError(f"its activation is {shown(act)}, expected {' or '.join(activations)}")
    small = kind.startswith(("dinov2", "siglip", "eomt", "vit_msn"))
    eps = vision.get("layer_norm_eps", 1e-6 if small else 1e-5 if clip or dinov3 else 1e-12)
    known = {"mlp": activations[act], "norm_eps": eps, "plain": True}
    if vision.get("use_swiglu_ffn"):
        known["mlp"] = "swiglu"
    if heads := vision.get("num_attention_heads"):
        known["heads"] = heads
    size, patch = vision.get("image_size"), vision.get("patch_size")
    if isinstance(size, int) and isinstance(patch, int) and patch > 0:
        known["grid"] = (size // patch, size // patch)
    if dinov3:
        names = {
            "base": "rope_theta",
            **{name: f"pos_embed_{name}" for name in ("shift", "jitter", "rescale")},
        }
        fields = {
            "rescale": 2.0,
            **{name: vision[theirs] for name, theirs in names.items() if theirs in vision},
        }
        if "rope_theta" in _inside(vision, "rope_parameters"):
            fields["base"] = vision["rope_parameters"]["rope_theta"]
        known["rotary"] = RotaryConfig(**{name: v for name, v in fields.items() if v is not None})
    if kind.startswith("siglip2"):
        side = math.isqrt(vision.get("num_patches", 256))
        known |= {"grid": (side, side), "position_resize": "bilinear_antialias"}
        known["linear_patches"] = patch or 16
    return known


def _with_patch_kernel(state: Mapping[str, Tensor], patch: int) -> dict[str, Tensor]:
    """SigLIP 2's linear layer of flat patches (p, p, channels) as the convolution that it is."""
    state = dict(state)
    for key, value in state.items():
        if key.endswith("patch_embedding.weight") and value.ndim == 2:
            state[key] = value.unflatten(1, (patch, patch, -1)).permute(0, 3, 1, 2).contiguous()
    return state


def _from_architecture(name: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's name of an architecture tells, where timm is installed; else what the name gives away."""
    if not isinstance(name, str):
        return {}
    try:
        timm = require("timm", extra="timm")
    except ImportError:
        timm = None
    if timm is None or not timm.is_model(name):
        if re.search(r"_rope_|_rpn_|eva02|dinov3|_pe_(core|lang|spatial)|beit|swin|samvit|naflex", name):
            raise ValueError(f"not a plain ViT: {name}")
        return {}
    given = config.get("model_args")
    arguments = given if isinstance(given, dict) else {}
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, **{**arguments, "num_classes": 0})
    except Exception as error:
        raise ValueError(f"timm cannot make its {name} with {arguments} ({first_line(error)})") from None
    return known_from_timm(model)[0]


def _statistics(mean: Any, std: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """{"mean", "std"} on the 0..1 scale, if both are known, and notes."""
    try:
        mean, std = (_numbers(value) for value in (mean, std))
    except (TypeError, ValueError, OverflowError):
        return {}, ()
    if not mean or len(mean) != len(std) or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        return {}, ()
    notes: tuple[str, ...] = ()
    if max(*mean, *std) > 4:
        mean, std = (tuple(round(value / 255, 6) for value in values) for values in (mean, std))
        notes = ("its mean and std are on the 0..255 scale: divided by 255",)
    return {"mean": mean, "std": std}, notes


def _numbers(value: Any) -> tuple[float, ...]:
    if isinstance(value, str):
        value = json.loads(f"[{value.strip().strip('[]()').rstrip(',')}]")
    return tuple(float(entry) for entry in value)
