"""The folder of a training run: its options, its log, its checkpoints, and whether it can be continued.

    config.yaml              the options
    data.json                which samples and classes it trains on, wherever they lie, what label values
                             mean, and which share is kept for validation
    metrics.csv              one line every `log_every` steps, and one for each evaluation
    checkpoints/STEP/        model.safetensors, config.json (see `SegViT.from_pretrained`), trainer.pt, a copy
                             of data.json, and evaluation.json: the last evaluation, and the best until then;
                             with `--strategy fsdp` also shards/, each process's pieces
                             (`segvit.training.sharding`)
    checkpoints/last, best   links to the newest checkpoint and to the one of the highest mIoU; where there
                             are no links, text files that hold its name
    .lock                    only while a training runs in it

A checkpoint's folder gets its name when all of it is on the disk, and the links turn after that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from segvit.data.coding import FORMS, is_meaning, is_share
from segvit.model.checkpoint import DATA_FILE
from segvit.options import TrainConfig
from segvit.system.extras import require
from segvit.system.files import atomic_write, discard, follow, locked, point, replace, synchronise
from segvit.system.text import parse_yaml, read_json, read_text, shown, yaml_value
from segvit.training.score import no_score

__all__ = ["Checkpoints", "claimed", "meaning_of", "prepare", "samples_of", "share_of"]

TRAINER_FILE = "trainer.pt"
EVALUATION_FILE = "evaluation.json"
SHARDS_FOLDER = "shards"

# What is written before the first step.
_FIRST = {"config.yaml", DATA_FILE}
# Hidden names that are in use here only for a moment: of `Checkpoints` and of `segvit.system.files`.
_LEFTOVER = re.compile(r"\.(\d+|last|best|.+\.[0-9a-f]{8}\.(old|tmp))")
# What may change when a run is resumed: options that do not touch the result,
_FREE = {
    "resume", "out", "workers", "progress", "tensorboard", "max_minutes", "checkpoint_every",
    "keep_checkpoints", "patience", "log_every", "evaluate_every", "evaluate_window",
}  # fmt: skip
# those that only round otherwise, or draw another dropout,
_ROUNDING = {
    "accelerator", "backend", "compile", "precision", "accumulate", "gradient_checkpointing", "devices",
    "batch_size", "strategy",
}  # fmt: skip
# and those that say where the data lie, which data.json is compared for.
_PLACES = {"data", "names"}


def samples_of(training: Any, validation: Any) -> dict[str, Any]:
    """What tells two data sets apart, wherever they lie: number and names of the samples, the classes, what
    label values mean (`SegmentationFolder.meaning`; None: nobody says, as of synthetic data), and the share
    kept for validation."""
    result: dict[str, Any] = {"classes": list(training.class_names or []), "labels": None}
    result["validation_share"] = getattr(validation, "validation_share", None)
    meanings = [dataset.meaning() for dataset in (training, validation) if hasattr(dataset, "meaning")]
    if meanings := [meaning for meaning in meanings if meaning]:
        labels = dict(meanings[0])
        for other in meanings[1:]:  # training and validation agree on what they share
            new = set(other["by_colour"]) - set(labels["forms"])
            for key, more in (("by_colour", new), ("forms", other["forms"]), ("seen", other["seen"])):
                labels[key] = sorted({*labels[key], *more})
        result["labels"] = labels
    for split, dataset in (("training", training), ("validation", validation)):
        digest = None
        if files := getattr(dataset, "files", None):
            root = getattr(dataset, "root", None)
            names = [_name_of(Path(image), root) for image, *_ in files]
            digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
        result[split] = {"images": len(dataset), "names": digest}
    return result


def _said(place: Path, record: dict[str, Any] | None, name: str) -> tuple[Any, Path]:
    """An entry of a record, or of a checkpoint's own, None where it has none; and where that stands."""
    if record is not None:
        return record.get(name), place
    path = place / DATA_FILE
    return (read_json(path, dict).get(name) if path.is_file() else None), path


