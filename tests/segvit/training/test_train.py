"""Training: schedule, order of samples, exact resume, several processes, what stops it."""

import csv
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lightning_fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from segvit.config import SegViTConfig
from segvit.data.decoding import WholeMessageError
from segvit.data.synthetic import SyntheticShapes
from segvit.model.heads import load_model
from segvit.model.segvit import SegViT
from segvit.options import EvaluateConfig, InferenceOptions, TrainConfig
from segvit.system.interrupts import Interrupted
from segvit.training.build import make_augmentation
from segvit.training.class_weights import inverse_sqrt_weights
from segvit.training.evaluation import evaluate
from segvit.training.launch import launch
from segvit.training.loop import Trainer as Trainer
from segvit.training.sampler import StepSampler
from segvit.training.schedule import learning_rate_factor
from segvit.training.train import _say_what_is_odd, train
from segvit_kernels import QueryUpsample, why_not

ROOT = Path(__file__).resolve().parents[3]
TINY = {"width": 16, "depth": 2, "heads": 2, "taps": [0, 1], "patch_size": 8, "decoder_depth": 1}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(out, **changes):
    values = {
        "data": "synthetic", "out": str(out), "preset": "vit_tiny", "image_size": 32,
        "model": TINY, "max_steps": 6, "batch_size": 2, "lr": 1e-3, "decoder_lr_scale": 2.0,
        "warmup_steps": 2, "log_every": 1, "evaluate_every": 0, "synthetic_images": 9,
        "synthetic_validation": 3, "workers": 0, "progress": False, "accelerator": "cpu",
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def rows(out):
    """metrics.csv without the clock."""
    with open(Path(out) / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def losses(out):
    return [float(row["loss"]) for row in rows(out) if row["loss"]]


def weights(out, name="last"):
    return load_model(Path(out) / "checkpoints" / name).state_dict()


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def command(config, **changes):
    """The command line of a configuration."""
    path = Path(config.out).with_suffix(".yaml")
    values = {**dataclasses.asdict(config), **changes}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    path.write_text(yaml.safe_dump(values))
    return [sys.executable, "-m", "segvit", "train", "--config", str(path)]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# The pieces


def test_schedule():
    config = tiny("x", max_steps=110, warmup_steps=10, warmup_lr=1e-6, lr=1e-3, power=2.0)
    factors = [learning_rate_factor(step, config) for step in range(110)]
    assert factors[0] == pytest.approx(1e-3)
    assert factors[5] == pytest.approx(1e-3 + 0.5 * (1 - 1e-3))
    assert factors[10] == 1.0 == max(factors)
    assert factors[60] == pytest.approx(0.25)
    assert factors[109] == pytest.approx(1e-4)
    assert learning_rate_factor(0, tiny("x", max_steps=1, warmup_steps=5)) == 1.0


@pytest.mark.parametrize(("world", "batch"), [(2, 3), (3, 2), (6, 1)])
def test_processes_share_out_the_batches_of_one(world, batch):
    alone = list(StepSampler(7, world * batch, 20, seed=3))
    shares = [list(StepSampler(7, batch, 20, rank=rank, world=world, seed=3)) for rank in range(world)]
    assert [list(chain(*pieces)) for pieces in zip(*shares, strict=True)] == alone


def test_sampler_visits_every_image_once_an_epoch_and_continues():
    keys = list(chain(*StepSampler(7, 3, 14, seed=1)))
    for epoch in range(6):
        assert sorted(keys[7 * epoch : 7 * epoch + 7]) == [(epoch, index) for index in range(7)]
    assert len({tuple(index for _, index in keys[7 * e : 7 * e + 7]) for e in range(6)}) > 1
    whole = list(StepSampler(7, 3, 14, seed=1))
    assert list(StepSampler(7, 3, 14, start=5, seed=1)) == whole[5:]
    assert list(StepSampler(7, 3, 14, seed=2)) != whole


# Whole runs


def test_a_run_and_its_folder(tmp_path):
    result = train(tiny(tmp_path / "run", evaluate_every=4, ema=0.5))
    assert result["step"] == 6 and result["stopped"] == "finished" and result["images"] == 3
    assert list(result["iou"]) == list(SyntheticShapes.class_names)
    log = rows(tmp_path / "run")
    assert [int(row["step"]) for row in log if row["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [int(row["step"]) for row in log if row["miou"]] == [4, 6]
    assert float(log[-1]["miou"]) == pytest.approx(result["miou"], rel=1e-6)
    terms = [name for name in log[0] if "." in name or name in ("class", "focal", "dice")]
    assert len(terms) == 6
    assert sum(float(log[0][name]) for name in terms) == pytest.approx(float(log[0]["loss"]), rel=1e-5)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert os.readlink(checkpoints / "last") == "6"
    kept = {os.readlink(checkpoints / name) for name in ("last", "best")}
    assert {path.name for path in checkpoints.iterdir()} == {"last", "best"} | kept
    # What was saved is what was evaluated: the moving average.
    validation = SyntheticShapes("validation", 3, 32)
    assert (
        evaluate(load_model(tmp_path / "run" / "checkpoints" / "last"), validation)["miou"] == result["miou"]
    )
    raw = torch.load(checkpoints / "last" / "trainer.pt", weights_only=True)["model"]
    assert not torch.equal(raw["decoder.class_tokens"], weights(tmp_path / "run")["decoder.class_tokens"])


def test_evaluations_by_windows(tmp_path, monkeypatch):
    """As `segvit evaluate --window` sees pictures; of such as are larger than a window."""
    validation = SyntheticShapes("validation", 3, 64)
    seen, predict = [], SegViT.predict

    def noted(self, images, options=None, **others):
        seen.append(options.window)
        return predict(self, images, options, **others)

    monkeypatch.setattr(SegViT, "predict", noted)
    result = train(tiny(tmp_path / "run", evaluate_window=32), validation=validation)
    assert seen and set(seen) == {32}
    options = InferenceOptions(window=32)
    assert evaluate(load_model(tmp_path / "run"), validation, options=options)["iou"] == result["iou"]
    expected = "evaluate_window: got 20, expected a multiple of the patch size 8"
    with pytest.raises(ValueError, match=expected):
        train(tiny(tmp_path / "other", evaluate_window=20), validation=validation)
    assert not (tmp_path / "other").exists(), "nothing was trained"


def test_betas_reach_the_optimizer(tmp_path):
    train(tiny(tmp_path / "run", max_steps=1, betas=(0.8, 0.95)))
    state = torch.load(tmp_path / "run/checkpoints/last/trainer.pt", weights_only=True)
    assert {tuple(group["betas"]) for group in state["optimizer"]["param_groups"]} == {(0.8, 0.95)}


@pytest.mark.parametrize(("ema", "decay"), [(0.9999, 2 / 11), (0.1, 0.1)])
def test_moving_average_follows_the_weights(tmp_path, ema, decay):
    """It starts at the weights after the first step; a decay near 1 would keep it there for long."""
    names = ("a", "b")
    for steps, name in enumerate(names, start=1):
        train(tiny(tmp_path / name, max_steps=steps, ema=ema, warmup_steps=0))
    saved = [torch.load(tmp_path / name / "checkpoints/last/trainer.pt", weights_only=True) for name in names]
    first, second = (state["model"] for state in saved)
    assert_same_weights(first, weights(tmp_path / "a"))
    for name, value in weights(tmp_path / "b").items():
        torch.testing.assert_close(value, decay * first[name] + (1 - decay) * second[name])
    assert not torch.equal(first["decoder.class_tokens"], second["decoder.class_tokens"])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_the_run(tmp_path, workers):
    train(tiny(tmp_path / "a", max_steps=3))
    train(tiny(tmp_path / "b", max_steps=3, workers=workers))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    train(tiny(tmp_path / "c", max_steps=3, seed=1))
    assert losses(tmp_path / "a")[0] != losses(tmp_path / "c")[0]


# Losses of a training of 50 steps, by step: what changes them changes what everybody's training does.
GOLDEN = {1: 11.3403, 10: 11.1562, 20: 9.6293, 30: 8.4591, 40: 7.8497, 50: 7.7209}


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_golden_losses(tmp_path, backend):
    if reason := why_not(backend, "cpu"):
        pytest.skip(f"backend {backend}: {reason}")
    train(tiny(tmp_path / "run", max_steps=50, lr=2e-3, photometric=False, backend=backend))
    found = losses(tmp_path / "run")
    assert {step: found[step - 1] for step in GOLDEN} == pytest.approx(GOLDEN, rel=5e-3)


def test_loss_falls_for_the_other_head_with_accumulation_and_a_frozen_backbone(tmp_path):
    for name, changes in (
        ("linear", {"head": "linear"}),
        ("pieces", {"accumulate": 2, "precision": "bf16"}),
        ("frozen", {"freeze_backbone": True}),
    ):
        out = tmp_path / name
        train(tiny(out, max_steps=30, lr=2e-3, photometric=False, **changes))
        values = losses(out)
        assert sum(values[-5:]) < 0.85 * sum(values[:5]), name
    model = load_model(tmp_path / "linear")
    assert type(model).__name__ == "LinearSegmenter"
    assert model.predict(torch.zeros(3, 20, 37, dtype=torch.uint8)).shape == (20, 37)


def test_queries_of_a_shrunk_model_are_located_once(tmp_path, monkeypatch):
    seen, locate = [], QueryUpsample.locate

    def recorded(self, levels):
        seen.append([tuple(level.shape) for level in levels])
        locate(self, levels)

    monkeypatch.setattr(QueryUpsample, "locate", recorded)
    model = {k: v for k, v in TINY.items() if k != "taps"} | {"shrink_at": 1}
    options = {"shrunk": True, "max_steps": 1, "image_size": 64, "model": model}
    train(tiny(tmp_path / "located", locate_images=5, **options))
    assert len(seen) == 1 and [shape[0] for shape in seen[0]] == [5, 5]
    train(tiny(tmp_path / "random", locate_images=0, **options))
    assert len(seen) == 1
    train(tiny(tmp_path / "anew", locate_images=5, resume=True, **options))  # there is nothing to resume
    assert_same_weights(weights(tmp_path / "anew"), weights(tmp_path / "located"))
    train(tiny(tmp_path / "anew", locate_images=5, resume=True, **{**options, "max_steps": 2}))
    assert len(seen) == 2
    for source, located in (("located", 2), ("linear", 3)):  # of another decoder the queries are fresh
        if source == "linear":
            train(tiny(tmp_path / source, head="linear", **options))
        changes = {"head": "segvit", "model": {}, "shrunk": False, "init_from": str(tmp_path / source)}
        train(tiny(tmp_path / f"from_{source}", locate_images=5, **{**options, **changes}))
        assert len(seen) == located
    start = weights(tmp_path / "located"), weights(tmp_path / "random")
    queries = [w["decoder.upsample.queries"] for w in start]
    assert not torch.allclose(*queries, atol=0.1)


def test_frozen_backbone_stays(tmp_path):
    train(tiny(tmp_path / "a", max_steps=1, freeze_backbone=True))
    train(tiny(tmp_path / "b", max_steps=3, freeze_backbone=True))
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    for name in first:
        assert torch.equal(first[name], second[name]) == name.startswith("backbone."), name


def test_frozen_backbone_computes_the_same_at_every_step(tmp_path, monkeypatch):
    """No stochastic depth, also after an evaluation and when resumed; its average is itself."""
    seen = []
    step = Trainer._optimize

    def recorded(self):
        images = torch.full((1, 3, 32, 32), 7, dtype=torch.uint8)
        state = torch.get_rng_state()
        seen.append(self.model.backbone(self.model.preprocess(images))[-1].detach())
        torch.set_rng_state(state)
        assert self.model.training and not self.model.backbone.training
        return step(self)

    monkeypatch.setattr(Trainer, "_optimize", recorded)
    model = {**TINY, "drop_path": 0.9}
    config = tiny(tmp_path / "run", max_steps=3, evaluate_every=1, freeze_backbone=True, ema=0.5, model=model)
    train(config)
    train(dataclasses.replace(config, resume=True, max_steps=5))
    assert len(seen) == 5 and all(torch.equal(features, seen[0]) for features in seen)
    raw = torch.load(tmp_path / "run/checkpoints/last/trainer.pt", weights_only=True)["model"]
    averaged = weights(tmp_path / "run")
    assert all(torch.equal(raw[name], averaged[name]) for name in raw if name.startswith("backbone."))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    model = {**TINY, "drop_path": 0.5}
    train(tiny(tmp_path / "a", max_steps=3, model=model))
    train(tiny(tmp_path / "b", max_steps=3, model=model, gradient_checkpointing=True))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert_same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_layer_decay(tmp_path):
    config = SegViTConfig.preset("vit_tiny", 3, **{**TINY, "image_size": 32, "final_norm": True})
    model = SegViT(config)
    groups = model.parameter_groups(1.0, 0.1, 10.0, 0.5)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert len(rates) == sum(len(group["params"]) for group in groups) == len(by_name)
    assert by_name["backbone.pos_embed"] == by_name["backbone.patch_embed.proj.bias"] == (0.125, 0.1)
    assert by_name["backbone.blocks.0.mlp.fc1.weight"] == (0.25, 0.1)
    assert by_name["backbone.blocks.1.mlp.fc1.weight"] == (0.5, 0.1)
    assert by_name["backbone.blocks.1.norm1.weight"] == (0.5, 0.0)
    assert by_name["backbone.norm.weight"] == (1.0, 0.0)
    assert by_name["decoder.class_tokens"] == (10.0, 0.1)
    assert [group["name"] for group in model.parameter_groups(1.0, 0.1)] == [
        "backbone", "backbone_norms", "decoder",
    ]  # fmt: skip
    train(tiny(tmp_path / "run", max_steps=1, layer_decay=0.5))
    state = torch.load(tmp_path / "run/checkpoints/last/trainer.pt", weights_only=True)["optimizer"]
    assert {group["peak_lr"] for group in state["param_groups"]} == {1.25e-4, 2.5e-4, 5e-4, 2e-3}


def test_patience_and_kept_checkpoints(tmp_path):
    """lr so small that no evaluation beats the first."""
    options = {"lr": 1e-30, "warmup_lr": 0.0, "max_steps": 9, "evaluate_every": 1, "patience": 2}
    config = tiny(tmp_path / "run", keep_checkpoints="all", **options)
    result = train(config)
    assert (result["stopped"], result["step"]) == ("patience", 3)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"1", "2", "3", "last", "best"}
    assert os.readlink(checkpoints / "best") == "1"
    assert train(dataclasses.replace(config, resume=True))["step"] == 3
    result = train(dataclasses.replace(config, resume=True, patience=4, keep_checkpoints=2))
    assert (result["stopped"], result["step"]) == ("patience", 5)
    assert {path.name for path in checkpoints.iterdir()} == {"1", "4", "5", "last", "best"}


@pytest.mark.parametrize("head", ["segvit", "linear"])
def test_class_weights(tmp_path, head):
    """Those of the pixels' shares are counted once, and reach the loss of either head."""
    classes = len(SyntheticShapes.class_names)
    config = tiny(tmp_path / "a", head=head, max_steps=2, class_weights="inverse-sqrt")
    train(config)
    pixels = torch.tensor(json.loads((tmp_path / "a" / "pixels.json").read_text()))
    data = SyntheticShapes("training", 9, 32)
    assert (
        pixels.tolist()
        == sum(data[i]["label"].flatten().bincount(minlength=classes) for i in range(9)).tolist()
    )
    weights_ = inverse_sqrt_weights(pixels)
    found = [w for w, n in zip(weights_, pixels, strict=True) if n]
    assert sum(found) == pytest.approx(len(found)) and set(weights_) - set(found) <= {1.0}
    train(tiny(tmp_path / "b", head=head, max_steps=2, class_weights=weights_))
    train(tiny(tmp_path / "c", head=head, max_steps=2))
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-6)
    assert losses(tmp_path / "a")[0] != pytest.approx(losses(tmp_path / "c")[0], rel=1e-3)
    assert train(dataclasses.replace(config, resume=True, max_steps=3))["step"] == 3


SHRUNK = {"width": 8, "depth": 2, "heads": 1, "patch_size": 8, "decoder_depth": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"head": "linear"},
        {},
        {"shrunk": True, "model": {**SHRUNK, "shrink_at": 1}},
        {"shrunk": True, "model": {**SHRUNK, "shrink_at": 0, "key_positions": True}},
        {"shrunk": True, "model": {**SHRUNK, "shrink_at": 1}, "image_size": 16},
        {"shrunk": True, "model": {**SHRUNK, "shrink_at": 1}, "locate_images": 0},
        {"model": {**SHRUNK, "shrink_at": 1, "taps": [0, 1]}, "shrink_after": 0.5},
        {"scale": (1e-6, 1e-6)},
    ],
)
@pytest.mark.parametrize("value", [0, 255])
def test_smallest_of_everything(tmp_path, changes, value):
    """One token, one class, one image, one step, nothing labelled: numbers, and never NaN."""

    class One(_Wrapped):
        num_classes = 1
        class_names = palette = None

        def __getitem__(self, index):
            item = self.dataset[0]
            return {**item, "label": torch.full_like(item["label"], value)}

    data = One(SyntheticShapes("training", 1, 32))
    data.num_classes, data.class_names, data.palette = 1, None, None
    small = {"image_size": 8, "max_steps": 2, "batch_size": 1, "warmup_steps": 0}
    result = train(tiny(tmp_path / "run", **{**small, **changes}), data, data)
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))
    assert result["miou"] == result["best_miou"] and result["miou"] in ([1.0] if value == 0 else [None])
    assert "nan" not in (tmp_path / "run" / "metrics.csv").read_text().lower()
    assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())


