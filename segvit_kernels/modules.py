"""Drop-in ``nn.Module`` forms of the operators."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segvit_kernels._autocast import autocast_dtype, without_autocast
from segvit_kernels._folding import HOOKS, Folded, is_hooked, is_plain
from segvit_kernels._rotary import apply_rotary
from segvit_kernels.ops._autograd import full_precision
from segvit_kernels.ops.atm import ATMOutput, WeightedATMOutput, fused_atm
from segvit_kernels.ops.attention_weights import attention_weights
from segvit_kernels.ops.linear import linear, pack_weight, whole_weight, why_not_packed
from segvit_kernels.ops.query_attention import query_attention
from segvit_kernels.ops.subsample_norm import check_tokens, subsample_layer_norm, subsample_tokens


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
        device, dtype: of the parameters.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; expected a divisor of embed_dim {embed_dim}")
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        linear = functools.partial(nn.Linear, embed_dim, embed_dim, device=device, dtype=dtype)
        self.q, self.k, self.v = (linear(bias=qkv_bias) for _ in range(3))
        self.proj = linear()
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights (0.02) and zero biases."""
        for layer in (self.q, self.k, self.v, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @classmethod
    def from_multihead(cls, attention: nn.MultiheadAttention) -> FusedATM:
        """A layer with copies of the weights of an ``nn.MultiheadAttention``, and what it computes.

        Tensors have the batch first, whatever ``batch_first`` was, and ``need_weights="mean"`` gives what
        ``need_weights=True`` gave (without dropout). Attention masks and weights of each head it has not.
        What is frozen stays so.

        Raises:
            TypeError: ``attention`` is no ``nn.MultiheadAttention``, has hooks or a ``forward`` of its own,
                or its parameters are not its own.
            ValueError: it has ``add_bias_kv`` or ``add_zero_attn``.
        """
        if not isinstance(attention, nn.MultiheadAttention):
            raise TypeError(f"attention is a {type(attention).__name__}; expected an nn.MultiheadAttention")
        if type(attention).forward is not nn.MultiheadAttention.forward or is_hooked(attention):
            what = "hooks" if is_hooked(attention) else "a forward of its own"
            raise TypeError(
                f"attention is a {type(attention).__name__} with {what}; expected an nn.MultiheadAttention "
                "as it is: its weights alone would be taken over"
            )
        if attention.bias_k is not None or attention.add_zero_attn:
            what = "add_zero_attn" if attention.add_zero_attn else "add_bias_kv"
            raise ValueError(f"attention has {what}=True; expected none: FusedATM sees no token but features")
        out, dim = attention.out_proj, attention.embed_dim
        if not isinstance(out.weight, Tensor):
            raise TypeError(f"attention.out_proj is a quantised {type(out).__name__}; expected nn.Linear")
        options: dict[str, Any] = {"device": out.weight.device, "dtype": out.weight.dtype}
        with torch.enable_grad():  # parts know whether they are frozen
            packed, biases = attention.in_proj_weight, attention.in_proj_bias
            weights = (
                [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
                if packed is None
                else packed.chunk(3)
            )
            parts = [None] * 3 if biases is None else biases.chunk(3)
        self = cls(dim, attention.num_heads, biases is not None, attention.dropout, **options)
        for name, weight, bias in zip(
            ("q", "k", "v", "proj"), (*weights, out.weight), (*parts, out.bias), strict=True
        ):
            layer = nn.Linear(weight.shape[1], dim, bias=bias is not None, **options)
            setattr(self, name, layer)
            for own, given in ((layer.weight, weight), (layer.bias, bias)):
                if given is not None:
                    with torch.no_grad():
                        own.copy_(given)
                    own.requires_grad_(given.requires_grad)
        return self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        features: Tensor,
        value: Tensor | None = None,
        previous_masks: Tensor | None = None,
        need_masks: bool = True,
        key_padding_mask: Tensor | None = None,
        need_weights: str | None = None,
    ) -> ATMOutput | WeightedATMOutput:
        """Update tokens from features and give the masks.

        Args:
            query: class tokens, (B, Nq, C) or (1, Nq, C) for tokens that all images share.
            features: keys before projection, (B, Nk, C); also the values unless ``value`` is given.
            value: values before projection, (B, Nk, C).
            previous_masks: masks of earlier stages, (B, Nq, Nk), added to the new ones.
            need_masks: whether ``mask_logits`` is wanted.
            key_padding_mask: (B, Nk), bool, True for tokens that no query may see.
            need_weights: "mean" for the attention weights too, after the softmax and before dropout, their
                mean over heads (:func:`~segvit_kernels.attention_weights`).

        Returns:
            ``output`` (B, Nq, C) and ``mask_logits`` (B, Nq, Nk), or ``None`` without ``need_masks``; with
            ``need_weights`` also ``weights`` (B, Nq, Nk).
        """
        value = features if value is None else value
        projected = self.q(query), self.k(features), self.v(value)
        return self.attend(*projected, previous_masks, need_masks, key_padding_mask, need_weights)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        previous_masks: Tensor | None = None,
        need_masks: bool = True,
        key_padding_mask: Tensor | None = None,
        need_weights: str | None = None,
    ) -> ATMOutput | WeightedATMOutput:
        """:meth:`forward` after the projections q, k and v, for callers that stack or fold these.

        Args:
            query: (B, Nq, C) or (1, Nq, C). key, value: (B, Nk, C). All three may be strided slices.
        """
        if need_weights not in (None, "mean"):
            raise ValueError(f"need_weights is {need_weights!r}; expected None or 'mean'")
        heads = [x.unflatten(-1, (self.num_heads, -1)) for x in (query, key, value)]
        output, masks = fused_atm(
            *heads,
            dropout_p=self.attn_drop if self.training else 0.0,
            previous_masks=previous_masks,
            need_masks=need_masks,
            key_padding_mask=key_padding_mask,
        )
        output = self.proj_drop(self.proj(output.flatten(-2)))
        if need_weights is None:
            return ATMOutput(output, masks)
        weights = attention_weights(*heads[:2], key_padding_mask=key_padding_mask)
        return WeightedATMOutput(output, masks, weights)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, attn_drop={self.attn_drop}"


