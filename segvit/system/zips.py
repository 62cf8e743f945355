"""Files in zips, read where they are: `DATA.zip/images/a.jpg` is a path like any other.

Nothing is extracted and nothing stays open: a member is a read of a part of its zip, by as many threads and
processes as like to, forked ones too. Format: PKWARE's APPNOTE.TXT, of which stored and deflated members are
read; a zip that holds others, or names that are no paths below it, is refused as a whole.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

__all__ = ["ZipPath", "path_at"]

if TYPE_CHECKING:
    _Path = Path
else:
    _Path = type(Path())  # Python 3.11 derives from no other

_SUFFIX = re.compile(rf"\.zip(?={re.escape(os.sep)}|$)", re.IGNORECASE)
_HEADER = struct.Struct("<4s22xHH")  # of a member: its signature, and the lengths of name and extra field


class _Member(NamedTuple):
    """Where a member's header is, its lengths in bytes as it is stored and by itself, its CRC-32."""

    offset: int
    packed: int
    size: int
    crc: int
    deflated: bool


class _Contents(NamedTuple):
    """Members by name, and what each folder holds; "" is the zip itself."""

    files: dict[str, _Member]
    folders: dict[str, dict[str, None]]


def path_at(path: str | os.PathLike) -> Path:
    """A path, on disk or, where one of its folders is a zip, or it is one itself, within that."""
    plain = Path(path) if not isinstance(path, Path) else path
    return plain if isinstance(plain, ZipPath) or _zip_of(plain) is None else ZipPath(plain)


def _zip_of(path: Path) -> tuple[str, os.stat_result, str] | None:
    """The first zip on a path, and the name within it."""
    text = str(path)
    for found in _SUFFIX.finditer(text):
        place = text[: found.end()]
        try:
            status = os.stat(place)
        except (OSError, ValueError):  # a NUL
            continue
        if stat.S_ISREG(status.st_mode):
            return place, status, text[found.end() + 1 :].replace(os.sep, "/")
    return None


class ZipPath(_Path):
    """A zip as a folder, and what is in it; of a path's methods on disk those below.

    Raises:
        ValueError: the zip is damaged, or holds what is not read.
    """

    def _found(self) -> tuple[str, os.stat_result, _Contents, str]:
        """The zip, its contents, and the name in it."""
        found = _zip_of(self)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        path, status, name = found
        return path, status, _contents(path, status.st_size, status.st_mtime_ns), name

    def is_dir(self, **options: Any) -> bool:
        return self._is_in("folders")

    def is_file(self, **options: Any) -> bool:
        return self._is_in("files")

    def _is_in(self, kind: str) -> bool:
        try:
            _, _, contents, name = self._found()
        except FileNotFoundError:
            return False
        return name in getattr(contents, kind)

    def exists(self, **options: Any) -> bool:
        return self.is_file() or self.is_dir()

    def stat(self, **options: Any) -> os.stat_result:
        """The zip's, with the member's size."""
        _, status, contents, name = self._found()
        if name in contents.folders:
            return status
        size = self._member(contents, name).size
        dates = {"st_mtime_ns": status.st_mtime_ns, "st_ctime_ns": status.st_ctime_ns}
        return os.stat_result((*status[:6], size, *status[7:10]), dates)

    def checksum(self) -> int:
        """CRC-32 of a member's bytes, as the zip says."""
        _, _, contents, name = self._found()
        return self._member(contents, name).crc

    def iterdir(self) -> Generator[ZipPath, None, None]:
        _, _, contents, name = self._found()
        return (self / child for child in contents.folders[name])

    def below(self, depth: int | None = None) -> Iterator[ZipPath]:
        """Every file in this folder and in those below, at most so deep, without hidden ones."""
        _, _, contents, name = self._found()
        start = f"{name}/" if name else ""
        for other in contents.files:
            rest = other[len(start) :]
            hidden = rest.startswith(".") or "/." in rest
            if other.startswith(start) and not hidden and (depth is None or rest.count("/") <= depth):
                yield self / rest

    def top(self) -> ZipPath:
        """This folder, or the one below that has everything."""
        here = self
        while True:
            children = [c for c in here.iterdir() if not c.name.startswith(".") and c.name != "__MACOSX"]
            if len(children) != 1 or not children[0].is_dir():
                return here
            (here,) = children

    def read_bytes(self) -> bytes:
        """All that is in it.

        Raises:
            OSError: it is damaged; the message is the reason alone, as that of a disk's is.
        """
        path, _, contents, name = self._found()
        member = self._member(contents, name)
        with open(path, "rb") as file:
            file.seek(member.offset)
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size or not header.startswith(b"PK\3\4"):
                raise OSError("damaged: its zip has other data in its place")
            _, *lengths = _HEADER.unpack(header)
            file.seek(sum(lengths), os.SEEK_CUR)
            data = file.read(member.packed)
        if member.deflated:
            try:  # one byte more than there should be is enough to see
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
            except zlib.error:
                raise OSError("damaged: compressed data that cannot be read") from None
        if len(data) != member.size or zlib.crc32(data) != member.crc:
            raise OSError("damaged: not the bytes that its zip has the checksum of")
        return data

    def open(self, *args: Any, **options: Any) -> Any:
        """A binary file in memory."""
        if args not in ((), ("rb",)):
            raise OSError(f"{self}: in a zip, opened as {args[0]}, expected 'rb'")
        return io.BytesIO(self.read_bytes())

    def _member(self, contents: _Contents, name: str) -> _Member:
        if (member := contents.files.get(name)) is None:
            number = errno.EISDIR if name in contents.folders else errno.ENOENT
            raise OSError(number, os.strerror(number), str(self))
        return member


@functools.lru_cache(maxsize=8)
def _contents(path: str, _size: int, _time: int) -> _Contents:
    try:
        with zipfile.ZipFile(path) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise ValueError(f"{path}: no whole zip ({' '.join(str(error).split())})") from None
    files: dict[str, _Member] = {}
    folders: dict[str, dict[str, None]] = {"": {}}
    for info in listed:
        name = info.filename.removesuffix("/")
        parts = name.split("/")
        # Results are written under these names: none may lead elsewhere, on Windows neither.
        if {"", ".", ".."} & set(parts) or re.search(r"^[A-Za-z]:|[\\\0-\x1f\x7f]", name):
            raise ValueError(f"{path}: holds the name {name!r}, expected names below it, as a/b.png")
        if not info.is_dir():
            if info.flag_bits & 1:
                raise ValueError(f"{path}: {name!r} is encrypted, which is not read")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                kind = info.compress_type
                raise ValueError(
                    f"{path}: {name!r} is compressed by method {kind}, expected 0 or 8 (deflate)"
                )
            if info.header_offset < 0:
                raise ValueError(f"{path}: no whole zip ({name!r} is before its beginning)")
            if name in files:
                raise ValueError(f"{path}: holds {name!r} twice")
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            files[name] = _Member(info.header_offset, info.compress_size, info.file_size, info.CRC, deflated)
        else:
            folders.setdefault(name, {})
        for depth in range(len(parts)):
            folders.setdefault("/".join(parts[:depth]), {})[parts[depth]] = None
    if both := sorted(files.keys() & folders.keys()):
        raise ValueError(f"{path}: {both[0]!r} is a file and a folder")
    return _Contents(files, folders)
