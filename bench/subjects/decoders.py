"""Decoders of other papers on this project's own backbone, so that nothing but the decoder differs.

Each is written from its paper's description, small, and for measuring: a head takes the tapped features of a
plain ViT, (B, h·w, C) each, and gives class scores (B, N, h', w'). Losses are cross-entropy on the upsampled
scores; auxiliary heads, which only train, are left out. No class token runs through the backbone, here as in
SegViT, so Segmenter's encoder has one token less and DPT has no readout token to project.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit import SegViTConfig
from segvit.model.backbone import Block, VisionTransformer, patch_grid
from segvit.model.linear_head import LinearSegmenter

Grid = tuple[int, int]


class Decoder(nn.Module):
    """Base of the heads: which blocks they look at.

    Args:
        config: the backbone's sizes and `num_classes` are used.
    """

    def __init__(self, config: SegViTConfig, levels: int = 1) -> None:
        super().__init__()
        depth = config.backbone.depth
        self.taps = tuple(depth * (level + 1) // levels - 1 for level in range(levels))

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        """Class scores (B, N, h', w') of features (B, h·w, C), shallow to deep, on ``grid`` = (h, w)."""
        raise NotImplementedError


class PixelClassifier(nn.Module):
    """Backbone and head; `preprocess` and `forward` as `segvit.model.linear_head.LinearSegmenter`'s."""

    def __init__(self, config: SegViTConfig, head: Callable[[SegViTConfig], Decoder]) -> None:
        super().__init__()
        self.head = head(config)
        self.backbone = VisionTransformer(config.backbone, config.image_size, self.head.taps)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in uint8, normalised in the model's dtype."""
        return images.to(self.backbone.pos_embed.dtype) / 127.5 - 1

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images), patch_grid(images, self.backbone.config.patch_size))


def _maps(tokens: Tensor, grid: Grid) -> Tensor:
    """Tokens (B, h·w, C) as an image (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(-1, grid)


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _resize(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _double(x: Tensor, times: int = 1) -> Tensor:
    return _resize(x, (x.shape[-2] * 2**times, x.shape[-1] * 2**times))


class SETRNaive(Decoder):
    """Two 1×1 convolutions on the last features (SETR, Zheng et al., CVPR 2021, section 3.3 "Naive")."""

    def __init__(self, config: SegViTConfig) -> None:
        super().__init__(config)
        width = config.backbone.width
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(_conv(width, 256, 1), nn.Conv2d(256, config.num_classes, 1))

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        return self.layers(_maps(self.norm(features[-1]), grid))


class SETRPUP(Decoder):
    """Four 3×3 convolutions to 256 channels, each followed by ×2 upsampling: progressive upsampling to the
    image's size, where the classes are told apart (SETR, section 3.3 "PUP")."""

    def __init__(self, config: SegViTConfig) -> None:
        super().__init__(config)
        width = config.backbone.width
        self.norm = nn.LayerNorm(width)
        self.convs = nn.ModuleList(_conv(channels, 256, 3) for channels in (width, 256, 256, 256))
        self.classifier = nn.Conv2d(256, config.num_classes, 1)

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        x = _maps(self.norm(features[-1]), grid)
        for conv in self.convs:
            x = _double(conv(x))
        return self.classifier(x)


class SETRMLA(Decoder):
    """Four evenly spaced taps, added top down after a 1×1 convolution; each through 3×3 convolutions to 128
    channels and ×4 upsampling; concatenated and classified (SETR, section 3.3 "MLA")."""

    def __init__(self, config: SegViTConfig) -> None:
        super().__init__(config, levels=4)
        width = config.backbone.width
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.taps)
        self.reduce = nn.ModuleList(_conv(width, 256, 1) for _ in self.taps)
        self.mix = nn.ModuleList(_conv(256, 256, 3) for _ in self.taps)
        self.heads = nn.ModuleList(nn.Sequential(_conv(256, 128, 3), _conv(128, 128, 3)) for _ in self.taps)
        self.classifier = nn.Conv2d(4 * 128, config.num_classes, 1)

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        total, streams = None, []
        for level in reversed(range(len(self.taps))):
            x = self.reduce[level](_maps(self.norms[level](features[level]), grid))
            total = x if total is None else total + x
            streams.append(_double(self.heads[level](self.mix[level](total)), times=2))
        return self.classifier(torch.cat(streams, dim=1))


