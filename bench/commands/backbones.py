"""``bench backbones``: see `bench.suites.backbones`."""

from __future__ import annotations

import argparse

from bench.commands import OptionError, _options
from bench.suites import backbones


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_out(parser, "results/backbones.json")
    _options.add_names(parser, "--models", "presets")


def run(options: argparse.Namespace) -> int:
    _options.check_out(options.out)
    if unknown := set(options.models or ()) - {backbone.preset for backbone in backbones.BACKBONES}:
        known = ", ".join(backbone.preset for backbone in backbones.BACKBONES)
        raise OptionError(f"--models {sorted(unknown)[0]}: expected {known}")
    result = backbones.run(names=options.models)
    return _options.finish(result, options, _options.RESULTS / "backbones.json", options.models)
