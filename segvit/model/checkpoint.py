"""Reading and writing weights: state dicts from files, names of published checkpoints."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from segvit.config import SegViTConfig
from segvit.model.foreign import find_state_dict, timm_name, without_wrappers
from segvit.system.extras import require
from segvit.system.files import atomic_write, follow
from segvit.system.text import read_json

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
DATA_FILE = "data.json"  # what a training says of its data, where there was one


class LoadReport(NamedTuple):
    """What a load did: number of tensors taken, keys left out, and what was changed or assumed, in words."""

    loaded: int
    ignored: tuple[str, ...]
    changed: tuple[str, ...]


def hub_name(source: str | os.PathLike, anywhere: bool = False) -> str | None:
    """'owner/name' or 'owner/name@revision' if `source` is such a name of the Hub and no path here.

    Args:
        anywhere: a path of that name here does not count.
    """
    match = re.fullmatch(r"(?:hf-hub:)?([\w-][\w.-]*/[\w-][\w.-]*(?:@[\w./-]+)?)", str(source))
    return match[1] if match and (anywhere or not os.path.exists(str(source))) else None


def hub_snapshot(name: str, patterns: list[str], revision: str | None = None) -> Path:
    """The local copy of the files of a Hub repository, 'owner/name' or 'owner/name@revision'.

    Raises:
        FileNotFoundError: it cannot be had; the message has the Hub's reason.
        ImportError: huggingface_hub is not installed.
        ValueError: a file in the cache is not the one whose hash it is named by.
    """
    hub = require("huggingface_hub", extra="hub")
    repository, _, tag = name.partition("@")
    try:
        folder = Path(
            hub.snapshot_download(repository, revision=revision or tag or None, allow_patterns=patterns)
        )
    except Exception as error:
        raise FileNotFoundError(f"{name}: no such folder, and the Hub says: {first_line(error)}") from None
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        _verify(name, path)
    return folder


def _verify(name: str, path: Path) -> None:
    """Compare a file with its hash; huggingface_hub, which names files of its cache so, compares lengths.

    Large files are named by SHA-256, others as Git does it, by SHA-1 of a header and the contents; a folder
    without symbolic links (of Windows) has no such names.
    """
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", blob.name):
        with blob.open("rb") as file:
            if len(blob.name) == 64:
                found = hashlib.file_digest(file, "sha256")
            else:
                found = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
                found.update(file.read())
        if found.hexdigest() != blob.name:
            raise ValueError(f"{name}: {path.name} is damaged, or not the Hub's (hash); delete {blob}")


def find_checkpoint(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder of a model's config.json and model.safetensors.

    Args:
        source: that folder, or one of its two files; a run's folder, of which the best or else the last
            checkpoint is taken; 'owner/name' on the Hub (needs the extra `hub`).
        revision: branch, tag or commit on the Hub; also 'owner/name@revision'.

    Raises:
        FileNotFoundError: nothing of these; the message says what it is where that is known.
    """
    path = follow(source)
    if path.is_file() and path.name in (WEIGHTS_FILE, CONFIG_FILE):
        path = path.parent
    if path.is_dir():
        for folder in (path, follow(path / "checkpoints" / "best"), follow(path / "checkpoints" / "last")):
            if (folder / CONFIG_FILE).is_file():
                return folder
        expected = f"expected {CONFIG_FILE} and {WEIGHTS_FILE}"
        raise FileNotFoundError(f"{source}: no checkpoint in this folder ({expected})")
    if path.is_file():
        raise FileNotFoundError(
            f"{source}: a file, expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}; a published .pth "
            "file becomes one by: segvit convert FILE FOLDER"
        )
    if name := hub_name(source):
        return hub_snapshot(name, [WEIGHTS_FILE, CONFIG_FILE, DATA_FILE], revision)
    raise FileNotFoundError(f"{source}: no such checkpoint folder, and no owner/name on the Hub")


