"""Query attention: peers (every backend of torch's attention, FlexAttention), checks, costs and targets."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bench import timing
from bench.operators import Check, Cost, Operator, Peer, Target, attention, budget_row, compilations
from segvit_kernels import query_attention, query_attention_reference
from segvit_kernels.testing.query_attention import SHAPES, QueryAttentionCase, oracle, with_gradients

TINY = QueryAttentionCase("tiny", 1, 33, 17, 2, 16)
BATCHES = (16, 1, 4)


def peers(backend: str) -> list[Peer]:
    def ours(name: str) -> Peer:
        what = f"query_attention, backend {name}"
        return Peer(name, what, lambda x: (query_attention(**x, backend=name),))

    what = "the formula with S in memory"
    return [
        replace(ours(backend), name="fused"),
        *([ours("eager")] if backend != "eager" else []),
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
        return [("values", TINY), ("values", replace(TINY, name="tiny_shared", broadcast=True, batch=2))]
    main, *others = SHAPES
    checks = [("values", replace(case, batch=batch)) for batch in BATCHES for case in (main, *others)]
    for name, changes in {"dropout": {"dropout_p": 0.1}, "shared": {"broadcast": True}}.items():
        checks.append(("values", replace(main, name=f"{main.name}_{name}", batch=3, **changes)))
    checks += [("repeat", replace(main, batch=2)), ("graph", replace(main, batch=2))]
    return [*checks, ("values", QueryAttentionCase("odd", 2, 201, 333, 3, 24))]


def run_check(check: Check, device: torch.device, backend: str) -> list[dict]:
    kind, case, dtype = check.kind, check.case, getattr(torch, check.dtype)
    if kind == "graph" and device.type != "cuda":
        return [{"quantity": "replay", "status": "skipped", "reason": "no CUDA graphs on the CPU"}]
    draw = torch.randint(2**31, (1,)).item()
    drawn, gradient = case.inputs(dtype, device, draw), case.gradient(dtype, device, draw + 1)
    options = {"deterministic": kind == "repeat", "backend": backend}
    if case.dropout_p:
        return _dropout_rows(case, drawn, gradient, options)
    call = _replayed if kind == "graph" else _run
    got = call(drawn, gradient, options)
    truth, ordinary = (oracle(case, drawn, gradient, dtype=d) for d in (torch.float64, dtype))
    rows = []
    for name, value in got.items():
        expected, plainly = (o[0] if name == "output" else o[1][name] for o in (truth, ordinary))
        rows.append(budget_row(name, value, expected, plainly))
    if kind == "repeat":
        again = _run(drawn, gradient, options)
        same = all(torch.equal(got[name], again[name]) for name in got)
        rows.append({"quantity": "bitwise", "passed": same, "reason": None if same else "two runs differ"})
    return rows


def _run(drawn: dict, gradient: Tensor, options: dict) -> dict[str, Tensor]:
    with timing.poisoned():
        output, gradients = with_gradients(query_attention, drawn, gradient, **options)
    return {"output": output, **gradients}


def _dropout_rows(case: QueryAttentionCase, drawn: dict, gradient: Tensor, options: dict) -> list[dict]:
    """Forward and backward draw one mask: on the same seed as the formula's."""
    from segvit_kernels import QueryAttentionFunction

    seed = torch.tensor([12345], device=gradient.device)
    arguments = (seed, case.head_dim**-0.5, case.dropout_p, options["deterministic"], options["backend"])
    leaves = {name: t.detach().requires_grad_() for name, t in drawn.items()}
    with timing.poisoned():
        output = QueryAttentionFunction.apply(*leaves.values(), *arguments)
        gradients = torch.autograd.grad(output, list(leaves.values()), gradient)
    got = {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}
    truth, ordinary = (
        oracle(case, drawn, gradient, dtype=d, seed=seed) for d in (torch.float64, gradient.dtype)
    )
    return [
        budget_row(name, value, *(o[0] if name == "output" else o[1][name] for o in (truth, ordinary)))
        for name, value in got.items()
    ]


def _replayed(drawn: dict, gradient: Tensor, options: dict) -> dict[str, Tensor]:
    """Captured on other inputs, replayed on these."""
    static = {name: torch.randn_like(t).requires_grad_() for name, t in drawn.items()}
    kept: dict[str, tuple] = {}

    def work() -> None:
        output = query_attention(**static, backend=options["backend"])
        kept["all"] = (output, *torch.autograd.grad(output, list(static.values()), gradient))

    graph = timing.capture(work)
    with torch.no_grad():
        for name, tensor in static.items():
            tensor.copy_(drawn[name])
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


OPERATOR = Operator(
    name="query_attention",
    shapes=SHAPES,
    tiny=TINY,
    check_cases=check_cases,
    run_check=run_check,
    inputs=inputs,
    peers=peers,
    costs=costs,
    cpu_shapes=(("qu_self", 1), ("qu_cross_low", 1), ("qd_vit_l", 1)),
    targets=_targets(),
)
