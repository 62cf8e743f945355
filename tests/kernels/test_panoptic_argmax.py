"""panoptic_argmax: the battery of every backend, then the merge rule and what no backend changes."""

import functools
import math

import pytest
import torch
from backends import BY_ID, HALVES, backend_of, each_backend, each_dtype, interpreted
from torch.utils.flop_counter import FlopCounterMode

from segvit_kernels.ops import panoptic_argmax as module
from segvit_kernels.ops.panoptic_argmax import (
    PanopticArgmax,
    panoptic_argmax,
    panoptic_argmax_reference,
    panoptic_segments,
)
from segvit_kernels.testing.panoptic_argmax import CASES, PanopticCase, assert_panoptic

BY_NAME = {case.name: case for case in CASES}
SMALL = PanopticCase("small", 2, 18, (4, 5), (9, 21), (6, 5), activation="sigmoid_first", weighted=True)


@pytest.fixture(autouse=True)
def wide_tiles(request, monkeypatch):
    """Of Triton's interpreter, for calls that give no configuration."""
    if interpreted(backend_of(request.node)):
        from segvit_kernels.triton import panoptic_argmax as kernels

        config = kernels._config
        monkeypatch.setattr(kernels, "_config", lambda arch: {**config(arch), "tile_x": 256})


def named(*names):
    return pytest.mark.parametrize("case", [BY_NAME[n] for n in names] or CASES, ids=lambda case: case.name)


def on(backend):
    return functools.partial(panoptic_argmax, backend=backend.name)


def check(case, dtype, backend, planted=False, seed=0):
    """The results of one case, held to float64."""
    inputs = case.inputs(dtype, backend.device, seed, planted)
    found = on(backend)(**inputs)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    differ = assert_panoptic(case.name, found, inputs, computed)
    assert differ == 0 or dtype != torch.float64
    return found


@each_dtype(dtypes=(torch.float64, torch.float32))
@named()
def test_case(case, backend, dtype, poisoned):
    """With planted values and without; in the interpreter one of them, in turn."""
    turn = CASES.index(case) % 2 if interpreted(backend) else None
    for planted in (False, True):
        if turn in (None, planted):
            check(case, dtype, backend, planted=planted)


@each_dtype(dtypes=HALVES)
@named("odd", "maskformer", "eomt", "probabilities")
def test_halves(case, backend, dtype, poisoned):
    check(case, dtype, backend, planted=True)


@each_backend()
def test_ties(backend, poisoned):
    """Equal queries: the lower one has every pixel, on every side of it."""
    masks = torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    masks = masks[:, [0, 1, 1, 0, 2, 2]].to(backend.device)
    scores = torch.tensor([[0.5, 0.75, 0.75, 0.5, 0.625, 0.625]], device=backend.device)
    for activation in ("sigmoid", "sigmoid_first"):
        found = on(backend)(masks, scores, (19, 70), activation=activation)
        assert set(found.queries.unique().tolist()) == {0, 1, 4}
        assert found.above[0, [1, 3, 5]].equal(found.above[0, [2, 0, 4]])
    flat = on(backend)(masks.new_zeros(1, 40, 2, 2), masks.new_ones(1, 40), (7, 9))
    assert not flat.queries.any() and flat.inside.all(), "σ(0) is one half: at the threshold is inside"


@each_backend()
def test_who_takes_part(backend, poisoned):
    run, masks = on(backend), torch.full((2, 4, 3, 3), 5.0, device=backend.device)
    scores = masks.new_tensor([[-1.0, math.nan, 0.25, 0.5], [-0.5, math.nan, -1.0, -math.inf]])
    found = run(masks, scores, (5, 6))
    assert (found.queries[0] == 3).all() and (found.queries[1] == -1).all()
    assert found.inside[0].all() and not found.inside[1].any()
    assert found.won.tolist() == [[0, 0, 0, 30], [0] * 4]
    assert found.above.tolist() == [[0, 0, 30, 30], [0] * 4] and torch.equal(found.kept, found.won)
    found = run(masks[:1], masks.new_tensor([[0.0, -0.0, 0.0, 0.0]]), (5, 6))
    assert not found.queries.any(), "a score of zero takes part"
    found = run(-masks[:1], masks.new_tensor([[1.0, math.inf, 1e9, 1e8]]), (5, 6))
    assert (found.queries == 1).all(), "an infinite score is one of 1e8"