def read_config(folder: Path) -> SegViTConfig:
    """The configuration in a checkpoint's folder.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: another model's, or not readable; the file is named.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint is {CONFIG_FILE} and {WEIGHTS_FILE}")
    values = read_json(path, dict)
    if other := values.get("model_type", values.get("architecture")):
        raise ValueError(f"{path}: of {other}, not of SegViT; a plain ViT's weights go to --backbone-weights")
    try:
        return SegViTConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class Checkpoint(NamedTuple):
    """The weights of a file, and what the file tells about them (see `read_checkpoint`)."""

    state_dict: dict[str, Tensor]
    about: dict[str, Any]


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a .safetensors, .pth, .pt or .bin file, on the CPU. No code in the file is run.

    The state dict inside a training checkpoint is found (`segvit.model.foreign.find_state_dict`), and
    prefixes of wrappers (`module.`, `_orig_mod.`) are dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read as weights; it is named, and what it is instead.
    """
    return read_checkpoint(path).state_dict


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """What `read_state_dict` gives, and what the file tells about it.

    Of a .safetensors file these are the entries of its header; of a .pth file what stands under `meta`,
    "architecture" (`arch`, or `model` of the arguments of the run), and "chosen": which of several state
    dicts was taken, in words.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read as weights; it is named, and what it is instead.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path}: a folder, expected a file of weights")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    with path.open("rb") as file:
        start = file.read(512)
    if what := _other_kind(start):
        raise ValueError(f"{path}: {what}")
    # By content, not by name: files get renamed. A zip archive is torch's.
    if (path.suffix == ".safetensors" and not start.startswith(b"PK")) or start[8:9] == b"{":
        content, about = _read_safetensors(path)
    else:
        content, about = _read_pickle(path)
    try:
        state, chosen = find_state_dict(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    about |= {"chosen": chosen} if chosen else {}
    return Checkpoint(without_wrappers(state), about)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    safe_open = require("safetensors", extra="train").safe_open
    try:
        if any("\udc80" <= letter <= "\udcff" for letter in str(path)):  # no UTF-8, which it does not open
            data = path.read_bytes()
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            return require("safetensors.torch", extra="train").load(data), header.get("__metadata__", {})
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as error:
        size = path.stat().st_size
        words = f"truncated or damaged, {size} bytes: {first_line(error)}"
        raise ValueError(f"{path}: not a readable safetensors file ({words})") from None


def _read_pickle(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        allowed = torch.serialization.safe_globals(_harmless(path))
        with allowed, path.open("rb") as file:  # of a path torch would believe the ending
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a readable file of weights ({_why_unreadable(error)})") from None
    if not isinstance(content, Mapping):
        return content, {}
    meta = content.get("meta")
    about = dict(meta) if isinstance(meta, Mapping) else {}
    arguments = content.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    arguments = arguments if isinstance(arguments, Mapping) else {}
    for name in (content.get("arch"), arguments.get("model"), arguments.get("arch")):
        if isinstance(name, str):
            about.setdefault("architecture", name)
    return content, about


class _Inert(dict):
    """Stands for an object that a training library left in a checkpoint: takes anything and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


_LEFT_BY_TRAINING = re.compile(
    r"(mmengine|mmcv|mmseg|omegaconf|yacs|pathlib|lightning|lightning_fabric|pytorch_lightning)\."
)


def _harmless(path: Path) -> list[Any]:
    """What may be unpickled beside tensors: numbers of NumPy, arguments of a run, and stand-ins."""
    scalar = np.float64(0).__reduce__()[0]
    numbers = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    allowed = [argparse.Namespace, np.dtype, *numbers]
    allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with path.open("rb") as file:
            found = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # of another format, or not readable, which torch.load says
        return allowed
    return [*allowed, *((_Inert, name) for name in found if _LEFT_BY_TRAINING.match(name))]


