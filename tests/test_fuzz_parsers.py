"""Parsers on damaged files, in short, and what the long run (`make fuzz-parsers`) found."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz_parsers import Subject, apart, drawn, examine, held_kilobytes
from fuzz_subjects import subjects

import segvit_kernels
from segvit.config import SegViTConfig
from segvit.data.matlab import variables
from segvit.data.names import read_classes
from segvit.data.shards import Shards, read_index
from segvit.data.stored import stored_label
from segvit.exporting import metadata, open_model
from segvit.inference.record import Record
from segvit.model.convert import infer_config
from segvit.model.pretrained import open_pretrained, statistics_told
from segvit.model.rotary_weights import told_by_names
from segvit.system.text import parse_yaml

INPUTS = 12  # of each parser


@pytest.fixture(scope="module")
def known():
    threads = torch.get_num_threads()
    with subjects() as found:
        yield found
    torch.set_num_threads(threads)


def test_every_parser_reads_or_refuses(known):
    found = {
        f"--subject {name} --seed 0 --first {number}": wrong
        for name, subject in known.items()
        for number, wrong in examine(name, subject, 0, range(INPUTS))
    }
    assert found == {}


def test_right_files_are_read(known):
    """But the programs, which are of another machine."""
    for name, subject in known.items():
        for seed in subject.seeds:
            if name == "pt2":
                with pytest.raises(ValueError, match=r"a\.pt2"):
                    subject.read(seed)
            else:
                subject.read(seed)


def test_inputs_are_the_same_again_and_differ(known):
    subject = known["config"]
    inputs = [drawn(subject, str(i)) for i in range(50)]
    assert inputs == [drawn(subject, str(i)) for i in range(50)]
    assert len(set(inputs)) > 40


# Planted: each kind of fault is seen.


def _sleeping(data: bytes) -> None:
    until = time.process_time() + 5
    while time.process_time() < until:
        pass


def _held(data: bytes) -> None:
    # More than the process ever held, where that figure stays. Written, not only asked for: pages that nobody
    # wrote may be one page of zeros.
    free = held_kilobytes() - int(Path("/proc/self/statm").read_text().split()[1]) * (
        resource.getpagesize() >> 10
    )
    assert (b"x" * ((max(0, free) << 10) + (300 << 20))).count(b"y") == 0


def _dying(data: bytes) -> None:
    if len(data) % 2:
        os.kill(os.getpid(), signal.SIGKILL)


def _raising(error: Exception):
    def read(data: bytes) -> None:
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "wrong"),
    [
        (_raising(KeyError("a")), "escapes: KeyError"),
        (_raising(ValueError("a.txt: two\nlines")), "no one line"),
        (_raising(ValueError("a.txt: 'int' object is not iterable")), "another's words"),
        (_raising(ValueError("another file")), "does not name a.txt"),
        (_raising(ValueError("a.txt: damaged (MemoryError)")), "another's words"),
        (_sleeping, "more than 1.0 s"),
    ],
)  # fmt: skip
def test_a_fault_is_seen(read, wrong):
    ((number, found),) = examine("planted", Subject(read, [b"{}"], name="a.txt"), 0, range(1))
    assert number == 0 and wrong in found


def test_memory_is_seen():
    # In a process of its own, which has not held as much as a run of tests.
    program = (
        "import fuzz_parsers\n"
        "from test_fuzz_parsers import Subject, _held, examine\n"
        "fuzz_parsers.SECONDS = 60.0\n"
        'print(list(examine("planted", Subject(_held, [b"{}"], name="a.txt"), 0, range(1))))'
    )
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert re.search(r"^\[\(0, '\d+ MB more'\)\]$", said.stdout), said.stdout


def test_a_process_that_dies_is_a_fault_and_the_rest_goes_on():
    found = apart("planted", Subject(_dying, [b"{}", b"abc"]), 0, range(12))
    assert 0 < len(found) < 12 and all("died" in wrong for _, wrong in found)


# What it found.


def test_a_long_line_is_looked_at_once(tmp_path):
    """Patterns that look again from every character took the square of a line's length."""
    path = tmp_path / "names.txt"
    path.write_text("a" + " " * 60000 + "b\n")
    start = time.process_time()
    assert read_classes(path).names == ("a" + " " * 60000 + "b",)
    path.write_text("\n".join(map(str, range(20000))))
    assert len(read_classes(path).names) == 20000
    assert statistics_told({"cfg": "mean=[" * 10000}) == ({}, ())
    assert statistics_told({"mean": [0.25], "std": [0.5]})[0] == {"mean": (0.25,), "std": (0.5,)}
    for odd in (10**400, "1e999", float("nan")):
        assert statistics_told({"mean": [odd], "std": [0.5]}) == ({}, ())
    assert time.process_time() - start < 2
    path.write_text("a, b 1 2 3\nc,4;5\t6\n, 7 8 9")
    assert read_classes(path)[:2] == (("a, b", "c", ""), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))


