"""SegViT: semantic segmentation with plain Vision Transformers, on the fused kernels of `segvit_kernels`."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_EXPORTS = {
    "BackboneConfig": "config",
    "RotaryConfig": "config",
    "SegViTConfig": "config",
    "InferenceOptions": "options",
    "SegViT": "model.heads",
    "SegViTOutput": "model.segvit",
    "SegViTLoss": "model.losses",
    "VisionTransformer": "model.backbone",
    "export": "exporting",
    "infer_backbone_config": "model.backbone_weights",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line can show its help without importing torch.
    if name in _EXPORTS:
        return getattr(import_module(f"segvit.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'segvit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


# Modules are found under their earlier names too.
_MOVED = {
    "system": "files interrupts machine text",
    "pictures": "report visualize",
    "data": "synthetic transforms",
    "model": "backbone checkpoint convert decoder foreign linear_head losses pretrained shrunk",
    "training": "init_from metrics run_folder train",
}
_ROOMS = {f"segvit.{name}": room for room, names in _MOVED.items() for name in names.split()}


class _Moved(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in _ROOMS else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"segvit.{_ROOMS[spec.name]}.{spec.name.rpartition('.')[2]}")
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # it has run


sys.meta_path.append(_Moved())
