"""A plain matrix product in Triton, to hold the simulator against."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """C (M, N) = A (M, K) · B (K, N), all row by row; tiles in groups of GROUP rows of tiles."""
    pid, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP * tiles_n)
    first = group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    m = (first + pid % (GROUP * tiles_n) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid % (GROUP * tiles_n) // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_ptrs, b_ptrs = a_ptr + m[:, None] * K + k[None, :], b_ptr + k[:, None] * N + n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, K, BLOCK_K):
        acc = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), acc)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * N
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc.to(c_ptr.dtype.element_ty))


def described(size: int) -> dict[str, Any]:
    """Its launch on square matrices in bfloat16, as ``bench/_capture.py`` describes one."""
    import torch

    from bench import _capture
    from segvit_kernels.triton._launch import Launch

    with torch.device("meta"):
        a, b, c = (torch.empty(size, size, dtype=torch.bfloat16) for _ in range(3))
    arguments = {"a_ptr": a, "b_ptr": b, "c_ptr": c, "M": size, "N": size, "K": size}
    constants = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8}
    programs = (size // 128) * (size // 256)
    options = {"num_warps": 8, "num_stages": 3}
    return _capture.describe(Launch(_matmul_kernel, programs, arguments, constants, options), "sm_90")
