"""A data set on disk: pictures with label maps in one of the usual layouts, and what their values mean.

    ROOT/images/SPLIT/*          pictures
    ROOT/annotations/SPLIT/*     label maps of the same names and sizes
    ROOT/names.txt               class names, one a line, perhaps with colours (optional; any file may be
                                 given instead, and ADE20K's own objectInfo150.txt is found)

Other layouts: `segvit.data.layouts`. Every problem is a `ValueError` or `FileNotFoundError` of one line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from segvit.data.coding import Coding, choose_coding
from segvit.data.inspection import Facts, Summary, colour_text, inspect, size_problem, summarize
from segvit.data.known import Form, Known
from segvit.data.labels import Reading, Zero, decide, read_mapping, spans
from segvit.data.layouts import Listing, find_layout
from segvit.data.names import ClassList, read_classes
from segvit.data.pictures import read_image
from segvit.data.shards import Shards, are_shards
from segvit.data.stored import StoredLabel, colours_problem
from segvit.data.synthetic import SyntheticShapes
from segvit.options import LabelOptions

__all__ = ["SegmentationFolder", "check_data", "folder_options", "open_dataset"]

_INVALID = -(1 << 62)


class SegmentationFolder(Dataset):
    """Images with label maps from a folder, sorted by name.

    Items are {"image": uint8 (channels, H, W), "label": int64 (H, W), "name": str}, with labels in
    0 ... num_classes - 1 or `ignore_index`.

    Args:
        root: the folder; "ade20k:FOLDER" and so on for a data set in its own files (`segvit.data.known`).
        split: "training" or "validation" (also found as train, val, train2017, ...), or any other's name.
        names: class names, or a file of them (see `read_classes`); `root/names.txt`, or ADE20K's
            `root/objectInfo150.txt`, when not given.
        reduce_zero_label: True: stored 0 is ignored, stored k is class k - 1 (as in ADE20K). False: stored k
            is class k. "auto": what the stored values of all label maps of training and validation, the names
            and the layout say, see `segvit.data.labels.decide`; they are looked at, once.
        label_mapping: stored value -> class (None or ignore_index: ignored), a dict or a JSON file; replaces
            `reduce_zero_label`.
        ignore_index: the label of pixels without a class; stored 255 means it too, where 255 is no class.
        num_classes: in place of names.
        default_names: where neither `names` nor the folder has any and their number is `num_classes`.
        image_pattern, label_pattern, split_list: where the files are, see `segvit.data.layouts`; one of the
            usual layouts when not given.
        validation_share: where there is no validation split, this share of the training pictures is it, and
            not in training any more.
        channels: of the images, see `read_image`.
        value_range: stored values of pictures that become 0 and 255, see `read_image`.
        progress: show a progress bar while looking at the label maps.
        meaning: what the label values of other data mean, of their `meaning()`: these mean the same.

    Raises:
        FileNotFoundError: no such folder, names file or label map.
        ValueError: no image in the split; a mapping to classes that are not there; number of classes unknown;
            label values that no reading or several readings fit; when an item is read, a file that cannot be
            decoded, a label map of another size than its image, or a label value out of range.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "training",
        names: str | Path | tuple[str, ...] | list[str] | None = None,
        reduce_zero_label: Zero = "auto",
        label_mapping: Mapping[int, int | None] | str | Path | None = None,
        ignore_index: int = 255,
        num_classes: int | None = None,
        *,
        default_names: Sequence[str] | None = None,
        image_pattern: str | None = None,
        label_pattern: str | None = None,
        split_list: str | None = None,
        validation_share: float = 0.0,
        channels: int = 3,
        value_range: Sequence[float] = (),
        progress: bool = False,
        meaning: Mapping[str, Any] | None = None,
    ) -> None:
        if reduce_zero_label not in (True, False, "auto"):
            raise ValueError(f"reduce_zero_label: got {reduce_zero_label!r}, expected True, False or 'auto'")
        if not 0 <= validation_share < 1:
            raise ValueError(f"validation_share: got {validation_share}, expected 0 to below 1")
        self.split, self.ignore_index = split, ignore_index
        self.channels, self.value_range, self.progress = channels, tuple(value_range) or None, progress
        self.layout = find_layout(root, image_pattern, label_pattern, split_list)
        self.root = self.layout.root
        self.validation_share = validation_share
        if self.known:
            for option, value in (("names", names), ("label_mapping", label_mapping)):
                if value is not None:
                    raise ValueError(f"{option}: not with {self.known[0].title}, which is known")
            if reduce_zero_label != "auto":
                raise ValueError(f"reduce_zero_label: not with {self.known[0].title}, which is known")
            label_mapping = self.known[1].table(self.root)
        classes = self.known[0].classes if self.known else self._class_list(names)
        self.listing, self._split_on_disk, self.said = self.layout.pool(split, validation_share)
        self.files = self._pairs(self.listing)

        mapping = None if label_mapping is None else read_mapping(label_mapping)
        self.class_names = None if classes is None else classes.names
        self.palette = None if classes is None else classes.colours
        if self.class_names is not None:
            self.num_classes = len(self.class_names)
        elif num_classes is not None:
            self.num_classes = num_classes
            if default_names is not None and len(default_names) == num_classes:
                self.class_names = tuple(default_names)
        elif mapping and any(target not in (None, ignore_index) for target in mapping.values()):
            self.num_classes = 1 + max(c for c in mapping.values() if c not in (None, ignore_index))
            if self.num_classes > 1 << 15:  # before anything is as long as that
                raise ValueError(f"label_mapping: got class {self.num_classes - 1}, expected at most 32767")
        else:
            raise ValueError(
                f"{self.root}: the number of classes is unknown; give a names file or put names.txt there"
            )
        if 0 <= ignore_index < self.num_classes:
            raise ValueError(
                f"ignore_index: got {ignore_index}, which is one of the {self.num_classes} classes (a stored "
                f"value without class is ignored by --label-mapping, 0 by --reduce-zero-label)"
            )
        self._seen: set[int] = set()
        self._coding = Coding()
        self._told: Coding | None = None
        if meaning and any((index or 0) >= self.num_classes for index in meaning["values"].values()):
            meaning = None  # of other classes, which is for whoever compares them
        if meaning:
            self._seen = set(meaning["seen"])
            if self._seen:  # else all counted by colour, and no number meant anything
                mapping = {int(value): index for value, index in meaning["values"].items()}
            by_colour, forms = (frozenset(meaning[key]) for key in ("by_colour", "forms"))
            self._coding = self._told = Coding(by_colour, forms, meaning["white"])
        self._mapping, self._wanted = mapping, reduce_zero_label
        self._zero = "ignored" if classes is not None and classes.ade20k else self.layout.zero
        self._colours: dict[int, int | None] = {}
        if classes is not None and classes.colours:
            self._colours = {_packed(colour): index for index, colour in enumerate(classes.colours)}
            self._colours |= {_packed(colour): None for colour in classes.ignored}
        elif meaning:
            self._colours = {int(code, 16): index for code, index in meaning["colours"].items()}
        self._summary: Summary | None = None
        if self._needs_all or (mapping is None and reduce_zero_label == "auto"):
            self._decide()
        else:
            self._set_reading(self._read(None))

    def _class_list(self, names: Any) -> ClassList | None:
        if names is None:
            candidates = (self.root / "names.txt", self.root / "objectInfo150.txt")
            names = next((path for path in candidates if path.is_file()), None)
        if isinstance(names, (str, Path)):
            return read_classes(names)
        return None if names is None else ClassList(tuple(names))

    def _pairs(self, listing: Listing) -> list[tuple[Path, Path]]:
        if listing.unlabelled:
            (picture, expected), *more = listing.unlabelled
            rest = f" (and {len(more)} more images without label)" if more else ""
            raise FileNotFoundError(f"{picture}: image without label, expected {expected}{rest}")
        if not listing.pairs:
            where = self.layout.images.replace("{split}", self._split_on_disk or "").partition("*")[0]
            raise ValueError(
                f"{(self.root / where)}: holds no .jpg or .png image, nor another of a known kind"
            )
        return listing.pairs

    # What the values mean

    @property
    def known(self) -> tuple[Known, Form] | None:
        """The data set of the field that this is, and in which form, where that was said."""
        return self.layout.known

    @property
    def reduce_zero_label(self) -> bool:
        """Whether stored 0 is ignored and stored k is class k - 1."""
        return self.reading.reduce_zero_label

    def meaning(self) -> dict[str, Any]:
        """What stored values ("values") and colours ("colours", hexadecimal) mean, a class or None, which of
        both counts ("by_colour", "forms" and "white", of a `Coding`), and which values there are ("seen",
        once they were looked at): of JSON's types, for another folder."""
        return {
            "by_colour": sorted(self._coding.by_colour),
            "forms": sorted(self._coding.forms),
            "white": self._coding.white,
            "values": {str(value): index for value, index in sorted(self.reading.table.items())},
            "colours": {f"{code:06x}": index for code, index in self._colours.items()},
            "seen": sorted(self._summary.values) if self._summary else [],
        }

    def _confirm(self, summary: Summary) -> None:
        """Refuse values that the meaning taken over has not seen and that these files alone give another."""
        if not self._seen or self._mapping is None:
            return
        try:
            own = self._decided(summary, None).table
        except ValueError:  # they do not say anything
            own = self._mapping
        before = spans(sorted(self._seen))
        for value in sorted(summary.values.keys() - self._seen):
            if value not in self._mapping or own.get(value) != self._mapping[value]:
                raise ValueError(
                    f"{summary.where.get(value, self.root)}: label value {value} was not in the data that "
                    f"the model was trained with ({before}); say what the values mean here: "
                    "--reduce-zero-label, --no-reduce-zero-label or --label-mapping"
                )

    @property
    def by_colour(self) -> frozenset[str]:
        """The forms of label maps that count by colour, see `segvit.data.stored.StoredLabel`."""
        return self._coding.by_colour

    def _read(self, summary: Summary | None) -> Reading:
        return self._decided(summary, self._mapping)

    def _decided(self, summary: Summary | None, mapping: Mapping[int, int | None] | None) -> Reading:
        # Where every label map is in colours, no number needs a meaning.
        counts = None if summary is None or not summary.values else summary.values
        wanted = False if counts is None and self._wanted == "auto" else self._wanted
        return decide(
            counts,
            self.num_classes,
            names=self.class_names,
            reduce_zero_label=wanted,
            mapping=mapping,
            ignore_index=self.ignore_index,
            zero=self._zero,
            where=None if summary is None else summary.where,
            source=self.root,
        )

    def _set_reading(self, reading: Reading) -> None:
        self.reading = reading
        self._numbers = _Lookup(reading.table, self.ignore_index)
        self._colour_table = _Lookup(self._colours, self.ignore_index, dense=False)

    def _decide(self) -> Summary:
        """Look at the label maps and find what they mean; a file that cannot be used, `check` reports."""
        if self._summary is not None:
            return self._summary
        groups = {self.split: self.files}
        if self._needs_all:
            for split in ("training", "validation"):
                known = {picture for pairs in groups.values() for picture, _ in pairs}
                if split not in groups and (other := self._other(split, known)):
                    groups[split] = other
            groups = {split: groups[split] for split in sorted(groups, key=_reading_order)}
        facts = {split: self._inspect(pairs) for split, pairs in groups.items()}
        self._problem = next((one.problem for one in facts[self.split] if one.problem), None)
        if all(one.problem for some in facts.values() for one in some):
            raise ValueError(self._problem)
        labels = {split: [label for _, label in pairs] for split, pairs in groups.items()}
        self._coding = choose_coding(
            [one for some in facts.values() for one in some],
            [label for some in labels.values() for label in some],
            self._colours,
            self.num_classes,
            mapping=None if self._seen else self._mapping,
            reduced=self._wanted is True,
            told=self._told,
        )
        summaries = {split: summarize(facts[split], labels[split], self._coding.code) for split in groups}
        whole = Summary.of(summaries.values())
        if unknown := [colour for colour in whole.colours if colour not in self._colours]:
            raise ValueError(self._unknown_colours(unknown, whole))
        if self.known and self._mapping is not None:
            self.known[0].check(self.known[1], self._mapping, whole.where)
        self._confirm(whole)
        self._set_reading(self._read(whole))
        self._coding.check(self.reading, self._colours)
        self._agree(summaries)
        self._summaries, self._summary = summaries, whole
        own = summaries[self.split]
        if own.maps and not any(self._has_class(*held) for held in own.held):
            raise ValueError(f"{self.root}: every pixel of the {self.split} label maps is ignored")
        return whole

    @property
    def _needs_all(self) -> bool:
        """Whether what a split's values mean may depend on another's: training and evaluation must agree."""
        if self._colours and not self.known:
            return True
        if self._mapping is not None or self._wanted is True:
            return False
        return self.num_classes == 2 or (self._wanted == "auto" and self._zero not in ("class", "ignored"))

    def _inspect(self, pairs: Sequence[tuple[Path, Path]]) -> list[Facts]:
        return inspect(
            pairs,
            self.root,
            channels=self.channels,
            progress=self.progress,
            read=self.layout.read_label,
            kind=self.layout.reader,
        )

    def _agree(self, summaries: Mapping[str, Summary]) -> None:
        """Refuse splits of which each says something else."""
        if not self._needs_all or len(summaries) < 2 or "training" not in summaries:
            return
        try:
            alone = self._read(summaries["training"])
        except ValueError:
            return  # the other splits made it clear
        if alone != self.reading:
            values = ", ".join(f"{split} has {spans(sorted(s.values))}" for split, s in summaries.items())
            raise ValueError(
                f"{self.root}: the splits' label values do not mean the same: {values}; say "
                "--no-reduce-zero-label, --reduce-zero-label or --label-mapping"
            )

    def _unknown_colours(self, unknown: Sequence[int], summary: Summary) -> str:
        share = sum(summary.colours[colour] for colour in unknown) / summary.colours.total()
        shown = ", ".join(colour_text(colour) for colour in unknown[:4])
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        what = "no class's" if self._colours else "no label values"
        return (
            f"{summary.where_colour[unknown[0]]}: the colours {shown}{more} ({share:.1%} of the pixels) are "
            f"{what}; give each class its colour in the names file, 'name red green blue', and what is no "
            "class as 'ignore red green blue'"
        )

    def _other(self, split: str, known: set[Path]) -> list[tuple[Path, Path]]:
        try:
            listing, _, _ = self.layout.pool(split, self.validation_share)
        except (ValueError, OSError):
            return []
        return [pair for pair in listing.pairs if pair[0] not in known]

    def check(self) -> list[str]:
        """Look at all label maps and say what was understood: what is there, and what it means.

        Raises:
            ValueError: the files contradict the options, or cannot be used.
        """
        summary = self._decide()
        if self._problem:
            raise ValueError(self._problem)
        own = self._classes_in(self._summaries[self.split])
        if self.split == "training" and len(own) == 1 < self.num_classes:
            (only,) = own
            raise ValueError(
                f"{self.root}: in the training label maps everything that is not ignored is "
                f"{self.class_names[only] if self.class_names else f'class {only}'}: nothing to learn"
            )
        found = []
        if summary.values:
            found.append(f"the values {spans(sorted(summary.values))}")
        if summary.colours:
            found.append(f"{len(summary.colours)} colours")
        empty = sum(not self._has_class(*held) for held in summary.held)
        alone = f"; {empty} of them hold no class at all" if empty else ""
        splits = " and ".join(self._summaries)
        lines = [f"data: {summary.maps} label maps of {splits} hold {' and '.join(found)}{alone}"]
        if summary.values:
            lines.append(f"data: {self.reading.describe(summary.values, self.class_names, self.num_classes)}")
        if summary.colours:
            codes = Reading({code: self._colours[code] for code in summary.colours})
            lines.append(
                f"data: {codes.describe(summary.colours, self.class_names, self.num_classes, colour_text)}"
            )
        if self.split == "training" and len(self._summaries) > 1:
            learnt, all_classes = (self._classes_in(s) for s in (self._summaries["training"], summary))
            if unseen := sorted(all_classes - learnt):
                names = ", ".join(self.class_names[i] if self.class_names else str(i) for i in unseen)
                lines.append(f"data: in validation but never in training: {names}")
        if orphans := self.listing.orphans:
            lines.append(
                f"data: {len(orphans)} label maps of {self.split} without picture, e.g. {orphans[0]}"
            )
        return [*lines, *([f"data: {self.said}"] if self.said else [])]

    def _classes_in(self, summary: Summary) -> set[int]:
        targets = [self.reading.table[value] for value in summary.values]
        targets += [self._colours[colour] for colour in summary.colours]
        return {target for target in targets if target is not None}

    def _has_class(self, values: tuple[int, ...], colours: tuple[int, ...]) -> bool:
        return any(self.reading.table[value] is not None for value in values) or any(
            self._colours[colour] is not None for colour in colours
        )

    # Items

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | str]:
        image_path, label_path = self.files[index]
        image = read_image(image_path, self.channels, self.value_range)
        stored = self.layout.read_label(label_path)
        if stored.colour and not self._colours:
            raise ValueError(colours_problem(label_path, stored))
        (_, height, width), (rows, columns) = image.shape, stored.values.shape
        size, expected = (columns, rows), (width, height)
        if size != expected:
            raise ValueError(size_problem(label_path, size, expected))
        label = torch.from_numpy(self.classes_of(stored, label_path))
        return {"image": image, "label": label, "name": image_path.stem}

    def class_of(self, facts: Facts, value: int) -> int | None:
        """The class of one stored value of a label map, None where it is ignored, -1 where unknown."""
        by_colour, code = self._coding.code(facts, value)
        return (self._colours if by_colour else self.reading.table).get(code, -1)

    def classes_of(self, stored: StoredLabel, path: Path) -> np.ndarray:
        """int64 (H, W): classes and `ignore_index` of a stored label map.

        Raises:
            ValueError: a value or a colour that is none.
        """
        values, lookup = stored.values, self._numbers
        if stored.form in self._coding.by_colour:
            values, lookup = stored.colours(), self._colour_table
        elif stored.form == "bilevel":
            values = values.astype(np.int64) * self._coding.white
        label = lookup(values)
        if (label == _INVALID).any():
            row, column = np.argwhere(label == _INVALID)[0]
            at = f"at row {row}, column {column}"
            if lookup is self._colour_table:
                raise ValueError(
                    f"{path}: colour {colour_text(int(values[row, column]))} {at} is no class's; the names "
                    f"file gives {len(self._colours)} colours, 'name red green blue'"
                )
            raise ValueError(
                f"{path}: label value {values[row, column]} {at} is out of range, expected "
                f"{spans(sorted(self.reading.table))} for {self.num_classes} classes"
            )
        return label