_TORCHSCRIPT = "a TorchScript program, which would be run to be read; save its state_dict()"
_OTHER_KINDS = (
    (rb"^$", "an empty file"),
    (rb"^version https://git-lfs", "a Git LFS pointer, not the weights: git lfs pull fetches them"),
    (rb"(?i)^\s*(<!doctype|<html|<\?xml|<head)", "a web page (HTML), not weights: the download went wrong"),
    (rb"^\s*[{\[]", "a text in JSON, not weights"),
    (rb"^\x93NUMPY", "a NumPy array, not weights of PyTorch"),
    (rb"^PK.{28,300}\.npy", "a NumPy archive (JAX weights); timm has many of them: timm:NAME"),
    (rb"^\x89HDF", "an HDF5 file (Keras), not weights of PyTorch"),
    (rb"^GGUF", "a GGUF file, quantised weights of a language model"),
    (rb"^\x1f\x8b|^BZh|^\xfd7zXZ|^7z\xbc\xaf|^Rar!|^.{257}ustar", "a compressed archive: unpack it first"),
    (rb"^(\xff\xd8\xff|\x89PNG|%PDF)", "a picture or document, not weights"),
    (rb"^PK.{28,300}/(constants\.pkl|code/)", _TORCHSCRIPT),
)  # fmt: skip


def _other_kind(start: bytes) -> str | None:
    """What a file is that begins like this, if it clearly holds no weights."""
    return next((words for pattern, words in _OTHER_KINDS if re.search(pattern, start, re.DOTALL)), None)


def _why_unreadable(error: Exception) -> str:
    """The reason why `torch.load` failed, without its advice to run what is in the file."""
    if match := re.search(r"GLOBAL (\S+)", str(error)):
        reason = f"refused: it holds pickled objects that could run code, {match[1][:100]}"
        return f"{reason}; where it was made, save the model's state_dict() instead"
    if "TorchScript" in str(error):
        return _TORCHSCRIPT
    if isinstance(error, UnicodeError):
        return "damaged: text that is not UTF-8"
    if isinstance(error, OSError):
        return f"damaged: {error.strerror or error}"
    if isinstance(error, pickle.UnpicklingError):
        return "refused: not only tensors and plain values"
    return f"truncated, or of another kind: {first_line(error)}"


def save_weights(
    folder: str | os.PathLike, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Write model.safetensors and config.json into `folder`, each in one step."""
    save_file = require("safetensors.torch", extra="train").save_file
    text = json.dumps(config, indent=2) + "\n"
    weights = dict(state_dict)
    atomic_write(Path(folder) / WEIGHTS_FILE, lambda path: save_file(weights, path, {"format": "pt"}))
    atomic_write(Path(folder) / CONFIG_FILE, lambda path: path.write_text(text))


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
    if "backbone.pos_embed" in renamed and renamed["backbone.pos_embed"].ndim > 1:
        renamed["backbone.pos_embed"] = renamed["backbone.pos_embed"][:, 1:]
    return renamed


def published_names(keys: Collection[str]) -> dict[str, str]:
    """Our name -> published key, for every key that is not dead."""
    shrunk = any(key.startswith("decode_head.atm.") for key in keys)
    table = _PUBLISHED_SHRUNK if shrunk else _PUBLISHED_HEAD
    names = {}
    for key in keys:
        name = f"backbone.{timm_name(key[9:])}" if key.startswith("backbone.") else key
        for pattern, replacement in table:
            if match := re.search(pattern, key):
                name = match.expand(replacement) + key[match.end() :]
                name = re.sub(r"\.stages\.(\d+)", lambda match: f".stages.{int(match[1]) - 1}", name)
                break
        if not re.search(_PUBLISHED_DEAD, key):
            names[name] = key
    return names


_PUBLISHED_DEAD = r"^backbone\.cls_token$|^decode_head\.(atm\.)?loss_decode\.criterion\.empty_weight$"
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


def first_line(error: BaseException) -> str:
    """What an exception says first, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
