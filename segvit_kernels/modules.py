"""Drop-in ``nn.Module`` forms of the operators."""

from __future__ import annotations

from torch import Tensor, nn

from segvit_kernels.ops.atm import ATMOutput, fused_atm


class FusedATM(nn.Module):
    """Multi-head attention-to-mask with its projections (SegViT, NeurIPS 2022, section 3.2).

    Class tokens attend to image features; the head-mean of the similarity map, before softmax and dropout,
    is the second output: sigmoid makes it the masks of the classes.

    Args:
        embed_dim: width C of tokens and features.
        num_heads: number of heads H; must divide ``embed_dim``.
        qkv_bias: biases in the q, k and v projections.
        attn_drop: dropout of the attention weights while training.
        proj_drop: dropout of the projected output while training.

    Raises:
        ValueError: ``num_heads`` does not divide ``embed_dim``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; expected a divisor of embed_dim {embed_dim}")
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.q = nn.Linear(embed_dim, embed_dim, bias=qkv_bias)
        self.k = nn.Linear(embed_dim, embed_dim, bias=qkv_bias)
        self.v = nn.Linear(embed_dim, embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights (0.02) and zero biases."""
        for linear in (self.q, self.k, self.v, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(
        self,
        query: Tensor,
        features: Tensor,
        value: Tensor | None = None,
        previous_masks: Tensor | None = None,
        need_masks: bool = True,
    ) -> ATMOutput:
        """Update tokens from features and give the masks.

        Args:
            query: class tokens, (B, Nq, C) or (1, Nq, C) for tokens that all images share.
            features: keys before projection, (B, Nk, C); also the values unless ``value`` is given.
            value: values before projection, (B, Nk, C).
            previous_masks: masks of earlier stages, (B, Nq, Nk), added to the new ones.
            need_masks: whether ``mask_logits`` is wanted.

        Returns:
            ``output`` (B, Nq, C) and ``mask_logits`` (B, Nq, Nk), or ``None`` without ``need_masks``.
        """
        value = features if value is None else value
        return self.attend(self.q(query), self.k(features), self.v(value), previous_masks, need_masks)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        previous_masks: Tensor | None = None,
        need_masks: bool = True,
    ) -> ATMOutput:
        """:meth:`forward` after the projections q, k and v, for callers that stack or fold these.

        Args:
            query: (B, Nq, C) or (1, Nq, C). key, value: (B, Nk, C). All three may be strided slices.
        """
        output, masks = fused_atm(
            *(x.unflatten(-1, (self.num_heads, -1)) for x in (query, key, value)),
            dropout_p=self.attn_drop if self.training else 0.0,
            previous_masks=previous_masks,
            need_masks=need_masks,
        )
        return ATMOutput(self.proj_drop(self.proj(output.flatten(-2))), masks)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, attn_drop={self.attn_drop}"
