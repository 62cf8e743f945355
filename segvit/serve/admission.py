"""What a request may cost before it is let in: refusals, budgets of memory, and bodies of limited length."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

__all__ = ["Budget", "RefusedError", "declared_length", "read_body"]


class RefusedError(Exception):
    """A request that is not done: its status and, as the text, one line that says why."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}


class Budget:
    """An amount that requests hold shares of, first come first served.

    A share is asked for as a whole and once, so that nobody holds one while waiting for more.
    """

    def __init__(self, total: int) -> None:
        self.total = self.left = total
        self.waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, amount: int) -> AsyncIterator[None]:
        """Wait for a share, which is given back at the end; more than all there is counts as all."""
        amount = min(amount, self.total)
        if self.waiting or amount > self.left:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.waiting.append((amount, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():  # both at once
                    self.left += amount
                self._next()
                raise
        else:
            self.left -= amount
        try:
            yield
        finally:
            self.left += amount
            self._next()

    def _next(self) -> None:
        while self.waiting and (self.waiting[0][1].cancelled() or self.waiting[0][0] <= self.left):
            amount, turn = self.waiting.popleft()
            if not turn.cancelled():
                self.left -= amount
                turn.set_result(None)


def declared_length(request: Request, most: int) -> int:
    """Bytes that the body will have, `most` where the request does not say.

    Raises:
        RefusedError: more than `most`.
    """
    text = request.headers.get("content-length")
    length = int(text) if text is not None and text.isdecimal() else most
    if length > most:
        raise RefusedError(413, f"body: {length} bytes, more than {most}")
    return length


async def read_body(request: Request, most: int) -> bytearray:
    """The body of a request, of which no more than `most` bytes are ever in memory.

    Raises:
        RefusedError: there are more.
        starlette.requests.ClientDisconnect: the client has gone.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise RefusedError(413, f"body: more than {most} bytes")
    return body
