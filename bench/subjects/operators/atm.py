"""The ATM operator: peers, checks, costs and targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

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
from segvit_kernels import ATMFunction, atm_reference, fused_atm
from segvit_kernels.testing.atm import SHAPES, ATMCase, oracle

TINY = ATMCase("tiny", 1, 5, 33, 2, 16)
BATCHES = (16, 1, 4)


def plain(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """S in memory, a clone of it kept for the masks, softmax, mean over the heads."""
    scores = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1)) * query.shape[-1] ** -0.5
    masks = scores.clone()
    output = scores.softmax(dim=-1) @ value.transpose(1, 2)
    return output.transpose(1, 2), masks.mean(dim=1)


def _product(query: Tensor, key: Tensor) -> Tensor:
    """The masks as one product over the concatenated heads."""
    heads, dim = query.shape[2:]
    return (query * (dim**-0.5 / heads)).flatten(2) @ key.flatten(2).mT


def peers(backend: str) -> list[Peer]:
    def ours(x: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        return tuple(fused_atm(**x, backend=backend))

    def with_product(peer: Peer) -> Peer:
        def call(x: dict) -> tuple[Tensor, Tensor]:
            return peer.call(x)[0], _product(x["query"], x["key"])

        return replace(peer, what=f"{peer.what} + a separate product for the masks", call=call)

    fused, *eager = on_backends(backend, "fused_atm", ours)
    return [
        fused,
        *(_plans() if backend == "triton" else []),
        *eager,
        Peer("plain", "the formula with S in memory and cloned", lambda x: plain(**x)),
        Peer("reference", "atm_reference: the formula with S in memory", lambda x: tuple(atm_reference(**x))),
        *compilations(
            atm_reference,
            "torch.compile(atm_reference)",
            call=lambda f, x: tuple(f(**x)),
            dynamic=False,
            fullgraph=True,
        ),
        *map(with_product, attention.peers()),
    ]


PLANS = ("fused", "heads")
# Plan "heads" keeps a mask tile in registers over all heads; larger tiles than these spill.
_HEADS_TILE = {"block_m": 64, "block_n": 64, "num_warps": 4}


def _forward_plan(plan: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The Triton forward by one of its two plans, past the choice that the launcher makes."""
    from segvit_kernels.triton.atm import atm_fwd

    config = {"plan": plan}
    if plan == "heads" and query.dtype != torch.float32:
        config |= _HEADS_TILE
    scale = query.shape[-1] ** -0.5
    return atm_fwd(query, key, value, None, None, scale, 0.0, True, config=config)[:2]


def _plans() -> list[Peer]:
    def peer(plan: str) -> Peer:
        what = f"the Triton forward, plan {plan}, called without the operator around it"
        return Peer(f"plan {plan}", what, lambda x: _forward_plan(plan, **x), modes=("forward",))

    return [peer(plan) for plan in PLANS]


