"""What can be saved of a damaged file of results.

Such a file is never repaired in place. What can still be read of it goes into a fresh file, which then takes its place;
the old one is set aside for a person to look at. Of those only the newest is kept: each may be as large as the quota.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_inspector import durable, streams
from edge_inspector.database import closed, connected, make_tables
from edge_inspector.quota import Quota
from edge_inspector.results import MAX_RESULT_BYTES

_ASIDE = "outbox.damaged-*.db"
_SUFFIXES = ("", "-wal", "-shm")
_TICK_ROWS = 200
_BODY = re.compile(rb'\{"schema":"ei\.result\.v1","result_id":"')
"""How every stored result begins."""
_JSON = json.JSONDecoder()


@dataclass
class Salvage:
    """What is read of a damaged file, in the order in which it was written."""

    path: Path
    tick: Callable[[], None]
    acked: dict[str, int] = field(default_factory=dict)
    """What the broker has of each station: these results are not read."""
    faults: list[str] = field(default_factory=list)
    expected: int | None = None
    """So many results the broker does not have; None: that cannot be read."""
    bases: dict[str, int] = field(default_factory=dict)
    """What the numbers of each stream in force are less than those on the disk."""
    _connection: sqlite3.Connection | None = None

    def __enter__(self) -> Salvage:
        """Open the file, as far as that is possible."""
        with self._noting("file"):
            self._connection = connected(self.path, "OFF")
            self._connection.execute("PRAGMA query_only=ON")
        with self._noting("streams"):
            self.bases = {head.stream: head.base for head in streams.heads(self._reader).values()}
            rows = self._reader.execute("SELECT station, acked, next FROM streams").fetchall()
            self.acked |= {station: max(acked, self.acked.get(station, 0)) for station, acked, _ in rows}
            self.expected = sum(upcoming - 1 - self.acked[station] for station, _, upcoming in rows)
        return self

    @property
    def _reader(self) -> sqlite3.Connection:
        if self._connection is None:
            raise sqlite3.DatabaseError("it cannot be opened")
        return self._connection

    def __exit__(self, *_: object) -> None:
        """Close it."""
        if self._connection is not None:
            closed(self._connection)

    @contextlib.contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self.faults.append(f"{what}: {error}")

    def triggers(self, columns: Iterable[str]) -> Iterator[dict[str, Any]]:
        """The triggers that are known, with those of the columns that this file has."""
        with self._noting("triggers"):
            known = [name for name in columns_of(self._reader, "triggers") if name in set(columns)]
            for row in self._rows("triggers", ", ".join(known)):
                yield dict(zip(known, row[1:], strict=True))

    def results(self) -> Iterator[bytes]:
        """The bodies of those that the broker has not acknowledged; last, what no table leads to any more."""
        before, found = len(self.faults), set()
        for _, station, seq, body in self._rows("results", "station, seq, body"):
            if seq > self.acked.get(station, 0):
                found.add((station, seq))
                yield bytes(body)
        if len(self.faults) == before:
            return
        rest = {key: body for key, body in self._carved() if key not in found and key[1] > self.acked.get(key[0], 0)}
        for key in sorted(rest):
            yield rest[key]

    def _carved(self) -> Iterator[tuple[tuple[str, int], bytes]]:
        """Bodies that lie in the bytes of the file and of its log: station and number on the disk, body."""
        for path in (self.path, Path(f"{self.path}-wal")):
            data = path.read_bytes() if path.exists() else b""
            for number, match in enumerate(_BODY.finditer(data)):
                if number % _TICK_ROWS == 0:
                    self.tick()
                text = data[match.start() : match.start() + MAX_RESULT_BYTES].decode(errors="replace")
                with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off, or half overwritten
                    result, end = _JSON.raw_decode(text)
                    if result["stream"] in self.bases or not self.bases:
                        key = result["station"], result["seq"] + self.bases.get(result["stream"], 0)
                        yield key, text[:end].encode()

    def _rows(self, table: str, columns: str) -> Iterator[tuple[Any, ...]]:
        """Rows from the first one up to the damage, then those behind it."""
        last = None
        before = len(self.faults)
        for last, *rest in self._ascending(table, columns, 0):
            yield last, *rest
        if len(self.faults) == before:
            return
        behind = self._first_behind(table, last or 0)
        if behind is not None:
            yield from self._ascending(table, columns, behind)

    def _ascending(self, table: str, columns: str, first: int) -> Iterator[tuple[Any, ...]]:
        with self._noting(table):
            query = f"SELECT id, {columns} FROM {table} WHERE id >= ? ORDER BY id"  # noqa: S608 - our own names
            for number, row in enumerate(self._reader.execute(query, (first,))):
                if number % _TICK_ROWS == 0:
                    self.tick()
                yield row

    def _first_behind(self, table: str, last: int) -> int | None:
        found = None
        with self._noting(table):
            query = f"SELECT id FROM {table} WHERE id > ? ORDER BY id DESC"  # noqa: S608 - our own names
            for number, row in enumerate(self._reader.execute(query, (last,))):
                if number % _TICK_ROWS == 0:
                    self.tick()
                found = row[0]
        return found


def fresh_path(path: Path) -> Path:
    """Where the file is made that takes the place of a damaged one."""
    return path.with_name("outbox.new.db")


def finish_replacing(path: Path) -> None:
    """Carry out what a crash interrupted in `replace`. Raises OSError."""
    fresh = fresh_path(path)
    if fresh.exists() and not path.exists():
        os.replace(fresh, path)
    for suffix in (*_SUFFIXES, "-journal"):
        Path(f"{fresh}{suffix}").unlink(missing_ok=True)


def replace(path: Path) -> Path:
    """Set the damaged file aside and put the fresh one in its place; returns where the old one lies. Raises OSError."""
    for old in path.parent.glob(f"{_ASIDE}*"):
        old.unlink(missing_ok=True)
    aside = path.with_name(f"outbox.damaged-{int(time.time())}.db")
    for suffix in ("-shm", "-wal", ""):  # the fresh file must never be opened with the old one's log
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{aside}{suffix}")
    if fresh_path(path).exists():
        os.replace(fresh_path(path), path)
    durable.sync_folder(path.parent)
    return aside


def aside_of(folder: Path) -> Path | None:
    """A damaged file that was set aside and is still there."""
    return next(iter(sorted(folder.glob(_ASIDE))), None)


def columns_of(connection: sqlite3.Connection, table: str) -> list[str]:
    """The names of a table's columns, but for its row number. Raises sqlite3.Error."""
    return [row[1] for row in connection.execute(f"PRAGMA table_info({table})") if row[1] != "id"]


