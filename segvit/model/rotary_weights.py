"""Rotary positions in other projects' weights: what their own tables tell, and their order of channels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from segvit.config import BackboneConfig, RotaryConfig
from segvit.model.foreign import timm_names
from segvit.model.rotary import Rotary, axial_frequencies

HALVES, NEIGHBOURS = "halves", "neighbours"
"""Which channels of a head are a pair: i and i + D/2, as here, or 2i and 2i + 1."""


def told_by_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What weights in the layout of DINOv3, EVA-02 or Perception Encoder tell by themselves.

    The first two hold a table of their positions, which must be the one that is made here. `{}` for others.

    Returns:
        As `segvit.model.pretrained.Pretrained.known`.
    """
    names = timm_names(state_dict)
    kernel = names.get("patch_embed.proj.weight")
    if kernel is None or not kernel.ndim:
        return {}
    width = kernel.shape[0]
    for name, read in (("rope_embed.periods", _dinov3), ("rope.freqs_cos", _eva02)):
        if name in names and not names[name].is_meta:
            return read(names[name].double(), width)
    if {"attn_pool.probe", "norm_pre.weight", "pos_embed"} <= names.keys():
        return _perception_encoder(names)
    return {}


def _dinov3(periods: Tensor, width: int) -> dict[str, Any]:
    if periods.ndim != 1 or not len(periods):
        return {}
    channels = 4 * len(periods)
    rotary = RotaryConfig(rescale=2.0)
    expected = rotary.base ** (torch.arange(len(periods)).double() * 4 / channels)
    if width % channels or not torch.allclose(periods, expected, rtol=2**-8):  # they are stored in bfloat16
        return {}
    told = {"rotary": rotary, "rotary_layout": (HALVES, "ij"), "heads": width // channels}
    return {**told, "norm_eps": 1e-5, "plain": True}


def _eva02(cosines: Tensor, width: int) -> dict[str, Any]:
    if cosines.ndim != 2 or not cosines.numel() or cosines.shape[1] % 4 or width % cosines.shape[1]:
        return {}
    side, channels = math.isqrt(len(cosines)), cosines.shape[1]
    if side < 2 or side * side != len(cosines):
        return {}
    scaled = max(1, round(math.acos(min(1.0, max(-1.0, float(cosines[side, 0])))) * side))
    rotary = RotaryConfig("index", base=10000.0, grid=(scaled, scaled))
    made = Rotary(BackboneConfig(width=channels, depth=1, heads=1, rotary=rotary)).eval()((side, side), 0)
    if not torch.allclose(made[0, 0, :, 0].double().repeat_interleave(2, 1), cosines, atol=2**-7):
        return {}
    told = {"rotary": rotary, "rotary_layout": (NEIGHBOURS, "ij"), "heads": width // channels}
    return {**told, "norm_eps": 1e-6, "grid": (side, side), "plain": True}


def _perception_encoder(names: Mapping[str, Tensor]) -> dict[str, Any]:
    shape, prefix = names["pos_embed"].shape, int("cls_token" in names)
    if len(shape) != 3 or shape[1] <= prefix:
        return {}
    width, side = shape[2], math.isqrt(shape[1] - prefix)
    rotary = RotaryConfig("index", base=10000.0, grid=(side, side), offset=float(prefix))
    told = {"rotary": rotary, "rotary_layout": (NEIGHBOURS, "xy"), "position_resize": "bilinear"}
    told["heads"] = 16 if width == 1536 else max(1, width // 64)  # those of G have 96 channels
    return {**told, "mlp": "gelu", "norm_eps": 1e-5, "grid": (side, side), "plain": True}


def to_our_layout(state: dict[str, Tensor], config: BackboneConfig, known: Mapping[str, Any]) -> None:
    """Order of channels and frequencies of a backbone's weights, in place; with those that were not stored.

    Args:
        known: "rotary" of the weights, None where they have none; and "rotary_layout", which channels are a
            pair, and "ij" or "xy": whether the first half of the pairs is turned by rows or by columns.
            Without it they are as here.
    """
    rotary = known.get("rotary")
    if rotary is None:
        return
    pairs, axes = known.get("rotary_layout", (HALVES, "ij"))
    frequencies = state.get("rope.freqs")
    if frequencies is None:
        frequencies = axial_frequencies(rotary.base, config.width // config.heads)
    if rotary.learned:
        frequencies = frequencies[:, : config.depth]
    state["rope.freqs"] = frequencies.flip(0) if axes == "xy" else frequencies
    if pairs == HALVES:
        return
    for key in [key for key in state if ".attn.qkv." in key]:
        query, old, value = state[key].chunk(3)
        state[key] = torch.cat([*(_halves(part, config.heads) for part in (query, old)), value])


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of a projection (C, ...): of each head first those of even numbers, then the odd ones."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
