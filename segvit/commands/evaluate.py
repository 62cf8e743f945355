"""`segvit evaluate`."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import segvit_kernels
from segvit.data import check_data, folder_options, open_dataset
from segvit.data.known import known_folder
from segvit.exporting import open_model
from segvit.exporting.exported import ExportedModel
from segvit.inference.engine import check_precision, in_precision
from segvit.inference.passes import check_options
from segvit.model.checkpoint import find_checkpoint
from segvit.options import EvaluateConfig, LabelOptions
from segvit.pictures.visualize import MADE_HERE, confusion_picture, save_picture
from segvit.system.files import atomic_write, check_result_file
from segvit.system.progress import progress_bar
from segvit.training.evaluation import evaluate, without_nan
from segvit.training.launch import launch, make_fabric
from segvit.training.run_folder import meaning_of, share_of


def run(config: EvaluateConfig) -> int:
    """Print the measures of every class and their means, and write what is asked for."""
    files = _result_files(config)
    fabric = make_fabric(config)
    model: Any = open_model(config.checkpoint)  # here too, for errors before any process starts
    model_config = model.config
    if isinstance(model, ExportedModel):
        model.check(config)
        model.check_precision(config.dtype)
    elif config.dtype != "float32" and config.precision != "32":
        raise ValueError(
            f"dtype: got {config.dtype} with --precision {config.precision}; expected one of the two"
        )
    else:
        check_precision(fabric.device, config.dtype, config.backend)
    if isinstance(model, ExportedModel):
        place, record = model.path, model.description.data
    else:
        place, record = find_checkpoint(config.checkpoint), None
    share = config.validation_share
    if share is None:
        share = share_of(place, record)
    options = {
        **folder_options(config),
        "value_range": config.value_range or model_config.value_range or (),
        "validation_share": LabelOptions.validation_share if share is None else share,
    }
    dataset = open_dataset(
        config.data,
        config.split,
        **options,
        num_classes=model_config.num_classes,
        default_names=model_config.class_names,
        channels=model_config.backbone.in_channels,
        progress=config.progress,
        meaning=meaning_of(place, record) if _labels_open(config) else None,
        synthetic_length=config.synthetic_validation,
        synthetic_size=model_config.image_size[0],
    )
    check_classes(model_config, dataset)
    check_options(config, model_config.backbone.patch_size, model_config.class_names)
    for line in check_data(dataset):
        print(line, flush=True)
    result = launch(fabric, _evaluate_checkpoint, config, dataset)
    result = {key: without_nan(value) for key, value in result.items()}
    # An exported file has both inside, whatever the options here leave open.
    exported = isinstance(model, ExportedModel)
    result["inference"] = (model.plan.options if exported else config).inference_fields()
    mixed = {"bf16": "mixed bfloat16", "fp16": "mixed float16"}.get(config.precision, config.dtype)
    result["dtype"] = model.description.precision if exported else mixed
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


def _labels_open(config: EvaluateConfig) -> bool:
    """Whether no option says what label values mean: then they mean what they did in training."""
    said = config.label_mapping is not None or config.reduce_zero_label != "auto"
    return not said and known_folder(config.data)[1] is None


def _evaluate_checkpoint(fabric: Any, config: EvaluateConfig, dataset: Any) -> Any:
    model: Any = open_model(config.checkpoint)
    if isinstance(model, ExportedModel) or config.dtype == "float32":
        model = model.to(fabric.device)
    else:
        model = in_precision(model, fabric.device, config.dtype)
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


# What is written


def _result_files(config: EvaluateConfig) -> dict[Path, Callable[[dict[str, Any], Path], Any]]:
    """The files asked for, and what writes each.

    Raises:
        ValueError: a file of another kind, or one that is read; OSError: its folder does not exist.
    """
    writers: dict[str, Callable[[dict[str, Any], Path], Any]] = {}
    mapping = config.label_mapping if isinstance(config.label_mapping, str) else None
    inputs = [Path(name) for name in (config.names, mapping) if name]
    inputs += [known_folder(config.data)[0] / name for name in ("names.txt", "objectInfo150.txt")]
    if Path(config.checkpoint).is_dir():
        folder = find_checkpoint(config.checkpoint)
        inputs += [folder / name for name in ("config.json", "model.safetensors", "data.json")]
    inputs = [file.resolve() for file in inputs]
    for option, paths, kinds in (
        ("json", [config.json], {".json": (_write_json, r'\{\s*"miou": ')}),
        ("csv", [config.csv], {".csv": (_write_csv, "class,iou,")}),
        (
            "confusion",
            config.confusion,
            {".csv": (_write_matrix, "true class,"), ".png": (_write_picture, MADE_HERE)},
        ),
    ):
        for path in filter(None, paths):
            suffix = Path(path).suffix.lower() if len(kinds) > 1 else next(iter(kinds))
            if suffix not in kinds:
                raise ValueError(f"{option}: got {path}, expected a file {' or '.join(kinds)}")
            if path in writers:
                raise ValueError(f"{option}: {path} is asked for twice")
            if Path(path).resolve() in inputs:
                raise ValueError(f"{option}: {path} is read and would be overwritten; choose another file")
            write, begins = kinds[suffix]
            check_result_file(option, path, suffix, begins)
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
    save_picture(confusion_picture(result["confusion"], list(result["iou"])), path)


# What is printed


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
    return "   n/a" if value is None or without_nan(value) is None else f"{100 * value:6.2f}"


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
