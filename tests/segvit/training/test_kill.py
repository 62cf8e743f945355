"""Training killed at random moments and at operations on files, or on a full disk (all: make kill-test)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_disturbed_runs_go_on_bitwise():
    command = [sys.executable, str(TESTS / "kill.py"), "--kills", "4", "--points", "101", "--nodes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and all(int(line.split()[0]) >= 2 for line in lines), done.stdout
