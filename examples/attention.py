"""Where attention looks: nn.MultiheadAttention and timm's latent pooling with their maps. No downloads.

python -m examples.attention                      # with timm installed, its pooling too
"""

import importlib.util

import torch
from torch import nn

from segvit_kernels import FusedATM
from segvit_kernels.integrations import FusedAttentionPool


def multihead() -> None:
    """The same output and weights, without those of every head in memory."""
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    layer = FusedATM.from_multihead(attention)
    queries, tokens = torch.randn(2, 10, 64), torch.randn(2, 400, 64)
    with torch.no_grad():
        output, weights = attention(queries, tokens, tokens, need_weights=True)
        found = layer(queries, tokens, need_weights="mean")
    apart = (found.output - output).abs().max(), (found.weights - weights).abs().max()
    print(f"nn.MultiheadAttention: output apart by {apart[0]:.0e}, weights by {apart[1]:.0e}")
    masks = found.mask_logits.unflatten(-1, (20, 20)).sigmoid() > 0.5
    print(f"and a mask of each query, {tuple(masks.shape)}")


def pooling() -> None:
    """timm's attention pooling, and which tokens it pooled."""
    from timm.layers import AttentionPoolLatent

    pool = AttentionPoolLatent(64, num_heads=4, norm_layer=nn.LayerNorm).eval()
    tokens = torch.randn(2, 196, 64)
    with torch.no_grad():
        expected = pool(tokens)
        found = FusedAttentionPool(pool)(tokens, need_masks=True, need_weights="mean")
    apart = (found.output - expected).abs().max()
    best = found.weights.argmax(-1).flatten().tolist()
    print(f"timm's AttentionPoolLatent: output apart by {apart:.0e}, most from tokens {best}")


def main() -> None:
    """Both, of random weights."""
    torch.manual_seed(0)
    multihead()
    if importlib.util.find_spec("timm") is None:
        print("timm is not installed: pip install timm")
    else:
        pooling()


if __name__ == "__main__":
    main()
