"""Training on Lightning Fabric: the published recipe, exact resume, one log.

Source of the recipe: SegViT (NeurIPS 2022, arXiv 2210.05844), section 4.1.

A run is a folder:

    config.yaml              the options
    metrics.csv              one line every `log_every` steps, and one for each evaluation
    checkpoints/STEP/        model.safetensors, config.json (see `SegViT.from_pretrained`) and trainer.pt
    checkpoints/last, best   links to the newest checkpoint and to the one of the highest mIoU

Checkpoints appear whole or not at all, so a run may be killed at any moment and continued with `resume`:
weights, optimizer, schedule, place in the data, random states and moving average are those of the last
checkpoint.

Sample number i of the whole run is drawn from the permutation of (seed, epoch), augmented from (seed, epoch,
image): it depends neither on the number of processes nor on loading workers. In step s, R processes with
batches of b images take the samples from s·R·b on, process r the r-th piece of b.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

import segvit_kernels
from segvit._extras import require
from segvit.checkpoint import atomic_write, load_state_dict, read_state_dict
from segvit.config import SegViTConfig
from segvit.data import open_dataset
from segvit.evaluate import batches, collate, evaluate, launch, make_fabric, progress_bar
from segvit.linear_head import CrossEntropy, LinearSegmenter
from segvit.losses import SegViTLoss
from segvit.model import WEIGHTS_FILE, SegViT
from segvit.options import TrainConfig
from segvit.transforms import Augment, sample_seed
from segvit_kernels import FusedATM

__all__ = ["TrainConfig", "build_model", "learning_rate_factor", "run", "train"]

# Options that may differ when a run is resumed; every other one changes the result.
_FREE = {"resume", "out", "workers", "progress", "tensorboard", "max_minutes", "checkpoint_every"}


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Factor on every group's learning rate in `step`: linear warm-up, then (1 - t)^power."""
    warmup = min(config.warmup_steps, config.max_steps - 1)
    if step < warmup:
        first = min(1.0, config.warmup_lr / config.lr)
        return first + (1 - first) * step / warmup
    return (1 - (step - warmup) / (config.max_steps - warmup)) ** config.power


class _Samples(Dataset):
    """Augmented items by (epoch, index)."""

    def __init__(self, dataset: Dataset, augment: Augment) -> None:
        self.dataset, self.augment = dataset, augment

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        item = self.dataset[index]
        image, label = self.augment(item["image"], item["label"], epoch, index)
        return {"image": image, "label": label, "name": item["name"]}


