"""The standard battery of semantic_argmax on the eager backend (Triton: test_semantic_argmax_triton.py)."""

import dataclasses
import itertools
from fractions import Fraction

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from segvit_kernels.ops import semantic_argmax as module
from segvit_kernels.ops.semantic_argmax import View, Views, semantic_argmax, semantic_argmax_reference
from segvit_kernels.testing import assert_within_budget
from segvit_kernels.testing.semantic_argmax import CASES, SemanticCase, assert_labels, oracle

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BY_NAME = {case.name: case for case in CASES}
VIEW_CASES = [case for case in CASES if case.views]
RANDOM_OR_TRAINED = pytest.mark.parametrize("concentrated", [False, True], ids=["random", "trained"])


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def computed_in(dtype):
    """What the eager backend computes in: half precision inputs are read as they are, sums are float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(name, inputs, **options):
    """Labels, with and without scores, and scores against the oracle; returns how many labels differ."""
    truth = oracle(inputs, **options)
    ordinary = oracle(inputs, computed_in(inputs["class_probs"].dtype), **options)
    differing = assert_labels(name, semantic_argmax(**inputs, **options), truth, ordinary)
    labels, scores = semantic_argmax(**inputs, **options, return_scores=True)
    assert_labels(name, labels, truth, ordinary)
    assert scores.dtype == ordinary.dtype
    assert_within_budget("scores", scores, truth.amax(1), ordinary.amax(1))
    return differing


@pytest.fixture
def shortcuts(monkeypatch):
    """The number of pixels that the shortcut decided and left open, per block."""
    blocks, decide = [], module._decide

    def recorded(head, scores):
        labels, undecided = decide(head, scores)
        blocks.append((labels.numel() - len(undecided), len(undecided)))
        return labels, undecided

    monkeypatch.setattr(module, "_decide", recorded)
    return blocks


@RANDOM_OR_TRAINED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(CASES)
def test_labels_and_scores(case, dtype, concentrated, poisoned):
    differing = check(case.name, case.inputs(dtype, concentrated=concentrated))
    assert differing == 0 or dtype != torch.float64


def test_an_image_of_640():
    case = SemanticCase("640", ((1, 40, 40),), 33, 19, (640, 640))
    check(case.name, case.inputs(torch.float32))


@named(CASES)
def test_activation_none(case):
    inputs = case.inputs(torch.float32)
    masks = inputs["mask_logits"]
    masks = masks.sigmoid() if isinstance(masks, torch.Tensor) else [m.sigmoid() for m in masks]
    check(case.name, {**inputs, "mask_logits": masks}, activation="none")


def test_mixed_dtypes():
    inputs = BY_NAME["odd"].inputs(torch.float32)
    inputs["mask_logits"] = inputs["mask_logits"].bfloat16()
    check("bfloat16 masks, float32 probabilities", inputs)


@RANDOM_OR_TRAINED
@pytest.mark.parametrize("budget", [1, 3000])
@named(CASES)
def test_blocking_does_not_change_the_result(case, budget, concentrated, monkeypatch):
    inputs = case.inputs(torch.float64, concentrated=concentrated)
    expected = semantic_argmax(**inputs)
    monkeypatch.setattr(module, "_BUDGET", budget)
    torch.testing.assert_close(semantic_argmax(**inputs), expected, rtol=0, atol=0)


class TestShortcut:
    def test_decides_most_pixels_of_a_trained_model(self, shortcuts):
        semantic_argmax(**BY_NAME["classes_171"].inputs(torch.float32, concentrated=True))
        decided, left = map(sum, zip(*shortcuts, strict=True))
        assert decided > 9 * left

    @pytest.mark.parametrize("options", [{"return_scores": True}, {"activation": "none"}])
    def test_is_not_taken_where_it_has_no_bound(self, options, shortcuts):
        semantic_argmax(**BY_NAME["classes_171"].inputs(torch.float32, concentrated=True), **options)
        inputs = BY_NAME["classes_171"].inputs(torch.float32, concentrated=True)
        inputs["class_probs"][0, 0, 0] = -1e-3
        semantic_argmax(
            **{**inputs, "mask_logits": inputs["mask_logits"][:1], "class_probs": inputs["class_probs"][:1]}
        )
        assert not shortcuts

    def test_is_not_taken_on_spread_mass(self, shortcuts):
        semantic_argmax(**BY_NAME["classes_150"].inputs(torch.float32))
        assert not shortcuts

    def test_is_given_up_where_it_leaves_most_pixels_open(self, shortcuts, monkeypatch):
        monkeypatch.setattr(module, "_BUDGET", 2**12)  # many blocks
        inputs = BY_NAME["classes_150"].inputs(torch.float64, concentrated=True)
        inputs["mask_logits"] = torch.full_like(inputs["mask_logits"], -8) + inputs["mask_logits"] * 1e-2
        check("flat", inputs)
        assert len(shortcuts) == 1 and shortcuts[0][1] > shortcuts[0][0]

    @pytest.mark.parametrize("light", [1, 120])
    @pytest.mark.parametrize("count", [1, 2])
    @pytest.mark.parametrize("scale", [0.5, 0.98, 1.02, 2.0])
    def test_the_tail_may_flip_the_winner(self, scale, count, light, shortcuts):
        """Class 0 leads by the heavy queries; light ones, on in the right half, all vote for class 1."""
        probs = torch.zeros(count, 124, 9)
        probs[:, 0, 0], probs[:, 1, 1] = 0.9, 0.9 - 0.2 / count
        probs[:, 2:4, 2] = 0.5
        probs[0, 4 : 4 + light, 1] = 0.2 * scale / light  # in the first view only
        masks = torch.full((count, 124, 6, 8), -20.0)
        masks[:, :2] = 20.0
        masks[:, 4:, :, 4:] = 20.0
        size = (40, 50)
        views = None if count == 1 else Views([View.whole(0, (6, 8), size)] * count, 1, size)
        inputs = {"mask_logits": masks, "class_probs": probs, "size": size, "views": views}
        assert check("flipped", inputs) == 0
        right = semantic_argmax(**inputs)[0, :, 40:]
        assert bool((right == (1 if scale > 1 else 0)).all())
        assert shortcuts  # it was tried

    @pytest.mark.parametrize("seed", range(6))
    def test_margins_as_small_as_the_tail(self, seed, shortcuts):
        """Two heavy classes everywhere within the mass of the tail of each other, by little more or less."""
        generator = torch.Generator().manual_seed(seed)
        probs = torch.rand(1, 64, 40, generator=generator).double() ** 8 * 3e-3
        probs[0, 0, 7], probs[0, 1, 3] = 1.0, 1.0
        masks = torch.randn(1, 64, 5, 5, generator=generator).double()
        masks[:, :2] = 2 + 0.02 * torch.randn(1, 2, 5, 5, generator=generator).double()
        inputs = {"mask_logits": masks, "class_probs": probs, "size": (61, 47)}
        assert check("close", inputs) == 0
        assert shortcuts

    def test_a_class_outside_the_head_wins_where_the_head_is_silent(self, shortcuts):
        probs = torch.full((1, 80, 50), 1e-3)
        probs[0, 0, 10] = 1.0
        probs[0, 1:, 20] = 2e-3
        masks = torch.full((1, 80, 4, 10), -30.0)
        masks[0, 0, :, 1:] = 30.0
        masks[0, 1:] = 0.0
        inputs = {"mask_logits": masks, "class_probs": probs, "size": (20, 100)}
        assert check("silent", inputs) == 0
        labels = semantic_argmax(**inputs)
        assert labels[0, 0, 0] == 20 and labels[0, 0, 99] == 10
        assert shortcuts and shortcuts[0][0] > 0 < shortcuts[0][1]


@pytest.mark.parametrize("heavy", [0, 4], ids=["spread", "concentrated"])
@pytest.mark.parametrize("first, second", [(0, 1), (3, 17), (5, 149)])
def test_ties_go_to_the_lower_class(first, second, heavy, shortcuts):
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(1, 64, 150, generator=generator) / 4
    if heavy:
        probs[:, heavy:] *= 1e-3
    probs[..., first] += 0.5
    probs[..., second] = probs[..., first]
    masks = torch.randn(1, 64, 6, 6, generator=generator) + 3
    labels = semantic_argmax(masks, probs, (50, 40))
    assert bool((labels == first).all())
    assert bool(semantic_argmax(masks, probs * 0, (5, 4)).eq(0).all())


class TestViews:
    @named([case for case in CASES if not case.views])
    def test_whole_views_are_the_plain_form(self, case):
        inputs = case.inputs(torch.float64)
        (batch, *grid), *_ = case.stacks
        views = Views([View.whole(b, tuple(grid), case.size) for b in range(batch)], batch, case.size)
        plain = semantic_argmax(**inputs, return_scores=True)
        labels, scores = semantic_argmax(**{**inputs, "views": views}, return_scores=True)
        torch.testing.assert_close(labels, plain[0], rtol=0, atol=0)
        torch.testing.assert_close(scores, plain[1], rtol=0, atol=5e-6)  # the maps travel in float32

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize(
        "size, resized, top, left, crop",
        [
            ((23, 31), (23, 31), 4, 9, (12, 16)),
            ((23, 31), (46, 62), 11, 30, (24, 24)),
            ((40, 30), (20, 15), 0, 0, (24, 16)),  # padding at the right and bottom
            ((17, 29), (30, 41), 7, 0, (16, 41)),
        ],
    )
    def test_crop_against_brute_force(self, size, resized, top, left, crop, flip):
        """Every output pixel looked up by hand in the map of the crop."""
        grid = (4, 5)
        mask = torch.randn(*grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        view = View.crop(0, size, resized, top, left, crop, grid, flip)

        def place(pixel, length, new_length, start, window, cells, mirrored):
            """Exact place of an output pixel's centre in cells of the crop, from its border; None outside."""
            at = (Fraction(2 * pixel + 1, 2) * new_length / length) - start
            if not 0 <= at < window:
                return None
            return (window - at if mirrored else at) * cells / window

        def value(y, x):
            total = 0.0
            for i, j in itertools.product(range(grid[0]), range(grid[1])):
                near = [
                    max(0.0, 1 - abs(min(max(float(p) - 0.5, 0), n - 1) - k))
                    for p, n, k in ((y, grid[0], i), (x, grid[1], j))
                ]
                total += near[0] * near[1] * float(mask[i, j])
            return total

        rows = [place(y, size[0], resized[0], top, crop[0], grid[0], False) for y in range(size[0])]
        columns = [place(x, size[1], resized[1], left, crop[1], grid[1], flip) for x in range(size[1])]
        inside_y = [y for y, at in enumerate(rows) if at is not None]
        inside_x = [x for x, at in enumerate(columns) if at is not None]
        assert view.rectangle == (inside_y[0], inside_x[0], inside_y[-1] + 1, inside_x[-1] + 1)
        expected = torch.full(size, -1.0, dtype=torch.float64)
        for y, x in itertools.product(inside_y, inside_x):
            expected[y, x] = value(rows[y], columns[x])
        # A second view, of a constant, covers the rest; in a group of its own it weighs a half.
        views = Views([view, View.whole(0, (1, 1), size, 1)], 1, size)
        masks = [mask[None, None], torch.zeros(1, 1, 1, 1, dtype=torch.float64)]
        ones = torch.ones(2, 1, 1, dtype=torch.float64)
        _, scores = semantic_argmax(masks, ones, size, views=views, return_scores=True)
        covered = torch.zeros(size, dtype=torch.bool)
        covered[inside_y[0] : inside_y[-1] + 1, inside_x[0] : inside_x[-1] + 1] = True
        expected = torch.where(covered, (expected.sigmoid() + 0.5) / 2, 0.5)
        torch.testing.assert_close(scores[0], expected, rtol=0, atol=3e-6)  # the maps travel in float32

    def test_a_window_is_pasted(self):
        """Where the image was not resized, a window is its map upsampled to the window, put in its place."""
        mask = torch.randn(1, 3, 4, 4)
        size, crop = (20, 24), (16, 16)
        expected = torch.zeros(3, *size)
        expected[:, 2:18, 5:21] = F.interpolate(mask.flip(-1), size=crop, mode="bilinear")[0].sigmoid()
        views = [View.crop(0, size, size, 2, 5, crop, (4, 4), True), View.whole(0, (1, 1), size)]
        count = 1 + (expected[0] > 0).float()
        for channel in range(3):
            probs = torch.zeros(2, 3, 1)
            probs[0, channel] = 1
            _, scores = semantic_argmax(
                [mask, torch.zeros(1, 3, 1, 1)], probs, size, views=Views(views, 1, size), return_scores=True
            )
            torch.testing.assert_close(scores[0], expected[channel] / count, rtol=1e-5, atol=1e-6)

    def test_groups_weigh_the_same(self):
        """Three views of a group against one of another: (mean of three + one) / 2, not the mean of four."""
        size = (2, 2)
        values = torch.tensor([0.1, 0.2, 0.6, 0.9]).view(4, 1, 1, 1)
        views = [View.whole(0, (1, 1), size, group=g) for g in (5, 5, 5, -1)]
        arguments = (values, torch.ones(4, 1, 1), size)
        options = {"activation": "none", "return_scores": True}
        _, scores = semantic_argmax(*arguments, views=Views(views, 1, size), **options)
        torch.testing.assert_close(scores, torch.full((1, 2, 2), 0.6))
        same = [dataclasses.replace(view, group=0) for view in views]
        _, scores = semantic_argmax(*arguments, views=Views(same, 1, size), **options)
        torch.testing.assert_close(scores, torch.full((1, 2, 2), 0.45))

    @named(VIEW_CASES)
    def test_the_form_without_sync(self, case, monkeypatch):
        """What other devices than the CPU run, here on CPU tensors; it must not look at a value."""
        inputs = case.inputs(torch.float64)
        expected = semantic_argmax(**inputs, return_scores=True)
        views = inputs["views"]
        masks = inputs["mask_logits"]
        masks = list(masks) if isinstance(masks, torch.Tensor) else [m for stack in masks for m in stack]
        parts = [
            module._Part(mask, p.t(), (), (0, case.size[1]))
            for mask, p in zip(masks, inputs["class_probs"], strict=True)
        ]
        for budget in (1, 2**20):
            monkeypatch.setattr(module, "_BUDGET", budget)
            result = tuple(torch.empty_like(t) for t in expected)
            module._label_without_sync(parts, views.tensors, True, *result)
            torch.testing.assert_close(result, expected)

    @pytest.mark.parametrize("case", [BY_NAME["odd"], BY_NAME["mixed"]], ids=lambda case: case.name)
    def test_other_devices_never_look_at_values(self, case):
        """On meta tensors any look at a value raises."""
        inputs = case.inputs(torch.float32, device="meta")
        masks, views = inputs["mask_logits"], inputs["views"]
        batch = views.batch if views else masks.shape[0]
        result = module._eager(
            [masks] if isinstance(masks, torch.Tensor) else masks,
            inputs["class_probs"],
            views.tensors if views else [],
            batch,
            *case.size,
            [],
            True,
            True,
            0.1,
        )
        assert [t.shape for t in result] == [(batch, *case.size)] * 2

    def test_attributes(self):
        views = BY_NAME["mixed"].inputs(torch.float32)["views"]
        starts, layout, affine = views.tensors
        assert starts.tolist() == [0, 3, 4, 6] and starts.dtype == layout.dtype == torch.int32
        assert layout[:, :3].tolist() == [[1, 0, 2], [5, 0, 2], [4, 4, 1], [3, 1, 1], [0, 0, 1], [2, 3, 1]]
        for row, map_ in zip(layout.tolist(), affine, strict=True):
            view = views.views[row[0]]
            assert tuple(row[3:]) == view.rectangle
            torch.testing.assert_close(map_, torch.tensor(view.affine))
        assert views.reach == [max(abs(v.affine[i]) for v in views.views) for i in (0, 2)]
        moved = views.to("meta")
        assert all(t.is_meta for t in moved.tensors) and not any(t.is_meta for t in views.tensors)
        assert moved.size == views.size and len(moved) == 6

    def test_refusals(self):
        whole, size = View.whole(0, (2, 2), (8, 9)), (8, 9)
        for view, message in (
            (dataclasses.replace(whole, image=1), "view 1 has image 1; expected 0 to 0"),
            (dataclasses.replace(whole, rectangle=(0, 0, 8, 10)), r"view 1 has rectangle .* size \(8, 9\)"),
            (dataclasses.replace(whole, rectangle=(5, 0, 4, 9)), "view 1 has rectangle"),
            (dataclasses.replace(whole, affine=(0.0, 1.0, 1.0, 0.0)), "view 1 has affine .* nonzero"),
            (dataclasses.replace(whole, affine=(1.0, float("nan"), 1.0, 0.0)), "view 1 has affine"),
        ):
            with pytest.raises(ValueError, match=message):
                Views([whole, view], 1, size)
        hole = [(0, 0, 8, 4), (0, 4, 3, 9), (4, 4, 8, 9), (2, 5, 6, 9)]
        pieces = [dataclasses.replace(whole, rectangle=r) for r in hole]
        with pytest.raises(ValueError, match=r"image 0 do not cover pixel \(3, 4\)"):
            Views(pieces, 1, size)
        Views([*pieces, dataclasses.replace(whole, rectangle=(3, 4, 4, 5))], 1, size)
        with pytest.raises(ValueError, match=r"image 1 do not cover pixel \(0, 0\)"):
            Views([whole], 2, size)


