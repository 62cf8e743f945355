"""A run's folder: what it keeps, what it refuses, what may change when a run goes on."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning_fabric", reason="needs the extra train")

from segvit.data.synthetic import SyntheticShapes
from segvit.options import TrainConfig
from segvit.training.evaluation import evaluate
from segvit.training.run_folder import Checkpoints, meaning_of, prepare, samples_of, share_of


@pytest.fixture
def run(tmp_path):
    """Options of a run with checkpoints of steps 1 and 2."""
    config = TrainConfig(data="x", out=str(tmp_path / "run"), model={"taps": (1,)})
    prepare(config, SAMPLES, print)
    checkpoints = Checkpoints(config.out)
    for step in (1, 2):
        checkpoints.save(step, lambda folder: (folder / "trainer.pt").write_text("state"))
    return config


class Data(list):
    def __init__(self, *names):
        super().__init__(names)
        self.files, self.class_names = [(name, name) for name in names], None


SAMPLES = samples_of(Data("a", "b"), Data("c"))


def go_on(config, samples=SAMPLES, **changes):
    """Prepare to go on with the run; what was said."""
    said = []
    prepare(dataclasses.replace(config, **{"resume": True, **changes}), samples, said.append)
    return said


def test_checkpoints_are_a_run_also_without_its_options(run):
    checkpoints = Checkpoints(run.out)
    (checkpoints.folder.parent / "config.yaml").unlink()
    with pytest.raises(ValueError, match="already holds a run; use --resume"):
        prepare(run, SAMPLES, print)
    other = samples_of(Data("a", "x"), Data("c"))
    with pytest.raises(ValueError, match="the training images have other names"):
        go_on(run, other)
    go_on(run)
    checkpoints.clean(0, None)  # nothing was gone on from
    assert (checkpoints.folder / "2/trainer.pt").is_file()
    checkpoints.clean(1, None)
    assert not (checkpoints.folder / "2").exists()


def test_hidden_files_of_others_stay(run):
    checkpoints = Checkpoints(run.out).folder
    others = [".gitignore", ".git/HEAD", "1/.gitattributes", ".old", ".12.bak", "../.note.tmp"]
    ours = [".3/trainer.pt", ".last", ".2.0a1b2c3d.old/x", "1/.evaluation.json.0a1b2c3d.tmp"]
    ours.append("../.config.yaml.0a1b2c3d.tmp")
    for name in [*others, *ours]:
        (checkpoints / name).parent.mkdir(exist_ok=True)
        (checkpoints / name).write_text("x")
    Checkpoints(run.out).clean(2, None)
    assert [name for name in others if not (checkpoints / name).exists()] == []
    assert [name for name in ours if (checkpoints / name).exists()] == []


def test_options_are_compared_as_their_file_has_them(run):
    assert go_on(run) == go_on(run, model={"taps": [1]}) == []
    with pytest.raises(ValueError, match=r"other options: model \{'taps': \[1\]\} -> \{'taps': \[2\]\}$"):
        go_on(run, model={"taps": (2,)})


def test_another_evaluation_window_begins_scores_anew(run):
    folder = Checkpoints(run.out).folder / "2"
    score = {"result": {"step": 2, "miou": 0.5}, "best": 0.5, "best_step": 2, "since_best": 0}
    Checkpoints(run.out).evaluated(2, score)
    assert go_on(run) == [] and json.loads((folder / "evaluation.json").read_text()) == score
    with pytest.raises(ValueError, match="the classes of the data are not those"):
        go_on(run, {**SAMPLES, "classes": ["other"]}, evaluate_window=64)
    assert json.loads((folder / "evaluation.json").read_text()) == score
    assert go_on(run, evaluate_window=64) == [
        "evaluate_window None -> 64: best and patience count from here on"
    ]
    score = json.loads((folder / "evaluation.json").read_text())
    assert (score["result"], score["best"], score["best_step"]) == ({}, None, None)
    assert go_on(run, evaluate_window=64) == []


def test_evaluation_takes_pictures_one_by_one_where_memory_is_too_small():
    class Large(torch.nn.Module):
        def predict(self, images, options):
            self.sizes.append(len(images))
            if len(images) > self.most:
                raise torch.OutOfMemoryError("too much")
            return images[:, 0].long() % 12

    model, validation = Large(), SyntheticShapes("validation", 3, 32)
    model.sizes, model.most = [], 3
    expected = evaluate(model, validation, batch_size=3)
    model.sizes, model.most = [], 1
    assert evaluate(model, validation, batch_size=3) == expected and model.sizes == [3, 1, 1, 1]
    model.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, validation, batch_size=3)


MEANING = {"values": {"0": None, "1": 0, "255": None}, "colours": {}, "seen": [0, 1]}
MEANING |= {"by_colour": ["colour"], "forms": ["colour", "number"], "white": 1}


def test_another_meaning_of_the_labels(run):
    assert SAMPLES["labels"] is None and meaning_of(Path(run.out)) is None
    before = {**SAMPLES, "labels": MEANING}
    assert go_on(run, before, label_mapping=None) == []  # the first that says
    # The same meaning from another place; and shards of earlier versions, which do not say.
    assert go_on(run, before, label_mapping="moved.json") == []
    assert go_on(run, {**before, "validation_share": 0.4}, label_mapping="moved.json") == []
    assert go_on(run, label_mapping="moved.json") == [] and meaning_of(Path(run.out)) == MEANING
    assert share_of(Path(run.out)) == 0.4
    values = {"0": 0, "1": None, "255": None}
    with pytest.raises(ValueError, match=r"what they did when the run began: 0 is class 0, was ignored$"):
        go_on(run, {**SAMPLES, "labels": {**MEANING, "values": values}}, label_mapping="moved.json")
    with pytest.raises(ValueError, match=r"began: ff0000 is class 1, was unknown$"):
        colours = {"labels": {**MEANING, "colours": {"ff0000": 1}}}
        go_on(run, {**SAMPLES, **colours}, label_mapping="moved.json")
    with pytest.raises(
        ValueError, match=r"otherwise than when the run began: colour, grey by colour, was colour by colour$"
    ):
        forms = {"labels": {**MEANING, "by_colour": ["colour", "grey"]}}
        go_on(run, {**SAMPLES, **forms}, label_mapping="moved.json")
    # White of one bit is compared where there is such a label map.
    white = {"labels": {**MEANING, "white": 255}}
    assert go_on(run, {**SAMPLES, **white}, label_mapping="moved.json") == []
    white["labels"]["forms"] = ["bilevel", "colour", "number"]
    assert go_on(run, {**SAMPLES, **white}, label_mapping="moved.json") == []
    with pytest.raises(ValueError, match=r"white of one bit as 1, was colour by colour, .* as 255$"):
        go_on(run, {**SAMPLES, "labels": {**white["labels"], "white": 1}}, label_mapping="moved.json")
    assert go_on(run, {**SAMPLES, "labels": MEANING}, label_mapping="moved.json") == []
    # Every checkpoint has it.
    Checkpoints(run.out).save(3, lambda folder: (folder / "trainer.pt").write_text("state"))
    assert meaning_of(Checkpoints(run.out).newest()) == MEANING
    (Path(run.out) / "data.json").write_text('{"labels": {"values": {"a": 1}}}')
    with pytest.raises(ValueError, match=r"data\.json: got .* for labels, expected what"):
        go_on(run)


def test_names_that_are_not_utf_8():
    names = ("stra\udcdfe.png", "stra\udce4e.png")  # as os.fsdecode gives them
    digests = {samples_of(Data(name), Data("c"))["training"]["names"] for name in names}
    assert len(digests) == 2
