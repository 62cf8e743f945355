"""What is known of some rows in front of an instruction, and how its operands are read from that.

A value is ``None`` (unknown), a Python int (alike everywhere) or an array, rows by lanes, of 32-bit patterns.
Of a register that compilers keep predicates in, some bits may be known and others not: :class:`Bits`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Value = Any
"""``None``, an int or an array."""

_M = 0xFFFFFFFF
_REGISTER = re.compile(r"^([-~!|]*)(U?R(?:\d+|Z)|U?P(?:\d+|T))\b")
_CONSTANT = re.compile(r"^([-~|]*)c\[0x0\]\[(?:(U?R\w+)\+?)?(0x[0-9a-f]+)?\]")
_NUMBER = re.compile(r"^-?0x[0-9a-f]+$")
_ADDRESS = re.compile(r"\[([^\[\]]*)\]$")


class Bits(NamedTuple):
    """A pattern of which the bits in ``known`` are."""

    value: Value
    known: Value

    @classmethod
    def of(cls, value: Value) -> Bits:
        return value if isinstance(value, Bits) else cls(0, 0) if value is None else cls(value, _M)

    def settled(self) -> Value:
        """As a plain value, if all bits or none are known."""
        return self.value if np.all(self.known == _M) else self if np.any(self.known) else None


def _either(a: Value, b: Value) -> Value:
    """What two values have in common."""
    a, b = Bits.of(a), Bits.of(b)
    return Bits(a.value, a.known & b.known & ~(a.value ^ b.value) & _M).settled()


@dataclasses.dataclass(frozen=True)
class Memory:
    """What is known of memory: arrays of bytes by the addresses where they begin."""

    regions: tuple[tuple[int, np.ndarray], ...] = ()

    def read(self, address: Value, size: int, signed: bool) -> Value:
        """``size`` bytes at each address as a number, or ``None``."""
        if address is None:
            return None
        where = np.asarray(address)
        for begin, data in self.regions:
            offset = where - begin
            if offset.min() < 0 or offset.max() + size > len(data):
                continue
            found = sum(data[offset + i].astype(np.int64) << (8 * i) for i in range(size))
            if signed and size < 4:
                found = (found ^ (1 << (8 * size - 1))) - (1 << (8 * size - 1)) & _M
            return int(found) if found.ndim == 0 else found
        return None


@dataclasses.dataclass
class State:
    """Some rows in front of an instruction: registers and predicates by name, and the blocks behind them."""

    rows: np.ndarray
    values: dict[str, Value]
    local: dict[int, Value]
    path: list[int]
    constants: bytes = b""
    memory: Memory = Memory()
    unknown: set[int] = dataclasses.field(default_factory=set)
    accessed: Callable[[int, State, Value, Value], None] | None = None

    def get(self, name: str) -> Value:
        if name.endswith("Z"):
            return 0
        if name.endswith("T"):
            return True
        found = self.values.get(name)
        return None if isinstance(found, Bits) else found

    def put(self, name: str, value: Value, guard: Value) -> None:
        if name[-1] in "ZT" or guard is False:
            return
        if guard is not True:
            old = self.values.get(name)
            if name.lstrip("U")[0] == "R" and (guard is None or isinstance(old, Bits)):
                value = _either(old, value)
            else:
                value = None if old is None or value is None or guard is None else _where(guard, value, old)
        self.values[name] = value

    def part(self, mask: np.ndarray) -> State:
        """The rows where ``mask`` is true."""

        def cut(value: Value) -> Value:
            if isinstance(value, Bits):
                return Bits(cut(value.value), cut(value.known))
            return value[mask] if isinstance(value, np.ndarray) and len(value) == len(mask) else value

        values = {name: cut(v) for name, v in self.values.items()}
        local = {name: cut(v) for name, v in self.local.items()}
        return dataclasses.replace(
            self, rows=self.rows[mask], values=values, local=local, path=self.path.copy()
        )


def _where(guard: Value, a: Value, b: Value) -> Value:
    if guard is True or guard is False:
        return a if guard else b
    return np.where(guard, a, b)


def _s32(x: Value) -> Value:
    return ((x & _M) ^ 0x80000000) - 0x80000000


def _s64(x: Value) -> Value:
    """A signed 64-bit number; arrays are that already."""
    return ((x + 2**63) % 2**64) - 2**63 if isinstance(x, int) else x


def _float(x: Value) -> np.ndarray:
    return np.asarray(x).astype(np.uint32).view(np.float32)


def _bits(x: Any) -> Value:
    found = np.asarray(x, dtype=np.float32).view(np.uint32).astype(np.int64)
    return int(found) if found.ndim == 0 else found


def _truth(value: Value) -> Value:
    """Python's bool for a scalar, so that ``is True`` holds."""
    return bool(value) if isinstance(value, (bool, np.bool_)) or np.ndim(value) == 0 else value


