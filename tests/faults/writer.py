"""A process that hands parts to a real Outbox and writes down, in a file elsewhere, what was accepted: when its Future resolved.

python -m tests.faults.writer FOLDER LEDGER NAME

One line each: `taken TRIGGER` once a trigger is journalled, `stored SEQ TRIGGER` once a result is on disk, `refused KIND NAME`,
`handed N` when it ends by itself.
Ends by being killed, or once a file `enough` lies beside the ledger.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

from edge_inspector.errors import OutboxError
from edge_inspector.journal import Journalled
from edge_inspector.outbox import Outbox
from edge_inspector.results import Result, Verdict
from tests.test_outbox import result, stored, trigger

log = logging.getLogger(__name__)

UNANSWERED = 40
STARTS = 50
"""A start that the disk refuses is tried again, as systemd would."""


class Ledger:
    """What the process wrote."""

    def __init__(self, path: Path) -> None:
        written = path.read_text().rpartition("\n")[0] if path.exists() else ""  # it may be in the middle of a line
        lines = [line.split() for line in written.splitlines()]
        self.taken = [line[1] for line in lines if line[0] == "taken"]
        self.stored = {int(line[1]): line[2] for line in lines if line[0] == "stored"}
        self.refused = Counter(line[1] for line in lines if line[0] == "refused")
        self.handed = sum(int(line[1]) for line in lines if line[0] == "handed")

    def missing(self, found: dict[int, str]) -> list[str]:
        """What was accepted and is not there, or not as it was."""
        answered = set(found.values())
        lost = [f"result {seq} of {name}" for seq, name in self.stored.items() if found.get(seq) != name]
        return lost + [f"trigger {name}" for name in self.taken if name not in answered]


def reopened(folder: Path) -> dict[int, str]:
    """What is there when the outbox is opened again: trigger by number."""
    with contextlib.closing(sqlite3.connect(folder / "outbox.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with Outbox(folder, ["s"]) as outbox:
        found = {r.seq: r.trigger_id for r in stored(outbox)}
        assert not outbox.gaps("s", 1, outbox.head("s").hi, 1), "dropped by a quota"
    assert not list(folder.glob("outbox.damaged-*"))
    assert sorted(found) == list(range(1, len(found) + 1))
    assert len(set(found.values())) == len(found), "a trigger with two results"
    return found


def writer(folder: Path, ledger: Path, name: str, log: Path, under: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start the process, `under` another program if one is given."""
    command = [*under, sys.executable, "-m", "tests.faults.writer", str(folder), str(ledger), name]
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


def has_stored(ledger: Path, least: int, process: subprocess.Popen[bytes]) -> bool:
    """Whether so many results are said to be stored. Fails once the process has ended."""
    assert process.poll() is None, "the writer ended by itself"
    return len(Ledger(ledger).stored) >= least


def write(outbox: Outbox, ledger: int, name: str, enough: Path) -> None:
    """Two futures for each part, as on the line: its trigger's, then its result's."""

    def taken(what: str, future: Future[Journalled]) -> None:
        os.write(ledger, f"refused trigger {what}\n".encode() if future.exception() else f"taken {what}\n".encode())

    def kept(what: str, future: Future[Result]) -> None:
        line = f"refused result {what}\n" if future.exception() else f"stored {future.result().seq} {what}\n"
        os.write(ledger, line.encode())

    waiting: deque[Future[Result]] = deque()
    for number in count(1):
        if enough.exists():
            os.write(ledger, f"handed {number - 1}\n".encode())
            return
        what = f"{name}-{number}"
        outbox.journal("s", replace(trigger(number), trigger_id=what)).add_done_callback(partial(taken, what))
        part = result(number, Verdict.FAIL if number % 10 == 0 else Verdict.PASS, "x" * 200)
        waiting.append(outbox.submit(part.model_copy(update={"trigger_id": what})))
        waiting[-1].add_done_callback(partial(kept, what))
        if len(waiting) > UNANSWERED:
            waiting.popleft().result(60)


def main(folder: Path, path: Path, name: str) -> None:
    logging.basicConfig(level=logging.INFO)
    ledger = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for _ in range(STARTS):
        try:
            with Outbox(folder, ["s"]) as outbox:
                write(outbox, ledger, name, path.with_name("enough"))
            return
        except OutboxError as error:
            log.warning("start refused: %s", error)
            os.write(ledger, b"refused start -\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
