"""Launch parameters of the Triton kernels of subsample_layer_norm, in the interpreter."""

import dataclasses

import pytest
import torch
from backends import Launchers
from test_subsample_norm import SMALL, check

from segvit_kernels.testing.subsample_norm import CASES, SHAPES, SubsampleNormCase
from segvit_kernels.triton import subsample_norm
from segvit_kernels.triton._launch import pinned


def launchers(fwd=None, bwd=None):
    return Launchers(subsample_norm, {"subsample_norm_fwd": fwd, "subsample_norm_bwd": bwd})


@pytest.mark.parametrize(("block_n", "steps"), [(1, 1), (1, 100), (2, 3), (16, 1), (16, 2), (64, 1)])
def test_tiles(block_n, steps, poisoned):
    check(SMALL, torch.float32, launchers({"block_n": block_n}, {"block_n": block_n, "steps": steps}))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("channels", [96, 768])
def test_pinned_tiles_of_other_architectures(arch, channels, poisoned):
    case = dataclasses.replace(SMALL, channels=channels, batch=2)
    shape = (case.batch, case.tokens[0], channels)
    fwd = subsample_norm._fwd_config(shape, torch.float16, arch)
    bwd = subsample_norm._bwd_config(shape, torch.float16, arch)
    check(case, torch.float16, launchers(fwd, bwd))


def test_many_partials_are_added(poisoned):
    """More programs than one block of the second launch adds."""
    case = SubsampleNormCase("many", 1, (10, 7), 18)
    check(case, torch.float32, launchers(bwd={"block_n": 1, "steps": 1}))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", "sm_75"])
def test_configurations_are_pure_and_complete(arch):
    programs = 4 * pinned(arch)["multiprocessors"]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for case in (*CASES, *SHAPES):
            for batch in (1, 16):
                shape = (batch, case.tokens[0], case.channels)
                fwd = subsample_norm._fwd_config(shape, dtype, arch)
                bwd = subsample_norm._bwd_config(shape, dtype, arch)
                assert fwd == subsample_norm._fwd_config(shape, dtype, arch)
                assert bwd == subsample_norm._bwd_config(shape, dtype, arch)
                per_program = bwd["block_n"] * bwd["steps"]
                assert per_program >= 8 and -(-shape[0] * shape[1] // per_program) <= programs
