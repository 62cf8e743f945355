"""Data sets of the field in their own files: `ade20k:FOLDER` and so on, wherever a folder is expected.

An entry of `KNOWN` has the classes and, for each form that the data set comes in, where the files lie, what
the stored values mean, how many pictures there are, and which values betray that the files are others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segvit.data.matlab import read_matlab
from segvit.data.names import ClassList, read_classes
from segvit.data.stored import StoredLabel, stored_label, whole_numbers
from segvit.system.text import read_json, read_lines, shown

__all__ = ["KNOWN", "Form", "Known", "known_folder"]

Table = Mapping[int, int | None]


@dataclass(frozen=True)
class Form:
    """One form that a data set comes in.

    Attributes:
        what: a few words.
        images, labels, split_list: patterns, see `segvit.data.layouts`.
        splits: "training" and "validation" as they are called on disk.
        pictures: how many these two have, as published.
        table: from the folder, stored value -> class or None for pixels without one.
        never: stored values that no file of this form has, and what they say.
        read: a label map; the usual way when not given.
        beside: a pattern of files that this also reads.
    """

    what: str
    images: str
    labels: str
    splits: tuple[str, str]
    pictures: tuple[int, int]
    table: Callable[[Path], Table]
    split_list: str | None = None
    never: Mapping[int, str] = field(default_factory=dict)
    read: Callable[[Path], StoredLabel] = stored_label
    beside: str | None = None


@dataclass(frozen=True)
class Known:
    """A data set.

    Attributes:
        title: what people call it.
        names: the file of its classes in `segvit/data/classes`.
        forms: the forms that it comes in, those that say more first.
        below: folders below the given one in which it may lie.
        background: a class for what has none, before the others.
        elsewhere: a file or folder that another data set of the same name has, and which that is.
    """

    title: str
    names: str
    forms: tuple[Form, ...]
    below: tuple[str, ...] = ()
    background: bool = False
    elsewhere: tuple[str, str] | None = None

    @property
    def classes(self) -> ClassList:
        """Its class names, and colours where the data set itself has some."""
        found = read_classes(Path(__file__).parent / "classes" / f"{self.names}.txt")
        return found._replace(names=("background", *found.names)) if self.background else found

    def check(self, form: Form, table: Table, values: Mapping[int, Path]) -> None:
        """Raise ValueError for a stored value that no file of a form has, and name a file that has it."""
        for value in sorted(values):
            if value in form.never or value not in table:
                says = form.never.get(value, "is none of its values")
                raise ValueError(
                    f"{values[value]}: label value {value}: {says}; expected {self.title} ({form.what})"
                )

    def compare(self, form: Form, split: str, pictures: int) -> str:
        """How many pictures there are and how many there should be."""
        published = dict(zip(form.splits, form.pictures, strict=True)).get(split)
        count = f"{self.title}: {pictures:,} picture{'' if pictures == 1 else 's'} of {split}"
        if published is None:
            return count
        return f"{count}, as published" if pictures == published else f"{count}, {published:,} are published"


def known_folder(root: str | Path) -> tuple[Path, str | None]:
    """A folder as on the command line, and the name in `KNOWN` before it, if there is one.

    Raises:
        ValueError: a name that is none.
    """
    name, colon, rest = str(root).partition(":")
    if name in KNOWN and colon:
        return Path(rest), name
    if (
        colon
        and rest
        and not rest.startswith("//")
        and len(name) > 1
        and "/" not in name
        and not Path(root).exists()
    ):
        raise ValueError(f"data: no data set {name!r}; expected {', '.join(KNOWN)}, or a folder")
    return Path(root), None


# What values mean


def _ids(text: str) -> list[int]:
    """'1-3 7' -> [1, 2, 3, 7]."""
    parts = [part.partition("-") for part in text.split()]
    return [number for low, _, high in parts for number in range(int(low), int(high or low) + 1)]


def _table(ids: Iterable[int], ignored: Iterable[int] = ()) -> Callable[[Path], Table]:
    table = {value: index for index, value in enumerate(ids)} | dict.fromkeys(ignored)
    return lambda root: table


def _context_table(background: bool) -> Callable[[Path], Table]:
    def table(root: Path) -> Table:
        path = root / "labels.txt"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; it has the names of PASCAL-Context's 459 labels")
        names = {}
        for number, line in read_lines(path):
            value, colon, name = line.partition(":")
            if not colon or not value.strip().isdecimal() or len(value) > 20:
                raise ValueError(f"{path}: line {number}: got {shown(line)}, expected 'number: name'")
            names[name.strip()] = int(value)
        classes = KNOWN["pascal-context"].classes.names
        if missing := [name for name in classes if name not in names]:
            raise ValueError(f"{path}: has no label {missing[0]!r}")
        rest = 0 if background else None
        found: dict[int, int | None] = {0: rest} | dict.fromkeys(names.values(), rest)
        return found | {names[name]: index + background for index, name in enumerate(classes)}

    return table


# Label maps that are more than a picture


def _read_stuff(path: Path) -> StoredLabel:
    """COCO-Stuff-10K's .mat: `S` counts the names that it holds, so that both of its versions read alike."""
    found = read_matlab(path, "S", "names")
    values = np.asarray(found["S"])
    if values.dtype.kind not in "uifb":
        raise ValueError(f"{path}: got S of {values.dtype}, expected whole numbers")
    values = whole_numbers(values, path).astype(np.int64)
    names = [str(part) for name in np.ravel(found["names"]) for part in np.ravel(name)[:1]]
    if not names or not values.size or values.ndim != 2:
        raise ValueError(f"{path}: S or names is empty, or of another form")
    if names[0] != "unlabeled":
        names.insert(0, "unlabeled")
    classes = {name: index + 1 for index, name in enumerate(KNOWN["coco-stuff"].classes.names)}
    used = np.unique(values)
    if used[0] < 0 or used[-1] >= len(names):
        raise ValueError(f"{path}: label value {used[-1]}, expected 0...{len(names) - 1} by its own names")
    table = np.zeros(len(names), np.int64)
    for value in used.tolist():
        if value and names[value] not in classes:
            raise ValueError(
                f"{path}: label value {value} is {shown(names[value])}, none of COCO-Stuff's 171"
            )
        table[value] = classes.get(names[value], 0)
    return StoredLabel(table[values])


