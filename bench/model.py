"""``python -m bench model``: whole models, uint8 image in, label map out, against the published formula.

Every way to run a model has the same weights; its label maps are compared with those of the published formula
in float32 before it is timed. Times come from one process, all ways in turn.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import environment, flops, timing

DTYPES = ("float32", "bfloat16")
TINY = flops.Model("tiny", "vit_tiny", 5, 64, 0.0)


@dataclasses.dataclass(frozen=True)
class Way:
    """One way from images (B, 3, H, W) in uint8 to label maps (B, H, W)."""

    name: str
    what: str
    prepare: Callable[[nn.Module], Callable[[Tensor], Tensor]]


def _published(sdpa: bool, compiled: bool = False) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    def prepare(model: nn.Module) -> Callable[[Tensor], Tensor]:
        form = flops.EagerForm(model)
        run = torch.compile(form) if compiled else form

        def call(images: Tensor) -> Tensor:
            attention = F.scaled_dot_product_attention
            with flops.plain_operators(), contextlib.ExitStack() as stack:
                if sdpa:
                    stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
                return run(model.preprocess(images))[0].argmax(1)

        return call

    return prepare


def _ours(backend: str | None) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
    def prepare(model: nn.Module) -> Callable[[Tensor], Tensor]:
        import segvit_kernels

        fused = copy.deepcopy(model).fuse()

        def call(images: Tensor) -> Tensor:
            with segvit_kernels.backend(backend) if backend else contextlib.nullcontext():
                return fused.labels(fused(fused.preprocess(images)), tuple(images.shape[-2:]))

        return call

    return prepare


def ways(compiled: bool) -> list[Way]:
    """All ways, the published formula first."""
    found = [
        Way("published", "the published formula, plain attention", _published(False)),
        Way("published, SDPA", "the same with torch's attention in the backbone", _published(True)),
        Way("eager", "this project, backend eager", _ours("eager")),
        Way("fused", "this project, the backend chosen by the device", _ours(None)),
    ]
    if compiled:
        found.insert(2, Way("published, compiled", "torch.compile of the second", _published(True, True)))
    return found


def _samples(call: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    def sample() -> float:
        timing.synchronize(device)
        start = time.perf_counter()
        call()
        timing.synchronize(device)
        return time.perf_counter() - start

    return sample


def _rows(
    spec: flops.Model, batch: int, dtype: str, device: torch.device, rounds: int, compiled: bool
) -> Iterator[dict]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = spec.build().requires_grad_(False).to(device)
    images = torch.randint(0, 256, (batch, 3, spec.size, spec.size), dtype=torch.uint8, device=device)
    with torch.inference_mode():
        truth = _published(False)(model)(images)
        model = model.to(getattr(torch, dtype))
        calls, agreement, failed = {}, {}, {}
        for way in ways(compiled):
            call = way.prepare(model)
            try:
                agreement[way.name] = (call(images) == truth).double().mean().item()
                call(images)
            except Exception as error:  # torch.compile needs a compiler; the others still count
                failed[way.name] = str(error).splitlines()[0][:300]
                continue
            calls[way.name] = call
        samplers = {n: _samples(lambda call=call: call(images), device) for n, call in calls.items()}
        times = timing.interleave(samplers, rounds=rounds, seconds_per_peer=60.0)
    key = {"model": spec.name, "batch": batch, "dtype": dtype}
    for name, values in times.items():
        row = {**key, "way": name, "status": "ok", "agreement": agreement[name], **timing.summary(values)}
        if device.type == "cuda":
            with torch.inference_mode():
                row["extra_bytes"] = timing.cuda_peak(lambda call=calls[name]: call(images), device)
        yield row
    for name, reason in failed.items():
        yield {**key, "way": name, "status": "failed", "reason": reason}


def run(
    *,
    names: Sequence[str] | None,
    batches: Sequence[int],
    dtypes: Sequence[str] = DTYPES,
    threads: int = 2,
    rounds: int = 7,
    compiled: bool = False,
    smoke: bool = False,
    progress: Callable[[str], None] = print,
) -> dict:
    """Rows of all models, as plain data."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    rows = []
    specs = (TINY,) if smoke else [m for m in flops.MODELS if not names or m.name in names]
    for spec in specs:
        for batch in batches:
            for dtype in dtypes:
                for row in _rows(spec, batch, dtype, device, rounds, compiled):
                    rows.append(row)
                    shown = f"{1e3 * row['median_s']:.1f} ms" if row["status"] == "ok" else row["reason"]
                    progress(f"{spec.name} batch {batch} {dtype} {row['way']}: {shown}")
    described = {**environment.describe(device), "threads": threads}
    return {"schema": 1, "kind": "model", "measurement": not smoke, "environment": described, "rows": rows}


def tables(result: dict) -> dict[str, str]:
    """Markdown: ``models``, one line for each way of running one."""
    from bench.report import markdown, seconds, size

    lines, first = [], {}
    for row in result["rows"]:
        if row["status"] != "ok":
            continue
        key = (row["model"], row["batch"], row["dtype"])
        first.setdefault(key, row["median_s"])
        lines.append(
            [
                f"{row['model']}, batch {row['batch']}, {row['dtype']}",
                row["way"],
                seconds(row["median_s"]),
                f"{row['batch'] / row['median_s']:.2f}",
                f"{first[key] / row['median_s']:.2f}×",
                f"{100 * row['agreement']:.2f} %",
                *([size(row["extra_bytes"])] if "extra_bytes" in row else []),
            ]
        )
    header = ["model", "way", "image to labels", "images/s", "against published", "labels as published, fp32"]
    header += ["memory"] * (len(lines[0]) - len(header) if lines else 0)
    return {"models": markdown(header, lines)}
