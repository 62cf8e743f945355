"""Cases and oracle of the mask loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from segvit_kernels.ops.mask_loss import MaskLoss, mask_loss_reference

LOSSES = {"focal": 0.0, "bce": 0.0, "dice": 1.0}
"""The losses, and the size of the terms that cancel in each: dice is 1 less a ratio."""


@dataclasses.dataclass(frozen=True)
class MaskLossCase:
    """Sizes and options of one call of ``mask_loss``.

    ``targets`` is "labels", "bool", "soft" or "segments" (masks; the last are bool and share no pixel), or a
    constant label that every pixel has. With ``matched`` the queries have random targets, some of them none.
    """

    name: str
    batch: int
    queries: int
    grids: tuple[tuple[int, int], ...]
    size: tuple[int, int]
    targets: str | int = "labels"
    num_targets: int | None = None
    matched: bool = False
    weighted: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Fresh random arguments of ``mask_loss``: ``mask_logits`` is a list if there are several grids."""
        generator = torch.Generator().manual_seed(seed)
        count = self.num_targets or self.queries
        logits = [
            (3 * torch.randn(self.batch, self.queries, *grid, generator=generator)).to(device, dtype)
            for grid in self.grids
        ]
        inputs = {"mask_logits": logits if len(logits) > 1 else logits[0], **self.options}
        if self.targets in ("bool", "soft"):
            # Blobs with partial pixels at their edges, some of them outside [0, 1] before the clamp.
            rough = torch.randn(self.batch, count, 3, 3, generator=generator)
            masks = (2 * torch.nn.functional.interpolate(rough, self.size, mode="bilinear")).clamp(0, 1)
            inputs["targets"] = (masks > 0.5 if self.targets == "bool" else masks.to(dtype)).to(device)
        elif self.targets == "segments":
            # Each pixel is of the nearest of random places: masks that share no pixel, as those of a picture.
            places = torch.rand(self.batch, count, 2, generator=generator)
            rows, columns = (((torch.arange(n) + 0.5) / n)[:, None] for n in self.size)
            down, across = (rows - places[:, None, :, 0]) ** 2, (columns - places[:, None, :, 1]) ** 2
            nearest = torch.stack([(row[:, None] + across).argmin(2) for row in down.unbind(1)], 1)
            inputs["targets"] = (nearest[:, None] == torch.arange(count)[:, None, None]).to(device)
        else:
            # Large regions, so that many classes are absent; 255 where nothing is labelled.
            cells = torch.randint(-1, count, (self.batch, 1, 3, 4), generator=generator)
            if isinstance(self.targets, int):
                cells.fill_(self.targets)
            labels = torch.nn.functional.interpolate(cells.float(), self.size)[:, 0].long()
            ignored = self.options.get("ignore_index", 255)
            inputs["targets"] = torch.where(labels < 0, ignored, labels).to(device)
            inputs["num_classes"] = count
        if self.matched:
            matches = torch.randint(-1, count, (self.batch, self.queries), generator=generator)
            inputs["matches"] = matches.to(device)
        if self.weighted:
            weights = torch.rand(self.batch, self.queries, generator=generator)
            inputs["pair_weights"] = weights.to(device, torch.promote_types(dtype, torch.float32))
        return inputs


