"""Criteria at their own random points: with the same seed the original's losses, matching and gradients.

transformers' criteria are run themselves. tue-mps/eomt, LightlyTrain and detectron2 are not installed here:
their criteria are written down again, from their published formulas and signatures.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[transformers]'")
from scipy.optimize import linear_sum_assignment
from test_integrations import (
    CLASSES,
    QUERIES,
    TARGETS,
    assert_same_step,
    criterion_of,
    make_model,
    make_targets,
    step,
)
from transformers.models.mask2former import modeling_mask2former

from segvit_kernels.integrations import fused_set_criterion, use_fused_loss
from segvit_kernels.integrations._masks import pixel_sums

POINTS = 77


def seeded_step(model, targets, batch):
    torch.manual_seed(5)
    return step(model, targets, batch)


@pytest.mark.parametrize("matcher", [True, False])
@pytest.mark.parametrize("case", TARGETS)
def test_mask2former_step_is_the_original(case, matcher):
    model = make_model("mask2former", train_num_points=POINTS)
    theirs = seeded_step(model, TARGETS[case], 2)
    use_fused_loss(model, points=True, matcher=matcher)
    ours = seeded_step(model, TARGETS[case], 2)
    assert len(ours[0]) == 9
    assert_same_step(ours, theirs)
    use_fused_loss(model, enabled=False)
    assert_same_step(seeded_step(model, TARGETS[case], 2), theirs, rtol=0)


def leaves():
    generator = torch.Generator().manual_seed(7)
    options = {"generator": generator, "dtype": torch.float64}
    return [
        torch.randn(2, 2, QUERIES, 13, 16, **options).requires_grad_(),
        torch.randn(2, 2, QUERIES, CLASSES + 1, **options).requires_grad_(),
    ]


def assert_same_criterion(criterion, call):
    """``call(criterion, masks, classes)`` gives the same losses and gradients when it is replaced."""
    runs = []
    for fused in (False, True):
        if fused:
            use_fused_loss(torch.nn.ModuleList([criterion]), points=True)
        given = leaves()
        torch.manual_seed(11)
        torch.set_default_dtype(torch.float64)  # of the original's random points
        try:
            losses = call(criterion, *given)
        finally:
            torch.set_default_dtype(torch.float32)
        gradients = torch.autograd.grad(sum(losses.values()), given)
        runs.append(({k: v.detach() for k, v in losses.items()}, dict(enumerate(gradients))))
    assert_same_step(({key: runs[1][0][key] for key in runs[0][0]}, runs[1][1]), runs[0])


@pytest.mark.parametrize("name", ["eomt", "oneformer", "videomt"])
def test_transformers_criterion_is_the_original(name):
    def call(criterion, masks, classes):
        auxiliary = [{"masks_queries_logits": masks[1], "class_queries_logits": classes[1]}]
        return criterion(
            masks_queries_logits=masks[0],
            class_queries_logits=classes[0],
            auxiliary_predictions=auxiliary,
            **TARGETS["two images"],
            **({"contrastive_queries_logits": None, "text_queries": None} if name == "oneformer" else {}),
            **({"calculate_contrastive_loss": False} if name == "oneformer" else {}),
        )

    assert_same_criterion(criterion_of(name)[1], call)


class MaskClassificationLoss(modeling_mask2former.Mask2FormerLoss):
    """The signatures and the formula of tue-mps/eomt, of one process."""

    def __init__(
        self, num_points, oversample_ratio, importance_sample_ratio, mask_coefficient, dice_coefficient,
        class_coefficient, num_labels, no_object_coefficient,
    ):  # fmt: skip
        torch.nn.Module.__init__(self)
        self.num_points, self.oversample_ratio = num_points, oversample_ratio
        self.importance_sample_ratio, self.num_labels = importance_sample_ratio, num_labels
        weights = torch.ones(num_labels + 1)
        weights[-1] = no_object_coefficient
        self.register_buffer("empty_weight", weights)
        self.matcher = modeling_mask2former.Mask2FormerHungarianMatcher(
            class_coefficient, mask_coefficient, dice_coefficient, num_points
        )

    def forward(self, masks_queries_logits, targets, class_queries_logits=None):
        masks = [target["masks"].to(masks_queries_logits.dtype) for target in targets]
        labels = [target["labels"].long() for target in targets]
        matched = self.matcher(masks_queries_logits, class_queries_logits, masks, labels)
        return {
            **self.loss_masks(masks_queries_logits, masks, matched),
            **self.loss_labels(class_queries_logits, labels, matched),
        }

    def loss_masks(self, masks_queries_logits, mask_labels, indices):
        count = max(1, sum(len(query) for query, _ in indices))
        return {
            name: value / count
            for name, value in super().loss_masks(masks_queries_logits, mask_labels, indices, 1).items()
        }


def eomt_criterion(kind=MaskClassificationLoss):
    return kind(POINTS, 3.0, 0.75, 5.0, 5.0, 2.0, CLASSES, 0.1).double()


def dictionaries(targets, dtype=torch.bool):
    pairs = zip(targets["mask_labels"], targets["class_labels"], strict=True)
    return [{"masks": masks.to(dtype), "labels": labels} for masks, labels in pairs]


@pytest.mark.parametrize("case", TARGETS)
def test_eomts_own_criterion_is_the_original(case):
    def call(criterion, masks, classes):
        return criterion(masks[0] + 0 * masks[1], dictionaries(TARGETS[case]), classes[0] + 0 * classes[1])

    assert_same_criterion(eomt_criterion(), call)


def test_eomts_own_criterion_at_every_pixel():
    """At as many uniform points as make no difference it is what the points estimate."""
    criterion, (masks, classes) = eomt_criterion(), leaves()
    criterion.num_points, criterion.importance_sample_ratio = 40_000, 0.0
    targets = dictionaries(TARGETS["two images"])
    torch.manual_seed(0)
    theirs = criterion(masks[0].float(), targets, classes[0].double())
    torch.manual_seed(0)
    use_fused_loss(torch.nn.ModuleList([criterion]), matcher=False)  # the same matching
    ours = criterion(masks[0].float(), targets, classes[0].double())
    for name, value in theirs.items():
        assert ours[name].item() == pytest.approx(value.item(), rel=0.05), name


class Anomalous(MaskClassificationLoss):
    def __init__(self, *args, anomaly_coefficient=1.0):
        super().__init__(*args)


Fork = type("MaskClassificationLoss", (Anomalous,), {})


def test_forks_of_eomts_criterion_are_refused():
    for kind, message in (
        (Anomalous, "a Anomalous whose __init__ differs by .*anomaly_coefficient"),
        (Fork, "a MaskClassificationLoss whose __init__ differs by .*anomaly_coefficient"),
    ):
        with pytest.raises(ValueError, match=message):
            use_fused_loss(torch.nn.ModuleList([eomt_criterion(kind)]))
    other = type("Mine", (MaskClassificationLoss,), {"loss_masks": lambda self, masks_queries_logits,
                 mask_labels, indices: {}})  # fmt: skip
    with pytest.raises(ValueError, match="a Mine with a loss_masks other than MaskClassificationLoss's"):
        use_fused_loss(torch.nn.ModuleList([eomt_criterion(other)]))
    criterion = eomt_criterion()
    criterion.matcher = torch.nn.Identity()
    with pytest.raises(ValueError, match="a Identity, a matcher that is not known; matcher=False keeps it"):
        use_fused_loss(torch.nn.ModuleList([criterion]))


class HungarianMatcher(torch.nn.Module):
    """The formula of Mask2Former on detectron2."""

    def __init__(self, cost_class=2.0, cost_mask=5.0, cost_dice=5.0, num_points=POINTS):
        super().__init__()
        self.cost_class, self.cost_mask, self.cost_dice = cost_class, cost_mask, cost_dice
        self.num_points = num_points

    @torch.no_grad()
    def forward(self, outputs, targets):
        found = []
        for masks, classes, target in zip(
            outputs["pred_masks"], outputs["pred_logits"], targets, strict=True
        ):
            points = 2 * torch.rand(1, self.num_points, 2)[:, :, None] - 1
            x, t = (
                F.grid_sample(m[None].to(masks), points, align_corners=False)[0, :, :, 0].double()
                for m in (masks, target["masks"])
            )
            bce = (F.softplus(-x) @ t.T + F.softplus(x) @ (1 - t).T) / self.num_points
            p = x.sigmoid()
            dice = 1 - (2 * p @ t.T + 1) / (p.sum(1)[:, None] + t.sum(1) + 1)
            cost = -self.cost_class * classes.softmax(-1)[:, target["labels"]]
            cost = cost + self.cost_mask * bce + self.cost_dice * dice
            found.append(tuple(torch.as_tensor(i) for i in linear_sum_assignment(cost)))
        return found


class SetCriterion(torch.nn.Module):
    """The signatures and formulas of Mask2Former on detectron2, of one process."""

    def __init__(self, matcher):
        super().__init__()
        self.matcher, self.num_points = matcher, POINTS
        self.oversample_ratio, self.importance_sample_ratio = 3.0, 0.75

    def loss_labels(self, outputs, targets, indices, num_masks):
        classes = torch.full(outputs["pred_logits"].shape[:2], CLASSES)
        for i, (query, target) in enumerate(indices):
            classes[i, query] = targets[i]["labels"][target]
        return {"loss_ce": F.cross_entropy(outputs["pred_logits"].transpose(1, 2), classes)}

    def loss_masks(self, outputs, targets, indices, num_masks):
        x = torch.cat([outputs["pred_masks"][i, query] for i, (query, _) in enumerate(indices)])[:, None]
        sizes = [max(target["masks"].shape[axis] for target in targets) for axis in (1, 2)]
        masks = [target["masks"] for target in targets]
        masks = [F.pad(m, (0, sizes[1] - m.shape[2], 0, sizes[0] - m.shape[1])) for m in masks]
        t = torch.cat([m[own] for m, (_, own) in zip(masks, indices, strict=True)])[:, None].to(x)

        def read(maps, points):
            return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]

        with torch.no_grad():
            many = torch.rand(len(x), int(self.num_points * self.oversample_ratio), 2)
            certain = int(self.num_points * self.importance_sample_ratio)
            best = read(x, many).abs().neg().topk(certain, 1).indices
            chosen = many.gather(1, best[..., None].expand(-1, -1, 2))
            points = torch.cat([chosen, torch.rand(len(x), self.num_points - certain, 2)], 1)
        x, t = read(x, points), read(t, points)
        p = x.sigmoid()
        dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
        bce = F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(1)
        return {"loss_mask": bce.sum() / num_masks, "loss_dice": dice.sum() / num_masks}

    def forward(self, outputs, targets):
        losses, count = {}, float(max(1, sum(len(target["labels"]) for target in targets)))
        for suffix, own in (("", outputs), *((f"_{i}", a) for i, a in enumerate(outputs["aux_outputs"]))):
            indices = self.matcher(own, targets)
            for loss in (self.loss_labels, self.loss_masks):
                losses.update({k + suffix: v for k, v in loss(own, targets, indices, count).items()})
        return losses


def set_criterion_call(targets):
    def call(criterion, masks, classes):
        first, second = ({"pred_masks": m, "pred_logits": c} for m, c in zip(masks, classes, strict=True))
        return criterion({**first, "aux_outputs": [second]}, targets)

    return call


@pytest.mark.parametrize("case", TARGETS)
def test_set_criterion_is_the_original(case):
    call = set_criterion_call(dictionaries(TARGETS[case], torch.float64))
    assert_same_criterion(SetCriterion(HungarianMatcher()), call)


def test_set_criterion_at_every_pixel():
    targets, (masks, _) = dictionaries(TARGETS["other sizes"]), leaves()
    outputs = {"pred_masks": masks[0]}
    indices = [(torch.arange(n), torch.arange(n)) for n in (2, 4)]
    ours = fused_set_criterion(outputs, targets, indices)
    torch.manual_seed(0)
    estimate = fused_set_criterion(outputs, targets, indices, num_points=40_000, importance_sample_ratio=0.0)
    for name, value in estimate.items():
        assert ours[name].item() == pytest.approx(value.item(), rel=0.05)
    for dtype in (torch.int16, torch.uint8):
        few = [tuple(t.to(dtype) for t in pair) for pair in indices]
        assert fused_set_criterion(outputs, targets, few) == ours
    with pytest.raises(ValueError, match="targets has length 2 and indices 1; expected 2"):
        fused_set_criterion(outputs, targets, indices[:1])


def test_a_target_of_several_queries_at_every_pixel():
    """Denoising (Mask DINO) and one-to-many matchers give a target to several queries; each pair counts."""
    targets, (both, _) = dictionaries(TARGETS["other sizes"]), leaves()
    masks = both[0]
    indices = [
        (torch.tensor([5, 0, 3, 1]), torch.tensor([1, 1, 0, 1])),
        (torch.tensor([2, 4]), torch.tensor([3, 3])),
    ]
    size = [max(target["masks"].shape[axis] for target in targets) for axis in (1, 2)]
    mask = dice = 0
    for logits, target, (queries, own) in zip(masks, targets, indices, strict=True):
        x = F.interpolate(logits[queries][None], size, mode="bilinear")[0].flatten(1)
        t = target["masks"][own]
        t = F.pad(t, (0, size[1] - t.shape[2], 0, size[0] - t.shape[1])).to(x).flatten(1)
        mask = mask + F.binary_cross_entropy_with_logits(x, t, reduction="none").mean(1).sum()
        p = x.sigmoid()
        dice = dice + (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).sum()
    ours = fused_set_criterion({"pred_masks": masks}, targets, indices, num_masks=1)
    torch.testing.assert_close(ours["loss_mask"], mask)
    torch.testing.assert_close(ours["loss_dice"], dice)
    gradients = [torch.autograd.grad(m + 2 * d, masks)[0] for m, d in ((mask, dice), tuple(ours.values()))]
    torch.testing.assert_close(*gradients)
    other = [(torch.arange(n), torch.arange(n).flip(0)) for n in (2, 4)]
    sums = pixel_sums([masks, both[1]], [t["masks"] for t in targets], [indices, other], "bce")
    torch.testing.assert_close(sums[0], (mask, dice))
    alone = fused_set_criterion({"pred_masks": both[1]}, targets, other, num_masks=1)
    torch.testing.assert_close(sums[1], tuple(alone.values()))


@pytest.mark.parametrize("points", [True, False])
@pytest.mark.parametrize("kind", ["eomt", "detectron2"])
def test_masks_of_integers(kind, points):
    """The originals convert them, of whatever dtype they are."""
    runs = []
    for dtype in (torch.float32, torch.uint8, torch.int64):
        targets, (masks, classes) = dictionaries(TARGETS["other sizes"], dtype), (t.float() for t in leaves())
        torch.manual_seed(3)
        if kind == "eomt":
            criterion = eomt_criterion().float()
            given = masks[0], targets, classes[0]
        else:
            criterion = SetCriterion(HungarianMatcher())
            given = {"pred_masks": masks[0], "pred_logits": classes[0], "aux_outputs": []}, targets
        use_fused_loss(torch.nn.ModuleList([criterion]), points=points)
        runs.append(criterion(*given))
        targets[1]["masks"] = 255 * targets[1]["masks"]
        with pytest.raises(ValueError, match=r"targets holds masks from 0(\.0)? to .*; expected 0 to 1"):
            criterion(*given)
    for own in runs[1:]:
        torch.testing.assert_close(own, runs[0])


@pytest.mark.parametrize("points", [None, 10])
def test_pairs_out_of_range_are_refused(points):
    """The second image has no such target; its place would be that of another image's."""
    targets, (masks, _) = dictionaries(make_targets([3, 2])), leaves()
    for queries, own, message in (
        ([0, 1], [2, 0], "has targets 0 to 2; expected 0 to 1"),
        ([0, 1], [0, -1], "has targets -1 to 0; expected 0 to 1"),
        ([0, -1], [0, 1], f"has queries -1 to 0; expected 0 to {QUERIES - 1}"),
        ([0, 1], [0], "has 2 queries and 1 targets"),
    ):
        indices = [(torch.arange(0), torch.arange(0)), (torch.tensor(queries), torch.tensor(own))]
        with pytest.raises(ValueError, match=message):
            fused_set_criterion({"pred_masks": masks[0]}, targets, indices, num_points=points)


