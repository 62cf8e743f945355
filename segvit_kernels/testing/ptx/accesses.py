"""Loads, stores, atomics and copies."""

from __future__ import annotations

import numpy as np

from segvit_kernels.testing.ptx.floating import from_bf16, join_pair, round_bf16, split_pair
from segvit_kernels.testing.ptx.memory import spread
from segvit_kernels.testing.ptx.parser import BYTES, Address, Immediate, Instruction, Symbol, Vector
from segvit_kernels.testing.ptx.shared import COPIED, Recent
from segvit_kernels.testing.ptx.translate import FUNCTIONS, NUMPY, Emitter, function, instruction, unknown

_SPACES = {
    "global": "memory",
    "shared": "shared",
    "shared::cta": "shared",
    "local": "local",
    "const": "memory",
}


def _space(i: Instruction) -> str:
    """The machine's object for the instruction's space."""
    return next((_SPACES[m] for m in i.modifiers if m in _SPACES), "generic")


def width(i: Instruction) -> tuple[int, int]:
    """Bytes of a value, and how many values a load or store moves."""
    count = next((int(m[1:]) for m in i.modifiers if m in ("v2", "v4", "v8")), 1)
    kind = i.modifiers[-1]
    if kind not in BYTES or kind in ("b128", "pred"):
        raise unknown(i)
    return BYTES[kind], count


def shared_width(i: Instruction) -> int:
    """Bytes of its access where it may touch shared memory, else 0."""
    spaces = {m for m in i.modifiers if m in ("global", "local", "param", "const")}
    if i.name in ("ld", "st", "atom", "red"):
        return 0 if spaces and "shared" not in i.modifiers else int(np.prod(width(i)))
    if i.name == "cp" and i.modifiers[0] == "async" and len(i.operands) >= 3:
        return i.operands[2].value
    return 16


def _address(emit: Emitter, i: Instruction, operand: Address) -> str:
    """As the space wants it."""
    space = _space(i)
    base = operand.base
    if isinstance(base, (Symbol, Immediate)):
        return emit.address(operand, "u8")
    narrow = space in ("shared", "local") and emit.bytes_of(base.name) == 4
    return emit.address(operand, "u4" if narrow else "u8")


@instruction("ld", "ldu")
def _ld(emit: Emitter, i: Instruction) -> None:
    size, count = width(i)
    kind, destination, source = i.modifiers[-1], i.operands[0], i.operands[1]
    items = destination.items if isinstance(destination, Vector) else (destination,)
    dtype = NUMPY[kind] if NUMPY[kind][0] == "i" else f"u{size}"
    if "param" in i.modifiers:
        for place, item in enumerate(items):
            if isinstance(source.base, Symbol):
                offset = emit.kernel.parameters[source.base.name][0] + source.offset + place * size
                found = f"m.parameter({offset}, '{dtype}')"
            else:
                base, offset = emit.use(source.base, "u8"), source.offset + place * size
                found = f"m.parameters_at({emit.site()}, {base}, {offset}, '{dtype}', {emit.mask()})"
            emit.set(item, dtype, found)
        return
    if count != len(items):
        raise unknown(i)
    if _space(i) == "shared":  # its offset apart: what is known of the base holds for all of them
        where = _address(emit, i, Address(source.base))
        call = f"m.shared.load({emit.site()}, {where}, {size}, {count}, {emit.mask()}, {source.offset})"
    else:
        where = _address(emit, i, source)
        call = f"m.{_space(i)}.load({emit.site()}, {where}, {size}, {count}, {emit.mask()})"
    view = f".view('{dtype}')" if dtype[0] == "i" else ""
    if count == 1:
        emit.set(items[0], dtype, f"{call}[0]{view}")
        return
    found = emit.temporary(call)
    for place, item in enumerate(items):
        emit.set(item, dtype, f"{found}[{place}]{view}")


@instruction("st")
def _st(emit: Emitter, i: Instruction) -> None:
    size, count = width(i)
    where, source = i.operands[0], i.operands[1]
    items = source.items if isinstance(source, Vector) else (source,)
    if count != len(items):
        raise unknown(i)
    values = ", ".join(emit.use(item, f"u{size}") for item in items)
    place = _address(emit, i, where)
    emit.line(f"m.{_space(i)}.store({emit.site()}, {place}, [{values}], {size}, {emit.mask()})")


# Atomics.


def _half_add(bf16: bool) -> object:
    def add(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        a, b = split_pair(old, bf16), split_pair(new, bf16)
        return join_pair(a[0] + b[0], a[1] + b[1], bf16)

    return add


_OPERATIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "cas": lambda old, expected, new: np.where(old == expected, new, old),
    "inc": lambda old, top: np.where(old >= top, np.uint32(0), old + np.uint32(1)),
    "dec": lambda old, top: np.where((old == 0) | (old > top), top, old - np.uint32(1)),
}
FUNCTIONS["OPERATIONS"] = _OPERATIONS
FUNCTIONS["HALVES"] = {
    "f16x2": _half_add(False),
    "bf16x2": _half_add(True),
    "f16": lambda old, new: (
        (old.view("f2").astype("f4") + new.view("f2").astype("f4")).astype("f2").view("u2")
    ),
    "bf16": lambda old, new: round_bf16(from_bf16(old) + from_bf16(new)),
}


