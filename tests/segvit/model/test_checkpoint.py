"""Weights to files and back, published key names, and one clear line for everything that does not fit."""

import hashlib
import json
import os
import sys

import pytest
import torch
from torch import nn

from segvit import BackboneConfig, SegViT, SegViTConfig
from segvit.model.checkpoint import load_state_dict, read_state_dict, rename_published_keys
from segvit.system.extras import require
from segvit.system.files import atomic_write

pytest.importorskip("safetensors", reason="needs the extra train")
from safetensors.torch import save_file


def make_model(seed=0, num_classes=3, **overrides):
    torch.manual_seed(seed)
    backbone = BackboneConfig(width=32, depth=2, heads=2, patch_size=8, **overrides)
    names = tuple(f"class {i}" for i in range(num_classes))
    return SegViT(SegViTConfig(backbone, num_classes, (0, 1), image_size=(32, 32), class_names=names)).eval()


def one_line(error):
    return "\n" not in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("name", ["m", b"\xff\xe9"], ids=["text", "no UTF-8"])
def test_round_trip(tmp_path, name):
    tmp_path = tmp_path / os.fsdecode(name)
    tmp_path.mkdir()
    model = make_model(class_token=True, layer_scale=0.1).fuse()
    folder = tmp_path / "new" / "checkpoint"
    model.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = SegViT.from_pretrained(folder)
    assert loaded.config == model.config and not loaded.training
    assert set(loaded.state_dict()) == set(model.state_dict())
    images = torch.randn(1, 3, 40, 32)
    torch.testing.assert_close(loaded(images).mask_logits, model(images).mask_logits)


def test_what_a_training_said_of_its_data_goes_along(tmp_path):
    """To another folder, and so to the Hub."""
    make_model().save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "data.json").write_text('{"labels": null}')
    SegViT.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "data.json").read_text() == '{"labels": null}'
    assert SegViT.from_pretrained(tmp_path / "b").data_record == b'{"labels": null}'


def test_checkpoint_of_another_config(tmp_path):
    make_model(num_classes=3, layer_scale=0.1).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["backbone"]["layer_scale"] = None
    config["backbone"]["class_token"] = True
    config["num_classes"], config["class_names"] = 4, None
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        SegViT.from_pretrained(tmp_path)
    assert one_line(error)
    message = str(error.value)
    assert "model.safetensors" in message
    assert "1 missing (backbone.cls_token)" in message
    assert "4 unexpected (backbone.blocks.0.ls1.gamma, " in message
    assert "3 of another shape (decoder.class_tokens is (3, 16), expected (4, 16)" in message


def test_nothing_is_loaded_when_something_does_not_fit():
    model, other = make_model(0), make_model(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = other.state_dict()
    state.pop("decoder.class_head.bias")
    with pytest.raises(ValueError, match="1 missing"):
        load_state_dict(model, state, "test")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        SegViT.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        SegViT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json") as error:
        SegViT.from_pretrained(tmp_path)
    assert one_line(error)
    (tmp_path / "config.json").write_text(json.dumps({**make_model().config.to_dict(), "decoder_width": 3}))
    with pytest.raises(ValueError, match="no field decoder_width"):
        SegViT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(make_model().config.to_dict()))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        SegViT.from_pretrained(tmp_path)


def test_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    make_model().save_pretrained(tmp_path)
    (tmp_path / "data.json").write_text("{}")
    asked = []

    def snapshot_download(repo_id, revision=None, allow_patterns=None):
        asked.append((repo_id, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    model = SegViT.from_pretrained("owner/name", revision="v1")
    assert model.config.num_classes == 3
    assert asked == [("owner/name", "v1", ["model.safetensors", "config.json", "data.json"])]

    # As the cache has it: links to files that are named by their hashes.
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ("model.safetensors", "config.json"):
        data = (tmp_path / name).read_bytes()
        sha256, git = hashlib.sha256(data), hashlib.sha1(b"blob %d\0" % len(data) + data)
        blob = blobs / (sha256 if name.endswith("safetensors") else git).hexdigest()
        (tmp_path / name).rename(blob)
        (tmp_path / name).symlink_to(blob)
    assert SegViT.from_pretrained("owner/name").config.num_classes == 3
    for name in ("model.safetensors", "config.json"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-1] + b" ")
        with pytest.raises(ValueError, match=rf"owner/name: {name} is damaged, or not the Hub's"):
            SegViT.from_pretrained("owner/name")
        (tmp_path / name).write_bytes(data)

    def refuse(*args, **kwargs):
        raise OSError("no network\nsecond line")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="and the Hub says: no network") as error:
        SegViT.from_pretrained("owner/name")
    assert one_line(error)

    class Api:
        def create_repo(self, repo_id, **kwargs):
            asked.append(repo_id)

        def upload_folder(self, repo_id, folder_path, **kwargs):
            loaded = SegViT.from_pretrained(folder_path)
            assert loaded.config == model.config and loaded.data_record == b"{}"
            return "address"

    monkeypatch.setattr(hub, "HfApi", Api)
    assert model.push_to_hub("owner/other") == "address" and asked[-1] == "owner/other"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_load_backbone(tmp_path, suffix):
    source = make_model(0, class_token=True).backbone
    state = {key: value.contiguous() for key, value in source.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    model = make_model(1, class_token=True)
    report = model.load_backbone(path)
    assert report[:2] == (len(state), ())
    assert report.changed == (
        "not told by the weights, taken: 2 heads, gelu, norm_eps 1e-06, "
        "the model's mean 0.5 0.5 0.5 and std 0.5 0.5 0.5",
    )
    assert make_model(1, class_token=True).load_backbone(state) == (len(state), (), ())
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, state[key])
    without = make_model(1)
    assert without.load_backbone(path).ignored == ("cls_token",)
    with pytest.raises(ValueError, match=rf"weights{suffix}: .*missing \(reg_token\)"):
        make_model(1, class_token=True, register_tokens=2).load_backbone(path)


