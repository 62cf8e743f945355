"""``python -m bench learning``: what models learn of a data set in the same minutes, and what they cost.

Each gets as many steps of one recipe as the given minutes hold at its own speed: seconds of a step are
measured first, model after model, with nothing else running. The trainings may then share the machine with
other work, or be those of another machine, since steps alone count (:func:`restore`): a model timed there has
the seconds of the first machine, by those of a model timed on both. Trained and evaluated by
``segvit train``, with windows of the recipe's crop. Costs are those of ``bench decoders``, at its size with
the data's classes.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.measure import environment, results
from bench.suites import decoders
from segvit.options import TrainConfig

TIMED, UNTIMED = 15, 3  # steps whose seconds count, and those before them
BATCH = 2  # small, so that few minutes hold some hundred steps

# Of a Shrunk model: how examples/camvid trains it.
_SHRUNK = ("--shrunk", "--similarity-gain", "6", "--decoder-lr-scale", "25", "--model.decoder_dropout", "0")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model: its decoder and patch size, what else its configuration has, options of its training, and the
    share of that which has all tokens still."""

    decoder: str
    patch: int
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: tuple[str, ...] = ()
    shrink_after: float = 0.0

    def options(self) -> list[str]:
        """Options of `segvit train`."""
        fields = {"patch_size": self.patch, "decoder": self.decoder, **self.fields}
        fields.pop("shrunk", None)
        named = [(f"--model.{key}", json.dumps(value)) for key, value in fields.items()]
        late = ["--shrink-after", str(self.shrink_after)] if self.shrink_after else []
        return [*(part for pair in named for part in pair), *self.train, *late]


ENTRIES = {
    "linear, patch 14": Entry("linear", 14),
    "atm, patch 14": Entry("atm", 14),
    "atm, patch 16": Entry("atm", 16),
    "atm, patch 28": Entry("atm", 28),
    "segvitv2, patch 14": Entry("segvitv2", 14),
    "eomt, patch 14": Entry("eomt", 14),
    "atm, shrunk at 6": Entry("atm", 14, {"shrunk": True, "shrink_at": 6}, _SHRUNK),
    "atm, shrunk at 8": Entry("atm", 14, {"shrunk": True, "shrink_at": 8}, _SHRUNK),
    "atm, shrunk at 8, light": Entry(
        "atm",
        14,
        {"shrunk": True, "shrink_at": 8, "upsample_depth": 1, "query_features": True},
        _SHRUNK,
    ),
    "atm, shrunk at 6, cascade": Entry("atm", 14, {"shrink_at": 6}),
    "atm, shrunk at 8, cascade": Entry("atm", 14, {"shrink_at": 8}),
    "atm, shrunk at 8, cascade, late": Entry("atm", 14, {"shrink_at": 8}, shrink_after=0.5),
    "atm, shrunk at 6, edges": Entry(
        "atm", 14, {"shrunk": True, "shrink_at": 6, "shrink_edges": 0.25}, _SHRUNK
    ),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What all of them are trained on, and where runs are kept."""

    data: Path
    weights: Path
    config: Path
    runs: Path
    threads: int = 2

    def start(self, *arguments: str) -> subprocess.Popen:
        """A command of `segvit` in a process of its own."""
        variables = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        command = [sys.executable, "-m", "segvit", *arguments, "--no-progress"]
        said = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=variables, cwd=environment.ROOT, **said)

    def segvit(self, *arguments: str) -> None:
        """A command to its end.

        Raises:
            RuntimeError: it failed; with what it said.
        """
        process = self.start(*arguments)
        _, said = process.communicate()
        if process.returncode:
            raise RuntimeError(f"segvit {' '.join(arguments)}: {said.strip()}")

    @functools.cached_property
    def recipe(self) -> dict[str, Any]:
        return yaml.safe_load(self.config.read_text(encoding="utf-8"))

    def training(self, entry: Entry, steps: int, seed: int, out: Path, log_every: int) -> list[str]:
        """The command that trains anew, to the end of its schedule, and evaluates there. The rate rises over
        at most an eighth of the steps, however few those are."""
        given = ["--config", str(self.config), "--data", str(self.data), "--out", str(out)]
        given += ["--backbone-weights", str(self.weights), "--max-steps", str(steps), "--seed", str(seed)]
        given += ["--evaluate-every", "0", "--evaluate-window", str(self.recipe["image_size"])]
        rise = min(self.recipe.get("warmup_steps", TrainConfig.warmup_steps), steps // 8)
        given += ["--warmup-steps", str(rise)]
        given += ["--batch-size", str(BATCH), "--log-every", str(log_every)]
        return ["train", *given, *entry.options()]


def _column(run: Path, name: str) -> list[tuple[float, float]]:
    """Of the whole lines of a run's log that have a value: seconds since the start, and the value."""
    text = (run / "metrics.csv").read_text(encoding="utf-8")
    lines = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [(float(row["seconds"]), float(row[name])) for row in lines if row.get(name)]


def seconds_of_a_step(task: Task, entry: Entry, out: Path) -> float:
    """With the reading of pictures and the optimizer's part; the median of some.

    Raises:
        RuntimeError: the training ended before; with what it said.
    """
    shutil.rmtree(out, ignore_errors=True)
    process = task.start(*task.training(entry, 10_000, 0, out, 1))
    try:
        while not (out / "metrics.csv").is_file() or len(_column(out, "loss")) < UNTIMED + TIMED:
            try:
                _, said = process.communicate(timeout=1)
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"training ended before its steps were timed: {said.strip()}")
    finally:
        process.kill()
        process.communicate()
    times = [seconds for seconds, _ in _column(out, "loss")][UNTIMED - 1 :]
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))


