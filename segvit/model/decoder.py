"""ATM decoder: class tokens cross-attend to feature maps, and the attention's similarity maps are the masks.

Source: SegViT (NeurIPS 2022, arXiv 2210.05844), section 3.2 and figure 3. SegViTv2's (arXiv 2306.06289)
leaves out the self-attention of class tokens, and asks each of them only whether its class is there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segvit.config import SegViTConfig
from segvit_kernels import (
    Folded,
    FusedATM,
    PackedWeight,
    exportable,
    linear,
    pack_weight,
    same_grid,
    why_not_packed,
)


@exportable
class StageOutput(NamedTuple):
    """Class logits (B, N, N+1) or (B, N), mask logits (B, N, h·w) of a grid (h, w), tokens (B, N, C) after a
    stage."""

    class_logits: Tensor
    mask_logits: Tensor
    tokens: Tensor
    grid: tuple[int, int]


class SelfAttention(nn.Module):
    """Self-attention of class tokens (B, N, C), with the parameter names of `nn.MultiheadAttention`."""

    plain = True  # for is_plain

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.packed: Folded | None = None  # of in_proj_weight
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed.get([self.in_proj_weight]) if self.packed else None
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias, packed=packed)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class ClassScore(nn.Linear):
    """One logit for each token: (B, N, C) -> (B, N)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).squeeze(-1)


class DecoderLayer(nn.Module):
    """Post-norm layer: self-attention, attention to mask, ReLU feed-forward of four times the width.

    Without `self_attention` the first part is left out.
    """

    def __init__(self, dim: int, heads: int, dropout: float, self_attention: bool = True) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, heads, dropout) if self_attention else None
        self.atm = FusedATM(dim, heads, attn_drop=dropout)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.norm1 = nn.LayerNorm(dim) if self_attention else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def attend_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens (B or 1, N, C) after self-attention."""
        if self.self_attn is None:
            return tokens
        return self.norm1(tokens + self.dropout(self.self_attn(tokens)))

    def attend_features(
        self,
        tokens: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        previous_masks: Tensor | None,
        need_masks: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens after attention to mask and feed-forward, and the masks if wanted.

        Args:
            tokens: (B or 1, N, C) after self-attention. query: their projection.
            key, value: projected features, (B, h·w, C).
            previous_masks: (B, N, h·w), added to the similarity map.
        """
        attended = self.atm.attend(query, key, value, previous_masks, need_masks)
        tokens = self.norm2(tokens + self.dropout(attended.output))
        hidden = self.dropout(F.relu(self.linear1(tokens)))
        return self.norm3(tokens + self.dropout(self.linear2(hidden))), attended.mask_logits


