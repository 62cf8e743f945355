"""``bench decoders``: see `bench.suites.decoders`."""

from __future__ import annotations

import argparse

from bench.commands import OptionError, _options
from bench.suites import decoders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_out(parser, "results/decoders- and the processor")
    _options.add_names(parser, "--models", "presets")
    _options.add_threads(parser)
    _options.add_smoke(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--rounds", type=_options.positive, default=9, help="samples of each (default %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    _options.check_out(options.out, options.smoke)
    if unknown := set(options.models or ()) - set(decoders.PRESETS):
        raise OptionError(f"--models {sorted(unknown)[0]}: expected {' or '.join(decoders.PRESETS)}")
    result = decoders.run(
        presets=options.models or decoders.PRESETS,
        dtype=options.dtype,
        threads=options.threads,
        rounds=2 if options.smoke else options.rounds,
        smoke=options.smoke,
    )
    return _options.finish(result, options, _options.default_out("decoders", "cpu"), options.models)
