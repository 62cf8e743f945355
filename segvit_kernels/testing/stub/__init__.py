"""Triton's real launcher on a stub of libcuda: the whole host path of a kernel launch, without a GPU.

In a process of its own::

    from segvit_kernels.testing import stub

    gpu = stub.install()  # before the first launch; or install("sm_89", multiprocessors=128)
    query = torch.randn(2, 150, 8, 32)  # on the CPU
    fused_atm(query, ...)  # compiled for sm_90 by the JIT, cached, launched; the outputs stay uninitialised

From then on CPU tensors take the Triton backend: the JIT binds and specialises their arguments, compiles
with the installed ptxas, keeps the result in Triton's cache (``TRITON_CACHE_DIR``; a GPU of that architecture
finds it there) and calls the launcher, which calls the stub, which counts (:attr:`Stub.launches`) and, inside
:meth:`Stub.record`, notes every launch with the values of its parameters. No kernel runs: nothing computed
from an output means anything.

:attr:`Stub.device` and :attr:`Stub.stream` are what launches believe to be current. ``torch.cuda`` still sees
no device; code that asks it for one runs inside :func:`segvit_kernels.testing.stub.torch_cuda.pretended`.

Needs Linux, a C compiler (``CC``, else ``cc``) and the headers of Python, as Triton itself does. The compiled
stub is kept in ``$XDG_CACHE_HOME/segvit-kernels``.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

_SOURCE = Path(__file__).with_name("libcuda.c")
_SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}  # KiB a program
_installed: Stub | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """One launch as the driver saw it.

    Args:
        name: of the kernel.
        programs: of the grid.
        threads: of one program.
        shared: bytes of dynamic shared memory.
        stream: handle of the stream.
        parameters: the kernel's parameters in order: little-endian bytes of each.
    """

    name: str
    programs: int
    threads: int
    shared: int
    stream: int
    parameters: tuple[bytes, ...]


class Stub:
    """The GPU that is not there: what it pretends to be and what was launched on it."""

    def __init__(self, library: ctypes.CDLL, arch: str, multiprocessors: int, name: str) -> None:
        capability = int(arch.removeprefix("sm_"))
        self.arch = arch
        self.capability = divmod(capability, 10)
        self.multiprocessors = multiprocessors
        self.name = name
        self.device = 0
        """Index of the current device; to be set freely."""
        self.stream = 0
        """Handle of the current stream; to be set freely."""
        self._library = library
        self._count = ctypes.c_long.in_dll(library, "stub_launches")
        (ctypes.c_int * 2).in_dll(library, "stub_capability")[:] = [*self.capability]
        ctypes.c_int.in_dll(library, "stub_multiprocessors").value = multiprocessors
        self.shared_memory = 1024 * _SHARED_MEMORY.get(capability, 99)
        ctypes.c_int.in_dll(library, "stub_shared_memory").value = self.shared_memory
        library.stub_recorded.restype = ctypes.c_long
        library.stub_name.restype = library.stub_parameter.restype = ctypes.c_void_p
        library.stub_stream.restype = ctypes.c_uint64

    @property
    def launches(self) -> int:
        """Launches so far, recorded or not."""
        return self._count.value

    @property
    def properties(self) -> SimpleNamespace:
        """What ``torch.cuda.get_device_properties`` says of such a GPU, as far as this project asks."""
        major, minor = self.capability
        return SimpleNamespace(
            name=self.name,
            major=major,
            minor=minor,
            multi_processor_count=self.multiprocessors,
            total_memory=80 * 2**30,
            L2_cache_size=50 * 2**20,
            shared_memory_per_block_optin=self.shared_memory,
            regs_per_multiprocessor=65536,
            warp_size=32,
        )

    @contextlib.contextmanager
    def record(self) -> Iterator[list[Record]]:
        """Note the launches inside the ``with`` block; the list that it yields fills when the block ends."""
        library = self._library
        found: list[Record] = []
        recording = ctypes.c_int.in_dll(library, "stub_recording")
        library.stub_forget()
        recording.value = 1
        try:
            yield found
        finally:
            recording.value = 0
            for i in map(ctypes.c_long, range(library.stub_recorded())):
                parameters = tuple(
                    ctypes.string_at(library.stub_parameter(i, k), library.stub_size(i, k))
                    for k in range(library.stub_parameters(i))
                )
                name = ctypes.string_at(library.stub_name(i)).decode()
                numbers = (library.stub_grid(i), library.stub_threads(i), library.stub_shared(i))
                found.append(Record(name, *numbers, library.stub_stream(i), parameters))
            library.stub_forget()


def _compile() -> Path:
    """The folder of the compiled stub, built where it is not yet."""
    cc = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if cc is None:
        raise RuntimeError("the stub of libcuda needs a C compiler: install gcc or set CC")
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segvit-kernels"
    folder = root / f"stub-{digest}"
    if not (folder / "libcuda.so.1").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as temporary:
            built = Path(temporary) / "libcuda.so.1"
            command = [
                cc,
                "-O2",
                "-shared",
                "-fPIC",
                "-Wl,-soname,libcuda.so.1",
                "-o",
                str(built),
                str(_SOURCE),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{cc} does not compile {_SOURCE}: {done.stderr[-2000:]}")
            built.replace(folder / "libcuda.so.1")  # whole or not at all, whoever builds at the same time
    return folder


def _driver(stub: Stub) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):
        """Triton's own driver, but for what it asks torch."""

        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_current_device = lambda: stub.device
            self.get_current_stream = lambda device: stub.stream
            self.get_device_capability = lambda device=None: stub.capability

        def set_current_device(self, device: int) -> None:
            stub.device = device

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 10 * stub.capability[0] + stub.capability[1], 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    return Driver()


