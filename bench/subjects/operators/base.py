"""What a benchmarked operator brings along, how it is checked and run, and the floor of its time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from segvit_kernels import why_not
from segvit_kernels.testing import RELATIVE_NORM, assert_within_budget, relative_error

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
    """One way to compute the operator: ``call(inputs)`` returns its results as a tuple of tensors.

    ``compiled``: takes seconds to build. ``slow``: takes minutes, and is timed at the main shape only, last.
    ``missing``: why it cannot run here, for the row that says so.
    """

    name: str
    what: str
    call: Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, ...]]
    compiled: bool = False
    modes: tuple[str, ...] = MODES
    slow: bool = False
    missing: str | None = None


def on_backends(
    backend: str, what: str, call: Callable[..., tuple[torch.Tensor, ...]], modes: tuple[str, ...] = MODES
) -> list[Peer]:
    """``call(inputs, backend=...)`` on a backend, as "fused", and on "eager" where that is another."""
    return [
        Peer(name, f"{what}, backend {chosen}", functools.partial(call, backend=chosen), modes=modes)
        for name, chosen in {"fused": backend, "eager": "eager"}.items()
        if name == "fused" or chosen != backend
    ]


def judged_by_image(batch: int, quantity: str, hold: Callable[[slice], int | None]) -> list[dict[str, Any]]:
    """One row from ``hold(the image)``, which asserts and may count what differs within rounding: a float64
    oracle of a whole batch would not fit."""
    row: dict[str, Any] = {"quantity": quantity, "passed": True, "reason": None, "differ": 0}
    for index in range(batch):
        try:
            row["differ"] += hold(slice(index, index + 1)) or 0
        except AssertionError as wrong:
            row |= {"passed": False, "reason": row["reason"] or f"image {index}: {wrong}"}
    return [row]


def compilations(
    function: Callable,
    what: str,
    *,
    call: Callable[[Callable, dict[str, Any]], tuple[torch.Tensor, ...]],
    modes: tuple[str, ...] = MODES,
    **options: Any,
) -> list[Peer]:
    """The peer ``call(compiled, inputs)``, where ``compiled`` is ``torch.compile`` of ``function`` with
    ``options``; on a GPU also with max-autotune."""

    def peer(name: str, what: str, slow: bool, **more: Any) -> Peer:
        compiled = torch.compile(function, **options, **more)
        return Peer(name, what, lambda x: call(compiled, x), compiled=True, modes=modes, slow=slow)

    found = [peer("compiled", what, False)]
    if torch.cuda.is_available():
        # Without CUDA graphs of its own: the benchmark replays one of every peer.
        mode = "max-autotune-no-cudagraphs"
        found.append(peer("compiled max-autotune", f"{what}, mode {mode}", True, mode=mode))
    return found


@dataclasses.dataclass(frozen=True)
class Target:
    """Peer time over ours (or for memory ours over theirs) that the project set, at one shape and batch;
    ``why`` it is missed where it is, as far as that is known."""

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
    why: str = "not yet understood"


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: its stem.
        shapes: the cases that are timed; each has ``name``, ``batch`` and is a dataclass.
        check_cases: ``check_cases(tiny)`` -> ``(kind, case)``, most important first.
        draw: ``draw(check, device)`` -> fresh random arguments of a check.
        launch: ``launch(check, drawn, backend)`` -> results by name: all launches of our kernels that the
            check is about, and nothing else.
        judge: ``judge(check, drawn, results)`` -> rows: ``quantity``, errors, ``passed``.
        inputs: ``inputs(case, dtype, device)`` -> fresh random arguments by name, of which those that require
            gradients are differentiated, and ``gradients`` of the results (tuple).
        peers: ``peers(backend)`` -> peers, ours first.
        costs: ``costs(case, itemsize, mode)`` -> costs of the phases that run one after the other.
        cpu_shapes: (name, batch) of the cases that are timed on a CPU.
        modes: of :data:`MODES`, what there is to time.
        targets: what the numbers are held against.
    """

    name: str
    shapes: tuple[Any, ...]
    tiny: Any
    check_cases: Callable[[bool], list[tuple[str, Any]]]
    draw: Callable[[Check, torch.device], Any]
    launch: Callable[[Check, Any, str], dict[str, torch.Tensor]]
    judge: Callable[[Check, Any, dict[str, torch.Tensor]], list[dict]]
    inputs: Callable[[Any, torch.dtype, torch.device], tuple[dict, tuple]]
    peers: Callable[[str], list[Peer]]
    costs: Callable[[Any, int, str], list[Cost]]
    cpu_shapes: tuple[tuple[str, int], ...]
    modes: tuple[str, ...] = MODES
    targets: tuple[Target, ...] = ()

    @classmethod
    def of(cls, names: Mapping[str, Any], **more: Any) -> Operator:
        """The operator of a module's ``names``, which are those of the fields: ``SHAPES``, ``TINY``, and
        functions."""
        functions = ("check_cases", "draw", "launch", "judge", "inputs", "peers", "costs")
        own = {name: names[name] for name in functions}
        return cls(shapes=names["SHAPES"], tiny=names["TINY"], **own, **more)

    def shape(self, name: str, batch: int) -> Any:
        """The timed case called ``name`` at another batch."""
        case = next(c for c in (*self.shapes, self.tiny) if c.name == name)
        return dataclasses.replace(case, batch=batch)


