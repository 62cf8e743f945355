"""`segvit data pack`: a data set in tars that `segvit.data.shards` reads.

A shard's index appears after the shard, each whole or not at all, and both depend on nothing but the data:
packing goes on where it was ended, and twice the same data are the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from segvit.data.folder import SegmentationFolder
from segvit.data.shards import LIST, label_kind, read_index
from segvit.system.extras import require
from segvit.system.files import atomic_write
from segvit.system.progress import progress_bar
from segvit.system.tars import BLOCK, END, tar_member
from segvit.system.text import numbered, read_json

__all__ = ["pack"]


def pack(
    datasets: Sequence[SegmentationFolder], out: Path, pictures: int, *, progress: bool = False
) -> tuple[int, int]:
    """Write data sets as shards of at most so many pictures, all of a split with equally many up to one.

    Args:
        datasets: the splits, of one folder.
        out: the folder of the shards.
        pictures: of a shard, at most.
        progress: show a bar.

    Returns:
        How many shards were written now, and how many there are.

    Raises:
        ValueError, OSError: a sample cannot be read, or the folder holds shards of other data.
    """
    plan = []
    for dataset in datasets:
        count = -(-len(dataset) // pictures)
        bounds = [len(dataset) * index // count for index in range(count + 1)]
        plan += [(dataset, range(*pair)) for pair in itertools.pairwise(bounds)]
    names = [f"{number:05d}.tar" for number in range(len(plan))]
    listed = {"shards": names, "data": {d.split: _made_of(d) for d in datasets}}
    path = out / LIST
    if path.is_file() and read_json(path, dict) != listed:
        raise ValueError(f"out: {out} holds shards of other data; choose another folder")
    if not path.is_file():  # the first that is written
        for file in (out / name for tar in names for name in (tar, Path(tar).with_suffix(".json"))):
            if os.path.lexists(file):
                raise ValueError(
                    f"out: {file} is there already and no shard of these data; choose another folder"
                )
    for left in out.glob(".*.????????.tmp") if path.is_file() else ():  # of one that was killed
        left.unlink()
    _write_json(path, listed)
    written = 0
    keys = {id(dataset): _keys(dataset) for dataset in datasets}
    with progress_bar(progress) as bar, ThreadPoolExecutor(2) as readers:
        task = bar.add_task("pack", total=sum(map(len, datasets)))
        for name, (dataset, indices) in zip(names, plan, strict=True):
            if not _is_whole(out / name):
                files = readers.map(functools.partial(_files_of, dataset), indices)
                _write_shard(out / name, dataset, [keys[id(dataset)][i] for i in indices], files)
                written += 1
            bar.advance(task, len(indices))
    return written, len(plan)


def _made_of(dataset: SegmentationFolder) -> str:
    """Tells data sets apart: names and bytes of the files, and what the label maps mean."""
    digest = hashlib.sha256()
    for image, label in dataset.files:
        sizes = f"{image.stat().st_size} {label.stat().st_size}"
        digest.update(f"{image.relative_to(dataset.root).as_posix()} {sizes}\n".encode("utf-8", "replace"))
    table = sorted(dataset.reading.table.items())
    coded = [sorted(dataset.by_colour)] if dataset.palette else []
    digest.update(repr((table, dataset.class_names, dataset.num_classes, dataset.palette, *coded)).encode())
    return digest.hexdigest()


def _keys(dataset: SegmentationFolder) -> list[str]:
    """A name in the tar for each sample: WebDataset's end at the first dot, and like ones are one sample."""
    places = [picture.relative_to(dataset.root) for picture, _ in dataset.files]
    return numbered([(place.parent / place.stem.replace(".", "_")).as_posix() for place in places])


def _files_of(dataset: SegmentationFolder, index: int) -> tuple[Path, bytes, bytes]:
    """A sample's picture and its file as it is, and its label map as a file."""
    path = dataset.files[index][0]
    label = dataset[index]["label"]  # the picture is decoded too: a damaged one is found now
    assert isinstance(label, torch.Tensor)
    kind, nothing = label_kind(dataset.num_classes)
    stored = torch.where(label == dataset.ignore_index, nothing, label)
    data = io.BytesIO()
    images: Any = require("PIL.Image", extra="train")
    images.fromarray(stored.numpy().astype(kind)).save(data, "PNG")
    return path, path.read_bytes(), data.getvalue()


def _write_shard(
    tar: Path, dataset: SegmentationFolder, keys: Sequence[str], files: Iterable[tuple[Path, bytes, bytes]]
) -> None:
    names: list[str] = []
    places: dict[str, list[tuple[int, int]]] = {"pictures": [], "labels": []}

    def write(path: Path) -> None:
        with path.open("wb") as file:

            def add(kind: str, name: str, data: bytes) -> None:
                member = tar_member(name, data)
                filling = -len(data) % BLOCK
                places[kind].append((file.tell() + len(member) - filling - len(data), len(data)))
                file.write(member)

            for key, (picture, content, label) in zip(keys, files, strict=True):
                names.append(picture.relative_to(dataset.root).as_posix())
                add("pictures", f"{key}{picture.suffix.lower()}", content)
                add("labels", f"{key}.label.png", label)
            file.write(END)

    atomic_write(tar, write)
    index = {
        "split": dataset.split,
        "bytes": tar.stat().st_size,
        "names": names,
        **places,
        "data": {
            "num_classes": dataset.num_classes,
            "class_names": dataset.class_names,
            "palette": dataset.palette,
            "reduce_zero_label": "auto" if dataset.known else dataset.reduce_zero_label,
        },
        "meaning": dataset.meaning(),
        "validation_share": dataset.validation_share,
    }
    _write_json(tar.with_suffix(".json"), index)


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value) + "\n"
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _is_whole(tar: Path) -> bool:
    try:
        return tar.stat().st_size == read_index(tar)["bytes"]
    except (OSError, ValueError):
        return False
