"""``bench kernels``: see `bench.suites.cpu`, and on a GPU `bench.suites.gpu`."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from bench.commands import OptionError, _options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_out(parser, "results/ and the device's name")
    _options.add_machine(parser)
    _options.add_budget(parser, 540.0)
    _options.add_smoke(parser)
    _options.add_names(parser, "--peers", "peers")
    _options.add_names(parser, "--operators", "operators, on a CPU")
    parser.add_argument(
        "--rounds", type=_options.positive, default=9, help="samples of a peer on a CPU (%(default)s)"
    )
    parser.add_argument(
        "--main", action="store_true", help="CPU: times of each operator's main shape, and nothing else"
    )
    parser.add_argument("--in-process", action="store_true", help="GPU: no child processes (for debugging)")


def run(options: argparse.Namespace) -> int:
    _options.check_out(options.out, options.smoke)
    if options.smoke and options.device == "cuda":
        # Triton reads this when it is imported, in the children too.
        os.environ["TRITON_INTERPRET"] = "1"
    _options.check_operators(options.operators)
    device = _options.device_of(options)
    result = (_on_gpu if device == "cuda" else _on_cpu)(options)
    partial = options.peers or options.operators or options.main
    return _options.finish(result, options, _options.default_out("", device), partial)


def _on_gpu(options: argparse.Namespace) -> dict:
    from bench.subjects import operators
    from bench.suites import _gpu_tasks, gpu

    for option in ("operators", "main"):
        if getattr(options, option):
            raise OptionError(f"--{option}: for a run on a CPU only")
    operators.check_peers("triton", options.peers)
    plan = _gpu_tasks.Plan(options.smoke, _gpu_tasks.checked_dtypes(), options.peers)
    with tempfile.TemporaryDirectory() as folder:
        chosen = {"stages": _gpu_tasks.OPERATORS, "in_process": options.in_process}
        found = gpu.run(Path(folder), plan, budget_s=options.budget, **chosen)
    if not found:
        raise OptionError("kernels: nothing ran: no worker could describe this machine")
    return found[0]


def _on_cpu(options: argparse.Namespace) -> dict:
    from bench.suites import cpu

    return cpu.run(
        budget_s=options.budget,
        threads=options.threads,
        rounds=options.rounds,
        smoke=options.smoke,
        names=options.peers,
        only=options.operators,
        main=options.main,
    )
