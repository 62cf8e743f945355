"""Text files as editors write them, and what is refused in them."""

import json

import pytest

from segvit.system.text import (
    did_you_mean,
    numbered,
    parse_yaml,
    read_json,
    read_lines,
    read_text,
    yaml_value,
)

TEXT = "первый\nsecond  \n\n# note\n\tthird\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_editor(tmp_path, encoding, end):
    path = tmp_path / "names.txt"
    path.write_bytes(TEXT.replace("\n", end).encode(encoding))
    assert read_text(path) == TEXT
    assert read_lines(path) == [(1, "первый"), (2, "second"), (5, "third")]


def test_only_line_ends_end_lines(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("a\x0bb\u2028c\x85d\ne", encoding="utf-8")
    assert [number for number, _ in read_lines(path)] == [1, 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\r\nb\rcafé\n".encode("latin-1"), "byte 0xE9 in line 3 is not UTF-8"),
        (b"\xef\xbb\xbfok\n\xff", "byte 0xFF in line 2 is not UTF-8"),
        ("a\nb".encode("utf-16-le"), "a NUL character in line 1.*UTF-16"),
        (b"\xff\xfea", "damaged UTF-16"),
    ],
)
def test_other_encodings_are_refused(tmp_path, data, message):
    path = tmp_path / "names.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_text(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such file$"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(IsADirectoryError, match="is a folder, expected a file"):
        read_text(tmp_path)
    with pytest.raises(ValueError, match="NUL"):
        read_text("a\0b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON: line 1, column 1, at the end: expected a value"),
        ('{"a": 1,\n "a": 2}', "the key 'a' occurs twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1e999}', "1e999 is not JSON"),
        ('{"a": 1\n "b": 2}', "line 2, column 2, before '\"b\": 2}': expected a comma"),
        ('{"a": 1} x', "before 'x': expected nothing more"),
        ("{'a': 1}", 'expected a key in double quotes'),
        ("[1, 2]", r"got '\[1, 2\]', expected an object"),
        ("[" * 200000, "nested too deeply"),
        ("1" * 5000, "a number too long"),
        ("9" * 5000 + ".5", "json: 9{59}… is not JSON"),
    ],
)  # fmt: skip
def test_json_is_read_strictly(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(path, dict)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_json_from_every_editor(tmp_path):
    path = tmp_path / "a.json"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_bytes(json.dumps({"7": 0}).encode(encoding))
        assert read_json(path, dict) == {"7": 0}


def test_yaml_means_what_it_says():
    text = (
        "a: no\nb: on\nc: 1e-4\nd: 012\ne: 12:30\nf: 2024-01-01\ng: .inf\nh: ~\ni:\nj: '1'\n"
        "k: [1.5, True, 0x10]\n1: x"
    )
    values = yaml_value(parse_yaml(text, "x"), "x")
    assert values == {
        "a": "no", "b": "on", "c": 1e-4, "d": 12, "e": "12:30", "f": "2024-01-01", "g": float("inf"),
        "h": None, "i": None, "j": "1", "k": [1.5, True, 16], 1: "x",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1,\n", "x: not YAML: line 3"),
        ("a: 1\n\tb: 2\n", "x: not YAML: line 2"),
        ("a: {b: 1,\n b: 2}", "x: line 2: the key 'b' occurs twice"),
        ("a: &k 1\nb: *k\n", r"x: line 2: aliases \(\*k\)"),
        ("a: !!python/object:os.system x", "x: line 1: the tag"),
        ("a: 1\nb: \x01", "x: not YAML: line 2: a control character"),
        ("a: 1\n---\nb: 2\n", "x: not YAML: line 2"),
        ("? [1]\n: 2", "x: line 1: a key must be"),
        ("[" * 1200 + "]" * 1200, "x: nested too deeply"),
    ],
)
def test_yaml_is_read_strictly(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        yaml_value(parse_yaml(text, "x"), "x")
    assert "\n" not in str(caught.value)


def test_nearest_word():
    assert did_you_mean("max_step", ["lr", "max_steps"]) == "; did you mean max_steps?"
    assert did_you_mean("zebra", ["lr", "max_steps"]) == ""


def test_numbered_names_are_nobody_elses():
    assert numbered(["a", "a", "a_2", "a", "b"]) == ["a", "a_3", "a_2", "a_4", "b"]
    assert numbered(["a", "A", "a_2", "A_2"], str.lower) == ["a", "A_3", "a_2", "A_2_2"]
    assert numbered(["a"] * 1000)[-1] == "a_1000" and numbered([]) == []
    assert numbered(["a", "a", "a_2", "a_2", "a_2_2"]) == ["a", "a_3", "a_2", "a_2_3", "a_2_2"]
