"""Start from a whole checkpoint: other classes, another image size, the same network."""

import csv
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from segvit import BackboneConfig, SegViT, SegViTConfig
from segvit.cli import main
from segvit.config import usual_taps
from segvit.data.synthetic import SyntheticShapes
from segvit.data.transforms import RandomMirror
from segvit.model.eomt import EoMT
from segvit.model.linear_head import LinearSegmenter
from segvit.options import TrainConfig
from segvit.training.build import build_model, make_augmentation, settled
from segvit.training.init_from import init_from, match_classes
from segvit.training.run_folder import Checkpoints

pytest.importorskip("safetensors", reason="needs the extra train")

NAMES = ("road", "car", "tree")


def make(kind=SegViT, seed=0, names=NAMES, shrunk=False, **fields):
    torch.manual_seed(seed)
    backbone = BackboneConfig(width=32, depth=2, heads=2, patch_size=8, shrink_at=1 if shrunk else None)
    fields = {"image_size": (32, 32), "class_names": names, "upsample": shrunk, **fields}
    return kind(SegViTConfig(backbone, 3, (0, 1), mean=(0.1, 0.2, 0.3), **fields)).eval()


def same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


@torch.no_grad()
def test_the_same_classes_give_the_same_model(tmp_path):
    for name, model in (("atm", make()), ("shrunk", make(shrunk=True))):
        model.save_pretrained(tmp_path / name)
        started, notes = init_from(
            tmp_path / name, 3, {"class_names": NAMES, "image_size": 32, "palette": None}
        )
        assert notes == ["3 of 3 classes taken over by name"] and started.config == model.config
        same(started.state_dict(), model.state_dict())
    make(LinearSegmenter).save_pretrained(tmp_path / "linear")
    started, _ = init_from(tmp_path / "linear", 3, {})
    same(started.state_dict(), make(LinearSegmenter).state_dict())


def test_classes_by_name(tmp_path):
    old = make()
    old.save_pretrained(tmp_path / "atm")
    make(LinearSegmenter).save_pretrained(tmp_path / "linear")
    names = ("person", "Tree", "road", "sky")
    torch.manual_seed(1)
    fresh = SegViT(
        SegViTConfig.from_fields(
            {**old.config.backbone.to_dict(), "num_classes": 4, "taps": (0, 1), "image_size": (32, 32)}
        )
    )
    torch.manual_seed(1)
    new, notes = init_from(tmp_path / "atm", 4, {"class_names": names})
    assert notes == ["2 of 4 classes taken over by name; fresh: person, sky"]
    assert new.config.class_names == names and new.config.mean == (0.1, 0.2, 0.3)
    for name in ("class_tokens", "class_head.weight", "class_head.bias"):
        was, now, drawn = (model.decoder.state_dict()[name] for model in (old, new, fresh))
        assert torch.equal(now[[1, 2]], was[[2, 0]]) and torch.equal(now[[0, 3]], drawn[[0, 3]]), name
    assert torch.equal(new.decoder.class_head.bias[-1], old.decoder.class_head.bias[-1]), "no object"
    same(new.backbone.state_dict(), old.backbone.state_dict())
    same(new.decoder.stages.state_dict(), old.decoder.stages.state_dict())
    linear, _ = init_from(tmp_path / "linear", 4, {"class_names": names}, "linear")
    was = make(LinearSegmenter).decoder[1].weight
    assert torch.equal(linear.decoder[1].weight[[1, 2]], was[[2, 0]])

    new, notes = init_from(tmp_path / "atm", 3, {"class_names": None})
    assert notes == ["3 of 3 classes taken over by index, as one side has no names"]
    assert new.config.class_names == NAMES
    new, notes = init_from(tmp_path / "atm", 5, {"class_names": None, "palette": None})
    assert notes == ["0 of 5 classes taken over as one side has no names; fresh: 0, 1, 2, 3, 4"]
    new, notes = init_from(tmp_path / "atm", 3, {"class_names": NAMES}, "linear")
    assert notes == ["backbone taken, not the decoder atm: linear starts afresh"]
    assert isinstance(new, LinearSegmenter)


def test_colours_stay_with_their_classes(tmp_path):
    """Where the data set has none: not with the places that these have in the checkpoint."""
    names, colours = ("left arm", "head", "right arm"), ((9, 0, 0), (0, 9, 0), (0, 0, 9))
    make(names=names, palette=colours).save_pretrained(tmp_path)
    new, _ = init_from(tmp_path, 3, {"class_names": ("head", "Left arm", "right arm"), "palette": None})
    assert new.config.palette == (colours[1], colours[0], colours[2])
    assert init_from(tmp_path, 3, {"class_names": None})[0].config.palette == colours
    for classes in (("head", "arm", "leg"), ("head", "leg")):
        new, _ = init_from(tmp_path, len(classes), {"class_names": classes})
        assert new.config.palette is None


