"""Exported files: the labels of `predict` but for ties, in the format's own runtime, and refusals."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from samples import assert_same_up_to_ties, pictures, tiny_model
from torch.nn import functional as F

import segvit
from segvit import BackboneConfig, InferenceOptions, RotaryConfig, SegViT, SegViTConfig
from segvit.cli import main
from segvit.exporting import graph as graph_module
from segvit.exporting import metadata, open_model
from segvit.exporting.exported import ExportedModel
from segvit.exporting.graph import LabelGraph, Plan, cells_of, plain_program
from segvit.exporting.metadata import describe, read
from segvit.inference.passes import list_views, passes

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZE = (37, 50)  # no multiple of the patch


def run(path, images):
    """Outputs of a file in ONNX Runtime, of uint8 pictures."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"pictures": images.numpy()})


@pytest.fixture(scope="module")
def model():
    """With an embedding of positions, which is resized, and rotary ones, whose angles a file makes itself.
    One stage of one layer; several of both are in the files of `test_views_in_the_runtimes`."""
    setup = {"rotary": RotaryConfig(), "register_tokens": 2}
    return tiny_model(class_names=tuple("abcdef"), setup=setup, taps=(2,), decoder_depth=1)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A checkpoint, beside it what is exported from it."""
    folder = tmp_path_factory.mktemp("exported")
    model.save_pretrained(folder / "checkpoint")
    return folder


@pytest.fixture(scope="module")
def fixed(folder):
    """By the command: pictures of one size, as they are in memory."""
    path = folder / "fixed.onnx"
    words = ["export", str(folder / "checkpoint"), str(path), "--size", *map(str, SIZE), "--layout", "nhwc"]
    assert main([*words, "--scores"]) == 0
    return path


@pytest.fixture(scope="module")
def anything(model, folder):
    """Pictures of any size and number."""
    path = folder / "any.onnx"
    segvit.export(model, path, batch=None)
    return path


def test_a_fixed_size_in_a_process_of_its_own(fixed, folder, model):
    """Labels and scores of a file, where neither torch nor this package is."""
    images = pictures(SIZE, batch=1)
    np.save(folder / "in.npy", images.permute(0, 2, 3, 1).numpy())
    script = """
import sys
sys.modules["torch"] = sys.modules["segvit"] = sys.modules["segvit_kernels"] = None
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/fixed.onnx", providers=["CPUExecutionProvider"])
labels, scores = session.run(None, {"pictures": numpy.load(sys.argv[1] + "/in.npy")})
numpy.savez(sys.argv[1] + "/out.npz", labels=labels, scores=scores)
"""
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)
    found = np.load(folder / "out.npz")
    assert_same_up_to_ties(torch.from_numpy(found["labels"]), model, images)
    _, scores = model.predict(images, return_scores=True)
    np.testing.assert_allclose(found["scores"], scores.amax(1), atol=1e-5)


@pytest.mark.parametrize("size", [(37, 50), (64, 40), (32, 32), (9, 91)])
def test_any_size(anything, model, size):
    images = pictures(size, batch=3)
    (labels,) = run(anything, images)
    assert_same_up_to_ties(torch.from_numpy(labels), model, images)


def test_the_file(fixed, anything, model):
    for path, sides in ((fixed, [1, 37, 50, 3]), (anything, ["batch", 3, "height", "width"])):
        proto = onnx.load(path)
        onnx.checker.check_model(proto, full_check=True)
        onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        assert {node.domain for node in proto.graph.node} == {""}
        assert [(o.domain, o.version) for o in proto.opset_import] == [("", 18)]
        assert [d.dim_param or d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == sides
        told = json.loads({p.key: p.value for p in proto.metadata_props}["segvit"])
        assert told["classes"] == list("abcdef") and told["model"] == model.config.to_dict()
        assert metadata.is_described(path)
        assert told["mean"] == list(model.config.mean) and len(told["palette"]) == 6


@pytest.mark.parametrize("kind", ["plain", "shrunk", "linear"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 32, "stride": 24, "flip": True},
        {"window": 32, "scales": [0.75, 1.5]},
        {"short_side": 40, "window": 32},
    ],
)
def test_windows_scales_and_flips(kind, options):
    """The graph in PyTorch: the export of its operators is the same for all of them."""
    model, images, options = tiny_model(kind), pictures(SIZE), InferenceOptions(**options)
    graph = LabelGraph(model, Plan(SIZE, 2, outputs="scores", options=options)).eval()
    with torch.inference_mode():
        labels, scores = graph(images)
    expected, all_scores = model.predict(images, options, return_scores=True)
    chosen = all_scores.gather(1, labels.long()[:, None])[:, 0]
    assert (all_scores.amax(1) - chosen).max() < 1e-5
    torch.testing.assert_close(scores, all_scores.amax(1), atol=1e-5, rtol=1e-5)
    assert (labels == expected).float().mean() > 0.99 and len(labels.unique()) > 1


def same_up_to_ties(labels, scored):
    """Each label's score is the best, or next to it."""
    expected, scores = scored
    chosen = scores.gather(1, torch.from_numpy(labels).long()[:, None])[:, 0]
    assert (scores.amax(1) - chosen).max() < 1e-4 * scores.abs().max()
    assert labels.shape == tuple(expected.shape) and len(expected.unique()) > 2


