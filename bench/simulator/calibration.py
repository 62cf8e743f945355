"""The simulator on code whose speed is known: FlashAttention-2 as the installed torch holds it, and a plain
matrix product in Triton.

Of FlashAttention-2 only the main loop is executed, as for long sequences: its parameters are a structure of
another project. It is found in ``libtorch_cuda.so`` at run time and read with cuobjdump.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.simulator import core
from bench.simulator.launch import Launch
from bench.simulator.machine import H100
from segvit_kernels.testing.machine_code import Code, cuobjdump, instructions

CLOCK = 1.755e9
"""At which the published figures were taken, or thereabouts."""


@dataclasses.dataclass(frozen=True)
class Flash:
    """A kernel of FlashAttention-2 at head dim 64: what its mangled name ends with, warps and bytes of shared
    memory of a program, rows by keys of a step of its loop, products in it, and published TFLOP/s."""

    name: str
    kernel: str
    flags: str
    warps: int
    shared: int
    step: tuple[int, int]
    products: int
    published: str


# Flags: without dropout, causal mask, window, slopes; sizes even; without a cap (and returned probabilities).
FLASH = (
    Flash("forward", "flash_fwd_kernel", "00001100", 4, 48 << 10, (128, 128), 2, "320–350"),
    Flash("backward", "flash_bwd_dq_dk_dv_loop_seqk", "0000110", 8, 144 << 10, (128, 128), 5, "280–290"),
)


def _wanted(flash: Flash) -> re.Pattern[bytes]:
    flags = "".join(f"Lb{flag}E" for flag in flash.flags)
    rows, keys = flash.step
    traits = rf"ILi64ELi{rows}ELi{keys}ELi{flash.warps}E\w*bfloat16_t\w*E"
    return re.compile(rf"_ZN\w*{flash.kernel}\w*{traits}{flags}EEv\w+".encode())


def flash_code(folder: Path, library: Path | None = None) -> dict[str, str]:
    """Machine code of :data:`FLASH` for sm_90 by name, kept in ``folder``; without those that
    torch lacks."""
    library = library or Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not library.is_file():
        return {}
    key = f"{library.stat().st_size}-{torch.__version__}"
    kept = {flash.name: folder / f"flash-{flash.name}-{key}.sass" for flash in FLASH}
    if not all(path.is_file() for path in kept.values()):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            cuobjdump("-arch", "sm_90", "-xelf", "all", library, folder=Path(temporary))
            for cubin in sorted(Path(temporary).glob("*.cubin")):
                data = cubin.read_bytes()
                for flash in FLASH:
                    if found := _wanted(flash).search(data):
                        text = cuobjdump("-res-usage", "-sass", "-fun", found[0].decode(), cubin)
                        kept[flash.name].write_text(text)
            for path in kept.values():
                path.touch()  # looked for in vain
    return {name: text for name, path in kept.items() if (text := path.read_text())}


def loop_cycles(text: str, warps: int, resident: int, iterations: int = 10) -> float:
    """Cycles of an iteration of the innermost loop that has most products of tensor cores, of ``resident``
    programs together; branches forward inside it are not taken."""
    code = instructions(text)

    def products(loop: frozenset[int]) -> int:
        return sum(code[k].name in ("HMMA", "HGMMA") for k in loop)

    body = sorted(max(Code.sass(text).innermost, key=products))
    timed = {k: core.timed(code[k]) for k in body}
    here = [(p, body * iterations) for p in range(resident) for _ in range(max(1, warps // 4))]
    first, last = 3 * len(body) - 1, iterations * len(body) - 1
    run = core.run(timed, here, [{first, last} for _ in here])
    spans = [times[last] - times[first] for times in run.times]
    return sum(spans) / len(spans) / (iterations - 3)


def _flash_rows(folder: Path) -> list[dict[str, Any]]:
    try:
        code = flash_code(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        code, why = {}, f"cuobjdump: {error}"
    else:
        why = f"torch {torch.__version__} holds no such kernel for sm_90"
    found = []
    for flash in FLASH:
        row = {
            "name": f"FlashAttention-2 {flash.name}, head dim 64",
            "published": f"{flash.published} TFLOP/s",
        }
        if flash.name not in code:
            found.append(row | {"status": "skipped", "reason": why})
            continue
        text = code[flash.name]
        registers = int(re.search(r"REG:(\d+)", text)[1])
        resident = H100.unit.fitting(flash.warps, registers, flash.shared)
        cycles = loop_cycles(text, flash.warps, resident)
        flops = flash.products * 2 * flash.step[0] * flash.step[1] * 64 * resident
        tera = flops / cycles * H100.multiprocessors * CLOCK / 1e12
        note = f"main loop, {resident} programs of {registers} registers, {CLOCK / 1e9:.3f} GHz"
        row |= {"predicted": f"{tera:.0f} TFLOP/s", "tflops": tera, "note": note, "status": "ok"}
        found.append(row)
    return found


def _product_row(describe: Callable[[Any, str], dict[str, Any]]) -> dict[str, Any]:
    size = 8192
    row = {"name": f"plain Triton matrix product, {size}³, bfloat16", "published": "550–650 TFLOP/s"}
    try:
        from bench.simulator import matmul  # needs Triton

        described = describe(matmul.launch(size), "sm_90")
        machine = dataclasses.replace(H100, clock=CLOCK)
        predicted = Launch(described).predict(machine)
    except (ImportError, OSError, ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        return row | {"status": "skipped", "reason": f"{type(error).__name__}: {error}"[:200]}
    tera = 2 * size**3 / predicted.seconds / 1e12
    note = f"whole launch, {predicted.limit}, {CLOCK / 1e9:.3f} GHz"
    return row | {"predicted": f"{tera:.0f} TFLOP/s", "tflops": tera, "note": note, "status": "ok"}


def rows(
    folder: Path, describe: Callable[[Any, str], dict[str, Any]], progress: Callable[[str], object]
) -> list[dict[str, Any]]:
    """One row for each piece of code of known speed; ``describe(launch, architecture)`` compiles a launch
    into what :class:`Launch` takes."""
    progress("calibration")
    return [*_flash_rows(folder), _product_row(describe)]
