"""Pictures named on a command line: files, what lies in folders, tars, zips and lists, videos' frames."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from segvit.data.decoding import OWN_FORMATS, PICTURE_SUFFIXES
from segvit.data.pictures import PictureBytes, probe
from segvit.data.videos import VIDEO_SUFFIXES, count_frames, read_frame
from segvit.system.failures import one_line
from segvit.system.text import read_lines
from segvit.system.zips import ZipPath, path_at

__all__ = ["Found", "find_images", "find_pictures"]


@dataclass(frozen=True)
class Found:
    """A picture in a file of its own, within a tar, or a frame of a video.

    Attributes:
        name: what messages and records call it.
        file: where its bytes are.
        folder: below which its results go in an output folder; "." where they lie flat.
        stem: its name without suffix.
        offset, size, changed: of its bytes within a tar, and when they changed; -1, 0 and 0 for a whole file.
        frame, every: its place in a video, and which places are asked for; -1 for a picture.
    """

    name: str
    file: Path
    folder: PurePosixPath
    stem: str
    offset: int = -1
    size: int = 0
    changed: float = 0.0
    frame: int = -1
    every: int = 1

    def open(self) -> Path | PictureBytes:
        """What `segvit.data.read_image` takes."""
        if self.frame >= 0:
            data = io.BytesIO()
            np.save(data, read_frame(self.file, self.frame, self.every))
            return PictureBytes(data.getvalue(), self.name)
        if self.offset < 0:
            return self.file
        with self.file.open("rb") as tar:
            tar.seek(self.offset)
            return PictureBytes(tar.read(self.size), self.name, formats=OWN_FORMATS)

    def version(self) -> str:
        """Tells what is there from what will be when it is replaced: size and time; "" where nothing is.

        In a zip the checksum stands for the time, which is that of all its pictures.
        """
        if self.offset >= 0:
            return f"{self.size} {self.changed}"
        try:
            if isinstance(self.file, ZipPath):
                return f"{self.file.stat().st_size} {self.file.checksum():08x}"
            status = self.file.stat()
        except (OSError, ValueError):
            return ""
        return f"{status.st_size} {status.st_mtime}"


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Files as given, and every picture directly inside the folders given, sorted by name; each name once.

    Hidden files in folders do not count.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no picture.
        ValueError: there is no path, or no file is a picture.
    """
    found = _each_once(
        Found(str(file), file, PurePosixPath("."), file.stem)
        for path in map(_checked, paths)
        for file in (_in_folder(path, _Sieve(path)) if path.is_dir() else [path])
    )
    return [picture.file for picture in _one_opens(found)]


def find_pictures(
    paths: Sequence[str | Path],
    *,
    recursive: bool = False,
    leave_out: Path | None = None,
    every: int = 1,
    say: Callable[[str], object] | None = None,
) -> list[Found]:
    """What `find_images` finds, pictures in tars, zips and lists (.txt, a path a line), and videos' frames.

    Args:
        paths: as on a command line. Those in a list too, but one that is not there is no error here.
        recursive: also what lies in folders below those given; results keep this tree, as they do those of
            lists, tars and zips.
        leave_out: a folder that is not looked into.
        every: of a video every so manyth frame.
        say: called with a line for each folder, tar or zip that holds files of other kinds too: they are left
            out.

    Raises:
        ImportError: there is a video, and PyAV is not installed.
        FileNotFoundError, ValueError: as `find_images`, or a tar is damaged or compressed.
    """

    def each() -> Iterator[Found]:
        for path in map(_checked, paths):
            sieve = _Sieve(path, say)
            if isinstance(path, ZipPath) and path.is_dir():
                yield from _in_zip(path, sieve)
            elif path.is_dir() and recursive:
                yield from _below(path, leave_out, sieve)
            elif path.is_dir():
                yield from (Found(str(f), f, PurePosixPath("."), f.stem) for f in _in_folder(path, sieve))
            elif path.suffix.lower() == ".tar":
                yield from _in_tar(path, sieve)
            elif path.suffix.lower() == ".txt":
                yield from _in_list(path)
            elif path.suffix.lower() in VIDEO_SUFFIXES:
                yield from _in_video(path, every)
            else:
                yield Found(str(path), path, PurePosixPath("."), path.stem)

    return _one_opens(_each_once(each()))


def _checked(path: str | Path) -> Path:
    if "\0" in str(path):
        raise ValueError(f"images: got {str(path)!r}, a file name cannot hold a NUL character")
    found = path_at(path)
    if not found.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    return found


def _each_once(found: Iterable[Found]) -> list[Found]:
    """Each name once; two of a file that links lead to are two pictures, as stores of files have them."""
    once: dict[tuple[str, int, int], Found] = {}
    for picture in found:
        once.setdefault((os.path.abspath(picture.file), picture.offset, picture.frame), picture)
    return list(once.values())