def meaning_of(place: Path, record: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """What label values meant in the training of a checkpoint (`SegmentationFolder.meaning`); None: not said.

    Args:
        place: the checkpoint, or the file that has its record.
        record: what is said there; by default a checkpoint's own.

    Raises:
        ValueError: that is of another form.
    """
    found, path = _said(place, record, "labels")
    if isinstance(found, dict):
        found = {"forms": sorted(FORMS), **found}
    if found is not None and not is_meaning(found):
        raise ValueError(f"{path}: got {shown(found)} for labels, expected what `segvit train` wrote")
    return found


def share_of(place: Path, record: dict[str, Any] | None = None) -> float | None:
    """Which share of the pictures was kept for validation in a training, see `meaning_of`; None: not said.

    Raises:
        ValueError: that is of another form.
    """
    share, path = _said(place, record, "validation_share")
    if share is not None and not is_share(share):
        raise ValueError(
            f"{path}: got {shown(share)} for validation_share, expected what `segvit train` wrote"
        )
    return share


def _name_of(image: Path, root: Path | None) -> str:
    return image.relative_to(root).as_posix() if root and image.is_relative_to(root) else image.name


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """A run's folder, made if need be, for this process alone as long as the context is open. One that was
    made here goes again where options or data cannot be used, so that nothing was trained.

    Raises:
        ValueError: another training runs in it.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    own = not folder.is_dir()
    try:
        with ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(folder / ".lock"))
            except BlockingIOError:
                own = False
                raise ValueError(f"out: another training runs in {folder}; choose another folder") from None
            except OSError as error:
                raise _cannot_write(folder, error) from None
            yield
    except (ValueError, TypeError, OSError):
        if own and all(path.is_dir() or path.name in _FIRST for path in folder.rglob("*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _cannot_write(folder: Path, error: OSError) -> OSError:
    return OSError(f"out: cannot write to {folder} ({error.strerror or error})")


def prepare(config: TrainConfig, samples: dict[str, Any], say: Callable[[str], None]) -> None:
    """Make a run's folder, or check that the run in it can be continued with these options and samples.

    Args:
        config: `out` and `resume` decide.
        samples: see `samples_of`.
        say: told what changes against the run so far.

    Raises:
        ValueError: a run is there already, or it had options or samples that another result would come from.
        OSError: the folder cannot be written.
    """
    yaml = require("yaml", extra="train")
    folder = Path(config.out)
    values = {**dataclasses.asdict(config), "resume": False}
    text = yaml.safe_dump(values, sort_keys=False)
    record = folder / DATA_FILE
    if (folder / "config.json").is_file():  # commands would take it in place of the run's checkpoints
        raise ValueError(f"out: {folder} holds a model (config.json); choose another folder for the run")
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if config.resume:
            labels, now_labels = meaning_of(folder), samples["labels"]
            windows = [config.evaluate_window] * 2
            if (folder / "config.yaml").is_file():
                before = _options(read_text(folder / "config.yaml"), folder / "config.yaml")
                now = _options(text, "options")
                places = _PLACES if record.is_file() else set()
                mapping = {"label_mapping"} if labels and now_labels else set()
                _compare_options(before, now, folder, places | mapping, say)
                windows = [options.get("evaluate_window") for options in (before, now)]
            if labels and now_labels:
                _compare_labels(labels, now_labels)
            _compare_samples(record, samples)
            share = samples["validation_share"]  # shards of earlier versions say neither
            share = share_of(folder) if share is None else share
            samples = {**samples, "labels": now_labels or labels, "validation_share": share}
            if windows[0] != windows[1]:  # nothing is refused any more
                _forget_scores(folder, f"{windows[0]} -> {windows[1]}", say)
        elif Checkpoints(folder).newest():
            raise ValueError(f"out: {folder} already holds a run; use --resume, or another folder")
        _write(folder / "config.yaml", text)
        _write(record, json.dumps(samples, indent=2) + "\n")
    except OSError as error:
        raise _cannot_write(folder, error) from None


def _write(path: Path, text: str) -> None:
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _options(text: str, source: object) -> dict[str, Any]:
    """Options as YAML has them, so that those of a file can be compared with others."""
    node = parse_yaml(text, str(source))
    values = None if node is None else yaml_value(node, str(source))
    if not isinstance(values, dict):
        raise ValueError(f"{source}: got no options, expected what `segvit train` wrote")
    return values


def _compare_options(
    before: dict[str, Any], now: dict[str, Any], folder: Path, places: set[str], say: Callable
) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    was = {name: before.get(name, defaults[name]) for name in now}
    was = {name: now[name] if value is dataclasses.MISSING else value for name, value in was.items()}
    changed = {
        name: f"{name} {was[name]!r} -> {now[name]!r}"
        for name in now
        if name not in _FREE | places and was[name] != now[name]
    }
    images = [values["batch_size"] * values["devices"] for values in (was, now)]
    steps = changed.pop("max_steps", None)
    free = _ROUNDING if images[0] == images[1] else _ROUNDING - {"batch_size", "devices"}
    refused = [text for name, text in changed.items() if name not in free]
    if refused:
        raise ValueError(f"resume: {folder} was started with other options: {', '.join(refused)}")
    if changed:
        say(f"{', '.join(changed.values())}: the same training, with other rounding and dropout from here on")
    if steps:
        schedule = f"the schedule of {now['max_steps']} steps from here on"
        say(f"{steps}: learning rate, shrink_after and the masks of eomt follow {schedule}")


def _forget_scores(folder: Path, change: str, say: Callable) -> None:
    """Evaluations by other windows say nothing of the best checkpoint from here on."""
    newest = Checkpoints(folder).newest()
    if newest:
        _write(newest / EVALUATION_FILE, json.dumps(no_score(), indent=2) + "\n")
        say(f"evaluate_window {change}: best and patience count from here on")


def _compare_labels(before: dict[str, Any], now: dict[str, Any]) -> None:
    def text(table: dict[str, Any], key: str) -> str:
        if key not in table:
            return "unknown"
        return "ignored" if table[key] is None else f"class {table[key]}"

    def count(labels: dict[str, Any]) -> str:
        white = f", white of one bit as {labels['white']}" if "bilevel" in now["forms"] else ""
        return f"{', '.join(labels['by_colour'])} by colour{white}"

    if count(before) != count(now):
        raise ValueError(
            "resume: the label maps count by colour or by number otherwise than when the run began: "
            f"{count(now)}, was {count(before)}"
        )
    for part in ("values", "colours"):
        was, has = before[part], now[part]
        for key in (*was, *has):
            if text(was, key) != text(has, key):
                raise ValueError(
                    "resume: the label maps do not mean what they did when the run began: "
                    f"{key} is {text(has, key)}, was {text(was, key)}"
                )


def _compare_samples(path: Path, samples: dict[str, Any]) -> None:
    if not path.is_file():
        return
    before = read_json(path, dict)
    if before.get("classes") != samples["classes"]:
        raise ValueError("resume: the classes of the data are not those that the run was started with")
    for split in ("training", "validation"):
        was, now = before.get(split, {}), samples[split]
        if not isinstance(was, dict):
            raise ValueError(f"{path}: got {shown(was)} for {split}, expected what `segvit train` wrote")
        if was.get("images") != now["images"]:
            raise ValueError(
                f"resume: the {split} data have {now['images']} images, "
                f"{shown(was.get('images'))} when it began"
            )
        if was != now:
            raise ValueError(f"resume: the {split} images have other names than when the run began")


class Checkpoints:
    """The checkpoints of a run."""

    def __init__(self, run: str | Path) -> None:
        self.folder = Path(run) / "checkpoints"

    def newest(self) -> Path | None:
        """The checkpoint that `last` leads to; without one, the highest step's; None: there is none."""
        last = follow(self.folder / "last")
        if (last / TRAINER_FILE).is_file():
            return last
        return max(self._steps(), key=lambda path: int(path.name), default=None)

    def _steps(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if path.name.isdecimal()]
        return [path for path in found if (path / TRAINER_FILE).is_file()]

    def clean(self, step: int, best: int | None) -> None:
        """After a start at `step`: remove what a kill left, and turn the links to where the run stands."""
        for leftover in [
            *self.folder.glob(".*"),
            *self.folder.glob("*/.*"),
            *self.folder.parent.glob(".*.tmp"),
        ]:
            if not _LEFTOVER.fullmatch(leftover.name):
                continue  # somebody else's
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        for path in self._steps() if step else ():
            if int(path.name) > step:
                discard(path)
        last = self.folder / "last"
        if last.is_dir() and not last.is_symlink() and not (self.folder / str(step)).exists():
            replace(last, self.folder / str(step))  # a copy, made by a program that follows links
        for name, target in (("last", step), ("best", best)):
            if target is not None and (self.folder / str(target)).is_dir():
                self._point(name, target)

    def _point(self, name: str, step: int) -> None:
        if follow(self.folder / name).resolve() != (self.folder / str(step)).resolve():
            point(self.folder / name, str(step))

    def growing(self, step: int) -> Path:
        """The folder that a checkpoint is written into."""
        return self.folder / f".{step}"

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """A new checkpoint: `write` fills its folder. `last` is the old one or the whole new one.

        Raises:
            OSError: it cannot be written; nothing of it stays.
        """
        temporary = self.growing(step)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            write(temporary)
            if (record := self.folder.parent / DATA_FILE).is_file():
                shutil.copyfile(record, temporary / DATA_FILE)
            synchronise(temporary)
            final = self.folder / str(step)
            if final.exists():  # of a run that went on from an earlier checkpoint
                discard(final)
            replace(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._point("last", step)

    def evaluated(self, step: int, values: dict[str, Any]) -> None:
        """Keep an evaluation with the checkpoint of `step`; `best` leads to `values["best_step"]` then."""
        _write(self.folder / str(step) / EVALUATION_FILE, json.dumps(values, indent=2) + "\n")
        if values["best_step"] is not None:
            self._point("best", values["best_step"])

    def prune(self, keep: int | str) -> None:
        """Remove all but the newest `keep` ("all" removes none) and those that `last` and `best` lead to."""
        if keep == "all":
            return
        linked = {follow(self.folder / name).resolve() for name in ("last", "best")}
        for path in sorted(self._steps(), key=lambda path: int(path.name))[: -int(keep)]:
            if path.resolve() not in linked:
                discard(path)