def test_kill_and_resume_is_bitwise(tmp_path):
    """kill -9 in the middle, dropout and moving average on, then the same command with --resume."""
    whole = tiny(tmp_path / "whole", max_steps=24, checkpoint_every=5, evaluate_every=10, ema=0.9)
    train(whole)
    killed = dataclasses.replace(whole, out=str(tmp_path / "killed"), workers=1)
    process = subprocess.Popen(command(killed), env=environment())
    last = tmp_path / "killed" / "checkpoints" / "last"
    deadline = time.monotonic() + 240
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    step = int(os.readlink(last))
    assert 5 <= step < 24
    train(dataclasses.replace(killed, resume=True))
    assert rows(killed.out) == rows(whole.out)
    assert_same_weights(weights(killed.out), weights(whole.out))
    ours, theirs = (
        torch.load(Path(c.out) / "checkpoints/last/trainer.pt", weights_only=True) for c in (killed, whole)
    )
    assert_same_weights(ours["model"], theirs["model"])
    assert torch.equal(ours["random"][0]["torch"], theirs["random"][0]["torch"])
    for index, state in theirs["optimizer"]["state"].items():
        assert torch.equal(state["exp_avg_sq"], ours["optimizer"]["state"][index]["exp_avg_sq"])


def test_resume_drops_what_was_logged_after_the_checkpoint(tmp_path):
    config = tiny(tmp_path / "run", max_steps=8, checkpoint_every=3, log_every=2)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    train(whole)
    stopped = _StopsAt(SyntheticShapes("training", 9, 32), reads=2 * 7)
    with pytest.raises(KeyboardInterrupt):
        train(config, stopped)
    assert os.readlink(tmp_path / "run/checkpoints/last") == "6"
    train(dataclasses.replace(config, resume=True))
    assert rows(config.out) == rows(whole.out)
    result = train(dataclasses.replace(config, resume=True))  # nothing left to do
    assert result["step"] == 8 and rows(config.out) == rows(whole.out)


