"""`segvit predict` from files to files, and its refusals."""

import numpy as np
import pytest
import torch
from PIL import Image

from segvit.config import BackboneConfig, SegViTConfig
from segvit.linear_head import LinearSegmenter
from segvit.model import SegViT
from segvit.options import PredictConfig
from segvit.predict import class_names, find_classes, find_images, label_picture, run, similarity_maps

NAMES = ("road", "sky", "car", "street light", "tree")


def tiny_model(**changes) -> SegViT:
    torch.manual_seed(0)
    backbone = BackboneConfig(width=32, depth=2, heads=2, patch_size=8)
    values = {"num_classes": 5, "taps": (0, 1), "decoder_dim": 16, "decoder_heads": 2, "decoder_depth": 1}
    model = SegViT(SegViTConfig(backbone, **{**values, "image_size": 32, "class_names": NAMES, **changes}))
    model.eval()
    with (
        torch.no_grad()
    ):  # every token sure of its own class, masks that differ: label maps of several classes
        for parameter in model.backbone.blocks.parameters():
            parameter.normal_(std=0.3)
        for stage in model.decoder.stages:
            stage.layers[-1].atm.q.weight.normal_()
            stage.layers[-1].atm.k.weight.normal_()
        tokens = model.decoder(model.backbone(torch.randn(1, 3, 32, 32)), (4, 4))[-1].tokens[0]
        model.decoder.class_head.weight.zero_()[:-1] = 8 * torch.linalg.pinv(tokens).T
    return model


@pytest.fixture(scope="module")
def model() -> SegViT:
    return tiny_model()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Three pictures of different sizes and formats; two share a stem."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (height, width) in {"a.png": (40, 61), "b.png": (33, 24), "b.jpg": (17, 50)}.items():
        pixels = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(folder / name)
    return folder


def outputs(out) -> set[str]:
    return {path.name for path in out.iterdir()} if out.exists() else set()


def test_predict_writes_what_the_model_says(model, checkpoint, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    options = PredictConfig(
        images=[str(pictures)], checkpoint=str(checkpoint), out=str(out), maps=["car", "1"], accelerator="cpu"
    )
    assert run(options) == 0
    # In the folder's order b.jpg comes before b.png: the second gets a number.
    sources = {"a": "a.png", "b": "b.jpg", "b_2": "b.png"}
    kinds = ("labels", "overlay", "maps")
    assert outputs(out) == {f"{stem}_{kind}.png" for stem in sources for kind in kinds}
    several = False
    for stem, source in sources.items():
        with Image.open(pictures / source) as picture:
            size, expected = picture.size, model.predict(picture.convert("RGB")).numpy()
        with Image.open(out / f"{stem}_labels.png") as labels:
            assert labels.mode == "L" and labels.size == size
            np.testing.assert_array_equal(np.asarray(labels), expected)
        with Image.open(out / f"{stem}_overlay.png") as overlay:
            assert overlay.width > size[0] and overlay.height >= size[1]
        several |= len(np.unique(expected)) > 1
    assert several, "the model says one class everywhere: the comparison shows nothing"
    printed = capsys.readouterr().out
    assert all(str(pictures / source) in printed for source in sources.values())


def test_predict_without_maps_and_again_over_its_own_output(checkpoint, pictures, tmp_path):
    out = tmp_path / "out"
    options = PredictConfig(
        images=[str(pictures / "a.png")] * 2, checkpoint=str(checkpoint), out=str(out), accelerator="cpu"
    )
    for _ in range(2):
        run(options)
        assert outputs(out) == {"a_labels.png", "a_overlay.png"}


def test_similarity_maps_sum_to_the_masks(model):
    image = torch.randint(256, (3, 30, 45), dtype=torch.uint8)
    padded = torch.nn.functional.pad(model.preprocess(image[None]), (0, 3, 0, 2))
    with torch.no_grad():
        stages, masks = similarity_maps(model, image, [4, 2])
        expected = torch.nn.functional.interpolate(model(padded).mask_logits, scale_factor=8, mode="bilinear")
    assert [maps.shape for maps in stages] == [(2, 30, 45)] * 2
    np.testing.assert_allclose(masks, expected[0, [4, 2], :30, :45].numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(stages[0] - stages[1]).max() > 1e-3


@pytest.mark.parametrize(("classes", "mode"), [(256, "L"), (257, "I;16")])
def test_label_pictures_have_room_for_every_class(classes, mode, tmp_path):
    labels = np.array([[0, classes - 1]])
    label_picture(labels, classes).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as picture:
        assert picture.mode == mode
        np.testing.assert_array_equal(np.asarray(picture), labels)


def test_classes_by_name_or_index():
    assert find_classes(["Sky", "4", "street light", "1"], NAMES) == [1, 4, 3]
    assert find_classes(["7"], [str(9 - i) for i in range(10)]) == [2]  # a name goes before an index
    config = tiny_model(class_names=None).config
    assert class_names(config)[3] == "class 3"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tre", r"no class 'tre'; did you mean tree\?"),
        ("zebra", r"no class 'zebra'; The 5 classes: road, sky, car, street light, tree"),
        ("5", "no class '5'"),
        ("-1", "no class '-1'"),
    ],
)
def test_unknown_classes_are_named_before_any_output(word, message, checkpoint, pictures, tmp_path):
    out = tmp_path / "out"
    options = PredictConfig(
        images=[str(pictures)], checkpoint=str(checkpoint), out=str(out), maps=[word], accelerator="cpu"
    )
    with pytest.raises(ValueError, match=message):
        run(options)
    assert not out.exists()


