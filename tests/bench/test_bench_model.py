"""Whole models, decoders and their memory as benchmarks: what is counted, checked, refused and reported."""

import dataclasses
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.__main__ import main
from bench.measure import pools
from bench.report.tables import memory as memory_tables
from bench.report.tables import model as model_tables
from bench.subjects import decoders, models, peers
from bench.subjects.published import BY_FORMULA, DECODER_GFLOPS, MODELS, TINY
from bench.suites import memory, model
from segvit import SegViTConfig
from segvit_kernels import modules

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
WIDTH, DEPTH, HEADS = 192, 12, 3
GRID = TINY.size // 16
TOKENS, CLASSES, PIXELS = GRID**2, TINY.classes, TINY.size**2


@pytest.fixture
def no_processes(monkeypatch):
    """Peak memory without a process for each table: a byte for every letter of the name."""

    def rows(table, names, *_):
        return [{"name": name, "status": "ok", "extra_bytes": len(name)} for name in names]

    monkeypatch.setattr(memory, "rows", rows)


@pytest.fixture
def only_segvit(monkeypatch):
    found = models.on_one_backbone()[:4]
    monkeypatch.setattr(models, "on_one_backbone", lambda: found)


@pytest.fixture
def without_engines(monkeypatch):
    """They have tests of their own."""
    ways = models.ways
    monkeypatch.setattr(models, "ways", lambda *given: [s for s in ways(*given) if "engine" not in s.name])


def run(**options) -> dict:
    defaults = {"dtypes": ("float32",), "threads": 1, "rounds": 1, "smoke": True}
    return model.run(**{**defaults, "progress": lambda line: None, **options})


def by_name(result: dict, **wanted) -> dict[str, dict]:
    return {r["way"]: r for r in result["rows"] if all(r[k] == v for k, v in wanted.items())}


# ------------------------------------------------------------------------------ operations counted


def convolution(inputs: int, outputs: int, kernel: int, cells: float) -> float:
    return inputs * outputs * kernel**2 * cells


def layer_norm(tokens: float, width: int = WIDTH) -> float:
    return 5 * tokens * width


def upsampling(channels: int, cells: float) -> float:
    return 4 * channels * cells


def block(tokens: int) -> float:
    return 12 * WIDTH**2 * tokens + 2 * tokens**2 * WIDTH + 2 * layer_norm(tokens)


N, C, K = TOKENS, WIDTH, CLASSES
HEAD_MACS = {
    "linear": layer_norm(N) + N * C * K + upsampling(K, PIXELS),
    "SETR-naive": layer_norm(N) + N * 256 * (C + K) + upsampling(K, PIXELS),
    "SETR-PUP": layer_norm(N)
    + sum(convolution(256 if i else C, 256, 3, N * 4**i) + upsampling(256, 4 * N * 4**i) for i in range(4))
    + 256 * K * PIXELS,
    "SETR-MLA": 4 * layer_norm(N)
    + 4 * (256 * C * N + 9 * N * (256 * 256 + 256 * 128 + 128 * 128) + upsampling(128, 16 * N))
    + 512 * K * 16 * N
    + upsampling(K, PIXELS),
    "Segmenter": layer_norm(N)
    + C * C * N
    + 2 * block(N + K)
    + layer_norm(N + K)
    + C * C * (N + K)
    + N * K * C
    + layer_norm(N, K)
    + upsampling(K, PIXELS),
    "UPerNet": 4 * C * C * N * (1 + 4 + 1)  # transposed: every input cell to four outputs
    + sum(512 * C * s**2 + upsampling(512, N / 4) for s in (1, 2, 3, 6))
    + convolution(C + 4 * 512, 512, 3, N / 4)
    + sum(512 * C * n + upsampling(512, n) + convolution(512, 512, 3, n) for n in (N, 4 * N, 16 * N))
    + 4 * upsampling(512, 16 * N)
    + convolution(4 * 512, 512, 3, 16 * N)
    + 512 * K * 16 * N
    + upsampling(K, PIXELS),
    "DPT": sum(C * size * N for size in (24, 48, 96, 192))
    + 24 * 24 * 16 * N
    + 48 * 48 * 4 * N
    + convolution(192, 192, 3, N / 4)
    + sum(convolution(s, 256, 3, n) for s, n in ((24, 16 * N), (48, 4 * N), (96, N), (192, N / 4)))
    # Two convolutions in a residual unit; units of the skip at all but the coarsest level.
    + sum(convolution(256, 256, 3, 2 * n) for n in (N / 4, N, N, 4 * N, 4 * N, 16 * N, 16 * N))
    + sum(upsampling(256, 4 * n) + 256 * 256 * 4 * n for n in (N / 4, N, 4 * N, 16 * N))
    + sum(upsampling(256, n) for n in (N, 4 * N, 16 * N))
    + convolution(256, 256, 3, 64 * N)
    + 256 * K * 64 * N
    + upsampling(K, PIXELS),
}