@instruction("atom", "red")
def _atom(emit: Emitter, i: Instruction) -> None:
    kind = i.modifiers[-1]
    operation = next((m for m in i.modifiers if m in _OPERATIONS), None)
    if operation is None or kind == "b128":
        raise unknown(i)
    returns = i.name == "atom"
    address, *given = i.operands[1:] if returns else i.operands
    given = given[: 2 if operation == "cas" else 1]
    count = next((int(m[1:]) for m in i.modifiers if m in ("v2", "v4", "v8")), 1)
    half = kind in FUNCTIONS["HALVES"]
    dtype = ("u4" if kind.endswith("x2") else "u2") if half else NUMPY[kind]
    if half and operation != "add":
        raise unknown(i)
    what = f"HALVES[{kind!r}]" if half else f"OPERATIONS[{operation!r}]"
    where, mask = _address(emit, i, address), emit.mask()
    outs = []
    for place in range(count):
        values = [v.items[place] if isinstance(v, Vector) else v for v in given]
        step = int(dtype[1]) * place
        at = f"({where} + {emit.constant(step, 'u8')})" if step else where
        arguments = ", ".join(emit.use(v, dtype) for v in values)
        rest = f"[{arguments}], '{dtype}', {what}, {mask}, m.shape"
        outs.append(emit.temporary(f"m.{_space(i)}.atomic({emit.site()}, {at}, {rest})"))
    if returns:
        destination = i.operands[0]
        items = destination.items if isinstance(destination, Vector) else (destination,)
        for item, out in zip(items, outs, strict=True):
            emit.set(item, dtype, out)


# Matrices of 8 × 8 halves.


def _matrices(i: Instruction) -> int:
    if "m8n8" not in i.modifiers or i.modifiers[-1] != "b16":
        raise unknown(i)
    return next(int(m[1]) for m in i.modifiers if m in ("x1", "x2", "x4"))


@instruction("ldmatrix")
def _ldmatrix(emit: Emitter, i: Instruction) -> None:
    count, site = _matrices(i), emit.site()
    mask, where = emit.mask(), _address(emit, i, i.operands[1])
    emit.line(f"m.together({site}, {mask})")
    found = emit.temporary(f"load_matrices(m, {site}, {where}, {count}, {'trans' in i.modifiers}, {mask})")
    items = i.operands[0].items if isinstance(i.operands[0], Vector) else (i.operands[0],)
    for place, item in enumerate(items):
        emit.set(item, "u4", f"{found}[{place}]")


@function
def load_matrices(m, site: int, address: np.ndarray, count: int, transposed: bool, mask) -> list[np.ndarray]:
    """Lane 8 i + r has the address of row r of matrix i; 16 bytes each."""
    shared = m.shared
    address, given, rows = _matrix_rows(m, site, address, count, mask)
    shared.note_read(site, address, 16, given, shared.thread)
    if shared.traffic:
        shared.traffic.of_shared(address, 16, given, write=False)
    index = shared.offsets[16] + (address >> 4)
    data = shared.views[16].take(index)  # (blocks, threads): a row of each lane
    rows = data.view("u2").reshape(shared.blocks, -1, 4, 8, 8)[
        :, :, :count
    ]  # block, warp, matrix, row, column
    if transposed:
        rows = rows.swapaxes(3, 4)
    pairs = np.ascontiguousarray(rows.transpose(2, 0, 1, 3, 4)).view("u4")  # matrix, block, warp, 8, 4
    return list(pairs.reshape(count, shared.blocks, -1))


def _matrix_rows(m, site: int, address: np.ndarray, count: int, mask) -> tuple:
    shared = m.shared
    if address.shape[1] == 1:
        address = spread(address, (address.shape[0], m.threads))
    lanes = (np.arange(m.threads) % 32 < 8 * count)[None]
    given = lanes if mask is None else mask & lanes
    address, given = shared.place(site, address, 16, spread(given, (shared.blocks, m.threads)))
    return address, given, None


@instruction("stmatrix")
def _stmatrix(emit: Emitter, i: Instruction) -> None:
    _matrices(i)
    site = emit.site()
    items = i.operands[1].items if isinstance(i.operands[1], Vector) else (i.operands[1],)
    values = ", ".join(emit.use(item, "u4") for item in items)
    mask, where = emit.mask(), _address(emit, i, i.operands[0])
    emit.line(f"m.together({site}, {mask})")
    emit.line(f"store_matrices(m, {site}, {where}, [{values}], {'trans' in i.modifiers}, {mask})")


