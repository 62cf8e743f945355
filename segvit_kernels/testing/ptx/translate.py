"""Basic blocks to Python functions that work on NumPy arrays.

A register is an array that broadcasts to (blocks, threads): what is the same in all threads of a block, or in
all blocks, is computed once. Values have one of NumPy's types; the same bits are looked at as another type
where an instruction wants it. Nothing ever writes into the array of a register.

The function of a block takes the machine, its registers and the mask of the threads that are there (``None``:
all of them). Inside the block it computes for all threads; only memory, and registers that outlive the block,
see the mask. It returns the condition of its jump, where it has one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from segvit_kernels.testing.ptx.faults import PTXError
from segvit_kernels.testing.ptx.flow import Flow, accumulates, needs_values, reads, writes
from segvit_kernels.testing.ptx.parser import BYTES, Address, Immediate, Instruction, Register, Symbol, Vector

Handler = Callable[["Emitter", Instruction], None]
HANDLERS: dict[str, Handler] = {}
"""What emits an instruction, by its name."""

FUNCTIONS: dict[str, Any] = {"np": np}
"""What emitted code may call."""

NUMPY = {"pred": "b1", "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2"}
NUMPY |= {
    "b32": "u4",
    "u32": "u4",
    "s32": "i4",
    "f32": "f4",
    "b64": "u8",
    "u64": "u8",
    "s64": "i8",
    "f64": "f8",
}
NUMPY |= {"bf16": "u2", "f16x2": "u4", "bf16x2": "u4"}
"""NumPy's type for a PTX type; f16 is computed with, bf16 is bits."""


def instruction(*names: str) -> Callable[[Handler], Handler]:
    """Registers what emits the instructions ``names``."""

    def register(handler: Handler) -> Handler:
        for name in names:
            assert name not in HANDLERS, name
            HANDLERS[name] = handler
        return handler

    return register


def function(given: Callable) -> Callable:
    """Makes a function known to emitted code by its own name."""
    assert given.__name__ not in FUNCTIONS, given.__name__
    FUNCTIONS[given.__name__] = given
    return given


_UFUNCS = """
    add subtract multiply negative absolute bitwise_and bitwise_or bitwise_xor invert left_shift
    right_shift where minimum maximum fmin fmax equal not_equal less less_equal greater
    greater_equal isnan divide sqrt exp2 log2 sin cos tanh reciprocal rint floor ceil trunc
    logical_and logical_or logical_xor copysign
"""
for _name in _UFUNCS.split():
    FUNCTIONS[_name] = getattr(np, _name)


@function
def merge(mask: np.ndarray, new: np.ndarray, old: np.ndarray | None) -> np.ndarray:
    """``new`` where the mask is, else ``old``."""
    if old is None:
        return new
    return np.where(mask, new, old if old.dtype == new.dtype else old.view(new.dtype))


@function
def both(mask: np.ndarray | None, predicate: np.ndarray) -> np.ndarray:
    """Threads that are there and whose guard is true."""
    return predicate if mask is None else mask & predicate


def unknown(i: Instruction) -> PTXError:
    """The machine does not know this form of an instruction."""
    return PTXError(f"{i.kernel}, PTX line {i.line}: the machine does not know {i.opcode}: {i.text}")


