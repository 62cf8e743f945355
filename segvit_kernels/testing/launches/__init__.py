"""Kernels compiled for GPUs that are not there: what the compile gate and ``bench static`` share.

One module an operator. Each has ``EVERYWHERE``, cases by name for every architecture, and ``MORE``, further
ones for sm_90; ``MAIN``, the case that stands for the operator; ``launches(case, arch)``, all launches of a
case, made by the launchers from meta tensors; ``KERNELS``, the names of the kernels that must be among them;
``wgmma(row)``, whether a row of :func:`compiled` must hold tensor-core instructions on sm_90.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OPERATORS = ("atm", "mask_loss", "query_attention", "semantic_argmax", "subsample_norm")
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
    "default": ("cuda", 86, 32),
}
MNEMONICS = (
    "HGMMA",
    "HMMA",
    "FFMA",
    "MUFU",
    "LDG",
    "LDGSTS",
    "STG",
    "LDS",
    "LDSM",
    "STS",
    "RED",
    "LDL",
    "STL",
)
"""Instructions that are counted: tensor cores, multiply-add, special functions, memory, atomics, spills."""


def instruction_mix(sass: str) -> dict[str, int]:
    """How often each of :data:`MNEMONICS` stands in the machine code of one kernel; in it, not executed."""
    return {name: len(re.findall(rf"\b{name}\b", sass)) for name in MNEMONICS}


def resources(compiled: Any) -> dict[str, int]:
    """Registers, shared memory, spills and the instruction mix of a kernel that Triton compiled."""
    import triton

    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]

        def find(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

        # Scalar registers spill to lanes of a vector register; only scratch is memory.
        spills = find("vgpr_spill_count") + find("private_segment_fixed_size")
        return {"registers": find("vgpr_count"), "shared": shared, "spills": spills}
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found, mix = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)), instruction_mix(sass)
    spills = int(found["STACK"]) + int(found["LOCAL"]) + mix["LDL"] + mix["STL"]
    return {"registers": int(found["REG"]), "shared": shared, "spills": spills, **mix}


def compiled(operator: str, arch: str, cases: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A row for every launch of ``cases`` (default: what the gate compiles for ``arch``), in a process of its
    own: Triton compiles only where its interpreter is not loaded.

    Raises:
        RuntimeError: compilation fails.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parents[3])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "segvit_kernels.testing.launches", operator, arch, *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def module(operator: str) -> Any:
    """The module of an operator; imports Triton."""
    return importlib.import_module(f"segvit_kernels.testing.launches.{operator}")
