"""The published models: sizes, and what their papers count."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Model:
    """A published model: preset, classes, crop, and the paper's GFLOPs (tables 1 to 3 and 5)."""

    name: str
    preset: str
    classes: int
    size: int
    paper: float
    shrunk: bool = False

    def build(self, **overrides: Any) -> nn.Module:
        """The model on the default device, in evaluation mode; `overrides` go to its configuration."""
        from segvit import SegViT, SegViTConfig

        size = (self.size, self.size)
        config = SegViTConfig.preset(
            self.preset, self.classes, shrunk=self.shrunk, image_size=size, **overrides
        )
        return SegViT(config).eval()


MODELS = (
    Model("vit_b_ade20k_512", "vit_base", 150, 512, 120.9),
    Model("vit_l_ade20k_640", "vit_large", 150, 640, 637.9),
    Model("vit_l_ade20k_640_shrunk", "vit_large", 150, 640, 373.5, True),
    Model("vit_l_cocostuff10k_512", "vit_large", 171, 512, 383.9),
    Model("vit_l_cocostuff10k_512_shrunk", "vit_large", 171, 512, 224.8, True),
    Model("vit_l_pascal_context_480", "vit_large", 60, 480, 321.6),
    Model("vit_l_pascal_context_480_shrunk", "vit_large", 60, 480, 186.9, True),
)
# Whose backbones all decoders are counted on.
DECODERS = ("vit_b_ade20k_512", "vit_l_ade20k_640")
# What benchmarks take where no published model will do: quick runs, and runs of the script itself.
QUICK = Model("vit_s_512", "vit_small", 150, 512, 0.0)
CAMVID = Model("vit_s_camvid_224", "vit_small", 11, 224, 0.0)  # a training step, of small crops
TINY = Model("tiny", "vit_tiny", 5, 64, 0.0)

# What follows a decoder's name where its step is computed by the published formula.
BY_FORMULA = ", published formula"
# Thousand million multiply-accumulates as the tables of SegViT's paper print them (">250" is a bound, not a
# count), by preset and image side. "SETR" in its ablation is a per-pixel classifier on the last features.
DECODER_GFLOPS: dict[tuple[str, str, int], str] = {
    ("SETR-naive", "vit_base", 512): "107.3",
    ("SETR-MLA", "vit_base", 512): "113.5",
    ("Segmenter", "vit_base", 512): "129.6",
    ("DPT", "vit_base", 512): "219.8",
    ("UPerNet", "vit_base", 512): ">250",
    ("SegViT", "vit_base", 512): "120.9",
    ("Shrunk SegViT", "vit_base", 512): "97.1",
    ("SETR-MLA", "vit_large", 512): "368.6",
    ("Segmenter", "vit_large", 640): "671.8",
    ("UPerNet", "vit_large", 640): ">700",
    ("SegViT", "vit_large", 640): "637.9",
    ("Shrunk SegViT", "vit_large", 640): "373.5",
}
