"""Stored results as others read them, beside whoever writes; a file that cannot be read gives nothing, and says so."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_inspector import messages
from edge_inspector.database import closed, connected, read_only
from edge_inspector.errors import OutboxError
from edge_inspector.results import Result


def stored_results(path: Path, name: str) -> list[Result]:
    """The records with this result id, part id or trigger id, oldest first, read beside whoever writes the file.

    Raises OutboxError.
    """
    needle = json.dumps(name, ensure_ascii=False).encode()  # a quick look at the bytes; what it finds is then read properly
    try:
        with contextlib.closing(read_only(path)) as connection:
            rows = connection.execute("SELECT body FROM results WHERE instr(body, ?) ORDER BY id", (needle,)).fetchall()
    except sqlite3.Error as error:
        raise OutboxError(f"{path}: {error}", hint="is that the device's state, and may you read it?") from error
    found = [messages.decode(Result, body, "a stored result") for (body,) in rows]
    return [result for result in found if name in (result.result_id, result.part_id, result.trigger_id)]


class History:
    """The reading side of one outbox. For any thread; `base` is what a stream's numbers are less than those on disk."""

    def __init__(self, path: Path, on_fault: Callable[[], None]) -> None:
        """`on_fault` is called where the file cannot be read; `fault` then says why."""
        self.fault: sqlite3.Error | None = None
        self._path, self._on_fault = path, on_fault
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Read from now on. Raises sqlite3.Error."""
        connection = connected(self._path, "NORMAL")
        with self._lock:
            self._connection = connection

    def close(self) -> None:
        """Give nothing from now on."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            closed(connection)

    def results(self, station: str, base: int, span: tuple[int, int], limit: int) -> list[tuple[int, bytes]]:
        """The first `limit` results within `span`: number and payload."""
        query = "SELECT seq, body FROM results WHERE station = ? AND seq BETWEEN ? AND ? ORDER BY seq LIMIT ?"
        rows = self._rows(query, (station, max(1, span[0]) + base, span[1] + base, limit))
        return [(seq - base, body) for seq, body in rows]

    def gaps(self, station: str, base: int, span: tuple[int, int], limit: int) -> list[tuple[int, int]]:
        """The newest `limit` gaps within `span`, in order."""
        lo, hi = max(1, span[0]) + base, span[1] + base
        query = "SELECT lo, hi FROM gaps WHERE station = ? AND hi >= ? AND lo <= ? ORDER BY lo DESC LIMIT ?"
        rows = self._rows(query, (station, lo, hi, limit))
        return [(max(lo, first) - base, min(hi, last) - base) for first, last in reversed(rows)]

    def gap_count(self, station: str, base: int, span: tuple[int, int]) -> int:
        """How many gaps there are within `span`."""
        query = "SELECT COUNT(*) FROM gaps WHERE station = ? AND hi >= ? AND lo <= ?"
        rows = self._rows(query, (station, max(1, span[0]) + base, span[1] + base))
        return int(rows[0][0]) if rows else 0

    def _rows(self, query: str, values: tuple[Any, ...]) -> list[Any]:
        with self._lock:
            if self._connection is None:
                return []
            try:
                return self._connection.execute(query, values).fetchall()
            except sqlite3.Error as error:
                self.fault = error
        self._on_fault()
        return []
