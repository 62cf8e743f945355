"""Launches of LayerNorm with subsampling."""

import torch

from segvit_kernels.testing.launches import Demand
from segvit_kernels.triton import subsample_norm

KERNELS = {
    "_subsample_norm_fwd_kernel": Demand(12),
    "_subsample_norm_bwd_kernel": Demand(12),
    "_subsample_norm_bwd_parameters_kernel": Demand(12, barriers=0),
}

# name: (batch, rows, columns, channels), dtype of x, options
EVERYWHERE = {
    "qd_vit_l": ((16, 40, 40, 1024), "bfloat16", {}),
    "qd_vit_b batch 1": ((1, 32, 32, 768), "bfloat16", {}),
    "width 96": ((16, 40, 40, 96), "bfloat16", {}),
    "width 8192": ((1, 40, 40, 8192), "bfloat16", {}),
    "autocast": ((16, 40, 40, 1024), "float32", {"dtype": "bfloat16", "parameters": "float32"}),
    "fp32": ((16, 40, 40, 1024), "float32", {}),
    "fp32 width 1536": ((16, 37, 37, 1536), "float32", {"prefix_tokens": 5}),
    "fp32 width 8192": ((1, 40, 40, 8192), "float32", {}),
}
MORE = {
    "qd_vit_s": ((16, 45, 60, 384), "float16", {"prefix_tokens": 1}),
    "qd_vit_g": ((16, 37, 37, 1536), "bfloat16", {"prefix_tokens": 5}),
    "odd": ((1, 5, 7, 33), "float16", {"prefix_tokens": 1}),
    "odd width 1001": ((2, 5, 7, 1001), "bfloat16", {"prefix_tokens": 1}),
    "width 8": ((2, 5, 7, 8), "float16", {}),
    "gapped": ((16, 40, 40, 1024), "bfloat16", {"gap": 1}),
    "ones": ((1, 1, 1, 1), "float32", {}),
    "not affine": ((16, 40, 40, 1024), "bfloat16", {"parameters": None}),
    "all tokens only": ((16, 40, 40, 1024), "bfloat16", {"used": (0,)}),
}
MAIN = "qd_vit_l"


def wgmma(row):
    return False  # no matrix products


def launches(case, arch):
    """All launches of one forward and one backward."""
    (batch, height, width, channels), name, options = case
    x_dtype = getattr(torch, name)
    dtype = getattr(torch, options.get("dtype", name))
    parameters = options.get("parameters", name)
    place = (height, width, options.get("stride", 2), options.get("prefix_tokens", 0))
    with torch.device("meta"):
        tokens, gap = place[3] + height * width, options.get("gap", 0)
        x = torch.empty(batch, tokens, channels + gap, dtype=x_dtype)[..., :channels]
        weight = None if parameters is None else torch.empty(channels, dtype=getattr(torch, parameters))
    fwd = subsample_norm._fwd_config(tuple(x.shape), x_dtype, arch)
    bwd = subsample_norm._bwd_config(tuple(x.shape), x_dtype, arch)
    results, first = subsample_norm._fwd_launches(x, weight, weight, *place, 1e-6, dtype, fwd)
    grads = [g if i in options.get("used", (0, 1, 2)) else None for i, g in enumerate(results[:3])]
    _, second = subsample_norm._bwd_launches(*grads, x, weight, *results[3:], *place, bwd)
    return [*first, *second]
