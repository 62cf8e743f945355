"""Members of tar files, byte for byte the same wherever and whenever they are written."""

from __future__ import annotations

import tarfile

__all__ = ["BLOCK", "END", "tar_member"]

BLOCK = 512
END = bytes(2 * BLOCK)  # of a tar


def tar_member(name: str, data: bytes) -> bytes:
    """A file in a tar: its header and its content, filled up to whole blocks."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    return header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + data + bytes(-len(data) % BLOCK)
