"""What is assumed of the GPUs: published rates, and others' measurements where nothing is published."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor has for the programs on it."""

    shared: int
    registers: int = 65536
    warps: int = 64
    programs: int = 32

    def fitting(self, warps: int, registers: int, shared: int) -> int:
        """How many programs of so many warps, registers a thread and bytes of shared memory fit."""
        # A warp gets registers by 256; a program shared memory by 128 bytes, and 1 KiB for the system.
        by_registers = self.registers // (-(-32 * registers // 256) * 256) // warps
        by_shared = self.shared // (-(-shared // 128) * 128 + 1024)
        return min(self.programs, self.warps // warps, by_registers, by_shared)


MULTIPROCESSORS = {"sm_80": Multiprocessor(164 * 1024), "sm_90": Multiprocessor(228 * 1024)}


@dataclasses.dataclass(frozen=True)
class Machine:
    """A GPU of Hopper's architecture.

    Args:
        name: for tables.
        clock: cycles a second. Under load a GPU may run a fifth below it.
        multiprocessors: how many.
        memory: bytes a second that a copy reaches, read and written together.
        l2: bytes a second that all multiprocessors together draw from the second-level cache: chosen so that
            a plain matrix product comes out as published; nothing else here is fitted.
        launch_s: from the end of one kernel to the first instruction of the next in a CUDA graph.
    """

    name: str
    memory: float
    clock: float = 1.98e9
    multiprocessors: int = 132
    l2: float = 7.0e12
    launch_s: float = 1e-6
    unit: Multiprocessor = MULTIPROCESSORS["sm_90"]

    def rates(self) -> dict[str, float]:
        """What the floors of operators are divided by: a copy, products as libraries reach them, MUFU."""
        exponentials = self.multiprocessors * 16 * self.clock
        return {
            "copy_bytes_per_s": self.memory,
            "matmul_bfloat16_flop_per_s": 790e12,
            "exp2_per_s": exponentials,
        }


H100 = Machine("H100", 2.9e12)
H200 = Machine("H200", 4.3e12)
MACHINES = {machine.name: machine for machine in (H100, H200)}
