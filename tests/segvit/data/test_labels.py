"""What stored label values mean: values, names and options to one decision or to one refusal."""

import json
from pathlib import Path

import pytest

from segvit.data.labels import decide, read_mapping, spans

ANIMALS = ("background", "cat", "dog")
THINGS = ("sky", "road", "car")
BINARY = ("background", "object")
PLAIN, REDUCED = {0: 0, 1: 1, 2: 2}, {0: None, 1: 0, 2: 1, 3: 2}
MASKS = {0: 0, 255: 1}


def read(values, names, **options):
    """The part of the table that the values need."""
    counts = dict.fromkeys(values, 10) if not isinstance(values, dict) else values
    number = names if isinstance(names, int) else len(names)
    names = None if isinstance(names, int) else names
    table = decide(counts, number, names=names, **options).table
    return {value: table[value] for value in counts}


@pytest.mark.parametrize(
    ("values", "names", "expected"),
    [
        # 0 is the first name: every class occurs, or the first name is what 0 usually is
        ({0, 1, 2}, ANIMALS, PLAIN),
        ({0, 1, 2}, THINGS, PLAIN),
        ({0, 1, 2}, 3, PLAIN),
        ({0, 1, 2, 255}, THINGS, PLAIN),
        ({0, 1}, ANIMALS, PLAIN),
        ({0, 2}, ANIMALS, PLAIN),
        ({0}, ANIMALS, PLAIN),
        ({0, 255}, ("void", "a", "b", "c")[:2], MASKS),
        ({0, 1}, ("void", "sky"), PLAIN),
        ({0, 1}, ("Unlabeled", "sky", "road"), PLAIN),
        # ADE20K's way: N is a value, and there are N names
        ({0, 1, 2, 3}, THINGS, REDUCED),
        ({0, 1, 2, 3, 255}, THINGS, REDUCED),
        ({1, 2, 3}, THINGS, REDUCED),
        ({1, 2, 3}, ANIMALS, REDUCED),  # numbers from one
        ({3}, THINGS, REDUCED),
        ({0, 3}, THINGS, REDUCED),
        ({0, 1, 2, 3}, 3, REDUCED),
        ({0, *range(1, 151)}, 150, {0: None, **{value: value - 1 for value in range(1, 151)}}),
        # binary masks
        ({0, 255}, BINARY, MASKS),
        ({0, 255}, ("off", "on"), MASKS),
        ({0, 255}, 2, MASKS),
        ({0, 1}, BINARY, PLAIN),
        ({0, 1, 255}, BINARY, PLAIN),
        # more classes than 255 can be set apart from
        ({0, 255, 256}, 256, {0: None, 255: 254, 256: 255}),
    ],
)
def test_what_the_values_say(values, names, expected):
    assert read(values, names) == {v: expected.get(v) for v in values}


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        # two readings
        ({0, 1}, THINGS, "values 0...1 can be read in two ways with 3 classes; say --no-reduce-zero-label"),
        ({1, 2}, THINGS, "--no-reduce-zero-label if 0 is sky, or --reduce-zero-label if 0 means ignore and"),
        ({1, 2}, ANIMALS, "can be read in two ways"),
        ({0, 2}, 3, "if 0 is class 0"),
        ({0, 1, 2}, 150, "can be read in two ways with 150 classes"),
        ({0, 1, 2, 3}, ANIMALS, "3 names of which the first is 'background': if 0 is 'background' a name i"),
        ({0, 255}, THINGS, "only values are 0 and 255, but there are 3 classes; give two names if 255 is"),
        # none
        ({0, 1, 2, 7}, THINGS, "label value 7 (25.00% of all pixels) is out of range, expected 0...2, 255"),
        ({0, 1, 2, 3, 4}, THINGS, "label value 4 (20.00% of all pixels) is out of range, expected 0...3, 2"),
        ({0, 1, -1}, BINARY, "label value -1 (33.33% of all pixels) is out of range, expected 0...1, 255 f"),
        ({0, 1, -1}, BINARY, "--ignore-index -1 if it means ignore"),
        ({0, 85, 170, 255}, ("a", "b", "c", "d"), '--label-mapping \'{"0": 0, "85": 1, "170":'),
        ({0, 127, 255}, THINGS, '--label-mapping \'{"0": 0, "127": 1, "255": 2}\''),
        (set(range(0, 256, 2)), THINGS, "128 values: compressed with loss, resized with smoothing, or no l"),
        ({0, 26001, 33002}, THINGS, "if these 3 values are the classes in order"),
        ({0, 26001, 33002, 3}, THINGS, "label value 26001"),
        ({0, 100}, BINARY, '--label-mapping \'{"0": 0, "100": 1}\' if these 2 values'),
        (set(range(0, 46, 2)), THINGS, "23 values: compressed with loss, resized with smoothing"),
        # nothing left
        ({255}, THINGS, "every pixel is ignored: the only values are 255"),
        ({0, 255}, ("object",), "a single class leave nothing to tell apart; name the background as a clas"),
        ({0, 1}, ("object",), "a single class"),
        ({0}, ("object",), "a single class"),
    ],
)  # fmt: skip
def test_what_the_values_leave_open_is_for_the_user(values, names, message):
    with pytest.raises(ValueError) as error:
        read(values, names)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("values", "names"), [({0, 1}, THINGS), ({1, 2}, ANIMALS), ({0, 2}, 3)])
