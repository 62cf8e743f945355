"""Launch parameters of the Triton kernels of semantic_argmax, in the interpreter."""

import math

import pytest
import torch
from backends import PTX, Launchers
from test_semantic_argmax import BY_NAME, TILES, check, reach_of, run, stacks, tiled

from segvit_kernels.ops.semantic_argmax import View, Views
from segvit_kernels.testing.semantic_argmax import CASES, SemanticCase, assert_labels, oracle
from segvit_kernels.triton import semantic_argmax as kernels

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])

# Large tiles keep the interpreter quick, and are too large for GPUs, whose own test_pinned_tiles has.
SMALL = {"tile_y": 8, "tile_x": 8, "cells": 64, "block_q": 32}
LARGE = SMALL if PTX else {**TILES, "cells": 512}


def _launchers(inputs, config=LARGE):
    """``config`` may give tiles, from which the rest follows."""
    config = dict(config)
    if "cells" in config:
        most = config.pop("cells")
        config = tiled(kernels, config, reach_of(inputs), most)
    return Launchers(kernels, {"semantic_argmax": config})


def _run(inputs, *, config=LARGE, **options):
    return run(inputs, _launchers(inputs, config), **options)


def _check(name, inputs, *, config=LARGE, scores=False, **options):
    return check(name, inputs, _launchers(inputs, config), scores=scores, **options)


@pytest.mark.parametrize(
    ("case", "arch"), [("classes_171", "sm_80"), ("classes_171", "sm_90"), ("classes_300", "gfx942")]
)
def test_pinned_tiles(case, arch, poisoned):
    case, dtype = BY_NAME[case], torch.float32 if arch == "sm_80" else torch.float16
    inputs = case.inputs(dtype)
    reach = [grid / side for grid, side in zip(inputs["mask_logits"].shape[2:], case.size, strict=True)]
    config = kernels._config((1, *case.size, case.queries, case.classes), dtype, arch, tuple(reach))
    _check(case.name, inputs, config=config)


@DTYPES
@pytest.mark.parametrize("cells", [64, 0], ids=["product", "loads"])
@pytest.mark.parametrize("case", ["odd", "mixed"])
def test_both_interpolations(case, cells, dtype, poisoned):
    _check(case, BY_NAME[case].inputs(dtype), config={**SMALL, "tile_y": 16, "tile_x": 16, "cells": cells})


@pytest.mark.parametrize("case", [c.name for c in CASES if not c.views and c.classes <= 176])
def test_held_class_probs(case, poisoned):
    """Programs that run through several tiles, the last of them shorter, with class probabilities held."""
    case = BY_NAME[case]
    inputs = case.inputs(torch.float16)
    tile = {"tile_y": 16, "tile_x": 32} if max(case.size) > 40 else {"tile_y": 8, "tile_x": 8}
    config = {**LARGE, **tile, "held": 2**20, "programs": 1}
    labels = _check(case.name, inputs, config=config)
    assert torch.equal(_run(inputs, scores=True, config=config)[0], labels)


@DTYPES
def test_patches_of_a_power_of_two(dtype, poisoned):
    """Weights that float16 holds exactly are not split."""
    case = SemanticCase("patch_16", ((1, 2, 2),), 20, 19, (32, 32))
    for held in (0, 2**20):
        _check(case.name, case.inputs(dtype), config={**SMALL, "held": held})


