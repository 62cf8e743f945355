"""The harness: that it refuses what is wrong, shows what is slower, and finds what is stale."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import report
from bench.__main__ import main
from bench.measure import peaks, timing
from bench.report import figures
from bench.report.tables import kernels as tables
from bench.simulator.machine import MULTIPROCESSORS
from bench.subjects import operators, parameters
from bench.subjects.operators import atm, comparison, mask_matching
from bench.suites import cpu, kernels, scaling, tune
from segvit_kernels import _native, mask_matching_cost_reference
from segvit_kernels.testing.mask_loss import MaskLossCase
from segvit_kernels.testing.stub.torch_cuda import pretended

ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------ checks can go red


def check_tiny(kind: str = "values", **changes) -> list[dict]:
    case = replace(atm.TINY, **changes)
    torch.manual_seed(0)
    check = operators.Check(kind, case, "float32")
    return operators.checked(atm.OPERATOR, check, torch.device("cpu"), "eager")


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

    def judge(*_) -> list[dict]:
        error, passed = next(left)
        row = {"quantity": "output", "relative_error": error, "relative_budget": 1e-5, "passed": passed}
        return [row | {"reason": None if passed else "maximum error"}]

    op = replace(atm.OPERATOR, judge=judge)
    (row,) = operators.checked(
        op, operators.Check("values", atm.TINY, "float32"), torch.device("cpu"), "eager"
    )
    assert row["status"] == status
    assert ("note" in row) == (status == "ok" and len(draws) == 3)


@pytest.mark.parametrize("name", list(operators.by_name()))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_operator_passes_its_tiny_checks_on_the_eager_backend(name, dtype):
    op = operators.by_name()[name]
    torch.manual_seed(0)
    for kind, case in op.check_cases(True):
        check = operators.Check(kind, case, dtype)
        rows = operators.checked(op, check, torch.device("cpu"), "eager")
        assert all(row["status"] in ("ok", "skipped") for row in rows), rows


@pytest.mark.parametrize("name", operators.by_name())
def test_peers_do_the_same_work(name):
    """Those of the formula itself; others post-process whole outputs, or take random points."""
    torch.manual_seed(0)
    op = operators.by_name()[name]
    given = op.inputs(op.tiny, torch.float32, torch.device("cpu"))
    ours, *peers = operators.select(op.peers("eager"), ("fused", "plain", "reference", "sdpa"))
    assert peers
    for mode in op.modes:
        expected = operators.runner(ours, mode)(*given)
        for peer in peers:
            assert scaling.difference(operators.runner(peer, mode)(*given), expected, "float32") <= 1


def test_oracles_cut_a_batch_into_images():
    """Image by image the formula means the same as at once, shared queries and weights included."""
    torch.manual_seed(0)
    case = replace(atm.TINY, batch=3, broadcast=True, previous_masks=True)
    drawn = atm.draw(operators.Check("values", case, "float32"), torch.device("cpu"))
    result, gradients = atm.oracle(case, drawn.leaves, drawn.gradients)
    whole = {**result._asdict(), **{f"grad_{n}": g for n, g in gradients.items()}}
    found = atm._expected(case, drawn, drawn.gradients, torch.float64)
    assert found.keys() == whole.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(found[name], expected)


def test_an_error_in_a_later_image_of_a_batch_is_found(monkeypatch):
    def first_image_again(query, key, value, **_):
        output, masks = atm.atm_reference(query, key, value)
        return torch.cat([output[:1]] * len(output)), masks

    monkeypatch.setattr(atm, "fused_atm", first_image_again)
    failed = {r["quantity"] for r in check_tiny(batch=2) if not r["passed"]}
    assert {"output", "grad_value"} <= failed


def test_what_float16_cannot_sum_is_judged_in_float32():
    """The sums of a mask over 640² pixels exceed float16: ordinary PyTorch gives NaN there."""
    op = operators.by_name()["mask_loss"]
    case = replace(op.shapes[0], grids=((10, 10),))
    torch.manual_seed(0)
    check = operators.Check("values", case, "float16")
    rows = operators.checked(op, check, torch.device("cpu"), "eager")
    assert all(row["status"] == "ok" for row in rows), rows


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
    return kernels.assemble({"schema": 1, "kind": "gpu", "measurement": True, "elapsed_s": 1.0}, rows)


def check_row(**changes) -> dict:
    row = {"operator": "atm", "kind": "values", "case": "ade_vit_l", "batch": 16, "dtype": "bfloat16"}
    return row | {"quantity": "output", "status": "ok", "passed": True, "reason": None} | changes


def test_speeds_and_targets_of_a_proved_operator():
    result = assembled([check_row()])
    assert tables.schema_problem(result) is None and result["correct"]
    fused = result["timings"][0]
    # 64.9 MB of minimal traffic at 4 TB/s; exponentials and products need less.
    width, tokens = 16 * 32, 2 * 150 + 2 * 1600
    floor = 16 * (tokens * width + 150 * 1600) * 2 / 4e12
    assert fused["floor_s"] == pytest.approx(floor) and result["costs"][0]["bound_by"] == "bytes"
    assert fused["share_of_floor"] == pytest.approx(floor / 20e-6)
    found = {e["target"].name: e for e in comparison.targets(result, atm.OPERATOR)}
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
    assert "`atm`, ade_vit_l, batch 16, forward | invalid: refused: " in tables.tables(result)["summary"]
    assert all(e["met"] is None for e in comparison.targets(result, atm.OPERATOR))


def test_what_is_ours_is_no_peer_and_one_sample_has_no_spread():
    result = assembled([check_row()])
    assert "| 2.50× (sdpa) |" in tables.tables(result)["summary"]
    result["timings"][1] |= {"peer": "packed"} | timing.summary([10e-6])
    found = tables.tables(result)
    assert "| 2.50× (sdpa) |" in found["summary"] and "| 10 µs, one sample |" in found["atm-speed"]


# ------------------------------------------------------------------------------ planted bugs


@pytest.fixture
def only_atm(monkeypatch):
    """One operator, no processes for memory."""
    monkeypatch.setattr(operators, "by_name", lambda: {"atm": atm.OPERATOR})
    monkeypatch.setattr(cpu, "_memory", lambda *_: [])


def off_by_a_percent(query, key, value, **_):
    output, masks = atm.atm_reference(query, key, value)
    return 1.01 * output, masks


def test_a_planted_wrong_kernel_gets_no_speed(monkeypatch, only_atm, tmp_path, capsys):
    path = tmp_path / "x.json"
    arguments = ["kernels", "--device", "cpu", "--smoke", "--rounds", "3", "--peers", "fused", "plain"]
    arguments += ["--threads", str(torch.get_num_threads()), "--out", str(path)]
    assert main(arguments) == 0
    assert "| tiny, 1, float32, forward |" in capsys.readouterr().out
    monkeypatch.setattr(atm, "fused_atm", off_by_a_percent)
    assert main(arguments) == 1
    result = report.load(path)
    assert not result["correct"] and {r["status"] for r in result["timings"]} == {"invalid"}
    assert all(r["reason"].startswith("refused: ") for r in result["timings"])
    (line,) = [
        x for x in capsys.readouterr().out.splitlines() if x.startswith("| tiny, 1, float32, forward |")
    ]
    assert line.count("invalid") == 2


@pytest.mark.parametrize("wrong", ["fused", "sdpa"])
def test_a_planted_wrong_result_is_refused_at_every_size(monkeypatch, only_atm, wrong):
    if wrong == "fused":
        monkeypatch.setattr(atm, "fused_atm", off_by_a_percent)
    else:
        monkeypatch.setattr(atm, "_product", lambda query, key: 1.01 * (query.flatten(2) @ key.flatten(2).mT))
    monkeypatch.setattr(scaling, "TINY", scaling.TINY[:1])
    threads = torch.get_num_threads()
    result = scaling.run(device="cpu", budget_s=60, threads=threads, smoke=True, progress=lambda line: None)
    refused = {r["peer"] for r in result["rows"] if r["status"] == "invalid"}
    # Without the native library what is fused is eager, and no peer of itself.
    ours = {"fused", "eager"} if _native.library().reason is None else {"fused"}
    assert refused == (ours if wrong == "fused" else {"sdpa"})
    assert result["correct"] == (wrong != "fused")
    assert all("median_s" not in r for r in result["rows"] if r["status"] == "invalid")
    assert "invalid" in report.document(result, "x")


class Machine:
    """A clock that only calls move, on a machine whose speed wanders."""

    def __init__(self, monkeypatch):
        self.now, self.calls, self.speed = 0.0, 0, 1.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def peer(self, seconds: float):
        """A call of ``seconds``, 4 % more or less from call to call."""

        def call(inputs: object) -> None:
            self.calls += 1
            self.now += seconds * (1 + 0.04 * ((self.calls * 7919) % 11 - 5) / 5) / self.speed

        return timing.call_sampler(call, [None])


def test_a_planted_slow_down_shows_against_the_spread(monkeypatch):
    machine = Machine(monkeypatch)
    samplers = {name: machine.peer(1e-3 * f) for name, f in (("old", 1.0), ("new", 1.2), ("same", 1.0))}
    samples = timing.interleave(samplers, rounds=25, seconds_per_peer=60)
    old, new, same = (timing.summary(samples[name]) for name in ("old", "new", "same"))
    assert new["median_s"] / old["median_s"] == pytest.approx(1.2, rel=0.02)
    assert new["p25_s"] > old["p75_s"]  # the quartiles are apart
    assert same["p25_s"] < old["p75_s"] and old["p25_s"] < same["p75_s"]  # of equals they are not
    assert abs(old["drift"]) < 0.02


def test_a_machine_that_slows_down_meets_all_alike(monkeypatch):
    machine = Machine(monkeypatch)

    def peer(seconds: float):
        inner = machine.peer(seconds)

        def sample() -> float:
            machine.speed = 1.0 if machine.now < 0.03 else 0.5
            return inner()

        return sample

    samples = timing.interleave({"a": peer(1e-3), "b": peer(1.2e-3)}, rounds=25, seconds_per_peer=60)
    a, b = (timing.summary(samples[name]) for name in "ab")
    assert b["median_s"] / a["median_s"] == pytest.approx(1.2, rel=0.03)
    assert a["drift"] > 0.5  # and the reader is told


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
    assert found["samples"] == 5
    assert found["drift"] == pytest.approx(3.0 / 2.5 - 1)  # medians of (3, 2, 5) and (4, 1)
    assert timing.summary([2.0])["drift"] == 0.0


def test_a_slow_peer_stops_early_but_not_before_three_samples(monkeypatch):
    machine = Machine(monkeypatch)
    samples = timing.interleave(
        {"quick": machine.peer(1e-3), "slow": machine.peer(10.0)}, rounds=9, seconds_per_peer=1.0
    )
    assert [len(samples[name]) for name in ("quick", "slow")] == [9, 3]


def test_what_waits_for_the_device_is_refused_before_its_capture(monkeypatch):
    """A capture that fails would leave torch's random numbers unusable in the process."""
    modes, captured = [0], []

    def work(waits: bool) -> None:
        if waits and modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def graph(_: object) -> contextlib.AbstractContextManager:
        captured.append(modes[-1])
        return contextlib.nullcontext()

    with pretended(SimpleNamespace()):
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        timing.capture(lambda: work(False))
        with pytest.raises(RuntimeError, match="synchronizing"):
            timing.capture(lambda: work(True))
        monkeypatch.undo()
    assert modes == [0, "error", 0, "error", 0] and captured == [0]


