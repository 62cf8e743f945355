"""``python -m bench scaling``: how the time of each operator grows with classes, tokens, batch, image size
and views; ours, plain PyTorch and torch's own attention, with the floor at every point.

Before a point is timed, the results and gradients of every peer are compared with those of the plain formula
in the same dtype on the same inputs; a peer that is off is refused there. Along an axis a peer stops where it
would take too long or hold too much, with the reason in its row.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.measure import ceilings, environment, timing
from bench.subjects import operators
from bench.subjects.operators import kernels_backend, semantic_argmax
from segvit_kernels.testing import atm, mask_loss, query_attention, relative_error, subsample_norm

PEERS = ("fused", "eager", "plain", "sdpa")
# Two peers may differ by this, relative norm: twice the budget of each against float64.
DIFFERENCE = {"float32": 4e-5, "bfloat16": 4e-2}
# Share of pixels whose label two peers may see differently where two scores are nearly the same.
LABELS = {"float32": 1e-3, "bfloat16": 5e-2}
CLASSES = (19, 60, 150, 300, 600, 1000)


@dataclasses.dataclass(frozen=True)
class Axis:
    """One size that grows: ``case(value)`` for ``values``, of which ``cpu`` are those timed on a CPU."""

    operator: str
    name: str
    values: tuple[int, ...]
    cpu: tuple[int, ...]
    case: Callable[[int], Any]


def _views(count: int) -> semantic_argmax.Case:
    """1 view, or each of ``count`` / 2 scales and its mirror image, no larger than the image itself."""
    scales = tuple(1.0 - 0.02 * i for i in range(count // 2))
    return semantic_argmax.Case("views", 1, 150, 150, (32, 32), (512, 512), scales=scales)


def _image(side: int, batch: int = 1) -> dict[str, Any]:
    return {"batch": batch, "grid": (side // 16, side // 16), "size": (side, side)}


AXES = (
    Axis("atm", "classes", CLASSES, CLASSES, lambda n: atm.ATMCase("classes", 1, n, 1024, 12, 32)),
    Axis(
        "query_attention",
        "tokens",
        (256, 1024, 4096, 16384),
        (256, 1024, 2304),
        lambda n: query_attention.QueryAttentionCase("tokens", 1, n, n, 16, 32),
    ),
    Axis(
        "semantic_argmax",
        "classes",
        CLASSES,
        (19, 60, 150, 300, 600),
        lambda n: semantic_argmax.Case("classes", 1, n, n, (16, 16), (256, 256)),
    ),
    Axis(
        "mask_loss",
        "classes",
        (19, 60, 150, 250),  # 255 is "ignored"
        (19, 60, 150, 250),
        lambda n: mask_loss.MaskLossCase("classes", 1, n, ((32, 32),) * 3, (512, 512)),
    ),
    Axis(
        "subsample_norm",
        "tokens",
        (256, 1024, 4096, 16384),
        (256, 1024, 4096, 16384),
        lambda n: subsample_norm.SubsampleNormCase("tokens", 1, (round(n**0.5), round(n**0.5)), 768),
    ),
    Axis(
        "atm",
        "tokens",
        (256, 1024, 4096, 16384),
        (256, 1024, 4096, 16384),
        lambda n: atm.ATMCase("tokens", 1, 150, n, 12, 32),
    ),
    Axis(
        "query_attention",
        "batch",
        (1, 2, 4, 8, 16),
        (1, 2),
        lambda n: query_attention.QueryAttentionCase("batch", n, 1024, 1024, 16, 32),
    ),
    Axis(
        "semantic_argmax",
        "image side",
        (256, 512, 1024, 2048),
        (256, 512, 1024),
        lambda n: semantic_argmax.Case("image", queries=150, classes=150, **_image(n)),
    ),
    Axis(
        "mask_loss",
        "image side",
        (256, 512, 1024, 2048),
        (256, 512, 1024),
        lambda n: mask_loss.MaskLossCase("image", 1, 150, ((n // 16, n // 16),) * 3, (n, n)),
    ),
    Axis(
        "atm", "batch", (1, 2, 4, 8, 16, 32), (1, 2, 4), lambda n: atm.ATMCase("batch", n, 150, 1024, 12, 32)
    ),
    Axis("semantic_argmax", "views", (1, 2, 4, 8, 16), (1, 2, 4), _views),
    Axis(
        "mask_loss",
        "batch",
        (1, 2, 4, 8, 16),
        (1, 2),
        lambda n: mask_loss.MaskLossCase("batch", n, 150, ((32, 32),) * 3, (512, 512)),
    ),
    Axis(
        "semantic_argmax",
        "batch",
        (1, 2, 4, 8, 16),
        (1, 2),
        lambda n: semantic_argmax.Case("batch", queries=150, classes=150, **_image(512, n)),
    ),
)
_TINY_VIEWS = {"queries": 6, "classes": 5, "grid": (4, 4), "size": (24, 20)}
TINY = (
    Axis("atm", "classes", (3, 5), (3, 5), lambda n: atm.ATMCase("tiny", 1, n, 33, 2, 16)),
    Axis("semantic_argmax", "views", (1, 2), (1, 2), lambda n: dataclasses.replace(_views(n), **_TINY_VIEWS)),
)


def difference(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], dtype: str) -> float:
    """How far a peer is from the plain formula, as a multiple of what is allowed."""
    worst = 0.0
    for ours, theirs in zip(results, expected, strict=True):
        if ours.shape != theirs.shape:
            return float("inf")
        if theirs.is_floating_point():
            worst = max(worst, relative_error(ours, theirs) / DIFFERENCE[dtype])
        else:
            worst = max(worst, (ours.long() != theirs.long()).double().mean().item() / LABELS[dtype])
    return worst


@dataclasses.dataclass
class _Run:
    """Where and how long: the device, its ceilings, and when to stop."""

    device: torch.device
    dtype: torch.dtype
    ceilings: dict[str, float]
    deadline: float
    longest_s: float  # of one call
    cache_bytes: int  # what the inputs of all sets together must exceed
    most_bytes: float  # of the similarity map or the upsampled masks that a plain formula holds
    rounds: int

    def points(self, axis: Axis, values: Sequence[int]) -> Iterator[dict]:
        """Rows of one axis: every peer and mode at every value."""
        op = operators.by_name()[axis.operator]
        stopped: dict[tuple[str, str], str] = {}
        for value in values:
            key = {"operator": op.name, "axis": axis.name, "value": value}
            key["dtype"] = str(self.dtype).removeprefix("torch.")
            for mode in op.modes:
                yield from self._point(op, axis.case(value), mode, key | {"mode": mode}, stopped)

    def _point(
        self, op: operators.Operator, case: Any, mode: str, key: dict, stopped: dict
    ) -> Iterator[dict]:
        peers = operators.select(op.peers(kernels_backend(self.device)), PEERS)
        if time.time() > self.deadline:
            yield from (key | {"peer": p.name, "status": "skipped", "reason": "time budget"} for p in peers)
            return
        sets = timing.rotation(lambda: op.inputs(case, self.dtype, self.device), self.cache_bytes, 4)
        floor = operators.floor(op.costs(case, self.dtype.itemsize, mode), self.ceilings, key["dtype"])
        samplers, expected, rows = {}, None, []
        # The plain formula first: it is what the others are held against.
        for peer in sorted(peers, key=lambda p: p.name != "plain"):
            row = key | {"peer": peer.name, **floor}
            reason = stopped.get((peer.name, mode)) or self._too_large(peer, case)
            if reason is not None:
                rows.append(row | {"status": "skipped", "reason": reason})
                continue
            call = operators.runner(peer, mode)
            try:
                results, seconds = self._once(call, sets[0])
            except (RuntimeError, MemoryError, ValueError) as error:
                rows.append(row | {"status": "failed", "reason": timing.one_line(error)})
                continue
            if peer.name == "plain":
                expected = [t.detach().clone() for t in results]
            elif expected is None:
                row["unchecked"] = "the plain formula did not run here"
            elif (off := difference(results, expected, key["dtype"])) > 1:
                why = f"refused: {off:.3g} times the difference allowed"
                rows.append(row | {"status": "invalid", "reason": why})
                continue
            del results
            if seconds > self.longest_s:
                stopped[peer.name, mode] = f"{seconds:.2g} s at the size before"
            sampler, method = self._sampler(lambda inputs, call=call: call(*inputs), sets)
            samplers[peer.name] = (row | {"method": method, "sets": len(sets)}, sampler)
        yield from rows
        times = timing.interleave(
            {name: sample for name, (_, sample) in samplers.items()},
            rounds=self.rounds,
            seconds_per_peer=0.3,
        )
        for name, values in times.items():
            found = timing.summary(values)
            share = {} if not floor["floor_s"] else {"share_of_floor": floor["floor_s"] / found["median_s"]}
            yield samplers[name][0] | {"status": "ok", **found, **share}

    def _sampler(self, call: Callable, sets: list) -> tuple[Callable[[], float], str]:
        """By replays of a CUDA graph where there are such and the peer can be captured."""
        if self.device.type == "cuda":
            try:
                return timing.graph_sampler(call, sets, self.device), "graph"
            except RuntimeError:
                torch.cuda.synchronize()
            return timing.stream_sampler(call, sets, self.device), "stream"
        return timing.call_sampler(call, sets), "wall"

    def _once(self, call: Callable, inputs: tuple) -> tuple[tuple[torch.Tensor, ...], float]:
        """Results, and seconds of a second call: the first may build or allocate."""
        call(*inputs)
        timing.synchronize(self.device)
        start = time.perf_counter()
        results = call(*inputs)
        timing.synchronize(self.device)
        return results, time.perf_counter() - start

    def _too_large(self, peer: operators.Peer, case: Any) -> str | None:
        if peer.name != "plain":
            return None
        held = _held(case) * self.dtype.itemsize
        return f"would hold {held / 1e9:.1f} GB" if held > self.most_bytes else None


def _held(case: Any) -> float:
    """Elements of the largest tensor that the plain formula makes."""
    if hasattr(case, "heads"):
        return case.batch * case.heads * case.queries * case.keys
    if hasattr(case, "classes"):
        return case.pixels * max(case.queries, case.classes)
    return 0.0


def run(
    *,
    device: str,
    budget_s: float,
    threads: int = 2,
    names: Sequence[str] | None = None,
    smoke: bool = False,
    progress: Callable[[str], None] = print,
) -> dict:
    """Rows of every axis, as plain data; what does not fit into ``budget_s`` is recorded as skipped."""
    begun = time.time()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cpu = device == "cpu"
    where = torch.device(device)
    rates = [{"name": name, **rate()} for name, rate in ceilings.rates(where, smoke)]
    axes = [axis for axis in (TINY if smoke else AXES) if not names or axis.operator in names]
    rows: list[dict] = []
    for index, axis in enumerate(axes):
        left = begun + budget_s - time.time()
        here = _Run(
            where,
            torch.float32 if cpu or smoke else torch.bfloat16,
            {row["name"]: row["per_s"] for row in rates},
            # A little more than an even share: what one axis leaves, the next ones have.
            deadline=time.time() + min(left, 1.3 * left / (len(axes) - index)),
            longest_s=0.4 if cpu else 1.0,
            cache_bytes=environment.cache_bytes(where),
            most_bytes=1.5e9 if cpu else 20e9,
            rounds=7 if cpu else 15,
        )
        found = list(here.points(axis, axis.cpu if cpu else axis.values))
        rows += found
        done = sum(row["status"] == "ok" for row in found)
        progress(f"{axis.operator} by {axis.name}: {done} of {len(found)} rows, {time.time() - begun:.0f} s")
    return {
        "schema": 1,
        "kind": "scaling",
        "measurement": not smoke,
        "correct": not any(row["status"] == "invalid" and row["peer"] == "fused" for row in rows),
        "environment": environment.describe(where) | {"threads": torch.get_num_threads()},
        "ceilings": rates,
        "budget_s": budget_s,
        "elapsed_s": round(time.time() - begun, 1),
        "rows": rows,
    }
