"""Class names from a text file, with or without their colours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from segvit.system.text import read_lines, shown
from segvit.system.zips import path_at

__all__ = ["ClassList", "mirrored_classes", "read_classes", "read_names"]

# Begins where blanks begin, so that a long run of them is looked at once.
_COLOUR = re.compile(r"(?<![\s,;])[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})$")
_HEADER = re.compile(r"^name[\s,;]+r\w*[\s,;]+g\w*[\s,;]+b\w*$", re.IGNORECASE)
_IGNORE = "ignore"
_SIDE = re.compile(r"(?<![A-Za-z])([Ll]eft|LEFT|[Rr]ight|RIGHT)(?![a-z])|(?<=[a-z])(Left|Right)(?![a-z])")
_OTHER_SIDE = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
_OTHER_SIDE |= {right: left for left, right in _OTHER_SIDE.items()}


class ClassList(NamedTuple):
    """What a names file says.

    Attributes:
        names: class names in order.
        colours: one (red, green, blue) for each class, or None.
        ignored: colours that mean "no class".
        ade20k: it is ADE20K's own list, whose label maps have 0 for "no class".
    """

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...] | None = None
    ignored: tuple[tuple[int, int, int], ...] = ()
    ade20k: bool = False


def read_names(path: str | Path) -> tuple[str, ...]:
    """Class names from a text file, one a line; blank lines and lines that start with # do not count.

    ADE20K's own list, `objectInfo150.txt`, is understood too: its last column has the names.

    Raises:
        FileNotFoundError, ValueError: as `read_classes`.
    """
    return read_classes(path).names


def read_classes(path: str | Path) -> ClassList:
    """Class names, one a line, or `name red green blue` on every line (blanks, tabs or commas between).

    The colours are those of colour-coded label maps and of overlays. Lines named `ignore` give colours of
    pixels without a class. Blank lines, lines that start with # and a first line `name r g b` do not count.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a text file; no name; a name or colour twice; a colour out of range, or missing.
    """
    path = path_at(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such names file")
    lines = [line for _, line in read_lines(path)]
    ade20k = bool(lines) and lines[0].startswith("Idx\t")
    if ade20k:
        lines = [line.rpartition("\t")[2] for line in lines[1:]]
    matches = [_COLOUR.search(line) for line in lines]
    if any(matches) and lines and _HEADER.match(lines[0]):
        lines, matches = lines[1:], matches[1:]
    colours: list[tuple[int, int, int]] | None = None
    ignored: tuple[tuple[int, int, int], ...] = ()
    names = lines
    if any(matches):
        if not all(matches):
            bare = lines[matches.index(None)]
            raise ValueError(
                f"{path}: {shown(bare)} has no colour, other classes have; give all of them or none"
            )
        found = [(m.string[: m.start()].strip(), (int(m[1]), int(m[2]), int(m[3]))) for m in matches if m]
        if wrong := [f"{name} {colour}" for name, colour in found if max(colour) > 255]:
            raise ValueError(f"{path}: colour out of range: {shown(wrong[0])}, expected 0 to 255")
        _refuse_twice(path, "colours", [" ".join(map(str, colour)) for _, colour in found])
        names = [name for name, _ in found if name != _IGNORE]
        colours = [colour for name, colour in found if name != _IGNORE]
        ignored = tuple(colour for name, colour in found if name == _IGNORE)
    if not names:
        raise ValueError(f"{path}: the names file holds no class name")
    _refuse_twice(path, "class names", names)
    return ClassList(tuple(names), None if colours is None else tuple(colours), ignored, ade20k)


def mirrored_classes(names: Sequence[str] | None) -> list[tuple[int, int]]:
    """Pairs of classes that mirroring exchanges: their names differ in the words left and right alone.

    ("left arm", "head", "right arm") -> [(0, 2)]; also Left-arm and leftArm. A class is in one pair at most.
    """
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    for alike in (str, str.casefold):  # where names differ in capitals too, only those without a partner
        places = {alike(name): index for index, name in enumerate(names or ()) if index not in taken}
        for index, name in enumerate(names or ()):
            other = _SIDE.sub(lambda word: _OTHER_SIDE[word[0]], name)
            place = places.get(alike(other), index) if other != name else index
            if index < place and not {index, place} & taken:
                pairs.append((index, place))
                taken |= {index, place}
    return sorted(pairs)


def _refuse_twice(path: Path, what: str, items: list[str]) -> None:
    if twice := sorted(item for item, count in Counter(items).items() if count > 1):
        raise ValueError(f"{path}: {what} occur twice: {shown(', '.join(twice), 300)}")
