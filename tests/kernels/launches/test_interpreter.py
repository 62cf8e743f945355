"""The interpreter that this suite makes quicker computes what Triton's own does, bit by bit."""

import json
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
SCRIPT = """
import json
import os
import sys
os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton.language as tl
from triton.runtime import interpreter as theirs
import interpreter
import segvit_kernels
from segvit_kernels import fused_atm, semantic_argmax

def found(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 32, dtype=dtype, requires_grad=True) for n in (5, 37, 37))
    out, masks = fused_atm(q, k, v, dropout_p=0.25, backend="triton")[:2]
    (out.sum() + masks.square().sum()).backward()
    logits = torch.randn(1, 5, 4, 3, dtype=dtype)
    labels = semantic_argmax(logits, torch.rand(1, 5, 6), (17, 9), backend="triton")
    return [t.detach() for t in (out, masks, q.grad, k.grad, v.grad, labels)]

def made(shape):
    of = tl.block_type(tl.float16, shape) if shape else tl.float16
    tensor = tl.tensor(None, of)
    size = [tensor.numel.value, *(length.value for length in tensor.shape), *(of.shape if shape else ())]
    return size, of.numel if shape else 1, str(tensor.dtype), str(tensor.type)

shapes = ([], [8], [4, 8], [4, 8])
tensors = [made(shape) for shape in shapes]
plain = theirs._patch_lang
before = [found(dtype) for dtype in (torch.float32, torch.float16)]
interpreter.quicken()
quick = theirs._patch_lang
interpreter.quicken()
after = [found(dtype) for dtype in (torch.float32, torch.float16)]
assert tensors == [made(shape) for shape in shapes]
equal = [torch.equal(a, b) for x, y in zip(before, after) for a, b in zip(x, y)]
print(json.dumps({"equal": equal, "quickened": plain is not quick is theirs._patch_lang}))
"""


def test_a_quickened_interpreter_is_the_same():
    path = f"{TESTS}:{TESTS.parent}"
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": path, "PATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {"equal": [True] * 12, "quickened": True}
