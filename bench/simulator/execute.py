"""Which way the programs of a launch take through their machine code, and where their accesses to memory go.

An interpreter of the integer and predicate instructions of NVIDIA's machine code (SASS), enough of it to
follow control flow with the real arguments of a launch: what it does not know, because it was read from
memory, shuffled or multiplied by tensor cores, it knows that it does not know. A value is ``None`` (unknown),
a Python int (alike everywhere) or an array, rows by lanes, of 32-bit patterns. Rows are programs, of which
thread 0 is followed (:func:`paths`), or the warps of one program with all of their threads
(:func:`accesses`); rows that branch differently go on apart.
"""

from __future__ import annotations

import dataclasses
import heapq
import re
from collections.abc import Iterable, Sequence

import numpy as np

from bench.simulator._operations import _MEMORY, Step, size_of, step
from bench.simulator._state import _NUMBER, Memory, State, Value, _and, _is_predicate, predicate
from segvit_kernels.testing.machine_code import Instruction

PARAMETERS = {"sm_80": 0x160, "sm_90": 0x210}
"""Where the parameters of a kernel begin in constant bank 0."""


def bank(arch: str, threads: int, programs: int, parameters: bytes) -> bytes:
    """Constant bank 0: size of a program and of the grid, one-dimensional both, and the parameters."""
    sizes = b"".join(n.to_bytes(4, "little") for n in (threads, 1, 1, programs, 1, 1))
    return sizes.ljust(PARAMETERS[arch], b"\0") + parameters


MOST_BLOCKS = 2_000_000


# ---------------------------------------------------------------------------------------------- control flow


@dataclasses.dataclass
class Block:
    """Instructions ``begin`` to ``end`` of a kernel, of which only the last may branch."""

    begin: int
    end: int
    steps: list[Step]


def blocks(code: Sequence[Instruction]) -> dict[int, Block]:
    """Basic blocks by the place where they begin."""
    place = {i.address: k for k, i in enumerate(code)}
    heads, returns = {0}, any(i.name == "RET" for i in code)
    for k, i in enumerate(code):
        if i.name in ("BRA", "EXIT", "RET", "CALL", "BRX"):
            heads.add(k + 1)
            if i.name in ("BRA", "CALL") and i.target in place:
                heads.add(place[i.target])
        # Where a call comes back to is a number that is moved to a register.
        for operand in i.operands if returns and i.name in ("MOV", "IMAD", "UMOV", "HFMA2") else ():
            if _NUMBER.match(operand) and int(operand, 16) in place:
                heads.add(place[int(operand, 16)])
    begins = sorted(h for h in heads if h < len(code))
    found = {}
    for begin, end in zip(begins, [*begins[1:], len(code)], strict=True):
        found[begin] = Block(begin, end, [step(i) for i in code[begin:end]])
    return found


@dataclasses.dataclass(frozen=True)
class Path:
    """Rows (numbers of programs or warps) that take the same way: the blocks in order, by their first
    instruction; and the addresses of branches whose condition was unknown."""

    rows: np.ndarray
    blocks: list[int]
    unknown: frozenset[int]


def _ahead(
    code: Sequence[Instruction], parts: dict[int, Block], place: dict[int, int], begin: int, ends: set[int]
) -> dict[int, int]:
    """Blocks on the ways from ``begin`` to ``ends``, and how many instructions lie before them at least."""
    found: dict[int, int] = {}
    heap = [(0, begin)]
    while heap:
        before, at = heapq.heappop(heap)
        if at in found or at not in parts or at in ends:
            continue
        found[at] = before
        block, last = parts[at], code[parts[at].end - 1]
        further = before + block.end - block.begin
        if last.name == "BRA" and last.target in place:
            heapq.heappush(heap, (further, place[last.target]))
        if last.name not in ("BRA", "EXIT", "RET") or last.guard:
            heapq.heappush(heap, (further, block.end))
    return found


