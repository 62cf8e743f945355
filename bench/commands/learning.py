"""``bench learning``: see `bench.suites.learning`."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import report
from bench.commands import OptionError, _options
from bench.suites import learning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_out(parser, "results/learning- and the processor")
    _options.add_names(parser, "--models", "models")
    _options.add_threads(parser)
    parser.add_argument("--data", type=Path, required=True, help="data set, as `segvit train` takes it")
    parser.add_argument("--backbone-weights", type=Path, required=True, help="file of the backbone's weights")
    parser.add_argument(
        "--config",
        type=Path,
        default=_options.ROOT / "examples" / "camvid" / "train.yaml",
        help="the recipe (default: examples/camvid/train.yaml)",
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/learning"), help="folder of the runs; those in it are kept"
    )
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="of training, on a quiet machine (default %(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rounds", type=_options.positive, default=9, help="samples of a model's time (default %(default)s)"
    )
    parser.add_argument("--only-steps", action="store_true", help="time the steps, and stop")
    parser.add_argument(
        "--resume", type=Path, help="a result, of any machine: its seconds of a step and its scores are kept"
    )
    parser.add_argument("--no-train", action="store_true", help="the result of what is there by now")


def run(options: argparse.Namespace) -> int:
    _options.check_out(options.out)
    _options.check_names("--models", options.models, learning.ENTRIES, "model")
    for name in ("data", "backbone_weights", "config"):
        if not getattr(options, name).exists():
            raise OptionError(f"--{name.replace('_', '-')} {getattr(options, name)}: does not exist")
    if not options.minutes > 0:
        raise OptionError(f"--minutes {options.minutes}; expected a number above 0")
    paths = (options.data, options.backbone_weights, options.config, options.runs)
    task = learning.Task(*(path.resolve() for path in paths), threads=options.threads)
    models = options.models or learning.ENTRIES
    if options.resume:
        try:
            learning.restore(task, report.load(options.resume))
        except (report.ReportError, OSError, ValueError, KeyError) as error:
            raise OptionError(f"--resume {options.resume}: {error}") from error
    if options.only_steps:
        learning.seconds(task, models)
        return 0
    result = learning.run(
        task,
        models=models,
        seeds=options.seeds,
        minutes=options.minutes,
        rounds=options.rounds,
        train=not options.no_train,
    )
    return _options.finish(result, options, _options.default_out("learning", "cpu"), options.models)
