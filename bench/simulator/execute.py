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
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from segvit_kernels.testing.machine_code import Instruction

Value = Any
"""``None``, an int or an array."""

PARAMETERS = {"sm_80": 0x160, "sm_90": 0x210}
"""Where the parameters of a kernel begin in constant bank 0."""


def bank(arch: str, threads: int, programs: int, parameters: bytes) -> bytes:
    """Constant bank 0: size of a program and of the grid, one-dimensional both, and the parameters."""
    sizes = b"".join(n.to_bytes(4, "little") for n in (threads, 1, 1, programs, 1, 1))
    return sizes.ljust(PARAMETERS[arch], b"\0") + parameters


MOST_BLOCKS = 2_000_000
_M = 0xFFFFFFFF
_COMPARE = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_REGISTER = re.compile(r"^([-~!|]*)(U?R(?:\d+|Z)|U?P(?:\d+|T))\b")
_CONSTANT = re.compile(r"^([-~|]*)c\[0x0\]\[(?:(U?R\w+)\+?)?(0x[0-9a-f]+)?\]")
_NUMBER = re.compile(r"^-?0x[0-9a-f]+$")
_ADDRESS = re.compile(r"\[([^\[\]]*)\]$")


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
        return self.values.get(name)

    def put(self, name: str, value: Value, guard: Value) -> None:
        if name[-1] in "ZT" or guard is False:
            return
        if guard is not True:
            old = self.values.get(name)
            value = None if old is None or value is None or guard is None else _where(guard, value, old)
        self.values[name] = value

    def part(self, mask: np.ndarray) -> State:
        """The rows where ``mask`` is true."""

        def cut(value: Value) -> Value:
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


def _all(value: Value) -> bool:
    return bool(np.all(value))


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


# ---------------------------------------------------------------------------------------------- operands


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


# ---------------------------------------------------------------------------------------------- operations

