"""Where weights come from and what is known about them; files that hold none, said in one line."""

import argparse
import json

import numpy as np
import pytest
import torch

from segvit import BackboneConfig, SegViT, SegViTConfig
from segvit.cli import main
from segvit.model.checkpoint import find_checkpoint, hub_name, read_checkpoint, read_state_dict
from segvit.model.pretrained import open_pretrained

pytest.importorskip("safetensors", reason="needs the extra train")
from safetensors.torch import save_file

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def make_model(**fields):
    backbone = BackboneConfig(width=32, depth=2, heads=2, patch_size=8, **fields)
    return SegViT(SegViTConfig(backbone, 3, (0, 1), image_size=(32, 32))).eval()


def state_of(model):
    return {key: value.contiguous() for key, value in model.backbone.state_dict().items()}


def notes(report):
    return " | ".join(report.changed)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.pth", b"", "an empty file"),
        ("a.pth", b"<!DOCTYPE html>\n<html><body>404</body>", "a web page"),
        ("a.safetensors", b"\n <HTML>", "a web page"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "git lfs pull"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.pth", b'{"error": "not found"}', "JSON"),
        ("a.pth", b"GGUF\x03\x00\x00\x00", "GGUF"),
        ("a.pth", b"\x1f\x8b\x08\x00", "unpack it first"),
        ("a.h5", b"\x89HDF\r\n\x1a\n", "Keras"),
        ("a.pth", b"hello world", "truncated, or of another kind"),
        ("a.safetensors", b"hello world", "not a readable safetensors file"),
    ],
)
def test_files_that_hold_no_weights(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        make_model().load_backbone(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_truncated_and_other_formats(tmp_path):
    state = state_of(make_model())
    save_file(state, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_state_dict(tmp_path / "cut.safetensors")
    (tmp_path / "renamed.pth").write_bytes(content)
    assert read_state_dict(tmp_path / "renamed.pth").keys() == state.keys()
    torch.save(state, tmp_path / "renamed.safetensors")
    assert read_state_dict(tmp_path / "renamed.safetensors").keys() == state.keys()
    np.savez(tmp_path / "jax.npz", **{"embedding/kernel": np.zeros(3)})
    with pytest.raises(ValueError, match="timm has many of them"):
        read_state_dict(tmp_path / "jax.npz")
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "script.pt")
    with pytest.raises(ValueError, match="TorchScript"):
        read_state_dict(tmp_path / "script.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(
        ValueError, match=r"run code, torch.nn.modules.linear.Linear; .* state_dict\(\) instead"
    ):
        read_state_dict(tmp_path / "module.pth")
    with pytest.raises(FileNotFoundError, match="a folder"):
        read_state_dict(tmp_path)


def test_what_training_leaves_in_a_checkpoint(tmp_path):
    """Arguments, numbers of NumPy and objects of training libraries do not hide the weights."""
    state = state_of(make_model())
    arguments = argparse.Namespace(model="vit_tiny_patch16_224", lr=1e-3, output_dir="runs")
    content = {"model": state, "args": arguments, "best": np.float64(81.2), "seed": np.int64(1)}
    torch.save(content, tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")
    assert found.state_dict.keys() == state.keys() and found.about["architecture"] == "vit_tiny_patch16_224"
    text = (
        "img_norm_cfg = dict(\n    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)"
    )
    torch.save({"state_dict": state, "meta": {"config": text}}, tmp_path / "mm.pth")
    model = make_model()
    report = model.load_backbone(tmp_path / "mm.pth")
    assert "0..255 scale: divided by 255" in notes(report) and "mean 0.485 0.456 0.406" in notes(report)
    assert model.config.mean == pytest.approx(IMAGENET["mean"], abs=1e-5)
    assert model.mean.flatten().tolist() == pytest.approx(IMAGENET["mean"], abs=1e-5)
    kept = make_model()
    report = kept.load_backbone(tmp_path / "mm.pth", statistics=False)
    assert "not taken" in notes(report) and kept.config.mean == (0.5, 0.5, 0.5)


def test_statistics_on_the_other_scale():
    with pytest.raises(ValueError, match=r"mean must be on the 0..1 scale, .* \[0.485, 0.456, 0.406\]"):
        SegViTConfig.preset("vit_tiny", 2, mean=(123.675, 116.28, 103.53))
    with pytest.raises(ValueError, match=r"std must be on the 0..1 scale"):
        SegViTConfig.preset("vit_tiny", 2, std=(58.395, 57.12, 57.375))


def test_configurations_beside_the_weights(tmp_path):
    model = make_model(mlp="quick_gelu", norm_eps=1e-5)
    state = state_of(model)
    save_file(state, tmp_path / "model.safetensors")

    def write(name, **values):
        for path in tmp_path.glob("*.json"):
            path.unlink()
        (tmp_path / name).write_text(json.dumps(values))

    write(
        "config.json", model_type="vit", hidden_act="quick_gelu", layer_norm_eps=1e-5, num_attention_heads=2
    )
    assert "norm_eps 1e-05 of the weights" in notes(make_model(mlp="quick_gelu").load_backbone(tmp_path))
    with pytest.raises(ValueError, match=r"--model '\{mlp: quick_gelu\}'"):
        make_model().load_backbone(tmp_path / "model.safetensors")
    write("config.json", model_type="vit", num_attention_heads=4)
    with pytest.raises(ValueError, match=r"with heads 4; use --model '\{heads: 4\}'"):
        make_model().load_backbone(tmp_path)
    write("config.json", model_type="vit", hidden_act="relu")
    with pytest.raises(ValueError, match="activation is 'relu'"):
        make_model().load_backbone(tmp_path)
    write("open_clip_config.json", model_cfg={"quick_gelu": True}, preprocess_cfg=IMAGENET)
    weights = open_pretrained(tmp_path)
    assert weights.known == {"mlp": "quick_gelu", "norm_eps": 1e-5, "plain": True, **IMAGENET}
    write("preprocessor_config.json", image_mean=[0.1] * 3, image_std=[0.2] * 3)
    assert open_pretrained(tmp_path).known == {"mean": (0.1,) * 3, "std": (0.2,) * 3}
    for path in tmp_path.glob("*.json"):
        path.unlink()
    save_file(state, tmp_path / "model.safetensors", {"mean": "[0.1, 0.2, 0.3]", "std": "[1, 1, 1]"})
    assert open_pretrained(tmp_path).known["mean"] == (0.1, 0.2, 0.3)
    model.save_pretrained(tmp_path / "own")
    assert open_pretrained(tmp_path / "own").known["mlp"] == "quick_gelu"


def test_architecture_by_timms_name(tmp_path):
    pytest.importorskip("timm")
    torch.save({"state_dict": state_of(make_model()), "arch": "vit_base_patch16_rpn_224"}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: not a plain ViT: it has residual post-norm blocks"):
        make_model().load_backbone(tmp_path / "a.pth")
    config = {"architecture": "vit_base_patch16_clip_quickgelu_224", "pretrained_cfg": IMAGENET}
    save_file(state_of(make_model()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    known = open_pretrained(tmp_path / "model.safetensors").known
    assert (known["mlp"], known["norm_eps"], known["mean"]) == ("quick_gelu", 1e-5, IMAGENET["mean"])


def test_timm_brings_all_of_it(monkeypatch):
    """`timm:NAME`: mean and std are its own, and a model of timm that computes otherwise is refused."""
    timm = pytest.importorskip("timm")
    create = timm.create_model
    drawn = torch.get_rng_state()

    def create_model(name, pretrained=False, **kwargs):
        model = create(name, pretrained=False, **{"img_size": 64, "depth": 2, **kwargs})
        if name == "vit_tiny_patch16_384":  # as if timm had changed it in a way that no name shows
            model.blocks[0].attn.scale = 1.0
            model.blocks[0].attn.fused_attn = False
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    model = SegViT(SegViTConfig.preset("vit_tiny", 3, image_size=64, depth=2, taps=(0, 1)))
    torch.set_rng_state(drawn)
    report = model.load_backbone("timm:vit_tiny_patch16_224")
    assert torch.equal(torch.get_rng_state(), drawn), "the training would draw other numbers"
    assert report.changed == () and model.config.mean == (0.5, 0.5, 0.5)
    report = model.load_backbone("timm:deit_tiny_patch16_224")
    assert notes(report) == "mean 0.485 0.456 0.406 and std 0.229 0.224 0.225 of the weights"
    assert model.config.std == IMAGENET["std"]
    with pytest.raises(ValueError, match="post-norm"):
        model.load_backbone("timm:vit_base_patch16_rpn_224")
    with pytest.raises(ValueError, match="other features than timm's"):
        model.load_backbone("timm:vit_tiny_patch16_384")


def test_what_does_not_fit_names_the_option():
    with pytest.raises(ValueError, match=r"they fit with --model '\{register_tokens: 4\}'"):
        make_model().load_backbone(state_of(make_model(register_tokens=4)))
    other = SegViT(
        SegViTConfig(BackboneConfig(width=64, depth=3, heads=2, patch_size=8), 3, (2,), image_size=32)
    )
    with pytest.raises(ValueError, match="a ViT of width 64 with 3 blocks: choose that preset"):
        make_model().load_backbone(state_of(other))


# One resolver


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with owner/model, a checkpoint, and owner/vit, a backbone alone; `asked` has what was fetched."""
    module = pytest.importorskip("huggingface_hub", reason="needs the extra hub")
    folder = tmp_path / "hub"
    make_model().save_pretrained(folder / "owner/model")
    (folder / "owner/vit").mkdir()
    save_file(state_of(make_model()), folder / "owner/vit/model.safetensors")
    asked = []

    def snapshot_download(repo_id, revision=None, allow_patterns=None):
        asked.append((repo_id, revision))
        if not (folder / repo_id).is_dir():
            raise OSError("404: no such repository\nmore")
        return str(folder / repo_id)

    monkeypatch.setattr(module, "snapshot_download", snapshot_download)
    return asked


def test_find_checkpoint(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    make_model().save_pretrained(run / "checkpoints/last")
    assert find_checkpoint(run) == run / "checkpoints/last"
    make_model().save_pretrained(run / "checkpoints/best")
    best = run / "checkpoints/best"
    assert find_checkpoint("run") == best.relative_to(tmp_path)
    assert find_checkpoint(best / "model.safetensors") == best == find_checkpoint(best)
    assert find_checkpoint("owner/model@v2").name == "model" and hub == [("owner/model", "v2")]
    assert hub_name("hf-hub:owner/model") == "owner/model" and hub_name("run/checkpoints") is None
    for name in ("../x", "/a/b", "a/b/c", "name", "~/x", ".a/b"):
        assert hub_name(name) is None
        with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
            find_checkpoint(name)
    torch.save({}, tmp_path / "published.pth")
    with pytest.raises(FileNotFoundError, match="segvit convert FILE FOLDER"):
        find_checkpoint("published.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint in this folder"):
        find_checkpoint(tmp_path)


def test_hub_names_in_every_command(tmp_path, hub, capsys):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (40, 24)).save(tmp_path / "a.png")
    out = str(tmp_path / "out")
    assert main(["predict", str(tmp_path / "a.png"), "--checkpoint", "owner/model", "--out", out]) == 0
    data = ["--data", "synthetic", "--workers", "0", "--no-progress", "--synthetic-validation", "1"]
    main(["evaluate", "--checkpoint", "owner/nothing", *data])
    assert (
        "owner/nothing: no such folder, and the Hub says: 404: no such repository" in capsys.readouterr().err
    )
    assert make_model().load_backbone("owner/vit").loaded == len(state_of(make_model()))
    assert {name for name, _ in hub} == {"owner/model", "owner/nothing", "owner/vit"}
    (tmp_path / "hub/owner/vit/config.json").write_text('{"model_type": "vit"}')
    assert main(["predict", str(tmp_path / "a.png"), "--checkpoint", "owner/vit", "--out", out]) == 2
    assert "a plain ViT's weights go to --backbone-weights" in capsys.readouterr().err


def test_weights_decide_what_the_options_leave_open(tmp_path):
    pytest.importorskip("lightning_fabric", reason="needs the extra train")
    from types import SimpleNamespace

    from segvit.options import TrainConfig
    from segvit.training.build import build_model

    theirs = make_model(
        mlp="quick_gelu", pre_norm=True, layer_scale=0.1, class_token=True, register_tokens=2, qkv_bias=False
    )
    save_file(state_of(theirs), tmp_path / "model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"quick_gelu": True}, "preprocess_cfg": IMAGENET})
    )
    data, said = SimpleNamespace(num_classes=3, class_names=None, palette=None), []

    def build(weights=str(tmp_path), **model):
        sizes = {"width": 32, "depth": 2, "heads": 2, "patch_size": 8, "taps": (0, 1)}
        config = TrainConfig(
            data="synthetic", out=str(tmp_path / "run"), image_size=32, backbone_weights=weights,
            preset="vit_tiny", model={**sizes, **model},
        )  # fmt: skip
        return build_model(config, data, said.append)

    model = build()
    same = ("mlp", "pre_norm", "class_token", "register_tokens", "qkv_bias")
    assert all(getattr(model.config.backbone, k) == getattr(theirs.config.backbone, k) for k in same)
    assert (model.config.backbone.norm_eps, model.config.mean) == (1e-5, IMAGENET["mean"])
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, theirs.backbone.state_dict()[key]), key
    assert "mean 0.485 0.456 0.406" in said[0]
    assert build(mean=[0.1] * 3, std=[0.2] * 3).config.mean == (0.1, 0.1, 0.1) and "not taken" in said[1]
    with pytest.raises(ValueError, match=r"mlp quick_gelu; use --model '\{mlp: quick_gelu\}'"):
        build(mlp="gelu")
    with pytest.raises(ValueError, match="choose that preset"):
        build(depth=3, taps=(0, 2))
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(ValueError, match="QuickGELU"):
        build()
    assert build(mlp="quick_gelu").config.backbone.pre_norm


@pytest.mark.parametrize(
    ("theirs", "taken"),
    [({}, False), ({"layer_scale": 0.1}, True), ({"register_tokens": 1}, True), ({"pre_norm": True}, True)],
)
def test_class_tokens_are_taken_but_for_augreg(tmp_path, theirs, taken):
    pytest.importorskip("lightning_fabric", reason="needs the extra train")
    from segvit.data.synthetic import SyntheticShapes
    from segvit.options import TrainConfig
    from segvit.training.build import build_model

    save_file(state_of(make_model(class_token=True, **theirs)), tmp_path / "a.safetensors")
    sizes = {"width": 32, "depth": 2, "heads": 2, "patch_size": 8, "taps": (0, 1), "mlp": "gelu"}

    def build(**model):
        said = []
        config = TrainConfig(
            data="x", out=str(tmp_path / "run"), image_size=32, preset="vit_tiny",
            backbone_weights=str(tmp_path / "a.safetensors"), model={**sizes, **model},
        )  # fmt: skip
        model = build_model(config, SyntheticShapes("training", 1, 32), said.append)
        return model.config.backbone.class_token, "the class token is not taken" in said[0]

    assert build() == (taken, not taken)
    assert build(class_token=False) == (False, True) and build(class_token=True) == (True, False)
