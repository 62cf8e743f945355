"""Data sets in their own files: real samples, and where there are none, files by their description."""

import json
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat

from segvit.commands.data_check import run
from segvit.data import SegmentationFolder
from segvit.data.known import KNOWN
from segvit.options import DataConfig

DOCS = Path(__file__).resolve().parents[3] / "docs" / "data.md"


def counted(data: SegmentationFolder) -> dict[str, int]:
    """Pixels of every class, and of none, as training sees them."""
    total = sum(
        torch.bincount(item["label"].flatten(), minlength=256) for item in (data[i] for i in range(len(data)))
    )
    assert not total[data.num_classes : 255].any()
    return {
        ("ignored" if index == 255 else data.class_names[index]): int(total[index])
        for index in total.nonzero().flatten().tolist()
    }


def by_name(values: np.ndarray, names: dict[int, str]) -> dict[str, int]:
    """The same of an array of stored values, read here; a value without name is ignored."""
    total: dict[str, int] = {}
    for value, count in zip(*np.unique(values, return_counts=True), strict=True):
        name = names.get(int(value), "ignored")
        total[name] = total.get(name, 0) + int(count)
    return total


def opened(data: str, split: str = "validation") -> SegmentationFolder:
    found = SegmentationFolder(data, split)
    found.check()
    assert len(pickle.loads(pickle.dumps(found))) == len(found)  # loading processes get it so
    name, _, folder = data.partition(":")
    with tempfile.TemporaryDirectory() as temporary:  # the same in a zip
        packed = shutil.make_archive(f"{temporary}/data", "zip", folder)
        again = SegmentationFolder(f"{name}:{packed}", split)
        assert again.check() == found.check() and len(again) == len(found)
        for one, two in ((again[i], found[i]) for i in {0, len(found) - 1}):
            assert one["name"] == two["name"]
            assert torch.equal(one["image"], two["image"]) and torch.equal(one["label"], two["label"])
    return found


def values_of(folder: Path, pattern: str) -> np.ndarray:
    arrays = [np.asarray(Image.open(path)).ravel() for path in sorted(folder.glob(pattern))]
    assert arrays
    return np.concatenate(arrays)


@pytest.fixture
def samples(shared_dir):
    return shared_dir / "data" / "samples"


def test_ade20k(samples):
    root = samples / "ade20k"
    lines = (root / "objectInfo150.txt").read_text().splitlines()[1:]
    names = {int(line.split("\t")[0]): line.rpartition("\t")[2].strip() for line in lines}
    for folder in (root, root / "ADEChallengeData2016"):
        data = opened(f"ade20k:{folder}")
        assert data.num_classes == 150 and len(data) == 3
        expected = values_of(root, "ADEChallengeData2016/annotations/validation/*.png")
        assert counted(data) == by_name(expected, names)
    with pytest.raises(ValueError, match="is the full release of ADE20K"):
        SegmentationFolder(f"ade20k:{samples / 'ade20k_full' / 'ADE20K_2021_17_01'}")


