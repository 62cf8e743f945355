"""Machine code as text: its instructions, its loops and how often an instruction stands in them.

Reads what ``cuobjdump -sass`` prints of one NVIDIA kernel, and AMD's assembly as Triton keeps it.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

MNEMONICS = (
    "HGMMA",
    "HMMA",
    "FFMA",
    "MUFU",
    "LDG",
    "LDGSTS",
    "STG",
    "LDS",
    "LDSM",
    "STS",
    "RED",
    "LDL",
    "STL",
)
"""Instructions that are counted: tensor cores, multiply-add, special functions, memory, atomics, spills."""

_SASS = re.compile(
    r"^[ \t]+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*)([\w.]*)([^;]*);"
    r"(?:[ \t]*/\* 0x([0-9a-f]{16}) \*/(?:\s*/\* 0x([0-9a-f]{16}) \*/)?)?",
    re.MULTILINE,
)
_GCN = re.compile(r"^(?:(\.\w+):|[ \t]+([a-z]\w+)([^;\n]*))", re.MULTILINE)
_COUNTED = re.compile(rf"\b(?:{'|'.join(MNEMONICS)})\b")
_TENSOR = re.compile(r"HGMMA|HMMA|IMMA|QMMA|OMMA|UTC\w*MMA|v_mfma\w*|v_wmma\w*")
_BARRIER = re.compile(r"BAR|s_barrier\w*")
_STAGED = re.compile(r"STS|ds_write\w*|ds_store\w*")  # LDGSTS, a copy past the registers, is none
_SPILL = re.compile(r"LDL|STL|scratch_\w+")


def instruction_mix(sass: str) -> dict[str, int]:
    """How often each of :data:`MNEMONICS` stands in the machine code of one kernel; in it, not executed."""
    counts = Counter(_COUNTED.findall(sass))
    return {name: counts[name] for name in MNEMONICS}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of an NVIDIA GPU and what its control code asks of the warp that issues it.

    Args:
        address: in bytes from the kernel's begin.
        guard: the predicate in front, perhaps with ``!``, or "".
        name: without modifiers (``IMAD``).
        modifiers: with their dots (``.WIDE.U32``), or "".
        operands: as printed, without ``.reuse``.
        stall: cycles until the warp may issue its next instruction.
        write: the scoreboard (0 to 5) that is free again when results are there, 7 for none.
        read: the one that is free again when operands have been read, 7 for none.
        wait: a bit for each scoreboard that must be free before this instruction.
    """

    address: int
    name: str
    guard: str = ""
    modifiers: str = ""
    operands: tuple[str, ...] = ()
    stall: int = 1
    write: int = 7
    read: int = 7
    wait: int = 0

    @property
    def target(self) -> int | None:
        """Where a branch or call goes, if that stands in it."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands[-1]) if self.operands else None
        return int(found[1], 16) if found else None

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.name}{self.modifiers} {', '.join(self.operands)}".rstrip()


def instructions(text: str) -> list[Instruction]:
    """The instructions of one kernel as ``cuobjdump -sass`` prints it; of code printed without its encoding,
    with no control codes."""
    found = []
    for address, guard, name, modifiers, rest, _, high in _SASS.findall(text):
        operands = tuple(part.strip() for part in rest.replace(".reuse", "").split(",") if part.strip())
        code = int(high, 16) >> 41 if high else 0b111_111_0_0001  # stall, yield, write, read, wait
        control = (code & 15, code >> 5 & 7, code >> 8 & 7, code >> 11 & 63)
        found.append(Instruction(int(address, 16), name, guard, modifiers, operands, *control))
    return found


def _natural_loops(successors: Sequence[Collection[int]]) -> list[frozenset[int]]:
    """The nodes of every loop of a flow graph that begins at node 0; loops with one head are one."""
    reachable, stack = {0}, [0]
    while stack:
        stack += (fresh := set(successors[stack.pop()]) - reachable)
        reachable |= fresh
    before: dict[int, set[int]] = {node: set() for node in reachable}
    for node in reachable:
        for after in successors[node]:
            before[after].add(node)
    dominators = {node: set(reachable) for node in reachable} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for node in sorted(reachable - {0}):
            found = set.intersection(*(dominators[b] for b in before[node])) | {node}
            changed |= found != dominators[node]
            dominators[node] = found
    loops: dict[int, set[int]] = {}
    for node in reachable:
        for head in dominators[node] & set(successors[node]):
            body, stack = loops.setdefault(head, {head}), [node]
            while stack:
                if (inner := stack.pop()) not in body:
                    body.add(inner)
                    stack += before[inner]
    return [frozenset(body) for _, body in sorted(loops.items())]


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel's instructions in order, without their operands, and the places of those in every loop."""

    instructions: Sequence[str]
    loops: Sequence[frozenset[int]]

    @classmethod
    def _of(cls, names: Sequence[str], jumps: dict[int, tuple[int | None, bool]]) -> Code:
        """``jumps`` by place: where to, ``None`` for out of the kernel, and whether always."""
        heads = {0} | {to for to, _ in jumps.values() if to is not None} | {place + 1 for place in jumps}
        begins = sorted(head for head in heads if head < len(names))
        block = {begin: i for i, begin in enumerate(begins)}
        spans = list(zip(begins, [*begins[1:], len(names)], strict=True))
        successors = []
        for _, end in spans:
            to, always = jumps.get(end - 1, (None, False))
            following = [] if always or end not in block else [block[end]]
            successors.append(set(following + ([] if to is None else [block[to]])))
        loops = _natural_loops(successors) if names else []
        return cls(names, [frozenset(i for b in loop for i in range(*spans[b])) for loop in loops])

    @classmethod
    def sass(cls, text: str) -> Code:
        """From one kernel of ``cuobjdump -sass``."""
        found = instructions(text)
        place = {instruction.address: i for i, instruction in enumerate(found)}
        jumps: dict[int, tuple[int | None, bool]] = {}
        for i, instruction in enumerate(found):
            if instruction.name in ("EXIT", "RET"):
                jumps[i] = None, not instruction.guard
            elif instruction.name in ("BRA", "CALL") and instruction.target is not None:
                # A call may be a jump that never comes back (CALL.REL.NOINC).
                always = instruction.name == "BRA" and not instruction.guard
                always = always and not any("P" in operand for operand in instruction.operands)
                jumps[i] = place.get(instruction.target), always
        return cls._of([instruction.name for instruction in found], jumps)

    @classmethod
    def gcn(cls, text: str) -> Code:
        """From one kernel of AMD's assembly."""
        names: list[str] = []
        place: dict[str, int] = {}
        branches = {}
        for label, name, rest in _GCN.findall(text):
            if label:
                place[label] = len(names)
                continue
            if "branch" in name or name == "s_endpgm":
                branches[len(names)] = rest.strip(), "cbranch" not in name
            names.append(name)
        return cls._of(names, {i: (place.get(to), always) for i, (to, always) in branches.items()})

    @property
    def innermost(self) -> list[frozenset[int]]:
        """Loops without a loop in them."""
        return [loop for loop in self.loops if not any(other < loop for other in self.loops)]

    def _count(self, name: re.Pattern, loops: Sequence[Collection[int]] | None = None) -> int:
        """In all, or the most of any of ``loops``."""
        spans = [range(len(self.instructions))] if loops is None else loops
        return max(
            (sum(bool(name.fullmatch(self.instructions[i])) for i in span) for span in spans), default=0
        )

    def counts(self) -> dict[str, int]:
        """What the compile gate looks at.

        ``tensor``: tensor-core instructions; ``loops``; of the innermost loop that has the most of them,
        ``loop_barriers`` and ``loop_staged``, writes from registers to shared memory; ``loop_spills`` of
        the loop that has the most.
        """
        return {
            "tensor": self._count(_TENSOR),
            "loops": len(self.loops),
            "loop_barriers": self._count(_BARRIER, self.innermost),
            "loop_staged": self._count(_STAGED, self.innermost),
            "loop_spills": self._count(_SPILL, self.loops),
        }


def cuobjdump(*arguments: str | Path, folder: Path | None = None) -> str:
    """What the cuobjdump that comes with Triton prints, run in ``folder``.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    import triton

    command = [Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def disassembled(cubin: bytes, code: bool = True) -> str:
    """The resources (``REG:``, ``STACK:`` ...) of a compiled kernel and, with ``code``, its instructions.

    These take half a second, however few they are.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return cuobjdump("-res-usage", *["-sass"] * code, file.name)


def serialised(sass: str, ptx: str) -> bool:
    """Whether ptxas waits after every single wgmma (its remark C7515), where PTX commits several at once."""
    found = re.findall(r"\bHGMMA\b[^;]*;", sass)
    several = ptx.count("wgmma.mma_async") > ptx.count("wgmma.commit_group")
    return bool(found) and several and all("gsb0" in instruction for instruction in found)