@pytest.mark.parametrize("tau", [1e-3, 0.05, 0.3, 5.0])
@named([BY_NAME["wide"], BY_NAME["sliding"], BY_NAME["classes_150"]])
def test_prune(case, tau):
    inputs = case.inputs(torch.float64, concentrated=True)
    check("pruned", inputs, prune=tau)
    mass = inputs["class_probs"].sum(-1)
    skipped = (mass * (mass < tau)).sum(1).max()  # a mean over views errs by no more than the worst view
    exact, pruned = oracle(inputs), oracle(inputs, prune=tau)
    assert (exact - pruned).min() >= 0 and (exact - pruned).max() <= skipped
    _, scores = semantic_argmax(**inputs, prune=tau, return_scores=True)
    change = (scores - exact.amax(1)).abs().max()
    assert 0 < change <= skipped or tau < mass.min()
    if tau > mass.max():
        assert not scores.any()


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@RANDOM_OR_TRAINED
@pytest.mark.parametrize("repeat", [1, 3])
def test_nothing_of_full_size(repeat, concentrated, monkeypatch):
    """No tensor holds more than a block, or than the label map, whatever the number of views and classes."""
    size, budget = (96, 96), 2**15
    monkeypatch.setattr(module, "_BUDGET", budget)
    crops = [View.crop(0, size, size, t, u, (64, 64), (4, 4)) for t in (0, 32) for u in (0, 32)] * repeat
    case = SemanticCase("sliding", ((len(crops), 4, 4),), 64, 50 * repeat, size, tuple(crops), 1)
    inputs = case.inputs(torch.float32, concentrated=concentrated)
    views = inputs["views"]
    arguments = ([inputs["mask_logits"]], inputs["class_probs"], views.tensors, 1, *size, views.reach)
    with LargestTensor() as largest:
        module._eager(*arguments, True, False, 0.0)
    assert 0 < largest.elements <= max(budget, size[0] * size[1])


