"""The loss against its formula in float64: gradients, class weights, edge cases."""

import pytest
import torch
from torch.nn import functional as F

from segvit.model.losses import SegViTLoss
from segvit.model.segvit import SegViTOutput

CLASSES = 5


def make_output(batch=2, grid=(4, 6), auxiliary=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def pair():
        class_logits = torch.randn(batch, CLASSES, CLASSES + 1, generator=generator, dtype=dtype)
        mask_logits = 3 * torch.randn(batch, CLASSES, *grid, generator=generator, dtype=dtype)
        return class_logits.requires_grad_(), mask_logits.requires_grad_()

    pairs = [pair() for _ in range(auxiliary + 1)]
    return SegViTOutput(*pairs[-1], pairs[:-1])


def make_labels(batch=2, size=(13, 17), seed=0):
    """Class 3 nowhere, class 4 in the first image only, some ignored."""
    labels = torch.randint(0, 3, (batch, *size), generator=torch.Generator().manual_seed(seed))
    labels[0, :4] = 4
    labels[-1, :, -3:] = 255
    return labels


def formula(class_logits, mask_logits, labels, mask_ignored=False):
    """The definition of the loss, one pair at a time, unweighted."""
    batch = labels.shape[0]
    ce, weights, focal, dice, count = 0.0, 0.0, 0.0, 0.0, 0
    masks = F.interpolate(mask_logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    for b in range(batch):
        for c in range(CLASSES):
            target = labels[b] == c
            here = bool(target.any())
            probability = class_logits[b, c].softmax(0)
            weight = 1.0 if here else 0.1
            ce = ce - weight * probability[c if here else CLASSES].log()
            weights += weight
            if not here:
                continue
            count += 1
            x, t = masks[b, c].flatten(), target.flatten().double()
            if mask_ignored:
                x, t = x[(labels[b] != 255).flatten()], t[(labels[b] != 255).flatten()]
            p = x.sigmoid()
            p_t = p * t + (1 - p) * (1 - t)
            alpha_t = 0.25 * t + 0.75 * (1 - t)
            focal = focal + (alpha_t * (1 - p_t) ** 2 * -p_t.log()).mean()
            dice = dice + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    return {"class": ce / weights, "focal": 20 * focal / max(count, 1), "dice": dice / max(count, 1)}


def close(actual, expected, tolerance=1e-7):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("mask_ignored", [False, True])
def test_values_and_gradients_equal_the_formula(mask_ignored):
    output, labels = make_output(), make_labels()
    losses = SegViTLoss(CLASSES, mask_ignored=mask_ignored)(output, labels)
    names = [f"{prefix}{term}" for prefix in ("", "aux0.", "aux1.") for term in ("class", "focal", "dice")]
    assert list(losses) == [*names, "total"]
    total = 0.0
    pairs = {"": output[:2], "aux0.": output.auxiliary[0], "aux1.": output.auxiliary[1]}
    for prefix, pair in pairs.items():
        for term, value in formula(*pair, labels, mask_ignored).items():
            close(losses[prefix + term], value)
            total = total + value
    close(losses["total"], total)

    inputs = [tensor for pair in pairs.values() for tensor in pair]
    expected = torch.autograd.grad(total, inputs)
    for actual, value in zip(torch.autograd.grad(losses["total"], inputs), expected, strict=True):
        close(actual, value)


def test_weights_and_exponents():
    output, labels = make_output(auxiliary=0), make_labels()
    plain = SegViTLoss(CLASSES)(output, labels)
    loss = SegViTLoss(CLASSES, class_weight=2.0, focal_weight=5.0, dice_weight=0.5, focal_gamma=0.0)
    scaled = loss(output, labels)
    close(scaled["class"], 2 * plain["class"])
    close(scaled["dice"], plain["dice"] / 2)
    assert scaled["focal"] > plain["focal"] / 4, "without its focusing factor the focal term grows"


@pytest.mark.parametrize("mask_ignored", [False, True])
def test_gradcheck(mask_ignored):
    loss = SegViTLoss(CLASSES, mask_ignored=mask_ignored)
    labels = make_labels(size=(5, 6))
    output = make_output(grid=(2, 3), auxiliary=0)

    def total(class_logits, mask_logits):
        return loss(SegViTOutput(class_logits, mask_logits, []), labels)["total"]

    assert torch.autograd.gradcheck(total, output[:2])


def test_nothing_of_full_resolution_is_kept():
    """For the backward pass: low-resolution logits and the labels."""
    output, labels = make_output(), make_labels(size=(52, 68))
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        SegViTLoss(CLASSES)(output, labels)["total"].backward()
    large = [tensor for tensor in kept if tensor.numel() >= 52 * 68]
    assert all(not tensor.is_floating_point() and tensor.numel() <= labels.numel() for tensor in large)


def test_absent_pairs_get_no_gradient():
    output = make_output(auxiliary=0)
    SegViTLoss(CLASSES)(output, make_labels())["total"].backward()
    assert (output.mask_logits.grad[:, 3] == 0).all() and (output.mask_logits.grad[0, 4] != 0).all()


def test_step_reads_nothing_back():
    """On meta tensors there is nothing to read, and a shape that depends on values cannot be."""
    output = SegViTOutput(*(t.detach().to("meta").requires_grad_() for t in make_output(auxiliary=0)[:2]), [])
    losses = SegViTLoss(CLASSES)(output, make_labels().to("meta"))
    losses["total"].backward()
    assert output.mask_logits.grad.shape == output.mask_logits.shape
    with pytest.raises(Exception, match="meta"):
        losses["total"].item()


def test_images_without_labels():
    output = make_output(auxiliary=0)
    labels = make_labels()
    labels[0] = 255
    losses = SegViTLoss(CLASSES)(output, labels)
    for name, value in formula(*output[:2], labels).items():
        close(losses[name], value)
    labels[1] = 255
    losses = SegViTLoss(CLASSES)(output, labels)
    for name, value in formula(*output[:2], labels).items():
        close(losses[name], value)
    assert losses["focal"] == 0 and losses["dice"] == 0
    losses["total"].backward()
    assert (output.mask_logits.grad == 0).all(), "every parameter still gets a gradient, as DDP needs"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype):
    output = make_output(auxiliary=0, dtype=torch.float32)
    half = SegViTOutput(output.class_logits.to(dtype), output.mask_logits.to(dtype), [])
    exact = SegViTOutput(half.class_logits.float(), half.mask_logits.float(), [])
    loss = SegViTLoss(CLASSES)
    for name, value in loss(half, make_labels()).items():
        assert value.dtype == torch.float32
        close(value, loss(exact, make_labels())[name])


def test_label_dtypes():
    output = make_output(auxiliary=0)
    expected = SegViTLoss(CLASSES)(output, make_labels())["total"]
    for dtype in (torch.uint8, torch.int16, torch.int32):
        close(SegViTLoss(CLASSES)(output, make_labels().to(dtype))["total"], expected)
    negative = torch.where(make_labels() == 255, -1, make_labels())
    close(SegViTLoss(CLASSES, ignore_index=-1)(output, negative)["total"], expected)


def test_mistakes():
    output, labels = make_output(auxiliary=0), make_labels()
    loss = SegViTLoss(CLASSES)
    with pytest.raises(TypeError, match="labels must be integers"):
        loss(output, torch.full(labels.shape, float("nan")))
    with pytest.raises(ValueError, match=r"shape \(2, H, W\), got \(2, 1, 13, 17\)"):
        loss(output, labels[:, None])
    with pytest.raises(ValueError, match="labels from 0 to 7; expected 0 to 4 or 255"):
        loss(output, labels.clone().index_fill_(1, torch.tensor([0]), 7))
    with pytest.raises(ValueError, match=r"class_logits must have shape \(2, 6, 7\)"):
        SegViTLoss(6)(output, labels)
    with pytest.raises(ValueError, match="mask_logits must have shape"):
        loss(SegViTOutput(output.class_logits, output.mask_logits[:, :3], []), labels)
    with pytest.raises(ValueError, match="ignore_index 2 is one of the 5 classes"):
        SegViTLoss(CLASSES, ignore_index=2)


def test_class_weights_are_those_of_the_pairs():
    """In the definition: w times each pair's focal and dice term over the sum of w, w in the class term."""
    output, labels = make_output(auxiliary=0), make_labels()
    weights = [0.5, 2.0, 1.0, 7.0, 3.0]
    losses = SegViTLoss(CLASSES, class_weights=weights)(output, labels)
    ce, ce_sum, focal, dice, pair_sum = 0.0, 0.0, 0.0, 0.0, 0.0
    for b in range(2):
        for c in range(CLASSES):
            pair = output.class_logits[b : b + 1], output.mask_logits[b : b + 1]
            here = bool((labels[b] == c).any())
            weight = weights[c] if here else 0.1
            ce -= weight * pair[0][0, c].log_softmax(0)[c if here else CLASSES]
            ce_sum += weight
            if here:
                alone = torch.where(labels[b : b + 1] == c, c, 255)
                terms = formula(*pair, alone)
                focal, dice = focal + weight * terms["focal"], dice + weight * terms["dice"]
                pair_sum += weight
    close(losses["class"], ce / ce_sum)
    close(losses["focal"], focal / pair_sum)
    close(losses["dice"], dice / pair_sum)
    same = SegViTLoss(CLASSES, class_weights=[2.0] * CLASSES, no_object_weight=0.2)(output, labels)
    close(same["total"], SegViTLoss(CLASSES)(output, labels)["total"])
    for wrong in ([1.0] * 4, [1.0] * 4 + [-1.0], [0.0] * 5, [1.0] * 4 + [float("nan")]):
        with pytest.raises(ValueError, match="class_weights: got"):
            SegViTLoss(CLASSES, class_weights=wrong)