def _reading_order(split: str) -> tuple[bool, bool]:
    return split != "training", split != "validation"


class _Lookup:
    """Stored values to classes, element by element; what is not in the table becomes _INVALID."""

    def __init__(self, table: Mapping[int, int | None], ignore_index: int, dense: bool = True) -> None:
        keys = sorted(table)
        targets = [ignore_index if (target := table[key]) is None else target for key in keys]
        self.keys = np.array(keys, np.int64)
        self.targets = np.array([*targets, _INVALID], np.int64)
        self.low = self.high = 0
        if dense and keys and keys[-1] - keys[0] < 1 << 20:
            self.low, self.high = keys[0], keys[-1] + 1
            self.dense = np.full(self.high - self.low, _INVALID, np.int64)
            self.dense[self.keys - self.low] = targets

    def __call__(self, values: np.ndarray) -> np.ndarray:
        if self.low < self.high and values.size and self.low <= values.min() and values.max() < self.high:
            return self.dense[values.astype(np.int64) - self.low]
        place = np.searchsorted(self.keys, values)
        known = place < len(self.keys)
        known[known] = self.keys[place[known]] == values[known]
        return self.targets[np.where(known, place, -1)]


def _packed(colour: Sequence[int]) -> int:
    red, green, blue = colour
    return red << 16 | green << 8 | blue


