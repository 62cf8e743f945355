"""Weights of other projects' plain ViTs, brought to the names, shapes and conventions of our backbone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segvit.config import BackboneConfig
from segvit.model.foreign import assumptions, timm_names, why_not_plain
from segvit.model.rotary_weights import to_our_layout, told_by_names
from segvit_kernels import resize_positions


def resample_patch_kernel(kernel: Tensor, patch_size: int) -> Tensor:
    """Patch kernel (C, 3, p, p) for another patch size.

    The new kernel gives a bicubically resized patch the token that the old one gives the patch itself, in the
    least-squares sense: the pseudo-inverse of resizing (FlexiViT, arXiv 2212.08013, section 3.4).
    """
    old = kernel.shape[-1]
    if old == patch_size:
        return kernel
    basis = torch.eye(old * old, dtype=torch.float64, device=kernel.device).view(-1, 1, old, old)
    size = (patch_size, patch_size)
    resized = F.interpolate(basis, size=size, mode="bicubic", align_corners=False, antialias=patch_size < old)
    inverse = torch.linalg.pinv(resized.flatten(1))  # [new², old²]
    new = torch.einsum("oi,cdi->cdo", inverse, kernel.double().flatten(2))
    return new.unflatten(2, size).to(kernel.dtype)


def _spread_channels(state: dict[str, Tensor], channels: int, changed: list[str]) -> None:
    """Bring an RGB patch kernel to another number of channels.

    Grey pictures get the tokens of the same pictures in RGB. Of more channels the first three keep their
    kernels and the others get the mean of them, all weaker by 3 / channels: a picture that is the same in
    every channel gets the tokens that it has in RGB.
    """
    name = "patch_embed.proj.weight"
    kernel = state.get(name)
    if kernel is None or kernel.ndim != 4 or kernel.shape[1] != 3 or channels == 3:
        return
    mean = kernel.mean(1, keepdim=True)
    first = kernel if channels > 3 else kernel[:, :0]
    state[name] = torch.cat([first, mean.expand(-1, channels - first.shape[1], -1, -1)], 1) * (3 / channels)
    rest = "the others have their mean, " if channels > 3 else "each has their mean, "
    changed.append(f"patch kernel of 3 channels spread over {channels}: {rest}all times 3/{channels}")


class BackboneState(NamedTuple):
    """Of `adapt_backbone_state`: a state dict, unused keys, and what was changed or assumed, in words."""

    state_dict: dict[str, Tensor]
    ignored: list[str]
    changed: list[str]


# Heads and training leftovers of classification and self-supervised checkpoints.
_UNUSED = re.compile(
    r"(head|fc_norm|mask_token|pre_logits|dist_token|attn_pool|pooler|decoder|classifier|proj$|logit_scale"
    r"|query\.|mask_head\.|upscale_block\.|class_predictor\.|criterion\.|attn_mask_probs"  # EoMT's
    r"|rope_embed\.|rope\.freqs_(cos|sin)|blocks\.\d+\.attn\.rope\.|(local_)?cls_norm\.)"
)
_ZERO_BIAS = re.compile(r"(patch_embed\.proj|blocks\.\d+\.(attn\.proj|mlp\.fc[12]))\.weight")


def adapt_backbone_state(
    state_dict: Mapping[str, Any],
    config: BackboneConfig,
    grid: tuple[int, int],
    known: Mapping[str, Any] | None = None,
) -> BackboneState:
    """Bring a plain ViT's weights to the names and shapes of `VisionTransformer`: a pure function.

    Accepts the names that `segvit.model.foreign` lists, behind any prefix (a full SegViT's `backbone.`) and
    inside training checkpoints. Positions of prefix tokens are added to the tokens, the position grid is
    resized to `grid`, the patch kernel is resampled to `config.patch_size`, and biases that a linear layer
    has not are zeros. Keys that do not belong stay, for the loader to report.

    Args:
        known: what is known of the weights beside names and shapes: "plain": True where the architecture has
            been looked at, "grid" of the stored positions, "mlp", "rotary" and "rotary_layout"
            (`segvit.model.rotary_weights.to_our_layout`).

    Raises:
        ValueError: another architecture, quantised or not finite weights, or positions without a grid; one
            line with the reason.
    """
    known = {**told_by_names(state_dict), **(known or {})}
    if reason := why_not_plain(state_dict, known):
        raise ValueError(reason)
    renamed = timm_names(state_dict)
    state: dict[str, Tensor] = {}
    ignored, changed = [], assumptions(state_dict, known)
    for key, value in renamed.items():
        parts = key.split(".")
        number = parts[1] if parts[0] == "blocks" and len(parts) > 1 else ""
        beyond = number.isdecimal() and int(number) >= config.depth
        unused_norm = parts[0] == "norm" and not config.final_norm
        dead_token = key == "cls_token" and not config.class_token
        if beyond or _UNUSED.match(key) or unused_norm or dead_token:
            ignored.append(key)
        elif not value.is_floating_point() or value.itemsize < 2:
            raise ValueError(f"{key} holds {value.dtype}, quantised weights; expected floating-point ones")
        elif not value.is_meta and not value.isfinite().all():
            raise ValueError(
                f"{key} holds values that are not finite; the file is damaged or training diverged"
            )
        else:
            state[key] = value.float()
    for match in filter(None, map(_ZERO_BIAS.fullmatch, list(state))):
        weight = state[match[0]]
        state.setdefault(f"{match[1]}.bias", weight.new_zeros(len(weight)))

    if "pos_embed" in state:
        changed += _fit_positions(state, renamed, config, grid, known.get("grid"))
    to_our_layout(state, config, known)
    kernel = state["patch_embed.proj.weight"]
    if kernel.shape[-1] != config.patch_size:
        changed.append(f"patch kernel {kernel.shape[-1]} resampled to {config.patch_size}")
        state["patch_embed.proj.weight"] = resample_patch_kernel(kernel, config.patch_size)
    _spread_channels(state, config.in_channels, changed)
    return BackboneState(state, ignored, changed)


TOLD = ("heads", "mlp", "norm_eps", "rotary", "position_resize")
"""Fields of `BackboneConfig` that names and shapes of weights do not tell, but for the layouts of a few."""


def infer_backbone_config(state_dict: Mapping[str, Any], **overrides: Any) -> BackboneConfig:
    """The `BackboneConfig` of a plain ViT's weights, read from names and shapes.

    Heads, activation, the norms' epsilon and most rotary positions leave no trace in the weights: width / 64
    heads, GELU, 1e-6 and none, as in every standard ViT, unless given.

    Args:
        state_dict: weights with the names that `adapt_backbone_state` accepts.
        overrides: fields to set instead.

    Raises:
        ValueError: these are not the weights of a plain ViT.
    """
    keys = {key: tuple(value.shape) for key, value in timm_names(state_dict).items()}
    try:
        width, channels, patch_size, _ = keys["patch_embed.proj.weight"]
        depth = 1 + max(int(key.split(".")[1]) for key in keys if key.startswith("blocks."))
        (hidden, _), (_, inner) = keys["blocks.0.mlp.fc1.weight"], keys["blocks.0.mlp.fc2.weight"]
        registers = keys["reg_token"][1] if "reg_token" in keys else 0
    except (KeyError, ValueError, IndexError):
        raise ValueError(
            why_not_plain(state_dict)
            or "not a plain ViT's weights: blocks.0.mlp.fc1 and fc2 are missing, or of another shape"
        ) from None
    values: dict[str, Any] = {
        "width": width,
        "depth": depth,
        "heads": max(1, width // 64),
        "patch_size": patch_size,
        "in_channels": channels,
        "mlp": "gelu" if hidden == inner else "swiglu",
        "mlp_ratio": _ratio(hidden, max(1, width)),
        "class_token": "cls_token" in keys,
        "register_tokens": registers,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in keys else None,
        "qkv_bias": "blocks.0.attn.qkv.bias" in keys,
        "pre_norm": "norm_pre.weight" in keys,
        "absolute_positions": "pos_embed" in keys,
        "attention_norm": "blocks.0.attn.norm.weight" in keys,
        "mlp_norm": "blocks.0.mlp.norm.weight" in keys,
    }
    told = told_by_names(state_dict)
    values |= {key: told[key] for key in TOLD if key in told}
    return BackboneConfig(**{**values, **overrides})


def _ratio(hidden: int, width: int) -> float:
    """The ratio of which `int(width * ratio)` is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _fit_positions(
    state: dict[str, Tensor],
    names: Mapping[str, Tensor],
    config: BackboneConfig,
    grid: tuple[int, int],
    known: tuple[int, int] | None,
) -> list[str]:
    """Positions of the grid alone, and of this one, in place; what was changed or assumed, in words."""
    stored, num_prefix, changed = _find_grid(names, grid, known)
    prefix, positions = state["pos_embed"][:, :num_prefix], state["pos_embed"][:, num_prefix:]
    num_class = min(num_prefix, 1) if "cls_token" in names else 0
    for name, part in (("cls_token", prefix[:, :num_class]), ("reg_token", prefix[:, num_class:])):
        if part.shape[1] and name in state:
            state[name] = state[name] + part
    if stored != grid:
        changed.append("position grid {}x{} resized to {}x{}".format(*stored, *grid))
    state["pos_embed"] = resize_positions(positions, stored, grid, config.position_resize)
    return changed


def _find_grid(
    names: Mapping[str, Tensor], grid: tuple[int, int], known: tuple[int, int] | None
) -> tuple[tuple[int, int], int, list[str]]:
    """Grid of a stored position table, how many prefix positions precede it, and what was assumed, in words.

    Args:
        names: weights with timm's names.
        grid: the model's, which a table of as many positions may have where it is not square.
        known: the stored grid, where it is known.

    Raises:
        ValueError: no grid fits, or several do.
    """
    num_positions = names["pos_embed"].shape[1]
    num_registers = names["reg_token"].shape[1] if "reg_token" in names else 0
    # Without class token one position may be left of it, as in published SegViT models.
    num_class = 1 if "cls_token" in names or not num_registers else 0
    counts = {n: num_positions - n for n in sorted({0, num_class, num_class + num_registers})}
    squares = {n: math.isqrt(max(0, count)) for n, count in counts.items()}
    fits = {(side, side): n for n, side in squares.items() if side and side * side == counts[n]}
    if known:
        before = num_positions - math.prod(known)
        fits = {known: before} if before in counts else {}
    elif num_positions == math.prod(grid):  # our own layout
        fits = {grid: 0} | {square: n for square, n in fits.items() if n}
    elif not fits and num_positions - math.prod(grid) in counts:
        fits = {grid: num_positions - math.prod(grid)}
    if len(fits) == 1 or (grid in fits and grid[0] == grid[1]):
        stored = grid if grid in fits else next(iter(fits))
        assumed = stored[0] != stored[1] and not known
        words = ["positions taken as the model's grid, {}x{}".format(*stored)] if assumed else []
        return stored, fits[stored], words
    tokens = "class and register" if num_registers else "class"
    if fits:
        readings = " or ".join("{}x{} after {}".format(*size, prefix) for size, prefix in fits.items())
        raise ValueError(f"pos_embed has {num_positions} positions: {readings}; which of them is not told")
    expected = "a {}x{} grid".format(*known) if known else "a square grid"
    raise ValueError(
        f"pos_embed has {num_positions} positions: neither {expected} nor one after those of {tokens} tokens"
    )
