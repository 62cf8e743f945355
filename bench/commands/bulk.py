"""``bench bulk``: see `bench.suites.bulk`."""

from __future__ import annotations

import argparse

from bench.commands import _options
from bench.suites import bulk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_out(parser, "results/bulk- and the machine")
    _options.add_threads(parser, "threads of torch")
    parser.add_argument(
        "--pictures", type=_options.positive, default=512, help="of each size (default %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=_options.positive, default=5, help="of each way (default %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    _options.check_out(options.out)
    result = bulk.run(pictures=options.pictures, repeats=options.repeats, threads=options.threads)
    default = _options.default_out("bulk", "cpu")
    return _options.finish(result, options, default)