def test_folders_named_as_ade20ks_decide_nothing_that_would_drop_a_pixel(values, names):
    with pytest.raises(ValueError, match="two ways"):
        read(values, names, zero="ignored if absent")


@pytest.mark.parametrize(
    ("values", "names", "options", "expected"),
    [
        ({0, 1}, THINGS, {"reduce_zero_label": False}, PLAIN),
        ({0, 1}, THINGS, {"reduce_zero_label": True}, REDUCED),
        ({0, 1, 2}, THINGS, {"reduce_zero_label": True}, REDUCED),  # the last class is rare: the user says so
        ({0, 255}, BINARY, {"reduce_zero_label": False}, MASKS),
        ({0, 255}, THINGS, {"reduce_zero_label": False}, {0: 0, 255: None}),
        ({0, 1, 2}, 150, {"zero": "ignored"}, REDUCED),  # ADE20K's own names
        ({0, 1, 2, 255}, 150, {"zero": "ignored"}, REDUCED),
        (
            {0, 1, 2, 255},
            THINGS,
            {"zero": "ignored"},
            PLAIN,
        ),  # its names, but labels that are reduced already
        ({1, 2}, THINGS, {"zero": "ignored if absent"}, REDUCED),  # ADE20K's folders
        ({0, 1, 255}, 19, {"zero": "class"}, PLAIN),  # Cityscapes' labelTrainIds
        ({0, 1, 2, 3}, THINGS, {"ignore_index": 3}, PLAIN),  # void last
        ({0, 1, -1}, BINARY, {"ignore_index": -1}, PLAIN),
        ({7, 8}, THINGS, {"mapping": {7: 2, 8: None}}, {7: 2, 8: None}),
        ({7, 255}, THINGS, {"mapping": {7: 2}}, {7: 2, 255: None}),
        ({0, 255}, BINARY, {"mapping": {0: 1, 255: 0}}, {0: 1, 255: 0}),
        ({-5, 7}, BINARY, {"mapping": {-5: 1, 7: 255}}, {-5: 1, 7: None}),
    ],
)
def test_options_decide_where_the_values_do_not_contradict(values, names, options, expected):
    assert read(values, names, **options) == {v: expected.get(v) for v in values}


