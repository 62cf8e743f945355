"""Integers, predicates, moves and selections."""

from __future__ import annotations

from typing import Any

import numpy as np

from segvit_kernels.testing.ptx.flow import picks
from segvit_kernels.testing.ptx.parser import Immediate, Instruction, Register, Vector
from segvit_kernels.testing.ptx.translate import HANDLERS, NUMPY, Emitter, function, instruction, unknown

FLOATS = ("f16", "f16x2", "bf16", "bf16x2", "f32", "f64")


def _is_float(i: Instruction) -> bool:
    return i.modifiers[-1] in FLOATS


def _floating(name: str, emit: Emitter, i: Instruction) -> None:
    HANDLERS[f"{name}.float"](emit, i)


def _two(name: str, numpy: str) -> None:
    @instruction(name)
    def binary(emit: Emitter, i: Instruction) -> None:
        if _is_float(i):
            return _floating(name, emit, i)
        relu = name in ("min", "max") and i.modifiers[:-1] == ("relu",) and i.modifiers[-1].startswith("s")
        if set(i.modifiers[:-1]) - {"wrap"} and not relu:
            raise unknown(i)
        dtype = NUMPY[i.modifiers[-1]]
        a, b = (emit.use(o, dtype) for o in i.operands[1:])
        value = f"{numpy}({a}, {b})"
        emit.set(i.operands[0], dtype, f"np.maximum({value}, 0)" if relu else value)


for _name, _numpy in {"add": "add", "sub": "subtract", "min": "minimum", "max": "maximum"}.items():
    _two(_name, _numpy)


def _logic(name: str, numpy: str) -> None:
    @instruction(name)
    def logic(emit: Emitter, i: Instruction) -> None:
        dtype = NUMPY[i.modifiers[-1]]
        a, b = (emit.use(o, dtype) for o in i.operands[1:])
        emit.set(i.operands[0], dtype, f"{numpy}({a}, {b})")


for _name, _numpy in {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}.items():
    _logic(_name, _numpy)


@instruction("not", "neg", "abs", "cnot")
def _one(emit: Emitter, i: Instruction) -> None:
    if _is_float(i):
        return _floating(i.name, emit, i)
    dtype = NUMPY[i.modifiers[-1]]
    a = emit.use(i.operands[1], dtype)
    names = {"not": "invert", "neg": "negative", "abs": "absolute"}
    text = f"{names[i.name]}({a})" if i.name != "cnot" else f"({a} == 0).astype('{dtype}')"
    emit.set(i.operands[0], dtype, text)


@instruction("mul", "mul24")
def _mul(emit: Emitter, i: Instruction) -> None:
    if _is_float(i):
        return _floating("mul", emit, i)
    emit.set(i.operands[0], *_product(emit, i))


@instruction("mad", "mad24")
def _mad(emit: Emitter, i: Instruction) -> None:
    if _is_float(i):
        return _floating("fma", emit, i)
    dtype, product = _product(emit, i)
    emit.set(i.operands[0], dtype, f"add({product}, {emit.use(i.operands[3], dtype)})")


def _product(emit: Emitter, i: Instruction) -> tuple[str, str]:
    part, kind = i.modifiers[-2], i.modifiers[-1]
    dtype = NUMPY[kind]
    a, b = (emit.use(o, dtype) for o in i.operands[1:3])
    if part == "lo":
        return dtype, f"multiply({a}, {b})"
    if part == "wide":
        wide = f"{dtype[0]}{2 * int(dtype[1])}"
        return wide, f"multiply({a}.astype('{wide}'), {b}.astype('{wide}'))"
    if part == "hi":
        return dtype, f"high_product({a}, {b})"
    raise unknown(i)


