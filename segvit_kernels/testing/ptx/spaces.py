"""Local memory, and addresses that say themselves which space they are in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from segvit_kernels.testing.ptx.memory import TYPES, joined, split

SHARED_WINDOW, LOCAL_WINDOW = 0x7E00, 0x7D00
"""The upper 16 bits of generic addresses in shared and local memory."""
_INSIDE = np.uint64((1 << 48) - 1)


class LocalMemory:
    """The bytes that each thread has to itself, with a shadow that says which of them were written.

    Args:
        shape: blocks and threads that run.
        size: bytes of a thread.
        fail: as for :class:`~segvit_kernels.testing.ptx.memory.GlobalMemory`.
    """

    def __init__(self, shape: tuple[int, int], size: int, fail: Callable) -> None:
        self.shape, self.size, self.fail = shape, size, fail
        stride = -(-size // 16) * 16
        self.data = np.full(shape[0] * shape[1] * stride, 0xFF, "u1")
        self.known = np.zeros(self.data.size, bool)
        self.begin = np.arange(shape[0] * shape[1]).reshape(shape) * stride

    def _place(
        self, site: int, address: np.ndarray, size: int, mask: np.ndarray | None, what: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where each thread's bytes begin in ``data``, and who is there; who is not has its first byte."""
        here = np.broadcast_to(np.True_ if mask is None else mask, self.shape)
        at = np.broadcast_to(address.astype("i8"), self.shape)
        wrong = here & ((at < 0) | (at > self.size - size))
        if wrong.any():
            first = int(at[wrong][0])
            detail = f"a {what} of {size} bytes of local memory at {first}, a thread has {self.size}"
            self.fail(site, "out of bounds", detail, wrong)
        wrong = here & (at & (size - 1) != 0)
        if wrong.any():
            self.fail(site, "misaligned", f"a local address that {size} does not divide", wrong)
        return self.begin + np.where(here, at, 0), here

    def load(self, site: int, address: np.ndarray, width: int, count: int, mask: np.ndarray | None) -> list:
        """``count`` values of ``width`` bytes from each address."""
        size = width * count
        at, here = self._place(site, address, size, mask, "read")
        if not here.any():
            return [np.zeros((1, 1), TYPES[width])] * count
        nothing = here & ~self.known[at[..., None] + np.arange(size)].all(axis=-1)
        if nothing.any():
            self.fail(site, "uninitialised local memory", "a read of what its thread did not write", nothing)
        return split(self.data.view(TYPES[size]).take(at >> (size.bit_length() - 1)), width, count)

    def store(
        self, site: int, address: np.ndarray, values: Sequence, width: int, mask: np.ndarray | None
    ) -> None:
        """Values of ``width`` bytes to each address."""
        size = width * len(values)
        at, here = self._place(site, address, size, mask, "write")
        at, data = at[here], joined(values, width, self.shape)[here]
        self.data.view(TYPES[size])[at >> (size.bit_length() - 1)] = data
        self.known[at[:, None] + np.arange(size)] = True

    def atomic(
        self, site: int, address: np.ndarray, values: Sequence, dtype: str, operation: Callable, mask: Any,
        shape: tuple[int, int],
    ) -> np.ndarray:  # fmt: skip
        """There is none: the hardware has atomics in global and shared memory."""
        here = np.broadcast_to(np.True_ if mask is None else mask, self.shape)
        self.fail(site, "out of bounds", "an atomic in local memory", here)
        return np.zeros(shape, dtype)


class GenericMemory:
    """Goes to the space that an address says."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine

    def _spaces(self, address: np.ndarray, mask: np.ndarray | None) -> list[tuple[Any, np.ndarray, Any]]:
        m, top = self.machine, address >> np.uint64(48)
        shared, local = top == SHARED_WINDOW, top == LOCAL_WINDOW
        parts: list[tuple[Any, np.ndarray, Any]] = []
        for space, chosen in ((m.shared, shared), (m.local, local), (m.memory, ~(shared | local))):
            here = chosen if mask is None else chosen & mask
            if not here.any():
                continue
            inside = address if space is m.memory else address & _INSIDE
            parts.append((space, inside, mask if chosen.all() else here))
        return parts

    def load(self, site: int, address: np.ndarray, width: int, count: int, mask: np.ndarray | None) -> list:
        """As of the spaces."""
        parts = self._spaces(address, mask)
        if not parts:
            return [np.zeros((1, 1), f"u{width}")] * count
        found = None
        for space, inside, here in parts:
            values = space.load(site, inside, width, count, here)
            found = (
                values
                if found is None
                else [np.where(here, new, old) for new, old in zip(values, found, strict=True)]
            )
        return found

    def store(
        self, site: int, address: np.ndarray, values: Sequence, width: int, mask: np.ndarray | None
    ) -> None:
        """As of the spaces."""
        for space, inside, here in self._spaces(address, mask):
            space.store(site, inside, values, width, here)

    def atomic(
        self, site: int, address: np.ndarray, values: Sequence, dtype: str, operation: Callable, mask: Any,
        shape: tuple[int, int],
    ) -> np.ndarray:  # fmt: skip
        """As of the spaces."""
        found = np.zeros(shape, dtype)
        for space, inside, here in self._spaces(address, mask):
            old = space.atomic(site, inside, values, dtype, operation, here, shape)
            found = old if here is None else np.where(here, old, found)
        return found
