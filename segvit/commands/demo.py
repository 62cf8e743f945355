"""`segvit demo`: train a small SegViT on synthetic pictures, and write down in one HTML page what came of it.

The page says what was trained and how well it does on pictures it has never seen, with curves, classes,
overlays, similarity maps and cost. The number of steps decides the result; the machine decides the time.
"""

from __future__ import annotations

import csv
import functools
import os
import shutil
import tempfile
from pathlib import Path

from segvit.data.synthetic import SyntheticShapes
from segvit.demo import task
from segvit.demo.page import TITLE, Outcome, pixels_of, write_report
from segvit.model.heads import load_model
from segvit.options import DemoConfig
from segvit.pictures.visualize import Image
from segvit.system.files import atomic_write, make_folder
from segvit.system.machine import pick_backend, pick_device
from segvit.training.evaluation import evaluate
from segvit.training.train import train


def run(config: DemoConfig) -> int:
    """Train, evaluate, write `out`/report.html; prints the report's path last. Returns 0.

    An earlier demo in the same folder is replaced when the new one is complete.

    Raises:
        ValueError, OSError: an option that cannot be used, a folder that cannot be written.
    """
    device = pick_device(config.accelerator)
    pick_backend(None, device)
    out = Path(config.out)
    pictures = [out / "pictures" / f"{index}.png" for index in range(4)]
    if not _is_demo(out):
        for path in (out / "run", out / "report.html", *pictures):
            if os.path.lexists(path):
                raise ValueError(f"out: {path} is there and not from a demo; choose another folder")
    make_folder(out)

    print("drawing pictures", flush=True)
    training, validation, test = (
        task.Rendered(SyntheticShapes(split, length, task.IMAGE_SIZE, seed))
        for split, length, seed in (
            ("training", task.TRAINING_IMAGES, config.seed),
            ("validation", task.VALIDATION_IMAGES, config.seed),
            ("validation", task.TEST_IMAGES, config.seed + 1),
        )
    )
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=out) as temporary:
        folder = Path(temporary) / "run"
        options = task.training_options(config, folder)
        result = train(options, training, validation)
        print(f"trained {result['step']} steps in {result['seconds']:.0f} s; evaluating", flush=True)
        model = load_model(folder).to(device)  # the best by the curve's pictures, which are not the test's
        score = evaluate(model, test, batch_size=16)
        macs = task.multiply_accumulates(model, task.IMAGE_SIZE)
        milliseconds = task.milliseconds(model.fuse(), test[0]["image"])
        log = _read_log(folder / "metrics.csv")
        html = write_report(Outcome(model, options, result, log, score, test, macs, milliseconds))
        shutil.rmtree(out / "run", ignore_errors=True)
        os.replace(folder, out / "run")
    for index, path in enumerate(pictures):
        picture = Image.fromarray(pixels_of(test[index]["image"]))
        atomic_write(path, functools.partial(picture.save, format="PNG"))
    path = out / "report.html"
    atomic_write(path, lambda temporary: temporary.write_text(html, encoding="utf-8"))
    print(f"mIoU {100 * score['miou']:.1f} % on {score['images']} held-out pictures")
    print(path.resolve())
    return 0


def _is_demo(out: Path) -> bool:
    try:
        with (out / "report.html").open(encoding="utf-8", errors="replace") as file:
            return f"<title>{TITLE}</title>" in file.read(4096)
    except OSError:
        return False


def _read_log(path: Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.csv as (step, value) pairs by column."""
    columns: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value:
                    columns.setdefault(name, []).append((int(row["step"]), float(value)))
    return columns