@pytest.mark.parametrize("name", decoders.NAMES)
def test_macs_of_the_heads(name):
    (subject,) = (s for s in models.on_one_backbone() if s.name == name)
    counted, parameters = models.macs(subject, TINY)
    backbone = 3 * 16**2 * WIDTH * TOKENS + DEPTH * block(TOKENS)
    # Fusing at one size resizes nothing there; those upsamplings still run and still count.
    assert counted - backbone == pytest.approx(HEAD_MACS[name], rel=1e-9)
    built = models.build(subject, TINY, CPU)
    assert parameters == sum(p.numel() for p in built.parameters())


def test_counts_are_those_that_papers_print():
    """SegViT's tables; DPT there has a readout token, which this backbone does not run."""
    spec = next(m for m in MODELS if m.name == "vit_b_ade20k_512")
    found = {s.name: s for s in models.on_one_backbone()}
    for name, tolerance in (
        ("SegViT" + BY_FORMULA, 1e-3),
        ("Shrunk SegViT" + BY_FORMULA, 1e-3),
        ("SETR-naive", 2e-3),
        ("SETR-MLA", 1e-3),
        ("Segmenter", 2e-3),
        ("DPT", 3e-2),
    ):
        printed = DECODER_GFLOPS[name.removesuffix(BY_FORMULA), "vit_base", 512]
        assert models.macs(found[name], spec)[0] / 1e9 == pytest.approx(float(printed), rel=tolerance), name


@pytest.mark.parametrize("name", decoders.NAMES)
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_scores_and_gradients_of_the_heads(name, size):
    config = SegViTConfig.preset("vit_tiny", 7, width=48, depth=4, heads=3, taps=(3,), image_size=size)
    torch.manual_seed(0)
    built = decoders.build(name, config)
    scores = built(torch.randn(2, 3, *size))
    times = {"SETR-MLA": 4, "SETR-PUP": 16, "UPerNet": 4, "DPT": 8}.get(name, 1)
    if name != "DPT" or size == (64, 64):
        assert scores.shape == (2, 7, size[0] // 16 * times, size[1] // 16 * times)
    assert scores.shape[:2] == (2, 7) and scores.isfinite().all()
    F.cross_entropy(scores, torch.zeros(2, *scores.shape[2:], dtype=torch.long)).backward()
    # Everything that was built is used; the linear head's backbone has one tap too.
    unused = [n for n, p in built.named_parameters() if p.grad is None]
    assert not unused


# ------------------------------------------------------------------------------ what is measured


def test_label_maps_have_something_in_them():
    """With initial weights one class wins everywhere, and no two label maps would differ."""
    for build in (models.segvit, models.shrunk):
        subject = dataclasses.replace(models.PUBLISHED, build=build)
        built = models.build(subject, TINY, CPU)
        with torch.inference_mode():
            labels = models.published_labels(built, models.inputs(TINY, 1, CPU)[0])
        assert labels.flatten().bincount().sort().values[-2] > 0.05 * labels.numel()


def test_every_way(no_processes, without_engines):
    result = run(dtypes=("bfloat16",), sections=("ways",))
    assert not result["measurement"] and model_tables.sound(result)
    ways = by_name(result, table="ways", dtype="bfloat16")
    assert {"published", "published, SDPA", "eager", "fused"} <= set(ways)
    for row in result["rows"]:
        assert_measured(row)
    # The published formula in float32 is what speeds are relative to, asked for or not.
    (base,) = (r for r in result["rows"] if r["dtype"] == "float32")
    assert base["way"] == "published" and base["agreement"] == 1.0
    ratio = f"{base['median_s'] / ways['fused']['median_s']:.2f}×"
    lines = model_tables.tables(result)["models"].splitlines()
    assert any("| fused |" in line and ratio in line for line in lines)


def test_every_decoder(no_processes):
    """In float32: processors without bfloat16 take many times as long for convolutions in it."""
    result = run(sections=("decoders",))
    assert model_tables.sound(result)
    for row in result["rows"]:
        assert_measured(row)
    trained = by_name(result, table="decoders", mode="training")
    assert set(trained) == {s.name for s in models.on_one_backbone()}
    assert trained["SegViT"]["loss"] == pytest.approx(trained["SegViT" + BY_FORMULA]["loss"], rel=2e-2)
    lines = model_tables.tables(result)["decoders"].splitlines()
    (segmenter,) = (line for line in lines if "Segmenter" in line)
    assert f"{by_name(result, mode='inference')['Segmenter']['macs'] / 1e9:.1f}" in segmenter


def test_ways_of_a_training_step(monkeypatch, no_processes):
    """torch.compile of the loss, where it is asked for, is the same loss."""
    found = models.steps(compiled=True)
    assert [s.compiled for s in found] == [None, None, "default", None]
    assert [s.name for s in models.steps(compiled=False)] == [s.name for s in found if not s.compiled]
    monkeypatch.setattr(model, "CROPS", 2)
    compiles = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, mode: compiles(call, backend="eager"))
    result = run(sections=("steps",), compiled=True)
    assert model_tables.sound(result)
    losses = {way: row["loss"] for way, row in by_name(result, table="steps").items()}
    first = losses["SegViT" + BY_FORMULA]
    assert len(losses) == 4 and all(value == pytest.approx(first, rel=1e-3) for value in losses.values())
    lines = model_tables.tables(result)["steps"].splitlines()
    assert "| 1.00× |" in lines[2] and f"{first:.4f}" in lines[2]


