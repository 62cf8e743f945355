"""Kernels with a fault each, in the form of ``segvit_kernels.testing.launches``: what the gate must find."""

import torch
import triton
import triton.language as tl

from segvit_kernels.testing.launches import Demand
from segvit_kernels.triton._launch import Launch

KERNELS = {
    "_sound_kernel": Demand(16, tensor=4, barriers=1),
    "_empty_kernel": Demand(16),
    "_barrier_kernel": Demand(8, barriers=0),
    "_layout_kernel": Demand(8, barriers=0),
    "_spill_kernel": Demand(16),
    "_large_kernel": Demand(16, tensor=4),
    "_forgotten_kernel": Demand(8),
}
EVERYWHERE = {name.removeprefix("_").removesuffix("_kernel"): name for name in list(KERNELS)[:-1]}
MORE = {}


@triton.jit
def _sound_kernel(x_ptr, y_ptr, n):
    """Products in a loop; one barrier a step before operands are read."""
    i = tl.arange(0, 64)
    x = tl.load(x_ptr + i[:, None] * 64 + i[None, :])
    acc = tl.zeros([64, 64], tl.float32)
    for _ in range(n):
        acc = tl.dot(x, x, acc)
    tl.store(y_ptr + i[:, None] * 64 + i[None, :], acc)


@triton.jit
def _empty_kernel(x_ptr, y_ptr, n):
    """Nothing that it computes is stored."""
    i = tl.arange(0, 64)
    acc = tl.load(x_ptr + i)
    for _ in range(n):
        acc += acc


@triton.jit
def _barrier_kernel(x_ptr, y_ptr, n):
    i = tl.arange(0, 1024)
    acc = tl.zeros([1024], tl.float32)
    for _ in range(n):
        acc += tl.load(x_ptr + i)
        x_ptr += 1024
        tl.debug_barrier()
    tl.store(y_ptr + i, acc)


@triton.jit
def _layout_kernel(x_ptr, y_ptr, n):
    """Rows are read and columns are written."""
    i = tl.arange(0, 64)
    for _ in range(n):
        x = tl.load(x_ptr + i[:, None] * 64 + i[None, :])
        tl.store(y_ptr + i[:, None] * 64 + i[None, :], tl.trans(x))
        x_ptr += 4096
        y_ptr += 4096


@triton.jit
def _spill_kernel(x_ptr, y_ptr, n):
    """More sums than registers."""
    i = tl.arange(0, 8192)
    acc = tl.load(y_ptr + i)
    for _ in range(n):
        acc += tl.load(x_ptr + i)
        x_ptr += 8192
    tl.store(y_ptr + i, acc)


@triton.jit
def _large_kernel(x_ptr, y_ptr, n):
    """Tiles in flight: 128 KiB of them."""
    i, k = tl.arange(0, 128), tl.arange(0, 64)
    acc = tl.zeros([128, 128], tl.float32)
    for _ in tl.range(0, n, num_stages=5):
        a = tl.load(x_ptr + i[:, None] * 64 + k[None, :])
        b = tl.load(x_ptr + k[:, None] * 128 + i[None, :])
        acc = tl.dot(a, b, acc)
        x_ptr += 8192
    tl.store(y_ptr + i[:, None] * 128 + i[None, :], acc)


def wgmma(row):
    return row["kernel"] in ("_sound_kernel", "_large_kernel")


def launches(case, arch):
    dtype = torch.float16 if case in ("_sound_kernel", "_large_kernel") else torch.float32
    x, y = torch.empty(1, dtype=dtype, device="meta"), torch.empty(1, device="meta")
    options = {"num_warps": 4, "num_stages": 5}
    if case == "_spill_kernel":
        options |= {"maxnreg": 32}
    return [Launch(globals()[case], 1, {"x_ptr": x, "y_ptr": y, "n": 100}, {}, options)]
