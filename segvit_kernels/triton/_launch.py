"""Kernel launches as data, and the pinned launch parameters.

A :class:`Launch` holds everything that one kernel launch needs. Launchers run it on real tensors; the
compile gate builds the same ``Launch`` from meta tensors and compiles it for a GPU that is not there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch
import triton
from torch import Tensor

FALLBACK = "default"
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


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

    def __call__(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, **self.constants, **self._options())

    def _options(self) -> dict[str, Any]:
        # Triton 3.10 turns the fusion of multiplications and additions off unless asked.
        return {**self.options, "enable_fp_fusion": True}

    def compile(self, target: Any) -> Any:
        """Compile for ``target`` (``triton.backends.compiler.GPUTarget``), specialised as a call would be."""
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, {}, {}
        for index, name in enumerate(self.kernel.arg_names):
            value = self.constants[name] if name in self.constants else self.arguments[name]
            if name in self.constants or value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[(index,)] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name] = _POINTERS[value.dtype]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=self._options())


def run(launches: Sequence[Launch]) -> None:
    """Run the launches in order."""
    for launch in launches:
        launch()


@functools.cache
def architecture(device: torch.device) -> str:
    """The name under which a device's parameters are pinned: ``sm_90``, ``gfx942``; asks the driver once."""
    if device.type != "cuda":
        return FALLBACK
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def pinned(arch: str) -> dict[str, Any]:
    """The frozen launch parameters of ``arch``, or of the fallback where it has no file of its own."""
    folder = resources.files("segvit_kernels.triton") / "configs"
    path = folder / f"{arch}.json"
    return json.loads((path if path.is_file() else folder / f"{FALLBACK}.json").read_text())
