"""A small SegViT learns the same with every form of the kernels: whole loss curves are compared."""

from contextlib import nullcontext

import pytest
import torch

import segvit_kernels
from segvit.config import SegViTConfig
from segvit.data.synthetic import CLASS_NAMES, SyntheticShapes
from segvit.model.losses import SegViTLoss
from segvit.model.segvit import SegViT
from segvit_kernels import ATMOutput, atm_reference
from segvit_kernels.ops._attention import draw_seed

STEPS = 8


def plain_formula(
    query, key, value, *, dropout_p=0.0, previous_masks=None, need_masks=True, key_padding_mask=None
):
    seed = draw_seed(query.device) if dropout_p else None
    output, masks = atm_reference(
        query,
        key,
        value,
        dropout_p=dropout_p,
        seed=seed,
        previous_masks=previous_masks,
        key_padding_mask=key_padding_mask,
    )
    return ATMOutput(output, masks if need_masks else None)


def curve(dropout, steps=STEPS):
    """Losses of a few steps of training, from the same seed each time."""
    torch.manual_seed(0)
    config = SegViTConfig.preset(
        "vit_tiny", len(CLASS_NAMES), width=32, depth=2, heads=2, taps=(0, 1), patch_size=8, image_size=48,
        decoder_dim=16, decoder_heads=1, decoder_depth=2, decoder_dropout=dropout, drop_path=0.0,
    )  # fmt: skip
    model, loss = SegViT(config).train(), SegViTLoss(len(CLASS_NAMES))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    items = [SyntheticShapes("training", 2, 48, seed=0)[i] for i in range(2)]
    images = model.preprocess(torch.stack([item["image"] for item in items]))
    labels = torch.stack([item["label"] for item in items])
    losses = []
    for _ in range(steps):
        total = loss(model(images), labels)["total"]
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return torch.tensor(losses)


@pytest.fixture(scope="module")
def expected():
    """The curve of the eager form, by dropout."""
    return {dropout: curve(dropout) for dropout in (0.0, 0.1)}


@pytest.mark.parametrize(
    ("form", "dropout"),
    [("plain formula", 0.0), ("plain formula", 0.1), ("cpu", 0.0), ("cpu", 0.1), ("triton", 0.1)],
)
def test_the_loss_curve_does_not_depend_on_the_kernels(form, dropout, expected, monkeypatch):
    """Triton is interpreted, a second or two for a step: half of the steps, and of both forms the one that
    draws."""
    if form == "cpu" and (reason := segvit_kernels.why_not("cpu", "cpu")):
        pytest.skip(f"backend cpu: {reason}")
    steps = STEPS // 2 if form == "triton" else STEPS
    assert expected[dropout][-1] < 0.85 * expected[dropout][0]
    if form == "plain formula":
        monkeypatch.setattr(segvit_kernels.modules, "fused_atm", plain_formula)
    with segvit_kernels.backend(form) if form != "plain formula" else nullcontext():
        torch.testing.assert_close(curve(dropout, steps), expected[dropout][:steps], rtol=2e-3, atol=0)


def test_a_wrong_gradient_shows_in_the_curve(expected, monkeypatch):
    steps = STEPS // 2
    operator = segvit_kernels._library._operators["atm_bwd"]
    eager = operator.eager
    monkeypatch.setattr(operator, "eager", lambda grad_output, _, *rest: eager(grad_output, None, *rest))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(curve(0.0, steps), expected[0.0][:steps], rtol=2e-3, atol=0)
