"""What a folder of images and label maps holds, and how it is understood."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segvit.data.folder import SegmentationFolder, folder_options
from segvit.data.inspection import Facts, colour_text, inspect
from segvit.data.layouts import Layout, Listing
from segvit.options import DataConfig

__all__ = ["Split", "Understood", "files_table", "look", "open_training"]

_NEVER = 10
_NAME = 40


@dataclass
class Split:
    name: str
    listing: Listing
    facts: list[Facts] = field(default_factory=list)


def look(layout: Layout, config: DataConfig) -> tuple[list[Split], dict[str, list[str]]]:
    """The files of every split, and those with which something is wrong."""
    splits = []
    problems: dict[str, list[str]] = {
        "pictures without label map": [],
        "label maps without picture": [],
        "cannot be used": [],
    }
    names: list[Any] = [*layout.splits()] or [None]
    for name in names:
        try:
            listing = layout.listing(name)
        except (FileNotFoundError, ValueError) as error:
            problems["cannot be used"].append(str(error))
            continue
        facts = inspect(
            listing.pairs,
            layout.root,
            channels=config.channels,
            progress=config.progress,
            read=layout.read_label,
            kind=layout.reader,
        )
        splits.append(Split(name or "all", listing, facts))
        problems["pictures without label map"] += [str(picture) for picture, _ in listing.unlabelled]
        problems["label maps without picture"] += map(str, listing.orphans)
        problems["cannot be used"] += [one.problem for one in facts if one.problem]
    return splits, problems


def open_training(config: DataConfig, splits: Sequence[Split]) -> tuple[SegmentationFolder | None, str]:
    """The training split as training would open it, and why it would not."""
    options = {**folder_options(config), "channels": config.channels, "progress": config.progress}
    for split in ("training", "validation"):
        try:
            dataset = SegmentationFolder(config.folder, split, **options)
            if split == "training":
                first = dataset
        except FileNotFoundError as error:
            if split == "training" and len(splits) == 1 and splits[0].name != "all":
                try:  # a folder with one split, of whatever name: to be evaluated on
                    return SegmentationFolder(config.folder, splits[0].name, **options), ""
                except (ValueError, OSError) as other:
                    return None, str(other)
            return (None, str(error)) if split == "training" else (first, "")
        except (ValueError, OSError) as error:
            return None, str(error)
    return first, ""


class Understood:
    """Stored values as classes, or as they are where they could not be understood."""

    def __init__(self, dataset: SegmentationFolder | None, facts: Sequence[Facts], layout: Layout) -> None:
        self.dataset, self.read = dataset, layout.read_label
        if dataset is not None:
            self.names = dataset.class_names or tuple(f"class {i}" for i in range(dataset.num_classes))
        else:
            counts: Counter[tuple[bool, int]] = Counter()
            for one in facts:
                for value, count in one.values.items():
                    counts[one.form == "colour", value] += count
            self.codes = [code for code, _ in sorted(counts.items(), key=lambda item: -item[1])[:256]]
            self.names = tuple(colour_text(value) if colour else str(value) for colour, value in self.codes)

    def meaning(self, one: Facts, value: int) -> int | None:
        """The class of a stored value, None where it is ignored; -1 where it is unknown."""
        if self.dataset is None:
            code = one.form == "colour", value
            return self.codes.index(code) if code in self.codes else -1
        return self.dataset.class_of(one, value)

    def text(self, one: Facts, value: int) -> str:
        """A stored value, as the colour that counts where colours do."""
        by_colour = {"colour"} if self.dataset is None else self.dataset.by_colour
        return colour_text(one.colour_of(value)) if one.form in by_colour else str(value)

    def labels(self, label: Path) -> np.ndarray:
        """(H, W), -1 where there is no class."""
        stored = self.read(label)
        if self.dataset is not None:
            found = self.dataset.classes_of(stored, label)
            return np.where(found == self.dataset.ignore_index, -1, found)
        found = np.full(stored.values.shape, -1)
        for index, (colour, value) in enumerate(self.codes):
            if colour == stored.colour:
                found[stored.values == value] = index
        return found

    def table(self, facts: Sequence[Facts]) -> list[tuple[str, ...]]:
        """Classes with their stored values, shares of the pixels and pictures, largest first."""
        pixels: Counter[int | None] = Counter()
        pictures: Counter[int | None] = Counter()
        stored: dict[int | None, set[str]] = {}
        for one in facts:
            here: set[int | None] = set()
            for value, count in one.values.items():
                index = self.meaning(one, value)
                pixels[index] += count
                here.add(index)
                stored.setdefault(index, set()).add(self.text(one, value))
            pictures.update(here)
        total = max(1, pixels.total())
        rows: list[tuple[str, ...]] = [("class", "stored", "pixels", "pictures")]
        order = sorted(range(len(self.names)), key=lambda index: -pixels[index])
        names: dict[int | None, str] = {index: self.names[index] for index in order}
        names |= {None: "(ignored)", -1: "(unknown)"}
        for index, name in names.items():
            if index in stored:
                values = sorted(stored[index])
                shown = ", ".join(values[:3]) + (", ..." if len(values) > 3 else "")
                rows.append((name[:_NAME], shown, f"{pixels[index] / total:.2%}", str(pictures[index])))
        never = [self.names[index] for index in order if index not in stored]
        rows += [(name[:_NAME], "never", "", "0") for name in never[:_NEVER]]
        if len(never) > _NEVER:
            rows.append((f"and {len(never) - _NEVER} more", "never", "", "0"))
        return rows


def files_table(splits: Sequence[Split]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("split", "pairs", "without label", "without picture", "unusable", "sizes")
    ]
    for split in splits:
        sizes = Counter(one.picture for one in split.facts if one.picture)
        if len(sizes) == 1:
            ((width, height),) = sizes
            text = f"{width}x{height}"
        elif sizes:
            (low, high), usual = (_extreme(sizes), max(sizes, key=lambda size: sizes[size]))
            text = f"{len(sizes)} sizes, {low} to {high}, most often {usual[0]}x{usual[1]}"
        else:
            text = "none"
        listing = split.listing
        unusable = sum(1 for one in split.facts if one.problem)
        counts = (len(listing.pairs), len(listing.unlabelled), len(listing.orphans), unusable)
        rows.append((split.name, *map(str, counts), text))
    return rows


def _extreme(sizes: Counter[Any]) -> tuple[str, str]:
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    return f"{ordered[0][0]}x{ordered[0][1]}", f"{ordered[-1][0]}x{ordered[-1][1]}"