def install(arch: str = "sm_90", *, multiprocessors: int = 132, name: str = "stub of an NVIDIA GPU") -> Stub:
    """Make this process launch Triton kernels on CPU tensors as if a GPU were there; for good.

    Args:
        arch: what the GPU is to be: ``sm_80`` and up.
        multiprocessors: how many it has.
        name: what :attr:`Stub.properties` calls it.

    Raises:
        RuntimeError: this process has a GPU or Triton's interpreter, there is no compiler, or another stub is
            installed.
    """
    global _installed
    if _installed is not None:
        raise RuntimeError(f"a stub of {_installed.arch} is installed in this process")
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "" and torch.cuda.is_available():
        raise RuntimeError("this machine has a GPU: hide it from the stub of libcuda, CUDA_VISIBLE_DEVICES=")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is 1: the stub of libcuda needs Triton's compiler")
    # torch's CUDA runtime asks the stub too, gets no answer, and says so once.
    warnings.filterwarnings("ignore", "CUDA initialization", UserWarning)
    folder = _compile()
    # By its soname the launcher finds this one, which is loaded already.
    library = ctypes.CDLL(str(folder / "libcuda.so.1"))
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    _installed = Stub(library, arch, multiprocessors, name)

    from triton.runtime import driver

    driver.set_active(_driver(_installed))
    _take_cpu_tensors(_installed)
    return _installed


def _take_cpu_tensors(stub: Stub) -> None:
    """CPU tensors take the Triton backend, with the parameters of the stub's architecture."""
    from segvit_kernels import _library
    from segvit_kernels.triton import _launch

    others = _library.why_not
    _library.why_not = lambda name, device: (
        None if name == "triton" and torch.device(device).type == "cpu" else others(name, device)
    )
    _library._PREFERRED["cpu"] = ("triton",)
    for operator in _library.operators():
        operator.defaults.clear()
    vars(_launch)["_gpu"] = lambda device: _launch._GPU(stub.arch, stub.multiprocessors)
