"""Semantic argmax by the native library against float64: C++ for CPUs, CUDA kernels emulated."""

import math

import pytest
import torch

from segvit_kernels.ops.semantic_argmax import View, Views, semantic_argmax
from segvit_kernels.testing import assert_within_budget
from segvit_kernels.testing.semantic_argmax import CASES, SemanticCase, assert_labels, oracle

BY_NAME = {case.name: case for case in CASES}
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
RANDOM_OR_TRAINED = pytest.mark.parametrize("concentrated", [False, True], ids=["random", "trained"])


@pytest.fixture(autouse=True)
def once(request):
    """The CUDA kernels take no shortcut where few queries have the class mass: one kind of mass will do."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if params.get("native_backend") == "cuda" and params.get("concentrated"):
        pytest.skip("emulated with random masses only")


def named(*names):
    return pytest.mark.parametrize("case", [BY_NAME[name] for name in names], ids=lambda c: c.name)


def check(name, inputs, backend, **options):
    """Labels with and without scores, and scores, within the error budget; returns the labels.

    Half precision inputs are read as they are and summed in float32, as by the eager backend; where the masks
    are of half precision the CUDA kernels multiply float16.
    """
    masks = inputs["mask_logits"]
    half = backend == "cuda" and (masks[0] if isinstance(masks, list) else masks).dtype != torch.float32
    arithmetic = torch.float16 if half else torch.float32
    truth, ordinary = oracle(inputs, **options), oracle(inputs, arithmetic, **options)
    labels = semantic_argmax(**inputs, **options, backend=backend)
    differ = assert_labels(name, labels, truth, ordinary)
    allowed = (0.02 if half else 0.002) * labels.numel() + 1
    assert differ <= allowed, f"{name}: {differ} of {labels.numel()} labels differ"
    again, scores = semantic_argmax(**inputs, **options, return_scores=True, backend=backend)
    assert_labels(f"{name} with scores", again, truth, ordinary)
    assert scores.dtype == torch.float32 and scores.shape == labels.shape
    if scores.numel():
        assert_within_budget("scores", scores.to(arithmetic), truth.amax(1), ordinary.amax(1))
    return labels


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@RANDOM_OR_TRAINED
@DTYPES
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case(case, dtype, concentrated, native_backend, poisoned):
    check(case.name, case.inputs(dtype, concentrated=concentrated), native_backend)


@DTYPES
@named("one_pixel", "smaller", "classes_171", "mixed")
def test_no_activation(case, dtype, native_backend, poisoned):
    """Any real numbers, negative scores among them."""
    check(case.name, case.inputs(dtype), native_backend, activation="none")
    inputs = case.inputs(dtype)
    masks = inputs["mask_logits"]
    inputs["mask_logits"] = [-m.abs() for m in (masks if isinstance(masks, list) else [masks])]
    check(case.name, inputs, native_backend, activation="none")


@pytest.mark.parametrize("classes", [1, 2, 255, 256, 257, 300])
@pytest.mark.parametrize("queries", [1, 3, 65])
def test_numbers_of_classes(classes, queries, native_backend, poisoned):
    case = SemanticCase("classes", ((1, 5, 4),), queries, classes, (11, 37))
    labels = check(case.name, case.inputs(torch.float32), native_backend)
    assert labels.dtype == (torch.uint8 if classes <= 256 else torch.int16)
    inputs = case.inputs(torch.float32)
    inputs["class_probs"][..., -1] += 1
    assert (semantic_argmax(**inputs, backend=native_backend) == classes - 1).all()


@pytest.mark.parametrize("queries, classes", [(1030, 7), (9, 1100), (3, 2050)])
def test_large_numbers(queries, classes, native_backend, poisoned):
    """More queries or classes than are bounded in 8 bits or held at a time."""
    case = SemanticCase("large", ((1, 3, 4),), queries, classes, (6, 21))
    check(case.name, case.inputs(torch.float32), native_backend)
    check(case.name, case.inputs(torch.float32, concentrated=True), native_backend)


@pytest.mark.parametrize(
    "grid, size",
    [((1, 1), (3, 70)), ((4, 5), (4, 5)), ((3, 40), (5, 43)), ((3, 200), (2, 70)), ((50, 700), (3, 5)),
     ((2, 2), (33, 65)), ((2, 9), (2, 1030)), ((3, 130), (3, 1100)), ((2, 1500), (2, 700))],
)  # fmt: skip
@RANDOM_OR_TRAINED
def test_grids_and_sizes(grid, size, concentrated, native_backend, poisoned):
    """Coarse and fine, up and down, several parts of a row."""
    case = SemanticCase("sizes", ((1, *grid),), 35, 21, size)
    check(case.name, case.inputs(torch.float32, concentrated=concentrated), native_backend)


@pytest.mark.parametrize("heavy", [0, 4], ids=["spread", "concentrated"])
@pytest.mark.parametrize("first, second", [(0, 1), (3, 17), (5, 149)])
def test_ties_go_to_the_lower_class(first, second, heavy, native_backend, poisoned):
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(1, 64, 150, generator=generator) / 4
    if heavy:
        probs[:, heavy:] *= 1e-3
    probs[..., first] += 0.5
    probs[..., second] = probs[..., first]
    masks = normal(1, 64, 6, 6) + 3
    views = Views([View.whole(0, (6, 6), (50, 40), g) for g in (0, 0, 1)], 1, (50, 40))
    for scores in (False, True):
        options = {"return_scores": scores, "backend": native_backend}
        labels = semantic_argmax(masks, probs, (50, 40), **options)
        several = (masks.expand(3, -1, -1, -1), probs.expand(3, -1, -1), (50, 40))
        averaged = semantic_argmax(*several, views=views, **options)
        for found in (labels, averaged):
            assert ((found[0] if scores else found) == first).all()
    assert not semantic_argmax(masks, probs * 0, (5, 4), backend=native_backend).any()
    assert not semantic_argmax(masks * 0 - 1e30, probs, (5, 4), backend=native_backend).any()


class TestNearTies:
    """Scores closer to each other than 8 bits tell apart, further than float32 rounds."""

    @pytest.mark.parametrize("queries", [5, 64, 150])
    @pytest.mark.parametrize("gap", [3e-5, 1e-3])
    @pytest.mark.parametrize("scores", [False, True])
    def test_all_classes_near_the_first(self, gap, queries, scores, native_backend, poisoned):
        """Of classes that are nearly copies the best one wins everywhere, wherever it stands."""
        base = torch.rand(1, queries, 1, generator=torch.Generator().manual_seed(1)) + 0.5
        masks = normal(1, queries, 4, 5)
        for best in (0, 7, 39):
            probs = base.expand(-1, -1, 40) * (1 + gap * normal(1, 1, 40).abs().clamp(max=1) * 0.5)
            probs[..., best] = base[..., 0] * (1 + gap)
            inputs = {"mask_logits": masks, "class_probs": probs, "size": (19, 70)}
            labels = semantic_argmax(**inputs, return_scores=scores, backend=native_backend)
            assert ((labels[0] if scores else labels) == best).all()

    @pytest.mark.parametrize("seed", range(4))
    def test_noise_below_a_step(self, seed, native_backend, poisoned):
        """Two classes differ by noise that 8 bits round away, with a winner of every pixel's own."""
        generator = torch.Generator().manual_seed(seed)
        probs = torch.rand(1, 96, 30, generator=generator)
        probs[..., 20] = probs[..., 3] = probs[..., 3] + 0.4
        noise = torch.rand(1, 96, generator=generator) * 4e-3
        probs[..., 20] += noise - noise.mean()
        masks = normal(1, 96, 6, 5, seed=seed) * 4
        inputs = {"mask_logits": masks, "class_probs": probs, "size": (41, 37)}
        labels = check("noise", inputs, native_backend)
        assert 0 < (labels == 20).sum() < labels.numel() and ((labels == 3) | (labels == 20)).all()

    def test_sigmas_between_steps(self, native_backend, poisoned):
        """Probabilities that 8 bits hold exactly, σ that they round up for one class and down for another."""
        steps = torch.tensor([0.49] * 32 + [0.51] * 16 + [0.40] * 16) + torch.arange(64) % 16 * 9 + 40
        masks = (steps / 255).logit().view(1, 64, 1, 1).expand(1, 64, 3, 3)
        probs = torch.zeros(1, 64, 8)
        probs[:, :32, 5] = probs[:, 32:, 2] = probs[:, 32:, 7] = 1
        labels = check(
            "between", {"mask_logits": masks, "class_probs": probs, "size": (5, 20)}, native_backend
        )
        assert (labels == 5).all()

    @pytest.mark.parametrize("seed", range(4))
    def test_heavy_tails(self, seed, native_backend, poisoned):
        """A single large probability makes the steps of its class coarse."""
        generator = torch.Generator().manual_seed(seed)
        probs = torch.rand(1, 120, 50, generator=generator) * 2e-3
        rows = torch.randperm(120, generator=generator)[:50]
        probs[0, rows, torch.arange(50)] = 1.0
        masks = normal(1, 120, 6, 6, seed=seed) * 2
        masks[:, rows] = -9 + 0.1 * masks[:, rows]  # the large ones are silent: the small ones decide
        check("heavy", {"mask_logits": masks, "class_probs": probs, "size": (33, 47)}, native_backend)

    def test_small_sigmas(self, native_backend, poisoned):
        """σ of 1e-6 is nothing in 8 bits."""
        inputs = BY_NAME["classes_150"].inputs(torch.float32)
        inputs["mask_logits"] = inputs["mask_logits"].clamp(-3, 3) - 14
        check("small", inputs, native_backend)
        inputs["class_probs"] *= 1e-20
        check("tiny", inputs, native_backend)

    def test_flat(self, native_backend, poisoned):
        """Every class is a rival everywhere."""
        inputs = BY_NAME["classes_171"].inputs(torch.float32)
        inputs["class_probs"] = 1 / 171 + inputs["class_probs"] * 1e-3
        check("flat", inputs, native_backend)


