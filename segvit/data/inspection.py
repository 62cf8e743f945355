"""Facts about all files of a data set: stored label values, sizes, damage. Kept between runs.

What was found is kept in the user's cache folder (SEGVIT_CACHE, or the system's), never beside the data, by
path, size and dates of both files; without a place to write to, it is found again each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segvit.data.pictures import probe, read_image
from segvit.data.stored import GREY, StoredLabel, stored_label
from segvit.system.progress import progress_bar

__all__ = ["Facts", "Summary", "inspect", "state_of", "summarize"]

_FORMAT = 2
_MOST_VALUES = 4096
_FAILED = (ValueError, OSError, ImportError)
_kept: dict[str, Facts] = {}


@dataclass(frozen=True)
class Facts:
    """A picture and its label map.

    Attributes:
        picture, label: width and height as they are seen; None where the file cannot be read.
        values, form: stored value -> pixels, and what it is a value of, see `StoredLabel`.
        palette: of a palette file, stored value -> colour of the values that occur.
        problem: why a file cannot be used, or None.
    """

    picture: tuple[int, int] | None = None
    label: tuple[int, int] | None = None
    values: Mapping[int, int] = field(default_factory=dict)
    form: str = "number"
    palette: Mapping[int, int] | None = None
    problem: str | None = None

    def colour_of(self, value: int) -> int:
        """The colour of one of the values, red << 16 | green << 8 | blue."""
        if self.palette is not None:
            return self.palette[value]
        return value if self.form == "colour" else value * GREY


@dataclass
class Summary:
    """All label maps together.

    Attributes:
        maps: how many.
        values, colours: pixels of every stored value, and of every colour of colour-coded maps.
        where: a label map for each value, and one for each colour.
        held: for every label map, the values and the colours that it holds.
    """

    maps: int = 0
    values: Counter[int] = field(default_factory=Counter)
    colours: Counter[int] = field(default_factory=Counter)
    where: dict[int, Path] = field(default_factory=dict)
    where_colour: dict[int, Path] = field(default_factory=dict)
    held: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable[Summary]) -> Summary:
        """The sum of several."""
        whole = cls()
        for part in parts:
            whole.maps += part.maps
            whole.values.update(part.values)
            whole.colours.update(part.colours)
            whole.where = {**part.where, **whole.where}
            whole.where_colour = {**part.where_colour, **whole.where_colour}
            whole.held += part.held
        return whole


def inspect(
    pairs: Sequence[tuple[Path, Path]],
    root: str | os.PathLike,
    *,
    channels: int = 3,
    progress: bool = False,
    read: Callable[[Path], StoredLabel] = stored_label,
    kind: str = "",
) -> list[Facts]:
    """Facts about every pair of picture and label map, with a progress bar where they are not known yet.

    Args:
        pairs: the files.
        root: their folder.
        channels: of the pictures.
        progress: show the bar.
        read: reads a label map.
        kind: says which that is.
    """
    keys = [_key(picture, label, f"{kind}{channels}") for picture, label in pairs]
    file = _cache_file(root)
    cached = _read_cache(file)
    found: list[Facts | None] = []
    for key, (_, label) in zip(keys, pairs, strict=True):
        entry = cached.get(os.path.abspath(label))
        if key not in _kept and entry and entry[0] == key:
            _kept[key] = _facts(entry[1])
        found.append(_kept.get(key))
    new = [index for index, facts in enumerate(found) if facts is None]
    if new:
        workers = min(8, os.cpu_count() or 1)
        with progress_bar(progress) as bar, ThreadPoolExecutor(workers) as pool:
            task = bar.add_task("look at the data", total=len(new))
            looks = pool.map(lambda index: _look(*pairs[index], channels, read), new)
            for index, facts in zip(new, looks, strict=True):
                found[index] = _kept[keys[index]] = _facts(facts)
                # A file that cannot be read is looked at again: what was missing may be there then.
                if "problem" not in facts:
                    cached[os.path.abspath(pairs[index][1])] = [keys[index], facts]
                bar.advance(task)
        _write_cache(file, cached)
    return [facts for facts in found if facts is not None]


def _look(picture: Path, label: Path, channels: int, read: Callable[[Path], StoredLabel]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    try:
        if channels in (1, 3) and picture.suffix.lower() not in (".tif", ".tiff", ".npy"):
            facts["picture"] = probe(picture, decode=True)
        else:
            facts["picture"] = read_image(picture, channels).shape[:0:-1]
        stored = read(label)
        values, counts = np.unique(stored.values, return_counts=True)
        if len(values) > _MOST_VALUES:
            raise ValueError(f"{label}: {len(values)} different values, no label map")
        facts["label"] = stored.values.shape[::-1]
        facts["values"] = dict(zip(map(str, values.tolist()), counts.tolist(), strict=True))
        facts["form"] = stored.form
        if stored.palette is not None:
            facts["palette"] = {str(v): int(stored.palette[v]) for v in values.tolist()}
        if facts["label"] != facts["picture"]:
            raise ValueError(size_problem(label, facts["label"], facts["picture"]))
    except _FAILED as error:
        facts["problem"] = " ".join(str(error).split())
    return facts


def size_problem(label: Path, found: tuple[int, int], expected: tuple[int, int]) -> str:
    """What to say of a label map of another size (width, height) than its picture."""
    text = f"{label}: the label map is {found[0]}x{found[1]} pixels, its image {expected[0]}x{expected[1]}"
    if found == tuple(expected)[::-1]:
        text += "; drawn on the picture as stored, before its EXIF orientation? Turn one of the two"
    return text


def summarize(
    facts: Sequence[Facts], labels: Sequence[Path], code: Callable[[Facts, int], tuple[bool, int]]
) -> Summary:
    """Counts over label maps without problem.

    Args:
        facts: of the label maps.
        labels: their paths.
        code: of a label map and a value in it, whether a colour counts, and which or which number.

    Raises:
        ValueError: palette files that give the same colour different values.
    """
    summary = Summary()
    numbers: dict[int, tuple[int, Path]] = {}
    for one, label in zip(facts, labels, strict=True):
        if one.problem:
            continue
        summary.maps += 1
        coloured, counts = False, Counter[int]()
        for value, count in one.values.items():
            coloured, key = code(one, value)
            counts[key] += count
        total, where = (
            (summary.colours, summary.where_colour) if coloured else (summary.values, summary.where)
        )
        if not coloured:
            _compare_palettes(one, label, numbers)
        for key, count in counts.items():
            total[key] += count
            where.setdefault(key, label)
        held = tuple(counts)
        summary.held.append(((), held) if coloured else (held, ()))
    return summary


def _compare_palettes(one: Facts, label: Path, numbers: dict[int, tuple[int, Path]]) -> None:
    """Saved with a palette of its own, a picture's numbers mean nothing: elsewhere a colour has others."""
    palette = one.palette or {}
    times = Counter(palette.values())
    for value, colour in palette.items():
        if times[colour] > 1:
            continue
        before, other = numbers.setdefault(colour, (value, label))
        if before != value:
            raise ValueError(
                f"{label}: its palette gives the colour {colour_text(colour)} the value {value}, {other} the "
                f"value {before}: colour-coded label maps; give each class its colour in the names file, "
                "'name red green blue'"
            )


