"""PTX as text to kernels: parameters, registers, shared variables and instructions with their places."""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from collections.abc import Iterator
from typing import Any

from segvit_kernels.testing.ptx.faults import PTXError

BYTES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2} | {
    f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (32, 64)
}
BYTES |= {"f16x2": 4, "bf16x2": 4, "b128": 16}
"""Bytes of a value by its PTX type."""


@dataclasses.dataclass(frozen=True)
class Register:
    """A register, or part of a special one (``%tid.x``)."""

    name: str
    negated: bool = False  # !%p1


@dataclasses.dataclass(frozen=True)
class Immediate:
    """A number: the bits of a float, or an integer."""

    value: int
    kind: str = "int"  # or f32, f64: what value holds the bits of


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A name of a variable, a label, or ``_``."""

    name: str
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Any
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class Vector:
    """``{a, b}``; also the two destinations of ``%p1|%p2``."""

    items: tuple[Any, ...]


@dataclasses.dataclass(eq=False)
class Instruction:
    """One instruction.

    Args:
        name: up to the first dot.
        modifiers: what follows, in order.
        operands: :class:`Register`, :class:`Immediate`, :class:`Symbol`, :class:`Address`, :class:`Vector`.
        predicate: its guard.
        kernel, line, text, source: where it stands.
    """

    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Any, ...]
    predicate: Register | None
    kernel: str
    line: int
    text: str
    source: str

    @property
    def opcode(self) -> str:
        """With all modifiers."""
        return ".".join((self.name, *self.modifiers))


@dataclasses.dataclass
class Kernel:
    """An entry of a module.

    Args:
        name: of the entry.
        parameters: name to (offset, bytes) in the block of parameters.
        registers: name to PTX type.
        shared: name of a shared variable to its offset.
        shared_bytes: static shared memory; dynamic shared memory begins there.
        local: name of a local variable to its offset.
        local_bytes: local memory of a thread.
        constants: name of a ``.global`` or ``.const`` variable to its bytes.
        body: instructions, and labels as strings.
        required_threads: ``.reqntid``, 0 if there is none.
        most_threads: of a block, by ``.maxntid`` or of any.
        target: 90 for ``.target sm_90a``.
    """

    name: str
    parameters: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    registers: dict[str, str] = dataclasses.field(default_factory=dict)
    shared: dict[str, int] = dataclasses.field(default_factory=dict)
    shared_bytes: int = 0
    local: dict[str, int] = dataclasses.field(default_factory=dict)
    local_bytes: int = 0
    constants: dict[str, bytes] = dataclasses.field(default_factory=dict)
    body: list[Instruction | str] = dataclasses.field(default_factory=list)
    required_threads: int = 0
    most_threads: int = 1024
    target: int = 0
    text: str = ""

    @property
    def instructions(self) -> list[Instruction]:
        """Without the labels."""
        return [item for item in self.body if isinstance(item, Instruction)]


_VARIABLE = re.compile(
    r"(?:\.(?:extern|visible|weak|common)\s+)*\.(shared|global|const|local)\s+"
    r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$%.]+)((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.DOTALL,
)
_PARAMETER = re.compile(r"\.param\s+(.*?)([\w$]+)(?:\[(\d+)\])?$", re.DOTALL)
_TARGET = re.compile(r"^\.target\s+sm_(\d+)", re.MULTILINE)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_THREADS = re.compile(r"\.(reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.DOTALL)
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s*,.*)?$', re.MULTILINE)
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")


def _split(text: str) -> list[str]:
    """At commas outside brackets and braces."""
    if not text.strip():
        return []
    parts, depth, begin = [], 0, 0
    for i, character in enumerate(text):
        if character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[begin:i].strip())
            begin = i + 1
    parts.append(text[begin:].strip())
    return parts


def integer(text: str) -> int:
    """A literal as PTX writes it."""
    text = text.rstrip("U")
    negative, digits = text.startswith("-"), text.lstrip("-")
    value = (
        int(digits, 0) if digits[:2] in ("0x", "0X", "0b", "0B") else int(digits, 8 if _octal(digits) else 10)
    )
    return -value if negative else value


def _octal(digits: str) -> bool:
    return len(digits) > 1 and digits[0] == "0"


class _Parser:
    def __init__(self, text: str, wanted: str) -> None:
        self.text, self.wanted = text, wanted
        self.lines = text.splitlines()
        self.files = {int(number): name.rsplit("/", 1)[-1] for number, name in _FILE.findall(text)}
        self.kernels: dict[str, Kernel] = {}
        self.shared: list[tuple[str, int, int]] = []  # module scope: name, bytes, alignment
        self.constants: dict[str, bytes] = {}
        self.scopes: list[dict[str, str]] = []
        self.scope_number = 0

    def operand(self, text: str) -> Any:
        first = text[0]
        if first == "%":
            if "|" in text:
                return Vector(tuple(self.operand(part.strip()) for part in text.split("|")))
            return Register(next((scope[text] for scope in reversed(self.scopes) if text in scope), text))
        if first == "{":
            return Vector(tuple(self.operand(part) for part in _split(text[1:-1])))
        if first == "[":
            return self.address(text[1:-1])
        if first == "!":
            return Register(self.operand(text[1:]).name, negated=True)
        if _INTEGER.match(text):
            return Immediate(integer(text))
        if first == "0" and text[1] in "fF":
            return Immediate(int(text[2:], 16), "f32")
        if first == "0" and text[1] in "dD":
            return Immediate(int(text[2:], 16), "f64")
        if "|" in text:
            return Vector(tuple(self.operand(part.strip()) for part in text.split("|")))
        if re.fullmatch(r"-?\d+\.\d*(e[-+]?\d+)?", text):
            return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], "f64")
        for scope in reversed(self.scopes):
            if text in scope:
                return Register(scope[text])
        if match := re.fullmatch(r"([\w$]+)\s*\+\s*(\d+)", text):
            return Symbol(match[1], int(match[2]))
        return Symbol(text)

    def address(self, text: str) -> Address:
        parts = _split(text)
        if len(parts) > 1:  # a tensor map and its coordinates
            return Address(tuple(self.operand(part) for part in parts))
        match = re.fullmatch(r"(.*?)\s*(?:([+-])\s*(-?(?:0[xX])?[0-9a-fA-F]+))?\s*", text.strip(), re.DOTALL)
        offset = integer(match[3]) if match[3] else 0
        return Address(self.operand(match[1].strip()), -offset if match[2] == "-" else offset)

    def module(self) -> dict[str, Kernel]:
        kernel: Kernel | None = None
        depth, source, statement, begin = 0, "", "", 0
        header = False
        lines = enumerate(self.lines, 1)
        for number, raw in lines:
            line = raw.split("//", 1)[0].strip() if "//" in raw else raw.strip()
            if not line:
                continue
            if kernel is None and line.startswith(".section"):
                break  # debugging information
            if match := _LOCATION.match(line):
                if match[2] != "0":  # else code of no line of its own
                    source = f"{self.files.get(int(match[1]), '?')}:{match[2]}"
                continue
            if kernel is None and not header:
                if match := _ENTRY.search(line):
                    if match[1] != self.wanted:
                        self.skip(lines, line)
                        continue
                    header, statement, begin = True, "", number
                elif ".func" in line:
                    raise PTXError(f"PTX line {number}: functions are not taken: {line}")
                elif re.match(r"\.(version|target|address_size|file)", line):
                    continue
                else:
                    statement += " " + line
                    if ";" in line:
                        self.variable(statement.strip().rstrip(";"), None)
                        statement = ""
                    continue
            if header:
                statement += " " + line
                if "{" in line:
                    kernel = self.entry(statement.split("{", 1)[0])
                    header, depth, statement = False, 1, ""
                    self.scopes = [{}]
                    rest = line.split("{", 1)[1].strip()
                    if not rest:
                        continue
                    line = rest
                else:
                    continue
            # Statements of a body: ';' ends one, braces that stand alone are scopes, 'name:' is a label.
            while line:
                if not statement:
                    begin = number
                    if line[0] == "{":
                        depth += 1
                        self.scopes.append({})
                        line = line[1:].strip()
                        continue
                    if line[0] == "}":
                        depth -= 1
                        self.scopes.pop()
                        line = line[1:].strip()
                        if depth == 0:
                            self.finish(kernel)
                            kernel, source, line = None, "", ""
                        continue
                    if match := re.match(r"([\w$%]+):(?!:)\s*", line):
                        kernel.body.append(match[1])
                        line = line[match.end() :]
                        continue
                if ";" not in line:
                    statement += " " + line
                    break
                end = line.index(";")
                statement, line = statement + " " + line[:end], line[end + 1 :].strip()
                self.statement(kernel, statement.strip(), begin, source)
                statement = ""
            if statement and kernel is not None and statement.lstrip().startswith((".pragma", ".file")):
                statement = ""
        return self.kernels

    @staticmethod
    def skip(lines: Iterator[tuple[int, str]], line: str) -> None:
        """To the end of an entry's body."""
        depth, inside = 0, False
        while not inside or depth:
            depth += line.count("{") - line.count("}")
            inside |= "{" in line
            if not inside or depth:
                line = next(lines)[1]

    def entry(self, head: str) -> Kernel:
        match = re.search(r"\.entry\s+([\w$]+)\s*(?:\((.*)\))?(.*)$", head, re.DOTALL)
        kernel, offset = Kernel(match[1], text=self.text), 0
        if found := _TARGET.search(self.text):
            kernel.target = int(found[1])
        for text in _split(match[2] or ""):
            found = _PARAMETER.match(text)
            words = re.findall(r"\.(\w+)(?:\s+(\d+))?", found[1])
            kind = next(word for word, _ in words if word in BYTES)
            size = BYTES[kind] * int(found[3] or 1)
            # The alignment of .ptr is that of what it points to.
            before_ptr = found[1].split(".ptr")[0]
            aligned = re.search(r"\.align\s+(\d+)", before_ptr)
            align = int(aligned[1]) if aligned else BYTES[kind]
            offset = -(-offset // align) * align
            kernel.parameters[found[2]] = (offset, size)
            offset += size
        for directive, *sizes in _THREADS.findall(match[3] or ""):
            threads = math.prod(int(size) for size in sizes if size)
            kernel.most_threads = min(kernel.most_threads, threads)
            if directive == "reqntid":
                kernel.required_threads = threads
        self.kernels[kernel.name] = kernel
        return kernel

    def variable(self, text: str, kernel: Kernel | None) -> None:
        match = _VARIABLE.match(text)
        if not match:
            raise PTXError(f"not understood: {text[:100]}")
        space, align, kind, name, dimensions, value = match.groups()
        size = BYTES[kind]
        sizes = re.findall(r"\[(\d*)\]", dimensions)
        total = size
        for n in sizes:
            total *= int(n or 0)
        align = int(align or size)
        if space == "shared":
            if kernel is None:
                self.shared.append((name, total, align))
            else:
                self._place_shared(kernel, name, total, align)
        elif space == "local":
            kernel.local_bytes = -(-kernel.local_bytes // align) * align
            kernel.local[name] = kernel.local_bytes
            kernel.local_bytes += total
        else:
            numbers = [integer(n) for n in re.findall(r"-?(?:0[xX][0-9a-fA-F]+|\d+)", value or "")]
            data = b"".join((n % 2 ** (8 * size)).to_bytes(size, "little") for n in numbers)
            self.constants[name] = data.ljust(total, b"\0")

    @staticmethod
    def _place_shared(kernel: Kernel, name: str, total: int, align: int) -> None:
        kernel.shared_bytes = -(-kernel.shared_bytes // align) * align
        kernel.shared[name] = kernel.shared_bytes
        kernel.shared_bytes += total

    def finish(self, kernel: Kernel) -> None:
        kernel.constants = self.constants
        for name, total, align in sorted(self.shared, key=lambda item: item[1] == 0):
            self._place_shared(kernel, name, total, align)

    def statement(self, kernel: Kernel, text: str, line: int, source: str) -> None:
        if text[0] == ".":
            if match := _REGISTERS.match(text):
                self.declare(kernel, match[1], match[2])
            elif not text.startswith((".pragma", ".file", ".branchtargets")):
                self.variable(text, kernel)
            return
        shown, predicate = " ".join(text.split()), None
        if text[0] == "@":
            guard, text = text.split(None, 1)
            guard = guard[1:]
            negated = guard.startswith("!")
            predicate = Register(self.operand(guard.lstrip("!")).name, negated)
        match = re.match(r"[\w.:]+", text)
        name, *modifiers = match[0].split(".")
        operands = [self.operand(part) for part in _split(text[match.end() :])]
        kernel.body.append(
            Instruction(name, tuple(modifiers), tuple(operands), predicate, kernel.name, line, shown, source)
        )

    def declare(self, kernel: Kernel, kind: str, names: str) -> None:
        for name in _split(names):
            if match := re.fullmatch(r"(%?[\w$]+)<(\d+)>", name):
                kernel.registers |= {f"{match[1]}{i}": kind for i in range(int(match[2]))}
            elif len(self.scopes) > 1 or not name.startswith("%"):
                self.scope_number += 1
                own = f"%{name.lstrip('%')}@{self.scope_number}"
                self.scopes[-1][name] = own
                kernel.registers[own] = kind
            else:
                kernel.registers[name] = kind


def parse(text: str, kernel: str) -> Kernel:
    """One kernel of a module, by its name.

    Raises:
        PTXError: it is not there, is not PTX, or has what is not taken: functions.
    """
    found = _Parser(text, kernel).module().get(kernel)
    if found is None:
        raise PTXError(f"no kernel {kernel}")
    return found
