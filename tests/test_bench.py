"""The benchmark scripts themselves: that they run, refuse what they must, and report what they measured."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import atm, flops, gpu, kernels, report, timing
from bench.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
MODES = [(name, mode) for name, op in kernels.operators().items() for mode in op.modes]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("SEGVIT_BENCH_SMOKE", raising=False)
    monkeypatch.delenv("SEGVIT_COMMIT", raising=False)


def bench(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


# ------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def gpu_smoke(tmp_path_factory):
    """The GPU script on the CPU; one worker process for each section but those that cannot run here."""
    path = tmp_path_factory.mktemp("bench") / "smoke.json"
    done = bench("gpu", "--interpret-smoke", "--in-process", "--peers", "fused", "plain", "--out", str(path))
    return done, path


def test_gpu_script_runs_whole_on_tiny_shapes(gpu_smoke):
    done, path = gpu_smoke
    assert done.returncode == 0, done.stderr
    result = report.load(path)
    assert result["measurement"] is False and result["correct"] is True
    assert {r["dtype"] for r in result["checks"]} == {"float32", "float16"}
    quantities = {r["quantity"] for r in result["checks"] if r["case"] == "tiny_all"}
    assert quantities == {
        "output",
        "mask_logits",
        "grad_query",
        "grad_key",
        "grad_value",
        "grad_previous_masks",
    }
    measured = {(r["operator"], r["peer"], r["mode"]) for r in result["timings"] if r["status"] == "ok"}
    assert measured == {(o, p, m) for o, m in MODES for p in ("fused", "plain")}
    assert {r["operator"] for r in result["checks"] if r["status"] == "ok"} == set(kernels.operators())
    assert all(r["reason"] for r in result["timings"] if r["status"] == "skipped")
    assert all(r["share_of_floor"] > 0 for r in result["timings"] if r["status"] == "ok")
    assert result["environment"]["kernels_sha256"] and result["environment"]["torch"] == torch.__version__


def test_gpu_script_prints_the_tables_last(gpu_smoke):
    done, _ = gpu_smoke
    assert "**Not a measurement**" in done.stdout
    assert "| tiny, 1, float32, forward + backward |" in done.stdout
    assert "checks passed, 0 failed" in done.stdout.splitlines()[-1]


def test_cpu_script_runs_whole_on_tiny_shapes(tmp_path):
    path = tmp_path / "cpu.json"
    arguments = ("cpu", "--smoke", "--threads", "1", "--rounds", "3", "--peers", "fused", "--out", str(path))
    done = bench(*arguments)
    assert done.returncode == 0, done.stderr
    result = report.load(path)
    assert {r["mode"] for r in result["timings"]} == {"forward", "backward", "forward_backward"}
    assert all(r["status"] == "ok" and r["result_bytes"] > 0 for r in result["memory"])
    assert {(r["operator"], r["mode"]) for r in result["memory"]} == set(MODES)
    assert result["environment"]["threads"] == 1


# ------------------------------------------------------------------------------------------ exit codes


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_and_code_2(tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path / "x.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no GPU" in error
    assert not (tmp_path / "x.json").exists()


def test_smoke_is_never_written_under_results(capsys):
    assert main(["cpu", "--smoke", "--out", str(ROOT / "bench/results/x.json")]) == 2
    assert main(["gpu", "--interpret-smoke", "--out", str(ROOT / "bench/results/x.json")]) == 2
    assert "not a measurement" in capsys.readouterr().err


def test_bad_options_are_one_line(tmp_path, capsys):
    assert main(["cpu", "--smoke", "--out", str(tmp_path / "no/x.json")]) == 2
    assert main(["cpu", "--smoke", "--rounds", "0", "--out", str(tmp_path / "x.json")]) == 2
    assert main(["cpu", "--smoke", "--peers", "fast", "--out", str(tmp_path / "x.json")]) == 2
    assert main(["report", str(tmp_path / "none.json")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    expected = (
        "does not exist",
        "expected at least 1",
        "no such peer; expected some of fused",
        "cannot be read",
    )
    for line, text in zip(lines, expected, strict=True):
        assert line.startswith("python -m bench: error: ") and text in line


# ------------------------------------------------------------------------------ checks can go red


def check_tiny(kind: str = "values", **changes) -> list[dict]:
    case = replace(atm.TINY, **changes)
    torch.manual_seed(0)
    return atm.run_check(kernels.Check(kind, case, "float32"), torch.device("cpu"), "eager")


@pytest.mark.parametrize("kind", ["values", "output_only", "masks_only", "no_masks", "repeat"])
def test_checks_pass_on_the_eager_backend(kind):
    rows = check_tiny(
        kind, dropout_p=0.2 if kind in ("values", "repeat") else 0.0, broadcast=kind == "values"
    )
    assert all(r["passed"] for r in rows), rows


def test_an_unwritten_element_fails(monkeypatch):
    def forgetful(query, key, value, **_):
        output, masks = torch.empty_like(query), torch.empty(key.shape[0], query.shape[1], key.shape[1])
        true = atm.atm_reference(query, key, value)
        output = output.detach().flatten()
        output[1:] = true.output.flatten()[1:]
        return output.view_as(query), true.mask_logits + 0 * masks.nan_to_num()

    monkeypatch.setattr(atm, "fused_atm", forgetful)
    rows = {r["quantity"]: r for r in check_tiny()}
    assert not rows["output"]["passed"] and "not finite" in rows["output"]["reason"]
    assert rows["mask_logits"]["passed"]


def test_a_dropped_term_of_the_gradient_fails(monkeypatch):
    def without_mask_gradient(query, key, value, **_):
        output, masks = atm.atm_reference(query, key, value)
        return output, atm.atm_reference(query, key.detach(), value).mask_logits + 0 * masks

    monkeypatch.setattr(atm, "fused_atm", without_mask_gradient)
    failed = {r["quantity"] for r in check_tiny() if not r["passed"]}
    assert failed == {"grad_key"}


@pytest.mark.parametrize(
    ("draws", "status"),
    [
        ([(1e-7, False), (1e-7, True), (1e-7, True)], "ok"),
        ([(1e-7, False), (1e-7, True), (1e-7, False)], "failed"),
        ([(1e-3, False), (1e-7, True), (1e-7, True)], "failed"),
        ([(1e-7, True)], "ok"),
    ],
)
def test_only_a_marginal_maximum_is_drawn_again(draws, status):
    left = iter(draws)

    def run_check(*_) -> list[dict]:
        error, passed = next(left)
        row = {"quantity": "output", "relative_error": error, "relative_budget": 1e-5, "passed": passed}
        return [row | {"reason": None if passed else "maximum error"}]

    op = replace(atm.OPERATOR, run_check=run_check)
    (row,) = kernels.checked(op, kernels.Check("values", atm.TINY, "float32"), torch.device("cpu"), "eager")
    assert row["status"] == status
    assert ("note" in row) == (status == "ok" and len(draws) == 3)


# ------------------------------------------------------------------------------ what is refused


def assembled(checks: list[dict]) -> dict:
    key = {"operator": "atm", "shape": "ade_vit_l", "batch": 16, "dtype": "bfloat16", "mode": "forward"}
    timings = [
        {"peer": peer, "method": "graph", "status": "ok", "sets": 3, **timing.summary([t, t, t * 1.1])}
        for peer, t in (("fused", 20e-6), ("eager", 400e-6), ("reference", 300e-6), ("sdpa", 50e-6))
    ]
    memory = [
        {"peer": peer, "method": "torch allocator", "status": "ok", "extra_bytes": n, "result_bytes": 2**20}
        for peer, n in (("fused", 2**21), ("reference", 2**26))
    ]
    phases = [c._asdict() for c in atm.costs(replace(atm.SHAPES[0], batch=16), 2, "forward")]
    rows = [{"table": "environment", "torch": "2", "gpu": "G", "commit": None}]
    rates = {"copy_bytes_per_s": 4e12, "matmul_bfloat16_flop_per_s": 8e14, "exp2_per_s": 4e12}
    rows += [{"table": "ceilings", "name": n, "per_s": v} for n, v in rates.items()]
    rows += [{"table": "checks", **c} for c in checks]
    rows += [{"table": "costs", **key, "phases": phases}]
    rows += [{"table": "timings", **key, **r} for r in timings]
    rows += [{"table": "memory", **key, "mode": "forward_backward", **r} for r in memory]
    return gpu.assemble({"schema": 1, "kind": "gpu", "measurement": True, "elapsed_s": 1.0}, rows)


def check_row(**changes) -> dict:
    row = {"operator": "atm", "kind": "values", "case": "ade_vit_l", "batch": 16, "dtype": "bfloat16"}
    return row | {"quantity": "output", "status": "ok", "passed": True, "reason": None} | changes


def test_speeds_and_targets_of_a_proved_operator():
    result = assembled([check_row()])
    assert report.schema_problem(result) is None and result["correct"]
    fused = result["timings"][0]
    # 64.9 MB of minimal traffic at 4 TB/s; exponentials and products need less.
    width, tokens = 16 * 32, 2 * 150 + 2 * 1600
    floor = 16 * (tokens * width + 150 * 1600) * 2 / 4e12
    assert fused["floor_s"] == pytest.approx(floor) and result["costs"][0]["bound_by"] == "bytes"
    assert fused["share_of_floor"] == pytest.approx(floor / 20e-6)
    found = {e["target"].name: e for e in report.targets(result, "atm")}
    eager = found["forward against plain PyTorch"]
    assert eager["measured"] == pytest.approx(15) and eager["met"]  # the faster of eager and reference
    memory = found["training memory against plain PyTorch"]
    assert memory["measured"] == pytest.approx(1 / 32) and memory["met"]
    assert found["forward_backward against plain PyTorch"]["met"] is None


@pytest.mark.parametrize(
    "checks",
    [
        [
            check_row(),
            check_row(kind="repeat", batch=1, status="failed", passed=False, reason="two runs differ"),
        ],
        [check_row(batch=4)],
        [check_row(status="skipped", reason="time budget")],
        [],
    ],
    ids=["failed", "elsewhere", "skipped", "none"],
)
def test_speeds_are_refused_without_proof(checks):
    result = assembled(checks)
    assert {r["status"] for r in result["timings"]} == {"invalid"}
    assert result["correct"] == any(c["status"] == "ok" for c in checks if len(checks) == 1)
    text = report.document(result, "x")
    assert "20 µs" not in text and "invalid" in text
    assert all(e["met"] is None for e in report.targets(result, "atm"))


# ------------------------------------------------------------------------------ workers


def test_a_dead_worker_costs_one_task(tmp_path, monkeypatch):
    """The task in flight fails, the section goes on after it, and a restart that dies too gives up."""
    tasks = [gpu.Task("checks", {"n": n}, None) for n in range(3)]
    monkeypatch.setitem(gpu.SECTIONS, "environment", lambda smoke: tasks)
    section = gpu._Section("environment", tmp_path, deadline=time.time() + 60, smoke=True, peers=None)
    script = (
        "import json, sys; path, start = sys.argv[1], int(sys.argv[2]); f = open(path, 'a')\n"
        "def w(**r): f.write(json.dumps(r) + chr(10)); f.flush()\n"
        "w(begin=start)\n"
        "if start == 1: sys.stderr.write('boom' + chr(10)); sys.exit(139)\n"
        "w(table='checks', n=start, status='ok'); w(end=start)\n"
        "sys.exit(3 if start == 0 else 0)\n"
    )

    def start(index: int = 0) -> None:
        with section.log.open("ab") as log:
            command = [sys.executable, "-c", script, str(section.path), str(index)]
            section.process = subprocess.Popen(command, stderr=log)

    monkeypatch.setattr(section, "start", start)
    start()
    while not section.poll():
        time.sleep(0.01)
    status = {r["n"]: (r["status"], r.get("reason")) for r in section.rows()}
    assert status[0] == ("ok", None) and status[2] == ("ok", None)
    assert status[1] == ("failed", "worker ended with code 139: boom")
    assert section.restarts == 2


def test_a_hanging_worker_is_killed_and_the_rest_skipped(tmp_path, monkeypatch):
    tasks = [gpu.Task("checks", {"n": n}, None) for n in range(2)]
    monkeypatch.setitem(gpu.SECTIONS, "environment", lambda smoke: tasks)
    section = gpu._Section("environment", tmp_path, deadline=time.time() - 1, smoke=True, peers=None)
    monkeypatch.setattr(gpu, "GRACE_S", 0.0)
    section.path.write_text('{"begin": 0}\n')
    section.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert section.poll() and section.process.returncode != 0
    assert [r["status"] for r in section.rows()] == ["failed", "skipped"]


def test_tasks_past_the_deadline_are_recorded_as_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert gpu.work("timings", path, start=0, deadline=0.0, smoke=True) == 0
    rows = [r for r in map(json.loads, path.read_text().splitlines()) if "table" in r]
    assert len(rows) == len(MODES)
    assert all(r["status"] == "skipped" and r["reason"] == "time budget" for r in rows)


def test_every_shape_batch_and_dtype_is_timed_and_checked():
    for op in kernels.operators().values():
        groups = gpu._timing_groups(op, False)
        assert len(groups) == len(set(groups))
        checked = {(case.name, case.batch) for kind, case in op.check_cases(False) if kind == "values"}
        assert {group[:2] for group in groups} <= checked
        assert {group[:2] for group in groups} == {(s.name, b) for s in op.shapes for b in (1, 4, 16)}
        assert {op.shape(*s).name for s in op.cpu_shapes} == {name for name, _ in op.cpu_shapes}
        targets = {(t.shape, t.batch) for t in op.targets if t.device == "cpu"}
        assert targets <= set(op.cpu_shapes), "a target that no run measures"


# ------------------------------------------------------------------------------ measuring


def test_interleaving_gives_every_peer_its_samples():
    order = []
    samplers = {name: (lambda name=name: (order.append(name), float(len(order)))[1]) for name in "abc"}
    samples = timing.interleave(samplers, rounds=3, seconds_per_peer=60)
    assert "".join(order) == "abcbcacab"
    assert all(len(s) == 3 for s in samples.values())


def test_summary_of_known_samples():
    found = timing.summary([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found["median_s"], found["p25_s"], found["p75_s"], found["min_s"]) == (3.0, 2.0, 4.0, 1.0)


def test_cpu_peaks_see_what_a_call_holds():
    def call() -> torch.Tensor:
        scratch = torch.ones(2**22)
        return scratch[: 2**20] + 1

    # And a few bytes for the scalar operand.
    assert timing.allocator_peak(call) == pytest.approx(4 * (2**22 + 2**20), abs=64)


def test_poison_is_taken_back():
    with timing.poisoned():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
        assert torch.empty(3, dtype=torch.int64).shape == (3,)
    assert torch.empty.__name__ == "empty" and not torch.empty(2**10).fill_(0).isnan().any()


# ------------------------------------------------------------------------------ README


@pytest.fixture
def readme(tmp_path):
    (tmp_path / "results").mkdir()
    result = assembled([check_row()])
    (tmp_path / "results/g.json").write_text(json.dumps(result))
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- bench:g/atm-targets -->\nold\n<!-- /bench:g/atm-targets -->\nafter\n")
    return path, ["readme", "--readme", str(path), "--results", str(tmp_path / "results")], result


def test_readme_is_updated_once_and_checked(readme):
    path, arguments, result = readme
    old = path.read_text()
    assert main([*arguments, "--check"]) == 1
    assert path.read_text() == old
    assert main(arguments) == 0
    new = path.read_text()
    assert report.tables(result)["atm-targets"] in new and "old" not in new
    assert new.startswith("before\n") and new.endswith("after\n")
    assert main([*arguments, "--check"]) == 0
    path.write_text(new.replace("15.00×", "16.00×"))
    assert main([*arguments, "--check"]) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<!-- bench:g/atm-speed -->\nx\n", "no partner"),
        ("<!-- bench:none/atm-speed -->\n<!-- /bench:none/atm-speed -->\n", "none.json: cannot be read"),
        ("<!-- bench:g/speed -->\n<!-- /bench:g/speed -->\n", "no table 'speed'"),
    ],
)
def test_bad_markers_are_one_line(readme, capsys, text, expected):
    path, arguments, _ = readme
    path.write_text(text)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected in error
    assert path.read_text() == text


def test_readme_refuses_a_smoke_run(readme, capsys):
    path, arguments, result = readme
    smoke = copy.deepcopy(result) | {"measurement": False}
    (path.parent / "results/g.json").write_text(json.dumps(smoke))
    assert main(arguments) == 2
    assert "not a measurement" in capsys.readouterr().err


def test_a_result_of_something_else_is_refused(tmp_path, capsys):
    path = tmp_path / "x.json"
    for text, expected in (("{", "not JSON"), ("{}", "'schema' is not 1")):
        path.write_text(text)
        assert main(["report", str(path)]) == 2
        assert expected in capsys.readouterr().err


def test_committed_results_are_measurements():
    for path in (ROOT / "bench/results").glob("*.json"):
        if path.stem.partition("-")[0] in ("flops", "inference", "model"):
            assert "commit" in report._own_tables(path.stem, "environment", path), path.name
            continue
        result = report.load(path)
        assert result["measurement"] and result["correct"], path.name


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
    with flops.plain_operators():
        eager, _ = flops.count_fvcore(flops.EagerForm(model), images)
    form = flops.FusedForm(model)
    fused, _ = flops.count_fvcore(form, images)
    assert flops.count_torch(form.to("meta"), images.to("meta")) == pytest.approx(
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
    assert [row["model"] for row in kept] == [model.name for model in flops.MODELS]
    for row in kept:
        assert row["eager"]["fvcore"] / 1e9 == pytest.approx(row["paper_gflops"], abs=0.1)
        assert row["fused"]["torch"] == pytest.approx(row["fused"]["fvcore"], rel=1e-3)
    (fresh,) = flops.run(names=[kept[0]["model"]], progress=lambda line: None)["models"]
    assert fresh["eager"]["by_operator"] == kept[0]["eager"]["by_operator"]
    assert fresh["fused"]["fvcore"] == kept[0]["fused"]["fvcore"]


def test_kept_counts_are_those_measured_on_published_models(shared_dir):
    reference = json.loads((shared_dir / "reference/macs.json").read_text())
    for row in json.loads((ROOT / "bench/results/flops.json").read_text())["models"]:
        measured = reference[row["model"]]
        assert row["eager"]["fvcore"] == pytest.approx(measured["total_macs"], rel=1e-3)
        for operator, count in measured["by_operator"].items():
            assert row["eager"]["by_operator"][operator] == pytest.approx(count, rel=1e-3), operator
