"""From the words of a command line and a configuration file to a command's options.

Options are the fields of the dataclasses in `segvit.options`. Every mistake is a `ValueError` of one line.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import re
import types
import typing
from pathlib import Path
from typing import Any

from segvit.commands import COMMANDS, OPERANDS
from segvit.system.extras import require
from segvit.system.text import did_you_mean, parse_yaml, read_text, shown, yaml_value

__all__ = ["RECIPES", "command_help", "find_command", "parse"]

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
_WITH_RECIPES = ("train", "evaluate")


# Values


def _members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself."""
    return typing.get_args(kind) if _is_union(kind) else (kind,)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)  # X | Literal[...] is the second


def _expected(kind: Any) -> str:
    """What a value of a type is, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(kind):
        return " or ".join(_expected(member) for member in arguments)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"{len(arguments)} numbers in brackets, [X, X]"
    if origin is list:
        return f"a list, each {_expected(arguments[0])}"
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text that is not empty",
        types.NoneType: "null",
        dict: "a mapping {key: value}",
    }[origin or kind]


_NOTHING = object()


def _scalar(kind: type, text: str) -> Any:
    """The value of a word, `_NOTHING` where it is none of this type."""
    if kind is str:
        return text if text.strip() and "\0" not in text else _NOTHING
    if kind is bool:
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        return words.get(text.lower(), _NOTHING)
    if kind is types.NoneType:
        return None if text in ("null", "Null", "NULL", "~") else _NOTHING
    try:
        number = float(text)
        if not math.isfinite(number):
            return _NOTHING
        if kind is float:
            return number
        exact = int(text) if re.fullmatch(r"\s*[-+]?[0-9_]+\s*", text) else int(number)
        whole = exact == number or abs(exact) >= 2**53
        return exact if whole and -(2**63) <= exact < 2**63 else _NOTHING
    except ValueError:
        return _NOTHING


def _convert(kind: Any, node: Any, source: str) -> Any:
    """The value of a YAML node as an option of this type; `_NOTHING` where it is none.

    Raises:
        ValueError: a mistake inside a mapping.
    """
    if node is None:  # an empty text
        return _NOTHING
    for member in sorted(_members(kind), key=lambda m: m is not types.NoneType):
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        value = _NOTHING
        if origin is typing.Literal and node.id == "scalar":
            value = next((choice for choice in arguments if str(choice) == node.value), _NOTHING)
        elif origin in (list, tuple) and node.id == "sequence":
            kinds = arguments if origin is tuple else arguments * len(node.value)
            if len(kinds) == len(node.value):
                values = [_convert(k, item, source) for k, item in zip(kinds, node.value, strict=True)]
                value = _NOTHING if _NOTHING in values else origin(values)
        elif origin is dict and node.id == "mapping":
            yaml_value(node, source)  # no key twice
            pairs = [
                (_convert(arguments[0], key, source), _convert(arguments[1], item, source))
                for key, item in node.value
            ]
            value = _NOTHING if any(_NOTHING in pair for pair in pairs) else dict(pairs)
        elif member is Any:
            value = yaml_value(node, source)
        elif origin is None and node.id == "scalar":
            if member is types.NoneType and (node.style or not node.value):
                value = _NOTHING if node.style else None
            elif not (member is str and node.style is None and _scalar(types.NoneType, node.value) is None):
                value = _scalar(member, node.value)
        if value is not _NOTHING:
            return value
    return _NOTHING


def _shown_node(node: Any, source: str) -> str:
    if node is None:
        return "nothing"
    return shown(node.value if node.id == "scalar" and node.style is None else yaml_value(node, source))


class _Options:
    """The options of one command: their types, and the values given so far."""

    def __init__(self, command: str) -> None:
        self.options = COMMANDS[command][0]
        self.kinds = typing.get_type_hints(self.options)
        self.fields = {field.name: field for field in dataclasses.fields(self.options)}
        self.values: dict[str, Any] = {}

    def set(self, name: str, node: Any, place: str, source: str) -> None:
        """Take the value of a node; `place` names the option in messages, `source` the file or option."""
        value = _convert(self.kinds[name], node, source)
        if value is _NOTHING:
            expected = _expected(self.kinds[name])
            near = ""
            for member in _members(self.kinds[name]):
                if typing.get_origin(member) is typing.Literal and node is not None and node.id == "scalar":
                    near = did_you_mean(node.value, map(str, typing.get_args(member)))
            raise ValueError(f"{place}: got {_shown_node(node, source)}, expected {expected}{near}")
        self.values[name] = value

    def set_word(self, name: str, word: str | list[str] | bool) -> None:
        """Take what stood on the command line."""
        flag = f"--{name.replace('_', '-')}"
        place = name.upper() if self.fields[name].metadata["positional"] else flag
        if isinstance(word, bool):
            self.values[name] = word
            return
        kind = self.kinds[name]
        if typing.get_origin(kind) is list:
            kind, values = typing.get_args(kind)[0], []
            for item in word:
                value = _scalar(kind, item)
                if value is _NOTHING:
                    raise ValueError(f"{place}: got {shown(item)}, expected {_expected(kind)}")
                values.append(value)
            self.values[name] = values
            return
        if isinstance(word, list):  # what argparse makes of --NAME=--
            word = "--"
        plain = [member for member in _members(kind) if member in (str, types.NoneType)]
        if str in plain and not (word.lstrip().startswith("{") and len(_members(kind)) > len(plain)):
            if types.NoneType in plain and _scalar(types.NoneType, word) is None:
                self.values[name] = None
                return
            value = _scalar(str, word)  # as it is: not every path is YAML
            if value is _NOTHING:
                raise ValueError(f"{place}: got {shown(word)}, expected {_expected(kind)}")
            self.values[name] = value
            return
        self.set(name, parse_yaml(word, place), place, place)

    def set_entry(self, name: str, key: str, word: str) -> None:
        """Take --NAME.KEY VALUE, one entry of a mapping."""
        place = f"--{name.replace('_', '-')}.{key}"
        node = parse_yaml(word, place)
        value = None if node is None else yaml_value(node, place)
        self.values[name] = {**self.values.get(name, {}), key: value}

    def read_file(self, path: str) -> None:
        """Take the options in a YAML file.

        Raises:
            OSError, ValueError: it cannot be read, or holds what is no option or no value of one.
        """
        root = parse_yaml(read_text(path), path)
        if root is None:
            raise ValueError(f"{path}: the file is empty, expected options (key: value)")
        if root.id != "mapping":
            raise ValueError(f"{path}: got {_shown_node(root, path)}, expected options (key: value)")
        self._read_mapping(root, path)

    def read_recipe(self, name: str, command: str) -> None:
        """Take what a recipe says for a command.

        Raises:
            ValueError: no such recipe.
        """
        names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
        if name not in names:
            raise ValueError(f"--recipe: got {shown(name)}, expected one of {', '.join(names)}")
        path = str(RECIPES / f"{name}.yaml")
        for key, section in parse_yaml(read_text(path), path).value:
            if key.value == command:
                self._read_mapping(section, path)

    def _read_mapping(self, root: Any, path: str) -> None:
        seen = set()
        # Entries, as in `model.width`, after the whole that they are of, wherever that stands.
        for key_node, value_node in sorted(root.value, key=lambda pair: "." in str(pair[0].value)):
            place = f"{path}: line {key_node.start_mark.line + 1}"
            key = str(key_node.value) if key_node.id == "scalar" else ""
            name, _, entry = key.replace("-", "_").partition(".")
            if name not in self.fields or (entry and typing.get_origin(self.kinds[name]) is not dict):
                hint = did_you_mean(name, self.fields)
                raise ValueError(f"{place}: no option {shown(key)}{hint}")
            if (name, entry) in seen:
                raise ValueError(f"{place}: {key} occurs twice")
            seen.add((name, entry))
            if entry:
                value = yaml_value(value_node, path)
                self.values[name] = {**self.values.get(name, {}), entry: value}
            else:
                self.set(name, value_node, f"{place}: {key}", path)

    def make(self) -> Any:
        """The dataclass.

        Raises:
            ValueError: required options are missing.
        """
        missing = []
        for field in self.fields.values():
            if _default(field) is dataclasses.MISSING:
                positional = field.metadata["positional"]
                if self.values.get(field.name) in (None, []):
                    label = field.name.upper() if positional else f"--{field.name.replace('_', '-')}"
                    missing.append(label)
        if missing:
            raise ValueError(f"missing: {', '.join(missing)} (see --help)")
        return self.options(**self.values)


# The parser


class _Parser(argparse.ArgumentParser):
    """Raises a ValueError where argparse would print its usage and leave."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(re.sub(r"^argument ", "", message))


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


