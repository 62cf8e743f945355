"""``bench scaling``: see `bench.suites.scaling`."""

from __future__ import annotations

import argparse

from bench.commands import _options
from bench.suites import scaling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_out(parser, "results/scaling- and the device")
    _options.add_machine(parser)
    _options.add_budget(parser, 540.0)
    _options.add_smoke(parser)
    _options.add_names(parser, "--operators", "operators")


def run(options: argparse.Namespace) -> int:
    _options.check_out(options.out, options.smoke)
    _options.check_operators(options.operators)
    device = _options.device_of(options)
    result = scaling.run(
        device=device,
        budget_s=options.budget,
        threads=options.threads,
        names=options.operators,
        smoke=options.smoke,
    )
    return _options.finish(result, options, _options.default_out("scaling", device), options.operators)
