"""Shards: a folder's samples in its order, packed again to the same bytes, trained from and resumed."""

import json
import pickle
import shutil
import sys
import tarfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from segvit.cli import main
from segvit.data import SegmentationFolder, open_dataset
from segvit.data.pack import _keys
from segvit.data.shards import Shards
from segvit.options import TrainConfig
from segvit.training.run_folder import samples_of
from segvit.training.train import train

NAMES = ("sky", "road", "tree")


@pytest.fixture
def folder(tmp_path):
    """Pictures of several kinds: turned by EXIF, in folders, with like names and dots in them."""
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    names = ["a.jpg", "b.png", "b.c.png", "b_c.jpg", "sub/a.JPG", "sub/d.png", "e.png"]
    for split in ("training", "validation"):
        for number, name in enumerate(names[: 7 if split == "training" else 3]):
            picture = root / "images" / split / name
            label = root / "annotations" / split / f"{name.rpartition('.')[0]}.png"
            for path in (picture, label):
                path.parent.mkdir(parents=True, exist_ok=True)
            size = (40 + number, 36)
            pixels = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
            exif = Image.Exif()
            exif[0x0112] = 6 if name == "a.jpg" else 1
            Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(picture, exif=exif)
            values = rng.choice([0, 1, 2, 255], (6, 7)).astype(np.uint8)
            stored = Image.fromarray(values).resize(size[::-1] if name == "a.jpg" else size, 0)
            stored.save(label)
    (root / "names.txt").write_text("sky 1 2 3\nroad 4 5 6\ntree 7 8 9\n")
    return root


def pack(folder, out, *words) -> str:
    assert main(["data", "pack", str(folder), str(out), "--pictures", "3", "--no-progress", *words]) == 0
    return str(out)


def assert_same_samples(shards, other):
    assert len(shards) == len(other) and len(shards) > 0
    for one, two in zip(
        (shards[i] for i in range(len(shards))), (other[i] for i in range(len(other))), strict=True
    ):
        assert one["name"] == two["name"]
        for key in ("image", "label"):
            assert one[key].dtype == two[key].dtype and torch.equal(one[key], two[key])


