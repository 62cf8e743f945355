"""Every pinned launch configuration compiles without a GPU: no spills, and wgmma where it counts.

The launches come from the launchers themselves, run on meta tensors. Compiling needs Triton without its
interpreter, so every architecture is compiled in a process of its own (this file run as a script).
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
    "default": ("cuda", 86, 32),
}
SHARED_MEMORY = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64, "default": 99}  # KiB per program

OPERATORS = ("atm", "mask_loss", "query_attention", "semantic_argmax", "subsample_norm")


def _resources(compiled) -> dict[str, int]:
    """Registers, shared memory, spills and tensor-core instructions of a compiled kernel."""
    import triton

    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]

        def find(name):
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
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(found["REG"]),
        "shared": shared,
        "spills": int(found["STACK"]) + int(found["LOCAL"]) + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "hgmma": sass.count("HGMMA"),
    }


def _main(operator: str, arch: str) -> None:
    """Print the resources of every distinct specialisation as one JSON object."""
    from triton.backends.compiler import GPUTarget

    module = importlib.import_module(f"launches.{operator}")
    cases = {**module.EVERYWHERE, **(module.MORE if arch == "sm_90" else {})}
    rows, seen = [], {}
    for name, case in cases.items():
        for launch in module.launches(case, arch):
            compiled = launch.compile(GPUTarget(*TARGETS[arch]))
            if compiled.hash not in seen:
                seen[compiled.hash] = _resources(compiled)
            row = {"case": name, "kernel": launch.kernel.__name__, **seen[compiled.hash]}
            rows.append(row | {"wgmma": module.wgmma(row)})
    print(json.dumps({"kernels": sorted(module.KERNELS), "rows": rows}))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("arch", TARGETS)
def test_pinned_configurations_compile(arch, operator):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    command = [sys.executable, __file__, operator, arch]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    rows = found["rows"]
    assert {row["kernel"] for row in rows} >= set(found["kernels"])
    assert [row for row in rows if row["spills"]] == []
    assert [row for row in rows if row["shared"] > SHARED_MEMORY[arch] * 1024] == []
    if arch == "sm_90":
        assert [row for row in rows if row["wgmma"] and not row["hgmma"]] == []


def test_every_architecture_with_a_file_is_compiled():
    files = {path.stem for path in (ROOT / "segvit_kernels" / "triton" / "configs").glob("*.json")}
    assert files == set(TARGETS)


def test_every_operator_with_kernels_is_compiled():
    files = {path.stem for path in (ROOT / "segvit_kernels" / "triton").glob("[!_]*.py")}
    assert files == set(OPERATORS)


if __name__ == "__main__":
    _main(*sys.argv[1:])
