"""Writing files so that a kill, a full disk or another file system loses nothing.

What is replaced is replaced in one step, after the new content has reached the disk. Nothing here needs
more than Windows allows: handles are synchronised for writing, folders only where that is possible, and where
there are no symbolic links a small text file names the folder that a link would point to.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import secrets
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath
from types import ModuleType
from typing import Any

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:
    fcntl = None
    msvcrt: Any = importlib.import_module("msvcrt")

__all__ = [
    "as_one_file",
    "atomic_write",
    "check_result_file",
    "discard",
    "follow",
    "locked",
    "make_folder",
    "may_be_replaced",
    "point",
    "replace",
    "synchronise",
]


def as_one_file(name: str) -> str:
    """Equal for names that are one file on some system: it heeds no capital letters, or composes accents."""
    return unicodedata.normalize("NFC", name).casefold()


def atomic_write(
    path: str | os.PathLike, writer: Callable[[Path], Any], scratch: str | os.PathLike | None = None
) -> None:
    """Call `writer` with a temporary path beside `path`, then put the result in place in one step.

    Whatever happens, `path` is the old file or the whole new one. The folder is made if need be.

    Args:
        path: the file.
        writer: writes it.
        scratch: a folder of the same file system that is there; the temporary path is in it then.

    Raises:
        OSError: it cannot be written; one line that names `path` and the reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")
    if scratch is not None:
        temporary = Path(scratch) / temporary.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # the usual one: some writers leave files that only their owner reads
        writer(temporary)
        synchronise(temporary)
        temporary.chmod(mode)
        replace(temporary, path)
    except Exception as error:
        if reason := _why_not_written(error):
            raise _os_error(error, f"{path}: cannot be written ({reason})") from None
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


# What the names of files promise that stand beside our results.
_KINDS = {".csv", ".gif", ".html", ".jpeg", ".jpg", ".json", ".npy", ".npz", ".pdf", ".png", ".pth", ".pt"}
_KINDS |= {".safetensors", ".svg", ".tif", ".tiff", ".webp", ".yaml", ".yml", ".zip"}


def check_result_file(option: str, path: str | os.PathLike, suffix: str, begins: str) -> None:
    """Find out before the work that a result can be written to `path`, and that nothing else is lost there.

    Args:
        option: the name of the option that asked for it.
        path: the file.
        suffix: of such results; a name without one, or with one that says nothing, is taken too.
        begins: regular expression that matches the first 4096 bytes of such a result, as Latin-1.

    Raises:
        ValueError: the name is of another kind of file, or there is a file already and it is no such result.
        OSError: its folder does not exist or cannot be written to, or it is a folder.
    """
    path = Path(path)
    if path.suffix.lower() in _KINDS and path.suffix.lower() != suffix:
        raise ValueError(f"{option}: got {path}, expected a file {suffix}")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{option}: {path}: its folder does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"{option}: {path} is a folder, expected a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{option}: {path}: no permission to write in its folder")
    if path.is_file():
        try:
            ours = may_be_replaced(path, begins)
        except OSError as error:
            raise _os_error(error, f"{option}: {path}: cannot be read ({error.strerror})") from None
        if not ours:
            raise ValueError(f"{option}: {path} is there already and no such result; choose another file")


def may_be_replaced(path: Path, begins: str) -> bool:
    """Whether a file is empty, or begins as our results do, see `check_result_file`.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(4096)
    return not start or re.match(begins, start.decode("latin-1"), re.DOTALL) is not None


def _why_not_written(error: Exception) -> str | None:
    """The system's reason in an exception of Python, safetensors or torch; None if it is another one."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if match := re.search(r"os error (\d+)|code: (\d+)", str(error)):
        return os.strerror(int(match[1] or match[2]))
    if re.search(r"inline_container|PytorchStreamWriter", str(error)):
        cause = error.__context__
        return (isinstance(cause, OSError) and cause.strerror) or "not all of it could be written"
    return None


def _os_error(error: Exception, text: str) -> OSError:
    kinds = (PermissionError, FileNotFoundError, NotADirectoryError)
    result: OSError = next((kind for kind in kinds if type(error) is kind), OSError)(text)
    result.errno = getattr(error, "errno", None)
    return result


def synchronise(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk, where the system can tell."""
    try:
        if path.is_dir():
            handle = os.open(path, os.O_RDONLY)  # refused on Windows
        else:
            handle = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        cannot = (errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES)
        if error.errno not in cannot:
            raise
    finally:
        os.close(handle)


def replace(source: Path, target: Path) -> None:
    """`os.replace`, tried again for half a second where another program has the file open (Windows)."""
    for wait in (0.01, 0.03, 0.1, 0.3, None):
        try:
            os.replace(source, target)
            break
        except PermissionError:
            if wait is None:
                raise
            time.sleep(wait)
    synchronise(target.parent)


def discard(folder: Path) -> None:
    """Remove a folder, under a hidden name first: it is whole or gone. One that is in use stays."""
    hidden = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    try:
        os.replace(folder, hidden)
    except OSError:
        return
    shutil.rmtree(hidden, ignore_errors=True)


def follow(path: str | os.PathLike) -> Path:
    """The folder beside `path` that it names, where it is a text file in place of a link; else `path`."""
    path = Path(path)
    try:
        if path.is_file() and path.stat().st_size < 256:
            name = path.read_text(encoding="utf-8").strip()
            if re.fullmatch(r"[\w.-]+", name) and (path.parent / name).is_dir():
                return path.parent / name
    except (OSError, UnicodeDecodeError):
        pass
    return path


def point(path: Path, name: str) -> None:
    """Make `path` a link to the folder `name` beside it, or a text file of its name where links fail."""
    if path.is_dir() and not path.is_symlink():  # a copy, made by a program that follows links
        discard(path)
    link = path.with_name(f".{path.name}")
    try:
        if os.name == "nt":  # a link to a folder cannot be replaced there in one step
            raise NotImplementedError
        link.unlink(missing_ok=True)
        os.symlink(name, link)
        os.replace(link, path)
    except (OSError, NotImplementedError):
        with suppress(OSError):
            link.unlink()
        atomic_write(path, lambda temporary: temporary.write_text(f"{name}\n", encoding="utf-8"))
    else:
        synchronise(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes out of the same context; the file `path` exists as long as this one is in it.

    The system drops the lock of a process that ends, however it does: a file left behind locks nobody out.
    Where a file system has no locks nobody is.

    Raises:
        BlockingIOError: another process is in it.
        OSError: the file cannot be made.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
            if _is_at(handle, path):
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # removed by the one who held it, after it was opened here
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # refused on Windows while it is open
        os.close(handle)
        if fcntl is None:
            with suppress(OSError):
                path.unlink()


def _lock(handle: int) -> None:
    try:
        if fcntl is None:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by forked processes
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise BlockingIOError(error.errno, "in use by another process") from None


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


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
