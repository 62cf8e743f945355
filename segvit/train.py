"""Training on Lightning Fabric: the published recipe, exact resume, one log.

Source of the recipe: SegViT (NeurIPS 2022, arXiv 2210.05844), section 4.1.

A run is a folder (`segvit.run_folder`). Checkpoints appear whole or not at all, so it may be killed at any
moment and continued with `resume`: weights, optimizer, schedule, place in the data, random states and moving
average are those of the last checkpoint. SIGINT and SIGTERM save one at the end of the step.

Sample number i of the whole run is drawn from the permutation of (seed, epoch), augmented from (seed, epoch,
image): it depends neither on the number of processes nor on loading workers. In step s, R processes with
batches of b images take the samples from s·R·b on, process r the r-th piece of b.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

import segvit_kernels
from segvit.config import SegViTConfig
from segvit.data import SegmentationFolder, folder_options, open_dataset
from segvit.data.transforms import Augment, sample_seed
from segvit.evaluate import batches, check_data, collate, evaluate, launch, make_fabric, progress_bar
from segvit.init_from import init_from
from segvit.model.checkpoint import WEIGHTS_FILE, load_state_dict, read_config, read_state_dict
from segvit.model.heads import model_with
from segvit.model.linear_head import CrossEntropy
from segvit.model.losses import SegViTLoss, weights_of_classes
from segvit.model.pretrained import open_pretrained
from segvit.model.segvit import SegViT
from segvit.options import TrainConfig
from segvit.run_folder import EVALUATION_FILE, TRAINER_FILE, Checkpoints, Log, claimed, prepare, samples_of
from segvit.system.extras import require
from segvit.system.files import atomic_write
from segvit.system.interrupts import Interrupted, Interrupts, obey_parent
from segvit.system.machine import first_process, started_processes
from segvit.system.text import read_json
from segvit_kernels import FusedATM

__all__ = ["TrainConfig", "build_model", "learning_rate_factor", "run", "train"]


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Factor on every group's learning rate in `step`: linear warm-up, then (1 - t)^power."""
    warmup = min(config.warmup_steps, config.max_steps - 1)
    if step < warmup:
        first = min(1.0, config.warmup_lr / config.lr)
        return first + (1 - first) * step / warmup
    return (1 - (step - warmup) / (config.max_steps - warmup)) ** config.power


def backward(
    fabric: Any,
    model: nn.Module,
    preprocess: Callable[[Tensor], Tensor],
    loss: nn.Module,
    images: Tensor,
    labels: Tensor,
    parts: int = 1,
) -> dict[str, Tensor]:
    """Add the gradient of a batch's loss to the parameters'; the detached terms of that loss.

    Args:
        fabric: the run's, which set up `model`.
        preprocess: from images to what `model` takes.
        loss: `SegViTLoss` or `CrossEntropy`.
        images, labels: of the batch, (B, 3, H, W) and (B, H, W).
        parts: pieces into which the batch is split to save memory; the sums that the batch's loss is divided
            by are the whole batch's, so that loss and gradient are too.
    """
    normalisers = loss.normalisers(labels) if parts > 1 else None
    sums: dict[str, Tensor] = {}
    pieces = zip(images.chunk(parts), labels.chunk(parts), strict=True)
    for part, (image, label) in enumerate(pieces, start=1):
        with fabric.no_backward_sync(model, enabled=part < parts):
            terms = loss(model(preprocess(image)), label, normalisers)
            fabric.backward(terms["total"])
        for name, value in terms.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    return sums


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


# Fields of a model that `--model` does not set, and what does.
_GIVEN = {
    "num_classes": "the data give the number of classes",
    "name": "preset gives it",
    "backbone": "its own fields are named like those of the model, as in {'width': 192}",
}


