"""Hugging Face's models on our operators, against the installed transformers: tiny, random, no downloads.

Almost everything is float64, where two scores do not tie: labels must be equal, losses and gradients to 1e-9.
"""

import copy
import importlib
import io
import os
import re
import runpy
import subprocess
import sys
import types

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from segvit_kernels.integrations import _masks as fused
from segvit_kernels.integrations import post_process_semantic_segmentation, use_fused_loss

pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[transformers]'")
import transformers as hf

CLASSES, QUERIES = 7, 9
SWIN = {
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
    "image_size": 64,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


def make_model(name: str, **changes):
    """A model with few parameters, float64; without dropout, so that two runs of it agree."""
    torch.manual_seed(0)
    if name == "maskformer":
        decoder = hf.DetrConfig(
            d_model=32, encoder_layers=1, decoder_layers=3, encoder_ffn_dim=16, decoder_ffn_dim=16,
            encoder_attention_heads=2, decoder_attention_heads=2, num_queries=QUERIES, dropout=0.0,
            use_timm_backbone=False, backbone_config=hf.ResNetConfig(),
        )  # fmt: skip
        config = hf.MaskFormerConfig(
            backbone_config=hf.SwinConfig(**SWIN, drop_path_rate=0.0), decoder_config=decoder,
            fpn_feature_size=32, mask_feature_size=32, num_labels=CLASSES, use_auxiliary_loss=True,
            **changes,
        )  # fmt: skip
        model = hf.MaskFormerForInstanceSegmentation(config)
    elif name == "mask2former":
        config = hf.Mask2FormerConfig(
            backbone_config=hf.SwinConfig(**SWIN, drop_path_rate=0.0), feature_size=32, mask_feature_size=32,
            hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=3, dim_feedforward=16,
            num_attention_heads=2, num_queries=QUERIES, num_labels=CLASSES, **changes,
        )  # fmt: skip
        model = hf.Mask2FormerForUniversalSegmentation(config)
    else:
        config = hf.EomtConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=8,
            mlp_ratio=2, num_upscale_blocks=1, num_blocks=2, num_queries=QUERIES, num_labels=CLASSES,
            **changes,
        )  # fmt: skip
        model = hf.EomtForUniversalSegmentation(config)
    return model.double()


OUTPUTS = {
    "maskformer": "MaskFormerForInstanceSegmentationOutput",
    "mask2former": "Mask2FormerForUniversalSegmentationOutput",
    "oneformer": "OneFormerForUniversalSegmentationOutput",
    "eomt": "EomtForUniversalSegmentationOutput",
    "videomt": "VideomtForUniversalSegmentationOutput",
}


def make_outputs(
    name: str, batch: int, grid: tuple[int, int], *, classes=CLASSES, dtype=torch.float64, **more
):
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    generator = torch.Generator().manual_seed(1)
    masks = 4 * torch.randn(batch, QUERIES, *grid, generator=generator, dtype=torch.float64)
    logits = 4 * torch.randn(batch, QUERIES, classes + 1, generator=generator, dtype=torch.float64)
    return getattr(module, OUTPUTS[name])(
        masks_queries_logits=masks.to(dtype).requires_grad_(),
        class_queries_logits=logits.to(dtype).requires_grad_(),
        **more,
    )


def make_processor(name: str):
    if name == "eomt":
        return hf.EomtImageProcessor(size={"shortest_edge": 40, "longest_edge": 56})
    if name == "videomt":
        return hf.VideomtVideoProcessor()
    kind = {"maskformer": "MaskFormer", "mask2former": "Mask2Former", "oneformer": "OneFormer"}[name]
    cls = getattr(hf, f"{kind}ImageProcessor")
    return cls.__new__(cls)  # its constructor may download names of classes; the method needs none of it


