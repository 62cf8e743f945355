"""SAM 3's post-processing against the image processor of the installed transformers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from segvit_kernels.integrations import (
    post_process_instance_segmentation,
    post_process_semantic_segmentation,
)

pytest.importorskip("transformers.models.sam3", reason="pip install -e '.[transformers]'; 5.23 has all")
import transformers as hf
from transformers.models.sam3.modeling_sam3 import Sam3ImageSegmentationOutput

SIZES = [(37, 52), (20, 90)]


def made(presence=True, shift=0.0):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Sam3ImageSegmentationOutput(
        pred_masks=draw(2, 9, 12, 14),
        pred_boxes=draw(2, 9, 4).sigmoid(),
        pred_logits=draw(2, 9) + shift,
        presence_logits=draw(2, 1) + 2 if presence else None,
        semantic_seg=draw(2, 1, 12, 14),
    )


def processor():
    return hf.Sam3ImageProcessor()


@pytest.mark.parametrize("sizes", [None, SIZES], ids=["own size", "resized"])
@pytest.mark.parametrize("options", [{}, {"threshold": 0.6, "mask_threshold": 0.8}], ids=["", "thresholds"])
@pytest.mark.parametrize("presence", [True, False], ids=["presence", "none"])
def test_instances(presence, options, sizes):
    outputs = made(presence)
    theirs = processor().post_process_instance_segmentation(outputs, target_sizes=sizes, **options)
    ours = post_process_instance_segmentation(outputs, target_sizes=sizes, **options)
    assert sum(len(image["scores"]) for image in ours) > 2
    for own, expected in zip(ours, theirs, strict=True):
        assert list(own) == list(expected)
        assert torch.equal(own["scores"], expected["scores"])
        torch.testing.assert_close(own["boxes"], expected["boxes"].to(own["boxes"]))
        assert own["masks"].dtype == torch.bool and torch.equal(own["masks"].long(), expected["masks"])


def test_the_lighter_model_has_the_same_output():
    module = pytest.importorskip("transformers.models.sam3_lite_text.modeling_sam3_lite_text")
    outputs = made()
    light = module.Sam3LiteTextImageSegmentationOutput(**outputs)
    pairs = [post_process_instance_segmentation(o, target_sizes=SIZES) for o in (outputs, light)]
    assert all(torch.equal(a["masks"], b["masks"]) for a, b in zip(*pairs, strict=True))


def test_no_instance():
    own, other = post_process_instance_segmentation(made(shift=-100.0), target_sizes=SIZES)
    assert len(own["scores"]) == len(other["masks"]) == 0 and own["boxes"].shape == (0, 4)


@pytest.mark.parametrize("sizes", [None, SIZES], ids=["own size", "resized"])
@pytest.mark.parametrize("options", [{}, {"threshold": 0.7}], ids=["", "threshold"])
def test_semantic(options, sizes):
    outputs = made()
    theirs = processor().post_process_semantic_segmentation(outputs, target_sizes=sizes, **options)
    ours = post_process_semantic_segmentation(outputs, sizes, **options)
    for own, expected in zip(ours, theirs, strict=True):
        assert own.dtype == expected.dtype and torch.equal(own, expected) and own.any()


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (post_process_instance_segmentation, {"target_sizes": SIZES[:1]}, "target_sizes has length 1"),
        (post_process_instance_segmentation, {"mask_threshold": 1.5}, "mask_threshold is 1.5; expected 0"),
        (post_process_instance_segmentation, {"return_binary_maps": True}, "return_binary_maps is True"),
        (post_process_instance_segmentation, {"top_k": 3}, "top_k is 3; expected none for SAM 3"),
        (post_process_semantic_segmentation, {"direct": True}, "direct is True; expected none for SAM 3"),
        (post_process_semantic_segmentation, {"threshold": -1}, "threshold is -1; expected 0 to 1"),
        (post_process_semantic_segmentation, {"target_sizes": SIZES * 2}, "target_sizes has length 4"),
    ],
)
def test_refusals(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(made(), **options)


def test_no_semantic_head():
    outputs = made()
    outputs.semantic_seg = None
    with pytest.raises(ValueError, match="outputs has semantic_seg None"):
        post_process_semantic_segmentation(outputs)
