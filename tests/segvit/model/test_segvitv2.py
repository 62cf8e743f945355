"""SegViTv2: its decoder and loss against their formulas in float64, and every way that a model is used."""

import csv
import json
import math

import pytest
import torch
from samples import assert_same_up_to_ties, pictures, tiny_model
from torch.nn import functional as F

from segvit import InferenceOptions, SegViT, SegViTConfig, SegViTOutput
from segvit.cli import main
from segvit.exporting.graph import LabelGraph, Plan
from segvit.model.heads import make_loss
from segvit.model.linear_head import LinearSegmenter
from segvit.model.segvitv2 import SegViTv2, SegViTv2Loss
from segvit.training.init_from import init_from

OPTIONS = InferenceOptions(window=32, stride=24, scales=[0.75, 1.5], flip=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model("segvitv2", class_names=tuple("abcdef"))


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x):
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def formula(state, features, heads):
    """Class logits and mask logits of every stage, from the taps, deepest first: no self-attention."""
    tokens, masks, outputs = state["class_tokens"].expand(len(features[0]), -1, -1), 0.0, []
    for stage, feature in enumerate(reversed(features)):
        name = f"stages.{stage}"
        feature = norm(state, f"{name}.input_norm", linear(state, f"{name}.input_proj", feature))
        for layer in range(2):
            own = f"{name}.layers.{layer}"
            query, key, value = (
                linear(state, f"{own}.atm.{part}", x).unflatten(-1, (heads, -1)).transpose(1, 2)
                for part, x in (("q", tokens), ("k", feature), ("v", feature))
            )
            similarity = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
            update = (similarity.softmax(-1) @ value).transpose(1, 2).flatten(2)
            tokens = norm(state, f"{own}.norm2", tokens + linear(state, f"{own}.atm.proj", update))
            hidden = linear(state, f"{own}.linear1", tokens).clamp(min=0)
            tokens = norm(state, f"{own}.norm3", tokens + linear(state, f"{own}.linear2", hidden))
        masks = masks + similarity.mean(1)
        outputs.append((linear(state, "class_head", tokens)[..., 0], masks))
    return outputs


@torch.no_grad()
def test_the_decoder_and_the_scores_are_the_formula():
    model = tiny_model("segvitv2", decoder_dim=32, decoder_heads=4).double()
    assert type(model) is SegViTv2 and not [
        n for n in model.state_dict() if "self_attn" in n or "norm1" in n[9:16]
    ]
    images = torch.randn(2, 3, 32, 40, dtype=torch.float64)
    *auxiliary, expected = formula(model.decoder.state_dict(), model.backbone(images), 4)
    output = model(images)
    found = [*output.auxiliary, output[:2]]
    for (logits, masks), (class_logits, mask_logits) in zip([*auxiliary, expected], found, strict=True):
        torch.testing.assert_close(class_logits, logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(mask_logits.flatten(2), masks, rtol=0, atol=1e-9)
    enlarged = F.interpolate(expected[1].unflatten(-1, (4, 5)), size=(32, 40), mode="bilinear")
    scores = expected[0].sigmoid()[:, :, None, None] * enlarged.sigmoid()
    torch.testing.assert_close(model.semantic_scores(output, (32, 40)), scores, rtol=0, atol=1e-9)
    assert (
        torch.equal(model.labels(output, (32, 40)).long(), scores.argmax(1))
        and len(scores.argmax(1).unique()) > 2
    )


def output_of(pairs):
    return SegViTOutput(*pairs[-1], list(pairs[:-1]))


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 3.0]])
def test_the_loss_is_the_formula(weights):
    generator = torch.Generator().manual_seed(0)
    pairs = [
        [
            torch.randn(2, 4, *rest, generator=generator, dtype=torch.float64).requires_grad_()
            for rest in ((), (3, 5))
        ]
        for _ in range(2)
    ]
    labels = torch.randint(0, 2, (2, 9, 11), generator=generator)
    labels[1, :3] = 3
    labels[0, 5:] = 255
    loss = SegViTv2Loss(4, class_weights=weights).double()
    terms = loss(output_of(pairs), labels)
    own = torch.tensor(weights or [1.0] * 4, dtype=torch.float64)
    total = 0.0
    for logits, masks in pairs:
        entropy, weight, focal, dice, count = 0.0, 0.0, 0.0, 0.0, 0.0
        enlarged = F.interpolate(masks, size=(9, 11), mode="bilinear")
        for image in range(2):
            for label in range(4):
                target = (labels[image] == label).double()
                here = bool(target.any())
                probability, share = logits[image, label].sigmoid(), own[label] if here else 0.1
                entropy = entropy - share * (probability if here else 1 - probability).log()
                weight += share
                if here:
                    p = enlarged[image, label].sigmoid()
                    right = p * target + (1 - p) * (1 - target)
                    alpha = 0.25 * target + 0.75 * (1 - target)
                    focal = focal - own[label] * (alpha * (1 - right) ** 2 * right.log()).mean()
                    overlap = (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
                    dice, count = dice + own[label] * (1 - overlap), count + own[label]
        total = total + entropy / weight + 20 * focal / count + dice / count
    torch.testing.assert_close(terms["total"], total, rtol=1e-6, atol=1e-6)
    leaves = [leaf for pair in pairs for leaf in pair]
    for actual, wanted in zip(
        *(torch.autograd.grad(t, leaves) for t in (terms["total"], total)), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"class_logits must have shape \(2, 4\), got \(2, 4, 5\)"):
        loss(output_of([(torch.zeros(2, 4, 5), torch.zeros(2, 4, 3, 5))]), labels)


def lost(labels, scores):
    """The most that a label's score is behind the best."""
    return (scores.amax(1) - scores.gather(1, labels.long()[:, None])[:, 0]).max()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["segvitv2", "shrunk"])
