"""What a bulk prediction has done, kept so that a kill loses nothing and nothing is done twice.

A record is `manifest.json`, the options that results depend on, and JSON lines, one for a picture. Each
process writes files of its own, named by its rank and the number of ranks; all read all. Of a picture the
last line counts:

    {"picture": "photos/a.jpg", "output": "a", "width": 640, "height": 480, "pixels": {"road": 1200, ...},
     "version": "52011 1764582373.25"}
    {"picture": "photos/b.jpg", "error": "cannot be decoded as an image (...)"}

`version` is the size and the time of what was read: a picture that was replaced is done again. Lines of
earlier releases have none and stand for any.

Results in files are written before their line, each whole or not at all. Results in tars are appended, a
picture's files at once and its line behind them as `NAME.json`. While a tar grows its name ends in `.part`,
and what a kill has cut off at its end is removed by the next start. The lines of a whole tar lie beside it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from segvit.system.failures import one_line
from segvit.system.files import as_one_file, atomic_write, locked, replace
from segvit.system.tars import BLOCK, END, tar_member
from segvit.system.text import read_json, shown

__all__ = ["CannotWriteError", "Files", "Output", "Record", "Tars", "Writer"]

Writer = Callable[[Any], Any]  # takes a path, or a binary file
_SETTINGS = "manifest.json"


class CannotWriteError(OSError):
    """No picture can be written any more."""


def _cannot(path: Path, error: OSError) -> CannotWriteError:
    text = one_line(error)
    return CannotWriteError(text if str(path) in text else f"{path}: cannot be written: {text}")


class Record:
    """Which pictures are done, in a folder of results.

    Args:
        out: the folder.
        place: rank and number of ranks.
        settings: what results depend on; and `checkpoint`, where the model was.
        stems: of the outputs, by the names of the pictures that are asked for; of others nothing is kept.

    Attributes:
        scratch: a folder for what is being written; no other process has the same.

    Raises:
        ValueError: the folder's results have other settings, an output that is asked for is another
            picture's, or another process has this rank in it.
        OSError: it cannot be read or written.
    """

    def __init__(
        self, out: Path, place: tuple[int, int], settings: Mapping[str, Any], stems: Mapping[str, str]
    ) -> None:
        self.out, self.place, self._stems = out, place, stems
        self._pictures = {as_one_file(stem): picture for picture, stem in stems.items()}
        self._outputs: dict[str, str] = {}
        self._versions: dict[str, tuple[str, ...]] = {}  # of which there are results
        self._errors: dict[str, str] = {}
        self._locks = ExitStack()
        self._file: Any = None
        self._mutex = threading.Lock()
        self.scratch = out / f".rank-{place[0]:05d}"
        try:
            self.scratch.mkdir(exist_ok=True)
            self._locks.enter_context(locked(self.scratch / "lock"))
        except BlockingIOError:
            raise ValueError(f"out: another prediction runs in {out}; choose another folder") from None
        except OSError as error:
            raise _cannot(self.scratch, error) from None
        try:
            self._clean()
            self._compare(dict(settings))
            for path in _ours(out, ".tar.part"):
                with suppress(FileNotFoundError):  # whole by now, its lines lie beside it
                    self._take(line for _, line in _groups(path))
            for path in _ours(out, ".jsonl"):
                self._take(_whole_lines(path))
        except BaseException:
            self.close()
            raise

    def _clean(self) -> None:
        """Remove what killed processes had not put in place: of this rank, and of ranks that are no more."""
        rank, ranks = self.place
        for path in self.scratch.iterdir():
            if path.name != "lock":
                path.unlink()
        for folder in self.out.glob(".rank-*"):
            number = folder.name.removeprefix(".rank-")
            if number.isdecimal() and int(number) >= ranks and int(number) % ranks == rank:
                shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def begun(out: Path) -> bool:
        """Whether a folder has one."""
        return (out / _SETTINGS).is_file()

    def _take(self, lines: Iterable[dict[str, Any]]) -> None:
        last: dict[str, str] = {}
        for line in lines:
            if (picture := line["picture"]) not in self._stems:
                asked = None if "error" in line else self._pictures.get(as_one_file(line["output"]))
                if asked is not None:
                    raise ValueError(
                        f"images: {asked} would be written as {self._stems[asked]}, which is {picture}'s in "
                        f"{self.out}; choose another folder for the results"
                    )
                continue
            if "error" in line:
                self._errors[picture] = line["error"]
            else:
                self._outputs[picture] = line["output"]
                last[picture] = line.get("version", "")
        for picture, version in last.items():
            self._versions[picture] = (*self._versions.get(picture, ()), version)

    def _compare(self, settings: dict[str, Any]) -> None:
        path = self.out / _SETTINGS
        settings = json.loads(json.dumps(settings))
        if not path.is_file():
            text = json.dumps(settings, indent=2) + "\n"
            atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), self.scratch)
            return
        before = read_json(path, dict)
        for name, value in settings.items():
            if name != "checkpoint" and before.get(name) != value:
                was = _short(before.get(name))
                raise ValueError(
                    f"out: {self.out} was predicted with other options, {name} {was}, now {_short(value)}; "
                    "choose another folder"
                )

    def lines(self) -> list[dict[str, Any]]:
        """What counts of every picture, by name: its results, or else its error; of tars that are whole."""
        found: dict[str, dict[str, Any]] = {}
        for path in _ours(self.out, ".jsonl"):
            for line in _whole_lines(path):
                name = line["picture"]
                if "output" in line:
                    counts = line.get("version", "") in self._versions.get(name, ())
                else:
                    counts = name in self._stems and "output" not in found.get(name, {})
                if counts:
                    found[name] = line
        return [found[name] for name in sorted(found)]

    def has(self, picture: str) -> bool:
        """Whether there are results of a picture, or of what it was before."""
        return picture in self._outputs

    def is_done(self, picture: str, output: str, version: str = "") -> bool:
        """Whether a picture, as it is now, has its results under a name.

        Raises:
            ValueError: under another one: pictures have come or gone whose names are alike.
        """
        before = self._outputs.get(picture)
        if before is not None and before != output:
            raise ValueError(
                f"images: {picture} was written as {before} and would now be {output}: pictures of like "
                "names have come or gone; choose another folder for the results"
            )
        if not version:  # nothing is there to be done again
            return before is not None
        same = tuple(known for known in self._versions.get(picture, ()) if known in ("", version))
        self._versions[picture] = same
        return bool(same)

    def add(self, line: dict[str, Any]) -> None:
        """Append a line; an error that is known already is not said again."""
        with self._mutex:
            if "error" in line and self._errors.get(line["picture"]) == line["error"]:
                return
            rank, ranks = self.place
            path = self.out / f"manifest-{rank:05d}-of-{ranks:05d}.jsonl"
            try:
                if self._file is None:
                    self._file = path.open("ab", buffering=0)
                    self._file.truncate(_end_of_lines(path))
                _append(self._file, _as_line(line))
            except OSError as error:
                raise _cannot(path, error) from None
            self.count(line)

    def count(self, line: Mapping[str, Any]) -> None:
        """Results of this version count from now on, and no others of the picture."""
        if "output" in line:
            self._versions[line["picture"]] = (line.get("version", ""),)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._locks.close()
        with suppress(OSError):
            self.scratch.rmdir()


def _ours(out: Path, suffix: str) -> list[Path]:
    """Files of records and tars, of every rank."""
    return sorted(p for kind in ("manifest", "results") for p in out.glob(f"{kind}-*-of-*{suffix}"))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _as_line(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _append(file: Any, data: bytes) -> None:
    """Write all of it at a file's end, or nothing."""
    start = file.seek(0, os.SEEK_END)
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(start)
        raise


