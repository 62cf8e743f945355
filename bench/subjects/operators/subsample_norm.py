"""LayerNorm with subsampling: peers (plain, torch.compile), checks, costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure import timing
from bench.subjects.operators.base import (
    Check,
    Cost,
    Operator,
    Peer,
    budget_row,
    by_image,
    compilations,
    on_backends,
    truth_and_ordinary,
)
from segvit_kernels import subsample_layer_norm, subsample_layer_norm_reference
from segvit_kernels.testing.subsample_norm import SHAPES, SubsampleNormCase, oracle, with_gradients

TINY = SubsampleNormCase("tiny", 1, (5, 3), 24, prefix_tokens=1)
BATCHES = (16, 1, 4)


def peers(backend: str) -> list[Peer]:
    def ours(x: dict, backend: str) -> tuple[Tensor, ...]:
        return tuple(subsample_layer_norm(**_arguments(x), backend=backend))

    def plain(x: dict) -> tuple[Tensor, ...]:
        return tuple(subsample_layer_norm_reference(**_arguments(x)))

    return [
        *on_backends(backend, "subsample_layer_norm", ours),
        Peer("plain", "layer_norm, then two strided copies", plain),
        *compilations(
            subsample_layer_norm_reference,
            "torch.compile of it",
            call=lambda f, x: tuple(f(**_arguments(x))),
            dynamic=False,
            fullgraph=True,
        ),
    ]


def _arguments(inputs: dict) -> dict:
    return {**{n: inputs[n] for n in ("x", "weight", "bias")}, **inputs["case"].options}


def inputs(case: SubsampleNormCase, dtype: torch.dtype, device: torch.device) -> tuple[dict, tuple]:
    seed = torch.randint(2**31, (1,)).item()
    leaves = {name: t.requires_grad_() for name, t in case.inputs(dtype, device, seed).items()}
    return {**leaves, "case": case}, case.gradients(dtype, device, seed + 1)


def costs(case: SubsampleNormCase, itemsize: int, mode: str) -> list[Cost]:
    tokens, kept = (case.batch * n * case.channels * itemsize for n in case.tokens)
    statistics = 2 * case.batch * case.tokens[0] * 4
    training = mode != "forward"
    # forward: reads x, writes normed, normed_sub, x_sub; backward: reads x and three gradients, writes one.
    forward = Cost(2 * tokens + 2 * kept + statistics * training, 0, 0)
    backward = Cost(3 * tokens + 2 * kept + statistics, 0, 0)
    return [forward, backward] if training else [forward]


def check_cases(tiny: bool) -> list[tuple[str, SubsampleNormCase]]:
    if tiny:
        return [("values", TINY)]
    checks = [("values", replace(case, batch=batch)) for batch in BATCHES for case in SHAPES]
    odd = SubsampleNormCase("odd", 3, (33, 47), 333, stride=3, prefix_tokens=5)
    return [*checks, ("repeat", replace(SHAPES[0], batch=2)), ("values", odd)]


class Drawn(NamedTuple):
    """Inputs by name, and gradients of the three results."""

    leaves: dict[str, Tensor | None]
    gradients: tuple[Tensor, Tensor, Tensor]


def draw(check: Check, device: torch.device) -> Drawn:
    case, dtype, number = check.case, getattr(torch, check.dtype), torch.randint(2**31, (1,)).item()
    return Drawn(case.inputs(dtype, device, number), case.gradients(dtype, device, number + 1))


def _named(found: tuple) -> dict[str, Tensor]:
    return {**found[0]._asdict(), **{f"gradient of {n}": g for n, g in found[1].items()}}


def launch(check: Check, drawn: Drawn, backend: str) -> dict[str, Tensor]:
    with timing.poisoned():
        return _named(with_gradients(subsample_layer_norm, check.case, *drawn, backend=backend))


def judge(check: Check, drawn: Drawn, results: dict[str, Tensor]) -> list[dict]:
    def expected(dtype: torch.dtype) -> dict[str, Tensor]:
        def one(cut: Callable) -> dict[str, Tensor]:
            leaves = {**drawn.leaves, "x": cut(drawn.leaves["x"])}
            return _named(oracle(check.case, leaves, tuple(map(cut, drawn.gradients)), dtype=dtype))

        return by_image(check.case.batch, one, ("gradient of weight", "gradient of bias"))

    truth, ordinary = truth_and_ordinary(expected, getattr(torch, check.dtype))
    return [budget_row(name, value, truth[name], ordinary[name]) for name, value in results.items()]


OPERATOR = Operator.of(
    globals(),
    name="subsample_norm",
    cpu_shapes=(("qd_vit_l", 1), ("qd_vit_b", 4)),
)