@pytest.mark.parametrize(
    "case", [BY_NAME["odd"], BY_NAME["classes_300"], BY_NAME["mixed"]], ids=lambda c: c.name
)
@pytest.mark.parametrize("need_scores", [False, True])
def test_opcheck(case, need_scores):
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
    torch.library.opcheck(torch.ops.segvit.semantic_argmax.default, arguments, test_utils=utils)


@pytest.mark.parametrize(
    "case", [BY_NAME["odd"], BY_NAME["classes_300"], BY_NAME["mixed"]], ids=lambda c: c.name
)
def test_meta_tensors(case):
    labels, scores = semantic_argmax(**case.inputs(torch.float16, device="meta"), return_scores=True)
    expected = semantic_argmax(**case.inputs(torch.float16))
    assert labels.is_meta and labels.shape == scores.shape == expected.shape
    assert labels.dtype == expected.dtype and scores.dtype == torch.float32


def test_flops():
    inputs = BY_NAME["odd"].inputs(torch.float32)
    with FlopCounterMode(display=False) as counter:
        semantic_argmax(**inputs)
    assert counter.get_total_flops() == 2 * 2 * 20 * 19 * 100 * 37


def test_compile_fullgraph_and_second_size():
    torch._dynamo.reset()
    frames = []

    def backend(graph, examples):
        frames.append(graph)
        return graph.forward

    def scaled(masks, probs):
        return semantic_argmax(masks, probs, (4 * masks.shape[2], 4 * masks.shape[3]), return_scores=True)

    compiled = torch.compile(scaled, fullgraph=True, dynamic=True, backend=backend)
    for h, w in ((7, 5), (9, 11), (20, 6)):
        masks, probs = torch.randn(2, 6, h, w), torch.rand(2, 6, 13)  # no two sizes alike
        torch.testing.assert_close(compiled(masks, probs), scaled(masks, probs), rtol=0, atol=0)
    assert len(frames) == 1