def test_classes_that_mirroring_exchanges_are_the_models(tmp_path):
    """Also where the data set has no names, and the checkpoint's are taken."""
    make(names=("left arm", "head", "right arm")).save_pretrained(tmp_path)
    data = SimpleNamespace(num_classes=3, class_names=None, palette=None, ignore_index=255)
    config = TrainConfig(data="x", out=str(tmp_path / "run"), image_size=32, init_from=str(tmp_path))
    model = build_model(config, data)
    steps = make_augmentation(config, data, model).steps.transforms
    assert [step.exchanged for step in steps if isinstance(step, RandomMirror)] == [[(0, 2)]]


def test_names_that_differ_in_capital_letters_alone():
    assert match_classes(["Car", "car", "Bus"], ["car", "Car", "bus"], 3, 3)[0] == [1, 0, 2]


@torch.no_grad()
def test_another_image_size(tmp_path):
    make(shrunk=True).save_pretrained(tmp_path)
    new, notes = init_from(tmp_path, 3, {"class_names": NAMES, "image_size": (64, 48)})
    assert notes[0] == "position grid 4x4 resized to 8x6" and "queries resized" in notes[1]
    assert new.decoder.upsample.queries.shape == (48, 16) and new.config.image_size == (64, 48)
    with pytest.raises(ValueError, match=r"unexpected \(blocks\.1|missing"):
        init_from(tmp_path, 3, {"layer_scale": 0.1})
    with pytest.raises(ValueError, match="no field widht"):
        init_from(tmp_path, 3, {"widht": 3})


def test_what_no_option_says_is_the_checkpoints(tmp_path):
    backbone = BackboneConfig(width=32, depth=2, heads=2, patch_size=8, in_channels=1)
    old = SegViTConfig(backbone, 3, (0, 1), image_size=(96, 96), decoder="segvitv2", value_range=(0.0, 700.0))
    SegViT(old).save_pretrained(tmp_path)
    config = TrainConfig(data="x", out=str(tmp_path / "run"), init_from=str(tmp_path))
    full = settled(config)
    assert (full.image_size, full.value_range, full.model) == (
        96, [0.0, 700.0], {"in_channels": 1, "decoder": "segvitv2"},
    )  # fmt: skip
    assert settled(full) == full
    said = []
    new = build_model(config, SyntheticShapes("training", 1, 32), said.append).config
    assert (new.image_size, new.decoder, new.value_range) == ((96, 96), "segvitv2", (0.0, 700.0))
    assert "value_range (0.0, 700.0) taken over" in said[0]
    # Options win.
    said.clear()
    config = dataclasses.replace(config, image_size=32, head="linear", value_range=[0, 9])
    new = build_model(config, SyntheticShapes("training", 1, 32), said.append).config
    assert (new.image_size, new.decoder, new.value_range) == ((32, 32), "linear", (0, 9))
    assert "value_range (0, 9) in place of (0.0, 700.0)" in said[0]
    # A run that goes on asks its own checkpoint, not what it once started from.
    checkpoints = Checkpoints(config.out)
    checkpoints.folder.mkdir(parents=True)

    def write(folder):
        SegViT(old).save_pretrained(folder)
        (folder / "trainer.pt").touch()

    checkpoints.save(1, write)
    going_on = TrainConfig(data="x", out=config.out, init_from=str(tmp_path / "gone"), resume=True)
    assert settled(going_on) == dataclasses.replace(full, init_from=going_on.init_from, resume=True)


def test_an_image_size_is_the_presets_where_no_option_says_it(tmp_path):
    def of(**options):
        return settled(TrainConfig(data="x", out=str(tmp_path), **options)).image_size

    assert (of(), of(preset="vit_large"), of(preset="eva02_vitb14")) == (512, 640, 518)
    assert (of(model={"image_size": [64, 64]}), of(preset="vit_large", image_size=512)) == (64, 512)
    with pytest.raises(ValueError, match=r"image_size: the model's is \[64, 48\]"):
        of(model={"image_size": [64, 48]})
    for size in (32, [32, 32]):
        with pytest.raises(ValueError, match="image_size: got 64, and model says 32; expected one"):
            of(image_size=64, model={"image_size": size})
        assert of(image_size=32, model={"image_size": size}) == 32
    assert of(image_size=64, model={"image_size": [64, 48]}) == 64


