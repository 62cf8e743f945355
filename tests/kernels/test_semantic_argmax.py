"""semantic_argmax: the battery of every backend; also ``_bounds``, ``_views`` and ``_function``."""

import math

import pytest
import torch
from backends import (
    HALVES,
    assert_same,
    assert_threads_change_nothing,
    backend_of,
    each_backend,
    each_dtype,
    interpreted,
)

from segvit_kernels import _library
from segvit_kernels.ops.semantic_argmax import View, Views, semantic_argmax
from segvit_kernels.testing import assert_within_budget
from segvit_kernels.testing.semantic_argmax import CASES, SemanticCase, assert_labels, oracle

BY_NAME = {case.name: case for case in CASES}
NATIVE = ("cpu", "cuda", "cuda-gpu")
QUICK = ("eager", *NATIVE, "triton-gpu")  # what Triton's interpreter has less of, in a file of its own
RANDOM_OR_TRAINED = pytest.mark.parametrize("concentrated", [False, True], ids=["random", "trained"])
# Few tiles keep the interpreter quick. Tiles that fit a GPU: on the PTX machine, and in test_pinned_tiles.
TILES = {"tile_y": 32, "tile_x": 64, "block_q": 32}


@pytest.fixture(autouse=True)
def few_tiles(request, monkeypatch):
    """Of Triton's interpreter, for calls that give no configuration."""
    if interpreted(backend_of(request.node)):
        from segvit_kernels.triton import semantic_argmax as kernels

        config = kernels._config

        def few(shape, dtype, arch, reach, most=None):
            return {**config(shape, dtype, arch, reach, most), **tiled(kernels, TILES, reach, 512)}

        monkeypatch.setattr(kernels, "_config", few)


def tiled(kernels, tiles, reach, most):
    """Launch parameters of Triton: tiles, and their footprint, a product of at most so many cells or none."""
    cells = [kernels.footprint(tiles[f"tile_{a}"], r) for a, r in zip("yx", reach, strict=True)]
    fits = 16 <= math.prod(cells) <= most
    return {**tiles, "cells_y": cells[0] * fits, "cells_x": cells[1] * fits}


def named(*names):
    return pytest.mark.parametrize("case", [BY_NAME[n] for n in names] or CASES, ids=lambda case: case.name)


def stacks(masks):
    return masks if isinstance(masks, list) else [masks]


def reach_of(inputs):
    """The steps of the operator from pixel to pixel, in cells."""
    if inputs.get("views"):
        return inputs["views"].reach
    grid = stacks(inputs["mask_logits"])[0].shape[2:]
    return [cells / length for cells, length in zip(grid, inputs["size"], strict=True)]


def run(inputs, backend, *, scores=False, activation="sigmoid", prune=0.0):
    """Labels, or labels and scores."""
    masks, probs, views = stacks(inputs["mask_logits"]), inputs["class_probs"], inputs.get("views")
    shape = (views.batch if views else len(probs), *inputs["size"])
    arguments = (views.tensors if views else [], *shape, views.reach if views else [])
    labels, best = backend.op("semantic_argmax")(
        masks, probs, *arguments, activation == "sigmoid", scores, prune
    )
    assert best.shape == (shape if scores else (0,))
    return (labels, best) if scores else labels


def check(name, inputs, backend, *, scores=True, **options):
    """Labels, and with scores labels and scores, within the error budget; returns the labels.

    Half precision is read as it is and summed in float32; on a GPU masks of half precision are multiplied as
    float16.
    """
    given = stacks(inputs["mask_logits"])[0].dtype
    computed = torch.float64 if given == torch.float64 else torch.float32
    if given in HALVES and backend.name in ("triton", "cuda"):
        computed = torch.float16
    truth, ordinary = oracle(inputs, **options), oracle(inputs, computed, **options)
    labels = run(inputs, backend, **options)
    differ = assert_labels(name, labels, truth, ordinary)
    allowed = 0.02 * labels.numel() + 1 if computed == torch.float16 else 0.002 * labels.numel() + 1
    assert differ <= (0 if computed == torch.float64 else allowed), f"{name}: {differ} labels differ"
    if scores:
        again, best = run(inputs, backend, scores=True, **options)
        assert_labels(f"{name} with scores", again, truth, ordinary)
        assert best.dtype == (torch.float64 if computed == torch.float64 else torch.float32)
        assert_within_budget("scores", best.to(computed), truth.amax(1), ordinary.amax(1))
    return labels


