"""LayerNorm with subsampling: peers (plain, torch.compile), checks, costs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bench import timing
from bench.operators import Check, Cost, Operator, Peer, budget_row, compilations
from segvit_kernels import subsample_layer_norm, subsample_layer_norm_reference
from segvit_kernels.testing.subsample_norm import SHAPES, SubsampleNormCase, oracle, with_gradients

TINY = SubsampleNormCase("tiny", 1, (5, 3), 24, prefix_tokens=1)
BATCHES = (16, 1, 4)


def peers(backend: str) -> list[Peer]:
    def ours(name: str) -> Peer:
        what = f"subsample_layer_norm, backend {name}"
        return Peer(name, what, lambda x: tuple(subsample_layer_norm(**_arguments(x), backend=name)))

    def plain(x: dict) -> tuple[Tensor, ...]:
        return tuple(subsample_layer_norm_reference(**_arguments(x)))

    return [
        replace(ours(backend), name="fused"),
        *([ours("eager")] if backend != "eager" else []),
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


def run_check(check: Check, device: torch.device, backend: str) -> list[dict]:
    case, dtype = check.case, getattr(torch, check.dtype)
    draw = torch.randint(2**31, (1,)).item()
    drawn, gradients = case.inputs(dtype, device, draw), case.gradients(dtype, device, draw + 1)

    def named(found: tuple) -> dict[str, Tensor]:
        return {**found[0]._asdict(), **{f"gradient of {n}": g for n, g in found[1].items()}}

    def call() -> dict[str, Tensor]:
        with timing.poisoned():
            return named(with_gradients(subsample_layer_norm, case, drawn, gradients, backend=backend))

    got = call()
    truth, ordinary = (named(oracle(case, drawn, gradients, dtype=d)) for d in (torch.float64, dtype))
    rows = [budget_row(name, value, truth[name], ordinary[name]) for name, value in got.items()]
    if check.kind == "repeat":
        again = call()
        same = all(torch.equal(got[name], again[name]) for name in got)
        rows.append({"quantity": "bitwise", "passed": same, "reason": None if same else "two runs differ"})
    return rows


OPERATOR = Operator(
    name="subsample_norm",
    shapes=SHAPES,
    tiny=TINY,
    check_cases=check_cases,
    run_check=run_check,
    inputs=inputs,
    peers=peers,
    costs=costs,
    cpu_shapes=(("qd_vit_l", 1), ("qd_vit_b", 4)),
)
