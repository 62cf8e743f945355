"""``bench precompile``: see `bench.suites.cache`."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.commands import OptionError, _options
from bench.suites import cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="ARCHIVE", help="file to write (.tar.gz)")
    _options.add_names(parser, "--operators", "operators")
    _options.add_smoke(parser)


def run(options: argparse.Namespace) -> int:
    if not options.out.resolve().parent.is_dir():
        raise OptionError(f"--out {options.out}: folder {options.out.resolve().parent} does not exist")
    _options.check_operators(options.operators)
    try:
        print(cache.precompile(options.out, options.operators, options.smoke))
    except RuntimeError as error:
        raise OptionError(f"precompile: {error}") from None
    return 0
