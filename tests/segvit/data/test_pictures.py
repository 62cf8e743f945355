"""The reader: every mode and depth, orientation, size, and what it refuses."""

import io
import shutil
import struct
import sys
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, features

from segvit import SegViT, SegViTConfig
from segvit.data import SegmentationFolder, read_image, read_label
from segvit.data.decoding import PICTURE_SUFFIXES
from segvit.data.find import find_pictures
from segvit.data.pictures import PictureBytes, TooLargeError, as_rgb, image_tensor, probe, to_bytes
from segvit.data.stored import stored_label

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
RAMP = np.arange(256, dtype=np.uint8)[None].repeat(3, 0)


def saved(tmp_path, picture, name, **options):
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(tmp_path / name, **options)
    return tmp_path / name


def pixels(tensor):
    return tensor.permute(1, 2, 0).numpy()


# Modes


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("1", "a.png"), ("L", "a.png"), ("LA", "a.png"), ("P", "a.png"), ("P", "a.gif"), ("PA", None),
        ("RGB", "a.bmp"), ("RGB", "a.webp"), ("RGBA", "a.png"), ("RGBa", None), ("La", None), ("RGBX", None),
        ("CMYK", "a.tif"), ("YCbCr", "a.jpg"), ("HSV", None), ("I", "a.tif"), ("I;16", "a.png"),
        ("I;16B", "a.tif"), ("F", "a.tif"),
    ],
)  # fmt: skip
def test_every_mode_is_seen_alike(tmp_path, mode, name):
    """A picture brought into a mode is read as Pillow's 8-bit RGB of it; opaque pixels, exact."""
    source = Image.fromarray(COLOURS)
    if mode in ("I", "F", "I;16", "I;16B"):
        grey = np.array(source.convert("L")).astype(np.float64)
        kind = {"I": np.int32, "F": np.float32}.get(mode, np.dtype(">u2" if mode == "I;16B" else "<u2"))
        picture = Image.fromarray(
            (grey * 257).astype(kind) if kind != np.float32 else (grey / 255).astype(kind)
        )
        expected = np.array(source.convert("L"))[..., None].repeat(3, -1)
    else:
        picture = source.convert("RGBA").convert(mode) if mode in ("RGBa",) else source
        picture = source.convert("LA").convert(mode) if mode in ("La",) else picture
        picture = source.convert("P").convert(mode) if mode in ("PA",) else picture
        picture = picture.convert(mode)
        flat = {"La": "LA", "RGBa": "RGBA"}.get(mode, mode)
        expected = np.array(picture.convert(flat).convert("RGB"))
    found = pixels(image_tensor(picture))
    np.testing.assert_array_equal(found, expected)
    if name:
        options = (
            {"lossless": True}
            if name.endswith("webp")
            else {"quality": 100, "subsampling": 0}
            if name.endswith("jpg")
            else {}
        )
        file = saved(tmp_path, picture, name, **options)
        assert probe(file) == probe(file, decode=True) == (9, 6)
        tolerance = 4 if name.endswith("jpg") else 0
        np.testing.assert_allclose(pixels(read_image(file)).astype(int), expected, atol=tolerance)


