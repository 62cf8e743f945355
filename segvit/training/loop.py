"""The loop of a training: steps, checkpoints, evaluations, and when it ends."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segvit.inference.passes import check_options
from segvit.model.heads import make_loss
from segvit.options import InferenceOptions, TrainConfig
from segvit.training.accumulate import backward
from segvit.training.build import build_model, locate_queries, make_augmentation
from segvit.training.evaluation import evaluate
from segvit.training.loading import batches, collate
from segvit.training.log import Log, training_bar
from segvit.training.sampler import Augmented, StepSampler
from segvit.training.schedule import learning_rate_factor
from segvit.training.score import judged, miou_text
from segvit.training.state import RunState

__all__ = ["Trainer", "say"]


class Trainer:
    """One process's part in a training.

    Args:
        fabric: of the run, launched.
        config: the options.
        training, validation: the datasets.
        weights: of the classes in the loss, or None.
        signalled: its `value` becomes a signal's number when one has come (`segvit.system.interrupts`).
    """

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
        torch.manual_seed(config.seed)
        tell = say if fabric.is_global_zero else lambda text: None
        self.model = build_model(config, training, tell).to(fabric.device).train()
        self.views = InferenceOptions(window=config.evaluate_window)
        try:
            check_options(self.views, self.model.config.backbone.patch_size)
        except ValueError as error:
            raise ValueError(f"evaluate_{error}") from None
        augment = make_augmentation(config, training, self.model)
        locate_queries(config, self.model, training, augment)
        self.loss = make_loss(self.model.config, training.ignore_index, weights).to(fabric.device)
        self.state = RunState(fabric, config, self.model)
        self.state.seed_process()
        if config.resume:
            self.state.load()
        sampler = StepSampler(
            len(training),
            config.batch_size,
            config.max_steps,
            start=self.state.step,
            rank=fabric.global_rank,
            world=fabric.world_size,
            seed=config.seed,
        )
        pin = fabric.device.type == "cuda"
        self.batches = batches(Augmented(training, augment), sampler, config.workers, collate, pin)
        self.log = None
        if fabric.is_global_zero:
            self.state.checkpoints.clean(self.state.step, self.state.score["best_step"])
            self.state.checkpoints.prune(config.keep_checkpoints)  # a kill came before it
            evaluated = not self._evaluation_missing()
            self.log = Log(Path(config.out), self.state.step, config.tensorboard, evaluated)
        # The processes agree on when to stop without waiting for a GPU.
        self.host: Any = torch.distributed.new_group(backend="gloo") if fabric.world_size > 1 else None

    def fit(self) -> dict[str, Any]:
        """Train to the end; what `segvit.training.train.train` returns."""
        config, state = self.config, self.state
        state.start_clock()
        self.evaluation_seconds = 0.0
        with training_bar(config.progress and self.fabric.is_global_zero) as self.bar:
            self.task = self.bar.add_task(
                "train", total=config.max_steps, completed=state.step, loss="", miou=self._miou_text()
            )
            state.restore_process()  # last: nothing above may change what is drawn from here on
            try:
                stopped = self._steps()
            except _SignalledError:
                stopped = "interrupted"
            state.save()
        return {
            **state.score["result"],
            "step": state.step,
            "best_miou": state.score["best"],
            "seconds": state.seconds,
            "stopped": stopped,
        }

    def _steps(self) -> str:
        """Steps, checkpoints and evaluations until training ends; returns why it does."""
        config, state = self.config, self.state
        checkpoint_every = config.checkpoint_every or config.evaluate_every or 1000
        if self._evaluation_missing():
            self._evaluate()
        while (reason := self._why_stop()) is None:
            terms = self._optimize()
            state.step += 1
            state.window.add(terms)
            checkpoint, evaluation = state.step % checkpoint_every == 0, self._evaluation_due()
            if state.step % config.log_every == 0 or checkpoint or evaluation:
                self.bar.update(self.task, loss=f"loss {self._write_log():.4f}")
            self.bar.advance(self.task)
            if checkpoint or evaluation:
                state.save()
            if evaluation:
                self._evaluate()
        if reason != "interrupted" and state.score["result"].get("step") != state.step:
            if state.window.steps:
                self._write_log()
            state.save()
            self._evaluate()
        return reason

    def _optimize(self) -> dict[str, Tensor]:
        """One step of the optimizer; the detached terms of the loss."""
        config, fabric = self.config, self.fabric
        state, optimizer = self.state, self.state.fabric_optimizer
        factor = learning_rate_factor(state.step, config)
        for group in state.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.model.anneal(state.step / config.max_steps)
        batch = next(self.batches)
        images = batch["image"].to(fabric.device, non_blocking=True)
        labels = batch["label"].to(fabric.device, non_blocking=True)
        terms = backward(
            fabric, state.wrapped, self.model.preprocess, self.loss, images, labels, config.accumulate
        )
        if config.clip is not None:
            fabric.clip_gradients(state.wrapped, optimizer, max_norm=config.clip, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()
        if state.average is not None:
            state.average.update_parameters(self.model)
        return terms

    def _why_stop(self) -> str | None:
        """What ends training before the next step, the same in every process; None: nothing."""
        config = self.config
        if self.state.step >= config.max_steps:
            return "finished"
        if config.patience is not None and self.state.score["since_best"] >= config.patience:
            return "patience"
        late = False
        if config.max_minutes is not None and self.fabric.is_global_zero:
            late = self.state.seconds + self.evaluation_seconds > 60 * config.max_minutes
        reason = 2 if self.signalled.value else int(late)
        if self.host is not None:
            reasons = torch.tensor(reason)
            torch.distributed.all_reduce(reasons, torch.distributed.ReduceOp.MAX, group=self.host)
            reason = int(reasons)
        return (None, "max_minutes", "interrupted")[reason]

    def _evaluation_due(self) -> bool:
        every, step = self.config.evaluate_every, self.state.step
        return step == self.config.max_steps or bool(every and step % every == 0)

    def _evaluation_missing(self) -> bool:
        """Whether the checkpoint that training goes on from was to be evaluated and a kill came first."""
        step = self.state.step
        return step > 0 and self._evaluation_due() and self.state.score["result"].get("step") != step

    def _write_log(self) -> float:
        """A line with the mean of each term since the last line; returns the mean loss.

        Raises:
            FloatingPointError: it is not finite.
        """
        state = self.state
        means, first = state.window.means(self.fabric), state.step - state.window.steps + 1
        if not math.isfinite(means["total"]):
            bad = ", ".join(f"{name} {value}" for name, value in means.items() if not math.isfinite(value))
            last = "no checkpoint yet" if state.saved is None else "the last checkpoint is from before"
            steps = f"step {state.step}" if first == state.step else f"steps {first}...{state.step}"
            raise FloatingPointError(
                f"the loss is not finite in {steps} ({bad}); try a lower lr or precision 32 ({last})"
            )
        loss = means.pop("total")
        if self.log:
            rate = self.config.lr * learning_rate_factor(state.step - 1, self.config)
            self.log.add(state.step, loss=loss, **means, lr=rate, seconds=state.seconds)
            loss = float(self.log.rows[-1]["loss"])
        state.window.clear()
        return loss

    def _evaluate(self) -> None:
        """Evaluate the weights of this step, whose checkpoint is there, and keep the result with it.

        Raises:
            _SignalledError: a signal came first.
        """
        before, config, state = time.perf_counter(), self.config, self.state
        share = len(range(self.fabric.global_rank, len(self.validation), self.fabric.world_size))
        task = self.bar.add_task("evaluate", total=share, loss="", miou="")
        result = evaluate(
            state.evaluated(),
            self.validation,
            fabric=self.fabric,
            batch_size=config.batch_size,
            workers=config.workers,
            options=self.views,
            on_images=lambda count: self._evaluated(task, count),
        )
        self.bar.remove_task(task)
        state.score = judged(state.score, state.step, result)
        self.evaluation_seconds = time.perf_counter() - before
        if self.log:
            found = state.score["result"]
            values = {name: found[name] for name in ("miou", "accuracy") if found[name] is not None}
            self.log.add(state.step, **values, seconds=state.seconds)
            state.checkpoints.evaluated(state.step, state.score)
            state.checkpoints.prune(config.keep_checkpoints)
            if config.progress:
                self.bar.console.print(f"step {state.step}: {self._miou_text()}")
        self.bar.update(self.task, miou=self._miou_text())

    def _evaluated(self, task: Any, count: int) -> None:
        self.bar.advance(task, count)
        # Several processes end an evaluation together, or not at all.
        if self.signalled.value and self.fabric.world_size == 1:
            raise _SignalledError

    def _miou_text(self) -> str:
        return miou_text(self.state.score["result"].get("miou"))


class _SignalledError(Exception):
    """An evaluation is given up: a signal came."""


def say(text: str) -> None:
    """Tell the user what training makes of the options."""
    print(f"note: {text}", flush=True)
