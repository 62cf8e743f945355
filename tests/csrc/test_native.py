"""The native library itself: found, refused with a reason, on every instruction set, on random inputs."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import check
import pytest
import torch

import build
from segvit_kernels import (
    _native,
    fused_atm,
)

ROOT = Path(__file__).resolve().parents[2]
REASON = _native.library().reason
built = pytest.mark.skipif(REASON is not None, reason=f"backend cpu: {REASON}")
RUNS = _native.library().isas
ON_X86 = os.uname().machine in ("x86_64", "AMD64")


def run(code, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    environment.pop("SEGVIT_KERNELS_BACKEND", None)
    return subprocess.run([sys.executable, *code], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_without_the_library(tmp_path):
    """Calls run on eager; a request for the backend names the reason: a missing file, or a broken one."""
    script = (
        "import runpy, torch, segvit_kernels as k\n"
        "q = torch.randn(1, 2, 1, 16)\n"
        "print(k.fused_atm(q, q, q).output.shape)\n"
        "try:\n    k.fused_atm(q, q, q, backend='cpu')\n"
        "except k.BackendUnavailableError as error:\n    print(error)\n"
        "runpy.run_module('segvit_kernels', run_name='__main__')\n"
    )
    (tmp_path / "broken.so").write_bytes(b"\x7fELF but not really")
    for name, reason in (("missing.so", "there is no such file"), ("broken.so", "does not load into torch")):
        result = run(["-c", script], SEGVIT_KERNELS_LIBRARY=str(tmp_path / name))
        first, said, *report = result.stdout.strip().splitlines()
        assert first == "torch.Size([1, 2, 1, 16])"
        assert reason in said and name in said
        assert result.returncode == 0
        assert f"cpu missing: {_start(reason, tmp_path / name)}" in "\n".join(report)


def _start(reason, path):
    return f"SEGVIT_KERNELS_LIBRARY is {path}" if "file" in reason else str(path)


@built
def test_a_library_built_for_something_else_is_refused(monkeypatch, tmp_path):
    """After `git pull` it would run, and compute something else: other arguments, or other sources."""
    path = _native.library().path
    assert _native._Library(path, "").reason is None
    with monkeypatch.context() as patch:
        patch.setitem(_native.SCHEMAS, "atm_fwd", _native.SCHEMAS["atm_fwd"].replace("scale", "factor"))
        assert f"{path} was built for another version" in _native._Library(path, "").reason
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "segvit_kernels" / "_native.py"))
    assert _native._Library(path, "").reason is None
    with (tmp_path / "csrc" / "cpu" / "attention" / "attention.h").open("a") as file:
        file.write("\n")
    reason = _native._Library(path, "").reason
    assert "was built from other sources" in reason and "make native" in reason


def _compiler(path, macros):
    path.write_text(
        "#!/bin/sh\n" + "".join(f"echo '#define {name} {value}'\n" for name, value in macros.items())
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(os.name != "posix", reason="the native library is for Linux")
@pytest.mark.parametrize(
    "macros, said",
    [
        ({"__GNUC__": 10}, "is GCC 10; the least is GCC 11 or Clang 14"),
        (
            {"__GNUC__": 4, "__clang__": 1, "__clang_major__": 13},
            "is Clang 13; the least is GCC 11 or Clang 14",
        ),
        ({"__GNUC__": 11}, None),
        ({"__GNUC__": 4, "__clang__": 1, "__clang_major__": 14}, None),
    ],
)
def test_compilers_that_are_too_old_are_refused(tmp_path, macros, said):
    compiler = _compiler(tmp_path / "c++", macros | {"__VERSION__": '"some version"'})
    if said is None:
        assert build._identity([compiler]) == '"some version"'
    else:
        with pytest.raises(RuntimeError, match=f"{tmp_path}.* {said}"):
            build._identity([compiler])


def test_only_linux_builds(monkeypatch):
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    with pytest.raises(RuntimeError, match="the native library is for Linux"):
        build.build(build.parse([]))


def test_objects_of_another_compiler_are_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "_plan", lambda *_: [(ROOT / "csrc/cpu/isa.cpp", "isa.o", ["compiler"])])
    monkeypatch.setattr(
        build, "_run", lambda command, *_: Path(command[-1]).write_text("") if "-o" in command else ""
    )
    names = []
    for version in ("one", "two", "one"):
        monkeypatch.setattr(build, "_identity", lambda _, version=version: version)
        names.append(build.objects(build.parse(["--cpu-only"]))["isa.o"].name)
    assert names[0] == names[2] != names[1]


def test_builds_at_the_same_time_write_files_of_their_own(monkeypatch, tmp_path):
    """Else one would link what the other has half written."""
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "_plan", lambda *_: [(ROOT / "csrc/cpu/isa.cpp", "isa.o", ["compiler"])])
    monkeypatch.setattr(build, "_identity", lambda _: "one")
    written = []

    def run(command, *_):
        if "-o" in command:
            Path(command[-1]).write_text(f"by {len(written)}, half")
            written.append(command[-1])
            if len(written) == 1:
                with monkeypatch.context() as other:
                    other.setattr(os, "getpid", lambda: -1)
                    build.objects(build.parse(["--cpu-only"]))
            Path(command[-1]).write_text("whole")
        return ""

    monkeypatch.setattr(build, "_run", run)
    assert build.objects(build.parse(["--cpu-only"]))["isa.o"].read_text() == "whole"
    assert len(set(written)) == 2 and len(list((tmp_path / "build" / "native").iterdir())) == 1


@pytest.mark.parametrize("path", check.TESTS)
def test_a_gpu_gets_cases_of_every_operator_in_cuda(path):
    """`csrc/check.py` selects them by names and ids of the batteries."""
    battery = importlib.import_module(Path(path).stem)
    tests = [vars(battery)[name] for name in ("test_case", "test_halves") if name in vars(battery)]
    marks = [mark for test in tests for mark in test.pytestmark if mark.args and "backend" in mark.args[0]]
    ids = {row.id for mark in marks for row in mark.args[1]}
    assert {"cuda-gpu-fp32", "cuda-gpu-bf16"} <= ids


def test_parts_of_the_check_share_its_time(monkeypatch, capsys):
    """Half of what is left is each one's, all of it the last one's; the build's too."""
    now, given = 0.0, []

    def run(command, timeout, *_):
        nonlocal now
        given.append(timeout)
        now += timeout
        return 0, "1 passed"

    monkeypatch.setattr(check.time, "time", lambda: now)
    monkeypatch.setattr(check.sanitizer, "run", run)
    monkeypatch.setattr(check.sanitizer, "check", lambda tool, command, timeout, **_: row(tool, timeout))
    monkeypatch.setattr(check.shutil, "which", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["check.py", "--json", "--timeout", "800"])

    def row(tool, timeout):
        run(tool, timeout)
        return {"name": tool, "status": "ok", "summary": ""}

    assert check.main() == 0
    assert given == [400, 200, 100, 100]
    capsys.readouterr()