def assert_measured(row):
    assert row["status"] == "ok", row
    assert row["median_s"] > 0 and row["macs"] > 0 and row["parameters"] > 0
    assert row["extra_bytes"] == len(row["way"])


def test_models_of_libraries(monkeypatch, no_processes):
    """All but Mask2Former, whose least backbone takes its time."""
    found = [s for s in models.libraries() if "Mask2Former" not in s.name]
    monkeypatch.setattr(models, "libraries", lambda compiled: found)
    result = run(sections=("libraries",))
    assert [r["way"] for r in result["rows"]] == [s.name for s in found] and model_tables.sound(result)
    for row in result["rows"]:
        if row["status"] == "skipped":
            assert row["reason"].partition(":")[0] in ("transformers", "segmentation_models_pytorch")
            continue
        assert row["status"] == "ok" and row["macs"] > 0, row
        # Label maps of segvit_kernels.integrations against the library's own.
        assert row.get("agreement", 1.0) > 0.999


def test_the_quick_selection_says_what_it_leaves_out(monkeypatch, no_processes):
    monkeypatch.setattr(model, "QUICK", TINY)
    named = ("SETR-naive", *model.NOT_QUICK["decoders", "training"])
    found = [subject for subject in models.on_one_backbone() if subject.name in named]
    monkeypatch.setattr(models, "on_one_backbone", lambda: found)
    quick = run(sections=("decoders",), quick=True, smoke=False)
    left_out = {r["way"] for r in quick["rows"] if r.get("reason") == "not in the quick selection"}
    assert left_out == set(model.NOT_QUICK["decoders", "training"])
    assert all(r["status"] == "ok" for r in quick["rows"] if r["mode"] == "inference")


def test_decoders_of_published_sizes_stand_beside_the_papers_counts():
    row = {"table": "decoders", "model": "vit_b_ade20k_512", "batch": 1, "dtype": "float32", "status": "ok"}
    row |= {"mode": "inference", "macs": 129.46e9, "parameters": 1, "median_s": 0.5, "way": "Segmenter"}
    (line,) = (x for x in model_tables.tables({"rows": [row]})["decoders"].splitlines() if "Segmenter" in x)
    assert line.startswith("| Segmenter | 129.5 | 129.6 |") and "| 500 ms | 2.00 |" in line


# ------------------------------------------------------------------------------ what is refused


def test_a_wrong_kernel_is_refused(monkeypatch, no_processes, without_engines, only_segvit):
    """Masks that forget the earlier stages: the reference is computed without the kernel and stays right."""
    right = modules.fused_atm

    def forgetful(*args, previous_masks=None, **options):
        return right(*args, **options)

    monkeypatch.setattr(modules, "fused_atm", forgetful)
    result = run(sections=("ways", "decoders"))
    rows = by_name(result, table="ways")
    assert rows["published"]["status"] == rows["published, SDPA"]["status"] == "ok"
    for name in ("eager", "fused"):
        assert rows[name]["status"] == "invalid" and "median_s" not in rows[name]
        assert "labels as published" in rows[name]["reason"]
    step = by_name(result, table="decoders", mode="training")
    assert step["SegViT"]["status"] == "invalid" and step["Shrunk SegViT"]["status"] == "ok"
    assert not model_tables.sound(result)
    (line,) = (x for x in model_tables.tables(result)["models"].splitlines() if "| fused |" in x)
    assert "invalid" in line and " ms" not in line


