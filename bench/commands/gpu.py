"""``bench gpu``: see `bench.suites.gpu`."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Iterable
from pathlib import Path

from bench import report
from bench.commands import OptionError, _options
from bench.commands._options import RESULTS
from bench.suites import _gpu_rows, _gpu_tasks, cache, gpu, tune


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="new or empty folder for the files"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="ARCHIVE", help="kernels compiled ahead by 'precompile'"
    )
    _options.add_budget(parser, 480.0)
    _options.add_smoke(parser)
    parser.add_argument(
        "--candidates", type=Path, help="JSON file of launch parameters to compare (bench/candidates.json)"
    )
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="only these (default: all)")
    parser.add_argument("--in-process", action="store_true", help="no child processes (for debugging)")
    parser.add_argument(
        "--assemble", action="store_true", help="run nothing: the result files of an interrupted run's rows"
    )


def run(options: argparse.Namespace) -> int:
    folder = options.out
    _options.check_names("--stages", options.stages, list(gpu.STAGES), "stage")
    if "timings" in (options.stages or ()) and "checks" not in options.stages:
        raise OptionError("--stages timings: expected checks too: times of what was not checked are refused")
    if options.assemble:
        if not (folder / _gpu_rows.ROWS).is_file():
            raise OptionError(
                f"--assemble: {folder / _gpu_rows.ROWS} does not exist; expected the folder of a run"
            )
        return _written(gpu.write(folder))
    if not options.smoke:
        options.device = "cuda"
        _options.device_of(options)
    if options.smoke and RESULTS in (folder.resolve(), *folder.resolve().parents):
        raise OptionError(
            f"--out {folder}: a smoke run is not a measurement; expected a path outside {RESULTS}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"--out {folder}: is not empty; expected a new or empty folder")
    try:
        candidates = tune.load(options.candidates or gpu.CANDIDATES)
    except ValueError as error:
        raise OptionError(f"--candidates {error}") from None
    plan = _gpu_tasks.Plan(options.smoke, _gpu_tasks.checked_dtypes(), candidates=candidates)
    with contextlib.ExitStack() as stack:
        if options.cache:
            try:
                print(stack.enter_context(cache.unpacked(options.cache)))
            except ValueError as error:
                raise OptionError(f"--cache {error}") from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"--out {folder}: cannot be made: {error.strerror}") from None
        stages = [stage for stage in gpu.STAGES if stage in (options.stages or gpu.STAGES)]
        progress = functools.partial(print, flush=True)
        chosen = {"stages": stages, "in_process": options.in_process, "progress": progress}
        found = gpu.run(folder, plan, budget_s=options.budget, **chosen)
    _written(folder / f"{gpu.stem(result)}.json" for result in found)
    return 0 if found and all(map(report.sound, found)) else 1


def _written(paths: Iterable[Path]) -> int:
    """Say what stands in result files; 1 if there is none."""
    found = list(paths)
    for path in found:
        print(f"{path}: {report.verdict(report.load(path))}")
    if not found:
        print("no result: the rows do not say which machine it was", file=sys.stderr)
    return 0 if found else 1