def test_compile_with_inductor_and_views():
    torch._dynamo.reset()
    inputs = BY_NAME["mixed"].inputs(torch.float32)
    compiled = torch.compile(lambda inputs: semantic_argmax(**inputs).long() + 1, fullgraph=True)
    torch.testing.assert_close(compiled(inputs), semantic_argmax(**inputs).long() + 1)


def test_export():
    class Tail(torch.nn.Module):
        def forward(self, masks, probs):
            return semantic_argmax(masks, probs, (30, 20))

    arguments = (torch.randn(1, 6, 7, 5), torch.rand(1, 6, 5))
    program = torch.export.export(Tail(), arguments)
    torch.testing.assert_close(program.module()(*arguments), Tail()(*arguments))
    assert "segvit.semantic_argmax" in str(program.graph)


@named([BY_NAME["odd"], BY_NAME["mixed"], BY_NAME["classes_171"]])
def test_layouts_give_the_same_and_inputs_are_not_changed(case):
    inputs = case.inputs(torch.float32, concentrated=True)
    expected = semantic_argmax(**inputs)
    masks = inputs["mask_logits"]
    stacks = [masks] if isinstance(masks, torch.Tensor) else masks
    odd = [m.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for m in stacks]
    probs = inputs["class_probs"].transpose(1, 2).contiguous().transpose(1, 2)
    assert odd[0].stride(-1) != 1 and probs.stride(-1) != 1
    before = [t.clone() for t in (*odd, probs)]
    strided = {**inputs, "mask_logits": odd, "class_probs": probs}
    torch.testing.assert_close(semantic_argmax(**strided), expected, rtol=0, atol=0)
    torch.testing.assert_close([*odd, probs], before, rtol=0, atol=0)
    shared = [m[:1].expand(m.shape[0], -1, -1, -1) for m in stacks]
    same = {**inputs, "mask_logits": shared}
    copies = {**inputs, "mask_logits": [m.contiguous() for m in shared]}
    torch.testing.assert_close(semantic_argmax(**same), semantic_argmax(**copies), rtol=0, atol=0)


