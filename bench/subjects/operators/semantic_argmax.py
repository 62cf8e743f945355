"""The semantic argmax: peers, checks, costs and targets. Inputs are random; in the shapes called "trained" an
eighth of the queries has nearly all class mass, as in a trained model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
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
    Target,
    compilations,
    judged_by_image,
    on_backends,
)
from segvit_kernels import View, Views, semantic_argmax, semantic_argmax_reference
from segvit_kernels.testing.semantic_argmax import SemanticCase, assert_labels, oracle

BATCHES = (16, 1, 4)


@dataclass(frozen=True)
class Case:
    """A batch of images with ``grid`` patches each; with ``crop``, by sliding windows at several scales."""

    name: str
    batch: int
    queries: int
    classes: int
    grid: tuple[int, int]
    size: tuple[int, int]
    concentrated: bool = False
    scales: tuple[float, ...] = ()

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        """Arguments of ``semantic_argmax``."""
        views = [view for image in range(self.batch) for view in self._views(image)]
        stacks = ((len(views) or self.batch, *self.grid),)
        case = SemanticCase(
            self.name, stacks, self.queries, self.classes, self.size, tuple(views), self.batch
        )
        return case.inputs(dtype, device, torch.randint(2**31, (1,)).item(), self.concentrated)

    def _views(self, image: int) -> list[View]:
        """Windows as large as the image, at half overlap, and mirrored ones, of the image at every scale."""
        found = []
        for group, scale in enumerate(self.scales):
            resized = tuple(round(side * scale) for side in self.size)
            starts = [
                sorted({0, (r - s) // 2, r - s}) if r > s else [0]
                for r, s in zip(resized, self.size, strict=True)
            ]
            crop = tuple(max(1, min(r, s)) for r, s in zip(resized, self.size, strict=True))
            for top in starts[0]:
                for left in starts[1]:
                    for flip in (False, True):
                        view = View.crop(image, self.size, resized, top, left, crop, self.grid, flip, group)
                        affine = torch.tensor(view.affine, dtype=torch.float32).tolist()
                        found.append(dataclasses.replace(view, affine=tuple(affine)))
        return found

    @property
    def pixels(self) -> int:
        """Output pixels times the views that cover them."""
        if not self.scales:
            return self.batch * self.size[0] * self.size[1]
        areas = [
            (v.rectangle[2] - v.rectangle[0]) * (v.rectangle[3] - v.rectangle[1]) for v in self._views(0)
        ]
        return self.batch * sum(areas)


SHAPES = (
    Case("ade_vit_l", 1, 150, 150, (40, 40), (640, 640)),
    Case("ade_vit_b", 1, 150, 150, (32, 32), (512, 512)),
    Case("ade_vit_l trained", 1, 150, 150, (40, 40), (640, 640), concentrated=True),
    Case("ade_vit_b trained", 1, 150, 150, (32, 32), (512, 512), concentrated=True),
    Case("ade_vit_l windows", 1, 150, 150, (40, 40), (640, 640), scales=(1.0, 1.5)),
    Case("coco_vit_l", 1, 171, 171, (32, 32), (512, 512)),
    Case("pc_vit_l", 1, 60, 60, (30, 30), (480, 480)),
    Case("cityscapes_like", 1, 19, 19, (64, 128), (1024, 2048)),
    Case("mask2former", 1, 100, 150, (160, 160), (640, 640)),
)
TINY = Case("tiny", 1, 6, 5, (4, 4), (24, 20))


def plain(mask_logits: Tensor, class_probs: Tensor, size: tuple[int, int], views: Any) -> tuple[Tensor, ...]:
    """Masks upsampled, sigmoid, mixed and compared at full size; views accumulated there."""
    if views is not None:
        return (semantic_argmax_reference(mask_logits, class_probs, size, views=views)[0],)
    masks = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False).sigmoid()
    return (torch.einsum("bqc,bqhw->bchw", class_probs, masks).argmax(1),)


def peers(backend: str) -> list[Peer]:
    def ours(x: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
        return (semantic_argmax(**x, backend=backend),)

    what = "upsampled, sigmoid, einsum, argmax at full size"
    return [
        *on_backends(backend, "semantic_argmax", ours, ("forward",)),
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
    return case.inputs(dtype, device), ()


def costs(case: Case, itemsize: int, mode: str) -> list[Cost]:
    count = max(1, len(case._views(0))) * case.batch
    h, w = case.grid
    read = count * case.queries * (h * w + case.classes) * itemsize
    labels = case.batch * case.size[0] * case.size[1] * (1 if case.classes <= 256 else 2)
    # Of every token: the operator may skip some where it can prove that they change nothing.
    return [Cost(read + labels, 2 * case.pixels * case.queries * case.classes, case.pixels * case.queries)]


def check_cases(tiny: bool) -> list[tuple[str, Case]]:
    if tiny:
        views = replace(TINY, name="tiny_views", scales=(1.0, 1.5), batch=2)
        trained = replace(TINY, name="tiny_trained", queries=40, classes=40, concentrated=True)
        return [("values", TINY), ("values", views), ("values", trained), ("scores", TINY), ("graph", TINY)]
    main, *others = SHAPES
    checks = [("values", replace(main, batch=batch)) for batch in BATCHES]
    checks += [("scores", replace(main, batch=2)), ("repeat", replace(main, batch=2))]
    checks += [("graph", replace(main, batch=2)), ("values", Case("odd", 3, 21, 300, (7, 5), (101, 37)))]
    checks.append(("values", Case("smaller", 2, 19, 19, (40, 40), (13, 17))))
    return checks + [("values", replace(case, batch=batch)) for case in others for batch in BATCHES]


def draw(check: Check, device: torch.device) -> dict[str, Any]:
    return check.case.inputs(getattr(torch, check.dtype), device)


def launch(check: Check, drawn: dict[str, Any], backend: str) -> dict[str, Tensor]:
    if check.kind == "graph":
        return {"labels": _replayed(drawn, backend)}
    with timing.poisoned():
        found = semantic_argmax(**drawn, return_scores=check.kind == "scores", backend=backend)
    return (
        dict(zip(("labels", "scores"), found, strict=True)) if check.kind == "scores" else {"labels": found}
    )


def _image(case: Case, drawn: dict[str, Any], index: int) -> dict[str, Any]:
    """The arguments of one image alone; its views follow each other."""
    views = tuple(case._views(0))
    count = max(1, len(views))
    own = slice(index * count, (index + 1) * count)
    cut = {name: drawn[name][own] for name in ("mask_logits", "class_probs")}
    device = drawn["mask_logits"].device
    return {**drawn, **cut, "views": Views(views, 1, case.size, device) if views else None}


def judge(check: Check, drawn: dict[str, Any], results: dict[str, Tensor]) -> list[dict]:
    case, dtype, errors, allowed = check.case, getattr(torch, check.dtype), [], []

    def hold(image: slice) -> int:
        one = _image(case, drawn, image.start)
        truth, ordinary = oracle(one), oracle(one, dtype)
        if "scores" in results:
            errors.append((results["scores"][image].double() - truth.amax(1)).abs().max().item())
            allowed.append(2 * (ordinary.double() - truth).abs().max().item())
        return assert_labels("labels", results["labels"][image], truth, ordinary)

    rows = judged_by_image(case.batch, "labels", hold)
    if "scores" in results:
        error = torch.tensor(errors, dtype=torch.float64).max().item()  # NaN, if any is
        budget = max(allowed) + 2 * torch.finfo(dtype).eps
        reason = None if error <= budget else f"error {error:.3g}, budget {budget:.3g}"
        rows.append({"quantity": "scores", "passed": reason is None, "reason": reason, "max_error": error})
    return rows


def _replayed(drawn: dict, backend: str) -> Tensor:
    """Captured on other inputs, replayed on these."""
    static = {**drawn, **{n: torch.rand_like(drawn[n]) for n in ("mask_logits", "class_probs")}}
    kept: dict[str, Tensor] = {}

    def work() -> None:
        kept["labels"] = semantic_argmax(**static, backend=backend)

    graph = timing.capture(work)
    for name in ("mask_logits", "class_probs"):
        static[name].copy_(drawn[name])
    graph.replay()
    return kept["labels"]


def _targets() -> tuple[Target, ...]:
    gpu, cpu = ("gpu", "ade_vit_l", 16, "bfloat16"), ("cpu", "ade_vit_b", 1, "float32")
    time, memory = ("timings", "forward"), ("memory", "forward")
    return (
        Target("against plain PyTorch", *gpu, *time, ("plain",), 15.0),
        Target("against torch.compile", *gpu, *time, ("compiled",), 8.0),
        Target("memory against plain PyTorch", *gpu, *memory, ("plain",), None, 0.01),
        Target("against the plain formula", *cpu, *time, ("plain",), 5.0),
        Target("against torch.compile", *cpu, *time, ("compiled",), 3.0),
        Target("memory against the plain formula", *cpu, *memory, ("plain",), None, 0.02),
    )


OPERATOR = Operator.of(
    globals(),
    name="semantic_argmax",
    cpu_shapes=tuple((case.name, 1) for case in SHAPES if case.name.startswith(("ade_vit_b", "city"))),
    modes=("forward",),
    targets=_targets(),
)
