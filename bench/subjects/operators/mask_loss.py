"""The mask loss: peers, checks, costs and targets. Timed is 20 · focal + dice (bce + dice for masks), summed
over the outputs of deep supervision, from their logits to the gradients of these."""

from __future__ import annotations

from collections.abc import Callable
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
    Target,
    budget_row,
    by_image,
    compilations,
    on_backends,
    truth_and_ordinary,
)
from segvit_kernels import mask_loss
from segvit_kernels.testing.mask_loss import SHAPES, MaskLossCase, as_list, oracle, stacked

TINY = MaskLossCase("tiny", 1, 5, ((4, 4), (4, 4)), (24, 20))
BATCHES = (16, 1, 4)


def _entries(leaves: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for name, tensor in leaves.items() if name.startswith("mask_logits")]


def _total(focal: list[Tensor], bce: list[Tensor], dice: list[Tensor], labels: bool) -> Tensor:
    """SegViT's weights, or Mask2Former's."""
    return 20 * sum(focal) + sum(dice) if labels else 5 * sum(bce) + 5 * sum(dice)


def fused(leaves: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
    targets, matches = leaves["targets"], leaves.get("matches")
    entries = _entries(leaves)
    labels = targets.ndim == 3
    classes = entries[0].shape[1] if labels else None
    result = mask_loss(entries, targets, matches=matches, num_classes=classes, backend=backend)
    return (_total(result.focal, result.bce, result.dice, labels),)


def pairs(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Image, query and full-size target (P, H, W) of every active pair: where the plain formula begins."""
    targets, matches = leaves["targets"], leaves.get("matches")
    if targets.ndim == 3:
        found = [labels.unique() for labels in targets]
        queries = [classes[classes != 255].long() for classes in found]
        masks = [labels == own[:, None, None] for labels, own in zip(targets, queries, strict=True)]
    else:
        queries = [(own >= 0).nonzero()[:, 0] for own in matches]
        masks = [m[own[q]] for m, own, q in zip(targets, matches, queries, strict=True)]
    images = [torch.full_like(q, index) for index, q in enumerate(queries)]
    return torch.cat(images), torch.cat(queries), torch.cat(masks)


def pair_losses(entries: list[Tensor], target: Tensor, labels: bool) -> Tensor:
    """Focal or BCE, and dice, of gathered logits (P, h, w) upsampled to their targets (P, H, W)."""
    focal, bce, dice = [], [], []
    target = target.to(entries[0].dtype)
    count = max(1, len(target))
    for logits in entries:
        x = F.interpolate(logits[:, None], target.shape[1:], mode="bilinear", align_corners=False)[:, 0]
        p = x.sigmoid()
        cross_entropy = F.binary_cross_entropy_with_logits(x, target, reduction="none")
        if labels:
            alpha = 0.25 * target + 0.75 * (1 - target)
            p_t = p * target + (1 - p) * (1 - target)
            focal.append((alpha * cross_entropy * (1 - p_t) ** 2).mean((1, 2)).sum() / count)
        else:
            bce.append(cross_entropy.mean((1, 2)).sum() / count)
        p, t = p.flatten(1), target.flatten(1)
        dice.append((1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).sum() / count)
    return _total(focal, bce, dice, labels)


def plain(leaves: dict[str, Tensor], losses=pair_losses) -> tuple[Tensor, ...]:
    images, queries, target = pairs(leaves)
    gathered = [entry[images, queries].float() for entry in _entries(leaves)]
    return (losses(gathered, target, leaves["targets"].ndim == 3),)


def peers(backend: str) -> list[Peer]:
    gather = "pairs gathered, upsampled to full size, focal/BCE and dice there"
    return [
        *on_backends(backend, "mask_loss", fused),
        Peer("plain", gather, lambda x: plain(x)),
        *compilations(pair_losses, f"torch.compile: {gather}", call=lambda f, x: plain(x, f), dynamic=True),
    ]


def inputs(case: MaskLossCase, dtype: torch.dtype, device: torch.device) -> tuple[dict, tuple]:
    """Leaves ``mask_logits 0``, ...; ``targets`` (labels int64, or masks) and ``matches``; gradient one."""
    drawn = case.inputs(dtype, device, seed=torch.randint(2**31, (1,)).item())
    leaves = {f"mask_logits {i}": t.requires_grad_() for i, t in enumerate(as_list(drawn["mask_logits"]))}
    leaves |= {name: drawn[name] for name in ("targets", "matches") if name in drawn}
    return leaves, (torch.ones((), device=device),)


def _active(case: MaskLossCase) -> float:
    """Active pairs of an image, the mean over some draws."""
    one = replace(case, batch=1, grids=((1, 1),), size=(32, 32))
    counts = []
    for seed in range(16):
        drawn = one.inputs(torch.float32, seed=seed)
        labels = drawn["targets"]
        counts.append((labels.unique() < 255).sum() if labels.ndim == 3 else (drawn["matches"] >= 0).sum())
    return float(torch.stack(counts).double().mean())


def costs(case: MaskLossCase, itemsize: int, mode: str) -> list[Cost]:
    height, width = case.size
    active, pixels = case.batch * _active(case), case.batch * height * width
    cells = sum(h * w for h, w in case.grids)
    targets = pixels * (8 if case.targets == "labels" else case.num_targets)
    full = active * height * width * len(case.grids)
    # An exponential and a logarithm for every pixel of every active pair; the backward forms both again.
    forward = Cost(int(targets + active * cells * itemsize), 0, int(2 * full))
    # Gradients of all pairs are written, zeros included.
    gradients = case.batch * case.queries * cells * itemsize
    backward = Cost(int(targets + active * cells * itemsize + gradients), 0, int(2 * full))
    return [forward] if mode == "forward" else [forward, backward]


def check_cases(tiny: bool) -> list[tuple[str, MaskLossCase]]:
    if tiny:
        masks = replace(TINY, name="tiny_masks", targets="bool", num_targets=3, matched=True, weighted=True)
        return [("values", TINY), ("values", masks), ("repeat", TINY), ("graph", TINY)]
    main, *others = SHAPES
    checks = [("values", replace(main, batch=batch)) for batch in BATCHES]
    ignored = replace(main, name=f"{main.name}_mask_ignored", batch=2, options={"mask_ignored": True})
    checks += [("values", ignored), ("repeat", replace(main, batch=4)), ("graph", replace(main, batch=2))]
    odd = MaskLossCase("odd", 3, 19, ((7, 5), (9, 4)), (100, 37), weighted=True)
    soft = MaskLossCase("soft", 2, 9, ((8, 8), (4, 4)), (31, 30), "soft", 4, matched=True)
    checks += [("values", odd), ("values", soft), ("values", replace(main, name="all_ignored", targets=255))]
    return checks + [("values", replace(case, batch=b)) for case in others for b in BATCHES]


def _reduced(drawn: dict) -> tuple[dict, Tensor, Tensor, Tensor]:
    """The same problem without its inactive pairs, and image, query and new place of each that is left.

    Padded per image with unmatched queries: the float64 formula could not hold all pairs at full size.
    """
    leaves = {"targets": drawn["targets"], "matches": drawn.get("matches")}
    images, queries, _ = pairs(leaves)
    batch = len(drawn["targets"])
    place = torch.cat([torch.arange(int((images == b).sum())) for b in range(batch)]).to(images.device)
    most = int(place.max()) + 1 if len(place) else 1
    matches = torch.full((batch, most), -1, device=images.device)
    own = queries if drawn.get("matches") is None else drawn["matches"][images, queries]
    matches[images, place] = own
    logits = []
    for entry in as_list(drawn["mask_logits"]):
        kept = entry.new_zeros(batch, most, *entry.shape[2:])
        kept[images, place] = entry[images, queries]
        logits.append(kept)
    small = {**drawn, "mask_logits": logits, "matches": matches}
    if "pair_weights" in drawn:
        weights = drawn["pair_weights"].new_zeros(batch, most)
        weights[images, place] = drawn["pair_weights"][images, queries]
        small["pair_weights"] = weights
    return small, images, queries, place


def draw(check: Check, device: torch.device) -> dict[str, Any]:
    return check.case.inputs(getattr(torch, check.dtype), device, seed=torch.randint(2**31, (1,)).item())


def _step(arguments: dict, leaves: list[Tensor], backend: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    result = mask_loss(**{**arguments, "mask_logits": leaves}, backend=backend)
    values = stacked(result)
    return values.detach(), torch.autograd.grad(values.sum(), leaves)


def launch(check: Check, drawn: dict[str, Any], backend: str) -> dict[str, Tensor]:
    if check.kind == "graph":
        values, gradients = _replayed(drawn, backend)
    else:
        leaves = [t.detach().requires_grad_() for t in as_list(drawn["mask_logits"])]
        with timing.poisoned():
            values, gradients = _step(drawn, leaves, backend)
    return {"losses": values, **{f"gradient {i}": g for i, g in enumerate(gradients)}}


def _expected(small: dict[str, Any], pairs: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Losses (3, entries) and gradients of the plain formula, one image and one entry at a time."""
    batch, losses, gradients = len(small["targets"]), [], {}
    for index, entry in enumerate(as_list(small["mask_logits"])):

        def one(cut: Callable, entry: Tensor = entry) -> dict[str, Tensor]:
            arguments = {n: cut(v) if isinstance(v, Tensor) else v for n, v in small.items()}
            arguments |= {"mask_logits": cut(entry), "num_masks": max(1, pairs)}
            result, (gradient, *_) = oracle(arguments, dtype=dtype, gradients=torch.ones(3, 1))
            return {"losses": stacked(result), "gradient": gradient}

        found = by_image(batch, one, ("losses",))
        losses.append(found["losses"])
        gradients[f"gradient {index}"] = found["gradient"]
    return {"losses": torch.cat(losses, 1), **gradients}


def judge(check: Check, drawn: dict[str, Any], results: dict[str, Tensor]) -> list[dict]:
    small, images, queries, place = _reduced(drawn)
    truth, ordinary = truth_and_ordinary(
        lambda dtype: _expected(small, len(images), dtype), getattr(torch, check.dtype)
    )
    rows = []
    for name, value in results.items():
        if name == "losses":
            rows.append(budget_row(name, value, truth[name], ordinary[name].to(value.dtype)))
            continue
        expected, plainly = (found[name][images, place] for found in (truth, ordinary))
        rows.append(budget_row(name, value[images, queries], expected, plainly))
        rest = value.clone()
        rest[images, queries] = 0
        empty = not bool(rest.count_nonzero()) and bool(rest.isfinite().all())
        reason = None if empty else "not 0"
        rows.append({"quantity": f"{name} elsewhere", "passed": empty, "reason": reason})
    return rows


def _replayed(drawn: dict, backend: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Captured on other inputs, with other classes present; replayed on these."""
    leaves = [torch.randn_like(t).requires_grad_() for t in as_list(drawn["mask_logits"])]
    targets = torch.roll(drawn["targets"].clone(), 1, 0).fill_(255)
    kept: dict[str, tuple] = {}

    def work() -> None:
        kept["all"] = _step({**drawn, "targets": targets}, leaves, backend)

    graph = timing.capture(work)
    with torch.no_grad():
        targets.copy_(drawn["targets"])
        for leaf, value in zip(leaves, as_list(drawn["mask_logits"]), strict=True):
            leaf.copy_(value)
    graph.replay()
    return kept["all"]


def _targets() -> tuple[Target, ...]:
    gpu, cpu = ("gpu", "ade_vit_l", 16, "bfloat16"), ("cpu", "ade_vit_b", 1, "float32")
    both = "forward_backward"
    return (
        Target("forward + backward against plain PyTorch", *gpu, "timings", both, ("plain",), 10.0),
        Target("forward + backward against torch.compile", *gpu, "timings", both, ("compiled",), 5.0),
        Target("training memory against plain PyTorch", *gpu, "memory", both, ("plain",), None, 0.05),
        Target("forward + backward against the plain formula", *cpu, "timings", both, ("plain",), 5.0),
        Target("forward + backward against torch.compile", *cpu, "timings", both, ("compiled",), 3.0),
        Target("training memory against the plain formula", *cpu, "memory", both, ("plain",), None, 0.1),
    )


OPERATOR = Operator.of(
    globals(),
    name="mask_loss",
    cpu_shapes=(("ade_vit_b", 1), ("ade_vit_b", 4), ("cityscapes_like", 1)),
    targets=_targets(),
)
