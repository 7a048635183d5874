"""The SQLite file of results: how it is opened, what it remembers of itself, whether it is sound."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from pathlib import Path

from edge_inspector import journal
from edge_inspector.quota import PAGE
from edge_inspector.threads import Thread

log = logging.getLogger(__name__)

CHECK_S = 5.0
"""A start waits no longer than this for the check of a file; what it did not reach is found when it is used."""
_AGAIN_S = 0.02
_TABLES = """
CREATE TABLE IF NOT EXISTS streams(station TEXT PRIMARY KEY, stream TEXT NOT NULL, next INTEGER NOT NULL,
  acked INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS results(id INTEGER PRIMARY KEY, station TEXT NOT NULL, seq INTEGER NOT NULL, verdict TEXT NOT NULL,
  body BLOB NOT NULL, UNIQUE(station, seq));
CREATE INDEX IF NOT EXISTS passed ON results(id) WHERE verdict = 'pass';
CREATE TABLE IF NOT EXISTS gaps(station TEXT NOT NULL, lo INTEGER NOT NULL, hi INTEGER NOT NULL, PRIMARY KEY(station, lo));
CREATE TABLE IF NOT EXISTS former(stream TEXT PRIMARY KEY, station TEXT NOT NULL, last INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS facts(name TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""


def connected(path: Path, synchronous: str) -> sqlite3.Connection:
    """A connection for more than one thread; transactions are begun by hand. Raises sqlite3.Error."""
    connection = sqlite3.connect(path, timeout=2.0, isolation_level=None, check_same_thread=False)
    connection.text_factory = lambda data: data.decode(errors="replace")  # a damaged name must not end a start
    connection.execute(f"PRAGMA page_size={PAGE}")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(f"PRAGMA synchronous={synchronous}")
    return connection


def closed(connection: sqlite3.Connection) -> None:
    """Close a connection, whatever state its file and its disk are in."""
    with contextlib.suppress(sqlite3.Error):
        connection.close()


def read_only(path: Path) -> sqlite3.Connection:
    """A connection beside whoever writes the file. Raises sqlite3.Error."""
    address = f"{path.resolve().as_uri()}?mode=ro"  # a folder's name may hold '#', '?' and '%'
    return sqlite3.connect(address, uri=True, timeout=2.0)


def make_tables(connection: sqlite3.Connection) -> None:
    """Create what is not there yet. Raises sqlite3.Error."""
    connection.executescript(_TABLES + journal.TABLE)
    journal.upgrade(connection)


def fact(connection: sqlite3.Connection, name: str) -> int:
    """A number that the file remembers, 0 at first. Raises sqlite3.Error."""
    row = connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return int(row[0]) if row else 0


def remember(connection: sqlite3.Connection, name: str, value: int) -> None:
    """Keep a number. Raises sqlite3.Error."""
    connection.execute("INSERT OR REPLACE INTO facts VALUES(?, ?)", (name, value))


def is_damage(error: Exception) -> bool:
    """Whether an error says that the file is damaged, not that the disk is full, busy or failing for a while."""
    if isinstance(error, sqlite3.OperationalError):
        return str(error).startswith(("no such table", "no such column", "malformed"))
    return type(error) is sqlite3.DatabaseError or isinstance(error, (sqlite3.IntegrityError, sqlite3.InternalError))


def is_unreadable(path: Path) -> bool:
    """Whether the disk refuses to read some of the file."""
    try:
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass
    except OSError:
        return True
    return False


def fault_of(connection: sqlite3.Connection, limit_s: float = CHECK_S) -> str:
    """What is wrong with the structure of the file; empty where nothing was found within `limit_s`."""
    done = threading.Event()

    def limit() -> None:
        wait_s = limit_s
        while not done.wait(wait_s):  # again, for a check that had not begun yet
            connection.interrupt()
            wait_s = _AGAIN_S

    watcher = Thread(target=limit, name="outbox-check", daemon=True)
    watcher.start()
    try:
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.OperationalError as error:
        log.warning("the check of the results' file ended before its end: %s", error)
        return ""
    finally:
        done.set()
        watcher.join()
    return "" if found == "ok" else str(found).replace("\n", ": ")
