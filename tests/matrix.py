"""A part of the suite with the oldest and the newest torch in range: `make matrix`, `python tests/matrix.py`.

For each version an environment is made in build/matrix, with pip as it is configured; `--python PATH` takes
an interpreter that is there in its place. Tests run with the torch of that environment and this tree.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    "tests/kernels/test_atm.py",
    "tests/kernels/library/test_dispatch.py",
    "tests/segvit/model/test_model.py",
]


def versions() -> list[str]:
    """The oldest torch that pyproject.toml takes, and the one of constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = next(name.partition(">=")[2] for name in project["dependencies"] if name.startswith("torch>="))
    newest = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert newest is not None
    return [oldest, newest[1]]


def environment(version: str) -> Path:
    """The interpreter of an environment with this torch, made where it is not there."""
    folder = ROOT / "build" / "matrix" / version
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        wanted = version if version.count(".") > 1 else f"{version}.*"
        command = [python, "-m", "pip", "install", "--quiet", f"torch=={wanted}", f"{ROOT}[train]"]
        # The interpreter of Triton 3.6, which comes with torch 2.11, needs it.
        numpy = "numpy<2.4" if version.startswith("2.11") else "numpy"
        subprocess.run([*command, numpy, "pytest", "hypothesis", "scipy"], check=True)
        (folder / "ready").touch()
    return python


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/matrix.py", description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="*", default=versions(), help="versions (default: %(default)s)")
    parser.add_argument(
        "--python", action="append", help="an interpreter with torch, in place of these; again"
    )
    parser.add_argument("tests", nargs="*", default=TESTS, help="for pytest (default: %(default)s)")
    args = parser.parse_args()
    failed = []
    for python in args.python or [str(environment(version)) for version in args.torch]:
        variables = {**os.environ, "PYTHONPATH": str(ROOT)}
        said = "import sys, torch; print('Python', sys.version.split()[0], 'torch', torch.__version__)"
        subprocess.run([python, "-c", said], env=variables, check=True)
        command = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *args.tests]
        if subprocess.run(command, cwd=ROOT, env=variables).returncode:
            failed.append(python)
    for python in failed:
        print(f"tests/matrix.py: failed: {python}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