def test_lab_is_colour(tmp_path):
    source = Image.new("RGB", (2, 2), (200, 40, 90))
    lab = ImageCms.profileToProfile(
        source, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert np.abs(pixels(read_image(saved(tmp_path, lab, "a.tif"))).astype(int) - (200, 40, 90)).max() < 6


def test_transparent_parts_are_white_paper(tmp_path):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 0] = 255  # red, hidden below alpha 0 in the first column, half in the second
    rgba[..., 3] = (0, 128, 255)
    expected = [[255, 255, 255], [255, 127, 127], [255, 0, 0]]
    assert pixels(read_image(saved(tmp_path, rgba, "a.png")))[0].tolist() == expected
    grey = Image.fromarray(np.array([[0, 255], [0, 0]], np.uint8))
    file = saved(tmp_path, grey, "key.png", transparency=0)  # a grey value that means transparent
    assert pixels(read_image(file))[..., 0].tolist() == [[255, 255], [255, 255]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    file = saved(tmp_path, palette, "p.png", transparency=bytes([0, 255]))
    assert pixels(read_image(file))[0].tolist() == [[255, 255, 255], [40, 50, 60]]
    rgba[..., 3] = 0  # nothing at all to be seen: the channel is no transparency
    assert pixels(read_image(saved(tmp_path, rgba, "none.png")))[0].tolist() == [[255, 0, 0]] * 3


# Depth


@pytest.mark.parametrize(
    ("name", "values", "levels"),
    [
        ("full.png", RAMP.astype(np.uint16) * 257, 256),
        ("full.tif", RAMP.astype(np.uint16) * 257, 256),
        ("twelve.png", RAMP.astype(np.uint16) * 16 + RAMP // 17, 256),  # a 12-bit camera
        ("dim.png", RAMP.astype(np.uint16), 256),  # 8-bit values in 16-bit words stay
        ("signed.tif", RAMP.astype(np.int32) * 12 - 1024, 256),  # Hounsfield units
        ("wide.tif", RAMP.astype(np.int32) * 100_000, 256),
        ("unit.tif", (RAMP / 255).astype(np.float32), 256),
        ("bytes.tif", RAMP.astype(np.float32), 256),
        ("kelvin.tif", (273 + RAMP / 8).astype(np.float32), 256),
        ("double.npy", RAMP / 255, 256),
        ("half.npy", (RAMP / 255).astype(np.float16), 256),
        ("bool.npy", RAMP > 127, 2),
    ],
)
def test_deep_values_are_scaled_not_clipped(tmp_path, name, values, levels):
    file = tmp_path / name
    np.save(file, values) if name.endswith("npy") else saved(tmp_path, values, name)
    image = read_image(file)
    assert image.dtype == torch.uint8 and image.shape == (3, 3, 256)
    assert (image[0] == image[1]).all() and len(image.unique()) == levels
    assert image[0, 0].diff().min() >= 0 and image.min() == 0 and image.max() == 255
    assert torch.equal(read_image(file, channels=1)[0], image[0])


def test_values_that_are_not_numbers_and_constant_pictures():
    samples = np.array([[0.0, np.nan], [np.inf, 1.0]])[..., None]
    assert to_bytes(samples)[..., 0].tolist() == [[0, 0], [0, 255]]
    assert to_bytes(np.full((2, 2, 1), np.nan)).max() == 0
    assert to_bytes(np.full((2, 2, 1), 300.0)).tolist() == np.zeros((2, 2, 1)).tolist()


def test_value_range():
    samples = np.array([[[0, 0], [600, 60], [2000, 300]]], np.uint16)
    assert to_bytes(samples, (0, 1000)).tolist() == [[[0, 0], [153, 15], [255, 76]]]
    assert to_bytes(samples, (0, 1000, 0, 100)).tolist() == [[[0, 0], [153, 153], [255, 255]]]
    with pytest.raises(
        ValueError, match="value_range: got 3 numbers, expected 2, or 2 for each of 2 channels"
    ):
        to_bytes(samples, (0, 1, 2))
    with pytest.raises(ValueError, match=r"value_range: got .*each low below its high"):
        to_bytes(samples, (5, 5))


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp", "deep.png", "deep.tif", "grey.tif"])
def test_orientation(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    deep = RAMP[:, :50].astype(np.uint16) + np.array([[0], [60], [200]], np.uint16)
    stored = {"deep": deep * 200, "grey": deep.astype(np.uint8)}.get(name[:4], COLOURS)
    options = {"lossless": True} if name.endswith("webp") else {}
    file = saved(tmp_path, stored, name, exif=exif, **options)
    # Pillow maps grey TIFFs wrongly (13.0): what is seen comes from a PNG, and of JPEGs from the file itself.
    witness = file if name.endswith("jpg") else saved(tmp_path, stored, "witness.png", exif=exif)
    with Image.open(witness) as picture:
        seen = np.array(ImageOps.exif_transpose(picture))
    assert seen.shape[:2] == (stored.shape[:2] if orientation < 5 else stored.shape[1::-1])
    if seen.ndim == 2:
        seen = to_bytes(seen[..., None]).repeat(3, -1)
    found = pixels(read_image(file))
    np.testing.assert_array_equal(found, seen)
    assert probe(file, decode=True) == seen.shape[1::-1]
    with Image.open(file) as picture:
        np.testing.assert_array_equal(pixels(image_tensor(picture)), found)
        assert picture.filename == str(file)


def test_a_label_is_turned_as_its_own_file_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    label = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert read_label(saved(tmp_path, label, "a.png", exif=exif)).tolist() == np.rot90(label, -1).tolist()


@pytest.mark.filterwarnings("error")
def test_damaged_exif_does_no_harm(tmp_path):
    file = saved(tmp_path, COLOURS, "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert read_image(file).shape == (3, 6, 9)
    exif = Image.Exif()
    exif[0x0112] = 77
    assert read_image(saved(tmp_path, COLOURS, "b.jpg", exif=exif)).shape == (3, 6, 9)


def test_one_reader_for_all(tmp_path):
    """Training, `predict` of a path, of a PIL image and of an array see the same picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("images", "annotations"):
        (tmp_path / kind / "training").mkdir(parents=True)
    noise = RNG.integers(0, 256, (24, 40, 4), dtype=np.uint8)
    file = saved(tmp_path, noise, "images/training/a.png", exif=exif)
    saved(tmp_path, np.zeros((40, 24), np.uint8), "annotations/training/a.png")
    torch.manual_seed(0)
    config = SegViTConfig.preset("vit_tiny", 3, width=32, depth=1, heads=1, taps=(0,), image_size=32)
    model = SegViT(config).eval()
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    dataset = SegmentationFolder(tmp_path, names=("a", "b"), reduce_zero_label=False)
    with Image.open(file) as picture:
        for image in (file, str(file), picture, dataset[0]["image"], pixels(dataset[0]["image"])):
            assert model.predict(image).shape == (40, 24)
    assert all(torch.equal(inputs, seen[0]) for inputs in seen)


# Sizes and frames


def test_pictures_above_pillows_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # 54 pixels are a "bomb" now
    file = saved(tmp_path, COLOURS, "a.png")
    assert read_image(file).shape == (3, 6, 9) and probe(file) == (9, 6)
    assert Image.MAX_IMAGE_PIXELS == 10
    monkeypatch.setenv("SEGVIT_MAX_PIXELS", "53")
    for read in (read_image, probe, read_label):
        with pytest.raises(ValueError, match=r"a\.png: 9x6 pixels, more than 53; SEGVIT_MAX_PIXELS sets"):
            read(file)
    with pytest.raises(TooLargeError, match="image: 9x6 pixels, more than 53; SEGVIT_MAX_PIXELS sets"):
        read_image(PictureBytes(file.read_bytes()))  # in a tar
    monkeypatch.setenv("SEGVIT_MAX_PIXELS", "many")
    with pytest.raises(ValueError, match="SEGVIT_MAX_PIXELS: got 'many'"):
        read_image(file)


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.webp", "a.png"])
def test_the_first_of_several_frames(tmp_path, name):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if name.endswith("webp") else {}
    file = tmp_path / name
    frames[0].save(file, save_all=True, append_images=frames[1:], **options)
    assert pixels(read_image(file))[0, 0].tolist() == [255, 0, 0]


# Other numbers of channels


def test_channels(tmp_path):
    many = RNG.integers(0, 256, (5, 7, 6), dtype=np.uint8)
    np.save(tmp_path / "last.npy", many)
    np.save(tmp_path / "first.npy", many.transpose(2, 0, 1))
    for name in ("last", "first"):
        assert np.array_equal(pixels(read_image(tmp_path / f"{name}.npy", 6)), many)
    with pytest.raises(ValueError, match=r"last\.npy: an array of shape \(5, 7, 6\), expected \(H, W, 3\)"):
        read_image(tmp_path / "last.npy")
    for name, array in (("flat", many[:2, :, :3]), ("narrow", many[:, :2, :3].transpose(2, 0, 1))):
        np.save(tmp_path / f"{name}.npy", array)
        height, width = read_image(tmp_path / f"{name}.npy").shape[1:]
        assert probe(tmp_path / f"{name}.npy") == (width, height)
    rgba = saved(tmp_path, many[..., :4], "a.png")
    assert np.array_equal(pixels(read_image(rgba, 4)), many[..., :4])
    with pytest.raises(ValueError, match=r"a\.png: has 4 channels, expected 5"):
        read_image(rgba, 5)
    grey = Image.fromarray(COLOURS).convert("L")
    assert np.array_equal(pixels(read_image(saved(tmp_path, COLOURS, "c.png"), 1))[..., 0], np.array(grey))
    assert as_rgb(torch.zeros(6, 2, 2)).shape == as_rgb(torch.zeros(2, 2, 2)).shape == (3, 2, 2)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("planar", [False, True])
def test_multispectral_tiff(tmp_path, compression, planar):
    tifffile = pytest.importorskip("tifffile")
    if compression:
        pytest.importorskip("imagecodecs")
    many = RNG.integers(0, 1 << 12, (16, 24, 5), dtype=np.uint16)
    file = tmp_path / "a.tif"
    stored = many.transpose(2, 0, 1) if planar else many
    config = "separate" if planar else "contig"
    tifffile.imwrite(file, stored, planarconfig=config, photometric="minisblack", compression=compression)
    assert np.array_equal(pixels(read_image(file, 5)), to_bytes(many))
    assert np.array_equal(pixels(read_image(file, 5, (0, 1000))), to_bytes(many, (0, 1000)))
    assert probe(file, decode=True) == (24, 16)
    with pytest.raises(ValueError, match=r"a\.tif: has 5 channels, expected 3"):
        read_image(file)
    pages = tmp_path / "pages.tif"
    tifffile.imwrite(pages, many.transpose(2, 0, 1), photometric="minisblack")
    assert np.array_equal(pixels(read_image(pages, 5)), to_bytes(many))


def test_deep_colour_tiff_with_a_range(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    colours = RNG.integers(0, 1 << 12, (16, 24, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", colours, photometric="rgb")
    assert np.array_equal(pixels(read_image(tmp_path / "a.tif", 3, (0, 4095))), to_bytes(colours, (0, 4095)))


# More than 8 bits of several channels: Pillow hands 8 of them over


def png16(samples, path, before_pixels=b""):
    """A PNG of 16 bits (H, W, 1 to 4), which Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = samples.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    before_pixels = chunk(before_pixels[:4], before_pixels[4:]) if before_pixels else b""
    content = header + before_pixels + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


def pnm(samples, path, white, plain=False):
    """A PGM or PPM (H, W, 1 or 3) of this largest value."""
    height, width, channels = samples.shape
    number = {1: 5, 3: 6}[channels] - 3 * plain
    values = samples.astype(">u2" if white > 255 else np.uint8).tobytes()
    if plain:
        values = b"# of a camera\n" + b" ".join(b"%d" % value for value in samples.ravel())
    path.write_bytes(b"P%d\n%d %d\n%d\n" % (number, width, height, white) + values)
    return path


TWELVE = RNG.integers(0, 1 << 12, (6, 9, 4), dtype=np.uint16)
TWELVE[0, 0] = 4095


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["png", "tif", "ppm", "plain", "white.ppm"])
def test_deep_colours_keep_their_depth(tmp_path, channels, kind):
    """Whatever holds them, scaled as an array of the same values is, with a range and without."""
    samples = TWELVE[..., :channels]
    file = tmp_path / f"a.{kind.replace('plain', 'ppm')}"
    if kind == "png":
        png16(samples, file)
    elif kind == "tif":
        tifffile = pytest.importorskip("tifffile")
        tifffile.imwrite(file, samples.squeeze(), photometric="rgb" if channels == 3 else "minisblack")
    else:
        pnm(samples, file, 4095 if kind == "white.ppm" else 65535, plain=kind == "plain")
    full = np.broadcast_to(samples, (6, 9, 3))
    for limits in (None, (0, 4095), (1000, 3000)):
        np.testing.assert_array_equal(pixels(read_image(file, 3, limits)), to_bytes(full, limits))
        with Image.open(file) as picture:
            for _ in range(2):
                found = pixels(image_tensor(picture, 3, limits))
                np.testing.assert_array_equal(found, to_bytes(full, limits))
            assert picture.getpixel((0, 0)) is not None  # it can still be read
    np.testing.assert_array_equal(pixels(read_image(file, 1)), pixels(read_image(file, 1, (0, 4095))))
    picture = Image.open(file)
    picture.load()
    if channels == 3:
        with pytest.raises(ValueError, match=r"image: value_range: .* has read 8 bits; give .*a\."):
            image_tensor(picture, 3, (0, 4095))
    else:
        assert image_tensor(picture, 3).shape == (3, 6, 9)


def test_values_of_less_than_8_bits_with_a_range(tmp_path):
    """A PGM says which value is white; with a range its own values count."""
    samples = np.arange(54, dtype=np.uint8).reshape(6, 9, 1) % 16
    file = pnm(samples, tmp_path / "a.pgm", 15)
    assert np.array_equal(pixels(read_image(file, 1)), samples * 17)
    assert np.array_equal(pixels(read_image(file, 1, (0, 30))), to_bytes(samples, (0, 30)))
    with pytest.raises(ValueError, match=r"b\.pgm: cannot be decoded .*a value beyond its largest, 14"):
        read_image(pnm(samples, tmp_path / "b.pgm", 14))


def test_deep_colours_are_turned_and_on_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    png = png16(TWELVE[..., :3], tmp_path / "a.png", b"eXIf" + exif.tobytes()[6:])
    expected = np.rot90(to_bytes(TWELVE[..., :3]), -1)
    assert np.array_equal(pixels(read_image(png)), expected) and probe(png, decode=True) == (6, 9)
    clear = TWELVE.copy()
    clear[..., 3] = 65535
    clear[0, :3, 3] = (0, 32768, 65535)
    found = pixels(read_image(png16(clear, tmp_path / "c.png"), 3, (0, 4095)))
    scaled = to_bytes(clear[..., :3], (0, 4095))
    assert np.array_equal(found[1:], scaled[1:]) and np.array_equal(found[0, 2:], scaled[0, 2:])
    assert (found[0, 0] == 255).all()
    assert np.abs(found[0, 1] - (scaled[0, 1] + 255.0) / 2).max() <= 1
    assert np.array_equal(pixels(read_image(tmp_path / "c.png", 4)), to_bytes(clear))
    clear[..., 3] = 0
    nothing = png16(clear, tmp_path / "n.png")
    assert np.array_equal(pixels(read_image(nothing, 3, (0, 4095))), scaled)
    key = png16(TWELVE[..., :3], tmp_path / "k.png", b"tRNS" + TWELVE[1, 1, :3].astype(">u2").tobytes())
    assert (pixels(read_image(key))[1, 1] == 255).all()


@pytest.mark.parametrize("channels", [3, 4, 5])
def test_deep_tiffs_are_turned(tmp_path, channels):
    tifffile = pytest.importorskip("tifffile")
    many = np.concatenate([TWELVE[..., :3], *[np.full((6, 9, 1), 65535, np.uint16)] * (channels - 3)], -1)
    photometric = "rgb" if channels < 5 else "minisblack"
    tags = [(0x0112, 3, 1, 6, True)]
    extra = {4: ["unassalpha"], 5: [0] * 4}.get(channels)
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, many, photometric=photometric, extrasamples=extra, extratags=tags, planarconfig=1)
    shown = channels if channels == 5 else 3
    expected = np.rot90(to_bytes(many[..., :shown], (0, 4095)), -1)
    assert np.array_equal(pixels(read_image(file, shown, (0, 4095))), expected)
    assert probe(file) == probe(file, decode=True) == (6, 9)


def test_a_range_is_refused_where_depth_is_lost(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, TWELVE, photometric="rgb", extrasamples=["assocalpha"])
    assert read_image(file).shape == (3, 6, 9)
    with pytest.raises(ValueError, match=r"a\.tif: value_range: got a TIFF of more than 8 bits"):
        read_image(file, 3, (0, 4095))
    with pytest.raises(ValueError, match=r"a\.tif: a TIFF label map of a kind whose samples"):
        read_label(file)


@pytest.mark.parametrize("kind", ["a.jp2", "grey.jp2", "a.j2k", "a.avif"])
def test_a_range_is_refused_where_a_codec_loses_depth(tmp_path, kind):
    codecs = pytest.importorskip("imagecodecs")
    samples, file = TWELVE[..., 0].copy() if "grey" in kind else TWELVE[..., :3].copy(), tmp_path / kind
    for bits in (12, 8):
        if kind == "a.avif":
            if not (features.check("avif") and codecs.AVIF.available):
                pytest.skip("no AVIF here")
            data = codecs.avif_encode(samples, level=100, bitspersample=bits)
        else:
            codec = "j2k" if kind == "a.j2k" else "jp2"
            data = codecs.jpeg2k_encode(samples, level=0, bitspersample=bits, codecformat=codec)
        file.write_bytes(data)
        assert read_image(file).shape == (3, 6, 9)
        if bits == 8:
            assert read_image(file, 3, (0, 99)).shape == (3, 6, 9)
        else:
            with pytest.raises(ValueError, match=r"value_range: got a (JPEG2000|AVIF) of more than 8 bits"):
                read_image(file, 3, (0, 4095))
        samples = (samples >> 4).astype(np.uint8)


def test_bitmaps_and_kinds_of_pillows_own(tmp_path):
    """PBM, plain or not, under a name of PGM; RGBA and CMYK, of which Pillow makes 8 bits."""
    bits = np.array([[0, 1, 0, 1], [1, 1, 0, 0]])
    plain = tmp_path / "plain.pgm"
    plain.write_bytes(b"P1\n4 2\n" + b" ".join(b"%d" % bit for bit in bits.ravel()))
    packed = tmp_path / "packed.pgm"
    packed.write_bytes(b"P4\n4 2\n" + np.packbits(bits, -1).tobytes())
    for file in (plain, packed):
        assert np.array_equal(pixels(read_image(file, 1))[..., 0], 255 * (1 - bits))
        found = stored_label(file)
        assert found.form == "bilevel" and np.array_equal(found.values, 1 - bits)
    rgba = tmp_path / "rgba.ppm"
    rgba.write_bytes(b"PyRGBA\n2 1\n15\n" + bytes([1, 2, 3, 15, 4, 5, 6, 15]))
    assert pixels(read_image(rgba)).tolist() == [[[17, 34, 51], [68, 85, 102]]]
    with pytest.raises(ValueError, match=r"rgba\.ppm: value_range: got a PPM"):
        read_image(rgba, 3, (0, 15))


def test_deep_label_files(tmp_path):
    """As numbers where all channels are alike, as colours where the 16 bits are 8."""
    label = np.array([[0, 1, 300], [7, 1, 0]], np.uint16)[..., None]
    opaque = np.full_like(label, 65535)
    files = [
        png16(label.repeat(3, -1), tmp_path / "rgb.png"),
        png16(np.concatenate([label, opaque], -1), tmp_path / "la.png"),
        png16(np.concatenate([label.repeat(3, -1), opaque], -1), tmp_path / "rgba.png"),
        pnm(label, tmp_path / "grey.pgm", 300),
        pnm(label, tmp_path / "plain.pgm", 1000, plain=True),
        pnm(label.repeat(3, -1), tmp_path / "rgb.ppm", 65535),
    ]
    for file in files:
        assert read_label(file).tolist() == label[..., 0].tolist(), file.name
    small = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    assert read_label(pnm(small, tmp_path / "small.pgm", 5)).tolist() == small[..., 0].tolist()
    assert stored_label(pnm(small % 2, tmp_path / "bits.pgm", 1)).form == "bilevel"
    for scale in (257, 256):
        found = stored_label(png16(COLOURS.astype(np.uint16) * scale, tmp_path / "c.png"))
        assert found.colour and np.array_equal(found.values >> 8 & 255, COLOURS[..., 1])
    with pytest.raises(ValueError, match=r"d\.png: colours of 16 bits, expected 8"):
        stored_label(png16(TWELVE[..., :3], tmp_path / "d.png"))
    np.save(tmp_path / "f.npy", np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"f\.npy: got a label image of shape \(2, 3, 4\), expected one"):
        stored_label(tmp_path / "f.npy")


def test_deep_label_tiff(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    label = np.array([[0, 1, 300], [7, 1, 0]], np.uint16)[..., None]
    for order in "<>":
        tifffile.imwrite(tmp_path / "a.tif", label.repeat(3, -1), photometric="rgb", byteorder=order)
        assert read_label(tmp_path / "a.tif").tolist() == label[..., 0].tolist()


def test_deep_pictures_of_strangers_and_damaged_ones(tmp_path):
    data = png16(TWELVE[..., :3], tmp_path / "a.png").read_bytes()
    assert np.array_equal(pixels(read_image(PictureBytes(data))), to_bytes(TWELVE[..., :3]))
    with Image.open(io.BytesIO(data)) as picture:
        assert np.array_equal(pixels(image_tensor(picture, 3, (0, 4095))), to_bytes(TWELVE[..., :3]))
    for damaged in (data[:80], data[:60] + b"rubbish" + data[67:]):
        with pytest.raises(ValueError, match="image: cannot be decoded as an image"):
            read_image(PictureBytes(damaged))
    short = pnm(TWELVE[..., :3], tmp_path / "a.ppm", 4095).read_bytes()[:50]
    with pytest.raises(ValueError, match="image: cannot be decoded as an image"):
        read_image(PictureBytes(short))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((40, 60, 3), np.uint8), ((40, 60, 3), np.uint16), ((40, 60, 5), np.uint8)]
)
def test_tiles_of_strangers_are_no_larger_than_their_pictures_may_be(shape, dtype, monkeypatch):
    """A tile is decoded as a whole: of 60x40 pixels it can say that it is of 65520x65520."""
    tifffile, file = pytest.importorskip("tifffile"), io.BytesIO()
    samples = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    options = {"photometric": "rgb", "extrasamples": [0] * (shape[2] - 3)}
    tifffile.imwrite(file, samples, tile=(64, 64), compression="zlib", **options)
    channels = shape[2]
    with pytest.raises(TooLargeError, match=r"^image: tiles of 64x64 pixels, more than 4095$"):
        read_image(PictureBytes(file.getvalue(), max_pixels=4095, max_channels=5), channels)
    picture = PictureBytes(file.getvalue(), max_pixels=4096, max_channels=5)
    assert np.array_equal(pixels(read_image(picture, channels)), to_bytes(samples))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)  # what tifffile has in its place has no limit
    if (channels, dtype) != (3, np.uint8):
        with pytest.raises(ImportError, match=r"imagecodecs is not installed; .*segvit-kernels\[tiff\]"):
            read_image(picture, channels)


