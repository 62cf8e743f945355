"""Wheels: built, what they ask for, unpacked elsewhere and used by another process."""

import json
import os
import platform
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import wheels

import segvit_kernels
from segvit_kernels import _native

ROOT = Path(__file__).resolve().parents[1]
USE = """
import pathlib, torch, segvit_kernels
folder = pathlib.Path(segvit_kernels.__file__).parent
q = torch.randn(2, 5, 3, 16, requires_grad=True)
output, masks = segvit_kernels.fused_atm(q, q, q, backend="cpu")
truth = segvit_kernels.atm_reference(*[q.double()] * 3)
torch.testing.assert_close(masks.double(), truth.mask_logits, rtol=1e-5, atol=1e-5)
output.sum().backward()
isa = segvit_kernels._native.library().isa
print(folder, torch.__version__, isa, q.grad.isfinite().all().item())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Sources are compiled by `make native` before; the wheel then links and packs."""
    if _native.library().reason is not None:
        pytest.skip(f"backend cpu: {_native.library().reason}")
    for name, least in (("setuptools", "77"), ("ziglang", None), ("elftools", None)):
        pytest.importorskip(name, least, reason="wheels: pip install 'segvit-kernels[wheels]'")
    return wheels.build(tmp_path_factory.mktemp("wheel"), platform.machine(), _native.library().cuda_archs)


def test_one_wheel_for_every_python(wheel):
    assert wheel.name.split("-")[2:] == ["py3", "none", f"manylinux_2_28_{platform.machine()}.whl"]
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if n.startswith("segvit_kernels/libsegvit_native")]
    assert "segvit_kernels/triton/atm.py" in names and "segvit/cli.py" in names
    assert {f"segvit/serve/page/{name}" for name in ("index.html", "style.css", "script.js")} <= set(names)
    assert not [n for n in names if n.startswith(("tests", "bench", "csrc", "examples"))]


def test_the_wheel_says_what_of_others_is_inside(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/sboms/segvit-kernels.cdx.json")]
    bill = json.loads(archive.read(name))
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["version"] == segvit_kernels.__version__
    found = {part["name"]: part["version"] for part in bill["components"]}
    assert found["torch"] == torch.__version__ and "libstdc++" in found
    assert ("CUDA runtime" in found) == bool(_native.library().cuda_archs)


def test_a_library_that_asks_for_too_much_is_refused(wheel, monkeypatch, tmp_path):
    """The library that `make native` links is of this machine's glibc; fewer promises, and each is missed."""
    library = Path(zipfile.ZipFile(wheel).extract("segvit_kernels/libsegvit_native.so", tmp_path))
    assert wheels.faults(library) == []
    monkeypatch.setattr(wheels, "LIBRARIES", wheels.LIBRARIES - {"libstdc++.so.6"})
    monkeypatch.setattr(wheels, "MOST", wheels.MOST | {"GLIBCXX": "3.4.9"})
    found = wheels.faults(library)
    assert found[0] == "needs libstdc++.so.6" and "asks for GLIBCXX_3.4.21, 3.4.9 at most" in found
    source = tmp_path / "old_abi.cpp"
    source.write_text('namespace at { void add(); }\nextern "C" void use() { at::add(); }\n')
    bad = tmp_path / "bad.so"
    subprocess.run(["c++", "-shared", "-fPIC", "-o", bad, source], check=True)
    assert "asks for _ZN2at3addEv, which is not of the stable ABI" in wheels.faults(bad)


def test_the_pure_wheel(tmp_path):
    pytest.importorskip("setuptools", "77", reason="wheels: pip install 'segvit-kernels[wheels]'")
    wheel = wheels.build(tmp_path, None)
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.endswith("-py3-none-any.whl") and not [n for n in names if n.endswith(".so")]
    assert "segvit_kernels/testing/stub/libcuda.c" in names and "segvit/py.typed" in names


def test_the_source_distribution_can_build_it(tmp_path):
    """Everything that `SEGVIT_KERNELS_NATIVE=1 pip install` of it compiles is inside."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(
        [*command, "sdist", "--dist-dir", str(tmp_path)], cwd=ROOT, check=True, capture_output=True
    )
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.*") if p.suffix != ".pyc"}
    assert sources <= names and {"setup.py", "segvit_kernels/_native.py"} <= names


def test_runs_where_it_is_unpacked(wheel, tmp_path):
    """SEGVIT_OTHER_PYTHON names the interpreter of another environment (another torch) to try it in too."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (tmp_path / "use.py").write_text(USE)
    unset = ("PYTHONPATH", "SEGVIT_KERNELS_LIBRARY", "SEGVIT_KERNELS_BACKEND", "TRITON_INTERPRET")
    variables = {k: v for k, v in os.environ.items() if k not in unset} | {"PYTHONPATH": str(tmp_path)}
    for python in filter(None, (sys.executable, os.environ.get("SEGVIT_OTHER_PYTHON"))):
        done = subprocess.run([python, "use.py"], cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        # The code of this processor, as of a library that its own linker made.
        assert done.stdout.startswith(f"{tmp_path / 'segvit_kernels'} ")
        assert done.stdout.endswith(f" {_native.library().isa} True\n")
