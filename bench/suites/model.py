"""``python -m bench model``: whole models, uint8 image in, label map out.

Six tables: the ways to run SegViT, all with the same weights; models of other libraries at the same size;
decoders on one backbone, with their training step; the ways of a training step of small crops; engines, and
files of ``segvit export``, on a CPU. Before
anything is timed its label maps (its loss and gradients) are compared with those of the published formula in
float32, and a row that disagrees is refused. Times come from one process, all subjects of a table in turn;
engines and files have a process each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import environment, peaks, timing
from bench.subjects import models
from bench.subjects.models import Subject
from bench.subjects.published import BY_FORMULA, CAMVID, MODELS, QUICK, TINY, Model
from bench.suites import engines, memory

DTYPES = ("float32", "bfloat16")
SECTIONS = ("ways", "libraries", "decoders", "steps", "engines", "exports")
USUAL, USUAL_QUICK = ("ways", "libraries", "decoders", "engines"), ("ways", "libraries", "decoders")
# Of the tables with a process for each row.
ENGINE_MODELS = {
    "engines": ("vit_b_ade20k_512", QUICK.name, "vit_l_ade20k_640_shrunk"),
    "exports": (QUICK.name,),
}
# What takes longest and says least beside the others.
NOT_QUICK = {
    ("libraries", "inference"): ("EoMT, fused labels", "Mask2Former, fused labels", "UPerNet", "DPT, smp"),
    ("decoders", "training"): ("SETR-PUP", "UPerNet", "DPT"),
}
# Images of a training step: the published recipe has 16 on eight GPUs.
TRAINING_BATCH = {"cuda": 2, "cpu": 1}
CROPS = 8  # of a step of the table `steps`

# Pixels whose label may differ from the reference's: this share, and in lower precision twice the share by
# which the reference itself differs there (labels of random weights have near-ties). Losses and the norm of
# the gradients may differ by this much.
LABELS_BOUND = 1e-3
LOSS_BOUNDS = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}


def _same(labels: Tensor, expected: Tensor) -> float:
    """The share of equal labels; raises where they are no label maps at all."""
    if labels.shape != expected.shape:
        raise ValueError(f"label maps are {tuple(labels.shape)}, expected {tuple(expected.shape)}")
    return (labels == expected).double().mean().item()


class Checks:
    """Results against those of the published formula, which are computed once for each model."""

    def __init__(self, spec: Model, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self._expected: dict[Any, Any] = {}

    def inference(self, subject: Subject, run: Callable[[], Tensor], images: Tensor, dtype: str) -> dict:
        """``agreement`` with the reference; ``status`` is ``invalid`` beyond the bound, with a ``reason``."""
        labels = run()
        if subject.reference is None:
            shape = (len(images), self.spec.size, self.spec.size)
            if (
                tuple(labels.shape) != shape
                or not 0 <= int(labels.min()) <= int(labels.max()) < self.spec.classes
            ):
                reason = (
                    f"label maps are {tuple(labels.shape)}, expected {shape} with {self.spec.classes} classes"
                )
                return {"status": "invalid", "reason": reason}
            return {"status": "ok"}
        expected = self._labels(subject, images, "float32")
        own = 0.0 if dtype == "float32" else 1 - _same(self._labels(subject, images, dtype), expected)
        agreement = _same(labels, expected)
        least = 1 - (2 * own + LABELS_BOUND)
        if agreement < least:
            reason = f"{100 * agreement:.2f} % of labels as published, expected at least {100 * least:.2f} %"
            return {"status": "invalid", "agreement": agreement, "reason": reason}
        return {"status": "ok", "agreement": agreement}

    def _labels(self, subject: Subject, images: Tensor, dtype: str) -> Tensor:
        key = (subject.build, subject.reference, dtype)
        if key not in self._expected:
            model = models.build(subject, self.spec, self.device).to(getattr(torch, dtype))
            with torch.inference_mode():
                self._expected[key] = subject.reference(model, images)
        return self._expected[key]

    def training(self, subject: Subject, run: Callable[[], tuple[Tensor, Tensor]], dtype: str) -> dict:
        """Loss and norm of the gradients against those of the published formula, which came before."""
        found = [value.item() for value in run()]
        row = {"status": "ok", "loss": found[0], "gradient_norm": found[1]}
        if subject.name.endswith(BY_FORMULA):
            self._expected[subject.build, "training"] = found
        if subject.reference is None:
            return row
        expected = self._expected.get((subject.build, "training"))
        if expected is None:
            return {**row, "status": "invalid", "reason": "no step by the published formula to compare with"}
        for name, value, own in zip(("loss", "gradient norm"), expected, found, strict=True):
            if not abs(own - value) <= LOSS_BOUNDS[dtype] * abs(value):
                reason = f"{name} {own:.6g}, expected {value:.6g} within {100 * LOSS_BOUNDS[dtype]:g} %"
                return {**row, "status": "invalid", "reason": reason}
        return row


def _sampler(run: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    def sample() -> float:
        timing.synchronize(device)
        start = time.perf_counter()
        run()
        timing.synchronize(device)
        return time.perf_counter() - start

    return sample


def measured(
    table: str,
    found: Sequence[Subject],
    spec: Model,
    mode: str,
    batch: int,
    dtype: str,
    device: torch.device,
    *,
    rounds: int,
    deadline: float,
    left_out: Sequence[str] = (),
    counts: dict[str, tuple[float, int]] | None = None,
    early: bool = False,
) -> Iterator[dict]:
    """A row for each subject: checked, timed in turn, then its peak memory.

    With ``counts``, which is filled, operations and parameters too. With ``early`` a row of one sample comes
    as soon as its subject is ready, and the final one later.
    """
    torch._dynamo.reset()
    images, targets = models.inputs(spec, batch, device)
    checks, kind = Checks(spec, device), getattr(torch, dtype)
    rows: dict[str, dict] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for subject in found:
        row = rows[subject.name] = {"table": table, "model": spec.name, "batch": batch, "dtype": dtype}
        row |= {"mode": mode, "way": subject.name, "what": subject.what}
        reason = "not in the quick selection" if subject.name in left_out else subject.missing()
        if reason or time.time() > deadline:
            row |= {"status": "skipped", "reason": reason or "time budget"}
            continue
        try:
            if counts is not None:
                if subject.name not in counts:
                    counts[subject.name] = models.macs(subject, spec, device)
                row["macs"], row["parameters"] = counts[subject.name]
            model = models.build(subject, spec, device)
            if mode == "inference":
                run = models.inference(subject, model, images, kind)
                row |= checks.inference(subject, run, images, dtype)
            else:
                run = models.training(subject, model, images, targets, kind)
                row |= checks.training(subject, run, dtype)
            if row["status"] == "ok":
                for _ in range(3 if device.type == "cuda" else 0):  # a CUDA graph is captured at the second
                    run()
                if early:
                    yield row | timing.summary([_sampler(run, device)()])
                calls[subject.name] = run
        except Exception as error:  # torch.compile needs a compiler, memory may end; the others still count
            row |= {"status": "failed", "reason": timing.one_line(error)}
    samplers = {name: _sampler(run, device) for name, run in calls.items()}
    times = timing.interleave(samplers, rounds=rounds, seconds_per_peer=60.0)
    for name, samples in times.items():
        rows[name] |= timing.summary(samples)
    if device.type == "cuda":
        for name, run in calls.items():
            if not name.startswith("engine"):  # a captured graph keeps its buffers, so that a call takes none
                rows[name]["extra_bytes"] = peaks.cuda_peak(run, device)
    elif calls and time.time() < deadline:
        names = [name for name in calls if "compile" not in name]  # a process would compile again
        calls.clear()
        for peak in memory.rows(table, names, spec, mode, batch, dtype, device):
            if peak["status"] == "ok":
                rows[peak["name"]]["extra_bytes"] = peak["extra_bytes"]
    yield from rows.values()


def once(subject: Subject, spec: Model, mode: str, batch: int, dtype: str, device: torch.device) -> None:
    """One call of what :func:`measured` times, unchecked."""
    images, targets = models.inputs(spec, batch, device)
    built, kind = models.build(subject, spec, device), getattr(torch, dtype)
    if mode == "inference":
        models.inference(subject, built, images, kind)()
    else:
        models.training(subject, built, images, targets, kind)()


def _shown(row: dict) -> str:
    """A row in a line, for who watches."""
    shown = f"{1e3 * row['median_s']:.1f} ms" if row["status"] == "ok" else row["status"]
    shown += f" ({row['reason']})" if "reason" in row else ""
    return f"{row['model']} batch {row['batch']} {row['dtype']} {row['mode']} {row['way']}: {shown}"


def run(
    *,
    names: Sequence[str] | None = None,
    batches: Sequence[int] = (1,),
    dtypes: Sequence[str] = DTYPES,
    threads: int = 2,
    rounds: int = 7,
    compiled: bool = False,
    sections: Sequence[str] = USUAL_QUICK,
    quick: bool = False,
    smoke: bool = False,
    budget_s: float = float("inf"),
    graphs: Path | None = None,
    busy: bool = False,
    pools: bool = False,
    progress: Callable[[str], None] = print,
) -> dict:
    """Rows of all tables, as plain data.

    The ways to run SegViT are measured for all models named, batches and dtypes (and the published formula
    always in float32 too), libraries and decoders at the size of the first model, in the first of the dtypes.
    ``quick`` is a ViT-S at 512×512. What has not begun ``budget_s`` seconds after the start is skipped.
    """
    begun = time.time()
    deadline = begun + budget_s
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    wanted = [model for model in (*MODELS, QUICK) if model.name in names] if names else MODELS
    specs = (TINY,) if smoke else (QUICK,) if quick else wanted
    rows: list[dict] = []

    def measure(section: str, found: Sequence[Subject], spec: Model, counts: dict, **where: Any) -> None:
        limits = {"deadline": deadline, "counts": counts}
        # A step takes several times as long as an inference.
        limits["rounds"] = rounds if where["mode"] == "inference" else max(1, rounds // 2)
        limits["left_out"] = NOT_QUICK.get((section, where["mode"]), ()) if quick else ()
        for row in measured(section, found, spec, device=device, **where, **limits):
            rows.append(row)
            progress(_shown(row))

    for spec in specs if "ways" in sections else ():
        counts: dict[str, tuple[float, int]] = {}
        for batch in batches:
            for dtype in dict.fromkeys(("float32", *dtypes)):
                found = models.ways(device, compiled) if dtype in dtypes else [models.PUBLISHED]
                measure("ways", found, spec, counts, mode="inference", batch=batch, dtype=dtype)
    if "decoders" in sections:
        counts, found = {}, models.on_one_backbone()
        measure("decoders", found, specs[0], counts, mode="inference", batch=batches[0], dtype=dtypes[0])
        batch = TRAINING_BATCH[device.type]
        measure("decoders", found, specs[0], counts, mode="training", batch=batch, dtype=dtypes[0])
    for dtype in dtypes if "steps" in sections else ():
        spec = TINY if smoke else CAMVID
        measure("steps", models.steps(compiled), spec, {}, mode="training", batch=CROPS, dtype=dtype)
    if "libraries" in sections:
        found = models.libraries(compiled)
        measure("libraries", found, specs[0], {}, mode="inference", batch=batches[0], dtype=dtypes[0])
    for table, usual in ENGINE_MODELS.items():
        found = (TINY,) if smoke else [m for m in (*MODELS, QUICK) if m.name in (names or usual)]
        for spec in found if table in sections and device.type == "cpu" else ():
            limits = {"threads": threads, "rounds": rounds, "deadline": deadline, "graphs": graphs}
            limits |= {"compiled": compiled, "busy": busy, "pools": pools}
            for row in engines.rows(spec, table=table, dtypes=(*dtypes, "int8"), **limits):
                rows.append(row)
                progress(_shown(row))
    described = {**environment.describe(device), "threads": threads}
    if set(ENGINE_MODELS) & set(sections):
        described |= {name: environment.version(name) for name in ("onnxruntime", "openvino", "nncf")}
    result = {"schema": 1, "kind": "model", "measurement": not smoke, "environment": described}
    return result | {"rows": rows, "elapsed_s": round(time.time() - begun, 1)}


# ---------------------------------------------------------------------------------------------- command line
