"""When a module's parameters say what it computes, and when what was made of them is out of date.

Code that takes a layer's ``weight`` instead of calling the layer leaves out what others put on it: LoRA and
other wrappers, parametrizations, hooks, quantised weights. So it asks :func:`is_plain` first.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from segvit_kernels._autocast import without_autocast

_PLAIN = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Dropout, nn.Identity)
HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
"""Attributes of a module that hold its hooks."""


def is_plain(module: nn.Module) -> bool:
    """Whether calling a layer is its class's formula on its own parameters, and nothing else.

    The class is one of ``nn.Linear``, ``nn.LayerNorm``, ``nn.Conv2d``, ``nn.Dropout`` and ``nn.Identity``
    itself, or sets ``plain = True`` in its own body; it has no hooks, and its parameters are dense.
    """
    kind = type(module)
    if kind not in _PLAIN and "plain" not in kind.__dict__:
        return False
    if is_hooked(module):
        return False
    return not any(hasattr(type(p), "__tensor_flatten__") for p in module._parameters.values())


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a layer is more than its class's ``forward``: it has hooks, or one on the object."""
    hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
    # fvcore's note which layer runs, and change nothing.
    noted = (str(type(hook).__module__).startswith("fvcore.") for hook in hooks)
    return not all(noted) or "forward" in module.__dict__


class Folded:
    """What was made of layers and parameters once, for as long as they are what they were.

    Told apart are other layers, other tensors, in-place changes (an optimizer's too) and other memory; not
    writes through ``.data``, which PyTorch does not count. Compiled code notices other layers and tensors
    only. Copies and unpickled ones belong to the copied parameters.

    Args:
        parts: the layers and parameters.
        value: what was made of them.
    """

    def __init__(self, parts: Sequence[nn.Module | Tensor], value: Any) -> None:
        self.frozen = False  # after freeze()
        self.value = value
        self._states = _states(parts)
        _count_steps()

    @classmethod
    def make(cls, parts: Sequence[nn.Module | Tensor], function: Callable[[], Any]) -> Folded | None:
        """What a function makes of the parts, in their own dtype under autocast too.

        ``None`` where that is nothing, or where a part is not plain or in training mode.
        """
        states = _states(parts)
        if states is None:
            return None
        with without_autocast(states[0][0].device if states else torch.device("cpu")):
            value = function()
        return None if value is None else cls(parts, value)

    def get(self, parts: Sequence[nn.Module | Tensor]) -> Any:
        """The value, or ``None`` where the parts are not what they were, or a gradient of theirs is asked
        for, which the value does not know; of parts whose changes nobody counts, with a warning."""
        if self.frozen:
            return self.value
        now, then = _states(parts), self._states
        if now is None or then is None or len(now) != len(then):
            return None
        if torch.compiler.is_exporting():  # parameters are stood in for
            return self.value
        if any(a[0] is not b[0] or a[1:] != b[1 : len(a)] for a, b in zip(now, then, strict=True)):
            return None
        if torch.is_grad_enabled() and any(state[0].requires_grad for state in now):
            return None
        if not torch.compiler.is_compiling() and any(state[0].is_inference() for state in now):
            warnings.warn(_UNCOUNTED, stacklevel=2)
            return None
        return self.value

    def freeze(self) -> None:
        """Give the value from now on, whatever becomes of the parts."""
        self.frozen, self._states = True, None  # the states keep tensors alive

    def __getstate__(self) -> dict[str, Any]:
        tensors = None
        if self._states is not None and all(_state(s[0])[1:] == s[1:] for s in self._states):
            tensors = [s[0] for s in self._states]
        return {"frozen": self.frozen, "value": self.value, "tensors": tensors}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.frozen, self.value = state["frozen"], state["value"]
        tensors = state["tensors"]
        self._states = None if tensors is None else [_state(t) for t in tensors]
        _count_steps()


_UNCOUNTED = (
    "weights were made in torch.inference_mode, where PyTorch does not count their changes: they are used as "
    "they are, without what fuse() or pack_linears made of them; make the model outside of it"
)


@torch._disable_dynamo  # type: ignore[untyped-decorator]
def _count_step(optimizer: Optimizer, *_: Any) -> None:
    """After a step: fused optimizers change parameters without counting, compiled or not."""
    groups = optimizer.param_groups
    torch.autograd.graph.increment_version(
        [p for group in groups for p in group["params"] if p.grad is not None]
    )


@functools.cache
def _count_steps() -> None:
    """From now on, of every optimizer; a process that folds nothing has no such hook."""
    register_optimizer_step_post_hook(_count_step)


def freeze(model: nn.Module) -> None:
    """Promise that a model stays as it is: what was folded in it is not checked any more."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Folded):
                value.freeze()


def _states(parts: Sequence[nn.Module | Tensor]) -> list[tuple] | None:
    """The state of every tensor of the parts; ``None`` where a part is not plain or in training mode."""
    states = []
    for part in parts:
        if not isinstance(part, nn.Module):
            states.append(_state(part))
        elif part.training or not is_plain(part):
            return None
        else:
            states += [_state(p) for p in part._parameters.values() if p is not None]
    return states


def _state(tensor: Tensor) -> tuple:
    if torch.compiler.is_compiling():
        return (tensor,)
    version = 0 if tensor.is_inference() else tensor._version
    return tensor, version, 0 if tensor.is_meta else tensor.data_ptr()
