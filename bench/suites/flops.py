"""``python -m bench flops``: multiply-accumulates and parameters of every published model and its decoders.

Two forms are counted. *eager* is the model as its paper counts it: every product in plain PyTorch, masks and
scores at full resolution (resized once more to the same size, as published models do), by fvcore alone.
*fused* is what runs here: fused operators, constants folded, the label map from one operator; by fvcore and
by torch's counter halved, with the operators' own formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from bench.measure import environment
from bench.subjects import models
from bench.subjects.counts import EagerForm, FusedForm, count_fvcore, count_torch, plain_operators
from bench.subjects.published import BY_FORMULA, DECODER_GFLOPS, DECODERS, MODELS, Model


def _zeros(model: Model) -> nn.Module:
    """The model with all weights 0: fvcore traces real tensors, and initial values would only take time."""
    with torch.device("meta"):
        built = model.build().requires_grad_(False)
    built.to_empty(device="cpu")
    for tensor in (*built.parameters(), *built.buffers()):
        tensor.zero_()
    return built


def run(*, names: Sequence[str] | None = None, progress: Callable[[str], None] = print) -> dict:
    """Rows of all models, and of the decoders on their backbones, as plain data."""
    rows, decoders = [], []
    for model in MODELS:
        if names and model.name not in names:
            continue
        built, images = _zeros(model), torch.zeros(1, 3, model.size, model.size)
        with plain_operators():
            eager, eager_modules = count_fvcore(EagerForm(built), images)
        form = FusedForm(built)
        fused, fused_modules = count_fvcore(form, images)
        by_torch = count_torch(form.to("meta"), images.to("meta"))
        row = {
            "model": model.name,
            "paper_gflops": model.paper,
            "parameters": sum(p.numel() for p in built.parameters()),
            "eager": {"by_operator": eager, "by_module": eager_modules, "fvcore": sum(eager.values())},
            "fused": {
                "by_operator": fused,
                "by_module": fused_modules,
                "fvcore": sum(fused.values()),
                "torch": by_torch,
            },
        }
        rows.append(row)
        progress(_line(row))
        if model.name in DECODERS:
            decoders += _decoders(model)
    return {
        "schema": 1,
        "kind": "flops",
        "environment": environment.describe(torch.device("cpu")),
        "models": rows,
        "decoders": decoders,
    }


def _decoders(model: Model) -> Iterator[dict]:
    for subject in models.on_one_backbone():
        count, parameters = models.macs(subject, model)
        row = {"model": model.name, "decoder": subject.name, "macs": count, "parameters": parameters}
        name = subject.name.removesuffix(BY_FORMULA)
        yield {**row, "paper_gflops": DECODER_GFLOPS.get((name, model.preset, model.size))}


def _line(row: dict) -> str:
    eager, fused = row["eager"]["fvcore"] / 1e9, row["fused"]["fvcore"] / 1e9
    return f"{row['model']}: eager {eager:.2f}, paper {row['paper_gflops']}, fused {fused:.2f} GMACs"
