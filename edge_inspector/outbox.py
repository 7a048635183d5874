"""Results and triggers on disk: history, sequence numbers, what the broker acknowledged.

One thread, the committer, writes; everybody else hands it work and gets a Future. It commits at once and takes as the
next batch whatever arrived meanwhile, so that one fsync serves all of it (natural group commit). What a Future
resolves for is on disk (WAL, synchronous=FULL) and survives a power cut.

Bounds: the file never grows over the quota; passed results are dropped first, oldest first, and every drop is kept as
a gap. A full disk never wedges it: a ballast file is given up so that there is room to delete.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_inspector import journal, messages
from edge_inspector.errors import OutboxError
from edge_inspector.frames import Trigger, utc_now
from edge_inspector.results import Reason, Result, Verdict
from edge_inspector.threads import Thread

log = logging.getLogger(__name__)

QUEUE = 4096
BATCH = 512
DROP = 256
TRIGGER_BYTES = 256
"""About what a remembered trigger id costs; a quarter of the quota may go to them."""
BALLAST_BYTES = 1 << 20
PAGE = 4096
_FULL_ABOVE = 0.8
"""Share of the quota above which results are dropped; the rest has room for a batch."""
_DROPS_AT_ONCE = 8
_IDLE_S = 0.5
_TABLES = """
CREATE TABLE IF NOT EXISTS streams(station TEXT PRIMARY KEY, stream TEXT NOT NULL, next INTEGER NOT NULL,
  acked INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS results(id INTEGER PRIMARY KEY, station TEXT NOT NULL, seq INTEGER NOT NULL, verdict TEXT NOT NULL,
  body BLOB NOT NULL, UNIQUE(station, seq));
CREATE INDEX IF NOT EXISTS passed ON results(id) WHERE verdict = 'pass';
CREATE TABLE IF NOT EXISTS gaps(station TEXT NOT NULL, lo INTEGER NOT NULL, hi INTEGER NOT NULL, PRIMARY KEY(station, lo));
"""


@dataclass(frozen=True)
class Head:
    """What is kept of one station's stream."""

    stream: str
    lo: int
    hi: int
    acked: int


@dataclass
class Counts:
    """What health tells of the outbox."""

    pending: int = 0
    used: float = 0.0
    dropped: int = 0
    """By the quota: history, as it must be."""
    dropped_unsent: int = 0
    """Of these, before the broker acknowledged them."""
    refused: int = 0
    failing: str = ""


@dataclass
class _Work:
    apply: Callable[[sqlite3.Connection], Any]
    done: Future[Any] = field(default_factory=Future)


def _resolve(future: Future[Any], value: object = None, error: Exception | None = None) -> None:
    with contextlib.suppress(InvalidStateError):  # its owner gave up waiting
        future.set_exception(error) if error else future.set_result(value)


def stored_result(path: Path, result_id: str) -> bytes | None:
    """The record with this id (STREAM-SEQ), read beside whoever writes the file. Raises OutboxError."""
    stream, _, seq = result_id.rpartition("-")
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=2.0)) as connection:
            row = connection.execute(
                "SELECT body FROM results JOIN streams USING(station) WHERE stream = ? AND seq = ?",
                (stream, int(seq) if seq.isdecimal() else 0),
            ).fetchone()
    except sqlite3.Error as error:
        raise OutboxError(f"{path}: {error}", hint="is that the device's state, and may you read it?") from error
    return bytes(row[0]) if row else None