def assert_same_maps(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs)
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        assert ours_.dtype == theirs_.dtype and ours_.shape == theirs_.shape
        assert len(theirs_.unique()) > 2
        assert torch.equal(ours_, theirs_), f"{(ours_ != theirs_).sum()} of {ours_.numel()} labels differ"


# --- label maps


@pytest.mark.parametrize("name", OUTPUTS)
def test_label_maps(name):
    outputs = make_outputs(name, 3, (13, 18))
    processor = make_processor(name)
    # OneFormer's processor smooths where it shrinks, which is documented.
    sizes = [(37, 51), (13, 18), (64, 18)] if name == "oneformer" else [(37, 51), (5, 60), (400, 9)]
    more = {"size": processor.size} if name == "eomt" else {}
    theirs = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
    assert_same_maps(post_process_semantic_segmentation(outputs, sizes, **more), theirs)
    as_tensor = torch.tensor(sizes)
    assert_same_maps(post_process_semantic_segmentation(outputs, as_tensor, **more), theirs)
    direct = post_process_semantic_segmentation(outputs, sizes, direct=True)
    assert not torch.equal(direct[0], theirs[0])


@pytest.mark.parametrize("name", ["maskformer", "mask2former", "oneformer"])
def test_label_maps_without_target_sizes(name):
    outputs = make_outputs(name, 2, (11, 8))
    theirs = make_processor(name).post_process_semantic_segmentation(outputs)
    assert_same_maps(post_process_semantic_segmentation(outputs), theirs)
    assert theirs[0].shape == ((384, 384) if name == "mask2former" else (11, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["maskformer", "mask2former"])
def test_label_maps_differ_only_at_ties_in_low_precision(name, dtype):
    outputs = make_outputs(name, 1, (24, 24), dtype=dtype)
    sizes = [(70, 90)]
    ours = post_process_semantic_segmentation(outputs, sizes)[0]
    exact = copy.copy(outputs)
    for key in ("masks_queries_logits", "class_queries_logits"):
        exact[key] = outputs[key].double()
    (truth,) = make_processor(name).post_process_semantic_segmentation(
        exact, sizes, return_segmentation_scores=True
    )
    scores = truth.segmentation_scores
    lost = scores.amax(0) - scores.gather(0, ours[None])[0]
    # A score sums QUERIES products of numbers below 1.
    assert lost.max() <= QUERIES * torch.finfo(dtype).eps
    assert (lost > 0).float().mean() < (1e-3 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(
    "target_sizes",
    [[(64, 64)], [(64, 150)], [(150, 64)], [(90, 131), (200, 77)], [(40, 170), (33, 33), (31, 20)]],
    ids=str,
)
def test_eomt_windows(target_sizes):
    """Windows as the image processor cuts them: one, two that overlap, more; targets larger and smaller."""
    processor = hf.EomtImageProcessor(
        size={"shortest_edge": 64, "longest_edge": None}, do_split_image=True, do_pad=False
    )
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in target_sizes]
    inputs = processor(images, return_tensors="pt")
    windows = inputs["patch_offsets"]
    outputs = make_outputs("eomt", len(windows), (16, 16), patch_offsets=windows)
    theirs = processor.post_process_semantic_segmentation(outputs, target_sizes)
    assert_same_maps(post_process_semantic_segmentation(outputs, target_sizes), theirs)
    theirs_scored, scored = (
        method(outputs, target_sizes, return_segmentation_scores=True)
        for method in (processor.post_process_semantic_segmentation, post_process_semantic_segmentation)
    )
    assert_same_scores(scored, theirs_scored)

    direct = post_process_semantic_segmentation(outputs, target_sizes, direct=True)
    assert [m.shape for m in direct] == [m.shape for m in theirs]
    for image, size in enumerate(target_sizes):
        if min(size) == 64:  # the target is the grid of the windows: then both means are one
            assert torch.equal(direct[image], theirs[image])


def assert_same_scores(ours: list, theirs: list) -> None:
    assert_same_maps([item["segmentation"] for item in ours], [item.segmentation for item in theirs])
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        assert type(ours_) is type(theirs_)
        theirs_scores = theirs_.segmentation_scores  # float32 where windows are merged
        budget = 8 * QUERIES * torch.finfo(theirs_scores.dtype).eps
        found = ours_["segmentation_scores"].to(theirs_scores.dtype)
        torch.testing.assert_close(found, theirs_scores, rtol=budget, atol=budget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_videomt_is_computed_in_float32_as_by_its_processor(dtype):
    outputs, sizes = make_outputs("videomt", 2, (13, 18), dtype=dtype), [(37, 51), (26, 70)]
    theirs = make_processor("videomt").post_process_semantic_segmentation(
        outputs, sizes, return_segmentation_scores=True
    )
    assert_same_maps(post_process_semantic_segmentation(outputs, sizes), [own.segmentation for own in theirs])
    ours = post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
    assert_same_scores(ours, theirs)
    assert ours[0].segmentation_scores.dtype == torch.float32


@pytest.mark.parametrize("name", OUTPUTS)
def test_segmentation_scores(name):
    outputs, processor, sizes = make_outputs(name, 2, (13, 18)), make_processor(name), [(37, 51), (26, 70)]
    more = {"size": processor.size} if name == "eomt" else {}
    theirs = processor.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
    assert_same_scores(
        post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True, **more), theirs
    )
    (first, _), direct = (
        post_process_semantic_segmentation(outputs, sizes, direct=True, return_segmentation_scores=flag)
        for flag in (True, False)
    )
    assert torch.equal(first.segmentation, direct[0]) and first.segmentation_scores.shape == (CLASSES, 37, 51)
    if name in ("maskformer", "mask2former", "oneformer"):
        theirs = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
        assert_same_scores(
            post_process_semantic_segmentation(outputs, return_segmentation_scores=True), theirs
        )


@pytest.mark.parametrize("name", OUTPUTS)
def test_direct_is_the_formula_at_the_target(name):
    outputs = make_outputs(name, 2, (9, 12))
    sizes = [(40, 37), (21, 60)]
    maps = post_process_semantic_segmentation(outputs, sizes, direct=True)
    for i, size in enumerate(sizes):
        masks = F.interpolate(outputs.masks_queries_logits[i : i + 1], size, mode="bilinear").sigmoid()
        probs = outputs.class_queries_logits[i].softmax(-1)[:, :-1]
        assert torch.equal(maps[i], torch.einsum("qc,qhw->chw", probs, masks[0]).argmax(0))


@pytest.mark.parametrize("direct", [False, True])
def test_no_score_tensor(direct):
    """Outside the operator nothing is larger than one image's probability maps, nor than a label map."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return result

    outputs = make_outputs("mask2former", 2, (8, 8), classes=60)
    with Largest() as largest:
        post_process_semantic_segmentation(outputs, [(300, 300), (200, 320)], direct=direct)
    assert largest.numel == (300 * 300 if direct else QUERIES * 384 * 384)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("eomt", {}, ValueError, "target_sizes is None; expected .* for EoMT"),
        ("eomt", {"target_sizes": [(9, 9)] * 2}, ValueError, "size=processor.size"),
        ("maskformer", {"target_sizes": [(9, 9)]}, ValueError, "target_sizes has length 1; expected 2"),
        ("mask2former", {"size": {"shortest_edge": 9}}, ValueError, "it is for EoMT only"),
        ("windows", {"target_sizes": [(64, 130)]}, ValueError, r"target_sizes has \(64, 130\); .* 64 × 128"),
        ("windows", {"target_sizes": [(64, 128)] * 2}, ValueError, "target_sizes has length 2; expected 1"),
    ],
)  # fmt: skip
def test_bad_arguments(name, arguments, error, message):
    windows = {"patch_offsets": [torch.tensor([0, 0, 64]), torch.tensor([0, 64, 128])]}
    name, more = ("eomt", windows) if name == "windows" else (name, {})
    with pytest.raises(error, match=message):
        post_process_semantic_segmentation(make_outputs(name, 2, (4, 4), **more), **arguments)


def test_outputs_are_known_by_their_base_or_by_what_they_hold():
    outputs, sizes = make_outputs("mask2former", 2, (9, 12)), [(40, 37), (21, 60)]

    class Derived(type(outputs)):
        pass

    theirs = make_processor("mask2former").post_process_semantic_segmentation(outputs, sizes)
    assert_same_maps(post_process_semantic_segmentation(Derived(**outputs), sizes), theirs)

    fields = {name: getattr(outputs, name) for name in ("masks_queries_logits", "class_queries_logits")}
    direct = post_process_semantic_segmentation(types.SimpleNamespace(**fields), sizes, direct=True)
    assert_same_maps(direct, post_process_semantic_segmentation(outputs, sizes, direct=True))
    # Without `direct` nothing says to which size its masks are resized first.
    message = "outputs is a SimpleNamespace; expected one of MaskFormerFor.*, or with direct=True anything"
    for given, direct in (fields, False), ({"masks_queries_logits": torch.zeros(1, 1, 1, 1)}, True):
        with pytest.raises(TypeError, match=message):
            post_process_semantic_segmentation(types.SimpleNamespace(**given), sizes, direct=direct)


# --- losses


def make_targets(counts, size=(50, 61), sizes=None):
    """Blobs, float64 0 and 1 as the image processors give them; ``counts[i]`` of them in image i."""
    generator = torch.Generator().manual_seed(2)
    masks, labels = [], []
    for count, (height, width) in zip(counts, sizes or [size] * len(counts), strict=True):
        noise = torch.randn(count, 1, 4, 5, generator=generator, dtype=torch.float64)
        blobs = F.interpolate(noise, (height, width), mode="bicubic")[:, 0] > 0.3
        masks.append(blobs.double())
        labels.append(torch.randint(CLASSES, (count,), generator=generator))
    return {"mask_labels": masks, "class_labels": labels}


def step(model, targets, batch):
    """Losses by name and gradients by parameter of one training step."""
    pixels = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model.train().zero_grad()
    recorded = {}
    original = model.get_loss_dict

    def get_loss_dict(*args, **kwargs):
        losses = original(*args, **kwargs)
        recorded.update({f"{key} {len(recorded)}": value.detach().clone() for key, value in losses.items()})
        return losses

    model.get_loss_dict = get_loss_dict
    torch.set_default_dtype(torch.float64)  # of the original's random points
    try:
        # MaskFormer with auxiliary losses needs the hidden states asked for.
        more = {"output_hidden_states": True} if hasattr(model, "get_logits") else {}
        loss = model(pixel_values=pixels, **targets, **more).loss
    finally:
        del model.get_loss_dict
        torch.set_default_dtype(torch.float32)
    loss.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return recorded, gradients


def assert_same_step(ours, theirs, rtol=1e-9):
    for a, b in zip(ours, theirs, strict=True):
        assert list(a) == list(b)
        scale = max(value.abs().max().item() for value in b.values())
        for name in b:
            torch.testing.assert_close(
                a[name], b[name], rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}"
            )


TARGETS = {
    "two images": make_targets([3, 5]),
    "other sizes": make_targets([2, 4], sizes=[(50, 61), (64, 40)]),
    "an empty image": make_targets([0, 3]),
    "more targets than queries": make_targets([QUERIES + 3, 2]),
    "no target": make_targets([0, 0]),
}


@pytest.mark.parametrize("case", TARGETS)
def test_maskformer_step_is_the_original(case):
    model = make_model("maskformer")
    theirs = step(model, TARGETS[case], 2)
    assert use_fused_loss(model) is model
    ours = step(model, TARGETS[case], 2)
    assert len(ours[0]) == 12  # three losses of the last and of three auxiliary outputs
    assert_same_step(ours, theirs)


@pytest.fixture
def every_pixel(monkeypatch):
    """transformers' own point-sampled losses, with the centres of all pixels in place of random points."""

    def patch(module, criterion, size):
        height, width = size
        y, x = torch.meshgrid(
            (torch.arange(height, dtype=torch.float64) + 0.5) / height,
            (torch.arange(width, dtype=torch.float64) + 0.5) / width,
            indexing="ij",
        )
        centres = torch.stack([x, y], -1).reshape(1, -1, 2)
        sample, rand = module.sample_point, torch.rand
        # Bilinear interpolation continues the edge; the samples beyond it are zeros.
        monkeypatch.setattr(module, "sample_point", lambda *a, **k: sample(*a, **k, padding_mode="border"))
        points = criterion.num_points
        monkeypatch.setattr(torch, "rand", lambda *a, **k: centres if a == (1, points, 2) else rand(*a, **k))
        monkeypatch.setattr(
            criterion,
            "sample_points_using_uncertainty",
            lambda logits, *_: centres.expand(len(logits), -1, -1),
        )

    return patch


@pytest.mark.parametrize("case", ["two images", "an empty image", "more targets than queries"])
def test_mask2former_step_is_the_original_at_every_pixel(case, every_pixel):
    model = make_model("mask2former")
    module = importlib.import_module("transformers.models.mask2former.modeling_mask2former")
    every_pixel(module, model.criterion, (50, 61))
    theirs = step(model, TARGETS[case], 2)
    ours = step(use_fused_loss(model), TARGETS[case], 2)
    assert len(ours[0]) == 9
    assert_same_step(ours, theirs)


def criterion_of(name: str):
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    if name == "eomt":
        return module, make_model("eomt").criterion
    if name == "videomt":
        config = hf.VideomtConfig(num_labels=CLASSES, train_num_points=77)
        return module, module.VideomtLoss(config, {}).double()
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0, "loss_contrastive": 0.5}
    matcher = module.OneFormerHungarianMatcher(2.0, 5.0, 5.0, num_points=77)
    return module, module.OneFormerLoss(CLASSES, matcher, weights, 0.1, 77, 3.0, 0.75, 0.07).double()