def test_engine_windows_and_scores(kind):
    fields = {"decoder": "segvitv2"} if kind == "shrunk" else {}
    model, images = tiny_model(kind, **fields), pictures((37, 50))
    assert type(model) is SegViTv2 and model.mixes_classes is False
    for options in (InferenceOptions(), OPTIONS):
        labels, scores = model.predict(images, options, return_scores=True)
        assert len(labels.unique()) > 2 and torch.equal(scores.argmax(1).to(torch.uint8), labels)
        engine = model.compile_for_inference((37, 50), 2, options=options)
        assert lost(engine(images), scores) < 1e-5
        graph = LabelGraph(model, Plan((37, 50), 2, outputs="scores", options=options)).eval()
        found, best = graph(images)
        torch.testing.assert_close(best, scores.amax(1), atol=1e-5, rtol=1e-5)
        assert lost(found, scores) < 1e-5
    assert_same_up_to_ties(model.fuse().predict(images), model.unfuse(), images)


def test_onnx(model, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "any.onnx"
    assert main(["export", str(tmp_path / "model"), str(file)]) == 0
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for size in ((37, 50), (64, 40)):
        images = pictures(size, 1)
        (labels,) = session.run(None, {"pictures": images.numpy()})
        assert_same_up_to_ties(torch.from_numpy(labels), model, images)
    from segvit.exporting import open_model

    assert open_model(file).config == model.config and open_model(file).activation == "sigmoid"


def test_checkpoints_and_their_earlier_form(model, tmp_path):
    model.save_pretrained(tmp_path / "v2")
    assert json.loads((tmp_path / "v2/config.json").read_text())["decoder"] == "segvitv2"
    again = SegViT.from_pretrained(tmp_path / "v2")
    assert type(again) is SegViTv2 and again.config == model.config
    with pytest.raises(ValueError, match=r"config\.json: of a model with decoder segvitv2, expected linear"):
        LinearSegmenter.from_pretrained(tmp_path / "v2")
    names = tuple("fedcbx")
    new, notes = init_from(tmp_path / "v2", 6, {"class_names": names, "decoder": "segvitv2"})
    assert notes == ["5 of 6 classes taken over by name; fresh: x"]
    assert torch.equal(new.decoder.class_tokens[:5], model.decoder.class_tokens[1:].flip(0))
    assert init_from(tmp_path / "v2", 6, {})[0].config.decoder == "segvitv2"
    new, notes = init_from(tmp_path / "v2", 6, {"decoder": "atm"})
    assert "backbone taken, not the decoder segvitv2: atm starts afresh" in notes[-1]
    assert new.config.decoder == "atm"

    config = SegViTConfig.preset("vit_tiny", 3)
    assert "decoder" not in config.to_dict()  # as it was written before there was a choice
    for head, decoder in (("linear", "linear"), ("segvit", "atm")):
        read = SegViTConfig.from_dict({"head": head, **config.to_dict()})
        assert read.decoder == decoder and (len(read.taps) == 1) == (decoder == "linear")
    with pytest.raises(ValueError, match=r"decoder must be 'atm', .*, got 'upernet'"):
        SegViTConfig.preset("vit_tiny", 3, decoder="upernet")


TINY = "{width: 32, depth: 2, heads: 2, taps: [0, 1], patch_size: 8, decoder_dim: 32, decoder: segvitv2}"


def test_training_converges(tmp_path, capsys):
    pytest.importorskip("lightning_fabric")
    words = [
        "train", "--data", "synthetic", "--synthetic-images", "4", "--synthetic-validation", "2",
        "--workers", "0", "--batch-size", "4", "--no-progress", "--image-size", "48", "--max-steps", "30",
        "--warmup-steps", "3", "--lr", "2e-3", "--log-every", "1", "--no-photometric", "--accelerator", "cpu",
        "--out", str(tmp_path), "--model",
    ]  # fmt: skip
    assert main([*words, TINY, "--head", "linear"]) == 2
    assert "head: got linear, and model says decoder segvitv2" in capsys.readouterr().err
    assert main([*words, "{decoder: v2}"]) == 2
    assert "decoder must be" in capsys.readouterr().err
    assert main([*words, TINY]) == 0
    with (tmp_path / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert type(SegViT.from_pretrained(tmp_path)) is SegViTv2
    evaluated = [
        "evaluate",
        "--checkpoint",
        str(tmp_path),
        "--data",
        "synthetic",
        "--synthetic-validation",
        "2",
    ]
    assert main([*evaluated, "--workers", "0", "--accelerator", "cpu"]) == 0
    assert type(make_loss(SegViTConfig.preset("vit_tiny", 3, decoder="segvitv2"))) is SegViTv2Loss
