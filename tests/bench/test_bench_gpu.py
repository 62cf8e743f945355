"""`bench gpu`: rehearsed whole on the stub of libcuda, killed, and its parts where something goes wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import report
from bench.__main__ import main
from bench.measure import results as files
from bench.measure import timing
from bench.report import targets
from bench.subjects import operators, parameters
from bench.suites import _gpu_rows, _gpu_tasks, cache, gpu, tune
from bench.suites._gpu_tasks import sanitizer
from segvit_kernels.testing.stub.torch_cuda import pretended

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "segvit_kernels" / "triton" / "configs" / "sm_90.json"
KILLS = int(os.environ.get("SEGVIT_KILLS", "1"))
needs_stub = pytest.mark.skipif(
    not sys.platform.startswith("linux") or torch.cuda.is_available(), reason="Linux without a GPU"
)


def rehearsal(*arguments: str, **variables: str) -> subprocess.Popen:
    """The command on the stub, in a process group of its own."""
    pytest.importorskip("triton")
    unset = ("TRITON_INTERPRET", "SEGVIT_KERNELS_BACKEND", "SEGVIT_BENCH_SMOKE")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "bench" / "rehearsal.py"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


# ------------------------------------------------------------------------------ the whole command


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Folder of files, what was printed, and the lines that ran by file."""
    folder = tmp_path_factory.mktemp("gpu")
    lines = folder / "lines"
    with rehearsal(
        *("gpu", "--smoke", "--in-process", "--budget", "3000", "--out", str(folder / "out")),
        REHEARSAL_LINES=str(lines),
    ) as process:
        printed = process.communicate()[0]
    ran = defaultdict(set)
    for line in lines.read_text().splitlines():
        name, _, number = line.rpartition(":")
        ran[name].add(int(number))
    return folder / "out", printed, ran


@needs_stub
def test_the_rehearsal_leaves_the_files_of_a_run(rehearsed):
    folder, printed, _ = rehearsed
    names = {path.name for path in folder.iterdir()}
    results = {"nvidia-h100-80gb-hbm3.json", "model-nvidia-h100-80gb-hbm3.json"}
    assert results <= names <= results | {_gpu_rows.ROWS, gpu.LOG}, printed
    result = report.load(folder / "nvidia-h100-80gb-hbm3.json")
    assert result["kind"] == "gpu" and result["measurement"] is False and result["correct"] is True
    assert {e["name"] for e in result["sections"]} == set(gpu.SECTIONS)
    assert {e["ended"] for e in result["sections"]} == {"ok"}
    assert all(
        result[t] for t in ("checks", "ceilings", "costs", "timings", "memory", "candidates", "native")
    )
    checked = {(r["operator"], r["dtype"]) for r in result["checks"] if r["status"] == "ok"}
    assert checked == {(op, dtype) for op in operators.by_name() for dtype in _gpu_tasks.DTYPES}
    assert {r["quantity"] for r in result["checks"] if r["kind"] == "graph_dropout"} == {
        "new dropout mask",
        "finite",
    }
    ours = [r for r in result["timings"] if r["peer"] == "fused"]
    assert {(r["operator"], r["method"]) for r in ours} == {
        (op, method) for op in operators.by_name() for method in ("graph", "stream")
    }
    assert all(r["status"] == "ok" and r["samples"] >= 3 for r in ours), "rows of one sample are superseded"
    peers = {r["peer"] for r in result["timings"]}
    assert {"plain", "sdpa flash", "sdpa cudnn", "compiled", "plan fused"} <= peers
    assert [(r["name"], r["status"]) for r in result["sanitizer"]] == [(t, "ok") for t in sanitizer.TOOLS]
    assert [c["name"] for c in tune.load(gpu.CANDIDATES)] == [r["name"] for r in result["candidates"]]
    assert all(r["status"] == "ok" and r["gain"] > 0 for r in result["candidates"])
    model = report.load(folder / "model-nvidia-h100-80gb-hbm3.json")
    assert {r["way"] for r in model["rows"]} >= {"published", "fused", "engine, graph", "SegViT"}
    assert all(r["status"] == "ok" for r in model["rows"])
    assert {r["way"] for r in model["rows"] if "extra_bytes" not in r} == {"engine, graph"}
    for found in (result, model):
        assert "**Not a measurement**" in report.document(found, "x")
    tables = report.tables(result)
    assert "| tiny, 1, float32, forward + backward |" in tables["atm-speed"]
    assert "| memcheck | ok |" in tables["sanitizer"] and "atm forward, 64 keys" in tables["candidates"]


