"""``bench export``: see `bench.suites.export`."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from bench.commands import OptionError, _options
from bench.subjects import exports
from bench.suites import export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("section", choices=("labels", "tail", "int8"), help="what is measured")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="int8: a checkpoint or run")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="int8: with images/ and annotations/")
    parser.add_argument(
        "--pictures", type=_options.positive, help="int8: only the first so many (default: all)"
    )
    parser.add_argument(
        "--calibration", type=_options.positive, default=8, help="int8: training pictures (%(default)s)"
    )
    _options.add_threads(parser, note="; tail: 1")
    _options.add_out(parser, "results/export-, the section and the machine")
    _options.add_names(parser, "--models", "models of labels")
    _options.add_budget(parser, float("inf"))
    _options.add_smoke(parser)


def run(options: argparse.Namespace) -> int:
    _options.check_out(options.out, options.smoke)
    _options.check_names("--models", options.models, [case.name for case in exports.CASES], "model")
    for name in ("checkpoint", "data") if options.section == "int8" else ():
        folder = getattr(options, name)
        if folder is None or not folder.is_dir():
            raise OptionError(f"--{name} {folder}: no such folder; expected that of a trained model's {name}")
    given = ("models", "threads", "calibration", "checkpoint", "data", "pictures", "smoke")
    try:
        result = export.run(
            options.section,
            **{name: getattr(options, name) for name in given},
            budget_s=options.budget,
            progress=functools.partial(print, flush=True),
        )
    except (OSError, ValueError) as error:
        raise OptionError(str(error)) from None
    default = _options.default_out(f"export {options.section}", "cpu")
    return _options.finish(result, options, default, options.models or options.pictures)
