"""EoMT: exact against transformers from its own layout, its loss and annealing, and every way of using it."""

import csv
import math
import re

import pytest
import torch
from samples import assert_same_up_to_ties, pictures, tiny_model

from segvit import InferenceOptions, SegViT, SegViTConfig, SegViTOutput
from segvit.cli import main
from segvit.exporting.graph import LabelGraph, Plan
from segvit.model.eomt import EoMT, mask_probability
from segvit.model.eomt_loss import EoMTLoss
from segvit.model.heads import make_loss
from segvit_kernels.integrations import use_fused_loss

SIZES = {
    "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 64, "patch_size": 8,
    "num_queries": 7, "num_register_tokens": 2, "num_labels": 5,
}  # fmt: skip
TRANSFORMERS = {
    "Eomt": {"num_blocks": 2, "num_upscale_blocks": 2, "mlp_ratio": 2},
    "Eomt, gated": {"num_blocks": 3, "num_upscale_blocks": 1, "use_swiglu_ffn": True},
    "EomtDinov3": {"num_blocks": 2, "num_upscale_blocks": 1, "intermediate_size": 64},
}


@torch.no_grad()
def theirs(name):
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    kind = name.partition(",")[0]
    if not hasattr(transformers, f"{kind}ForUniversalSegmentation"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config = getattr(transformers, f"{kind}Config")(**SIZES, **TRANSFORMERS[name])
    model = getattr(transformers, f"{kind}ForUniversalSegmentation")(config)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        noise = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise + (parameter.ndim == 1 and "bias" not in key))
    model.query.weight.mul_(20)
    model.class_predictor.weight.mul_(10)
    return model.eval()


def converted(model, tmp_path, capsys):
    """By the command, from what transformers writes."""
    model.save_pretrained(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs/model.safetensors"), str(tmp_path / "ours")]) == 0
    assert "EoMT, 7 queries in the last" in capsys.readouterr().out
    return SegViT.from_pretrained(tmp_path / "ours")


@torch.no_grad()
@pytest.mark.parametrize("masked", [0.0, 1.0])
@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_it_is_transformers(name, masked, tmp_path, capsys):
    model = theirs(name)
    model.attn_mask_probs.fill_(masked)
    ours = converted(model, tmp_path, capsys)
    assert type(ours) is EoMT and ours.masked == (bool(masked),) * model.config.num_blocks
    images = pictures((64, 64))
    expected, output = model(ours.preprocess(images)), ours(ours.preprocess(images))
    for actual, logits in (
        (output.class_logits, expected.class_queries_logits),
        (output.mask_logits, expected.masks_queries_logits),
    ):
        assert logits.std() > 0.1 and (actual - logits).abs().max() < 1e-5 * logits.abs().max()
    transformers = pytest.importorskip("transformers")
    processor = transformers.EomtImageProcessor(size={"shortest_edge": 64, "longest_edge": 64})
    maps = processor.post_process_semantic_segmentation(expected, [(64, 64)] * 2)
    labels = torch.stack(maps).to(torch.uint8)
    assert len(labels.unique()) > 1
    assert torch.equal(ours.predict(images), labels)
    assert torch.equal(ours.compile_for_inference(64, 2)(images), labels)


def test_masks_change_what_it_gives(tmp_path, capsys):
    ours = converted(theirs("Eomt"), tmp_path, capsys)
    images = ours.preprocess(pictures((64, 64)))
    with torch.no_grad():
        masked = ours(images).mask_logits
        ours.anneal(1.0)
        assert torch.equal(ours(images).mask_logits, masked), "not before train() or eval()"
        assert (ours.eval()(images).mask_logits - masked).abs().max() > 1e-2


def test_a_backbone_of_it_and_files_that_are_none(tmp_path, capsys):
    model = theirs("EomtDinov3")
    model.save_pretrained(tmp_path / "theirs")
    fields = {"width": 48, "depth": 4, "heads": 3, "patch_size": 8, "taps": (1, 3), "mlp_ratio": 64 / 48}
    fields |= {"register_tokens": 2, "layer_scale": 1.0, "class_token": True, "final_norm": True}
    fields |= {"absolute_positions": False, "rotary": {"rescale": 2.0}, "image_size": 64}
    ours = SegViT(SegViTConfig.preset("vit_tiny", 3, **fields))
    report = ours.load_backbone(tmp_path / "theirs")
    assert torch.equal(ours.backbone.norm.weight, model.layernorm.weight) and "query.weight" in report.ignored
    config = tmp_path / "theirs/config.json"
    capsys.readouterr()
    config.write_text(config.read_text().replace('"gelu"', '"silu"'))
    assert main(["convert", str(tmp_path / "theirs/model.safetensors"), str(tmp_path / "no")]) == 2
    error = capsys.readouterr().err
    assert "its activation is" in error and error.count("\n") == 1 and not (tmp_path / "no").exists()


# The loss


def output_of(seed=0, auxiliary=1, dtype=torch.float64, queries=7):
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        (
            torch.randn(2, queries, 6, generator=generator, dtype=dtype).requires_grad_(),
            (3 * torch.randn(2, queries, 8, 8, generator=generator, dtype=dtype)).requires_grad_(),
        )
        for _ in range(1 + auxiliary)
    ]
    return SegViTOutput(*pairs[-1], pairs[:-1]), [leaf for pair in pairs for leaf in pair]


