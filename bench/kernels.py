"""What a benchmarked operator brings along, and the list of them. To add one: write ``bench/<stem>.py``
with an :class:`Operator` (``bench/atm.py`` is the example) and name it in :func:`operators`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

MODES = ("forward", "forward_backward")


class Cost(NamedTuple):
    """The least that one phase must do: device memory traffic (each input read once, each output written
    once), floating-point operations of its matrix products (2 per multiply-accumulate), exponentials."""

    bytes: int
    flops: int
    exponentials: int


class Check(NamedTuple):
    """One comparison with the float64 oracle: how (``kind``), on what (``case``), in which dtype."""

    kind: str
    case: Any
    dtype: str


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to compute the operator: ``call(inputs)`` returns its results as a tuple of tensors."""

    name: str
    what: str
    call: Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, ...]]
    compiled: bool = False
    modes: tuple[str, ...] = MODES


@dataclasses.dataclass(frozen=True)
class Target:
    """Peer time (or ours over theirs for memory), the project set: held at one shape and batch."""

    name: str
    device: str
    shape: str
    batch: int
    dtype: str
    table: str
    mode: str
    against: tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: its stem.
        shapes: the cases that are timed; each has ``name``, ``batch`` and is a dataclass.
        check_cases: ``check_cases(tiny)`` -> ``(kind, case)``, most important first.
        run_check: ``run_check(check, device, backend)`` -> rows: ``quantity``, errors, ``passed``.
        inputs: ``inputs(case, dtype, device)`` -> fresh random leaves and ``gradients`` (tuple).
        peers: ``peers(backend)`` -> peers, ours first.
        costs: ``costs(case, itemsize, mode)`` -> costs of the phases that run one after the other.
        targets: what the numbers are held against.
    """

    name: str
    shapes: tuple[Any, ...]
    tiny: Any
    check_cases: Callable[[bool], list[tuple[str, Any]]]
    run_check: Callable[[Check, torch.device, str], list[dict]]
    inputs: Callable[[Any, torch.dtype, torch.device], tuple[dict, tuple]]
    peers: Callable[[str], list[Peer]]
    costs: Callable[[Any, int, str], list[Cost]]
    targets: tuple[Target, ...] = ()

    def shape(self, name: str, batch: int) -> Any:
        """The timed case called ``name`` at another batch."""
        case = next(c for c in (*self.shapes, self.tiny) if c.name == name)
        return dataclasses.replace(case, batch=batch)


def operators() -> dict[str, Operator]:
    """Every benchmarked operator by name."""
    from bench import atm

    return {op.name: op for op in (atm.OPERATOR,)}


def checked(op: Operator, check: Check, device: torch.device, backend: str) -> list[dict]:
    """Rows of one check with ``status``.

    "Twice the error of plain PyTorch" compares two random maxima, and about one right result in a thousand
    misses it. A row that misses only that, within its relative budget, is drawn twice more and passes if
    both draws do; ``note`` keeps the first reason. Anything else fails at once.
    """
    rows = op.run_check(check, device, backend)
    marginal = [r for r in rows if r.get("passed") is False and _within_norm(r)]
    if marginal:
        again = [r for _ in range(2) for r in op.run_check(check, device, backend)]
        for row in marginal:
            if all(r["passed"] for r in again if r["quantity"] == row["quantity"]):
                row.update(passed=True, reason=None, note=f"first of three draws: {row['reason']}")
    for row in rows:
        row["backend"] = backend
        row.setdefault("status", "ok" if row.get("passed") else "failed")
    return rows


def _within_norm(row: dict) -> bool:
    return row.get("relative_error") is not None and row["relative_error"] <= row["relative_budget"]


class OptionError(ValueError):
    """An option that cannot be honoured; the message is for the user."""


def select(peers: list[Peer], names: Sequence[str] | None) -> list[Peer]:
    """The peers called ``names``, or all."""
    known = [peer.name for peer in peers]
    for name in names or ():
        if name not in known:
            raise OptionError(f"--peers {name}: no such peer; expected some of {', '.join(known)}")
    return [peer for peer in peers if names is None or peer.name in names]


def runner(peer: Peer, mode: str) -> Callable[[dict, tuple], tuple[torch.Tensor, ...]]:
    """``run(leaves, gradients)`` for one mode: results, or results and the gradients of every leaf."""
    if mode == "forward":

        def forward(leaves: dict, gradients: tuple) -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return peer.call(leaves)

        return forward

    def forward_backward(leaves: dict, gradients: tuple) -> tuple[torch.Tensor, ...]:
        results = peer.call(leaves)
        return (*results, *torch.autograd.grad(results, list(leaves.values()), gradients))

    return forward_backward


def floor(costs: list[Cost], ceilings: dict[str, float], dtype: str) -> dict[str, Any]:
    """The time that no implementation undercuts, and what bounds it: per phase the largest of bytes,
    products and exponentials at their measured rates, summed over the phases."""
    rate = ceilings.get(f"matmul_{dtype}_flop_per_s")
    copy, exp = ceilings.get("copy_bytes_per_s"), ceilings.get("exp2_per_s")
    if not (rate and copy):
        return {"floor_s": None, "bound_by": None}
    total, bounds = 0.0, []
    for cost in costs:
        terms = {"bytes": cost.bytes / copy, "products": cost.flops / rate}
        if exp:
            terms["exponentials"] = cost.exponentials / exp
        bound = max(terms, key=terms.__getitem__)
        total += terms[bound]
        bounds.append(bound)
    return {"floor_s": total, "bound_by": "+".join(bounds)}
