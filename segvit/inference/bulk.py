"""Prediction of many pictures: what is computed and written for each, and under which names."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from segvit.data.find import Found
from segvit.data.pictures import as_rgb, read_image
from segvit.inference.classes import class_colors, class_names
from segvit.inference.passes import check_region, label_maps_with_scores
from segvit.inference.protocol import Predictor
from segvit.inference.record import CannotWriteError, Output, Writer
from segvit.inference.runs import run_lengths
from segvit.inference.similarity import similarity_maps
from segvit.options import PredictConfig
from segvit.pictures.visualize import (
    MADE_HERE,
    format_share,
    legend_entries,
    overlay_with_legend,
    save_picture,
    similarity_picture,
)
from segvit.system.extras import require
from segvit.system.failures import let_go, of_one_picture, one_line
from segvit.system.files import as_one_file, may_be_replaced
from segvit.system.text import numbered

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["KINDS", "Computed", "Job", "Pipeline", "find_classes", "label_picture", "output_stems"]


def find_classes(wanted: Sequence[str], names: Sequence[str], option: str = "maps") -> list[int]:
    """Indices of classes given by name or by index, each once.

    A name goes before an index. Capital letters count where names differ in them alone.

    Raises:
        ValueError: no such class; the message holds the nearest names, or all of them.
    """
    lowered = [name.lower() for name in names]
    indices = []
    for word in wanted:
        if word in names:
            indices.append(names.index(word))
        elif word.lower() in lowered:
            indices.append(lowered.index(word.lower()))
        elif word.isdecimal() and int(word) < len(names):
            indices.append(int(word))
        else:
            near = [names[lowered.index(name)] for name in get_close_matches(word.lower(), lowered, n=3)]
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            listing = ", ".join(names)
            raise ValueError(f"{option}: no class {word!r}; {hint}The {len(names)} classes: {listing}")
    return list(dict.fromkeys(indices))


KINDS = {
    "labels": ".png",
    "rle": ".json",
    "overlay": ".png",
    "maps": ".png",
    "scores": ".npz",
    "probabilities": ".npz",
}
_LONGEST_NAME = 240  # bytes; file systems take 255, and others count in other units


def output_stems(files: Sequence[Path | Found], out: Path, *, dots: bool = True) -> list[str]:
    """A stem of output files for each picture, that no other has on any file system.

    Files of one stem get numbers, also where only capital letters or the composition of accents differ; the
    first keeps it, and no number makes the stem of another picture. Names too long for what is appended to
    them are cut, those that Windows keeps for devices lose their dot.

    Args:
        files: the pictures; the stems of those within a tree begin with its folders, "sub/a".
        out: the folder for the results.
        dots: without, they become underscores.

    Raises:
        ValueError: an output would be written over an input.
    """
    pictures = [
        file if isinstance(file, Found) else Found(str(file), file, PurePosixPath("."), file.stem)
        for file in files
    ]
    whereabouts = functools.cache(Path.resolve)  # of folders: a file may be a link, which is replaced itself
    inputs = {
        whereabouts(picture.file.parent) / picture.file.name for picture in pictures if picture.offset < 0
    }
    room = _LONGEST_NAME - max(len(f"_{kind}{suffix}") for kind, suffix in KINDS.items())
    bases = []
    for picture in pictures:
        base = picture.stem if dots else picture.stem.replace(".", "_")
        if PureWindowsPath(f"{base}_labels.png").is_reserved():
            base = base.replace(".", "_", 1)
        if len(os.fsencode(base)) > room:
            whole = os.fsencode(base)
            base = f"{os.fsdecode(whole[: room - 20]).rstrip(chr(0xFFFD))}~{zlib.crc32(whole):08x}"
        bases.append((picture.folder / base).as_posix())
    stems = numbered(bases, as_one_file)
    folders = {file.parent for file in inputs}
    for stem in stems:
        targets = [out / f"{stem}_{kind}{suffix}" for kind, suffix in KINDS.items()]
        where = whereabouts(targets[0].parent)
        for target in targets if where in folders else ():
            if where / target.name in inputs:
                raise ValueError(
                    f"out: {target} is an input picture and would be overwritten; choose another folder"
                )
    return stems


def _begins(result: str) -> str:
    """Regular expression that matches the beginning of a result, KIND.SUFFIX, as Latin-1."""
    kind, suffix = os.path.splitext(result)
    return {
        ".png": MADE_HERE,
        ".json": r'\{"size": \[\d+, \d+\], "segments": \[',
        ".npz": rf"PK\x03\x04.{{26}}{kind}\.npy",
    }[suffix]


def label_picture(labels: np.ndarray, num_classes: int) -> Image.Image:
    """Class indices (H, W) as grey values: 8-bit, or 16-bit above 256 classes."""
    image_module = require("PIL.Image", extra="train")
    return image_module.fromarray(labels.astype(np.uint8 if num_classes <= 256 else np.uint16))


def _write_text(text: str, target: Any) -> None:
    """Into a path or a binary file."""
    if isinstance(target, Path):
        target.write_text(text, encoding="utf-8")
    else:
        target.write(text.encode())


class Computed(NamedTuple):
    """What the network said of a picture.

    Attributes:
        image: uint8 (channels, H, W).
        labels: class indices (H, W).
        writers: of scores, by kind.
        maps: similarity maps, see `segvit.inference.similarity`; None where none are drawn.
        scratch: closes the files that the writers read.
    """

    image: torch.Tensor
    labels: np.ndarray
    writers: dict[str, Writer]
    maps: Any
    scratch: ExitStack


class Job:
    """What is predicted and written for each picture.

    Args:
        config: the options.
        model: in evaluation mode.
        out: the folder for the results.
        classes: indices whose similarity maps are drawn.
        kept: indices whose scores are stored.
    """

    def __init__(
        self, config: PredictConfig, model: Predictor, out: Path, classes: Sequence[int], kept: Sequence[int]
    ) -> None:
        self.config, self.model, self.out, self.classes, self.kept = config, model, out, classes, kept
        self.names, self.palette = class_names(model.config), class_colors(model.config)
        self.keys = numbered(self.names)  # two classes may have one name
        self._versions: dict[str, str] = {}

    @property
    def results(self) -> list[str]:
        """What is written for each picture: KIND.SUFFIX, as it stands behind the stem."""
        asked = {
            "labels": self.config.labels == "png",
            "rle": self.config.labels == "rle",
            "overlay": self.config.overlay,
            "maps": bool(self.classes),
            "scores": self.config.scores,
            "probabilities": self.config.probabilities,
        }
        return [f"{kind}{suffix}" for kind, suffix in KINDS.items() if asked[kind]]

    def check_targets(self, stems: Iterable[str]) -> None:
        """Find out before the work that nothing is lost: a label map of the data set, X_labels.png, say.

        Raises:
            ValueError: a file is where a result would be, and none itself.
        """
        others = []
        for stem, result in itertools.product(stems, self.results):
            target = self.out / f"{stem}_{result}"
            if os.path.lexists(target):
                try:
                    ours = may_be_replaced(target, _begins(result))
                except OSError:  # a folder, or a link that leads nowhere
                    ours = False
                others += [] if ours else [target]
        if others:
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            raise ValueError(
                f"out: {others[0]}{more} is there already and not known to be a result of segvit predict "
                "(earlier releases did not mark theirs); choose another folder, or move it away"
            )

    def read(self, picture: Found) -> torch.Tensor:
        """Its pixels, uint8 (channels, H, W)."""
        self._versions[picture.name] = picture.version()  # before: one that is replaced meanwhile has another
        return read_image(picture.open(), **self.model.config.reading)

    def compute(self, images: Sequence[torch.Tensor]) -> list[Computed]:
        """Run the network on pictures of one size; several only where nothing but label maps is asked for."""
        if len(images) > 1:
            labels = self.model.predict(torch.stack(list(images)), self.config).cpu().numpy()
            return [Computed(*pair, {}, None, ExitStack()) for pair in zip(images, labels, strict=True)]
        (image,) = images
        with ExitStack() as scratch:
            labels, writers = self._labels(image, scratch)
            maps = similarity_maps(self.model, image, self.classes) if self.classes else None
            return [Computed(image, labels, writers, maps, scratch.pop_all())]

    def write(self, picture: Found, stem: str, computed: Computed, output: Output) -> str:
        """Make a picture's results and put them where they go; returns a summary."""
        with computed.scratch:
            labels, pixels = computed.labels, as_rgb(computed.image).permute(1, 2, 0).numpy()
            drawn: dict[str, Image.Image] = {}
            if self.config.labels == "png":
                drawn["labels"] = label_picture(labels, len(self.names))
            if self.config.overlay:
                drawn["overlay"] = overlay_with_legend(
                    pixels, labels, self.names, self.palette, alpha=self.config.alpha
                )
            if computed.maps:
                stages, accumulated = computed.maps
                rows = [self.names[index] for index in self.classes]
                drawn["maps"] = similarity_picture(
                    pixels, stages, accumulated, rows, layers=self.model.config.upsample
                )
            writers: dict[str, Writer] = {
                **computed.writers,
                **{kind: functools.partial(save_picture, image) for kind, image in drawn.items()},
            }
            if self.config.labels == "rle":
                writers["rle"] = functools.partial(_write_text, json.dumps(run_lengths(labels, self.names)))
            counts = np.bincount(labels.reshape(-1), minlength=len(self.names))
            line = {
                "picture": picture.name,
                "output": stem,
                "width": labels.shape[1],
                "height": labels.shape[0],
                "pixels": {self.keys[i]: int(counts[i]) for i in np.flatnonzero(counts)},
                "version": self._versions.pop(picture.name, ""),
            }
            output.put(stem, {f"{kind}{KINDS[kind]}": writer for kind, writer in writers.items()}, line)
        return _summary(labels, self.names)

    def _labels(self, image: torch.Tensor, scratch: ExitStack) -> tuple[np.ndarray, dict[str, Writer]]:
        kinds = [kind for kind in ("scores", "probabilities") if getattr(self.config, kind)]
        if not kinds:
            return self.model.predict(image, self.config).cpu().numpy(), {}
        size = (image.shape[1], image.shape[2])
        region = check_region(self.config.region or (0, 0, size[1], size[0]), size)
        files = {kind: scratch.enter_context(_ScoreFile(self, region)) for kind in kinds}

        def take(first: int, block: torch.Tensor) -> None:
            for kind, file in files.items():
                file.add(first, (block if kind == "scores" else self.model.probabilities(block))[0])

        batch = self.model.preprocess(image[None])
        labels = label_maps_with_scores(self.model, batch, self.config, take)
        writers: dict[str, Writer] = {kind: functools.partial(files[kind].save, name=kind) for kind in kinds}
        return labels[0].cpu().numpy(), writers