def _read_panoptic(path: Path) -> StoredLabel:
    """COCO panoptic: a colour is the number of a segment, whose category stands in the JSON file."""
    stored = stored_label(path)
    values = stored.values.astype(np.int64)
    red, green, blue = (values >> 16, values >> 8 & 255, values & 255) if stored.colour else [values] * 3
    ids, place = np.unique(red + (green << 8) + (blue << 16), return_inverse=True)
    source = path.parent.with_suffix(".json")
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; it has the categories of {path.name}")
    segments = _segments(source, source.stat().st_mtime_ns).get(path.name)
    if segments is None:
        raise ValueError(f"{path}: is none of the pictures in {source}")
    unknown = [number for number in ids.tolist() if number and number not in segments]
    if unknown:
        raise ValueError(f"{path}: segment {unknown[0]} is none of this picture's in {source}")
    categories = np.array([segments.get(number, 0) for number in ids.tolist()])
    return StoredLabel(categories[place.reshape(values.shape)])


@functools.lru_cache(maxsize=2)
def _segments(path: Path, _: int) -> dict[str, dict[int, int]]:
    """Of every picture: number of a segment -> its category."""
    try:
        return {
            picture["file_name"]: {s["id"]: s["category_id"] for s in picture["segments_info"]}
            for picture in read_json(path, dict)["annotations"]
        }
    except (KeyError, TypeError):
        raise ValueError(f"{path}: expected COCO's panoptic annotations") from None


_SHIFTED = "the labels were made one smaller and 0 became 255"
_STUFF = [value for value in range(1, 183) if value not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}]
_PANOPTIC = _ids(
    "1-11 13-25 27-28 31-44 46-65 67 70 72-82 84-90 92-93 95 100 107 109 112 118-119 122 125 128 130 133 "
    "138 141 144-145 147-149 151 154-156 159 161 166 168 171 175-178 180-181 184-200"
)
_CITYSCAPES = _ids("7-8 11-13 17 19-28 31-33")


