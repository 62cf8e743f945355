"""The panoptic argmax: peers, checks, costs and targets. Inputs are random; in the shapes called "trained" an
eighth of the queries has an area to itself and the others are nowhere, as in a trained model."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
from segvit_kernels import PanopticArgmax, panoptic_argmax, panoptic_argmax_reference
from segvit_kernels.integrations import post_process_panoptic_segmentation
from segvit_kernels.testing.panoptic_argmax import PanopticCase, assert_panoptic

BATCHES = (16, 1, 4)


@dataclass(frozen=True)
class Case(PanopticCase):
    """A batch of images; ``planted`` masks are those of a trained model."""

    planted: bool = False


def _mask2former(name: str, size: tuple[int, int], planted: bool = False) -> Case:
    """100 queries at a quarter of 1024², σ at 384², as transformers takes them."""
    return Case(name, 1, 100, (256, 256), size, (384, 384), None, "sigmoid_first", 0.5, True, planted)


SHAPES = (
    _mask2former("mask2former", (1024, 1024)),
    _mask2former("mask2former trained", (1024, 1024), True),
    _mask2former("mask2former large trained", (2000, 3000), True),
    Case("eomt", 1, 200, (160, 160), (1024, 1024), (640, 640)),
    Case("segvit", 1, 150, (40, 40), (640, 640)),
)
TINY = Case("tiny", 1, 6, (4, 4), (24, 20))


def peers(backend: str) -> list[Peer]:
    def ours(x: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
        return tuple(panoptic_argmax(**x, backend=backend))

    def plain(**x: Any) -> tuple[Tensor, ...]:
        return tuple(panoptic_argmax_reference(**x)[0])

    found = importlib.util.find_spec("transformers")
    missing = None if found else "transformers is not installed"
    whole = "Mask2Former's panoptic post-processing, all queries kept"

    def processed(x: dict[str, Any]) -> tuple[Tensor, ...]:
        from transformers import Mask2FormerImageProcessor

        results = Mask2FormerImageProcessor().post_process_panoptic_segmentation(_outputs(x), **_options(x))
        return tuple(result["segmentation"] for result in results)

    def dropped_in(x: dict[str, Any]) -> tuple[Tensor, ...]:
        results = post_process_panoptic_segmentation(_outputs(x), **_options(x))
        return tuple(result["segmentation"] for result in results)

    what = "interpolated, sigmoid, products, maximum and counts at full size"
    return [
        *on_backends(backend, "panoptic_argmax", ours, ("forward",)),
        Peer("drop-in", f"{whole}, by segvit_kernels.integrations", dropped_in, modes=("forward",)),
        Peer("transformers", whole, processed, modes=("forward",), missing=missing),
        Peer("plain", what, lambda x: plain(**x), modes=("forward",)),
        *compilations(
            plain,
            f"torch.compile: {what}",
            call=lambda f, x: f(**x),
            modes=("forward",),
            dynamic=False,
        ),
    ]


class Mask2FormerForUniversalSegmentationOutput(NamedTuple):
    """Masks and classes under the names by which transformers' outputs are known."""

    masks_queries_logits: Tensor
    class_queries_logits: Tensor


def _outputs(x: dict[str, Any]) -> Mask2FormerForUniversalSegmentationOutput:
    """A model's output whose queries have these scores; of no class where the score is negative."""
    scores = x["scores"][..., None]
    none = (scores < 0).float()
    likely = scores.clamp(min=0.0)
    probabilities = torch.cat([likely * (1 - none), (1 - likely) * (1 - none), none], -1)
    return Mask2FormerForUniversalSegmentationOutput(x["mask_logits"], probabilities.log())


def _options(x: dict[str, Any]) -> dict[str, Any]:
    return {
        "threshold": 0.0,
        "label_ids_to_fuse": set(),
        "target_sizes": [x["size"]] * len(x["scores"]),
    }


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[dict, tuple]:
    return case.inputs(dtype, device, torch.randint(2**31, (1,)).item(), case.planted), ()


def costs(case: Case, itemsize: int, mode: str) -> list[Cost]:
    (h, w), masks = case.grid, case.batch * case.queries
    pixels = case.size[0] * case.size[1]
    cells = case.resized or case.grid
    sigmas = {"sigmoid": pixels, "sigmoid_first": cells[0] * cells[1], "none": 0}[case.activation]
    # Of every query: the operator may pass over those that it proves to change nothing.
    return [Cost(masks * (h * w + 1) * itemsize + case.batch * pixels * 3, 0, masks * sigmas)]


def check_cases(tiny: bool) -> list[tuple[str, Case]]:
    if tiny:
        twice = replace(TINY, name="tiny_twice", batch=2, resized=(9, 7), activation="sigmoid_first")
        trained = replace(TINY, name="tiny_trained", queries=40, planted=True, weighted=True)
        return [("values", TINY), ("values", twice), ("values", trained)]
    main, *others = SHAPES
    odd = Case("odd", 3, 21, (7, 5), (101, 37), activation="sigmoid_first")
    smaller = Case("smaller", 2, 19, (40, 40), (13, 17))
    checks = [("values", replace(main, batch=batch)) for batch in BATCHES]
    checks += [("values", odd), ("values", smaller), ("repeat", replace(main, batch=2))]
    return checks + [("values", replace(case, batch=batch)) for case in others for batch in BATCHES]


def draw(check: Check, device: torch.device) -> dict[str, Any]:
    return inputs(check.case, getattr(torch, check.dtype), device)[0]


def launch(check: Check, drawn: dict[str, Any], backend: str) -> dict[str, Tensor]:
    with timing.poisoned():
        return panoptic_argmax(**drawn, backend=backend)._asdict()


def judge(check: Check, drawn: dict[str, Any], results: dict[str, Tensor]) -> list[dict]:
    def hold(own: slice) -> int:
        found = PanopticArgmax(**{name: result[own] for name, result in results.items()})
        one = {**drawn, "mask_logits": drawn["mask_logits"][own], "scores": drawn["scores"][own]}
        return assert_panoptic("queries", found, one)

    return judged_by_image(check.case.batch, "queries", hold)


def _targets() -> tuple[Target, ...]:
    gpu, cpu = ("gpu", "mask2former", 16, "bfloat16"), ("cpu", "mask2former", 1, "float32")
    time, memory = ("timings", "forward"), ("memory", "forward")
    return (
        Target("against plain PyTorch", *gpu, *time, ("plain",), 15.0),
        Target("memory against plain PyTorch", *gpu, *memory, ("plain",), None, 0.05),
        Target("against the plain formula", *cpu, *time, ("plain",), 4.0),
        Target("memory against the plain formula", *cpu, *memory, ("plain",), None, 0.05),
    )


OPERATOR = Operator.of(
    globals(),
    name="panoptic_argmax",
    # Of 2000 × 3000 the oracle alone, float64 at full size, would take 20 GB.
    cpu_shapes=(("mask2former", 1), ("mask2former trained", 1)),
    modes=("forward",),
    targets=_targets(),
)