_METAVARS = {int: "N", float: "X", str: "TEXT", dict: "DICT"}


def _default(field: dataclasses.Field) -> Any:
    make = field.default_factory
    return field.default if isinstance(make, dataclasses._MISSING_TYPE) else make()


def _help_of(field: dataclasses.Field) -> str:
    text, default = field.metadata["help"], _default(field)
    if default is dataclasses.MISSING:
        return text if field.metadata["positional"] else f"{text} (required)"
    if default is True:
        return f"{text} (on; --no-... turns it off)"
    if default is False or default is None or default in ([], {}):
        return text
    return f"{text} (default: {default})"


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser of one command. It hands over words; `_Options` gives them their meaning."""
    options, summary = COMMANDS[command]
    parser = _Parser(
        prog=f"segvit {command}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        usage=f"segvit {command} {OPERANDS.get(command, '')}[options]",
        formatter_class=_Help,
        argument_default=argparse.SUPPRESS,
    )
    # argparse takes -1 for a number, and -1e-3 for an option.
    parser._negative_number_matcher = re.compile(r"-(\d|\.\d|inf$|nan$)")
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; those given here win")
    if command in _WITH_RECIPES:
        text = "options of a recipe in segvit/recipes; those of --config and those given here win"
        parser.add_argument("--recipe", metavar="NAME", help=text)
    parser.add_argument(
        "--print-config", "--print_config", action="store_true", help="print all options as YAML and exit"
    )
    hints = typing.get_type_hints(options)
    fields = {field.name: field for field in dataclasses.fields(options)}
    shown: set[str] = set()
    for owner in filter(dataclasses.is_dataclass, options.__mro__):
        group = parser.add_argument_group(owner.__doc__)
        own = [name for name in inspect.get_annotations(owner) if name not in shown]
        shown.update(own)
        for name in own:
            field, kind = fields[name], hints[name]
            flag = f"--{name.replace('_', '-')}"
            arguments: dict[str, Any] = {"help": _help_of(field).replace("%", "%%")}
            if kind is bool:
                arguments["action"] = argparse.BooleanOptionalAction
            else:
                first = next(member for member in _members(kind) if member is not types.NoneType)
                origin, inner = typing.get_origin(first), typing.get_args(first)
                if first is bool:
                    arguments["metavar"] = f"{{{','.join(_switch_words(kind))}}}"
                elif origin is typing.Literal:
                    arguments["metavar"] = f"{{{','.join(map(str, inner))}}}"
                elif origin is tuple:
                    arguments["metavar"] = f"[{','.join('X' * len(inner))}]"
                else:
                    arguments["metavar"] = _METAVARS[inner[0] if origin is list else origin or first]
                if origin is list:
                    arguments["nargs"] = "*" if _default(field) == [] else "+"
            if field.metadata["positional"]:
                many = typing.get_origin(kind) is list
                arguments |= {"metavar": name.upper(), "nargs": "*" if many else "?"}
            group.add_argument(name if field.metadata["positional"] else flag, **arguments)
    return parser


def _switch_words(kind: Any) -> list[str]:
    """What may follow an option that is true, false or one of some words."""
    words = [typing.get_args(m) for m in _members(kind) if typing.get_origin(m) is typing.Literal]
    return ["true", "false", *(word for some in words for word in some)]


def _spell_switches(words: list[str], options: _Options) -> list[str]:
    """--NAME and --no-NAME of options that take other words too, as --NAME=true and --NAME=false."""
    switches = {
        f"--{name.replace('_', '-')}": _switch_words(kind)
        for name, kind in options.kinds.items()
        if kind is not bool and bool in _members(kind)
    }
    spelled: list[str] = []
    for position, word in enumerate(words):
        if word == "--":
            return spelled + words[position:]
        if word in switches and words[position + 1 : position + 2] not in [[w] for w in switches[word]]:
            word = f"{word}=true"
        elif word.startswith("--no-") and f"--{word[5:]}" in switches:
            word = f"--{word[5:]}=false"
        spelled.append(word)
    return spelled


def _take_entries(words: list[str], options: _Options) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Words without --NAME.KEY VALUE of mapping options, and those as (name, key, value)."""
    rest: list[str] = []
    entries: list[tuple[str, str, str]] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        match = re.fullmatch(r"--([\w-]+)\.([\w.-]+)(?:=(.*))?", word, re.DOTALL)
        name = match[1].replace("-", "_") if match else ""
        if match is None or typing.get_origin(options.kinds.get(name)) is not dict:
            rest.append(word)
            if word == "--":
                return rest + words[position:], entries
            continue
        value = match[3]
        if value is None:
            if position == len(words):
                raise ValueError(f"{word}: expected a value after it")
            value = words[position]
            position += 1
        entries.append((name, match[2].replace("-", "_"), value))
    return rest, entries


