"""Training on Lightning Fabric: the published recipe, exact resume, one log.

Source of the recipe: SegViT (NeurIPS 2022, arXiv 2210.05844), section 4.1.

A run is a folder (`segvit.training.run_folder`). Checkpoints appear whole or not at all, so it may be killed
at any moment and continued with `resume`: weights, optimizer, schedule, place in the data, random states and
moving average are those of the last checkpoint. SIGINT and SIGTERM save one at the end of the step.

Sample number i of the whole run is drawn from the permutation of (seed, epoch), augmented from (seed, epoch,
image): it depends neither on the number of processes nor on loading workers. In step s, R processes with
batches of b images take the samples from s·R·b on, process r the r-th piece of b.
"""

from __future__ import annotations

import dataclasses
import signal
from contextlib import ExitStack, nullcontext
from typing import Any

import segvit_kernels
from segvit.data import SegmentationFolder, check_data, folder_options, open_dataset
from segvit.data.names import mirrored_classes
from segvit.data.shards import Shards
from segvit.model.losses import weights_of_classes
from segvit.options import TrainConfig
from segvit.system.interrupts import Interrupted, Interrupts, obey_parent
from segvit.system.machine import first_process, started_processes
from segvit.training.build import settled
from segvit.training.class_weights import count_and_weight
from segvit.training.launch import launch, make_fabric
from segvit.training.loop import Trainer, say
from segvit.training.run_folder import claimed, prepare, samples_of

__all__ = ["train"]


def train(config: TrainConfig, training: Any = None, validation: Any = None) -> dict[str, Any]:
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
    config = settled(config)
    fabric = make_fabric(config)

    def data(split: str, synthetic_length: int) -> Any:
        return open_dataset(
            config.data,
            split,
            **folder_options(config),
            channels=config.model.get("in_channels", 3),
            progress=config.progress,
            synthetic_length=synthetic_length,
            synthetic_size=max(32, config.image_size or 0),
        )

    if training is None:
        training = data("training", config.synthetic_images)
    if validation is None:
        validation = data("validation", config.synthetic_validation)
    names = [list(dataset.class_names or ()) for dataset in (training, validation)]
    if training.num_classes != validation.num_classes or (all(names) and names[0] != names[1]):
        raise ValueError("validation: got other classes, or in another order, than those of training")
    understood = check_data(training, validation)
    if isinstance(training, (SegmentationFolder, Shards)) and not training.known:  # for the run's record
        config = dataclasses.replace(config, reduce_zero_label=training.reduce_zero_label)
    weights = config.class_weights
    if not isinstance(weights, str):
        weights_of_classes(weights, training.num_classes)
    if not len(training):
        raise ValueError("data: the training data hold no image")
    with ExitStack() as stack:
        if first_process():
            stack.enter_context(claimed(config.out))
            prepare(config, samples_of(training, validation), say)
            if understood:
                print(*understood, sep="\n", flush=True)
            if weights == "inverse-sqrt":
                weights = count_and_weight(config, training)
            _say_what_is_odd(config, training)
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
        return Trainer(fabric, config, training, validation, weights, signalled).fit()


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


def _say_what_is_odd(config: TrainConfig, training: Any) -> None:
    images, names = len(training), training.class_names
    if config.warmup_steps >= config.max_steps > 1:
        steps = f"warmup_steps {config.warmup_steps} are not below max_steps {config.max_steps}"
        say(f"{steps}: the learning rate reaches its peak in the last step")
    step = config.batch_size * config.devices
    if step > images:
        say(f"a step takes {step} images, the training data have {images}: some occur twice in it")
    if config.flip and (pairs := mirrored_classes(names)):
        shown = ", ".join(f"{names[left]} and {names[right]}" for left, right in pairs[:3])
        more = f" and {len(pairs) - 3} pairs more" if len(pairs) > 3 else ""
        say(f"flip: a mirrored picture's classes {shown}{more} are exchanged")
