"""Launches of the query attention."""

import torch

from segvit_kernels.testing.launches import Demand
from segvit_kernels.triton import query_attention

# Where ptxas waits after every wgmma. Forward: at 80 registers three programs fit a multiprocessor and hide
# the waits; by a simulation of the machine code 1115 cycles for 128 × 128 scores, where two programs without
# such waits take 1525. For the others nothing tried helps.
_TAIL = ("qu_cross_low", "qu_cross_low batch 1")
_FORWARD = ("qu_self", "shared queries", "key splits", "dim 16", "dropout", *_TAIL)
_KEY = ("dim 128", "dropout", "key splits", "qd_vit_l", "qd_vit_l batch 1")

KERNELS = {
    "_query_attention_fwd_kernel": Demand(32, tensor=2, serialised=_FORWARD),
    "_attention_combine_kernel": Demand(12),
    "_attention_bwd_query_kernel": Demand(32, tensor=3, serialised=("dropout", *_TAIL)),
    "_attention_bwd_key_kernel": Demand(32, tensor=4, stack=16, serialised=_KEY),
    "_attention_bwd_sum_kernel": Demand(4),
}

# name: (batch, queries, keys, heads, head dim), dtype, options
EVERYWHERE = {
    "qu_self": ((16, 1600, 1600, 16, 32), "bfloat16", {}),
    "qd_vit_l batch 1": ((1, 400, 1600, 16, 64), "bfloat16", {}),
    "key splits": ((1, 100, 1600, 16, 32), "bfloat16", {}),
    "dim 16": ((16, 1600, 1600, 8, 16), "bfloat16", {}),
    "dim 128": ((16, 400, 1600, 8, 128), "bfloat16", {}),
    "dropout": ((16, 1600, 1600, 16, 32), "bfloat16", {"dropout": True}),
    "padding": ((16, 1600, 1600, 16, 32), "bfloat16", {"padded": True}),
    "fp32": ((16, 1600, 1600, 16, 32), "float32", {}),
    "fp32 dim 128": ((16, 400, 1600, 8, 128), "float32", {}),
}
MORE = {
    "qd_vit_l": ((16, 400, 1600, 16, 64), "float16", {}),
    "qu_cross_low": ((16, 1600, 400, 16, 32), "bfloat16", {}),
    "qu_cross_low batch 1": ((1, 1600, 400, 16, 32), "bfloat16", {}),
    "shared queries": ((16, 1600, 1600, 16, 32), "bfloat16", {"shared": True}),
    "odd": ((2, 201, 1025, 3, 24), "bfloat16", {}),
    "ones": ((1, 1, 1, 1, 16), "float16", {}),
}
MAIN = "qu_self"


def wgmma(row):
    return not row["kernel"].endswith(("combine_kernel", "sum_kernel")) and "fp32" not in row["case"]


def launches(case, arch):
    """All launches of one forward and one backward."""
    shape, dtype, options = case
    dtype, (batch, queries, keys, heads, dim) = getattr(torch, dtype), shape
    dropout, shared = options.get("dropout", False), options.get("shared", False)
    padded = options.get("padded", False)
    with torch.device("meta"):
        query = torch.empty(1 if shared else batch, queries, heads, dim, dtype=dtype)
        output = torch.empty(batch, queries, heads, dim, dtype=dtype)
        key = torch.empty(batch, keys, heads, dim, dtype=dtype)
        lse = torch.empty(batch, heads, queries)
        seed = torch.empty(1, dtype=torch.int64) if dropout else None
        pads = torch.empty(batch, keys, dtype=torch.bool) if padded else None
    common = (seed, dim**-0.5, 0.1 if dropout else 0.0)
    fwd = query_attention._fwd_config(shape, dtype, arch, dropout or padded)
    _, found = query_attention._fwd_launches(query, key, key, *common, pads, fwd)
    bwd = query_attention._bwd_config(shape, dtype, arch, dropout or padded)
    gradients = (output, None)
    found += query_attention._bwd_launches(*gradients, query, key, key, output, lse, *common, pads, bwd)[1]
    return found