def test_a_wrong_gradient_is_refused(monkeypatch, no_processes, only_segvit):
    """The right loss with the masks' gradient missing."""
    right = modules.fused_atm

    def detached(*args, **options):
        output = right(*args, **options)
        return (
            output if output.mask_logits is None else output._replace(mask_logits=output.mask_logits.detach())
        )

    monkeypatch.setattr(modules, "fused_atm", detached)
    step = by_name(run(sections=("decoders",)), mode="training")["SegViT"]
    assert step["status"] == "invalid" and step["reason"].startswith("gradient norm")


def test_a_step_without_its_reference_is_refused(monkeypatch, no_processes):
    def failing(*_):
        raise torch.OutOfMemoryError("no room")

    found = models.on_one_backbone()[:2]
    found[0] = dataclasses.replace(found[0], loss=failing)
    monkeypatch.setattr(models, "on_one_backbone", lambda: found)
    result = run(sections=("decoders",))
    step = by_name(result, mode="training")
    assert step["SegViT" + BY_FORMULA]["status"] == "failed"
    assert step["SegViT"]["status"] == "invalid" and "to compare with" in step["SegViT"]["reason"]
    (line,) = (x for x in model_tables.tables(result)["decoders"].splitlines() if x.startswith("| SegViT |"))
    assert "invalid" in line


@pytest.mark.parametrize("wrong", ["shape", "classes"])
def test_labels_that_are_none_are_refused(monkeypatch, no_processes, wrong):
    def labels(built, images):
        size = images.shape[-1] // (2 if wrong == "shape" else 1)
        return torch.full((len(images), size, size), CLASSES if wrong == "classes" else 0)

    subject = next(s for s in models.on_one_backbone() if s.name == "linear")
    monkeypatch.setattr(models, "on_one_backbone", lambda: [dataclasses.replace(subject, labels=labels)])
    monkeypatch.setattr(models, "macs", lambda *_: (1.0, 1))
    row = by_name(run(sections=("decoders",)), mode="inference")["linear"]
    assert row["status"] == "invalid" and "expected (1, 64, 64)" in row["reason"]


def test_low_precision_may_differ_twice_as_much_as_the_reference(monkeypatch):
    """The bound moves with the reference's own error in that dtype, and no further."""
    images = models.inputs(TINY, 1, CPU)[0]
    maps = {"float32": torch.zeros(1, 64, 64), "bfloat16": torch.zeros(1, 64, 64)}
    maps["bfloat16"].view(-1)[:40] = 1
    checks = model.Checks(TINY, CPU)
    monkeypatch.setattr(checks, "_labels", lambda subject, images, dtype: maps[dtype])
    for differing, dtype, status in (
        (4, "float32", "ok"),
        (5, "float32", "invalid"),
        (84, "bfloat16", "ok"),
        (85, "bfloat16", "invalid"),
    ):
        labels = torch.zeros(1, 64, 64)
        labels.view(-1)[-differing:] = 1
        row = checks.inference(models.FUSED, lambda labels=labels: labels, images, dtype)
        assert row["status"] == status, (differing, dtype)
        assert row["agreement"] == pytest.approx(1 - differing / 4096)


# ------------------------------------------------------------------------------ what is skipped


def test_missing_libraries_are_skipped_with_the_reason(monkeypatch, no_processes):
    real = peers.importlib.import_module

    def without(name, *args):
        if name in ("transformers", "segmentation_models_pytorch"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args)

    monkeypatch.setattr(peers.importlib, "import_module", without)
    result = run(sections=("libraries",))
    assert {r["status"] for r in result["rows"]} == {"skipped"} and model_tables.sound(result)
    reasons = {r["way"]: r["reason"] for r in result["rows"]}
    assert reasons["EoMT"] == "transformers: No module named 'transformers'"
    assert "segmentation_models_pytorch" in reasons["DPT, smp"]
    assert "skipped: transformers: No module named" in model_tables.tables(result)["models"]