class Emitter:
    """Python for one basic block.

    Args:
        flow: of the kernel.
        index: of the block.
        sites: list of instructions that can be at fault; grows.
    """

    def __init__(self, flow: Flow, index: int, sites: list[Instruction]) -> None:
        self.flow, self.block, self.sites = flow, flow.blocks[index], sites
        self.kernel = flow.kernel
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}
        self._constant_names: dict[tuple, str] = {}
        self.current: dict[str, dict[str, str]] = {}  # register: type: Python name
        self.instruction: Instruction | None = None
        self.temporaries = 0
        self.written: set[str] = set()

    # What handlers call.

    def line(self, text: str) -> None:
        """Emit a line."""
        self.lines.append(text)

    def temporary(self, expression: str) -> str:
        """A new name for the value of an expression."""
        self.temporaries += 1
        name = f"t{self.temporaries}"
        self.line(f"{name} = {expression}")
        return name

    def constant(self, value: Any, dtype: str) -> str:
        """An array of shape (1, 1) in a name."""
        array = np.zeros((1, 1), dtype)
        array[0, 0] = value
        return self.object(("constant", array.tobytes(), dtype), array)

    def object(self, key: tuple, value: Any) -> str:
        """Anything in a name; one name for a key."""
        if key not in self._constant_names:
            name = f"c{len(self._constant_names)}"
            self._constant_names[key] = name
            self.constants[name] = value
        return self._constant_names[key]

    def site(self) -> int:
        """A number by which the machine knows the instruction that is emitted."""
        assert self.instruction is not None
        self.sites.append(self.instruction)
        return len(self.sites) - 1

    def mask(self) -> str:
        """The threads that execute the instruction."""
        guard = self.instruction.predicate
        return "k" if guard is None else f"both(k, {self.use(guard, 'b1')})"

    def bytes_of(self, name: str) -> int:
        """Of a register."""
        kind = self.kernel.registers.get(name)
        if kind is None:
            raise PTXError(f"{self.kernel.name}: no register {name}")
        return BYTES[kind]

    def use(self, operand: Any, dtype: str) -> str:
        """A name of the operand's value as ``dtype``."""
        if isinstance(operand, Immediate):
            return self.immediate(operand, dtype)
        if isinstance(operand, Symbol):
            return self.symbol(operand, dtype)
        if isinstance(operand, Vector):  # {low, high} as one value
            return self.packed(operand, dtype)
        assert isinstance(operand, Register), operand
        name = operand.name
        if name not in self.kernel.registers:
            return self.special(name, dtype)
        found = self._read(name, dtype)
        return f"~{found}" if operand.negated else found

    def _read(self, name: str, dtype: str) -> str:
        known = self.current.get(name)
        if known is None:
            known = self.current[name] = {}
            self._load(name, known)
        if dtype in known:
            return known[dtype]
        have_dtype, have = next(iter(known.items()))
        if dtype == "b1" or have_dtype == "b1":
            raise unknown(self.instruction)
        size, wanted = int(have_dtype[1]), int(dtype[1])
        new = f"{_python(name)}_{dtype}"
        if size == wanted:
            self.line(f"{new} = {have}.view('{dtype}')")
        else:  # the low bytes, or more of them: what is above is zero, or the sign for signed types
            via = f"{'i' if dtype[0] == 'i' and wanted > size else 'u'}{wanted}"
            base = self._read(name, f"{'i' if via[0] == 'i' else 'u'}{size}")
            self.line(f"{new} = {base}.astype('{via}')" + ("" if via == dtype else f".view('{dtype}')"))
        known[dtype] = new
        return new

    def _load(self, name: str, known: dict[str, str]) -> None:
        """First use of a register that another block wrote."""
        dtype = canonical(self.kernel.registers[name])
        new = f"{_python(name)}_{dtype}"
        self.line(f"{new} = m.read(R, {self.slot(name)}, '{dtype}')")
        known[dtype] = new

    def slot(self, name: str) -> int:
        """Index of a register among those of the machine."""
        return self.flow.bits[name].bit_length() - 1

    def set(self, operand: Any, dtype: str, expression: str) -> None:
        """Write a register."""
        if isinstance(operand, Symbol):  # _
            self.line(expression)
            return
        if isinstance(operand, Vector):  # one value to {low, high}
            self.unpacked(operand, dtype, expression)
            return
        name = operand.name
        if dtype != "b1":
            size, wanted = self.bytes_of(name), int(dtype[1])
            if wanted < size:
                kind = dtype[0] if dtype[0] in "iu" else "u"
                if dtype[0] not in "iu":
                    expression = f"({expression}).view('u{wanted}')"
                dtype = f"{kind}{size}"
                expression = f"({expression}).astype('{dtype}')"
        new = f"{_python(name)}_{dtype}"
        guard = self.instruction.predicate
        if guard is not None and self._may_have_a_value(name):
            old = self._read(name, dtype)
            expression = f"where({self.use(guard, 'b1')}, {expression}, {old})"
        self.line(f"{new} = {expression}")
        self.current[name] = {dtype: new}
        self.written.add(name)

    def alias(self, operand: Register, source: Register) -> bool:
        """Let a register be another one's value, where that can be."""
        if self.instruction.predicate is not None or source.name not in self.kernel.registers:
            return False
        if self.bytes_of(operand.name) != self.bytes_of(source.name) or source.negated:
            return False
        self._read(
            source.name,
            next(iter(self.current.get(source.name) or {canonical(self.kernel.registers[source.name]): 0})),
        )
        pairs = dict(self.current[source.name])
        self.current[operand.name] = {}
        for dtype, name in pairs.items():
            new = f"{_python(operand.name)}_{dtype}"
            self.line(f"{new} = {name}")
            self.current[operand.name][dtype] = new
        self.written.add(operand.name)
        return True

    def _may_have_a_value(self, name: str) -> bool:
        return name in self.current or bool(self.block.reached & self.flow.bits[name])

    def immediate(self, operand: Immediate, dtype: str) -> str:
        """A literal as an array."""
        if dtype == "b1":
            return self.constant(bool(operand.value), "b1")
        size = int(dtype[1])
        if operand.kind == "int":
            if dtype[0] == "f" and dtype != "f2":
                return self.constant(float(operand.value), dtype)
            bits = operand.value % 2 ** (8 * size)
        else:
            bits = operand.value
            if operand.kind == "f64" and dtype == "f4":
                return self.constant(np.uint64(bits).view("f8"), "f4")
            if dtype[0] != "f" and size != (4 if operand.kind == "f32" else 8):
                raise unknown(self.instruction)
        array = np.frombuffer(bits.to_bytes(size, "little"), dtype).reshape(1, 1)
        return self.object(("constant", array.tobytes(), dtype), array)

    def symbol(self, operand: Symbol, dtype: str) -> str:
        """The address of a variable in its own space."""
        for table in (self.kernel.shared, self.kernel.local):
            if operand.name in table:
                return self.constant(table[operand.name] + operand.offset, dtype)
        if operand.name in self.kernel.constants:
            return self.temporary(f"m.constant_address({operand.name!r}, {operand.offset}, '{dtype}')")
        if operand.name in self.kernel.parameters:
            return self.constant(self.kernel.parameters[operand.name][0] + operand.offset, dtype)
        if operand.name == "WARP_SZ":
            return self.constant(32, dtype)
        raise PTXError(f"{self.kernel.name}, PTX line {self.instruction.line}: no variable {operand.name}")

    def special(self, name: str, dtype: str) -> str:
        """A special register."""
        found = self.temporary(f"m.special[{name!r}]")
        self.object(("special", name), None)
        return found if dtype == "u4" else f"{found}.astype('{dtype}')"

    def packed(self, operand: Vector, dtype: str) -> str:
        """Several registers side by side in one."""
        size = int(dtype[1]) // len(operand.items)
        parts = ", ".join(
            self.constant(0, f"u{size}") if isinstance(item, Symbol) else self.use(item, f"u{size}")
            for item in operand.items
        )
        return self.temporary(f"pack('u{dtype[1]}', {parts}){_view(dtype)}")

    def unpacked(self, operand: Vector, dtype: str, expression: str) -> None:
        """One value in several registers."""
        size = int(dtype[1]) // len(operand.items)
        whole = self.temporary(f"({expression}).view('u{dtype[1]}')")
        for place, item in enumerate(operand.items):
            if isinstance(item, Symbol):
                continue
            shift = self.constant(8 * size * place, f"u{dtype[1]}")
            part = whole if place == 0 else f"({whole} >> {shift})"
            self.set(item, f"u{size}", f"{part}.astype('u{size}')")

    def address(self, operand: Address, dtype: str) -> str:
        """The sum of an address as ``u8`` or ``u4``."""
        base = self.use(operand.base, dtype)
        if not operand.offset:
            return base
        return f"add({base}, {self.constant(operand.offset % 2 ** (8 * int(dtype[1])), dtype)})"

    # The whole block.

    def emit(self, name: str) -> str:
        """The source of its function."""
        flow, block = self.flow, self.block
        jump = block.instructions and block.instructions[-1].name in ("bra", "ret", "exit", "trap")
        last_use: dict[str, int] = {}
        for place, i in enumerate(block.instructions):
            for register in (*reads(i), *writes(i)):
                last_use[register] = place
        ends: dict[int, list[str]] = {}
        for register, place in last_use.items():
            if not block.live_out & flow.bits.get(register, 0):
                ends.setdefault(place, []).append(register)
        flying, result = block.flying, ""
        counts: dict[str, int] = {}
        for place, i in enumerate(block.instructions):
            self.instruction = i
            counts[i.opcode] = counts.get(i.opcode, 0) + 1
            self._checks(i, flying)
            flying = flow.flying_after(i, flying)
            if place == len(block.instructions) - 1 and jump:
                if i.predicate is not None:
                    result = self.use(i.predicate, "b1")
                break
            handler = HANDLERS.get(i.name)
            if handler is None:
                raise unknown(i)
            try:
                handler(self, i)
            except (KeyError, IndexError, AttributeError, StopIteration, TypeError) as error:
                raise unknown(i) from error
            self._passes(i)
            if place in ends and place < len(block.instructions) - 1:
                dead = {n for r in ends[place] for n in self.current.get(r, {}).values()}
                if dead:
                    self.line(f"del {', '.join(sorted(dead))}")
                for register in ends[place]:
                    self.current.pop(register, None)
        stores = []
        for register in sorted(self.written):
            if block.live_out & flow.bits.get(register, 0):
                value = self._read(register, canonical(self.kernel.registers[register]))
                stores.append((self.slot(register), value))
        plain = "; ".join(f"R[{slot}] = {value}" for slot, value in stores)
        masked = "; ".join(f"R[{slot}] = merge(k, {value}, R[{slot}])" for slot, value in stores)
        if stores:
            self.lines += ["if k is None:", f"    {plain}", "else:", f"    {masked}"]
        self.lines.append(f"return {result or 'None'}")
        body = "\n".join(f"    {line}" for line in self.lines)
        return f"def {name}(m, R, k):\n{body}\n"

    def _tracked(self, name: str) -> bool:
        return bool(self.flow.tracked & self.flow.bits.get(name, 0))

    def _passes(self, i: Instruction) -> None:
        """Whether what an instruction wrote has a value, where it may not."""
        written = [n for n in writes(i) if self._tracked(n)]
        if not written:
            return
        sources = [] if needs_values(i) else [n for n in reads(i) if self._tracked(n)]
        slots = [str(self.slot(n)) for n in sources]
        lanes = "None"
        if i.name == "shfl":
            by, clamp = (self.use(o, "u4") for o in i.operands[2:4])
            lanes = f"('{i.modifiers[1]}', {by}, {clamp})"
        elif i.name == "selp":
            pair = [
                self.slot(o.name) if _is_register(o) and self._tracked(o.name) else -1
                for o in i.operands[1:3]
            ]
            lanes = f"({self.use(i.operands[3], 'b1')}, {pair[0]}, {pair[1]})"
            chosen = i.operands[3].name
            slots = [str(self.slot(chosen))] if self._tracked(chosen) else []
        for name in written:
            self.line(f"m.wrote({self.slot(name)}, {self.mask()}, [{', '.join(slots)}], {lanes})")

    def _checks(self, i: Instruction, flying: int) -> None:
        """Of registers that may be unwritten, or the destination of a product in flight."""
        read = set(reads(i))
        if needs_values(i):
            looked = read - set(writes(i)) if accumulates(i) else read  # those of a sum only where it is one
            if doubtful := [n for n in sorted(looked) if self._tracked(n)]:
                guard = i.predicate is not None and not self._tracked(i.predicate.name)
                slots = ", ".join(str(self.slot(n)) for n in doubtful)
                self.line(f"m.written({self.site()}, {self.mask() if guard else 'k'}, {slots})")
        if flying and not accumulates(i):
            touched = (read | set(writes(i))) & set(self.flow.names(flying))
            if touched:
                slots = ", ".join(str(self.slot(n)) for n in sorted(touched))
                self.line(f"m.products.landed({self.site()}, {self.mask()}, {slots})")


