"""Fused kernels for mask-transformer segmentation on plain Vision Transformers."""

from segvit_kernels._autocast import without_autocast
from segvit_kernels._folding import Folded, freeze, is_plain
from segvit_kernels._library import (
    BACKENDS,
    BackendUnavailableError,
    backend,
    exportable,
    fvcore_handles,
    operator_names,
    record_backends,
    requested_backend,
    runs_isa,
    why_not,
)
from segvit_kernels._lowering import load_native_copy, lower_to_native, native_library
from segvit_kernels._replay import Replay
from segvit_kernels._rotary import apply_rotary
from segvit_kernels._version import __version__
from segvit_kernels.modules import (
    FusedATM,
    PackedLinear,
    QueryDownsample,
    QueryUpsample,
    pack_linears,
    resize_positions,
    same_grid,
    unpack_linears,
)
from segvit_kernels.ops.atm import ATMFunction, ATMOutput, WeightedATMOutput, atm_reference, fused_atm
from segvit_kernels.ops.attention_weights import attention_weights, attention_weights_reference
from segvit_kernels.ops.factored_masks import factored_mask_loss, factored_matching_cost
from segvit_kernels.ops.linear import PackedWeight, linear, linear_reference, pack_weight, why_not_packed
from segvit_kernels.ops.mask_binarize import BinaryMasks, mask_binarize, mask_binarize_reference
from segvit_kernels.ops.mask_iou import MaskIoU, mask_iou, mask_iou_reference
from segvit_kernels.ops.mask_loss import (
    MaskLoss,
    MaskLossFunction,
    MatchingCost,
    mask_loss,
    mask_loss_reference,
    mask_matching_cost,
    mask_matching_cost_reference,
)
from segvit_kernels.ops.mask_points import (
    PointCost,
    PointLoss,
    mask_loss_at_points,
    mask_matching_cost_at_points,
    uncertain_points,
)
from segvit_kernels.ops.panoptic_argmax import (
    PanopticArgmax,
    PanopticSegments,
    panoptic_argmax,
    panoptic_argmax_reference,
    panoptic_segments,
)
from segvit_kernels.ops.query_attention import (
    QueryAttentionFunction,
    query_attention,
    query_attention_reference,
)
from segvit_kernels.ops.semantic_argmax import View, Views, semantic_argmax, semantic_argmax_reference
from segvit_kernels.ops.subsample_norm import (
    SubsampledNorm,
    SubsampleNormFunction,
    subsample_layer_norm,
    subsample_layer_norm_reference,
)

__all__ = [
    "BACKENDS",
    "ATMFunction",
    "ATMOutput",
    "BackendUnavailableError",
    "BinaryMasks",
    "Folded",
    "FusedATM",
    "MaskIoU",
    "MaskLoss",
    "MaskLossFunction",
    "MatchingCost",
    "PackedLinear",
    "PackedWeight",
    "PanopticArgmax",
    "PanopticSegments",
    "PointCost",
    "PointLoss",
    "QueryAttentionFunction",
    "QueryDownsample",
    "QueryUpsample",
    "Replay",
    "SubsampleNormFunction",
    "SubsampledNorm",
    "View",
    "Views",
    "WeightedATMOutput",
    "__version__",
    "apply_rotary",
    "atm_reference",
    "attention_weights",
    "attention_weights_reference",
    "backend",
    "exportable",
    "factored_mask_loss",
    "factored_matching_cost",
    "freeze",
    "fused_atm",
    "fvcore_handles",
    "is_plain",
    "linear",
    "linear_reference",
    "load_native_copy",
    "lower_to_native",
    "mask_binarize",
    "mask_binarize_reference",
    "mask_iou",
    "mask_iou_reference",
    "mask_loss",
    "mask_loss_at_points",
    "mask_loss_reference",
    "mask_matching_cost",
    "mask_matching_cost_at_points",
    "mask_matching_cost_reference",
    "native_library",
    "operator_names",
    "pack_linears",
    "pack_weight",
    "panoptic_argmax",
    "panoptic_argmax_reference",
    "panoptic_segments",
    "query_attention",
    "query_attention_reference",
    "record_backends",
    "requested_backend",
    "resize_positions",
    "runs_isa",
    "same_grid",
    "semantic_argmax",
    "semantic_argmax_reference",
    "subsample_layer_norm",
    "subsample_layer_norm_reference",
    "uncertain_points",
    "unpack_linears",
    "why_not",
    "why_not_packed",
    "without_autocast",
]
