"""The benchmark's commands: that they run whole on tiny shapes, and what they answer to bad options."""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import pytest
import torch

from bench import report
from bench.__main__ import main
from bench.commands import _options
from bench.subjects import counts, models, operators
from bench.subjects.published import MODELS, TINY
from bench.suites import _gpu_tasks, cpu, everything, flops, instructions, scaling, static

ROOT = Path(__file__).resolve().parents[2]
MODES = [(name, mode) for name, op in operators.by_name().items() for mode in op.modes]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("SEGVIT_BENCH_SMOKE", raising=False)
    monkeypatch.delenv("SEGVIT_COMMIT", raising=False)


# ------------------------------------------------------------------------------------------ whole runs


def test_the_gpu_script_stands_behind_kernels_too(tmp_path, monkeypatch):
    """On a GPU; here without time for anything, every row says so. Whole runs: test_bench_gpu.py."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = tmp_path / "smoke.json"
    arguments = ("--smoke", "--in-process", "--budget", "0", "--peers", "fused", "--out", str(path))
    assert main(["kernels", "--device", "cuda", *arguments]) == 1
    result = report.load(path)
    assert result["kind"] == "gpu" and result["measurement"] is False and result["correct"] is False
    rows = [*result["checks"], *result["timings"], *result["ceilings"]]
    assert {(r["status"], r["reason"]) for r in rows} == {("skipped", "time budget")}
    assert {(r["operator"], r["mode"]) for r in result["timings"]} == set(MODES)


def test_cpu_script_runs_whole_on_tiny_shapes(tmp_path, monkeypatch):
    """Memory of one operator in a process of its own, as of all; of the others here."""
    path, isolated = tmp_path / "cpu.json", cpu.peaks.isolated

    def some_here(module: str, function: str, operator: str, *values: object) -> object:
        if operator == "subsample_norm":
            return isolated(module, function, operator, *values)
        return cpu.measure_memory(operator, *values)

    monkeypatch.setattr(cpu.peaks, "isolated", some_here)
    monkeypatch.setattr(cpu, "_keep_freed_memory", lambda: None)  # of this process, for good
    arguments = (
        "kernels",
        "--smoke",
        "--threads",
        "1",
        "--rounds",
        "3",
        "--peers",
        "fused",
        "--out",
        str(path),
    )
    threads = torch.get_num_threads()
    try:
        assert main(list(arguments)) == 0
    finally:
        torch.set_num_threads(threads)
    result = report.load(path)
    assert {r["mode"] for r in result["timings"]} == {"forward", "backward", "forward_backward"}
    assert all(r["status"] == "ok" and r["result_bytes"] > 0 for r in result["memory"])
    assert {(r["operator"], r["mode"]) for r in result["memory"]} == set(MODES)
    assert result["environment"]["threads"] == 1
    assert all(r["share_of_floor"] > 0 and r["sets"] > 1 for r in result["timings"])
    assert {r["name"] for r in result["ceilings"]} >= {"copy_bytes_per_s", "exp2_per_s"}


def test_scaling_runs_on_tiny_shapes(tmp_path):
    path = tmp_path / "scaling.json"
    threads = torch.get_num_threads()
    try:
        assert main(["scaling", "--smoke", "--threads", "1", "--out", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    result = report.load(path)
    assert {(r["operator"], r["axis"]) for r in result["rows"]} == {
        (a.operator, a.name) for a in scaling.TINY
    }
    assert all(r["status"] == "ok" and r["floor_s"] > 0 for r in result["rows"])
    assert "atm-classes" in report.tables(result)


def test_instruction_sets_are_measured_apart(tmp_path, monkeypatch):
    """Each in a process that keeps to it; here one that runs one operator."""
    if not instructions.known():
        pytest.skip("needs the native library")
    started, run = [], instructions.subprocess.run

    def one(command: list[str], env: dict | None = None, **options: object) -> object:
        if "kernels" not in command:
            return run(command, env=env, **options)
        started.append({key: env.get(key) for key in ("SEGVIT_KERNELS_ISA", "OMP_NUM_THREADS", "MKL_CBWR")})
        return run([*command, "--operators", "mask_iou"], env=env, **options)

    monkeypatch.setattr(instructions.subprocess, "run", one)
    path = tmp_path / "instructions.json"
    given = ["--smoke", "--isas", "portable", "--threads", "1", "--rounds", "3", "--out", str(path)]
    assert main(["instructions", *given]) == 0
    (mask,) = started
    assert mask["SEGVIT_KERNELS_ISA"] == "portable" and mask["OMP_NUM_THREADS"] == "1"
    assert mask["MKL_CBWR"] == ("COMPATIBLE" if len(instructions.known()) > 1 else None)
    result = report.load(path)
    timed = [row for row in result["rows"] if row["status"] == "ok"]
    assert [(row["operator"], row["isa"]) for row in timed] == [("mask_iou", "portable")]
    assert set(timed[0]["peers_s"]) == {"plain", "eager"}
    assert {(row["operator"], row["mode"]) for row in result["rows"]} == set(MODES)
    assert "portable, 1 thread |" in report.tables(result)["operators"]


def test_every_instruction_set_has_a_mask():
    text = (ROOT / "csrc" / "cpu" / "isa.cpp").read_text()
    names = set(re.findall(r'return "(\w+)";', text))
    assert "amx" in names and names - {"amx"} == set(instructions.MASKS)


def test_a_budget_that_is_used_up_skips_with_a_reason(monkeypatch):
    monkeypatch.setattr(cpu, "_memory", lambda *_: pytest.fail("not within the budget"))
    result = cpu.run(budget_s=0.0, threads=torch.get_num_threads(), smoke=True, progress=lambda line: None)
    assert {r["reason"] for r in (*result["timings"], *result["memory"])} == {"time budget"}
    assert not result["correct"] and "skipped" in report.document(result, "x")


def test_a_failure_costs_its_operator_alone(monkeypatch):
    def fail(*_: object) -> list:
        raise RuntimeError("boom")

    chosen = {name: operators.by_name()[name] for name in ("mask_iou", "semantic_topk")}
    monkeypatch.setattr(operators, "by_name", lambda: chosen)
    checks = cpu._checks
    monkeypatch.setattr(
        cpu, "_checks", lambda op, *where: (fail if op.name == "mask_iou" else checks)(op, *where)
    )
    options = {
        "threads": torch.get_num_threads(),
        "rounds": 3,
        "smoke": True,
        "main": True,
        "names": ["fused"],
    }
    result = cpu.run(**options, progress=lambda line: None)
    rows = {row["operator"]: (row["status"], row.get("reason")) for row in result["timings"]}
    assert rows == {"mask_iou": ("failed", "RuntimeError: boom"), "semantic_topk": ("ok", None)}
    assert not report.sound(result)


def test_static_evidence_of_one_operator(tmp_path, monkeypatch):
    """For one architecture: another is another argument of the same compiler and PTX machine."""
    monkeypatch.setattr(static, "ARCHITECTURES", ("sm_90",))
    path = tmp_path / "static.json"
    arguments = ("static", "--kernels", "triton", "--operators", "subsample_norm", "--out", str(path))
    assert main(list(arguments)) == 0
    result = report.load(path)
    assert {r["kernel"] for r in result["rows"]} >= {
        "_subsample_norm_fwd_kernel",
        "_subsample_norm_bwd_kernel",
    }
    assert {r["arch"] for r in result["rows"]} == {"sm_90"}
    assert all(0 < r["occupancy"] <= 1 and r["FFMA"] >= 0 and r["LDG"] > 0 for r in result["rows"])
    assert "no time measured" in report.tables(result)["triton"]
    executed = {(r["kernel"], r["arch"]): r for r in result["executed"]}
    forward = executed["_subsample_norm_fwd_kernel", "sm_90"]
    features = 20 * 40 * 1024 * 2  # bfloat16, read once; written: all normalised, a quarter twice
    assert forward["memory"]["global bytes read"] >= features
    assert 2.2 * features < forward["memory"]["global bytes written"] + features < 2.6 * features
    assert forward["programs"] and forward["instructions"]["float"] > 0
    assert "_subsample_norm_bwd_kernel" in report.tables(result)["executed"]


# ------------------------------------------------------------------------------------------ everything


def test_everything_keeps_to_the_budget(capsys):
    now, calls = [0.0], []

    def call(arguments: list[str], timeout_s: float) -> int | None:
        calls.append((arguments, timeout_s))
        now[0] += 100.0 if arguments[0] == "kernels" else 10.0
        return {"model": 1, "memory": None}.get(arguments[0], 0)

    code = everything.run(300.0, 2, call=call, clock=lambda: now[0])
    assert [arguments[0] for arguments, _ in calls] == [part.arguments[0] for part in everything.PARTS]
    # What the first part took too long is taken from the others, each at most twice its share.
    assert all(limit <= 2 * 200.0 for _, limit in calls[1:])
    budgets = [float(a[a.index("--budget") + 1]) for a, _ in calls if "--budget" in a]
    assert len(budgets) == 3 and sum(budgets) < 300
    out = capsys.readouterr().out
    assert code == 1 and "whole models: exit code 1" in out and "memory of whole models: stopped" in out


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux")
def test_a_part_that_is_stopped_leaves_nothing_running(monkeypatch, tmp_path):
    """A process of memory, for one, would compute beside what the next part measures."""
    script = tmp_path / "part"
    script.write_text(f"#!/bin/sh\nsleep 600 & echo $! > {tmp_path}/left; wait\n")
    script.chmod(0o755)
    monkeypatch.setattr(everything.sys, "executable", str(script))
    assert everything._call(["memory"], 1.0) is None
    left = Path(f"/proc/{(tmp_path / 'left').read_text().strip()}/stat")
    for _ in range(1000):  # it dies in its own time
        if not left.exists() or left.read_text().rpartition(")")[2].split()[0] in "ZX":
            return
        time.sleep(0.01)
    pytest.fail("it still runs")


def test_the_plan_is_printed_and_nothing_runs(capsys):
    assert main(["all", "--plan", "--budget", "300"]) == 0
    out = capsys.readouterr().out
    assert all(" ".join(part.arguments) in out for part in everything.PARTS)


# ------------------------------------------------------------------------------------------ exit codes


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_and_code_2(tmp_path, capsys):
    assert main(["kernels", "--device", "cuda", "--out", str(tmp_path / "x.json")]) == 2
    assert main(["tune", "atm"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and error.count("finds no GPU") == 2
    assert not (tmp_path / "x.json").exists()


def test_smoke_is_never_written_under_results(capsys):
    assert main(["kernels", "--smoke", "--out", str(ROOT / "bench/results/x.json")]) == 2
    assert main(["scaling", "--smoke", "--out", str(ROOT / "bench/results/x.json")]) == 2
    assert "not a measurement" in capsys.readouterr().err


def test_a_library_that_is_not_used_is_said(monkeypatch, capsys):
    """An edited source makes the built one stale: ours would be the eager backend in silence."""
    options = argparse.Namespace(device="cpu")
    monkeypatch.setattr(_options._native, "why_not", lambda *arguments: "built from other sources")
    assert _options.device_of(options) == "cpu"
    said = capsys.readouterr().err
    assert said == "python -m bench: ours runs on the eager backend: built from other sources\n"
    monkeypatch.setattr(_options._native, "why_not", lambda *arguments: None)
    assert _options.device_of(options) == "cpu" and capsys.readouterr().err == ""


def test_bad_options_are_one_line(tmp_path, capsys):
    assert main(["kernels", "--smoke", "--out", str(tmp_path / "no/x.json")]) == 2
    assert main(["kernels", "--smoke", "--rounds", "0", "--out", str(tmp_path / "x.json")]) == 2
    assert main(["kernels", "--smoke", "--peers", "fast", "--out", str(tmp_path / "x.json")]) == 2
    assert main(["report", str(tmp_path / "none.json")]) == 2
    assert main(["scaling", "--operators", "atn"]) == 2
    assert main(["tune", "atn"]) == 2
    assert main(["kernels", "--device", "tpu"]) == 2
    assert main(["nothing"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8
    expected = (
        "does not exist",
        "expected a whole number, at least 1",
        "no such peer; expected some of fused",
        "cannot be read",
        "--operators atn: no such operator; expected some of atm",
        "operator is 'atn'; expected one of atm",
        "invalid choice: 'tpu'",
        "invalid choice: 'nothing'",
    )
    for line, text in zip(lines, expected, strict=True):
        assert line.startswith("python -m bench: error: ") and text in line


# ------------------------------------------------------------------------------ plans


def test_every_shape_batch_and_dtype_is_timed_and_checked():
    for op in operators.by_name().values():
        groups = _gpu_tasks._timing_groups(op, False)
        assert len(groups) == len(set(groups))
        checked = {(case.name, case.batch) for kind, case in op.check_cases(False) if kind == "values"}
        assert {group[:2] for group in groups} <= checked
        assert {group[:2] for group in groups} == {(s.name, b) for s in op.shapes for b in (1, 4, 16)}
        assert {op.shape(*s).name for s in op.cpu_shapes} == {name for name, _ in op.cpu_shapes}
        targets = {(t.shape, t.batch) for t in op.targets if t.device == "cpu"}
        assert targets <= set(op.cpu_shapes), "a target that no run measures"


# ------------------------------------------------------------------------------ operations counted


@pytest.mark.parametrize("shrunk", [False, True])
def test_counters_agree(shrunk):
    """fvcore on plain operators, fvcore and torch's counter on fused ones: one model, the same products."""
    from segvit import SegViT, SegViTConfig

    options = {"shrunk": True} if shrunk else {}
    sizes = {"width": 64, "depth": 4, "heads": 2, "taps": (1, 3), "image_size": (64, 64)}
    if shrunk:
        options["shrink_at"] = 2
    torch.manual_seed(0)
    model = SegViT(SegViTConfig.preset("vit_tiny", 7, **sizes, **options)).eval().requires_grad_(False)
    images = torch.zeros(1, 3, 64, 64)
    with counts.plain_operators():
        eager, _ = counts.count_fvcore(counts.EagerForm(model), images)
    form = counts.FusedForm(model)
    fused, _ = counts.count_fvcore(form, images)
    assert counts.count_torch(form.to("meta"), images.to("meta")) == pytest.approx(
        sum(fused.values()), rel=1e-3
    )
    assert eager["conv"] == fused["conv"]
    # Folding takes the first self-attention and its projections away.
    assert fused["linear"] < eager["linear"]
    products = sum(fused.get(name, 0) for name in ("atm_fwd", "query_attention_fwd", "attention"))
    assert products <= eager["bmm"] + eager["matmul"]
    assert fused["semantic_argmax"] == 7 * 7 * 64 * 64


