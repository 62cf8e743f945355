"""``python -m bench simulate`` and ``tune --simulate``: what they make of captured launches."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from test_simulator import _sass

from bench import __main__ as command
from bench import report
from bench.measure import environment
from bench.simulator import assume, calibration
from bench.suites import _capture, simulate, tune

ROOT = environment.ROOT


def _described(exponentials: int, registers: int = 32) -> dict:
    sass = _sass(*["MUFU.EX2 R0, R1"] * exponentials, "EXIT")
    described = {"kernel": "_a_kernel", "programs": 132 * 8, "warps": 4, "registers": registers, "shared": 0}
    return described | {"sass": sass, "parameters": b"", "tensors": {}, "numbers": {}, "constants": {}}


@pytest.fixture
def captured(monkeypatch, tmp_path):
    """Launches in place of a process that compiles: four times the work in another checkout, and a
    third of it less where parameters are changed."""
    asked = []

    def capture(jobs, checkout=environment.ROOT):
        asked.extend((j, checkout) for j in jobs)
        found = []
        for j in jobs:
            count = 400 if checkout == environment.ROOT else 1600
            (change,) = j.get("changes", {"": {}}).values()
            count = count * 2 // 3 if change else count
            if change.get("num_warps") == 8:
                found.append({"reason": "CompilationError: too many warps"})
                continue
            backward = [_described(2 * count)] if j["mode"] == "forward_backward" else []
            found.append({"forward": [_described(count)], "backward": backward, "labels": None})
        return found

    monkeypatch.setattr(simulate, "capture", capture)
    monkeypatch.setattr(simulate, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        calibration, "rows", lambda folder, describe, progress: [{"name": "known", "status": "ok"}]
    )
    return asked


def test_two_checkouts_and_two_configurations_beside_each_other(captured, tmp_path, capsys):
    (tmp_path / "old" / "segvit_kernels" / "triton").mkdir(parents=True)
    operator = tmp_path / "old" / "bench" / "operators" / "atm.py"
    operator.parent.mkdir(parents=True)
    operator.touch()
    changes, out = tmp_path / "changes.json", tmp_path / "found.json"
    changes.write_text(json.dumps({"atm_fwd half 32": {"num_stages": 2}}))
    arguments = ["simulate", "atm", "--batch", "16", "--before", str(tmp_path / "old")]
    assert command.main([*arguments, "--config", str(changes), "--out", str(out)]) == 0
    result = report.load(out)
    seconds = {(r["variant"], r["direction"]): r["H200"]["seconds"] for r in result["rows"]}
    launch = 1e-6
    for direction in ("forward", "backward"):
        now = seconds["now", direction] - launch
        assert seconds["before", direction] - launch == pytest.approx(4 * now, rel=0.02)
        assert seconds["changed", direction] - launch == pytest.approx(now * 2 / 3, rel=0.02)
    # 8 programs a multiprocessor with a warp a quarter each, 400 exponentials of 8 cycles.
    assert seconds["now", "forward"] - launch == pytest.approx(8 * 400 * 8 / 1.98e9, rel=0.02)
    tables = report.tables(result)
    assert "Predicted from machine code, not measured." in tables["operators"]
    assert "| `atm` forward, ade_vit_l, batch 16 |" in tables["operators"]
    assert "| MUFU |" in tables["kernels"] and "`_a_kernel`" in tables["kernels"]
    assert "| known |" in tables["calibration"]
    assert "7 rows ok" in capsys.readouterr().out


def test_the_argmax_has_a_row_for_each_kind_of_data(captured):
    result = simulate.run(names=["semantic_argmax"], batches=[1], calibrate=False, progress=lambda line: None)
    assert [row["data"] for row in result["rows"]] == ["test not tried", "decided early"]
    assert {row["direction"] for row in result["rows"]} == {"forward"}


def test_the_mask_loss_is_predicted_for_labels_as_they_are_drawn(monkeypatch):
    labels = torch.full((2, 128, 192), 255)
    labels[0, :64], labels[1, 100, 130] = 3, 35
    labels[1, :32, :32] = torch.arange(32 * 32).reshape(32, 32) % 7  # more than are counted one by one
    words = _capture._words(labels)
    assert words.tolist() == [[[8, 8, 8], [0, 0, 0]], [[2**32 - 1, 0, 0], [0, 0, 8]]]
    launch = {"tensors": {"tiles_ptr": {}, "pairs_ptr": {}}}
    launch |= {"numbers": {"rows0": 8, "H": 128, "W": 192, "M": 150}}
    launch |= {"constants": {"GROUPS": 8, "BLOCK": 64, "SPAN": 1}}
    # Class 3 of both images in 3 and 2 tiles of 6 (35 has the bit of 3), 35 of the second in 2.
    assert assume.share_met(launch, words, [[3], [3, 35]]) == pytest.approx((3 + 2 + 2) / 18)
    launch["numbers"]["rows0"] = 16
    assert assume.share_met(launch, words, [[3], [3, 35]]) == pytest.approx((3 + 2 + 2) / 9)
    assert assume.share_met({**launch, "tensors": {}}, words, [[3]]) is None

    def predicted(described, labels, skipped):
        return {"H200": {"seconds": 1.0 if skipped else 3.0, "ways": 4, "busy": {"MUFU": 0.5}}}

    monkeypatch.setattr(simulate, "predict", predicted)
    found = simulate._drawn(launch, {"labels": [[3], [3, 35]], "words": words})
    assert found == {"H200": {"seconds": pytest.approx(1 + 2 * 7 / 9), "ways": 4, "busy": {"MUFU": 0.5}}}
    everything = simulate._drawn({**launch, "tensors": {}}, {"labels": [], "words": words})
    assert everything["H200"]["seconds"] == 3.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "cannot be read"),
        ("[]", "not an object of entries"),
        (
            '{"atm_fwd half 33": {}}',
            "changes of 'atm_fwd half 33'; expected an entry of configs/default.json",
        ),
    ],
)
def test_changes_that_cannot_be_made_are_one_line(text, expected, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert command.main(["simulate", "atm", "--config", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_what_does_not_compile_is_a_failed_row_with_its_reason(captured):
    changes = {"atm_fwd half 32": {"num_warps": 8}}
    result = simulate.run(
        names=["atm"], batches=[16], changes=changes, calibrate=False, progress=lambda line: None
    )
    assert not result["correct"]
    (failed,) = (row for row in result["rows"] if row["status"] != "ok")
    assert failed["reason"] == "CompilationError: too many warps"
    assert "failed" in report.tables(result)["operators"] or "–" in report.tables(result)["operators"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_tune_prints_the_ranking(captured, capsys):
    assert command.main(["tune", "atm", "--simulate", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    forward = [line for line in lines if line.startswith("atm_fwd half 32")]
    assert "predicted" in forward[0]
    assert forward[-1].endswith("does not compile or fit")
    pinned = next(k for k, line in enumerate(forward) if "'num_stages': 3" in line and "'tiles': 3" in line)
    assert 0 < pinned < len(forward)


def test_only_the_best_predicted_candidates_are_timed(captured):
    space = tune.Space(("atm_fwd", "half", "32"), "ade_vit_l", "forward", {"num_stages": (1, 2)})
    candidates = [{"num_warps": 4, "num_stages": n} for n in (3, 1, 2)] + [{"num_warps": 8, "num_stages": 3}]
    assert tune._best("atm", space, candidates, 1) == candidates[:2]
    assert tune._best("atm", space, candidates, 4) == candidates[:3]


def test_flash_attention_is_found_in_a_library_or_missed(tmp_path, monkeypatch):
    names = {
        f.name: f"_ZN5torch{f.kernel}ILi64ELi128ELi128ELi{f.warps}E9bfloat16_tE" for f in calibration.FLASH
    }
    for flash in calibration.FLASH:
        flags = "".join(f"Lb{c}E" for c in flash.flags)
        assert calibration._wanted(flash).search(f"{names[flash.name]}{flags}EEvNS_6paramsE".encode())
        other = flags.replace("Lb0E", "Lb1E", 1)
        assert not calibration._wanted(flash).search(f"{names[flash.name]}{other}EEvNS_6paramsE".encode())
    monkeypatch.setattr(calibration, "flash_code", lambda folder: {})
    monkeypatch.setattr(calibration, "_product_row", lambda describe: {"status": "ok"})
    first, second, _ = calibration.rows(tmp_path, dict, print)
    assert first["status"] == second["status"] == "skipped"
    assert "holds no such kernel" in first["reason"]


def test_the_main_loop_is_timed_by_its_products():
    body = ["HMMA.16816.F32.BF16 R0, R4, R8, R0"] * 32
    sass = _sass("NOP", *body, "@P0 BRA 0x10", "MUFU.EX2 R0, R1", "@P1 BRA 0x220", "EXIT")
    assert calibration.loop_cycles(sass, warps=4, resident=2) == pytest.approx(2 * 32 * 8, rel=0.05)


def test_parameters_lie_at_multiples_of_their_size():
    a, b = torch.empty(3), torch.empty(8)
    signature = {
        "a": "*fp32",
        "n": "i32",
        "one": "constexpr",
        "x": "fp32",
        "m": "i32",
        "b": "*bf16",
        "k": "i64",
    }
    values = {"a": a, "n": -2, "one": 1, "x": 0.5, "m": 7, "b": b[2:], "k": 2**40}
    found = _capture.parameters(signature, values)
    pointers = (_capture._address(a), _capture._address(b) + 8)
    assert pointers[1] - pointers[0] == 512 + 8  # storages one behind the other
    assert struct.unpack("<qifi4xqq", found) == (
        pointers[0],
        -2,
        0.5,
        7,
        pointers[1],
        2**40,
    )


CAPTURE = """
import json, sys
sys.path.insert(0, {root!r})
from bench.suites import _capture
_capture._install({stub!r}, "sm_90", 132)
job = {{"operator": "subsample_norm", "shape": "tiny", "batch": 1, "dtype": "bfloat16", "arch": "sm_90",
       "mode": "forward_backward"}}
found = _capture.capture(job)
print(json.dumps({{k: [(d["kernel"], d["programs"], d["parameters"].hex()) for d in found[k]]
                  for k in ("forward", "backward")}}))
"""


@pytest.mark.skipif(
    not os.environ.get("SEGVIT_SIMULATE") or torch.cuda.is_available(),
    reason="compiles for a minute: SEGVIT_SIMULATE=1, on Linux without a GPU",
)
def test_a_call_is_captured_with_its_parameters():
    environ = environment.variables_of(ROOT)
    text = CAPTURE.format(root=str(ROOT), stub=str(simulate.STUB))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environ, cwd=ROOT)
    assert not done.returncode, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [name for name, *_ in found["forward"]] == ["_subsample_norm_fwd_kernel"]
    assert found["backward"][0][0] == "_subsample_norm_bwd_kernel"
    first = bytes.fromhex(found["forward"][0][2])
    assert int.from_bytes(first[:8], "little") == 1 << 40  # the first tensor lies where it always does
