"""``python -m bench decoders``: every decoder of this package on ViT-S and ViT-B, by patch size.

From a picture of 512 x 512 bytes to its label map, by the engine on a CPU, all decoders of a backbone and
patch size in turns; memory in a process for each. Weights are random, but EoMT's masks are off, as after a
whole training. Pictures are padded to multiples of the patch. The multiply-accumulates are of the whole call.

Then EoMT beside transformers' own, of the same weights (:mod:`bench.subjects.eomt`), where that is installed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import environment, peaks, timing
from bench.subjects.counts import count_torch
from bench.subjects.eomt import OURS, PATCH, THEIRS, Pair

DECODERS = ("linear", "atm", "segvitv2", "eomt")
PRESETS = ("vit_small", "vit_base")
PATCHES = (14, 16, 28, 32)
SIDE, CLASSES = 512, 150


@dataclasses.dataclass(frozen=True)
class Row:
    """One model and the picture that it gets."""

    preset: str
    decoder: str
    patch: int
    side: int = SIDE
    classes: int = CLASSES
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def build(self) -> nn.Module:
        """With random weights on the default device, the same at every call, in evaluation mode."""
        from segvit import SegViT, SegViTConfig

        torch.manual_seed(0)
        side = -(-self.side // self.patch) * self.patch
        fields = {"patch_size": self.patch, "decoder": self.decoder, "image_size": side, **self.fields}
        model = SegViT(SegViTConfig.preset(self.preset, self.classes, **fields)).requires_grad_(False)
        model.anneal(1.0)
        return model.eval()

    def call(self, dtype: str) -> Callable[[], Tensor]:
        """One picture to its label map."""
        engine = self.build().compile_for_inference(self.side, dtype=getattr(torch, dtype))
        images = torch.randint(0, 256, (1, 3, self.side, self.side), dtype=torch.uint8)
        return lambda: engine(images)

    def counts(self) -> tuple[float, int]:
        """Multiply-accumulates, and parameters."""
        with torch.device("meta"):
            model = self.build()
            images = torch.zeros(1, 3, self.side, self.side, dtype=torch.uint8)

            def run(images: Tensor) -> Tensor:
                padded = model.pad_to_patches(model.preprocess(images))
                return model.labels(model(padded), (self.side, self.side))

            return count_torch(run, images), sum(p.numel() for p in model.parameters())


def measure_memory(row: dict[str, Any], dtype: str) -> int | None:
    """Peak of a call beyond the model; runs in a process of its own."""
    call = Row(**row).call(dtype)
    with torch.inference_mode():
        return peaks.resident_peak(call)


def measure_pair(preset: str, side: int, classes: int, whose: str) -> int | None:
    """Peak of a call beyond the models of :class:`bench.subjects.eomt.Pair`; runs in a process of its own."""
    call = Pair.build(preset, side, classes).call(whose)
    with torch.inference_mode():
        return peaks.resident_peak(call)


def beside_transformers(
    preset: str, side: int, classes: int, rounds: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """EoMT of transformers and of this package, same weights: agreement, and time and memory of a picture."""
    pair = Pair.build(preset, side, classes)
    row: dict[str, Any] = {"preset": preset, "patch": PATCH, "side": side, **pair.agreement()}
    times = _in_turns({whose: pair.call(whose) for whose in (THEIRS, OURS)}, rounds)
    row["peers"] = {
        whose: {
            **timing.summary(found),
            "extra_bytes": peaks.isolated(
                "bench.suites.decoders", "measure_pair", preset, side, classes, whose
            ),
        }
        for whose, found in times.items()
    }
    ours, theirs = (row["peers"][whose]["median_s"] for whose in (OURS, THEIRS))
    progress(f"EoMT, {preset}/{PATCH}: {1e3 * ours:.1f} ms, transformers {1e3 * theirs:.1f} ms")
    return row


def run(
    *,
    presets: Sequence[str] = PRESETS,
    patches: Sequence[int] = PATCHES,
    dtype: str = "float32",
    threads: int = 2,
    rounds: int = 9,
    smoke: bool = False,
    progress: Callable[[str], None] = print,
) -> dict:
    """One row a backbone, patch size and decoder, as plain data."""
    torch.set_num_threads(threads)
    shape = {"side": 64, "classes": 5} if smoke else {}
    rows: list[dict] = []
    presets = ("vit_tiny",) if smoke else presets
    for preset in presets:
        for patch in patches:
            some = {decoder: Row(preset, decoder, patch, **shape) for decoder in DECODERS}
            rows += cost(some, dtype, rounds, progress)
    beside: list[dict] = []
    if importlib.util.find_spec("transformers"):
        size = (shape["side"], shape["classes"]) if smoke else (SIDE, CLASSES)
        beside = [beside_transformers(preset, *size, rounds, progress) for preset in presets]
    described = {**environment.describe(torch.device("cpu")), "threads": threads}
    return {
        "schema": 1,
        "kind": "decoders",
        "measurement": not smoke,
        "environment": described | {"transformers": environment.version("transformers")},
        "rows": rows,
        "beside": beside,
    }


def cost(rows: Mapping[str, Row], dtype: str, rounds: int, progress: Callable[[str], None]) -> list[dict]:
    """Time, in turns, operations, parameters and memory of models by any name, as plain data."""
    times = _in_turns({name: row.call(dtype) for name, row in rows.items()}, rounds)
    found = []
    for name, row in rows.items():
        macs, parameters = row.counts()
        extra = peaks.isolated("bench.suites.decoders", "measure_memory", dataclasses.asdict(row), dtype)
        values = {"macs": macs, "parameters": parameters, "extra_bytes": extra, "dtype": dtype}
        found.append({**dataclasses.asdict(row), **values, **timing.summary(times[name])})
        shown = f"{1e3 * found[-1]['median_s']:.1f} ms, {macs / 1e9:.1f} GMACs"
        progress(f"{row.preset}/{row.patch} {name}: {shown}")
    return found


def _in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, after one that is not counted."""
    samplers = {name: functools.partial(_sample, call) for name, call in calls.items()}
    for sampler in samplers.values():
        sampler()
    return timing.interleave(samplers, rounds=rounds, seconds_per_peer=60.0)


def _sample(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        call()
    return time.perf_counter() - start
