"""The web application: routes, the way of a request from its body to its answer, and what is counted on it.

A request is let in (at most `queue` are), its body read into memory, its parameters and its picture's size
looked at, the picture decoded, the model run, the answer encoded. The event loop does none of this itself:
reading, decoding and encoding run in a few threads, the model in one (`segvit.serve.batches`). Memory is
bounded by what is held: bodies, decoded pixels (each a `Budget`), one batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from importlib import resources
from typing import Any, NamedTuple, TypeVar

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from segvit.data.pictures import PictureBytes, TooLargeError, probe, read_image
from segvit.inference.bulk import class_colors, class_names, find_classes
from segvit.inference.protocol import Predictor
from segvit.inference.similarity import similarity_maps
from segvit.options import ServeConfig
from segvit.pictures.report import THEME
from segvit.serve.admission import Budget, RefusedError, declared_length, read_body
from segvit.serve.answers import Answers
from segvit.serve.asking import Asked, longest_body, read_request
from segvit.serve.batches import Batches
from segvit.serve.metrics import Counter, Gauge, Histogram, exposition
from segvit.system.failures import one_line, out_of_memory

__all__ = ["Service", "local_names"]

_THREADS = 4  # that decode and encode
_AT_ONCE = 8  # bodies of full length, and decoded pictures of full size, at a time
_LINGER = 2.0  # seconds for which the rest of a refused body is read, so that the client reads why
_READ = "segvit.read"  # in a request's scope: its whole body was received, or its client has gone
_GONE = 499  # the client went before its answer; nothing is sent
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_PAGE = {"/": ("index.html", "text/html"), "/style.css": ("style.css", "text/css")}
_PAGE["/script.js"] = ("script.js", "text/javascript")
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

T = TypeVar("T")


def local_names(host: str) -> set[str] | None:
    """What a browser may call a server that only this machine reaches; None where others may."""
    loopback = {"127.0.0.1", "localhost", "::1"}
    return loopback | {host} if host in loopback or host.startswith("127.") else None


class _Times(NamedTuple):
    """Where a request spent its time, in seconds."""

    decode: float
    queue: float
    network: float
    encode: float


class _Refusal(Response):
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
async def _until(deadline: float, status: int, text: str) -> AsyncIterator[None]:
    """What is not done at this time of the loop's clock is refused."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        headers = {"Retry_After": "1"} if status == 503 else {}
        raise RefusedError(status, text, **headers) from None


