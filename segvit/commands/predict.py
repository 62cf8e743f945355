"""`segvit predict`: label maps, overlays with a legend, scores and similarity maps for pictures on disk.

For every picture NAME.* the output folder gets NAME_labels.png (class indices as grey values, 16-bit above
256 classes), NAME_overlay.png and, where asked for, NAME_maps.png (similarity maps), NAME_scores.npz and
NAME_probabilities.npz. Arguments are checked before the first file is written, and a file appears whole or
not at all. A picture that cannot be done does not keep the others from it; it is named at the end.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from difflib import get_close_matches
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from segvit.data.pictures import PICTURE_SUFFIXES as SUFFIXES
from segvit.data.pictures import as_rgb, probe, read_image
from segvit.options import PredictConfig
from segvit.system.extras import require
from segvit.system.failures import one_line, out_of_memory
from segvit.system.machine import pick_backend, pick_device

if TYPE_CHECKING:
    from PIL import Image

    from segvit.config import SegViTConfig
    from segvit.model.segvit import SegViT

__all__ = ["PredictConfig", "class_colors", "class_names", "find_classes", "find_images", "run"]


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Files as given, and every picture directly inside the folders given, sorted by name; each file once.

    Hidden files in folders do not count.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no picture.
        ValueError: there is no path, or no file is a picture.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if "\0" in str(path):
            raise ValueError(f"images: got {str(path)!r}, a file name cannot hold a NUL character")
        files = [path]
        if path.is_dir():
            files = sorted(
                file
                for file in path.iterdir()
                if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
            )
            if not files:
                raise FileNotFoundError(f"{path}: no picture in this folder ({', '.join(SUFFIXES)})")
        elif not path.is_file():
            raise FileNotFoundError(f"{path}: no such file or folder")
        for file in files:
            found.setdefault(file.resolve(), file)
    if not found:
        raise ValueError("images: got none, expected files or folders")
    problems = []
    for file in found.values():  # up to the first that can be opened: the others are read in their turn
        try:
            probe(file)
            break
        except (ValueError, OSError, ImportError) as error:
            problems.append(error)
    else:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{one_line(problems[0])}{more}")
    return list(found.values())


def class_names(config: SegViTConfig) -> tuple[str, ...]:
    """The model's class names, or "class 0", "class 1", … where it has none."""
    return config.class_names or tuple(f"class {index}" for index in range(config.num_classes))


def class_colors(config: SegViTConfig) -> np.ndarray:
    """The model's palette, or `visualize.class_palette`; uint8 (num_classes, 3)."""
    from segvit.pictures.visualize import class_palette

    return class_palette(config.num_classes) if config.palette is None else np.array(config.palette, np.uint8)


def find_classes(wanted: Sequence[str], names: Sequence[str], option: str = "maps") -> list[int]:
    """Indices of classes given by name (capital letters do not count) or by index, each once.

    Raises:
        ValueError: no such class; the message holds the nearest names, or all of them.
    """
    lowered = [name.lower() for name in names]
    indices = []
    for word in wanted:
        if word.lower() in lowered:
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
    "overlay": ".png",
    "maps": ".png",
    "scores": ".npz",
    "probabilities": ".npz",
}
_LONGEST_NAME = 240  # bytes; file systems take 255, and others count in other units


def output_stems(files: Sequence[Path], out: Path) -> list[str]:
    """A stem of output files for each file, that no other has on any file system.

    Files of one stem get numbers, also where only capital letters or the composition of accents differ. Names
    too long for what is appended to them are cut, those that Windows keeps for devices lose their dot.

    Raises:
        ValueError: an output would be written over an input.
    """
    inputs = {file.resolve() for file in files}
    taken: set[str] = set()
    stems: list[str] = []
    room = _LONGEST_NAME - max(len(f"_{kind}{suffix}") for kind, suffix in KINDS.items())
    for file in files:
        base = file.stem
        if PureWindowsPath(f"{base}_labels.png").is_reserved():
            base = base.replace(".", "_", 1)
        if len(os.fsencode(base)) > room:
            whole = os.fsencode(base)
            base = f"{os.fsdecode(whole[: room - 20]).rstrip(chr(0xFFFD))}~{zlib.crc32(whole):08x}"
        stem, number = base, 1
        while (key := unicodedata.normalize("NFC", stem).casefold()) in taken:
            number += 1
            stem = f"{base}_{number}"
        taken.add(key)
        stems.append(stem)
        for kind, suffix in KINDS.items():
            target = out / f"{stem}_{kind}{suffix}"
            if target.resolve() in inputs:
                raise ValueError(
                    f"out: {target} is an input picture and would be overwritten; choose another folder"
                )
    return stems


