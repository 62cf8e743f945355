"""What went wrong, in one line."""

from __future__ import annotations

import re
import traceback


def let_go(error: BaseException | None) -> None:
    """Free what the frames of an error hold: where memory was short, what others would find missing while the
    error is kept. Its text and traceback stay."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def out_of_memory(error: BaseException) -> bool:
    """Whether this is Python's, or torch's, way to say that memory is not enough (torch is not imported)."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"}:
        return True
    # torch's allocators on the CPU raise a plain RuntimeError.
    words = "can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed"
    return isinstance(error, RuntimeError) and re.search(words, str(error)) is not None


def of_one_picture(error: BaseException) -> bool:
    """Whether a picture, or its size, can be the reason, so that others may be done all the same."""
    return isinstance(error, (ValueError, OSError, ImportError)) or out_of_memory(error)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks and control characters, the file of an OSError named."""
    if out_of_memory(error):
        asked = re.search(r"(?:tried to allocate|allocate) ([\d.]+ ?[KMGT]?i?B|\d+ bytes)", str(error))
        size = f" ({asked[1]} were asked for)" if asked else ""
        return f"not enough memory{size}; try smaller pictures, a smaller batch, or a sliding window"
    text = str(error)
    if isinstance(error, OSError) and error.strerror and re.match(r"\[(Errno|WinError) ", text):
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        text = f"{' -> '.join(names)}: {error.strerror}" if names else error.strerror
    text = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)
    return " ".join(text.split()) or type(error).__name__