def test_depth_is_bounded():
    start = time.process_time()
    with pytest.raises(ValueError, match="a: nested too deeply"):
        parse_yaml("{" * 4000, "a")
    assert time.process_time() - start < 1
    assert parse_yaml("[" * 90 + "]" * 90, "a") is not None


def _matlab(path: Path) -> bytes:
    savemat = pytest.importorskip("scipy.io").savemat
    savemat(path, {"S": np.arange(12, dtype=np.uint8).reshape(3, 4), "other": {"a": 1}})
    return path.read_bytes()


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_matlab_file_does_not_end_the_process(tmp_path, compressed):
    path = tmp_path / "a.mat"
    whole = _matlab(path)
    assert variables(whole) == {"S": True, "other": False}
    place = whole.index(b"S\0\0\0") + 4  # the type of its numbers: SciPy's table ends long before 0x53
    assert whole[place] == 2
    damaged = whole[:place] + b"S" + whole[place + 1 :]
    if compressed:
        size = 8 + int.from_bytes(damaged[132:136], "little")
        packed = zlib.compress(damaged[128 : 128 + size])
        damaged = damaged[:128] + (15).to_bytes(4, "little") + len(packed).to_bytes(4, "little") + packed
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"a\.mat: cannot be decoded .*bytes of type 83"):
        stored_label(path)
    path.write_bytes(whole)
    assert stored_label(path).values.tolist() == np.arange(12).reshape(3, 4).tolist()


def test_whole_numbers_beyond_floats(tmp_path):
    values = SegViTConfig.preset("vit_tiny", 3).to_dict()
    with pytest.raises(ValueError, match="decoder_dropout must be a number"):
        SegViTConfig.from_dict({**values, "decoder_dropout": 10**400})
    text = json.dumps({"kind": "segvit export", "precision": "float32", "input": [], "model": values})
    for damaged in (text, "[" * 100000, '{"kind": []}'):
        with pytest.raises(ValueError, match=r"a\.onnx: not a file that `segvit export` has written"):
            metadata.read(damaged, "a.onnx")


def _index(**changes: object) -> dict:
    data = {"num_classes": 2, "class_names": None, "palette": None, "reduce_zero_label": False}
    index = {
        "names": ["a"],
        "pictures": [[0, 5]],
        "labels": [[5, 5]],
        "split": "training",
        "bytes": 10,
        "data": data,
    }
    return {
        **index,
        **{k: v for k, v in changes.items() if k in index},
        "data": {**data, **changes.get("data", {})},
    }


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"names": [7]}, "names"),
        ({"pictures": [[0, 5, 1]]}, "places"),
        ({"pictures": [[-1, 5]]}, "places"),
        ({"labels": [[6, 5]]}, "places"),
        ({"labels": [[0, 10**30]]}, "places"),
        ({"data": {"num_classes": "3"}}, "data"),
        ({"data": {"class_names": ["a"]}}, "data"),
        ({"data": {"palette": [[0, 0, 256], [0, 0, 0]]}}, "data"),
    ],
)
def test_an_index_of_another_form_is_refused(tmp_path, changes, what):
    (tmp_path / "0.json").write_text(json.dumps(_index()))
    assert read_index(tmp_path / "0.tar")["bytes"] == 10
    (tmp_path / "0.json").write_text(json.dumps(_index(**changes)))
    with pytest.raises(ValueError, match=rf"0\.json: no index of a shard \({what} of another form\)"):
        read_index(tmp_path / "0.tar")


@pytest.mark.parametrize("name", ["\0", "\ud800", 3, "", "x" * 4000, "/0.tar", "a/../../0.tar"])
def test_a_shard_of_no_name_is_refused(tmp_path, name):
    (tmp_path / "shards.json").write_text(json.dumps({"shards": ["0.tar", name]}))
    with pytest.raises(ValueError, match=r"shards\.json: no list of shards"):
        Shards(str(tmp_path))


