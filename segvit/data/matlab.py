"""MATLAB files; their structure is looked at before SciPy reads them: its reader can crash on damaged ones.

Of the format ("MAT-File Level 5", MathWorks) what label maps need: numbers, texts and cells of them.
Variables of other kinds may be in a file, and are not to be read.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segvit.data.decoding import WholeMessageError, named
from segvit.system.extras import require
from segvit.system.text import shown

__all__ = ["read_matlab", "variables"]

_WIDTHS = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8, 12: 8, 13: 8}  # bytes of numbers, by type
_TEXTS = {1, 2, 3, 4, 16, 17, 18}
_MATRIX, _COMPRESSED = 14, 15
_CELL, _CHAR, _NUMERIC = 1, 4, range(6, 16)  # classes
_DEEPEST, _LARGEST = 8, 1 << 30


def variables(data: bytes) -> dict[str, bool]:
    """Name -> whether it is of a kind that can be read, of every variable in a file.

    Raises:
        ValueError: damaged.
        NotImplementedError: another format of MATLAB's.
    """
    if len(data) < 128 or data[126:128] not in (b"IM", b"MI") or 0 in data[:4]:
        raise ValueError("not a MATLAB 5 file")
    order = "<" if data[126:128] == b"IM" else ">"
    if struct.unpack_from(f"{order}H", data, 124)[0] != 0x0100:
        raise NotImplementedError
    found, at = {}, 128
    while at < len(data):
        kind, start, end, _ = _element(data, at, len(data), order)
        part, at = data[start:end], end
        if kind == _COMPRESSED:
            part = _inflated(part)
            kind, start, end, _ = _element(part, 0, len(part), order)
            part = part[start:end]
        if kind != _MATRIX:
            raise ValueError(f"damaged: an element of type {kind} in place of a variable")
        name, readable = _matrix(part, order, 0)
        found[name] = readable
    return found


def _inflated(data: bytes) -> bytes:
    reader = zlib.decompressobj()
    try:
        whole = reader.decompress(data, _LARGEST)
    except zlib.error:
        raise ValueError("damaged: compressed data that cannot be read") from None
    if not reader.eof:
        raise ValueError("damaged: compressed data that break off, or are too large")
    return whole


def _element(data: bytes, at: int, end: int, order: str) -> tuple[int, int, int, int]:
    """Type, start and end of the element at a place, and where the next one is."""
    if at + 8 > end:
        raise ValueError("truncated")
    kind, size = struct.unpack_from(f"{order}II", data, at)
    if kind >> 16:  # a small one, in its own tag
        kind, size, start, following = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        if size > 4:
            raise ValueError("damaged: a small element that is none")
    else:
        start, following = at + 8, at + 8 + size + -size % 8
    if start + size > end:
        raise ValueError("truncated")
    return kind, start, start + size, min(following, end)


def _matrix(data: bytes, order: str, depth: int) -> tuple[str, bool]:
    """Name of a matrix, and whether it is of a kind that can be read."""
    if not data:  # an empty cell
        return "", True
    if depth > _DEEPEST:
        raise ValueError("cells nested too deeply")
    kind, start, end, at = _element(data, 0, len(data), order)
    if kind != 6 or end - start != 8:
        raise ValueError("damaged: a variable without its flags")
    (flags,) = struct.unpack_from(f"{order}I", data, start)
    kind, start, end, at = _element(data, at, len(data), order)
    if kind != 5 or (end - start) % 4 or not 8 <= end - start <= 128:
        raise ValueError("damaged: a variable without its dimensions")
    shape = struct.unpack_from(f"{order}{(end - start) // 4}i", data, start)
    if min(shape) < 0 or (count := math.prod(shape)) > _LARGEST:
        raise ValueError(f"a variable of shape {shape}")
    kind, start, end, at = _element(data, at, len(data), order)
    if kind not in (1, 16):
        raise ValueError("damaged: a variable without its name")
    name, held, readable = data[start:end].decode("latin-1"), flags & 0xFF, True
    if held in _NUMERIC:
        for _ in range(2 if flags & 0x0800 else 1):
            kind, start, end, at = _element(data, at, len(data), order)
            if end - start != count * _WIDTHS.get(kind, -1):
                raise ValueError(f"damaged: {end - start} bytes of type {kind} for shape {shape}")
    elif held == _CHAR:
        kind, *_, at = _element(data, at, len(data), order)
        if kind not in _TEXTS:
            raise ValueError(f"damaged: a text of type {kind}")
    elif held == _CELL:
        for _ in range(count):
            kind, start, end, at = _element(data, at, len(data), order)
            if kind != _MATRIX:
                raise ValueError(f"damaged: an element of type {kind} in a cell")
            readable &= _matrix(data[start:end], order, depth + 1)[1]
    else:
        readable = False
    return name, readable


def read_matlab(path: Path, *names: str, one_of: Sequence[str] = ()) -> dict[str, Any]:
    """Variables of a MATLAB file: those named, and the first that is there of `one_of`.

    Raises:
        ValueError: it is damaged, of version 7.3, or has one not.
        ImportError: SciPy is not installed.
    """
    scipy_io: Any = require("scipy.io", extra="mat")
    with named(path):
        try:
            data = path.read_bytes()
            there = variables(data)
            if missing := [name for name in names if name not in there]:
                raise WholeMessageError(f"{path}: has no variable {missing[0]}")
            if one_of and there.keys().isdisjoint(one_of):
                listed = shown(", ".join(there)) if there else "nothing"
                raise WholeMessageError(f"{path}: has no {' and no '.join(one_of)}, but {listed}")
            wanted = [*names, *[name for name in one_of if name in there][:1]]
            if unread := [name for name in wanted if not there[name]]:
                raise WholeMessageError(f"{path}: {unread[0]} is no array of numbers and no list of texts")
            found = scipy_io.loadmat(io.BytesIO(data), variable_names=wanted)
        except NotImplementedError:
            raise WholeMessageError(
                f"{path}: a MATLAB 7.3 file, which is not read; save it in MATLAB with '-v7'"
            ) from None
    return {name: found[name] for name in wanted}