class Pipeline:
    """Pictures through a job: some threads read, the caller's runs the network, some write.

    Attributes:
        done: names of those that have their results.
        failed: of those that cannot, why.
    """

    def __init__(self, job: Job, pictures: Sequence[tuple[Found, str]], output: Output) -> None:
        self.job, self.pictures, self.output = job, pictures, output
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self._reading: deque[tuple[Found, str, Future[torch.Tensor]]] = deque()
        self._writing: deque[tuple[Found, str, Future[str]]] = deque()

    def run(self) -> Iterator[tuple[Found, str, str | None]]:
        """Do it; yields a picture, its stem, and the summary of its results or None where it failed, in turn.

        Raises:
            CannotWriteError: no result can be written any more.
        """
        threads, batch = self.job.config.threads, self.job.config.batch
        ahead = threads + 2 * batch
        left = iter(self.pictures)
        try:
            with _threads(threads, "read") as readers, _threads(threads, "write") as writers:
                while True:
                    for picture, stem in itertools.islice(left, ahead - len(self._reading)):
                        self._reading.append((picture, stem, readers.submit(self.job.read, picture)))
                    if not self._reading:
                        break
                    for picture, stem, computed in self._next(batch):
                        future = writers.submit(self.job.write, picture, stem, computed, self.output)
                        self._writing.append((picture, stem, future))
                    while len(self._writing) > ahead:
                        yield self._written()
                while self._writing:
                    yield self._written()
        finally:  # it ended early: these are written all the same
            for picture, _, future in self._writing:
                if not future.cancelled() and future.exception() is None:
                    self.done.add(picture.name)

    def _next(self, batch: int) -> Iterator[tuple[Found, str, Computed]]:
        """The next picture, and more of its size among those read ahead; failures go to `_writing`."""
        group: list[tuple[Found, str, torch.Tensor]] = []
        rest: deque[tuple[Found, str, Future[torch.Tensor]]] = deque()
        while self._reading and len(group) < batch:
            picture, stem, future = self._reading.popleft()
            if (error := future.exception()) is not None:
                self._writing.append((picture, stem, _failed(error)))
            elif group and future.result().shape != group[0][2].shape:
                rest.append((picture, stem, future))
            else:
                group.append((picture, stem, future.result()))
        self._reading.extendleft(reversed(rest))
        found: list[Computed] = []
        if len(group) > 1:
            with suppress(*_ONE_PICTURE):  # it may be the fault of one: each by itself
                found = self.job.compute([image for *_, image in group])
        if found:
            yield from ((*pair[:2], computed) for pair, computed in zip(group, found, strict=True))
            return
        for picture, stem, image in group:
            try:
                (computed,) = self.job.compute([image])
            except _ONE_PICTURE as error:
                let_go(error)
                self._writing.append((picture, stem, _failed(error)))
            else:
                yield picture, stem, computed

    def _written(self) -> tuple[Found, str, str | None]:
        picture, stem, future = self._writing.popleft()
        try:
            summary = future.result()
        except CannotWriteError:
            raise
        except Exception as error:
            if not of_one_picture(error):
                raise
            self.failed[picture.name] = one_line(error).removeprefix(f"{picture.name}: ")
            return picture, stem, None
        self.done.add(picture.name)
        return picture, stem, summary


