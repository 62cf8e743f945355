"""The command line: `segvit train|evaluate|predict|convert|bench|demo`, also `python -m segvit`.

Options are the fields of the dataclasses in `segvit.options`; torch is imported only after they have been
read. A mistake in options, files or data is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import os
import re
import sys
import typing
from collections.abc import Sequence
from typing import Any

from segvit._extras import require
from segvit.options import (
    BenchConfig,
    ConvertConfig,
    DemoConfig,
    EvaluateConfig,
    PredictConfig,
    TrainConfig,
)

__all__ = ["main"]

COMMANDS: dict[str, tuple[type, str]] = {
    "train": (TrainConfig, "train a model on a folder of images or on synthetic data"),
    "evaluate": (EvaluateConfig, "mIoU of a checkpoint on a data set"),
    "predict": (PredictConfig, "label maps and overlays of images"),
    "convert": (ConvertConfig, "turn a published SegViT checkpoint into one of this package"),
    "bench": (
        BenchConfig,
        "how fast a model runs on this machine, where the time goes, and what to switch on",
    ),
    "demo": (DemoConfig, "train a small model on synthetic data and write an HTML report"),
}


_METAVARS = {int: "N", float: "X", str: "TEXT", dict[str, Any]: "DICT"}


def _add_options(parser: Any, options: type) -> None:
    """One option for every field, grouped by the class that declares it, this class's own fields first."""
    from jsonargparse import ActionYesNo

    hints = typing.get_type_hints(options)
    fields = {field.name: field for field in dataclasses.fields(options)}
    for owner in filter(dataclasses.is_dataclass, options.__mro__):
        group = parser.add_argument_group(owner.__doc__)
        for name in inspect.get_annotations(owner):
            field, kind = fields[name], hints[name]
            flag = f"--{name.replace('_', '-')}"
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            else:
                default = field.default
            arguments: dict[str, Any] = {"help": field.metadata["help"]}
            if default is not dataclasses.MISSING:
                arguments["default"] = default
            elif not field.metadata["positional"]:
                arguments["required"] = True
            if kind is bool:
                arguments["action"] = ActionYesNo(yes_prefix="", no_prefix="no-")
            else:
                plain = [k for k in typing.get_args(kind) if k in _METAVARS]
                if typing.get_origin(kind) is not typing.Literal:
                    arguments["metavar"] = _METAVARS.get(kind) or (_METAVARS[plain[0]] if plain else "[X,X]")
                if typing.get_origin(kind) is list:
                    least = "*" if default == [] else "+"
                    arguments |= {"nargs": least, "type": typing.get_args(kind)[0]}
                else:
                    arguments["type"] = kind
            if field.metadata["positional"]:
                arguments["metavar"] = name.upper()
            group.add_argument(name if field.metadata["positional"] else flag, **arguments)


def _parser(only: str | None = None) -> Any:
    """The parser; with `only`, the other commands' options are left out."""
    jsonargparse = require("jsonargparse", extra="train")

    class HelpFormatter(jsonargparse.DefaultHelpFormatter):
        def __init__(self, prog: str, **kwargs: Any) -> None:
            super().__init__(prog, max_help_position=34, **kwargs)

        def _get_help_string(self, action: argparse.Action) -> str:
            text, default = action.help or "", action.default
            if getattr(action, "required", False) and action.option_strings:
                return f"{text} (required)"
            if isinstance(default, (bool, type(None))) or default in ([], {}, argparse.SUPPRESS):
                return f"{text} (on; --no-... turns it off)" if default is True else text
            return f"{text} (default: %(default)s)"

    parser = jsonargparse.ArgumentParser(
        prog="segvit",
        usage="segvit COMMAND [options]",
        description="Semantic segmentation with plain Vision Transformers.",
        formatter_class=HelpFormatter,
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command", title="commands", metavar="COMMAND")
    for name, (options, summary) in COMMANDS.items():
        files = {"predict": "IMAGE... ", "convert": "IN.pth OUT ", "bench": "MODEL "}.get(name, "")
        sub = jsonargparse.ArgumentParser(
            description=f"{summary[0].upper()}{summary[1:]}.",
            usage=f"segvit {name} {files}[options]",
            formatter_class=HelpFormatter,
            exit_on_error=False,
        )
        if only in (None, name):
            sub.add_argument(
                "--config", action="config", help="YAML file of options; those given after it win"
            )
            _add_options(sub, options)
        commands.add_subcommand(name, sub, help=summary)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = next((word for word in words if word in COMMANDS), None)
    name = f"segvit {command}" if command else "segvit"
    try:
        parsed = _parser(command).parse_args(words)
        command = parsed.command
        values = dict(parsed[command].as_dict())
        values.pop("config", None)
        options = COMMANDS[command][0](**values)
        return importlib.import_module(f"segvit.{command}").run(options) or 0
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, argparse.ArgumentError) as error:
        if os.environ.get("SEGVIT_TRACEBACK"):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        text = re.sub(
            r'Parser key "(\w+)"(?: element \d+)?:', lambda match: f"--{match[1].replace('_', '-')}:", text
        )
        print(f"{name}: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
