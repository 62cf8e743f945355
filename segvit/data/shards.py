"""A data set in tars, as `segvit data pack` writes it (`segvit.data.pack`).

    SHARDS/00000.tar     pictures as they were, NAME.jpg, and label maps, NAME.label.png: classes, the largest
                         number of 8 or 16 bits for pixels without one (WebDataset's names)
    SHARDS/00000.json    its index: the split, names and places of its samples, its length, what all share,
                         what the label values of the folder meant, and which share was kept for validation
    SHARDS/shards.json   which tars there are

Samples have the order of the folder that was packed, and its names: a run draws the same ones at the same
steps from either, and may go on from one with the other.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from segvit.data.coding import is_meaning, is_share
from segvit.data.decoding import OWN_FORMATS
from segvit.data.pictures import PictureBytes, read_image
from segvit.system.addresses import Address, File, file_at, is_address, read_part, size_of
from segvit.system.extras import require
from segvit.system.failures import one_line
from segvit.system.text import parse_json, read_json, shown

__all__ = ["LIST", "Shards", "are_shards", "label_kind", "read_index"]

LIST = "shards.json"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST, _LONGEST = 1 << 15, 4096  # shards of a pattern, its characters
_BETWEEN = 1 << 12  # bytes that may lie between a picture and its label map
_AT_ONCE = 16  # indices that are asked for
_MOST_TEXT = 1 << 25  # characters of all names
_KINDS = {"names": list, "pictures": list, "labels": list, "split": str, "bytes": int, "data": dict}


def are_shards(data: str) -> bool:
    """Whether `data` on the command line names shards: a pattern of tars, their folder, or an address."""
    return is_address(data) or data.lower().endswith(".tar") or are_listed(data)


def are_listed(folder: str) -> bool:
    """Whether a folder on disk has a list of shards."""
    return os.path.isfile(os.path.join(folder, LIST))


def label_kind(num_classes: int) -> tuple[type, int]:
    """The type of stored labels, and the number of pixels without class."""
    return (np.uint8, 255) if num_classes <= 255 else (np.uint16, 65535)


def read_index(tar: File) -> dict[str, Any]:
    """What stands beside a shard.

    Raises:
        FileNotFoundError, ValueError: it is missing, or none.
    """
    path = tar.with_suffix(".json")
    try:
        index = _read_dict(path)
    except FileNotFoundError:
        what = f"it is the index of {tar.name} (segvit data pack)"
        raise FileNotFoundError(f"{path}: no such file; {what}") from None
    wrong = [name for name, kind in _KINDS.items() if not isinstance(index.get(name), kind)]
    if wrong or len({len(index[name]) for name in ("names", "pictures", "labels")}) != 1:
        raise ValueError(f"{path}: no index of a shard ({', '.join(wrong) or 'lists of several lengths'})")
    places = [place for name in ("pictures", "labels") for place in index[name]]
    right = {
        "names": all(map(_can_name_a_file, index["names"])),
        "places": all(_is_place(place, index["bytes"]) for place in places),
        "data": _describes(index["data"]),
        # Of earlier versions nothing.
        "meaning": index.get("meaning") is None or is_meaning(index["meaning"]),
        "validation_share": index.get("validation_share") is None or is_share(index["validation_share"]),
    }
    if wrong := [name for name, well in right.items() if not well]:
        raise ValueError(f"{path}: no index of a shard ({', '.join(wrong)} of another form)")
    return index


def _read_dict(file: File) -> dict[str, Any]:
    if not isinstance(file, Address):
        return read_json(file, dict)
    try:
        text = file.read().decode()
    except UnicodeDecodeError:
        raise ValueError(f"{file}: no text in UTF-8") from None
    return parse_json(text, str(file), dict)


def _whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _is_place(place: Any, size: int) -> bool:
    """Whether this is the start and the length of something in a file of this size."""
    return (
        isinstance(place, list)
        and len(place) == 2
        and all(_whole(n, size) for n in place)
        and sum(place) <= size
    )


def _describes(data: dict[str, Any]) -> bool:
    """Whether this is what `segvit.data.pack` says of a data set."""
    classes, names, colours = (data.get(name) for name in ("num_classes", "class_names", "palette"))
    if not {"class_names", "palette"} <= set(data) or not _whole(classes, 65535) or not classes:
        return False
    if data.get("reduce_zero_label") not in (True, False, "auto"):
        return False
    for entries in (names, colours):
        if entries is not None and not (isinstance(entries, list) and len(entries) == classes):
            return False
    return all(isinstance(name, str) for name in names or ()) and all(
        isinstance(colour, list) and len(colour) == 3 and all(_whole(part, 255) for part in colour)
        for colour in colours or ()
    )


def _expand(pattern: str) -> list[File]:
    """'a/{00000..00002}.tar' -> its three files; '*' stands for what is there."""
    if len(pattern) > _LONGEST:
        raise ValueError(f"data: got {shown(pattern)}, {len(pattern):,} characters, longer than any name")
    choices: list[Sequence[str]] = []
    text, *ranges = _RANGE.split(pattern)
    for low, high, after in zip(*(ranges[i::3] for i in range(3)), strict=True):
        if max(len(low), len(high)) > 18 or int(low) > int(high):
            got = f"{{{low}..{high}}}"[:60]
            raise ValueError(f"data: got {got} in {shown(pattern)}, expected a number and a larger one")
        count = (int(high) - int(low) + 1) * math.prod(map(len, choices))
        if count > _MOST or count * len(pattern) > _MOST_TEXT:
            raise ValueError(
                f"data: got {shown(pattern)}, more than {_MOST:,} shards, or names too long for so many"
            )
        choices += [[text], [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]]
        text = after
    names = ["".join(parts) for parts in itertools.product(*choices, [text])]
    paths: list[File] = [file_at(name) for name in names]
    if any("*" in name for name in names):
        # Two in a row are one: to `glob` they would be folders.
        globs = [(one.parent, re.sub(r"\*+", "*", one.name)) for one in paths]
        found: list[list[File]] = [sorted(parent.glob(name), key=str) for parent, name in globs]
        paths = [path for some in found for path in some]
    return paths


def _listed(path: File) -> list[str]:
    names = _read_dict(path).get("shards")
    if not isinstance(names, list) or not all(_can_name_a_file(name) for name in names):
        raise ValueError(f"{path}: no list of shards")
    return names


def _can_name_a_file(name: Any) -> bool:
    """Below the folder of shards or of pictures, as `segvit data pack` writes them."""
    try:
        held = isinstance(name, str) and 0 < len(name) < 1000 and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # a lone surrogate, which JSON can write
        return False
    return held and not os.path.isabs(name) and ".." not in name.split("/")


def _indices(tars: Sequence[File]) -> Iterable[dict[str, Any]]:
    """The index of each shard, whose length was compared with it."""
    if not any(isinstance(tar, Address) for tar in tars):
        return map(_index_of, tars)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(_index_of, tars))


def _index_of(tar: File) -> dict[str, Any]:
    try:
        size = size_of(tar)
    except FileNotFoundError:
        raise FileNotFoundError(f"{tar}: no such shard") from None
    index = read_index(tar)
    if size != index["bytes"]:
        raise ValueError(
            f"{tar}: {size:,} bytes, {index['bytes']:,} when it was written: truncated or changed"
        )
    return index


class Shards(Dataset):
    """A split of a data set in shards; items and attributes as those of `SegmentationFolder`.

    Args:
        data: the folder, or a pattern of tars, 'shards/{00000..00012}.tar', of which those of other splits do
            not count; either perhaps at an address that fsspec reads, of which each sample is a read of a
            part of a shard.
        split: "training" or "validation".
        ignore_index: the label of pixels without a class.
        channels, value_range: see `segvit.data.read_image`.

    Attributes:
        splits: all that the shards have.
        validation_share: of the folder's pictures, kept for validation; None: not said.

    Raises:
        FileNotFoundError: a shard or its index is missing, or there is none of the split.
        OSError, ImportError: an address cannot be read.
        ValueError: a shard is truncated, or shards are of several data sets; when an item is read, one that
            cannot be decoded.
    """

    known = None

    def __init__(
        self,
        data: str,
        split: str = "training",
        *,
        ignore_index: int = 255,
        channels: int = 3,
        value_range: Sequence[float] = (),
    ) -> None:
        folder = file_at(data)
        is_list = not data.lower().endswith(".tar") if is_address(data) else are_listed(data)
        self.tars = [folder / name for name in _listed(folder / LIST)] if is_list else _expand(data)
        # Of addresses the names within alone count (`segvit.training.run_folder.samples_of`).
        self.root = Path() if is_address(data) or not self.tars else Path(str(self.tars[0].parent))
        self.split, self.ignore_index = split, ignore_index
        self.channels, self.value_range = channels, tuple(value_range) or None
        self.files: list[tuple[Path, str]] = []
        self._places: list[tuple[int, int, int, int, int]] = []
        shared: dict[str, Any] | None = None
        splits: set[str] = set()
        self._meaning: dict[str, Any] | None = None
        self.validation_share: float | None = None
        self._count = 0
        for number, (tar, index) in enumerate(zip(self.tars, _indices(self.tars), strict=True)):
            if shared is not None and shared != index["data"]:
                raise ValueError(f"{tar}: is of another data set than {self.tars[0].name}")
            shared = index["data"]
            splits.add(index["split"])
            if index["split"] != split:
                continue
            self._count += 1
            self._meaning = self._meaning or index.get("meaning")
            self.validation_share = self.validation_share or index.get("validation_share")
            self.files += [(self.root / name, name) for name in index["names"]]
            pairs = zip(index["pictures"], index["labels"], strict=True)
            self._places += [(number, *picture, *label) for picture, label in pairs]
        self.splits = sorted(splits)
        if shared is None or split not in splits:
            here = ", ".join(shown(name).strip("'") for name in self.splits[:8]) or "none"
            raise FileNotFoundError(f"{data}: no shard of {split} (splits here: {here})")
        self.num_classes = shared["num_classes"]
        self.class_names = None if shared["class_names"] is None else tuple(shared["class_names"])
        colours = shared["palette"]
        self.palette = None if colours is None else tuple(tuple(colour) for colour in colours)
        self.reduce_zero_label = shared["reduce_zero_label"]
        if 0 <= ignore_index < self.num_classes:
            raise ValueError(
                f"ignore_index: got {ignore_index}, which is one of the {self.num_classes} classes"
            )

    def meaning(self) -> dict[str, Any] | None:
        """What the values of the label maps meant, see `SegmentationFolder.meaning`; None: not said."""
        return self._meaning

    def check(self) -> list[str]:
        """A line that says what there is."""
        what = f"{len(self):,} pictures of {self.split} in {self._count:,} shards"
        return [f"data: {what}, {self.num_classes} classes"]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        number, start, length, label_start, label_length = self._places[index]
        tar, name = self.tars[number], self.files[index][1]
        first, end = min(start, label_start), max(start + length, label_start + label_length)
        if end - first <= length + label_length + _BETWEEN:  # side by side: one request
            both = read_part(tar, first, end)
            picture, data = both[start - first :][:length], both[label_start - first :][:label_length]
        else:
            picture = read_part(tar, start, start + length)
            data = read_part(tar, label_start, label_start + label_length)
        source = PictureBytes(picture, f"{tar}: {name}", formats=OWN_FORMATS)
        image = read_image(source, self.channels, self.value_range)
        try:
            with require("PIL.Image", extra="train").open(io.BytesIO(data)) as stored:
                values = torch.from_numpy(np.array(stored).astype(np.int64))
        except Exception as error:  # Pillow's have many classes
            raise ValueError(
                f"{tar}: the label map of {shown(name)} cannot be decoded ({one_line(error)})"
            ) from None
        _, nothing = label_kind(self.num_classes)
        if values.shape != image.shape[1:] or ((values >= self.num_classes) & (values != nothing)).any():
            raise ValueError(f"{tar}: the label map of {shown(name)} is of another size or of other classes")
        label = torch.where(values == nothing, self.ignore_index, values)
        return {"image": image, "label": label, "name": Path(name).stem}
