"""Published checkpoints, plain and Shrunk, as models of this package; other plain ViTs as its backbones."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segvit.config import PRESETS, BackboneConfig, SegViTConfig
from segvit.model.backbone import VisionTransformer
from segvit.model.backbone_weights import adapt_backbone_state, infer_backbone_config
from segvit.model.checkpoint import (
    load_state_dict,
    published_names,
    read_checkpoint,
    rename_published_keys,
    save_weights,
)
from segvit.model.foreign import timm_names, what_it_is, why_not_plain
from segvit.model.pretrained import BACKBONE_TYPE, open_pretrained, statistics_told
from segvit.model.segvit import SegViT
from segvit.system.text import shown

__all__ = ["Conversion", "convert", "convert_backbone", "infer_config", "is_backbone"]


class Conversion(NamedTuple):
    """A converted model, and the keys of the checkpoint that it has no use for."""

    model: SegViT
    unused: list[str]


def convert(path: str | os.PathLike, fields: Mapping[str, Any] | None = None) -> Conversion:
    """The model of a published checkpoint. No code in the file is run.

    Args:
        path: a .pth or .safetensors file with the published names.
        fields: values in place of those that `infer_config` finds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, not a published SegViT checkpoint, weights missing, or a size that needs
            `fields`; one line that names the file.
    """
    published, meta = read_checkpoint(path)
    if not _is_published(published):
        raise ValueError(f"{path}: not a published SegViT checkpoint; {_instead(published)}")
    renamed = rename_published_keys(published)
    try:
        config = infer_config(renamed, fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    told = {key: value for key, value in _told(meta, config).items() if key not in (fields or {})}
    config = dataclasses.replace(config, **told)
    with torch.device("meta"):
        known = SegViT(config).state_dict()
    weights = {key: value for key, value in renamed.items() if key in known}
    model = SegViT.from_state_dict(config, weights, str(path))
    names = published_names(published)
    used = {names[key] for key in weights}
    return Conversion(model, [key for key in published if key not in used])


def _is_published(state_dict: Mapping[str, Any]) -> bool:
    """Whether weights have the names of a published SegViT, whose backbone is mmsegmentation's."""
    parts = ("backbone.layers.", "decode_head.")
    return all(any(key.startswith(part) for key in state_dict) for part in parts)


