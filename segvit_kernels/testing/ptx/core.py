"""The machine: blocks of threads in step, one group of threads that stand at the same place after another.

The group of the lowest rank (:attr:`Flow.ranks`) goes first, so that threads that parted meet again as soon
as they can.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from segvit_kernels.testing.ptx import accesses, arithmetic, floating, products, warps  # noqa: F401
from segvit_kernels.testing.ptx.accesses import Copies, shared_width
from segvit_kernels.testing.ptx.faults import Fault, place
from segvit_kernels.testing.ptx.flow import Flow
from segvit_kernels.testing.ptx.memory import GlobalMemory, reduced
from segvit_kernels.testing.ptx.parser import Kernel, parse
from segvit_kernels.testing.ptx.products import Products
from segvit_kernels.testing.ptx.shared import SharedMemory
from segvit_kernels.testing.ptx.spaces import LOCAL_WINDOW, SHARED_WINDOW, GenericMemory, LocalMemory
from segvit_kernels.testing.ptx.traffic import Counts, Traffic
from segvit_kernels.testing.ptx.translate import Program
from segvit_kernels.testing.ptx.warps import shuffle

SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227}
"""KiB that a block can have, by architecture."""
LANES = 8192
"""Threads that run at once, at least one block's."""
SHARED = 32 << 20
"""Bytes of shared memory of the blocks that run at once, at most."""
STEPS = 5_000_000
"""Basic blocks that a group of blocks of threads may execute before it counts as endless."""


@functools.cache
def program(text: str, kernel: str) -> Program:
    """A kernel of a module, made ready once.

    Raises:
        PTXError: there is none, or an instruction that the machine does not know.
    """
    return Program(Flow(parse(text, kernel)))


@dataclasses.dataclass(frozen=True)
class Span:
    """Memory that a launch may touch: an address, its bytes and a name for messages."""

    address: int
    size: int
    name: str
    keep: Any = None


_NOWHERE = np.zeros((1, 1), bool)


def _and(a: Any, b: Any) -> Any:
    """Of masks, or ``True``."""
    return b if a is True else a if b is True else a & b


