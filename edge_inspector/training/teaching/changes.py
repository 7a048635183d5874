"""What a lesson changes, in counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counted:
    """How many of some pictures lie above a threshold."""

    above: int
    of: int

    def __str__(self) -> str:
        return f"{self.above} of {self.of}"


@dataclass(frozen=True)
class Change:
    """Something counted before the lesson and after it."""

    name: str
    before: Counted
    after: Counted

    def __str__(self) -> str:
        return f"{self.name}: {self.before} before, {self.after} after"
