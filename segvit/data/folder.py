"""Segmentation data on disk, in the ADE20K layout.

    ROOT/images/SPLIT/*.jpg|jpeg|png        pictures
    ROOT/annotations/SPLIT/*.png            label maps of the same names and sizes: one channel, or a palette
    ROOT/names.txt                          class names, one a line (optional; any file may be given instead,
                                            and ADE20K's own objectInfo150.txt is found)

Every problem with a file is a `ValueError` or `FileNotFoundError` of one line that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from segvit.data.names import read_names
from segvit.data.pictures import read_image, read_label

__all__ = ["SegmentationFolder", "open_dataset"]

_SUFFIXES = {".jpg", ".jpeg", ".png"}
_INVALID = -(1 << 62)


def _read_mapping(source: Mapping[int, int | None] | str | Path) -> dict[int, int | None]:
    if isinstance(source, Mapping):
        return {int(key): value for key, value in source.items()}
    try:
        return {int(key): value for key, value in json.loads(Path(source).read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{source}: expected a JSON object of label value -> class, e.g. {{'7': 0}} ({error})"
        ) from None


class SegmentationFolder(Dataset):
    """Images with label maps from a folder, sorted by name.

    Items are {"image": uint8 (3, H, W), "label": int64 (H, W), "name": str}, with labels in
    0 ... num_classes - 1 or `ignore_index`.

    Args:
        root: the folder.
        split: name of the sub-folders, "training" or "validation" in ADE20K.
        names: class names, or a file of them; `root/names.txt`, or ADE20K's
            `root/objectInfo150.txt`, when not given.
        reduce_zero_label: stored 0 is ignored, stored k is class k - 1 (as in ADE20K).
        label_mapping: stored value -> class (None or ignore_index: ignored), a dict or a JSON file; replaces
            `reduce_zero_label`.
        ignore_index: the label of pixels without a class; stored 255 means it too, where 255 is no class.
        num_classes: in place of names.

    Raises:
        FileNotFoundError: no such folder, names file or label map.
        ValueError: no image in the split; a mapping to classes that are not there; number of classes unknown;
            when an item is read, a file that cannot be decoded, a label map of another size than its image,
            or a label value out of range.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "training",
        names: str | Path | tuple[str, ...] | list[str] | None = None,
        reduce_zero_label: bool = True,
        label_mapping: Mapping[int, int | None] | str | Path | None = None,
        ignore_index: int = 255,
        num_classes: int | None = None,
    ) -> None:
        self.root, self.split, self.ignore_index = Path(root), split, ignore_index
        self.palette = None
        if names is None:
            candidates = (self.root / "names.txt", self.root / "objectInfo150.txt")
            names = next((path for path in candidates if path.is_file()), None)
        if isinstance(names, (str, Path)):
            if not Path(names).is_file():
                raise FileNotFoundError(f"{names}: no such names file")
            names = read_names(names)
        self.files = self._pair_files()
        mapping = None if label_mapping is None else _read_mapping(label_mapping)
        self.class_names = None if names is None else tuple(names)
        if self.class_names is not None:
            self.num_classes = len(self.class_names)
        elif num_classes is not None:
            self.num_classes = num_classes
        elif mapping:
            self.num_classes = 1 + max(c for c in mapping.values() if c not in (None, ignore_index))
        else:
            raise ValueError(
                f"{self.root}: the number of classes is unknown; give a names file or put names.txt there"
            )
        if 0 <= ignore_index < self.num_classes:
            raise ValueError(
                f"ignore_index: got {ignore_index}, which is one of the {self.num_classes} classes"
            )
        self._table = self._lookup_table(mapping, reduce_zero_label)

    def _pair_files(self) -> list[tuple[Path, Path]]:
        images, annotations = self.root / "images" / self.split, self.root / "annotations" / self.split
        for folder in (self.root, images, annotations):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{folder}: no such folder (expected images/SPLIT and annotations/SPLIT)"
                )
        pictures = sorted(path for path in images.iterdir() if path.suffix.lower() in _SUFFIXES)
        if not pictures:
            raise ValueError(f"{images}: holds no .jpg or .png image")
        labels = {path.stem: path for path in annotations.iterdir() if path.suffix.lower() == ".png"}
        missing = [path for path in pictures if path.stem not in labels]
        if missing:
            more = f" (and {len(missing) - 1} more images without label)" if len(missing) > 1 else ""
            raise FileNotFoundError(
                f"{missing[0]}: image without label, expected {annotations / missing[0].stem}.png{more}"
            )
        return [(path, labels[path.stem]) for path in pictures]

    def _lookup_table(self, mapping: dict[int, int | None] | None, reduce_zero_label: bool) -> np.ndarray:
        table = np.full(1 << 16, _INVALID, dtype=np.int64)
        table[255] = self.ignore_index
        if 0 <= self.ignore_index < len(table):
            table[self.ignore_index] = self.ignore_index
        if mapping is None:
            first = int(reduce_zero_label)
            table[first : first + self.num_classes] = np.arange(self.num_classes)
            if reduce_zero_label:
                table[0] = self.ignore_index
            return table
        for stored, target in mapping.items():
            target = self.ignore_index if target is None else target
            if not 0 <= stored < len(table) or not (
                target == self.ignore_index or 0 <= target < self.num_classes
            ):
                raise ValueError(
                    f"label_mapping: {stored} -> {target}, expected a value below {len(table)} and a class "
                    f"in 0...{self.num_classes - 1} (or {self.ignore_index} to ignore)"
                )
            table[stored] = target
        return table

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        image_path, label_path = self.files[index]
        image = read_image(image_path)
        stored = read_label(label_path)
        if stored.shape != tuple(image.shape[1:]):
            raise ValueError(
                f"{label_path}: the label map is {stored.shape[1]}x{stored.shape[0]} pixels, "
                f"its image {image.shape[2]}x{image.shape[1]}"
            )
        largest = int(stored.max(initial=0))
        label = self._table[stored] if largest < len(self._table) else np.full(stored.shape, _INVALID)
        if (label == _INVALID).any():
            row, column = np.argwhere(label == _INVALID)[0]
            known = np.flatnonzero(self._table != _INVALID)
            raise ValueError(
                f"{label_path}: label value {stored[row, column]} at row {row}, column {column} is out of "
                f"range, expected {_spans(known)} for {self.num_classes} classes"
            )
        return {"image": image, "label": torch.from_numpy(label), "name": image_path.stem}


def _spans(values: np.ndarray) -> str:
    """[0, 1, 2, 255] -> '0...2, 255'."""
    parts = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{p[0]}...{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def open_dataset(
    data: str,
    split: str,
    *,
    names: str | None = None,
    reduce_zero_label: bool = True,
    label_mapping: Mapping[int, int | None] | str | None = None,
    ignore_index: int = 255,
    num_classes: int | None = None,
    synthetic_length: int = 64,
    synthetic_size: int = 96,
) -> Dataset:
    """`data` as on the command line: "synthetic", or the folder of a `SegmentationFolder`."""
    if data == "synthetic":
        from segvit.synthetic import SyntheticShapes

        return SyntheticShapes(split, synthetic_length, synthetic_size)
    return SegmentationFolder(
        data,
        split,
        names=names,
        reduce_zero_label=reduce_zero_label,
        label_mapping=label_mapping,
        ignore_index=ignore_index,
        num_classes=num_classes,
    )
