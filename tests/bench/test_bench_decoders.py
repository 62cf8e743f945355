"""`bench decoders` on a tiny backbone: every decoder has its numbers, a table and a figure show them."""

import pytest
import torch

from bench import report
from bench.report import figures
from bench.suites import decoders


def test_every_decoder_has_a_row(monkeypatch):
    asked = []
    monkeypatch.setattr(decoders.peaks, "isolated", lambda *arguments: asked.append(arguments) or 1_500_000)
    threads, lines = torch.get_num_threads(), []
    try:
        result = decoders.run(patches=(16,), threads=1, rounds=1, smoke=True, progress=lines.append)
    finally:
        torch.set_num_threads(threads)
    rows = {row["decoder"]: row for row in result["rows"]}
    assert list(rows) == list(decoders.DECODERS)
    beside = result["beside"]
    assert len(lines) == 4 + len(beside) and len(asked) == 4 + 2 * len(beside)
    assert result["measurement"] is False and all(row["median_s"] > 0 for row in rows.values())
    macs = {name: row["macs"] for name, row in rows.items()}
    assert macs["linear"] < min(macs["atm"], macs["segvitv2"], macs["eomt"])
    assert macs["segvitv2"] < macs["atm"], "without self-attention"
    module, function, row, dtype = asked[0]
    assert (module, function, dtype) == ("bench.suites.decoders", "measure_memory", "float32")
    assert decoders.Row(**row).decoder == "linear"
    table = report.tables(result)["front"]
    assert "| `vit_tiny`, patch 16 | `eomt` |" in table and "| 2 MB |" in table
    pytest.importorskip("transformers")
    (row,) = beside
    assert row["logits_error"] < 1e-5 and row["labels_equal"] > 0.999 and row["classes"] > 1
    assert asked[-1][:2] == ("bench.suites.decoders", "measure_pair")
    assert "| `vit_tiny`, patch 16 |" in report.tables(result)["beside"]
    assert report.tables({**result, "beside": []})["beside"] == "Without transformers."
    data = figures.front(result)
    assert set(data["panels"]["vit_tiny"]) == set(rows)
    pytest.importorskip("matplotlib")
    drawn = figures.svg({"figure": "front", "data": data, "machine": "here"})
    assert drawn.count("GMACs") >= 1 and "segvitv2" in drawn
