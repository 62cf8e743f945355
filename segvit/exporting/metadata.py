"""What an exported file says about itself: one JSON text, under the key `segvit` of the file's metadata."""

from __future__ import annotations

import dataclasses
import json
import mmap
from pathlib import Path
from typing import Any

from segvit.config import SegViTConfig
from segvit.exporting.graph import Plan
from segvit.inference.classes import class_colors, class_names
from segvit.options import InferenceOptions
from segvit_kernels import __version__

__all__ = ["KEY", "Description", "describe", "is_described", "read"]

KEY = "segvit"
_KIND = "segvit export"
_PRECISIONS = ("float32", "float16", "bfloat16", "int8")
_OUTPUTS = ("labels", "scores", "logits")


@dataclasses.dataclass(frozen=True)
class Description:
    """What is read back from an exported file.

    Attributes:
        config, plan: of the model and of the graph.
        precision: "float32", "float16", "bfloat16" or "int8".
        data: what is known of the data that the model was trained on, as `segvit train` records it.
    """

    config: SegViTConfig
    plan: Plan
    precision: str
    data: dict[str, Any]


def describe(config: SegViTConfig, plan: Plan, about: dict[str, Any]) -> str:
    """The text for a model and a plan; `about` has the format, the precision and what else is to be told."""
    size = list(plan.size) if plan.size else None
    fields = {
        "kind": _KIND,
        "version": __version__,
        **about,
        "classes": list(class_names(config)),
        "palette": class_colors(config).tolist(),
        "mean": list(config.mean),
        "std": list(config.std),
        "patch_size": config.backbone.patch_size,
        "input": {"size": size, "batch": plan.batch, "channels_last": plan.channels_last},
        "outputs": plan.outputs,
        "inference": plan.options.inference_fields(),
        "model": config.to_dict(),
    }
    return json.dumps(fields)


def is_described(path: Path) -> bool:
    """Whether a file has such a text anywhere, in whatever format."""
    if not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(_KIND.encode()) >= 0


def read(text: str | None, source: str) -> Description:
    """The description in a file's metadata.

    Raises:
        ValueError: there is none, or not one of ours; `source` is named.
    """
    try:
        fields = json.loads(text or "")
        if fields["kind"] != _KIND or fields["precision"] not in _PRECISIONS:
            raise ValueError("another kind")
        taken, size, batch = fields["input"], fields["input"]["size"], fields["input"]["batch"]
        if not all(type(number) is int for number in (*(size or ()), batch or 0)):
            raise ValueError("no whole numbers")
        plan = Plan(
            size=tuple(size) if size else None,
            batch=batch,
            channels_last=taken["channels_last"],
            outputs=fields["outputs"],
            options=InferenceOptions(**fields["inference"]),
        )
        # Files had the decoder's name beside the model once.
        config = SegViTConfig.from_dict(
            {**({"head": fields["head"]} if "head" in fields else {}), **fields["model"]}
        )
        plan.check(config.backbone.patch_size)
        if plan.outputs not in _OUTPUTS:
            raise ValueError("another output")
        return Description(config, plan, fields["precision"], dict(fields.get("data") or {}))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise ValueError(f"{source}: not a file that `segvit export` has written") from None
