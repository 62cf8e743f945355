"""AOTInductor's programs: labels as `predict`'s, in processes without this package, in Python and in C++."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import pictures, tiny_model
from torch._inductor import exc

from segvit import InferenceOptions
from segvit.cli import main
from segvit.exporting import aot, export, metadata, open_model
from segvit.exporting.graph import Plan
from segvit_kernels import _library, _native, lower_to_native, why_not_packed

SIZE = (40, 50)  # no multiple of the patch size
SOURCE = Path(__file__).resolve().parents[3] / "examples" / "cpp" / "segment.cpp"


def _missing():
    if _native.library().reason is not None:
        return _native.library().reason
    return None if shutil.which(os.environ.get("CXX", "g++")) else "there is no C++ compiler"


compiled = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))


@pytest.fixture(scope="module")
def model():
    """Of 300 classes, so that labels are of 16 bits; sure of some of the last."""
    model = tiny_model(num_classes=300, taps=(2,), decoder_depth=1)
    tokens = model.decoder(model.backbone(torch.randn(1, 3, 32, 32)), (4, 4))[-1].tokens[0]
    model.decoder.class_head.weight.zero_()[250:270] = 12 * torch.linalg.pinv(tokens[250:270]).T
    return model


@pytest.fixture(scope="module")
def program(model, tmp_path_factory):
    """The one that is compiled: half a minute."""
    path = tmp_path_factory.mktemp("programs") / "model.pt2"
    export(model, path, size=SIZE)
    return path


@pytest.fixture(scope="module")
def picture():
    return pictures(SIZE, batch=1)[0].permute(1, 2, 0).contiguous().numpy()


@pytest.fixture(scope="module")
def expected(model, picture):
    labels = model.predict(torch.from_numpy(picture).permute(2, 0, 1)).numpy()
    assert labels.max() > 255 and len(np.unique(labels)) > 1
    return labels


@compiled
def test_in_python_without_this_package(program, picture, expected, tmp_path):
    """As docs/export.md has it, the file moved; without the operators first it does not load."""
    assert metadata.is_described(program)
    moved = shutil.copy(program, tmp_path / "moved.pt2")
    np.save(tmp_path / "picture.npy", picture)
    code = (
        "import sys, tempfile, zipfile, numpy as np, torch\n"
        "sys.modules.update(segvit=None, segvit_kernels=None)\n"
        "try:\n"
        "    torch._inductor.aoti_load_package('moved.pt2')\n"
        "except RuntimeError as error:\n"
        "    print('segvit_native::' in str(error))\n"
        "with zipfile.ZipFile('moved.pt2') as archive, tempfile.TemporaryDirectory() as folder:\n"
        "    path = archive.extract('program/segvit/libsegvit_native.so', folder)\n"
        "    torch.ops.load_library(path)\n"
        "run = torch._inductor.aoti_load_package('moved.pt2')\n"
        "pictures = torch.from_numpy(np.load('picture.npy')).permute(2, 0, 1)[None]\n"
        "np.save('labels.npy', run(pictures.contiguous()).numpy())\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    labels = np.load(tmp_path / "labels.npy")
    assert labels.dtype == np.int16 and np.array_equal(labels, expected[None])
    assert moved.stat().st_mode == program.stat().st_mode


@compiled
def test_the_operators_are_the_library_s(program):
    """All of them, one call each; nothing of `segvit::`, which is in Python."""
    with zipfile.ZipFile(program) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("wrapper.json"))
        text = archive.read(name).decode()
    names = ["atm_fwd", "query_attention_fwd", "semantic_argmax"]
    names += ["linear"] if why_not_packed(torch.ones(1, 1)) is None else []
    assert set(re.findall(r"\bsegvit\w*::\w+", text)) == {f"segvit_native::{name}" for name in names}


@compiled
def test_in_the_place_of_a_checkpoint(program, picture, expected, tmp_path, monkeypatch):
    loaded = open_model(program)
    assert torch.equal(loaded.predict(picture), torch.from_numpy(expected))
    assert loaded.plan.size == SIZE and loaded.config.num_classes == 300
    with pytest.raises(ValueError, match="exported for pictures of 50x40 pixels, got 50x39"):
        loaded.predict(picture[1:])
    for name, value, said in (
        ("torch.__version__", "1.0", r"compiled for torch 2.*, here is 1.0; export it again"),
        ("platform.machine", lambda: "sparc", r"compiled for machine \w+, here is sparc"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"model.pt2: {said}"):
            patch.setattr(name, value)
            open_model(program)
    for content in (program.read_bytes()[:9999], b""):
        (tmp_path / "broken.pt2").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.pt2: not a program that `segvit export` has written"):
            open_model(tmp_path / "broken.pt2")


@compiled
def test_predict_and_evaluate(program, model, picture, expected, tmp_path, capsys):
    """By the commands, as with the checkpoint."""
    from PIL import Image

    folders = [tmp_path / kind / "validation" for kind in ("images", "annotations")]
    for folder in folders:
        folder.mkdir(parents=True)
    truth = expected.copy()
    truth[:20] = expected[:20].max()
    Image.fromarray(picture).save(folders[0] / "p.png")
    Image.fromarray(truth.astype(np.uint16)).save(folders[1] / "p.png")
    model.save_pretrained(tmp_path / "checkpoint")
    found = []
    for checkpoint in (program, tmp_path / "checkpoint"):
        json_file = tmp_path / f"{checkpoint.stem}.json"
        words = ["--data", str(tmp_path), "--no-reduce-zero-label", "--ignore-index", "999"]
        words += ["--workers", "0", "--no-progress"]
        assert main(["evaluate", "--checkpoint", str(checkpoint), *words, "--json", str(json_file)]) == 0
        found.append(json.loads(json_file.read_text()))
    assert found[0] == found[1] and 0 < found[0]["miou"] < 1
    out = tmp_path / "predicted"
    assert main(["predict", str(folders[0]), "--checkpoint", str(program), "--out", str(out)]) == 0
    assert np.array_equal(np.array(Image.open(out / "p_labels.png")), expected)


@pytest.fixture(scope="module")
def segment(tmp_path_factory):
    """The example in C++, built as its README says."""
    out, folder = tmp_path_factory.mktemp("build") / "segment", Path(torch.__file__).parent
    command = [os.environ.get("CXX", "g++"), "-std=c++20", SOURCE, f"-I{folder}/include", f"-L{folder}/lib"]
    command += [f"-Wl,-rpath,{folder}/lib,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-o", out]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out


def ppm(path, picture, comment=b""):
    height, width = picture.shape[:2]
    path.write_bytes(b"P6\n%s%d %d\n255\n" % (comment, width, height) + picture.tobytes())
    return path


@compiled
def test_in_cpp(program, segment, picture, expected, tmp_path):
    source = ppm(tmp_path / "picture.ppm", picture, b"# of a camera\n")
    result = tmp_path / "labels.pgm"
    done = subprocess.run([segment, program, source, result], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    header = b"P5\n50 40\n65535\n"
    assert result.read_bytes() == header + expected.astype(">u2").tobytes()


@compiled
def test_cpp_says_in_one_line_what_is_wrong(program, segment, picture, tmp_path):
    good = ppm(tmp_path / "good.ppm", picture)
    short, grey = tmp_path / "short.ppm", tmp_path / "grey.ppm"
    short.write_bytes(good.read_bytes()[:-1])
    grey.write_bytes(good.read_bytes().replace(b"P6", b"P5", 1))
    other = ppm(tmp_path / "other.ppm", picture[1:])
    negative = tmp_path / "negative.ppm"
    negative.write_bytes(b"P6 50 -40 255\n")
    out = tmp_path / "labels.pgm"
    broken = tmp_path / "broken.pt2"
    broken.write_bytes(program.read_bytes()[:9999])
    for words, said in (
        ([program, good], "usage: segment MODEL.pt2 PICTURE.ppm LABELS.pgm"),
        ([tmp_path / "absent.pt2", good, out], "absent.pt2"),
        ([broken, good, out], "PytorchStreamReader failed"),
        ([program, tmp_path / "absent.ppm", out], "absent.ppm: cannot be opened"),
        ([program, short, out], "short.ppm: too short"),
        ([program, grey, out], "grey.ppm: expected a binary PPM"),
        ([program, negative, out], "negative.ppm: no usable size"),
        ([program, other, out], "other.ppm: is 50x39 pixels, expected 50x40"),
        ([program, good, tmp_path / "absent" / "labels.pgm"], "labels.pgm: cannot be written"),
    ):
        done = subprocess.run([segment, *words], capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and not out.exists(), (words, done)
        assert done.stderr.count("\n") == 1 and not done.stdout, (words, done)


@pytest.mark.skipif(_native.library().reason is not None, reason=str(_native.library().reason))
@pytest.mark.parametrize("last", [False, True])
def test_pictures_of_whole_patches(model, last):
    """Nothing is padded and no views are needed; but an empty list would reach the library as no list."""
    taken = pictures((40, 48), batch=2)
    given = taken.permute(0, 2, 3, 1).contiguous() if last else taken
    exported = lowered(model, Plan((40, 48), 2, channels_last=last), given)
    for node in exported.graph.nodes:
        assert not [argument for argument in node.args if node.op == "call_function" and argument == []]
    assert torch.equal(exported.module()(given), model.predict(taken))


def lowered(model, plan, given):
    """What is compiled."""
    program = aot.build(model, plan)
    with torch.no_grad():
        exported = torch.export.export(program, (given,))
    lower_to_native(exported)
    return exported


@pytest.mark.skipif(_native.library().reason is not None, reason=str(_native.library().reason))
@pytest.mark.parametrize(
    "kind, patch, token, options",
    [
        ("shrunk", 14, True, {"window": 28, "stride": 14, "flip": True}),
        ("plain", 16, False, {"scales": [0.6, 1.3], "window": 48}),
        ("linear", 14, False, {"short_side": 30, "flip": True}),
        ("segvitv2", 16, False, {}),
    ],
)
def test_windows_scales_and_flips(kind, patch, token, options):
    """The program before it is compiled, for models of both kinds and with a linear head."""
    model, given, options = tiny_model(kind, patch, token), pictures(SIZE), InferenceOptions(**options)
    labels = lowered(model, Plan(SIZE, 2, options=options), given).module()(given)
    expected, scores = model.predict(given, options, return_scores=True)
    chosen = scores.gather(1, labels.long()[:, None])[:, 0]
    assert (scores.amax(1) - chosen).max() < 1e-5 * scores.abs().max() and len(expected.unique()) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "shrunk", "linear", "segvitv2"])
def test_weights_that_are_packed_are_not_read(kind, dtype, monkeypatch):
    """A program has no others."""
    if not _native.runs_isa("avx2"):
        pytest.skip("no packed weights here")
    monkeypatch.setattr("segvit_kernels.ops.linear._best", lambda dtype: "avx2")
    model, given = tiny_model(kind, 8, True), pictures(SIZE)
    plan = Plan(SIZE, 2, dtype=dtype)
    engine = model.compile_for_inference(SIZE, 2, dtype=dtype, method="eager")
    assert aot.build(model, plan).packed
    assert (lowered(model, plan, given).module()(given) == engine(given)).float().mean() > 0.99


@compiled
@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "size: got none, expected height and width"),
        ({"size": SIZE, "batch": None}, "batch: got any, expected a number"),
        ({"size": SIZE, "outputs": "scores"}, "outputs: got scores, expected labels"),
        ({"size": SIZE, "dtype": "int8"}, "int8: int8 weights need a CPU with AVX2"),
    ],
)
def test_what_a_program_cannot_do(model, tmp_path, monkeypatch, options, said):
    monkeypatch.setattr(_library, "runs_isa", lambda isa: False)
    with pytest.raises(ValueError, match=said):
        export(model, tmp_path / "x.pt2", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("int8, expected", [(True, "avx2"), (False, "avx512_fp16")])
def test_packed_weights_ask_for_their_processor(monkeypatch, int8, expected):
    """Without the instructions the operator would fail at the first picture."""
    monkeypatch.setattr(_library, "runs_isa", lambda isa: isa in ("avx2", expected))
    monkeypatch.setattr(_library, "why_not_operator", lambda *_: None)
    dtype = torch.float32 if int8 else torch.float16
    needs = aot._needs(aot.build(tiny_model(), Plan((32, 32), 1, dtype=dtype, int8=int8)))
    assert needs["packed"] == expected
    assert "packed" not in aot._needs(
        aot.build(tiny_model().double(), Plan((32, 32), 1, dtype=torch.float64))
    )
    for has, said in ((True, None), (False, f"packed for {aot._PACKED[expected][1]}")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {aot._PACKED[expected][0]: has})
        reason = aot._why_not_here(needs)
        assert reason is None if said is None else said in reason


@pytest.mark.parametrize("here, runs", [((8, 0), True), ((8, 9), True), ((9, 0), False), ((7, 5), False)])
def test_a_program_for_a_gpu_asks_for_its_generation(monkeypatch, here, runs):
    """Elsewhere its kernels would fail at the first picture; what the processor has does not matter."""
    needs = {"torch": torch.__version__, "machine": platform.machine(), "device": "cuda", "capability": "8.0"}
    assert torch.cuda.is_available() or "there is none" in aot._why_not_here(needs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: here)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    assert aot._why_not_here(needs) == (
        None if runs else "compiled for compute capability 8.0, this GPU has {}.{}".format(*here)
    )


def test_without_the_library_or_a_compiler(model, monkeypatch, tmp_path):
    """One line each, and nothing is left."""
    missing = _native._Library(Path("absent"), "it is not built")

    def compile_nothing(*_, **__):
        failure = exc.CppCompileError(["c++"], "cc1plus: note\nmodel.cpp:1: error: full\nmore")
        raise exc.InductorError(failure, None)

    with monkeypatch.context() as patch:
        patch.setattr(_native, "library", lambda: missing)
        with pytest.raises(ValueError, match=r"^pt2: the native library cannot be used: it is not built$"):
            export(model, tmp_path / "x.pt2", size=SIZE)
    monkeypatch.setattr(aot, "native_library", lambda *_: Path("absent"))
    monkeypatch.setattr(aot, "lower_to_native", lambda program: [])
    missing = torch._inductor.config.patch({"cpp.cxx": ("absent-c++",)})
    with missing, pytest.raises(ValueError, match=r"^pt2: there is no C\+\+ compiler here"):
        export(model, tmp_path / "x.pt2", size=SIZE)
    if shutil.which(os.environ.get("CXX", "g++")):
        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_nothing)
        with pytest.raises(ValueError, match=r"^pt2: the C\+\+ compiler failed: model\.cpp:1: error: full$"):
            export(model, tmp_path / "x.pt2", size=SIZE)
    assert list(tmp_path.iterdir()) == []
