"""Plain Vision Transformer with timm's parameter names: AugReg, DeiT-III and DINOv2 weights load by name.

One convention makes all of them one model: the position embedding holds the patch grid alone. Where a
checkpoint also stores positions for its class and register tokens, they are constants that are added to
those tokens, so `adapt_backbone_state` adds them once, at load.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from segvit.config import BackboneConfig
from segvit.model.foreign import assumptions, timm_names, why_not_plain
from segvit_kernels import (
    Folded,
    PackedLinear,
    PackedWeight,
    QueryDownsample,
    is_plain,
    linear,
    pack_weight,
    query_attention,
    resize_positions,
    why_not,
    why_not_packed,
)

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


Around = tuple[dict[str, Any], dict[str, Any]]


class Attention(nn.Module):
    """Multi-head self-attention with packed projections: (B, N, C) -> (B, N, C).

    `around` is what stands around it in a fused block: arguments of the first and of the last layer.
    """

    plain = True  # for is_plain

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.native = False  # after fuse(), where query_attention is faster than torch's own
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, around: Around = ({}, {})) -> Tensor:
        query, key, value = self.qkv(x, **around[0]).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if self.native and x.device.type == "cpu":
            return self.proj(query_attention(query, key, value).flatten(2), **around[1])
        x = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
        return self.proj(x.transpose(1, 2).flatten(2), **around[1])


class Mlp(nn.Module):
    """Feed-forward part: (B, N, C) -> (B, N, C). SwiGLU packs gate and value, in this order, into fc1.

    `around` as in `Attention`.
    """

    plain = True  # for is_plain

    def __init__(self, width: int, ratio: float, kind: str) -> None:
        super().__init__()
        self.kind, self.gated = kind, kind == "swiglu"
        hidden = int(width * ratio)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden // 2 if self.gated else hidden, width)

    def forward(self, x: Tensor, around: Around = ({}, {})) -> Tensor:
        first, last = around
        if self.gated:
            gate, value = self.fc1(x, **first).chunk(2, dim=-1)
            return self.fc2(F.silu(gate) * value, **last)
        if self.kind == "gelu" and isinstance(self.fc1, PackedLinear) and is_plain(self.fc1):
            return self.fc2(self.fc1(x, gelu=True, **first), **last)
        return self.fc2(_ACTIVATIONS[self.kind](self.fc1(x, **first)), **last)


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    plain = True  # for is_plain

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: drop the whole branch of an image with probability `rate` while training."""

    plain = True  # for is_plain

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * (x.new_empty((x.shape[0], 1, 1)).bernoulli_(keep) / keep)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: BackboneConfig, drop_path: float) -> None:
        super().__init__()
        width, scale = config.width, config.layer_scale
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = Attention(width, config.heads, config.qkv_bias)
        self.ls1 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.drop_path1 = DropPath(drop_path if config.drop_path_branch == "both" else 0.0)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width, config.mlp_ratio, config.mlp)
        self.ls2 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.drop_path2 = DropPath(drop_path)
        self.folded: Folded | None = (
            None  # after fuse(), where norms and residuals are the linear layers' own
        )

    def fuse(self) -> None:
        """Leave norms, scales and residuals to the packed linear layers."""
        self.folded = Folded.make(self._parts(), lambda: True)

    def _parts(self) -> list[nn.Module]:
        layers = [self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2]
        return [*self.children(), *layers]

    def forward(self, x: Tensor) -> Tensor:
        if self.folded and isinstance(self.mlp.fc2, PackedLinear) and self.folded.get(self._parts()):
            x = self.attn(x, ({"norm": self.norm1}, _last(self.ls1, x)))
            return self.mlp(x, ({"norm": self.norm2}, _last(self.ls2, x)))
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def _last(scale: nn.Module, residual: Tensor) -> dict[str, Any]:
    """Arguments of the last layer of a branch."""
    return {"scale": getattr(scale, "gamma", None), "residual": residual}


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: (B, channels, H, W) -> (B, H/p · W/p, C), row by row."""

    def __init__(self, patch_size: int, width: int, channels: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)
        self.packed: Folded | None = None  # after fuse()

    def forward(self, images: Tensor) -> Tensor:
        packed = self.packed and self.packed.get([self.proj])
        if packed is None:
            # In one piece: otherwise the tokens of every block would lie as the channels of an image do.
            return self.proj(images).flatten(2).transpose(1, 2).contiguous()
        patch = self.proj.kernel_size[0]
        patches = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5)
        patches = patches.flatten(3).flatten(1, 2)  # [B, h·w, 3·p·p]
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias, packed=packed)

    def fuse(self) -> None:
        """Pack the weights, where that gains anything."""
        self.packed = Folded.make([self.proj], self._packed)

    def _packed(self) -> PackedWeight | None:
        weight = self.proj.weight.flatten(1)
        return pack_weight(weight) if why_not_packed(weight) is None else None


class VisionTransformer(nn.Module):
    """Plain ViT that returns the feature maps after chosen blocks.

    Args:
        config: the variant.
        image_size: height and width, multiples of the patch size, whose grid the position embedding is stored
            for; other grids are reached by bicubic resizing.
        taps: indices of the blocks to return, shallow to deep.
    """

    def __init__(self, config: BackboneConfig, image_size: tuple[int, int], taps: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        self.taps = tuple(taps)
        self.grid = (image_size[0] // config.patch_size, image_size[1] // config.patch_size)
        self.gradient_checkpointing = False
        self.keep_positions = False  # after fuse(), which promises that weights stay as they are
        self._positions: tuple[tuple[int, int], Folded] | None = None

        self.patch_embed = PatchEmbed(config.patch_size, config.width, config.in_channels)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], config.width))
        if config.class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        if config.register_tokens:
            self.reg_token = nn.Parameter(torch.empty(1, config.register_tokens, config.width))
        if config.pre_norm:
            self.norm_pre = nn.LayerNorm(config.width, eps=config.norm_eps)
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        if config.shrink_at is not None:
            self.blocks[config.shrink_at] = QueryDownsample(self.blocks[config.shrink_at])
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name in ("pos_embed", "cls_token", "reg_token"):
            if hasattr(self, name):
                nn.init.trunc_normal_(getattr(self, name), std=0.02)

    def fuse(self) -> None:
        """For inference with weights that stay: keep the position embedding, use what the CPU has."""
        self.unfuse()
        self.keep_positions = True
        self.patch_embed.fuse()
        for module in self.modules():
            if isinstance(module, Attention):
                module.native = why_not("cpu", self.pos_embed.device) is None
            if isinstance(module, Block):
                module.fuse()

    def unfuse(self) -> None:
        """Undo `fuse`."""
        self.keep_positions, self._positions = False, None
        self.patch_embed.packed = None
        for module in self.modules():
            if isinstance(module, Attention):
                module.native = False
            if isinstance(module, Block):
                module.folded = None

    def fold_grid(self, grid: tuple[int, int]) -> None:
        """Store the position embedding for another grid, where a parametrization would not make it again."""
        if "pos_embed" in self._parameters:
            positions = resize_positions(self.pos_embed, self.grid, grid)
            self.pos_embed, self.grid = nn.Parameter(positions, requires_grad=False), grid

    def _position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """(1, h·w, C) for `grid`; after fuse() the last one made is kept."""
        if not self.keep_positions or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return resize_positions(self.pos_embed, self.grid, grid)
        kept, embedding = None, self.pos_embed
        if self._positions is not None and self._positions[0] == grid:
            kept = self._positions[1].get([embedding])
        if kept is None:
            kept = resize_positions(embedding, self.grid, grid)
            self._positions = (grid, Folded([embedding], kept))
        return kept

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B, h·w, C) after each tapped block, shallow to deep, without prefix tokens.

        Their grid is (H/p, W/p), or half of that rounded up from the block that shrinks on
        (`BackboneConfig.grid_after`).

        Args:
            images: (B, in_channels, H, W), H and W multiples of the patch size p.
        """
        grid = patch_grid(images, self.config.patch_size)
        x = self.patch_embed(images) + self._position_embedding(grid)
        prefix = [getattr(self, name) for name in ("cls_token", "reg_token") if hasattr(self, name)]
        if prefix:
            x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)
        num_prefix = sum(token.shape[1] for token in prefix)
        if self.config.pre_norm:
            x = self.norm_pre(x)

        features = []
        for index, block in enumerate(self.blocks):
            if index == self.config.shrink_at:
                block = partial(block, grid=grid, prefix_tokens=num_prefix)
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if index in self.taps:
                features.append(self.norm(x[:, num_prefix:]))
        return features


