"""What a folder's files are found to be: before training, in `segvit data check`, and kept between runs."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from segvit.cli import main
from segvit.data import SegmentationFolder, inspection
from segvit.data.names import read_classes

SKY = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
COLOURS = np.array([(10, 20, 30), (200, 0, 0), (0, 0, 200)], np.uint8)
PALETTE = "sky 10 20 30\nroad 200 0 0\ncar 0 0 200\n"


def folder(root, *labels, names="sky\nroad\ncar\n", splits=("training", "validation"), suffix=".png"):
    """A picture for each label map, in every split; a label map is an array or a PIL image."""
    for split in splits:
        for number, label in enumerate(labels):
            label = label if isinstance(label, Image.Image) else Image.fromarray(label)
            for kind in ("images", "annotations"):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
            label.save(root / "annotations" / split / f"{number}{suffix}")
            pixels = np.full((*label.size[::-1], 3), 40 * number, np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{number}.png")
    (root / "names.txt").write_text(names)
    return root


def palette_image(label, colours):
    image = Image.fromarray(label).convert("P")
    image.putpalette(np.asarray(colours, np.uint8).tobytes())
    return image


def classes(root, **options):
    """The label maps of training as training gets them, after the check."""
    data = SegmentationFolder(root, **options)
    data.check()
    return [item["label"].tolist() for item in data]


# Readings, from files


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float32, "1", "P", "LA", "RGB", "RGBA"])
def test_binary_masks_of_every_kind(tmp_path, kind):
    mask = np.array([[0, 255, 255], [0, 0, 255]], np.uint8)
    stored, suffix = Image.fromarray(mask), ".png"
    if isinstance(kind, str):
        stored = (
            palette_image(mask // 255, [(0, 0, 0), (255, 255, 255)]) if kind == "P" else stored.convert(kind)
        )
    else:
        stored, suffix = Image.fromarray(mask.astype(kind)), ".tif"
    root = folder(tmp_path, stored, names="background\nobject\n", suffix=suffix)
    assert classes(root) == [(mask // 255).tolist()]
    assert classes(root, reduce_zero_label=False) == [(mask // 255).tolist()]
    with pytest.raises(ValueError, match="a single class leave nothing to tell apart"):
        SegmentationFolder(root, names=("object",)).check()


def test_the_check_says_what_was_understood(tmp_path):
    root = folder(tmp_path, SKY, np.full((2, 3), 255, np.uint8))
    assert SegmentationFolder(root).check() == [
        "data: 4 label maps of training and validation hold the values 0...2, 255; 2 of them hold no class "
        "at all",
        "data: 3 of 3 classes occur: 0 is sky, 1 is road, 2 is car; 255 is ignored, 50.0% of the pixels",
    ]
    Image.fromarray(SKY % 2).save(root / "annotations/training/0.png")
    lines = SegmentationFolder(root, reduce_zero_label=False).check()
    assert lines[0].startswith("data: 2 label maps of training hold the values 0...1, 255")
    assert lines[1].endswith("never: car")
    assert SegmentationFolder(root).check()[-1] == "data: in validation but never in training: car"


def test_splits_that_mean_different_things(tmp_path):
    root = folder(tmp_path, SKY)
    for split, shift in (("training", 0), ("validation", 1)):
        Image.fromarray(SKY + np.uint8(shift)).save(root / "annotations" / split / "0.png")
    for split in ("training", "validation"):
        with pytest.raises(ValueError, match=r"training has 0\.\.\.2") as error:
            SegmentationFolder(root, split)
        assert "the splits' label values do not mean the same" in str(error.value)
    masks = folder(tmp_path / "masks", SKY % 2 * np.uint8(255), names="background\nobject\n")
    Image.fromarray(SKY % 2).save(masks / "annotations/validation/0.png")
    for zero in ("auto", False):
        with pytest.raises(ValueError, match="do not mean the same: training has 0, 255, validation has 0"):
            SegmentationFolder(masks, reduce_zero_label=zero)


def test_a_split_without_any_class(tmp_path):
    root = folder(tmp_path, SKY)
    Image.fromarray(np.full((2, 3), 255, np.uint8)).save(root / "annotations/validation/0.png")
    SegmentationFolder(root)
    with pytest.raises(ValueError, match="every pixel of the validation label maps is ignored"):
        SegmentationFolder(root, "validation")


def test_one_class_alone_cannot_be_learnt(tmp_path):
    root = folder(tmp_path, SKY * 0, names="background\ncat\n")
    SegmentationFolder(root, "validation").check()  # evaluation may look at it
    with pytest.raises(ValueError, match="everything that is not ignored is background: nothing to learn"):
        SegmentationFolder(root).check()


# Colours


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "P"])
def test_colour_coded_labels(tmp_path, kind):
    label = SKY
    if kind == "P":  # a palette in an order of its own: 3, 4, 0 are sky, road, car
        stored = palette_image((SKY + 3) % 5, COLOURS[[2, 0, 0, 0, 1]])
    else:
        stored = Image.fromarray(COLOURS[SKY]).convert(kind)
    root = folder(tmp_path, stored, names=PALETTE)
    assert classes(root) == [label.tolist()]
    data = SegmentationFolder(root)
    assert data.palette == tuple(map(tuple, COLOURS.tolist()))
    assert data.check()[1] == (
        "data: 3 of 3 classes occur: 10 20 30 is sky, 200 0 0 is road, 0 0 200 is car; no pixel is ignored"
    )


def test_ignored_and_unknown_colours(tmp_path):
    root = folder(tmp_path, COLOURS[SKY], names=PALETTE.replace("car", "ignore"))
    assert classes(root) == [[[0, 1, 255], [255, 1, 0]]]
    (root / "names.txt").write_text("sky 10 20 30\nroad 200 0 0\n")
    with pytest.raises(
        ValueError, match=r"0\.png: the colours 0 0 200 \(33\.3% of the pixels\) are no class's"
    ):
        SegmentationFolder(root)
    (root / "names.txt").write_text("sky\nroad\ncar\n")
    with pytest.raises(
        ValueError, match=r"0\.png: the colours .* and 0 more|are no label values; give each class"
    ):
        SegmentationFolder(root)


def test_palettes_of_their_own_are_noticed(tmp_path):
    """Every file saved with the colours that it happens to have: the numbers mean nothing."""
    root = folder(tmp_path, palette_image(SKY, COLOURS), palette_image(SKY, COLOURS[[1, 0, 2]]))
    with pytest.raises(ValueError, match=r"1\.png: its palette gives the colour .* colour-coded label maps"):
        SegmentationFolder(root)
    (root / "names.txt").write_text(PALETTE)
    assert classes(root) == [SKY.tolist(), np.array([1, 0, 2])[SKY].tolist()]


BLACK_WHITE_RED = np.array([(0, 0, 0), (255, 255, 255), (255, 0, 0)], np.uint8)


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "P", "1"])
@pytest.mark.parametrize("red", [False, True])
def test_black_and_white_are_colours_too(tmp_path, kind, red):
    """Class 0 is white, class 1 black: also where one file, of three channels, has a third colour."""
    masks = [Image.fromarray(BLACK_WHITE_RED[label]).convert(kind) for label in (SKY % 2, SKY * 0)]
    masks += [Image.fromarray(BLACK_WHITE_RED[SKY])] if red else []
    names = "crack 255 255 255\nbackground 0 0 0\nignore 255 0 0\n"
    root = folder(tmp_path, *masks, names=names)
    expected = [(1 - SKY % 2).tolist(), np.ones((2, 3)).tolist(), np.array([1, 0, 255])[SKY].tolist()]
    assert classes(root) == expected[: len(masks)]
    assert classes(root, reduce_zero_label=False) == expected[: len(masks)]  # as a run records it
    data = SegmentationFolder(root)
    assert "255 255 255 is crack, 0 0 0 is background" in data.check()[1]
    assert len(data.check()) == 2


@pytest.mark.parametrize("kind", ["1", "P", "npy"])
def test_masks_of_one_bit_among_others(tmp_path, kind):
    """White is 1 there and 255 in the others; in masks of 0 and 1 it is 1, as elsewhere."""
    mask = (SKY % 2).astype(bool)
    bits = palette_image(mask.astype(np.uint8), [(0, 0, 0), (255, 255, 255)]) if kind == "P" else mask
    bits = Image.fromarray(bits) if isinstance(bits, np.ndarray) else bits
    bytes_, numbers = mask * np.uint8(255), mask.astype(np.uint8)
    root = folder(tmp_path, bytes_, bits, names="ground\ncrack\n")
    if kind == "npy":
        for split in ("training", "validation"):
            (root / f"annotations/{split}/1.png").unlink()
            np.save(root / f"annotations/{split}/1.npy", mask)
    for zero in ("auto", False):
        assert classes(root, reduce_zero_label=zero) == [numbers.tolist()] * 2
    assert classes(root, label_mapping={0: 1, 255: 0}) == [(1 - numbers).tolist()] * 2
    assert classes(root, label_mapping={0: 0, 1: 1, 255: None})[0] == np.where(mask, 255, 0).tolist()
    (root / "names.txt").write_text("ground\ncrack\nroad\n")
    for zero in ("auto", False, True):
        with pytest.raises(ValueError, match=r"1\.\w+: one bit a pixel, .* in .*0\.png white is 255"):
            SegmentationFolder(root, reduce_zero_label=zero).check()
    for split in ("training", "validation"):
        Image.fromarray(numbers).save(root / f"annotations/{split}/0.png")
    assert classes(root, reduce_zero_label=False) == [numbers.tolist()] * 2


def test_a_map_of_one_colour_in_a_coloured_data_set(tmp_path):
    root = folder(tmp_path, BLACK_WHITE_RED[SKY], BLACK_WHITE_RED[SKY * 0 + 1], SKY * np.uint8(0))
    names = ("white 255 255 255", "red 255 0 0", "black 0 0 0")
    (root / "names.txt").write_text("\n".join(names))
    assert classes(root) == [[[2, 0, 1], [1, 0, 2]], [[0] * 3] * 2, [[2] * 3] * 2]
    (root / "names.txt").write_text("\n".join(names[1:]))
    with pytest.raises(ValueError, match=r"0\.png: the colours 255 255 255 .* are no class's"):
        SegmentationFolder(root)


def test_numbers_where_the_colours_are_for_overlays(tmp_path):
    """The names file has colours, and no label map has them, or black alone."""
    root = folder(tmp_path, SKY, names=PALETTE)
    assert classes(root) == [SKY.tolist()]
    for names in ("sky 0 0 0\nroad 9 9 9\ncar 0 0 200\n", PALETTE):  # as three channels
        assert classes(folder(tmp_path, SKY[..., None].repeat(3, -1), names=names)) == [SKY.tolist()]
    # Of numbers in one channel, 0 need not be black; of black and white masks it is.
    names = "sky 9 9 9\nroad 200 0 0\nstatic 0 0 0\n"
    assert classes(folder(tmp_path, SKY, names=names)) == [SKY.tolist()]
    masks = folder(tmp_path, SKY % 2 * np.uint8(255), names="crack 9 9 9\nground 0 0 0\n")
    with pytest.raises(ValueError, match=r"colour 255 255 255 is no class's.* number 0 and its colour 0 0 0"):
        SegmentationFolder(masks)
    assert classes(masks, label_mapping={0: 1, 255: 0}) == [(1 - SKY % 2).tolist()]


def test_palettes_count_by_colour_or_by_number_never_both(tmp_path):
    """Of VOC's palette, with a border in some files that the names file has not, or has."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:3], colours[255] = COLOURS, (224, 224, 192)
    border = SKY.copy()
    border[1, 1] = 255
    for labels in ((SKY, border), (border, border)):
        root = folder(tmp_path, *(palette_image(label, colours) for label in labels), names=PALETTE)
        assert classes(root)[1] == border.tolist()  # numbers and colours mean the same
        assert "255 is ignored" in SegmentationFolder(root).check()[1]
        reverse = "\n".join(reversed(PALETTE.splitlines()))
        (root / "names.txt").write_text(reverse)
        message = (
            r"\d\.png: the colour 224 224 192 is no class's.* number 0 and its colour 10 20 30 .* are not "
            "the same class; add 'ignore 224 224 192'"
        )
        for split in ("training", "validation"):
            with pytest.raises(ValueError, match=message):
                SegmentationFolder(root, split)
        assert classes(root, label_mapping={0: 0, 1: 1, 2: 2})[1] == border.tolist()
        (root / "names.txt").write_text(f"{reverse}\nignore 224 224 192\n")
        assert classes(root)[1] == np.where(border == 255, 255, 2 - SKY).tolist()


