"""The parsers that tests/fuzz_parsers.py reads inputs with, and right files for each."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_parsers import Subject
from PIL import Image

import segvit_kernels
from segvit.commands.parser import _Options
from segvit.config import SegViTConfig
from segvit.data import find, inspection, known, pack, pictures, shards, stored
from segvit.data.folder import _Lookup
from segvit.data.labels import read_mapping
from segvit.data.names import read_classes
from segvit.exporting import aot, metadata
from segvit.exporting.graph import Plan
from segvit.inference.bulk import output_stems
from segvit.inference.record import Record, Tars
from segvit.model.checkpoint import read_checkpoint, read_config, rename_published_keys
from segvit.model.convert import infer_config
from segvit.model.pretrained import open_pretrained
from segvit.serve.admission import RefusedError
from segvit.serve.asking import longest_body, read_request
from segvit.system import zips
from segvit.system.tars import END, tar_member
from segvit.system.text import parse_yaml, read_json, read_lines, read_text, yaml_value
from segvit.training.run_folder import _compare_samples, _options, meaning_of, samples_of

CONFIG = SegViTConfig.preset("vit_tiny", 3, width=16, depth=2, heads=2, taps=(0, 1), image_size=32)
WORDS = (b"#", b"\t", b"a 1 2 3\n", b"ignore 0 0 0\n", b" 1", b",", b"background\n")


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _picture(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    rng, file = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).convert(mode).save(file, kind, **options)
    return file.getvalue()


def _deep_png() -> bytes:
    """Of 16 bits and three channels, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = (9).to_bytes(4) + (6).to_bytes(4) + bytes((16, 2, 0, 0, 0))
    rows = zlib.compress((b"\1" + bytes(i // 2 for i in range(54))) * 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _array(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# Readers of files: the bytes are put at a place, and read there.


def _texts(folder: Path) -> Iterator[tuple[str, Subject]]:
    def at(
        file: str, read: Callable[[Path], object], seeds: list[bytes], *more: Any, **options: Any
    ) -> Subject:
        path = folder / file

        def put(data: bytes) -> object:
            path.write_bytes(data)
            return read(path)

        return Subject(put, seeds, *more, **{"name": str(path), **options})

    names = [
        b"sky\nr\xc3\xb8d\ntree\n",
        b"sky 0 0 255\nr 255 0 0\nignore 1 2 3\n",
        b"Idx\tRatio\tName\n1\t0.1\twall, a\n",
    ]
    names += ["a\nb".encode("utf-16"), b"name r g b\nsky,1,2,3"]
    yield "lines", at("lines.txt", read_lines, names, WORDS, share=2)
    yield "names", at("names.txt", read_classes, names, WORDS, share=3)

    def mapping(path: Path) -> None:
        found = read_mapping(path)
        assert found and all(isinstance(v, int | None) and isinstance(k, int) for k, v in found.items())

    yield "mapping", at("map.json", mapping, [b'{"0": 0, "7": 1, "8": null}', b'{"-1": null}'], share=3)
    yield "json", at("a.json", read_json, [b'{"a": [1, 2.5, "x", null, {"b": true}]}', b"[]"], share=2)

    def yaml(path: Path) -> None:
        node = parse_yaml(path.read_bytes().decode("utf-8", "replace").replace("\0", ""), str(path))
        if node is not None:
            yaml_value(node, str(path))

    documents = [
        b"lr: 1e-4\nbetas: [0.9, 0.95]\nmodel: {width: 16, 'taps': [0, 1]}\nout: |\n  a\n  b\n",
        b"- a\n- b: c\n",
    ]
    words = (
        b"- ",
        b": ",
        b"? ",
        b"&a ",
        b"*a ",
        b"!!int ",
        b"{",
        b"[",
        b"|",
        b">",
        b"---\n",
        b"%YAML 1.2\n",
        b"<<: ",
    )
    yield "yaml", at("a.yaml", yaml, documents, words)

    def options(path: Path) -> None:
        taken = _Options("train")
        taken.values |= {"data": "d", "out": "o"}
        taken.read_file(str(path))
        taken.make()

    lines = b"preset: vit_tiny\nlr: 1e-4\nscale: [0.5, 2.0]\nmodel: {width: 16}\nbatch-size: 2\n"
    refusals = ValueError, OSError, TypeError
    yield (
        "options",
        at(
            "o.yaml",
            options,
            [lines, b"class_weights: inverse-sqrt\nmodel.depth: 3\n"],
            words,
            name="",
            refusals=refusals,
        ),
    )
    yield (
        "run options",
        at("config.yaml", lambda path: _options(read_text(path), path), documents[:1], words, share=0.5),
    )

    samples = {
        "classes": 3,
        "training": {"images": 2, "names": "x"},
        "validation": {"images": 1, "names": "y"},
    }
    yield (
        "samples",
        at("data.json", lambda path: _compare_samples(path, samples), [_json(samples)], name="", share=2),
    )

    def meaning(path: Path) -> None:
        if found := meaning_of(path.parent):
            _Lookup({int(value): index for value, index in found["values"].items()}, 255)

    labels = {"values": {"0": None, "1": 0, "255": None}, "colours": {"ff0000": 0}, "seen": [0, 1]}
    labels |= {"by_colour": ["colour"], "forms": ["colour", "number"], "white": 1}
    yield "meaning", at("data.json", meaning, [_json({"labels": labels})], share=2)
    yield (
        "cache",
        at(
            "cache.json",
            inspection._read_cache,
            [
                _json(
                    {
                        "a.png": [
                            "k",
                            {"picture": [3, 4], "label": [3, 4], "values": {"0": 12}, "palette": {"0": 1}},
                        ]
                    }
                )
            ],
            share=2,
        ),
    )
    count = itertools.count()
    panoptic = {"annotations": [{"file_name": "a.png", "segments_info": [{"id": 7, "category_id": 1}]}]}
    yield "panoptic", at("p.json", lambda p: known._segments(p, next(count)), [_json(panoptic)], share=2)
    context = "\n".join(
        f"{i}: {name}" for i, name in enumerate(known.KNOWN["pascal-context"].classes.names, 1)
    ).encode()
    yield (
        "context",
        at(
            "labels.txt", lambda path: known._context_table(False)(path.parent), [context], (b": ", b"1: a\n")
        ),
    )
    yield (
        "list",
        at("list.txt", find._in_list, [b"a/b.png\n/c/d.jpg\n# no\n../e.png\n"], (b"../", b"/", b"a/")),
    )
    yield (
        "config",
        at(
            "model/config.json",
            lambda path: read_config(path.parent),
            [
                _json(CONFIG.to_dict()),
                _json({**CONFIG.to_dict(), "head": "linear", "class_names": list("abc")}),
            ],
            share=3,
        ),
    )


# Weights


def _tensors(shapes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Small tensors of JSON's shapes; what is no shape is left out."""
    found = {}
    for name, shape in shapes.items():
        whole = isinstance(shape, list) and all(
            isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape
        )
        if whole and len(shape) < 8 and max(shape, default=0) <= 1 << 14 and math.prod(shape) <= 1 << 14:
            found[name.encode("utf-8", "replace").decode()] = torch.zeros(shape)
    return found


def _vit(prefix: str = "") -> dict[str, list[int]]:
    block = {"norm1.weight": [8], "norm1.bias": [8], "attn.qkv.weight": [24, 8], "attn.qkv.bias": [24]}
    block |= {"mlp.fc1.weight": [16, 8], "mlp.fc2.weight": [8, 16], "ls1.gamma": [8]}
    names = {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    names |= {"cls_token": [1, 1, 8], "pos_embed": [1, 5, 8], "patch_embed.proj.weight": [8, 3, 4, 4]}
    return {f"{prefix}{name}": shape for name, shape in names.items()}


_PUBLISHED = {
    "backbone.patch_embed.projection.weight": [8, 3, 4, 4],
    "backbone.pos_embed": [1, 5, 8],
    "backbone.cls_token": [1, 1, 8],
    **{
        f"backbone.layers.{i}.{name}": shape
        for i in range(2)
        for name, shape in {
            "ln1.weight": [8],
            "ln1.bias": [8],
            "attn.attn.in_proj_weight": [24, 8],
            "ffn.layers.0.0.weight": [16, 8],
            "ffn.layers.1.weight": [8, 16],
        }.items()
    },
    "decode_head.q.weight": [3, 8],
    "decode_head.input_proj_1.weight": [8, 8],
    "decode_head.class_embed.weight": [4, 8],
    "decode_head.decoder_1.layers.0.multihead_attn.q.weight": [8, 8],
}
_HF = {"model_type": "vit", "hidden_act": "gelu", "num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def _weights(folder: Path) -> Iterator[tuple[str, Subject]]:
    from safetensors.torch import save

    def put(name: str) -> Callable[[bytes], object]:
        def read(data: bytes) -> object:
            (folder / name).write_bytes(data)
            return read_checkpoint(folder / name)

        return read

    state = _tensors(_vit())
    name = str(folder / "w.safetensors")
    seeds = [save(state), save({"a": torch.zeros(2)}, {"mean": "0.5"})]
    words = (b'"dtype":"F32"', b'"shape":[', b'"data_offsets":[', b'"__metadata__":{')
    yield "safetensors", Subject(put("w.safetensors"), seeds, words, name)
    pickled = []
    for value in (
        state,
        {"state_dict": {"a": torch.zeros(2)}, "meta": {"CLASSES": ["a"]}},
        {"a": torch.zeros(2)},
    ):
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(value, file, _use_new_zipfile_serialization=zipped)
            pickled.append(file.getvalue())
    yield (
        "pth",
        Subject(
            put("w.pth"),
            pickled,
            (b"cbuiltins\neval\n", b"c__main__\nA\n", b"R", b"."),
            str(folder / "w.pth"),
            share=0.5,
        ),
    )

    def pretrained(data: bytes) -> None:
        value = json.loads(data)
        value = value if isinstance(value, dict) else {}
        inner = folder / "vit"
        inner.mkdir(exist_ok=True)
        shapes, about = value.get("tensors"), value.get("about")
        texts = {k: str(v) for k, v in about.items()} if isinstance(about, dict) else None
        clean = {
            k.encode("utf-8", "replace").decode(): v.encode("utf-8", "replace").decode()
            for k, v in (texts or {}).items()
        }
        (inner / "model.safetensors").write_bytes(
            save(_tensors(shapes if isinstance(shapes, dict) else {}), clean)
        )
        for beside in ("config", "open_clip_config", "preprocessor_config"):
            (inner / f"{beside}.json").write_text(json.dumps(value.get(beside)))
        open_pretrained(inner).backbone_config()

    hugging = {**_HF, "pretrained_cfg": {"mean": [0.5], "std": [0.5]}}
    clip = {"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [1, 1, 1]}}
    specs = [
        {"tensors": _vit(), "about": {"mean": "[0.5, 0.5, 0.5]", "std": "0.5,0.5,0.5"}, "config": hugging},
        {
            "tensors": _vit("backbone."),
            "about": {"cfg": "mean=[1, 2, 3], std=[1, 1, 1]"},
            "preprocessor_config": {"image_mean": [1]},
        },
        {"tensors": _vit(), "config": CONFIG.to_dict(), "open_clip_config": clip},
    ]
    specs[1]["tensors"] = {k.replace("qkv", "q"): v for k, v in specs[1]["tensors"].items()}
    valid = _JsonOnly(pretrained)
    yield "pretrained", Subject(valid, [_json(spec) for spec in specs], name=str(folder / "vit"), share=0.5)

    def published(data: bytes) -> None:
        value = json.loads(data)
        infer_config(rename_published_keys(_tensors(value if isinstance(value, dict) else {})))

    yield "published", Subject(_JsonOnly(published), [_json(_PUBLISHED)])


class _JsonOnly:
    """A reader of a description in JSON, which is no format of ours: texts that are none are left alone."""

    def __init__(self, read: Callable[[bytes], None]) -> None:
        self.read = read

    def __call__(self, data: bytes) -> None:
        try:
            json.loads(data)
        except (ValueError, RecursionError):
            return
        self.read(data)


# Pictures


def _pictures(folder: Path) -> Iterator[tuple[str, Subject]]:
    def strangers(data: bytes) -> None:
        source = pictures.PictureBytes(data, "image", max_pixels=1 << 12)
        width, height = pictures.probe(source)
        image = pictures.read_image(source)
        assert image.shape == (3, height, width) and image.dtype == torch.uint8

    kinds = [_picture(kind) for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM", "WEBP")]
    kinds += [_picture("PNG", mode) for mode in ("L", "P", "1", "LA", "RGBA")] + [_picture("TIFF", "CMYK")]
    others = [_array(np.zeros((4, 5, 3), np.uint8)), _array(np.ones((4, 5), np.float32))]
    others += [_deep_png(), b"P5\n9 6\n4095\n" + bytes(range(6)) * 18, b"P3 2 1 7\n# why\n1 2 3 4 5 6\n"]
    refusals = ValueError, OSError, ImportError
    yield (
        "picture",
        Subject(strangers, kinds + others, (b"IHDR", b"IDAT", b"\xff\xd8"), "image", refusals),
    )

    def labels(data: bytes) -> None:
        ending = ".npy" if data.startswith(b"\x93NUMPY") else ".png"
        path = folder / f"label{ending}"
        path.write_bytes(data)
        with _max_pixels():
            label = stored.stored_label(path)
        assert label.values.ndim == 2 and label.values.dtype.kind in "ui"

    yield (
        "label",
        Subject(labels, kinds[:1] + kinds[7:10] + others, name=str(folder / "label"), refusals=refusals),
    )
    if find_spec("scipy"):
        from scipy.io import savemat

        file = io.BytesIO()
        savemat(file, {"S": np.ones((3, 4), np.uint8), "names": np.array(["unlabeled", "person"], object)})

        def matlab(data: bytes) -> None:
            (folder / "label.mat").write_bytes(data)
            known._read_stuff(folder / "label.mat")

        dated = file.getvalue()  # the first line has the time
        yield (
            "matlab",
            Subject(
                matlab, [dated[:40] + b" " * 76 + dated[116:]], name=str(folder / "label.mat"), share=0.5
            ),
        )


@contextmanager
def _max_pixels() -> Iterator[None]:
    os.environ["SEGVIT_MAX_PIXELS"] = "4096"
    try:
        yield
    finally:
        del os.environ["SEGVIT_MAX_PIXELS"]


# Tars


def _archives(folder: Path) -> Iterator[tuple[str, Subject]]:
    file = io.BytesIO()
    Image.new("L", (9, 6), 1).save(file, "PNG")
    png, label = _picture("PNG"), file.getvalue()
    tar = (
        b"".join(
            tar_member(n, d) for n, d in (("a/x.png", png), ("y.jpg", _picture("JPEG")), ("z.txt", b"no"))
        )
        + END
    )
    old = io.BytesIO()
    with tarfile.open(fileobj=old, mode="w", format=tarfile.GNU_FORMAT) as file:
        member = tarfile.TarInfo("n" * 120 + ".png")
        member.size = len(png)
        file.addfile(member, io.BytesIO(png))
    path = folder / "a.tar"

    def members(data: bytes) -> None:
        path.write_bytes(data)
        for found in find._in_tar(path, find._Sieve(path, str))[:3]:
            assert not Path(found.folder).is_absolute() and ".." not in found.folder.parts
            pictures.probe(found.open())

    words = (b"ustar", b"\x0000000000", b"path=", b"30 path=a.png\n", b"size=")
    yield "tar", Subject(members, [tar, old.getvalue()], words, str(path))

    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("a/x.png", png)
        archive.writestr("y.jpg", _picture("JPEG"), zipfile.ZIP_DEFLATED)

    def in_zip(data: bytes) -> None:
        path.with_suffix(".zip").write_bytes(data)
        zips._contents.cache_clear()  # the clock of files may not have moved
        inside = zips.ZipPath(path.with_suffix(".zip"))
        for found in find._in_zip(inside, find._Sieve(inside, str))[:3]:
            assert not Path(found.folder).is_absolute() and ".." not in found.folder.parts
            pictures.probe(found.open())

    words = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"../", b"\x08\x00", b"\xff\xff\xff\xff")
    yield "zip", Subject(in_zip, [zipped.getvalue()], words, str(path.with_suffix(".zip")))

    place = folder / "shards"
    place.mkdir()
    content = tar_member("a.png", png) + tar_member("a.label.png", label) + END
    (place / "0.tar").write_bytes(content)
    start = 512 + len(png) + -len(png) % 512 + 512
    shared = {"num_classes": 3, "class_names": ["a", "b", "c"], "palette": None, "reduce_zero_label": False}
    index = {
        "names": ["a.png"],
        "pictures": [[512, len(png)]],
        "labels": [[start, len(label)]],
        "split": "training",
    }
    meaning = {"values": {"0": 0}, "colours": {"ff0000": 0}, "seen": [0], "white": 1}
    meaning |= {"by_colour": ["colour"], "forms": ["colour", "number"]}
    index |= {"bytes": len(content), "data": shared, "meaning": meaning, "validation_share": 0.1}
    coloured = {**index, "data": {**shared, "palette": [[1, 2, 3]] * 3, "class_names": None}}

    def indices(data: bytes) -> None:
        (place / "0.json").write_bytes(data)
        (place / "shards.json").write_text('{"shards": ["0.tar"]}')
        found = shards.Shards(str(place))
        assert isinstance(found.num_classes, int)
        samples_of(found, found)
        assert found.class_names is None or len(found.class_names) == found.num_classes
        for i in range(min(2, len(found))):
            item = found[i]
            assert item["image"].ndim == 3 and item["label"].ndim == 2

    assert pack  # the writer of these
    yield "shard index", Subject(indices, [_json(index), _json(coloured)], name=str(place), share=2)

    def listed(data: bytes) -> None:
        (place / "0.json").write_bytes(_json(index))
        (place / "shards.json").write_bytes(data)
        shards.Shards(str(place))

    yield "shard list", Subject(listed, [b'{"shards": ["0.tar"]}'], name=str(place))

    def patterns(data: bytes) -> None:
        shards._expand(data.decode("utf-8", "replace"))

    yield (
        "shard pattern",
        Subject(
            patterns,
            [b"s/{00000..00012}.tar", b"{0..3}/{1..2}.tar"],
            (b"{0..9}", b"{", b"..", b"}", b"{0..99999}"),
            "data",
        ),
    )

    lines = [{"picture": "a.jpg", "output": "a", "width": 4}, {"picture": "b.jpg", "error": "no"}]
    text = b"".join(_json(line) + b"\n" for line in lines)
    group = b"".join(
        tar_member(n, d) for n, d in (("a.labels.png", label), ("a.json", _json(lines[0]) + b"\n"))
    )

    def recorded(name: str) -> Callable[[bytes], None]:
        out = folder / f"record{Path(name).suffix}"

        def read(data: bytes) -> None:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            (out / name).write_bytes(data)
            record = Record(out, (0, 1), {"size": 3}, {"a.jpg": "a", "b.jpg": "b"})
            try:
                if name.endswith(".part"):
                    Tars(out, record, 10).close()
                record.is_done("c.jpg", "c")
            finally:
                record.close()

        return read

    for name, seeds in {
        "manifest-00000-of-00001.jsonl": [text],
        "manifest.json": [b'{"size": 3, "checkpoint": "x"}'],
        "results-00000-of-00001-000000.tar.part": [group, group + group[:700], group + END],
    }.items():
        yield f"record {name.partition('.')[2]}", Subject(recorded(name), seeds, name="record", share=0.3)

    def program(data: bytes) -> None:
        path = folder / "a.pt2"
        path.write_bytes(data)
        aot.load(path)

    zipped = []
    for needs in (b'{"torch": "0.0", "machine": "x", "device": "cpu"}', b'{"torch": "0.0"}', b'["torch"]'):
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w", method) as archive:
                for name, content in ((aot.METADATA, b"{}"), (aot._NEEDS, needs), (aot.LIBRARY, b"\x7fELF")):
                    archive.writestr(f"a/{name}", content)
            zipped.append(file.getvalue())
    yield (
        "pt2",
        Subject(program, zipped, (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"), str(folder / "a.pt2")),
    )


# What is in memory


def _messages() -> Iterator[tuple[str, Subject]]:
    about = {"format": "onnx", "precision": "float32", "source": None}
    text = metadata.describe(CONFIG, Plan(size=(32, 32)), about)

    def described(data: bytes) -> None:
        found = metadata.read(data.decode("utf-8", "replace"), "a.onnx")
        assert isinstance(found.plan, Plan) and isinstance(found.precision, str)
        assert found.plan.batch is None or isinstance(found.plan.batch, int)

    yield "metadata", Subject(described, [text.encode()], name="a.onnx", share=2)

    part = b'--B\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
    png = _picture("PNG")
    form = (
        part % (b"image", b'; filename="a.png"\r\nContent-Type: image/png', png)
        + part % (b"show", b"", b"labels")
        + b"--B--\r\n"
    )
    encoded = b'{"image": "iVBORw0KGgo=", "format": "png", "alpha": 0.5, "include": ["colors", "picture"]}'
    uri = b'{"image": "data:image/png;base64,iVBORw0K", "class": "0"}'
    head = b"multipart/form-data; boundary=B\n*/*\n"
    requests = [
        head + form,
        b"application/json\nimage/png;q=0.5, */*\n" + encoded,
        b"application/json\n\n" + uri,
    ]

    def asked(data: bytes) -> None:
        kind, accept, body = [*data.split(b"\n", 2), b"", b""][:3]
        content, path = kind.decode("latin-1"), "/similarity" if b"class" in body else "/predict"
        assert longest_body(content, 1 << 12) >= 1 << 12
        found = read_request(
            path,
            [("format", "json")] if b"class" in body and len(body) % 2 else [],
            content,
            accept.decode("latin-1"),
            bytearray(body),
            1 << 14,
        )
        assert found.picture and 0 <= found.alpha <= 1 and found.format in ("json", "png")

    words = (
        b"--B\r\n",
        b"--B--",
        b"\r\n\r\n",
        b"Content-Disposition: form-data; ",
        b'name="image"',
        b"boundary=",
        b"=?utf-8?",
        b"q=1",
    )
    if find_spec("python_multipart"):
        yield "request", Subject(asked, requests, words, refusals=(RefusedError,), share=2)

    def stems(data: bytes) -> None:
        names = [
            name
            for name in data.decode("utf-8", "surrogateescape").split("\n")
            if name and "\0" not in name and "/" not in name
        ]
        names = [name for name in names if Path(name).stem and len(os.fsencode(name)) < 256][:50]
        found = output_stems([Path("/in") / name for name in names], Path("/out"))
        assert len({stem.casefold() for stem in found}) == len(names)
        assert all(len(os.fsencode(stem)) < 256 for stem in found)

    yield (
        "stems",
        Subject(
            stems,
            [b"a.png\na.jpg\nA.png\nCON.png\nn\xcc\x88.png", b"x" * 250 + b".png"],
            (b"\na.png", b"a_2\n", b"\xff"),
            share=0.5,
        ),
    )

    def packed(data: bytes) -> None:
        value = json.loads(data)
        value = value if isinstance(value, dict) else {}
        parts = [
            _tensors({"t": value.get(name)}).get("t") for name in ("input", "weight", "panels", "factors")
        ]
        kinds = {"h": torch.float16, "b": torch.bfloat16, "i": torch.int8, "f": torch.float32}
        kind = kinds.get(str(value.get("kind")), torch.float16)
        x, weight, panels, factors = parts
        if x is None or weight is None:
            return
        x, weight = (part.to(kind if kind.is_floating_point else torch.float32) for part in (x, weight))
        held = segvit_kernels.PackedWeight(panels.to(kind) if panels is not None else None, factors)
        segvit_kernels.linear(x, weight, packed=held, backend="eager")

    shapes = {"input": [2, 40], "weight": [50, 40], "panels": [2, 32, 48, 2], "factors": [96], "kind": "h"}
    others = {
        "input": [2, 3, 40],
        "weight": [50, 40],
        "panels": [2, 2, 2, 16, 32],
        "factors": None,
        "kind": "b",
    }
    yield (
        "packed weight",
        Subject(_JsonOnly(packed), [_json(shapes), _json(others)], refusals=(ValueError, TypeError)),
    )

    def runs(data: bytes) -> None:
        bits = np.unpackbits(np.frombuffer(data[:256], np.uint8))
        height = 1 + len(data) % 40
        width = max(1, len(bits) // height)
        mask = np.resize(bits, (height, width)).astype(bool)
        logits = torch.where(torch.from_numpy(mask), 1.0, -1.0)[None, None]
        found = segvit_kernels.mask_binarize(logits, (height, width), format="rle", backend="eager")
        (encoded,) = found.masks[0]
        assert encoded["size"] == [height, width] and np.array_equal(_decoded(encoded), mask)

    yield "run lengths", Subject(runs, [bytes(64), b"\xff" * 90, bytes(range(200))], share=0.3)


def _decoded(encoded: dict[str, Any]) -> np.ndarray:
    """A mask from COCO's run-length encoding, by its definition."""
    counts, number, shift = [], 0, 0
    for byte in encoded["counts"]:
        number |= (byte - 48 & 31) << shift
        shift += 5
        if not byte - 48 & 32:
            number -= (1 << shift) if byte - 48 & 16 else 0
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    values = np.repeat(np.arange(len(counts)) % 2, counts).astype(bool)
    return values.reshape(encoded["size"], order="F")


@contextmanager
def subjects() -> Iterator[dict[str, Subject]]:
    """All by name, on a folder of their own."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        folder = Path(name)
        (folder / "model").mkdir()
        found = [*_texts(folder), *_weights(folder), *_pictures(folder), *_archives(folder), *_messages()]
        yield {re.sub(r"\W+", "-", name): subject for name, subject in found}