class TestHead:
    """Few tokens with nearly all class mass; others must still be able to decide."""

    @pytest.mark.parametrize("light", [1, 120])
    @pytest.mark.parametrize("count", [1, 2])
    @pytest.mark.parametrize("scale", [0.5, 0.98, 1.02, 2.0])
    def test_the_tail_may_flip_the_winner(self, scale, count, light, native_backend, poisoned):
        probs = torch.zeros(count, 124, 9)
        probs[:, 0, 0], probs[:, 1, 1] = 0.9, 0.9 - 0.2 / count
        probs[:, 2:4, 2] = 0.5
        probs[0, 4 : 4 + light, 1] = 0.2 * scale / light  # in the first view only
        masks = torch.full((count, 124, 6, 8), -20.0)
        masks[:, :2] = 20.0
        masks[:, 4:, :, 4:] = 20.0
        size = (13, 50)
        views = None if count == 1 else Views([View.whole(0, (6, 8), size)] * count, 1, size)
        inputs = {"mask_logits": masks, "class_probs": probs, "size": size, "views": views}
        labels = check("flipped", inputs, native_backend)
        assert (labels[..., 40:] == (1 if scale > 1 else 0)).all()

    @pytest.mark.parametrize("seed", range(6))
    def test_margins_as_small_as_the_tail(self, seed, native_backend, poisoned):
        generator = torch.Generator().manual_seed(seed)
        probs = torch.rand(1, 64, 40, generator=generator) ** 8 * 3e-3
        probs[0, 0, 7], probs[0, 1, 3] = 1.0, 1.0
        masks = torch.randn(1, 64, 5, 5, generator=generator)
        masks[:, :2] = 2 + 0.02 * torch.randn(1, 2, 5, 5, generator=generator)
        check("close", {"mask_logits": masks, "class_probs": probs, "size": (61, 47)}, native_backend)

    def test_a_class_outside_the_head_wins_where_the_head_is_silent(self, native_backend, poisoned):
        probs = torch.full((1, 80, 50), 1e-3)
        probs[0, 0, 10] = 1.0
        probs[0, 1:, 20] = 2e-3
        masks = torch.full((1, 80, 4, 10), -30.0)
        masks[0, 0, :, 1:] = 30.0
        masks[0, 1:] = 0.0
        inputs = {"mask_logits": masks, "class_probs": probs, "size": (20, 100)}
        labels = check("silent", inputs, native_backend)
        assert labels[0, 0, 0] == 20 and labels[0, 0, 99] == 10

    def test_negative_values_have_no_bound(self, native_backend, poisoned):
        inputs = BY_NAME["classes_171"].inputs(torch.float32, concentrated=True)
        inputs["class_probs"][0, 0, 0] = -1e-3
        inputs["class_probs"][1] = normal(171, 171)
        check("negative", inputs, native_backend)


