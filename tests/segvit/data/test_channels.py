"""Images of one to many channels, from files to label maps."""

import numpy as np
import pytest
import torch
from PIL import Image

from segvit import SegViT, SegViTConfig
from segvit.cli import main
from segvit.config import BackboneConfig
from segvit.data import read_image
from segvit.data.transforms import Augment, RandomIntensity

TINY = {"width": 32, "depth": 1, "heads": 1, "taps": (0,), "image_size": 32, "decoder_depth": 1}


def model(channels, **changes):
    torch.manual_seed(0)
    return SegViT(SegViTConfig.preset("vit_tiny", 3, in_channels=channels, **TINY, **changes)).eval()


def test_configuration():
    config = SegViTConfig.preset("vit_tiny", 3, in_channels=5, value_range=[0, 1000])
    assert config.mean == config.std == (0.5,) * 5
    assert SegViTConfig.from_dict(config.to_dict()) == config
    assert config.reading == {"channels": 5, "value_range": (0, 1000)}
    old = config.to_dict()
    del old["backbone"]["in_channels"], old["mean"], old["std"], old["value_range"]
    assert SegViTConfig.from_dict(old).backbone.in_channels == 3  # of a checkpoint from before
    with pytest.raises(ValueError, match="mean must have in_channels = 4 values"):
        SegViTConfig.preset("vit_tiny", 3, in_channels=4, mean=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="value_range must be 2 numbers, or 2 for each of 3 channels"):
        SegViTConfig.preset("vit_tiny", 3, value_range=(0, 1, 2))
    with pytest.raises(ValueError, match="in_channels must be at least 1"):
        BackboneConfig(in_channels=0)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_rgb_weights_for_other_channels(channels):
    """A picture that is the same in every channel gets the tokens that it has in RGB."""
    rgb, other = model(3), model(channels)
    report = other.load_backbone(rgb.backbone.state_dict())
    assert any(f"patch kernel of 3 channels spread over {channels}" in line for line in report.changed)
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        expected = rgb.backbone(grey.expand(-1, 3, -1, -1))[0]
        found = other.backbone(grey.expand(-1, channels, -1, -1))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if channels > 3:  # and colours still count
        kernel = other.backbone.patch_embed.proj.weight
        torch.testing.assert_close(kernel[:, :3] * channels / 3, rgb.backbone.patch_embed.proj.weight)