def test_kept_counts_are_the_papers():
    """What bench/results keeps, and what today's code counts for the smallest of these models."""
    kept = json.loads((ROOT / "bench/results/flops.json").read_text())["models"]
    assert [row["model"] for row in kept] == [model.name for model in MODELS]
    for row in kept:
        assert row["eager"]["fvcore"] / 1e9 == pytest.approx(row["paper_gflops"], abs=0.1)
        assert row["fused"]["torch"] == pytest.approx(row["fused"]["fvcore"], rel=1e-3)
    with torch.device("meta"):
        model = MODELS[0].build().requires_grad_(False)
        images = torch.zeros(1, 3, MODELS[0].size, MODELS[0].size)
    with counts.plain_operators():
        eager = counts.count_torch(counts.EagerForm(model), images)
    assert eager == pytest.approx(kept[0]["eager"]["fvcore"], rel=1e-3)
    assert counts.count_torch(counts.FusedForm(model), images) == kept[0]["fused"]["torch"]


def test_a_model_and_its_decoders_are_counted(monkeypatch):
    monkeypatch.setattr(flops, "MODELS", (TINY,))
    monkeypatch.setattr(flops, "DECODERS", ("tiny",))
    some = [s for s in models.on_one_backbone() if s.name in ("SegViT", "DPT")]
    monkeypatch.setattr(models, "on_one_backbone", lambda: some)
    result = flops.run(progress=lambda line: None)
    (row,) = result["models"]
    assert row["eager"]["fvcore"] > row["fused"]["fvcore"] == pytest.approx(row["fused"]["torch"], rel=1e-3)
    found = {row["decoder"]: row["macs"] for row in result["decoders"]}
    assert found.keys() == {"SegViT", "DPT"} and min(found.values()) > 0
    assert "| tiny |" in report.tables(result)["models"] and "| DPT |" in report.tables(result)["decoders"]


def test_kept_counts_are_those_measured_on_published_models(shared_dir):
    reference = json.loads((shared_dir / "reference/macs.json").read_text())
    for row in json.loads((ROOT / "bench/results/flops.json").read_text())["models"]:
        measured = reference[row["model"]]
        assert row["eager"]["fvcore"] == pytest.approx(measured["total_macs"], rel=1e-3)
        for operator, count in measured["by_operator"].items():
            assert row["eager"]["by_operator"][operator] == pytest.approx(count, rel=1e-3), operator
