"""Pictures named on a command line, or lying in folders that are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from segvit.data.pictures import PICTURE_SUFFIXES, probe
from segvit.system.failures import one_line


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
                if file.suffix.lower() in PICTURE_SUFFIXES
                and not file.name.startswith(".")
                and file.is_file()
            )
            if not files:
                raise FileNotFoundError(f"{path}: no picture in this folder ({', '.join(PICTURE_SUFFIXES)})")
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