def test_inputs_rotate_beyond_the_cache():
    made = []

    def make() -> tuple[dict, None]:
        made.append(({"x": torch.empty(250), "n": 3}, None))
        return made[-1]

    assert timing.rotation(make, 2000, 64) == made and len(made) == 5  # 5000 bytes: 2 caches and one set
    assert len(timing.rotation(make, 2**40, 7)) == 7 and len(timing.rotation(make, 1, 7)) == 2
    seen = []
    sample = timing.call_sampler(seen.append, [1, 2, 3])
    for _ in range(4):
        sample()
    assert seen == [1, 2, 3, 1]


def test_cpu_peaks_see_what_a_call_holds():
    def call() -> torch.Tensor:
        scratch = torch.ones(2**22)
        return scratch[: 2**20] + 1

    # And a few bytes for the scalar operand.
    assert peaks.allocator_peak(call) == pytest.approx(4 * (2**22 + 2**20), abs=64)


def test_poison_is_taken_back():
    with timing.poisoned():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
        assert torch.empty(3, dtype=torch.int64).shape == (3,)
    assert torch.empty.__name__ == "empty" and not torch.empty(2**10).fill_(0).isnan().any()


# ------------------------------------------------------------------------------ documents


@pytest.fixture
def project(tmp_path):
    """A README with one table, docs with another, a result, and its figures."""
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (results / "g.json").write_text(json.dumps(assembled([check_row()])))
    for name, table in (("README.md", "g/summary"), ("docs/benchmarking.md", "targets/all")):
        (tmp_path / name).write_text(f"before\n<!-- bench:{table} -->\nold\n<!-- /bench:{table} -->\nafter\n")
    return tmp_path


