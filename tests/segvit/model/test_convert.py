"""Published checkpoints: converted, they give the published results; what cannot be converted is one line."""

import copy
import json
import os
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from segvit import SegViT, SegViTConfig, SegViTLoss
from segvit.cli import main
from segvit.config import BackboneConfig
from segvit.inference.passes import label_maps
from segvit.model.backbone import VisionTransformer
from segvit.model.checkpoint import rename_published_keys
from segvit.model.convert import convert, infer_config
from segvit.model.pretrained import BACKBONE_TYPE, open_pretrained
from segvit.options import InferenceOptions

pytest.importorskip("safetensors", reason="needs the extra train")

TERMS = {"class": "decode.loss_ce", "focal": "decode.loss_mask", "dice": "decode.loss_dice"}
OUTPUTS = (("", ""), ("aux0.", "_0"), ("aux1.", "_1"))
DEAD = ["backbone.cls_token", "decode_head.loss_decode.criterion.empty_weight"]


def fields_of(config):
    """What the shapes of a fixture, which has no published size, do not tell."""
    backbone, head = config["backbone"], config["decode_head"]
    return {
        "heads": backbone["num_heads"],
        "taps": backbone["out_indices"],
        "shrink_at": backbone.get("shrink_idx"),
        "decoder_heads": head["num_heads"],
        "decoder_dropout": 0.0,
    }


