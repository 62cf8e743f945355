"""``bench report``: see `bench.report`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import report
from bench.measure.environment import ROOT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="print these results as Markdown")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; name what is stale, exit 1 if anything"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    if options.files:
        print("\n".join(report.document(report.load(path), path.stem) for path in options.files))
        return 0
    stale = report.update(options.root, check=options.check)
    for name in stale:
        print(f"{name}: {'stale' if options.check else 'updated'}")
    if stale and options.check:
        print("python -m bench: error: out of date; run 'python -m bench report'", file=sys.stderr)
        return 1
    if not stale:
        print("tables and figures are up to date")
    return 0
