"""Cases and oracle of the panoptic argmax."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from segvit_kernels.ops.panoptic_argmax import PanopticArgmax, panoptic_argmax_reference


@dataclasses.dataclass(frozen=True)
class PanopticCase:
    """Sizes and options of one call of ``panoptic_argmax``."""

    name: str
    batch: int
    queries: int
    grid: tuple[int, int]
    size: tuple[int, int]
    resized: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    activation: str = "sigmoid"
    threshold: float = 0.5
    weighted: bool = False

    def inputs(
        self,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        seed: int = 0,
        planted: bool = False,
    ) -> dict[str, Any]:
        """Fresh random arguments; ``planted`` is like a trained model: an eighth of the queries has areas to
        itself, the others are nowhere and a third of them takes no part."""
        generator = torch.Generator().manual_seed(seed)
        (h, w), shape = self.grid, (self.batch, self.queries)
        masks = torch.randn(*shape, h, w, generator=generator) * 4
        scores = torch.rand(shape, generator=generator) * 0.5 + 0.5
        if planted:
            chosen = torch.randperm(self.queries, generator=generator)
            heavy = chosen[: max(1, self.queries // 8)].sort().values
            masks = masks / 4 - 7
            across = torch.arange(w) * len(heavy) // w
            masks[:, heavy[across], :, torch.arange(w)] += 13
            scores[:, chosen[len(heavy) :: 3]] = -1
        if self.activation == "none":
            masks = masks.sigmoid()
        return {
            "mask_logits": masks.to(device, dtype),
            "scores": scores.to(device, dtype),
            "size": self.size,
            "resized": self.resized,
            "crop": self.crop,
            "activation": self.activation,
            "threshold": self.threshold,
            "weighted": self.weighted,
        }


CASES = (
    PanopticCase("one_of_everything", 1, 1, (1, 1), (1, 1)),
    PanopticCase("one_query", 2, 1, (5, 3), (19, 33), threshold=0.25),
    PanopticCase("one_cell", 1, 20, (1, 1), (40, 37), activation="sigmoid_first"),
    PanopticCase("odd", 2, 21, (7, 5), (19, 37), threshold=0.7, weighted=True),
    PanopticCase("as_it_is", 1, 18, (13, 70), (13, 70)),
    PanopticCase("smaller", 1, 17, (40, 90), (13, 67), activation="sigmoid_first", weighted=True),
    PanopticCase("maskformer", 2, 19, (9, 11), (11, 140), activation="sigmoid_first", weighted=True),
    PanopticCase("mask2former", 1, 20, (6, 7), (21, 75), (16, 24), None, "sigmoid_first", 0.5, True),
    PanopticCase("eomt", 1, 21, (8, 8), (20, 70), (32, 32), (14, 32)),
    PanopticCase("shrunk_first", 1, 20, (40, 40), (21, 30), (9, 11), (9, 7), "sigmoid_first"),
    PanopticCase("probabilities", 1, 130, (5, 9), (7, 35), activation="none", threshold=0.9),
)
"""Small cases that between them meet every branch of an implementation."""


def oracle(
    inputs: dict[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[PanopticArgmax, Tensor, Tensor]:
    """:func:`panoptic_argmax_reference` computed in ``dtype``: its results, the products of scores and masks
    (B, Q, H, W), and what is compared with the threshold, −∞ for queries that take no part.

    With float64 it is the truth; with the dtype that is computed in, what ordinary PyTorch makes of it.
    """
    scores = inputs["scores"].to(dtype)
    inputs = {**inputs, "mask_logits": inputs["mask_logits"].to(dtype)}
    result, products = panoptic_argmax_reference(**{**inputs, "scores": scores})
    if inputs["weighted"]:
        return result, products, products
    alone = torch.where(scores >= 0, 1.0, -1.0).to(dtype)
    return result, products, panoptic_argmax_reference(**{**inputs, "scores": alone})[1]


def assert_panoptic(
    name: str, found: PanopticArgmax, inputs: dict[str, Any], ordinary_dtype: torch.dtype = torch.float32
) -> int:
    """Hold a result to the oracle's wherever rounding does not decide; return how many pixels differ.

    A pixel may have another query only where its true product is short of the best by less than two products
    may err, each twice the largest error of ordinary PyTorch in the same dtype plus rounding, and be in a
    mask or not only where it is as near to the threshold. Counts must be those of the maps exactly, and
    ``above`` that of the truth but for pixels so near.

    Raises:
        AssertionError: with the figures.
    """
    truth, products, values = oracle(inputs)
    _, products_there, values_there = oracle(inputs, ordinary_dtype)
    batch, count = products.shape[:2]
    size = tuple(products.shape[2:])
    assert found.queries.dtype == torch.int16 and found.queries.shape == (batch, *size), f"{name}: queries"
    assert found.inside.dtype == torch.bool and found.inside.shape == (batch, *size), f"{name}: inside"
    for field in ("won", "above", "kept"):
        areas = getattr(found, field)
        assert areas.dtype == torch.int32 and areas.shape == (batch, count), f"{name}: {field}"
    if not found.queries.numel():
        return 0
    eps, none = torch.finfo(ordinary_dtype).eps, products == -torch.inf

    def allowed(exact: Tensor, there: Tensor) -> float:
        error, largest = (x.masked_fill(none, 0).abs().max().item() for x in (there - exact, exact))
        return 2 * error + 4 * eps * largest

    parting = ~none.all(1)
    assert torch.equal(found.queries >= 0, parting), f"{name}: which pixels have a query"
    assert found.queries.max() < count, f"{name}: query {int(found.queries.max())} of {count}"
    index = found.queries.long().clamp(min=0)[:, None]
    chosen = products.gather(1, index)[:, 0]
    assert bool((chosen > -torch.inf)[parting].all()), f"{name}: a query that takes no part has pixels"
    short = (products.amax(1) - chosen)[parting]
    limit = 2 * allowed(products, products_there)
    if short.numel():
        assert short.max() <= limit, f"{name}: a query is short by {short.max():.3g}, allowed {limit:.3g}"
    distance = values - inputs["threshold"]
    near = distance.abs() <= allowed(values, values_there)
    own = distance.gather(1, index)[:, 0]
    wrong = (found.inside != (own >= 0)) & ~near.gather(1, index)[:, 0] & parting
    assert not wrong.any(), f"{name}: {int(wrong.sum())} pixels wrongly in or out of a mask"
    assert not found.inside[~parting].any(), f"{name}: pixels of no query are inside"
    hits = found.queries[:, None] == torch.arange(count, device=index.device)[:, None, None]
    assert torch.equal(found.won, hits.sum((2, 3), dtype=torch.int32)), f"{name}: won"
    hits &= found.inside[:, None]
    assert torch.equal(found.kept, hits.sum((2, 3), dtype=torch.int32)), f"{name}: kept"
    off = (found.above - truth.above).abs()
    assert bool((off <= near.sum((2, 3))).all()), f"{name}: above is off by {int(off.max())}"
    return int((found.queries != truth.queries).sum())