def _one_opens(found: list[Found]) -> list[Found]:
    """The same, if one of them can be opened: the others are read in their turn."""
    if not found:
        raise ValueError("images: got none, expected files or folders")
    problems = []
    for picture in found:
        try:
            if not picture.file.is_file():
                raise FileNotFoundError(f"{picture.name}: no such image file")
            probe(picture.open())
            break
        except (ValueError, OSError, ImportError) as error:
            problems.append(error)
    else:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{one_line(problems[0])}{more}")
    return found


class _Sieve:
    """Tells by names which files in a folder, tar or zip are pictures, and at the end what the others are."""

    def __init__(self, place: Path, say: Callable[[str], object] | None = None) -> None:
        self.place, self.say = place, say
        self.others: Counter[str] = Counter()

    def takes(self, name: str, kind: str = "") -> bool:
        """Whether a file is a picture; one of a kind (a link) is none. Hidden ones do not count."""
        if name.startswith("."):
            return False
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in PICTURE_SUFFIXES and not kind:
            return True
        self.others[kind or suffix or "without suffix"] += 1
        return False

    def end(self, found: bool, where: str) -> None:
        """Say what was left out.

        Raises:
            FileNotFoundError: nothing was found.
        """
        if not found:
            suffixes = ", ".join(PICTURE_SUFFIXES)
            raise FileNotFoundError(f"{self.place}: no picture in this {where} ({suffixes})")
        if self.others and self.say:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.others.most_common())
            videos = "; name videos to have their frames" if self.others.keys() & {*VIDEO_SUFFIXES} else ""
            self.say(f"{self.place}: left out, no pictures by their names: {kinds}{videos}")


def _in_folder(folder: Path, sieve: _Sieve) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and sieve.takes(file.name))
    sieve.end(bool(files), "folder")
    return files


def _below(root: Path, leave_out: Path | None, sieve: _Sieve) -> list[Found]:
    files: list[Path] = []
    seen: set[Path] = set()
    left = leave_out.resolve() if leave_out else None
    for folder, folders, names in os.walk(root, followlinks=True):
        where = Path(folder)
        if (real := where.resolve()) in seen or real == left:
            folders.clear()
            if real in seen and sieve.say:  # links can lead in a circle
                sieve.say(f"{where}: left out, leads to {real}, which is taken already")
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += (where / name for name in names if sieve.takes(name))
    sieve.end(bool(files), "folder or below")
    places = sorted((PurePosixPath(file.relative_to(root).as_posix()), file) for file in files)
    return [Found(str(file), file, place.parent, file.stem) for place, file in places]


def _in_tar(path: Path, sieve: _Sieve) -> list[Found]:
    found: dict[PurePosixPath, Found] = {}  # as tar does, the last of a name
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                place = PurePosixPath(member.name)
                kind = "" if member.isfile() else "links"
                if not member.isdir() and sieve.takes(place.name, kind):
                    folder = PurePosixPath(*(part for part in place.parent.parts if part not in ("/", "..")))
                    name = f"{path}/{member.name}"
                    data = (member.offset_data, member.size, float(member.mtime))
                    found[place] = Found(name, path, folder, place.stem, *data)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: no whole, uncompressed tar ({one_line(error)})") from None
    sieve.end(bool(found), "tar")
    return list(found.values())


def _in_zip(path: ZipPath, sieve: _Sieve) -> list[Found]:
    places = [(file, PurePosixPath(file.relative_to(path).as_posix())) for file in path.below()]
    found = [Found(str(file), file, at.parent, at.stem) for file, at in places if sieve.takes(at.name)]
    sieve.end(bool(found), "zip")
    return found


def _in_list(path: Path) -> list[Found]:
    files = [_listed(path, number, line) for number, line in read_lines(path)]
    if not files:
        raise FileNotFoundError(f"{path}: no path in this list")
    parents = [os.path.dirname(os.path.abspath(file)) for file in files]
    try:
        common = os.path.commonpath(parents)
        folders = [PurePosixPath(Path(parent).relative_to(common).as_posix()) for parent in parents]
    except ValueError:  # on several drives
        folders = [PurePosixPath(".")] * len(files)
    return [Found(str(file), file, folder, file.stem) for file, folder in zip(files, folders, strict=True)]


def _in_video(path: Path, every: int) -> list[Found]:
    here = PurePosixPath(".")
    return [
        Found(f"{path}#{frame}", path, here, f"{path.stem}_{frame:06d}", frame=frame, every=every)
        for frame in range(0, count_frames(path), every)
    ]


def _listed(path: Path, number: int, line: str) -> Path:
    if "\0" in line:
        raise ValueError(f"{path}: line {number}: a file name cannot hold a NUL character")
    return path_at(line)