def test_criteria_of_other_meanings_are_refused():
    model = torch.nn.ModuleList([SetCriterion(HungarianMatcher())])
    del model[0].num_points
    with pytest.raises(ValueError, match="a SetCriterion without num_points; expected that of Mask2Former"):
        use_fused_loss(model)
    other = type(
        "Mine", (SetCriterion,), {"loss_masks": lambda self, outputs, targets, indices, num_masks: {}}
    )
    with pytest.raises(ValueError, match="a Mine with a loss_masks other than SetCriterion's"):
        use_fused_loss(torch.nn.ModuleList([other(HungarianMatcher())]))
    boxes = HungarianMatcher()
    boxes.cost_box = 5.0
    model = torch.nn.ModuleList([SetCriterion(boxes)])
    with pytest.raises(ValueError, match=r"HungarianMatcher with cost_box, .*: matcher=False keeps it"):
        use_fused_loss(model, points=True)
    use_fused_loss(model, points=True, matcher=False)
    assert "forward" not in boxes.__dict__ and "loss_masks" in model[0].__dict__
    use_fused_loss(model, enabled=False)
    assert "loss_masks" not in model[0].__dict__
    focal, other = (
        HungarianMatcher(),
        type("Mine", (torch.nn.Module,), {"forward": HungarianMatcher.forward})(),
    )
    del focal.num_points  # MaskFormer's, whose cost of masks is another
    other.cost_class = other.cost_mask = other.cost_dice = other.num_points = 1
    derived = type("Mine", (HungarianMatcher,), {"forward": lambda self, outputs, targets: []})()
    for matcher in (focal, other, derived):
        model = torch.nn.ModuleList([SetCriterion(matcher)])
        with pytest.raises(ValueError, match=r"a matcher other than Mask2Former's Hungarian.*matcher=False"):
            use_fused_loss(model)
        assert "loss_masks" not in vars(use_fused_loss(model, matcher=False)[0].matcher)
    with pytest.raises(ValueError, match="points is True; expected False for a MaskFormerLoss"):
        use_fused_loss(make_model("maskformer"), points=True)
    mine = {"calculate_uncertainty": lambda self, logits: logits}
    model = make_model("mask2former")
    model.criterion.__class__ = type("Mine", (type(model.criterion),), mine)
    use_fused_loss(model)
    with pytest.raises(ValueError, match="a Mine with a calculate_uncertainty other than Mask2FormerLoss's"):
        use_fused_loss(model, points=True)


def test_half_precision_masks_and_boolean_targets():
    """The original refuses the one, and copies the other."""
    targets, (masks, _) = dictionaries(make_targets([3, 2])), leaves()
    indices = [(torch.arange(n), torch.arange(n)) for n in (3, 2)]
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float32, 1e-4)):
        runs = []
        for own in (masks[0].to(dtype), masks[0].to(dtype).double()):
            torch.manual_seed(0)
            runs.append(fused_set_criterion({"pred_masks": own}, targets, indices, num_points=50))
        for name, value in runs[1].items():
            assert runs[0][name].item() == pytest.approx(value.item(), rel=tolerance)