# Functions of which the rehearsal leaves lines out, and why.
ELSEWHERE = "runs in other tests"
NO_GPU = "a machine without a GPU"
FULL_SIZE = "the smoke run has one size; runs in other tests"
LEFT_OUT = {
    "bench/suites/gpu.py": dict.fromkeys(("Compiled._count", "work", "_log", "_Section"), ELSEWHERE),
    "bench/suites/_gpu_rows.py": {},
    "bench/suites/_gpu_tasks.py": {
        "_context": NO_GPU,
        "_lost": ELSEWHERE,
        "_timing_groups": FULL_SIZE,
        "odd": FULL_SIZE,
        "launches": "bench precompile",
    },
    "bench/suites/tune.py": {
        **dict.fromkeys(("Space.candidates", "dumps", "pin", "_begin", "main"), "bench tune"),
        **dict.fromkeys(("ranked", "_best"), "bench tune and bench simulate"),
        **dict.fromkeys(("load", "load.fail", "choose", "_case"), ELSEWHERE),
        "_sampler": "a machine without a GPU, and wrong results",
        "launch": "bench precompile",
        "compare": "what is pinned does not run",
    },
    "bench/subjects/operators/__init__.py": {"check_peers": "bench kernels"},
    "bench/subjects/operators/base.py": {
        **dict.fromkeys(("truth_and_ordinary", "checked", "_cannot", "floor"), ELSEWHERE),
        "kernels_backend": "bench scaling",
    },
    "bench/subjects/operators/atm.py": {"check_cases": FULL_SIZE, "_used": ELSEWHERE, "launch": ELSEWHERE},
    "bench/subjects/operators/attention.py": {"_xformers": "not installed", "peers": NO_GPU},
    "bench/subjects/operators/mask_loss.py": {
        "check_cases": FULL_SIZE,
        "pair_losses": "masks are timed at full size",
    },
    "bench/subjects/operators/mask_matching.py": {"check_cases": FULL_SIZE},
    "bench/subjects/operators/query_attention.py": {"check_cases": FULL_SIZE},
    "bench/subjects/operators/semantic_argmax.py": {
        "check_cases": FULL_SIZE,
        **dict.fromkeys(("Case.pixels", "plain"), "views are timed at full size"),
    },
    "bench/subjects/operators/subsample_norm.py": {"check_cases": FULL_SIZE},
}
LINES_LEFT_OUT = {
    "return",  # a mode that no peer of the kind has
    "continue",
    "raise",
    "time.sleep(0.1)",
    'yield base | {"method": "all", "status": "skipped", "reason": "time budget"}',
    'yield {"status": "skipped", "reason": "time budget"}',
    'reason = "no CUDA graphs on the CPU"',
    'yield base | {"method": method, "status": "skipped", "reason": reason}',
}


def code_lines(code, name: str = ""):
    """(function, line) of all lines of a code object and those inside."""
    for _, _, line in code.co_lines():
        if line:
            yield name, line
    for inner in code.co_consts:
        if hasattr(inner, "co_lines"):
            own = inner.co_name
            yield from code_lines(inner, name if own.startswith("<") else f"{name}.{own}".strip("."))


