"""A wheel with the native library: built, unpacked elsewhere, used by another process."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

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
print(folder, torch.__version__, q.grad.isfinite().all().item())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Sources are compiled by `make native` before; the wheel then links and packs."""
    if _native.library().reason is not None:
        pytest.skip(f"backend cpu: {_native.library().reason}")
    setuptools = pytest.importorskip("setuptools", "77", reason="building wheels here needs setuptools ≥ 77")
    assert setuptools
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(out), str(ROOT)],
        env={
            **os.environ,
            "SEGVIT_KERNELS_NATIVE": "1",
            "SEGVIT_KERNELS_CUDA_ARCHS": _native.library().cuda_archs,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = out.glob("*.whl")
    return found


def test_one_wheel_for_every_python(wheel):
    assert wheel.name.split("-")[2:4] == ["py3", "none"] and "any" not in wheel.stem.split("-")[-1]
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if n.startswith("segvit_kernels/libsegvit_native")]
    assert "segvit_kernels/triton/atm.py" in names and "segvit/cli.py" in names
    assert {f"segvit/serve/page/{name}" for name in ("index.html", "style.css", "script.js")} <= set(names)
    assert not [n for n in names if n.startswith(("tests", "bench", "csrc", "examples"))]


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
        assert done.stdout.startswith(f"{tmp_path / 'segvit_kernels'} ") and done.stdout.strip().endswith(
            "True"
        )
