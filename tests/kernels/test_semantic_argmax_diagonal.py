"""semantic_argmax of the diagonal of a class matrix: the labels of the matrix, which is never made."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import segvit_kernels
from segvit_kernels.ops.semantic_argmax import View, Views, semantic_argmax, semantic_argmax_reference

SIZE, GRID, CLASSES = (23, 31), (5, 7), 9


def inputs(dtype, batch=2, activation="sigmoid"):
    generator = torch.Generator().manual_seed(0)
    masks = 3 * torch.randn(batch, CLASSES, *GRID, generator=generator, dtype=torch.float64)
    factors = torch.rand(batch, CLASSES, generator=generator, dtype=torch.float64)
    if activation == "none":
        masks -= 8  # scores of a pixel classifier may all be negative
        factors = torch.ones_like(factors)
    return masks.to(dtype), factors.to(dtype)


def views(kind):
    if kind == "padded":
        make = [View.crop(b, SIZE, SIZE, 0, 0, (32, 40), GRID) for b in range(2)]
    elif kind == "whole":
        make = [View.whole(b, GRID, SIZE) for b in range(2)]
    elif kind == "flipped":
        make = [View.crop(b, SIZE, SIZE, 0, 0, SIZE, GRID, flip=True) for b in range(2)]
    elif kind == "swapped":
        make = [View.crop(1 - b, SIZE, SIZE, 0, 0, (32, 40), GRID) for b in range(2)]
    else:  # two windows and a smaller scale of one image
        make = [View.crop(0, SIZE, SIZE, 0, left, (23, 20), GRID) for left in (0, 11)]
        make.append(View.crop(0, SIZE, (12, 16), 0, 0, (16, 16), GRID, group=1))
        return Views(make, 1, SIZE)
    return Views(make, 2, SIZE)


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
@pytest.mark.parametrize("kind", [None, "whole", "padded", "flipped", "swapped", "several"])
def test_the_labels_of_the_matrix(kind, activation):
    found = None if kind is None else views(kind)
    batch = 3 if kind == "several" else 2
    masks, factors = inputs(torch.float64, batch, activation)
    options = {"views": found, "activation": activation}
    expected, scores = semantic_argmax_reference(masks, torch.diag_embed(factors), SIZE, **options)
    assert len(expected.unique()) > 3
    _, same = semantic_argmax_reference(masks, factors, SIZE, **options)
    torch.testing.assert_close(same, scores, rtol=0, atol=1e-12)
    labels, best = semantic_argmax(masks, factors, SIZE, **options, return_scores=True)
    torch.testing.assert_close(labels, expected)
    torch.testing.assert_close(best, scores.amax(1), rtol=0, atol=5e-6)  # the maps travel in float32
    for dtype, backend in ((torch.float64, None), (torch.float32, None), (torch.float32, "eager")):
        labels = semantic_argmax(masks.to(dtype), factors.to(dtype), SIZE, **options, backend=backend)
        lost = scores.amax(1) - scores.gather(1, labels.long()[:, None])[:, 0]
        assert labels.dtype == torch.uint8 and lost.max() < 1e-5


def test_grids_of_different_sizes_and_pruned_classes():
    masks, factors = inputs(torch.float64)
    stacks = [masks[:1], masks[1:, :, :3]]
    expected, _ = semantic_argmax_reference(stacks, torch.diag_embed(factors), SIZE, prune=0.4)
    for found in (None, Views([View.whole(0, GRID, SIZE), View.whole(1, (3, 7), SIZE)], 2, SIZE)):
        assert torch.equal(semantic_argmax(stacks, factors, SIZE, prune=0.4, views=found), expected)


def test_it_runs_on_the_kernels_of_panoptic_argmax():
    masks, factors = inputs(torch.float32)
    for kind, operator in ((None, "panoptic"), ("padded", "panoptic"), ("flipped", "semantic")):
        with segvit_kernels.record_backends() as taken:
            semantic_argmax(masks, factors, SIZE, views=kind and views(kind))
        assert set(taken) == {f"{operator}_argmax"}


def test_many_classes_and_numbers_that_are_none():
    masks, factors = torch.zeros(1, 300, 2, 2), torch.full((1, 300), 0.25)
    factors[0, 299] = 0.5
    labels = semantic_argmax(masks, factors, (4, 4))
    assert labels.dtype == torch.int16 and (labels == 299).all()
    labels = semantic_argmax(masks, factors * float("nan"), (4, 4))
    assert ((labels >= 0) & (labels < 300)).all()
    assert semantic_argmax(masks[:0], factors[:0], (4, 5)).shape == (0, 4, 5)


def test_fake_tensors_and_traces():
    """Whose numbers nobody can look at, to refuse some."""
    masks, factors = inputs(torch.float32)
    with FakeTensorMode() as mode:
        fake = semantic_argmax(mode.from_tensor(masks), mode.from_tensor(factors), SIZE)
    assert fake.shape == (len(masks), *SIZE)
    traced = make_fx(lambda m, f: semantic_argmax(m, f, SIZE))(masks, factors)
    assert torch.equal(traced(masks, factors), semantic_argmax(masks, factors, SIZE))


def test_refusals():
    masks, factors = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"class_probs has shape \(2, 8\); expected .* diagonal \(2, 9\)"):
        semantic_argmax(masks, factors[:, :8], SIZE)
    with pytest.raises(ValueError, match=r"class_probs holds -0\.5 on its diagonal; expected at least 0"):
        semantic_argmax(masks, factors.index_fill(1, torch.tensor([3]), -0.5), SIZE)
