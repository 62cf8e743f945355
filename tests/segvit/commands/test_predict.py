"""`segvit predict` from files to files, and its refusals."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import NAMES, sharp_model
from samples import named_model as tiny_model

from segvit.commands.predict import run
from segvit.data.find import find_images, find_pictures
from segvit.data.pictures import read_image
from segvit.inference.bulk import find_classes, label_picture, output_stems
from segvit.inference.classes import class_names
from segvit.inference.passes import label_maps_with_scores
from segvit.inference.record import Record
from segvit.inference.similarity import similarity_maps
from segvit.inference.table import write_parquet
from segvit.model.linear_head import LinearSegmenter
from segvit.model.segvit import SegViT
from segvit.options import InferenceOptions, PredictConfig

TESTS = Path(__file__).resolve().parents[1]


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


@pytest.mark.parametrize("shrink_at", [None, 1])  # the stages of one grid, and of two
def test_similarity_maps_sum_to_the_masks(shrink_at):
    model = sharp_model(shrink_at=shrink_at)
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
    names = ["Car", "car", "CAR", "1", "0"]  # each is found by itself, which the page of `serve` relies on
    assert find_classes(names, names) == [0, 1, 2, 3, 4] and find_classes(["cAR"], names) == [0]
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
    refused(ValueError, r"text\.png: not a picture", checkpoint, tmp_path, images=[str(text)])
    refused(ValueError, "a file name cannot hold a NUL", checkpoint, tmp_path, images=["a\0b"])
    refused(ValueError, "images: got none", checkpoint, tmp_path, images=[])
    refused(FileNotFoundError, "nowhere: no such checkpoint", tmp_path / "nowhere", tmp_path, images=[good])
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


def damaged(path) -> str:
    """Write a JPEG whose last third is missing; returns its name."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    return str(path)


def predict(checkpoint, out, images, **changes) -> None:
    run(
        PredictConfig(
            images=[str(image) for image in images],
            checkpoint=str(checkpoint),
            out=str(out),
            accelerator="cpu",
            **changes,
        )
    )


def test_pictures_that_cannot_be_read_do_not_keep_others_from_it(checkpoint, pictures, tmp_path, capsys):
    out, text = tmp_path / "out", pictures / "b.jpg"
    text.write_text("no picture")
    bad = damaged(pictures / "a.jpg")
    with pytest.raises(ValueError) as caught:
        predict(checkpoint, out, [pictures])
    message = str(caught.value)
    assert message.startswith(f"2 of 4 pictures are done, in {out}; failed: {bad}: cannot be decoded")
    assert f"; {text}: " in message and "\n" not in message and "not done" not in message
    assert outputs(out) == {f"{stem}_{kind}.png" for stem in ("a_2", "b_2") for kind in ("labels", "overlay")}
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 4 and f"{bad}: failed: cannot be decoded" in printed


