"""A command under a tool of NVIDIA's compute-sanitizer, where it is and works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

# Accesses out of bounds; hazards in shared memory. initcheck is left out: torch's allocator reuses memory.
TOOLS = ("memcheck", "racecheck")
_PROBE = "import torch; torch.zeros(8, device='cuda').add_(1).cpu()"


def run(
    command: Sequence[str], timeout: float, variables: dict[str, str] | None = None, cwd: object = None
) -> tuple[int | None, str]:
    """Exit code, ``None`` if the time was up, and what was printed."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(timeout, 1.0),
            env={**os.environ, **(variables or {})},
            cwd=cwd,
        )
    except subprocess.TimeoutExpired as error:
        return None, (error.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout


def last_line(output: str) -> str:
    return (output.strip().splitlines() or ["printed nothing"])[-1][:300]


def check(
    tool: str,
    command: Sequence[str],
    timeout: float,
    *,
    variables: dict[str, str] | None = None,
    summary: object = last_line,
    cwd: object = None,
) -> dict:
    """A row: ``status``, ``summary`` and the end of the ``output``. Failed is what the tool reports or what
    ends with another exit code than 0; skipped, where the tool is missing, does not work or runs out of time.
    """
    begun, row = time.time(), {"name": tool, "status": "skipped"}
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        reason = "compute-sanitizer is not installed"
        return row | {"summary": reason, "reason": reason}
    prefix = [program, "--tool", tool, "--error-exitcode", "86", "--target-processes", "all"]
    code, output = run([*prefix, sys.executable, "-c", _PROBE], min(timeout, 120), variables, cwd)
    if code != 0:
        reason = f"compute-sanitizer does not work on this machine: {last_line(output)}"
        return row | {"summary": reason, "reason": reason}
    left = timeout - (time.time() - begun)
    code, output = run([*prefix, *command], left, variables, cwd)
    counts = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    found = f"{summary(output)}; {'; '.join(counts) or 'no summary of the tool'}"
    row |= {"summary": found, "output": output[-8000:]}
    if code is None:
        return row | {"reason": f"not at its end after {left:.0f} s"}
    if code == 0 and counts:
        return row | {"status": "ok"}
    return row | {"status": "failed", "reason": found}
