"""Launches on the machine: Triton's JIT on CPU tensors, PTX on CPU tensors."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segvit_kernels.testing.ptx.core import SHARED_MEMORY, Span, execute, program
from segvit_kernels.testing.ptx.faults import Fault
from segvit_kernels.testing.ptx.traffic import Counts

_MULTIPROCESSORS = {80: 108, 90: 132}
_active: Session | None = None


@dataclasses.dataclass
class Session:
    """What runs on the machine inside a ``with`` block of :func:`machine`.

    Args:
        arch: ``sm_80`` or ``sm_90``.
        edit: changes the PTX of a kernel, by name, before it runs; for tests of the machine.
        traffic: whether bytes and bank conflicts are counted too.
        noise: seed of the errors of approximate instructions; ``None``: they have none.

    Attributes:
        launches: kernels by name, and how often they were launched.
        counts: of all launches, by kernel.
        variants: how often each kernel was launched, by the dtypes of its tensors and a digest of its PTX.
    """

    arch: str
    edit: Callable[[str, str], str] | None = None
    traffic: bool = False
    noise: int | None = None
    launches: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    counts: dict[str, Counts] = dataclasses.field(default_factory=dict)
    variants: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @property
    def capability(self) -> int:
        """90 for sm_90."""
        return int(self.arch.removeprefix("sm_"))

    def launch(
        self,
        text: str,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int | tuple[int, int, int],
        arguments: Sequence[Any],
        shared_bytes: int,
        memory: Sequence[Tensor] = (),
    ) -> None:
        """One launch, as of :func:`run_ptx`."""
        if self.edit is not None:
            text = self.edit(kernel, text)
        options = {"traffic": self.traffic, "noise": self.noise}
        counts = run_ptx(text, kernel, grid, threads, arguments, shared_bytes, memory, **options)
        self.launches[kernel] += 1
        dtypes = frozenset(a.dtype for a in arguments if isinstance(a, Tensor))
        self.variants[kernel, dtypes, _digest(text)] += 1
        total = self.counts.setdefault(kernel, Counts())
        total += counts


@functools.cache
def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def extent(tensor: Tensor) -> tuple[int, int]:
    """Address of a tensor's first byte, and bytes to the end of its last element."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def run_ptx(
    text: str,
    kernel: str,
    grid: tuple[int, int, int],
    threads: int | tuple[int, int, int],
    arguments: Sequence[Any],
    shared_bytes: int = 0,
    memory: Sequence[Tensor] = (),
    traffic: bool = False,
    noise: int | None = None,
) -> Counts:
    """Run a kernel of PTX text on CPU tensors.

    Args:
        text: a module, as a compiler gives it.
        kernel: the entry's name.
        grid: blocks along x, y and z.
        threads: of a block.
        arguments: tensors (their addresses are passed), ints, floats, ``None`` (a null pointer), or bytes for
            a parameter of any other type; in the order of the kernel's parameters. What is not given is zero.
        shared_bytes: dynamic shared memory.
        memory: tensors that it may touch besides, whose addresses stand in ``bytes`` or in other tensors.
        traffic: whether bytes and bank conflicts are counted too, which takes longer.
        noise: seed of errors that approximate instructions of float32 make (``ex2.approx``, ``rcp.approx``,
            ``div.full``, …), as far as PTX allows; ``None``: as NumPy rounds.

    Returns:
        what was executed.

    Raises:
        Fault: the kernel did what it must not do.
        PTXError: it holds something that the machine does not know.
    """
    parsed = program(text, kernel).kernel
    names = list(parsed.parameters)
    if len(arguments) > len(names):
        raise Fault("launch", f"{len(arguments)} arguments for {len(names)} parameters", kernel)
    data = bytearray(max((o + s for o, s in parsed.parameters.values()), default=0))
    spans = [Span(*extent(tensor), f"memory {index}", tensor) for index, tensor in enumerate(memory)]
    for index, (name, value) in enumerate(zip(names, arguments, strict=False)):
        offset, size = parsed.parameters[name]
        if isinstance(value, Tensor):
            spans.append(Span(*extent(value), f"argument {index}", value))
            value = value.data_ptr()
        data[offset : offset + size] = _bytes(value, size, name, parsed)
    block = (threads, 1, 1) if isinstance(threads, int) else threads
    if not math.prod(grid):
        return Counts()
    return execute(text, kernel, grid, block, bytes(data), spans, shared_bytes, traffic, noise)


def _bytes(value: Any, size: int, name: str, kernel: Any) -> bytes:
    if value is None:
        return bytes(size)
    if isinstance(value, bytes):
        if len(value) != size:
            raise Fault("launch", f"{len(value)} bytes for {name}, which has {size}", kernel.name)
        return value
    if isinstance(value, float):
        return struct.pack({8: "<d", 4: "<f", 2: "<e"}[size], value)
    return (int(value) % 2 ** (8 * size)).to_bytes(size, "little")


# Triton.


class _Utilities:
    """What Triton's runtime asks of the driver."""

    def __init__(self) -> None:
        self.binaries: list[tuple[str, str, int]] = []

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        self.binaries.append((name, binary.decode(), shared))
        return (len(self.binaries), len(self.binaries) - 1, 0, 0, 1024)

    def unload_module(self, module: Any) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 1024 * SHARED_MEMORY.get(device, 99),
            "multiprocessor_count": _MULTIPROCESSORS.get(device, 108),
            "warpSize": 32,
            "max_num_regs": 65536,
        }


_UTILITIES = _Utilities()


