"""Every pinned launch configuration compiles without a GPU: no spills, and wgmma where it counts.

The launches come from the launchers themselves, run on meta tensors.
"""

import ast
from pathlib import Path

import pytest

from segvit_kernels.testing.launches import OPERATORS, TARGETS, compiled

ROOT = Path(__file__).resolve().parents[1]
LAUNCHES = ROOT / "segvit_kernels" / "testing" / "launches"
SHARED_MEMORY = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64, "default": 99}  # KiB per program


def kernels(operator):
    """The names that KERNELS of an operator's launches lists; read, not imported, as that needs Triton."""
    tree = ast.parse((LAUNCHES / f"{operator}.py").read_text())
    return next(
        ast.literal_eval(n.value)
        for n in tree.body
        if isinstance(n, ast.Assign) and n.targets[0].id == "KERNELS"
    )


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("arch", TARGETS)
def test_pinned_configurations_compile(arch, operator):
    rows = compiled(operator, arch)
    assert {row["kernel"] for row in rows} >= kernels(operator)
    assert [row for row in rows if row["spills"]] == []
    assert [row for row in rows if row["shared"] > SHARED_MEMORY[arch] * 1024] == []
    if arch == "sm_90":
        assert [row for row in rows if row["wgmma"] and not row["HGMMA"]] == []


def test_every_architecture_with_a_file_is_compiled():
    files = {path.stem for path in (ROOT / "segvit_kernels" / "triton" / "configs").glob("*.json")}
    assert files == set(TARGETS)


def test_every_operator_with_kernels_is_compiled():
    files = {path.stem for path in (ROOT / "segvit_kernels" / "triton").glob("[!_]*.py")}
    assert files == set(OPERATORS)
