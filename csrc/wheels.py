"""Every wheel of this tree: ``python csrc/wheels.py``; needs torch, setuptools, ziglang and a C++ compiler.

The pure one, which has Triton's kernels and PyTorch; for Linux one a machine, with the CPU library inside,
and the CUDA kernels where nvcc is. All are for every Python and, by LibTorch's stable ABI, for torch 2.11 and
later. What a library asks of the machine where it is loaded is read out of it and compared with what its name
promises. The machine that is not this one's takes a cross compiler (g++-aarch64-linux-gnu).
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GLIBC = "2.28"  # torch's own wheels ask for it
# What manylinux_2_28 promises beside glibc (PEP 600): GCC 8's libraries.
MOST = {"GLIBC": GLIBC, "GLIBCXX": "3.4.25", "CXXABI": "1.3.11", "GCC": "7.0.0"}
LIBRARIES = {
    *("libtorch.so", "libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"),
    *("libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"),
}
# Turing to Blackwell; PTX of the newest for what comes after.
CUDA_ARCHS = "75;80;86;89;90a;100;120"


def versions(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def faults(library: Path) -> list[str]:
    """What a library asks for beyond manylinux_2_28 and the stable ABI of LibTorch, in words."""
    from elftools.elf.elffile import ELFFile

    found = []
    with library.open("rb") as file:
        elf = ELFFile(file)
        needed = {tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")}
        found += [f"needs {name}" for name in sorted(needed - LIBRARIES)]
        asked = elf.get_section_by_name(".gnu.version_r")
        for _, auxiliaries in asked.iter_versions() if asked else ():
            for auxiliary in auxiliaries:
                kind, _, version = auxiliary.name.partition("_")
                if kind not in MOST or versions(version) > versions(MOST[kind]):
                    found.append(f"asks for {auxiliary.name}, {MOST.get(kind)} at most")
        versioned = elf.get_section_by_name(".gnu.version")
        for number, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
            if (
                symbol["st_shndx"] != "SHN_UNDEF"
                or symbol["st_info"]["bind"] == "STB_WEAK"
                or not symbol.name
            ):
                continue
            local = "VER_NDX_LOCAL", "VER_NDX_GLOBAL"
            unversioned = versioned is None or versioned.get_symbol(number)["ndx"] in local
            if unversioned and not re.match(r"(aoti_)?torch_|_Unwind_|__tls_get_addr", symbol.name):
                found.append(f"asks for {symbol.name}, which is not of the stable ABI")
    return found


def build(out: Path, machine: str | None, archs: str = CUDA_ARCHS) -> Path:
    """One wheel, for a machine or (``None``) the pure one; what is in ``out`` is replaced.

    Raises:
        RuntimeError: it cannot be built, or asks for more than its name says.
    """
    variables = {k: v for k, v in os.environ.items() if not k.startswith("SEGVIT_KERNELS_")}
    if machine is not None:
        variables |= {"SEGVIT_KERNELS_NATIVE": "1", "SEGVIT_KERNELS_GLIBC": GLIBC}
        variables |= {"SEGVIT_KERNELS_MACHINE": machine, "SEGVIT_KERNELS_CUDA_ARCHS": archs}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    with tempfile.TemporaryDirectory() as scratch:
        # Nothing of an earlier build: setuptools keeps what has gone from the tree since.
        config = Path(scratch, "build.cfg")
        config.write_text(f"[build]\nbuild_base = {scratch}/build\n")
        variables["DIST_EXTRA_CONFIG"] = str(config)
        done = subprocess.run(
            [*command, "--wheel-dir", scratch, str(ROOT)], env=variables, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError((done.stderr or done.stdout)[-4000:])
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            libraries = [name for name in archive.namelist() if name.endswith(".so")]
            wrong = [f"{len(libraries)} libraries"] if len(libraries) != (machine is not None) else []
            for name in libraries:
                wrong += faults(Path(archive.extract(name, scratch)))
        if wrong:
            raise RuntimeError(f"{wheel.name}: " + "; ".join(wrong))
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(wheel, out / wheel.name))


def machines() -> list[str]:
    """This machine, and aarch64 where its compiler is."""
    here = platform.machine()
    return [here, *["aarch64"] * (here != "aarch64" and shutil.which("aarch64-linux-gnu-g++") is not None)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="csrc/wheels.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder (default: dist)")
    parser.add_argument(
        "--machines", nargs="*", default=machines(), help="beside the pure wheel (default: %(default)s)"
    )
    parser.add_argument("--archs", default=CUDA_ARCHS, help="of CUDA, '' for none (default: %(default)s)")
    args = parser.parse_args()
    try:
        for machine in [None, *args.machines]:
            wheel = build(args.out, machine, args.archs)
            print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    except RuntimeError as error:
        print(f"csrc/wheels.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