def check_data(*datasets: Any) -> list[str]:
    """Look at the label maps of folders; lines that say what they hold and mean.

    Raises:
        ValueError: they contradict the options, or cannot be used.
    """
    lines = [line for dataset in datasets if hasattr(dataset, "check") for line in dataset.check()]
    return list(dict.fromkeys(lines))


def folder_options(config: LabelOptions) -> dict[str, Any]:
    """The options of a command that a `SegmentationFolder` takes too."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(LabelOptions)}


def open_dataset(
    data: str,
    split: str,
    *,
    synthetic_length: int = 64,
    synthetic_size: int = 96,
    **options: Any,
) -> Dataset:
    """`data` as on the command line: "synthetic", shards, or a `SegmentationFolder`'s folder (`options`).

    Raises:
        ValueError: options that shards do not take, which have their names and classes inside; and as those.
    """
    if data == "synthetic":
        if (channels := options.get("channels", 3)) != 3:
            raise ValueError(f"data: synthetic pictures have 3 channels, the model has {channels}")
        return SyntheticShapes(split, synthetic_length, synthetic_size)
    if are_shards(data):
        for name in ("names", "label_mapping", "image_pattern", "label_pattern", "split_list"):
            if options.get(name) is not None:
                raise ValueError(f"{name}: not with shards, which have classes and labels inside")
        taken = ("ignore_index", "channels", "value_range")
        shards = Shards(data, split, **{name: options[name] for name in taken if name in options})
        if options.get("reduce_zero_label", "auto") not in ("auto", shards.reduce_zero_label):
            raise ValueError("reduce_zero_label: not with shards, which have classes and labels inside")
        return shards
    return SegmentationFolder(data, split, **options)
