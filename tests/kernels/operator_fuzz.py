"""Random calls of every operator, held to the plain formulas in float64.

A call is drawn from a number, its seed: sizes, layouts in memory, dtypes, options, special values, and now
and then an argument that must be refused by name. ``python operator_fuzz.py --calls 100000`` runs many,
in child processes that may crash: the seed of the call that did is reported, and the rest goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import segvit_kernels as kernels
from segvit_kernels.testing import assert_within_budget
from segvit_kernels.testing.mask_binarize import assert_masks, oracle, unpacked
from segvit_kernels.testing.mask_iou import assert_iou
from segvit_kernels.testing.panoptic_argmax import assert_panoptic

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES, torch.float64)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 48, 65)
SPECIAL = ((math.nan,), (math.inf, -math.inf), (1e4, -6e4, 1e30), (1e-42, -1e-42, -0.0))


@dataclasses.dataclass
class Call:
    """One call: ``ours(backend=..., **tensors)`` and ``plain(**tensors)`` give lists of tensors.

    Attributes:
        respects_nan: not a number where the formula gives none.
        bad: name of an argument that must be refused; the call is then ``ours`` alone.
        special: some values are not numbers, infinite, huge or subnormal.
    """

    tensors: dict[str, Tensor]
    ours: Callable[..., list]
    plain: Callable[..., list] | None
    differentiable: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    bad: str | None = None
    special: bool = False
    check: Callable[[str, dict[str, Tensor], list], None] | None = None
    respects_nan: bool = False


class Draw(random.Random):
    """Random choices of a call."""

    def size(self, largest: int = 65) -> int:
        return self.choice([s for s in SIZES if s <= largest])

    def maybe(self, probability: float = 0.5) -> bool:
        return self.random() < probability

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, scale: float | None = None) -> Tensor:
        """Normal numbers in some layout; what lies between them in memory is not a number."""
        generator = torch.Generator().manual_seed(self.getrandbits(31))
        scale = self.choice((1.0, 1.0, 0.1, 3.0)) if scale is None else scale
        values = (torch.randn(tuple(shape), generator=generator) * scale).to(dtype)
        return self.lay_out(values)

    def lay_out(self, values: Tensor) -> Tensor:
        if not values.ndim or self.maybe(0.4):
            return values
        shape = values.shape
        expanded = [i for i, n in enumerate(shape) if n > 1 and self.maybe(0.1)]
        for axis in expanded:
            values = values.narrow(axis, 0, 1)
        order = list(range(values.ndim))
        if self.maybe():
            self.shuffle(order)
        gaps = [self.choice((0, 0, 0, 1, 3)) for _ in order]
        starts = [self.randint(0, gap) for gap in gaps]
        fill = math.nan if values.is_floating_point() else 0
        memory = torch.full(
            [values.shape[i] + g for i, g in zip(order, gaps, strict=True)], fill, dtype=values.dtype
        )
        for axis, (i, start) in enumerate(zip(order, starts, strict=True)):
            memory = memory.narrow(axis, start, values.shape[i])
        view = memory.permute([order.index(i) for i in range(values.ndim)])
        view.copy_(values)
        return view.expand(shape)

    def poison(self, tensor: Tensor) -> Tensor:
        """A copy with special values in a few places."""
        tensor = tensor.clone()
        kind = self.choice(SPECIAL)
        for _ in range(self.randint(1, 3)):
            if tensor.numel():
                place = tuple(self.randrange(n) for n in tensor.shape)
                tensor[place] = self.choice(kind)
        return tensor


def attention(draw: Draw, masks: bool) -> Call:
    dtype = draw.choice(DTYPES)
    batch, queries, keys, heads = draw.choice((0, 1, 1, 2, 3)), draw.size(), draw.size(), draw.randint(1, 4)
    dim = draw.choice((1, 2, 3, 8, 16, 24, 32, 33, 64, 100, 128, 130))
    shared = draw.maybe(0.3)
    tensors = {
        "query": draw.tensor((1 if shared else batch, queries, heads, dim), dtype, 1.0),
        "key": draw.tensor((batch, keys, heads, dim), dtype, draw.choice((1.0, 0.1))),
        "value": draw.tensor((batch, keys, heads, dim), dtype),
    }
    options: dict[str, Any] = {}
    if draw.maybe(0.3):
        options["scale"] = draw.choice((0.0, 0.25, 1.0 / dim, -0.1))
    if draw.maybe(0.2):
        options["deterministic"] = draw.maybe()
    if masks and draw.maybe(0.4):
        tensors["previous_masks"] = draw.tensor((batch, queries, keys), dtype)
    elif masks and draw.maybe(0.2):
        options["need_masks"] = False
    if draw.maybe(0.2):
        hidden = torch.tensor([draw.maybe() for _ in range(batch * keys)], dtype=torch.bool)
        options["key_padding_mask"] = draw.lay_out(hidden.view(batch, keys))
    special = draw.maybe(0.1)
    if special:
        name = draw.choice(list(tensors))
        tensors[name] = draw.poison(tensors[name])
    dropout = draw.choice((0.1, 0.5, 0.9)) if draw.maybe(0.15) else 0.0
    seed = draw.getrandbits(31)
    function = kernels.fused_atm if masks else kernels.query_attention
    formula = kernels.atm_reference if masks else kernels.query_attention_reference

    def ours(backend: str | None = None, **x: Any) -> list:
        torch.default_generator.manual_seed(seed)  # nothing for GPUs: torch.manual_seed costs a millisecond
        result = function(**x, dropout_p=dropout, backend=backend, **options)
        return list(result) if masks else [result]

    def plain(**x: Any) -> list:
        torch.default_generator.manual_seed(seed)  # nothing for GPUs: torch.manual_seed costs a millisecond
        extra = {"seed": torch.randint(2**63 - 1, (1,))} if dropout else {}
        kept = {k: v for k, v in options.items() if k in ("scale", "key_padding_mask")}
        result = formula(**x, dropout_p=dropout, **kept, **extra)
        if not masks:
            return [result]
        return [result.output, result.mask_logits if options.get("need_masks", True) else None]

    # At padding masks are 0 by definition, whatever the query.
    shown = "key_padding_mask" not in options
    call = Call(tensors, ours, plain, tuple(tensors), dtype, special=special, respects_nan=shown)
    if draw.maybe(0.1):
        wrong = {
            "query": [draw.tensor((2, 3), dtype), tensors["query"].to(torch.int32), None, [1.0]],
            "key": [tensors["key"][..., :0], "key", tensors["key"].to("meta")],
            "value": [tensors["value"][:, :, :, None], tensors["value"].to(torch.complex64), 3],
            "dropout_p": [1.0, -0.1, math.nan, "0.1", None, 2],
            "scale": ["1", math.nan, math.inf, torch.ones(2), [1.0]],
            "deterministic": ["yes", 3.5],
            "key_padding_mask": [torch.zeros(batch, keys), torch.zeros(batch, keys + 1, dtype=torch.bool), 1],
            "backend": ["nonsense", 3],
        }
        if masks:
            wrong["previous_masks"] = [draw.tensor((batch + 1, queries, keys), dtype), 1.0]
            wrong["need_masks"] = ["no", 0.5]
        call.bad, call.ours = corrupted(draw, wrong, function, tensors, options | {"dropout_p": dropout})
    return call


def corrupted(draw: Draw, wrong: dict[str, list], function: Callable, *given: dict) -> tuple[str, Callable]:
    """The name of one argument, and a call with a wrong value of it."""
    name = draw.choice(list(wrong))
    arguments = {k: v for part in given for k, v in part.items()} | {name: draw.choice(wrong[name])}

    def ours(backend: str | None = None, **_: Any) -> list:
        function(**({"backend": backend} | arguments))
        return []

    return name, ours


def norm(draw: Draw) -> Call:
    dtype = draw.choice(DTYPES)
    batch, height, width = draw.choice((0, 1, 2, 3)), draw.size(9), draw.size(9)
    channels, prefix, stride = (
        draw.choice((1, 2, 3, 8, 16, 33, 96, 130)),
        draw.randint(0, 3),
        draw.randint(1, 4),
    )
    x = draw.tensor((batch, prefix + height * width, channels), dtype)
    if channels > 1 and x.stride(-1) == 0:  # all rounding: no channel differs from the mean
        x = draw.tensor((batch, prefix + height * width, channels), dtype).contiguous()
        x = x + torch.linspace(-1, 1, channels, dtype=dtype)
    tensors = {"x": x + draw.choice((0.0, 1.0)) if draw.maybe(0.3) else x}
    if draw.maybe(0.7):
        kind = draw.choice((dtype, torch.float32)) if dtype != torch.float64 else dtype
        tensors["weight"] = draw.tensor((channels,), kind)
        if draw.maybe(0.8):
            tensors["bias"] = draw.tensor((channels,), kind)
    special = draw.maybe(0.1)
    if special:
        name = draw.choice(list(tensors))
        tensors[name] = draw.poison(tensors[name])
    options = {
        "grid": (height, width),
        "stride": stride,
        "prefix_tokens": prefix,
        "eps": draw.choice((1e-3, 1e-1)),
    }
    ours = lambda weight=None, bias=None, backend=None, **t: list(  # noqa: E731
        kernels.subsample_layer_norm(weight=weight, bias=bias, backend=backend, **t, **options)
    )

    def plain(weight: Tensor | None = None, bias: Tensor | None = None, **t: Tensor) -> list:
        exact = [p if p is None else p.to(t["x"].dtype) for p in (weight, bias)]
        return list(kernels.subsample_layer_norm_reference(t["x"], *exact, **options))

    call = Call(tensors, ours, plain, tuple(tensors), dtype, special=special, respects_nan=True)
    if draw.maybe(0.1):
        wrong = {
            "x": [x[0] if batch else x[..., 0], x.to(torch.int64), None, x[:, 1:], x[..., :0]],
            "weight": [torch.ones(channels + 1, dtype=dtype), 1.0, torch.ones(channels, dtype=torch.int32)],
            "bias": [torch.ones(channels, 1, dtype=dtype), "b"],
            "grid": [(0, 3), 3, (height,), (1.5, 2), None],
            "stride": [0, -1, 1.5, None, "2"],
            "prefix_tokens": [-1, 0.5, None],
            "eps": [-1.0, math.nan, None, "eps"],
        }
        whole = {"weight": torch.ones(channels, dtype=dtype), "bias": torch.zeros(channels, dtype=dtype)}
        call.bad, call.ours = corrupted(draw, wrong, kernels.subsample_layer_norm, whole, {"x": x}, options)
    return call


def targets_of(draw: Draw, batch: int, classes: int, size: tuple[int, int]) -> Tensor:
    """Labels of some integer type, some ignored, or hard or soft masks."""
    generator = torch.Generator().manual_seed(draw.getrandbits(31))
    kind = draw.choice(
        (torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float32, torch.float16)
    )
    if kind == torch.bool or kind.is_floating_point:
        masks = torch.rand(batch, classes, *size, generator=generator)
        if kind != torch.bool and draw.maybe():
            masks = masks.round()
        return draw.lay_out((masks > 0.6) if kind == torch.bool else masks.to(kind))
    labels = torch.randint(0, classes + 1, (batch, *size), generator=generator)
    labels[labels == classes] = 255
    return draw.lay_out(labels.to(kind))


def loss(draw: Draw) -> Call:
    dtype = draw.choice(DTYPES)
    batch, queries, size = draw.choice((0, 1, 2)), draw.size(9), (draw.size(33), draw.size(33))
    tensors = {
        f"l{i}": draw.tensor((batch, queries, draw.size(9), draw.size(9)), dtype)
        for i in range(draw.choice((1, 1, 2, 3)))
    }
    single = len(tensors) == 1 and draw.maybe()
    matches = draw.maybe(0.3)
    classes = draw.size(9) if matches else queries
    targets = targets_of(draw, batch, classes, size)
    labels = targets.ndim == 3
    options: dict[str, Any] = {
        "focal_gamma": draw.choice((0.0, 0.5, 1.0, 2.0, 2.5, 5.0)),
        "focal_alpha": draw.choice((0.0, 0.25, 0.5, 1.0)),
        "reduction": draw.choice(("mean", "sum", "none")),
    }
    if labels:
        options |= {"num_classes": classes, "mask_ignored": draw.maybe()}
    if matches:
        options["matches"] = torch.tensor(
            [[draw.randint(-1, classes - 1) for _ in range(queries)] for _ in range(batch)], dtype=torch.int64
        ).view(batch, queries)
    if draw.maybe(0.2):
        tensors["pair_weights"] = draw.tensor(
            (batch, queries), torch.float32 if dtype != torch.float64 else dtype
        )
    if draw.maybe(0.2):
        options["num_masks"] = draw.choice((0.5, 3, torch.tensor(4.0)))
    special = draw.maybe(0.1)
    if special:
        tensors["l0"] = draw.poison(tensors["l0"])

    def run(function: Callable, pair_weights: Tensor | None = None, **x: Any) -> list:
        entries = [x.pop(name) for name in tensors if name != "pair_weights"]
        result = function(
            entries[0] if single else entries, targets, pair_weights=pair_weights, **options, **x
        )
        flat = (
            [result.focal, result.bce, result.dice] if single else [*result.focal, *result.bce, *result.dice]
        )
        return [*flat, result.num_masks.detach(), result.present]

    call = Call(
        tensors,
        lambda **x: run(kernels.mask_loss, **x),
        lambda **x: run(kernels.mask_loss_reference, **x),
        tuple(tensors),
        dtype,
        special=special,
    )
    if draw.maybe(0.1):
        logits = tensors["l0"]
        wrong = {
            "mask_logits": [
                logits[0] if batch else logits[..., 0],
                [],
                logits.to(torch.int8),
                [logits, 1],
                None,
            ],
            "targets": [targets[..., 0], "x", targets.to(torch.complex64), targets[..., :0]],
            "focal_alpha": ["a", None, math.nan],
            "focal_gamma": [-1.0, math.nan, None, "2"],
            "reduction": ["max", None],
            "pair_weights": [torch.ones(batch, queries + 1), 1.0],
            "matches": [torch.zeros(batch, queries + 1, dtype=torch.int64), torch.zeros(batch, queries), 1],
            "num_masks": ["3", math.nan, [1]],
            "ignore_index": [0, 1.5, "255"] if labels else ["255", 1.5],
            "num_classes": [0, -1, 2.5, "3"],
            "mask_ignored": ["no", 2],
        }
        call.bad, call.ours = corrupted(
            draw, wrong, kernels.mask_loss, {"mask_logits": logits, "targets": targets}, options
        )
    return call


def matching(draw: Draw) -> Call:
    dtype = draw.choice(DTYPES)
    batch, queries, size, classes = (
        draw.choice((0, 1, 2)),
        draw.size(9),
        (draw.size(33), draw.size(33)),
        draw.size(9),
    )
    tensors = {"mask_logits": draw.tensor((batch, queries, draw.size(9), draw.size(9)), dtype)}
    targets = targets_of(draw, batch, classes, size)
    options: dict[str, Any] = {
        "focal_gamma": draw.choice((0.0, 1.0, 2.0, 2.5)),
        "focal_alpha": draw.choice((0.0, 0.25, 1.0)),
    }
    if targets.ndim == 3:
        options["num_classes"] = classes
    special = draw.maybe(0.1)
    if special:
        tensors["mask_logits"] = draw.poison(tensors["mask_logits"])
    call = Call(
        tensors,
        lambda **x: list(kernels.mask_matching_cost(targets=targets, **options, **x)),
        lambda **x: list(kernels.mask_matching_cost_reference(targets=targets, **options, **x)),
        (),
        dtype,
        special=special,
    )
    if draw.maybe(0.1):
        logits = tensors["mask_logits"]
        wrong = {
            "mask_logits": [logits[..., 0], logits.to(torch.int8), None, [logits]],
            "targets": ["x", targets[..., :0]],
            "focal_alpha": ["a", math.nan],
            "focal_gamma": [-1.0, math.nan, "2"],
            "num_classes": [0, 2.5, "3"] + ([None] if targets.ndim == 3 else []),
        }
        call.bad, call.ours = corrupted(
            draw, wrong, kernels.mask_matching_cost, tensors, {"targets": targets}, options
        )
    return call


def views_of(draw: Draw, batch: int, size: tuple[int, int], grids: list[tuple[int, int]]) -> list:
    """A whole view of every output, and random crops, in any order; grids one a view."""
    made = []
    for index, grid in enumerate(grids):
        group, flip = draw.randint(0, 1), draw.maybe(0.3)
        if index < batch:
            made.append(kernels.View.crop(index, size, size, 0, 0, size, grid, flip, group))
            continue
        resized = (draw.randint(1, 2 * size[0]), draw.randint(1, 2 * size[1]))
        crop = (draw.randint(1, resized[0]), draw.randint(1, resized[1]))
        top, left = draw.randint(0, resized[0] - crop[0]), draw.randint(0, resized[1] - crop[1])
        image = draw.randrange(batch)
        made.append(kernels.View.crop(image, size, resized, top, left, crop, grid, flip, group))
    return made


def argmax(draw: Draw) -> Call:
    dtype = draw.choice(DTYPES)
    batch, queries, size = draw.choice((0, 1, 2)), draw.size(), (draw.size(33), draw.size(33))
    classes = draw.choice((1, 2, 3, 19, 33, 60, 150, 300))
    counts = (
        [batch]
        if not batch or draw.maybe()
        else [batch, *(draw.randint(0, 2) for _ in range(draw.randint(0, 2)))]
    )
    grids = [(draw.size(9), draw.size(9)) for _ in counts]
    stacks = {
        f"m{i}": draw.tensor((n, queries, *g), dtype)
        for i, (n, g) in enumerate(zip(counts, grids, strict=True))
    }
    total = sum(counts)
    sharp = draw.choice((0.0, 1.0, 8.0))
    kind = draw.choice((torch.float32, dtype))
    probs = draw.lay_out(
        (draw.tensor((total, queries, classes), torch.float32, 1.0) * sharp).softmax(-1).to(kind)
    )
    options: dict[str, Any] = {"activation": draw.choice(("sigmoid", "sigmoid", "none"))}
    if draw.maybe(0.15):
        options["prune"] = 0.5 if sharp == 8 else 1e-3
    views = None
    if batch and (len(counts) > 1 or draw.maybe(0.4)):
        every = [g for n, g in zip(counts, grids, strict=True) for _ in range(n)]
        views = kernels.Views(views_of(draw, batch, size, every), batch, size)
    special = draw.maybe(0.1)
    if special and total:
        stacks["m0"] = draw.poison(stacks["m0"])
    scored = draw.maybe()
    best = min(classes, draw.choice((1, 2, 5))) if not scored and draw.maybe(0.25) else 0

    def ours(backend: str | None = None, class_probs: Tensor = probs, **x: Tensor) -> list:
        if best and backend == "cuda":
            backend = "eager"  # it has no kernel for it
        given = {"size": size, "views": views, "backend": backend, **options}
        given |= {"return_scores": scored, "return_probabilities": best}
        result = kernels.semantic_argmax(list(x.values()), class_probs, **given)
        return list(result) if scored or best else [result]

    def check(backend: str, x: dict[str, Tensor], found: list) -> None:
        labels = found[0]
        if best:
            assert labels.shape == found[1].shape == (batch, best, *size)
            labels = labels[:, 0]
        assert labels.dtype == (torch.uint8 if classes <= 256 else torch.int16) and labels.shape == (
            batch,
            *size,
        )
        if not labels.numel():
            return
        assert int(labels.min()) >= 0 and int(labels.max()) < classes, "a label out of range"
        if special:
            return
        masks = [m.double() for n, m in x.items() if n != "class_probs"]
        given = {"size": size, "views": views, **options}
        truth = kernels.semantic_argmax_reference(masks, x["class_probs"].double(), **given)[1]
        most, chosen = truth.amax(1), truth.gather(1, labels.long()[:, None])[:, 0]
        # Masks of any dtype are exact numbers: the budget is that of float32, as places of views are.
        slack = (3e-5 if views is None else 3e-4) * (truth.abs().amax() + 1e-6)
        if backend in ("triton", "cuda") and dtype in HALVES:  # tensor cores multiply halves
            slack = slack + 4 * torch.finfo(dtype).eps * truth.abs().amax()
        if options["activation"] == "none":
            slack = slack + 3e-4 * max(float(m.abs().amax()) for m in masks if m.numel())
        assert (most - chosen).max() <= slack, (
            f"a label is short by {(most - chosen).max():.3g} of {slack:.3g}"
        )
        if scored:
            assert (found[1].double() - most).abs().max() <= slack, "a score is wrong"
        if best and options["activation"] == "sigmoid":
            shares = truth.gather(1, found[0].long()) / truth.sum(1, keepdim=True).clamp(min=1e-30)
            apart = (found[1].double() - shares).abs() * truth.sum(1, keepdim=True)
            assert apart.max() <= 2 * slack * classes, "a probability is wrong"

    call = Call(stacks | {"class_probs": probs}, ours, None, (), dtype, special=special, check=check)
    if draw.maybe(0.1):
        masks = next(iter(stacks.values()))
        small = probs[: len(masks)]
        wrong = {
            "mask_logits": [masks[..., 0], masks.to(torch.int32), [], None, [masks, "x"]],
            "class_probs": [small[..., 0], small[:, :, :0], small.to(torch.int64), None],
            "size": [(3,), 3, (0, 4), (1.5, 2), None, "ab"],
            "views": [[], "x", kernels.Views([], 0, (2, 3))],
            "activation": ["relu", None],
            "prune": [-1.0, math.nan, "x", None, math.inf],
            "return_scores": ["yes", 2],
            "return_probabilities": [-1, 2**20, 1.5, "x", None],
        }
        given = {"mask_logits": masks, "class_probs": small, "size": size}
        call.bad, call.ours = corrupted(draw, wrong, kernels.semantic_argmax, given)
    return call


def overlap(draw: Draw) -> Call:
    dtype, soft = draw.choice(DTYPES), draw.maybe()
    batch, size = draw.choice((0, 1, 2)), (draw.size(33), draw.size(33))
    tensors, flags = {}, {}
    for name in "ab":
        count = draw.choice((0, 1, 2, 3, 9, 20, 40))
        if draw.maybe(0.3):
            flags[name] = draw.lay_out(draw.tensor((batch, count, *size), torch.float32) > 0)
        else:
            tensors[name] = draw.tensor((batch, count, draw.size(9), draw.size(9)), dtype, 3.0)
    special = draw.maybe(0.1) and bool(tensors)
    if special:
        name = draw.choice(list(tensors))
        tensors[name] = draw.poison(tensors[name])
    options: dict[str, Any] = {"size": size, "soft": soft, "threshold": draw.choice((0.0, 0.5, -0.3))}

    def ours(backend: str | None = None, **x: Tensor) -> list:
        return list(kernels.mask_iou(**flags, **x, backend=backend, **options))

    def check(backend: str, x: dict[str, Tensor], found: list) -> None:
        result = kernels.MaskIoU(*found)
        if special:
            assert result.union.isfinite().all() and (result.iou <= 1 + 1e-3).all()
            return
        double = any(t.dtype == torch.float64 for t in x.values())
        assert_iou("drawn", result, {**options, **flags, **x}, torch.float64 if double else torch.float32)

    call = Call(tensors, ours, None, (), dtype, special=special, check=check)
    if draw.maybe(0.1) and len(tensors) == 2:
        a, b = tensors["a"], tensors["b"]
        wrong = {
            "a": [a[..., 0], a.to(torch.int32), None, [a]],
            "b": [b[0] if batch else b[..., 0], b.to(torch.int64), None],
            "size": [(3,), 3, (0, 4), (1.5, 2), "ab"],
            "threshold": [math.nan, "x", None],
            "soft": ["yes", 2],
        }
        call.bad, call.ours = corrupted(draw, wrong, kernels.mask_iou, tensors, options)
    return call


def panoptic(draw: Draw) -> Call:
    dtype, kind = draw.choice(DTYPES), draw.choice(("plain", "twice", "cropped"))
    batch, queries, size = draw.choice((0, 1, 2)), draw.size(), (draw.size(33), draw.size(33))
    grid = (draw.size(9), draw.size(9))
    tensors = {
        "mask_logits": draw.tensor((batch, queries, *grid), dtype, 3.0),
        "scores": draw.tensor((batch, queries), draw.choice((torch.float32, dtype))),
    }
    options: dict[str, Any] = {
        "size": size,
        "activation": draw.choice(("sigmoid", "sigmoid_first", "none")),
        "threshold": draw.choice((0.5, 0.1, 0.9)),
        "weighted": draw.maybe(),
    }
    if kind != "plain":
        options["resized"] = (draw.size(17), draw.size(17))
    if kind == "cropped":
        options["crop"] = tuple(draw.randint(1, side) for side in options["resized"])
    special = draw.maybe(0.1)
    if special:
        name = draw.choice(list(tensors))
        tensors[name] = draw.poison(tensors[name])

    def ours(backend: str | None = None, **x: Tensor) -> list:
        return list(kernels.panoptic_argmax(**x, backend=backend, **options))

    def check(backend: str, x: dict[str, Tensor], found: list) -> None:
        result = kernels.PanopticArgmax(*found)
        if not special:
            assert_panoptic("drawn", result, {"resized": None, "crop": None, **options, **x})
        elif batch:
            assert int(result.queries.min()) >= -1 and int(result.queries.max()) < queries
            assert (result.kept <= torch.minimum(result.won, result.above)).all()

    call = Call(tensors, ours, None, (), dtype, special=special, check=check)
    if draw.maybe(0.1):
        masks, scores = tensors["mask_logits"], tensors["scores"]
        wrong = {
            "mask_logits": [masks[..., 0], masks.to(torch.int32), None, [masks]],
            "scores": [scores[..., None], scores.to(torch.int64), None],
            "size": [(3,), 3, (0, 4), (1.5, 2), None, "ab"],
            "resized": [(3,), 3, (0, 4), (1.5, 2)],
            "crop": [(3,), (0, 1), (100, 100)],
            "activation": ["relu", None],
            "threshold": [math.nan, "x", None, math.inf],
            "weighted": ["yes", 2],
        }
        call.bad, call.ours = corrupted(draw, wrong, kernels.panoptic_argmax, tensors, options)
    return call


def binarize(draw: Draw) -> Call:
    dtype = draw.choice(DTYPES)
    batch, count, size = draw.choice((0, 1, 2)), draw.choice((0, 1, 3)), (draw.size(), draw.size())
    logits = draw.tensor((batch, count, draw.size(33), draw.size(33)), dtype)
    special = draw.maybe(0.1)
    logits = draw.poison(logits) if special else logits
    given: dict[str, Any] = {"size": size, "threshold": draw.choice((0.0, 0.0, 0.7, -1.3)), "boxes": None}
    if draw.maybe(0.3):
        corners = torch.rand(batch, count, 4, generator=torch.Generator().manual_seed(draw.getrandbits(31)))
        given["boxes"] = draw.lay_out((corners * 1.4 - 0.2) * torch.tensor([*size[::-1], *size[::-1]]))

    def ours(backend: str | None = None, format: str = "bool", **x: Tensor) -> list:
        found = kernels.mask_binarize(x["logits"], **given, format=format, backend=backend)
        return [found.masks, found.areas, found.boxes]

    def check(backend: str, x: dict[str, Tensor], found: list) -> None:
        arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
        truth, ordinary = (
            oracle({**given, "mask_logits": x["logits"]}, d) for d in (torch.float64, arithmetic)
        )
        masks = kernels.BinaryMasks(*found)
        if special:  # how far rounding reaches depends on the cells
            truth = ordinary = masks.masks.double() - 0.5
        assert_masks(backend, masks, truth, ordinary)
        bits, *rest = ours(backend, "packed", **x)
        assert torch.equal(unpacked(bits, size[1]), found[0]) and torch.equal(rest[0], found[1])
        encoded, *rest = ours(backend, "rle", **x)
        again = kernels.mask_binarize(found[0].double(), size, threshold=0.5, format="rle", backend="eager")
        assert encoded == again.masks and torch.equal(rest[1], found[2])

    call = Call({"logits": logits}, ours, None, (), dtype, special=special, check=check)
    if draw.maybe(0.1):
        wrong = {
            "mask_logits": [logits[0] if batch else logits[..., 0], logits.to(torch.int32), [], None],
            "size": [(3,), 3, (0, 4), (1.5, 2), None, (2**16, 2**16)],
            "boxes": [torch.zeros(3, 4), [], torch.zeros(batch, count, 4, dtype=torch.bool)],
            "threshold": [math.nan, math.inf, "x", None],
            "format": ["coco", None, 1],
        }
        call.bad, call.ours = corrupted(
            draw, wrong, kernels.mask_binarize, {"mask_logits": logits, "size": size}
        )
    return call


OPERATORS: dict[str, Callable[[Draw], Call]] = {
    "fused_atm": lambda draw: attention(draw, True),
    "query_attention": lambda draw: attention(draw, False),
    "subsample_layer_norm": norm,
    "mask_binarize": binarize,
    "mask_loss": loss,
    "mask_matching_cost": matching,
    "semantic_argmax": argmax,
    "panoptic_argmax": panoptic,
    "mask_iou": overlap,
}


def evaluate(
    function: Callable, call: Call, cast: Callable[[Tensor], Tensor], gradients: int
) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    tensors = {n: cast(t) if t.is_floating_point() else t for n, t in call.tensors.items()}
    leaves = {
        n: t.detach().requires_grad_(n in call.differentiable and gradients != 0) for n, t in tensors.items()
    }
    outputs = function(**leaves)
    named = {f"output {i}": o for i, o in enumerate(outputs) if o is not None}
    used = [o for i, o in enumerate(outputs) if o is not None and o.requires_grad and gradients >> i & 1]
    if used:
        generator = torch.Generator().manual_seed(gradients)
        weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in used]
        found = torch.autograd.grad(
            used, [leaves[n] for n in call.differentiable], weights, allow_unused=True
        )
        for name, grad in zip(call.differentiable, found, strict=True):
            named[f"gradient of {name}"] = torch.zeros_like(leaves[name]) if grad is None else grad
    return {n: t.detach() for n, t in named.items()}


def compare(name: str, call: Call, actual: Tensor, truth: Tensor, ordinary: Tensor) -> None:
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if not actual.is_floating_point():
        assert torch.equal(actual, truth.to(actual.dtype)), f"{name}: not equal"
        return
    if call.special:
        # NaN is not hidden, and finite numbers give finite ones where the formula's are, in this dtype too.
        given = list(call.tensors.values())
        if call.respects_nan and any(t.isnan().any() for t in given) and name.startswith("output"):
            hidden = truth.isnan() & ordinary.isnan() & actual.isfinite()
            assert not hidden.any(), f"{name}: finite where the formula is not"
        if all(t.isfinite().all() for t in given) and name.startswith("output"):
            good = truth.isfinite() & ordinary.isfinite()
            assert not (good & ~actual.isfinite()).any(), f"{name}: not finite where the formula is"
        return
    try:
        assert_within_budget(name, actual, truth, ordinary)
    except AssertionError:
        # Where terms of order one cancel, their rounding is left, and that of a half-precision output.
        assert actual.isfinite().all(), f"{name}: not finite"
        small = 0.2 if call.dtype == torch.float32 else 0.5
        largest = max(1.0, *(float(t.abs().amax()) for t in call.tensors.values() if t.numel()))
        allowed = TOLERANCE[call.dtype] * (truth.norm() + small * largest * truth.numel() ** 0.5)
        if (error := (actual.double() - truth).norm()) > allowed + 4 * (ordinary.double() - truth).norm():
            raise AssertionError(f"{name}: error {error:.3g}, allowed {allowed:.3g}") from None


def run(operator: str, seed: int, backends: Sequence[str]) -> int:
    """One drawn call on every backend that takes it; how many took it.

    Raises:
        AssertionError: a wrong value, a wrong refusal, an argument changed, or a wrong one not refused.
    """
    draw = Draw(f"{operator} {seed}")
    call = OPERATORS[operator](draw)
    gradients = draw.getrandbits(9) if draw.maybe(0.6) else 0
    before = {n: t.clone() for n, t in call.tensors.items()}
    count, truth, ordinary = 0, {}, {}
    if call.bad is None and call.check is None:
        truth = evaluate(call.plain, call, torch.Tensor.double, gradients)
        ordinary = evaluate(call.plain, call, lambda t: t, gradients)
    for backend in backends:
        if backend == "triton" and call.dtype == torch.bfloat16 and not torch.cuda.is_available():
            continue  # the interpreter's products of bfloat16 are wrong
        if call.bad is not None:
            try:
                call.ours(backend=backend)
            except (ValueError, TypeError) as error:
                text = str(error)
                assert call.bad in text, f"argument {call.bad} refused without its name: {text!r}"
                assert "\n" not in text, f"refused in several lines: {text!r}"
            else:
                raise AssertionError(f"a wrong {call.bad} is not refused")
            count += 1
            continue
        try:
            found = evaluate(lambda **x: call.ours(backend=backend, **x), call, lambda t: t, gradients)  # noqa: B023
        except (ValueError, TypeError) as error:
            if f"backend {backend!r} takes" in str(error):  # float64, large heads
                continue
            raise AssertionError(f"{backend}: refused: {error}") from error
        if call.check is not None:
            call.check(backend, call.tensors, list(found.values()))
        for name, tensor in found.items() if call.check is None else ():
            try:
                compare(name, call, tensor, truth[name], ordinary[name])
            except AssertionError as error:
                raise AssertionError(f"{backend}: {error}") from None
        for name, tensor in before.items():
            same = torch.equal(call.tensors[name].nan_to_num(), tensor.nan_to_num())
            assert same, f"{backend}: argument {name} was changed"
        count += 1
    return count


def _worker(
    function: Callable, operators: list[str], backends: list[str], position: Any, results: Any
) -> None:
    torch.set_num_threads(1)
    for seed in itertools.count(position[0]):
        for index in range(position[1], len(operators)):
            position[0], position[1] = seed, index
            try:
                results.put((None, function(operators[index], seed, backends)))
            except Exception as error:
                text = " ".join(str(error).split())[:300]
                results.put((f"{operators[index]} {seed}: {type(error).__name__}: {text}", 0))
        position[1] = 0


def many(
    calls: int,
    backends: list[str],
    operators: list[str],
    seed: int,
    limit_s: float,
    function: Callable[[str, int, Sequence[str]], int] = run,
) -> tuple[int, list[str]]:
    """Draw calls in a child process until there are enough; the number of calls, and the faults."""
    context = multiprocessing.get_context("spawn")
    position, total, faults, end = context.Array("q", [seed, 0]), 0, [], time.monotonic() + limit_s
    while total < calls and time.monotonic() < end:
        results = context.Queue()
        arguments = (function, operators, backends, position, results)
        child = context.Process(target=_worker, args=arguments, daemon=True)
        child.start()
        while total < calls and time.monotonic() < end:
            try:
                fault, count = results.get(timeout=5)
            except Exception:
                if child.is_alive():
                    continue
                where = f"{operators[position[1]]} {position[0]}"
                faults.append(f"{where}: the process died, exit code {child.exitcode}")
                print(faults[-1], flush=True)
                position[1] += 1
                break
            total += count
            if fault is not None:
                faults.append(fault)
                print(fault, flush=True)
        child.kill()
        child.join()
    return total, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=int(os.environ.get("SEGVIT_FUZZ_EXAMPLES", "1000")))
    parser.add_argument("--backends", nargs="+", default=["eager", "cpu"])
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=list(OPERATORS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds")
    options = parser.parse_args()
    start = time.monotonic()
    total, faults = many(options.calls, options.backends, options.operators, options.seed, options.limit)
    names, seconds = ", ".join(options.backends), time.monotonic() - start
    print(f"{total} calls on {names} in {seconds:.0f} s: {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
