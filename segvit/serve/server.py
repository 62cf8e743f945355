"""The socket and the loop: from a service to a server that a signal ends when its requests are answered."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn

from segvit.options import ServeConfig
from segvit.serve.app import Service

__all__ = ["bind", "serve"]

_CONNECTIONS = 512  # besides those whose requests are at hand


def bind(host: str, port: int) -> socket.socket:
    """A socket that will listen there.

    Raises:
        ValueError: no such address, or it cannot be had; names the option.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a name"
        raise ValueError(f"host: got {host!r}, expected an address of this machine ({reason})") from None
    found = socket.socket(family, kind, protocol)
    try:
        if hasattr(socket, "AF_UNIX"):  # on Windows others could take the port too
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise ValueError(f"host, port: cannot listen on {host}:{port} ({error.strerror})") from None
    return found


class _Server(uvicorn.Server):
    def __init__(self, settings: uvicorn.Config, ready: Callable[[], Any]) -> None:
        super().__init__(settings)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()


def serve(service: Service, listening: socket.socket, config: ServeConfig, ready: Callable[[], Any]) -> None:
    """Answer until SIGINT or SIGTERM, and then what is at hand; a second SIGINT ends at once.

    Args:
        service: is closed at the end.
        listening: of `bind`.
        config: the options.
        ready: called when it listens.
    """
    settings = uvicorn.Config(
        service,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level="critical",  # faults are in the log of the application
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=config.queue + _CONNECTIONS,
        timeout_graceful_shutdown=int(config.timeout) + 5,
    )
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # what it says is answered
    server = _Server(settings, ready)

    def stop(*_: Any) -> None:
        server.should_exit = True

    main = threading.current_thread() is threading.main_thread()
    # uvicorn takes the signals while it runs, and raises them once more when it is done.
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