def test_coco_stuff(samples, tmp_path):
    root = samples / "cocostuff164k"
    names = dict(line.split(": ") for line in (root / "labels.txt").read_text().splitlines() if line)
    names = {int(value): name for value, name in names.items() if value != "0"}
    for split, folder in (("training", "train2017"), ("validation", "val2017")):
        data = opened(f"coco-stuff:{root}", split)
        expected = values_of(root, f"annotations/{folder}/*.png")
        assert counted(data) == by_name(expected, {value - 1: name for value, name in names.items()})
        assert data.num_classes == 171 and data.known[1].what == "164K, PNG, 0...181"
    replica = samples / "cocostuff10k_replica"
    for split, count in (("training", 3), ("validation", 2)):
        data = opened(f"coco-stuff:{replica}", split)
        listed = (replica / "imageLists" / ("train" if count == 3 else "test")).with_suffix(".txt")
        stored = [
            loadmat(replica / "annotations" / f"{name}.mat")["S"] for name in listed.read_text().split()
        ]
        assert counted(data) == by_name(np.concatenate([s.astype(int).ravel() for s in stored]), names)
        assert len(data) == count
    assert data.class_names == opened(f"coco-stuff:{root}").class_names
    # As others convert it, and with a class that no picture has.
    target = tmp_path / "annotations" / "val2017"
    shutil.copytree(root / "images" / "val2017", tmp_path / "images" / "val2017")
    target.mkdir(parents=True)
    ids = {index: value - 1 for index, value in enumerate(sorted(names)) if names[value] in data.class_names}
    order = {value: index for index, value in enumerate(ids.values())}
    for path in sorted((root / "annotations" / "val2017").glob("*.png")):
        stored = np.vectorize(lambda value: order.get(value, 255))(np.asarray(Image.open(path)))
        Image.fromarray(stored.astype(np.uint8)).save(target / f"{path.stem}_labelTrainIds.png")
    again = opened(f"coco-stuff:{tmp_path}")
    assert counted(again) == counted(opened(f"coco-stuff:{root}")) and "0...170" in again.known[1].what
    shutil.rmtree(target)
    target.mkdir()
    for path in sorted((root / "annotations" / "val2017").glob("*.png")):
        stored = np.asarray(Image.open(path))
        Image.fromarray(np.where(stored < 255, stored + 1, 0).astype(np.uint8)).save(target / path.name)
    with pytest.raises(ValueError, match="one of 11 that no picture has; expected COCO-Stuff"):
        opened(f"coco-stuff:{tmp_path}")


def test_the_names_in_a_matlab_file_say_what_its_numbers_are(tmp_path):
    """COCO-Stuff-10K has two numberings: by name they are one."""
    for folder in ("images", "annotations", "imageLists"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (3, 1)).save(tmp_path / "images" / "a.jpg")
    for split in ("train", "test"):
        (tmp_path / "imageLists" / f"{split}.txt").write_text("a\n")
    for names in (
        ["unlabeled", "person", "wood"],
        ["person", "wood"],
        ["wood", "person"],
        ["wood", "unicorn"],
    ):
        cells = np.array(names, object).reshape(-1, 1)
        savemat(tmp_path / "annotations" / "a.mat", {"S": np.array([[0.0, 1.0, 2.0]]), "names": cells})
        if "unicorn" in names:
            with pytest.raises(
                ValueError, match=r"a\.mat: label value 2 is 'unicorn', none of COCO-Stuff's 171"
            ):
                opened(f"coco-stuff:{tmp_path}")
            continue
        label = opened(f"coco-stuff:{tmp_path}")[0]["label"][0].tolist()
        assert label == ([255, 170, 0] if names[0] == "wood" else [255, 0, 170])
    (tmp_path / "annotations" / "a.mat").write_bytes(b"MATLAB 5.0 MAT-file, and no more")
    with pytest.raises(ValueError, match=r"a\.mat: cannot be decoded"):
        opened(f"coco-stuff:{tmp_path}")


def test_cityscapes(samples, tmp_path):
    """The sample's two label maps, each for itself: they were made smaller apart from each other."""
    source = samples / "cityscapes"
    for kind in ("labelTrainIds", "labelIds"):
        root = tmp_path / kind
        for split in ("train", "val"):
            for folder, name in (("leftImg8bit", "leftImg8bit"), ("gtFine", f"gtFine_{kind}")):
                target = root / folder / split / "frankfurt"
                target.mkdir(parents=True)
                shutil.copy(source / folder / f"frankfurt_000000_000294_{name}.png", target)
        data = opened(f"cityscapes:{root}")
        numbers = range(19)
        if kind == "labelIds":
            numbers = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
        names = dict(zip(numbers, data.class_names, strict=True))
        expected = values_of(source, f"gtFine/*_{kind}.png")
        assert counted(data) == by_name(expected, names) and data.palette[0] == (128, 64, 128)
        assert names[numbers[13]] == "car" and len(names) == 19


