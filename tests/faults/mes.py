"""A user of results as a process: appends each to a file, on the disk before the next, and goes on where it stopped.

python -m tests.faults.mes PORT FOLDER [SYNC]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.line import subscribing


@dataclass(frozen=True)
class Received:
    """One line of the file."""

    stream: str
    seq: int
    trigger_id: str
    verdict: str
    triggered_s: float
    decided_s: float
    total_ms: float
    received_s: float
    """By the wall clock, as the two above."""
    duplicates: int
    """What this life of the subscriber had let go as known, so far."""
    replayed: int


KINDS: tuple[Any, ...] = (str, int, str, str, float, float, float, float, int, int)


class Mes:
    """The process; may be killed and started again."""

    def __init__(self, folder: Path, port: int, *, sync: bool = True) -> None:
        """Without `sync` what it got survives its own end, but no power cut."""
        folder.mkdir()
        self.folder, self.port, self.sync = folder, port, sync
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Mes:
        with (self.folder / "log").open("ab") as log:
            command = [sys.executable, "-m", "tests.faults.mes", str(self.port), str(self.folder), "sync" * self.sync]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        return self

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def lives(self) -> list[list[Received]]:
        """What each life of the process got, in the order in which it came."""
        lives: list[list[Received]] = []
        path = self.folder / "received"
        written = path.read_text().rpartition("\n")[0] if path.exists() else ""  # it may be in the middle of a line
        for line in written.splitlines():
            if line == "start":
                lives.append([])
            else:
                lives[-1].append(_read(line))
        return lives

    def newest(self) -> Received | None:
        """What came last; cheaper than `lives`."""
        path = self.folder / "received"
        if not path.exists():
            return None
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 1024))
            last = file.read().decode().rpartition("\n")[0].splitlines()[-1:]
        return None if last in ([], ["start"]) else _read(last[0])


def _read(line: str) -> Received:
    return Received(*(kind(word) for kind, word in zip(KINDS, line.split(), strict=True)))


def main(port: int, folder: Path, *, sync: bool) -> None:
    file = os.open(folder / "received", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.write(file, b"start\n")
    with subscribing(port, state=folder / "state") as subscriber:
        while True:
            for r in subscriber.results(1.0):
                times = f"{r.triggered_at.timestamp():.4f} {r.decided_at.timestamp():.4f} {r.times_ms.total} {time.time():.4f}"
                counts = f"{subscriber.duplicates} {subscriber.replayed}"
                os.write(file, f"{r.stream} {r.seq} {r.trigger_id} {r.verdict.value} {times} {counts}\n".encode())
                if sync:
                    os.fsync(file)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sync=sys.argv[3] == "sync")
