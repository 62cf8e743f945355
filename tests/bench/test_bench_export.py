"""``bench export``: files beside the models they are of, ways to write their tail, mIoU before and after."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bench import report
from bench.__main__ import main
from bench.report.tables import export as tables
from bench.subjects import exports, models
from bench.suites import export


def test_what_differs_and_by_how_much():
    """A pixel of another class counts, and how far its score lies below the best one."""
    scores = torch.tensor([[[[0.5, 0.1, 0.2]], [[0.4, 0.3, 0.2]]]])
    labels = scores.argmax(1)
    assert exports.agreement([labels], [(labels, scores)]) | {"gap": 0.0} == {
        "agreement": 1.0,
        "differ": 0,
        "gap": 0.0,
        "classes": 2,
    }
    wrong = labels.clone()
    wrong[0, 0, 0] = 1
    found = exports.agreement([wrong], [(labels, scores)])
    assert found["differ"] == 1 and found["gap"] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="expected"):
        exports.agreement([labels[:, :, :2]], [(labels, scores)])


@pytest.mark.parametrize("name", exports.TAILS)
def test_every_tail_gives_the_labels(name):
    rows, how = exports.TAILS[name]
    classes, grid, size = 7, 4, 32
    masks, probabilities = exports.tail_inputs(classes, grid)
    labels = exports.Tail(min(rows // 8, size), how, size, grid)(masks, probabilities)
    whole = F.interpolate(masks.double(), size=(size, size), mode="bilinear").sigmoid()
    right = torch.einsum("bqc,bqhw->bchw", probabilities.double(), whole).argmax(1)
    assert torch.equal(labels.long(), right) and len(right.unique()) > 1


def test_labels_of_a_file(tmp_path, monkeypatch, capsys):
    """Exported, run in a process without this package, compared; refused where they are not the model's."""
    monkeypatch.setattr(exports, "FILES", [f for f in exports.FILES if f.name == "TorchScript"])
    out = tmp_path / "labels.json"
    words = ["export", "labels", "--smoke", "--threads", "1", "--out", str(out)]
    assert main(words) == 0
    (row,) = report.load(out)["rows"]
    assert row["status"] == "ok" and row["agreement"] > 0.999 and row["classes"] > 1 and row["file_bytes"]
    assert "| tiny | 100.000 %, " in capsys.readouterr().out

    wrong = {"agreement": 0.5, "differ": 9, "gap": 0.1, "call_s": 1.0}
    monkeypatch.setattr(exports, "expected", lambda *_: (None, None))
    monkeypatch.setattr(exports, "compared", lambda *_: wrong)
    assert main(words) == 1
    assert report.load(out)["rows"][0]["status"] == "invalid"
    assert main(["export", "labels", "--models", "vit_huge"]) == 2
    assert main(["export", "int8", "--data", str(tmp_path)]) == 2
    assert "--checkpoint" in capsys.readouterr().err


def test_miou_before_and_after(tmp_path, monkeypatch):
    from PIL import Image

    model = models.segvit(exports.TINY_CASE).eval()
    model.save_pretrained(tmp_path / "checkpoint")
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        picture = exports.picture()[0, :, :50, :70]
        labels = model.predict(picture) + 1  # 0 is ignored
        labels[:10] = 1 + labels[:10] % 5
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "images" / split / "p.png")
        Image.fromarray(labels.numpy().astype(np.uint8)).save(tmp_path / "annotations" / split / "p.png")
    kinds = (("TorchScript", ".torchscript", "float32"), ("TorchScript, int8", ".torchscript", "int8"))
    monkeypatch.setattr(exports, "PRECISIONS", kinds)
    given = {"checkpoint": tmp_path / "checkpoint", "data": tmp_path, "calibration": 1, "threads": 1}
    before, after, refused = export.run("int8", **given)["rows"]
    assert before["miou"] == after["miou"] and 0 < before["miou"] < 1
    assert after["agreement"] == 1 and after["images"] == 1 and after["file_bytes"] > 0
    assert refused["status"] == "skipped" and "int8" in refused["reason"]


def test_tables():
    row = {"table": "tail", "tail": "a", "runtime": "R", "chosen": True, "status": "ok"}
    rows = [row | {"min_s": 0.25, "extra_bytes": 12e6}, row | {"runtime": "S", "status": "failed"}]
    assert "| **a** | **250 ms, 12.0 MB** | failed |" in tables.tables({"rows": rows})["tail"]
    assert tables.sound({"rows": rows})
    row = {"table": "labels", "model": "m", "file": "f", "agreement": 0.5, "differ": 3, "call_s": 1.0}
    assert "0.000 %" in tables.tables({"rows": [row | {"status": "ok"}]})["labels"]
    for status in ("invalid", "failed"):
        assert not tables.sound({"rows": [row | {"status": status}]})
    skipped = {"table": "labels", "model": "m", "file": "g", "status": "skipped"}
    for reason, shown in (("views are laid out", "–"), ("time budget", "skipped: time budget")):
        table = tables.tables({"rows": [row | {"status": "ok"}, skipped | {"reason": reason}]})["labels"]
        assert f" | {shown} |" in table
    assert "**wrong**" in tables.tables({"rows": [row | {"status": "invalid"}]})["labels"]
    row = {"table": "int8", "file": "f", "status": "ok", "miou": 0.5, "agreement": 1.0, "images": 2}
    assert "| f | 50.00 | 100.00 % | 2 | – |" in tables.tables({"rows": [row]})["int8"]


@pytest.mark.parametrize(
    "words, stem",
    [
        (["exports"], "exports"),
        (["steps"], "steps"),
        (["ways"], None),
        (["ways", "exports"], None),
        ([], "model"),
    ],
)
def test_exported_files_have_a_result_of_their_own(tmp_path, monkeypatch, words, stem):
    """Which does not replace the one of whole models, where other sections alone are not kept."""
    result = {"schema": 1, "kind": "model", "rows": [], "environment": {"commit": None}}
    monkeypatch.setattr("bench.suites.model.run", lambda **_: result)
    monkeypatch.setattr("bench.commands._options.RESULTS", tmp_path)
    monkeypatch.setattr("bench.measure.environment.instruction_set", lambda: "avx512")
    monkeypatch.setattr("bench.measure.environment.cpu_model", lambda: "A Processor")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["model", *(["--sections", *words] if words else [])]) == 0
    assert [path.name for path in tmp_path.iterdir()] == (
        [f"{stem}-cpu-a-processor-avx512.json"] if stem else []
    )