def test_coco_panoptic(samples, tmp_path):
    source = samples / "coco_panoptic" / "sample_data"
    categories = {
        c["id"]: c for c in json.loads((samples / "coco_panoptic/panoptic_coco_categories.json").read_text())
    }
    for split in ("train2017", "val2017"):
        shutil.copytree(source / "input_images", tmp_path / split)
        shutil.copytree(source / "panoptic_examples", tmp_path / "annotations" / f"panoptic_{split}")
        shutil.copy(source / "panoptic_examples.json", tmp_path / "annotations" / f"panoptic_{split}.json")
    data = opened(f"coco-panoptic:{tmp_path}")
    areas: dict[str, int] = {}  # as the JSON file has them
    size = sum(item["label"].numel() for item in (data[0], data[1]))
    for picture in json.loads((source / "panoptic_examples.json").read_text())["annotations"]:
        for segment in picture["segments_info"]:
            name = categories[segment["category_id"]]["name"]
            areas[name] = areas.get(name, 0) + segment["area"]
    found = counted(data)
    assert found.pop("ignored", 0) == size - sum(areas.values()) and found == areas
    assert data.num_classes == 133 and data.palette[0] == (220, 20, 60)
    annotations = tmp_path / "annotations" / "panoptic_val2017.json"
    values = json.loads(annotations.read_text())
    values["annotations"][0]["segments_info"].pop()
    annotations.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"segment .* is none of this picture's in"):
        opened(f"coco-panoptic:{tmp_path}")
    annotations.unlink()
    with pytest.raises(ValueError, match=r"panoptic_val2017\.json: no such file; it has the categories of"):
        opened(f"coco-panoptic:{tmp_path}")


@pytest.fixture
def context(tmp_path):
    """PASCAL-Context in both of its forms, by its description: no real file was to be had."""
    root = tmp_path / "VOC2010"
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClassContext", "trainval"):
        (root / folder).mkdir(parents=True)
    names = KNOWN["pascal-context"].classes.names
    ids = rng.permutation(np.arange(1, 460))[:59]  # the real numbers are others: only labels.txt may matter
    rest = iter(f"thing {i}" for i in range(400))
    known = dict(zip(ids.tolist(), names, strict=True))
    lines = [f"{value}: {known.get(value) or next(rest)}" for value in range(1, 460)]
    (root / "labels.txt").write_text("\n".join(lines) + "\n")
    stems = {"train": ["2008_000002", "2008_000003"], "val": ["2008_000007"]}
    for lists in ("SegmentationContext", "Main"):
        (root / "ImageSets" / lists).mkdir(parents=True)
        for split, listed in stems.items():
            (root / "ImageSets" / lists / f"{split}.txt").write_text("\n".join(listed) + "\n")
    (root / "ImageSets" / "Main" / "aeroplane_train.txt").write_text("2008_000002 -1\n")
    for stem in (stem for listed in stems.values() for stem in listed):
        classes = np.arange(120).reshape(10, 12) % 60
        Image.new("RGB", (12, 10)).save(root / "JPEGImages" / f"{stem}.jpg")
        Image.fromarray(classes.astype(np.uint8)).save(root / "SegmentationClassContext" / f"{stem}.png")
        other = next(value for value in range(1, 460) if value not in known)
        savemat(
            root / "trainval" / f"{stem}.mat",
            {"LabelMap": np.where(classes > 0, np.array([0, *ids])[classes], other).astype(np.uint16)},
        )
    return tmp_path


def test_pascal_context(context):
    png = opened(f"pascal-context:{context}", "training")
    with_background = opened(f"pascal-context-60:{context}")
    assert len(png) == 2 and len(with_background) == 1
    assert counted(png) == {**dict.fromkeys(png.class_names, 4), "ignored": 4}
    assert counted(with_background) == dict.fromkeys(("background", *png.class_names), 2)
    expected = counted(png), counted(with_background)
    shutil.rmtree(context / "VOC2010" / "SegmentationClassContext")
    assert counted(opened(f"pascal-context:{context}", "training")) == expected[0]
    assert counted(opened(f"pascal-context-60:{context}")) == expected[1]
    (context / "VOC2010" / "labels.txt").write_text("1: aeroplane\n")
    with pytest.raises(ValueError, match=r"labels\.txt: has no label 'bag'"):
        opened(f"pascal-context:{context}")


