"""A user of results as a process: appends each to a file, on the disk before the next, and goes on where it stopped.

python -m tests.faults.mes PORT FOLDER
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.line import subscribing


@dataclass(frozen=True)
class Received:
    """One line of the file."""

    stream: str
    seq: int
    trigger_id: str
    verdict: str
    duplicates: int
    """What this life of the subscriber had let go as known, so far."""
    replayed: int


class Mes:
    """The process; may be killed and started again."""

    def __init__(self, folder: Path, port: int) -> None:
        folder.mkdir()
        self.folder, self.port = folder, port
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Mes:
        with (self.folder / "log").open("ab") as log:
            command = [sys.executable, "-m", "tests.faults.mes", str(self.port), str(self.folder)]
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
        for line in path.read_text().splitlines() if path.exists() else ():
            if line == "start":
                lives.append([])
            else:
                stream, seq, trigger_id, verdict, duplicates, replayed = line.split()
                lives[-1].append(Received(stream, int(seq), trigger_id, verdict, int(duplicates), int(replayed)))
        return lives


def main(port: int, folder: Path) -> None:
    file = os.open(folder / "received", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.write(file, b"start\n")
    with subscribing(port, state=folder / "state") as subscriber:
        while True:
            for r in subscriber.results(1.0):
                counts = f"{subscriber.duplicates} {subscriber.replayed}"
                os.write(file, f"{r.stream} {r.seq} {r.trigger_id} {r.verdict.value} {counts}\n".encode())
                os.fsync(file)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
