"""Kernels compiled for GPUs that are not there: what the compile gate and ``bench static`` share.

One module an operator. Each has ``EVERYWHERE``, cases by name for every architecture, and ``MORE``, further
ones for sm_90; ``MAIN``, the case that stands for the operator; ``launches(case, arch)``, all launches of a
case, made by the launchers from meta tensors; ``KERNELS``, what the machine code of each kernel must be like
(:class:`Demand`); ``wgmma(row)``, whether a row of :func:`compiled` must hold tensor-core instructions.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from segvit_kernels.testing.machine_code import Code, disassembled, instruction_mix, serialised

OPERATORS = (
    "atm",
    "mask_binarize",
    "mask_iou",
    "mask_loss",
    "panoptic_argmax",
    "query_attention",
    "semantic_argmax",
    "semantic_topk",
    "subsample_norm",
)
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx942": ("hip", "gfx942", 64),
}
"""Arguments of Triton's ``GPUTarget``. Those without a file of their own take the parameters of another."""

ALIKE = ("sm_120", "gfx90a")
"""Compiled with the parameters of sm_89 and gfx942: the gate takes one launch of each kernel, and only with
``SEGVIT_GATE=all``. With that it takes every launch elsewhere; else on sm_90 those that show every flag and
every width of numbers of every kernel, and one of each kernel on the others (``quick``: on
sm_90 too, and each operator on one of the others)."""

SHARED_MEMORY = {
    "sm_80": 163,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx90a": 64,
    "gfx942": 64,
}
"""KiB that a program can have."""


@dataclasses.dataclass(frozen=True)
class Demand:
    """What the gate asks of the machine code of one kernel, in any case of its operator.

    Args:
        registers: at least; a kernel that was compiled to nothing needs fewer.
        tensor: tensor-core instructions at least, where ``wgmma(row)`` says that products run there.
        barriers: most barriers in an innermost loop, ``None`` if it may have any. With none there is no
            write to shared memory either: the compiler changes no layout there.
        stack: bytes that may be spilled outside loops.
        serialised: cases in which ptxas may wait after every wgmma.
        spilled: cases in which any number of bytes may be spilled, in loops too.
        everywhere: whether the gate launches it on every architecture, or on sm_90 only.
    """

    registers: int
    tensor: int = 1
    barriers: int | None = None
    stack: int = 0
    serialised: Collection[str] = ()
    spilled: Collection[str] = ()
    everywhere: bool = True


def faults(row: dict[str, Any], arch: str, demand: Demand) -> list[str]:
    """What is wrong with a kernel, one line each; nothing if it is as it should be.

    Args:
        row: of :func:`resources`, with ``case`` and ``wgmma``.
        arch: a name of :data:`TARGETS`.
        demand: what is asked of it.
    """
    found = []
    registers = row["registers"] + row.get("scalar", 0)
    if registers < demand.registers:
        found.append(f"{registers} registers, at least {demand.registers} expected: compiled to nothing?")
    if row["wgmma"] and row["tensor"] < demand.tensor:
        found.append(f"{row['tensor']} tensor-core instructions, at least {demand.tensor} expected")
    if row["wgmma"] and arch == "sm_90" and not row["HGMMA"]:
        found.append("no wgmma")
    if (row["stack"] > demand.stack or row["loop_spills"]) and row["case"] not in demand.spilled:
        found.append(f"{row['stack']} bytes spilled, {row['loop_spills']} instructions of it in loops")
    if demand.barriers is not None and row["loop_barriers"] > demand.barriers:
        found.append(f"{row['loop_barriers']} barriers in an innermost loop, {demand.barriers} expected")
    if demand.barriers == 0 and row["loop_staged"]:
        found.append(f"{row['loop_staged']} writes to shared memory in an innermost loop: a change of layout")
    if row["undefined"]:
        found.append(f"{row['undefined']} registers are read that nothing wrote: values that LLVM lost?")
    if row["serialised"] and row["case"] not in demand.serialised:
        found.append("wgmma instructions are serialised (ptxas C7515)")
    if row["shared"] > SHARED_MEMORY[arch] * 1024:
        found.append(f"{row['shared']} bytes of shared memory, {arch} has {SHARED_MEMORY[arch]} KiB")
    return found


def resources(compiled: Any, code: bool = True) -> dict[str, Any]:
    """Registers, shared memory, spills, instruction mix and loops of a kernel that Triton compiled.

    Args:
        compiled: what Triton gives.
        code: False where nothing is asked of the instructions: they are looked at only if there are spills.
    """
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]

        def find(name: str) -> int:
            return int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])

        # Scalar registers spill to lanes of a vector register; only scratch is memory.
        stack = find("vgpr_spill_count") + find("private_segment_fixed_size")
        row = {"registers": find("vgpr_count"), "scalar": find("sgpr_count")}  # of addresses and counters
        row |= {"shared": shared, "spills": stack, "stack": stack}
        return {**row, **Code.gcn(text).counts(), "serialised": False, "undefined": 0}
    text = disassembled(compiled.asm["cubin"], code)
    found, mix = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text)), instruction_mix(text)
    stack = int(found["STACK"]) + int(found["LOCAL"])
    if stack and not code:
        return resources(compiled)
    row = {"registers": int(found["REG"]), "shared": shared, "spills": stack + mix["LDL"] + mix["STL"]}
    loops = Code.sass(text) if code else Code((), ())
    row |= {"stack": stack, **mix, **loops.counts()}
    ptx = compiled.asm["ptx"]
    # What LLVM says of a register that nothing wrote before it is read.
    return {**row, "serialised": serialised(text, ptx), "undefined": ptx.count("// implicit-def: ")}


def compiled(operators: str | Sequence[str], arch: str, cases: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A row with its ``faults`` for every launch of ``cases`` (default: what the gate takes for ``arch``).

    With ``cases``, which are one operator's, ``operators`` is that one.

    In a process of its own: Triton compiles only where its interpreter is not loaded. A kernel that is
    demanded and was launched by no case of the gate has a row too.

    Raises:
        RuntimeError: compilation fails.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parents[3])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    some = operators if isinstance(operators, str) else ",".join(operators)
    command = [sys.executable, "-m", "segvit_kernels.testing.launches", some, arch, *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def module(operator: str) -> Any:
    """The module of an operator, or of any module's full name; imports Triton."""
    return importlib.import_module(operator if "." in operator else f"{__name__}.{operator}")