def parse(command: str, words: list[str]) -> Any:
    """The options of a command from the words after its name; None where --print-config was all."""
    options = _Options(command)
    words, entries = _take_entries(_spell_switches(words, options), options)
    parser = _parser(command)
    end = words.index("--") if "--" in words else len(words)
    parsed, extra = parser.parse_known_intermixed_args(words[:end])
    if extra:
        flag = extra[0].partition("=")[0]
        if flag.startswith("-") and len(flag) > 1:
            flags = [flag for action in parser._actions for flag in action.option_strings]
            raise ValueError(f"{flag}: no such option{did_you_mean(flag, flags)}")
    given = {name: value for name, value in vars(parsed).items() if value is not None}
    extra += words[end + 1 :]
    for name, field in options.fields.items():
        if field.metadata["positional"]:
            if typing.get_origin(options.kinds[name]) is list:
                given[name], extra = given.get(name, []) + extra, []
            elif extra and name not in given:
                given[name] = extra.pop(0)
    if extra:
        raise ValueError(f"got {shown(extra[0])} where no argument is expected (see --help)")
    show = given.pop("print_config", False)
    if "recipe" in given:
        options.read_recipe(given.pop("recipe"), command)
    if "config" in given:
        path = given.pop("config")
        if not path.strip():
            raise ValueError(f"--config: got {shown(path)}, expected a YAML file")
        options.read_file(path)
    for name, word in given.items():
        if word != [] or not options.fields[name].metadata["positional"]:
            options.set_word(name, word)
    for name, key, word in entries:
        options.set_entry(name, key, word)
    made = options.make()
    if show:
        yaml = require("yaml", extra="train")
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(made).items()}
        print(yaml.safe_dump(values, sort_keys=False), end="")
        return None
    return made


def command_help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: segvit COMMAND [options]",
            "",
            "Semantic segmentation with plain Vision Transformers.",
            "",
            "commands:",
            *lines,
            "",
            "segvit COMMAND --help shows a command's options, segvit --version the version.",
        ]
    )


def find_command(words: list[str]) -> str:
    """The command that the words begin with.

    Raises:
        ValueError: none.
    """
    for name in COMMANDS:
        if words[: name.count(" ") + 1] == name.split():
            return name
    if not words:
        raise ValueError(f"expected a command: {', '.join(COMMANDS)} (see --help)")
    hint = did_you_mean(words[0], COMMANDS) or f"; expected {', '.join(COMMANDS)}"
    raise ValueError(f"no command {shown(words[0])}{hint}")
