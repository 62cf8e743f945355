"""``pytest bench/ --benchmark-only``: the operators and their peers at small shapes, results checked first.

For a quick look, and to compare two commits with pytest-benchmark's own tools; what is published comes from
``python -m bench``.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.measure import timing
from bench.subjects import operators

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKEND = operators.kernels_backend(DEVICE)
PEERS = ("fused", "eager", "plain", "sdpa")
SMALL = {
    "atm": {"queries": 19, "keys": 256, "heads": 4},
    "query_attention": {"queries": 256, "keys": 256, "heads": 4},
    "mask_loss": {"queries": 19, "grids": ((8, 8),) * 3, "size": (128, 128)},
    "semantic_argmax": {"queries": 19, "classes": 19, "grid": (16, 16), "size": (256, 256)},
    "semantic_topk": {"queries": 19, "classes": 19, "grid": (16, 16), "size": (64, 64)},
    "mask_binarize": {"count": 9, "grid": (16, 16), "size": (64, 64)},
    "mask_iou": {"masks": (9, 9), "grids": ((16, 16), (16, 16)), "size": (64, 64)},
    "panoptic_argmax": {"queries": 20, "grid": (16, 16), "resized": (24, 24), "size": (64, 64)},
    "subsample_norm": {"grid": (16, 16), "channels": 192},
}
RUNS = [
    (op.name, mode, peer.name)
    for op in operators.by_name().values()
    for mode in op.modes
    for peer in operators.select(op.peers(BACKEND), PEERS)
    if mode in peer.modes
]


@pytest.fixture(scope="module", autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def proved():
    """Small cases by operator, each after its check against float64."""
    cases = {}

    def case(name: str) -> object:
        if name not in cases:
            op = operators.by_name()[name]
            cases[name] = dataclasses.replace(op.shapes[0], name="small", batch=1, **SMALL[name])
            rows = operators.checked(op, operators.Check("values", cases[name], "float32"), DEVICE, BACKEND)
            assert [row for row in rows if row["status"] == "failed"] == []
        return cases[name]

    return case


@pytest.mark.parametrize(("operator", "mode", "peer"), RUNS)
def test_operator(benchmark, proved, operator, mode, peer):
    op = operators.by_name()[operator]
    inputs = op.inputs(proved(operator), torch.float32, DEVICE)
    run = operators.runner(next(p for p in op.peers(BACKEND) if p.name == peer), mode)

    def call() -> None:
        run(*inputs)
        timing.synchronize(DEVICE)

    benchmark.group = f"{operator}, {mode}"
    benchmark.pedantic(call, warmup_rounds=2, rounds=20)
