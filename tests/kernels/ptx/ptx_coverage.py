"""What ``make ptx`` executes, chosen and shown: ``python ptx_coverage.py FILE ARCH...`` prints the table.

A row is a kernel of an architecture, a column the dtype of its tensors, a cell how many programs of them the
compiler made, and how often they were launched. Fails where a kernel that the compile gate knows, or nvcc
made, was not launched in a dtype that it takes. In a process without interpreter.
"""

from __future__ import annotations

import collections
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.extend(__file__.rsplit("/", up)[0] for up in (1, 2))

from segvit_kernels.testing import ptx

FILE = "SEGVIT_PTX_COVERAGE"
FLOATS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
ANY = "any"  # of kernels that depend on no dtype
COLUMNS = ("fp32", "fp16", "bf16", ANY)


def column(dtypes: Iterable[Any]) -> str:
    """Where a kernel with tensors of these dtypes stands: half precision before single, else "any"."""
    found = {FLOATS.get(dtype) for dtype in dtypes}
    return next((name for name in ("bf16", "fp16", "fp32") if name in found), ANY)


def record(session: ptx.Session) -> None:
    """Adds what a session launched to the file that ``SEGVIT_PTX_COVERAGE`` names, if it names one."""
    if path := os.environ.get(FILE):
        rows = ({"arch": session.arch, "kernel": k, "text": t, "column": column(d), "launches": n}
                for (k, d, t), n in session.variants.items())  # fmt: skip
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _replaced(value: Any, dtype: str) -> Any:
    """A case of the gate in another dtype."""
    if isinstance(value, tuple):
        return tuple(_replaced(part, dtype) for part in value)
    return dtype if value in ("float32", "float16", "bfloat16") else value


def of_triton(arch: str) -> Iterator[tuple[str, str]]:
    """Kernels and columns of every launch that the gate compiles for ``arch``, in each of the dtypes."""
    from segvit_kernels.testing.launches import OPERATORS, module

    for operator in OPERATORS:
        gate = module(operator)
        for case in (gate.EVERYWHERE | gate.MORE if arch == "sm_90" else gate.EVERYWHERE).values():
            for dtype in FLOATS:
                for launch in gate.launches(_replaced(case, str(dtype).removeprefix("torch.")), arch):
                    tensors = (a for a in launch.arguments.values() if isinstance(a, torch.Tensor))
                    yield launch.kernel.fn.__name__, column(t.dtype for t in tensors)


def of_nvcc(arch: str) -> dict[str, tuple[str, str]]:
    """Kernel with its template's arguments, and its column, by their entries in PTX; none without nvcc."""
    import ptx_native

    if ptx_native.missing():
        return {}
    entries = [entry for entry, _ in ptx_native.modules(arch).values()]
    names = ptx_native.resources.demangled(entries)
    columns = {"bf16": "bf16", "half": "fp16", "float": "fp32"}
    found = {}
    for entry, name in zip(entries, names, strict=True):
        words = re.findall(r"\w+", name.partition("<")[2])
        found[entry] = name, next((columns[w] for w in words if w in columns), ANY)
    return found


def table(
    rows: Iterable[dict[str, Any]], arch: str, expected: set[tuple[str, str]], entries: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Lines to print, and what of ``expected`` is missing; ``entries`` as of :func:`of_nvcc`."""
    programs, launches = collections.defaultdict(set), collections.Counter()
    for row in rows:
        if row["arch"] == arch:
            cell = entries.get(row["kernel"], (row["kernel"], row["column"]))
            programs[cell].add(row["text"])
            launches[cell] += row["launches"]
    lines = [f"{arch:60s}" + "".join(f"{name:>16s}" for name in COLUMNS)]
    for kernel in sorted({k for k, _ in expected}):
        cells = []
        for name in COLUMNS:
            cell = kernel, name
            text = f"{len(programs[cell])} / {launches[cell]}" if launches[cell] else ""
            cells.append(text or ("MISSING" if cell in expected else ""))
        lines.append(f"{kernel:60s}" + "".join(f"{cell:>16s}" for cell in cells))
    ours = {cell for cell in launches if cell in expected}
    total = (len(set().union(*(programs[c] for c in ours))), sum(launches[c] for c in ours))
    lines.append(f"{len(ours)} of {len(expected)} kernels by dtype, {total[0]} programs, {total[1]} launches")
    return lines, sorted(f"{arch} {kernel} {name}" for kernel, name in expected - set(launches))


def main(file: str, *archs: str) -> int:
    rows, missing = [json.loads(line) for line in Path(file).read_text().splitlines()], []
    for arch in archs:
        entries = of_nvcc(arch)
        lines, without = table(rows, arch, set(of_triton(arch)) | set(entries.values()), entries)
        print("\n".join(lines))
        missing += without
    print(f"kernels / dtypes that nothing launched: {missing}")
    return len(missing)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
