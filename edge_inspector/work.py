"""What waits to be written: a bounded queue, taken from it in batches; each piece resolves a Future."""

from __future__ import annotations

import contextlib
import queue
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

BATCH = 512


@dataclass
class Work:
    """One change of the file."""

    apply: Callable[[sqlite3.Connection], Any]
    renews: bool = False
    """Whether it numbers results anew."""
    done: Future[Any] = field(default_factory=Future)

    def resolve(self, value: object) -> None:
        """It is on the disk."""
        with contextlib.suppress(InvalidStateError):  # its owner gave up waiting
            self.done.set_result(value)

    def fail(self, error: Exception) -> None:
        """It will not be done."""
        with contextlib.suppress(InvalidStateError):
            self.done.set_exception(error)


class WorkQueue:
    """Any thread puts, one takes."""

    def __init__(self, bound: int) -> None:
        self._queue: queue.Queue[Work | None] = queue.Queue(bound)

    def empty(self) -> bool:
        """Whether nothing waits."""
        return self._queue.empty()

    def put(self, work: Work) -> None:
        """Hand in at once. Raises queue.Full."""
        self._queue.put_nowait(work)

    def wake(self) -> None:
        """Let whoever takes look around."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)

    def next_batch(self, timeout_s: float) -> list[Work]:
        """What waits, at most BATCH; empty when nothing came in time or somebody called `wake`."""
        batch: list[Work] = []
        with contextlib.suppress(queue.Empty):
            item = self._queue.get(timeout=timeout_s)
            while True:
                if item is not None:
                    batch.append(item)
                if len(batch) >= BATCH:
                    break
                item = self._queue.get_nowait()
        return batch