@pytest.mark.parametrize("name", ["eomt", "oneformer", "videomt"])
def test_criterion_is_the_original_at_every_pixel(name, every_pixel):
    module, criterion = criterion_of(name)
    every_pixel(module, criterion, (50, 61))
    targets = TARGETS["two images"]
    leaves = [
        torch.randn(3, 2, QUERIES, 13, 16, dtype=torch.float64).requires_grad_(),
        torch.randn(3, 2, QUERIES, CLASSES + 1, dtype=torch.float64).requires_grad_(),
        torch.randn(2, QUERIES, 6, dtype=torch.float64).requires_grad_(),
    ]

    def run():
        masks, classes, tokens = leaves
        auxiliary = [
            {"masks_queries_logits": m, "class_queries_logits": c}
            for m, c in zip(masks[1:], classes[1:], strict=True)
        ]
        more = {"contrastive_queries_logits": tokens, "text_queries": tokens.float().roll(1, 0)}
        losses = criterion(
            masks_queries_logits=masks[0],
            class_queries_logits=classes[0],
            auxiliary_predictions=auxiliary,
            **targets,
            **(more if name == "oneformer" else {}),  # which it computes unless told not to
        )
        gradients = torch.autograd.grad(
            sum(v.sum() for v in losses.values()), leaves, allow_unused=name != "oneformer"
        )
        return {k: v.detach() for k, v in losses.items()}, dict(
            enumerate(g for g in gradients if g is not None)
        )

    theirs = run()
    use_fused_loss(torch.nn.ModuleList([criterion]))
    ours = run()
    assert len(ours[0]) == (10 if name == "oneformer" else 9)
    ours = ({key: ours[0][key] for key in theirs[0]}, ours[1])
    assert_same_step(ours, theirs)


