"""A plain matrix product in Triton, to hold the simulator against."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segvit_kernels.triton._launch import Launch


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


def launch(size: int) -> Launch:
    """Its launch on square matrices in bfloat16."""
    with torch.device("meta"):
        a, b, c = (torch.empty(size, size, dtype=torch.bfloat16) for _ in range(3))
    arguments = {"a_ptr": a, "b_ptr": b, "c_ptr": c, "M": size, "N": size, "K": size}
    constants = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8}
    programs = (size // 128) * (size // 256)
    return Launch(_matmul_kernel, programs, arguments, constants, {"num_warps": 8, "num_stages": 3})