# Exceptions that one picture can be the reason of; torch's of too little memory are RuntimeErrors.
_ONE_PICTURE = (ValueError, OSError, ImportError, MemoryError, RuntimeError)


def _failed(error: BaseException) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


@contextmanager
def _threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool that takes nothing new from the moment the context is left by an exception."""
    pool = ThreadPoolExecutor(count, name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _ScoreFile:
    """Scores that come in blocks of rows, on disk until they are packed into an .npz file."""

    def __init__(self, job: Job, region: tuple[int, int, int, int]) -> None:
        self.job, self.region = job, region
        self.kind = np.dtype(job.config.score_type)

    def __enter__(self) -> _ScoreFile:
        # In the output folder: the system's own for such files is often small.
        self.file = tempfile.SpooledTemporaryFile(max_size=1 << 26, dir=str(self.job.out))
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, first: int, block: torch.Tensor) -> None:
        """Take rows of scores (N, rows, W), from row `first` of the picture on."""
        left, top, width, height = self.region
        start, stop = max(first, top), min(first + block.shape[1], top + height)
        if start >= stop:
            return
        for place, index in enumerate(self.job.kept):
            values = block[index, start - first : stop - first, left : left + width]
            values = values.mul(255).round() if self.kind == np.uint8 else values
            rows = values.cpu().numpy().astype(self.kind)
            try:
                self.file.seek((place * height + start - top) * width * self.kind.itemsize)
                self.file.write(rows.tobytes())
            except OSError as error:
                raise CannotWriteError(f"{self.job.out}: cannot be written: {one_line(error)}") from None

    def save(self, path: Any, name: str) -> None:
        """Write the .npz file: `name` (K, height, width), `classes` (K), `names` (K), `region` (4).

        `path` may be a binary file.
        """
        shape = (len(self.job.kept), self.region[3], self.region[2])
        beside = {
            "classes": np.array(self.job.kept),
            "names": np.array([self.job.names[index] for index in self.job.kept]),
            "region": np.array(self.region),
        }
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                header = {"descr": self.kind.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(entry, header)
                self.file.seek(0)
                shutil.copyfileobj(self.file, entry, 1 << 20)
            for key, values in beside.items():
                with archive.open(f"{key}.npy", "w") as entry:
                    np.lib.format.write_array(entry, values, allow_pickle=False)


def _summary(labels: np.ndarray, names: Sequence[str]) -> str:
    entries = legend_entries(labels, names)
    shares = ", ".join(f"{entry.name} {format_share(entry.share)}" for entry in entries[:4])
    return f"{shares}, {len(entries) - 4} more" if len(entries) > 4 else shares
