"""``bench memory``: see `bench.suites.memory`."""

from __future__ import annotations

import argparse

from bench.commands import _options
from bench.suites import memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_out(parser, "results/memory- and the device")
    _options.add_names(parser, "--models", "models")
    parser.add_argument(
        "--batch", type=_options.positive, default=1, help="images of a call (default %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the network; in training, of autocast (default %(default)s)",
    )
    _options.add_threads(parser, "threads on a CPU")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(memory.QUICK)}")
    parser.add_argument("--smoke", action="store_true", help="a tiny model; not a measurement")


def run(options: argparse.Namespace) -> int:
    _options.check_out(options.out, options.smoke)
    _options.check_models(options.models)
    result = memory.run(
        names=options.models,
        batch=options.batch,
        dtype=options.dtype,
        threads=options.threads,
        quick=options.quick,
        smoke=options.smoke,
    )
    stem = "memory quick" if options.quick else "memory"  # does not replace what a longer run measured
    partial = options.models and not options.quick
    return _options.finish(result, options, _options.default_out(stem, "cuda"), partial)
