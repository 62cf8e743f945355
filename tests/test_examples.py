"""The notebooks of examples/, cell after cell in one process, and its scripts."""

import json
import re
import runpy
import tempfile
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def cells(name: str) -> list[dict[str, Any]]:
    return json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def run(name: str) -> dict[str, Any]:
    """The names that the notebook leaves."""
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells(name)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}.ipynb, cell {number}", "exec"), names)
    return names


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.ipynb")))
def test_no_outputs_are_kept(name):
    for cell in cells(name):
        assert not cell.get("outputs") and cell.get("execution_count") is None


def test_own_model(capsys):
    left = run("own_model")
    assert left["accuracy"] > 0.85  # noise alone is 0.75 of the pixels
    assert (left["averaged"] == left["labels"]).float().mean() > 0.85
    assert left["ours"].focal.item() == pytest.approx(left["plain_loss"].focal.item(), rel=1e-4)
    assert left["differing"] <= 5 and left["taken"]["atm_fwd"]


def test_train_and_look(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = run("train_and_look")
    assert left["result"]["step"] == 90 and left["result"]["miou"] > 0.2
    assert left["agreeing"][-1] == 1 > left["agreeing"][0]
    assert left["differing"] == 0


def run_script(name: str, capsys: Any) -> str:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def test_post_processing(capsys):
    pytest.importorskip("transformers.models.rf_detr", reason="transformers 5.23 is not installed")
    printed = run_script("post_processing", capsys)
    shares = [float(share) for share in re.findall(r"([\d.]+) % equal", printed)]
    assert len(shares) == 7 and min(shares) > 99.9
    assert all(int(count) > 2 for count in re.findall(r"(\d+) segments", printed))


def test_attention(capsys):
    apart = re.findall(r"by (\S+e-?\d+)", run_script("attention", capsys))
    assert len(apart) >= 2 and all(float(value) < 1e-4 for value in apart)
