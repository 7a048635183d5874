"""The power goes while results are written: what was accepted is there afterwards.

A disk of its own (ext4 in a file) is shut down as by a power cut: what its journal and its cache had not written is gone, and
every write from then on fails (EXT4_IOC_SHUTDOWN without flushing the log, as xfstests' godown does). Then the writer is killed,
the disk mounted again and the outbox opened. What counts is what the ledger, on another disk, said before the cut. What this
cannot show: a drive that says "written" and has not.

Short by default; EDGE_INSPECTOR_LONG=1 cuts 30 times (-s shows the figures). Needs root, for mounting.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.faults.writer import Ledger, has_stored, reopened, writer
from tests.line import needed, until

CUTS = 30 if os.environ.get("EDGE_INSPECTOR_LONG") else 3
SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN."""
NO_LOG_FLUSH = 2
RESULTS_BEFORE_CUT = (50, 800)


class Disk:
    """An ext4 of its own that can lose its power."""

    def __init__(self, folder: Path) -> None:
        self.image, self.folder = folder / "image", folder / "disk"
        self.folder.mkdir()
        with self.image.open("wb") as file:
            file.truncate(512 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(self.image)], check=True)

    def mount(self) -> str:
        """Mount it; returns why that is impossible, or nothing."""
        command = ["mount", "-o", "loop", str(self.image), str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stderr.strip() if done.returncode else ""

    def lose_power(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(descriptor)

    def unmount(self) -> None:
        until(
            lambda: subprocess.run(["umount", str(self.folder)], capture_output=True, check=False).returncode == 0,
            what="umount",
        )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid():
        pytest.skip("mounting a disk of its own needs root")
    needed(shutil.which("mkfs.ext4"), "apt install e2fsprogs")
    disk = Disk(tmp_path)
    if why := disk.mount():
        pytest.skip(f"no loop mounts here: {why}")
    yield disk
    disk.unmount()


def test_what_was_accepted_is_there_after_every_power_cut(tmp_path: Path, disk: Disk) -> None:
    rng = random.Random(1)
    known: list[Ledger] = []
    later = 0
    for cut in range(CUTS):
        path = tmp_path / f"ledger-{cut}"
        process = writer(disk.folder, path, f"cut{cut}", tmp_path / "log")
        try:
            least = rng.randint(*RESULTS_BEFORE_CUT)
            until(partial(has_stored, path, least, process), 60, "load")
            known.append(Ledger(path))
            disk.lose_power()
        finally:
            process.kill()
            process.wait()
        disk.unmount()
        assert disk.mount() == ""
        found = reopened(disk.folder)
        assert [ledger.missing(found) for ledger in known] == [[]] * len(known), f"accepted, and lost by cut {cut}"
        later += len(Ledger(path).missing(found))
    results, triggers = sum(len(ledger.stored) for ledger in known), sum(len(ledger.taken) for ledger in known)
    print(f"\n{CUTS} power cuts: {results} results and {triggers} triggers accepted, 0 lost; {later} of those that were "
          f"accepted while the power went are missing; integrity ok {CUTS} of {CUTS}")  # fmt: skip