class Segmenter(Decoder):
    """Mask transformer: class tokens and patches through two ViT blocks together; masks are the scalar
    products of their normalised projections (Segmenter, Strudel et al., ICCV 2021, section 3.2)."""

    def __init__(self, config: SegViTConfig) -> None:
        super().__init__(config)
        width = config.backbone.width
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, width)
        self.class_tokens = nn.Parameter(0.02 * torch.randn(1, config.num_classes, width))
        self.blocks = nn.ModuleList(Block(config.backbone, 0.0) for _ in range(2))
        self.decoder_norm = nn.LayerNorm(width)
        self.patch_projection = nn.Linear(width, width, bias=False)
        self.class_projection = nn.Linear(width, width, bias=False)
        self.mask_norm = nn.LayerNorm(config.num_classes)

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        x = self.project(self.norm(features[-1]))
        patches = x.shape[1]
        x = torch.cat([x, self.class_tokens.expand(x.shape[0], -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        patch = F.normalize(self.patch_projection(x[:, :patches]), dim=-1)
        classes = F.normalize(self.class_projection(x[:, patches:]), dim=-1)
        return _maps(self.mask_norm(patch @ classes.mT), grid)


class UPerNet(Decoder):
    """Pyramid pooling on the coarsest level and a feature pyramid network above it, 512 channels (Xiao et
    al., ECCV 2018, section 3), on four taps of a plain ViT, which transposed convolutions and pooling bring
    to strides 4, 8, 16 and 32, as BEiT does (Bao et al., ICLR 2022)."""

    channels = 512
    pools = (1, 2, 3, 6)

    def __init__(self, config: SegViTConfig) -> None:
        super().__init__(config, levels=4)
        width, channels = config.backbone.width, self.channels
        double = [nn.ConvTranspose2d(width, width, 2, stride=2) for _ in range(3)]
        self.pyramid = nn.ModuleList(
            [
                nn.Sequential(double[0], nn.BatchNorm2d(width), nn.GELU(), double[1]),
                double[2],
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.pooled = nn.ModuleList(_conv(width, channels, 1) for _ in self.pools)
        self.bottleneck = _conv(width + len(self.pools) * channels, channels, 3)
        self.lateral = nn.ModuleList(_conv(width, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(_conv(channels, channels, 3) for _ in range(3))
        self.fuse = _conv(4 * channels, channels, 3)
        self.classifier = nn.Conv2d(channels, config.num_classes, 1)

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        *fine, coarse = [f(_maps(x, grid)) for f, x in zip(self.pyramid, features, strict=True)]
        pooled = [
            _resize(conv(F.adaptive_avg_pool2d(coarse, scale)), coarse.shape[-2:])
            for scale, conv in zip(self.pools, self.pooled, strict=True)
        ]
        x = self.bottleneck(torch.cat([coarse, *pooled], dim=1))
        levels = [x]
        for level in reversed(range(3)):
            x = self.lateral[level](fine[level]) + _resize(x, fine[level].shape[-2:])
            levels.append(self.smooth[level](x))
        finest = levels[-1].shape[-2:]
        return self.classifier(self.fuse(torch.cat([_resize(x, finest) for x in levels], dim=1)))


class _Residual(nn.Module):
    """RefineNet's residual unit: ReLU and a 3×3 convolution with batch norm, twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                layer
                for _ in range(2)
                for layer in (
                    nn.ReLU(),
                    nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(channels),
                )
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class DPT(Decoder):
    """Four taps reassembled at strides 4 to 32 and fused by residual units, coarse to fine, 256 channels;
    classes at half the image's size (Ranftl et al., ICCV 2021, section 3 and appendix on segmentation)."""

    channels = 256

    def __init__(self, config: SegViTConfig) -> None:
        super().__init__(config, levels=4)
        width, channels = config.backbone.width, self.channels
        sizes = (256, 512, 1024, 1024) if width == 1024 else (width // 8, width // 4, width // 2, width)
        resample = (
            nn.ConvTranspose2d(sizes[0], sizes[0], 4, stride=4),
            nn.ConvTranspose2d(sizes[1], sizes[1], 2, stride=2),
            nn.Identity(),
            nn.Conv2d(sizes[3], sizes[3], 3, stride=2, padding=1),
        )
        self.reassemble = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, size, 1), move, nn.Conv2d(size, channels, 3, padding=1, bias=False)
            )
            for size, move in zip(sizes, resample, strict=True)
        )
        self.skip = nn.ModuleList(_Residual(channels) for _ in range(3))
        self.refine = nn.ModuleList(_Residual(channels) for _ in range(4))
        self.project = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(4))
        self.head = nn.Sequential(_conv(channels, channels, 3), nn.Conv2d(channels, config.num_classes, 1))

    def forward(self, features: list[Tensor], grid: Grid) -> Tensor:
        *fine, x = [f(_maps(x, grid)) for f, x in zip(self.reassemble, features, strict=True)]
        for level in reversed(range(4)):
            if level < 3:
                x = _resize(x, fine[level].shape[-2:]) + self.skip[level](fine[level])
            x = self.project[level](_double(self.refine[level](x)))
        return self.head(x)


HEADS: dict[str, Callable[[SegViTConfig], Decoder]] = {
    "SETR-naive": SETRNaive,
    "SETR-MLA": SETRMLA,
    "SETR-PUP": SETRPUP,
    "Segmenter": Segmenter,
    "UPerNet": UPerNet,
    "DPT": DPT,
}
NAMES = ("linear", *HEADS)


def build(name: str, config: SegViTConfig) -> nn.Module:
    """The decoder called ``name`` (one of `NAMES`) on its backbone, with random weights, in evaluation mode.

    Raises:
        KeyError: no decoder has this name.
    """
    model = LinearSegmenter(config) if name == "linear" else PixelClassifier(config, HEADS[name])
    return model.eval()
