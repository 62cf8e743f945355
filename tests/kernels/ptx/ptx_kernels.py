"""Triton kernels for the PTX machine's tests, of the kinds that Triton's tutorials teach."""

import triton
import triton.language as tl


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    x = tl.load(x_ptr + i, mask=inside)
    tl.store(out_ptr + i, x + tl.load(y_ptr + i, mask=inside), mask=inside)


@triton.jit
def softmax(x_ptr, out_ptr, stride, n, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + column, mask=column < n, other=float("-inf")).to(tl.float32)
    weights = tl.exp(x - tl.max(x, 0))
    weights /= tl.sum(weights, 0)
    tl.store(out_ptr + row * n + column, weights.to(out_ptr.dtype.element_ty), mask=column < n)


@triton.jit
def layer_norm(x_ptr, w_ptr, b_ptr, out_ptr, mean_ptr, rstd_ptr, n, eps, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < n
    x = tl.load(x_ptr + row * n + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / n
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / n + eps)
    w, b = tl.load(w_ptr + column, mask=inside), tl.load(b_ptr + column, mask=inside)
    y = centred * rstd * w + b
    tl.store(out_ptr + row * n + column, y.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def layer_norm_backward(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_ptr, db_ptr, n, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums of dw and db over rows by atomics."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < n
    x = tl.load(x_ptr + row * n + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * n + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    normal = tl.where(inside, (x - mean) * rstd, 0.0)
    scaled = dy * w
    dx = (scaled - (normal * tl.sum(normal * scaled, 0) + tl.sum(scaled, 0)) / n) * rstd
    tl.store(dx_ptr + row * n + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.atomic_add(dw_ptr + column, dy * normal, mask=inside, sem="relaxed")
    tl.atomic_add(db_ptr + column, dy, mask=inside, sem="relaxed")


@triton.jit
def matmul(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_am, stride_bk, stride_cm,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BN)
    m = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a_ptrs = a_ptr + (m % M)[:, None] * stride_am + k[None, :]
    b_ptrs = b_ptr + k[:, None] * stride_bk + (n % N)[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        a = tl.load(a_ptrs, mask=k[None, :] < K - start, other=0.0)
        b = tl.load(b_ptrs, mask=k[:, None] < K - start, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += BK
        b_ptrs += BK * stride_bk
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(c_ptr + m[:, None] * stride_cm + n[None, :], acc.to(c_ptr.dtype.element_ty), mask=inside)


@triton.jit
def attention(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, N, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Online softmax; (heads, N, D) contiguous."""
    head = tl.program_id(1)
    q_ptr += head * N * D
    k_ptr += head * N * D
    v_ptr += head * N * D
    m, n, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    q = tl.load(q_ptr + m[:, None] * D + d[None, :], mask=m[:, None] < N, other=0.0)
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for start in range(0, N, BN):
        here = start + n < N
        k = tl.load(k_ptr + (start + n)[:, None] * D + d[None, :], mask=here[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        s = tl.where(here[None, :], s, float("-inf"))
        new = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp(s - new[:, None])
        kept = tl.exp(largest - new)
        total = total * kept + tl.sum(p, 1)
        v = tl.load(v_ptr + (start + n)[:, None] * D + d[None, :], mask=here[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * kept[:, None])
        largest = new
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + head * N * D + m[:, None] * D + d[None, :], out, mask=m[:, None] < N)
    tl.store(lse_ptr + head * N + m, largest + tl.log(total), mask=m < N)


@triton.jit
def attention_backward(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, N, scale,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One program for a tile of keys; dq (float32) by atomics."""
    base = tl.program_id(1) * N
    n, m0, d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, D)
    here = n < N
    keys = (base + n)[:, None] * D + d[None, :]
    k = tl.load(k_ptr + keys, mask=here[:, None], other=0.0)
    v = tl.load(v_ptr + keys, mask=here[:, None], other=0.0)
    dk, dv = tl.zeros([BN, D], tl.float32), tl.zeros([BN, D], tl.float32)
    for start in range(0, N, BM):
        m = start + m0
        rows = (base + m)[:, None] * D + d[None, :]
        q = tl.load(q_ptr + rows, mask=m[:, None] < N, other=0.0)
        do = tl.load(do_ptr + rows, mask=m[:, None] < N, other=0.0)
        lse = tl.load(lse_ptr + base + m, mask=m < N, other=float("inf"))
        delta = tl.load(delta_ptr + base + m, mask=m < N, other=0.0)
        p = tl.exp(tl.dot(k, tl.trans(q)) * scale - lse[None, :])
        p = tl.where(here[:, None], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv)
        ds = (p * (tl.dot(v, tl.trans(do)) - delta[None, :]) * scale).to(q.dtype)
        dk = tl.dot(ds, q, dk)
        tl.atomic_add(dq_ptr + rows, tl.dot(tl.trans(ds), k), mask=m[:, None] < N, sem="relaxed")
    tl.store(dk_ptr + keys, dk.to(dk_ptr.dtype.element_ty), mask=here[:, None])
    tl.store(dv_ptr + keys, dv.to(dv_ptr.dtype.element_ty), mask=here[:, None])
