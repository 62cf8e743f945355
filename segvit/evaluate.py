"""Evaluation: label maps at every image's own size, one confusion matrix, each image counted once."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from segvit.data import folder_options, open_dataset
from segvit.inference.passes import check_options
from segvit.metrics import ConfusionMatrix
from segvit.model.checkpoint import find_checkpoint
from segvit.model.heads import load_model
from segvit.options import EvaluateConfig, InferenceOptions
from segvit.system.extras import require
from segvit.system.files import atomic_write, check_result_file
from segvit.system.interrupts import ignore_signals
from segvit.system.machine import check_processes, pick_backend, started_processes
from segvit.system.progress import progress_bar

__all__ = ["evaluate", "iou_table", "make_fabric", "run"]


class _Guarded(Dataset):
    """Hands an item's exception over as a value: a loading worker would wrap it in its traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except (ValueError, OSError) as error:
            return error


def collate(items: list[Any]) -> Any:
    """Items of one size -> {"image": (B, 3, H, W), "label": (B, H, W), "name": list}; or their exception."""
    for item in items:
        if isinstance(item, Exception):
            return item
    return {
        "image": torch.stack([item["image"] for item in items]),
        "label": torch.stack([item["label"] for item in items]),
        "name": [item["name"] for item in items],
    }


def _collate_by_size(items: list[Any]) -> list[Any]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        key = "error" if isinstance(item, Exception) else tuple(item["image"].shape)
        groups.setdefault(key, []).append(item)
    return [collate(group) for group in groups.values()]


def batches(dataset: Dataset, sampler: Any, workers: int, collate_fn: Callable, pin: bool) -> Iterator[Any]:
    """Batches of `dataset` in the order of the batch sampler; raises what reading an item raised."""
    loader = DataLoader(
        _Guarded(dataset),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate_fn,
        pin_memory=pin,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # its own: the loader must not draw from the training's random state
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def evaluate(
    model: torch.nn.Module,
    dataset: Dataset,
    *,
    fabric: Any = None,
    batch_size: int = 1,
    workers: int = 0,
    options: InferenceOptions | None = None,
    on_images: Callable[[int], None] | None = None,
    details: bool = False,
) -> dict[str, Any]:
    """mIoU of a model over a dataset.

    Process r of R reads images r, r + R, ...: every image counts once, whatever R is. The model is put into
    evaluation mode and back.

    Args:
        model: has `predict(uint8 (B, 3, H, W), options) -> label maps (B, H, W)`.
        dataset: items {"image", "label", "name"} (see `segvit.data.SegmentationFolder`), with `num_classes`,
            `ignore_index` and `class_names`.
        fabric: the `lightning_fabric.Fabric` of the run, for its processes and precision; None: this process.
        batch_size: images of equal size that are predicted together.
        workers: data loading processes.
        options: sliding window, scales, mirroring; by default the whole image at once.
        on_images: called with the number of images after each batch.
        details: more than the IoU.

    Returns:
        {"miou", "accuracy", "images", "iou": {class: IoU or None if absent}}; with `details` also "dice",
        "precision", "recall" by class (None where there is nothing to divide by), their means over the
        classes that have one ("mean_dice", ...), "frequency_weighted_iou", "pixels" labelled and "predicted"
        by class, "ignored" pixels and the matrix of pixel counts "confusion", a row for each true class.
    """
    rank, world = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)
    device = next(model.parameters()).device
    confusion = ConfusionMatrix(dataset.num_classes, dataset.ignore_index, device)
    seen, ignored = torch.zeros(2, 1, dtype=torch.int64, device=device)
    own = list(range(rank, len(dataset), world))
    sampler = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), fabric.autocast() if fabric else nullcontext():
            for groups in batches(dataset, sampler, workers, _collate_by_size, pin=False):
                for batch in groups:
                    if isinstance(batch, Exception):
                        raise batch
                    prediction = torch.as_tensor(model.predict(batch["image"].to(device), options))
                    confusion.update(prediction.to(device), batch["label"].to(device))
                    seen += len(prediction)
                    ignored += (batch["label"] == dataset.ignore_index).sum().to(device)
                    if on_images:
                        on_images(len(prediction))
    finally:
        model.train(was_training)
    confusion.reduce()
    if world > 1:
        torch.distributed.all_reduce(seen)
        torch.distributed.all_reduce(ignored)
    names = dataset.class_names or [f"class {i}" for i in range(dataset.num_classes)]

    def by_class(values: torch.Tensor) -> dict[str, Any]:
        return {name: _known(value) for name, value in zip(names, values.tolist(), strict=True)}

    result = {
        "miou": confusion.miou,
        "accuracy": confusion.accuracy,
        "images": int(seen),
        "iou": by_class(confusion.iou()),
    }
    if details:
        for name in ("dice", "precision", "recall"):
            values = getattr(confusion, name)()
            result |= {f"mean_{name}": float(values.nanmean()), name: by_class(values)}
        result |= {
            "frequency_weighted_iou": confusion.frequency_weighted_iou,
            "pixels": by_class(confusion.support),
            "predicted": by_class(confusion.predicted),
            "ignored": int(ignored),
            "confusion": confusion.matrix.tolist(),
        }
    return result


