"""Every recipe: options that there are, the model that was published, training and evaluation in small."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from segvit.cli import main
from segvit.commands.parser import RECIPES, parse
from segvit.config import SegViTConfig
from segvit.data.known import KNOWN
from segvit.inference.passes import check_options
from segvit.model.segvit import SegViT
from segvit.options import EvaluateConfig, TrainConfig
from segvit.training.train import train

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
PUBLISHED = {
    "segvit-vit-b-ade20k-512": ("vit_b_ade20k_512", 150, 0.01, 160_000, 1, (512, 512, 341)),
    "segvit-vit-l-ade20k-640": ("vit_l_ade20k_640", 150, 0.01, 160_000, 1, (640, 640, 608)),
    "segvit-vit-l-shrunk-ade20k-640": ("vit_l_ade20k_640_shrunk", 150, 0.01, 160_000, 1, (640, 640, 608)),
    "segvit-vit-l-coco-stuff-10k-512": ("vit_l_cocostuff10k_512", 171, 0.02, 80_000, 2, (512, 512, 341)),
    "segvit-vit-l-shrunk-coco-stuff-10k-512": (
        "vit_l_cocostuff10k_512_shrunk",
        171,
        0.02,
        80_000,
        2,
        (512, 512, 341),
    ),
    "segvit-vit-l-pascal-context-480": ("vit_l_pascal_context_480", 60, 0.03, 80_000, 1, (520, 480, 320)),
    "segvit-vit-l-shrunk-pascal-context-480": (
        "vit_l_pascal_context_480_shrunk",
        60,
        0.03,
        80_000,
        1,
        (520, 480, 320),
    ),
}


def options(name: str) -> tuple[TrainConfig, EvaluateConfig]:
    data = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["data"]
    words = ["--recipe", name, "--data", f"{data}:somewhere"]
    return parse("train", [*words, "--out", "x"]), parse("evaluate", [*words, "--checkpoint", "x"])


def model_of(config: TrainConfig, classes: int) -> SegViT:
    fields = {"image_size": config.image_size, **config.model}
    with torch.device("meta"):
        return SegViT(SegViTConfig.preset(config.preset, classes, shrunk=config.shrunk, **fields))


@pytest.mark.parametrize("name", NAMES)
def test_its_options_make_a_model(name):
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert set(values) == {"about", "data", "train", "evaluate"} and values["data"] in KNOWN
    training, evaluation = options(name)
    model = model_of(training, len(KNOWN[values["data"]].classes.names))
    assert training.backbone_weights and training.max_steps >= 20_000
    check_options(evaluation, model.config.backbone.patch_size)
    assert evaluation.short_side >= training.image_size and evaluation.scales == [1.0]
    side = model.config.image_size[0] // model.config.backbone.patch_size
    pictures = torch.empty(1, 3, *model.config.image_size, device="meta")
    assert model(pictures).mask_logits.shape[-2:] == (side, side)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_ones_are_what_was_published(name, shared_dir):
    model, classes, decay, steps, power, protocol = PUBLISHED[name]
    training, evaluation = options(name)
    assert (training.weight_decay, training.max_steps, training.power) == (decay, steps, power)
    assert (evaluation.short_side, evaluation.window, evaluation.stride) == protocol
    shape = (
        training.lr,
        training.decoder_lr_scale,
        training.clip,
        training.warmup_steps,
        training.batch_size,
    )
    assert shape == (2e-5, 10, 35, 1500, 16) and training.warmup_lr == 1e-6 and training.scale == (0.5, 2)
    reference = json.loads((shared_dir / "reference" / "macs.json").read_text())[model]
    found = model_of(training, classes)
    dead = 2 * found.config.backbone.width  # published files have a class token that nothing reads
    assert sum(parameter.numel() for parameter in found.parameters()) + dead == reference["params"]
    assert found.config.image_size[0] == reference["image_size"]


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(name, tmp_path):
    training, evaluation = options(name)
    patch = training.model.get("patch_size", 16)
    small = {"width": 16, "depth": 3, "heads": 1, "decoder_heads": 1, "decoder_depth": 1}
    small |= {"shrink_at": 2} if training.shrunk else {"taps": (0, 1, 2)}
    config = dataclasses.replace(
        training,
        data="synthetic",
        out=str(tmp_path / "run"),
        backbone_weights=None,
        image_size=4 * patch,
        model={**training.model, **small},
        max_steps=3,
        batch_size=2,
        synthetic_images=4,
        synthetic_validation=2,
        workers=0,
        progress=False,
        accelerator="cpu",
    )
    result = train(config)
    assert result["step"] == 3 and result["miou"] >= 0
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3  # header, the loss, the evaluation
    # The recipe's protocol, on one picture.
    words = [
        "evaluate",
        "--recipe",
        name,
        "--data",
        "synthetic",
        "--synthetic-validation",
        "1",
        "--no-progress",
    ]
    words += ["--checkpoint", str(tmp_path / "run"), "--accelerator", "cpu", "--workers", "0"]
    assert main([*words, "--json", str(tmp_path / "result.json")]) == 0
    used = json.loads((tmp_path / "result.json").read_text())["inference"]
    assert used == evaluation.inference_fields() and used["short_side"]


def test_what_is_said_beside_a_recipe_wins(tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text("lr: 3.0e-5\npower: 3\n")
    words = ["--recipe", NAMES[0], "--config", str(other), "--data", "x", "--out", "y", "--lr", "1.0e-5"]
    config = parse("train", [*words, "--model.patch_size", "28"])
    assert (config.lr, config.power, config.model["patch_size"]) == (1e-5, 3, 28)
    assert config.model["class_token"] is True and config.image_size == 518
    assert main(["train", "--recipe", "segvit", "--data", "x", "--out", "y"]) == 2
    assert "--recipe: got 'segvit', expected one of dinov2-vit-b-ade20k-518, " in capsys.readouterr().err
    assert main(["predict", "x", "--recipe", NAMES[0], "--checkpoint", "y"]) == 2


def test_the_table_in_the_docs_has_them_all():
    text = (Path(__file__).resolve().parents[3] / "docs" / "train.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w-]+)` \| (.*) \| `([\w-]+):` \|$", text, re.MULTILINE)
    values = [(name, yaml.safe_load((RECIPES / f"{name}.yaml").read_text())) for name in NAMES]
    assert sorted(listed) == sorted((name, value["about"], value["data"]) for name, value in values)