@function
def store_matrices(m, site: int, address: np.ndarray, values: list, transposed: bool, mask) -> None:
    """The inverse of :func:`load_matrices`."""
    shared, count = m.shared, len(values)
    address, given, _ = _matrix_rows(m, site, address, count, mask)
    shape = (shared.blocks, m.threads)
    fragments = np.stack([spread(v, shape) for v in values])
    pairs = np.ascontiguousarray(fragments).view("u2").reshape(count, shared.blocks, -1, 8, 8)
    if transposed:
        pairs = pairs.swapaxes(3, 4)
    rows = np.zeros((shared.blocks, m.threads // 32, 4, 8, 8), "u2")
    rows[:, :, :count] = pairs.transpose(1, 2, 0, 3, 4)
    data = rows.reshape(shared.blocks, m.threads * 8).view("c16")
    shared.write(site, address, data, 16, given, shared.thread)


# Asynchronous copies by threads.


@instruction("cp")
def _cp(emit: Emitter, i: Instruction) -> None:
    words = i.modifiers
    if words[:2] == ("async", "bulk"):
        raise unknown(i)
    if words[1] == "commit_group":
        emit.line(f"m.copies.commit({emit.mask()})")
    elif words[1] == "wait_group":
        emit.line(f"m.copies.wait({i.operands[0].value}, {emit.mask()})")
    elif words[1] == "wait_all":
        emit.line(f"m.copies.commit({emit.mask()})")
        emit.line(f"m.copies.wait(0, {emit.mask()})")
    elif words[1] in ("ca", "cg"):
        destination, source, size, *rest = i.operands
        narrow = (
            emit.bytes_of(destination.base.name) == 4 if not isinstance(destination.base, Symbol) else False
        )
        to = emit.address(destination, "u4" if narrow else "u8")
        given = "None"
        if (rest and not any("cache_hint" in w for w in words)) or len(rest) > 1:
            given = emit.use(rest[0], "u4")
        origin = emit.address(source, "u8")
        emit.line(f"m.copies.start({emit.site()}, {to}, {origin}, {size.value}, {given}, {emit.mask()})")
    else:
        raise unknown(i)


class Copies:
    """Copies from global to shared memory that threads have started.

    The data are there at once; the shadow says that they are in flight until their thread has waited.
    """

    def __init__(self, machine) -> None:
        self.machine = machine
        self.commits = np.zeros((1, 1), "i8")
        self.flying: list[
            tuple[np.ndarray, Recent, np.ndarray, np.ndarray]
        ] = []  # entries, range, group, active

    def start(self, site: int, to: np.ndarray, source: np.ndarray, size: int, given, mask) -> None:
        """One copy of each thread; bytes behind ``given`` are zero."""
        m = self.machine
        shared, shape = m.shared, m.shape
        full = None if mask is None else spread(mask, shape)
        if given is None:
            values = m.memory.load(site, source, size, 1, mask)[0]
        else:
            values = np.zeros(shape, NUMPY_BYTES[size])
            for amount in np.unique(np.minimum(given, np.uint32(size))):
                if amount == 0:
                    continue
                some = spread(given == amount, shape)
                some = some if full is None else some & full
                part = self._part(site, source, int(amount), size, some)
                values = np.where(some, part, values)
        address, where = shared.place(site, to, size, full)
        if address.shape[1] == 1:
            address = spread(address, shape)
        data = spread(values, shape)
        found = shared.write(site, address, data, size, where, shared.thread, pending=True)
        if found is not None:
            active = np.ones(shape, bool) if where is None else where
            self.flying.append((*found, spread(self.commits, shape), active))

    def _part(self, site: int, source: np.ndarray, amount: int, size: int, mask) -> np.ndarray:
        if amount == size:
            return self.machine.memory.load(site, source, size, 1, mask)[0]
        out = np.zeros((*np.broadcast_shapes(source.shape, mask.shape), size), "u1")
        for byte in range(amount):
            out[..., byte] = self.machine.memory.load(site, source + np.uint64(byte), 1, 1, mask)[0]
        return out.view(NUMPY_BYTES[size])[..., 0]

    def commit(self, mask) -> None:
        """What was started is a group."""
        self.commits = self.commits + (1 if mask is None else mask.astype("i8"))

    def wait(self, newest: int, mask) -> None:
        """All groups but the ``newest`` ones have landed, for the threads that wait."""
        shared, left = self.machine.shared, []
        shared.now += 1
        for entries, recent, group, active in self.flying:
            done = active & (group < self.commits - newest)
            if mask is not None:
                done = done & mask
            if done.any():
                landed = entries[done]
                tags = np.uint64(shared.now << 16 | COPIED) | spread(shared.thread, active.shape)[done]
                shared.written[landed] = tags[:, None]
                active = active & ~done
            if active.any():
                left.append((entries, recent, group, active))
            else:
                recent.time = shared.now
        self.flying = left


NUMPY_BYTES = {4: "u4", 8: "u8", 16: "c16"}
