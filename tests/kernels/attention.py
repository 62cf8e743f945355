"""What the batteries of the two attentions share."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import BY_ID, Backend, assert_same
from torch import Tensor

from segvit_kernels.ops._philox import keep_mask
from segvit_kernels.testing import assert_within_budget, relative_error
from segvit_kernels.testing.budgets import approximated

INPUTS = ("query", "key", "value")
SEED = torch.tensor([0x1234_5678_9ABC_DEF0])
Results = dict[str, Tensor]


def log_sum_exp(inputs: dict[str, Tensor], scale: float) -> Tensor:
    """Of the scores of every query, in float64."""
    query, key = inputs["query"].double().transpose(1, 2), inputs["key"].double().permute(0, 2, 3, 1)
    return (query @ key * scale).logsumexp(-1)


def check_statistics(
    lse: Tensor, inputs: dict[str, Tensor], scale: float, tolerance: float, slack: float = 0
) -> None:
    """Of every query, kept for the backward: float64, or float32 of all lower dtypes."""
    assert lse.dtype == (torch.float64 if inputs["query"].dtype == torch.float64 else torch.float32)
    expected = log_sum_exp(inputs, scale)
    torch.testing.assert_close(lse.double(), expected, rtol=tolerance, atol=tolerance + slack)


def check_gradients(
    found: Results, truth: Results, plain: Results, dtype: torch.dtype, one_key: float | None
) -> None:
    """Of query, key and value, within the error budget.

    Args:
        one_key: where there is one, how many roundings are left of dP and δ, which then cancel.
    """
    for name in INPUTS:
        grad = found[f"grad_{name}"]
        assert grad.dtype == dtype and grad.is_contiguous()
        if one_key is not None and name != "value":
            error = (grad.double() - truth[name]).abs().max()
            assert error <= one_key * torch.finfo(dtype).eps, f"gradient of {name}: {error:.3g}"
        else:
            ulps = approximated(dtype, 2)  # weights: an exponential, divided by a sum
            assert_within_budget(f"gradient of {name}", grad, truth[name], plain[name], ulps=ulps)


def check_different_backends(everything: Callable[..., Results], backend: Backend, truth: Results) -> None:
    """The forward by one, the backward by another: scores computed again in another order, rounding in the
    exponent that no budget of one backend has.

    Args:
        everything: results of ``(forward, backward=…)``.
    """
    eager = BY_ID["eager"]
    for forward, backward in ((backend, eager), (eager, backend)):
        found = everything(forward, backward=backward)
        for name in INPUTS:
            assert relative_error(found[f"grad_{name}"], truth[name]) < 1e-6, name


def check_repeatable(everything: Callable[[], Results]) -> None:
    assert_same(everything(), everything())


def check_zero_scale(function: Callable[..., Tensor], backend: Backend) -> None:
    """Keeps what is not a number, and nothing else."""
    query, key = (torch.randn(1, n, 2, 16, device=backend.device) for n in (3, 5))
    query[0, 1] = math.nan
    found = function(query, key, key, scale=0.0, backend=backend.name)
    assert found[0, 1].isnan().all() and found[0, [0, 2]].isfinite().all()


def check_refusals(
    function: Callable[..., Any], backend: Backend, double: dict[str, Tensor], wide: dict[str, Tensor]
) -> None:
    """float64 and head dims above 128: refused where the backend is asked for, left to eager otherwise."""
    for inputs, error, said in (
        (double, TypeError, "takes float32.*query is torch.float64"),
        (wide, ValueError, "takes head dims up to 128; query has shape .* head dim 136"),
    ):
        with pytest.raises(error, match=f"backend '{backend.name}' {said}"):
            function(**inputs, backend=backend.name)
        found, expected = function(**inputs), function(**inputs, backend="eager")
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, expected)), strict=True):
            assert torch.equal(a, b)


def tensors(dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    """Arguments of a call, some of them changed."""
    shapes = {"query": (2, 5, 3, 16), "key": (2, 9, 3, 16), "value": (2, 9, 3, 16)}
    return {n: torch.randn(s).to(dtype) for n, s in shapes.items()} | changes


BAD_ARGUMENTS = [
    ({"query": torch.randn(2, 5, 48)}, ValueError, r"query has shape \(2, 5, 48\); expected"),
    ({"key": torch.randn(2, 9, 3, 8)}, ValueError, r"key has .* expected \(2, 9, 3, 16\)"),
    ({"value": torch.randn(2, 8, 3, 16)}, ValueError, r"value has shape .* expected \(2, 9, 3, 16\)"),
    ({"query": torch.randn(3, 5, 3, 16)}, ValueError, "expected batch 2, the batch of key, or 1"),
    ({"query": torch.randn(2, 0, 3, 16)}, ValueError, "at least one token"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
    ({"backend": "cudnn"}, ValueError, "argument 'backend' is 'cudnn'; expected one of eager, triton"),
    ({"query": torch.ones(2, 5, 3, 16, dtype=torch.int32)}, TypeError, "query has dtype torch.int32"),
    ({"value": torch.randn(2, 9, 3, 16).half()}, TypeError, "value has dtype torch.float16"),
    ({"key": torch.empty(2, 9, 3, 16, device="meta")}, ValueError, "key is on meta; expected cpu"),
    ({"key": [1, 2]}, TypeError, "key is a list; expected a tensor"),
]
"""Changes of :func:`tensors`, what is raised, and what it says."""


def score_rounding(inputs: dict[str, Tensor], scale: float) -> float:
    """What sums of 32 products in float16 leave open of a score: 2^-9 of the norm of its products."""
    query, key = inputs["query"].double().transpose(1, 2), inputs["key"].double().permute(0, 2, 3, 1)
    return 2.0**-9 * abs(scale) * (query.square() @ key.square()).max().sqrt().item()


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
