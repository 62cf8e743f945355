"""The PTX machine: kernels that the real compiler made, executed without a GPU.

Each test is a process of its own: this one has Triton's interpreter. Long forms: ``make ptx``.
"""

import os
import subprocess
import sys
from pathlib import Path

import ptx_native
import pytest

HERE = Path(__file__).resolve().parent


def run(script: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_INTERPRET")}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(HERE.parents[1]), environment.get("PYTHONPATH")))
    )
    command = [sys.executable, HERE / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_triton_kernel_and_those_of_the_tutorials(arch):
    """Against PyTorch; one dtype and few cases."""
    printed = run("ptx_operators.py", arch, "bf16")
    assert "'attention_backward': 1, 'matmul': 2" in printed
    assert printed.rstrip().endswith("never: []")


def test_every_cuda_kernel():
    """What nvcc makes of csrc/cuda, in place of the emulator's fibers; the whole battery: ``make ptx``."""
    if reason := ptx_native.missing():
        pytest.skip(reason)
    printed = run("ptx_native.py", "sm_80", "bf16")
    assert printed.rstrip().endswith("never: []")


def test_planted_faults_are_seen():
    """Each by its own message; those in CUDA C++ where its kernels can be compiled."""
    printed = run("ptx_faults.py")
    assert "MISSED" not in printed and printed.count("seen: ") >= (33 if ptx_native.missing() else 39)