class Stage(nn.Module):
    """The decoder layers that look at one feature map, which is projected from `width` channels if given."""

    def __init__(
        self,
        width: int | None,
        dim: int,
        heads: int,
        depth: int,
        dropout: float,
        self_attention: bool = True,
    ) -> None:
        super().__init__()
        self.input_proj = nn.Identity() if width is None else nn.Linear(width, dim)
        self.input_norm = nn.Identity() if width is None else nn.LayerNorm(dim)
        layers = nn.ModuleList(DecoderLayer(dim, heads, dropout, self_attention) for _ in range(depth))
        self.layers = cast(Sequence[DecoderLayer], layers)
        self.folded_rows: Folded | None = None  # weight, bias and packed weight of all k and v, after fuse()

    def projections(self) -> list[nn.Linear]:
        """k and v of every layer in turn."""
        return [projection for layer in self.layers for projection in (layer.atm.k, layer.atm.v)]

    def stacked_rows(self) -> tuple[Tensor, Tensor, PackedWeight | None]:
        """Weight and bias of all projections, and the weight packed."""
        projections = self.projections()
        weight = torch.cat(tuple(p.weight for p in projections))
        biases = [weight.new_zeros(p.out_features) if p.bias is None else p.bias for p in projections]
        return weight, torch.cat(tuple(biases)), _packed(weight)

    def keys_and_values(self, features: Tensor) -> list[Tensor]:
        """k and v of every layer in turn, each (B, h·w, C), from the feature map."""
        features = self.input_norm(self.input_proj(features))
        projections = self.projections()
        folded = self.folded_rows.get(projections) if self.folded_rows else None
        if folded:
            weight, bias, packed = folded
            return list(linear(features, weight, bias, packed=packed).chunk(len(projections), dim=-1))
        return [projection(features) for projection in projections]

    def forward(
        self,
        tokens: Tensor,
        features: Tensor,
        previous_masks: Tensor | None = None,
        *,
        every_layer: bool = False,
        first: tuple[Tensor, Tensor] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Tokens (B, N, C) and masks (B, N, h·w) after the last layer, or after every layer.

        Args:
            tokens: (B or 1, N, C). features: (B, h·w, width).
            previous_masks: (B, N, h·w), added to the last layer's similarity map.
            first: tokens after the first layer's self-attention and their query, if known.
        """
        projected = iter(self.keys_and_values(features))
        outputs: list[tuple[Tensor, Tensor]] = []
        for depth, layer in enumerate(self.layers):
            if depth > 0 or first is None:
                tokens = layer.attend_tokens(tokens)
                query = layer.atm.q(tokens)
            else:
                tokens, query = first
            last = depth == len(self.layers) - 1
            tokens, masks = layer.attend_features(
                tokens,
                query,
                next(projected),
                next(projected),
                previous_masks if last else None,
                need_masks=last or every_layer,
            )
            if last or every_layer:
                assert masks is not None
                outputs.append((tokens, masks))
        return outputs


class Decoder(nn.Module):
    """What follows a backbone. This one has no constants to fold, and nothing with a grid of its own."""

    config: SegViTConfig

    def mask_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the prediction's masks, for images of `grid` patches."""
        return self.config.backbone.grid_after(self.config.taps[0], grid)

    def fold_grid(self, grid: tuple[int, int]) -> None:
        """Store for another grid what would be resized to it in each call."""

    def fuse(self) -> None:
        """Keep as constants what depends on parameters alone."""

    def unfuse(self) -> None:
        """Forget the constants of `fuse`."""


class ATMDecoder(Decoder):
    """Class tokens through one stage for each tap, the deepest tap first.

    Args:
        config: `decoder`, `num_classes`, `taps`, `decoder_*` and the backbone's sizes are used.
        stage_widths: channels of the feature map that each stage projects, or None where it has the decoder's
            width and is taken as it is; by default there is a stage for each tap.
    """

    def __init__(self, config: SegViTConfig, stage_widths: Sequence[int | None] | None = None) -> None:
        super().__init__()
        self.config = config
        self.shrinks = True  # the backbone, where its configuration says so
        dim, heads = config.decoder_dim, config.decoder_heads
        assert dim is not None and heads is not None  # the config has filled them in
        second = config.decoder == "segvitv2"
        if stage_widths is None:
            stage_widths = [config.backbone.width] * len(config.taps)
        self.folded_first: Folded | None = None  # tokens and query, after fuse()
        self.class_tokens = nn.Parameter(torch.empty(config.num_classes, dim))
        stages = nn.ModuleList(
            Stage(width, dim, heads, config.decoder_depth, config.decoder_dropout, not second)
            for width in stage_widths
        )
        self.stages = cast(Sequence[Stage], stages)
        self.class_head: nn.Module = ClassScore(dim) if second else nn.Linear(dim, config.num_classes + 1)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.class_tokens)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, features: list[Tensor], grid: tuple[int, int], accumulate: bool = True
    ) -> list[StageOutput]:
        """Outputs after each stage, in running order: the last is the prediction.

        Args:
            features: tapped feature maps (B, h·w, width), shallow to deep.
            grid: patches of the images in height and width.
            accumulate: add each stage's similarity map to the earlier ones, upsampled where the grid grows,
                inside the kernel, as masks need. Otherwise the similarity maps themselves come out.
        """
        tokens, first = self._first_tokens(features[0].shape[0])
        masks: Tensor | None = None
        outputs: list[StageOutput] = []
        for stage, tap, feature in zip(
            self.stages, reversed(self.config.taps), reversed(features), strict=True
        ):
            stage_grid = self.config.backbone.grid_after(tap, grid) if self.shrinks else grid
            if accumulate and masks is not None:
                masks = _resize_masks(masks, outputs[-1].grid, stage_grid)
            ((tokens, masks),) = stage(tokens, feature, masks if accumulate else None, first=first)
            outputs.append(StageOutput(self.class_head(tokens), masks, tokens, stage_grid))
            first = None
        return outputs

    def _first_tokens(self, batch: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Class tokens, and what becomes of them in the first layer before it sees features, if known."""
        tokens = self.class_tokens.unsqueeze(0)
        if self.training:
            # Every image draws its own dropout; without dropout all images share the first tokens.
            return tokens.expand(batch, -1, -1), None
        return tokens, self.folded_first.get(self._first_parts()) if self.folded_first else None

    def _first_parts(self) -> list[nn.Module | Tensor]:
        """What class tokens meet before they meet features."""
        layer = self.stages[0].layers[0]
        attention = layer.self_attn
        if attention is None:
            return [self.class_tokens, layer.atm.q]
        return [self.class_tokens, attention, attention.out_proj, layer.dropout, layer.norm1, layer.atm.q]

    @torch.no_grad()
    def fuse(self) -> None:
        """Keep as constants what depends on parameters alone: first tokens and query, stacked k and v."""
        self.unfuse()
        first = self.stages[0].layers[0]

        def attend() -> tuple[Tensor, Tensor]:
            tokens = first.attend_tokens(self.class_tokens.unsqueeze(0))
            return tokens, first.atm.q(tokens)

        self.folded_first = Folded.make(self._first_parts(), attend)
        for stage in self.stages:
            stage.folded_rows = Folded.make(stage.projections(), stage.stacked_rows)
            for attention in filter(None, (layer.self_attn for layer in stage.layers)):
                weight = attention.in_proj_weight
                attention.packed = Folded.make([weight], functools.partial(_packed, weight))

    def unfuse(self) -> None:
        """Forget the constants of `fuse`."""
        self.folded_first = None
        for stage in self.stages:
            stage.folded_rows = None
            for attention in filter(None, (layer.self_attn for layer in stage.layers)):
                attention.packed = None


def _packed(weight: Tensor) -> PackedWeight | None:
    """The weight packed, where that gains anything."""
    return pack_weight(weight) if why_not_packed(weight) is None else None


def _resize_masks(masks: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Mask logits (B, N, h·w) of `grid` interpolated bilinearly to (B, N, h'·w')."""
    if same_grid(grid, new_grid):
        return masks
    image = F.interpolate(masks.unflatten(-1, grid), size=new_grid, mode="bilinear", align_corners=False)
    return image.flatten(-2)
