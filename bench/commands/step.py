"""``bench step``: see `bench.suites.step`."""

from __future__ import annotations

import argparse
import importlib.util

from bench.commands import OptionError, _options
from bench.suites import step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_out(parser, "results/step- and the device")
    _options.add_threads(parser)
    parser.add_argument(
        "--rounds", type=_options.positive, default=5, help="samples of a form (default %(default)s)"
    )
    _options.add_smoke(parser)


def run(options: argparse.Namespace) -> int:
    _options.check_out(options.out, options.smoke)
    for package in ("transformers", "scipy"):
        if importlib.util.find_spec(package) is None:
            raise OptionError(f"{package} is not installed; expected it: pip install -e '.[transformers]'")
    result = step.run(threads=options.threads, rounds=options.rounds, smoke=options.smoke)
    return _options.finish(result, options, _options.default_out("step", "cpu"))