def build_model(config: TrainConfig, dataset: Any, say: Callable[[str], None] = lambda text: None) -> SegViT:
    """The model that a training starts from, for the classes of a dataset; resumed, without its weights.

    Args:
        say: told what pretrained weights brought along and what was changed in them.

    Raises:
        ValueError, FileNotFoundError: unknown preset or field; weights that do not fit.
    """
    kind = model_with(config.head)
    overrides = {"image_size": config.image_size, **config.model}
    for name, instead in _GIVEN.items():
        if name in config.model:
            raise ValueError(f"model: {name} is not a field to change; {instead}")
    overrides.setdefault("class_names", dataset.class_names)
    overrides.setdefault("palette", dataset.palette)
    overrides.setdefault("value_range", config.value_range or None)
    kept = Checkpoints(config.out).newest() if config.resume else None
    if kept:  # what it started from may be gone
        model = kind(read_config(kept)[0])
    elif config.init_from:
        model, notes = init_from(config.init_from, dataset.num_classes, overrides, config.head)
        say(f"{config.init_from}: {'; '.join(notes)}")
        if config.shrunk and model.config.backbone.shrink_at is None:
            raise ValueError(f"shrunk: {config.init_from} is not")
    else:
        model = _start(config, kind, dataset.num_classes, {"shrunk": config.shrunk, **overrides}, say)
    if config.freeze_backbone:
        model.freeze_backbone()
    model.set_gradient_checkpointing(config.gradient_checkpointing)
    return model


# Of a backbone, what its weights decide where --model does not.
_OF_WEIGHTS = ("mlp", "mlp_ratio", "register_tokens", "qkv_bias", "pre_norm")


def _start(
    config: TrainConfig,
    kind: type[SegViT],
    num_classes: int,
    fields: dict[str, Any],
    say: Callable[[str], None],
) -> SegViT:
    """A model of the preset, its backbone's weights loaded."""
    try:
        model_config = SegViTConfig.preset(config.preset, num_classes, **fields)
    except TypeError as error:
        raise ValueError(f"model: {error}") from None
    weights = open_pretrained(config.backbone_weights) if config.backbone_weights else None
    if weights:
        told = {key: config.model[key] for key in ("heads", "mlp", "norm_eps") if key in config.model}
        weights = weights._replace(known={**told, **weights.known})
        own, theirs = model_config.backbone, weights.backbone_config()
        if (theirs.width, theirs.depth) == (own.width, own.depth):
            taken = {key: getattr(theirs, key) for key in _OF_WEIGHTS}
            taken |= {key: weights.known[key] for key in ("heads", "norm_eps") if key in weights.known}
            if (own.layer_scale is None) != (theirs.layer_scale is None):
                taken["layer_scale"] = theirs.layer_scale
            taken = {key: value for key, value in taken.items() if key not in config.model}
            backbone = dataclasses.replace(own, **taken)
            model_config = dataclasses.replace(model_config, backbone=backbone)
    model = kind(model_config)
    if weights:
        report = model.load_backbone(weights, statistics=not {"mean", "std"} & set(config.model))
        say(f"{weights.name}: {'; '.join([f'{report.loaded} tensors loaded', *report.changed])}")
    with torch.no_grad():
        for module in model.decoder.modules():
            if isinstance(module, FusedATM):
                module.q.weight.mul_(config.similarity_gain)
                module.k.weight.mul_(config.similarity_gain)
    return model


def _check(config: TrainConfig) -> None:
    """Raises ValueError for options that do not go together."""
    for name in ("betas", "scale"):
        if len(getattr(config, name)) != 2:
            raise ValueError(f"{name}: got {tuple(getattr(config, name))}, expected two numbers")
    if config.batch_size % config.accumulate:
        raise ValueError(
            f"accumulate: got {config.accumulate}, expected a divisor of batch_size {config.batch_size}"
        )
    for name in ("backbone_weights", "similarity_gain"):
        if config.init_from and getattr(config, name) != getattr(TrainConfig, name):
            raise ValueError(f"{name}: not with init_from, which is a whole model")
    decay = config.lr * max(1.0, config.decoder_lr_scale) * config.weight_decay
    if decay >= 1:
        raise ValueError(
            f"weight_decay: got {config.weight_decay}, which with lr {config.lr} turns weights around"
        )
    if config.patience is not None and not config.evaluate_every:
        raise ValueError(f"patience: got {config.patience}, which needs evaluations: evaluate_every is 0")


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
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    config = dataclasses.replace(config, devices=started_processes() or config.devices)
    _check(config)
    fabric = make_fabric(config)

    def data(split: str, synthetic_length: int) -> Dataset:
        return open_dataset(
            config.data,
            split,
            **folder_options(config),
            channels=config.model.get("in_channels", 3),
            progress=config.progress,
            synthetic_length=synthetic_length,
            synthetic_size=max(32, config.image_size),
        )

    if training is None:
        training = data("training", config.synthetic_images)
    if validation is None:
        validation = data("validation", config.synthetic_validation)
    understood = check_data(training, validation)
    if isinstance(training, SegmentationFolder):  # what the files said, for the run's record
        config = dataclasses.replace(config, reduce_zero_label=training.reduce_zero_label)
    weights = config.class_weights
    if not isinstance(weights, str):
        weights_of_classes(weights, training.num_classes)
    if not len(training):
        raise ValueError("data: the training data hold no image")
    with ExitStack() as stack:
        if first_process():
            stack.enter_context(claimed(config.out))
            prepare(config, samples_of(training, validation), _say)
            if understood:
                print(*understood, sep="\n", flush=True)
            if weights == "inverse-sqrt":
                weights = _inverse_sqrt(config, training)
            _say_what_is_odd(config, len(training))
        interrupts = stack.enter_context(Interrupts())
        result = launch(fabric, _train, config, training, validation, weights, interrupts.flag)
    if result["stopped"] == "interrupted":
        name = signal.Signals(interrupts.flag.value).name
        raise Interrupted(
            f"{name} at step {result['step']}, saved in {config.out}; the same command with --resume goes on",
            interrupts.flag.value,
        )
    return result