def test_patterns_of_shards_are_bounded():
    for pattern in ("{0..99999}{0..99}.tar", "{0..9}" * 700 + ".tar"):
        with pytest.raises(ValueError, match="data: got"):
            Shards(pattern)
    with pytest.raises(FileNotFoundError, match=r"nowhere/a\*\*\.tar"):
        Shards("nowhere/a**.tar")


def test_a_record_with_other_lines_is_refused(tmp_path):
    for number, line in enumerate(("[", "[]", '{"picture": "a", "output": 3}', "[" * 100000)):
        out = tmp_path / str(number)
        out.mkdir()
        (out / "manifest-00000-of-00001.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match=r"jsonl: line 1 is none of a manifest's"):
            Record(out, (0, 1), {}, {"a": "a"})


def test_a_damaged_program_is_refused(tmp_path):
    import zipfile

    from segvit.exporting import aot

    path = tmp_path / "a.pt2"
    for needs in ("[]", "3", '{"torch": 1, "machine": "x", "device": "cpu"}', "{"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in ((aot.METADATA, "{}"), (aot._NEEDS, needs), (aot.LIBRARY, "x" * 500)):
                archive.writestr(f"a/{name}", content)
        whole = path.read_bytes()
        for data in (whole, whole[:60] + b"\xff" * 8 + whole[68:]):
            path.write_bytes(data)
            with pytest.raises(ValueError, match=r"a\.pt2: not a program"):
                open_model(path)


def test_weights_of_other_shapes(tmp_path):
    tensors = {"decoder.class_tokens": torch.zeros(3), "backbone.pos_embed": torch.zeros(1, 4, 8)}
    with pytest.raises(ValueError, match="not a plain ViT"):
        infer_config(tensors)
    vit = {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4), "blocks.0.mlp.fc1.weight": torch.zeros(16, 8)}
    vit |= {"blocks.0.mlp.fc2.weight": torch.zeros(8, 16), "pos_embed": torch.zeros(1, 4, 8)}
    for name in "qkv":
        vit[f"blocks.0.attn.{name}.weight"] = torch.zeros(8, 8)
    infer = open_pretrained(vit).backbone_config
    assert infer().mlp == "gelu"
    vit["blocks.0.attn.k.weight"] = torch.zeros(())
    with pytest.raises(ValueError, match="query, key and value of shapes"):
        infer()
    del vit["blocks.0.attn.k.weight"]
    with pytest.raises(ValueError, match="of another shape"):
        open_pretrained({**vit, "blocks.0.mlp.fc1.weight": torch.zeros(())}).backbone_config()


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_embed.proj.weight": ()},
        {"rope_embed.periods": ()},
        {"rope_embed.periods": (0,)},
        {"rope.freqs_cos": (4, 0)},
        {"attn_pool.probe": (1,), "norm_pre.weight": (8,), "pos_embed": (1, 0, 8), "cls_token": (1, 1, 8)},
    ],
    ids=str,
)
def test_names_of_rotary_weights_with_other_shapes_tell_nothing(changes):
    shapes = {"patch_embed.proj.weight": (8, 3, 4, 4), **changes}
    assert told_by_names({name: torch.zeros(shape) for name, shape in shapes.items()}) == {}


def test_packed_weights_of_another_form():
    x, weight = torch.zeros(2, 40).half(), torch.zeros(50, 40).half()
    panels = torch.zeros(2, 32, 48, 2).half()
    for packed in (
        (panels, torch.zeros(96)),
        segvit_kernels.PackedWeight(None, None),
        segvit_kernels.PackedWeight(panels[0, 0], None),
        segvit_kernels.PackedWeight(panels.bfloat16(), torch.zeros(96)),
    ):
        with pytest.raises(TypeError, match=r"packed (is|has panels)"):
            segvit_kernels.linear(x, weight, packed=packed)
    with pytest.raises(ValueError, match=r"packed has factors \(3,\), torch.float32; expected \(96,\)"):
        segvit_kernels.linear(
            x, weight, packed=segvit_kernels.PackedWeight(panels, torch.zeros(3)), backend="eager"
        )


def test_a_number_longer_than_python_reads(tmp_path):
    from segvit.data.known import KNOWN, _context_table

    names = KNOWN["pascal-context"].classes.names
    lines = [f"{number}: {name}" for number, name in enumerate(names, 1)]
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    assert _context_table(False)(tmp_path)[1] == 0
    (tmp_path / "labels.txt").write_text("\n".join([*lines, "9" * 5000 + ": more"]))
    with pytest.raises(ValueError, match=r"labels\.txt: line 60: got '999.*expected 'number: name'"):
        _context_table(False)(tmp_path)
