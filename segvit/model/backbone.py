"""Plain Vision Transformer with timm's parameter names, in all the variants of `BackboneConfig`.

Two conventions make all of them one model, and `segvit.model.backbone_weights` brings weights to them, once,
at load. The position embedding holds the patch grid alone: positions of class and register tokens are
constants that are added to those tokens. Rotary positions turn channels i and i + D/2 of a head: where a
checkpoint turns neighbours, the rows of its query and key projections are put in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from segvit.config import BackboneConfig
from segvit.model.rotary import Angles, Rotary, block_angles
from segvit_kernels import (
    Folded,
    PackedLinear,
    PackedWeight,
    QueryDownsample,
    apply_rotary,
    is_plain,
    linear,
    pack_weight,
    query_attention,
    resize_positions,
    why_not,
    why_not_packed,
)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


Around = tuple[dict[str, Any], dict[str, Any]]


class Joining(NamedTuple):
    """Tokens that join the others before a block and run in front of them from there on (EoMT's queries).

    Attributes:
        tokens: (Q, C).
        block: the first that they run through.
        attend: which tokens each may see in a block, (B, 1, T, T) or None for all, from the T tokens before
            it, (B, T, C), and its number.
    """

    tokens: Tensor
    block: int
    attend: Callable[[Tensor, int], Tensor | None]


Keep = Callable[[Tensor, tuple[int, int]], Tensor]
"""From patch tokens (B, h·w, C) and their grid, before the block that shrinks, the places (B, n) that it
keeps, int64."""


class Attention(nn.Module):
    """Multi-head self-attention with packed projections: (B, N, C) -> (B, N, C).

    `around` is what stands around it in a fused block: arguments of the first and of the last layer. `angles`
    are those of rotary positions. `mask` (B, 1, N, N) says which tokens each may see, all by default.
    """

    plain = True  # for is_plain

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.native = False  # after fuse(), where query_attention is faster than torch's own
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps) if config.attention_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        angles: Angles | None = None,
        around: Around = ({}, {}),
        mask: Tensor | None = None,
    ) -> Tensor:
        packed = self.qkv(x, **around[0]).unflatten(-1, (3, self.heads, -1))
        if angles is None:
            query, key, value = packed.unbind(-3)
        else:
            value = packed[:, :, 2]
            query, key = apply_rotary(packed[:, :, :2], *(t.unsqueeze(-3) for t in angles)).unbind(-3)
        if self.native and mask is None and x.device.type == "cpu":
            return self.proj(self.norm(query_attention(query, key, value).flatten(2)), **around[1])
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(self.norm(x.transpose(1, 2).flatten(2)), **around[1])


class Mlp(nn.Module):
    """Feed-forward part: (B, N, C) -> (B, N, C). SwiGLU packs gate and value, in this order, into fc1.

    `around` as in `Attention`.
    """

    plain = True  # for is_plain

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.kind, self.gated = config.mlp, config.mlp == "swiglu"
        hidden = int(config.width * config.mlp_ratio)
        inner = hidden // 2 if self.gated else hidden
        self.fc1 = nn.Linear(config.width, hidden)
        self.norm = nn.LayerNorm(inner, eps=config.norm_eps) if config.mlp_norm else nn.Identity()
        self.fc2 = nn.Linear(inner, config.width)

    def forward(self, x: Tensor, around: Around = ({}, {})) -> Tensor:
        first, last = around
        if self.gated:
            gate, value = self.fc1(x, **first).chunk(2, dim=-1)
            return self.fc2(self.norm(F.silu(gate) * value), **last)
        if self.kind == "gelu" and isinstance(self.fc1, PackedLinear) and is_plain(self.fc1):
            return self.fc2(self.norm(self.fc1(x, gelu=True, **first)), **last)
        return self.fc2(self.norm(_ACTIVATIONS[self.kind](self.fc1(x, **first))), **last)


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
        self.attn = Attention(config)
        self.ls1 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.drop_path1 = DropPath(drop_path if config.drop_path_branch == "both" else 0.0)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(config)
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

    def forward(self, x: Tensor, angles: Angles | None = None, mask: Tensor | None = None) -> Tensor:
        # Other attentions in its place may take neither.
        more: dict[str, Any] = {} if mask is None else {"mask": mask}
        if self.folded and isinstance(self.mlp.fc2, PackedLinear) and self.folded.get(self._parts()):
            x = self.attn(x, angles, ({"norm": self.norm1}, _last(self.ls1, x)), **more)
            return self.mlp(x, ({"norm": self.norm2}, _last(self.ls2, x)))
        rotary = () if angles is None else (angles,)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), *rotary, **more)))
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
        packed = self.packed.get([self.proj]) if self.packed else None
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
            for; it is resized to other grids.
        taps: indices of the blocks to return, shallow to deep.
    """

    def __init__(self, config: BackboneConfig, image_size: tuple[int, int], taps: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        self.taps = tuple(taps)
        self.grid = (image_size[0] // config.patch_size, image_size[1] // config.patch_size)
        self.gradient_checkpointing = False
        self.keep_positions = False  # after fuse(), which promises that weights stay as they are
        self._kept: dict[str, tuple[tuple[tuple[int, int], torch.dtype], Folded]] = {}

        self.patch_embed = PatchEmbed(config.patch_size, config.width, config.in_channels)
        if config.absolute_positions:
            self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], config.width))
        self.rope = Rotary(config) if config.rotary else None
        self.num_prefix = int(config.class_token) + config.register_tokens
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
                module.native = why_not("cpu", self.patch_embed.proj.weight.device) is None
            if isinstance(module, Block):
                module.fuse()

    def unfuse(self) -> None:
        """Undo `fuse`."""
        self.keep_positions, self._kept = False, {}
        self.patch_embed.packed = None
        for module in self.modules():
            if isinstance(module, Attention):
                module.native = False
            if isinstance(module, Block):
                module.folded = None

    def fold_grid(self, grid: tuple[int, int]) -> None:
        """Store positions for another grid, where a parametrization would not make them again."""
        if "pos_embed" in self._parameters:
            positions = self._resized_positions(grid)
            self.pos_embed, self.grid = nn.Parameter(positions, requires_grad=False), grid
        if self.rope is not None:
            self.rope.fold_grid(grid, self.num_prefix)

    def _resized_positions(self, grid: tuple[int, int]) -> Tensor:
        return resize_positions(self.pos_embed, self.grid, grid, self.config.position_resize)

    def _keep(
        self, name: str, grid: tuple[int, int], dtype: torch.dtype, source: Tensor, make: Callable[[], Tensor]
    ) -> Tensor:
        """What a function makes of `source` for a grid and dtype; after fuse() the last one made is kept."""
        if not self.keep_positions or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
            return make()  # of tensors that may stand for others
        made, kept = None, self._kept.get(name)
        if kept is not None and kept[0] == (grid, dtype):
            made = kept[1].get([source])
        if made is None:
            made = make()
            self._kept[name] = ((grid, dtype), Folded([source], made))
        return made

    def _angles(
        self, grid: tuple[int, int], dtype: torch.dtype, shrink_at: int | None
    ) -> list[Angles | None]:
        """Of rotary positions, for every block, when this one leaves every second row and column."""
        config, rope, prefix = self.config, self.rope, self.num_prefix
        if rope is None:
            return [None] * config.depth
        table = self._keep("angles", grid, dtype, rope.freqs, lambda: rope(grid, prefix).to(dtype))
        return [*block_angles(table, config.depth, shrink_at, grid, prefix)]

    @property
    def shrinks(self) -> bool:
        """Whether a block shrinks, and is not told to keep all tokens, as an ordinary one."""
        at = self.config.shrink_at
        return at is not None and cast(QueryDownsample, self.blocks[at]).stride > 1

    def shrink(self, enabled: bool) -> None:
        """Tell the block that shrinks whether to."""
        assert self.config.shrink_at is not None
        cast(QueryDownsample, self.blocks[self.config.shrink_at]).stride = 2 if enabled else 1

    def _kept_tokens(self, places: Tensor) -> Tensor:
        """Which of all tokens are left where these patches are, (B, prefix + n)."""
        prefix = torch.arange(self.num_prefix, device=places.device).expand(places.shape[0], -1)
        return torch.cat([prefix, places + self.num_prefix], dim=1)

    def forward(
        self, images: Tensor, joining: Joining | None = None, keep: Keep | None = None
    ) -> list[Tensor]:
        """Feature maps (B, h·w, C) after each tapped block, shallow to deep, without prefix tokens.

        Their grid is (H/p, W/p), or half of that rounded up from the block that shrinks on
        (`BackboneConfig.grid_after`).

        Args:
            images: (B, in_channels, H, W), H and W multiples of the patch size p.
            joining: tokens that join on the way, behind the block that shrinks. Where they are there, a
                feature map has all tokens: (B, Q + prefix + h·w, C).
            keep: what the block that shrinks keeps, in place of every second row and column: feature maps
                from there on are (B, n, C), on no grid.
        """
        grid = patch_grid(images, self.config.patch_size)
        x = self.patch_embed(images)
        if self.config.absolute_positions:
            source = self.pos_embed
            x = x + self._keep("positions", grid, source.dtype, source, lambda: self._resized_positions(grid))
        prefix = [getattr(self, name) for name in ("cls_token", "reg_token") if hasattr(self, name)]
        if prefix:
            x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)
        if self.config.pre_norm:
            x = self.norm_pre(x)

        features = []
        kept: Tensor | None = None  # which tokens of all are left, where `keep` said so
        every_angle = self._angles(
            grid, x.dtype, self.config.shrink_at if self.shrinks and not keep else None
        )
        for index, (block, angles) in enumerate(zip(self.blocks, every_angle, strict=True)):
            if kept is not None and angles is not None:
                angles = _taken(angles, kept)
            run: Callable[..., Tensor] = block
            options: dict[str, Any] = {} if angles is None else {"angles": angles}
            if index == self.config.shrink_at and keep is not None:
                kept = self._kept_tokens(keep(x[:, self.num_prefix :], grid))
                run = partial(_shrink, block, kept=kept)
            elif index == self.config.shrink_at:
                options |= {"grid": grid, "prefix_tokens": self.num_prefix}
            joined = joining is not None and index >= joining.block
            if joining is not None and joined:
                if index == joining.block:
                    x = torch.cat([joining.tokens.expand(x.shape[0], -1, -1), x], dim=1)
                if angles is not None:
                    options["angles"] = _unturned(angles, len(joining.tokens))
                if (mask := joining.attend(x, index)) is not None:
                    options["mask"] = mask
            if self.gradient_checkpointing and self.training:
                x = checkpoint(run, x, use_reentrant=False, **options)
            else:
                x = run(x, **options)
            if index in self.taps:
                features.append(self.norm(x if joined else x[:, self.num_prefix :]))
        return features