Step = Callable[[State], None]
_MEMORY = ("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "RED", "REDG", "ATOMG", "ATOMS", "LD", "ST")


def size_of(modifiers: str) -> int:
    """Bytes that a thread moves by an access to memory."""
    for name, size in ((".128", 16), (".64", 8), (".U8", 1), (".S8", 1), (".U16", 2), (".S16", 2)):
        if name in modifiers:
            return size
    return 4


def _written(i: Instruction) -> list[str]:
    """Registers and predicates that an instruction writes, as far as their first operands say."""
    found = []
    for operand in i.operands:
        if _is_predicate(operand) and not operand.startswith("!"):
            found.append(operand)
            continue
        match = re.match(r"^(U?R)(\d+|Z)(\.\w+)?$", operand)
        if match and match[2] != "Z":
            count = 1
            if i.name == "HGMMA":
                count = int(re.search(r"x(\d+)x", i.modifiers)[1]) // 2
            elif i.name in ("LDSM",):
                count = int(m[1]) if (m := re.search(r"88\.(\d)", i.modifiers)) else 1
            elif i.name in ("HMMA", "IMMA"):
                count = 4
            elif i.name in ("LDG", "LDS", "LDL", "LD", "LDC", "ULDC", "ATOMG"):
                count = size_of(i.modifiers) // 4 or 1
            elif ".64" in i.modifiers or ".WIDE" in i.modifiers or i.name in ("CS2R", "DADD", "DFMA", "DMUL"):
                count = 2
            found += [f"{match[1]}{int(match[2]) + k}" for k in range(count)]
        break
    return found


_NOTHING = (
    "STG", "STS", "STSM", "STL", "RED", "REDG", "LDGSTS", "LDGDEPBAR", "DEPBAR", "BAR", "WARPGROUP", "NOP",
    "BSSY", "BSYNC", "BREAK", "WARPSYNC", "MEMBAR", "FENCE", "ERRBAR", "CCTL", "YIELD", "NANOSLEEP", "BRA",
    "EXIT", "CALL",
    "RET", "UTMALDG", "UTMASTG", "UTMACMDFLUSH", "UTMAPF", "WARPSYNC", "ST", "USETMAXREG", "ACQBULK",
)  # fmt: skip


def _split(operands: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Predicates that are written behind the first operand, other operands, predicates at the end."""
    rest = list(operands)
    out, end = [], []
    while rest and _is_predicate(rest[0]):
        out.append(rest.pop(0))
    while rest and _is_predicate(rest[-1]):
        end.insert(0, rest.pop())
    return out, rest, end


def _arithmetic(i: Instruction) -> Callable[[State], dict[str, Value]] | None:
    """What gives the values that an instruction writes, or ``None`` for one that is not interpreted."""
    name, mods = i.name, i.modifiers
    uniform = name.startswith("U") and name not in ("UMOV",)
    plain = name[1:] if uniform and name not in ("UTMALDG",) else name
    ops = i.operands
    if not ops:
        return None
    dest = ops[0]

    def simple(count: int, combine: Callable[..., Value]) -> Callable[[State], dict[str, Value]]:
        reads = [_source(o) for o in ops[1 : 1 + count]]

        def run(s: State) -> dict[str, Value]:
            values = [read(s) for read in reads]
            return {dest: None if any(v is None for v in values) else combine(*values)}

        return run

    if name in ("MOV", "UMOV"):
        return simple(1, lambda a: a)
    if name == "R2UR":
        return simple(1, lambda a: a[:, :1] if isinstance(a, np.ndarray) else a)
    if plain == "IMAD":
        if ".WIDE" in mods or ".HI" in mods:
            unsigned = ".U32" in mods
            a, b, c = _source(ops[1]), _source(ops[2]), _source(ops[3], wide=True)

            def wide(s: State) -> dict[str, Value]:
                x, y, z = a(s), b(s), c(s)
                if x is None or y is None or z is None:
                    return {dest: None} | ({_next(dest): None} if ".WIDE" in mods else {})
                x, y = (x, y) if unsigned else (_s32(x), _s32(y))
                total = x * y + z
                if ".HI" in mods:
                    return {dest: total >> 32 & _M}
                return {dest: total & _M, _next(dest): total >> 32 & _M}

            return wide
        if ".X" in mods:
            a, b, c = map(_source, ops[1:4])
            carry = predicate(ops[4])

            def extended(s: State) -> dict[str, Value]:
                x, y, z, p = a(s), b(s), c(s), carry(s)
                return {dest: None if None in (_n(x), _n(y), _n(z), _n(p)) else x * y + z + p & _M}

            return extended
        return simple(3, lambda a, b, c: a * b + c & _M)
    if plain == "IADD3" and ".64" in mods:
        reads = [_source(o, wide=True) for o in ops[1:4]]

        def long(s: State) -> dict[str, Value]:
            values = [read(s) for read in reads]
            if any(v is None for v in values):
                return {dest: None, _next(dest): None}
            total = sum(values)
            return {dest: total & _M, _next(dest): total >> 32 & _M}

        return long
    if plain == "IADD3":
        out, rest, end = _split(ops[1:])
        terms = []
        for operand in rest:
            negative = operand.startswith("-") and not _NUMBER.match(operand)
            read = _source("~" + operand[1:] if negative else operand)
            terms.append((read, int(negative)))
        carries = [predicate(p) for p in end] if ".X" in mods else []

        def add(s: State) -> dict[str, Value]:
            total = 0
            for read, one in terms:
                value = read(s)
                if value is None:
                    return {dest: None} | dict.fromkeys(out)
                total = total + value + one
            for read in carries:
                value = read(s)
                if value is None:
                    return {dest: None} | dict.fromkeys(out)
                total = total + value
            return {dest: total & _M} | {p: _truth(total >> 32 > k) for k, p in enumerate(out)}

        return add
    if name == "VIADD":
        return simple(2, lambda a, b: a + b & _M)
    if name == "IABS":
        return simple(1, lambda a: abs(_s32(a)) & _M)
    if name in ("VIMNMX", "IMNMX", "VIADDMNMX", "UIMNMX", "UVIMNMX"):
        out, rest, end = _split(ops[1:])
        reads, least = [_source(o) for o in rest], predicate(end[-1]) if end else lambda s: None
        sign = (lambda x: x) if ".U32" in mods else _s32

        def extreme(s: State) -> dict[str, Value]:
            values, p = [read(s) for read in reads], least(s)
            if p is None or any(v is None for v in values):
                return {dest: None}
            if name == "VIADDMNMX":
                values = [values[0] + values[1] & _M, values[2]]
            a, b = map(sign, values[:2])
            smaller = a < b
            return {dest: _where(_truth(smaller == p), a, b) & _M}

        return extreme
    if plain in ("SEL", "FSEL"):
        a, b, p = _source(ops[1]), _source(ops[2]), predicate(ops[3])

        def select(s: State) -> dict[str, Value]:
            x, y, q = a(s), b(s), p(s)
            if q is True or q is False:
                return {dest: x if q else y}
            return {dest: None if q is None or x is None or y is None else _where(q, x, y)}

        return select
    if plain == "LEA":
        out, rest, end = _split(ops[1:])
        shift = int(rest[-1], 16) if _NUMBER.match(rest[-1]) else None
        reads = [_source(o) for o in rest[:-1]]
        carry = predicate(end[-1]) if end and ".X" in mods else lambda s: 0
        high, signed = ".HI" in mods, ".SX32" in mods

        def lea(s: State) -> dict[str, Value]:
            values, p = [read(s) for read in reads], carry(s)
            if shift is None or p is None or any(v is None for v in values):
                return {dest: None} | dict.fromkeys(out)
            a, b = values[0], values[1]
            if not high:
                moved = a << shift & _M
            elif signed:
                moved = _s32(a) >> (32 - shift) & _M
            else:
                moved = (a >> (32 - shift) | values[2] << shift) & _M if shift else values[2]
            total = moved + b + p
            return {dest: total & _M} | {q: _truth(total >> 32 > 0) for q in out[:1]}

        return lea
    if plain == "LOP3":
        out = []
        rest = list(ops)
        if _is_predicate(rest[0]):
            out.append(rest.pop(0))
        target, table = rest[0], int(rest[4], 16)
        reads = [_source(o) for o in rest[1:4]]

        def logic(s: State) -> dict[str, Value]:
            a, b, c = (read(s) for read in reads)
            value = _lop3(a, b, c, table)
            return {target: value} | {p: None if value is None else _truth(value != 0) for p in out}

        return logic
    if plain == "PLOP3":
        if not _NUMBER.match(ops[5]):
            return None
        table, reads = int(ops[5], 16), [predicate(o) for o in ops[2:5]]

        def plogic(s: State) -> dict[str, Value]:
            value = _plop3([read(s) for read in reads], table)
            return {ops[0]: value, ops[1]: None}

        return plogic
    if plain == "SHF":
        reads = [_source(o) for o in ops[1:4]]

        def shift(s: State) -> dict[str, Value]:
            low, by, high = (read(s) for read in reads)
            return {dest: _shift(low, by, high, mods)}

        return shift
    if plain in ("ISETP", "FSETP"):
        match = re.match(r"\.(\w+?)(\.U32)?(\.FTZ)?\.(AND|OR|XOR)(\.EX)?", mods)
        if not match or len(ops) < 5:
            return None
        compare, unsigned, _, joined, extended = match.groups()
        if plain == "FSETP":
            compare, negated = compare.removesuffix("U"), compare.endswith("U")
            a, b = map(_float_source, ops[2:4])
        else:
            a, b = map(_source, ops[2:4])
        if compare not in _COMPARE:
            return None
        test, other = _COMPARE[compare], predicate(ops[4])
        below = predicate(ops[5]) if extended else None
        sign = (lambda x: x) if unsigned or plain == "FSETP" else _s32
        join = {"AND": _and, "OR": _or}.get(joined, lambda a, b: None)

        def setp(s: State) -> dict[str, Value]:
            x, y = a(s), b(s)
            if x is None or y is None:
                found = None
            else:
                x, y = sign(x), sign(y)
                found = test(x, y)
                if plain == "FSETP" and negated:
                    found = found | np.isnan(x) | np.isnan(y)
                found = _truth(found)
                if below is not None:
                    low, same = below(s), _truth(x == y)
                    strict = _truth(found & (x != y))
                    found = _or(strict, _and(same, low))
            p = other(s)
            return {ops[0]: join(found, p), ops[1]: join(_not(found), p)}

        return setp
    if name == "S2R" or name == "S2UR":
        return lambda s: {dest: s.values.get(ops[1])}
    if name == "CS2R":
        wide = {dest: 0} | ({} if ".32" in mods else {_next(dest): 0})
        return (lambda s: wide) if ops[1] == "SRZ" else lambda s: dict.fromkeys(wide)
    if name in ("LDC", "ULDC"):
        size = size_of(mods)
        read = _source(ops[1], wide=size == 8)

        def constant(s: State) -> dict[str, Value]:
            value = read(s)
            if size < 8:
                return {dest: None if value is None or size < 4 else value}
            if value is None:
                return {dest: None, _next(dest): None}
            return {dest: value & _M, _next(dest): value >> 32 & _M}

        return constant
    if plain == "SGXT":
        signed = ".U32" not in mods

        def extend(a: Value, bits: Value) -> Value:
            low = a & ((1 << bits) - 1)
            return ((low ^ (1 << (bits - 1))) - (1 << (bits - 1))) & _M if signed else low

        return simple(2, extend)
    if name == "PRMT" and _NUMBER.match(ops[2]):
        return simple(3, lambda a, sel, b: _permute(a, sel, b))
    if name == "P2R":
        return lambda s: {dest: None}
    if name in ("I2FP", "I2F"):
        read, signed = _source(ops[1]), "U32" not in mods
        if "64" in mods:
            return None

        def to_float(s: State) -> dict[str, Value]:
            x = read(s)
            if x is None:
                return {dest: None}
            x = np.asarray(_s32(x) if signed and ".RP" not in mods else x)
            y = x.astype(np.float32)
            if ".RP" in mods:  # rounded up
                y = np.where(y.astype(np.float64) < x, np.nextafter(y, np.float32(np.inf)), y)
            return {dest: _bits(y)}

        return to_float
    if name == "F2I":
        if "64" in mods:
            return None
        read = _float_source(ops[1])

        def to_int(s: State) -> dict[str, Value]:
            x = read(s)
            if x is None:
                return {dest: None}
            rounds = np.floor if ".FLOOR" in mods else np.ceil if ".CEIL" in mods else np.trunc
            x = rounds(np.nan_to_num(x.astype(np.float64)))
            low, high = (0, 2.0**32 - 1) if ".U32" in mods else (-(2.0**31), 2.0**31 - 1)
            y = np.clip(x, low, high).astype(np.int64) & _M
            return {dest: int(y) if y.ndim == 0 else y}

        return to_int
    if name == "MUFU" and mods == ".RCP":
        read = _float_source(ops[1])
        return lambda s: {dest: None if (x := read(s)) is None else _bits(np.float32(1) / x)}
    if name in ("FADD", "FMUL", "FFMA"):
        reads = [_float_source(o) for o in ops[1:]]

        def number(s: State) -> dict[str, Value]:
            values = [read(s) for read in reads]
            if any(v is None for v in values):
                return {dest: None}
            if name == "FADD":
                return {dest: _bits(values[0] + values[1])}
            product = values[0] * values[1]
            return {dest: _bits(product if name == "FMUL" else product + values[2])}

        return number
    if name == "HFMA2" and ops[1:3] == ("-RZ", "RZ"):
        try:
            high, low = (int(np.float16(float(o)).view(np.uint16)) for o in ops[3:5])
        except ValueError:
            return None
        return lambda s: {dest: high << 16 | low}
    return None


def _n(value: Value) -> Value:
    """0 for what is known: arrays do not compare with ``None`` in a tuple."""
    return None if value is None else 0


def _lop3(a: Value, b: Value, c: Value, table: int) -> Value:
    used = [bool((table >> n ^ table) & m) for n, m in ((4, 0x0F), (2, 0x33), (1, 0x55))]
    given = [x if u else 0 for x, u in zip((a, b, c), used, strict=True)]
    if any(x is None for x in given):
        return None
    a, b, c = given
    total: Value = 0
    for k in range(8):
        if table >> k & 1:
            total = total | (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return total & _M


def _plop3(values: Sequence[Value], table: int) -> Value:
    used = [bool((table >> n ^ table) & m) for n, m in ((4, 0x0F), (2, 0x33), (1, 0x55))]
    given = [x if u else False for x, u in zip(values, used, strict=True)]
    found: Value = False
    for k in range(8):
        if table >> k & 1:
            term: Value = True
            for value, bit, u in zip(given, (4, 2, 1), used, strict=True):
                if u:
                    term = _and(term, value if k & bit else _not(value))
                elif k & bit:
                    term = False
            found = _or(found, term)
    return found


def _shift(low: Value, by: Value, high: Value, mods: str) -> Value:
    if by is None:
        return None
    right, signed = mods.startswith(".R"), "S32" in mods or "S64" in mods
    takes_high = ".HI" in mods
    if "64" not in mods:
        if right:
            value = high if takes_high else low
            if value is None:
                return None
            by = np.minimum(by, 63) if isinstance(by, np.ndarray) else min(by, 63)
            return (_s32(value) if signed else value) >> by & _M
        if low is None or (isinstance(by, int) and by > 32):
            return None if low is None else 0
        return low << by & _M
    if low is None or high is None:
        return None
    whole = _s64(low | high << 32)
    if right:
        found = (
            whole >> by if signed else whole >> by & _s64((1 << 64 - by) - 1) if isinstance(by, int) else None
        )
        return None if found is None else (found >> 32 if takes_high else found) & _M
    moved = whole << by
    return (moved >> 32 if takes_high else moved) & _M


def _permute(a: Value, sel: int, b: Value) -> Value:
    total: Value = 0
    for k in range(4):
        nibble = sel >> 4 * k & 15
        source = a if nibble & 7 < 4 else b
        if source is None:
            return None
        byte = source >> 8 * (nibble & 3) & 255
        if nibble & 8:
            byte = (byte >> 7) * 255
        total = total | byte << 8 * k
    return total


def _load(i: Instruction, guard: Callable[[State], Value]) -> Step:
    names, where = _written(i), address(i.operands[-1])
    if _is_predicate(i.operands[-1]):
        where = address(i.operands[-2])
    size, signed, key = size_of(i.modifiers), ".S" in i.modifiers, i.address
    known = i.name in ("LDG", "LD")

    def run(s: State) -> None:
        g, at = guard(s), where(s)
        if s.accessed:
            s.accessed(key, s, at, g)
        for k, name in enumerate(names):
            value = None
            if known and at is not None and g is not False:
                safe = at if g is True else None
                value = s.memory.read(None if safe is None else safe + 4 * k, min(size, 4), signed)
            s.put(name, value, g)

    return run


def _touch(i: Instruction, guard: Callable[[State], Value]) -> Step:
    operand = next((o for o in i.operands if "[" in o and not o.startswith("c[")), "")
    others = [o for o in i.operands if "[" in o and not o.startswith("c[")]
    if i.name == "LDGSTS" and len(others) > 1:
        operand = others[1]  # the global address; the first is in shared memory
    where, key = address(operand), i.address

    def run(s: State) -> None:
        if s.accessed:
            s.accessed(key, s, where(s), guard(s))

    return run


def _spill(i: Instruction, guard: Callable[[State], Value]) -> Step:
    where, names = address(i.operands[0] if i.name == "STL" else i.operands[1]), _written(i)
    reads = _source(i.operands[1]) if i.name == "STL" else None

    def run(s: State) -> None:
        at = where(s)
        key = at if isinstance(at, int) else None
        if reads is not None:
            if key is not None:
                s.local[key] = reads(s) if size_of(i.modifiers) == 4 else None
            return
        for name in names:
            s.put(name, s.local.get(key) if len(names) == 1 and key is not None else None, guard(s))

    return run


def step(i: Instruction) -> Step:
    """What an instruction that does not branch does to a state."""
    guard = predicate(i.guard) if i.guard else lambda s: True
    if i.name in ("STL", "LDL"):
        return _spill(i, guard)
    if i.name in ("STG", "STS", "STSM", "LDGSTS", "RED", "REDG", "ST"):
        return _touch(i, guard)
    if i.name in _MEMORY:
        return _load(i, guard)
    if i.name in _NOTHING:
        return lambda s: None
    compute = _arithmetic(i)
    if compute is None:
        names = _written(i)

        def forget(s: State) -> None:
            g = guard(s)
            for name in names:
                s.put(name, None, g)

        return forget

    def run(s: State) -> None:
        g = guard(s)
        if g is not False:
            for name, value in compute(s).items():
                s.put(name, value, g)

    return run


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