def patch_grid(images: Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of images (B, 3, H, W)."""
    height, width = images.shape[-2:]
    if torch.jit.is_tracing():  # fvcore counts by tracing, where sizes are tensors
        height, width = int(height), int(width)
    return height // patch_size, width // patch_size


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
    r"(head|fc_norm|mask_token|pre_logits|dist_token|attn_pool|pooler|decoder|classifier|proj$|logit_scale)"
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
            been looked at, "grid" of the stored positions, "mlp".

    Raises:
        ValueError: another architecture, quantised or not finite weights, or positions without a grid; one
            line with the reason.
    """
    known = known or {}
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

    stored, num_prefix, assumed = _find_grid(renamed, grid, known.get("grid"))
    changed += assumed
    prefix, positions = state["pos_embed"][:, :num_prefix], state["pos_embed"][:, num_prefix:]
    num_class = min(num_prefix, 1) if "cls_token" in renamed else 0
    for name, part in (("cls_token", prefix[:, :num_class]), ("reg_token", prefix[:, num_class:])):
        if part.shape[1] and name in state:
            state[name] = state[name] + part
    if stored != grid:
        changed.append("position grid {}x{} resized to {}x{}".format(*stored, *grid))
    state["pos_embed"] = resize_positions(positions, stored, grid)
    kernel = state["patch_embed.proj.weight"]
    if kernel.shape[-1] != config.patch_size:
        changed.append(f"patch kernel {kernel.shape[-1]} resampled to {config.patch_size}")
        state["patch_embed.proj.weight"] = resample_patch_kernel(kernel, config.patch_size)
    _spread_channels(state, config.in_channels, changed)
    return BackboneState(state, ignored, changed)


def infer_backbone_config(state_dict: Mapping[str, Any], **overrides: object) -> BackboneConfig:
    """The `BackboneConfig` of a plain ViT's weights, read from names and shapes.

    Heads, activation and the norms' epsilon leave no trace in the weights: width / 64 heads, GELU and 1e-6,
    as in every standard ViT, unless given.

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
        fc1, fc2 = keys["blocks.0.mlp.fc1.weight"], keys["blocks.0.mlp.fc2.weight"]
    except (KeyError, ValueError):
        raise ValueError(
            why_not_plain(state_dict) or "not a plain ViT's weights: blocks.0.mlp.fc1 and fc2 are missing"
        ) from None
    values = {
        "width": width,
        "depth": depth,
        "heads": max(1, width // 64),
        "patch_size": patch_size,
        "in_channels": channels,
        "mlp": "gelu" if fc1[0] == fc2[1] else "swiglu",
        "mlp_ratio": fc1[0] / width,
        "class_token": "cls_token" in keys,
        "register_tokens": keys["reg_token"][1] if "reg_token" in keys else 0,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in keys else None,
        "qkv_bias": "blocks.0.attn.qkv.bias" in keys,
        "pre_norm": "norm_pre.weight" in keys,
    }
    return BackboneConfig(**{**values, **overrides})


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