def test_no_gradient_and_empty_batch():
    masks = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels, scores = semantic_argmax(masks, torch.rand(1, 3, 2), (8, 8), return_scores=True)
    assert not labels.requires_grad and not scores.requires_grad
    labels, scores = semantic_argmax(masks[:0], torch.rand(0, 3, 300), (8, 9), return_scores=True)
    assert labels.shape == scores.shape == (0, 8, 9) and labels.dtype == torch.int16


@RANDOM_OR_TRAINED
def test_infinite_logits_are_the_limit(concentrated):
    """A mask that is certain (±inf, as if by masked_fill) gives what very large logits give."""
    inputs = BY_NAME["classes_171"].inputs(torch.float32, concentrated=concentrated)
    large = inputs["mask_logits"].clone()
    large[:, :90, 2] = -1e20
    large[:, 90:100, 3, 1] = 1e20
    infinite = torch.where(large.abs() > 1e10, large * float("inf"), large)
    assert infinite.isinf().any() and not infinite.isnan().any()
    results = [semantic_argmax(**{**inputs, "mask_logits": m}) for m in (large, infinite)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_scattered_pixels_are_those_of_the_block():
    """The path of pixels that the shortcut leaves open, on all pixels, with clamped places and ±inf."""
    masks = torch.randn(6, 4, 5, dtype=torch.float64)
    masks[0, 1], masks[1, :, 2] = float("inf"), -float("inf")
    part = module._Part(masks, torch.rand(3, 6, dtype=torch.float64), (0.3, -1.2, -0.25, 4.9), (0, 24))
    y, x = torch.cartesian_prod(torch.arange(18), torch.arange(24)).unbind(1)
    block = module._mix(part, 0, 18, True)
    assert block.isfinite().all()
    torch.testing.assert_close(module._mix_at(part, y, x), block.flatten(1))


@RANDOM_OR_TRAINED
@named([BY_NAME["classes_150"], BY_NAME["classes_300"], BY_NAME["sliding"]])
def test_not_a_number_gives_some_class(case, concentrated):
    inputs = case.inputs(torch.float32, concentrated=concentrated)
    inputs["mask_logits"][:, ::3, ::2] = float("nan")
    assert int(semantic_argmax(**inputs).max()) < case.classes
    inputs = case.inputs(torch.float32, concentrated=concentrated)
    inputs["class_probs"][:, 3] = float("nan")
    labels = semantic_argmax(**inputs)
    assert int(labels.min()) >= 0 and int(labels.max()) < case.classes


def test_autocast_changes_nothing():
    inputs = BY_NAME["odd"].inputs(torch.float32)
    expected = semantic_argmax(**inputs, return_scores=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(semantic_argmax(**inputs, return_scores=True), expected, rtol=0, atol=0)


MASKS, PROBS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 6)
VIEWS = Views([View.whole(i, (4, 5), (8, 9)) for i in range(2)], 2, (8, 9))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"mask_logits": MASKS[0]}, ValueError, r"mask_logits has shape \(3, 4, 5\); expected \(views"),
        ({"mask_logits": []}, ValueError, "mask_logits is an empty list"),
        ({"mask_logits": [MASKS, MASKS[:, :2]]}, ValueError, r"mask_logits\[1\] has shape .* 3 queries"),
        ({"mask_logits": [MASKS, MASKS.half()]}, TypeError, r"mask_logits\[1\] has dtype torch.float16"),
        ({"mask_logits": MASKS.long()}, TypeError, "mask_logits has dtype torch.int64"),
        ({"mask_logits": MASKS.tolist()}, TypeError, r"mask_logits\[0\] is a list; expected a tensor"),
        ({"mask_logits": MASKS[:, :, :0]}, ValueError, r"mask_logits has shape \(2, 3, 0, 5\)"),
        ({"mask_logits": MASKS.to("meta")}, ValueError, "mask_logits is on meta; expected cpu"),
        ({"class_probs": PROBS[:1]}, ValueError, r"class_probs has shape \(1, 3, 6\); expected \(2, 3, cl"),
        ({"class_probs": PROBS[:, :2]}, ValueError, "class_probs has shape"),
        ({"class_probs": PROBS[..., :0]}, ValueError, "class_probs has shape"),
        ({"class_probs": PROBS.int()}, TypeError, "class_probs has dtype torch.int32"),
        ({"class_probs": None}, TypeError, "class_probs is a NoneType"),
        ({"size": (8,)}, ValueError, r"size is \(8,\)"),
        ({"size": (0, 9)}, ValueError, r"size is \(0, 9\)"),
        ({"views": [View.whole(0, (4, 5), (8, 9))]}, TypeError, "views is a list; expected a Views"),
        ({"views": VIEWS, "size": (8, 8)}, ValueError, r"views are for size \(8, 9\); expected \(8, 8\)"),
        ({"views": VIEWS, "mask_logits": MASKS[:1], "class_probs": PROBS[:1]}, ValueError, "holds 2 views"),
        ({"views": VIEWS.to("meta")}, ValueError, r"views are on meta; expected cpu: views.to\(device\)"),
        ({"activation": "softmax"}, ValueError, "activation is 'softmax'; expected one of sigmoid, none"),
        ({"prune": -0.1}, ValueError, "prune is -0.1"),
        ({"prune": float("nan")}, ValueError, "prune is nan"),
        ({"backend": "cudnn"}, ValueError, "'cudnn'"),
    ],
)
def test_refusals(change, error, message):
    semantic_argmax(MASKS, PROBS, (8, 9), views=VIEWS)
    with pytest.raises(error, match=message):
        semantic_argmax(**{"mask_logits": MASKS, "class_probs": PROBS, "size": (8, 9), **change})