def test_names_with_colours(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("\ufeffname,r,g,b\r\nsky, 128,128,128\r\nroad side\t128 64 128\r\n", encoding="utf-8")
    found = read_classes(file)
    assert found.names == ("sky", "road side") and found.colours == ((128, 128, 128), (128, 64, 128))
    file.write_text("building, edifice\nsky\n")
    assert read_classes(file) == (("building, edifice", "sky"), None, (), False)
    for text, message in (
        ("sky 1 2 3\nroad\n", "'road' has no colour, other classes have"),
        ("sky 1 2 3\nroad 1 2 3\n", "colours occur twice: '1 2 3'"),
        ("sky 1 2 300\n", "colour out of range: 'sky "),
        ("sky 1 2 3\nsky 3 2 1\n", "class names occur twice: 'sky'"),
        ("ignore 0 0 0\n", "no class name"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_classes(file)


# Files that cannot be used


def test_one_split_that_cannot_be_listed_hides_no_other(tmp_path, capsys):
    root = folder(tmp_path, SKY)
    Image.new("RGB", (3, 2)).save(root / "images/validation/0.jpg")
    patterns = ["--image-pattern", "images/{split}/*", "--label-pattern", "annotations/{split}/*"]
    sheet = ["--sheet", str(tmp_path / "sheet.png"), "--no-progress"]
    assert main(["data", "check", str(root), *patterns, *sheet]) == 2
    out, err = capsys.readouterr()
    assert "training  1" in out and "cannot be used:" in out
    assert err.count("two pictures with one label map") == 1 and "with --image-pattern" in err


def test_problems_are_found_before_training(tmp_path):
    root = folder(tmp_path, SKY, SKY)
    for place, content, message in (
        ("annotations/training/1.png", b"rubbish", r"1\.png: not a picture"),
        ("images/training/1.png", b"", r"1\.png: not a picture"),
        ("images/training/1.png", "short", r"training/1\.png: cannot be decoded"),
        (
            "annotations/training/1.png",
            SKY.T,
            r"the label map is 2x3 pixels, its image 3x2; drawn on the picture as",
        ),
        ("annotations/training/1.png", SKY / 2, r"1\.png: got label value 0\.5"),
    ):
        path = root / place
        good = path.read_bytes()
        if isinstance(content, np.ndarray):
            kind = "TIFF" if content.dtype.kind == "f" else "PNG"
            Image.fromarray(content.astype(np.float32) if kind == "TIFF" else content).save(path, kind)
        elif content == "short":
            noise = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
            path.write_bytes(path.read_bytes()[:-24])
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            SegmentationFolder(root).check()
        path.write_bytes(good)
    SegmentationFolder(root).check()


# What is kept


def test_facts_are_kept_beside_nothing(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("SEGVIT_CACHE", str(cache))
    monkeypatch.setattr(inspection, "_kept", {})
    root = folder(tmp_path / "data", SKY, SKY)
    before = sorted(root.rglob("*"))
    looked = []
    look = inspection._look
    monkeypatch.setattr(inspection, "_look", lambda *args: looked.append(args) or look(*args))

    def found():
        looked.clear()
        inspection._kept.clear()
        lines = SegmentationFolder(root).check()
        return len(looked), lines

    assert found()[0] == 4 and sorted(root.rglob("*")) == before
    expected = found()
    assert expected[0] == 0
    label = root / "annotations/training/0.png"
    Image.fromarray(SKY[::-1].copy()).save(label)
    os.utime(label, (1, 1))
    assert found() == (1, expected[1])
    (file,) = (cache / "labels").iterdir()
    for rubbish in ("", "[]", '{"a": 1}', json.dumps({str(label): ["x", {"values": {"a": 1}}]})):
        file.write_text(rubbish)
        assert found() == (4, expected[1])
    monkeypatch.setenv("SEGVIT_CACHE", str(file))  # a file where a folder should be
    assert found() == found() == (4, expected[1])


@pytest.mark.skipif(os.name == "nt", reason="has no date of the last change")
def test_facts_of_files_with_a_fixed_date(tmp_path, monkeypatch):
    """Archives unpack with dates of their own: another map of the same size has the same date."""
    monkeypatch.setenv("SEGVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(inspection, "_kept", {})
    root = folder(tmp_path, SKY, suffix=".bmp")
    for label in (SKY, SKY % 2):
        for split in ("training", "validation"):
            file = root / "annotations" / split / "0.bmp"
            Image.fromarray(label).save(file)
            os.utime(file, (1, 1))
        inspection._kept.clear()
        found = SegmentationFolder(root, reduce_zero_label=False).check()[1]
    assert found.startswith("data: 2 of 3 classes occur")


# The command


def check(capsys, *words):
    code = main(["data", "check", *map(str, words), "--no-progress"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_data_check(tmp_path, capsys):
    root = folder(tmp_path / "data", SKY.repeat(20, 0).repeat(20, 1), SKY)
    (root / "images/training/extra.png").write_bytes((root / "images/training/0.png").read_bytes())
    (root / "annotations/validation/orphan.png").write_bytes(b"")
    (root / "annotations/validation/1.png").write_bytes(b"rubbish")
    sheet = tmp_path / "sheet.png"
    code, out, err = check(capsys, root, "--sheet", sheet)
    assert code == 2 and "extra.png: image without label" in err and len(err.splitlines()) == 1
    rows = [line.split() for line in out.splitlines()]
    assert [
        "training",
        "2",
        "1",
        "0",
        "0",
        "2",
        "sizes,",
        "3x2",
        "to",
        "60x40,",
        "most",
        "often",
        "60x40",
    ] in rows
    assert ["validation", "2", "0", "1", "1"] in [row[:5] for row in rows]
    assert "orphan.png" in out and "1.png: not a picture" in out
    with Image.open(sheet) as picture:
        assert picture.width > 640
    picture = root / "images/training/extra.png"
    code, out, err = check(capsys, root, "--sheet", picture)
    assert code == 2 and f"sheet: {picture} is there already and no such result" in err
    code, out, err = check(capsys, root, "--sheet", tmp_path / "sheet.csv")
    assert code == 2 and f"sheet: got {tmp_path / 'sheet.csv'}, expected a file .png" in err
    for path in (root / "images/training/extra.png", root / "annotations/validation/orphan.png"):
        path.unlink()
    Image.fromarray(SKY).save(root / "annotations/validation/1.png")
    code, out, err = check(capsys, root, "--sheet", sheet)
    assert (code, err) == (0, "")
    assert "3 of 3 classes occur: 0 is sky, 1 is road, 2 is car; no pixel is ignored" in out
    assert ["sky", "0", "33.33%", "4"] in [line.split() for line in out.splitlines()]


@pytest.mark.parametrize(
    ("splits", "decided"), [(("training", "validation"), True), (("train", "val"), False)]
)
def test_zero_that_never_occurs_in_folders_named_as_ade20ks(tmp_path, capsys, splits, decided):
    root = folder(tmp_path / "data", SKY % 2 + 1, splits=splits)
    code, out, err = check(capsys, root, "--sheet", "null")
    assert code == (0 if decided else 2) and ("two ways" in err) is not decided
    assert ("1 is sky, 2 is road" in out) is decided


def test_data_check_where_the_user_must_choose(tmp_path, capsys):
    root = folder(tmp_path / "data", SKY % 2)
    sheet = tmp_path / "sheet.png"
    code, out, err = check(capsys, root, "--sheet", sheet)
    assert code == 2 and "can be read in two ways with 3 classes" in err
    assert ["0", "0", "66.67%", "2"] in [line.split() for line in out.splitlines()] and sheet.exists()
    code, out, err = check(capsys, root, "--no-reduce-zero-label", "--sheet", "null")
    assert (code, err) == (0, "") and ["sky", "0"] in [line.split()[:2] for line in out.splitlines()]
    code, out, err = check(capsys, root, "--reduce-zero-label", "true", "--sheet", "null")
    assert code == 2 and "everything that is not ignored is sky: nothing to learn" in err
    assert ["(ignored)", "0"] in [line.split()[:2] for line in out.splitlines()]


def test_data_check_of_other_layouts_and_one_split(tmp_path, capsys):
    root = folder(tmp_path / "data", SKY, SKY, SKY, splits=("train",))
    code, out, _ = check(capsys, root, "--sheet", "null")
    assert code == 0 and "no validation split: 1 of the 3 training pictures" in out
    (root / "images/train").rename(root / "images/test")
    (root / "annotations/train").rename(root / "annotations/test")
    code, out, _ = check(capsys, root, "--sheet", "null")
    assert code == 0 and "3 label maps of test" in out
    code, _, err = check(capsys, tmp_path / "nowhere")
    assert code == 2 and "nowhere: no such folder" in err


def test_mistakes_that_training_would_make_are_refused_by_it(tmp_path, capsys):
    tiny = '{"width": 16, "depth": 1, "heads": 1, "taps": [0], "patch_size": 8, "decoder_depth": 1}'
    common = [
        "--preset",
        "vit_tiny",
        "--model",
        tiny,
        "--image-size",
        "32",
        "--max-steps",
        "1",
        "--workers",
        "0",
    ]
    common += ["--batch-size", "1", "--no-progress", "--accelerator", "cpu", "--head", "linear"]
    big = SKY.repeat(16, 0).repeat(16, 1)
    root = folder(tmp_path / "data", big % 2, names="sky\nroad\ncar\n", splits=("train",))
    words = ["train", "--data", str(root), "--out", str(tmp_path / "run"), *common]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "--no-reduce-zero-label if 0 is sky" in err and not (tmp_path / "run").exists()
    assert main([*words, "--no-reduce-zero-label"]) == 2  # a single picture cannot be shared
    assert "too few to share" in capsys.readouterr().err
    folder(tmp_path / "data", big % 2, big % 2, splits=("train",))
    assert main([*words, "--no-reduce-zero-label"]) == 0
    out = capsys.readouterr().out
    assert "never: car" in out and "no validation split: 1 of the 2 training pictures" in out
    saved = (tmp_path / "run/config.yaml").read_text()
    assert "reduce_zero_label: false" in saved
    model = next((tmp_path / "run/checkpoints").rglob("config.json"))
    assert json.loads(model.read_text())["class_names"] == ["sky", "road", "car"]
