"""`segvit bench`: times against a clock made by hand, from a model to a report, and its refusals."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segvit_kernels
from segvit import SegViT, SegViTConfig
from segvit.cli import main
from segvit.commands import bench
from segvit.config import PRESETS
from segvit.model.linear_head import LinearSegmenter
from segvit.options import BenchConfig
from segvit.speed import measure, report

pytestmark = pytest.mark.usefixtures("float32_engines")

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = SegViTConfig.preset(
        "vit_tiny", 5, width=32, depth=2, heads=2, taps=(0, 1), patch_size=8, decoder_depth=1, image_size=32
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    SegViT(config).save_pretrained(folder)
    return folder


def command(capsys, *words):
    """What the command prints."""
    assert main(["bench", *map(str, words), "--accelerator", "cpu", "--seconds", "0.02"]) == 0
    return capsys.readouterr().out


def fails(capsys, *words):
    """The one line that a command with a mistake prints."""
    assert main(["bench", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


# How time is measured


def test_calls_are_timed_in_turns():
    clock, order = Clock(), []
    slow = iter([1.0, 3.0, 2.0, 50.0])

    def way(name, seconds):
        def prepare():
            clock.spend(1000)  # is not the call's
            return lambda: (order.append(name), clock.spend(seconds()))

        return prepare

    calls = {"slow": way("slow", lambda: next(slow)), "fast": way("fast", lambda: 0.5)}
    samples = measure.interleave(calls, 4.0, CPU, clock)
    assert samples == {"slow": [1.0, 3.0, 2.0], "fast": [0.5] * 8}
    assert order == ["slow", "fast", "fast", "slow", "slow", "fast", *["fast"] * 5]


def test_summary():
    found = measure._summary([0.02 * i for i in range(101)][::-1])
    assert found == pytest.approx({"p25_s": 0.5, "p50_s": 1.0, "p75_s": 1.5, "p95_s": 1.9, "calls": 101})


class Function(torch.nn.Module):
    """Parts that take the time they are told to; marks cost something too."""

    def __init__(self, clock, times):
        super().__init__()
        self.clock, self.times = clock, times
        self.network = torch.nn.Module()
        self.network.backbone, self.network.decoder = torch.nn.Identity(), torch.nn.Identity()
        for name in ("backbone", "decoder"):
            getattr(self.network, name).forward = lambda x, name=name: (clock.spend(times[name]), x)[1]

    def forward(self, images):
        self.clock.spend(self.times["preprocessing"])
        images = self.network.decoder(self.network.backbone(images))
        self.clock.spend(self.times["tail"])
        return images


def test_where_the_time_goes(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    times = {"preprocessing": 1.0, "backbone": 20.0, "decoder": 5.0, "tail": 3.0}
    function = Function(clock, times)
    found = measure.breakdown(function, torch.zeros(1), seconds=200.0)
    assert found["parts"] == times and list(found["parts"]) == list(measure.PARTS)
    assert found["total_s"] == 29 and found["remainder_s"] == 0 and found["calls"] == 4
    assert not function.network.backbone._forward_hooks and not function.network.decoder._forward_hooks

    marked = measure._Marks.__call__
    monkeypatch.setattr(
        measure._Marks, "__call__", lambda self, *_: (clock.spend(0.25), marked(self), None)[-1]
    )
    found = measure.breakdown(function, torch.zeros(1), seconds=0.0)
    assert found["calls"] == 3
    assert found["total_s"] == 29.25 and found["remainder_s"] == 29.25 - 30


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's high-water mark")
def test_memory_of_a_call():
    found = measure._peak_memory(lambda: torch.ones(2**24).sum(), CPU)  # 64 MiB
    if found["before_bytes"] is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert 60 < (found["peak_bytes"] - found["before_bytes"]) / 2**20 < 100


def test_backends_that_ran_are_recorded():
    query = torch.randn(1, 4, 1, 16)
    with segvit_kernels.record_backends() as outer:
        with segvit_kernels.record_backends() as inner:
            segvit_kernels.query_attention(query, query, query, backend="eager")
        assert inner == {"query_attention_fwd": {"eager"}} and outer == {}
        segvit_kernels.fused_atm(query, query, query, backend="eager")
    segvit_kernels.query_attention(query, query, query, backend="eager")
    assert outer == {"atm_fwd": {"eager"}} and len(inner) == 1


# From a model to a report


def test_a_checkpoint(checkpoint, tmp_path, capsys):
    file = tmp_path / "result.json"
    out = command(capsys, checkpoint, "--size", "40", "36", "--batch", "2", "--json", file, "--threads", "1")
    result = json.loads(file.read_text())
    ways = {row["way"]: row for row in result["ways"]}
    assert list(ways)[:3] == ["predict, float32", "engine, graph, float32", "engine, graph, bfloat16"]
    assert ways["engine, graph, float32"]["same_labels"] > 0.99
    for row in ways.values():
        assert row["way"] in out and row["calls"] >= 3 and 0 < row["p50_s"] <= row["p95_s"]
        assert row["images_per_s"] == pytest.approx(2 / row["p50_s"], rel=2)
    spent = result["breakdown"]
    assert sum(spent["parts"].values()) + spent["remainder_s"] == pytest.approx(spent["total_s"])
    assert all(part in out for part in measure.PARTS) and "remainder" in out
    assert {"atm_fwd", "semantic_argmax"} <= set(result["operators"])
    assert all(backends == ["eager"] for backends in result["operators"].values())
    assert "atm_fwd eager" in out
    assert result["images"] == {"batch": 2, "height": 40, "width": 36, "source": "random"}
    assert result["model"]["trained"] and result["model"]["classes"] == 5 and "random weights" not in out
    assert result["environment"]["threads"] == 1 and result["environment"]["torch"] == torch.__version__
    isa = result["environment"]["isa"]
    assert segvit_kernels.runs_isa(isa) if isa else segvit_kernels.why_not("cpu", CPU)
    assert all(line in out for line in result["advice"]) and "Shrunk" not in out
    assert torch.get_num_threads() == 1 or os.environ.get("OMP_NUM_THREADS") != "1"


def test_a_preset(capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "vit_tiny", {"width": 32, "depth": 8, "heads": 2, "taps": (5, 7)})
    out = command(capsys, "vit_tiny", "--size", "32", "--classes", "7", "--dtype", "bfloat16")
    assert "vit_tiny, random weights" in out and "7 classes; 1 x 32 x 32 pixels" in out
    assert "engine, graph, bfloat16, Shrunk" in out and "engine, graph, float32" in out
    assert "segvit train --shrunk" in out
    out = command(capsys, "vit_tiny", "--size", "32", "--classes", "7", "--shrunk", "--no-alternatives")
    assert "vit_tiny (Shrunk), random weights" in out and "train --shrunk" not in out
    assert out.count("engine, graph") == 1 and "query_attention_fwd eager" in out


def test_a_linear_head_and_a_picture(tmp_path, capsys):
    config = SegViTConfig.preset("vit_tiny", 3, width=32, depth=1, heads=2, taps=(0,), image_size=32)
    LinearSegmenter(config).save_pretrained(tmp_path / "linear")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 41, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    out = command(capsys, tmp_path / "linear", "--image", tmp_path / "a.png", "--no-alternatives")
    assert f"1 x 32 x 32 pixels, {tmp_path / 'a.png'}" in out


def test_a_wrong_engine_shows(checkpoint, tmp_path, capsys, monkeypatch):
    """In the table, and beside the advice."""
    make = SegViT.compile_for_inference

    def wrong(self, *args, **kwargs):
        engine = make(self, *args, **kwargs)
        engine._run = lambda images: 4 - engine.function(images)
        return engine

    monkeypatch.setattr(SegViT, "compile_for_inference", wrong)
    out = command(capsys, checkpoint, "--json", tmp_path / "r.json", "--no-alternatives")
    row = json.loads((tmp_path / "r.json").read_text())["ways"][1]
    bench._check(BenchConfig(model=str(checkpoint), json=str(tmp_path / "r.json")))  # may be replaced
    assert row["same_labels"] < 0.5
    assert f"but {100 * row['same_labels']:.1f} % of the labels are predict's" in out


def test_what_a_compiled_engine_is_compared_with(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    out = command(capsys, checkpoint, "--method", "compile")
    assert "engine, compile, float32" in out and "engine, eager, float32" in out
    assert "method eager: " in out and "not measured" not in out
    assert "where the time goes (engine, run eagerly)" in out


def result_of(*p50, **changes):
    ways = [
        {"option": option, "p50_s": t, "p25_s": 0.9 * t, "p75_s": 1.1 * t, "same_labels": 1.0}
        for option, t in zip(("", "", "dtype bfloat16", "threads 8", "shrunk"), p50, strict=False)
    ]
    return {"ways": ways, "missing": {}, "engine": {"method": "compile"}, **changes}


def test_advice():
    assert report.advice(result_of(3.0, 1.0, 2.0, 0.5, 0.25)) == [
        "model.compile_for_inference(size, batch): 3.00x (1 s against 3 s) over predict",
        "dtype bfloat16: no gain (2 s against 1 s)",
        "threads 8: 2.00x (500 ms against 1 s)",
        "segvit train --shrunk, which makes another model: 4.00x (250 ms against 1 s)",
    ]
    (within_the_spread,) = report.advice(result_of(1.0, 0.9))
    assert "no gain (900 ms against 1 s)" in within_the_spread
    missing = {"cpu": "not built: make native"}
    first, *_, last = report.advice(result_of(3.0, 1.0, missing=missing, engine={"method": "graph"}))
    assert first == "the operators ran as plain PyTorch, backend cpu is missing: not built: make native"
    assert "--method compile" in last and "not measured" in last


def test_missing_backends(monkeypatch):
    monkeypatch.setattr(segvit_kernels, "why_not", lambda name, device: f"{name}: no")
    assert measure._missing_backends({"atm_fwd": {"eager"}}, CPU) == {"cpu": "cpu: no"}
    cuda = torch.device("cuda")
    assert list(measure._missing_backends({"atm_fwd": {"eager"}}, cuda)) == ["triton", "cuda"]
    assert measure._missing_backends({"atm_fwd": {"triton"}}, cuda) == {}
    monkeypatch.setattr(segvit_kernels, "why_not", lambda name, device: None if name == "cuda" else "no")
    assert measure._missing_backends({"atm_fwd": {"eager"}}, cuda) == {}, "eager was asked for"


def test_threads_are_put_back():
    usual, seen = torch.get_num_threads(), []
    other = usual + 1
    ways = [
        measure.Way("a", lambda images: seen.append(torch.get_num_threads())),
        measure.Way("b", lambda images: seen.append(torch.get_num_threads()), "threads", other),
    ]
    measure.interleave({way.name: measure._with_threads(way, None) for way in ways}, 0.0, CPU)
    assert torch.get_num_threads() == usual
    assert seen.count(usual) >= 3 and seen.count(other) >= 3


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["vit_huge"],
            "vit_huge: no such checkpoint folder, and no owner/name on the Hub; presets: vit_tiny, vit_small",
        ),
        (["vit_tiny", "--batch", "0"], "batch: got 0, expected at least 1"),
        (["vit_tiny", "--size", "0"], "size: got (0,), expected at least 1"),
        (["vit_tiny", "--size", "1", "2", "3"], "size: got [1, 2, 3]"),
        (["vit_tiny", "--size", "wide"], "--size"),
        (["vit_tiny", "--seconds", "0"], "seconds: got 0.0, expected more than 0"),
        (["vit_tiny", "--threads", "0"], "threads: got 0, expected at least 1"),
        (["vit_tiny", "--classes", "0"], "classes: got 0, expected at least 1 or null"),
        (["vit_tiny", "--dtype", "int4"], "--dtype"),
        (["vit_tiny", "--backend", "cudnn"], "backend: got 'cudnn'"),
        (["vit_tiny", "--image", "nowhere.png"], "nowhere.png: no such image file"),
        (["vit_tiny", "--json", "no/where/r.json"], "json: no/where/r.json: its folder does not exist"),
        (["vit_tiny", "--json", "r.png"], "json: got r.png, expected a file .json"),
        (["vit_tiny", "--json", str(ROOT)], "is a folder, expected a file"),
        (["vit_tiny", "--json", str(ROOT / "LICENSE")], "LICENSE is there already and no such result"),
        ([str(ROOT)], f"{ROOT}: no checkpoint in this folder (expected config.json and model.safetensors)"),
        (
            [str(ROOT), "--shrunk"],
            "shrunk: only for a preset (vit_tiny, vit_small, vit_base, vit_large, dinov3",
        ),
        ([], "missing: MODEL (see --help)"),
    ],
)
def test_mistakes(words, message, capsys):
    line = fails(capsys, *words)
    assert line.startswith("segvit bench: error: ") and message in line


def test_too_large_for_memory(capsys):
    line = fails(capsys, "vit_tiny", "--accelerator", "cpu", "--size", "32", "--batch", str(10**12))
    assert f"size, batch: {10**12} x 32 x 32 pixels do not fit into memory" in line


def test_torch_compile_without_a_compiler(checkpoint, capsys, monkeypatch):
    def fail(*args):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda function, **_: fail)
    line = fails(capsys, checkpoint, "--accelerator", "cpu", "--method", "compile")
    assert "method: torch.compile failed on this machine (no C++ compiler)" in line


def test_help_needs_no_torch():
    script = (
        "import sys\nfrom segvit.cli import main\n"
        "try:\n    main(['bench', '--help'])\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and done.stderr.split() == ["False"] and "MODEL" in done.stdout


@pytest.mark.gpu
def test_on_a_gpu(checkpoint, tmp_path, capsys):
    words = ["bench", str(checkpoint), "--seconds", "0.1", "--json", str(tmp_path / "r.json")]
    assert main(words) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["engine"]["method"] == "graph" and result["memory"]["peak_bytes"] > 0
    assert min(result["breakdown"]["parts"].values()) > 0
    assert "method eager" in {row["option"] for row in result["ways"]}
    assert result["environment"]["gpu"] in capsys.readouterr().out
