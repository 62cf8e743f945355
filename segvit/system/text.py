"""Text that people write: names files, mappings, configurations, whatever editor and system they come from.

UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one; lines end in LF, CRLF or CR. JSON and
YAML are read strictly: a key that occurs twice, NaN, or a file of another encoding is refused. Every problem
is one line that names the file, and the line where there is one. Imports nothing heavy.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from segvit.system.extras import require
from segvit.system.zips import path_at

__all__ = [
    "did_you_mean",
    "file_error",
    "numbered",
    "parse_json",
    "parse_yaml",
    "read_json",
    "read_lines",
    "read_text",
    "shown",
    "yaml_value",
]

# Longest first: UTF-32's mark starts with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_KINDS = {dict: "an object {...}", list: "a list [...]", str: "a text", int: "a whole number"}


def shown(value: Any, longest: int = 60) -> str:
    """A value as it stands in a message: on one line, not endless."""
    text = repr(value) if isinstance(value, str) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean NAME?' for the known name nearest to a word, or nothing."""
    known = list(known)
    lowered = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return f"; did you mean {lowered[near[0]]}?" if near else ""


def file_error(error: OSError, path: str | os.PathLike, doing: str = "cannot be read") -> OSError:
    """The same kind of error, in one line that names the file and the reason."""
    reasons = {
        FileNotFoundError: "no such file",
        IsADirectoryError: "is a folder, expected a file",
        PermissionError: f"{doing} (no permission)",
    }
    text = reasons.get(type(error)) or f"{doing} ({error.strerror or error})"
    named = type(error)(f"{path}: {text}")
    named.errno = error.errno
    return named


def read_text(path: str | os.PathLike) -> str:
    """The text of a file, with LF line ends and no byte order mark.

    Raises:
        OSError: it cannot be read; of the kind that opening it raised (FileNotFoundError, ...).
        ValueError: it is not UTF-8 (or UTF-16 or UTF-32 with their mark), or holds NUL characters.
    """
    try:
        data = path_at(path).read_bytes()
    except OSError as error:
        raise file_error(error, path) from None
    except ValueError:  # a NUL in the name
        raise ValueError(f"{shown(str(path))}: a file name cannot hold a NUL character") from None
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding not in ("utf-8", "utf-8-sig"):
            raise ValueError(f"{path}: damaged {encoding.upper()} text (byte {error.start})") from None
        start = error.start + (3 if encoding == "utf-8-sig" else 0)
        line = 1 + len(re.findall(rb"\r\n|\r|\n", data[:start]))
        raise ValueError(
            f"{path}: byte 0x{data[start]:02X} in line {line} is not UTF-8 text; save the file as UTF-8"
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        line = 1 + text.count("\n", 0, text.index("\0"))
        raise ValueError(
            f"{path}: a NUL character in line {line}, expected text (of UTF-16 without a byte order mark? "
            "save the file as UTF-8)"
        )
    return text


def read_lines(path: str | os.PathLike) -> list[tuple[int, str]]:
    """(line number, line without blanks around it) of every line that is not empty and no comment (#).

    Raises:
        OSError, ValueError: as `read_text`.
    """
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1)]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def read_json(path: str | os.PathLike, kind: type | None = None) -> Any:
    """The value in a JSON file.

    Args:
        path: the file.
        kind: dict, list, ...: what the value must be.

    Raises:
        OSError, ValueError: as `read_text`, and as `parse_json`.
    """
    return parse_json(read_text(path), str(path), kind)


