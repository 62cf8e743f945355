"""Folders of images and label maps, and augmentation."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from segvit.data import SegmentationFolder, open_dataset, read_names
from segvit.data.names import mirrored_classes
from segvit.data.transforms import Augment, RandomScale


def write_pair(root, name, label, split="training", size=None, suffix=".jpg"):
    """An image of noise and a palette PNG of `label` under ADE20K names."""
    for kind in ("images", "annotations"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    height, width = size or label.shape
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "images" / split / f"{name}{suffix}")
    image = Image.fromarray(label.astype(np.uint8))
    image.putpalette([255 - v for v in range(256) for _ in range(3)])
    image.save(root / "annotations" / split / f"{name}.png")


@pytest.fixture
def folder(tmp_path):
    label = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 255, 1]])
    write_pair(tmp_path, "b", label)
    write_pair(tmp_path, "a", label.T, suffix=".png")
    (tmp_path / "names.txt").write_text("# classes\nsky\nroad \n\ncar\n")
    return tmp_path


def test_reading(folder):
    dataset = SegmentationFolder(folder)
    assert len(dataset) == 2 and dataset.num_classes == 3 and dataset.class_names == ("sky", "road", "car")
    first, second = dataset
    assert (first["name"], second["name"]) == ("a", "b")
    assert second["image"].shape == (3, 3, 4) and second["image"].dtype == torch.uint8
    assert second["label"].dtype == torch.int64
    # Palette indices, not the palette's colours; 0 and 255 are ignored.
    assert second["label"].tolist() == [[255, 0, 1, 2], [2, 1, 0, 255], [0, 0, 255, 0]]
    assert first["label"].tolist() == second["label"].T.tolist()
    pixels = np.array(Image.open(folder / "images/training/a.png"))
    assert np.array_equal(first["image"].permute(1, 2, 0).numpy(), pixels)


def test_label_conventions(folder):
    plain = SegmentationFolder(folder, reduce_zero_label=False, names=["a", "b", "c", "d"], ignore_index=9)
    assert plain[1]["label"].tolist() == [[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 9, 1]]
    mapping = {0: None, 1: 1, 2: 0, 3: 255}
    mapped = SegmentationFolder(folder, names=["x", "y"], label_mapping=mapping)
    assert mapped[1]["label"].tolist() == [[255, 1, 0, 255], [255, 0, 1, 255], [1, 1, 255, 1]]
    file = folder / "mapping.json"
    file.write_text(json.dumps(mapping))
    from_file = SegmentationFolder(folder, names=["x", "y"], label_mapping=str(file))
    assert torch.equal(from_file[1]["label"], mapped[1]["label"])


def test_sixteen_bit_labels(tmp_path):
    write_pair(tmp_path, "a", np.zeros((2, 2)))
    Image.fromarray(np.array([[0, 300], [1, 2]], dtype=np.uint16)).save(
        tmp_path / "annotations/training/a.png"
    )
    dataset = SegmentationFolder(tmp_path, num_classes=300, ignore_index=-1)
    assert dataset[0]["label"].tolist() == [[-1, 299], [0, 1]]


def test_label_out_of_range_names_file_and_place(folder):
    (folder / "names.txt").write_text("sky\nroad\n")
    with pytest.raises(ValueError) as error:
        SegmentationFolder(folder, reduce_zero_label=True)[1]
    assert "annotations/training/b.png: label value 3 at row 0, column 3" in str(error.value)
    assert "expected 0...2, 255 for 2 classes" in str(error.value)
    with pytest.raises(ValueError, match=r"a\.png: label value 3 .* expected 0\.\.\.1, 255"):
        SegmentationFolder(folder, names=["x"], label_mapping={0: None, 1: 0})[0]


def test_image_without_label(folder):
    (folder / "annotations/training/a.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"images/training/a\.png: image without label, expected .*a\.png"
    ):
        SegmentationFolder(folder)


def test_truncated_jpeg(folder):
    path = folder / "images/training/b.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"b\.jpg: cannot be decoded as an image"):
        SegmentationFolder(folder)[1]


def test_size_mismatch_and_colour_labels(folder):
    write_pair(folder, "b", np.zeros((3, 4)), size=(3, 5))
    dataset = SegmentationFolder(folder)
    with pytest.raises(ValueError, match=r"b\.png: the label map is 4x3 pixels, its image 5x3"):
        dataset[1]
    Image.new("RGB", (4, 3), "red").save(folder / "annotations/training/b.png")
    with pytest.raises(ValueError, match=r"b\.png: got a label image of shape \(3, 4, 3\)"):
        dataset[1]


def test_bad_folders_and_names(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        SegmentationFolder(folder / "nowhere")
    with pytest.raises(FileNotFoundError, match="images/validation: no such folder"):
        SegmentationFolder(folder, "validation")
    with pytest.raises(FileNotFoundError, match=r"other\.txt: no such names file"):
        SegmentationFolder(folder, names="other.txt")
    with pytest.raises(ValueError, match="ignore_index: got 1, which is one of the 3 classes"):
        SegmentationFolder(folder, ignore_index=1)
    with pytest.raises(ValueError, match="label_mapping: 1 -> 3"):
        SegmentationFolder(folder, label_mapping={1: 3})
    (folder / "names.txt").write_text("sky\nsky\n")
    with pytest.raises(ValueError, match="occur twice: 'sky'"):
        read_names(folder / "names.txt")
    (folder / "names.txt").unlink()
    with pytest.raises(ValueError, match="label_mapping: got class 1000000000, expected at most 32767"):
        SegmentationFolder(folder, label_mapping={1: 10**9}, ignore_index=-1)
    with pytest.raises(ValueError, match="number of classes is unknown"):
        SegmentationFolder(folder)
    (folder / "images/validation").mkdir()
    (folder / "annotations/validation").mkdir()
    with pytest.raises(ValueError, match=r"validation: holds no \.jpg or \.png"):
        SegmentationFolder(folder, "validation", num_classes=2)


def test_ade20k_as_it_comes(folder, shared_dir):
    """A few real pictures of ADE20K and its own list of names."""
    ade = shared_dir / "data/samples/ade20k"
    names = ade / "objectInfo150.txt"
    dataset = SegmentationFolder(ade / "ADEChallengeData2016", "validation", names=names)
    assert dataset.num_classes == 150 and dataset.class_names[:2] == ("wall", "building, edifice")
    labels = torch.cat([item["label"].flatten() for item in dataset]).unique()
    assert set(labels.tolist()) <= {*range(150), 255} and len(labels) > 3
    (folder / "names.txt").unlink()
    (folder / "objectInfo150.txt").write_text(names.read_text())
    assert SegmentationFolder(folder).class_names == dataset.class_names


def test_open_dataset(folder):
    synthetic = open_dataset("synthetic", "validation", synthetic_length=3, synthetic_size=32)
    assert len(synthetic) == 3 and synthetic[0]["image"].shape == (3, 32, 32)
    assert len(open_dataset(str(folder), "training", num_classes=3)) == 2


# Augmentation


def pair():
    """An image that shows its own labels: 12 blocks of 16x18 pixels, class 20 k in colour 20 k."""
    label = 20 * torch.arange(12).view(3, 4).repeat_interleave(16, 0).repeat_interleave(18, 1)
    return label.to(torch.uint8).expand(3, -1, -1).contiguous(), label


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    image, label = pair()
    augment = Augment(32, seed=5)
    expected = augment(image, label, epoch=2, index=9)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = augment(image, label, epoch=2, index=9)
    assert torch.equal(torch.get_rng_state(), before)  # and leaves the random state of the training alone
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    for other in (
        augment(image, label, 3, 9),
        augment(image, label, 2, 8),
        Augment(32, seed=6)(image, label, 2, 9),
    ):
        assert not torch.equal(other[0], expected[0])


@pytest.mark.parametrize("scale", [(0.5, 0.5), (2.0, 2.0), (0.5, 2.0)])
def test_augmented_label_follows_image(scale):
    image, label = pair()
    augment = Augment(40, scale=scale, photometric=False, mean=(1.0, 0.5, 0.0))
    sizes = set()
    for index in range(12):
        out, target = augment(image, label, 0, index)
        assert type(out) is type(target) is torch.Tensor
        assert out.shape == (3, 40, 40) and target.shape == (40, 40)
        assert out.dtype == torch.uint8 and target.dtype == torch.int64
        padding = target == 255
        sizes.add(int((~padding).sum()))
        assert torch.equal(out[:, padding], torch.tensor([[255], [128], [0]]).expand(3, padding.sum()).byte())
        assert (target[~padding] % 20 == 0).all()  # no class between two classes
        # Away from class borders the colour is that of the label.
        difference = (out[0].float() - target)[~padding].abs()
        assert (difference <= 3).float().mean() > 0.6
    assert (sizes == {1600}) == (scale == (2.0, 2.0))


def test_resized_label_lies_on_the_resized_image():
    rng = torch.Generator().manual_seed(0)
    label = torch.randint(0, 99, (33, 47), generator=rng)
    for scale in (0.37, 0.5, 1.3):
        image, target = RandomScale(33, (scale, scale))(
            tv_tensors.Image(label.to(torch.uint8)[None].expand(3, -1, -1)), tv_tensors.Mask(label)
        )
        assert image.shape[1:] == target.shape == (round(33 * scale), round(47 * scale))
        expected = torch.nn.functional.interpolate(
            label[None, None].float(), target.shape, mode="nearest-exact"
        )
        assert torch.equal(target.as_subclass(torch.Tensor), expected[0, 0].long())


def test_crop_avoids_one_class():
    label = torch.zeros(40, 80, dtype=torch.int64)
    label[:, 66:] = 1
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)

    def share(limit):
        augment = Augment(40, scale=(1.0, 1.0), class_share=limit, photometric=False, flip=False)
        crops = [augment(image, label, 0, index)[1] for index in range(40)]
        return sum(float((crop == 0).float().mean() <= 0.75) for crop in crops) / len(crops)

    assert share(0.75) > share(1.0) + 0.3


def test_bad_augmentation():
    with pytest.raises(ValueError, match="scale: got"):
        Augment(32, scale=(2.0, 1.0))
    with pytest.raises(ValueError, match="class_share: got 0"):
        Augment(32, class_share=0.0)


def write_labels(root, values, split, names="red\ngreen\nblue\n"):
    label = np.resize(np.array(values), (len(values), 16))
    write_pair(root, "a", label, split, suffix=".png")
    (root / "names.txt").write_text(names)


def test_labels_mean_what_they_did_in_training(tmp_path):
    """Also in a folder that alone would be read otherwise; values that training never saw are refused."""
    write_labels(tmp_path / "train", [0, 1, 2, 3], "training")
    training = SegmentationFolder(tmp_path / "train", reduce_zero_label=True)
    training.check()
    meaning = json.loads(json.dumps(training.meaning()))
    assert meaning["values"] == {"0": None, "1": 0, "2": 1, "3": 2, "255": None}
    assert meaning["seen"] == [0, 1, 2, 3] and meaning["colours"] == {}
    write_labels(tmp_path / "held", [0, 1, 2], "validation")
    alone = SegmentationFolder(tmp_path / "held", "validation")
    assert alone.reading.table[1] == 1
    held = SegmentationFolder(tmp_path / "held", "validation", meaning=meaning)
    held.check()
    assert held.reading.table == training.reading.table
    assert held[0]["label"].unique().tolist() == [0, 1, 255]
    write_labels(tmp_path / "more", [1, 2, 7], "validation")
    with pytest.raises(ValueError, match=r"a\.png: label value 7 was not in the data .* \(0\.\.\.3\)"):
        SegmentationFolder(tmp_path / "more", "validation", meaning=meaning).check()
    # Other numbers of classes are for whoever compares them.
    write_labels(tmp_path / "two", [0, 1], "validation", "red\ngreen\n")
    assert SegmentationFolder(tmp_path / "two", "validation", meaning=meaning).num_classes == 2


def test_what_training_ignored_is_no_class_of_a_folder_without_it(tmp_path):
    meanings = {}
    for values in ((0, 1, 255), (0, 1)):
        write_labels(tmp_path / str(len(values)), values, "training", "background\ncrack\n")
        training = SegmentationFolder(tmp_path / str(len(values)))
        training.check()
        meanings[values] = training.meaning()
    write_labels(tmp_path / "held", [0, 0, 255], "validation", "background\ncrack\n")
    held = SegmentationFolder(tmp_path / "held", "validation", meaning=meanings[0, 1, 255])
    held.check()
    assert held[0]["label"].unique().tolist() == [0, 255]
    with pytest.raises(ValueError, match=r"label value 255 was not in the data .* \(0\.\.\.1\); say"):
        SegmentationFolder(tmp_path / "held", "validation", meaning=meanings[0, 1]).check()


def test_colours_mean_what_they_did_in_training(tmp_path):
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[:2] = 255, 0, 0
    for kind in ("images", "annotations"):
        (tmp_path / kind / "training").mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / kind / "training" / "a.png")
    names = tmp_path / "names.txt"
    names.write_text("red 255 0 0\nblack 0 0 0\n")
    training = SegmentationFolder(tmp_path)
    assert training.meaning()["colours"] == {"ff0000": 0, "000000": 1}
    names.write_text("red\nblack\n")
    with pytest.raises(ValueError, match="no label values"):
        SegmentationFolder(tmp_path).check()
    assert torch.equal(
        SegmentationFolder(tmp_path, meaning=training.meaning())[0]["label"], training[0]["label"]
    )


@pytest.mark.parametrize("form", ["grey levels", "palette", "bit"])
def test_forms_count_as_they_did_in_training(tmp_path, form):
    """By colour or by number, also where the names file is not there or alone would decide otherwise."""
    values = np.zeros((8, 8), np.uint8)
    values[:2], names = 1, "white 255 255 255\nblack 0 0 0\n"
    picture = Image.fromarray(values, "P")
    picture.putpalette([0, 0, 0, 255, 255, 255, 9, 9, 9])
    picture = {"grey levels": Image.fromarray(255 * values), "bit": Image.fromarray(values > 0)}.get(
        form, picture
    )
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
            picture.save(tmp_path / kind / split / "a.png")
    (tmp_path / "names.txt").write_text(names)
    training = SegmentationFolder(tmp_path)
    training.check()
    meaning = json.loads(json.dumps(training.meaning()))
    (tmp_path / "names.txt").write_text("white\nblack\n")
    held = SegmentationFolder(tmp_path, "validation", meaning=meaning)
    held.check()
    assert torch.equal(held[0]["label"], training[0]["label"]) and held[0]["label"][0, 0] == 0


FORMS = {  # of classes 0 and 1 ("first", "second") as `write_form` draws them
    "number": lambda values: Image.fromarray(values),
    "0 and 255": lambda values: Image.fromarray(255 * values),
    "bit": lambda values: Image.fromarray(values > 0),
    "colour": lambda values: Image.fromarray(np.stack([255 * values] * 3, -1)),
    "palette": lambda values: Image.fromarray(1 - values),
}


def write_form(root, form, names):
    values = np.zeros((8, 8), np.uint8)
    values[:2] = 1
    picture = FORMS[form](values)
    if form == "palette":
        picture = Image.frombytes("P", picture.size, picture.tobytes())
        picture.putpalette([255, 255, 255, 0, 0, 0, 9, 9, 9])
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
            picture.save(root / kind / split / "a.png")
    (root / "names.txt").write_text(names)
    return root, values


@pytest.mark.parametrize(
    "form, other, names",
    [
        ("number", "palette", "first 0 0 0\nsecond 255 255 255\n"),
        ("number", "colour", "first 0 0 0\nsecond 255 255 255\n"),
        ("colour", "palette", "first 0 0 0\nsecond 255 255 255\n"),
        ("bit", "0 and 255", "first 0 0 0\nsecond 255 255 255\n"),
        ("0 and 255", "bit", "first\nsecond\n"),
        ("0 and 255", "colour", "first\nsecond\n"),
    ],
)
def test_forms_that_training_had_not_count_as_their_folder_says(tmp_path, form, other, names):
    training = SegmentationFolder(write_form(tmp_path / "training", form, names)[0])
    training.check()
    meaning = json.loads(json.dumps(training.meaning()))
    root, values = write_form(tmp_path / "held", other, names)
    held = SegmentationFolder(root, "validation", meaning=meaning)
    held.check()
    assert (held[0]["label"].numpy() == values).all()


def test_evaluate_reads_labels_as_the_run_did(tmp_path):
    pytest.importorskip("lightning_fabric", reason="needs the extra train")
    from segvit import BackboneConfig, SegViT, SegViTConfig
    from segvit.cli import main
    from segvit.training.run_folder import share_of

    backbone = BackboneConfig(width=16, depth=1, heads=1, patch_size=8)
    config = SegViTConfig(backbone, 3, (0,), decoder_depth=1, image_size=16)
    SegViT(config).save_pretrained(tmp_path / "model")
    write_labels(tmp_path / "data", [0, 1, 2], "validation")
    meaning = {"values": {"0": 2, "1": 0, "2": None}, "colours": {}, "seen": [0, 1, 2]}
    meaning |= {"by_colour": ["colour"], "white": 1}
    record = {"labels": meaning, "validation_share": 0.4}
    (tmp_path / "model/data.json").write_text(json.dumps(record))

    def pixels(*words):
        arguments = ["--checkpoint", str(tmp_path / "model"), "--data", str(tmp_path / "data"), *words]
        arguments += ["--json", str(tmp_path / "result.json"), "--workers", "0", "--no-progress"]
        assert main(["evaluate", *arguments, "--accelerator", "cpu"]) == 0
        result = json.loads((tmp_path / "result.json").read_text())
        return [*result["pixels"].values(), result["ignored"]]

    assert pixels() == [16, 0, 16, 16]
    SegViT.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "copy")  # as push_to_hub does
    assert pixels("--checkpoint", str(tmp_path / "copy")) == [16, 0, 16, 16]
    exported = str(tmp_path / "model.torchscript")
    assert main(["export", str(tmp_path / "model"), exported, "--size", "3", "16"]) == 0
    assert pixels("--checkpoint", exported) == [16, 0, 16, 16]
    assert pixels("--no-reduce-zero-label") == [16, 16, 16, 0]
    assert pixels("--label-mapping", '{"0": 0, "1": 0, "2": 1}') == [32, 16, 0, 0]
    # And the pictures that were kept for validation, where there is no such split.
    for number in range(20):
        write_pair(tmp_path / "share", str(number), np.array([[0, 1, 2]] * 16).T, suffix=".png")
    (tmp_path / "share/names.txt").write_text("red\ngreen\nblue\n")

    def images(*words):
        pixels("--data", str(tmp_path / "share"), *words)
        return json.loads((tmp_path / "result.json").read_text())["images"]

    kept = {
        share: len(SegmentationFolder(tmp_path / "share", "validation", validation_share=share))
        for share in (0.1, 0.4, 0.7)
    }
    assert len(set(kept.values())) == 3 and images() == images("--checkpoint", exported) == kept[0.4]
    assert images("--validation-share", "0.7") == kept[0.7]
    (tmp_path / "model/data.json").write_text("{}")
    assert images() == kept[0.1]
    (tmp_path / "model/data.json").write_text('{"validation_share": 7}')
    with pytest.raises(ValueError, match=r"data\.json: got 7 for validation_share, expected what"):
        share_of(tmp_path / "model")


def test_classes_that_mirroring_exchanges():
    names = ["Left-arm", "head", "right-arm", "leftShoe", "rightShoe", "shoe (left)", "copyright", "copyleft"]
    names += ["left of the right eye", "right of the left eye", "bright", "left knee", "shoe (Right)"]
    assert mirrored_classes(names) == [(0, 2), (3, 4), (5, 12), (8, 9)]
    assert mirrored_classes(None) == mirrored_classes(["a", "b"]) == mirrored_classes(["Car", "car"]) == []
    assert mirrored_classes(["left", "Left", "right"]) == [(0, 2)]
    assert mirrored_classes(["Left", "left", "right", "Right"]) == [(0, 3), (1, 2)]
    assert mirrored_classes(["Left", "left", "right"]) == [(1, 2)]
    assert mirrored_classes(["LEFT", "right", "Right", "Left"]) == [(0, 1), (2, 3)]


def test_mirrored_labels_have_left_and_right_exchanged():
    """Class 1 is the left side of the picture and class 2 the right one, mirrored or not."""
    label = torch.zeros(40, 40, dtype=torch.int64)
    label[:, :10], label[:, 30:], label[:2], label[3] = 1, 2, 255, 3
    image = (torch.arange(40) * 6).to(torch.uint8).expand(3, 40, 40)
    mirrored = 0
    plain, exchanging = (
        Augment(40, scale=(1.0, 1.0), photometric=False, exchanged=pairs) for pairs in ((), [(1, 2)])
    )
    for index in range(20):
        seen, found = exchanging(image, label, 0, index)
        same, other = plain(image, label, 0, index)
        assert torch.equal(seen, same)  # what is drawn by chance is the same
        assert torch.equal(found, label)
        mirrored += int(seen[0, 0, 0] > seen[0, 0, -1])
        assert torch.equal(other, label) == bool(seen[0, 0, 0] < seen[0, 0, -1])
    assert 0 < mirrored < 20
