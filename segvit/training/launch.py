"""The processes of a training or evaluation, by Lightning Fabric."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from segvit.system.extras import require
from segvit.system.failures import one_line, out_of_memory
from segvit.system.machine import check_processes, pick_backend, started_processes

__all__ = ["launch", "make_fabric"]


def make_fabric(config: Any) -> Any:
    """The Fabric of a command's machine options. More than one device: processes are spawned at launch.

    Raises:
        ValueError: options that do not go together or that this machine cannot serve.
    """
    require("lightning_fabric", extra="train")
    from lightning_fabric import Fabric
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    on_cpu = config.accelerator == "cpu" or not torch.cuda.is_available()
    if on_cpu and config.accelerator == "cuda":
        raise ValueError("accelerator: got cuda, but torch sees no GPU on this machine")
    device = torch.device("cpu" if on_cpu else "cuda")
    pick_backend(config.backend, device)
    if on_cpu and config.precision == "fp16":
        raise ValueError("precision: fp16 needs a GPU; use bf16 or 32 on the CPU")
    sharded = getattr(config, "strategy", "ddp") == "fsdp"
    if sharded and config.precision == "fp16":
        raise ValueError("precision: fp16 is not for strategy fsdp; use bf16 or 32")
    started = started_processes()
    if started and config.devices not in (1, started):
        raise ValueError(f"devices: got {config.devices}, but {started} processes were started")
    if not started:
        check_processes(config.devices, config.workers, device)
    precision: Any = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[config.precision]
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", os.environ.get("SLURM_NNODES", 1))) if started else 1
    strategy: Any = "ddp" if started else "ddp_spawn" if config.devices > 1 else "auto"
    if sharded and strategy != "auto":
        from segvit.training.strategy import Sharded

        strategy = Sharded(started or config.devices, config.precision == "bf16")
    try:
        return Fabric(
            accelerator=device.type,
            devices=started // nodes or config.devices,
            num_nodes=nodes,
            strategy=strategy,
            precision=precision,
        )
    except (MisconfigurationException, RuntimeError) as error:
        raise ValueError(f"devices: got {config.devices}: {error}") from None


# Under which an error in a spawned process comes back, the first that it is.
_KINDS = (
    FileNotFoundError, PermissionError, OSError, ValueError, TypeError, ImportError, FloatingPointError,
    MemoryError,
)  # fmt: skip


def _run(fabric: Any, file: Path | None, function: Callable[..., Any], *args: Any) -> Any:
    try:
        result = function(fabric, *args)
        if file is None:
            return result
        if fabric.is_global_zero:
            torch.save(result, file)
        return None
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, RuntimeError):
            if fabric.world_size > 1 and re.search(r"Connection (closed|reset) by peer", text):
                ended = "another of the processes has ended, which says why; --resume goes on"
                raise OSError(ended) from None
            if "DataLoader worker" in text:
                reason = "as when memory is short, of which fewer need less"
                raise OSError(f"workers: a data loading process ended early, {reason}") from None
        if file is None:
            raise
        # Of what a spawned process raises the last line comes back.
        if out_of_memory(error):
            raise MemoryError(text) from error
        if kind := next((kind for kind in _KINDS if isinstance(error, kind)), None):
            raise kind(one_line(error)) from error
        raise


def launch(fabric: Any, function: Callable[..., Any], *args: Any) -> Any:
    """`function(fabric, *args)` in every process; an error in a spawned one comes back as of its kind.

    Raises:
        ValueError, TypeError, OSError, ...: as `function` does; of a spawned process without traceback.
    """
    from lightning_fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher

    try:
        if not isinstance(fabric.strategy.launcher, _MultiProcessingLauncher):
            return fabric.launch(_run, None, function, *args)
        # By a file: the launcher waits for the processes first, and a pipe takes 64 kB.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result"
            fabric.launch(_run, file, function, *args)
            return torch.load(file, weights_only=True)
    except torch.multiprocessing.ProcessExitedException as error:
        raise OSError(f"devices: one of the processes was ended from outside ({error})") from None
    except torch.multiprocessing.ProcessRaisedException as error:
        name, _, text = str(error).strip().splitlines()[-1].partition(": ")
        for kind in _KINDS:
            if name == kind.__name__:
                raise kind(text) from None
        raise
