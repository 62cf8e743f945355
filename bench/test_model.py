"""``pytest bench/ --benchmark-only``: a small SegViT, image to label map and training step, each backend."""

from __future__ import annotations

import pytest
import torch

import segvit_kernels
from bench.measure import timing
from bench.subjects import operators
from segvit import SegViT, SegViTConfig, SegViTLoss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = tuple(dict.fromkeys((operators.kernels_backend(DEVICE), "eager")))
CLASSES, SIZE = 19, 128


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"width": 192, "depth": 4, "heads": 3, "taps": (1, 3), "image_size": (SIZE, SIZE)}
    return SegViT(SegViTConfig.preset("vit_tiny", CLASSES, **sizes)).to(DEVICE)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return drawn.to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_label_map(benchmark, model, images, backend):
    model.eval()

    def call() -> torch.Tensor:
        with segvit_kernels.backend(backend), torch.inference_mode():
            labels = model.labels(model(model.preprocess(images)), (SIZE, SIZE))
            timing.synchronize(DEVICE)
            return labels

    with segvit_kernels.backend("eager"), torch.inference_mode():
        expected = model.labels(model(model.preprocess(images)), (SIZE, SIZE))
    assert (call() == expected).double().mean() > 0.999
    benchmark.group = "label map"
    benchmark.pedantic(call, warmup_rounds=2, rounds=20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_step(benchmark, model, images, backend):
    model.train()
    criterion = SegViTLoss(CLASSES)
    labels = torch.randint(0, CLASSES, (1, SIZE, SIZE), generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def step(backend: str) -> torch.Tensor:
        torch.manual_seed(0)
        with segvit_kernels.backend(backend):
            model.zero_grad(set_to_none=True)
            loss = criterion(model(model.preprocess(images)), labels)["total"]
            loss.backward()
            timing.synchronize(DEVICE)
            return loss.detach()

    torch.testing.assert_close(step(backend), step("eager"), rtol=1e-4, atol=1e-5)
    benchmark.group = "training step"
    benchmark.pedantic(step, args=(backend,), warmup_rounds=2, rounds=20)
