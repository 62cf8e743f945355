"""The stub of libcuda: in a process of its own, as it takes the CPU's tensors for good."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from segvit_kernels.testing import stub

ROOT = Path(__file__).resolve().parents[3]

START = """
import json, torch
from segvit_kernels.testing import stub
gpu = stub.install(multiprocessors=114)
"""
LAUNCH = """
from triton import knobs
from triton.runtime import driver
from segvit_kernels import subsample_layer_norm
from segvit_kernels.testing.stub.torch_cuda import pretended

def call(x):
    with gpu.record() as records:
        normed = subsample_layer_norm(x, torch.ones(64), torch.zeros(64), grid=(3, 4), stride=2)[0]
    (record,) = records
    numbers = [int.from_bytes(p, "little") for p in record.parameters]
    pointers = [numbers[0] == x.data_ptr(), numbers[3] == normed.data_ptr()]
    return [record.name, record.programs, record.threads, record.shared, *pointers, *numbers[8:]], record

gpu.stream = 5
first, record = call(torch.randn(2, 12, 64))  # by the JIT
gpu.stream = 6
again, other = call(torch.randn(2, 12, 64))  # from the plan
seen = []
knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata.get()["name"]))
watched, _ = call(torch.randn(2, 12, 64))
knobs.runtime.launch_enter_hook.calls.clear()
knobs.compilation.listener = lambda **_: seen.append("by the JIT")
layer = lambda x, w, b: subsample_layer_norm(x, w, b, grid=(3, 4), stride=2)
compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
traces = []
for stream in (7, 8):
    gpu.stream = stream
    leaves = [torch.randn(2, 12, 64), torch.ones(64), torch.zeros(64)]
    leaves = [t.requires_grad_() for t in leaves]
    with gpu.record() as records:
        compiled(*leaves)[0].sum().backward()
    inputs = [int.from_bytes(r.parameters[0], "little") == leaves[0].data_ptr() for r in records[:1]]
    traces.append([[r.name for r in records], {r.stream for r in records} == {stream}, *inputs])
device = torch.device("cuda", 0)
with pretended(gpu):
    from bench.measure import timing
    x = torch.ones(3, device=device).to("cuda")
    graph = timing.capture(lambda: x + 1)
    graph.replay()
    inside = [torch.cuda.is_available(), torch.cuda.get_device_properties(device).multi_processor_count]
print(json.dumps({
    "first": first[:3] + first[4:6], "strides": first[6:9], "sizes": [len(p) for p in record.parameters[:9]],
    "same": first == again == watched, "streams": [record.stream, other.stream], "seen": seen,
    "launches": gpu.launches, "inside": inside, "compiled": traces,
    "device": str(x.device), "after": torch.cuda.is_available(),
    "multiprocessors": driver.active.utils.get_device_properties(0)["multiprocessor_count"],
}))
"""


COMPILED = [f"_subsample_norm_{name}_kernel" for name in ("fwd", "bwd", "bwd_parameters")]


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
    """By the JIT, from a plan, past the plan where a hook watches, from plans in a compiled function; then
    torch.cuda for a while."""
    assert run(LAUNCH) == {
        "first": ["_subsample_norm_fwd_kernel", 1, 128, True, True],
        "strides": [768, 64, 24],
        "sizes": [8] * 8 + [4],
        "same": True,
        "streams": [5, 6],
        "seen": ["_subsample_norm_fwd_kernel", *["by the JIT"] * 2],  # the backward's two, once
        "launches": 9,
        "compiled": [[COMPILED, True, True]] * 2,
        "inside": [True, 114],
        "device": "cpu",
        "after": False,
        "multiprocessors": 114,
    }


def test_refuses_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(stub.torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is 1"):
        stub.install()
    monkeypatch.setattr(stub.torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="hide it"):
        stub.install()