def inputs(case: ATMCase, dtype: torch.dtype, device: torch.device) -> tuple[dict, tuple]:
    """Fresh leaves ``query``, ``key``, ``value`` and gradients of both outputs."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    features = (case.heads, case.head_dim)
    leaves = {
        name: draw(case.batch, tokens, *features).requires_grad_()
        for name, tokens in (("query", case.queries), ("key", case.keys), ("value", case.keys))
    }
    gradients = (draw(case.batch, case.queries, *features), draw(case.batch, case.queries, case.keys))
    return leaves, gradients


def costs(case: ATMCase, itemsize: int, mode: str) -> list[Cost]:
    width = case.heads * case.head_dim
    queries, keys = (case.batch * n * width * itemsize for n in (case.queries, case.keys))
    masks = case.batch * case.queries * case.keys * itemsize
    statistics = case.batch * case.heads * case.queries * 4
    product = 2 * case.batch * case.queries * case.keys * width
    exponentials = case.batch * case.heads * case.queries * case.keys
    training = mode != "forward"
    # forward: reads Q, K, V; writes O, M (and the log-sum-exp when a backward follows)
    forward = Cost(2 * queries + 2 * keys + masks + statistics * training, 2 * product, exponentials)
    # backward: reads Q, K, V, O, dO, dM and the log-sum-exp; writes dQ, dK, dV
    backward = Cost(4 * queries + 4 * keys + masks + statistics, 5 * product, exponentials)
    return [forward, backward] if training else [forward]


def check_cases(tiny: bool) -> list[tuple[str, ATMCase]]:
    """(kind, case), most important first; the timed shapes at every batch are ``values`` checks."""
    if tiny:
        special = replace(TINY, name="tiny_all", dropout_p=0.1, previous_masks=True, broadcast=True, batch=2)
        graph = [("graph", TINY), ("graph_dropout", replace(TINY, name="tiny_dropout", dropout_p=0.1))]
        return [("values", TINY), ("values", special), ("plans", TINY), *graph]
    main, wide = SHAPES[0], SHAPES[-1]
    checks = [("values", replace(main, batch=b)) for b in BATCHES]
    for name, changes in {
        "previous": {"previous_masks": True},
        "dropout": {"dropout_p": 0.1},
        "broadcast": {"broadcast": True},
        "strided": {"strided": True},
    }.items():
        checks.append(("values", replace(main, name=f"{main.name}_{name}", batch=3, **changes)))
    checks += [("plans", replace(main, batch=b)) for b in BATCHES]
    checks += [(kind, replace(main, batch=2)) for kind in ("output_only", "masks_only", "no_masks")]
    checks += [("repeat", replace(main, batch=b)) for b in (1, 4)]
    checks += [("graph", replace(main, batch=2)), ("graph_dropout", replace(main, batch=2, dropout_p=0.1))]
    checks += [("values", replace(case, batch=b)) for case in SHAPES[1:] for b in BATCHES]
    everything = {"dropout_p": 0.1, "previous_masks": True, "broadcast": True, "strided": True}
    checks.append(("values", replace(wide, name=f"{wide.name}_everything", batch=2, **everything)))
    checks += [(kind, replace(wide, batch=1)) for kind in ("repeat", "output_only", "masks_only")]
    odd = (
        ATMCase("one_by_one", 1, 1, 1, 1, 16),
        ATMCase("one_query", 2, 1, 33, 3, 32),
        ATMCase("odd_tokens", 2, 7, 1601, 3, 32, previous_masks=True),
        ATMCase("odd_dim", 1, 7, 33, 3, 24, dropout_p=0.3),
        ATMCase("dim_16", 2, 150, 1600, 12, 16),
        ATMCase("dim_128", 2, 65, 129, 2, 128, previous_masks=True),
        # The shapes of the attention operators to come: thousands of queries.
        ATMCase("qu_self", 1, 1600, 1600, 16, 32),
        ATMCase("qu_cross_low", 1, 1600, 400, 16, 32),
        ATMCase("qd_vit_l", 1, 400, 1600, 16, 64),
    )
    return checks + [("values", case) for case in odd]


def _run(case: ATMCase, leaves: dict, gradients: tuple, backend: str, **options: object) -> dict[str, Tensor]:
    """Results and gradients by name, with poisoned allocations. ``None`` gradients leave an output unused."""
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    seed = options.pop("seed", None)
    with timing.poisoned():
        if seed is None:
            result = fused_atm(**leaves, backend=backend, **options)
        else:
            q, k, v, previous = (leaves.get(n) for n in ("query", "key", "value", "previous_masks"))
            deterministic = bool(options.get("deterministic"))
            scale = case.head_dim**-0.5
            result = ATMFunction.apply(
                q, k, v, previous, None, seed, scale, case.dropout_p, True, deterministic, backend
            )
        used = [(r, g) for r, g in zip(result, gradients, strict=True) if r is not None and g is not None]
        grads = torch.autograd.grad(
            [r for r, _ in used], list(leaves.values()), [g for _, g in used], allow_unused=True
        )
    named = dict(zip(("output", "mask_logits"), result, strict=True))
    named = {n: t.detach() for n, t in named.items() if t is not None}
    for name, grad in zip(leaves, grads, strict=True):
        named[f"grad_{name}"] = torch.zeros_like(leaves[name]) if grad is None else grad
    return named


def _expected(case: ATMCase, drawn: Drawn, gradients: tuple, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients of the plain formula. Dropout depends on the place in the batch, so that a case
    with it cannot be cut into images."""

    def one(cut: Callable) -> dict[str, Tensor]:
        leaves = {name: cut(t) for name, t in drawn.leaves.items()}
        result, grads = oracle(case, leaves, tuple(map(cut, gradients)), dtype=dtype, seed=drawn.seed)
        return {**result._asdict(), **{f"grad_{name}": g for name, g in grads.items()}}

    if case.dropout_p:
        return one(lambda t: t)
    shared = [f"grad_{n}" for n, t in drawn.leaves.items() if len(t) == 1 < case.batch]
    return by_image(case.batch, one, shared)


class Drawn(NamedTuple):
    """Inputs by name, gradients of both outputs, and the seed of dropout where there is one."""

    leaves: dict[str, Tensor]
    gradients: tuple[Tensor, Tensor]
    seed: Tensor | None


def draw(check: Check, device: torch.device) -> Drawn:
    case, dtype, number = check.case, getattr(torch, check.dtype), torch.randint(2**31, (1,)).item()
    leaves = case.inputs(dtype, device, seed=number)
    seed = torch.tensor([number * 2**31 + 12345], device=device) if case.dropout_p else None
    return Drawn(leaves, case.gradients(dtype, device, seed=number + 1), seed)


