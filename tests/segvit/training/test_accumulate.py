"""A batch in parts, and over processes: loss and gradient are those of the batch at once, in float64."""

import os

import pytest
import torch
from lightning_fabric import Fabric

from segvit.config import SegViTConfig
from segvit.model.linear_head import CrossEntropy, LinearSegmenter
from segvit.model.losses import SegViTLoss
from segvit.model.segvit import SegViT
from segvit.training.accumulate import backward
from segvit.training.launch import launch

CLASSES, BATCH, SIZE = 5, 4, 32
MODEL = {
    "width": 16, "depth": 2, "heads": 2, "taps": (0, 1), "patch_size": 8, "decoder_depth": 1,
    "decoder_dropout": 0.0, "drop_path": 0.0, "image_size": SIZE,
}  # fmt: skip
WEIGHTS = [0.5, 2.0, 1.0, 0.0, 3.0]


def label_cases():
    """Uneven ones: all classes or one, images without a class, one labelled pixel, none at all."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randint(0, CLASSES, (BATCH, SIZE, SIZE), generator=generator)
    mixed[1] = 255
    mixed[2] = 3
    mixed[3, 5:] = 255
    one_pixel = torch.full_like(mixed, 255)
    one_pixel[2, 0, 0] = 1
    return [mixed, one_pixel, torch.full_like(mixed, 255)]


def gradients(fabric, parts):
    """[terms of the loss, gradient] of every head, weights of the classes and labels."""
    torch.set_default_dtype(torch.float64)  # Fabric turns a model's output into it
    try:
        return _gradients(fabric, parts)
    finally:
        torch.set_default_dtype(torch.float32)


def _gradients(fabric, parts):
    rank, world = fabric.global_rank, fabric.world_size
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    results = []
    for head in ("segvit", "linear"):
        for weights in (None, WEIGHTS):
            torch.manual_seed(0)
            config = SegViTConfig.preset("vit_tiny", CLASSES, **MODEL)
            model = (LinearSegmenter if head == "linear" else SegViT)(config).double().train()
            images = torch.randn(BATCH, 3, SIZE, SIZE, dtype=torch.float64)[share]
            if head == "linear":
                loss = CrossEntropy(255, weights)
            else:
                loss = SegViTLoss(CLASSES, class_weights=weights)
            wrapped = fabric.setup_module(model)
            for labels in label_cases():
                model.zero_grad(set_to_none=True)
                terms = backward(fabric, wrapped, lambda x: x, loss, images, labels[share], parts)
                values = torch.stack(list(terms.values()))
                assert values.dtype == torch.float64
                grads = torch.cat([p.grad.flatten() for p in model.parameters()])
                results.append((fabric.all_reduce(values, reduce_op="mean"), grads))
    return results


def on_two_processes(fabric):
    return [gradients(fabric, parts) for parts in (1, 2)]


@pytest.fixture(scope="module")
def at_once():
    return gradients(Fabric(accelerator="cpu", devices=1, precision="64-true"), 1)


def assert_same(actual, expected):
    assert len(actual) == len(expected) == 12
    for (terms, grads), (all_terms, all_grads) in zip(actual, expected, strict=True):
        torch.testing.assert_close(terms, all_terms, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(grads, all_grads, rtol=1e-9, atol=1e-13)
        assert grads.isfinite().all()


def test_the_cases_differ(at_once):
    for head in range(2):
        totals = [float(terms[-1]) for terms, _ in at_once[6 * head : 6 * head + 6]]
        assert len(set(totals)) >= 4, totals
    assert all(float(grads.abs().max()) > 1e-3 for _, grads in at_once[:2])


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_are_the_batch(at_once, parts):
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    assert_same(gradients(fabric, parts), at_once)


def test_two_processes_and_parts_of_them_are_one_process(at_once, monkeypatch):
    """The mean of the processes' losses and gradients is that of one process with all images."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Not forked: whether autograd has threads by now is up to the tests before.
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn", precision="64-true")
    for actual in launch(fabric, on_two_processes):
        assert_same(actual, at_once)
    assert "RANK" not in os.environ
