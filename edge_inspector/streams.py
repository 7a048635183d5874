"""The numbers of results: each station has a stream, in which they count from 1 without a gap.

On the disk the numbers of a station never begin again: those of a new stream go on where the one before ended (its
`last` in the table `former`), and only what is told to others is counted from there. So a new stream costs nothing but
the results that move into it, and the history of the one before stays where it is.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from edge_inspector import database, messages
from edge_inspector.errors import SchemaError
from edge_inspector.frames import utc_now
from edge_inspector.quota import note_gap
from edge_inspector.results import Reason, Result, Verdict

log = logging.getLogger(__name__)

_AT_ONCE = 200
_LIVES = 1 << 20
"""A file's life rises by a random step of at most this, so that two copies of one file go on with different numbers."""
_BASE = "(SELECT COALESCE(MAX(last), 0) FROM former WHERE former.station = streams.station)"


@dataclass(frozen=True)
class Head:
    """What is kept of one station's stream, in the numbers that others know."""

    stream: str
    lo: int
    hi: int
    acked: int
    base: int = 0
    """What these numbers are less than those on the disk."""


@dataclass(frozen=True)
class Origin:
    """What a file knew of itself when it was opened."""

    streams: dict[str, Head]
    """Those that it had already, by station."""
    life_before: int
    life: int
    """A number that rises with every opening: a file that meets a higher one of its own stream is an older copy."""


def begin_life(connection: sqlite3.Connection, stations: Iterable[str]) -> Origin:
    """The file is opened for writing once more, within a transaction. Raises sqlite3.Error."""
    before = open_streams(connection, stations)
    life_before = database.fact(connection, "life")
    life = life_before + 1 + secrets.randbelow(_LIVES)
    database.remember(connection, "life", life)
    database.remember(connection, "clean", 0)
    return Origin(before, life_before, life)


def finish_interrupted(connection: sqlite3.Connection) -> None:
    """Give every trigger that has none a result. Raises sqlite3.Error."""
    rows = connection.execute("SELECT station, trigger_id, body FROM triggers WHERE seq IS NULL ORDER BY id")
    for station, trigger_id, body in rows.fetchall():
        try:
            result = messages.decode(Result, body.encode(), trigger_id)
        except SchemaError:  # damaged: what is left is that there was such a trigger
            now = utc_now()
            result = Result(
                station=station, trigger_id=trigger_id, verdict=Verdict.UNDECIDED, reason=Reason.INTERRUPTED,
                state="aborted", triggered_at=now, decided_at=now, expires_at=now,
            )  # fmt: skip
        insert(connection, result.model_copy(update={"decided_at": utc_now()}))
        log.warning("trigger %s of station %s was interrupted by a restart: undecided", trigger_id, station)


def new_stream() -> str:
    """A name that no stream had before."""
    return secrets.token_hex(4)


def open_streams(connection: sqlite3.Connection, stations: Iterable[str]) -> dict[str, Head]:
    """Give each station a stream that has none; returns those that were there before. Raises sqlite3.Error."""
    before = heads(connection)
    for station in stations:
        connection.execute("INSERT OR IGNORE INTO streams VALUES(?, ?, 1, 0)", (station, new_stream()))
    return before


def heads(connection: sqlite3.Connection) -> dict[str, Head]:
    """Of every station. Raises sqlite3.Error."""
    found = {}
    query = f"SELECT station, stream, next, acked, {_BASE} FROM streams"  # noqa: S608 - our own names
    for station, stream, upcoming, acked, base in connection.execute(query).fetchall():
        lowest = connection.execute("SELECT MIN(seq) FROM results WHERE station = ? AND seq > ?", (station, base)).fetchone()[0]
        lo = (lowest or upcoming) - base
        found[station] = Head(stream, lo, upcoming - 1 - base, max(0, acked - base), base)
    return found


def insert(connection: sqlite3.Connection, result: Result, *, key: str | None = None) -> Result:
    """Number and store a result; it answers its trigger, or the one noted under `key`. Raises sqlite3.Error."""
    query = f"SELECT stream, next, {_BASE} FROM streams WHERE station = ?"  # noqa: S608 - our own names
    row = connection.execute(query, (result.station,)).fetchone()
    if row is None:  # a station of an earlier configuration, finishing an interrupted trigger
        row = (new_stream(), 1, 0)
        connection.execute("INSERT INTO streams VALUES(?, ?, 1, 0)", (result.station, row[0]))
    stream, number, base = row
    stored = _numbered(result, stream, number - base)
    connection.execute(
        "INSERT INTO results(station, seq, verdict, body) VALUES(?, ?, ?, ?)",
        (result.station, number, result.verdict.value, stored.payload()),
    )
    connection.execute("UPDATE streams SET next = ? WHERE station = ?", (number + 1, result.station))
    connection.execute(
        "UPDATE triggers SET seq = ?, body = '' WHERE station = ? AND trigger_id = ?",
        (number, result.station, key or result.trigger_id),
    )
    return stored


def _numbered(result: Result, stream: str, seq: int) -> Result:
    return result.model_copy(update={"result_id": f"{stream}-{seq}", "stream": stream, "seq": seq})


def begin_anew(connection: sqlite3.Connection, old: dict[str, Head], tick: Callable[[], None]) -> dict[str, str]:
    """Begin a new stream for each station whose stream is still the one in `old`: what the broker has not acknowledged
    is numbered from 1 in it. Returns the names of the new ones, by station. Raises sqlite3.Error.
    """
    begun = {}
    for station, head in old.items():
        row = connection.execute("SELECT stream, acked FROM streams WHERE station = ?", (station,)).fetchone()
        if row is None or row[0] != head.stream:
            continue
        begun[station] = new_stream()
        connection.execute("INSERT INTO former VALUES(?, ?, ?)", (head.stream, station, row[1]))
        connection.execute("UPDATE streams SET stream = ? WHERE station = ?", (begun[station], station))
        _renumber(connection, station, head, begun[station], row[1], tick)
    return begun


def _renumber(
    connection: sqlite3.Connection, station: str, old: Head, stream: str, last: int, tick: Callable[[], None]
) -> None:
    """Rewrite the results above `last` for a new stream. Those that were there at the start may have been told before."""
    query = "SELECT id, seq, body FROM results WHERE station = ? AND seq > ? ORDER BY seq LIMIT ?"
    at, told = last, old.base + old.hi
    while rows := connection.execute(query, (station, at, _AT_ONCE)).fetchall():
        tick()
        for number, at, body in rows:
            moved = moved_result(body, keep_id=at <= told)
            if moved is None:
                connection.execute("DELETE FROM results WHERE id = ?", (number,))
                note_gap(connection, station, at)
                continue
            payload = _numbered(moved, stream, at - last).payload()
            connection.execute("UPDATE results SET body = ? WHERE id = ?", (payload, number))


def moved_result(body: bytes, *, keep_id: bool) -> Result | None:
    """A record that gets another number; `keep_id`: it may be known by its present one. None: it cannot be read."""
    try:
        result = messages.decode(Result, body, "a stored result")
    except SchemaError as error:
        log.error("a stored result cannot be read and is dropped: %s", error)
        return None
    return result.model_copy(update={"former_id": result.former_id or result.result_id}) if keep_id else result