def _not(value: Value) -> Value:
    return None if value is None else _truth(np.logical_not(value))


def _and(a: Value, b: Value) -> Value:
    if a is False or b is False:
        return False
    return None if a is None or b is None else _truth(np.logical_and(a, b))


def _or(a: Value, b: Value) -> Value:
    if a is True or b is True:
        return True
    return None if a is None or b is None else _truth(np.logical_or(a, b))


def _is_predicate(operand: str) -> bool:
    return bool(re.match(r"^!?U?P(\d+|T)$", operand))


def predicate(operand: str) -> Callable[[State], Value]:
    """What reads a predicate."""
    name = operand.lstrip("!")
    if operand[0] == "!":
        return (lambda s: False) if name.endswith("T") else lambda s: _not(s.get(name))
    return lambda s: s.get(name)


def _next(name: str, step: int = 1) -> str:
    """The register ``step`` behind."""
    if name.endswith("Z"):
        return name
    kind = "UR" if name.startswith("U") else "R"
    return f"{kind}{int(name.removeprefix(kind)) + step}"


def _source(operand: str, wide: bool = False) -> Callable[[State], Value]:
    """What reads an operand as a 32-bit pattern, or a signed 64-bit number if ``wide``."""
    if _NUMBER.match(operand):
        number = int(operand, 16)
        return lambda s: number if wide else number & _M
    if match := _CONSTANT.match(operand):
        signs, index, offset = match[1], match[2], int(match[3] or "0", 16)

        def read(s: State) -> Value:
            at = offset + (s.get(index) or 0 if index else 0)
            if not isinstance(at, int) or at + 4 > len(s.constants):
                return None
            return int.from_bytes(s.constants[at : at + (8 if wide else 4)], "little", signed=wide)
    elif match := _REGISTER.match(operand):
        signs, name = match[1], match[2]
        if operand.endswith((".H0_H0", ".H1_H1", ".H1", ".H0", ".B0", ".B1", ".B2", ".B3")):
            return lambda s: None

        def read(s: State) -> Value:
            low = s.get(name)
            if not wide or name.endswith("Z"):
                return low
            high = s.get(_next(name))
            return None if low is None or high is None else _s64(low | high << 32)
    else:
        return lambda s: None
    if "|" in signs:
        return lambda s: None
    if "-" in signs:
        return lambda s: None if (x := read(s)) is None else -x if wide else -x & _M
    if "~" in signs:
        return lambda s: None if (x := read(s)) is None else ~x if wide else ~x & _M
    return read


def _bits_source(operand: str) -> Callable[[State], Bits]:
    """What reads an operand as far as its bits are known."""
    read, match = _source(operand), _REGISTER.match(operand)
    plain = match and not match[1] and "." not in operand.removesuffix(".reuse")

    def bits(s: State) -> Bits:
        found = s.values.get(match[2]) if plain else None
        return found if isinstance(found, Bits) else Bits.of(read(s))

    return bits


def _float_source(operand: str) -> Callable[[State], Any]:
    """What reads an operand as single-precision numbers."""
    try:
        number = np.float32(float(operand.replace("QNAN", "nan").replace("INF", "inf")))
        return lambda s: number
    except ValueError:
        pass
    bare = operand.strip("-|~")
    bare = bare.rstrip("|")
    read = _source(bare)

    def numbers(s: State) -> Any:
        bits = read(s)
        if bits is None:
            return None
        x = _float(bits)
        x = np.abs(x) if "|" in operand else x
        return -x if operand.startswith("-") else x

    return numbers


def address(operand: str) -> Callable[[State], Value]:
    """What reads the address in brackets: registers (``R2.64`` for two) and numbers, added up."""
    inside = _ADDRESS.search(operand)
    terms = []
    for term in re.split(r"\+(?!-)|(?<=[\w\]])\+", inside[1]) if inside else ():
        for sign, part in re.findall(r"(-?)([\w.]+)", term):
            if part.startswith("0x"):
                number = int(part, 16) * (-1 if sign else 1)
                terms.append(lambda s, number=number: number)
            else:
                scale = int(m[1]) if (m := re.search(r"\.X(\d+)", part)) else 1
                wide = ".64" in part
                read = _source(part.split(".")[0], wide)
                terms.append(lambda s, read=read, scale=scale: None if (x := read(s)) is None else x * scale)

    def add(s: State) -> Value:
        total = 0
        for read in terms:
            value = read(s)
            if value is None:
                return None
            total = total + value
        return total

    return add if terms else lambda s: None
