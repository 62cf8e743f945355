"""``bench host``: see `bench.suites.host`."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.commands import OptionError, _options
from bench.suites import host


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_out(parser, "results/host- and the machine")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout, measured too")
    parser.add_argument(
        "--rounds", type=_options.positive, default=3, help="processes for each (default %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="for each call (default %(default)s)")


def run(options: argparse.Namespace) -> int:
    _options.check_out(options.out)
    _options.check_before(options.before)
    try:
        result = host.run(before=options.before, rounds=options.rounds, seconds=options.seconds)
    except ValueError as error:
        raise OptionError(str(error)) from None
    return _options.finish(result, options, _options.default_out("host", "cpu"))
