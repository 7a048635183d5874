"""What the results may take of the disk: the oldest passed ones go first, and every one that goes is kept as a gap."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

PAGE = 4096
DROP = 256
TRIGGER_BYTES = 256
"""About what a remembered trigger id costs; a quarter of the quota may go to them."""
BALLAST_BYTES = 1 << 20
FULL_ABOVE = 0.8
"""Share of the quota above which results are dropped; the rest has room for a batch."""
_LARGEST_LOG = 4 << 20


class Quota:
    """The bounds of one outbox, and its ballast: a file that is given up where the disk is full."""

    def __init__(self, folder: Path, quota_mb: int) -> None:
        """Nothing is looked at yet."""
        quota = quota_mb << 20
        self.log_bytes = min(_LARGEST_LOG, quota // 4)
        """The most that the write-ahead log should take."""
        self._pages = (quota - self.log_bytes) // PAGE
        self._triggers = self._pages * PAGE // 4 // TRIGGER_BYTES
        self._ballast = folder / "ballast"

    def bind(self, connection: sqlite3.Connection) -> None:
        """Bound the file that a connection writes. Raises sqlite3.Error."""
        connection.execute(f"PRAGMA journal_size_limit={self.log_bytes}")
        connection.execute(f"PRAGMA max_page_count={self._pages}")

    def used(self, connection: sqlite3.Connection) -> float:
        """Share of the quota in use. Raises sqlite3.Error."""
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        free = connection.execute("PRAGMA freelist_count").fetchone()[0]
        return float((pages - free) / self._pages)

    def drop(self, connection: sqlite3.Connection) -> list[tuple[str, int]]:
        """Drop the oldest passed results, where there are none the oldest others, within a transaction.

        Returns station and number of each. Raises sqlite3.Error.
        """
        passed = "SELECT id, station, seq FROM results WHERE verdict = 'pass' ORDER BY id LIMIT ?"
        rows = connection.execute(passed, (DROP,)).fetchall()
        if not rows:
            rows = connection.execute("SELECT id, station, seq FROM results ORDER BY id LIMIT ?", (DROP,)).fetchall()
        connection.executemany("DELETE FROM results WHERE id = ?", [(row[0],) for row in rows])
        for _, station, seq in rows:
            note_gap(connection, station, seq)
        connection.execute(
            "DELETE FROM triggers WHERE seq IS NOT NULL AND id <= (SELECT MAX(id) FROM triggers) - ?", (self._triggers,)
        )
        return [(station, seq) for _, station, seq in rows]

    def keep_ballast(self) -> None:
        """Have the ballast again, where the disk has room for it."""
        if self._ballast.exists() or shutil.disk_usage(self._ballast.parent).free < 4 * BALLAST_BYTES:
            return
        try:
            with self._ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, BALLAST_BYTES)
        except OSError:
            self.give_up_ballast()

    def give_up_ballast(self) -> None:
        """Make room to delete results in."""
        self._ballast.unlink(missing_ok=True)


def note_gap(connection: sqlite3.Connection, station: str, seq: int) -> None:
    """Remember that a result is gone, joined with the gaps beside it. Raises sqlite3.Error."""
    lo = hi = seq
    below = connection.execute(
        "SELECT lo, hi FROM gaps WHERE station = ? AND lo < ? ORDER BY lo DESC LIMIT 1", (station, seq)
    ).fetchone()
    above = connection.execute("SELECT hi FROM gaps WHERE station = ? AND lo = ?", (station, seq + 1)).fetchone()
    if above:
        hi = above[0]
        connection.execute("DELETE FROM gaps WHERE station = ? AND lo = ?", (station, seq + 1))
    if below and below[1] == seq - 1:
        lo = below[0]
    connection.execute("INSERT OR REPLACE INTO gaps VALUES(?, ?, ?)", (station, lo, hi))
