"""``python -m bench export``: what files of ``segvit export`` give, and what their tail costs.

- ``labels``: every preset in every format at its own size, run in processes without this package, beside
  ``predict``; a pixel may differ where two scores tie.
- ``tail``: ways to write the graph from mask logits to labels; time and memory in two runtimes.
- ``int8``: mIoU of a checkpoint, and of files of it, over a validation split.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.measure import environment, peaks, timing
from bench.subjects import exports

SECTIONS = ("labels", "tail", "int8")
_MODULE = "bench.subjects.exports"


def labels(
    names: list[str] | None, *, threads: int, deadline: float, smoke: bool, progress: Callable[[str], None]
) -> Iterator[dict]:
    """A row for each model and kind of file."""
    known = {case.name: case for case in exports.CASES}
    cases = [known[name] for name in names or known]
    whole = exports.picture()
    pictures = [whole, whole[..., 20:223, 30:341]]
    if smoke:
        cases, pictures = [exports.TINY_CASE], [p[..., :50, :70] for p in pictures]
    pictures = [picture.contiguous() for picture in pictures]
    for case in cases:
        model = scored = None
        for file in exports.FILES[:3] if smoke else exports.FILES:
            row = {"table": "labels", "model": case.name, "file": file.name}
            row |= {"size": [*pictures[0].shape[2:]]}
            reason = "views are laid out for one size" if file.open and case.options != "{}" else None
            reason = reason or file.missing() or ("time budget" if time.time() > deadline else None)
            if reason:
                yield row | {"status": "skipped", "reason": reason}
                continue
            try:
                with torch.inference_mode(), tempfile.TemporaryDirectory(prefix="segvit-") as folder:
                    if model is None:
                        model, scored = exports.expected(case, pictures)
                    row |= exports.compared(file, case, model, pictures, scored, Path(folder), threads)
                row["status"] = "ok" if row["gap"] < exports.TIES else "invalid"
                if row["status"] == "invalid":
                    row["reason"] = (
                        f"scores of labels are up to {row['gap']:.1e} of the largest below the best"
                    )
            except Exception as error:  # the exporters and runtimes have their own; the others still count
                row |= {"status": "failed", "reason": timing.one_line(error)}
            progress(f"{case.name}, {file.name}: {row.get('reason') or row['agreement']}")
            yield row


def tail(*, deadline: float, calls: int, smoke: bool, progress: Callable[[str], None]) -> Iterator[dict]:
    """A row for each way and runtime, in a process of its own."""
    sizes = (5, 4, 32) if smoke else (exports.CLASSES, exports.GRID, exports.SIZE)
    for name, (rows, how) in exports.TAILS.items():
        with tempfile.TemporaryDirectory(prefix="segvit-") as folder:
            path = str(Path(folder) / "tail.onnx")
            for runtime, packages in exports.RUNTIMES.items():
                row = {"table": "tail", "tail": name, "runtime": runtime, "chosen": name in exports.CHOSEN}
                reason = environment.missing(packages) or ("time budget" if time.time() > deadline else None)
                if reason:
                    yield row | {"status": "skipped", "reason": reason}
                    continue
                try:
                    if not Path(path).exists():
                        exports.write_tail(min(rows, sizes[2]), how, *sizes, path)
                    row |= peaks.isolated(_MODULE, "run_tail", runtime, path, *sizes, calls)
                    row["status"] = "ok" if row["agreement"] > 0.999 else "invalid"
                    if row["status"] == "invalid":
                        row["reason"] = f"{100 * row['agreement']:.2f} % of labels as in float64"
                except Exception as error:
                    row |= {"status": "failed", "reason": timing.one_line(error)}
                progress(f"{name}, {runtime}: {row.get('reason') or timing_of(row)}")
                yield row


def timing_of(row: dict) -> str:
    return f"{1e3 * row['min_s']:.0f} ms"


def int8(
    checkpoint: Path, data: Path, *, calibration: int, pictures: int | None, progress: Callable[[str], None]
) -> Iterator[dict]:
    """A row for the checkpoint and one for each file of it, over the validation split."""
    from segvit.data import open_dataset
    from segvit.exporting import export, open_model
    from segvit.exporting.compare import sample
    from segvit.exporting.graph import Plan
    from segvit.model.heads import load_model
    from segvit.training.metrics import ConfusionMatrix

    model = load_model(checkpoint).eval()
    classes = model.config.num_classes
    dataset = open_dataset(str(data), "validation", num_classes=classes)
    count = min(len(dataset), pictures or len(dataset))
    size = tuple(dataset[0]["image"].shape[1:])
    given = sample(str(data / "images" / "training"), model.config, Plan(size), calibration)
    rows = {"checkpoint": {"table": "int8", "file": "checkpoint", "status": "ok"}}
    opened = {"checkpoint": load_model(checkpoint).eval().fuse()}
    with tempfile.TemporaryDirectory(prefix="segvit-") as folder:
        for name, suffix, dtype in exports.PRECISIONS:
            row = rows[name] = {"table": "int8", "file": name, "calibration": len(given)}
            path = Path(folder) / f"{dtype}{suffix}"
            try:
                export(model, path, size=size, dtype=dtype, calibration=given)
                opened[name] = open_model(path)
            except (ValueError, ImportError) as error:
                row |= {"status": "skipped", "reason": str(error)}
                continue
            kinds = (".xml", ".bin") if suffix == ".xml" else (suffix,)
            row |= {"status": "ok", "file_bytes": sum(path.with_suffix(k).stat().st_size for k in kinds)}
            progress(f"{name}: {row['file_bytes'] / 1e6:.1f} MB")
        matrices = {name: ConfusionMatrix(classes, dataset.ignore_index) for name in opened}
        same, pixels = dict.fromkeys(opened, 0), 0
        for index in range(count):
            item = dataset[index]
            with torch.inference_mode():
                found = {name: one.predict(item["image"]).long() for name, one in opened.items()}
            pixels += found["checkpoint"].numel()
            for name, labels in found.items():
                matrices[name].update(labels[None], item["label"][None])
                same[name] += int((labels == found["checkpoint"]).sum())
            if index % 10 == 9:
                progress(f"{index + 1} of {count} pictures")
    for name, matrix in matrices.items():
        rows[name] |= {"miou": matrix.miou, "agreement": same[name] / pixels, "images": count}
    yield from rows.values()


def run(
    section: str,
    *,
    models: list[str] | None = None,
    checkpoint: Path | None = None,
    data: Path | None = None,
    calibration: int = 8,
    pictures: int | None = None,
    threads: int = 2,
    calls: int = 5,
    smoke: bool = False,
    budget_s: float = float("inf"),
    progress: Callable[[str], None] = print,
) -> dict:
    """Rows of a section, as plain data."""
    begun = time.time()
    torch.set_num_threads(threads)
    described = {**environment.describe(torch.device("cpu")), "threads": threads}
    described |= {name: environment.version(name) for name in ("onnxruntime", "openvino", "nncf")}
    limits = {"deadline": begun + budget_s, "smoke": smoke, "progress": progress}
    if section == "labels":
        rows = labels(models, threads=threads, **limits)
    elif section == "tail":
        rows = tail(calls=calls, **limits)
        described["threads"] = 1
    else:
        assert checkpoint is not None and data is not None
        rows = int8(checkpoint, data, calibration=calibration, pictures=pictures, progress=progress)
    found = {"schema": 1, "kind": "export", "measurement": not smoke, "rows": list(rows)}
    return found | {"environment": described, "elapsed_s": round(time.time() - begun, 1)}
