"""``python -m bench``: see ``--help``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import NoReturn

from bench.commands import COMMANDS, OptionError


class _Parser(argparse.ArgumentParser):
    """One line for the user, no usage before it."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(message)


def _parser(chosen: str = "") -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m bench", description="Benchmarks of segvit-kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        if name == chosen:
            module = importlib.import_module(f"bench.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def _worker(arguments: list[str]) -> int | None:
    """What the benchmarks start themselves in; ``None`` for a user's command."""
    if arguments[:1] == ["_worker"]:
        from bench.suites import gpu

        _, section, folder, text = arguments
        options = json.loads(text)
        plan, printed = gpu.Plan(**options.pop("plan")), Path(options.pop("printed"))
        return gpu.work(section, Path(folder), plan, printed=printed, **options)
    if arguments[:1] == ["_odd"]:
        from bench.suites import _gpu_tasks

        _, dtypes, backend, smoke = arguments
        return _gpu_tasks.odd(json.loads(dtypes), backend, json.loads(smoke))
    if arguments[:1] == ["_fill"]:
        from bench.suites import cache

        return cache.fill(*json.loads(arguments[1]))
    if arguments[:1] == ["_serve"]:
        from bench.measure import workers

        _, module, function, values = arguments
        return workers.serve(module, function, json.loads(values))
    if arguments[:1] == ["_call"]:  # see measure/peaks.py
        _, module, function, values = arguments
        print(json.dumps(getattr(importlib.import_module(module), function)(*json.loads(values))))
        return 0
    return None


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if (code := _worker(arguments)) is not None:
        return code
    try:
        options = _parser(arguments[0] if arguments else "").parse_args(arguments)
        return options.run(options)
    except ValueError as error:
        if type(error).__name__ not in ("ReportError", "OptionError"):
            raise
        print(f"python -m bench: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
