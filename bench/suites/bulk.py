"""``python -m bench bulk``: many small pictures into label maps, and data sets in shards, pictures a second.

`segvit predict` (files and tars, label maps alone) against a plain loop over the model's `predict` that reads
and writes each picture in turn; the parts of that work by themselves; packing, reading and augmenting shards.
JPEGs of smooth noise, random weights, float32 on the CPU; all ways in turns, several times. `segvit predict`
counts with all it does, opening the model and hashing its file among it.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measure import environment

SIDES = (64, 224)
BATCH, THREADS = 16, 2
SPLITS = ("training", "validation")


def _make_pictures(root: Path, side: int, count: int) -> None:
    """A data set of so many pictures in `training`, and an eighth as many in `validation`."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, number in zip(SPLITS, (count, max(1, count // 8)), strict=True):
        for index in range(number):
            small = rng.integers(0, 256, (side // 8 + 1, side // 8 + 1, 3), dtype=np.uint8)
            picture = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
            label = Image.fromarray(small[..., 0] % 19).resize((side, side), Image.Resampling.NEAREST)
            for folder, one, suffix in (("images", picture, "jpg"), ("annotations", label, "png")):
                path = root / folder / split / f"{index:05d}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                one.save(path)
    (root / "names.txt").write_text("".join(f"class {index}\n" for index in range(19)))


def _ways(work: Path, side: int, number: Callable[[], int]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed, each for all pictures; `number` gives a new one, for a folder that is not there yet."""
    from PIL import Image

    from segvit import SegViT
    from segvit.commands.data_pack import run as pack
    from segvit.commands.predict import run as predict
    from segvit.data import SegmentationFolder, read_image
    from segvit.data.shards import Shards
    from segvit.data.transforms import Augment
    from segvit.inference.bulk import label_picture
    from segvit.options import PackConfig, PredictConfig

    model = SegViT.from_pretrained(work / "model").fuse()
    files = sorted((work / "data" / "images" / "training").iterdir())
    images = [read_image(file) for file in files]
    stacks = torch.stack(images).split(BATCH)
    labels = [label for stack in stacks for label in model.predict(stack).numpy()]
    data = SegmentationFolder(work / "data", "training", reduce_zero_label=False)
    augment = Augment(side, ignore_index=data.ignore_index)

    def plain() -> None:
        out = work / f"plain-{number()}"
        out.mkdir()
        for file in files:
            Image.fromarray(model.predict(file).numpy()).save(out / f"{file.stem}_labels.png")

    def bulk(**changes: Any) -> None:
        given = {"images": [str(files[0].parent)], "checkpoint": str(work / "model"), "overlay": False}
        config = PredictConfig(
            **given,
            out=str(work / f"bulk-{number()}"),
            batch=BATCH,
            threads=THREADS,
            accelerator="cpu",
            **changes,
        )
        predict(config)

    def packed() -> str:
        out = str(work / f"shards-{number()}")
        pack(PackConfig(folder=str(work / "data"), out=out, reduce_zero_label=False, progress=False))
        return out

    shards = Shards(packed(), "training")
    items = [data[index] for index in range(len(data))]
    yield "plain loop", plain
    yield "segvit predict, files", lambda: bulk(manifest=True)
    yield "segvit predict, tars", lambda: bulk(pack=1000)
    yield "decode", lambda: [read_image(file) for file in files]
    yield "network, one by one", lambda: [model.predict(image) for image in images]
    yield f"network, batches of {BATCH}", lambda: [model.predict(stack) for stack in stacks]
    yield "encode", lambda: [label_picture(label, 19).save(io.BytesIO(), "PNG") for label in labels]
    yield "read a folder", lambda: [data[index] for index in range(len(data))]
    yield "read shards", lambda: [shards[index] for index in range(len(shards))]
    yield "augment", lambda: [augment(one["image"], one["label"], 0, i) for i, one in enumerate(items)]
    yield "pack shards", packed


def _equal(work: Path) -> float:
    """Share of pixels on which the plain loop and `segvit predict` agree, by the newest folders of each."""
    from PIL import Image

    newest = [max(work.glob(f"{name}-*"), key=os.path.getmtime) for name in ("plain", "bulk")]
    if not list(newest[1].rglob("*_labels.png")):  # tars: the files are older
        newest[1] = max((path.parent for path in work.glob("bulk-*/*_labels.png")), key=os.path.getmtime)
    agree = [
        np.array(Image.open(path)) == np.array(Image.open(newest[1] / path.name))
        for path in sorted(newest[0].iterdir())
    ]
    return float(np.mean(agree))


def run(
    *,
    sides: Sequence[int] = SIDES,
    pictures: int = 512,
    repeats: int = 5,
    threads: int = 2,
    progress: Callable[[str], None] = print,
) -> dict:
    """A row for each size and way, as plain data."""
    from segvit import SegViT, SegViTConfig

    rows = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for side in sides:
            with tempfile.TemporaryDirectory() as folder:
                work = Path(folder)
                _make_pictures(work / "data", side, pictures)
                torch.manual_seed(0)
                config = SegViTConfig.preset("vit_tiny", num_classes=19, image_size=side)
                SegViT(config).save_pretrained(work / "model")
                counter = iter(range(10**6))
                with contextlib.redirect_stdout(io.StringIO()):
                    ways = dict(_ways(work, side, lambda counter=counter: next(counter)))
                    seconds: dict[str, list[float]] = {name: [] for name in ways}
                    for turn in range(repeats + 1):
                        for name, way in ways.items():
                            start = time.perf_counter()
                            way()
                            if turn:  # the first warms up
                                seconds[name].append(time.perf_counter() - start)
                    equal = _equal(work)
            for name, found in seconds.items():
                count = pictures + max(1, pictures // 8) if name == "pack shards" else pictures
                rate = count / statistics.median(found)
                spread = (max(found) - min(found)) / statistics.median(found) / 2
                rows.append({"side": side, "way": name, "rate": rate, "spread": spread, "equal": equal})
                progress(f"{side}: {name}: {rate:.0f} pictures/s ±{spread:.0%}")
    finally:
        torch.set_num_threads(before)
    return {
        "schema": 1,
        "kind": "bulk",
        "environment": environment.describe(torch.device("cpu")),
        "pictures": pictures,
        "batch": BATCH,
        "threads": THREADS,
        "torch_threads": threads,
        "rows": rows,
    }
