"""Programs compiled ahead of time by AOTInductor: C++ from uint8 pictures to label maps, our operators fused.

One file, `segvit.inference.engine`'s function for one size and batch. Every operator of `segvit_kernels` in
it is one call of the native library, of which the file holds a copy: another machine of the same kind runs it
without this package, and without Python. It asks for the same version of libtorch and for the processor that
it was compiled on, or one with the same instructions.

The file is PyTorch's archive, a zip. Beside what PyTorch puts there it has

- `segvit/libsegvit_native.so`: the operators, which a program has to load first;
- `extra/metadata.json`: what all exported files say of themselves.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segvit.exporting.graph import Plan
from segvit.inference.passes import list_views
from segvit.model.segvit import SegViT
from segvit.system.files import atomic_write
from segvit.system.text import shown
from segvit_kernels import (
    BackendUnavailableError,
    PackedLinear,
    Views,
    load_native_copy,
    lower_to_native,
    native_library,
)

__all__ = ["LIBRARY", "METADATA", "Program", "build", "check", "load", "save"]

LIBRARY, METADATA = "segvit/libsegvit_native.so", "extra/metadata.json"
_NEEDS = "segvit/needs.json"
_INSTRUCTIONS = ("DEFAULT", "AVX2", "AVX512")  # each has those before it
# Of packed weights: what the processor has to have, as PyTorch calls it and as people do.
_PACKED = {
    "amx": ("amx_bf16", "AMX"),  # of files that older versions wrote
    "avx2": ("avx2", "AVX2"),
    "avx512_bf16": ("avx512_bf16", "AVX512-BF16"),
    "avx512_fp16": ("avx512_fp16", "AVX512-FP16"),
}


def check(plan: Plan) -> None:
    """Raise ValueError for what a program cannot do, or this machine not make."""
    if plan.size is None:
        raise ValueError("size: got none, expected height and width: a .pt2 is compiled for one size")
    if plan.batch is None:
        raise ValueError("batch: got any, expected a number: a .pt2 is compiled for one batch")
    if plan.outputs != "labels":
        raise ValueError(f"outputs: got {plan.outputs}, expected labels: a .pt2 gives nothing else")
    from torch._inductor import cpp_builder, exc  # slow to import

    try:
        native_library()
        cpp_builder.get_cpp_compiler()
    except BackendUnavailableError as error:
        raise ValueError(f"pt2: {error}") from None
    except exc.InvalidCxxCompiler:
        raise ValueError("pt2: there is no C++ compiler here: install one, or set CXX") from None


class Program(nn.Module):
    """The engine's function for a plan, on the device that the model is on.

    int8 is the engine's, which asks for AVX2 and no pictures; all else is bfloat16 there.
    """

    def __init__(self, model: SegViT, plan: Plan) -> None:
        super().__init__()
        assert plan.size is not None and plan.batch is not None
        dtype = torch.bfloat16 if plan.int8 else plan.dtype
        self.engine = model.compile_for_inference(
            plan.size, plan.batch, dtype=dtype, method="eager", int8=plan.int8, options=plan.options
        )
        self.function, self.channels_last = self.engine.function, plan.channels_last
        self.packed: set[str] = set()  # instruction sets that packed weights are for
        for module in self.function.modules():
            if isinstance(module, PackedLinear):
                self.packed.add(module.packed.value.isa)
                module.release(inexact=True)  # nothing but the packed weights is read
        if self.function.views is None:  # an empty list of tensors reaches the library as no list
            runs = self.function.runs
            views = list_views(plan.batch, plan.size, runs, [model.mask_grid(run.crop) for run in runs])
            self.function.views = Views(views, plan.batch, plan.size, self.engine.device)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.function(pictures.permute(0, 3, 1, 2) if self.channels_last else pictures)


def build(model: SegViT, plan: Plan) -> Program:
    """What `save` compiles."""
    return Program(model, plan)


def save(program: Program, path: Path, text: str) -> None:
    """Compile a program and write its file, with `text` in its metadata; half a minute and more.

    Raises:
        ValueError: the kernels do not take the model, or the compiler fails.
        OSError: the file cannot be written.
    """
    needs = _needs(program)
    try:
        library = native_library(program.engine.device)
    except BackendUnavailableError as error:
        raise ValueError(f"pt2: {error}") from None
    with tempfile.TemporaryDirectory(prefix="segvit-") as folder:
        made = Path(folder) / "program.pt2"  # the name is that of the archive's own folder too
        _compile(program, made, needs)
        with zipfile.ZipFile(made, "a") as archive:
            archive.write(library, f"program/{LIBRARY}")
            archive.writestr(f"program/{METADATA}", text)
            archive.writestr(f"program/{_NEEDS}", json.dumps(needs))
        atomic_write(path, lambda temporary: shutil.copyfile(made, temporary))


def _needs(program: Program) -> dict[str, str]:
    """What a program takes and asks of the machine that runs it; C++ programs see it too."""
    engine = program.engine
    height, width = map(str, engine.size)
    needs = {"batch": str(engine.batch), "height": height, "width": width, "device": engine.device.type}
    needs |= {"layout": "nhwc" if program.channels_last else "nchw"}
    needs |= {"torch": torch.__version__, "machine": platform.machine()}
    if engine.device.type == "cpu":
        needs |= {"instructions": torch.backends.cpu.get_cpu_capability()}
        return needs | ({"packed": ",".join(sorted(program.packed))} if program.packed else {})
    capability = "{}.{}".format(*torch.cuda.get_device_capability(engine.device))
    return needs | {"gpu": torch.cuda.get_device_name(engine.device), "capability": capability}


def _compile(program: Program, path: Path, needs: dict[str, str]) -> None:
    from torch._inductor import exc

    engine = program.engine
    shape = (*engine.size, engine.channels) if program.channels_last else (engine.channels, *engine.size)
    pictures = torch.zeros((engine.batch, *shape), dtype=torch.uint8, device=engine.device)
    with _quiet(), torch.no_grad():
        exported = torch.export.export(program, (pictures,))
        try:
            lower_to_native(exported)
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(path), inductor_configs={"aot_inductor.metadata": needs}
            )
        except TypeError as error:
            raise ValueError(f"pt2: {error}") from None
        except exc.InductorError as error:
            failure = error.inner_exception
            if not isinstance(failure, exc.CppCompileError):
                raise
            lines = [line.strip() for line in failure.output.splitlines() if line.strip()]
            line = next((line for line in lines if "error" in line), lines[0] if lines else "it says nothing")
            raise ValueError(f"pt2: the C++ compiler failed: {line}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's warning that there is no GPU, which nobody asked for."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Loaded:
    """A program, with its metadata as `text`."""

    def __init__(self, path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                found = {name.partition("/")[2]: name for name in archive.namelist()}
                self.text = archive.read(found[METADATA]).decode()
                needs = _texts(archive.read(found[_NEEDS]))
                library = archive.read(found[LIBRARY])
        except Exception as error:  # of a damaged archive zipfile raises whatever it stumbles over
            if isinstance(error, OSError) and error.filename is not None:
                raise
            raise ValueError(f"{path}: not a program that `segvit export` has written") from None
        if reason := _why_not_here(needs):
            raise ValueError(f"{path}: {reason}; export it again here")
        with tempfile.TemporaryDirectory(prefix="segvit-") as folder:
            carried = Path(folder) / Path(LIBRARY).name
            carried.write_bytes(library)
            try:
                load_native_copy(carried)
            except BackendUnavailableError as error:
                raise ValueError(f"{path}: {error}") from None
        self.device = needs["device"]
        with _quiet():
            self.run: Any = torch._inductor.aoti_load_package(str(path))

    def __call__(self, pictures: np.ndarray) -> list[np.ndarray]:
        return [self.run(torch.from_numpy(pictures).to(self.device)).cpu().numpy()]


def _texts(data: bytes) -> dict[str, str]:
    """What `_needs` gave, as it was written.

    Raises:
        ValueError: something else.
    """
    needs = json.loads(data)
    named = {"torch", "machine", "device"} <= set(needs) and isinstance(needs, dict)
    if not named or not all(isinstance(value, str) for value in needs.values()):
        raise ValueError("another form")
    return needs


def _why_not_here(needs: dict[str, str]) -> str | None:
    """Why this machine does not run a program; None if it does."""
    here = {"torch": torch.__version__, "machine": platform.machine()}
    for name, found in here.items():
        if needs[name] != found:
            return f"compiled for {name} {needs[name]}, here is {found}"
    if needs["device"] == "cuda":
        if not torch.cuda.is_available():
            return "compiled for a GPU, of which there is none"
        wanted, found = needs.get("capability", ""), "{}.{}".format(*torch.cuda.get_device_capability())
        # Machine code runs on later chips of its generation.
        if wanted and (wanted.partition(".")[0] != found.partition(".")[0] or wanted > found):
            return f"compiled for compute capability {wanted}, this GPU has {found}"
        return None
    wanted, found = needs.get("instructions", ""), torch.backends.cpu.get_cpu_capability()
    if found not in _INSTRUCTIONS and wanted != found:
        return f"compiled for {wanted}, this processor has {found}"
    if wanted and found != wanted and wanted not in _INSTRUCTIONS[: _INSTRUCTIONS.index(found) + 1]:
        return f"compiled for {wanted}, this processor has {found}"
    for isa in filter(None, needs.get("packed", "").split(",")):
        name, called = _PACKED.get(isa, (isa, shown(isa)))
        if not torch.cpu.get_capabilities().get(name):
            return f"its weights are packed for {called}, which this processor has not"
    return None


def load(path: Path) -> _Loaded:
    """A callable from pictures to label maps, with the file's metadata as `text`.

    Raises:
        ValueError: not such a file, or one for another kind of machine.
    """
    return _Loaded(path)
