"""Launches of the ATM operator."""

import torch

from segvit_kernels.testing.launches import Demand
from segvit_kernels.triton import atm

# Where ptxas waits after every wgmma; the last product, of the gradient of the masks, makes it.
_KEY = (
    *(
        "ade_vit_l batch 1",
        "ade_vit_l",
        "pc_vit_l",
        "coco_vit_l",
        "cityscapes_like",
        "output only",
        "masks only",
    ),
    *("dim 16", "dim 64", "dim 128", "dropout", "padding"),
)

KERNELS = {
    "_atm_fwd_kernel": Demand(32, tensor=3, stack=8, serialised=("dropout",)),
    "_attention_combine_kernel": Demand(12),
    "_attention_bwd_query_kernel": Demand(32, tensor=3, serialised=("dropout", "pc_vit_l")),
    "_attention_bwd_key_kernel": Demand(32, tensor=4, stack=64, serialised=_KEY),
    "_attention_bwd_sum_kernel": Demand(4),
    "_atm_fwd_heads_kernel": Demand(32, tensor=2, everywhere=False),
}

# name: (batch, queries, keys, heads, head dim), dtype, options
EVERYWHERE = {
    "ade_vit_l batch 1": ((1, 150, 1600, 16, 32), "bfloat16", {}),
    "dim 16": ((16, 150, 1600, 8, 16), "bfloat16", {}),
    "dim 64": ((16, 150, 1600, 8, 64), "bfloat16", {}),
    "dim 128": ((16, 150, 1600, 8, 128), "bfloat16", {}),
    "dropout": ((16, 150, 1600, 16, 32), "bfloat16", {"dropout": True}),
    "padding": ((16, 150, 1600, 16, 32), "bfloat16", {"padded": True}),
    "fp32": ((16, 150, 1600, 16, 32), "float32", {}),
    "fp32 dim 128": ((16, 150, 1600, 8, 128), "float32", {}),
}
MORE = {
    "ade_vit_l": ((16, 150, 1600, 16, 32), "bfloat16", {}),
    "pc_vit_l": ((16, 60, 900, 16, 32), "bfloat16", {}),
    "coco_vit_l": ((16, 171, 1024, 16, 32), "float16", {}),
    "cityscapes_like": ((1, 19, 8192, 8, 64), "bfloat16", {}),
    "odd": ((2, 201, 1025, 3, 24), "bfloat16", {}),
    "ones": ((1, 1, 1, 1, 16), "float16", {}),
    "masks only": ((16, 150, 1600, 16, 32), "bfloat16", {"grad_output": False}),
    "output only": ((16, 150, 1600, 16, 32), "bfloat16", {"masks": False}),
    "plan heads": ((16, 150, 1600, 16, 32), "bfloat16", {"plan": "heads", "num_stages": 2}),
}
MAIN = "ade_vit_l"


def wgmma(row):
    return not row["kernel"].endswith(("combine_kernel", "sum_kernel")) and "fp32" not in row["case"]


def launches(case, arch):
    """All launches of one forward and one backward."""
    shape, dtype, options = case
    options, dtype = dict(options), getattr(torch, dtype)
    batch, queries, keys, heads, dim = shape
    dropout, masks = options.pop("dropout", False), options.pop("masks", True)
    padded = options.pop("padded", False)
    with_output = options.pop("grad_output", True)
    with torch.device("meta"):
        query = torch.empty(batch, queries, heads, dim, dtype=dtype)
        key = torch.empty(batch, keys, heads, dim, dtype=dtype)
        previous = torch.empty(batch, queries, keys, dtype=dtype) if masks else None
        lse = torch.empty(batch, heads, queries)
        seed = torch.empty(1, dtype=torch.int64) if dropout else None
        pads = torch.empty(batch, keys, dtype=torch.bool) if padded else None
    common = (seed, dim**-0.5, 0.1 if dropout else 0.0)
    fwd = {**atm._fwd_config(shape, dtype, arch, dropout or padded), **options}
    _, all_launches = atm._fwd_launches(query, key, key, previous, *common, masks, pads, fwd)
    if "plan" not in options:
        bwd = atm._bwd_config(shape, dtype, arch, dropout or padded)
        grad_output = query if with_output else None
        all_launches += atm._bwd_launches(
            grad_output, previous, query, key, key, query, lse, *common, pads, bwd
        )[1]
    return all_launches
