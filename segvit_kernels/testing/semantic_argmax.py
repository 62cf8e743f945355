"""Cases and oracle of the semantic argmax."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from segvit_kernels.ops.semantic_argmax import View, Views, semantic_argmax_reference
from segvit_kernels.testing.budgets import assert_within_budget


@dataclasses.dataclass(frozen=True)
class SemanticCase:
    """Sizes of one call of ``semantic_argmax``; ``stacks`` holds (views, h, w) of every entry of the list."""

    name: str
    stacks: tuple[tuple[int, int, int], ...]
    queries: int
    classes: int
    size: tuple[int, int]
    views: tuple[View, ...] = ()
    batch: int = 0

    def inputs(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        seed: int = 0,
        concentrated: bool = False,
    ) -> dict[str, Any]:
        """Fresh random arguments; ``concentrated`` is like a trained model: an eighth of the queries
        has nearly all class mass, and each of them an area to itself."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        masks = [draw(v, self.queries, h, w) * 4 for v, h, w in self.stacks]
        logits = draw(sum(v for v, _, _ in self.stacks), self.queries, self.classes + 1)
        if concentrated:
            heavy = torch.randperm(self.queries, generator=generator)[: max(1, self.queries // 8)]
            logits[..., -1] += 8
            logits[:, heavy, -1] -= 16
            logits[:, heavy, heavy % self.classes] += 8
            for mask in masks:  # every heavy query has stripes to itself
                owner = torch.arange(mask.shape[3]) * len(heavy) // mask.shape[3]
                mask[:, heavy] = -6 + mask[:, heavy] / 4
                mask[:, heavy[owner], :, torch.arange(mask.shape[3])] += 12
        masks = [mask.to(device, dtype) for mask in masks]
        return {
            "mask_logits": masks[0] if len(masks) == 1 else masks,
            "class_probs": logits.softmax(-1)[..., :-1].to(device, dtype),
            "size": self.size,
            "views": Views(self.views, self.batch, self.size, device) if self.views else None,
        }


def _windows(
    size: tuple[int, int], scale: float, crop: int, stride: int, grid: int, group: int
) -> list[View]:
    """Sliding windows of the image resized by ``scale``, each also mirrored."""
    resized = (round(size[0] * scale), round(size[1] * scale))
    tops, lefts = (
        sorted({min(i, max(0, length - crop)) for i in range(0, max(length - crop, 0) + stride, stride)})
        for length in resized
    )
    return [
        View.crop(0, size, resized, top, left, (crop, crop), (grid, grid), flip, group)
        for top in tops
        for left in lefts
        for flip in (False, True)
    ]


def _rounded(views: list[View]) -> tuple[View, ...]:
    """The views with maps that float32 holds, so that the float64 oracle means the same ones."""
    return tuple(
        dataclasses.replace(v, affine=tuple(torch.tensor(v.affine, dtype=torch.float32).tolist()))
        for v in views
    )


_SLIDING = _rounded(_windows((60, 75), 1.0, 48, 20, 6, 0))
_SCALES = _rounded(
    [v for g, s in enumerate((0.5, 0.75, 1.0, 1.75)) for v in _windows((40, 52), s, 32, 24, 4, g)]
)
_MIXED = _rounded(
    [  # several images with different numbers of views, grids mixed, images in no order
        View.whole(2, (5, 7), (30, 41)),
        View.whole(0, (5, 7), (30, 41)),
        View.crop(2, (30, 41), (60, 82), 3, 5, (40, 50), (5, 7), True, 3),
        View.whole(1, (9, 4), (30, 41), 1),
        View(0, (0.21, -0.7, -0.15, 3.9), (7, 11, 8, 12), 4),  # covers a single pixel
        View.crop(0, (30, 41), (30, 41), 11, 0, (19, 41), (9, 4), False, 0),
    ]
)

CASES = (
    SemanticCase("one_of_everything", ((1, 1, 1),), 1, 1, (1, 1)),
    SemanticCase("one_cell", ((1, 1, 1),), 19, 19, (100, 37)),
    SemanticCase("one_pixel", ((2, 7, 5),), 20, 19, (1, 1)),
    SemanticCase("odd", ((2, 7, 5),), 20, 19, (100, 37)),
    SemanticCase("smaller", ((1, 40, 40),), 19, 19, (13, 17)),
    SemanticCase("wide", ((1, 32, 64),), 40, 19, (64, 129)),
    SemanticCase("classes_150", ((1, 10, 9),), 150, 150, (33, 65)),
    SemanticCase("classes_171", ((2, 5, 6),), 171, 171, (20, 24)),
    SemanticCase("classes_300", ((1, 6, 6),), 40, 300, (30, 30)),
    SemanticCase("sliding", ((len(_SLIDING), 6, 6),), 40, 19, (60, 75), _SLIDING, 1),
    SemanticCase("scales", ((len(_SCALES), 4, 4),), 33, 21, (40, 52), _SCALES, 1),
    SemanticCase("mixed", ((3, 5, 7), (3, 9, 4)), 35, 7, (30, 41), _MIXED, 3),
)
"""Small cases that between them meet every branch of an implementation."""


def oracle(inputs: dict[str, Any], dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
    """Scores (B, C, H, W) of all classes by :func:`semantic_argmax_reference`, computed in ``dtype``.

    With float64 it is the truth; with the dtype that is computed in, what ordinary PyTorch makes of it.
    """
    masks = inputs["mask_logits"]
    masks = masks.to(dtype) if isinstance(masks, Tensor) else [m.to(dtype) for m in masks]
    inputs = {**inputs, "mask_logits": masks, "class_probs": inputs["class_probs"].to(dtype)}
    return semantic_argmax_reference(**inputs, **options)[1]


def assert_labels(name: str, labels: Tensor, truth: Tensor, ordinary: Tensor) -> int:
    """Hold labels to the oracle's wherever rounding does not decide; return how many differ.

    A label may differ only where its true score is short of the best one by less than what two scores may
    err: each twice the largest error of ordinary PyTorch in the same dtype, plus rounding.

    Args:
        name: what is compared, for the message.
        labels: (B, H, W), uint8, or int16 for more than 256 classes.
        truth: the float64 scores of all classes (B, C, H, W).
        ordinary: the same, computed by the plain formula in the dtype that the labels were computed in.

    Raises:
        AssertionError: with the figures.
    """
    classes = truth.shape[1]
    assert labels.dtype == (torch.uint8 if classes <= 256 else torch.int16), f"{name}: {labels.dtype}"
    assert labels.shape == truth.shape[:1] + truth.shape[2:], f"{name}: shape {tuple(labels.shape)}"
    if labels.numel() == 0:
        return 0
    index = labels.long()[:, None]
    assert int(index.min()) >= 0 and int(index.max()) < classes, f"{name}: label {int(index.max())}"
    best, expected = truth.max(1)
    short = best - truth.gather(1, index)[:, 0]
    allowed = _allowed(truth, ordinary)
    bad = short > allowed
    assert not bool(bad.any()), (
        f"{name}: {int(bad.sum())} of {labels.numel()} labels are wrong, the worst by a score of "
        f"{short[bad].max():.3g} where rounding explains {allowed[bad].min():.3g}"
    )
    return int((index[:, 0] != expected).sum())


def best_classes(truth: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of scores (B, C, H, W) the first k classes and their probabilities (B, k, H, W), by a stable sort."""
    values, classes = truth.sort(dim=1, descending=True, stable=True)
    total = truth.sum(1, keepdim=True)
    return classes[:, :k], torch.where(total > 0, values[:, :k] / total, 1 / truth.shape[1])


def assert_best_classes(name: str, found: tuple[Tensor, Tensor], truth: Tensor, ordinary: Tensor) -> int:
    """Hold the k best classes and their probabilities to the oracle's; return how many classes differ.

    A class may stand in another's place only where their true scores are closer than rounding explains, as in
    :func:`assert_labels`; no class stands twice at a pixel.

    Args:
        name: what is compared, for the message.
        found: classes and probabilities (B, k, H, W).
        truth, ordinary: the scores of all classes, as in :func:`assert_labels`.

    Raises:
        AssertionError: with the figures.
    """
    classes, shares = found
    k, number = classes.shape[1], truth.shape[1]
    assert classes.dtype == (torch.uint8 if number <= 256 else torch.int16), f"{name}: {classes.dtype}"
    expected, exact = best_classes(truth, k)
    assert shares.shape == classes.shape == expected.shape, f"{name}: shape {tuple(shares.shape)}"
    if classes.numel() == 0:
        return 0
    assert int(classes.min()) >= 0 and int(classes.max()) < number, f"{name}: class {int(classes.max())}"
    allowed = _allowed(truth, ordinary)
    left = truth.clone()
    for rank, chosen in enumerate(classes.long().unbind(1)):
        # Behind what stands before it, a class is the best of those that are left.
        short = left.amax(1) - left.gather(1, chosen[:, None])[:, 0]
        bad = short > allowed
        assert not bool(bad.any()), (
            f"{name}: {int(bad.sum())} of {bad.numel()} classes in place {rank} are wrong, one by a score "
            f"of {short[bad].max():.3g} where rounding explains {allowed[bad].min():.3g}"
        )
        left.scatter_(1, chosen[:, None], -math.inf)
    assert_within_budget(f"{name}: probabilities", shares, exact, best_classes(ordinary, k)[1])
    return int((classes != expected).sum())


def _allowed(truth: Tensor, ordinary: Tensor) -> Tensor:
    """How far the best true score (B, H, W) may be from that of a label; see :func:`assert_labels`."""
    eps = torch.finfo(ordinary.dtype).eps
    return 2 * (2 * (ordinary.double() - truth).abs().max() + 2 * eps * truth.amax(1).abs())
