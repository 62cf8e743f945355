"""Frames of videos, by PyAV (extra `video`), decoded in their order."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from segvit.system.extras import require
from segvit.system.failures import one_line

__all__ = ["VIDEO_SUFFIXES", "count_frames", "read_frame"]

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm")
_KEPT = 64  # frames that threads, of which each asks for the next, may come late for


def _opened(path: Path) -> Any:
    """A video's container.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: it holds none, or is damaged.
    """
    av: Any = require("av", extra="video")
    try:
        container = av.open(str(path))
        if container.streams.video:
            return container
        container.close()
    except Exception as error:  # FFmpeg's have many classes
        raise ValueError(f"{path}: cannot be decoded as a video ({one_line(error)})") from None
    raise ValueError(f"{path}: holds no video")


def count_frames(path: Path) -> int:
    """How many frames a video has, without decoding them."""
    with _opened(path) as container:
        try:
            return sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))
        except Exception as error:
            raise ValueError(f"{path}: cannot be decoded as a video ({one_line(error)})") from None


def read_frame(path: Path, number: int, every: int = 1) -> np.ndarray:
    """A frame as it is seen, uint8 (H, W, 3).

    Args:
        number: its place in the video, from 0.
        every: frames whose place is no multiple are not asked for.

    Raises:
        ValueError: there is no such frame, or what is before it cannot be decoded.
    """
    return _video(path, every).frame(number)


class _Video:
    """Decodes on and on; what other threads will ask for is kept."""

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self._lock = threading.Lock()
        self._kept: dict[int, Any] = {}
        self._begin()

    def _begin(self) -> None:
        container = _opened(self.path)
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        self._frames: Iterator[tuple[int, Any]] = enumerate(container.decode(stream))
        self._next = 0

    def frame(self, number: int) -> np.ndarray:
        with self._lock:
            found = self._kept.pop(number, None)
            if found is None:
                if number < self._next:
                    self._begin()
                found = self._decode(number)
        turn = int(getattr(found, "rotation", 0) or 0) // 90
        return np.ascontiguousarray(np.rot90(found.to_ndarray(format="rgb24"), turn))

    def _decode(self, number: int) -> Any:
        try:
            for place, frame in self._frames:
                self._next = place + 1
                if place == number:
                    return frame
                if place % self.every == 0:
                    self._kept[place] = frame
                    if len(self._kept) > _KEPT:
                        del self._kept[min(self._kept)]
        except Exception as error:
            raise ValueError(f"{self.path}: frame {number} cannot be decoded ({one_line(error)})") from None
        raise ValueError(f"{self.path}: has no frame {number}, only {self._next}")


_video = functools.lru_cache(maxsize=4)(_Video)