def parse_json(text: str, source: str, kind: type | None = None) -> Any:
    """The value of a JSON text; `source` names it in messages.

    Raises:
        ValueError: not JSON, a key twice in one object, NaN or an infinity, or another kind of value.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise _RefusedError(f"the key {shown(key)} occurs twice")
            values[key] = value
        return values

    def number(word: str) -> NoReturn:
        said = word if len(word) < 60 else f"{word[:59]}…"
        raise _RefusedError(f"{said} is not JSON, expected a number or null")

    def finite(word: str) -> float:
        value = float(word)
        return value if abs(value) != float("inf") else number(word)

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=number, parse_float=finite)
    except _RefusedError as error:
        raise ValueError(f"{source}: {error}") from None
    except json.JSONDecodeError as error:
        near = text[error.pos :].split("\n")[0].strip()
        place = f"line {error.lineno}, column {error.colno}"
        found = f"before {shown(near, 30)}" if near else "at the end"
        raise ValueError(f"{source}: not JSON: {place}, {found}: {_json_problem(error)}") from None
    except (ValueError, RecursionError):
        raise ValueError(
            f"{source}: not JSON that can be read: a number too long, or nested too deeply"
        ) from None
    if kind is not None and not isinstance(value, kind):
        raise ValueError(f"{source}: got {shown(json.dumps(value))}, expected {_KINDS[kind]}")
    return value


class _RefusedError(Exception):
    pass


def _json_problem(error: json.JSONDecodeError) -> str:
    words = {
        "Expecting value": "expected a value",
        "Expecting property name enclosed in double quotes": 'expected a key in double quotes ("...")',
        "Illegal trailing comma before end of object": "a comma too many",
        "Illegal trailing comma before end of array": "a comma too many",
        "Expecting ',' delimiter": "expected a comma",
        "Expecting ':' delimiter": "expected a colon",
        "Extra data": "expected nothing more",
        "Unterminated string starting at": "a text without its closing quote",
    }
    return words.get(error.msg, error.msg[:1].lower() + error.msg[1:])


# YAML, as version 1.2's core schema has it: `no` and `on` are words, 1e-4 is a number, 012 is twelve, and
# neither 12:30 nor 2024-01-01 is anything but text.

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_DEEPEST = 100  # lists and mappings in each other
_STANDARD = "tag:yaml.org,2002:"


def parse_yaml(text: str, source: str) -> Any:
    """The root node (`yaml.Node`) of a YAML text, None where it is empty; `source` names it in messages.

    Raises:
        ValueError: not YAML, more than one document, or aliases.
        ImportError: PyYAML is not installed.
    """
    yaml = require("yaml", extra="train")
    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1
                raise ValueError(f"{source}: line {line}: aliases (*{event.anchor}) are not taken")
            # What is nested costs PyYAML the square of its depth.
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ValueError(f"{source}: nested too deeply")
        return yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{source}: not YAML: {place}{error.problem or error.context}") from None
    except yaml.YAMLError as error:  # characters that no YAML file may hold
        position = getattr(error, "position", None)
        line = "" if position is None else f"line {text.count(chr(10), 0, position) + 1}: "
        raise ValueError(f"{source}: not YAML: {line}a control character") from None
    except RecursionError:
        raise ValueError(f"{source}: nested too deeply") from None


def yaml_value(node: Any, source: str) -> Any:
    """The value of a YAML node in plain Python types.

    Raises:
        ValueError: a key twice in one mapping, a key that is no scalar, or a tag.
    """
    line = node.start_mark.line + 1
    if node.id == "mapping":
        values: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            place = f"{source}: line {key_node.start_mark.line + 1}"
            if key_node.id != "scalar":
                raise ValueError(f"{place}: a key must be a word or a number")
            key = yaml_value(key_node, source)
            if key in values:
                raise ValueError(f"{place}: the key {shown(key)} occurs twice")
            values[key] = yaml_value(value_node, source)
        return values
    if node.id == "sequence":
        return [yaml_value(item, source) for item in node.value]
    if not node.tag.startswith(_STANDARD) or node.tag.startswith(_STANDARD + "python"):
        raise ValueError(f"{source}: line {line}: the tag {node.tag} is not taken")
    text = node.value
    if node.style is not None:  # in quotes
        return text
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        digits = text.lstrip("+-")
        if len(digits) > 1000:
            raise ValueError(f"{source}: line {line}: got {shown(text)}, a number too long")
        return int(text, 0 if digits[1:2] in ("x", "o") else 10)
    if _FLOAT.fullmatch(text):
        return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
    return text


def numbered(names: Sequence[str], same: Callable[[str], str] = str) -> list[str]:
    """A name of its own for each: the first of like ones keeps it, the others become NAME_2, NAME_3, ...

    Args:
        names: in their order; no number makes one of them.
        same: names of which this is equal are alike.
    """
    taken = {same(name) for name in names}
    numbers: dict[str, int] = {}
    unique = []
    for name in names:
        found, number = name, numbers.get(same(name), 0) + 1
        while number > 1 and same(found := f"{name}_{number}") in taken:
            number += 1
        numbers[same(name)] = number
        taken.add(same(found))
        unique.append(found)
    return unique