def test_plain_text_beyond_a_picture_is_not_taken_apart():
    data = b"P3\n1 1\n15\n" + b"10 " * 200_000
    tracemalloc.start()
    assert read_image(PictureBytes(data)).flatten().tolist() == [170] * 3
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * len(data)


# Label files


def test_label_files(tmp_path):
    label = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    palette = Image.fromarray(label).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    files = {
        "grey.png": label, "palette.png": palette, "palette.gif": palette,
        "deep.png": label.astype(np.uint16), "int.tif": label.astype(np.int32),
        "float.tif": label.astype(np.float32), "rgb.png": label[..., None].repeat(3, -1),
        "la.png": Image.fromarray(label).convert("LA"), "rgba.png": Image.fromarray(label).convert("RGBA"),
    }  # fmt: skip
    for name, picture in files.items():
        assert read_label(saved(tmp_path, picture, name)).tolist() == label.tolist(), name
    for kind in (np.int8, np.int64, np.uint16, np.float64):
        np.save(tmp_path / "a.npy", label.astype(kind))
        assert read_label(tmp_path / "a.npy").tolist() == label.tolist()
    bits = saved(tmp_path, Image.fromarray(label > 0), "bits.png")
    assert read_label(bits).tolist() == (label > 0).astype(int).tolist()
    stored = stored_label(tmp_path / "palette.png")
    assert stored.palette[:3].tolist() == [0, 255 << 16, 255 << 8] and not stored.colour
    negative = saved(tmp_path, label.astype(np.int32) - 1, "negative.tif")
    assert read_label(negative).min() == -1


