"""What comes after the model, for Mask2Former, EoMT and RF-DETR of transformers. No downloads.

pip install 'segvit-kernels[transformers]'
python -m examples.post_processing

The outputs are made up, of smooth random masks; with a model they are what ``model(**inputs)`` returns. The
image processors' own methods run beside, and give the same.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import EomtImageProcessor, Mask2FormerImageProcessor, RfDetrImageProcessor
from transformers.models.eomt.modeling_eomt import EomtForUniversalSegmentationOutput
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput
from transformers.models.rf_detr.modeling_rf_detr import RfDetrInstanceSegmentationOutput

from segvit_kernels.integrations import (
    post_process_instance_segmentation,
    post_process_panoptic_segmentation,
    post_process_semantic_segmentation,
)

QUERIES, CLASSES = 20, 6
SIZES = [(240, 320)]


def masks(grid: int) -> Tensor:
    """Mask logits (1, QUERIES, grid, grid) of blobs."""
    return interpolate(6 * torch.randn(1, QUERIES, 5, 5) - 4, (grid, grid), mode="bicubic")


def classes(count: int) -> Tensor:
    """Class logits (1, QUERIES, count) that are sure of themselves."""
    return 8 * torch.nn.functional.one_hot(torch.randint(count, (1, QUERIES)), count).float()


def same(ours: dict, theirs: dict) -> float:
    """The share of pixels that are equal, where the segments are."""
    assert [s["label_id"] for s in ours["segments_info"]] == [s["label_id"] for s in theirs["segments_info"]]
    return (ours["segmentation"] == theirs["segmentation"]).float().mean().item()


def main() -> None:
    """Every kind of result, ours and the image processor's."""
    torch.manual_seed(0)
    mask2former = Mask2FormerForUniversalSegmentationOutput(
        masks_queries_logits=masks(64), class_queries_logits=classes(CLASSES + 1)
    )
    eomt = EomtForUniversalSegmentationOutput(
        masks_queries_logits=masks(32), class_queries_logits=classes(CLASSES + 1)
    )
    rf_detr = RfDetrInstanceSegmentationOutput(pred_masks=masks(32), logits=classes(CLASSES) - 4)
    size = {"shortest_edge": 128, "longest_edge": 128}
    processors = Mask2FormerImageProcessor(), EomtImageProcessor(size=size), RfDetrImageProcessor()
    for name, outputs, processor, more in zip(
        ("Mask2Former", "EoMT", "RF-DETR"),
        (mask2former, eomt, rf_detr),
        processors,
        ({}, {"size": size}, {}),
        strict=True,
    ):
        kinds = [("instance", post_process_instance_segmentation)]
        if name != "RF-DETR":
            kinds.append(("panoptic", post_process_panoptic_segmentation))
            labels = post_process_semantic_segmentation(outputs, SIZES, **more)[0]
            theirs = processor.post_process_semantic_segmentation(outputs, SIZES)[0]
            print(f"{name} semantic: {100 * (labels == theirs).float().mean():.3f} % equal")
        for kind, function in kinds:
            whole = {"target_sizes": SIZES}
            if kind == "panoptic":
                # Random masks overlap more than a model's: with the usual 0.8 there would be no segment.
                whole["overlap_mask_area_threshold"] = 0.2
            ours = function(outputs, **whole, **more)[0]
            method = getattr(processor, f"post_process_{kind}_segmentation")
            options = {"label_ids_to_fuse": set()} if (name, kind) == ("Mask2Former", "panoptic") else {}
            expected = method(outputs, **whole, **options)[0]
            share = 100 * same(ours, expected)
            print(f"{name} {kind}: {len(ours['segments_info'])} segments, {share:.3f} % equal")


if __name__ == "__main__":
    main()