@function
def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product."""
    kind, size = a.dtype.kind, a.dtype.itemsize
    if size < 8:
        wide = np.dtype(f"{kind}{2 * size}")
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(8 * size)).astype(a.dtype)
    u, v = a.view("u8"), b.view("u8")
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    u0, u1, v0, v1 = u & low, u >> shift, v & low, v >> shift
    middle = (u0 * v0 >> shift) + (u1 * v0 & low) + (u0 * v1 & low)
    out = u1 * v1 + (u1 * v0 >> shift) + (u0 * v1 >> shift) + (middle >> shift)
    if kind == "i":
        out = out - np.where(a < 0, v, np.uint64(0)) - np.where(b < 0, u, np.uint64(0))
    return out.view(a.dtype)


@instruction("sad")
def _sad(emit: Emitter, i: Instruction) -> None:
    dtype = NUMPY[i.modifiers[-1]]
    a, b, c = (emit.use(o, dtype) for o in i.operands[1:])
    emit.set(i.operands[0], dtype, f"add({c}, where(less({a}, {b}), {b} - {a}, {a} - {b}))")


@instruction("div", "rem")
def _div(emit: Emitter, i: Instruction) -> None:
    if _is_float(i):
        return _floating("div", emit, i)
    dtype = NUMPY[i.modifiers[-1]]
    a, b = (emit.use(o, dtype) for o in i.operands[1:])
    emit.line(f"m.divisor({emit.site()}, {emit.mask()}, {b})")
    emit.set(i.operands[0], dtype, f"{'quotient' if i.name == 'div' else 'np.fmod'}({a}, {b})")


@function
def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded towards zero."""
    if a.dtype.kind == "u":
        return np.floor_divide(a, b)
    found = np.floor_divide(a, b)
    return found + ((found < 0) & (found * b != a)).astype(a.dtype)


@instruction("shl", "shr")
def _shift(emit: Emitter, i: Instruction) -> None:
    kind = i.modifiers[-1]
    dtype = NUMPY[kind]
    a = emit.use(i.operands[1], dtype)
    amount = i.operands[2]
    if isinstance(amount, Immediate):
        by = emit.constant(min(amount.value % 2**32, 255 if int(dtype[1]) > 1 else 127), dtype)
    else:
        by = emit.use(amount, "u4")
        by = f"np.minimum({by}, {emit.constant(64, 'u4')}).astype('{dtype}')"
    emit.set(i.operands[0], dtype, f"{'left' if i.name == 'shl' else 'right'}_shift({a}, {by})")


@instruction("shf")
def _funnel(emit: Emitter, i: Instruction) -> None:
    side, mode = i.modifiers[0], i.modifiers[1]
    a, b, c = (emit.use(o, "u4") for o in i.operands[1:])
    emit.set(i.operands[0], "u4", f"funnel({a}, {b}, {c}, {side == 'l'}, {mode == 'clamp'})")


@function
def funnel(low: np.ndarray, high: np.ndarray, amount: np.ndarray, left: bool, clamp: bool) -> np.ndarray:
    """The upper half of a 64-bit value shifted left, or the lower half of one shifted right."""
    amount = np.minimum(amount, np.uint32(32)) if clamp else amount & np.uint32(31)
    whole = (high.astype("u8") << np.uint64(32)) | low
    if left:
        return ((whole << amount.astype("u8")) >> np.uint64(32)).astype("u4")
    return (whole >> amount.astype("u8")).astype("u4")


@instruction("bfe")
def _bfe(emit: Emitter, i: Instruction) -> None:
    dtype = NUMPY[i.modifiers[-1]]
    a = emit.use(i.operands[1], dtype)
    place, length = (emit.use(o, "u4") for o in i.operands[2:])
    emit.set(i.operands[0], dtype, f"bit_field({a}, {place}, {length})")