def colour_text(colour: int) -> str:
    """0xff0040 -> '255 0 64', as in a names file."""
    return f"{colour >> 16} {colour >> 8 & 255} {colour & 255}"


# The cache


def _key(picture: Path, label: Path, kind: str) -> str:
    parts = [kind]
    for path in (picture, label):
        try:
            parts += [os.path.abspath(path), state_of(path)]
        except OSError:
            parts += [os.path.abspath(path), "gone"]
    return "|".join(parts)


def state_of(path: Path) -> str:
    """What changes when a file does: also where its date is a fixed one, as in archives that are unpacked."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _cache_folder() -> Path:
    if chosen := os.environ.get("SEGVIT_CACHE"):
        return Path(chosen)
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "segvit" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "segvit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segvit"


def _cache_file(root: str | os.PathLike) -> Path | None:
    folder = hashlib.sha256(os.path.abspath(root).encode("utf-8", "surrogateescape")).hexdigest()
    try:
        return _cache_folder() / "labels" / f"{folder[:24]}-{_FORMAT}.json"
    except RuntimeError:  # no home folder
        return None


def _read_cache(file: Path | None) -> dict[str, list[Any]]:
    """Label map -> [what it was when it was looked at, facts as JSON]."""
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file else {}
        for _, facts in values.values():
            _facts(facts)
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
    return values


def _write_cache(file: Path | None, values: dict[str, list[Any]]) -> None:
    if file is None:
        return
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(values), encoding="utf-8")
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def _facts(values: dict[str, Any]) -> Facts:
    def integers(mapping: dict[str, int] | None) -> dict[int, int] | None:
        return None if mapping is None else {int(key): value for key, value in mapping.items()}

    return Facts(
        picture=tuple(values["picture"]) if "picture" in values else None,
        label=tuple(values["label"]) if "label" in values else None,
        values=integers(values.get("values")) or {},
        form=values.get("form", "number"),
        palette=integers(values.get("palette")),
        problem=values.get("problem"),
    )
