"""Crashes at every line of shipped modules: found by tracing them, not listed by hand.

A crash is an exception that nothing catches, raised before the n-th traced line. Two kinds: a killed process leaves the
disk as it is; a power cut takes it back to what was last synced for certain.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


class Crash(BaseException):
    """The process has ended."""


class Schedule:
    """Counts lines of the modules that are traced, and crashes before those that are asked for."""

    def __init__(self, modules: tuple[Path, ...], at: tuple[int, ...] = ()) -> None:
        self.lines = 0
        self.done = 0
        self._files = {str(path) for path in modules}
        self._at = set(at)

    @contextmanager
    def traced(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._entered)
        try:
            yield
        finally:
            sys.settrace(before)

    def _entered(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line":
            self.lines += 1
            if self.lines in self._at:
                self.done += 1
                raise Crash(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return self._line


class Disk:
    """A folder, and what of it is certain to survive a power cut: names by the last fsync of the folder, bytes by their file's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.synced: dict[str, bytes] = {}
        self._bytes: dict[int, bytes] = {}
        self._fsync = os.fsync

    def fsync(self, descriptor: int) -> None:
        """Stands in for os.fsync: does it, and remembers what it is worth."""
        self._fsync(descriptor)
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if place == self.folder:
            self.synced = {path.name: self._bytes.get(path.stat().st_ino, b"") for path in self.folder.iterdir()}
        elif place.parent == self.folder:
            self._bytes[place.stat().st_ino] = place.read_bytes()

    def cut(self) -> None:
        """The power goes."""
        for path in self.folder.iterdir():
            path.unlink()
        for name, data in self.synced.items():
            (self.folder / name).write_bytes(data)