def test_one_value_range(tmp_path):
    """Training and the model read by the same, also where the model's own says nothing."""
    config = TrainConfig(data="x", out=str(tmp_path), image_size=32, value_range=[0, 200])
    tiny = {"width": 16, "depth": 1, "heads": 1, "taps": [0], "decoder_depth": 1}
    for model in ({}, {"value_range": [0, 200]}, {"value_range": None}, {"value_range": []}):
        given = dataclasses.replace(config, model={**tiny, **model})
        assert settled(given).value_range == [0, 200]
        assert build_model(given, SyntheticShapes("training", 1, 32)).config.value_range == (0, 200)
    for given, message in (
        ([0, 100], r"value_range: got \[0, 200\], and model says \[0, 100\]"),
        (5, "got value_range 5, expected a list"),
    ):
        with pytest.raises(ValueError, match=message):
            settled(dataclasses.replace(config, model={"value_range": given}))


def test_another_decoder_has_the_usual_taps_and_a_norm_of_its_own(tmp_path):
    for decoder in ("atm", "eomt", "linear"):
        backbone = BackboneConfig(width=32, depth=12, heads=2, patch_size=8)
        model = SegViT if decoder == "atm" else EoMT if decoder == "eomt" else LinearSegmenter
        model(SegViTConfig(backbone, 3, (3, 7, 11), image_size=32, decoder=decoder)).save_pretrained(
            tmp_path / decoder
        )
    for decoder in ("eomt", "linear"):
        new, notes = init_from(tmp_path / decoder, 3, {}, "segvit")
        assert new.config.taps == (5, 7, 11) and len(new.decoder.stages) == 3
        assert notes[-1].endswith("atm starts afresh, whose taps are 5, 7, 11")
        assert init_from(tmp_path / decoder, 3, {"taps": (2, 11)}, "segvit")[0].config.taps == (2, 11)
    new, notes = init_from(tmp_path / "atm", 3, {"decoder": "eomt"})
    assert "the final norm starts afresh" in notes
    assert (new.backbone.norm.weight == 1).all() and (new.backbone.norm.bias == 0).all()
    assert (usual_taps(12), usual_taps(24), usual_taps(4)) == ((5, 7, 11), (7, 15, 23), (0, 1, 3))
    assert (usual_taps(12, 6), usual_taps(12, 0), usual_taps(1)) == ((5, 11), (11,), (0,))
    cascade, notes = init_from(tmp_path / "linear", 3, {"decoder": "segvitv2", "shrink_at": 6})
    assert cascade.config.taps == (5, 7, 11) and len(cascade.decoder.stages) == 3


def test_another_decoder_of_a_model_that_shrinks(tmp_path):
    config = make(shrunk=True).config
    backbone = dataclasses.replace(config.backbone, shrink_edges=0.25)
    SegViT(dataclasses.replace(config, backbone=backbone)).save_pretrained(tmp_path)
    new = init_from(tmp_path, 3, {"decoder": "segvitv2"})[0].config
    assert new.upsample and new.taps == (0, 1) and new.backbone.shrink_edges == 0.25
    for fields in ({}, {"upsample": False}):
        new = init_from(tmp_path, 3, {"decoder": "linear", **fields})[0].config
        assert new.taps == (1,) and new.backbone.shrink_edges == 0


def test_training(tmp_path, capsys):
    pytest.importorskip("lightning_fabric", reason="needs the extra train")
    make().save_pretrained(tmp_path / "old")
    words = [
        "train", "--data", "synthetic", "--synthetic-images", "4", "--synthetic-validation", "1",
        "--workers", "0", "--batch-size", "2", "--no-progress", "--image-size", "48", "--max-steps", "1",
        "--out", str(tmp_path / "new"), "--init-from",
    ]  # fmt: skip
    assert main([*words, str(tmp_path / "old"), "--backbone-weights", "a.pth"]) == 2
    assert "backbone_weights: not with init_from" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "old"), "--shrunk"]) == 2
    assert "shrunk" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "nowhere")]) == 2
    assert "no such checkpoint folder" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "old")]) == 0
    captured = capsys.readouterr()
    assert (
        "position grid 4x4 resized to 6x6; 0 of 12 classes taken over by name; fresh:"
        in captured.out + captured.err
    )
    model = SegViT.from_pretrained(tmp_path / "new")
    assert model.config.mean == (0.1, 0.2, 0.3) and model.config.image_size == (48, 48)
    # Going on needs neither what it started from nor its place.
    (tmp_path / "old/model.safetensors").unlink()
    more = ["--resume", "--max-steps", "2"]
    assert main([*words, str(tmp_path / "old"), *more]) == 0
    with (tmp_path / "new/metrics.csv").open() as file:
        assert {row["step"] for row in csv.DictReader(file)} >= {"2"}