@needs_stub
@pytest.mark.parametrize("file", LEFT_OUT)
def test_every_line_of_the_command_runs_in_the_rehearsal(rehearsed, file):
    """But for what is listed with its reason; a reason without a line left out is stale."""
    text = (ROOT / file).read_text()
    source, missing, used = text.splitlines(), set(), set()
    for function, line in code_lines(compile(text, file, "exec")):
        code = source[line - 1].strip()
        if line in rehearsed[2][file] or code in LINES_LEFT_OUT:
            continue
        names = [n for n in LEFT_OUT[file] if f"{function}.".startswith(f"{n}.")]
        used.update(names)
        if not names:
            missing.add((function, line, code))
    assert not missing
    assert used == set(LEFT_OUT[file])


@needs_stub
def test_a_kill_leaves_readable_files(tmp_path):
    """SIGKILL of the whole process group at random moments; every file is readable each time."""
    moments = random.Random(int(os.environ.get("SEGVIT_KILL_SEED", "0")))
    found = set()
    for attempt in range(KILLS):
        folder = tmp_path / str(attempt)
        process = rehearsal("gpu", "--smoke", "--budget", "3000", "--out", str(folder))
        # Counted in lines, not seconds: a run has a thousand, the machine's own section 140.
        wanted, lines, begun = moments.randrange(2, 600 if KILLS > 2 else 140), 0, time.time()
        described = attempt > 0  # the first kill comes after that, which another process does
        while (lines < wanted or not described) and time.time() < begun + 240 and process.poll() is None:
            there = gpu.read(folder)
            lines = len(there)
            described = described or any("torch" in line for line in there)
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kept = gpu.read(folder)
        assert len(kept) >= lines > 0
        whole = (folder / _gpu_rows.ROWS).read_text().splitlines()
        unreadable = [line for line in whole if line.strip()]
        assert len(unreadable) - len(kept) <= 3, "at most the line in flight of each worker"
        for path in folder.glob("*.json"):
            report.load(path)
        assert len(list(folder.iterdir())) <= 8
        if any("torch" in line for line in kept):
            assert main(["gpu", "--assemble", "--out", str(folder)]) == 0
            report.load(folder / "nvidia-h100-80gb-hbm3.json")
            found.add(len(kept))
    assert found, "no kill came after the machine was described"
    print("lines at the kills with a result:", *sorted(found))


@pytest.mark.parametrize("name", gpu.SECTIONS)
def test_sections_of_a_full_run_have_tasks(name):
    tasks = gpu.SECTIONS[name](gpu.Plan(candidates=tune.load(gpu.CANDIDATES)))
    keys = [json.dumps([task.table, task.key], sort_keys=True) for task in tasks]
    assert tasks and all(keys)
    if name.startswith("checks") or name in ("machine", "candidates"):
        assert len(set(keys)) == len(keys), "rows about the same thing supersede each other"
    if name.startswith("checks:"):
        (first,) = {t.key["operator"] for t in tasks[: len(operators.by_name())]} ^ set(
            operators.by_name()
        ) or {0}
        assert first == 0, "the first check of every operator comes first"


def test_candidates_are_of_cases_and_entries_that_are_and_differ_from_these():
    configs = json.loads(CONFIG.read_text())
    for candidate in tune.load(gpu.CANDIDATES):
        op = operators.by_name()[candidate["operator"]]
        case = tune._case(op, candidate, False)
        assert case.batch == 16 and all(getattr(case, k) == v for k, v in candidate["sizes"].items())
        for place, changes in candidate["changes"].items():
            pinned = parameters.entry(configs, place.split())
            assert parameters.changed(pinned, changes) != pinned, candidate["name"]
        assert candidate["changes"] or candidate["arguments"]


def test_whole_models_are_held_against_their_targets():
    row = {"status": "ok", "model": "vit_l_ade20k_640", "mode": "training", "dtype": "bfloat16"}
    ours, theirs = {"median_s": 2.0, "extra_bytes": 5}, {"median_s": 3.0, "extra_bytes": 10}
    rows = [row | {"way": "SegViT"} | ours, row | {"way": "SegViT, published formula"} | theirs]
    assert targets._step({"rows": rows}) == 1.5 and targets._step_memory({"rows": rows}) == 0.5
    slower = [rows[0] | {"median_s": 6.0}, rows[1]]
    assert targets._step({"rows": slower}) == 0.5, "not the published formula's own time"
    image = row | {"mode": "inference", "way": "engine, graph", "batch": 1, "median_s": 1.0}
    rows = [image, image | {"way": "published", "dtype": "float32", "batch": 8, "median_s": 40.0}]
    assert targets._inference("published", dtype="float32")({"rows": rows}) is None, "of another batch"


