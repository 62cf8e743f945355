"""``python -m bench``: see ``--help``."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
README = RESULTS.parent.parent / "README.md"
SMOKE_VARIABLE = "SEGVIT_BENCH_SMOKE"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of segvit-kernels.")
    commands = parser.add_subparsers(dest="command", required=True)

    gpu = commands.add_parser("gpu", help="correctness, time and memory on this machine's GPU")
    gpu.add_argument("--out", type=Path, help="JSON file to write (default: results/ and the GPU's name)")
    gpu.add_argument(
        "--budget", type=float, default=540.0, help="seconds for everything (default %(default)s)"
    )
    gpu.add_argument(
        "--interpret-smoke",
        action="store_true",
        help=f"run the script itself on tiny shapes on the CPU; not a measurement (also {SMOKE_VARIABLE}=1)",
    )
    gpu.add_argument("--peers", nargs="+", metavar="NAME", help="time only these peers (default: all)")
    gpu.add_argument("--in-process", action="store_true", help="no child processes (for debugging)")

    cpu = commands.add_parser("cpu", help="the operators against their peers on this machine's CPU, float32")
    cpu.add_argument("--out", type=Path, help="JSON file to write (default: results/ and the CPU's name)")
    cpu.add_argument("--threads", type=int, default=2, help="threads of every peer (default %(default)s)")
    cpu.add_argument("--rounds", type=int, default=9, help="samples of every peer (default %(default)s)")
    cpu.add_argument("--peers", nargs="+", metavar="NAME", help="only these peers (default: all)")
    cpu.add_argument("--smoke", action="store_true", help="tiny shapes; not a measurement")

    flops = commands.add_parser("flops", help="multiply-accumulates, parameters, memory of published models")
    flops.add_argument("--out", type=Path, help="JSON file to write as well")
    flops.add_argument("--models", nargs="+", metavar="NAME", help="only these models (default: all)")
    flops.add_argument(
        "--memory", action="store_true", help="also run every model for its peak memory (minutes)"
    )

    inference = commands.add_parser(
        "inference", help="label maps of real images by windows, scales and flips"
    )
    inference.add_argument("checkpoint", type=Path, help="folder of a checkpoint or run")
    inference.add_argument("data", type=Path, help="folder with images/validation and annotations/validation")
    inference.add_argument("--out", type=Path, required=True, help="JSON file to write")
    inference.add_argument("--images", type=int, help="only the first so many (default: all)")
    inference.add_argument("--threads", type=int, default=2, help="threads (default %(default)s)")

    model = commands.add_parser(
        "model", help="whole models, image to label map, against the published formula"
    )
    model.add_argument("--out", type=Path, help="JSON file to write (default: results/model- and the device)")
    model.add_argument("--models", nargs="+", metavar="NAME", help="only these models (default: all)")
    model.add_argument("--batch", nargs="+", type=int, default=[1], help="batch sizes (default 1)")
    model.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), help="default: the first two"
    )
    model.add_argument("--threads", type=int, default=2, help="threads on a CPU (default %(default)s)")
    model.add_argument("--rounds", type=int, default=7, help="samples of every way (default %(default)s)")
    model.add_argument(
        "--compile", action="store_true", help="torch.compile of the published formula too (minutes)"
    )
    model.add_argument("--smoke", action="store_true", help="a tiny model; not a measurement")

    report = commands.add_parser("report", help="Markdown of result files")
    report.add_argument("files", nargs="+", type=Path, metavar="FILE")

    readme = commands.add_parser("readme", help="update the tables between the README's bench markers")
    readme.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if a table is out of date"
    )
    readme.add_argument("--readme", type=Path, default=README, help="file to update")
    readme.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    return parser


def _fail(message: str, code: int = 2) -> int:
    print(f"python -m bench: error: {message}", file=sys.stderr)
    return code


def _write(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never a part."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _default_out(device: str) -> Path:
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", device.lower().replace("(r)", "")).strip("-") + ".json")


def _out_problem(path: Path | None, smoke: bool) -> str | None:
    if path is None:
        return "--out is missing; expected a file for what a smoke run writes" if smoke else None
    if smoke and RESULTS in path.resolve().parents:
        return f"--out {path}: a smoke run is not a measurement; expected a path outside {RESULTS}"
    if not path.resolve().parent.is_dir():
        return f"--out {path}: folder {path.resolve().parent} does not exist"
    if path.is_dir() or not os.access(path.resolve().parent, os.W_OK):
        return f"--out {path}: cannot be written"
    return None


def _finite(value: object) -> object:
    """``value`` with ``None`` for what JSON cannot say: infinities and NaN, as a failed check may have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finish(result: dict, path: Path) -> int:
    from bench import report

    result["targets"] = [
        {"operator": op, "name": e["target"].name, "measured": e["measured"], "met": e["met"]}
        for op in sorted({r["operator"] for r in result["checks"]})
        for e in report.targets(result, op)
    ]
    _write(path, json.dumps(_finite(result), indent=1, sort_keys=True, allow_nan=False) + "\n")
    print(report.document(result, path.stem))
    failed = sum(r["status"] == "failed" for r in result["checks"])
    passed = sum(r["status"] == "ok" for r in result["checks"])
    print(f"{passed} checks passed, {failed} failed; {result['elapsed_s']} s; written to {path}")
    # A peer may fail; ours, or a whole row of the table, may not.
    broken = [r for r in result["timings"] if r["status"] == "failed" and r.get("peer", "fused") == "fused"]
    return 0 if result["correct"] and not broken else 1