def test_label_files_refused(tmp_path):
    label = np.array([[0, 1], [2, 3]], np.uint8)
    jpeg = saved(tmp_path, label, "a.jpg")
    (tmp_path / "a.png").write_bytes(jpeg.read_bytes())  # whatever the name says
    for name in ("a.jpg", "a.png"):
        with pytest.raises(
            ValueError, match=rf"{name}: a JPEG label map: compression with loss changes labels"
        ):
            read_label(tmp_path / name)
    webp = saved(tmp_path, np.zeros((8, 8, 3), np.uint8), "a.webp", quality=50)
    with pytest.raises(ValueError, match=r"a\.webp: a WEBP label map"):
        read_label(webp)
    with pytest.raises(ValueError, match=r"f\.tif: got label value 0\.5 at row 0, column 1, expected whole"):
        read_label(saved(tmp_path, np.array([[0, 0.5]], np.float32), "f.tif"))
    with pytest.raises(ValueError, match=r"n\.tif: got label value nan"):
        read_label(saved(tmp_path, np.array([[0, np.nan]], np.float32), "n.tif"))
    half = Image.fromarray(label).convert("LA")
    half.putalpha(Image.fromarray(np.array([[255, 0], [255, 255]], np.uint8)))
    with pytest.raises(ValueError, match=r"t\.png: a label map with transparent pixels"):
        read_label(saved(tmp_path, half, "t.png"))
    with pytest.raises(ValueError, match=r"c\.png: got a label image of shape \(6, 9, 3\), colours"):
        read_label(saved(tmp_path, COLOURS, "c.png"))


