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
import traceback
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
from starlette.types import ASGIApp, Receive, Scope, Send

from segvit.data.pictures import PictureBytes, TooLargeError, probe, read_image
from segvit.inference.bulk import find_classes
from segvit.inference.classes import class_colors, class_names
from segvit.inference.protocol import Predictor
from segvit.inference.similarity import similarity_maps
from segvit.options import ServeConfig
from segvit.pictures.report import THEME
from segvit.serve.admission import Budget, RefusedError, declared_length, read_body
from segvit.serve.answers import Answers
from segvit.serve.asking import Asked, longest_body, read_request
from segvit.serve.batches import Batches
from segvit.serve.http import Answer, Refusal, local_names, misdirected, unless_gone, until, watched
from segvit.serve.metrics import Counter, Gauge, Histogram, exposition
from segvit.system.failures import one_line, out_of_memory

__all__ = ["Service"]

_THREADS = 4  # that decode and encode
_AT_ONCE = 8  # bodies of full length, and decoded pictures of full size, at a time
_GONE = 499  # the client went before its answer; nothing is sent
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_PAGE = {"/": ("index.html", "text/html"), "/style.css": ("style.css", "text/css")}
_PAGE["/script.js"] = ("script.js", "text/javascript")

T = TypeVar("T")


class _Times(NamedTuple):
    """Where a request spent its time, in seconds."""

    decode: float
    queue: float
    network: float
    encode: float


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
        self.local = local_names(config.host)
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

    async def _handle(self, request: Request, send: Send) -> None:
        """`/predict` and `/similarity`."""
        if self.at_hand >= self.config.queue:
            text = f"{self.at_hand} requests are at hand, come back later"
            raise RefusedError(503, text, Retry_After="1")
        self.at_hand += 1
        try:
            await self._answer(request, send, time.perf_counter())
        finally:
            self.at_hand -= 1

    async def _answer(self, request: Request, send: Send, start: float) -> None:
        limit = self.config.timeout
        deadline = asyncio.get_running_loop().time() + limit
        longest = longest_body(request.headers.get("content-type", ""), self.config.max_bytes)
        async with contextlib.AsyncExitStack() as held:
            async with until(deadline, 503, f"not begun within {limit:g} seconds"):
                await held.enter_async_context(self.bodies.hold(declared_length(request, longest)))
            async with until(deadline, 408, f"body: not sent within {limit:g} seconds"):
                body = await read_body(request, longest)
            async with until(deadline, 503, f"not done within {limit:g} seconds"):
                response = await unless_gone(request.receive, self._compute(request, body, start, held))
            with contextlib.suppress(TimeoutError):  # of a client that does not read: the connection ends
                async with asyncio.timeout_at(deadline):
                    await response(request.scope, request.receive, send)

    async def _compute(
        self, request: Request, body: bytearray, start: float, held: contextlib.AsyncExitStack
    ) -> Answer:
        """The answer, for which `held` keeps room until it is sent."""
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
        size = width * height if index is not None else self._pixels_run(width, height)
        await held.enter_async_context(self.pixels.hold(width * height))
        begin = time.perf_counter()
        image = await self._in_thread(_reading, read_image, picture, **self.model.config.reading)
        decode = looked + time.perf_counter() - begin
        key: Hashable = tuple(image.shape) if index is None else object()
        item = image if index is None else (image, index)
        try:
            done = await asyncio.wrap_future(self.batches.submit(key, item, size))
        except Exception as error:
            if isinstance(error, ValueError) or out_of_memory(error):
                raise RefusedError(422, one_line(error)) from None
            raise
        begin = time.perf_counter()
        if index is None:
            answer = await self._in_thread(self.answers.prediction, asked, image, done.result)
        else:
            answer = await self._in_thread(self.answers.similarity, asked, index, image, *done.result)
        times = _Times(decode, done.waited, done.ran, time.perf_counter() - begin)
        return await self._in_thread(self._response, path, answer, times, start, done.batch)

    def _pixels_run(self, width: int, height: int) -> int:
        """Pixels that the model has to do with; a narrow picture of a given short side becomes a giant one.

        Raises:
            RefusedError: they are more than a picture may have.
        """
        short_side = self.config.short_side
        if short_side is None:
            return width * height
        longer = round(short_side * max(width, height) / min(width, height))
        if short_side * longer > self.config.max_pixels:
            got = f"{width}x{height} pixels, {short_side}x{longer} with the short side that the model gets"
            raise RefusedError(413, f"image: {got}, more than {self.config.max_pixels}")
        return max(width * height, short_side * longer)

    def _class_of(self, asked: Asked) -> int:
        if not self.has_similarity:
            raise RefusedError(422, "class: the model's decoder has no similarity maps")
        try:
            return find_classes([asked.wanted], self.answers.names, "class")[0]
        except ValueError as error:
            raise RefusedError(400, one_line(error)) from None

    def _response(
        self, path: str, answer: bytes | dict[str, Any], times: _Times, start: float, batch: int
    ) -> Answer:
        total = time.perf_counter() - start
        for part, seconds in times._asdict().items():
            self.parts.add(seconds, part)
        self.whole.add(total, path)
        shown = {
            part: round(1e3 * seconds, 3) for part, seconds in {**times._asdict(), "total": total}.items()
        }
        headers = {"server-timing": ", ".join(f"{part};dur={value}" for part, value in shown.items())}
        if isinstance(answer, bytes):
            return Answer(answer, 200, headers, "image/png")
        body = json.dumps({**answer, "batch": batch, "times": shown}).encode()
        return Answer(body, 200, headers, "application/json")

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
                Route("/predict", _Endpoint(self._handle), methods=["POST"]),
                Route("/similarity", _Endpoint(self._handle), methods=["POST"]),
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
        statuses: list[int] = []
        receive, send = watched(scope, receive, send, statuses)
        path = scope["path"] if scope["path"] in self.paths else "other"
        app: ASGIApp = self.app
        if refused := misdirected(Request(scope), self.local):
            app = Refusal(refused)
        try:
            await app(scope, receive, send)
        finally:
            self.requests.add(path, str((statuses or [_GONE])[0]))


class _Endpoint:
    """An endpoint that sends its answer itself."""

    def __init__(self, handle: Callable[[Request, Send], Coroutine[Any, Any, None]]) -> None:
        self.handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.handle(Request(scope, receive, send), send)


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


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, RefusedError):
        return Refusal(error)
    assert isinstance(error, HTTPException)
    expected = {404: "no such address", 405: f"{request.method} is not for this address"}
    refused = RefusedError(error.status_code, expected.get(error.status_code, error.detail))
    refused.headers = dict(error.headers or {})
    return Refusal(refused)


async def _leave(request: Request, error: Exception) -> Response:
    """Nobody is there to be answered."""

    class Nothing(Response):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            pass

    return Nothing()


async def _fail(request: Request, error: Exception) -> Response:
    """A fault of the server, which its log shows."""
    traceback.print_exception(error)
    return Refusal(RefusedError(500, "a fault of the server; its log has more"))
