"""The package in the form of Hugging Face's Kernel Hub: ``python csrc/hub.py``; needs what wheels.py needs.

Writes a folder that ``kernels.get_local_kernel`` loads and that can be uploaded: ``build.toml``, a card,
``benchmarks/`` for ``kernels benchmark``, and in ``build/`` a copy of ``segvit_kernels`` for every machine:
with the native library for CPUs, for CUDA where nvcc is, and one for all others (Triton and PyTorch). A
copy imports nothing by its own name; its operators stand in a namespace of its own in ``torch.ops``, so
that several versions live in one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path

import wheels

import build as native

ROOT = Path(__file__).resolve().parents[1]
VERSION = 1  # of the interface: grows when a name or an argument goes
LEFT_OUT = ("testing", "__pycache__", "__main__.py", "*.so", "*.pyc")
CARD = """---
license: apache-2.0
tags:
- kernels
---
{readme}"""


def relative(text: str, depth: int) -> str:
    """Source with imports of ``segvit_kernels`` from the package that it is in, ``depth`` folders down."""
    dots = "." * (depth + 1)
    text = re.sub(r"^(\s*)from segvit_kernels import", rf"\1from {dots} import", text, flags=re.M)
    text = re.sub(r"^(\s*)from segvit_kernels\.", rf"\1from {dots}", text, flags=re.M)
    if left := re.search(
        r"^\s*import segvit_kernels.*|import_module\(f?\"segvit_kernels.*", text, flags=re.M
    ):
        raise RuntimeError(f"cannot be made relative: {left[0].strip()}")
    return text


def copy(folder: Path, namespace: str) -> None:
    """``segvit_kernels`` into ``folder``, under any name, with its operators in ``namespace``."""
    package = ROOT / "segvit_kernels"
    shutil.copytree(package, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for path in folder.rglob("*.py"):
        text = relative(path.read_text(encoding="utf-8"), len(path.relative_to(folder).parts) - 1)
        path.write_text(text, encoding="utf-8")
    named = folder / "_native.py"
    text, changed = re.subn(
        r'^NAMESPACE = "segvit"$', f'NAMESPACE = "{namespace}"', named.read_text(), flags=re.M
    )
    assert changed == 1
    named.write_text(text)
    with (folder / "__init__.py").open("a", encoding="utf-8") as file:
        file.write("\nfrom .integrations import kernels as layers  # noqa: E402\n")


def namespace() -> str:
    """Of this state of the sources."""
    files = [p for p in (ROOT / "segvit_kernels").rglob("*") if p.suffix in (".py", ".json")]
    content = b"".join(p.relative_to(ROOT).as_posix().encode() + p.read_bytes() for p in sorted(files))
    content += native.sources_hash().encode()
    return f"segvit_{hashlib.sha256(content).hexdigest()[:12]}"


def _capabilities(archs: str) -> list[str]:
    numbers = sorted({int(re.sub(r"\D", "", arch)) for arch in archs.split(";")})
    return [f"{number // 10}.{number % 10}" for number in numbers]


def build(out: Path, archs: str) -> list[Path]:
    """The repository, in place of what is at ``out``; its variants.

    Raises:
        RuntimeError: the library cannot be built, or asks for more than the Hub's kernels may.
    """
    name = namespace()
    arguments = ["--glibc", wheels.GLIBC, "--namespace", name, "--archs", archs]
    args = native.parse(arguments)
    machine = f"{platform.machine()}-linux"
    # A library holds the kernels of CPUs too; torch's stable ABI is that of 2.11.
    backends = {"torch-universal": {"type": "cpu"}, f"torch-stable-abi211-cpu-{machine}": {"type": "cpu"}}
    if nvcc := native._nvcc(args):
        cuda = {"type": "cuda", "archs": _capabilities(archs)}
        major, minor, *_ = native.nvcc_version(nvcc).split(".")
        backends[f"torch-stable-abi211-cu{major}{minor}-{machine}"] = cuda
    with tempfile.TemporaryDirectory() as scratch:
        library = native.build(native.parse([*arguments, "--out", scratch]))
        if wrong := wheels.faults(library):
            raise RuntimeError(f"{library.name}: " + "; ".join(wrong))
        shutil.rmtree(out, ignore_errors=True)
        for variant, backend in backends.items():
            folder = out / "build" / variant
            copy(folder, name)
            if variant != "torch-universal":
                shutil.copy(library, folder)
            about = {"id": f"_{name}", "name": "segvit-kernels", "version": VERSION}
            about |= {"license": "Apache-2.0", "python-depends": [], "backend": backend}
            (folder / "metadata.json").write_text(json.dumps(about, indent=1) + "\n")
    (out / "build.toml").write_text(
        f'[general]\nname = "segvit-kernels"\nedition = 5\nversion = {VERSION}\nlicense = "apache-2.0"\n'
        'backends = ["cpu", "cuda", "rocm"]\n\n[torch-noarch]\n'
    )
    (out / "benchmarks").mkdir()
    shutil.copy(ROOT / "csrc" / "hub_benchmark.py", out / "benchmarks" / "benchmark.py")
    (out / "README.md").write_text(CARD.format(readme=(ROOT / "docs" / "hub.md").read_text()))
    return [out / "build" / variant for variant in backends]


def main() -> int:
    parser = argparse.ArgumentParser(prog="csrc/hub.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "hub", help="folder (default: build/hub)"
    )
    archs = wheels.CUDA_ARCHS
    parser.add_argument("--archs", default=archs, help="of CUDA, '' for none (default: %(default)s)")
    args = parser.parse_args()
    try:
        for variant in build(args.out, args.archs):
            print(variant)
    except RuntimeError as error:
        print(f"csrc/hub.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
