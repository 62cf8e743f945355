"""``bench static``: see `bench.suites.static`."""

from __future__ import annotations

import argparse

from bench.commands import _options
from bench.suites import static


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_out(parser, "results/static.json")
    parser.add_argument("--kernels", nargs="+", choices=("triton", "cuda"), default=["triton", "cuda"])
    _options.add_names(parser, "--operators", "operators")


def run(options: argparse.Namespace) -> int:
    _options.check_out(options.out)
    _options.check_operators(options.operators)
    result = static.run(kernels=options.kernels, names=options.operators)
    partial = options.operators or len(options.kernels) < 2
    return _options.finish(result, options, _options.RESULTS / "static.json", partial)
