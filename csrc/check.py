"""The CUDA kernels on this machine's GPU: ``python csrc/check.py``; needs nvcc, a GPU and pytest.

Builds them for this GPU, runs the cases of the operators' batteries on backend "cuda", and the small ones
once more under NVIDIA's compute-sanitizer, where it is and works: memcheck (accesses out of bounds,
leaked errors), racecheck (hazards in shared memory), initcheck is left out, since torch's allocator reuses
memory. Exit code 1 if anything failed; what was skipped is said with its reason.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
import shutil
import sys
import time
from pathlib import Path

import sanitizer

import build

SOURCES = [p.stem for p in sorted((build.HERE / "cuda").iterdir()) if p.suffix in (".cu", ".cpp")]
TESTS = [f"tests/kernels/test_{stem}.py" for stem in SOURCES if stem in build.OPERATORS]
# A row of tests/kernels/backends.py.
CASES = "cuda-gpu and (test_case or test_halves or test_shapes)"
SMALL = "cuda-gpu and (test_case or test_halves) and (fp32 or bf16)"
VARIABLES = {"PYTHONPATH": str(build.ROOT), "TRITON_INTERPRET": "0"}


def _pytest(selection: str) -> list[str]:
    options = ["-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", selection]
    return [sys.executable, "-m", "pytest", *options, *TESTS]


def _summary(output: str) -> str:
    """pytest's last line: how many passed, failed, were skipped."""
    lines = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    return lines[-1].strip("= ") if lines else sanitizer.last_line(output)


def built(timeout: float) -> dict:
    """The kernels, compiled for this GPU."""
    for module, what in (("pytest", "pytest is not installed"), ("torch", "torch is not installed")):
        if importlib.util.find_spec(module) is None:
            return {"name": "build", "status": "skipped", "summary": what, "reason": what}
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        reason = "nvcc is not installed"
        return {"name": "build", "status": "skipped", "summary": reason, "reason": reason}
    command = [sys.executable, str(build.HERE / "build.py"), "--archs", "native", "--debug"]
    code, output = sanitizer.run(command, timeout, VARIABLES, build.ROOT)
    if code == 0:
        return {"name": "build", "status": "ok", "summary": sanitizer.last_line(output)}
    reason = " ".join(output.split())[:400] if code is not None else _late(timeout)
    return {"name": "build", "status": "failed", "summary": reason, "reason": reason}


def _late(timeout: float) -> str:
    return f"longer than {timeout:.0f} s"


def tests(timeout: float) -> dict:
    """The device tests, at all sizes."""
    code, output = sanitizer.run(_pytest(CASES), timeout, VARIABLES, build.ROOT)
    summary = _summary(output)
    row = {"name": "tests", "summary": summary, "output": output[-8000:]}
    # Tests that were all skipped prove nothing.
    if code == 0 and " passed" in f" {summary}":
        return row | {"status": "ok"}
    return row | {"status": "failed", "reason": summary if code is not None else _late(timeout)}


def sanitize(tool: str, timeout: float) -> dict:
    """The small cases under one tool of compute-sanitizer."""
    command = _pytest(SMALL)
    return sanitizer.check(tool, command, timeout, variables=VARIABLES, summary=_summary, cwd=build.ROOT)


def main() -> int:
    parser = argparse.ArgumentParser(prog="csrc/check.py", description=__doc__.splitlines()[0])
    parser.add_argument("--timeout", type=float, default=720.0, help="seconds for all of it (default 720)")
    parser.add_argument("--json", action="store_true", help="print rows as lines of JSON")
    options = parser.parse_args()
    failed, end = False, time.time() + options.timeout
    parts = (built, tests, *(functools.partial(sanitize, tool) for tool in sanitizer.TOOLS))
    for part in parts:
        # Half of what is left, so that a part that hangs leaves time for the next; the last has all.
        left = end - time.time()
        row = part(left if part is parts[-1] else left / 2)
        failed |= row["status"] == "failed"
        print(
            json.dumps(row) if options.json else f"{row['name']}: {row['status']}: {row['summary']}",
            flush=True,
        )
        if row["status"] == "failed" and not options.json:
            print(row.get("output", ""), flush=True)
        if row["name"] == "build" and row["status"] != "ok":
            break
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
