"""EoMT as transformers has it, and the same weights in this package, for `bench decoders`."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

THEIRS, OURS = "transformers", "this package"
PATCH, QUERIES = 16, 100


class Pair(NamedTuple):
    """A model of transformers, and the one that `segvit convert` makes of it."""

    theirs: nn.Module
    ours: nn.Module
    side: int

    @classmethod
    def build(cls, preset: str, side: int, classes: int) -> Pair:
        """Of a preset's size, weights random, the same at every call; masks off, as after a whole training.

        Raises:
            ModuleNotFoundError: transformers is not there.
        """
        import transformers

        from segvit import SegViTConfig
        from segvit.model.eomt_weights import convert_eomt

        size = SegViTConfig.preset(preset, classes, patch_size=PATCH, decoder="eomt")
        torch.manual_seed(0)
        config = transformers.EomtConfig(
            hidden_size=size.backbone.width,
            num_hidden_layers=size.backbone.depth,
            num_attention_heads=size.backbone.heads,
            image_size=side,
            patch_size=PATCH,
            num_queries=QUERIES,
            num_blocks=size.query_blocks,
            num_upscale_blocks=size.upscale_blocks,
            num_labels=classes,
        )
        model = transformers.EomtForUniversalSegmentation(config).requires_grad_(False).eval()
        model.query.weight.mul_(20)  # or queries are alike, and pixels with them
        model.class_predictor.weight.mul_(10)
        model.attn_mask_probs.zero_()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            model.save_pretrained(folder)
            ours, _, _ = convert_eomt(Path(folder, "model.safetensors"))
        return cls(model, ours.requires_grad_(False).eval(), side)

    def picture(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, 256, (1, 3, self.side, self.side), dtype=torch.uint8, generator=generator)

    def call(self, whose: str) -> Callable[[], Tensor]:
        """One picture of bytes to its label map. Theirs: normalised by our model's function, then the model
        and its image processor's semantic maps."""
        images = self.picture()
        if whose == OURS:
            engine = self.ours.compile_for_inference(self.side)
            return lambda: engine(images)
        import transformers

        size = {"shortest_edge": self.side, "longest_edge": self.side}
        processor = transformers.EomtImageProcessor(size=size)

        def theirs() -> Tensor:
            outputs = self.theirs(self.ours.preprocess(images))
            (labels,) = processor.post_process_semantic_segmentation(outputs, [(self.side, self.side)])
            return labels[None]

        return theirs

    @torch.inference_mode()
    def agreement(self) -> dict[str, Any]:
        """The largest error of logits as a share of the largest logit, and the share of equal labels."""
        x = self.ours.preprocess(self.picture())
        expected, found = self.theirs(x), self.ours(x)
        errors = [
            float((actual - logits).abs().max() / logits.abs().max())
            for actual, logits in (
                (found.class_logits, expected.class_queries_logits),
                (found.mask_logits, expected.masks_queries_logits),
            )
        ]
        labels = [self.call(whose)().long() for whose in (THEIRS, OURS)]
        share = (labels[0] == labels[1]).double().mean()
        return {
            "logits_error": max(errors),
            "labels_equal": float(share),
            "classes": labels[0].unique().numel(),
        }
