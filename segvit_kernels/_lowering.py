"""Exported programs that call the native library's operators, for where there is no Python.

A program of ``torch.export`` calls ``segvit::atm_fwd``, which finds its backend in Python. The native library
defines and implements the same operators as ``segvit_native::atm_fwd``: what calls those runs wherever the
library is loaded, ahead-of-time compiled code in a C++ program too.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from segvit_kernels import _library, _native

_BACKENDS = {"cpu": "cpu", "cuda": "cuda"}  # by type of device


def native_library(device: torch.device | str = "cpu") -> Path:
    """The native library's file, for programs that take it along.

    Args:
        device: on whose tensors its operators have to run.

    Raises:
        BackendUnavailableError: it is not there or cannot run there; the message says why and what mends it.
    """
    device = torch.device(device)
    reason: str | None = f"no native kernels for {device.type} tensors"
    if device.type in _BACKENDS:
        reason = _library.why_not(_BACKENDS[device.type], device)
    if reason is not None:
        raise _library.BackendUnavailableError(f"the native library cannot be used: {reason}")
    return _native.library().path


def load_native_copy(path: Path) -> None:
    """Load the copy of the native library that came with a program, where this package has none of its own.

    Raises:
        BackendUnavailableError: it does not load, or what is loaded already is of another version.
    """
    if reason := _native.load_copy(path):
        raise _library.BackendUnavailableError(f"its operators cannot be used: {reason}")


def lower_to_native(program: torch.export.ExportedProgram) -> list[str]:
    """Let an exported program call the native library's operators in place of this package's, in place.

    Whoever runs it has loaded the library first: ``torch.ops.load_library(native_library())``, or ``dlopen``.

    Returns:
        the names of the operators it calls, each once.

    Raises:
        BackendUnavailableError: the native library is not there, or lacks an operator.
        TypeError, ValueError: its kernels cannot take a call's arguments.
    """
    found: dict[str, None] = {}
    for module in program.graph_module.modules():
        if not isinstance(module, GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op == "call_function" and getattr(node.target, "namespace", "") == _native.NAMESPACE:
                found[_lower(node)] = None
        module.recompile()
    return list(found)


def _lower(node: Node) -> str:
    """Change one call; the operator's name."""
    # The exporter leaves out what stands at the end with its default.
    operator, found, _ = _library.called(node.target, node.args, node.kwargs)
    name, arguments = operator.name, tuple(found)
    values: Any = torch.fx.node.map_arg(arguments, lambda argument: argument.meta["val"])
    device = _library.device_of(values)
    native_library(device)
    backend = _BACKENDS[device.type]
    if reason := operator.why_not(backend, device):
        raise _library.BackendUnavailableError(f"segvit::{name}: {reason}")
    if error := operator.refuse(backend, *values) if operator.refuse else None:
        raise error
    node.target = _described(name, device)
    node.args = arguments
    node.kwargs = {}
    return name


@functools.cache
def _described(name: str, device: torch.device) -> Any:
    """The native library's operator, with the shapes of its results, which compilers ask for."""
    native: Any = _native.implementation(_BACKENDS[device.type], name, device)
    operator = getattr(getattr(torch.ops, _native.NAMESPACE), name).default
    torch.library.register_fake(native._schema.name, lambda *args: operator(*args))
    return native
