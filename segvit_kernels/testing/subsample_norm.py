"""Cases and oracle of LayerNorm with subsampling."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from segvit_kernels.ops.subsample_norm import SubsampledNorm, subsample_layer_norm_reference


@dataclasses.dataclass(frozen=True)
class SubsampleNormCase:
    """Sizes and options of one call of ``subsample_layer_norm``.

    ``offset`` is the mean of the tokens in units of their deviation. With ``strided``, x is a slice of wider
    tokens of a longer sequence.
    """

    name: str
    batch: int
    grid: tuple[int, int]
    channels: int
    stride: int = 2
    prefix_tokens: int = 0
    affine: bool = True
    bias: bool = True
    offset: float = 1.0
    strided: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """``grid``, ``stride`` and ``prefix_tokens``."""
        return {"grid": self.grid, "stride": self.stride, "prefix_tokens": self.prefix_tokens}

    @property
    def tokens(self) -> tuple[int, int]:
        """How many tokens there are, and how many are kept."""
        (height, width), step = self.grid, self.stride
        kept = len(range(0, height, step)) * len(range(0, width, step))
        return self.prefix_tokens + height * width, self.prefix_tokens + kept

    def inputs(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Tensor | None]:
        """Fresh random ``x``, and ``weight`` and ``bias`` where the case has them."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        if self.strided:
            x = draw(self.batch, self.tokens[0] + 2, 3 * self.channels).to(device, dtype)
            x = x[:, 1:-1, self.channels : 2 * self.channels]
        else:
            x = (draw(self.batch, self.tokens[0], self.channels) + self.offset).to(device, dtype)
        weight = (1 + 0.5 * draw(self.channels)).to(device, dtype) if self.affine else None
        bias = draw(self.channels).to(device, dtype) if self.affine and self.bias else None
        return {"x": x, "weight": weight, "bias": bias}

    def gradients(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Random gradients of ``normed``, ``normed_sub`` and ``x_sub``."""
        generator = torch.Generator().manual_seed(seed)
        every, kept = self.tokens
        drawn = (torch.randn(self.batch, n, self.channels, generator=generator) for n in (every, kept, kept))
        normed, normed_sub, x_sub = (g.to(device, dtype) for g in drawn)
        return normed, normed_sub, x_sub


CASES = (
    SubsampleNormCase("one_token", 1, (1, 1), 16),
    SubsampleNormCase("few_channels", 2, (3, 2), 3),
    SubsampleNormCase("even", 2, (4, 6), 32),
    SubsampleNormCase("odd_grid", 2, (5, 7), 96),
    SubsampleNormCase("one_row", 1, (1, 9), 40),
    SubsampleNormCase("one_column", 1, (9, 1), 40),
    SubsampleNormCase("stride_3", 2, (7, 8), 24, stride=3),
    SubsampleNormCase("stride_1", 1, (3, 4), 16, stride=1),
    SubsampleNormCase("stride_beyond", 1, (2, 3), 16, stride=5),
    SubsampleNormCase("prefix", 3, (5, 4), 48, prefix_tokens=1),
    SubsampleNormCase("registers", 2, (3, 3), 33, stride=3, prefix_tokens=5),
    SubsampleNormCase("strided", 3, (4, 5), 20, prefix_tokens=2, strided=True),
    SubsampleNormCase("no_bias", 2, (3, 5), 64, bias=False),
    SubsampleNormCase("not_affine", 2, (3, 5), 64, affine=False),
    SubsampleNormCase("far_from_zero", 2, (4, 4), 64, offset=100.0),
    SubsampleNormCase("width_384", 1, (3, 3), 384),
    SubsampleNormCase("width_768", 1, (3, 5), 768, prefix_tokens=1),
    SubsampleNormCase("width_1024", 1, (3, 3), 1024),
    SubsampleNormCase("width_1536", 1, (3, 3), 1536),
)
"""Small cases that between them meet every branch of an implementation."""

SHAPES = (
    SubsampleNormCase("qd_vit_l", 1, (40, 40), 1024),
    SubsampleNormCase("qd_vit_l_512", 1, (32, 32), 1024),
    SubsampleNormCase("qd_vit_b", 1, (32, 32), 768),
    SubsampleNormCase("qd_vit_s", 1, (45, 60), 384, prefix_tokens=1),
    SubsampleNormCase("qd_vit_g", 1, (37, 37), 1536, prefix_tokens=5),
    SubsampleNormCase("cityscapes_like", 1, (64, 128), 1024),
)
"""The shapes that matter, at batch 1; ``dataclasses.replace(shape, batch=16)`` for others."""


def with_gradients(
    function: Any,
    case: SubsampleNormCase,
    inputs: dict[str, Tensor | None],
    gradients: tuple[Tensor | None, ...],
    **options: Any,
) -> tuple[SubsampledNorm, dict[str, Tensor]]:
    """The result of ``function`` and its gradients by name, zeros where nothing depends on an input."""
    leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in inputs.items()}
    result = function(leaves["x"], leaves["weight"], leaves["bias"], **case.options, **options)
    used = [(o, g.to(o.dtype)) for o, g in zip(result, gradients, strict=True) if g is not None]
    named = {n: t for n, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(
        [o for o, _ in used], list(named.values()), [g for _, g in used], allow_unused=True
    )
    filled = [torch.zeros_like(t) if g is None else g for t, g in zip(named.values(), grads, strict=True)]
    return SubsampledNorm(*(t.detach() for t in result)), dict(zip(named, filled, strict=True))


def oracle(
    case: SubsampleNormCase,
    inputs: dict[str, Tensor | None],
    gradients: tuple[Tensor | None, ...],
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[SubsampledNorm, dict[str, Tensor]]:
    """:func:`subsample_layer_norm_reference` and its gradients by autograd, computed in ``dtype``.

    With float64 it is the truth; with the inputs' own dtype, the error that ordinary PyTorch makes.
    """
    cast = {n: None if t is None else t.to(dtype) for n, t in inputs.items()}
    return with_gradients(subsample_layer_norm_reference, case, cast, gradients)