def _context(background: bool) -> tuple[Form, ...]:
    zero: Any = _table(range(60)) if background else _table(range(1, 60), [0])
    return (
        Form(
            "PNG, 0 background, 1...59",
            "JPEGImages/*",
            "SegmentationClassContext/*.png",
            ("train", "val"),
            (4998, 5105),
            zero,
            "ImageSets/SegmentationContext/{split}.txt",
            {255: _SHIFTED},
        ),
        Form(
            ".mat with 459 labels, labels.txt",
            "JPEGImages/*",
            "trainval/*.mat",
            ("train", "val"),
            (4998, 5105),
            _context_table(background),
            "ImageSets/Main/{split}.txt",
        ),
    )


_CONTEXT_BELOW = ("VOC2010", "VOCdevkit/VOC2010")
_CITY = ("leftImg8bit/{split}/**/*_leftImg8bit", "gtFine/{split}/**/*_gtFine_")
_TWO_YEARS = ("train2017", "val2017")

KNOWN: dict[str, Known] = {
    "ade20k": Known(
        "ADE20K (SceneParse150)",
        "ade20k",
        (
            Form(
                "PNG, 0 ignored, 1...150",
                "images/{split}/*",
                "annotations/{split}/*",
                ("training", "validation"),
                (20210, 2000),
                _table(range(1, 151), [0]),
                never={255: _SHIFTED},
            ),
        ),
        ("ADEChallengeData2016",),
        elsewhere=("images/ADE", "the full release of ADE20K, with thousands of names"),
    ),
    "pascal-context": Known("PASCAL-Context, 59 classes", "pascal-context", _context(False), _CONTEXT_BELOW),
    "pascal-context-60": Known(
        "PASCAL-Context, 60 classes", "pascal-context", _context(True), _CONTEXT_BELOW, background=True
    ),
    "coco-stuff": Known(
        "COCO-Stuff",
        "coco-stuff",
        (
            Form(
                "10K, .mat",
                "images/*",
                "annotations/*.mat",
                ("train", "test"),
                (9000, 1000),
                _table(range(1, 172), [0]),
                "imageLists/{split}.txt",
                read=_read_stuff,
            ),
            Form(
                "10K, PNG, 0 ignored, 1...171",
                "images/{split}/*",
                "annotations/{split}/*_labelTrainIds",
                ("train2014", "test2014"),
                (9000, 1000),
                _table(range(1, 172), [0]),
                never={255: "0...170 are 164K's"},
            ),
            Form(
                "164K, PNG, 0...170",
                "images/{split}/*",
                "annotations/{split}/*_labelTrainIds",
                _TWO_YEARS,
                (118287, 5000),
                _table(range(171), [255]),
            ),
            Form(
                "164K, PNG, 0...181",
                "images/{split}/*",
                "annotations/{split}/*",
                _TWO_YEARS,
                (118287, 5000),
                _table([value - 1 for value in _STUFF], [255]),
                never=dict.fromkeys(
                    sorted(set(range(182)) - {value - 1 for value in _STUFF}), "one of 11 that no picture has"
                ),
            ),
        ),
    ),
    "coco-panoptic": Known(
        "COCO panoptic",
        "coco-panoptic",
        tuple(
            Form(
                "PNG of segments, JSON",
                images,
                "annotations/panoptic_{split}/*",
                _TWO_YEARS,
                (118287, 5000),
                _table(_PANOPTIC, [0]),
                read=_read_panoptic,
                beside="annotations/panoptic_*.json",
            )
            for images in ("{split}/*", "images/{split}/*")
        ),
    ),
    "cityscapes": Known(
        "Cityscapes",
        "cityscapes",
        (
            Form(
                "PNG, labelTrainIds",
                _CITY[0],
                f"{_CITY[1]}labelTrainIds",
                ("train", "val"),
                (2975, 500),
                _table(range(19), [255]),
            ),
            Form(
                "PNG, labelIds",
                _CITY[0],
                f"{_CITY[1]}labelIds",
                ("train", "val"),
                (2975, 500),
                _table(_CITYSCAPES, [value for value in (*range(34), 255) if value not in _CITYSCAPES]),
            ),
        ),
    ),
    "voc": Known(
        "PASCAL VOC 2012",
        "voc",
        (
            Form(
                "PNG with palette, 255 ignored",
                "JPEGImages/*",
                "SegmentationClass/*",
                ("train", "val"),
                (1464, 1449),
                _table(range(21), [255]),
                "ImageSets/Segmentation/{split}.txt",
            ),
        ),
        ("VOC2012", "VOCdevkit/VOC2012"),
    ),
}
