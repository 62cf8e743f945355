"""A command under a tool of NVIDIA's compute-sanitizer, where it is and works."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Accesses out of bounds; hazards in shared memory. initcheck is left out: torch's allocator reuses memory.
TOOLS = ("memcheck", "racecheck")
_PROBE = "import torch; torch.zeros(8, device='cuda').add_(1).cpu()"


def _descendants(pid: int) -> set[int]:
    """Processes that one started, and those that they did, as far as Linux says."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found, left = set(), [pid]
    while left:
        new = children.get(left.pop(), [])
        found.update(new)
        left += new
    return found


def stop(process: subprocess.Popen) -> None:
    """Kill a process and all that it started: a tool alone would leave its program on the GPU.

    They keep the group that they are in, so that who kills that reaches them too.
    """
    if process.poll() is None:
        own: set[int] = {process.pid}
        new = own
        while new:  # what is stopped starts nothing more
            for pid in new:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            new = _descendants(process.pid) - own
            own |= new
        for pid in own:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def run(
    command: Sequence[str], timeout: float, variables: dict[str, str] | None = None, cwd: object = None
) -> tuple[int | None, str]:
    """Exit code, ``None`` if the time was up, and what was printed."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **(variables or {})},
        cwd=cwd,
    ) as process:
        try:
            output, _ = process.communicate(timeout=max(timeout, 1.0))
        except subprocess.TimeoutExpired:
            stop(process)
            return None, process.communicate()[0]
        finally:
            stop(process)
    return process.returncode, output


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