@pytest.mark.parametrize(
    "content", [b"", b"text", b"\x89PNG\r\n\x1a\nrubbish", b"II*\0rubbish", b"\x93NUMPYrubbish"]
)
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.npy"])
@pytest.mark.filterwarnings("error")
def test_rubbish_is_one_line_that_names_the_file(tmp_path, content, name):
    file = tmp_path / name
    file.write_bytes(content)
    for read in (read_image, read_label, probe):
        try:
            read(file)
        except ValueError as error:
            assert str(file) in str(error) and "\n" not in str(error)
        except ImportError as error:
            assert content.startswith(b"II") and "tifffile is not installed" in str(error)
        else:
            pytest.fail(f"{read.__name__} took {content!r} for a picture")


def test_damage_further_on(tmp_path):
    file = saved(tmp_path, RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), "a.jpg")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 2 // 3])
    assert probe(file) == (64, 64)  # the size is there
    for damaged in (lambda: probe(file, decode=True), lambda: read_image(file)):
        with pytest.raises(ValueError, match=r"a\.jpg: cannot be decoded as an image \("):
            damaged()


@pytest.mark.parametrize("suffix", [".jpe", ".jfif", ".jp2", ".avif", ".webp"])
def test_every_suffix_of_pictures_is_read_wherever_it_lies(tmp_path, monkeypatch, suffix):
    if not features.check({".jp2": "jpg_2000", ".avif": "avif"}.get(suffix, "jpg")):
        pytest.skip("not in this Pillow")
    assert suffix in PICTURE_SUFFIXES
    path = tmp_path / f"pictures/a{suffix.upper()}"
    path.parent.mkdir()
    picture = Image.new("RGB", (16, 8), (200, 100, 50))
    picture.save(path, "JPEG" if suffix in (".jpe", ".jfif") else None)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(path, path.name)
    shutil.make_archive(str(tmp_path / "a"), "zip", path.parent)
    for given in (path.parent, tmp_path / "a.tar", tmp_path / "a.zip"):
        (found,) = find_pictures([given])
        seen = read_image(found.open())
        assert seen.shape == (3, 8, 16) and abs(int(seen[0, 0, 0]) - 200) < 8
    if suffix in (".avif", ".webp"):  # a Pillow built without it
        monkeypatch.setitem(Image.OPEN, suffix[1:].upper(), (None, lambda start: False))
        monkeypatch.setattr(Image, "registered_extensions", dict)
        with pytest.raises(ValueError, match=rf"a{suffix.upper()}: this Pillow does not read {suffix}; pip"):
            read_image(path)
