"""``python -m bench host``: figures of two checkouts side by side; what it runs is in tests of the stub."""

import json

import pytest

from bench import __main__ as command
from bench import report
from bench.measure import environment
from bench.suites import host


@pytest.fixture
def measured(monkeypatch):
    """Times by checkout and round, in place of processes."""
    calls = []

    def measure(checkout, seconds):
        calls.append(checkout)
        times = {"atm_fwd": 2e-5, "fused_atm": 6e-5, "a * a": 1e-6}
        groups = {"atm_fwd": "launcher", "fused_atm": "function", "a * a": "torch"}
        factor = (1 if checkout == environment.ROOT else 8) * (2 if len(calls) < 3 else 1)
        rows = [{"group": groups[n], "name": n, "what": "x", "seconds": factor * t} for n, t in times.items()]
        return {"triton": "3.6.0", "rows": rows}

    monkeypatch.setattr(host, "measure", measure)
    return calls


def test_the_least_of_all_rounds_beside_another_checkout(measured, tmp_path, capsys):
    (tmp_path / "old" / "segvit_kernels" / "triton").mkdir(parents=True)
    out = tmp_path / "host.json"
    arguments = ["host", "--before", str(tmp_path / "old"), "--rounds", "2", "--out", str(out)]
    assert command.main(arguments) == 0
    assert measured == [environment.ROOT, tmp_path / "old"] * 2
    result = report.load(out)
    assert [(r["name"], r["now_s"], r["before_s"]) for r in result["rows"]] == [
        ("atm_fwd", 2e-5, 1.6e-4),
        ("fused_atm", 6e-5, 4.8e-4),
        ("a * a", 1e-6, 8e-6),
    ]
    assert result["environment"]["triton"] == "3.6.0"
    tables = report.tables(result)
    assert "| `atm_fwd` x | 160.0 µs | 20.0 µs |" in tables["launchers"]
    assert "`a * a`" in tables["calls"] and "fused_atm" not in tables["launchers"]
    assert "3 rows ok" in capsys.readouterr().out


def test_without_another_checkout_there_is_one_column(measured, tmp_path):
    out = tmp_path / "host.json"
    assert command.main(["host", "--rounds", "1", "--out", str(out)]) == 0
    assert "before_s" not in json.loads(out.read_text())["rows"][0]
    assert "| launcher | time |" in report.tables(report.load(out))["launchers"]


def test_what_is_no_checkout_is_refused(tmp_path, capsys):
    assert command.main(["host", "--before", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"python -m bench: error: --before {tmp_path}: expected a checkout of this project"
    ]


def test_a_process_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(host, "CHILD", tmp_path / "none.py")
    assert command.main(["host", "--rounds", "1", "--out", str(tmp_path / "host.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "none.py" in line and not (tmp_path / "host.json").exists()
