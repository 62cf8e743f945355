"""A fuzz of the whole command line: every run ends in a right result, or in one line with exit code 2.

Options are drawn from the dataclasses' types and ranges, so that a new one is drawn by itself: valid values,
the edges of ranges, and nonsense; files from a folder of oddities. Everything runs in this process, with tiny
models. SEGVIT_FUZZ_RUNS sets how many (`make fuzz`: 2000), SEGVIT_FUZZ_SEED which; a failure names the seed
and the number of the run, and SEGVIT_FUZZ_RUN runs this one alone.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import random
import re
import shutil
import signal
import tarfile
import traceback
import typing
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segvit import SegViT, SegViTConfig
from segvit.cli import COMMANDS, main
from segvit.data import read_image
from segvit.model.heads import load_model
from segvit.model.linear_head import LinearSegmenter
from segvit.options import InferenceOptions

RUNS = int(os.environ.get("SEGVIT_FUZZ_RUNS", "40"))
SEED = int(os.environ.get("SEGVIT_FUZZ_SEED", "1"))
SECONDS = 20  # after which a run is interrupted as by Ctrl-C

NAMES = ("sky", "r\u00f8d", "tree")
TINY = {"width": 16, "depth": 2, "heads": 2, "taps": (0, 1), "patch_size": 8, "decoder_depth": 1}

# What Python, torch or a library would say, and no message of ours may.
FOREIGN = re.compile(
    r"object is not|has no attribute|<class|index out of|unhashable|NoneType|Traceback|must be str"
    r"|not iterable|invalid literal|could not convert|codec can't|\[Errno|KeyError|unexpected keyword"
    r"|positional argument"
    r"|unsupported operand|cannot convert|ndarray|dictionary update|not subscriptable|division|Expected a "
    r"|embedded null|broadcast|RuntimeError|<frozen|expected sequence of length|Invalid argument"
)


# A folder of oddities


def _pictures(folder: Path, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)

    def save(name: str, mode: str, size: tuple[int, int], **options) -> None:
        array = rng.integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
        Image.fromarray(array).resize(size).convert(mode).save(folder / name, **options)

    save("plain.jpg", "RGB", (40, 33))
    save("one.png", "RGB", (1, 1))
    save("thin.png", "RGB", (1, 90))
    save("long.png", "RGB", (150, 2))
    save("large.png", "RGB", (97, 64))
    save("grey.png", "L", (31, 17))
    save("bilevel.png", "1", (24, 24))
    save("palette.gif", "P", (20, 20))
    save("palette.png", "P", (20, 20), transparency=3)
    save("cmyk.jpg", "CMYK", (18, 26))
    save("alpha.png", "RGBA", (21, 9))
    save("grey_alpha.png", "LA", (9, 21))
    save("lab.tif", "LAB", (16, 16))
    save("ycc.tif", "YCbCr", (16, 16))
    save("web.webp", "RGB", (30, 30))
    save("bitmap.bmp", "RGB", (15, 11))
    save("names with \u00e9 and 'quotes'.png", "RGB", (16, 8))
    save("line\nbreak.png", "RGB", (8, 16))
    save("-dash.png", "RGB", (8, 8))
    save(f"{'n' * 240}.png", "RGB", (8, 8))
    save("CON.x.png", "RGB", (8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    save("turned.jpg", "RGB", (40, 20), exif=exif)
    Image.fromarray(rng.integers(0, 65536, (20, 30), dtype=np.uint16)).save(folder / "deep.png")
    Image.fromarray(rng.random((12, 10), dtype=np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((6, 5), np.nan, np.float32)).save(folder / "nan.tif")
    np.save(folder / "array.npy", rng.integers(0, 256, (14, 12, 3), dtype=np.uint8))
    np.save(folder / "many.npy", rng.integers(0, 256, (14, 12, 5), dtype=np.uint8))
    np.save(folder / "objects.npy", np.array([{}]), allow_pickle=True)
    whole = (folder / "plain.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    whole = (folder / "large.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "other.txt").write_text("no picture")
    (folder / "sub").mkdir()
    save("sub/plain.png", "RGB", (12, 12))
    (folder / "nothing").mkdir()


def _data(folder: Path, rng: np.random.Generator, values, **files) -> None:
    """A small data set with labels of these values, and files beside it."""
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for name in "ab":
            size = (int(rng.integers(8, 40)), int(rng.integers(8, 40)))
            picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / "images" / split / f"{name}.png")
            label = rng.choice(np.array(values), (size[0] // 8 + 1, size[1] // 8 + 1))
            label = label.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]]
            label.flat[: len(values)] = values[: label.size]
            Image.fromarray(label.astype(np.uint8)).save(folder / "annotations" / split / f"{name}.png")
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)


def _texts(folder: Path) -> None:
    folder.mkdir()
    texts = {
        "names.txt": "\n".join(NAMES), "bom.txt": "\ufeff" + "\r\n".join(NAMES) + "\r\n\r\n",
        "cr.txt": "\r".join(NAMES), "twice.txt": "a\na\nb", "two.txt": "a\nb", "none.txt": "\n# nothing\n",
        "comments.txt": "# mine\nsky \n\nr\u00f8d\t\ntree",
        "colours.txt": "sky 0 0 255\nr\u00f8d 255 0 0\ntree 1 2 3",
        "mapping.json": '{"0": 0, "1": 1, "2": 2, "3": null}', "list.json": "[1, 2]",
        "twice.json": '{"1": 0, "1": 1}',
        "nan.json": '{"1": NaN}', "words.json": '{"a": 0}', "broken.json": '{"1": 0,}',
        "out.json": '{"1": 77}',
        "float.json": '{"1": 0.5}', "text.json": '{"1": "0"}', "nested.json": '{"1": [0]}', "empty.json": "",
        "huge.json": '{"999999999999999999999": 0}', "deep.json": "[" * 100000,
        "list.yaml": "- a", "empty.yaml": "", "broken.yaml": "lr: [1,", "alias.yaml": "a: &x 1\nlr: *x",
        "tag.yaml": "lr: !!python/object:os.system 1", "unknown.yaml": "no_such: 1",
        "tab.yaml": "lr: 1\n\tclip: 2",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    (folder / "utf16.txt").write_bytes("\n".join(NAMES).encode("utf-16"))
    (folder / "utf16.json").write_bytes(texts["mapping.json"].encode("utf-16"))
    (folder / "latin.txt").write_bytes("\n".join(NAMES).encode("latin-1"))
    (folder / "nul.txt").write_bytes(b"a\0b\nc")


def _checkpoints(folder: Path) -> None:
    torch.manual_seed(0)

    def save(name: str, kind: type = SegViT, classes: int = 3, **changes) -> None:
        values = {**TINY, "image_size": 32, "class_names": NAMES if classes == 3 else None, **changes}
        model = kind(SegViTConfig.preset("vit_tiny", classes, **values)).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)

    save("plain")
    save("linear", LinearSegmenter)
    save("shrunk", shrunk=True, depth=3, shrink_at=1, taps=(0, 2))
    save("many", classes=300)
    save("nameless", class_names=None)
    save("run/checkpoints/best")
    for name in ("no_weights", "no_config", "cut", "damaged", "list", "unfit", "odd"):
        shutil.copytree(folder / "plain", folder / name)
    (folder / "no_weights/model.safetensors").unlink()
    (folder / "no_config/config.json").unlink()
    whole = (folder / "cut/model.safetensors").read_bytes()
    (folder / "cut/model.safetensors").write_bytes(whole[: len(whole) // 2])
    config = (folder / "plain/config.json").read_text()
    (folder / "damaged/config.json").write_text(config[:-40])
    (folder / "list/config.json").write_text("[1]")
    (folder / "unfit/config.json").write_text(
        config.replace('"depth": 2', '"depth": 3').replace("    1\n", "    2\n")
    )


def _world(root: Path) -> dict[str, list[str]]:
    """Make the files; returns the words that options of each kind of file are drawn from."""
    rng = np.random.default_rng(0)
    _pictures(root / "pictures", rng)
    names = "\n".join(NAMES).encode()
    _data(root / "zero", rng, [0, 1, 2], names__txt=names)
    _data(root / "ade", rng, [0, 1, 2, 3], names__txt=names)
    _data(root / "void", rng, [1, 2, 3, 255], names__txt=names)
    _data(root / "binary", rng, [0, 255], names__txt=b"no\nyes")
    _data(root / "beyond", rng, [0, 9, 200], names__txt=names)
    _data(root / "nameless", rng, [0, 1, 2])
    _data(root / "ignored", rng, [255], names__txt=names)
    _data(root / "damaged", rng, [1, 2, 3], names__txt=names)
    (root / "damaged/images/validation/a.png").write_text("no picture")
    _data(root / "unlabelled", rng, [1, 2, 3], names__txt=names)
    (root / "unlabelled/annotations/validation/a.png").unlink()
    _data(root / "unequal", rng, [1, 2, 3], names__txt=names)
    Image.new("L", (3, 3)).save(root / "unequal/annotations/training/a.png")
    _texts(root / "texts")
    _checkpoints(root / "models")
    relative = [str(path.relative_to(root)) for path in sorted(root.rglob("*"))]

    def under(folder: str) -> list[str]:
        return [name for name in relative if name.startswith(f"{folder}/")]

    data = [
        "zero",
        "ade",
        "void",
        "binary",
        "beyond",
        "nameless",
        "ignored",
        "damaged",
        "unlabelled",
        "unequal",
    ]
    models = [f"models/{path.name}" for path in sorted((root / "models").iterdir())]
    good = ["models/plain", "models/linear", "models/shrunk", "models/nameless", "models/run"]
    return {
        "images": [*under("pictures"), "pictures", "pictures/nothing", "zero/images/validation"],
        "data": [*data, "synthetic", "pictures", "texts/names.txt"],
        "good data": ["zero", "ade", "synthetic"],
        "checkpoint": [*models, "models/plain/model.safetensors", "pictures/plain.jpg"],
        "good checkpoint": good,
        "texts": under("texts"),
        "any": [
            "",
            " ",
            "nowhere",
            "a\0b",
            "\udcff",
            "x" * 300,
            ".",
            "/",
            "{",
            "null",
            "plain",
            "sky",
            "0",
            *relative[::9],
        ],
    }


# Drawing


NONSENSE = [
    "",
    " ",
    "nan",
    "inf",
    "-1",
    "0",
    "1e999",
    "many",
    "null",
    "[]",
    "{}",
    "[1",
    "true",
    "9" * 25,
    "\u0663",
    "0x10",
    "--",
]
# Beyond these a right value only takes long (or all of the machine).
PATIENCE = {
    "max_steps": 3, "devices": 1, "workers": 0, "image_size": 64, "batch_size": 4, "accumulate": 4,
    "batch": 3,
    "size": 64, "seconds": 0.02, "synthetic_images": 6, "synthetic_validation": 4, "locate_images": 8,
    "short_side": 80, "scales": 3, "threads": 2, "classes": 5, "window": 64, "steps": 1, "scale": 4,
}  # fmt: skip


class Draw:
    def __init__(self, rng: random.Random, world: dict[str, list[str]], out: str) -> None:
        self.rng, self.world, self.out = rng, world, out

    def number(self, name: str, kind: type, limits) -> str:
        low = max(limits.at_least, limits.more_than)
        high = min(limits.at_most, limits.less_than)
        low, high = (value if math.isfinite(value) else None for value in (low, high))
        most = PATIENCE.get(name)
        if kind is int:
            start = 0 if low is None else int(low)
            values = [
                start,
                start + 1,
                start + 2,
                8,
                16,
                24,
                32,
                self.rng.randint(1, 40),
                start - 1,
                -(2**40),
                2**40,
            ]
        else:
            start = 0.0 if low is None else low
            values = [
                start,
                start + 1e-9,
                start + 0.3,
                1.0,
                0.5,
                2.5,
                10 * self.rng.random(),
                start - 0.1,
                -1e30,
                1e30,
            ]
        if high is not None:
            values += [high, high + 1, high - 1e-9 if kind is float else int(high) - 1]
        if most is not None:
            values = [value for value in values if value <= most or value not in limits]
        right = [value for value in values if value in limits]
        return str(self.rng.choice(right if right and self.rng.random() < 0.7 else values))

    def text(self, name: str) -> str:
        rng, world = self.rng, self.world
        if name == "host":  # other names would be looked up
            return rng.choice(["127.0.0.1", "localhost", "192.0.2.1", "::1", "1.2.3"])
        if rng.random() < 0.1:
            return rng.choice(world["any"])
        if name in ("data", "folder"):
            return rng.choice(world["good data"] if rng.random() < 0.5 else world["data"])
        if name in ("checkpoint", "model"):
            good = rng.random() < 0.6
            return rng.choice(world["good checkpoint"] if good else world["checkpoint"])
        if name in ("names", "label_mapping", "split_list"):
            return rng.choice(world["texts"])
        if name in ("images", "image"):
            return rng.choice(world["images"])
        if name in ("maps", "score_classes"):
            return rng.choice([*NAMES, "0", "2", "TREE", "7", "-1"])
        if name == "backend":
            return rng.choice(["eager", "cpu", "cuda", "triton", "abacus"])
        if name == "preset":
            return rng.choice(["vit_tiny", "vit_huge"])
        if name in ("out", "json", "csv", "confusion", "sheet", "html"):
            ends = ["", ".json", ".csv", ".png", "/deep/er"]
            return rng.choice(
                [f"{self.out}{rng.choice(ends)}", self.out, "pictures/plain.jpg", "nowhere/x.png"]
            )
        return rng.choice(
            [*world["any"], *world["texts"], "validation", "training", "{split}", "images/{split}/*.png"]
        )

    def value(self, name: str, kind, limits) -> list[str]:
        """The words of an option's value."""
        if self.rng.random() < 0.04:
            return [self.rng.choice(NONSENSE)]
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is typing.Literal:
            return [self.rng.choice([*map(str, arguments), "neither"])]
        if origin is list:
            count = 4 if name == "region" and self.rng.random() < 0.8 else self.rng.choice([1, 1, 2, 3])
            return [self.value(name, arguments[0], limits)[0] for _ in range(count)]
        if origin is tuple:
            return [f"[{', '.join(self.value(name, member, limits)[0] for member in arguments)}]"]
        if origin is dict:
            fields = dataclasses.fields(SegViTConfig)[3:] + dataclasses.fields(type(CONFIG.backbone))
            field = self.rng.choice(fields).name
            odd = ["0", "-1", "5", "1.5", "null", "[]", "[0]", "[0, 1]", "x", "true", "{}", "nan", "1e30"]
            odd = {"1": 0, "2": 7} if arguments[0] is int else {**TINY, field: Word(self.rng.choice(odd))}
            return [str(odd).replace("'", "").replace("(", "[").replace(")", "]")]
        if origin is not None and arguments:  # a union
            return self.value(name, self.rng.choice(arguments), limits)
        if kind in (int, float):
            return [self.number(name, kind, limits)]
        if kind is type(None):
            return ["null"]
        return [self.text(name)]

    def words(self, command: str) -> list[str]:
        """A command with options."""
        options = COMMANDS[command][0]
        kinds = typing.get_type_hints(options)
        words, positional, chosen = [], [], {}
        share = self.rng.choice([0.0, 0.03, 0.06, 0.12, 0.25])
        for field in dataclasses.fields(options):
            required = field.default is field.default_factory is dataclasses.MISSING
            if self.rng.random() >= (0.97 if required else share):
                continue
            name, kind = field.name, kinds[field.name]
            flag = f"--{name.replace('_', '-')}"
            if name == "compile":  # it builds for minutes
                continue
            if kind is bool:
                words.append(flag if self.rng.random() < 0.5 else f"--no-{flag[2:]}")
                continue
            value = self.value(name, kind, field.metadata["range"])
            if required and name in ("data", "checkpoint", "model", "folder") and self.rng.random() < 0.6:
                value = [
                    self.rng.choice(
                        self.world[f"good {'data' if name in ('data', 'folder') else 'checkpoint'}"]
                    )
                ]
            if field.metadata["positional"]:
                positional += value
            elif self.rng.random() < 0.1 and len(value) == 1:
                words.append(f"{flag}={value[0]}")
            elif self.rng.random() < 0.1 and len(value) == 1:
                chosen[name] = value[0]
            else:
                words += [flag, *value]
        if chosen:
            path = Path(f"{self.out}.yaml")
            path.write_bytes(
                "".join(f"{name}: {value}\n" for name, value in chosen.items()).encode("utf-8", "replace")
            )
            words = ["--config", str(path), *words]
        elif self.rng.random() < 0.03:
            words += [
                "--config",
                self.rng.choice([name for name in self.world["texts"] if name.endswith("yaml")]),
            ]
        if self.rng.random() < 0.03:
            words.insert(
                self.rng.randrange(len(words) + 1),
                self.rng.choice(["--", "--no-such", "stray", "-x", "--flip=1"]),
            )
        return [*command.split(), *quick(options, words), *positional, *words]


