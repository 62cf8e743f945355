"""Cases and oracle of the mask IoU."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from segvit_kernels.ops.mask_iou import MaskIoU, mask_iou_reference


@dataclasses.dataclass(frozen=True)
class IoUCase:
    """Sizes of one call of ``mask_iou``; the second masks are booleans if ``boolean`` is true."""

    name: str
    batch: int
    masks: tuple[int, int]
    grids: tuple[tuple[int, int], tuple[int, int]]
    size: tuple[int, int] | None = None
    boolean: bool = False
    threshold: float = 0.0

    def inputs(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0, soft: bool = False
    ) -> dict[str, Any]:
        """Fresh random arguments; half of the masks are empty in most places."""
        generator = torch.Generator().manual_seed(seed)

        def draw(count: int, grid: tuple[int, int]) -> Tensor:
            logits = torch.randn(self.batch, count, *grid, generator=generator) * 4
            logits[:, ::2, : grid[0] // 2 + 1] -= 20
            return logits

        a, b = (draw(*given) for given in zip(self.masks, self.grids, strict=True))
        second = b > 0 if self.boolean else b.to(dtype)
        given = {"a": a.to(device, dtype), "b": second.to(device), "size": self.size}
        return {**given, "soft": soft, "threshold": self.threshold}


CASES = (
    IoUCase("one_of_everything", 1, (1, 1), ((1, 1), (1, 1))),
    IoUCase("as_they_are", 2, (5, 3), ((9, 37), (9, 37)), threshold=0.5),
    IoUCase("wide", 1, (3, 6), ((2, 700), (2, 700))),
    IoUCase("targets", 1, (17, 9), ((7, 5), (33, 70)), (33, 70), True),
    IoUCase("both_upsampled", 2, (20, 19), ((4, 6), (7, 5)), (11, 23), threshold=-0.7),
    IoUCase("downsampled", 1, (4, 4), ((40, 50), (30, 20)), (13, 17)),
    IoUCase("many", 1, (70, 67), ((3, 4), (3, 4)), (5, 6)),
)
"""Small cases that between them meet every branch of an implementation."""


def assert_iou(name: str, found: MaskIoU, inputs: dict[str, Any], ordinary_dtype: torch.dtype) -> None:
    """Hold sums to float64: soft ones to the error of ordinary PyTorch, twice and with rounding; hard ones
    exactly, but for pixels whose logit is as near to the threshold as interpolation errs.

    Raises:
        AssertionError: with the figures.
    """

    def computed(dtype: torch.dtype, **changes: Any) -> MaskIoU:
        given = {n: t if t.dtype == torch.bool else t.to(dtype) for n, t in inputs.items() if n in ("a", "b")}
        return mask_iou_reference(**{**inputs, **given, **changes})

    truth = computed(torch.float64)
    for field in MaskIoU._fields:
        actual, expected = getattr(found, field), getattr(truth, field)
        assert actual.shape == expected.shape, f"{name}: {field} has shape {tuple(actual.shape)}"
        if not actual.numel():
            continue
        if inputs["soft"]:
            assert actual.dtype == ordinary_dtype, f"{name}: {field} is {actual.dtype}"
            error = (getattr(computed(ordinary_dtype), field).double() - expected).abs().max()
            allowed = 2 * error + 16 * torch.finfo(ordinary_dtype).eps * expected.abs().max()
            off = (actual.double() - expected).abs().max()
        else:
            assert actual.dtype == torch.int32, f"{name}: {field} is {actual.dtype}"
            least = 1e-4 if ordinary_dtype == torch.float32 else 0.0
            bounds = [inputs["threshold"] + step for step in (least, -least)]
            sides = [getattr(computed(torch.float64, threshold=bound), field) for bound in bounds]
            allowed = (sides[0] - sides[1]).abs() * 2
            off = (actual - expected).abs()
        assert bool((off <= allowed).all()), f"{name}: {field} is off by {off.max()}, allowed {allowed.max()}"
