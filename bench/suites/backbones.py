"""``python -m bench backbones``: every preset's backbone against timm's model of the same architecture.

Random weights, at the full width and depth, in float32: the largest difference of the features after the last
block, by the largest feature; at the library's own image size. Parameters and multiply-accumulates are of our
model, which has what SegViT uses, at 512 x 512 pixels (518 for patches of 14).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.measure import environment
from bench.subjects.counts import count_torch


class Backbone(NamedTuple):
    """A preset, and timm's name of the architecture."""

    preset: str
    timm: str


BACKBONES = (
    Backbone("vit_small", "vit_small_patch16_224"),
    Backbone("vit_base", "vit_base_patch16_224"),
    Backbone("dinov3_vits16", "vit_small_patch16_dinov3_qkvb"),
    Backbone("dinov3_vits16plus", "vit_small_plus_patch16_dinov3_qkvb"),
    Backbone("dinov3_vitb16", "vit_base_patch16_dinov3_qkvb"),
    Backbone("dinov3_vitl16", "vit_large_patch16_dinov3_qkvb"),
    Backbone("eva02_vits14", "eva02_small_patch14_224"),
    Backbone("eva02_vitb14", "eva02_base_patch14_224"),
    Backbone("siglip2_vitb16", "vit_base_patch16_siglip_256"),
    Backbone("pe_spatial_vits16", "vit_pe_spatial_small_patch16_512"),
    Backbone("pe_spatial_vitb16", "vit_pe_spatial_base_patch16_512"),
)


@torch.no_grad()
def _random(name: str, seed: int = 0) -> nn.Module:
    """timm's model, every parameter a random number."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    model = model.to_empty(device="cpu").eval()
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        noise = 0.05 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise + (parameter.ndim == 1 and "bias" not in key))
    return model


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def _row(backbone: Backbone) -> dict[str, Any]:
    import timm

    from segvit.config import SegViTConfig
    from segvit.model.backbone import VisionTransformer
    from segvit.model.backbone_weights import TOLD, adapt_backbone_state, infer_backbone_config
    from segvit.model.pretrained import known_from_timm

    theirs = _random(backbone.timm)
    known, _ = known_from_timm(theirs)
    state, last = theirs.state_dict(), len(theirs.blocks) - 1
    config = infer_backbone_config(state, **{key: known[key] for key in TOLD if key in known})
    size = tuple(theirs.patch_embed.img_size)
    with torch.device("meta"):
        ours = VisionTransformer(config, size, (last,))
    adapted = adapt_backbone_state(state, config, ours.grid, known).state_dict
    ours = ours.to_empty(device="cpu").eval()
    ours.load_state_dict(adapted)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = theirs.forward_intermediates(
        images, indices=[last], norm=False, output_fmt="NLC", intermediates_only=True
    )[0]
    error = _error(ours(images)[0], expected)
    preset = SegViTConfig.preset(backbone.preset, 2).backbone
    side = 512 // preset.patch_size * preset.patch_size + (14 if preset.patch_size == 14 else 0)
    with torch.device("meta"):
        counted = VisionTransformer(preset, (side, side), (preset.depth - 1,)).eval()
        macs = count_torch(counted, torch.zeros(1, 3, side, side))
    return {
        "backbone": backbone.preset,
        "library": f"timm {timm.__version__}",
        "model": backbone.timm,
        "size": list(size),
        "error": error,
        "parameters": sum(p.numel() for p in counted.parameters()),
        "counted_at": side,
        "macs": macs,
    }


def run(*, names: Sequence[str] | None = None, progress: Callable[[str], None] = print) -> dict:
    """One row a preset, as plain data."""
    rows = []
    for backbone in BACKBONES:
        if names and backbone.preset not in names:
            continue
        start = time.perf_counter()
        row = _row(backbone)
        rows.append(row)
        words = f"error {row['error']:.1e}, {row['macs'] / 1e9:.1f} GMACs"
        progress(f"{backbone.preset}: {words} ({time.perf_counter() - start:.0f} s)")
    return {
        "schema": 1,
        "kind": "backbones",
        "environment": environment.describe(torch.device("cpu")),
        "rows": rows,
    }
