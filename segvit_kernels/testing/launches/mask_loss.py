"""Launches of the mask loss operators."""

import torch

from segvit_kernels.testing.launches import Demand
from segvit_kernels.triton import mask_loss

# The list of active pairs, made by one program of the first two, has sums over all threads in a loop.
KERNELS = {
    "_mask_labels_kernel": Demand(24),
    "_mask_area_kernel": Demand(16),
    "_mask_pairs_kernel": Demand(16),
    "_mask_sum_kernel": Demand(12, barriers=0),
    "_mask_loss_fwd_kernel": Demand(64, barriers=0),
    "_mask_loss_sum_kernel": Demand(12, barriers=0),
    "_mask_loss_bwd_kernel": Demand(64, barriers=0),
    "_mask_matching_kernel": Demand(64, tensor=6),
}

# name: batch, queries, grids, target shape after the batch, dtype of the logits, of the targets, options
EVERYWHERE = {
    "ade_vit_l": (16, 150, [(40, 40)] * 3, (640, 640), "bfloat16", "uint8", {}),
    "fp32 int64": (2, 150, [(40, 40)], (640, 640), "float32", "int64", {}),
    "masks": (2, 100, [(256, 256), (64, 64)], (40, 1024, 1024), "float16", "bool", {"matches": True}),
    "fp32 soft masks": (2, 100, [(256, 256)], (40, 1024, 1024), "float32", "float32", {"matches": True}),
}
MORE = {
    "batch 1, ignored": (1, 150, [(40, 40)], (640, 640), "bfloat16", "uint8", {"mask_ignored": True}),
    "gamma": (4, 150, [(32, 32)] * 2, (512, 512), "float16", "uint8", {"gamma": 1.5}),
    "gamma soft": (
        4,
        30,
        [(32, 32)] * 2,
        (20, 512, 512),
        "float32",
        "float16",
        {"gamma": 1.5, "matches": True},
    ),
    "pc_vit_l": (16, 60, [(30, 30)] * 3, (480, 480), "bfloat16", "int16", {}),
    "cityscapes_like": (1, 19, [(64, 128)] * 4, (1024, 2048), "bfloat16", "uint8", {}),
    "odd": (2, 300, [(7, 5), (1, 1)], (100, 37), "float16", "int32", {}),
    "many entries": (2, 100, [(128, 128)] * 10, (512, 512), "bfloat16", "uint8", {"matches": True}),
    "down-scaling": (2, 19, [(64, 64)], (32, 48), "float32", "uint8", {}),
}
MAIN = "ade_vit_l"


def wgmma(row):
    return row["kernel"] == "_mask_matching_kernel"


def launches(case, arch):
    """All launches of one forward, one backward and one matching."""
    batch, queries, grids, shape, dtype, target_dtype, options = case
    dtype, labels = getattr(torch, dtype), len(shape) == 2
    num_targets = queries if labels else shape[0]
    with torch.device("meta"):
        logits = [torch.empty(batch, queries, *grid, dtype=dtype) for grid in grids]
        targets = torch.empty(batch, *shape, dtype=getattr(torch, target_dtype))
        matches = torch.empty(batch, queries, dtype=torch.int64) if options.get("matches") else None
        grad_sums, areas = torch.empty(len(grids), batch, queries, 4), torch.empty(batch, num_targets)
    numbers = (num_targets, 0.25, options.get("gamma", 2.0))
    flags = (options.get("mask_ignored", False),)
    fwd, bwd, matching = (mask_loss._config(f"mask_loss_{name}", arch) for name in ("fwd", "bwd", "matching"))
    _, found = mask_loss._fwd_launches(logits, targets, matches, *numbers, *flags, fwd)
    found += mask_loss._bwd_launches(grad_sums, logits, targets, matches, areas, *numbers, *flags, bwd)[1]
    return found + mask_loss._matching_launches(logits[0], targets, *numbers, matching)[1]
