"""The PTX machine: kernels that the real compiler made, executed without a GPU.

What needs Triton's compiler is a process of its own: this one has its interpreter. Long forms: ``make ptx``.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ptx_coverage
import ptx_native
import ptx_text
import pytest
import torch
from conftest import in_turn

from segvit_kernels.testing import ptx
from segvit_kernels.testing.ptx import floating

HERE = Path(__file__).resolve().parent


def run(script: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_INTERPRET")}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(HERE.parents[2]), environment.get("PYTHONPATH")))
    )
    command = [sys.executable, HERE / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("script, arch", [("ptx_battery.py", "sm_80"), ("ptx_operators.py", "sm_90")])
def test_every_triton_kernel_and_those_of_the_tutorials(script, arch):
    """Against PyTorch; one dtype and few cases. Those of the operators on sm_80: ``make ptx``."""
    printed = run(script, arch, "bf16")
    assert "'attention_backward': 1, 'matmul': 2" in printed
    assert script == "ptx_battery.py" or printed.rstrip().endswith("never: []")


def test_every_cuda_kernel():
    """What nvcc makes of csrc/cuda, in place of the emulator's fibers; the whole battery: ``make ptx``."""
    if reason := ptx_native.missing():
        pytest.skip(reason)
    printed = run("ptx_native.py", f"sm_{ptx_native.resources.plain()}", "bf16")
    assert printed.rstrip().endswith("never: []")


def test_planted_faults_are_seen():
    """Each by its own message; those in CUDA C++ where its kernels can be compiled."""
    printed = run("ptx_faults.py")
    assert "MISSED" not in printed and printed.count("seen: ") >= (33 if ptx_native.missing() else 39)


def test_local_memory():
    """Of each thread its own, by addresses of the space and by generic ones."""
    with ptx_text.machine("sm_80") as session:
        ptx_text.local()
    assert session.counts["local"].instructions["st.local.v4.f32"] == 5  # of 6 warps that begin


@pytest.mark.parametrize(
    ("at", "where"), [(8, "of local memory at 48, a thread has 48"), (-9, "0x7cffffffffffffec")]
)
def test_an_index_behind_the_end_of_local_memory_is_seen(at, where):
    index = torch.zeros(150, dtype=torch.int32)
    index[71] = at
    with ptx_text.machine("sm_80"), pytest.raises(ptx.Fault, match="out of bounds") as caught:
        ptx_text.local(index)
    assert where in str(caught.value) and "block 1, thread 7" in str(caught.value)


def test_local_memory_that_its_thread_did_not_write_is_seen():
    """What lies before the array in it, and what another block's thread of the same number wrote."""
    index = torch.zeros(150, dtype=torch.int32)
    index[149] = -1
    with ptx_text.machine("sm_80"), pytest.raises(ptx.Fault, match="uninitialised local memory") as caught:
        ptx_text.local(index)
    assert "block 2, thread 21" in str(caught.value)


def test_one_dtype_of_each_case_in_turn():
    """All dtypes of a test of fewer cases than dtypes, and what has no dtype."""

    def item(test, **given):
        return SimpleNamespace(path="file", originalname=test, callspec=SimpleNamespace(params=given))

    half, single = torch.float16, torch.float32
    many = [item("many", case=case, backend="a", dtype=d) for case in "abc" for d in (half, single)]
    other = [item("many", case=case, backend="b", dtype=d) for case in "abc" for d in (half, single)]
    both = [x for pairs in zip(many, other, strict=True) for x in pairs]
    few = [item("few", dtype=d) for d in (half, single)]
    others = [
        SimpleNamespace(path="file", originalname="plain"),
        item("cases", case="a"),
        item("cases", case="b"),
    ]
    assert in_turn([*many, *few, *others]) == [many[0], many[3], many[4], *few, *others]
    assert [x for x in in_turn(both) if x in many] == [many[0], many[3], many[4]]


def test_a_kernel_that_was_not_executed_is_said():
    """In a dtype that it takes; one that nobody expects is no row."""
    with ptx_text.machine("sm_80") as session:
        ptx_text.local()
    (kernel, dtypes, text), launches = next(iter(session.variants.items()))
    row = {"arch": "sm_80", "kernel": kernel, "column": ptx_coverage.column(dtypes), "text": text}
    expected = {("local", "fp32"), ("local", "bf16")}
    lines, missing = ptx_coverage.table([row | {"launches": launches}], "sm_80", expected, {})
    assert missing == ["sm_80 local bf16"] and "1 / 1" in lines[1] and "MISSING" in lines[1]
    lines, missing = ptx_coverage.table([row | {"launches": 1, "arch": "sm_90"}], "sm_80", expected, {})
    assert len(missing) == 2