def stale(project, capsys) -> list[str]:
    """What ``report --check`` names."""
    files = {p: p.read_bytes() for p in project.rglob("*") if p.is_file()}
    code = main(["report", "--check", "--root", str(project)])
    assert {p: p.read_bytes() for p in project.rglob("*") if p.is_file()} == files
    lines = [x.removesuffix(": stale") for x in capsys.readouterr().out.splitlines() if x.endswith(": stale")]
    assert code == bool(lines)
    return lines


def test_documents_are_updated_once_and_checked(project, capsys):
    speedup, memory = "docs/figures/speedup-g.svg", "docs/figures/memory-g.svg"
    everything = ["README.md: g/summary", "docs/benchmarking.md: targets/all", speedup]
    assert stale(project, capsys) == everything
    assert main(["report", "--root", str(project)]) == 0
    new = (project / "README.md").read_text()
    assert new.startswith("before\n<!-- bench:g/summary -->\n| operator |") and "\nold\n" not in new
    assert new.endswith("<!-- /bench:g/summary -->\nafter\n")
    assert "<sub>G, torch 2, commit unknown" in new  # what it was measured with
    assert "15.00× | met" in (project / "docs/benchmarking.md").read_text()
    capsys.readouterr()
    assert stale(project, capsys) == []
    assert not (project / memory).exists()  # one peer at the main shape and mode only

    (project / "README.md").write_text(new.replace("2.50×", "3.50×"))
    assert stale(project, capsys) == ["README.md: g/summary"]
    (project / "README.md").write_text(new)
    drawn = (project / speedup).read_text()
    (project / speedup).unlink()
    assert stale(project, capsys) == [speedup]
    (project / speedup).write_text(drawn)
    (project / "docs/figures/old.svg").write_text("<svg/>")
    assert stale(project, capsys) == ["docs/figures/old.svg"]