class Word(str):
    __repr__ = str.__str__


CONFIG = SegViTConfig.preset("vit_tiny", 3, **TINY, image_size=32)


def quick(options: type, words: list[str]) -> list[str]:
    """Options that make a run short, where they are not drawn."""
    short = {
        "out": "out", "preset": "vit_tiny", "model": json.dumps(TINY), "image_size": "32", "max_steps": "2",
        "batch_size": "2", "workers": "0", "synthetic_images": "3", "synthetic_validation": "2",
        "accelerator": "cpu", "warmup_steps": "1", "seconds": "0.01", "size": "16", "steps": "1",
    }  # fmt: skip
    fields = {field.name: field for field in dataclasses.fields(options)}
    given = {word.partition("=")[0] for word in words}
    result = []
    for name, value in short.items():
        flag = f"--{name.replace('_', '-')}"
        if name in fields and not fields[name].metadata["positional"] and flag not in given:
            result += [flag, value]
    for name in ("progress", "alternatives", "compile"):
        if name in fields:
            result.append(f"--no-{name}")
    return result


# Running and judging


def run(words: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); what escapes `main` is raised."""

    def too_long(*_) -> None:
        raise KeyboardInterrupt

    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("default")
            code = main(words)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return code, out.getvalue(), err.getvalue()


def listing(root: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in root.rglob("*")
        if path.is_file()
    }


def judge(words: list[str], code: int, err: str, before: dict, root: Path, inputs: set[str]) -> list[str]:
    """What is wrong with a run."""
    faults = []
    if code not in (0, 2, 130):
        faults.append(f"exit code {code}")
    lines = err.splitlines()
    if "--progress" in words:
        lines = [line for line in lines if not re.search(r" \d+/\d+ |^step ", line)]
    if words[0] == "bench":  # says on stderr what it is doing
        doing = ("timing ", "where the time goes", "building ", "measuring ")
        lines = [line for line in lines if not line.startswith(doing)]
    if code == 0 and lines:
        faults.append(f"it went well, and complains: {lines[:3]}")
    if code == 2:
        if len(lines) != 1 or not re.match(r"segvit( \w+)*: error: \S", lines[0]):
            faults.append(f"{len(lines)} lines: {lines[:3]}")
        if FOREIGN.search(err):
            faults.append(f"not our words: {err.strip()}")
        if len(err) > 3000:
            faults.append("an endless line")
    after = listing(root)
    for name, state in before.items():
        if name not in inputs or any(
            word.endswith(name) for word in words
        ):  # of an earlier run, or asked for
            continue
        if after.get(name) != state and not name.startswith(".") and "segvit" not in name:
            faults.append(f"an input changed: {name}")
    new = [root / name for name in after if name not in before]
    for path in new:
        try:
            _check_file(path, words)
        except Exception as error:
            faults.append(f"{path.relative_to(root)}: {type(error).__name__}: {error}")
    if code == 0:
        try:
            _check_result(words, root)
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}" + traceback.format_exc()[-600:])
    return faults


def _check_file(path: Path, words: list[str]) -> None:
    """A new file is whole: raises where it is not."""
    name = path.name
    if name.endswith((".tmp", ".old")) or re.match(r"\.(?!segvit)", name):
        raise ValueError("left behind")
    if path.suffix == ".png":
        with Image.open(path) as picture:
            picture.load()
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            for key in arrays:
                assert arrays[key].size
                assert arrays[key].dtype.kind != "f" or np.isfinite(arrays[key]).all(), key
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda word: 1 / 0)
    elif path.suffix == ".yaml" and path.name == "config.yaml":
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
    elif path.suffix == ".csv":
        assert list(csv.reader(path.open(encoding="utf-8")))
    elif name == "model.safetensors":
        state = load_model(path.parent).state_dict()
        assert all(bool(value.isfinite().all()) for value in state.values()), "weights are not finite"


def _check_result(words: list[str], root: Path) -> None:
    """A run that went well gave what it should."""
    from segvit.commands.parser import parse

    command = " ".join(words[:2]) if words[0] == "data" else words[0]
    config = parse(command, words[len(command.split()) :])
    if command == "predict":
        from segvit.data.find import find_pictures
        from segvit.inference.bulk import output_stems
        from segvit.inference.engine import in_precision

        model = in_precision(load_model(config.checkpoint), torch.device("cpu"), config.dtype)
        options = InferenceOptions(**config.inference_fields())
        out = Path(config.out)
        files = find_pictures(config.images, recursive=config.recursive, leave_out=out)
        stems = output_stems(files, out, dots=config.pack is None)
        packed = {}
        for path in out.glob("*.tar"):
            with tarfile.open(path) as tar:
                packed |= {member.name: tar.extractfile(member).read() for member in tar}
        for index, (file, stem) in enumerate(zip(files, stems, strict=True)):
            stored = packed.get(f"{stem}.labels.png") if config.pack else out / f"{stem}_labels.png"
            stored = np.asarray(Image.open(io.BytesIO(stored) if config.pack else stored))
            image = read_image(file.open())
            assert stored.shape == tuple(image.shape[1:]), "another size"
            assert stored.max() < model.config.num_classes, "no such class"
            if index < 2:
                labels, scores = model.predict(image, options, return_scores=True)
                two = scores.topk(min(2, len(scores)), 0).values
                clear = (two[0] - two[-1] > 1e-4 * two[0].abs()) if len(scores) > 1 else labels >= 0
                assert (torch.from_numpy(stored.astype(np.int64)) == labels.long())[clear].all(), (
                    "other labels"
                )
    if command == "evaluate" and config.json:
        result = json.loads(Path(config.json).read_text(encoding="utf-8"))
        matrix = np.array(result["confusion"])
        union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
        iou = [
            None if not u else h / u for h, u in zip(matrix.diagonal().tolist(), union.tolist(), strict=True)
        ]
        assert list(result["iou"].values()) == pytest.approx(iou), "IoU"
        assert result["images"] > 0
    if command == "train":
        folder = Path(config.out) / "checkpoints" / "last"
        assert load_model(config.out) and folder.exists()


def draw_run(number: int, world: dict[str, list[str]]) -> list[str]:
    rng = random.Random(f"{SEED}:{number}")
    weights = {"predict": 8, "train": 6, "evaluate": 5, "bench": 1, "convert": 1, "serve": 1, "demo": 0}
    names = list(COMMANDS)
    command = rng.choices(names, [weights.get(name, 3) for name in names])[0]
    return Draw(rng, world, "out").words(command)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    (root / "world").mkdir()
    return root / "world", _world(root / "world")


def test_every_run_ends_well(world, monkeypatch, capsys):
    import resource

    root, words_of = world
    monkeypatch.chdir(root)
    monkeypatch.setenv("SEGVIT_CACHE", str(root / ".segvit"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("SEGVIT_TRACEBACK", raising=False)
    monkeypatch.setattr("segvit.serve.server.serve", lambda service, *_: service.close())  # as after a signal
    limit = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, limit[1]))  # absurd sizes fail instead of the machine
    numbers = [int(os.environ["SEGVIT_FUZZ_RUN"])] if "SEGVIT_FUZZ_RUN" in os.environ else range(RUNS)
    inputs = set(listing(root))
    codes: dict[tuple[str, int], int] = {}
    failures = []
    try:
        for number in numbers:
            for left in [*root.glob("out*"), *root.glob("data-check*")]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            words = draw_run(number, words_of)
            before = listing(root)
            state = torch.get_rng_state(), torch.get_num_threads()
            try:
                code, out, err = run(words)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                trace = traceback.extract_tb(error.__traceback__)[-1]
                faults = [f"escapes: {type(error).__name__}: {error} ({trace.filename}:{trace.lineno})"]
                code = -1
            else:
                faults = judge(words, code, err, before, root, inputs)
            torch.set_rng_state(state[0])
            torch.set_num_threads(state[1])
            codes[words[0], code] = codes.get((words[0], code), 0) + 1
            if "SEGVIT_FUZZ_LOG" in os.environ:
                with open(os.environ["SEGVIT_FUZZ_LOG"], "a") as file:
                    message = err.strip() if code else out.strip()[-120:]
                    file.write(
                        f"{number} {code} {words!r}\n    {message!r}\n"
                        + "".join(f"    !! {f}\n" for f in faults)
                    )
            if faults:
                failures.append(
                    f"run {number} (SEGVIT_FUZZ_SEED={SEED} SEGVIT_FUZZ_RUN={number}): {words}\n  "
                    + "\n  ".join(faults)
                )
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limit)
    with capsys.disabled():
        print(f"\nfuzz of the command line, seed {SEED}: {len(numbers)} runs; {codes}")
    text = f"{len(failures)} of {len(numbers)} runs:\n" + "\n".join(failures[:40])
    assert not failures, text.encode(errors="backslashreplace").decode()  # names need not be UTF-8
    assert len(numbers) == 1 or {code for _, code in codes} >= {0, 2}, "the fuzz finds nothing that runs"
