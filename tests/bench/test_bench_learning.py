"""`bench learning`: as many steps as the minutes hold, runs that are kept, a table and a figure."""

import csv
import dataclasses
import subprocess
import sys

import pytest
import torch

from bench import report
from bench.commands import OptionError
from bench.commands import learning as command
from bench.report import figures
from bench.suites import decoders, learning
from segvit import cli

STEP = {"linear": 1.5, "atm": 2.0}


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Trainings that write the files of one and take no time; what `segvit` was asked for."""
    asked = []

    def segvit(task, *arguments):
        options = dict(zip(arguments[1::2], arguments[2::2], strict=False))
        asked.append((arguments[0], options))
        out, step = learning.Path(options["--out"]), STEP[options["--model.decoder"].strip('"')]
        out.mkdir(parents=True)
        with (out / "metrics.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["step", "loss", "miou", "seconds"])
            for i in range(min(int(options["--max-steps"]), learning.UNTIMED + learning.TIMED)):
                table.writerow([i + 1, 1.0, "", 10 * (i >= learning.UNTIMED - 1) + step * i])
            table.writerow([i + 1, "", 0.5 + int(options["--seed"]) / 100, 1e3])

    def start(task, *arguments):
        """What goes on until it is killed."""
        segvit(task, *arguments)
        return subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])

    config = tmp_path / "train.yaml"
    config.write_text(
        "preset: vit_tiny\nimage_size: 64\nwarmup_steps: 4\nmodel: {palette: [[0, 0, 0], [9, 9, 9]]}\n"
    )
    monkeypatch.setattr(learning.Task, "segvit", segvit)
    monkeypatch.setattr(learning.Task, "start", start)
    monkeypatch.setattr(decoders.peaks, "isolated", lambda *arguments: 1_500_000)
    return learning.Task(tmp_path / "data", tmp_path / "weights", config, tmp_path / "runs", 1), asked


def test_models_get_the_same_minutes(task, monkeypatch):
    task, asked = task
    threads, printed = torch.get_num_threads(), []
    names = ("linear, patch 14", "atm, patch 28")
    try:
        result = learning.run(task, models=names, seeds=(0, 1), minutes=1, rounds=1, progress=printed.append)
        trained = [options["--max-steps"] for what, options in asked if what == "train"]
        assert trained == ["10000"] * 2 + ["40", "30"] * 2, "60 seconds in steps of 1.5 and 2"
        assert all(options["--evaluate-window"] == "64" for _, options in asked)
        rises = [options["--warmup-steps"] for _, options in asked]
        assert rises == ["4"] * 2 + ["4", "3"] * 2, "the recipe's four, but never over an eighth"
        asked.clear()
        again = learning.run(task, models=names, seeds=(0, 1), minutes=1, rounds=1, progress=printed.append)
        # On another machine nothing is timed anew, and only what is missing is trained.
        elsewhere = dataclasses.replace(task, runs=task.runs / "elsewhere")
        learning.restore(elsewhere, result)
        more = {"models": (*names, "eomt, patch 14"), "seeds": (0, 1, 2), "minutes": 1, "rounds": 1}
        kept = learning.run(elsewhere, **more, train=False, progress=printed.append)
        assert asked == [] and kept["rows"] == result["rows"] == again["rows"]
        kept = learning.run(elsewhere, **{**more, "models": names}, progress=printed.append)
        assert [o["--max-steps"] for what, o in asked if what == "train"] == ["40", "30"]
        assert [len(row["scores"]) for row in kept["rows"]] == [3, 3]
        assert [row["cost"] for row in kept["rows"]] == [row["cost"] for row in result["rows"]]
    finally:
        torch.set_num_threads(threads)
    # A model timed there has the first machine's seconds, by one that was timed on both.
    monkeypatch.setitem(STEP, "atm", 1.0)
    monkeypatch.setitem(STEP, "segvitv2", 3.0)
    slower = dataclasses.replace(task, runs=task.runs / "slower")
    learning.restore(slower, {**result, "rows": [{**result["rows"][1], "name": "atm, patch 14"}]})
    found = learning.seconds(slower, ("segvitv2, patch 14", "atm, patch 14"), printed.append)
    assert found == {"segvitv2, patch 14": 6.0, "atm, patch 14": 2.0}
    with pytest.raises(ValueError, match="a result of the data set 'data'; expected 'others'"):
        learning.restore(dataclasses.replace(elsewhere, data=task.data.with_name("others")), result)
    rows = {row["name"]: row for row in result["rows"]}
    assert {name: row["step_s"] for name, row in rows.items()} == dict(zip(names, (1.5, 2.0), strict=True))
    commit = learning.environment.commit()["commit"]
    assert rows[names[1]]["scores"][1] == {"seed": 1, "steps": 30, "miou": 0.51, "commit": commit}
    assert rows[names[1]]["cost"]["patch"] == 28 and rows[names[1]]["cost"]["macs"] > 0
    table = report.tables(result)["models"]
    assert "| atm, patch 28 | 50.5 (50.0 to 51.0) | 30 | 2.00 s |" in table
    elsewhere = {**result, "environment": {**result["environment"], "commit": "0" * 40}}
    assert ("Trained at commit" in report.tables(elsewhere)["models"]) == (commit is not None)
    data = figures.learned(result)
    assert data["points"][names[0]]["at"][1:] == [50.5, 50.0, 51.0]
    pytest.importorskip("matplotlib")
    assert "patch 28" in figures.svg({"figure": "learned", "data": data, "machine": "here"})


def test_a_training_that_ends_while_it_is_timed_says_why(task, tmp_path, monkeypatch):
    monkeypatch.undo()
    missing = dataclasses.replace(task[0], data=tmp_path / "no")
    with pytest.raises(RuntimeError, match=r"ended before its steps were timed: .*no"):
        learning.seconds_of_a_step(missing, learning.ENTRIES["atm, patch 14"], tmp_path / "out")


def test_steps_of_a_training_that_shrinks_late_are_timed_before_and_after(task, monkeypatch):
    monkeypatch.setattr(
        learning, "seconds_of_a_step", lambda task, entry, out: 2.0 if entry.shrink_after else 1.0
    )
    names = ["atm, shrunk at 8, cascade", "atm, shrunk at 8, cascade, late"]
    assert [*learning.seconds(task[0], names, print).values()] == [1.0, 1.5]


@pytest.mark.parametrize("name", learning.ENTRIES)
def test_options_are_those_of_the_command(name, tmp_path, capsys):
    entry = learning.ENTRIES[name]
    config = command._options.ROOT / "examples" / "camvid" / "train.yaml"
    given = ["--config", str(config), "--data", "synthetic", "--out", str(tmp_path), *entry.options()]
    assert cli.main(["train", *given, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert f"patch_size: {entry.patch}" in printed and f"decoder: {entry.decoder}" in printed
    assert ("shrunk: true" in printed) == entry.fields.get("shrunk", False)


def test_what_is_not_there_is_named(tmp_path):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = ["--data", str(tmp_path / "no"), "--backbone-weights", str(tmp_path)]
    with pytest.raises(OptionError, match=r"--data .*no: does not exist"):
        command.run(parser.parse_args(given))
    with pytest.raises(OptionError, match=r"--resume .*no\.json: "):
        here = ["--data", str(tmp_path), *given[2:]]
        command.run(parser.parse_args([*here, "--resume", str(tmp_path / "no.json")]))
    with pytest.raises(OptionError, match="--minutes -1"):
        command.run(parser.parse_args(["--data", str(tmp_path), *given[2:], "--minutes", "-1"]))
