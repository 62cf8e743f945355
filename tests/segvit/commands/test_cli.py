"""The command line: help, configuration files, and one line for every mistake."""

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segvit.cli import COMMANDS, main
from segvit.config import SegViTConfig
from segvit.model.linear_head import LinearSegmenter

ROOT = Path(__file__).resolve().parents[3]
TINY = '{"width": 16, "depth": 2, "heads": 2, "taps": [0, 1], "patch_size": 8, "decoder_depth": 1}'
SMALL_RUN = [
    "--preset", "vit_tiny", "--model", TINY, "--image-size", "32", "--max-steps", "2", "--batch-size", "2",
    "--warmup-steps", "1", "--workers", "0", "--no-progress", "--synthetic-images", "4",
    "--accelerator", "cpu", "--synthetic-validation", "2", "--log-every", "1",
]  # fmt: skip


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100", **environment},
    )


def fails(capsys, *arguments):
    """The one line that a command with a mistake prints."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.fixture
def folder(tmp_path):
    """Two classes, two images in each split."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for split in ("training", "validation"):
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations" / split).mkdir(parents=True)
        for name in "ab":
            pixels = rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{name}.jpg")
            label = rng.integers(0, 3, (40, 36), dtype=np.uint8)
            Image.fromarray(label).save(root / "annotations" / split / f"{name}.png")
    (root / "names.txt").write_text("left\nright\n")
    return root