def test_load_backbone_of_a_whole_model():
    source, model = make_model(0), make_model(1)
    model.load_backbone(source.state_dict())
    for a, b in zip(source.backbone.parameters(), model.backbone.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(source.decoder.class_tokens, model.decoder.class_tokens)


def test_load_backbone_from_timm(monkeypatch):
    timm = pytest.importorskip("timm")
    name, asked = "vit_tiny_patch16_224", []
    create = timm.create_model

    def create_model(name, pretrained, **kwargs):
        asked.append(pretrained)
        return create(name, pretrained=False, depth=3, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_model)
    model = SegViT(SegViTConfig.preset("vit_tiny", 3, image_size=64, depth=2, taps=(0, 1)))
    report = model.load_backbone(f"timm:{name}")
    assert asked == [True]
    assert report.loaded == len(model.backbone.state_dict())
    assert report.changed == ("position grid 14x14 resized to 4x4",)
    assert {"norm.weight", "cls_token", "blocks.2.norm1.bias"} < set(report.ignored)
    with pytest.raises(ValueError, match=r"timm:vit_nothing: timm .* has no model of this name"):
        model.load_backbone("timm:vit_nothing")

    def offline(*args, **kwargs):
        raise RuntimeError("connection refused\nmore")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match="connection refused") as error:
        model.load_backbone(f"timm:{name}")
    assert one_line(error)


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        read_state_dict(tmp_path / "nowhere.pth")
    for name in ("a.safetensors", "a.pth"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ValueError, match=name) as error:
            read_state_dict(tmp_path / name)
        assert one_line(error)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="no state dict"):
        read_state_dict(tmp_path / "empty.pth")

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save(Attack(), tmp_path / "attack.pth")
    with pytest.raises(ValueError, match=r"attack\.pth"):
        read_state_dict(tmp_path / "attack.pth")
    assert not (tmp_path / "attacked").exists(), "code in the file ran"


def test_atomic_write(tmp_path):
    path = tmp_path / "sub" / "file.txt"
    atomic_write(path, lambda temporary: temporary.write_text("one"))
    assert path.read_text() == "one"
    usual = path.stat().st_mode

    def private(temporary):
        temporary.write_text("one")
        temporary.chmod(0o600)

    atomic_write(path, private)
    assert path.stat().st_mode == usual

    def fail(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, fail)
    assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]


def test_published_keys(shared_dir):
    """Every key of a published ViT-L finds its place, with its shape."""
    lines = (shared_dir / "reference/checkpoint_keys_vit_l_ade20k_640.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    shapes = {
        key: tuple(int(n) for n in shape.strip("()").split(",") if n.strip()) for key, shape, *_ in rows
    }
    renamed = rename_published_keys({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    with torch.device("meta"):
        model = SegViT(SegViTConfig.preset("vit_large", 150))
    assert {key: value.shape for key, value in renamed.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert rename_published_keys({"something.else": torch.zeros(1)}).keys() == {"something.else"}


def test_missing_extra(monkeypatch, tmp_path):
    assert require("json", extra="train") is json
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'segvit-kernels\[train\]'") as error:
        make_model().save_pretrained(tmp_path / "checkpoint")
    assert one_line(error) and not (tmp_path / "checkpoint").exists()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"segvit-kernels\[timm\]"):
        make_model().load_backbone("timm:vit_tiny_patch16_224")


def test_loading_needs_no_optional_package():
    """The model runs on torch and numpy alone."""
    import subprocess

    code = (
        "import sys\n"
        "optional = 'safetensors', 'timm', 'huggingface_hub', 'PIL', 'torchvision'\n"
        "sys.modules.update(dict.fromkeys(optional))\n"
        "from segvit import *\n"
        "import torch\n"
        "config = SegViTConfig(BackboneConfig(width=32, depth=1, heads=1), 2, (0,), image_size=32)\n"
        "assert SegViT(config).predict(torch.zeros(3, 20, 20, dtype=torch.uint8)).shape == (20, 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_module_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"2 missing \(weight, bias\)"):
        load_state_dict(nn.Linear(2, 2), {}, "nothing")
