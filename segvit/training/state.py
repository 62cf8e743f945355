"""A training as it stands, and its checkpoints, from which it goes on exactly."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from segvit.data.transforms import sample_seed
from segvit.model.checkpoint import WEIGHTS_FILE, load_state_dict, read_state_dict
from segvit.model.segvit import SegViT
from segvit.options import TrainConfig
from segvit.system.files import atomic_write
from segvit.system.text import read_json
from segvit.training.log import Window
from segvit.training.run_folder import EVALUATION_FILE, TRAINER_FILE, Checkpoints
from segvit.training.score import no_score

__all__ = ["RunState"]


class RunState:
    """Everything that decides how a training goes on.

    Attributes:
        model, optimizer: as they are trained.
        average: moving average of the weights, or None.
        step: optimizer steps done.
        saved: the newest checkpoint's step, or None.
        score: see `segvit.training.score`.
        window: losses since the last line of the log.
    """

    def __init__(self, fabric: Any, config: TrainConfig, model: SegViT, optimizer: Optimizer) -> None:
        self.fabric, self.config, self.model, self.optimizer = fabric, config, model, optimizer
        self.checkpoints = Checkpoints(config.out)
        self.average = None
        if config.ema is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.step = 0
        self.saved: int | None = None
        self.score = no_score()
        self.window = Window()
        self._elapsed = 0.0
        self._processes: list[dict[str, Any]] = []  # their random states, of the checkpoint

    @property
    def evaluated(self) -> SegViT:
        """The model that is evaluated and saved."""
        return self.model if self.average is None else cast(SegViT, self.average.module)

    def start_clock(self) -> None:
        """From here on `seconds` counts."""
        self._started = time.perf_counter() - self._elapsed

    @property
    def seconds(self) -> float:
        """Of training, over all sittings."""
        return time.perf_counter() - self._started

    # What differs between the processes

    def seed_process(self, *numbers: int) -> None:
        """Let this process draw dropout of its own."""
        rank = self.fabric.global_rank
        random.seed(sample_seed(self.config.seed, rank, 1, *numbers))
        torch.manual_seed(sample_seed(self.config.seed, rank, *numbers))

    def _process(self) -> dict[str, Any]:
        cuda = self.fabric.device.type == "cuda"
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.fabric.device) if cuda else None,
            "python": random.getstate(),
            **self.window.state(),
        }

    def restore_process(self) -> None:
        """The random state of the checkpoint, if there was one: the last thing before the next step.

        If it was of as many processes; others draw anew, and their log begins a line here.
        """
        device = self.fabric.device
        if not self._processes:
            return
        if len(self._processes) != self.fabric.world_size:
            self.seed_process(self.step)
            return
        state = self._processes[self.fabric.global_rank]
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        if state["cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], device)
        self.window.load(state, device)

    # Checkpoints

    def save(self) -> None:
        """Write checkpoints/STEP, all processes taking part.

        Raises:
            FloatingPointError: a weight is not finite.
            OSError: it cannot be written; the last checkpoint stays.
        """
        states: list[Any] = [self._process()]
        if self.fabric.world_size > 1:
            states = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(states, self._process())
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
        self.evaluated.save_pretrained(folder)
        state = {
            "step": self.step,
            "elapsed": self.seconds,
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

    def load(self) -> dict[str, Any] | None:
        """Take what the newest checkpoint holds, if there is one; returns the state of the gradient scaler.

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
        self._elapsed = state["elapsed"]
        self._processes = state["random"]
        evaluation = folder / EVALUATION_FILE
        if evaluation.is_file():
            self.score = read_json(evaluation, dict)
        elif "score" in state:
            self.score = state["score"]
        else:  # of version 0.1.0, which saved after the evaluation
            best = state["best"] if math.isfinite(state["best"]) else None
            self.score.update(result=state["result"], best=best)
        return state["scaler"]
