"""EoMT: learned queries join the last blocks of the backbone, and there is no other decoder.

Source: "Your ViT is Secretly an Image Segmentation Model" (Kerssies et al., CVPR 2025, arXiv 2503.19108). In
training each of these blocks lets a query see the patches of its own mask alone, and that less and less often
(mask annealing), so that at the end the blocks are those of a plain ViT and run as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segvit.config import SegViTConfig
from segvit.model.backbone import Joining
from segvit.model.decoder import Decoder
from segvit.model.segvit import SegViT, SegViTOutput

__all__ = ["EoMT", "EoMTDecoder", "ScaleBlock", "mask_probability"]

_POWER = 0.9  # of the decay of the masks' probability


class ScaleBlock(nn.Module):
    """Twice the rows and columns of a feature map (B, C, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width, bias=False)
        self.norm = nn.LayerNorm(width, eps=1e-6)  # of the channels of a place

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.gelu(self.conv1(x)))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class EoMTDecoder(Decoder):
    """The queries, and what makes classes and masks of tokens.

    Args:
        config: `num_classes`, `queries`, `query_blocks`, `upscale_blocks` and the backbone's sizes are used.
    """

    mask_probabilities: Tensor

    def __init__(self, config: SegViTConfig) -> None:
        super().__init__()
        width, self.config = config.backbone.width, config
        assert config.query_blocks is not None and config.upscale_blocks is not None  # filled in
        self.queries = nn.Parameter(torch.empty(config.queries, width))
        self.mask_head = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.upscale = nn.Sequential(*(ScaleBlock(width) for _ in range(config.upscale_blocks)))
        self.class_head = nn.Linear(width, config.num_classes + 1)
        # Of each block that queries run through, how likely a query sees its own mask alone.
        self.register_buffer("mask_probabilities", torch.ones(config.query_blocks))
        nn.init.normal_(self.queries)

    def mask_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the masks, for images of `grid` patches."""
        height, width = self.token_grid(grid)
        factor = 2 ** len(self.upscale)
        return height * factor, width * factor

    def token_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Of the tokens after the last block."""
        return self.config.backbone.grid_after(self.config.backbone.depth - 1, grid)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Class logits (B, Q, N+1) and mask logits (B, Q, h', w').

        Args:
            tokens: (B, Q + prefix + h·w, C) after a block and the norm. grid: (h, w).
        """
        queries, patches = tokens[:, : len(self.queries)], tokens[:, -grid[0] * grid[1] :]
        features = self.upscale(patches.transpose(1, 2).unflatten(2, grid))
        masks = self.mask_head(queries) @ features.flatten(2)
        return self.class_head(queries), masks.unflatten(2, tuple(features.shape[2:]))

    def visible(self, mask_logits: Tensor, tokens: int, grid: tuple[int, int], block: int) -> Tensor:
        """Which of all tokens each token sees, (B, 1, tokens, tokens): a query the patches of its mask.

        In training only as often as the block's probability says, otherwise all of them.

        Args:
            mask_logits: (B, Q, h', w') before the block. block: of those that queries run through.
        """
        count = grid[0] * grid[1]
        inside = F.interpolate(mask_logits.detach(), size=grid, mode="bilinear", align_corners=False) > 0
        inside = inside.flatten(2)
        if self.training:
            drawn = torch.rand(inside.shape[:2], device=inside.device)
            inside = inside | (drawn > self.mask_probabilities[block])[:, :, None]
        batch, queries = inside.shape[:2]
        before = inside.new_ones(batch, queries, tokens - count)
        others = inside.new_ones(batch, tokens - queries, tokens)
        return torch.cat([torch.cat([before, inside], 2), others], 1)[:, None]


class EoMT(SegViT):
    """Queries in the last blocks of the ViT; otherwise used like `SegViT`.

    `forward` returns Q queries: `class_logits` (B, Q, N+1), `mask_logits` (B, Q, h, w) on a grid
    2^`upscale_blocks` times as fine as the patches', and in training as `auxiliary` what the queries were
    before each of their blocks.

    Out of training a block masks where its probability is one half or more, and never at random: after a
    whole training none does.
    """

    decoder: EoMTDecoder
    kind = "eomt"
    has_similarity_maps = False

    def __init__(self, config: SegViTConfig) -> None:
        super().__init__(config)
        self.masked: tuple[bool, ...] = ()  # which blocks mask out of training
        self.register_load_state_dict_post_hook(_decide)
        self._decide()

    def _make_decoder(self, config: SegViTConfig) -> EoMTDecoder:
        return EoMTDecoder(config)

    def _decide(self) -> None:
        probabilities = self.decoder.mask_probabilities
        values = [0.0] * len(probabilities) if probabilities.is_meta else probabilities.tolist()
        self.masked = tuple(value >= 0.5 for value in values)

    def train(self, mode: bool = True) -> EoMT:
        super().train(mode)
        self._decide()
        return self

    def anneal(self, progress: float) -> None:
        """Set every block's probability of masking for a share of the training that is done, 0 to 1."""
        blocks = len(self.decoder.mask_probabilities)
        values = [mask_probability(progress, block, blocks) for block in range(blocks)]
        self.decoder.mask_probabilities.copy_(torch.tensor(values))

    def forward(self, images: Tensor) -> SegViTOutput:
        decoder, backbone = self.decoder, self.backbone
        grid = decoder.token_grid(self._grid(images))
        first = len(backbone.blocks) - len(decoder.mask_probabilities)
        auxiliary: list[tuple[Tensor, Tensor]] = []

        def attend(x: Tensor, block: int) -> Tensor | None:
            if not self.training and not self.masked[block - first]:
                return None
            class_logits, mask_logits = decoder.forward(backbone.norm(x), grid)  # no call: hooks see the last
            if self.training:
                auxiliary.append((class_logits, mask_logits))
            return decoder.visible(mask_logits, x.shape[1], grid, block - first)

        (tokens,) = backbone(images, Joining(decoder.queries, first, attend))
        class_logits, mask_logits = decoder(tokens, grid)
        return SegViTOutput(class_logits, mask_logits, auxiliary)

    def take_class_head(self) -> None:
        """None: nothing but the result is classified."""

    def similarity_maps(self, images: Tensor) -> list[Tensor]:
        raise ValueError("the decoder eomt has no similarity maps")


def _decide(model: EoMT, _: object) -> None:
    model._decide()


def mask_probability(progress: float, block: int, blocks: int) -> float:
    """How likely a block masks when a share `progress` of the training is done.

    Of L blocks the i-th begins with 1 and falls to 0 between (i+1)/(L+2) and (i+2)/(L+2) of the training.
    """
    passed = progress * (blocks + 2) - (block + 1)
    return (1 - min(max(passed, 0.0), 1.0)) ** _POWER