class StepSampler:
    """Batches of (epoch, index) keys for one process, from `start` to `steps`.

    The union over the `world` processes in a step is what one process with `world` times the batch takes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        steps: int,
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
    ) -> None:
        self.length, self.batch_size, self.steps = length, batch_size, steps
        self.start, self.rank, self.world, self.seed = start, rank, world, seed

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        orders: dict[int, np.ndarray] = {}
        for step in range(self.start, self.steps):
            first = (step * self.world + self.rank) * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                epoch, place = divmod(position, self.length)
                if epoch not in orders:
                    generator = np.random.default_rng([self.seed, epoch])
                    orders = {**orders, epoch: generator.permutation(self.length)}
                    orders.pop(epoch - 2, None)
                keys.append((epoch, int(orders[epoch][place])))
            yield keys


class _Log:
    """metrics.csv, and TensorBoard where asked for. Continuing at a step drops what was written after it."""

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self.path = folder / "metrics.csv"
        self.rows: list[dict[str, str]] = []
        if step and self.path.is_file():
            with self.path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if row["step"] and int(row["step"]) <= step]
        self.columns = list(self.rows[0]) if self.rows else []
        if self.rows:
            self._rewrite()
        else:
            self.path.unlink(missing_ok=True)
        self.writer = None
        if tensorboard:
            module = require("torch.utils.tensorboard", extra="tensorboard")
            self.writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def _rewrite(self) -> None:
        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, self.columns)
                table.writeheader()
                table.writerows(self.rows)

        atomic_write(self.path, write)

    def add(self, step: int, **values: float) -> None:
        row = {"step": str(step), **{name: f"{value:.9g}" for name, value in values.items()}}
        self.rows.append(row)
        if not set(row) <= set(self.columns):
            self.columns += [name for name in row if name not in self.columns]
            self._rewrite()
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)


def build_model(config: TrainConfig, dataset: Any) -> SegViT:
    """The model of a training configuration, its backbone loaded, for the classes of a dataset.

    Raises:
        ValueError, FileNotFoundError: unknown preset or field; weights that do not fit.
    """
    overrides = {"image_size": config.image_size, "shrunk": config.shrunk, **config.model}
    overrides.setdefault("class_names", dataset.class_names)
    overrides.setdefault("palette", dataset.palette)
    try:
        model_config = SegViTConfig.preset(config.preset, dataset.num_classes, **overrides)
    except TypeError as error:
        raise ValueError(f"model: {error}") from None
    model = (LinearSegmenter if config.head == "linear" else SegViT)(model_config)
    if config.backbone_weights:
        model.load_backbone(config.backbone_weights)
    if config.freeze_backbone:
        model.backbone.requires_grad_(False)
    with torch.no_grad():
        for module in model.decoder.modules():
            if isinstance(module, FusedATM):
                module.q.weight.mul_(config.similarity_gain)
                module.k.weight.mul_(config.similarity_gain)
    return model


def _check(config: TrainConfig) -> None:
    """Raises ValueError for values that no run can have."""
    least = {
        "max_steps": 1, "batch_size": 1, "accumulate": 1, "log_every": 1, "devices": 1, "warmup_steps": 0,
        "evaluate_every": 0, "locate_images": 0, "workers": 0, "weight_decay": 0, "seed": 0,
    }  # fmt: skip
    for name, minimum in least.items():
        if getattr(config, name) < minimum:
            raise ValueError(f"{name}: got {getattr(config, name)}, expected at least {minimum}")
    for name in ("lr", "similarity_gain"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{name}: got {getattr(config, name)}, expected more than 0")
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        raise ValueError(f"betas: got {tuple(config.betas)}, expected two decays from 0 to below 1")
    if config.ema is not None and not 0 < config.ema < 1:
        raise ValueError(f"ema: got {config.ema}, expected a decay between 0 and 1")
    if config.batch_size % config.accumulate:
        raise ValueError(
            f"accumulate: got {config.accumulate}, expected a divisor of batch_size {config.batch_size}"
        )
    if config.checkpoint_every is not None and config.checkpoint_every < 1:
        raise ValueError(f"checkpoint_every: got {config.checkpoint_every}, expected at least 1")


def _prepare_folder(config: TrainConfig) -> None:
    """Make the run's folder, or check that it can be resumed.

    Raises:
        ValueError: a run is there already, or it had other options.
        OSError: the folder cannot be written.
    """
    yaml = require("yaml", extra="train")
    folder = Path(config.out)
    path = folder / "config.yaml"
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if path.is_file():
            before = yaml.safe_load(path.read_text())
            if not config.resume:
                if (folder / "checkpoints" / "last").exists():
                    raise ValueError(f"out: {folder} already holds a run; use --resume, or another folder")
            else:
                changed = [k for k, v in values.items() if k not in _FREE and before.get(k, v) != v]
                if changed:
                    listed = ", ".join(f"{k} {before[k]!r} -> {values[k]!r}" for k in changed)
                    raise ValueError(f"resume: {folder} was started with other options: {listed}")
        values["resume"] = False
        atomic_write(path, lambda temporary: temporary.write_text(yaml.safe_dump(values, sort_keys=False)))
    except OSError as error:
        raise OSError(f"out: cannot write to {folder} ({error.strerror or error})") from None


def train(
    config: TrainConfig, training: Dataset | None = None, validation: Dataset | None = None
) -> dict[str, Any]:
    """Train a model as `config` says.

    Args:
        config: the options.
        training, validation: datasets in place of those that `config.data` names; with items and attributes
            as those of `segvit.data.SegmentationFolder`.

    Returns:
        {"step", "seconds", "best_miou", "stopped" ("finished" or "max_minutes"), and the last evaluation's
        "miou", "accuracy", "images", "iou"}.

    Raises:
        ValueError, TypeError, OSError: options, data or weights that cannot be used; the message names them.
        FloatingPointError: the loss is not finite.
    """
    _check(config)
    fabric = make_fabric(config)

    def data(split: str, synthetic_length: int) -> Dataset:
        return open_dataset(
            config.data,
            split,
            names=config.names,
            reduce_zero_label=config.reduce_zero_label,
            label_mapping=config.label_mapping,
            ignore_index=config.ignore_index,
            synthetic_length=synthetic_length,
            synthetic_size=config.image_size,
        )

    if training is None:
        training = data("training", config.synthetic_images)
    if validation is None:
        validation = data("validation", config.synthetic_validation)
    _prepare_folder(config)
    return launch(fabric, _train, config, training, validation)


def _train(fabric: Any, config: TrainConfig, training: Any, validation: Any) -> dict[str, Any]:
    with segvit_kernels.backend(config.backend) if config.backend else nullcontext():
        return _Trainer(fabric, config, training, validation).fit()


class _Trainer:
    def __init__(self, fabric: Any, config: TrainConfig, training: Any, validation: Any) -> None:
        self.fabric, self.config, self.validation = fabric, config, validation
        self.folder = Path(config.out)
        self.checkpoints = self.folder / "checkpoints"

        torch.manual_seed(config.seed)
        self.model = build_model(config, training).to(fabric.device).train()
        augment = Augment(
            config.image_size,
            scale=config.scale,
            class_share=config.class_share,
            flip=config.flip,
            photometric=config.photometric,
            mean=self.model.config.mean,
            ignore_index=training.ignore_index,
            seed=config.seed,
        )
        located = config.head == "segvit" and self.model.config.upsample and config.locate_images
        if located and not config.resume:
            self._locate(training, augment)
        groups = self.model.parameter_groups(config.lr, config.weight_decay, config.decoder_lr_scale)
        for group in groups:
            group["peak_lr"] = group["lr"]
        # Fused AdamW unscales by itself and then cannot clip.
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, fused=config.precision != "fp16"
        )
        self.average = None
        if config.ema is not None:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        if config.head == "linear":
            self.loss = CrossEntropy(training.ignore_index)
        else:
            self.loss = SegViTLoss(training.num_classes, training.ignore_index)

        self.step, self.elapsed, self.best, self.result = 0, 0.0, -math.inf, {}
        self.window: dict[str, Tensor] = {}  # sums of the losses since the last line of the log
        self.window_steps = 0
        random.seed(sample_seed(config.seed, fabric.global_rank, 1))
        torch.manual_seed(sample_seed(config.seed, fabric.global_rank))  # dropout differs between processes
        saved = self._load() if config.resume else None

        compiled = torch.compile(self.model) if config.compile else self.model
        self.wrapped, self.fabric_optimizer = fabric.setup(compiled, self.optimizer)
        if saved:
            fabric._precision.load_state_dict(saved["scaler"])
        sampler = StepSampler(
            len(training),
            config.batch_size,
            config.max_steps,
            start=self.step,
            rank=fabric.global_rank,
            world=fabric.world_size,
            seed=config.seed,
        )
        self.batches = batches(
            _Samples(training, augment), sampler, config.workers, collate, pin=fabric.device.type == "cuda"
        )
        self.log = None
        if fabric.is_global_zero:
            for leftover in self.checkpoints.glob(".*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            self.log = _Log(self.folder, self.step, config.tensorboard)
        if saved:  # last: nothing above may change what is drawn from here on
            self._set_random_state(saved["random"][fabric.global_rank])

    # The loop

    def fit(self) -> dict[str, Any]:
        config, fabric = self.config, self.fabric
        checkpoint_every = config.checkpoint_every or config.evaluate_every or 1000
        self.started = time.perf_counter() - self.elapsed
        evaluation_seconds = 0.0
        stopped = "finished"
        bar = _training_bar(config.progress and fabric.is_global_zero)
        with bar:
            task = bar.add_task(
                "train", total=config.max_steps, completed=self.step, loss="", miou=self._miou_text()
            )
            while self.step < config.max_steps:
                if self._out_of_time(evaluation_seconds):
                    stopped = "max_minutes"
                    break
                terms = self._optimize()
                self.step += 1
                for name, value in terms.items():
                    self.window[name] = self.window[name] + value if name in self.window else value
                self.window_steps += 1
                finished = self.step == config.max_steps
                checkpoint = self.step % checkpoint_every == 0
                evaluation = config.evaluate_every and self.step % config.evaluate_every == 0
                if self.step % config.log_every == 0 or checkpoint or evaluation or finished:
                    loss = self._write_log()
                    bar.update(task, loss=f"loss {loss:.4f}")
                bar.advance(task)
                if evaluation and not finished:
                    before = time.perf_counter()
                    self._evaluate(bar)
                    evaluation_seconds = time.perf_counter() - before
                    bar.update(task, miou=self._miou_text())
                if (checkpoint or evaluation) and not finished:
                    self._save()
            if self.window_steps:
                self._write_log()
            if self.result.get("step") != self.step:
                self._evaluate(bar)
                bar.update(task, miou=self._miou_text())
                self._save()
        return {
            **self.result,
            "best_miou": self.best,
            "seconds": time.perf_counter() - self.started,
            "stopped": stopped,
        }

    def _out_of_time(self, reserve: float) -> bool:
        """Whether max_minutes are over, with an evaluation of `reserve` seconds; the same everywhere."""
        if self.config.max_minutes is None:
            return False
        over = time.perf_counter() - self.started + reserve > 60 * self.config.max_minutes
        if self.fabric.world_size == 1:
            return over
        return self.step % self.config.log_every == 0 and bool(self.fabric.broadcast(over))

    def _optimize(self) -> dict[str, Tensor]:
        """One step of the optimizer; the detached terms of the loss."""
        config, fabric = self.config, self.fabric
        factor = learning_rate_factor(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        batch = next(self.batches)
        images = batch["image"].to(fabric.device, non_blocking=True).chunk(config.accumulate)
        labels = batch["label"].to(fabric.device, non_blocking=True).chunk(config.accumulate)
        sums: dict[str, Tensor] = {}
        for part, (image, label) in enumerate(zip(images, labels, strict=True), start=1):
            with fabric.no_backward_sync(self.wrapped, enabled=part < config.accumulate):
                terms = self.loss(self.wrapped(self.model.preprocess(image)), label)
                fabric.backward(terms["total"] / config.accumulate)
            for name, value in terms.items():
                share = value.detach() / config.accumulate
                sums[name] = sums[name] + share if name in sums else share
        if config.clip is not None:
            fabric.clip_gradients(
                self.wrapped, self.fabric_optimizer, max_norm=config.clip, error_if_nonfinite=False
            )
        self.fabric_optimizer.step()
        self.fabric_optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return sums

    def _write_log(self) -> float:
        """A line with the mean of each term since the last line; returns the mean loss.

        Raises:
            FloatingPointError: it is not finite.
        """
        names = list(self.window)
        sums = torch.stack([self.window[name].double() for name in names]) / self.window_steps
        means = dict(zip(names, self.fabric.all_reduce(sums, reduce_op="mean").tolist(), strict=True))
        first = self.step - self.window_steps + 1
        if not math.isfinite(means["total"]):
            bad = ", ".join(f"{name} {value}" for name, value in means.items() if not math.isfinite(value))
            last = (
                "the last checkpoint is from before"
                if (self.checkpoints / "last").exists()
                else "no checkpoint yet"
            )
            steps = f"step {self.step}" if first == self.step else f"steps {first}...{self.step}"
            raise FloatingPointError(
                f"the loss is not finite in {steps} ({bad}); try a lower lr or precision 32 ({last})"
            )
        if self.log:
            self.log.add(
                self.step,
                loss=means.pop("total"),
                **means,
                lr=self.optimizer.param_groups[0]["lr"],
                seconds=time.perf_counter() - self.started,
            )
            loss = float(self.log.rows[-1]["loss"])
        else:
            loss = means["total"]
        self.window, self.window_steps = {}, 0
        return loss

    def _evaluate(self, bar: Any) -> None:
        model = self.model if self.average is None else self.average.module
        share = len(range(self.fabric.global_rank, len(self.validation), self.fabric.world_size))
        task = bar.add_task("evaluate", total=share, loss="", miou="")
        result = evaluate(
            model,
            self.validation,
            fabric=self.fabric,
            batch_size=self.config.batch_size,
            workers=self.config.workers,
            on_images=lambda count: bar.advance(task, count),
        )
        bar.remove_task(task)
        self.result = {"step": self.step, **result}
        if self.log:
            self.log.add(
                self.step,
                miou=result["miou"],
                accuracy=result["accuracy"],
                seconds=time.perf_counter() - self.started,
            )
            if self.config.progress:
                bar.console.print(f"step {self.step}: mIoU {100 * result['miou']:.2f}")

    def _miou_text(self) -> str:
        return f"mIoU {100 * self.result['miou']:.2f}" if self.result else ""

    # Checkpoints

    def _random_state(self) -> dict[str, Any]:
        cuda = self.fabric.device.type == "cuda"
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.fabric.device) if cuda else None,
            "python": random.getstate(),
        }

    def _set_random_state(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        if state["cuda"] is not None and self.fabric.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.fabric.device)

    def _save(self) -> None:
        """Write checkpoints/STEP, then turn the links to it; all processes take part."""
        states = [self._random_state()]
        if self.fabric.world_size > 1:
            states = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(states, self._random_state())
        better = self.result.get("step") == self.step and self.result["miou"] > self.best
        if better:
            self.best = self.result["miou"]
        if not self.fabric.is_global_zero:
            return
        temporary = self.checkpoints / f".{self.step}"
        temporary.mkdir(exist_ok=True)
        (self.model if self.average is None else self.average.module).save_pretrained(temporary)
        state = {
            "step": self.step,
            "elapsed": time.perf_counter() - self.started,
            "best": self.best,
            "result": self.result,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.fabric._precision.state_dict(),
            "random": states,
            "model": None if self.average is None else self.model.state_dict(),
            "averaged": None if self.average is None else self.average.n_averaged,
        }
        torch.save(state, temporary / "trainer.pt")
        final = self.checkpoints / str(self.step)
        if final.exists():  # of a run that went on from an earlier checkpoint
            shutil.rmtree(final)
        os.replace(temporary, final)
        for name in ["last", "best"] if better else ["last"]:
            link = self.checkpoints / f".{name}"
            link.unlink(missing_ok=True)
            link.symlink_to(final.name)
            os.replace(link, self.checkpoints / name)
        kept = {(self.checkpoints / name).resolve() for name in ("last", "best")}
        for folder in self.checkpoints.iterdir():
            if folder.name.isdigit() and folder.resolve() not in kept:
                shutil.rmtree(folder)

    @torch.no_grad()
    def _locate(self, training: Any, augment: Augment) -> None:
        """Show the up-sampling queries of a Shrunk model where they are: see `QueryUpsample.locate`."""
        count = min(self.config.locate_images, len(training))
        indices = [len(training) * i // count for i in range(count)]
        levels = []
        self.model.eval()
        for start in range(0, count, self.config.batch_size):
            part = indices[start : start + self.config.batch_size]
            items = [(training[i], i) for i in part]
            crops = [augment(item["image"], item["label"], 0, i)[0] for item, i in items]
            levels.append(self.model.backbone(self.model.preprocess(torch.stack(crops))))
        self.model.train()
        self.model.decoder.upsample.locate([torch.cat(level) for level in zip(*levels, strict=True)])

    def _load(self) -> dict[str, Any] | None:
        """Continue from checkpoints/last, if there is one.

        Raises:
            ValueError: it is of another model or number of processes.
        """
        folder = self.checkpoints / "last"
        if not folder.exists():
            return None
        source = folder / "trainer.pt"
        try:
            state = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{source}: cannot be read ({str(error).splitlines()[0]})") from None
        if len(state["random"]) != self.fabric.world_size:
            raise ValueError(
                f"{source}: of {len(state['random'])} processes, now it is {self.fabric.world_size}"
            )
        weights = read_state_dict(folder / WEIGHTS_FILE)
        load_state_dict(self.model, state["model"] or weights, str(folder / WEIGHTS_FILE))
        if self.average is not None:
            load_state_dict(self.average.module, weights, str(folder / WEIGHTS_FILE))
            self.average.n_averaged.copy_(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.best, self.result = state["best"], state["result"]
        return state


def _training_bar(enabled: bool) -> Any:
    require("rich", extra="train")
    from rich.progress import TextColumn

    return progress_bar(enabled, TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[miou]}"))


def run(config: TrainConfig) -> int:
    """`segvit train`."""
    result = train(config)
    minutes = result["seconds"] / 60
    print(
        f"{result['stopped']} at step {result['step']} after {minutes:.1f} minutes: "
        f"mIoU {100 * result['miou']:.2f} (best {100 * result['best_miou']:.2f}) in {config.out}"
    )
    return 0
