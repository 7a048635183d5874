"""What comes too often to be told each time: anybody who may publish can make a device refuse things."""

from __future__ import annotations

import time

EVERY_S = 1.0


class Flood:
    """Counts what is not told. Used from one thread."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        """The first is told, then one each `every_s`."""
        self._every_s, self._told_s = every_s, float("-inf")
        self._untold = 0

    def told(self) -> int | None:
        """Whether this one may be told: how many were not since the last that was; None where it may not."""
        now = time.monotonic()
        if now - self._told_s < self._every_s:
            self._untold += 1
            return None
        untold, self._untold, self._told_s = self._untold, 0, now
        return untold


def besides(untold: int) -> str:
    """In words, for the end of a message."""
    return f" (and {untold} more before it)" if untold else ""
