"""``bench instructions``: see `bench.suites.instructions`."""

from __future__ import annotations

import argparse

from bench.commands import OptionError, _options
from bench.suites import instructions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_out(parser, "results/instructions- and the processor")
    _options.add_names(parser, "--isas", "instruction sets")
    _options.add_smoke(parser)
    parser.add_argument("--threads", type=_options.positive, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument(
        "--seconds",
        type=float,
        default=240.0,
        help="of each run of `bench kernels` at most (default %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=_options.positive, default=5, help="samples of a peer (default %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    _options.check_out(options.out, options.smoke)
    known = instructions.known()
    if not known:
        raise OptionError("instructions: the native library is not built: expected `make native` before")
    _options.check_names("--isas", options.isas, known, "instruction set of ours on this processor")
    result = instructions.run(
        isas=options.isas or known,
        threads=options.threads,
        seconds=options.seconds,
        rounds=options.rounds,
        smoke=options.smoke,
    )
    return _options.finish(result, options, _options.default_out("instructions", "cpu"), options.isas)