def contents(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_shards_hold_the_folders_samples_in_its_order(folder, tmp_path, capsys):
    out = tmp_path / "shards"
    pack(folder, out)
    assert capsys.readouterr().out.endswith(
        f"7 pictures of training, 3 pictures of validation in 4 shards: --data '{out}/{{00000..00003}}.tar'\n"
    )
    for split in ("training", "validation"):
        plain = SegmentationFolder(folder, split)
        for data in (str(out), f"{out}/{{00000..00003}}.tar", f"{out}/*.tar"):
            shards = open_dataset(data, split, names=None, reduce_zero_label="auto", num_classes=3)
            assert_same_samples(pickle.loads(pickle.dumps(shards)), plain)
            assert (shards.class_names, shards.palette) == (plain.class_names, plain.palette)
    assert (shards[0]["label"] == 255).any()
    other = Shards(str(out), "validation", ignore_index=-1)
    assert torch.equal(other[0]["label"] == -1, shards[0]["label"] == 255)
    sizes = [len(json.loads((out / f"{number:05d}.json").read_text())["names"]) for number in range(4)]
    assert sizes == [2, 2, 3, 3]
    keys = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                base, _, kind = member.name.rpartition("/")[2].partition(".")
                keys.setdefault((path.name, member.name.rpartition("/")[0], base), set()).add(kind)
    assert len(keys) == 10 and all(len(kinds) == 2 and "label.png" in kinds for kinds in keys.values())
    with tarfile.open(out / "00000.tar") as tar:
        assert (
            tar.extractfile("images/training/a.jpg").read() == (folder / "images/training/a.jpg").read_bytes()
        )


def test_packing_goes_on_and_gives_the_same_bytes(folder, tmp_path, capsys, monkeypatch):
    out, again = tmp_path / "shards", tmp_path / "again"
    pack(folder, out)
    expected = contents(out)
    kept = (out / "00000.tar").stat().st_mtime_ns
    (out / "00001.json").unlink()  # a kill came before the index, and one within a shard
    (out / ".00002.tar.0123abcd.tmp").write_bytes(expected.pop("00002.tar")[:700])
    expected["00002.tar"] = (out / "00002.tar").rename(tmp_path / "00002.tar").read_bytes()
    time.sleep(0.01)
    pack(folder, out)
    assert "in 4 shards, 2 were there" in capsys.readouterr().out
    assert contents(out) == expected and (out / "00000.tar").stat().st_mtime_ns == kept
    shutil.copytree(folder, tmp_path / "elsewhere")
    pack(tmp_path / "elsewhere", again)
    assert contents(again) == expected
    Image.new("L", (46, 36)).save(folder / "annotations" / "training" / "e.png")
    assert main(["data", "pack", str(folder), str(out), "--pictures", "3", "--no-progress"]) == 2
    assert f"out: {out} holds shards of other data" in capsys.readouterr().err
    (folder / "images" / "training" / "b.png").write_bytes(b"no picture")
    assert main(["data", "pack", str(folder), str(tmp_path / "x"), "--no-progress"]) == 2
    assert "b.png: not a picture" in capsys.readouterr().err and not list(tmp_path.glob("x/*.tar"))

    def taken(path):
        raise BlockingIOError

    monkeypatch.setattr("segvit.commands.data_pack.locked", taken)
    assert main(["data", "pack", str(tmp_path / "elsewhere"), str(out), "--no-progress"]) == 2
    assert f"out: another pack runs in {out}" in capsys.readouterr().err


def test_files_of_others_are_not_replaced(folder, tmp_path, capsys):
    """Shards of WebDataset have such names too."""
    out = tmp_path / "shards"
    out.mkdir()
    others = [out / ".other.tmp", out / "00001.json", out / "00000.tar"]
    for number, path in enumerate(others):
        path.write_bytes(b"precious")
        if number:
            assert main(["data", "pack", str(folder), str(out), "--pictures", "3", "--no-progress"]) == 2
            error = capsys.readouterr().err
            assert f"out: {path} is there already and no shard of these data; choose" in error
    assert contents(out) == {path.name: b"precious" for path in others}


def test_no_sample_has_the_name_of_another(tmp_path):
    files = [(tmp_path / name, tmp_path / "label.png") for name in ("a.jpg", "a.png", "a_2.jpg", "b/a.c.jpg")]
    assert _keys(SimpleNamespace(root=tmp_path, files=files)) == ["a", "a_3", "a_2", "b/a_c"]


def test_many_classes_and_known_data_sets(tmp_path, shared_dir):
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / "many" / kind / split).mkdir(parents=True)
        Image.new("RGB", (300, 1)).save(tmp_path / "many" / "images" / split / "a.png")
        values = np.arange(300, dtype=np.uint16)[None]
        Image.fromarray(values).save(tmp_path / "many" / "annotations" / split / "a.png")
    (tmp_path / "many" / "names.txt").write_text("".join(f"class {i}\n" for i in range(300)))
    words = ["--ignore-index", "-1", "--no-reduce-zero-label"]
    pack(tmp_path / "many", tmp_path / "out", *words)
    shards = Shards(str(tmp_path / "out"), ignore_index=-1)
    assert shards[0]["label"][0].tolist() == list(range(300)) and shards.num_classes == 300
    folder = f"ade20k:{shared_dir / 'data' / 'samples' / 'ade20k'}"
    pack(folder, tmp_path / "ade20k")
    for split in ("training", "validation"):
        assert_same_samples(Shards(str(tmp_path / "ade20k"), split), SegmentationFolder(folder, split))


def test_a_run_is_the_same_from_shards_and_goes_on_with_them(folder, tmp_path):
    model = {"width": 8, "depth": 1, "heads": 1, "taps": [0], "patch_size": 8, "decoder_depth": 1}
    shards = pack(folder, tmp_path / "shards")

    def run(out, data, **changes):
        train(
            TrainConfig(
                data=str(data), out=str(tmp_path / out), preset="vit_tiny", model=model, image_size=16,
                max_steps=8, batch_size=2, warmup_steps=1, log_every=1, evaluate_every=0, checkpoint_every=4,
                keep_checkpoints="all", workers=0, progress=False, accelerator="cpu", **changes,
            )
        )  # fmt: skip
        rows = (tmp_path / out / "metrics.csv").read_text().splitlines()
        weights = (tmp_path / out / "checkpoints" / "8" / "model.safetensors").read_bytes()
        return [row.split(",")[:3] for row in rows], weights

    expected = run("folder", folder)
    assert len(expected[0]) > 8
    assert run("shards", f"{shards}/{{00000..00003}}.tar") == expected
    said = [json.loads((tmp_path / out / "data.json").read_text()) for out in ("folder", "shards")]
    assert said[0] == said[1] and said[0]["labels"]["seen"] == [0, 1, 2, 255]
    shutil.copytree(tmp_path / "folder", tmp_path / "both", symlinks=True)
    shutil.rmtree(tmp_path / "both" / "checkpoints" / "8")  # the fourth step is the last that it knows
    assert run("both", shards, resume=True) == expected


