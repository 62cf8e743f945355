"""``python -m bench``: see ``--help``."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SMOKE_VARIABLE = "SEGVIT_BENCH_SMOKE"
DTYPES = ("float32", "bfloat16", "float16")


class OptionError(ValueError):
    """An option that cannot be honoured; the message is for the user."""


# --------------------------------------------------------------------------------------------- parsers


class _Parser(argparse.ArgumentParser):
    """One line for the user, no usage before it."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(message)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a whole number, at least 1")
    return int(text)


def _out(parser: argparse.ArgumentParser, default: str, required: bool = False) -> None:
    parser.add_argument(
        "--out", type=Path, required=required, help=f"JSON file to write (default: {default})"
    )


def _smoke(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--smoke",
        action="store_true",
        default=os.environ.get(SMOKE_VARIABLE) == "1",
        help=f"run the script itself on tiny shapes; not a measurement (also {SMOKE_VARIABLE}=1)",
    )


def _machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: what the machine has")
    parser.add_argument("--threads", type=_positive, default=2, help="threads on a CPU (default %(default)s)")


def _names(parser: argparse.ArgumentParser, option: str, what: str) -> None:
    parser.add_argument(option, nargs="+", metavar="NAME", help=f"only these {what} (default: all)")


def _budget(parser: argparse.ArgumentParser, default: float) -> None:
    parser.add_argument(
        "--budget", type=float, default=default, help="seconds for everything (default %(default)s)"
    )


# Their modules say what options they have, and run from them.
_OWN_OPTIONS = {
    "model": "whole models and decoders, image to label map, against their peers",
    "memory": "peak memory of inference and of a training step",
}