def is_backbone(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether weights are a ViT's, of whatever kind, without a decoder."""
    if any(key.startswith(("decode_head.", "decoder.class_tokens", "decoder.stages.")) for key in state_dict):
        return False
    names = timm_names(state_dict)
    return "patch_embed.proj.weight" in names and any(key.startswith("blocks.0.") for key in names)


_UNTOLD = ("heads", "mlp", "norm_eps")


class Backbone(NamedTuple):
    """A converted backbone: its configuration, the number of its tensors, and what became of the others."""

    config: BackboneConfig
    tensors: int
    notes: tuple[str, ...]
    unused: list[str]


def convert_backbone(
    path: str | os.PathLike, folder: str | os.PathLike, fields: Mapping[str, Any] | None = None
) -> Backbone:
    """Write a plain ViT's weights, in whatever layout, with our names and all that is known of them.

    `folder` gets model.safetensors and config.json, for `SegViT.load_backbone` and --backbone-weights.

    Args:
        fields: "heads", "mlp" and "norm_eps", where the file does not tell them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, or not a plain ViT's weights, or others than `fields` say; one line that names
            the file.
    """
    weights = open_pretrained(path)
    for name, value in (fields or {}).items():
        if name not in _UNTOLD:
            expected = f"{', '.join(_UNTOLD)}, which weights may leave open"
            raise ValueError(f"{path}: model: got {name}, but it is a backbone alone; expected {expected}")
        if weights.known.get(name, value) != value:
            raise ValueError(f"{path}: model: got {name} {shown(value)}, its own is {weights.known[name]}")
    weights = weights._replace(known={**weights.known, **(fields or {})})
    names = timm_names(weights.state_dict)
    config = dataclasses.replace(weights.backbone_config(), final_norm="norm.weight" in names)
    grid = tuple(weights.known.get("grid", ())) or _stored_grid(names)
    try:
        state, unused, changed = adapt_backbone_state(weights.state_dict, config, grid, weights.known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    size = (grid[0] * config.patch_size, grid[1] * config.patch_size)
    with torch.device("meta"):
        model = VisionTransformer(config, size, (config.depth - 1,))
    model.to_empty(device="cpu")
    load_state_dict(model, state, str(path))
    told: dict[str, Any] = {key: list(weights.known[key]) for key in ("mean", "std") if key in weights.known}
    values: dict[str, Any] = {
        "model_type": BACKBONE_TYPE,
        "backbone": config.to_dict(),
        "image_size": list(size),
        **told,
    }
    save_weights(folder, {key: state[key].contiguous() for key in model.state_dict()}, values)
    return Backbone(config, len(model.state_dict()), (*weights.notes, *changed), unused)


def _stored_grid(names: Mapping[str, Tensor]) -> tuple[int, int]:
    """The square grid of stored positions; any, where there are none."""
    count = names["pos_embed"].shape[1] if "pos_embed" in names else 32 * 32
    return (math.isqrt(count),) * 2


def infer_config(state_dict: Mapping[str, Tensor], fields: Mapping[str, Any] | None = None) -> SegViTConfig:
    """The configuration of published weights, from their names (`rename_published_keys`) and shapes.

    Shapes do not tell heads, which are 64 channels wide in the backbone and 32 in the decoder, nor taps and
    the block that shrinks, which are those of the preset with this width and depth.

    Args:
        state_dict: renamed weights.
        fields: fields of `SegViTConfig` and `BackboneConfig` that are known better.

    Raises:
        ValueError: weights that everything depends on are missing, or taps must be given.
    """
    backbone = infer_backbone_config(state_dict)
    if missing := {"decoder.class_tokens", "backbone.pos_embed"} - set(state_dict):
        raise ValueError(f"no weights for {', '.join(sorted(missing))}")
    for name, form in (
        ("decoder.class_tokens", "(classes, width)"),
        ("backbone.pos_embed", "(1, positions, width)"),
    ):
        shape = tuple(state_dict[name].shape)
        if len(shape) != form.count(",") + 1:
            raise ValueError(f"{name} is {shape}, expected {form}")
    num_classes, dim = state_dict["decoder.class_tokens"].shape
    side = math.isqrt(state_dict["backbone.pos_embed"].shape[1])
    shrunk = "decoder.upsample.queries" in state_dict
    stages = "decoder.upsample.stages." if shrunk else "decoder.stages."
    num_taps = _count(state_dict, stages)
    values: dict[str, Any] = {
        **backbone.to_dict(),
        "num_classes": num_classes,
        "decoder_dim": dim,
        "decoder_depth": _count(state_dict, f"{stages}0.layers."),
        "image_size": (side * backbone.patch_size,) * 2,
        "taps": (backbone.depth - 1,) if num_taps == 1 else None,
        "upsample": shrunk,
        "resize_queries": not shrunk,
    }
    for name in PRESETS:
        preset = SegViTConfig.preset(name, num_classes, shrunk=shrunk)
        same = (preset.backbone.width, preset.backbone.depth) == (backbone.width, backbone.depth)
        if same and len(preset.taps) == num_taps:
            values |= {
                "taps": preset.taps,
                "shrink_at": preset.backbone.shrink_at,
                "drop_path": preset.backbone.drop_path,
            }
    values |= fields or {}
    needed = ["taps", "shrink_at"] if shrunk else ["taps"]
    if unknown := [name for name in needed if values.get(name) is None]:
        raise ValueError(
            f"{num_taps} taps in {backbone.depth} blocks of width {backbone.width} are no published size: "
            f"{' and '.join(unknown)} must be given, as in --model '{{\"taps\": [5, 7, 11]}}'"
        )
    return SegViTConfig.from_fields(values)


def _count(keys: Sequence[str] | Mapping[str, Any], prefix: str) -> int:
    """How many modules are numbered from 0 after a prefix."""
    numbers = {key[len(prefix) :].split(".")[0] for key in keys if key.startswith(prefix)}
    return 1 + max((int(number) for number in numbers if number.isdecimal() and len(number) < 10), default=-1)


def _instead(state_dict: Mapping[str, Tensor]) -> str:
    """What a file that is not published holds, and what to do with it."""
    if any(key.startswith("decoder.class_tokens") for key in state_dict):
        return "it is one of this package: use its folder as it is, with --checkpoint or --init-from"
    if why_not_plain(state_dict, {"plain": True}) is None:
        return "it looks like a plain ViT without a decoder: use it with segvit train --backbone-weights"
    return what_it_is(state_dict)


def _told(meta: Mapping[str, Any], config: SegViTConfig) -> dict[str, Any]:
    """Class names, colours, mean and std that a checkpoint brings along."""
    newer = meta.get("dataset_meta")
    newer = newer if isinstance(newer, Mapping) else {}
    found = {
        "class_names": meta.get("CLASSES", newer.get("classes")),
        "palette": meta.get("PALETTE", newer.get("palette")),
    }
    classes = {
        name: entries
        for name, entries in found.items()
        if isinstance(entries, (list, tuple))
        and len(entries) == config.num_classes
        and getattr(config, name) is None
    }
    return {**classes, **statistics_told(meta)[0]}