@pytest.mark.parametrize(
    ("values", "names", "options", "message"),
    [
        ({0, 1, 2}, ANIMALS, {"reduce_zero_label": True}, "would drop value 0, 33.33% of the pixels, and c"),
        ({0, 255}, BINARY, {"reduce_zero_label": True}, "would drop value 0, 50.00% of the pixels"),
        ({0, 255}, ("off", "on"), {"reduce_zero_label": True}, "every pixel is ignored: the only values ar"),
        ({0, 1, 2, 3}, THINGS, {"reduce_zero_label": False}, "--reduce-zero-label if 0 means ignore, or na"),
        ({0, 1, 2, 4}, THINGS, {"reduce_zero_label": True}, "label value 4"),
        ({0, 1, 2, 3}, ANIMALS, {"zero": "class"}, "a name is missing"),
        ({7, 9}, THINGS, {"mapping": {7: 2}}, "label value 9 (50.00% of all pixels) is out of range, expec"),
        ({7}, THINGS, {"mapping": {7: 3}}, "label_mapping: 7 -> 3, expected a class in 0...2 (or 255 to ig"),
        ({7}, THINGS, {"mapping": {7: None}}, "every pixel is ignored"),
    ],
)  # fmt: skip
def test_values_that_contradict_the_options(values, names, options, message):
    with pytest.raises(ValueError) as error:
        read(values, names, **options)
    assert message in str(error.value)


def test_messages_name_the_file():
    with pytest.raises(ValueError, match=r"^a/b\.png: label value 9 "):
        decide({0: 1, 1: 1, 9: 1}, 2, where={9: Path("a/b.png")})


def test_what_is_said():
    reading = decide({0: 39, 1: 500, 2: 400, 3: 61}, 3, names=THINGS)
    assert reading.reduce_zero_label
    assert reading.describe({0: 39, 1: 500, 2: 400, 3: 61}, THINGS, 3) == (
        "3 of 3 classes occur: 1 is sky, 2 is road, 3 is car; 0 is ignored, 3.9% of the pixels"
    )
    said = decide({0: 1, 255: 1}, 2, names=BINARY).describe({0: 1, 255: 1}, BINARY, 2)
    assert said == "2 of 2 classes occur: 0 is background, 255 is object; no pixel is ignored"
    many = {value: 1 for value in range(1, 151)}
    said = decide({**many, 0: 50}, 150).describe({**many, 0: 50}, None, 150)
    assert said == (
        "150 of 150 classes occur: 1 is class 0 ... 150 is class 149; 0 is ignored, 25.0% of the pixels"
    )
    more = decide({0: 50, 1: 25, 2: 25}, 2).describe({0: 50, 1: 25, 2: 25}, ("cat", "dog"), 2)
    assert more.endswith("0 is ignored, 50.0% of the pixels (to learn 0 too, name it before the others)")
    rare = decide({0: 5, 2: 5}, 3, names=ANIMALS).describe({0: 5, 2: 5}, ANIMALS, 3)
    assert rare.endswith("0 is background, 2 is dog; no pixel is ignored; never: cat")


def test_mappings(tmp_path):
    file = tmp_path / "m.json"
    file.write_text(json.dumps({"7": 0, "-1": None}))
    assert read_mapping(file) == read_mapping({"7": 0, -1: None}) == {7: 0, -1: None}
    for bad in (
        {},
        {"a": 0},
        {7: "b"},
        {7: 1.5},
        {7: True},
        {7: [1]},
        {1 << 32: 0},
        {str(10**21): 0},
        {7: 10**21},
    ):
        with pytest.raises(ValueError, match="label_mapping: expected label value -> class"):
            read_mapping(bad)
    with pytest.raises(ValueError, match=r"\(got 'a', no whole number\)$"):  # and no words of Python's
        read_mapping({"a": 0})
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        read_mapping(tmp_path / "none.json")


def test_spans():
    assert spans([0, 1, 2, 255]) == "0...2, 255" and spans([-1, 0, 3]) == "-1...0, 3"
    assert spans(range(0, 60, 2)) == "0, 2, 4, 6, 8, 10, 12, 14, ... 58"
