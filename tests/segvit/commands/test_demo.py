"""`segvit demo`, shortened to a few steps, and the page that it writes."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segvit.commands import demo
from segvit.config import BackboneConfig, SegViTConfig
from segvit.data.synthetic import CLASS_NAMES, SyntheticShapes
from segvit.demo import task
from segvit.demo.page import TITLE
from segvit.model.checkpoint import read_state_dict
from segvit.model.heads import load_model
from segvit.model.segvit import SegViT
from segvit.options import DemoConfig
from segvit.pictures import report
from segvit.training.evaluation import evaluate
from segvit_kernels import record_backends


@pytest.fixture
def small(monkeypatch):
    """Fewer pictures, and one thread (a second mostly waits); the rest as in the real demo."""
    for name, value in {"TRAINING_IMAGES": 24, "VALIDATION_IMAGES": 4, "TEST_IMAGES": 6}.items():
        monkeypatch.setattr(task, name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_demo_from_seed_to_report(small, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SEGVIT_KERNELS_BACKEND", raising=False)
    out = tmp_path / "demo"
    weights = []
    for _ in range(2):  # the second takes the place of the first, and is the same
        assert demo.run(DemoConfig(out=str(out), steps=3, accelerator="cpu")) == 0
        weights.append(read_state_dict(out / "run" / "checkpoints" / "last" / "model.safetensors"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert capsys.readouterr().out.splitlines()[-1] == str((out / "report.html").resolve())
    assert {path.name for path in out.iterdir()} == {"report.html", "run", "pictures"}
    assert len(list((out / "pictures").iterdir())) == 4
    html = (out / "report.html").read_text(encoding="utf-8")
    check_page(html)
    check_figures(html, out)


def check_figures(html: str, out: Path) -> None:
    """What the page says is what the saved model does on pictures that no seed of the training drew."""
    model, test = load_model(out / "run"), SyntheticShapes("validation", 6, task.IMAGE_SIZE, seed=1)
    with record_backends() as taken:
        score = evaluate(model, test)
    (backend,) = set().union(*taken.values())  # the one of this machine
    assert re.search(rf"Kernel backend</\w+>\s*<\w+[^>]*>{backend}<", html)
    assert f">{100 * score['miou']:.1f} %<" in html and f">{100 * score['accuracy']:.1f} %<" in html
    for index in range(4):
        right = (model.predict(test[index]["image"]) == test[index]["label"]).double().mean()
        assert f"{100 * right:.1f} % of pixels right" in html
        with Image.open(out / "pictures" / f"{index}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), test[index]["image"].permute(1, 2, 0).numpy())


def check_page(html: str) -> None:
    """Self-contained, complete, and with pictures that decode."""
    assert "http" not in html and "<script" not in html and "<link" not in html and "@import" not in html
    sources = re.findall(r'(?:src|href|data|srcset|poster|action)="([^"]*)"|url\(([^)]*)\)', html)
    assert sources and all(
        source.startswith("data:image/jpeg;base64,") and not url for source, url in sources
    )
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))) for source, _ in sources
    ]
    assert len(pictures) >= 4 * 4 + 2 * 5
    assert all(picture.shape[0] >= 96 and picture.std() > 1 for picture in pictures[:16])
    for name in CLASS_NAMES:
        assert (
            len(re.findall(rf"</span>{name}</(?:span|td)>", html)) == 2
        )  # the legend and the table of classes
    for text in ("Mean IoU", "Parameters", "MMAC", "stage 3", "ground truth", torch.__version__, "--seed 0"):
        assert text in html
    assert html.count("<polyline") == 2 and "nan" not in re.sub(r"base64,[^\"]*", "", html).lower()


@pytest.mark.parametrize(
    ("options", "message"), [({"steps": 0}, "steps: got 0"), ({"seed": -1}, "seed: got -1")]
)
def test_bad_options_leave_nothing(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        demo.run(DemoConfig(out=str(tmp_path / "demo"), accelerator="cpu", **options))
    assert not (tmp_path / "demo").exists()


def test_folders_that_cannot_be_used_are_named_and_left_alone(small, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("")
    with pytest.raises(ValueError, match="not from a demo"):
        demo.run(DemoConfig(out=str(tmp_path), steps=1, accelerator="cpu"))
    assert (tmp_path / "run" / "precious").exists()
    with pytest.raises(OSError, match="out: cannot write to folder"):
        demo.run(DemoConfig(out=str(tmp_path / "run" / "precious"), steps=1, accelerator="cpu"))


@pytest.mark.parametrize("name", ["report.html", "pictures/2.png"])
def test_files_of_others_are_not_replaced(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"precious")
    with pytest.raises(ValueError, match=f"{name} is there and not from a demo; choose another folder"):
        demo.run(DemoConfig(out=str(tmp_path), steps=1, accelerator="cpu"))
    assert path.read_bytes() == b"precious" and not (tmp_path / "run").exists()


def test_a_failed_demo_leaves_the_old_one(small, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    old = report.page(TITLE, "", ["old"])
    (tmp_path / "report.html").write_text(old)

    def fail(*_args, **_kwargs):
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr(demo, "train", fail)
    with pytest.raises(FloatingPointError):
        demo.run(DemoConfig(out=str(tmp_path), steps=1, accelerator="cpu"))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "report.html"}
    assert (tmp_path / "report.html").read_text() == old


@pytest.mark.parametrize(("size", "patch", "depth", "taps"), [(32, 8, 2, (1,)), (48, 16, 3, (0, 2))])
def test_multiply_accumulates_equal_the_sum_by_hand(size, patch, depth, taps):
    width, dim, layers, classes = 32, 16, 2, 5
    config = SegViTConfig(
        BackboneConfig(width=width, depth=depth, heads=2, patch_size=patch),
        classes,
        taps,
        decoder_dim=dim,
        decoder_heads=2,
        decoder_depth=layers,
        image_size=(size, size),
    )
    parts = task.multiply_accumulates(SegViT(config).eval(), size)
    tokens = (size // patch) ** 2
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    self_attention = 4 * classes * dim**2 + 2 * classes**2 * dim
    layer = self_attention + 2 * classes * dim**2 + 2 * tokens * dim**2 + 8 * classes * dim**2
    stage = tokens * width * dim + layers * layer + classes * dim * (classes + 1)
    assert list(parts.values()) == [
        3 * patch**2 * tokens * width,
        depth * block,
        len(taps) * layers * 2 * classes * tokens * dim,
        len(taps) * stage,
        classes**2 * size**2,
    ]
