"""``bench step``: the script whole on tiny shapes, and what it calls sound."""

import copy

import pytest

from bench import report
from bench.__main__ import main
from bench.report.tables import step as tables
from bench.suites import step

pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[transformers]'")


def test_the_script_runs_whole_and_sees_other_gradients(tmp_path):
    path = tmp_path / "step.json"
    assert main(["step", "--smoke", "--rounds", "1", "--threads", "1", "--out", str(path)]) == 0
    result = report.load(path)
    assert [(r["subject"], r["form"]) for r in result["rows"]] == [
        (subject, form) for subject in step.SUBJECTS for form in step.FORMS
    ]
    points = [row for row in result["rows"] if row["form"] == "points"]
    assert all(row["loss_off"] < 1e-6 and row["gradients_off"] < 1e-5 for row in points)
    assert tables.sound(result) and "| criterion, 64², 3 targets | points |" in tables.tables(result)["forms"]
    for changed in ({"gradients_off": 0.01}, {"loss_off": 0.01}, {"status": "failed"}):
        wrong = copy.deepcopy(result)
        wrong["rows"][1] |= changed
        assert not tables.sound(wrong)
