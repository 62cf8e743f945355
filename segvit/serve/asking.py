"""What a request asks for: a picture and parameters, in a form (multipart) or as JSON, checked.

Parameters stand in the address, in fields of the form or in keys of the JSON object, each in one place. The
picture is the field or key `image`, in JSON as base64 or as a data URI. A file's name is never used.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from segvit.serve.admission import RefusedError
from segvit.system.extras import require
from segvit.system.text import did_you_mean, parse_json, shown

__all__ = ["Asked", "longest_body", "read_request"]

_FORM, _JSON = "multipart/form-data", "application/json"
_BESIDE = 1 << 16  # bytes of a body beside the picture
_FIELDS = 32
# The parameters of each address, and what they may be where that is a choice.
PARAMETERS: dict[str, dict[str, Sequence[str]]] = {
    "/predict": {
        "format": ("json", "png"),
        "show": ("labels", "overlay"),
        "alpha": (),
        "include": ("colors", "picture"),
    },
    "/similarity": {"format": ("json", "png"), "class": ()},
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        picture: a picture file.
        format: "json" or "png".
        show: of a PNG, "labels" or "overlay".
        alpha: opacity of the overlay.
        include: what else a JSON answer has.
        wanted: name or index of a class.
    """

    picture: bytes
    format: str = "json"
    show: str = "labels"
    alpha: float = 0.55
    include: tuple[str, ...] = ()
    wanted: str = ""


