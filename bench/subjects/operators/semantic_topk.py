"""The best classes of every pixel and their probabilities: peers, checks, costs and targets.

Inputs are those of the semantic argmax.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import timing
from bench.subjects.operators import semantic_argmax as labels
from bench.subjects.operators.base import Check, Cost, Operator, Peer, Target, compilations, judged_by_image
from segvit_kernels import semantic_argmax
from segvit_kernels.testing.semantic_argmax import assert_best_classes, oracle

BATCHES = (16, 1, 4)


@dataclass(frozen=True)
class Case(labels.Case):
    """Of a case of the semantic argmax the ``k`` best classes."""

    k: int = 5

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        return super().inputs(dtype, device) | {"return_probabilities": self.k}


SHAPES = (
    Case("ade_vit_l", 1, 150, 150, (40, 40), (640, 640)),
    Case("ade_vit_b", 1, 150, 150, (32, 32), (512, 512)),
    Case("ade_vit_l windows", 1, 150, 150, (40, 40), (640, 640), scales=(1.0, 1.5)),
    Case("cityscapes_like", 1, 19, 19, (64, 128), (1024, 2048), k=3),
)
TINY = Case("tiny", 1, 6, 5, (4, 4), (24, 20), k=3)


def plain(
    mask_logits: Tensor, class_probs: Tensor, size: tuple[int, int], views: Any, return_probabilities: int
) -> tuple[Tensor, ...]:
    """Every score at full size, as shares, and the largest of them."""
    if views is not None:
        scores = labels.semantic_argmax_reference(mask_logits, class_probs, size, views=views)[1]
    else:
        masks = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False).sigmoid()
        scores = torch.einsum("bqc,bqhw->bchw", class_probs, masks)
    shares, classes = (scores / scores.sum(1, keepdim=True)).topk(return_probabilities, dim=1)
    return classes, shares


def peers(backend: str) -> list[Peer]:
    def ours(name: str) -> Peer:
        what = f"semantic_argmax with return_probabilities, backend {name}"
        return Peer(name, what, lambda x: semantic_argmax(**x, backend=name), modes=("forward",))

    what = "upsampled, sigmoid, einsum, shares and topk at full size"
    return [
        replace(ours(backend), name="fused"),
        *([ours("eager")] if backend != "eager" else []),
        Peer("plain", what, lambda x: plain(**x), modes=("forward",)),
        *compilations(
            plain, f"torch.compile: {what}", call=lambda f, x: f(**x), modes=("forward",), dynamic=False
        ),
    ]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[dict, tuple]:
    return case.inputs(dtype, device), ()


def costs(case: Case, itemsize: int, mode: str) -> list[Cost]:
    (found,) = labels.costs(case, itemsize, mode)
    pixels = case.batch * case.size[0] * case.size[1]
    label = 1 if case.classes <= 256 else 2
    return [found._replace(bytes=found.bytes + pixels * ((case.k - 1) * label + 4 * case.k))]


def check_cases(tiny: bool) -> list[tuple[str, Case]]:
    if tiny:
        views = replace(TINY, name="tiny_views", scales=(1.0, 1.5), batch=2)
        return [("values", TINY), ("values", views)]
    main, *others = SHAPES
    checks = [("values", replace(main, batch=batch)) for batch in BATCHES]
    checks += [("repeat", replace(main, batch=2))]
    checks.append(("values", Case("odd", 3, 21, 300, (7, 5), (101, 37), k=8)))
    return checks + [("values", replace(case, batch=batch)) for case in others for batch in BATCHES]


def draw(check: Check, device: torch.device) -> dict[str, Any]:
    return check.case.inputs(getattr(torch, check.dtype), device)


def launch(check: Check, drawn: dict[str, Any], backend: str) -> dict[str, Tensor]:
    with timing.poisoned():
        found = semantic_argmax(**drawn, backend=backend)
    return dict(zip(("classes", "probabilities"), found, strict=True))


def judge(check: Check, drawn: dict[str, Any], results: dict[str, Tensor]) -> list[dict]:
    dtype = getattr(torch, check.dtype)
    given = {name: value for name, value in drawn.items() if name != "return_probabilities"}

    def hold(image: slice) -> int:
        one = labels._image(check.case, given, image.start)
        truth, ordinary = oracle(one), oracle(one, dtype)
        found = (results["classes"][image], results["probabilities"][image].to(dtype))
        return assert_best_classes("classes", found, truth, ordinary)

    return judged_by_image(check.case.batch, "classes", hold)


def _targets() -> tuple[Target, ...]:
    cpu = ("cpu", "ade_vit_b", 1, "float32")
    return (
        Target("against the plain formula", *cpu, "timings", "forward", ("plain",), 4.0),
        Target("memory against the plain formula", *cpu, "memory", "forward", ("plain",), None, 0.05),
    )


OPERATOR = Operator.of(
    globals(),
    name="semantic_topk",
    cpu_shapes=(("ade_vit_b", 1), ("cityscapes_like", 1)),
    modes=("forward",),
    targets=_targets(),
)
