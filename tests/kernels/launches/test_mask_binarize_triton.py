"""Launch parameters of the Triton kernel of mask_binarize, in the interpreter."""

import dataclasses

import pytest
import torch
from backends import BY_ID
from test_mask_binarize import FEW, check

from segvit_kernels.triton import mask_binarize as kernels


@pytest.mark.parametrize("size", [(9, 40), (70, 1100)], ids=["small", "several programs"])
def test_pinned_launches(size, poisoned, monkeypatch):
    """The battery's programs have other columns and rows."""
    config = kernels._config
    monkeypatch.setattr(kernels, "_config", lambda shape, layout, arch: config(shape, layout, "sm_90"))
    check(dataclasses.replace(FEW[0], size=size), torch.float32, BY_ID["triton"])


def test_configurations_are_pure_and_fill_the_device():
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942", "sm_75"):
        for layout in range(3):
            for shape in ((1, 1024, 1024), (300, 1024, 1024), (0, 7, 9), (5, 1, 1)):
                config = kernels._config(shape, layout, arch)
                assert config == kernels._config(shape, layout, arch)
                assert config["rows"] % 32 == 0 and 0 < config["rows"] < 256
    one, many = (kernels._config((n, 1024, 1024), 0, "sm_90")["rows"] for n in (1, 3000))
    assert one == 32 and many == 224
