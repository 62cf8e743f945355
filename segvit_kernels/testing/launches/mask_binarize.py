"""Launches of binary masks."""

import torch

from segvit_kernels.testing.launches import Demand
from segvit_kernels.triton import mask_binarize

KERNELS = {
    "_mask_binarize_kernel": Demand(16, barriers=0),
    "_mask_binarize_merge_kernel": Demand(12, barriers=0),
}

# name: (batch, masks, grid height, grid width, height, width), dtype of the logits, options
MASK2FORMER = (1, 100, 256, 256, 1024, 1024)
EVERYWHERE = {
    "mask2former": (MASK2FORMER, "float32", {"layout": 0}),
    "mask2former packed": (MASK2FORMER, "bfloat16", {"layout": 1}),
    "mask2former rle": (MASK2FORMER, "float32", {"layout": 2}),
    "boxes": ((2, 100, 28, 28, 800, 1333), "float16", {"layout": 0, "boxes": True}),
    "boxes rle": ((2, 100, 28, 28, 800, 1333), "float32", {"layout": 2, "boxes": True}),
}
MORE = {
    "rf_detr": ((1, 300, 108, 108, 1080, 1920), "bfloat16", {"layout": 0}),
    "boxes packed": ((2, 100, 28, 28, 800, 1333), "bfloat16", {"layout": 1, "boxes": True}),
    "half": (MASK2FORMER, "float16", {"layout": 2}),
    "ones": ((1, 1, 1, 1, 1, 1), "float32", {"layout": 0}),
    "one mask": ((1, 1, 64, 64, 640, 640), "float32", {"layout": 1}),
}
MAIN = "mask2former rle"


def wgmma(row):
    return False  # no matrix products


def launches(case, arch):
    """All launches of one call."""
    (batch, count, h, w, height, width), dtype, options = case
    with torch.device("meta"):
        logits = torch.empty(batch, count, h, w, dtype=getattr(torch, dtype))
        boxes = torch.empty(batch, count, 4) if options.get("boxes") else None
    config = mask_binarize._config((batch * count, height, width), options["layout"], arch)
    return mask_binarize._launches(logits, boxes, height, width, 0.0, options["layout"], config)[1]