def test_a_target_is_judged_where_it_is_furthest_from_being_met(tmp_path):
    """And says which of the machines that is."""
    key = {"operator": "atm", "shape": "ade_vit_b", "batch": 1, "dtype": "float32", "mode": "forward"}
    rows = [key | {"method": "wall", "status": "ok", "peer": peer} for peer in ("fused", "plain")]
    for index, (name, ratio) in enumerate((("Quick", 3.0), ("Other", 1.5))):
        result = {"schema": 1, "kind": "cpu", "measurement": True, "correct": True}
        result |= {table: [] for table in ("checks", "memory", "ceilings", "costs")}
        result["timings"] = [rows[0] | {"median_s": 1.0}, rows[1] | {"median_s": ratio}]
        result["environment"] = {"cpu": name, "instruction_set": "avx2", "threads": 2, "commit": None}
        files.dump(tmp_path / f"{index}.json", result)
    text = targets.table(tmp_path)
    assert (
        "forward against the plain formula (ade_vit_b, batch 1, float32) | CPU 1 | ≥ 2× | 1.50× | missed"
        in text
    )
    assert "<sub>1: Other (avx2), 2 threads" in text and "Quick" not in text
    # Of whole models too, where all of several meet it.
    one = {"status": "ok", "model": "vit_l_cocostuff10k_512", "batch": 1, "mode": "inference"}
    for index, seconds in enumerate((1 / 800, 1 / 500)):
        result = {"schema": 1, "kind": "model", "measurement": True, "rows": [one | {"way": "engine, graph"}]}
        result["rows"][0]["median_s"] = seconds
        result["environment"] = {"gpu": f"GPU {index}", "commit": None}
        files.dump(tmp_path / f"model-{index}.json", result)
    assert "| GPU 2 | ≥ 400 frames/s | 500 frames/s | met |" in targets.table(tmp_path)


# ------------------------------------------------------------------------------ workers


def section(monkeypatch, tmp_path, tasks, deadline: float = 60.0) -> gpu._Section:
    monkeypatch.setitem(gpu.SECTIONS, "machine", lambda plan: tasks)
    return gpu._Section("machine", tmp_path, tmp_path, gpu.Plan(smoke=True), time.time() + deadline)


def test_a_dead_worker_costs_one_task(tmp_path, monkeypatch):
    """The task in flight fails, the section goes on after it, and a restart that dies too gives up."""
    tasks = [_gpu_tasks.Task("checks", {"name": str(n)}, None) for n in range(3)]
    own = section(monkeypatch, tmp_path, tasks)
    script = (
        "import json, sys; path, start = sys.argv[1], int(sys.argv[2]); f = open(path, 'a')\n"
        "def w(**r): f.write(json.dumps({'section': 'machine', **r}) + chr(10)); f.flush()\n"
        "w(begin=start)\n"
        "if start == 1: sys.stderr.write('boom' + chr(10)); sys.exit(139)\n"
        "w(table='checks', name=str(start), status='ok'); w(end=start)\n"
        "sys.exit(3 if start == 0 else 0)\n"
    )

    def start(index: int = 0) -> None:
        with own.printed.open("ab") as printed:
            command = [sys.executable, "-c", script, str(tmp_path / _gpu_rows.ROWS), str(index)]
            own.process = subprocess.Popen(command, stderr=printed)

    monkeypatch.setattr(own, "start", start)
    start()
    while not own.poll():
        time.sleep(0.01)
    rows = {r["name"]: (r["status"], r.get("reason")) for r in gpu.latest(gpu.read(tmp_path))}
    assert rows["0"] == ("ok", None) and rows["2"] == ("ok", None)
    assert rows["1"] == ("failed", "worker ended with code 139: boom")
    assert own.restarts == 2 and "boom" in (tmp_path / gpu.LOG).read_text()


