"""Reading and writing weights: state dicts from files, names of published checkpoints, atomic writes."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segvit._extras import require
from segvit.files import atomic_write as atomic_write


class LoadReport(NamedTuple):
    """What a load did: number of tensors taken, keys left out on purpose, and what was resized, in words."""

    loaded: int
    ignored: tuple[str, ...]
    changed: tuple[str, ...]


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a .safetensors, .pth, .pt or .bin file, on the CPU. No code in the file is run.

    A state dict nested under `state_dict`, `model` or `teacher` is found, and `module.` prefixes are dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read as weights; it is named.
    """
    return read_checkpoint(path)[0]


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `read_state_dict` gives, and what a .pth file tells about it under `meta`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read as weights; it is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    meta = {}
    if path.suffix == ".safetensors":
        load_file = require("safetensors.torch", extra="train").load_file
        try:
            state = load_file(path)
        except Exception as error:
            raise ValueError(f"{path}: not a readable safetensors file ({_first_line(error)})") from None
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path}: not a readable file of weights ({_why_unreadable(error)})") from None
        if isinstance(state, Mapping) and isinstance(state.get("meta"), Mapping):
            meta = dict(state["meta"])
        for key in ("state_dict", "model", "teacher"):
            if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
                state = state[key]
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no state dict of tensors")
    tensors = {
        key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)
    }
    return tensors, meta


def _why_unreadable(error: Exception) -> str:
    """The reason why `torch.load` failed, without its advice to run what is in the file."""
    if match := re.search(r"GLOBAL (\S+)", str(error)):
        return f"refused: it holds pickled objects that could run code, {match[1]}"
    if isinstance(error, pickle.UnpicklingError):
        return "refused: not only tensors and plain values"
    return f"truncated, or of another kind: {_first_line(error)}"


def timm_state_dict(name: str) -> dict[str, Tensor]:
    """Pretrained weights of a timm model, by timm's name.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm does not know the name.
        OSError: the weights could not be fetched.
    """
    timm = require("timm", extra="timm")
    if name.split(".")[0] not in timm.list_models():
        raise ValueError(f"timm:{name}: timm {timm.__version__} has no model of this name")
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:
        raise OSError(f"timm:{name}: pretrained weights not available ({_first_line(error)})") from None


def load_state_dict(module: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load weights that must fit exactly; nothing is loaded if they do not.

    Raises:
        ValueError: one line with the number and the first of missing, unexpected and wrongly shaped keys.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    shapes = [
        f"{key} is {tuple(state_dict[key].shape)}, expected {tuple(value.shape)}"
        for key, value in own.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    problems = [
        f"{len(keys)} {kind} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise ValueError(f"{source}: the weights do not fit the model: {'; '.join(problems)}")
    module.load_state_dict(state_dict)


def rename_published_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of a published SegViT checkpoint, plain or Shrunk, to those of `segvit.SegViT`: a pure function.

    The class token and its position never reach the published blocks and are dropped, as are the losses'
    buffers of class weights. Unknown keys stay as they are, for the loader to report.
    """
    names = published_names(state_dict)
    renamed = {name: state_dict[key] for name, key in names.items()}
    if "backbone.pos_embed" in renamed:
        renamed["backbone.pos_embed"] = renamed["backbone.pos_embed"][:, 1:]
    return renamed


def published_names(keys: Collection[str]) -> dict[str, str]:
    """Our name -> published key, for every key that is not dead."""
    shrunk = any(key.startswith("decode_head.atm.") for key in keys)
    table = (*_PUBLISHED_BACKBONE, *(_PUBLISHED_SHRUNK if shrunk else _PUBLISHED_HEAD))
    names = {}
    for key in keys:
        name = key
        for pattern, replacement in table:
            if match := re.search(pattern, key):
                name = match.expand(replacement) + key[match.end() :]
                name = re.sub(r"\.stages\.(\d+)", lambda match: f".stages.{int(match[1]) - 1}", name)
                break
        if not re.search(_PUBLISHED_DEAD, key):
            names[name] = key
    return names


_PUBLISHED_DEAD = r"^backbone\.cls_token$|^decode_head\.(atm\.)?loss_decode\.criterion\.empty_weight$"
_PUBLISHED_BACKBONE = (
    (r"^backbone\.patch_embed\.projection\.", "backbone.patch_embed.proj."),
    (r"^backbone\.layers\.(\d+)\.ln([12])\.", r"backbone.blocks.\1.norm\2."),
    (r"^backbone\.layers\.(\d+)\.attn\.attn\.in_proj_", r"backbone.blocks.\1.attn.qkv."),
    (r"^backbone\.layers\.(\d+)\.attn\.attn\.out_proj\.", r"backbone.blocks.\1.attn.proj."),
    (r"^backbone\.layers\.(\d+)\.ffn\.layers\.0\.0\.", r"backbone.blocks.\1.mlp.fc1."),
    (r"^backbone\.layers\.(\d+)\.ffn\.layers\.1\.", r"backbone.blocks.\1.mlp.fc2."),
)
_PUBLISHED_HEAD = (
    (r"^decode_head\.q\.weight$", "decoder.class_tokens"),
    (r"^decode_head\.class_embed\.", "decoder.class_head."),
    (r"^decode_head\.input_proj_(\d+)\.", r"decoder.stages.\1.input_proj."),
    (r"^decode_head\.proj_norm_(\d+)\.", r"decoder.stages.\1.input_norm."),
    (r"^decode_head\.decoder_(\d+)\.layers\.(\d+)\.multihead_attn\.", r"decoder.stages.\1.layers.\2.atm."),
    (r"^decode_head\.decoder_(\d+)\.layers\.", r"decoder.stages.\1.layers."),
)
# A Shrunk head is a plain one, `atm`, and around it the up-sampling, whose names are almost the plain head's.
_PUBLISHED_SHRUNK = (
    (r"^decode_head\.q\.weight$", "decoder.upsample.queries"),
    (r"^decode_head\.input_proj_(\d+)\.", r"decoder.upsample.stages.\1.input_proj."),
    (r"^decode_head\.proj_norm_(\d+)\.", r"decoder.upsample.stages.\1.input_norm."),
    (r"^decode_head\.decoder_(\d+)\.layers\.", r"decoder.upsample.stages.\1.layers."),
    *(
        (pattern.replace(r"^decode_head\.", r"^decode_head\.atm\."), name)
        for pattern, name in _PUBLISHED_HEAD
    ),
)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