@each_dtype(dtypes=(torch.float32, *HALVES))
@pytest.mark.parametrize("activation", ["sigmoid", "sigmoid_first"])
def test_no_numbers(activation, backend, dtype, poisoned):
    """NaN is no mask there: as −∞, whose weight of zero stays zero; infinite logits are the limit."""
    run, scores = on(backend), torch.ones(1, 3, dtype=dtype, device=backend.device)
    masks = torch.full((1, 3, 4, 4), -4.0, dtype=dtype, device=backend.device)
    masks[0, 1, :, :2], masks[0, 0, :, 2:] = math.nan, math.inf
    masks[0, 2, 0] = -math.inf
    found = run(masks, scores, (8, 8), activation=activation)
    lowest = torch.where(torch.isnan(masks), -math.inf, masks)
    expected = run(lowest, scores, (8, 8), activation=activation)
    assert all(map(torch.equal, found, expected))
    assert (found.queries[0, :, 5:] == 0).all() and (found.queries[0, 3:, :3] != 1).all()
    nowhere = run(torch.full_like(masks, math.nan), scores, (8, 8), activation=activation)
    assert not nowhere.queries.any() and not nowhere.inside.any() and not nowhere.above.any()


@each_dtype(dtypes=(torch.float32, torch.float16))
def test_strides(backend, dtype, poisoned):
    """Any give the same, and arguments are not changed."""
    inputs = SMALL.inputs(dtype, backend.device, planted=True)
    expected = on(backend)(**inputs)
    masks, scores = inputs.pop("mask_logits"), inputs.pop("scores")
    wide = masks.new_full((*masks.shape[:3], masks.shape[3] + 5), math.nan).transpose(0, 2)
    wide = wide.contiguous().transpose(0, 2)[..., 2:-3].copy_(masks)
    odd = masks.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    for changed in (wide, odd):
        strided = scores.t().contiguous().t()
        before = changed.clone(), strided.clone()
        assert all(map(torch.equal, on(backend)(changed, strided, **inputs), expected))
        assert torch.equal(changed, before[0]) and torch.equal(strided, before[1])


@each_backend()
def test_an_image_does_not_depend_on_the_others_nor_on_the_call(backend, poisoned):
    inputs = SMALL.inputs(torch.float32, backend.device, planted=True)
    masks, scores = inputs.pop("mask_logits"), inputs.pop("scores")
    whole = on(backend)(masks, scores, **inputs)
    for i in range(2):
        own = on(backend)(masks[i : i + 1], scores[i : i + 1], **inputs)
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(own, whole, strict=True))
    assert all(map(torch.equal, on(backend)(masks, scores, **inputs), whole))


@each_backend("cpu", "cuda")
def test_threads_change_nothing(backend, poisoned):
    inputs = BY_NAME["eomt"].inputs(torch.float32, planted=True)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(on(backend)(**inputs))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@each_backend("cpu")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("activation", ["sigmoid", "sigmoid_first", "none"])
