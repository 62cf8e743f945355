"""Zips as folders: their samples, whoever reads them, what is refused; known data sets: test_known.py."""

import multiprocessing
import os
import pickle
import shutil
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from segvit.cli import main
from segvit.data import SegmentationFolder, open_dataset
from segvit.data.find import find_pictures
from segvit.data.pictures import read_image
from segvit.system.zips import ZipPath, path_at


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    for split, count in (("training", 4), ("validation", 2)):
        for number in range(count):
            name = f"{'sub/' if number % 2 else ''}{number}"
            for kind, suffix in (("images", "jpg"), ("annotations", "png")):
                path = root / kind / split / f"{name}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (18, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels if suffix == "jpg" else pixels[..., 0] % 3).save(path)
    (root / "names.txt").write_text("sky 1 2 3\nroad 4 5 6\ntree 7 8 9\n")
    return root


def zipped(folder, path, top: str = "", kind: int = zipfile.ZIP_DEFLATED):
    """A zip of a folder, perhaps in a folder of its own beside what a Mac adds."""
    with zipfile.ZipFile(path, "w", kind) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{top}{file.relative_to(folder).as_posix()}")
        if top:
            archive.writestr(f"__MACOSX/{top}._names.txt", "of a Mac")
            archive.writestr(f"{top}images/training/.hidden.jpg", "of a desktop")
    return path


def assert_equal_samples(found, expected):
    assert len(found) == len(expected) > 0
    for one, two in ((found[i], expected[i]) for i in range(len(found))):
        assert torch.equal(one["image"], two["image"]) and torch.equal(one["label"], two["label"])
        assert one["name"] == two["name"]


@pytest.mark.parametrize(("top", "kind"), [("", zipfile.ZIP_STORED), ("data/v 1/", zipfile.ZIP_DEFLATED)])
def test_a_zip_holds_the_folders_samples(folder, tmp_path, capsys, top, kind):
    path = zipped(folder, tmp_path / "data.ZIP", top, kind)
    said = []
    for data in (folder, path):
        assert main(["data", "check", str(data), "--sheet", "null", "--no-progress"]) == 0
        said.append(capsys.readouterr().out.partition("\n")[2])
        assert main(["data", "pack", str(data), f"{tmp_path}/{data.name} out", "--no-progress"]) == 0
        capsys.readouterr()
    assert said[0] == said[1] and "data: 6 label maps" in said[0]
    packs = [sorted((tmp_path / f"{data.name} out").iterdir()) for data in (folder, path)]
    assert [p.read_bytes() for p in packs[0]] == [p.read_bytes() for p in packs[1]] and len(packs[0]) == 5
    plain, found = SegmentationFolder(folder), open_dataset(str(path), "training")
    assert found.class_names == plain.class_names
    assert_equal_samples(pickle.loads(pickle.dumps(found)), plain)
    assert found.files[0][0] == path / top / "images" / "training" / "0.jpg"


def read_all(files) -> list[bytes]:
    return [file.read_bytes() for file in files]


def test_threads_and_forked_processes_read_the_same(folder, tmp_path):
    path = path_at(zipped(folder, tmp_path / "data.zip"))
    files = sorted(path.below()) * 20
    expected = read_all(folder / file.relative_to(path) for file in files)
    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(read_all, [files] * 8))
    if hasattr(os, "fork"):
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(read_all, [files] * 2) == [expected] * 2


def test_paths_in_zips_are_paths(folder, tmp_path):
    path = zipped(folder, tmp_path / "data.zip")
    inside = path_at(path / "images" / "training")
    assert isinstance(inside, ZipPath) and inside.is_dir() and not inside.is_file()
    assert sorted(child.name for child in inside.iterdir()) == ["0.jpg", "2.jpg", "sub"]
    picture = inside / "0.jpg"
    assert picture.stat().st_size == (folder / "images/training/0.jpg").stat().st_size
    assert picture.stat().st_mtime_ns == path.stat().st_mtime_ns == path_at(path).stat().st_mtime_ns
    assert not (inside / "no.jpg").exists() and not isinstance(path_at(folder), ZipPath)
    for other, error in ((inside / "no.jpg", FileNotFoundError), (inside, IsADirectoryError)):
        with pytest.raises(error):
            other.read_bytes()
    with pytest.raises(OSError, match=r"0\.jpg: in a zip, opened as w"):
        picture.open("w")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as outer:  # a zip within a zip is a file
        outer.write(path, "data.zip")
    assert path_at(tmp_path / "outer.zip" / "data.zip").is_file()
    (tmp_path / "folder.zip").mkdir()
    assert not isinstance(path_at(tmp_path / "folder.zip" / "a.jpg"), ZipPath)
    assert [str(found.file) for found in find_pictures([picture, f"{path}/images/validation"])] == [
        f"{path}/images/{name}" for name in ("training/0.jpg", "validation/0.jpg", "validation/sub/1.jpg")
    ]
    path.unlink()
    assert not picture.exists()
    with pytest.raises(FileNotFoundError, match="no such image file"):
        read_image(picture)


