"""post_process_instance_segmentation against the processors of the installed transformers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from segvit_kernels import record_backends
from segvit_kernels.integrations import post_process_instance_segmentation
from segvit_kernels.integrations.transformers import instances

pytest.importorskip("transformers.models.rf_detr", reason="pip install -e '.[transformers]'; 5.23 has all")
import transformers as hf
from outputs import OUTPUTS as MASK_CLASSIFIERS
from outputs import SIZE, TARGETS, blobs
from transformers.models.rf_detr.modeling_rf_detr import RfDetrInstanceSegmentationOutput
from transformers.models.videomt.modeling_videomt import VideomtForUniversalSegmentationOutput

CLASSES, QUERIES, GRID = 6, 30, (24, 30)
OUTPUTS = {
    **MASK_CLASSIFIERS,
    "videomt": VideomtForUniversalSegmentationOutput,
    "rf_detr": RfDetrInstanceSegmentationOutput,
}
CLASSIC = ("maskformer", "mask2former")


def processor(name):
    if name == "oneformer":
        made = hf.OneFormerImageProcessor.__new__(hf.OneFormerImageProcessor)
        made.class_info_file = "coco"
        return made
    kinds = {
        "maskformer": hf.MaskFormerImageProcessor,
        "mask2former": hf.Mask2FormerImageProcessor,
        "videomt": hf.VideomtVideoProcessor,
        "rf_detr": hf.RfDetrImageProcessor,
    }
    return kinds[name]() if name in kinds else hf.EomtImageProcessor(size=SIZE)


def made(name, seed=0, dtype=torch.float32, scale=5.0):
    """One blob is of a single cell."""
    masks, classes = blobs(seed, QUERIES, GRID, CLASSES + (name != "rf_detr"), CLASSES, (0.3, 7.3), scale)
    masks[:, 0] = -5.0
    masks[:, 0, 7, 7] = 5.0  # which nearest neighbours may miss
    if name == "rf_detr":
        return OUTPUTS[name](pred_masks=masks.to(dtype), logits=(classes - 2).to(dtype))
    return OUTPUTS[name](masks_queries_logits=masks.to(dtype), class_queries_logits=classes.to(dtype))


def ours(name, outputs, **options):
    more = {"size": SIZE} if name.startswith("eomt") else {}
    return post_process_instance_segmentation(outputs, **options, **more)


def assert_same(found, expected, least=3):
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert len(other["segments_info"]) >= least
        assert own["segments_info"] == other["segments_info"]
        a, b = own["segmentation"], other["segmentation"]
        if isinstance(b, list):
            assert a == b
        else:
            assert a.dtype == b.dtype and a.shape == b.shape
            assert torch.equal(a, b), f"{(a != b).sum()} of {a.numel()} pixels differ"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("threshold", [None, 0.0, 0.3])
@pytest.mark.parametrize("name", OUTPUTS)
def test_segments_and_pixels(name, threshold, dtype):
    outputs = made(name, dtype=dtype)
    options = {} if threshold is None else {"threshold": threshold}
    # OneFormer's processor smooths where it shrinks.
    targets = [(50, 61), (33, 90)] if name != "mask2former" else [(500, 610), (33, 90)]
    expected = processor(name).post_process_instance_segmentation(outputs, target_sizes=targets, **options)
    assert_same(ours(name, outputs, target_sizes=targets, **options), expected)


@pytest.mark.parametrize("name", ["maskformer", "mask2former", "oneformer", "rf_detr"])
def test_without_target_sizes_and_other_forms(name):
    outputs, theirs = made(name, 1), processor(name).post_process_instance_segmentation
    # On its own grid nothing is resized in OneFormer's processor.
    assert_same(ours(name, outputs), theirs(outputs))
    forms = ["return_coco_annotation", *["return_binary_maps"] * (name != "oneformer")]
    for form in forms:
        options = {form: True, "threshold": 0.4, "target_sizes": TARGETS}
        assert_same(ours(name, outputs, **options), theirs(outputs, **options))
        nothing = {**options, "threshold": 0.9999999}
        assert_same(ours(name, outputs, **nothing), theirs(outputs, **nothing), least=0)


@pytest.mark.parametrize("name", OUTPUTS)
def test_one_instance_and_none(name):
    outputs, theirs = made(name, 2), processor(name).post_process_instance_segmentation
    options = {"target_sizes": TARGETS}
    scores = theirs(outputs, threshold=0.01, **options)
    highest = max(entry["score"] for image in scores for entry in image["segments_info"])
    for threshold in (highest - 1e-3, 0.999999):
        found = ours(name, outputs, threshold=threshold, **options)
        assert_same(found, theirs(outputs, threshold=threshold, **options), least=0)


def test_options_of_single_models():
    outputs, targets = made("oneformer", 3), {"target_sizes": TARGETS}
    theirs = processor("oneformer").post_process_instance_segmentation
    for options in (
        {"is_demo": False},
        {"mask_threshold": 1.7, "overlap_mask_area_threshold": 0.3},
        {"overlap_mask_area_threshold": 0.95, "threshold": 0.1},
    ):
        assert_same(ours("oneformer", outputs, **options, **targets), theirs(outputs, **options, **targets))
    outputs = made("rf_detr", 3)
    theirs = processor("rf_detr").post_process_instance_segmentation
    for options in ({"mask_threshold": 1.5}, {"top_k": 4}, {"top_k": 10_000, "threshold": 0.05}):
        assert_same(ours("rf_detr", outputs, **options, **targets), theirs(outputs, **options, **targets))


def test_parts_change_nothing(monkeypatch):
    outputs = [made(name, 4) for name in ("mask2former", "rf_detr")]
    expected = [ours("", o, target_sizes=TARGETS, threshold=0.2) for o in outputs]
    monkeypatch.setattr(instances, "_BUDGET", 1)
    for output, other in zip(outputs, expected, strict=True):
        with record_backends() as taken:
            assert_same(ours("", output, target_sizes=TARGETS, threshold=0.2), other)
    assert taken["mask_binarize"]


def test_what_inherits_is_known():
    outputs = made("mask2former")

    class Derived(type(outputs)):
        pass

    assert_same(ours("", Derived(**outputs), target_sizes=TARGETS), ours("", outputs, target_sizes=TARGETS))


def test_no_mask_of_every_query_at_full_size():
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
            return result

    for name in ("mask2former", "rf_detr"):
        with Largest() as largest:
            ours(name, made(name), target_sizes=[(1024, 1024)] * 2, threshold=0.0)
        # The result is one map of 4 MB; masks of all queries are 126.
        assert largest.bytes <= 8 * 2**20 + 2**16


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("eomt", {"size": None}, ValueError, "size is None; expected the image processor's"),
        ("eomt", {"target_sizes": None}, ValueError, r"target_sizes is None; expected .* for a EomtFor"),
        ("eomt", {"return_binary_maps": True}, ValueError, "return_binary_maps is True; expected F"),
        ("videomt", {"return_coco_annotation": True}, ValueError, "return_coco_annotation is True"),
        ("maskformer", {"target_sizes": TARGETS[:1]}, ValueError, "target_sizes has length 1; expected 2"),
        ("maskformer", {"size": SIZE}, ValueError, "expected None for a MaskFormer"),
        ("maskformer", {"top_k": 3}, ValueError, "top_k is 3; expected None for a MaskFormer"),
        ("maskformer", {"threshold": "x"}, TypeError, "threshold is 'x'; expected a number"),
        ("maskformer", {"return_binary_maps": 1}, TypeError, "return_binary_maps is 1; expected"),
        ("maskformer", {"return_binary_maps": True, "return_coco_annotation": True}, ValueError, "both True"),
        ("rf_detr", {"top_k": 0}, ValueError, "top_k is 0; expected at least 1"),
    ],
)  # fmt: skip
def test_bad_arguments(name, options, error, message):
    given = {"target_sizes": TARGETS} | ({"size": SIZE} if name == "eomt" else {}) | options
    with pytest.raises(error, match=message):
        post_process_instance_segmentation(made(name), **given)


def test_other_outputs():
    with pytest.raises(TypeError, match=r"outputs is a dict; expected one of MaskFormerFor.*RfDetrInstance"):
        post_process_instance_segmentation({})
    outputs = made("eomt")
    outputs.patch_offsets = [torch.tensor([0, 0, 64])]
    with pytest.raises(ValueError, match="outputs has patch_offsets; expected those of whole images"):
        ours("eomt", outputs, target_sizes=TARGETS)


def test_not_a_number():
    """A mask that is none has no score, and is no instance."""
    outputs = made("maskformer")
    outputs.masks_queries_logits[:, ::3] = torch.nan
    options = {"target_sizes": TARGETS, "threshold": 0.0}
    theirs = processor("maskformer").post_process_instance_segmentation(outputs, **options)
    assert_same(ours("maskformer", outputs, **options), theirs)