@pytest.fixture
def checkpoint(folder, tmp_path, capsys):
    assert main(["train", "--data", str(folder), "--out", str(tmp_path / "run"), *SMALL_RUN]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_help_needs_no_torch():
    for words in ([], ["train"], ["evaluate"], ["predict"], ["demo"]):
        script = (
            "import sys\nfrom segvit.cli import main\n"
            f"try:\n    main({[*words, '--help']})\n"
            "finally:\n    print('torch' in sys.modules, file=sys.stderr)"
        )
        done = python("-c", script)
        assert done.returncode == 0 and done.stderr.split() == ["False"], done.stderr
        if words:
            assert f"usage: segvit {words[0]}" in done.stdout
            for name in COMMANDS[words[0]][0].__dataclass_fields__:
                assert f"--{name.replace('_', '-')}" in done.stdout or name == "images"
            assert "type:" not in done.stdout and "null" not in done.stdout
        else:
            assert all(command in done.stdout for command in COMMANDS)


def test_train_then_evaluate(folder, checkpoint, tmp_path, capsys):
    saved = yaml.safe_load((checkpoint / "config.yaml").read_text())
    assert saved["max_steps"] == 2 and saved["model"]["width"] == 16
    config = json.loads((checkpoint / "checkpoints/best/config.json").read_text())
    assert config["class_names"] == ["left", "right"]
    result = tmp_path / "result.json"
    words = ["evaluate", "--data", str(folder), "--checkpoint", str(checkpoint), "--json", str(result)]
    options = ["--window", "16", "--no-progress", "--workers", "1", "--accelerator", "cpu"]
    assert main([*words, *options]) == 0
    table = capsys.readouterr().out
    values = json.loads(result.read_text())
    assert values["images"] == 2 and set(values["iou"]) == {"left", "right"}
    protocol = {"window": 16, "stride": None, "scales": [1.0], "flip": False, "short_side": None}
    assert values["inference"] == protocol
    assert f"mean IoU{'':16}{100 * values['miou']:6.2f}" in table and "right" in table


def test_what_evaluate_measures(tmp_path, capsys):
    """A model that says class 0 everywhere; class 2 is in no label. Written before anything is printed."""
    names = ("sky", "\u9053\u8def", "sea")
    config = SegViTConfig.preset(
        "vit_tiny", 3, width=16, depth=1, heads=1, taps=(0,), image_size=32, class_names=names
    )
    model = LinearSegmenter(config)
    model.decoder[1].weight.data.zero_()
    model.decoder[1].bias.data.copy_(torch.tensor([1.0, 0, 0]))
    model.save_pretrained(tmp_path / "model")
    for kind in ("images", "annotations"):
        (tmp_path / kind / "validation").mkdir(parents=True)
    label = np.ones((32, 32), np.uint8)
    label[:8], label[8:10] = 2, 255
    Image.fromarray(label).save(tmp_path / "annotations/validation/a.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "images/validation/a.png")
    (tmp_path / "names.txt").write_text("\n".join(names), encoding="utf-8")
    files = {name: tmp_path / name for name in ("r.json", "c.csv", "m.csv", "m.png")}
    words = ["evaluate", "--data", str(tmp_path), "--checkpoint", str(tmp_path / "model"), "--workers", "0"]
    words += ["--no-progress", "--accelerator", "cpu", "--reduce-zero-label", "--json", str(files["r.json"])]
    words += ["--csv", str(files["c.csv"]), "--confusion", str(files["m.csv"]), str(files["m.png"])]
    assert main(words) == 0
    printed = capsys.readouterr().out
    values = json.loads(files["r.json"].read_text())
    assert values["confusion"] == [[704, 0, 0], [256, 0, 0], [0, 0, 0]] and values["ignored"] == 64
    assert values["iou"] == {"sky": 704 / 960, names[1]: 0, "sea": None}
    assert values["precision"] == {"sky": 704 / 960, names[1]: None, "sea": None}
    assert values["recall"] == {"sky": 1, names[1]: 0, "sea": None} and values["mean_recall"] == 0.5
    assert values["dice"]["sky"] == 2 * 704 / (960 + 704) and values["pixels"]["sea"] == 0
    assert values["frequency_weighted_iou"] == pytest.approx(704 / 960 * 704 / 960)
    assert "not in the labels: sea" in printed and "predicted all the same" not in printed
    assert f"mean IoU{'':16}{100 * 704 / 960 / 2:6.2f}" in printed
    table = list(csv.reader(files["c.csv"].open(encoding="utf-8")))
    assert table[0] == ["class", "iou", "dice", "precision", "recall", "pixels", "predicted"]
    assert table[2] == [names[1], "0.0", "0.0", "", "0.0", "256", "0"]
    matrix = list(csv.reader(files["m.csv"].open(encoding="utf-8")))
    assert matrix == [
        ["true class", *names],
        ["sky", "704", "0", "0"],
        [names[1], "256", "0", "0"],
        ["sea", *"000"],
    ]
    with Image.open(files["m.png"]) as picture:
        picture.load()

    assert main(words) == 0  # its own results are replaced
    capsys.readouterr()
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    for option, path, message in (
        ("--json", tmp_path / "model/config.json", "is read and would be overwritten"),
        ("--csv", tmp_path / "names.txt", "is read and would be overwritten"),
        ("--confusion", tmp_path / "a.pdf", "expected a file .csv or .png"),
        ("--confusion", files["r.json"], "expected a file .csv or .png"),
        ("--csv", files["r.json"], "is asked for twice"),
        ("--csv", tmp_path / "c.png", f"got {tmp_path / 'c.png'}, expected a file .csv"),
        ("--json", tmp_path / "r.CSV", "expected a file .json"),
        ("--csv", tmp_path / "no/c.csv", "its folder does not exist"),
        ("--json", tmp_path, "is a folder, expected a file"),
        ("--json", tmp_path / "notes.json", "is there already and no such result; choose another file"),
        ("--json", files["c.csv"].rename(tmp_path / "classes"), "is there already and no such result"),
        ("--csv", files["m.csv"].rename(tmp_path / "matrix.csv"), "is there already and no such result"),
        ("--confusion", tmp_path / "images/validation/a.png", "is there already and no such result"),
    ):
        line = fails(capsys, *words, option, str(path))
        assert line.startswith(f"segvit evaluate: error: {option[2:]}: ")
        assert message in line
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    files["r.json"].unlink()
    with contextlib.redirect_stdout(Full()):
        assert main(words) == 2
    complaint, lost = capsys.readouterr().err.split("\n", 1)
    assert complaint == "segvit evaluate: error: standard output took no more (No space left on device)"
    assert "mean IoU" in lost and json.loads(files["r.json"].read_text()) == values


def test_config_file_and_options_after_it(tmp_path, capsys):
    file = tmp_path / "tiny.yaml"
    file.write_text(
        yaml.safe_dump(
            {"data": "synthetic", "preset": "vit_tiny", "model": json.loads(TINY), "image_size": 32,
             "max_steps": 3, "batch_size": 1, "workers": 0, "progress": False, "synthetic_images": 3,
             "synthetic_validation": 1, "scale": [1.0, 1.5], "accelerator": "cpu",
             "out": str(tmp_path / "other")}
        )
    )  # fmt: skip
    assert main(["train", "--config", str(file), "--out", str(tmp_path / "run"), "--max-steps", "1"]) == 0
    assert "finished at step 1 " in capsys.readouterr().out
    assert not (tmp_path / "other").exists()
    # The run's own config.yaml is such a file too.
    assert main(["train", "--config", str(tmp_path / "run/config.yaml"), "--resume"]) == 0
    assert "finished at step 1 " in capsys.readouterr().out


RUN = ["train", "--data", "nowhere", "--out", "x"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-steps", "many"], "--max-steps: got 'many', expected a whole number"),
        (["--max-steps", "1.5"], "--max-steps: got '1.5', expected a whole number"),
        (["--max-steps", "9" * 30], "--max-steps: got '999"),
        (["--max-steps", ""], "--max-steps: got nothing, expected a whole number"),
        (["--lr", "nan"], "--lr: got 'nan', expected a number"),
        (["--lr", "1e999"], "--lr: got '1e999', expected a number"),
        (["--betas", "[0.9, a]"], "--betas: got [0.9, 'a'], expected 2 numbers in brackets"),
        (["--betas", "0.9"], "--betas: got '0.9', expected 2 numbers"),
        (["--model", "5"], "--model: got '5', expected a mapping {key: value}"),
        (["--model", "{a: 1, a: 2}"], "--model: line 1: the key 'a' occurs twice"),
        (["--model", "{a: 1"], "--model: not YAML: "),
        (
            ["--precision", "bf61"],
            "--precision: got 'bf61', expected one of 32, bf16, fp16; did you mean bf16?",
        ),
        (["--label-mapping", "{a: 1}"], "--label-mapping: got {'a': 1}, expected a text"),
        (["--names", " "], "--names: got ' ', expected a text that is not empty"),
        (["--no-such", "1"], "--no-such: no such option"),
        (["--max-stepp", "1"], "--max-stepp: no such option; did you mean --max-steps?"),
        (["--max-steps"], "--max-steps: expected one argument"),
        (["--max-steps=--"], "--max-steps: got '--', expected a whole number"),
        (["--lr", "-1e-3"], "lr: got -0.001, expected more than 0"),
        (["--names", "a\0b"], "--names: got 'a\\x00b', expected a text"),
        (["--model.width"], "--model.width: expected a value after it"),
        (["--flip", "maybe"], "got 'maybe' where no argument is expected"),
        (["--config", "none.yaml"], "none.yaml: no such file"),
        (["--config", ""], "--config: got '', expected a YAML file"),
    ],
)
def test_mistakes_in_options(capsys, words, message):
    line = fails(capsys, *RUN, *words)
    assert line.startswith(f"segvit train: error: {message}")
    assert not Path("x").exists()


def test_mistakes_before_the_options(capsys):
    assert fails(capsys, "train", "--out", "x") == "segvit train: error: missing: --data (see --help)"
    assert "missing: IMAGES, --checkpoint" in fails(capsys, "predict")
    assert fails(capsys, "fly").startswith("segvit: error: no command 'fly'; expected train, evaluate, ")
    assert fails(capsys, "trian") == "segvit: error: no command 'trian'; did you mean train?"
    assert "expected a command" in fails(capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_step: 3\n", "line 1: no option 'max_step'; did you mean max_steps?"),
        ("data: x\nlr: 1\nlr: 2\n", "line 3: lr occurs twice"),
        ("max-steps: 1\nmax_steps: 2\n", "line 2: max_steps occurs twice"),
        ("\nmax_steps: many\n", "line 2: max_steps: got 'many', expected a whole number"),
        ("flip: maybe\n", "line 1: flip: got 'maybe', expected true or false"),
        ("data: [1]\n", "line 1: data: got [1], expected a text that is not empty"),
        ("data: null\n", "line 1: data: got 'null', expected a text"),
        ("data:\n", "line 1: data: got '', expected a text"),
        ("scale: [1, 2, 3]\n", "line 1: scale: got [1, 2, 3], expected 2 numbers"),
        ("model:\n  width: 1\n  width: 2\n", "line 3: the key 'width' occurs twice"),
        ("- a\n", "got ['a'], expected options (key: value)"),
        ("# nothing\n", "the file is empty, expected options (key: value)"),
        ("train: {lr: 1}\n", "line 1: no option 'train'"),
    ],
)
def test_mistakes_in_configuration_files(tmp_path, capsys, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    line = fails(capsys, *RUN, "--config", str(path))
    assert line.startswith(f"segvit train: error: {path}: {message}")


def options_of(capsys, *words):
    """What --print-config says."""
    assert main([words[0], "--print-config", *words[1:]]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_configuration_files_as_editors_write_them(tmp_path, capsys):
    text = (
        "# mine\r\nlr: 1e-4\r\nflip: no\r\nresume: on\r\nprecision: 32\r\nout: 2024-01-01\r\ndata: no\r\n"
        "max-steps: 1e3\r\nmodel.key_positions: true\r\nnames: ~\r\nlabel_mapping: {7: 0}\r\n"
        "betas: [0.9, 0.98]  \r\n"
    )
    expected = {
        "lr": 1e-4, "flip": False, "resume": True, "precision": "32", "out": "2024-01-01", "data": "no",
        "max_steps": 1000, "names": None, "model": {"key_positions": True}, "label_mapping": {7: 0},
        "betas": [0.9, 0.98],
    }  # fmt: skip
    path = tmp_path / "mine.yaml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(text.encode(encoding))
        values = options_of(capsys, "train", "--config", str(path))
        assert {name: values[name] for name in expected} == expected
    path.write_text(text.replace("names: ~", "model: {width: 8}"))  # behind an entry of it
    model = options_of(capsys, "train", "--config", str(path))["model"]
    assert model == {"width": 8, "key_positions": True}
    path.write_text(text)
    words = ["--lr", "3", "--model.width", "16", "--config", str(path), "--flip", "--names", "null"]
    values = options_of(capsys, "train", *words)
    assert values["lr"] == 3 and values["flip"] and values["model"] == {"key_positions": True, "width": 16}


def test_words_that_look_like_options(capsys):
    words = ["predict", "a.png", "--checkpoint", "x", "b.png", "--out=-x", "--", "-c.png", "--out"]
    values = options_of(capsys, *words)
    assert values["images"] == ["a.png", "b.png", "-c.png", "--out"] and values["out"] == "-x"
    values = options_of(capsys, "convert", "in.pth", "--model", "{heads: 2}", "out")
    assert (values["checkpoint"], values["out"], values["model"]) == ("in.pth", "out", {"heads": 2})


def test_mistakes_in_data(folder, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    assert "nowhere: no such folder" in fails(capsys, "train", "--data", "nowhere", *out, *SMALL_RUN)
    assert not (tmp_path / "run").exists()

    label = folder / "annotations/training/a.png"
    good = label.read_bytes()
    Image.fromarray(np.full((40, 36), 7, dtype=np.uint8)).save(label)
    line = fails(capsys, "train", "--data", str(folder), *out, *SMALL_RUN)
    assert "annotations/training/a.png: label value 7" in line and "2 classes" in line
    label.unlink()
    line = fails(capsys, "train", "--data", str(folder), *out, *SMALL_RUN)
    assert "images/training/a.jpg: image without label" in line
    label.write_bytes(good)

    image = folder / "images/training/b.jpg"
    image.write_bytes(image.read_bytes()[:-60])
    for workers in ("0", "1"):  # also from a loading process
        line = fails(capsys, "train", "--data", str(folder), *out, *SMALL_RUN, "--workers", workers)
        assert "images/training/b.jpg: cannot be decoded" in line
    assert not (tmp_path / "run" / "checkpoints" / "last").exists()


def test_a_run_does_not_go_into_the_folder_of_a_model(tmp_path, capsys):
    """Commands would go on to take the model that was there."""
    (tmp_path / "config.json").write_text("{}")
    line = fails(capsys, "train", "--data", "synthetic", *SMALL_RUN, "--out", str(tmp_path))
    assert line.endswith(f"out: {tmp_path} holds a model (config.json); choose another folder for the run")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_mistakes_in_folders_and_numbers(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["train", "--data", "synthetic", *SMALL_RUN]
    assert "out: cannot write to" in fails(capsys, *words, "--out", str(tmp_path / "file" / "run"))
    line = fails(
        capsys,
        *words,
        "--out",
        str(tmp_path / "nan"),
        "--lr",
        "1e30",
        "--weight-decay",
        "0",
        "--warmup-steps",
        "0",
        "--clip",
        "null",
    )
    assert "the loss is not finite in step" in line


def test_checkpoints_that_do_not_fit(folder, checkpoint, tmp_path, capsys):
    words = ["evaluate", "--data", str(folder), "--no-progress", "--workers", "0", "--accelerator", "cpu"]
    assert "no checkpoint in this folder" in fails(capsys, *words, "--checkpoint", str(tmp_path))
    assert "its folder does not exist" in fails(
        capsys, *words, "--checkpoint", str(checkpoint), "--json", str(tmp_path / "no" / "r.json")
    )
    path = checkpoint / "checkpoints/best/config.json"
    good = path.read_text()
    path.write_text(json.dumps({**json.loads(good), "decoder_depth": 2}))
    line = fails(capsys, *words, "--checkpoint", str(checkpoint))
    assert "missing (decoder.stages." in line and "best/model.safetensors" in line
    path.write_text(good)
    (folder / "names.txt").write_text("left\nwrong\n")
    assert "class 1 is 'right' in the checkpoint but 'wrong'" in fails(
        capsys, *words, "--checkpoint", str(checkpoint)
    )
    (folder / "names.txt").write_text("a\nb\nc\n")
    assert "the checkpoint has 2 classes, the data 3" in fails(
        capsys, *words, "--checkpoint", str(checkpoint)
    )


@pytest.mark.parametrize("module", ["yaml", "torchvision", "lightning_fabric"])
def test_missing_extra_is_named(tmp_path, module):
    words = ["train", "--data", "synthetic", "--out", str(tmp_path / "run"), *SMALL_RUN]
    script = (
        f"import sys\nsys.modules[{module!r}] = None\nfrom segvit.cli import main\nsys.exit(main({words!r}))"
    )
    done = python("-c", script)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line == (
        f"segvit train: error: {module} is not installed; it comes with: pip install 'segvit-kernels[train]'"
    )
    assert not (tmp_path / "run").exists()


def test_module_runs_as_the_command():
    done = python("-m", "segvit", "train", "--out", "x")
    assert done.returncode == 2 and done.stderr.startswith("segvit train: error: ")


@pytest.mark.parametrize("by_option", [True, False])
@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "serve", "demo", "bench"])
def test_a_backend_that_cannot_run_here(tmp_path, capsys, monkeypatch, command, by_option):
    """Of the environment as of an option: one line, before anything is written."""
    out, picture = str(tmp_path / "out"), tmp_path / "a.png"
    monkeypatch.setattr("segvit_kernels.why_not", lambda name, device: f"no {name} on {device}")
    Image.new("RGB", (8, 8)).save(picture)
    words = {
        "train": ["--data", "synthetic", "--out", out, *SMALL_RUN],
        "evaluate": ["--data", "synthetic", "--checkpoint", out, "--accelerator", "cpu", "--json", out],
        "predict": [str(picture), "--checkpoint", out, "--out", out, "--accelerator", "cpu"],
        "serve": [out, "--port", "0", "--accelerator", "cpu"],
        "demo": ["--out", out, "--accelerator", "cpu"],
        "bench": ["vit_tiny", "--accelerator", "cpu", "--json", out],
    }[command]
    for name, reason in (("cuda", "'cuda' is not available: no cuda on cpu"), ("abacus", "'abacus'")):
        if not by_option:
            monkeypatch.setenv("SEGVIT_KERNELS_BACKEND", name)
        elif command == "demo":
            continue
        line = fails(capsys, command, *words, *(["--backend", name] if by_option else []))
        assert ("backend: " if by_option else "variable SEGVIT_KERNELS_BACKEND") in line and reason in line
    assert not (tmp_path / "out").exists()