def ended(path: Path) -> bool:
    """Whether the process whose number a file holds is no more, or soon."""
    for _ in range(1000):
        try:
            state = Path(f"/proc/{path.read_text().strip()}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux")
def test_what_a_hanging_worker_started_is_killed_too(tmp_path, monkeypatch):
    """As the CUDA C++ battery's tests, on the GPU; in a group of its own too."""
    own = section(monkeypatch, tmp_path, [_gpu_tasks.Task("checks", {"name": "0"}, None)], deadline=-1)
    monkeypatch.setattr(gpu, "GRACE_S", 0.0)
    own.rows.write(begin=0)
    script = "sleep 600 & echo $! > left; setsid sleep 600 & echo $! > own; touch ready; wait"
    own.process = subprocess.Popen(["sh", "-c", script], cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    assert own.poll() and ended(tmp_path / "left") and ended(tmp_path / "own")


def test_a_hanging_worker_is_killed_and_the_rest_skipped(tmp_path, monkeypatch):
    tasks = [_gpu_tasks.Task("checks", {"name": str(n)}, None) for n in range(2)]
    own = section(monkeypatch, tmp_path, tasks, deadline=-1)
    monkeypatch.setattr(gpu, "GRACE_S", 0.0)
    own.rows.write(begin=0)
    own.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert own.poll() and own.process.returncode != 0
    assert [r["status"] for r in gpu.latest(gpu.read(tmp_path))] == ["failed", "skipped"]


def test_a_hanging_task_costs_itself(tmp_path, monkeypatch):
    tasks = [_gpu_tasks.Task("checks", {"name": str(n)}, None, quiet_s=0.1) for n in range(3)]
    own = section(monkeypatch, tmp_path, tasks)

    def start(index: int = 0) -> None:
        for i in range(index, 3):
            own.rows.write(begin=i)
            if i == 1:
                break
            own.rows.write(table="checks", name=str(i), status="ok")
            own.rows.write(end=i)
        # The last one may take its time.
        seconds = 60 if index == 0 else 0.5
        own.process = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])

    monkeypatch.setattr(own, "start", start)
    start()
    while not own.poll():
        own.looked = 0.0
        time.sleep(0.01)
    rows = {r["name"]: (r["status"], r.get("reason")) for r in gpu.latest(gpu.read(tmp_path))}
    assert rows["0"] == rows["2"] == ("ok", None) and own.ended == "ok"
    assert rows["1"] == ("failed", "did not end in 0 s, without a row, and was killed")


def test_workers_of_a_section_append_to_one_file(tmp_path, monkeypatch):
    """A worker process as the command starts it: rows, beginnings and ends, and what it printed."""
    monkeypatch.setattr(gpu, "GRACE_S", 600.0)  # of a busy machine
    plan = gpu.Plan(smoke=True, dtypes=("float32",))
    own = gpu._Section("timings", tmp_path, tmp_path, plan, time.time() - 1)
    own.start()
    while not own.poll():
        time.sleep(0.05)
    lines = gpu.read(tmp_path)
    assert own.ended == "ok" and lines[-1]["ended"] == "ok"
    rows = gpu.latest(lines)
    modes = sum(len(op.modes) for op in operators.by_name().values())
    assert len(rows) == modes and {r["reason"] for r in rows} == {"time budget"}
    assert len([line for line in lines if "begin" in line]) >= len(rows)


def test_some_of_the_stages_have_a_result_too(tmp_path):
    found = gpu.run(tmp_path, gpu.Plan(True), budget_s=60, stages=["candidates"], in_process=True)
    assert [result["environment"]["torch"] for result in found] == [torch.__version__]


