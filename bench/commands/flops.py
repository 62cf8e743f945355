"""``bench flops``: see `bench.suites.flops`."""

from __future__ import annotations

import argparse

from bench.commands import _options
from bench.suites import flops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_out(parser, "results/flops.json")
    _options.add_names(parser, "--models", "models")


def run(options: argparse.Namespace) -> int:
    _options.check_out(options.out)
    _options.check_models(options.models)
    result = flops.run(names=options.models)
    return _options.finish(result, options, _options.RESULTS / "flops.json", options.models)