class _Wrapped:
    def __init__(self, dataset):
        self.dataset = dataset
        self.num_classes, self.ignore_index = dataset.num_classes, dataset.ignore_index
        self.class_names, self.palette = dataset.class_names, dataset.palette

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


@pytest.mark.parametrize("changes", [{"num_classes": 11, "class_names": None}, {"class_names": "reversed"}])
def test_validation_has_the_classes_of_training(tmp_path, changes):
    validation = _Wrapped(SyntheticShapes("validation", 3, 32))
    for name, value in changes.items():
        setattr(validation, name, validation.class_names[::-1] if value == "reversed" else value)
    with pytest.raises(ValueError, match=r"^validation: got other classes, or in another order"):
        train(tiny(tmp_path / "run", max_steps=1), validation=validation)
    validation.num_classes, validation.class_names = 12, None  # which says nothing
    train(tiny(tmp_path / "run", max_steps=1), validation=validation)


class _StopsAt(_Wrapped):
    def __init__(self, dataset, reads):
        super().__init__(dataset)
        self.reads = reads

    def __getitem__(self, index):
        self.reads -= 1
        if self.reads < 0:
            raise KeyboardInterrupt
        return self.dataset[index]


@pytest.mark.parametrize(
    ("raised", "comes_back"),
    [
        (WholeMessageError("a.png: cannot be decoded"), ValueError("a.png: cannot be decoded")),
        (json.JSONDecodeError("no\nJSON", "", 0), ValueError("no JSON: line 1 column 1 (char 0)")),
        (IsADirectoryError(21, "Is a directory", "a"), OSError("a: Is a directory")),
        (FileNotFoundError("a: no such file"), FileNotFoundError("a: no such file")),
        (ImportError("tifffile is needed"), ImportError("tifffile is needed")),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), MemoryError("CUDA out of memory. Tried")),
        (RuntimeError("DataLoader worker (pid 1) is killed"), OSError("workers: a data loading process")),
        (torch.distributed.DistNetworkError("Connection reset by peer"), OSError("another of the processes")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_spawned_processes_come_back_by_their_kind(raised, comes_back):
    def function(fabric):
        raise raised

    def spawn(run, *args):
        try:
            run(fabric, *args)
        except Exception:
            text = traceback.format_exc()
            raise torch.multiprocessing.ProcessRaisedException(f"\n\n{text}", 0, 1) from None

    launcher = _MultiProcessingLauncher.__new__(_MultiProcessingLauncher)
    strategy = SimpleNamespace(launcher=launcher)
    fabric = SimpleNamespace(strategy=strategy, launch=spawn, world_size=2, is_global_zero=True)
    with pytest.raises(type(comes_back), match=f"^{re.escape(str(comes_back))}") as caught:
        launch(fabric, function)
    assert type(caught.value) is type(comes_back)


def test_numbers_of_numpy_and_paths_are_options(tmp_path):
    """Of a sweep; resumed, they are the same."""
    changes = {"lr": np.logspace(-4, -3, 2)[0], "batch_size": np.int64(2), "flip": np.True_, "max_steps": 1}
    changes |= {"class_weights": np.ones(12, np.float32), "scale": (np.float32(0.5), 2)}
    config = dataclasses.replace(tiny(tmp_path), **changes, out=tmp_path / "run")
    train(config)
    assert train(dataclasses.replace(config, resume=True, max_steps=2))["step"] == 2


def test_resume_without_a_checkpoint_starts_over(tmp_path):
    config = tiny(tmp_path / "run", max_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, _StopsAt(SyntheticShapes("training", 9, 32), reads=2))
    assert train(dataclasses.replace(config, resume=True))["step"] == 2


def test_two_processes_train_like_one_with_the_doubled_batch(tmp_path):
    model = {**TINY, "decoder_dropout": 0.0, "drop_path": 0.0}
    changes = {"model": model, "max_steps": 20, "evaluate_every": 10, "synthetic_validation": 5, "lr": 5e-4}
    one = train(tiny(tmp_path / "one", batch_size=4, **changes))
    two = train(tiny(tmp_path / "two", batch_size=2, devices=2, **changes))
    alone, together = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(alone) == 20
    assert together == pytest.approx(alone, abs=1e-5)
    assert max(alone) - min(alone) > 0.5  # it did train
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, atol=1e-3, rtol=1e-3)
    first, second = torch.load(tmp_path / "two/checkpoints/last/trainer.pt", weights_only=True)["random"]
    assert not torch.equal(first["torch"], second["torch"])  # dropout would differ
    assert two["images"] == one["images"] == 5  # an odd number: no image twice, none left out
    assert two["accuracy"] == pytest.approx(one["accuracy"], abs=2e-3)