class QueryDownsample(nn.Module):
    """Query-based down-sampling: a ViT block that leaves a coarser grid (SegViT, NeurIPS 2022, section 3.3).

    Queries and the residual are taken from every ``stride``-th row and column of the grid and from the prefix
    tokens, keys and values from all tokens. The output is what the block itself gives at the kept tokens, but
    for the random numbers of attention dropout. The block's modules are taken over under their own names, so
    that the keys of a state dict stay as they are.

    Args:
        block: a pre-norm block such as timm's: x + drop_path1(ls1(attn(norm1(x)))), and of the result, y,
            y + drop_path2(ls2(mlp(norm2(y)))). It has these eight modules and nothing else, ``nn.Identity()``
            for what it does not do. ``norm1`` is a LayerNorm. ``attn`` has ``num_heads`` or ``heads``, linear
            projections ``qkv`` (packed in this order), or ``q``, ``k`` and ``v``, or ``q_proj``, ``k_proj``
            and ``v_proj``, and ``proj``; it may have ``scale``, ``q_norm`` and ``k_norm`` of each head,
            ``attn_drop``, ``norm`` before ``proj`` and ``proj_drop`` after it. Projections may be wrapped
            (LoRA), parametrized, quantised or hooked, and ``norm1`` later too: they are called then.
        stride: rows 0, s, 2s, … and columns 0, s, 2s, … are kept.

    Raises:
        TypeError: the block lacks something or has something that is not understood, or it or its attention
            has hooks; the message names it.
        ValueError: ``stride`` is not a positive integer.
    """

    norm1: nn.LayerNorm
    attn: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: nn.Module, stride: int = 2) -> None:
        super().__init__()
        if not isinstance(stride, int) or stride < 1:
            raise ValueError(f"stride is {stride!r}; expected a positive integer")
        self.stride = stride
        self._projections = _check_block(block)
        for name in _BLOCK_PARTS:
            setattr(self, name, getattr(block, name))
        self.training = block.training

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        prefix_tokens: int = 0,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Tokens of the coarser grid.

        Args:
            x: (B, prefix + h·w, C): the prefix tokens, then the grid row by row.
            grid: rows h and columns w.
            prefix_tokens: how many tokens precede the grid; all are kept.
            angles: cosines and sines of rotary positions, (prefix + h·w, heads or 1, D/2) each, for channels
                i and i + D/2 of a head (:func:`segvit_kernels.apply_rotary`). Queries keep the places that
                they had on the grid.

        Returns:
            (B, prefix + ⌈h/s⌉·⌈w/s⌉, C).

        Raises:
            ValueError: ``x`` does not have the tokens of the prefix and the grid.
        """
        attn, norm = self.attn, self.norm1
        place: dict[str, Any] = {"grid": grid, "stride": self.stride, "prefix_tokens": prefix_tokens}
        if is_plain(norm):
            normed, normed_sub, x_sub = subsample_layer_norm(x, norm.weight, norm.bias, eps=norm.eps, **place)
        else:
            check_tokens(x, **place)
            normed = norm(x)
            normed_sub, x_sub = (subsample_tokens(t, **place) for t in (normed, x))
        heads = _heads(attn)
        projected = self._project(normed_sub, normed, place)
        query, key, value = (t.unflatten(-1, (heads, -1)) for t in projected)
        query, key = _apply(attn, "q_norm", query), _apply(attn, "k_norm", key)
        if angles is not None:
            query = apply_rotary(query, *(subsample_tokens(t[None], **place)[0] for t in angles))
            key = apply_rotary(key, *angles)
        dropout = getattr(attn, "attn_drop", 0.0)
        dropout = getattr(dropout, "p", 0.0) if isinstance(dropout, nn.Module) else dropout
        output = query_attention(
            query,
            key,
            value,
            scale=getattr(attn, "scale", None),
            dropout_p=dropout if attn.training else 0.0,
        ).flatten(-2)
        output = _apply(attn, "proj_drop", _apply(attn, "proj", _apply(attn, "norm", output)))
        x = x_sub + self.drop_path1(self.ls1(output))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _project(self, kept: Tensor, every: Tensor, place: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Query of the kept tokens, key and value of all."""
        modules = [getattr(self.attn, name) for name in self._projections]
        if len(modules) == 3:
            return modules[0](kept), modules[1](every), modules[2](every)
        if not is_plain(modules[0]) or isinstance(modules[0], PackedLinear):
            query, key, value = modules[0](every).chunk(3, dim=-1)
            return subsample_tokens(query, **place), key, value
        weight, bias = modules[0].weight, modules[0].bias
        width = weight.shape[0] // 3
        query = F.linear(kept, weight[:width], None if bias is None else bias[:width])
        key, value = F.linear(every, weight[width:], None if bias is None else bias[width:]).chunk(2, dim=-1)
        return query, key, value

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


