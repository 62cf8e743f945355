"""Files on other machines than this one: no symbolic links, Windows' rules, a full disk, copied runs."""

import contextlib
import errno
import fcntl
import os
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from kill import options

from segvit.system import files
from segvit.system.files import atomic_write, discard, follow, locked, point
from segvit.training.log import Log
from segvit.training.run_folder import Checkpoints, claimed
from segvit.training.train import train


@pytest.fixture
def windows(monkeypatch):
    """What the os functions refuse there; `busy` holds paths that another program has open."""
    busy = set()
    fsync, open_, replace = os.fsync, os.open, os.replace

    def strict_fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(handle)

    def strict_open(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_(path, flags, *args, **kwargs)

    def strict_replace(source, target, **kwargs):
        if str(target) in busy or os.path.isdir(target):
            busy.discard(str(target))
            raise PermissionError(errno.EACCES, "Access is denied", str(source), None, str(target))
        replace(source, target, **kwargs)

    def no_links(source, target, *args, **kwargs):
        raise OSError(errno.EPERM, "A required privilege is not held by the client", str(source))

    monkeypatch.setattr(os, "fsync", strict_fsync)
    monkeypatch.setattr(os, "open", strict_open)
    monkeypatch.setattr(os, "replace", strict_replace)
    monkeypatch.setattr(os, "rename", strict_replace)
    monkeypatch.setattr(os, "symlink", no_links)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # rmtree as it is there
    return busy


def test_windows_can_write_files_and_folders(tmp_path, windows):
    path = tmp_path / "sub" / "file"
    for text in ("one", "two"):
        atomic_write(path, lambda temporary, text=text: temporary.write_text(text))
        windows.add(str(path))  # open in another program for a moment
    assert path.read_text() == "two" and list(path.parent.iterdir()) == [path]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.folder.mkdir()
    for step in (1, 2):
        checkpoints.save(step, lambda folder: (folder / "trainer.pt").write_text("state"))
        checkpoints.prune(1)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["2", "last"]
    assert (checkpoints.folder / "last").read_text() == "2\n" and checkpoints.newest().name == "2"


def test_pointers(tmp_path, monkeypatch):
    for name in ("3", "4", "5"):
        (tmp_path / name).mkdir()
    last = tmp_path / "last"
    point(last, "3")
    assert os.readlink(last) == "3" and follow(last).resolve().name == "3"
    with monkeypatch.context() as patched:
        patched.setattr(os, "symlink", lambda *_, **__: (_ for _ in ()).throw(NotImplementedError))
        point(last, "4")
        assert not last.is_symlink() and follow(last) == tmp_path / "4"
    last.write_text("4")  # as Git leaves a link where there are none
    assert follow(last) == tmp_path / "4"
    point(last, "5")
    assert os.readlink(last) == "5"
    last.unlink()
    shutil.copytree(tmp_path / "5", last)  # by a program that follows links
    point(last, "3")
    assert follow(last).resolve().name == "3"
    for text in ("../3", "nothing", "3\n4", "x" * 300, ""):
        (tmp_path / "other").write_text(text)
        assert follow(tmp_path / "other") == tmp_path / "other", text
    discard(tmp_path / "3")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "5", "last", "other"]


def test_newest_checkpoint_whatever_became_of_the_link(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest() is None
    checkpoints.folder.mkdir()
    for step in (9, 10):
        checkpoints.save(step, lambda folder: (folder / "trainer.pt").write_text("state"))
    (checkpoints.folder / "11").mkdir()  # without content: not one of ours
    assert checkpoints.newest().resolve().name == "10"
    (checkpoints.folder / "last").unlink()
    assert checkpoints.newest().name == "10"
    point(checkpoints.folder / "last", "8")  # dangling
    assert checkpoints.newest().name == "10"
    # A copy in place of the link, and nothing else.
    other = Checkpoints(tmp_path / "copy")
    shutil.copytree(checkpoints.folder / "10", other.folder / "last")
    other.clean(10, None)
    assert (other.folder / "10" / "trainer.pt").is_file() and other.newest().resolve().name == "10"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, code):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(code, os.strerror(code), str(temporary))

    with pytest.raises(OSError, match=f"file: cannot be written .{os.strerror(code)}.") as raised:
        atomic_write(path, fail)
    assert raised.value.errno == code
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with pytest.raises(OSError, match=f"file: cannot be written .{os.strerror(code)}."):
        atomic_write(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_libraries_that_hide_the_reason(tmp_path):
    """What safetensors and torch raise when a write fails; really written to a full disk in kill.py."""
    for error, reason in (
        (
            RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598"),
            "not all of it",
        ),
        (
            Exception("Error while serializing: I/O error: No space left (os error 28)"),
            "No space left on device",
        ),
    ):
        with pytest.raises(OSError, match=f"file: cannot be written .{reason}"):
            atomic_write(tmp_path / "file", lambda path, error=error: (_ for _ in ()).throw(error))
    with pytest.raises(ValueError, match="of the writer's own"):
        atomic_write(tmp_path / "file", lambda path: (_ for _ in ()).throw(ValueError("of the writer's own")))
    assert list(tmp_path.iterdir()) == []


def test_synchronising_where_it_cannot_be(tmp_path, monkeypatch):
    def unsupported(handle):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unsupported)
    atomic_write(tmp_path / "file", lambda path: path.write_text("text"))
    assert (tmp_path / "file").read_text() == "text"