def test_nothing_is_made_where_no_picture_can_be_opened(checkpoint, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("no picture")
    images = [tmp_path / "a.png", tmp_path / "b.png"]
    with pytest.raises(ValueError, match=r"a\.png: not a picture.*\(and 1 more\)"):
        predict(checkpoint, tmp_path / "out", images)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_is_done_stays_when_it_ends_early(checkpoint, pictures, tmp_path, monkeypatch, error):
    """A full disk, and Ctrl-C: the second picture is being written."""
    save, out = Image.Image.save, tmp_path / "out"

    def failing(self, path, *args, **kwargs):
        if (out / "a_overlay.png").exists():
            path.write_bytes(b"half")
            raise error
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", failing)
    with pytest.raises(type(error)) as caught:
        predict(checkpoint, out, [pictures])
    message = str(caught.value)
    assert f"1 of 3 pictures are done, in {out}; not done: {pictures / 'b.jpg'}; " in message
    if isinstance(error, OSError):
        assert message.startswith(f"{out / 'b_labels.png'}: cannot be written") and "No space left" in message
    assert outputs(out) == {"a_labels.png", "a_overlay.png"}


def test_a_picture_too_large_for_the_memory_is_one_that_failed(checkpoint, pictures, tmp_path, monkeypatch):
    predicted, held = SegViT.predict, []

    def short_of_memory(self, image, *args, **kwargs):
        assert not [tensor for tensor in held if tensor() is not None], "of a picture that failed"
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        if image.shape[-1] == 50:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        return predicted(self, image, *args, **kwargs)

    monkeypatch.setattr(SegViT, "predict", short_of_memory)
    with pytest.raises(ValueError, match=r"b\.jpg: not enough memory \(99 bytes .*sliding window"):
        predict(checkpoint, tmp_path / "out", [pictures])
    assert len(outputs(tmp_path / "out")) == 4


def test_no_output_is_another_ones(checkpoint, tmp_path):
    """Stems that are one on some file system, names too long for what is appended, names of devices."""
    names = ["x/a.png", "y/A.png", "z/a.png", "z/a_2.png", "x/\u00e9.png", "y/e\u0301.png", "x/CON.1.png"]
    names += [f"x/{'l' * 250}.png", f"y/{'l' * 250}.png", f"x/{'l' * 249}m.png", "x/-n\n.png", "x/\udcff.png"]
    files = [tmp_path / name for name in names]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(file, "PNG")
    stems = output_stems(files, tmp_path / "out")
    long = [stem for stem in stems if len(stem) > 200]
    # No number takes a stem that another picture has: a_2 is z/a_2.png's, whatever comes before it.
    assert stems[:7] == ["a", "A_3", "a_4", "a_2", "\u00e9", "e\u0301_2", "CON_1"] and len(long) == 3
    assert len({stem.lower() for stem in stems}) == len(stems)
    predict(checkpoint, tmp_path / "out", files)
    assert outputs(tmp_path / "out") == {f"{s}_{kind}.png" for s in stems for kind in ("labels", "overlay")}


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


@pytest.mark.parametrize("manifest", [False, True])
def test_what_is_no_result_is_not_replaced(checkpoint, pictures, tmp_path, manifest):
    """X.jpg with X_labels.png is a layout of data sets: results would have the names of its label maps."""
    (pictures / "b.png").unlink()
    truth = pictures / "b_labels.png"
    Image.new("L", (50, 17)).save(truth)
    before, names = truth.read_bytes(), outputs(pictures)
    images, options = [pictures / "b.jpg", pictures / "a.png"], {"overlay": False, "manifest": manifest}
    others = pictures / "a_labels.png"
    for number, make in enumerate((lambda: None, others.mkdir, lambda: others.symlink_to("nowhere"))):
        make()
        more = r" \(and 1 more\)" if number else ""
        with pytest.raises(
            ValueError, match=rf"b_labels\.png{more} is there already and not known to be"
        ) as e:
            predict(checkpoint, pictures, images, **options)
        assert "\n" not in str(e.value) and outputs(pictures) == names | ({others.name} if number else set())
        if number == 1:
            others.rmdir()
    others.unlink()
    out = tmp_path / "out"
    for _ in range(2):  # results replace results, and what is empty
        predict(checkpoint, out, images[1:], **options)
        (out / "a_labels.png").write_bytes(b"")
    truth.rename(out / truth.name)  # it came later than the record
    with pytest.raises(ValueError, match=r"b_labels\.png is there already and not known to be a result"):
        predict(checkpoint, out, images, **options)
    assert (out / truth.name).read_bytes() == before


def test_results_are_known_as_such(checkpoint, pictures, tmp_path):
    """Every kind; and what the record has, however it looks."""
    every = {"maps": ["car"], "scores": True, "probabilities": True}
    for labels in ("png", "rle"):
        for _ in range(2):
            predict(checkpoint, tmp_path / labels, [pictures / "a.png"], labels=labels, **every)
        results = sorted(outputs(tmp_path / labels))
        assert len(results) == 5
        for name in results:
            path = tmp_path / labels / name
            data = path.read_bytes()
            path.write_bytes(b"another's")
            with pytest.raises(ValueError, match=f"{name} is there already"):
                predict(checkpoint, tmp_path / labels, [pictures / "a.png"], labels=labels, **every)
            path.write_bytes(data)
    out = tmp_path / "recorded"
    predict(checkpoint, out, [pictures], manifest=True)
    Image.open(out / "a_labels.png").save(out / "a_labels.png")  # without the note, as earlier releases did
    (out / "a_overlay.png").unlink()
    predict(checkpoint, out, [pictures], manifest=True)
    assert (out / "a_overlay.png").exists()


def test_an_input_that_is_a_link_is_not_overwritten(pictures, tmp_path):
    folder = tmp_path / "links"
    folder.mkdir()
    for name, target in (("a.png", "a.png"), ("a_labels.png", "b.png")):
        (folder / name).symlink_to(pictures / target)
    with pytest.raises(ValueError, match=r"links/a_labels\.png is an input picture"):
        output_stems(find_pictures([folder]), folder)
    assert output_stems(find_pictures([folder]), pictures) == ["a", "a_labels"]


def test_find_images_lists_each_file_once(pictures):
    found = find_images([pictures / "b.png", pictures, pictures / "." / "a.png"])
    assert [path.name for path in found] == ["b.png", "a.png", "b.jpg"]


def test_every_name_of_a_file_is_a_picture(checkpoint, pictures, tmp_path):
    """Links: equal pictures are one file in the stores of DVC, git-annex and the Hub."""
    folder, out = tmp_path / "links", tmp_path / "out"
    folder.mkdir()
    for name in ("x.png", "y.png"):
        (folder / name).symlink_to(pictures / "a.png")
    again = os.path.relpath(folder / "x.png")
    assert [path.name for path in find_images([folder, again, folder / "." / "y.png"])] == ["x.png", "y.png"]
    predict(checkpoint, out, [folder, again], overlay=False)
    assert outputs(out) == {"x_labels.png", "y_labels.png"}
    said: list[str] = []
    (pictures / "below").symlink_to(pictures)
    assert len(find_pictures([pictures], recursive=True, say=said.append)) == 3
    assert said == [f"{pictures / 'below'}: left out, leads to {pictures}, which is taken already"]


def test_what_is_left_out_is_said(pictures, tmp_path):
    for name in ("c.heic", "d.MP4", "notes.txt", "e.heic", "README", ".hidden.txt"):
        (pictures / name).write_bytes(b"")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(pictures, "x")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "x/a.png"
        tar.addfile(link)
    shutil.make_archive(str(tmp_path / "a"), "zip", pictures)
    kinds = "2 .heic, 1 .mp4, 1 .txt, 1 without suffix"
    for given, recursive in ((pictures, False), (pictures, True), ("a.tar", False), ("a.zip", False)):
        said: list[str] = []
        found = find_pictures([tmp_path / given], recursive=recursive, say=said.append)
        (line,) = said
        place, _, rest = line.partition(": left out, no pictures by their names: ")
        assert place == str(tmp_path / given) and rest.endswith("; name videos to have their frames")
        assert set(rest.partition(";")[0].split(", ")) == {
            *kinds.split(", "),
            *(["1 links"] if given == "a.tar" else []),
        }
        assert len(found) == 3
    (pictures / "x").mkdir()
    said.clear()
    (pictures / "a.png").rename(pictures / "x" / "a.png")
    find_pictures([pictures / "x"], say=said.append)
    assert not said


def test_a_linear_head_predicts_but_has_no_maps(model, pictures, tmp_path):
    linear = LinearSegmenter(model.config).eval()
    linear.save_pretrained(tmp_path / "linear")
    images = [str(pictures / "a.png")]
    refused(
        ValueError, "decoder linear, which has no", tmp_path / "linear", tmp_path, images=images, maps=["car"]
    )
    out = tmp_path / "out"
    run(PredictConfig(images=images, checkpoint=str(tmp_path / "linear"), out=str(out), accelerator="cpu"))
    with Image.open(out / "a_labels.png") as labels:
        np.testing.assert_array_equal(np.asarray(labels), linear.predict(pictures / "a.png").numpy())


# Scores


VIEWS = [InferenceOptions(), InferenceOptions(window=24, stride=16, scales=[0.7, 1.3], flip=True)]


@pytest.mark.parametrize("options", VIEWS)
@pytest.mark.parametrize("linear", [False, True])
def test_labels_are_the_argmax_of_the_scores(model, options, linear, monkeypatch):
    """Of those of every class at every pixel, by windows and scales too, however they are cut into rows."""
    network = LinearSegmenter(model.config).eval() if linear else model
    coarse = torch.randint(256, (2, 3, 3, 3), dtype=torch.uint8, generator=torch.manual_seed(1))
    images = coarse.repeat_interleave(16, 2).repeat_interleave(16, 3)[..., :45, :37].contiguous()
    labels, scores = network.predict(images, options, return_scores=True)
    assert scores.shape == (2, 5, 45, 37) and labels.unique().numel() > 1
    torch.testing.assert_close(scores.argmax(1).to(labels.dtype), labels, rtol=0, atol=0)
    two = scores.topk(2, 1).values
    alike = network.predict(images, options) == labels
    assert ((two[:, 0] - two[:, 1])[~alike] < 1e-5).all() and alike.float().mean() > 0.99
    if options is VIEWS[0] and not linear:
        padded = network.pad_to_patches(network.preprocess(images))
        with torch.no_grad():
            expected = network.semantic_scores(network(padded), padded.shape[-2:])[..., :45, :37]
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)

    def in_rows(*args, **kwargs):
        return label_maps_with_scores(*args, **kwargs, elements=1)

    monkeypatch.setattr("segvit.model.segvit.label_maps_with_scores", in_rows)
    one, rows = network.predict(images[0], options, return_scores="scores")
    torch.testing.assert_close(rows, scores[0], rtol=1e-4, atol=1e-5)
    region = (3, 5, 20, 30)
    _, shares = network.predict(images[0], options, return_scores="probabilities", region=region)
    assert shares.shape == (5, 30, 20) and one.shape == (45, 37)
    torch.testing.assert_close(shares.sum(0), torch.ones(30, 20))
    part = rows[:, 5:35, 3:23]
    torch.testing.assert_close(shares, part.softmax(0) if linear else part / part.sum(0))