def test_operators_with_kernels_in_cuda_are_checked_on_a_gpu():
    assert len(check.TESTS) == len(set(build.OPERATORS) - {"linear"})
    for selected in (check.CASES, check.SMALL):
        assert "cuda-gpu" in selected and "test_case" in selected and "test_halves" in selected


@built
def test_what_the_report_says():
    report = run(["-m", "segvit_kernels"]).stdout
    assert f"native library: {_native.library().path}" in report
    assert "segvit::atm_fwd              cpu\n" in report and "cpu missing" not in report


@built
def test_double_precision_runs_on_eager_unless_asked_for():
    q = torch.randn(1, 3, 2, 16, dtype=torch.float64)
    assert fused_atm(q, q, q).output.dtype == torch.float64
    with pytest.raises(
        TypeError, match=r"backend 'cpu' takes float32, float16 and bfloat16; query is torch.float64"
    ):
        fused_atm(q, q, q, backend="cpu")


@built
@pytest.mark.skipif(not ON_X86, reason="one instruction set only, this is no x86 processor")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_other_instruction_sets(isa):
    """The batteries' first cases, and near ties, on code for lesser processors than this one."""
    if isa not in RUNS:
        pytest.skip(f"this processor runs {', '.join(RUNS)}")
    if isa == RUNS[-1] == _native.library().isa:
        pytest.skip("what the whole suite runs on here")
    tests, operators = ROOT / "tests" / "kernels", (ROOT / "segvit_kernels" / "ops").glob("[a-z]*.py")
    files = [file for path in operators for file in tests.glob(f"test_{path.stem}*.py")]
    command = [
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "(test_case or NearTies) and cpu",
        *map(str, files),
    ]
    result = run(command, SEGVIT_KERNELS_ISA=isa, PYTEST_ADDOPTS="")
    assert result.returncode == 0, result.stdout[-3000:]
    script = "from segvit_kernels import _native; print(_native.library().isa)"
    found = run(["-c", script], SEGVIT_KERNELS_ISA=isa).stdout.strip()
    assert found == isa


@built
@pytest.mark.parametrize("isa", ["AVX2", "avx512_fp16"])
def test_an_instruction_set_that_is_none_or_not_here_is_refused(isa):
    if isa in RUNS:
        pytest.skip(f"this processor runs {isa}")
    script = (
        "import torch, segvit_kernels as k; q = torch.randn(1, 2, 1, 16); k.fused_atm(q, q, q, backend='cpu')"
    )
    result = run(["-c", script], SEGVIT_KERNELS_ISA=isa)
    last = result.stderr.strip().splitlines()[-1]
    assert f"SEGVIT_KERNELS_ISA is {isa!r}, expected what this processor runs: portable" in last
    assert isa not in last.partition("expected")[2]


@pytest.mark.parametrize(
    "archs, runs, does_not",
    [
        ("75;80;90a", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 0)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0), (12, 0)]),  # of that chip alone, without PTX
        ("80;90a", [(8, 6), (9, 0), (12, 1)], [(7, 5)]),
        ("100f", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("86", [(8, 6), (8, 9), (9, 0)], [(8, 0)]),
    ],
)
def test_which_gpus_a_build_has_code_for(archs, runs, does_not):
    known = archs.split(";")
    assert all(_native._contains(known, gpu) for gpu in runs)
    assert not any(_native._contains(known, gpu) for gpu in does_not)