def _gpu(options: argparse.Namespace) -> int:
    smoke = options.interpret_smoke or os.environ.get(SMOKE_VARIABLE) == "1"
    if problem := _out_problem(options.out, smoke):
        return _fail(problem)
    if smoke:
        # Triton reads this when it is imported, in the children too.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not smoke and not torch.cuda.is_available():
        return _fail("no GPU that PyTorch can use; expected a CUDA or ROCm device (or --interpret-smoke)")
    from bench import gpu

    options.out = options.out or _default_out(torch.cuda.get_device_name())
    result = gpu.run(budget_s=options.budget, smoke=smoke, in_process=options.in_process, peers=options.peers)
    return _finish(result, options.out)


def _cpu(options: argparse.Namespace) -> int:
    if problem := _out_problem(options.out, options.smoke):
        return _fail(problem)
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            return _fail(f"--{name} is {getattr(options, name)}; expected at least 1")
    from bench import cpu, environment

    options.out = options.out or _default_out(f"cpu {environment.cpu_model()}")
    result = cpu.run(threads=options.threads, rounds=options.rounds, smoke=options.smoke, names=options.peers)
    return _finish(result, options.out)


def _flops(options: argparse.Namespace) -> int:
    if problem := _out_problem(options.out, False):
        return _fail(problem)
    from bench import flops

    known = [model.name for model in flops.MODELS]
    for name in options.models or ():
        if name not in known:
            return _fail(f"--models {name}: no such model; expected some of {', '.join(known)}")
    result = flops.run(memory=options.memory, names=options.models)
    if options.out:
        _write(options.out, json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(flops.tables(result)["models"])
    return 0


def _inference(options: argparse.Namespace) -> int:
    if problem := _out_problem(options.out, False):
        return _fail(problem)
    from bench import inference

    try:
        result = inference.run(
            options.checkpoint, options.data, images=options.images, threads=options.threads
        )
    except (OSError, ValueError) as error:
        return _fail(str(error))
    _write(options.out, json.dumps(result, indent=1, sort_keys=True) + "\n")
    return 0


def _model(options: argparse.Namespace) -> int:
    if problem := _out_problem(options.out, options.smoke):
        return _fail(problem)
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            return _fail(f"--{name} is {getattr(options, name)}; expected at least 1")
    if min(options.batch) < 1:
        return _fail(f"--batch is {min(options.batch)}; expected at least 1")
    from bench import environment, flops, model

    known = [m.name for m in flops.MODELS]
    for name in options.models or ():
        if name not in known:
            return _fail(f"--models {name}: no such model; expected some of {', '.join(known)}")
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {environment.cpu_model()}"
    result = model.run(
        names=options.models,
        batches=options.batch,
        dtypes=options.dtype or model.DTYPES,
        threads=options.threads,
        rounds=options.rounds,
        compiled=options.compile,
        smoke=options.smoke,
    )
    _write(
        options.out or _default_out(f"model {device}"), json.dumps(result, indent=1, sort_keys=True) + "\n"
    )
    print(model.tables(result)["models"])
    return 0


def _report(options: argparse.Namespace) -> int:
    from bench import report

    print("\n".join(report.document(report.load(path), path.stem) for path in options.files))
    return 0


def _readme(options: argparse.Namespace) -> int:
    from bench import report

    try:
        text = options.readme.read_text(encoding="utf-8")
    except OSError as error:
        return _fail(f"{options.readme}: cannot be read: {error.strerror}")
    made = report.regenerate(text, options.results)
    if made == text:
        print(f"{options.readme}: up to date")
    elif options.check:
        return _fail(f"{options.readme}: tables are out of date; run 'python -m bench readme'", 1)
    else:
        _write(options.readme, made)
        print(f"{options.readme}: updated")
    return 0


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    # What the benchmarks start themselves in.
    if arguments[:1] == ["_worker"]:
        from bench import gpu

        _, section, rows, options = arguments
        return gpu.work(section, Path(rows), **json.loads(options))
    if arguments[:1] == ["_memory"]:
        from bench import cpu

        print(json.dumps(cpu.measure_memory(json.loads(arguments[1]))))
        return 0
    if arguments[:1] == ["_flops_memory"]:
        from bench import flops

        print(json.dumps(flops.measure_memory(*arguments[1:])))
        return 0
    if arguments[:1] == ["_inference_memory"]:
        from bench import inference

        print(json.dumps(inference.measure_memory(*json.loads(arguments[1]))))
        return 0
    options = _parser().parse_args(arguments)
    commands = {
        "gpu": _gpu,
        "cpu": _cpu,
        "flops": _flops,
        "inference": _inference,
        "model": _model,
        "report": _report,
        "readme": _readme,
    }
    command = commands[options.command]
    try:
        return command(options)
    except ValueError as error:
        if type(error).__name__ not in ("ReportError", "OptionError"):
            raise
        return _fail(str(error))


if __name__ == "__main__":
    sys.exit(main())
