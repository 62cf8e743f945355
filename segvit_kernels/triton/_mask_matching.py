"""The sums that matching needs in Triton: every query with every target.

The walk of the mask loss with queries in place of groups; three products of (queries × pixels) and (pixels ×
targets) on tensor cores, targets read or made from the labels on the fly, split over rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton._launch import Launch, cdiv
from segvit_kernels.triton._mask_entries import _MAX_ROWS, _check_sizes, _options
from segvit_kernels.triton._mask_pixels import (
    _between,
    _columns,
    _logistic,
    _map_row,
    _power,
    _product,
    _rows,
    _wide,
)
from segvit_kernels.triton._mask_targets import _addressable, _sum_launch, _target_launches


@triton.jit
def _mask_matching_kernel(
    x_ptr, targets_ptr, products_ptr, totals_ptr, B, Q, M, h, w, H, W, rows, rows_per_split,
    stride_tb, stride_tm, alpha, gamma,
    LABELS: tl.constexpr, HARD: tl.constexpr, GAMMA_TWO: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """products (splits, 3, B, Q, M) and totals (splits, 3, B, Q): sums over the rows of a split."""
    q_blocks, m_blocks = tl.cdiv(Q, BLOCK_Q), tl.maximum(tl.cdiv(M, BLOCK_M), 1)
    m_first = tl.program_id(0) % m_blocks * BLOCK_M
    q_first = tl.program_id(0) // m_blocks % q_blocks * BLOCK_Q
    image = tl.program_id(0) // m_blocks // q_blocks % B
    split = tl.program_id(0) // m_blocks // q_blocks // B
    q, m = (q_first + tl.arange(0, BLOCK_Q))[:, None], (m_first + tl.arange(0, BLOCK_M))[None, :]
    x_ptr += (image.to(tl.int64) * Q + tl.minimum(q, Q - 1)) * h * w  # [BLOCK_Q, 1]
    targets_ptr += image.to(tl.int64) * stride_tb
    if not LABELS:
        targets_ptr += tl.minimum(m, M - 1).to(tl.int64) * stride_tm  # [1, BLOCK_M]
    focal = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
    bce, overlap = focal, focal
    focal_total = tl.zeros([BLOCK_Q, BLOCK], tl.float32)
    bce_total, total = focal_total, focal_total
    end = tl.minimum((split + 1) * rows_per_split, H)
    for first in range(split * rows_per_split, end, rows):
        row, past, step = _rows(first, h, H)
        for start in range(0, W, BLOCK):
            x = start + tl.arange(0, BLOCK)
            column, aside = _columns(x[None, :], w, W)
            v0 = _map_row(x_ptr, row, h, w, column, aside)  # [BLOCK_Q, BLOCK]
            v1 = _map_row(x_ptr, row + 1, h, w, column, aside)
            v2 = _map_row(x_ptr, row + 2, h, w, column, aside)
            for y in range(first, tl.minimum(first + rows, end)):
                f = past + (y - first) * step
                logits = v0 + _between(f) * (v1 - v0) + _between(f - 1.0) * (v2 - v1)
                logits = tl.where(x[None, :] < W, logits, -1e30)  # adds nothing to the totals
                if LABELS:
                    label = _wide(tl.load(targets_ptr + y * W + x, mask=x < W, other=0))[:, None]
                    t = ((label == m) & (x[:, None] < W)).to(tl.float32)  # [BLOCK, BLOCK_M]
                else:
                    inside = (x[:, None] < W) & (m < M)
                    t = tl.load(targets_ptr + (y * W + x)[:, None], mask=inside, other=0)
                    t = (t != 0).to(tl.float32) if HARD else t.to(tl.float32)
                p, n, log = _logistic(logits)
                outside = tl.maximum(logits, 0.0) + log
                positive = alpha * _power(n, gamma, GAMMA_TWO) * (tl.maximum(-logits, 0.0) + log)
                negative = (1.0 - alpha) * _power(p, gamma, GAMMA_TWO) * outside
                focal = _product(positive - negative, t, focal, SPLIT, EXACT)
                bce = _product(-logits, t, bce, SPLIT, EXACT)
                overlap = _product(p, t, overlap, SPLIT, EXACT)
                focal_total += negative
                bce_total += outside
                total += p
    query = q_first + tl.arange(0, BLOCK_Q)
    out = (split * 3 * B + image).to(tl.int64) * Q + query
    size = tl.cast(B, tl.int64) * Q
    if m_first == 0:
        tl.store(totals_ptr + out, tl.sum(focal_total, 1), mask=query < Q)
        tl.store(totals_ptr + out + size, tl.sum(bce_total, 1), mask=query < Q)
        tl.store(totals_ptr + out + 2 * size, tl.sum(total, 1), mask=query < Q)
    out = out[:, None] * M + m
    size *= M
    inside = (q < Q) & (m < M)
    tl.store(products_ptr + out, focal, mask=inside)
    tl.store(products_ptr + out + size, bce, mask=inside)
    tl.store(products_ptr + out + 2 * size, overlap, mask=inside)


def _matching_launches(
    mask_logits: Tensor,
    targets: Tensor,
    num_classes: int,
    focal_alpha: float,
    focal_gamma: float,
    config: dict[str, Any],
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:
    """Products, totals and areas, still empty, and the launches that fill them."""
    _check_sizes([mask_logits], targets)
    targets, labels = _addressable(targets), targets.ndim == 3
    mask_logits = mask_logits.contiguous()
    (batch, queries, h, w), (height, width) = mask_logits.shape, targets.shape[-2:]
    areas, targets, _, _, launches = _target_launches(targets, None, num_classes, None, True)
    products = areas.new_empty(3, batch, queries, num_classes)
    totals = areas.new_empty(3, batch, queries)
    if totals.numel() == 0:
        return (products, totals, areas), launches
    block_q, block_m = config["block_q"], config["block_m"]
    rows = cdiv(height, cdiv(height, min(_MAX_ROWS, cdiv(height, h))))
    groups = cdiv(height, rows)
    # Without a target there are still totals.
    blocks = batch * cdiv(queries, block_q) * max(1, cdiv(num_classes, block_m))
    # All at once: a second round for a few programs would take as long as the first.
    splits = min(groups, max(1, config["multiprocessors"] * config["programs"] // blocks))
    groups_per_split = cdiv(groups, splits)
    splits = cdiv(groups, groups_per_split)
    partial = products if splits == 1 else products.new_empty(splits, *products.shape)
    partial_totals = totals if splits == 1 else totals.new_empty(splits, *totals.shape)
    arguments = {
        "x_ptr": mask_logits,
        "targets_ptr": targets,
        "products_ptr": partial,
        "totals_ptr": partial_totals,
        "B": batch,
        "Q": queries,
        "M": num_classes,
        "h": h,
        "w": w,
        "H": height,
        "W": width,
        "rows": rows,
        "rows_per_split": groups_per_split * rows,
        "stride_tb": targets.stride(0),
        "stride_tm": 0 if labels else targets.stride(1),
        "alpha": focal_alpha,
        "gamma": focal_gamma,
    }
    constants = {
        "LABELS": labels,
        "HARD": not targets.is_floating_point(),
        "GAMMA_TWO": focal_gamma == 2,
        "BLOCK_Q": block_q,
        "BLOCK_M": block_m,
        "BLOCK": config["block"],
        "SPLIT": config["split"],
        "EXACT": targets.dtype not in (torch.float32, torch.float64),
    }
    launches.append(Launch(_mask_matching_kernel, blocks * splits, arguments, constants, _options(config)))
    if splits > 1:
        launches += [
            _sum_launch(part, out, splits, out.numel())
            for part, out in ((partial, products), (partial_totals, totals))
            if out.numel()
        ]
    return (products, totals, areas), launches
