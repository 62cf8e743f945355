"""Every pinned launch configuration compiles without a GPU: no spills, and wgmma where it counts.

The launches come from the launchers themselves, run on meta tensors. Compiling needs Triton without its
interpreter, so every architecture is compiled in a process of its own (this file run as a script).
"""

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

# name: (batch, queries, keys, heads, head dim), dtype, options
EVERYWHERE = {
    "ade_vit_l batch 1": ((1, 150, 1600, 16, 32), "bfloat16", {}),
    "dim 16": ((16, 150, 1600, 8, 16), "bfloat16", {}),
    "dim 64": ((16, 150, 1600, 8, 64), "bfloat16", {}),
    "dim 128": ((16, 150, 1600, 8, 128), "bfloat16", {}),
    "dropout": ((16, 150, 1600, 16, 32), "bfloat16", {"dropout": True}),
    "fp32": ((16, 150, 1600, 16, 32), "float32", {}),
    "fp32 dim 128": ((16, 150, 1600, 8, 128), "float32", {}),
}
MORE = {
    "ade_vit_l": ((16, 150, 1600, 16, 32), "bfloat16", {}),
    "pc_vit_l": ((16, 60, 900, 16, 32), "bfloat16", {}),
    "coco_vit_l": ((16, 171, 1024, 16, 32), "float16", {}),
    "cityscapes_like": ((1, 19, 8192, 8, 64), "bfloat16", {}),
    "odd": ((2, 201, 1025, 3, 24), "bfloat16", {}),
    "ones": ((1, 1, 1, 1, 16), "float16", {}),
    "masks only": ((16, 150, 1600, 16, 32), "bfloat16", {"grad_output": False}),
    "output only": ((16, 150, 1600, 16, 32), "bfloat16", {"masks": False}),
    "deterministic": ((16, 150, 1600, 16, 32), "bfloat16", {"deterministic": True}),
    "plan heads": ((16, 150, 1600, 16, 32), "bfloat16", {"plan": "heads", "num_stages": 2}),
}


def _launches(shape, dtype, options, arch):
    """All launches of one forward and one backward."""
    import torch

    from segvit_kernels.triton import atm

    options, dtype = dict(options), getattr(torch, dtype)
    batch, queries, keys, heads, dim = shape
    dropout, masks = options.pop("dropout", False), options.pop("masks", True)
    with_output, deterministic = options.pop("grad_output", True), options.pop("deterministic", False)
    with torch.device("meta"):
        query = torch.empty(batch, queries, heads, dim, dtype=dtype)
        key = torch.empty(batch, keys, heads, dim, dtype=dtype)
        previous = torch.empty(batch, queries, keys, dtype=dtype) if masks else None
        lse = torch.empty(batch, heads, queries)
        seed = torch.empty(1, dtype=torch.int64) if dropout else None
    common = (seed, dim**-0.5, 0.1 if dropout else 0.0)
    fwd = {**atm._fwd_config(shape, dtype, arch, dropout), **options}
    _, launches = atm._fwd_launches(query, key, key, previous, *common, masks, fwd)
    if "plan" not in options:
        bwd = atm._bwd_config(shape, dtype, arch, dropout, deterministic)
        grad_output = query if with_output else None
        launches += atm._bwd_launches(grad_output, previous, query, key, key, query, lse, *common, bwd)[1]
    return launches


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


def _main(arch: str) -> None:
    """Print the resources of every distinct specialisation as one JSON object."""
    from triton.backends.compiler import GPUTarget

    cases = {**EVERYWHERE, **(MORE if arch == "sm_90" else {})}
    rows, seen = [], {}
    for name, (shape, dtype, options) in cases.items():
        for launch in _launches(shape, dtype, options, arch):
            compiled = launch.compile(GPUTarget(*TARGETS[arch]))
            if compiled.hash not in seen:
                seen[compiled.hash] = _resources(compiled)
            rows.append({"case": name, "kernel": launch.kernel.__name__, **seen[compiled.hash]})
    print(json.dumps(rows))


@pytest.mark.parametrize("arch", TARGETS)
def test_pinned_configurations_compile(arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, __file__, arch]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = json.loads(result.stdout.splitlines()[-1])
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {"_atm_fwd_kernel", "_atm_combine_kernel", "_atm_bwd_kernel", "_atm_bwd_query_kernel"}
    assert [row for row in rows if row["spills"]] == []
    assert [row for row in rows if row["shared"] > SHARED_MEMORY[arch] * 1024] == []
    if arch == "sm_90":
        main = ("_atm_fwd_kernel", "_atm_fwd_heads_kernel", "_atm_bwd_kernel")
        products = [row for row in rows if row["kernel"] in main and "fp32" not in row["case"]]
        assert [row for row in products if not row["hgmma"]] == []


def test_every_architecture_with_a_file_is_compiled():
    files = {path.stem for path in (ROOT / "segvit_kernels" / "triton" / "configs").glob("*.json")}
    assert files == set(TARGETS)


if __name__ == "__main__":
    _main(sys.argv[1])