_BLOCK_PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
_PROJECTIONS = (("qkv",), ("q", "k", "v"), ("q_proj", "k_proj", "v_proj"))
_ATTENTION_PARTS = ("q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop", *sum(_PROJECTIONS, ()))


def _apply(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """A module's child applied to x, if it has the child."""
    child = getattr(module, name, None)
    return x if child is None else child(x)


def _heads(attn: nn.Module) -> int | None:
    return getattr(attn, "num_heads", getattr(attn, "heads", None))


def _check_block(block: nn.Module) -> tuple[str, ...]:
    """Names of the attention's projections, if the block is one that `QueryDownsample` understands."""

    def refuse(owner: str, module: object, problem: str) -> NoReturn:
        raise TypeError(f"{owner} ({type(module).__name__}) {problem}")

    def check_parts(owner: str, module: nn.Module, known: tuple[str, ...]) -> None:
        own = {name for name, child in module.named_children() if not isinstance(child, nn.Identity)}
        own |= {name for name, _ in module.named_parameters(recurse=False)}
        own |= {name for name, _ in module.named_buffers(recurse=False)}
        if unknown := sorted(own.difference(known)):
            refuse(owner, module, f"has {', '.join(unknown)}; expected nothing but {', '.join(known)}")

    missing = [name for name in _BLOCK_PARTS if not isinstance(getattr(block, name, None), nn.Module)]
    if missing:
        what = "expected a pre-norm block, with nn.Identity() for what it does not do"
        refuse("block", block, f"has no {', '.join(missing)}; {what}")
    check_parts("block", block, _BLOCK_PARTS)
    norm, attn = block.get_submodule("norm1"), block.get_submodule("attn")
    for owner, module in (("block", block), ("block.attn", attn)):
        if is_hooked(module):
            refuse(owner, module, "has hooks or a forward on the object; expected none: it is not called")
    if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
        refuse("block.norm1", norm, "is no LayerNorm of the channels")

    names = next((n for n in _PROJECTIONS if all(getattr(attn, p, None) is not None for p in n)), None)
    if names is None:
        refuse("block.attn", attn, "has no qkv, nor q, k and v, nor q_proj, k_proj and v_proj")
    if not isinstance(getattr(attn, "proj", None), nn.Module):
        refuse("block.attn", attn, "has no proj")
    if not isinstance(heads := _heads(attn), int) or heads < 1:
        refuse("block.attn", attn, "has no num_heads nor heads")
    check_parts("block.attn", attn, _ATTENTION_PARTS)
    if "rope" in inspect.signature(attn.forward).parameters:
        refuse("block.attn", attn, "takes rotary positions; expected positions in the tokens alone")
    projections = [getattr(attn, name) for name in names]
    if not all(isinstance(getattr(p, "out_features", None), int) for p in projections):
        refuse("block.attn", attn, f"has projections {', '.join(names)} without out_features")
    widths = {p.out_features for p in projections}
    if len(widths) > 1 or widths.pop() % (heads * 3 // len(names)):
        refuse("block.attn", attn, f"has projections {', '.join(names)} that do not fit {heads} equal heads")
    return names


class _PackedAttention(nn.Module):
    """`query_attention` with its projections, under the parameter names of `nn.MultiheadAttention`."""

    plain = True  # for is_plain

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def rows(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of the projections first ... last - 1 of query, key and value."""
        for name in ("in_proj_weight", "in_proj_bias"):
            if name in self.__dict__:
                raise TypeError(
                    f"{name} is made by a hook in each call (torch.nn.utils.prune, weight_norm); expected "
                    "a parameter or a parametrization (torch.nn.utils.parametrize): prune.remove makes one"
                )
        weight, bias = self.in_proj_weight, self.in_proj_bias
        dim = weight.shape[1]
        return weight[first * dim : last * dim], bias[first * dim : last * dim]

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, Nq, C) from projected (B or 1, Nq, C) and (B, Nk, C), all of which may be strided slices."""
        output = query_attention(
            *(x.unflatten(-1, (self.heads, -1)) for x in (query, key, value)),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(output.flatten(-2))


class _UpsampleLayer(nn.Module):
    """Post-norm transformer decoder layer, under the parameter names of `nn.TransformerDecoderLayer`."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = _PackedAttention(dim, heads, dropout)
        self.multihead_attn = _PackedAttention(dim, heads, dropout)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def attend_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B or 1, N, C) after self-attention, and the query that they project to."""
        projected = F.linear(tokens, *self.self_attn.rows(0, 3)).chunk(3, dim=-1)
        tokens = self.norm1(tokens + self.dropout(self.self_attn(*projected)))
        return tokens, F.linear(tokens, *self.multihead_attn.rows(0, 1))

    def attend_features(self, tokens: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Tokens (B, N, C) after cross-attention to projected features (B, Nk, C) and feed-forward."""
        tokens = self.norm2(tokens + self.dropout(self.multihead_attn(query, key, value)))
        hidden = self.dropout(F.relu(self.linear1(tokens)))
        return self.norm3(tokens + self.dropout(self.linear2(hidden)))


def same_grid(grid: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two grids are the same. Sizes that a trace leaves open are not, unless they always are: its
    program then holds for both."""
    if not torch.compiler.is_compiling() and not any(isinstance(n, torch.SymInt) for n in (*grid, *other)):
        # Under torch.jit.trace sizes are tensors.
        return all(bool(a == b) for a, b in zip(grid, other, strict=True))
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # brings SymPy

    return all(statically_known_true(a == b) for a, b in zip(grid, other, strict=True))


def resize_positions(
    positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], mode: str = "bicubic"
) -> Tensor:
    """Position embedding (1, h·w, C) of a grid (h, w), resized to (1, h'·w', C) of another.

    In float32 at least. At the same size resizing changes nothing, and is left out.

    Args:
        mode: "bicubic" or "bilinear", with "_antialias" behind it for torch's filters of that kind.
    """
    if same_grid(grid, new_grid):
        return positions
    (image,) = full_precision(positions)
    image = image.unflatten(1, grid).permute(0, 3, 1, 2)
    kind, _, antialias = mode.partition("_")
    image = F.interpolate(image, size=new_grid, mode=kind, align_corners=False, antialias=bool(antialias))
    return image.flatten(2).transpose(1, 2).to(positions.dtype)


def _place_code(grid: tuple[int, int], size: int) -> Tensor:
    """(h·w, size): cosines and sines of the row and of the column, from half a wave over the grid upwards."""
    rows, columns = (torch.arange(n) + 0.5 for n in grid)
    waves: list[Tensor] = []
    while len(waves) < size:
        frequency = math.pi * (len(waves) // 4 + 1) / max(grid)
        for wave in (torch.cos, torch.sin):
            waves.append(wave(frequency * rows)[:, None].expand(grid))
            waves.append(wave(frequency * columns).expand(grid))
    return torch.stack(waves[:size], dim=-1).flatten(0, 1)


def _subsampled(code: Tensor, tokens: int) -> Tensor:
    """Every s-th row and column of (h, w, size), for the s that leaves this number of them."""
    for stride in itertools.count(1):  # no range: a trace of any size would be for one number of strides
        kept = code[::stride, ::stride].flatten(0, 1)
        if kept.shape[0] == tokens:
            return kept
        if stride >= max(code.shape[:2]):
            break
    raise ValueError(f"levels: {tokens} tokens are no subsampled grid of {tuple(code.shape[:2])}")


def _half_whitened_components(covariance: Tensor, count: int) -> Tensor:
    """The first principal components (C, at most ``count``) of features of this covariance, as a linear map.

    A component's variance becomes its square root, and the mean of these 1.
    """
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances.flip(0)[:count], directions.flip(1)[:, :count]
    variances = variances.clamp(min=1e-6 * variances[0])
    return directions * variances**-0.25 / variances.sqrt().mean().sqrt()


def _place_reader(centred: Tensor, covariance: Tensor, code: Tensor) -> Tensor:
    """The linear map (C, places) from centred features (N, C) to codes (N, places): ridge regression."""
    ridge = 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
    return torch.linalg.solve(covariance + ridge, centred.T @ code / len(centred))


class _UpsampleStage(nn.Module):
    """The layers that look at one feature level, and the projection of its features."""

    def __init__(self, level_dim: int, dim: int, heads: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.input_proj = nn.Linear(level_dim, dim)
        self.input_norm = nn.LayerNorm(dim)
        layers = nn.ModuleList(_UpsampleLayer(dim, heads, dropout) for _ in range(depth))
        self.layers = cast(Sequence[_UpsampleLayer], layers)
        self.folded_rows: Folded | None = None  # stacked_rows(), after QueryUpsample.fuse
        self.folded_keys: Folded | None = None  # position_keys() of the queries

    def attentions(self) -> list[_PackedAttention]:
        """The layers' cross-attention."""
        return [layer.multihead_attn for layer in self.layers]

    def stacked_rows(self) -> tuple[Tensor, Tensor]:
        """Weight and bias that project features to k and v of every layer in turn."""
        weights, biases = zip(*(layer.multihead_attn.rows(1, 3) for layer in self.layers), strict=True)
        return torch.cat(weights), torch.cat(biases)

    def position_keys(self, positions: Tensor) -> Tensor:
        """What positions (..., Nk, C) add to the keys of every layer in turn: (..., Nk, depth, C)."""
        weight = torch.cat([layer.multihead_attn.rows(1, 2)[0] for layer in self.layers])
        return F.linear(positions, weight).unflatten(-1, (len(self.layers), -1))

    def forward(
        self,
        tokens: Tensor,
        features: Tensor,
        first: tuple[Tensor, Tensor] | None = None,
        position_keys: Tensor | None = None,
        added: bool = False,
    ) -> Tensor:
        """Tokens (B, N, C) from tokens (B or 1, N, C) and features (B, Nk, level_dim).

        `first` is what `attend_tokens` of the first layer gives, if that is known; `position_keys`, of the
        method of this name, for all images or for each, are added to the keys. Where features are `added`,
        each token starts with those of its own place.
        """
        features = self.input_norm(self.input_proj(features))
        if added:
            tokens = tokens + features
        stacked = self.folded_rows.get(self.attentions()) if self.folded_rows else None
        if stacked is not None:
            projected: Sequence[Tensor] = F.linear(features, *stacked).chunk(len(self.layers), dim=-1)
        else:
            projected = [F.linear(features, *layer.multihead_attn.rows(1, 3)) for layer in self.layers]
        for depth, (layer, key_value) in enumerate(zip(self.layers, projected, strict=True)):
            key, value = key_value.chunk(2, dim=-1)
            if position_keys is not None:
                key = key + position_keys[..., depth, :]
            tokens, query = first or layer.attend_tokens(tokens)
            tokens = layer.attend_features(tokens, query, key, value)
            first = None
        return tokens


def _unfuse(module: QueryUpsample, *_: Any) -> None:
    """Before a state dict is loaded: constants of fuse() would be of no use beside new weights."""
    module.unfuse()


class QueryUpsample(nn.Module):
    """Query-based up-sampling: learned queries gather feature maps of any resolution (SegViT, section 3.3).

    There is one query for each token of a training grid. They go through ``depth`` post-norm transformer
    decoder layers for each feature level in turn: self-attention, cross-attention to the level, ReLU
    feed-forward of four times the width. What happens before they meet the first features is the same for
    all images and is computed once, unless dropout makes it differ.

    Args:
        embed_dim: width C of the queries.
        num_heads: attention heads; must divide ``embed_dim``.
        grid: height and width of the training grid.
        level_dims: channels of the feature levels, in the order in which they are attended to.
        depth: layers for each level.
        dropout: of attention weights, after each sub-layer and inside the feed-forward part.
        resize: resize the queries bicubically to other grids, as position embeddings are. Otherwise the
            output has the training grid, always.
        key_positions: also add to each key the query of its own place, so that queries know from the start
            where features are, as position embeddings do in DETR (Carion et al., ECCV 2020, section 3.2).
            Not in the paper: its queries have to find that out from the features.
        query_features: each query starts with the features of its own place: those of the first level,
            projected, which then must have the output's grid. Not in the paper: what a query learns of its
            place there is what attention brings it.

    Raises:
        ValueError: ``num_heads`` does not divide ``embed_dim``, or there is no level or no layer.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        grid: tuple[int, int],
        level_dims: Sequence[int],
        depth: int = 3,
        dropout: float = 0.0,
        resize: bool = True,
        key_positions: bool = False,
        query_features: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; expected a divisor of embed_dim {embed_dim}")
        if depth < 1 or not level_dims:
            raise ValueError(f"expected one layer and one level at least, got {depth} and {len(level_dims)}")
        self.grid: tuple[int, int] = (grid[0], grid[1])
        self.dropout = dropout
        self.resize = resize
        self.key_positions = key_positions
        self.query_features = query_features
        self.queries = nn.Parameter(torch.empty(grid[0] * grid[1], embed_dim))
        stages = nn.ModuleList(
            _UpsampleStage(level_dim, embed_dim, num_heads, depth, dropout) for level_dim in level_dims
        )
        self.stages = cast(Sequence[_UpsampleStage], stages)
        self.reset_parameters()
        self.folded_first: Folded | None = None  # after fuse()
        self.register_load_state_dict_pre_hook(_unfuse)

    def reset_parameters(self) -> None:
        """Normal queries, truncated normal linear layers (0.02), Xavier packed projections; zero biases."""
        nn.init.normal_(self.queries)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, _PackedAttention):
                nn.init.xavier_uniform_(module.in_proj_weight)
                nn.init.zeros_(module.in_proj_bias)

    @torch.no_grad()
    def locate(self, levels: Sequence[Tensor], sharpness: float = 6.0) -> None:
        """Start from queries that look at the features of their own place, instead of anywhere.

        With random queries attention begins as a mean over the whole image, and training first has to find
        out which query is where: thousands of steps. Here the channels are shared out at the start: the first
        hold a code of the place (cosines and sines of row and column), the rest one part for each level.
        Queries begin as the code; a level's projection as the half whitened principal components of some
        images' features and, unless keys have their positions anyway, the linear map that best reads the
        code off them (ridge regression); attention compares codes and adds the components of what it sees to
        the level's own channels; self-attention and feed-forward begin as nothing. All parameters stay free.

        Args:
            levels: feature maps (B, Nk, level_dim) of some images of the training size, as in `forward`; a
                few dozen images are enough. Each has the training grid, or every s-th row and column of it.
            sharpness: standard deviation of the attention logits of a query.

        Raises:
            TypeError: a layer that gets weights is wrapped, parametrized or hooked.
            ValueError: a level is no subsampled training grid.
        """
        if autocast_dtype(self.queries.device) is not None:
            with without_autocast(self.queries.device):
                return self.locate(levels, sharpness)
        self.unfuse()
        for name, module in self.named_modules():
            if not is_plain(module) and name.endswith(("input_proj", "_attn", "out_proj", "linear2")):
                raise TypeError(f"{name} ({type(module).__name__}) is no plain layer; expected one to set")
        dim, heads = self.queries.shape[1], self.stages[0].layers[0].self_attn.heads
        head_dim = dim // heads
        places = min(head_dim, dim // 4)
        code = math.sqrt(2) * _place_code(self.grid, places).to(self.queries)
        self.queries.zero_()
        self.queries[:, :places] = code
        first, share = places, (dim - places) // len(self.stages)
        for stage, features in zip(self.stages, levels, strict=True):
            keys = _subsampled(code.unflatten(0, self.grid), features.shape[1])
            features = features.to(self.queries.dtype)  # autocast's, of a backbone under it
            mean = features.mean((0, 1))
            centred = (features - mean).float().flatten(0, 1)
            covariance = centred.T @ centred / len(centred)
            alike = covariance.trace() <= 1e-9 * features.float().square().sum(-1).mean()
            if features.shape[1] == 1 or alike:
                continue  # a single token, or features that are the same everywhere, tell no places
            components = _half_whitened_components(covariance, share)
            weight = torch.zeros_like(stage.input_proj.weight)
            content = slice(first, first + components.shape[1])
            weight[content] = components.T.to(weight)
            if not self.key_positions:
                targets = keys.float().repeat(len(features), 1)
                weight[:places] = _place_reader(centred, covariance, targets).T.to(weight)
            stage.input_proj.weight.copy_(weight)
            stage.input_proj.bias.copy_(-weight @ mean)
            if not self.key_positions:
                keys = stage.input_norm(stage.input_proj(features))[..., :places]
            logits = F.layer_norm(self.queries, (dim,))[:, :places] @ keys.transpose(-1, -2)
            gain = (sharpness * head_dim**0.5 / logits.std(-1).mean()).sqrt()
            for layer in stage.layers:
                attention = layer.multihead_attn
                query, key, value = attention.in_proj_weight.chunk(3)
                for projection in (query, key):
                    by_head = projection.zero_().unflatten(0, (heads, head_dim))
                    by_head[:, :places, :places] = gain * torch.eye(places).to(gain)
                count = components.shape[1]
                value[:count] = 0
                value[:count, content].fill_diagonal_(1)
                attention.out_proj.weight[:places] = 0
                attention.out_proj.weight[content] = 0
                attention.out_proj.weight[content, :count].fill_diagonal_(0.5)
                layer.linear2.weight.zero_()
                layer.self_attn.out_proj.weight.zero_()
            first += share

    def output_grid(self, grid: tuple[int, int] | None = None) -> tuple[int, int]:
        """Height and width of the output where ``grid`` is asked for."""
        return self.grid if grid is None or not self.resize else (grid[0], grid[1])

    def forward(
        self,
        levels: Sequence[Tensor],
        grid: tuple[int, int] | None = None,
        places: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Features of the queries' grid.

        Args:
            levels: feature maps (B, Nk, level_dim), in the order of ``level_dims``.
            grid: height and width of the output; the training grid if not given.
            places: for each level that is no subsampled grid (B, Nk) int64, of which places of the image's
                grid, row by row, its tokens are; None for the others. Keys with positions need them.

        Returns:
            (B, h·w, C), row by row, of ``output_grid(grid)``.

        Raises:
            ValueError: as many levels as ``level_dims`` were expected.
        """
        if len(levels) != len(self.stages):
            raise ValueError(f"levels: got {len(levels)}, expected {len(self.stages)}")
        asked = grid or self.grid
        level_grid, grid = (asked[0], asked[1]), self.output_grid(grid)
        first = positions = None
        tokens = self._queries(grid)
        if self.key_positions:
            image = tokens if same_grid(grid, level_grid) else self._queries(level_grid)
            positions = image[0].unflatten(0, level_grid)
        if self.training and self.dropout > 0:
            # Every image draws its own dropout; without dropout all images share the first steps.
            tokens = tokens.expand(levels[0].shape[0], -1, -1)
        elif self.folded_first is not None and same_grid(grid, self.grid):
            first = self.folded_first.get(self._first_parts())
        added = self.query_features
        for stage, features, own in zip(self.stages, levels, places or [None] * len(levels), strict=True):
            position_keys = self._position_keys(stage, features.shape[1], positions, own)
            tokens, first, added = stage(tokens, features, first, position_keys, added), None, False
        return tokens

    def _position_keys(
        self, stage: _UpsampleStage, tokens: int, positions: Tensor | None, places: Tensor | None
    ) -> Tensor | None:
        """What is added to a stage's keys, (tokens, depth, C), for levels of images with these (h, w, C);
        (B, tokens, depth, C) where they have places of their own."""
        if positions is None:
            return None
        if places is not None:
            return stage.position_keys(positions.flatten(0, 1))[places]
        if stage.folded_keys is not None and same_grid((positions.shape[0], positions.shape[1]), self.grid):
            keys = stage.folded_keys.get([self.queries, *stage.attentions()])
            if keys is not None:
                return _subsampled(keys.unflatten(0, self.grid), tokens)
        return stage.position_keys(_subsampled(positions, tokens))

    def _first_parts(self) -> list[nn.Module | Tensor]:
        """What the queries meet before they meet the first features."""
        layer = self.stages[0].layers[0]
        attention = layer.self_attn
        return [self.queries, attention, attention.out_proj, layer.dropout, layer.norm1, layer.multihead_attn]

    def _queries(self, grid: tuple[int, int]) -> Tensor:
        return resize_positions(self.queries.unsqueeze(0), self.grid, grid)

    @torch.no_grad()
    def fuse(self) -> None:
        """Keep as constants what depends on parameters alone, for inference with weights that stay.

        These are the first self-attention, query and positions of keys at the training grid, and each level's
        k and v projections, stacked into one. Where a layer is wrapped, parametrized or has hooks, it is
        called instead; and constants whose weights have changed are not used: in place, by loading, by
        replacing layers, but for writes through ``.data``. Compiled code notices replaced ones only.
        """
        self.unfuse()
        first = self.stages[0].layers[0]
        if not self.query_features:
            self.folded_first = Folded.make(
                self._first_parts(), lambda: first.attend_tokens(self._queries(self.grid))
            )
        for stage in self.stages:
            parts = stage.attentions()
            stage.folded_rows = Folded.make(parts, stage.stacked_rows)
            if self.key_positions:
                stage.folded_keys = Folded.make(
                    [self.queries, *parts], functools.partial(stage.position_keys, self.queries)
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QueryUpsample:
        """Conversions (``to``, ``half``, ``cuda``) make the constants anew."""
        folded = any(stage.folded_rows is not None for stage in self.stages)
        self.unfuse()
        super()._apply(fn, recurse)
        if folded:
            self.fuse()
        return self

    def train(self, mode: bool = True) -> QueryUpsample:
        if mode:
            self.unfuse()
        return super().train(mode)

    def unfuse(self) -> None:
        """Forget the constants of :meth:`fuse`, as training and loading weights do."""
        self.folded_first = None
        for stage in self.stages:
            stage.folded_rows = stage.folded_keys = None

    def extra_repr(self) -> str:
        added = ", query_features=True" if self.query_features else ""
        return f"grid={self.grid}, resize={self.resize}, key_positions={self.key_positions}{added}"


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` with packed weights beside its own: see :func:`segvit_kernels.linear`.

    Parameters, and so the state dict, are those of the layer it is made from; what is packed is not in it.
    Conversions (``to``, ``half``) pack anew; where the weight has changed otherwise, that must be made again,
    and meanwhile it computes what the layer computed. So it does where packed weights are of no use
    (autograd, autocast, another device or dtype of the input).

    Args:
        module: the layer, float32, float16 or bfloat16. Its parameters are shared.
        int8: pack to 8 bits: see :func:`segvit_kernels.pack_weight`.

    Raises:
        TypeError: another dtype.
    """

    plain = True  # for is_plain

    def __init__(self, module: nn.Linear, int8: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = module.in_features, module.out_features
        self.weight, self.bias = module.weight, module.bias
        self.training = module.training
        self.int8 = int8
        self.packed = Folded([module.weight], pack_weight(module.weight, int8=int8))
        self.released = False

    def forward(
        self,
        input: Tensor,
        gelu: bool = False,
        norm: nn.LayerNorm | None = None,
        scale: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """(..., in_features) -> (..., out_features), with what stands around it as in :func:`linear`."""
        return linear(
            input,
            self.weight,
            self.bias,
            packed=self.packed.get([self.weight]),
            gelu=gelu,
            norm=None if norm is None else (norm.weight, norm.bias, norm.eps),
            scale=scale,
            residual=residual,
        )

    def release(self, *, inexact: bool = False) -> None:
        """Keep of the weight its shape alone, where the packed one has it as it was; for a layer that stays.
        What computes without the packed weight unpacks it, which of one that is ``inexact`` raises.
        """
        packed = self.packed.value
        self.released = packed is not None and (inexact or packed.exact)
        if self.released:
            self.packed.freeze()
            weight = self.weight.new_full((), torch.nan).expand_as(self.weight)
            self.weight = nn.Parameter(weight, requires_grad=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.released:  # a copy of the weight has its numbers one by one
            self.release(inexact=True)

    def _take_back(self) -> None:
        """Undo :meth:`release`."""
        weight = whole_weight(self.weight, self.packed.value)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.packed, self.released = Folded([self.weight], self.packed.value), False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Conversions pack anew."""
        before, after = self.weight.new_empty(0), fn(self.weight.new_empty(0))
        same, released = (before.dtype, before.device) == (after.dtype, after.device), self.released
        if released and not same:
            self._take_back()
        super()._apply(fn, recurse)
        if not same:
            gains = why_not_packed(self.weight, int8=self.int8) is None
            self.packed = Folded([self.weight], pack_weight(self.weight, int8=self.int8) if gains else None)
        if released:  # as above
            self.release(inexact=same)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.released:
            destination[prefix + "weight"] = whole_weight(self.weight, self.packed.value)

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.released:
            self._take_back()
        super()._load_from_state_dict(*args)

    def unpack(self) -> nn.Linear:
        """The plain layer, with the same parameters."""
        with torch.device("meta"):
            module = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        weight = whole_weight(self.weight, self.packed.value)
        module.weight = self.weight if weight is self.weight else nn.Parameter(weight, requires_grad=False)
        module.bias = self.bias
        for name in HOOKS:
            setattr(module, name, getattr(self, name))
        return module.train(self.training)


def pack_linears(model: nn.Module, *, int8: bool = False) -> int:
    """Replace every ``nn.Linear`` inside a model by a :class:`PackedLinear` where that gains anything.

    That is on a CPU where the native library's kernel is faster than PyTorch's product of the weights' dtype
    (:func:`segvit_kernels.why_not_packed`), and where a layer has no hooks. Where weights have changed since,
    the layer computes what ``nn.Linear`` does, but for writes through ``.data`` and in compiled code, which
    are not noticed.

    Args:
        model: modules inside it are replaced in place.
        int8: pack to 8 bits, where the CPU has AVX2.

    Returns:
        How many were replaced.
    """
    return _replace(
        model,
        nn.Linear,
        lambda m: type(m) is nn.Linear and is_plain(m) and why_not_packed(m.weight, int8=int8) is None,
        functools.partial(PackedLinear, int8=int8),
    )


def unpack_linears(model: nn.Module) -> int:
    """Undo :func:`pack_linears`; gives the number of layers."""
    return _replace(model, PackedLinear, lambda _: True, PackedLinear.unpack)


_Layer = TypeVar("_Layer", bound=nn.Module)


def _replace(
    model: nn.Module,
    kind: type[_Layer],
    wanted: Callable[[_Layer], bool],
    replacement: Callable[[_Layer], nn.Module],
) -> int:
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, kind) and wanted(child)
    ]
    for parent, name, child in found:
        setattr(parent, name, replacement(child))
    return len(found)