CASES = (
    MaskLossCase("one_pixel", 4, 2, ((1, 1),), (1, 1)),
    MaskLossCase("odd", 2, 19, ((7, 5),), (100, 37)),
    MaskLossCase("stacked", 2, 11, ((4, 4), (8, 6), (8, 6)), (40, 56), weighted=True),
    MaskLossCase("down_scaling", 2, 5, ((32, 64),), (10, 23)),
    MaskLossCase("down_scaling_32_times", 1, 2, ((64, 64), (33, 1)), (2, 3)),
    MaskLossCase("same_size", 1, 5, ((12, 17),), (12, 17)),
    MaskLossCase("mask_ignored", 3, 19, ((6, 6), (3, 4)), (33, 47), options={"mask_ignored": True}),
    MaskLossCase("single_class", 1, 1, ((5, 5),), (32, 32), targets=0),
    MaskLossCase(
        "all_ignored", 2, 4, ((5, 5),), (16, 20), targets=255, weighted=True, options={"mask_ignored": True}
    ),
    MaskLossCase("matched_labels", 2, 20, ((6, 6),), (30, 30), num_targets=7, matched=True),
    MaskLossCase("many_classes", 1, 300, ((2, 3),), (9, 13), options={"ignore_index": 301}),
    MaskLossCase("bool_masks", 2, 6, ((7, 5),), (50, 37), targets="bool"),
    MaskLossCase("soft_masks", 2, 9, ((8, 8), (4, 4)), (31, 30), "soft", 4, matched=True, weighted=True),
    MaskLossCase("gamma_0", 2, 5, ((4, 4),), (20, 20), options={"focal_gamma": 0.0, "focal_alpha": 0.4}),
    MaskLossCase("gamma_half", 2, 5, ((4, 4),), (20, 20), "soft", options={"focal_gamma": 0.5}),
    MaskLossCase("gamma_3", 2, 5, ((4, 4),), (20, 20), options={"focal_gamma": 3.0}),
)
"""Small cases that between them meet every branch of an implementation."""

SHAPES = (
    MaskLossCase("ade_vit_l", 1, 150, ((40, 40),) * 3, (640, 640)),
    MaskLossCase("ade_vit_b", 1, 150, ((32, 32),) * 3, (512, 512)),
    MaskLossCase("coco_vit_l", 1, 171, ((32, 32),) * 3, (512, 512)),
    MaskLossCase("pc_vit_l", 1, 60, ((30, 30),) * 3, (480, 480)),
    MaskLossCase("cityscapes_like", 1, 19, ((64, 128),) * 3, (1024, 2048)),
    MaskLossCase("mask2former", 1, 100, ((160, 160),) * 10, (640, 640), "bool", 20, matched=True),
)
"""The shapes that matter, at batch 1; ``dataclasses.replace(shape, batch=16)`` for others."""


def as_list(value: Tensor | list[Tensor]) -> list[Tensor]:
    """A list whether or not ``value`` is one."""
    return [value] if isinstance(value, Tensor) else list(value)


def stacked(result: MaskLoss) -> Tensor:
    """Focal, bce and dice of every entry in one tensor, (3, L, …)."""
    return torch.stack([torch.stack(as_list(getattr(result, name))) for name in LOSSES])


def with_gradients(
    function: Any, inputs: dict[str, Any], gradients: Tensor | None = None, **options: Any
) -> tuple[MaskLoss, list[Tensor]]:
    """The result of ``function(**inputs, **options)`` and its gradients.

    ``gradients`` is that of :func:`stacked`, random unless given. The gradients are those of every entry of
    ``mask_logits`` and, last, of ``pair_weights`` where there are any.
    """
    leaves = [logits.detach().requires_grad_() for logits in as_list(inputs["mask_logits"])]
    inputs = {**inputs, "mask_logits": leaves if isinstance(inputs["mask_logits"], list) else leaves[0]}
    if "pair_weights" in inputs:
        leaves = [*leaves, inputs["pair_weights"].detach().requires_grad_()]
        inputs["pair_weights"] = leaves[-1]
    result = function(**inputs, **options)
    value = stacked(result)
    if gradients is None:
        gradients = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    gradients = gradients.to(value.device, value.dtype)
    grads = torch.autograd.grad(value, leaves, gradients, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    terms: list[Any] = [r.detach() if isinstance(r, Tensor) else [t.detach() for t in r] for r in result]
    return MaskLoss(*terms), filled


def oracle(
    inputs: dict[str, Any], *, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[MaskLoss, list[Tensor]]:
    """:func:`mask_loss_reference` and its gradients (as :func:`with_gradients`), computed in ``dtype``."""

    def cast(value: Any) -> Any:
        if isinstance(value, list):
            return [cast(v) for v in value]
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    inputs = {name: cast(value) for name, value in inputs.items() if name != "ignore_index"}
    return with_gradients(mask_loss_reference, inputs, **options)