def test_oneformers_arguments_stay_in_their_places():
    _, criterion = criterion_of("oneformer")
    masks, classes = torch.randn(2, QUERIES, 5, 6), torch.randn(2, QUERIES, CLASSES + 1)
    tokens, targets = torch.randn(2, QUERIES, 6), TARGETS["two images"]
    labels = [m.float() for m in targets["mask_labels"]]
    given = masks, classes, tokens, labels, targets["class_labels"], tokens.roll(1, 0)
    theirs = criterion.float()(*given)
    use_fused_loss(torch.nn.ModuleList([criterion]), points=True)
    ours = criterion(*given)
    assert set(ours) == set(theirs) and torch.equal(ours["loss_contrastive"], theirs["loss_contrastive"])
    assert "loss_contrastive" not in criterion(*given, None, False)


def test_the_sampled_loss_estimates_this_one():
    model = make_model("mask2former", train_num_points=40_000, importance_sample_ratio=0.0)
    theirs, _ = step(model, TARGETS["two images"], 2)
    ours, _ = step(use_fused_loss(model), TARGETS["two images"], 2)
    for name in theirs:
        assert ours[name].item() == pytest.approx(theirs[name].item(), rel=0.02), name


class Weighed(torch.nn.Module):
    """Stands for another library's criterion."""

    matcher = loss_masks = None