def _parser(command: str = "") -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m bench", description="Benchmarks of segvit-kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    own = "results/ and the device's name"

    p = commands.add_parser("kernels", help="the operators against their peers: correctness, time, memory")
    p.set_defaults(run=_kernels)
    _out(p, own), _machine(p), _budget(p, 540.0), _smoke(p), _names(p, "--peers", "peers")
    _names(p, "--operators", "operators, on a CPU")
    p.add_argument("--rounds", type=_positive, default=9, help="samples of a peer on a CPU (%(default)s)")
    p.add_argument("--in-process", action="store_true", help="GPU: no child processes (for debugging)")

    p = commands.add_parser("gpu", help="all that one GPU can show, within a budget, into one folder")
    p.set_defaults(run=_gpu)
    p.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="new or empty folder for the files"
    )
    p.add_argument("--cache", type=Path, metavar="ARCHIVE", help="kernels compiled ahead by 'precompile'")
    _budget(p, 480.0), _smoke(p)
    p.add_argument(
        "--candidates", type=Path, help="JSON file of launch parameters to compare (bench/candidates.json)"
    )
    p.add_argument("--stages", nargs="+", metavar="STAGE", help="only these (default: all)")
    p.add_argument("--in-process", action="store_true", help="no child processes (for debugging)")
    p.add_argument(
        "--assemble", action="store_true", help="run nothing: the result files of an interrupted run's rows"
    )

    p = commands.add_parser("precompile", help="compile for sm_90, without a GPU, all kernels of 'gpu'")
    p.set_defaults(run=_precompile)
    p.add_argument("--out", type=Path, required=True, metavar="ARCHIVE", help="file to write (.tar.gz)")
    _names(p, "--operators", "operators"), _smoke(p)

    p = commands.add_parser(
        "scaling", help="time of the operators as classes, tokens, batch, images, views grow"
    )
    p.set_defaults(run=_scaling)
    _out(p, "results/scaling- and the device"), _machine(p), _budget(p, 540.0), _smoke(p)
    _names(p, "--operators", "operators")

    for name, what in _OWN_OPTIONS.items():
        p = commands.add_parser(name, help=what)
        p.set_defaults(run=functools.partial(_own, name))
        if command == name:  # its module imports torch, which --help need not wait for
            importlib.import_module(f"bench.suites.{name}").add_arguments(p)

    p = commands.add_parser("flops", help="multiply-accumulates, parameters, memory of published models")
    p.set_defaults(run=_flops)
    _out(p, "results/flops.json"), _names(p, "--models", "models")

    p = commands.add_parser("static", help="what compiled kernels need, without running them")
    p.set_defaults(run=_static)
    _out(p, "results/static.json")
    p.add_argument("--kernels", nargs="+", choices=("triton", "cuda"), default=["triton", "cuda"])
    _names(p, "--operators", "operators")

    p = commands.add_parser(
        "simulate", help="the time of the Triton kernels on an H100 and H200, predicted from machine code"
    )
    p.set_defaults(run=_simulate)
    p.add_argument("operators", nargs="*", metavar="OPERATOR", help="only these (default: all)")
    _out(p, "results/simulate-, the architecture and Triton's version")
    p.add_argument("--batch", nargs="+", type=_positive, default=[16, 1], help="(default: 16 1)")
    p.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout, simulated too")
    p.add_argument(
        "--config", type=Path, metavar="FILE", help="JSON object: entries of the pinned parameters to change"
    )
    p.add_argument("--no-calibration", action="store_true", help="without code of known speed")

    p = commands.add_parser(
        "host", help="what calls cost before a GPU runs: launches on a stub of its driver"
    )
    p.set_defaults(run=_host)
    _out(p, "results/host- and the machine")
    p.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout, measured too")
    p.add_argument("--rounds", type=_positive, default=3, help="processes for each (default %(default)s)")
    p.add_argument("--seconds", type=float, default=0.2, help="for each call (default %(default)s)")

    p = commands.add_parser("inference", help="label maps of real images by windows, scales and flips")
    p.set_defaults(run=_inference)
    p.add_argument("checkpoint", type=Path, help="folder of a checkpoint or run")
    p.add_argument("data", type=Path, help="folder with images/validation and annotations/validation")
    _out(p, "none", required=True)
    p.add_argument("--images", type=_positive, help="only the first so many (default: all)")
    p.add_argument("--threads", type=_positive, default=2, help="threads (default %(default)s)")

    p = commands.add_parser("export", help="files of `segvit export`: labels, their tail, mIoU in int8")
    p.set_defaults(run=_export)
    p.add_argument("section", choices=("labels", "tail", "int8"), help="what is measured")
    p.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="int8: a checkpoint or run")
    p.add_argument("--data", type=Path, metavar="FOLDER", help="int8: with images/ and annotations/")
    p.add_argument("--pictures", type=_positive, help="int8: only the first so many (default: all)")
    p.add_argument("--calibration", type=_positive, default=8, help="int8: training pictures (%(default)s)")
    p.add_argument("--threads", type=_positive, default=2, help="threads (default %(default)s; tail: 1)")
    _out(p, "results/export-, the section and the machine"), _names(p, "--models", "models of labels")
    _budget(p, float("inf")), _smoke(p)

    p = commands.add_parser(
        "tune", help="time launch parameters of the Triton kernels on this GPU, pin the best"
    )
    p.set_defaults(run=_tune)
    p.add_argument("operator", help="which operator")
    p.add_argument("--dry-run", action="store_true", help="print, write nothing")
    p.add_argument(
        "--simulate",
        type=_positive,
        metavar="K",
        help="time only the K candidates predicted fastest; without a GPU print the predictions",
    )

    p = commands.add_parser("all", help="the small form of everything on this machine, then the report")
    p.set_defaults(run=_all)
    _budget(p, 570.0)
    p.add_argument("--threads", type=_positive, default=2, help="threads on a CPU (default %(default)s)")
    p.add_argument("--plan", action="store_true", help="print what would run, and for how long")

    p = commands.add_parser(
        "report", help="regenerate tables and figures of README.md and docs/, or print files"
    )
    p.set_defaults(run=_report)
    p.add_argument("files", nargs="*", type=Path, metavar="FILE", help="print these results as Markdown")
    p.add_argument(
        "--check", action="store_true", help="change nothing; name what is stale, exit 1 if anything"
    )
    p.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    return parser


# -------------------------------------------------------------------------------------------- commands


def _device(options: argparse.Namespace) -> str:
    import torch

    if options.device == "cuda" and not torch.cuda.is_available() and not getattr(options, "smoke", False):
        raise OptionError("--device cuda: PyTorch finds no GPU; expected a CUDA or ROCm device (or --smoke)")
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _default_out(prefix: str, device: str) -> Path:
    import torch

    from bench.measure import environment, results

    on_gpu = device == "cuda" and torch.cuda.is_available()
    machine = (
        torch.cuda.get_device_name()
        if on_gpu
        else f"cpu {environment.cpu_model()} {environment.instruction_set()}"
    )
    return RESULTS / f"{results.stem(f'{prefix} {machine}')}.json"


def _check_out(path: Path | None, smoke: bool = False) -> None:
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


def _check_names(option: str, names: list[str] | None, known: list[str], what: str) -> None:
    for name in names or ():
        if name not in known:
            raise OptionError(f"{option} {name}: no such {what}; expected some of {', '.join(known)}")


