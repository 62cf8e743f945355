"""Whether stored label maps count by number or by colour: decided once, over all label maps of a data set.

A map of one channel has numbers, and each number a colour: of its palette, or the grey of that level. A map
of three channels has colours, and where they are all grey, numbers: the levels. What one file means, others
tell: of black, white and red masks, one without red is as black and white as one of 0 and 255.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from segvit.data.inspection import Facts, colour_text
from segvit.data.labels import Reading

__all__ = ["Coding", "choose_coding"]

_Pair = tuple[int, int]  # a number and its colour


@dataclass(frozen=True)
class Coding:
    """How the label maps of a data set count.

    Attributes:
        by_colour: forms of label maps (see `segvit.data.pictures.StoredLabel`) that count by colour; the
            others count by number.
        rivals: numbers that count although the names file has their colours too, each with a label map, where
            it has not all colours; the first that it has not, with a label map, is `lacking`.
    """

    by_colour: frozenset[str] = frozenset({"colour"})
    rivals: Mapping[_Pair, Path] = field(default_factory=dict)
    lacking: tuple[int, Path] | None = None

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
    facts: Sequence[Facts], labels: Sequence[Path], colours: Mapping[int, int | None], num_classes: int
) -> Coding:
    """By colour where the names file has the colours of all label maps of a form.

    Args:
        facts: of all label maps.
        labels: their paths.
        colours: of the names file, with what they mean; empty where it has none, or numbers have a meaning
            that the user gave.
        num_classes: of which numbers may speak.
    """
    seen: dict[str, dict[_Pair, Path]] = {}
    for one, label in zip(facts, labels, strict=True):
        for value in () if one.problem else one.values:
            seen.setdefault(one.form, {}).setdefault((value, one.colour_of(value)), label)

    def known(form: str) -> bool:
        return all(colour in colours for _, colour in seen[form])

    # A map of three channels is coloured where another is, or where it could be.
    by_colour = {"colour"} | {form for form in seen.keys() & {"grey", "palette"} if colours and known(form)}
    if "colour" in seen:
        by_colour.add("grey")
    numbers = {number for number, _ in seen.get("number", ())}
    if numbers and known("number") and (by_colour & seen.keys() or max(numbers) > num_classes):
        by_colour.add("number")
    # Palettes and greys in three channels are colours to look at; of numbers in one channel, 0 and 255 alone.
    doubtful: list[str] = [form for form in ("grey", "palette") if form in seen.keys() - by_colour]
    if "number" not in by_colour and numbers == {0, 255} and num_classes == 2:
        doubtful.append("number")
    pairs = {pair: path for form in doubtful for pair, path in seen[form].items()}
    lacking = next(((colour, path) for (_, colour), path in pairs.items() if colour not in colours), None)
    rivals = {pair: path for pair, path in pairs.items() if pair[1] in colours}
    return Coding(frozenset(by_colour), rivals, lacking)