def _shorter(
    code: Sequence[Instruction], parts: dict[int, Block], place: dict[int, int], block: Block, target: int
) -> bool:
    """Whether a block's branch to ``target`` has less code than going on, until the two meet.

    Compilers put what is seldom done behind the kernel: a branch may lead to work or over it.
    """
    sides, again = (block.end, target), {block.begin}
    on, away = (_ahead(code, parts, place, begin, again) for begin in sides)
    meeting = min(on.keys() & away.keys(), key=lambda at: on[at] + away[at], default=None)
    on, away = (
        sum(parts[at].end - at for at in _ahead(code, parts, place, begin, again | {meeting}))
        for begin in sides
    )
    return away < on


def follow(
    code: Sequence[Instruction],
    parts: dict[int, Block],
    state: State,
    *,
    skip: bool = False,
    most: int = 64,
    limit: int = MOST_BLOCKS,
) -> list[Path] | None:
    """All ways from ``state`` to the end; ``None`` if there are more than ``most``.

    Where a condition is unknown, a branch forward goes where more work is, or with ``skip`` where less is.
    One back is not taken.

    Raises:
        ValueError: a way never ends, or goes where there is no code.
    """
    place = {i.address: k for k, i in enumerate(code)}
    done: list[Path] = []
    shorter: dict[int, bool] = {}
    stack: list[tuple[int, State]] = [(0, state)]
    while stack:
        at, s = stack.pop()
        while True:
            block = parts.get(at)
            if block is None:
                raise ValueError(f"control flow leaves the code at instruction {at}")
            s.path.append(at)
            if len(s.path) > limit:
                if limit < MOST_BLOCKS:
                    break
                raise ValueError(f"more than {limit} blocks: a loop that never ends?")
            for run in block.steps:
                run(s)
            last = code[block.end - 1]
            if last.name not in ("BRA", "EXIT", "RET", "CALL"):
                at = block.end
                continue
            condition: Value = predicate(last.guard)(s) if last.guard else True
            for operand in last.operands[:-1]:
                if _is_predicate(operand):
                    condition = _and(condition, predicate(operand)(s))
            if last.modifiers.startswith(".DIV"):
                condition = False
            to = place.get(last.target) if last.name in ("BRA", "CALL") and last.target is not None else None
            if last.name == "RET":
                back = s.get(re.match(r"R\d+", last.operands[0])[0])
                to = place.get(back) if isinstance(back, int) else None
                if to is None:
                    raise ValueError(f"an unknown way back at {last.address:#x}")
            if condition is None:
                s.unknown.add(last.address)
                condition = last.name == "BRA" and to is not None and to > block.begin
                if condition and last.address not in shorter:
                    shorter[last.address] = _shorter(code, parts, place, block, to)
                condition = condition and shorter[last.address] is skip
            if isinstance(condition, np.ndarray):
                # A warp goes where its threads go; it jumps over what none of them wants.
                taken = np.broadcast_to(condition, (len(s.rows), condition.shape[1])).all(1)
                if taken.all() or not taken.any():
                    condition = bool(taken.all())
                else:
                    if len(done) + len(stack) + 2 > most:
                        return None
                    other = s.part(taken)
                    other.unknown = set(s.unknown)
                    s = s.part(~taken)
                    if last.name == "EXIT":
                        done.append(Path(other.rows, other.path, frozenset(other.unknown)))
                    else:
                        stack.append((to, other))
                    at = block.end
                    continue
            if not condition:
                at = block.end
            elif last.name == "EXIT":
                break
            else:
                at = to
        done.append(Path(s.rows, s.path, frozenset(s.unknown)))
    return done


def _start(rows: np.ndarray, constants: bytes, memory: Memory, special: dict[str, Value]) -> State:
    fixed = {"SR_CgaCtaId": 0, "SR_LANEID": None, "SR_CTAID.Y": 0, "SR_CTAID.Z": 0, "R1": 0}
    return State(rows, fixed | special, {}, [], constants, memory)


def paths(
    code: Sequence[Instruction],
    parts: dict[int, Block],
    programs: Iterable[int],
    constants: bytes,
    memory: Memory,
    *,
    skip: bool = False,
    most: int = 64,
) -> list[Path] | None:
    """The ways of the given programs by their thread 0; ``None`` if there are more than ``most``."""
    rows = np.fromiter(programs, dtype=np.int64)
    special = {"SR_TID.X": 0, "SR_CTAID.X": rows[:, None].copy() if len(rows) > 1 else int(rows[0])}
    return follow(code, parts, _start(rows, constants, memory, special), skip=skip, most=most)