def label_maps():
    labels = torch.randint(0, 3, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    labels[0, :9] = 4
    labels[1, 20:] = 255
    return labels


def config_of(queries=7, **fields):
    return SegViTConfig.preset("vit_tiny", 5, decoder="eomt", queries=queries, **fields)


def test_the_loss_is_transformers_over_all_pixels():
    """Of every output, as its model adds them up."""
    model = use_fused_loss(theirs("Eomt")).double()
    (output, leaves), labels = output_of(), label_maps()
    loss = make_loss(config_of())(output, labels)
    classes = [own[own != 255].unique() for own in labels]
    masks = [(own == found[:, None, None]).double() for own, found in zip(labels, classes, strict=True)]
    expected = {}
    for prefix, (class_logits, mask_logits) in {"": output[:2], "aux0.": output.auxiliary[0]}.items():
        terms = model.get_loss_dict(mask_logits, class_logits, masks, classes, None)
        renamed = {"class": "loss_cross_entropy", "mask": "loss_mask", "dice": "loss_dice"}
        expected |= {prefix + ours: terms[name] for ours, name in renamed.items()}
    expected["total"] = sum(expected.values())
    assert list(loss) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(loss[name], value, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(terms["total"], leaves) for terms in (loss, expected)]
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("queries", [7, 2])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5, 1.0, 2.0]])
def test_parts_of_a_batch_add_up(weights, queries):
    """Also with fewer queries than classes."""
    (output, leaves), labels = output_of(queries=queries), label_maps()
    loss = make_loss(config_of(queries), 255, weights)
    total = loss(output, labels)["total"]
    sums, normalisers = 0.0, loss.normalisers(labels)
    for image in range(2):
        own = slice(image, image + 1)
        part = SegViTOutput(
            *(t[own] for t in output[:2]), [tuple(t[own] for t in p) for p in output.auxiliary]
        )
        sums = sums + loss(part, labels[own], normalisers)["total"]
    torch.testing.assert_close(sums, total, rtol=1e-6, atol=1e-9)
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("queries", [6, 3, 2])
def test_the_class_term_is_a_mean_of_its_queries(queries):
    """Also where an image has more classes than there are queries."""
    labels = torch.arange(6).view(1, 6, 1).expand(1, 6, 6)
    output = SegViTOutput(torch.zeros(1, queries, 7), torch.randn(1, queries, 6, 6), [])
    loss = EoMTLoss(6, queries)(output, labels)
    assert loss["class"].item() == pytest.approx(2 * math.log(7))


