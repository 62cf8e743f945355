"""Kernel launches as data, and the pinned launch parameters.

A :class:`Launch` holds everything that one kernel launch needs. Launchers build it on real tensors and run it
(:mod:`segvit_kernels.triton._plan`); the compile gate builds the same ``Launch`` from meta tensors and
compiles it for a GPU that is not there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

FALLBACK = "default"
CDNA = "gfx942"


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Args:
        kernel: the ``@triton.jit`` function.
        programs: number of programs (one-dimensional grid).
        arguments: run-time arguments by name: tensors, ints, floats and ``None``.
        constants: ``tl.constexpr`` arguments by name.
        options: compiler options (``num_warps``, ``num_stages``).
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]

    def __call__(self) -> Any:
        """Run it by way of Triton's JIT, which returns the compiled kernel."""
        return self.kernel[(self.programs,)](**self.arguments, **self.constants, **self._options())

    def _options(self) -> dict[str, Any]:
        # Triton 3.10 turns the fusion of multiplications and additions off unless asked.
        return {**self.options, "enable_fp_fusion": True}

    def compile(self, target: Any) -> Any:
        """Compile for ``target`` (``triton.backends.compiler.GPUTarget``) just what a call would.

        Triton's JIT would look for the result under the same key, so that it finds it in the cache.
        """
        from triton.compiler import ASTSource, make_backend
        from triton.runtime.jit import create_function_from_signature

        kernel, backend = self.kernel, make_backend(target)
        given = {**self.arguments, **self.constants, **self._options()}
        bound = create_function_from_signature(kernel.signature, kernel.params, backend)(**given)
        options, signature, constants, attributes = kernel._pack_args(backend, given, *bound)
        source = ASTSource(kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=options.__dict__)


class _GPU(NamedTuple):
    arch: str
    multiprocessors: int


@functools.cache
def _gpu(device: torch.device) -> _GPU | None:
    """What the driver says of a device, asked once; ``None`` for the CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return _GPU(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return _GPU(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


def architecture(device: torch.device) -> str:
    """The name under which a device's parameters are pinned: ``sm_90``, ``gfx942``."""
    gpu = _gpu(device)
    return gpu.arch if gpu else FALLBACK


def target(device: torch.device) -> str:
    """What launches are shaped for: the architecture and its number of multiprocessors, ``sm_90:114``."""
    gpu = _gpu(device)
    return f"{gpu.arch}:{gpu.multiprocessors}" if gpu else FALLBACK


@functools.cache
def pinned(arch: str) -> dict[str, Any]:
    """The frozen launch parameters of ``arch``, or of the nearest architecture with a file of its own.

    Args:
        arch: an architecture, for the multiprocessors of the GPU on which its file was made, or what
            :func:`target` says of a device.
    """
    name, _, multiprocessors = arch.partition(":")
    if multiprocessors:
        return {**pinned(name), "multiprocessors": int(multiprocessors)}
    folder = resources.files(__package__) / "configs"
    path = folder / f"{name}.json"
    if not path.is_file():
        # What AMD's compiler does not take (registers by number, TF32) stands in no file of theirs.
        path = folder / f"{CDNA if name.startswith('gfx') else FALLBACK}.json"
    return json.loads(path.read_text())


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉; ``triton.cdiv`` costs two microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not less than ``n`` ≥ 1."""
    return 1 << (n - 1).bit_length()


def addressable(tensor: Tensor, axes: int) -> Tensor:
    """The tensor itself, or a copy where 32-bit offsets along the last ``axes`` axes would not reach."""
    reach = sum((n - 1) * abs(s) for n, s in zip(tensor.shape[-axes:], tensor.stride()[-axes:], strict=True))
    return tensor if reach < 2**31 else tensor.contiguous()
