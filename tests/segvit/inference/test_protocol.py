"""Inference works with any model that answers its protocol, and SegViT answers all of it."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segvit import SegViT, SegViTConfig
from segvit.inference.engine import InferenceEngine
from segvit.inference.passes import label_maps
from segvit.inference.protocol import Foldable, Predictor, Segmenter
from segvit.model.linear_head import LinearSegmenter
from segvit.options import InferenceOptions
from segvit_kernels import semantic_argmax

PATCH, CLASSES = 4, 3


class Stranger(nn.Module):
    """No SegViT: scores are a convolution of the patches. It has what `Foldable` lists and nothing else."""

    activation = "none"

    def __init__(self):
        super().__init__()
        self.config = SegViTConfig.preset("vit_tiny", CLASSES, patch_size=PATCH)
        self.register_buffer("mean", torch.tensor(self.config.mean).view(-1, 1, 1))
        self.patches = nn.Conv2d(3, CLASSES, PATCH, PATCH)

    def forward(self, images):
        return self.patches(images)

    def mask_grid(self, size):
        return size[0] // PATCH, size[1] // PATCH

    def scoring(self, output):
        return output, torch.eye(CLASSES).expand(len(output), -1, -1)

    def labels(self, output, size, views=None):
        masks, probabilities = zip(*map(self.scoring, output), strict=True)
        return semantic_argmax(
            list(masks), torch.cat(probabilities), size, views=views, activation=self.activation
        )

    def fuse(self):
        return self

    def unfuse(self):
        return self

    def fold_normalisation(self, pixel):
        std = torch.tensor(self.config.std).view(-1, 1, 1)
        return -255 * pixel * self.mean, 1 / (255 * pixel * std)

    def fold_grid(self, size):
        pass

    def take_class_head(self):
        return None

    def plain_blocks(self):
        return []


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"window": 8, "flip": True, "scales": [1.0, 1.5]}])
def test_another_model_is_run_in_passes_and_by_the_engine(options):
    torch.manual_seed(0)
    model, options = Stranger().eval(), InferenceOptions(**options)
    images = torch.randint(0, 256, (2, 3, 13, 18), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (model.config.mean, model.config.std))
    normalised = (images / 255 - mean) / std
    found = label_maps(model, normalised, options)
    assert found.shape == (2, 13, 18) and len(found.unique()) == CLASSES
    if not options.window:
        scores = F.interpolate(model(F.pad(normalised, (0, 2, 0, 3))), scale_factor=PATCH, mode="bilinear")
        assert (found == scores[..., :13, :18].argmax(1)).double().mean() > 0.99
    engine = InferenceEngine(model, (13, 18), 2, dtype=torch.float32, options=options)
    assert (engine(images) == found).double().mean() > 0.99


@pytest.mark.parametrize("protocol", [Segmenter, Foldable, Predictor])
@pytest.mark.parametrize("kind", [SegViT, LinearSegmenter])
def test_segvit_answers_the_protocol(protocol, kind):
    model = kind(SegViTConfig.preset("vit_tiny", CLASSES, depth=1, taps=(0,)))
    own = [base for base in protocol.__mro__ if base.__module__ == protocol.__module__]
    for base in own:
        assert all(hasattr(model, name) for name in base.__annotations__)
        methods = {name: value for name, value in vars(base).items() if inspect.isfunction(value)}
        for name, asked in methods.items():
            if name.startswith("_"):
                continue
            expected = list(inspect.signature(asked).parameters)[1:]
            assert list(inspect.signature(getattr(model, name)).parameters)[: len(expected)] == expected, name