def test_a_derived_criterion_keeps_what_it_overrides():
    module = importlib.import_module("transformers.models.mask2former.modeling_mask2former")

    class Doubled(module.Mask2FormerLoss):
        def loss_labels(self, *args):
            return {name: 2 * value for name, value in super().loss_labels(*args).items()}

    model = use_fused_loss(make_model("mask2former"))
    plain, _ = step(model, TARGETS["two images"], 2)
    model.criterion.__class__ = Doubled
    use_fused_loss(model)
    doubled, _ = step(model, TARGETS["two images"], 2)
    for name, value in plain.items():
        torch.testing.assert_close(doubled[name], 2 * value if "cross_entropy" in name else value)


@pytest.mark.parametrize("method", ["loss_masks", "forward", "matcher"])
def test_a_criterion_that_overrides_what_is_replaced_is_refused(method):
    model = make_model("mask2former")
    part = model.criterion.matcher if method == "matcher" else model.criterion
    method = "forward" if method == "matcher" else method
    part.__class__ = type("Mine", (type(part),), {method: lambda self, *args: None})
    message = f"model holds a Mine with a {method} other than {type(part).__base__.__name__}'s"
    with pytest.raises(ValueError, match=message):
        use_fused_loss(model)
    assert "forward" not in model.criterion.__dict__
    if part is not model.criterion:
        use_fused_loss(model, matcher=False)
        assert "forward" in model.criterion.__dict__ and "forward" not in part.__dict__


