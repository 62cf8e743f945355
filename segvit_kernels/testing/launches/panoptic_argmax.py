"""Launches of the panoptic argmax."""

import torch

from segvit_kernels.testing.launches import Demand
from segvit_kernels.triton import panoptic_argmax

KERNELS = {
    "_panoptic_argmax_prepare_kernel": Demand(10, tensor=0),
    "_panoptic_argmax_kernel": Demand(20, tensor=0, stack=8),
}

# name: (batch, queries, grid, size, resized), dtype of the masks, options
MASK2FORMER = (1, 100, (256, 256), (1024, 1024), (384, 384))
EVERYWHERE = {
    "mask2former": (MASK2FORMER, "float32", {"first": True, "weighted": True}),
    "mask2former half": (MASK2FORMER, "bfloat16", {"first": True, "weighted": True}),
    "maskformer": ((2, 100, (160, 160), (640, 640), None), "float16", {"first": True, "weighted": True}),
    "eomt": ((1, 200, (160, 160), (1024, 1024), (640, 640)), "float32", {"last": True}),
    "logits": ((1, 150, (32, 32), (512, 512), None), "bfloat16", {"last": True}),
}
MORE = {
    "probabilities": ((1, 100, (160, 160), (640, 640), None), "float32", {}),
    "fp32 logits": ((1, 100, (160, 160), (640, 640), None), "float32", {"last": True}),
    "odd": ((3, 37, (23, 11), (333, 517), (31, 47)), "float16", {"first": True}),
    "ones": ((1, 1, (1, 1), (1, 1), None), "float16", {"last": True}),
}
MAIN = "mask2former"


def wgmma(row):
    return False


def launches(case, arch):
    """All launches of one call."""
    (batch, queries, grid, size, resized), dtype, options = case
    with torch.device("meta"):
        masks = torch.empty(batch, queries, *grid, dtype=getattr(torch, dtype))
        scores = torch.empty(batch, queries)
    resized = resized or grid
    flags = [options.get(name, False) for name in ("first", "last")]
    sizes = (*size, *resized, *resized)
    arguments = (masks, scores, *sizes, *flags, 0.5, options.get("weighted", False))
    return panoptic_argmax._launches(*arguments, panoptic_argmax._config(arch))[1]