def changed(name: str = "b.png", data: str = "x", **fields):
    """Adds a member, of which the zip's list says something else."""

    def change(path):
        with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
            warnings.simplefilter("ignore")  # names that are there already
            archive.writestr(name, data, fields.pop("kind", None))
            for field, value in fields.items():
                setattr(archive.infolist()[-1], field, value)

    return change


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncated, "no whole zip (File is not a zip file)"),
        (lambda path: path.write_bytes(b""), "no whole zip (File is not a zip file)"),
        (changed(flag_bits=1), "'b.png' is encrypted, which is not read"),
        (changed(kind=zipfile.ZIP_LZMA), "'b.png' is compressed by method 14, expected 0 or 8"),
        (changed(compress_type=9), "'b.png' is compressed by method 9, expected 0 or 8"),
        (changed("../b.png"), "holds the name '../b.png', expected names below it"),
        (changed("/b.png"), "holds the name '/b.png', expected names below it"),
        (changed("a/./b.png"), "holds the name 'a/./b.png', expected names below it"),
        (changed("a\\b.png"), "holds the name 'a\\\\b.png', expected names below it"),
        (changed("a\n.png"), "holds the name 'a\\n.png', expected names below it"),
        (changed("C:b.png"), "holds the name 'C:b.png', expected names below it"),
        (changed("names.txt"), "holds 'names.txt' twice"),
        (changed("names.txt/b.png"), "'names.txt' is a file and a folder"),
    ],
)
def test_what_is_no_whole_zip_is_refused(folder, tmp_path, capsys, change, words):
    path = zipped(folder, tmp_path / "data.zip")
    change(path)
    out = str(tmp_path / "out")
    for command in ("data check {}", "data pack {} {}", "predict {} --checkpoint x --out {}"):
        assert main(command.format(path, out).split()) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{path}: {words}" in line
    assert not os.path.exists(out)


def lies(path, place: int, byte: int):
    """A byte of the member 0.jpg is another, counted from its header or, negative, from its end."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("images/training/0.jpg")
    data = bytearray(path.read_bytes())
    at = info.header_offset + (place if place >= 0 else 30 + len(info.filename) + info.compress_size + place)
    data[at] ^= byte
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "place", "byte", "words"),
    [
        (zipfile.ZIP_STORED, 0, 1, "its zip has other data in its place"),
        (zipfile.ZIP_STORED, -9, 1, "not the bytes that its zip has the checksum of"),
        (zipfile.ZIP_STORED, 28, 7, "not the bytes that its zip has the checksum of"),
        (zipfile.ZIP_DEFLATED, -200, 255, "damaged: "),
        (zipfile.ZIP_DEFLATED, 28, 7, "damaged: "),
    ],
)
def test_a_damaged_member_is_named(folder, tmp_path, capsys, kind, place, byte, words):
    path = zipped(folder, tmp_path / "data.zip", kind=kind)
    lies(path, place, byte)
    assert main(["data", "check", str(path), "--sheet", "null", "--no-progress"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}/images/training/0.jpg: cannot be decoded as an image (damaged: " in line and words in line
    dataset = SegmentationFolder(path, "validation", reduce_zero_label=False)  # the others are read
    assert len(dataset) == 2 and dataset[0]["label"].shape == (18, 20)
    with pytest.raises(ValueError, match=r"0\.jpg: cannot be decoded"):
        SegmentationFolder(path, "training", reduce_zero_label=False)[0]


def test_a_run_goes_on_with_a_zip(folder, tmp_path):
    words = ["--preset", "vit_tiny", "--image-size", "16", "--batch-size", "2", "--accelerator", "cpu"]
    words += ["--model", "{width: 8, depth: 1, heads: 1, taps: [0], patch_size: 8, decoder_depth: 1}"]
    words += ["--workers", "0", "--no-progress", "--log-every", "1", "--evaluate-every", "0"]
    words += ["--max-steps", "4", "--checkpoint-every", "2", "--keep-checkpoints", "all", "--resume"]
    path = zipped(folder, tmp_path / "data.zip", "data/")
    weights = []
    for data in (folder, path):
        assert main(["train", "--out", str(tmp_path / "run"), "--data", str(data), *words]) == 0
        weights.append((tmp_path / "run" / "checkpoints" / "4" / "model.safetensors").read_bytes())
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")  # the second step is the last that it knows
    assert weights[0] == weights[1]
    checkpoint = str(tmp_path / "run" / "checkpoints" / "2")
    assert main(["evaluate", "--checkpoint", checkpoint, "--data", str(path), "--accelerator", "cpu"]) == 0
