"""Metadata lives in pyproject.toml. With SEGVIT_KERNELS_NATIVE=1 in the environment the native library is
built too (csrc/build.py; needs torch where it is built: pip's --no-build-isolation); SEGVIT_KERNELS_GLIBC and
SEGVIT_KERNELS_MACHINE build it for other machines, as csrc/wheels.py does."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

CSRC = Path(__file__).resolve().parent / "csrc"
NATIVE = os.environ.get("SEGVIT_KERNELS_NATIVE", "0") not in ("", "0")


def _load(name: str) -> ModuleType:
    """A module of csrc, which is no package."""
    spec = importlib.util.spec_from_file_location(f"segvit_native_{name}", CSRC / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithLibrary(build_py):
    """Puts the native library beside the Python files."""

    def run(self) -> None:
        super().run()
        if NATIVE:
            build = _load("build")
            base = CSRC.parent if self.editable_mode else Path(self.build_lib)
            build.build(build.parse(["--out", str(base / "segvit_kernels")]))


class AnyPythonWheel(bdist_wheel):
    """The library knows nothing of Python: one wheel per platform serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        if not NATIVE:
            return super().get_tag()
        args = _load("build").parse([])
        platform = f"manylinux_{args.glibc.replace('.', '_')}" if args.glibc else "linux"
        return "py3", "none", f"{platform}_{args.machine}"

    def write_wheelfile(self, wheelfile_base: str, *args: object, **kwargs: object) -> None:
        super().write_wheelfile(wheelfile_base, *args, **kwargs)
        build = _load("build")
        text = _load("sbom").bill(self.distribution.get_version(), build.parse([]) if NATIVE else None, build)
        folder = Path(wheelfile_base) / "sboms"
        folder.mkdir(exist_ok=True)
        (folder / "segvit-kernels.cdx.json").write_text(text)


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return NATIVE


setup(
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": AnyPythonWheel},
    distclass=PlatformDistribution,
)
