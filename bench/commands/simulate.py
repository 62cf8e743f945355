"""``bench simulate``: see `bench.suites.simulate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.commands import OptionError, _options
from bench.measure import environment, results
from bench.subjects import parameters
from bench.suites import simulate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help="only these (default: all)")
    _options.add_out(parser, "results/simulate-, the architecture and Triton's version")
    parser.add_argument("--batch", nargs="+", type=_options.positive, default=[16, 1], help="(default: 16 1)")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout, simulated too")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="JSON object: entries of the pinned parameters to change"
    )
    parser.add_argument("--no-calibration", action="store_true", help="without code of known speed")


def run(options: argparse.Namespace) -> int:
    _options.check_out(options.out)
    _options.check_before(options.before)
    _options.check_names("OPERATOR", options.operators, list(simulate.OPERATORS), "operator")
    try:
        changes = parameters.load_changes(options.config) if options.config else None
        result = simulate.run(
            names=options.operators,
            batches=options.batch,
            before=options.before and options.before.resolve(),
            changes=changes,
            calibrate=not options.no_calibration,
        )
    except ValueError as error:
        raise OptionError(str(error)) from None
    version = ".".join(str(environment.version("triton")).split(".")[:2])
    name = f"{results.stem(f'simulate {simulate.ARCH}')}-triton-{version}.json"
    partial = options.operators or options.config or options.no_calibration or options.batch != [16, 1]
    return _options.finish(result, options, _options.RESULTS / name, partial)