def _mean_seconds(task: Task, entry: Entry, out: Path) -> float:
    """Of a step, where the first ones have all tokens."""
    if not entry.shrink_after:
        return seconds_of_a_step(task, entry, out)
    early, late = (
        seconds_of_a_step(task, e, out) for e in (entry, dataclasses.replace(entry, shrink_after=0.0))
    )
    return entry.shrink_after * early + (1 - entry.shrink_after) * late


def _kept(path: Path, make: Callable[[], dict]) -> dict:
    """What a file holds from an earlier call, or what is made and put there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        results.dump(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def _score(task: Task, entry: Entry, steps: int, seed: int, folder: Path) -> dict:
    """mIoU of a training, and the commit it ran at."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)  # of a call that was stopped
    task.segvit(*task.training(entry, steps, seed, run, 10))
    return {"miou": _column(run, "miou")[-1][1], "commit": environment.commit()["commit"]}


_REFERENCE = "atm, patch 14"


def _pace(task: Task) -> float:
    """Seconds of a step where a restored result was measured, over those here; 1 where none was restored."""
    path = task.runs / "reference.json"
    if not path.is_file():
        return 1.0
    there = json.loads(path.read_text(encoding="utf-8"))["s"]
    folder = task.runs / results.stem(_REFERENCE)
    here = _kept(
        folder / "step-here.json",
        lambda: {"s": seconds_of_a_step(task, ENTRIES[_REFERENCE], folder / "timed")},
    )
    return there / here["s"]


def seconds(
    task: Task, models: Iterable[str] = ENTRIES, progress: Callable[[str], None] = print
) -> dict[str, float]:
    """Of a step of each model. What `task.runs` holds of an earlier call is taken from there."""
    found = {}
    for name in models:
        folder = task.runs / results.stem(name)
        found[name] = _kept(
            folder / "step.json",
            lambda name=name, folder=folder: {
                "s": _pace(task) * _mean_seconds(task, ENTRIES[name], folder / "timed")
            },
        )["s"]
        progress(f"{name}: {found[name]:.2f} s a step")
    return found


def _scored(task: Task, name: str, steps: int, seed: int) -> Path:
    return task.runs / results.stem(name) / f"{steps}-steps-seed-{seed}" / "score.json"


def restore(task: Task, result: dict) -> None:
    """Puts what a result of :func:`run` holds where the next call looks for it.

    Raises:
        ValueError: the result is of another data set.
    """
    if result["data"] != task.data.name:
        raise ValueError(f"a result of the data set {result['data']!r}; expected {task.data.name!r}")
    _kept(task.runs / "environment.json", lambda: result["environment"])
    for row in result["rows"]:
        folder = task.runs / results.stem(row["name"])
        _kept(folder / "step.json", lambda row=row: {"s": row["step_s"]})
        if row["name"] == _REFERENCE:
            _kept(task.runs / "reference.json", lambda row=row: {"s": row["step_s"]})
        _kept(folder / "cost.json", lambda row=row: row["cost"])
        for score in row["scores"]:
            kept = {key: score[key] for key in ("miou", "commit") if key in score}
            _kept(_scored(task, row["name"], score["steps"], score["seed"]), lambda kept=kept: kept)


def run(
    task: Task,
    *,
    models: Iterable[str] = ENTRIES,
    seeds: Sequence[int] = (0, 1, 2),
    minutes: float = 5.0,
    rounds: int = 9,
    train: bool = True,
    progress: Callable[[str], None] = print,
) -> dict:
    """One row a model, as plain data. What `task.runs` holds of an earlier call is taken from there; without
    ``train`` there is nothing else, and models and seeds of which it holds nothing are left out."""
    described = _kept(
        task.runs / "environment.json",
        lambda: {**environment.describe(torch.device("cpu")), "threads": task.threads},
    )
    if not train:
        models = [name for name in models if (task.runs / results.stem(name) / "step.json").is_file()]
    step = seconds(task, models, progress)
    scores: dict[str, list[dict]] = {name: [] for name in step}
    for seed in seeds:
        for name in step:
            steps = max(1, round(60 * minutes / step[name]))
            path = _scored(task, name, steps, seed)
            if not train and not path.is_file():
                continue
            made = functools.partial(_score, task, ENTRIES[name], steps, seed, path.parent)
            scored = _kept(path, made)
            scores[name].append({"seed": seed, "steps": steps, **scored})
            progress(f"{name}, seed {seed}, {steps} steps: mIoU {100 * scored['miou']:.1f}")
    step = {name: value for name, value in step.items() if scores[name]}
    torch.set_num_threads(task.threads)
    preset, classes = task.recipe["preset"], len(task.recipe["model"]["palette"])
    rows = {
        name: decoders.Row(preset, entry.decoder, entry.patch, classes=classes, fields=entry.fields)
        for name, entry in ENTRIES.items()
        if name in step
    }
    kept = {name: task.runs / results.stem(name) / "cost.json" for name in rows}
    new = {name: row for name, row in rows.items() if not kept[name].is_file()}
    measured = dict(zip(new, decoders.cost(new, "float32", rounds, progress), strict=True)) if new else {}
    costs = {name: _kept(kept[name], functools.partial(measured.get, name)) for name in rows}
    return {
        "schema": 1,
        "kind": "learning",
        "measurement": True,
        "environment": described,
        "data": task.data.name,
        "minutes": minutes,
        "rows": [
            {"name": name, "step_s": step[name], "scores": scores[name], "cost": costs[name]} for name in step
        ],
    }