def test_evaluation_on_two_processes_counts_every_image_once(tmp_path):
    from segvit.commands.evaluate import run

    train(tiny(tmp_path / "run", max_steps=2))
    config = EvaluateConfig(
        data="synthetic", checkpoint=str(tmp_path / "run"), synthetic_validation=5, workers=0, progress=False,
        accelerator="cpu", json=str(tmp_path / "one.json"),
    )  # fmt: skip
    assert run(config) == 0
    assert run(dataclasses.replace(config, devices=2, json=str(tmp_path / "two.json"))) == 0
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["images"] == 5
    assert one == two


def test_evaluation_keeps_sizes_and_batches_equal_ones():
    seen = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def predict(self, images, options=None):
            assert not self.training
            seen.append(tuple(images.shape))
            return images[:, 0]

    class Data(list):
        num_classes, ignore_index, class_names = 3, 255, None

    def item(height, width, value):
        image = torch.full((3, height, width), value, dtype=torch.uint8)
        return {"image": image, "label": image[0].long(), "name": ""}

    model = Model()
    result = evaluate(model, Data([item(4, 6, 0), item(5, 5, 1), item(4, 6, 1)]), batch_size=3)
    assert sorted(seen) == [(1, 3, 5, 5), (2, 3, 4, 6)]
    assert result == {
        "miou": 1.0, "accuracy": 1.0, "images": 3, "iou": {"class 0": 1.0, "class 1": 1.0, "class 2": None},
    }  # fmt: skip
    assert model.training
    Data.class_names = ("sky", "road", "sky")  # of a converted model, or of a data set of one's own
    result = evaluate(model, Data([item(4, 6, 0), item(5, 5, 2)]))
    assert result["iou"] == {"sky": 1.0, "road": None, "sky_2": 1.0}


