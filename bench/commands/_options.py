"""Options that commands share, what they may be, and what becomes of a result."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from bench import report
from bench.commands import OptionError
from bench.measure import environment, results
from segvit_kernels import _native

ROOT = environment.ROOT
RESULTS = ROOT / "bench" / "results"
SMOKE_VARIABLE = "SEGVIT_BENCH_SMOKE"


# --------------------------------------------------------------------------------------------- parsers


def positive(text: str) -> int:
    """A whole number, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a whole number, at least 1")
    return int(text)


def add_out(parser: argparse.ArgumentParser, default: str, required: bool = False) -> None:
    parser.add_argument(
        "--out", type=Path, required=required, help=f"JSON file to write (default: {default})"
    )


def add_smoke(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--smoke",
        action="store_true",
        default=os.environ.get(SMOKE_VARIABLE) == "1",
        help=f"run the script itself on tiny shapes; not a measurement (also {SMOKE_VARIABLE}=1)",
    )


def add_threads(parser: argparse.ArgumentParser, what: str = "threads", note: str = "") -> None:
    parser.add_argument("--threads", type=positive, default=2, help=f"{what} (default %(default)s{note})")


def add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: what the machine has")
    add_threads(parser, "threads on a CPU")


def add_names(parser: argparse.ArgumentParser, option: str, what: str) -> None:
    parser.add_argument(option, nargs="+", metavar="NAME", help=f"only these {what} (default: all)")


def add_budget(parser: argparse.ArgumentParser, default: float) -> None:
    parser.add_argument(
        "--budget", type=float, default=default, help="seconds for everything (default %(default)s)"
    )


# -------------------------------------------------------------------------------------------- checks


def device_of(options: argparse.Namespace) -> str:
    """``cpu`` or ``cuda``: what is asked for, or what the machine has. A line on
    stderr where a CPU has no kernels.

    Raises:
        OptionError: a GPU is asked for, and there is none.
    """
    if options.device == "cuda" and not torch.cuda.is_available() and not getattr(options, "smoke", False):
        raise OptionError("--device cuda: PyTorch finds no GPU; expected a CUDA or ROCm device (or --smoke)")
    found = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    reason = _native.why_not("cpu", torch.device("cpu"), None) if found == "cpu" else None
    if reason is not None:
        print(f"python -m bench: ours runs on the eager backend: {reason}", file=sys.stderr)
    return found


def check_out(path: Path | None, smoke: bool = False) -> None:
    """Refuse a file that cannot be written, or that a smoke run must not write."""
    if path is None:
        if smoke:
            raise OptionError("--out is missing; expected a file for what a smoke run writes")
        return
    if smoke and RESULTS in path.resolve().parents:
        raise OptionError(
            f"--out {path}: a smoke run is not a measurement; expected a path outside {RESULTS}"
        )
    if not path.resolve().parent.is_dir():
        raise OptionError(f"--out {path}: folder {path.resolve().parent} does not exist")
    if path.is_dir() or not os.access(path.resolve().parent, os.W_OK):
        raise OptionError(f"--out {path}: cannot be written")


def check_names(option: str, names: Sequence[str] | None, known: Iterable[str], what: str) -> None:
    """Refuse a name that is not known."""
    for name in names or ():
        if name not in known:
            raise OptionError(f"{option} {name}: no such {what}; expected some of {', '.join(known)}")


def check_operators(names: Sequence[str] | None) -> None:
    """Refuse what is no operator."""
    from bench.subjects import operators

    check_names("--operators", names, list(operators.by_name()), "operator")


def check_models(names: Sequence[str] | None) -> None:
    """Refuse what is no published model."""
    from bench.subjects.published import MODELS

    check_names("--models", names, [model.name for model in MODELS], "model")


def check_before(folder: Path | None) -> None:
    """Refuse what is no checkout of this project."""
    if folder and not (folder / "segvit_kernels" / "triton").is_dir():
        raise OptionError(f"--before {folder}: expected a checkout of this project")


# -------------------------------------------------------------------------------------------- results


def default_out(prefix: str, device: str) -> Path:
    """The result file of this machine."""
    on_gpu = device == "cuda" and torch.cuda.is_available()
    machine = (
        torch.cuda.get_device_name()
        if on_gpu
        else f"cpu {environment.cpu_model()} {environment.instruction_set()}"
    )
    return RESULTS / f"{results.stem(f'{prefix} {machine}')}.json"


def finish(result: dict, options: argparse.Namespace, default: Path, partial: object = None) -> int:
    """Print a result and write it to ``--out``, or to its ``default`` place if it is not ``partial``; 1 if
    anything of it is wrong."""
    path = options.out or (None if partial else default)
    print(report.document(result, (path or default).stem))
    if path is None:
        print("a part of the benchmark only, and no --out: not written")
    else:
        results.dump(path, result)
        print(f"written to {path}")
    print(report.verdict(result))
    return 0 if report.sound(result) else 1
