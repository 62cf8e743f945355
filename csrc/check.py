"""The CUDA kernels on this machine's GPU: ``python csrc/check.py``; needs nvcc, a GPU and pytest.

Builds them for this GPU, runs the device tests of ``tests/test_*_native.py`` on backend "cuda", and the small
cases once more under NVIDIA's compute-sanitizer, where it is and works: memcheck (accesses out of bounds,
leaked errors), racecheck (hazards in shared memory), initcheck is left out, since torch's allocator reuses
memory. Exit code 1 if anything failed; what was skipped is said with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import build

TOOLS = ("memcheck", "racecheck")
TESTS = sorted(str(path.relative_to(build.ROOT)) for path in build.ROOT.glob("tests/test_*_native.py"))


def _run(command: list[str], timeout: float) -> tuple[int | None, str]:
    """Exit code, ``None`` if the time was up, and what was printed."""
    variables = {**os.environ, "PYTHONPATH": str(build.ROOT), "TRITON_INTERPRET": "0"}
    done = {"cwd": build.ROOT, "env": variables, "text": True, "stderr": subprocess.STDOUT}
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, timeout=timeout, **done)
    except subprocess.TimeoutExpired as error:
        return None, (error.stdout or b"").decode(errors="replace")
    return result.returncode, result.stdout


def _pytest(selection: str) -> list[str]:
    options = ["-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", selection]
    return [sys.executable, "-m", "pytest", *options, *TESTS]


def _summary(output: str) -> str:
    """pytest's last line: how many passed, failed, were skipped."""
    lines = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    return lines[-1].strip("= ") if lines else (output.strip().splitlines() or ["printed nothing"])[-1]


def tests(timeout: float) -> dict:
    """The device tests, at all sizes."""
    code, output = _run(_pytest("on_the_device"), timeout)
    summary = _summary(output)
    # Tests that were all skipped prove nothing.
    status = "ok" if code == 0 and " passed" in f" {summary}" else "failed"
    return {"name": "tests", "status": status, "summary": summary, "output": output[-8000:]}


def sanitize(tool: str, timeout: float) -> dict:
    """The small cases under one tool of compute-sanitizer."""
    row = {"name": tool, "status": "skipped"}
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        return row | {"summary": "compute-sanitizer is not installed"}
    command = [program, "--tool", tool, "--error-exitcode", "86", "--target-processes", "all"]
    probe = "import torch; torch.zeros(8, device='cuda').add_(1).cpu()"
    code, output = _run([*command, sys.executable, "-c", probe], 120)
    if code != 0:
        last = (output.strip().splitlines() or ["no message"])[-1]
        return row | {"summary": f"compute-sanitizer does not work on this machine: {last}"}
    code, output = _run([*command, *_pytest("test_on_the_device and (fp32 or bf16)")], timeout)
    counts = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    summary = f"{_summary(output)}; {'; '.join(counts) or 'no summary of the tool'}"
    if code is None:
        return row | {"summary": f"not at its end after {timeout:.0f} s; {summary}"}
    status = "ok" if code == 0 and counts else "failed"
    return row | {"status": status, "summary": summary, "output": output[-8000:]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="csrc/check.py", description=__doc__.splitlines()[0])
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds for each part (default 180)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    try:
        print(build.build(build.parse(["--archs", "native"])), flush=True)
    except RuntimeError as error:
        print(f"csrc/check.py: error: {error}", file=sys.stderr)
        return 1
    rows = []
    for part in (tests, *TOOLS):
        row = part(options.timeout) if callable(part) else sanitize(part, options.timeout)
        rows.append(row)
        print(f"{row['name']}: {row['status']}: {row['summary']}", flush=True)
        if row["status"] == "failed":
            print(row["output"], flush=True)
    if options.out:
        sys.path.insert(0, str(build.ROOT))
        import torch

        from bench.environment import describe

        result = {"environment": describe(torch.device("cuda")), "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