def _train(
    fabric: Any,
    config: TrainConfig,
    training: Any,
    validation: Any,
    weights: list[float] | None,
    signalled: Any,
) -> dict[str, Any]:
    obey_parent(signalled)
    weights = fabric.broadcast(weights)  # torchrun: the first process alone has counted pixels
    with segvit_kernels.backend(config.backend) if config.backend else nullcontext():
        return _Trainer(fabric, config, training, validation, weights, signalled).fit()


def inverse_sqrt_weights(pixels: Tensor) -> list[float]:
    """Class weights from the number of pixels of each class (N,): 1 / sqrt(share), their mean 1.

    A class without a pixel has weight 1.
    """
    found = pixels > 0
    weights = torch.ones(len(pixels), dtype=torch.float64)
    weights[found] = pixels[found].double().rsqrt()
    weights[found] /= weights[found].mean()
    return weights.tolist()


def _inverse_sqrt(config: TrainConfig, training: Any) -> list[float]:
    """The weights of a run: from the pixels counted when it began."""
    path = Path(config.out) / "pixels.json"
    if config.resume and path.is_file():
        return inverse_sqrt_weights(torch.tensor(read_json(path, list)))
    pixels = torch.zeros(training.num_classes, dtype=torch.int64)
    with progress_bar(config.progress) as bar:
        for item in bar.track(range(len(training)), description="count pixels"):
            label = training[item]["label"]
            counted = label[label != training.ignore_index]
            pixels += counted.bincount(minlength=training.num_classes)
    if not pixels.any():
        raise ValueError("class_weights: no pixel of the training data has a class")
    atomic_write(path, lambda temporary: temporary.write_text(json.dumps(pixels.tolist()) + "\n"))
    return inverse_sqrt_weights(pixels)


def _say_what_is_odd(config: TrainConfig, images: int) -> None:
    if config.warmup_steps >= config.max_steps > 1:
        steps = f"warmup_steps {config.warmup_steps} are not below max_steps {config.max_steps}"
        _say(f"{steps}: the learning rate reaches its peak in the last step")
    step = config.batch_size * config.devices
    if step > images:
        _say(f"a step takes {step} images, the training data have {images}: some occur twice in it")


def _say(text: str) -> None:
    print(f"note: {text}", flush=True)


class _SignalledError(Exception):
    """An evaluation is given up: a signal came."""