def test_what_a_failing_task_printed_stands_in_the_log(tmp_path, monkeypatch):
    def run(context):
        print("nothing of this", flush=True)
        yield {"status": "ok"}

    def fail(context):
        yield {"status": "ok"}
        raise ValueError("no such luck")

    def exhausted(context):
        raise torch.OutOfMemoryError("tried to allocate 80 GB")

    tasks = [
        _gpu_tasks.Task("checks", {"name": n}, f) for n, f in (("a", run), ("b", fail), ("c", exhausted))
    ]
    monkeypatch.setitem(gpu.SECTIONS, "machine", lambda plan: tasks)
    printed = tmp_path / "printed"
    printed.write_text("left over")
    assert (
        gpu.work("machine", tmp_path, gpu.Plan(True), start=0, deadline=time.time() + 60, printed=printed)
        == 0
    )
    rows = {r["name"]: r for r in gpu.latest(gpu.read(tmp_path))}
    assert rows["a"]["status"] == "ok" and rows["b"]["status"] == "failed"
    assert rows["b"]["reason"] == "ValueError: no such luck"
    assert rows["c"]["status"] == "skipped" and "80 GB" in rows["c"]["reason"]
    log = (tmp_path / gpu.LOG).read_text()
    assert '"name": "b"' in log and "no such luck" in log and "left over" not in log


def raises(context):
    raise RuntimeError("an illegal memory access was encountered")
    yield


def tells(context):
    yield {"status": "failed", "reason": "an illegal memory access was encountered"}


@pytest.mark.parametrize("broken", [raises, tells])
def test_a_lost_context_ends_the_worker(tmp_path, monkeypatch, broken):
    tasks = [_gpu_tasks.Task("checks", {"name": str(n)}, broken) for n in range(2)]
    monkeypatch.setitem(gpu.SECTIONS, "machine", lambda plan: tasks)
    monkeypatch.setattr(gpu, "_lost", lambda device: True)
    assert gpu.work("machine", tmp_path, gpu.Plan(True), start=0, deadline=time.time() + 60) == 3
    assert [r["name"] for r in gpu.latest(gpu.read(tmp_path))] == ["0"]
    monkeypatch.undo()
    assert gpu._lost(torch.device("cuda", 0)) is not torch.cuda.is_available()
    assert not gpu._lost(torch.device("cpu")) and not gpu._lost(None)


def test_random_numbers_that_a_failed_capture_left_behind_are_a_loss(monkeypatch):
    def rand(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    with pretended(SimpleNamespace()):
        assert not gpu._lost(torch.device("cuda", 0))
        monkeypatch.setattr(torch, "rand", rand)
        assert gpu._lost(torch.device("cuda", 0))


def test_rows_are_read_to_the_last_whole_line(tmp_path):
    rows = gpu.Rows(tmp_path, "machine")
    rows.write(table="checks", name="a", max_error=float("inf"))
    with (tmp_path / _gpu_rows.ROWS).open("a") as file:
        file.write('{"section": "machine", "table": "che')
    assert [r["name"] for r in gpu.latest(gpu.read(tmp_path))] == ["a"]
    again = gpu.Rows(tmp_path, "timings")
    again.write(table="timings", name="b", samples=1)
    again.write(table="timings", name="b", samples=9)
    found = gpu.latest(gpu.read(tmp_path))
    assert [(r["name"], r.get("samples")) for r in found] == [("a", None), ("b", 9)]
    assert found[0]["max_error"] is None


def test_kernels_that_were_compiled_are_counted():
    knobs = pytest.importorskip("triton").knobs
    kept = knobs.compilation.listener
    try:
        counted = gpu.Compiled()
        for hit in (True, False, True):
            knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=hit)
        assert counted.take() == {"compiled": 1, "from_cache": 2} and counted.take() == {}
    finally:
        knobs.compilation.listener = kept


# ------------------------------------------------------------------------------ options, candidates


