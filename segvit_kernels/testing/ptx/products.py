"""Products on tensor cores: mma.sync on fragments, wgmma on descriptors of shared memory.

Products of float16 and bfloat16 are exact in float32, those of TF32 too; sums are float32's.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from segvit_kernels.testing.ptx.parser import Immediate, Instruction, Vector
from segvit_kernels.testing.ptx.shared import COPIED, PENDING
from segvit_kernels.testing.ptx.translate import Emitter, function, instruction, unknown

_TF32 = np.uint32(0xFFFFE000)


def _floats(bits: np.ndarray, kind: str) -> np.ndarray:
    """Registers (..., ) as float32 (..., values): two halves, or one TF32 number."""
    bits = np.ascontiguousarray(bits)
    if kind == "tf32":
        return (bits & _TF32).view("f4")[..., None]
    halves = bits.view("u2").reshape(*bits.shape, 2)
    if kind == "bf16":
        return (halves.astype("u4") << np.uint32(16)).view("f4")
    return halves.view("f2").astype("f4")


def _warps(registers: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """(registers, warps of all blocks, 8, 4)."""
    out = np.empty((len(registers), *shape), "u4")
    for place, register in enumerate(registers):
        out[place] = register
    return out.reshape(len(registers), -1, 8, 4)


@function
def left_fragments(registers: list[np.ndarray], kind: str, shape: tuple[int, int]) -> np.ndarray:
    """A of 16 × k: (warps, 16, k) float32."""
    values = _floats(_warps(registers, shape), kind)  # register, warp, g, t, value
    n, w = len(registers), values.shape[1]
    parts = values.reshape(n // 2, 2, w, 8, 4, -1)  # column part, row part, warp, g, t, value
    return parts.transpose(2, 1, 3, 0, 4, 5).reshape(w, 16, -1)


@function
def right_fragments(registers: list[np.ndarray], kind: str, shape: tuple[int, int]) -> np.ndarray:
    """B of k × 8: (warps, k, 8) float32."""
    values = _floats(_warps(registers, shape), kind)  # part of k, warp, n, t, value
    w = values.shape[1]
    return values.transpose(1, 0, 3, 4, 2).reshape(w, -1, 8)


@function
def multiply_fragments(a: list, b: list, c: list, kind: str, m: Any) -> list[np.ndarray]:
    """One mma.sync with float32 sums: the four registers of D."""
    shape = m.shape
    left, right = left_fragments(a, kind, shape), right_fragments(b, kind, shape)
    product = np.matmul(left, right)  # warp, 16, 8
    parts = product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)  # row part, column, warp, g, t
    parts = parts.reshape(4, *shape)
    return [part + register for part, register in zip(parts, c, strict=True)]


_SHAPES = {
    ("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "f16"), ("m16n8k8", "bf16"), ("m16n8k8", "tf32"),
    ("m16n8k4", "tf32"),
}  # fmt: skip


@instruction("mma")
def _mma(emit: Emitter, i: Instruction) -> None:
    shape, kinds = i.modifiers[2], i.modifiers[-4:]
    if i.modifiers[0] != "sync" or (shape, kinds[1]) not in _SHAPES or kinds[1] != kinds[2]:
        raise unknown(i)
    if i.modifiers[3:5] != ("row", "col") or len(i.modifiers) != 9:
        raise unknown(i)
    emit.line(f"m.together({emit.site()}, {emit.mask()})")
    d, a, b, c = (o.items for o in i.operands)
    left, right = (", ".join(emit.use(x, "u4") for x in items) for items in (a, b))
    if kinds[0] == kinds[3] == "f32":
        sums = ", ".join(emit.use(x, "f4") for x in c)
        found = emit.temporary(f"multiply_fragments([{left}], [{right}], [{sums}], '{kinds[1]}', m)")
        for place, register in enumerate(d):
            emit.set(register, "f4", f"{found}[{place}]")
    elif kinds[0] == kinds[3] == "f16":
        sums = ", ".join(emit.use(x, "u4") for x in c)
        found = emit.temporary(f"multiply_into_halves([{left}], [{right}], [{sums}], m)")
        for place, register in enumerate(d):
            emit.set(register, "u4", f"{found}[{place}]")
    else:
        raise unknown(i)


@function
def multiply_into_halves(a: list, b: list, c: list, m: Any) -> list[np.ndarray]:
    """One mma.sync with float16 sums."""
    from segvit_kernels.testing.ptx.floating import join_pair, split_pair

    sums = [half for register in c for half in split_pair(register, False)]
    found = multiply_fragments(a, b, sums, "f16", m)
    return [join_pair(found[2 * k], found[2 * k + 1], False) for k in range(2)]


# wgmma.


@instruction("wgmma")
def _wgmma(emit: Emitter, i: Instruction) -> None:
    what, site = i.modifiers[0], emit.site()
    emit.line(f"m.together_group({site}, {emit.mask()})")
    if what == "fence":
        emit.line(f"m.products.fence({emit.mask()})")
    elif what == "commit_group":
        emit.line(f"m.products.commit({emit.mask()})")
    elif what == "wait_group":
        emit.line(f"m.products.wait({i.operands[0].value}, {emit.mask()})")
    elif what == "mma_async":
        _mma_async(emit, i, site)
    else:
        raise unknown(i)


def _mma_async(emit: Emitter, i: Instruction, site: int) -> None:
    shape, sums, kind, other = i.modifiers[3:7]
    k = {"f16": 16, "bf16": 16, "tf32": 8}.get(kind)
    if (
        k is None
        or other != kind
        or sums != "f32"
        or not shape.startswith("m64n")
        or not shape.endswith(f"k{k}")
    ):
        raise unknown(i)
    columns = int(shape[4:].split("k")[0])
    d, a, b, scale_d, scale_a, scale_b, *turned = i.operands
    if scale_a.value != 1 or scale_b.value != 1:
        raise unknown(i)
    from_registers = isinstance(a, Vector)
    transposed = [bool(t.value) for t in turned]
    transposed = ([False] if from_registers else transposed[:1] or [False]) + (transposed[-1:] or [False])
    accumulate = (
        emit.use(scale_d, "b1")
        if not isinstance(scale_d, Immediate)
        else emit.constant(bool(scale_d.value), "b1")
    )
    left = f"[{', '.join(emit.use(x, 'u4') for x in a.items)}]" if from_registers else emit.use(a, "u8")
    known = isinstance(scale_d, Immediate) and not scale_d.value
    olds = (
        "None"
        if known
        else "["
        + ", ".join(emit.use(x, "f4") if emit._may_have_a_value(x.name) else "None" for x in d.items)
        + "]"
    )
    slots = emit.object(("slots", i.line, id(i)), [emit.slot(x.name) for x in d.items])
    found = emit.temporary(
        f"m.products.start({site}, {slots}, {left}, {emit.use(b, 'u8')}, {olds}, {accumulate}, '{kind}', "
        f"{columns}, {transposed[0]}, {transposed[1]}, {emit.mask()})"
    )
    for place, register in enumerate(d.items):
        emit.set(register, "f4", f"{found}[{place}]")


@functools.cache
def _offsets(
    rows: int, depth: int, size: int, transposed: bool, swizzle: int, leading: int, stride: int
) -> np.ndarray:
    """Bytes from the start of an operand to its elements (rows, depth), before the swizzle.

    ``rows`` are those of A or the columns of B, ``depth`` is k. Matrix descriptors as in the PTX manual: with
    the depth contiguous, rows of the swizzle's width (16 bytes without one) in groups of 8, groups ``stride``
    apart; transposed, the rows contiguous in lines of the swizzle's width, 8 of k a group.
    """
    r, c = np.arange(rows)[:, None], np.arange(depth)[None]
    width = swizzle or 16
    if not transposed:
        byte = c * size
        column = byte if swizzle else byte // 16 * leading + byte % 16
        return r // 8 * stride + r % 8 * width + column
    byte = r * size
    if swizzle:
        return byte // width * leading + byte % width + c % 8 * width + c // 8 * stride
    return byte // 16 * stride + byte % 16 + c % 8 * 16 + c // 8 * leading


@functools.lru_cache(4096)
def _pattern(
    rows: int, depth: int, size: int, transposed: bool, swizzle: int, leading: int, stride: int, start: int,
    granule: int,
) -> tuple[np.ndarray, np.ndarray, int, int]:  # fmt: skip
    """A matrix's elements, the entries of the shadow that it covers, and its first and last byte."""
    address = start + _offsets(rows, depth, size, transposed, swizzle, leading, stride)
    if swizzle:
        address = address ^ ((address >> 7 & {128: 7, 64: 3, 32: 1}[swizzle]) << 4)
    lines = np.unique(address >> 4)  # all of 16 bytes
    per = 16 // granule
    cells = (lines[:, None] * per + np.arange(per)).ravel()
    return address >> (size.bit_length() - 1), cells, int(lines[0]) * 16, int(lines[-1]) * 16 + 16