def _taken(angles: Angles, kept: Tensor) -> Angles:
    """Of the tokens (B, n), (B, n, 1 or heads, D/2) each."""
    cos, sin = angles
    return cos[kept], sin[kept]


def _tokens_of(x: Tensor, kept: Tensor) -> Tensor:
    """The tokens (B, n) of (B, N, ...)."""
    index = kept.reshape(*kept.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def _shrink(block: Any, x: Tensor, kept: Tensor, angles: Angles | None = None) -> Tensor:
    """What a `QueryDownsample` gives at the tokens `kept` (B, n), whatever they are: (B, n, C)."""
    attn = block.attn
    query, key, value = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.heads, -1)).unbind(-3)
    query = _tokens_of(query, kept)
    if angles is not None:
        query, key = apply_rotary(query, *_taken(angles, kept)), apply_rotary(key, *angles)
    output = attn.proj(attn.norm(query_attention(query, key, value).flatten(-2)))
    x = _tokens_of(x, kept) + block.drop_path1(block.ls1(output))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _unturned(angles: Angles, count: int) -> Angles:
    """Angles with those of tokens before the others, which are not turned."""
    cos, sin = angles
    around = (0, 0, 0, 0, count, 0)
    return F.pad(cos, around, value=1.0), F.pad(sin, around)


def patch_grid(images: Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches of images (B, 3, H, W)."""
    height, width = images.shape[-2:]
    if torch.jit.is_tracing():  # fvcore counts by tracing, where sizes are tensors
        height, width = int(height), int(width)
    return height // patch_size, width // patch_size
