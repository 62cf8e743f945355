"""Other libraries' models on these operators, one package or file a library.

    from segvit_kernels.integrations import post_process_semantic_segmentation, use_fused_loss

    model = use_fused_loss(Mask2FormerForUniversalSegmentation.from_pretrained(...))   # training
    maps = post_process_semantic_segmentation(model(**inputs), target_sizes)           # inference

``transformers``: Hugging Face's mask-classification models. ``eomt``: tue-mps/eomt and LightlyTrain.
``detectron2``: Mask2Former, OneFormer and Mask DINO. ``timm``: attention pooling. ``torchvision``: Mask
R-CNN. Nothing here imports the libraries themselves.
"""

from segvit_kernels.integrations.criteria import use_fused_loss
from segvit_kernels.integrations.detectron2 import fused_set_criterion
from segvit_kernels.integrations.eomt import window_label_maps
from segvit_kernels.integrations.timm import FusedAttentionPool, PooledMaps
from segvit_kernels.integrations.torchvision import paste_masks
from segvit_kernels.integrations.transformers import (
    post_process_instance_segmentation,
    post_process_panoptic_segmentation,
    post_process_semantic_segmentation,
)

__all__ = [
    "FusedAttentionPool",
    "PooledMaps",
    "fused_set_criterion",
    "paste_masks",
    "post_process_instance_segmentation",
    "post_process_panoptic_segmentation",
    "post_process_semantic_segmentation",
    "use_fused_loss",
    "window_label_maps",
]