def kinds(backend):
    """Whether few queries have nearly all class mass: random masses only where blocks are interpreted."""
    return (False,) if backend.id in ("triton", "cuda") else (False, True)


@each_dtype()
@named()
def test_case(case, backend, dtype, poisoned):
    scores = backend.id != "triton" or case.name in ("one_cell", "odd", "classes_300", "mixed")
    for concentrated in kinds(backend):
        inputs = case.inputs(dtype, backend.device, concentrated=concentrated)
        check(case.name, inputs, backend, scores=scores)


@each_dtype()
@named("one_pixel", "smaller", "classes_171", "mixed")
def test_no_activation(case, backend, dtype, poisoned):
    """Probabilities, and any real numbers, negative scores among them."""
    inputs = case.inputs(dtype, backend.device)
    masks = stacks(inputs["mask_logits"])
    for changed in ([m.sigmoid() for m in masks], masks, [-m.abs() for m in masks]):
        check(case.name, {**inputs, "mask_logits": changed}, backend, activation="none")
        if backend.id == "triton":
            break


@each_backend("eager", *NATIVE)
@pytest.mark.parametrize("classes", [1, 2, 255, 256, 257, 300])
@pytest.mark.parametrize("queries", [1, 3, 65])
def test_numbers_of_classes(classes, queries, backend, poisoned):
    case = SemanticCase("classes", ((1, 5, 4),), queries, classes, (11, 37))
    inputs = case.inputs(torch.float32, backend.device)
    assert check(case.name, inputs, backend).dtype == (torch.uint8 if classes <= 256 else torch.int16)
    inputs["class_probs"][..., -1] += 1
    assert (run(inputs, backend) == classes - 1).all()


@each_backend(*NATIVE)
@pytest.mark.parametrize("queries, classes", [(1030, 7), (9, 1100), (3, 2050)])
def test_large_numbers(queries, classes, backend, poisoned):
    """More queries or classes than are bounded in 8 bits or held at a time."""
    case = SemanticCase("large", ((1, 3, 4),), queries, classes, (6, 21))
    for concentrated in (False, True):
        check(case.name, case.inputs(torch.float32, backend.device, concentrated=concentrated), backend)


@each_backend(*NATIVE)
@pytest.mark.parametrize(
    "grid, size",
    [((1, 1), (3, 70)), ((4, 5), (4, 5)), ((3, 40), (5, 43)), ((3, 200), (2, 70)), ((50, 700), (3, 5)),
     ((2, 2), (33, 65)), ((2, 9), (2, 1030)), ((3, 130), (3, 1100)), ((2, 1500), (2, 700))],
)  # fmt: skip
def test_grids_and_sizes(grid, size, backend, poisoned):
    """Coarse and fine, up and down, several parts of a row."""
    case = SemanticCase("sizes", ((1, *grid),), 35, 21, size)
    for concentrated in kinds(backend):
        check(case.name, case.inputs(torch.float32, backend.device, concentrated=concentrated), backend)


