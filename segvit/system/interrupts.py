"""SIGINT and SIGTERM during training: the first asks it to save and end, the second ends it at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any

__all__ = ["Interrupted", "Interrupts", "ignore_signals", "obey_parent"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Training ended early because of a signal, everything saved; the text says how to go on."""

    def __init__(self, text: str, signum: int) -> None:
        super().__init__(text)
        self.signum = signum


class Interrupts:
    """While this context is open, the first signal is kept in `flag`, which spawned processes can be given.

    `flag.value` is the signal's number, 0 until one came. Handlers are those of the main thread; in another
    thread nothing is installed.
    """

    def __init__(self) -> None:
        self.flag: Any = multiprocessing.get_context("spawn").RawValue("i", 0)
        self.received = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: Any) -> None:
        if not self.received:
            self.received = True
            self.flag.value = self.flag.value or number
            text = f"\nsegvit: {signal.Signals(number).name}: saving; once more to stop at once\n"
            os.write(2, text.encode())
            return
        for child in multiprocessing.active_children():
            child.kill()
        signal.signal(number, signal.SIG_DFL)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        os.kill(os.getpid(), number)


def obey_parent(flag: Any) -> None:
    """In a spawned process: a signal sets the parent's flag; where the parent is gone the process ends."""

    def receive(number: int, frame: Any) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(128 + number)
        flag.value = flag.value or number

    if multiprocessing.parent_process() is not None:
        for number in _SIGNALS:
            signal.signal(number, receive)


def ignore_signals(_: int = 0) -> None:
    """For a data loading process: its parent ends it."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
