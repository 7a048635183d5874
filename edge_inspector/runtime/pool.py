"""Engines that stay open from one configuration, or release of a bundle, to the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack

from edge_inspector.errors import EngineError
from edge_inspector.runtime.engine import Engine, judge_samples

_Key = tuple[str, int]
"""Hash of the bundle, batch."""


class Pool:
    """The open engines of one station. What it gives out has judged its bundle's samples right."""

    def __init__(self) -> None:
        self._open: dict[_Key, tuple[Engine, ExitStack]] = {}
        self._opening: dict[_Key, threading.Lock] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def engine(self, key: _Key, make: Callable[[], AbstractContextManager[Engine]]) -> Engine:
        """The engine with this key, opened if it is not: others can be had meanwhile. Raises InspectorError."""
        with self._lock:
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:
            with self._lock:
                if key in self._open:
                    return self._open[key][0]
            with ExitStack() as stack:
                engine = stack.enter_context(make())
                judge_samples(engine)
                engine.bundle.let_go()
                with self._lock:
                    if self._is_closed:
                        raise EngineError("stopped while an engine was opened")
                    self._open[key] = engine, stack.pop_all()
            return engine

    def keep(self, engines: Collection[Engine]) -> None:
        """Close all others."""
        with self._lock:
            others = [key for key, (engine, _) in self._open.items() if not any(engine is kept for kept in engines)]
            stacks = [self._open.pop(key)[1] for key in others]
        for stack in stacks:
            stack.close()

    def close(self) -> None:
        """Close all; none is opened any more."""
        with self._lock:
            self._is_closed = True
        self.keep(())