def _known(value: Any) -> Any:
    """None in place of NaN, which JSON does not have."""
    return None if isinstance(value, float) and math.isnan(value) else value


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
    started = started_processes()
    if started and config.devices not in (1, started):
        raise ValueError(f"devices: got {config.devices}, but {started} processes were started")
    if not started:
        check_processes(config.devices, config.workers, device)
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", os.environ.get("SLURM_NNODES", 1))) if started else 1
    try:
        return Fabric(
            accelerator=device.type,
            devices=started // nodes or config.devices,
            num_nodes=nodes,
            strategy="ddp" if started else "ddp_spawn" if config.devices > 1 else "auto",
            precision={"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[config.precision],
        )
    except (MisconfigurationException, RuntimeError) as error:
        raise ValueError(f"devices: got {config.devices}: {error}") from None


def _run(fabric: Any, file: Path | None, function: Callable[..., Any], *args: Any) -> Any:
    try:
        result = function(fabric, *args)
        if file is None:
            return result
        if fabric.is_global_zero:
            file.write_bytes(pickle.dumps(result))
        return None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = "as when memory is short, of which fewer need less"
        raise OSError(f"workers: a data loading process ended early, {reason}") from None


def launch(fabric: Any, function: Callable[..., Any], *args: Any) -> Any:
    """`function(fabric, *args)` in every process; an error in a spawned one comes back under its own type.

    Raises:
        ValueError, TypeError, OSError, ...: as `function` does.
    """
    from lightning_fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher

    try:
        if not isinstance(fabric.strategy.launcher, _MultiProcessingLauncher):
            return fabric.launch(_run, None, function, *args)
        # By a file: the launcher waits for the processes first, and a pipe takes 64 kB.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result"
            fabric.launch(_run, file, function, *args)
            return pickle.loads(file.read_bytes())
    except torch.multiprocessing.ProcessExitedException as error:
        raise OSError(f"devices: one of the processes was ended from outside ({error})") from None
    except torch.multiprocessing.ProcessRaisedException as error:
        kind, _, text = str(error).strip().splitlines()[-1].partition(": ")
        known = (ValueError, TypeError, FileNotFoundError, PermissionError, OSError, FloatingPointError)
        for exception in known:
            if kind == exception.__name__:
                raise exception(text) from None
        raise


_MEASURES = {"iou": "IoU", "dice": "Dice", "precision": "precision", "recall": "recall"}


def iou_table(result: dict[str, Any]) -> str:
    """The classes with their IoU, and what else `evaluate` was asked for, in per cent, the worst last."""
    measures = {name: title for name, title in _MEASURES.items() if name in result}
    rows = sorted(result["iou"], key=lambda name: -1 if result["iou"][name] is None else result["iou"][name])
    width = max(len("frequency-weighted IoU"), *map(len, rows)) if len(measures) > 1 else 0
    width = width or max(len("mean IoU"), *map(len, rows))
    lines = []
    if len(measures) > 1:
        lines.append(f"{'':<{width}}" + "".join(f"  {title:>9}" for title in measures.values()))
    size = 9 if len(measures) > 1 else 6
    for name in reversed(rows):
        cells = [
            "absent" if result["iou"][name] is None else _percent(result[measure][name])
            for measure in measures
        ]
        lines.append(f"{name:<{width}}" + "".join(f"  {cell:>{size}}" for cell in cells))
    footer = [("mean IoU", _percent(result["miou"]))]
    if len(measures) > 1:
        footer += [(f"mean {_MEASURES[m]}", _percent(result[f"mean_{m}"])) for m in list(measures)[1:]]
        footer.append(("frequency-weighted IoU", _percent(result["frequency_weighted_iou"])))
    footer += [("accuracy", _percent(result["accuracy"])), ("images", f"{result['images']:6d}")]
    lines.append("-" * (width + (2 + size) * len(measures)))
    return "\n".join([*lines, *(f"{name:<{width}}  {value}" for name, value in footer)])


def _percent(value: float | None) -> str:
    return "   n/a" if _known(value) is None else f"{100 * value:6.2f}"


def notes(result: dict[str, Any]) -> list[str]:
    """What must be known to read the numbers of `evaluate` with details."""
    lines = []
    absent = [name for name, count in result["pixels"].items() if not count]
    wrong = [name for name in absent if result["predicted"][name]]
    if not any(result["pixels"].values()):
        lines.append("no pixel counts: all are ignored, and nothing is measured")
    elif absent:
        text = f"not in the labels: {', '.join(absent)}"
        if wrong:
            text += f"; predicted all the same, with IoU 0 in the mean: {', '.join(wrong)}"
        lines.append(text)
    return lines


def _evaluate_checkpoint(fabric: Any, config: EvaluateConfig, dataset: Dataset) -> Any:
    import segvit_kernels

    model = load_model(config.checkpoint).to(fabric.device)
    share = len(range(fabric.global_rank, len(dataset), fabric.world_size))
    with (
        segvit_kernels.backend(config.backend) if config.backend else nullcontext(),
        progress_bar(config.progress and fabric.is_global_zero) as bar,
    ):
        task = bar.add_task("evaluate", total=share)
        return evaluate(
            model,
            dataset,
            fabric=fabric,
            workers=config.workers,
            options=config,
            on_images=lambda count: bar.advance(task, count),
            details=True,
        )


def check_classes(model_config: Any, dataset: Any) -> None:
    """Raises ValueError when a model's classes are not those of a dataset."""
    if model_config.num_classes != dataset.num_classes:
        raise ValueError(
            f"the checkpoint has {model_config.num_classes} classes, the data {dataset.num_classes}"
        )
    ours, theirs = model_config.class_names, dataset.class_names
    if ours and theirs and tuple(ours) != tuple(theirs):
        pairs: Sequence[tuple[str, str]] = list(zip(ours, theirs, strict=True))
        index, (mine, other) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(f"class {index} is {mine!r} in the checkpoint but {other!r} in the data")


def check_data(*datasets: Any) -> list[str]:
    """Look at the label maps of folders; lines that say what they hold and mean.

    Raises:
        ValueError: they contradict the options, or cannot be used.
    """
    lines = [line for dataset in datasets if hasattr(dataset, "check") for line in dataset.check()]
    return list(dict.fromkeys(lines))


def run(config: EvaluateConfig) -> int:
    """`segvit evaluate`: print the measures of every class and their means, and write what is asked for."""
    files = _result_files(config)
    fabric = make_fabric(config)
    model_config = load_model(config.checkpoint).config  # here too, for errors before any process starts
    dataset = open_dataset(
        config.data,
        config.split,
        **{**folder_options(config), "value_range": config.value_range or model_config.value_range or ()},
        num_classes=model_config.num_classes,
        default_names=model_config.class_names,
        channels=model_config.backbone.in_channels,
        progress=config.progress,
        synthetic_length=config.synthetic_validation,
        synthetic_size=model_config.image_size[0],
    )
    check_classes(model_config, dataset)
    check_options(config, model_config.backbone.patch_size)
    for line in check_data(dataset):
        print(line, flush=True)
    result = launch(fabric, _evaluate_checkpoint, config, dataset)
    inference = {field.name: getattr(config, field.name) for field in dataclasses.fields(InferenceOptions)}
    result = {**{key: _known(value) for key, value in result.items()}, "inference": inference}
    problems = []
    for path, write in files.items():  # before anything is printed: a console can fail
        try:
            atomic_write(path, functools.partial(write, result))
        except OSError as error:
            problems.append(error)
    print(iou_table(result))
    for line in notes(result):
        print(line)
    if problems:
        raise problems[0]
    return 0


def _result_files(config: EvaluateConfig) -> dict[Path, Callable[[dict[str, Any], Path], Any]]:
    """The files asked for, and what writes each.

    Raises:
        ValueError: a file of another kind, or one that is read; OSError: its folder does not exist.
    """
    from segvit.pictures.visualize import MADE_HERE

    writers: dict[str, Callable[[dict[str, Any], Path], Any]] = {}
    mapping = config.label_mapping if isinstance(config.label_mapping, str) else None
    inputs = [Path(name) for name in (config.names, mapping) if name]
    inputs += [Path(config.data) / name for name in ("names.txt", "objectInfo150.txt")]
    if Path(config.checkpoint).is_dir():
        folder = find_checkpoint(config.checkpoint)
        inputs += [folder / "config.json", folder / "model.safetensors"]
    inputs = [file.resolve() for file in inputs]
    for option, paths, kinds in (
        ("json", [config.json], {"": (_write_json, r'\{\s*"miou": ')}),
        ("csv", [config.csv], {"": (_write_csv, "class,iou,")}),
        (
            "confusion",
            config.confusion,
            {".csv": (_write_matrix, "true class,"), ".png": (_write_picture, MADE_HERE)},
        ),
    ):
        for path in filter(None, paths):
            if "" not in kinds and Path(path).suffix.lower() not in kinds:
                raise ValueError(f"{option}: got {path}, expected a file {' or '.join(kinds)}")
            if path in writers:
                raise ValueError(f"{option}: {path} is asked for twice")
            if Path(path).resolve() in inputs:
                raise ValueError(f"{option}: {path} is read and would be overwritten; choose another file")
            write, begins = kinds.get("") or kinds[Path(path).suffix.lower()]
            check_result_file(option, path, begins)
            writers[path] = write
    return {Path(path): write for path, write in writers.items()}


def _write_json(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_csv(result: dict[str, Any], path: Path) -> None:
    columns = [*_MEASURES, "pixels", "predicted"]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["class", *columns])
        for name in result["iou"]:
            table.writerow([name, *(result[column][name] for column in columns)])


def _write_matrix(result: dict[str, Any], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["true class", *result["iou"]])
        table.writerows([name, *row] for name, row in zip(result["iou"], result["confusion"], strict=True))


def _write_picture(result: dict[str, Any], path: Path) -> None:
    from segvit.pictures.visualize import confusion_picture, save_picture

    save_picture(confusion_picture(result["confusion"], list(result["iou"])), path)