def test_queries_passed_over_change_nothing(activation, seed, backend, poisoned):
    """Masks that differ by less than their bounds are loose, in every tile and on both sides of the best."""
    case = PanopticCase("close", 1, 24, (6, 9), (23, 150), activation=activation, threshold=0.55)
    inputs = case.inputs(torch.float32, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    near = torch.randn(inputs["mask_logits"].shape, generator=generator)
    masks = inputs["mask_logits"][:, :1] * 0.05 + 0.2 + 1e-4 * near
    inputs["mask_logits"] = masks.sigmoid() if activation == "none" else masks
    inputs["scores"] = 0.9 + 1e-5 * inputs["scores"]
    found = on(backend)(**inputs)
    assert_panoptic("close", found, inputs)
    assert len(found.queries.unique()) > 10


@each_backend("triton", "cpu", "cuda")
def test_negative_masks(backend, poisoned):
    """Of numbers below zero the product with a smaller score is larger."""
    case = PanopticCase("negative", 1, 19, (5, 6), (21, 80), activation="none", threshold=-0.5)
    inputs = case.inputs(torch.float32)
    inputs["mask_logits"] = -0.1 - inputs["mask_logits"]
    found = on(backend)(**inputs)
    assert_panoptic("negative", found, inputs)
    assert found.inside.any() and not found.inside.all()


@each_backend("cuda", "cpu")
def test_many_queries(backend, poisoned):
    """More than have their counts in shared memory."""
    check(PanopticCase("many", 1, 2100, (2, 3), (4, 5)), torch.float32, backend)


@each_backend()
def test_empty_batch(backend, poisoned):
    masks = torch.empty(0, 5, 4, 4, device=backend.device)
    found = on(backend)(masks, masks[:, :, 0, 0], (8, 9))
    assert found.queries.shape == found.inside.shape == (0, 8, 9) and found.won.shape == (0, 5)


@each_backend("triton", "cpu", "cuda")
def test_float64_is_refused_when_asked_for(backend):
    masks = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=f"'{backend.name}' takes float32.*mask_logits is float64"):
        on(backend)(masks, torch.ones(1, 2), (4, 4))


def arguments_of(case, dtype=torch.float32):
    inputs = case.inputs(dtype, planted=True)
    resized = case.resized or case.grid
    sizes = (*case.size, *resized, *(case.crop or resized))
    flags = (case.activation == "sigmoid_first", case.activation == "sigmoid", case.threshold, case.weighted)
    return (inputs["mask_logits"], inputs["scores"], *sizes, *flags)


@each_backend("eager", "cpu", "cuda")
@named("odd", "mask2former", "eomt")
def test_opcheck(case, backend):
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.segvit.panoptic_argmax.default
    torch.library.opcheck(op, arguments_of(case), {"backend": backend.name}, test_utils=utils)


# What no backend changes.


@named("odd", "mask2former", "eomt")
def test_blocking_does_not_change_the_result(case, monkeypatch):
    inputs = case.inputs(torch.float64, planted=True)
    expected = panoptic_argmax(**inputs)
    monkeypatch.setattr(module, "_BUDGET", 1)
    assert all(map(torch.equal, panoptic_argmax(**inputs), expected))


def test_other_devices_never_look_at_values():
    """On meta tensors any look at a value raises; the form that they run gives the same on the CPU."""
    inputs = BY_NAME["eomt"].inputs(torch.float32, device="meta", planted=True)
    found = panoptic_argmax(**inputs)
    shapes = [tuple(t.shape) for t in found]
    assert shapes == [(1, 20, 70)] * 2 + [(1, 21)] * 3
    arguments = (inputs["mask_logits"], inputs["scores"], 20, 70, 32, 32, 14, 32, False, True, 0.5, False)
    assert [t.shape for t in module._eager(*arguments)] == [(1, 20, 70), (1, 20, 70), (1, 3, 21)]
    segments = panoptic_segments(found, torch.zeros(1, 21, dtype=torch.int64, device="meta"), stuff=[0, 3])
    assert segments.segmentation.shape == (1, 20, 70) and segments.ids.is_meta


def test_flops():
    with FlopCounterMode(display=False) as counter:
        panoptic_argmax(**BY_NAME["odd"].inputs(torch.float32))
    assert counter.get_total_flops() == 2 * 2 * 21 * 19 * 37


def test_compile_fullgraph_and_second_size():
    torch._dynamo.reset()
    frames = []

    def backend(graph, examples):
        frames.append(graph)
        return graph.forward

    def segment(masks, scores, labels):
        found = panoptic_argmax(masks, scores, (4 * masks.shape[2], 4 * masks.shape[3]))
        return panoptic_segments(found, labels, stuff=(1,))

    compiled = torch.compile(segment, fullgraph=True, dynamic=True, backend=backend)
    for h, w in ((7, 5), (9, 11), (20, 6)):
        given = torch.randn(2, 6, h, w), torch.rand(2, 6), torch.randint(3, (2, 6))
        assert all(map(torch.equal, compiled(*given), segment(*given)))
    assert len(frames) == 1