@each_backend("eager", *NATIVE)
@pytest.mark.parametrize("heavy", [0, 4], ids=["spread", "concentrated"])
@pytest.mark.parametrize("first, second", [(0, 1), (3, 17), (5, 149)])
def test_ties_go_to_the_lower_class(first, second, heavy, backend, poisoned):
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(1, 64, 150, generator=generator) / 4
    if heavy:
        probs[:, heavy:] *= 1e-3
    probs[..., first] += 0.5
    probs[..., second] = probs[..., first]
    probs, masks = probs.to(backend.device), 3 + normal(backend, 1, 64, 6, 6)
    views = Views([View.whole(0, (6, 6), (50, 40), g) for g in (0, 0, 1)], 1, (50, 40)).to(backend.device)
    plain = {"mask_logits": masks, "class_probs": probs, "size": (50, 40)}
    several = {"mask_logits": masks.expand(3, -1, -1, -1), "class_probs": probs.expand(3, -1, -1)}
    for inputs in (plain, {**plain, **several, "views": views}):
        assert (run(inputs, backend) == first).all() and (run(inputs, backend, scores=True)[0] == first).all()
    for changed in ({"class_probs": probs * 0}, {"mask_logits": masks * 0 - 1e30}):
        assert not run({**plain, **changed, "size": (5, 4)}, backend).any()


@each_backend()
def test_ties_everywhere_go_to_the_first_class(backend, poisoned):
    inputs = BY_NAME["odd"].inputs(torch.float32, backend.device)
    probs = inputs["class_probs"].mul_(64).round_().div_(64)  # sums that are exact in any order
    probs[:] = probs[..., :1].clone()
    for logits in inputs["mask_logits"]:
        logits.zero_()
    assert not run(inputs, backend).any()
    inputs["class_probs"].zero_()
    assert not run(inputs, backend).any()