class _Trainer:
    def __init__(
        self,
        fabric: Any,
        config: TrainConfig,
        training: Any,
        validation: Any,
        weights: list[float] | None,
        signalled: Any,
    ) -> None:
        self.fabric, self.config, self.validation, self.signalled = fabric, config, validation, signalled
        self.checkpoints = Checkpoints(config.out)

        torch.manual_seed(config.seed)
        say = _say if fabric.is_global_zero else lambda text: None
        self.model = build_model(config, training, say).to(fabric.device).train()
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
        if located and not config.resume and not config.init_from:
            self._locate(training, augment)
        groups = self.model.parameter_groups(
            config.lr, config.weight_decay, config.decoder_lr_scale, config.layer_decay
        )
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
            self.loss = CrossEntropy(training.ignore_index, weights)
        else:
            self.loss = SegViTLoss(training.num_classes, training.ignore_index, class_weights=weights)
        self.loss.to(fabric.device)

        self.step, self.elapsed = 0, 0.0
        self.saved: int | None = None  # step of the newest checkpoint
        # Of evaluations: the last one and its step, the best and its step, how many came after the best.
        self.score: dict[str, Any] = {"result": {}, "best": None, "best_step": None, "since_best": 0}
        self.window: dict[str, Tensor] = {}  # sums of the losses since the last line of the log
        self.window_steps = 0
        random.seed(sample_seed(config.seed, fabric.global_rank, 1))
        torch.manual_seed(sample_seed(config.seed, fabric.global_rank))  # dropout differs between processes
        saved = self._load() if config.resume else None

        compiled = torch.compile(self.model) if config.compile else self.model
        self.wrapped, self.fabric_optimizer = fabric.setup(compiled, self.optimizer)
        if saved and saved["scaler"] and config.precision == "fp16":
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
            self.checkpoints.clean(self.step, self.score["best_step"])
            self.log = Log(Path(config.out), self.step, config.tensorboard, not self._evaluation_missing())
        # The processes agree on when to stop without waiting for a GPU.
        self.host = torch.distributed.new_group(backend="gloo") if fabric.world_size > 1 else None
        self.states = saved and saved["random"]

    # The loop

    def fit(self) -> dict[str, Any]:
        config, fabric = self.config, self.fabric
        checkpoint_every = config.checkpoint_every or config.evaluate_every or 1000
        self.started = time.perf_counter() - self.elapsed
        self.evaluation_seconds = 0.0
        bar = _training_bar(config.progress and fabric.is_global_zero)
        with bar:
            self.bar, self.task = (
                bar,
                bar.add_task(
                    "train", total=config.max_steps, completed=self.step, loss="", miou=self._miou_text()
                ),
            )
            if self.states:  # last: nothing above may change what is drawn from here on
                self._set_process_state(self.states)
            try:
                stopped = self._steps(checkpoint_every)
            except _SignalledError:
                stopped = "interrupted"
            self._save()
        return {
            **self.score["result"],
            "step": self.step,
            "best_miou": self.score["best"],
            "seconds": time.perf_counter() - self.started,
            "stopped": stopped,
        }

    def _steps(self, checkpoint_every: int) -> str:
        """Steps, checkpoints and evaluations until training ends; returns why it does."""
        if self._evaluation_missing():
            self._evaluate()
        while (reason := self._why_stop()) is None:
            terms = self._optimize()
            self.step += 1
            for name, value in terms.items():
                self.window[name] = self.window[name] + value if name in self.window else value
            self.window_steps += 1
            checkpoint, evaluation = self.step % checkpoint_every == 0, self._evaluation_due()
            if self.step % self.config.log_every == 0 or checkpoint or evaluation:
                self.bar.update(self.task, loss=f"loss {self._write_log():.4f}")
            self.bar.advance(self.task)
            if checkpoint or evaluation:
                self._save()
            if evaluation:
                self._evaluate()
        if reason != "interrupted" and self.score["result"].get("step") != self.step:
            if self.window_steps:
                self._write_log()
            self._save()
            self._evaluate()
        return reason

    def _evaluation_due(self) -> bool:
        every = self.config.evaluate_every
        return self.step == self.config.max_steps or bool(every and self.step % every == 0)

    def _evaluation_missing(self) -> bool:
        """Whether the checkpoint that training goes on from was to be evaluated and a kill came first."""
        return self.step > 0 and self._evaluation_due() and self.score["result"].get("step") != self.step

    def _why_stop(self) -> str | None:
        """What ends training before the next step, the same in every process; None: nothing."""
        config = self.config
        if self.step >= config.max_steps:
            return "finished"
        if config.patience is not None and self.score["since_best"] >= config.patience:
            return "patience"
        late = False
        if config.max_minutes is not None and self.fabric.is_global_zero:
            late = time.perf_counter() - self.started + self.evaluation_seconds > 60 * config.max_minutes
        reason = 2 if self.signalled.value else int(late)
        if self.host is not None:
            reasons = torch.tensor(reason)
            torch.distributed.all_reduce(reasons, torch.distributed.ReduceOp.MAX, group=self.host)
            reason = int(reasons)
        return (None, "max_minutes", "interrupted")[reason]

    def _optimize(self) -> dict[str, Tensor]:
        """One step of the optimizer; the detached terms of the loss."""
        config, fabric = self.config, self.fabric
        factor = learning_rate_factor(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        batch = next(self.batches)
        images = batch["image"].to(fabric.device, non_blocking=True)
        labels = batch["label"].to(fabric.device, non_blocking=True)
        terms = backward(
            fabric, self.wrapped, self.model.preprocess, self.loss, images, labels, config.accumulate
        )
        if config.clip is not None:
            fabric.clip_gradients(
                self.wrapped, self.fabric_optimizer, max_norm=config.clip, error_if_nonfinite=False
            )
        self.fabric_optimizer.step()
        self.fabric_optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return terms

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
            last = "no checkpoint yet" if self.saved is None else "the last checkpoint is from before"
            steps = f"step {self.step}" if first == self.step else f"steps {first}...{self.step}"
            raise FloatingPointError(
                f"the loss is not finite in {steps} ({bad}); try a lower lr or precision 32 ({last})"
            )
        if self.log:
            self.log.add(
                self.step,
                loss=means.pop("total"),
                **means,
                lr=self.config.lr * learning_rate_factor(self.step - 1, self.config),
                seconds=time.perf_counter() - self.started,
            )
            loss = float(self.log.rows[-1]["loss"])
        else:
            loss = means["total"]
        self.window, self.window_steps = {}, 0
        return loss

    def _evaluate(self) -> None:
        """Evaluate the weights of this step, whose checkpoint is there, and keep the result with it.

        Raises:
            _SignalledError: a signal came first.
        """
        before = time.perf_counter()
        model = self.model if self.average is None else self.average.module
        share = len(range(self.fabric.global_rank, len(self.validation), self.fabric.world_size))
        task = self.bar.add_task("evaluate", total=share, loss="", miou="")
        result = evaluate(
            model,
            self.validation,
            fabric=self.fabric,
            batch_size=self.config.batch_size,
            workers=self.config.workers,
            on_images=lambda count: self._evaluated(task, count),
        )
        self.bar.remove_task(task)
        result = self._judge(result)
        self.evaluation_seconds = time.perf_counter() - before
        if self.log:
            values = {name: result[name] for name in ("miou", "accuracy") if result[name] is not None}
            self.log.add(self.step, **values, seconds=time.perf_counter() - self.started)
            self.checkpoints.evaluated(self.step, self.score)
            self.checkpoints.prune(self.config.keep_checkpoints)
            if self.config.progress:
                self.bar.console.print(f"step {self.step}: {self._miou_text()}")
        self.bar.update(self.task, miou=self._miou_text())

    def _evaluated(self, task: Any, count: int) -> None:
        self.bar.advance(task, count)
        # Several processes end an evaluation together, or not at all.
        if self.signalled.value and self.fabric.world_size == 1:
            raise _SignalledError

    def _judge(self, result: dict[str, Any]) -> dict[str, Any]:
        """Note an evaluation and whether it is the best; returned without NaN, where no pixel counted."""
        result = {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in result.items()
        }
        miou, best = result["miou"], self.score["best"]
        better = miou is not None and (best is None or miou > best)
        self.score = {
            "result": {"step": self.step, **result},
            "best": miou if better else best,
            "best_step": self.step if better else self.score["best_step"],
            "since_best": 0 if better else self.score["since_best"] + 1,
        }
        return result

    def _miou_text(self) -> str:
        return _miou(self.score["result"].get("miou"))

    # Checkpoints

    def _process_state(self) -> dict[str, Any]:
        """What differs between the processes."""
        cuda = self.fabric.device.type == "cuda"
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.fabric.device) if cuda else None,
            "python": random.getstate(),
            "window": {name: value.cpu() for name, value in self.window.items()},
            "window_steps": self.window_steps,
        }

    def _set_process_state(self, states: list[dict[str, Any]]) -> None:
        """Those of as many processes; others draw anew, and their log begins a line here."""
        rank, device = self.fabric.global_rank, self.fabric.device
        if len(states) != self.fabric.world_size:
            random.seed(sample_seed(self.config.seed, rank, 1, self.step))
            torch.manual_seed(sample_seed(self.config.seed, rank, self.step))
            return
        state = states[rank]
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        if state["cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], device)
        self.window = {name: value.to(device) for name, value in state.get("window", {}).items()}
        self.window_steps = state.get("window_steps", 0)

    def _save(self) -> None:
        """Write checkpoints/STEP, all processes taking part.

        Raises:
            FloatingPointError: a weight is not finite.
            OSError: it cannot be written; the last checkpoint stays.
        """
        states = [self._process_state()]
        if self.fabric.world_size > 1:
            states = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(states, self._process_state())
        if self.step == self.saved:
            return
        none = self.saved is None
        kept = "no checkpoint yet" if none else f"the last checkpoint is of step {self.saved}"
        if not all(bool(weight.isfinite().all()) for weight in self.model.parameters()):
            raise FloatingPointError(
                f"weights are not finite after step {self.step}; try a lower lr or precision 32 ({kept})"
            )
        if self.fabric.is_global_zero:
            try:
                self.checkpoints.save(self.step, lambda folder: self._write(folder, states))
            except OSError as error:
                raise OSError(f"{error}; {kept}, and with more space --resume goes on from there") from None
            self.checkpoints.prune(self.config.keep_checkpoints)
        self.saved = self.step

    def _write(self, folder: Path, states: list[dict[str, Any]]) -> None:
        """A checkpoint's files."""
        (self.model if self.average is None else self.average.module).save_pretrained(folder)
        state = {
            "step": self.step,
            "elapsed": time.perf_counter() - self.started,
            "score": self.score,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.fabric._precision.state_dict(),
            "random": states,
            "model": None if self.average is None else self.model.state_dict(),
            "averaged": None if self.average is None else self.average.n_averaged,
        }

        def write(path: Path) -> None:
            with path.open("wb") as file:  # of Python, whose errors say more than torch's own
                torch.save(state, file)

        atomic_write(folder / TRAINER_FILE, write)

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
        """Continue from the newest checkpoint, if there is one.

        Raises:
            ValueError: it is of another model, or from after the last step.
        """
        folder = self.checkpoints.newest()
        if folder is None:
            return None
        source = folder / TRAINER_FILE
        try:
            state = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{source}: cannot be read ({str(error).splitlines()[0]})") from None
        if state["step"] > self.config.max_steps:
            raise ValueError(
                f"max_steps: got {self.config.max_steps}, but the run is at step {state['step']}"
            )
        weights = read_state_dict(folder / WEIGHTS_FILE)
        load_state_dict(self.model, state["model"] or weights, str(folder / WEIGHTS_FILE))
        if self.average is not None:
            load_state_dict(self.average.module, weights, str(folder / WEIGHTS_FILE))
            self.average.n_averaged.copy_(state["averaged"])
        fused = self.optimizer.param_groups[0]["fused"]
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["fused"] = fused
        self.step = self.saved = state["step"]
        self.elapsed = state["elapsed"]
        evaluation = folder / EVALUATION_FILE
        if evaluation.is_file():
            self.score = read_json(evaluation, dict)
        elif "score" in state:
            self.score = state["score"]
        else:  # of version 0.1.0, which saved after the evaluation
            best = state["best"] if math.isfinite(state["best"]) else None
            self.score.update(result=state["result"], best=best)
        return state


def _training_bar(enabled: bool) -> Any:
    require("rich", extra="train")
    from rich.progress import TextColumn

    return progress_bar(enabled, TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[miou]}"))


def _miou(value: float | None) -> str:
    return "" if value is None else f"mIoU {100 * value:.2f}"


def run(config: TrainConfig) -> int:
    """`segvit train`."""
    try:
        result = train(config)
    except Interrupted as error:
        print(f"segvit train: {error}", file=sys.stderr)
        return 128 + error.signum
    score = _miou(result["miou"]) or "no labelled pixel to evaluate"
    best = f" (best {100 * result['best_miou']:.2f})" if result["best_miou"] is not None else ""
    minutes = result["seconds"] / 60
    when = f"at step {result['step']} after {minutes:.1f} minutes"
    print(f"{result['stopped']} {when}: {score}{best} in {config.out}")
    return 0
