"""EoMT in the layout of transformers, plain or on DINOv3, as a model of this package."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from segvit.config import SegViTConfig
from segvit.model.backbone_weights import adapt_backbone_state
from segvit.model.eomt import EoMT
from segvit.model.pretrained import open_pretrained
from segvit.model.segvit import SegViT
from segvit.system.text import read_json

__all__ = ["convert_eomt", "is_eomt"]

_NEEDED = ("query.weight", "class_predictor.weight", "mask_head.fc1.weight", "attn_mask_probs")
_RENAMED = (
    (r"^query\.weight$", "queries"),
    (r"^class_predictor\.", "class_head."),
    (r"^mask_head\.fc1\.", "mask_head.0."),
    (r"^mask_head\.fc2\.", "mask_head.2."),
    (r"^mask_head\.fc3\.", "mask_head.4."),
    (r"^upscale_block\.block\.(\d+)\.layernorm2d\.", r"upscale.\1.norm."),
    (r"^upscale_block\.block\.(\d+)\.", r"upscale.\1."),
    (r"^attn_mask_probs$", "mask_probabilities"),
)
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # what EoMT is trained with


def is_eomt(state_dict: Mapping[str, Any]) -> bool:
    """Whether weights have the names of transformers' EoMT."""
    return all(name in state_dict for name in _NEEDED)


def convert_eomt(
    path: str | os.PathLike, fields: Mapping[str, Any] | None = None
) -> tuple[EoMT, list[str], list[str]]:
    """The model of a file of weights and the config.json beside it; unused keys; notes, in words.

    Args:
        path: a .safetensors or .bin file as transformers writes it. Without config.json beside it heads are
            64 channels wide, the activation is GELU and DINOv3's rotary positions cannot be told.
        fields: values of `SegViTConfig` and `BackboneConfig` in place of those that are found.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, or not EoMT's weights; one line that names the file.
    """
    weights = open_pretrained(path)
    beside = Path(path).parent / "config.json"
    told = read_json(beside, dict) if beside.is_file() else {}
    try:
        if (act := told.get("hidden_act", "gelu")) != "gelu":
            raise ValueError(f"its mask head has the activation {act}, expected gelu")
        head = _head(weights.state_dict)
        backbone = weights.backbone_config()
        patch = backbone.patch_size
        grid = weights.known.get("grid") or _square(weights.state_dict)
        values: dict[str, Any] = {
            **backbone.to_dict(),
            **_IMAGENET,
            **{name: weights.known[name] for name in _IMAGENET if name in weights.known},
            "decoder": EoMT.kind,
            "taps": (backbone.depth - 1,),
            "num_classes": head["class_head.weight"].shape[0] - 1,
            "queries": head["queries"].shape[0],
            "query_blocks": head["mask_probabilities"].shape[0],
            "upscale_blocks": len({name.split(".")[1] for name in head if name.startswith("upscale.")}),
            "image_size": tuple(side * patch for side in grid),
            "class_names": _names(told, head["class_head.weight"].shape[0] - 1),
        }
        config = SegViTConfig.from_fields({**values, **(fields or {})})
        height, width = (side // config.backbone.patch_size for side in config.image_size)
        known = {**weights.known, "grid": tuple(grid)}
        adapted = adapt_backbone_state(weights.state_dict, config.backbone, (height, width), known)
    except (ValueError, IndexError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    state = {f"backbone.{key}": value for key, value in adapted.state_dict.items()}
    state |= {f"decoder.{key}": value.float() for key, value in head.items()}
    model = SegViT.from_state_dict(config, state, str(path))
    assert isinstance(model, EoMT)
    unused = [key for key in weights.state_dict if key.startswith(("criterion.", "embeddings.mask_token"))]
    return model, unused, [*weights.notes, *adapted.changed]


def _head(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's weights with our names."""
    found = {}
    for key, value in state_dict.items():
        for pattern, replacement in _RENAMED:
            if match := re.search(pattern, key):
                found[match.expand(replacement) + key[match.end() :]] = value
                break
    for name, ndim in (("queries", 2), ("class_head.weight", 2), ("mask_probabilities", 1)):
        if found[name].ndim != ndim:
            raise ValueError(f"{name} has {found[name].ndim} dimensions, expected {ndim}")
    for name, value in found.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"{name} holds {value.dtype} or values that are not finite; expected weights")
    return found


def _square(state_dict: Mapping[str, Tensor]) -> tuple[int, int]:
    """The grid of stored positions; any, where there are none."""
    positions = state_dict.get("embeddings.position_embeddings.weight")
    side = 40 if positions is None else round(len(positions) ** 0.5)
    return side, side


def _names(told: Mapping[str, Any], classes: int) -> tuple[str, ...] | None:
    """Class names of a config.json that has some."""
    labels = told.get("id2label")
    if not isinstance(labels, dict) or sorted(labels) != sorted(map(str, range(classes))):
        return None
    names = tuple(str(labels[str(index)]) for index in range(classes))
    return None if names == tuple(f"LABEL_{index}" for index in range(classes)) else names