def test_what_is_wrong_with_shards_is_one_line(folder, tmp_path, capsys):
    out = tmp_path / "shards"
    data = f"{pack(folder, out)}/{{00000..00003}}.tar"
    for changes in (
        {"names": "x"},
        {"label_mapping": {0: 1}},
        {"reduce_zero_label": True},
        {"split_list": "x"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}: not with shards"):
            open_dataset(data, "training", **changes)
    with pytest.raises(FileNotFoundError, match=r"no shard of test \(splits here: training, validation\)"):
        Shards(data, "test")
    with pytest.raises(ValueError, match=r"data: got \{3\.\.1\} in"):
        Shards(f"{out}/{{3..1}}.tar")
    with pytest.raises(FileNotFoundError, match=r"00004\.tar: no such shard"):
        Shards(f"{out}/{{00000..00004}}.tar")
    whole = (out / "00001.tar").read_bytes()
    assert main(["data", "check", data, "--no-progress"]) == 0
    printed = capsys.readouterr().out
    assert "data: 7 pictures of training in 3 shards, 3 classes" in printed and "\nsky" in printed
    place = json.loads((out / "00001.json").read_text())["pictures"][0][0]
    (out / "00001.tar").write_bytes(whole[:place] + bytes(20) + whole[place + 20 :])
    assert main(["data", "check", data, "--no-progress"]) == 2
    assert "00001.tar: images/training/b.png: not a picture" in capsys.readouterr().err
    (out / "00001.tar").write_bytes(whole[:-512])
    message = f"{len(whole) - 512:,} bytes, {len(whole):,} when it was written: truncated or changed"
    for given in (data, str(out)):
        with pytest.raises(ValueError, match=rf"00001\.tar: {message}"):
            Shards(given)
    (out / "00001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"00001\.tar: no such shard"):
        Shards(str(out), "validation")
    (out / "00001.tar").write_bytes(whole)
    (out / "00001.json").write_text('{"split": "training"}')
    with pytest.raises(
        ValueError, match=r"00001\.json: no index of a shard \(names, pictures, labels, bytes"
    ):
        Shards(data)
    (out / "00001.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"00001\.json: no such file; it is the index of 00001\.tar"):
        Shards(data)


def test_shards_say_what_the_labels_meant(folder, tmp_path):
    out = tmp_path / "shards"
    pack(folder, out, "--validation-share", "0.3")
    for split in ("training", "validation"):
        plain, shards = SegmentationFolder(folder, split), Shards(str(out), split)
        plain.check()
        assert shards.meaning() == plain.meaning() and shards.validation_share == 0.3
    path = out / "00003.json"
    index = json.loads(path.read_text())
    wrongs = ("meaning", {"values": {"0": "sky"}}), ("validation_share", 2), ("names", ["\ud800"] * 3)
    for name, wrong in wrongs:
        path.write_text(json.dumps({**index, name: wrong}))
        with pytest.raises(ValueError, match=rf"00003\.json: no index of a shard \({name} of another form"):
            Shards(str(out))
    path.write_text(json.dumps(index))
    for path in out.glob("0*.json"):  # of an earlier version
        index = json.loads(path.read_text())
        del index["meaning"], index["validation_share"]
        path.write_text(json.dumps(index))
    shards = Shards(str(out))
    assert shards.meaning() is None and shards.validation_share is None
    assert samples_of(shards, shards)["labels"] is None


@pytest.fixture
def elsewhere(folder, tmp_path):
    """Shards at addresses in memory."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.put(pack(folder, tmp_path / "shards"), "/bucket/shards", recursive=True)
    yield system, "memory://bucket/shards"
    system.rm("/bucket", recursive=True)


@pytest.mark.parametrize("data", ["", "/", "/*.tar", "/{00000..00003}.tar"])
def test_shards_at_an_address(folder, elsewhere, data):
    _, address = elsewhere
    for split in ("training", "validation"):
        shards = open_dataset(f"{address}{data}", split)
        assert_same_samples(pickle.loads(pickle.dumps(shards)), SegmentationFolder(folder, split))
    names = [name for _, name in Shards(address).files]
    assert names == [name for _, name in Shards(str(folder.parent / "shards")).files]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda system, tar: system.rm(tar), "00001.tar: no such shard"),
        (lambda system, tar: system.pipe(tar, system.cat(tar)[:-9]), "00001.tar: .* truncated or changed"),
        (
            lambda system, tar: system.rm(tar.replace("tar", "json")),
            "00001.json: no such file; it is the index",
        ),
        (lambda system, tar: system.pipe(tar.replace("tar", "json"), b"\xff"), "00001.json: no text"),
    ],
)
def test_a_damaged_shard_at_an_address_is_named(elsewhere, damage, words):
    system, address = elsewhere
    damage(system, "/bucket/shards/00001.tar")
    with pytest.raises((ValueError, OSError), match=f"^{address}/{words}"):
        Shards(address)


def test_addresses_that_nothing_reads(elsewhere, capsys, monkeypatch):
    for address, words in (
        ("memory://nothing/here", "memory://nothing/here/shards.json: no such file"),
        ("nowhere://a/{0..1}.tar", "nowhere://a/0.tar: Protocol not known: nowhere"),
    ):
        assert main(["data", "check", address]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    assert main(["data", "check", elsewhere[1]]) == 2
    assert "it comes with: pip install 'segvit-kernels[remote]'" in capsys.readouterr().err