@pytest.mark.parametrize("kind", ["float16", "float32", "uint8"])
def test_score_files(model, checkpoint, pictures, tmp_path, kind):
    out, picture = tmp_path / "out", pictures / "b.png"
    changes = {"probabilities": True, "score_type": kind}
    if kind == "float16":
        changes |= {
            "scores": True,
            "region": [2, 3, 10, 20],
            "score_classes": ["sky", "0"],
            **VIEWS[1].__dict__,
        }
    predict(checkpoint, out, [picture], **changes)
    left, top, width, height = changes.get("region") or (0, 0, 24, 33)
    classes = [1, 0] if "region" in changes else list(range(5))
    options = VIEWS[1] if "region" in changes else None
    for name in ("scores", "probabilities"):
        if not changes.get(name):
            assert not (out / f"b_{name}.npz").exists()
            continue
        _, expected = model.predict(picture, options, return_scores=name)
        with np.load(out / f"b_{name}.npz") as stored:
            assert set(stored) == {name, "classes", "names", "region"} and stored[name].dtype == kind
            assert stored["classes"].tolist() == classes and stored["region"].tolist() == [
                left,
                top,
                width,
                height,
            ]
            assert stored["names"].tolist() == [NAMES[index] for index in classes]
            values = stored[name].astype(np.float64) / (255 if kind == "uint8" else 1)
        part = expected[classes, top : top + height, left : left + width].numpy()
        error = {"float16": 1e-3, "float32": 1e-5, "uint8": 0.5 / 255 + 1e-6}[kind]
        np.testing.assert_allclose(values, part, rtol=error, atol=error)
        with Image.open(out / "b_labels.png") as picture_of_labels:
            written = np.asarray(picture_of_labels)
        if "region" not in changes:  # rounded scores: the label's is among the largest
            assert (np.take_along_axis(values, written[None], 0)[0] == values.max(0)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region": [0, 0, 1, 1]}, "region: is of scores"),
        ({"scores": True, "region": [0, 0, 1]}, "region: got"),
        ({"scores": True, "region": [0, 0, 0, 1]}, "region: got"),
        ({"score_classes": ["sky"]}, "score_classes: expected"),
        ({"scores": True, "score_type": "uint8"}, "score_type: uint8"),
        ({"scores": True, "score_classes": ["skies"]}, "score_classes: no class 'skies'"),
    ],
)
def test_mistakes_about_scores(checkpoint, pictures, tmp_path, changes, message):
    refused(ValueError, message, checkpoint, tmp_path, images=[str(pictures)], **changes)