def test_nothing_begins_after_the_budget(no_processes, only_segvit):
    result = run(sections=("ways", "decoders"), budget_s=-1)
    assert {(r["status"], r["reason"]) for r in result["rows"]} == {("skipped", "time budget")}


def test_a_peer_that_fails_does_not_stop_the_others(monkeypatch, no_processes):
    def broken(spec):
        raise RuntimeError("out of\nmemory")

    linear = next(s for s in models.on_one_backbone() if s.name == "linear")
    found = [dataclasses.replace(linear, name="broken", build=broken), linear]
    monkeypatch.setattr(models, "on_one_backbone", lambda: found)
    result = run(sections=("decoders",))
    rows = by_name(result, mode="inference")
    assert rows["broken"]["status"] == "failed" and rows["linear"]["status"] == "ok"
    assert rows["broken"]["reason"] == "RuntimeError: out of memory" and model_tables.sound(result)


# ------------------------------------------------------------------------------ memory


def test_peaks_of_a_tiny_model():
    """In processes of their own; at a size where the label maps' scores are what counts."""
    wide = dataclasses.replace(TINY, size=256, classes=40)
    rows = list(memory.rows("forms", ("published", "fused"), wide, "inference", 1, "float32", CPU))
    assert [r["name"] for r in rows] == ["published", "fused"]
    if any(r["status"] == "skipped" for r in rows):
        pytest.skip(rows[0]["reason"])
    scores = 40 * 256 * 256 * 4
    assert rows[0]["extra_bytes"] > 2 * scores > 2 * rows[1]["extra_bytes"] > 0


def test_a_dead_process_fails_what_it_had_left(monkeypatch):
    out = '{"name": "published", "status": "ok", "extra_bytes": 5}\n'
    done = subprocess.CompletedProcess([], 137, stdout=out, stderr="first\nKilled\n")
    monkeypatch.setattr(memory.peaks, "memory_process", lambda *_: done)
    rows = list(memory.rows("forms", ("published", "fused"), TINY, "training", 1, "float32", CPU))
    assert rows[0]["extra_bytes"] == 5
    assert rows[1] == {"name": "fused", "status": "failed", "reason": "exit code 137: Killed"}
    assert not memory_tables.sound({"rows": rows})


def test_memory_table():
    key = {"model": "m", "batch": 2, "dtype": "float32", "status": "ok"}
    rows = [
        {**key, "mode": "inference", "name": "published", "extra_bytes": 400e6},
        {**key, "mode": "inference", "name": "fused", "extra_bytes": 100e6},
        {**key, "mode": "training", "name": "published", "status": "failed", "reason": "out of memory"},
        {**key, "mode": "training", "name": "fused", "extra_bytes": 3e9},
    ]
    line = memory_tables.tables({"rows": rows})["models"].splitlines()[-1]
    assert line == "| m, batch 2, float32 | 400.0 MB | 100.0 MB | 25 % | failed | 3.00 GB | – |"


# ------------------------------------------------------------------------------ command line


@pytest.mark.parametrize("command", ["model", "memory"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--models", "vit_x"], "--models vit_x: no such model; expected some of vit_b_ade20k_512"),
        (["--threads", "0"], "--threads: 0; expected a whole number, at least 1"),
        (["--batch", "0"], "--batch: 0; expected a whole number, at least 1"),
    ],
)
def test_bad_options_are_named(command, arguments, expected, capsys):
    assert main([command, *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_pools_need_what_they_are_made_by(monkeypatch, capsys):
    monkeypatch.setattr(pools, "PACKAGES", ("no_such_package",))
    assert main(["model", "--pools"]) == 2
    assert "--pools: not installed: no_such_package" in capsys.readouterr().err


def test_kept_results_still_give_their_table():
    import json

    for path in (ROOT / "bench" / "results").glob("model-*.json"):
        found = model_tables.tables(json.loads(path.read_text()))
        processes = found.get("engines", "") + found.get("exports", "")
        assert "| fused |" in found.get("models", "") or "| SegViT engine |" in processes


def test_options_reach_the_tables_with_processes(monkeypatch, tmp_path):
    def rows(spec, **options):
        taken.append((spec.name, options["table"], options["graphs"], options["busy"], options["dtypes"]))
        return ()

    taken = []
    monkeypatch.setattr(model.engines, "rows", rows)
    run(sections=("engines", "exports"), graphs=tmp_path, busy=True)
    dtypes = ("float32", "int8")
    assert taken == [(TINY.name, table, tmp_path, True, dtypes) for table in ("engines", "exports")]
