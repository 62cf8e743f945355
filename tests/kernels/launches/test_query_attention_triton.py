"""Launch parameters of the Triton kernels of query_attention, in the interpreter."""

import dataclasses

import pytest
import torch
from backends import PTX, Launchers, assert_same
from test_query_attention import BY_NAME, SIZES, check, drawn, dropout_bits, everything

from segvit_kernels.testing.query_attention import CASES, SHAPES, QueryAttentionCase
from segvit_kernels.triton import query_attention

# Tiles of a few hundred elements keep the interpreter quick; the pinned tiles are those of test_case.
SMALL = {"block_m": 32, "block_n": 32}

# Sizes around the tiles above: less than one, one, one and a ragged or a full smaller tile, several.
NAMES = {"q1_k1600", "q1600_k1", "q31_k32", "q48_k33", "q100_k64", "q17_k100"}
TILED = (
    *(case for case in SIZES if case.name in NAMES),
    QueryAttentionCase("q32_k48", 1, 32, 48, 2, 24),
    QueryAttentionCase("q65_k80", 1, 65, 80, 3, 16),
)


def launchers(fwd=None, bwd=None):
    return Launchers(query_attention, {"query_attention_fwd": fwd, "query_attention_bwd": bwd})


def _tiles(tiles=1, splits=1, **changes):
    """Launch parameters of the backward with small tiles in both of its kernels."""
    small = {**SMALL, "num_warps": 4, "num_stages": 1, **changes}
    return {"key": small, "query": {**small, "tiles": tiles, "splits": splits}}


@pytest.mark.parametrize("case", TILED, ids=lambda c: c.name)
def test_sizes(case, poisoned):
    dtype = torch.float16 if case.heads == 3 else torch.float32
    long = 32 if PTX else 512  # which keeps the interpreter quick, and LLVM busy for minutes
    fwd = {"block_m": long if case.queries > 1000 else 32, "block_n": long if case.keys > 1000 else 32}
    check(case, dtype, launchers(fwd, _tiles(**fwd)), deterministic=False)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_pinned_tiles_of_other_architectures(arch, head_dim, poisoned):
    case = QueryAttentionCase("", 1, 150, 170, 1, head_dim)
    shape = (case.batch, case.queries, case.keys, case.heads, case.head_dim)
    fwd, bwd = (
        config(shape, torch.float16, arch)
        for config in (query_attention._fwd_config, query_attention._bwd_config)
    )
    check(case, torch.float16, launchers(fwd, bwd), deterministic=False)


@pytest.mark.parametrize("keys", [33, 64, 100, 112])
@pytest.mark.parametrize("splits", [1, 2, 3, 8])
def test_key_splits(splits, keys, poisoned):
    """Ragged, whole and full smaller last tiles, which may be all that the last split has."""
    case = QueryAttentionCase("", 2, 21, keys, 2, 16, dropout_p=0.2 if keys == 100 else 0.0)
    fwd = {"splits": splits, "block_m": 16, "block_n": 32}
    check(case, torch.float32, launchers(fwd, _tiles(2, splits, block_m=16)), deterministic=False)


@pytest.mark.parametrize(
    "config",
    [{"block_m": 16, "block_n": 16}, {"block_m": 32, "block_n": 32}, {"block_n": 16, "splits": 2}],
    ids=str,
)
def test_dropout_bits_do_not_depend_on_tiles(config):
    dropout_bits(30, launchers(config))


@pytest.mark.parametrize("broadcast", [False, True])
def test_splits_repeat(broadcast):
    case = dataclasses.replace(BY_NAME["broadcast"], broadcast=broadcast)
    split = launchers(bwd=_tiles(splits=2))
    inputs, gradient = drawn(case, split)
    first, second = (everything(case, inputs, gradient, split, deterministic=False) for _ in range(2))
    assert_same(second, first)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", "sm_75"])
def test_configurations_are_pure_and_complete(arch):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for case in (*CASES, *SHAPES):
            shape = (case.batch, case.queries, case.keys, case.heads, case.head_dim)
            for dropout in (False, True):
                fwd = query_attention._fwd_config(shape, dtype, arch, dropout)
                bwd = query_attention._bwd_config(shape, dtype, arch, dropout)
                assert fwd == query_attention._fwd_config(shape, dtype, arch, dropout)
                assert bwd == query_attention._bwd_config(shape, dtype, arch, dropout)
                assert 1 <= fwd["splits"] <= 8
                assert min(fwd["block_n"], *(bwd[k][side] for k in ("key", "query") for side in SMALL)) >= 16


def test_programs_fill_the_chip():
    def found(batch, queries, keys, dim):
        shape = (batch, queries, keys, 16, dim)
        bwd = query_attention._bwd_config(shape, torch.bfloat16, "sm_90")
        splits = query_attention._fwd_config(shape, torch.bfloat16, "sm_90")["splits"]
        return splits, bwd["key"]["block_n"], bwd["query"]["tiles"], bwd["query"]["splits"]

    assert found(1, 1600, 1600, 32) == (1, 64, 2, 1)
    assert found(1, 400, 1600, 64) == (2, 64, 2, 4)
    assert found(1, 1600, 400, 32) == (1, 64, 2, 1)
    assert found(16, 400, 1600, 64) == (1, 64, 2, 1)