class TestViews:
    @named("odd", "classes_171")
    def test_whole_views_are_the_plain_form(self, case, native_backend):
        inputs = case.inputs(torch.float32)
        (batch, *grid), *_ = case.stacks
        views = Views([View.whole(b, tuple(grid), case.size) for b in range(batch)], batch, case.size)
        plain = semantic_argmax(**inputs, return_scores=True, backend=native_backend)
        inputs["views"] = views
        labels, scores = semantic_argmax(**inputs, return_scores=True, backend=native_backend)
        assert (labels != plain[0]).float().mean() < 0.01  # the maps travel in float32
        torch.testing.assert_close(scores, plain[1], rtol=0, atol=2e-5)

    def test_groups_weigh_the_same(self, native_backend, poisoned):
        """Three views of a group against one of another: (mean of three + one) / 2, not the mean of four."""
        values = torch.tensor([0.1, 0.2, 0.6, 0.9]).view(4, 1, 1, 1)
        for groups, mean in (((5, 5, 5, -1), 0.6), ((0, 0, 0, 0), 0.45)):
            views = Views([View.whole(0, (1, 1), (2, 2), g) for g in groups], 1, (2, 2))
            _, scores = semantic_argmax(
                values, torch.ones(4, 1, 1), (2, 2), views=views, activation="none", return_scores=True,
                backend=native_backend,
            )  # fmt: skip
            torch.testing.assert_close(scores, torch.full((1, 2, 2), mean))

    @RANDOM_OR_TRAINED
    def test_one_view_or_several_to_a_row(self, concentrated, native_backend, poisoned):
        """Parts of the output that one view covers, and others that flipped views and groups share."""
        size, grid = (40, 150), (4, 9)
        views = [
            View.crop(0, size, size, 0, 0, (40, 70), grid),
            View.crop(0, size, size, 0, 70, (40, 80), grid),
        ]
        views += [View.crop(0, size, size, 9, 30, (13, 99), grid, True, group) for group in (0, 2, 2)]
        views = [View(v.image, tuple(torch.tensor(v.affine).tolist()), v.rectangle, v.group) for v in views]
        case = SemanticCase("parts", ((len(views), *grid),), 50, 23, size, tuple(views), 1)
        check(case.name, case.inputs(torch.float32, concentrated=concentrated), native_backend)


