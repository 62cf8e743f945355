"""Files on disk and at addresses of other systems (s3://, gs://, https://, memory://), read by fsspec."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from segvit.system.extras import require
from segvit.system.failures import one_line
from segvit.system.zips import path_at

__all__ = ["Address", "File", "file_at", "is_address", "read_part", "size_of"]

T = TypeVar("T")


def is_address(name: str) -> bool:
    """Whether this is no path: PROTOCOL://..., perhaps with others around it (filecache::s3://...)."""
    return "://" in name


class Address:
    """A file or a folder elsewhere. File systems are looked up anew each time: they do not survive a fork."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Address:
        return Address(self.url.rpartition("/")[0])

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.url}/{name}")

    def with_suffix(self, suffix: str) -> Address:
        return self.parent / PurePosixPath(self.name).with_suffix(suffix).name

    def glob(self, pattern: str) -> list[Address]:
        """What lies here and fits, in no order."""
        found = self._of(lambda system, path: system.glob(f"{path}/{pattern}"))
        return [self / PurePosixPath(str(name)).name for name in found]

    def size(self) -> int:
        return int(self._of(lambda system, path: system.info(path)["size"] or 0))

    def read(self, start: int | None = None, end: int | None = None) -> bytes:
        return bytes(self._of(lambda system, path: system.cat_file(path, start=start, end=end)))

    def _of(self, action: Callable[[Any, str], T]) -> T:
        """Do something with the file system and the path within it.

        Raises:
            FileNotFoundError: nothing is there; OSError: another trouble; ImportError: what serves the
                protocol is not installed; ValueError: no such protocol.
        """
        core: Any = require("fsspec.core", extra="remote")
        try:
            return action(*core.url_to_fs(self.url))
        except FileNotFoundError:
            raise FileNotFoundError(f"{self}: no such file") from None
        except (ImportError, ValueError) as error:
            raise type(error)(f"{self}: {one_line(error)}") from None
        except Exception as error:  # each system has its own
            raise OSError(f"{self}: cannot be read ({one_line(error)})") from None


File = Path | Address


def file_at(name: str) -> File:
    """A path, perhaps within a zip, or an address."""
    return Address(name) if is_address(name) else path_at(name)


def size_of(file: File) -> int:
    """In bytes; raises FileNotFoundError."""
    return file.size() if isinstance(file, Address) else file.stat().st_size


def read_part(file: File, start: int, end: int) -> bytes:
    """Its bytes from `start` to before `end`, fewer where it is shorter."""
    if isinstance(file, Address):
        return file.read(start, end)
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(end - start)
