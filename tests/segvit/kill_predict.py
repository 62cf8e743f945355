"""Bulk prediction that is killed and goes on: the results must be those of an undisturbed run.

    python kill_predict.py --kills 20 --pictures 300
    python kill_predict.py --kills 20 --pictures 20000 --kind files

Two processes, as torchrun would start them, killed at so many random moments, then left to end; results in
files and in tars. Compared with one process that nothing disturbs: every picture has its results once, with
the same bytes. Prints a line for each kind, and exits with 1 where something differed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from segvit.cli import main
from segvit.config import BackboneConfig, SegViTConfig
from segvit.model.segvit import SegViT


def make_pictures(folder: Path, count: int, side: int) -> None:
    """Small pictures in folders, every seventeenth of them damaged."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number % 7}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side * 3 // 2, 3), dtype=np.uint8)).save(path)
        if number % 17 == 16:
            path.write_bytes(path.read_bytes()[:60])


def start(words: list[str], rank: int, ranks: int, **environment: str) -> int:
    """`segvit predict` in a child forked from this process, which has imported all that it imports."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), **environment}
        log = os.open(os.devnull, os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def disturbed(words: list[str], kills: int, seconds: float) -> int:
    """Two processes, started again after each kill, until both end by themselves; how many kills met them."""
    met = 0
    while True:
        children = [start(words, rank, 2) for rank in range(2)]
        if kills:
            time.sleep(random.random() * seconds)
            kills -= 1
            for child in random.sample(children, 2):
                os.kill(child, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        met += codes.count(-signal.SIGKILL)
        if -signal.SIGKILL not in codes:
            assert 2 in codes and set(codes) <= {0, 2}, f"exit codes {codes}, and a picture is damaged"
            if not kills:
                return met


def results_of(out: Path) -> tuple[dict[str, bytes], list[dict]]:
    """Every result by its name, and the lines of the record; of tars, both from what is in them."""
    files, lines = {}, []
    for path in sorted(out.rglob("*")):
        if path.suffix == ".png":
            files[path.relative_to(out).as_posix()] = path.read_bytes()
        elif path.suffix == ".jsonl":
            lines += map(json.loads, path.read_text().splitlines())
        elif path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for member in tar:
                    assert member.name not in files, f"{member.name}: twice"
                    files[member.name] = tar.extractfile(member).read()
        else:
            assert path.is_dir() or path.name == "manifest.json", f"{path}: left behind"
    for name in [name for name in files if name.endswith(".json")]:
        files[name] = json.dumps(json.loads(files[name]) | {"tar": None}).encode()
    return files, [{**line, "tar": None} for line in lines]


def compare(kind: str, words: list[str], out: Path, kills: int) -> None:
    began = time.monotonic()
    pid = start([*words, "--out", f"{out}-whole"], 0, 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    seconds = time.monotonic() - began
    met = disturbed([*words, "--out", str(out)], kills, 2 * seconds / max(1, kills) + 0.3)
    whole, expected = results_of(Path(f"{out}-whole"))
    files, lines = results_of(out)
    assert files == whole, f"{kind}: other results"
    counts = Counter(line["picture"] for line in lines)
    assert max(counts.values()) == 1, f"{kind}: {counts.most_common(1)} lines of one picture"
    order = lambda line: line["picture"]  # noqa: E731
    assert sorted(lines, key=order) == sorted(expected, key=order), f"{kind}: other lines"
    errors = sum("error" in line for line in lines)
    print(f"{kind}: {met} kills, {len(lines)} pictures once each, {errors} of them damaged, results equal")


def ends_with_the_others(words: list[str], out: Path) -> None:
    """A process with a damaged picture, which torchrun would end all for, waits for the others."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [*words, "--out", str(out)]
    first = start(words, 0, 2, **torchrun)
    record = out / "manifest-00000-of-00002.jsonl"
    while not (record.is_file() and record.read_bytes().endswith(b"\n")):
        time.sleep(0.01)
    time.sleep(0.2)
    assert os.waitpid(first, os.WNOHANG) == (0, 0), "torchrun: the first process did not wait"
    second = start(words, 1, 2, **torchrun)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in (first, second)]
    assert codes == [2, 0], f"torchrun: exit codes {codes}"
    print("torchrun: a process with a damaged picture ended with the others")


def run(kills: int, pictures: int, side: int, kinds: list[str]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_pictures(root / "pictures", pictures, side)
        backbone = BackboneConfig(width=16, depth=1, heads=2, patch_size=8)
        values = {"taps": (0,), "decoder_dim": 16, "decoder_heads": 2, "decoder_depth": 1}
        SegViT(SegViTConfig(backbone, num_classes=3, image_size=16, **values)).save_pretrained(root / "model")
        words = ["predict", str(root / "pictures"), "--recursive", "--checkpoint", str(root / "model")]
        words += ["--no-overlay", "--accelerator", "cpu"]
        for kind in kinds:
            how = ["--manifest"] if kind == "files" else ["--pack", str(max(13, pictures // 100))]
            compare(kind, [*words, *how], root / kind, kills)
        for number in (17, 16):  # whole, and before it damaged
            words.insert(1, str(root / "pictures" / f"{number % 7}" / f"{number:05d}.png"))
        words.remove(str(root / "pictures"))
        ends_with_the_others([*words, "--manifest"], root / "torchrun")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=300, help="small ones, of files and of tars each")
    parser.add_argument("--side", type=int, default=16, help="their height; they are half as wide again")
    parser.add_argument("--kind", choices=["files", "tars"], help="results in one of them alone")
    asked = parser.parse_args()
    try:
        run(asked.kills, asked.pictures, asked.side, [asked.kind] if asked.kind else ["files", "tars"])
    except AssertionError as error:
        print(error)
        sys.exit(1)