def _end_of_lines(path: Path) -> int:
    """Where the last whole line of a file ends."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 4096)
            file.seek(start)
            place = file.read(end - start).rfind(b"\n")
            if place >= 0:
                return start + place + 1
            end = start
    return 0


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):  # a kill came while it was written
                return
            yield _line(text, f"{path}: line {number}")


def _line(text: bytes, source: str) -> dict[str, Any]:
    """What is said of a picture.

    Raises:
        ValueError: something else.
    """
    try:
        line = json.loads(text)
        if not isinstance(line["picture"], str) or not isinstance(line.get("error", line.get("output")), str):
            raise KeyError
        return line
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{source} is none of a manifest's") from None


# Where results go


class Files:
    """Every result a file of its own below a folder, `STEM_KIND.SUFFIX`."""

    def __init__(self, out: Path, record: Record | None) -> None:
        self.out, self.record = out, record

    def has(self, names: list[str]) -> bool:
        return all((self.out / name).is_file() for name in names)

    def put(self, stem: str, results: Mapping[str, Writer], line: dict[str, Any]) -> None:
        for name, writer in results.items():
            path = self.out / f"{stem}_{name}"
            try:
                atomic_write(path, writer, self.record.scratch if self.record else None)
            except OSError as error:
                raise _cannot(path, error) from None
        if self.record:
            self.record.add(line)

    def close(self) -> None:
        pass


class Tars:
    """Results in tars of so many pictures each, `STEM.KIND.SUFFIX` and `STEM.json` (WebDataset's names)."""

    def __init__(self, out: Path, record: Record, pictures: int) -> None:
        self.out, self.record, self.pictures = out, record, pictures
        self._mutex = threading.Lock()
        self._file: Any = None
        self._lines: list[dict[str, Any]] = []
        self._number = 0
        rank, ranks = record.place
        self._name = f"results-{rank:05d}-of-{ranks:05d}"
        for path in _ours(out, ".tar.part"):
            # Of a start with as many ranks each takes its own; others are shared out.
            if f"-of-{ranks:05d}-" not in path.name:
                mine = zlib.crc32(os.fsencode(path.name)) % ranks == rank
            else:
                mine = path.name.startswith(f"{self._name}-")
            if mine:
                self._recover(path)
                self._finish()
        taken = [path.name.removesuffix(".part") for path in out.glob(f"{self._name}-*.tar*")]
        numbers = [int(name.removesuffix(".tar").rpartition("-")[2]) for name in taken]
        self._number = max(numbers, default=-1) + 1

    def has(self, names: list[str]) -> bool:
        return True  # a line is in the tar, or beside it

    def put(self, stem: str, results: Mapping[str, Writer], line: dict[str, Any]) -> None:
        members = []
        for name, writer in results.items():
            data = io.BytesIO()
            writer(data)
            members.append((f"{stem}.{name}", data.getvalue()))
        with self._mutex:
            path = self.out / f"{self._name}-{self._number:06d}.tar"
            line = {**line, "tar": path.name}
            members.append((f"{stem}.json", _as_line(line)))
            try:
                if self._file is None:
                    self._path, self._lines = path.with_name(f"{path.name}.part"), []
                    self._file = self._path.open("wb", buffering=0)
                _append(self._file, b"".join(tar_member(name, data) for name, data in members))
                self._lines.append(line)
                self.record.count(line)
                if len(self._lines) >= self.pictures:
                    self._finish()
                    self._number += 1
            except OSError as error:
                raise _cannot(path, error) from None

    def close(self) -> None:
        """Finish the last tar."""
        with self._mutex:
            if self._file is not None:
                try:
                    self._finish()
                except OSError as error:
                    raise _cannot(self._path, error) from None

    def _recover(self, path: Path) -> None:
        """Open a tar that was being written where its last whole picture ends."""
        groups = list(_groups(path))
        self._path, self._lines = path, [line for _, line in groups]
        self._file = path.open("r+b", buffering=0)
        self._file.truncate(groups[-1][0] if groups else 0)

    def _finish(self) -> None:
        if not self._lines:
            self._file.close()
            self._file = None
            self._path.unlink()
            return
        _append(self._file, END)
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        final = self._path.with_suffix("")
        text = b"".join(map(_as_line, self._lines))
        lines = final.with_suffix(".jsonl")
        atomic_write(lines, lambda temporary: temporary.write_bytes(text), self.record.scratch)
        replace(self._path, final)


Output = Files | Tars


def _groups(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Of every picture whose files are whole in a tar that may be cut off: where they end, and its line."""
    with path.open("rb") as file, suppress(tarfile.TarError):
        size = os.fstat(file.fileno()).st_size
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + member.size + -member.size % BLOCK
                if end > size:
                    return
                if PurePosixPath(member.name).suffixes == [".json"]:  # not NAME.rle.json
                    text = tar.extractfile(member)
                    assert text is not None
                    yield end, _line(text.read(), f"{path}: {shown(member.name)}")
