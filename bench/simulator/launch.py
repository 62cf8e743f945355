"""The predicted time of one launch: ways through the code, one quarter's cycles, programs on the machine.

1. :mod:`~bench.simulator.execute` follows every program through the machine code with the launch's arguments
   and sorts them by the way they take.
2. Of each way one program is looked at closely, all threads: bank conflicts, sectors, first-level cache.
3. :mod:`~bench.simulator.core` times as many such programs as fit a multiprocessor. Loops run a few times,
   and the rest is extrapolated from their steady state.
4. Programs go to the multiprocessors in order, each to the first free place; the end is the last one's.
5. Bytes through the second-level cache and memory bound the time from below.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from bench.simulator import core, execute
from bench.simulator.assume import contents
from bench.simulator.machine import Machine
from segvit_kernels.testing.machine_code import Code, disassembled, instructions

KEPT, WARM = (60, 20, 7, 4), (15, 6, 2, 1)
"""Iterations of a loop that are executed, and those of them that its steady state is not taken from: as many
as leave a way no more than :data:`LONG` instructions."""
LONG = (3000, 3000, 9000)
STAGGER = 150
"""Cycles between the begins of resident programs, less where their ways are short."""
SAMPLE = 24
"""Programs followed where nearly each takes a way of its own."""
MOST_WAYS = 64
REPRESENTATIVES = 6
"""Ways timed at most; others take a time in proportion to their instructions."""


# ------------------------------------------------------------------------------------------------- loops


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop as it was run through: of each iteration the blocks and loops in it."""

    iterations: tuple[tuple[Any, ...], ...]


def nest(blocks: Sequence[int], loops: Sequence[frozenset[int]]) -> tuple[Any, ...]:
    """The blocks of a way, those in loops gathered into :class:`Loop`."""
    found: list[Any] = []
    at = 0
    while at < len(blocks):
        around = [loop for loop in loops if blocks[at] in loop]
        if not around:
            found.append(blocks[at])
            at += 1
            continue
        loop = max(around, key=len)
        end = at
        while end < len(blocks) and blocks[end] in loop:
            end += 1
        inner = [other for other in loops if other < loop]
        starts = [k for k in range(at, end) if blocks[k] == blocks[at]]
        pieces = zip(starts, [*starts[1:], end], strict=True)
        found.append(Loop(tuple(nest(blocks[a:b], inner) for a, b in pieces)))
        at = end
    return tuple(found)


class Shortened:
    """A way with the iterations of its loops left out beyond the first few: ``sequence``, the places of its
    instructions, ``marks``, positions whose times :meth:`extra` needs."""

    def __init__(self, tree: Sequence[Any], parts: dict[int, execute.Block]) -> None:
        self._parts = parts
        for self._kept, self._warm, limit in zip(KEPT, WARM, (*LONG, math.inf), strict=True):
            self.sequence: list[int] = []
            self.marks: set[int] = set()
            self._plan = self._emit(tree)
            if len(self.sequence) <= limit:
                break

    def _count(self, tree: Sequence[Any]) -> int:
        return sum(
            sum(map(self._count, node.iterations))
            if isinstance(node, Loop)
            else self._parts[node].end - self._parts[node].begin
            for node in tree
        )

    def _emit(self, tree: Sequence[Any]) -> list[Any]:
        plan = []
        for node in tree:
            if not isinstance(node, Loop):
                block = self._parts[node]
                self.sequence.extend(range(block.begin, block.end))
                continue
            n = len(node.iterations)
            kept = n if n <= self._kept + 1 else self._kept
            inner, ends = [], []
            for iteration in node.iterations[:kept]:
                inner.append(self._emit(iteration))
                ends.append(len(self.sequence) - 1)
            share = 0.0
            if kept < n:
                left = sum(map(self._count, node.iterations[kept:]))
                share = left / sum(map(self._count, node.iterations[self._warm : kept]))
                self.marks |= {ends[self._warm - 1], ends[-1]}
            plan.append((inner, ends, share))
        return plan

    def extra(self, times: dict[int, float]) -> float:
        """Cycles of the iterations that were left out, from the times of those that ran."""

        warm = self._warm

        def of(plan: list[Any]) -> float:
            total = 0.0
            for inner, ends, share in plan:
                extras = [of(p) for p in inner]
                total += sum(extras)
                if share:
                    total += share * (times[ends[-1]] - times[ends[warm - 1]] + sum(extras[warm:]))
            return total

        return of(self._plan)


