"""`segvit convert`: published checkpoints, plain and Shrunk, and EoMT's of transformers to folders for
`SegViT.from_pretrained`; other plain ViTs to folders for `--backbone-weights`."""

from __future__ import annotations

from pathlib import Path

from segvit.model.checkpoint import read_state_dict
from segvit.model.convert import convert, convert_backbone, is_backbone
from segvit.model.eomt_weights import convert_eomt, is_eomt
from segvit.model.segvit import SegViT
from segvit.options import ConvertConfig


def run(config: ConvertConfig) -> int:
    """Print what was found, what was not used and where the result is. Returns 0."""
    for name in ("config.yaml", "trainer.pt"):
        if (Path(config.out) / name).is_file():
            raise ValueError(f"out: {config.out} holds a training ({name}); choose another folder")
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


def _backbone(config: ConvertConfig) -> int:
    """Of a file that holds a plain ViT alone."""
    found, tensors, notes, unused = convert_backbone(config.checkpoint, config.out)
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
