"""The Shrunk structure's decoder: query-based up-sampling, then a single ATM stage.

Source: SegViT (NeurIPS 2022, arXiv 2210.05844), section 3.3. Its other half, query-based down-sampling, is in
the backbone (`BackboneConfig.shrink_at`).
"""

from __future__ import annotations

from torch import Tensor, nn

from segvit.config import SegViTConfig
from segvit.model.decoder import ATMDecoder, StageOutput
from segvit_kernels import QueryUpsample, resize_positions


class ShrunkDecoder(ATMDecoder):
    """Learned queries, one for each patch, attend to the taps; class tokens attend to the result.

    Every layer of the ATM stage is an output with masks of its own, which are not accumulated.

    Args:
        config: as for `ATMDecoder`, and `resize_queries`, `key_positions` and `image_size`.
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
            depth=config.decoder_depth,
            dropout=config.decoder_dropout,
            resize=config.resize_queries,
            key_positions=config.key_positions,
        )

    def mask_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        return self.upsample.output_grid(grid)

    def forward(
        self, features: list[Tensor], grid: tuple[int, int], accumulate: bool = True
    ) -> list[StageOutput]:
        """Outputs after each layer; `accumulate` changes nothing. Otherwise as in `ATMDecoder`."""
        upsampled = self.upsample(features, grid)
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
