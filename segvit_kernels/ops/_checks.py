"""Checks of arguments that are no tensors: one line with the name, what it is and what is expected."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from segvit_kernels.ops._autograd import transformed

_WHOLE = (int, np.integer, torch.SymInt)
_NUMBERS = (*_WHOLE, float, np.floating, torch.SymFloat)


def can_read(x: Tensor) -> bool:
    """Whether there are values to look at, without stalling a device or breaking a graph."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or transformed():
        return False
    return not torch._C._len_torch_dispatch_stack() and not is_fake(x)  # fake tensors and traces have none


def number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite real number of a range, as a float.

    Raises:
        TypeError: no number.
        ValueError: not finite, or out of the range.
    """
    if (isinstance(value, bool) or not isinstance(value, _NUMBERS)) and not _traced(value):
        raise TypeError(f"{name} is {_short(value)}; expected a number")
    if not (least <= value <= most and abs(value) < math.inf):
        finite = "a finite number" if least == -math.inf else f"at least {least:g}"
        raise ValueError(
            f"{name} is {value}; expected {finite if most == math.inf else f'{least:g} to {most:g}'}"
        )
    return float(value)


def whole(name: str, value: Any, least: int | None = None) -> int:
    """A whole number.

    Raises:
        TypeError: no whole number.
        ValueError: less than ``least``.
    """
    if (isinstance(value, bool) or not isinstance(value, _WHOLE)) and not _traced(value, whole=True):
        raise TypeError(f"{name} is {_short(value)}; expected a whole number")
    if least is not None and value < least:
        raise ValueError(f"{name} is {value}; expected at least {least}")
    return value


def count(name: str, value: Any) -> Any:
    """A number, at least 0, or the one that a tensor holds, as a tensor without axes.

    Raises:
        TypeError: no number.
        ValueError: a negative number or one that is not finite, or a tensor of several.
    """
    if not isinstance(value, torch.Tensor):
        return number(name, value, 0)
    if value.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected a single number")
    return value.reshape(())


def size_pair(name: str, value: Any) -> tuple[int, int]:
    """A (height, width) of at least 1 × 1.

    Raises:
        TypeError: a side is no whole number.
        ValueError: not two of them, or less than 1.
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} is {value!r}; expected (height, width)")
    height, width = (whole(name, n) for n in value)
    if height < 1 or width < 1:
        raise ValueError(f"{name} is {tuple(value)}; expected (height, width), at least 1 x 1")
    return height, width


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        TypeError: neither.
    """
    if value is not True and value is not False:
        raise TypeError(f"{name} is {_short(value)}; expected True or False")
    return value


def tensors(name: str, value: Any) -> list[Any]:
    """A tensor or a sequence of things as a list.

    Raises:
        TypeError: neither.
    """
    if isinstance(value, torch.Tensor):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} is {_short(value)}; expected a tensor or a list of tensors")
    return list(value)


def _traced(value: Any, whole: bool = False) -> bool:
    """Whether it is a number of ``torch.jit.trace``, which makes 0-d tensors of the sizes of a tensor."""
    if not isinstance(value, torch.Tensor) or value.ndim or not torch.jit.is_tracing():
        return False
    dtype = value.dtype
    return dtype != torch.bool and not dtype.is_complex and not (whole and dtype.is_floating_point)


def _short(value: Any) -> str:
    """The value in a few characters, a tensor by its shape."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else f"a {type(value).__name__}"
