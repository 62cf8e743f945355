"""The Shrunk structure's decoder: query-based up-sampling, then a single ATM stage.

Source: SegViT (NeurIPS 2022, arXiv 2210.05844), section 3.3. Its other half, query-based down-sampling, is in
the backbone (`BackboneConfig.shrink_at`). SegViTv2 (arXiv 2306.06289) makes that aware of edges: tokens where
a lightweight head sees one are kept too (`BackboneConfig.shrink_edges`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segvit.config import SegViTConfig
from segvit.model.decoder import ATMDecoder, StageOutput
from segvit_kernels import QueryUpsample, resize_positions


class ShrunkDecoder(ATMDecoder):
    """Learned queries, one for each patch, attend to the taps; class tokens attend to the result.

    Every layer of the ATM stage is an output with masks of its own, which are not accumulated.

    Args:
        config: as for `ATMDecoder`, and `resize_queries`, `key_positions`, `query_features`,
            `upsample_depth` and `image_size`.
    """

    def __init__(self, config: SegViTConfig) -> None:
        super().__init__(config, stage_widths=[None])
        patch, dim, heads = config.backbone.patch_size, config.decoder_dim, config.decoder_heads
        assert dim is not None and heads is not None  # the config has filled them in
        self.upsample = QueryUpsample(
            dim,
            heads,
            grid=(config.image_size[0] // patch, config.image_size[1] // patch),
            level_dims=[config.backbone.width] * len(config.taps),
            depth=config.upsample_depth or config.decoder_depth,
            dropout=config.decoder_dropout,
            resize=config.resize_queries,
            key_positions=config.key_positions,
            query_features=config.query_features,
        )

        width = config.backbone.width
        self.edge_head = None
        if config.backbone.shrink_edges:
            self.edge_head = nn.Sequential(nn.Linear(width, width // 4), nn.GELU(), nn.Linear(width // 4, 1))

    def edges(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """How likely each patch has an edge, logits (B, h, w), and the places (B, n) that are to be kept.

        These are every second row and column, and of the others the share that the configuration says,
        likeliest first: as many in every image.

        Args:
            patches: tokens (B, h·w, C) of the grid (h, w).
        """
        assert self.edge_head is not None
        logits = self.edge_head(patches).squeeze(-1)
        height, width = grid
        rows, columns = (torch.arange(side, device=patches.device) for side in grid)
        even = ((rows % 2 == 0)[:, None] & (columns % 2 == 0)).flatten()
        regular = (rows[::2, None] * width + columns[::2]).flatten()
        count = height * width * round(1000 * self.config.backbone.shrink_edges) // 1000
        count = min(count, height * width - (height + 1) // 2 * ((width + 1) // 2))
        chosen = logits.detach().masked_fill(even, -torch.inf).topk(count, dim=1).indices.sort(dim=1).values
        places = torch.cat([regular.expand(logits.shape[0], -1), chosen], dim=1)
        return logits.unflatten(1, grid), places

    def mask_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        return self.upsample.output_grid(grid)

    def forward(
        self,
        features: list[Tensor],
        grid: tuple[int, int],
        accumulate: bool = True,
        places: Tensor | None = None,
    ) -> list[StageOutput]:
        """Outputs after each layer; `accumulate` changes nothing. Otherwise as in `ATMDecoder`.

        Args:
            places: (B, n) of the tokens that the backbone kept, of `edges`.
        """
        shrink_at = self.config.backbone.shrink_at or 0
        kept = [places if tap >= shrink_at else None for tap in self.config.taps]
        upsampled = self.upsample(features, grid, kept)
        tokens, first = self._first_tokens(upsampled.shape[0])
        layers = self.stages[0](tokens, upsampled, every_layer=True, first=first)
        grid = self.mask_grid(grid)
        return [StageOutput(self.class_head(tokens), masks, tokens, grid) for tokens, masks in layers]

    def fold_grid(self, grid: tuple[int, int]) -> None:
        """Store the queries for another grid, where a parametrization would not make them again."""
        upsample = self.upsample
        if self.config.resize_queries and "queries" in upsample._parameters:
            queries = resize_positions(upsample.queries[None], upsample.grid, grid)[0]
            upsample.queries, upsample.grid = nn.Parameter(queries, requires_grad=False), grid

    def fuse(self) -> None:
        super().fuse()
        self.upsample.fuse()

    def unfuse(self) -> None:
        super().unfuse()
        self.upsample.unfuse()
