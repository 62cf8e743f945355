"""``bench tune``: see `bench.suites.tune`."""

from __future__ import annotations

import argparse

from bench.commands import _options
from bench.suites import tune


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("operator", help="which operator")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    parser.add_argument(
        "--simulate",
        type=_options.positive,
        metavar="K",
        help="time only the K candidates predicted fastest; without a GPU print the predictions",
    )


def run(options: argparse.Namespace) -> int:
    return tune.main(options.operator, dry_run=options.dry_run, simulate=options.simulate)
