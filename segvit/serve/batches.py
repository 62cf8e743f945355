"""One thread that runs the model, and gives pictures that wait and may run together to it at once."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from segvit.system.failures import let_go

__all__ = ["Batches", "Done"]


class Done(NamedTuple):
    """What came of a task, how long it waited and ran (seconds), and how many ran together."""

    result: Any
    waited: float
    ran: float
    batch: int


class _Task(NamedTuple):
    key: Hashable
    item: Any
    size: int
    since: float
    future: Future[Done]


class Batches:
    """Runs tasks in a thread of its own, the oldest first, and with it those that wait and have the same key.

    Nothing waits for others to come: a batch is what has come while the one before it ran.

    Args:
        function: the results of items that have one key.
        most: items of a call.
        most_size: their sizes together, where it is more than one item.
        context: entered in the thread.
        observe: called with each batch's number of items and seconds.
    """

    def __init__(
        self,
        function: Callable[[Hashable, list[Any]], Sequence[Any]],
        most: int,
        most_size: int,
        context: AbstractContextManager[Any],
        observe: Callable[[int, float], None],
    ) -> None:
        self.function, self.most, self.most_size = function, most, most_size
        self.context, self.observe = context, observe
        self.tasks: deque[_Task] = deque()
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)
        self.thread.start()

    def __len__(self) -> int:
        return len(self.tasks)

    def submit(self, key: Hashable, item: Any, size: int) -> Future[Done]:
        """The future of a task; cancelled before its turn, it is not run."""
        future: Future[Done] = Future()
        with self.changed:
            if self.closed:
                raise RuntimeError("closed")
            self.tasks.append(_Task(key, item, size, time.perf_counter(), future))
            self.changed.notify()
        return future

    def close(self) -> None:
        """End the thread after the batch that runs; what waits is cancelled."""
        with self.changed:
            self.closed = True
            left, self.tasks = list(self.tasks), deque()
            self.changed.notify()
        for task in left:
            task.future.cancel()
        self.thread.join()

    def _take(self) -> list[_Task]:
        """The next batch; waits for one, [] at the end."""
        with self.changed:
            while True:
                self.changed.wait_for(lambda: self.tasks or self.closed)
                if self.closed:
                    return []
                batch: list[_Task] = []
                size, rest = 0, deque[_Task]()
                for task in self.tasks:
                    fits = not batch or (len(batch) < self.most and size + task.size <= self.most_size)
                    if batch and not (task.key == batch[0].key and fits):
                        rest.append(task)
                    elif task.future.set_running_or_notify_cancel():
                        batch.append(task)
                        size += task.size
                self.tasks = rest
                if batch:
                    return batch

    def _work(self) -> None:
        with self.context:
            while batch := self._take():
                self._run(batch)

    def _run(self, batch: list[_Task]) -> None:
        start = time.perf_counter()
        try:
            results = self.function(batch[0].key, [task.item for task in batch])
        except Exception as error:
            let_go(error)
            if len(batch) == 1:
                batch[0].future.set_exception(error)
            else:  # the others shall not fail for one, or for being many
                for task in batch:
                    self._run([task])
            return
        ran = time.perf_counter() - start
        self.observe(len(batch), ran)
        for task, result in zip(batch, results, strict=True):
            task.future.set_result(Done(result, start - task.since, ran, len(batch)))