# ----------------------------------------------------------------------------------------------- programs


@dataclasses.dataclass(frozen=True)
class Way:
    """Programs that take the same way, or nearly.

    Args:
        programs: their numbers.
        cycles: of one of them by how many are resident on its multiprocessor.
        pipes: cycles that one of them takes of each pipe of a quarter.
        sectors: of 32 bytes that one of them moves through the second-level cache.
    """

    programs: np.ndarray
    cycles: dict[int, float]
    pipes: np.ndarray
    sectors: float

    def at(self, resident: int) -> float:
        """Cycles with so many resident."""
        known = sorted(self.cycles)
        return float(np.interp(resident, known, [self.cycles[n] for n in known]))


def makespan(order: Sequence[int], cycles: Sequence[Sequence[float]], units: int, slots: int) -> float:
    """Cycles until the last of some programs is done, on ``units`` multiprocessors with ``slots`` places.

    Args:
        order: the kind of every program, in the order of their numbers.
        cycles: of each kind, the cycles of one by how many are resident with it, from 1 on.
        units: multiprocessors.
        slots: programs that fit each.
    """
    resident: list[list[list[float]]] = [[] for _ in range(units)]
    since = [0.0] * units
    version = [0] * units
    events: list[tuple[float, int, int]] = []
    following = 0

    def schedule(unit: int, now: float) -> None:
        version[unit] += 1
        n = len(resident[unit])
        if n:
            soonest = min(left * cycles[int(kind)][n - 1] for kind, left in resident[unit])
            heapq.heappush(events, (now + soonest, unit, version[unit]))

    for _ in range(slots):
        for unit in range(units):
            if following < len(order):
                resident[unit].append([order[following], 1.0])
                following += 1
    for unit in range(units):
        schedule(unit, 0.0)
    now = 0.0
    while events:
        now, unit, seen = heapq.heappop(events)
        if seen != version[unit]:
            continue
        n, passed = len(resident[unit]), now - since[unit]
        since[unit] = now
        for program in resident[unit]:
            program[1] -= passed / cycles[int(program[0])][n - 1]
        resident[unit] = [program for program in resident[unit] if program[1] > 1e-9]
        while len(resident[unit]) < slots and following < len(order):
            resident[unit].append([order[following], 1.0])
            following += 1
        schedule(unit, now)
    return now


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The predicted time of a launch and what it is made of; a row of a result."""

    kernel: str
    programs: int
    registers: int
    shared: int
    warps: int
    resident: int
    seconds: float
    limit: str
    cycles: float
    busy: dict[str, float]
    l2_bytes: float
    memory_bytes: float
    ways: int
    unknown_branches: int
    unknown_instructions: dict[str, int]

    def row(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _read(described: dict[str, Any]) -> dict[str, Any]:
    """A launch with its machine code as text (``sass``) and its ``registers`` in place of the cubin."""
    text = disassembled(described["cubin"])
    registers = int(re.search(r"REG:(\d+)", text)[1])
    return {**{k: v for k, v in described.items() if k != "cubin"}, "sass": text, "registers": registers}


class Launch:
    """A captured launch: see ``bench/suites/_capture.py`` for ``described``.

    Args:
        described: the launch.
        labels: that occur in each image, for kernels that are steered by them.
        decided: whether tests on data succeed, and branches that skip work are taken.
        arch: whose constant memory it is.
    """

    def __init__(
        self,
        described: dict[str, Any],
        labels: Sequence[Sequence[int]] | None = None,
        decided: bool = False,
        arch: str = "sm_90",
    ) -> None:
        if "cubin" in described:
            described = _read(described)
        self.described, self.decided = described, decided
        self.code = instructions(described["sass"])
        self.parts = execute.blocks(self.code)
        self.constants = execute.bank(
            arch, 32 * described["warps"], described["programs"], described["parameters"]
        )
        tensors = described["tensors"]
        known = {n: np.frombuffer(b, dtype=np.uint8) for n, b in described.get("known", {}).items()}
        for name, array in contents(described, labels, decided).items():
            known[name] = np.frombuffer(array.tobytes(), dtype=np.uint8)
        self.memory = execute.Memory(tuple((tensors[n]["address"], data) for n, data in known.items()))

    @cached_property
    def _loops(self) -> list[frozenset[int]]:
        return list(Code.sass(self.described["sass"]).loops)

    def _paths(self) -> tuple[list[execute.Path], bool]:
        """Ways of all programs; of a sample if there are too many, and whether so."""
        count = self.described["programs"]
        most = dict(skip=self.decided, most=MOST_WAYS)
        found = execute.paths(self.code, self.parts, range(count), self.constants, self.memory, **most)
        if found is not None:
            return found, False
        chosen = sorted(set(np.random.default_rng(0).choice(count, SAMPLE, replace=False).tolist()))
        most["most"] = count
        return execute.paths(self.code, self.parts, chosen, self.constants, self.memory, **most), True

    def ways(self, resident: int, l1_bytes: int) -> tuple[list[Way], list[int], int]:
        """Ways, of every program in order the number of its way, and how many branches were unknown."""
        paths, sampled = self._paths()
        count = self.described["programs"]
        length = [sum(self.parts[b].end - self.parts[b].begin for b in p.blocks) for p in paths]
        chosen = _representatives(paths, length)
        found, kinds = [], [0] * count
        for index in chosen:
            found.append(self._time(paths[index], resident, l1_bytes))
        ways = []
        for index, path in enumerate(paths):
            near = min(range(len(chosen)), key=lambda k, n=length[index]: abs(length[chosen[k]] - n))
            ratio = length[index] / length[chosen[near]]
            base = found[near]
            cycles = {n: c * ratio for n, c in base.cycles.items()}
            ways.append(Way(path.rows, cycles, base.pipes * ratio, base.sectors * ratio))
        if sampled:
            # Programs that were not followed take the ways of the sample in turn.
            drawn = np.random.default_rng(1).permutation(np.resize(np.arange(len(ways)), count))
            kinds = drawn.tolist()
        else:
            for index, path in enumerate(paths):
                for program in path.rows.tolist():
                    kinds[program] = index
        unknown = len(set().union(*(p.unknown for p in paths)))
        return ways, kinds, unknown

    def _time(self, path: execute.Path, resident: int, l1_bytes: int) -> Way:
        warps, program = self.described["warps"], int(path.rows[len(path.rows) // 2])
        recorder = execute.Recorder(self.code, l1_bytes // 32)
        by_warp = execute.accesses(
            self.code, self.parts, program, warps, self.constants, self.memory, recorder, skip=self.decided
        )
        timed = {k: core.timed(i, recorder.found.get(i.address)) for k, i in enumerate(self.code)}
        trees = {}
        if by_warp and len(by_warp) > 1:
            for p in by_warp:
                for w in p.rows.tolist():
                    trees[w] = p.blocks
        shortened: dict[int, Shortened] = {}

        def of(warp: int) -> Shortened:
            blocks = trees.get(warp, path.blocks)
            if id(blocks) not in shortened:
                shortened[id(blocks)] = Shortened(nest(blocks, self._loops), self.parts)
            return shortened[id(blocks)]

        cycles = {}
        for n in sorted({1, resident}):
            here = self._quarter(n, warps)
            chosen = [of(w) for _, w in here]
            marks = [s.marks | {len(s.sequence) - 1} for s in chosen]
            stagger = min(STAGGER, len(chosen[0].sequence) // (4 * n))
            sequences = [(p, s.sequence) for (p, _), s in zip(here, chosen, strict=True)]
            run = core.run(timed, sequences, marks, stagger)
            ends: dict[int, float] = {}
            for (p, _), s, times in zip(here, chosen, run.times, strict=True):
                spent = times[len(s.sequence) - 1] + s.extra(times) - p * stagger
                ends[p] = max(ends.get(p, 0.0), spent)
            cycles[n] = sum(ends.values()) / len(ends)
        pipes, sectors = np.zeros(len(core.PIPES)), 0.0
        quarter = max(1, warps // 4)
        for w in range(warps):
            share = quarter / warps if warps >= 4 else 0.25
            for block, times in Counter(trees.get(w, path.blocks)).items():
                part = self.parts[block]
                for k in range(part.begin, part.end):
                    pipes[0] += times * share
                    for pipe, taken in timed[k].pipes:
                        pipes[pipe] += taken * times * share
                        if pipe == core.PIPES.index("L2 port"):
                            sectors += taken / 2 * times
        return Way(path.rows, cycles, pipes, sectors)

    @staticmethod
    def _quarter(resident: int, warps: int) -> list[tuple[int, int]]:
        """(program, warp) of those on one quarter of a multiprocessor."""
        everything = [(p, w) for p in range(resident) for w in range(warps)]
        return everything[::4]

    def predict(self, machine: Machine) -> Prediction:
        """The time on a machine.

        Raises:
            ValueError: the code cannot be followed, or no program fits.
        """
        d = self.described
        resident = machine.unit.fitting(d["warps"], d["registers"], d["shared"])
        if not resident:
            raise ValueError(f"{d['kernel']}: no program fits a multiprocessor")
        full = min(resident, -(-d["programs"] // machine.multiprocessors))
        l1 = max(0, machine.unit.shared + 28 * 1024 - full * (d["shared"] + 1024))
        ways, kinds, unknown = self._ways(full, l1)
        table = [[way.at(n) for n in range(1, full + 1)] for way in ways]
        cycles = makespan(kinds, table, machine.multiprocessors, full)
        numbers = Counter(kinds)
        pipes = sum(numbers[k] * way.pipes for k, way in enumerate(ways))
        l2 = 32.0 * sum(numbers[k] * way.sectors for k, way in enumerate(ways))
        memory = min(l2, sum({t["address"]: t["bytes"] for t in d["tensors"].values()}.values()))
        times = {
            "execution": cycles / machine.clock,
            "L2": l2 / machine.l2,
            "memory": memory / machine.memory,
        }
        slowest = max(times, key=times.__getitem__)
        seconds = times[slowest]
        busy = pipes / (machine.multiprocessors * seconds * machine.clock)
        shares = dict(zip(core.PIPES, busy.tolist(), strict=True))
        filled = sum(numbers[k] * table[k][-1] for k in numbers) / (machine.multiprocessors * full * cycles)
        limit = slowest if slowest != "execution" else _limit(shares, filled)
        return Prediction(
            kernel=d["kernel"],
            programs=d["programs"],
            registers=d["registers"],
            shared=d["shared"],
            warps=d["warps"],
            resident=resident,
            seconds=seconds + machine.launch_s,
            limit=limit,
            cycles=cycles,
            busy={name: round(share, 3) for name, share in shares.items()},
            l2_bytes=l2,
            memory_bytes=memory,
            ways=len(ways),
            unknown_branches=unknown,
            unknown_instructions=dict(core.unknown(self.code)),
        )

    def _ways(self, resident: int, l1_bytes: int) -> tuple[list[Way], list[int], int]:
        key = (resident, l1_bytes)
        kept = self.__dict__.setdefault("_kept", {})
        if key not in kept:
            kept[key] = self.ways(resident, l1_bytes)
        return kept[key]


def _limit(busy: dict[str, float], filled: float) -> str:
    """What a launch waits for: a pipe that is busy most of the time, programs that are not there, or else
    results."""
    name = max(busy, key=busy.__getitem__)
    if busy[name] >= 0.7:
        return name
    return "few programs" if filled < 0.6 else f"latency ({name} {100 * busy[name]:.0f} %)"


def _representatives(paths: Sequence[execute.Path], length: Sequence[int]) -> list[int]:
    """Ways to be timed: all if they are few; else spread over the lengths, weighted by programs."""
    if len(paths) <= REPRESENTATIVES:
        return list(range(len(paths)))
    order = sorted(range(len(paths)), key=lambda k: length[k])
    weight = np.cumsum([len(paths[k].rows) for k in order])
    at = (np.arange(REPRESENTATIVES) + 0.5) / REPRESENTATIVES * weight[-1]
    return sorted({order[int(k)] for k in np.searchsorted(weight, at)})
