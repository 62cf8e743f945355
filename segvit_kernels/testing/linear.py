"""Cases and oracle of the linear layer with packed weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from segvit_kernels.ops.linear import linear_reference


@dataclasses.dataclass(frozen=True)
class LinearCase:
    """Sizes and options of one call of ``linear``: inputs (batch, tokens, depth), ``outputs`` of them.

    ``outliers`` multiplies a few channels of the input, as trained transformers have them. With ``strided``,
    the input is a slice of wider tokens of a longer sequence.
    """

    name: str
    batch: int
    tokens: int
    depth: int
    outputs: int
    bias: bool = True
    gelu: bool = False
    outliers: float = 1.0
    strided: bool = False

    def inputs(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Tensor | None]:
        """Fresh random ``input``, ``weight``, and ``bias`` where the case has one."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        x = draw(self.batch, self.tokens + 2 * self.strided, self.depth * (1 + 2 * self.strided))
        x[..., :: max(1, self.depth // 3)] *= self.outliers
        x = x.to(device, dtype)
        if self.strided:
            x = x[:, 1:-1, self.depth : 2 * self.depth]
        weight = (draw(self.outputs, self.depth) * self.depth**-0.5).to(device, dtype)
        bias = (0.5 * draw(self.outputs)).to(device, dtype) if self.bias else None
        return {"input": x, "weight": weight, "bias": bias}


CASES = (
    LinearCase("one", 1, 1, 1, 1),
    LinearCase("one_row", 1, 1, 100, 70),
    LinearCase("one_output", 2, 9, 40, 1),
    LinearCase("depth_1", 1, 12, 1, 50),
    LinearCase("odd", 1, 7, 33, 33),
    LinearCase("odd_gelu", 3, 7, 31, 47, gelu=True),
    LinearCase("whole_tiles", 2, 8, 64, 48),
    LinearCase("past_tiles", 1, 17, 65, 49),
    LinearCase("two_folds", 1, 10, 257, 97),
    LinearCase("deep", 1, 9, 3072, 50),
    LinearCase("wide_gelu", 1, 9, 64, 700, gelu=True),
    LinearCase("many_rows", 1, 300, 48, 52),
    LinearCase("no_bias", 2, 5, 70, 60, bias=False),
    LinearCase("no_bias_gelu", 2, 5, 70, 60, bias=False, gelu=True),
    LinearCase("outliers", 1, 20, 200, 60, outliers=300.0),
    LinearCase("strided", 3, 11, 40, 53, strided=True),
)
"""Small cases that between them meet every branch of an implementation."""

SHAPES = (
    LinearCase("vit_b_qkv", 1, 1024, 768, 2304),
    LinearCase("vit_b_proj", 1, 1024, 768, 768),
    LinearCase("vit_b_fc1", 1, 1024, 768, 3072, gelu=True),
    LinearCase("vit_b_fc2", 1, 1024, 3072, 768),
    LinearCase("decoder", 1, 150, 384, 1536),
)
"""The shapes that matter, at batch 1; ``dataclasses.replace(shape, batch=16)`` for others."""


def oracle(
    case: LinearCase, inputs: dict[str, Tensor | None], *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """:func:`linear_reference` computed in ``dtype``: the truth in float64, and in the inputs' own dtype what
    ordinary PyTorch makes."""
    arguments: list[Any] = [None if t is None else t.to(dtype) for t in inputs.values()]
    return linear_reference(*arguments, gelu=case.gelu)
