"""What every request and every answer goes through, whatever they are about: refusals, time, who may ask."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import socket
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from segvit.serve.admission import RefusedError

__all__ = ["Answer", "Refusal", "local_names", "misdirected", "unless_gone", "until", "watched"]

_LINGER = 2.0  # seconds for which the rest of a refused body is read, so that the client reads why
_PIECE = 1 << 16  # bytes of an answer that are sent at once
_READ = "segvit.read"  # in a request's scope: its whole body was received, or its client has gone
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

T = TypeVar("T")


def local_names(host: str) -> set[str] | None:
    """What a browser may call a server that only this machine reaches; None where others may.

    Args:
        host: where it listens, in whatever way that is written (LOCALHOST, this machine's own name).
    """
    try:
        (*_, (address, *_)), *_ = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    if not ipaddress.ip_address(str(address).partition("%")[0]).is_loopback:
        return None
    return {"127.0.0.1", "localhost", "::1", host.lower(), str(address)}


class Answer(Response):
    """A response that is sent in pieces, as the client takes them; sent, it is in memory no more."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = memoryview(self.body)
        for start in range(0, len(body), _PIECE):
            piece = bytes(body[start : start + _PIECE])
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Refusal(Response):
    """One line as JSON. What the client still sends is read for a while, or it might never see the line."""

    def __init__(self, error: RefusedError) -> None:
        body = json.dumps({"error": str(error)}).encode() + b"\n"
        super().__init__(body, error.status, error.headers, "application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get(_READ):
            await super().__call__(scope, receive, send)
            return
        self.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while not scope.get(_READ):
                    await receive()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@contextlib.asynccontextmanager
async def until(deadline: float, status: int, text: str) -> AsyncIterator[None]:
    """What is not done at this time of the loop's clock is refused."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        headers = {"Retry_After": "1"} if status == 503 else {}
        raise RefusedError(status, text, **headers) from None


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is given up where the client goes.

    Raises:
        ClientDisconnect: it has gone.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, going = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({doing, going}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        for task in (doing, going):
            task.cancel()
        await asyncio.gather(doing, going, return_exceptions=True)


def misdirected(request: Request, names: set[str] | None) -> RefusedError | None:
    """Why a request is not for this server: a page of another server sends it, by whatever name.

    Args:
        names: the server's own; None where it does not know them.
    """
    if names is None:
        return None
    host = request.headers.get("host", "")
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name.strip("[]").lower() not in names:
        return RefusedError(421, f"host: got {host[:80]!r}, expected {' or '.join(sorted(names))}")
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        return RefusedError(403, f"origin: got {origin[:80]!r}, expected this server's own page")
    return None


def watched(scope: Scope, receive: Receive, send: Send, statuses: list[int]) -> tuple[Receive, Send]:
    """`receive` and `send` that note in the scope what is read and in `statuses` what is answered."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
            names = {name for name, _ in message["headers"]}
            more = [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in names]
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    async def receiving() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            scope[_READ] = True
        return message

    return receiving, sending
