"""`--dtype` of the commands that run a model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import segvit_kernels
from segvit import SegViT, SegViTConfig
from segvit.cli import main
from segvit.config import BackboneConfig
from segvit.inference.engine import check_precision, in_precision
from segvit_kernels import PackedLinear, _native

CPU = torch.device("cpu")
INT8 = pytest.mark.skipif(not _native.runs_isa("avx2"), reason="int8: no kernels here")
BACKENDS = {"bfloat16": "eager", "float16": "eager", "int8": "cpu"}
PRECISIONS = ["bfloat16", "float16", pytest.param("int8", marks=INT8)]


def tiny_model():
    torch.manual_seed(0)
    backbone = BackboneConfig(width=64, depth=2, heads=2, patch_size=8)
    config = SegViTConfig(
        backbone, num_classes=12, image_size=32, taps=(0, 1), decoder_dim=32, decoder_heads=2
    )
    return SegViT(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_predict_runs_the_network_in_it(dtype, checkpoint, picture, tmp_path):
    """Label maps of the model in that precision, with everything else that `predict` writes."""
    out = tmp_path / "out"
    extra = ["--maps", "1", "--scores", "--probabilities", "--backend", BACKENDS[dtype]]
    assert (
        main(
            [
                "predict",
                str(picture),
                "--checkpoint",
                str(checkpoint),
                "--out",
                str(out),
                "--dtype",
                dtype,
                *extra,
            ]
        )
        == 0
    )
    with segvit_kernels.backend(BACKENDS[dtype]):
        expected = in_precision(tiny_model(), CPU, dtype).predict(picture)
    assert np.array_equal(np.asarray(Image.open(out / "a_labels.png")), expected.numpy())
    assert len(list(out.iterdir())) == 5


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_what_is_in_it(dtype):
    """Everything, or the backbone's projections; the masks stay close."""
    exact, model = tiny_model(), in_precision(tiny_model(), CPU, dtype)
    packed = {n: m.packed.value for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    eight = {name for name, weight in packed.items() if weight.panels.dtype == torch.int8}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert eight == (
        {f"backbone.blocks.{i}.{n}" for i in range(2) for n in layers} if dtype == "int8" else set()
    )
    assert dtype == "int8" or model.mean.dtype == getattr(torch, dtype)
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode(), segvit_kernels.backend(BACKENDS[dtype]):
        expected, found = exact(images).mask_logits, model(images.to(model.mean.dtype)).mask_logits.float()
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


@INT8
def test_conversions_keep_eight_bits():
    """Of a model and of an engine; in float64, which has no kernels, they compute as they were."""
    model = in_precision(tiny_model(), CPU, "int8")
    engine = tiny_model().compile_for_inference((32, 32), int8=True)
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    expected = engine(images)

    def eight(module):
        return sum(isinstance(part, PackedLinear) and part.int8 for part in module.modules())

    for dtype in (None, torch.float16, torch.float32):
        assert eight(model.to(CPU, dtype)) == 8
    assert eight(engine.function.to(CPU)) == 8 and torch.equal(engine.function(images), expected)
    assert eight(model.to(torch.float64)) == 0


def test_evaluate_in_both(checkpoint, tmp_path):
    results = []
    for dtype in ("float32", "bfloat16"):
        path = tmp_path / f"{dtype}.json"
        options = ["--data", "synthetic", "--synthetic-validation", "2", "--no-progress", "--dtype", dtype]
        assert main(["evaluate", "--checkpoint", str(checkpoint), *options, "--json", str(path)]) == 0
        results.append(json.loads(path.read_text()))
    assert [result["dtype"] for result in results] == ["float32", "bfloat16"]
    assert all(result["images"] == 2 for result in results)


def test_a_record_says_it(checkpoint, picture, tmp_path, capsys):
    """Results of one precision are not continued in another."""
    command = ["predict", str(picture), "--checkpoint", str(checkpoint), "--out", str(tmp_path), "--manifest"]
    assert main(command) == 0 and main([*command, "--dtype", "bfloat16"]) == 2
    assert "dtype" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "evaluate", "serve"])
def test_refusals(command, checkpoint, picture, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SEGVIT_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(_native, "runs_isa", lambda isa: False)
    out = tmp_path / "out"
    given = {
        "predict": [str(picture), "--checkpoint", str(checkpoint), "--out", str(out)],
        "evaluate": ["--checkpoint", str(checkpoint), "--data", "synthetic", "--no-progress"],
        "serve": [str(checkpoint), "--port", "0"],
    }[command]
    for extra, said in (
        ([], "dtype: int8 weights need a CPU with AVX2 and the native library"),
        (["--backend", "eager"], "dtype: int8 is computed by the backend cpu, got eager"),
    ):
        assert main([command, *given, "--dtype", "int8", *extra]) == 2
        assert said in capsys.readouterr().err
    assert not out.exists()


def test_evaluate_takes_one_of_two_precisions(checkpoint, capsys):
    options = ["--data", "synthetic", "--dtype", "bfloat16", "--precision", "bf16"]
    assert main(["evaluate", "--checkpoint", str(checkpoint), *options]) == 2
    assert "dtype: got bfloat16 with --precision bf16; expected one of the two" in capsys.readouterr().err


def test_evaluate_says_in_which_arithmetic(checkpoint, tmp_path):
    words = ["--data", "synthetic", "--synthetic-validation", "1", "--no-progress", "--workers", "0"]
    words += ["--precision", "bf16", "--json", str(tmp_path / "x.json")]
    assert main(["evaluate", "--checkpoint", str(checkpoint), *words]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["dtype"] == "mixed bfloat16"


def test_check_precision_of_a_gpu():
    with pytest.raises(ValueError, match="dtype: packed weights are for the CPU, not meta"):
        check_precision(torch.device("meta"), "int8", "cpu")
    for dtype in ("float32", "bfloat16"):
        check_precision(torch.device("meta"), dtype, "eager")