def test_time_limit(tmp_path):
    result = train(tiny(tmp_path / "run", max_steps=10**6, max_minutes=0.02))
    assert result["stopped"] == "max_minutes" and 0 < result["step"] < 10**5
    assert os.readlink(tmp_path / "run/checkpoints/last") == str(result["step"])
    assert result["images"] == 3


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    train(tiny(tmp_path / "run", max_steps=2, tensorboard=True))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


# What stops it


class _Sends(_Wrapped):
    """Sends a signal to this process when it is read for the so-manieth time."""

    def __init__(self, dataset, reads, number, times=1):
        super().__init__(dataset)
        self.reads, self.number, self.times = reads, number, times

    def __getitem__(self, index):
        self.reads -= 1
        if self.reads <= 0 and self.times:
            self.times -= 1
            os.kill(os.getpid(), self.number)
        return self.dataset[index]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("where", "reads", "step"), [("training", 2 * 4 + 1, 5), ("validation", 2, 4)])
def test_a_signal_saves_and_the_rest_is_bitwise(tmp_path, capfd, number, where, reads, step):
    """At the end of the step, or in an evaluation, which is done again; not where the log has a line."""
    config = tiny(tmp_path / "run", max_steps=9, log_every=3, evaluate_every=4, ema=0.9)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    train(whole)
    sets = {
        "training": SyntheticShapes("training", 9, 32),
        "validation": SyntheticShapes("validation", 3, 32),
    }
    sets[where] = _Sends(sets[where], reads, number)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"{number.name} at step {step}, saved in .*--resume") as raised:
        train(config, **sets)
    assert raised.value.signum == number and signal.getsignal(number) is before
    assert f"{number.name}: saving; once more to stop at once" in capfd.readouterr().err
    assert os.readlink(tmp_path / "run/checkpoints/last") == str(step)
    train(dataclasses.replace(config, resume=True))
    assert rows(config.out) == rows(whole.out)
    assert_same_weights(weights(config.out), weights(whole.out))


