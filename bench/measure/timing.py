"""Samples of time. What is measured how is said in docs/benchmarking.md."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


def summary(samples: Sequence[float]) -> dict[str, float | int]:
    """Median and spread of ``samples`` (seconds)."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    half = max(1, len(samples) // 2)
    first, second = statistics.median(samples[:half]), statistics.median(samples[half:] or samples)
    return {
        "median_s": statistics.median(ordered),
        "p25_s": ordered[math.floor(0.25 * last)],
        "p75_s": ordered[math.ceil(0.75 * last)],
        "min_s": ordered[0],
        "samples": len(ordered),
        # The same code timed twice: differences between peers below this are noise.
        "drift": second / first - 1 if first > 0 else 0.0,
    }


def interleave(
    samplers: dict[str, Callable[[], float]], *, rounds: int, seconds_per_peer: float
) -> dict[str, list[float]]:
    """Samples of every peer, taken in turns so that a drift of the machine meets all of them alike.

    The order turns by one from round to round. A peer that has used up ``seconds_per_peer`` takes no more
    part once it has three samples.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    spent = dict.fromkeys(samplers, 0.0)
    names = list(samplers)
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            if spent[name] > seconds_per_peer and len(samples[name]) >= 3:
                continue
            start = time.perf_counter()
            samples[name].append(samplers[name]())
            spent[name] += time.perf_counter() - start
    return samples


def one_line(error: BaseException) -> str:
    """What went wrong, for the ``reason`` of a row."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


@contextlib.contextmanager
def captured() -> Iterator[Callable[[], str]]:
    """What anything in this process, its libraries and its children print inside the ``with`` block; yields a
    function that gives it."""
    with tempfile.TemporaryFile() as file, open(file.fileno(), "w", buffering=1, closefd=False) as text:

        def printed() -> str:
            text.flush()
            size = os.fstat(file.fileno()).st_size
            return os.pread(file.fileno(), size, 0).decode(errors="replace")

        sys.stdout.flush(), sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        try:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                yield printed
        finally:
            for number, original in enumerate(kept, 1):
                os.dup2(original, number)
                os.close(original)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _elapsed(device: torch.device, work: Callable[[], object]) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def _sampler(
    device: torch.device, work: Callable[[], object], calls: int, least_s: float
) -> Callable[[], float]:
    """A sampler of seconds per call, ``work`` making ``calls`` calls; one sample lasts ``least_s``."""
    work()
    synchronize(device)
    repeats = max(1, math.ceil(least_s / max(_elapsed(device, work), 1e-7)))

    def repeated() -> None:
        for _ in range(repeats):
            work()

    return lambda: _elapsed(device, repeated) / (repeats * calls)


def _over(call: Callable[[Any], object], sets: Sequence[Any]) -> Callable[[], None]:
    """``call`` on every input set; each call's results are freed before the next."""

    def work() -> None:
        for inputs in sets:
            call(inputs)

    return work


def rotation(make: Callable[[], tuple[dict, Any]], cache_bytes: int, most: int) -> list[tuple[dict, Any]]:
    """Input sets that together exceed twice a cache, at least two and at most ``most`` of them: a call finds
    the inputs of the one before it there, not its own."""
    first = make()
    size = sum(t.nbytes for t in first[0].values() if isinstance(t, torch.Tensor))
    count = min(most, max(2, -(-2 * cache_bytes // size) + 1))
    return [first, *(make() for _ in range(count - 1))]


def stream_sampler(
    call: Callable[[Any], object], sets: Sequence[Any], device: torch.device, least_s: float = 2e-3
) -> Callable[[], float]:
    """Seconds per call, launched one by one over all input sets in turn: what a program sees."""
    return _sampler(device, _over(call, sets), len(sets), least_s)


def call_sampler(call: Callable[[Any], object], sets: Sequence[Any]) -> Callable[[], float]:
    """Seconds of one call on a CPU, on the next input set at every sample."""
    turns = itertools.cycle(sets)

    def sample() -> float:
        inputs = next(turns)
        start = time.perf_counter()
        call(inputs)
        return time.perf_counter() - start

    return sample


def graph_sampler(
    call: Callable[[Any], object], sets: Sequence[Any], device: torch.device, least_s: float = 2e-3
) -> Callable[[], float]:
    """Seconds per call in replays of one CUDA graph over all input sets: device time without launch gaps."""
    graph = capture(_over(call, sets))
    return _sampler(device, graph.replay, len(sets), least_s)


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``work``, warmed up on a side stream first.

    Raises:
        RuntimeError: ``work`` waits for the device. It is found before the capture: one that fails leaves
            torch's random numbers, allocator and current stream unusable in this process.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
        usual = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(usual)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every ``torch.empty`` (and its like) comes filled with NaN, so that an unwritten element shows."""
    originals = {
        (owner, name): getattr(owner, name)
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        )
    }

    def poisoning(original: Callable) -> Callable:
        def empty(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = original(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return empty

    for (owner, name), original in originals.items():
        setattr(owner, name, poisoning(original))
    try:
        yield
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)
