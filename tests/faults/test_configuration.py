"""Remote configuration under crashes: every line of the shipped modules, then real kills with a real broker.

Short by default; EDGE_INSPECTOR_LONG=1 runs the full counts.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge_inspector import durable
from edge_inspector.config import LineConfig, parse_line
from edge_inspector.errors import InspectorError
from edge_inspector.remote import configuration, trial
from edge_inspector.remote.authority import Authority
from edge_inspector.remote.configuration import Configuration
from edge_inspector.remote.trial import FAILURE_S
from edge_inspector.schema import read_yaml
from tests.faults.crashes import Crash, Disk, Schedule
from tests.line import DaemonProcess, Listener, Mosquitto, device_folder, line_yaml, listening, until

LONG = bool(os.environ.get("EDGE_INSPECTOR_LONG"))
MODULES = tuple(Path(module.__file__) for module in (configuration, durable, trial) if module.__file__)
DEVICE, STATE = "plant/line/edge", "configuration.json"
FILE_VERSION = 3


def document(version: int, threshold: float = 1.0, *, camera: str = "synthetic://") -> dict[str, Any]:
    rois = {"all": {"bundle": "paper", "threshold": threshold}}
    return {
        "schema": "ei.line.v1", "version": version,
        "stations": {"s": {"product": "p", "products": {"p": "r"}, "cameras": {"top": {"uri": camera}}}},
        "recipes": {"r": {"cameras": {"top": {"rois": rois}}}},
    }  # fmt: skip


UNPREPARABLE = 66.0
"""A threshold whose bundle, in this world, cannot be opened."""


@dataclass
class World:
    """A device whose process may end at any line: a broker that keeps what is retained, a disk, a clock, and what was seen."""

    disk: Disk
    schedule: Schedule
    power: bool
    now_s: float = 0.0
    retained: bytes = b""
    failures: set[str] = field(default_factory=set)
    confirmed: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    """Versions that were rejected, rolled back or cancelled: never again."""
    applied: list[LineConfig] = field(default_factory=list)
    good_versions: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def boot(self) -> Configuration:
        for _ in range(20):
            try:
                with self.schedule.traced():
                    now = Configuration(
                        self.disk.folder / STATE, lambda: parse_line(document(FILE_VERSION), "line.yaml"), Authority(DEVICE),
                        clock=lambda: ("boot", self.now_s),
                    )  # fmt: skip
                    self.look(now)
                    now.take("desired", self.retained)  # the broker delivers it again
                return now
            except Crash:
                self.crashed()
        raise AssertionError("does not start")

    def crashed(self) -> None:
        if self.power:
            self.disk.cut()

    def look(self, now: Configuration) -> None:
        """What the daemon does twice a second: prepare, put in force, report."""
        now.trials.tick(self.failures, connected=True)
        candidate = now.candidate
        if candidate is not None:
            bad = candidate.line.recipes["r"].cameras["top"].rois["all"].threshold == UNPREPARABLE
            now.prepared(candidate, InspectorError("no such bundle") if bad else None)
        self.check(now)

    def check(self, now: Configuration) -> None:
        """What must hold whenever something shows: `applied` and the report are the visible steps."""
        line, told = now.line, now.report()
        if not self.applied or self.applied[-1] != line:
            self.applied.append(line)
        on_disk = self.on_disk()
        written = [kept for kept in (on_disk.get("trial"), on_disk.get("good")) if kept]
        if now.is_remote and line.version not in [one["version"] for one in written]:
            self.problems.append(f"version {line.version} shows, and is not on disk for certain")
        if line.version in self.refused:
            self.problems.append(f"version {line.version} was given up before")
        if line.recipes["r"].cameras["top"].rois["all"].threshold == UNPREPARABLE:
            self.problems.append("one that could not be prepared is in force")
        self.good_versions.append(told.good_version)
        for entry in told.history:
            if entry.outcome in ("rejected", "rolled_back", "cancelled") and entry.version is not None:
                self.refused.add(entry.version)

    def on_disk(self) -> dict[str, Any]:
        """What survives whatever comes."""
        path = self.disk.folder / STATE
        data = self.disk.certain().get(path) if self.power else path.read_bytes() if path.exists() else None
        found: dict[str, Any] = json.loads(data) if data else {}
        return found

    def do(self, now: Configuration, step: tuple[Any, ...]) -> Configuration:
        """One step of a script, again after each crash: senders repeat what was not answered."""
        for _ in range(20):
            try:
                with self.schedule.traced():
                    self._one(now, step)
                    self.look(now)
                    self.look(now)
                return now
            except Crash:
                self.crashed()
                now = self.boot()
        raise AssertionError("never got through")

    def _one(self, now: Configuration, step: tuple[Any, ...]) -> None:
        kind, *more = step
        if kind == "want":
            version, threshold, confirm_s = more
            order = {
                "schema": "ei.config-desired.v1",
                "by": "anna",
                "line": document(version, threshold),
                "confirm_s": confirm_s,
            }
            self.retained = json.dumps(order).encode()
            if confirm_s == 0:
                self.confirmed.add(version)
            now.take("desired", self.retained)
        elif kind == "old":  # a broker that was restored delivers what it once kept
            version, threshold = more
            order = {"schema": "ei.config-desired.v1", "by": "anna", "line": document(version, threshold)}
            now.take("desired", json.dumps(order).encode())
        elif kind == "wrong":
            now.take("desired", json.dumps({"by": "anna", "line": {**document(more[0]), "stations": 5}}).encode())
        elif kind in ("confirm", "cancel", "reset"):
            if kind == "confirm" and now.trials.trial and now.line.version == more[0] and not self.failures:
                self.confirmed.add(more[0])
            order = {"schema": "ei.confirm.v1", "by": "ben", "version": more[0], "action": kind}
            now.take("confirm", json.dumps(order).encode())
        elif kind == "passes":
            self.now_s += more[0]
        elif kind == "fails":
            self.failures = set(more)
        elif kind == "starts":
            raise Crash

    def finish(self, now: Configuration) -> None:
        """A long time later."""
        self.now_s += 1e6
        now = self.do(now, ("nothing",))
        told = now.report()
        if told.trial is not None:
            self.problems.append("still on trial")
        if told.version != told.good_version:
            self.problems.append(f"version {told.version} in force, {told.good_version} is good")
        if told.source == "remote" and told.version not in self.confirmed:
            self.problems.append(f"version {told.version} is in force and nobody confirmed it")
        contents: dict[int, LineConfig] = {}
        for line in self.applied:
            if contents.setdefault(line.version, line) != line:
                self.problems.append(f"version {line.version} changed its content")


SCRIPTS: dict[str, tuple[int, list[tuple[Any, ...]]]] = {  # what is in force at the end when nothing crashes, and what happens
    "confirmed": (4, [("want", 4, 2.0, 60), ("confirm", 4)]),
    "forgotten": (3, [("want", 4, 2.0, 60), ("passes", 61)]),
    "wrong, then right": (4, [("wrong", 4), ("want", 4, 2.0, 60), ("confirm", 4)]),
    "cannot be prepared": (5, [("want", 4, UNPREPARABLE, 60), ("confirm", 4), ("want", 5, 2.0, 60), ("confirm", 5)]),
    "replaced on trial": (5, [("want", 4, 2.0, 60), ("want", 5, 3.0, 60), ("confirm", 4), ("confirm", 5)]),
    "confirmed, then forgotten": (4, [("want", 4, 2.0, 60), ("confirm", 4), ("want", 6, 5.0, 60), ("old", 5, 4.0), ("passes", 61)]),
    "an old one comes back": (6, [("want", 6, 2.0, 60), ("confirm", 6), ("old", 5, 7.0), ("confirm", 5), ("old", 6, 9.0)]),
    "cancelled": (3, [("want", 4, 2.0, 60), ("cancel", 4), ("confirm", 4), ("old", 4, 2.0)]),
    "reset": (3, [("want", 4, 2.0, 60), ("confirm", 4), ("reset", 4), ("old", 4, 2.0)]),
    "without a trial": (4, [("want", 4, 2.0, 0), ("want", 5, 3.0, 60), ("passes", 61)]),
    "something fails": (3, [("want", 4, 2.0, 600), ("fails", "s/top: camera_fault"), ("confirm", 4), ("passes", FAILURE_S + 1), ("fails",)]),
    "starts again and again": (3, [("want", 4, 2.0, 600), ("starts",), ("starts",), ("starts",), ("confirm", 4)]),
}  # fmt: skip


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory: a disk's fsync takes milliseconds, thousands of times."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield folder
    shutil.rmtree(folder)


def run(
    memory: Path, script: list[tuple[Any, ...]], at: tuple[int, ...], *, power: bool, monkeypatch: pytest.MonkeyPatch
) -> World:
    for path in memory.iterdir():
        path.unlink()
    disk = Disk(memory)
    monkeypatch.setattr(os, "fsync", disk.fsync)
    world = World(disk, Schedule(MODULES, at), power)
    now = world.boot()
    for step in script:
        now = world.do(now, step) if step[0] != "starts" else world.boot()
    world.finish(now)
    monkeypatch.undo()
    return world


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # files of the dead
def test_a_crash_at_any_line_ends_in_a_good_configuration(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, count, lines, crashes = random.Random(7), 0, 0, 0
    for name, (version, script) in SCRIPTS.items():
        calm = run(memory, script, (), power=False, monkeypatch=monkeypatch)
        assert calm.problems == [], name
        assert calm.applied[-1].version == version, name
        lines += calm.schedule.lines
        singles = [(line,) for line in range(1, calm.schedule.lines + 40)]
        pairs = [tuple(sorted(rng.sample(range(1, calm.schedule.lines * 2), 2))) for _ in singles]
        for at in (*singles, *pairs) if LONG else (*singles[::14], *pairs[::32]):
            for power in (False, True):
                world = run(memory, script, at, power=power, monkeypatch=monkeypatch)
                assert world.problems == [], f"{name}, crash before line {at}, {'power cut' if power else 'kill'}"
                count, crashes = count + 1, crashes + world.schedule.done
    print(f"\n{len(SCRIPTS)} scripts of {lines} lines: {count} schedules, {crashes} crashes, 0 violations")
    assert count >= (5000 if LONG else 1500)
    assert crashes >= count / 2, "the crashes must have happened"


def reported(listener: Listener) -> dict[str, Any]:
    return (listener.of("config", "reported") or [{}])[-1]


def test_kills_while_configurations_come_and_go_end_in_a_confirmed_one(tmp_path: Path, mosquitto: Mosquitto) -> None:
    """The daemon is killed at any time while somebody wants, confirms and cancels; the broker is real, and so is the disk."""
    kills, rng = (20 if LONG else 3), random.Random(5)
    folder = device_folder(tmp_path / "device", mosquitto.port, line_yaml())
    base = parse_line(read_yaml(line_yaml().encode(), "line.yaml"), "line.yaml").document()
    confirmed, version = {3}, 3

    def wanted(number: int) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(json.dumps(base))
        made["version"] = number
        made["recipes"]["whole"]["cameras"]["top"]["rois"]["all"]["threshold"] = float(number)
        return made

    with listening(mosquitto.port) as listener, DaemonProcess(folder) as daemon:

        def restarted() -> None:
            daemon.kill()
            daemon.start()

        for _ in range(kills):
            until(lambda: reported(listener).get("version"), 30, "a report")
            version += 1
            order = {"by": "anna", "line": wanted(version), "confirm_s": 600}
            listener.say(order, "config", "desired", retain=True)
            time.sleep(rng.uniform(0, 1.5))
            action = rng.choice(["confirm", "confirm", "cancel"])
            if rng.random() < 0.5:
                restarted()

            def decided(number: int = version, action: str = action) -> bool:
                told = reported(listener)
                if told.get("trial") and told["version"] == number:
                    listener.say({"by": "ben", "version": number, "action": action}, "config", "confirm")
                    time.sleep(0.3)
                outcomes = {e["outcome"] for e in told.get("history", ()) if e["version"] == number}
                return bool(outcomes & {"committed", "cancelled", "rolled_back", "rejected"})

            threading.Timer(rng.uniform(0, 2.0), restarted).start()
            until(decided, 60, f"an end of version {version}")
            outcome = next(e["outcome"] for e in reported(listener)["history"][::-1] if e["version"] == version)
            if outcome == "committed":
                confirmed.add(version)
            time.sleep(2.2)
            told = until(lambda: (r := reported(listener)) and not r.get("trial") and r, 30, "rest")
        assert told["version"] == told["good_version"] == max(confirmed)
        assert told["line"] == wanted(max(confirmed)) or max(confirmed) == 3
        assert {told["good_version"] for told in listener.of("config", "reported")} <= confirmed
        assert "Traceback" not in daemon.log
