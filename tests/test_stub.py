"""The stub of libcuda: in a process of its own, as it takes the CPU's tensors for good."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]

START = """
import json, torch
from segvit_kernels.testing import stub
gpu = stub.install(multiprocessors=114)
"""
LAUNCH = """
from segvit_kernels import subsample_layer_norm
x = torch.randn(2, 12, 64)
with gpu.record() as records:
    gpu.stream = 5
    normed = subsample_layer_norm(x, torch.ones(64), torch.zeros(64), grid=(3, 4), stride=2)[0]
(record,) = records
x_ptr, normed_ptr = (int.from_bytes(record.parameters[i], "little") for i in (0, 3))
from triton.runtime import driver
print(json.dumps({
    "name": record.name, "stream": record.stream, "launches": gpu.launches, "threads": record.threads,
    "sizes": [len(p) for p in record.parameters[:9]],
    "pointers": [x_ptr == x.data_ptr(), normed_ptr == normed.data_ptr()],
    "strides": [int.from_bytes(p, "little") for p in record.parameters[8:11]],
    "multiprocessors": driver.active.utils.get_device_properties(0)["multiprocessor_count"],
}))
"""
PRETENDED = """
from segvit_kernels.testing.stub.torch_cuda import pretended
device = torch.device("cuda", 0)
with pretended(gpu):
    from bench import timing
    x = torch.ones(3, device=device).to("cuda")
    graph = timing.capture(lambda: x + 1)
    graph.replay()
    inside = [torch.cuda.is_available(), torch.cuda.get_device_properties(device).multi_processor_count]
print(json.dumps({"inside": inside, "device": str(x.device), "after": torch.cuda.is_available()}))
"""


def run(source, **environment):
    """The last line that a process of its own printed, as JSON."""
    unset = ("TRITON_INTERPRET", "SEGVIT_KERNELS_BACKEND")
    variables = {k: v for k, v in os.environ.items() if k not in unset}
    variables |= {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), variables.get("PYTHONPATH"))))}
    command = [sys.executable, "-c", START + source]
    done = subprocess.run(command, capture_output=True, text=True, env=variables | environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_launches_reach_the_driver_with_their_parameters():
    found = run(LAUNCH)
    assert found == {
        "name": "_subsample_norm_fwd_kernel",
        "stream": 5,
        "launches": 1,
        "threads": 128,
        "sizes": [8] * 8 + [4],
        "pointers": [True, True],
        "strides": [768, 64, 24],
        "multiprocessors": 114,
    }


def test_torch_cuda_is_pretended_inside_its_block():
    assert run(PRETENDED) == {"inside": [True, 114], "device": "cpu", "after": False}


def test_refuses_the_interpreter():
    with pytest.raises(AssertionError, match="TRITON_INTERPRET is 1"):
        run("", TRITON_INTERPRET="1")