@pytest.mark.parametrize("part", ["criterion", "matcher"])
def test_a_forward_of_the_object_is_not_replaced(part):
    model = make_model("mask2former")
    module = model.criterion if part == "criterion" else model.criterion.matcher
    module.forward = hook = lambda *args, **options: None
    with pytest.raises(
        ValueError, match=f"a {type(module).__name__} with a forward of its own on the object"
    ):
        use_fused_loss(model)
    assert module.forward is hook and (module is model.criterion or "forward" not in vars(model.criterion))
    del module.forward
    use_fused_loss(model)
    module.forward = hook  # around ours: the original cannot be given back
    if part == "criterion":
        with pytest.raises(ValueError, match="with a forward of its own on the object"):
            use_fused_loss(model, enabled=False)


def test_the_original_comes_back_beside_a_matcher_of_ones_own():
    model = make_model("mask2former")
    matcher = model.criterion.matcher
    matcher.__class__ = type("Mine", (type(matcher),), {"forward": lambda self, *args: None})
    use_fused_loss(model, matcher=False, points=True)
    use_fused_loss(model, points=True, enabled=False)
    assert "forward" not in model.criterion.__dict__


def test_criteria_that_are_not_known_are_refused():
    model = torch.nn.ModuleList([make_model("mask2former"), Weighed()])
    with pytest.raises(
        ValueError, match="model holds a Weighed, a criterion that is not known; expected one"
    ):
        use_fused_loss(model)
    assert "forward" not in model[0].criterion.__dict__
    with pytest.raises(ValueError, match="no criterion to replace; expected one of MaskFormerLoss"):
        use_fused_loss(torch.nn.Linear(2, 2))
    model[0].criterion.matcher = torch.nn.Identity()
    with pytest.raises(
        ValueError, match="model holds a Identity, a matcher that is not known; matcher=False"
    ):
        use_fused_loss(model[0])


