"""Where files lie: usual layouts, patterns, lists, splits, and the share that stands for validation."""

import numpy as np
import pytest
from PIL import Image

from segvit.data import SegmentationFolder
from segvit.data.layouts import find_layout

NAMES = ("a", "b", "c")


def write(root, *files):
    """Pictures and label maps of one size; a label map has label, mask, gt, ann or Class in its path."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        label = any(word in file.lower() for word in ("mask", "label", "gt", "ann", "class"))
        values = (
            np.arange(12).reshape(3, 4) % 3 if label and not file.startswith("images") else np.zeros((3, 4))
        )
        Image.fromarray(values.astype(np.uint8)).save(path)


def pairs(root, split="training", **options):
    data = SegmentationFolder(root, split, NAMES, reduce_zero_label=False, **options)
    return [tuple(path.relative_to(root).as_posix() for path in pair) for pair in data.files]


@pytest.mark.parametrize(
    ("picture", "label"),
    [
        ("images/train/a.jpg", "annotations/train/a.png"),
        ("images/training/a.jpg", "masks/training/a.png"),
        ("images/train/a.tif", "labels/train/a.tif"),
        ("images/train2017/a.jpg", "annotations/train2017/a.png"),
        ("img_dir/train/a.jpg", "ann_dir/train/a.png"),
        ("images/train/scene/1/a.jpg", "annotations/train/scene/1/a.png"),
        ("images/train/a.jpg", "masks/train/a_mask.png"),
        ("train/images/a.jpg", "train/masks/a.png"),
        ("train/images/a.jpg", "train/labels/a.png"),
        ("train/a.jpg", "train/a_mask.png"),
        ("train/a.png", "trainannot/a.png"),
        ("leftImg8bit/train/x/x_0_leftImg8bit.png", "gtFine/train/x/x_0_gtFine_labelTrainIds.png"),
    ],
)
def test_usual_layouts(tmp_path, picture, label):
    other = tuple(name.replace("training", "valid").replace("train", "val") for name in (picture, label))
    if "annot" in label and "annotations" not in label:
        other = ("val/b.png", "valannot/b.png")
    write(tmp_path, picture, label, *other)
    assert pairs(tmp_path) == [(picture, label)]
    assert pairs(tmp_path, "validation") == [other]


@pytest.mark.parametrize(
    ("pictures", "label"),
    [
        ("images/{}.jpg", "masks/{}.png"),
        ("images/{}.jpg", "annotations/{}.png"),
        ("images/{}.jpg", "masks/{}_mask.png"),
        ("{}.jpg", "{}_mask.png"),
        ("{}.png", "{}_label.png"),
    ],
)
def test_no_splits_at_all(tmp_path, pictures, label):
    for name in "abcdefghij":
        write(tmp_path, pictures.format(name), label.format(name))
    assert len(pairs(tmp_path)) == 10
    held = pairs(tmp_path, "validation", validation_share=0.2)
    kept = pairs(tmp_path, "training", validation_share=0.2)
    assert 1 <= len(held) <= 3 and sorted(held + kept) == pairs(tmp_path)
    with pytest.raises(FileNotFoundError, match="splits here: none"):
        pairs(tmp_path, "test", validation_share=0.2)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        pairs(tmp_path, "validation")


def test_voc(tmp_path):
    for name in "abc":
        write(tmp_path, f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png", f"JPEGImages/{name}2.jpg")
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nc\n")
    (lists / "val.txt").write_text("b\r\n")
    (lists / "trainval.txt").write_text("a\nb\nc\n")
    assert [picture for picture, _ in pairs(tmp_path)] == ["JPEGImages/a.jpg", "JPEGImages/c.jpg"]
    assert [picture for picture, _ in pairs(tmp_path, "validation")] == ["JPEGImages/b.jpg"]
    assert len(pairs(tmp_path, "trainval")) == 3
    assert (
        SegmentationFolder(tmp_path, names=NAMES).reading.table[0] == 0
    )  # 0 is the first class by convention
    (lists / "val.txt").write_text("b\nz\n")
    with pytest.raises(
        FileNotFoundError, match=r"val\.txt: names 'z', but JPEGImages/\* has no such picture"
    ):
        pairs(tmp_path, "validation")


def test_patterns(tmp_path):
    write(
        tmp_path, "raw/train/x_1_rgb.png", "truth/train/1/x_gt.png", "raw/train/x_1_ir.png", "raw/train/y.png"
    )
    options = {"image_pattern": "raw/{split}/*_*_rgb.png", "label_pattern": "truth/{split}/*/*_gt"}
    with pytest.raises(
        FileNotFoundError, match=r"x_1_rgb\.png: image without label, expected .*/x/1_gt\.png"
    ):
        pairs(tmp_path, **options)  # the stars come in their order
    write(tmp_path, "truth/train/x/1_gt.png")
    assert pairs(tmp_path, **options) == [("raw/train/x_1_rgb.png", "truth/train/x/1_gt.png")]
    lists = tmp_path / "fold"
    lists.mkdir()
    (lists / "one.txt").write_text("y.png\n")
    write(tmp_path, "truth/y_gt.png")
    flat = {"image_pattern": "raw/train/*", "label_pattern": "truth/*_gt", "split_list": "fold/{split}.txt"}
    assert pairs(tmp_path, "one", **flat) == [("raw/train/y.png", "truth/y_gt.png")]


def test_lines_of_lists(tmp_path):
    """Names with blanks in them, and label maps behind pictures; whole names, or what the star stands for."""
    names = ("cat", "cat 2", "dog", "a b c")
    write(tmp_path, *(f"images/{name}.jpg" for name in names), *(f"masks/{name}.png" for name in names))
    write(tmp_path, "images/e_rgb.jpg", "masks/e.png")
    options = {"image_pattern": "images/*", "label_pattern": "masks/*", "split_list": "{split}.txt"}
    for text, expected in (
        ("cat 2\na b c.jpg\n", ["a b c", "cat 2"]),
        ("images/cat.jpg masks/dog.png\ndog -1\n", ["cat", "dog"]),
        ("images/a b c.jpg\n", ["a b c"]),
    ):
        (tmp_path / "train.txt").write_text(text)
        assert pairs(tmp_path, **options) == [(f"images/{n}.jpg", f"masks/{n}.png") for n in expected]
    for text in ("e\n", "e_rgb.jpg\n", "images/e_rgb\n"):
        (tmp_path / "train.txt").write_text(text)
        found = pairs(tmp_path, **{**options, "image_pattern": "images/*_rgb.jpg"})
        assert found == [("images/e_rgb.jpg", "masks/e.png")]


@pytest.mark.parametrize("patterns", [("images/**/*", "annotations/**/*"), (None, None)])
def test_lists_of_pictures_in_folders(tmp_path, patterns):
    """By names, and by as much of their paths as tells pictures of one name from each other."""
    for name in ("x/a", "y/a", "y/b", "c"):
        write(tmp_path, f"images/{name}.jpg", f"annotations/{name}.png")
    options = dict(zip(("image_pattern", "label_pattern"), patterns, strict=True))
    options["split_list"] = "{split}.txt"
    for text, expected in (
        ("b\nc.jpg\n", ["c", "y/b"]),
        ("/elsewhere/y/a\n", ["y/a"]),
        ("images/x/a.jpg annotations/x/a.png\n/elsewhere/images/c.jpg\n", ["c", "x/a"]),
    ):
        (tmp_path / "train.txt").write_text(text)
        found = pairs(tmp_path, **options)
        assert found == [(f"images/{name}.jpg", f"annotations/{name}.png") for name in expected]
    several = "several of that name; give their folders"
    for text, what in (("a", several), ("z/a", several), ("z", "no such picture")) if patterns[0] else ():
        (tmp_path / "train.txt").write_text(text)
        with pytest.raises(FileNotFoundError, match=rf"train\.txt: names '{text}', but .* has {what}"):
            pairs(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_pattern": "raw/*"}, "label_pattern: pictures and label maps both need a pattern"),
        (
            {"image_pattern": "raw/*", "label_pattern": "gt/*/*"},
            r"label_pattern: got 'gt/\*/\*', expected the stars",
        ),
        ({"image_pattern": "raw/a", "label_pattern": "gt/a"}, "at least one"),
        ({"image_pattern": "raw/{split}_*", "label_pattern": "gt/*"}, "must stand in the name of a folder"),
    ],
)
def test_patterns_that_cannot_be(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        find_layout(tmp_path, **options)


def test_two_layouts_or_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="images: no such folder"):
        find_layout(tmp_path)
    write(tmp_path, "images/train/a.jpg", "masks/train/a.png", "annotations/train/a.png")
    with pytest.raises(ValueError, match=r"could be .*annotations.* or .*masks.*choose with --image-pattern"):
        find_layout(tmp_path)


def test_splits_that_could_be_two(tmp_path):
    write(
        tmp_path, "images/train/a.jpg", "masks/train/a.png", "images/train2017/a.jpg", "masks/train2017/a.png"
    )
    with pytest.raises(ValueError, match="split 'training' could be train or train2017; name one"):
        pairs(tmp_path)
    assert len(pairs(tmp_path, "train")) == 1


def test_files_that_are_none_and_names_in_two_spellings(tmp_path):
    write(tmp_path, "images/train/Zu\u0308rich.jpg", "masks/train/Z\u00fcrich.png")  # as macOS stores it
    write(tmp_path, "images/train/b.JPG", "masks/train/b.PNG")
    for name in (
        "images/train/._b.jpg",
        "images/train/Thumbs.db",
        "masks/train/.DS_Store",
        "images/train/a.txt",
    ):
        (tmp_path / name).write_bytes(b"")
    assert len(pairs(tmp_path)) == 2


def test_the_share_does_not_depend_on_the_rest(tmp_path):
    for number in range(40):
        write(tmp_path, f"images/training/{number}.png", f"annotations/training/{number}.png")
    share = {"validation_share": 0.25}
    held = set(pairs(tmp_path, "validation", **share))
    assert len(held) == 10 and len(pairs(tmp_path, **share)) == 30
    for number in range(30, 40):
        for kind in ("images", "annotations"):
            (tmp_path / kind / "training" / f"{number}.png").unlink()
    fewer = set(pairs(tmp_path, "validation", **share))
    kept = {pair for pair in held if (tmp_path / pair[0]).exists()}
    assert fewer == kept and len(fewer) < 10  # no picture changes sides for others that come or go
    data = SegmentationFolder(tmp_path, "validation", NAMES, reduce_zero_label=False, **share)
    assert data.check()[-1].startswith("data: no validation split: 9 of the 30 training pictures")


def test_of_few_pictures_each_side_has_one(tmp_path):
    for name in ("a", "stra\udcdfe"):  # a name that is not UTF-8, as old zips have
        try:
            write(tmp_path, f"images/{name}.png", f"masks/{name}.png")
        except OSError:
            pytest.skip("names are UTF-8 here")
    for share in (0.001, 0.999):
        sides = [pairs(tmp_path, split, validation_share=share) for split in ("training", "validation")]
        assert [len(side) for side in sides] == [1, 1] and sides[0] != sides[1]


def test_jpeg_labels_are_named(tmp_path):
    write(tmp_path, "images/train/a.jpg", "masks/train/a.jpg")
    data = SegmentationFolder(tmp_path, names=NAMES, reduce_zero_label=False)
    for refused in (data.check, lambda: data[0]):
        with pytest.raises(ValueError, match=r"masks/train/a\.jpg: a JPEG label map"):
            refused()
    write(tmp_path, "masks/train/a.png")  # a picture of the label map beside it
    assert pairs(tmp_path) == [("images/train/a.jpg", "masks/train/a.png")]


def test_label_maps_without_picture_are_named(tmp_path):
    """Of a split: a picture of a kind that is not read leaves its label map behind."""
    write(tmp_path, "images/training/a.png", "annotations/training/a.png")
    write(tmp_path, "images/validation/b.png", "annotations/validation/b.png", "annotations/validation/c.png")
    for split, expected in (("training", 0), ("validation", 1)):
        said = "\n".join(SegmentationFolder(tmp_path, split, NAMES, reduce_zero_label=False).check())
        assert said.count("without picture") == expected
    assert f"data: 1 label maps of validation without picture, e.g. {tmp_path}" in said and "c.png" in said
    # Where those of all splits lie together, no split's are missing their pictures.
    write(tmp_path, "raw/train/a.png", "raw/val/b.png", "mask/a.png", "mask/b.png")
    layout = find_layout(tmp_path, "raw/{split}/*", "mask/*")
    assert layout.listing("train").orphans == []


@pytest.mark.parametrize("label", ["masks/{}_mask.png", "annotations/{}.png"])
def test_two_pictures_of_one_label_map(tmp_path, label):
    write(tmp_path, "images/a.jpg", "images/a.png", "images/b.png", label.format("b"))
    with pytest.raises(FileNotFoundError, match=r"a\.jpg: image without label"):
        pairs(tmp_path)  # as long as they have none
    write(tmp_path, label.format("a"))
    with pytest.raises(ValueError, match=r"a\.png: and .*a\.jpg are two pictures with one label map"):
        pairs(tmp_path)
    (tmp_path / "images/a.png").unlink()
    assert len(pairs(tmp_path)) == 2


def test_two_pictures_of_one_label_map_in_another_split(tmp_path):
    for split in ("test", "training"):
        write(tmp_path, f"images/{split}/a.jpg", f"annotations/{split}/a.png")
    write(tmp_path, "images/test/a.png")
    assert len(pairs(tmp_path)) == 1
    with pytest.raises(ValueError, match=r"a\.png: and .*a\.jpg are two pictures with one label map"):
        pairs(tmp_path, "test")
