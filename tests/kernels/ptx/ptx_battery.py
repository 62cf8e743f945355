"""What the PTX machine is held to: ``python ptx_battery.py sm_90``, in a process without interpreter.

Kernels of the kinds that Triton's tutorials teach, compiled and executed, against PyTorch in float64. A
line for each; fails at the first that differs.
"""

import sys
import time

import torch

sys.path.extend(__file__.rsplit("/", up)[0] for up in (1, 2))
import ptx_kernels as kernels
import ptx_text

from segvit_kernels.testing import ptx, relative_error

BUDGET = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def hold(name: str, found: torch.Tensor, truth: torch.Tensor, budget: float) -> None:
    error = relative_error(found, truth)
    print(f"  {name}: {error:.2g}", flush=True)
    assert error <= budget, f"{name}: {error:.3g}, budget {budget:.3g}"


def add(dtype):
    x, y = torch.randn(2, 1000).to(dtype)
    out = torch.full_like(x, torch.nan)
    kernels.add[(8,)](x, y, out, 1000, BLOCK=128)
    assert torch.equal(out, x + y)


def softmax(dtype):
    x = torch.randn(5, 300).to(dtype)[:, :257]
    out = torch.full((5, 257), torch.nan, dtype=dtype)
    kernels.softmax[(5,)](x, out, x.stride(0), 257, BLOCK=512)
    hold("softmax", out, x.double().softmax(1), BUDGET[dtype])


def layer_norm(dtype):
    x, dy = torch.randn(2, 7, 200).to(dtype)
    w, b = torch.randn(2, 200).to(dtype)
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    truth = torch.nn.functional.layer_norm(leaves[0], (200,), *leaves[1:], 1e-5)
    grads = torch.autograd.grad(truth, leaves, dy.double())
    out, dx, mean, rstd = torch.empty_like(x), torch.empty_like(x), torch.empty(7), torch.empty(7)
    kernels.layer_norm[(7,)](x, w, b, out, mean, rstd, 200, 1e-5, BLOCK=256)
    hold("layer norm", out, truth.detach(), BUDGET[dtype])
    dw, db = torch.zeros(2, 200)
    kernels.layer_norm_backward[(7,)](dy, x, w, mean, rstd, dx, dw, db, 200, BLOCK=256)
    for name, found, true in zip(("dx", "dw", "db"), (dx, dw, db), grads, strict=True):
        hold(f"layer norm, {name}", found, true, BUDGET[dtype])


def matmul(dtype, precision="ieee", stages=3):
    a, b = torch.randn(70, 96).to(dtype), torch.randn(96, 72).to(dtype)
    c = torch.full((70, 72), torch.nan, dtype=dtype)
    numbers = (70, 72, 96, a.stride(0), b.stride(0), c.stride(0))
    options = {"BM": 64, "BN": 64, "BK": 32, "PRECISION": precision, "num_stages": stages, "num_warps": 4}
    kernels.matmul[(4,)](a, b, c, *numbers, **options)
    budget = 2e-3 if precision == "tf32" else BUDGET[dtype]
    hold(f"matmul {precision}, {stages} stages", c, a.double() @ b.double(), budget)


def attention(dtype):
    heads, n, d = 2, 100, 32
    q, k, v, do = torch.randn(4, heads, n, d).to(dtype)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    truth = torch.nn.functional.scaled_dot_product_attention(*leaves)
    grads = torch.autograd.grad(truth, leaves, do.double())
    out, lse = torch.empty_like(q), torch.empty(heads, n)
    tiles = {"D": d, "BM": 64, "BN": 32, "num_warps": 4}
    kernels.attention[(2, heads)](q, k, v, out, lse, n, d**-0.5, **tiles)
    # In float32 tl.dot takes TF32 by default.
    budget = 2e-3 if dtype == torch.float32 else 2 * BUDGET[dtype]
    hold("attention", out, truth.detach(), budget)
    delta = (do.double() * out.double()).sum(-1).float()
    dq, dk, dv = torch.zeros(heads, n, d), torch.empty_like(k), torch.empty_like(v)
    tiles |= {"BN": 64, "BM": 32}
    kernels.attention_backward[(2, heads)](q, k, v, do, lse, delta, dq, dk, dv, n, d**-0.5, **tiles)
    for name, found, true in zip(("dq", "dk", "dv"), (dq, dk, dv), grads, strict=True):
        hold(f"attention, {name}", found, true, 2 * budget)


def count() -> None:
    """Bytes, sectors and bank conflicts of a kernel whose numbers can be told by hand."""
    out = torch.zeros(64, dtype=torch.int32)
    found = ptx.run_ptx(ptx_text.CONFLICTS, "conflicts", (3, 1, 1), 32, [out], traffic=True)
    one = {"shared bytes written": 32 * 20, "shared bytes read": 128, "shared passes": 4 + 32 + 32}
    one |= {"bank conflicts": 62, "global bytes written": 128, "global sectors": 8}
    assert found.memory == {name: 3 * n for name, n in one.items()}, found.memory
    classes = {"shared memory": 9, "global memory": 3, "param memory": 3, "integer": 9, "move": 6}
    assert found.classes == classes | {"synchronisation": 3, "control": 3}, found.classes


def main(arch: str, *names: str) -> None:
    count()
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    chosen = [dtypes[name] for name in names] or list(dtypes.values())
    with ptx.machine(arch) as session:
        for dtype in chosen:
            torch.manual_seed(0)
            print(arch, dtype, flush=True)
            begin = time.process_time()
            for part in (add, softmax, layer_norm, attention):
                part(dtype)
            for stages in (1, 3):
                for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
                    matmul(dtype, precision, stages)
            print(f"  {time.process_time() - begin:.1f} s")
    print(dict(session.launches))


if __name__ == "__main__":
    main(*sys.argv[1:])
