"""Shared memory as the machine sees it, with its shadow.

The shadow says for each granule (the smallest access of the kernel) who wrote it last, when, and who read it,
so that a read of nothing, a race or data in flight is found at the access. Time counts accesses to memory;
what a warp knows of another's past, by barriers, is kept as a matrix of such times for each block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from segvit_kernels.testing.ptx.memory import TYPES, in_turn, joined, split, spread
from segvit_kernels.testing.ptx.traffic import Traffic

PENDING = np.uint64(1 << 63)
_THREAD = np.uint64(0xFFFF)
_SHIFT = np.uint64(16)
# In place of a thread, or beside it: threads of several warps, several of one warp, an atomic, a cp.async.
_MANY_WARPS, _MANY_LANES, _ATOMIC, COPIED = 0xFFFF, 0x8000, 0x4000, 0x2000
_ONE = np.uint64(1)
_NEVER = 1 << 62
_BASES = 64


class Recent:
    """A range of addresses that somebody touched at a time."""

    __slots__ = ("high", "low", "time")

    def __init__(self, time: int, low: int, high: int) -> None:
        self.time, self.low, self.high = time, low, high

    def meets(self, other: Recent) -> bool:
        """Whether they have an address in common."""
        return self.low < other.high and other.low < self.high


class _Base(NamedTuple):
    """Addresses of a register in shared memory: as they are, as elements, the least, the most, and whose."""

    address: np.ndarray
    index: np.ndarray
    low: int
    high: int
    who: np.ndarray


class SharedMemory:
    """Shared memory of the blocks that run at once, with its shadow.

    Most accesses need no look at the shadow: nothing was written to their range of addresses since the last
    barrier, all of which was written before. Reads are noted when something is written to their range.

    Args:
        blocks, threads: that run.
        size: bytes of one block.
        granule: bytes that one entry of the shadow stands for.
        fail: as for :class:`GlobalMemory`.
    """

    def __init__(self, blocks: int, threads: int, size: int, granule: int, fail: Callable) -> None:
        self.size, self.granule, self.fail = size, granule, fail
        self.traffic: Traffic | None = None
        self.blocks, self.threads, self.warps = blocks, threads, -(-threads // 32)
        self.stride = -(-size // 16) * 16
        self.data = np.full(blocks * self.stride, 0xFF, "u1")
        self.views = {n: self.data.view(kind) for n, kind in TYPES.items()}
        entries = blocks * (self.stride // granule)
        self.written = np.zeros(entries, "u8")
        self.read = np.zeros(entries, "u8")
        block = np.arange(blocks)[:, None]
        self.offsets = {n: block * (self.stride // n) for n in TYPES}
        self.thread = np.arange(threads, dtype="u8")[None]
        self.now = 1
        # known[b, u, v]: what warp v did before this time lies in the past of warp u.
        self.known = np.zeros((blocks, self.warps, self.warps), "u8")
        self.fenced = np.zeros((blocks, self.warps), "u8")
        self.limit = np.ones((blocks, 1), "u8")
        self.past = 0  # what was before lies in everybody's past
        self._full: list[tuple[int, int]] = []  # ranges that all blocks have written
        self._writes: list[Recent] = []
        self._reads: list[Recent] = []  # in the shadow
        self._log: list[tuple[Recent, np.ndarray, int, int, np.ndarray | None, np.ndarray]] = []  # not yet
        self._bases: dict[tuple[int, int], tuple[np.ndarray, _Base | None]] = {}

    # Time.

    def synchronise(self, warps: np.ndarray | None) -> None:
        """A barrier among warps (blocks, warps); ``None``: all of all blocks."""
        self.now += 1
        if warps is None:
            self.known[:] = self.now
        else:
            for b in np.flatnonzero(warps.any(axis=1)):
                here = warps[b]
                past = self.known[b][here].max(axis=0)
                past[here] = self.now
                self.known[b][here] = past
        self._settle()

    def synchronise_lanes(self, warps: np.ndarray | None) -> None:
        """Within each warp."""
        self.now += 1
        for w in range(self.warps):
            where = slice(None) if warps is None else warps[:, w]
            self.known[where, w, w] = self.now
        if self.warps == 1:
            self._settle()

    def _settle(self) -> None:
        least = self.known.min(axis=(1, 2))[:, None]
        self.limit = np.maximum(least << _SHIFT, _ONE)
        self.past = int(least.min())
        self._writes = [r for r in self._writes if r.time >= self.past]
        self._reads = [r for r in self._reads if r.time >= self.past]
        self._log = [item for item in self._log if item[0].time >= self.past]

    # Where.

    def place(
        self, site: int, address: np.ndarray, size: int, mask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Addresses as (blocks, 1 or threads) ``i8``, and the mask; who is not there has another's."""
        shape = (self.blocks, max(address.shape[1], 1 if mask is None else mask.shape[1]))
        address = (
            np.minimum(address, np.uint64(1 << 40)).view("i8")
            if address.itemsize == 8
            else address.astype("i8")
        )
        address = spread(address, shape)
        if mask is not None:
            mask = spread(mask, shape)
            address = np.where(mask, address, address.flat[mask.argmax()] if mask.any() else 0)
        if size > self.size or int(address.max()) > self.size - size:
            outside = address > self.size - size
            at = int(address.flat[outside.argmax()])
            if mask is None or mask.any():
                detail = f"{size} bytes of shared memory at {at}, the block has {self.size}"
                self.fail(site, "out of bounds", detail, outside)
        if size > 1 and (address & (size - 1)).any():
            wrong = (address & (size - 1)) != 0
            self.fail(site, "misaligned", f"a shared address that {size} does not divide", wrong)
        return address, mask

    def _entries(self, address: np.ndarray, size: int) -> np.ndarray:
        """Entries of the shadow: (..., granules of the access)."""
        g = self.granule
        first = self.offsets[g] + (address >> (g.bit_length() - 1))
        count = max(1, size // g)
        return first[..., None] + np.arange(count) if count > 1 else first[..., None]

    def _who(self, shape: tuple[int, ...]) -> np.ndarray:
        if shape[1] == 1 and self.threads > 1:
            return np.full((1, 1), _MANY_LANES if self.warps == 1 else _MANY_WARPS, "u8")
        return self.thread

    # Access.

    def _base(self, address: np.ndarray, size: int) -> _Base | None:
        """Where the addresses of a register lie, found once for all its offsets."""
        key = (id(address), size)
        known = self._bases.get(key)
        if known is None or known[0] is not address:
            low, high = int(address.min()), int(address.max())
            found = None
            if high <= self.size and not (address & address.dtype.type(size - 1)).any():
                placed = spread(address.astype("i8"), (self.blocks, address.shape[1]))
                index = self.offsets[size] + (placed >> (size.bit_length() - 1))
                found = _Base(placed, index, low, high, self._who(placed.shape))
            if len(self._bases) >= _BASES:
                self._bases.pop(next(iter(self._bases)))
            known = self._bases[key] = (address, found)
        return known[1]

    def load(
        self, site: int, address: np.ndarray, width: int, count: int, mask: np.ndarray | None, offset: int = 0
    ) -> list[np.ndarray]:
        """``count`` values of ``width`` bytes from each address."""
        size = width * count
        if self.traffic:
            self.traffic.of_shared(address.astype("i8") + offset, size, mask, write=False)
        if mask is None and offset >= 0 and not offset % size:
            base = self._base(address, size)
            if base is not None and base.high + offset + size <= self.size:
                recent = Recent(self.now + 1, base.low + offset, base.high + offset + size)
                if self._settled(recent):
                    self.now += 1
                    self._log.append((recent, base.address, offset, size, None, base.who))
                    return split(self.views[size][offset // size :].take(base.index), width, count)
        if offset:
            address = address + address.dtype.type(offset % 2 ** (8 * address.itemsize))
        address, mask = self.place(site, address, size, mask)
        if mask is not None and not mask.any():
            return [np.zeros((1, 1), TYPES[width])] * count
        self.note_read(site, address, size, mask, self._who(address.shape))
        index = self.offsets[size] + (address >> (size.bit_length() - 1))
        return split(self.views[size].take(index), width, count)

    def store(
        self,
        site: int,
        address: np.ndarray,
        values: Sequence[np.ndarray],
        width: int,
        mask: np.ndarray | None,
    ) -> None:
        """Values of ``width`` bytes to each address."""
        size = width * len(values)
        shape = np.broadcast_shapes(address.shape, *(v.shape for v in values))
        address, mask = self.place(site, spread(address, shape), size, mask)
        data = joined(values, width, np.broadcast_shapes(shape, address.shape))
        self.write(site, address, data, size, mask, self._who(address.shape))

    def write(
        self,
        site: int,
        address: np.ndarray,
        data: np.ndarray,
        size: int,
        mask: np.ndarray | None,
        who: np.ndarray,
        pending: bool = False,
    ) -> tuple[np.ndarray, Recent] | None:
        """Data of ``size`` bytes each to placed addresses by threads; entries of the shadow."""
        if mask is not None and not mask.any():
            return None
        if self.traffic:
            self.traffic.of_shared(address, size, mask, write=True)
        index = self.offsets[size] + (address >> (size.bit_length() - 1))
        view = self.views[size]
        entries = self._entries(address, size)
        self.now += 1
        recent = Recent(_NEVER if pending else self.now, int(address.min()), int(address.max()) + size)
        self._note_log(recent)
        if any(recent.meets(r) for r in self._writes) or any(recent.meets(r) for r in self._reads):
            w, r = self.written.take(entries), self.read.take(entries)
            late = np.maximum(w, r) >= self.limit[:, :, None]
            if mask is not None:
                late &= mask[..., None]
            if late.any():
                same = _same(view.take(index), data)
                self._check_write(site, entries, late, w, r, who, same)
        new = np.uint64(self.now << 16) | who
        if pending:
            new = new | PENDING
        new = spread(new[..., None], entries.shape)
        if mask is None:
            view[index] = data
            self.written[entries] = new
        else:
            view[index[mask]] = data[mask]
            self.written[entries[mask]] = new[mask]
        differs = ~_same(view.take(index), data)
        if mask is not None:
            differs &= mask
        if differs.any():
            # One lane of a warp wins; sums of lanes may differ in their last bit. Warps come in any order.
            differs &= self._winners(index, spread(who, differs.shape), mask)
        if differs.any():
            self.fail(site, "race", "warps write different values to one shared byte", differs)
        self._writes.append(recent)
        return entries, recent

    def _winners(self, index: np.ndarray, who: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Those of several threads that write to one address who are the last of their warp."""
        keys = index * (self.warps + 1) + np.minimum(_warp(who.astype("i8")), self.warps)
        found = np.zeros(index.shape, bool)
        flat = np.flatnonzero(np.ones(index.shape, bool) if mask is None else mask)[::-1]
        _, first = np.unique(keys.flat[flat], return_index=True)
        found.flat[flat[first]] = True
        return found

    def note_read(
        self, site: int, address: np.ndarray, size: int, mask: np.ndarray | None, who: np.ndarray
    ) -> None:
        """Checks that what is read was written before, and notes who reads it."""
        if mask is not None and not mask.any():
            return
        self.now += 1
        recent = Recent(self.now, int(address.min()), int(address.max()) + size)
        if not self._settled(recent):
            entries = self._entries(address, size)
            w = self.written.take(entries)
            late = (w - _ONE) >= (self.limit - _ONE)[:, :, None]
            if mask is not None:
                late &= mask[..., None]
            if late.any():
                self._check_read(site, entries, late, w, who)
        self._log.append((recent, address, 0, size, mask, who))

    def _settled(self, recent: Recent) -> bool:
        """Whether all of a range was written before everybody's last barrier."""
        if any(recent.meets(r) for r in self._writes):
            return False
        if any(low <= recent.low and recent.high <= high for low, high in self._full):
            return True
        g = self.granule
        rows = self.written.reshape(self.blocks, -1)[:, recent.low // g : -(-recent.high // g)]
        if not rows.all():
            return False
        low, high, apart = recent.low, recent.high, []
        for a, b in self._full:
            if a <= high and low <= b:
                low, high = min(a, low), max(b, high)
            else:
                apart.append((a, b))
        self._full = [(low, high), *apart]
        return True

    def _note_log(self, recent: Recent) -> None:
        """Put the reads that a range meets into the shadow."""
        met = [item for item in self._log if recent.meets(item[0])]
        if not met:
            return
        self._log = [item for item in self._log if not recent.meets(item[0])]
        limit = self.limit[:, :, None]
        for read, address, offset, size, mask, who in met:
            entries = self._entries(address + offset, size)
            who = spread(who[..., None], entries.shape)
            time = np.uint64(read.time << 16)
            new = time | who
            r = self.read.take(entries)
            kept = (r >= limit) & ((r & _THREAD) != who) & (r < PENDING)
            if kept.any():
                new = np.where(kept, time | _together(r & _THREAD, who), new)
            if mask is not None:
                entries, new = entries[mask], new[mask]
            self.read[entries] = new
            again = self.read.take(entries)
            lost = again != new
            if lost.any():
                both = _together(again[lost] & _THREAD, new[lost] & _THREAD)
                # The last of them wins; those of several warps must not lose to those of one.
                order = np.argsort(both, kind="stable")
                self.read[entries[lost][order]] = time | both[order]
            self._reads.append(read)

    def note_product(self, entries: np.ndarray, low: int, high: int) -> Recent:
        """A product reads entries from now on, until :meth:`product_ends`."""
        self.read[entries] = PENDING | np.uint64(self.now << 16 | _MANY_WARPS)
        recent = Recent(_NEVER, low, high)
        self._reads.append(recent)
        return recent

    # Order.

    def ordered(self, entries: np.ndarray, tags: np.ndarray, who: np.ndarray) -> np.ndarray:
        """Whether accesses by ``tags`` lie in the past of threads ``who``."""
        block = entries // (self.stride // self.granule)
        time, other = tags >> _SHIFT, (tags & _THREAD).astype("i8")
        other = np.where(other < _MANY_LANES, other & ~COPIED, other)
        mine = np.broadcast_to(who[..., None], entries.shape).astype("i8")
        many = (other == _MANY_WARPS) | (mine == _MANY_WARPS)
        least = self.known.min(axis=(1, 2))[block]
        mine_warp, other_warp = _warp(mine) % self.warps, _warp(other) % self.warps
        pairwise = self.known[block, mine_warp, other_warp]
        past = time < np.where(many, least, pairwise)
        return past | ((mine == other) & (mine < _ATOMIC)) | (tags == 0)

    def _check_read(
        self, site: int, entries: np.ndarray, late: np.ndarray, w: np.ndarray, who: np.ndarray
    ) -> None:
        nothing = late & (w == 0)
        if nothing.any():
            self.fail(
                site, "uninitialised shared memory", "a read of what nothing wrote", nothing.any(axis=-1)
            )
        flying = late & (w >= PENDING)
        if flying.any():
            detail = "a read of shared memory that an asynchronous copy may still write"
            self.fail(site, "in flight", detail, flying.any(axis=-1))
        wrong = late & ~self.ordered(entries, w, who)
        if wrong.any():
            other = self._name(w[wrong].flat[0])
            detail = f"a read of shared memory that {other} wrote without a barrier between"
            self.fail(site, "race", detail, wrong.any(axis=-1))

    def _check_write(
        self,
        site: int,
        entries: np.ndarray,
        late: np.ndarray,
        w: np.ndarray,
        r: np.ndarray,
        who: np.ndarray,
        same: np.ndarray,
    ) -> None:
        flying = late & ((w >= PENDING) | (r >= PENDING))
        if flying.any():
            what = "read by a product" if (late & (r >= PENDING)).any() else "written by a copy"
            self.fail(
                site, "in flight", f"a write to shared memory that is being {what}", flying.any(axis=-1)
            )
        wrong = late & ~self.ordered(entries, r, who)
        if wrong.any():
            other = self._name(r[wrong].flat[0])
            detail = f"a write to shared memory that {other} read without a barrier between"
            self.fail(site, "race", detail, wrong.any(axis=-1))
        wrong = late & ~self.ordered(entries, w, who) & ~same[..., None]
        if wrong.any():
            other = self._name(w[wrong].flat[0])
            detail = f"a write to shared memory that {other} wrote without a barrier between"
            self.fail(site, "race", detail, wrong.any(axis=-1))

    @staticmethod
    def _name(tag: np.uint64) -> str:
        thread = int(tag) & 0xFFFF
        if thread == _MANY_WARPS:
            return "threads of several warps"
        if thread & _MANY_LANES:
            return f"threads of warp {thread & 0xFFF}"
        return f"thread {thread & 0xFFF}"

    # Other ways in.

    def atomic(
        self,
        site: int,
        address: np.ndarray,
        values: Sequence[np.ndarray],
        dtype: str,
        operation: Callable,
        mask: np.ndarray | None,
        shape: tuple[int, int],
    ) -> np.ndarray:
        """As of :class:`GlobalMemory`; atomics do not race with each other."""
        mask = np.broadcast_to(np.True_ if mask is None else mask, shape)
        size = int(dtype[1:])
        address, mask = self.place(site, np.broadcast_to(address, shape), size, mask)
        if not mask.any():
            return np.zeros(shape, dtype)
        if self.traffic:
            self.traffic.of_shared(address, size, mask, write=True)
        entries = self._entries(address, size)
        self.now += 1
        recent = Recent(self.now, int(address.min()), int(address.max()) + size)
        self._note_log(recent)
        self._writes.append(recent)
        w, r = self.written.take(entries), self.read.take(entries)
        nothing = (w == 0) & mask[..., None]
        if nothing.any():
            self.fail(
                site, "uninitialised shared memory", "an atomic on what nothing wrote", nothing.any(axis=-1)
            )
        late = (np.maximum(w, r) >= self.limit[:, :, None]) & mask[..., None]
        atomics = (w & _THREAD >= np.uint64(_ATOMIC)) & (w & _THREAD < np.uint64(_MANY_LANES))
        if (late & ~atomics).any():
            self._check_write(site, entries, late & ~atomics, w, r, self.thread, np.zeros(shape, bool))
        old = np.zeros(shape, dtype)
        index = (self.offsets[size] + (address >> (size.bit_length() - 1)))[mask]
        values = [np.broadcast_to(v, shape)[mask] for v in values]
        if index.size:
            old[mask] = in_turn(self.views[size].view(dtype), index, values, operation)
        tags = np.broadcast_to(
            (np.uint64((self.now << 16) | _ATOMIC) | self.thread)[..., None], entries.shape
        )
        self.written[entries[mask]] = tags[mask]
        return old


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind != "c":
        return a == b
    a, b = np.ascontiguousarray(a).view("u8"), np.ascontiguousarray(b).view("u8")
    return ((a == b).reshape(*a.shape[:-1], -1, 2)).all(axis=-1)


def _warp(thread: np.ndarray) -> np.ndarray:
    """Of what stands for a thread in a tag."""
    return np.where(thread & _MANY_LANES, thread & 0xFFF, (thread & 0xFFF) >> 5)


def _together(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What stands for two of them."""
    x, y = a.astype("i8"), b.astype("i8")
    many = (x == _MANY_WARPS) | (y == _MANY_WARPS) | (_warp(x) != _warp(y))
    return np.where(many, _MANY_WARPS, _MANY_LANES | _warp(x)).astype("u8")
