"""What a training writes down: metrics.csv, TensorBoard, the progress bar, the means between two lines."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segvit.system.extras import require
from segvit.system.files import atomic_write
from segvit.system.progress import progress_bar

__all__ = ["Log", "Window", "training_bar"]


class Log:
    """metrics.csv, and TensorBoard where asked for.

    Continuing at a step drops what was written after it, and the evaluation at it where that is done again.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool, evaluated: bool = True) -> None:
        self.path = folder / "metrics.csv"
        self.rows: list[dict[str, str]] = []
        if step and self.path.is_file():
            text = self.path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1].splitlines(keepends=True)  # a full disk cuts the last line
            rows = [row for row in csv.DictReader(whole) if (row["step"] or "").isdecimal()]
            self.rows = [
                row
                for row in rows
                if int(row["step"]) < step or (int(row["step"]) == step and (evaluated or row.get("loss")))
            ]
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
            with path.open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, self.columns)
                table.writeheader()
                table.writerows(self.rows)

        atomic_write(self.path, write)

    def add(self, step: int, **values: float) -> None:
        """A line of finite numbers; raises OSError, the line not begun, where there is no space for it."""
        row = {"step": str(step), **{name: f"{value:.9g}" for name, value in values.items()}}
        self.rows.append(row)
        if not set(row) <= set(self.columns):
            self.columns += [name for name in row if name not in self.columns]
            self._rewrite()
        else:
            self._append(row)
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def _append(self, row: dict[str, str]) -> None:
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        except OSError as error:
            os.truncate(self.path, size)
            raise OSError(f"{self.path}: cannot be written ({error.strerror})") from None


class Window:
    """Sums of the loss's terms over the steps since the last line of the log."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        """Take the terms of a step, which stay on their device."""
        for name, value in terms.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1

    def means(self, fabric: Any) -> dict[str, float]:
        """The mean of each term, over all processes; all of them take part."""
        sums = torch.stack([value.double() for value in self.sums.values()]) / self.steps
        return dict(zip(self.sums, fabric.all_reduce(sums, reduce_op="mean").tolist(), strict=True))

    def clear(self) -> None:
        """Begin anew."""
        self.sums, self.steps = {}, 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        sums = {name: value.cpu() for name, value in self.sums.items()}
        return {"window": sums, "window_steps": self.steps}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a checkpoint's `state`; one without it was written at a line."""
        self.sums = {name: value.to(device) for name, value in state.get("window", {}).items()}
        self.steps = state.get("window_steps", 0)


def training_bar(enabled: bool) -> Any:
    """The progress bar of a training, whose tasks have the fields "loss" and "miou"."""
    require("rich", extra="train")
    from rich.progress import TextColumn

    return progress_bar(enabled, TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[miou]}"))
