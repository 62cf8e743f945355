"""The synthetic set: a function of (seed, split, index), with labels that fit the pictures."""

import numpy as np
import pytest
import torch

from segvit.data.synthetic import CLASS_NAMES, PALETTE, SyntheticShapes


def test_items_depend_on_seed_split_and_index_alone():
    first = SyntheticShapes("training", length=8, size=48, seed=3)
    item = first[5]
    torch.manual_seed(1)
    np.random.seed(1)
    again = SyntheticShapes("training", length=100, size=48, seed=3)[5]
    assert torch.equal(item["image"], again["image"]) and torch.equal(item["label"], again["label"])
    others = [first[4], SyntheticShapes("validation", 8, 48, 3)[5], SyntheticShapes("training", 8, 48, 4)[5]]
    assert all(not torch.equal(item["image"], other["image"]) for other in others)


def test_item_form():
    item = SyntheticShapes(length=1, size=40)[0]
    assert item["image"].shape == (3, 40, 40) and item["image"].dtype == torch.uint8
    assert item["label"].shape == (40, 40) and item["label"].dtype == torch.int64
    assert item["name"] == "training/000000"
    assert len(CLASS_NAMES) == len(PALETTE) == len(set(PALETTE)) == SyntheticShapes.num_classes >= 12


def test_every_class_occurs_and_none_dominates():
    dataset = SyntheticShapes(length=60, size=64)
    counts = sum(torch.bincount(dataset[i]["label"].flatten(), minlength=12) for i in range(60))
    shares = counts / counts.sum()
    assert shares.min() > 0.01 and shares.max() < 0.3


def test_labels_fit_the_picture():
    """Edges of the picture lie on edges of the label map far more often than elsewhere."""
    at_edges, elsewhere = [], []
    for i in range(10):
        item = SyntheticShapes(length=10, size=96)[i]
        grey, label = item["image"].float().mean(0), item["label"]
        # From one pixel to the next but one: the outlines are anti-aliased over two.
        step = (grey[:, 2:] - grey[:, :-2]).abs()
        edge = (label[:, 2:] != label[:, :-2]) & (label[:, 1:-1] >= 4)
        at_edges.append(step[edge])
        elsewhere.append(step[~edge])
    assert torch.cat(at_edges).mean() > 1.8 * torch.cat(elsewhere).mean()


def test_bad_arguments():
    with pytest.raises(ValueError, match="split: got 'test'"):
        SyntheticShapes("test")
    with pytest.raises(ValueError, match="image_size: got 8, expected at least 32"):
        SyntheticShapes(size=8)
    with pytest.raises(IndexError):
        SyntheticShapes(length=2)[2]