def test_eomt_trains():
    """The whole model, in float32: its attention refuses float64 masks."""
    model = make_model("eomt").float()
    targets = TARGETS["two images"]
    pixels = torch.randn(2, 3, 64, 64)
    use_fused_loss(model)
    targets = targets | {"mask_labels": [m.bool() for m in targets["mask_labels"]]}
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        loss = model(pixel_values=pixels, **targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_one_call_per_step_and_only_this_model(monkeypatch):
    calls = []
    real = fused.mask_loss
    monkeypatch.setattr(fused, "mask_loss", lambda *a, **k: calls.append(len(a[0])) or real(*a, **k))
    model, other = make_model("mask2former"), make_model("mask2former")
    keys = list(model.state_dict())
    use_fused_loss(use_fused_loss(model))
    assert list(model.state_dict()) == keys
    step(other, TARGETS["two images"], 2)
    assert calls == []
    step(model, TARGETS["two images"], 2)
    assert calls == [3]
    use_fused_loss(model, enabled=False)
    assert "forward" not in model.criterion.__dict__ and "forward" not in model.criterion.matcher.__dict__
    step(model, TARGETS["two images"], 2)
    assert calls == [3]


def test_the_original_matcher_can_stay(monkeypatch):
    monkeypatch.setattr(fused, "mask_matching_cost", None)
    model = use_fused_loss(make_model("mask2former", train_num_points=64), matcher=False)
    losses, _ = step(model, TARGETS["two images"], 2)
    assert all(torch.isfinite(v) for v in losses.values())


def test_copies_compute_their_own_loss():
    model = use_fused_loss(make_model("maskformer"))
    expected = step(model, TARGETS["two images"], 2)
    twin = copy.deepcopy(model)
    assert_same_step(step(twin, TARGETS["two images"], 2), expected, rtol=1e-12)
    stream = io.BytesIO()
    torch.save(model.criterion, stream)
    stream.seek(0)
    for criterion in (twin.criterion, torch.load(stream, weights_only=False)):
        assert criterion is not model.criterion
        assert (
            criterion.forward.args[0] is criterion and criterion.matcher.forward.args[0] is criterion.matcher
        )


# --- the package


def test_the_example_runs(capsys):
    runpy.run_path(str(ROOT / "examples" / "mask2former.py"), run_name="__main__")
    printed = capsys.readouterr().out
    first, *_, last = map(float, re.findall(r"loss +([\d.]+)", printed))
    assert last < first / 2
    assert float(re.search(r"([\d.]+) % equal", printed)[1]) > 99.9


def test_a_missing_package_names_the_extra(monkeypatch):
    model = make_model("eomt")
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(
        ImportError, match=r"^scipy.optimize is not installed; .*segvit-kernels\[transformers\]'$"
    ):
        use_fused_loss(model)


def test_importing_the_integrations_imports_no_transformers():
    code = "import sys, segvit_kernels.integrations\nassert not {'transformers', 'scipy'} & {*sys.modules}"
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
