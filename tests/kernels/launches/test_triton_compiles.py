"""Every pinned launch configuration compiles without a GPU, to machine code as it should be.

The launches come from the launchers themselves, run on meta tensors.
"""

import os
from pathlib import Path

import pytest

from segvit_kernels.testing.launches import ALIKE, OPERATORS, TARGETS, Demand, compiled, faults
from segvit_kernels.testing.machine_code import Code, serialised

TRITON = Path(__file__).resolve().parents[3] / "segvit_kernels" / "triton"


# A process for each takes seconds to start: one operator in the whole gate, four in the quick one.
ASKED = os.environ.get("SEGVIT_GATE")
TOGETHER = {"all": 1, "quick": 4}.get(ASKED, 2)
SOME = [OPERATORS[i : i + TOGETHER] for i in range(0, len(OPERATORS), TOGETHER)]
# sm_80 has the instructions of sm_89, and more shared memory.
OTHERS = [arch for arch in TARGETS if arch not in ("sm_90", "sm_80", *ALIKE)]


def _parts(arch):
    """Operators that are compiled together for an architecture: all on all of them, but in the quick gate on
    sm_90 and, in turn, on one of the others."""
    if ASKED == "all" or arch == "sm_90":
        return SOME
    turn = OTHERS.index(arch)
    return [OPERATORS[turn :: len(OTHERS)] if ASKED == "quick" else OPERATORS]


GATE = [
    pytest.param(arch, some, id=f"{arch}-{'all' if some == OPERATORS else '-'.join(some)}")
    for arch in (TARGETS if ASKED == "all" else ("sm_90", *OTHERS))
    for some in _parts(arch)
]


@pytest.mark.parametrize(("arch", "some"), GATE)
def test_pinned_configurations_compile(arch, some):
    """SEGVIT_GATE=all (make gate): every launch, in place of one of each kernel and on sm_90 of each flag."""
    rows = compiled(some, arch)
    names = ("operator", "case", "kernel", "faults")
    assert [tuple(row[name] for name in names) for row in rows if row["faults"]] == []


def test_every_architecture_with_a_file_is_compiled():
    files = {path.stem for path in (TRITON / "configs").glob("*.json")}
    assert files - {"default"} <= set(TARGETS)
    assert "default" in files and "sm_89" not in files  # which stands for it


def test_every_operator_with_kernels_is_compiled():
    assert {path.stem for path in TRITON.glob("[!_]*.py")} == set(OPERATORS)


@pytest.fixture(scope="module")
def planted():
    """Faults of planted kernels, by kernel, on a GPU with less shared memory than one of them wants."""
    return {
        row["kernel"]: row["faults"] for row in compiled("tests.kernels.launches.planted_launches", "sm_89")
    }


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("_empty_kernel", "compiled to nothing"),
        ("_barrier_kernel", "barriers in an innermost loop"),
        ("_layout_kernel", "a change of layout"),
        ("_spill_kernel", "bytes spilled"),
        ("_large_kernel", "bytes of shared memory, sm_89 has 99 KiB"),
        ("_forgotten_kernel", "not launched"),
    ],
)
def test_planted_faults_are_found(kernel, fault, planted):
    assert any(fault in line for line in planted[kernel]), planted[kernel]


def test_a_sound_kernel_has_no_fault(planted):
    assert planted["_sound_kernel"] == []


SOUND = {"case": "a", "registers": 64, "wgmma": True, "tensor": 8, "HGMMA": 8, "stack": 0, "loop_spills": 0}
SOUND |= {"loop_barriers": 0, "loop_staged": 0, "serialised": False, "undefined": 0, "shared": 227 * 1024}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"wgmma": False, "tensor": 0, "HGMMA": 0}, None),
        ({"tensor": 3}, "3 tensor-core instructions"),
        ({"HGMMA": 0}, "no wgmma"),
        ({"stack": 8}, None),
        ({"stack": 16}, "16 bytes spilled"),
        ({"stack": 8, "loop_spills": 1}, "1 instructions of it in loops"),
        ({"stack": 16, "loop_spills": 1, "case": "large"}, None),
        ({"undefined": 6}, "6 registers are read that nothing wrote"),
        ({"serialised": True}, "C7515"),
        ({"serialised": True, "case": "allowed"}, None),
        ({"shared": 227 * 1024 + 1}, "sm_90 has 227 KiB"),
    ],
)
def test_faults(change, fault):
    demand = Demand(64, tensor=4, barriers=0, stack=8, serialised=("allowed",), spilled=("large",))
    found = faults({**SOUND, **change}, "sm_90", demand)
    assert len(found) == (fault is not None) and all(fault in line for line in found)


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                  /* 0x00000a0000017a02 */
                                                                           /* 0x000fc40000000f00 */
        /*0010*/                   STL [R1], R2 ;
        /*0020*/              @!P0 BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R3], [R6.64] ;
        /*0050*/               @P1 BRA 0x30 ;
        /*0060*/                   STS [R2], R3 ;
        /*0070*/               @P2 CALL.REL.NOINC 0x90 ;
        /*0080*/                   BRA 0x20 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
"""
GCN = """
kernel:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_branch .LBB0_2
.LBB0_1:                                ; in the outer loop, before the inner one in the text
	s_barrier
	s_cbranch_scc1 .LBB0_4
.LBB0_2:
	v_mov_b32 v1, v2
.LBB0_3:                                ; the inner loop
	v_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]
	ds_write_b64 v1, v[2:3]
	s_cbranch_scc1 .LBB0_3
	s_branch .LBB0_1
.LBB0_4:
	s_endpgm
"""


def test_loops_of_machine_code():
    code = Code.sass(SASS)
    assert list(code.instructions[:3]) == ["MOV", "STL", "BAR"]
    assert [sorted(loop) for loop in code.loops] == [[2, 3, 4, 5, 6, 7, 8], [3, 4, 5]]
    assert code.innermost == [frozenset({3, 4, 5})]
    expected = {"tensor": 1, "loops": 2, "loop_barriers": 0, "loop_staged": 0, "loop_spills": 0}
    assert code.counts() == expected
    code = Code.gcn(GCN)
    assert [sorted(loop) for loop in code.loops] == [[2, 3, 4, 5, 6, 7, 8], [5, 6, 7]]
    expected = {"tensor": 1, "loops": 2, "loop_barriers": 0, "loop_staged": 1, "loop_spills": 0}
    assert code.counts() == expected


def test_serialised():
    """A wait after the last of several, or after each."""
    ptx = "wgmma.mma_async\nwgmma.mma_async\nwgmma.commit_group\n"
    one, last = "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;", "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0 ;"
    assert not serialised(one + last, ptx)
    assert serialised(last + last, ptx)
    assert not serialised(last, "wgmma.mma_async\nwgmma.commit_group\n")
    assert not serialised("HMMA.16816.F32 R4, R8, R12, R4 ;", "")
