"""Launches of the semantic argmax."""

import torch

from segvit_kernels.testing.launches import Demand
from segvit_kernels.triton import semantic_argmax

# More queries than a program has registers for; they need no more shared memory than fewer.
# With views Triton 3.6 has ptxas wait after every wgmma: scores stay in registers from view to view.
KERNELS = {
    "_semantic_argmax_prepare_kernel": Demand(20, stack=8, spilled=("2100 queries",)),
    "_semantic_argmax_kernel": Demand(32, tensor=2, serialised=("ade_vit_l views", "stride 4 views")),
    "_semantic_argmax_held_kernel": Demand(32, tensor=2, everywhere=False),
}

# name: (batch, height, width, queries, classes, grid height, grid width), dtype of the masks, options
ADE = (16, 640, 640, 150, 150, 40, 40)
EVERYWHERE = {
    "ade_vit_l": (ADE, "bfloat16", {}),
    "ade_vit_l views": (ADE, "float16", {"reach": 1 / 16}),
    "coco_vit_l": ((16, 512, 512, 171, 171, 32, 32), "bfloat16", {}),
    "300 classes": ((4, 640, 640, 300, 300, 40, 40), "bfloat16", {"reach": 1 / 16}),
    "2100 queries": ((1, 512, 512, 2100, 20, 32, 32), "bfloat16", {}),
    "stride 4 views": (ADE, "bfloat16", {"reach": 0.3}),
    "smaller output": ((4, 100, 100, 150, 150, 160, 160), "bfloat16", {}),
    "fp32": (ADE, "float32", {}),
    "fp32 views": (ADE, "float32", {"reach": 1 / 16}),
    "fp32 smaller output": ((4, 100, 100, 150, 150, 160, 160), "float32", {}),
}
MORE = {
    "ade_vit_l batch 1": ((1, *ADE[1:]), "bfloat16", {}),
    "pc_vit_l": ((16, 480, 480, 60, 60, 30, 30), "bfloat16", {}),
    "cityscapes_like": ((1, 1024, 2048, 19, 19, 64, 128), "float16", {}),
    "odd": ((2, 333, 517, 37, 21, 23, 11), "bfloat16", {}),
    "ones": ((1, 1, 1, 1, 1, 1, 1), "float16", {}),
    "scores": (ADE, "bfloat16", {"scores": True, "prune": 0.1}),
    "scores views": (ADE, "bfloat16", {"scores": True, "reach": 1 / 16}),
    "no activation": (ADE, "bfloat16", {"sigmoid": False}),
    "smaller output views": (ADE, "bfloat16", {"reach": 1.0}),
    "171 classes views": ((16, 512, 512, 171, 171, 32, 32), "bfloat16", {"reach": 1 / 16}),
    "847 classes": ((4, 640, 640, 100, 847, 160, 160), "bfloat16", {}),
    "fp32 300 classes": ((4, 640, 640, 300, 300, 40, 40), "float32", {}),
    "fp32 smaller output views": (ADE, "float32", {"reach": 1.0}),
}
MAIN = "ade_vit_l"


def wgmma(row):
    return "prepare" not in row["kernel"] and "fp32" not in row["case"]


def launches(case, arch):
    """All launches of one call."""
    (batch, height, width, queries, classes, h, w), dtype, options = case
    dtype, reach = getattr(torch, dtype), options.get("reach")
    count = 4 * batch if reach else batch
    with torch.device("meta"):
        masks = torch.empty(count, queries, h, w, dtype=dtype)
        class_probs = torch.empty(count, queries, classes, dtype=dtype)
        views = []
        if reach:
            views = [torch.empty(n, dtype=torch.int32) for n in ((batch + 1,), (count, 7))]
            views.append(torch.empty(count, 4))
    steps = (reach, reach) if reach else (h / height, w / width)
    config = semantic_argmax.found_config(masks, class_probs, views, batch, height, width, list(steps), arch)
    arguments = (options.get("sigmoid", True), options.get("scores", False), options.get("prune", 0.0))
    return semantic_argmax._launches([masks], class_probs, views, batch, height, width, *arguments, config)[1]