@function
def bit_field(a: np.ndarray, place: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``length`` bits from ``place`` on, with their sign for signed types."""
    bits = 8 * a.itemsize
    unsigned = a.view(f"u{a.itemsize}").astype("u8")
    place, length = (place & np.uint32(255)).astype("u8"), (length & np.uint32(255)).astype("u8")
    mask = np.where(length >= 64, ~np.uint64(0), (np.uint64(1) << length) - np.uint64(1))
    found = np.where(place < bits, unsigned >> np.minimum(place, np.uint64(63)), np.uint64(0)) & mask
    if a.dtype.kind == "i":
        last = np.minimum(place + length - np.uint64(1), np.uint64(bits - 1))
        negative = ((unsigned >> last) & np.uint64(1)).astype(bool) & (length > 0)
        found = np.where(negative, found | ~mask, found)
    return found.astype(f"u{a.itemsize}").view(a.dtype)


@instruction("bfi")
def _bfi(emit: Emitter, i: Instruction) -> None:
    dtype = NUMPY[i.modifiers[-1]]
    a, b = (emit.use(o, dtype) for o in i.operands[1:3])
    place, length = (emit.use(o, "u4") for o in i.operands[3:])
    emit.set(i.operands[0], dtype, f"bit_insert({a}, {b}, {place}, {length})")


@function
def bit_insert(a: np.ndarray, b: np.ndarray, place: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``b`` with ``length`` bits from ``place`` on taken from ``a``."""
    place, length = (place & np.uint32(255)).astype("u8"), (length & np.uint32(255)).astype("u8")
    mask = np.where(length >= 64, ~np.uint64(0), (np.uint64(1) << length) - np.uint64(1)) << place
    return ((b.astype("u8") & ~mask) | ((a.astype("u8") << place) & mask)).astype(a.dtype)


@instruction("bmsk")
def _bmsk(emit: Emitter, i: Instruction) -> None:
    place, length = (emit.use(o, "u4") for o in i.operands[1:])
    ones = emit.constant(0xFFFFFFFF, "u4")
    emit.set(i.operands[0], "u4", f"bit_insert({ones}, {emit.constant(0, 'u4')}, {place}, {length})")


@instruction("prmt")
def _prmt(emit: Emitter, i: Instruction) -> None:
    if i.modifiers != ("b32",):
        raise unknown(i)
    used = zip(i.operands[1:3], picks(i.operands[3]), strict=True)
    a, b = (emit.use(o, "u4") if picked else emit.constant(0, "u4") for o, picked in used)
    emit.set(i.operands[0], "u4", f"permute({a}, {b}, {emit.use(i.operands[3], 'u4')})")


@function
def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes of eight, or their signs."""
    whole = a.astype("u8") | (b.astype("u8") << np.uint64(32))
    out = np.uint32(0)
    for place in range(4):
        nibble = selector >> np.uint32(4 * place)
        byte = (whole >> ((nibble & np.uint32(7)).astype("u8") * np.uint64(8))).astype("u4") & np.uint32(255)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        out = out | (np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * place))
    return out


@instruction("lop3")
def _lop3(emit: Emitter, i: Instruction) -> None:
    a, b, c = (emit.use(o, "u4") for o in i.operands[1:4])
    emit.set(i.operands[0], "u4", f"lookup({a}, {b}, {c}, {i.operands[4].value})")


@function
def lookup(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Any function of three bits, bit by bit."""
    out = np.zeros((1, 1), "u4")
    for index in range(8):
        if table >> index & 1:
            out = out | ((a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c))
    return out


@instruction("popc", "clz", "brev", "bfind")
def _bits(emit: Emitter, i: Instruction) -> None:
    dtype = NUMPY[i.modifiers[-1]]
    a = emit.use(i.operands[1], dtype)
    name = {"popc": "population", "clz": "leading_zeros", "brev": "reversed_bits", "bfind": "highest_bit"}[
        i.name
    ]
    emit.set(i.operands[0], dtype if i.name == "brev" else "u4", f"{name}({a})")


@function
def population(a: np.ndarray) -> np.ndarray:
    """Bits that are set."""
    parts = np.ascontiguousarray(a).view("u1").reshape(*a.shape, a.itemsize)
    return _BITS[parts].sum(axis=-1, dtype="u4")


_BITS = np.array([bin(byte).count("1") for byte in range(256)], "u1")


@function
def highest_bit(a: np.ndarray) -> np.ndarray:
    """Place of the highest bit that is not the sign; all ones where there is none."""
    if a.dtype.kind == "i":
        a = np.where(a < 0, ~a, a)
    a = a.view(f"u{a.itemsize}")
    for shift in (1, 2, 4, 8, 16, 32)[: 3 + a.itemsize.bit_length() - 1]:
        a = a | (a >> a.dtype.type(shift))
    return population(a) - np.uint32(1)


@function
def leading_zeros(a: np.ndarray) -> np.ndarray:
    """Before the highest bit."""
    return np.uint32(8 * a.itemsize - 1) - highest_bit(a.view(f"u{a.itemsize}"))


@function
def reversed_bits(a: np.ndarray) -> np.ndarray:
    """The lowest bit first."""
    rows = np.unpackbits(np.ascontiguousarray(a).view("u1").reshape(*a.shape, -1), axis=-1, bitorder="little")
    return np.packbits(rows[..., ::-1], axis=-1, bitorder="little").view(a.dtype)[..., 0]


_COMPARE = {
    "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater",
    "ge": "greater_equal", "lo": "less", "ls": "less_equal", "hi": "greater", "hs": "greater_equal",
}  # fmt: skip


def comparison(emit: Emitter, i: Instruction, how: str, kind: str, a: Any, b: Any) -> str:
    """An expression of ``a`` compared with ``b``."""
    dtype = NUMPY[kind]
    if kind in ("bf16", "bf16x2", "f16x2"):
        raise unknown(i)
    if kind in ("b8", "b16", "b32", "b64") and how not in ("eq", "ne"):
        raise unknown(i)
    x, y = emit.use(a, dtype), emit.use(b, dtype)
    if kind in FLOATS:
        if how == "num":
            return f"~(isnan({x}) | isnan({y}))"
        if how == "nan":
            return f"(isnan({x}) | isnan({y}))"
        if how == "ne":  # ordered, as against neu
            return f"(not_equal({x}, {y}) & ~isnan({x}) & ~isnan({y}))"
        if how.endswith("u"):
            if how == "neu":
                return f"not_equal({x}, {y})"
            return f"({_COMPARE[how[:-1]]}({x}, {y}) | isnan({x}) | isnan({y}))"
    return f"{_COMPARE[how]}({x}, {y})"


@instruction("setp")
def _setp(emit: Emitter, i: Instruction) -> None:
    modifiers = [m for m in i.modifiers if m != "ftz"]
    how, kind = modifiers[0], modifiers[-1]
    if kind in ("bf16", "bf16x2", "f16x2"):
        return HANDLERS["setp.half"](emit, i)
    found = comparison(emit, i, how, kind, *i.operands[1:3])
    combine = modifiers[1] if len(modifiers) == 3 else None
    destination = i.operands[0]
    pair = destination.items if isinstance(destination, Vector) else (destination,)
    if combine or len(pair) == 2:
        found = emit.temporary(found)
    other = emit.temporary(f"~{found}") if len(pair) == 2 else None
    for place, text in zip(pair, (found, other), strict=False):
        if combine:
            text = f"logical_{combine}({text}, {emit.use(i.operands[3], 'b1')})"
        emit.set(place, "b1", text)


@instruction("set")
def _set(emit: Emitter, i: Instruction) -> None:
    modifiers = [m for m in i.modifiers if m != "ftz"]
    how, to, kind = modifiers[0], modifiers[-2], modifiers[-1]
    found = comparison(emit, i, how, kind, *i.operands[1:3])
    if len(modifiers) == 4:
        found = f"logical_{modifiers[1]}({found}, {emit.use(i.operands[3], 'b1')})"
    dtype = NUMPY[to]
    one = emit.constant(
        1.0 if to in FLOATS else -1 if dtype[0] == "i" else 2 ** (8 * int(dtype[1])) - 1, dtype
    )
    emit.set(i.operands[0], dtype, f"where({found}, {one}, {emit.constant(0, dtype)})")


@instruction("selp")
def _selp(emit: Emitter, i: Instruction) -> None:
    dtype = NUMPY[i.modifiers[-1]]
    a, b = (emit.use(o, dtype) for o in i.operands[1:3])
    emit.set(i.operands[0], dtype, f"where({emit.use(i.operands[3], 'b1')}, {a}, {b})")


@instruction("slct")
def _slct(emit: Emitter, i: Instruction) -> None:
    kind, by = i.modifiers[-2:]
    dtype = NUMPY[kind]
    a, b = (emit.use(o, dtype) for o in i.operands[1:3])
    emit.set(i.operands[0], dtype, f"where({emit.use(i.operands[3], NUMPY[by])} >= 0, {a}, {b})")


@instruction("mov")
def _mov(emit: Emitter, i: Instruction) -> None:
    destination, source = i.operands
    if isinstance(destination, Register) and isinstance(source, Register) and emit.alias(destination, source):
        return
    if i.modifiers[-1] == "b128":
        raise unknown(i)
    dtype = NUMPY[i.modifiers[-1]]
    emit.set(destination, dtype, emit.use(source, dtype))


@instruction("cvta")
def _cvta(emit: Emitter, i: Instruction) -> None:
    to, space = i.modifiers[0] == "to", next(m for m in i.modifiers if m not in ("to", "u64", "u32"))
    a = emit.use(i.operands[1], "u8")
    base = {"shared": "shared_window", "shared::cta": "shared_window", "local": "local_window"}.get(space)
    if base is None:  # global, const and param addresses are generic ones
        emit.set(i.operands[0], "u8", a)
        return
    sign = "subtract" if to else "add"
    emit.set(i.operands[0], "u8", f"{sign}({a}, m.{base})")


@instruction("isspacep")
def _isspacep(emit: Emitter, i: Instruction) -> None:
    emit.set(i.operands[0], "b1", f"m.in_space({i.modifiers[0]!r}, {emit.use(i.operands[1], 'u8')})")


@instruction(
    "griddepcontrol", "prefetch", "prefetchu", "nanosleep", "discard", "applypriority", "pragma", "setmaxnreg"
)
def _nothing(emit: Emitter, i: Instruction) -> None:
    """Hints to the hardware."""


@instruction("createpolicy")
def _policy(emit: Emitter, i: Instruction) -> None:
    emit.set(i.operands[0], "u8", emit.constant(0, "u8"))