@pytest.mark.parametrize("channels", [1, 5])
def test_predict_and_engine(channels, tmp_path):
    net = model(channels)
    with torch.no_grad():
        for stage in net.decoder.stages:
            stage.layers[-1].atm.q.weight.normal_()
            stage.layers[-1].atm.k.weight.normal_()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, channels), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = net.predict(image)
    assert expected.shape == (40, 50)
    for same in (pixels, tmp_path / "a.npy"):
        assert torch.equal(net.predict(same), expected)
    engine = net.compile_for_inference((40, 50), dtype=torch.float32)
    assert (engine(image[None])[0] == expected).float().mean() > 0.99
    with pytest.raises(ValueError, match=rf"\(B, {channels}, H, W\) or \({channels}, H, W\), got"):
        net.predict(torch.zeros(3, 40, 50, dtype=torch.uint8))
    net.save_pretrained(tmp_path / "saved")
    assert torch.equal(SegViT.from_pretrained(tmp_path / "saved").predict(image), expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_augmentation(channels):
    image = torch.randint(0, 256, (channels, 40, 60), dtype=torch.uint8)
    label = torch.randint(0, 3, (40, 60))
    changed = 0
    for index in range(12):
        plain, photometric = (
            Augment(48, scale=(0.5, 1.0), mean=(0.25,) * channels, photometric=flag)(image, label, 0, index)
            for flag in (False, True)
        )
        assert photometric[0].shape == (channels, 48, 48) and photometric[0].dtype == torch.uint8
        assert torch.equal(photometric[1], plain[1])
        padding = plain[1] == 255
        assert (photometric[0][:, padding] == 64).all()
        changed += not torch.equal(plain[0], photometric[0])
    assert 3 < changed <= 12


def test_colours_stay_what_they_are():
    """Torchvision's distortion also exchanges channels, in two pictures of five."""
    sky = torch.tensor([60, 120, 230], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)
    label = torch.zeros(32, 32, dtype=torch.int64)
    changed = 0
    for index in range(40):
        image, _ = Augment(32, scale=(1.0, 1.0), class_share=1.0)(sky, label, 0, index)
        assert image.float().mean((1, 2)).argsort().tolist() == [0, 1, 2]
        changed += not torch.equal(image, sky)
    assert changed > 20


def test_intensity_leaves_channels_in_their_relation():
    torch.manual_seed(1)
    image = torch.randint(60, 120, (5, 8, 8), dtype=torch.uint8)
    image[1] = image[0]
    for _ in range(8):
        out = RandomIntensity()(image)
        assert torch.equal(out[0], out[1]) and out.dtype == torch.uint8


def write_folder(root, picture):
    rng = np.random.default_rng(0)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for name in "ab":
            label = np.zeros((40, 48), np.uint8)
            label[10:30, 12:40] = 1
            picture(root / "images" / split / name, label, rng)
            Image.fromarray(label).save(root / "annotations" / split / f"{name}.png")
    (root / "names.txt").write_text("ground\nwater\n")


def npy(path, label, rng):
    np.save(
        path.with_suffix(".npy"),
        rng.integers(0, 3000, (6, *label.shape)).astype(np.uint16) + np.uint16(500) * label,
    )


def rgba(path, label, rng):
    pixels = rng.integers(0, 256, (*label.shape, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(path.with_suffix(".png"))


def deep_grey(path, label, rng):
    pixels = rng.integers(0, 4096, label.shape).astype(np.uint16)
    Image.fromarray(pixels).save(path.with_suffix(".tif"))


@pytest.mark.parametrize(
    ("picture", "channels", "extra"),
    [(npy, 6, ["--value-range", "0", "4000"]), (rgba, 4, []), (deep_grey, 1, [])],
)
def test_from_files_to_label_maps(tmp_path, capsys, picture, channels, extra):
    root, run = tmp_path / "data", tmp_path / "run"
    write_folder(root, picture)
    fields = str({"in_channels": channels, "width": 32, "depth": 1, "heads": 1, "taps": [0]})
    common = ["--data", str(root), "--workers", "0", "--no-progress", "--accelerator", "cpu"]
    words = ["--preset", "vit_tiny", "--model", fields, "--image-size", "32", "--max-steps", "2"]
    words += ["--batch-size", "2", "--head", "linear", "--warmup-steps", "1"]
    assert main(["train", "--out", str(run), *common, *words, *extra]) == 0
    assert main(["evaluate", "--checkpoint", str(run), *common]) == 0
    folder = root / "images/validation"
    out = tmp_path / "out"
    assert main(["predict", str(folder), "--checkpoint", str(run), "--out", str(out)]) == 0
    for name in "ab":
        assert Image.open(out / f"{name}_labels.png").size == (48, 40)
        assert Image.open(out / f"{name}_overlay.png").height >= 40
    capsys.readouterr()
    # A model of another number of channels is a line, and nothing is written.
    for path in (root / "images/training").iterdir():
        path.unlink()
        Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(path.with_suffix(".bmp"))
    code = main(["train", "--out", str(tmp_path / "other"), *common, *words, *extra])
    err = capsys.readouterr().err
    if channels == 1:
        assert code == 0  # colour as grey
    else:
        assert (
            code == 2 and f"a.bmp: has 3 channels, expected {channels}" in err and len(err.splitlines()) == 1
        )


def test_the_range_of_training_is_that_of_prediction(tmp_path):
    samples = np.linspace(0, 4000, 40 * 48).reshape(40, 48).astype(np.uint16)
    Image.fromarray(samples).save(tmp_path / "a.png")
    net = model(1, value_range=(0, 8000))
    seen = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net.predict(tmp_path / "a.png")
    expected = net.preprocess(read_image(tmp_path / "a.png", 1, (0, 8000))[None])
    assert torch.equal(seen[0][..., :40, :48], expected) and expected.max() < 0.01
