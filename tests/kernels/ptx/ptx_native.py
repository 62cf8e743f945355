"""The CUDA C++ kernels as nvcc makes them, on the PTX machine: ``python ptx_native.py sm_80 bf16``.

The emulated library's launchers prepare the launches, and the machine runs them instead of the fibers. The
chosen part of the battery that CI runs; all: ``SEGVIT_PTX=sm_80 pytest -k cuda tests/kernels``. In a
process without interpreter. Says which kernels no case launched, and fails where there is one.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from segvit_kernels import _library, _native
from segvit_kernels.testing import ptx

ROOT = Path(__file__).resolve().parents[3]
os.environ.setdefault(
    "SEGVIT_KERNELS_CUDA_EMULATOR", str(ROOT / "build" / "native" / "libsegvit_emulated.so")
)
os.environ.setdefault("SEGVIT_KERNELS_BACKEND", "eager")
sys.path[:0] = [str(ROOT / folder) for folder in ("tests/kernels/ptx", "tests/kernels", "tests/csrc", "csrc")]

resources, ptx_coverage = (importlib.import_module(name) for name in ("resources", "ptx_coverage"))
BY_ID = importlib.import_module("backends").BY_ID
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class _Memory(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_int64))


class _Launch(ctypes.Structure):
    """As in csrc/cuda/emulator.h."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
        ("sizes", ctypes.POINTER(ctypes.c_uint64)),
        ("parameter_count", ctypes.c_uint64),
        ("memory", ctypes.POINTER(_Memory)),
        ("memory_count", ctypes.c_uint64),
    )


_HOOK = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Launch))


def missing() -> str | None:
    """Why the kernels cannot run here, or ``None``."""
    return resources.missing() or _library.why_not("cuda", "cpu")


@functools.cache
def modules(arch: str) -> dict[str, tuple[str, str]]:
    """Name in PTX and the PTX of its source, by the name that the host's compiler gives a kernel."""
    found = {}
    for text in resources.ptx(arch.removeprefix("sm_")):
        for name in re.findall(r"\.entry (\w+)\(", text):
            found[re.sub(r"\d+_GLOBAL__N__\w{8}_\d+_\w+?_cu_\w{8}", "12_GLOBAL__N_1", name)] = name, text
    return found


