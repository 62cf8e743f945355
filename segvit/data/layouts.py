"""Where a data set's pictures and label maps lie: patterns of file names; usual ones are found.

A pattern is a path below the folder. `{split}` stands for the split, `*` for anything within one name, `**/`
for folders of any depth; a pattern that ends without a suffix takes every suffix of pictures or label maps.
What the stars of a picture's name stand for, the stars of its label map stand for too:

    leftImg8bit/{split}/**/*_leftImg8bit.png    gtFine/{split}/**/*_gtFine_labelTrainIds.png
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from segvit.data.decoding import PICTURE_SUFFIXES
from segvit.data.inspection import state_of
from segvit.data.known import KNOWN, Form, Known, known_folder
from segvit.data.stored import LABEL_SUFFIXES, StoredLabel, stored_label
from segvit.system.text import read_lines
from segvit.system.zips import ZipPath, path_at

__all__ = ["Layout", "Listing", "find_layout"]

_LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".jp2")
_SPLITS = {"training": ("training", "train"), "validation": ("validation", "val", "valid"), "test": ("test",)}
_PAIR_FOLDERS = (("images", "annotations"), ("images", "masks"), ("images", "labels"), ("img_dir", "ann_dir"))
_ENDINGS = ("", "_mask", "_label", "_labels", "_gt", "_seg")


class _TwinsError(ValueError):
    """Two pictures have one label map."""


class Listing(NamedTuple):
    """The files of a split.

    Attributes:
        pairs: pictures with their label maps, sorted by the picture's path.
        unlabelled: pictures without, and where the label map is looked for.
        orphans: label maps without picture; not where those of other splits lie among them.
    """

    pairs: list[tuple[Path, Path]]
    unlabelled: list[tuple[Path, str]]
    orphans: list[Path]


@dataclass(frozen=True)
class Layout:
    """Patterns of pictures and label maps below a folder, and a file that lists a split's names, if there is.

    Attributes:
        zero: what its own convention says of stored 0: "class", "ignored", "ignored if absent" or None.
        data_set, form: the name of a data set in `segvit.data.known`, and which of its forms this is.
    """

    root: Path
    images: str
    labels: str
    split_list: str | None = None
    zero: str | None = None
    data_set: str | None = None
    form: int = 0
    _found: dict[str, Listing] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        lists = f", split by {self.split_list}" if self.split_list else ""
        return f"{self.images} with {self.labels}{lists}"

    def splits(self) -> list[str]:
        """Names of the splits that are there; none where the patterns know no split."""
        found = self._splits()
        return found if self.known is None else [name for name in self.known[1].splits if name in found]

    @property
    def known(self) -> tuple[Known, Form] | None:
        """The data set, and the form of it, that this is; None where nobody said."""
        return (
            None if self.data_set is None else (KNOWN[self.data_set], KNOWN[self.data_set].forms[self.form])
        )

    @property
    def reader(self) -> str:
        """Names what `read_label` does and reads besides the label map."""
        if self.known is None:
            return ""
        form = self.known[1]
        beside = sorted(path for _, path in _matches(self.root, form.beside, ("",))) if form.beside else []
        return " ".join([form.what, *(f"{path.name} {state_of(path)}" for path in beside)])

    def read_label(self, path: Path) -> StoredLabel:
        """A label map as it is stored."""
        return stored_label(path) if self.known is None else self.known[1].read(path)

    def _splits(self) -> list[str]:
        pattern = self.split_list or self.images
        if "{split}" not in pattern:
            return []
        before, after = pattern.split("{split}", 1)
        parent, _, start = before.rpartition("/")
        end = after.partition("/")[0]
        end = "" if "*" in end and not self.split_list else end
        folder = self.root / parent
        if not folder.is_dir():
            return []
        found = []
        for path in folder.iterdir():
            name = path.name
            fits = name.startswith(start) and name.endswith(end) and len(name) > len(start) + len(end)
            if fits and not name.startswith(".") and path.is_dir() != bool(self.split_list):
                found.append(name[len(start) : len(name) - len(end)])
        return sorted(found)

    def like_ade20k(self) -> Layout:
        """This layout, with ADE20K's convention where it has the folders of ADE20K.

        Others use these folders with other values, so it decides only what does not concern a pixel: that 0,
        where it never occurs, is not the first class.
        """
        ade20k = (self.images, self.labels) == ("images/{split}/**/*", "annotations/{split}/**/*")
        if not ade20k or self.split_list or not set(self.splits()) <= {"training", "validation"}:
            return self
        return replace(self, zero="ignored if absent")

    def resolve(self, split: str) -> str | None:
        """The split's name on disk: the same, or another usual one (train, val, train2017, ...).

        Raises:
            ValueError: several could be meant.
        """
        found = self.splits()
        if split in found:
            return split
        if self.known is not None:
            name = dict(zip(("training", "validation"), self.known[1].splits, strict=True)).get(split)
            return name if name in found else None
        group = _group(split)
        similar = [name for name in found if group is not None and _group(name) == group]
        if len(similar) > 1:
            raise ValueError(
                f"{self.root}: split {split!r} could be {' or '.join(similar)}; name one of them"
            )
        return similar[0] if similar else None

    def listing(self, split: str | None) -> Listing:
        """The files of a split by its name on disk; None: all there are.

        Raises:
            FileNotFoundError: no such folder or list, or the list names a picture that is not there.
            ValueError: two pictures have one name, and with it one label map.
        """
        key = split or ""
        if key not in self._found:
            self._found[key] = self._list(split)
        return self._found[key]

    def _list(self, split: str | None) -> Listing:
        patterns = [p.replace("{split}", split or "") for p in (self.images, self.labels)]
        for pattern in patterns:
            base = self.root / _base(pattern)
            if not base.is_dir():
                raise FileNotFoundError(f"{base}: no such folder (expected {self})")
        pictures = sorted(_matches(self.root, patterns[0], PICTURE_SUFFIXES), key=lambda match: match[1])
        named = self._named(split, pictures) if self.split_list else None
        labels: dict[tuple[str, ...], list[Path]] = {}
        for captured, path in _matches(self.root, patterns[1], LABEL_SUFFIXES + _LOSSY):
            labels.setdefault(captured, []).append(path)
        taken = {path for paths in labels.values() for path in paths} if patterns[0] != patterns[1] else set()
        pairs, unlabelled = [], []
        used: dict[tuple[str, ...], Path] = {}
        for captured, picture in pictures:
            if picture in taken or (named is not None and captured not in named):
                continue
            if found := labels.get(captured):
                order = LABEL_SUFFIXES + _LOSSY
                label = min(found, key=lambda path: order.index(path.suffix.lower()))
                if twin := used.get(captured):
                    raise _TwinsError(
                        f"{picture}: and {twin} are two pictures with one label map, {label}; move one "
                        "away, or say which are meant with --image-pattern and --label-pattern"
                    )
                used[captured] = picture
                pairs.append((picture, label))
            else:
                unlabelled.append((picture, str(self.root / _filled(patterns[1], captured))))
        orphans = [path for captured, paths in labels.items() if captured not in used for path in paths]
        # Where label maps of all splits lie together, those of others are no orphans.
        others = named is not None or ("{split}" in self.images and "{split}" not in self.labels)
        return Listing(pairs, unlabelled, [] if others else sorted(orphans))

    def _list_path(self, split: str | None) -> Path:
        return self.root / str(self.split_list).replace("{split}", split or "")

    def _named(self, split: str | None, pictures: list[tuple[tuple[str, ...], Path]]) -> set[tuple[str, ...]]:
        """What the stars stand for in the pictures of a split's list.

        A line has what the star stands for, or a picture's name, perhaps with folders before it, of which as
        many count as tell it from others; perhaps behind that, after a blank, more.
        """
        path = self._list_path(split)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such list of the split's pictures")
        if _count_stars(self.images)[1] != 1:
            raise ValueError(f"split_list: needs an image pattern with one *, got {self.images!r}")
        stars = {captured[-1] for captured, _ in pictures}
        # The folders of every picture by its name, and by its last folder and name.
        known: dict[tuple[str, ...], dict[tuple[str, ...], tuple[str, ...]]] = {}
        for captured, picture in pictures:
            (*folders, _), (stem,) = _key(picture.parts), _key((picture.stem,))
            for name in {captured[-1], captured[-1] if stem in stars else stem}:
                for key in ((name,), (*folders[-1:], name)):
                    known.setdefault(key, {})[captured] = tuple(folders)
        named: set[tuple[str, ...]] = set()
        for _, line in read_lines(path):
            first, whole = (_key(PurePosixPath(text).parts or (text,)) for text in (line.split()[0], line))
            # Names have blanks in them too; of two paths the second is no name.
            blank = " " in whole[-1] or (_stem(first[-1]),) not in known
            *under, name = whole if blank and (_stem(whole[-1]),) in known else first
            found = known.get((_stem(name),), {})
            several = len(found) > 1
            if several:  # of which folders tell one
                found = known.get((*under[-1:], _stem(name)), {}) if under else {}
                alike = {captured: _count_alike(folders, under) for captured, folders in found.items()}
                most = max(alike.values(), default=0)
                found = {captured: found[captured] for captured, same in alike.items() if same == most}
            if len(found) != 1:
                what = "several of that name; give their folders" if several else "no such picture"
                raise FileNotFoundError(f"{path}: names {line!r}, but {self.images} has {what}")
            named.update(found)
        return named

    def pool(self, split: str, share: float) -> tuple[Listing, str | None, str]:
        """The files of a split, `training` where there is only one, and `validation` a share of it.

        Returns:
            The files, the split's name on disk (None: there is one pool), and a line to say, or "".

        Raises:
            FileNotFoundError: no such split.
        """
        name = self.resolve(split)
        group = _group(split)
        has_validation = self.resolve("validation") is not None if self.known else False
        has_validation = has_validation or any(_group(other) == "validation" for other in self.splits())
        if name is not None and (group != "training" or has_validation):
            return self.listing(name), name, ""
        rest = self.resolve("training") if group == "validation" else name
        if group not in ("training", "validation") or (self.splits() and rest is None):
            where = self.root / _base(self.images.replace("{split}", split))
            here = ", ".join(self.splits()) or "none"
            raise FileNotFoundError(f"{where}: no such folder (splits here: {here})")
        whole = self.listing(rest)
        if not share or len(whole.pairs) < 2:
            if group == "training":
                return whole, rest, ""
            where = self.root / _base(self.images.replace("{split}", split))
            few = f", and {len(whole.pairs)} training pictures are too few to share" if share else ""
            raise FileNotFoundError(f"{where}: no such folder (expected {self}){few}")
        # By a hash of the name alone: the same pictures whatever else is in the folder, and on every machine;
        # but one at least is on each side.
        places = {picture: _place(picture.relative_to(self.root).as_posix()) for picture, _ in whole.pairs}
        order = sorted(places, key=lambda picture: places[picture])
        count = min(max(1, sum(place < share for place in places.values())), len(order) - 1)
        held = set(order[:count])
        keep = [pair for pair in whole.pairs if (pair[0] in held) == (group == "validation")]
        said = (
            f"no validation split: {count} of the {len(whole.pairs)} training pictures, chosen by their "
            "names, are kept for it (--validation-share)"
        )
        return Listing(keep, whole.unlabelled, whole.orphans), rest, said


def find_layout(
    root: str | Path,
    image_pattern: str | None = None,
    label_pattern: str | None = None,
    split_list: str | None = None,
) -> Layout:
    """The layout of a folder, by the patterns given or the only usual one that fits.

    Args:
        root: the folder, perhaps with a known data set's name before it (`segvit.data.known`).
        image_pattern, label_pattern, split_list: see `Layout`.

    Raises:
        FileNotFoundError: no such folder, or no layout fits.
        ValueError: several fit; half of the patterns is missing, or they do not go together; patterns for a
            known data set.
    """
    root, known = known_folder(root)
    root = path_at(root)
    if isinstance(root, ZipPath) and root.is_dir():
        root = root.top()
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder (expected images/SPLIT and annotations/SPLIT)")
    if known is not None:
        if image_pattern or label_pattern or split_list:
            raise ValueError(
                f"image_pattern, label_pattern, split_list: not with {known}:, whose files are known"
            )
        return _find_known(root, known)
    if image_pattern or label_pattern:
        if not (image_pattern and label_pattern):
            missing = "label_pattern" if image_pattern else "image_pattern"
            raise ValueError(f"{missing}: pictures and label maps both need a pattern")
        if any("{split}" in PurePosixPath(pattern).name for pattern in (image_pattern, label_pattern)):
            raise ValueError("image_pattern: {split} must stand in the name of a folder")
        stars = [_count_stars(pattern) for pattern in (image_pattern, label_pattern)]
        if stars[0] != stars[1] or not sum(stars[0]):
            raise ValueError(
                f"label_pattern: got {label_pattern!r}, expected the stars of {image_pattern!r}, at least one"
            )
        return Layout(root, image_pattern, label_pattern, split_list)
    for candidates in _usual(root, split_list):
        fitting = [layout for layout in candidates if _is_there(layout) and _has_pairs(layout)]
        if len(fitting) > 1:
            raise ValueError(
                f"{root}: pictures and label maps could be {' or '.join(map(str, fitting))}; choose with "
                "--image-pattern and --label-pattern"
            )
        if fitting:
            return fitting[0].like_ade20k()
    plain = Layout(root, "images/{split}/**/*", "annotations/{split}/**/*", split_list)
    if plain.splits():
        return plain.like_ade20k()
    expected = "images/SPLIT and annotations/SPLIT, or --image-pattern and --label-pattern"
    gone = next((path for path in (root / "images", root / "annotations") if not path.is_dir()), None)
    if gone is None:
        raise FileNotFoundError(f"{root}: no picture with a label map here (expected {expected})")
    raise FileNotFoundError(f"{gone}: no such folder (expected {expected})")


def _find_known(root: Path, name: str) -> Layout:
    known = KNOWN[name]
    for folder in (root, *(root / name for name in known.below)):
        for number, form in enumerate(known.forms):
            layout = Layout(folder, form.images, form.labels, form.split_list, data_set=name, form=number)
            if _is_there(layout) and _has_pairs(layout):
                return layout
        if known.elsewhere and (folder / known.elsewhere[0]).exists():
            raise ValueError(f"{folder}: is {known.elsewhere[1]}; expected {known.title}")
    forms = " or ".join(dict.fromkeys(f"{form.images} with {form.labels}" for form in known.forms))
    raise FileNotFoundError(f"{root}: no {known.title} here (expected {forms})")


def _usual(root: Path, split_list: str | None) -> Iterator[list[Layout]]:
    """Usual layouts; those of the first list that fits are looked at alone."""
    voc = Layout(
        root, "JPEGImages/*", "SegmentationClass/*", "ImageSets/Segmentation/{split}.txt", zero="class"
    )
    cityscapes = Layout(
        root,
        "leftImg8bit/{split}/**/*_leftImg8bit",
        "gtFine/{split}/**/*_gtFine_labelTrainIds",
        zero="class",
    )
    yield [
        voc,
        cityscapes,
        *(
            Layout(root, pictures, labels, split_list)
            for images, annotations in _PAIR_FOLDERS
            for ending in _ENDINGS
            for pictures, labels in (
                (f"{images}/{{split}}/**/*", f"{annotations}/{{split}}/**/*{ending}"),
                (f"{{split}}/{images}/**/*", f"{{split}}/{annotations}/**/*{ending}"),
            )
        ),
        Layout(root, "{split}/*", "{split}annot/*", split_list),
        *(Layout(root, "{split}/*", f"{{split}}/*{ending}", split_list) for ending in _ENDINGS[1:]),
    ]
    yield [
        *(
            Layout(root, f"{images}/**/*", f"{annotations}/**/*{ending}", split_list)
            for images, annotations in _PAIR_FOLDERS
            for ending in _ENDINGS
        ),
        Layout(root, "leftImg8bit/**/*_leftImg8bit", "gtFine/**/*_gtFine_labelTrainIds", zero="class"),
        *(Layout(root, "*", f"*{ending}", split_list) for ending in _ENDINGS[1:]),
    ]


def _is_there(layout: Layout) -> bool:
    if "{split}" not in (layout.split_list or layout.images):
        return all((layout.root / _base(pattern)).is_dir() for pattern in (layout.images, layout.labels))
    return any(
        (layout.root / _base(layout.labels.replace("{split}", split))).is_dir()
        and (layout.root / _base(layout.images.replace("{split}", split))).is_dir()
        for split in layout.splits()
    )


def _has_pairs(layout: Layout) -> bool:
    splits: list[str | None] = [*layout.splits()]
    for split in splits or [None]:
        try:
            if layout.listing(split).pairs:
                return True
        except FileNotFoundError:
            continue
        except _TwinsError:  # of a split that need not be the one that is asked for
            return True
    return False


def _group(split: str) -> str | None:
    stem = split.lower().rstrip("0123456789").rstrip("_-")
    return next((group for group, names in _SPLITS.items() if stem in names), None)


def _count_stars(pattern: str) -> tuple[int, int]:
    deep = pattern.count("**/")
    return deep, pattern.replace("**/", "").count("*")


def _base(pattern: str) -> str:
    """The folders of a pattern before its first star."""
    return pattern.partition("*")[0].rpartition("/")[0]


def _has_suffix(pattern: str) -> bool:
    return PurePosixPath(pattern).suffix.lower() in (*PICTURE_SUFFIXES, *LABEL_SUFFIXES)


def _matches(root: Path, pattern: str, suffixes: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Path]]:
    """What the stars stand for, and the path, of every file that a pattern fits; hidden ones do not count."""
    parts = re.split(r"(\*\*/|\*)", pattern)
    expression = "".join(
        {"**/": "((?:[^/]+/)*)", "*": "([^/]*?)"}.get(part, re.escape(part)) for part in parts
    )
    if not _has_suffix(pattern):
        expression += "(?:" + "|".join(re.escape(suffix) for suffix in suffixes) + ")"
    compiled = re.compile(expression, re.IGNORECASE)
    base = _base(pattern)
    depth = None if "**/" in pattern else pattern[len(base) :].strip("/").count("/")
    for path in _walk(root / base, depth):
        if match := compiled.fullmatch(path.relative_to(root).as_posix()):
            yield _key(match.groups()), path


def _walk(folder: Path, depth: int | None) -> Iterator[Path]:
    if isinstance(folder, ZipPath):
        yield from folder.below(depth)
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if depth is None or depth > 0:
                    yield from _walk(folder / entry.name, None if depth is None else depth - 1)
            elif entry.is_file():
                yield folder / entry.name


def _key(captured: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(unicodedata.normalize("NFC", part) for part in captured)


def _stem(name: str) -> str:
    return PurePosixPath(name).stem if _has_suffix(name) else name


def _filled(pattern: str, captured: tuple[str, ...]) -> str:
    parts = iter(captured)
    name = re.sub(r"\*\*/|\*", lambda _: next(parts), pattern)
    return name if _has_suffix(name) else f"{name}.png"


def _count_alike(folders: Sequence[str], others: Sequence[str]) -> int:
    """How many of the last folders of two paths are the same."""
    pairs = zip(reversed(folders), reversed(others), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _place(name: str) -> float:
    """Of a name, evenly spread from 0 to 1."""
    data = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")  # names need not be UTF-8
    return int.from_bytes(hashlib.sha256(data).digest(), "big") / (1 << 256)