def _is_register(operand: Any) -> bool:
    return isinstance(operand, Register)


def canonical(kind: str) -> str:
    """NumPy's type that a register has between blocks."""
    return {"pred": "b1", "f32": "f4", "f64": "f8"}.get(kind) or f"u{BYTES[kind]}"


def _view(dtype: str) -> str:
    return "" if dtype[0] == "u" else f".view('{dtype}')"


@functools.cache
def _python(register: str) -> str:
    return "r" + "".join(c if c.isalnum() else f"_{ord(c)}_" for c in register.lstrip("%"))


@function
def pack(dtype: str, *parts: np.ndarray) -> np.ndarray:
    """Values side by side, the first lowest."""
    out, size = parts[0].astype(dtype), 8 * parts[0].itemsize
    for place, part in enumerate(parts[1:], 1):
        out = out | (part.astype(dtype) << np.array(size * place, dtype))
    return out


class Program:
    """A kernel ready to run: a function for each block.

    Args:
        flow: of the kernel.

    Attributes:
        functions: of the blocks.
        sites: instructions that can be at fault.
        source: the Python that the functions were made of.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow, self.kernel = flow, flow.kernel
        self.sites: list[Instruction] = []
        texts, namespaces = [], []
        for index in range(len(flow.blocks)):
            emitter = Emitter(flow, index, self.sites)
            texts.append(emitter.emit(f"b{index}"))
            namespaces.append(emitter.constants)
        self.source = "\n".join(texts)
        self.functions = []
        for index, (text, constants) in enumerate(zip(texts, namespaces, strict=True)):
            space = {**FUNCTIONS, **constants}
            exec(compile(text, f"<{self.kernel.name} block {index}>", "exec"), space)
            self.functions.append(space[f"b{index}"])