def _take_trigger(connection: sqlite3.Connection, trigger: dict[str, Any]) -> None:
    """One that had a result keeps none to answer with, unless that is taken over, too: number 0 is nobody's."""
    row = trigger if trigger["seq"] is None else trigger | {"body": "", "seq": 0}
    places = ", ".join("?" * len(row))
    connection.execute(f"INSERT OR IGNORE INTO triggers({', '.join(row)}) VALUES({places})", tuple(row.values()))


def take_over(old: Salvage, fresh: Path, quota: Quota, stations: Iterable[str]) -> str:
    """Make the fresh file: what the broker does not have yet, in new streams, and which triggers are known.

    Returns what was taken, in words. Raises OSError, sqlite3.Error.
    """
    taken = 0
    with old, contextlib.closing(connected(fresh, "FULL")) as new:
        quota.bind(new)
        make_tables(new)
        new.execute("BEGIN IMMEDIATE")
        streams.open_streams(new, [*stations, *old.acked])
        for trigger in old.triggers(columns_of(new, "triggers")):
            _take_trigger(new, trigger)
        for stored in old.results():
            result = streams.moved_result(stored, keep_id=True)
            if result is not None:
                streams.insert(new, result)
                taken += 1
        new.execute("COMMIT")
    known = f" of {old.expected}" if old.expected is not None else ""
    return f"{taken}{known} results that the broker does not have were taken over"
