"""``bench all``: see `bench.suites.everything`."""

from __future__ import annotations

import argparse

from bench.commands import _options
from bench.suites import everything


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_budget(parser, 570.0)
    _options.add_threads(parser, "threads on a CPU")
    parser.add_argument("--plan", action="store_true", help="print what would run, and for how long")


def run(options: argparse.Namespace) -> int:
    return everything.run(options.budget, options.threads, plan_only=options.plan)
