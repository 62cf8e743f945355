"""``python -m bench flops``: multiply-accumulates and parameters of every published model and its decoders.

Two forms are counted. *eager* is the model as its paper counts it: every product in plain PyTorch, masks and
scores at full resolution (resized once more to the same size, as published models do), by fvcore alone.
*fused* is what runs here: fused operators, constants folded, the label map from one operator; by fvcore and
by torch's counter halved, with the operators' own formulas.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import environment


@dataclasses.dataclass(frozen=True)
class Model:
    """A published model: preset, classes, crop, and the paper's GFLOPs (tables 1 to 3 and 5)."""

    name: str
    preset: str
    classes: int
    size: int
    paper: float
    shrunk: bool = False

    def build(self, **overrides: Any) -> nn.Module:
        """The model on the default device, in evaluation mode; `overrides` go to its configuration."""
        from segvit import SegViT, SegViTConfig

        size = (self.size, self.size)
        config = SegViTConfig.preset(
            self.preset, self.classes, shrunk=self.shrunk, image_size=size, **overrides
        )
        return SegViT(config).eval()


MODELS = (
    Model("vit_b_ade20k_512", "vit_base", 150, 512, 120.9),
    Model("vit_l_ade20k_640", "vit_large", 150, 640, 637.9),
    Model("vit_l_ade20k_640_shrunk", "vit_large", 150, 640, 373.5, True),
    Model("vit_l_cocostuff10k_512", "vit_large", 171, 512, 383.9),
    Model("vit_l_cocostuff10k_512_shrunk", "vit_large", 171, 512, 224.8, True),
    Model("vit_l_pascal_context_480", "vit_large", 60, 480, 321.6),
    Model("vit_l_pascal_context_480_shrunk", "vit_large", 60, 480, 186.9, True),
)
# Whose backbones all decoders are counted on.
DECODERS = ("vit_b_ade20k_512", "vit_l_ade20k_640")


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


def _zeros(model: Model) -> nn.Module:
    """The model with all weights 0: fvcore traces real tensors, and initial values would only take time."""
    with torch.device("meta"):
        built = model.build().requires_grad_(False)
    built.to_empty(device="cpu")
    for tensor in (*built.parameters(), *built.buffers()):
        tensor.zero_()
    return built


def run(*, names: Sequence[str] | None = None, progress: Callable[[str], None] = print) -> dict:
    """Rows of all models, and of the decoders on their backbones, as plain data."""
    rows, decoders = [], []
    for model in MODELS:
        if names and model.name not in names:
            continue
        built, images = _zeros(model), torch.zeros(1, 3, model.size, model.size)
        with plain_operators():
            eager, eager_modules = count_fvcore(EagerForm(built), images)
        form = FusedForm(built)
        fused, fused_modules = count_fvcore(form, images)
        by_torch = count_torch(form.to("meta"), images.to("meta"))
        row = {
            "model": model.name,
            "paper_gflops": model.paper,
            "parameters": sum(p.numel() for p in built.parameters()),
            "eager": {"by_operator": eager, "by_module": eager_modules, "fvcore": sum(eager.values())},
            "fused": {
                "by_operator": fused,
                "by_module": fused_modules,
                "fvcore": sum(fused.values()),
                "torch": by_torch,
            },
        }
        rows.append(row)
        progress(_line(row))
        if model.name in DECODERS:
            decoders += _decoders(model)
    return {
        "schema": 1,
        "kind": "flops",
        "environment": environment.describe(torch.device("cpu")),
        "models": rows,
        "decoders": decoders,
    }


def _decoders(model: Model) -> Iterator[dict]:
    from bench import subjects
    from bench.decoders import PUBLISHED

    for subject in subjects.on_one_backbone():
        count, parameters = subjects.macs(subject, model)
        row = {"model": model.name, "decoder": subject.name, "macs": count, "parameters": parameters}
        name = subject.name.removesuffix(subjects.BY_FORMULA)
        yield {**row, "paper_gflops": PUBLISHED.get((name, model.preset, model.size))}


def _line(row: dict) -> str:
    eager, fused = row["eager"]["fvcore"] / 1e9, row["fused"]["fvcore"] / 1e9
    return f"{row['model']}: eager {eager:.2f}, paper {row['paper_gflops']}, fused {fused:.2f} GMACs"


def tables(result: dict) -> dict[str, str]:
    """Markdown: ``models`` and ``decoders``, one line each."""
    from bench.report import markdown

    lines = []
    for row in result["models"]:
        eager, fused = row["eager"], row["fused"]
        cells = [
            row["model"],
            f"{row['paper_gflops']}",
            f"{eager['fvcore'] / 1e9:.2f}",
            f"{fused['fvcore'] / 1e9:.2f}",
            f"{fused['torch'] / 1e9:.2f}",
            f"{row['parameters'] / 1e6:.1f} M",
        ]
        lines.append(cells)
    header = ["model", "paper, GFLOPs", "eager", "fused, fvcore", "fused, torch", "parameters"]
    found = {"models": markdown(header, lines)}
    if "decoders" in result:
        found["decoders"] = _decoders_table(result["decoders"])
    return found


def _decoders_table(rows: list[dict]) -> str:
    from bench.report import markdown

    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = []
    for name in dict.fromkeys(row["decoder"] for row in rows):
        line = [name]
        for model in models:
            row = next(r for r in rows if (r["model"], r["decoder"]) == (model, name))
            line += [
                row["paper_gflops"] or "–",
                f"{row['macs'] / 1e9:.2f}",
                f"{row['parameters'] / 1e6:.1f} M",
            ]
        lines.append(line)
    header = ["decoder"]
    for model in models:
        header += [f"{model}: paper, GFLOPs", "counted", "parameters"]
    return markdown(header, lines)