def test_images_without_a_class_and_refusals():
    (output, leaves), loss = output_of(), make_loss(config_of())
    terms = loss(output, torch.full((2, 9, 9), 255))
    assert terms["mask"] == terms["dice"] == 0 and terms["class"] > 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(terms["total"], leaves))
    with pytest.raises(TypeError, match=r"labels must be integers, got torch\.float32"):
        loss(output, torch.zeros(2, 9, 9))
    with pytest.raises(ValueError, match=r"labels must have shape \(2, H, W\), got \(1, 9, 9\)"):
        loss(output, torch.zeros(1, 9, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"class_logits must have shape \(2, 6, 6\), got \(2, 7, 6\)"):
        make_loss(config_of(queries=6))(output, label_maps())
    for fields, message in (
        ({"query_blocks": 13}, "query_blocks must be at most the 12 blocks, got 13"),
        ({"queries": 0}, "queries must be at least 1"),
        ({"shrink_at": 9}, "shrink_at must be before the blocks of decoder eomt's queries, 9 and on; got 9"),
        ({"shrink_at": 3, "upsample": True}, "upsample is not of decoder eomt"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            SegViTConfig.preset("vit_tiny", 5, decoder="eomt", **fields)


# The annealing


def test_the_schedule():
    """COCO's: 12 epochs, four blocks, each from its epoch to two later."""
    for block in range(4):
        start, end = (block + 1) / 6, (block + 2) / 6
        assert mask_probability(start, block, 4) == 1 and mask_probability(end, block, 4) == 0
        assert mask_probability((start + end) / 2, block, 4) == pytest.approx(0.5**0.9)
    assert mask_probability(0, 0, 1) == 1 and mask_probability(1, 2, 3) == 0


def test_what_queries_see_in_training():
    """At first their own masks, in the end everything; and only they."""
    model = tiny_model("eomt", queries=200, query_blocks=2).requires_grad_(True).train()
    logits, tokens, grid = torch.randn(3, 200, 8, 8), 200 + 1 + 16, (4, 4)
    inside = torch.nn.functional.interpolate(logits, (4, 4), mode="bilinear").flatten(2) > 0
    shares = []
    for progress in (0.0, 0.375, 1.0):  # (1/4 + 1/2) / 2
        model.anneal(progress)
        seen = model.decoder.visible(logits, tokens, grid, 0)
        assert seen.shape == (3, 1, tokens, tokens) and seen[:, :, 200:].all() and seen[..., :201].all()
        own = seen[:, 0, :200, 201:]
        assert ((own == inside) | own).all()
        shares.append((own != inside).any(-1).double().mean().item())
    assert shares[0] == 0 and shares[1] == pytest.approx(1 - 0.5**0.9, abs=0.08) and shares[2] > 0.99
    output = model(torch.randn(1, 3, 32, 32))
    assert len(output.auxiliary) == 2 and output.mask_logits.shape == (1, 200, 8, 8)
    assert model.eval()(torch.randn(1, 3, 32, 32)).auxiliary == []


# Use


@torch.no_grad()
def test_engine_windows_and_shrunk():
    for fields in ({}, {"setup": {"shrink_at": 0}, "upscale_blocks": 3}):
        model = tiny_model("eomt", queries=9, query_blocks=2, **fields)
        model.decoder.queries.mul_(3)
        model.decoder.class_head.weight.mul_(10)
        model.anneal(1.0)
        model.eval()
        images, size = pictures((37, 50)), (37, 50)
        for options in (InferenceOptions(), InferenceOptions(window=32, stride=24, flip=True)):
            labels, scores = model.predict(images, options, return_scores=True)
            assert len(labels.unique()) > 1
            for found in (
                model.compile_for_inference(size, 2, options=options)(images),
                LabelGraph(model, Plan(size, 2, options=options)).eval()(images)[0],
            ):
                assert (scores.amax(1) - scores.gather(1, found.long()[:, None])[:, 0]).max() < 1e-5
        assert torch.equal(model.fuse().predict(images), model.unfuse().predict(images))
    with pytest.raises(ValueError, match="no similarity maps"):
        model.similarity_maps(images)


TINY = (
    "{width: 32, depth: 3, heads: 2, taps: [2], patch_size: 8, decoder: eomt, queries: 16, query_blocks: 2}"
)


def test_training_converges_and_exports(tmp_path, capsys):
    pytest.importorskip("lightning_fabric")
    run = tmp_path / "run"
    words = [
        "train", "--data", "synthetic", "--synthetic-images", "4", "--synthetic-validation", "2",
        "--workers", "0", "--batch-size", "4", "--no-progress", "--image-size", "48", "--max-steps", "30",
        "--warmup-steps", "3", "--lr", "2e-3", "--log-every", "1", "--no-photometric", "--accelerator", "cpu",
        "--decoder-lr-scale", "1", "--out", str(run), "--model",
    ]  # fmt: skip
    assert main([*words, "{decoder: eomt, query_blocks: 99}"]) == 2
    assert "query_blocks must be at most" in capsys.readouterr().err
    assert main([*words, TINY]) == 0
    with (run / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert all(map(math.isfinite, losses)) and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    model = SegViT.from_pretrained(run)
    assert type(model) is EoMT and model.masked == (False, False), "annealed"
    evaluated = ["evaluate", "--checkpoint", str(run), "--data", "synthetic", "--synthetic-validation", "2"]
    assert main([*evaluated, "--workers", "0", "--accelerator", "cpu"]) == 0

    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    assert main(["export", str(run), str(tmp_path / "fixed.onnx"), "--size", "37", "50"]) == 0
    session = runtime.InferenceSession(str(tmp_path / "fixed.onnx"), providers=["CPUExecutionProvider"])
    images = pictures((37, 50), 1)
    (labels,) = session.run(None, {"pictures": images.numpy()})
    assert_same_up_to_ties(torch.from_numpy(labels), model, images)