def refused(error, message, checkpoint, tmp_path, **changes):
    """`run` raises `error` with one line that matches, and writes nothing."""
    values = {"checkpoint": str(checkpoint), "out": str(tmp_path / "out"), "accelerator": "cpu", **changes}
    with pytest.raises(error, match=message) as caught:
        run(PredictConfig(**values))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_paths_are_named(checkpoint, pictures, tmp_path):
    good = str(pictures / "a.png")
    missing, empty = tmp_path / "none.png", tmp_path / "empty"
    empty.mkdir()
    text = tmp_path / "text.png"
    text.write_text("no picture")
    refused(FileNotFoundError, r"none\.png: no such file", checkpoint, tmp_path, images=[good, str(missing)])
    refused(FileNotFoundError, r"empty: no picture", checkpoint, tmp_path, images=[good, str(empty)])
    refused(ValueError, r"text\.png: not a picture", checkpoint, tmp_path, images=[good, str(text)])
    refused(ValueError, "images: got none", checkpoint, tmp_path, images=[])
    refused(FileNotFoundError, "nowhere: no checkpoint", tmp_path / "nowhere", tmp_path, images=[good])
    refused(ValueError, r"alpha: got 2", checkpoint, tmp_path, images=[good], alpha=2)
    refused(ValueError, "backend: got 'abacus'", checkpoint, tmp_path, images=[good], backend="abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
def test_missing_device_is_named(checkpoint, pictures, tmp_path):
    refused(
        ValueError,
        "accelerator: got 'cuda'",
        checkpoint,
        tmp_path,
        images=[str(pictures)],
        accelerator="cuda",
    )


def test_a_truncated_picture_leaves_no_output_of_its_own(checkpoint, pictures, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(pictures / "c.jpg")
    whole = (pictures / "c.jpg").read_bytes()
    (pictures / "c.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    out = tmp_path / "out"
    options = PredictConfig(
        images=[str(pictures / "a.png"), str(pictures / "c.jpg")],
        checkpoint=str(checkpoint),
        out=str(out),
        accelerator="cpu",
    )
    with pytest.raises(ValueError, match=r"c\.jpg: cannot be decoded"):
        run(options)
    assert outputs(out) == {"a_labels.png", "a_overlay.png"}


def test_output_that_cannot_be_written_is_named(checkpoint, pictures, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        options = PredictConfig(
            images=[str(pictures)], checkpoint=str(checkpoint), out=str(out), accelerator="cpu"
        )
        with pytest.raises(OSError, match="out: cannot write to folder") as caught:
            run(options)
        assert str(out) in str(caught.value)


def test_input_pictures_are_never_overwritten(checkpoint, pictures, tmp_path):
    (pictures / "a.png").rename(pictures / "a_labels.png")
    (pictures / "b.png").rename(pictures / "a.png")
    before = (pictures / "a_labels.png").read_bytes()
    options = PredictConfig(
        images=[str(pictures)], checkpoint=str(checkpoint), out=str(pictures), accelerator="cpu"
    )
    with pytest.raises(ValueError, match=r"a_labels\.png is an input picture"):
        run(options)
    assert (pictures / "a_labels.png").read_bytes() == before


def test_nothing_half_written_when_writing_fails(checkpoint, pictures, tmp_path, monkeypatch):
    def full_disk(self, path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    out = tmp_path / "out"
    options = PredictConfig(
        images=[str(pictures)], checkpoint=str(checkpoint), out=str(out), accelerator="cpu"
    )
    with pytest.raises(OSError, match="No space left"):
        run(options)
    assert outputs(out) == set()


def test_find_images_lists_each_file_once(pictures):
    found = find_images([pictures / "b.png", pictures, pictures / "." / "a.png"])
    assert [path.name for path in found] == ["b.png", "a.png", "b.jpg"]


def test_a_linear_head_predicts_but_has_no_maps(model, pictures, tmp_path):
    linear = LinearSegmenter(model.config).eval()
    linear.save_pretrained(tmp_path / "linear")
    images = [str(pictures / "a.png")]
    refused(ValueError, "linear head", tmp_path / "linear", tmp_path, images=images, maps=["car"])
    out = tmp_path / "out"
    run(PredictConfig(images=images, checkpoint=str(tmp_path / "linear"), out=str(out), accelerator="cpu"))
    with Image.open(out / "a_labels.png") as labels:
        np.testing.assert_array_equal(np.asarray(labels), linear.predict(pictures / "a.png").numpy())
