"""Whole models of other libraries at the size of one of ours, from a configuration, with random weights.

Nothing is downloaded. Each gives label maps as its own library does, image processors' post-processing
included; images are normalised tensors, since what reads and resizes a picture is the same for all.
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.subjects.published import Model
from segvit.config import PRESETS


@dataclasses.dataclass(frozen=True)
class Peer:
    """A model of a library.

    Attributes:
        name: of the model. package: what has to be importable.
        what: its sizes in words.
        build: the model for images, classes and ViT size of ours, in evaluation mode.
        labels: label maps (B, H, W) from the model and normalised images (B, 3, H, W).
        reference: label maps that ``labels`` must agree with, where the library has them another way.
    """

    name: str
    package: str
    what: str
    build: Callable[[Model], nn.Module]
    labels: Callable[[nn.Module, Tensor], Tensor]
    reference: Callable[[nn.Module, Tensor], Tensor] | None = None

    @property
    def missing(self) -> str | None:
        """Why it cannot be measured here; ``None`` if it can."""
        try:
            importlib.import_module(self.package)
        except ImportError as error:
            return f"{self.package}: {error}"
        return None


def _vit(spec: Model) -> dict[str, Any]:
    """Sizes of our ViT under the names of transformers' configurations."""
    sizes = PRESETS[spec.preset]
    return {
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["depth"],
        "num_attention_heads": sizes["heads"],
        "image_size": spec.size,
        "patch_size": 16,
    }


def _quarters(spec: Model) -> list[int]:
    """Numbers of four evenly spaced blocks, counted from 1."""
    depth = PRESETS[spec.preset]["depth"]
    return [depth * (level + 1) // 4 for level in range(4)]


def _transformers(name: str) -> Any:
    return getattr(importlib.import_module("transformers"), name)


def _eomt(spec: Model) -> nn.Module:
    sizes = _vit(spec)
    config = _transformers("EomtConfig")(
        **sizes,
        num_labels=spec.classes,
        num_queries=100,
        num_blocks=4 if sizes["num_hidden_layers"] > 12 else 3,
        num_register_tokens=0,
    )
    model = _transformers("EomtForUniversalSegmentation")(config).eval()
    # Training anneals masked attention away: a trained model predicts no masks before its last block.
    model.attn_mask_probs.zero_()
    return model


# Swin sizes (Liu et al., ICCV 2021, section 3.3) that stand beside a ViT: width, blocks, heads, window.
_SWIN = {
    "vit_tiny": ("Swin-T", 96, [2, 2, 6, 2], [3, 6, 12, 24], 7),
    "vit_small": ("Swin-T", 96, [2, 2, 6, 2], [3, 6, 12, 24], 7),
    "vit_base": ("Swin-B", 128, [2, 2, 18, 2], [4, 8, 16, 32], 12),
    "vit_large": ("Swin-L", 192, [2, 2, 18, 2], [6, 12, 24, 48], 12),
}


def _mask2former(spec: Model) -> nn.Module:
    _, width, depths, heads, window = _SWIN[spec.preset]
    backbone = _transformers("SwinConfig")(
        image_size=spec.size,
        embed_dim=width,
        depths=depths,
        num_heads=heads,
        window_size=window,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = _transformers("Mask2FormerConfig")(
        backbone_config=backbone, num_labels=spec.classes, num_queries=100
    )
    return _transformers("Mask2FormerForUniversalSegmentation")(config).eval()


def _upernet(spec: Model) -> nn.Module:
    sizes = _vit(spec)
    backbone = _transformers("BeitConfig")(
        **sizes,
        intermediate_size=4 * sizes["hidden_size"],
        use_absolute_position_embeddings=True,
        add_fpn=True,
        out_indices=_quarters(spec),
    )
    config = _transformers("UperNetConfig")(
        backbone_config=backbone, num_labels=spec.classes, hidden_size=512, use_auxiliary_head=False
    )
    return _transformers("UperNetForSemanticSegmentation")(config).eval()


def _dpt(spec: Model) -> nn.Module:
    sizes = _vit(spec)
    width = sizes["hidden_size"]
    config = _transformers("DPTConfig")(
        **sizes,
        intermediate_size=4 * width,
        backbone_out_indices=[stage - 1 for stage in _quarters(spec)],
        neck_hidden_sizes=(256, 512, 1024, 1024) if width == 1024 else [width // n for n in (8, 4, 2, 1)],
        num_labels=spec.classes,
        use_auxiliary_head=False,
    )
    return _transformers("DPTForSemanticSegmentation")(config).eval()


def _smp_dpt(spec: Model) -> nn.Module:
    library = importlib.import_module("segmentation_models_pytorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.DPT(
            f"tu-{spec.preset}_patch16_224",
            encoder_weights=None,
            classes=spec.classes,
            img_size=spec.size,
        ).eval()


def _scores_to_labels(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """What the image processors of per-pixel models do."""
    if scores.shape[-2:] != size:
        scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
    return scores.argmax(1)


def _per_pixel(model: nn.Module, images: Tensor) -> Tensor:
    return _scores_to_labels(model(images).logits, tuple(images.shape[-2:]))


def _smp_labels(model: nn.Module, images: Tensor) -> Tensor:
    return _scores_to_labels(model(images), tuple(images.shape[-2:]))


def _masks_to_labels(output: Any, size: tuple[int, int], between: tuple[int, int]) -> Tensor:
    """What the image processors of mask classification models do: scores at one size, resized to another."""
    masks = F.interpolate(output.masks_queries_logits, size=between, mode="bilinear", align_corners=False)
    classes = output.class_queries_logits.softmax(-1)[..., :-1]
    scores = (classes.mT @ masks.sigmoid().flatten(2)).unflatten(-1, between)
    return _scores_to_labels(scores, size)


def _eomt_labels(model: nn.Module, images: Tensor) -> Tensor:
    size = tuple(images.shape[-2:])
    return _masks_to_labels(model(images), size, size)


def _mask2former_labels(model: nn.Module, images: Tensor) -> Tensor:
    return _masks_to_labels(model(images), tuple(images.shape[-2:]), (384, 384))


def _fused_labels(model: nn.Module, images: Tensor) -> Tensor:
    from segvit_kernels.integrations import post_process_semantic_segmentation

    output, size = model(images), tuple(images.shape[-2:])
    # EoMT's processor has no intermediate size of its own, but that of its input.
    between = {"shortest_edge": size[0], "longest_edge": size[1]} if "Eomt" in type(output).__name__ else None
    return torch.stack(post_process_semantic_segmentation(output, [size] * len(images), size=between))


_FUSED = "the same model, label maps by segvit_kernels.integrations"
PEERS = (
    Peer("EoMT", "transformers", "the same ViT, 100 queries in its last blocks", _eomt, _eomt_labels),
    Peer("EoMT, fused labels", "transformers", _FUSED, _eomt, _fused_labels, _eomt_labels),
    Peer("Mask2Former", "transformers", "a Swin backbone, 100 queries", _mask2former, _mask2former_labels),
    Peer(
        "Mask2Former, fused labels",
        "transformers",
        _FUSED,
        _mask2former,
        _fused_labels,
        _mask2former_labels,
    ),
    Peer("UPerNet", "transformers", "the same ViT, as BEiT without relative positions", _upernet, _per_pixel),
    Peer("DPT", "transformers", "the same ViT", _dpt, _per_pixel),
    Peer("DPT, smp", "segmentation_models_pytorch", "the same ViT, from timm", _smp_dpt, _smp_labels),
)