def test_log_after_a_line_cut_off(tmp_path):
    log = Log(tmp_path, 0, False)
    for step in (1, 2, 13):
        log.add(step, loss=1.5 * step)
    whole = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text(whole[:-6])  # "13,19.5" became "13,"
    assert Log(tmp_path, 20, False).rows == log.rows[:2]
    log.add(14, loss=2.0, miou=0.5)
    again = Log(tmp_path, 14, False, evaluated=False)
    assert [row["step"] for row in again.rows] == ["1", "2", "13", "14"]


def test_log_on_a_full_disk_keeps_whole_lines(tmp_path, monkeypatch):
    log = Log(tmp_path, 0, False)
    log.add(1, loss=1.0)
    before = (tmp_path / "metrics.csv").read_text()

    class Full:
        def __init__(self, file, columns):
            self.file = file

        def writerow(self, row):
            self.file.write("2,")
            self.file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("segvit.training.log.csv.DictWriter", Full)
    with pytest.raises(OSError, match=r"metrics\.csv: cannot be written .No space"):
        log.add(2, loss=2.0)
    assert (tmp_path / "metrics.csv").read_text() == before


def test_nothing_here_is_of_one_system_alone():
    text = Path(files.__file__).read_text()
    assert not any(word in text for word in ("import resource", "os.fork"))


def hold(path, started):
    """A child that holds the lock until it is killed."""
    child = os.fork()
    if child == 0:
        try:
            with locked(path):
                os.write(started, b"held")
                time.sleep(60)
        finally:
            os._exit(0)
    return child


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path/lock`."""
    read, write = os.pipe()
    child = hold(tmp_path / "lock", write)
    assert os.read(read, 4) == b"held"
    yield child
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.close(read)
    os.close(write)


def test_a_lock_ends_with_its_process(tmp_path, holder):
    path = tmp_path / "lock"
    with pytest.raises(BlockingIOError), locked(path):
        pass
    assert path.exists()
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert path.exists()
    with locked(path):
        assert path.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_on_a_removed_file_is_none(tmp_path, monkeypatch):
    """One who waited with the file open, while its holder removed it and the next one made another."""
    path, lock, opened = tmp_path / "lock", files._lock, []

    def removed_before(handle):
        if not opened:
            path.unlink()
        opened.append(os.fstat(handle).st_ino)
        lock(handle)

    monkeypatch.setattr(files, "_lock", removed_before)
    with locked(path):
        assert len(opened) == 2 and path.stat().st_ino == opened[1]


def test_locks_as_windows_has_them(tmp_path, monkeypatch):
    """No fcntl; the file can be removed only when it is closed."""
    path, held, unlink = tmp_path / "lock", [], Path.unlink

    def locking(handle, mode, count):
        if held:
            raise PermissionError(errno.EACCES, "Permission denied")
        held.append(handle)

    def strict_unlink(file):
        if any(os.path.exists(f"/proc/self/fd/{handle}") for handle in held):
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(file))
        unlink(file)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    monkeypatch.setattr(Path, "unlink", strict_unlink)
    locked = runpy.run_path(files.__file__)["locked"]
    with locked(path):
        with pytest.raises(BlockingIOError), locked(path):
            pass
        assert path.exists()
    assert not path.exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with locked(tmp_path / "lock"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_trainings_in_one_folder(tmp_path, holder):
    (tmp_path / "lock").rename(tmp_path / ".lock")
    with pytest.raises(
        ValueError, match=f"^out: another training runs in {tmp_path}; choose another folder$"
    ):
        train(options(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with claimed(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_kept_from_being_removed_goes_at_the_next_start(tmp_path):
    train(options(tmp_path))
    folder = tmp_path / "checkpoints"
    before = sorted(path.name for path in folder.iterdir())
    shutil.copytree(follow(folder / "last"), folder / "2")
    train(options(tmp_path))
    assert sorted(path.name for path in folder.iterdir()) == before