def test_export():
    class Tail(torch.nn.Module):
        def forward(self, masks, scores):
            return panoptic_argmax(masks, scores, (30, 20), activation="sigmoid_first", resized=(12, 12))

    arguments = (torch.randn(1, 6, 7, 5), torch.rand(1, 6))
    program = torch.export.export(Tail(), arguments)
    assert all(map(torch.equal, program.module()(*arguments), Tail()(*arguments)))
    assert "segvit.panoptic_argmax" in str(program.graph)


def test_no_gradient_empty_batch_and_autocast():
    masks = torch.randn(1, 3, 4, 4, requires_grad=True)
    assert not any(t.requires_grad for t in panoptic_argmax(masks, torch.rand(1, 3), (8, 8)))
    empty = panoptic_argmax(masks[:0], torch.rand(0, 3), (8, 9))
    assert panoptic_segments(empty, torch.zeros(0, 3, dtype=torch.int64)).ids.shape == (0, 3)
    inputs = BY_NAME["odd"].inputs(torch.float32)
    expected = panoptic_argmax(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, panoptic_argmax(**inputs), expected))


MASKS, SCORES = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"mask_logits": MASKS[0]}, ValueError, r"mask_logits has shape \(3, 4, 5\); expected \(batch"),
        ({"mask_logits": MASKS[:, :0]}, ValueError, r"mask_logits has shape \(2, 0, 4, 5\)"),
        ({"mask_logits": MASKS.long()}, TypeError, "mask_logits has dtype torch.int64"),
        ({"mask_logits": [MASKS]}, TypeError, "mask_logits is a list; expected a tensor"),
        ({"scores": SCORES[:1]}, ValueError, r"scores has shape \(1, 3\); expected \(2, 3\)"),
        ({"scores": SCORES.int()}, TypeError, "scores has dtype torch.int32"),
        ({"scores": SCORES.to("meta")}, ValueError, "scores is on meta; expected cpu"),
        ({"size": (8,)}, ValueError, r"size is \(8,\)"),
        ({"size": (0, 9)}, ValueError, r"size is \(0, 9\)"),
        ({"resized": 7}, ValueError, r"resized is 7; expected \(height, width\)"),
        ({"resized": (2.5, 3)}, TypeError, "resized is 2.5; expected a whole number"),
        ({"crop": (5, 5)}, ValueError, r"crop is \(5, 5\); expected at most \(4, 5\)"),
        ({"activation": "softmax"}, ValueError, "activation is 'softmax'; expected one of sigmoid, sig"),
        ({"threshold": math.nan}, ValueError, "threshold is nan"),
        ({"weighted": 1}, TypeError, "weighted is 1; expected True or False"),
        ({"backend": "cudnn"}, ValueError, "'cudnn'"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        panoptic_argmax(**{"mask_logits": MASKS, "scores": SCORES, "size": (8, 9), **change})


def test_reference_counts():
    """The reference's own counts, of a map that can be counted by hand."""
    masks = torch.tensor([[[[4.0, 4.0, -4.0]], [[-4.0, 1.0, 1.0]]]])
    found, products = panoptic_argmax_reference(masks, torch.tensor([[0.5, 0.75]]), (1, 3), threshold=0.6)
    assert found.queries.tolist() == [[[0, 1, 1]]] and found.inside.all()
    assert (found.won.tolist(), found.above.tolist()) == ([[1, 2]], [[2, 2]])
    torch.testing.assert_close(products[0, :, 0, 1], masks[0, :, 0, 1].sigmoid() * torch.tensor([0.5, 0.75]))


class TestSegments:
    """The merge rule against a loop over the queries."""

    @staticmethod
    def plain(result, labels, overlap, stuff):
        maps, every = [], []
        for b in range(len(labels)):
            segmentation, ids, known, count = torch.zeros_like(result.queries[b]).int(), [], {}, 0
            for k, label in enumerate(labels[b].tolist()):
                own = (result.queries[b] == k) & result.inside[b]
                share = (result.won[b, k] / result.above[b, k]).item()
                if not own.any() or not share > overlap:
                    ids.append(0)
                    continue
                if label not in stuff or label not in known:
                    count += 1
                    known[label] = count
                ids.append(known[label] if label in stuff else count)
                segmentation[own] = ids[-1]
            maps.append(segmentation)
            every.append(ids)
        return torch.stack(maps), torch.tensor(every, dtype=torch.int32)

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("overlap", [0.0, 0.3, 0.8])
    def test_against_a_loop(self, overlap, seed):
        case = PanopticCase("segments", 2, 64, (8, 8), (50, 61))
        inputs = case.inputs(torch.float32, seed=seed, planted=True)
        generator = torch.Generator().manual_seed(seed)
        inputs["mask_logits"] += torch.randn(2, 64, 8, 8, generator=generator) * 3
        labels = torch.randint(5, (2, 64), generator=generator)
        result = panoptic_argmax(**inputs)
        for stuff in ((), (0, 3), range(5)):
            found = panoptic_segments(result, labels, overlap=overlap, stuff=stuff)
            segmentation, ids = self.plain(result, labels, overlap, stuff)
            assert torch.equal(found.ids, ids) and torch.equal(found.segmentation, segmentation)
            assert found.segmentation.dtype == found.ids.dtype == torch.int32
        assert 1 < ids.amax() <= 5 or overlap > 0.5

    def test_exactly_the_overlap_is_not_more(self):
        """4 of 5 pixels: as float32 a little more than the float64 0.8, as libraries compare them."""
        areas = [torch.tensor([[n, n]], dtype=torch.int32) for n in (4, 5, 4)]
        queries = torch.tensor([[[0, 0, 0, 0, 1]]], dtype=torch.int16)
        result = PanopticArgmax(queries, torch.ones(1, 1, 5, dtype=torch.bool), *areas)
        labels = torch.zeros(1, 2, dtype=torch.int64)
        assert panoptic_segments(result, labels, overlap=0.8).ids.tolist() == [[1, 2]]
        assert panoptic_segments(result, labels, overlap=0.8 + 1e-7).ids.tolist() == [[0, 0]]

    @pytest.mark.parametrize(
        "change, error, message",
        [
            ({"labels": torch.zeros(1, 4)}, TypeError, "labels is a torch.float32; expected a tensor of w"),
            ({"labels": [[1]]}, TypeError, "labels is a list"),
            ({"labels": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, r"labels has shape \(1, 3\)"),
            ({"overlap": 1.5}, ValueError, "overlap is 1.5; expected 0 to 1"),
            ({"stuff": ["sky"]}, TypeError, "stuff is 'sky'; expected a whole number"),
        ],
    )
    def test_refusals(self, change, error, message):
        result = panoptic_argmax(torch.zeros(1, 4, 2, 2), torch.ones(1, 4), (3, 3))
        labels = torch.zeros(1, 4, dtype=torch.int64)
        with pytest.raises(error, match=message):
            panoptic_segments(result, **{"labels": labels, **change})


class TestAssertPanoptic:
    """The helper sees one wrong pixel and one wrong count."""

    @pytest.mark.parametrize(
        "field, message",
        [
            ("queries", "short by"),
            ("inside", "in or out"),
            ("won", "won"),
            ("above", "above is off"),
            ("kept", "kept"),
        ],
    )
    def test_one_wrong(self, field, message):
        inputs = BY_NAME["odd"].inputs(torch.float32)
        found = check(BY_NAME["odd"], torch.float32, BY_ID["eager"])
        _, products = panoptic_argmax_reference(**inputs)
        changed = getattr(found, field).clone()
        if field == "queries":
            changed[1, 18, 36] = products[1, :, 18, 36].argmin()
        elif field == "inside":
            far = (products[0].amax(0) - inputs["threshold"]).abs().argmax()
            changed[0].view(-1)[far] ^= True
        else:
            changed[1, 20] += 1 if field != "above" else 3
        with pytest.raises(AssertionError, match=message):
            assert_panoptic("wrong", found._replace(**{field: changed}), inputs)