def test_a_second_signal_stops_at_once(tmp_path):
    config = tiny(tmp_path / "run", max_steps=9)
    with pytest.raises(KeyboardInterrupt) as raised:
        train(config, _Sends(SyntheticShapes("training", 9, 32), 5, signal.SIGINT, times=2))
    assert not isinstance(raised.value, Interrupted)
    assert not (tmp_path / "run/checkpoints/last").exists()


def test_a_killed_loading_process_is_one_line(tmp_path):
    class Kills(_Wrapped):
        def __getitem__(self, index):
            if torch.utils.data.get_worker_info() is not None and index == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.dataset[index]

    with pytest.raises(OSError, match=r"^workers: a data loading process ended early"):
        train(tiny(tmp_path / "run", workers=1), Kills(SyntheticShapes("training", 9, 32)))


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    config = tiny(tmp_path / "run", max_steps=6, checkpoint_every=2)
    saved, save = [], torch.save

    def full(*args, **kwargs):
        saved.append(args)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    message = (
        r"trainer\.pt: cannot be written .No space .*; the last checkpoint is of step 2, and with more space"
    )
    with pytest.raises(OSError, match=message):
        train(config)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "last"]
    train(dataclasses.replace(config, resume=True))
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    train(whole)
    assert_same_weights(weights(config.out), weights(whole.out))