def _finish(result: dict, options: argparse.Namespace, default: Path, partial: object = None) -> int:
    """Print a result and write it to ``--out``, or to its ``default`` place if it is not ``partial``; 1 if
    anything of it is wrong."""
    from bench import report
    from bench.measure import results

    path = options.out or (None if partial else default)
    print(report.document(result, (path or default).stem))
    if path is None:
        print("a part of the benchmark only, and no --out: not written")
    else:
        results.dump(path, result)
        print(f"written to {path}")
    print(report.verdict(result))
    return 0 if report.sound(result) else 1


def _kernels(options: argparse.Namespace) -> int:
    _check_out(options.out, options.smoke)
    if options.smoke and options.device == "cuda":
        # Triton reads this when it is imported, in the children too.
        os.environ["TRITON_INTERPRET"] = "1"
    from bench.subjects import operators

    _check_names("--operators", options.operators, list(operators.by_name()), "operator")
    if _device(options) == "cuda":
        from bench.suites import gpu

        if options.operators:
            raise OptionError("--operators: for a run on a CPU only")
        operators.check_peers("triton", options.peers)
        plan = gpu.Plan(options.smoke, _checked_dtypes(), options.peers)
        with tempfile.TemporaryDirectory() as folder:
            chosen = {"stages": gpu.OPERATORS, "in_process": options.in_process}
            found = gpu.run(Path(folder), plan, budget_s=options.budget, **chosen)
        if not found:
            raise OptionError("kernels: nothing ran: no worker could describe this machine")
        (result,) = found
    else:
        from bench.suites import cpu

        result = cpu.run(
            budget_s=options.budget,
            threads=options.threads,
            rounds=options.rounds,
            smoke=options.smoke,
            names=options.peers,
            only=options.operators,
        )
    return _finish(result, options, _default_out("", _device(options)), options.peers or options.operators)


def _checked_dtypes() -> tuple[str, ...]:
    """Triton's interpreter computes bfloat16 wrongly, so a smoke run on a CPU leaves it out."""
    import torch

    from bench.suites import gpu

    return gpu.DTYPES if torch.cuda.is_available() else gpu.DTYPES[1:]


def _gpu(options: argparse.Namespace) -> int:
    from bench import report
    from bench.suites import cache, gpu, tune

    folder = options.out
    _check_names("--stages", options.stages, list(gpu.STAGES), "stage")
    if options.assemble:
        if not (folder / gpu.ROWS).is_file():
            raise OptionError(f"--assemble: {folder / gpu.ROWS} does not exist; expected the folder of a run")
        return _written(gpu.write(folder))
    if not options.smoke:
        options.device = "cuda"
        _device(options)
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
    plan = gpu.Plan(options.smoke, _checked_dtypes(), candidates=candidates)
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
    from bench import report

    found = list(paths)
    for path in found:
        print(f"{path}: {report.verdict(report.load(path))}")
    if not found:
        print("no result: the rows do not say which machine it was", file=sys.stderr)
    return 0 if found else 1


def _precompile(options: argparse.Namespace) -> int:
    if not options.out.resolve().parent.is_dir():
        raise OptionError(f"--out {options.out}: folder {options.out.resolve().parent} does not exist")
    from bench.subjects import operators
    from bench.suites import cache

    _check_names("--operators", options.operators, list(operators.by_name()), "operator")
    try:
        print(cache.precompile(options.out, options.operators, options.smoke))
    except RuntimeError as error:
        raise OptionError(f"precompile: {error}") from None
    return 0


def _scaling(options: argparse.Namespace) -> int:
    _check_out(options.out, options.smoke)
    from bench.subjects import operators
    from bench.suites import scaling

    _check_names("--operators", options.operators, list(operators.by_name()), "operator")
    device = _device(options)
    result = scaling.run(
        device=device,
        budget_s=options.budget,
        threads=options.threads,
        names=options.operators,
        smoke=options.smoke,
    )
    return _finish(result, options, _default_out("scaling", device), options.operators)


def _flops(options: argparse.Namespace) -> int:
    _check_out(options.out)
    from bench.subjects.published import MODELS
    from bench.suites import flops

    _check_names("--models", options.models, [model.name for model in MODELS], "model")
    result = flops.run(names=options.models)
    return _finish(result, options, RESULTS / "flops.json", options.models)


