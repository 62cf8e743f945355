"""Registers, static shared memory and spills of the CUDA kernels: ``python csrc/resources.py``; needs nvcc.

Compiles as csrc/build.py does, and only what that has not compiled yet. Shared memory that a kernel is given
at its launch is not in the table; the head of its file states it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import build


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture, as compiled."""

    source: str
    name: str  # without namespaces and parameters
    arch: str
    registers: int
    shared: int  # bytes, the static part
    spilled: int  # bytes of stack and local memory


def find_cuobjdump() -> str | None:
    """cuobjdump beside nvcc, of the path or out of Triton's wheel; ``None`` if there is none."""
    candidates = [Path(nvcc).resolve().with_name("cuobjdump")] if (nvcc := build.find_nvcc()) else []
    candidates.append(Path(shutil.which("cuobjdump") or os.devnull))
    if (spec := importlib.util.find_spec("triton")) and spec.origin:
        candidates.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((str(path) for path in candidates if path.is_file()), None)


def missing() -> str | None:
    """What this machine lacks to list the kernels; ``None`` if nothing."""
    if build.find_nvcc() is None:
        return "no nvcc: install the CUDA toolkit, or set CUDACXX"
    return None if find_cuobjdump() else "no cuobjdump: install the CUDA toolkit's, or Triton, which has one"


def objects() -> dict[str, Path]:
    """The compiled CUDA sources, by stem."""
    found = build.objects(build.parse([]), "cuda_")
    return {name.removeprefix("cuda_").removesuffix(".o"): path for name, path in found.items()}


def demangled(names: list[str]) -> list[str]:
    """``kernel<float, 32>`` for a mangled name: without namespaces, result and parameters."""
    command, text = ["c++filt", "--no-params"], "\n".join(names)
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return [
        re.sub(r"^void |segvit::(cuda::)?|\(anonymous namespace\)::", "", s)
        for s in result.stdout.splitlines()
    ]


def plain() -> str:
    """The newest plain architecture that is compiled for, which a fat binary has the PTX of: "80"."""
    return max((a for a in build.parse([]).archs.split(";") if a.isdigit()), default="80", key=int)


def ptx(arch: str) -> list[str]:
    """The PTX of each CUDA source for one plain architecture, "80"; compiled where it is not at hand."""
    args = build.parse([])
    if arch != plain() or arch not in args.archs.split(";"):
        args.archs = arch
    found = []
    for path in build.objects(args, "cuda_").values():
        command = [find_cuobjdump(), "-ptx", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.append(text[text.find(".version") :])
    return found


def kernels(source: str, path: Path) -> list[Kernel]:
    """Every kernel of an object file, for every architecture it was compiled for."""
    command = [find_cuobjdump(), "-res-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, arch = [], ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            function = match[1]
        elif "REG:" in line:
            use = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            found.append((function, arch, use["REG"], use["SHARED"], use["STACK"] + use["LOCAL"]))
    names = demangled([function for function, *_ in found])
    return [Kernel(source, name, *rest) for name, (_, *rest) in zip(names, found, strict=True)]


def functions(path: Path, arch: str) -> dict[str, str]:
    """The machine code of each kernel of an object file, for one architecture."""
    command = [find_cuobjdump(), "-sass", "-arch", arch, str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names, bodies = re.findall(r"Function : (\w+)", text), re.split(r"Function : \w+", text)[1:]
    return dict(zip(demangled(names), bodies, strict=True))


def instructions(path: Path, arch: str, *mnemonics: str) -> dict[str, dict[str, int]]:
    """How often each mnemonic stands in the machine code of each kernel, for one architecture."""
    return {
        name: {m: len(re.findall(rf"\b{m}\b", body)) for m in mnemonics}
        for name, body in functions(path, arch).items()
    }


def most_threads(path: Path, arch: str) -> dict[str, int]:
    """Threads of a block by the launch bounds of each kernel that has some, for one architecture."""
    command = [find_cuobjdump(), "-elf", "-arch", arch, str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for name, body in re.findall(r"^\.nv\.info\.(\w+)\n(.*?)(?=^\.\w|\Z)", text, re.DOTALL | re.MULTILINE):
        if match := re.search(r"EIATTR_MAX_THREADS.*?Value:\s+0x(\w+) 0x(\w+) 0x(\w+)", body, re.DOTALL):
            found[name] = math.prod(int(side, 16) for side in match.groups())
    return dict(zip(demangled(list(found)), found.values(), strict=True)) if found else {}


def main() -> int:
    if reason := missing():
        print(f"csrc/resources.py: error: {reason}", file=sys.stderr)
        return 1
    print(f"{'file':16} {'kernel':46} {'arch':8} {'registers':>9} {'shared':>7} {'spilled':>7}")
    for source, path in objects().items():
        for k in sorted(kernels(source, path), key=lambda k: (k.name, k.arch)):
            print(f"{k.source:16} {k.name:46} {k.arch:8} {k.registers:9} {k.shared:7} {k.spilled:7}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