@pytest.mark.parametrize(
    "kind, patch, token, options",
    [
        ("shrunk", 14, True, {"window": 28, "stride": 28, "flip": True, "short_side": 33}),
        ("plain", 16, False, {"scales": [0.6, 1.3]}),
    ],
)
def test_views_in_the_runtimes(kind, patch, token, options, tmp_path):
    """Where neither torch nor this package is. Resizing is antialiased where it shrinks, which OpenVINO's own
    gets wrong."""
    model, images, options = tiny_model(kind, patch, token), pictures(SIZE, 1), InferenceOptions(**options)
    scored = model.predict(images, options, return_scores=True)
    segvit.export(model, tmp_path / "x.onnx", size=SIZE, options=options)
    np.save(tmp_path / "in.npy", images.numpy())
    script = """
import sys
sys.modules["torch"] = sys.modules["segvit"] = sys.modules["segvit_kernels"] = None
import numpy, onnxruntime
pictures = numpy.load("in.npy")
session = onnxruntime.InferenceSession("x.onnx", providers=["CPUExecutionProvider"])
numpy.save("onnxruntime.npy", session.run(None, {"pictures": pictures})[0])
try:
    import openvino
except ImportError:
    sys.exit()
compiled = openvino.Core().compile_model("x.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
numpy.save("openvino.npy", compiled(pictures)[0])
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    found = [np.load(path) for path in tmp_path.glob("o*.npy")]
    assert found
    for labels in found:
        same_up_to_ties(labels, scored)


def test_blocks_of_eomt_that_mask():
    """A training that was cut short leaves queries that see their masks alone, in files too."""
    torch.manual_seed(0)
    fields = {"decoder": "eomt", "query_blocks": 1, "queries": 7, "upscale_blocks": 0, "image_size": (32, 32)}
    model = SegViT(SegViTConfig(BackboneConfig(32, 1, 2, patch_size=8), 6, taps=(0,), **fields)).eval()
    for parameter in model.requires_grad_(False).parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    images = pictures((32, 32), batch=1)
    assert model.masked == (True,)
    graph = LabelGraph(model, Plan((32, 32), 1, outputs="logits")).eval()
    masks, probabilities = plain_program(graph, images).module()(images)
    output = model(model.preprocess(images))
    torch.testing.assert_close(masks, output.mask_logits, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(probabilities, model.scoring(output)[1], atol=1e-5, rtol=1e-4)
    model.anneal(1.0)
    assert (model.train().eval()(model.preprocess(images)).mask_logits - masks).abs().max() > 1


@pytest.mark.parametrize("mask", [None, torch.ones(5, 5).tril() > 0, torch.linspace(-3, 3, 25).view(5, 5)])
def test_attention_with_a_mask_is_torch_s(mask):
    class Attention(torch.nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, 2 * x, x + 1, attn_mask=mask, scale=0.7)

    x = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(Attention(), (x,)).run_decompositions(graph_module._table())
    assert "scaled_dot_product" not in program.graph_module.code
    torch.testing.assert_close(program.module()(x), Attention()(x))


def test_no_block_is_large(monkeypatch):
    """Blocks of rows, of cells: with a small budget they are many, and the labels the same. Of a block there
    is one product, however many views see it: their masks have one grid."""
    options = InferenceOptions(window=32, stride=24)
    plan, images = Plan(SIZE, 1, options=options), pictures(SIZE, batch=1)
    (whole,) = LabelGraph(tiny_model(), plan).eval()(images)
    monkeypatch.setattr("segvit.exporting.graph._BUDGET", 300)
    graph, mixed, mix = LabelGraph(tiny_model(), plan).eval(), [], LabelGraph._mix
    cells = [cell for row in graph.cells for cell in row]
    blocks = sum(len(cell.blocks) for cell in cells)
    assert len(cells) == 9 and blocks > 30 and max(len(cell.shares) for cell in cells) == 4
    monkeypatch.setattr(LabelGraph, "_mix", lambda *given: mixed.append(len(given[2])) or mix(*given))
    assert (graph(images)[0] == whole).all() and mixed == [1] * blocks


def test_cells_are_the_views_of_semantic_argmax():
    """Each pixel lies in one, where shares add up to 1."""
    runs = passes((40, 70), InferenceOptions(window=32, stride=24, scales=[1.0, 0.5], flip=True), 8)
    views = list_views(1, (40, 70), runs, [(4, 4)] * len(runs))
    covered = torch.zeros(40, 70)
    for cell in (c for row in cells_of(views, (40, 70)) for c in row):
        top, left, bottom, right = cell.rectangle
        assert sum(cell.shares.values()) == pytest.approx(1)
        covered[top:bottom, left:right] += 1
    assert (covered == 1).all()


def test_predict_and_evaluate_take_the_file(anything, folder, capsys, tmp_path):
    from PIL import Image

    picture = tmp_path / "p.png"
    Image.fromarray(pictures((45, 70), batch=1)[0].permute(1, 2, 0).numpy()).save(picture)
    for name in (anything, folder / "checkpoint"):
        assert (
            main(["predict", str(picture), "--checkpoint", str(name), "--out", str(tmp_path / name.stem)])
            == 0
        )
    maps = [np.array(Image.open(tmp_path / n / "p_labels.png")) for n in ("any", "checkpoint")]
    assert (maps[0] == maps[1]).mean() > 0.999
    capsys.readouterr()
    words = ["--data", "synthetic", "--synthetic-validation", "3", "--no-progress", "--workers", "0"]
    assert main(["evaluate", "--checkpoint", str(anything), *words]) == 2  # classes of other data
    assert "classes" in capsys.readouterr().err
    for option in (["--maps", "a"], ["--scores"], ["--probabilities"], ["--window", "32"]):
        out = tmp_path / "refused"
        assert main(["predict", str(picture), "--checkpoint", str(anything), "--out", str(out), *option]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and option[0][2:] in error and not out.exists()


def test_files_of_others_are_not_replaced(model, tmp_path):
    path, weights = tmp_path / "x.xml", tmp_path / "x.bin"
    for file, there in ((weights, weights), (path, path), (tmp_path / "x.onnx", tmp_path / "x.onnx")):
        file.write_bytes(b"another's")
        with pytest.raises(
            ValueError, match=rf"out: .*{there.name} is there already and not from segvit export"
        ):
            segvit.export(model, path if file is weights else file)
        assert file.read_bytes() == b"another's"
    path.write_bytes(b"")
    assert not metadata.is_described(path)


def in_place_of(model, run, dtype="float32", **plan):
    """What a file says of itself and does, without one."""
    text = describe(model.config, Plan(**plan), {"format": "onnx", "precision": dtype})
    return ExportedModel("x.onnx", read(text, "x.onnx"), run)


def test_a_file_for_several_pictures_takes_fewer(model):
    """And gives no more than these."""
    calls = []

    def run(images):
        calls.append(images.shape)
        return [images[..., 0] + 0]

    images = torch.arange(5 * 3 * 4 * 6).remainder(251).to(torch.uint8).view(5, 3, 4, 6)
    exported = in_place_of(model, run, size=(4, 6), batch=2, channels_last=True)
    assert torch.equal(exported.predict(images), images[:, 0])
    assert torch.equal(exported.predict(images[1]), images[1, 0])
    assert calls == [(2, 4, 6, 3)] * 4


@pytest.mark.parametrize("images", [torch.ones(3, 4, 6), torch.ones(3, 4, 6).long(), np.ones((4, 6, 3))])
def test_pictures_of_other_types_are_refused(model, images):
    """As by a checkpoint: OpenVINO and TorchScript would convert them, a .pt2 take their bytes for pixels."""
    exported = in_place_of(model, lambda images: [images[:, 0]], size=(4, 6))
    for one in (exported, model):
        with pytest.raises(TypeError, match="images must be uint8, got torch"):
            one.predict(images)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"size": 32}, ValueError, "size: got 32, expected height and width"),
        ({"size": (32.0, 32)}, ValueError, r"size: got \(32.0, 32\), expected height and width"),
        ({"batch": 1.5}, ValueError, "batch: got 1.5, expected at least 1"),
        ({"calibration": [torch.rand(1, 3, 32, 48)]}, TypeError, "calibration: got torch.float32, expected"),
        ({"calibration": [torch.zeros(3, 32, 48).byte()]}, ValueError, r"got shape \(3, 32, 48\), expected"),
        (
            {"calibration": [torch.zeros(1, 3, 48, 32).byte()]},
            ValueError,
            r"calibration: got shape \(1, 3, 48, 32\), expected \(1, 3, 32, 48\)",
        ),
        (
            {"calibration": [torch.zeros(1, 4, 48, 32).byte()], "size": None, "batch": None},
            ValueError,
            r"calibration: got shape \(1, 4, 48, 32\), expected \(B, 3, H, W\)",
        ),
    ],
)
def test_what_is_refused_before_a_file_is_made(given, error, message, tmp_path):
    with pytest.raises(error, match=message):
        segvit.export(tiny_model(), tmp_path / "x.onnx", **{"size": (32, 48), "dtype": "int8", **given})


def test_evaluate_says_how_a_file_predicts(monkeypatch, tmp_path):
    """Its windows, its precision: not the options that the command was left with."""
    from segvit.commands import evaluate

    options = InferenceOptions(window=32, flip=True)
    model = tiny_model(num_classes=12)
    size = model.config.image_size
    exported = in_place_of(model, lambda images: [images[:, 0] % 12], "int8", size=size, options=options)
    monkeypatch.setattr(evaluate, "open_model", lambda path: exported)
    words = ["--data", "synthetic", "--synthetic-validation", "1", "--no-progress", "--workers", "0"]
    assert main(["evaluate", "--checkpoint", "x.onnx", *words, "--json", str(tmp_path / "x.json")]) == 0
    told = json.loads((tmp_path / "x.json").read_text())
    assert told["inference"] == options.inference_fields() and told["dtype"] == "int8"


def test_refusals(model, folder, capsys, tmp_path, monkeypatch):
    checkpoint, out = str(folder / "checkpoint"), tmp_path / "x.onnx"
    for words, said in (
        ([str(tmp_path / "x.pb")], "ends in .onnx"),
        ([str(out), "--window", "32"], "window"),
        ([str(out), "--size", "37", "50", "--flip", "--batch", "any"], "flip"),
        ([str(out), "--scores", "--logits"], "logits"),
        (["/proc/no/x.onnx"], "/proc/no"),
    ):
        assert main(["export", checkpoint, *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error, error
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", checkpoint, str(out)]) == 2
    assert "segvit-kernels[export]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_none(tmp_path, fixed):
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"x\.onnx"):
        open_model(tmp_path / "x.onnx")
    with pytest.raises(FileNotFoundError, match=r"y\.onnx"):
        open_model(tmp_path / "y.onnx")
    with pytest.raises(ValueError, match=r"50x37 pixels, got 48x40"):
        open_model(fixed).predict(pictures((40, 48), batch=1))


@pytest.fixture(scope="module")
def openvino(model, folder):
    """One size, the network in bfloat16, which a float32 file must not run in by itself."""
    pytest.importorskip("openvino")
    segvit.export(model, folder / "f32.xml", size=SIZE, outputs="scores")
    return folder / "f32.xml"


def test_openvino(openvino, model):
    images = pictures(SIZE)
    assert_same_up_to_ties(open_model(openvino).predict(images), model, images)
    import openvino as runtime

    read = runtime.Core().read_model(openvino)
    assert {str(next(iter(output.names))) for output in read.outputs} == {"labels", "scores"}
    assert json.loads(read.get_rt_info(["segvit"]).astype(str))["classes"] == list("abcdef")
    assert metadata.is_described(openvino)


def test_weights_of_another_file(openvino, tmp_path):
    """A .xml that was copied without its .bin, beside that of an earlier export: the runtime sees nothing."""
    weights = bytearray(openvino.with_suffix(".bin").read_bytes())
    weights[len(weights) // 2] ^= 1
    (tmp_path / "x.xml").write_bytes(openvino.read_bytes())
    (tmp_path / "x.bin").write_bytes(weights)
    with pytest.raises(ValueError, match=r"x\.xml: x\.bin has the weights of another file"):
        open_model(tmp_path / "x.xml")


def test_a_full_disk_leaves_nothing(openvino, tmp_path):
    """OpenVINO itself says nothing of a .bin that could not be written whole."""
    resource = pytest.importorskip("resource")
    import openvino as runtime

    from segvit.exporting.openvino import _write

    model = runtime.Core().read_model(openvino)
    _write(model, tmp_path / "x.XML", compress=False)
    for name in ("x.XML", "x.bin"):
        (tmp_path / name).unlink()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"x\.xml: cannot be written"):
            _write(model, tmp_path / "x.xml", compress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


def test_torchscript(model, folder):
    for _ in range(2):  # an export may replace one
        segvit.export(model, folder / "x.torchscript", size=SIZE, outputs="logits")
    found = open_model(folder / "x.torchscript")
    assert "segvit::" not in str(found._run.script.inlined_graph)
    images = pictures(SIZE)
    assert_same_up_to_ties(found.predict(images), model, images)
    expected = found.outputs(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # neither the file's nor the run's precision
        segvit.export(model, folder / "x.torchscript", size=SIZE, outputs="logits")
        assert all(map(torch.equal, found.outputs(images), expected))
    assert all(map(torch.equal, open_model(folder / "x.torchscript").outputs(images), expected))
    with pytest.raises(ValueError, match="size"):
        segvit.export(model, folder / "y.torchscript")
    (folder / "broken.torchscript").write_bytes((folder / "x.torchscript").read_bytes()[:999])
    with pytest.raises(ValueError, match=r"broken\.torchscript: TorchScript cannot load it \([^.]*\)$"):
        open_model(folder / "broken.torchscript")


def test_openvino_takes_any_size_from_the_graph(anything, model):
    """The scan of an ONNX file, as this package's own files have it."""
    runtime = pytest.importorskip("openvino")
    compiled = runtime.Core().compile_model(str(anything), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in ((37, 50), (64, 40)):
        images = pictures(size, batch=3)
        labels = torch.from_numpy(compiled(images.numpy())[0])
        assert_same_up_to_ties(labels, model, images)


def test_int8(folder, capsys, tmp_path):
    """Static QDQ of the backbone's projections, by the command, and what it says of the labels."""
    from PIL import Image

    for index in range(4):
        picture = pictures((45, 70), batch=1, seed=index)[0].permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    path = folder / "int8.onnx"
    words = ["export", str(folder / "checkpoint"), str(path), "--size", *map(str, SIZE), "--dtype", "int8"]
    assert main(words) == 2
    assert "calibrate" in capsys.readouterr().err and not path.exists()
    assert main([*words, "--calibrate", str(tmp_path), "--calibration-pictures", "3"]) == 0
    said = capsys.readouterr().out
    share = float(said.partition("checkpoint's: ")[2].partition(" %")[0])
    assert 95 < share < 100 and "3 pictures" in said
    proto = onnx.load(path)
    assert {node.domain for node in proto.graph.node} == {""} and len(proto.opset_import) == 1
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("DequantizeLinear") == 2 * 12  # weight and input, of 4 layers in 3 blocks
    assert open_model(path).description.precision == "int8"


def test_positions_of_keys_at_any_size():
    """Of a Shrunk model's up-sampling: a program of open height and width holds for all."""
    from segvit_kernels.modules import _subsampled

    class Halved(torch.nn.Module):
        def forward(self, code):
            return _subsampled(code, (code.shape[0] + 1) // 2 * ((code.shape[1] + 1) // 2))

    sides = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Halved(), (torch.zeros(5, 7, 3),), dynamic_shapes=(sides,)).module()
    for height, width in ((5, 7), (8, 5), (4, 4)):
        code = torch.arange(height * width).view(height, width, 1).expand(-1, -1, 3)
        assert torch.equal(program(code.float()), code[::2, ::2].flatten(0, 1).float())
