"""Launches of the mask IoU."""

import torch

from segvit_kernels.testing.launches import Demand
from segvit_kernels.triton import mask_iou

KERNELS = {
    "_mask_iou_bits_kernel": Demand(24, tensor=1, stack=8),
    "_mask_iou_kernel": Demand(32, tensor=1, stack=8),
    "_mask_iou_sum_kernel": Demand(10, tensor=0),
}

# name: (batch, masks, grids, size), dtypes, soft
INSTANCES = (1, (100, 100), ((256, 256), (256, 256)), (1024, 1024))
EVERYWHERE = {
    "instances": (INSTANCES, ("float32", "float32"), False),
    "soft": (INSTANCES, ("float32", "float32"), True),
    "matching": ((2, (100, 50), ((160, 160), (640, 640)), (640, 640)), ("bfloat16", "bool"), True),
    "targets": ((2, (100, 50), ((160, 160), (640, 640)), (640, 640)), ("float16", "bool"), False),
}
MORE = {
    "booleans": ((1, (100, 100), ((512, 512), (512, 512)), (512, 512)), ("bool", "bool"), False),
    "as they are": ((3, (37, 19), ((33, 57), (33, 57)), (33, 57)), ("float16", "float16"), False),
    "soft as they are": ((3, (37, 19), ((33, 57), (33, 57)), (33, 57)), ("float32", "float32"), True),
    "ones": ((1, (1, 1), ((1, 1), (1, 1)), (1, 1)), ("float32", "bool"), False),
}
MAIN = "instances"


def wgmma(row):
    return False


def launches(case, arch):
    """The launches of one call after those that make bits, which are of mask_binarize."""
    (batch, counts, grids, size), dtypes, soft = case
    with torch.device("meta"):
        a, b = (
            torch.empty(batch, n, *grid, dtype=getattr(torch, dtype))
            for n, grid, dtype in zip(counts, grids, dtypes, strict=True)
        )
    return mask_iou._launches(a, b, *size, soft, 0.0, mask_iou._config(arch))[1][-2:]