def test_loss_that_is_not_finite_stops_training(tmp_path):
    config = tiny(tmp_path / "run", lr=1e30, clip=None, warmup_steps=0, weight_decay=0.0)
    with pytest.raises(
        FloatingPointError, match=r"the loss is not finite in step \d .*nan.*no checkpoint yet"
    ):
        train(config)
    assert not (tmp_path / "run" / "checkpoints" / "last").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The loss of the last step was finite; what the step made of the weights is not."""
    config = tiny(
        tmp_path / "run", max_steps=1, lr=1e38, decoder_lr_scale=10.0, warmup_steps=0, weight_decay=0.0
    )
    with pytest.raises(FloatingPointError, match="weights are not finite after step 1; try a lower lr"):
        train(config)
    assert not (tmp_path / "run" / "checkpoints" / "last").exists()


def test_resume_elsewhere_longer_and_otherwise(tmp_path, capsys):
    """Moved data, more steps, other parts and processes go on; other samples and a shorter run do not."""
    from PIL import Image

    for split in ("training", "validation"):
        for kind, value in (("images", (90, 20, 60)), ("annotations", 1)):
            folder = tmp_path / "data" / kind / split
            folder.mkdir(parents=True)
            for name in "ab":
                picture = Image.new("RGB" if kind == "images" else "L", (32, 32), value)
                picture.paste(0, (0, 0, 16, 32))
                picture.save(folder / f"{name}.png")
    (tmp_path / "data" / "names.txt").write_text("one\ntwo\n")
    config = tiny(tmp_path / "run", data=str(tmp_path / "data"), max_steps=2, reduce_zero_label=False)
    train(config)
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = dataclasses.replace(config, resume=True, data=str(tmp_path / "moved"))
    capsys.readouterr()
    train(moved)
    assert "note: data" not in capsys.readouterr().out
    longer = dataclasses.replace(moved, max_steps=4, accumulate=2)
    assert train(longer)["step"] == 4
    out = capsys.readouterr().out
    assert "note: accumulate 1 -> 2: the same training, with other rounding and dropout from here on" in out
    what = "learning rate, shrink_after and the masks of eomt"
    assert f"note: max_steps 2 -> 4: {what} follow the schedule of 4 steps from here on" in out
    with pytest.raises(ValueError, match="max_steps: got 3, but the run is at step 4"):
        train(dataclasses.replace(longer, max_steps=3))
    with pytest.raises(ValueError, match=r"other options: batch_size 2 -> 4$"):
        train(dataclasses.replace(longer, batch_size=4))
    path = tmp_path / "moved" / "images" / "training" / "a.png"
    path.rename(path.with_name("c.png"))
    labels = tmp_path / "moved" / "annotations" / "training"
    (labels / "a.png").rename(labels / "c.png")
    with pytest.raises(ValueError, match="resume: the training images have other names"):
        train(longer)
    (labels / "c.png").unlink()
    path.with_name("c.png").unlink()
    with pytest.raises(ValueError, match="resume: the training data have 1 images, 2 when it began"):
        train(longer)


def test_resume_after_another_precision_places_the_counts_of_steps(tmp_path, monkeypatch):
    """Of fp16 they are on the CPU; fused AdamW wants them where the weights are."""
    config = tiny(tmp_path / "run", max_steps=1)
    train(config)
    path = tmp_path / "run" / "checkpoints" / "last" / "trainer.pt"
    state = torch.load(path)
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = False
    torch.save(state, path)
    seen, place = [], torch.optim.Optimizer._process_value_according_to_param_policy

    def recorded(param, value, param_id, param_groups, key=None):
        seen.extend(group["fused"] for group in param_groups if param_id in group["params"])
        return place(param, value, param_id, param_groups, key)

    monkeypatch.setattr(
        torch.optim.Optimizer, "_process_value_according_to_param_policy", staticmethod(recorded)
    )
    assert train(dataclasses.replace(config, resume=True, max_steps=2))["step"] == 2
    assert seen and all(seen)


def test_resume_on_two_processes_with_half_the_batch(tmp_path, capsys):
    config = tiny(tmp_path / "run", max_steps=2, batch_size=2)
    train(config)
    two = dataclasses.replace(config, resume=True, max_steps=3, batch_size=1, devices=2)
    assert train(two)["step"] == 3
    assert "devices 1 -> 2" in capsys.readouterr().out


def test_resume_refuses_other_options_and_a_folder_in_use(tmp_path):
    config = tiny(tmp_path / "run", max_steps=2)
    train(config)
    with pytest.raises(ValueError, match="already holds a run; use --resume"):
        train(config)
    with pytest.raises(ValueError, match=r"started with other options: lr 0\.001 -> 0\.1, power"):
        train(dataclasses.replace(config, resume=True, max_steps=4, lr=0.1, power=2.0))


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"out: cannot write to .*file/run \("):
        train(tiny(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps: got 0"),
        ({"patience": 1}, "patience: got 1, which needs evaluations"),
        ({"class_weights": [1.0, 2.0]}, "class_weights: got 2, expected one for each of 12 classes"),
        ({"batch_size": 4, "accumulate": 3}, "accumulate: got 3"),
        ({"betas": (0.9, 1.0)}, r"betas: got \(0.9, 1.0\)"),
        ({"ema": 1.0}, "ema: got 1.0"),
        ({"lr": 0.0}, "lr: got 0.0"),
        ({"clip": 0.0}, "clip: got 0.0, expected more than 0 or null"),
        ({"clip": -1.0}, "clip: got -1.0"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"power": float("inf")}, "power: got inf, expected at least 0"),
        ({"scale": (0.5, float("nan"))}, "scale: got"),
        ({"max_minutes": 0.0}, "max_minutes: got 0.0"),
        ({"lr": 1.0, "weight_decay": 0.5}, "weight_decay: got 0.5, which with lr 1.0 turns weights around"),
        ({"precision": "64"}, "precision: got '64', expected 32 or bf16 or fp16"),
        ({"devices": 0}, "devices: got 0"),
        ({"devices": 2**40}, "devices: got .*, expected at least 1 and at most 4,096"),
        ({"devices": 4096}, "devices: got 4096, expected at most .* on this CPU"),
        ({"workers": 4096}, "workers: got 4096, expected at most .* on this machine with .* processors"),
        ({"model": {**TINY, "in_channels": 2}}, "data: synthetic pictures have 3 channels, the model has 2"),
        ({"model": {"num_classes": 3}}, "num_classes is not a field to change; the data give the number"),
        ({"model": {"name": "a"}}, "name is not a field to change; preset gives it"),
        (
            {"model": {"backbone": {"width": 8}}},
            "backbone is not a field to change; its own fields are named",
        ),
        ({"precision": "fp16"}, "precision: fp16 needs a GPU"),
        ({"preset": "vit_huge"}, "unknown preset 'vit_huge'"),
        ({"model": {**TINY, "tap": 1}}, "no field tap"),
        ({"image_size": 36}, "image_size must be two multiples of the patch size 8"),
        ({"backbone_weights": "nowhere.pth"}, "nowhere.pth: no such checkpoint file"),
        ({"scale": (2.0, 1.0)}, "scale: got"),
    ],
)
def test_bad_options(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_left_and_right_classes_are_exchanged_and_said(tmp_path, capsys):
    config = TrainConfig(data="synthetic", out=str(tmp_path), image_size=16, scale=(1.0, 1.0))
    label = torch.ones(16, 16, dtype=torch.int64)
    training: object = SyntheticShapes("training", 100, 32)
    training.class_names, training.ignore_index = ("ground", "left arm", "right arm"), 255
    augment = make_augmentation(config, training, SimpleNamespace(config=SegViTConfig.preset("vit_tiny", 3)))
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    assert {int(augment(image, label, 0, index)[1][0, 0]) for index in range(20)} == {1, 2}
    said = "flip: a mirrored picture's classes left arm and right arm are exchanged"
    for flip in (True, False):
        _say_what_is_odd(dataclasses.replace(config, flip=flip), training)
        assert (said in "".join(capsys.readouterr())) == flip
