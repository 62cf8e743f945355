"""ATM decoder: class tokens cross-attend to feature maps, and the attention's similarity maps are the masks.

Source: SegViT (NeurIPS 2022, arXiv 2210.05844), section 3.2 and figure 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segvit.config import SegViTConfig
from segvit_kernels import FusedATM


class StageOutput(NamedTuple):
    """Class logits (B, N, N+1), mask logits (B, N, h·w) and tokens (B, N, C) after one decoder stage."""

    class_logits: Tensor
    mask_logits: Tensor
    tokens: Tensor


class SelfAttention(nn.Module):
    """Self-attention of class tokens (B, N, C), with the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Post-norm layer: self-attention, attention to mask, ReLU feed-forward of four times the width."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim, heads, dropout)
        self.atm = FusedATM(dim, heads, attn_drop=dropout)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def attend_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens (B or 1, N, C) after self-attention."""
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
        update, masks = self.atm.attend(query, key, value, previous_masks, need_masks)
        tokens = self.norm2(tokens + self.dropout(update))
        hidden = self.dropout(F.relu(self.linear1(tokens)))
        return self.norm3(tokens + self.dropout(self.linear2(hidden))), masks


class Stage(nn.Module):
    """The decoder layers that look at one tapped feature map."""

    def __init__(self, width: int, dim: int, heads: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.input_proj = nn.Linear(width, dim)
        self.input_norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, dropout) for _ in range(depth))

    def keys_and_values(self, features: Tensor) -> list[Tensor]:
        """k and v of every layer in turn, each (B, h·w, C), from the tapped feature map."""
        features = self.input_norm(self.input_proj(features))
        if hasattr(self, "fused_kv_weight"):
            stacked = F.linear(features, self.fused_kv_weight, self.fused_kv_bias)
            return list(stacked.chunk(2 * len(self.layers), dim=-1))
        return [projection(features) for layer in self.layers for projection in (layer.atm.k, layer.atm.v)]


class ATMDecoder(nn.Module):
    """Class tokens through one stage for each tap, the deepest tap first.

    Args:
        config: `num_classes`, `taps`, `decoder_*` and the backbone's width are used.
    """

    def __init__(self, config: SegViTConfig) -> None:
        super().__init__()
        dim, heads = config.decoder_dim, config.decoder_heads
        self.class_tokens = nn.Parameter(torch.empty(config.num_classes, dim))
        self.stages = nn.ModuleList(
            Stage(config.backbone.width, dim, heads, config.decoder_depth, config.decoder_dropout)
            for _ in config.taps
        )
        self.class_head = nn.Linear(dim, config.num_classes + 1)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.class_tokens)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, features: list[Tensor], accumulate: bool = True) -> list[StageOutput]:
        """Outputs after each stage, in running order: the last is the prediction.

        Args:
            features: tapped feature maps (B, h·w, width), shallow to deep, all of one grid.
            accumulate: add each stage's similarity map to the earlier ones, inside the kernel, as masks need.
                Otherwise the similarity maps themselves come out.
        """
        tokens = self.class_tokens.unsqueeze(0)
        if self.training:
            # Every image draws its own dropout; without dropout all images share the first tokens.
            tokens = tokens.expand(features[0].shape[0], -1, -1)
        masks, outputs = None, []
        for index, (stage, feature) in enumerate(zip(self.stages, reversed(features), strict=True)):
            pairs = stage.keys_and_values(feature)
            for depth, layer in enumerate(stage.layers):
                if index == depth == 0 and hasattr(self, "fused_tokens"):
                    tokens, query = self.fused_tokens, self.fused_query
                else:
                    tokens = layer.attend_tokens(tokens)
                    query = layer.atm.q(tokens)
                last = depth == len(stage.layers) - 1
                previous = masks if last and accumulate else None
                tokens, new_masks = layer.attend_features(
                    tokens, query, pairs[2 * depth], pairs[2 * depth + 1], previous, need_masks=last
                )
            masks = new_masks
            outputs.append(StageOutput(self.class_head(tokens), masks, tokens))
        return outputs

    @torch.no_grad()
    def fuse(self) -> None:
        """Keep as constants what depends on parameters alone: first tokens and query, stacked k and v."""
        self.unfuse()
        first = self.stages[0].layers[0]
        tokens = first.attend_tokens(self.class_tokens.unsqueeze(0))
        self.register_buffer("fused_tokens", tokens, persistent=False)
        self.register_buffer("fused_query", first.atm.q(tokens), persistent=False)
        for stage in self.stages:
            projections = [p for layer in stage.layers for p in (layer.atm.k, layer.atm.v)]
            weight = torch.cat([p.weight for p in projections])
            bias = torch.cat([p.bias for p in projections])
            stage.register_buffer("fused_kv_weight", weight, persistent=False)
            stage.register_buffer("fused_kv_bias", bias, persistent=False)

    def unfuse(self) -> None:
        """Forget the constants of `fuse`."""
        for module in (self, *self.stages):
            for name in ("fused_tokens", "fused_query", "fused_kv_weight", "fused_kv_bias"):
                if hasattr(module, name):
                    delattr(module, name)