class Outbox:
    """The results of all stations of one device, in one SQLite file. Use as a context manager."""

    def __init__(
        self, folder: Path, stations: Iterable[str], *, quota_mb: int = 256, tick: Callable[[], None] = lambda: None
    ) -> None:
        """`tick` is called at least once a second by the committer while it is alive."""
        self.path = folder / "outbox.db"
        self.stations = tuple(stations)
        self.counts = Counts()
        self.failure: Exception | None = None
        self._tick = tick
        self._wal_bytes = min(4 << 20, (quota_mb << 20) // 4)
        self._max_pages = ((quota_mb << 20) - self._wal_bytes) // PAGE
        self._triggers_kept = self._max_pages * PAGE // 4 // TRIGGER_BYTES
        self._ballast = folder / "ballast"
        self._work: queue.Queue[_Work | None] = queue.Queue(QUEUE)
        self._acked: dict[str, int] = {}
        self._acks_dirty = False
        self._heads: dict[str, Head] = {}
        self._closing = threading.Event()
        self._reading = threading.Lock()
        self._listeners: list[Callable[[], None]] = []
        self._thread = Thread(target=self._run, name="outbox-committer", daemon=True)

    # --- life

    def __enter__(self) -> Outbox:
        """Open or create the file; give every trigger that a crash interrupted its result. Raises OutboxError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._opened()
            self._reader = self._connect("NORMAL")
        except (OSError, sqlite3.Error) as error:
            raise OutboxError(f"{self.path}: {error}", hint="check the state folder's permissions and free space") from error
        self._keep_ballast()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Commit what was handed in (within two seconds) and close."""
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._work.put_nowait(None)
        self._thread.join(2.0)
        if self._thread.is_alive():
            return  # a stuck disk: the process ends without it, what was not accepted was not promised
        with self._reading:
            self._reader.close()
        self._writer.close()

    def _connect(self, synchronous: str) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=2.0, isolation_level=None, check_same_thread=False)
        connection.execute(f"PRAGMA page_size={PAGE}")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        return connection

    def _opened(self) -> sqlite3.Connection:
        try:
            return self._prepared()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:  # not a database, or malformed: keep it for a person, start anew
            aside = self.path.with_name(f"outbox.damaged-{int(time.time())}.db")
            log.error("%s is damaged (%s): set aside as %s, a new stream begins", self.path, error, aside.name)
            for suffix in ("", "-wal", "-shm"):
                part = Path(f"{self.path}{suffix}")
                if part.exists():
                    part.rename(f"{aside}{suffix}")
            return self._prepared()

    def _prepared(self) -> sqlite3.Connection:
        connection = self._connect("FULL")
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute(f"PRAGMA journal_size_limit={self._wal_bytes}")
        connection.execute(f"PRAGMA max_page_count={self._max_pages}")
        connection.executescript(_TABLES + journal.TABLE)
        journal.upgrade(connection)
        connection.execute("BEGIN IMMEDIATE")
        for station in self.stations:
            new = (station, secrets.token_hex(4), 1, 0)
            connection.execute("INSERT OR IGNORE INTO streams VALUES(?, ?, ?, ?)", new)
        self._finish_interrupted(connection)
        connection.execute("COMMIT")
        self._acked = dict(connection.execute("SELECT station, acked FROM streams").fetchall())
        # Stations of an earlier configuration whose results the broker does not have yet go on being sent.
        unsent = connection.execute("SELECT station FROM streams WHERE acked < next - 1").fetchall()
        self.stations = tuple(dict.fromkeys([*self.stations, *(row[0] for row in unsent)]))
        self._note_heads(connection)
        return connection

    def _finish_interrupted(self, connection: sqlite3.Connection) -> None:
        rows = connection.execute("SELECT station, trigger_id, body FROM triggers WHERE seq IS NULL ORDER BY id")
        for station, trigger_id, body in rows.fetchall():
            result = messages.decode(Result, body.encode(), trigger_id).model_copy(update={"decided_at": utc_now()})
            self._insert(connection, result)
            log.warning("trigger %s of station %s was interrupted by a restart: undecided", trigger_id, station)

    # --- what others hand in

    def submit(self, result: Result, *, expires_s: float | None = None) -> Future[Result]:
        """Hand a result to the committer. The Future gives it back with its id, stream and seq once it is on disk.

        A `pass` that reaches the disk after `expires_s` (monotonic) is stored as `undecided: late`.
        Raises OutboxError when the queue is full.
        """

        def apply(connection: sqlite3.Connection) -> Result:
            late = expires_s is not None and time.monotonic() > expires_s
            if late and result.verdict is Verdict.PASS:
                return self._insert(connection, result.model_copy(update={"verdict": Verdict.UNDECIDED, "reason": Reason.LATE}))
            return self._insert(connection, result)

        return self._hand_in(apply)

    def append(self, result: Result, timeout_s: float = 10.0) -> Result:
        """Store a result; when this returns it is accepted and will not be lost. Raises OutboxError."""
        return self._awaited(self.submit(result), timeout_s)

    def journal(self, station: str, trigger: Trigger) -> Future[journal.Journalled]:
        """Write a trigger down before it is acted on, so that it gets a result whatever happens."""
        record = journal.interrupted(station, trigger)

        def apply(connection: sqlite3.Connection) -> journal.Journalled:
            return journal.journalled(connection, record, lambda result, key: self._insert(connection, result, key=key))

        return self._hand_in(apply)

    def _hand_in(self, apply: Callable[[sqlite3.Connection], Any]) -> Future[Any]:
        work = _Work(apply)
        if self._closing.is_set() or self.failure is not None:
            raise OutboxError(f"{self.path}: closed", hint="see the log for what ended it")
        try:
            self._work.put_nowait(work)
        except queue.Full as error:
            self.counts.refused += 1
            raise OutboxError(f"{self.path}: {QUEUE} results wait for the disk", hint="is the disk full or slow?") from error
        return work.done

    def _awaited(self, future: Future[Result], timeout_s: float) -> Result:
        try:
            return future.result(timeout_s)
        except FutureTimeout as error:
            raise OutboxError(f"{self.path}: not committed within {timeout_s} s") from error

    def acknowledged(self, station: str, seq: int) -> None:
        """The broker has everything up to `seq`. Kept on disk within a second; a crash before only resends."""
        if seq > self._acked.get(station, 0):
            self._acked[station] = seq
            self._acks_dirty = True

    def on_commit(self, listener: Callable[[], None]) -> None:
        """Call `listener` (from the committer; it must not block) after every commit that stored results."""
        self._listeners.append(listener)

    # --- what others read

    def head(self, station: str) -> Head:
        """The range kept of a station's stream."""
        head = self._heads[station]
        return Head(head.stream, head.lo, head.hi, self._acked.get(station, 0))

    def results(self, station: str, lo: int, hi: int, limit: int) -> list[tuple[int, bytes]]:
        """Stored results lo..hi in order, at most `limit`: (seq, payload)."""
        with self._reading:
            return self._reader.execute(
                "SELECT seq, body FROM results WHERE station = ? AND seq BETWEEN ? AND ? ORDER BY seq LIMIT ?",
                (station, lo, hi, limit),
            ).fetchall()

    def gaps(self, station: str, lo: int, hi: int, limit: int) -> list[tuple[int, int]]:
        """Ranges within lo..hi that a quota dropped: the newest `limit`, in order."""
        with self._reading:
            rows = self._reader.execute(
                "SELECT lo, hi FROM gaps WHERE station = ? AND hi >= ? AND lo <= ? ORDER BY lo DESC LIMIT ?",
                (station, lo, hi, limit),
            ).fetchall()
        return [(max(lo, a), min(hi, b)) for a, b in reversed(rows)]

    def gap_count(self, station: str, lo: int, hi: int) -> int:
        """How many ranges within lo..hi a quota dropped."""
        with self._reading:
            row = self._reader.execute(
                "SELECT COUNT(*) FROM gaps WHERE station = ? AND hi >= ? AND lo <= ?", (station, lo, hi)
            ).fetchone()
        return int(row[0])

    # --- the committer

    def _run(self) -> None:
        try:
            while not (self._closing.is_set() and self._work.empty()):
                self._tick()
                batch = self._next_batch()
                if batch or self._acks_dirty:
                    self._commit(batch)
                else:
                    self._checkpoint("PASSIVE")
                    self._keep_ballast()
            self._commit([])
            self._checkpoint("TRUNCATE")
        except Exception as error:
            log.exception("outbox committer ended")
            self.failure = error

    def _next_batch(self) -> list[_Work]:
        batch: list[_Work] = []
        try:
            item = self._work.get(timeout=_IDLE_S)
            while len(batch) < BATCH:
                if item is not None:
                    batch.append(item)
                item = self._work.get_nowait()
            if item is not None:
                batch.append(item)
        except queue.Empty:
            pass
        return batch

    def _commit(self, batch: list[_Work]) -> None:
        """Commit a batch, whatever it takes: on a full or failing disk make room, wait, try again."""
        wait_s = 0.05
        while True:
            try:
                values = self._transaction(batch)
                break
            except sqlite3.OperationalError as error:
                self._rolled_back()
                if self.counts.failing != str(error):
                    log.error("%s: %s; results wait in memory until it can be written again", self.path, error)
                self.counts.failing = str(error)
                if self._closing.is_set():
                    for work in batch:
                        _resolve(work.done, error=OutboxError(f"{self.path}: {error}"))
                    return
                if "full" in str(error):
                    self._ballast.unlink(missing_ok=True)
                    self._make_room()
            self._tick()
            self._closing.wait(wait_s)
            wait_s = min(wait_s * 2, 0.5)
        self.counts.failing = ""
        self._note_heads(self._writer)
        for work, value in zip(batch, values, strict=True):
            _resolve(work.done, value)
        if batch:
            for listener in self._listeners:
                listener()
        self._after_commit()

    def _transaction(self, batch: list[_Work]) -> list[Any]:
        self._writer.execute("BEGIN IMMEDIATE")
        values = [work.apply(self._writer) for work in batch]
        if self._acks_dirty:
            self._acks_dirty = False
            acks = [(seq, station) for station, seq in self._acked.items()]
            self._writer.executemany("UPDATE streams SET acked = ? WHERE station = ?", acks)
        self._writer.execute("COMMIT")
        return values

    def _rolled_back(self) -> None:
        self._acks_dirty = True
        if self._writer.in_transaction:
            with contextlib.suppress(sqlite3.OperationalError):
                self._writer.execute("ROLLBACK")

    def _insert(self, connection: sqlite3.Connection, result: Result, *, key: str | None = None) -> Result:
        """Number and store a result. `key`: of its trigger in the journal, where that is not its id."""
        row = connection.execute("SELECT stream, next FROM streams WHERE station = ?", (result.station,)).fetchone()
        if row is None:  # a station of an earlier configuration, finishing an interrupted trigger
            row = (secrets.token_hex(4), 1)
            connection.execute("INSERT INTO streams VALUES(?, ?, ?, 0)", (result.station, *row))
        stream, seq = row
        stored = result.model_copy(update={"result_id": f"{stream}-{seq}", "stream": stream, "seq": seq})
        connection.execute(
            "INSERT INTO results(station, seq, verdict, body) VALUES(?, ?, ?, ?)",
            (result.station, seq, result.verdict.value, stored.payload()),
        )
        connection.execute("UPDATE streams SET next = ? WHERE station = ?", (seq + 1, result.station))
        connection.execute(
            "UPDATE triggers SET seq = ?, body = '' WHERE station = ? AND trigger_id = ?",
            (seq, result.station, key or result.trigger_id),
        )
        return stored

    def _note_heads(self, connection: sqlite3.Connection) -> None:
        heads = {}
        for station, stream, upcoming in connection.execute("SELECT station, stream, next FROM streams").fetchall():
            lowest = connection.execute("SELECT MIN(seq) FROM results WHERE station = ?", (station,)).fetchone()[0]
            heads[station] = Head(stream, lowest or upcoming, upcoming - 1, 0)
        self._heads = heads
        self.counts.pending = sum(head.hi - min(self._acked.get(s, 0), head.hi) for s, head in heads.items())

    def _after_commit(self) -> None:
        self._note_use()
        for _ in range(_DROPS_AT_ONCE):
            if self.counts.used <= _FULL_ABOVE:
                break
            self._make_room()
            self._note_use()
        wal = Path(f"{self.path}-wal")
        if wal.exists() and wal.stat().st_size > self._wal_bytes:
            self._checkpoint("RESTART")

    def _note_use(self) -> None:
        pages = self._writer.execute("PRAGMA page_count").fetchone()[0]
        free = self._writer.execute("PRAGMA freelist_count").fetchone()[0]
        self.counts.used = (pages - free) / self._max_pages

    def _checkpoint(self, mode: str) -> None:
        with contextlib.suppress(sqlite3.OperationalError):  # busy or full: the next one will do
            self._writer.execute(f"PRAGMA wal_checkpoint({mode})")

    # --- bounds

    def _make_room(self) -> None:
        """Drop the oldest passed results, then the oldest others; every drop becomes a gap."""
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            rows = self._writer.execute(
                "SELECT id, station, seq FROM results WHERE verdict = 'pass' ORDER BY id LIMIT ?", (DROP,)
            ).fetchall()
            if not rows:
                rows = self._writer.execute("SELECT id, station, seq FROM results ORDER BY id LIMIT ?", (DROP,)).fetchall()
            self._writer.executemany("DELETE FROM results WHERE id = ?", [(row[0],) for row in rows])
            for _, station, seq in rows:
                self._note_gap(station, seq)
            self._writer.execute(
                "DELETE FROM triggers WHERE seq IS NOT NULL AND id <= (SELECT MAX(id) FROM triggers) - ?",
                (self._triggers_kept,),
            )
            self._writer.execute("COMMIT")
            self.counts.dropped += len(rows)
            self.counts.dropped_unsent += sum(seq > self._acked.get(station, 0) for _, station, seq in rows)
            self._note_heads(self._writer)
        except sqlite3.OperationalError:
            self._rolled_back()
        self._checkpoint("RESTART")

    def _note_gap(self, station: str, seq: int) -> None:
        lo = hi = seq
        below = self._writer.execute(
            "SELECT lo, hi FROM gaps WHERE station = ? AND lo < ? ORDER BY lo DESC LIMIT 1", (station, seq)
        ).fetchone()
        above = self._writer.execute("SELECT hi FROM gaps WHERE station = ? AND lo = ?", (station, seq + 1)).fetchone()
        if above:
            hi = above[0]
            self._writer.execute("DELETE FROM gaps WHERE station = ? AND lo = ?", (station, seq + 1))
        if below and below[1] == seq - 1:
            lo = below[0]
        self._writer.execute("INSERT OR REPLACE INTO gaps VALUES(?, ?, ?)", (station, lo, hi))

    def _keep_ballast(self) -> None:
        if self._ballast.exists() or shutil.disk_usage(self._ballast.parent).free < 4 * BALLAST_BYTES:
            return
        try:
            with self._ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, BALLAST_BYTES)
        except OSError:
            self._ballast.unlink(missing_ok=True)
