"""The CUDA sources compile for every architecture, GPU or not: no spills, tensor cores where it counts."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BUILT = importlib.import_module("build").parse([]).archs.split(";")
ARCHS = [arch for arch in BUILT if re.match(r"[89]\d|1\d\d", arch)]
"""Those that have tensor cores for both half precisions."""

KERNELS = {
    "attention_bwd": {
        "attention_bwd_delta_kernel",
        "attention_bwd_key_value_kernel",
        "attention_bwd_query_kernel",
        "attention_bwd_sum_kernel",
    },
    "attention_fwd": {"attention_fwd_kernel", "attention_masks_kernel"},
    "mask_iou": {"mask_iou_kernel", "mask_iou_sum_kernel"},
    "mask_binarize": {"mask_binarize_kernel", "mask_binarize_merge_kernel"},
    "mask_loss": {
        "mask_area_kernel",
        "mask_count_kernel",
        "mask_loss_bwd_kernel",
        "mask_loss_fwd_kernel",
        "mask_loss_sum_kernel",
        "mask_matching_kernel",
        "mask_pairs_kernel",
        "mask_sum_kernel",
    },
    "panoptic_argmax": {"panoptic_argmax_cells_kernel", "panoptic_argmax_kernel"},
    "semantic_argmax": {
        "semantic_argmax_fma_kernel",
        "semantic_argmax_mma_kernel",
        "semantic_argmax_prepare_kernel",
    },
    "subsample_norm": {
        "subsample_norm_bwd_kernel",
        "subsample_norm_fwd_kernel",
        "subsample_norm_sum_kernel",
    },
}
"""Kernels by source, without their template arguments."""

TENSOR_CORES = {
    "attention_bwd": {"attention_bwd_key_value_kernel", "attention_bwd_query_kernel"},
    "attention_fwd": {"attention_fwd_kernel", "attention_masks_kernel"},
}


@pytest.fixture(scope="module")
def resources():
    """The module csrc/resources.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "csrc")
        module = importlib.import_module("resources")
    if reason := module.missing():
        pytest.skip(reason)
    return module


@pytest.fixture(scope="module")
def objects(resources):
    return resources.objects()


def _base(name):
    return re.sub(r"<.*", "", name)


def test_kernels_are_all_there_and_nothing_spills(resources, objects):
    kernels = [k for stem, path in objects.items() for k in resources.kernels(stem, path)]
    assert {stem: {_base(k.name) for k in kernels if k.source == stem} for stem in objects} == KERNELS
    assert {k.arch for k in kernels} == {f"sm_{arch}" for arch in BUILT}
    assert [k for k in kernels if k.spilled] == []


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("stem", TENSOR_CORES)
def test_half_precisions_use_tensor_cores(resources, objects, stem, arch):
    found = resources.instructions(objects[stem], f"sm_{arch}", "HMMA", "LDL", "STL")
    tiled = {name: counts for name, counts in found.items() if _base(name) in TENSOR_CORES[stem]}
    assert {_base(name) for name in tiled} == TENSOR_CORES[stem]
    for name, counts in tiled.items():
        assert bool(counts["HMMA"]) == ("<float" not in name), name
    assert [name for name, counts in found.items() if counts["LDL"] or counts["STL"]] == []