@dataclasses.dataclass
class Access:
    """What one instruction's accesses are like, on average over those that were looked at.

    ``wavefronts``: of shared memory, 128 bytes each; ``sectors``: of 32 bytes of global memory; ``missed``:
    those of them that the first-level cache has not.
    """

    count: int = 0
    wavefronts: float = 0.0
    sectors: float = 0.0
    missed: float = 0.0

    def mean(self, name: str) -> float:
        return getattr(self, name) / self.count


class Recorder:
    """Collects :class:`Access` by the address of an instruction, with a first-level cache of so many sectors,
    of which the oldest goes."""

    def __init__(self, code: Sequence[Instruction], sectors: int, samples: int = 24) -> None:
        self.kinds = {i.address: i for i in code if i.name in _MEMORY}
        self.found: dict[int, Access] = {}
        self.cache: dict[int, None] = {}
        self.room, self.samples = sectors, samples

    def __call__(self, key: int, state: State, at: Value, guard: Value) -> None:
        if at is None or guard is None or guard is False:
            return
        i, there = self.kinds[key], self.found.setdefault(key, Access())
        size, shared = size_of(i.modifiers), i.name in ("LDS", "STS", "LDSM", "STSM", "ATOMS")
        if shared and there.count >= self.samples:
            return
        rows = len(state.rows)
        where = (
            np.broadcast_to(np.asarray(at), (rows, 32))
            if np.ndim(at) < 2
            else np.broadcast_to(at, (rows, 32))
        )
        active = np.broadcast_to(np.asarray(guard), (rows, 32))
        for row, mask in zip(where, active, strict=True):
            there.count += 1
            if not mask.any():
                continue
            if shared:
                there.wavefronts += _wavefronts(row, mask, i, size)
                continue
            used = row[mask]
            sectors = np.unique(np.concatenate([used + k >> 5 for k in range(0, max(size, 4), 4)]))
            there.sectors += len(sectors)
            if i.name not in ("LDG", "LD") or ".STRONG" in i.modifiers:
                there.missed += len(sectors)
                continue
            for sector in sectors.tolist():
                if self.cache.pop(sector, self) is self:
                    there.missed += 1
                self.cache[sector] = None
            while len(self.cache) > self.room:
                del self.cache[next(iter(self.cache))]


def _wavefronts(row: np.ndarray, mask: np.ndarray, i: Instruction, size: int) -> int:
    """How many times 32 banks of 4 bytes are asked: lanes in groups that ask for 128 bytes at a time."""
    if i.name in ("LDSM", "STSM"):
        count = int(m[1]) if (m := re.search(r"88\.(\d)", i.modifiers)) else 1
        groups = [row[8 * k : 8 * k + 8] for k in range(count)]
        size = 16
    else:
        lanes = 32 * 4 // max(size, 4)
        groups = [row[k : k + lanes][mask[k : k + lanes]] for k in range(0, 32, lanes)]
    total = 0
    for group in groups:
        if len(group):
            words = np.unique(np.concatenate([(group >> 2) + k for k in range(max(1, size // 4))]))
            total += int(np.bincount(words & 31).max())
    return total


def accesses(
    code: Sequence[Instruction],
    parts: dict[int, Block],
    program: int,
    warps: int,
    constants: bytes,
    memory: Memory,
    recorder: Recorder,
    *,
    skip: bool = False,
    limit: int = 3000,
) -> list[Path] | None:
    """Follows all threads of one program for ``limit`` blocks, telling ``recorder``; ways by warp, or
    ``None`` if that was not the end of it."""
    threads = np.arange(32 * warps).reshape(warps, 32)
    special = {"SR_TID.X": threads, "SR_CTAID.X": program, "SR_LANEID": threads % 32}
    state = _start(np.arange(warps), constants, memory, special)
    state.accessed = recorder
    found = follow(code, parts, state, skip=skip, most=2 * warps + 2, limit=limit)
    if found is None or any(len(path.blocks) > limit for path in found):
        return None
    return found
