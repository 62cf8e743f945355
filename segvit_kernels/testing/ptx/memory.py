"""Global memory as the machine sees it: the tensors of the launch where they lie.

An address is the process's own.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from segvit_kernels.testing.ptx.traffic import Traffic

TYPES = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}  # 16 bytes move as one complex number


def spread(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """``np.broadcast_to``, quick where there is nothing to do."""
    return array if array.shape == shape else np.broadcast_to(array, shape)


def reduced(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A mask for values of ``shape``: where any thread that has the value is there."""
    for axis in (0, 1):
        if shape[axis] == 1 and mask.shape[axis] > 1:
            mask = mask.any(axis=axis, keepdims=True)
    return spread(mask, shape)


def split(found: np.ndarray, width: int, count: int) -> list[np.ndarray]:
    """What an access of several values brought, value by value."""
    if count == 1:
        return [found]
    parts = found.view(f"u{width}").reshape(*found.shape, count)
    return list(np.ascontiguousarray(np.moveaxis(parts, -1, 0)))


def joined(values: Sequence[np.ndarray], width: int, shape: tuple[int, int]) -> np.ndarray:
    """Values side by side, as an access writes them."""
    if len(values) == 1:
        value = values[0]
        kind = TYPES[width]
        return spread(value if value.dtype == kind else value.view(kind), shape)
    out = np.empty((*shape, len(values)), f"u{width}")
    for place, value in enumerate(values):
        out[..., place] = value.view(f"u{width}")
    return out.view(TYPES[width * len(values)])[..., 0]


class _Interval:
    """Bytes that the launch may touch."""

    def __init__(self, start: int, end: int, keep: Any, writable: bool, name: str) -> None:
        self.start, self.end, self.keep, self.writable, self.name = start, end, keep, writable, name
        self.base = start // 16 * 16
        self._views: dict[int, np.ndarray] = {}

    def view(self, size: int) -> np.ndarray:
        """All of it as elements of ``size`` bytes, from ``base`` on."""
        if size not in self._views:
            count = -(-(self.end - self.base) // size)
            self._views[size] = _at(self.base, count * size).view(TYPES[size])
        return self._views[size]


def _at(address: int, size: int) -> np.ndarray:
    import ctypes

    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), "u1")


