"""Linear layers of a ViT with packed weights: peers (torch's own in each dtype), checks, costs. Forward only."""

from __future__ import annotations

import torch
from torch import Tensor

from bench import timing
from bench.kernels import Check, Cost, Operator, Peer, budget_row
from segvit_kernels import linear, linear_reference, pack_weight
from segvit_kernels.ops.linear import PackedWeight
from segvit_kernels.testing.linear import CASES, SHAPES, LinearCase, oracle

TINY = LinearCase("tiny", 1, 10, 70, 50, gelu=True)
HALVES = (torch.float16, torch.bfloat16)


def peers(backend: str) -> list[Peer]:
    def plain(x: dict) -> tuple[Tensor, ...]:
        return (linear_reference(x["input"], x["weight"], x["bias"], gelu=x["case"].gelu),)

    def packed(x: dict) -> tuple[Tensor, ...]:
        weight = None if x["panels"] is None else PackedWeight(x["panels"], x["exponents"])
        return (linear(x["input"], x["weight"], x["bias"], packed=weight, gelu=x["case"].gelu),)

    def single(x: dict) -> tuple[Tensor, ...]:
        return (
            linear_reference(*(x[f"{n}_fp32"] for n in ("input", "weight", "bias")), gelu=x["case"].gelu),
        )

    return [
        Peer("fused", "packed weights, where the dtype is half and the processor has them", packed),
        Peer("plain", "F.linear, then F.gelu", plain),
        Peer("float32", "the same in float32", single),
    ]


def inputs(case: LinearCase, dtype: torch.dtype, device: torch.device) -> tuple[dict, tuple]:
    drawn = case.inputs(dtype, device, torch.randint(2**31, (1,)).item())
    packed = pack_weight(drawn["weight"]) if dtype in HALVES else (None, None)
    single = {f"{name}_fp32": None if t is None else t.float() for name, t in drawn.items()}
    return {**drawn, **single, "panels": packed[0], "exponents": packed[1], "case": case}, ()


def costs(case: LinearCase, itemsize: int, mode: str) -> list[Cost]:
    rows = case.batch * case.tokens
    elements = rows * (case.depth + case.outputs) + case.depth * case.outputs
    return [Cost(elements * itemsize, 2 * rows * case.depth * case.outputs, rows * case.outputs * case.gelu)]


def check_cases(tiny: bool) -> list[tuple[str, LinearCase]]:
    return [("values", TINY)] if tiny else [("values", case) for case in (*SHAPES, *CASES)]


def run_check(check: Check, device: torch.device, backend: str) -> list[dict]:
    case, dtype = check.case, getattr(torch, check.dtype)
    drawn = case.inputs(dtype, device, torch.randint(2**31, (1,)).item())
    with timing.poisoned(), torch.no_grad():
        packed = pack_weight(drawn["weight"]) if dtype in HALVES else None
        got = linear(**drawn, packed=packed, gelu=case.gelu)
    truth, ordinary = (oracle(case, drawn, dtype=d) for d in (torch.float64, dtype))
    return [budget_row("output", got, truth, ordinary)]


OPERATOR = Operator(
    name="linear",
    shapes=SHAPES,
    tiny=TINY,
    check_cases=check_cases,
    run_check=run_check,
    inputs=inputs,
    peers=peers,
    costs=costs,
    cpu_shapes=tuple((shape.name, shape.batch) for shape in SHAPES),
    modes=("forward",),
)