class Service:
    """A model, and everything that its requests share.

    Args:
        model: in evaluation mode; used in one thread.
        config: the options, all of them possible.
        name: what the model is called.
        similarity: whether it has similarity maps.
        context: in which the model runs.

    Attributes:
        app: the ASGI application; `close` is called at its end.
    """

    def __init__(
        self,
        model: Predictor,
        config: ServeConfig,
        name: str,
        *,
        similarity: bool,
        context: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.model, self.config, self.name, self.has_similarity = model, config, name, similarity
        names = class_names(model.config)
        self.answers = Answers(names, class_colors(model.config), model.config.upsample)
        self.at_hand = 0
        self.bodies = Budget(_AT_ONCE * longest_body("application/json", config.max_bytes))
        self.pixels = Budget(_AT_ONCE * config.max_pixels)
        self.threads = ThreadPoolExecutor(_THREADS, "pictures")
        self.requests = Counter("segvit_requests_total", "Requests by path and status.", ("path", "status"))
        self.parts = Histogram(
            "segvit_part_seconds", "Time of answered requests by part.", _SECONDS, ("part",)
        )
        self.whole = Histogram("segvit_request_seconds", "Time from request to answer.", _SECONDS, ("path",))
        sizes = [2**n for n in range(8)]
        self.batch_sizes = Histogram("segvit_batch_size", "Pictures that ran together.", sizes)
        self.batches = Batches(
            self._run,
            config.batch,
            config.max_pixels,
            contextlib.nullcontext() if context is None else context,
            lambda size, _: self.batch_sizes.add(size),
        )
        self.metrics: list[Counter | Gauge | Histogram] = [
            self.requests,
            self.whole,
            self.parts,
            self.batch_sizes,
            Gauge("segvit_queue_length", "Pictures that wait for the model.", lambda: len(self.batches)),
            Gauge("segvit_requests_at_hand", "Requests that were let in.", lambda: self.at_hand),
        ]
        page = resources.files("segvit.serve") / "page"
        self.files = {path: ((page / file).read_bytes(), kind) for path, (file, kind) in _PAGE.items()}
        style, kind = self.files["/style.css"]
        self.files["/style.css"] = (THEME.encode() + style, kind)
        self.app = self._app()
        self.paths = {route.path for route in self.app.routes if isinstance(route, Route)}

    def close(self) -> None:
        """End the threads."""
        self.batches.close()
        self.threads.shutdown(wait=False, cancel_futures=True)

    # The model's thread

    def _run(self, key: Hashable, items: list[Any]) -> Sequence[Any]:
        with torch.inference_mode():
            if isinstance(key, tuple):  # the pictures' shape
                return list(self.model.predict(torch.stack(items), self.config).cpu().numpy())
            return [similarity_maps(self.model, image, [index]) for image, index in items]

    # Requests

    async def _handle(self, request: Request) -> Response:
        """`/predict` and `/similarity`."""
        if self.at_hand >= self.config.queue:
            text = f"{self.at_hand} requests are at hand, come back later"
            raise RefusedError(503, text, Retry_After="1")
        self.at_hand += 1
        try:
            return await self._answer(request, time.perf_counter())
        finally:
            self.at_hand -= 1

    async def _answer(self, request: Request, start: float) -> Response:
        limit = self.config.timeout
        deadline = asyncio.get_running_loop().time() + limit
        longest = longest_body(request.headers.get("content-type", ""), self.config.max_bytes)
        async with contextlib.AsyncExitStack() as held:
            async with _until(deadline, 503, f"not begun within {limit:g} seconds"):
                await held.enter_async_context(self.bodies.hold(declared_length(request, longest)))
            async with _until(deadline, 408, f"body: not sent within {limit:g} seconds"):
                body = await read_body(request, longest)
            async with _until(deadline, 503, f"not done within {limit:g} seconds"):
                return await _unless_gone(request.receive, self._compute(request, body, start))

    async def _compute(self, request: Request, body: bytearray, start: float) -> Response:
        path, query = request.url.path, request.query_params.multi_items()
        kind, accept = (request.headers.get(name, "") for name in ("content-type", "accept"))
        asked = await self._in_thread(read_request, path, query, kind, accept, body, self.config.max_bytes)
        index = self._class_of(asked) if path == "/similarity" else None
        del body
        begin = time.perf_counter()
        channels = max(4, self.model.config.backbone.in_channels)
        picture = PictureBytes(asked.picture, max_pixels=self.config.max_pixels, max_channels=channels)
        width, height = await self._in_thread(_reading, probe, picture)
        looked = time.perf_counter() - begin
        async with self.pixels.hold(width * height):
            begin = time.perf_counter()
            image = await self._in_thread(_reading, read_image, picture, **self.model.config.reading)
            decode = looked + time.perf_counter() - begin
            key: Hashable = tuple(image.shape) if index is None else object()
            item = image if index is None else (image, index)
            try:
                done = await asyncio.wrap_future(self.batches.submit(key, item, width * height))
            except Exception as error:
                if isinstance(error, ValueError) or out_of_memory(error):
                    raise RefusedError(422, one_line(error)) from None
                raise
            answered = done.result
            begin = time.perf_counter()
            if index is None:
                answer = await self._in_thread(self.answers.prediction, asked, image, answered)
            else:
                answer = await self._in_thread(self.answers.similarity, asked, index, image, *answered)
            times = _Times(decode, done.waited, done.ran, time.perf_counter() - begin)
        return await self._in_thread(self._response, path, answer, times, start, done.batch)

    def _class_of(self, asked: Asked) -> int:
        if not self.has_similarity:
            raise RefusedError(422, "class: the model has a linear head, which has no similarity maps")
        try:
            return find_classes([asked.wanted], self.answers.names, "class")[0]
        except ValueError as error:
            raise RefusedError(400, one_line(error)) from None

    def _response(
        self, path: str, answer: bytes | dict[str, Any], times: _Times, start: float, batch: int
    ) -> Response:
        total = time.perf_counter() - start
        for part, seconds in times._asdict().items():
            self.parts.add(seconds, part)
        self.whole.add(total, path)
        shown = {
            part: round(1e3 * seconds, 3) for part, seconds in {**times._asdict(), "total": total}.items()
        }
        headers = {"server-timing": ", ".join(f"{part};dur={value}" for part, value in shown.items())}
        if isinstance(answer, bytes):
            return Response(answer, 200, headers, "image/png")
        return JSONResponse({**answer, "batch": batch, "times": shown}, 200, headers)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, lambda: function(*arguments, **named))

    async def _show(self, request: Request) -> Response:
        """The page's files."""
        content, kind = self.files[request.url.path]
        return Response(content, headers={"cache-control": "no-cache"}, media_type=kind)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.name})

    async def _describe(self, request: Request) -> Response:
        """What the page has to know of the model."""
        limits = {"pixels": self.config.max_pixels, "bytes": self.config.max_bytes}
        values = {"name": self.name, "similarity": self.has_similarity, "limits": limits}
        return JSONResponse({**values, "classes": self.answers.classes})

    async def _count(self, request: Request) -> Response:
        return PlainTextResponse(exposition(self.metrics), headers={"cache-control": "no-store"})

    # The application

    def _app(self) -> Starlette:
        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.close)

        return Starlette(
            routes=[
                *(Route(path, self._show, methods=["GET"]) for path in self.files),
                Route("/healthz", self._health, methods=["GET"]),
                Route("/metrics", self._count, methods=["GET"]),
                Route("/model", self._describe, methods=["GET"]),
                Route("/predict", self._handle, methods=["POST"]),
                Route("/similarity", self._handle, methods=["POST"]),
            ],
            exception_handlers={
                RefusedError: _refuse,
                HTTPException: _refuse,
                ClientDisconnect: _leave,
                Exception: _fail,
            },
            lifespan=lifespan,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, between what is asked of every request and what is counted of every answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = _GONE

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                names = {name for name, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in names]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        async def receiving() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                scope[_READ] = True
            return message

        path = scope["path"] if scope["path"] in self.paths else "other"
        app: ASGIApp = self.app
        if refused := _misdirected(Request(scope), local_names(self.config.host)):
            app = _Refusal(refused)
        try:
            await app(scope, receiving, sending)
        finally:
            self.requests.add(path, str(status))


def _misdirected(request: Request, names: set[str] | None) -> RefusedError | None:
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


def _reading(function: Callable[..., T], picture: PictureBytes, **arguments: Any) -> T:
    """`function`, whose complaints about a picture are refusals."""
    try:
        return function(picture, **arguments)
    except TooLargeError as error:
        raise RefusedError(413, one_line(error)) from None
    except (ValueError, OSError, ImportError) as error:
        raise RefusedError(422, one_line(error)) from None
    except Exception as error:
        if out_of_memory(error):
            raise RefusedError(422, one_line(error)) from None
        raise


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
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


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, RefusedError):
        return _Refusal(error)
    assert isinstance(error, HTTPException)
    expected = {404: "no such address", 405: f"{request.method} is not for this address"}
    refused = RefusedError(error.status_code, expected.get(error.status_code, error.detail))
    refused.headers = dict(error.headers or {})
    return _Refusal(refused)


async def _leave(request: Request, error: Exception) -> Response:
    """Nobody is there to be answered."""

    class Nothing(Response):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            pass

    return Nothing()


async def _fail(request: Request, error: Exception) -> Response:
    """A fault of the server, which its log shows."""
    return _Refusal(RefusedError(500, "a fault of the server; its log has more"))
