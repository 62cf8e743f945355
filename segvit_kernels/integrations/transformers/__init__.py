"""Hugging Face's MaskFormer, Mask2Former, OneFormer, EoMT (DINOv3 too), VidEoMT and RF-DETR (instances).

What inherits from them counts as well.

Nothing here imports ``transformers``: outputs and criteria are known by the names of their classes and of
those that they inherit from, and by what they hold. What a model of it needs comes with
``pip install 'segvit-kernels[transformers]'``.
"""

from segvit_kernels.integrations.transformers.instances import post_process_instance_segmentation
from segvit_kernels.integrations.transformers.panoptic import post_process_panoptic_segmentation
from segvit_kernels.integrations.transformers.semantic import post_process_semantic_segmentation

__all__ = [
    "post_process_instance_segmentation",
    "post_process_panoptic_segmentation",
    "post_process_semantic_segmentation",
]
