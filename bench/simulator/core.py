"""One quarter of a Hopper multiprocessor executing machine code: issue, pipes, scoreboards, barriers, groups.

Every cycle one of the resident warps may issue its next instruction: when the stall count of its last one is
over, the scoreboards that the control code names are free, the barrier or group that it waits for is complete
and the pipe takes it. Pipes have rates, results have latencies; of memory there is a first-level cache as
:mod:`bench.simulator.execute` found it, a latency and the port to the second level.

Left out: caches of instructions and constants, register banks and their reuse, contention between
multiprocessors (:mod:`bench.simulator.launch` bounds it by bytes), power and clocks.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from bench.simulator.execute import Access, size_of
from segvit_kernels.testing.machine_code import Instruction

PIPES = ("issue", "FMA", "IMAD", "ALU", "MUFU", "tensor", "shared memory", "L2 port")
_ISSUE, _FMA, _HEAVY, _ALU, _MUFU, _TENSOR, _SHARED, _PORT = range(8)
# How many cycles ahead of itself a pipe takes instructions.
_SLACK = (0, 0, 0, 0, 8, 64, 16, 1e9)

L2_LATENCY, L1_LATENCY = 550, 34
"""Cycles from issue to the data: of global memory in the second level, and in the first."""
_LATENCY = {
    "MUFU": 20, "SHFL": 24, "LDS": 28, "LDSM": 33, "LDC": 40, "ULDC": 20, "S2R": 25, "S2UR": 25, "STS": 15,
    "STSM": 20, "I2F": 20, "F2I": 20, "F2F": 20, "ATOMS": 60, "R2UR": 12, "RED": 20, "REDG": 20, "STG": 20,
    "POPC": 16, "VOTE": 10, "MATCH": 30, "FCHK": 20, "LDL": 34, "STL": 20, "REDUX": 30, "FLO": 16, "BREV": 16,
    "HMMA": 33, "IMMA": 33, "ATOMG": 600,
}  # fmt: skip
_DEFAULT_LATENCY = 20
_BARRIER_LATENCY = 20

_ON_FMA = {"FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "FFMA32I"}
_ON_ALU = {
    "FMNMX", "FMNMX3", "LOP3", "IADD3", "SHF", "SEL", "FSEL", "ISETP", "FSETP", "PRMT", "LEA", "IABS",
    "VIADD", "VIADDMNMX",
    "IMNMX", "VIMNMX", "VIMNMX3", "PLOP3", "F2FP", "MOV", "SGXT", "FSET", "CS2R", "P2R", "R2P",
    "I2FP", "HSETP2", "HMNMX2", "HSET2", "BMSK", "FSWZADD", "VABSDIFF", "ISCADD", "I2IP", "F2IP",
}  # fmt: skip
_ON_MUFU = {"MUFU", "I2F", "F2I", "F2F", "POPC", "FLO", "BREV", "FCHK", "FRND"}
_ON_SHARED = {
    "SHFL", "LDS", "LDSM", "STS", "STSM", "LDG", "STG", "LDGSTS", "ATOMS", "RED", "REDG", "ATOMG", "LDL",
    "STL", "LD", "ST", "REDUX", "MATCH",
}  # fmt: skip
_TO_L2 = {"LDG", "STG", "LDGSTS", "RED", "REDG", "ATOMG", "LD", "ST"}
_NO_PIPE = {
    "BRA", "EXIT", "RET", "CALL", "BAR", "WARPGROUP", "NOP", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "MEMBAR",
    "FENCE", "DEPBAR", "LDGDEPBAR", "LDC", "ULDC", "S2R", "S2UR", "R2UR", "VOTE", "VOTEU", "CCTL", "ERRBAR",
    "NANOSLEEP", "YIELD", "ENDCOLLECTIVE", "USETMAXREG", "ACQBULK", "CGAERRBAR", "UCGABAR", "DFMA", "ELECT",
}  # fmt: skip
_UNIFORM = {
    "UMOV", "UIADD3", "UIMAD", "ULEA", "ULOP3", "USHF", "USEL", "UISETP", "USGXT", "UPLOP3", "UPRMT", "UP2UR",
    "UR2UP", "UFLO", "UPOPC", "UBREV", "UMNMX", "UIMNMX", "UVIADD", "UVIMNMX", "UVIADDMNMX", "UIABS",
    "UISCADD",    "UFSETP", "UFMUL", "UFADD", "UFFMA", "UF2FP", "UBMSK", "UVOTE", "UCVT",
}  # fmt: skip


def unknown(code: Sequence[Instruction]) -> Counter[str]:
    """Instructions that the simulator has no rate for: they are given that of plain arithmetic."""
    named = (
        _ON_FMA | _ON_ALU | _ON_MUFU | _ON_SHARED | _NO_PIPE | _UNIFORM | {"IMAD", "HMMA", "HGMMA", "IMMA"}
    )
    return Counter(i.name for i in code if i.name not in named)


def _hgmma(i: Instruction) -> float:
    """Cycles of one warpgroup's product: 64 × N × 16 at 512 multiply-adds a quarter, or the time to read its
    operands from shared memory."""
    match = re.search(r"64x(\d+)x(\d+)", i.modifiers)
    n = int(match[1])
    from_shared = len(i.operands) > 1 and i.operands[1].startswith("gdesc")
    return max(n / 2, 16 + n / 4 if from_shared else n / 4)


def _hmma(i: Instruction) -> float:
    """mma.sync runs at half the rate of wgmma: 256 multiply-adds a cycle, TF32 128."""
    macs = {"16816": 2048, "1688": 1024, "1684": 512, "16832": 4096, "16864": 8192}
    size = next((m for name, m in macs.items() if f".{name}" in i.modifiers), 2048)
    return size / (128 if "TF32" in i.modifiers else 256)


def _shared_cycles(i: Instruction, seen: Access | None) -> float:
    """Cycles of the pipe to shared memory and first-level cache, of which a quarter gets 32 bytes each."""
    if i.name in ("LDSM", "STSM"):
        fallback = int(m[1]) if (m := re.search(r"88\.(\d)", i.modifiers)) else 1
    else:
        fallback = max(1, size_of(i.modifiers) // 4)
    if i.name in ("LDS", "STS", "LDSM", "STSM", "ATOMS"):
        return 4 * (max(1.0, seen.mean("wavefronts")) if seen else fallback)
    if i.name in _TO_L2:
        return 4 * max(1.0, seen.mean("sectors") / 4 if seen else fallback)
    return 4.0


@dataclasses.dataclass(frozen=True)
class Timed:
    """One instruction as the core sees it: what it waits for, which pipes it takes for how long, and when it
    is done."""

    kind: str
    pipes: tuple[tuple[int, float], ...]
    latency: float
    stall: int
    write: int
    read: int
    wait: int
    argument: int = 0
    closes: bool = False


def timed(i: Instruction, seen: Access | None = None) -> Timed:
    """Rates and latencies of an instruction, with what is known of its accesses."""
    name, pipes, latency, kind = i.name, [], _LATENCY.get(i.name, _DEFAULT_LATENCY), ""
    argument, closes = 0, False
    if name in _ON_FMA:
        pipes = [(_FMA, 1)]
    elif name == "IMAD":
        pipes = [(_FMA, 1), (_HEAVY, 2)]
    elif name in _ON_MUFU:
        pipes = [(_MUFU, 8)]
    elif name in _ON_SHARED:
        pipes = [(_SHARED, _shared_cycles(i, seen))]
        if name in _TO_L2:
            sectors = seen.mean("sectors") if seen else 4 * size_of(i.modifiers) / 4
            missed = sectors
            if name in ("LDG", "LD") and seen:
                missed = seen.mean("missed")
            pipes.append((_PORT, 2 * missed))
            if name in ("LDG", "LD", "LDGSTS"):
                share = missed / sectors if sectors else 0
                # A warp waits for the last of its sectors.
                share = 1.0 if name == "LDGSTS" else min(1.0, share * max(1.0, sectors / 4))
                latency = share * L2_LATENCY + (1 - share) * L1_LATENCY
                latency += 50 if name == "LDGSTS" else 0
    elif name in ("HMMA", "IMMA"):
        pipes = [(_TENSOR, _hmma(i))]
    elif name == "HGMMA":
        cycles = _hgmma(i)
        pipes, latency, kind = [(_TENSOR, cycles)], max(18, cycles) + 16, "product"
        closes = "gsb0" in i.operands
    elif name not in _NO_PIPE and name not in _UNIFORM:
        pipes = [(_ALU, 2)]
    if name == "LDGSTS":
        kind = "copy"
    elif name == "LDGDEPBAR":
        kind = "copies"
    elif name == "DEPBAR":
        kind, argument = "copied", _count(i)
    elif name == "WARPGROUP":
        kind, latency = ("products", 4) if "DEPBAR" in i.modifiers else ("", 4)
        argument = _count(i)
    elif name == "BAR":
        kind, argument = ("arrive" if ".ARV" in i.modifiers else "barrier"), _barrier(i)
        closes = len(i.operands) > 1
    pipes = tuple((p, float(c)) for p, c in pipes if c)
    return Timed(kind, pipes, latency, i.stall, i.write, i.read, i.wait, argument, closes)


def _count(i: Instruction) -> int:
    return int(i.operands[-1], 16) if i.operands and i.operands[-1].startswith("0x") else 0


def _barrier(i: Instruction) -> int:
    """Number of the barrier, and above it how many warps of this quarter it is for (0: all)."""
    numbers = [int(o, 16) for o in i.operands if re.match(r"0x[0-9a-f]+$", o)]
    if not numbers:
        return 0
    return numbers[0] | (max(1, numbers[1] // 128) << 8 if len(numbers) > 1 else 0)


class _Warp:
    __slots__ = (
        "at", "blocked", "boards", "copies", "last_copy", "open", "products", "program", "ready", "sequence",
        "start", "times", "why",
    )  # fmt: skip

    def __init__(self, program: int, sequence: Sequence[int], start: float) -> None:
        self.program, self.sequence, self.at, self.ready, self.start = program, sequence, 0, start, start
        self.boards = [0.0] * 6
        self.copies: list[float] = []
        self.products: list[float] = []
        self.last_copy = self.open = 0.0
        self.blocked, self.why = False, "issue"
        self.times: dict[int, float] = {}


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of it.

    Args:
        cycles: until the last warp was done.
        times: of every warp, when it had issued the instruction at each of the places asked for.
        busy: cycles that each pipe was taken, as :data:`PIPES`.
        issued: instructions.
        waits: cycles without an issue, by what the next warp waited for.
    """

    cycles: float
    times: list[dict[int, float]]
    busy: tuple[float, ...]
    issued: int
    waits: dict[str, float]


