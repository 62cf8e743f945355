"""``bench inference``: see `bench.suites.inference`."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.commands import OptionError, _options
from bench.suites import inference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint or run")
    parser.add_argument("data", type=Path, help="folder with images/validation and annotations/validation")
    _options.add_out(parser, "none", required=True)
    parser.add_argument("--images", type=_options.positive, help="only the first so many (default: all)")
    _options.add_threads(parser)


def run(options: argparse.Namespace) -> int:
    _options.check_out(options.out)
    try:
        result = inference.run(
            options.checkpoint, options.data, images=options.images, threads=options.threads
        )
    except (OSError, ValueError) as error:
        raise OptionError(str(error)) from None
    return _options.finish(result, options, options.out)