def test_a_figure_of_other_data_is_stale(project, capsys):
    main(["report", "--root", str(project)])
    capsys.readouterr()
    path = project / "bench/results/g.json"
    result = json.loads(path.read_text())
    for row in result["timings"]:
        if row["peer"] == "sdpa":
            row["median_s"] *= 1.2
    path.write_text(json.dumps(result))
    assert "docs/figures/speedup-g.svg" in stale(project, capsys)


def test_the_same_data_give_the_same_figure(project):
    pytest.importorskip("matplotlib")
    wanted = figures.wanted(project / "bench/results")
    first, second = (figures.svg(wanted["speedup-g.svg"]) for _ in range(2))
    assert first == second
    assert "torch 2" in first and "<dc:date>" not in first


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<!-- bench:g/atm-speed -->\nx\n", "no partner"),
        ("<!-- bench:none/atm-speed -->\n<!-- /bench:none/atm-speed -->\n", "none.json: cannot be read"),
        ("<!-- bench:g/speed -->\n<!-- /bench:g/speed -->\n", "no table 'speed'"),
    ],
)
def test_bad_markers_are_one_line(project, capsys, text, expected):
    path = project / "docs/benchmarking.md"
    path.write_text(text)
    before = (project / "README.md").read_text()
    assert main(["report", "--root", str(project)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected in error and "benchmarking.md" in error
    assert path.read_text() == text and (project / "README.md").read_text() == before


@pytest.mark.parametrize("document", [True, False], ids=["table", "figure"])
def test_no_document_shows_a_smoke_run(project, capsys, document):
    path = project / "bench/results/g.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"measurement": False}))
    if not document:
        for name in ("README.md", "docs/benchmarking.md"):
            (project / name).write_text("no tables\n")
    assert main(["report", "--root", str(project)]) == 2
    assert "not a measurement" in capsys.readouterr().err


def test_a_result_of_something_else_is_refused(tmp_path, capsys):
    path = tmp_path / "x.json"
    anonymous = {"schema": 1, "kind": "scaling", "environment": {"torch": "2"}}
    for text, expected in (
        ("{", "not JSON"),
        ("{}", "'schema' is not 1"),
        ('{"schema": 1, "kind": "x"}', "'kind' is 'x'"),
        (json.dumps(anonymous), "does not say which commit was measured"),
    ):
        path.write_text(text)
        assert main(["report", str(path)]) == 2
        assert expected in capsys.readouterr().err


def test_committed_results_are_measurements_of_a_known_commit():
    for path in (ROOT / "bench/results").glob("*.json"):
        result = report.load(path)
        assert result.get("measurement", True) and result.get("correct", True), path.name
        assert re.fullmatch(r"[0-9a-f]{40}", result["environment"]["commit"]), path.name
        assert report.tables(result), path.name


# ------------------------------------------------------------------------------ tuning, static evidence


CANDIDATES = [{"num_warps": n} for n in (4, 8, 2, 1)]


def tuned(monkeypatch, seconds: dict[int, float], broken: tuple[int, ...] = ()) -> tune.Outcome:
    machine = Machine(monkeypatch)

    def prepare(candidate: dict):
        if candidate["num_warps"] in broken:
            raise ValueError("wrong: output")
        return machine.peer(seconds[candidate["num_warps"]])

    return tune.choose(CANDIDATES, prepare, rounds=15)


def test_tuning_takes_the_fastest_right_candidate(monkeypatch):
    seconds = {4: 1.2e-3, 8: 1.0e-3, 2: 0.5e-3, 1: 2e-3}
    outcome = tuned(monkeypatch, seconds, broken=(2,))
    assert outcome.best == {"num_warps": 8} and outcome.gain == pytest.approx(1.2, rel=0.03)
    assert [row["status"] for row in outcome.rows] == ["ok", "ok", "failed", "ok"]
    assert "wrong: output" in outcome.rows[2]["reason"]


def test_tuning_leaves_what_is_pinned_within_the_noise(monkeypatch):
    outcome = tuned(monkeypatch, {4: 1.0e-3, 8: 0.99e-3, 2: 2e-3, 1: 2e-3})
    assert outcome.best == {"num_warps": 4} and outcome.gain == 1


def test_tuning_without_a_candidate_that_runs(monkeypatch):
    with pytest.raises(RuntimeError, match="no candidate runs: ValueError: wrong: output"):
        tuned(monkeypatch, {}, broken=(4, 8, 2, 1))


def test_candidates_begin_with_what_is_pinned_and_reach_every_launch():
    pytest.importorskip("triton")
    from segvit_kernels.triton import query_attention
    from segvit_kernels.triton._launch import pinned

    configs, shape = pinned("sm_90"), (16, 1600, 1600, 16, 32)
    (space, *_) = tune.SPACES["query_attention"]
    before = copy.deepcopy(configs)
    first, second, *_ = space.candidates(parameters.entry(configs, space.path))
    assert first == parameters.entry(configs, space.path) != second
    with parameters.replaced(configs, space.path, second | {"block_m": 64}):
        derived = query_attention._fwd_config(shape, torch.bfloat16, "sm_90")
        assert derived["block_m"] == 64
    assert configs == before


def test_pinned_files_keep_their_form(tmp_path):
    for path in parameters.CONFIGS.glob("*.json"):
        text = path.read_text()
        assert tune.dumps(json.loads(text)) + "\n" == text, path.name
        for spaces in tune.SPACES.values():
            for space in spaces:
                pinned = parameters.entry(json.loads(text), space.path)
                assert set(space.values) - {"maxnreg", "tiles"} <= set(pinned)
    copied = tmp_path / "sm_90.json"
    copied.write_text((parameters.CONFIGS / "sm_90.json").read_text())
    old = json.loads(copied.read_text())
    tune.pin(copied, ("atm_fwd", "half", "32"), {"tiles": 1}, {"gpu": "G", "torch": "2", "threads": 2})
    new = json.loads(copied.read_text())
    assert new["atm_fwd"]["half"]["32"] == {"tiles": 1}
    assert new.pop("tuned")["atm_fwd half 32"]["gpu"] == "G"
    new["atm_fwd"]["half"]["32"] = old["atm_fwd"]["half"]["32"]
    assert new == old


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "programs"),
    [
        (4, 168, 54 * 1024, 3),  # 168 registers for 128 threads
        (8, 112, 56 * 1024, 2),
        (4, 32, 100 * 1024, 2),  # shared memory
        (4, 32, 0, 16),  # warps
        (1, 16, 0, 32),  # programs
    ],
)
def test_how_many_programs_fit_a_multiprocessor(warps, registers, shared, programs):
    assert MULTIPROCESSORS["sm_90"].fitting(warps, registers, shared) == programs


@pytest.mark.parametrize("targets", ["labels", "bool", "soft"])
def test_products_are_what_matching_means(targets):
    """The oracle of large shapes beside the definition, which holds every pair at every pixel; in float64."""
    count = {} if targets == "labels" else {"num_targets": 4}
    case = MaskLossCase("tiny", 2, 5, ((4, 3),), (24, 20), targets, **count)
    drawn = case.inputs(torch.float64, torch.device("cpu"), seed=0)
    arguments = {name: drawn[name] for name in ("mask_logits", "targets", "num_classes") if name in drawn}
    arguments["mask_logits"] = 30 * arguments["mask_logits"]  # where softplus of PyTorch is not exact
    expected = mask_matching_cost_reference(**arguments)
    torch.testing.assert_close(mask_matching.products(**arguments), tuple(expected), rtol=1e-12, atol=1e-12)
