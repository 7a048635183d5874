"""Triggers on disk: a trigger that comes again is answered; one whose id is another part's gets a record of its own.

What must never be: a part that is told the verdict of another.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from edge_inspector import messages
from edge_inspector.frames import Trigger
from edge_inspector.results import Reason, Result, Verdict

TABLE = """
CREATE TABLE IF NOT EXISTS triggers(id INTEGER PRIMARY KEY, station TEXT NOT NULL, trigger_id TEXT NOT NULL, body TEXT NOT NULL,
  seq INTEGER, asked TEXT, UNIQUE(station, trigger_id));
CREATE INDEX IF NOT EXISTS open_triggers ON triggers(id) WHERE seq IS NULL;
"""


@dataclass(frozen=True)
class Journalled:
    """Answer to a trigger: new, or seen before (with its result once there is one)."""

    new: bool
    result: bytes | None = None
    reused: bool = False
    """Whether its id is another part's: `result` is its own record, stored just now."""


def upgrade(connection: sqlite3.Connection) -> None:
    """Add what the table of an earlier release lacks."""
    if "asked" not in {row[1] for row in connection.execute("PRAGMA table_info(triggers)")}:
        connection.execute("ALTER TABLE triggers ADD COLUMN asked TEXT")


def interrupted(station: str, trigger: Trigger) -> Result:
    """The record of a trigger that no other one is made of."""
    return Result(
        station=station,
        trigger_id=trigger.trigger_id,
        part_id=trigger.part_id,
        product=trigger.product,
        verdict=Verdict.UNDECIDED,
        reason=Reason.INTERRUPTED,
        state="aborted",
        triggered_at=trigger.triggered_at,
        decided_at=trigger.triggered_at,
        expires_at=trigger.expires_at,
    )


def journalled(connection: sqlite3.Connection, record: Result, insert: Callable[[Result, str], Result]) -> Journalled:
    """Note a trigger, by its record in case that it is interrupted. `insert` stores one for that key."""
    asked = _asked(record)
    if _is_noted(connection, record, record.trigger_id, asked):
        return Journalled(new=True)
    before, result = _remembered(connection, record.station, record.trigger_id)
    if before == asked or (before is None and _is_of_part(result, record.part_id)):
        return Journalled(new=False, result=result)
    again = f"{record.trigger_id}\x1f{asked}"  # no trigger id has this character in it
    if not _is_noted(connection, record, again, asked):
        return Journalled(new=False, result=_remembered(connection, record.station, again)[1])
    detail = "its trigger id came before, for another part or product"
    reused = record.model_copy(update={"reason": Reason.TRIGGER_ID_REUSED, "state": "failed", "detail": detail})
    return Journalled(new=False, result=insert(reused, again).payload(), reused=True)


def _asked(record: Result) -> str:
    """What a repetition of a trigger has in common with it, beside its id."""
    return hashlib.blake2b(repr((record.part_id, record.product)).encode(), digest_size=8).hexdigest()


def _is_noted(connection: sqlite3.Connection, record: Result, key: str, asked: str) -> bool:
    """Whether nobody has noted that key before."""
    row = (record.station, key, record.payload().decode(), asked)
    added = connection.execute("INSERT OR IGNORE INTO triggers(station, trigger_id, body, asked) VALUES(?, ?, ?, ?)", row)
    return added.rowcount > 0


def _remembered(connection: sqlite3.Connection, station: str, key: str) -> tuple[str | None, bytes | None]:
    """What a trigger asked for (None: an earlier release did not note it), and its result once there is one."""
    row: tuple[str | None, bytes | None] = connection.execute(
        "SELECT asked, results.body FROM triggers LEFT JOIN results USING(station, seq) WHERE station = ? AND trigger_id = ?",
        (station, key),
    ).fetchone()
    return row


def _is_of_part(result: bytes | None, part_id: str | None) -> bool:
    return result is None or messages.decode(Result, result, "result").part_id == part_id
