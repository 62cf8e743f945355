"""What the instructions of NVIDIA's machine code do to a state: integers, predicates, some floating point."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from bench.simulator._state import (
    _M,
    _NUMBER,
    Bits,
    State,
    Value,
    _and,
    _bits,
    _bits_source,
    _float_source,
    _is_predicate,
    _next,
    _not,
    _or,
    _s32,
    _s64,
    _source,
    _truth,
    _where,
    address,
    predicate,
)
from segvit_kernels.testing.machine_code import Instruction

Step = Callable[[State], None]
_COMPARE = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_MEMORY = ("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "RED", "REDG", "ATOMG", "ATOMS", "LD", "ST")
_NOTHING = (
    "STG", "STS", "STSM", "STL", "RED", "REDG", "LDGSTS", "LDGDEPBAR", "DEPBAR", "BAR", "WARPGROUP", "NOP",
    "BSSY", "BSYNC", "BREAK", "WARPSYNC", "MEMBAR", "FENCE", "ERRBAR", "CCTL", "YIELD", "NANOSLEEP", "BRA",
    "EXIT", "CALL",
    "RET", "UTMALDG", "UTMASTG", "UTMACMDFLUSH", "UTMAPF", "WARPSYNC", "ST", "USETMAXREG", "ACQBULK",
)  # fmt: skip


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
        reads = [_bits_source(o) for o in rest[1:4]]

        def logic(s: State) -> dict[str, Value]:
            bits = _lop3([read(s) for read in reads], table)
            one = bits.value & bits.known != 0
            found = _truth(one) if np.all(one | (bits.known == _M)) else None
            return {target: bits.settled()} | dict.fromkeys(out, found)

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
    if name == "VOTEU" and mods in (".ANY", ".ALL") and len(ops) == 2:
        voters, over = predicate(ops[1]), np.any if mods == ".ANY" else np.all

        def vote(s: State) -> dict[str, Value]:
            p = voters(s)
            return {dest: over(p, axis=1, keepdims=True) if isinstance(p, np.ndarray) else p}

        return vote
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


def _lop3(operands: Sequence[Bits], table: int) -> Bits:
    can: list[Value] = [0, 0]  # what bits may be 0, and may be 1
    for k in range(8):
        term: Value = _M
        for bits, bit in zip(operands, (4, 2, 1), strict=True):
            term = term & ((bits.value if k & bit else ~bits.value) | ~bits.known)
        can[table >> k & 1] |= term
    return Bits(can[1] & _M, (can[0] ^ can[1]) & _M)


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
