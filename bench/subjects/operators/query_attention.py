"""Query attention: peers (every backend of torch's attention, FlexAttention), checks, costs and targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measure import timing
from bench.subjects.operators import attention
from bench.subjects.operators.base import (
    Check,
    Cost,
    Operator,
    Peer,
    Target,
    budget_row,
    by_image,
    compilations,
    on_backends,
    truth_and_ordinary,
)
from segvit_kernels import QueryAttentionFunction, query_attention, query_attention_reference
from segvit_kernels.testing.query_attention import SHAPES, QueryAttentionCase, oracle, with_gradients

TINY = QueryAttentionCase("tiny", 1, 33, 17, 2, 16)
BATCHES = (16, 1, 4)


def peers(backend: str) -> list[Peer]:
    def ours(x: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
        return (query_attention(**x, backend=backend),)

    what = "the formula with S in memory"
    return [
        *on_backends(backend, "query_attention", ours),
        Peer("plain", what, lambda x: (query_attention_reference(**x),)),
        *compilations(
            query_attention_reference, f"torch.compile: {what}", call=lambda f, x: (f(**x),), dynamic=False
        ),
        *attention.peers(),
    ]


def inputs(case: QueryAttentionCase, dtype: torch.dtype, device: torch.device) -> tuple[dict, tuple]:
    seed = torch.randint(2**31, (1,)).item()
    leaves = {name: t.requires_grad_() for name, t in case.inputs(dtype, device, seed).items()}
    return leaves, (case.gradient(dtype, device, seed + 1),)


def costs(case: QueryAttentionCase, itemsize: int, mode: str) -> list[Cost]:
    width = case.heads * case.head_dim
    queries, keys = (case.batch * n * width * itemsize for n in (case.queries, case.keys))
    statistics = case.batch * case.heads * case.queries * 4
    product = 2 * case.batch * case.queries * case.keys * width
    exponentials = case.batch * case.heads * case.queries * case.keys
    training = mode != "forward"
    # forward: reads Q, K, V, writes O; backward: reads Q, K, V, O, dO, writes dQ, dK, dV.
    forward = Cost(2 * queries + 2 * keys + statistics * training, 2 * product, exponentials)
    backward = Cost(4 * queries + 4 * keys + statistics, 5 * product, exponentials)
    return [forward, backward] if training else [forward]


def check_cases(tiny: bool) -> list[tuple[str, QueryAttentionCase]]:
    if tiny:
        shared = replace(TINY, name="tiny_shared", broadcast=True, batch=2)
        dropped = replace(TINY, name="tiny_dropout", dropout_p=0.1)
        return [("values", TINY), ("values", shared), ("values", dropped), ("graph", TINY)]
    main, *others = SHAPES
    checks = [("values", replace(case, batch=batch)) for batch in BATCHES for case in (main, *others)]
    for name, changes in {"dropout": {"dropout_p": 0.1}, "shared": {"broadcast": True}}.items():
        checks.append(("values", replace(main, name=f"{main.name}_{name}", batch=3, **changes)))
    checks += [("repeat", replace(main, batch=2)), ("graph", replace(main, batch=2))]
    return [*checks, ("values", QueryAttentionCase("odd", 2, 201, 333, 3, 24))]


class Drawn(NamedTuple):
    """Inputs by name, gradient of the output, and the seed of dropout where there is one."""

    leaves: dict[str, Tensor]
    gradient: Tensor
    seed: Tensor | None


def draw(check: Check, device: torch.device) -> Drawn:
    case, dtype, number = check.case, getattr(torch, check.dtype), torch.randint(2**31, (1,)).item()
    seed = torch.tensor([number], device=device) if case.dropout_p else None
    return Drawn(case.inputs(dtype, device, number), case.gradient(dtype, device, number + 1), seed)


def launch(check: Check, drawn: Drawn, backend: str) -> dict[str, Tensor]:
    case, deterministic = check.case, check.kind == "repeat"
    if check.kind == "graph":
        return _replayed(drawn, backend)
    if drawn.seed is None:
        with timing.poisoned():
            options = {"deterministic": deterministic, "backend": backend}
            output, gradients = with_gradients(query_attention, drawn.leaves, drawn.gradient, **options)
        return {"output": output, **gradients}
    # Forward and backward draw one mask: on the same seed as the formula's.
    leaves = {name: t.detach().requires_grad_() for name, t in drawn.leaves.items()}
    with timing.poisoned():
        arguments = (None, drawn.seed, case.head_dim**-0.5, case.dropout_p, deterministic, backend)
        output = QueryAttentionFunction.apply(*leaves.values(), *arguments)
        gradients = torch.autograd.grad(output, list(leaves.values()), drawn.gradient)
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def _expected(case: QueryAttentionCase, drawn: Drawn, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients of the plain formula; dropout depends on the place in the batch."""

    def one(cut: Callable) -> dict[str, Tensor]:
        leaves = {name: cut(t) for name, t in drawn.leaves.items()}
        output, gradients = oracle(case, leaves, cut(drawn.gradient), dtype=dtype, seed=drawn.seed)
        return {"output": output, **gradients}

    if case.dropout_p:
        return one(lambda t: t)
    return by_image(case.batch, one, [n for n, t in drawn.leaves.items() if len(t) == 1 < case.batch])


def judge(check: Check, drawn: Drawn, results: dict[str, Tensor]) -> list[dict]:
    truth, ordinary = truth_and_ordinary(
        lambda dtype: _expected(check.case, drawn, dtype), getattr(torch, check.dtype)
    )
    return [budget_row(name, value, truth[name], ordinary[name]) for name, value in results.items()]


def _replayed(drawn: Drawn, backend: str) -> dict[str, Tensor]:
    """Captured on other inputs, replayed on these."""
    static = {name: torch.randn_like(t).requires_grad_() for name, t in drawn.leaves.items()}
    kept: dict[str, tuple] = {}

    def work() -> None:
        output = query_attention(**static, backend=backend)
        kept["all"] = (output, *torch.autograd.grad(output, list(static.values()), drawn.gradient))

    graph = timing.capture(work)
    with torch.no_grad():
        for name, tensor in static.items():
            tensor.copy_(drawn.leaves[name])
    graph.replay()
    return dict(zip(("output", *static), (t.detach() for t in kept["all"]), strict=True))


def _targets() -> tuple[Target, ...]:
    sdpas = ("sdpa", *attention.BACKENDS)
    gpu, cpu = ("gpu", "qu_self", 16, "bfloat16"), ("cpu", "qu_self", 1, "float32")
    both = "forward_backward"
    return (
        Target("forward against the best SDPA", *gpu, "timings", "forward", sdpas, 1.3),
        Target("forward + backward against the best SDPA", *gpu, "timings", both, sdpas, 1.3),
        Target("forward against SDPA", *cpu, "timings", "forward", ("sdpa",), 1.0),
        Target("forward + backward against SDPA", *cpu, "timings", both, ("sdpa",), 1.0),
    )


OPERATOR = Operator.of(
    globals(),
    name="query_attention",
    cpu_shapes=(("qu_self", 1), ("qu_cross_low", 1), ("qd_vit_l", 1)),
    targets=_targets(),
)
