"""A training as it stands, and its checkpoints, from which it goes on exactly."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from segvit.data.transforms import sample_seed
from segvit.model.checkpoint import WEIGHTS_FILE, load_state_dict, read_state_dict
from segvit.model.segvit import SegViT
from segvit.options import TrainConfig
from segvit.system.files import atomic_write
from segvit.system.text import read_json
from segvit.training.build import make_optimizer
from segvit.training.log import Window
from segvit.training.run_folder import EVALUATION_FILE, SHARDS_FOLDER, TRAINER_FILE, Checkpoints
from segvit.training.score import no_score
from segvit.training.sharding import gathered, load_tensors, local, save_tensors, spread, tensors_of

__all__ = ["RunState"]


class RunState:
    """Everything that decides how a training goes on.

    Attributes:
        model, optimizer: as they are trained.
        wrapped, fabric_optimizer: the same, as Fabric calls them.
        sharded: whether the weights are spread over the processes.
        average: moving average of the weights, or None.
        step: optimizer steps done.
        saved: the newest checkpoint's step, or None.
        score: see `segvit.training.score`.
        window: losses since the last line of the log.
    """

    def __init__(self, fabric: Any, config: TrainConfig, model: SegViT) -> None:
        self.fabric, self.config, self.model = fabric, config, model
        self.checkpoints = Checkpoints(config.out)
        self.sharded = hasattr(fabric.strategy, "shard")  # of one process there is nothing to share
        self.average = None
        if config.ema is not None:
            self.average = AveragedModel(model, multi_avg_fn=self._move_average)
        self._kind = type(model)
        self.wrapped = fabric.setup_module(torch.compile(model) if config.compile else model)
        if self.sharded and self.average is not None:
            fabric.strategy.shard(self.average.module)
        self.optimizer = make_optimizer(config, model)
        self.fabric_optimizer = fabric.setup_optimizers(self.optimizer)
        self.step = 0
        self.saved: int | None = None
        self.score = no_score()
        self.window = Window()
        self._elapsed = 0.0
        self._processes: list[dict[str, Any]] = []  # their random states, of the checkpoint

    def evaluated(self) -> SegViT:
        """The model that is evaluated and saved, whole: all processes take part where it is sharded."""
        model = self.model if self.average is None else cast(SegViT, self.average.module)
        if not self.sharded:
            return model
        whole = self._kind.from_state_dict(model.config, gathered(model.state_dict()), "the run")
        return whole.to(self.fabric.device)

    def _move_average(self, averages: Any, weights: Any, count: Any) -> None:
        """Move the average on to the weights. Its decay is at most (1 + n) / (10 + n) after n steps, so that
        an early one is not that of the first weights."""
        assert self.average is not None and self.config.ema is not None
        n = int(self.average.n_averaged)  # on the host, where `count` may be on a GPU
        get_ema_multi_avg_fn(min(self.config.ema, (1 + n) / (10 + n)))(averages, weights, count)

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
        if not self._finite():
            raise FloatingPointError(
                f"weights are not finite after step {self.step}; try a lower lr or precision 32 ({kept})"
            )
        evaluated = self.evaluated()
        tensors = tensors_of(self.model, self.average, self.optimizer) if self.sharded else {}

        def write(folder: Path) -> None:
            if self.sharded:
                self._save_tensors(folder, tensors)
            self._write(folder, evaluated, states)

        if self.fabric.is_global_zero:
            try:
                self.checkpoints.save(self.step, write)
            except OSError as error:
                raise OSError(f"{error}; {kept}, and with more space --resume goes on from there") from None
            self.checkpoints.prune(self.config.keep_checkpoints)
        elif self.sharded:
            self._save_tensors(self.checkpoints.growing(self.step), tensors)
        self.saved = self.step

    def _finite(self) -> bool:
        """Whether all weights are, the same in every process."""
        finite = torch.stack([local(weight).isfinite().all() for weight in self.model.parameters()]).all()
        return bool(self.fabric.all_reduce(finite.float(), reduce_op="sum") == self.fabric.world_size)

    def _save_tensors(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self.fabric.barrier()  # the first process has made the folder
        save_tensors(folder / SHARDS_FOLDER, tensors)

    def _write(self, folder: Path, evaluated: SegViT, states: list[dict[str, Any]]) -> None:
        """A checkpoint's files, but for shards."""
        evaluated.save_pretrained(folder)
        optimizer = self.optimizer.state_dict()
        whole = self.average is not None and not self.sharded
        state = {
            "step": self.step,
            "elapsed": self.seconds,
            "score": self.score,
            "optimizer": {**optimizer, "state": {}} if self.sharded else optimizer,
            "scaler": self.fabric._precision.state_dict(),
            "random": states,
            "model": self.model.state_dict() if whole else None,
            "averaged": None if self.average is None else self.average.n_averaged,
        }

        def write(path: Path) -> None:
            with path.open("wb") as file:  # of Python, whose errors say more than torch's own
                torch.save(state, file)

        atomic_write(folder / TRAINER_FILE, write)

    def load(self) -> None:
        """Take what the newest checkpoint holds, if there is one.

        Raises:
            ValueError: it is of another model, or from after the last step.
        """
        folder = self.checkpoints.newest()
        if folder is None:
            return
        source = folder / TRAINER_FILE
        try:
            state = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{source}: cannot be read ({str(error).splitlines()[0]})") from None
        if state["step"] > self.config.max_steps:
            raise ValueError(
                f"max_steps: got {self.config.max_steps}, but the run is at step {state['step']}"
            )
        if self.average is not None and state["averaged"] is not None:
            self.average.n_averaged.copy_(state["averaged"])
        shards = folder / SHARDS_FOLDER
        if shards.is_dir():
            load_tensors(shards, self.model, self.average, self.optimizer)
            state["optimizer"]["state"] = self.optimizer.state_dict()["state"]
        else:
            self._load_whole(folder, state)
        fused = self.optimizer.param_groups[0]["fused"]
        for group in state["optimizer"]["param_groups"]:  # of these torch asks where counts of steps belong
            group["fused"] = fused
        self.optimizer.load_state_dict(state["optimizer"])
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
        if state["scaler"] and self.config.precision == "fp16":
            self.fabric._precision.load_state_dict(state["scaler"])

    def _load_whole(self, folder: Path, state: dict[str, Any]) -> None:
        """Weights and moments of a checkpoint without shards; into `state` go the latter."""
        source = folder / WEIGHTS_FILE
        weights = read_state_dict(source)
        _load_weights(self.model, state["model"] or weights, source)
        if self.average is not None:
            _load_weights(cast(SegViT, self.average.module), weights, source)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, moments in state["optimizer"]["state"].items():
            for name, value in moments.items():
                moments[name] = spread(value, parameters[index])


def _load_weights(model: SegViT, weights: dict[str, Tensor], source: Path) -> None:
    own = model.state_dict()
    taken = {name: spread(value, own.get(name, value)) for name, value in weights.items()}
    load_state_dict(model, taken, str(source))