@functools.cache
def _symbols(library: str) -> dict[int, str]:
    """Functions by address, where the library lies now."""
    command = ["nm", "--defined-only", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    offsets = {name: int(at, 16) for at, _, name in map(str.split, text.splitlines())}
    known = "segvit_emulator_hook"
    base = ctypes.cast(ctypes.CDLL(library)[known], ctypes.c_void_p).value - offsets[known]
    return {base + at: name for name, at in offsets.items()}


@functools.cache
def kernel_name(entry: str) -> str:
    """Without namespaces, template arguments and parameters."""
    return re.sub(r"<.*", "", resources.demangled([entry])[0])


@contextlib.contextmanager
def machine(
    arch: str, edit: Callable[[str, str], str] | None = None, noise: int | None = None
) -> Iterator[ptx.Session]:
    """Backend "cuda" on CPU tensors runs the kernels that nvcc compiled for ``arch``: "sm_80"."""
    library = str(_native._emulator().path)
    session, symbols, compiled = ptx.Session(arch, edit, noise=noise), _symbols(library), modules(arch)
    said: list[ctypes.Array] = []

    def run(launch: _Launch) -> int | None:
        entry, text = compiled[symbols[launch.kernel]]
        count = range(launch.parameter_count)
        values = [ctypes.string_at(launch.parameters[i], launch.sizes[i]) for i in count]
        parts = (launch.memory[i] for i in range(launch.memory_count))
        memory = [
            torch.frombuffer((ctypes.c_uint8 * part.size).from_address(part.address), dtype=torch.uint8)
            for part in parts
        ]
        try:
            session.launch(
                text, entry, (*launch.grid,), (*launch.block,), values, launch.shared_bytes, memory
            )
        except Exception as error:  # nothing passes through C++ but a message
            said[:] = [ctypes.create_string_buffer(f"{type(error).__name__}: {error}".encode())]
            return ctypes.addressof(said[0])
        return None

    hook = _HOOK(lambda launch: run(launch.contents))
    variable = "SEGVIT_KERNELS_EMULATED_CAPABILITY"
    before = os.environ.get(variable)
    os.environ[variable] = arch.removeprefix("sm_")
    ctypes.CDLL(library).segvit_emulator_hook(hook)
    try:
        yield session
    finally:
        ctypes.CDLL(library).segvit_emulator_hook(_HOOK())
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


def check_atm(dtype: torch.dtype) -> None:
    from test_atm import SMALL, check

    for dim in (32, 64, 128):
        check(dataclasses.replace(SMALL, heads=1, broadcast=True, head_dim=dim), dtype, BY_ID["cuda"])


def check_query_attention(dtype: torch.dtype) -> None:
    from test_query_attention import BY_NAME, check

    check(BY_NAME["odd"], dtype, BY_ID["cuda"])


def check_key_padding(dtype: torch.dtype) -> None:
    from test_key_padding import CASES, check

    for dim in (32, 64, 128):
        check(dataclasses.replace(CASES[0], heads=1, head_dim=dim), "atm", dtype, "cuda")


def check_mask_binarize(dtype: torch.dtype) -> None:
    from test_mask_binarize import FEW, check

    check(FEW[2], dtype, BY_ID["cuda"])


def check_mask_loss(dtype: torch.dtype) -> None:
    from test_mask_loss import BY_NAME, test_case, test_labels_of_any_integer_dtype, test_matching_cost

    for name in ("stacked", "matched_labels", "bool_masks", "soft_masks"):
        test_case(BY_NAME[name], BY_ID["cuda"], dtype, None)
    test_matching_cost(BY_NAME[name], dtype, BY_ID["cuda"], None)
    for labels in (torch.uint8, torch.int32):
        test_labels_of_any_integer_dtype(labels, BY_ID["cuda"], None)


def check_semantic_argmax(dtype: torch.dtype) -> None:
    from test_semantic_argmax import BY_NAME, check

    from segvit_kernels.testing.semantic_argmax import SemanticCase

    for kind in {dtype, torch.float32}:  # with tensor cores and without
        check("odd", BY_NAME["odd"].inputs(kind, concentrated=True), BY_ID["cuda"])
    for classes in (70, 150, 171):
        case = SemanticCase("classes", ((1, 4, 5),), 33, classes, (11, 19))
        check(case.name, case.inputs(dtype), BY_ID["cuda"])


def check_subsample_norm(dtype: torch.dtype) -> None:
    from test_subsample_norm import BY_NAME, check

    for name in ("few_channels", "odd_grid"):
        check(BY_NAME[name], dtype, BY_ID["cuda"])


def check_mask_iou(dtype: torch.dtype) -> None:
    from test_mask_iou import BY_NAME, check

    for name, soft in (("targets", False), ("as_they_are", True)):
        check(BY_NAME[name], dtype, BY_ID["cuda"], soft)


def check_panoptic_argmax(dtype: torch.dtype) -> None:
    from test_panoptic_argmax import BY_NAME, check

    for name in ("odd", "mask2former"):
        check(BY_NAME[name], dtype, BY_ID["cuda"], planted=True)


CHECKS = (
    check_atm,
    check_query_attention,
    check_key_padding,
    check_mask_binarize,
    check_mask_loss,
    check_semantic_argmax,
    check_panoptic_argmax,
    check_mask_iou,
    check_subsample_norm,
)


def main(arch: str, *names: str) -> int:
    from test_native_compiles import KERNELS

    if reason := missing():
        print(f"CUDA C++ kernels: skipped: {reason}")
        return 0
    failed = 0
    with machine(arch) as session:
        for name in names or DTYPES:
            for check in CHECKS:
                begin, what = time.process_time(), f"{arch} {name} {check.__name__.removeprefix('check_')}"
                try:
                    check(DTYPES[name])
                    result = "ok"
                except (AssertionError, RuntimeError) as error:
                    result, failed = f"FAILED: {error}", failed + 1
                print(f"{what}: {result} ({time.process_time() - begin:.1f} s of CPU)", flush=True)
        ptx_coverage.record(session)
    if names:
        never = set().union(*KERNELS.values()) - {kernel_name(entry) for entry in session.launches}
    else:  # each with its template's arguments
        entries = ptx_coverage.of_nvcc(arch)
        never = {entries[entry][0] for entry in entries.keys() - session.launches.keys()}
    print(
        f"{len(session.launches)} kernels, {sum(session.launches.values())} launches; never: {sorted(never)}"
    )
    return failed + len(never)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