def _used(check: Check, gradients: tuple) -> tuple[Tensor | None, Tensor | None]:
    """The gradients that a check gives; ``None`` leaves an output unused."""
    output, masks = gradients
    if check.kind in ("output_only", "no_masks"):
        return output, None
    return (None, masks) if check.kind == "masks_only" else gradients


def launch(check: Check, drawn: Drawn, backend: str) -> dict[str, Tensor]:
    if check.kind == "plans":
        # Each forward plan by itself, whichever of them the operator takes.
        found = {}
        for plan in PLANS:
            with timing.poisoned():
                output, masks = _forward_plan(plan, **drawn.leaves)
            found |= {f"output, plan {plan}": output, f"mask_logits, plan {plan}": masks}
        return found
    if check.kind.startswith("graph"):
        return _replayed(check.case, drawn, backend)
    options: dict = {"deterministic": check.kind == "repeat"}
    if drawn.seed is not None:
        options["seed"] = drawn.seed
    if check.kind == "no_masks":
        options["need_masks"] = False
    return _run(check.case, drawn.leaves, _used(check, drawn.gradients), backend, **options)


def judge(check: Check, drawn: Drawn, results: dict[str, Tensor]) -> list[dict]:
    if check.kind == "graph_dropout":
        differ = not torch.equal(results["output"], results["output again"])
        finite = all(bool(t.isfinite().all()) for t in results.values())
        return [
            {
                "quantity": "new dropout mask",
                "passed": differ,
                "reason": None if differ else "two replays agree",
            },
            {"quantity": "finite", "passed": finite, "reason": None if finite else "not finite"},
        ]
    gradients = _used(check, drawn.gradients)
    truth, ordinary = truth_and_ordinary(
        lambda dtype: _expected(check.case, drawn, gradients, dtype), getattr(torch, check.dtype)
    )
    rows = []
    for name, value in results.items():
        plain_name = name.partition(",")[0]
        rows.append(budget_row(name, value, truth[plain_name], ordinary[plain_name]))
    return rows


def _replayed(case: ATMCase, drawn: Drawn, backend: str) -> dict[str, Tensor]:
    """Forward and backward captured on other inputs, replayed on these; with dropout replayed twice."""
    static = {name: torch.randn_like(t).requires_grad_() for name, t in drawn.leaves.items()}
    kept: dict[str, tuple] = {}

    def work() -> None:
        result = fused_atm(**static, dropout_p=case.dropout_p, backend=backend)
        kept["all"] = (*result, *torch.autograd.grad(tuple(result), list(static.values()), drawn.gradients))

    graph = timing.capture(work)
    with torch.no_grad():
        for name, tensor in static.items():
            tensor.copy_(drawn.leaves[name])
        for tensor in kept["all"]:
            tensor.fill_(float("nan"))
    graph.replay()
    names = ["output", "mask_logits", *(f"grad_{n}" for n in static)]
    found = {name: t.detach().clone() for name, t in zip(names, kept["all"], strict=True)}
    if case.dropout_p:
        graph.replay()
        found["output again"] = kept["all"][0].detach().clone()
    return found


def _targets() -> tuple[Target, ...]:
    eager, h200, cpu = (
        ("eager", "reference"),
        ("gpu", "ade_vit_l", 16, "bfloat16"),
        ("cpu", "ade_vit_b", 1, "float32"),
    )
    rows = []
    for mode, against_eager, against_sdpa in (("forward", 8.0, 2.0), ("forward_backward", 6.0, 1.6)):
        rows.append(Target(f"{mode} against plain PyTorch", *h200, "timings", mode, eager, against_eager))
        rows.append(Target(f"{mode} against SDPA + product", *h200, "timings", mode, ("sdpa",), against_sdpa))
    rows.append(
        Target(
            "training memory against plain PyTorch",
            *h200,
            "memory",
            "forward_backward",
            ("reference",),
            None,
            0.1,
        )
    )
    plain_only = ("plain",)
    both = "forward_backward"
    rows += [
        Target("forward against the plain formula", *cpu, "timings", "forward", plain_only, 2.0),
        Target("forward + backward against the plain formula", *cpu, "timings", both, plain_only, 1.5),
        Target("forward against SDPA + product", *cpu, "timings", "forward", ("sdpa",), 1.3),
        Target("forward + backward against SDPA + product", *cpu, "timings", both, ("sdpa",), 1.1),
        Target("training memory against the plain formula", *cpu, "memory", both, plain_only, None, 0.2),
    ]
    return tuple(rows)


OPERATOR = Operator.of(
    globals(),
    name="atm",
    cpu_shapes=(("ade_vit_b", 1), ("ade_vit_b", 4), ("ade_vit_l", 1), ("cityscapes_like", 1)),
    targets=_targets(),
)