def test_a_region_outside_a_picture_is_of_this_picture(checkpoint, pictures, tmp_path):
    with pytest.raises(ValueError, match=r"2 of 3 .*b\.jpg: region: got 20x20 pixels.*the picture's 50x17$"):
        predict(checkpoint, tmp_path / "out", [pictures], scores=True, region=[0, 0, 20, 20])
    assert "b_scores.npz" not in outputs(tmp_path / "out") and "a_scores.npz" in outputs(tmp_path / "out")


# Many pictures


@pytest.fixture
def tree(tmp_path):
    """Pictures in folders below each other, of which one is damaged."""
    root = tmp_path / "tree"
    for number, name in enumerate(("a.png", "sub/a.png", "sub/deep/b.one.png", "sub/c.jpg", "z/a.JPG")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((24, 16)).save(root / name)
    damaged(root / "sub" / "c.jpg")
    return root


GOOD = {
    "a.png": "a",
    "sub/a.png": "sub/a",
    "sub/deep/b.one.png": "sub/deep/b.one",
    "z/a.JPG": "z/a",
}


def lines_of(out) -> dict[str, dict]:
    found = [json.loads(line) for path in sorted(out.glob("*-of-*.jsonl")) for line in path.open()]
    assert len({line["picture"] for line in found}) == len(found), "a picture has two lines"
    return {line["picture"]: line for line in found}


def test_the_record_has_the_pixels_of_classes_of_one_name(pictures, tmp_path):
    tiny_model(class_names=("thing",) * 5).save_pretrained(tmp_path / "checkpoint")
    predict(tmp_path / "checkpoint", tmp_path / "out", [pictures], overlay=False, manifest=True)
    lines = lines_of(tmp_path / "out").values()
    assert max(len(line["pixels"]) for line in lines) > 1
    assert all(sum(line["pixels"].values()) == line["width"] * line["height"] for line in lines)


def test_a_tree_its_list_its_tar_and_its_zip_give_the_same(model, checkpoint, tree, tmp_path, monkeypatch):
    packed = tmp_path / "tree.tar"
    with tarfile.open(packed, "w") as tar:
        for path in sorted(tree.rglob("*.*")):
            tar.add(path, path.relative_to(tree).as_posix())
        tar.add(tree, "folder")  # the same once more
    listed = tmp_path / "list.txt"
    listed.write_text("# pictures\n" + "\n".join(str(path) for path in sorted(tree.rglob("*.*"))) + "\n")
    zipped = Path(shutil.make_archive(str(tmp_path / "tree"), "zip", tree))
    for given in (tree, listed, packed, zipped):
        out = tmp_path / f"out{given.suffix}"
        with pytest.raises(
            ValueError, match=r"of (5|10) pictures are done, in .*; failed: .*c\.jpg: cannot be"
        ):
            predict(checkpoint, out, [given], recursive=True, overlay=False, manifest=True)
        for name, stem in GOOD.items():
            with Image.open(out / f"{stem}_labels.png") as labels:
                expected = model.predict(tree / name).numpy()
                np.testing.assert_array_equal(np.asarray(labels), expected)
            line = lines_of(out)[f"{given}/{name}" if given != listed else str(tree / name)]
            counts = {NAMES[i]: int(n) for i, n in enumerate(np.bincount(expected.ravel())) if n}
            assert line["output"] == stem and line["pixels"] == counts
            assert (line["width"], line["height"]) == (24, 16)
        assert "cannot be decoded" in next(
            line["error"] for line in lines_of(out).values() if "error" in line
        )
        assert not list(out.glob(".*")) and not list(out.rglob("*overlay*"))
    listed.write_text("nowhere.png\n")
    with pytest.raises(ValueError, match=r"^nowhere\.png: no such image file"):
        predict(checkpoint, tmp_path / "none", [listed])
    listed.write_text(f"nowhere.png\n{tree / 'a.png'}\n")
    with pytest.raises(ValueError, match=r"1 of 2 pictures are done, .* failed: nowhere\.png: no such image"):
        predict(checkpoint, tmp_path / "one", [listed])
    whole = packed.read_bytes()
    packed.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"tree\.tar: no whole, uncompressed tar"):
        predict(checkpoint, tmp_path / "none", [packed])
    monkeypatch.chdir(tree)  # the results' folder is no input, wherever it lies
    for _ in range(2):
        with pytest.raises(ValueError, match="4 of 5 pictures"):
            predict(checkpoint, "out", ["."], recursive=True)


