"""``torch.cuda`` as code that needs a GPU sees it, with the stub behind it and the CPU's tensors.

For rehearsals: every line of such code runs, and what it measures and computes means nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from segvit_kernels.testing.stub import Stub


def _on_cpu(value: Any) -> Any:
    """A CUDA device, or its name, as the CPU; everything else as it is."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


_DEVICE, _IS_CUDA = (inspect.getattr_static(torch.Tensor, name).__get__ for name in ("device", "is_cuda"))


class _CPUTensors(TorchFunctionMode):
    """Tensors that are asked for on a CUDA device are made on the CPU, and say that they are on the other."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        if function == _DEVICE:
            found = function(*args)
            return torch.device("cuda", 0) if found.type == "cpu" else found
        if function == _IS_CUDA:
            return True
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        if function is torch.Tensor.cuda:
            return args[0]
        return function(*map(_on_cpu, args), **kwargs)


class _Event:
    """The clock of the host in place of a device's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return max(1e-6, 1e3 * (end.time - self.time))

    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True


class _Stream:
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        event = event or _Event()
        event.record()
        return event

    def synchronize(self) -> None: ...


class _Graph:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def replay(self) -> None: ...

    def reset(self) -> None: ...

    def pool(self) -> tuple[int, int]:
        return (0, 0)


@contextlib.contextmanager
def pretended(gpu: Stub) -> Iterator[None]:
    """Inside the ``with`` block ``torch.cuda`` has one device, ``gpu``, whose tensors are the CPU's.

    Timings are the host's, graphs capture nothing, memory statistics are zero.
    """

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    def zero(*args: Any, **kwargs: Any) -> int:
        return 0

    def context(*args: Any, **kwargs: Any) -> contextlib.nullcontext:
        return contextlib.nullcontext()

    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "device_count": lambda: 1,
        "current_device": zero,
        "set_device": nothing,
        "get_device_name": lambda *args: gpu.name,
        "get_device_capability": lambda *args: gpu.capability,
        "get_device_properties": lambda *args: gpu.properties,
        "mem_get_info": lambda *args: (gpu.properties.total_memory,) * 2,
        "synchronize": nothing,
        "empty_cache": nothing,
        "reset_peak_memory_stats": nothing,
        "get_sync_debug_mode": zero,
        "set_sync_debug_mode": nothing,
        **dict.fromkeys(
            ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), zero
        ),
        "current_stream": lambda *args: _Stream(),
        **dict.fromkeys(("device", "stream", "graph"), context),
        "Event": _Event,
        "Stream": _Stream,
        "CUDAGraph": _Graph,
    }
    autocast = torch.autocast

    def autocast_on_cpu(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
        return autocast(_on_cpu(device_type), *args, **kwargs)

    patched = mock.patch.multiple(torch.cuda, **replaced)
    with patched, mock.patch.object(torch, "autocast", autocast_on_cpu), _CPUTensors():
        yield
