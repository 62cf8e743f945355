"""Counter-based random bits for dropout, drawn identically by every backend.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). One call gives
128 bits, enough for eight neighbouring keys at 16 bits each, so the generator costs an eighth of what
one call per element would.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, ...], rounds: int = 10) -> tuple[Tensor, ...]:
    """Four words of Philox4x32 for a key of two and a counter of four words; int64 tensors holding uint32."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        # The products wrap in int64, which leaves all 64 bits right.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> 32) & _MASK ^ c1 ^ k0, b & _MASK, (a >> 32) & _MASK ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def dropout_threshold(p: float) -> int:
    """The 16-bit number below which an element is dropped."""
    return min(round(p * 65536), 65535)


def dropout_scale(p: float) -> float:
    """What kept elements are multiplied by: the inverse of the exact keep probability."""
    return 65536 / (65536 - dropout_threshold(p))


def keep_mask(
    seed: Tensor, p: float, batch: range, heads: range, num_heads: int, queries: int, keys: int
) -> Tensor:
    """Boolean dropout mask of attention weights, (len(batch), len(heads), queries, keys); True is kept.

    Element (b, h, q, k) is the 16-bit half ``k % 2`` of word ``k % 8 // 2`` of
    philox(key=seed, counter=(q * ceil(keys / 8) + k // 8, b * num_heads + h, 0, 0)).

    Args:
        seed: int64 tensor of one element.
        p: probability of being dropped, rounded to 1/65536.
        batch, heads: the rows of the mask that are wanted.
        num_heads, queries, keys: sizes of the whole problem.
    """
    device = seed.device
    groups = -(-keys // 8)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    c0 = torch.arange(queries * groups, device=device).view(queries, groups) & _MASK
    b = torch.arange(batch.start, batch.stop, device=device)[:, None]
    h = torch.arange(heads.start, heads.stop, device=device)
    c1 = (b * num_heads + h)[:, :, None, None] & _MASK
    c0, c1 = torch.broadcast_tensors(c0, c1)
    words = torch.stack(philox((seed & _MASK, seed >> 32 & _MASK), (c0, c1, zero, zero)), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(-3)[..., :keys]
    return halves >= dropout_threshold(p)
