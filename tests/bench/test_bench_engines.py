"""Engines that users would pick instead of ours: a process each, labels compared, or one line why not."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from bench.measure import peaks, workers
from bench.report.tables import model as model_tables
from bench.subjects import engines as subjects
from bench.subjects.published import TINY
from bench.suites import engines

OPTIONS = {"threads": 1, "rounds": 2, "deadline": float("inf")}


def made(size, library=0):
    """What a worker calls: a block of memory of ``size`` bytes, behind a library of so many."""
    print("a library that prints")
    if size < 0:
        raise ValueError("size is negative")
    loaded = np.ones(library, np.uint8)
    info = {"size": size} | ({"resident": peaks.resident()} if library else {})
    return info, lambda: (np.ones(size, np.uint8), loaded)


def test_a_call_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    worker = workers.Worker("test_bench_engines", "made", 50_000_000)
    assert worker.info == {"size": 50_000_000}
    assert 0 < worker() < 60
    held = worker.held()
    assert held is None or held >= 50_000_000
    worker.close()
    worker = workers.Worker("test_bench_engines", "made", 50_000_000, 200_000_000)
    held = worker.held()
    assert worker.info == {"size": 50_000_000} and (held is None or 50_000_000 <= held < 200_000_000)
    worker.close()
    with pytest.raises(RuntimeError, match="ValueError: size is negative"):
        workers.Worker("test_bench_engines", "made", -1)


@pytest.fixture
def here(monkeypatch):
    """No processes; engines of packages give the references, or other labels."""

    class Worker:
        def __init__(self, module, function, *values, threads):
            self.name = values[0]
            self.info, self.call = subjects.serve(*values)

        def __call__(self):
            self.call()
            return 1.0

        def held(self):
            return 1000

        def close(self):
            pass

    def other(shift):
        def load(spec, dtype, folder, threads):
            labels = np.load(folder / subjects.REFERENCE.format("float32"))
            return lambda: (labels + shift) % spec.classes

        return load

    found = [
        dataclasses.replace(subjects.ENGINES[0], dtypes=("float32",)),
        subjects.Engine("same", ("float32", "int8"), "gives the references", other(0)),
        subjects.Engine("wrong", ("float32", "int8"), "gives other labels", other(1)),
        subjects.Engine("absent", ("float32",), "is not there", other(0), ("no_such_package",)),
    ]
    monkeypatch.setattr(subjects, "TABLES", {"engines": found})
    monkeypatch.setattr(engines, "TABLES", {"engines": found})
    monkeypatch.setattr(subjects, "ENGINES", found)
    monkeypatch.setattr(workers, "Worker", Worker)
    monkeypatch.setattr(engines, "PAUSE_S", 0.0)
    monkeypatch.setattr(peaks, "isolated", lambda _, function, *values: getattr(subjects, function)(*values))


def test_rows(here, tmp_path):
    rows = list(engines.rows(TINY, dtypes=("float32", "int8"), graphs=tmp_path, **OPTIONS))
    by = {(row["way"], row["dtype"]): row for row in rows}
    for key in (("SegViT engine", "float32"), ("same", "float32"), ("same", "int8")):
        assert by[key]["status"] == "ok" and by[key]["agreement"] > 0.999 and by[key]["held_bytes"] == 1000
        assert by[key]["p99_s"] == by[key]["median_s"] == 1.0
    for dtype in ("float32", "int8"):
        assert (
            by["wrong", dtype]["status"] == "invalid"
            and "labels as published" in by["wrong", dtype]["reason"]
        )
    assert by["absent", "float32"]["reason"] == "not installed: no_such_package"
    assert (tmp_path / TINY.name / subjects.REFERENCE.format("float32")).exists()
    table = model_tables.tables({"rows": rows})["engines"]
    assert "skipped: not installed: no_such_package" in table and "| 1.00× |" in table
    assert f"Times: medians of {OPTIONS['rounds']} calls." in table
    assert "| largest |" in table, "of so few calls there is no percentile"
    best = model_tables.tables({"rows": rows})["engines-best"]
    assert best.count(" (same) | 1.00× |") == 1  # int8 has no engine of ours here
    assert "*absent*: skipped: not installed: no_such_package." in best
    assert "*wrong*: invalid: " in best
    lost = [row | {"status": "failed", "reason": "boom"} if "SegViT" in row["way"] else row for row in rows]
    best = model_tables.tables({"rows": lost})["engines-best"]
    assert "| tiny, float32 | failed: boom | 1 s (same) | – |" in best
    many = model_tables.tables({"rows": [row | {"samples": 100} for row in rows]})["engines"]
    assert "| 99th percentile |" in many
    assert not model_tables.sound({"rows": rows})  # a peer's labels are wrong


@pytest.mark.parametrize("method", ["__call__", "held"])
def test_an_engine_that_dies_while_it_is_timed_costs_its_row_alone(here, monkeypatch, tmp_path, method):
    ask = getattr(workers.Worker, method)

    def killed(worker):
        if worker.name == "same":
            raise RuntimeError("no message")
        return ask(worker)

    monkeypatch.setattr(workers.Worker, method, killed)
    rows = list(engines.rows(TINY, dtypes=("float32",), graphs=tmp_path, busy=True, **OPTIONS))
    by = {row["way"]: row for row in rows}
    assert (by["same"]["status"], by["same"]["reason"]) == ("failed", "RuntimeError: no message")
    assert by["SegViT engine"]["status"] == "ok" and by["SegViT engine"]["busy_median_s"] == 1.0


def test_exported_files_are_rows(here, monkeypatch, tmp_path):
    """The published formula beside them, and the size of a file, OpenVINO's weights included."""

    def exported(dtype, suffix, size, folder):
        for kind in (suffix, ".bin"):
            (Path(folder) / subjects.EXPORT.format(dtype, kind)).write_bytes(bytes(10**6))

    same = subjects.ENGINES[1]
    files = [
        dataclasses.replace(same, name=f"exported, {suffix}", dtypes=("float32",), suffix=suffix)
        for suffix in (".xml", ".pt2")
    ]
    tables = {"exports": [subjects.EXPORTS[0], *files]}
    monkeypatch.setattr(subjects, "exported", exported)
    monkeypatch.setattr(subjects, "TABLES", tables)
    monkeypatch.setattr(engines, "TABLES", tables)
    rows = list(engines.rows(TINY, table="exports", dtypes=("float32",), graphs=tmp_path, **OPTIONS))
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert [row.get("file_bytes") for row in rows] == [None, 2 * 10**6, 10**6]
    assert rows[0]["agreement"] == 1
    table = model_tables.tables({"rows": rows})["exports"]
    assert "| exported, .pt2 |" in table and "| file |" in table and "| 1.0 MB |" in table


def test_a_failing_preparation_is_a_row_and_tried_once(here, monkeypatch, tmp_path):
    tried = []

    def isolated(_, function, *values):
        tried.append(function)
        if function == "export":
            raise RuntimeError("no exporter")
        getattr(subjects, function)(*values)

    monkeypatch.setattr(peaks, "isolated", isolated)
    monkeypatch.setattr(subjects, "INT8", dict.fromkeys(("same", "wrong"), "int8"))
    known = [dataclasses.replace(e, packages=("numpy",)) for e in subjects.ENGINES[1:3]]
    monkeypatch.setattr(engines, "TABLES", {"engines": known})
    rows = list(engines.rows(TINY, dtypes=("float32", "int8"), **OPTIONS))
    assert {row["status"] for row in rows} == {"failed"} and len(rows) == 4
    assert all("export: no exporter" in row["reason"] for row in rows)
    assert tried == ["references", "export"]


def test_bfloat16_may_differ_as_much_as_it_does_as_published():
    assert engines.least("float32", 0.9) == pytest.approx(0.999)
    assert engines.least("bfloat16", 0.97) == pytest.approx(0.939)
    assert engines.least("int8", 0.97) == 0.5
