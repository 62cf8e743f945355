"""``python -m bench tune OPERATOR``: time launch parameters of the Triton kernels on this GPU, pin the best.

The pinned parameters of an architecture are one dictionary, from which every launch derives its
configuration (``segvit_kernels/triton/_launch.py``). A candidate is an entry of it with some values replaced,
tried in place: what the configuration functions derive from it follows. Candidates must give right results
before they are timed; they are timed in turns; and one replaces what is pinned only if it is faster by more
than the noise of both.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from bench.measure import environment, timing
from bench.measure.results import write
from bench.measure.text import seconds
from bench.subjects import operators
from bench.subjects.parameters import CONFIGS, applied, check_changes, entry, put, replaced
from bench.suites import simulate as simulation

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
            ("atm_bwd_key", "half", "32"),
            "ade_vit_l",
            "forward_backward",
            {"block_m": (32, 64), "block_n": (64, 128), "num_warps": _WARPS, "maxnreg": (0, 128, 168)},
        ),
        Space(
            ("atm_bwd_query", "half", "32"),
            "ade_vit_l",
            "forward_backward",
            {"tiles": (1, 3), "block_n": (32, 64), "num_stages": (2, 3), "maxnreg": (0, 168)},
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
            {"block_m": (32, 64), "block_n": (64, 128), "num_warps": _WARPS, "maxnreg": (0, 128, 168)},
        ),
        Space(
            ("query_attention_bwd_query", "half", "32"),
            "qu_self",
            "forward_backward",
            {"tiles": (1, 2, 3), "block_n": (32, 64), "num_stages": (2, 3), "maxnreg": (0, 128)},
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
    "mask_iou": (
        Space(
            ("mask_iou_bits",),
            "instances",
            "forward",
            {"block": (64, 128), "words": (16, 32), "programs": (1, 2, 4), "num_warps": (4, 8)},
        ),
        Space(
            ("mask_iou",),
            "instances soft",
            "forward",
            {"block": (16, 32, 64), "pixels": (16, 32, 64), "programs": (4, 8), "num_warps": (4, 8)},
        ),
    ),
    "mask_binarize": (
        Space(
            ("mask_binarize", "pixels"),
            "mask2former",
            "forward",
            {"block": (64, 128, 256), "programs": (4, 8, 16), "num_warps": (1, 2, 4)},
        ),
    ),
    "panoptic_argmax": (
        Space(
            ("panoptic_argmax",),
            "mask2former",
            "forward",
            {"tile_y": (4, 8, 16), "tile_x": (32, 64, 128), "block_q": (8, 16, 32), "num_warps": (1, 2)},
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
    tell: Callable[[dict[str, Any]], object] = lambda row: None,
) -> Outcome:
    """Time ``candidates``, the pinned one first.

    ``prepare(candidate)`` gives a sampler of seconds, or raises where the candidate does not compile or is
    wrong; such a one is out, and what its compiler printed, all of its assembly perhaps, is kept off the
    screen. ``tell(row)`` hears at once of a failure, and of a candidate that is ready by its first sample. A
    candidate must beat the pinned one by more than both their spreads.
    """
    rows, samplers = [], {}
    for index, candidate in enumerate(candidates):
        rows.append({"candidate": candidate, "status": "ok", "reason": None})
        try:
            with timing.captured():
                samplers[str(index)] = prepare(candidate)
                first = samplers[str(index)]()
            tell(rows[-1] | timing.summary([first]))
        except Exception as error:
            samplers.pop(str(index), None)
            rows[-1] |= {"status": "failed", "reason": timing.one_line(error)}
            tell(rows[-1])
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


def _sampler(
    op: operators.Operator,
    case: Any,
    mode: str,
    dtype: str,
    device: torch.device,
    backend: str = "triton",
    arguments: dict[str, Any] | None = None,
) -> Callable[[], float]:
    """Checks the operator under the parameters of the moment, then captures it."""
    rows = operators.checked(op, operators.Check("values", case, dtype), device, backend)
    wrong = [row for row in rows if row["status"] != "ok"]
    if wrong:
        raise ValueError(f"wrong: {wrong[0]['quantity']}: {wrong[0]['reason']}")
    peer = next(p for p in op.peers(backend) if p.name == "fused")
    run = operators.runner(peer, mode)
    cache = environment.cache_bytes(device)
    sets = timing.rotation(lambda: op.inputs(case, getattr(torch, dtype), device), cache, 8)
    sets = [({**leaves, **(arguments or {})}, gradients) for leaves, gradients in sets]
    if device.type != "cuda":
        return timing.stream_sampler(lambda inputs: run(*inputs), sets, device)
    return timing.graph_sampler(lambda inputs: run(*inputs), sets, device)


# ------------------------------------------------------------------------------------------ named candidates


def load(path: Path) -> list[dict[str, Any]]:
    """Candidates of a file, checked: a JSON list of objects with ``name``; ``operator``, ``shape``, ``mode``,
    which are timed, perhaps at another ``batch`` or ``dtype``, or with other ``sizes`` (fields of the shape);
    perhaps ``arguments`` of the operator's function; ``changes``: of entries of the pinned parameters (path,
    joined by spaces) the values to replace, ``null`` to take one away; and perhaps ``why``.

    Raises:
        ValueError: names the file, what it was and what was expected.
    """

    def fail(what: str) -> NoReturn:
        raise ValueError(f"{path}: {what}")

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"cannot be read: {error.strerror}")
    except ValueError as error:
        fail(f"not JSON: {error}")
    if not isinstance(found, list) or not all(isinstance(c, dict) for c in found):
        fail("not a list of candidates")
    known, keys = operators.by_name(), {"name", "operator", "shape", "mode", "changes"}
    candidates = []
    for index, given in enumerate(found):
        where = f"candidate {given.get('name', index)!r}"
        candidate = {"batch": BATCH, "dtype": str(DTYPE).removeprefix("torch."), "arguments": {}, "sizes": {}}
        candidate |= given
        if missing := keys - candidate.keys():
            fail(f"{where} lacks {', '.join(sorted(missing))}")
        if unknown := candidate.keys() - keys - {"batch", "dtype", "arguments", "sizes", "why"}:
            fail(f"{where} has {', '.join(sorted(unknown))}; expected {', '.join(sorted(keys))}")
        if candidate["name"] in (c["name"] for c in candidates):
            fail(f"{where} is there twice")
        op = known.get(candidate["operator"])
        if op is None:
            fail(f"{where}: operator {candidate['operator']!r}; expected one of {', '.join(known)}")
        shapes = [case.name for case in (*op.shapes, op.tiny)]
        for what, value, expected in (
            ("shape", candidate["shape"], shapes),
            ("mode", candidate["mode"], op.modes),
            ("dtype", candidate["dtype"], ("bfloat16", "float16", "float32")),
        ):
            if value not in expected:
                fail(f"{where}: {what} {value!r}; expected one of {', '.join(expected)}")
        fields = {field.name for field in dataclasses.fields(op.tiny)}
        if wrong := candidate["sizes"].keys() - fields:
            fail(f"{where}: sizes {', '.join(sorted(wrong))}; expected some of {', '.join(sorted(fields))}")
        check_changes(candidate["changes"], f"{path}: {where}")
        candidates.append(candidate)
    return candidates


def _case(op: operators.Operator, candidate: dict[str, Any], tiny: bool) -> Any:
    if tiny:
        return op.tiny
    return dataclasses.replace(op.shape(candidate["shape"], candidate["batch"]), **candidate["sizes"])


def launch(candidate: dict[str, Any], device: torch.device, *, tiny: bool = False) -> None:
    """What :func:`compare` launches, once."""
    from segvit_kernels.triton._launch import architecture, pinned

    op, dtype = operators.by_name()[candidate["operator"]], candidate["dtype"]
    case = _case(op, candidate, tiny)
    check = operators.Check("values", case, dtype)
    run = operators.runner(next(p for p in op.peers("triton") if p.name == "fused"), candidate["mode"])
    leaves, gradients = op.inputs(case, getattr(torch, dtype), device)
    for changes, arguments in (({}, {}), (candidate["changes"], candidate["arguments"])):
        with applied({"changes": changes}, pinned(architecture(device))):
            op.launch(check, op.draw(check, device), "triton")
            run({**leaves, **arguments}, gradients)


def compare(candidate: dict[str, Any], device: torch.device, backend: str, *, tiny: bool = False) -> dict:
    """A row: a candidate of :func:`load` against what is pinned, in turns."""
    from segvit_kernels.triton._launch import architecture, pinned

    op, configs = operators.by_name()[candidate["operator"]], pinned(architecture(device))
    case, mode, dtype = _case(op, candidate, tiny), candidate["mode"], candidate["dtype"]

    def prepare(chosen: dict[str, Any]) -> Callable[[], float]:
        with applied(chosen, configs):
            return _sampler(op, case, mode, dtype, device, backend, chosen["arguments"])

    limits = {"rounds": 3, "seconds_per_candidate": 0.05} if tiny else {}
    outcome = choose([{"changes": {}, "arguments": {}}, candidate], prepare, **limits)
    pin, new = outcome.rows
    row = {"changes": candidate["changes"], "arguments": candidate["arguments"], **new}
    row.pop("candidate")
    if "ok" == pin["status"] == new["status"]:
        gain = pin["median_s"] / new["median_s"]
        verdict = "faster" if outcome.gain > 1 else "slower" if new["p25_s"] > pin["p75_s"] else "the same"
        return row | {"pinned_s": pin["median_s"], "gain": gain, "verdict": verdict}
    if pin["status"] != "ok":
        row |= {"status": "failed", "reason": f"what is pinned: {pin['reason']}"}
    return row


# ------------------------------------------------------------------------------------------------ predicting


def ranked(
    operator: str, space: Space, candidates: Sequence[dict[str, Any]]
) -> list[tuple[float | None, dict[str, Any]]]:
    """Candidates with their predicted seconds (:mod:`bench.suites.simulate`), the fastest first; at the end,
    with ``None``, those that do not compile or fit."""
    pinned, name = candidates[0], " ".join(space.path)
    changes = [
        {k: c.get(k) for k in pinned.keys() | c.keys() if c.get(k) != pinned.get(k)} for c in candidates
    ]
    dtype = str(DTYPE).removeprefix("torch.")
    jobs = [
        simulation.job(operator, space.shape, BATCH, dtype=dtype, mode=space.mode, changes={name: change})
        for change in changes
    ]
    found = []
    for j, captured, candidate in zip(jobs, simulation.capture(jobs), candidates, strict=True):
        rows = simulation.rows(j, captured, "")
        good = all(row["status"] == "ok" for row in rows)
        found.append((sum(row["H200"]["seconds"] for row in rows) if good else None, candidate))
    return sorted(found, key=lambda pair: float("inf") if pair[0] is None else pair[0])


def _best(operator: str, space: Space, candidates: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """What is pinned and the ``count`` candidates that are predicted fastest; prints all predictions."""
    order = ranked(operator, space, candidates)
    for predicted, candidate in order:
        shown = "does not compile or fit" if predicted is None else f"{seconds(predicted)} predicted"
        print(f"{' '.join(space.path)} {candidate}: {shown}", flush=True)
    chosen = [candidate for predicted, candidate in order if predicted is not None][:count]
    return [candidates[0], *(c for c in chosen if c != candidates[0])]


# ---------------------------------------------------------------------------------------------- command line


def main(operator: str, *, dry_run: bool = False, simulate: int | None = None) -> int:
    """Tune the entries of one operator; exit code.

    Args:
        operator: a name of :data:`SPACES`.
        dry_run: write nothing.
        simulate: time only so many candidates of each entry, those that are predicted fastest; without a GPU
            print the predictions, and that is all.
    """

    def fail(message: str) -> int:
        print(f"python -m bench: error: {message}", file=sys.stderr)
        return 2

    if operator not in SPACES:
        return fail(f"operator is {operator!r}; expected one of {', '.join(SPACES)}")
    on_gpu = torch.cuda.is_available()
    if not on_gpu and simulate is None:
        return fail("tune: PyTorch finds no GPU; expected a CUDA or ROCm device with Triton (or --simulate)")
    from segvit_kernels.triton._launch import architecture, pinned

    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    arch = architecture(device) if on_gpu else "sm_90"
    if simulate is not None and arch != "sm_90":
        return fail(f"--simulate: the simulator knows sm_90, this GPU is {arch}")
    path = CONFIGS / f"{arch}.json"
    if not path.is_file():
        # A new file begins as what this GPU has run with so far.
        path = path if dry_run else _begin(path)
    op, configs = operators.by_name()[operator], pinned(arch)
    for space in SPACES[operator]:

        def prepare(candidate: dict[str, Any], space: Space = space) -> Callable[[], float]:
            case, dtype = op.shape(space.shape, BATCH), str(DTYPE).removeprefix("torch.")
            with replaced(configs, space.path, candidate):
                # The graph keeps the launches of this candidate.
                return _sampler(op, case, space.mode, dtype, device)

        def tell(row: dict[str, Any], space: Space = space) -> None:
            shown = seconds(row["median_s"]) if row["status"] == "ok" else row["reason"]
            print(f"{' '.join(space.path)} {row['candidate']}: {shown}", flush=True)

        candidates = space.candidates(dict(entry(configs, space.path)))
        if simulate is not None:
            candidates = _best(operator, space, candidates, simulate)
        if not on_gpu:
            continue
        outcome = choose(candidates, prepare, tell=tell)
        timed = [row for row in outcome.rows if row["status"] == "ok"]
        for row in sorted(timed, key=lambda row: row["median_s"]):
            tell(row)
        print(f"{' '.join(space.path)}: {outcome.best}, {outcome.gain:.3f}× what was pinned")
        if not dry_run and outcome.gain > 1:
            pin(path, space.path, outcome.best, environment.describe(device))
            put(entry(configs, space.path), outcome.best)
    return 0


def _begin(path: Path) -> Path:
    text = (CONFIGS / "default.json").read_text(encoding="utf-8")
    count = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    write(path, re.sub(r'("multiprocessors": )\d+', rf"\g<1>{count}", text, count=1))
    return path