def _own(name: str, options: argparse.Namespace) -> int:
    smoke = getattr(options, "smoke", False)
    _check_out(options.out, smoke)
    module = importlib.import_module(f"bench.suites.{name}")
    try:
        result = module.main(options)
    except ValueError as error:
        raise OptionError(str(error)) from None
    # The small form has a file of its own, and so have exported files: they do not replace what a longer run
    # measured; other sections alone have none.
    sections = getattr(options, "sections", None)
    stem = "exports" if sections == ["exports"] else f"{name} quick" if options.quick else name
    partial = (sections and stem != "exports") or (options.models and not options.quick)
    return _finish(result, options, _default_out(stem, "cuda"), partial)


def _static(options: argparse.Namespace) -> int:
    _check_out(options.out)
    from bench.subjects import operators
    from bench.suites import static

    _check_names("--operators", options.operators, list(operators.by_name()), "operator")
    result = static.run(kernels=options.kernels, names=options.operators)
    return _finish(result, options, RESULTS / "static.json", options.operators or len(options.kernels) < 2)


def _simulate(options: argparse.Namespace) -> int:
    _check_out(options.out)
    _check_before(options.before)
    from bench.measure import environment, results
    from bench.subjects import parameters
    from bench.suites import simulate

    _check_names("OPERATOR", options.operators, list(simulate.OPERATORS), "operator")
    try:
        changes = parameters.load_changes(options.config) if options.config else None
        result = simulate.run(
            names=options.operators,
            batches=options.batch,
            before=options.before and options.before.resolve(),
            changes=changes,
            calibrate=not options.no_calibration,
        )
    except ValueError as error:
        raise OptionError(str(error)) from None
    version = ".".join(str(environment.version("triton")).split(".")[:2])
    default = RESULTS / f"{results.stem(f'simulate {simulate.ARCH}')}-triton-{version}.json"
    partial = options.operators or options.config or options.no_calibration or options.batch != [16, 1]
    return _finish(result, options, default, partial)


def _check_before(folder: Path | None) -> None:
    if folder and not (folder / "segvit_kernels" / "triton").is_dir():
        raise OptionError(f"--before {folder}: expected a checkout of this project")


def _host(options: argparse.Namespace) -> int:
    _check_out(options.out)
    _check_before(options.before)
    from bench.suites import host

    try:
        result = host.run(before=options.before, rounds=options.rounds, seconds=options.seconds)
    except ValueError as error:
        raise OptionError(str(error)) from None
    return _finish(result, options, _default_out("host", "cpu"))


def _inference(options: argparse.Namespace) -> int:
    _check_out(options.out)
    from bench.suites import inference

    try:
        result = inference.run(
            options.checkpoint, options.data, images=options.images, threads=options.threads
        )
    except (OSError, ValueError) as error:
        raise OptionError(str(error)) from None
    return _finish(result, options, options.out)


def _export(options: argparse.Namespace) -> int:
    _check_out(options.out, options.smoke)
    from bench.subjects import exports
    from bench.suites import export

    _check_names("--models", options.models, [case.name for case in exports.CASES], "model")
    for name in ("checkpoint", "data") if options.section == "int8" else ():
        folder = getattr(options, name)
        if folder is None or not folder.is_dir():
            raise OptionError(f"--{name} {folder}: no such folder; expected that of a trained model's {name}")
    chosen = {"models": options.models, "threads": options.threads, "calibration": options.calibration}
    chosen |= {"checkpoint": options.checkpoint, "data": options.data, "pictures": options.pictures}
    try:
        result = export.run(
            options.section,
            **chosen,
            smoke=options.smoke,
            budget_s=options.budget,
            progress=functools.partial(print, flush=True),
        )
    except (OSError, ValueError) as error:
        raise OptionError(str(error)) from None
    partial = options.models or options.pictures
    return _finish(result, options, _default_out(f"export {options.section}", "cpu"), partial)


def _tune(options: argparse.Namespace) -> int:
    from bench.suites import tune

    return tune.main(options.operator, dry_run=options.dry_run, simulate=options.simulate)


def _all(options: argparse.Namespace) -> int:
    from bench.suites import everything

    return everything.run(options.budget, options.threads, plan_only=options.plan)


def _report(options: argparse.Namespace) -> int:
    from bench import report

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


def _worker(arguments: list[str]) -> int | None:
    """What the benchmarks start themselves in; ``None`` for a user's command."""
    if arguments[:1] == ["_worker"]:
        from bench.suites import gpu

        _, section, folder, text = arguments
        options = json.loads(text)
        plan, printed = gpu.Plan(**options.pop("plan")), Path(options.pop("printed"))
        return gpu.work(section, Path(folder), plan, printed=printed, **options)
    if arguments[:1] == ["_odd"]:
        from bench.suites import gpu

        _, dtypes, backend, smoke = arguments
        return gpu.odd(json.loads(dtypes), backend, json.loads(smoke))
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