class GlobalMemory:
    """The tensors of a launch.

    Args:
        spans: (address, bytes, what keeps it, whether it may be written, name) of each.
        fail: takes a site, a kind of fault, a detail and the threads at fault.
    """

    def __init__(self, spans: Sequence[tuple[int, int, Any, bool, str]], fail: Callable) -> None:
        self.fail = fail
        self.traffic: Traffic | None = None
        self.intervals: list[_Interval] = []
        for start, size, keep, writable, name in sorted(spans, key=lambda span: span[:2]):
            last = self.intervals[-1] if self.intervals else None
            if last is not None and start < last.end and size:  # views of one storage
                end = max(last.end, start + size)
                self.intervals[-1] = _Interval(
                    last.start, end, (last.keep, keep), last.writable or writable, f"{last.name}, {name}"
                )
            elif size:
                self.intervals.append(_Interval(start, start + size, keep, writable, name))
        self.starts = [interval.start for interval in self.intervals]

    def _place(
        self, site: int, address: np.ndarray, size: int, mask: np.ndarray | None, write: bool
    ) -> tuple[_Interval | None, np.ndarray, np.ndarray | None]:
        """The interval that all lie in, index of the element of ``size`` bytes, and the reduced mask."""
        if mask is not None:
            mask = reduced(mask, address.shape)
            count = np.count_nonzero(mask)
            if count == 0:
                return None, address, mask
            first = int(address.flat[mask.argmax()])
            if count == mask.size:
                mask = None
        else:
            first = int(address.flat[0])
        where = bisect.bisect_right(self.starts, first) - 1
        interval = self.intervals[where] if where >= 0 else None
        if interval is None or first + size > interval.end:
            self._outside(site, address, size, mask, write)
        offset = address - np.uint64(interval.start)
        room = interval.end - interval.start - size
        outside = offset > np.uint64(room)
        if mask is not None:
            outside &= mask
        if outside.any():
            # In several tensors, or in none.
            self._outside(site, address, size, mask, write)
            return interval, address, mask
        if size > 1:
            wrong = (address & np.uint64(size - 1)).astype(bool)
            if mask is not None:
                wrong &= mask
            if wrong.any():
                self.fail(site, "misaligned", f"an address that {size} does not divide", wrong)
        if write and not interval.writable:
            self.fail(site, "out of bounds", f"a write to {interval.name}, which is constant", mask)
        if interval.base != interval.start:
            offset = address - np.uint64(interval.base)
        index = (offset >> np.uint64(size.bit_length() - 1)).view("i8")
        if mask is not None:
            index = np.where(mask, index, 0)
        return interval, index, mask

    def _outside(
        self, site: int, address: np.ndarray, size: int, mask: np.ndarray | None, write: bool
    ) -> None:
        """Fails unless every access lies in some tensor."""
        found = np.searchsorted(np.array(self.starts, "u8"), address, side="right") - 1
        ends = np.array([0] + [interval.end for interval in self.intervals], "u8")[found + 1]
        outside = address + np.uint64(size) > ends
        if mask is not None:
            outside &= mask
        if outside.any():
            at = int(address.flat[outside.argmax()])
            self.fail(site, "out of bounds", self._describe(at, size, write), outside)

    def _describe(self, at: int, size: int, write: bool) -> str:
        what = f"a {'write' if write else 'read'} of {size} bytes at {at:#x}"
        near = min(
            ((min(abs(at - i.end), abs(i.start - at)), i) for i in self.intervals),
            key=lambda p: p[0],
            default=None,
        )
        if near is None:
            return f"{what}; the launch has no tensors"
        interval = near[1]
        if at >= interval.end - size and at >= interval.start:
            return f"{what}, {at + size - interval.end} bytes behind the end of {interval.name}"
        return f"{what}, {interval.start - at} bytes before {interval.name}"

    def load(
        self, site: int, address: np.ndarray, width: int, count: int, mask: np.ndarray | None
    ) -> list[np.ndarray]:
        """``count`` values of ``width`` bytes from each address."""
        size = width * count
        if size > 16:
            half = count // 2
            second = address + np.uint64(size // 2)
            return self.load(site, address, width, half, mask) + self.load(site, second, width, half, mask)
        if self.traffic:
            self.traffic.of_global(address, size, mask, write=False)
        interval, index, mask = self._place(site, address, size, mask, write=False)
        if interval is None:
            return [np.zeros((1, 1), TYPES[width])] * count
        if index is address:
            return split(self._gather(address, size, mask), width, count)
        return split(interval.view(size).take(index), width, count)

    def _gather(self, address: np.ndarray, size: int, mask: np.ndarray | None) -> np.ndarray:
        """From several tensors."""
        out = np.zeros(address.shape, TYPES[size])
        for chosen, interval in self._by_interval(address, mask):
            index = (address[chosen] - np.uint64(interval.base)) >> np.uint64(size.bit_length() - 1)
            out[chosen] = interval.view(size).take(index.view("i8"))
        return out

    def _by_interval(
        self, address: np.ndarray, mask: np.ndarray | None
    ) -> list[tuple[np.ndarray, _Interval]]:
        found = np.searchsorted(np.array(self.starts, "u8"), address, side="right") - 1
        chosen = [
            (found == k if mask is None else (found == k) & mask, k) for k in np.unique(found) if k >= 0
        ]
        return [(where, self.intervals[k]) for where, k in chosen]

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
        if size > 16:
            half = len(values) // 2
            self.store(site, address, values[:half], width, mask)
            self.store(site, address + np.uint64(size // 2), values[half:], width, mask)
            return
        shape = np.broadcast_shapes(address.shape, *(v.shape for v in values))
        if mask is not None:
            shape = np.broadcast_shapes(shape, mask.shape)
        if shape != address.shape:
            address = np.ascontiguousarray(np.broadcast_to(address, shape))
        if self.traffic:
            self.traffic.of_global(address, size, mask, write=True)
        interval, index, mask = self._place(site, address, size, mask, write=True)
        if interval is None:
            return
        data = joined(values, width, shape)
        if index is address:
            for chosen, part in self._by_interval(address, mask):
                place = (address[chosen] - np.uint64(part.base)) >> np.uint64(size.bit_length() - 1)
                part.view(size)[place.view("i8")] = data[chosen]
        elif mask is None:
            interval.view(size)[index] = data
        else:
            interval.view(size)[index[mask]] = data[mask]

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
        """``operation(old, *values)`` of each thread in turn; the old values."""
        mask = np.broadcast_to(np.True_ if mask is None else mask, shape)
        address = np.ascontiguousarray(np.broadcast_to(address, shape))
        size = int(dtype[1:])
        if self.traffic:
            self.traffic.of_global(address, size, mask, write=True)
        interval, index, _ = self._place(site, address, size, mask, write=True)
        old = np.zeros(shape, dtype)
        if interval is None:
            return old
        if index is address:
            raise NotImplementedError("one atomic instruction on several tensors")
        values = [np.broadcast_to(v, shape)[mask] for v in values]
        old[mask] = in_turn(interval.view(size).view(dtype), index[mask], values, operation)
        return old


def in_turn(
    view: np.ndarray, index: np.ndarray, values: Sequence[np.ndarray], operation: Callable
) -> np.ndarray:
    """``operation`` on elements of ``view``, one after another where an index comes again; the old values."""
    order = np.argsort(index, kind="stable")
    ranked = index[order]
    first = np.concatenate(([True], ranked[1:] != ranked[:-1]))
    begins = np.maximum.accumulate(np.where(first, np.arange(len(ranked)), 0))
    rank = np.arange(len(ranked)) - begins
    old = np.empty(len(index), view.dtype)
    for turn in range(int(rank.max()) + 1):
        chosen = order[rank == turn]
        place = index[chosen]
        before = view[place]
        old[chosen] = before
        view[place] = operation(before, *(v[chosen] for v in values))
    return old