class Machine:
    """Blocks of one launch that run at once."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        numbers: np.ndarray,
        parameters: bytes,
        spans: Sequence[Span],
        shared_bytes: int,
        counts: Counts,
        traffic: bool,
        noise: floating.Noise | None,
    ) -> None:
        self.program, self.grid, self.counts, self.noise = program, grid, counts, noise
        self.blocks = len(numbers)
        self.own_threads = int(np.prod(block))
        self.threads = -(-self.own_threads // 32) * 32
        self.warps = self.threads // 32
        self.shape = (self.blocks, self.threads)
        self.numbers = numbers
        self._parameters, self._parameter_arrays = parameters, {}
        self._constants: dict[str, np.ndarray] = {
            name: np.frombuffer(bytearray(data.ljust(-(-len(data) // 16) * 16 + 16, b"\0")), "u1")
            for name, data in program.kernel.constants.items()
        }
        regions = [(s.address, s.size, s.keep, True, s.name) for s in spans]
        regions += [
            (a.ctypes.data, a.size - 16, a, False, name) for name, a in self._constants.items() if a.size > 16
        ]
        self.memory = GlobalMemory(regions, self.fail)
        self.shared = SharedMemory(self.blocks, self.threads, shared_bytes, granule(program), self.fail)
        if traffic:
            self.memory.traffic = self.shared.traffic = Traffic(counts.memory, self.shape)
        self.local = LocalMemory(self.shape, program.kernel.local_bytes, self.fail)
        self.generic = GenericMemory(self)
        self.copies, self.products = Copies(self), Products(self)
        self.shared_window, self.local_window = (
            np.uint64(top << 48) for top in (SHARED_WINDOW, LOCAL_WINDOW)
        )
        self.special = self._special(grid, block, numbers)
        self.registers: list[np.ndarray | None] = [None] * len(program.flow.bits)
        self.definitions: dict[int, Any] = {}
        self.tracked = program.flow.tracked
        self.exited = np.zeros(self.shape, bool)
        if self.threads != self.own_threads:
            self.exited[:, self.own_threads :] = True
        self.groups: dict[int, np.ndarray | None] = {}
        self.parked: dict[int, list[tuple[int, np.ndarray]]] = {}
        self.arrival: tuple | None = None

    def _special(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], numbers: np.ndarray
    ) -> dict[str, np.ndarray]:
        def one(value: int) -> np.ndarray:
            return np.full((1, 1), value, "u4")

        thread = np.arange(self.threads, dtype="u4")[None]
        number = numbers.astype("u4")[:, None]
        x, y = np.uint32(block[0]), np.uint32(block[1])
        gx, gy = np.uint32(grid[0]), np.uint32(grid[1])
        found = {
            "%tid.x": thread % x,
            "%tid.y": thread // x % y,
            "%tid.z": thread // (x * y),
            "%ctaid.x": number % gx,
            "%ctaid.y": number // gx % gy,
            "%ctaid.z": number // (gx * gy),
            "%laneid": thread % np.uint32(32),
            "%warpid": thread // np.uint32(32),
            "%clusterid.x": number % gx,
            "%cluster_ctarank": one(0),
            "%cluster_ctaid.x": one(0),
            "%cluster_nctarank": one(1),
            "%dynamic_smem_size": one(self.shared.size - self.program.kernel.shared_bytes),
            "%clock": one(0),
            "%smid": one(0),
        }
        lane = np.uint64(1) << (thread % np.uint32(32)).astype("u8")
        ones = np.uint64(0xFFFFFFFF)
        masks = {"lt": lane - np.uint64(1), "le": 2 * lane - np.uint64(1), "eq": lane}
        masks |= {"ge": ones & ~masks["lt"], "gt": ones & ~masks["le"]}
        found |= {f"%lanemask_{name}": mask.astype("u4") for name, mask in masks.items()}
        for axis, name in enumerate("xyz"):
            found[f"%ntid.{name}"], found[f"%nctaid.{name}"] = one(block[axis]), one(grid[axis])
        return found

    # What emitted code calls.

    def read(self, registers: list, slot: int, dtype: str) -> np.ndarray:
        """A register that another block wrote."""
        value = registers[slot]
        if value is None:  # somebody checks whether it matters
            return np.zeros((1, 1), dtype)
        return value

    def wrote(self, slot: int, mask: np.ndarray | None, sources: list[int], lanes: tuple | None) -> None:
        """Of a register that is tracked: it has a value where its sources have."""
        value: Any = True
        for source in sources:
            value = _and(value, self._defined(source))
        if lanes is not None and isinstance(lanes[0], str):
            mode, by, clamp = lanes
            if value is not True:
                value = shuffle(mode, np.broadcast_to(value, self.shape), by, clamp, self.threads)[0]
        elif lanes is not None:
            condition, a, b = lanes
            first, second = (True if s < 0 else self._defined(s) for s in (a, b))
            if first is not True or second is not True:
                value = _and(value, np.where(condition, first, second))
        if mask is not None and not (value is True and self._defined(slot) is True):
            value = np.where(mask, value, self._defined(slot))
        if value is not True and value.all():
            value = True
        self.definitions[slot] = value

    def _defined(self, slot: int) -> Any:
        return self.definitions.get(slot, _NOWHERE)

    def written(self, site: int, mask: np.ndarray | None, *slots: int) -> None:
        """Fails where a thread needs a register that has no value."""
        for slot in slots:
            known = self._defined(slot)
            if known is True:
                continue
            wrong = ~known
            if mask is not None:
                wrong = wrong & mask
            if wrong.any():
                name = next(n for n, bit in self.program.flow.bits.items() if bit == 1 << slot)
                detail = f"{name.split('@')[0]}, or what it was computed from, was not written"
                self.fail(site, "uninitialised register", detail, wrong)

    def divisor(self, site: int, mask: np.ndarray | None, divisor: np.ndarray) -> None:
        """Fails where a thread divides an integer by 0: hardware and NumPy make different things of it."""
        wrong = divisor == 0 if mask is None else (divisor == 0) & mask
        if wrong.any():
            self.fail(site, "division by zero", "an integer divided by 0", wrong)

    def parameter(self, offset: int, dtype: str) -> np.ndarray:
        """A kernel parameter, or part of one."""
        key = (offset, dtype)
        if key not in self._parameter_arrays:
            size = int(dtype[1])
            value = np.frombuffer(self._parameters[offset : offset + size], dtype).reshape(1, 1)
            self._parameter_arrays[key] = value
        return self._parameter_arrays[key]

    def parameters_at(
        self, site: int, place: np.ndarray, offset: int, dtype: str, mask: np.ndarray | None
    ) -> np.ndarray:
        """Kernel parameters at offsets that differ between threads: an array that is one."""
        size, place = int(dtype[1]), place.astype("i8") + offset
        wrong = (place < 0) | (place > len(self._parameters) - size) | (place % size != 0)
        if mask is not None:
            wrong &= reduced(mask, wrong.shape)
        if wrong.any():
            detail = f"{size} bytes of the kernel's parameters, which have {len(self._parameters)}"
            self.fail(site, "out of bounds", detail, wrong)
        table = np.frombuffer(self._parameters.ljust(-(-len(self._parameters) // 8) * 8, b"\0"), dtype)
        return table.take(place // size, mode="clip")

    def constant_address(self, name: str, offset: int, dtype: str) -> np.ndarray:
        """Of a variable of the module."""
        return np.full((1, 1), self._constants[name].ctypes.data + offset, dtype)

    def in_space(self, space: str, address: np.ndarray) -> np.ndarray:
        """Whether a generic address lies there."""
        top = address >> np.uint64(48)
        if space in ("shared", "shared::cta"):
            return top == SHARED_WINDOW
        return top == LOCAL_WINDOW if space == "local" else (top != SHARED_WINDOW) & (top != LOCAL_WINDOW)

    def together(self, site: int, mask: np.ndarray | None, members: np.ndarray | None = None) -> None:
        """Fails unless the lanes that a warp's instruction needs are all there."""
        if members is not None and (members != np.uint32(0xFFFFFFFF)).any():
            lane = self.special["%laneid"]
            wanted = ((members >> lane) & np.uint32(1)).astype(bool)
            here = np.broadcast_to(np.True_ if mask is None else mask, self.shape)
            wrong = here & ~wanted
            if wrong.any():
                self.fail(site, "divergence", "a thread that its own membermask leaves out", wrong)
            some = (here.reshape(self.blocks, -1, 32)).any(axis=-1).repeat(32, axis=1)
            missing = some & wanted & ~here
            if missing.any():
                self.fail(site, "divergence", "threads of the membermask are elsewhere", missing)
            return
        if mask is None or mask.shape[1] == 1:
            return
        rows = mask.reshape(mask.shape[0], -1, 32)
        some = rows.any(axis=-1) & ~rows.all(axis=-1)
        if some.any():
            wrong = np.broadcast_to(some.repeat(32, axis=1) & ~mask, self.shape)
            self.fail(site, "divergence", "only some threads of a warp come to it", wrong)

    def together_group(self, site: int, mask: np.ndarray | None) -> None:
        """Fails unless four warps are all there."""
        if self.warps % 4:
            self.fail(site, "divergence", "a warp group needs four warps", None)
        if mask is None or mask.shape[1] == 1:
            return
        rows = mask.reshape(mask.shape[0], -1, 128)
        some = rows.any(axis=-1) & ~rows.all(axis=-1)
        if some.any():
            wrong = np.broadcast_to(some.repeat(128, axis=1) & ~mask, self.shape)
            self.fail(site, "divergence", "only some threads of a warp group come to it", wrong)

    def activemask(self, mask: np.ndarray | None) -> np.ndarray:
        """Lanes of each warp that are there."""
        if mask is None:
            mask = ~self.exited
        rows = np.broadcast_to(mask, self.shape).reshape(self.blocks, -1, 32)
        bits = np.where(rows, np.uint32(1) << np.arange(32, dtype="u4"), np.uint32(0)).sum(
            axis=-1, dtype="u4"
        )
        return bits.repeat(32, axis=1)

    def proxy_fence(self, mask: np.ndarray | None) -> None:
        """What the warps wrote is seen by the asynchronous proxy."""
        shared = self.shared
        shared.now += 1
        if mask is None:
            shared.fenced[:] = shared.now
        else:
            shared.fenced[self._warps_in(mask)] = shared.now

    def _warps_in(self, mask: np.ndarray) -> np.ndarray:
        return np.broadcast_to(mask, self.shape).reshape(self.blocks, -1, 32).any(axis=-1)

    def warp_barrier(self, site: int, mask: np.ndarray | None, members: np.ndarray) -> None:
        """bar.warp.sync."""
        self.together(site, mask, members)
        self.shared.synchronise_lanes(None if mask is None else self._warps_in(mask))

    def barrier(
        self, site: int, mask: np.ndarray | None, number: np.ndarray, count: np.ndarray | None, waits: bool
    ) -> None:
        """bar.sync and bar.arrive: the block ends here, and the scheduler goes on."""
        self.together(site, mask)
        self.arrival = (site, number, count, waits)

    # Scheduling.

    def run(self) -> None:
        """Until all threads have left.

        Raises:
            Fault: something went wrong.
        """
        functions, blocks = self.program.functions, self.program.flow.blocks
        registers, groups = self.registers, self.groups
        groups[0] = None if not self.exited.any() else ~self.exited
        last, ranks = len(functions), self.program.flow.ranks
        steps: collections.Counter = collections.Counter()
        total = 0
        while groups:
            pc = min(groups, key=ranks.__getitem__) if len(groups) > 1 else next(iter(groups))
            mask = groups.pop(pc)
            if pc >= last:
                self._leave(mask)
                continue
            block = blocks[pc]
            condition = functions[pc](self, registers, mask)
            steps[pc] += self._count(mask)
            total += 1
            if total > STEPS:
                self.fail_at(block.instructions[-1], "endless", f"{STEPS} basic blocks and no end")
            if self.arrival is not None:
                arrival, self.arrival = self.arrival, None
                guard = block.instructions[-1].predicate
                self._arrive(pc, mask, *arrival, guard is not None)
                continue
            ends = block.instructions and block.instructions[-1].name in ("ret", "exit", "trap")
            if condition is None:
                if ends:
                    self._leave(mask)
                else:
                    self._go(block.target if block.target is not None else pc + 1, mask)
                continue
            taken, rest = self._divide(condition, mask)
            if ends:
                self._leave(taken, nobody=taken is False)
            elif taken is not False:
                self._go(block.target, taken)
            if rest is not False:
                self._go(pc + 1, rest)
        if any(self.parked.values()):
            self._stuck()
        for pc, count in steps.items():
            for i in blocks[pc].instructions:
                self.counts.instructions[i.opcode] += count
        self.counts.blocks += self.blocks

    def _count(self, mask: np.ndarray | None) -> int:
        """Warps that are there."""
        if mask is None:
            return self.blocks * self.warps
        if mask.shape[1] == 1:
            return int(np.count_nonzero(mask)) * self.warps * (self.blocks // mask.shape[0])
        found = np.count_nonzero(mask.reshape(mask.shape[0], -1, 32).any(axis=-1))
        return found * (self.blocks // mask.shape[0])

    def _divide(self, condition: np.ndarray, mask: np.ndarray | None) -> tuple[Any, Any]:
        """Threads that jump and those that do not; ``False`` for none."""
        if condition.size == 1:
            return (mask, False) if condition.flat[0] else (False, mask)
        taken = condition if mask is None else condition & mask
        rest = ~condition if mask is None else ~condition & mask
        if not taken.any():
            return False, mask
        if not rest.any():
            return mask, False
        return taken, rest

    def _go(self, pc: int, mask: np.ndarray | None) -> None:
        if pc in self.groups:
            other = self.groups[pc]
            if mask is None or other is None:
                mask = None
            else:
                mask = mask | other
                if mask.all():
                    mask = None
        self.groups[pc] = mask

    def _leave(self, mask: Any, nobody: bool = False) -> None:
        if nobody:
            return
        if mask is None:
            self.exited[:] = True
        else:
            self.exited |= mask
        for number in list(self.parked):
            self._release(number)

    def _arrive(
        self, pc: int, mask: np.ndarray | None, site: int, number: np.ndarray, count: np.ndarray | None,
        waits: bool, guarded: bool,
    ) -> None:  # fmt: skip
        if guarded:
            raise NotImplementedError("a barrier with a guard")
        whole = mask is None or mask.shape[1] == 1
        everyone = count is None or (count == self.own_threads).all()
        if whole and everyone and waits and not any(self.parked.values()):
            there = (
                None
                if mask is None
                else np.broadcast_to(np.broadcast_to(mask, (self.blocks, 1)), (self.blocks, self.warps))
            )
            self.shared.synchronise(there)
            self._go(pc + 1, mask)
            return
        full = np.broadcast_to(np.True_ if mask is None else mask, self.shape) & ~self.exited
        numbers = np.broadcast_to(number, self.shape)
        for which in np.unique(numbers[full]):
            here = full & (numbers == which)
            expected = None if count is None else int(count.flat[0])
            self.parked.setdefault(int(which), []).append((pc + 1 if waits else -1, here, expected, site))
            if not waits:
                self._go(pc + 1, here)
            self._release(int(which))

    def _release(self, number: int) -> None:
        """Let those go whose barrier is complete."""
        waiting = self.parked.get(number)
        if not waiting:
            return
        arrived = np.zeros(self.shape, bool)
        for _, here, _, _ in waiting:
            arrived |= here
        counts = {expected for _, _, expected, _ in waiting}
        if len(counts) > 1:
            self.fail(
                waiting[-1][3], "deadlock", f"barrier {number} with different numbers of threads", arrived
            )
        expected = counts.pop()
        wanted = (~self.exited).sum(axis=1) if expected is None else np.full(self.blocks, expected)
        per_block = sum(here.sum(axis=1) for _, here, _, _ in waiting)
        complete = (per_block >= wanted) & (per_block > 0)
        if not complete.any():
            return
        rows = complete[:, None]
        self.shared.synchronise(self._warps_in(arrived & rows))
        left = []
        for pc, here, expected, site in waiting:
            gone = here & rows
            if pc >= 0 and gone.any():
                self._go(pc, gone)
            if (here & ~rows).any():
                left.append((pc, here & ~rows, expected, site))
        self.parked[number] = left

    def _stuck(self) -> None:
        number, waiting = next((n, w) for n, w in self.parked.items() if w)
        _, here, expected, site = waiting[0]
        counts = sum(h.sum(axis=1) for _, h, _, _ in waiting)
        b = int(counts.argmax())
        wanted = expected if expected is not None else int((~self.exited[b]).sum())
        detail = f"barrier {number} waits for {wanted} threads, {int(counts[b])} have come"
        self.fail(site, "deadlock", detail, here)

    # Faults.

    def fail(self, site: int, kind: str, detail: str, wrong: np.ndarray | None) -> None:
        """Raise a fault at an instruction."""
        self.fail_at(self.program.sites[site], kind, detail, wrong)

    def fail_at(self, instruction: Any, kind: str, detail: str, wrong: np.ndarray | None = None) -> None:
        """Raise a fault; the first thread of ``wrong`` is named."""
        where = ""
        if wrong is not None and wrong.any():
            full = np.broadcast_to(wrong, self.shape) if wrong.ndim == 2 else wrong
            b, t = np.unravel_index(int(full.argmax()), full.shape)
            where = f"block {int(self.numbers[b])}, thread {int(t)}"
        raise Fault(kind, detail, where=where, **place(instruction))


def granule(program: Program) -> int:
    """Bytes of the smallest access to shared memory that a kernel has."""
    found = [shared_width(i) for i in program.kernel.instructions if i.name in _TOUCH]
    return min([size for size in found if size] or [4])


_MEMORY = ("ld", "st", "atom", "red", "cp")
_TOUCH = ("ld", "st", "atom", "red", "cp", "ldmatrix", "stmatrix")


def _refused(kernel: Kernel, grid: tuple[int, int, int], threads: int, shared: int) -> str | None:
    """Why the hardware does not take a launch."""
    if kernel.required_threads and kernel.required_threads != threads:
        return f"{threads} threads a block, compiled for {kernel.required_threads}"
    if threads > kernel.most_threads:
        return f"{threads} threads a block, at most {kernel.most_threads}"
    if max(grid[1:]) > 65535 or grid[0] >= 1 << 31:
        return f"a grid of {grid}"
    most = 1024 * SHARED_MEMORY.get(kernel.target, 227)
    return f"{shared} bytes of shared memory, a block has {most} at most" if shared > most else None


def execute(
    text: str,
    kernel: str,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    parameters: bytes,
    spans: Sequence[Span],
    shared_bytes: int = 0,
    traffic: bool = False,
    noise: int | None = None,
) -> Counts:
    """Run one launch of a kernel of PTX.

    Args:
        text: a module of PTX.
        kernel: name of the entry.
        grid, block: as the driver takes them.
        parameters: the bytes of its parameters, laid out as in PTX.
        spans: memory that it may touch.
        shared_bytes: dynamic shared memory of a block.
        traffic: whether :attr:`Counts.memory` is wanted.
        noise: seed of the errors of approximate instructions; ``None``: they have none.

    Raises:
        Fault: the kernel did what it must not do.
        PTXError: it holds something that the machine does not know.
    """
    made = program(text, kernel)
    threads, counts = math.prod(block), Counts()
    shared = made.kernel.shared_bytes + shared_bytes
    if refused := _refused(made.kernel, grid, threads, shared):
        raise Fault("launch", refused, kernel)
    if not any(i.name in _MEMORY and "param" not in i.modifiers for i in made.kernel.instructions):
        raise Fault("empty", "no access to memory in it: compiled to nothing", kernel)
    total = math.prod(grid)
    at_once = max(1, min(LANES // threads, SHARED // max(1, shared)))
    errors = None if noise is None else floating.Noise(noise)
    with np.errstate(all="ignore"):
        for begin in range(0, total, at_once):
            numbers = np.arange(begin, min(begin + at_once, total))
            Machine(made, grid, block, numbers, parameters, spans, shared, counts, traffic, errors).run()
    return counts


__all__ = ["Counts", "Machine", "Span", "execute", "program"]
