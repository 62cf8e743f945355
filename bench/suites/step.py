"""``python -m bench step``: a training step of transformers' Mask2Former, its own loss against ours.

Random weights and images, targets that are blobs. Forms: *transformers*, its criterion and matcher;
*points*, ours at the same random points; *pixels*, ours at every pixel. The criterion alone has masks of 100
queries, auxiliary outputs included, at a quarter of the image as leaves; the step is the whole model with a
Swin-T backbone, forward and backward. Loss and gradients of *points* are compared with those of
*transformers* from the same seed. Peaks are those of a process each, beyond weights, inputs and targets.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import environment, peaks, timing
from segvit_kernels.integrations import use_fused_loss

FORMS = ("transformers", "points", "pixels")
# What runs, side of the image, targets.
SUBJECTS = {"criterion": ("criterion", 1024, 50), "step": ("step", 512, 20)}
TINY = {"criterion": ("criterion", 64, 3), "step": ("step", 64, 3)}


def _model(tiny: bool) -> nn.Module:
    import transformers as hf

    sizes: dict[str, Any] = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2]} if tiny else {}
    backbone = hf.SwinConfig(
        **sizes, window_size=4 if tiny else 7, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    width: dict[str, Any] = {"num_queries": 100}
    if tiny:
        width = {
            "num_queries": 8,
            "train_num_points": 50,
            "num_attention_heads": 2,
            "decoder_layers": 2,
            "encoder_layers": 1,
        }
        width |= dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
        width |= dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 16)
    config = hf.Mask2FormerConfig(backbone_config=backbone, num_labels=80, **width)
    torch.manual_seed(0)
    return hf.Mask2FormerForUniversalSegmentation(config).train()


def _blobs(count: int, side: int) -> Tensor:
    rough = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    masks = nn.functional.interpolate(rough, (side, side), mode="bicubic")[:, 0] > 0.5
    return masks.float()  # as the image processor gives them


def call(name: str, form: str, tiny: bool = False) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """Loss and gradients of a subject in one of the forms, from the same seed at every call."""
    what, side, count = (TINY if tiny else SUBJECTS)[name]
    model: Any = _model(tiny)
    if form != "transformers":
        use_fused_loss(model, points=form == "points")
    generator = torch.Generator().manual_seed(2)
    labels = [torch.randint(80, (count,), generator=generator)]
    masks = [_blobs(count, side)]
    if what == "step":
        images = torch.randn(1, 3, side, side, generator=generator)
        leaves = [p for p in model.parameters() if p.requires_grad]

        def loss() -> Tensor:
            return model(pixel_values=images, mask_labels=masks, class_labels=labels).loss.sum()
    else:
        criterion, queries = model.criterion, model.config.num_queries
        outputs, grid = model.config.decoder_layers, side // 4
        leaves = [
            torch.randn(1, queries, *shape, generator=generator).requires_grad_()
            for _ in range(outputs)
            for shape in ((grid, grid), (81,))
        ]
        named = [
            {"masks_queries_logits": m, "class_queries_logits": c}
            for m, c in zip(leaves[::2], leaves[1::2], strict=True)
        ]

        def loss() -> Tensor:
            first, *auxiliary = named
            found = criterion(
                **first, mask_labels=masks, class_labels=labels, auxiliary_predictions=auxiliary
            )
            return sum(found.values())

    def run() -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(3)
        value = loss()
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        return value.detach(), [g for g in gradients if g is not None]

    return run


def peak(name: str, form: str, threads: int) -> int | None:
    """Peak bytes of a call; meaningful in a process made for it."""
    torch.set_num_threads(threads)
    return peaks.resident_peak(call(name, form), warm_ups=1)


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The relative norm of the difference of all gradients together."""
    off = torch.stack([a.sub(b).double().norm() for a, b in zip(found, expected, strict=True)]).norm()
    norm = torch.stack([b.double().norm() for b in expected]).norm()
    return (off / norm).item()


def run(
    *, threads: int = 2, rounds: int = 5, smoke: bool = False, progress: Callable[[str], None] = print
) -> dict:
    """A row for every subject and form, as plain data."""
    begun = time.time()
    torch.set_num_threads(threads)
    described = {**environment.describe(torch.device("cpu")), "threads": threads}
    result = {"schema": 1, "kind": "step", "measurement": not smoke, "environment": described}
    rows: list[dict] = []
    for name in SUBJECTS:
        _, side, count = (TINY if smoke else SUBJECTS)[name]
        calls = {form: call(name, form, smoke) for form in FORMS}
        values = {form: calls[form]() for form in FORMS}  # a warm-up
        samplers = {form: timing.call_sampler(lambda run: run(), [run]) for form, run in calls.items()}
        times = timing.interleave(samplers, rounds=rounds, seconds_per_peer=float("inf"))
        loss, gradients = values["transformers"]
        for form in FORMS:
            row = {"subject": name, "side": side, "targets": count, "form": form, "status": "ok"}
            row |= {"median_s": statistics.median(times[form]), "times_s": times[form]}
            row["loss"] = values[form][0].item()
            if form == "points":
                row["loss_off"] = abs(row["loss"] / loss.item() - 1)
                row["gradients_off"] = _difference(values[form][1], gradients)
            try:
                row["extra_bytes"] = None if smoke else peaks.isolated(__name__, "peak", name, form, threads)
            except Exception as error:
                row |= {"status": "failed", "reason": timing.one_line(error)}
            rows.append(row)
            progress(f"{name} {form}: {row['median_s']:.2f} s, {row.get('extra_bytes') or 0:,} bytes")
    return result | {"rows": rows, "elapsed_s": round(time.time() - begun, 1)}
