"""Whether stored label maps count by number or by colour: decided once, over all label maps of a data set.

A map of one channel has numbers, and each number a colour: of its palette, or the grey of that level. A map
of three channels has colours, and where they are all grey, numbers: the levels. What one file means, others
tell: of black, white and red masks, one without red is as black and white as one of 0 and 255.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segvit.data.inspection import Facts, colour_text
from segvit.data.labels import Reading

__all__ = ["FORMS", "Coding", "choose_coding", "is_meaning", "is_share"]

FORMS = frozenset(("number", "palette", "bilevel", "grey", "colour"))
"""Of label maps: see `segvit.data.stored.StoredLabel`."""
_LOOKED_AT = ("bilevel", "grey", "palette")  # forms that are made to be seen
_Pair = tuple[int, int]  # a number and its colour


def is_meaning(found: Any) -> bool:
    """Whether this has the form of what `SegmentationFolder.meaning` gives, read from a file."""
    try:
        tables = [(found["values"], 10), (found["colours"], 16)]
        keys = [int(key, base) for table, base in tables for key in table]
        classes = [index for table, _ in tables for index in table.values() if index is not None]
        numbers = [*keys, *classes, *found["seen"], found["white"]]
        forms = {*found["by_colour"], *found["forms"]}
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return forms <= FORMS and all(type(n) is int and -1 << 31 <= n < 1 << 32 for n in numbers)


def is_share(found: Any) -> bool:
    """Whether this is a share of the pictures that can be kept for validation."""
    return type(found) in (int, float) and 0 <= found < 1


@dataclass(frozen=True)
class Coding:
    """How the label maps of a data set count.

    Attributes:
        by_colour: forms of label maps (see `segvit.data.stored.StoredLabel`) that count by colour; the
            others count by number.
        forms: those of which this was decided; the data set has no others.
        white: the number that 1 of a bilevel one stands for.
        rivals: numbers that count although the names file has their colours too, each with a label map, where
            it has not all colours; the first that it has not, with a label map, is `lacking`.
    """

    by_colour: frozenset[str] = frozenset({"colour"})
    forms: frozenset[str] = frozenset()
    white: int = 1
    rivals: Mapping[_Pair, Path] = field(default_factory=dict)
    lacking: tuple[int, Path] | None = None

    def code(self, facts: Facts, value: int) -> tuple[bool, int]:
        """Whether the colour of a value in a label map counts, and the colour or the number that does."""
        if facts.form in self.by_colour:
            return True, facts.colour_of(value)
        return False, value * self.white if facts.form == "bilevel" else value

    def check(self, reading: Reading, colours: Mapping[int, int | None]) -> None:
        """Raise ValueError where a number means another class than its colour, and both could count."""
        for (number, colour), path in self.rivals.items():
            if reading.table.get(number, -1) != colours[colour] and self.lacking:
                unknown, where = self.lacking
                raise ValueError(
                    f"{where}: the colour {colour_text(unknown)} is no class's, so that numbers would count, "
                    f"but number {number} and its colour {colour_text(colour)} ({path}) are not the same "
                    f"class; add 'ignore {colour_text(unknown)}' to the names file if it means no class, or "
                    "say what the numbers are with --label-mapping"
                )


def choose_coding(
    facts: Sequence[Facts],
    labels: Sequence[Path],
    colours: Mapping[int, int | None],
    num_classes: int,
    *,
    mapping: Mapping[int, int | None] | None = None,
    reduced: bool = False,
    told: Coding | None = None,
) -> Coding:
    """By colour where the names file has the colours of all label maps of a form.

    Args:
        facts: of all label maps.
        labels: their paths.
        colours: of the names file, with what they mean; empty where it has none.
        num_classes: of which numbers may speak.
        mapping: what the user said that numbers mean: then they are no colours.
        reduced: the user said that 0 means ignore.
        told: what was decided of other data; forms that these had count as they did there.

    Raises:
        ValueError: bilevel label maps whose 1 could be the number 1, or 255 as in others.
    """
    if mapping is not None:
        colours = {}
    seen: dict[str, dict[_Pair, Path]] = {}
    for one, label in zip(facts, labels, strict=True):
        for value in () if one.problem else one.values:
            seen.setdefault(one.form, {}).setdefault((value, one.colour_of(value)), label)

    def known(form: str) -> bool:
        return all(colour in colours for _, colour in seen[form])

    # A map of three channels is coloured where another is, or where it could be.
    by_colour = {"colour"} | {form for form in seen.keys() & {*_LOOKED_AT} if colours and known(form)}
    if "colour" in seen:
        by_colour.add("grey")
    numbers = {number for number, _ in seen.get("number", ())}
    if numbers and known("number") and (by_colour & seen.keys() or max(numbers) > num_classes):
        by_colour.add("number")
    if told:
        by_colour = (by_colour - told.forms) | told.by_colour
    # Of numbers in one channel 0 and 255 alone are colours to look at.
    doubtful: list[str] = [form for form in _LOOKED_AT if form in seen.keys() - by_colour]
    if "number" not in by_colour and numbers == {0, 255} and num_classes == 2:
        doubtful.append("number")
    decided = told.forms if told else frozenset[str]()
    pairs = {pair: path for form in doubtful if form not in decided for pair, path in seen[form].items()}
    lacking = next(((colour, path) for (_, colour), path in pairs.items() if colour not in colours), None)
    rivals = {pair: path for pair, path in pairs.items() if pair[1] in colours}
    by_number = {form: pairs for form, pairs in seen.items() if form not in by_colour}
    settled = mapping.keys() if mapping is not None else {255} if num_classes == 2 and not reduced else ()
    white = told.white if told else _white(by_number, settled)
    return Coding(frozenset(by_colour), decided | seen.keys() | by_colour, white, rivals, lacking)


def _white(seen: Mapping[str, Mapping[_Pair, Path]], settled: Collection[int]) -> int:
    """1 of bilevel label maps as a number: 255 where that is white in all others, which are black else; also
    where there is none, for other data. `settled` are numbers that have a meaning then.
    """
    bilevel = dict(seen.get("bilevel", {})).get((1, 0xFFFFFF))
    others = {pair: path for form, pairs in seen.items() if form != "bilevel" for pair, path in pairs.items()}
    white = others.get((255, 0xFFFFFF))
    if white is None or others.keys() - {(0, 0), (255, 0xFFFFFF)} or 1 in settled:
        return 1
    if 255 in settled:
        return 255
    if bilevel is None:
        return 1
    raise ValueError(
        f"{bilevel}: one bit a pixel, of which 1 is white, and in {white} white is 255: whether 1 means "
        "class 1 or the same as 255 is unknown; store all label maps alike, or give --label-mapping"
    )
