"""The costs of matching every query with every target: peers, checks and costs. Timed are focal, BCE and dice
together, as Hungarian matching asks for them; there is no gradient."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import timing
from bench.subjects.operators.base import (
    Check,
    Cost,
    Operator,
    Peer,
    budget_row,
    by_image,
    compilations,
    on_backends,
    truth_and_ordinary,
)
from segvit_kernels import MatchingCost, mask_matching_cost, mask_matching_cost_at_points
from segvit_kernels.testing.mask_loss import MaskLossCase

BATCHES = (16, 1, 4)
SHAPES = (
    MaskLossCase("mask2former", 1, 100, ((160, 160),), (640, 640), "bool", 20),
    MaskLossCase("mask2former 1024", 1, 100, ((256, 256),), (1024, 1024), "bool", 50),
    MaskLossCase("ade_vit_l", 1, 150, ((40, 40),), (640, 640)),
    MaskLossCase("panoptic 1024", 1, 100, ((256, 256),), (1024, 1024), "segments", 50),
)
TINY = MaskLossCase("tiny", 1, 5, ((4, 4),), (24, 20), "bool", 3)
# Elements (query × pixel) of one map that a check holds.
MOST = 2**25
POINTS = 12544  # Mask2Former's


def _masks(targets: Tensor, num_classes: int | None) -> Tensor:
    """Targets (B, M, H, W), of labels too."""
    if targets.ndim == 3:
        return targets[:, None] == torch.arange(num_classes, device=targets.device)[:, None, None]
    return targets


def _costs(costs: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (torch.stack(tuple(costs)),)


def _arguments(drawn: dict[str, Any]) -> dict[str, Any]:
    """Of the operator: labels need the number of classes, masks have theirs."""
    found = {name: drawn[name] for name in ("mask_logits", "targets")}
    return found | ({"num_classes": drawn["num_classes"]} if "num_classes" in drawn else {})


def products(mask_logits: Tensor, targets: Tensor, num_classes: int | None = None) -> tuple[Tensor, ...]:
    """The costs as matchers compute them: maps at full size, and one product with the targets for each."""
    pixels = targets.shape[-2] * targets.shape[-1]
    t = _masks(targets, num_classes).flatten(2).to(mask_logits.dtype)
    x = F.interpolate(mask_logits, size=targets.shape[-2:], mode="bilinear", align_corners=False).flatten(2)
    p, inside, outside = x.sigmoid(), -F.logsigmoid(x), -F.logsigmoid(-x)
    positive, negative = 0.25 * (1 - p) ** 2 * inside, 0.75 * p**2 * outside
    focal = (positive @ t.mT + negative @ (1 - t).mT) / pixels
    bce = (inside @ t.mT + outside @ (1 - t).mT) / pixels
    dice = 1 - (2 * p @ t.mT + 1) / (p.sum(2)[..., None] + t.sum(2)[:, None] + 1)
    return focal, bce, dice


def peers(backend: str) -> list[Peer]:
    def ours(x: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
        return _costs(mask_matching_cost(**_arguments(x), backend=backend))

    def at_points(x: dict[str, Any]) -> tuple[Tensor, ...]:
        targets = _masks(x["targets"], x.get("num_classes"))
        found = mask_matching_cost_at_points(x["mask_logits"], targets, num_points=POINTS)
        return tuple(torch.stack(tuple(cost)) for cost in found)

    def matched(x: dict[str, Any]) -> tuple[Tensor, ...]:
        from transformers.models.mask2former.modeling_mask2former import Mask2FormerHungarianMatcher

        masks, targets = x["mask_logits"], list(_masks(x["targets"], x.get("num_classes")))
        classes = masks.new_zeros(*masks.shape[:2], 2)
        labels = [torch.zeros(len(target), dtype=torch.int64, device=masks.device) for target in targets]
        found = Mask2FormerHungarianMatcher(num_points=POINTS)(masks, classes, targets, labels)
        return tuple(index for pair in found for index in pair)

    what = "maps at full size, products with the targets"
    return [
        *on_backends(backend, "mask_matching_cost", ours, ("forward",)),
        Peer("points", f"mask_matching_cost_at_points, {POINTS} points", at_points, modes=("forward",)),
        Peer(
            "transformers",
            f"Mask2Former's matcher, {POINTS} points",
            matched,
            modes=("forward",),
            missing=None if importlib.util.find_spec("transformers") else "transformers is not installed",
        ),
        Peer("plain", what, lambda x: _costs(products(**_arguments(x))), modes=("forward",)),
        *compilations(
            products,
            f"torch.compile: {what}",
            call=lambda f, x: _costs(f(**_arguments(x))),
            modes=("forward",),
            dynamic=False,
        ),
    ]


def inputs(case: MaskLossCase, dtype: torch.dtype, device: torch.device) -> tuple[dict, tuple]:
    return case.inputs(dtype, device, seed=torch.randint(2**31, (1,)).item()), ()


def costs(case: MaskLossCase, itemsize: int, mode: str) -> list[Cost]:
    pixels, count = case.batch * case.size[0] * case.size[1], case.num_targets or case.queries
    ((h, w),) = case.grids
    read = case.batch * case.queries * h * w * itemsize + pixels * (8 if case.targets == "labels" else count)
    written = 3 * case.batch * case.queries * count * 4
    # Of every query and pixel an exponential and a logarithm; three products with the targets.
    return [Cost(read + written, 6 * pixels * case.queries * count, 2 * pixels * case.queries)]


def check_cases(tiny: bool) -> list[tuple[str, MaskLossCase]]:
    if tiny:
        labels = replace(TINY, name="tiny_labels", queries=4, targets="labels", num_targets=None)
        return [
            ("values", TINY),
            ("values", labels),
            ("values", replace(TINY, name="tiny_soft", targets="soft")),
        ]
    labels = MaskLossCase("labels", 3, 150, ((40, 40),), (160, 160))
    soft = MaskLossCase("odd_soft", 2, 109, ((7, 5),), (101, 37), "soft", 41)
    main, *others = SHAPES
    checks = [("values", replace(main, batch=2)), ("values", labels), ("values", soft)]
    odd = MaskLossCase("odd", 3, 19, ((9, 4),), (33, 47))
    few = MaskLossCase("odd_bool", 1, 1, ((5, 5),), (64, 64), "bool", 1)
    checks += [("values", odd), ("values", few), ("repeat", replace(main, batch=2))]
    return checks + [("values", replace(case, batch=b)) for case in (main, *others) for b in BATCHES]


def draw(check: Check, device: torch.device) -> dict[str, Any]:
    return inputs(check.case, getattr(torch, check.dtype), device)[0]


def launch(check: Check, drawn: dict[str, Any], backend: str) -> dict[str, Tensor]:
    with timing.poisoned():
        return mask_matching_cost(**_arguments(drawn), backend=backend)._asdict()


def judge(check: Check, drawn: dict[str, Any], results: dict[str, Tensor]) -> list[dict]:
    """Against the products in float64: the definition, every query with every target at every pixel, would
    take minutes an image. That they are the definition is a test of this package."""
    case, arguments = check.case, _arguments(drawn)
    some = max(1, MOST // (case.size[0] * case.size[1]))

    def expected(dtype: torch.dtype) -> dict[str, Tensor]:
        def one(cut: Any) -> dict[str, Tensor]:
            own = {**arguments, "targets": cut(arguments["targets"])}
            parts = cut(arguments["mask_logits"]).to(dtype).split(some, 1)
            found = zip(*(products(**{**own, "mask_logits": part}) for part in parts), strict=True)
            return {
                name: torch.cat(costs, 1) for name, costs in zip(MatchingCost._fields, found, strict=True)
            }

        return by_image(case.batch, one)

    truth, ordinary = truth_and_ordinary(expected, getattr(torch, check.dtype))
    return [budget_row(n, v, truth[n], ordinary[n].to(v.dtype)) for n, v in results.items()]


OPERATOR = Operator.of(
    globals(),
    name="mask_matching",
    cpu_shapes=(("ade_vit_l", 1), ("panoptic 1024", 1), ("mask2former 1024", 1)),
    modes=("forward",),
)
