"""Multiply-accumulates of a model: in the form that its paper counts, and in the form that runs here."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Plain attention over (B, H, N, D) by batched products, as `nn.MultiheadAttention` used to count."""
    shape = (*key.shape[:2], *query.shape[2:])
    query, key, value = (t.expand(key.shape[0], -1, -1, -1).flatten(0, 1) for t in (query, key, value))
    weights = torch.bmm(query * query.shape[-1] ** -0.5, key.mT).softmax(-1)
    return torch.bmm(weights, value).view(shape)


def _query_attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    return _attention(*(t.transpose(1, 2) for t in (query, key, value))).transpose(1, 2)


def _atm(query: Tensor, key: Tensor, value: Tensor, *, need_masks: bool = True, **options: Any) -> tuple:
    from segvit_kernels import atm_reference

    options.pop("dropout_p"), options.pop("previous_masks")
    return atm_reference(query.expand(key.shape[0], -1, -1, -1), key, value, **options)


def _subsample_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, **where: Any) -> tuple:
    """As published: queries, keys and values each have a LayerNorm of their own tokens."""
    from segvit_kernels import subsample_layer_norm_reference

    _, _, x_sub = subsample_layer_norm_reference(x, weight, bias, eps=eps, **where)
    key, value, query = (F.layer_norm(t, weight.shape, weight, bias, eps) for t in (x, x, x_sub))
    return (key + value) / 2, query, x_sub


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Everything by operators that fvcore counts by itself."""
    from segvit_kernels import modules

    with (
        mock.patch.object(modules, "fused_atm", _atm),
        mock.patch.object(modules, "query_attention", _query_attention),
        mock.patch.object(modules, "subsample_layer_norm", _subsample_layer_norm),
        mock.patch.object(F, "scaled_dot_product_attention", _attention),
    ):
        yield


class EagerForm(nn.Module):
    """Image to scores as published: masks of each stage resized, added, mixed at full size, resized again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        from segvit.model.shrunk import ShrunkDecoder

        model, size = self.model, tuple(images.shape[-2:])
        grid = model._grid(images)
        stages = model.decoder(model.backbone(images), grid, accumulate=False)
        classes = [stage.class_logits for stage in stages]
        if isinstance(model.decoder, ShrunkDecoder):
            stages = stages[-1:]
        maps = [stage.mask_logits.unflatten(-1, stage.grid) for stage in stages]
        masks = sum(F.interpolate(m, size=grid, mode="bilinear", align_corners=False) for m in maps)
        masks = F.interpolate(masks, size=size, mode="bilinear", align_corners=False).sigmoid()
        scores = torch.einsum("bqc,bqhw->bchw", classes[-1].softmax(-1)[..., :-1], masks)
        # With the class logits of every stage, which published models compute: a trace drops what is unused.
        return F.interpolate(scores, size=size, mode="bilinear", align_corners=False), *classes


class FusedForm(nn.Module):
    """Image to label map as it runs here."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # Without packed weights: the same operators on every machine.
        with mock.patch("segvit_kernels.ops.linear._best", lambda dtype: None):
            self.model = model.fuse()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output = self.model(images)
        classes = [class_logits for class_logits, _ in output.auxiliary]
        return self.model.labels(output, tuple(images.shape[-2:])), *classes


def _sdpa_handle(inputs: list[Any], outputs: list[Any]) -> Counter:
    query, key = (v.type().sizes() for v in inputs[:2])
    return Counter({"attention": 2 * query[0] * query[1] * query[2] * key[2] * query[3]})


def count_fvcore(form: nn.Module, images: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Multiply-accumulates by operator and by module (two levels)."""
    from fvcore.nn import FlopCountAnalysis

    from segvit_kernels import fvcore_handles

    analysis = (
        FlopCountAnalysis(form, images).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    )
    analysis.set_op_handle(**{"aten::scaled_dot_product_attention": _sdpa_handle}, **fvcore_handles())
    by_module = {
        name.removeprefix("model."): value
        for name, value in analysis.by_module().items()
        if name.startswith("model.") and name.count(".") <= 3 and value
    }
    return dict(analysis.by_operator()), by_module


def count_torch(call: Callable[[Tensor], object], images: Tensor) -> float:
    """Multiply-accumulates by torch's counter, which knows products only: half its FLOPs, and fvcore's
    conventions of 5 per element for LayerNorm and 4 per output element for bilinear upsampling."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def layer_norm(x: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * 5 * torch.Size(x).numel()

    def bilinear(x: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * 4 * torch.Size(out_shape).numel()

    def attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    aten = torch.ops.aten
    custom = {
        aten.native_layer_norm: layer_norm,
        aten.upsample_bilinear2d: bilinear,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
    }
    with FlopCounterMode(display=False, custom_mapping=custom) as counter, torch.no_grad():
        call(images)
    return counter.get_total_flops() / 2