def normal(backend, *shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(backend.device)


class TestViews:
    @each_dtype(dtypes=(torch.float64, torch.float32))
    @named("odd", "classes_171")
    def test_whole_views_are_the_plain_form(self, case, backend, dtype):
        inputs = case.inputs(dtype, backend.device)
        (batch, *grid), *_ = case.stacks
        views = Views([View.whole(b, tuple(grid), case.size) for b in range(batch)], batch, case.size)
        labels, best = run(inputs, backend, scores=True)
        found = run({**inputs, "views": views.to(backend.device)}, backend, scores=True)
        assert (found[0] != labels).float().mean() < (1e-9 if dtype == torch.float64 else 0.01)
        # The maps travel in float32.
        torch.testing.assert_close(found[1], best, rtol=0, atol=5e-6 if dtype == torch.float64 else 2e-5)

    @each_backend()
    def test_groups_weigh_the_same(self, backend, poisoned):
        """Three views of a group against one of another: (mean of three + one) / 2, not the mean of four."""
        values = torch.tensor([0.1, 0.2, 0.6, 0.9], device=backend.device).view(4, 1, 1, 1)
        inputs = {"mask_logits": values, "class_probs": values.new_ones(4, 1, 1), "size": (2, 2)}
        for groups, mean in (((5, 5, 5, -1), 0.6), ((0, 0, 0, 0), 0.45)):
            views = Views([View.whole(0, (1, 1), (2, 2), g) for g in groups], 1, (2, 2)).to(backend.device)
            _, best = run({**inputs, "views": views}, backend, scores=True, activation="none")
            torch.testing.assert_close(best, torch.full_like(best, mean))

    @each_backend("eager", *NATIVE)
    def test_one_view_or_several_to_a_row(self, backend, poisoned):
        """Parts of the output that one view covers, and others that flipped views and groups share."""
        size, grid = (40, 150), (4, 9)
        views = [View.crop(0, size, size, 0, x, (40, 70 + x // 7), grid) for x in (0, 70)]
        views += [View.crop(0, size, size, 9, 30, (13, 99), grid, True, group) for group in (0, 2, 2)]
        views = [View(v.image, tuple(torch.tensor(v.affine).tolist()), v.rectangle, v.group) for v in views]
        case = SemanticCase("parts", ((len(views), *grid),), 50, 23, size, tuple(views), 1)
        for concentrated in kinds(backend):
            check(case.name, case.inputs(torch.float32, backend.device, concentrated=concentrated), backend)


@each_backend(*QUICK)
@pytest.mark.parametrize("tau", [1e-3, 0.05, 0.3, 5.0])
@named("wide", "sliding", "classes_150")
def test_prune(case, tau, backend, poisoned):
    """Labels and scores of the formula; scores fall by at most the mass that is left out."""
    inputs = case.inputs(torch.float32, backend.device, concentrated=True)
    labels = check("pruned", inputs, backend, prune=tau)
    mass = inputs["class_probs"].double().sum(-1)
    skipped = (mass * (mass < tau)).sum(1).max()  # a mean over views errs by no more than the worst view
    exact, pruned = oracle(inputs), oracle(inputs, prune=tau)
    assert (exact - pruned).min() >= 0 and (exact - pruned).max() <= skipped
    assert (exact - pruned).max() > 0 or tau < mass.min()
    if tau > mass.max():
        assert not labels.any()


@each_dtype(dtypes=(torch.float32, *HALVES))
def test_infinite_logits(backend, dtype, poisoned):
    """Weights of zero stay zero beside infinite logits, and σ is 0 or 1 where all four cells agree."""
    masks = torch.full((1, 2, 4, 4), -math.inf, dtype=dtype, device=backend.device)
    masks[0, 0, :, :2] = math.inf
    masks[0, 1, :, 2:] = math.inf
    probs = torch.eye(2, dtype=dtype, device=backend.device)[None]
    labels = run({"mask_logits": masks, "class_probs": probs, "size": (8, 8)}, backend)
    assert (labels[..., :3] == 0).all() and (labels[..., 5:] == 1).all()


@each_backend("eager", *NATIVE)
def test_infinite_logits_are_the_limit(backend, poisoned):
    """A mask that is certain (±inf, as if by masked_fill) gives what very large logits give."""
    for concentrated in kinds(backend):
        inputs = BY_NAME["classes_171"].inputs(torch.float32, backend.device, concentrated=concentrated)
        large = inputs["mask_logits"].clone()
        large[:, :90, 2] = -1e20
        large[:, 90:100, 3, 1] = 1e20
        infinite = torch.where(large.abs() > 1e10, large * float("inf"), large)
        assert infinite.isinf().any() and not infinite.isnan().any()
        assert torch.equal(*(run({**inputs, "mask_logits": m}, backend) for m in (large, infinite)))


@each_backend(*QUICK)
@named("classes_150", "classes_300", "sliding")
def test_not_a_number_gives_some_class(case, backend):
    for concentrated in kinds(backend):
        inputs = [case.inputs(torch.float32, backend.device, concentrated=concentrated) for _ in range(2)]
        inputs[0]["mask_logits"][:, ::3, ::2] = math.nan
        inputs[1]["class_probs"][:, 3] = math.nan
        for one in inputs:
            for labels in (run(one, backend), run(one, backend, scores=True)[0]):
                assert int(labels.min()) >= 0 and int(labels.max()) < case.classes


@each_dtype(*QUICK, dtypes=(torch.float32, *HALVES))
@named("odd", "mixed", "classes_171")
def test_layouts_give_the_same_and_inputs_are_not_changed(case, backend, dtype):
    """A slice of something larger; neither queries nor views in order of memory; one mask for all."""
    for concentrated in kinds(backend):
        inputs = case.inputs(dtype, backend.device, concentrated=concentrated)
        expected, masks, wide = run(inputs, backend), stacks(inputs["mask_logits"]), []
        for mask in masks:
            whole = mask.new_full((*mask.shape[:3], mask.shape[3] + 5), math.nan).transpose(0, 2)
            wide.append(whole.contiguous().transpose(0, 2)[..., 2:-3].copy_(mask))
        odd = [m.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for m in masks]
        probs = inputs["class_probs"].transpose(1, 2).contiguous().transpose(1, 2)
        assert odd[0].stride(-1) != 1 and probs.stride(-1) != 1
        function = {"views": inputs["views"], "size": case.size, "backend": backend.name}
        for changed in (wide, odd):
            before = [t.clone() for t in (*changed, probs)]
            assert torch.equal(semantic_argmax(changed, probs, **function), expected)
            assert all(map(torch.equal, (*changed, probs), before))
        shared = [m[:1].expand(m.shape[0], -1, -1, -1) for m in masks]
        copies = [m.contiguous() for m in shared]
        assert torch.equal(*(run({**inputs, "mask_logits": m}, backend) for m in (shared, copies)))


@each_backend("eager", *NATIVE)
def test_mixed_dtypes(backend, poisoned):
    inputs = BY_NAME["odd"].inputs(torch.float32, backend.device)
    changed = {"mask_logits": inputs["mask_logits"].bfloat16()}
    check("bfloat16 masks, float32 probabilities", {**inputs, **changed}, backend)
    changed = {"class_probs": inputs["class_probs"].half()}
    check("float32 masks, float16 probabilities", {**inputs, **changed}, backend)


@each_backend()
@named("classes_171", "mixed")
def test_repeatable_and_with_scores_the_same_labels(case, backend):
    for concentrated in kinds(backend):
        inputs = case.inputs(torch.float32, backend.device, concentrated=concentrated)
        (labels, best), again = (run(inputs, backend, scores=True) for _ in range(2))
        assert torch.equal(again[0], labels) and torch.equal(again[1], best)
        assert backend.name == "eager" or torch.equal(run(inputs, backend), labels)


@each_backend("cpu", "cuda")
@named("classes_171", "mixed")
def test_threads_change_nothing(case, backend):
    for concentrated in kinds(backend):
        inputs = case.inputs(torch.float32, concentrated=concentrated)
        assert_threads_change_nothing(
            lambda inputs=inputs: dict(enumerate(run(inputs, backend, scores=True)))
        )


@each_backend()
def test_the_batch_does_not_matter(backend):
    case = SemanticCase("batch", ((3, 5, 6),), 40, 30, (20, 24))
    inputs = case.inputs(torch.float32, backend.device)
    whole = run(inputs, backend)
    for i in range(3):
        one = {name: inputs[name][i : i + 1] for name in ("mask_logits", "class_probs")}
        assert_same({"one": run({**one, "size": case.size}, backend)}, {"one": whole[i : i + 1]})


@each_backend()
def test_empty_batch(backend):
    masks, probs = (torch.empty(0, 5, *shape, device=backend.device) for shape in ((4, 4), (300,)))
    labels, best = run({"mask_logits": masks, "class_probs": probs, "size": (8, 9)}, backend, scores=True)
    assert labels.shape == best.shape == (0, 8, 9) and labels.dtype == torch.int16


@each_backend("cpu", "cuda", "triton")
def test_float64_is_refused(backend):
    inputs = BY_NAME["odd"].inputs(torch.float64)
    with pytest.raises(TypeError, match=f"'{backend.name}' takes float32.*mask_logits is float64"):
        semantic_argmax(**inputs, backend=backend.name)


@pytest.mark.parametrize("operator", ["semantic_argmax", "semantic_topk"])
def test_triton_leaves_images_that_32_bits_do_not_count_to_eager(operator):
    refuse, masks = _library._operators[operator].refuse, torch.zeros(1, 3, 2, 2)
    for width, refused in ((2**15, True), (2**15 - 1, False)):
        for backend in ("triton", "cpu"):
            error = refuse(backend, [masks], masks[..., 0], [], 1, 2**16, width, [], True, 1, 0.0)
            assert ("up to 2³¹ − 1 pixels" in str(error)) == (refused and backend == "triton")


@each_backend("eager", "cpu", "cuda")
@pytest.mark.parametrize("need_scores", [False, True])
@named("odd", "classes_300", "mixed")
def test_opcheck(case, need_scores, backend):
    inputs = case.inputs(torch.float32)
    masks, views = stacks(inputs["mask_logits"]), inputs["views"]
    arguments = (
        masks,
        inputs["class_probs"],
        views.tensors if views else [],
        views.batch if views else masks[0].shape[0],
        *case.size,
        views.reach if views else [],
        True,
        need_scores,
        0.0,
    )
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.segvit.semantic_argmax.default
    torch.library.opcheck(op, arguments, {"backend": backend.name}, test_utils=utils)