@pytest.mark.parametrize(
    ("selector", "expected"), [("0x2301", 0x07060504), ("0x7301", None), ("0x1000", None)]
)
def test_bytes_of_a_register_that_nothing_wrote(selector, expected):
    """A permutation may name one of which it takes nothing, as LLVM writes it, and no other."""
    first, second = ("%r1", "%r2") if selector != "0x1000" else ("%r2", "%r1")
    text = f"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry bytes(.param .u64 out) {{
    .reg .b32 %r<4>;
    .reg .b64 %rd<2>;
    mov.b32 %r1, 0x06070405;
    prmt.b32 %r3, {first}, {second}, {selector};
    ld.param.u64 %rd1, [out];
    st.global.b32 [%rd1], %r3;
    ret;
}}
"""
    out = torch.zeros(1, dtype=torch.int32)
    if expected is None:
        with pytest.raises(ptx.Fault, match="uninitialised register"):
            ptx.run_ptx(text, "bytes", (1, 1, 1), 32, [out])
    else:
        ptx.run_ptx(text, "bytes", (1, 1, 1), 32, [out])
        assert out.item() == expected


@pytest.mark.parametrize("name", floating.ERRORS)
def test_approximate_instructions_err_as_far_as_they_may(name):
    """No further, by a good part of it, and always the same; not at all without noise."""
    operation = "div.full.f32 %f1, %f1, 0f40490FDB" if name == "div" else f"{name}.approx.f32 %f1, %f1"
    text = f"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry approximate(.param .u64 x, .param .u64 out) {{
    .reg .f32 %f<2>;
    .reg .b32 %r<2>;
    .reg .b64 %rd<4>;
    mov.u32 %r1, %tid.x;
    ld.param.u64 %rd1, [x];
    ld.param.u64 %rd2, [out];
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd1, %rd1, %rd3;
    add.s64 %rd2, %rd2, %rd3;
    ld.global.f32 %f1, [%rd1];
    {operation};
    st.global.f32 [%rd2], %f1;
    ret;
}}
"""
    x = torch.linspace(0, 6, 512)
    x[0] = 0.001

    def found(noise):
        out = torch.zeros(512)
        ptx.run_ptx(text, "approximate", (1, 1, 1), 512, [x, out], noise=noise)
        return out.double()

    exact = {"div": lambda a: a / torch.tensor(torch.pi).float(), "rcp": torch.reciprocal, "ex2": torch.exp2}
    exact |= {"lg2": torch.log2}
    truth = exact.get(name, getattr(torch, name, None))(x.double())
    relative, absolute = floating.ERRORS[name]
    allowed = (relative * truth.abs()).clamp(min=absolute)
    share = ((found(1) - truth).abs() / allowed).amax()
    assert 0.8 < share <= 1 + 1e-6
    assert torch.equal(found(1), found(1)) and not torch.equal(found(1), found(2))
    assert ((found(None) - truth).abs() <= 2.0**-23 * truth.abs()).all()


@pytest.mark.parametrize("name", ["div.s32", "rem.s32", "div.u32", "rem.u32"])
@pytest.mark.parametrize("zero", [None, 5])
def test_an_integer_divided_by_zero(name, zero):
    """Is a fault of a thread that does it, by its number, and none of one whose guard is false."""
    text = f"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry divide(.param .u64 by, .param .u64 out) {{
    .reg .pred %p<2>;
    .reg .b32 %r<4>;
    .reg .b64 %rd<4>;
    mov.u32 %r1, %tid.x;
    ld.param.u64 %rd1, [by];
    ld.param.u64 %rd2, [out];
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd1, %rd1, %rd3;
    add.s64 %rd2, %rd2, %rd3;
    ld.global.b32 %r2, [%rd1];
    setp.ge.u32 %p1, %r1, 2;
    mov.u32 %r3, 0;
    @%p1 {name} %r3, 77, %r2;
    st.global.b32 [%rd2], %r3;
    ret;
}}
"""
    by, out = torch.arange(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    if zero is not None:
        by[zero] = 0
        with pytest.raises(ptx.Fault, match=f"division by zero: .*thread {zero}"):
            ptx.run_ptx(text, "divide", (1, 1, 1), 32, [by, out])
    else:
        ptx.run_ptx(text, "divide", (1, 1, 1), 32, [by, out])
        assert out.tolist() == [0, 0, *(77 // n if "div" in name else 77 % n for n in range(2, 32))]


def test_comparisons_in_bfloat16_of_what_is_not_a_number():
    """The unordered ones hold of it, as LLVM asks of `score < 0.0` turned round; the others do not."""
    ordered = {"eq": 0b010, "lt": 0b001, "le": 0b011, "gt": 0b100, "ge": 0b110}  # of -1, 1 and 2 with 1
    for how, expected in ordered.items():
        for suffix, of_nan in (("", 0), *([("u", 0b1000)] if how != "eq" else [])):
            lines = [
                f"mov.b16 %rs2, {x};\nsetp.{how}{suffix}.bf16 %p1, %rs2, %rs1;\n"
                f"selp.b32 %r2, {1 << bit}, 0, %p1;\nor.b32 %r1, %r1, %r2;"
                for bit, x in enumerate(("0xBF80", "0x3F80", "0x4000", "0x7FC0"))
            ]
            text = f"""
.version 8.0
.target sm_90
.address_size 64
.visible .entry compare(.param .u64 out) {{
    .reg .pred %p<2>;
    .reg .b16 %rs<3>;
    .reg .b32 %r<3>;
    .reg .b64 %rd<2>;
    mov.b32 %r1, 0;
    mov.b16 %rs1, 0x3F80;
    {chr(10).join(lines)}
    ld.param.u64 %rd1, [out];
    st.global.b32 [%rd1], %r1;
    ret;
}}
"""
            out = torch.zeros(1, dtype=torch.int32)
            ptx.run_ptx(text, "compare", (1, 1, 1), 32, [out])
            assert out.item() == expected | of_nan, how + suffix