def run(
    code: Mapping[int, Timed],
    warps: Sequence[tuple[int, Sequence[int]]],
    marks: Sequence[set[int]] | None = None,
    stagger: float = 150,
) -> Run:
    """Execute warps of resident programs, each a sequence of places in ``code``.

    Args:
        code: instructions by place.
        warps: of each its program and its sequence.
        marks: of each the positions in its sequence whose time is asked for.
        stagger: cycles between the begins of programs.

    Raises:
        RuntimeError: nobody can go on.
    """
    members: Counter[int] = Counter(program for program, _ in warps)
    all_warps = [_Warp(p, s, p * stagger + 3 * k) for k, (p, s) in enumerate(warps)]
    free = [0.0] * len(PIPES)
    busy = [0.0] * len(PIPES)
    waits: dict[str, float] = {}
    waiting: dict[tuple[int, int], list[_Warp]] = {}
    arrived: Counter[tuple[int, int]] = Counter()
    now, issued = 0.0, 0

    def prepare(w: _Warp) -> None:
        """When the next instruction of a warp could issue, pipes apart."""
        i = code[w.sequence[w.at]]
        ready, why = w.ready, "issue"
        wait, board = i.wait, 0
        while wait:
            if wait & 1 and w.boards[board] > ready:
                ready, why = w.boards[board], "scoreboard"
            wait >>= 1
            board += 1
        if i.kind == "products":
            pending = [t for t in w.products if t > ready]
            if len(w.products) > i.argument and pending:
                until = sorted(w.products)[len(w.products) - 1 - i.argument]
                if until > ready:
                    ready, why = until, "products"
        elif i.kind == "copied" and len(w.copies) > i.argument:
            until = max(w.copies[: len(w.copies) - i.argument])
            if until > ready:
                ready, why = until, "copies"
        w.ready, w.why = ready, why

    def release(key: tuple[int, int]) -> None:
        for w in waiting.pop(key):
            w.blocked = False
            w.ready = max(w.ready, now + _BARRIER_LATENCY)
            prepare_or_end(w)
        arrived[key] = 0

    active: list[_Warp] = []

    def prepare_or_end(w: _Warp) -> None:
        if w.at < len(w.sequence):
            prepare(w)
            active.append(w)

    for w in all_warps:
        prepare_or_end(w)
    marked = marks or [set() for _ in warps]
    asked = {id(w): m for w, m in zip(all_warps, marked, strict=True)}
    while active:
        best, chosen, reason, oldest = 1e30, None, "", 1e30
        for w in active:
            ready, why = (w.ready, w.why) if w.ready > now else (now, "issue")
            for pipe, _ in code[w.sequence[w.at]].pipes:
                until = free[pipe] - _SLACK[pipe]
                if until > ready:
                    ready, why = until, PIPES[pipe]
            # Of those that could issue at once, the one that has waited longest.
            if ready < best or (ready == best and w.ready < oldest):
                best, chosen, reason, oldest = ready, w, why, w.ready
        w, i = chosen, code[chosen.sequence[chosen.at]]
        if best > now:
            waits[reason] = waits.get(reason, 0.0) + best - now
            now = best
        begin, arrival = now, 0.0
        for pipe, cycles in i.pipes:
            start = free[pipe] if free[pipe] > now else now
            free[pipe] = start + cycles
            busy[pipe] += cycles
            if pipe == _PORT:
                arrival = start + cycles
            elif start > begin:
                begin = start
        issued += 1
        done = max(begin, arrival) + i.latency
        if i.kind == "product":
            w.open = done
            if i.closes:
                w.products.append(done)
        elif i.kind == "products":
            w.products = [t for t in w.products if t > now]
        elif i.kind == "copy":
            w.last_copy = max(w.last_copy, done)
        elif i.kind == "copies":
            w.copies.append(w.last_copy)
        elif i.kind == "copied":
            w.copies = w.copies[max(0, len(w.copies) - i.argument) :] if i.argument else []
        if i.write != 7:
            w.boards[i.write] = max(w.boards[i.write], done)
        if i.read != 7:
            w.boards[i.read] = max(
                w.boards[i.read], begin + (12 if i.pipes and i.pipes[0][0] == _SHARED else 8)
            )
        w.ready = now + max(1, i.stall)
        if w.at in asked[id(w)]:
            w.times[w.at] = now
        w.at += 1
        now += 1
        if i.kind in ("barrier", "arrive"):
            key = (w.program, i.argument & 255)
            needed = i.argument >> 8 or members[w.program]
            arrived[key] += 1
            if i.kind == "barrier":
                w.blocked = True
                active.remove(w)
                waiting.setdefault(key, []).append(w)
            if arrived[key] >= needed:
                waiting.setdefault(key, [])
                release(key)
            if i.kind == "barrier":
                if not active and any(waiting.values()):
                    raise RuntimeError("every warp waits at a barrier")
                continue
        if w.at < len(w.sequence):
            prepare(w)
        else:
            active.remove(w)
            members[w.program] -= 1
            for key in [k for k in waiting if k[0] == w.program]:
                if 0 < members[w.program] <= arrived[key]:
                    release(key)
            if not active and any(waiting.values()):
                raise RuntimeError("every warp waits at a barrier")
    return Run(now, [w.times for w in all_warps], (float(issued), *busy[1:]), issued, waits)
