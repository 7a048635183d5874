"""What is tried for a remote order: in a thread of its own, that is left alone when it hangs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from edge_inspector.errors import InspectorError
from edge_inspector.inspector import Inspectors
from edge_inspector.remote.configuration import Candidate
from edge_inspector.remote.rollout import Wanted
from edge_inspector.threads import Thread
from edge_inspector.wiring import Setup

log = logging.getLogger(__name__)

PREPARE_S = 4 * 3600.0
"""What is wanted must be open by then: each engine that is to be built may take an hour."""
T = TypeVar("T")


class Attempt(Generic[T]):
    """Work for something wanted, in a thread of its own, beside what runs."""

    def __init__(self, what: Candidate | Wanted, work: Callable[[], T], most_s: float) -> None:
        """Begins at once; after `most_s` nobody waits for it any more."""
        self.what = what
        self.error: InspectorError | None = None
        self.made: T | None = None
        self._work, self._end_s = work, time.monotonic() + most_s
        self._thread = Thread(target=self._run, name="preparing", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether `error` or `made` say how it ended."""
        return not self._thread.is_alive()

    @property
    def hangs(self) -> bool:
        """Whether it should have ended long ago."""
        return not self.is_over and time.monotonic() > self._end_s

    def _run(self) -> None:
        try:
            self.made = self._work()
        except InspectorError as error:
            self.error = error
        except Exception as error:
            log.exception("preparing an update")
            self.error = InspectorError(f"{type(error).__name__}: {error}")


class Preparation(Attempt[dict[str, Inspectors]]):
    """Opens everything that a wanted setup judges with."""

    def __init__(
        self, what: Candidate | Wanted, setup: Setup, work: Callable[[], dict[str, Inspectors]]
    ) -> None:  # fmt: skip
        """`setup`: what would be in force with it."""
        self.setup = setup
        super().__init__(what, work, PREPARE_S)
