"""``bench model``: see `bench.suites.model`."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.commands import OptionError, _options
from bench.measure import environment, pools
from bench.subjects.published import MODELS, QUICK
from bench.suites import model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_out(parser, "results/model- and the device")
    _options.add_names(parser, "--models", "models")
    parser.add_argument(
        "--batch", nargs="+", type=_options.positive, default=[1], help="batch sizes (default 1)"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), help="default: the first two"
    )
    _options.add_threads(parser, "threads on a CPU")
    parser.add_argument(
        "--rounds", type=_options.positive, help="samples of every subject (default 7; quick 3)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes)")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=model.SECTIONS,
        help="only these (default: all but steps and exports; quick: nor engines)",
    )
    parser.add_argument("--graphs", type=Path, metavar="FOLDER", help="keeps what other engines read")
    parser.add_argument("--busy", action="store_true", help="engines beside a busy process a core too")
    parser.add_argument(
        "--pools", action="store_true", help="and beside two busy thread pools in one process"
    )
    parser.add_argument("--quick", action="store_true", help="a ViT-S at 512×512 alone")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which nothing new begins"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model; not a measurement")


def run(options: argparse.Namespace) -> int:
    _options.check_out(options.out, options.smoke)
    if options.pools and (reason := environment.missing(pools.PACKAGES)):
        raise OptionError(f"--pools: {reason}")
    _options.check_names("--models", options.models, [model.name for model in (*MODELS, QUICK)], "model")
    result = model.run(
        names=options.models,
        batches=options.batch,
        dtypes=options.dtype or model.DTYPES,
        threads=options.threads,
        rounds=options.rounds or (3 if options.quick else 7),
        compiled=options.compile,
        sections=options.sections or (model.USUAL_QUICK if options.quick else model.USUAL),
        quick=options.quick,
        smoke=options.smoke,
        budget_s=options.budget,
        graphs=options.graphs,
        busy=options.busy,
        pools=options.pools,
    )
    # The small form has a file of its own, and so have exported files and training steps: they do not replace
    # what a longer run measured; other sections alone have none.
    alone = next((name for name in ("exports", "steps") if options.sections == [name]), None)
    stem = alone or ("model quick" if options.quick else "model")
    partial = (options.sections and not alone) or (options.models and not options.quick)
    return _options.finish(result, options, _options.default_out(stem, "cuda"), partial)
