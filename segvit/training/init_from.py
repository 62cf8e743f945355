"""Start a training from a whole checkpoint: other classes, another image size, the same network."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from segvit.config import BackboneConfig, SegViTConfig, decoder_of, usual_taps
from segvit.model.backbone_weights import adapt_backbone_state
from segvit.model.checkpoint import (
    WEIGHTS_FILE,
    find_checkpoint,
    load_state_dict,
    read_config,
    read_state_dict,
)
from segvit.model.heads import SegViT
from segvit_kernels import resize_positions

# One row for each class; those of the class head are followed by "no object".
_CLASS_ROWS = {
    "atm": ("class_tokens", "class_head.weight", "class_head.bias"),
    "segvitv2": ("class_tokens",),
    "eomt": ("class_head.weight", "class_head.bias"),
    "linear": ("1.weight", "1.bias"),
}
_QUERIES = "upsample.queries"
# What stays of a model, beside its backbone, where the decoder is another.
_OF_PICTURES = ("num_classes", "image_size", "mean", "std", "value_range", "class_names", "palette")


def init_from(
    source: str | os.PathLike, num_classes: int, fields: Mapping[str, Any], head: str | None = None
) -> tuple[SegViT, list[str]]:
    """A model for a data set that starts as another one's checkpoint ends, and in words what was changed.

    What belongs to classes is matched by name; with names on one side only, by index where the numbers are
    equal. Classes without a match start afresh, as do all of them where nothing can be matched. Position
    tables and up-sampling queries are resized to the new image size.

    Args:
        source: see `find_checkpoint`.
        num_classes: of the data set.
        fields: fields of `SegViTConfig` and `BackboneConfig` in place of the checkpoint's.
        head: the decoder where `fields` do not say it; None: the checkpoint's. With another one than that,
            the backbone and how pictures are read are taken, and the taps are the usual ones.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or weights that do not fit `fields`.
    """
    folder = find_checkpoint(source)
    old = read_config(folder)
    fields = {"decoder": decoder_of(head) or old.decoder, **fields}
    rows, words = match_classes(old.class_names, fields.get("class_names"), old.num_classes, num_classes)
    palette = fields.get("palette")
    if palette is None and old.palette and None not in rows:
        palette = [old.palette[row] for row in rows if row is not None]
    # Names that the data set has not are the checkpoint's, where the numbers agree.
    none = "class_names" if old.num_classes != num_classes else ""
    fields = {key: value for key, value in fields.items() if value is not None or key == none}
    fields = {**fields, "palette": palette}
    backbone_names = {field.name for field in dataclasses.fields(BackboneConfig)}
    backbone = {**old.backbone.to_dict(), **{k: v for k, v in fields.items() if k in backbone_names}}
    rest = {k: v for k, v in old.to_dict().items() if k != "backbone"}
    if old.decoder != fields["decoder"]:
        upsample = fields.get("upsample", old.upsample and fields["decoder"] != "eomt")
        rest = {name: rest[name] for name in _OF_PICTURES} | {"upsample": upsample}
        rest["taps"] = usual_taps(backbone["depth"], backbone["shrink_at"] if upsample else None)
        if (not upsample or fields["decoder"] == "linear") and "shrink_edges" not in fields:
            backbone["shrink_edges"] = 0.0
    rest |= {k: v for k, v in fields.items() if k not in backbone_names}
    new = SegViTConfig.from_fields({**backbone, **rest, "num_classes": num_classes})

    model = SegViT(new)
    weights = folder / WEIGHTS_FILE
    state, notes = read_state_dict(weights), []
    patch = old.backbone.patch_size
    grid = (old.image_size[0] // patch, old.image_size[1] // patch)
    try:
        known = {"grid": grid, "mlp": old.backbone.mlp, "rotary": old.backbone.rotary, "plain": True}
        adapted = adapt_backbone_state(state, new.backbone, model.backbone.grid, known)
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from None
    notes += adapted.changed
    norm = {key: value for key, value in model.backbone.state_dict().items() if key.startswith("norm.")}
    if norm.keys() - adapted.state_dict.keys():
        notes.append("the final norm starts afresh")
    load_state_dict(model.backbone, {**norm, **adapted.state_dict}, str(weights))
    if old.value_range or new.value_range:
        words = "taken over" if old.value_range == new.value_range else f"in place of {old.value_range}"
        notes.append(f"value_range {new.value_range} {words}")
    if old.decoder != new.decoder:
        taps = "" if len(new.taps) == 1 else f", whose taps are {', '.join(map(str, new.taps))}"
        notes.append(f"backbone taken, not the decoder {old.decoder}: {new.decoder} starts afresh{taps}")
        return model, notes
    prefix = "decoder."
    decoder = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
    fresh = model.decoder.state_dict()
    for name in _CLASS_ROWS[new.decoder]:
        if name in decoder and name in fresh:
            decoder[name] = _take_rows(decoder[name], fresh[name], rows)
    if _QUERIES in decoder and decoder[_QUERIES].shape != fresh.get(_QUERIES, decoder[_QUERIES]).shape:
        resized = resize_positions(decoder[_QUERIES][None], grid, model.backbone.grid)[0]
        decoder[_QUERIES] = resized
        notes.append("up-sampling queries resized with them")
    load_state_dict(model.decoder, decoder, str(weights))
    return model, [*notes, words]


def match_classes(
    old: Sequence[str] | None, new: Sequence[str] | None, num_old: int, num_new: int
) -> tuple[list[int | None], str]:
    """For every new class its index among the old ones, or None; and the same in words.

    Args:
        old, new: names; None where there are none.
        num_old, num_new: numbers of classes.
    """
    if old and new:
        alike, same = ({key(name): i for i, name in enumerate(old)} for key in (_plain, str))
        rows, how = [same.get(name, alike.get(_plain(name))) for name in new], "by name"
    elif num_old == num_new:
        rows, how = list(range(num_new)), "by index, as one side has no names"
    else:
        rows, how = [None] * num_new, "as one side has no names"
    names = new or [str(index) for index in range(num_new)]
    lost = [name for name, row in zip(names, rows, strict=True) if row is None]
    words = f"{num_new - len(lost)} of {num_new} classes taken over {how}"
    if lost:
        words += f"; fresh: {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}"
    return rows, words


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _take_rows(old: Tensor, fresh: Tensor, rows: Sequence[int | None]) -> Tensor:
    """Rows of `old` where there is one, those of `fresh` else; a last row beyond the classes is kept."""
    result = fresh.clone().to(old.dtype)
    for index, row in enumerate(rows):
        if row is not None:
            result[index] = old[row]
    if len(result) == len(rows) + 1:
        result[-1] = old[-1]
    return torch.as_tensor(result)
