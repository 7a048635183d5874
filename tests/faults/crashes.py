"""Crashes at every line of shipped modules: found by tracing them, not listed by hand.

A crash is an exception that nothing catches, raised before the n-th traced line. Two kinds: a killed process leaves the
disk as it is; a power cut takes it back to what was last synced for certain.
"""

from __future__ import annotations

import os
import shutil
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
    """A folder, and what of it is certain to survive a power cut: names by the last fsync of their folder, bytes by their file's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bytes: dict[int, bytes] = {}
        self._names: dict[Path, dict[str, int | None]] = {}
        """Of each folder: name -> inode; None: a folder."""
        self._fsync = os.fsync

    def fsync(self, descriptor: int) -> None:
        """Stands in for os.fsync: does it, and remembers what it is worth."""
        self._fsync(descriptor)
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if place.is_dir():
            self._names[place] = {path.name: None if path.is_dir() else path.stat().st_ino for path in place.iterdir()}
        else:
            self._bytes[place.stat().st_ino] = place.read_bytes()

    def certain(self, folder: Path | None = None) -> dict[Path, bytes]:
        """Every file that survives."""
        folder, found = folder or self.folder, dict[Path, bytes]()
        for name, inode in self._names.get(folder, {}).items():
            if inode is None:
                found.update(self.certain(folder / name))
            else:
                found[folder / name] = self._bytes.get(inode, b"")
        return found

    def cut(self) -> None:
        """The power goes."""
        left = self.certain()
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        self._bytes, self._names = {}, {}
        for path, data in left.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        for path in (*self.folder.rglob("*"), self.folder):
            descriptor = os.open(path, os.O_RDONLY)
            self.fsync(descriptor)
            os.close(descriptor)