@pytest.fixture(scope="module", params=["atm_vit_small", "shrunk_a"])
def case(request, shared_dir, tmp_path_factory):
    """A small published model of one family, as a file, converted, and what it must give."""
    source = shared_dir / "reference/fixtures" / f"{request.param}.pt"
    if not source.is_file():
        pytest.skip(f"no {source}")
    fixture = torch.load(source, map_location="cpu", weights_only=True)
    path = tmp_path_factory.mktemp("published") / "model.pth"
    names = tuple(f"class {i}" for i in range(fixture["config"]["decode_head"]["num_classes"]))
    torch.save({"state_dict": fixture["state_dict"], "meta": {"CLASSES": names, "epoch": 3}}, path)
    fields = fields_of(fixture["config"])
    model, unused = convert(path, fields)
    size = fixture["config"]["backbone"]["img_size"]
    return SimpleNamespace(
        path=path,
        fields=fields,
        model=model,
        unused=unused,
        names=names,
        size=tuple(size),
        grid=(size[0] // 16, size[1] // 16),
        images=fixture["img"].float(),
        labels=fixture["label"].long().squeeze(1),
        expected=fixture["eval"],
        extra=fixture["eval_extra"],
        train=fixture["train"],
        edge_losses=fixture["edge_losses"],
    )


def close(actual, expected, tolerance=1e-4):
    """The error, relative to the largest value and to the norm."""
    assert actual.shape == expected.shape
    error = actual - expected.float()
    assert error.abs().max() <= tolerance * expected.abs().max()
    assert error.norm() <= tolerance * expected.norm()


# What converted models give


@torch.no_grad()
def test_intermediate_results(case):
    model, expected = case.model, case.expected
    features = model.backbone(case.images)
    for index, feature in enumerate(features):
        published = expected[f"backbone_out.{index}"]
        close(feature, published if published.ndim == 3 else published.flatten(2).transpose(1, 2))

    upsampled = []
    if model.config.upsample:
        for stage in model.decoder.upsample.stages:
            stage.register_forward_hook(lambda module, inputs, output: upsampled.append(output))
    stages = model.decoder(features, case.grid)
    assert len(stages) == 3 and len(upsampled) == sum(key.startswith("tpn_out.") for key in expected)
    for index, tokens in enumerate(upsampled):
        close(tokens, expected[f"tpn_out.{index}"])
    for index, stage in enumerate(stages):
        close(stage.tokens, expected[f"query.{index}"])
        close(stage.mask_logits.unflatten(-1, stage.grid), expected[f"stage_masks.{index}"])
        close(stage.class_logits, expected["pred_logits_all"][index])
    for index, similarity in enumerate(model.similarity_maps(case.images)):
        close(similarity, expected[f"stage_attn.{index}"])


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_predictions(case, fused):
    model = copy.deepcopy(case.model)
    output = (model.fuse() if fused else model)(case.images)
    close(output.class_logits, case.expected["pred_logits"])
    masks = F.interpolate(output.mask_logits, size=case.size, mode="bilinear", align_corners=False)
    close(masks, case.expected["pred_masks"])
    close(model.semantic_scores(output, case.size), case.expected["pred"])
    assert (model.labels(output, case.size) == case.expected["argmax"]).all()


@torch.no_grad()
def test_other_size(case):
    """Published models score at the training size whatever the image's, and resize the scores."""
    images = case.extra["other_size.img"].float()
    scores = case.model.semantic_scores(case.model(images), case.size)
    scores = F.interpolate(scores, size=images.shape[-2:], mode="bilinear", align_corners=False)
    close(scores, case.extra["other_size.final"])


@torch.no_grad()
def test_sliding_window(case):
    if "slide.img" not in case.extra:
        pytest.skip("no sliding window in this fixture")
    expected = case.extra["slide.preds"].float()
    labels = label_maps(case.model, case.extra["slide.img"].float(), InferenceOptions(window=96, stride=64))
    chosen = expected.gather(1, labels.long()[:, None])[:, 0]
    assert (expected.amax(1) - chosen).max() < 1e-4, "a pixel has a clearly better class"


def test_losses_and_gradients(case):
    model = copy.deepcopy(case.model).train()
    losses = SegViTLoss(7)(model(case.images), case.labels)
    for prefix, suffix in OUTPUTS:
        for term, name in TERMS.items():
            expected = float(case.train["losses"][name + suffix])
            assert losses[prefix + term].item() == pytest.approx(expected, rel=1e-4), prefix + term
    assert losses["total"].item() == pytest.approx(float(case.train["total"]), rel=1e-4)

    losses["total"].backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, expected in rename_published_keys(case.train["grads"]).items():
        assert (grads[name] - expected).norm() <= 1e-4 * expected.norm(), name
    norms = {name: torch.tensor([[norm]]) for name, norm in case.train["grad_norms"].items()}
    norms.pop("backbone.pos_embed")  # of the class token's position too
    norms = {name: float(norm) for name, norm in rename_published_keys(norms).items()}
    assert set(norms) | {"backbone.pos_embed"} == set(grads)
    for name, norm in norms.items():
        assert grads[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-4), name


@torch.no_grad()
@pytest.mark.parametrize("name, images", [("image1_all_ignored", [1]), ("both_all_ignored", [0, 1])])
def test_losses_without_labels(case, name, images):
    labels = case.labels.clone()
    labels[images] = 255
    losses = SegViTLoss(7)(copy.deepcopy(case.model).train()(case.images), labels)
    for prefix, suffix in OUTPUTS:
        for term, published in TERMS.items():
            expected = float(case.edge_losses[name][published + suffix])
            assert losses[prefix + term].item() == pytest.approx(expected, rel=1e-4, abs=1e-6), prefix + term


def test_planted_bugs_show(case):
    """The tolerance is tight enough: small mistakes exceed it."""

    def fails(change):
        model = copy.deepcopy(case.model)
        with torch.no_grad():
            change(model)
            output = model(case.images)
        with pytest.raises(AssertionError):
            close(output.mask_logits, case.expected["stage_masks.2"])

    def without_a_norm(model):
        model.decoder.stages[-1].layers[1].norm2 = torch.nn.Identity()

    def other_scale(model):
        model.decoder.stages[-1].layers[-1].atm.q.weight *= 1.001

    fails(without_a_norm)
    fails(other_scale)
    if not case.model.config.upsample:
        return

    def other_order(model):
        model.decoder.upsample.stages = torch.nn.ModuleList(list(model.decoder.upsample.stages)[::-1])
        forward = model.decoder.upsample.forward
        model.decoder.upsample.forward = lambda levels, *others: forward(levels[::-1], *others)

    def other_norm(model):
        for stage in model.decoder.upsample.stages:
            stage.layers[1].norm1.eps = 1e-3

    def other_downsampling(model):
        block = model.backbone.blocks[model.config.backbone.shrink_at]
        block.drop_path1.register_forward_hook(lambda module, inputs, output: 1.001 * output)

    for change in (other_order, other_norm, other_downsampling):
        fails(change)


def test_what_a_plain_vit_leaves_open_is_said(tmp_path, capsys):
    """A CLIP's file does not tell the activation; what cannot be said of it is refused."""
    torch.manual_seed(0)
    config = BackboneConfig(32, 2, 2, patch_size=8, class_token=True, pre_norm=True, final_norm=True)
    path, out = str(tmp_path / "clip.pth"), tmp_path / "out"
    torch.save(VisionTransformer(config, (32, 32), (1,)).state_dict(), path)
    for model, words in (
        ("{}", "--model '{mlp: gelu}' or '{mlp: quick_gelu}'"),
        (
            "{mlp: quick_gelu, taps: [1]}",
            f"{path}: model: got taps, but it is a backbone alone; expected heads",
        ),
        ("{mlp: quick_gelu, heads: 3}", "width 32 is not divisible by heads 3"),
    ):
        assert main(["convert", path, str(out), "--model", model]) == 2
        assert words in capsys.readouterr().err and not out.exists()
    assert main(["convert", path, str(out), "--model", "{mlp: quick_gelu, heads: 2, norm_eps: 1e-5}"]) == 0
    assert "2 heads" in capsys.readouterr().out
    found = open_pretrained(out).backbone_config()
    assert (found.heads, found.mlp, found.norm_eps) == (2, "quick_gelu", 1e-5)
    again = [str(out / "model.safetensors"), str(tmp_path / "again"), "--model"]
    assert main(["convert", *again, "{heads: 4}"]) == 2
    assert "model: got heads 4, its own is 2" in capsys.readouterr().err
    assert main(["convert", *again, "{heads: 2}"]) == 0


# What is read from a file


def test_report_and_round_trip(case, tmp_path, capsys):
    assert set(DEAD) <= set(case.unused) <= {*DEAD, "decode_head.atm.loss_decode.criterion.empty_weight"}
    assert case.model.config.class_names == case.names
    fields = {key: value for key, value in case.fields.items() if value is not None}
    text = ", ".join(f"'{key}': {value}" for key, value in fields.items())
    assert main(["convert", str(case.path), str(tmp_path / "out"), "--model", f"{{{text}}}"]) == 0
    printed = capsys.readouterr().out
    assert f"none missing; {len(case.unused)} unused" in printed and all(
        key in printed for key in case.unused
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    loaded = SegViT.from_pretrained(tmp_path / "out")
    assert loaded.config == case.model.config
    for key, value in case.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert loaded.predict(torch.zeros(3, 50, 70, dtype=torch.uint8)).shape == (50, 70)


@pytest.mark.parametrize("channels", [1, 5])
def test_mean_and_std_of_any_channels_are_printed(channels, tmp_path, capsys, monkeypatch):
    from segvit.commands import convert as command

    fields = {"depth": 1, "taps": (0,), "image_size": 32, "in_channels": channels}
    model = SegViT(SegViTConfig.preset("vit_tiny", 2, **fields))
    monkeypatch.setattr(command, "read_state_dict", lambda path: {})
    monkeypatch.setattr(command, "is_backbone", lambda weights: False)
    monkeypatch.setattr(command, "convert", lambda path, fields: (model, []))
    assert main(["convert", "x.pth", str(tmp_path / "out")]) == 0
    values = " ".join(["0.5"] * channels)
    assert f"; mean {values}, std {values}\n" in capsys.readouterr().out


@pytest.mark.parametrize("shrunk", [False, True])
def test_published_keys(shared_dir, shrunk):
    """Every key of both published families finds its place, and its shape tells the configuration."""
    name = f"checkpoint_keys_vit_l_ade20k_640{'_shrunk' if shrunk else ''}.txt"
    lines = (shared_dir / "reference" / name).read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    shapes = {
        key: tuple(int(n) for n in shape.strip("()").split(",") if n.strip()) for key, shape, *_ in rows
    }

    def renamed(**changes):
        state = {key: torch.empty(shape, device="meta") for key, shape in {**shapes, **changes}.items()}
        return rename_published_keys(state)

    expected = SegViTConfig.preset("vit_large", 150, shrunk=shrunk, resize_queries=not shrunk)
    assert infer_config(renamed()) == expected
    with torch.device("meta"):
        model = SegViT(expected)
    assert {k: v.shape for k, v in renamed().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert list(shapes.items())[1] == ("backbone.pos_embed", (1, 1601, 1024))
    other = infer_config(renamed(**{"backbone.pos_embed": (1, 901, 1024)}))
    assert other.image_size == (480, 480)


@pytest.fixture(scope="module")
def shrunk(shared_dir):
    path = shared_dir / "reference/fixtures/shrunk_a.pt"
    if not path.is_file():
        pytest.skip(f"no {path}")
    fixture = torch.load(path, map_location="cpu", weights_only=True)
    return fixture["state_dict"], fields_of(fixture["config"])


def refused(path, fields=None, error=ValueError):
    with pytest.raises(error) as info:
        convert(path, fields)
    message = str(info.value)
    assert "\n" not in message and str(path) in message
    return message


def test_keys_that_do_not_fit(shrunk, tmp_path):
    state, fields = shrunk
    path = tmp_path / "model.pth"

    torch.save(
        {**state, "auxiliary_head.conv_seg.weight": torch.zeros(2), "backbone.stages.1.x": torch.ones(1)},
        path,
    )
    assert convert(path, fields).unused[-2:] == ["auxiliary_head.conv_seg.weight", "backbone.stages.1.x"]

    without = dict(state)
    del without["decode_head.atm.class_embed.bias"], without["backbone.layers.3.ln1.weight"]
    torch.save(without, path)
    message = refused(path, fields)
    assert "2 missing (backbone.blocks.3.norm1.weight, decoder.class_head.bias)" in message

    for key in ("decode_head.atm.q.weight", "backbone.pos_embed", "backbone.patch_embed.projection.weight"):
        torch.save({name: value for name, value in state.items() if name != key}, path)
        refused(path, fields)

    torch.save({**state, "decode_head.q.weight": torch.zeros(60, 48)}, path)
    assert "1 of another shape (decoder.upsample.queries is (60, 48), expected (64, 48))" in refused(
        path, fields
    )


def test_sizes_that_shapes_do_not_tell(shrunk, tmp_path):
    state, fields = shrunk
    path = tmp_path / "model.pth"
    torch.save(state, path)
    assert "taps and shrink_at must be given" in refused(path)
    assert "shrink_at must be given" in refused(path, {"taps": [1, 5]})
    assert "index from 0 to 5, got 6" in refused(path, {**fields, "shrink_at": 6})
    assert "end with the last block, 5; got (1, 6)" in refused(path, {**fields, "taps": [1, 6]})
    assert "no field tabs" in refused(path, {**fields, "tabs": [1]})
    # One tap can only be the last block.
    alone = {key: value for key, value in state.items() if not key.startswith("decode_head.")}
    for key, value in state.items():
        if key.startswith("decode_head.atm."):
            alone[key.replace(".atm.", ".")] = value
    for part in ("input_proj_1", "proj_norm_1"):
        for kind in ("weight", "bias"):
            alone[f"decode_head.{part}.{kind}"] = state[f"decode_head.{part}.{kind}"]
    assert infer_config(rename_published_keys(alone)).taps == (5,)


def test_files_that_are_no_checkpoint(shrunk, tmp_path, capsys):
    state, _ = shrunk
    good, path = tmp_path / "good.pth", tmp_path / "bad.pth"
    torch.save({"state_dict": state}, good)

    assert "no such checkpoint file" in refused(tmp_path / "nowhere.pth", error=FileNotFoundError)
    torch.save({"conv1.weight": torch.zeros(3)}, path)
    assert "not a published SegViT checkpoint" in refused(path)
    torch.save({"state_dict": {k: v for k, v in state.items() if k.startswith("backbone")}}, path)
    assert "not a published SegViT checkpoint" in refused(path)
    content = good.read_bytes()
    for part in (content[: len(content) // 2], content[:-100], b"hello\n"):
        path.write_bytes(part)
        assert "truncated, or of another kind" in refused(path)
    path.write_bytes(b"")
    assert "an empty file" in refused(path)

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"state_dict": state, "meta": Attack()}, path)
    message = refused(path)
    assert "refused: it holds pickled objects that could run code, posix.mkdir" in message
    assert "weights_only" not in message, "no advice to run the code"
    assert not (tmp_path / "attacked").exists(), "code in the file ran"

    assert main(["convert", str(path), str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("segvit convert: error: ") and not (tmp_path / "out").exists()
    # Weights of this package are none of the published layout.
    SegViT(SegViTConfig.preset("vit_tiny", 2, depth=1, taps=(0,), image_size=32)).save_pretrained(
        tmp_path / "own"
    )
    message = refused(tmp_path / "own/model.safetensors")
    assert "not a published" in message and "it is one of this package" in message
    backbone = {key[9:]: value for key, value in state.items() if key.startswith("backbone.")}
    torch.save(backbone, path)
    assert "use it with segvit train --backbone-weights" in refused(path)


def test_a_model_of_others_is_not_overwritten(tmp_path, capsys):
    """A folder of transformers has files of the same names, perhaps the ones that are converted."""
    out = tmp_path / "theirs"
    out.mkdir()
    for name, data in (("model.safetensors", b"weights"), ("config.json", b'{"model_type": "eomt"}')):
        (out / name).write_bytes(data)
        assert main(["convert", str(out / "model.safetensors"), str(out)]) == 2
        there = out / "model.safetensors"
        assert f"out: {there} is there already and not from segvit; choose" in capsys.readouterr().err
        assert (out / name).read_bytes() == data
    for ours in (SegViTConfig.preset("vit_tiny", 2).to_dict(), {"model_type": BACKBONE_TYPE}):
        (out / "config.json").write_text(json.dumps(ours))
        assert main(["convert", str(tmp_path / "nowhere.pth"), str(out)]) == 2
        assert "nowhere.pth: no such" in capsys.readouterr().err


def test_a_training_is_not_overwritten(tmp_path, capsys):
    for name in ("config.yaml", "trainer.pt"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).touch()
        assert main(["convert", "published.pth", str(tmp_path / "run")]) == 2
        assert f"out: {tmp_path / 'run'} holds a training ({name}); choose" in capsys.readouterr().err
        (tmp_path / "run" / name).unlink()
