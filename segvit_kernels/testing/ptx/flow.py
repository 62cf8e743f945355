"""A kernel's basic blocks, and what is known of its registers before it runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from segvit_kernels.testing.ptx.faults import PTXError
from segvit_kernels.testing.ptx.parser import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Register,
    Symbol,
    Vector,
)

# Without a destination: every operand is read.
_READ_ONLY = {
    "st", "red", "bar", "barrier", "bra", "ret", "exit", "membar", "fence", "cp", "stmatrix", "prefetch",
    "prefetchu", "griddepcontrol", "nanosleep", "trap", "discard", "applypriority", "brkpt", "pmevent",
    "setmaxnreg", "stackrestore",
}  # fmt: skip
_READ_ONLY_FORMS = {
    ("mbarrier", "init"), ("mbarrier", "inval"), ("mbarrier", "expect_tx"), ("wgmma", "fence"),
    ("wgmma", "commit_group"), ("wgmma", "wait_group"),
}  # fmt: skip
# Where threads may wait for others, or leave: a block ends.
_ENDS = {"bra", "ret", "exit", "bar", "barrier", "trap"}
_WAITS = {"try_wait", "test_wait"}


def registers_in(operand: Any) -> Iterator[str]:
    """Names of the registers of an operand."""
    if isinstance(operand, Register):
        yield operand.name
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from registers_in(item)
    elif isinstance(operand, Address):
        bases = operand.base if isinstance(operand.base, tuple) else (operand.base,)
        for base in bases:
            yield from registers_in(base)


def _once(function: Callable[[Instruction], list[str]]) -> Callable[[Instruction], list[str]]:
    """Kept with the instruction: every analysis asks again."""
    name = f"_{function.__name__}"

    @functools.wraps(function)
    def found(instruction: Instruction) -> list[str]:
        kept = instruction.__dict__
        if name not in kept:
            kept[name] = function(instruction)
        return kept[name]

    return found


@_once
def writes(instruction: Instruction) -> list[str]:
    """Registers that it writes."""
    form = (instruction.name, instruction.modifiers[0] if instruction.modifiers else "")
    if instruction.name in _READ_ONLY or form in _READ_ONLY_FORMS or not instruction.operands:
        return []
    if isinstance(instruction.operands[0], Address):
        return []  # mbarrier.arrive on another block's barrier
    return list(registers_in(instruction.operands[0]))


_SINKS = {
    "st",
    "red",
    "atom",
    "cp",
    "mma",
    "wgmma",
    "bar",
    "barrier",
    "bra",
    "ld",
    "ldmatrix",
    "vote",
    "redux",
}
_SINKS |= {"stmatrix", "mbarrier", "ret", "exit"}


def needs_values(instruction: Instruction) -> bool:
    """Whether what was never written matters here; elsewhere it is passed on, as compilers do."""
    return instruction.name in _SINKS


def accumulates(instruction: Instruction) -> bool:
    """Whether its first operand is read too."""
    return instruction.name == "wgmma" and instruction.modifiers[0] == "mma_async"


def picks(selector: Any) -> tuple[bool, bool]:
    """Whether a permutation of bytes takes any from its first operand, and from its second.

    Compilers put a register that nothing wrote where no byte is taken from it.
    """
    if not isinstance(selector, Immediate):
        return True, True
    places = [selector.value >> 4 * byte & 7 for byte in range(4)]
    return min(places) < 4, max(places) >= 4


@_once
def reads(instruction: Instruction) -> list[str]:
    """Registers that it reads, without those whose old value a guard keeps."""
    begin = 1 if writes(instruction) and not accumulates(instruction) else 0
    if (
        instruction.operands
        and isinstance(instruction.operands[0], Symbol)
        and instruction.name not in _READ_ONLY
    ):
        begin = 1
    operands = instruction.operands[begin:]
    if instruction.name == "prmt":
        picked = (*picks(operands[2]), True)
        operands = tuple(o for o, wanted in zip(operands, picked, strict=True) if wanted)
    found = [name for operand in operands for name in registers_in(operand)]
    return found + ([instruction.predicate.name] if instruction.predicate else [])


@dataclasses.dataclass(eq=False)
class Block:
    """A basic block.

    Args:
        instructions: the last may jump, leave or wait.
        target: block that the last jumps to, ``None`` if it does not.
        falls: whether the next block may follow.
        live_in, live_out: registers as bits.
        defined: registers that are written on every way to here.
        reached: registers that are written on some way to here.
        flying: registers that a product in flight may still write.
    """

    instructions: list[Instruction]
    target: int | None = None
    falls: bool = True
    live_in: int = 0
    live_out: int = 0
    defined: int = 0
    reached: int = 0
    flying: int = 0


class Flow:
    """The blocks of a kernel in the order of its text.

    Args:
        kernel: as parsed.

    Attributes:
        blocks: of them all.
        bits: register to its bit.
        ranks: of the blocks, each below all that every way from it leads to (its post-dominators): where
            threads of the lowest rank go first, the others wait for them where they meet again.
        tracked: registers that may be read where nothing wrote them, or what was computed from them, as bits.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.blocks = self._blocks()
        found = {n for b in self.blocks for i in b.instructions for n in (*reads(i), *writes(i))}
        self.bits = {name: 1 << i for i, name in enumerate(sorted(found & kernel.registers.keys()))}
        self.ranks = self._ranks()
        self._liveness()
        self._definitions()

    def bit(self, names: Any) -> int:
        """Registers as bits."""
        found = 0
        for name in names:
            found |= self.bits.get(name, 0)  # special registers are always there
        return found

    def names(self, bits: int) -> list[str]:
        """Of the registers in ``bits``."""
        return [name for name, bit in self.bits.items() if bits & bit]

    def _blocks(self) -> list[Block]:
        body = self.kernel.body
        targets = {i.operands[-1].name for i in body if isinstance(i, Instruction) and i.name == "bra"}
        spans: list[list[Instruction]] = [[]]
        labels: dict[str, int] = {}
        for item in body:
            if isinstance(item, str):
                if item in targets:
                    if spans[-1]:
                        spans.append([])
                    labels[item] = len(spans) - 1
                continue
            spans[-1].append(item)
            if item.name in _ENDS or (item.name == "mbarrier" and item.modifiers[0] in _WAITS):
                spans.append([])
        if not spans[-1] and len(spans) - 1 not in labels.values():
            spans.pop()
        blocks = []
        for instructions in spans:
            block = Block(instructions)
            last = instructions[-1] if instructions else None
            if last is not None and last.name == "bra":
                if last.operands[-1].name not in labels:
                    raise PTXError(f"PTX line {last.line}: no label {last.operands[-1].name}")
                block.target = labels[last.operands[-1].name]
                block.falls = last.predicate is not None
            elif last is not None and last.name in ("ret", "exit", "trap"):
                block.falls = last.predicate is not None
            blocks.append(block)
        return blocks

    def successors(self, index: int) -> list[int]:
        """Blocks that may follow."""
        block = self.blocks[index]
        found = [index + 1] if block.falls and index + 1 < len(self.blocks) else []
        return found + ([block.target] if block.target is not None else [])

    def _ranks(self) -> list[int]:
        """Positions in a reverse postorder of the reversed graph, turned round; not the text's order."""
        end = len(self.blocks)
        before: list[list[int]] = [[] for _ in range(end + 1)]
        for index, block in enumerate(self.blocks):
            last = block.instructions[-1].name if block.instructions else ""
            after = self.successors(index)
            for b in after + ([end] if not after or last in ("ret", "exit", "trap") else []):
                before[b].append(index)
        seen, finished = {end}, []
        stack = [(end, iter(before[end]))]
        while stack:
            node, rest = stack[-1]
            fresh = next((b for b in rest if b not in seen), None)
            if fresh is None:
                finished.append(node)
                stack.pop()
            else:
                seen.add(fresh)
                stack.append((fresh, iter(before[fresh])))
        ranks = [0] * (end + 1)  # blocks from which no way leads out come first
        for rank, node in enumerate(finished):
            ranks[node] = rank
        return ranks

    def _liveness(self) -> None:
        uses, kills = [], []
        for block in self.blocks:
            use = kill = 0
            for i in block.instructions:
                written, read = self.bit(writes(i)), self.bit(reads(i))
                if i.predicate:
                    read |= written  # the old value stays where the guard is false
                use |= read & ~kill
                kill |= written
            uses.append(use)
            kills.append(kill)
        changed = True
        while changed:
            changed = False
            for index in range(len(self.blocks) - 1, -1, -1):
                block = self.blocks[index]
                out = 0
                for after in self.successors(index):
                    out |= self.blocks[after].live_in
                live = uses[index] | (out & ~kills[index])
                changed |= live != block.live_in or out != block.live_out
                block.live_in, block.live_out = live, out

    def _definitions(self) -> None:
        everything = (1 << len(self.bits)) - 1
        surely, maybe, flights = [], [], []
        for block in self.blocks:
            sure = some = fly = 0
            for i in block.instructions:
                written = self.bit(writes(i))
                some |= written
                if not i.predicate:
                    sure |= written
                if accumulates(i):
                    fly |= written
            surely.append(sure)
            maybe.append(some)
            flights.append(fly)
            block.defined = everything
        before: list[list[int]] = [[] for _ in self.blocks]
        for index in range(len(self.blocks)):
            for after in self.successors(index):
                before[after].append(index)
        self.blocks[0].defined = 0
        changed = True
        while changed:
            changed = False
            for index, block in enumerate(self.blocks):
                defined = everything if before[index] and index else 0
                reached, flying = 0, 0
                for b in before[index]:
                    other = self.blocks[b]
                    defined &= other.defined | surely[b]
                    reached |= other.reached | maybe[b]
                    flying |= self._after(other, flights[b])
                if index == 0:
                    defined = 0
                new = (defined, reached, flying)
                changed |= new != (block.defined, block.reached, block.flying)
                block.defined, block.reached, block.flying = new
        self.tracked = 0
        for block in self.blocks:
            defined = block.defined
            for i in block.instructions:
                self.tracked |= self.bit(reads(i)) & ~defined
                if not i.predicate:
                    defined |= self.bit(writes(i))
        passing = [
            (self.bit(reads(i)), self.bit(writes(i)))
            for block in self.blocks
            for i in block.instructions
            if not needs_values(i)
        ]
        changed = bool(self.tracked)
        while changed:
            changed = False
            for read, written in passing:
                if read & self.tracked and written & ~self.tracked:
                    self.tracked |= written
                    changed = True

    def _after(self, block: Block, flights: int) -> int:
        """Registers that may be in flight at the end of a block."""
        if not (flights | block.flying):
            return 0
        flying = block.flying
        for i in block.instructions:
            flying = self.flying_after(i, flying)
        return flying

    def flying_after(self, instruction: Instruction, flying: int) -> int:
        """Registers that may be in flight after an instruction, from those before it."""
        if accumulates(instruction):
            return flying | self.bit(writes(instruction))
        if instruction.name == "wgmma" and instruction.modifiers[0] == "wait_group":
            return 0 if instruction.operands[0].value == 0 else flying
        return flying