def test_bad_options_of_the_command_are_one_line(tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("")
    broken = tmp_path / "x.tar.gz"
    broken.write_text("no archive")
    here = {"out": str(tmp_path / "new")}
    asked = (
        (["gpu", "--smoke", "--out", str(full)], "is not empty"),
        (["gpu", "--smoke", "--out", str(ROOT / "bench/results/x")], "not a measurement|no measurement"),
        (
            ["gpu", "--smoke", "--out", here["out"], "--stages", "all"],
            "no such stage; expected some of machine",
        ),
        (["gpu", "--smoke", "--out", here["out"], "--stages", "timings"], "expected checks too"),
        (["gpu", "--smoke", "--out", here["out"], "--candidates", str(broken)], "x.tar.gz: not JSON"),
        (["gpu", "--smoke", "--out", here["out"], "--cache", str(broken)], "expected an archive of"),
        (["gpu", "--assemble", "--out", str(full)], "rows.jsonl does not exist"),
        (["precompile", "--out", str(tmp_path / "no/x.tar.gz")], "does not exist"),
    )
    for arguments, expected in asked:
        assert main(arguments) == 2, arguments
        line = capsys.readouterr().err.strip()
        assert (
            "\n" not in line
            and line.startswith("python -m bench: error: ")
            and any(e in line for e in expected.split("|"))
        ), line


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"operator": "atn"}, "operator 'atn'; expected one of atm"),
        ({"shape": "ade"}, "shape 'ade'; expected one of ade_vit_l"),
        ({"mode": "backward"}, "mode 'backward'; expected one of forward"),
        ({"changes": {"atm_fwd half 33": {}}}, "changes of 'atm_fwd half 33'"),
        ({"sizes": {"tokens": 3}}, "sizes tokens; expected some of"),
        ({"speed": 3}, "has speed; expected"),
        ({"name": None}, None),
    ],
)
def test_candidates_are_checked(tmp_path, change, expected):
    good = {"name": "a", "operator": "atm", "shape": "ade_vit_l", "mode": "forward", "changes": {}}
    path = tmp_path / "candidates.json"
    path.write_text(json.dumps([good | change]))
    if expected is None:
        assert tune.load(path)[0]["batch"] == 16
        return
    with pytest.raises(ValueError, match=f"candidates.json: candidate 'a'.*{expected}"):
        tune.load(path)


def test_a_candidate_replaces_and_takes_away():
    pytest.importorskip("triton")
    from segvit_kernels.triton._launch import pinned

    configs = pinned("sm_90")
    before = json.dumps(configs)
    changes = {"mask_loss_fwd": {"maxnreg": None, "programs": 3}, "atm_fwd half 32": {"block_n": 16}}
    with parameters.applied({"changes": changes}, configs):
        assert "maxnreg" not in configs["mask_loss_fwd"] and configs["mask_loss_fwd"]["programs"] == 3
        assert configs["atm_fwd"]["half"]["32"]["block_n"] == 16
    assert json.dumps(configs) == before


def test_what_a_failing_candidate_prints_is_kept_off_the_screen(capfd):
    """Triton prints all of a kernel's assembly where the assembler fails, from C++ and by children too."""

    def prepare(candidate):
        os.write(1, b"// Generated by LLVM NVPTX Back-End\n" * 1000)
        subprocess.run([sys.executable, "-c", "print('child')"])
        print("python", file=sys.stderr)
        if candidate["num_warps"] == 2:
            raise RuntimeError("ptxas fatal : C7602")
        return lambda: 1e-3

    told = []
    outcome = tune.choose([{"num_warps": n} for n in (4, 2)], prepare, rounds=2, tell=told.append)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
    assert outcome.rows[1]["status"] == "failed" and "C7602" in outcome.rows[1]["reason"]
    assert [row["status"] for row in told] == ["ok", "failed"], "rows come as they are found"
    with timing.captured() as said:
        os.write(2, b"heard")
        assert said() == "heard"
    print("heard again")
    assert capfd.readouterr().out == "heard again\n"


# ------------------------------------------------------------------------------ the sanitizer


