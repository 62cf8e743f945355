"""Autocast, whose dtype operators take and which their formulas must not see."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

_CAST = (torch.float32, torch.float16, torch.bfloat16)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on a device; ``None`` where it is off."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return None  # in half the time
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def autocast(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype that autocast has on a device; float64 and what is no number of it stay."""
    dtype = autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype in _CAST else t for t in tensors) if dtype else tensors


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Products in the dtype of their factors, which autocast would round.

    Where it is off this is nothing: exported programs would have a region of their own for it.
    """
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