def test_of_a_name_twice_in_a_tar_the_last_counts(checkpoint, pictures, tmp_path):
    """As where it is extracted; `tar -r` appends another version of a file."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for source, name in (("a.png", "x.png"), ("b.jpg", "y.jpg"), ("b.png", "./x.png")):
            tar.add(pictures / source, name)
    assert len(find_pictures([tmp_path / "a.tar"])) == 2
    for _ in range(2):
        predict(checkpoint, tmp_path / "out", [tmp_path / "a.tar"], overlay=False, manifest=True)
        with Image.open(tmp_path / "out/x_labels.png") as labels:
            assert labels.size == (24, 33)
        assert {line["output"] for line in lines_of(tmp_path / "out").values()} == {"x", "y"}


def counted(monkeypatch) -> list[int]:
    """How many pictures each call of the network had."""
    calls, predicted = [], SegViT.predict

    def predict(self, images, *args, **kwargs):
        calls.append(len(images) if images.ndim == 4 else 1)
        return predicted(self, images, *args, **kwargs)

    monkeypatch.setattr(SegViT, "predict", predict)
    return calls


def test_what_the_record_has_is_not_done_again(checkpoint, tree, tmp_path, monkeypatch, capsys):
    out, calls = tmp_path / "out", counted(monkeypatch)
    options = {"recursive": True, "manifest": True}

    def again(message, **changes):
        calls.clear()
        with pytest.raises(ValueError, match=message):
            predict(checkpoint, out, [tree], **{**options, **changes})
        return sum(calls)

    assert again("4 of 5 pictures are done, in") == 4
    record = out / "manifest-00000-of-00001.jsonl"
    before = record.read_bytes()
    assert again(r"4 of 5 pictures are done \(4 before\)") == 0 and record.read_bytes() == before
    (out / "z" / "a_overlay.png").unlink()
    assert again(r"4 of 5 pictures are done \(3 before\)") == 1
    record.write_bytes(before[:-10])  # a kill came while the last line was written
    (out / ".rank-00000").mkdir()
    (out / ".rank-00000" / ".half.png").touch()
    assert again(r"4 of 5 pictures are done \(3 before\)") == 1
    assert record.read_bytes() == before and not (out / ".rank-00000").exists()
    assert again("predicted with other options, window null, now 16", window=16) == 0
    assert again("holds results with a record; expected --manifest", manifest=False) == 0
    (tree / "sub" / "a.jpg").write_bytes((tree / "a.png").read_bytes())  # its name goes before a.png
    assert again(r"sub/a\.png was written as sub/a and would now be sub/a_2") == 0
    (tree / "sub" / "a.jpg").rename(tree / "later.png")
    (tree / "sub" / "c.jpg").write_bytes((tree / "a.png").read_bytes())
    predict(checkpoint, out, [tree], **options)
    assert sum(calls) == 2
    record.write_text("{}\n")
    assert again(r"manifest-00000-of-00001\.jsonl: line 1 is none of a manifest's") == 0


def test_a_picture_that_was_replaced_is_done_again(checkpoint, pictures, tmp_path, monkeypatch):
    """Alone, in a tar and in a zip; results in tars are refused, where both would be."""
    tar, packed, calls = tmp_path / "a.tar", tmp_path / "a.zip", counted(monkeypatch)

    def given(changed: float) -> None:
        Image.new("RGB", (24, 16 + int(changed) % 5), "red").save(pictures / "a.png")
        os.utime(pictures / "a.png", (changed, changed))
        with tarfile.open(tar, "w") as file:
            file.add(pictures, "")
        shutil.make_archive(str(packed.with_suffix("")), "zip", pictures)

    def done(source, out, **changes) -> tuple[int, str]:
        calls.clear()
        predict(checkpoint, tmp_path / out, [source], overlay=False, **changes)
        last = [json.loads(line) for path in (tmp_path / out).glob("*.jsonl") for line in path.open()][-1]
        return sum(calls), f"{last['width']}x{last['height']}"

    given(1e9)
    sources = {"files": pictures, "tar": tar, "zip": packed}
    for out, source in sources.items():
        assert [done(source, out, manifest=True)[0] for _ in range(2)] == [3, 0]
    assert [done(pictures, "packed", pack=2)[0] for _ in range(2)] == [3, 0]
    given(1e9 + 1)  # packed anew: the others are what they were
    for out, source in sources.items():
        assert done(source, out, manifest=True) == (1, "24x17")
        assert done(source, out, manifest=True)[0] == 0
        with Image.open(tmp_path / out / "a_labels.png") as labels:
            assert labels.size == (24, 17)
    with pytest.raises(ValueError, match=r"a\.png has changed since its results were put into a tar; choose"):
        done(pictures, "packed", pack=2)
    os.utime(pictures / "a.png", (1e9, 1e9))  # of the same size: only the time tells
    assert done(pictures, "files", manifest=True)[0] == 1
    record = tmp_path / "files" / "manifest-00000-of-00001.jsonl"
    record.write_text(re.sub(r', "version": "[^"]*"', "", record.read_text()))  # of an earlier release
    given(1e9 + 2)
    assert done(pictures, "files", manifest=True)[0] == 0


def test_of_a_replaced_picture_the_new_line_counts(tmp_path):
    """Whatever the number of processes was, and however the names of their records sort."""
    line = {"picture": "a", "output": "a", "width": 1}
    for place, version in (((0, 2), "old"), ((0, 1), "new")):
        record = Record(tmp_path, place, {}, {"a": "a"})
        assert not record.is_done("a", "a", version)
        record.add({**line, "version": version})
        assert [found["version"] for found in record.lines()] == [version]
        record.close()
    for version, expected in (("new", True), ("later", False)):
        record = Record(tmp_path, (0, 4), {}, {"a": "a"})
        assert record.is_done("a", "a", version) == expected
        assert [found["version"] for found in record.lines()] == ["new"] * expected
        record.close()


@pytest.mark.parametrize("kind", [{"manifest": True}, {"pack": 2}])
def test_results_that_the_record_has_are_not_replaced_by_another_pictures(
    checkpoint, pictures, tmp_path, kind
):
    """Of another folder, in capital letters too; afterwards the first would be done, with what is not its."""
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    predict(checkpoint, out, [pictures / "a.png"], overlay=False, **kind)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.copy(pictures / "b.png", other / "A.png")
    for rank in ("0", "1"):  # whoever has it
        message = rf"{other / 'A.png'} would be written as A, which is {pictures / 'a.png'}'s in .*; choose"
        with pytest.raises(ValueError, match=message), pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", rank)
            patch.setenv("WORLD_SIZE", "2")
            images = [pictures / "b.png", other / "A.png"][:: 1 if rank == "1" else -1]
            predict(checkpoint, out, images, overlay=False, **kind)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    predict(checkpoint, out, [pictures / "a.png", other / "A.png"], overlay=False, **kind)
    assert {line["output"] for line in lines_of(out).values()} == {"a", "A_2"}


def test_tars_of_results(checkpoint, tree, tmp_path, monkeypatch):
    plain, out, calls = tmp_path / "plain", tmp_path / "out", counted(monkeypatch)
    (tree / "sub" / "c.jpg").unlink()
    predict(checkpoint, plain, [tree], recursive=True)

    def packed(**changes) -> dict[str, bytes]:
        calls.clear()
        predict(checkpoint, out, [tree], recursive=True, pack=3, **changes)
        members: dict[str, bytes] = {}
        for path in sorted(out.glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    assert member.name not in members
                    members[member.name] = tar.extractfile(member).read()
            assert len(path.with_suffix(".jsonl").read_text().splitlines()) <= 3
        return members

    members = packed()
    for stem in GOOD.values():
        kept = stem.replace(".", "_")  # WebDataset takes what follows the first dot for the kind
        for kind in ("labels", "overlay"):
            assert members[f"{kept}.{kind}.png"] == (plain / f"{stem}_{kind}.png").read_bytes()
        assert json.loads(members[f"{kept}.json"])["output"] == kept
    assert len(members) == 12 and len(lines_of(out)) == 4 and len(list(out.glob("*.tar"))) == 2
    others = {out / "download.tar.part": b"half a tar", out / "other.jsonl": b"no manifest's\n"}
    for path, data in others.items():  # they have nothing to do with the results
        path.write_bytes(data)
    assert packed() == members and not calls
    assert all(path.read_bytes() == data for path, data in others.items())
    # A kill came when the second picture of the first tar was written.
    for path in out.glob("results-*"):
        if path.name != "results-00000-of-00001-000000.tar":
            path.unlink()
    growing = next(out.glob("*.tar")).rename(out / "results-00000-of-00001-000000.tar.part")
    with tarfile.open(growing) as tar:
        ends = [member.offset_data for member in tar if member.name.endswith(".json")]
    os.truncate(growing, ends[1] + 10)
    assert {name: data for name, data in packed().items() if "json" not in name} == {
        name: data for name, data in members.items() if "json" not in name
    }
    assert sum(calls) == 3 and len(lines_of(out)) == 4


def test_pictures_of_one_size_run_together(checkpoint, tree, pictures, tmp_path, monkeypatch):
    images = [tree, pictures]
    for out, changes in (("alone", {}), ("together", {"batch": 3, "threads": 2})):
        calls = counted(monkeypatch)
        with pytest.raises(ValueError, match="7 of 8 pictures are done"):
            predict(checkpoint, tmp_path / out, images, recursive=True, overlay=False, **changes)
    assert sorted(calls) == [1, 1, 1, 1, 3]
    for path in (tmp_path / "alone").rglob("*.png"):
        assert (
            path.read_bytes() == (tmp_path / "together" / path.relative_to(tmp_path / "alone")).read_bytes()
        )
    refused(
        ValueError, "batch: got 2", checkpoint, tmp_path, images=[str(tree / "a.png")], batch=2, scores=True
    )


def test_processes_share_the_pictures(checkpoint, tree, tmp_path, monkeypatch):
    """Two, then three as another cluster has them, then one: nothing is done twice."""
    (tree / "sub" / "c.jpg").unlink()
    out, calls, done = tmp_path / "out", counted(monkeypatch), []
    for rank, ranks in ((1, 2), (0, 3), (1, 3), (2, 3), (0, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        calls.clear()
        predict(checkpoint, out, [tree], recursive=True, manifest=True)
        done.append(sum(calls))
    assert done == [2, 1, 0, 1, 0] and len(lines_of(out)) == 4
    monkeypatch.setenv("RANK", "1")
    refused(ValueError, "RANK, WORLD_SIZE: got", checkpoint, tmp_path / "x", images=[str(tree / "a.png")])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_killed_processes_go_on():
    command = [sys.executable, str(TESTS / "kill_predict.py"), "--kills", "3", "--pictures", "40"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("40 pictures once each, 2 of them damaged" in line for line in lines[:2])


def test_run_lengths_are_the_label_map(checkpoint, pictures, tmp_path):
    """COCO's own decoder gives the masks of the PNG; packed, the record is told from them."""
    masks = pytest.importorskip("pycocotools.mask")
    out, runs, packed = tmp_path / "png", tmp_path / "rle", tmp_path / "packed"
    predict(checkpoint, out, [pictures], overlay=False)
    predict(checkpoint, runs, [pictures], overlay=False, labels="rle", manifest=True)
    assert outputs(runs) == {"a_rle.json", "b_rle.json", "b_2_rle.json"} | {
        "manifest.json",
        "manifest-00000-of-00001.jsonl",
    }
    for stem in ("a", "b", "b_2"):
        labels = np.array(Image.open(out / f"{stem}_labels.png"))
        found = json.loads((runs / f"{stem}_rle.json").read_text())
        assert found["size"] == list(labels.shape)
        assert [s["index"] for s in found["segments"]] == np.unique(labels).tolist()
        for segment in found["segments"]:
            assert segment["class"] == NAMES[segment["index"]]
            mask = masks.decode({"size": found["size"], "counts": segment["counts"].encode()})
            assert np.array_equal(mask, labels == segment["index"]) and segment["area"] == mask.sum()
    with pytest.raises(ValueError, match="other options, kind of results"):
        predict(checkpoint, runs, [pictures], overlay=False, manifest=True)
    for _ in range(2):  # again: all is there
        predict(checkpoint, packed, [pictures], overlay=False, labels="rle", pack=2)
    with tarfile.open(packed / "results-00000-of-00001-000000.tar") as tar:
        assert sorted(tar.getnames()) == ["a.json", "a.rle.json", "b.json", "b.rle.json"]