@pytest.mark.parametrize(
    ("parts", "dtype"), [((16,), torch.float16), ((16, 16), torch.float32), ((32, 16, 16), torch.float16)]
)
def test_turns(parts, dtype, poisoned):
    """Classes that do not fit at once are taken in turns, ties between turns included."""
    case = SemanticCase("turns", ((1, 5, 6),), 40, 70, (10, 12))
    inputs = case.inputs(dtype)
    config = {**SMALL, "parts": parts, "turns": -(-70 // sum(parts)), "head": 0}
    labels = _check(case.name, inputs, config=config)
    _check(case.name, inputs, scores=True, config=config)
    # Sums that are exact in any order: the interpreter's products may differ from column to column.
    probs = inputs["class_probs"].mul_(64).round_().div_(64)
    probs[..., 35:] = probs[..., :35]
    for logits in inputs["mask_logits"]:
        logits.zero_()
    assert torch.equal(_run(inputs, config=config) < 35, torch.ones_like(labels, dtype=torch.bool))


@pytest.fixture
def blocks(monkeypatch):
    """One for every 32 tokens of which programs compute σ; compiled kernels cannot be counted so."""
    if PTX:
        pytest.skip("counted in Triton's interpreter alone")
    calls, activate = [], kernels._activate

    def counted(x, *args, **kwargs):
        calls.extend([1] * (int(x.shape[1]) // 32))
        return activate(x, *args, **kwargs)

    monkeypatch.setattr(kernels, "_activate", counted)
    return calls


TRAINED = SemanticCase("trained", ((1, 5, 6),), 150, 21, (16, 24))
TILES = 2 * 3


def _trained(dtype):
    """Few tokens have the class mass, and areas of their own with one border down the middle."""
    generator = torch.Generator().manual_seed(5)
    inputs = TRAINED.inputs(dtype)
    masks, probs = inputs["mask_logits"], inputs["class_probs"]
    probs[:] = (torch.rand(probs.shape, generator=generator) * 1e-4).to(dtype)
    heavy = torch.randperm(150, generator=generator)[:6]
    probs[:, heavy, torch.arange(6)] = 0.9
    masks[:, heavy] = -9
    masks[:, heavy[0], :, :3] = 9
    masks[:, heavy[1], :, 3:] = 9
    return inputs


HELD = pytest.mark.parametrize(
    ("dtype", "held"),
    [(torch.float32, 0), (torch.float16, 0), (torch.float16, 2**20)],
    ids=["fp32", "fp16", "fp16-held"],
)


@HELD
def test_decided_tiles_skip_the_tail(dtype, held, blocks, poisoned):
    inputs = _trained(dtype)
    config = {**SMALL, "held": held}
    labels = _check("decided", inputs, config=config)
    assert blocks and len(blocks) == TILES, "every tile is decided by one block of 32 tokens"
    blocks.clear()
    assert torch.equal(_run(inputs, config={**config, "head": 0}), labels)
    assert len(blocks) == TILES * 5


def _undecided(dtype, tail):
    """In the last columns light tokens are alone: 0.08 for class 7, and 110 ``tail`` for class 8."""
    inputs = _trained(dtype)
    masks, probs = inputs["mask_logits"], inputs["class_probs"]
    heavy = probs.amax(-1)[0].topk(6).indices
    light = [q for q in range(150) if q not in heavy]
    probs[:, light] = 0
    probs[:, light[:40], 7] = 2e-3  # fills the head
    probs[:, light[40:], 8] = tail
    masks[:] = -20
    masks[:, heavy[0], :, :5] = 9
    masks[:, light, :, 5] = 20
    return inputs


@HELD
def test_undecided_tiles_run_the_tail(dtype, held, blocks, poisoned):
    labels = _check("undecided", _undecided(dtype, 1e-3), config={**SMALL, "held": held})
    assert (labels[..., -2:] == 8).all(), "the tail decides"
    assert TILES < len(blocks) < TILES * 5


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_the_bound_is_that_of_the_worst_view(order, poisoned):
    both = [_undecided(torch.float32, tail) for tail in (1.8e-3, 1e-6)]
    inputs = {key: torch.cat([both[i][key] for i in order]) for key in ("mask_logits", "class_probs")}
    size = TRAINED.size
    for groups in ((0, 0), (0, 1)):
        views = Views([View.whole(0, (5, 6), size, group) for group in groups], 1, size)
        labels = _check("views", {**inputs, "size": size, "views": views}, config=SMALL)
        assert (labels[..., -2:] == 8).all(), "the tail of one view decides"


@DTYPES
def test_tails_of_several_views(dtype, blocks, poisoned):
    """A flipped second view over a part of the image."""
    inputs = _trained(dtype)
    size = inputs["size"]
    masks, probs = inputs["mask_logits"], inputs["class_probs"]
    views = [View.whole(0, (5, 6), size), View.crop(0, size, size, 0, 10, (16, 14), (5, 6), True, 1)]
    other = probs * 0.5
    other[:, :, 9] += 2e-3
    inputs["mask_logits"], inputs["class_probs"] = torch.cat([masks, masks]), torch.cat([probs, other])
    inputs["views"] = Views(views, 1, size)
    labels = _check("views", inputs, config=SMALL)
    some = len(blocks)
    assert torch.equal(_run(inputs, config={**SMALL, "head": 0}), labels)
    assert some < len(blocks) - some


def test_without_concentration_there_is_no_test(blocks, monkeypatch):
    """Where the tail is worth much, all tokens are the head; a negative value has no bound either."""
    monkeypatch.setattr(kernels, "_decide", None)
    inputs = TRAINED.inputs(torch.float16)
    _check("spread", inputs, config=SMALL)
    inputs = _trained(torch.float16)
    inputs["class_probs"][0, 77, 3] = -0.01
    for held in (0, 2**20):
        _check("negative", inputs, config={**SMALL, "held": held})


@pytest.mark.parametrize(("case", "dtype"), [("classes_150", torch.float16), ("mixed", torch.float32)])
def test_prune(case, dtype, blocks, poisoned):
    inputs = BY_NAME[case].inputs(dtype)
    generator = torch.Generator().manual_seed(3)
    probs = inputs["class_probs"]
    probs *= (torch.rand(probs.shape[:2], generator=generator) < 0.2).to(dtype)[..., None] * 0.9 + 0.1
    _run(inputs, config={**LARGE, "head": 0})
    full = len(blocks)
    blocks.clear()
    _check(case, inputs, prune=0.5, scores=True)
    assert len(blocks) < 2 * full
    assert not _run(inputs, prune=1e6).any()


def test_bfloat16_is_converted(poisoned):
    """The products are of float16; nothing is lost but the range beyond 65504."""
    case = BY_NAME["mixed"]
    inputs = case.inputs(torch.bfloat16)
    exact = {**inputs, "mask_logits": [m.to(torch.float16) for m in inputs["mask_logits"]]}
    assert torch.equal(_run(inputs), _run(exact))
    inputs = BY_NAME["odd"].inputs(torch.bfloat16)
    inputs["mask_logits"][:, ::2] *= 1e6
    truth = oracle(inputs)
    ordinary = oracle({**inputs, "mask_logits": inputs["mask_logits"].clamp(-65504, 65504)}, torch.bfloat16)
    assert_labels("huge", _run(inputs), truth, ordinary)


@pytest.mark.parametrize("scale", [1e-7, 60.0])
def test_small_and_large_probabilities_keep_their_precision(scale, poisoned):
    """The probabilities of each view are scaled for float16, and weighed against those of other views."""
    inputs = BY_NAME["mixed"].inputs(torch.float16)
    plain = _run(inputs)
    inputs["class_probs"] = inputs["class_probs"].float() * scale
    assert (_run(inputs) != plain).float().mean() < 0.01
    inputs = BY_NAME["odd"].inputs(torch.float16)
    plain, best = _run(inputs, scores=True)
    inputs["class_probs"] = inputs["class_probs"].float() * scale
    labels, scores = _run(inputs, scores=True)
    assert (labels != plain).float().mean() < 0.01
    torch.testing.assert_close(scores, best * scale, rtol=2e-3, atol=0)


def test_small_sigmas_keep_their_precision(poisoned):
    """σ of 1e-6 is far below float16's normal numbers, but what it says still counts."""
    inputs = BY_NAME["odd"].inputs(torch.float16)
    inputs["mask_logits"] = (inputs["mask_logits"].clamp(-3, 3) - 14).to(torch.float16)
    _check("small", inputs)
    truth = oracle(inputs).amax(1)
    torch.testing.assert_close(_run(inputs, scores=True)[1].double(), truth, rtol=3e-3, atol=0)


@pytest.mark.parametrize(
    ("case", "dtype", "held"),
    [
        ("classes_300", torch.float32, 0),
        ("classes_300", torch.float16, 2**20),
        ("one_pixel", torch.float16, 0),
        ("mixed", torch.float32, 0),
    ],
)
def test_not_a_number_gives_some_class(case, dtype, held, poisoned):
    """As of the other backends: class 0 where no score is a number, never a number that is no class."""
    case = BY_NAME[case]
    config = {**LARGE, "held": held, "programs": 1}
    for tokens, classes in ((slice(1), []), ([], [3]), ([], slice(None))):
        inputs = case.inputs(dtype)
        for masks in stacks(inputs["mask_logits"]):
            masks[:, tokens] = math.nan
        inputs["class_probs"][..., classes] = math.nan
        labels = _run(inputs, config=config)
        assert int(labels.min()) >= 0 and int(labels.max()) < case.classes
    if dtype == torch.float32:
        assert not labels.any()


def test_strides(poisoned):
    inputs = BY_NAME["mixed"].inputs(torch.float32)
    labels = _run(inputs)
    first, second = inputs["mask_logits"]
    wide = torch.full((3, 35, 5, 12), math.nan)
    wide[..., 2:9] = first
    odd = {
        **inputs,
        "mask_logits": [wide[..., 2:9], second.transpose(0, 1).contiguous().transpose(0, 1)],
        "class_probs": inputs["class_probs"].transpose(1, 2).contiguous().transpose(1, 2),
    }
    assert torch.equal(_run(odd), labels)


def test_far_strides_are_copied():
    near = torch.empty(2, 8, 4, 32, device="meta")
    assert kernels.addressable(near, 2) is near
    far = torch.empty_strided((2, 8, 4, 32), (2**33, 2**30, 2**30, 1), device="meta")
    assert kernels.addressable(far, 2).is_contiguous()


@pytest.mark.parametrize(
    ("w", "strides", "copied"),
    [
        (1, (4096, 256, 16, 1), True),
        (7, (1024, 128, 12, 1), True),
        (16, (8192, 512, 32, 2), True),
        (16, (8192, 512, 32, 1), False),
        (7, (7, 14 * 16, 7, 1), False),
    ],
)
def test_neighbours_of_a_row_are_neighbours_in_memory(w, strides, copied):
    """The preparing kernel says so to the compiler, which then reads many at once. Rows of 7 that lay apart
    gave wrong labels when compiled, though not in the interpreter."""
    masks = torch.empty(2**15, device="meta").as_strided((2, 8, 16, w), strides)
    probs = torch.empty(2, 8, 5, device="meta")
    config = kernels._config((2, 64, 64, 8, 5), torch.float32, "sm_90", (16 / 64, w / 64))
    _, launches = kernels._launches([masks], probs, [], 2, 64, 64, True, False, 0.0, config)
    taken = launches[0].arguments["masks_ptr"]
    assert taken.is_contiguous() if copied else taken is masks


@pytest.mark.parametrize("queries", [100, 1025, 2100, 5000, 40000])
def test_cells_of_any_number_of_queries_have_a_place_in_shared_memory(queries):
    """64 KiB, which every GPU has: the preparing kernel transposes them there."""
    masks = torch.empty(1, queries, 32, 32, dtype=torch.bfloat16, device="meta")
    probs = torch.empty(1, queries, 5, dtype=torch.bfloat16, device="meta")
    config = kernels._config((1, 64, 64, queries, 5), masks.dtype, "sm_89", (0.5, 0.5))
    _, launches = kernels._launches([masks], probs, [], 1, 64, 64, True, False, 0.0, config)
    cells, padded = (launches[0].constants[name] for name in ("BLOCK_CELLS", "QUERIES"))
    assert 1 <= cells <= 64 and (cells == 1 or 2 * cells * padded <= 2**16)


def test_accumulators():
    assert kernels._parts(150, 192) == ((128, 32), 1)
    assert kernels._parts(171, 192) == ((128, 32, 16), 1)
    assert kernels._parts(300, 192) == ((128, 32), 2)
    for classes in range(1, 1000):
        parts, turns = kernels._parts(classes, 192)
        assert classes <= turns * sum(parts) < 1.25 * classes + 16 * turns
        assert len(parts) <= 3


def test_footprints_hold_every_cell_a_tile_touches():
    for tile in (8, 16, 32):
        for reach in (0.01, 1 / 16, 0.124, 0.25, 0.3, 1.0, 2.7):
            cells = kernels.footprint(tile, reach)
            for offset in torch.linspace(0, 1, 101, dtype=torch.float64).tolist():
                assert math.floor(offset + (tile - 1) * reach) + 2 <= cells


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942", "sm_75"])
def test_configurations_are_pure_and_complete(arch):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for classes in (1, 19, 150, 171, 300, 847):
            for reach in (1 / 16, 0.3, 4.0):
                arguments = ((2, 640, 640, 150, classes), dtype, arch, (reach, reach))
                config = kernels._config(*arguments)
                assert config == kernels._config(*arguments)
                assert sum(config["parts"]) * config["turns"] >= classes
                assert config["head"] % config["block_q"] == 0