@pytest.fixture
def voc(tmp_path):
    """PASCAL VOC by its description: palette files whose last value is the border."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    colours = [colour for colour in KNOWN["voc"].classes.colours] + [(0, 0, 0)] * 234 + [(224, 224, 192)]
    for number, split in enumerate(("train", "val")):
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"2007_{number:06d}\n")
        Image.new("RGB", (22, 2)).save(root / "JPEGImages" / f"2007_{number:06d}.jpg")
        label = Image.fromarray(np.array([[*range(21), 255]] * 2, np.uint8))
        label.putpalette(np.array(colours, np.uint8).tobytes())
        label.save(root / "SegmentationClass" / f"2007_{number:06d}.png")
    return tmp_path


def test_voc(voc, capsys):
    data = opened(f"voc:{voc}")
    expected = {**dict.fromkeys(data.class_names, 2), "ignored": 2}
    assert (
        counted(data) == expected and data.class_names[15] == "person" and data.palette[15] == (192, 128, 128)
    )
    run(DataConfig(folder=f"voc:{voc}", sheet=str(voc / "sheet.png"), progress=False))
    printed = capsys.readouterr().out
    assert "PASCAL VOC 2012: 1 picture of train, 1,464 are published" in printed and "tvmonitor" in printed
    for path in (voc / "VOC2012" / "SegmentationClass").iterdir():  # as some programs save them
        Image.open(path).convert("RGB").save(path)
    assert counted(opened(f"voc:{voc}")) == expected


def test_mistakes(voc, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="data: no data set 'vox'; expected ade20k, pascal-context"):
        SegmentationFolder(f"vox:{voc}")
    with pytest.raises(FileNotFoundError, match="no Cityscapes here \\(expected leftImg8bit"):
        SegmentationFolder(f"cityscapes:{voc}")
    for changes in ({"names": ("a",)}, {"label_mapping": {0: 0}}, {"reduce_zero_label": True}):
        with pytest.raises(ValueError, match="not with PASCAL VOC 2012, which is known"):
            SegmentationFolder(f"voc:{voc}", **changes)
    with pytest.raises(ValueError, match="not with voc:"):
        SegmentationFolder(f"voc:{voc}", image_pattern="a/*", label_pattern="b/*")
    for split in ("training", "validation"):
        for folder in ("images", "annotations"):
            (tmp_path / folder / split).mkdir(parents=True)
        Image.new("RGB", (2, 1)).save(tmp_path / "images" / split / "a.jpg")
        Image.fromarray(np.array([[3, 255]], np.uint8)).save(tmp_path / "annotations" / split / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: label value 255: the labels were made one smaller"):
        opened(f"ade20k:{tmp_path}")
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    (tmp_path / "m.mat").write_bytes(b"x")
    from segvit.data import read_label

    with pytest.raises(ImportError, match=r"pip install 'segvit-kernels\[mat\]'"):
        read_label(tmp_path / "m.mat")


def test_matlab_7_3_is_named(samples):
    from segvit.data import read_label

    with pytest.raises(ValueError, match=r"v73\.mat: a MATLAB 7\.3 file, which is not read; save it"):
        read_label(next((samples / "cocostuff10k").glob("*v73.mat")))


def test_the_table_in_the_docs_is_this_one():
    text = DOCS.read_text(encoding="utf-8")
    for name, known in KNOWN.items():
        classes = len(known.classes.names)
        for form in known.forms:
            lists = f", `{form.split_list}`" if form.split_list else ""
            row = (
                f"| `{name}:` | {classes} | {form.what} | `{form.images}`, `{form.labels}`{lists} | "
                f"{form.pictures[0]:,} / {form.pictures[1]:,} |"
            )
            assert row in text, f"docs/data.md lacks the row\n{row}"