def test_names_that_are_no_text_in_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = [{"picture": "caf\udce9.png", "error": "é"}]  # as Python has b"caf\xe9.png"
    found = parquet.read_table(write_parquet(tmp_path, (0, 1), lines))
    assert [found[column].to_pylist() for column in ("picture", "error")] == [["caf\\udce9.png"], ["é"]]


def test_record_as_parquet(checkpoint, pictures, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    (pictures / "c.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="parquet: is the record of --manifest or --pack"):
        predict(checkpoint, tmp_path / "none", [pictures], parquet=True)
    for name, options in (("files", {"manifest": True}), ("tars", {"pack": 2})):
        out = tmp_path / name
        stale = out / "manifest-00001-of-00002.parquet"
        out.mkdir()
        stale.write_bytes(b"")
        with pytest.raises(ValueError, match=r"c\.png"):
            predict(checkpoint, out, [pictures], overlay=False, parquet=True, **options)
        assert not stale.exists()
        rows = parquet.read_table(out / "manifest-00000-of-00001.parquet").to_pylist()
        assert [Path(row["picture"]).name for row in rows] == ["a.png", "b.jpg", "b.png", "c.png"]
        assert sum(count for _, count in rows[0]["pixels"]) == rows[0]["width"] * rows[0]["height"] == 61 * 40
        assert rows[3]["error"] and rows[3]["output"] is None and rows[0]["error"] is None
        assert (rows[0]["tar"] is None) == (name == "files")


@pytest.fixture
def video(tmp_path):
    """Ten frames, each of a grey of its own."""
    av = pytest.importorskip("av")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(10):
            pixels = np.full((32, 48, 3), 20 * number + 10, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_frames_of_a_video(checkpoint, video, tmp_path):
    found = find_pictures([video], every=3)
    assert [picture.name.rpartition("#")[2] for picture in found] == ["0", "3", "6", "9"]
    for picture in [*found, found[1]]:  # the last one again, which is behind
        image = read_image(picture.open())
        assert image.shape == (3, 32, 48)
        assert abs(float(image.float().mean()) - 20 * picture.frame - 10) < 4
    out = tmp_path / "out"
    predict(checkpoint, out, [video], frames=3, threads=4, overlay=False)
    assert outputs(out) == {f"film_{number:06d}_labels.png" for number in (0, 3, 6, 9)}
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match=r"film\.mp4: (cannot be decoded as a|holds no) video"):
        predict(checkpoint, tmp_path / "none", [video])


def test_what_is_not_installed_is_named(checkpoint, pictures, tmp_path, monkeypatch):
    (tmp_path / "film.mp4").write_bytes(b"")
    for module, extra, words in (
        ("av", "video", {"images": [str(tmp_path / "film.mp4")]}),
        ("pyarrow.parquet", "parquet", {"images": [str(pictures)], "manifest": True, "parquet": True}),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"pip install 'segvit-kernels\[{extra}\]'"):
            run(PredictConfig(checkpoint=str(checkpoint), out=str(tmp_path / "out"), **words))
        assert not (tmp_path / "out").exists()