def make_folder(out: Path) -> None:
    """Make a folder for output.

    Raises:
        OSError: files could not be written there.
    """
    if os.name == "nt" and PureWindowsPath(out).is_reserved():
        raise OSError(f"out: cannot write to folder {out} (Windows keeps this name for a device)")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise type(error)(f"out: cannot write to folder {out} ({error.strerror or error})") from None


def label_picture(labels: np.ndarray, num_classes: int) -> Image.Image:
    """Class indices (H, W) as grey values: 8-bit, or 16-bit above 256 classes."""
    image_module = require("PIL.Image", extra="train")
    return image_module.fromarray(labels.astype(np.uint8 if num_classes <= 256 else np.uint16))


def similarity_maps(
    model: SegViT, image: torch.Tensor, classes: Sequence[int]
) -> tuple[list[np.ndarray], np.ndarray]:
    """What the decoder saw in one image, at the image's own size.

    Args:
        model: in evaluation mode.
        image: uint8 (C, H, W).
        classes: indices of the K classes to return.

    Returns:
        Similarity maps float (K, H, W) of each stage in running order, before accumulation, and the mask
        logits (K, H, W): their sum, or the last map where masks are not accumulated (up-sampled models).
    """
    height, width = image.shape[-2:]
    padded = model.pad_to_patches(model.preprocess(image[None]))
    stages = []
    for maps in model.similarity_maps(padded):
        chosen = maps[:, list(classes)].float()
        enlarged = F.interpolate(chosen, size=padded.shape[-2:], mode="bilinear", align_corners=False)
        stages.append(enlarged[0, :, :height, :width].cpu().numpy())
    return stages, stages[-1] if model.config.upsample else np.sum(stages, axis=0)


