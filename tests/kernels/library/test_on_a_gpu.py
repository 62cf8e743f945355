"""Where there is a GPU, ``pytest -m gpu`` runs compiled kernels, and nothing else claims to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import assert_compiled, interpreted, unknown_choices

TESTS = Path(__file__).resolve().parents[2]
PROBE = """
import os
import pytest
import triton
from segvit_kernels.triton import subsample_norm

def compiled():
    return isinstance(subsample_norm._subsample_norm_fwd_kernel, triton.JITFunction)

@pytest.mark.gpu
def test_on_the_device():
    assert compiled() and "SEGVIT_KERNELS_BACKEND" not in os.environ

def test_anywhere():
    assert not compiled() and os.environ["SEGVIT_KERNELS_BACKEND"] == "eager"
"""
RUN = """
import sys
import torch
torch.cuda.is_available = lambda: True
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("given", "device", "markers", "expected"),
    [
        (None, False, "", True),
        (None, False, "gpu", True),
        (None, True, "", True),
        (None, True, "gpu", False),
        (None, True, "slow and (gpu)", False),
        (None, True, "not gpu", True),
        (None, True, "not slow", True),
        ("1", True, "gpu", True),
        ("0", False, "", False),
    ],
)
def test_interpreted(given, device, markers, expected):
    assert interpreted(given, device, markers) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["-m", "gpu"], "1 passed, 1 deselected"),
        ([], "1 passed, 1 skipped"),
    ],
)
def test_with_a_gpu(options, expected, tmp_path):
    (tmp_path / "gpu").mkdir()  # a name that says nothing of the tests in it
    (tmp_path / "gpu" / "test_probe.py").write_text(PROBE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a device\n")
    unset = ("TRITON_INTERPRET", "SEGVIT_KERNELS_BACKEND")
    environment = {k: v for k, v in os.environ.items() if k not in unset and not k.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(TESTS), str(TESTS.parent), environment.get("PYTHONPATH", "")]
    )
    command = [
        sys.executable,
        "-c",
        RUN,
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "conftest",
        *options,
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr


def test_a_choice_that_is_none_is_said():
    assert unknown_choices({"SEGVIT_GATE": "quick", "SEGVIT_PTX_DTYPES": "", "SEGVIT_DTYPES": "all"}) == []
    assert unknown_choices({"SEGVIT_GATE": "All"}) == ["SEGVIT_GATE is 'All'; expected all or quick"]


def test_kernels_of_the_interpreter_are_noticed():
    import segvit_kernels.triton.subsample_norm

    assert segvit_kernels.triton.subsample_norm
    with pytest.raises(AssertionError, match="InterpretedFunction"):
        assert_compiled()
