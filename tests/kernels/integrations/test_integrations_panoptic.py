"""post_process_panoptic_segmentation against the image processors of the installed transformers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from segvit_kernels.integrations import post_process_panoptic_segmentation
from segvit_kernels.integrations.transformers import panoptic

pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[transformers]'")
import transformers as hf
from outputs import OUTPUTS, SIZE, TARGETS, blobs
from transformers.image_transforms import get_size_with_aspect_ratio

CLASSES, QUERIES, GRID = 6, 24, (16, 20)


def processor(name):
    if name == "oneformer":
        return hf.OneFormerImageProcessor.__new__(hf.OneFormerImageProcessor)
    kinds = {"maskformer": hf.MaskFormerImageProcessor, "mask2former": hf.Mask2FormerImageProcessor}
    return kinds[name]() if name in kinds else hf.EomtImageProcessor(size=SIZE)


def made(name, seed, dtype=torch.float32):
    masks, classes = blobs(seed, QUERIES, GRID, CLASSES + 1, CLASSES, (2, 7), 5.0)
    return OUTPUTS[name](masks_queries_logits=masks.to(dtype), class_queries_logits=classes.to(dtype))


def theirs(name, outputs, fused, **options):
    if name.startswith("eomt"):
        return processor(name).post_process_panoptic_segmentation(outputs, stuff_classes=fused, **options)
    return processor(name).post_process_panoptic_segmentation(outputs, label_ids_to_fuse=fused, **options)


def ours(name, outputs, fused, **options):
    if name.startswith("eomt"):
        return post_process_panoptic_segmentation(outputs, stuff_classes=fused, size=SIZE, **options)
    return post_process_panoptic_segmentation(outputs, label_ids_to_fuse=fused, **options)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert own["segments_info"] == other["segments_info"]
        assert own["segmentation"].dtype == other["segmentation"].dtype
        assert torch.equal(own["segmentation"], other["segmentation"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("fused", [set(), {1, 4}, set(range(CLASSES))], ids=["none", "some", "all"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_everything_is_theirs(name, fused, dtype, monkeypatch):
    monkeypatch.delenv("SEGVIT_KERNELS_BACKEND", raising=False)  # the native library where it is built
    most = 0
    for seed in range(3):
        outputs = made(name, seed, dtype)
        options = {"target_sizes": TARGETS, "overlap_mask_area_threshold": 0.5}
        expected = theirs(name, outputs, fused, **options)
        assert_same(ours(name, outputs, fused, **options), expected)
        most = max(most, len(expected[0]["segments_info"]))
    assert most >= (3 if name.startswith("eomt") and len(fused) == CLASSES else 5), "several segments survive"


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.97, "mask_threshold": 0.3},
        {"threshold": 0.0, "overlap_mask_area_threshold": 0.0},
        {"overlap_mask_area_threshold": 0.9, "mask_threshold": 0.8},
        {"threshold": 1.0},  # nothing
    ],
    ids=str,
)
def test_thresholds(options, name):
    outputs = made(name, 7)
    options = {"target_sizes": TARGETS, **options}
    assert_same(ours(name, outputs, {2}, **options), theirs(name, outputs, {2}, **options))


@pytest.mark.parametrize("name", ["maskformer", "mask2former", "oneformer"])
def test_without_target_sizes(name):
    outputs = made(name, 3)
    for threshold in (0.5, 1.0):
        expected = theirs(name, outputs, {1}, threshold=threshold)
        assert_same(ours(name, outputs, {1}, threshold=threshold), expected)


def test_classes_that_inherit():
    class Own(OUTPUTS["mask2former"]):
        pass

    outputs = made("mask2former", 0)
    own = Own(**outputs)
    expected = ours("mask2former", outputs, {1}, target_sizes=TARGETS)
    assert_same(ours("mask2former", own, {1}, target_sizes=TARGETS), expected)


@pytest.mark.parametrize("longest", [None, 64, 80, 200])
def test_the_size_of_an_image_in_eomt(longest):
    for size in [(h, w) for h in (1, 17, 63, 64, 65, 300) for w in (1, 40, 64, 99, 640)]:
        assert panoptic._fitted(size, 64, longest) == get_size_with_aspect_ratio(size, 64, longest)


def test_ids_count_as_theirs_do():
    """Random validity and classes against the loop that says how; long chains too."""
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 33, 200):
        for share in (0.3, 1.0):
            valid = torch.rand(2, count, generator=generator) < share
            labels = torch.randint(5, (2, count), generator=generator)
            found = panoptic._counted_on(valid, labels, (0, 3))
            for b in range(2):
                current, memory, expected = 0, {}, []
                for k in range(count):
                    label = int(labels[b, k])
                    if not valid[b, k]:
                        expected.append(0)
                        continue
                    current = memory.get(label, current + 1)
                    if label in (0, 3):
                        memory[label] = current
                    expected.append(current)
                assert found[b].tolist() == expected


@pytest.mark.parametrize(
    "name, change, error, message",
    [
        (
            "mask2former",
            {"stuff_classes": [1]},
            ValueError,
            r"stuff_classes is \[1\]; expected None for a M",
        ),
        ("mask2former", {"size": SIZE}, ValueError, "size is .* expected None for a Mask2Former"),
        (
            "eomt",
            {"label_ids_to_fuse": {1}},
            ValueError,
            "label_ids_to_fuse is .* expected stuff_classes",
        ),
        ("eomt", {"size": None}, ValueError, "size is None; expected the image processor's for EoMT"),
        ("eomt", {"target_sizes": None}, ValueError, "target_sizes is None"),
        ("maskformer", {"target_sizes": [(3, 4)]}, ValueError, "target_sizes has length 1; expected 2"),
        ("maskformer", {"threshold": "x"}, TypeError, "threshold is 'x'; expected a number"),
        ("maskformer", {"outputs": object()}, TypeError, "outputs is a object; expected one of MaskFormer"),
    ],
)
def test_refusals(name, change, error, message):
    given = {"outputs": made(name, 0), "target_sizes": TARGETS}
    if name == "eomt":
        given["size"] = SIZE
    with pytest.raises(error, match=message):
        post_process_panoptic_segmentation(**{**given, **change})