class TestAssertLabels:
    """The helper sees one wrong pixel, and lets pass what rounding explains."""

    case = BY_NAME["odd"]

    def arguments(self):
        inputs = self.case.inputs(torch.float32)
        truth = oracle(inputs)
        return truth.argmax(1).to(torch.uint8), truth, oracle(inputs, torch.float32)

    def test_one_wrong_pixel(self):
        labels, truth, ordinary = self.arguments()
        assert assert_labels("right", labels, truth, ordinary) == 0
        labels[1, 99, 36] = truth[1, :, 99, 36].argmin()
        with pytest.raises(AssertionError, match="1 of 7400 labels are wrong"):
            assert_labels("wrong", labels, truth, ordinary)

    def test_rounding_passes_and_is_counted(self):
        labels, truth, ordinary = self.arguments()
        other = int(truth[0, :, 3, 4].argmin())
        ordinary[0, other, 3, 4] = truth[0, other, 3, 4] = truth[0, :, 3, 4].max() * (1 + 1e-8)
        assert assert_labels("close", labels, truth, ordinary) == 1
        ordinary[0, other, 3, 4] = truth[0, other, 3, 4] = truth[0, other, 3, 4] * (1 + 1e-4)
        with pytest.raises(AssertionError, match="1 of 7400"):
            assert_labels("not close", labels, truth, ordinary)

    @pytest.mark.parametrize("change", [lambda x: x.to(torch.int16), lambda x: x[:1], lambda x: x + 250])
    def test_dtype_shape_and_range(self, change):
        labels, truth, ordinary = self.arguments()
        with pytest.raises(AssertionError):
            assert_labels("bad", change(labels), truth, ordinary)


def test_reference_labels_are_the_argmax_of_its_scores():
    inputs = BY_NAME["mixed"].inputs(torch.float64)
    labels, scores = semantic_argmax_reference(**inputs)
    torch.testing.assert_close(labels.long(), scores.argmax(1))
