"""Metadata lives in pyproject.toml. With SEGVIT_KERNELS_NATIVE=1 in the environment the native library is
built too (csrc/build.py; needs torch where it is built: pip's --no-build-isolation)."""

import importlib.util
import os
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = os.environ.get("SEGVIT_KERNELS_NATIVE", "0") not in ("", "0")


class BuildWithLibrary(build_py):
    """Puts the native library beside the Python files."""

    def run(self) -> None:
        super().run()
        if not NATIVE:
            return
        path = Path(__file__).resolve().parent / "csrc" / "build.py"
        spec = importlib.util.spec_from_file_location("segvit_native_build", path)
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        out = (
            path.parents[1] / "segvit_kernels"
            if self.editable_mode
            else Path(self.build_lib) / "segvit_kernels"
        )
        build.build(build.parse(["--out", str(out)]))


class AnyPythonWheel(bdist_wheel):
    """The library knows nothing of Python: one wheel per platform serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2]) if NATIVE else super().get_tag()


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return NATIVE


setup(
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": AnyPythonWheel},
    distclass=PlatformDistribution,
)
