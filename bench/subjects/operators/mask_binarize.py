"""Binary masks of instances: peers, checks, costs and targets. Masks are blobs, as of a trained model; all of
them are instances to the post-processing that is measured beside them."""

from __future__ import annotations

import functools
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
from segvit_kernels import BinaryMasks, mask_binarize, mask_binarize_reference
from segvit_kernels.integrations import post_process_instance_segmentation
from segvit_kernels.testing.mask_binarize import BinarizeCase, assert_masks, oracle

BATCHES = (16, 1, 4)
_DETECTED = 200  # masks from which on they are RF-DETR's


@dataclass(frozen=True)
class Case(BinarizeCase):
    """A batch of images."""

    coherent: bool = True


SHAPES = (
    Case("mask2former", 1, 100, (256, 256), (1024, 1024)),
    Case("rf_detr", 1, 300, (108, 108), (1024, 1024)),
    Case("mask2former large", 1, 100, (256, 256), (2000, 3000)),
    Case("box head", 1, 100, (28, 28), (800, 1333), boxes=True),
)
TINY = Case("tiny", 1, 6, (4, 4), (24, 20))


def peers(backend: str) -> list[Peer]:
    def ours(x: dict[str, Any], backend: str, format: str) -> tuple[Tensor, ...]:
        return _tensors(mask_binarize(**x, format=format, backend=backend))

    def to(format: str) -> list[Peer]:
        call = functools.partial(ours, format=format)
        return on_backends(backend, f"mask_binarize to {format}", call, ("forward",))

    def plain(**x: Any) -> tuple[Tensor, ...]:
        return tuple(mask_binarize_reference(**x))

    missing = None if importlib.util.find_spec("transformers") else "transformers is not installed"
    whole = "instance post-processing of Mask2Former or RF-DETR, a map of all masks"

    def processed(x: dict[str, Any]) -> tuple[Tensor, ...]:
        import transformers

        kind = "RfDetr" if x["mask_logits"].shape[1] >= _DETECTED else "Mask2Former"
        processor = getattr(transformers, f"{kind}ImageProcessor")()
        return _maps(processor.post_process_instance_segmentation(_outputs(x), **_options(x)))

    def dropped_in(x: dict[str, Any]) -> tuple[Tensor, ...]:
        return _maps(post_process_instance_segmentation(_outputs(x), **_options(x)))

    what = "interpolated, compared and counted at full size"
    fused, *eager = to("bool")
    return [
        fused,
        *(replace(to(format)[0], name=format) for format in ("packed", "rle")),
        *eager,
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


def _tensors(found: BinaryMasks) -> tuple[Tensor, ...]:
    return tuple(part for part in found if isinstance(part, Tensor))


class Mask2FormerForUniversalSegmentationOutput(NamedTuple):
    """Masks and classes under the names by which transformers' outputs are known."""

    masks_queries_logits: Tensor
    class_queries_logits: Tensor


class RfDetrInstanceSegmentationOutput(NamedTuple):
    """As above."""

    pred_masks: Tensor
    logits: Tensor


def _outputs(x: dict[str, Any]) -> Any:
    """A model's output in which every query has one class, and scores of their own."""
    masks = x["mask_logits"]
    count = masks.shape[1]
    likely = 9 + torch.linspace(0, 1, count, dtype=masks.dtype, device=masks.device)
    likely = likely.expand(len(masks), -1)[..., None]
    if count >= _DETECTED:
        return RfDetrInstanceSegmentationOutput(masks, likely)
    classes = torch.cat([likely, torch.zeros_like(likely)], -1)
    return Mask2FormerForUniversalSegmentationOutput(masks, classes)


def _options(x: dict[str, Any]) -> dict[str, Any]:
    return {"threshold": 0.5, "target_sizes": [x["size"]] * len(x["mask_logits"])}


def _maps(results: list[dict[str, Any]]) -> tuple[Tensor, ...]:
    return tuple(result["segmentation"] for result in results)


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[dict, tuple]:
    return case.inputs(dtype, device, torch.randint(2**31, (1,)).item()), ()


def costs(case: Case, itemsize: int, mode: str) -> list[Cost]:
    (h, w), masks = case.grid, case.batch * case.count
    return [Cost(masks * (h * w * itemsize + case.size[0] * case.size[1] + 20), 0, 0)]


def check_cases(tiny: bool) -> list[tuple[str, Case]]:
    noise = Case("odd", 3, 5, (7, 5), (101, 37), coherent=False, threshold=0.3)
    boxes = Case("boxes", 2, 7, (14, 14), (60, 75), boxes=True)
    if tiny:
        return [("values", TINY), ("values", replace(noise, batch=1)), ("values", boxes)]
    main, *others = SHAPES
    smaller = Case("smaller", 2, 9, (40, 40), (13, 17))
    checks = [("values", replace(main, batch=batch)) for batch in BATCHES]
    checks += [("values", noise), ("values", boxes), ("values", smaller), ("repeat", replace(main, batch=2))]
    return checks + [("values", replace(case, batch=batch)) for case in others for batch in BATCHES]


def draw(check: Check, device: torch.device) -> dict[str, Any]:
    return inputs(check.case, getattr(torch, check.dtype), device)[0]


def launch(check: Check, drawn: dict[str, Any], backend: str) -> dict[str, Tensor]:
    with timing.poisoned():
        return mask_binarize(**drawn, backend=backend)._asdict()


def judge(check: Check, drawn: dict[str, Any], results: dict[str, Tensor]) -> list[dict]:
    def hold(own: slice) -> int:
        found = BinaryMasks(**{name: result[own] for name, result in results.items()})
        boxes = drawn["boxes"]
        part = {"mask_logits": drawn["mask_logits"][own], "boxes": None if boxes is None else boxes[own]}
        one = {**drawn, **part}
        return assert_masks("masks", found, oracle(one), oracle(one, torch.float32))

    return judged_by_image(check.case.batch, "masks", hold)


def _targets() -> tuple[Target, ...]:
    gpu, cpu = ("gpu", "mask2former", 16, "bfloat16"), ("cpu", "mask2former", 1, "float32")
    detr = ("cpu", "rf_detr", 1, "float32")
    time, memory = ("timings", "forward"), ("memory", "forward")
    return (
        Target("against plain PyTorch", *gpu, *time, ("plain",), 5.0),
        Target("against the plain formula", *cpu, *time, ("plain",), 4.0),
        Target("against the plain formula, 300 masks", *detr, *time, ("plain",), 4.0),
        Target("memory against the plain formula", *cpu, *memory, ("plain",), None, 0.25),
    )


OPERATOR = Operator.of(
    globals(),
    name="mask_binarize",
    cpu_shapes=(("mask2former", 1), ("rf_detr", 1), ("mask2former large", 1)),
    modes=("forward",),
    targets=_targets(),
)
