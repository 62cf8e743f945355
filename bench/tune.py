"""``python -m bench tune OPERATOR``: time launch parameters of the Triton kernels on this GPU, pin the best.

The pinned parameters of an architecture are one dictionary, from which every launch derives its
configuration (``segvit_kernels/triton/_launch.py``). A candidate is an entry of it with some values replaced,
tried in place: what the configuration functions derive from it follows. Candidates must give right results
before they are timed; they are timed in turns; and one replaces what is pinned only if it is faster by more
than the noise of both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import environment, operators, timing
from bench.report import seconds, write

CONFIGS = environment.ROOT / "segvit_kernels" / "triton" / "configs"
DTYPE = torch.bfloat16
BATCH = 16


@dataclasses.dataclass(frozen=True)
class Space:
    """Values to try for one pinned entry: ``path`` to it, the timed ``shape`` and ``mode`` that runs it."""

    path: tuple[str, ...]
    shape: str
    mode: str
    values: dict[str, tuple[Any, ...]]

    def candidates(self, pinned: dict[str, Any]) -> list[dict[str, Any]]:
        """The pinned entry first, then every other combination; 0 for ``maxnreg`` is no cap."""
        found = [pinned]
        for combination in itertools.product(*self.values.values()):
            candidate = {**pinned, **dict(zip(self.values, combination, strict=True))}
            candidate = {k: v for k, v in candidate.items() if k != "maxnreg" or v}
            if candidate not in found:
                found.append(candidate)
        return found


_WARPS, _STAGES = (4, 8), (1, 2, 3)
SPACES: dict[str, tuple[Space, ...]] = {
    "atm": (
        Space(
            ("atm_fwd", "half", "32"),
            "ade_vit_l",
            "forward",
            {"tiles": (1, 2, 3), "block_n": (32, 64, 128), "num_warps": _WARPS, "num_stages": _STAGES},
        ),
        Space(
            ("atm_bwd", "half", "32"),
            "ade_vit_l",
            "forward_backward",
            {"block_m": (32, 64), "block_n": (64, 128), "num_warps": _WARPS, "maxnreg": (0, 128)},
        ),
    ),
    "query_attention": (
        Space(
            ("query_attention_fwd", "half", "32"),
            "qu_self",
            "forward",
            {"block_m": (64, 128, 256), "block_n": (64, 128), "num_warps": _WARPS, "num_stages": _STAGES},
        ),
        Space(
            ("query_attention_bwd_key", "half", "32"),
            "qu_self",
            "forward_backward",
            {"block_m": (32, 64), "block_n": (64, 128), "num_warps": _WARPS, "maxnreg": (0, 128)},
        ),
    ),
    "mask_loss": (
        Space(
            ("mask_loss_fwd",),
            "ade_vit_l",
            "forward",
            {"programs": (2, 4, 8), "block": (64, 128), "num_warps": (2, 4, 8)},
        ),
        Space(
            ("mask_loss_bwd",),
            "ade_vit_l",
            "forward_backward",
            {"programs": (2, 4, 8), "num_warps": (2, 4, 8)},
        ),
    ),
    "semantic_argmax": (
        Space(
            ("semantic_argmax", "half"),
            "ade_vit_l",
            "forward",
            {"block_q": (32, 64), "head": (0, 32, 64), "num_stages": (1, 2, 3), "maxnreg": (0, 128, 168)},
        ),
    ),
    "subsample_norm": (
        Space(
            ("subsample_norm_fwd", "half"),
            "qd_vit_l",
            "forward",
            {"elements": (2048, 4096, 8192), "num_warps": (2, 4, 8)},
        ),
        Space(
            ("subsample_norm_bwd", "half"),
            "qd_vit_l",
            "forward_backward",
            {"elements": (1024, 2048, 4096), "programs": (2, 4, 8), "num_warps": (2, 4, 8)},
        ),
    ),
}


def entry(configs: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The pinned entry at ``path``."""
    for key in path:
        configs = configs[key]
    return configs


@contextlib.contextmanager
def replaced(configs: dict[str, Any], path: Sequence[str], values: dict[str, Any]) -> Iterator[None]:
    """``configs`` with the entry at ``path`` replaced, for a while."""
    there = entry(configs, path)
    kept = dict(there)
    _put(there, values)
    try:
        yield
    finally:
        _put(there, kept)


