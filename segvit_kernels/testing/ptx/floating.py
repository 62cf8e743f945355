"""Floating point: float32, float64, float16, bfloat16 and pairs of those, and conversions.

float16 and bfloat16 are computed in a wider type and rounded once to nearest even. A fused multiply-add of
float32 goes by way of float64: once in 2²⁹ that rounds a half the other way.
"""

from __future__ import annotations

import numpy as np

from segvit_kernels.testing.ptx.parser import Instruction
from segvit_kernels.testing.ptx.translate import NUMPY, Emitter, function, instruction, unknown

ROUNDINGS = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")


# Formats.


@function
def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as float32."""
    return (bits.astype("u4") << np.uint32(16)).view("f4")


@function
def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, nearest even."""
    u = x.view("u4")
    out = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = np.isnan(x)
    if nan.any():
        out = np.where(nan, np.uint32(0x7FFF), out)
    return out.astype("u2")


@function
def to_bf16_rz(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, towards zero."""
    return np.where(np.isnan(x), np.uint32(0x7FFF), x.view("u4") >> np.uint32(16)).astype("u2")


@function
def to_f16(x: np.ndarray) -> np.ndarray:
    """float32 or float64 to float16, nearest even."""
    return x.astype("f2")


@function
def to_f16_rz(x: np.ndarray) -> np.ndarray:
    """float32 to float16, towards zero."""
    near = x.astype("f2")
    beyond = np.abs(near.astype("f8")) > np.abs(x.astype("f8"))
    return np.where(beyond, np.nextafter(near, np.float16(0)), near)


@function
def to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 to TF32 in float32's place, nearest, ties away from zero."""
    u = x.view("u4")
    finite = (u & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return np.where(finite, (u + np.uint32(0x1000)) & np.uint32(0xFFFFE000), u)


@function
def to_tf32_rn(x: np.ndarray) -> np.ndarray:
    """float32 to TF32, nearest even."""
    u = x.view("u4")
    finite = (u & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    near = (u + np.uint32(0xFFF) + ((u >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return np.where(finite, near, u)


@function
def to_tf32_rz(x: np.ndarray) -> np.ndarray:
    """float32 to TF32, towards zero."""
    return x.view("u4") & np.uint32(0xFFFFE000)


@function
def flush(x: np.ndarray) -> np.ndarray:
    """float32 with subnormals as zeros of their sign."""
    small = np.abs(x) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


@function
def towards(exact: np.ndarray, mode: str) -> np.ndarray:
    """float64 to float32 by another rounding than to nearest."""
    near = exact.astype("f4")
    wide = near.astype("f8")
    if mode == "rz":
        wrong, to = np.abs(wide) > np.abs(exact), np.float32(0)
    elif mode == "rm":
        wrong, to = wide > exact, np.float32(-np.inf)
    else:
        wrong, to = wide < exact, np.float32(np.inf)
    return np.where(wrong, np.nextafter(near, to), near)


@function
def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of float32, rounded once."""
    product = np.multiply(a, b, dtype="f8")
    return np.add(
        product, c, out=product if product.shape == np.broadcast(product, c).shape else None
    ).astype("f4")


@function
def split_pair(bits: np.ndarray, bf16: bool) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of 32 bits as float32."""
    if bf16:
        return (bits << np.uint32(16)).view("f4"), (bits & np.uint32(0xFFFF0000)).view("f4")
    low, high = bits.astype("u2"), (bits >> np.uint32(16)).astype("u2")
    return low.view("f2").astype("f4"), high.view("f2").astype("f4")


@function
def join_pair(low: np.ndarray, high: np.ndarray, bf16: bool) -> np.ndarray:
    """Two values of float32 or float64 as halves of 32 bits, each rounded once."""
    if bf16:
        a, b = (to_bf16(_odd(x)) for x in (low, high))
    else:
        a, b = (x.astype("f2").view("u2") for x in (low, high))
    return a.astype("u4") | (b.astype("u4") << np.uint32(16))


@function
def round_bf16(x: np.ndarray) -> np.ndarray:
    """float32 or float64 to the bits of bfloat16, rounded once."""
    return to_bf16(_odd(x))


def _odd(x: np.ndarray) -> np.ndarray:
    """float64 to float32 by rounding to odd, so that a second rounding is the only one that shows."""
    if x.dtype == np.float32:
        return x
    near = x.astype("f4")
    wide = near.astype("f8")
    inexact = (wide != x) & np.isfinite(wide)
    if not inexact.any():
        return near
    down = np.where(np.abs(wide) > np.abs(x), np.nextafter(near, np.float32(0)), near)
    return np.where(inexact, (down.view("u4") | np.uint32(1)).view("f4"), near)


# Arithmetic.


def _operands(emit: Emitter, i: Instruction, count: int, kind: str) -> list[str]:
    found = [emit.use(o, NUMPY[kind]) for o in i.operands[1 : 1 + count]]
    return [f"flush({x})" for x in found] if "ftz" in i.modifiers and kind == "f32" else found


def _finish(emit: Emitter, i: Instruction, text: str, dtype: str) -> None:
    if "sat" in i.modifiers:
        zero, one = emit.constant(0, dtype), emit.constant(1, dtype)
        text = f"fmin(fmax({text}, {zero}), {one})"
    if "ftz" in i.modifiers and dtype == "f4":
        text = f"flush({text})"
    emit.set(i.operands[0], dtype, text)


def _wide(emit: Emitter, i: Instruction, formula: str, count: int) -> None:
    """A formula on float16 or bfloat16, computed wider."""
    kind = i.modifiers[-1]
    names = "abc"[:count]
    known = {"rn", "ftz", "sat", "relu", "NaN", "noftz", kind}
    if set(i.modifiers) - known or "sat" in i.modifiers:
        raise unknown(i)
    if formula == "fma":
        formula = "np.add(np.multiply(a, b, dtype='f8'), c)"
    if "relu" in i.modifiers:
        formula = f"np.maximum({formula}, np.float32(0))"
    bf16 = kind.startswith("bf")
    if kind.endswith("x2"):
        pairs = [
            emit.temporary(f"split_pair({emit.use(o, 'u4')}, {bf16})") for o in i.operands[1 : 1 + count]
        ]
        halves = []
        for half in range(2):
            arguments = ", ".join(f"{p}[{half}]" for p in pairs)
            halves.append(emit.temporary(f"(lambda {', '.join(names)}: {formula})({arguments})"))
        emit.set(i.operands[0], "u4", f"join_pair({halves[0]}, {halves[1]}, {bf16})")
        return
    if bf16:
        arguments = ", ".join(f"from_bf16({emit.use(o, 'u2')})" for o in i.operands[1 : 1 + count])
        emit.set(i.operands[0], "u2", f"round_bf16((lambda {', '.join(names)}: {formula})({arguments}))")
        return
    arguments = ", ".join(f"{emit.use(o, 'f2')}.astype('f4')" for o in i.operands[1 : 1 + count])
    emit.set(i.operands[0], "f2", f"(lambda {', '.join(names)}: {formula})({arguments}).astype('f2')")


def _mode(i: Instruction) -> str:
    return next((m for m in i.modifiers if m in ROUNDINGS), "rn")


def _binary(name: str, numpy: str, symbol: str) -> None:
    @instruction(f"{name}.float")
    def binary(emit: Emitter, i: Instruction) -> None:
        kind = i.modifiers[-1]
        if kind not in ("f32", "f64"):
            return _wide(emit, i, f"(a {symbol} b)", 2)
        a, b = _operands(emit, i, 2, kind)
        mode = _mode(i)
        if mode == "rn":
            text = f"{numpy}({a}, {b})"
        elif kind == "f32":
            text = f"towards({numpy}({a}, {b}, dtype='f8'), {mode!r})"
        else:
            raise unknown(i)
        _finish(emit, i, text, NUMPY[kind])


for _name, _numpy, _symbol in (("add", "add", "+"), ("sub", "subtract", "-"), ("mul", "multiply", "*")):
    _binary(_name, _numpy, _symbol)


@instruction("fma", "fma.float")
def _fma(emit: Emitter, i: Instruction) -> None:
    kind, mode = i.modifiers[-1], _mode(i)
    if kind not in ("f32", "f64"):
        return _wide(emit, i, "fma", 3)
    a, b, c = _operands(emit, i, 3, kind)
    if kind == "f64":
        text = f"(np.multiply({a}, {b}, dtype=np.longdouble) + {c}).astype('f8')"
    elif mode == "rn":
        text = f"fused({a}, {b}, {c})"
    else:
        text = f"towards(np.multiply({a}, {b}, dtype='f8') + {c}, {mode!r})"
    _finish(emit, i, text, NUMPY[kind])


def _extreme(name: str) -> None:
    @instruction(f"{name}.float")
    def extreme(emit: Emitter, i: Instruction) -> None:
        kind = i.modifiers[-1]
        numpy = ("np.maximum" if name == "max" else "np.minimum") if "NaN" in i.modifiers else f"np.f{name}"
        if {"xorsign", "abs"} & set(i.modifiers):
            raise unknown(i)
        if kind not in ("f32", "f64"):
            return _wide(emit, i, f"{numpy}(a, b)", 2)
        found = _operands(emit, i, len(i.operands) - 1, kind)
        text = found[0]
        for other in found[1:]:
            text = f"{numpy}({text}, {other})"
        _finish(emit, i, text, NUMPY[kind])


_extreme("min")
_extreme("max")


@instruction("neg.float", "abs.float")
def _sign(emit: Emitter, i: Instruction) -> None:
    kind = i.modifiers[-1]
    if kind in ("f32", "f64"):
        a = _operands(emit, i, 1, kind)[0]
        emit.set(i.operands[0], NUMPY[kind], f"{'negative' if i.name == 'neg' else 'absolute'}({a})")
        return
    bits = {"f16": 0x8000, "bf16": 0x8000}.get(kind, 0x80008000)
    dtype = "u4" if kind.endswith("x2") else "u2"
    a, sign = emit.use(i.operands[1], dtype), emit.constant(bits, dtype)
    emit.set(i.operands[0], dtype, f"{a} ^ {sign}" if i.name == "neg" else f"{a} & ~{sign}")


ERRORS = {
    "div": (2.0**-22, 0.0),
    "rcp": (2.0**-23, 0.0),
    "sqrt": (2.0**-23, 0.0),
    "rsqrt": (2.0**-22.4, 0.0),
    "ex2": (2.0**-22, 0.0),
    "lg2": (2.0**-22, 2.0**-22),
    "sin": (0.0, 2.0**-20.5),
    "cos": (0.0, 2.0**-20.5),
    "tanh": (2.0**-11, 0.0),
}
"""How far approximate instructions of float32 may be from the truth by the PTX ISA: a part of the result, and
in all; the larger of both counts."""


class Noise:
    """Errors that approximate instructions may make on hardware.

    Args:
        seed: of the errors, of which every result of an instruction has always the same one.
    """

    def __init__(self, seed: int) -> None:
        self._seed = np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)

    def __call__(self, name: str, exact: np.ndarray) -> np.ndarray:
        """float32 of a result in float64, at most as far from it as :data:`ERRORS` says."""
        bits = exact.view("u8") ^ self._seed
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64
            bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
        share = (bits ^ (bits >> np.uint64(31))) / 2.0**63 - 1  # of the error, evenly from -1 to 1
        relative, absolute = ERRORS[name]
        size = np.abs(exact)
        room = np.maximum(relative * size, absolute) - 2.0**-24 * size  # the rest is rounding's
        kept = ~np.isfinite(exact) | ((exact == 1) & (name == "ex2"))  # PTX: 1 of 0
        return np.where(kept, exact, exact + room * share).astype("f4")


def _approximate(i: Instruction, formula: str, operands: list[str]) -> str:
    """An expression of the formula, with an error where the machine has noise."""
    text = formula.format(*operands)
    if i.modifiers[-1] != "f32" or not {"approx", "full"} & set(i.modifiers):
        return text
    wide = formula.format(*(f"{x}.astype('f8')" for x in operands))
    return f"({text} if m.noise is None else m.noise({i.name!r}, {wide}))"


@instruction("div.float")
def _div(emit: Emitter, i: Instruction) -> None:
    kind, mode = i.modifiers[-1], _mode(i)
    a, b = _operands(emit, i, 2, kind)
    if mode == "rn":
        text = _approximate(i, "divide({}, {})", [a, b])
    else:
        text = f"towards(divide({a}, {b}, dtype='f8'), {mode!r})"
    _finish(emit, i, text, NUMPY[kind])


_UNARY = {
    "rcp": "reciprocal({})",
    "sqrt": "sqrt({})",
    "rsqrt": "(1 / sqrt({}.astype('f8')))",
    "ex2": "exp2({})",
    "lg2": "log2({})",
    "sin": "sin({})",
    "cos": "cos({})",
    "tanh": "tanh({})",
}


@instruction(*_UNARY)
def _unary(emit: Emitter, i: Instruction) -> None:
    kind = i.modifiers[-1]
    if kind not in ("f32", "f64"):
        if i.name not in ("ex2", "tanh"):
            raise unknown(i)
        i = Instruction(i.name, tuple(m for m in i.modifiers if m != "approx"), *_rest(i))
        return _wide(emit, i, f"{_UNARY[i.name].format('a')}", 1)
    a = _operands(emit, i, 1, kind)[0]
    if _mode(i) != "rn" and kind == "f32":
        text = f"towards({_UNARY[i.name].format(a + '.astype(' + repr('f8') + ')')}, {_mode(i)!r})"
    else:
        text = _approximate(i, _UNARY[i.name], [a])
        if i.name == "rsqrt" and kind == "f32":
            text += ".astype('f4')"
    _finish(emit, i, text, NUMPY[kind])


def _rest(i: Instruction) -> tuple:
    return i.operands, i.predicate, i.kernel, i.line, i.text, i.source


@instruction("copysign")
def _copysign(emit: Emitter, i: Instruction) -> None:
    dtype = NUMPY[i.modifiers[-1]]
    a, b = (emit.use(o, dtype) for o in i.operands[1:])
    emit.set(i.operands[0], dtype, f"copysign({b}, {a})")


@instruction("testp")
def _testp(emit: Emitter, i: Instruction) -> None:
    how, kind = i.modifiers
    names = {"finite": "np.isfinite", "infinite": "np.isinf", "notanumber": "np.isnan", "number": "~np.isnan"}
    emit.set(i.operands[0], "b1", f"{names[how]}({emit.use(i.operands[1], NUMPY[kind])})")


@instruction("setp.half")
def _setp_half(emit: Emitter, i: Instruction) -> None:
    how, kind = i.modifiers[0], i.modifiers[-1]
    names = {"eq": "equal", "neu": "not_equal", "lt": "less", "le": "less_equal"}
    names |= {"gt": "greater", "ge": "greater_equal"}
    # True of what is not a number, too.
    names |= {"ltu": "~greater_equal", "leu": "~greater", "gtu": "~less_equal", "geu": "~less"}
    if kind != "bf16" or len([m for m in i.modifiers if m != "ftz"]) != 2:
        raise unknown(i)
    a, b = (f"from_bf16({emit.use(o, 'u2')})" for o in i.operands[1:3])
    text = f"isnan({a}) | isnan({b})" if how == "nan" else f"{names[how]}({a}, {b})"
    emit.set(i.operands[0], "b1", text)


# Conversions.


@function
def to_integer(x: np.ndarray, mode: str, dtype: str) -> np.ndarray:
    """A float to an integer: rounded, held inside the range, NaN as zero."""
    x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x.astype("f8"))
    info = np.iinfo(dtype)
    out = np.where(np.isnan(x), 0, np.clip(x, float(info.min), float(info.max)))
    top = x >= float(info.max)
    return np.where(top, info.max, np.where(top, 0, out).astype(dtype)).astype(dtype)


@function
def saturated(x: np.ndarray, dtype: str) -> np.ndarray:
    """An integer held inside the range of another type."""
    info, own = np.iinfo(dtype), np.iinfo(x.dtype)
    return np.clip(x, max(info.min, own.min), min(info.max, own.max)).astype(dtype)


@instruction("cvt")
def _cvt(emit: Emitter, i: Instruction) -> None:
    kinds = [m for m in i.modifiers if m in NUMPY or m == "tf32"]
    mode = _mode(i) if any(m in ROUNDINGS for m in i.modifiers) else ""
    if "pack" in i.modifiers or "satfinite" in i.modifiers or len(kinds) != 2:
        raise unknown(i)
    to, source = kinds
    relu = "relu" in i.modifiers
    if to in ("bf16x2", "f16x2") and source == "f32":
        high, low = (emit.use(o, "f4") for o in i.operands[1:])
        if relu:
            high, low = (f"fmax({x}, {emit.constant(0, 'f4')})" for x in (high, low))
        if mode == "rz":
            bf16, view = to == "bf16x2", "" if to == "bf16x2" else ".view('u2')"
            a, b = (f"to_{'bf16' if bf16 else 'f16'}_rz({x}){view}" for x in (low, high))
            emit.set(i.operands[0], "u4", f"pack('u4', {a}, {b})")
        else:
            emit.set(i.operands[0], "u4", f"join_pair({low}, {high}, {to == 'bf16x2'})")
        return
    if to == "tf32":
        name = {"rna": "to_tf32", "rn": "to_tf32_rn", "rz": "to_tf32_rz"}[mode]
        emit.set(i.operands[0], "u4", f"{name}({emit.use(i.operands[1], 'f4')})")
        return
    floats = ("f16", "bf16", "f32", "f64")
    a = i.operands[1]
    if source not in floats and to not in floats:
        x, dtype = emit.use(a, NUMPY[source]), NUMPY[to]
        emit.set(
            i.operands[0],
            dtype,
            f"saturated({x}, '{dtype}')" if "sat" in i.modifiers else _cast(x, source, to),
        )
        return
    if source in floats:
        x = f"from_bf16({emit.use(a, 'u2')})" if source == "bf16" else emit.use(a, NUMPY[source])
        if source == "f32" and "ftz" in i.modifiers:
            x = f"flush({x})"
    else:
        x = emit.use(a, NUMPY[source])
    if to not in floats:
        emit.set(i.operands[0], NUMPY[to], f"to_integer({x}, '{mode}', '{NUMPY[to]}')")
        return
    if mode in ("rni", "rzi", "rmi", "rpi"):
        x = f"{dict(rni='rint', rzi='trunc', rmi='floor', rpi='ceil')[mode]}({x})"
        mode = "rn"
    if relu:
        x = f"fmax({x}, 0)"
    if mode in ("rm", "rp") or (mode == "rz" and to == "f64"):
        if to != "f32":
            raise unknown(i)
        text = f"towards({x}.astype('f8'), '{mode}')"
    elif to == "bf16":
        text = f"to_bf16_rz({x})" if mode == "rz" else f"round_bf16({x}.astype('f8'))"
        if source in ("f32", "bf16") and mode != "rz":
            text = f"to_bf16({x})"
    elif mode == "rz":
        text = f"to_f16_rz({x})" if to == "f16" else f"towards({x}.astype('f8'), 'rz')"
    else:
        text = f"{x}.astype('{NUMPY[to]}')"
    dtype = NUMPY[to]
    if "sat" in i.modifiers:
        text = f"fmin(fmax({text}, {emit.constant(0, dtype)}), {emit.constant(1, dtype)})"
    emit.set(i.operands[0], dtype, text)


def _cast(x: str, source: str, to: str) -> str:
    a, b = NUMPY[source], NUMPY[to]
    if a[1] == b[1]:
        return x if a == b else f"{x}.view('{b}')"
    return f"{x}.astype('{b}')"