def _driver(session: Session) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import GPUDriver

    utilities = _UTILITIES

    class Launcher:
        """In place of the launcher that Triton compiles."""

        def __init__(self, src: Any, metadata: Any) -> None:
            self.src, self.metadata = src, metadata
            self.signature = list(src.signature.values())

        def __call__(self, x: int, y: int, z: int, stream: Any, function: int, *rest: Any) -> None:
            _, launch_metadata, enter, leave, *arguments = rest
            if enter:
                enter(launch_metadata)
            self._check_hints(arguments)
            given = list(_run_time(self.signature, arguments))
            grid = (x, y, z)
            for size in (self.metadata.global_scratch_size, self.metadata.profile_scratch_size):
                given.append(torch.empty(size * math.prod(grid), dtype=torch.uint8) if size else None)
            name, text, shared = utilities.binaries[function]
            # Triton keeps launchers with their kernels: this one may be of an earlier session.
            assert _active is not None, "a launch outside the machine's with block"
            _active.launch(text, name, grid, 32 * self.metadata.num_warps, given, shared)
            if leave:
                leave(launch_metadata)

        def _check_hints(self, arguments: Sequence[Any]) -> None:
            for path, hints in (getattr(self.src, "attrs", None) or {}).items():
                if not hints:
                    continue
                value: Any = arguments
                for step in path:
                    value = value[step]
                number = value.data_ptr() if isinstance(value, Tensor) else value
                for hint, divisor in hints:
                    if hint == "tt.divisibility" and isinstance(number, int) and number % divisor:
                        name = self.src.fn.arg_names[path[0]]
                        detail = f"{name} is {number}, compiled as divisible by {divisor}"
                        raise Fault("launch", detail, self.metadata.name)

    class Driver(GPUDriver):
        """A GPU whose number is its architecture's, so that Triton keeps kernels of each apart."""

        def __init__(self) -> None:
            self.utils, self.launcher_cls = utilities, Launcher
            self.get_current_device = lambda: session.capability
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=None: divmod(session.capability, 10)
            self.set_current_device = lambda device: None

        @staticmethod
        def is_active() -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", session.capability, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_device_interface(self) -> Any:
            return torch.cpu

        def get_benchmarker(self) -> Any:
            raise RuntimeError("the PTX machine has no clock")

        def get_empty_cache_for_benchmark(self) -> Any:
            raise RuntimeError("the PTX machine has no clock")

        def clear_cache(self, cache: Any) -> None:
            pass

    return Driver()


def _run_time(signature: Sequence[Any], arguments: Sequence[Any]) -> Iterator[Any]:
    """Arguments that are no constants, tuples laid flat."""
    for kind, value in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _run_time(kind, value)
        elif kind != "constexpr":
            yield value


def _stages(
    backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None
):
    """A hook of Triton's compiler: PTX stays what it is instead of going to ptxas."""
    if stages is None:
        return "ptx machine", "ptx machine"
    stages["cubin"] = lambda text, metadata: text.encode()
    return None


@contextlib.contextmanager
def machine(
    arch: str = "sm_90",
    *,
    edit: Callable[[str, str], str] | None = None,
    traffic: bool = False,
    noise: int | None = None,
) -> Iterator[Session]:
    """Triton kernels launched on CPU tensors are compiled for ``arch`` and run on the machine.

    Operators of this project take the Triton backend on the CPU, with the parameters of ``arch``; any other
    Triton kernel is launched as usual, with CPU tensors.

    Args:
        arch: ``sm_80`` or ``sm_90``, or another that Triton compiles for with the same instructions.
        edit: takes a kernel's name and PTX, returns the PTX to run; for tests of the machine.
        traffic: whether bytes and bank conflicts are counted too, which takes longer.
        noise: as of :func:`run_ptx`.

    Raises:
        RuntimeError: this process has Triton's interpreter, or a machine is running.
    """
    global _active
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is 1: the PTX machine needs Triton's compiler")
    if _active is not None:
        raise RuntimeError("a machine is running")
    from triton import knobs
    from triton.runtime import driver

    _active = session = Session(arch, edit, traffic, noise)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segvit-kernels" / "ptx"
    before = (knobs.cache.dir, knobs.runtime.add_stages_inspection_hook)
    with contextlib.ExitStack() as stack:
        previous = driver._active
        driver.set_active(_driver(session))
        # Not among the kernels that ptxas has seen; TRITON_CACHE_DIR says where else.
        knobs.cache.dir = os.environ.get("SEGVIT_PTX_CACHE", str(root))
        knobs.runtime.add_stages_inspection_hook = _stages
        stack.enter_context(_our_operators(session))
        try:
            yield session
        finally:
            _active = None
            knobs.cache.dir, knobs.runtime.add_stages_inspection_hook = before
            driver._active = previous


@contextlib.contextmanager
def _our_operators(session: Session) -> Iterator[None]:
    """They take CPU tensors to the Triton backend."""
    from segvit_kernels import _library
    from segvit_kernels.triton import _launch

    others, preferred, gpu = _library.why_not, _library._PREFERRED["cpu"], _launch._gpu

    def why_not(name: str, device: Any) -> str | None:
        return None if name == "triton" and torch.device(device).type == "cpu" else others(name, device)

    shape = _launch._GPU(session.arch, _MULTIPROCESSORS.get(session.capability, 108))
    _library.why_not, _library._PREFERRED["cpu"] = why_not, ("triton",)
    _launch._gpu = lambda device: shape
    for operator in _library.operators():
        operator.defaults.clear()
    try:
        yield
    finally:
        _library.why_not, _library._PREFERRED["cpu"], _launch._gpu = others, preferred, gpu
        for operator in _library.operators():
            operator.defaults.clear()