@pytest.mark.parametrize("tau", [1e-3, 0.3, 5.0])
@named("wide", "sliding", "classes_150")
def test_prune(case, tau, native_backend, poisoned):
    inputs = case.inputs(torch.float32, concentrated=True)
    labels = check("pruned", inputs, native_backend, prune=tau)
    if tau > inputs["class_probs"].sum(-1).max():
        assert not labels.any()


def test_infinite_logits(native_backend, poisoned):
    """Weights of zero stay zero beside infinite logits, and σ is 0 or 1 where all four cells agree."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        masks = torch.full((1, 2, 4, 4), -math.inf, dtype=dtype)
        masks[0, 0, :, :2] = math.inf
        masks[0, 1, :, 2:] = math.inf
        labels = semantic_argmax(masks, torch.eye(2, dtype=dtype)[None], (8, 8), backend=native_backend)
        assert (labels[..., :3] == 0).all() and (labels[..., 5:] == 1).all()
    inputs = BY_NAME["classes_171"].inputs(torch.float32)
    large = inputs["mask_logits"].clone()
    large[:, :90, 2] = -1e20
    large[:, 90:100, 3, 1] = 1e20
    infinite = torch.where(large.abs() > 1e10, large * float("inf"), large)
    results = [
        semantic_argmax(**{**inputs, "mask_logits": m}, backend=native_backend) for m in (large, infinite)
    ]
    assert torch.equal(*results)


@RANDOM_OR_TRAINED
@named("classes_150", "classes_300", "sliding")
def test_not_a_number_gives_some_class(case, concentrated, native_backend):
    for scores in (False, True):
        inputs = case.inputs(torch.float32, concentrated=concentrated)
        inputs["mask_logits"][:, ::3, ::2] = math.nan
        options = {"return_scores": scores, "backend": native_backend}
        first = semantic_argmax(**inputs, **options)
        inputs = case.inputs(torch.float32, concentrated=concentrated)
        inputs["class_probs"][:, 3] = math.nan
        for found in (first, semantic_argmax(**inputs, **options)):
            labels = found[0] if scores else found
            assert int(labels.min()) >= 0 and int(labels.max()) < case.classes


@DTYPES
@RANDOM_OR_TRAINED
@named("odd", "mixed", "classes_171")
def test_layouts_give_the_same_and_inputs_are_not_changed(case, concentrated, dtype, native_backend):
    inputs = case.inputs(dtype, concentrated=concentrated)
    expected = semantic_argmax(**inputs, backend=native_backend)
    masks = inputs["mask_logits"]
    stacks = [masks] if isinstance(masks, torch.Tensor) else masks
    wide = []
    for mask in stacks:  # a slice of something larger, and neither queries nor views in order of memory
        whole = torch.full((*mask.shape[:3], mask.shape[3] + 5), math.nan, dtype=dtype).transpose(0, 2)
        whole = whole.contiguous().transpose(0, 2)
        whole[..., 2:-3] = mask
        wide.append(whole[..., 2:-3])
    odd = [m.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for m in stacks]
    probs = inputs["class_probs"].transpose(1, 2).contiguous().transpose(1, 2)
    assert odd[0].stride(-1) != 1 and probs.stride(-1) != 1
    for changed in (wide, odd):
        before = [t.clone() for t in (*changed, probs)]
        strided = {**inputs, "mask_logits": changed, "class_probs": probs}
        assert torch.equal(semantic_argmax(**strided, backend=native_backend), expected)
        assert all(torch.equal(a, b) for a, b in zip((*changed, probs), before, strict=True))
    shared = [m[:1].expand(m.shape[0], -1, -1, -1) for m in stacks]
    copies = [m.contiguous() for m in shared]
    assert torch.equal(
        *(semantic_argmax(**{**inputs, "mask_logits": m}, backend=native_backend) for m in (shared, copies))
    )


def test_mixed_dtypes(native_backend, poisoned):
    inputs = BY_NAME["odd"].inputs(torch.float32)
    inputs["mask_logits"] = inputs["mask_logits"].bfloat16()
    check("bfloat16 masks, float32 probabilities", inputs, native_backend)
    inputs = BY_NAME["odd"].inputs(torch.float32)
    inputs["class_probs"] = inputs["class_probs"].half()
    check("float32 masks, float16 probabilities", inputs, native_backend)


@RANDOM_OR_TRAINED
@named("classes_171", "mixed")
def test_repeatable_whatever_the_threads(case, concentrated, native_backend):
    inputs = case.inputs(torch.float32, concentrated=concentrated)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(semantic_argmax(**inputs, return_scores=True, backend=native_backend))
            assert torch.equal(semantic_argmax(**inputs, backend=native_backend), found[0][0])
    finally:
        torch.set_num_threads(threads)
    for labels, scores in found[1:]:
        assert torch.equal(labels, found[0][0]) and torch.equal(scores, found[0][1])


def test_the_batch_does_not_matter(native_backend):
    case = SemanticCase("batch", ((3, 5, 6),), 40, 30, (20, 24))
    inputs = case.inputs(torch.float32)
    whole = semantic_argmax(**inputs, backend=native_backend)
    for i in range(3):
        one = {name: inputs[name][i : i + 1] for name in ("mask_logits", "class_probs")}
        assert torch.equal(semantic_argmax(**one, size=case.size, backend=native_backend), whole[i : i + 1])


def test_empty_batch(native_backend):
    labels, scores = semantic_argmax(
        torch.empty(0, 5, 4, 4), torch.empty(0, 5, 300), (8, 9), return_scores=True, backend=native_backend
    )
    assert labels.shape == scores.shape == (0, 8, 9) and labels.dtype == torch.int16


def test_float64_is_refused(native_backend):
    inputs = BY_NAME["odd"].inputs(torch.float64)
    with pytest.raises(TypeError, match=f"'{native_backend}' takes float32.*mask_logits is float64"):
        semantic_argmax(**inputs, backend=native_backend)


@pytest.mark.parametrize("need_scores", [False, True])
@named("odd", "classes_300", "mixed")
def test_opcheck(case, need_scores, native_backend):
    inputs = case.inputs(torch.float32)
    masks, views = inputs["mask_logits"], inputs["views"]
    arguments = (
        [masks] if isinstance(masks, torch.Tensor) else masks,
        inputs["class_probs"],
        views.tensors if views else [],
        views.batch if views else masks.shape[0],
        *case.size,
        views.reach if views else [],
        True,
        need_scores,
        0.0,
    )
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.segvit.semantic_argmax.default
    torch.library.opcheck(op, arguments, {"backend": native_backend}, test_utils=utils)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_on_the_device(case, dtype):
    check(case.name, case.inputs(dtype, "cuda"), "cuda")
