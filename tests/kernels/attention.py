"""What the batteries of the two attentions share."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from segvit_kernels.ops._philox import keep_mask


def log_sum_exp(inputs: dict[str, Tensor], scale: float) -> Tensor:
    """Of the scores of every query, in float64."""
    query, key = inputs["query"].double().transpose(1, 2), inputs["key"].double().permute(0, 2, 3, 1)
    return (query @ key * scale).logsumexp(-1)


def turned(t: Tensor) -> Tensor:
    """The same with heads before tokens in memory."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def gapped(t: Tensor) -> Tensor:
    """The same with NaN between rows."""
    return torch.cat([t, torch.full_like(t, math.nan)], dim=-1)[..., : t.shape[-1]]


def check_dropout_bits(
    keys: int, forward: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor], device: str
) -> None:
    """With zero queries and one-hot values every weight can be read off the output.

    Args:
        forward: takes query, key, value, seed and the probability; the scale is 1.
    """
    batch, queries, heads, p = 2, 19, 3, 0.4
    query, key = torch.zeros(batch, queries, heads, 32), torch.randn(batch, keys, heads, 32)
    seed = torch.tensor([-(2**62) - 12345])
    expected = keep_mask(seed, p, range(batch), range(heads), heads, queries, keys)
    factor = 65536 / (65536 - round(p * 65536)) / keys

    def weights(seed: Tensor, first: int) -> Tensor:
        one_hot = torch.eye(keys)[:, first : first + 32]
        one_hot = torch.nn.functional.pad(one_hot, (0, 32 - one_hot.shape[1]))
        value = one_hot[None, :, None].expand(batch, keys, heads, 32)
        output = forward(*(t.to(device) for t in (query, key, value, seed)), p)
        return output.cpu().transpose(1, 2)[..., : min(32, keys - first)]

    for first in range(0, keys, 32):
        found, kept = weights(seed, first), expected[..., first : first + 32]
        assert torch.equal(found != 0, kept)
        torch.testing.assert_close(found, kept * factor)
    assert not torch.equal(weights(seed + 1, 0) != 0, expected[..., :32])