def truth_and_ordinary(
    expected: Callable[[torch.dtype], dict[str, torch.Tensor]], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """``expected`` in float64, and what ordinary PyTorch makes of it in ``dtype``: where that is not finite,
    as sums over an image in float16 are not, in float32 from the same inputs."""
    truth, ordinary = expected(torch.float64), expected(dtype)
    if not all(bool(t.isfinite().all()) for t in ordinary.values()):
        ordinary = {name: t.to(ordinary[name].dtype) for name, t in expected(torch.float32).items()}
    return truth, ordinary


def budget_row(
    quantity: str, actual: torch.Tensor, truth: torch.Tensor, ordinary: torch.Tensor
) -> dict[str, Any]:
    """A row of a check: ``actual`` against the float64 ``truth`` under the budgets of the library's tests."""
    row = {
        "quantity": quantity,
        "passed": True,
        "reason": None,
        "relative_budget": RELATIVE_NORM[actual.dtype],
    }
    try:
        assert_within_budget(quantity, actual, truth, ordinary)
    except AssertionError as error:
        row.update(passed=False, reason=str(error))
    if actual.shape == truth.shape and actual.numel():
        row["relative_error"] = relative_error(actual, truth)
        row["ordinary_relative_error"] = relative_error(ordinary, truth)
        row["max_error"] = (actual.double() - truth.double()).abs().max().item()
        row["ordinary_max_error"] = (ordinary.double() - truth.double()).abs().max().item()
    return row


def checked(op: Operator, check: Check, device: torch.device, backend: str) -> list[dict]:
    """Rows of one check with ``status``.

    "Twice the error of plain PyTorch" compares two random maxima, and about one right result in a thousand
    misses it. A row that misses only that, within its relative budget, is drawn twice more and passes if
    both draws do; ``note`` keeps the first reason. Anything else fails at once.
    """
    if reason := _cannot(check, device, backend):
        return [{"quantity": "all", "status": "skipped", "reason": reason, "backend": backend}]
    rows = _drawn(op, check, device, backend)
    marginal = [r for r in rows if r.get("passed") is False and _within_norm(r)]
    if marginal:
        again = [r for _ in range(2) for r in _drawn(op, check, device, backend)]
        for row in marginal:
            if all(r["passed"] for r in again if r["quantity"] == row["quantity"]):
                row.update(passed=True, reason=None, note=f"first of three draws: {row['reason']}")
    return [row | {"backend": backend, "status": "ok" if row["passed"] else "failed"} for row in rows]


def _cannot(check: Check, device: torch.device, backend: str) -> str | None:
    if check.kind.startswith("graph") and device.type != "cuda":
        return "no CUDA graphs on the CPU"
    if check.kind == "plans" and backend != "triton":
        return f"backend {backend} has no plans"
    return None


def _drawn(op: Operator, check: Check, device: torch.device, backend: str) -> list[dict]:
    drawn = op.draw(check, device)
    results = op.launch(check, drawn, backend)
    rows = op.judge(check, drawn, results)
    if check.kind == "repeat":
        again = op.launch(check, drawn, backend)
        for name, first in results.items():
            same = torch.equal(first, again[name])
            reason = None if same else "two runs differ"
            rows.append({"quantity": f"{name} bitwise", "passed": same, "reason": reason})
    return rows


def by_image(
    batch: int, one: Callable[[Callable], dict[str, torch.Tensor]], summed: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """Results of a formula that holds everything in memory, computed one image at a time: ``one(cut)``, where
    ``cut(tensor)`` is the image's part, or the whole where all images share it; joined along the batch, or
    added up for the names in ``summed``."""

    def cut(index: int) -> Callable:
        return lambda t: t if t is None or len(t) == 1 else t[index : index + 1]

    found = [one(cut(index)) for index in range(batch)]
    return {
        name: torch.stack([f[name] for f in found]).sum(0)
        if name in summed
        else torch.cat([f[name] for f in found])
        for name in found[0]
    }


def _within_norm(row: dict) -> bool:
    return row.get("relative_error") is not None and row["relative_error"] <= row["relative_budget"]


def kernels_backend(device: torch.device) -> str:
    """The backend that is measured on a device: what the library takes there by itself."""
    names = ("triton", "cuda") if device.type == "cuda" else ("cpu",)
    return next((name for name in names if why_not(name, device) is None), "eager")


def select(peers: list[Peer], names: Sequence[str] | None) -> list[Peer]:
    """The peers called ``names``, or all."""
    return [peer for peer in peers if names is None or peer.name in names]


def tensors(leaves: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among the inputs."""
    return [value for value in leaves.values() if isinstance(value, torch.Tensor)]


def differentiable(leaves: dict[str, Any]) -> list[torch.Tensor]:
    """The inputs that gradients are taken of."""
    return [tensor for tensor in tensors(leaves) if tensor.requires_grad]


def runner(peer: Peer, mode: str) -> Callable[[dict, tuple], tuple[torch.Tensor, ...]]:
    """``run(leaves, gradients)`` for one mode: results, or results and the gradients of every leaf."""
    if mode == "forward":

        def forward(leaves: dict, gradients: tuple) -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return peer.call(leaves)

        return forward

    def forward_backward(leaves: dict, gradients: tuple) -> tuple[torch.Tensor, ...]:
        results = peer.call(leaves)
        return (*results, *torch.autograd.grad(results, differentiable(leaves), gradients))

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