def longest_body(content_type: str, max_bytes: int) -> int:
    """Bytes of a body whose picture has `max_bytes`.

    Raises:
        RefusedError: a type of content that is not read.
    """
    kind = _kind(content_type)
    if kind not in (_FORM, _JSON):
        raise RefusedError(415, f"content-type: got {shown(kind)}, expected {_FORM} or {_JSON}")
    return _BESIDE + (max_bytes if kind == _FORM else -(-max_bytes // 3) * 4)


def read_request(
    path: str,
    query: Iterable[tuple[str, str]],
    content_type: str,
    accept: str,
    body: bytearray,
    max_bytes: int,
) -> Asked:
    """What a request to `path` with this body asks for.

    Raises:
        RefusedError: it is wrong or too large.
    """
    values: dict[str, list[str]] = {}
    known = [*PARAMETERS[path], "image"]
    _take(values, query, PARAMETERS[path], "in the address")
    if _kind(content_type) == _FORM:
        picture, fields = _read_form(content_type, body, known)
    else:
        picture, fields = _read_json(body, known)
    _take(values, fields, known, "in the body")
    if picture is None:
        raise RefusedError(400, "image: missing; expected a picture file" + _instead(fields, known))
    if not picture:
        raise RefusedError(400, "image: an empty file")
    if len(picture) > max_bytes:
        raise RefusedError(413, f"image: {len(picture)} bytes, more than {max_bytes}")
    chosen: dict[str, Any] = {"format": "png" if _prefers_png(accept) else "json"}
    for name, given in values.items():
        words = [word for text in given for word in text.split(",")] if name == "include" else given
        choices = PARAMETERS[path][name]
        for word in words if choices else ():
            if word not in choices:
                raise RefusedError(400, f"{name}: got {shown(word)}, expected {' or '.join(choices)}")
        if name != "include" and len(words) > 1:
            raise RefusedError(400, f"{name}: got {len(words)} values, expected one")
        chosen[name] = tuple(words) if name == "include" else words[0]
    if "alpha" in chosen:
        chosen["alpha"] = _share("alpha", chosen["alpha"])
    if path == "/similarity":
        chosen["wanted"] = chosen.pop("class", "")
        if not chosen["wanted"]:
            raise RefusedError(400, "class: missing; expected the name or the index of a class")
    return Asked(picture, **chosen)


def _kind(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _share(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise RefusedError(400, f"{name}: got {shown(text)}, expected 0 to 1")
    return value


def _prefers_png(accept: str) -> bool:
    """Whether the best of the media types that a client accepts is a PNG picture."""
    ranges = []
    for entry in accept.lower().split(","):
        kind, _, rest = entry.partition(";")
        weight = re.search(r"q\s*=\s*([01](?:\.\d*)?)", rest)
        ranges.append((float(weight[1]) if weight else 1.0, kind.strip()))
    for quality, kind in sorted(ranges, key=lambda pair: -pair[0]):  # of equals the first
        if quality and kind in ("image/png", "image/*"):
            return True
        if quality and kind in (_JSON, "application/*", "*/*"):
            return False
    return False


def _take(
    values: dict[str, list[str]], pairs: Iterable[tuple[str, str]], known: Iterable[str], where: str
) -> None:
    found: dict[str, list[str]] = {}
    for name, value in pairs:
        if name not in known:
            hint = did_you_mean(name, known) or f"; expected {', '.join(known)}"
            raise RefusedError(400, f"{shown(name)}: no such parameter{hint}")
        found.setdefault(name, []).append(value)
    for name, given in found.items():
        if name in values:
            raise RefusedError(400, f"{name}: in the address, and {where} once more")
        values[name] = given


def _instead(fields: Sequence[tuple[str, str]], known: Sequence[str]) -> str:
    return "" if fields else f" (known: {', '.join(known)})"


def _read_json(body: bytearray, known: Sequence[str]) -> tuple[bytes | None, list[tuple[str, str]]]:
    """The picture, and the other keys with their values as words."""
    try:
        values = parse_json(body.decode("utf-8"), "body", dict)
    except UnicodeDecodeError as error:
        raise RefusedError(400, f"body: not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise RefusedError(400, str(error)) from None
    picture = None
    fields = []
    for name, value in values.items():
        if name == "image":
            picture = _from_base64(value)
            continue
        for word in value if isinstance(value, list) else [value]:
            if isinstance(word, bool) or not isinstance(word, (str, int, float)):
                raise RefusedError(400, f"{shown(name)}: got {shown(word)}, expected a text or a number")
            fields.append((name, str(word)))
    return picture, fields


def _from_base64(value: Any) -> bytes:
    if not isinstance(value, str):
        raise RefusedError(400, f"image: got {shown(value)}, expected a picture file in base64")
    if value.startswith("data:"):
        head, comma, value = value[:200].partition(",")[0], "," in value[:200], value.partition(",")[2]
        if not comma or not head.endswith(";base64"):
            raise RefusedError(400, f"image: got {shown(head)}, expected a data URI in base64")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: not ASCII
        raise RefusedError(400, f"image: not base64 ({error})") from None


class _Form:
    """The parts of a form, as they are read."""

    def __init__(self, known: Sequence[str]) -> None:
        self.known = known
        self.headers: dict[str, str] = {}
        self.header = self.value = b""
        self.data = bytearray()
        self.picture: bytes | None = None
        self.fields: list[tuple[str, str]] = []
        self.ended = False

    def begin(self) -> None:
        self.headers, self.data = {}, bytearray()
        self.header = self.value = b""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self.header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def header_end(self) -> None:
        self.headers[self.header.decode("latin-1").lower()] = self.value.decode("latin-1")
        self.header = self.value = b""

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self.data += data[start:end]

    def part_end(self) -> None:
        parse = require("python_multipart.multipart", extra="serve").parse_options_header
        _, options = parse(self.headers.get("content-disposition"))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name == "image":
            if self.picture is not None:
                raise RefusedError(400, "image: got two, expected one picture")
            self.picture = bytes(self.data)
            return
        if name not in self.known:
            hint = did_you_mean(name, self.known) or f"; expected {', '.join(self.known)}"
            raise RefusedError(400, f"{shown(name)}: no such field{hint}")
        if len(self.data) > 1000 or len(self.fields) >= _FIELDS:
            raise RefusedError(400, f"{name}: longer or more often than anything it may be")
        try:
            self.fields.append((name, self.data.decode("utf-8")))
        except UnicodeDecodeError:
            raise RefusedError(400, f"{name}: not UTF-8 text") from None

    def end(self) -> None:
        self.ended = True


def _read_form(
    content_type: str, body: bytearray, known: Sequence[str]
) -> tuple[bytes | None, list[tuple[str, str]]]:
    """The picture, and the other fields."""
    multipart = require("python_multipart.multipart", extra="serve")
    _, options = multipart.parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise RefusedError(400, "content-type: multipart/form-data without its boundary")
    form = _Form(known)
    callbacks = {
        "on_part_begin": form.begin,
        "on_part_data": form.part_data,
        "on_part_end": form.part_end,
        "on_header_field": form.header_field,
        "on_header_value": form.header_value,
        "on_header_end": form.header_end,
        "on_end": form.end,
    }
    try:
        parser = multipart.MultipartParser(boundary, callbacks)
        parser.write(body)
        parser.finalize()
    except ValueError as error:
        raise RefusedError(400, f"body: not multipart/form-data ({' '.join(str(error).split())})") from None
    if not form.ended:
        raise RefusedError(400, "body: a form that breaks off before its end")
    return form.picture, form.fields
