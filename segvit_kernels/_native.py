"""The native library (sources in csrc/): finds it, loads it once, and says why it is not there.

``make native`` builds it in a source tree; installing with SEGVIT_KERNELS_NATIVE=1 builds it too.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

NAMESPACE = "segvit"
"""Of the operators in ``torch.ops``; csrc/hub.py writes another."""

LIBRARY_VARIABLE = "SEGVIT_KERNELS_LIBRARY"
"""Environment variable: path of a native library to load instead of the package's own."""

EMULATOR_VARIABLE = "SEGVIT_KERNELS_CUDA_EMULATOR"
"""Environment variable: path of the CUDA kernels built to run on the CPU, for tests."""

ISA_VARIABLE = "SEGVIT_KERNELS_ISA"
"""Environment variable: the instruction set of the CPU kernels, one that this processor runs."""

BUILD = (
    "it is for Linux"
    if sys.platform != "linux"
    else "build it in a source tree: `make native`, or `SEGVIT_KERNELS_NATIVE=1 pip install "
    "--no-build-isolation .`"
)
SCHEMAS: dict[str, str] = {}
"""The operators' schemas by name, as `segvit_kernels._library` registers them."""


def _text(library: ctypes.CDLL, what: str) -> str:
    """What a library tells of itself; empty if it is older than the question."""
    function = getattr(library, f"segvit_native_{what}", None)
    if function is None:
        return ""
    function.restype = ctypes.c_char_p
    return function().decode()


def _stale(path: Path, library: ctypes.CDLL) -> str | None:
    """Why a library does not belong to this package: other arguments of an operator, or, in a source tree,
    other sources; ``None`` if it does. Its code would run and compute something else."""
    schemas = hashlib.sha256("\n".join(sorted(SCHEMAS.values())).encode()).hexdigest()[:16]
    if _text(library, "schemas") != schemas:
        return f"{path} was built for another version of this package: {BUILD}"
    build = Path(__file__).resolve().parents[1] / "csrc" / "build.py"
    if build.is_file():
        spec = importlib.util.spec_from_file_location("segvit_native_build", build)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if _text(library, "sources") != module.sources_hash():
            return f"{path} was built from other sources than those in {build.parent}: {BUILD}"
    return None


class _Library:
    """A loaded library, or the reason why there is none."""

    def __init__(self, path: Path, missing: str) -> None:
        self.path = path
        self.reason: str | None = None
        self.isa = self.cuda_archs = ""
        self.isas: list[str] = []
        if not path.is_file():
            self.reason = missing
            return
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            self.reason = f"{path} does not load into torch {torch.__version__}: {error}"
            return
        inside = ctypes.CDLL(str(path))
        self.reason = _stale(path, inside)
        self.isa = _text(inside, "isa")
        self.isas = _text(inside, "isas").split()
        asked = os.environ.get(ISA_VARIABLE)
        if self.reason is None and asked and asked not in self.isas:
            here = ", ".join(self.isas)
            self.reason = f"{ISA_VARIABLE} is {asked!r}, expected what this processor runs: {here}"
        self.cuda_archs = _text(inside, "cuda_archs")


@functools.cache
def library() -> _Library:
    """The native library; loaded at the first call."""
    path = os.environ.get(LIBRARY_VARIABLE)
    if path:
        return _Library(Path(path), f"{LIBRARY_VARIABLE} is {path}, and there is no such file")
    own = Path(__file__).with_name("libsegvit_native.so")
    return _Library(own, f"the native library is not built: {BUILD}")


def load_copy(path: Path) -> str | None:
    """Load a copy of the library, which binds what no other has bound before; why it cannot be used here."""
    own = library()  # comes first
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load into torch {torch.__version__}: {error}"
    if own.path.is_file() and _text(ctypes.CDLL(str(own.path)), "schemas") != _text(
        ctypes.CDLL(str(path)), "schemas"
    ):
        return f"{own.path} is of another version"
    return None


@functools.cache
def _emulator() -> _Library:
    path = os.environ.get(EMULATOR_VARIABLE)
    missing = f"{EMULATOR_VARIABLE} is {path}, and there is no such file"
    return _Library(Path(path or ""), missing if path else "runs on CUDA tensors, not on CPU tensors")


def _contains(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether a library for ``archs`` has code for a GPU: machine code of its own chip ("90a"), of its family
    ("100f"), of an earlier one of its generation, or PTX, which csrc/build.py adds for the newest without a
    letter."""
    gpu = capability[0] * 10 + capability[1]
    exact = {int(arch[:-1]) for arch in archs if arch.endswith("a")}
    family = [int(arch[:-1]) for arch in archs if arch.endswith("f")]
    plain = [int(arch) for arch in archs if arch.isdigit()]
    same = any(arch // 10 == gpu // 10 and arch <= gpu for arch in family + plain)
    return gpu in exact or same or (bool(plain) and max(plain) <= gpu)


def why_not(name: str, device: torch.device, capability: tuple[int, int] | None) -> str | None:
    """Why the native backend ``name``, "cpu" or "cuda", cannot run on tensors of ``device``.

    Args:
        capability: compute capability of the device, if it is an NVIDIA GPU.
    """
    if device.type not in {"cpu": ("cpu",), "cuda": ("cpu", "cuda")}[name]:
        return f"runs on {name.upper()} tensors, not on {device.type} tensors"
    if name == "cuda" and device.type == "cpu":
        return _emulator().reason
    found = library()
    if found.reason is not None or name == "cpu":
        return found.reason
    if torch.version.hip is not None:
        return "runs on NVIDIA GPUs"
    if not found.cuda_archs:
        return "the native library was built without nvcc: install the CUDA toolkit and build it again"
    if capability is not None and not _contains(found.cuda_archs.split(";"), capability):
        return f"built for {found.cuda_archs}, this GPU has {capability[0]}.{capability[1]}"
    return None


def _qualified(name: str, operator: str, device: torch.device) -> str:
    emulated = name == "cuda" and device.type == "cpu"
    return f"{NAMESPACE}_{'emulated' if emulated else 'native'}::{operator}"


def runs_isa(isa: str) -> bool:
    """Whether the CPU kernels in use are those of an instruction set or of a greater one."""
    found = library()
    return found.reason is None and isa in found.isas[: found.isas.index(found.isa) + 1]


def why_not_operator(name: str, operator: str, device: torch.device, isa: str | None) -> str | None:
    """Why a loaded library cannot run one operator: it may be older than this package, or built in part, or
    the operator's CPU code is for processors with ``isa`` alone."""
    key = device.type.upper()
    if not torch._C._dispatch_has_kernel_for_dispatch_key(_qualified(name, operator, device), key):
        return f"the native library has no {operator} for {device.type} tensors: {BUILD}"
    if name == "cpu" and isa is not None and not runs_isa(isa):
        return f"{operator} needs {isa}; the CPU code in use is {library().isa}"
    return None


def implementation(name: str, operator: str, device: torch.device) -> Callable:
    """The operator in a backend's native code; it takes the schema's arguments."""
    namespace, _, operator = _qualified(name, operator, device).partition("::")
    return getattr(getattr(torch.ops, namespace), operator).default
