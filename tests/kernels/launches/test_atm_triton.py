"""Launch parameters of the Triton kernels of fused_atm, in the interpreter."""

import dataclasses

import pytest
import torch
from backends import PTX, Launchers, assert_same
from test_atm import BY_NAME, SMALL, check, drawn, dropout_bits, everything

from segvit_kernels.testing.atm import CASES, SHAPES, ATMCase
from segvit_kernels.triton import atm
from segvit_kernels.triton._launch import pinned

# Large tiles keep the interpreter quick; the pinned tiles are those of test_case.
LARGE_FWD = {"block_m": 64, "block_n": 128, "block_c": 128}
_TILES = {"block_m": 64, "block_n": 128, "num_warps": 4, "num_stages": 1}
LARGE_BWD = {"key": _TILES, "query": {**_TILES, "tiles": 1, "splits": 1}}

# Pairs of sizes: queries 1, 7, 150; keys 1, 33, 1600; heads 1, 3, 12, 16; head dims 16 to 128.
PAIRS = (
    ATMCase("q1_k33", 2, 1, 33, 3, 16),
    ATMCase("q1_k1600", 1, 1, 1600, 3, 24),
    ATMCase("q1_k1", 1, 1, 1, 16, 128, previous_masks=True),
    ATMCase("q7_k1", 2, 7, 1, 1, 64),
    ATMCase("q7_k33", 2, 7, 33, 16, 32, previous_masks=True),
    ATMCase("q7_k1600", 1, 7, 1600, 3, 128),
    ATMCase("q150_k1", 1, 150, 1, 3, 32),
    ATMCase("q150_k33", 1, 150, 33, 12, 16),
    ATMCase("q150_k1600", 1, 150, 1600, 1, 32, previous_masks=True),
    ATMCase("q201_k100", 1, 201, 100, 1, 24, broadcast=True),
)


def launchers(fwd=None, bwd=None):
    return Launchers(atm, {"atm_fwd": fwd, "atm_bwd": bwd})


@pytest.mark.parametrize("case", PAIRS, ids=lambda c: c.name)
def test_sizes(case, poisoned):
    dtype, tiles = torch.float16 if case.heads == 3 else torch.float32, min(3, -(-case.queries // 64))
    bwd = {**LARGE_BWD, "query": {**LARGE_BWD["query"], "tiles": tiles}}
    large = launchers({**LARGE_FWD, "tiles": tiles}, bwd)
    check(case, dtype, launchers() if PTX else large, deterministic=False)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_pinned_tiles_of_other_architectures(arch, head_dim, poisoned):
    case = dataclasses.replace(SMALL, head_dim=head_dim, heads=2, queries=150)
    shape = (case.batch, case.queries, case.keys, case.heads, case.head_dim)
    fwd = atm._fwd_config(shape, torch.float16, arch)
    bwd = atm._bwd_config(shape, torch.float16, arch)
    check(case, torch.float16, launchers(fwd, bwd), deterministic=False)


@pytest.mark.parametrize("case", ["odd_dim", "broadcast", "strided", "dropout", "many_queries"])
def test_plan_heads(case, poisoned):
    heads = launchers({"plan": "heads", "block_n": 32})
    check(BY_NAME[case], torch.float32, heads, deterministic=False)


@pytest.mark.parametrize("splits", [1, 2, 3, 16])
def test_key_splits(splits, poisoned):
    config = {"splits": splits, "block_m": 32, "block_n": 16, "tiles": 2}
    check(SMALL, torch.float32, launchers(config), deterministic=False)


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize("broadcast", [False, True])
def test_key_splits_of_the_backward(broadcast, splits, poisoned):
    """Partial sums over splits, over images that share their queries, and over both."""
    case = dataclasses.replace(SMALL, broadcast=broadcast, batch=3, keys=100)
    small = {"block_m": 32, "block_n": 32, "num_warps": 4, "num_stages": 1}
    bwd = {"key": small, "query": {**small, "tiles": 2, "splits": splits}}
    check(case, torch.float32, launchers(bwd=bwd), deterministic=False)


@pytest.mark.parametrize(
    "config",
    [{"tiles": 1, "block_m": 16, "block_n": 16}, {"plan": "heads", "block_m": 32, "block_n": 32}],
    ids=str,
)
def test_dropout_bits_do_not_depend_on_tiles(config):
    dropout_bits(30, launchers(config))


@pytest.mark.parametrize("unused", [0, 1], ids=["output", "masks"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_either_gradient_may_be_missing(unused, dropout_p, poisoned):
    case = dataclasses.replace(SMALL, heads=1, dropout_p=dropout_p)
    large = launchers(bwd=LARGE_BWD)
    check(case, torch.float32, launchers() if PTX else large, unused=unused, deterministic=False)


def test_splits_repeat():
    case = dataclasses.replace(SMALL, broadcast=True)
    backend = launchers()
    inputs, gradients = drawn(case, backend)
    first, second = (everything(case, inputs, gradients, backend, deterministic=False) for _ in range(2))
    assert_same(second, first)


def test_rows_beyond_32_bit_offsets_are_copied():
    near = torch.empty(1, 8, 4, 32, device="meta")
    assert atm._addressable(near) is near
    far = torch.empty_strided((1, 8, 4, 32), (2**33, 2**30, 32, 1), device="meta")
    assert atm._addressable(far).is_contiguous()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", "sm_75"])
def test_configurations_are_pure_and_complete(arch):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for case in (*CASES, *SHAPES):
            shape = (case.batch, case.queries, case.keys, case.heads, case.head_dim)
            fwd, bwd = atm._fwd_config(shape, dtype, arch), atm._bwd_config(shape, dtype, arch)
            assert fwd == atm._fwd_config(shape, dtype, arch)
            assert bwd == atm._bwd_config(shape, dtype, arch)
            assert fwd["plan"] == "fused"
            assert 1 <= fwd["splits"] <= 16
    assert pinned("no such chip") == pinned("default")


def test_keys_are_split_until_the_chip_is_full():
    def splits(batch):
        return atm._fwd_config((batch, 150, 1600, 16, 32), torch.bfloat16, "sm_90")["splits"]

    assert [splits(batch) for batch in (1, 4, 16, 64)] == [16, 4, 1, 1]
