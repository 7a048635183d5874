"""Engines that stay open from one configuration, or release of a bundle, to the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack

from edge_inspector.runtime.engine import Engine, judge_samples


class Pool:
    """The open engines of one station. What it gives out has judged its bundle's samples right."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, int], tuple[Engine, ExitStack]] = {}
        self._lock = threading.Lock()

    def engine(self, key: tuple[str, int], make: Callable[[], AbstractContextManager[Engine]]) -> Engine:
        """The engine with this key (hash of the bundle, batch), opened if it is not. Raises InspectorError."""
        with self._lock:
            if key not in self._open:
                with ExitStack() as stack:
                    engine = stack.enter_context(make())
                    judge_samples(engine)
                    self._open[key] = engine, stack.pop_all()
            return self._open[key][0]

    def keep(self, engines: Collection[Engine]) -> None:
        """Close all others."""
        with self._lock:
            for key, (engine, stack) in list(self._open.items()):
                if not any(engine is kept for kept in engines):
                    del self._open[key]
                    stack.close()

    def close(self) -> None:
        """Close all."""
        self.keep(())
