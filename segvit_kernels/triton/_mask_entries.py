"""Several maps of mask logits in one launch: arguments and constants of the forward and the backward kernel.

The main kernels are persistent: a fixed number of programs walks the items (active pair, entry of the list,
tile), whose number is read from memory. Inactive pairs cost nothing, and the host learns nothing.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from segvit_kernels.triton._mask_targets import _TILE, _tiles

_ENTRIES = 4  # of the list of logits, in one launch
_GROUPS = 16  # the smallest height of a matrix product
_MAX_ROWS = 16  # of a group, in the forward


@triton.jit
def _entry(
    tile, x0_ptr, x1_ptr, x2_ptr, x3_ptr, h0, h1, h2, h3, w0, w1, w2, w3, begin1, begin2, begin3,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """The entry of the list that a tile belongs to: its index, map, grid, and the tile's number in it."""
    zero = tile * 0
    entry, ptr, h, w, begin = zero, x0_ptr, zero + h0, zero + w0, zero
    if ENTRIES > 1:  # noqa: SIM102
        if tile >= begin1:
            entry, ptr, h, w, begin = zero + 1, x1_ptr, zero + h1, zero + w1, zero + begin1
    if ENTRIES > 2:  # noqa: SIM102
        if tile >= begin2:
            entry, ptr, h, w, begin = zero + 2, x2_ptr, zero + h2, zero + w2, zero + begin2
    if ENTRIES > 3:  # noqa: SIM102
        if tile >= begin3:
            entry, ptr, h, w, begin = zero + 3, x3_ptr, zero + h3, zero + w3, zero + begin3
    return entry, ptr, h, w, tile - begin


@triton.jit
def _plane(targets_ptr, matches_ptr, pair, Q, stride_tb, stride_tm, LABELS: tl.constexpr):
    """The labels of a pair's image, or the pair's mask; and the number of its target."""
    target = pair % Q if matches_ptr is None else tl.load(matches_ptr + pair).to(tl.int32)
    targets_ptr += (pair // Q).to(tl.int64) * stride_tb
    if not LABELS:
        targets_ptr += target.to(tl.int64) * stride_tm
    return targets_ptr, target


def _check_sizes(mask_logits: list[Tensor], targets: Tensor) -> None:
    height, width = targets.shape[-2:]
    for logits in mask_logits:
        h, w = logits.shape[-2:]
        if max(h * height, w * width) >= 2**29 or max(h * w, height * width) >= 2**31 - 2**16:
            raise ValueError(
                f"mask_logits {tuple(logits.shape)} and targets {tuple(targets.shape)} are too large for "
                "32-bit positions: use backend='eager'"
            )


def _entries(name: str, tensors: list[Any]) -> dict[str, Any]:
    """Arguments x0_ptr, x1_ptr, … from a template; what is missing repeats the first and is not looked at."""
    return {name.format(i): tensors[i] if i < len(tensors) else tensors[0] for i in range(_ENTRIES)}


def _begins(tiles: list[int]) -> dict[str, int]:
    """First tile of every entry but the first, and the number of all."""
    total = sum(tiles)
    begins = {f"begin{i}": sum(tiles[:i]) if i < len(tiles) else total for i in range(1, _ENTRIES)}
    return begins | {"tiles": total}


def _common(
    group: list[Tensor],
    targets: Tensor,
    tiles: Tensor | None,
    matches: Tensor | None,
    pairs: Tensor,
    num_targets: int,
    focal_alpha: float,
    focal_gamma: float,
    mask_ignored: bool,
    block: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants that the forward and the backward kernel share."""
    labels, (down, across) = targets.ndim == 3, _tiles(targets)
    arguments = {
        **_entries("x{}_ptr", group),
        **_entries("h{}", [logits.shape[2] for logits in group]),
        **_entries("w{}", [logits.shape[3] for logits in group]),
        "targets_ptr": targets,
        "tiles_ptr": tiles,
        "matches_ptr": matches,
        "pairs_ptr": pairs,
        "H": targets.shape[-2],
        "W": targets.shape[-1],
        "Q": group[0].shape[1],
        "M": num_targets,
        "down": down,
        "across": across,
        "stride_tb": targets.stride(0),
        "stride_tm": 0 if labels else targets.stride(1),
        "alpha": focal_alpha,
        "gamma": focal_gamma,
    }
    constants = {
        "ENTRIES": len(group),
        "LABELS": labels,
        "HARD": not targets.is_floating_point(),
        "MASK_IGNORED": mask_ignored and labels,
        "GAMMA_TWO": focal_gamma == 2,
        "GROUPS": _GROUPS,
        "BLOCK": block,
        "TILE": _TILE,
    }
    return arguments, constants


def _options(config: dict[str, Any], crowd: int = 1) -> dict[str, int]:
    """Compiler options. In a crowded kernel the assembler, left to itself, spills to fit more programs.

    Args:
        config: of :func:`_config`.
        crowd: 0 for a kernel that needs no cap on registers, 2 for one that needs most of them.
    """
    names = ("num_warps", "num_stages", "maxnreg") if crowd else ("num_warps", "num_stages")
    found = {name: config[name] for name in names if name in config}
    return {**found, "maxnreg": 255} if crowd > 1 and "maxnreg" in found else found