def run(config: PredictConfig) -> int:
    """Predict every picture of `config`; prints a line for each. Returns 0.

    Raises:
        ValueError, OSError: an argument or a file is wrong, or some pictures could not be done; one line that
            names them. Those that could are there.
        KeyboardInterrupt: with what is done and what is not as its message.
    """
    files = find_images(config.images)
    out = Path(config.out)
    stems = output_stems(files, out)
    if config.region and not (config.scores or config.probabilities):
        raise ValueError("region: is of scores and probabilities; expected --scores or --probabilities too")
    if config.score_classes and not (config.scores or config.probabilities):
        raise ValueError("score_classes: expected --scores or --probabilities too")
    if config.score_type == "uint8" and config.scores:
        raise ValueError("score_type: uint8 is for probabilities; scores need float16 or float32")
    if config.region and (len(config.region) != 4 or 0 in config.region[2:]):
        raise ValueError(f"region: got {config.region}, expected left, top, width and height in pixels")
    device = pick_device(config.accelerator)
    choice = pick_backend(config.backend, device)

    from segvit.inference.passes import check_options
    from segvit.model.heads import load_model
    from segvit.model.linear_head import LinearSegmenter

    model = load_model(config.checkpoint).to(device).eval().fuse()
    names = class_names(model.config)
    classes = find_classes(config.maps, names)
    if classes and isinstance(model, LinearSegmenter):
        raise ValueError(f"maps: {config.checkpoint} has a linear head, which has no similarity maps")
    kept = find_classes(config.score_classes, names, "score_classes") or list(range(len(names)))
    check_options(config, model.config.backbone.patch_size)
    made = not out.exists()
    make_folder(out)
    job = _Job(config, model, out, classes, kept)
    failed: dict[Path, str] = {}
    done = 0

    def state() -> str:
        left = [str(file) for file in files[done + len(failed) :]]
        problems = [f"{file}: {reason}" for file, reason in failed.items()]
        parts = [f"{done} of {len(files)} pictures are done, in {out}"]
        parts += [f"failed: {_listed(problems)}"] if failed else []
        return "; ".join(parts + ([f"not done: {_listed(left)}"] if left else []))

    try:
        with choice, torch.inference_mode():
            for file, stem in zip(files, stems, strict=True):
                try:
                    with ExitStack() as scratch:
                        outputs, summary = job.predict(file, scratch)
                        for kind, write in outputs.items():
                            job.write(out / f"{stem}_{kind}{KINDS[kind]}", write)
                except _CannotWriteError:
                    raise
                except Exception as error:
                    if not (isinstance(error, (ValueError, OSError, ImportError)) or out_of_memory(error)):
                        raise
                    failed[file] = one_line(error).removeprefix(f"{file}: ")
                    print(f"{file}: failed: {failed[file]}", flush=True)
                else:
                    done += 1
                    print(f"{file}: {summary} -> {out / stem}_overlay.png", flush=True)
    except _CannotWriteError as error:
        raise OSError(f"{error}; {state()}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(state()) from None
    finally:
        if made and not done:
            with suppress(OSError):  # not empty
                out.rmdir()
    if failed:
        raise ValueError(state())
    return 0


class _CannotWriteError(OSError):
    """No picture can be written any more."""


def _listed(items: list[str], most: int = 20) -> str:
    return "; ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


class _Job:
    """What `run` does with each picture."""

    def __init__(
        self, config: PredictConfig, model: SegViT, out: Path, classes: Sequence[int], kept: Sequence[int]
    ) -> None:
        self.config, self.model, self.out, self.classes, self.kept = config, model, out, classes, kept
        self.names, self.palette = class_names(model.config), class_colors(model.config)

    def predict(self, file: Path, scratch: ExitStack) -> tuple[dict[str, Callable[[Path], Any]], str]:
        """What is to be written for a picture, by kind, each as a function of the path; and a summary."""
        from segvit.pictures import visualize

        image = read_image(file, **self.model.config.reading)
        labels, writers = self._labels(image, scratch)
        pixels = as_rgb(image).permute(1, 2, 0).numpy()
        pictures = {
            "labels": label_picture(labels, len(self.names)),
            "overlay": visualize.overlay_with_legend(
                pixels, labels, self.names, self.palette, alpha=self.config.alpha
            ),
        }
        if self.classes:
            stages, accumulated = similarity_maps(self.model, image, self.classes)
            rows = [self.names[index] for index in self.classes]
            pictures["maps"] = visualize.similarity_picture(
                pixels, stages, accumulated, rows, layers=self.model.config.upsample
            )
        for kind, picture in pictures.items():
            writers[kind] = lambda path, picture=picture: picture.save(path, "PNG")
        return writers, _summary(labels, self.names)

    def _labels(
        self, image: torch.Tensor, scratch: ExitStack
    ) -> tuple[np.ndarray, dict[str, Callable[[Path], Any]]]:
        from segvit.inference.passes import check_region, label_maps_with_scores

        kinds = [kind for kind in ("scores", "probabilities") if getattr(self.config, kind)]
        if not kinds:
            return self.model.predict(image, self.config).cpu().numpy(), {}
        size = tuple(image.shape[1:])
        region = check_region(self.config.region or (0, 0, size[1], size[0]), size)
        files = {kind: scratch.enter_context(_ScoreFile(self, region)) for kind in kinds}

        def take(first: int, block: torch.Tensor) -> None:
            for kind, file in files.items():
                file.add(first, (block if kind == "scores" else self.model.probabilities(block))[0])

        batch = self.model.preprocess(image[None])
        labels = label_maps_with_scores(self.model, batch, self.config, take)
        writers = {kind: lambda path, kind=kind: files[kind].save(path, kind) for kind in kinds}
        return labels[0].cpu().numpy(), writers

    def write(self, path: Path, writer: Callable[[Path], Any]) -> None:
        from segvit.system.files import atomic_write

        try:
            atomic_write(path, writer)
        except OSError as error:
            text = one_line(error)
            where = "" if str(path) in text else f"{path}: cannot be written: "
            raise _CannotWriteError(f"{where}{text}") from None


class _ScoreFile:
    """Scores that come in blocks of rows, on disk until they are packed into an .npz file."""

    def __init__(self, job: _Job, region: tuple[int, int, int, int]) -> None:
        self.job, self.region = job, region
        self.kind = np.dtype(job.config.score_type)

    def __enter__(self) -> _ScoreFile:
        # In the output folder: the system's own for such files is often small.
        self.file = tempfile.SpooledTemporaryFile(max_size=1 << 26, dir=self.job.out)
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
                raise _CannotWriteError(f"{self.job.out}: cannot be written: {one_line(error)}") from None

    def save(self, path: Path, name: str) -> None:
        """Write the .npz file: `name` (K, height, width), `classes` (K), `names` (K), `region` (4)."""
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
    from segvit.pictures.visualize import format_share, legend_entries

    entries = legend_entries(labels, names)
    shares = ", ".join(f"{entry.name} {format_share(entry.share)}" for entry in entries[:4])
    return f"{shares}, {len(entries) - 4} more" if len(entries) > 4 else shares