def test_the_sanitizer_says_why_it_did_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    row = sanitizer.check("memcheck", [sys.executable, "-c", ""], 60)
    if row["reason"] != "compute-sanitizer is not installed":
        pytest.skip("compute-sanitizer is installed where CUDA is")
    assert row["status"] == "skipped"
    program = tmp_path / "compute-sanitizer"
    for script, status, reason in (
        ("echo no device; exit 1", "skipped", "does not work on this machine: no device"),
        (
            "echo '== ERROR SUMMARY: 2 errors'; case $* in *probe*) exit 0;; *) exit 86;; esac",
            "failed",
            "2 err",
        ),
        (
            f"case $* in *probe*) exit 0;; *) sleep 600 & echo $! > {tmp_path}/left; wait;; esac",
            "skipped",
            "not at its end",
        ),
        ("echo '== ERROR SUMMARY: 0 errors'", "ok", None),
        ("echo nothing", "failed", "no summary of the tool"),
    ):
        program.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sanitizer, "_PROBE", "probe")
        row = sanitizer.check("memcheck", ["true"], 2)
        assert row["status"] == status, row
        assert reason is None or reason in row["reason"], row
    assert ended(tmp_path / "left"), "the tool's program goes on"


# ------------------------------------------------------------------------------ kernels compiled ahead


@needs_stub
def test_a_cache_made_here_is_hit_from_another_checkout(tmp_path):
    """No kernel is compiled twice, whatever the paths of the checkout and of the cache."""
    pytest.importorskip("triton")
    archive = tmp_path / "sm_90.tar.gz"
    said = cache.precompile(archive, ["subsample_norm"], smoke=True)
    assert "3 kernels for sm_90, " in said and archive.stat().st_size < 2**20
    other = tmp_path / "elsewhere"
    for package in ("bench", "csrc", "segvit", "segvit_kernels"):
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    with cache.unpacked(archive) as line:
        assert line.endswith("3 kernels for sm_90")
        variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
            "PYTHONPATH": str(other)
        }
        command = [sys.executable, "-W", "ignore", "-m", "bench", "_fill", '[true, ["subsample_norm"]]']
        done = subprocess.run(command, cwd=other, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("launches") > 3 and found == {"from_cache": 3}, "as many hits, nothing compiled"


def test_an_archive_of_another_triton_says_so(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "cache" / name).mkdir(parents=True)
    (tmp_path / "cache" / "a" / "__grp__k.json").write_text(
        json.dumps({"child_paths": {n: f"/elsewhere/a/{n}" for n in ("k.json", "k.cubin", "k.ptx")}})
    )
    for kept in ("k.json", "k.cubin", "k.ptx"):
        (tmp_path / "cache" / "a" / kept).write_text("{}")
    archive = tmp_path / "x.tar.gz"
    cache.pack(tmp_path / "cache", archive, {"triton": "1.0", "python": "2.7", "compiled": 1})
    with cache.unpacked(archive) as line:
        assert "triton 1.0, here" in line and "compiled again" in line
        (group,) = Path(os.environ["TRITON_CACHE_DIR"]).glob("a/__grp__k.json")
        paths = json.loads(group.read_text())["child_paths"]
        assert set(paths) == {"k.json", "k.cubin"} and all(
            Path(p).parent == group.parent for p in paths.values()
        )
    assert "TRITON_CACHE_DIR" not in os.environ or not Path(os.environ["TRITON_CACHE_DIR"]).is_relative_to(
        group
    )


def test_what_computes_nothing_keeps_shapes_views_and_small_values():
    with cache.Idle():
        x = torch.randn(300, 40)
        y = x.mT @ x
        z = y.softmax(-1).to(torch.bfloat16)
        view = x[3:, ::2]
        x.add_(1)
        small = torch.arange(5).float() * 2
        kept = torch.empty(10, 1000).fill_(7.0)
        parts = x.split(100)
    assert y.shape == (40, 40) and z.dtype == torch.bfloat16 and not x.any() and not y.any()
    assert view.data_ptr() == x.data_ptr() + 3 * 40 * 4 and view.stride() == (40, 2)
    assert small.tolist() == [0, 2, 4, 6, 8] and not (kept == 7).all()
    assert [p.shape[0] for p in parts] == [100, 100, 100]
