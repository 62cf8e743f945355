"""What a launch executes and moves: instructions by class, bytes, sectors, bank conflicts."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

_SPECIAL = {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div"}
_BY_NAME = {
    "tensor core": {"mma", "wgmma"},
    "conversion": {"cvt"},
    "warp": {"shfl", "vote", "redux", "match", "activemask"},
    "synchronisation": {"bar", "barrier", "fence", "membar", "mbarrier"},
    "control": {"bra", "ret", "exit", "trap", "call"},
    "move": {"mov", "cvta", "selp"},
}
_FLOATS = {"f16", "f16x2", "bf16", "bf16x2", "f32", "f64"}
_MEMORY = {"ld", "ldu", "st", "atom", "red", "cp", "ldmatrix", "stmatrix"}


@dataclasses.dataclass
class Counts:
    """What was executed.

    Args:
        instructions: by opcode, one for each warp.
        blocks: of the grid.
        memory: where the launch was asked for ``traffic``: ``global bytes read`` and ``written`` (of all
            threads), ``global sectors`` (of 32 bytes, for each instruction of a warp), ``shared bytes read``
            and ``written``, ``shared passes`` (of at most 128 bytes through the 32 banks) and ``bank
            conflicts``, the passes beyond those that accesses of that width need. Tensor cores' own reads
            of shared memory (``wgmma``) are not among them.
    """

    instructions: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    blocks: int = 0
    memory: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def __iadd__(self, other: Counts) -> Counts:
        self.instructions += other.instructions
        self.blocks += other.blocks
        self.memory += other.memory
        return self

    @property
    def classes(self) -> collections.Counter:
        """Instructions of warps by class: tensor core, float, integer, special function, global memory, …"""
        found: collections.Counter = collections.Counter()
        for opcode, count in self.instructions.items():
            found[classify(opcode)] += count
        return found


def classify(opcode: str) -> str:
    """The class of an instruction, from its name with all modifiers."""
    name, *modifiers = opcode.split(".")
    if name == "wgmma" and modifiers[0] != "mma_async":
        return "synchronisation"
    if name == "cp" and "global" not in modifiers:
        return "synchronisation"  # groups of copies
    if name in _MEMORY:
        shared = name in ("ldmatrix", "stmatrix") or ("global" not in modifiers and "shared" in modifiers)
        spaces = (space for space in ("param", "local", "global") if space in modifiers)
        return f"{'shared' if shared else next(spaces, 'generic')} memory"
    floating = bool(_FLOATS & set(modifiers))
    if name in _SPECIAL and floating:
        return "special function"
    return next(
        (kind for kind, names in _BY_NAME.items() if name in names), "float" if floating else "integer"
    )


class Traffic:
    """Adds accesses of blocks that run at once to ``memory`` of :class:`Counts`.

    Args:
        memory: the counter.
        shape: blocks and threads.
    """

    def __init__(self, memory: collections.Counter, shape: tuple[int, int]) -> None:
        self.memory, self.shape = memory, shape

    def _warps(self, address: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        here = np.broadcast_to(np.True_ if mask is None else mask, self.shape).reshape(-1, 32)
        return np.broadcast_to(address, self.shape).reshape(-1, 32).astype("i8"), here

    def of_global(self, address: np.ndarray, size: int, mask: np.ndarray | None, write: bool) -> None:
        """``size`` bytes at each address."""
        at, here = self._warps(address, mask)
        self.memory[f"global bytes {'written' if write else 'read'}"] += int(here.sum()) * size
        self.memory["global sectors"] += int(_first(np.where(here, at >> 5, -1))[1].sum())

    def of_shared(self, address: np.ndarray, size: int, mask: np.ndarray | None, write: bool) -> None:
        """``size`` bytes at each address; 32, 16 or 8 lanes at once, as 128 bytes allow."""
        at, here = self._warps(address, mask)
        self.memory[f"shared bytes {'written' if write else 'read'}"] += int(here.sum()) * size
        lanes, words = (32, 1) if size <= 4 else (128 // size, size // 4)
        word = np.where(here, at >> 2, -1).reshape(-1, lanes, 1)
        word = np.where(word < 0, -1, word + np.arange(words)).reshape(len(word), -1)
        word, first = _first(word)
        row = np.broadcast_to(np.arange(len(word))[:, None], word.shape)
        banks = np.bincount((row * 32 + (word & 31))[first], minlength=32 * len(word))
        passes = banks.reshape(-1, 32).max(axis=1)
        self.memory["shared passes"] += int(passes.sum())
        self.memory["bank conflicts"] += int((passes - 1)[passes > 0].sum())


def _first(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows sorted, and where each value that is not negative stands first."""
    values = np.sort(values, axis=1)
    first = values >= 0
    first[:, 1:] &= values[:, 1:] != values[:, :-1]
    return values, first
