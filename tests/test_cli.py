"""The command line: help, configuration files, and one line for every mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from segvit.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
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
    assert f"mean IoU  {100 * values['miou']:6.2f}" in table and "right" in table


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


def test_mistakes_in_options(tmp_path, capsys):
    assert fails(capsys, "train", "--out", "x").startswith("segvit train: error: ")
    assert "--max-steps: " in fails(
        capsys, "train", "--data", "synthetic", "--out", "x", "--max-steps", "many"
    )
    assert "--no-such" in fails(capsys, "train", "--data", "synthetic", "--out", "x", "--no-such", "1")
    assert "nowhere" in fails(capsys, "train", "--config", str(tmp_path / "nowhere.yaml"))
    (tmp_path / "bad.yaml").write_text("max_stepps: 3\n")
    assert "max_stepps" in fails(
        capsys, "train", "--config", str(tmp_path / "bad.yaml"), "--data", "x", "--out", "y"
    )
    assert "fly" in fails(capsys, "fly")


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
        "--warmup-steps",
        "0",
        "--clip",
        "null",
    )
    assert "the loss is not finite in step" in line


def test_checkpoints_that_do_not_fit(folder, checkpoint, tmp_path, capsys):
    words = ["evaluate", "--data", str(folder), "--no-progress", "--workers", "0", "--accelerator", "cpu"]
    assert "no checkpoint here" in fails(capsys, *words, "--checkpoint", str(tmp_path))
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


@pytest.mark.parametrize("module", ["jsonargparse", "torchvision", "lightning_fabric"])
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
