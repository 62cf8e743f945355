"""Training that is killed or finds the disk full, and goes on: the result must be that of an undisturbed run.

    python kill.py --kills 200      kill -9 at so many random moments, half of them with two processes
    python kill.py --points 1       kill -9, and a full disk, at every single operation on files
    python kill.py --points 7       at every seventh
    python kill.py --nodes 4        one process, two nodes of one and of two, ddp and fsdp: one curve, resumed
                                    by others; a process that is killed ends all

Every run is a child forked from this process, which has imported all that it imports. After the last try of a
run its weights, optimizer, random states, log, evaluation and links are compared with the undisturbed run's,
bitwise. Prints one line of counts for each kind and exits with 1 where something differed.
"""

from __future__ import annotations

import argparse
import builtins
import csv
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from segvit.options import TrainConfig
from segvit.system.files import follow
from segvit.training.train import train

MODEL = {"width": 8, "depth": 1, "heads": 1, "taps": [0], "patch_size": 8, "decoder_depth": 1}
OPERATIONS = ("fsync", "mkdir", "open", "rename", "replace", "rmdir", "symlink", "unlink")


def options(folder: Path, **changes: object) -> TrainConfig:
    values = {
        "data": "synthetic", "out": str(folder), "preset": "vit_tiny", "model": MODEL, "image_size": 16,
        "max_steps": 6, "batch_size": 2, "warmup_steps": 2, "lr": 1e-3, "ema": 0.9, "log_every": 3,
        "checkpoint_every": 2, "evaluate_every": 4, "keep_checkpoints": 1, "synthetic_images": 7,
        "synthetic_validation": 2, "workers": 0, "progress": False, "accelerator": "cpu", "resume": True,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


class Run:
    """Children that train in one folder: one, or several as torchrun would start them, on so many nodes."""

    def __init__(self, config: TrainConfig, processes: int = 1, hook: object = None, nodes: int = 1) -> None:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        self.children = [
            _fork(lambda rank=rank: _child(config, rank, processes, port, hook, nodes))
            for rank in range(processes)
        ]

    def wait(self, seconds: float) -> list[int] | None:
        """Exit codes of all children (-9 where killed), None where one is still running."""
        deadline = time.monotonic() + seconds
        codes = {}
        while len(codes) < len(self.children):
            for child in set(self.children) - set(codes):
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = os.waitstatus_to_exitcode(status)
            if len(codes) < len(self.children):
                if time.monotonic() > deadline:
                    self.children = [child for child in self.children if child not in codes]
                    return None
                time.sleep(0.002)
        return [codes[child] for child in self.children]

    def kill(self) -> None:
        for child in random.sample(self.children, len(self.children)):
            os.kill(child, signal.SIGKILL)
            if random.random() < 0.5:
                time.sleep(random.random() / 20)
        for child in self.children:
            os.waitpid(child, 0)


def _fork(work: object) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def _child(config: TrainConfig, rank: int, processes: int, port: int, hook: object, nodes: int = 1) -> int:
    log = os.open(f"{config.out}.{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if processes > 1:
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "kill", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "RANK": str(rank), "LOCAL_RANK": str(rank % (processes // nodes)), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes // nodes), "GROUP_RANK": str(rank // (processes // nodes)),
            "GROUP_WORLD_SIZE": str(nodes),
            "ROLE_RANK": str(rank), "ROLE_WORLD_SIZE": str(processes),
        }  # fmt: skip
    if hook is not None:
        hook()
    try:
        train(config)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(f"OSError: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def import_what_runs_import(config: TrainConfig) -> None:
    """Most of a tiny run's time, were every child to do it."""
    names = Path(f"{config.out}.modules")

    def work() -> int:
        code = _child(config, 0, 1, 0, None)
        names.write_text("\n".join(sys.modules))
        return code

    os.waitpid(_fork(work), 0)
    for name in names.read_text().splitlines() if names.exists() else ():
        importlib.import_module(name)


# What a run leaves


def left_behind(run: Path) -> dict[str, object]:
    """All that must not depend on how often a run was disturbed."""
    checkpoints = run / "checkpoints"
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    state = torch.load(checkpoints / "last" / "trainer.pt", weights_only=True)
    state.pop("elapsed")
    return {
        "rows": rows,
        "state": state,
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.name != "data.json"),
        "weights": {
            name: (follow(checkpoints / name) / "model.safetensors").read_bytes() for name in ("last", "best")
        },
        "links": {name: follow(checkpoints / name).resolve().name for name in ("last", "best")},
        "evaluation": json.loads((checkpoints / "last" / "evaluation.json").read_text()),
    }


def difference(a: object, b: object, place: str = "") -> str | None:
    """Where two of them differ first."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return None if torch.equal(a, b) else place
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next((d for key in a if (d := difference(a[key], b[key], f"{place}/{key}"))), None)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return next((d for i, (x, y) in pairs if (d := difference(x, y, f"{place}/{i}"))), None)
    return None if type(a) is type(b) and a == b else f"{place}: {str(a)[:300]} instead of {str(b)[:300]}"


class FoundError(Exception):
    """A run that was not continued as it should be."""


def finish(config: TrainConfig, processes: int, expected: dict[str, object]) -> None:
    """Resume until the end and compare."""
    run = Run(config, processes)
    codes = run.wait(300)
    if codes != [0] * processes:
        if codes is None:
            run.kill()
        logs = "".join(
            path.read_text() for path in Path(config.out).parent.glob(f"{Path(config.out).name}.*")
        )
        raise FoundError(f"{config.out}: resumed, exit codes {codes}: {logs[-2000:]}")
    if where := difference(left_behind(Path(config.out)), expected):
        raise FoundError(f"{config.out}: differs from the undisturbed run in {where}")


# What disturbs it


class AtOperation:
    """Calls `action` before the `count`-th operation that changes files."""

    def __init__(self, count: int, action: object) -> None:
        self.count, self.action, self.seen = count, action, 0

    def _step(self) -> None:
        self.seen += 1
        if self.seen == self.count:
            self.action()

    def __call__(self) -> None:
        for name in OPERATIONS:
            setattr(os, name, self._wrapped(getattr(os, name), name))
        opened = io.open

        def open_file(file, mode="r", *args, **kwargs):
            if set(mode) & set("wax+"):
                self._step()
            return opened(file, mode, *args, **kwargs)

        io.open = builtins.open = open_file

    def _wrapped(self, function: object, name: str) -> object:
        def call(*args, **kwargs):
            if name != "open" or args[1] & (os.O_WRONLY | os.O_RDWR):
                self._step()
            return function(*args, **kwargs)

        return call


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk(size: int) -> object:
    """From now on no file can grow beyond `size` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def random_kills(root: Path, kills: int, processes: int, seconds: float, expected: dict) -> str:
    done = runs = 0
    while done < kills:
        runs += 1
        config = options(root / f"random{processes}-{runs}")
        tries = 0
        while done < kills and tries < 4:
            run, before = Run(config, processes), time.monotonic()
            if run.wait(random.uniform(0, seconds)) is not None:
                if not tries:  # the machine was busier when it was measured
                    seconds = min(seconds, time.monotonic() - before)
                break
            run.kill()
            done, tries = done + 1, tries + 1
        finish(config, processes, expected)
        shutil.rmtree(config.out)
    return f"{done} kills at random moments of {runs} runs on {processes} process(es), all continued bitwise"


def at_every_operation(root: Path, stride: int, kind: str, expected: dict) -> str:
    point, tried = 1, 0
    sizes = [0, 200, 3000, 12000]
    while True:
        config = options(root / f"{kind}{point}")
        size = sizes[tried % len(sizes)]
        action = kill_self if kind == "kill" else fill_disk(size)
        run = Run(config, 1, AtOperation(point, action))
        codes = run.wait(300)
        end = codes == [0]
        if not end:
            tried += 1
            if codes != [-signal.SIGKILL if kind == "kill" else 2]:
                log = Path(f"{config.out}.0.log").read_text()
                raise FoundError(f"{config.out}: exit codes {codes}: {log}")
            if kind == "full":
                _one_line_and_nothing_temporary(config, point)
            finish(config, 1, expected)
            if kind == "full" and Path(f"{config.out}.0.log").read_text().count("OSError") != 1:
                raise FoundError(f"{config.out}: not one line")
        shutil.rmtree(config.out, ignore_errors=True)
        if end and (kind == "kill" or size == 0):
            return (
                f"{tried} runs with {'a kill' if kind == 'kill' else 'a full disk'} at an operation on files"
            )
        if end:
            tried += 1
        else:
            point += stride


def several_nodes(root: Path, most: int) -> str:
    """One curve of losses whatever the processes and the strategy, also when others go on; one ends all."""
    changes = {
        "model": {**MODEL, "decoder_dropout": 0.0, "drop_path": 0.0}, "max_steps": 20, "ema": 0.9,
        "checkpoint_every": 10, "keep_checkpoints": "all", "evaluate_every": 0, "log_every": 1,
    }  # fmt: skip
    kinds = [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")]
    others = {"ddp1": (2, "fsdp"), "fsdp2": (1, "ddp"), "ddp4": (1, "ddp"), "fsdp4": (2, "fsdp")}
    kinds = [kind for kind in kinds if kind[0] <= most]
    curves = {}

    def go_on(name: str, processes: int, strategy: str) -> None:
        """Run to the end; the processes are two nodes of torchrun."""
        config = options(root / name, batch_size=4 // processes, strategy=strategy, **changes)
        if (codes := Run(config, processes, nodes=min(2, processes)).wait(300)) != [0] * processes:
            raise FoundError(f"{config.out}: exit codes {codes}: {_logs(config)}")

    for processes, strategy in kinds:
        name = f"{strategy}{processes}"
        go_on(name, processes, strategy)
        curves[name] = _losses(root / name)
        if name in others:  # what these have begun they finish
            shutil.rmtree(root / name / "checkpoints" / "20")
            go_on(name, *others[name])
            curves[f"{name}, then {others[name]}"] = _losses(root / name)
    for name, losses in curves.items():
        apart = max(abs(a - b) for a, b in zip(losses, curves["ddp1"], strict=True))
        if apart > 1e-5 or len(losses) != 20 or max(losses) - min(losses) < 0.1:
            raise FoundError(f"{name}: losses {losses}, by one process {curves['ddp1']}")
    for strategy in ("fsdp", "ddp")[: most // 2]:
        _one_ends_all(root / f"killed-{strategy}", {**changes, "strategy": strategy})
    return f"{len(kinds)} kinds of runs have one curve, resumed by others; a killed process ends all"


def _one_ends_all(out: Path, changes: dict) -> None:
    """One of two is killed: the other ends by itself, with a line, and the same command goes on."""
    config = options(out, batch_size=2, **{**changes, "max_steps": 100000})
    run = Run(config, 2, nodes=2)
    while not (out / "checkpoints" / "10").is_dir():
        if run.wait(0.02) is not None:
            raise FoundError(f"{config.out}: ended: {_logs(config)}")
    os.kill(run.children[1], signal.SIGKILL)
    codes = run.wait(60)
    if codes != [2, -signal.SIGKILL] or "another of the processes has ended" not in _logs(config):
        raise FoundError(f"{config.out}: exit codes {codes} after one was killed: {_logs(config)}")
    step = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdecimal())
    config = options(out, batch_size=2, **{**changes, "max_steps": step + 10})
    if (codes := Run(config, 2, nodes=2).wait(300)) != [0, 0] or len(_losses(out)) != step + 10:
        raise FoundError(f"{config.out}: resumed after a kill, exit codes {codes}: {_logs(config)}")


def _losses(out: Path) -> list[float]:
    with (out / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def _logs(config: TrainConfig) -> str:
    out = Path(config.out)
    return "".join(path.read_text() for path in out.parent.glob(f"{out.name}.*.log"))[-2000:]


def _one_line_and_nothing_temporary(config: TrainConfig, point: int) -> None:
    log = Path(f"{config.out}.0.log").read_text().splitlines()
    errors = [line for line in log if line.startswith("OSError: ")]
    if len(errors) != 1 or "Traceback" in "".join(log):
        raise FoundError(f"{config.out}: expected one line, got {log}")
    left = [path for path in Path(config.out).rglob(".*")]
    if left:
        raise FoundError(f"{config.out}: left {left}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--points", type=int, default=0)
    parser.add_argument("--nodes", type=int, default=0, choices=[0, 2, 4], help="processes, at most")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        import_what_runs_import(options(root / "first"))
        if arguments.nodes:
            try:
                print(several_nodes(root, arguments.nodes), flush=True)
            except FoundError as error:
                print(error)
                return 1
        if not (arguments.kills or arguments.points):
            return 0
        for processes in (1, 2) if arguments.kills else (1,):
            config = options(root / f"whole{processes}")
            before = time.monotonic()
            codes = Run(config, processes).wait(300)
            seconds = time.monotonic() - before
            if codes != [0] * processes:
                print(codes, *(path.read_text() for path in root.glob("whole*.log")))
                return 1
            expected = left_behind(Path(config.out))
            try:
                if arguments.kills:
                    kills = arguments.kills // 2
                    print(random_kills(root, kills, processes, seconds, expected), flush=True)
                if arguments.points and processes == 1:
                    for kind in ("kill", "full"):
                        print(at_every_operation(root, arguments.points, kind, expected), flush=True)
            except FoundError as error:
                print(error)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
