"""SegViT: semantic segmentation with plain Vision Transformers, on the fused kernels of `segvit_kernels`."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "BackboneConfig": "config",
    "SegViTConfig": "config",
    "InferenceOptions": "options",
    "SegViT": "model.segvit",
    "SegViTOutput": "model.segvit",
    "SegViTLoss": "model.losses",
    "VisionTransformer": "model.backbone",
    "infer_backbone_config": "model.backbone",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line can show its help without importing torch.
    if name in _EXPORTS:
        return getattr(import_module(f"segvit.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'segvit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
