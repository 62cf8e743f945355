"""Kernels compiled ahead: ``bench precompile`` fills a Triton cache, ``bench gpu --cache`` takes it.

Every launch of ours that the command makes is made here too, through Triton's JIT, on the stub of libcuda
(:mod:`segvit_kernels.testing.stub`), so that the cache's keys are the command's own. What is not ours
computes nothing meanwhile. Triton's version, its wheel and Python's version are parts of the keys: where they
differ the GPU machine compiles as it would without an archive.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.measure import environment, timing
from bench.suites import _gpu_tasks, gpu, tune

ARCH = "sm_90"
MANIFEST = "segvit-precompiled.json"
# What a hit reads; the stages between source and machine code are left out.
_KEPT = (".cubin", ".json", ".so")
# Tensors up to this many elements are computed: sizes of launches may depend on them.
_SMALL = 4096


class Idle(TorchDispatchMode):
    """Computes nothing large: its results are zeros, and what is to be written stays as it is. Views, our own
    operators and whatever gives values or shapes that depend on values are as ever."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        depends = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags)
        small = tensors and all(t.numel() <= _SMALL for t in tensors)
        if function.namespace != "aten" or function.is_view or depends or small:
            return function(*args, **kwargs)
        schema = function._schema
        if schema.is_mutable:
            given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
            written = [
                given[a.name] for a in schema.arguments if a.is_write and given.get(a.name) is not None
            ]
            return written[0] if len(written) == 1 and schema.returns else tuple(written) or None

        def to_meta(t: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta")

        meta_args, meta_kwargs = tree_map_only(torch.Tensor, to_meta, (args, kwargs))
        meta_kwargs = {k: torch.device("meta") if k == "device" else v for k, v in meta_kwargs.items()}
        if not tensors:
            meta_kwargs["device"] = torch.device("meta")
            meta_kwargs.pop("generator", None)
        try:
            found = function(*meta_args, **meta_kwargs)
        except (NotImplementedError, RuntimeError, TypeError):
            return function(*args, **kwargs)
        if not tensors and all(
            t.numel() <= _SMALL for t in tree_leaves(found) if isinstance(t, torch.Tensor)
        ):
            return function(*args, **kwargs)
        return tree_map_only(torch.Tensor, _zeros_like_meta, found)


def _zeros_like_meta(t: torch.Tensor) -> torch.Tensor:
    elements = 1 + sum((n - 1) * s for n, s in zip(t.size(), t.stride(), strict=True)) if t.numel() else 0
    return torch.zeros(elements, dtype=t.dtype).as_strided(t.size(), t.stride())


def launch(plan: _gpu_tasks.Plan, only: Sequence[str] | None, tell: Callable[[str], object]) -> None:
    """Every launch of ours that ``bench gpu`` makes under ``plan``, on the GPU of this process."""
    device = torch.device("cuda", 0)
    with mock.patch.object(timing, "poisoned", contextlib.nullcontext), Idle():
        for what, work in _gpu_tasks.launches(plan, device, only):
            try:
                work()
            except Exception as error:  # the machine with the GPU will compile it, or fail likewise
                tell(f"{what}: {timing.one_line(error)}")


def fill(smoke: bool, only: Sequence[str] | None) -> int:
    """What the process of :func:`precompile` does; prints what could not be launched, then how much was."""
    importlib.import_module("torch._dynamo")  # before torch.cuda is not what it was
    from segvit_kernels.testing import stub
    from segvit_kernels.testing.stub.torch_cuda import pretended

    there, counted = stub.install(ARCH), gpu.Compiled()
    dtypes = ("float32",) if smoke else _gpu_tasks.DTYPES
    plan = _gpu_tasks.Plan(smoke, dtypes, candidates=() if smoke else tune.load(gpu.CANDIDATES))
    with pretended(there):
        launch(plan, only, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps({"launches": there.launches, **counted.take()}))
    return 0


def precompile(archive: Path, only: Sequence[str] | None = None, smoke: bool = False) -> str:
    """Compile all kernels of ``bench gpu`` for sm_90, or those of some operators, into an archive; what was
    done, in one line.

    Raises:
        RuntimeError: there is no Triton, or no C compiler for the stub.
    """
    with tempfile.TemporaryDirectory() as scratch:
        variables = {
            k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SEGVIT_KERNELS_BACKEND")
        }
        path = os.pathsep.join(filter(None, (str(environment.ROOT), os.environ.get("PYTHONPATH"))))
        variables |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": scratch}
        command = [sys.executable, "-m", "bench", "_fill", json.dumps([smoke, only])]
        done = subprocess.run(command, env=variables, cwd=environment.ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"the process that compiles ended with exit code {done.returncode}")
        counts = json.loads(done.stdout.strip().splitlines()[-1])
        described = environment.describe(torch.device("cpu"))
        manifest = {key: described[key] for key in ("torch", "triton", "python", "commit", "kernels_sha256")}
        manifest |= {"arch": ARCH, "python": platform.python_version(), **counts}
        size = pack(Path(scratch), archive, manifest)
    return (
        f"{archive}: {manifest['compiled']} kernels for {ARCH}, {counts['launches']} launches, "
        f"{size / 1e6:.1f} MB, Triton {manifest['triton']}, Python {manifest['python']}"
    )


def pack(folder: Path, archive: Path, manifest: dict[str, Any]) -> int:
    """Write the cache in ``folder`` to a .tar.gz, whole or not at all; its size in bytes."""
    part = archive.with_name(archive.name + ".part")
    with tarfile.open(part, "w:gz") as tar:
        text = json.dumps(manifest, indent=1).encode()
        entry = tarfile.TarInfo(MANIFEST)
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text))
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in _KEPT:
                tar.add(path, str(path.relative_to(folder)))
    part.replace(archive)
    return archive.stat().st_size


@contextlib.contextmanager
def unpacked(archive: Path) -> Iterator[str]:
    """The archive as the Triton cache of processes started inside the ``with`` block; yields a line about it.

    Raises:
        ValueError: names the archive, what it is and what was expected.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")
            manifest = json.loads((Path(scratch) / MANIFEST).read_text())
        except (OSError, tarfile.TarError, EOFError, ValueError) as error:
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{archive}: {what}; expected an archive of 'bench precompile'") from None
        # Triton names the files of a kernel by absolute paths.
        for path in Path(scratch).glob("*/__grp__*.json"):
            names = json.loads(path.read_text())["child_paths"]
            here = {name: str(path.parent / name) for name in names if (path.parent / name).is_file()}
            path.write_text(json.dumps({"child_paths": here}))
        own = {"triton": environment.version("triton"), "python": platform.python_version()}
        differ = [f"{k} {manifest.get(k)}, here {v}" for k, v in own.items() if not _same(manifest.get(k), v)]
        with mock.patch.dict(os.environ, TRITON_CACHE_DIR=scratch):
            line = f"{archive}: {manifest.get('compiled')} kernels for {manifest.get('arch')}"
            yield line + (f" ({'; '.join(differ)}: compiled again)" if differ else "")


def _same(made: str | None, here: str | None) -> bool:
    """Versions up to the patch: a wheel is for one minor version of Python."""
    return bool(made and here) and made.split(".")[:2] == here.split(".")[:2]