def _put(entry: dict[str, Any], values: dict[str, Any]) -> None:
    """Replace an entry of the pinned parameters in place; launchers forget what they made of the old one."""
    from segvit_kernels.triton._plan import forget

    entry.clear()
    entry.update(values)
    forget()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The fastest candidate that gave right results; ``gain`` over what is pinned, 1 where that stays."""

    best: dict[str, Any]
    gain: float
    rows: list[dict[str, Any]]


def choose(
    candidates: Sequence[dict[str, Any]],
    prepare: Callable[[dict[str, Any]], Callable[[], float]],
    *,
    rounds: int = 15,
    seconds_per_candidate: float = 0.3,
) -> Outcome:
    """Time ``candidates``, the pinned one first.

    ``prepare(candidate)`` gives a sampler of seconds, or raises where the candidate does not compile or is
    wrong; such a one is out. A candidate must beat the pinned one by more than both their spreads.
    """
    rows, samplers = [], {}
    for index, candidate in enumerate(candidates):
        rows.append({"candidate": candidate, "status": "ok", "reason": None})
        try:
            samplers[str(index)] = prepare(candidate)
        except Exception as error:
            rows[-1] |= {"status": "failed", "reason": timing.one_line(error)}
    found = timing.interleave(samplers, rounds=rounds, seconds_per_peer=seconds_per_candidate)
    for index, samples in found.items():
        rows[int(index)] |= timing.summary(samples)
    timed = [row for row in rows if row["status"] == "ok"]
    if not timed:
        raise RuntimeError(f"no candidate runs: {rows[0]['reason']}")
    best = min(timed, key=lambda row: row["median_s"])
    pinned = rows[0]
    if pinned["status"] == "ok" and best["p75_s"] >= pinned["p25_s"]:
        best = pinned
    gain = pinned["median_s"] / best["median_s"] if pinned["status"] == "ok" else float("inf")
    return Outcome(best["candidate"], gain, rows)


def dumps(configs: dict[str, Any], indent: int = 0) -> str:
    """JSON as the files of ``configs/`` have it: an entry of plain values on one line."""
    plain = not any(isinstance(v, dict) for v in configs.values())
    if plain:
        inner = ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in configs.items())
        return f"{{ {inner} }}"
    space = " " * (indent + 2)
    lines = [
        f"{space}{json.dumps(k)}: {dumps(v, indent + 2) if isinstance(v, dict) else json.dumps(v)}"
        for k, v in configs.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"


def pin(path: Path, where: Sequence[str], best: dict[str, Any], described: dict[str, Any]) -> None:
    """Write ``best`` into a file of pinned parameters, with what it was measured on."""
    configs = json.loads(path.read_text(encoding="utf-8"))
    there = entry(configs, where)
    there.clear()
    there.update(best)
    keys = ("gpu", "driver", "torch", "triton", "commit", "dirty", "date")
    tuned = configs.setdefault("tuned", {})
    tuned[" ".join(where)] = {key: described.get(key) for key in keys}
    write(path, dumps(configs) + "\n")


def _sampler(op: operators.Operator, space: Space, device: torch.device) -> Callable[[], float]:
    """Checks the operator under the parameters of the moment, then captures it."""
    case = op.shape(space.shape, BATCH)
    name = str(DTYPE).removeprefix("torch.")
    rows = operators.checked(op, operators.Check("values", case, name), device, "triton")
    wrong = [row for row in rows if row["status"] != "ok"]
    if wrong:
        raise ValueError(f"wrong: {wrong[0]['quantity']}: {wrong[0]['reason']}")
    peer = next(p for p in op.peers("triton") if p.name == "fused")
    run = operators.runner(peer, space.mode)
    sets = timing.rotation(lambda: op.inputs(case, DTYPE, device), environment.cache_bytes(device), 8)
    return timing.graph_sampler(lambda inputs: run(*inputs), sets, device)


def main(operator: str, *, dry_run: bool = False) -> int:
    """Tune the entries of one operator; exit code."""

    def fail(message: str) -> int:
        print(f"python -m bench: error: {message}", file=sys.stderr)
        return 2

    if operator not in SPACES:
        return fail(f"operator is {operator!r}; expected one of {', '.join(SPACES)}")
    if not torch.cuda.is_available():
        return fail("tune: PyTorch finds no GPU; expected a CUDA or ROCm device with Triton")
    from segvit_kernels.triton._launch import architecture, pinned

    device = torch.device("cuda", torch.cuda.current_device())
    arch = architecture(device)
    path = CONFIGS / f"{arch}.json"
    if not path.is_file():
        # A new file begins as what this GPU has run with so far.
        path = path if dry_run else _begin(path)
    op, configs = operators.by_name()[operator], pinned(arch)
    for space in SPACES[operator]:

        def prepare(candidate: dict[str, Any], space: Space = space) -> Callable[[], float]:
            with replaced(configs, space.path, candidate):
                return _sampler(op, space, device)  # the graph keeps the launches of this candidate

        candidates = space.candidates(dict(entry(configs, space.path)))
        outcome = choose(candidates, prepare)
        for row in sorted(outcome.rows, key=lambda row: row.get("median_s", float("inf"))):
            shown = seconds(row["median_s"]) if row["status"] == "ok" else row["reason"]
            print(f"{' '.join(space.path)} {row['candidate']}: {shown}")
        print(f"{' '.join(space.path)}: {outcome.best}, {outcome.gain:.3f}× what was pinned")
        if not dry_run and outcome.gain > 1:
            pin(path, space.path, outcome.best, environment.describe(device))
            _put(entry(configs, space.path), outcome.best)
    return 0


def _begin(path: Path) -> Path:
    text = (CONFIGS / "default.json").read_text(encoding="utf-8")
    count = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    write(path, re.sub(r'("multiprocessors": )\d+', rf"\g<1>{count}", text, count=1))
    return path
