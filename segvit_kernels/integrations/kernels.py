"""The operators as layers that Hugging Face's ``kernels`` can put in place of others: ``kernelize``.

    kernel = get_kernel("OWNER/segvit-kernels", version=1)          # or this package, where it is installed
    replace_kernel_forward_from_hub(Mask2FormerLoss, "Mask2FormerLoss")
    repository = lambda layer: LayerRepository("OWNER/segvit-kernels", layer_name=layer, version=1)
    with use_kernel_mapping(kernel.layers.mapping(repository)):
        model = kernelize(model, mode=Mode.TRAINING)

A layer has no state and no members but ``forward``, which finds what it needs in the module that it replaces:
that module's class has the members named with it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from segvit_kernels import modules
from segvit_kernels.integrations.transformers import losses
from segvit_kernels.ops.mask_loss import MaskLoss as MaskLosses
from segvit_kernels.ops.mask_loss import mask_loss
from segvit_kernels.ops.semantic_argmax import semantic_argmax

LAYERS: dict[str, type[nn.Module]] = {}
"""Every layer by its name."""


def _layer(kind: type[nn.Module]) -> type[nn.Module]:
    LAYERS[kind.__name__] = kind
    return kind


@_layer
class FusedATM(nn.Module):
    """:class:`segvit_kernels.FusedATM` for a module with ``q``, ``k``, ``v``, ``proj``, ``proj_drop``,
    ``num_heads`` and ``attn_drop``."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        query: Tensor,
        features: Tensor,
        value: Tensor | None = None,
        previous_masks: Tensor | None = None,
        need_masks: bool = True,
        key_padding_mask: Tensor | None = None,
    ) -> Any:
        module: Any = self
        value = features if value is None else value
        projected = module.q(query), module.k(features), module.v(value)
        attend: Any = modules.FusedATM.attend
        return attend(module, *projected, previous_masks, need_masks, key_padding_mask)


@_layer
class SemanticArgmax(nn.Module):
    """:func:`segvit_kernels.semantic_argmax` for a module without state."""

    can_torch_compile = True
    has_backward = False

    def forward(self, mask_logits: Tensor, class_probs: Tensor, size: tuple[int, int]) -> Tensor:
        labels: Any = semantic_argmax(mask_logits, class_probs, size)
        return labels


@_layer
class MaskLoss(nn.Module):
    """:func:`segvit_kernels.mask_loss` of labels for a module without state."""

    can_torch_compile = True
    has_backward = True

    def forward(self, mask_logits: Tensor, targets: Tensor) -> MaskLosses:
        return mask_loss(mask_logits, targets)


def _replacing(name: str, forward: Callable[..., Any]) -> type[nn.Module]:
    """The layer for transformers' class of this name."""
    described = f"In place of transformers' {name}: see ``use_fused_loss``."
    members = {"forward": forward, "can_torch_compile": False, "has_backward": True, "__doc__": described}
    return type(name, (nn.Module,), {**members, "__module__": __name__})


def _criterion(name: str, term: str) -> type[nn.Module]:
    def forward(
        self: Any,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        auxiliary_predictions: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        outputs = masks_queries_logits, class_queries_logits, mask_labels, class_labels
        return losses._losses(self, term, *outputs, auxiliary_predictions)

    return _replacing(name, forward)


def _matcher(name: str, term: str) -> type[nn.Module]:
    def forward(
        self: Any,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        return losses._match(
            self, term, masks_queries_logits, class_queries_logits, mask_labels, class_labels
        )

    return _replacing(name, forward)


for _name, _term in losses._CRITERIA.items():
    if _name == "OneFormerLoss":  # its forward takes more
        continue
    globals()[_name] = _layer(_criterion(_name, _term))
    _name = _name.replace("Loss", "HungarianMatcher")
    globals()[_name] = _layer(_matcher(_name, _term))


def mapping(
    repository: Callable[[str], Any], devices: Iterable[str] = ("cuda", "rocm", "cpu")
) -> dict[str, dict[str, Any]]:
    """What ``use_kernel_mapping`` takes: every layer, from ``repository(name of the layer)``."""
    return {name: dict.fromkeys(devices, repository(name)) for name in LAYERS}
