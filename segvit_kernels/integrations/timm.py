"""timm's attention pooling on :func:`~segvit_kernels.fused_atm`, which also says where it looks.

pool = FusedAttentionPool(model.attn_pool)      # timm.layers.AttentionPoolLatent: SigLIP, MAP heads
features, masks = pool(tokens, need_masks=True)  # masks (B, latents, N), before the sigmoid
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from segvit_kernels._folding import is_hooked
from segvit_kernels.integrations._kinds import known_base, overridden
from segvit_kernels.ops.atm import fused_atm
from segvit_kernels.ops.attention_weights import attention_weights

_PARTS = ("q", "kv", "q_norm", "k_norm", "proj", "proj_drop", "norm")


class PooledMaps(NamedTuple):
    """The pool's ``output``; ``mask_logits`` and ``weights``, (B, latents, N) or ``None``: the mean over
    heads of the similarities before and after the softmax."""

    output: Tensor
    mask_logits: Tensor | None
    weights: Tensor | None


class FusedAttentionPool(nn.Module):
    """timm's ``AttentionPoolLatent`` with its modules under their own names, and its maps on request.

    The state dict is the pool's. The same output, but for ``attn_mask``, which it does not take.

    Args:
        pool: a ``timm.layers.AttentionPoolLatent``. Its modules are taken over.

    Raises:
        TypeError: ``pool`` lacks what one has, or has more: modules, parameters, hooks, another ``forward``.
    """

    q: Any
    kv: Any
    q_norm: Any
    k_norm: Any
    proj: Any
    proj_drop: Any
    norm: Any
    mlp: Any
    pos_embed: Any

    def __init__(self, pool: Any) -> None:
        super().__init__()
        missing = [name for name in (*_PARTS, "latent", "num_heads", "pool") if not hasattr(pool, name)]
        if missing:
            raise TypeError(
                f"pool is a {type(pool).__name__} without {', '.join(missing)}; expected timm's "
                "AttentionPoolLatent"
            )
        more = {name for name, _ in pool.named_children()} | pool._parameters.keys() | pool._buffers.keys()
        more -= {*_PARTS, "mlp", "latent", "pos_embed"}
        base = known_base(type(pool), ("AttentionPoolLatent",))
        if is_hooked(pool):
            more = {"hooks"}
        elif base is not None and overridden(pool, base, "forward"):
            more = {"a forward of its own"}
        if more:
            raise TypeError(
                f"pool is a {type(pool).__name__} with {', '.join(sorted(more))}; expected timm's "
                "AttentionPoolLatent as it is"
            )
        self.num_heads, self.pool, self.scale = pool.num_heads, pool.pool, getattr(pool, "scale", None)
        for name in _PARTS:
            setattr(self, name, getattr(pool, name))
        self.mlp = getattr(pool, "mlp", None)
        self.latent = pool.latent
        self.register_parameter("pos_embed", getattr(pool, "pos_embed", None))
        self.training = pool.training

    def forward(self, x: Tensor, need_masks: bool = False, need_weights: str | None = None) -> Any:
        """The pooled features (B, C), or (B, latents, C) where the pool keeps its latents.

        Args:
            x: tokens (B, N, C).
            need_masks: the mean over heads of the similarities too, before the softmax.
            need_weights: "mean" for that of the weights too, after the softmax.

        Returns:
            A tensor, or with either of them :class:`PooledMaps`.

        Raises:
            ValueError: ``need_weights`` is neither ``None`` nor "mean".
        """
        if need_weights not in (None, "mean"):
            raise ValueError(f"need_weights is {need_weights!r}; expected None or 'mean'")
        if self.pos_embed is not None:
            x = x + self.pos_embed.to(x.dtype)
        query = self.q_norm(self.q(self.latent).unflatten(-1, (self.num_heads, -1)))
        key, value = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        key = self.k_norm(key)
        output, masks = fused_atm(query, key, value, scale=self.scale, need_masks=need_masks)
        output = self.proj_drop(self.proj(output.flatten(-2)))
        if self.mlp is not None:
            output = output + self.mlp(self.norm(output))
        if self.pool == "token":
            output = output[:, 0]
        elif self.pool == "avg":
            output = output.mean(1)
        if not need_masks and need_weights is None:
            return output
        weights = attention_weights(query, key, scale=self.scale) if need_weights else None
        return PooledMaps(output, masks, weights)
