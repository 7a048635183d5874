"""Results and triggers on disk: history, sequence numbers, what the broker acknowledged.

One thread, the committer, writes; everybody else hands it work and gets a Future. It commits at once and takes as the
next batch whatever arrived meanwhile, so that one fsync serves all of it (natural group commit). What a Future
resolves for is on disk (WAL, synchronous=FULL) and survives a power cut.

Bounds: the file never grows over the quota; passed results are dropped first, oldest first, and every drop is kept as
a gap. A full disk never wedges it: a ballast file is given up so that there is room to delete. A damaged file does not
either: what can be read of it goes into a new one, in new streams, and the line goes on.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_inspector import database, journal, salvage, streams
from edge_inspector.database import closed, connected, is_damage
from edge_inspector.errors import OutboxError
from edge_inspector.frames import Trigger
from edge_inspector.history import History
from edge_inspector.quota import FULL_ABOVE, Quota
from edge_inspector.results import Reason, Result, Verdict
from edge_inspector.salvage import Salvage
from edge_inspector.streams import Head, Origin
from edge_inspector.threads import Thread
from edge_inspector.work import Work, WorkQueue

log = logging.getLogger(__name__)

QUEUE = 4096
_DROPS_AT_ONCE = 8
_IDLE_S = 0.5
_LOOK_AGAIN_S = 10.0
"""A disk that fails for so long is asked whether it can read the file at all."""


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
    damaged: Path | None = None
    """A damaged file of results that was set aside."""
    salvaged: str = ""
    """What was taken over from it, if that was since the start."""


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
        self.origin = Origin({}, 0, 0)
        self.generation = 0
        """Another one once results were numbered anew: what was sent before that counts no more."""
        self._tick = tick
        self._quota = Quota(folder, quota_mb)
        self._work = WorkQueue(QUEUE)
        self._acked: dict[str, int] = {}
        """By station, in the numbers on the disk."""
        self._acks_dirty = False
        self._acking = threading.Lock()
        self._heads: dict[str, Head] = {}
        self._closing = threading.Event()
        self._history = History(self.path, self._work.wake)
        self._looked_s = 0.0
        self._listeners: list[Callable[[], None]] = []
        self._thread = Thread(target=self._run, name="outbox-committer", daemon=True)

    # --- life

    def __enter__(self) -> Outbox:
        """Open or create the file; give every trigger that a crash interrupted its result. Raises OutboxError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            salvage.finish_replacing(self.path)
            self._writer = self._opened()
            self._history.open()
        except (OSError, sqlite3.Error) as error:
            raise OutboxError(f"{self.path}: {error}", hint="check the state folder's permissions and free space") from error
        self.counts.damaged = salvage.aside_of(self.path.parent)
        self._quota.keep_ballast()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Commit what was handed in (within two seconds) and close."""
        self._closing.set()
        self._work.wake()
        self._thread.join(2.0)
        if self._thread.is_alive():
            return  # a stuck disk: the process ends without it, what was not accepted was not promised
        self._history.close()
        closed(self._writer)

    def _opened(self) -> sqlite3.Connection:
        try:
            return self._prepared(starting=True)
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            return self._replaced(str(error), starting=True)

    def _prepared(self, *, starting: bool) -> sqlite3.Connection:
        connection = connected(self.path, "FULL")
        try:
            self._bind(connection)
            if not database.fact(connection, "clean") and (fault := database.fault_of(connection)):
                raise sqlite3.DatabaseError(fault)
            self._begin(connection, starting=starting)
        except BaseException:
            closed(connection)
            raise
        return connection

    def _bind(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA wal_autocheckpoint=0")
        self._quota.bind(connection)
        database.make_tables(connection)

    def _begin(self, connection: sqlite3.Connection, *, starting: bool) -> None:
        """Begin another life of the file. Triggers are interrupted only by a start, not where the file was replaced."""
        connection.execute("BEGIN IMMEDIATE")
        origin = streams.begin_life(connection, self.stations)
        if starting:
            streams.finish_interrupted(connection)
        connection.execute("COMMIT")
        self.origin = origin
        self._acked = dict(connection.execute("SELECT station, acked FROM streams").fetchall())
        # Stations of an earlier configuration whose results the broker does not have yet go on being sent.
        unsent = connection.execute("SELECT station FROM streams WHERE acked < next - 1").fetchall()
        self.stations = tuple(dict.fromkeys([*self.stations, *(row[0] for row in unsent)]))
        self._note_heads(connection)

    # --- a damaged file

    def _renew(self, error: Exception) -> None:
        """The file has shown to be damaged: go on with a new one. Raises OSError, sqlite3.Error."""
        self._history.close()
        closed(self._writer)
        self._writer = self._replaced(str(error), starting=False)
        self._history.open()

    def _replaced(self, why: str, *, starting: bool) -> sqlite3.Connection:
        """Set the file aside, go on with what can be read of it, in new streams. Raises OSError, sqlite3.Error."""
        log.error("%s is damaged (%s): new streams begin in a new file", self.path, why)
        try:
            bases = {head.stream: head.base for head in self._heads.values()}
            old = Salvage(self.path, self._tick, dict(self._acked), bases=bases)
            self.counts.salvaged = salvage.take_over(old, salvage.fresh_path(self.path), self._quota, self.stations)
        except (OSError, sqlite3.Error) as error:
            self.counts.salvaged = f"nothing can be read of it: {error}"
            salvage.fresh_path(self.path).unlink(missing_ok=True)
        self.counts.damaged = salvage.replace(self.path)
        with self._acking:  # from here on nothing counts that was sent before
            self.generation += 1
            self._acked, self._acks_dirty = {}, False
        connection = self._prepared(starting=starting)
        self.generation += 1  # once more, for who has looked at the old numbers meanwhile
        self.origin = Origin({}, 0, self.origin.life)
        log.error("%s was set aside as %s; %s", self.path, self.counts.damaged.name, self.counts.salvaged)
        return connection

    # --- what others hand in

    def submit(self, result: Result, *, expires_s: float | None = None) -> Future[Result]:
        """Hand a result to the committer. The Future gives it back with its id, stream and seq once it is on disk.

        A `pass` that reaches the disk after `expires_s` (monotonic) is stored as `undecided: late`.
        Raises OutboxError when the queue is full.
        """

        def apply(connection: sqlite3.Connection) -> Result:
            late = expires_s is not None and time.monotonic() > expires_s
            if late and result.verdict is Verdict.PASS:
                changes = {"verdict": Verdict.UNDECIDED, "reason": Reason.LATE}
                return streams.insert(connection, result.model_copy(update=changes))
            return streams.insert(connection, result)

        return self._hand_in(apply)

    def append(self, result: Result, timeout_s: float = 10.0) -> Result:
        """Store a result; when this returns it is accepted and will not be lost. Raises OutboxError."""
        try:
            return self.submit(result).result(timeout_s)
        except FutureTimeout as error:
            raise OutboxError(f"{self.path}: not committed within {timeout_s} s") from error

    def journal(self, station: str, trigger: Trigger) -> Future[journal.Journalled]:
        """Write a trigger down before it is acted on, so that it gets a result whatever happens."""
        record = journal.interrupted(station, trigger)

        def apply(connection: sqlite3.Connection) -> journal.Journalled:
            return journal.journalled(connection, record, lambda result, key: streams.insert(connection, result, key=key))

        return self._hand_in(apply)

    def _hand_in(self, apply: Callable[[sqlite3.Connection], Any], *, renews: bool = False) -> Future[Any]:
        work = Work(apply, renews)
        if self._closing.is_set() or self.failure is not None:
            raise OutboxError(f"{self.path}: closed", hint="see the log for what ended it")
        try:
            self._work.put(work)
        except queue.Full as error:
            self.counts.refused += 1
            raise OutboxError(f"{self.path}: {QUEUE} results wait for the disk", hint="is the disk full or slow?") from error
        return work.done

    def acknowledged(self, station: str, seq: int, generation: int = 0) -> None:
        """The broker has everything up to `seq`. Kept on disk within a second; a crash before only resends.

        `generation`: in force when it was sent. What was numbered anew since is not acknowledged by it.
        """
        with self._acking:
            number = seq + self._heads[station].base
            if generation == self.generation and number > self._acked.get(station, 0):
                self._acked[station] = number
                self._acks_dirty = True

    def begin_anew(self) -> Future[dict[str, str]]:
        """Begin a new stream for each one that was there at the start, since this file is an older copy: what the broker
        does not have yet is numbered anew. Raises OutboxError.
        """
        return self._hand_in(lambda connection: streams.begin_anew(connection, self.origin.streams, self._tick), renews=True)

    def on_commit(self, listener: Callable[[], None]) -> None:
        """Call `listener` (from the committer; it must not block) after every commit that stored results."""
        self._listeners.append(listener)

    # --- what others read

    def head(self, station: str) -> Head:
        """The range kept of a station's stream."""
        head = self._heads[station]
        return replace(head, acked=max(0, self._acked.get(station, 0) - head.base))

    def results(self, station: str, lo: int, hi: int, limit: int) -> list[tuple[int, bytes]]:
        """Stored results lo..hi in order, at most `limit`: (seq, payload). Nothing while a damaged file is replaced."""
        return self._history.results(station, self._heads[station].base, (lo, hi), limit)

    def gaps(self, station: str, lo: int, hi: int, limit: int) -> list[tuple[int, int]]:
        """Ranges within lo..hi that a quota dropped: the newest `limit`, in order."""
        return self._history.gaps(station, self._heads[station].base, (lo, hi), limit)

    def gap_count(self, station: str, lo: int, hi: int) -> int:
        """How many ranges within lo..hi a quota dropped."""
        return self._history.gap_count(station, self._heads[station].base, (lo, hi))

    # --- the committer

    def _run(self) -> None:
        try:
            while not (self._closing.is_set() and self._work.empty()):
                self._tick()
                try:
                    self._step()
                except sqlite3.Error as error:
                    if not is_damage(error):
                        raise
                    self._renew(error)
            self._commit([])
            self._end_cleanly()
        except Exception as error:
            log.exception("outbox committer ended")
            self.failure = error

    def _step(self) -> None:
        batch = self._work.next_batch(_IDLE_S)
        self._judge_read_fault()
        if batch or self._acks_dirty:
            self._commit(batch)
        else:
            self._checkpoint("PASSIVE")
            self._quota.keep_ballast()

    def _end_cleanly(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # then the next start checks the file
            database.remember(self._writer, "clean", 1)
            self._checkpoint("TRUNCATE")

    def _judge_read_fault(self) -> None:
        """What could not be read by somebody else: it is damaged, or it will be tried again."""
        error, self._history.fault = self._history.fault, None
        if error is None:
            return
        if is_damage(error) or self._cannot_be_read(error):
            self._renew(error)
        else:
            log.warning("%s: %s", self.path, error)

    def _cannot_be_read(self, error: sqlite3.Error) -> bool:
        """Whether an error of the disk is one for good. Looked at now and then: it reads the whole file."""
        now_s = time.monotonic()
        if "I/O" not in str(error) or now_s - self._looked_s < _LOOK_AGAIN_S:
            return False
        self._looked_s = now_s
        return database.is_unreadable(self.path)

    def _commit(self, batch: list[Work]) -> None:
        """Commit a batch, whatever it takes: on a full or failing disk make room, wait, try again."""
        renewed = False
        for tries in count():
            try:
                values = self._transaction(batch)
                break
            except sqlite3.Error as error:
                self._rolled_back()
                damaged = is_damage(error) or self._cannot_be_read(error)
                if damaged and renewed:
                    raise
                if damaged:
                    renewed = True
                    self._renew(error)
                    continue
                self._note_failure(error)
                if self._closing.is_set():
                    for work in batch:
                        work.fail(OutboxError(f"{self.path}: {error}"))
                    return
            self._tick()
            self._closing.wait(min(0.05 * 2**tries, 0.5))
        self.counts.failing = ""
        self._committed(batch, values)
        self._after_commit()

    def _note_failure(self, error: sqlite3.Error) -> None:
        """Remember why nothing can be written, and make room where the disk is full. Raises what no waiting mends."""
        if not isinstance(error, sqlite3.OperationalError):
            raise error
        if self.counts.failing != str(error):
            log.error("%s: %s; results wait in memory until it can be written again", self.path, error)
        self.counts.failing = str(error)
        if "full" in str(error):
            self._quota.give_up_ballast()
            self._make_room()

    def _committed(self, batch: list[Work], values: list[Any]) -> None:
        try:
            self._note_heads(self._writer)
            self.generation += any(work.renews for work in batch)
        finally:  # what is on the disk is promised, whatever else is found out
            for work, value in zip(batch, values, strict=True):
                work.resolve(value)
        if batch:
            for listener in self._listeners:
                listener()

    def _transaction(self, batch: list[Work]) -> list[Any]:
        self._writer.execute("BEGIN IMMEDIATE")
        values = [work.apply(self._writer) for work in batch]
        if self._acks_dirty:
            self._acks_dirty = False
            acks = [(seq, station) for station, seq in self._acked.copy().items()]
            self._writer.executemany("UPDATE streams SET acked = ? WHERE station = ?", acks)
        self._writer.execute("COMMIT")
        return values

    def _rolled_back(self) -> None:
        self._acks_dirty = True
        if self._writer.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")

    def _note_heads(self, connection: sqlite3.Connection) -> None:
        self._heads = streams.heads(connection)
        self.counts.pending = sum(
            head.hi - min(self._acked.get(station, 0) - head.base, head.hi) for station, head in self._heads.items()
        )

    def _after_commit(self) -> None:
        self.counts.used = self._quota.used(self._writer)
        for _ in range(_DROPS_AT_ONCE):
            if self.counts.used <= FULL_ABOVE:
                break
            self._make_room()
            self.counts.used = self._quota.used(self._writer)
        log_file = Path(f"{self.path}-wal")
        if log_file.exists() and log_file.stat().st_size > self._quota.log_bytes:
            self._checkpoint("RESTART")

    def _checkpoint(self, mode: str) -> None:
        with contextlib.suppress(sqlite3.OperationalError):  # busy or full: the next one will do
            self._writer.execute(f"PRAGMA wal_checkpoint({mode})")

    def _make_room(self) -> None:
        """Drop what the quota lets go first; every drop becomes a gap."""
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            dropped = self._quota.drop(self._writer)
            self._writer.execute("COMMIT")
            self.counts.dropped += len(dropped)
            self.counts.dropped_unsent += sum(seq > self._acked.get(station, 0) for station, seq in dropped)
            self._note_heads(self._writer)
        except sqlite3.OperationalError:
            self._rolled_back()
        self._checkpoint("RESTART")
