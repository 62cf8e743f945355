"""The confusion matrix against counts by hand."""

import math

import numpy as np
import pytest
import torch

from segvit.training.metrics import ConfusionMatrix


def test_iou_of_a_small_map_by_hand():
    label = torch.tensor([[0, 0, 1], [1, 1, 255]])
    guess = torch.tensor([[0, 1, 1], [1, 0, 2]], dtype=torch.uint8)
    confusion = ConfusionMatrix(4)
    confusion.update(guess, label)
    assert confusion.matrix.tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    iou = confusion.iou()
    assert iou[:2].tolist() == pytest.approx([1 / 3, 2 / 4])
    assert iou[2:].isnan().all()  # absent from both maps
    assert confusion.miou == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert confusion.accuracy == pytest.approx(3 / 5)


def test_updates_add_up_over_sizes():
    rng = np.random.default_rng(0)
    pieces, labels = [], []
    confusion = ConfusionMatrix(5, ignore_index=-1)
    for shape in ((2, 7, 3), (1, 4, 9), (1, 1, 1)):
        guess, label = rng.integers(0, 5, shape), rng.integers(-1, 5, shape)
        confusion.update(torch.from_numpy(guess), torch.from_numpy(label))
        pieces.append(guess[label >= 0])
        labels.append(label[label >= 0])
    guess, label = np.concatenate(pieces), np.concatenate(labels)
    for k in range(5):
        intersection = ((guess == k) & (label == k)).sum()
        union = ((guess == k) | (label == k)).sum()
        assert confusion.iou()[k].item() == pytest.approx(intersection / union, abs=1e-15)
    assert int(confusion.matrix.sum()) == len(label)


def test_predicted_but_absent_class_counts_as_zero():
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 2]), torch.tensor([0, 0]))
    assert confusion.iou()[2] == 0
    assert confusion.miou == pytest.approx(0.25)


def test_nothing_counted_gives_nan():
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([0, 1]), torch.tensor([255, 255]))
    assert math.isnan(confusion.miou)
    assert math.isnan(confusion.accuracy)


def test_bad_maps_are_refused():
    confusion = ConfusionMatrix(2)
    with pytest.raises(ValueError, match=r"prediction \(2,\) and label \(3,\)"):
        confusion.update(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"label: got values 0\.\.\.2, expected 0\.\.\.1"):
        confusion.update(torch.tensor([0, 0]), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"prediction: got values 0\.\.\.7"):
        confusion.update(torch.tensor([0, 7]), torch.tensor([0, 0]))
    assert confusion.matrix.sum() == 0
    with pytest.raises(ValueError, match="num_classes: got 0"):
        ConfusionMatrix(0)


def test_measures_by_hand():
    """Class 2 is predicted but not labelled, class 3 labelled, not predicted, class 4 is in neither map."""
    confusion = ConfusionMatrix(5)
    matrix = [[5, 1, 2, 0, 0], [1, 3, 0, 0, 0], [0, 0, 0, 0, 0], [0, 4, 0, 0, 0], [0, 0, 0, 0, 0]]
    confusion.matrix += torch.tensor(matrix)
    nan = math.nan
    expected = {
        "iou": [5 / 9, 3 / 9, 0, 0, nan],
        "dice": [10 / 14, 6 / 12, 0, 0, nan],
        "precision": [5 / 6, 3 / 8, 0, nan, nan],
        "recall": [5 / 8, 3 / 4, nan, 0, nan],
    }
    for name, values in expected.items():
        assert getattr(confusion, name)().tolist() == pytest.approx(values, nan_ok=True), name
    assert confusion.support.tolist() == [8, 4, 0, 4, 0] and confusion.predicted.tolist() == [6, 8, 2, 0, 0]
    assert confusion.frequency_weighted_iou == pytest.approx((8 * 5 / 9 + 4 * 3 / 9) / 16)
    assert math.isnan(ConfusionMatrix(2).frequency_weighted_iou)
