"""Launches of the best classes of every pixel: the second one, as the first is the argmax's."""

import torch

from segvit_kernels.testing.launches import Demand
from segvit_kernels.triton import semantic_topk
from segvit_kernels.triton.semantic_topk import found_config

KERNELS = {"_semantic_topk_kernel": Demand(32, tensor=2, serialised=("views",))}

# name: (batch, height, width, queries, classes, grid height, grid width), dtype of the masks, k, options
ADE = (16, 640, 640, 150, 150, 40, 40)
CITY = (1, 1024, 2048, 19, 19, 64, 128)
EVERYWHERE: dict[str, tuple] = {"cityscapes_like": (CITY, "bfloat16", 3, {})}
MORE: dict[str, tuple] = {
    "ade_vit_l": (ADE, "bfloat16", 5, {}),
    "views": (ADE, "float16", 5, {"reach": 1 / 16, "sigmoid": False}),
    "fp32": (CITY, "float32", 8, {}),
    "300 classes": ((4, 640, 640, 300, 300, 40, 40), "bfloat16", 3, {"reach": 1 / 16}),
    "847 classes": ((4, 640, 640, 100, 847, 160, 160), "bfloat16", 2, {}),
    "ones": ((1, 1, 1, 1, 1, 1, 1), "float16", 1, {}),
}
MAIN = "ade_vit_l"


def wgmma(row):
    return row["case"] != "fp32"


def launches(case, arch):
    """The second launch of one call."""
    (batch, height, width, queries, classes, h, w), dtype, k, options = case
    reach = options.get("reach")
    count = 4 * batch if reach else batch
    with torch.device("meta"):
        masks = torch.empty(count, queries, h, w, dtype=getattr(torch, dtype))
        class_probs = torch.empty(count, queries, classes, dtype=masks.dtype)
        views = []
        if reach:
            views = [torch.empty(n, dtype=torch.int32) for n in ((batch + 1,), (count, 7))]
            views.append(torch.empty(count, 4))
    config = found_config(masks, class_probs, views, batch, height, width, [reach, reach], arch)
    arguments = (batch, height, width, options.get("sigmoid", True), k, 0.0)
    return semantic_topk._launches([masks], class_probs, views, *arguments, config)[1][-1:]
