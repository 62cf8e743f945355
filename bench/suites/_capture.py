"""What ``bench simulate`` runs in a process of its own, on the ``segvit_kernels`` of any checkout.

``python -P _capture.py STUB JOBS FOLDER``: STUB is the stub of libcuda, by path. JOBS is a JSON list of
objects with ``operator``, ``shape``, ``batch``, ``dtype``, ``mode``, ``changes`` of the pinned parameters,
``arguments`` of the operator's function, ``arch`` and ``multiprocessors``. Every operator is called as the
benchmark calls it; nothing runs on a GPU. Writes ``FOLDER/INDEX.pickle`` for each: the launches in order,
compiled, with the bytes of their parameters, or why that failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import torch

_BYTES = {"i1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "fp16": 2, "bf16": 2, "i64": 8, "u64": 8, "fp64": 8}
_SMALL = 2**20


def _install(path: str, arch: str, multiprocessors: int) -> None:
    spec = importlib.util.spec_from_file_location("stub", path)
    stub = sys.modules["stub"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    stub.install(arch, multiprocessors=multiprocessors)


_places: dict[Any, int] = {"end": 1 << 40}


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor lies: storages one behind the other, as no allocator would differ from run to run."""
    storage = tensor.untyped_storage()
    begin = storage.data_ptr() or id(tensor)  # of a meta tensor
    if begin not in _places:
        _places[begin] = _places["end"]
        _places["end"] += -(-max(1, storage.nbytes()) // 512) * 512
    return _places[begin] + tensor.storage_offset() * tensor.element_size()


def parameters(signature: dict[str, str], values: dict[str, Any]) -> bytes:
    """The parameters of a kernel as they lie in constant memory, each at a multiple of its size."""
    import struct

    found = bytearray()
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        value, size = values.get(name), 8 if kind.startswith("*") else _BYTES.get(kind, 4)
        found += bytes(-len(found) % size)
        if isinstance(value, torch.Tensor):
            value = _address(value)
        if kind == "fp32":
            found += struct.pack("<f", value)
        elif kind.startswith(("*", "i", "u")):
            found += (int(value or 0) % 2 ** (8 * size)).to_bytes(size, "little")
        else:
            found += bytes(size)
    return bytes(found)


def describe(launch: Any, arch: str) -> dict[str, Any]:
    """A launch, compiled, as plain data."""
    from triton.backends.compiler import GPUTarget

    compiled = launch.compile(GPUTarget("cuda", int(arch.removeprefix("sm_")), 32))
    tensors = {
        name: {"address": _address(t), "shape": tuple(t.shape), "dtype": str(t.dtype), "bytes": t.nbytes}
        for name, t in launch.arguments.items()
        if isinstance(t, torch.Tensor)
    }
    known = {}
    for name, t in launch.arguments.items():
        if (
            isinstance(t, torch.Tensor)
            and not t.is_floating_point()
            and t.nbytes <= _SMALL
            and id(t) in _given
        ):
            known[name] = t.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return {
        "kernel": launch.kernel.__name__,
        "programs": launch.programs,
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "cubin": compiled.asm["cubin"],
        "parameters": parameters(compiled.src.signature, launch.arguments),
        "tensors": tensors,
        "numbers": {k: v for k, v in launch.arguments.items() if isinstance(v, (int, float))},
        "constants": {k: v for k, v in launch.constants.items() if isinstance(v, (int, float, bool, str))},
        "known": known,
    }


_given: set[int] = set()


@contextlib.contextmanager
def _recorded() -> Any:
    """Launches that do not run, but are noted."""
    from segvit_kernels.triton import _launch

    found, run = [], _launch.Launch.__call__
    _launch.Launch.__call__ = lambda self: found.append(self)
    try:
        yield found
    finally:
        _launch.Launch.__call__ = run


def _are_labels(targets: Any) -> bool:
    return isinstance(targets, torch.Tensor) and targets.ndim == 3 and not targets.is_floating_point()


def _words(labels: torch.Tensor, most: int = 6) -> Any:
    """(images, down, across): of every tile of 64 × 64 labels a bit c % 32 for each class c, all bits where
    it has more than ``most``; 255 is none."""
    import numpy as np

    found = np.zeros((len(labels), -(-labels.shape[1] // 64), -(-labels.shape[2] // 64)), dtype=np.uint32)
    for b, y, x in np.ndindex(*found.shape):
        there = labels[b, 64 * y : 64 * y + 64, 64 * x : 64 * x + 64].unique()
        there = there[(there >= 0) & (there < 255)].tolist()
        found[b, y, x] = sum({1 << c % 32 for c in there}) if len(there) <= most else 2**32 - 1
    return found


def _module(name: str, before: str) -> Any:
    """A module of the checkout; older ones have it at ``before``."""
    return importlib.import_module(before if importlib.util.find_spec(before) else name)


def capture(job: dict[str, Any]) -> dict[str, list[dict]]:
    """``forward`` and ``backward``: launches of one call."""
    operators = _module("bench.subjects.operators", "bench.operators")
    pinned = _module("bench.subjects.parameters", "bench.tune")
    from segvit_kernels.triton import _launch, _plan

    op = operators.by_name()[job["operator"]]
    case = op.tiny if job["shape"] == "tiny" else op.shape(job["shape"], job["batch"])
    case = dataclasses.replace(case, **job.get("sizes", {}))
    torch.manual_seed(0)  # the labels that occur decide what some kernels do
    peer = next(p for p in op.peers("triton") if p.name == "fused")
    leaves, gradients = op.inputs(case, getattr(torch, job["dtype"]), torch.device("cpu"))
    leaves = {**leaves, **job.get("arguments", {})}
    _given.clear()
    _given.update(map(id, operators.tensors(leaves)))
    _places.clear()
    _places["end"] = 1 << 40
    _plan.forget()
    configs = _launch.pinned(job["arch"])
    with pinned.applied({"changes": job.get("changes", {})}, configs), _recorded() as found:
        if job["mode"] == "forward":
            with torch.no_grad():
                peer.call(leaves)
            count = len(found)
        else:
            results = peer.call(leaves)
            count = len(found)
            torch.autograd.grad(results, operators.differentiable(leaves), gradients)
    described = [describe(launch, job["arch"]) for launch in found]
    labels = leaves.get("targets")
    there = words = None
    if _are_labels(labels):
        there, words = [image.unique().tolist() for image in labels], _words(labels)
    return {
        "forward": described[:count],
        "backward": described[count:],
        "labels": there,
        "words": words,
    }


def main(stub: str, jobs: str, folder: str) -> None:
    torch.set_num_threads(1)
    jobs = json.loads(jobs)
    _install(stub, jobs[0]["arch"], jobs[0]["multiprocessors"])
    import triton

    for index, job in enumerate(jobs):
        try:
            found = {"triton": triton.__version__, **capture(job)}
        except Exception as error:
            found = {"triton": triton.__version__, "reason": f"{type(error).__name__}: {error}"[-500:]}
        (Path(folder) / f"{index}.pickle").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
