"""The mask IoU: peers, checks, costs and targets. Half of the random masks are empty in most places."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.measure import timing
from bench.subjects.operators.base import (
    Check,
    Cost,
    Operator,
    Peer,
    Target,
    compilations,
    judged_by_image,
    on_backends,
)
from segvit_kernels import MaskIoU, mask_iou, mask_iou_reference
from segvit_kernels.testing.mask_iou import IoUCase, assert_iou

BATCHES = (16, 1, 4)


@dataclass(frozen=True)
class Case(IoUCase):
    """Masks of one set against those of another; ``soft`` or not."""

    soft: bool = False


SHAPES = (
    Case("instances", 1, (100, 100), ((256, 256), (256, 256)), (1024, 1024)),
    Case("instances soft", 1, (100, 100), ((256, 256), (256, 256)), (1024, 1024), soft=True),
    Case("matching", 1, (100, 50), ((256, 256), (1024, 1024)), (1024, 1024), True),
    Case("low resolution", 1, (300, 300), ((160, 160), (160, 160))),
)
TINY = Case("tiny", 1, (6, 5), ((4, 4), (6, 5)), (24, 20))


def peers(backend: str) -> list[Peer]:
    def ours(x: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
        return tuple(mask_iou(**x, backend=backend))

    def plain(**x: Any) -> tuple[Tensor, ...]:
        return tuple(mask_iou_reference(**x))

    what = "masks at full size, product of all pairs"
    return [
        *on_backends(backend, "mask_iou", ours, ("forward",)),
        Peer("plain", what, lambda x: plain(**x), modes=("forward",)),
        *compilations(
            plain,
            f"torch.compile: {what}",
            call=lambda f, x: f(**x),
            modes=("forward",),
            dynamic=False,
        ),
    ]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[dict, tuple]:
    return case.inputs(dtype, device, torch.randint(2**31, (1,)).item(), case.soft), ()


def costs(case: Case, itemsize: int, mode: str) -> list[Cost]:
    pixels = case.batch * (case.size or case.grids[0])[0] * (case.size or case.grids[0])[1]
    first, second = (n * h * w for n, (h, w) in zip(case.masks, case.grids, strict=True))
    read = case.batch * (first * itemsize + second * (1 if case.boolean else itemsize))
    written = 4 * case.batch * (case.masks[0] * case.masks[1] + sum(case.masks))
    sigmas = (case.masks[0] + (0 if case.boolean else case.masks[1])) if case.soft else 0
    return [Cost(read + written, 2 * pixels * case.masks[0] * case.masks[1], pixels * sigmas)]


def check_cases(tiny: bool) -> list[tuple[str, Case]]:
    if tiny:
        return [("values", TINY), ("values", dataclasses.replace(TINY, name="tiny_soft", batch=2, soft=True))]
    odd = Case("odd", 3, (21, 5), ((7, 5), (101, 37)), (101, 37), True)
    smaller = Case("smaller", 2, (9, 4), ((40, 40), (30, 20)), (13, 17), soft=True)
    main, *others = SHAPES
    checks = [("values", replace(main, batch=batch)) for batch in BATCHES]
    empty = replace(smaller, name="odd_empty", masks=(0, 4))
    checks += [("values", odd), ("values", smaller), ("values", empty), ("repeat", replace(main, batch=2))]
    return checks + [("values", replace(case, batch=batch)) for case in others for batch in BATCHES]


def draw(check: Check, device: torch.device) -> dict[str, Any]:
    return inputs(check.case, getattr(torch, check.dtype), device)[0]


def launch(check: Check, drawn: dict[str, Any], backend: str) -> dict[str, Tensor]:
    with timing.poisoned():
        return mask_iou(**drawn, backend=backend)._asdict()


def judge(check: Check, drawn: dict[str, Any], results: dict[str, Tensor]) -> list[dict]:
    def hold(own: slice) -> None:
        found = MaskIoU(**{name: result[own] for name, result in results.items()})
        assert_iou("sums", found, {**drawn, "a": drawn["a"][own], "b": drawn["b"][own]}, torch.float32)

    return judged_by_image(check.case.batch, "sums", hold)


def _targets() -> tuple[Target, ...]:
    shape = ("cpu", "instances", 1, "float32")
    return (
        Target("against the plain formula", *shape, "timings", "forward", ("plain",), 4.0),
        Target("memory against the plain formula", *shape, "memory", "forward", ("plain",), None, 0.05),
    )


OPERATOR = Operator.of(
    globals(),
    name="mask_iou",
    cpu_shapes=(("instances", 1), ("instances soft", 1)),
    modes=("forward",),
    targets=_targets(),
)
