"""What stored label values mean: decided from all the values that occur, the class names and the options.

`decide` is a pure function. Where the values allow one reading it takes that; where they allow two, or none,
it says so and names the option that settles it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from segvit.system.text import read_json, shown

__all__ = ["Reading", "Zero", "decide", "read_mapping", "spans"]

Zero = bool | Literal["auto"]

_BACKGROUND = {"background", "bg", "_background_", "__background__", "back ground"}
_NOTHING = {
    "void",
    "unlabeled",
    "unlabelled",
    "ignore",
    "ignored",
    "other",
    "others",
    "unknown",
    "nothing",
    "none",
}
_SMOOTH = 12  # more values, and thrice as many as classes, come from smoothing


@dataclass(frozen=True)
class Reading:
    """What every stored value means.

    Attributes:
        table: stored value -> class, or None for pixels without one; a value that is not here is an error.
        reduce_zero_label: stored 0 has no class and stored k is class k - 1.
    """

    table: Mapping[int, int | None]
    reduce_zero_label: bool = False

    def describe(
        self,
        counts: Mapping[int, int],
        names: Sequence[str] | None,
        num_classes: int,
        text: Callable[[int], str] = str,
    ) -> str:
        """Which values are which classes, what is ignored and how much of the pixels, what never occurs."""
        found_in = {value: self.table[value] for value in sorted(counts)}
        classes = {value: index for value, index in found_in.items() if index is not None}
        used = sorted(set(classes.values()))

        def name(index: int) -> str:
            return names[index] if names else f"class {index}"

        by_class = sorted(classes, key=lambda value: classes[value])
        shift = {value - classes[value] for value in by_class}
        if len(by_class) > 3 and len(shift) == 1:
            found = f"{by_class[0]} is {name(used[0])} ... {by_class[-1]} is {name(used[-1])}"
        else:
            shown = [f"{text(value)} is {name(classes[value])}" for value in by_class]
            found = ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
        ignored = [value for value in found_in if value not in classes]
        share = sum(counts[value] for value in ignored) / max(1, sum(counts.values()))
        says = [f"{len(used)} of {num_classes} classes occur: {found}"]
        if ignored:
            listed = spans(ignored) if text is str else ", ".join(map(text, ignored))
            says.append(f"{listed} {'is' if len(ignored) == 1 else 'are'} ignored, {share:.1%} of the pixels")
            if self.reduce_zero_label and 0 in ignored and share > 1 / 4:
                says[-1] += " (to learn 0 too, name it before the others)"
        else:
            says.append("no pixel is ignored")
        if missing := [name(index) for index in range(num_classes) if index not in used]:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            says.append(f"never: {', '.join(missing[:5])}{more}")
        return "; ".join(says)


def decide(
    counts: Mapping[int, int] | None,
    num_classes: int,
    *,
    names: Sequence[str] | None = None,
    reduce_zero_label: Zero = "auto",
    mapping: Mapping[int, int | None] | None = None,
    ignore_index: int = 255,
    zero: str | None = None,
    where: Mapping[int, Path] | None = None,
    source: object = "label maps",
) -> Reading:
    """The meaning of stored values.

    Args:
        counts: stored value -> pixels, over all label maps; None where nobody looked (not with "auto").
        num_classes: number of classes.
        names: their names, if known: a first one such as "background" says that 0 is that class.
        reduce_zero_label: True: 0 is ignored and 1... are the classes; False: 0... are; "auto": as the values
            say. With False, values 0 and 255 alone and two classes, 255 is the second class.
        mapping: stored value -> class or None, in place of that.
        ignore_index: as a stored value ignored, and so is 255 where it is no class.
        zero: what the data set's own convention says of 0: "class", "ignored", "ignored if absent" or None.
        where: a file for each value, for messages.
        source: what a message is about where it is about no single file.

    Raises:
        ValueError: values that no reading allows, that two allow, or that leave nothing to learn.
    """
    if mapping is not None:
        reading = Reading({**_ignored(0, 0, ignore_index), **_checked(mapping, num_classes, ignore_index)})
    else:
        plain, reduced = (
            Reading(_table(num_classes, first, ignore_index), reduce_zero_label=bool(first))
            for first in (0, 1)
        )
        if counts is None:
            return reduced if reduce_zero_label is True else plain
        reading = _choose(counts, num_classes, names, reduce_zero_label, zero, plain, reduced, source)
    if counts is None:
        return reading
    unknown = [value for value in sorted(counts) if value not in reading.table]
    if unknown:
        raise ValueError(_out_of_range(unknown, counts, num_classes, reading, mapping, where or {}, source))
    if all(reading.table[value] is None for value in counts):
        listed = spans(sorted(counts))
        raise ValueError(
            f"{source}: every pixel is ignored: the only values are {listed}"
            + ("; leave --reduce-zero-label out" if reading.reduce_zero_label and 0 in counts else "")
        )
    if num_classes == 1 and set(counts) != {1}:  # 1 alone is that class; 0 and 255 may be a background
        raise ValueError(
            f"{source}: values {spans(sorted(counts))} and a single class leave nothing to tell apart; name "
            "the background as a class too (two names, the one of value 0 first)"
        )
    return reading


def _choose(
    counts: Mapping[int, int],
    num_classes: int,
    names: Sequence[str] | None,
    wanted: Zero,
    zero: str | None,
    plain: Reading,
    reduced: Reading,
    source: object,
) -> Reading:
    seen = set(counts)
    first = names[0].strip().lower() if names else ""
    named_zero = first in _BACKGROUND or first in _NOTHING
    fits_plain, fits_reduced = seen <= plain.table.keys(), seen <= reduced.table.keys()
    if wanted is not True and seen == {0, 255} and plain.table[255] is None:
        if num_classes == 2:
            return Reading({0: 0, 255: 1})
        if wanted == "auto" and num_classes > 2:
            raise ValueError(
                f"{source}: the only values are 0 and 255, but there are {num_classes} classes; give two "
                "names if 255 is the second class, or --no-reduce-zero-label if 255 means ignore"
            )
    if wanted is True:
        if names and named_zero and 0 in seen and num_classes not in seen and fits_plain:
            raise ValueError(
                f"reduce_zero_label: would drop value 0, {_share(counts, [0])} of the pixels, and call value "
                f"1 {names[0]!r}; leave it out, 0 is {names[0]!r} then"
            )
        return reduced
    if wanted is False:
        return plain
    if all(plain.table.get(value, 0) is None for value in seen):
        return plain
    complete = set(range(num_classes)) <= seen
    if zero == "ignored" and fits_reduced and not (complete and 255 in seen):
        return reduced
    if zero == "class" and fits_plain:
        return plain
    if names and fits_reduced and named_zero and {0, num_classes} <= seen:
        raise ValueError(
            f"{source}: values {spans(sorted(seen))}, but {num_classes} names of which the first is "
            f"{names[0]!r}: if 0 is {names[0]!r} a name is missing, if 0 means ignore say --reduce-zero-label"
        )
    if not (fits_plain and fits_reduced):
        return min((plain, reduced), key=lambda reading: len(seen - reading.table.keys()))
    if complete or (named_zero and 0 in seen):
        return plain
    if zero == "ignored if absent" and 0 not in seen and not named_zero:
        return reduced
    title = names[0] if names else "class 0"
    raise ValueError(
        f"{source}: values {spans(sorted(seen))} can be read in two ways with {num_classes} classes; say "
        f"--no-reduce-zero-label if 0 is {title}, or --reduce-zero-label if 0 means ignore and 1 is {title}"
    )


def _ignored(num_classes: int, first: int, ignore_index: int) -> dict[int, None]:
    return {value: None for value in (255, ignore_index) if not first <= value < first + num_classes}


def _table(num_classes: int, first: int, ignore_index: int) -> dict[int, int | None]:
    """Stored `first`, `first` + 1, ... are the classes; below, and 255 where it is no class, is ignored."""
    table: dict[int, int | None] = {first + index: index for index in range(num_classes)}
    return {**dict.fromkeys(range(first)), **_ignored(num_classes, first, ignore_index), **table}


def _checked(mapping: Mapping[int, int | None], num_classes: int, ignore_index: int) -> dict[int, int | None]:
    table: dict[int, int | None] = {}
    for stored, target in mapping.items():
        target = None if target is None or target == ignore_index else target
        if target is not None and not 0 <= target < num_classes:
            raise ValueError(
                f"label_mapping: {stored} -> {target}, expected a class in 0...{num_classes - 1} "
                f"(or {ignore_index} to ignore)"
            )
        table[stored] = target
    return table


def _out_of_range(
    unknown: Sequence[int],
    counts: Mapping[int, int],
    num_classes: int,
    reading: Reading,
    mapping: Mapping[int, int | None] | None,
    where: Mapping[int, Path],
    source: object,
) -> str:
    """The message for values that are no class, with what would mend it."""
    value, seen = unknown[0], sorted(counts)
    others = f" (as {len(unknown) - 1} more values)" if len(unknown) > 1 else ""
    text = (
        f"{where.get(value, source)}: label value {value} ({_share(counts, [value])} of all pixels) is out "
        f"of range, expected {spans(sorted(reading.table))} for {num_classes} classes{others}"
    )
    if mapping is not None:
        return f"{text}; add it to the label mapping (null: ignored)"
    if len(seen) > max(_SMOOTH, 3 * num_classes) and seen[-1] <= 255:
        return (
            f"{text}; {len(seen)} values: compressed with loss, resized with smoothing, or no labels at all"
        )
    if unknown == [num_classes] and not reading.reduce_zero_label:
        return f"{text}; --reduce-zero-label if 0 means ignore, or name one class more"
    if len(seen) == num_classes and value >= 0:
        spread = json.dumps({str(v): index for index, v in enumerate(seen)})
        shown = spread if num_classes <= 12 else "FILE"
        return f"{text}; --label-mapping '{shown}' if these {num_classes} values are the classes in order"
    if value < 0:
        return f"{text}; --ignore-index {value} if it means ignore, else --label-mapping"
    return f"{text}; name every class, or say what is what with --label-mapping"


def _share(counts: Mapping[int, int], values: Sequence[int]) -> str:
    return f"{sum(counts[value] for value in values) / max(1, sum(counts.values())):.2%}"


def spans(values: Sequence[int]) -> str:
    """[0, 1, 2, 255] -> '0...2, 255'; of many pieces the first ones."""
    numbers = np.asarray(values)
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    texts = [f"{p[0]}...{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts]
    return ", ".join(texts if len(texts) <= 9 else [*texts[:8], f"... {numbers[-1]}"])


def read_mapping(source: Mapping[int, int | None] | str | Path) -> dict[int, int | None]:
    """Stored value -> class from a dict or a JSON file.

    Raises:
        FileNotFoundError, ValueError: no such file, or not a mapping of whole numbers.
    """
    values = source if isinstance(source, Mapping) else read_json(source, dict)
    try:
        if not values:
            raise ValueError("it is empty")
        return {_whole(key): value if value is None else _whole(value) for key, value in values.items()}
    except (ValueError, TypeError) as error:
        named = "label_mapping" if isinstance(source, Mapping) else f"label_mapping: {source}"
        raise ValueError(
            f"{named}: expected label value -> class, e.g. {{'7': 0, '8': null}} ({error})"
        ) from None


def _whole(value: Any) -> int:
    try:
        number = None if isinstance(value, (float, bool)) else int(value)
    except (ValueError, TypeError):
        number = None
    if number is None:
        raise ValueError(f"got {shown(value)}, no whole number")
    if not -(1 << 31) <= number < 1 << 32:  # what label files can hold
        raise ValueError(f"got {shown(value)}, no number of 32 bits")
    return number
