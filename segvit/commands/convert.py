"""`segvit convert`: published checkpoints, plain and Shrunk, and EoMT's of transformers to folders for
`SegViT.from_pretrained`; other plain ViTs to folders for `--backbone-weights`."""

from __future__ import annotations

import os
from pathlib import Path

from segvit.model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_config, read_state_dict
from segvit.model.convert import convert, convert_backbone, is_backbone
from segvit.model.eomt_weights import convert_eomt, is_eomt
from segvit.model.pretrained import BACKBONE_TYPE
from segvit.model.segvit import SegViT
from segvit.options import ConvertConfig
from segvit.system.text import read_json


def run(config: ConvertConfig) -> int:
    """Print what was found, what was not used and where the result is. Returns 0."""
    _check_out(Path(config.out))
    weights = read_state_dict(config.checkpoint)
    model: SegViT
    notes: list[str] = []
    if is_eomt(weights):
        model, unused, notes = convert_eomt(config.checkpoint, config.model)
    elif is_backbone(weights):
        return _backbone(config)
    else:
        model, unused = convert(config.checkpoint, config.model)
    model.save_pretrained(config.out)
    found, backbone = model.config, model.config.backbone
    if found.decoder == "eomt":
        print(f"{config.checkpoint}: EoMT, {found.queries} queries in the last {found.query_blocks} blocks")
    for note in notes:
        print(f"  {note}")
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (found.mean, found.std))
    shrunk = f", shrunk at block {backbone.shrink_at}" if backbone.shrink_at is not None else ""
    print(
        f"{config.checkpoint}: ViT of width {backbone.width} with {backbone.depth} blocks{shrunk}, "
        f"taps {', '.join(map(str, found.taps))}; {found.num_classes} classes; "
        f"{found.image_size[0]}x{found.image_size[1]} pixels; mean {mean}, std {std}"
    )
    print(
        f"{len(model.state_dict())} tensors in {config.out}, none missing; {len(unused)} unused in the file"
    )
    for key in unused:
        print(f"  unused: {key}")
    return 0


def _check_out(out: Path) -> None:
    """Raises ValueError where a training, or a model of others, would be overwritten."""
    for name in ("config.yaml", "trainer.pt"):
        if (out / name).is_file():
            raise ValueError(f"out: {out} holds a training ({name}); choose another folder")
    there = [out / name for name in (WEIGHTS_FILE, CONFIG_FILE) if os.path.lexists(out / name)]
    if there and not _is_ours(out):
        raise ValueError(f"out: {there[0]} is there already and not from segvit; choose another folder")


def _is_ours(folder: Path) -> bool:
    try:
        if read_json(folder / CONFIG_FILE, dict).get("model_type") != BACKBONE_TYPE:
            read_config(folder)
        return True
    except (OSError, ValueError):
        return False


def _backbone(config: ConvertConfig) -> int:
    """Of a file that holds a plain ViT alone."""
    found, tensors, notes, unused = convert_backbone(config.checkpoint, config.out, config.model)
    rotary = ", rotary positions" if found.rotary else ""
    print(
        f"{config.checkpoint}: a plain ViT of width {found.width} with {found.depth} blocks of {found.heads} "
        f"heads, patch {found.patch_size}{rotary}, without a decoder"
    )
    for note in notes:
        print(f"  {note}")
    print(f"{tensors} tensors in {config.out}: segvit train --backbone-weights {config.out}")
    for key in unused:
        print(f"  unused: {key}")
    return 0