_WIDTHS = {0: 0, 1: 128, 2: 64, 3: 32}


class Products:
    """Products by warp groups, in flight until their warps have waited.

    The sums are in their registers at once; the machine knows until the wait that nobody may look.
    """

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        m = machine
        self.commits = np.zeros((m.blocks, m.warps), "i8")
        self.flying: list[dict[str, Any]] = []

    def _active(self, mask: np.ndarray | None) -> np.ndarray:
        m = self.machine
        if mask is None:
            return np.ones((m.blocks, m.warps), bool)
        return np.broadcast_to(mask, m.shape)[:, ::32]

    def fence(self, mask: np.ndarray | None) -> None:
        """Registers and products in order."""

    def commit(self, mask: np.ndarray | None) -> None:
        """What was started is a group."""
        self.commits = self.commits + self._active(mask)

    def wait(self, newest: int, mask: np.ndarray | None) -> None:
        """All groups but the ``newest`` have ended."""
        here, left, shared = self._active(mask), [], self.machine.shared
        shared.now += 1
        for product in self.flying:
            done = product["active"] & here & (product["group"] < self.commits - newest)
            product["active"] = product["active"] & ~done
            ended = ~product["active"].any(axis=1) & done.any(axis=1)
            for entries, blocks, recent in product["reads"]:
                shared.read[entries[ended[blocks]]] = np.uint64(shared.now << 16 | 0xFFFF)
                if not product["active"].any():
                    recent.time = shared.now
            if product["active"].any():
                left.append(product)
        self.flying = left
        # What still flies reads on where others have ended.
        for product in left:
            for entries, blocks, _ in product["reads"]:
                chosen = entries[product["active"].any(axis=1)[blocks]]
                shared.read[chosen] = PENDING | np.uint64(shared.now << 16 | 0xFFFF)

    def landed(self, site: int, mask: np.ndarray | None, *slots: int) -> None:
        """Fails if a register is the destination of a product in flight."""
        if not self.flying:
            return
        here, wanted = self._active(mask), set(slots)
        for product in self.flying:
            if wanted & product["slots"] and (product["active"] & here).any():
                detail = "a register of a product in flight: no wgmma.wait_group between"
                lanes = np.repeat(product["active"] & here, 32, axis=1)
                self.machine.fail(site, "in flight", detail, lanes)

    def start(
        self, site: int, slots: list[int], a: Any, b: np.ndarray, olds: list | None, accumulate: np.ndarray,
        kind: str, columns: int, a_transposed: bool, b_transposed: bool, mask: np.ndarray | None,
    ) -> list[np.ndarray]:  # fmt: skip
        """One product; the new values of its registers."""
        m = self.machine
        groups, depth = m.warps // 4, 8 if kind == "tf32" else 16
        reads: list[tuple[np.ndarray, np.ndarray]] = []
        if isinstance(a, list):
            left = left_fragments(a, kind, m.shape).reshape(m.blocks, groups, 64, depth)
        else:
            left = self._operand(site, a, 64, depth, kind, a_transposed, mask, reads)
        right = self._operand(site, b, columns, depth, kind, b_transposed, mask, reads)
        product = np.matmul(left, right.swapaxes(2, 3))  # block, group, 64, columns
        parts = product.reshape(
            m.blocks, groups, 4, 2, 8, columns // 8, 4, 2
        )  # warp, row part, g, tile, t, pair
        parts = parts.transpose(5, 3, 7, 0, 1, 2, 4, 6).reshape(columns // 2, *m.shape)
        if olds is None:
            found = list(parts)
        elif accumulate.any():
            wanted = accumulate if mask is None else accumulate & mask
            m.written(site, wanted, *(s for s in slots if m.tracked & 1 << s))
            found = [
                part if old is None else np.where(accumulate, part + old, part)
                for part, old in zip(parts, olds, strict=True)
            ]
        else:
            found = list(parts)
        self.flying.append(
            {"slots": set(slots), "group": self.commits, "active": self._active(mask), "reads": reads}
        )
        return found

    def _operand(
        self, site: int, descriptor: np.ndarray, rows: int, depth: int, kind: str, transposed: bool,
        mask: np.ndarray | None, reads: list,
    ) -> np.ndarray:  # fmt: skip
        """A matrix in shared memory: (blocks, groups, rows, depth) float32."""
        m, shared = self.machine, self.machine.shared
        size = 32 // depth
        full = np.broadcast_to(descriptor, (descriptor.shape[0], m.threads))[:, ::128]  # one a group
        here = self._active(mask)[:, ::4]
        first = int(full.flat[0]) if mask is None else int(np.broadcast_to(full, here.shape)[here][0])
        high = np.uint64(~0x3FFF & 0xFFFFFFFFFFFFFFFF)
        differs = ((full ^ np.uint64(first)) & high) != 0
        if mask is not None:
            differs = np.broadcast_to(differs, here.shape) & here
        if differs.any():
            raise NotImplementedError("descriptors of one product with different strides")
        swizzle = _WIDTHS.get(first >> 62)
        if swizzle is None or (first >> 49) & 7:
            raise NotImplementedError("descriptors with a base offset")
        leading, stride = ((first >> at & 0x3FFF) * 16 for at in (16, 32))
        start = np.broadcast_to((full & np.uint64(0x3FFF)).astype("i8") * 16, here.shape)
        bits = np.zeros((*here.shape, rows, depth), f"u{size}")
        stored = shared.views[size].reshape(m.blocks, -1)
        for begin in np.unique(start[here]):
            chosen = here & (start == begin)
            pattern = (rows, depth, size, transposed, swizzle, leading, stride, int(begin), shared.granule)
            elements, cells, low, high = _pattern(*pattern)
            if high > shared.size:
                self.machine.fail(site, "out of bounds", "a matrix outside shared memory", None)
            self._note(site, cells, low, high, chosen.any(axis=1), reads)
            values = np.broadcast_to(stored.take(elements, axis=1)[:, None], bits.shape)
            bits = np.where(chosen[:, :, None, None], values, bits) if not chosen.all() else values
        if kind == "tf32":
            return (bits & _TF32).view("f4")
        if kind == "bf16":
            return (bits.astype("u4") << np.uint32(16)).view("f4")
        return bits.view("f2").astype("f4")

    def _note(
        self, site: int, cells: np.ndarray, low: int, high: int, rows: np.ndarray, reads: list
    ) -> None:  # fmt: skip
        """Reads by the asynchronous proxy: what was written before, ordered, and fenced."""
        shared = self.machine.shared
        blocks = np.flatnonzero(rows)
        flat = (blocks[:, None] * (shared.stride // shared.granule) + cells).ravel()
        block = np.repeat(blocks, len(cells))
        w = shared.written[flat]
        if (w == 0).any():
            detail = "a product reads what nothing wrote"
            self._fail(site, "uninitialised shared memory", detail, block, w == 0)
        if (w >= PENDING).any():
            detail = "a product reads what an asynchronous copy may still write"
            self._fail(site, "in flight", detail, block, w >= PENDING)
        # Every warp of the group reads all of it: what each of them knows must hold the writer's time.
        time, other = w >> np.uint64(16), (w & np.uint64(0xFFFF)).astype("i8")
        many = other == 0xFFFF
        warp = np.where(other & 0x8000, other & 0xFFF, (other & 0xFFF) >> 5) % shared.warps
        least = shared.known.min(axis=1)[block, warp]
        known = np.where(many, shared.known.min(axis=(1, 2))[block], least)
        if (time >= known).any():
            detail = "a product reads shared memory without a barrier after its writer"
            self._fail(site, "race", detail, block, time >= known)
        fenced = np.where(many, shared.fenced.min(axis=1)[block], shared.fenced[block, warp])
        bare = time >= np.maximum(fenced, shared.fenced.min(axis=1)[block])
        # Triton 3.6 and CUTLASS have no such fence after cp.async.
        bare &= many | ((other & COPIED) == 0)
        if bare.any():
            detail = "a product reads what was written without fence.proxy.async after it"
            self._fail(site, "missing proxy fence", detail, block, bare)
        recent = shared.note_product(flat, low, high)
        reads.append((flat, block, recent))

    def _fail(self, site: int, kind: str, detail: str, block: np.ndarray, wrong: np.ndarray) -> None:
        lanes = np.zeros(self.machine.shape, bool)
        lanes[block[wrong]] = True
        self.machine.fail(site, kind, detail, lanes)
